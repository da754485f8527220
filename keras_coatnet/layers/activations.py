"""Activations by the names that configurations use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_coatnet")
def gelu(x: Any) -> Any:
    """GELU by the error function, `0.5 * x * (1 + erf(x / sqrt(2)))`.

    Keras's own goes through `erfc` on TensorFlow, which ONNX Runtime has no operator for. On torch
    it is torch's, one operation instead of five.

    Args:
        x: a float tensor of any shape.

    Returns:
        A tensor like `x`.

    Example:
        >>> float(gelu(0.0))
        0.0
    """
    x = ops.convert_to_tensor(x)
    if keras.backend.backend() == "torch":
        return ops.gelu(x, approximate=False)
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
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"There is no activation {name!r}. Use one of {', '.join(map(repr, ACTIVATIONS))}."
        )
    return ACTIVATIONS[name]


@functools.cache
def in_one_pass(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same activation as one loop over its input, and one for its gradient.

    TensorFlow runs a GELU as six passes over a map, which cost more than the product before them,
    and keeps what is in between for the gradient; compiled by XLA it is one pass that keeps its
    input. It is as it is for float64; on JAX, which compiles the whole step, and torch, which has
    a GELU of one pass; and where TensorFlow has another device than CPUs: for a TPU everything is
    compiled, and for a GPU the compiler needs parts of CUDA that TensorFlow runs without.

    Args:
        function: an activation, element by element.

    Returns:
        A function of one tensor.

    Example:
        >>> float(in_one_pass(get_activation("relu"))(keras.ops.ones(())))
        1.0
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    if any(device.device_type != "CPU" for device in tf.config.list_physical_devices()):
        return function

    @functools.cache
    def compiled(dtype: Any) -> tuple[Callable, Callable]:
        # One trace for maps of all sizes: TensorFlow warns of a function that it traces for each,
        # and XLA compiles it for each anyway.
        tensor = tf.TensorSpec(None, dtype)

        # In bfloat16 XLA's loops round after each operation, which doubles their time.
        @tf.function(input_signature=[tensor], jit_compile=True, autograph=False)
        def forward(x: Any) -> Any:
            return tf.cast(function(tf.cast(x, tf.float32)), dtype)

        @tf.function(input_signature=[tensor, tensor], jit_compile=True, autograph=False)
        def backward(x: Any, dy: Any) -> Any:
            full = tf.cast(x, tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(full)
                y = function(full)
            return tf.cast(tape.gradient(y, full, tf.cast(dy, tf.float32)), dtype)

        return forward, backward

    @tf.custom_gradient
    def activate(x: Any) -> tuple[Any, Callable]:
        forward, backward = compiled(x.dtype)
        return tf.ensure_shape(forward(x), x.shape), lambda dy: tf.ensure_shape(
            backward(x, dy), x.shape
        )

    return lambda x: function(x) if x.dtype == tf.float64 else activate(x)
