"""Checks a downloaded file once. Later it is recognized by its size and modification time.

The notes are under `KERAS_HOME/keras_coatnet/checked`, not beside the files, because the hub's
cache has a layout of its own and is often shared and read-only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import struct
import uuid
from collections.abc import Iterator
from typing import Any

from keras_coatnet.weights.failures import Expected, Unreadable, WrongContent
from keras_coatnet.weights.places import keras_home

CHUNK = 1 << 20  # bytes


@contextlib.contextmanager
def unfinished(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path that no other process uses, and removes a file left there afterwards."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):  # an earlier error matters more
            part.unlink(missing_ok=True)


def check_once(path: pathlib.Path, expected: Expected, url: str) -> None:
    """Checks a file unless it passed before and is unchanged.

    Args:
        path: the file.
        expected: what it must be.
        url: the address that it was downloaded from.

    Raises:
        WrongContent: it is another file, which was removed if possible.
        Unreadable: it cannot be read.
    """
    if _is_noted(path, expected):
        return
    try:
        compare(path, expected, url)
    except WrongContent as wrong:
        wrong.not_removed = _remove_with_links(path)
        raise
    except OSError as error:
        raise Unreadable(url, path) from error
    note(path, expected)


def compare(path: pathlib.Path, expected: Expected, url: str) -> None:
    """Raises `WrongContent` unless size and content are as expected."""
    size = path.stat().st_size
    if expected.size not in (None, size):
        raise WrongContent(url, path, f"{expected.size} bytes", f"{size} bytes")
    if expected.algorithm is None:
        _check_layout(path, url)
        return
    digest = _hash(path, expected.algorithm)
    if digest != expected.digest:
        received = f"{expected.algorithm} {digest} ({size} bytes)"
        raise WrongContent(url, path, f"{expected.algorithm} {expected.digest}", received)


def _hash(path: pathlib.Path, algorithm: str) -> str:
    # MD5 detects damage, not forgery. For some files no other hash was published.
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _check_layout(path: pathlib.Path, url: str) -> None:
    """Checks the size of a file of unknown hash: a `.safetensors` put into the cache by hand.

    The file begins with the length of its header as eight bytes. The header gives the offset at
    which each tensor ends.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise WrongContent(url, path, "a .safetensors header", "something else") from None
    if whole != size:
        raise WrongContent(url, path, f"{whole} bytes, by its own header", f"{size} bytes")


def _remove_with_links(path: pathlib.Path) -> OSError | None:
    """Removes a file and each link on the way to it. Returns the error if that fails.

    In the hub's cache, these are the snapshot's link and the blob. The blob is removed first. If
    only the link were gone, the client would link to the bad content again.
    """
    chain = [path]
    while chain[-1].is_symlink():
        folder = os.path.realpath(chain[-1].parent)
        chain.append(pathlib.Path(os.path.normpath(os.path.join(folder, os.readlink(chain[-1])))))
    for part in reversed(chain):
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            return error
    return None


def _note_path(path: pathlib.Path) -> pathlib.Path:
    # One note for each file, so that processes that check different files do not conflict.
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
    except (OSError, ValueError):  # no note, or one that is not JSON: check the file again
        return False


def note(path: pathlib.Path, expected: Expected) -> None:
    """Notes that a file passed, with its size and modification time."""
    with contextlib.suppress(OSError):  # without a note, the file is only checked again next time
        target = _note_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(target) as part:
            part.write_text(json.dumps(_state(path, expected)), "utf-8")
            os.replace(part, target)
