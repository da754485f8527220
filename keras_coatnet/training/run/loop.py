"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from typing import Any

import numpy as np
import tensorflow as tf

from keras_coatnet.training.data.augment import Augmentation
from keras_coatnet.training.data.datasets import ImageDataset
from keras_coatnet.training.data.pipeline import training_dataset
from keras_coatnet.training.data.unreadable import UnreadableImages
from keras_coatnet.training.engine.base import Engine
from keras_coatnet.training.engine.schedule import WarmUpSchedule
from keras_coatnet.training.errors import TrainingError
from keras_coatnet.training.evaluation.evaluate import evaluate_engine
from keras_coatnet.training.evaluation.metrics import Evaluation
from keras_coatnet.training.progress import Progress
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run.checkpoints import RunState
from keras_coatnet.training.run.folder import BEST, RunFolder
from keras_coatnet.training.run.log import Row, RunLog, read_history
from keras_coatnet.training.run.signals import Stopped, on_stop_signals

# Steps whose losses are left on the device before they are read.
_MOST_UNREAD = 16


class TrainingLoop:
    """Trains to the last step, and between steps logs, saves, evaluates, and stops if asked to.

    Args:
        recipe: the recipe of the run.
        datasets: for training and for validation.
        folder: the run's folder, opened.
        engine: the training step, on its devices.
        schedule: the learning rate of each step.
        unreadable: collects the images that cannot be read.
        progress: shows how far the run is.

    Attributes:
        total_steps: steps of the whole run.
        images_per_second: speed of this command over the whole run; None until it is over, or if
            there was no step left to do.
        step: steps done. With the next three attributes, it is what a checkpoint holds besides
            the engine's state.
        skipped: steps that were left out, because their loss or gradient was not finite.
        pending: losses and gradient norms since the last row of the log.
        best_top1: highest top-1 accuracy of the evaluations so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        datasets: tuple[ImageDataset, ImageDataset],
        folder: RunFolder,
        engine: Engine,
        schedule: WarmUpSchedule,
        unreadable: UnreadableImages,
        progress: Progress,
    ) -> None:
        self.recipe = recipe
        self.datasets = datasets
        self.folder = folder
        self.engine = engine
        self.schedule = schedule
        self.unreadable = unreadable
        self.progress = progress
        self.steps_per_epoch = recipe.steps_per_epoch(datasets[0].count)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.images_per_second: float | None = None
        self.step = 0
        self.skipped: list[int] = []
        self.pending: list[tuple[float, float]] = []
        self.best_top1 = 0.0
        self._log: RunLog | None = None  # the chief's
        self._stop_signal: int | None = None
        self._shown_loss: float | None = None

    def run(self) -> Evaluation:
        """Resumes the run if there is a checkpoint, and trains to the last step.

        Returns:
            The evaluation of the final weights.

        Raises:
            TrainingError: a loss is not finite, and the recipe says to stop then.
            Stopped: a signal asked the run to stop, and a checkpoint was saved.
            OSError: the disk is full, or the folder cannot be written.
        """
        is_resumed = self._resume()
        started, first = time.monotonic(), self.step
        if self.engine.is_chief:
            self._log = RunLog(self.folder.path, resume_step=self.step if is_resumed else None)
        try:
            if not is_resumed:
                self._save()  # a run whose first step is bad goes back to it
            elif self.step < self.total_steps:
                self.progress.message(f"going on from step {self.step:,}")
            if self.folder.changes:
                self.progress.message(f"going on with {self.folder.changes}")
            self._warn_of_little_room()
            with on_stop_signals(self._ask_to_stop):
                evaluation = self._train()
            if self.step > first:
                images = (self.step - first) * self.recipe.batch_size
                self.images_per_second = images / (time.monotonic() - started)
            return evaluation
        finally:
            self.progress.close()
            if self._log is not None:
                # Every row is on the disk already. What is raised here would hide the first error.
                with contextlib.suppress(OSError, tf.errors.OpError):
                    self._log.close()

    def _train(self) -> Evaluation:
        evaluation = None
        while self.step < self.total_steps:
            try:
                evaluation = self._train_until_bad() or evaluation
            except _BadStep as bad:
                self._go_back(bad)
        return evaluation or self._evaluate(log=self._lacks_evaluation())

    def _train_until_bad(self) -> Evaluation | None:
        """Trains to the last step. Raises `_BadStep` when a loss or gradient is not finite."""
        recipe = self.recipe
        evaluation = self._evaluate() if self._lacks_evaluation() else None
        batches = self.engine.iterate(self.engine.chunks, self._make_dataset)
        unread: list[tuple[int, Any, Any]] = []
        while self.step < self.total_steps:
            number = self.step + 1
            if number in self.skipped:
                for _ in range(recipe.gradient_accumulation_steps):
                    next(batches)
            else:
                unread.append((number, *self.engine.train_step(batches)))
            self.step = number

            evaluates = self._evaluates(number)
            saves = number % self.steps_per_epoch == 0 or number % recipe.checkpoint_steps == 0
            logs = number % recipe.log_steps == 0 or number == self.total_steps
            stops = self._stop_wanted(logs)
            # The device runs ahead while nobody needs to know what the steps gave. All processes
            # read at the same steps, so that they find a bad one together.
            is_first = self._shown_loss is None
            if evaluates or saves or logs or stops or is_first or len(unread) >= _MOST_UNREAD:
                self._read(unread)
            self._show(number)
            if logs:
                self._log_row()
            if saves or stops:
                self._save()
            if stops:
                raise Stopped(
                    f"stopped at step {number:,} of {self.total_steps:,}, which is saved; the same "
                    "command goes on",
                    self._stop_signal or signal.SIGTERM,
                )
            # After the checkpoint: an evaluation that fails costs no step, and is made up for.
            if evaluates:
                evaluation = self._evaluate()
        return evaluation

    # --- Steps -------------------------------------------------------------------------------

    def _make_dataset(self, first: int, own: int) -> tf.data.Dataset:
        recipe = self.recipe
        augmentation = Augmentation(
            crop=recipe.crop,
            area=(recipe.crop_area, 1.0),
            flip=recipe.flip,
            randaugment_num_ops=recipe.randaugment_num_ops,
            randaugment_magnitude=recipe.randaugment_magnitude,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )
        return training_dataset(
            self.datasets[0],
            size=(recipe.image_size, recipe.image_size),
            augmentation=augmentation,
            label_smoothing=recipe.label_smoothing,
            global_batch_size=recipe.batch_size,
            seed=recipe.seed,
            start_step=self.step,
            parts=recipe.gradient_accumulation_steps,
            replicas=self.engine.chunks,
            first_replica=first,
            local_replicas=own,
            unreadable=self.unreadable,
        )

    def _read(self, unread: list[tuple[int, Any, Any]]) -> None:
        """Reads the losses and norms of steps from the device."""
        if not unread:
            return
        numbers, losses, norms = zip(*unread, strict=True)
        unread.clear()
        losses, norms = self.engine.read([*losses, *norms]).reshape(2, -1).tolist()
        for number, loss, norm in zip(numbers, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _BadStep(number, loss, norm)
            self.pending.append((loss, norm))
            self._shown_loss = loss

    def _show(self, number: int) -> None:
        epoch, rate = number / self.steps_per_epoch, self._learning_rate(number)
        loss = "" if self._shown_loss is None else f"loss {self._shown_loss:.4f}  "
        self.progress.update(number, f"epoch {epoch:.2f}  {loss}lr {rate:.2e}")

    def _log_row(self) -> None:
        if self._log is not None and self.pending:
            loss, norm = np.mean(self.pending, axis=0)
            self._log.train(
                step=self.step,
                epoch=self.step / self.steps_per_epoch,
                loss=float(loss),
                learning_rate=self._learning_rate(self.step),
                gradient_norm=float(norm),
                images_per_second=self.progress.images_per_second,
            )
        self.pending = []

    def _learning_rate(self, step: int) -> float:
        """The learning rate of a step. Steps that were skipped made no update, and do not count."""
        return self.schedule.value(step - 1 - sum(skipped < step for skipped in self.skipped))

    def _go_back(self, bad: _BadStep) -> None:
        """Returns to the newest checkpoint, to leave a bad step out."""
        text = (
            f"the loss of step {bad.step:,} is {bad.loss} and the norm of its gradients {bad.norm}"
        )
        if self.recipe.on_nan == "stop":
            raise TrainingError(
                f"{text}. The run stops; its last checkpoint is whole. Start the same command with "
                "on_nan='skip' (--on-nan skip) to go on without that batch; or give a lower "
                "learning rate and another output folder."
            )
        skipped = [*self.skipped, bad.step]
        state = self.folder.newest_state()
        if state is None:
            raise TrainingError(
                f"there is no checkpoint in {self.folder.checkpoints.path} to go back to"
            )
        self._restore(state)
        self.skipped = skipped
        self.progress.restart()
        self.progress.message(f"{text}: back to step {state.step:,}, and that batch skipped")
        if self._log is not None:
            self._log.close()
            self._log = RunLog(self.folder.path, resume_step=state.step)

    # --- Evaluations -------------------------------------------------------------------------

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        at_end = step == self.total_steps
        return at_end or (step > 0 and rest == 0 and epoch % self.recipe.evaluation_epochs == 0)

    def _lacks_evaluation(self) -> bool:
        """Whether the run ended between the last checkpoint and the evaluation that follows it."""
        if not self._evaluates(self.step):
            return False
        is_logged = any(row["step"] == self.step for row in self._logged_evaluations())
        return self.engine.any_process(self.engine.is_chief and not is_logged)

    def _logged_evaluations(self) -> list[Row]:
        """The evaluations up to the step that the run is at."""
        return read_history(self.folder.path).until(self.step).evaluations

    def _evaluate(self, log: bool = True) -> Evaluation:
        """Evaluates the network, and logs it unless the log has this evaluation already."""
        with self.progress.paused():
            found = evaluate_engine(
                self.engine,
                self.datasets[1],
                self.recipe.image_settings(),
                # No more images at once than in a training step.
                batch_size=self.recipe.batch_size // self.recipe.gradient_accumulation_steps,
                unreadable=self.unreadable,
                positive=self.recipe.positive,
            )
        figures = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
        figures = {name: value for name, value in figures.items() if value is not None}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.progress.message(f"epoch {self.step / self.steps_per_epoch:.0f}  validation {shown}")
        if found.top1 >= self.best_top1:
            self.best_top1 = found.top1
            if self.engine.is_chief:
                self.engine.save_weights(self.folder.path / BEST)
        # Last of all: a resumed run takes a step with a row for evaluated.
        if self._log is not None and log:
            self._log.evaluation(step=self.step, **figures)
        return found

    # --- Checkpoints and signals -------------------------------------------------------------

    def _save(self) -> None:
        if not self.engine.is_chief:
            return
        with self.progress.paused():
            self.folder.save_state(
                self.step,
                {
                    "skipped": self.skipped,
                    "pending": self.pending,
                    "best_top1": self.best_top1,
                    "unreadable": self.unreadable.names,
                },
            )

    def _resume(self) -> bool:
        """Restores the newest checkpoint. Returns whether there is one."""
        state = self.folder.newest_state()
        if state is None:
            return False
        self._restore(state)
        if self.engine.is_chief:
            self.folder.checkpoints.discard_after(state.step)  # damaged ones
        return True

    def _restore(self, state: RunState) -> None:
        self.engine.restore(state.arrays)
        self.step = state.step
        self.skipped = list(state.notes["skipped"])
        self.pending = [tuple(pair) for pair in state.notes["pending"]]
        evaluated = [row["validation_top1"] or 0.0 for row in self._logged_evaluations()]
        self.best_top1 = max([state.notes["best_top1"], *evaluated])
        # Images are named by path. In data that were moved, they are found under their new names.
        if state.notes["data"] == self.recipe.data:
            for name in state.notes["unreadable"]:
                self.unreadable.add(name, "found before the run was interrupted")

    def _warn_of_little_room(self) -> None:
        """Warns at the start if the disk cannot hold all checkpoints."""
        missing = self.folder.checkpoints.missing_room() if self.engine.is_chief else 0
        if missing:
            self.progress.message(
                f"the disk lacks {missing / 1e6:,.1f} MB for the run's checkpoints: make room, or "
                "keep fewer (--keep-checkpoints 2)"
            )

    def _ask_to_stop(self, signal_number: int) -> None:
        self._stop_signal = signal_number

    def _stop_wanted(self, all_processes_are_here: bool) -> bool:
        """Whether to stop now. Several processes can agree on it only where all of them ask."""
        if self.engine.processes == 1:
            return self._stop_signal is not None
        return all_processes_are_here and self.engine.any_process(self._stop_signal is not None)


@dataclasses.dataclass
class _BadStep(Exception):
    """A step whose loss or gradients are not finite."""

    step: int
    loss: float
    norm: float
