"""The variables of a CoAtNet, listed from its configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from keras_coatnet.config import Block, CoAtNetConfig
from keras_coatnet.sublayers import Part, Sublayer


@dataclass(frozen=True)
class Variable:
    """A variable of a network that need not be built.

    Attributes:
        path: the variable's path in a built model.
        shape: its shape.
        trainable: whether it has a gradient.
        split_axis: the axis that is shared out to devices if the model is split; None: none.
    """

    path: str
    shape: tuple[int, ...]
    trainable: bool = True
    split_axis: int | None = None

    def shard_shape(self, num_shards: int) -> tuple[int, ...]:
        """Returns the shape of one device's shard.

        Args:
            num_shards: devices that the model is split over.

        Returns:
            A shape; that of the whole variable where it is not split.

        Example:
            >>> Variable("expand/kernel", (1, 1, 192, 768), split_axis=-1).shard_shape(4)
            (1, 1, 192, 192)
        """
        shape = list(self.shape)
        if self.split_axis is not None and shape[self.split_axis] % num_shards == 0:
            shape[self.split_axis] //= num_shards
        return tuple(shape)


@dataclass(frozen=True)
class Map:
    """Height and width of the feature map before and after a part of a network."""

    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def offsets(self) -> tuple[int, int]:
        """Relative offsets between two positions of the map after it: along height and width."""
        return 2 * self.after[0] - 1, 2 * self.after[1] - 1

    def positions(self, sublayer: Sublayer) -> int:
        """How often a sublayer is computed for one image."""
        return math.prod(
            {
                "input": self.before,
                "output": self.after,
                "offsets": self.offsets,
                "vector": (1,),
            }[sublayer.place]
        )


def parts_and_maps(
    config: CoAtNetConfig, input_shape: tuple[int, int, int], classes: int | None
) -> Iterator[tuple[Part | Block, Map]]:
    """Yields the stem, the blocks and the head, each with the sizes of its feature maps.

    Args:
        config: the network.
        input_shape: (height, width, channels) in pixels.
        classes: outputs of the classifier; None for a network without top.

    Yields:
        Pairs of a part and a `Map`.
    """
    height, width, channels = input_shape
    for part in (config.stem(channels), *config.blocks(), config.head(classes)):
        before = height, width
        height, width = math.ceil(height / part.strides), math.ceil(width / part.strides)
        yield part, Map(before, (height, width))


def variables(
    config: CoAtNetConfig,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    include_top: bool = True,
) -> Iterator[Variable]:
    """Yields the variables of a network, except the seeds of random draws.

    Args:
        config: the network.
        input_shape: (height, width, channels) in pixels.
        classes: outputs of the classifier.
        include_top: whether the network has its head.

    Yields:
        A `Variable` each, in no particular order.

    Example:
        >>> from keras_coatnet.architectures import ARCHITECTURES
        >>> next(variables(ARCHITECTURES["coatnet0"])).shape
        (3, 3, 3, 64)
    """
    for part, sizes in parts_and_maps(config, input_shape, classes if include_top else None):
        for sublayer in part.sublayers:
            prefix = f"{part.name}/{sublayer.name}" if part.name else sublayer.name
            for variable in _variables_of(sublayer, sizes.offsets):
                yield dataclasses.replace(variable, path=f"{prefix}/{variable.path}")


def _variables_of(sublayer: Sublayer, offsets: tuple[int, int]) -> Iterator[Variable]:
    filters = sublayer.filters
    on_all = -1 if sublayer.split == "filters" else None
    if sublayer.kind in ("conv", "dense", "depthwise"):
        # A depthwise kernel ends with (channels in, multiplier), and is split along the former.
        on_filters = -2 if sublayer.kind == "depthwise" else -1
        axis = {"filters": on_filters, "filters_in": -2, None: None}[sublayer.split]
        yield Variable("kernel", sublayer.kernel_shape, split_axis=axis)
        if sublayer.use_bias:
            yield Variable("bias", (filters,), split_axis=on_all)
    elif sublayer.kind in ("batch_norm", "layer_norm"):
        for name in ("gamma", "beta"):
            yield Variable(name, (filters,), split_axis=on_all)
        if sublayer.kind == "batch_norm":
            for name in ("moving_mean", "moving_variance"):
                yield Variable(name, (filters,), trainable=False, split_axis=on_all)
    elif sublayer.kind == "table":
        yield Variable("table", (filters, *offsets), split_axis=-3)
    elif sublayer.kind == "scale":
        yield Variable("scale", (filters,))


def check_split(config: CoAtNetConfig, num_shards: int) -> None:
    """Checks that a network can be split over a number of devices.

    Args:
        config: the network.
        num_shards: devices that the model is split over.

    Raises:
        ValueError: `num_shards` does not divide the attention heads of one of the blocks.
    """
    for block in config.blocks():
        if block.kind == "T" and block.num_heads % num_shards:
            raise ValueError(
                f"The {block.num_heads} attention heads of {block.name} cannot be shared out "
                f"evenly among {num_shards} devices. Split the model over a number that divides "
                "them."
            )
