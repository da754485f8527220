"""What the contenders of `keras-coatnet benchmark` run, each in a process of its own.

An exported model is run without Keras, as by those who serve it: its memory is that of its runtime.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_coatnet.benchmarking.process import serve
from keras_coatnet.exporting.runtime import find_runtime
from keras_coatnet.exporting.telemetry import turn_off_telemetry

# The side of the square matrices whose product is timed, and the operations of the product.
_SIDE = 2048
PRODUCT_OPERATIONS = 2 * _SIDE**3

# Who computes the product, and the modules that each needs.
PRODUCT_LIBRARIES = {
    "TensorFlow": ("tensorflow",),
    "NumPy": ("numpy",),
    "torch": ("torch",),
    "ONNX Runtime": ("onnx", "onnxruntime"),
}

# Starts a contender before Keras is imported: those that need it import it themselves.
_START = (
    "import sys, keras_coatnet_command; keras_coatnet_command.defer_package(); "
    "from keras_coatnet.benchmarking.worker import main; main(*sys.argv[1:])"
)


def installed_libraries() -> list[str]:
    """Returns those of `PRODUCT_LIBRARIES` that are installed."""
    return [
        library
        for library, modules in PRODUCT_LIBRARIES.items()
        if all(importlib.util.find_spec(module) for module in modules)
    ]


def command(kind: str, *arguments: str) -> list[str]:
    """Returns the command of a contender.

    Args:
        kind: `"product"`, `"exported"` or `"keras"`.
        *arguments: those of `matrix_product`, `run_exported` or `run_keras`.
    """
    # -P: what lies in the current folder is not imported.
    return [sys.executable, "-P", "-c", _START, kind, *arguments]


def environment() -> dict[str, str]:
    """Returns the variables of a contender: it finds what this process finds, and uses no GPU."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
    }


def main(kind: str, *arguments: str) -> None:
    """Runs a contender.

    Args:
        kind: as of `command`.
        *arguments: as of `command`.
    """
    make = {"product": matrix_product, "exported": run_exported, "keras": run_keras}[kind]
    serve(lambda: make(*arguments))


def matrix_product(library: str) -> Callable[[], object]:
    """Returns the product of two large float32 matrices: what a machine reaches at best.

    Args:
        library: one of `PRODUCT_LIBRARIES`.
    """
    shape = (_SIDE, _SIDE)
    a, b = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    if library == "NumPy":
        return lambda: np.matmul(a, b)
    if library == "TensorFlow":
        import tensorflow as tf

        x, y = tf.constant(a), tf.constant(b)
        function = tf.function(lambda: tf.matmul(x, y))
        return lambda: function().numpy()
    if library == "torch":
        import torch

        p, q = torch.from_numpy(a), torch.from_numpy(b)
        return lambda: torch.matmul(p, q)
    turn_off_telemetry()
    import onnx
    import onnxruntime

    names = "a", "b", "c"
    kind = onnx.TensorProto.FLOAT
    *inputs, output = (onnx.helper.make_tensor_value_info(name, kind, shape) for name in names)
    node = onnx.helper.make_node("MatMul", names[:2], names[2:])
    graph = onnx.helper.make_graph([node], "product", inputs, [output])
    opset = [onnx.helper.make_opsetid("", 15)]
    # Of a version that ONNX Runtime knows, which is not always onnx's newest.
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda: session.run(None, {"a": a, "b": b})


def run_exported(format: str, path: str) -> Callable[[int], object]:
    """Returns the run of an exported model on a batch of a given size.

    Args:
        format: the format's name.
        path: the file or folder.
    """
    card, run = find_runtime(format).open(pathlib.Path(path), None)
    return _on_batches(run, card.input_shape)


def run_keras(path: str, fused: str) -> Callable[[int], object]:
    """Returns the run of a Keras model on a batch of a given size.

    Args:
        path: a `.keras` file.
        fused: `"yes"` or `"no"`.
    """
    import keras

    from keras_coatnet import fuse

    model: Any = keras.saving.load_model(path, compile=False)
    model = fuse(model) if fused == "yes" else model
    return _on_batches(model.predict_on_batch, model.input_shape[1:])


def _on_batches(
    run: Callable[[np.ndarray], object], shape: tuple[int | None, ...]
) -> Callable[[int], object]:
    batches: dict[int, np.ndarray] = {}
    image = [side for side in shape if side is not None]  # all of them are known here

    def run_batch(size: int = 1) -> object:
        if size not in batches:
            batches[size] = 255 * np.random.default_rng(0).random((size, *image), "float32")
        return run(batches[size])

    return run_batch
