"""A training run: from a recipe to weights, through whatever happens on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf

from keras_coatnet.applications import CoAtNet
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.files import whole_file
from keras_coatnet.model import CoAtNetModel
from keras_coatnet.paths import check_local
from keras_coatnet.training.data.datasets import Source, describe, open_sources
from keras_coatnet.training.data.fingerprint import check_same_data, note_data
from keras_coatnet.training.data.pipeline import Augmentation, UnreadableImages, training_dataset
from keras_coatnet.training.engine.devices import (
    Devices,
    check_batch,
    choose_devices,
    make_engine,
)
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.engine.remat import remat
from keras_coatnet.training.engine.schedule import WarmUpSchedule
from keras_coatnet.training.evaluation import plots
from keras_coatnet.training.evaluation.evaluate import evaluate_engine
from keras_coatnet.training.evaluation.metrics import Evaluation, EvaluationCounter
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run.checkpoints import Checkpoint, CheckpointFolder
from keras_coatnet.training.run.errors import (
    TrainingError,
    in_words,
    memory_advice,
    on_stop_signals,
)
from keras_coatnet.training.run.lock import locked
from keras_coatnet.training.run.log import Progress, RunLog, read_history, summary
from keras_coatnet.training.transfer import freeze, layer_rate_scales
from keras_coatnet.weights.source import find_source

_MOST_UNREAD = 16  # steps whose losses are left on the device

RECIPE, FINAL, BEST = "recipe.json", "final.weights.h5", "best.weights.h5"


class Stopped(Exception):
    """A run that was asked to stop, and has saved where it is.

    Args:
        text: what happened.
        signal_number: the signal that asked; SIGTERM if another process of the run got it.

    Attributes:
        exit_status: what a program should end with, as shells say it: 130 after Ctrl-C, 143 after
            SIGTERM.
    """

    def __init__(self, text: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(text)
        self.exit_status = 128 + signal_number


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

    The folder `output` gets `recipe.json`, `data.json` (which data, to be compared when the run
    goes on), `classes.txt`, `checkpoints/`, `history.csv`, `evaluations.csv`, `tensorboard/`,
    `curves.png`, `best.weights.h5` and `final.weights.h5`; with an average of the weights, the last
    two hold the average. The weights load through `keras_coatnet.CoAtNet0(weights=path)` and the
    like.

    Called again with the same recipe and folder, it goes on from the newest checkpoint that is
    whole, to the same losses as a run that was never interrupted. Fields that only say how the run
    is carried out may change then, see `Recipe`; `recipe.json` and the log follow.

    One run at a time writes to a folder. Outside the main thread, no signal stops a run.

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
            run, or one that is not over.
        ImportError: matplotlib or tensorflow-datasets is needed and not installed.
        TrainingError: the run cannot go on: the loss is not a number, too many images cannot be
            read, a device is out of memory, or another process is gone.
        OSError: the disk is full, or the folder cannot be written.
        Stopped: the process was told to end (SIGTERM, Ctrl-C), and has saved a checkpoint.

    Example:
        recipe = find_recipe("transfer", "coatnet_0_rw_224").replace(
            data="flowers", weights="coatnet_0_rw_224.sw_in1k", epochs=5
        )
        print(train(recipe, "runs/flowers").summary())
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"`recipe` must be a Recipe, such as find_recipe returns. Received: recipe={recipe!r}"
        )
    if recipe.data is None:
        raise ValueError(
            f"The recipe {recipe.name!r} names no data. Give `data`: a folder of images, or the "
            "name of a data set of tensorflow-datasets."
        )
    # What can be known without the data comes first: to prepare them may take hours.
    for path, argument in ((output, "output"), (recipe.data, "data"), (data_dir, "data_dir")):
        check_local(path, argument)
    architecture = recipe.architecture()
    if recipe.weights is not None:
        find_source(recipe.weights, [architecture], None, "CoAtNet")
    chosen = choose_devices(architecture, strategy, devices)
    if chosen.is_chief:
        plots.check_matplotlib()
    check_batch(chosen, recipe.step_config(), in_pairs=recipe.mixes_pairs)
    folder = pathlib.Path(output)
    _check_folder(folder, recipe)
    broken = UnreadableImages(recipe.unreadable_limit)
    policy = keras.config.dtype_policy()
    advice = memory_advice(recipe, chosen.replicas)
    try:
        keras.config.set_dtype_policy(recipe.dtype_policy)
        with (
            in_words(folder, broken, chosen.in_cluster, advice),
            contextlib.ExitStack() as held,
        ):
            if not chosen.in_cluster:  # else `_open_folder` does, where all processes are refused
                held.enter_context(locked(folder))
            sources = open_sources(recipe.data, data_dir=data_dir, **recipe.data_options())
            if not chosen.in_cluster:
                check_same_data(folder, *sources)
            EvaluationCounter(sources[1].classes, recipe.positive)  # says if there is none
            return _Run(recipe, sources, folder, chosen, broken, stream or sys.stderr, held).run()
    finally:
        keras.config.set_dtype_policy(policy)


def _check_folder(folder: pathlib.Path, recipe: Recipe) -> None:
    """Refuses a folder that holds anything but a run whose result the recipe decides, too."""
    # Listed once: another process of the run may be writing the recipe just now.
    names = os.listdir(folder) if folder.exists() else []
    path = folder / RECIPE
    if RECIPE in names:
        known = Recipe.load(path)
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


class _Run:
    """The state of a run, and the loop."""

    def __init__(
        self,
        recipe: Recipe,
        sources: tuple[Source, Source],
        folder: pathlib.Path,
        chosen: Devices,
        broken: UnreadableImages,
        stream: TextIO,
        held: contextlib.ExitStack,
    ) -> None:
        self.recipe = recipe
        self.network = recipe.architecture()
        self.training, self.validation = sources
        self.folder = folder
        self.stream = stream
        self.in_cluster = chosen.in_cluster
        self.held = held  # what ends with the run
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
        self.engine = make_engine(chosen, self._model, self._optimizer, recipe.step_config())
        self.stop_signal: int | None = None
        self.changes = ""  # from the recipe with which an earlier command ran
        self.shown_loss: float | None = None  # the last one that was read

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
                self.network,
                weights=recipe.weights,
                input_shape=(recipe.image_size, recipe.image_size, 3),
                classes=len(self.training.classes),
                classifier_activation=None,
                include_preprocessing=True,  # the pipeline's pixels are raw ones
                stochastic_depth=recipe.stochastic_depth,
            )
        if recipe.remat:
            remat(model)
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
        self.log = RunLog(self.folder, resume_step=resumed) if chief else None
        opened = contextlib.nullcontext(self.stream) if chief else open(os.devnull, "w")
        with opened as stream:
            self.progress = Progress(self.total_steps, self.recipe.batch_size, stream)
            self.progress.message(describe(self.training, self.validation))
            evaluation = self._logged_loop(resumed)
        return self._finish(evaluation, time.monotonic() - started, self.step - first)

    def _logged_loop(self, resumed: int | None) -> Evaluation:
        try:
            if resumed is None:
                self._save()  # what a run with a bad first batch goes back to
            elif resumed < self.total_steps:
                self.progress.message(f"going on from step {resumed:,}")
            if self.changes:
                self.progress.message(f"going on with {self.changes}")
            self._warn_of_little_room()
            with on_stop_signals(self._ask_to_stop):
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
        return evaluation or self._evaluate(anew=not self._lacks_evaluation())

    def _train_until_bad(self) -> Evaluation | None:
        """Trains to the end; raises `_BadStep` where a loss or gradient is not finite."""
        recipe = self.recipe
        evaluation = self._evaluate() if self._lacks_evaluation() else None
        batches = self.engine.iterate(self.engine.chunks, self._training_dataset)
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
            # Steps are left to the device while there is no need to know what came of them. All
            # processes read at the same steps, so that they find a bad one together.
            is_first = self.shown_loss is None
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
                    self.stop_signal or signal.SIGTERM,
                )
            # After the checkpoint: an evaluation that fails costs no step, and is made up for.
            if evaluates:
                evaluation = self._evaluate()
        return evaluation

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        at_end = step == self.total_steps
        return at_end or (step > 0 and rest == 0 and epoch % self.recipe.evaluation_epochs == 0)

    def _lacks_evaluation(self) -> bool:
        """Whether the run ended between the last checkpoint and the evaluation that follows it."""
        if not self._evaluates(self.step):
            return False
        is_logged = any(row["step"] == self.step for row in self._evaluation_rows())
        return self.engine.any_process(self.engine.is_chief and not is_logged)

    def _evaluation_rows(self) -> list[dict[str, Any]]:
        """The evaluations up to the step that the run is at."""
        rows = read_history(self.folder).evaluations
        return [row for row in rows if row["step"] <= self.step]

    def _read(self, unread: list[tuple[int, Any, Any]]) -> None:
        """Takes note of the losses and norms of steps, and forgets the tensors."""
        if not unread:
            return
        numbers, losses, norms = zip(*unread, strict=True)
        unread.clear()
        losses, norms = self.engine.read([*losses, *norms]).reshape(2, -1).tolist()
        for number, loss, norm in zip(numbers, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _BadStep(number, loss, norm)
            self.pending.append((loss, norm))
            self.shown_loss = loss

    def _show(self, number: int) -> None:
        epoch, rate = number / self.steps_per_epoch, self._rate(number)
        loss = "" if self.shown_loss is None else f"loss {self.shown_loss:.4f}  "
        self.progress.update(number, f"epoch {epoch:.2f}  {loss}lr {rate:.2e}")

    def _go_back(self, bad: _BadStep) -> None:
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
        checkpoint = self._newest()
        if checkpoint is None:
            raise TrainingError(f"there is no checkpoint in {self.checkpoints.path} to go back to")
        self._restore(checkpoint)
        self.skipped = skipped
        self.progress.restart()
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
            randaugment_num_ops=recipe.randaugment_num_ops,
            randaugment_magnitude=recipe.randaugment_magnitude,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )
        return training_dataset(
            self.training,
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
            broken=self.broken,
        )

    def _evaluate(self, anew: bool = False) -> Evaluation:
        """Evaluates and logs it, unless it is only the same `anew`, of a run that is complete."""
        with self.progress.paused():
            found = evaluate_engine(
                self.engine,
                self.validation,
                self.recipe.image_settings(),
                batch_size=self.recipe.batch_size
                // self.recipe.gradient_accumulation_steps,  # no more at once than a step
                broken=self.broken,
                positive=self.recipe.positive,
            )
        figures = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
        figures = {name: value for name, value in figures.items() if value is not None}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.progress.message(f"epoch {self.step / self.steps_per_epoch:.0f}  validation {shown}")
        if found.top1 >= self.best_top1:
            self.best_top1 = found.top1
            if self.engine.is_chief:
                self.engine.save_weights(self.folder / BEST)
        # Last of all: what has a row was evaluated, and is not evaluated again.
        if self.log is not None and not anew:
            self.log.evaluation(step=self.step, **figures)
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
            "images to train on": self.training.count,
            "images to validate on": self.validation.count,
            "unreadable images": len(self.broken.names),
            "steps": self.total_steps,
            "skipped steps": len(self.skipped),
            "images/s": steps * self.recipe.batch_size / seconds if steps else None,
            **evaluation.figures(),
            "best top1": self.best_top1,
            "folder": str(self.folder),
        }
        if self.engine.is_chief:
            self.engine.save_weights(self.folder / FINAL)
            evaluation.save(self.folder)
            if read_history(self.folder).training:  # somebody may have moved it away
                plots.learning_curve(self.folder)
            text = json.dumps({k: v for k, v in figures.items() if v is not None}, indent=2)
            with whole_file(self.folder / "summary.json") as partial:
                partial.write_text(text + "\n")
        return Result(self.folder, evaluation, self.best_top1, figures)

    def _rate(self, step: int) -> float:
        """The learning rate with which the update of a step was made."""
        return self.schedule.value(step - 1 - sum(skipped < step for skipped in self.skipped))

    # --- Faults ------------------------------------------------------------------------------

    def _ask_to_stop(self, signal_number: int) -> None:
        self.stop_signal = signal_number

    def _stop_wanted(self, all_processes_are_here: bool) -> bool:
        """Whether to stop now. Several processes can only agree on it where they all ask."""
        if self.engine.processes == 1:
            return self.stop_signal is not None
        return all_processes_are_here and self.engine.any_process(self.stop_signal is not None)

    def _warn_of_little_room(self) -> None:
        """Says at once if the disk will be full before all checkpoints are there."""
        missing = self.checkpoints.missing_room() if self.engine.is_chief else 0
        if missing:
            self.progress.message(
                f"the disk lacks {missing / 1e6:,.1f} MB for the run's checkpoints: make room, or "
                "keep fewer (--keep-checkpoints 2)"
            )

    def _save(self) -> None:
        if not self.engine.is_chief:
            return
        notes = {
            "skipped": self.skipped,
            "pending": self.pending,
            "best_top1": self.best_top1,
            "broken": self.broken.names,
            "data": self.recipe.data,
            "network": self.network.to_dict(),
        }
        with self.progress.paused():
            self.checkpoints.save(Checkpoint(self.step, self.engine.state(), notes))

    def _newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, if there is one; the same in all processes."""
        checkpoint = self.checkpoints.newest()
        if not self.engine.same_in_all_processes(-1 if checkpoint is None else checkpoint.step):
            raise ValueError(
                f"The processes of this run see different checkpoints in {self.folder}. The output "
                "folder must be one that all machines share."
            )
        return checkpoint

    def _open_folder(self) -> None:
        """Writes the recipe, and checks that all processes have the same one, and one folder."""
        path = self.folder / RECIPE
        text = json.dumps([self.recipe.to_dict(), self.network.to_dict()], sort_keys=True)
        if not self.engine.same_in_all_processes(zlib.crc32(text.encode())):
            raise ValueError(
                "The processes of this run have different recipes. Start the same command on all "
                "machines."
            )
        self._agreed(self._check_run)
        self._agreed(self._write_recipe)  # the others wait for the chief
        if self.engine.any_process(not path.exists()):
            raise ValueError(
                f"Not all processes of this run see {path}. The output folder must be one that "
                "all machines share."
            )
        self._agreed(self._check_run)

    def _check_run(self) -> None:
        _check_folder(self.folder, self.recipe)
        check_same_data(self.folder, self.training, self.validation)

    def _write_recipe(self) -> None:
        if not self.engine.is_chief:
            return
        if self.in_cluster:  # else `train` has done so
            self.held.enter_context(locked(self.folder))
        path = self.folder / RECIPE
        if path.exists():
            known = Recipe.load(path)
            self.changes = ", ".join(
                f"{name} {getattr(self.recipe, name)} instead of {getattr(known, name)}"
                for name in self.recipe.changed_fields(known, decides=False)
            )
        if self.changes or not path.exists():
            self.recipe.save(path)
        note_data(self.folder, self.training, self.validation)

    def _agreed(self, act: Callable[[], None]) -> None:
        """Does something in all processes; if one of them is refused, all end, and none waits."""
        problem = None
        try:
            act()
        except (ValueError, OSError) as error:
            problem = error
        if self.engine.any_process(problem is not None):
            raise problem or ValueError(
                "Another process of this run was refused; its own output says why. Mend that, and "
                "start the same command on all machines."
            )

    def _resume(self) -> int | None:
        """Goes on from the newest checkpoint; returns its step, or None for a new run."""
        checkpoint = self._newest()
        if checkpoint is None:
            return None
        self._check_network(checkpoint)
        self._restore(checkpoint)
        if self.engine.is_chief:
            self.checkpoints.discard_after(checkpoint.step)  # damaged ones
        return checkpoint.step

    def _check_network(self, checkpoint: Checkpoint) -> None:
        """Refuses the checkpoint of another network: the file that a recipe names may change."""
        known = CoAtNetConfig.from_dict(checkpoint.notes["network"])
        changed = [
            f"{field.name}={getattr(known, field.name)!r}"
            for field in dataclasses.fields(known)
            if getattr(known, field.name) != getattr(self.network, field.name)
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run of another network, with {', '.join(changed)}; "
                f"{self.recipe.model} has other values now. Restore them to go on with the run, or "
                "choose another output folder."
            )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.engine.restore(checkpoint.arrays)
        self.step = checkpoint.step
        self.skipped = list(checkpoint.notes["skipped"])
        self.pending = [tuple(pair) for pair in checkpoint.notes["pending"]]
        evaluated = [row["validation_top1"] for row in self._evaluation_rows()]
        self.best_top1 = max([checkpoint.notes["best_top1"], *evaluated])
        # Names are paths: where the data lie elsewhere now, these are met again by other names.
        if checkpoint.notes["data"] == self.recipe.data:
            for name in checkpoint.notes["broken"]:
                self.broken.add(name, "found before the run was interrupted")


@dataclasses.dataclass
class _BadStep(Exception):
    """A step whose loss or gradients are not finite."""

    step: int
    loss: float
    norm: float
