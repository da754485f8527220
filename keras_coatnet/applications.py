"""Constructors in the manner of `keras.applications`."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_coatnet.arguments import as_python, boolean, whole_number
from keras_coatnet.config import FREE_FIELDS, CoAtNetConfig
from keras_coatnet.families import ARCHITECTURES, find_architecture
from keras_coatnet.families import size_of as _size_of
from keras_coatnet.model import CoAtNetModel, build_model
from keras_coatnet.weights.registry import WORDS
from keras_coatnet.weights.source import Source, find_source

MIN_SIZE = 32


class _DefaultClasses(int):
    """1000 that nobody asked for: weights with a classifier of another width may change it."""


_CLASSES = _DefaultClasses(1000)


def CoAtNet(
    architecture: str | CoAtNetConfig,
    include_top: bool = True,
    weights: str | os.PathLike | None = None,
    input_tensor: keras.KerasTensor | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int = _CLASSES,
    classifier_activation: str | Callable | None = "softmax",
    include_preprocessing: bool | None = None,
    name: str | None = None,
    **overrides: Any,
) -> CoAtNetModel:
    """Instantiates any CoAtNet, by the name of its architecture or by a configuration.

    Args:
        architecture: a name out of `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        include_top: whether the head and its classifier are included.
        weights: None (random initialisation of the paper's network); `"imagenet"`,
            `"imagenet12k"` or `"imagenet12k_ft"` where the size has one; the name of one of
            `keras_coatnet.checkpoints()`; or the path of a `.weights.h5` or `.keras` file, of
            timm's `.safetensors` or of keras_cv_attention_models' `.h5`. Nobody has published
            weights of the paper's exact networks: a checkpoint brings its own architecture and
            its own pixel normalisation, and so does a file saved from a model of this package.
        input_tensor: a KerasTensor, (batch, height, width, channels), for the model to start from.
        input_shape: (height, width, channels), at least 32 x 32 pixels. Any size, also not square
            and not a multiple of 32; unknown (None) sizes without top. Default: (224, 224, 3) with
            top, or the shape that the weights are for; (None, None, 3) without.
        pooling: without top: None (the output is a 4D feature map), `"avg"` or `"max"` (2D).
        classes: outputs of the classifier. Default: 1000, or as many as the weights bring.
        classifier_activation: `"softmax"`, None for logits, or with weights=None any activation.
            It is no part of a file of weights.
        include_preprocessing: whether the model takes raw pixels, 0 to 255, and normalises them
            itself (to -1 .. 1 for the paper's networks); else it takes normalised ones. Default:
            as the model whose weights are loaded, if it was one of this package, else True.
        name: name of the model; nothing else hangs on it.
        **overrides: fields of `CoAtNetConfig` to change, such as `stochastic_depth=0.2`, or
            `stride_on="depthwise"` for the paper's "Stride-2 DConv2D" networks.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: an argument makes no sense, or the weights do not belong to the network.

    Example:
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> CoAtNet(config, input_shape=(64, 64, 3), classes=10).output_shape
        (None, 10)
    """
    default = find_architecture(architecture).replace(**overrides)
    label = architecture if isinstance(architecture, str) else "config"
    return _construct(
        [default],
        None,
        overrides,
        asker=f"CoAtNet({label!r})" if isinstance(architecture, str) else "CoAtNet(config)",
        include_top=include_top,
        weights=weights,
        input_tensor=input_tensor,
        input_shape=input_shape,
        pooling=pooling,
        classes=classes,
        classifier_activation=classifier_activation,
        include_preprocessing=include_preprocessing,
        name=name or (architecture if isinstance(architecture, str) else "coatnet"),
    )


def _sized(function_name: str, size: str, default: str, about: str) -> Callable[..., CoAtNetModel]:
    """Makes the constructor of one size: that of `CoAtNet`, less the architecture."""

    def constructor(
        include_top: bool = True,
        weights: str | os.PathLike | None = "imagenet",
        input_tensor: keras.KerasTensor | None = None,
        input_shape: tuple[int | None, int | None, int] | None = None,
        pooling: str | None = None,
        classes: int = _CLASSES,
        classifier_activation: str | Callable | None = "softmax",
        include_preprocessing: bool | None = None,
        name: str = size,
        **overrides: Any,
    ) -> CoAtNetModel:
        paper = ARCHITECTURES[default].replace(**overrides)
        # Weights may also be those of another network of this size.
        family = [config for known, config in ARCHITECTURES.items() if _size_of(known) == size]
        return _construct(
            [paper, *family],
            size,
            overrides,
            asker=function_name,
            include_top=include_top,
            weights=weights,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            include_preprocessing=include_preprocessing,
            name=name,
        )

    constructor.__name__ = constructor.__qualname__ = function_name
    constructor.__doc__ = _sized_docstring(
        f"Instantiates {about}.",
        f'{function_name}(weights=None, include_top=False, pooling="avg").output_shape',
        f"(None, {ARCHITECTURES[default].width})",
    )
    return constructor


def _sized_docstring(summary: str, call: str, result: str) -> str:
    """That of `CoAtNet`, with another summary and example, and less the architecture."""
    _, arguments = inspect.cleandoc(CoAtNet.__doc__).split("Args:\n")
    arguments, _ = arguments.split("Example:\n")
    arguments = arguments[arguments.index("    include_top:") :]
    return f"{summary}\n\nArgs:\n{arguments}Example:\n    >>> {call}\n    {result}\n"


def _paper_size(number: int, parameters: str) -> Callable[..., CoAtNetModel]:
    about = f"CoAtNet-{number} (Dai et al., 2021, table 3), {parameters} parameters at 224 pixels"
    return _sized(f"CoAtNet{number}", f"coatnet{number}", f"coatnet{number}", about)


CoAtNet0 = _paper_size(0, "25M")
CoAtNet1 = _paper_size(1, "42M")
CoAtNet2 = _paper_size(2, "75M")
CoAtNet3 = _paper_size(3, "167M")
CoAtNet4 = _paper_size(4, "275M")
CoAtNet5 = _paper_size(5, "687M")
CoAtNet6 = _paper_size(6, "1.47B")
CoAtNet7 = _paper_size(7, "2.44B")
CoAtNetNano = _sized(
    "CoAtNetNano",
    "coatnet_nano",
    "coatnet_rmlp_nano_rw_224",
    "timm's coatnet_rmlp_nano_rw_224, 15M parameters, smaller than any of the paper's",
)


def _construct(
    candidates: Sequence[CoAtNetConfig],
    size: str | None,
    overrides: dict[str, Any],
    asker: str,
    include_top: bool,
    weights: str | os.PathLike | None,
    input_tensor: keras.KerasTensor | None,
    input_shape: tuple | None,
    pooling: str | None,
    classes: int,
    classifier_activation: str | Callable | None,
    include_preprocessing: bool | None,
    name: str,
) -> CoAtNetModel:
    """Checks the arguments, finds the weights, builds the model and loads them."""
    include_top = boolean("include_top", include_top)
    _check_pooling(pooling)
    classes = whole_number(
        "classes", classes, advice="For a model without classifier use include_top=False."
    )
    _check_weights(weights)
    include_preprocessing = _checked_preprocessing(include_preprocessing)
    if include_top and weights is not None:
        _check_activation(classifier_activation)
    inputs_known = _checked_inputs(include_top, input_tensor, input_shape)

    config, source = candidates[0], None
    if weights is not None:
        source = find_source(weights, candidates, size, asker)
        config = _overridden(source, overrides)
    fresh = None
    if source is not None and include_top:
        classes, fresh = _classes_with(weights, source, classes)

    if input_tensor is not None:
        inputs, source_inputs = input_tensor, keras.utils.get_source_inputs(input_tensor)
    else:
        sides = config.input_sides if include_top else (None, None)
        channels = source.channels if source is not None and source.channels else 3
        inputs, source_inputs = keras.Input(inputs_known or (*sides, channels)), None
    if source is not None and source.channels not in (None, inputs.shape[-1]):
        raise ValueError(
            f"The weights {source.name} are made for pictures of {source.channels} channels. "
            f"Received: an input of shape {inputs.shape[1:]}. Use weights=None, or convert the "
            "pictures."
        )
    if include_preprocessing is None:
        saved = None if source is None else source.include_preprocessing
        include_preprocessing = True if saved is None else saved
    height, width = inputs.shape[1:3]
    if None not in (height, width):
        config = config.replace(input_size=height if height == width else (height, width))
    model = build_model(
        config,
        inputs,
        source_inputs=source_inputs,
        include_top=include_top,
        pooling=pooling,
        classes=int(classes),
        classifier_activation=classifier_activation,
        include_preprocessing=include_preprocessing,
        name=name,
    )
    if source is not None:
        # Layers ahead of `input_tensor` are the caller's, and not in the file.
        network = model if input_tensor is None else keras.Model(input_tensor, model.output)
        source.load(network, fresh)
    return model


def _overridden(source: Source, overrides: dict[str, Any]) -> CoAtNetConfig:
    """The architecture of the weights, with what may be changed without making them misfit."""
    config = source.architecture.replace(**overrides)
    if not config.same_network(source.architecture):
        fixed = {
            name: getattr(source.architecture, name)
            for name in overrides
            if name not in FREE_FIELDS
        }
        had = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
        raise ValueError(
            f"The weights {source.name} are of a network with {had}. Received: "
            f"{', '.join(f'{name}={overrides[name]!r}' for name in fixed)}. Leave these arguments "
            "out, or use weights=None."
        )
    return config


def _classes_with(weights: Any, source: Source, classes: int) -> tuple[int, str | None]:
    """How many classes to build with these weights, and which part of the head stays random."""
    if source.classes is None or source.classes == classes:
        return classes, None
    if isinstance(classes, _DefaultClasses) and source.classes:
        return source.classes, None
    if weights in WORDS:
        raise ValueError(
            f"With weights={weights!r} and a top, `classes` must be {source.classes}. Received: "
            f"classes={classes}. For a new classifier use include_top=False and add a Dense layer, "
            f"or name the checkpoint: weights={source.name!r}, classes={classes}."
        )
    part, brought = (
        ("classifier", f"one of {source.classes}") if source.classes else ("head", "none")
    )
    warnings.warn(
        f"The {part} for {classes} classes starts from random values: {source.name} brings "
        f"{brought}. Train it before you use it.",
        stacklevel=4,
    )
    return classes, part


def _check_pooling(pooling: Any) -> None:
    if pooling not in (None, "avg", "max"):
        raise ValueError(f"`pooling` must be None, 'avg' or 'max'. Received: pooling={pooling!r}")


def _check_weights(weights: Any) -> None:
    if weights is not None and not isinstance(weights, str | os.PathLike):
        raise ValueError(
            "`weights` must be None, a name or a path. Received: "
            f"weights of type {type(weights).__name__}"
        )


def _checked_preprocessing(include_preprocessing: Any) -> bool | None:
    value = as_python(include_preprocessing)
    if value is not None and not isinstance(value, bool):
        raise ValueError(
            "`include_preprocessing` must be True, False or None. Received: "
            f"include_preprocessing={value!r:.100}"
        )
    return value


def _check_activation(activation: Any) -> None:
    allowed = (keras.activations.get("softmax"), keras.activations.get(None))
    if keras.activations.get(activation) not in allowed:
        raise ValueError(
            "With weights and a top, `classifier_activation` must be 'softmax' or None. Received: "
            f"classifier_activation={activation!r}. Take the logits (None) and add an activation "
            "of your own."
        )


def _checked_inputs(
    include_top: bool, input_tensor: Any, input_shape: Any
) -> tuple[int | None, int | None, int] | None:
    """The shape of the input without batch, or None where it was left open."""
    if input_tensor is not None:
        if not isinstance(input_tensor, keras.KerasTensor):
            raise ValueError(
                "`input_tensor` must be a KerasTensor, such as keras.Input returns. "
                f"Received: {type(input_tensor).__name__}"
            )
        shape = tuple(input_tensor.shape[1:])
        if input_shape is not None and tuple(input_shape) != shape:
            raise ValueError(
                f"`input_shape` {tuple(input_shape)} is not that of `input_tensor`, {shape}. Give "
                "one of the two."
            )
        input_shape = shape
    if input_shape is None:
        return None
    shape = tuple(map(as_python, input_shape)) if isinstance(input_shape, Sequence) else ()
    sizes_fine = all(size is None or _is_int(size, MIN_SIZE) for size in shape[:2])
    if len(shape) != 3 or not sizes_fine or not _is_int(shape[2], 1):
        raise ValueError(
            "`input_shape` must be (height, width, channels), channels last, with a height and "
            f"width of at least {MIN_SIZE} pixels. Received: input_shape={input_shape!r}"
        )
    if include_top and None in shape:
        raise ValueError(
            "With include_top=True the height and width must be known. Received: "
            f"input_shape={input_shape!r}. Give numbers, or use include_top=False."
        )
    return shape


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def preprocess_input(x: Any, data_format: str | None = None) -> Any:
    """Returns its argument: the models normalise raw pixels themselves.

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
