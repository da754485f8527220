"""Parameters and operations of a CoAtNet, counted from its configuration alone."""

from __future__ import annotations

import math
from typing import Any

from keras_coatnet.architectures import find_architecture
from keras_coatnet.arguments import as_python, boolean, choice, whole_number
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.counting.variables import Map, parts_and_maps, variables
from keras_coatnet.sublayers import Sublayer

CONVENTIONS = ("multiply_adds", "paper")

# Float operations that the paper's profiler counted for each output channel and position, besides
# products and biases. Those of normalization, softmax and pooling are fitted to the 19 published
# figures of CoAtNet-0 to 5, which they meet within 0.12%.
_PER_ELEMENT = {
    "batch_norm": 2,
    "layer_norm": 0,
    "pool": 4,
    "gate": 2,  # the mean, and the product
    "scale": 1,
    "add": 1,
    "global_pool": 1,
}
_ACTIVATION = {"gelu_tanh": 7, "gelu": 7, "silu": 4, "relu": 1}
_SOFTMAX = 6
# The published figures divide the look-up of the relative bias by a batch of this many images.
_PAPER_BATCH = 8


def count_params(
    architecture: str | CoAtNetConfig,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    include_top: bool = True,
) -> int:
    """Counts the trainable parameters of a network without building it, as the paper does.

    The moving statistics of BatchNorm are not trainable and are left out.

    Args:
        architecture: a name from `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        input_shape: (height, width, channels) in pixels; it sets the size of the bias tables.
        classes: outputs of the classifier, at least 1.
        include_top: whether the head is counted.

    Returns:
        An int.

    Raises:
        ValueError: there is no such architecture, or the shape, `classes` or
            `include_top` makes no sense.

    Example:
        >>> count_params("coatnet7")
        2441973112
    """
    config = find_architecture(architecture)
    classes = whole_number("classes", classes)
    include_top = boolean("include_top", include_top)
    listed = variables(config, _checked_shape(input_shape), classes, include_top)
    return sum(math.prod(variable.shape) for variable in listed if variable.trainable)


def count_flops(
    architecture: str | CoAtNetConfig,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    convention: str = "multiply_adds",
    classes: int = 1000,
    include_top: bool = True,
) -> int:
    """Counts the operations that one image takes.

    Args:
        architecture: a name from `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        input_shape: (height, width, channels) in pixels.
        convention: what is counted. `"multiply_adds"`: those of convolutions and matrix products.
            `"paper"`: what the paper's tables print, which is half of all float operations, with
            element-wise ones, and the look-up of the relative bias by one-hot products divided by
            a batch of 8.
        classes: outputs of the classifier, at least 1.
        include_top: whether the head is counted.

    Returns:
        An int, in multiply-adds.

    Raises:
        ValueError: there is no such architecture or convention, or the shape, `classes` or
            `include_top` makes no sense.

    Example:
        >>> round(count_flops("coatnet3", (384, 384, 3), convention="paper") / 1e9, 1)
        107.4
    """
    convention = choice("convention", convention, CONVENTIONS)
    config = find_architecture(architecture)
    shape = _checked_shape(input_shape)
    classes = whole_number("classes", classes)
    top = classes if boolean("include_top", include_top) else None
    placed = [
        (sublayer, sizes)
        for part, sizes in parts_and_maps(config, shape, top)
        for sublayer in part.sublayers
    ]
    multiply_adds = sum(_multiply_adds(*each) for each in placed)
    if convention == "multiply_adds":
        return multiply_adds
    elementwise = sum(_elementwise(*each) for each in placed)
    look_ups = sum(_look_ups(*each) for each in placed)
    return round(multiply_adds + elementwise / 2 + look_ups / _PAPER_BATCH)


def _checked_shape(input_shape: Any) -> tuple[int, int, int]:
    shape = tuple(map(as_python, input_shape)) if isinstance(input_shape, (tuple, list)) else ()
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
    if len(shape) != 3 or not whole or min(shape[:2]) < 32 or shape[2] < 1:
        raise ValueError(
            "`input_shape` must be (height, width, channels) with a height and width of at least "
            f"32 pixels. Received: input_shape={input_shape!r}"
        )
    return shape


def _multiply_adds(sublayer: Sublayer, sizes: Map) -> int:
    positions = sizes.positions(sublayer)
    if sublayer.kind == "attention_weights":
        return sublayer.filters_in * positions**2
    if sublayer.kind == "attention_values":
        return sublayer.filters * positions**2
    return math.prod(sublayer.kernel_shape) * positions


def _elementwise(sublayer: Sublayer, sizes: Map) -> int:
    """Float operations on a map; those on a vector or on offsets are too few to count."""
    if sublayer.place not in ("input", "output"):
        return 0
    positions = sizes.positions(sublayer)
    if sublayer.kind == "attention_weights":  # the scale of the query, and the softmax
        return sublayer.filters_in * positions + _SOFTMAX * sublayer.filters * positions**2
    if sublayer.kind == "activation":
        factor = _ACTIVATION[sublayer.activation]
    else:
        factor = _PER_ELEMENT.get(sublayer.kind, int(sublayer.use_bias))
    return factor * sublayer.filters * positions


def _look_ups(sublayer: Sublayer, sizes: Map) -> int:
    """Two one-hot products spread a table over pairs of rows, then over pairs of columns."""
    if sublayer.kind != "table":
        return 0
    (height, width), (rows, columns) = sizes.after, sizes.offsets
    return sublayer.filters * columns * (height**2 * rows + height**2 * width**2)
