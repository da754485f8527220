"""Batch normalization, synchronized between the replicas of a distribution strategy."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.layers.base import PACKAGE
from keras_coatnet.types import Shape, Tensor


def replicas_in_sync() -> int:
    """Returns the number of replicas of the TensorFlow strategy in scope; 1 on other backends."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


@keras.saving.register_keras_serializable(PACKAGE)
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, computed by a single operation on TensorFlow.

    Keras computes mean, variance and output by separate operations, and differentiates through
    each. TensorFlow's fused batch normalization takes a third of the time and a fraction of the
    memory. This layer uses it for channels-last feature maps. In all other cases, and to train
    several synchronized replicas, it computes what Keras's layer does.

    The layer is synchronized if it is built in the scope of a strategy with several replicas;
    otherwise their moving statistics would drift apart. This is not part of the configuration, so
    that a file saved under a strategy loads without one, and vice versa.

    Args:
        **kwargs: `keras.layers.BatchNormalization`'s own arguments; `synchronized` has no effect.

    Input and output shape: as `keras.layers.BatchNormalization`'s.

    Example:
        >>> BatchNormalization()(keras.ops.ones((2, 7, 7, 8)), training=True).shape == (2, 7, 7, 8)
        True
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "synchronized": False})

    def build(self, input_shape: Shape) -> None:
        self.synchronized = replicas_in_sync() > 1
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["synchronized"]
        return config

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        training = bool(training and self.trainable)
        if mask is not None or not self._can_use_fused_operation(inputs, training):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        # The operation takes a half-precision map, but only float32 variables, which are cast in
        # case that the dtype policy stores them in half precision.
        scale, offset, moving_mean, moving_variance = (
            ops.cast(variable, "float32")
            for variable in (self.gamma, self.beta, self.moving_mean, self.moving_variance)
        )
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=scale,
            offset=offset,
            mean=tf.constant([]) if training else moving_mean,
            variance=tf.constant([]) if training else moving_variance,
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            # The operation returns the variance with divisor n - 1; Keras's moving variance has n.
            count: Tensor = tf.cast(ops.size(inputs) // inputs.shape[-1], variance.dtype)
            variance = variance * (tf.maximum(count - 1, 1) / count)
            mean = self._moving_average(moving_mean, mean)
            variance = self._moving_average(moving_variance, variance)
            self.moving_mean.assign(mean)  # pyright: ignore[reportOptionalMemberAccess]  # built
            self.moving_variance.assign(variance)  # pyright: ignore[reportOptionalMemberAccess]  # built
        return ops.cast(outputs, self.compute_dtype)

    def _moving_average(self, old: Tensor, new: Tensor) -> Tensor:
        return old * self.momentum + new * (1 - self.momentum)

    def _can_use_fused_operation(self, inputs: Tensor, training: bool) -> bool:
        """Whether TensorFlow's fused batch normalization computes the same as Keras's layer."""
        return (
            keras.backend.backend() == "tensorflow"
            and keras.backend.standardize_dtype(inputs.dtype) != "float64"
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.scale
            and self.center
            and not self.renorm
            and not (training and self.synchronized)
        )


def norm_options(
    kind: str, epsilon: float, momentum: float
) -> tuple[type[keras.layers.LayerNormalization | BatchNormalization], dict[str, Any]]:
    """Returns the class and the keyword arguments of a Transformer block's normalization.

    Args:
        kind: `"layer"` or `"batch"`.
        epsilon: added to the variance.
        momentum: weight of the old value in the moving statistics of `BatchNormalization`.

    Returns:
        The layer class and its keyword arguments.
    """
    if kind == "layer":
        return keras.layers.LayerNormalization, {"epsilon": epsilon}
    return BatchNormalization, {"epsilon": epsilon, "momentum": momentum}
