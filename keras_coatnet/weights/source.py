"""Finds the weights that a `weights` argument means, their network, and how to load them.

`lookup` has the parts that need no Keras.
"""

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
    """Weights, and the network that they belong to.

    Attributes:
        name: their name in error messages.
        architecture: the network that they belong to.
        classes: outputs of their classifier; 0 if they have none, None if not known before loading.
        channels: channels of the images of their network; None if not known before loading.
        load: a function that loads them into a model. Its second argument is what keeps its values:
            None, the `"classifier"`, or the whole `"head"`. It raises ValueError if they do not
            fit.
        include_preprocessing: whether their network takes raw pixels; None if not known.
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
    caller: str,
) -> Source:
    """Finds the weights that a `weights` argument means. Nothing is fetched before `load`.

    Args:
        weights: `"imagenet"`, `"imagenet12k"`, `"imagenet12k_ft"`, a checkpoint's name, or the path
            of a `.weights.h5`, `.keras`, `.safetensors` or `.h5` file.
        candidates: the networks that the caller may build, its default first.
        size: the caller's size, e.g. `"coatnet0"`; None: it has none.
        caller: the name of the caller in error messages, e.g. `"CoAtNet0"`.

    Returns:
        A `Source`, whose architecture is one of the candidates.

    Raises:
        ValueError: there are no such weights, or they belong to another network.
    """
    path = find_file(weights)
    if path is None:
        return _named_source(registry.find(str(weights), size), candidates, caller)
    if path.name.endswith(KERAS_SUFFIXES):
        return _keras_source(path, candidates, caller)
    return _foreign_source(path, candidates, caller)


def _keras_source(path: pathlib.Path, candidates: Sequence[CoAtNetConfig], caller: str) -> Source:
    identity = keras_files.read_identity(path)
    if identity is not None and identity.fused:
        raise ValueError(
            f"{path} holds the weights of a model that `fuse` made, which fit no other. Give the "
            "file of the model before it was fused. Or load this one with "
            "fuse(model).load_weights(path) or, if it is a .keras file, with "
            "keras.saving.load_model(path)."
        )

    def load(model: keras.Model, random_part: str | None) -> None:
        keras_files.load(model, path, random_part, identity)

    if identity is None:
        return Source(str(path), candidates[0], None, None, load)
    check_offered(str(path), identity.architecture, candidates, caller)
    return Source(
        name=str(path),
        architecture=identity.architecture,
        classes=identity.classes or 0,
        channels=identity.channels,
        load=load,
        include_preprocessing=identity.include_preprocessing,
    )


def _foreign_source(path: pathlib.Path, candidates: Sequence[CoAtNetConfig], caller: str) -> Source:
    tensors = foreign_files.read(path)
    try:
        shown = foreign_files.LAYOUTS[path.suffix].describe(tensors)
    except (ValueError, IndexError) as error:  # from names and shapes that no CoAtNet has
        raise ValueError(f"{path} does not hold the weights of a CoAtNet: {error}") from error
    architecture = next((config for config in candidates if _has_fields(config, shown)), None)
    if architecture is None:
        raise _other_network(path, shown, caller)
    values = _translated(path, tensors, architecture)
    classifier, stem = values.get("predictions/kernel"), values.get("stem_conv1/kernel")
    return Source(
        name=str(path),
        architecture=architecture,
        classes=classifier.shape[-1] if classifier is not None and classifier.ndim else 0,
        channels=None if stem is None or stem.ndim != 4 else stem.shape[2],
        load=lambda model, random_part: assign(model, values, str(path), random_part),
    )


def _named_source(
    checkpoint: registry.Checkpoint, candidates: Sequence[CoAtNetConfig], caller: str
) -> Source:
    architecture = ARCHITECTURES[checkpoint.architecture].replace(input_size=checkpoint.input_size)
    check_offered(checkpoint.name, architecture, candidates, caller)

    def load(model: keras.Model, random_part: str | None) -> None:
        from keras_coatnet.weights.fetch import fetch

        path = fetch(checkpoint)
        values = _translated(path, foreign_files.read(path), architecture)
        assign(model, values, checkpoint.name, random_part)

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
            f"{path} holds values that are unknown in its layout: {shown}. Expected the weights of "
            "a CoAtNet alone. Give another file."
        )
    return values


def _has_fields(config: CoAtNetConfig, fields: Mapping[str, object]) -> bool:
    return all(getattr(config, field) == value for field, value in fields.items())


def _other_network(path: pathlib.Path, shown: Mapping[str, object], caller: str) -> ValueError:
    fitting = [name for name, config in ARCHITECTURES.items() if _has_fields(config, shown)]
    advice = (
        f"They fit CoAtNet({fitting[0]!r}, weights=...)."
        if fitting
        else "No architecture of keras_coatnet.architectures() has these fields. For a network of "
        "your own use CoAtNet(config, weights=...)."
    )
    return ValueError(
        f"The weights in {path} do not belong to the network that {caller} builds. Their network "
        f"has {', '.join(f'{field}={value!r}' for field, value in shown.items())}. {advice}"
    )
