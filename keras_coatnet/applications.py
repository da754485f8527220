"""Constructors, used like those of `keras.applications`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras

from keras_coatnet.architectures import find_architecture
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.construction import Arguments, Candidates, build, of_size
from keras_coatnet.model import CoAtNetModel


def CoAtNet(
    architecture: str | CoAtNetConfig,
    include_top: bool = True,
    weights: str | os.PathLike | None = None,
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str | None = None,
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates any CoAtNet, by the name of its architecture or by a configuration.

    Args:
        architecture: a name from `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        include_top: whether the head and its classifier are included.
        weights: None (random initialization of the paper's network); `"imagenet"`,
            `"imagenet12k"` or `"imagenet12k_ft"` where the size has one; a name from
            `keras_coatnet.checkpoints()`; or the path of a `.weights.h5` or `.keras` file, of
            timm's `.safetensors` or of keras_cv_attention_models' `.h5`. There are no public
            weights of the paper's exact networks: a checkpoint brings its own architecture and
            pixel normalization, and so does a file that this package saved.
        input_tensor: a KerasTensor, (batch, height, width, channels), for the model to start from.
        input_shape: (height, width, channels), at least 32 x 32 pixels. Any height and width,
            multiples of 32 or not; without top they may be None. Default: (224, 224, 3) with top,
            or the shape that the weights are for; (None, None, 3) without.
        pooling: without top: None (the output is a 4D feature map), `"avg"` or `"max"` (2D).
        classes: outputs of the classifier. Default: as many as the weights bring, else 1000.
        classifier_activation: `"softmax"`, None for logits, or with weights=None any activation.
            Files of weights do not store it.
        include_preprocessing: whether the model takes raw pixels, 0 to 255, and normalizes them
            itself (to -1 .. 1 for the paper's networks). If False, it takes normalized pixels.
            Default: as in the model that this package saved the weights of, otherwise True.
        name: name of the model.
        **overrides: fields of `CoAtNetConfig` to change, such as `stochastic_depth=0.2`, or
            `stride_on="depthwise"` for the paper's "Stride-2 DConv2D" networks.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: an argument is not valid, or the weights do not belong to the network.

    Example:
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> CoAtNet(config, input_shape=(64, 64, 3), classes=10).output_shape
        (None, 10)
    """
    named = isinstance(architecture, str)
    return build(
        Candidates(
            f"CoAtNet({architecture!r})" if named else "CoAtNet(config)",
            find_architecture(architecture),
        ),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name or (architecture if named else "coatnet"),
            overrides,
        ),
    )


def CoAtNet0(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet0",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-0 (Dai et al., 2021, table 3), 25M parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet0(weights=None, include_top=False, pooling="avg").output_shape
        (None, 768)
    """
    return build(
        of_size("CoAtNet0", "coatnet0"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNet1(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet1",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-1 (Dai et al., 2021, table 3), 42M parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet1(weights=None, include_top=False, pooling="avg").output_shape
        (None, 768)
    """
    return build(
        of_size("CoAtNet1", "coatnet1"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNet2(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet2",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-2 (Dai et al., 2021, table 3), 75M parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet2(weights=None, include_top=False, pooling="avg").output_shape
        (None, 1024)
    """
    return build(
        of_size("CoAtNet2", "coatnet2"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNet3(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet3",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-3 (Dai et al., 2021, table 3), 167M parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    No ImageNet-1k weights are published for this size, so the default raises. Pass
    `weights="imagenet12k"`, `weights=None` or a file.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet3(weights=None, include_top=False, pooling="avg").output_shape
        (None, 1536)
    """
    return build(
        of_size("CoAtNet3", "coatnet3"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNet4(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet4",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-4 (Dai et al., 2021, table 3), 275M parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    No ImageNet-1k weights are published for this size, so the default raises. Pass
    `weights=None` or a file.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet4(weights=None, include_top=False, pooling="avg").output_shape
        (None, 1536)
    """
    return build(
        of_size("CoAtNet4", "coatnet4"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNet5(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet5",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-5 (Dai et al., 2021, table 12), 687M parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    No ImageNet-1k weights are published for this size, so the default raises. Pass
    `weights=None` or a file.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet5(weights=None, include_top=False, pooling="avg").output_shape
        (None, 2048)
    """
    return build(
        of_size("CoAtNet5", "coatnet5"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNet6(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet6",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-6 (Dai et al., 2021, table 12), 1.47B parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    No ImageNet-1k weights are published for this size, so the default raises. Pass
    `weights=None` or a file.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet6(weights=None, include_top=False, pooling="avg").output_shape
        (None, 3072)
    """
    return build(
        of_size("CoAtNet6", "coatnet6"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNet7(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet7",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates CoAtNet-7 (Dai et al., 2021, table 12), 2.44B parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    No ImageNet-1k weights are published for this size, so the default raises. Pass
    `weights=None` or a file.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNet7(weights=None, include_top=False, pooling="avg").output_shape
        (None, 3072)
    """
    return build(
        of_size("CoAtNet7", "coatnet7"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def CoAtNetNano(
    include_top: bool = True,
    weights: str | os.PathLike | None = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str = "coatnet_nano",
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates timm's `coatnet_rmlp_nano_rw_224`, 15M parameters at 224 pixels.

    Args and errors are those of `CoAtNet`, without `architecture`. `weights` may be those of any
    architecture of this size.

    Returns:
        A `keras.Model`.

    Example:
        >>> CoAtNetNano(weights=None, include_top=False, pooling="avg").output_shape
        (None, 512)
    """
    return build(
        of_size("CoAtNetNano", "coatnet_rmlp_nano_rw_224"),
        Arguments(
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            include_preprocessing,
            name,
            overrides,
        ),
    )


def preprocess_input(x: Any, data_format: str | None = None) -> Any:
    """Returns its argument: the models normalize raw pixels themselves.

    It is here so that a CoAtNet can stand where another of `keras.applications` stood.

    Args:
        x: raw pixels, 0 to 255, (batch, height, width, channels).
        data_format: ignored, as in `keras.applications`.

    Returns:
        `x`.

    Example:
        >>> preprocess_input(255.0)
        255.0
    """
    return x
