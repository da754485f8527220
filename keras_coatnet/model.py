"""The network: stem, stages, head (table 3 of the paper)."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_coatnet.arguments import boolean, check_fields, whole_number
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.files import whole_file
from keras_coatnet.layers import ConvNeXtBlock, MBConv, TransformerBlock
from keras_coatnet.layers.activations import get_activation
from keras_coatnet.layers.base import PACKAGE, full_precision, kernel_initializer, policy_at
from keras_coatnet.layers.identity import NetworkIdentity
from keras_coatnet.layers.normalization import norm_options
from keras_coatnet.names import (
    AVG_POOL,
    BLOCK_ENDS,
    CLASSIFIER,
    FINAL_NORM,
    HIDDEN,
    MAX_POOL,
    NETWORK,
    PREPROCESSING,
    STEM_ACTIVATION,
    STEM_CONV1,
    STEM_CONV2,
    STEM_NORM,
    STEM_PAD,
)
from keras_coatnet.types import Tensor
from keras_coatnet.version import __version__

# Where the identity of a network is saved: an attribute of `.weights.h5` files, and a key of a
# model's configuration.
IDENTITY = "keras_coatnet"

# The format of a saved identity. A reader refuses a higher number than its own.
FORMAT_VERSION = 1

# The layers of residual blocks, as `Block.layer` names them.
BLOCK_LAYERS: Mapping[str, Callable[..., keras.layers.Layer]] = {
    layer.__name__: layer for layer in (MBConv, ConvNeXtBlock, TransformerBlock)
}


class NewerFormat(ValueError):
    """A file was written by a newer version of this package than this one."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which network a model is, as saved in files.

    Attributes:
        architecture: the `CoAtNetConfig` that the network was built from.
        include_preprocessing: whether it takes raw pixels.
        classes: outputs of its classifier; None without one.
        channels: channels of the images that it takes.
        fused: whether `fuse` made it. A fused network has other weights.
    """

    architecture: CoAtNetConfig
    include_preprocessing: bool
    classes: int | None
    channels: int
    fused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and the format's version as a dictionary that JSON can hold."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format": FORMAT_VERSION,
            "version": __version__,
            **fields,
            "architecture": self.architecture.to_dict(),
        }

    @classmethod
    def from_dict(cls, found: Any) -> Identity:
        """Returns the identity that `to_dict` wrote, also after a round trip through JSON.

        Args:
            found: what `to_dict` returned. Without the key `format`, it is of format 1.

        Raises:
            NewerFormat: a newer version of the package wrote it.
            ValueError: it is not an identity.
        """
        if not isinstance(found, Mapping):
            raise ValueError(f"not the identity of a CoAtNet: {found!r:.300}")
        written = found.get("format", FORMAT_VERSION)
        if not isinstance(written, int) or written > FORMAT_VERSION:
            raise NewerFormat(
                f"saved by a newer version of keras_coatnet, {found.get('version', 'unknown')}, in "
                f"format {written!r}. This is version {__version__}, which reads "
                f"formats up to {FORMAT_VERSION}. Upgrade it: pip install -U keras-coatnet"
            )
        fields = {name: found[name] for name in found if name not in ("format", "version")}
        check_fields(fields, cls)
        whole_number("channels", fields["channels"])
        if fields["classes"] is not None:
            whole_number("classes", fields["classes"])
        for name in ("include_preprocessing", "fused"):
            boolean(name, fields.get(name, False))
        return cls(**{**fields, "architecture": CoAtNetConfig.from_dict(found["architecture"])})


@keras.saving.register_keras_serializable(PACKAGE)
class CoAtNetModel(keras.Model):
    """A functional Keras model that knows which CoAtNet it is.

    `build_model` returns it. Its identity is saved in `.keras` and `.weights.h5` files, so that
    weights can be loaded without naming their architecture. Clones and copies have an identity,
    too, because a layer of the graph holds it.

    A model has no identity if its graph is not that of one whole network, for example because a
    layer was added after the classifier. Then all attributes are None, and the model behaves like
    an ordinary `keras.Model`.

    Args:
        inputs: as of `keras.Model`.
        outputs: as of `keras.Model`.
        name: as of `keras.Model`.
        identity: which network it is; None: read from the layers between inputs and outputs.
        **kwargs: further arguments of `keras.Model`.

    Attributes:
        architecture: the `CoAtNetConfig` that the network was built from.
        include_preprocessing: whether it takes raw pixels.
        classes: outputs of its classifier; None without one.
        channels: channels of the images that it takes.
        fused: whether `fuse` made it.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> keras.models.clone_model(model).classes
        10
    """

    architecture: CoAtNetConfig | None
    include_preprocessing: bool | None
    classes: int | None
    channels: int | None
    fused: bool | None

    def __init__(
        self,
        inputs: Any,
        outputs: Any,
        name: str | None = None,
        *,
        identity: Identity | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(inputs, outputs, name=name, **kwargs)
        self._identity = identity or _identity_in(self)
        for field in dataclasses.fields(Identity):
            setattr(self, field.name, self._identity and getattr(self._identity, field.name))

    def identity(self) -> dict[str, Any] | None:
        """Returns the identity as a dictionary that JSON can hold; None if there is none."""
        return self._identity and self._identity.to_dict()

    def get_config(self) -> dict[str, Any]:
        known = {} if self._identity is None else {IDENTITY: self.identity()}
        return {**super().get_config(), **known}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> CoAtNetModel:
        config = dict(config)
        found = config.pop(IDENTITY, None)
        if found is not None:
            config["identity"] = Identity.from_dict(found)
        return super().from_config(config, custom_objects=custom_objects)

    def save_weights(
        self, filepath: str | os.PathLike, overwrite: bool = True, **kwargs: Any
    ) -> None:
        """Saves the weights with the network's identity; no partial file is ever left.

        Args:
            filepath: a path that ends in `.weights.h5`. To other paths (sharded or remote files)
                Keras writes as usual, without the identity.
            overwrite: whether an existing file is replaced without asking.
            **kwargs: further arguments of `keras.Model.save_weights`.

        Raises:
            ValueError: the folder does not exist, or Keras does not take the path.
        """
        path = pathlib.Path(filepath)
        remote = "://" in str(filepath)
        if remote or not str(path).endswith(".weights.h5") or (path.exists() and not overwrite):
            super().save_weights(filepath, overwrite=overwrite, **kwargs)
            return
        import h5py

        with whole_file(path) as partial:
            super().save_weights(partial, **kwargs)
            if self._identity is not None:
                with h5py.File(partial, "r+") as file:
                    file.attrs[IDENTITY] = json.dumps(self.identity())


# Keras's old format (.h5, .hdf5) names the class of a model without its package.
keras.saving.get_custom_objects()["CoAtNetModel"] = CoAtNetModel


def _identity_in(model: keras.Model) -> Identity | None:
    """Reads the identity from the layers of a graph; None if it is not one whole network."""
    holders = [layer for layer in model.layers if isinstance(layer, NetworkIdentity)]
    if len(holders) != 1 or len(model.outputs) != 1:
        return None
    identity = Identity.from_dict(holders[0].identity)
    names = [layer.name for layer in model.layers]
    blocks = [block.name for block in identity.architecture.blocks()]
    for block in blocks:  # in a fused network, each block is several layers
        if not any(name == block or name.startswith(f"{block}_") for name in names):
            return None
    end = model.outputs[0]._keras_history.operation.name
    if end == CLASSIFIER:
        return dataclasses.replace(identity, classes=model.output_shape[-1])
    ends = [AVG_POOL, MAX_POOL, *(blocks[-1] + inside for inside in BLOCK_ENDS)]
    if identity.architecture.final_norm == "before_pool":
        ends.append(FINAL_NORM)
    return dataclasses.replace(identity, classes=None) if end in ends else None


def build_model(
    config: CoAtNetConfig,
    inputs: keras.KerasTensor,
    source_inputs: Any = None,
    include_top: bool = True,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool = True,
    name: str | None = None,
) -> CoAtNetModel:
    """Builds the graph of a network.

    Args:
        config: what to build.
        inputs: (batch, height, width, channels), the input of the network.
        source_inputs: the model's inputs, if `inputs` was computed from others; None: `inputs`.
        include_top: whether the head and the classifier are built.
        pooling: without top: None, `"avg"` or `"max"`.
        classes: outputs of the classifier.
        classifier_activation: activation of the classifier; None: logits.
        include_preprocessing: whether the model takes raw pixels, 0 to 255.
        name: the model's name.

    Returns:
        A `CoAtNetModel`.
    """
    x = inputs
    identity = Identity(
        config, include_preprocessing, classes if include_top else None, inputs.shape[-1]
    )
    if include_preprocessing:
        x = _rescaling(config, x.shape[-1])(x)
    x = NetworkIdentity(identity.to_dict(), name=NETWORK)(x)
    x = _stem(config, x)
    height, width = _stem_map_size(config, inputs.shape)
    for block in config.blocks():
        height, width = -(-height // block.strides), -(-width // block.strides)
        options = {"table_size": (height, width)} if block.kind == "T" else {}
        x = BLOCK_LAYERS[block.layer](block.filters, **block.layer_options, **options)(x)
    if config.final_norm == "before_pool":
        x = _final_norm(config)(x)

    if include_top:
        x = _head(config, x, classes, classifier_activation)
    elif pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name=AVG_POOL)(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(data_format="channels_last", name=MAX_POOL)(x)

    return CoAtNetModel(
        inputs if source_inputs is None else source_inputs, x, name=name, identity=identity
    )


def _rescaling(config: CoAtNetConfig, channels: int) -> keras.layers.Layer:
    """Returns the layer that computes (pixel / 255 - mean) / std."""
    mean, std = config.pixel_mean, config.pixel_std
    scale: Any
    offset: Any
    if len(set(mean)) == len(set(std)) == 1 or len(mean) != channels:
        # One number for all channels: the average, if images have another number of channels.
        one_mean, one_std = sum(mean) / len(mean), sum(std) / len(std)
        scale, offset = 1.0 / (255.0 * one_std), -one_mean / one_std
    else:
        # As a map of one pixel: Keras applies a plain list along the first axis if the global
        # `image_data_format` is channels_first.
        scale = [[[1.0 / (255.0 * s) for s in std]]]
        offset = [[[-m / s for m, s in zip(mean, std, strict=True)]]]
    return keras.layers.Rescaling(scale, offset, name=PREPROCESSING)


def _stem(config: CoAtNetConfig, x: Tensor) -> Tensor:
    """Two 3x3 convolutions, the first of stride 2 with norm and activation (S0)."""
    symmetric = config.conv_padding == "symmetric"
    if symmetric:
        x = keras.layers.ZeroPadding2D(1, data_format="channels_last", name=STEM_PAD)(x)
    first, *_, second = config.stem().sublayers
    x = keras.layers.Conv2D(
        first.filters,
        3,
        strides=2,
        padding="valid" if symmetric else "same",
        name=STEM_CONV1,
        **_stem_options(config),
    )(x)
    norm, norm_arguments = norm_options(
        config.conv_norm, config.batch_norm_epsilon, config.batch_norm_momentum
    )
    x = norm(**norm_arguments, name=STEM_NORM)(x)
    x = keras.layers.Activation(get_activation(config.conv_activation), name=STEM_ACTIVATION)(x)
    return keras.layers.Conv2D(
        second.filters, 3, padding="same", name=STEM_CONV2, **_stem_options(config)
    )(x)


def _stem_options(config: CoAtNetConfig) -> dict[str, Any]:
    return {
        "data_format": "channels_last",
        "use_bias": config.stem_bias,
        "kernel_initializer": kernel_initializer(),
    }


def _stem_map_size(config: CoAtNetConfig, input_shape: tuple) -> tuple[int, int]:
    """Returns the size of the stem's map: from the input, or from `input_size` if it is unknown."""
    height, width = (
        side if size is None else size
        for side, size in zip(config.input_sides, input_shape[1:3], strict=True)
    )
    return -(-height // 2), -(-width // 2)


def _final_norm(config: CoAtNetConfig) -> keras.layers.Layer:
    norm, options = norm_options(
        config.transformer_norm, config.transformer_norm_epsilon, config.batch_norm_momentum
    )
    return norm(**options, name=FINAL_NORM)


def _head(
    config: CoAtNetConfig, x: Tensor, classes: int, classifier_activation: str | Callable | None
) -> Tensor:
    """Global average pool -> norm -> dense and tanh -> classifier."""
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name=AVG_POOL)(x)
    if config.final_norm == "after_pool":
        x = _final_norm(config)(x)
    if config.hidden_head:
        policy = policy_at(keras.config.dtype_policy(), HIDDEN)
        x = _dense(HIDDEN, config.output_filters, "tanh", policy)(x)
    policy = full_precision(policy_at(keras.config.dtype_policy(), CLASSIFIER))
    return _dense(CLASSIFIER, classes, classifier_activation, policy)(x)


def _dense(
    name: str, units: int, activation: str | Callable | None, policy: keras.DTypePolicy
) -> keras.layers.Layer:
    initializer: Any = kernel_initializer()
    return keras.layers.Dense(
        units, activation, kernel_initializer=initializer, dtype=policy, name=name
    )
