"""The relative biases of self-attention, for a feature map of any size.

A map of H x W positions has (2H - 1) x (2W - 1) different offsets between a key and a query. Each
head has one value for each offset, which comes from a table or from a small network. The bias of
query (i, j) and key (i', j') is `values[head, i' - i + H - 1, j' - j + W - 1]`.

If a model takes images of unknown size, height and width are tensors. The functions below then
compute with `keras.ops`. If height and width are known, they compute with NumPy, so that the
results are constants of the graph.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_coatnet.arguments import two_whole_numbers, whole_number
from keras_coatnet.layers.base import PACKAGE, CompositeLayer, kernel_initializer
from keras_coatnet.types import Shape, Tensor


def _array_module(*sizes: int | Tensor) -> Any:
    """Returns NumPy if all sizes are known, else `keras.ops`."""
    return np if all(isinstance(size, int) for size in sizes) else ops


def interpolation_matrix(source: int, target: int | Tensor) -> np.ndarray | Tensor:
    """Returns the weights of a bilinear resize along one axis, with half-pixel centers.

    Args:
        source: length before, an int.
        target: length after, an int or an integer scalar tensor.

    Returns:
        A float32 array or tensor of shape (target, source), whose rows sum to 1.

    Example:
        >>> interpolation_matrix(1, 3).tolist()
        [[1.0], [1.0], [1.0]]
    """
    xp = _array_module(target)
    if xp is np:
        scale = np.float32(source / target)
    else:
        scale = ops.divide(source, ops.cast(target, "float32"))
    centers = (xp.arange(target, dtype="float32") + 0.5) * scale - 0.5  # (target,)
    centers = xp.clip(centers, 0.0, source - 1.0)
    distance = xp.abs(centers[:, None] - np.arange(source, dtype="float32"))  # (target, source)
    return xp.maximum(1.0 - distance, 0.0)


def resize_table(
    table: np.ndarray | Tensor, height: int | Tensor, width: int | Tensor
) -> np.ndarray | Tensor:
    """Resizes a table of relative biases to a feature map, by two matrix products.

    Args:
        table: tensor or array of shape (heads, 2H - 1, 2W - 1).
        height: height of the feature map, an int or an integer scalar tensor.
        width: width of the feature map, likewise.

    Returns:
        A table of shape (heads, 2 * height - 1, 2 * width - 1): the same one if it already fits.

    Example:
        >>> resize_table(np.zeros((1, 3, 3), "float32"), 4, 5).shape
        (1, 7, 9)
    """
    _, rows, columns = table.shape
    xp = np if isinstance(table, np.ndarray) else ops
    new_rows, new_columns = 2 * height - 1, 2 * width - 1
    if not (isinstance(height, int) and rows == new_rows):
        matrix = _cast_like(table, interpolation_matrix(rows, new_rows))  # (new_rows, rows)
        table = xp.einsum("hrc,Rr->hRc", table, matrix)  # (heads, new_rows, columns)
    if not (isinstance(width, int) and columns == new_columns):
        matrix = _cast_like(table, interpolation_matrix(columns, new_columns))
        table = xp.einsum("hrc,Cc->hrC", table, matrix)  # (heads, new_rows, new_columns)
    return table


def _cast_like(table: np.ndarray | Tensor, matrix: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Casts the matrix to the table's dtype, which their product then has on every backend."""
    if isinstance(table, np.ndarray):
        return matrix.astype(table.dtype)
    return ops.cast(matrix, table.dtype)


def spread_to_pairs(values: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Looks up the value of the offset between each query and each key.

    Args:
        values: tensor of shape (heads, 2 * height - 1, 2 * width - 1).
        height: height of the feature map, an int or an integer scalar tensor.
        width: width of the feature map, likewise.

    Returns:
        A tensor of shape (heads, queries, keys), where queries = keys = height * width.
    """
    xp = _array_module(height, width)
    row, column = xp.arange(height, dtype="int32"), xp.arange(width, dtype="int32")
    # Offsets of the key from the query, counted from 0.
    down = row[None, :] - row[:, None] + (height - 1)  # (query rows, key rows)
    right = column[None, :] - column[:, None] + (width - 1)  # (query columns, key columns)
    # (query rows, query columns, key rows, key columns)
    index = down[:, None, :, None] * (2 * width - 1) + right[None, :, None, :]
    num_heads, positions = values.shape[0], height * width
    # Along a single axis, because the gradient of such a gather is dense on every backend.
    pairs = ops.take(ops.reshape(values, (num_heads, -1)), xp.reshape(index, (-1,)), axis=1)
    return ops.reshape(pairs, (num_heads, positions, positions))


@keras.saving.register_keras_serializable(PACKAGE)
class RelativePositionTable(keras.layers.Layer):
    """A trainable bias for each head and offset (equation 3 of the paper).

    Args:
        num_heads: number of attention heads.
        table_size: (height, width) of the feature map that the table is made for. The table is
            resized bilinearly when the layer is called for a map of another size, and when weights
            for another size are loaded.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Call arguments, by keyword: `height` and `width` of the feature map, ints or integer scalar
    tensors.
    Output shape: `(num_heads, height * width, height * width)`, queries before keys.

    Raises:
        ValueError: an argument is not a whole number, or a pair of them, of at least 1.

    Example:
        >>> RelativePositionTable(4, (7, 7))(height=2, width=3).shape == (4, 6, 6)
        True
    """

    def __init__(self, num_heads: int, table_size: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = whole_number("num_heads", num_heads)
        self.table_size = two_whole_numbers("table_size", table_size)
        self.build()

    def build(self, input_shape: Shape | None = None) -> None:
        height, width = self.table_size
        self.table = self.add_weight(
            name="table",
            shape=(self.num_heads, 2 * height - 1, 2 * width - 1),
            initializer=kernel_initializer(),
        )
        self.built = True

    def call(self, height: int | Tensor, width: int | Tensor) -> Tensor:
        table = self.values_of(height, width)  # (heads, 2 * height - 1, 2 * width - 1)
        return spread_to_pairs(table, height, width)  # (heads, queries, keys)

    def values_of(self, height: int | Tensor, width: int | Tensor) -> Tensor:
        """Returns the bias of each offset, `(num_heads, 2 * height - 1, 2 * width - 1)`.

        Args:
            height: height of the feature map.
            width: width of the feature map.
        """
        return resize_table(ops.convert_to_tensor(self.table), height, width)

    def load_own_variables(self, store: Any) -> None:
        saved = {key: np.asarray(store[key]) for key in store.keys()}
        table = saved.get("0")
        # If this is not a table of another size, Keras refuses it.
        if table is not None and table.ndim == 3 and len(table) == self.num_heads:
            saved["0"] = resize_table(table, *self.table_size)
        super().load_own_variables(saved)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_heads": self.num_heads, "table_size": self.table_size}


@keras.saving.register_keras_serializable(PACKAGE)
class RelativePositionMLP(CompositeLayer):
    """A bias for each head, computed from log-spaced offsets for a map of any size.

    A vertical and a horizontal offset, each as `sign(d) * ln(1 + |d|)`, are the input of two dense
    layers, whose output is one value for each head. timm's `rmlp` networks have it, after Swin V2
    (Liu et al., 2022).

    Args:
        num_heads: number of attention heads.
        hidden_dim: number of hidden units.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Call arguments, by keyword: `height` and `width` of the feature map, ints or integer scalar
    tensors.
    Output shape: `(num_heads, height * width, height * width)`, queries before keys.

    Raises:
        ValueError: an argument is not a whole number, or a pair of them, of at least 1.

    Example:
        >>> RelativePositionMLP(4, hidden_dim=16)(height=2, width=3).shape == (4, 6, 6)
        True
    """

    def __init__(self, num_heads: int, hidden_dim: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = whole_number("num_heads", num_heads)
        self.hidden_dim = whole_number("hidden_dim", hidden_dim)
        self.build()

    def build(self, input_shape: Shape | None = None) -> None:
        hidden_dim = self.hidden_dim
        self.hidden = self.build_dense("hidden", hidden_dim, (None, None, 2), activation="relu")
        self.values = self.build_dense("values", self.num_heads, (None, None, hidden_dim))
        self.built = True

    def call(self, height: int | Tensor, width: int | Tensor) -> Tensor:
        return spread_to_pairs(self.values_of(height, width), height, width)

    def values_of(self, height: int | Tensor, width: int | Tensor) -> Tensor:
        """Returns the bias of each offset, `(num_heads, 2 * height - 1, 2 * width - 1)`.

        Args:
            height: height of the feature map.
            width: width of the feature map.
        """
        rows, columns = 2 * height - 1, 2 * width - 1
        down = ops.broadcast_to(_log_offsets(height)[:, None], (rows, columns))
        right = ops.broadcast_to(_log_offsets(width)[None, :], (rows, columns))
        offsets = ops.stack([down, right], axis=-1)  # (rows, columns, 2)

        hidden = self.hidden(ops.cast(offsets, self.compute_dtype))  # (rows, columns, hidden_dim)
        return ops.transpose(self.values(hidden), (2, 0, 1))  # (heads, rows, columns)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_heads": self.num_heads, "hidden_dim": self.hidden_dim}


def _log_offsets(size: int | Tensor) -> Tensor:
    """Returns `sign(d) * ln(1 + |d|)` of d = -(size - 1) .. size - 1, float32, (2 * size - 1,)."""
    xp = _array_module(size)
    offsets = xp.arange(2 * size - 1, dtype="float32") - (
        size - 1 if xp is np else ops.cast(size - 1, "float32")
    )
    return ops.convert_to_tensor(xp.sign(offsets) * xp.log1p(xp.abs(offsets)))
