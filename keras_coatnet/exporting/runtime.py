"""What each format can do, as a class, and the formats' classes by name.

Keras is imported where a model is written: to run one takes its runtime alone.
"""

from __future__ import annotations

import abc
import importlib
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_coatnet.exporting.card import Card
from keras_coatnet.exporting.telemetry import turn_off_telemetry
from keras_coatnet.names import CLASSIFIER, HIDDEN, STEM_CONV1, STEM_CONV2

if TYPE_CHECKING:
    import keras

# From a batch of images to a batch of outputs.
Runner = Callable[[np.ndarray], np.ndarray]

# What stays float32 in a fully quantized model, by the names of operations. On networks that have
# learnt handwritten digits, the 1x1 convolutions of shortcuts cost two points of accuracy alone:
# all later blocks add to what they return. The others are small, and see the widest ranges.
FLOAT32_IN_INT8 = rf".*({STEM_CONV1}|{STEM_CONV2}|shortcut|squeeze_excite|{HIDDEN}|{CLASSIFIER}).*"


class Runtime(abc.ABC):
    """Writes, reads and runs the models of one format."""

    @abc.abstractmethod
    def write(
        self,
        model: keras.Model,
        path: pathlib.Path,
        card: Card,
        calibration: np.ndarray | None,
    ) -> None:
        """Writes a model, with its card.

        Args:
            model: a prepared model, see `preparation`, of TensorFlow's backend.
            path: the file or folder to write, which does not exist.
            card: the model's card; its field `quantize` says how to write the weights.
            calibration: images to measure ranges on; None unless `quantize` is `"int8"`.
        """

    @abc.abstractmethod
    def open(self, path: pathlib.Path, threads: int | None) -> tuple[Card, Runner]:
        """Opens a file or folder.

        Args:
            path: the file or folder.
            threads: number of threads to compute with; None: all cores.

        Returns:
            Its card, and the function that runs it.

        Raises:
            ValueError: it has no card.
            Exception: of any type, if it is damaged or of another format.
        """


_CLASSES = {
    "saved_model": "SavedModelRuntime",
    "litert": "LiteRTRuntime",
    "onnx": "ONNXRuntime",
    "openvino": "OpenVINORuntime",
}


def find_runtime(name: str) -> Runtime:
    """Returns the runtime of a format; what it needs is imported when it is used.

    Args:
        name: the format's name, as in `FORMATS`.
    """
    turn_off_telemetry()
    module = importlib.import_module(f"keras_coatnet.exporting.{name}")
    return getattr(module, _CLASSES[name])()


def read_card(text: str | bytes | None) -> Card:
    """Reads the card that was found in a file, or None if there was none.

    Args:
        text: the JSON document, or None.

    Raises:
        ValueError: there is none, or it is none that this version reads.
    """
    if text is None:
        raise ValueError("it does not say how it is used, as keras_coatnet.export writes it")
    return Card.from_json(text)


def free_batch(model: keras.Model) -> list[keras.InputSpec]:
    """Returns the signature of a model's input, with a batch of any size."""
    import keras

    spec = model.inputs[0]
    return [keras.InputSpec(dtype=spec.dtype, shape=(None, *spec.shape[1:]), name="images")]


def serving_module(model: keras.Model) -> Any:
    """Returns a `tf.Module` with a model's weights and its function `serve`, to be converted.

    Keras's `ExportArchive` would hold all weights twice, as its variables and as TensorFlow's.

    Args:
        model: a model of TensorFlow's backend.
    """
    import tensorflow as tf

    (inputs,) = model.inputs
    pixels = tf.TensorSpec((None, *inputs.shape[1:]), inputs.dtype, name="images")

    def serve(images: Any) -> Any:
        return model(images, training=False)

    module: Any = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    module.serve = tf.function(serve, [pixels], autograph=False)
    return module
