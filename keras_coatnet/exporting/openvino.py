"""OpenVINO: an `.xml` file with the graph, and a `.bin` file of the same name with the weights."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_coatnet.exporting.card import CARD, Card
from keras_coatnet.exporting.runtime import FLOAT32_IN_INT8, Runner, Runtime, free_batch, read_card

if TYPE_CHECKING:
    import keras


class OpenVINORuntime(Runtime):
    """Writes and runs with OpenVINO, and quantizes with NNCF. The card is in the `.xml` file."""

    def write(
        self,
        model: keras.Model,
        path: pathlib.Path,
        card: Card,
        calibration: np.ndarray | None,
    ) -> None:
        import openvino

        whole = path.with_name(f"whole-{path.name}")
        model.export(
            str(whole), format="openvino", verbose=False, input_signature=free_batch(model)
        )
        written = openvino.Core().read_model(whole)
        if card.quantize in ("dynamic_int8", "int8"):
            written = _quantize(written, calibration)
        written.set_rt_info(card.to_json(), [CARD])
        openvino.save_model(written, path, compress_to_fp16=card.quantize == "float16")
        del written  # it reads from the file
        for each in (whole, whole.with_suffix(".bin")):
            each.unlink()

    def open(self, path: pathlib.Path, threads: int | None) -> tuple[Card, Runner]:
        import openvino

        # By itself, OpenVINO computes in bfloat16 where the processor can.
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        core = openvino.Core()
        model = core.read_model(path)
        card = read_card(model.get_rt_info(CARD).value if model.has_rt_info(CARD) else None)
        compiled = core.compile_model(model, "CPU", options)

        def run(images: np.ndarray) -> np.ndarray:
            return compiled([images])[0]

        return card, run


# Products of two activations, and what has no weights, in OpenVINO's words: eight bits are too few
# for the logits of attention, softmax, and the mean and variance of a LayerNorm.
_NO_WEIGHTS = (
    *("Add", "Subtract", "Multiply", "Divide", "Power", "Sqrt", "SquaredDifference"),
    *("ReduceMean", "MVN", "SoftMax", "Gelu", "Swish", "Sigmoid", "AvgPool", "MaxPool"),
)
_ATTENTION = r".*attention_?\d*/MatMul.*"


def _quantize(model: Any, calibration: np.ndarray | None) -> Any:
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    if calibration is None:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    ignored = nncf.IgnoredScope(
        patterns=[FLOAT32_IN_INT8, _ATTENTION], types=list(_NO_WEIGHTS), validate=False
    )
    samples = nncf.Dataset([image[None] for image in calibration])
    # On a network that has learnt Fashion-MNIST, each of NNCF's defaults costs accuracy: half a
    # range for the first weights 0.3 points, mean ranges and corrected biases 0.9 together.
    # `model_type`, not given, would bring SmoothQuant: two points on handwritten digits.
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.DISABLE,
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        disable_bias_correction=True,
    )
    return nncf.quantize(
        model,
        samples,
        subset_size=len(calibration),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=ignored,
        advanced_parameters=advanced,
    )
