"""Folders of images: one sub-folder a class, and what is wrong with them said at once.

Everything here happens before an image is opened: names are listed, checked, ordered and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import hashlib
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from keras_coatnet.arguments import as_python, whole_number
from keras_coatnet.labels import class_names
from keras_coatnet.training.choices import LABELINGS

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
# Formats that a data set may well be in, and that would otherwise be left out as "no images".
# TensorFlow 2.21 reads WebP, but as an animation, of shape (frames, height, width, 3).
_TO_CONVERT = (".avif", ".heic", ".jp2", ".tif", ".tiff", ".webp")
# What sub-folders for a part are called, in any case, also followed by "set", "data" or "images".
TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "dev", "eval", "evaluation")
TEST_NAMES = ("test", "testing")
_PART_ENDING = re.compile(r"[ _-]?(set|data|images)$")


@dataclasses.dataclass(frozen=True)
class Folder:
    """The images below a folder.

    Attributes:
        root: the folder.
        classes: names of the classes, in the order of their labels.
        paths: the images' files as the file system spells them, by class and name.
        labels: (images,), int64, the label of each.
    """

    root: pathlib.Path
    classes: tuple[str, ...]
    paths: list[bytes]
    labels: np.ndarray

    def part(self, indices: np.ndarray) -> Folder:
        """The images at some positions, in that order."""
        paths = [self.paths[index] for index in indices]
        return dataclasses.replace(self, paths=paths, labels=self.labels[indices])

    def fingerprint(self) -> str:
        """A hash of the images' names below the folder and of their labels, in their order."""
        root = os.fsencode(self.root)
        # Paths below "." do not begin with it.
        start = 0 if root == b"." else len(os.path.join(root, b""))
        names = b"\0".join(path[start:] for path in self.paths)
        return hashlib.sha256(names + self.labels.tobytes()).hexdigest()


def read_folder(root: str | os.PathLike, classes: str = "present") -> Folder:
    """Lists the images of a folder that holds one sub-folder for each class.

    Images (.bmp, .gif, .jpeg, .jpg, .png, in either case) may lie in further folders below their
    class, also in folders that are links. Hidden files and folders are passed over. Other files are
    left out with a warning.

    The classes are ordered by name, those of ImageNet as its public checkpoints order them.

    Args:
        root: the folder.
        classes: `"present"`: the classes are the sub-folders. `"imagenet"`: where all sub-folders
            are WordNet ids of ImageNet-1k, or else of ImageNet-12k, the classes are all of
            ImageNet's and the labels those of the public checkpoints, also if only some of the
            classes are there; other sub-folders are the classes themselves.

    Returns:
        Its `Folder`.

    Raises:
        ValueError: it is missing, empty, has one class only, a class without images, images in
            a format that has to be converted first, or something that cannot be read; or its
            sub-folders are no classes, as each holds the same folders.

    Example:
        folder = read_folder("flowers/train")  # flowers/train/daisy/1.jpg, ...
    """
    root = pathlib.Path(root).expanduser()
    names = subfolders(root)
    if not names:
        _refuse_without_classes(root)
    _refuse_parts(root, names)
    found = {name: _images_below(root / name) for name in names}
    _report_others(root, [path for _, others in found.values() for path in others])
    empty = [name for name in names if not found[name][0]]
    if empty:
        raise ValueError(
            f"{root} has class folders without images: {_some(empty)}. Expected "
            f"{', '.join(SUFFIXES)} files in each; remove the folders, or fill them."
        )
    if len(names) == 1:
        raise ValueError(
            f"{root} has one class only: {names[0]!r}. Expected a sub-folder for each of at least "
            "two classes."
        )
    ordered = _ordered(names, classes)
    paths, labels = [], []
    for label, name in enumerate(ordered):
        images = found[name][0] if name in found else []
        paths += images
        labels += [label] * len(images)
    return Folder(root, ordered, paths, np.array(labels, "int64"))


def subfolders(root: pathlib.Path) -> list[str]:
    """Names of the folders in a folder that are not hidden, sorted.

    Raises:
        ValueError: there is no such folder, it cannot be read, or it holds a link to nothing.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"Expected a folder of images, one sub-folder a class. {root} {what}.")
    return list(_listed(root, _refuse_unreadable)[0])


def files_below(folder: str | os.PathLike, unreadable: Callable[[OSError], None]) -> Iterator[str]:
    """All files below a folder that are not hidden, in an order that does not change.

    Links are followed. A folder that is reached twice, by a link to a folder above it say, counts
    once. Hidden folders are passed over.

    Args:
        folder: where to begin.
        unreadable: called with the error of each folder or link that cannot be read; it is left out
            if this returns.

    Yields:
        The files, those of a folder before those of the folders in it.
    """
    seen = set()
    pending = [os.fspath(folder)]
    while pending:
        place = pending.pop()
        try:
            status = os.stat(place)
        except OSError as error:
            unreadable(error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = _listed(place, unreadable)
        yield from (os.path.join(place, name) for name in files)
        pending += [os.path.join(place, name) for name in reversed(folders)]


def _listed(
    folder: str | os.PathLike, unreadable: Callable[[OSError], None]
) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder that are not hidden, sorted."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        unreadable(error)
        return [], []
    for entry in sorted(found, key=lambda entry: entry.name):
        try:
            if entry.is_dir():
                folders.append(entry.name)
                continue
            if not entry.is_file():
                entry.stat()  # which fails for a link to nothing
                raise OSError(errno.EINVAL, "it is no file, but a pipe or the like", entry.path)
        except FileNotFoundError:
            unreadable(OSError(errno.ENOENT, "it is a link to nothing", entry.path))
        except OSError as error:
            unreadable(error)
        else:
            files.append(entry.name)
    return folders, files


def _refuse_unreadable(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be read: {error.strerror}. Mend that, or take it out of the "
        "data set."
    ) from error


def find_pair(
    root: pathlib.Path, train: str | None, validation: str | None
) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Finds the sub-folders for training and validation.

    Args:
        root: the folder.
        train: name of the sub-folder for training; None: one called `train` or `training`.
        validation: name of the one for validation; None: one called `val`, `valid`, `validation`,
            `dev`, `eval` or `evaluation`, or else `test` or `testing`. Case does not count.

    Returns:
        The two, or None if the folder holds the classes directly.

    Raises:
        ValueError: only one of the two is there, several may be meant, or a name that was given is
            not there.
    """
    names = subfolders(root)
    for wanted in filter(None, (train, validation)):
        _check_there(root, names, wanted)
    second = validation or _second_part(root, names)
    first = train or _called(root, names, TRAINING_NAMES, "training")
    if first and first == second:
        raise ValueError(
            f"{root / first} was named both to train on and to validate on. Name two sub-folders."
        )
    if first and second:
        return root / first, root / second
    # A class may be called "train" as well, and holds images then, not folders.
    lone = first or second
    if lone and (train or validation or subfolders(root / lone)):
        raise ValueError(
            f"{root} has {lone}/ but no second part. Expected one to train on, such as train/, and "
            f"one to validate on, such as val/; it has: {_some(names)}. Name them "
            f"(--train-split, --validation-split), or give {root / lone} to hold out a share of it."
        )
    return None


def find_part(root: pathlib.Path, name: str | None) -> pathlib.Path:
    """Finds the sub-folder to evaluate on; None: that for validation, or else the folder itself.

    Raises:
        ValueError: there is no such sub-folder, several may be meant, or there is only one for
            training.
    """
    names = subfolders(root)
    if name is not None:
        _check_there(root, names, name)
        return root / name
    second = _second_part(root, names)
    if second and subfolders(root / second):
        return root / second
    first = _called(root, names, TRAINING_NAMES, "training")
    if first and subfolders(root / first):
        raise ValueError(
            f"{root} has {first}/ but no part for validation. Name the part to evaluate on."
        )
    return root


def _second_part(root: pathlib.Path, names: list[str]) -> str | None:
    return _called(root, names, VALIDATION_NAMES, "validation") or _called(
        root, names, TEST_NAMES, "validation"
    )


def _called(
    root: pathlib.Path, names: list[str], synonyms: tuple[str, ...], purpose: str
) -> str | None:
    """The one of the sub-folders that has such a name; None if there is none."""
    found = [name for name in names if _PART_ENDING.sub("", name.lower()) in synonyms]
    if len(found) > 1 and any(subfolders(root / name) for name in found):
        raise ValueError(
            f"{root} has {len(found)} sub-folders that may be for {purpose}: {_some(found)}. Name "
            "the one that is meant (--train-split, --validation-split; --split of evaluate)."
        )
    return found[0] if found else None


def _refuse_parts(root: pathlib.Path, names: list[str]) -> None:
    """Refuses a folder of parts, such as 2023/cat, 2023/dog, 2024/cat, 2024/dog."""
    common = subfolders(root / names[0])
    # One folder in each class, such as "images", is common; so are images beside folders.
    if len(common) < 2 or len(names) < 2:
        return
    if any(subfolders(root / name) != common for name in names[1:]):
        return
    if any(name.lower().endswith(SUFFIXES) for each in names for name in os.listdir(root / each)):
        return
    raise ValueError(
        f"Expected a sub-folder of images for each class. All {len(names)} sub-folders of {root} "
        f"({_some(names)}) hold the same folders, {_some(common)}, which seem to be the "
        "classes. Name the parts to train and to validate on (--train-split, --validation-split), "
        "or give one of the sub-folders."
    )


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


def hold_out(folder: Folder, held_out: float, seed: int) -> tuple[Folder, Folder]:
    """Splits a folder in two, with the same share of each class.

    Args:
        folder: what to split.
        held_out: see `choose_held_out`.
        seed: decides which images; the same ones for the same names and seed.

    Returns:
        The larger part and the part held out.

    Raises:
        ValueError: as `choose_held_out`.
    """
    parts = choose_held_out(folder.labels, folder.classes, held_out, seed, str(folder.root))
    return tuple(map(folder.part, parts))


def count_held_out(held_out: float, count: int, name: str) -> int:
    """How many images of a data set are held out.

    Args:
        held_out: a share above 0 and below 1, or a whole number of images from 2 on.
        count: how many images there are.
        name: the data set's, for messages.

    Returns:
        At least 1, and at most half of the images if `held_out` is a number of them.

    Raises:
        ValueError: `held_out` is neither, or a number of more than half of the images.
    """
    held_out = as_python(held_out)
    is_real = isinstance(held_out, int | float) and not isinstance(held_out, bool)
    is_number = is_real and held_out >= 2 and float(held_out).is_integer()
    if not (is_number or (is_real and 0 < held_out < 1)):
        raise ValueError(
            "`held_out` must be a share above 0 and below 1, or a whole number of images from 2 "
            f"on. Received: held_out={held_out!r}"
        )
    if is_number and held_out > count / 2:
        raise ValueError(
            f"{name} has {count:,} images, and held_out={held_out!r} is more than half of them. "
            "Give a smaller number, or a share such as 0.1 (--held-out)."
        )
    return max(1, int(held_out) if is_number else round(held_out * count))


def choose_held_out(
    labels: np.ndarray, classes: tuple[str, ...], held_out: float, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses images to hold out, the same share of each class, at least one and not all.

    Args:
        labels: (images,), int64.
        classes: the classes' names.
        held_out: a share above 0 and below 1, or a whole number of images from 2 on.
        seed: decides which images.
        name: the data set's, for messages.

    Returns:
        Positions of the images that are kept and of those held out, ascending.

    Raises:
        ValueError: `held_out` (see `count_held_out`) or `seed` makes no sense, or a class has a
            single image.
    """
    wanted = count_held_out(held_out, len(labels), name)
    seed = whole_number("seed", seed, 0)
    present, sizes = np.unique(labels, return_counts=True)
    single = [classes[label] for label in present[sizes == 1]]
    if single:
        raise ValueError(
            f"{name} has a single image for: {_some(single)}. Expected at least two a class, "
            "one to train on and one to hold out."
        )
    if held_out < 1:
        counts = [round(held_out * int(size)) for size in sizes]
    else:  # so many in all: those with the largest remainders get one more
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


def _check_there(root: pathlib.Path, names: list[str], wanted: str) -> None:
    if wanted not in names:
        raise ValueError(f"{root} has no sub-folder {wanted!r}. It has: {_some(names) or 'none'}.")


def _images_below(folder: pathlib.Path) -> tuple[list[bytes], list[str]]:
    """The images below a folder, sorted, and all other files that are not hidden."""
    images, others = [], []
    for path in files_below(folder, _refuse_unreadable):
        if path.lower().endswith(SUFFIXES):
            images.append(os.fsencode(path))
        else:
            others.append(path)
    return sorted(images), others


def _report_others(root: pathlib.Path, others: list[str]) -> None:
    endings = collections.Counter(os.path.splitext(path)[1].lower() for path in others)
    wrong = [ending for ending in _TO_CONVERT if endings[ending]]
    if wrong:
        example = next(path for path in others if path.lower().endswith(tuple(wrong)))
        raise ValueError(
            f"{root} has {sum(endings[ending] for ending in wrong)} images in a format that is "
            f"not read here ({', '.join(wrong)}), such as {example}. Convert them to .jpg or .png."
        )
    if others:
        warnings.warn(
            f"{len(others)} files below {root} are no images and are left out, such as "
            f"{others[0]}.",
            stacklevel=4,  # whoever called `open_sources`
        )


def _refuse_without_classes(root: pathlib.Path) -> None:
    count = sum(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(root))
    what = f"holds {count} images but no folders" if count else "is empty"
    raise ValueError(f"{root} {what}. Expected a sub-folder of images for each class.")


def imagenet_of(names: Iterable[str]) -> tuple[str, ...] | None:
    """All of ImageNet's WordNet ids, if these are some of them; None if they are something else."""
    for classes in (1000, 11821):
        ids = tuple(identifier for identifier, _ in class_names(classes))
        if set(names) <= set(ids):
            return ids
    return None


def _ordered(names: list[str], classes: str) -> tuple[str, ...]:
    if classes not in LABELINGS:
        raise ValueError(
            f"`classes` must be one of {', '.join(map(repr, LABELINGS))}. Received: {classes!r}"
        )
    ids = imagenet_of(names)
    if ids is None:
        return tuple(names)
    return ids if classes == "imagenet" else tuple(name for name in ids if name in set(names))


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
