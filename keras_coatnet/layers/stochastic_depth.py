"""Stochastic depth (Huang et al., 2016), per sample."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.layers.base import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class StochasticDepth(keras.layers.Layer):
    """Drops whole samples of a residual branch in training, and scales the others up.

    Args:
        rate: probability that a sample is dropped, 0 <= rate < 1.
        seed: an int or None; the seed of the draws.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: `(batch, ...)`.

    Raises:
        ValueError: `rate` is out of range.

    Example:
        >>> branch = keras.ops.ones((2, 4, 4, 8))
        >>> StochasticDepth(0.2)(branch, training=False).shape == (2, 4, 4, 8)
        True
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be at least 0 and below 1. Received: rate={rate!r}")
        self.rate = rate
        self.seed = seed
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        if not training or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        draws = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        return x * ops.cast(ops.where(draws < keep, 1.0 / keep, 0.0), x.dtype)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}
