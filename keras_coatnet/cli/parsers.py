"""What the parsers of all sub-commands have in common."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from keras_coatnet.cli.checks import crop_pct, whole_number_from
from keras_coatnet.images import CROP_MODES, ImageSettings

Commands = argparse._SubParsersAction  # what `add_subparsers` returns; argparse has no other name


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    summary: str,
    examples: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Adds a sub-command, still without options.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        name: the sub-command's name.
        summary: what it does, in a few words, without a full stop.
        examples: the text that ends its help, laid out as it is to be shown.
        run: takes the parsed arguments, and returns the exit status.

    Returns:
        The sub-command's parser.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_classifier_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Adds the options that `predict` and `evaluate` have in common.

    Args:
        parser: the sub-command's parser.
        batch_size: the default of `--batch-size`.
    """
    add_network_option(parser)
    parser.add_argument(
        "--batch-size",
        type=whole_number_from(1),
        default=batch_size,
        metavar="N",
        help="number of images to compute at once (default: %(default)s)",
    )
    add_image_options(parser)


def add_network_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the network that a file of weights belongs to.

    Args:
        parser: the sub-command's parser.
    """
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="the network that a file's weights belong to, for files that do not say it "
        "(see `keras-coatnet models --architectures`)",
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of how images are prepared, and of JSON.

    Args:
        parser: the sub-command's parser.
    """
    add = parser.add_argument
    add(
        "--crop-pct",
        type=crop_pct,
        metavar="SHARE",
        help="share of the resized side that is kept, above 0 and at most 1 (default: that of the "
        "checkpoint or the run, or 0.95)",
    )
    add(
        "--crop-mode",
        choices=CROP_MODES,
        help="center: cut out the middle; squash: change the proportions (default: that of the "
        "checkpoint or the run, or center)",
    )
    add("--json", action="store_true", help="print one JSON document instead of tables")


def cropped_as_asked(settings: ImageSettings, args: argparse.Namespace) -> ImageSettings:
    """Returns settings of images with `--crop-pct` and `--crop-mode`, if they were given."""
    asked = {"crop_pct": args.crop_pct, "crop_mode": args.crop_mode}
    given = {field: value for field, value in asked.items() if value is not None}
    return dataclasses.replace(settings, **given)
