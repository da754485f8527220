"""Reads `.weights.h5` and `.keras` files, and which network they belong to."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pathlib
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras

from keras_coatnet.counting.variables import variables
from keras_coatnet.model import IDENTITY, Identity, NewerFormat
from keras_coatnet.names import AVG_POOL, CLASSIFIER
from keras_coatnet.weights.hdf5 import (
    DAMAGE,
    EXPANSION,
    FREE_BYTES,
    Refused,
    open_hdf5,
    refuse_whole_model,
)

if TYPE_CHECKING:
    import h5py

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"  # within a `.keras` file

MAX_CONFIG = 8 << 20  # bytes; a CoAtNet's has about 3,500 for each block
# A file's network may have `FREE_VALUES` plus `PACKED` times the values that the file holds:
# quantized weights are packed, two or more to a byte.
FREE_VALUES, PACKED = 1 << 20, 4


def read_identity(path: pathlib.Path) -> Identity | None:
    """Reads which network the weights in a file belong to.

    Args:
        path: a `.weights.h5` or `.keras` file.

    Returns:
        An `Identity`, or None if the file was not saved from one of this package's models.

    Raises:
        ValueError: the file is damaged or of another kind, refers to other files, or declares far
            more than it holds.
    """
    try:
        is_archive = path.suffix == ".keras"
        found, values = _read_archive(path) if is_archive else _read_weights(path)
    except Refused:
        raise
    except (*DAMAGE, EOFError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is cut short, damaged, or not a file that Keras saved: {error}. Save it, or "
            "fetch it, again."
        ) from error
    if found is None:
        return None
    try:
        identity = Identity.from_dict(found)
    except NewerFormat as error:
        raise ValueError(f"{path} was {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error} Save it again.") from error
    _check_size(path, identity, values)
    return identity


def _check_size(path: pathlib.Path, identity: Identity, values: int) -> None:
    """Refuses a small file of a huge network, which would take all memory to build."""
    config, top = identity.architecture, identity.classes is not None
    shape = (*config.input_sides, identity.channels)
    listed = variables(config, shape, identity.classes or 1, include_top=top)
    needed = sum(math.prod(variable.shape) for variable in listed)
    if needed > FREE_VALUES + PACKED * values:
        raise ValueError(
            f"{path} is damaged: its network has {needed} values, but it holds {values}. Save it "
            "again."
        )


def _read_archive(path: pathlib.Path) -> tuple[Mapping[str, Any] | None, int]:
    """Returns the identity in a `.keras` file, if any, and the number of values in its arrays."""
    with zipfile.ZipFile(path) as archive:
        members = _checked_members(archive, path)
        with archive.open(members[_CONFIG]) as file:
            config = json.loads(file.read(members[_CONFIG].file_size))
        with _member(path, archive, members[_WEIGHTS]) as content:
            with open_hdf5(path, content) as (_, datasets):
                values = _count(datasets)
    found = config["config"]
    if not isinstance(found, dict):
        raise TypeError(
            f"the config in its {_CONFIG} is a {type(found).__name__}, not a dictionary"
        )
    return found.get(IDENTITY), values


def _checked_members(archive: zipfile.ZipFile, path: pathlib.Path) -> Mapping[str, zipfile.ZipInfo]:
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise Refused(f"{path} is refused: it has a member twice. Save it again.")
    for name in (_CONFIG, _WEIGHTS):
        if name not in members:
            raise Refused(
                f"{path} is not a file that Keras saved: it has no {name}. Save it again."
            )
    for name, member in members.items():
        if member.flag_bits & 1:
            raise Refused(
                f"{path} is encrypted, which Keras cannot read. Unpack it with its password, and "
                "compress it again without one."
            )
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refused(
                f"{path} is refused: {name} has a compression that Keras never uses. Save it again."
            )
    declared, size = sum(m.file_size for m in members.values()), path.stat().st_size
    if declared > FREE_BYTES + EXPANSION * size:
        raise Refused(
            f"{path} is refused: it declares {declared} bytes, but has {size}. Save it again."
        )
    if members[_CONFIG].file_size > MAX_CONFIG:
        raise Refused(
            f"{path} is refused: its {_CONFIG} has {members[_CONFIG].file_size} bytes, and may "
            f"have at most {MAX_CONFIG}."
        )
    return members


@contextlib.contextmanager
def _member(
    path: pathlib.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> Iterator[io.RawIOBase]:
    """Yields a member of an archive as a file with fast seeks, which zipfile does not have."""
    with contextlib.ExitStack() as stack:
        packed = stack.enter_context(archive.open(member))  # checks the member's header
        if member.compress_type == zipfile.ZIP_STORED:
            file = stack.enter_context(path.open("rb", buffering=0))
            file.seek(member.header_offset)
            name, extra = struct.unpack("<26x2H", file.read(30))
            start = member.header_offset + 30 + name + extra
            yield _Part(file, start, member.file_size)
            return
        unpacked = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        shutil.copyfileobj(packed, unpacked)
        yield unpacked


class _Part(io.RawIOBase):
    """A range of bytes of a file, as a file for reading."""

    def __init__(self, file: io.RawIOBase, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[:length]) or 0
        self._position += count
        return count


def _read_weights(path: pathlib.Path) -> tuple[Mapping[str, Any] | None, int]:
    """Returns the same as `_read_archive`, for a `.weights.h5` file."""
    with open_hdf5(path) as (file, datasets):
        if IDENTITY not in file.attrs:
            refuse_whole_model(file, path)  # perhaps of `save` instead of `save_weights`
            return None, 0
        found, values = json.loads(_text(file, path)), _count(datasets)
    if not isinstance(found, dict):
        raise TypeError(f"its attribute {IDENTITY} is a {type(found).__name__}, not a dict")
    return found, values


def _text(file: h5py.File, path: pathlib.Path) -> str:
    import h5py

    attribute = file.attrs.get_id(IDENTITY)
    if attribute.shape != () or h5py.check_string_dtype(attribute.dtype) is None:
        raise Refused(
            f"{path} is damaged: its attribute {IDENTITY} is not a string. Save it again."
        )
    return str(file.attrs[IDENTITY])


def _count(datasets: Mapping[str, h5py.Dataset]) -> int:
    return sum(math.prod(item.shape) for item in datasets.values())


def load(
    model: keras.Model, path: pathlib.Path, random_part: str | None, identity: Identity | None
) -> None:
    """Loads a file into a model.

    Args:
        model: a `CoAtNetModel`.
        path: a `.weights.h5` or `.keras` file.
        random_part: what keeps its values: None, the `"classifier"`, or the whole `"head"`.
        identity: what `read_identity` returned.

    Raises:
        ValueError: the file's variables are not the model's.
    """
    # Keras matches layers by class and order, so the last ones can be left out.
    if random_part == "classifier":
        model = keras.Model(model.inputs, model.get_layer(CLASSIFIER).input)
    elif random_part == "head":
        model = keras.Model(model.inputs, model.get_layer(AVG_POOL).input)
    try:
        with warnings.catch_warnings():
            # Keras warns of containers that it visits a second time.
            warnings.filterwarnings("ignore", "Skipping nested container")
            model.load_weights(path)
    except Exception as error:  # Keras has no class of its own for this
        raise ValueError(_mismatch(path, identity, error)) from error


def _mismatch(path: pathlib.Path, identity: Identity | None, error: Exception) -> str:
    whole = f"Load it whole, with keras.models.load_model({str(path)!r})."
    changed = "was changed after it was built, for example quantized, so its weights fit no other"
    if path.suffix == ".keras" and identity is None:
        return (
            f"{path} holds a model that is not a CoAtNet alone, such as a classifier built around "
            f"one. {whole}"
        )
    if path.suffix == ".keras":
        return f"{path} holds a CoAtNet that {changed}. {whole}"
    if identity is not None:
        return (
            f"{path} holds the weights of a CoAtNet that {changed}. Build the model without "
            "weights, change it in the same way, and call its load_weights with this file."
        )
    # The rest of Keras's message is a long list of objects.
    reason = " ".join(str(error).partition("List of objects")[0].split())
    return (
        f"The weights in {path} do not fit the model. Give the arguments with which the saved "
        f"model was built. Keras says: {reason}"
    )
