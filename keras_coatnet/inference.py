"""Opens a trained model and predicts the classes of images with it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_coatnet.applications import CoAtNet
from keras_coatnet.architectures import find_architecture
from keras_coatnet.arguments import whole_number
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.exporting.formats import is_exported
from keras_coatnet.exporting.loaded import ExportedModel, load_exported
from keras_coatnet.images import ImageSettings, load_image
from keras_coatnet.model_graph import (
    default_settings,
    gives_logits,
    normalization_before,
    pixel_statistics,
)
from keras_coatnet.weights import foreign_files, keras_files, registry
from keras_coatnet.weights.lookup import KERAS_SUFFIXES, find_file, unknown_architecture
from keras_coatnet.weights.source import find_source

# What predicts classes.
Classifier = keras.Model | ExportedModel

# Reading is mostly decompression, which Pillow does outside Python's lock.
_READERS = 4


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The scores of one image.

    Attributes:
        path: the image's file.
        scores: (classes,), a score for each class; None if the image cannot be read.
        error: why it cannot be read; None if it can.
    """

    path: pathlib.Path
    scores: np.ndarray | None = None
    error: str | None = None


# --- Models ----------------------------------------------------------------------------------


def open_model(
    weights: str | os.PathLike, architecture: str | CoAtNetConfig | None = None
) -> tuple[Classifier, ImageSettings]:
    """Opens a classifier by name or from a file, with the settings of its images.

    Args:
        weights: one of `keras_coatnet.checkpoints()`, which is downloaded if it is not in the
            cache; a whole model in a `.keras` file; what `keras_coatnet.export` wrote; or weights
            in a `.weights.h5`, `.safetensors` or `.h5` file.
        architecture: the network of a file of weights: one of `keras_coatnet.architectures()` or a
            `CoAtNetConfig`. Only files of other libraries need it, because files that this package
            saved name their network.

    Returns:
        The model, and the `ImageSettings` that its accuracy was measured with (for a file, the
        input size of the model and the defaults). The model takes raw pixels, unless it was saved
        from a CoAtNet with include_preprocessing=False, which `class_scores` and `predict_images`
        handle.

    Raises:
        ValueError: there is no such checkpoint or file, it cannot be loaded, its network is
            unknown, or it has no classifier.

    Example, which needs a network or a cached file:
        model, settings = open_model("coatnet_0_rw_224.sw_in1k")
    """
    if is_exported(weights) and not registry.is_name(str(weights)):  # names go before files
        exported = load_exported(weights)
        if exported.image_settings is None:
            raise ValueError(
                f"{weights} does not take RGB images, but batches of shape {exported.input_shape}."
            )
        return exported, exported.image_settings
    path = find_file(weights)
    if path is None:
        return _open_checkpoint(str(weights), architecture)
    if path.suffix == ".keras":
        model = _load_whole_model(path)
        return model, default_settings(model)
    config = _architecture_of(path) if architecture is None else architecture
    if find_source(weights, [find_architecture(config)], None, "open_model").classes == 0:
        raise ValueError(
            f"{path} brings no classifier, so nothing can be predicted with it. Give weights saved "
            "with include_top=True."
        )
    model = CoAtNet(config, weights=weights)
    return model, default_settings(model)


def _load_whole_model(path: pathlib.Path) -> keras.Model:
    keras_files.read_identity(path)  # refuses what is not safe to load
    try:
        model: Any = keras.saving.load_model(path, compile=False)
    except Exception as error:  # of any type: Keras passes on what a layer raises
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    return model


def _open_checkpoint(
    name: str, architecture: str | CoAtNetConfig | None
) -> tuple[keras.Model, ImageSettings]:
    found = registry.find(name, None)
    registry.check_architecture(found, architecture)
    model = CoAtNet(found.architecture, weights=found.name)
    return model, ImageSettings(
        found.input_size, found.interpolation, found.crop_pct, found.crop_mode
    )


def _architecture_of(path: pathlib.Path) -> CoAtNetConfig:
    """The configuration that `CoAtNetModel.save_weights` wrote into a file."""
    if path.name.endswith(KERAS_SUFFIXES):
        identity = keras_files.read_identity(path)
    else:
        identity = None
        foreign_files.read(path)  # reports a damaged file as damaged
    if identity is None:
        raise unknown_architecture(path)
    return identity.architecture


# --- Predictions -----------------------------------------------------------------------------


def predict_images(
    model: Classifier,
    paths: Sequence[str | os.PathLike],
    settings: ImageSettings | None = None,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """Classifies images in batches; the next batch is read while one is computed.

    Args:
        model: a classifier: (batch, height, width, 3) to (batch, classes), see `class_scores`.
        paths: the image files.
        settings: how to prepare the images; `None`: `default_settings(model)`.
        batch_size: number of images in a batch, at least 1.

    Yields:
        A `Prediction` for each path, in order, including files that cannot be read.

    Raises:
        ValueError: the model does not classify images, or `batch_size` is below 1.

    Example:
        >>> from skimage import data
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> (found,) = predict_images(model, [os.path.join(data.data_dir, "coffee.png")])
        >>> found.scores.shape
        (10,)
    """
    settings = settings or default_settings(model)
    check_classifier(model)
    batch_size = whole_number("batch_size", batch_size)
    options = dataclasses.asdict(settings)

    def read(path: str | os.PathLike) -> np.ndarray | str:
        try:
            return load_image(path, **options)
        except ValueError as error:
            return str(error)

    groups = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        ahead = [pool.map(read, group) for group in groups[:1]]
        for number, group in enumerate(groups):
            read_ones = list(ahead.pop())
            ahead += [pool.map(read, following) for following in groups[number + 1 : number + 2]]
            yield from _predict_group(model, group, read_ones)


def check_classifier(model: Classifier) -> int:
    """Checks that a model is a classifier, and that it is known which pixels it takes.

    Args:
        model: a model.

    Returns:
        The number of classes.

    Raises:
        ValueError: the output is not (batch, classes), or the model contains a CoAtNet without
            preprocessing after layers that may or may not normalize the pixels.

    Example:
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> check_classifier(CoAtNet(config, input_shape=(64, 64, 3), classes=10))
        10
    """
    shape = getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[-1] is None:
        raise ValueError(
            "The model must be a classifier, with an output of shape (batch, classes). Its output "
            f"is {shape}: it was probably built with include_top=False."
        )
    if isinstance(model, keras.Model):
        normalization_before(model)
    return shape[-1]


def class_names_of(model: Classifier) -> list[str] | None:
    """Returns the names or WordNet ids of the classes that an exported model brings.

    Args:
        model: a classifier.

    Returns:
        The names in the order of its outputs; None if it brings none.

    Example:
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> class_names_of(CoAtNet(config, input_shape=(64, 64, 3)))
    """
    if not isinstance(model, ExportedModel) or model.classes is None:
        return None
    return [wordnet_id or name for wordnet_id, name in model.classes]


def _predict_group(
    model: Classifier, paths: Sequence[str | os.PathLike], read_ones: list[np.ndarray | str]
) -> Iterator[Prediction]:
    images = [image for image in read_ones if not isinstance(image, str)]
    scores = iter(class_scores(model, np.stack(images)) if images else ())
    for path, image in zip(map(pathlib.Path, paths), read_ones, strict=True):
        if isinstance(image, str):
            yield Prediction(path, error=image)
        else:
            yield Prediction(path, next(scores))


def class_scores(model: Classifier, images: np.ndarray) -> np.ndarray:
    """Computes the scores of a batch of images.

    Args:
        model: a classifier: a CoAtNet, fused or not, or a model that contains one. If that was
            built without preprocessing, the pixels are normalized first, unless a layer before it
            does so. Any other model takes raw pixels.
        images: (batch, height, width, 3), raw pixels, 0 to 255.

    Returns:
        (batch, classes), float32: the model's output, or its softmax if the last layer returns
        logits, also where that layer belongs to a model inside the model.

    Raises:
        ValueError: it is unknown which pixels the model takes, or whether it returns logits.

    Example:
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> class_scores(model, np.zeros((1, 64, 64, 3), "uint8")).shape
        (1, 10)
    """
    pixels = images.astype("float32")
    # An exported model takes raw pixels.
    config = None if isinstance(model, ExportedModel) else normalization_before(model)
    if config is not None:
        mean, std = pixel_statistics(config, pixels.shape[-1])
        pixels = (pixels / 255.0 - mean) / std
    scores = np.asarray(model.predict_on_batch(pixels), "float32")
    is_logits = model.is_logits if isinstance(model, ExportedModel) else gives_logits(model)
    if is_logits is None and (scores.min() < -1e-3 or scores.max() > 1 + 1e-3):
        raise ValueError(
            f"The outputs of {model.name!r} lie between {scores.min():.3g} and {scores.max():.3g}, "
            "so they are not scores, and its last layer does not say that they are logits. End the "
            "model with keras.layers.Softmax() or with a Dense layer."
        )
    if is_logits and scores.shape[1] > 1:
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True)
    return scores
