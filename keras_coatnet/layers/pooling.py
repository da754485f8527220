"""Pooling of stride 2."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import choice
from keras_coatnet.layers.base import PACKAGE

POOLS = ("max2", "avg2", "max3")


@keras.saving.register_keras_serializable(PACKAGE)
class Downsample(keras.layers.Layer):
    """Halves a feature map by pooling, rounding odd sizes up.

    Args:
        pool: `"max2"` or `"avg2"`: over 2x2 windows; `"max3"`: the maximum over 3x3 windows that
            stand symmetrically about every other position, as torch pads them.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / 2), ceil(width / 2), channels)`.

    Raises:
        ValueError: there is no such pooling.

    Example:
        >>> Downsample("max2")(keras.ops.ones((1, 7, 8, 3))).shape == (1, 4, 4, 3)
        True
    """

    def __init__(self, pool: str = "max2", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pool = choice("pool", pool, POOLS)
        self.built = True

    def call(self, x: Any) -> Any:
        layout = {"strides": 2, "data_format": "channels_last"}
        if self.pool == "max2":
            return ops.max_pool(x, 2, padding="same", **layout)
        if self.pool == "avg2":
            # A sum of four may be beyond float16 where their mean is not.
            full = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
            return ops.cast(ops.average_pool(full, 2, padding="same", **layout), x.dtype)
        x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=float("-inf"))
        return ops.max_pool(x, 3, padding="valid", **layout)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return halved(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pool": self.pool}


def halved(shape: tuple, width: int | None = None, strides: int = 2) -> tuple:
    """Shape of a channels-last map after a stride, rounding odd sizes up.

    Args:
        shape: `(batch, height, width, channels)`, with None where a size is unknown.
        width: channels afterwards; None: as before.
        strides: 2 or 1.

    Returns:
        The shape afterwards.
    """
    sizes = tuple(size and -(-size // strides) for size in shape[1:3])
    return (shape[0], *sizes, shape[3] if width is None else width)
