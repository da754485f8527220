"""The bias that relative self-attention adds to its logits, for a feature map of any size.

A map of H x W positions has (2H - 1) x (2W - 1) offsets between a key and a query. One value per
head and offset, from a table or from a small network over the offsets, is spread to all pairs of
positions: the bias of query (i, j) on key (i', j') is `values[head, i'-i+H-1, j'-j+W-1]`.

Sizes may be tensors, when a model takes images of unknown size. The same formulas then run on
`keras.ops` instead of NumPy, which is why they take the module as an argument.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_coatnet.arguments import two_whole_numbers, whole_number
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer


def _module(*sizes: Any) -> Any:
    """NumPy where the sizes are known: its results become constants of the graph."""
    return np if all(isinstance(size, int) for size in sizes) else ops


def interpolation_matrix(source: int, target: Any) -> Any:
    """Weights of a bilinear resize along one axis, with half-pixel centers.

    Args:
        source: length before, an int.
        target: length after, an int or an integer scalar tensor.

    Returns:
        A float32 array or tensor of shape (target, source), whose rows sum to 1.

    Example:
        >>> interpolation_matrix(1, 3).tolist()
        [[1.0], [1.0], [1.0]]
    """
    xp = _module(target)
    if xp is np:
        scale = np.float32(source / target)
    else:
        scale = source / ops.cast(target, "float32")
    centers = (xp.arange(target, dtype="float32") + 0.5) * scale - 0.5
    centers = xp.clip(centers, 0.0, source - 1.0)
    distance = xp.abs(centers[:, None] - np.arange(source, dtype="float32"))
    return xp.maximum(1.0 - distance, 0.0)


def resize_table(table: Any, height: Any, width: Any) -> Any:
    """Resizes a table of relative biases to a feature map, by two matrix products.

    Args:
        table: (heads, 2H - 1, 2W - 1), a tensor or array.
        height: of the feature map, in positions; an int or an integer scalar tensor.
        width: likewise.

    Returns:
        (heads, 2 * height - 1, 2 * width - 1); the table itself if it already fits.

    Example:
        >>> resize_table(np.zeros((1, 3, 3), "float32"), 4, 5).shape
        (1, 7, 9)
    """
    _, rows, columns = table.shape
    xp = np if isinstance(table, np.ndarray) else ops
    new_rows, new_columns = 2 * height - 1, 2 * width - 1
    if not (isinstance(height, int) and rows == new_rows):
        matrix = _like(table, interpolation_matrix(rows, new_rows))
        table = xp.einsum("hrc,Rr->hRc", table, matrix)
    if not (isinstance(width, int) and columns == new_columns):
        matrix = _like(table, interpolation_matrix(columns, new_columns))
        table = xp.einsum("hrc,Cc->hrC", table, matrix)
    return table


def _like(table: Any, matrix: Any) -> Any:
    """The matrix in the table's dtype: a product keeps it on every backend."""
    if isinstance(table, np.ndarray):
        return matrix.astype(table.dtype)
    return ops.cast(matrix, table.dtype)


def spread_to_pairs(values: Any, height: Any, width: Any) -> Any:
    """Gives every pair of a query and a key the value of its offset.

    Args:
        values: (heads, 2 * height - 1, 2 * width - 1).
        height: of the feature map, in positions; an int or an integer scalar tensor.
        width: likewise.

    Returns:
        (heads, height * width, height * width), queries before keys.
    """
    xp = _module(height, width)
    row, column = xp.arange(height, dtype="int32"), xp.arange(width, dtype="int32")
    down = row[None, :] - row[:, None] + (height - 1)
    right = column[None, :] - column[:, None] + (width - 1)
    index = down[:, None, :, None] * (2 * width - 1) + right[None, :, None, :]
    heads, positions = values.shape[0], height * width
    # One gather along the last axis: its gradient is dense, and works on all backends.
    pairs = ops.take(ops.reshape(values, (heads, -1)), xp.reshape(index, (-1,)), axis=1)
    return ops.reshape(pairs, (heads, positions, positions))


@keras.saving.register_keras_serializable(PACKAGE)
class RelativePositionTable(keras.layers.Layer):
    """A learnt bias for each head and offset (equation 3 of the paper).

    Args:
        heads: number of attention heads.
        table_size: (height, width) of the feature map that the table is made for. Other maps get a
            bilinearly resized table: at run time, and when weights of another size are loaded.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Call arguments, by keyword: `height` and `width` of the feature map, ints or integer scalars.
    Output shape: `(heads, height * width, height * width)`.

    Raises:
        ValueError: an argument is no whole number of at least 1.

    Example:
        >>> RelativePositionTable(4, (7, 7))(height=2, width=3).shape == (4, 6, 6)
        True
    """

    def __init__(self, heads: int, table_size: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = whole_number("heads", heads)
        self.table_size = two_whole_numbers("table_size", table_size)
        self.build()

    def build(self, input_shape: tuple | None = None) -> None:
        height, width = self.table_size
        self.table = self.add_weight(
            name="table",
            shape=(self.heads, 2 * height - 1, 2 * width - 1),
            initializer=kernel_initializer(),
        )
        self.built = True

    def call(self, height: Any, width: Any) -> Any:
        table = resize_table(ops.convert_to_tensor(self.table), height, width)
        return spread_to_pairs(table, height, width)

    def load_own_variables(self, store: Any) -> None:
        saved = {key: np.asarray(store[key]) for key in store.keys()}
        table = saved.get("0")
        # Anything but a table of another size is left to Keras, which refuses it.
        if table is not None and table.ndim == 3 and len(table) == self.heads:
            saved["0"] = resize_table(table, *self.table_size)
        super().load_own_variables(saved)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads, "table_size": self.table_size}


@keras.saving.register_keras_serializable(PACKAGE)
class RelativePositionMLP(CompositeLayer):
    """A bias computed from log-spaced offsets, so that it has no size of its own.

    Each offset d becomes `sign(d) * ln(1 + |d|)`; two dense layers turn the pair of them into one
    value a head, as in timm's `rmlp` variants (after Swin V2, Liu et al., 2022).

    Args:
        heads: number of attention heads.
        hidden_dim: width of the layer between.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Call arguments, by keyword: `height` and `width` of the feature map, ints or integer scalars.
    Output shape: `(heads, height * width, height * width)`.

    Raises:
        ValueError: an argument is no whole number of at least 1.

    Example:
        >>> RelativePositionMLP(4, hidden_dim=16)(height=2, width=3).shape == (4, 6, 6)
        True
    """

    def __init__(self, heads: int, hidden_dim: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = whole_number("heads", heads)
        self.hidden_dim = whole_number("hidden_dim", hidden_dim)
        self.build()

    def build(self, input_shape: tuple | None = None) -> None:
        for name, width, activation in (
            ("hidden", self.hidden_dim, "relu"),
            ("values", self.heads, None),
        ):
            self.add_sublayer(
                name,
                keras.layers.Dense,
                width,
                activation,
                kernel_initializer=kernel_initializer(),
            )
        self.hidden.build((None, None, 2))
        self.values.build((None, None, self.hidden_dim))
        self.built = True

    def call(self, height: Any, width: Any) -> Any:
        down, right = _log_offsets(height), _log_offsets(width)
        grid = ops.stack(
            [
                ops.broadcast_to(down[:, None], (2 * height - 1, 2 * width - 1)),
                ops.broadcast_to(right[None, :], (2 * height - 1, 2 * width - 1)),
            ],
            axis=-1,
        )
        values = self.values(self.hidden(ops.cast(grid, self.compute_dtype)))
        return spread_to_pairs(ops.transpose(values, (2, 0, 1)), height, width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads, "hidden_dim": self.hidden_dim}


def _log_offsets(size: Any) -> Any:
    """Offsets -(size - 1) .. size - 1 as `sign(d) * ln(1 + |d|)`, float32, (2 * size - 1,)."""
    xp = _module(size)
    offsets = xp.arange(2 * size - 1, dtype="float32") - (
        size - 1 if xp is np else ops.cast(size - 1, "float32")
    )
    return ops.convert_to_tensor(xp.sign(offsets) * xp.log1p(xp.abs(offsets)))
