"""The network: stem, stages, head (table 3 of the paper)."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from keras_coatnet.config import Block, CoAtNetConfig
from keras_coatnet.layers import MBConv, TransformerBlock
from keras_coatnet.layers.activations import get_activation
from keras_coatnet.layers.base import PACKAGE, full_precision, kernel_initializer, policy_at
from keras_coatnet.layers.normalization import (
    BatchNormalization,
    batch_norm_options,
    norm_options,
)
from keras_coatnet.layers.pooling import halved

# Under this attribute of a `.weights.h5` file, and key of a model's configuration, stands which
# network it belongs to.
IDENTITY = "keras_coatnet"


@keras.saving.register_keras_serializable(PACKAGE)
class CoAtNetModel(keras.Model):
    """A functional Keras model that knows which CoAtNet it is.

    `build_model` makes it. Its identity is saved with it, in `.keras` files and in `.weights.h5`
    files, so that weights can be loaded without naming their architecture.

    Attributes:
        architecture: the `CoAtNetConfig` that the network was built from.
        include_preprocessing: whether it takes raw pixels.
        classes: outputs of its classifier; None without one.
        channels: channels of the pictures that it takes.
    """

    architecture: CoAtNetConfig
    include_preprocessing: bool
    classes: int | None
    channels: int

    def identify(
        self,
        architecture: CoAtNetConfig,
        include_preprocessing: bool,
        classes: int | None,
        channels: int,
    ) -> None:
        """Sets the attributes of the class."""
        self.architecture = architecture
        self.include_preprocessing = include_preprocessing
        self.classes = classes
        self.channels = channels

    def identity(self) -> dict[str, Any]:
        """What `identify` set, as a dictionary that JSON can hold."""
        return {
            "architecture": self.architecture.to_dict(),
            "include_preprocessing": self.include_preprocessing,
            "classes": self.classes,
            "channels": self.channels,
        }

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), IDENTITY: self.identity()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> CoAtNetModel:
        config = dict(config)
        identity = dict(config.pop(IDENTITY))
        model = super().from_config(config, custom_objects=custom_objects)
        identity["architecture"] = CoAtNetConfig.from_dict(identity["architecture"])
        model.identify(**identity)
        return model

    def save_weights(
        self, filepath: str | os.PathLike, overwrite: bool = True, **kwargs: Any
    ) -> None:
        """Saves the weights, with the network's identity, and never leaves half a file.

        Args:
            filepath: a path that ends in `.weights.h5`. Other paths that Keras takes (sharded or
                remote files) are written as Keras does, without the identity.
            overwrite: whether an existing file is replaced without asking.
            **kwargs: further arguments of `keras.Model.save_weights`.
        """
        path = pathlib.Path(filepath)
        remote = "://" in str(filepath)
        if remote or not str(path).endswith(".weights.h5") or (path.exists() and not overwrite):
            super().save_weights(filepath, overwrite=overwrite, **kwargs)
            return
        import h5py

        partial = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            super().save_weights(partial, **kwargs)
            with h5py.File(partial, "r+") as file:
                file.attrs[IDENTITY] = json.dumps(self.identity())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


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
        inputs: (batch, height, width, channels), where the network starts.
        source_inputs: the model's inputs, where `inputs` was computed from others; None: `inputs`.
        include_top: whether head and classifier are built.
        pooling: without top: None, `"avg"` or `"max"`.
        classes: outputs of the classifier.
        classifier_activation: activation of the classifier; None: logits.
        include_preprocessing: whether the model takes raw pixels, 0 to 255.
        name: the model's name.

    Returns:
        A `CoAtNetModel`.
    """
    x = inputs
    if include_preprocessing:
        x = _rescaling(config, x.shape[-1])(x)
    x = _stem(config, x)
    map_size = _table_sizes(config, inputs.shape)
    for block in config.blocks():
        map_size = halved((None, *map_size, 0), strides=block.stride)[1:3]
        x = _block_layer(config, block, map_size)(x)
    if config.final_norm == "before_pool":
        x = _final_norm(config)(x)

    if include_top:
        x = _head(config, x, classes, classifier_activation)
    elif pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name="avg_pool")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(data_format="channels_last", name="max_pool")(x)

    model = CoAtNetModel(inputs if source_inputs is None else source_inputs, x, name=name)
    classes = classes if include_top else None
    model.identify(config, include_preprocessing, classes, channels=inputs.shape[-1])
    return model


def _rescaling(config: CoAtNetConfig, channels: int) -> keras.layers.Layer:
    """Raw pixels to (pixel / 255 - mean) / std."""
    mean, std = list(config.pixel_mean), list(config.pixel_std)
    if len(set(mean)) == len(set(std)) == 1 or len(mean) != channels:
        # One number for all channels: theirs, or the average where there are not as many.
        mean, std = sum(mean) / len(mean), sum(std) / len(std)
        scale, offset = 1.0 / (255.0 * std), -mean / std
    else:
        scale = [1.0 / (255.0 * s) for s in std]
        offset = [-m / s for m, s in zip(mean, std, strict=True)]
    return keras.layers.Rescaling(scale, offset, name="preprocessing")


def _stem(config: CoAtNetConfig, x: Any) -> Any:
    """Two 3x3 convolutions, the first of stride 2 with norm and activation (S0)."""
    symmetric = config.conv_padding == "symmetric"
    if symmetric:
        x = keras.layers.ZeroPadding2D(1, data_format="channels_last", name="stem_pad")(x)
    options = {"data_format": "channels_last", "use_bias": config.stem_bias}
    x = keras.layers.Conv2D(
        config.stem_width[0],
        3,
        strides=2,
        padding="valid" if symmetric else "same",
        kernel_initializer=kernel_initializer(),
        name="stem_conv1",
        **options,
    )(x)
    norm = batch_norm_options(config.batch_norm_epsilon, config.batch_norm_momentum)
    x = BatchNormalization(**norm, name="stem_norm")(x)
    x = keras.layers.Activation(get_activation(config.conv_activation), name="stem_activation")(x)
    return keras.layers.Conv2D(
        config.stem_width[1],
        3,
        padding="same",
        kernel_initializer=kernel_initializer(),
        name="stem_conv2",
        **options,
    )(x)


def _table_sizes(config: CoAtNetConfig, input_shape: tuple) -> tuple[int, int]:
    """Size of the stem's map, by which tables are made: that of the input, where it is known."""
    known = [
        side if size is None else size
        for side, size in zip(config.input_sides, input_shape[1:3], strict=True)
    ]
    return halved((None, *known, 0))[1:3]


def _block_layer(config: CoAtNetConfig, block: Block, table_size: tuple[int, int]) -> Any:
    if block.kind == "C":
        return MBConv(
            block.width,
            expanded_width=config.expanded_width(block),
            squeezed_width=config.squeezed_width(block),
            strides=block.stride,
            stride_on=config.stride_on,
            pool=config.conv_pool,
            stride_pool=config.conv_stride_pool,
            padding=config.conv_padding,
            activation=config.conv_activation,
            prenorm_activation=config.conv_prenorm_activation,
            squeeze_activation=config.squeeze_activation,
            squeeze_place=config.squeeze_place,
            use_bias=config.conv_bias,
            batch_norm_epsilon=config.batch_norm_epsilon,
            batch_norm_momentum=config.batch_norm_momentum,
            stochastic_depth=block.stochastic_depth,
            name=block.name,
        )
    return TransformerBlock(
        block.width,
        strides=block.stride,
        head_size=config.head_size,
        attention_width=block.width_in if config.attention_width == "input" else block.width,
        attention_bias=config.attention_bias,
        relative_position=config.relative_position,
        relative_position_width=config.relative_position_width,
        table_size=table_size,
        pool=config.transformer_pool,
        norm=config.transformer_norm,
        norm_epsilon=config.transformer_norm_epsilon,
        batch_norm_momentum=config.batch_norm_momentum,
        shortcut_bias=config.transformer_shortcut_bias,
        ffn_expansion=config.ffn_expansion,
        ffn_activation=config.ffn_activation,
        ffn_bias=config.ffn_bias,
        layer_scale=config.layer_scale,
        stochastic_depth=block.stochastic_depth,
        name=block.name,
    )


def _final_norm(config: CoAtNetConfig) -> keras.layers.Layer:
    norm, options = norm_options(
        config.transformer_norm, config.transformer_norm_epsilon, config.batch_norm_momentum
    )
    return norm(**options, name="norm")


def _head(
    config: CoAtNetConfig, x: Any, classes: int, classifier_activation: str | Callable | None
) -> Any:
    """Global average pool -> norm -> dense and tanh -> classifier."""
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name="avg_pool")(x)
    if config.final_norm == "after_pool":
        x = _final_norm(config)(x)
    if config.hidden_head:
        x = keras.layers.Dense(
            config.width,
            "tanh",
            kernel_initializer=kernel_initializer(),
            dtype=policy_at(keras.config.dtype_policy(), "hidden"),
            name="hidden",
        )(x)
    return keras.layers.Dense(
        classes,
        classifier_activation,
        kernel_initializer=kernel_initializer(),
        dtype=full_precision(policy_at(keras.config.dtype_policy(), "predictions")),
        name="predictions",
    )(x)
