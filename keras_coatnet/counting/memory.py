"""What a training step keeps in a device's memory, worked out without making the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from keras_coatnet.architectures import find_architecture
from keras_coatnet.config import Block, CoAtNetConfig
from keras_coatnet.counting.variables import attention_width, variables
from keras_coatnet.training.engine.sharding import check_heads, part_shape

# Tensors of the size of each weight that an optimizer keeps.
MOMENTS = {"sgd": 0, "lion": 1, "adam": 2, "adamw": 2}

# Bytes of an activation.
_PRECISIONS = {"float32": 4, "mixed_bfloat16": 2, "mixed_float16": 2}

# A GELU is several operations, of which two keep a tensor beside the input and the output; this
# meets what TensorFlow's steps keep on GPUs within a quarter. On CPUs they keep neither of the two
# (`layers.activations.compile_activation`).
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
        activations: an estimate of what the gradients need, good to a quarter or so; on CPUs, where
            TensorFlow compiles activations, a third less is needed.
        rematerialized: the same where blocks are computed twice
            (`keras_coatnet.training.engine.remat`).
    """

    parameters: int
    gradients: int
    moments: int
    average: int
    copies: int
    activations: int
    rematerialized: int

    def total(self, remat: bool = False) -> int:
        """All together, with the one or the other activations."""
        fixed = self.parameters + self.gradients + self.moments + self.average + self.copies
        return fixed + (self.rematerialized if remat else self.activations)


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
    plain, rematerialized = _activations(config, input_shape, parts, size)
    return Memory(
        parameters=weights + state,
        gradients=weights,
        moments=MOMENTS[optimizer] * weights,
        average=weights if ema else 0,
        copies=weights // 2 if size == 2 else 0,
        activations=batch_per_device * plain,
        rematerialized=batch_per_device * rematerialized,
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
        `total_rematerialized`, in bytes.

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
                    "total_rematerialized": memory.total(remat=True),
                }
            )
    return rows


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
        if block.kind == "T":
            count = _inside_transformer
        else:
            count = _inside_convnext if config.conv_block == "convnext" else _inside_mbconv
        inside.append(count(config, block, before, height * width, parts, size))
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
    expanded = _share(config.expanded_filters(block), parts)
    early = block.stride == 1 or config.stride_on != "depthwise"
    wide = after if early else before
    return size * (
        before * block.width_in  # the norm's output
        + wide * expanded * (3 + _GELU)  # outputs of the convolution, the norm and the GELU
        + after * expanded * (4 + _GELU)  # the same, and after squeeze-and-excitation
        + after * block.width * 2  # outputs of the projection and, where there is one, shortcut
    )


def _inside_convnext(
    config: CoAtNetConfig, block: Block, before: int, after: int, parts: int, size: int
) -> int:
    expanded = _share(config.expanded_filters(block), parts)
    pooled = after if block.stride > 1 and config.stride_on == "pool" else 0
    scaled = int(config.conv_layer_scale is not None)
    return size * (
        pooled * block.width_in
        + after * block.width * (3 + scaled)  # of the convolution, the norm and the projection
        + after * expanded * (2 + _GELU)
        + after * block.width  # of the shortcut
    )


def _inside_transformer(
    config: CoAtNetConfig, block: Block, before: int, after: int, parts: int, size: int
) -> int:
    inner = attention_width(config, block)
    heads = _share(inner // config.head_dim, parts)
    hidden = _share(config.ffn_expansion * block.width, parts)
    logits = heads * after * after
    pooled = (before + after if block.stride > 1 else before) * block.width_in
    return (
        size * (pooled + after * (4 * _share(inner, parts) + 4 * block.width))
        + size * after * hidden * (2 + _GELU)
        + logits * (2 * 4 + (size if size < 4 else 0))  # logits and weights are float32
    )
