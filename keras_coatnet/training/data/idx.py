"""The IDX files of MNIST and its like: for each part one file of pixels and one of labels."""

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
_MOST_BYTES = 2**30  # of pixels, which are kept in memory


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of one size in shades of gray.

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
        """A hash of pixels and labels."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def parts_of(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of pixels in a folder by the names of their parts, `"train"` and `"t10k"` mostly.

    Args:
        root: the folder; there need not be one.

    Returns:
        A dictionary; empty if the folder holds no IDX files.
    """
    if not root.is_dir():
        return {}
    matches = ((_IMAGES.fullmatch(path.name), path) for path in sorted(root.iterdir()))
    return {match["part"]: path for match, path in matches if match}


def open_parts(
    root: pathlib.Path, train: str | None, validation: str | None, held_out: float, seed: int
) -> tuple[Part, Part]:
    """Reads what to train on and what to validate on.

    Args:
        root: the folder.
        train: name of the part to train on; None: `"train"`.
        validation: name of the one to validate on; None: `"t10k"`, `"test"` or one called like a
            sub-folder for validation; or else images held out of the other.
        held_out: how many, see `held_out.choose_held_out`.
        seed: decides which images are held out.

    Returns:
        The two parts.

    Raises:
        ValueError: there is no such part, or a file is damaged.
    """
    parts = parts_of(root)
    first = _choose(root, parts, train, folders.TRAINING_NAMES)
    if validation is None and not _found(parts, _VALIDATION_NAMES):
        whole = _read_part(root, parts, first)
        chosen = choose_held_out(whole.labels, whole.classes, held_out, seed, whole.name)
        kept, held = (
            dataclasses.replace(whole, images=whole.images[part], labels=whole.labels[part])
            for part in chosen
        )
        return kept, dataclasses.replace(held, name=f"{whole.name}, held out")
    second = _choose(root, parts, validation, _VALIDATION_NAMES)
    return _read_part(root, parts, first), _read_part(root, parts, second)


def open_part(root: pathlib.Path, name: str | None) -> Part:
    """Reads one part; None: the one for validation.

    Raises:
        ValueError: there is no such part, or a file is damaged.
    """
    parts = parts_of(root)
    return _read_part(root, parts, _choose(root, parts, name, _VALIDATION_NAMES))


_VALIDATION_NAMES = ("t10k", *folders.VALIDATION_NAMES, *folders.TEST_NAMES)


def _found(parts: dict[str, pathlib.Path], synonyms: tuple[str, ...]) -> str | None:
    return next((name for name in synonyms if name in parts), None)


def _choose(
    root: pathlib.Path,
    parts: dict[str, pathlib.Path],
    name: str | None,
    synonyms: tuple[str, ...],
) -> str:
    chosen = _found(parts, synonyms if name is None else (name,))
    if chosen is None:
        wanted = "of the usual names" if name is None else f"called {name!r}"
        raise ValueError(
            f"{root} has no part {wanted} among its IDX files. It has: {', '.join(parts)}. Name "
            "one of them."
        )
    return chosen


def _read_part(root: pathlib.Path, parts: dict[str, pathlib.Path], name: str) -> Part:
    images = _read(parts[name], 3)
    labels = {each: _read(_labels_of(path), 1) for each, path in parts.items()}
    if len(images) != len(labels[name]):
        raise ValueError(
            f"{parts[name]} has {len(images):,} images, and {_labels_of(parts[name])} "
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
    raise ValueError(f"{images} has no labels: there is no {stem} or {stem}.gz beside it.")


def _read(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file as an array."""
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(start)
            if len(header) < start or header[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(
                    f"{path} is no IDX file of bytes in {dimensions} "
                    f"dimension{'s' if dimensions > 1 else ''}: it begins with "
                    f"{header[:4].hex(' ') or 'nothing'}, not 00 00 08 {dimensions:02}."
                )
            shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
            size = math.prod(shape)
            if not 0 < size <= _MOST_BYTES:
                raise ValueError(
                    f"{path} says that it holds {' x '.join(map(str, shape))} bytes. Expected at "
                    f"least one and at most {_MOST_BYTES:,}."
                )
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download it again.") from error
    if len(content) != size:
        received = "more" if len(content) > size else f"{len(content):,}"
        raise ValueError(
            f"{path} says that it holds {size:,} bytes, and holds {received}. Download it again."
        )
    return np.frombuffer(content, "uint8").reshape(shape)
