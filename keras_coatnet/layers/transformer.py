"""The Transformer block: relative self-attention, then a feed-forward network, both pre-norm."""

from __future__ import annotations

from typing import Any

import keras

from keras_coatnet.arguments import boolean, choice, number, two_whole_numbers, whole_number
from keras_coatnet.layers.activations import compile_activation, get_activation
from keras_coatnet.layers.attention import (
    RELATIVE_POSITIONS,
    RelativeSelfAttention,
    check_head_dim,
)
from keras_coatnet.layers.base import PACKAGE, CompositeLayer
from keras_coatnet.layers.layer_scale import LayerScale
from keras_coatnet.layers.normalization import norm_options
from keras_coatnet.layers.pooling import POOLS, Downsample, halved
from keras_coatnet.layers.stochastic_depth import StochasticDepth
from keras_coatnet.types import MapShape, Tensor


@keras.saving.register_keras_serializable(PACKAGE)
class TransformerBlock(CompositeLayer):
    """Computes `y = shortcut(pool(x)) + attention(pool(norm(x)))`, then `y + ffn(norm(y))`.

    There is a pooling if the block strides, and a dense layer on the shortcut if the number of
    channels changes. The defaults are the paper's. Published networks differ in the other
    arguments: `CoAtNetConfig` describes each of them.

    Args:
        filters: number of channels of the output.
        strides: 1, or 2 to halve the feature map by pooling.
        head_dim: number of channels of one attention head.
        attention_dim: number of channels of each of q, k and v, all heads together; None:
            `filters`.
        attention_bias: whether q, k, v and the output projection have a bias.
        relative_position: where the relative biases come from: a `"table"` or an `"mlp"`.
        relative_position_hidden_dim: number of hidden units of the MLP.
        table_size: (height, width), after the stride, of the feature map that the table is made
            for; None: of the map that the layer is built on.
        pool: pooling of both branches: `"max2"`, `"avg2"` or `"max3"`.
        norm: kind of both normalizations: `"layer"` or `"batch"`.
        norm_epsilon: `epsilon` of the normalizations.
        batch_norm_momentum: `momentum` of the normalizations if `norm` is `"batch"`.
        shortcut_bias: whether the dense layer on the shortcut has a bias.
        ffn_expansion: number of hidden units of the feed-forward network, as a multiple of
            `filters`.
        ffn_activation: `"gelu_tanh"`, `"gelu"`, `"silu"` or `"relu"`.
        ffn_bias: whether the feed-forward layers have a bias.
        layer_scale: initial value of the scale of both residual branches; None: no scale.
        stochastic_depth: probability that a residual branch of a sample is dropped in training;
            each of the two branches is drawn separately.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`; height and width may be unknown.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), filters)`.

    Raises:
        ValueError: an argument is of the wrong type or out of range, or `attention_dim` is not a
            multiple of `head_dim`.

    Example:
        >>> block = TransformerBlock(64, strides=2)
        >>> block(keras.ops.ones((1, 14, 14, 32))).shape == (1, 7, 7, 64)
        True
    """

    def __init__(
        self,
        filters: int,
        strides: int = 1,
        head_dim: int = 32,
        attention_dim: int | None = None,
        attention_bias: bool = True,
        relative_position: str = "table",
        relative_position_hidden_dim: int = 512,
        table_size: tuple[int, int] | None = None,
        pool: str = "max2",
        norm: str = "layer",
        norm_epsilon: float = 1e-5,
        batch_norm_momentum: float = 0.99,
        shortcut_bias: bool = True,
        ffn_expansion: int = 4,
        ffn_activation: str = "gelu_tanh",
        ffn_bias: bool = True,
        layer_scale: float | None = None,
        stochastic_depth: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.filters = whole_number("filters", filters)
        self.strides = choice("strides", strides, (1, 2))
        self.head_dim = whole_number("head_dim", head_dim)
        self.attention_dim = (
            None if attention_dim is None else whole_number("attention_dim", attention_dim)
        )
        check_head_dim(self.attention_dim or self.filters, self.head_dim)
        self.relative_position = choice("relative_position", relative_position, RELATIVE_POSITIONS)
        self.relative_position_hidden_dim = whole_number(
            "relative_position_hidden_dim", relative_position_hidden_dim
        )
        self.table_size = (
            None if table_size is None else two_whole_numbers("table_size", table_size)
        )
        self.attention_bias = boolean("attention_bias", attention_bias)
        self.pool = choice("pool", pool, POOLS)
        self.norm = choice("norm", norm, ("layer", "batch"))
        self.norm_epsilon = number("norm_epsilon", norm_epsilon, least=0)
        self.batch_norm_momentum = number(
            "batch_norm_momentum", batch_norm_momentum, least=0, most=1
        )
        self.shortcut_bias = boolean("shortcut_bias", shortcut_bias)
        self.ffn_expansion = whole_number("ffn_expansion", ffn_expansion)
        self._activation = get_activation(ffn_activation)
        self.ffn_activation = ffn_activation
        self.ffn_bias = boolean("ffn_bias", ffn_bias)
        self.layer_scale = None if layer_scale is None else number("layer_scale", layer_scale)
        self.stochastic_depth = number("stochastic_depth", stochastic_depth, least=0, below=1)

    def build(self, input_shape: MapShape) -> None:
        norm, norm_arguments = norm_options(self.norm, self.norm_epsilon, self.batch_norm_momentum)
        pooled_shape = halved(input_shape, strides=self.strides)
        filters, hidden_dim = self.filters, self.ffn_expansion * self.filters
        output_shape = (*pooled_shape[:-1], filters)
        hidden_shape = (*pooled_shape[:-1], hidden_dim)

        self.attention_norm = norm(**norm_arguments, **self.sublayer_options("attention_norm"))
        self.attention_norm.build(input_shape)
        self.pooling = self.shortcut = None
        if self.strides == 2:
            self.pooling = Downsample(self.pool, **self.sublayer_options("pooling"))
        self.attention = RelativeSelfAttention(
            filters,
            head_dim=self.head_dim,
            attention_dim=self.attention_dim,
            use_bias=self.attention_bias,
            relative_position=self.relative_position,
            relative_position_hidden_dim=self.relative_position_hidden_dim,
            table_size=self.table_size,
            **self.composite_options("attention"),
        )
        self.attention.build(pooled_shape)
        self.table_size = self.attention.table_size
        if input_shape[-1] != filters:
            self.shortcut = self.build_dense("shortcut", filters, pooled_shape, self.shortcut_bias)

        self.ffn_norm = norm(**norm_arguments, **self.sublayer_options("ffn_norm"))
        self.ffn_norm.build(output_shape)
        self.ffn_expand = self.build_dense("ffn_expand", hidden_dim, output_shape, self.ffn_bias)
        self.ffn_project = self.build_dense("ffn_project", filters, hidden_shape, self.ffn_bias)

        self.attention_scale = self._layer_scale("attention_scale", output_shape)
        self.attention_drop = self._drop("attention_drop")
        self.ffn_scale = self._layer_scale("ffn_scale", output_shape)
        self.ffn_drop = self._drop("ffn_drop")
        self.built = True

    def _layer_scale(self, name: str, input_shape: MapShape) -> LayerScale | None:
        if self.layer_scale is None:
            return None
        scale = LayerScale(self.layer_scale, **self.sublayer_options(name))
        scale.build(input_shape)
        return scale

    def _drop(self, name: str) -> StochasticDepth:
        return StochasticDepth(self.stochastic_depth, **self.sublayer_options(name))

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        # x is (batch, height, width, channels). Comments below give the shape that a line results
        # in; h and w are the height and width after the stride.
        branch = self._attention_input(x, training)  # (batch, h, w, channels)
        if self.pooling is not None:
            x = self.pooling(x)  # (batch, h, w, channels)
        if self.shortcut is not None:
            x = self.shortcut(x)  # (batch, h, w, filters)
        branch = self.attention(branch)  # (batch, h, w, filters)
        if self.attention_scale is not None:
            branch = self.attention_scale(branch)
        x = x + self.attention_drop(branch, training=training)

        activation = compile_activation(self._activation) if training else self._activation
        branch = self.ffn_norm(x, training=training)
        branch = activation(self.ffn_expand(branch))  # (batch, h, w, ffn_expansion * filters)
        branch = self.ffn_project(branch)  # (batch, h, w, filters)
        if self.ffn_scale is not None:
            branch = self.ffn_scale(branch)
        return x + self.ffn_drop(branch, training=training)

    def _attention_input(self, x: Tensor, training: bool | None) -> Tensor:
        branch = self.attention_norm(x, training=training)
        return branch if self.pooling is None else self.pooling(branch)

    def attention_weights(self, x: Tensor) -> Tensor:
        """Returns how much of each position's value goes to each other position, at inference.

        Args:
            x: what the block is called with, `(batch, height, width, channels)`.

        Returns:
            A tensor of shape `(batch, heads, queries, keys)`, whose last axis sums to 1. Queries
            and keys are the positions of the map after the block's stride, row by row.
        """
        return self.attention.attention_weights(self._attention_input(x, False))

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return halved(input_shape, self.filters, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "strides": self.strides,
            "head_dim": self.head_dim,
            "attention_dim": self.attention_dim,
            "attention_bias": self.attention_bias,
            "relative_position": self.relative_position,
            "relative_position_hidden_dim": self.relative_position_hidden_dim,
            "table_size": self.table_size,
            "pool": self.pool,
            "norm": self.norm,
            "norm_epsilon": self.norm_epsilon,
            "batch_norm_momentum": self.batch_norm_momentum,
            "shortcut_bias": self.shortcut_bias,
            "ffn_expansion": self.ffn_expansion,
            "ffn_activation": self.ffn_activation,
            "ffn_bias": self.ffn_bias,
            "layer_scale": self.layer_scale,
            "stochastic_depth": self.stochastic_depth,
        }
