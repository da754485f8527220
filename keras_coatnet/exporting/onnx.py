"""ONNX: written by tf2onnx, checked by onnx, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_coatnet.exporting.card import CARD, Card
from keras_coatnet.exporting.formats import FORMATS
from keras_coatnet.exporting.runtime import FLOAT32_IN_INT8, Runner, Runtime, read_card

if TYPE_CHECKING:
    import keras

# The version of the operations, which decides how old a runtime may be.
OPSET = 15

# The size that a file of Protocol Buffers cannot exceed. Larger weights have a file of their own.
_MAX_BYTES = 2**31


class ONNXRuntime(Runtime):
    """Writes an `.onnx` file, with the card among its metadata, and beside it weights of 2 GB."""

    def write(
        self,
        model: keras.Model,
        path: pathlib.Path,
        card: Card,
        calibration: np.ndarray | None,
    ) -> None:
        import onnx

        is_large = 4 * model.count_params() >= _MAX_BYTES
        if is_large and card.quantize is not None:
            raise ValueError(
                f"{model.name!r} has {4 * model.count_params() / 1e9:.1f} GB of weights, and ONNX "
                "Runtime quantizes models of up to 2.1 GB. Export it without quantize=, or to "
                "OpenVINO (.xml)."
            )
        written = _convert(model)
        if card.quantize is not None:
            onnx.save(written, path)
            _quantize(path, calibration)
            written = onnx.load(path)
        onnx.helper.set_model_props(written, {CARD: card.to_json()})
        weights = FORMATS["onnx"].weights_file(path)
        assert weights is not None
        onnx.save(written, path, save_as_external_data=is_large, location=weights.name)
        del written
        if is_large:
            weights.chmod(path.stat().st_mode)  # onnx lets its owner alone read it
        onnx.checker.check_model(path, full_check=True)

    def open(self, path: pathlib.Path, threads: int | None) -> tuple[Card, Runner]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors only
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        card = read_card(session.get_modelmeta().custom_metadata_map.get(CARD))
        (inputs,) = session.get_inputs()

        def run(images: np.ndarray) -> np.ndarray:
            (outputs,) = session.run(None, {inputs.name: images})
            return np.asarray(outputs)

        return card, run


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """Has tf2onnx optimize the graph itself.

    It would copy all of it before each optimization, to go on without one that fails.
    """
    name = "TF2ONNX_CATCH_ERRORS"
    before = os.environ.get(name)
    os.environ[name] = "FALSE"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _convert(model: keras.Model) -> Any:
    """Returns a model as ONNX has it.

    tf2onnx copies constants at each of its steps, some thirty times, and frees none before its end.
    So kernels and tables are inputs to it, and become constants of its graph afterwards.

    Args:
        model: a prepared model, see `preparation`, of TensorFlow's backend.
    """
    import tensorflow as tf
    import tf2onnx

    num_trainable = len(model.trainable_variables)
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    values = [np.asarray(variable.value) for variable in variables]
    # Vectors stay constant: tf2onnx joins them with the products before them.
    kernels = {f"weight_{i}": value for i, value in enumerate(values) if value.ndim > 1}

    def serve(images: Any, *given: Any) -> Any:
        left = iter(given)
        weights = [next(left) if value.ndim > 1 else tf.constant(value) for value in values]
        trainable, others = weights[:num_trainable], weights[num_trainable:]
        return model.stateless_call(trainable, others, images, training=False)[0]

    (pixels,) = model.inputs
    signature = [
        tf.TensorSpec((None, *pixels.shape[1:]), pixels.dtype, name="images"),
        *(tf.TensorSpec(value.shape, value.dtype, name) for name, value in kernels.items()),
    ]
    with _without_copies():
        converted, _ = tf2onnx.convert.from_function(
            tf.function(serve, autograph=False), signature, opset=OPSET
        )
    _fill(converted.graph, kernels)
    return converted


# What only rearranges a kernel is done once, when it is written.
_REARRANGEMENTS = {"Transpose", "Reshape", "Squeeze", "Unsqueeze"}


def _fill(graph: Any, values: dict[str, np.ndarray]) -> None:
    """Makes inputs of an ONNX graph constants, in the form in which they are used.

    Args:
        graph: a `onnx.GraphProto`, changed in place.
        values: what each of these inputs is, by name.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    inputs = [value for value in graph.input if value.name not in values]
    constants: dict[str, Any] = {**values}
    constants.update((each.name, onnx.numpy_helper.to_array(each)) for each in graph.initializer)
    nodes = []
    for node in graph.node:
        if node.op_type in _REARRANGEMENTS and all(name in constants for name in node.input):
            fed = {name: constants[name] for name in node.input}
            (constants[node.output[0]],) = ReferenceEvaluator(node).run(None, fed)
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    constants = {name: value for name, value in constants.items() if name in used}
    for field, left in (("input", inputs), ("node", nodes)):
        graph.ClearField(field)
        getattr(graph, field).extend(left)
    graph.ClearField("initializer")
    while constants:  # one at a time: each is in memory twice
        name, value = constants.popitem()
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))


def _quantize(path: pathlib.Path, calibration: np.ndarray | None) -> None:
    import onnx
    from onnxruntime import quantization

    prepared = path.with_name(f"prepared-{path.name}")
    quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    names = [node.name for node in onnx.load(prepared).graph.node]
    excluded = [name for name in names if re.fullmatch(FLOAT32_IN_INT8, name)]
    # Products of two activations, those of attention, stay float32.
    options = {"MatMulConstBOnly": True}

    class Images(quantization.CalibrationDataReader):
        """Gives the quantizer one image at a time."""

        def __init__(self) -> None:
            self._left = iter(() if calibration is None else calibration[:, None])

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride] -- None ends it, which the base class does not say
            image = next(self._left, None)
            return None if image is None else {"images": image}

    if calibration is None:
        # In a fused network nearly all weights are those of products.
        quantization.quantize_dynamic(
            prepared,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=excluded,
            per_channel=True,
            extra_options=options,
        )
    else:
        quantization.quantize_static(
            prepared,
            path,
            Images(),
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=excluded,
            per_channel=True,
            extra_options=options,
        )
    prepared.unlink()
