"""Activations by the names that configurations use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_coatnet.types import Tensor


@keras.saving.register_keras_serializable("keras_coatnet")
def gelu(x: Tensor) -> Tensor:
    """Exact GELU, `0.5 * x * (1 + erf(x / sqrt(2)))`.

    `keras.ops.gelu` uses `erfc` on TensorFlow, for which ONNX Runtime has no operator. On torch,
    where it is a single operation, `keras.ops.gelu` is used.

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
    # Pyright infers from Keras's code that `erf` may return None.
    return 0.5 * x * (1.0 + ops.erf(x * math.sqrt(0.5)))  # pyright: ignore[reportOperatorIssue]


@keras.saving.register_keras_serializable("keras_coatnet")
def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, which the authors of CoAtNet and MaxViT use.

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
    # `ops.gelu` is not used in other precisions. In float64, TensorFlow's has a float32 constant.
    # In float16, the cube of 41 overflows, and the gradient is infinity times zero. The tanh of 10
    # is 1 in both, so that clipping changes nothing.
    inner: Tensor = ops.clip(x, -10.0, 10.0)
    inner = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner * inner * inner)
    # Pyright infers from Keras's code that `tanh` may return None.
    return 0.5 * x * (1.0 + ops.tanh(inner))  # pyright: ignore[reportOperatorIssue]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": keras.activations.silu,
    "relu": keras.activations.relu,
}


def get_activation(name: str) -> Callable[[Tensor], Tensor]:
    """Returns the activation of that name.

    Args:
        name: `"gelu"` (exact), `"gelu_tanh"`, `"silu"` or `"relu"`.

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
def compile_activation(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns an activation that XLA compiles on TensorFlow's CPU, with its gradient.

    TensorFlow computes GELU by six operations. Each is a pass over the tensor, and the results are
    kept for the gradient. Together they cost more time than the convolution before them. Compiled,
    the activation is one pass and its gradient another, and only the input is kept.

    The function is returned as it is where compiling does not help: on JAX, which compiles the
    whole step; on torch, whose GELU is one operation; and if TensorFlow has a TPU, for which it
    compiles everything, or a GPU, for which XLA needs parts of CUDA that TensorFlow itself does not
    need. Tensors of float64 are not compiled either.

    Args:
        function: an elementwise activation.

    Returns:
        A function of one tensor.

    Example:
        >>> float(compile_activation(get_activation("relu"))(keras.ops.ones(())))
        1.0
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    if any(device.device_type != "CPU" for device in tf.config.list_physical_devices()):
        return function

    @functools.cache
    def compiled(dtype: Any) -> tuple[Callable, Callable]:
        # A signature of unknown shape means one trace. Without it, TensorFlow traces the function
        # again for each shape and warns about that. XLA compiles for each shape in any case.
        # TensorFlow's types lack the unknown shape.
        tensor = tf.TensorSpec(None, dtype)  # pyright: ignore[reportArgumentType]

        # Computed in float32: in bfloat16 XLA rounds after each operation, which doubles the time.
        @tf.function(input_signature=[tensor], jit_compile=True, autograph=False)
        def forward(x: Tensor) -> Tensor:
            return tf.cast(function(tf.cast(x, tf.float32)), dtype)

        @tf.function(input_signature=[tensor, tensor], jit_compile=True, autograph=False)
        def backward(x: Tensor, dy: Tensor) -> Tensor:
            full = tf.cast(x, tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(full)
                y = function(full)
            return tf.cast(tape.gradient(y, full, tf.cast(dy, tf.float32)), dtype)

        return forward, backward

    @tf.custom_gradient
    def activation(x: Tensor) -> tuple[Tensor, Callable]:
        forward, backward = compiled(x.dtype)

        def gradient(dy: Tensor) -> Tensor:
            return tf.ensure_shape(backward(x, dy), x.shape)

        return tf.ensure_shape(forward(x), x.shape), gradient

    return lambda x: function(x) if x.dtype == tf.float64 else activation(x)
