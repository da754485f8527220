"""What a training step keeps in a device's memory, worked out without making the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from keras_coatnet.config import Block, CoAtNetConfig, find_architecture
from keras_coatnet.training.parallel import check_heads, part_shape

# Tensors of the size of each weight that an optimizer keeps.
MOMENTS = {"sgd": 0, "lion": 1, "adam": 2, "adamw": 2}

# Bytes of an activation.
_PRECISIONS = {"float32": 4, "mixed_bfloat16": 2, "mixed_float16": 2}

# A GELU is several operations, of which two keep a tensor beside the input and the output; this
# meets what TensorFlow's steps take within a quarter.
_GELU = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: weights and moving statistics, float32.
        gradients: one for each weight, float32.
        moments: the optimizer's.
        average: the moving average of the weights.
        copies: of the weights in half precision; 0 in float32.
        activations: an estimate of what the gradients need, good to a quarter or so.
        rematerialised: the same where blocks are computed twice
            (`keras_coatnet.training.rematerialisation`).
    """

    parameters: int
    gradients: int
    moments: int
    average: int
    copies: int
    activations: int
    rematerialised: int

    def total(self, rematerialise: bool = False) -> int:
        """All together, with the one or the other activations."""
        fixed = self.parameters + self.gradients + self.moments + self.average + self.copies
        return fixed + (self.rematerialised if rematerialise else self.activations)


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


def memory_per_device(
    architecture: str | CoAtNetConfig,
    shape: tuple[int, int] = (1, 1),
    input_shape: tuple[int, int, int] = (224, 224, 3),
    batch_per_device: int = 8,
    precision: str = "mixed_bfloat16",
    optimizer: str = "adamw",
    ema: bool = True,
    classes: int = 1000,
) -> Memory:
    """Works out what one device holds in a training step.

    Args:
        architecture: a name out of `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        shape: groups of devices, and devices in each, as of `parallel.model_parallel`. Only the
            latter matters.
        input_shape: (height, width, channels) in pixels.
        batch_per_device: images that a device computes on; those of a group share theirs.
        precision: the dtype policy: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"`.
        optimizer: `"adamw"`, `"adam"`, `"lion"` or `"sgd"` without momentum.
        ema: whether a moving average of the weights is kept.
        classes: outputs of the classifier.

    Returns:
        A `Memory`. All but the activations is exact; what the framework itself and the input
        pipeline take comes on top.

    Raises:
        ValueError: there is no such architecture, precision or optimizer, or its heads cannot be
            shared out evenly among the devices of a group.

    Example:
        >>> memory = memory_per_device("coatnet7", (2, 4), batch_per_device=1)
        >>> round(memory.parameters / 2**30, 2)
        2.3
    """
    config = find_architecture(architecture)
    for name, value, choices in (
        ("precision", precision, _PRECISIONS),
        ("optimizer", optimizer, MOMENTS),
    ):
        if value not in choices:
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(repr, choices))}. "
                f"Received: {name}={value!r}"
            )
    parts = shape[1]
    check_heads(config, parts)
    weights = state = 0
    for variable in variables(config, input_shape, classes):
        size = 4 * math.prod(part_shape(variable.path, variable.shape, parts))
        weights += size if variable.trainable else 0
        state += 0 if variable.trainable else size
    size = _PRECISIONS[precision]
    plain, rematerialised = _activations(config, input_shape, parts, size)
    return Memory(
        parameters=weights + state,
        gradients=weights,
        moments=MOMENTS[optimizer] * weights,
        average=weights if ema else 0,
        copies=weights // 2 if size == 2 else 0,
        activations=batch_per_device * plain,
        rematerialised=batch_per_device * rematerialised,
    )


def memory_table(
    architectures: Iterable[str] = ("coatnet6", "coatnet7"),
    shapes: Iterable[tuple[int, int]] = ((1, 1), (4, 2), (2, 4)),
    **options,
) -> list[dict[str, str | int | tuple[int, int]]]:
    """`memory_per_device` for several networks and meshes.

    Args:
        architectures: names.
        shapes: groups of devices, and devices in each.
        **options: further arguments of `memory_per_device`.

    Returns:
        A row each: `architecture`, `shape`, the fields of `Memory`, `total` and
        `total_rematerialised`, in bytes.

    Example:
        >>> rows = memory_table(["coatnet6"], [(1, 1), (1, 4)], batch_per_device=16)
        >>> rows[0]["total"] > 3 * rows[1]["total"]
        True
    """
    rows = []
    shapes = list(shapes)
    for architecture in architectures:
        for shape in shapes:
            memory = memory_per_device(architecture, shape, **options)
            rows.append(
                {
                    "architecture": architecture,
                    "shape": shape,
                    **dataclasses.asdict(memory),
                    "total": memory.total(),
                    "total_rematerialised": memory.total(rematerialise=True),
                }
            )
    return rows


# --- Variables -------------------------------------------------------------------------------


def variables(
    config: CoAtNetConfig, input_shape: tuple[int, int, int] = (224, 224, 3), classes: int = 1000
) -> Iterator[Variable]:
    """Yields the variables of a network with its head, but for the seeds of random draws.

    Args:
        config: the network.
        input_shape: (height, width, channels) in pixels.
        classes: outputs of the classifier.

    Yields:
        A `Variable` each, in no particular order.
    """
    height, width = (math.ceil(side / 2) for side in input_shape[:2])
    first, second = config.stem_width
    yield from _layer("stem_conv1", (3, 3, input_shape[2], first), config.stem_bias)
    yield from _norm("stem_norm", first, "batch")
    yield from _layer("stem_conv2", (3, 3, first, second), config.stem_bias)
    for block in config.blocks():
        height, width = (math.ceil(side / block.stride) for side in (height, width))
        of_block = _mbconv(config, block) if block.kind == "C" else ()
        if block.kind == "T":
            of_block = _transformer(config, block, (2 * height - 1, 2 * width - 1))
        for variable in of_block:
            yield dataclasses.replace(variable, path=f"{block.name}/{variable.path}")
    if config.final_norm is not None:
        yield from _norm("norm", config.width, config.transformer_norm)
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
    expanded, squeezed = config.expanded_width(block), config.squeezed_width(block)
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


def _transformer(
    config: CoAtNetConfig, block: Block, offsets: tuple[int, int]
) -> Iterator[Variable]:
    inner, hidden = _inner_width(config, block), config.ffn_expansion * block.width
    heads, kind = inner // config.head_size, config.transformer_norm
    yield from _norm("attention_norm", block.width_in, kind)
    for name in ("query", "key", "value"):
        yield from _layer(f"attention/{name}", (block.width_in, inner), config.attention_bias)
    yield from _layer("attention/projection", (inner, block.width), config.attention_bias)
    if config.relative_position == "table":
        yield Variable("attention/position/table", (heads, *offsets))
    else:
        between = config.relative_position_width
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


def _inner_width(config: CoAtNetConfig, block: Block) -> int:
    return block.width if config.attention_width == "output" else block.width_in


# --- Activations -----------------------------------------------------------------------------


def _activations(
    config: CoAtNetConfig, input_shape: tuple[int, int, int], parts: int, size: int
) -> tuple[int, int]:
    """Bytes kept for one image on one device: of all blocks, and where they are computed twice.

    Each operation keeps its input, or its output where that is the next one's input.
    """
    height, width = (math.ceil(side / 2) for side in input_shape[:2])
    first, second = config.stem_width
    stem = size * height * width * ((3 + _GELU) * first + second)
    inputs, inside = [], []
    for block in config.blocks():
        before = height * width
        height, width = (math.ceil(side / block.stride) for side in (height, width))
        inputs.append(size * before * block.width_in)
        if block.kind == "C":
            inside.append(_inside_mbconv(config, block, before, height * width, parts, size))
        else:
            inside.append(_inside_transformer(config, block, before, height * width, parts, size))
    last = size * height * width * config.width
    return (
        stem + last + sum(inputs) + sum(inside),
        stem + last + sum(inputs) + max(inside),
    )


def _share(width: int, parts: int) -> int:
    return width // parts if width % parts == 0 else width


def _inside_mbconv(
    config: CoAtNetConfig, block: Block, before: int, after: int, parts: int, size: int
) -> int:
    expanded = _share(config.expanded_width(block), parts)
    early = block.stride == 1 or config.stride_on != "depthwise"
    wide = after if early else before
    return size * (
        before * block.width_in  # the norm's output
        + wide * expanded * (3 + _GELU)  # outputs of the convolution, the norm and the GELU
        + after * expanded * (4 + _GELU)  # the same, and after squeeze-and-excitation
        + after * block.width * 2  # outputs of the projection and, where there is one, shortcut
    )


def _inside_transformer(
    config: CoAtNetConfig, block: Block, before: int, after: int, parts: int, size: int
) -> int:
    inner = _inner_width(config, block)
    heads = _share(inner // config.head_size, parts)
    hidden = _share(config.ffn_expansion * block.width, parts)
    logits = heads * after * after
    pooled = (before + after if block.stride > 1 else before) * block.width_in
    return (
        size * (pooled + after * (4 * _share(inner, parts) + 4 * block.width))
        + size * after * hidden * (2 + _GELU)
        + logits * (2 * 4 + (size if size < 4 else 0))  # logits and weights are float32
    )
