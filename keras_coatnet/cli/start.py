"""From the light start of the command to the whole package."""

from __future__ import annotations


def load_package() -> None:
    """Imports Keras and all of `keras_coatnet`, so that its layers are registered.

    The command starts without them, see `keras_coatnet_command`. A `.keras` file can be loaded only
    after this call. It does nothing if the package was imported already.

    Raises:
        ImportError: Keras, its backend or TensorFlow cannot be imported.
    """
    try:
        from keras_coatnet import CoAtNet  # noqa: F401 -- a public name: runs `__init__`
    except ImportError as error:
        raise ImportError(
            f"Keras and TensorFlow cannot be imported: {error}. Expected what keras-coatnet "
            "depends on. Run: pip install --upgrade keras-coatnet"
        ) from error
