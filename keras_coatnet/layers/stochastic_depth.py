"""Stochastic depth (Huang et al., 2016), per sample."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import number, whole_number
from keras_coatnet.layers.base import PACKAGE
from keras_coatnet.types import Shape, Tensor


def _replica() -> tuple[int, int | Tensor]:
    """Returns the number of replicas of the `tf.distribute` strategy, and this replica's index."""
    if keras.backend.backend() != "tensorflow":
        return 1, 0
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None:  # building or saving a model in the scope of a strategy
        return 1, 0
    return context.num_replicas_in_sync, context.replica_id_in_sync_group


@keras.saving.register_keras_serializable(PACKAGE)
class StochasticDepth(keras.layers.Layer):
    """Drops the residual branch of random samples in training, and scales up the others.

    Each replica of a `tf.distribute` strategy draws for the whole global batch and uses the part of
    its own samples. A step thus drops the same samples on one device as on several, if all replicas
    have batches of the same size.

    Args:
        rate: probability that a sample is dropped, at least 0 and below 1.
        seed: seed of the random draws, a whole number of at least 0; None: a random one.
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

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        if not training or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        batch_size = ops.shape(x)[0]  # pyright: ignore[reportOptionalSubscript]  # never None
        draws = self._draws((batch_size,) + (1,) * (len(x.shape) - 1))  # (batch, 1, ...)
        return x * ops.cast(ops.where(draws < keep, 1.0 / keep, 0.0), x.dtype)

    def _draws(self, shape: tuple) -> Tensor:
        """Returns a random number from 0 to 1 for each sample, float32."""
        num_replicas, replica = _replica()
        batch_size, *ones = shape
        draws = keras.random.uniform(
            (batch_size * num_replicas, *ones), dtype="float32", seed=self.seed_generator
        )
        if num_replicas == 1:
            return draws
        return ops.slice(draws, (replica * batch_size, *([0] * len(ones))), shape)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}
