"""Relative self-attention (section 2.1 of the paper)."""

from __future__ import annotations

from typing import Any, cast

import keras
from keras import ops

from keras_coatnet.arguments import boolean, choice, two_whole_numbers, whole_number
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, full_precision
from keras_coatnet.layers.relative_position import RelativePositionMLP, RelativePositionTable
from keras_coatnet.types import MapShape, Tensor

# The values of `relative_position`.
RELATIVE_POSITIONS = ("table", "mlp")


def check_head_dim(attention_dim: int, head_dim: int) -> None:
    """Checks that the channels of q, k and v can be divided into heads.

    Args:
        attention_dim: number of channels of each of q, k and v, all heads together.
        head_dim: number of channels of one head.

    Raises:
        ValueError: `attention_dim` is not a multiple of `head_dim`.
    """
    if attention_dim % head_dim:
        raise ValueError(
            "`attention_dim`, the channels of q, k and v, must be a multiple of `head_dim`. "
            f"Received: attention_dim={attention_dim}, head_dim={head_dim}"
        )


def attention_weights(query: Tensor, key: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """Computes `softmax(scale q k^T + bias)` for each head, in the dtype of `bias`.

    Args:
        query: `(batch, queries, heads, head_dim)`.
        key: `(batch, keys, heads, head_dim)`.
        bias: `(heads, queries, keys)`.
        scale: factor of the product of query and key.

    Returns:
        A tensor of shape `(batch, heads, queries, keys)`, whose last axis sums to 1.
    """
    query = ops.cast(query, bias.dtype) * scale  # pyright: ignore[reportOptionalOperand]  # never None
    key = ops.cast(key, bias.dtype)
    logits = ops.einsum("bqhd,bkhd->bhqk", query, key) + bias  # (batch, heads, queries, keys)
    return keras.activations.softmax(logits)


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float = 1.0
) -> Tensor:
    """Computes `softmax(scale q k^T + bias) v` for each head.

    Logits and softmax have the dtype of `bias`, which is float32 under mixed precision.
    `keras.ops.dot_product_attention` would compute them in half precision; it is used on torch,
    where it is one operation, if all dtypes are the same.

    Args:
        query: `(batch, queries, heads, head_dim)`.
        key: `(batch, keys, heads, head_dim)`.
        value: `(batch, keys, heads, head_dim)`.
        bias: `(heads, queries, keys)`.
        scale: factor of the product of query and key.

    Returns:
        A tensor of the shape of `query` and the dtype of `value`.
    """
    if keras.backend.backend() == "torch" and value.dtype == bias.dtype:
        return ops.dot_product_attention(query, key, value, bias=bias, scale=scale)
    weights = attention_weights(query, key, bias, scale)  # (batch, heads, queries, keys)
    weights = ops.cast(weights, value.dtype)
    return ops.einsum("bhqk,bkhd->bqhd", weights, value)  # (batch, queries, heads, head_dim)


@keras.saving.register_keras_serializable(PACKAGE)
class RelativeSelfAttention(CompositeLayer):
    """Multi-head self-attention over all positions of a feature map, with relative biases.

    Computes `softmax(q k^T / sqrt(head_dim) + bias) v` (equation 3 of the paper) in each head. The
    bias depends only on the head and on the offset between the positions of key and query. Logits
    and softmax are float32 under mixed precision.

    Args:
        filters: number of channels of the output.
        head_dim: number of channels of one head.
        attention_dim: number of channels of each of q, k and v, all heads together, a multiple of
            `head_dim`; None: `filters`.
        use_bias: whether q, k, v and the output projection have a bias.
        relative_position: where the relative biases come from: a `"table"` or an `"mlp"`.
        relative_position_hidden_dim: number of hidden units of the MLP.
        table_size: (height, width) of the feature map that the table is made for; None: of the map
            that the layer is built on, whose size must then be static.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`; height and width may be unknown.
    Output shape: `(batch, height, width, filters)`.

    Raises:
        ValueError: an argument is of the wrong type or out of range, `attention_dim` is not a
            multiple of `head_dim`, or the size of the table is unknown.

    Example:
        >>> attention = RelativeSelfAttention(64, head_dim=32)
        >>> attention(keras.ops.ones((2, 7, 5, 48))).shape == (2, 7, 5, 64)
        True
    """

    def __init__(
        self,
        filters: int,
        head_dim: int = 32,
        attention_dim: int | None = None,
        use_bias: bool = True,
        relative_position: str = "table",
        relative_position_hidden_dim: int = 512,
        table_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.filters = whole_number("filters", filters)
        self.head_dim = whole_number("head_dim", head_dim)
        attention_dim = filters if attention_dim is None else attention_dim
        self.attention_dim = whole_number("attention_dim", attention_dim)
        check_head_dim(self.attention_dim, self.head_dim)
        self.use_bias = boolean("use_bias", use_bias)
        self.relative_position = choice("relative_position", relative_position, RELATIVE_POSITIONS)
        self.relative_position_hidden_dim = whole_number(
            "relative_position_hidden_dim", relative_position_hidden_dim
        )
        self.table_size = (
            None if table_size is None else two_whole_numbers("table_size", table_size)
        )
        self.num_heads = self.attention_dim // self.head_dim

    def build(self, input_shape: MapShape) -> None:
        attention_dim, bias = self.attention_dim, self.use_bias
        shape, attended_shape = (None, None, input_shape[-1]), (None, None, attention_dim)
        self.query = self.build_dense("query", attention_dim, shape, bias)
        self.key = self.build_dense("key", attention_dim, shape, bias)
        self.value = self.build_dense("value", attention_dim, shape, bias)
        self.projection = self.build_dense("projection", self.filters, attended_shape, bias)
        self.position = self._relative_position(input_shape)
        self.built = True

    def _relative_position(
        self, input_shape: MapShape
    ) -> RelativePositionTable | RelativePositionMLP:
        dtype = full_precision(self.dtype_policy)
        if self.relative_position == "mlp":
            return RelativePositionMLP(
                self.num_heads,
                self.relative_position_hidden_dim,
                **self.composite_options("position", dtype),
            )
        if self.table_size is None:
            _, height, width, _ = input_shape
            if height is None or width is None:
                raise ValueError(
                    "A layer built on a map of unknown size needs `table_size`, the (height, "
                    f"width) that its table is made for. Received: input_shape={input_shape}"
                )
            self.table_size = (height, width)
        return RelativePositionTable(
            self.num_heads, self.table_size, **self.sublayer_options("position", dtype)
        )

    def call(self, x: Tensor) -> Tensor:
        # Ints if static, else scalar tensors.
        _, height, width, _ = cast(Any, ops.shape(x))
        # Each (batch, positions, heads, head_dim).
        query, key, value = self._split_heads(x, (self.query, self.key, self.value))
        bias = self.position(height=height, width=width)  # (heads, queries, keys)
        x = dot_product_attention(query, key, value, bias, scale=self.head_dim**-0.5)
        # (batch, queries, heads, head_dim), and back to a map:
        x = ops.reshape(x, (-1, height, width, self.attention_dim))
        return self.projection(x)  # (batch, height, width, filters)

    def attention_weights(self, x: Tensor) -> Tensor:
        """Returns how much of each position's value goes to each other position.

        Args:
            x: what the layer is called with, `(batch, height, width, channels)`.

        Returns:
            A tensor of shape `(batch, heads, queries, keys)`, whose last axis sums to 1.
        """
        _, height, width, _ = cast(Any, ops.shape(x))
        query, key = self._split_heads(x, (self.query, self.key))
        bias = self.position(height=height, width=width)
        return attention_weights(query, key, bias, scale=self.head_dim**-0.5)

    def _split_heads(self, x: Tensor, layers: tuple[keras.layers.Dense, ...]) -> list[Tensor]:
        """Applies dense layers to a map; returns (batch, positions, heads, head_dim) of each."""
        _, height, width, _ = cast(Any, ops.shape(x))
        positions = height * width
        tokens = ops.reshape(x, (-1, positions, x.shape[-1]))  # (batch, positions, channels)
        split = (-1, positions, self.num_heads, self.head_dim)
        return [ops.reshape(layer(tokens), split) for layer in layers]

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return (*input_shape[:-1], self.filters)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "head_dim": self.head_dim,
            "attention_dim": self.attention_dim,
            "use_bias": self.use_bias,
            "relative_position": self.relative_position,
            "relative_position_hidden_dim": self.relative_position_hidden_dim,
            "table_size": self.table_size,
        }
