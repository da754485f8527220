"""`keras-coatnet train`: recipes, and runs that they decide."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import typing
from collections.abc import Callable
from typing import Any

from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.cli.checks import check_positive, check_training_images, whole_number_from
from keras_coatnet.cli.messages import CANNOT_CONTINUE, FINE, say
from keras_coatnet.cli.parsers import Commands, add_command
from keras_coatnet.cli.start import load_package
from keras_coatnet.paths import check_local
from keras_coatnet.training.choices import JAX_STRATEGIES, TENSORFLOW_STRATEGIES
from keras_coatnet.training.named_recipes import FAMILIES, find_recipe
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run.folder import check_folder
from keras_coatnet.weights import registry
from keras_coatnet.weights.lookup import SUFFIXES, check_offered, find_file

# Fields of a recipe that are arguments of their own, or that the command line does not offer.
_NOT_OPTIONS = ("name", "model", "data", "weights")

_EXAMPLES = """\
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
tensorboard/, checkpoints/ and best.weights.h5; at the end final.weights.h5, summary.json,
curves.png, evaluation.json, per_class.csv, confusion.csv and confusion.png.

--data is a folder of images, one sub-folder per class, with parts such as train/ and val/ or
without; a name that tensorflow-datasets knows; a folder that it prepared; or a folder of MNIST's
IDX files. Of a folder without parts some images are held out.

Another --batch-size changes both learning rates in proportion, unless --learning-rate names one.
Another number of --epochs does not; schedule and warm-up are shares of the run.

Ctrl-C saves and ends the run after the current step, or after an evaluation and one more step; a
second one ends it at once. On several machines, it ends at the next logged step. One run at a time
writes to a folder.

exit status: 0 all fine; 1 the run cannot go on (the loss is not a number, too many images are
unreadable, a device is out of memory, another machine is gone); 2 a mistake in the call, or a full
disk; 130 stopped by Ctrl-C, 143 by SIGTERM, and saved
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `train`.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(commands, "train", "train a network", _EXAMPLES, run)
    _add_arguments(parser)
    _add_fields(parser)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "recipe",
        nargs="?",
        help=f"one of {', '.join(FAMILIES)}; or a recipe's .json file",
    )
    add("--list", action="store_true", help="list the recipes, and stop")
    add("--dry-run", action="store_true", help="print the recipe with your options, and stop")
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
        choices=("auto", *dict.fromkeys((*TENSORFLOW_STRATEGIES, *JAX_STRATEGIES))),
        metavar="NAME",
        default="auto",
        help="auto, one_device, mirrored or multi_worker; on JAX data_parallel or model_parallel. "
        "tpu has never been run: there is no TensorFlow 2.21 for TPUs yet (default: %(default)s)",
    )
    add(
        "--devices",
        type=whole_number_from(1),
        metavar="N",
        help="how many of this machine's devices (default: all); multi_worker and tpu use all",
    )


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of a recipe, in two groups."""
    as_said = "(default: as the recipe says)"
    deciding = parser.add_argument_group(f"fields of the recipe that decide the result {as_said}")
    running = parser.add_argument_group(f"fields that may change when a run goes on {as_said}")
    types = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name in _NOT_OPTIONS:
            continue
        group = deciding if field.metadata["decides"] else running
        option, help = f"--{field.name.replace('_', '-')}", _help_of(field.name)
        # A field that is not given is left out of the arguments: None is a value of some.
        if types[field.name] is bool:
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help
            )
        else:
            group.add_argument(
                option,
                type=_converter(types[field.name]),
                default=argparse.SUPPRESS,
                choices=field.metadata["choices"],
                metavar=None if field.metadata["choices"] else "VALUE",
                help=help,
            )


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


def run(args: argparse.Namespace) -> int:
    """Lists the recipes, prints one, or trains a network with it.

    Args:
        args: the parsed arguments.

    Returns:
        The exit status.

    Raises:
        ValueError: a mistake in the call.
    """
    check_local(args.output, "output")
    if args.list:
        _list_recipes()
        return FINE
    if args.recipe is None:
        raise ValueError(f"Which recipe? One of {', '.join(FAMILIES)}; see `train --list`.")
    recipe = _effective_recipe(args)
    output = pathlib.Path(args.output or f"runs/{recipe.name}_{pathlib.Path(recipe.model).stem}")
    if not args.dry_run:
        _check(recipe, output, args.data_dir)
    print(recipe.describe(), flush=True)
    return FINE if args.dry_run else _train(recipe, output, args)


def _list_recipes() -> None:
    for family in FAMILIES.values():
        models = "any" if family.models is None else ", ".join(family.models)
        print(f"{family.name}\n    {family.about.strip()}\n    Models: {models}.\n")


def _effective_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that was named, with the options that were given."""
    recipe = find_recipe(args.recipe, args.model or _architecture_of(args.weights))
    names = {field.name for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in vars(args).items() if name in names}
    for name in ("model", "weights", "data"):
        if given[name] is None:
            del given[name]
    recipe = recipe.replace(**given)
    recipe.architecture()  # reports a missing one now
    return recipe


def _architecture_of(weights: str | None) -> str | None:
    """The architecture of a public checkpoint; None for a file."""
    check_local(weights, "weights", names="hf://")
    # With --dry-run the file need not exist yet.
    if weights is None or weights.endswith(SUFFIXES) or find_file(weights) is not None:
        return None
    return registry.find(weights, None).architecture


def _check(recipe: Recipe, output: pathlib.Path, data_dir: str | None) -> None:
    """Checks what a run needs, as far as that costs nothing."""
    if recipe.data is None:
        raise ValueError(
            f"The recipe {recipe.name!r} names no data. Give --data: a folder of images, or the "
            "name of a data set of tensorflow-datasets."
        )
    check_local(recipe.data, "data")
    check_local(data_dir, "data_dir")
    if recipe.weights is not None and find_file(recipe.weights) is None:
        checkpoint = registry.find(recipe.weights, None)
        network = ARCHITECTURES[checkpoint.architecture]
        check_offered(checkpoint.name, network, [recipe.architecture()], "CoAtNet")
    check_folder(output, recipe)
    classes = check_training_images(recipe.data, recipe.train_split, recipe.validation_split)
    check_positive(classes, recipe.positive)


def _train(recipe: Recipe, output: pathlib.Path, args: argparse.Namespace) -> int:
    load_package()
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
        say(f"error: {error}")
        return CANNOT_CONTINUE
    except Stopped as stopped:
        say(str(stopped))
        return stopped.exit_status
    print(result.summary())
    return FINE
