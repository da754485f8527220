"""Chooses which images of a data set are held out for validation."""

from __future__ import annotations

import numpy as np

from keras_coatnet.arguments import as_python, whole_number


def count_held_out(held_out: float, count: int, name: str) -> int:
    """Returns how many images of a data set are held out.

    Args:
        held_out: a share above 0 and below 1, or a whole number of images from 2 on.
        count: how many images there are.
        name: the data set's, for messages.

    Returns:
        At least 1, and at most half of the images if `held_out` is a number of them.

    Raises:
        ValueError: `held_out` is neither, or more than half of the images.
    """
    held_out = as_python(held_out)
    is_real = isinstance(held_out, int | float) and not isinstance(held_out, bool)
    is_count = is_real and held_out >= 2 and float(held_out).is_integer()
    if not (is_count or (is_real and 0 < held_out < 1)):
        raise ValueError(
            "`held_out` must be a share above 0 and below 1, or a whole number of images from 2 "
            f"on. Received: held_out={held_out!r}"
        )
    if is_count and held_out > count / 2:
        raise ValueError(
            f"{name} has {count:,} images, and held_out={held_out!r} is more than half of them. "
            "Give a smaller number, or a share such as 0.1."
        )
    return max(1, int(held_out) if is_count else round(held_out * count))


def choose_held_out(
    labels: np.ndarray, classes: tuple[str, ...], held_out: float, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses images to hold out: the same share of each class, at least one image but not all.

    Args:
        labels: (images,), int64.
        classes: the classes' names.
        held_out: a share above 0 and below 1, or a whole number of images from 2 on.
        seed: decides which images.
        name: the data set's, for messages.

    Returns:
        Positions of the images that are kept and of those held out, ascending.

    Raises:
        ValueError: `held_out` (see `count_held_out`) or `seed` is out of range, or a class has a
            single image.
    """
    wanted = count_held_out(held_out, len(labels), name)
    seed = whole_number("seed", seed, 0)
    present, sizes = np.unique(labels, return_counts=True)
    single = [classes[label] for label in present[sizes == 1]]
    if single:
        raise ValueError(
            f"{name} has a single image of {some_names(single)}. Expected at least two of each "
            "class, one to train on and one to hold out."
        )
    if held_out < 1:
        counts = [round(held_out * int(size)) for size in sizes]
    else:
        # Each class's part of `wanted`, rounded down; the largest remainders get one image more.
        counts, remainders = np.divmod(wanted * sizes, len(labels))
        largest = np.argsort(-remainders, kind="stable")[: wanted - counts.sum()]
        counts[largest] += 1
    held = []
    for label, size, count in zip(present, sizes, counts, strict=True):
        indices = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, int(label))).permutation(indices)
        held.append(order[: min(max(1, count), size - 1)])
    chosen = np.sort(np.concatenate(held))
    return np.delete(np.arange(len(labels)), chosen), chosen


def some_names(names: list[str], most: int = 5) -> str:
    """Lists names for an error's message.

    Args:
        names: the names.
        most: how many to list.

    Returns:
        The first names, and how many more there are; an empty text for no names.

    Example:
        >>> some_names(["cat", "dog", "owl"], most=2)
        "'cat', 'dog' and 1 more"
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
