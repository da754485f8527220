"""The folder of a run: whether a run may use it, and what it holds besides the log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.training.data.fingerprint import check_same_data, note_data
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run.checkpoints import CheckpointFolder, RunState
from keras_coatnet.training.run.lock import locked

if TYPE_CHECKING:  # the command line imports this file, and starts without Keras
    from keras_coatnet.training.data.datasets import ImageDataset
    from keras_coatnet.training.engine.base import Engine

RECIPE, FINAL, BEST = "recipe.json", "final.weights.h5", "best.weights.h5"


def check_folder(folder: pathlib.Path, recipe: Recipe) -> None:
    """Checks that a folder is empty, or holds a run with the same result.

    Args:
        folder: the run's folder, which need not exist.
        recipe: the recipe of the run.

    Raises:
        ValueError: the folder holds other files, or a run whose result another recipe decides.
    """
    # Listed once: another process of the run may be writing the recipe at this moment.
    names = os.listdir(folder) if folder.exists() else []
    if RECIPE in names:
        known = Recipe.load(folder / RECIPE)
        changed = [
            f"{name}={getattr(known, name)!r}"
            for name in recipe.changed_fields(known, decides=True)
        ]
        if not changed:
            return
        raise ValueError(
            f"{folder} holds another run, with {', '.join(changed)}. Give the same recipe to go "
            "on with it, or choose another output folder."
        )
    if any(not name.startswith(".") for name in names):
        raise ValueError(
            f"{folder} is not empty, and holds no run to go on with. Choose another output folder."
        )


class RunFolder:
    """A run's folder, which all processes of the run see.

    Args:
        path: the folder.
        recipe: the recipe of the run.
        datasets: for training and for validation.
        engine: knows the chief, and compares values between processes.
        held: the stack that releases the lock when the run ends.

    Attributes:
        path: the folder.
        checkpoints: its checkpoints.
        changes: how this recipe differs from that of the earlier command, as text.
    """

    def __init__(
        self,
        path: pathlib.Path,
        recipe: Recipe,
        datasets: tuple[ImageDataset, ImageDataset],
        engine: Engine,
        held: contextlib.ExitStack,
    ) -> None:
        self.path = path
        self.checkpoints = CheckpointFolder(path / "checkpoints", recipe.keep_checkpoints)
        self.changes = ""
        self._recipe, self._network = recipe, recipe.architecture()
        self._datasets = datasets
        self._engine = engine
        self._held = held

    def open(self, lock: bool) -> None:
        """Writes the recipe, after all processes have found the same recipe and the same folder.

        Args:
            lock: whether to lock the folder against other runs.

        Raises:
            ValueError: the processes differ, or the folder holds another run.
        """
        text = json.dumps([self._recipe.to_dict(), self._network.to_dict()], sort_keys=True)
        if not self._engine.same_in_all_processes(zlib.crc32(text.encode())):
            raise ValueError(
                "The processes of this run have different recipes. Start the same command on all "
                "machines."
            )
        self._in_all_processes(self._check)
        self._in_all_processes(lambda: self._write(lock))  # the others wait for the chief
        recipe = self.path / RECIPE
        if self._engine.any_process(not recipe.exists()):
            raise ValueError(
                f"Not all processes of this run see {recipe}. The output folder must be one that "
                "all machines share."
            )
        self._in_all_processes(self._check)

    def newest_state(self) -> RunState | None:
        """Reads the newest checkpoint that is whole, the same one in all processes.

        Returns:
            The state of the run, or None if there is no checkpoint.

        Raises:
            ValueError: the processes see different checkpoints, all of them are damaged, or they
                are of another network.
        """
        state = self.checkpoints.newest()
        if not self._engine.same_in_all_processes(-1 if state is None else state.step):
            raise ValueError(
                f"The processes of this run see different checkpoints in {self.path}. The output "
                "folder must be one that all machines share."
            )
        if state is not None:
            self._check_network(CoAtNetConfig.from_dict(state.notes["network"]))
        return state

    def save_state(self, step: int, notes: dict[str, Any]) -> None:
        """Saves a checkpoint.

        Args:
            step: steps done.
            notes: what the loop must remember; anything that JSON can hold.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        notes = {**notes, "data": self._recipe.data, "network": self._network.to_dict()}
        self.checkpoints.save(RunState(step, self._engine.state(), notes))

    def _in_all_processes(self, act: Callable[[], None]) -> None:
        """Acts in all processes. If one of them fails, all raise, and none is left waiting."""
        problem = None
        try:
            act()
        except (ValueError, OSError) as error:
            problem = error
        if self._engine.any_process(problem is not None):
            raise problem or ValueError(
                "Another process of this run was refused; its own output says why. Fix that, and "
                "start the same command on all machines."
            )

    def _check(self) -> None:
        check_folder(self.path, self._recipe)
        check_same_data(self.path, *self._datasets)

    def _write(self, lock: bool) -> None:
        if not self._engine.is_chief:
            return
        if lock:
            self._held.enter_context(locked(self.path))
        path = self.path / RECIPE
        if path.exists():
            known = Recipe.load(path)
            self.changes = ", ".join(
                f"{name} {getattr(self._recipe, name)} instead of {getattr(known, name)}"
                for name in self._recipe.changed_fields(known, decides=False)
            )
        if self.changes or not path.exists():
            self._recipe.save(path)
        note_data(self.path, *self._datasets)

    def _check_network(self, known: CoAtNetConfig) -> None:
        """Checks that the network is that of the run: the file that a recipe names may change."""
        changed = [
            f"{field.name}={getattr(known, field.name)!r}"
            for field in dataclasses.fields(known)
            if getattr(known, field.name) != getattr(self._network, field.name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run of another network, with {', '.join(changed)}; "
                f"{self._recipe.model} has other values now. Restore them to go on with the run, "
                "or choose another output folder."
            )
