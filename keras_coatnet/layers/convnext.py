"""The ConvNeXt block (Liu et al., 2022), as timm's CoAtNeXt has it."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import boolean, choice, number, whole_number
from keras_coatnet.layers.activations import get_activation, in_one_pass
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer
from keras_coatnet.layers.layer_scale import LayerScale
from keras_coatnet.layers.pooling import POOLS, Downsample, halved
from keras_coatnet.layers.stochastic_depth import StochasticDepth

# Rows and columns of the depthwise convolution's kernel.
KERNEL = 7


@keras.saving.register_keras_serializable(PACKAGE)
class ConvNeXtBlock(CompositeLayer):
    """`shortcut(x) + scale * ffn(norm(depthwise(x)))`.

    Depthwise 7x7 to `width` -> LayerNorm -> dense to `expanded_filters` -> activation -> dense to
    `width` -> scale. Where the width grows, the depthwise convolution makes several channels of
    each. The shortcut pools where the block strides, and projects where the width changes.
    `CoAtNetConfig` says what the values other than the defaults are for.

    Args:
        width: channels of the output, a multiple of those of the input.
        expanded_filters: channels between the two dense layers; None: four times `width`.
        strides: 1, or 2 to halve the feature map.
        stride_on: `"depthwise"` or `"pool"`: what halves it.
        pool: pooling of the shortcut: `"max2"`, `"avg2"` or `"max3"`.
        stride_pool: pooling for `stride_on="pool"`.
        padding: `"same"` or `"symmetric"`, of a depthwise convolution of stride 2.
        activation: `"gelu_tanh"`, `"gelu"`, `"silu"` or `"relu"`.
        use_bias: whether the depthwise convolution, the dense layers and the shortcut have a bias.
        norm_epsilon: added to the variance.
        layer_scale: initial scale of the residual branch; None: no such scale.
        stochastic_depth: probability that a sample's residual branch is dropped in training.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`; height and width may be unknown.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), width)`.

    Raises:
        ValueError: an argument has no such value, or `width` is no multiple of the input's
            channels.

    Example:
        >>> ConvNeXtBlock(64, strides=2)(keras.ops.ones((1, 14, 14, 32))).shape == (1, 7, 7, 64)
        True
    """

    def __init__(
        self,
        width: int,
        expanded_filters: int | None = None,
        strides: int = 1,
        stride_on: str = "depthwise",
        pool: str = "avg2",
        stride_pool: str = "avg2",
        padding: str = "same",
        activation: str = "gelu",
        use_bias: bool = True,
        norm_epsilon: float = 1e-6,
        layer_scale: float | None = 1e-6,
        stochastic_depth: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.width = width = whole_number("width", width)
        expanded_filters = 4 * width if expanded_filters is None else expanded_filters
        self.expanded_filters = whole_number("expanded_filters", expanded_filters)
        self.strides = choice("strides", strides, (1, 2))
        self.stride_on = choice("stride_on", stride_on, ("depthwise", "pool"))
        self.pool = choice("pool", pool, POOLS)
        self.stride_pool = choice("stride_pool", stride_pool, POOLS)
        self.padding = choice("padding", padding, ("same", "symmetric"))
        self._activate = get_activation(activation)
        self.activation = activation
        self.use_bias = boolean("use_bias", use_bias)
        self.norm_epsilon = number("norm_epsilon", norm_epsilon, least=0)
        self.layer_scale = None if layer_scale is None else number("layer_scale", layer_scale)
        self.stochastic_depth = number("stochastic_depth", stochastic_depth, least=0, below=1)
        # Symmetric padding differs from "same" only where the convolution strides.
        self.pads = (
            self.strides == 2 and self.stride_on == "depthwise" and self.padding == "symmetric"
        )

    def build(self, input_shape: tuple) -> None:
        width_in, strided = input_shape[-1], self.strides > 1
        if self.width % width_in:
            raise ValueError(
                "The depthwise convolution of a ConvNeXt block makes a whole number of channels of "
                f"each. Received: width={self.width} for an input of {width_in} channels. Use a "
                "multiple."
            )
        map_shape = halved(input_shape, self.width, self.strides)

        self.stride_pooling = None
        if strided and self.stride_on == "pool":
            self.add_sublayer("stride_pooling", Downsample, self.stride_pool)
            conv_shape = halved(input_shape)
        elif self.pads:
            sides = (side and side + 2 * (KERNEL // 2) for side in input_shape[1:3])
            conv_shape = (input_shape[0], *sides, width_in)
        else:
            conv_shape = input_shape
        self.add_sublayer(
            "depthwise_conv",
            keras.layers.DepthwiseConv2D,
            KERNEL,
            strides=2 if strided and self.stride_on == "depthwise" else 1,
            padding="valid" if self.pads else "same",
            depth_multiplier=self.width // width_in,
            data_format="channels_last",
            use_bias=self.use_bias,
            depthwise_initializer=kernel_initializer(),
        ).build(conv_shape)

        self.add_sublayer(
            "ffn_norm", keras.layers.LayerNormalization, epsilon=self.norm_epsilon
        ).build(map_shape)
        self._add_dense("ffn_expand", self.expanded_filters).build(map_shape)
        expanded_shape = (*map_shape[:-1], self.expanded_filters)
        self._add_dense("ffn_project", self.width).build(expanded_shape)
        if self.layer_scale is not None:
            self.add_sublayer("ffn_scale", LayerScale, self.layer_scale).build(map_shape)
        self.add_sublayer("drop", StochasticDepth, self.stochastic_depth)

        self.shortcut_pooling = self.shortcut = None
        if strided:
            self.add_sublayer("shortcut_pooling", Downsample, self.pool)
        if width_in != self.width:
            self._add_dense("shortcut", self.width).build((*map_shape[:-1], width_in))
        self.built = True

    def _add_dense(self, name: str, width: int) -> keras.layers.Layer:
        return self.add_sublayer(
            name,
            keras.layers.Dense,
            width,
            use_bias=self.use_bias,
            kernel_initializer=kernel_initializer(),
        )

    def call(self, x: Any, training: bool | None = None) -> Any:
        shortcut = x
        if self.shortcut_pooling is not None:
            shortcut = self.shortcut_pooling(shortcut)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)

        if self.stride_pooling is not None:
            x = self.stride_pooling(x)
        if self.pads:
            around = (KERNEL // 2, KERNEL // 2)
            x = ops.pad(x, ((0, 0), around, around, (0, 0)))
        x = self.ffn_norm(self.depthwise_conv(x))
        activate = in_one_pass(self._activate) if training else self._activate
        x = self.ffn_project(activate(self.ffn_expand(x)))
        if self.layer_scale is not None:
            x = self.ffn_scale(x)
        return shortcut + self.drop(x, training=training)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return halved(input_shape, self.width, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "width": self.width,
            "expanded_filters": self.expanded_filters,
            "strides": self.strides,
            "stride_on": self.stride_on,
            "pool": self.pool,
            "stride_pool": self.stride_pool,
            "padding": self.padding,
            "activation": self.activation,
            "use_bias": self.use_bias,
            "norm_epsilon": self.norm_epsilon,
            "layer_scale": self.layer_scale,
            "stochastic_depth": self.stochastic_depth,
        }
