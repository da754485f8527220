"""Reading `.weights.h5` and `.keras` files, and which network they belong to."""

from __future__ import annotations

import json
import pathlib
import warnings
import zipfile
from typing import Any

import keras

from keras_coatnet.model import IDENTITY, Identity

SUFFIXES = (".weights.h5", ".keras")


def read_identity(path: pathlib.Path) -> Identity | None:
    """Reads which network the weights in a file belong to.

    Args:
        path: a `.weights.h5` or `.keras` file.

    Returns:
        An `Identity`, or None if the file was not saved from one of this package's models.

    Raises:
        ValueError: the file is damaged, or no file of that kind.
    """
    try:
        found = _identity_of_archive(path) if path.suffix == ".keras" else _identity_of_h5(path)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged, or no file that Keras saved: {error}. Save it again."
        ) from error
    try:
        return None if found is None else Identity.from_dict(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _identity_of_archive(path: pathlib.Path) -> dict[str, Any] | None:
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    return config["config"].get(IDENTITY)


def _identity_of_h5(path: pathlib.Path) -> dict[str, Any] | None:
    import h5py

    with h5py.File(path) as file:
        text = file.attrs.get(IDENTITY)
    return None if text is None else json.loads(text)


def load(model: keras.Model, path: pathlib.Path, fresh: str | None) -> None:
    """Loads a file into a model.

    Args:
        model: a `CoAtNetModel`.
        path: a `.weights.h5` or `.keras` file.
        fresh: what is left as it is: None, the `"classifier"`, or the whole `"head"`.

    Raises:
        ValueError: the file's variables are not the model's.
    """
    # Keras matches layers by class and order: without the last ones, all others keep theirs.
    if fresh == "classifier":
        model = keras.Model(model.inputs, model.get_layer("predictions").input)
    elif fresh == "head":
        model = keras.Model(model.inputs, model.get_layer("avg_pool").input)
    try:
        with warnings.catch_warnings():
            # Keras warns of containers in which it only looks for layers a second time.
            warnings.filterwarnings("ignore", "Skipping nested container")
            model.load_weights(path)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"The weights in {path} do not fit the model that was asked for. Give the arguments "
            f"with which the saved model was built. Keras says: {error}"
        ) from error
