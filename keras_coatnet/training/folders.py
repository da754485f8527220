"""Folders of pictures: one sub-folder a class, and what is wrong with them said at once.

Everything here happens before a picture is opened: names are listed, checked, ordered and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import warnings

import numpy as np

from keras_coatnet.labels import class_names

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
# Formats that a data set may well be in, and that would otherwise be left out as "no pictures".
# TensorFlow 2.21 reads WebP, but as an animation, of shape (frames, height, width, 3).
_TO_CONVERT = (".avif", ".heic", ".jp2", ".tif", ".tiff", ".webp")
VALIDATION_NAMES = ("val", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Folder:
    """The pictures below a folder.

    Attributes:
        root: the folder.
        classes: names of the classes, in the order of their labels.
        paths: the pictures' files as the file system spells them, by class and name.
        labels: (pictures,), int64, the label of each.
    """

    root: pathlib.Path
    classes: tuple[str, ...]
    paths: list[bytes]
    labels: np.ndarray

    def part(self, indices: np.ndarray) -> Folder:
        """The pictures at some positions, in that order."""
        paths = [self.paths[index] for index in indices]
        return dataclasses.replace(self, paths=paths, labels=self.labels[indices])


def read_folder(root: str | os.PathLike) -> Folder:
    """Lists the pictures of a folder that holds one sub-folder for each class.

    Pictures (.bmp, .gif, .jpeg, .jpg, .png, in either case) may lie in further folders below their
    class. Hidden files and folders are passed over. Other files are left out with a warning.

    The classes are ordered by name. Where all of them are WordNet ids of ImageNet-1k, or else of
    ImageNet-12k, the classes are all of ImageNet's and the labels those of the public checkpoints,
    also if only some of the classes are there.

    Args:
        root: the folder.

    Returns:
        Its `Folder`.

    Raises:
        ValueError: it is missing, empty, has one class only, a class without pictures, or pictures
            in a format that has to be converted first.

    Example:
        folder = read_folder("flowers/train")  # flowers/train/daisy/1.jpg, ...
    """
    root = pathlib.Path(root).expanduser()
    names = subfolders(root)
    if not names:
        _refuse_without_classes(root)
    found = {name: _pictures_below(root / name) for name in names}
    _report_others(root, [path for _, others in found.values() for path in others])
    empty = [name for name in names if not found[name][0]]
    if empty:
        raise ValueError(
            f"{root} has class folders without pictures: {_some(empty)}. Expected "
            f"{', '.join(SUFFIXES)} files in each; remove the folders, or fill them."
        )
    if len(names) == 1:
        raise ValueError(
            f"{root} has one class only: {names[0]!r}. Expected a sub-folder for each of at least "
            "two classes."
        )
    classes = _ordered(names)
    paths, labels = [], []
    for label, name in enumerate(classes):
        pictures = found[name][0] if name in found else []
        paths += pictures
        labels += [label] * len(pictures)
    return Folder(root, classes, paths, np.array(labels, "int64"))


def subfolders(root: pathlib.Path) -> list[str]:
    """Names of the folders in a folder that are not hidden, sorted.

    Raises:
        ValueError: there is no such folder.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"Expected a folder of pictures, one sub-folder a class. {root} {what}.")
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def find_pair(
    root: pathlib.Path, train: str | None, validation: str | None
) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Finds the sub-folders for training and validation.

    Args:
        root: the folder.
        train: name of the sub-folder for training; None: `train`.
        validation: name of the one for validation; None: `val`, `validation` or `test`.

    Returns:
        The two, or None if the folder holds the classes directly.

    Raises:
        ValueError: only one of the two is there, or a name that was given is not.
    """
    names = subfolders(root)
    for wanted in filter(None, (train, validation)):
        _check_there(root, names, wanted)
    second = validation or next((name for name in VALIDATION_NAMES if name in names), None)
    first = train or ("train" if "train" in names else None)
    if first and second:
        return root / first, root / second
    # A class may be called "train" as well, and holds pictures then, not folders.
    lone = first or second
    if lone and (train or validation or subfolders(root / lone)):
        raise ValueError(
            f"{root} has {lone}/ but no second part. Expected train/ and one of "
            f"{', '.join(name + '/' for name in VALIDATION_NAMES)}. Give {root / lone} to hold out "
            "a share of it instead."
        )
    return None


def find_part(root: pathlib.Path, name: str | None) -> pathlib.Path:
    """Finds the sub-folder to evaluate on; None: that for validation, or else the folder itself.

    Raises:
        ValueError: there is no such sub-folder, or there is only one for training.
    """
    names = subfolders(root)
    if name is not None:
        _check_there(root, names, name)
        return root / name
    for each in (*VALIDATION_NAMES, "train"):
        if each in names and subfolders(root / each):
            if each == "train":
                raise ValueError(
                    f"{root} has train/ but no part for validation. Name the part to evaluate on."
                )
            return root / each
    return root


def check_same_classes(train: Folder, validation: Folder) -> None:
    """Checks that two folders hold the same classes.

    Raises:
        ValueError: they do not; the message names the differences.
    """
    first, second = (
        {folder.classes[label] for label in np.unique(folder.labels)}
        for folder in (train, validation)
    )
    if first != second:
        differences = [
            f"only in {folder.root}: {_some(sorted(names))}"
            for folder, names in ((train, first - second), (validation, second - first))
            if names
        ]
        raise ValueError(
            f"{train.root} and {validation.root} must hold the same classes. "
            f"{'; '.join(differences).capitalize()}."
        )


def hold_out(folder: Folder, fraction: float, seed: int) -> tuple[Folder, Folder]:
    """Splits a folder in two, with the same share of each class.

    Args:
        folder: what to split.
        fraction: share of the second part, above 0 and below 1; at least one picture a class.
        seed: decides which pictures; the same ones for the same names and seed.

    Returns:
        The larger part and the part held out.

    Raises:
        ValueError: the fraction is out of range, or a class has a single picture.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`held_out` must be above 0 and below 1. Received: held_out={fraction!r}")
    kept, held = [], []
    single = []
    for label in np.unique(folder.labels):
        indices = np.flatnonzero(folder.labels == label)
        if len(indices) == 1:
            single.append(folder.classes[label])
            continue
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        order = np.random.default_rng((seed, int(label))).permutation(indices)
        held.append(order[:count])
        kept.append(order[count:])
    if single:
        raise ValueError(
            f"{folder.root} has a single picture for: {_some(single)}. Expected at least two a "
            "class, one to train on and one to hold out."
        )
    return tuple(folder.part(np.sort(np.concatenate(part))) for part in (kept, held))


def _check_there(root: pathlib.Path, names: list[str], wanted: str) -> None:
    if wanted not in names:
        raise ValueError(f"{root} has no sub-folder {wanted!r}. It has: {_some(names) or 'none'}.")


def _pictures_below(folder: pathlib.Path) -> tuple[list[bytes], list[str]]:
    """The pictures below a folder, sorted, and all other files that are not hidden."""
    pictures, others = [], []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            path = os.path.join(where, name)
            if name.lower().endswith(SUFFIXES):
                pictures.append(os.fsencode(path))
            else:
                others.append(path)
    return sorted(pictures), others


def _report_others(root: pathlib.Path, others: list[str]) -> None:
    endings = collections.Counter(os.path.splitext(path)[1].lower() for path in others)
    wrong = [ending for ending in _TO_CONVERT if endings[ending]]
    if wrong:
        example = next(path for path in others if path.lower().endswith(tuple(wrong)))
        raise ValueError(
            f"{root} has {sum(endings[ending] for ending in wrong)} pictures in a format that is "
            f"not read here ({', '.join(wrong)}), such as {example}. Convert them to .jpg or .png."
        )
    if others:
        warnings.warn(
            f"{len(others)} files below {root} are no pictures and are left out, such as "
            f"{others[0]}.",
            stacklevel=4,  # whoever called `open_sources`
        )


def _refuse_without_classes(root: pathlib.Path) -> None:
    count = sum(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(root))
    what = f"holds {count} pictures but no folders" if count else "is empty"
    raise ValueError(f"{root} {what}. Expected a sub-folder of pictures for each class.")


def _ordered(names: list[str]) -> tuple[str, ...]:
    for classes in (1000, 11821):
        ids = tuple(identifier for identifier, _ in class_names(classes))
        if set(names) <= set(ids):
            return ids
    return tuple(names)


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
