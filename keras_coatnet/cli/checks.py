"""Checks of arguments that need neither Keras nor TensorFlow: the call and the disk tell enough."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterator, Sequence

from keras_coatnet.architectures import find_architecture
from keras_coatnet.arguments import number
from keras_coatnet.exporting.formats import check_installed, find_format, is_exported
from keras_coatnet.files import files_below
from keras_coatnet.images import SUFFIXES
from keras_coatnet.paths import check_local
from keras_coatnet.training.data import folders, idx, prepared
from keras_coatnet.training.evaluation.metrics import EvaluationCounter
from keras_coatnet.weights import foreign_files, registry
from keras_coatnet.weights.lookup import KERAS_SUFFIXES, find_file, unknown_architecture


def whole_number_from(least: int) -> Callable[[str], int]:
    """Makes a `type` for `add_argument`: a whole number with a lower bound.

    Args:
        least: the smallest number that is accepted.

    Returns:
        A function from the option's text to the number.

    Example:
        >>> whole_number_from(1)("32")
        32
    """

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {text!r}"
            )
        return int(text)

    return convert


def crop_pct(text: str) -> float:
    """Is the `type` of `--crop-pct` for `add_argument`: a share above 0 and at most 1."""
    try:
        return number("crop_pct", float(text), above=0, most=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a number above 0 and at most 1, not {text!r}"
        ) from error


def check_weights(weights: str, architecture: str | None) -> registry.Checkpoint | None:
    """Checks the name or file of a classifier, without opening more of the file than necessary.

    Args:
        weights: a checkpoint's name, or a path.
        architecture: the name of the network that a file's weights belong to, or None.

    Returns:
        The checkpoint; None for a file.

    Raises:
        ValueError: there is no such checkpoint, file or architecture; the checkpoint is of another
            architecture; or the file is one that does not say its architecture.
    """
    if architecture is not None:
        find_architecture(architecture)
    if is_exported(weights) and not registry.is_name(weights):  # names go before files
        check_exported(weights)
        return None
    path = find_file(weights)
    if path is None:
        checkpoint = registry.find(weights, None)
        registry.check_architecture(checkpoint, architecture)
        return checkpoint
    if architecture is None and not path.name.endswith(KERAS_SUFFIXES):
        foreign_files.read(path)  # reports a damaged file as damaged
        raise unknown_architecture(path)
    return None


def check_exported(path: str) -> None:
    """Checks that an exported model exists, and that what runs it is installed.

    Args:
        path: the file or folder.

    Raises:
        ValueError: there is none.
        ImportError: its runtime is not installed.
    """
    check_installed(find_format(path), runs_only=True)
    if not pathlib.Path(path).exists():
        raise ValueError(f"There is no file or folder {path}.")


def image_folder(data: str) -> pathlib.Path | None:
    """Finds the folder of images, one sub-folder for each class, that `--data` means.

    Args:
        data: the option's value.

    Returns:
        The folder, which need not exist; None for IDX files and for tensorflow-datasets.
    """
    root = prepared.folder_of_images(data)
    return None if root is None or idx.parts_of(root) else root


def check_training_images(
    data: str, train: str | None, validation: str | None
) -> tuple[str, ...] | None:
    """Checks that the folders to train and to validate on exist, and hold folders of classes.

    Args:
        data: the value of `--data`.
        train: the value of `--train-split`.
        validation: the value of `--validation-split`.

    Returns:
        Names of the classes to validate on; None if `data` is not a folder of images.

    Raises:
        ValueError: a folder is missing or holds no classes, or several may be meant.
    """
    root = image_folder(data)
    if root is None:
        return None
    parts = folders.find_pair(root, train, validation) or (root,)
    *_, names = map(folders.class_folders, parts)
    return tuple(names)


def check_evaluation_images(data: str, split: str | None) -> tuple[str, ...] | None:
    """Checks that the folder to evaluate on exists, and holds folders of classes.

    Args:
        data: the value of `--data`.
        split: the value of `--split`.

    Returns:
        Names of the classes; None if `data` is not a folder of images.

    Raises:
        ValueError: the folder is missing or holds no classes, or several may be meant.
    """
    root = image_folder(data)
    return None if root is None else tuple(folders.class_folders(folders.find_part(root, split)))


def check_positive(classes: tuple[str, ...] | None, positive: str | None) -> None:
    """Checks the class that precision and F1 are about.

    Args:
        classes: names of the classes; None if they are not known yet.
        positive: the value of `--positive`, or None.

    Raises:
        ValueError: there are more than two classes, or none of that name.
    """
    if positive is None or classes is None:
        return
    # For ImageNet folders the classes depend on the model, so the check follows once it is open.
    if folders.imagenet_of(classes) is None:
        EvaluationCounter(classes, positive)


def find_images(arguments: Sequence[str]) -> tuple[list[pathlib.Path], list[OSError]]:
    """Finds images: files as they are named; of folders all, also in the folders below.

    Args:
        arguments: files and folders.

    Returns:
        The paths, and the errors of folders and links that cannot be read.

    Raises:
        ValueError: a file or folder is missing, or a folder holds no images.
    """
    paths: list[pathlib.Path] = []
    unreadable: list[OSError] = []
    for argument in arguments:
        check_local(argument, "image")
        path = pathlib.Path(argument)
        if not path.exists():
            raise ValueError(f"There is no file or folder {path}.")
        before = len(unreadable)
        found = list(_images_below(path, unreadable)) if path.is_dir() else [path]
        if not found and len(unreadable) == before:
            raise ValueError(
                f"There is no image in the folder {path}: no file ends in {', '.join(SUFFIXES)}."
            )
        paths += found
    return paths, unreadable


def _images_below(folder: pathlib.Path, unreadable: list[OSError]) -> Iterator[pathlib.Path]:
    # Hidden files are passed over: file managers leave some that end like an image.
    for path in files_below(folder, unreadable.append):
        if path.lower().endswith(SUFFIXES):
            yield pathlib.Path(path)


def read_labels(path: str) -> list[str]:
    """Reads names of classes, one on each line.

    Args:
        path: the file.

    Raises:
        ValueError: it cannot be read, or a line is empty.
    """
    check_local(path, "labels")
    try:
        # Some editors put a byte-order mark first.
        lines = pathlib.Path(path).read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"The labels in {path} cannot be read: {error}") from error
    labels = [line.strip() for line in lines]
    if "" in labels:
        raise ValueError(
            f"Line {labels.index('') + 1} of the labels in {path} is empty. Expected the name of a "
            "class on each line."
        )
    return labels


def labels_beside(weights: str, classes: int) -> list[str] | None:
    """Reads the names of the classes that `train` wrote beside its weights.

    Args:
        weights: a file of weights, or a name.
        classes: number of classes.

    Returns:
        The names; None if there are none, or another number.
    """
    path = pathlib.Path(weights).with_name("classes.txt")
    if not pathlib.Path(weights).is_file() or not path.is_file():
        return None
    labels = read_labels(str(path))
    return labels if len(labels) == classes else None
