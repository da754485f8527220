"""Lists the images of folders with one sub-folder for each class, and checks the folders.

No image is opened, so that mistakes are reported at once.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
import warnings
from collections.abc import Iterable

import numpy as np

from keras_coatnet.arguments import choice
from keras_coatnet.files import files_below, list_folder
from keras_coatnet.labels import class_names
from keras_coatnet.training.choices import LABELINGS
from keras_coatnet.training.data.held_out import some_names

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
# Image formats that are not read. They raise an error, as other files are left out.
# TensorFlow 2.21 reads WebP, but as an animation, of shape (frames, height, width, 3).
_TO_CONVERT = (".avif", ".heic", ".jp2", ".tif", ".tiff", ".webp")
# Names of the sub-folders of a part, in upper or lower case. "set", "data" or "images" may follow.
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
        paths: the images' files, encoded for the file system, sorted by class and name.
        labels: (images,), int64, their labels.
    """

    root: pathlib.Path
    classes: tuple[str, ...]
    paths: list[bytes]
    labels: np.ndarray

    def part(self, indices: np.ndarray) -> Folder:
        """Selects images by their indices."""
        paths = [self.paths[index] for index in indices]
        return dataclasses.replace(self, paths=paths, labels=self.labels[indices])

    def fingerprint(self) -> str:
        """A hash of the images' labels and names relative to the folder, in their order."""
        root = os.fsencode(self.root)
        # Paths in "." do not begin with "./".
        start = 0 if root == b"." else len(os.path.join(root, b""))
        names = b"\0".join(path[start:] for path in self.paths)
        return hashlib.sha256(names + self.labels.tobytes()).hexdigest()


def read_folder(root: str | os.PathLike, classes: str = "present") -> Folder:
    """Lists the images of a folder that holds one sub-folder for each class.

    Images (.bmp, .gif, .jpeg, .jpg, .png, in upper or lower case) may be in further folders below
    their class. Links are followed. Hidden files and folders are skipped. Other files are left out
    with a warning.

    The classes are ordered by name, those of ImageNet in the order of its public checkpoints.

    Args:
        root: the folder.
        classes: `"present"`: the classes are the sub-folders. `"imagenet"`: if all sub-folders are
            WordNet ids of ImageNet-1k, or else of ImageNet-12k, the classes are all classes of that
            ImageNet, with the labels of the public checkpoints; otherwise as `"present"`.

    Returns:
        A `Folder`.

    Raises:
        ValueError: the folder is missing or empty, has one class only, a class without images,
            images in a format that has to be converted first, or something that cannot be read; or
            its sub-folders are not classes, as they all hold the same folders.

    Example:
        folder = read_folder("flowers/train")  # flowers/train/daisy/1.jpg, ...
    """
    root = pathlib.Path(root).expanduser()
    names = class_folders(root)
    found = {name: _images_below(root / name) for name in names}
    _report_others(root, [path for _, others in found.values() for path in others])
    empty = [name for name in names if not found[name][0]]
    if empty:
        raise ValueError(
            f"{root} has class folders without images: {some_names(empty)}. Expected "
            f"{', '.join(SUFFIXES)} files in each; remove the folders, or fill them."
        )
    ordered = _ordered(names, classes)
    paths, labels = [], []
    for label, name in enumerate(ordered):
        images = found[name][0] if name in found else []
        paths += images
        labels += [label] * len(images)
    return Folder(root, ordered, paths, np.array(labels, "int64"))


def class_folders(root: pathlib.Path) -> list[str]:
    """Lists the sub-folders that each hold the images of a class.

    Args:
        root: the folder.

    Returns:
        Their names, sorted.

    Raises:
        ValueError: there is no such folder, it holds fewer than two folders, or these are parts
            such as 2023/ and 2024/ that hold the same classes.
    """
    names = subfolders(root)
    if not names:
        count = sum(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(root))
        content = f"holds {count} images but no folders" if count else "is empty"
        raise ValueError(f"{root} {content}. Expected a sub-folder of images for each class.")
    _refuse_parts(root, names)
    if len(names) == 1:
        raise ValueError(
            f"{root} has one class only: {names[0]!r}. Expected a sub-folder for each of at least "
            "two classes."
        )
    return names


def subfolders(root: pathlib.Path) -> list[str]:
    """Lists the sub-folders of a folder, except hidden ones.

    Args:
        root: the folder.

    Returns:
        Their names, sorted.

    Raises:
        ValueError: there is no such folder, it cannot be read, or it holds a link to nothing.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(
            f"{root} {what}. Expected a folder of images with one sub-folder for each class."
        )
    return list(list_folder(root, _refuse_unreadable)[0])


def _refuse_unreadable(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be read: {error.strerror}. Repair it, or remove it from the "
        "data set."
    ) from error


def find_pair(
    root: pathlib.Path, train: str | None, validation: str | None
) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Finds the sub-folders for training and validation.

    Args:
        root: the folder.
        train: name of the sub-folder for training; None: `train` or `training`.
        validation: name of the sub-folder for validation; None: `val`, `valid`, `validation`,
            `dev`, `eval` or `evaluation`, or else `test` or `testing`. Upper and lower case are the
            same, and "set", "data" or "images" may follow, as in `Training Set`.

    Returns:
        The two paths, or None if the folder holds the classes directly.

    Raises:
        ValueError: only one of the two exists, several may be meant, or there is no sub-folder of a
            given name.
    """
    names = subfolders(root)
    for wanted in filter(None, (train, validation)):
        _check_exists(root, names, wanted)
    second = validation or _second_part(root, names)
    first = train or _called(root, names, TRAINING_NAMES, "training")
    if first and first == second:
        raise ValueError(
            f"{root / first} is named both to train and to validate on. Name two sub-folders."
        )
    if first and second:
        return root / first, root / second
    # A class may be called "train", too, but then holds images instead of folders.
    single = first or second
    if single and (train or validation or subfolders(root / single)):
        raise ValueError(
            f"{root} has {single}/ but no second part. Expected one to train on, such as train/, "
            f"and one to validate on, such as val/; it has: {some_names(names)}. Name both "
            f"(--train-split, --validation-split), or give {root / single} to hold out a share of "
            "it."
        )
    return None


def find_part(root: pathlib.Path, name: str | None) -> pathlib.Path:
    """Finds the sub-folder to evaluate on.

    Args:
        root: the folder.
        name: name of the sub-folder; None: the one for validation, or else the folder itself.

    Returns:
        The path.

    Raises:
        ValueError: there is no such sub-folder, several may be meant, or there is only one for
            training.
    """
    names = subfolders(root)
    if name is not None:
        _check_exists(root, names, name)
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
    """Finds the sub-folder that has one of these names; returns None if there is none."""
    found = [name for name in names if _PART_ENDING.sub("", name.lower()) in synonyms]
    if len(found) > 1 and any(subfolders(root / name) for name in found):
        raise ValueError(
            f"{root} has {len(found)} sub-folders that may be for {purpose}: {some_names(found)}. "
            "Name the one that is meant (--train-split, --validation-split; --split of evaluate)."
        )
    return found[0] if found else None


def _refuse_parts(root: pathlib.Path, names: list[str]) -> None:
    """Raises ValueError for a folder of parts, such as 2023/cat, 2023/dog, 2024/cat, 2024/dog."""
    common = subfolders(root / names[0])
    # Each class may have one folder, such as "images", or images beside folders.
    if len(common) < 2 or len(names) < 2:
        return
    if any(subfolders(root / name) != common for name in names[1:]):
        return
    if any(name.lower().endswith(SUFFIXES) for each in names for name in os.listdir(root / each)):
        return
    raise ValueError(
        f"Expected a sub-folder of images for each class. All {len(names)} sub-folders of {root} "
        f"({some_names(names)}) hold the same folders, {some_names(common)}, which seem to be the "
        "classes. Name the sub-folders to train and to validate on (--train-split, "
        "--validation-split), or give one of them instead."
    )


def check_same_classes(train: Folder, validation: Folder) -> None:
    """Checks that two folders hold the same classes.

    Args:
        train: to train on.
        validation: to validate on.

    Raises:
        ValueError: they do not; the message names the differences.
    """
    first, second = (
        {folder.classes[label] for label in np.unique(folder.labels)}
        for folder in (train, validation)
    )
    if first != second:
        differences = [
            f"only in {folder.root}: {some_names(sorted(names))}"
            for folder, names in ((train, first - second), (validation, second - first))
            if names
        ]
        raise ValueError(
            f"{train.root} and {validation.root} must hold the same classes. "
            f"{'; '.join(differences).capitalize()}."
        )


def _check_exists(root: pathlib.Path, names: list[str], wanted: str) -> None:
    if wanted not in names:
        raise ValueError(
            f"{root} has no sub-folder {wanted!r}. It has: {some_names(names) or 'none'}."
        )


def _images_below(folder: pathlib.Path) -> tuple[list[bytes], list[str]]:
    """Lists the images below a folder, sorted, and all other files that are not hidden."""
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
            f"{len(others)} files below {root} are not images and are left out, such as "
            f"{others[0]}.",
            stacklevel=4,  # the caller of `open_datasets`
        )


def imagenet_of(names: Iterable[str]) -> tuple[str, ...] | None:
    """Finds the version of ImageNet that has some classes.

    Args:
        names: names of classes.

    Returns:
        All WordNet ids of ImageNet-1k, or else of ImageNet-12k, in the order of the public
        checkpoints; None if neither has all the names.
    """
    for classes in (1000, 11821):
        ids = tuple(identifier for identifier, _ in class_names(classes))
        if set(names) <= set(ids):
            return ids
    return None


def _ordered(names: list[str], classes: str) -> tuple[str, ...]:
    choice("classes", classes, LABELINGS)
    ids = imagenet_of(names)
    if ids is None:
        return tuple(names)
    return ids if classes == "imagenet" else tuple(name for name in ids if name in set(names))
