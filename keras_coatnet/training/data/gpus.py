"""Keeps TensorFlow, which reads the data on every backend, from taking GPU memory."""

from __future__ import annotations

import warnings

import keras


def keep_tensorflow_off_gpus() -> None:
    """Hides the GPUs from TensorFlow if Keras computes with another backend.

    Otherwise TensorFlow would take the GPUs' memory only to read data. Call it before TensorFlow
    computes anything: it warns if TensorFlow holds GPUs already. It does nothing on the TensorFlow
    backend.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        warnings.warn(
            "TensorFlow, which reads the data, has already taken memory of the GPUs that "
            f"{backend} needs. Call tf.config.set_visible_devices([], 'GPU') right after the "
            "import of tensorflow.",
            stacklevel=3,
        )
