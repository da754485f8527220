"""The classes in which `config.py` describes the operations of a network.

`keras_coatnet.counting` derives variables, operations and memory from such descriptions. Keras is
not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal[
    "conv",
    "depthwise",
    "dense",
    "batch_norm",
    "layer_norm",
    "activation",
    "pool",
    "global_pool",
    "gate",
    "table",
    "attention_weights",
    "attention_values",
    "scale",
    "add",
]
Place = Literal["input", "output", "vector", "offsets"]


class Sublayer(NamedTuple):
    """One operation of a network.

    Attributes:
        kind: what it computes. `"gate"` is the mean and the product of squeeze-and-excitation,
            `"table"` a table of relative biases, `"attention_weights"` the softmax over products of
            query and key, `"attention_values"` the product of these weights and the value,
            `"scale"` a factor for each channel, `"add"` a residual sum.
        name: path of its layer below the block, such as `"squeeze_excite/squeeze"`; empty where it
            has no layer with variables.
        filters_in: channels of its input.
        filters: channels of its output; for `"attention_weights"` and `"table"`, heads.
        place: what it is computed on: the block's `"input"` map, its `"output"` map (smaller if the
            block has a stride), a `"vector"` of channels, or the relative `"offsets"` between two
            positions of the output map.
        kernel_size: rows and columns of a convolution's kernel.
        use_bias: whether it has a bias.
        split: which channels are distributed over devices if the model is: `"filters"`,
            `"filters_in"`, or None if each device has all.
        activation: name of the function, for `"activation"`.
    """

    kind: Kind
    name: str
    filters_in: int
    filters: int
    place: Place = "output"
    kernel_size: int = 1
    use_bias: bool = False
    split: Literal["filters", "filters_in"] | None = None
    activation: str = ""

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel, as Keras has it; `(0,)` for operations without one."""
        if self.kind == "conv":
            return (self.kernel_size, self.kernel_size, self.filters_in, self.filters)
        if self.kind == "depthwise":
            multiplier = self.filters // self.filters_in
            return (self.kernel_size, self.kernel_size, self.filters_in, multiplier)
        if self.kind == "dense":
            return (self.filters_in, self.filters)
        return (0,)


@dataclass(frozen=True)
class Part:
    """The stem, a block or the head.

    Attributes:
        name: the first part of its variables' paths; empty for the stem and the head, whose layers
            are not inside another layer.
        filters_in: channels of its input.
        strides: 2 if it halves the feature map, else 1.
        sublayers: its operations.
    """

    name: str
    filters_in: int
    strides: int
    sublayers: tuple[Sublayer, ...]
