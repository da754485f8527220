"""From the `weights` argument to a file, the network that it belongs to, and how to load it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.weights import foreign_files, keras_files, registry, timm_layout
from keras_coatnet.weights.assign import assign
from keras_coatnet.weights.lookup import KERAS_SUFFIXES, check_offered, find_file


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were found, and what they are made for.

    Attributes:
        name: what error messages call them.
        architecture: the network that they belong to.
        classes: outputs of the classifier they bring; 0 if they bring none, None if that shows
            only in loading.
        channels: channels of the images they are made for; None if that shows only in loading.
        include_preprocessing: whether their network was saved for raw pixels; None if they do not
            say so.
        load: loads them into a model. The second argument says what is left as it is: None, the
            `"classifier"`, or the whole `"head"`. Raises ValueError if they do not fit.
    """

    name: str
    architecture: CoAtNetConfig
    classes: int | None
    channels: int | None
    load: Callable[[keras.Model, str | None], None]
    include_preprocessing: bool | None = None


def find_source(
    weights: str | os.PathLike,
    candidates: Sequence[CoAtNetConfig],
    size: str | None,
    asker: str,
) -> Source:
    """Finds the weights that a `weights` argument means. Nothing is fetched before `load`.

    Args:
        weights: `"imagenet"`, `"imagenet12k"`, `"imagenet12k_ft"`, a checkpoint's name, or the path
            of a `.weights.h5`, `.keras`, `.safetensors` or `.h5` file.
        candidates: the networks that the caller may build, the one it builds by default first.
        size: the caller's size, e.g. `"coatnet0"`; None: it has none.
        asker: what error messages call the caller, e.g. `"CoAtNet0"`.

    Returns:
        A `Source`, whose architecture is one of the candidates.

    Raises:
        ValueError: there are no such weights, or they belong to another network.
    """
    path = find_file(weights)
    if path is None:
def _refuse(name: str, shown: Mapping[str, object], asker: str) -> None:
    fitting = [
        known
        for known, config in ARCHITECTURES.items()
        if all(getattr(config, field) == value for field, value in shown.items())
    ]
    advice = (
        f"They fit CoAtNet({fitting[0]!r}, weights=...)."
        if fitting
        else "No architecture of keras_coatnet.architectures() is like that; for a network of your "
        "own use CoAtNet(config, weights=...)."
    )
    raise ValueError(
        f"The weights in {name} do not belong to the network that {asker} builds. "
        f"The file shows {', '.join(f'{field}={value!r}' for field, value in shown.items())}. "
        + advice
    )
