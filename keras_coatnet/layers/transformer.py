"""The Transformer block: relative self-attention, then a feed-forward part, both pre-norm."""

from __future__ import annotations

from typing import Any

import keras

from keras_coatnet.arguments import boolean, choice, number, two_whole_numbers, whole_number
from keras_coatnet.layers.activations import get_activation, in_one_pass
from keras_coatnet.layers.attention import SOURCES, RelativeSelfAttention, check_heads
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer
from keras_coatnet.layers.layer_scale import LayerScale
from keras_coatnet.layers.normalization import norm_options
from keras_coatnet.layers.pooling import POOLS, Downsample, halved
from keras_coatnet.layers.stochastic_depth import StochasticDepth


@keras.saving.register_keras_serializable(PACKAGE)
class TransformerBlock(CompositeLayer):
    """`x = shortcut(pool(x)) + attention(pool(norm(x)))`, then `x + ffn(norm(x))`.

    The shortcut projects where the width changes. The defaults are the paper's; `CoAtNetConfig`
    says what the other values are for.

    Args:
        width: channels of the output.
        strides: 1, or 2 to halve the feature map by pooling.
        head_dim: channels of one attention head.
        attention_dim: channels of q, k and v; None: `width`.
        attention_bias: whether q, k, v and the output projection have a bias.
        relative_position: `"table"` or `"mlp"`.
        relative_position_hidden_dim: hidden width of that MLP.
        table_size: (height, width) of the map, after the stride, that the table is made for; None:
            of the one the layer is built on.
        pool: `"max2"`, `"avg2"` or `"max3"`.
        norm: `"layer"` or `"batch"`.
        norm_epsilon: added to the variance.
        batch_norm_momentum: of the moving statistics where `norm` is `"batch"`.
        shortcut_bias: whether the shortcut's projection has a bias.
        ffn_expansion: hidden width of the feed-forward part, as a multiple of `width`.
        ffn_activation: `"gelu_tanh"`, `"gelu"`, `"silu"` or `"relu"`.
        ffn_bias: whether the feed-forward layers have a bias.
        layer_scale: initial scale of both residual branches; None: no such scale.
        stochastic_depth: probability that a sample's branch is dropped in training, for each of
            the two branches on its own.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`; height and width may be unknown.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), width)`.

    Raises:
        ValueError: an argument has no such value.

    Example:
        >>> block = TransformerBlock(64, strides=2)
        >>> block(keras.ops.ones((1, 14, 14, 32))).shape == (1, 7, 7, 64)
        True
    """

    def __init__(
        self,
        width: int,
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
        self.width = whole_number("width", width)
        self.strides = choice("strides", strides, (1, 2))
        self.head_dim = whole_number("head_dim", head_dim)
        self.attention_dim = (
            None if attention_dim is None else whole_number("attention_dim", attention_dim)
        )
        check_heads(self.attention_dim or self.width, self.head_dim)
        self.relative_position = choice("relative_position", relative_position, SOURCES)
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
        self._activate = get_activation(ffn_activation)
        self.ffn_activation = ffn_activation
        self.ffn_bias = boolean("ffn_bias", ffn_bias)
        self.layer_scale = None if layer_scale is None else number("layer_scale", layer_scale)
        self.stochastic_depth = number("stochastic_depth", stochastic_depth, least=0, below=1)

    def build(self, input_shape: tuple) -> None:
        norm, options = norm_options(self.norm, self.norm_epsilon, self.batch_norm_momentum)
        pooled = halved(input_shape, strides=self.strides)
        shape = (*pooled[:-1], self.width)

        self.add_sublayer("attention_norm", norm, **options).build(input_shape)
        self.pooling = self.shortcut = None
        if self.strides > 1:
            self.add_sublayer("pooling", Downsample, self.pool)
        self.add_sublayer(
            "attention",
            RelativeSelfAttention,
            self.width,
            self.head_dim,
            self.attention_dim,
            self.attention_bias,
            self.relative_position,
            self.relative_position_hidden_dim,
            self.table_size,
        ).build(pooled)
        self.table_size = self.attention.table_size
        if input_shape[-1] != self.width:
            self._add_dense("shortcut", self.width, self.shortcut_bias).build(pooled)

        hidden = self.ffn_expansion * self.width
        self.add_sublayer("ffn_norm", norm, **options).build(shape)
        self._add_dense("ffn_expand", hidden, self.ffn_bias).build(shape)
        self._add_dense("ffn_project", self.width, self.ffn_bias).build((*shape[:-1], hidden))

        for branch in ("attention", "ffn"):
            if self.layer_scale is not None:
                self.add_sublayer(f"{branch}_scale", LayerScale, self.layer_scale).build(shape)
            self.add_sublayer(f"{branch}_drop", StochasticDepth, self.stochastic_depth)
        self.built = True

    def _add_dense(self, name: str, width: int, use_bias: bool) -> keras.layers.Layer:
        return self.add_sublayer(
            name,
            keras.layers.Dense,
            width,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer(),
        )

    def call(self, x: Any, training: bool | None = None) -> Any:
        branch = self.attention_norm(x, training=training)
        if self.pooling is not None:
            x, branch = self.pooling(x), self.pooling(branch)
        if self.shortcut is not None:
            x = self.shortcut(x)
        branch = self.attention(branch)
        if self.layer_scale is not None:
            branch = self.attention_scale(branch)
        x = x + self.attention_drop(branch, training=training)

        branch = self.ffn_norm(x, training=training)
        activate = in_one_pass(self._activate) if training else self._activate
        branch = self.ffn_project(activate(self.ffn_expand(branch)))
        if self.layer_scale is not None:
            branch = self.ffn_scale(branch)
        return x + self.ffn_drop(branch, training=training)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return halved(input_shape, self.width, self.strides)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "width": self.width,
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
