"""Checkpoints of a run: written whole or not at all, checked when read, older ones kept."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_coatnet.files import whole_file

_SUFFIX = ".safetensors"
_FORMAT = "keras_coatnet training state 1"


@dataclasses.dataclass(frozen=True)
class RunState:
    """The state of a run after a step.

    Attributes:
        step: updates made so far.
        arrays: every variable by its key: network, optimizer, average, random state.
        notes: what else the run must remember; anything that JSON can hold.
    """

    step: int
    arrays: Mapping[str, np.ndarray]
    notes: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run, the newest `keep` of them.

    A file gets its name only when all of it is on the disk, so that a run killed while it saves
    leaves the one before. The content's sha256 goes with it: safetensors itself does not notice a
    flipped bit.

    Args:
        path: the folder; made by the first `save`.
        keep: how many are kept, at least 1.

    Example:
        >>> import tempfile
        >>> folder = CheckpointFolder(tempfile.mkdtemp(), keep=2)
        >>> _ = folder.save(RunState(7, {"a": np.ones(3)}, {"best": 0.5}))
        >>> folder.newest().step
        7
    """

    def __init__(self, path: str | os.PathLike, keep: int = 3) -> None:
        self.path = pathlib.Path(path)
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of which there are files, oldest first."""
        names = [path.name for path in self.path.glob(f"step-*{_SUFFIX}")]
        matches = [re.fullmatch(rf"step-(\d+){_SUFFIX}", name) for name in names]
        return sorted(int(match[1]) for match in matches if match)

    def save(self, state: RunState) -> pathlib.Path:
        """Writes a checkpoint, then removes those that are too old.

        Args:
            state: the state.

        Returns:
            Its file.

        Raises:
            OSError: the disk is full, or not to be written on. What was there before still is.
        """
        from safetensors.numpy import save

        self.path.mkdir(parents=True, exist_ok=True)
        arrays = {key: np.asarray(value, order="C") for key, value in state.arrays.items()}
        notes = json.dumps(dict(state.notes))
        metadata = {
            "format": _FORMAT,
            "step": str(state.step),
            "notes": notes,
            "sha256": _digest(state.step, notes, arrays),
        }
        final = self._file(state.step)
        for left_over in self.path.glob(f".*.step-*{_SUFFIX}"):  # of a run killed while it saved
            left_over.unlink()
        try:
            with whole_file(final) as partial, open(partial, "wb") as file:
                file.write(save(arrays, metadata))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            last = self.steps()
            kept = f"the one of step {last[-1]} is whole" if last else "there is no earlier one"
            raise OSError(
                error.errno,
                f"the checkpoint of step {state.step} could not be saved: {reason}; {kept}. "
                "Make room and start the same command again to go on",
                str(self.path),
            ) from error
        _sync_folder(self.path)
        for step in self.steps()[: -self.keep]:
            self._file(step).unlink(missing_ok=True)
        return final

    def newest(self) -> RunState | None:
        """The newest checkpoint that is whole; a damaged one is named in a warning and passed over.

        Returns:
            A `RunState`, or None if there are no files.

        Raises:
            ValueError: there are files, and all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step)
            except ValueError as error:
                warnings.warn(f"{error}; falling back to the one before", stacklevel=2)
        if steps:
            raise ValueError(
                f"All checkpoints in {self.path} are damaged. Remove the folder to start anew."
            )
        return None

    def read(self, step: int) -> RunState:
        """Reads the checkpoint of a step.

        Args:
            step: one of `steps()`.

        Returns:
            A `RunState`.

        Raises:
            ValueError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._file(step)
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}")
            if metadata["sha256"] != _digest(int(metadata["step"]), metadata["notes"], arrays):
                raise ValueError("its content is not what was saved")
            return RunState(int(metadata["step"]), arrays, json.loads(metadata["notes"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"The checkpoint {path} is damaged ({error})") from error

    def missing_room(self) -> int:
        """Bytes that the disk lacks for `keep` checkpoints as large as the newest, and one more.

        Returns:
            The number of bytes; 0 if there is room, or no checkpoint yet.
        """
        steps = self.steps()
        if not steps:
            return 0
        more = max(0, self.keep + 1 - len(steps)) * self._file(steps[-1]).stat().st_size
        return max(0, more - shutil.disk_usage(self.path).free)

    def discard_after(self, step: int) -> None:
        """Removes the files of later steps, which a run that goes on from here writes again.

        Args:
            step: the step of a checkpoint that is whole.
        """
        for later in self.steps():
            if later > step:
                self._file(later).unlink(missing_ok=True)

    def _file(self, step: int) -> pathlib.Path:
        return self.path / f"step-{step:08d}{_SUFFIX}"


def _digest(step: int, notes: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{step}\n{notes}\n".encode())
    for key in sorted(arrays):
        array = arrays[key]
        digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sync_folder(path: pathlib.Path) -> None:
    """Makes the new name itself survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
