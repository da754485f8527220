"""Layers of a fused model: what is left when norms and scales are folded away.

They compute the same as the layers they stand for, in fewer and larger operations. They are for
inference only; `keras_coatnet.fuse` fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_coatnet.layers.activations import in_one_pass
from keras_coatnet.layers.attention import attend
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, full_precision
from keras_coatnet.layers.pooling import halved
from keras_coatnet.layers.squeeze_excite import SqueezeExcite


@keras.saving.register_keras_serializable(PACKAGE)
class Pointwise(CompositeLayer):
    """A 1x1 convolution as one matrix product, with its bias and activation.

    On a matrix of two axes TensorFlow's runtime computes product, bias and GELU in one go.

    Args:
        width: channels after it.
        activation: a function of one tensor, or its name; None: none.
        strides: 1, or 2 for every other row and column.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`, with a static height and width.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), width)`.

    Example:
        >>> Pointwise(8, strides=2)(keras.ops.ones((2, 7, 8, 3))).shape == (2, 4, 4, 8)
        True
    """

    def __init__(
        self,
        width: int,
        activation: str | Callable | None = None,
        strides: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.activation = keras.activations.get(activation)
        self.strides = strides

    def build(self, input_shape: tuple) -> None:
        self.add_sublayer("product", keras.layers.Dense, self.width, self.activation)
        self.product.build((None, input_shape[-1]))
        self.built = True

    def call(self, x: Any) -> Any:
        if self.strides > 1:
            # As a strided slice this takes ten times as long on TensorFlow.
            x = ops.max_pool(x, 1, self.strides, "same", data_format="channels_last")
        shape = (-1, *x.shape[1:3], self.width)
        return ops.reshape(self.product(ops.reshape(x, (-1, x.shape[-1]))), shape)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return halved(input_shape, self.width, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "width": self.width,
            "activation": keras.activations.serialize(self.activation),
            "strides": self.strides,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class LoneActivation(keras.layers.Layer):
    """An activation with no product before it that could take it along.

    On TensorFlow's CPU XLA makes one pass over the map of it, where it would be six.

    Args:
        activation: a function of one tensor, or its name.
        jit_compile: whether XLA compiles it there.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: any.

    Example:
        >>> LoneActivation("gelu")(keras.ops.zeros((2, 7, 5, 8))).shape == (2, 7, 5, 8)
        True
    """

    def __init__(self, activation: str | Callable, jit_compile: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.jit_compile = jit_compile
        self._activate = in_one_pass(self.activation) if jit_compile else self.activation

    def call(self, x: Any) -> Any:
        return self._activate(x)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "jit_compile": self.jit_compile,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class FusedSqueezeExcite(SqueezeExcite):
    """Squeeze-and-excitation whose mean is the faster of two; arguments as `SqueezeExcite`'s.

    Input and output shape: `(batch, height, width, channels)`, with a static height and width.

    Example:
        >>> FusedSqueezeExcite(8)(keras.ops.ones((2, 7, 7, 32))).shape == (2, 7, 7, 32)
        True
    """

    def mean(self, x: Any) -> Any:
        if keras.backend.backend() != "tensorflow":
            return super().mean(x)
        # TensorFlow's mean over two axes takes twice the time of its pooling. In half precision its
        # pooling may add up thousands of values in that precision, where each is soon below the
        # sum's rounding, and a float16 sum overflows.
        accumulator = keras.backend.result_type(x.dtype, "float32")
        pooled = ops.average_pool(
            ops.cast(x, accumulator), x.shape[1:3], data_format="channels_last"
        )
        return ops.cast(ops.reshape(pooled, (-1, x.shape[-1])), x.dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class FusedAttention(CompositeLayer):
    """Relative self-attention with q, k and v in one product, and its bias as a constant.

    The scaling of q is part of that product.

    Args:
        width: channels after it.
        heads: how many.
        head_dim: channels of one head.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`, with a static height and width.
    Output shape: `(batch, height, width, width)`.

    Example:
        >>> FusedAttention(64, 2, 32)(keras.ops.ones((2, 7, 5, 48))).shape == (2, 7, 5, 64)
        True
    """

    def __init__(self, width: int, heads: int, head_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.heads = heads
        self.head_dim = head_dim

    def build(self, input_shape: tuple) -> None:
        inner = self.heads * self.head_dim
        self.add_sublayer("query_key_value", keras.layers.Dense, 3 * inner)
        self.query_key_value.build((None, input_shape[-1]))
        positions = input_shape[1] * input_shape[2]
        self.bias = self.add_weight(
            name="bias",
            shape=(self.heads, positions, positions),
            initializer="zeros",
            trainable=False,
            dtype=full_precision(self.dtype_policy).variable_dtype,
            autocast=False,
        )
        self.add_sublayer("projection", keras.layers.Dense, self.width)
        self.projection.build((None, inner))
        self.built = True

    def call(self, x: Any) -> Any:
        height, width = x.shape[1:3]
        both = self.query_key_value(ops.reshape(x, (-1, x.shape[-1])))
        both = ops.reshape(both, (-1, height * width, 3, self.heads, self.head_dim))
        query, key, value = ops.unstack(both, 3, axis=2)
        mixed = attend(query, key, value, ops.convert_to_tensor(self.bias))
        mixed = self.projection(ops.reshape(mixed, (-1, self.heads * self.head_dim)))
        return ops.reshape(mixed, (-1, height, width, self.width))

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (*input_shape[:-1], self.width)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "width": self.width,
            "heads": self.heads,
            "head_dim": self.head_dim,
        }
