"""Stochastic depth (Huang et al., 2016), per sample."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import number, whole_number
from keras_coatnet.layers.base import PACKAGE


def _replica() -> tuple[int, Any]:
    """How many replicas of a `tf.distribute` strategy run this, and which of them this is."""
    if keras.backend.backend() != "tensorflow":
        return 1, 0
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None:  # a model is built or saved in a strategy's scope
        return 1, 0
    return context.num_replicas_in_sync, context.replica_id_in_sync_group


@keras.saving.register_keras_serializable(PACKAGE)
class StochasticDepth(keras.layers.Layer):
    """Drops whole samples of a residual branch in training, and scales the others up.

    Replicas of a `tf.distribute` strategy make the draws of their global batch and use those of
    their own part of it, so that the same samples are dropped on one device and on several. Their
    batches must be of one size for that.

    Args:
        rate: probability that a sample is dropped, 0 <= rate < 1.
        seed: a whole number of at least 0, or None; the seed of the draws.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: `(batch, ...)`.

    Raises:
        ValueError: `rate` or `seed` is out of range.

    Example:
        >>> branch = keras.ops.ones((2, 4, 4, 8))
        >>> StochasticDepth(0.2)(branch, training=False).shape == (2, 4, 4, 8)
        True
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = number("rate", rate, least=0, below=1)
        self.seed = None if seed is None else whole_number("seed", seed, least=0)
        if self.rate > 0:
            self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        if not training or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        draws = self._draws((ops.shape(x)[0],) + (1,) * (len(x.shape) - 1))
        return x * ops.cast(ops.where(draws < keep, 1.0 / keep, 0.0), x.dtype)

    def _draws(self, shape: tuple) -> Any:
        """A number from 0 to 1 for each sample, float32."""
        replicas, replica = _replica()
        batch, *ones = shape
        draws = keras.random.uniform(
            (batch * replicas, *ones), dtype="float32", seed=self.seed_generator
        )
        if replicas == 1:
            return draws
        return ops.slice(draws, (replica * batch, *([0] * len(ones))), shape)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}
