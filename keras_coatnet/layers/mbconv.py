"""MBConv, the inverted bottleneck with depthwise convolution, in its pre-norm form."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import boolean, choice, number, whole_number
from keras_coatnet.layers.activations import compile_activation, get_activation
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer
from keras_coatnet.layers.normalization import BatchNormalization
from keras_coatnet.layers.pooling import POOLS, Downsample, halved
from keras_coatnet.layers.squeeze_excite import SqueezeExcite
from keras_coatnet.layers.stochastic_depth import StochasticDepth
from keras_coatnet.types import MapShape, Tensor


@keras.saving.register_keras_serializable(PACKAGE)
class MBConv(CompositeLayer):
    """Computes `shortcut(x) + conv(depthwise(conv(norm(x))))` (equations 4 and 5 of the paper).

    The residual branch is: norm; 1x1 convolution to `expanded_filters`, norm, activation; depthwise
    3x3 convolution, norm, activation; squeeze-and-excitation; 1x1 convolution to `filters`.

    The shortcut has a pooling if the block strides, and a 1x1 convolution if the number of channels
    changes. The defaults are the paper's. Published networks differ in the other arguments:
    `CoAtNetConfig` describes each of them.

    Args:
        filters: number of channels of the output.
        expanded_filters: number of channels of the depthwise convolution; None: four times
            `filters`.
        squeezed_filters: number of channels inside squeeze-and-excitation; None: a quarter of
            `filters`.
        strides: 1, or 2 to halve the feature map.
        stride_on: what halves the map: the 1x1 convolution `"expansion"`, the `"depthwise"`
            convolution, or a `"pool"` before both.
        pool: pooling of the shortcut: `"max2"`, `"avg2"` or `"max3"`.
        stride_pool: pooling for `stride_on="pool"`.
        padding: `"same"` or `"symmetric"`: padding of a depthwise convolution of stride 2.
        activation: `"gelu_tanh"`, `"gelu"`, `"silu"` or `"relu"`.
        prenorm_activation: whether the activation also follows the first norm.
        squeeze_activation: activation inside squeeze-and-excitation.
        squeeze_place: `"after_norm"` of the depthwise convolution, or `"before_norm"`.
        use_bias: whether the last 1x1 convolution and the shortcut's have a bias.
        batch_norm_epsilon: `epsilon` of the batch normalizations.
        batch_norm_momentum: `momentum` of the batch normalizations.
        stochastic_depth: probability that the residual branch of a sample is dropped in training.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), filters)`.

    Raises:
        ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> MBConv(64, strides=2)(keras.ops.ones((1, 14, 14, 32))).shape == (1, 7, 7, 64)
        True
    """

    def __init__(
        self,
        filters: int,
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
        self.filters = filters = whole_number("filters", filters)
        expanded_filters = 4 * filters if expanded_filters is None else expanded_filters
        squeezed_filters = max(1, filters // 4) if squeezed_filters is None else squeezed_filters
        self.expanded_filters = whole_number("expanded_filters", expanded_filters)
        self.squeezed_filters = whole_number("squeezed_filters", squeezed_filters)
        self.strides = choice("strides", strides, (1, 2))
        self.stride_on = choice("stride_on", stride_on, ("expansion", "depthwise", "pool"))
        self.pool = choice("pool", pool, POOLS)
        self.stride_pool = choice("stride_pool", stride_pool, POOLS)
        self.padding = choice("padding", padding, ("same", "symmetric"))
        self._activation = get_activation(activation)
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
        self.expand_strides = self.strides if self.stride_on == "expansion" else 1
        self.depthwise_strides = self.strides if self.stride_on == "depthwise" else 1
        # Symmetric padding differs from "same" only where a 3x3 convolution strides.
        self.pads_symmetrically = self.depthwise_strides == 2 and self.padding == "symmetric"

    def build(self, input_shape: MapShape) -> None:
        norm = {"epsilon": self.batch_norm_epsilon, "momentum": self.batch_norm_momentum}
        shape = input_shape

        self.input_norm = BatchNormalization(**norm, **self.sublayer_options("input_norm"))
        self.input_norm.build(shape)

        self.stride_pooling = None
        if self.strides == 2 and self.stride_on == "pool":
            options = self.sublayer_options("stride_pooling")
            self.stride_pooling = Downsample(self.stride_pool, **options)
            shape = halved(shape)

        self.expand = self._conv_1x1(
            "expand", self.expanded_filters, strides=self.expand_strides, use_bias=False
        )
        self.expand.build(shape)
        shape = halved(shape, self.expanded_filters, self.expand_strides)
        self.expand_norm = BatchNormalization(**norm, **self.sublayer_options("expand_norm"))
        self.expand_norm.build(shape)

        self.depthwise = keras.layers.DepthwiseConv2D(
            3,
            strides=self.depthwise_strides,
            padding="valid" if self.pads_symmetrically else "same",
            data_format="channels_last",
            use_bias=False,
            depthwise_initializer=kernel_initializer(),
            **self.sublayer_options("depthwise"),
        )
        self.depthwise.build(shape)
        shape = halved(shape, strides=self.depthwise_strides)
        self.depthwise_norm = BatchNormalization(**norm, **self.sublayer_options("depthwise_norm"))
        self.depthwise_norm.build(shape)

        self.squeeze_excite = SqueezeExcite(
            self.squeezed_filters,
            self.squeeze_activation,
            **self.composite_options("squeeze_excite"),
        )
        self.squeeze_excite.build(shape)
        self.project = self._conv_1x1("project", self.filters, use_bias=self.use_bias)
        self.project.build(shape)
        self.drop = StochasticDepth(self.stochastic_depth, **self.sublayer_options("drop"))

        self.shortcut_pooling = self.shortcut = None
        if self.strides == 2:
            options = self.sublayer_options("shortcut_pooling")
            self.shortcut_pooling = Downsample(self.pool, **options)
        if input_shape[-1] != self.filters:
            self.shortcut = self._conv_1x1("shortcut", self.filters, use_bias=self.use_bias)
            self.shortcut.build(halved(input_shape, strides=self.strides))
        self.built = True

    def _conv_1x1(
        self, name: str, filters: int, use_bias: bool, strides: int = 1
    ) -> keras.layers.Conv2D:
        return keras.layers.Conv2D(
            filters,
            1,
            strides=strides,
            data_format="channels_last",
            use_bias=use_bias,
            kernel_initializer=kernel_initializer(),
            **self.sublayer_options(name),
        )

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        # x is (batch, height, width, channels). Comments below give the shape that a line results
        # in; h and w are the height and width after the stride, wherever it is.
        activation = compile_activation(self._activation) if training else self._activation

        shortcut = x
        if self.shortcut_pooling is not None:
            shortcut = self.shortcut_pooling(shortcut)  # (batch, h, w, channels)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)  # (batch, h, w, filters)

        x = self.input_norm(x, training=training)
        if self.prenorm_activation:
            x = activation(x)
        if self.stride_pooling is not None:
            x = self.stride_pooling(x)  # (batch, h, w, channels)

        x = self.expand(x)  # (batch, h, w, expanded_filters); not halved yet if `depthwise` strides
        x = activation(self.expand_norm(x, training=training))

        if self.pads_symmetrically:
            x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = self.depthwise(x)  # (batch, h, w, expanded_filters)
        if self.squeeze_place == "before_norm":
            x = self.squeeze_excite(x)
        x = activation(self.depthwise_norm(x, training=training))
        if self.squeeze_place == "after_norm":
            x = self.squeeze_excite(x)

        x = self.project(x)  # (batch, h, w, filters)
        return shortcut + self.drop(x, training=training)

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return halved(input_shape, self.filters, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
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
