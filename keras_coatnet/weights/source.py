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
        return _named_source(registry.find(str(weights), size), candidates, asker)
    if path.name.endswith(KERAS_SUFFIXES):
        return _keras_source(path, candidates, asker)
    return _foreign_source(path, candidates, asker)


def _keras_source(path: pathlib.Path, candidates: Sequence[CoAtNetConfig], asker: str) -> Source:
    identity = keras_files.read_identity(path)
    if identity is not None and identity.fused:
        raise ValueError(
            f"{path} holds the weights of a model that `fuse` made, which fit no other. Give the "
            "file of the model before it was fused; or load this one with "
            "fuse(model).load_weights(path), or, as a whole .keras file, with "
            "keras.saving.load_model(path)."
        )
    preprocessing = None
    if identity is None:
        architecture, classes, channels = candidates[0], None, None
    else:
        architecture, classes = identity.architecture, identity.classes or 0
        channels, preprocessing = identity.channels, identity.include_preprocessing
        check_offered(str(path), architecture, candidates, asker)

    def load(model: keras.Model, fresh: str | None) -> None:
        keras_files.load(model, path, fresh, identity)

    return Source(str(path), architecture, classes, channels, load, preprocessing)


def _foreign_source(path: pathlib.Path, candidates: Sequence[CoAtNetConfig], asker: str) -> Source:
    tensors = foreign_files.read(path)
    try:
        shown = foreign_files.LAYOUTS[path.suffix].describe(tensors)
    except (ValueError, IndexError) as error:  # of names and shapes that no CoAtNet has
        raise ValueError(f"{path} does not hold the weights of a CoAtNet: {error}") from error
    fitting = [
        config
        for config in candidates
        if all(getattr(config, field) == value for field, value in shown.items())
    ]
    if not fitting:
        _refuse(str(path), shown, asker)
    values = _translated(path, tensors, fitting[0])
    classifier, stem = values.get("predictions/kernel"), values.get("stem_conv1/kernel")
    return Source(
        name=str(path),
        architecture=fitting[0],
        classes=classifier.shape[-1] if classifier is not None and classifier.ndim else 0,
        channels=None if stem is None or stem.ndim != 4 else stem.shape[2],
        load=lambda model, fresh: assign(model, values, str(path), fresh),
    )


def _named_source(
    checkpoint: registry.Checkpoint, candidates: Sequence[CoAtNetConfig], asker: str
) -> Source:
    architecture = ARCHITECTURES[checkpoint.architecture].replace(input_size=checkpoint.input_size)
    check_offered(checkpoint.name, architecture, candidates, asker)

    def load(model: keras.Model, fresh: str | None) -> None:
        from keras_coatnet.weights.fetch import fetch

        path = fetch(checkpoint)
        values = _translated(path, foreign_files.read(path), architecture)
        assign(model, values, checkpoint.name, fresh)

    return Source(checkpoint.name, architecture, checkpoint.classes, 3, load)


def _translated(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], config: CoAtNetConfig
) -> dict[str, np.ndarray]:
    layout = foreign_files.LAYOUTS[path.suffix]
    options = {"head_dim": config.head_dim} if layout is timm_layout else {}
    try:
        values, unknown = layout.translate(tensors, **options)
    except ValueError as error:
        raise ValueError(f"{path} does not hold the weights of a CoAtNet: {error}") from error
    if unknown:
        shown = ", ".join(unknown[:8]) + (" ..." if len(unknown) > 8 else "")
        raise ValueError(
            f"{path} holds values that its layout does not have: {shown}. It is not the file of a "
            "CoAtNet, or of a later version."
        )
    return values


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
