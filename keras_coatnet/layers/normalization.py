"""Normalisation layers, synchronised where a distribution strategy has several replicas."""

from __future__ import annotations

import keras


def replicas_in_sync() -> int:
    """How many replicas the TensorFlow strategy in scope has; 1 on the other backends."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def batch_norm_options(epsilon: float, momentum: float) -> dict[str, float | bool]:
    """Arguments of a `keras.layers.BatchNormalization` over channels-last maps.

    Without synchronisation the moving statistics of the replicas drift apart. It is decided where
    the layer is made, so that a model saved under one strategy loads under any other.

    Args:
        epsilon: added to the variance.
        momentum: of the moving statistics, in Keras's sense: the share of the old value.

    Returns:
        Keyword arguments.
    """
    return {"epsilon": epsilon, "momentum": momentum, "synchronized": replicas_in_sync() > 1}


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
    return keras.layers.BatchNormalization, batch_norm_options(epsilon, momentum)
