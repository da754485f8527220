"""Checks a downloaded file once. A file that passed is recognized by its size and time.

The notes lie under `KERAS_HOME/keras_coatnet/checked`, not beside the files, because the hub's
cache has a layout of its own and is often shared and read-only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

from keras_coatnet.weights.places import keras_home

CHUNK = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a file must be. A field is None where it is not known.

    Attributes:
        algorithm: Name of the hash, as `hashlib.new` takes it.
        digest: The hash in hexadecimal.
        size: Exact size in bytes.
    """

    algorithm: str | None = None
    digest: str | None = None
    size: int | None = None


@contextlib.contextmanager
def unfinished(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name that no other process uses, gone afterwards whatever happens."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):  # what happened before is what matters
            part.unlink(missing_ok=True)


def check_once(path: pathlib.Path, expected: Expected, url: str) -> None:
    """Checks a file unless it passed before and is unchanged; removes it if it fails."""
    if _is_noted(path, expected):
        return
    try:
        compare(path, expected, url)
    except WrongContent as wrong:
        raise WrongContent(f"{wrong} {_remove_with_links(path)}") from None
    except OSError as error:
        raise WrongContent(
            f"{path} cannot be read: {error}. It should be {url}. Let it be read, or remove it."
        ) from error
    note(path, expected)


class WrongContent(Exception):
    """A file is not what it should be. The message is for the user, and complete."""


def compare(path: pathlib.Path, expected: Expected, url: str) -> None:
    """Raises `WrongContent` unless size and content are as expected."""
    size = path.stat().st_size
    if expected.size not in (None, size):
        _raise_wrong(path, f"{expected.size} bytes", f"{size} bytes", url)
    if expected.algorithm is None:
        _check_layout(path, url)
        return
    digest = _hash(path, expected.algorithm)
    if digest != expected.digest:
        came = f"{expected.algorithm} {digest} ({size} bytes)"
        _raise_wrong(path, f"{expected.algorithm} {expected.digest}", came, url)


def _hash(path: pathlib.Path, algorithm: str) -> str:
    # MD5 is no defense against forgery, and none is claimed: it is all that was published.
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _check_layout(path: pathlib.Path, url: str) -> None:
    """Checks the one thing that a file of unknown hash tells of itself: how long it should be.

    Only a `.safetensors` that somebody put into the hub's cache by hand comes here. It begins with
    the length of its header as eight bytes; the header gives the offset at which each tensor ends.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        _raise_wrong(path, "a .safetensors header", "something else", url)
    if whole != size:
        _raise_wrong(path, f"{whole} bytes, by its own header", f"{size} bytes", url)


def _raise_wrong(path: pathlib.Path, expected: str, came: str, url: str) -> NoReturn:
    raise WrongContent(f"{path} is not what {url} should be: expected {expected}, got {came}.")


def _remove_with_links(path: pathlib.Path) -> str:
    """Removes a file and each link on the way to it, and says what came of it.

    In the hub's cache that is the snapshot's link and the blob. The blob goes first: with it alone
    left, the client would link to the bad content again instead of downloading it.
    """
    chain = [path]
    while chain[-1].is_symlink():
        folder = os.path.realpath(chain[-1].parent)
        chain.append(pathlib.Path(os.path.normpath(os.path.join(folder, os.readlink(chain[-1])))))
    for part in reversed(chain):
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            return (
                f"The file could not be removed ({error.strerror or error}): remove {part} where "
                "that is allowed, or set another cache, and call again to download it anew."
            )
    return "The file was removed; call again to download it anew."


def _note_path(path: pathlib.Path) -> pathlib.Path:
    # One note for each file: two processes never write into each other's.
    key = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
    return keras_home() / "keras_coatnet" / "checked" / f"{key}.json"


def _state(path: pathlib.Path, expected: Expected) -> dict[str, Any]:
    stat = path.stat()
    return {
        "file": os.path.realpath(path),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "hash": f"{expected.algorithm}:{expected.digest}",
    }


def _is_noted(path: pathlib.Path, expected: Expected) -> bool:
    try:
        return json.loads(_note_path(path).read_text("utf-8")) == _state(path, expected)
    except (OSError, ValueError):  # no note, or one that is no JSON: check the file again
        return False


def note(path: pathlib.Path, expected: Expected) -> None:
    """Notes that a file passed, with its size and time."""
    # Without the note the file is checked again next time: slower, not wrong.
    with contextlib.suppress(OSError):
        note = _note_path(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(note) as part:
            part.write_text(json.dumps(_state(path, expected)), "utf-8")
            os.replace(part, note)
