"""Normalization layers, synchronized where a distribution strategy has several replicas."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_coatnet.layers.base import PACKAGE


def replicas_in_sync() -> int:
    """How many replicas the TensorFlow strategy in scope has; 1 on the other backends."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


@keras.saving.register_keras_serializable(PACKAGE)
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, as one operation on TensorFlow.

    Keras computes mean, variance and output one after the other, and differentiates through each;
    TensorFlow's own batch normalization takes a third of the time and a fraction of the memory.
    It is used for channels-last maps, but not to train several replicas in step; everything else
    is Keras's layer.

    Whether replicas are synchronized is decided where the layer is built, by the strategy in whose
    scope that is, and is no part of the configuration: without synchronization the moving
    statistics of the replicas drift apart, and a file that was saved under a strategy must load
    without one, and the other way round.

    Args:
        **kwargs: `keras.layers.BatchNormalization`'s own arguments. `synchronized`, which older
            files have among them, has no effect.

    Input and output shape: as `keras.layers.BatchNormalization`'s.

    Example:
        >>> BatchNormalization()(keras.ops.ones((2, 7, 7, 8)), training=True).shape == (2, 7, 7, 8)
        True
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "synchronized": False})

    def build(self, input_shape: tuple) -> None:
        self.synchronized = replicas_in_sync() > 1
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["synchronized"]
        return config

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        training = bool(training and self.trainable)
        if mask is not None or not self._is_one_operation(inputs, training):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        # It takes half precision for the map alone: under a policy that stores variables so, too,
        # they are cast, and moving statistics computed in float32.
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
            # It divides the sum of squares by n - 1 for the moving average, and Keras by n.
            count = ops.cast(ops.size(inputs) // inputs.shape[-1], variance.dtype)
            variance = variance * (ops.maximum(count - 1, 1) / count)
            share = 1 - self.momentum
            self.moving_mean.assign(moving_mean * self.momentum + mean * share)
            self.moving_variance.assign(moving_variance * self.momentum + variance * share)
        return ops.cast(outputs, self.compute_dtype)

    def _is_one_operation(self, inputs: Any, training: bool) -> bool:
        """Whether TensorFlow's own batch normalization computes what Keras's would."""
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


def batch_norm_options(epsilon: float, momentum: float) -> dict[str, float]:
    """Arguments of a `BatchNormalization` over channels-last maps.

    Args:
        epsilon: added to the variance.
        momentum: of the moving statistics, in Keras's sense: the share of the old value.

    Returns:
        Keyword arguments.
    """
    return {"epsilon": epsilon, "momentum": momentum}


def norm_options(kind: str, epsilon: float, momentum: float) -> tuple[type, dict]:
    """Class and arguments of a Transformer block's norm.

    Args:
        kind: `"layer"` or `"batch"`.
        epsilon: added to the variance.
        momentum: of BatchNorm's moving statistics.

    Returns:
        A layer class and its keyword arguments.
    """
    if kind == "layer":
        return keras.layers.LayerNormalization, {"epsilon": epsilon}
    return BatchNormalization, batch_norm_options(epsilon, momentum)
