"""Activations by the names that configurations use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_coatnet")
def gelu(x: Any) -> Any:
    """GELU by the error function, `0.5 * x * (1 + erf(x / sqrt(2)))`.

    Keras's own goes through `erfc` on TensorFlow, which ONNX Runtime has no operator for.

    Args:
        x: a float tensor of any shape.

    Returns:
        A tensor like `x`.

    Example:
        >>> float(gelu(0.0))
        0.0
    """
    x = ops.convert_to_tensor(x)
    return 0.5 * x * (1.0 + ops.erf(x * math.sqrt(0.5)))


@keras.saving.register_keras_serializable("keras_coatnet")
def gelu_tanh(x: Any) -> Any:
    """GELU by its tanh approximation, as MaxViT's and CoAtNet's own code has it.

    Args:
        x: a float tensor of any shape.

    Returns:
        A tensor like `x`.

    Example:
        >>> float(gelu_tanh(0.0))
        0.0
    """
    x = ops.convert_to_tensor(x)
    if keras.backend.standardize_dtype(x.dtype) in ("float32", "bfloat16"):
        return ops.gelu(x, approximate=True)
    # In float64 TensorFlow's has a constant of float32. In float16 the cube of 41 is beyond range,
    # and the slope becomes infinity times zero; tanh is 1 long before.
    inner = ops.clip(x, -10.0, 10.0)
    inner = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner * inner * inner)
    return 0.5 * x * (1.0 + ops.tanh(inner))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": keras.activations.silu,
    "relu": keras.activations.relu,
}


def get_activation(name: str) -> Callable[[Any], Any]:
    """Returns the activation of that name.

    Args:
        name: `"gelu"` (by erf), `"gelu_tanh"`, `"silu"` or `"relu"`.

    Returns:
        A function of one tensor.

    Raises:
        ValueError: there is no activation of that name.

    Example:
        >>> float(get_activation("relu")(-1.0))
        0.0
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"There is no activation {name!r}. Use one of {', '.join(map(repr, ACTIVATIONS))}."
        )
    return ACTIVATIONS[name]
