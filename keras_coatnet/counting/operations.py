"""Parameters and operations of a CoAtNet, worked out from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from keras_coatnet.architectures import find_architecture
from keras_coatnet.arguments import as_python, boolean, whole_number
from keras_coatnet.config import Block, CoAtNetConfig
from keras_coatnet.counting.variables import attention_width, variables

CONVENTIONS = ("multiply_adds", "paper")

# Float operations that the paper's profiler counted for one element. Normalization, softmax and
# pooling are fitted to the 19 published figures of CoAtNet-0 to 5, which they meet within 0.12%.
_ACTIVATION = {"gelu_tanh": 7, "gelu": 7, "silu": 4, "relu": 1}
_BATCH_NORM, _LAYER_NORM, _SOFTMAX, _POOL = 2, 0, 6, 4
# The published figures divide the look-up of the relative bias by a batch of this many images.
_PAPER_BATCH = 8


@dataclass(frozen=True)
class _Part:
    """What one part of a network does, for one image."""

    multiply_adds: int = 0
    elementwise: int = 0
    look_ups: int = 0


def count_params(
    architecture: str | CoAtNetConfig,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    include_top: bool = True,
) -> int:
    """Counts the trainable parameters of a network without building it, as the paper does.

    The moving statistics of BatchNorm are not trainable and are left out.

    Args:
        architecture: a name out of `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
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
        architecture: a name out of `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        input_shape: (height, width, channels) in pixels.
        convention: `"multiply_adds"`: those of convolutions and matrix products alone; or
            `"paper"`: half of all float operations, element-wise ones too, and the look-up of the
            relative bias by one-hot products divided by a batch of 8, which is what the paper's
            tables print.
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
    if convention not in CONVENTIONS:
        raise ValueError(
            f"`convention` must be one of {', '.join(map(repr, CONVENTIONS))}. "
            f"Received: convention={convention!r}"
        )
    parts = list(_parts(architecture, input_shape, classes, include_top))
    multiply_adds = sum(part.multiply_adds for part in parts)
    if convention == "multiply_adds":
        return multiply_adds
    elementwise = sum(part.elementwise for part in parts)
    look_ups = sum(part.look_ups for part in parts)
    return round(multiply_adds + elementwise / 2 + look_ups / _PAPER_BATCH)


def _parts(
    architecture: str | CoAtNetConfig, input_shape: Any, classes: int, include_top: bool
) -> Iterator[_Part]:
    config = find_architecture(architecture)
    height, width, channels = _checked_shape(input_shape)
    classes = whole_number("classes", classes)
    include_top = boolean("include_top", include_top)
    height, width = math.ceil(height / 2), math.ceil(width / 2)
    yield _stem(config, channels, height * width)
    for block in config.blocks():
        positions_in = height * width
        height, width = math.ceil(height / block.stride), math.ceil(width / block.stride)
        if block.kind == "T":
            yield _transformer(config, block, height, width)
        elif config.conv_block == "convnext":
            yield _convnext(config, block, positions_in, height * width)
        else:
            yield _mbconv(config, block, positions_in, height * width)
    yield _head(config, height * width, classes if include_top else None)


def _checked_shape(input_shape: Any) -> tuple[int, int, int]:
    shape = tuple(map(as_python, input_shape)) if isinstance(input_shape, (tuple, list)) else ()
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
    if len(shape) != 3 or not whole or min(shape[:2]) < 32 or shape[2] < 1:
        raise ValueError(
            "`input_shape` must be (height, width, channels) with a height and width of at least "
            f"32 pixels. Received: input_shape={input_shape!r}"
        )
    return shape


def _stem(config: CoAtNetConfig, channels: int, positions: int) -> _Part:
    first, second = config.stem_width
    kernels = 9 * channels * first + 9 * first * second
    bias = int(config.stem_bias)
    norm = _BATCH_NORM if config.conv_norm == "batch" else _LAYER_NORM
    per_element = bias + norm + _ACTIVATION[config.conv_activation]
    return _Part(
        multiply_adds=kernels * positions,
        elementwise=(per_element * first + bias * second) * positions,
    )


def _mbconv(config: CoAtNetConfig, block: Block, positions_in: int, positions: int) -> _Part:
    width_in, width = block.width_in, block.width
    expanded, squeezed = config.expanded_filters(block), config.squeezed_filters(block)
    bias, projected = int(config.conv_bias), int(width_in != width)
    strided, pooled = block.stride > 1, block.stride > 1 and config.stride_on == "pool"
    early = strided and config.stride_on != "depthwise"
    positions_expanded = positions if early else positions_in
    activation = _ACTIVATION[config.conv_activation]
    prenorm = _BATCH_NORM + (activation if config.conv_prenorm_activation else 0)
    return _Part(
        multiply_adds=width_in * expanded * positions_expanded
        + 9 * expanded * positions
        + 2 * expanded * squeezed
        + expanded * width * positions
        + projected * width_in * width * positions,
        elementwise=prenorm * width_in * positions_in
        + (_BATCH_NORM + activation) * expanded * (positions_expanded + positions)
        + 2 * expanded * positions  # the squeeze's mean and the product with its output
        + (1 + bias) * width * positions  # the residual sum and the bias
        + int(strided) * _POOL * width_in * positions
        + int(pooled) * _POOL * width_in * positions
        + projected * bias * width * positions,
    )


def _convnext(config: CoAtNetConfig, block: Block, positions_in: int, positions: int) -> _Part:
    width_in, width, expanded = block.width_in, block.width, config.expanded_filters(block)
    bias, projected = int(config.conv_bias), int(width_in != width)
    strided, pooled = block.stride > 1, block.stride > 1 and config.stride_on == "pool"
    scale = int(config.conv_layer_scale is not None)
    per_position = 49 * width + 2 * width * expanded + projected * width_in * width
    return _Part(
        multiply_adds=per_position * positions,
        elementwise=(bias + _LAYER_NORM) * width * positions
        + (bias + _ACTIVATION[config.conv_activation]) * expanded * positions
        + (1 + bias + scale) * width * positions  # the residual sum, the bias and the scale
        + (int(strided) + int(pooled)) * _POOL * width_in * positions
        + projected * bias * width * positions,
    )


def _transformer(config: CoAtNetConfig, block: Block, height: int, width: int) -> _Part:
    channels_in, channels = block.width_in, block.width
    inner = attention_width(config, block)
    hidden = config.ffn_expansion * channels
    heads, positions = inner // config.head_dim, height * width
    offsets = (2 * height - 1) * (2 * width - 1)
    bias, ffn_bias = int(config.attention_bias), int(config.ffn_bias)
    projected = int(channels_in != channels)
    shortcut_bias = projected * int(config.transformer_shortcut_bias)
    norm = _LAYER_NORM if config.transformer_norm == "layer" else _BATCH_NORM
    scale = int(config.layer_scale is not None)
    position_products, look_ups = 0, 0
    if config.relative_position == "mlp":
        mlp = config.relative_position_hidden_dim
        position_products = (2 + heads) * mlp * offsets
    else:
        # Two one-hot products spread the table over pairs of rows, then over pairs of columns.
        look_ups = heads * (2 * width - 1) * (height**2 * (2 * height - 1) + height**2 * width**2)
    kernels = (
        3 * channels_in * inner
        + inner * channels
        + projected * channels_in * channels
        + 2 * channels * hidden
    )
    activation = _ACTIVATION[config.ffn_activation]
    return _Part(
        multiply_adds=kernels * positions + 2 * inner * positions**2 + position_products,
        elementwise=norm * (channels_in + channels) * positions
        + (3 * bias + 1) * inner * positions  # biases of q, k and v, and the scale of q
        + (bias + 1) * channels * positions  # bias of the output, and the residual sum
        + int(block.stride > 1) * 2 * _POOL * channels_in * positions
        + shortcut_bias * channels * positions
        + _SOFTMAX * heads * positions**2
        + (ffn_bias + activation) * hidden * positions
        + (ffn_bias + 1) * channels * positions
        + 2 * scale * channels * positions,
        look_ups=look_ups,
    )


def _head(config: CoAtNetConfig, positions: int, classes: int | None) -> _Part:
    if classes is None:
        return _Part()
    width = config.width
    return _Part(
        multiply_adds=int(config.hidden_head) * width * width + width * classes,
        elementwise=width * positions,
    )
