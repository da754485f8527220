"""The ConvNeXt block (Liu et al., 2022), as timm's CoAtNeXt has it."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import boolean, choice, number, whole_number
from keras_coatnet.layers.activations import compile_activation, get_activation
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer
from keras_coatnet.layers.layer_scale import LayerScale
from keras_coatnet.layers.pooling import POOLS, Downsample, halved
from keras_coatnet.layers.stochastic_depth import StochasticDepth
from keras_coatnet.types import MapShape, Tensor

KERNEL_SIZE = 7


@keras.saving.register_keras_serializable(PACKAGE)
class ConvNeXtBlock(CompositeLayer):
    """Computes `shortcut(x) + scale * ffn(norm(depthwise(x)))`.

    The residual branch is: depthwise 7x7 convolution to `filters`; layer normalization; dense layer
    to `expanded_filters`, activation; dense layer to `filters`; scale. If the number of channels
    grows, the depthwise convolution makes several channels out of each.

    The shortcut has a pooling if the block strides, and a dense layer if the number of channels
    changes. `CoAtNetConfig` describes the arguments.

    Args:
        filters: number of channels of the output, a multiple of the input's.
        expanded_filters: number of channels between the two dense layers; None: four times
            `filters`.
        strides: 1, or 2 to halve the feature map.
        stride_on: what halves the map: the `"depthwise"` convolution, or a `"pool"` before it.
        pool: pooling of the shortcut: `"max2"`, `"avg2"` or `"max3"`.
        stride_pool: pooling for `stride_on="pool"`.
        padding: `"same"` or `"symmetric"`: padding of a depthwise convolution of stride 2.
        activation: `"gelu_tanh"`, `"gelu"`, `"silu"` or `"relu"`.
        use_bias: whether the depthwise convolution, the dense layers and the shortcut have a bias.
        norm_epsilon: `epsilon` of the layer normalization.
        layer_scale: initial value of the scale; None: no scale.
        stochastic_depth: probability that the residual branch of a sample is dropped in training.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`; height and width may be unknown.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), filters)`.

    Raises:
        ValueError: an argument is of the wrong type or out of range, or `filters` is not a multiple
            of the input's number of channels.

    Example:
        >>> ConvNeXtBlock(64, strides=2)(keras.ops.ones((1, 14, 14, 32))).shape == (1, 7, 7, 64)
        True
    """

    def __init__(
        self,
        filters: int,
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
        self.filters = filters = whole_number("filters", filters)
        expanded_filters = 4 * filters if expanded_filters is None else expanded_filters
        self.expanded_filters = whole_number("expanded_filters", expanded_filters)
        self.strides = choice("strides", strides, (1, 2))
        self.stride_on = choice("stride_on", stride_on, ("depthwise", "pool"))
        self.pool = choice("pool", pool, POOLS)
        self.stride_pool = choice("stride_pool", stride_pool, POOLS)
        self.padding = choice("padding", padding, ("same", "symmetric"))
        self._activation = get_activation(activation)
        self.activation = activation
        self.use_bias = boolean("use_bias", use_bias)
        self.norm_epsilon = number("norm_epsilon", norm_epsilon, least=0)
        self.layer_scale = None if layer_scale is None else number("layer_scale", layer_scale)
        self.stochastic_depth = number("stochastic_depth", stochastic_depth, least=0, below=1)
        self.depthwise_strides = self.strides if self.stride_on == "depthwise" else 1
        # Symmetric padding differs from "same" only where the convolution strides.
        self.pads_symmetrically = self.depthwise_strides == 2 and self.padding == "symmetric"

    def build(self, input_shape: MapShape) -> None:
        channels = input_shape[-1]
        if self.filters % channels:
            raise ValueError(
                "The depthwise convolution of a ConvNeXt block makes a whole number of channels of "
                f"each. Received: filters={self.filters} for an input of {channels} channels. Use "
                "a multiple."
            )
        output_shape = halved(input_shape, self.filters, self.strides)
        expanded_shape = (*output_shape[:-1], self.expanded_filters)

        self.stride_pooling = None
        if self.strides == 2 and self.stride_on == "pool":
            options = self.sublayer_options("stride_pooling")
            self.stride_pooling = Downsample(self.stride_pool, **options)
        self.depthwise_conv = keras.layers.DepthwiseConv2D(
            KERNEL_SIZE,
            strides=self.depthwise_strides,
            padding="valid" if self.pads_symmetrically else "same",
            depth_multiplier=self.filters // channels,
            data_format="channels_last",
            use_bias=self.use_bias,
            depthwise_initializer=kernel_initializer(),
            **self.sublayer_options("depthwise_conv"),
        )
        self.depthwise_conv.build(self._depthwise_input_shape(input_shape))

        self.ffn_norm = keras.layers.LayerNormalization(
            epsilon=self.norm_epsilon, **self.sublayer_options("ffn_norm")
        )
        self.ffn_norm.build(output_shape)
        filters, wide, bias = self.filters, self.expanded_filters, self.use_bias
        self.ffn_expand = self.build_dense("ffn_expand", wide, output_shape, bias)
        self.ffn_project = self.build_dense("ffn_project", filters, expanded_shape, bias)
        self.ffn_scale = None
        if self.layer_scale is not None:
            self.ffn_scale = LayerScale(self.layer_scale, **self.sublayer_options("ffn_scale"))
            self.ffn_scale.build(output_shape)
        self.drop = StochasticDepth(self.stochastic_depth, **self.sublayer_options("drop"))

        self.shortcut_pooling = self.shortcut = None
        if self.strides == 2:
            options = self.sublayer_options("shortcut_pooling")
            self.shortcut_pooling = Downsample(self.pool, **options)
        if channels != self.filters:
            pooled_shape = (*output_shape[:-1], channels)
            self.shortcut = self.build_dense("shortcut", filters, pooled_shape, bias)
        self.built = True

    def _depthwise_input_shape(self, input_shape: MapShape) -> MapShape:
        if self.stride_pooling is not None:
            return halved(input_shape)
        if not self.pads_symmetrically:
            return input_shape
        batch, height, width, channels = input_shape
        pads = 2 * (KERNEL_SIZE // 2)
        return (batch, height and height + pads, width and width + pads, channels)

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        # x is (batch, height, width, channels). Comments below give the shape that a line results
        # in; h and w are the height and width after the stride.
        activation = compile_activation(self._activation) if training else self._activation

        shortcut = x
        if self.shortcut_pooling is not None:
            shortcut = self.shortcut_pooling(shortcut)  # (batch, h, w, channels)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)  # (batch, h, w, filters)

        if self.stride_pooling is not None:
            x = self.stride_pooling(x)  # (batch, h, w, channels)
        if self.pads_symmetrically:
            pad = (KERNEL_SIZE // 2, KERNEL_SIZE // 2)
            x = ops.pad(x, ((0, 0), pad, pad, (0, 0)))
        x = self.depthwise_conv(x)  # (batch, h, w, filters)
        x = self.ffn_norm(x)
        x = activation(self.ffn_expand(x))  # (batch, h, w, expanded_filters)
        x = self.ffn_project(x)  # (batch, h, w, filters)
        if self.ffn_scale is not None:
            x = self.ffn_scale(x)
        return shortcut + self.drop(x, training=training)

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return halved(input_shape, self.filters, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
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
