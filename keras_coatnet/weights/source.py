"""From the `weights` argument to a file, the network that it belongs to, and how to load it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import keras

from keras_coatnet.config import ARCHITECTURES, CoAtNetConfig, size_of
from keras_coatnet.weights import keras_files


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were found, and what they are made for.

    Attributes:
        name: what error messages call them.
        architecture: the network that they belong to.
        classes: outputs of the classifier they bring; 0 if they bring none, None if that shows
            only in loading.
        load: loads them into a model; the classifier is left as it is where the second argument
            is true. Raises ValueError if they do not fit, before anything is changed.
    """

    name: str
    architecture: CoAtNetConfig
    classes: int | None
    load: Callable[[keras.Model, bool], None]


def find_source(
    weights: str | os.PathLike, candidates: Sequence[CoAtNetConfig], asker: str
) -> Source:
    """Finds the weights that a `weights` argument means.

    Args:
        weights: the path of a `.weights.h5` or `.keras` file.
        candidates: the networks that the caller may build, the one it builds by default first.
        asker: what error messages call the caller, e.g. `"CoAtNet0"`.

    Returns:
        A `Source`, whose architecture is one of the candidates.

    Raises:
        ValueError: there is no such file, it is none of these formats, or its weights belong to
            another network.
    """
    path = pathlib.Path(weights)
    if not path.is_file():
        raise ValueError(
            "`weights` must be None or the path of a .weights.h5 or .keras file; there is no file "
            f"of that name. Received: weights={str(weights)!r}"
        )
    if not path.name.endswith(keras_files.SUFFIXES):
        raise ValueError(
            "A file of weights must end in .weights.h5 or .keras, as Keras saves them. "
            f"Received: weights={str(weights)!r}"
        )
    return _keras_source(path, candidates, asker)


def _keras_source(
    path: pathlib.Path, candidates: Sequence[CoAtNetConfig], asker: str
) -> Source:
    identity = keras_files.read_identity(path)
    if identity is None:
        architecture, classes = candidates[0], None
    else:
        architecture, classes = identity.architecture, identity.classes or 0
        check_offered(str(path), architecture, candidates, asker)
    return Source(
        name=str(path),
        architecture=architecture,
        classes=classes,
        load=lambda model, fresh_head: keras_files.load(model, path, fresh_head),
    )


def check_offered(
    name: str, architecture: CoAtNetConfig, candidates: Sequence[CoAtNetConfig], asker: str
) -> None:
    """Refuses weights of a network that the caller does not build.

    Args:
        name: what to call the weights.
        architecture: the network that they belong to.
        candidates: the networks that the caller may build.
        asker: what to call the caller.

    Raises:
        ValueError: the network is none of the candidates.
    """
    if any(architecture.same_network(candidate) for candidate in candidates):
        return
    for known, config in ARCHITECTURES.items():
        if architecture.same_network(config):
            size = size_of(known).replace("coatnet", "CoAtNet").replace("_nano", "Nano")
            raise ValueError(
                f"The weights {name} belong to the architecture {known!r}, which {asker} as it "
                f"was called does not build. Use keras_coatnet.{size}(weights=...) or "
                f"keras_coatnet.CoAtNet({known!r}, weights=...)."
            )
    raise ValueError(
        f"The weights {name} belong to a network of its own, which {asker} as it was called does "
        f"not build. Use keras_coatnet.CoAtNet(config, weights=...) with config={architecture}"
    )
