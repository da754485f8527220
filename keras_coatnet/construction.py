"""The code that all constructors share: checks arguments, finds weights, and builds the model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_coatnet.architectures import ARCHITECTURES, size_of
from keras_coatnet.arguments import as_python, boolean, whole_number
from keras_coatnet.config import FREE_FIELDS, CoAtNetConfig
from keras_coatnet.model import CoAtNetModel, build_model
from keras_coatnet.types import Tensor
from keras_coatnet.weights.registry import WORDS
from keras_coatnet.weights.source import Source, find_source

MIN_SIZE = 32
DEFAULT_CLASSES = 1000  # ImageNet's


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments that all constructors share, as `keras_coatnet.CoAtNet` describes them."""

    include_top: bool
    weights: str | os.PathLike | None
    input_tensor: keras.KerasTensor | None
    input_shape: tuple[int | None, int | None, int] | None
    pooling: str | None
    classes: int | None
    classifier_activation: str | Callable | None
    include_preprocessing: bool | None
    name: str
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The networks that a constructor may build.

    Attributes:
        function: the name of the constructor in error messages.
        default: the network that is built without weights.
        size: the size for which words such as `"imagenet"` are looked up; None: it has none.
        others: further networks whose weights may be loaded.
    """

    function: str
    default: CoAtNetConfig
    size: str | None = None
    others: tuple[CoAtNetConfig, ...] = ()


def of_size(function: str, default: str) -> Candidates:
    """Returns the networks of one size.

    Args:
        function: the name of the constructor in error messages.
        default: the architecture that is built without weights.
    """
    size = size_of(default)
    others = tuple(config for name, config in ARCHITECTURES.items() if size_of(name) == size)
    return Candidates(function, ARCHITECTURES[default], size, others)


def build(candidates: Candidates, arguments: Arguments) -> CoAtNetModel:
    """Checks the arguments, finds the weights, builds the model and loads them."""
    arguments = _checked(arguments)
    weights, include_top = arguments.weights, arguments.include_top
    config, source = candidates.default.replace(**arguments.overrides), None
    if weights is not None:
        source = find_source(
            weights, [config, *candidates.others], candidates.size, candidates.function
        )
        config = _overridden(source, arguments.overrides)
    classes, random_part = DEFAULT_CLASSES if arguments.classes is None else arguments.classes, None
    if source is not None and include_top:
        classes, random_part = _classes_with(weights, source, arguments.classes)

    inputs, source_inputs = _make_inputs(arguments, config, source)
    include_preprocessing = arguments.include_preprocessing
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
        pooling=arguments.pooling,
        classes=classes,
        classifier_activation=arguments.classifier_activation,
        include_preprocessing=include_preprocessing,
        name=arguments.name,
    )
    if source is not None:
        # The file does not have the caller's layers ahead of `input_tensor`.
        tensor = arguments.input_tensor
        network = model if tensor is None else keras.Model(tensor, model.output)
        source.load(network, random_part)
    return model


def _checked(arguments: Arguments) -> Arguments:
    """Returns the arguments as Python's own values, with the shape of `input_tensor` if given."""
    include_top, classes = boolean("include_top", arguments.include_top), arguments.classes
    if classes is not None:
        advice = "For a model without a classifier use include_top=False."
        classes = whole_number("classes", classes, advice=advice)
    _check_pooling(arguments.pooling)
    _check_weights(arguments.weights)
    if include_top and arguments.weights is not None:
        _check_activation(arguments.classifier_activation)
    return dataclasses.replace(
        arguments,
        include_top=include_top,
        classes=classes,
        include_preprocessing=_checked_preprocessing(arguments.include_preprocessing),
        input_shape=_checked_shape(include_top, arguments.input_tensor, arguments.input_shape),
    )


def _make_inputs(
    arguments: Arguments, config: CoAtNetConfig, source: Source | None
) -> tuple[Tensor, list[Tensor] | None]:
    """Returns the network's input, and the inputs that `input_tensor` was computed from."""
    inputs: Tensor
    if arguments.input_tensor is not None:
        inputs = arguments.input_tensor
        source_inputs = keras.utils.get_source_inputs(inputs)
    else:
        sides = config.input_sides if arguments.include_top else (None, None)
        channels = (source and source.channels) or 3
        inputs, source_inputs = keras.Input(arguments.input_shape or (*sides, channels)), None
    if source is not None and source.channels not in (None, inputs.shape[-1]):
        raise ValueError(
            f"The weights {source.name} are made for images of {source.channels} channels. "
            f"Received: an input of shape {inputs.shape[1:]}. Use weights=None, or convert the "
            "images."
        )
    return inputs, source_inputs


def _overridden(source: Source, overrides: dict[str, Any]) -> CoAtNetConfig:
    """Returns the architecture of the weights with the overrides, which the weights must fit."""
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


def _classes_with(weights: Any, source: Source, classes: int | None) -> tuple[int, str | None]:
    """Returns the number of classes, and the part of the head that keeps its random values."""
    if classes is None:
        classes = source.classes or DEFAULT_CLASSES
    if source.classes in (None, classes):
        return classes, None
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


def _checked_shape(
    include_top: bool, input_tensor: Any, input_shape: Any
) -> tuple[int | None, int | None, int] | None:
    """Returns the shape of the input without the batch; None if it was not given."""
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
