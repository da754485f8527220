"""Reading `.weights.h5` and `.keras` files, and which network they belong to."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
import zipfile
from typing import Any

import keras

from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.model import IDENTITY

SUFFIXES = (".weights.h5", ".keras")


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which network a file belongs to: the attributes of a `CoAtNetModel`."""

    architecture: CoAtNetConfig
    include_preprocessing: bool
    classes: int | None
    channels: int


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
        if found is None:
            return None
        return Identity(**{**found, "architecture": CoAtNetConfig.from_dict(found["architecture"])})
    except (OSError, KeyError, TypeError, json.JSONDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged, or no file that Keras saved: {error}. Save it again."
        ) from error


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
