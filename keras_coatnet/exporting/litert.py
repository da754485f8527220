"""LiteRT, once TensorFlow Lite: `.tflite` files of built-in operations only."""

from __future__ import annotations

import os
import pathlib
import zipfile
from typing import TYPE_CHECKING

import numpy as np

from keras_coatnet.exporting.card import CARD, Card
from keras_coatnet.exporting.runtime import (
    FLOAT32_IN_INT8,
    Runner,
    Runtime,
    read_card,
    serving_module,
)

if TYPE_CHECKING:
    import keras

_MEMBER = f"{CARD}.json"


class LiteRTRuntime(Runtime):
    """Writes with TensorFlow's converter and ai-edge-quantizer, runs with ai-edge-litert.

    The card is a ZIP archive at the end of the file, as the metadata of TensorFlow Lite are.
    """

    def write(
        self,
        model: keras.Model,
        path: pathlib.Path,
        card: Card,
        calibration: np.ndarray | None,
    ) -> None:
        import tensorflow as tf

        if None in model.input_shape[1:]:
            raise ValueError(
                "LiteRT needs a known height and width: with unknown ones it would need operations "
                f"of TensorFlow. The model takes {model.input_shape[1:]}. Build it with "
                "input_shape=(height, width, channels) and load the weights."
            )
        module = serving_module(model)
        # Keras's export would write a SavedModel with all weights in it twice, and read that.
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [module.serve.get_concrete_function()], module
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if card.quantize == "float16":
            converter.target_spec.supported_types = [tf.float16]
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        path.write_bytes(converter.convert())
        if card.quantize in ("dynamic_int8", "int8"):
            _quantize(path, calibration)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_MEMBER, card.to_json())

    def open(self, path: pathlib.Path, threads: int | None) -> tuple[Card, Runner]:
        from ai_edge_litert.interpreter import Interpreter

        card = read_card(_find_card(path))
        # By itself, LiteRT computes on one core.
        interpreter = Interpreter(str(path), num_threads=threads or os.cpu_count())
        (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
        shape: tuple[int, ...] = ()

        def run(images: np.ndarray) -> np.ndarray:
            nonlocal shape
            if shape != images.shape:
                interpreter.resize_tensor_input(inputs["index"], images.shape, strict=True)
                interpreter.allocate_tensors()
                shape = images.shape
            interpreter.set_tensor(inputs["index"], images.astype(inputs["dtype"]))
            interpreter.invoke()
            return interpreter.get_tensor(outputs["index"])

        return card, run


def _find_card(path: pathlib.Path) -> bytes | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.read(_MEMBER) if _MEMBER in archive.namelist() else None


# What has weights. All else stays float32 in a fully quantized model: eight bits are too few for
# the logits of attention, for softmax and for the mean and variance of a LayerNorm.
_INT8_OPERATIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def _quantize(path: pathlib.Path, calibration: np.ndarray | None) -> None:
    from ai_edge_quantizer import qtyping, quantizer, recipe

    worker = quantizer.Quantizer(str(path))
    ranges = None
    if calibration is None:
        worker.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    else:
        for operation in _INT8_OPERATIONS:
            worker.add_static_config(
                regex=".*",
                operation_name=qtyping.TFLOperationName(operation),
                activation_num_bits=8,
                weight_num_bits=8,
            )
            worker.update_quantization_recipe(
                FLOAT32_IN_INT8, qtyping.TFLOperationName(operation), None, "no_quantize"
            )
        samples = [{"images": image[None]} for image in calibration]
        ranges = worker.calibrate({"serving_default": samples})
    worker.quantize(ranges).export_model(str(path), overwrite=True)
