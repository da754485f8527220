"""Functions that declare the fields of `CoAtNetConfig`, with a default and a check of the value.

A check takes the field's name and its value. It returns the value as Python's own type, or raises a
`ValueError`. `CoAtNetConfig.__post_init__` runs all checks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from keras_coatnet.arguments import as_python, boolean, choice, number, whole_number

# Limits that refuse mistakes and damaged files before they take all of the machine's memory. The
# paper's largest network has 56 blocks, 3072 channels and 2.4 billion parameters.
MAX_BLOCKS, MAX_CHANNELS, MAX_SIDE = 1_000, 1 << 16, 1 << 14
MAX_PARAMETERS = 10**11


def checked(check: Callable[[str, Any], Any], **options: Any) -> Any:
    """Declares a field with a check; `options` are those of `dataclasses.field`."""
    return dataclasses.field(metadata={"check": check}, **options)


def one_of(*choices: str | int | None) -> Any:
    """Declares a field that takes one of a few values; the first is the default."""
    return checked(functools.partial(choice, choices=choices), default=choices[0])


def true_or_false(default: bool) -> Any:
    """Declares a field that takes True or False."""
    return checked(boolean, default=default)


def count(default: int) -> Any:
    """Declares a field that takes a whole number of at least 1: channels, or a factor of them."""
    return checked(functools.partial(whole_number, most=MAX_CHANNELS), default=default)


def bounded(default: float, **bounds: float) -> Any:
    """Declares a field that takes a number; `bounds` are those of `arguments.number`."""
    return checked(functools.partial(number, **bounds), default=default)


def optional(**bounds: float) -> Any:
    """Declares a field that takes a number or None, which is the default."""

    def check(name: str, value: Any) -> float | None:
        return None if value is None else number(name, value, **bounds)

    return checked(check, default=None)


def as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Checks a tuple, or a list as JSON has it; tuples make a configuration hashable."""
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"`{name}` must be a tuple. Received: {name}={value!r:.300}")
    return tuple(
        tuple(map(as_python, item)) if isinstance(item, (tuple, list)) else as_python(item)
        for item in value
    )


def as_stem_width(name: str, value: Any) -> tuple[int, ...]:
    """Checks the channels of the stem's two convolutions: a number for both, or a pair."""
    widths = as_tuple(name, value if isinstance(value, (tuple, list)) else (value, value))
    if len(widths) != 2:
        raise ValueError(
            f"`{name}` must be one number or a pair, for the stem's two convolutions. "
            f"Received: {name}={widths}"
        )
    return tuple(whole_number(name, width, most=MAX_CHANNELS) for width in widths)


def as_input_size(name: str, value: Any) -> int | tuple[int, ...]:
    """Checks a size in pixels: one number, or a height and a width."""
    size = as_tuple(name, value) if isinstance(value, (tuple, list)) else as_python(value)
    sides = size if isinstance(size, tuple) else (size, size)
    for side in sides:
        whole_number(name, side, most=MAX_SIDE)
    if len(sides) != 2 or min(sides) < 32:
        raise ValueError(
            f"`{name}` must be at least 32: one number, or a height and a width. Received: {size}"
        )
    return size


def per_channel(**bounds: float) -> Any:
    """Declares a field that takes a tuple of numbers, one for each channel of the images."""

    def check(name: str, value: Any) -> tuple[float, ...]:
        return tuple(number(name, item, **bounds) for item in as_tuple(name, value))

    return checked(check, default=(0.5, 0.5, 0.5))
