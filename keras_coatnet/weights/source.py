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
from keras_coatnet.paths import check_local
from keras_coatnet.weights import foreign_files, keras_files, pickles, registry, timm_layout
from keras_coatnet.weights.assign import assign

SUFFIXES = (*keras_files.SUFFIXES, *foreign_files.LAYOUTS)
_OF_A_RUN = ("final.weights.h5", "best.weights.h5")  # what `train` writes, the one to prefer first


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
    if path.name.endswith(keras_files.SUFFIXES):
        return _keras_source(path, candidates, asker)
    return _foreign_source(path, candidates, asker)


def find_file(weights: str | os.PathLike) -> pathlib.Path | None:
    """Finds the file that a `weights` argument means, and sees that it may be read.

    Args:
        weights: as of `find_source`.

    Returns:
        The path of a file whose name ends in one of `SUFFIXES`; None: it is a name, which
        `registry.find` may know.

    Raises:
        ValueError: it is empty, a remote address, a folder, a missing file, a file of another
            kind, or one that may not be read.
    """
    check_local(weights, "weights", names="hf://")
    # A name is a name, whatever files and folders there are.
    if isinstance(weights, str) and registry.is_name(weights):
        return None
    path = pathlib.Path(weights)
    if _is_file(path):
        if path.name.endswith(pickles.SUFFIXES):
            raise pickles.refusal(path)
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"A file of weights must end in {', '.join(SUFFIXES)}: as Keras saves them, as "
                f"timm, or as keras_cv_attention_models does. Received: weights={str(weights)!r}"
            )
        _check_readable(path)
        return path
    if path.name.endswith(SUFFIXES) or os.path.exists(path) or not isinstance(weights, str):
        instead, advice = _instead_of_a_file(path)
        raise ValueError(
            f"There is no file of that name{instead}. Received: weights={str(weights)!r}. {advice}"
        )
    return None


def _check_readable(path: pathlib.Path) -> None:
    """Tells a file that is not the user's to read from a damaged one."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"The file {path} cannot be read: {error.strerror}. Give a file that you may read."
        ) from error


def _instead_of_a_file(path: pathlib.Path) -> tuple[str, str]:
    """What there is of that name, and what to give."""
    advice = (
        f"Give a file that ends in {', '.join(SUFFIXES)}, or one of the names of "
        "keras_coatnet.checkpoints()."
    )
    if not os.path.isdir(path):
        return ", but a device or a pipe" * os.path.exists(path), advice
    held = [path / name for name in _OF_A_RUN if (path / name).is_file()]
    if not held and not (path / "recipe.json").is_file():
        return ", but a folder", advice
    if not held:
        advice = f"It holds no weights yet: neither {' nor '.join(_OF_A_RUN)}. Let the run end."
    elif held[0].name == _OF_A_RUN[0]:
        advice = f"Give {held[0]}, or, to evaluate, --run {path}"
    else:
        advice = f"Give {held[0]}, its best so far."
    return ", but a folder, the folder of a run", advice


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ValueError(
            f"There is no file of that name: {error.strerror}. Received: weights={str(path)!r}"
        ) from error


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
        _check_offered(str(path), architecture, candidates, asker)

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
    _check_offered(checkpoint.name, architecture, candidates, asker)

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


def _check_offered(
    name: str, architecture: CoAtNetConfig, candidates: Sequence[CoAtNetConfig], asker: str
) -> None:
    if not any(architecture.same_network(candidate) for candidate in candidates):
        known = [n for n, config in ARCHITECTURES.items() if architecture.same_network(config)]
        if not known:
            raise ValueError(
                f"The weights {name} belong to a network without a name, and {asker} builds another "
                f"one. Use CoAtNet(config, weights=...) with config={architecture}."
            )
        raise ValueError(
            f"The weights {name} belong to the architecture {known[0]!r}, and {asker} builds another "
            f"one. Use CoAtNet({known[0]!r}, weights=...)."
        )


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
