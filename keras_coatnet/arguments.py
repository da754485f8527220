"""Checks of arguments, which raise a `ValueError` that says what was expected.

NumPy's numbers, booleans and strings are converted to Python's, because JSON takes no others and
`labels.max() + 1` is a common way to count classes. True and False are not accepted as numbers, nor
1 and 0 as booleans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# Numbers must be below it: float32 overflows soon after, and very long whole numbers cannot be
# converted to floats.
MAX_NUMBER = 1e30


def as_python(value: Any) -> Any:
    """Returns a NumPy scalar as Python's own value, and any other value unchanged.

    Args:
        value: anything.

    Returns:
        An int, a float, a bool or a str for a NumPy scalar, else `value`.

    Example:
        >>> as_python(np.float32(0.5)), as_python(np.bool_(True)), as_python(None)
        (0.5, True, None)
    """
    if isinstance(value, np.integer) and not isinstance(value, np.timedelta64):
        return int(value)
    for numpy_type, python_type in ((np.floating, float), (np.bool_, bool), (np.str_, str)):
        if isinstance(value, numpy_type):
            return python_type(value)
    return value


def whole_number(
    argument: str, value: Any, least: int = 1, most: int | None = None, advice: str = ""
) -> int:
    """Returns a whole number as an int.

    Args:
        argument: the argument's name.
        value: the value.
        least: the smallest that it may be.
        most: the largest that it may be; None: any.
        advice: the last sentence of the message, which says what to do.

    Returns:
        The number.

    Raises:
        ValueError: it is not a whole number, or out of that range.

    Example:
        >>> whole_number("classes", np.int64(3))
        3
    """
    value = as_python(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        expected = f"at least {least}"
    elif most is not None and value > most:
        expected = f"at most {most}"
    else:
        return value
    raise ValueError(
        f"`{argument}` must be a whole number of {expected}. "
        f"Received: {argument}={value!r:.100}{advice and '. '}{advice}"
    )


def two_whole_numbers(argument: str, value: Any) -> tuple[int, int]:
    """Returns a pair, such as a height and a width, as a tuple of two ints of at least 1.

    Args:
        argument: the argument's name.
        value: the value.

    Returns:
        The pair.

    Raises:
        ValueError: it is not such a pair.

    Example:
        >>> two_whole_numbers("table_size", [np.int64(7), 5])
        (7, 5)
    """
    try:
        first, second = (whole_number(argument, part) for part in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must be two whole numbers of at least 1. "
            f"Received: {argument}={value!r:.100}"
        ) from error
    return first, second


def number(
    argument: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Returns a finite number as a float or an int.

    Args:
        argument: the argument's name.
        value: the value.
        above: an exclusive lower bound; None: no such bound.
        least: an inclusive lower bound; None: no such bound.
        below: an exclusive upper bound; None: no such bound.
        most: an inclusive upper bound; None: no such bound.

    Returns:
        The number.

    Raises:
        ValueError: it is not a number, or out of that range.

    Example:
        >>> number("rate", np.float32(0.5), least=0, below=1)
        0.5
    """
    value = as_python(value)
    bounds = []
    if above is not None or least is not None:
        bounds.append(f"at least {least:g}" if above is None else f"above {above:g}")
    if most is None or below is not None:
        bounds.append(f"below {MAX_NUMBER if below is None else below:g}")
    else:
        bounds.append(f"at most {most:g}")
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not -MAX_NUMBER < value < MAX_NUMBER
        or (above is not None and not value > above)
        or (least is not None and not value >= least)
        or (below is not None and not value < below)
        or (most is not None and not value <= most)
    ):
        raise ValueError(
            f"`{argument}` must be a number {' and '.join(bounds)}. "
            f"Received: {argument}={value!r:.100}"
        )
    return value


def boolean(argument: str, value: Any) -> bool:
    """Returns True or False. Other values are refused, because the string "False" is true.

    Args:
        argument: the argument's name.
        value: the value.

    Returns:
        The same, as a bool.

    Raises:
        ValueError: it is neither.

    Example:
        >>> boolean("include_top", np.bool_(True))
        True
    """
    value = as_python(value)
    if not isinstance(value, bool):
        raise ValueError(f"`{argument}` must be True or False. Received: {argument}={value!r:.100}")
    return value


def choice(argument: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Returns a value if it is one of a few, and of the same type: True is not 1, 2.0 is not 2.

    Args:
        argument: the argument's name.
        value: the value.
        choices: the allowed values: strings, whole numbers or None.

    Returns:
        The value.

    Raises:
        ValueError: it is none of them.

    Example:
        >>> choice("strides", np.int64(2), (1, 2))
        2
    """
    value = as_python(value)
    of_their_kind = isinstance(value, tuple(map(type, choices))) and not isinstance(value, bool)
    if not of_their_kind or value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {argument}={value!r:.100}"
        )
    return value


def check_fields(found: Any, kind: type) -> None:
    """Checks the names in what JSON gives for the fields of a dataclass, but not their values.

    Args:
        found: a dictionary, by the names of fields.
        kind: the dataclass.

    Raises:
        ValueError: it is not a dictionary, lacks a field without default, or has an unknown one.

    Example:
        >>> @dataclasses.dataclass
        ... class Point:
        ...     x: int
        ...     y: int = 0
        >>> check_fields({"x": 3}, Point)
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"Expected the fields of {kind.__name__}. Received: {found!r:.300}")
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    unknown = [name for name in found if name not in known]
    missing = [name for name in needed if name not in found]
    if unknown or missing:
        raise ValueError(
            f"These are not the fields of {kind.__name__}. Unknown: {unknown!s:.300}; "
            f"missing: {missing}. Known: {', '.join(known)}."
        )
