"""Relative self-attention (section 2.1 of the paper)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import boolean, choice, two_whole_numbers, whole_number
from keras_coatnet.layers.base import (
    PACKAGE,
    CompositeLayer,
    full_precision,
    kernel_initializer,
    spatial_size,
)
from keras_coatnet.layers.relative_position import RelativePositionMLP, RelativePositionTable

# Where the bias of each offset comes from.
SOURCES = ("table", "mlp")


def check_heads(attention_dim: int, head_dim: int) -> None:
    """Refuses an attention that heads of this size do not fill.

    Args:
        attention_dim: channels of q, k and v.
        head_dim: channels of one head.

    Raises:
        ValueError: `head_dim` does not divide the width.
    """
    if attention_dim % head_dim:
        raise ValueError(
            "The attention's width must be a multiple of `head_dim`. Received: "
            f"attention_dim={attention_dim}, head_dim={head_dim}"
        )


def attend(query: Any, key: Any, value: Any, bias: Any, scale: float = 1.0) -> Any:
    """`softmax(scale q k^T + bias) v` for each head, its softmax in the precision of the bias.

    torch has it as one operation, which is used where it would not round the bias: in half
    precision it takes none of float32.

    Args:
        query: `(batch, positions, heads, head_dim)`.
        key: as `query`.
        value: as `query`.
        bias: `(heads, positions, positions)`, for each query and key.
        scale: of the product of query and key.

    Returns:
        A tensor like `value`.
    """
    if keras.backend.backend() == "torch" and value.dtype == bias.dtype:
        return ops.dot_product_attention(query, key, value, bias=bias, scale=scale)
    query = ops.cast(query, bias.dtype) * scale
    logits = ops.einsum("bqhd,bkhd->bhqk", query, ops.cast(key, bias.dtype)) + bias
    weights = ops.cast(keras.activations.softmax(logits), value.dtype)
    return ops.einsum("bhqk,bkhd->bqhd", weights, value)


@keras.saving.register_keras_serializable(PACKAGE)
class RelativeSelfAttention(CompositeLayer):
    """Multi-head self-attention over all positions of a map, with a bias per head and offset.

    `softmax(q k^T / sqrt(head_dim) + bias) v` (equation 3), where the bias depends on the offset
    between key and query alone. Logits and softmax are float32 under mixed precision.

    Args:
        width: channels of the output.
        head_dim: channels of one head.
        attention_dim: channels of q, k and v; None: `width`. A multiple of `head_dim`.
        use_bias: whether q, k, v and the output projection have a bias.
        relative_position: `"table"` or `"mlp"`: where the bias comes from.
        relative_position_hidden_dim: hidden width of that MLP.
        table_size: (height, width) of the map that the table is made for; None: of the map that
            the layer is built on, whose size must be static then.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`; height and width may be unknown.
    Output shape: `(batch, height, width, width)`.

    Raises:
        ValueError: `head_dim` does not divide the attention's width, an argument has no such
            value, or the table's size is not known.

    Example:
        >>> attention = RelativeSelfAttention(64, head_dim=32)
        >>> attention(keras.ops.ones((2, 7, 5, 48))).shape == (2, 7, 5, 64)
        True
    """

    def __init__(
        self,
        width: int,
        head_dim: int = 32,
        attention_dim: int | None = None,
        use_bias: bool = True,
        relative_position: str = "table",
        relative_position_hidden_dim: int = 512,
        table_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.width = whole_number("width", width)
        self.head_dim = whole_number("head_dim", head_dim)
        attention_dim = width if attention_dim is None else attention_dim
        self.attention_dim = whole_number("attention_dim", attention_dim)
        check_heads(self.attention_dim, self.head_dim)
        self.use_bias = boolean("use_bias", use_bias)
        self.relative_position = choice("relative_position", relative_position, SOURCES)
        self.relative_position_hidden_dim = whole_number(
            "relative_position_hidden_dim", relative_position_hidden_dim
        )
        self.table_size = (
            None if table_size is None else two_whole_numbers("table_size", table_size)
        )
        self.heads = self.attention_dim // self.head_dim

    def build(self, input_shape: tuple) -> None:
        channels = input_shape[-1]
        for name in ("query", "key", "value"):
            self._add_dense(name, self.attention_dim).build((None, None, channels))
        self._add_dense("projection", self.width).build((None, None, self.attention_dim))
        dtype = full_precision(self.dtype_policy)
        if self.relative_position == "table":
            table_size = self.table_size or tuple(input_shape[1:3])
            if None in table_size:
                raise ValueError(
                    "A layer built on a map of unknown size needs `table_size`, the (height, "
                    f"width) that its table is made for. Received: input_shape={input_shape}"
                )
            self.table_size = table_size
            self.add_sublayer(
                "position", RelativePositionTable, self.heads, table_size, dtype=dtype
            )
        else:
            self.add_sublayer(
                "position",
                RelativePositionMLP,
                self.heads,
                self.relative_position_hidden_dim,
                dtype=dtype,
            )
        self.built = True

    def _add_dense(self, name: str, width: int) -> keras.layers.Layer:
        return self.add_sublayer(
            name,
            keras.layers.Dense,
            width,
            use_bias=self.use_bias,
            kernel_initializer=kernel_initializer(),
        )

    def call(self, x: Any) -> Any:
        height, width = spatial_size(x)
        tokens = ops.reshape(x, (-1, height * width, x.shape[-1]))
        split = (-1, height * width, self.heads, self.head_dim)
        query = ops.reshape(self.query(tokens), split)
        key = ops.reshape(self.key(tokens), split)
        value = ops.reshape(self.value(tokens), split)

        bias = self.position(height=height, width=width)
        mixed = attend(query, key, value, bias, self.head_dim**-0.5)
        mixed = ops.reshape(mixed, (-1, height, width, self.attention_dim))
        return self.projection(mixed)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (*input_shape[:-1], self.width)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "width": self.width,
            "head_dim": self.head_dim,
            "attention_dim": self.attention_dim,
            "use_bias": self.use_bias,
            "relative_position": self.relative_position,
            "relative_position_hidden_dim": self.relative_position_hidden_dim,
            "table_size": self.table_size,
        }
