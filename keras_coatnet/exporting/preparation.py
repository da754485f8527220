"""From any model to the one that is exported: float32, raw pixels in, fused if that is faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_coatnet.fusion import fuse
from keras_coatnet.layers.base import PACKAGE
from keras_coatnet.model import CoAtNetModel
from keras_coatnet.model_graph import normalization_before, pixel_statistics


@contextlib.contextmanager
def float32_policy() -> Iterator[None]:
    """Sets the global policy, which new models obey even where their layers have their own."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)


def prepare(model: keras.Model) -> keras.Model:
    """Returns a model that computes the same in float32, from raw pixels, and without XLA.

    Args:
        model: a model of one input and one output, plain or fused, under any policy, with any
            number of CoAtNets inside. The global policy must be float32.

    Returns:
        `model` itself where nothing has to change, else a copy.

    Raises:
        ValueError: it is unknown which pixels the model takes, or it cannot be copied.
    """
    config = _config_of(model)
    rewritten = _rewrite(config)
    if rewritten != config:
        model = _build(rewritten, model)
    needed = normalization_before(model)
    if needed is None:
        return model
    inputs = keras.Input(batch_shape=model.input_shape, name="images")
    mean, std = pixel_statistics(needed, model.input_shape[-1])
    normalize = keras.layers.Rescaling((1 / (255.0 * std)).tolist(), (-mean / std).tolist())
    return keras.Model(inputs, model(normalize(inputs)), name=model.name)


def fuse_all(model: keras.Model) -> tuple[keras.Model, bool]:
    """Fuses each CoAtNet in a model, as far as that is possible.

    A CoAtNet stays as it is if its input size is unknown, it is quantized, or it has layers that
    were added to it.

    Args:
        model: a CoAtNet, or a functional or sequential model with CoAtNets inside.

    Returns:
        The fused model, which shares nothing with `model`, or `model` if nothing was fused; and
        whether something was.
    """
    if isinstance(model, CoAtNetModel):
        try:
            return fuse(model, jit_compile=False), True
        except ValueError:  # it cannot be fused, for one of the reasons above
            return model, False
    if not any(isinstance(layer, keras.Model) for layer in model.layers):
        return model, False
    any_fused = False

    def copy(layer: keras.layers.Layer) -> keras.layers.Layer:
        nonlocal any_fused
        if isinstance(layer, keras.Model):
            layer, is_fused = fuse_all(layer)
            any_fused |= is_fused
        return layer

    # The copy's layers are to be called in a new graph, which those of `model` must not be.
    whole = _build(_config_of(model), model)
    fused = keras.models.clone_model(whole, clone_function=copy)
    return (fused, True) if any_fused else (model, False)


def computes_in_int8(model: keras.Model) -> bool:
    """Returns whether Keras's `quantize` made products of int8 in a model, or in one inside it.

    Args:
        model: a model.
    """
    layers = model._flatten_layers(include_self=False)
    return any(getattr(layer, "quantization_mode", None) == "int8" for layer in layers)


def _config_of(model: keras.Model) -> dict[str, Any]:
    """Returns a model's configuration, without that of its training."""

    def without_training(config: Any) -> Any:
        if isinstance(config, list | tuple):
            return type(config)(map(without_training, config))
        if not isinstance(config, dict):
            return config
        kept = {key: config[key] for key in config if key != "compile_config"}
        return {key: without_training(value) for key, value in kept.items()}

    return without_training(keras.saving.serialize_keras_object(model))


def _build(config: dict[str, Any], model: keras.Model) -> keras.Model:
    """Builds a model from its configuration, with the weights of another."""
    try:
        copy: Any = keras.saving.deserialize_keras_object(config)
        copy.set_weights(model.get_weights())
    except Exception as error:  # of any type: Keras passes on what a layer raises
        raise ValueError(
            f"{model.name!r} cannot be copied from its configuration, which is needed to export it "
            f"in float32: {error}. Register its own layers with "
            "keras.saving.register_keras_serializable, and give them a get_config."
        ) from error
    return copy


def _rewrite(config: Any) -> Any:
    """Returns a configuration for inference in float32, without XLA and without augmentation.

    Keras's random layers draw numbers at inference, too, and use none of them; the operations that
    draw exist in TensorFlow alone.
    """
    if isinstance(config, list | tuple):
        return type(config)(map(_rewrite, config))
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {"name": "float32"}}
    if config.get("module") == "keras.layers" and _is_augmentation(config.get("class_name", "")):
        identity = keras.layers.Identity(name=config["config"]["name"])
        serialized: Any = keras.saving.serialize_keras_object(identity)
        config = {**config, **serialized}
        # They are called with training=True unless told otherwise, and so is all that follows them.
        for node in config.get("inbound_nodes", ()):
            node["kwargs"].pop("training", None)
        return config
    rewritten = {key: _rewrite(value) for key, value in config.items()}
    if "source_name" in rewritten and "mode" in rewritten:  # of a quantized layer's policy
        rewritten["source_name"] = "float32"
    if str(config.get("registered_name")).startswith(PACKAGE) and "config" in rewritten:
        if "jit_compile" in rewritten["config"]:
            rewritten["config"]["jit_compile"] = False
    return rewritten


def _is_augmentation(name: str) -> bool:
    """Whether a layer of Keras, of that class, changes images in training only."""
    # RandomCrop crops the center, or resizes, at inference.
    is_random = name.startswith("Random") and name != "RandomCrop"
    return is_random or name in ("AugMix", "CutMix", "MixUp")
