"""`keras-coatnet export`: a model for other programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from keras_coatnet.cli.checks import (
    check_weights,
    find_images,
    labels_beside,
    read_labels,
    whole_number_from,
)
from keras_coatnet.cli.messages import FINE, say
from keras_coatnet.cli.parsers import (
    Commands,
    add_command,
    add_image_options,
    add_network_option,
    cropped_as_asked,
)
from keras_coatnet.cli.start import load_package
from keras_coatnet.cli.tables import aligned
from keras_coatnet.exporting.formats import (
    FORMATS,
    QUANTIZATIONS,
    check_installed,
    check_target,
    find_format,
    is_exported,
)
from keras_coatnet.images import ImageSettings, load_image

if TYPE_CHECKING:
    from keras_coatnet.exporting.export import ExportReport

_EXAMPLES = """\
examples:
  A public checkpoint for LiteRT:
    keras-coatnet export coatnet_0_rw_224.sw_in1k coatnet.tflite

  What `train` made, as a SavedModel for TensorFlow Serving, with the names of its classes:
    keras-coatnet export runs/leaves/final.weights.h5 served

  Eight bits, with the ranges of some of the images that it is for:
    keras-coatnet export leaves.keras leaves.onnx --quantize int8 --images leaves/validation

  The file is used like a checkpoint:
    keras-coatnet predict leaf.jpg --model leaves.onnx

formats, and what they need:
  SavedModel   a folder   nothing; also takes encoded images, with the endpoint serve_images
  LiteRT       .tflite    pip install "keras-coatnet[litert]"
  ONNX         .onnx      pip install "keras-coatnet[onnx]"
  OpenVINO     .xml       pip install "keras-coatnet[openvino]"

The model is run in its format's own runtime, and compared with Keras, before anything stands at
PATH.

exit status: 0 all fine; 2 a mistake in the call, or a model that differs too much from Keras
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `export`.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(
        commands, "export", "write a model for TensorFlow Serving, LiteRT, ONNX or OpenVINO",
        _EXAMPLES, run,
    )  # fmt: skip
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a checkpoint's name, or a file, as of `predict`")
    add("path", metavar="PATH", help="the file or folder to write")
    add("--format", choices=tuple(FORMATS), help="(default: as PATH ends)")
    add(
        "--quantize",
        choices=[name for name in QUANTIZATIONS if name],
        help="how weights are stored (default: float32)",
    )
    add(
        "--images",
        metavar="IMAGE",
        nargs="+",
        help="images, or folders of them, to verify on, and to measure int8's ranges on; some "
        "hundred are enough (default: random patterns)",
    )
    add(
        "--max-images",
        metavar="N",
        type=whole_number_from(1),
        default=200,
        help="number of these images to use, evenly chosen (default: %(default)s)",
    )
    add("--labels", metavar="FILE", help="names of the classes, one on each line, as of `predict`")
    add("--overwrite", action="store_true", help="replace what stands at PATH")
    add_network_option(parser)
    add_image_options(parser)


def run(args: argparse.Namespace) -> int:
    """Exports a model, and prints what was measured.

    Args:
        args: the parsed arguments.

    Returns:
        The exit status.

    Raises:
        ValueError: a mistake in the call, or a model that differs too much from Keras.
    """
    labels, paths = _check(args)
    load_package()
    from keras_coatnet import inference
    from keras_coatnet.exporting.export import export

    model, settings = inference.open_model(args.weights, args.architecture)
    settings = cropped_as_asked(settings, args)
    classes = inference.check_classifier(model)
    report = export(
        model,  # pyright: ignore[reportArgumentType] -- `_check` refuses an exported one
        args.path,
        args.format,
        args.quantize,
        _load_images(paths[:: -(-len(paths) // args.max_images)], settings) if paths else None,
        image_settings=settings,
        class_names=labels_beside(args.weights, classes) if labels is None else labels,
        overwrite=args.overwrite,
    )
    print(json.dumps(report.to_dict(), indent=2) if args.json else _as_text(report))
    return FINE


def _check(args: argparse.Namespace) -> tuple[list[str] | None, list[pathlib.Path]]:
    """Checks the call as far as that costs nothing."""
    found = find_format(args.path, args.format)
    check_installed(found, args.quantize)
    check_target(args.path, found, args.overwrite)
    if args.quantize == "int8" and not args.images:
        raise ValueError(
            "--quantize int8 needs --images: some hundred images like those that the model is for, "
            "on which its ranges are measured."
        )
    if is_exported(args.weights):
        raise ValueError(
            f"{args.weights} is exported already. Give the file that it was exported from."
        )
    check_weights(args.weights, args.architecture)
    paths, unreadable = find_images(args.images or [])
    for error in unreadable:
        say(f"skipped: {error.filename} cannot be read: {error.strerror}")
    return None if args.labels is None else read_labels(args.labels), paths


def _load_images(paths: list[pathlib.Path], settings: ImageSettings) -> np.ndarray:
    options = dataclasses.asdict(settings)
    return np.stack([load_image(path, **options) for path in paths])


def _as_text(report: ExportReport) -> str:
    agreement = "-" if report.top1_agreement is None else f"{report.top1_agreement:.1%}"
    rows = [
        ("written to", str(report.path)),
        ("format", FORMATS[report.format].title),
        ("weights", report.quantize or "float32"),
        ("fused", "yes" if report.fused else "no"),
        ("size", f"{report.size_bytes / 1e6:.1f} MB"),
        ("verified on", f"{report.images} images"),
        ("largest difference", f"{report.max_difference:.2g}"),
        ("mean difference", f"{report.mean_difference:.2g} (accepted: {report.tolerance:.2g})"),
        ("same likeliest class", agreement),
    ]
    return "\n".join(aligned(rows, right=()))
