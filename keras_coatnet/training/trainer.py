"""A training run: from a recipe to weights, through whatever happens on the way."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
import warnings
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf

from keras_coatnet.applications import CoAtNet
from keras_coatnet.model import CoAtNetModel
from keras_coatnet.training import charts
from keras_coatnet.training.checkpointing import Checkpoint, CheckpointFolder
from keras_coatnet.training.devices import choose_devices, in_cluster, make_engine
from keras_coatnet.training.evaluation import evaluate_engine
from keras_coatnet.training.faults import TrainingError, in_words, on_sigterm
from keras_coatnet.training.optimization import AdamW, WarmUpSchedule, freeze, layer_rate_scales
from keras_coatnet.training.pipeline import Augmentation, BrokenPictures, training_dataset
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.rematerialisation import rematerialise
from keras_coatnet.training.reports import Progress, RunLog, summary
from keras_coatnet.training.scores import Evaluation
from keras_coatnet.training.sources import Source, open_sources

RECIPE, CLASSES, FINAL, BEST = "recipe.json", "classes.txt", "final.weights.h5", "best.weights.h5"


class Stopped(Exception):
    """A run that was asked to stop, and has saved where it is."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        folder: where everything was written.
        evaluation: of the final weights, on the validation part.
        best_top1: the best share of right answers of all evaluations.
        figures: the rows of the summary.
    """

    folder: pathlib.Path
    evaluation: Evaluation
    best_top1: float
    figures: dict[str, Any]

    def summary(self) -> str:
        """The figures as text."""
        return summary(self.figures)


def train(
    recipe: Recipe,
    output: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    strategy: str = "auto",
    devices: int | None = None,
    stream: TextIO | None = None,
) -> Result:
    """Trains a network, or goes on with a run that was interrupted.

    The folder `output` gets `recipe.json`, `classes.txt`, `checkpoints/`, `history.csv`,
    `evaluations.csv`, `tensorboard/`, `curves.png`, `best.weights.h5` and `final.weights.h5`; with
    an average of the weights, the last two hold the average. The weights load through
    `keras_coatnet.CoAtNet0(weights=path)` and the like.

    Called again with the same recipe and folder, it goes on from the newest checkpoint that is
    whole, to the same losses as a run that was never interrupted.

    Args:
        recipe: what is trained on what; its `data` must be named.
        output: the run's folder.
        data_dir: where tensorflow-datasets keeps its data.
        strategy: where it computes, see `devices.choose_devices`.
        devices: on how many devices; None: on all that the strategy finds.
        stream: where progress goes; None: the error stream.

    Returns:
        A `Result`.

    Raises:
        ValueError: the recipe, the data or the devices make no sense, or the folder holds another
            run.
        TrainingError: the run cannot go on: the loss is not a number, too many pictures cannot be
            read, or another process is gone.
        OSError: the disk is full.
        Stopped: the process was told to end (SIGTERM), and has saved a checkpoint.

    Example:
        recipe = find_recipe("transfer").replace(data="flowers", weights="imagenet", epochs=5)
        print(train(recipe, "runs/flowers").summary())
    """
    if recipe.data is None:
        raise ValueError(
            f"The recipe {recipe.name!r} names no data. Give `data`: a folder of pictures, or the "
            "name of a data set of tensorflow-datasets."
        )
    chosen = choose_devices(recipe, strategy, devices)
    sources = open_sources(
        recipe.data, data_dir=data_dir, held_out=recipe.held_out, seed=recipe.seed
    )
    folder = pathlib.Path(output)
    _check_folder(folder, recipe)
    broken = BrokenPictures(recipe.broken_limit)
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(recipe.precision)
        with in_words(folder, broken, in_cluster(chosen)):
            return _Run(recipe, sources, folder, chosen, broken, stream or sys.stderr).run()
    finally:
        keras.config.set_dtype_policy(policy)


def _check_folder(folder: pathlib.Path, recipe: Recipe) -> None:
    """Refuses a folder that holds anything but a run of this very recipe."""
    # Listed once: another process of the run may be writing the recipe just now.
    names = os.listdir(folder) if folder.exists() else []
    path = folder / RECIPE
    if RECIPE in names:
        known = Recipe.load(path)
        if known == recipe:
            return
        changed = [
            f"{field.name}={getattr(known, field.name)!r}"
            for field in dataclasses.fields(recipe)
            if getattr(known, field.name) != getattr(recipe, field.name)
        ]
        raise ValueError(
            f"{folder} holds another run, with {', '.join(changed)}. Give the same recipe to go "
            "on with it, or choose another output folder."
        )
    if any(not name.startswith(".") for name in names):
        raise ValueError(
            f"{folder} is not empty, and holds no run to go on with. Choose another output folder."
        )


class _Run:
    """The state of a run, and the loop."""

    def __init__(
        self,
        recipe: Recipe,
        sources: tuple[Source, Source],
        folder: pathlib.Path,
        chosen: Any,
        broken: BrokenPictures,
        stream: TextIO,
    ) -> None:
        self.recipe = recipe
        self.training, self.validation = sources
        self.folder = folder
        self.stream = stream
        self.steps_per_epoch = recipe.steps_per_epoch(self.training.count)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.schedule = WarmUpSchedule(
            recipe.learning_rate,
            recipe.minimum_learning_rate,
            self.total_steps,
            recipe.warmup_steps(self.total_steps),
            recipe.schedule,
        )
        self.broken = broken
        self.checkpoints = CheckpointFolder(folder / "checkpoints", recipe.keep_checkpoints)
        keras.utils.set_random_seed(recipe.seed)
        self.engine = make_engine(chosen, self._model, self._optimizer, recipe)
        self.stop_asked = False

        # What a checkpoint remembers beside the variables.
        self.step = 0  # batches of the data that are done
        self.skipped: list[int] = []  # those of them that were left out
        self.pending: list[tuple[float, float]] = []  # losses and norms since the last row
        self.best_top1 = 0.0

    def _model(self) -> CoAtNetModel:
        recipe = self.recipe
        with warnings.catch_warnings():
            # A classifier for other classes is what training is for.
            warnings.filterwarnings("ignore", ".*starts from random values")
            model = CoAtNet(
                recipe.architecture(),
                weights=recipe.weights,
                input_shape=(recipe.image_size, recipe.image_size, 3),
                classes=len(self.training.classes),
                classifier_activation=None,
                include_preprocessing=True,  # the pipeline's pixels are raw ones
                stochastic_depth=recipe.stochastic_depth,
            )
        if recipe.rematerialise:
            rematerialise(model)
        freeze(model, recipe.freeze, recipe.freeze_batch_norm)
        return model

    def _optimizer(self, model: CoAtNetModel) -> AdamW:
        recipe = self.recipe
        return AdamW(
            self.schedule,
            weight_decay=recipe.weight_decay,
            rate_scales=layer_rate_scales(model, recipe.layer_decay),
            gradients_are_summed=True,
            beta_1=recipe.beta_1,
            beta_2=recipe.beta_2,
            epsilon=recipe.epsilon,
        )

    # --- The loop ----------------------------------------------------------------------------

    def run(self) -> Result:
        self._open_folder()
        resumed = self._resume()
        started, first = time.monotonic(), self.step
        chief = self.engine.is_chief
        if chief:
            (self.folder / CLASSES).write_text("\n".join(self.training.classes) + "\n")
        self.log = RunLog(self.folder, resume_step=resumed) if chief else None
        opened = contextlib.nullcontext(self.stream) if chief else open(os.devnull, "w")
        with opened as stream:
            self.progress = Progress(
                self.total_steps, self.recipe.batch, stream, start_step=self.step
            )
            evaluation = self._logged_loop(resumed)
        return self._finish(evaluation, time.monotonic() - started, self.step - first)

    def _logged_loop(self, resumed: int | None) -> Evaluation:
        try:
            if resumed is None:
                self._save()  # what a run with a bad first batch goes back to
            elif resumed < self.total_steps:
                self.progress.message(f"going on from step {resumed:,}")
            with on_sigterm(self._ask_to_stop):
                return self._loop()
        finally:
            self.progress.close()
            if self.log is not None:
                # Each row is with the system already; what ended the run is to be seen, not this.
                with contextlib.suppress(OSError, tf.errors.OpError):
                    self.log.close()

    def _loop(self) -> Evaluation:
        evaluation = None
        while self.step < self.total_steps:
            try:
                evaluation = self._train_until_bad() or evaluation
            except _BadStep as bad:
                self._go_back(bad)
        return evaluation or self._evaluate(anew=True)

    def _train_until_bad(self) -> Evaluation | None:
        """Trains to the end; raises `_BadStep` where a loss or gradient is not finite."""
        recipe, evaluation = self.recipe, None
        batches = self.engine.iterate(self.engine.chunks, self._training_dataset)
        unread: collections.deque[tuple[int, Any, Any]] = collections.deque()
        while self.step < self.total_steps:
            number = self.step + 1
            if number in self.skipped:
                for _ in range(recipe.accumulate):
                    next(batches)
            else:
                unread.append((number, *self.engine.train_step(batches)))
            self.step = number
            ends_epoch = number % self.steps_per_epoch == 0
            epoch = number // self.steps_per_epoch
            evaluates = number == self.total_steps or (
                ends_epoch and epoch % recipe.evaluation_epochs == 0
            )
            saves = ends_epoch or number % recipe.checkpoint_steps == 0
            logs = number % recipe.log_steps == 0 or number == self.total_steps
            stops = self._stop_wanted(logs)
            if evaluates or saves or logs or stops or len(unread) >= 2:
                # The newest one is left to the device while there is no need to know it.
                self._read(unread, leave=0 if evaluates or saves or logs or stops else 1)
            if logs:
                self._log_row()
            if evaluates:
                evaluation = self._evaluate()
            if saves or stops:
                self._save()
            if stops:
                raise Stopped(
                    f"stopped at step {number:,} of {self.total_steps:,}, which is saved; the same "
                    "command goes on"
                )
        return evaluation

    def _read(self, unread: collections.deque, leave: int) -> None:
        while len(unread) > leave:
            number, loss, norm = unread.popleft()
            loss, norm = float(loss), float(norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _BadStep(number, loss, norm)
            self.pending.append((loss, norm))
            epoch, rate = number / self.steps_per_epoch, self._rate(number)
            self.progress.update(number, f"epoch {epoch:.2f}  loss {loss:.4f}  lr {rate:.2e}")

    def _go_back(self, bad: _BadStep) -> None:
        text = (
            f"the loss of step {bad.step:,} is {bad.loss} and the norm of its gradients {bad.norm}"
        )
        if self.recipe.on_nan == "stop":
            raise TrainingError(
                f"{text}. The run stops; its last checkpoint is whole. Lower the learning rate, or "
                "set on_nan to 'skip'."
            )
        skipped = [*self.skipped, bad.step]
        checkpoint = self._newest()
        self._restore(checkpoint)
        self.skipped = skipped
        self.progress.message(f"{text}: back to step {checkpoint.step:,}, and that batch skipped")
        if self.log is not None:
            self.log.close()
            self.log = RunLog(self.folder, resume_step=checkpoint.step)

    # --- Parts of it -------------------------------------------------------------------------

    def _training_dataset(self, first: int, own: int) -> tf.data.Dataset:
        recipe = self.recipe
        augmentation = Augmentation(
            crop=recipe.crop,
            area=(recipe.crop_area, 1.0),
            flip=recipe.flip,
            randaugment_layers=recipe.randaugment_layers,
            randaugment_magnitude=recipe.randaugment_magnitude,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )
        return training_dataset(
            self.training,
            size=(recipe.image_size, recipe.image_size),
            augmentation=augmentation,
            label_smoothing=recipe.label_smoothing,
            global_batch=recipe.batch,
            seed=recipe.seed,
            start_step=self.step,
            replicas=self.engine.chunks,
            first_replica=first,
            local_replicas=own,
            broken=self.broken,
        )

    def _evaluate(self, anew: bool = False) -> Evaluation:
        """Evaluates and logs it, unless it is only the same `anew`, of a run that is complete."""
        with self.progress.paused():
            found = evaluate_engine(
                self.engine,
                self.validation,
                self.recipe.picture_settings(),
                batch=self.recipe.batch,
                broken=self.broken,
                positive=self.recipe.positive,
            )
        figures = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
        figures = {name: value for name, value in figures.items() if value is not None}
        if self.log is not None and not anew:
            self.log.evaluation(step=self.step, **figures)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.progress.message(f"epoch {self.step / self.steps_per_epoch:.0f}  validation {shown}")
        if found.top1 >= self.best_top1:
            self.best_top1 = found.top1
            if self.engine.is_chief:
                self.engine.save_weights(self.folder / BEST)
        return found

    def _log_row(self) -> None:
        if self.log is not None and self.pending:
            losses, norms = np.mean(self.pending, axis=0)
            self.log.train(
                step=self.step,
                epoch=self.step / self.steps_per_epoch,
                loss=float(losses),
                learning_rate=self._rate(self.step),
                gradient_norm=float(norms),
                images_per_second=self.progress.images_per_second,
            )
        self.pending = []

    def _finish(self, evaluation: Evaluation, seconds: float, steps: int) -> Result:
        figures = {
            "model": self.recipe.model,
            "parameters": self.engine.model.count_params(),
            "pictures to train on": self.training.count,
            "pictures to validate on": self.validation.count,
            "unreadable pictures": len(self.broken.names),
            "steps": self.total_steps,
            "skipped steps": len(self.skipped),
            "images/s": steps * self.recipe.batch / seconds if steps else None,
            **evaluation.figures(),
            "best top1": self.best_top1,
            "folder": str(self.folder),
        }
        if self.engine.is_chief:
            self.engine.save_weights(self.folder / FINAL)
            evaluation.save(self.folder)
            charts.learning_curve(self.folder)
            text = json.dumps({k: v for k, v in figures.items() if v is not None}, indent=2)
            (self.folder / "summary.json").write_text(text + "\n")
        return Result(self.folder, evaluation, self.best_top1, figures)

    def _rate(self, step: int) -> float:
        """The learning rate with which the update of a step was made."""
        return float(self.schedule(step - 1 - sum(skipped < step for skipped in self.skipped)))

    # --- Faults ------------------------------------------------------------------------------

    def _ask_to_stop(self) -> None:
        self.stop_asked = True

    def _stop_wanted(self, all_processes_are_here: bool) -> bool:
        """Whether to stop now. Several processes can only agree on it where they all ask."""
        if self.engine.processes == 1:
            return self.stop_asked
        return all_processes_are_here and self.engine.any_process(self.stop_asked)

    def _save(self) -> None:
        if not self.engine.is_chief:
            return
        notes = {
            "skipped": self.skipped,
            "pending": self.pending,
            "best_top1": self.best_top1,
            "broken": self.broken.names,
        }
        with self.progress.paused():
            self.checkpoints.save(Checkpoint(self.step, self.engine.state(), notes))

    def _newest(self) -> Checkpoint:
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            raise TrainingError(f"there is no checkpoint in {self.checkpoints.path} to go back to")
        return checkpoint

    def _open_folder(self) -> None:
        """Writes the recipe of a new run, and checks that all processes write to one folder."""
        path = self.folder / RECIPE
        if self.engine.is_chief and not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.save(path)
        self.engine.any_process(False)  # the others wait for it
        if self.engine.any_process(not path.exists()):
            raise ValueError(
                f"Not all processes of this run see {path}. The output folder must be one that "
                "all machines share."
            )
        _check_folder(self.folder, self.recipe)

    def _resume(self) -> int | None:
        """Goes on from the newest checkpoint; returns its step, or None for a new run."""
        checkpoint = self.checkpoints.newest()
        if not self.engine.same_in_all_processes(-1 if checkpoint is None else checkpoint.step):
            raise ValueError(
                f"The processes of this run see different checkpoints in {self.folder}. The output "
                "folder must be one that all machines share."
            )
        if checkpoint is None:
            return None
        self._restore(checkpoint)
        if self.engine.is_chief:
            self.checkpoints.discard_after(checkpoint.step)  # damaged ones
        return checkpoint.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.engine.restore(checkpoint.arrays)
        self.step = checkpoint.step
        self.skipped = list(checkpoint.notes["skipped"])
        self.pending = [tuple(pair) for pair in checkpoint.notes["pending"]]
        self.best_top1 = checkpoint.notes["best_top1"]
        for name in checkpoint.notes["broken"]:
            self.broken.add(name, "found before the run was interrupted")


@dataclasses.dataclass
class _BadStep(Exception):
    """A step whose loss or gradients are not finite."""

    step: int
    loss: float
    norm: float
