"""`export`: a model written in another format, and verified in the runtime of that format."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_coatnet.arguments import boolean, choice, number
from keras_coatnet.exporting.card import Card, as_batch
from keras_coatnet.exporting.conversion import Task, convert
from keras_coatnet.exporting.formats import (
    QUANTIZATIONS,
    Format,
    check_installed,
    check_target,
    find_format,
)
from keras_coatnet.exporting.preparation import computes_in_int8, float32_policy, prepare
from keras_coatnet.exporting.runtime import Runner, find_runtime
from keras_coatnet.images import ImageSettings
from keras_coatnet.labels import name_classes
from keras_coatnet.model_graph import default_settings, gives_logits

# The difference that is accepted, as a share of the largest output, by quantization. It is that of
# the mean image, because eight bits can change the class of one that lies between two.
TOLERANCES = {None: 1e-3, "float16": 0.02, "dynamic_int8": 0.1, "int8": 0.2}

# Images that are made to verify a model on, where none are given.
_MADE = 8

# Batches that the verification is done in.
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export` wrote and measured.

    Attributes:
        path: the file or folder.
        format: the format's name.
        quantize: the quantization.
        fused: whether a CoAtNet in it was fused.
        images: number of images that it was verified on.
        max_difference: the largest difference of an output from Keras's, in float32.
        mean_difference: the mean over the images of each one's largest.
        tolerance: the largest mean that would have been accepted.
        top1_agreement: share of the images whose likeliest class is the same; None if the model is
            no classifier.
        size_bytes: size on the disk, with all files.
    """

    path: pathlib.Path
    format: str
    quantize: str | None
    fused: bool
    images: int
    max_difference: float
    mean_difference: float
    tolerance: float
    top1_agreement: float | None
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary that JSON can hold."""
        return {**dataclasses.asdict(self), "path": os.fspath(self.path)}


def export(
    model: keras.Model,
    path: str | os.PathLike,
    format: str | None = None,
    quantize: str | None = None,
    images: Any = None,
    *,
    image_settings: ImageSettings | None = None,
    class_names: Sequence[str] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> ExportReport:
    """Writes a model as a SavedModel or for LiteRT, ONNX Runtime or OpenVINO, and verifies it.

    The exported model takes raw pixels, 0 to 255, and computes in float32, whatever policy `model`
    has. It takes batches of any size, and images of any size if `model` does. CoAtNets inside are
    fused where that is faster in the format's runtime. Before anything stands at `path`, the model
    is run in that runtime and compared with Keras.

    A SavedModel has two endpoints, which TensorFlow and TensorFlow Serving run without Keras:
    `serve` takes pixels. `serve_images` takes the bytes of JPEG, PNG, GIF, BMP or WebP files, and
    returns `classes`, `labels` and `probabilities` of the five likeliest classes; as everywhere in
    this package, the orientation in EXIF tags is ignored.

    Args:
        model: a CoAtNet, fused or not, or a model of one input and output that contains some.
        path: a file ending in `.tflite`, `.onnx` or `.xml`, or a folder.
        format: `"saved_model"`, `"litert"`, `"onnx"` or `"openvino"`; None: as `path` ends.
        quantize: how weights are stored: None: float32; `"float16"`: half the size, computed in
            float32 (LiteRT, OpenVINO); `"dynamic_int8"`: a quarter of the size, activations
            quantized as they come (LiteRT, ONNX, OpenVINO); `"int8"`: weights and activations, by
            ranges measured on `images` (LiteRT, ONNX, OpenVINO).
        images: (batch, height, width, channels), raw pixels like those that the model is for: what
            it is verified on, and what the ranges of `"int8"` are measured on, for which 100 are
            enough. None: images of random patterns.
        image_settings: how image files are prepared for the model; None: its input size and the
            defaults. It travels in the file, for `load_exported` and the command line.
        class_names: the name of each output; None: ImageNet's, if there are 1000 or 11821, else
            numbers. They travel in the file.
        tolerance: the largest difference that is accepted, in the mean of all images, as a share of
            the largest output. None: 0.001 in float32, 0.02 for float16, 0.1 for dynamic_int8 and
            for a model that Keras quantized to int8, 0.2 for int8.
        overwrite: whether an existing file or folder is replaced.
        verbose: whether each step is announced on the error stream.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: an argument is out of its range, the path exists, the model cannot be written in
            the format, or the difference is above the tolerance. Nothing is written then.
        ImportError: what the format needs is not installed.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> report = export(model, folder / "model.tflite", verbose=False)
        >>> report.max_difference < 1e-5
        True
    """
    found = find_format(path, format)
    quantize = choice("quantize", quantize, QUANTIZATIONS)
    check_installed(found, quantize)
    overwrite, verbose = boolean("overwrite", overwrite), boolean("verbose", verbose)
    target = pathlib.Path(path).absolute()
    check_target(target, found, overwrite)
    shape = _input_shape(model)
    if tolerance is None:
        # Where Keras rounds activations to eight bits, the last bit of one may make a step of them.
        rounds = quantize is None and computes_in_int8(model)
        tolerance = TOLERANCES["dynamic_int8" if rounds else quantize]
    tolerance = number("tolerance", tolerance, above=0)
    if found.name in ("litert", "openvino") and computes_in_int8(model):
        # LiteRT's converter refuses their products; in OpenVINO they come out wrong.
        raise ValueError(
            f"{model.name!r} was quantized to int8 by Keras, whose products of int8 {found.title} "
            "does not have. Export the model as it was before, with quantize='int8', or this one "
            "to ONNX or a SavedModel."
        )
    if images is None and quantize == "int8":
        raise ValueError(
            "quantize='int8' needs `images`, on which the ranges of activations are measured: some "
            "100 images, as raw pixels, like those that the model is for."
        )
    card = _card(model, image_settings, class_names, quantize)
    given = images is not None
    batch = _check_images(images, shape) if given else _make_images(card)

    def announce(step: str) -> None:
        if verbose:
            print(f"{found.title}: {step}", file=sys.stderr, flush=True)

    with _beside(target) as folder, float32_policy():
        announce("computing the outputs of Keras")
        prepared = prepare(model)
        expected = _run_in_batches(prepared.predict_on_batch, batch)
        partial = folder / target.name
        announce("converting")
        calibration = batch if quantize == "int8" else None
        is_fused = convert(prepared, Task(found.name, partial, card, calibration))
        announce(f"verifying on {len(batch)} {'images' if given else 'random patterns'}")
        _, run = find_runtime(found.name).open(partial, None)
        outputs = _run_in_batches(run, batch)
        differences = np.abs(outputs - expected).reshape(len(batch), -1).max(axis=1)
        largest = float(np.abs(expected).max())
        agreement = None
        if card.classes is not None:
            agreement = float((outputs.argmax(1) == expected.argmax(1)).mean())
        report = ExportReport(
            target,
            found.name,
            quantize,
            is_fused,
            len(batch),
            float(differences.max()),
            float(differences.mean()),
            tolerance * largest,
            agreement,
            _size(folder),
        )
        if not report.mean_difference <= report.tolerance:  # also where it is not a number
            raise ValueError(
                f"The {found.title} model differs from Keras by {report.mean_difference:.3g} in "
                f"the mean of {len(batch)} images, where the largest output is {largest:.3g}. At "
                f"most {report.tolerance:.3g} is accepted. Nothing was written. Quantize "
                "less, give images like those that the model is for, or a larger tolerance="
            )
        _move(partial, target, found)
    announce(f"wrote {target}")
    return report


# --- Checks ------------------------------------------------------------------------------------


def _input_shape(model: Any) -> tuple[int | None, ...]:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: {type(model).__name__}")
    shape, outputs = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 4) or not isinstance(outputs, tuple):
        raise ValueError(
            "The model must have one input, (batch, height, width, channels), and one output. Its "
            f"input is {shape}, and its output {outputs}."
        )
    return shape[1:]


def _card(
    model: keras.Model,
    settings: ImageSettings | None,
    class_names: Sequence[str] | None,
    quantize: str | None,
) -> Card:
    shape, outputs = model.input_shape[1:], model.output_shape[1:]
    is_classifier = len(outputs) == 1 and outputs[0] is not None
    if settings is None:
        settings = default_settings(model) if shape[-1] == 3 else None
    elif not isinstance(settings, ImageSettings):
        raise ValueError(f"`image_settings` must be ImageSettings. Received: {settings!r:.100}")
    elif any(
        side not in (None, asked)
        for side, asked in zip(shape[:2], settings.height_and_width, strict=True)
    ):
        raise ValueError(
            f"`image_settings` are for images of {settings.height_and_width}, and the model takes "
            f"{shape[:2]}."
        )
    classes = None
    if is_classifier:
        names = None if class_names is None else [str(name) for name in class_names]
        classes = tuple(name_classes(outputs[0], names, "class_names"))
    elif class_names is not None:
        raise ValueError(f"The model is no classifier, its output is {outputs}: no `class_names`.")
    is_logits = gives_logits(model) if is_classifier else None
    return Card(model.name, shape, outputs, is_logits, settings, classes, quantize)


def _check_images(images: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    batch = as_batch(keras.ops.convert_to_numpy(images), shape)
    are_finite = np.isfinite(batch).all(axis=(1, 2, 3))
    if not are_finite.all():
        raise ValueError(
            f"`images` must be finite raw pixels. Received: {np.count_nonzero(~are_finite)} of "
            f"{len(batch)} images with other values. Leave them out."
        )
    return batch


def _make_images(card: Card) -> np.ndarray:
    """Random patterns of large and small spots, in all brightnesses."""
    height, width, channels = card.input_shape
    assert channels is not None  # no convolution can be built without
    if card.image_settings is not None:
        height, width = card.image_settings.height_and_width
    height, width = height or 224, width or 224
    generator = np.random.default_rng(0)
    total = np.zeros((_MADE, height, width, channels))
    for cells in (2, 8, 32):
        spots = generator.uniform(-1, 1, (_MADE, cells, cells, channels))
        rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
        total += spots[:, rows][:, :, columns]
    return np.clip(127.5 + 64 * total, 0, 255).round().astype("float32")


# --- Measures ----------------------------------------------------------------------------------


def _run_in_batches(run: Runner, batch: np.ndarray) -> np.ndarray:
    """Runs the first image alone, and the others in batches."""
    parts = [batch[:1], *(batch[start : start + _BATCH] for start in range(1, len(batch), _BATCH))]
    return np.concatenate([np.asarray(run(part), "float32") for part in parts])


def _size(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- Files -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder on the same disk, which is gone at the end."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(partial: pathlib.Path, target: pathlib.Path, found: Format) -> None:
    """Puts a whole model in its place. A process that is killed meanwhile leaves no mixed one."""
    weights, old = found.weights_file(partial), found.weights_file(target)
    if not found.suffix and target.exists():
        os.replace(target, partial.with_name("replaced"))
    if weights is not None and old is not None and weights.exists():
        target.unlink(missing_ok=True)  # the weights are of no use without the graph
        os.replace(weights, old)
        old = None
    os.replace(partial, target)
    if old is not None:
        old.unlink(missing_ok=True)  # those of the model that was replaced
