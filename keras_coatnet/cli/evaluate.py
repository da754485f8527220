"""`keras-coatnet evaluate`: how accurate a classifier is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from keras_coatnet.cli.checks import (
    check_evaluation_images,
    check_positive,
    check_weights,
    whole_number_from,
)
from keras_coatnet.cli.messages import FINE
from keras_coatnet.cli.parsers import (
    Commands,
    add_classifier_options,
    add_command,
    cropped_as_asked,
)
from keras_coatnet.cli.start import load_package
from keras_coatnet.paths import check_local
from keras_coatnet.training.data.fingerprint import check_classes
from keras_coatnet.training.data.folders import imagenet_of
from keras_coatnet.training.evaluation.metrics import EvaluationCounter
from keras_coatnet.training.recipe import Recipe

if TYPE_CHECKING:
    import keras

    from keras_coatnet.images import ImageSettings
    from keras_coatnet.training.data.datasets import ImageDataset

_EXAMPLES = """\
examples:
  A public checkpoint on ImageNet's validation images, one folder for each WordNet id:
    keras-coatnet evaluate --weights coatnet_0_rw_224.sw_in1k --data imagenet/val

  The same through tensorflow-datasets:
    keras-coatnet evaluate --weights coatnet_0_rw_224.sw_in1k --data imagenet2012 --data-dir DIR

  MNIST and its like, as IDX files (t10k-images-idx3-ubyte.gz and so on) in a folder:
    keras-coatnet evaluate --weights digits.keras --data mnist/

  The result of a run, on its own held-out images and with its own settings:
    keras-coatnet evaluate --run runs/flowers

Images are resized and cropped as in the measurement of the checkpoint's accuracy, or as in the
run; for other files to the size of the model's input.

exit status: 0 all fine; 2 a mistake in the call
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `evaluate`.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(commands, "evaluate", "measure a classifier's accuracy", _EXAMPLES, run)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="WEIGHTS", help="a checkpoint's name, or a file")
    what.add_argument("--run", metavar="DIR", dest="run_folder", help="the folder of `train`")
    add("--data", metavar="DATA", help="a folder of images, or a tensorflow-datasets name")
    add("--split", help="a sub-folder, or a split (default: the one for validation)")
    add("--data-dir", metavar="DIR", help="where tensorflow-datasets keeps its data")
    add(
        "--positive",
        metavar="CLASS",
        help="of two classes, the one that precision, recall and F1 are about",
    )
    add(
        "--unreadable-limit",
        type=whole_number_from(0),
        default=10,
        metavar="N",
        help="number of images that may be unreadable (default: %(default)s)",
    )
    add("--output", metavar="DIR", help="write evaluation.json, tables and confusion.png there")
    add(
        "--classes",
        type=whole_number_from(0),
        metavar="N",
        default=20,
        help="rows of the table of classes, the worst first; 0: all (default: %(default)s)",
    )
    add_classifier_options(parser, batch_size=64)


@dataclasses.dataclass(frozen=True)
class _Task:
    """A classifier, and the images that it is evaluated on."""

    model: keras.Model
    source: ImageDataset
    settings: ImageSettings
    positive: str | None


def run(args: argparse.Namespace) -> int:
    """Evaluates a classifier, and prints the figures.

    Args:
        args: the parsed arguments.

    Returns:
        The exit status.

    Raises:
        ValueError: a mistake in the call.
    """
    _check(args)
    load_package()
    from keras_coatnet.training.evaluation.evaluate import evaluate

    # Checked before the evaluation, which may take hours.
    if args.output:
        from keras_coatnet.training.evaluation.plots import check_matplotlib

        check_matplotlib()
        pathlib.Path(args.output).mkdir(parents=True, exist_ok=True)
    task = _task_of_weights(args) if args.run_folder is None else _task_of_run(args)
    settings = cropped_as_asked(task.settings, args)
    found = evaluate(
        task.model,
        task.source,
        settings,
        batch_size=args.batch_size,
        positive=task.positive,
        unreadable_limit=args.unreadable_limit,
    )
    if args.output:
        found.save(args.output)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(found.per_class_table(limit=args.classes or None))
        print(f"\n{task.source.name}: {settings}\n{found.summary_table()}")
    return FINE


def _check(args: argparse.Namespace) -> None:
    """Checks the call as far as that costs nothing."""
    check_local(args.output, "output")
    check_local(args.run_folder, "run")
    check_local(args.data, "data")
    check_local(args.data_dir, "data_dir")
    check_local(args.weights, "weights", names="hf://")
    data = args.data
    if args.run_folder is not None:
        _, own, _ = _read_run(pathlib.Path(args.run_folder))
        data = data or own
    elif data is None:
        raise ValueError("Which images? Give --data: a folder, or a data set's name.")
    else:
        check_weights(args.weights, args.architecture)
    if args.data is not None or args.split is not None:
        classes = check_evaluation_images(data, args.split)
        check_positive(classes, args.positive)


def _task_of_weights(args: argparse.Namespace) -> _Task:
    """A checkpoint, or a file of weights, on the data that are named."""
    from keras_coatnet.inference import check_classifier, open_model
    from keras_coatnet.training.data.datasets import open_dataset

    source = open_dataset(args.data, args.split, data_dir=args.data_dir)
    is_imagenet = imagenet_of(source.classes) is not None
    if not is_imagenet:
        EvaluationCounter(source.classes, args.positive)  # checks it before a download
    model, settings = open_model(args.weights, args.architecture)
    if is_imagenet and check_classifier(model) != len(source.classes):
        # The model was trained on some of ImageNet's classes.
        source = open_dataset(args.data, args.split, data_dir=args.data_dir, classes="present")
    EvaluationCounter(source.classes, args.positive)
    return _Task(model, source, settings, args.positive)


def _task_of_run(args: argparse.Namespace) -> _Task:
    """The result of a run, on its own images or on others of the same classes."""
    from keras_coatnet.inference import open_model
    from keras_coatnet.training.data.datasets import open_dataset, open_datasets

    folder = pathlib.Path(args.run_folder)
    recipe, data, weights = _read_run(folder)
    if args.data is None and args.split is None:
        _, source = open_datasets(data, data_dir=args.data_dir, **recipe.data_options())
    else:
        source = open_dataset(
            args.data or data, args.split, data_dir=args.data_dir, classes=recipe.classes
        )
    check_classes(folder, source)
    positive = args.positive or recipe.positive
    EvaluationCounter(source.classes, positive)  # checks it before the model is opened
    model, _ = open_model(weights)
    return _Task(model, source, recipe.image_settings(), positive)


def _read_run(folder: pathlib.Path) -> tuple[Recipe, str, pathlib.Path]:
    """The recipe, the data and the final weights of a run."""
    weights = folder / "final.weights.h5"
    if not weights.is_file():
        raise ValueError(
            f"{folder} holds no final.weights.h5: it is not the folder of a run that is complete."
        )
    recipe = Recipe.load(folder / "recipe.json")
    if recipe.data is None:
        raise ValueError(f"The recipe in {folder} names no data, so it is not that of a run.")
    return recipe, recipe.data, weights
