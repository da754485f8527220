"""Pooling that halves a feature map, and the shapes that result."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import choice
from keras_coatnet.layers.base import PACKAGE
from keras_coatnet.types import MapShape, Tensor

POOLS = ("max2", "avg2", "max3")


@keras.saving.register_keras_serializable(PACKAGE)
class Downsample(keras.layers.Layer):
    """Halves a feature map by pooling, rounding odd sizes up.

    Args:
        pool: `"max2"`: maximum over 2x2 windows; `"avg2"`: mean over 2x2 windows; `"max3"`: maximum
            over 3x3 windows, with the symmetric padding of torch.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input shape: `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / 2), ceil(width / 2), channels)`.

    Raises:
        ValueError: `pool` is none of these.

    Example:
        >>> Downsample("max2")(keras.ops.ones((1, 7, 8, 3))).shape == (1, 4, 4, 3)
        True
    """

    def __init__(self, pool: str = "max2", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pool = choice("pool", pool, POOLS)
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        layout = {"strides": 2, "data_format": "channels_last"}
        if self.pool == "max2":
            return ops.max_pool(x, 2, padding="same", **layout)
        if self.pool == "avg2":
            # The sum of four values can overflow float16 although their mean does not.
            full = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
            return ops.cast(ops.average_pool(full, 2, padding="same", **layout), x.dtype)
        x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=float("-inf"))
        return ops.max_pool(x, 3, padding="valid", **layout)

    def compute_output_shape(self, input_shape: MapShape) -> MapShape:
        return halved(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pool": self.pool}


def halved(shape: MapShape, filters: int | None = None, strides: int = 2) -> MapShape:
    """Returns the shape of a feature map after a stride, rounding odd sizes up.

    Args:
        shape: `(batch, height, width, channels)`, with None where a size is unknown.
        filters: number of channels after the stride; None: as before.
        strides: 2, or 1 to leave height and width as they are.

    Returns:
        The shape after the stride.
    """
    batch, height, width, channels = shape
    return (
        batch,
        height and -(-height // strides),
        width and -(-width // strides),
        channels if filters is None else filters,
    )
