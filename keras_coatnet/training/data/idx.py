"""Reads the IDX files of MNIST and similar data sets: images and labels in a file each."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import pathlib
import re
import zlib

import numpy as np

from keras_coatnet.training.data import folders
from keras_coatnet.training.data.held_out import choose_held_out

_IMAGES = re.compile(r"(?P<part>[\w.-]*\w)-images[.-]idx3-ubyte(\.gz)?")
_VALIDATION_NAMES = ("t10k", *folders.VALIDATION_NAMES, *folders.TEST_NAMES)
_MAX_BYTES = 2**30  # of a file's values, which are kept in memory


@dataclasses.dataclass(frozen=True)
class Part:
    """Grayscale images of one size, with labels.

    Attributes:
        name: the folder and the part, for messages.
        images: (images, height, width), uint8.
        labels: (images,), int64.
        classes: names of the classes: `"0"`, `"1"` and so on, as the files have none.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash of the pixels and labels."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def parts_of(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Finds the files of images in a folder.

    Args:
        root: the folder; it need not exist.

    Returns:
        The paths by the name of the part, usually `"train"` and `"t10k"`; empty if the folder holds
        no IDX files.
    """
    if not root.is_dir():
        return {}
    matches = ((_IMAGES.fullmatch(path.name), path) for path in sorted(root.iterdir()))
    return {match["part"]: path for match, path in matches if match}


def open_parts(
    root: pathlib.Path, train: str | None, validation: str | None, held_out: float, seed: int
) -> tuple[Part, Part]:
    """Reads the parts to train and to validate on.

    Args:
        root: the folder.
        train: name of the part to train on; None: `"train"` or `"training"`.
        validation: name of the part to validate on; None: `"t10k"`, or one named like a sub-folder
            for validation (see `folders.find_pair`), or else images held out of the other part.
        held_out: how many of them, see `held_out.count_held_out`.
        seed: decides which images are held out.

    Returns:
        The two parts.

    Raises:
        ValueError: there is no such part, or a file is damaged.
    """
    parts = parts_of(root)
    train = _choose(root, parts, train, folders.TRAINING_NAMES)
    if validation is not None or any(name in parts for name in _VALIDATION_NAMES):
        validation = _choose(root, parts, validation, _VALIDATION_NAMES)
        return _read_part(root, parts, train), _read_part(root, parts, validation)
    whole = _read_part(root, parts, train)
    kept, held = (
        dataclasses.replace(whole, images=whole.images[chosen], labels=whole.labels[chosen])
        for chosen in choose_held_out(whole.labels, whole.classes, held_out, seed, whole.name)
    )
    return kept, dataclasses.replace(held, name=f"{whole.name}, held out")


def open_part(root: pathlib.Path, name: str | None) -> Part:
    """Reads one part.

    Args:
        root: the folder.
        name: name of the part; None: the one for validation.

    Returns:
        The part.

    Raises:
        ValueError: there is no such part, or a file is damaged.
    """
    parts = parts_of(root)
    return _read_part(root, parts, _choose(root, parts, name, _VALIDATION_NAMES))


def _choose(
    root: pathlib.Path,
    parts: dict[str, pathlib.Path],
    name: str | None,
    default_names: tuple[str, ...],
) -> str:
    names = default_names if name is None else (name,)
    for candidate in names:
        if candidate in parts:
            return candidate
    raise ValueError(
        f"{root} has no IDX files of a part named {' or '.join(map(repr, names))}. It has: "
        f"{', '.join(parts)}. Name one of them."
    )


def _read_part(root: pathlib.Path, parts: dict[str, pathlib.Path], name: str) -> Part:
    images = _read(parts[name], 3)
    # The number of classes is taken from all parts, so that it is the same for each.
    labels = {each: _read(_labels_of(path), 1) for each, path in parts.items()}
    if len(images) != len(labels[name]):
        raise ValueError(
            f"{parts[name]} has {len(images):,} images, but {_labels_of(parts[name])} has "
            f"{len(labels[name]):,} labels. Download both again."
        )
    highest = max(int(each.max()) for each in labels.values())
    if highest == 0:
        raise ValueError(f"{root} has one class only: all labels are 0. Expected at least two.")
    classes = tuple(map(str, range(highest + 1)))
    return Part(f"{root}, {name}", images, labels[name].astype("int64"), classes)


def _labels_of(images: pathlib.Path) -> pathlib.Path:
    stem = images.name.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    for name in (stem, f"{stem}.gz"):
        if (images.parent / name).is_file():
            return images.parent / name
    raise ValueError(
        f"{images} has no labels. Expected {stem} or {stem}.gz in the same folder. Download it."
    )


def _read(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of uint8 values."""
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(start)
            if len(header) < start or header[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(
                    f"{path} is not an IDX file of uint8 values in {dimensions} "
                    f"dimension{'s' if dimensions > 1 else ''}: it begins with "
                    f"{header[:4].hex(' ') or 'nothing'}, not 00 00 08 {dimensions:02}. Download "
                    "it again."
                )
            shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
            size = math.prod(shape)
            if not 0 < size <= _MAX_BYTES:
                raise ValueError(
                    f"The header of {path} announces {' x '.join(map(str, shape))} bytes. Expected "
                    f"at least one and at most {_MAX_BYTES:,}."
                )
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download it again.") from error
    if len(content) != size:
        received = "more" if len(content) > size else f"only {len(content):,}"
        raise ValueError(
            f"The header of {path} announces {size:,} bytes, but {received} follow. Download it "
            "again."
        )
    return np.frombuffer(content, "uint8").reshape(shape)
