"""`load_exported`: a model in any of the formats, opened to be run."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from keras_coatnet.arguments import whole_number
from keras_coatnet.exporting.card import Card, as_batch
from keras_coatnet.exporting.formats import check_installed, find_format
from keras_coatnet.exporting.runtime import Runner, find_runtime
from keras_coatnet.images import ImageSettings


class ExportedModel:
    """A model that `export` wrote, run by the runtime of its format.

    Attributes:
        format: the format's name.
        name: the model's name.
        input_shape: (None, height, width, channels), where None stands for any size.
        output_shape: of a batch.
        is_logits: whether the outputs are logits; None if unknown.
        image_settings: how images are prepared for it; None if it does not take RGB images.
        class_names: the name of each class; None if it is no classifier.
        quantize: as of `export`.

    Example:
        model = load_exported("model.tflite")
        scores = model.predict(images)
    """

    def __init__(self, format: str, card: Card, run: Runner) -> None:
        self.format = format
        self.name = card.name
        self.input_shape: tuple[int | None, ...] = (None, *card.input_shape)
        self.output_shape: tuple[int | None, ...] = (None, *card.output_shape)
        self.is_logits = card.is_logits
        self.image_settings: ImageSettings | None = card.image_settings
        self.classes = card.classes
        self.quantize = card.quantize
        self._run = run

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None if self.classes is None else tuple(name for _, name in self.classes)

    def predict(self, images: Any, batch_size: int = 32) -> np.ndarray:
        """Computes the model's outputs.

        Args:
            images: (batch, height, width, channels), raw pixels, 0 to 255.
            batch_size: number of images to compute at once.

        Returns:
            (batch, ...), float32: what the Keras model returns.

        Raises:
            ValueError: `images` has another shape, or `batch_size` is below 1.
        """
        batch_size = whole_number("batch_size", batch_size)
        batch = as_batch(images, self.input_shape[1:])
        parts = [
            self.predict_on_batch(batch[start : start + batch_size])
            for start in range(0, len(batch), batch_size)
        ]
        return np.concatenate(parts)

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Computes the outputs of one batch, as `predict` does, without checks.

        Args:
            images: (batch, height, width, channels), float32.

        Returns:
            (batch, ...), float32.
        """
        return np.asarray(self._run(images), "float32")


def load_exported(path: str | os.PathLike, threads: int | None = None) -> ExportedModel:
    """Opens a model that `export` wrote.

    Args:
        path: a `.tflite`, `.onnx` or `.xml` file, or the folder of a SavedModel.
        threads: number of threads to compute with, where the runtime lets them be chosen (LiteRT,
            ONNX Runtime, OpenVINO); None: all cores.

    Returns:
        An `ExportedModel`.

    Raises:
        ValueError: there is no such file, it is damaged, or `export` did not write it.
        ImportError: what its format needs is not installed.

    Example:
        >>> load_exported("no_such_model.tflite")
        Traceback (most recent call last):
        ...
        ValueError: There is no file or folder no_such_model.tflite.
    """
    if threads is not None:
        threads = whole_number("threads", threads)
    found = find_format(path)
    file = pathlib.Path(path)
    if not file.exists():
        raise ValueError(f"There is no file or folder {file}.")
    check_installed(found, runs_only=True)
    try:
        card, run = find_runtime(found.name).open(file, threads)
        return ExportedModel(found.name, card, run)
    except Exception as error:  # each runtime has errors of its own
        raise ValueError(f"{file} cannot be opened as a {found.title} model: {error}") from error
