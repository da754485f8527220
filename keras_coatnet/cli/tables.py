"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int], indent: str = "") -> Iterator[str]:
    """Lays out a table for a terminal.

    Args:
        rows: the rows, all with the same number of cells.
        right: positions of the columns that are aligned to the right, such as numbers.
        indent: what each line begins with.

    Yields:
        A line for each row.

    Example:
        >>> print(*aligned([("a", "1"), ("bcd", "10")], right=(1,)), sep="|")
        a     1|bcd  10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = frozenset(right)
    for row in rows:
        cells = [
            cell.rjust(width) if position in right else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (indent + "  ".join(cells)).rstrip()


def markdown(rows: Sequence[Sequence[str]], right: Iterable[int]) -> Iterator[str]:
    """Lays out a table in Markdown.

    Args:
        rows: the rows, the first of which has the titles.
        right: positions of the columns that are aligned to the right.

    Yields:
        The lines of the table.

    Example:
        >>> print(*markdown([("a", "b"), ("x", "1")], right=(1,)), sep=" ")
        | a | b | |---|---:| | x | 1 |
    """
    titles, *others = rows
    right = frozenset(right)
    yield f"| {' | '.join(titles)} |"
    yield f"|{'|'.join('---:' if place in right else '---' for place in range(len(titles)))}|"
    for row in others:
        yield f"| {' | '.join(row)} |"


def or_dash(value: Any, form: str) -> str:
    """Formats a value that may be missing.

    Args:
        value: the value, or None.
        form: a format string with one place, such as `"{:.2f}"`.

    Returns:
        The text, or `"-"` for None.

    Example:
        >>> or_dash(82.4, "{:.2f}"), or_dash(None, "{:.2f}")
        ('82.40', '-')
    """
    return "-" if value is None else form.format(value)
