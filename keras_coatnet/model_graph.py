"""Finds out which pixels a model around a CoAtNet takes, and whether it returns logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.images import ImageSettings
from keras_coatnet.layers.identity import NetworkIdentity
from keras_coatnet.model import Identity

# Layers that keep the range of pixels at inference, by class name. A network behind them takes the
# same pixels as the model.
_KEEPS_RANGE = (
    "InputLayer",
    "Identity",
    "Dropout",
    "SpatialDropout2D",
    "GaussianNoise",
    "GaussianDropout",
    "Resizing",
    "CenterCrop",
    "Cropping2D",
    "ZeroPadding2D",
    "UpSampling2D",
    "AugMix",
    "CutMix",
    "MixUp",
    "RandAugment",
)

# Operations whose outputs are logits if their inputs are, and scores otherwise.
_KEEPS_KIND = (
    "Identity",
    "Dropout",
    "Flatten",
    "Reshape",
    "Average",
    "GlobalAveragePooling2D",
    "GlobalMaxPooling2D",
)

# The largest absolute value of normalized pixels. Those of all public checkpoints are below 3.
_LARGEST_NORMALIZED = 10.0


def normalization_before(model: keras.Model) -> CoAtNetConfig | None:
    """Returns how raw pixels must be normalized before they are given to a model.

    Args:
        model: a model of one input, with any number of CoAtNets inside, at any depth.

    Returns:
        None if the model takes raw pixels: it has no CoAtNet inside, or one with preprocessing, or
        layers that normalize before it. Else the configuration whose `pixel_mean` and `pixel_std`
        the pixels need.

    Raises:
        ValueError: a CoAtNet without preprocessing is behind layers that may or may not normalize,
            or several CoAtNets need different pixels.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> coatnet = CoAtNet(config, input_shape=(64, 64, 3), include_preprocessing=False)
        >>> model = keras.Sequential([keras.layers.RandomFlip(), coatnet])
        >>> normalization_before(model).pixel_mean
        (0.5, 0.5, 0.5)
    """
    needed = [_needed(identity, ahead) for identity, ahead in _networks(model)]
    values = {config and (config.pixel_mean, config.pixel_std) for config in needed}
    if len(values) > 1:
        raise ValueError(
            "The model has several CoAtNets inside, which need different pixels. Build them with "
            "include_preprocessing=True, so that all take raw pixels."
        )
    return needed[0] if needed else None


def gives_logits(model: keras.Model) -> bool | None:
    """Returns whether the outputs of a classifier are logits.

    Args:
        model: a model of one output, which may be that of a model inside it.

    Returns:
        True for logits, False for the outputs of an activation such as softmax, None if the last
        layers do not determine it.

    Example:
        >>> inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> gives_logits(inner)
        True
        >>> gives_logits(keras.Sequential([inner, keras.layers.Softmax()]))
        False
    """
    parents = _parents(model)
    if isinstance(model, keras.Sequential):
        return _is_logits(model.layers[-1], parents)
    return _is_logits(model.outputs[0]._keras_history[0], parents)


def default_settings(model: keras.Model) -> ImageSettings:
    """Returns how to prepare images for a model, from its input shape alone.

    Args:
        model: a model that takes (batch, height, width, 3).

    Returns:
        `ImageSettings` with the model's input size and the defaults. If the model takes any size,
        the size is that of its architecture, or 224.

    Raises:
        ValueError: the model does not take batches of RGB images.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> default_settings(CoAtNet(config, input_shape=(64, 96, 3))).size
        (64, 96)
    """
    shape = getattr(model, "input_shape", None)  # a subclassed model has none
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(
            "The model must take one batch of RGB images, (batch, height, width, 3). It takes: "
            f"{shape}"
        )
    config = getattr(model, "architecture", None)
    sides = config.input_sides if isinstance(config, CoAtNetConfig) else (224, 224)
    return ImageSettings((shape[1] or sides[0], shape[2] or sides[1]))


def pixel_statistics(config: CoAtNetConfig, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation that a network's pixels are normalized by.

    Args:
        config: the network's configuration.
        channels: of the images. If the configuration is for another number of channels, they are
            all normalized by the mean of its values.

    Returns:
        Two float32 arrays of one value for each channel, for pixels of 0 to 1.

    Example:
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> pixel_statistics(config, channels=1)[0].tolist()
        [0.5]
    """
    mean = np.array(config.pixel_mean, "float32")
    std = np.array(config.pixel_std, "float32")
    if len(mean) == channels:
        return mean, std
    return np.full(channels, mean.mean()), np.full(channels, std.mean())


# --- The graph ---------------------------------------------------------------------------------


def _parents(model: keras.Model) -> dict[Any, list[Any]]:
    """Returns the operations between a model's inputs and outputs, each with those before it."""
    if isinstance(model, keras.Sequential):
        return {
            layer: model.layers[max(0, number - 1) : number]
            for number, layer in enumerate(model.layers)
        }
    found: dict[Any, list[Any]] = {}
    seen, tensors = set(), list(getattr(model, "outputs", None) or ())
    while tensors:
        operation, node, _ = tensors.pop()._keras_history
        if (operation, node) in seen:
            continue
        seen.add((operation, node))
        before = operation._inbound_nodes[node].input_tensors
        found.setdefault(operation, []).extend(each._keras_history[0] for each in before)
        tensors += before
    return found


def _ahead(operation: Any, parents: dict[Any, list[Any]]) -> list[Any]:
    """Returns all operations that an operation's input depends on."""
    found, left = [], list(parents[operation])
    while left:
        each = left.pop()
        if each not in found:
            found.append(each)
            left += parents[each]
    return found


def _networks(model: keras.Model) -> Iterator[tuple[Identity, list[Any]]]:
    """Yields the identity of each CoAtNet, and the operations ahead of it."""
    parents = _parents(model)
    for each in parents:
        if isinstance(each, NetworkIdentity):
            yield Identity.from_dict(each.identity), _ahead(each, parents)
        elif isinstance(each, keras.Model) and _parents(each):
            for identity, inside in _networks(each):
                yield identity, [*_ahead(each, parents), *inside]
        elif isinstance(each, keras.layers.Layer):
            for inner in each._flatten_layers(include_self=False):
                if isinstance(inner, NetworkIdentity):
                    yield Identity.from_dict(inner.identity), [each, *_ahead(each, parents)]


def _needed(identity: Identity, ahead: list[Any]) -> CoAtNetConfig | None:
    """Returns the configuration with the normalization that a CoAtNet needs; None if it has one."""
    if identity.include_preprocessing or any(map(_normalizes, ahead)):
        return None
    unknown = [each.name for each in ahead if not _keeps_range(each)]
    if unknown:
        raise ValueError(
            "The CoAtNet inside the model takes normalized pixels, and it is not known whether the "
            f"layers before it normalize them: {', '.join(map(repr, unknown))}. Build it with "
            "include_preprocessing=True, or normalize with keras.layers.Rescaling or Normalization "
            "in the model."
        )
    return identity.architecture


def _keeps_range(operation: Any) -> bool:
    kind = type(operation).__name__
    return kind in _KEEPS_RANGE or (
        kind.startswith("Random") and type(operation).__module__.startswith("keras.")
    )


def _normalizes(operation: Any) -> bool:
    """Whether a layer normalizes raw pixels."""
    if isinstance(operation, keras.layers.Rescaling):
        highest = 255.0 * np.asarray(operation.scale) + np.asarray(operation.offset)
        return bool(np.abs(highest).max() <= _LARGEST_NORMALIZED)
    return isinstance(operation, keras.layers.Normalization)


def _is_logits(operation: Any, parents: dict[Any, list[Any]]) -> bool | None:
    if isinstance(operation, keras.Model) and _parents(operation):
        return gives_logits(operation)
    kind = type(operation).__name__
    activation = getattr(operation, "activation", None)
    linear = activation is keras.activations.linear
    if kind in ("Softmax", "Sigmoid") or (callable(activation) and not linear):
        return False
    if kind in _KEEPS_KIND or (linear and kind == "Activation"):
        before = {_is_logits(each, parents) for each in parents[operation]}
        return before.pop() if len(before) == 1 else None
    return True if linear else None
