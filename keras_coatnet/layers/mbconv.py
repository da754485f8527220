"""MBConv, the inverted bottleneck with depthwise convolution, in its pre-norm form."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import boolean, choice, number, whole_number
from keras_coatnet.layers.activations import get_activation, in_one_pass
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer
from keras_coatnet.layers.normalization import BatchNormalization, batch_norm_options
from keras_coatnet.layers.pooling import POOLS, Downsample, halved
from keras_coatnet.layers.squeeze_excite import SqueezeExcite
from keras_coatnet.layers.stochastic_depth import StochasticDepth


@keras.saving.register_keras_serializable(PACKAGE)
class MBConv(CompositeLayer):
    """`shortcut(x) + conv(depthwise(conv(norm(x))))` (equations 4 and 5 of the paper).

    norm -> 1x1 to `expanded_filters` -> norm, activation -> depthwise 3x3 -> norm, activation ->
    squeeze-and-excitation -> 1x1 to `width`. The shortcut pools where the block strides, and
    projects where the width changes. The defaults are the paper's; `CoAtNetConfig` says what the
    other values are for.

    Args:
        width: channels of the output.
        expanded_filters: channels of the depthwise convolution; None: four times `width`.
        squeezed_filters: channels inside squeeze-and-excitation; None: a quarter of `width`.
        strides: 1, or 2 to halve the feature map.
        stride_on: `"expansion"`, `"depthwise"` or `"pool"`: what halves it.
        pool: pooling of the shortcut: `"max2"`, `"avg2"` or `"max3"`.
        stride_pool: pooling for `stride_on="pool"`.
        padding: `"same"` or `"symmetric"`, of a depthwise convolution of stride 2.
        activation: `"gelu_tanh"`, `"gelu"`, `"silu"` or `"relu"`.
        prenorm_activation: whether the activation also follows the first norm.
        squeeze_activation: activation inside squeeze-and-excitation.
        squeeze_place: `"after_norm"` of the depthwise convolution, or `"before_norm"`.
        use_bias: whether the last 1x1 and the shortcut's have a bias.
        batch_norm_epsilon: added to the variance.
        batch_norm_momentum: of the moving statistics.
        stochastic_depth: probability that a sample's residual branch is dropped in training.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), width)`.

    Raises:
        ValueError: an argument has no such value.

    Example:
        >>> MBConv(64, strides=2)(keras.ops.ones((1, 14, 14, 32))).shape == (1, 7, 7, 64)
        True
    """

    def __init__(
        self,
        width: int,
        expanded_filters: int | None = None,
        squeezed_filters: int | None = None,
        strides: int = 1,
        stride_on: str = "expansion",
        pool: str = "max2",
        stride_pool: str = "avg2",
        padding: str = "same",
        activation: str = "gelu_tanh",
        prenorm_activation: bool = False,
        squeeze_activation: str = "silu",
        squeeze_place: str = "after_norm",
        use_bias: bool = True,
        batch_norm_epsilon: float = 1e-3,
        batch_norm_momentum: float = 0.99,
        stochastic_depth: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.width = width = whole_number("width", width)
        expanded_filters = 4 * width if expanded_filters is None else expanded_filters
        squeezed_filters = max(1, width // 4) if squeezed_filters is None else squeezed_filters
        self.expanded_filters = whole_number("expanded_filters", expanded_filters)
        self.squeezed_filters = whole_number("squeezed_filters", squeezed_filters)
        self.strides = choice("strides", strides, (1, 2))
        self.stride_on = choice("stride_on", stride_on, ("expansion", "depthwise", "pool"))
        self.pool = choice("pool", pool, POOLS)
        self.stride_pool = choice("stride_pool", stride_pool, POOLS)
        self.padding = choice("padding", padding, ("same", "symmetric"))
        self._activate = get_activation(activation)
        self.activation = activation
        self.prenorm_activation = boolean("prenorm_activation", prenorm_activation)
        get_activation(squeeze_activation)
        self.squeeze_activation = squeeze_activation
        self.squeeze_place = choice("squeeze_place", squeeze_place, ("after_norm", "before_norm"))
        self.use_bias = boolean("use_bias", use_bias)
        self.batch_norm_epsilon = number("batch_norm_epsilon", batch_norm_epsilon, least=0)
        self.batch_norm_momentum = number(
            "batch_norm_momentum", batch_norm_momentum, least=0, most=1
        )
        self.stochastic_depth = number("stochastic_depth", stochastic_depth, least=0, below=1)
        # Symmetric padding differs from "same" only where a 3x3 convolution strides.
        self.pads = (
            self.strides == 2 and self.stride_on == "depthwise" and self.padding == "symmetric"
        )

    def build(self, input_shape: tuple) -> None:
        norm = batch_norm_options(self.batch_norm_epsilon, self.batch_norm_momentum)
        strided = self.strides > 1
        shape = input_shape

        self.add_sublayer("input_norm", BatchNormalization, **norm).build(shape)
        if strided and self.stride_on == "pool":
            self.add_sublayer("stride_pooling", Downsample, self.stride_pool)
            shape = halved(shape)

        strides = 2 if strided and self.stride_on == "expansion" else 1
        self._add_conv("expand", self.expanded_filters, strides=strides, use_bias=False).build(
            shape
        )
        shape = halved(shape, self.expanded_filters, strides)
        self.add_sublayer("expand_norm", BatchNormalization, **norm).build(shape)

        strides = 2 if strided and self.stride_on == "depthwise" else 1
        self.add_sublayer(
            "depthwise",
            keras.layers.DepthwiseConv2D,
            3,
            strides=strides,
            padding="valid" if self.pads else "same",
            data_format="channels_last",
            use_bias=False,
            depthwise_initializer=kernel_initializer(),
        ).build(shape)
        shape = halved(shape, strides=strides)
        self.add_sublayer("depthwise_norm", BatchNormalization, **norm).build(shape)

        self.add_sublayer(
            "squeeze_excite", SqueezeExcite, self.squeezed_filters, self.squeeze_activation
        ).build(shape)
        self._add_conv("project", self.width, use_bias=self.use_bias).build(shape)
        self.add_sublayer("drop", StochasticDepth, self.stochastic_depth)

        self.shortcut_pooling = self.shortcut = None
        if strided:
            self.add_sublayer("shortcut_pooling", Downsample, self.pool)
        if input_shape[-1] != self.width:
            self._add_conv("shortcut", self.width, use_bias=self.use_bias).build(
                halved(input_shape, strides=self.strides)
            )
        self.built = True

    def _add_conv(self, name: str, width: int, **options: Any) -> keras.layers.Layer:
        return self.add_sublayer(
            name,
            keras.layers.Conv2D,
            width,
            1,
            data_format="channels_last",
            kernel_initializer=kernel_initializer(),
            **options,
        )

    def call(self, x: Any, training: bool | None = None) -> Any:
        shortcut = x
        if self.shortcut_pooling is not None:
            shortcut = self.shortcut_pooling(shortcut)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)

        activate = in_one_pass(self._activate) if training else self._activate
        x = self.input_norm(x, training=training)
        if self.prenorm_activation:
            x = activate(x)
        if self.strides > 1 and self.stride_on == "pool":
            x = self.stride_pooling(x)
        x = activate(self.expand_norm(self.expand(x), training=training))
        if self.pads:
            x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = self.depthwise(x)
        if self.squeeze_place == "before_norm":
            x = self.squeeze_excite(x)
        x = activate(self.depthwise_norm(x, training=training))
        if self.squeeze_place == "after_norm":
            x = self.squeeze_excite(x)
        return shortcut + self.drop(self.project(x), training=training)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return halved(input_shape, self.width, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "width": self.width,
            "expanded_filters": self.expanded_filters,
            "squeezed_filters": self.squeezed_filters,
            "strides": self.strides,
            "stride_on": self.stride_on,
            "pool": self.pool,
            "stride_pool": self.stride_pool,
            "padding": self.padding,
            "activation": self.activation,
            "prenorm_activation": self.prenorm_activation,
            "squeeze_activation": self.squeeze_activation,
            "squeeze_place": self.squeeze_place,
            "use_bias": self.use_bias,
            "batch_norm_epsilon": self.batch_norm_epsilon,
            "batch_norm_momentum": self.batch_norm_momentum,
            "stochastic_depth": self.stochastic_depth,
        }
