"""`keras-coatnet models`: the public checkpoints, and the architectures."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.cli.messages import FINE
from keras_coatnet.cli.parsers import Commands, add_command
from keras_coatnet.cli.tables import aligned, markdown, or_dash
from keras_coatnet.counting.operations import count_flops, count_params
from keras_coatnet.weights.registry import CHECKPOINTS

_EXAMPLES = """\
examples:
  keras-coatnet models
  keras-coatnet models --architectures
  keras-coatnet models --json | jq '.[] | select(.top1 > 86) | .name'

GMACs are billions of multiply-adds of convolutions and matrix products, for one image of the given
size. top-1 and top-5 are accuracies in percent on the validation set of ImageNet-1k; checkpoints
with 11,821 classes have none. The parameters of an architecture include a classifier of 1000
classes.
"""

# Titles of the columns with numbers, which are aligned to the right.
_NUMBERS = ("params", "GMACs", "pixels", "classes", "top-1", "top-5", "file", "checkpoints")


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `models`.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(
        commands, "models", "list the public checkpoints, or the architectures", _EXAMPLES, run
    )
    parser.add_argument(
        "--architectures",
        action="store_true",
        help="list the networks that can be built without trained weights",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON list instead")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table instead")


def run(args: argparse.Namespace) -> int:
    """Prints the table or the list.

    Args:
        args: the parsed arguments.

    Returns:
        The exit status.
    """
    facts = _architecture_facts() if args.architectures else _checkpoint_facts()
    if args.json:
        print(json.dumps(facts, indent=2))
        return FINE
    rows = _architecture_rows(facts) if args.architectures else _checkpoint_rows(facts)
    numbers = [position for position, title in enumerate(rows[0]) if title in _NUMBERS]
    table = markdown(rows, numbers) if args.markdown else aligned(rows, numbers)
    print("\n".join(table))
    return FINE


def _checkpoint_facts() -> list[dict[str, Any]]:
    return [
        {
            **dataclasses.asdict(checkpoint),
            "multiply_adds": count_flops(
                checkpoint.architecture,
                (checkpoint.input_size, checkpoint.input_size, 3),
                classes=checkpoint.classes,
            ),
        }
        for checkpoint in CHECKPOINTS.values()
    ]


def _checkpoint_rows(facts: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    titles = ("checkpoint", "architecture", "params", "GMACs", "pixels", "classes")
    return [
        (*titles, "top-1", "top-5", "file", "license", "measured by"),
        *(
            (
                entry["name"],
                entry["architecture"],
                f"{entry['parameters'] / 1e6:.1f}M",
                f"{entry['multiply_adds'] / 1e9:.1f}",
                str(entry["input_size"]),
                str(entry["classes"]),
                or_dash(entry["top1"], "{:.2f}"),
                or_dash(entry["top5"], "{:.2f}"),
                or_dash(entry["size"] and entry["size"] / 1e6, "{:.0f} MB"),
                entry["license"],
                or_dash(entry["measured_by"], "{}"),
            )
            for entry in facts
        ),
    ]


def _architecture_facts() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "parameters": count_params(name, (*config.input_sides, 3)),
            "multiply_adds": count_flops(name, (*config.input_sides, 3)),
            "input_size": config.input_size,
            "checkpoints": [one.name for one in CHECKPOINTS.values() if one.architecture == name],
        }
        for name, config in ARCHITECTURES.items()
    ]


def _architecture_rows(facts: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        ("architecture", "params", "GMACs", "pixels", "checkpoints"),
        *(
            (
                entry["name"],
                f"{entry['parameters'] / 1e6:.1f}M",
                f"{entry['multiply_adds'] / 1e9:.1f}",
                str(entry["input_size"]),
                str(len(entry["checkpoints"])),
            )
            for entry in facts
        ),
    ]
