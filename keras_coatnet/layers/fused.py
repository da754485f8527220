"""The layers of a fused model, which `keras_coatnet.fuse` builds.

They replace layers of the original model, after normalizations and scales have been folded into
kernels and biases. They compute the same in fewer and larger operations, for inference only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_coatnet.layers.activations import compile_activation
from keras_coatnet.layers.attention import attention_weights, dot_product_attention
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, full_precision
from keras_coatnet.layers.pooling import halved
from keras_coatnet.layers.squeeze_excite import SqueezeExcite
from keras_coatnet.types import MapShape, Shape, Tensor


@keras.saving.register_keras_serializable(PACKAGE)
class FusedPointwiseConv2D(CompositeLayer):
    """A 1x1 convolution with bias and activation, computed as a product of two matrices.

    For inputs of rank 2, TensorFlow computes product, bias and GELU in a single operation.

    Args:
        filters: number of channels of the output.
        activation: a function of one tensor, or its name; None: none.
        strides: 1, or 2 to use every other row and column.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`, with a static height and width.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), filters)`.

    Example:
        >>> FusedPointwiseConv2D(8, strides=2)(keras.ops.ones((2, 7, 8, 3))).shape == (2, 4, 4, 8)
        True
    """

    def __init__(
        self,
        filters: int,
        activation: str | Callable | None = None,
        strides: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.activation = keras.activations.get(activation)
        self.strides = strides

    def build(self, input_shape: MapShape) -> None:
        self.product = self.build_dense(
            "product", self.filters, (None, input_shape[-1]), activation=self.activation
        )
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        if self.strides > 1:
            # A strided slice takes ten times as long on TensorFlow.
            x = ops.max_pool(x, 1, self.strides, "same", data_format="channels_last")
        _, height, width, channels = x.shape
        x = self.product(ops.reshape(x, (-1, channels)))  # (batch * height * width, filters)
        return ops.reshape(x, (-1, height, width, self.filters))

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return halved(input_shape, self.filters, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "activation": keras.activations.serialize(self.activation),
            "strides": self.strides,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class FusedActivation(keras.layers.Layer):
    """An activation after a layer that cannot apply it itself, such as a depthwise convolution.

    On TensorFlow's CPU, XLA compiles it to a single pass over the map; GELU is six otherwise.

    Args:
        activation: a function of one tensor, or its name.
        jit_compile: whether XLA compiles it on TensorFlow's CPU.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: any.

    Example:
        >>> FusedActivation("gelu")(keras.ops.zeros((2, 7, 5, 8))).shape == (2, 7, 5, 8)
        True
    """

    def __init__(self, activation: str | Callable, jit_compile: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.jit_compile = jit_compile
        self._compiled = compile_activation(self.activation) if jit_compile else self.activation

    def call(self, x: Tensor) -> Tensor:
        return self._compiled(x)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "jit_compile": self.jit_compile,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class FusedSqueezeExcite(SqueezeExcite):
    """`SqueezeExcite` with a faster mean on TensorFlow.

    Args:
        *args: `SqueezeExcite`'s own arguments.
        **kwargs: `SqueezeExcite`'s own arguments.

    Input and output shape: `(batch, height, width, channels)`, with a static height and width.

    Example:
        >>> FusedSqueezeExcite(8)(keras.ops.ones((2, 7, 7, 32))).shape == (2, 7, 7, 32)
        True
    """

    def mean(self, x: Tensor) -> Tensor:
        if keras.backend.backend() != "tensorflow":
            return super().mean(x)
        # TensorFlow's mean over two axes takes twice the time of its average pooling. The pooling
        # sums in the precision of its input. Sums of thousands of values need float32: in half
        # precision further values are lost to rounding, and float16 overflows.
        accumulator = keras.backend.result_type(x.dtype, "float32")
        pooled = ops.average_pool(
            ops.cast(x, accumulator), x.shape[1:3], data_format="channels_last"
        )  # (batch, 1, 1, channels)
        return ops.cast(ops.reshape(pooled, (-1, x.shape[-1])), x.dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class FusedAttention(CompositeLayer):
    """`RelativeSelfAttention` with q, k and v as one dense layer, and constant relative biases.

    The weights of the dense layer contain the scaling of q.

    Args:
        filters: number of channels of the output.
        num_heads: number of attention heads.
        head_dim: number of channels of one head.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`, with a static height and width.
    Output shape: `(batch, height, width, filters)`.

    Example:
        >>> FusedAttention(64, 2, 32)(keras.ops.ones((2, 7, 5, 48))).shape == (2, 7, 5, 64)
        True
    """

    def __init__(self, filters: int, num_heads: int, head_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.num_heads = num_heads
        self.head_dim = head_dim

    def build(self, input_shape: tuple[int | None, int, int, int]) -> None:
        _, height, width, channels = input_shape
        attention_dim, positions = self.num_heads * self.head_dim, height * width
        self.query_key_value = self.build_dense(
            "query_key_value", 3 * attention_dim, (None, channels)
        )
        self.bias = self.add_weight(
            name="bias",
            shape=(self.num_heads, positions, positions),
            initializer="zeros",
            trainable=False,
            dtype=full_precision(self.dtype_policy).variable_dtype,
            autocast=False,
        )
        self.projection = self.build_dense("projection", self.filters, (None, attention_dim))
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        query, key, value = self._split_heads(x)  # each (batch, positions, heads, head_dim)
        bias = ops.convert_to_tensor(self.bias)  # (heads, positions, positions)
        x = dot_product_attention(query, key, value, bias)  # (batch, positions, heads, head_dim)
        x = ops.reshape(x, (-1, self.num_heads * self.head_dim))
        x = self.projection(x)  # (batch * positions, filters)
        return ops.reshape(x, (-1, height, width, self.filters))

    def attention_weights(self, x: Tensor) -> Tensor:
        """Returns what `RelativeSelfAttention.attention_weights` does.

        Args:
            x: what the layer is called with, `(batch, height, width, channels)`.
        """
        query, key, _ = self._split_heads(x)
        return attention_weights(query, key, ops.convert_to_tensor(self.bias))

    def _split_heads(self, x: Tensor) -> Any:
        _, height, width, channels = x.shape
        tokens = ops.reshape(x, (-1, channels))  # (batch * positions, channels)
        x = self.query_key_value(tokens)  # (batch * positions, 3 * attention_dim)
        x = ops.reshape(x, (-1, height * width, 3, self.num_heads, self.head_dim))
        return ops.unstack(x, 3, axis=2)

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return (*input_shape[:-1], self.filters)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
        }
