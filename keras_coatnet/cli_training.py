"""The sub-commands `train` and `evaluate`: see `cli`, of which they are a part."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keras_coatnet.paths import check_local
from keras_coatnet.training.named_recipes import FAMILIES, find_recipe
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.weights import registry

if TYPE_CHECKING:
    from keras_coatnet.inference import ImageSettings

FINE, CANNOT_GO_ON = 0, 1

# Arguments of their own, or not for the command line.
_NOT_OPTIONS = ("name", "model", "data", "weights")

_TRAIN_EXAMPLES = """\
examples:
  What recipes there are, with the command, the hardware and the accuracy of each:
    keras-coatnet train --list

  A checkpoint learns your own images, a sub-folder for each class:
    keras-coatnet train transfer --weights coatnet_0_rw_224.sw_in1k --data flowers/ \\
        --output runs/flowers

  Parts with names of their own, or a part for validation that holds 500 of the images:
    keras-coatnet train transfer --data birds/ --train-split 2023 --validation-split 2024
    keras-coatnet train transfer --data flowers/ --held-out 500

  The paper's CoAtNet-0, with ILSVRC2012_img_train.tar and _val.tar in DIR/downloads/manual:
    keras-coatnet train in1k_pretrain --model coatnet0 --data-dir DIR --output runs/c0

  The same with a smaller batch; both learning rates become an eighth:
    keras-coatnet train in1k_pretrain --batch-size 512 --data-dir DIR --output runs/c0

  What that would do, without doing it:
    keras-coatnet train in1k_pretrain --batch-size 512 --dry-run

The same command goes on with a run that was interrupted. Every field of a recipe is an option;
those that decide the result must stay the same then, the others may change. With another
--gradient-accumulation-steps, BatchNorm takes its statistics from parts of another size.

The run's folder gets recipe.json, data.json, classes.txt, history.csv, evaluations.csv,
tensorboard/, curves.png, confusion.png, per_class.csv, summary.json, checkpoints/, best.weights.h5
and final.weights.h5.

--data is a folder of images, one sub-folder a class, with parts such as train/ and val/ or
without; a name that tensorflow-datasets knows; a folder that it prepared; or a folder of MNIST's
IDX files. Of a folder without parts some images are held out.

Another --batch-size changes both learning rates in proportion, unless --learning-rate names one.
Another number of --epochs does not; schedule and warm-up are shares of the run.

Ctrl-C ends the run after the step that it is at, and saves; a second one ends it at once. On
several machines the run ends at the next step that is logged; during an evaluation, after that and
one step more. One run at a time writes to a folder.

exit status: 0 all fine; 1 the run cannot go on (the loss is not a number, too many images are
unreadable, a device is out of memory, another machine is gone); 2 a mistake in the call, or a full
disk; 130 stopped by Ctrl-C, 143 by SIGTERM, and saved
"""

_EVALUATE_EXAMPLES = """\
examples:
  A public checkpoint on ImageNet's validation images, one folder for each WordNet id:
    keras-coatnet evaluate --weights coatnet_0_rw_224.sw_in1k --data imagenet/val

  The same through tensorflow-datasets:
    keras-coatnet evaluate --weights coatnet_0_rw_224.sw_in1k --data imagenet2012 --data-dir DIR

  MNIST and its like, as IDX files (t10k-images-idx3-ubyte.gz and so on) in a folder:
    keras-coatnet evaluate --weights digits.keras --data mnist/

  What came of a run, on its own held-out images and with its own settings:
    keras-coatnet evaluate --run runs/flowers

Images are resized and cropped as in the measurement of the checkpoint's accuracy, or as in the
run; for other files to the size of the model's input.

exit status: 0 all fine; 2 a mistake in the call
"""


def add_commands(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the sub-commands to the parser of `cli`.

    Args:
        commands: what `add_subparsers` returned.
        add_command: makes a sub-command: `(commands, name, run, help, epilog)`.
    """
    _add_train(add_command(commands, "train", _train, "train a network", _TRAIN_EXAMPLES))
    _add_evaluate(
        add_command(
            commands, "evaluate", _evaluate, "measure a classifier's accuracy", _EVALUATE_EXAMPLES
        )
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "recipe",
        nargs="?",
        help=f"one of {', '.join(FAMILIES)}; or a recipe's .json file",
    )
    add("--list", action="store_true", help="say what recipes there are")
    add("--dry-run", action="store_true", help="print the effective recipe, and stop")
    add(
        "--model",
        metavar="NAME",
        help=f"{_help_of('model')} (default: the public checkpoint's, or the recipe's first)",
    )
    add("--weights", metavar="WEIGHTS", help=_help_of("weights"))
    add("--data", metavar="DATA", help=_help_of("data"))
    add("--data-dir", metavar="DIR", help="where tensorflow-datasets keeps its data")
    add("--output", metavar="DIR", help="the run's folder (default: runs/RECIPE_MODEL)")
    add(
        "--strategy",
        default="auto",
        help="auto, one_device, mirrored or multi_worker; on JAX data_parallel or model_parallel; "
        "tpu was never run, and wants a TensorFlow that there is none of for TPUs yet "
        "(default: %(default)s)",
    )
    add("--devices", type=int, metavar="N", help="how many of this machine's devices")
    as_said = "(default: as the recipe says)"
    deciding = parser.add_argument_group(f"fields of the recipe that decide the result {as_said}")
    running = parser.add_argument_group(f"fields that may change when a run goes on {as_said}")
    kinds = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name in _NOT_OPTIONS:
            continue
        group = deciding if field.metadata["decides"] else running
        option = f"--{field.name.replace('_', '-')}"
        if kinds[field.name] is bool:
            group.add_argument(
                option,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=_help_of(field.name),
            )
        else:
            group.add_argument(
                option,
                type=_converter(kinds[field.name]),
                default=argparse.SUPPRESS,
                choices=field.metadata["choices"],
                metavar=None if field.metadata["choices"] else "VALUE",
                help=_help_of(field.name),
            )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="WEIGHTS", help="a checkpoint's name, or a file")
    what.add_argument("--run", metavar="DIR", dest="run_folder", help="the folder of `train`")
    add("--architecture", metavar="NAME", help="the network of a file that does not say it")
    add("--data", metavar="DATA", help="a folder of images, or a tensorflow-datasets name")
    add("--split", help="a sub-folder, or a split (default: the one for validation)")
    add("--data-dir", metavar="DIR", help="where tensorflow-datasets keeps its data")
    add("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")
    add("--positive", metavar="CLASS", help="of two classes, the one that precision is about")
    add(
        "--unreadable-limit",
        type=int,
        default=10,
        metavar="N",
        help="images that may be unreadable (default: 10)",
    )
    add(
        "--crop-pct",
        type=float,
        metavar="SHARE",
        help="share of the resized side that is kept, above 0 and at most 1",
    )
    add("--crop-mode", choices=("center", "squash"), help="cut out the middle, or squeeze")
    add("--output", metavar="DIR", help="write evaluation.json, tables and confusion.png there")
    add(
        "--classes",
        type=int,
        metavar="N",
        default=20,
        help="rows of the table of classes, the worst first; 0: all (default: 20)",
    )
    add("--json", action="store_true", help="print one JSON document instead of tables")


def _help_of(field: str) -> str:
    (found,) = (f for f in dataclasses.fields(Recipe) if f.name == field)
    return found.metadata["help"].replace("%", "%%")


def _converter(kind: Any) -> Callable[[str], Any]:
    """What turns an option's text into a value of a field of this type."""
    kinds = typing.get_args(kind) or (kind,)
    (number,) = (k for k in kinds if k is not type(None))

    def convert(text: str) -> Any:
        return None if type(None) in kinds and text == "none" else number(text)

    convert.__name__ = number.__name__  # argparse's message names it
    return convert


# --- train -------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    check_local(args.output, "output")
    if args.list:
        for family in FAMILIES.values():
            models = "any" if family.models is None else ", ".join(family.models)
            print(f"{family.name}\n    {family.about.strip()}\n    Models: {models}.\n")
        return FINE
    if args.recipe is None:
        raise ValueError(f"Which recipe? One of {', '.join(FAMILIES)}; see `train --list`.")
    recipe = _effective_recipe(args)
    print(recipe.describe(), flush=True)
    if args.dry_run:
        return FINE
    output = args.output or f"runs/{recipe.name}_{pathlib.Path(recipe.model).stem}"

    from keras_coatnet.training.engine import devices
    from keras_coatnet.training.errors import TrainingError
    from keras_coatnet.training.run.signals import Stopped
    from keras_coatnet.training.run.train import train

    if args.strategy in ("auto", "mirrored") and (args.devices or 1) > 1:
        devices.divide_cpu(args.devices)
    try:
        result = train(
            recipe, output, data_dir=args.data_dir, strategy=args.strategy, devices=args.devices
        )
    except TrainingError as error:
        print(f"keras-coatnet: error: {error}", file=sys.stderr)
        return CANNOT_GO_ON
    except Stopped as stopped:
        print(f"keras-coatnet: {stopped}", file=sys.stderr)
        return stopped.exit_status
    print(result.summary())
    return FINE


def _effective_recipe(args: argparse.Namespace) -> Recipe:
    recipe = find_recipe(args.recipe, args.model or _architecture_of(args.weights))
    names = {field.name for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in vars(args).items() if name in names}
    for name in ("model", "weights", "data"):
        if given[name] is None:
            del given[name]
    recipe = recipe.replace(**given)
    recipe.architecture()  # says now if there is none
    return recipe


def _architecture_of(weights: str | None) -> str | None:
    """The architecture of a public checkpoint; None of files."""
    from keras_coatnet.weights.source import SUFFIXES, find_file

    check_local(weights, "weights", names="hf://")
    # A file that is not there yet is no obstacle to --dry-run.
    if weights is None or weights.endswith(SUFFIXES) or find_file(weights) is not None:
        return None
    return registry.find(weights, None).architecture


# --- evaluate ----------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> int:
    check_local(args.output, "output")
    check_local(args.run_folder, "run")
    check_local(args.data, "data")
    check_local(args.weights, "weights", names="hf://")
    from keras_coatnet.inference import check_classifier, open_model
    from keras_coatnet.training.data.datasets import open_source, open_sources
    from keras_coatnet.training.data.fingerprint import check_classes
    from keras_coatnet.training.data.folders import imagenet_of
    from keras_coatnet.training.evaluation import plots
    from keras_coatnet.training.evaluation.evaluate import evaluate
    from keras_coatnet.training.evaluation.metrics import EvaluationCounter

    # What costs nothing is checked first: an evaluation, or a download, may take hours.
    if args.output:
        plots.check_matplotlib()
        pathlib.Path(args.output).mkdir(parents=True, exist_ok=True)
    if args.run_folder is None:
        if args.data is None:
            raise ValueError("Which images? Give --data: a folder, or a data set's name.")
        source = open_source(args.data, args.split, data_dir=args.data_dir)
        is_imagenet = imagenet_of(source.classes) is not None
        if not is_imagenet:
            EvaluationCounter(source.classes, args.positive)
        model, settings = open_model(args.weights, args.architecture)
        if is_imagenet and check_classifier(model) != len(source.classes):
            # It was trained on some of ImageNet's classes, then.
            source = open_source(args.data, args.split, data_dir=args.data_dir, classes="present")
        EvaluationCounter(source.classes, args.positive)
    else:
        recipe, weights = _run_of(pathlib.Path(args.run_folder))
        if args.data is None and args.split is None:
            _, source = open_sources(recipe.data, data_dir=args.data_dir, **recipe.data_options())
        else:
            source = open_source(
                args.data or recipe.data,
                args.split,
                data_dir=args.data_dir,
                classes=recipe.classes,
            )
        check_classes(pathlib.Path(args.run_folder), source)
        args.positive = args.positive or recipe.positive
        EvaluationCounter(source.classes, args.positive)
        model, _ = open_model(weights)
        settings = recipe.image_settings()
    settings = _asked_for(settings, args)
    found = evaluate(
        model,
        source,
        settings,
        batch_size=args.batch_size,
        positive=args.positive,
        unreadable_limit=args.unreadable_limit,
    )
    if args.output:
        found.save(args.output)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(found.per_class_table(limit=args.classes or None))
        print(f"\n{source.name}: {settings}\n{found.summary_table()}")
    return FINE


def _run_of(folder: pathlib.Path) -> tuple[Recipe, pathlib.Path]:
    """The recipe and the final weights of a run."""
    if not (folder / "final.weights.h5").is_file():
        raise ValueError(
            f"{folder} holds no final.weights.h5: it is not the folder of a run that is complete."
        )
    return Recipe.load(folder / "recipe.json"), folder / "final.weights.h5"


def _asked_for(settings: ImageSettings, args: argparse.Namespace) -> ImageSettings:
    asked = {"crop_pct": args.crop_pct, "crop_mode": args.crop_mode}
    given = {field: value for field, value in asked.items() if value is not None}
    return dataclasses.replace(settings, **given)
