"""The variables of a CoAtNet, listed from its configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from keras_coatnet.config import Block, CoAtNetConfig


@dataclass(frozen=True)
class Variable:
    """A variable of a model that is not made.

    Attributes:
        path: as Keras would name it.
        shape: its shape.
        trainable: whether it has a gradient.
    """

    path: str
    shape: tuple[int, ...]
    trainable: bool = True


def variables(
    config: CoAtNetConfig,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    include_top: bool = True,
) -> Iterator[Variable]:
    """Yields the variables of a network, but for the seeds of random draws.

    Args:
        config: the network.
        input_shape: (height, width, channels) in pixels.
        classes: outputs of the classifier.
        include_top: whether the head is there.

    Yields:
        A `Variable` each, in no particular order.

    Example:
        >>> from keras_coatnet.architectures import ARCHITECTURES
        >>> next(variables(ARCHITECTURES["coatnet0"])).shape
        (3, 3, 3, 64)
    """
    height, width = (math.ceil(side / 2) for side in input_shape[:2])
    first, second = config.stem_width
    yield from _layer("stem_conv1", (3, 3, input_shape[2], first), config.stem_bias)
    yield from _norm("stem_norm", first, config.conv_norm)
    yield from _layer("stem_conv2", (3, 3, first, second), config.stem_bias)
    for block in config.blocks():
        height, width = (math.ceil(side / block.stride) for side in (height, width))
        if block.kind == "T":
            of_block = _transformer(config, block, (2 * height - 1, 2 * width - 1))
        elif config.conv_block == "convnext":
            of_block = _convnext(config, block)
        else:
            of_block = _mbconv(config, block)
        for variable in of_block:
            yield dataclasses.replace(variable, path=f"{block.name}/{variable.path}")
    if config.final_norm == "before_pool" or (config.final_norm and include_top):
        yield from _norm("norm", config.width, config.transformer_norm)
    if not include_top:
        return
    if config.hidden_head:
        yield from _layer("hidden", (config.width, config.width))
    yield from _layer("predictions", (config.width, classes))


def _layer(name: str, shape: tuple[int, ...], bias: bool = True) -> Iterator[Variable]:
    yield Variable(f"{name}/kernel", shape)
    if bias:
        yield Variable(f"{name}/bias", shape[-1:])


def _norm(name: str, width: int, kind: str) -> Iterator[Variable]:
    for variable in ("gamma", "beta"):
        yield Variable(f"{name}/{variable}", (width,))
    if kind == "batch":
        for variable in ("moving_mean", "moving_variance"):
            yield Variable(f"{name}/{variable}", (width,), trainable=False)


def _mbconv(config: CoAtNetConfig, block: Block) -> Iterator[Variable]:
    expanded, squeezed = config.expanded_filters(block), config.squeezed_filters(block)
    yield from _norm("input_norm", block.width_in, "batch")
    yield from _layer("expand", (1, 1, block.width_in, expanded), bias=False)
    yield from _norm("expand_norm", expanded, "batch")
    yield Variable("depthwise/kernel", (3, 3, expanded, 1))
    yield from _norm("depthwise_norm", expanded, "batch")
    yield from _layer("squeeze_excite/squeeze", (expanded, squeezed))
    yield from _layer("squeeze_excite/excite", (squeezed, expanded))
    yield from _layer("project", (1, 1, expanded, block.width), config.conv_bias)
    if block.width_in != block.width:
        yield from _layer("shortcut", (1, 1, block.width_in, block.width), config.conv_bias)


def _convnext(config: CoAtNetConfig, block: Block) -> Iterator[Variable]:
    width_in, width, expanded = block.width_in, block.width, config.expanded_filters(block)
    yield Variable("depthwise_conv/kernel", (7, 7, width_in, width // width_in))
    if config.conv_bias:
        yield Variable("depthwise_conv/bias", (width,))
    yield from _norm("ffn_norm", width, "layer")
    yield from _layer("ffn_expand", (width, expanded), config.conv_bias)
    yield from _layer("ffn_project", (expanded, width), config.conv_bias)
    if config.conv_layer_scale is not None:
        yield Variable("ffn_scale/scale", (width,))
    if width_in != width:
        yield from _layer("shortcut", (width_in, width), config.conv_bias)


def _transformer(
    config: CoAtNetConfig, block: Block, offsets: tuple[int, int]
) -> Iterator[Variable]:
    inner, hidden = attention_width(config, block), config.ffn_expansion * block.width
    heads, kind = inner // config.head_dim, config.transformer_norm
    yield from _norm("attention_norm", block.width_in, kind)
    for name in ("query", "key", "value"):
        yield from _layer(f"attention/{name}", (block.width_in, inner), config.attention_bias)
    yield from _layer("attention/projection", (inner, block.width), config.attention_bias)
    if config.relative_position == "table":
        yield Variable("attention/position/table", (heads, *offsets))
    else:
        between = config.relative_position_hidden_dim
        yield from _layer("attention/position/hidden", (2, between))
        yield from _layer("attention/position/values", (between, heads))
    if block.width_in != block.width:
        bias = config.transformer_shortcut_bias
        yield from _layer("shortcut", (block.width_in, block.width), bias)
    yield from _norm("ffn_norm", block.width, kind)
    yield from _layer("ffn_expand", (block.width, hidden), config.ffn_bias)
    yield from _layer("ffn_project", (hidden, block.width), config.ffn_bias)
    if config.layer_scale is not None:
        for branch in ("attention", "ffn"):
            yield Variable(f"{branch}_scale/scale", (block.width,))


def attention_width(config: CoAtNetConfig, block: Block) -> int:
    """Channels of q, k and v of a Transformer block.

    Args:
        config: the network.
        block: one of `config.blocks()`.

    Returns:
        An int.
    """
    return block.width if config.attention_from == "output" else block.width_in
