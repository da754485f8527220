"""`train`: from a recipe to weights."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
from typing import TextIO

import keras

from keras_coatnet.applications import CoAtNet
from keras_coatnet.files import whole_file
from keras_coatnet.model import CoAtNetModel
from keras_coatnet.paths import check_local
from keras_coatnet.training.data.datasets import ImageDataset, describe, open_datasets
from keras_coatnet.training.data.fingerprint import check_same_data
from keras_coatnet.training.data.unreadable import UnreadableImages
from keras_coatnet.training.engine.base import Engine
from keras_coatnet.training.engine.devices import (
    Devices,
    check_batch,
    choose_devices,
    make_engine,
)
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.engine.remat import remat
from keras_coatnet.training.engine.schedule import WarmUpSchedule
from keras_coatnet.training.errors import explain_errors
from keras_coatnet.training.evaluation import plots
from keras_coatnet.training.evaluation.metrics import Evaluation, EvaluationCounter
from keras_coatnet.training.progress import Progress
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run.folder import FINAL, RunFolder, check_folder
from keras_coatnet.training.run.lock import locked
from keras_coatnet.training.run.log import read_history
from keras_coatnet.training.run.loop import TrainingLoop
from keras_coatnet.training.run.result import Result, as_json
from keras_coatnet.training.transfer import freeze, layer_rate_scales
from keras_coatnet.weights.source import find_source


def train(
    recipe: Recipe,
    output: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    strategy: str = "auto",
    devices: int | None = None,
    stream: TextIO | None = None,
) -> Result:
    """Trains a network, or resumes a run that was interrupted.

    The folder `output` gets `recipe.json`, `data.json` (which data it was, to be compared when the
    run is resumed), `classes.txt`, `checkpoints/`, `history.csv`, `evaluations.csv`,
    `tensorboard/` and `best.weights.h5`; at the end `final.weights.h5`, `summary.json`,
    `curves.png`, and the evaluation of the final weights: `evaluation.json`, `per_class.csv`,
    `confusion.csv` and `confusion.png`. With a moving average of the weights, the two weight files
    hold the average. They load through `keras_coatnet.CoAtNet0(weights=path)` and its siblings.

    Called again with the same recipe and folder, the function resumes the run from the newest
    checkpoint that is whole. The losses are those of a run that was never interrupted. Fields that
    only say how the run is carried out may change then, see `Recipe`.

    Only one run at a time can write to a folder. Signals stop a run only in the main thread.

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
            run, or a run that is still in progress.
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
    # Preparing the data may take hours: everything else that can be wrong is checked first.
    for path, argument in ((output, "output"), (recipe.data, "data"), (data_dir, "data_dir")):
        check_local(path, argument)
    architecture = recipe.architecture()
    if recipe.weights is not None:
        find_source(recipe.weights, [architecture], None, "CoAtNet")
    chosen = choose_devices(architecture, strategy, devices)
    if chosen.is_chief:
        plots.check_matplotlib()
    check_batch(chosen, recipe.step_config(), in_pairs=recipe.mixes)
    folder = pathlib.Path(output)
    check_folder(folder, recipe)
    unreadable = UnreadableImages(recipe.unreadable_limit)
    policy, distribution = keras.config.dtype_policy(), keras.distribution.distribution()
    advice = memory_advice(recipe, chosen.replicas)
    # In a cluster, `RunFolder.open` locks and checks: a process that failed here would leave the
    # others waiting.
    alone = not chosen.in_cluster
    try:
        keras.config.set_dtype_policy(recipe.dtype_policy)
        with (
            explain_errors(folder, unreadable, not alone, advice),
            contextlib.ExitStack() as held,
        ):
            if alone:
                held.enter_context(locked(folder))
            datasets = open_datasets(recipe.data, data_dir=data_dir, **recipe.data_options())
            if alone:
                check_same_data(folder, *datasets)
            EvaluationCounter(datasets[1].classes, recipe.positive)  # raises if there is none
            engine, schedule = _make_engine(recipe, datasets[0], chosen)
            run_folder = RunFolder(folder, recipe, datasets, engine, held)
            run_folder.open(lock=not alone)
            if not engine.is_chief:
                stream = held.enter_context(open(os.devnull, "w"))
            progress = Progress(
                recipe.epochs * recipe.steps_per_epoch(datasets[0].count),
                recipe.batch_size,
                stream,
            )
            progress.message(describe(*datasets))
            loop = TrainingLoop(
                recipe, datasets, run_folder, engine, schedule, unreadable, progress
            )
            return _finish(loop, loop.run())
    finally:
        keras.config.set_dtype_policy(policy)
        keras.distribution.set_distribution(distribution)  # an engine on JAX sets its own


def _make_engine(
    recipe: Recipe, dataset: ImageDataset, chosen: Devices
) -> tuple[Engine, WarmUpSchedule]:
    """Builds network, optimizer and training step on the devices that were chosen."""
    steps = recipe.epochs * recipe.steps_per_epoch(dataset.count)
    schedule = WarmUpSchedule(
        recipe.learning_rate,
        recipe.minimum_learning_rate,
        steps,
        recipe.warmup_steps(steps),
        recipe.schedule,
    )

    def make_model() -> CoAtNetModel:
        with warnings.catch_warnings():
            # A classifier for other classes is what training is for.
            warnings.filterwarnings("ignore", ".*starts from random values")
            model = CoAtNet(
                recipe.architecture(),
                weights=recipe.weights,
                input_shape=(recipe.image_size, recipe.image_size, 3),
                classes=len(dataset.classes),
                classifier_activation=None,
                include_preprocessing=True,  # the pipeline gives raw pixels
                stochastic_depth=recipe.stochastic_depth,
            )
        if recipe.remat:
            remat(model)
        freeze(model, recipe.freeze, recipe.freeze_batch_norm)
        return model

    def make_optimizer(model: CoAtNetModel) -> AdamW:
        return AdamW(
            schedule,
            weight_decay=recipe.weight_decay,
            rate_scales=layer_rate_scales(model, recipe.layer_decay),
            gradients_are_summed=True,
            beta_1=recipe.beta_1,
            beta_2=recipe.beta_2,
            epsilon=recipe.epsilon,
        )

    keras.utils.set_random_seed(recipe.seed)
    return make_engine(chosen, make_model, make_optimizer, recipe.step_config()), schedule


def _finish(loop: TrainingLoop, evaluation: Evaluation) -> Result:
    """Writes the weights, the figures and the plots of a run that is complete."""
    folder, recipe = loop.folder.path, loop.recipe
    training, validation = loop.datasets
    figures = {
        "model": recipe.model,
        "parameters": loop.engine.model.count_params(),
        "images to train on": training.count,
        "images to validate on": validation.count,
        "unreadable images": len(loop.unreadable.names),
        "steps": loop.total_steps,
        "skipped steps": len(loop.skipped),
        "images/s": loop.images_per_second,
        **evaluation.figures(),
        "best top1": loop.best_top1,
        "folder": str(folder),
    }
    if loop.engine.is_chief:
        loop.engine.save_weights(folder / FINAL)
        evaluation.save(folder)
        history = read_history(folder)
        if history.training:  # somebody may have moved the file away
            plots.learning_curve(history.training, history.evaluations, folder / "curves.png")
        with whole_file(folder / "summary.json") as partial:
            partial.write_text(as_json(figures))
    return Result(folder, evaluation, loop.best_top1, figures)


def memory_advice(recipe: Recipe, replicas: int) -> str:
    """Says how a run that is out of memory can go on.

    Args:
        recipe: the recipe of the run.
        replicas: number of devices over which a batch is split.

    Returns:
        One sentence or two; each names an option of `train`.
    """
    share = recipe.batch_size // replicas
    smallest = 2 if recipe.mixes else 1
    numbers = range(recipe.gradient_accumulation_steps + 1, share // smallest + 1)
    parts = next((number for number in numbers if share % (number * smallest) == 0), None)
    going_on = [f"--gradient-accumulation-steps {parts} (smaller parts)"] if parts else []
    if not recipe.remat:
        going_on.append("--remat (computes blocks twice)")
    anew = ["--dtype-policy mixed_bfloat16"] if recipe.dtype_policy == "float32" else []
    anew += ["a smaller --batch-size or --image-size"]
    first = f"Start the same command with {' or '.join(going_on)} to go on. " if going_on else ""
    return f"{first}In another output folder, {' or '.join(anew)} helps, too."
