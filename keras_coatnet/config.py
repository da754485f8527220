"""What a CoAtNet is made of, as data.

Nothing here imports Keras. `CoAtNetConfig` holds every choice by which the published networks
differ; a network's blocks are read off it with `CoAtNetConfig.blocks`, which the model, the
counters and the weight readers all walk, so that they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from keras_coatnet.arguments import as_python, boolean, choice, number, whole_number

# The values that a field with a small vocabulary takes.
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "expansion_from": ("output", "input"),
        "stride_on": ("expansion", "depthwise", "pool"),
        "conv_block": ("mbconv", "convnext"),
        "conv_pool": ("max2", "avg2", "max3"),
        "conv_stride_pool": ("max2", "avg2", "max3"),
        "conv_padding": ("same", "symmetric"),
        "squeeze_from": ("output", "input", "expanded"),
        "squeeze_place": ("after_norm", "before_norm"),
        "transformer_pool": ("max2", "avg2", "max3"),
        "transformer_norm": ("layer", "batch"),
        "attention_from": ("output", "input"),
        "relative_position": ("table", "mlp"),
        "final_norm": ("after_pool", "before_pool", None),
        "conv_activation": ("gelu_tanh", "gelu", "silu", "relu"),
        "squeeze_activation": ("gelu_tanh", "gelu", "silu", "relu"),
        "ffn_activation": ("gelu_tanh", "gelu", "silu", "relu"),
    }
)

# Beyond any network that can be trained, so that a mistake, or a damaged file, is told at once and
# not by a machine without memory. The paper's largest has 56 blocks, 3072 channels and 2.4 billion
# parameters.
MOST_BLOCKS, MOST_CHANNELS, MOST_PIXELS = 1_000, 1 << 16, 1 << 14
MOST_PARAMETERS = 10**11

# Fields that change neither the variables of a network nor what it computes at inference:
# weights fit any value of them.
FREE_FIELDS = ("stochastic_depth", "batch_norm_momentum", "input_size")


@dataclass(frozen=True)
class Block:
    """One residual block of a network.

    Attributes:
        kind: "C" for a convolutional block (MBConv or ConvNeXt), "T" for Transformer.
        stage: the stage it stands in, from 1.
        index: its place within the stage, from 1.
        width_in: channels that enter it.
        width: channels that leave it.
        stride: 2 where it halves the feature map, else 1.
        stochastic_depth: probability that a residual branch of it is dropped in training.
    """

    kind: str
    stage: int
    index: int
    width_in: int
    width: int
    stride: int
    stochastic_depth: float

    @property
    def name(self) -> str:
        """Name of the block's layer, e.g. `"stage3_block2"`."""
        return f"stage{self.stage}_block{self.index}"


@dataclass(frozen=True, repr=False)
class CoAtNetConfig:
    """Every architectural choice of a CoAtNet; the defaults are the paper's (arXiv 2106.04803).

    Args:
        widths: channels of each stage. A stage of layout `"CT"` takes a pair: of its convolutional
            blocks and of its Transformer blocks.
        depths: blocks in each stage, at least 1; a pair for `"CT"`.
        layout: what each stage is made of: `"C"` (convolutional blocks), `"T"` (Transformer), or
            `"CT"` (convolutional blocks that halve the map, then Transformer blocks that keep it,
            as in stage 3 of CoAtNet-6 and 7). No `"C"` may follow a stage that ends with attention
            (section 2.2 of the paper); a `"CT"` may, as in timm's coatnet_nano_cc_224.
        stem_width: channels of the stem's two convolutions: one number for both, or a pair.
        stem_bias: whether the stem's convolutions have a bias.
        conv_block: the convolutional block: `"mbconv"` (the paper's), or `"convnext"` (a 7x7
            depthwise convolution, LayerNorm and two dense layers; the stem's norm is a LayerNorm
            then, too, and the fields on squeeze-and-excitation have no meaning).
        expansion: expanded width of a convolutional block, as a multiple of `expansion_from`.
        expansion_from: `"output"` or `"input"`: whose width is multiplied.
        stride_on: where a convolutional block halves the map: on its 1x1 `"expansion"` (equation
            5; not of a ConvNeXt block), on its `"depthwise"` convolution (the paper's "Stride-2
            DConv2D" rows), or by a `"pool"` ahead of the expansion.
        conv_pool: pooling of a convolutional block's shortcut: `"max2"`, `"avg2"` (2x2) or `"max3"`
            (3x3).
        conv_stride_pool: the pooling that `stride_on="pool"` uses.
        conv_padding: padding of convolutions of stride 2: `"same"` (TensorFlow's, which pads less
            at the top left) or `"symmetric"` (torch's, the same all round).
        conv_activation: activation of the stem and the convolutional blocks: `"gelu_tanh"`,
            `"gelu"` (by erf), `"silu"` or `"relu"`.
        conv_prenorm_activation: whether an MBConv's first norm is followed by that activation.
        conv_bias: whether an MBConv's last 1x1 and its shortcut's have a bias; of a ConvNeXt block,
            whether all its layers have.
        conv_layer_scale: initial scale of a ConvNeXt block's residual branch; None: no such scale.
        squeeze_ratio: squeezed width of squeeze-and-excitation, as a share of `squeeze_from`.
        squeeze_from: `"output"`, `"input"` or `"expanded"`: whose width that share is of.
        squeeze_activation: activation between the two layers of squeeze-and-excitation.
        squeeze_place: `"after_norm"` of the depthwise convolution (and its activation), or
            `"before_norm"`.
        batch_norm_epsilon: added to the variance in the norms of the stem and the convolutional
            blocks, which are BatchNorms, or LayerNorms with ConvNeXt blocks.
        batch_norm_momentum: of BatchNorm's moving statistics, everywhere.
        head_dim: channels of one attention head.
        attention_from: channels of q, k and v together: the block's `"output"` or `"input"` width.
        attention_bias: whether q, k, v and the output projection have a bias.
        relative_position: the bias per head comes from a `"table"` (equation 3) or from an `"mlp"`
            over log-spaced offsets.
        relative_position_hidden_dim: hidden width of that MLP.
        transformer_pool: pooling of a Transformer block of stride 2, in both branches.
        transformer_norm: `"layer"` or `"batch"`, in Transformer blocks and at the end.
        transformer_norm_epsilon: added to the variance in that norm.
        transformer_shortcut_bias: whether a Transformer block's shortcut projection has a bias.
        ffn_expansion: hidden width of the feed-forward part, as a multiple of the block's.
        ffn_activation: its activation.
        ffn_bias: whether its two layers have a bias.
        layer_scale: initial scale of a Transformer block's residual branches; None: no such scale.
        final_norm: `"after_pool"` (the paper's), `"before_pool"`, or None.
        hidden_head: whether a tanh layer of the last width stands before the classifier.
        stochastic_depth: probability that the last block's residual branches are dropped for a
            sample; grows linearly with the block from 0 at the first.
        input_size: the size that the network is for, in pixels: one number, or a pair of height and
            width. It is the default of `input_shape`, and the size whose relative-bias tables a
            model of unknown size holds.
        pixel_mean: mean of each channel, as a share of 255, which preprocessing subtracts.
        pixel_std: standard deviation of each channel, likewise, by which it divides.

    Raises:
        ValueError: a field has no such value, or the fields together describe no network, or one of
            more than 1,000 blocks or 100 billion parameters.

    Example:
        >>> config = CoAtNetConfig(widths=(32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> [block.kind for block in config.blocks()]
        ['C', 'C', 'T', 'T', 'T']
    """

    widths: tuple[int | tuple[int, int], ...]
    depths: tuple[int | tuple[int, int], ...]
    layout: tuple[str, ...] = ("C", "C", "T", "T")
    stem_width: int | tuple[int, int] = 64
    stem_bias: bool = True

    conv_block: str = "mbconv"
    expansion: int = 4
    expansion_from: str = "output"
    stride_on: str = "expansion"
    conv_pool: str = "max2"
    conv_stride_pool: str = "avg2"
    conv_padding: str = "same"
    conv_activation: str = "gelu_tanh"
    conv_prenorm_activation: bool = False
    conv_bias: bool = True
    conv_layer_scale: float | None = None
    squeeze_ratio: float = 0.25
    squeeze_from: str = "output"
    squeeze_activation: str = "silu"
    squeeze_place: str = "after_norm"
    batch_norm_epsilon: float = 1e-3
    batch_norm_momentum: float = 0.99

    head_dim: int = 32
    attention_from: str = "output"
    attention_bias: bool = True
    relative_position: str = "table"
    relative_position_hidden_dim: int = 512
    transformer_pool: str = "max2"
    transformer_norm: str = "layer"
    transformer_norm_epsilon: float = 1e-5
    transformer_shortcut_bias: bool = True
    ffn_expansion: int = 4
    ffn_activation: str = "gelu_tanh"
    ffn_bias: bool = True
    layer_scale: float | None = None

    final_norm: str | None = "after_pool"
    hidden_head: bool = True
    stochastic_depth: float = 0.0
    input_size: int | tuple[int, int] = 224
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = as_python(getattr(self, field.name))
            if field.type.startswith("tuple") or isinstance(value, (tuple, list)):
                value = _tuples(field.name, value)
            object.__setattr__(self, field.name, value)
        if not isinstance(self.stem_width, tuple):
            object.__setattr__(self, "stem_width", (self.stem_width, self.stem_width))
        self._check_values()
        self._check_stages()
        self._check_heads()
        self._check_parameters()
        self._check_conv_blocks()

    def __repr__(self) -> str:
        """Shows the fields that are not the paper's."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"CoAtNetConfig({', '.join(shown)})"

    def _check_values(self) -> None:
        for field, choices in CHOICES.items():
            choice(field, getattr(self, field), choices)
        for field in dataclasses.fields(self):
            if field.type == "bool":
                boolean(field.name, getattr(self, field.name))
        positive_ints = ("expansion", "ffn_expansion", "head_dim", "relative_position_hidden_dim")
        for field in positive_ints:
            whole_number(field, getattr(self, field), most=MOST_CHANNELS)
        if len(self.stem_width) != 2:
            raise ValueError(
                "`stem_width` must be one width or a pair, of the stem's two convolutions. "
                f"Received: stem_width={self.stem_width}"
            )
        for width in self.stem_width:
            whole_number("stem_width", width, most=MOST_CHANNELS)
        for side in self.input_sides:
            whole_number("input_size", side, most=MOST_PIXELS)
        if len(self.input_sides) != 2 or min(self.input_sides) < 32:
            raise ValueError(
                "`input_size` must be at least 32: one number, or a height and a width. "
                f"Received: {self.input_size}"
            )
        for field in ("squeeze_ratio", "batch_norm_epsilon", "transformer_norm_epsilon"):
            number(field, getattr(self, field), above=0.0)
        for field in ("stochastic_depth", "batch_norm_momentum"):
            number(field, getattr(self, field), least=0.0, below=1.0)
        if self.layer_scale is not None:
            number("layer_scale", self.layer_scale, above=0.0)
        for value in self.pixel_mean:
            number("pixel_mean", value, least=0.0)
        for value in self.pixel_std:
            number("pixel_std", value, above=0.0)
        if len(self.pixel_mean) != len(self.pixel_std) or not self.pixel_mean:
            raise ValueError(
                "`pixel_mean` and `pixel_std` need one value a channel each. Received: "
                f"pixel_mean={self.pixel_mean}, pixel_std={self.pixel_std}"
            )

    def _check_stages(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.layout) or not self.widths:
            raise ValueError(
                "`widths`, `depths` and `layout` must have one entry a stage. Received: "
                f"widths={self.widths}, depths={self.depths}, layout={self.layout}"
            )
        for stage, (width, depth, kinds) in enumerate(
            zip(self.widths, self.depths, self.layout, strict=True), start=1
        ):
            if kinds not in ("C", "T", "CT"):
                raise ValueError(
                    f"Stage {stage} of `layout` must be 'C' (convolutional blocks), 'T' "
                    "(Transformer) or 'CT' (convolutional blocks, then Transformer). Received: "
                    f"{kinds!r}"
                )
            for field, entry, most in (
                ("widths", width, MOST_CHANNELS),
                ("depths", depth, MOST_BLOCKS),
            ):
                parts = entry if isinstance(entry, tuple) else (entry,)
                if len(parts) != len(kinds):
                    raise ValueError(
                        f"Stage {stage} of `{field}` must have {len(kinds)} number(s) for the "
                        f"layout {kinds!r}. Received: {entry}"
                    )
                for index, part in enumerate(parts):
                    inside = f"[{index}]" if isinstance(entry, tuple) else ""
                    whole_number(f"{field}[{stage - 1}]{inside}", part, most=most)
        blocks = sum(sum(_pair(depths)) for depths in self.depths)
        if blocks > MOST_BLOCKS:
            raise ValueError(
                f"`depths` must be at most {MOST_BLOCKS} blocks in all. Received {blocks} blocks."
            )
        for before, after in itertools.pairwise(self.layout):
            if before.endswith("T") and after == "C":
                raise ValueError(
                    "No MBConv may come after a Transformer block: attention stands above "
                    f"convolution. Received: layout={self.layout}. Reorder it, e.g. "
                    f"{tuple(sorted(self.layout))}."
                )

    def _check_heads(self) -> None:
        for block in self.blocks():
            if block.kind != "T":
                continue
            width = block.width if self.attention_from == "output" else block.width_in
            if width % self.head_dim:
                raise ValueError(
                    f"The attention of {block.name} is {width} channels wide, which "
                    f"head_dim={self.head_dim} does not divide. Change `widths` or `head_dim`."
                )

    def _check_parameters(self) -> None:
        """Of the kernels alone: `figures` counts them all."""
        total = 9 * self.stem_width[0] * self.stem_width[1]
        for block in self.blocks():
            if block.kind == "C":
                expanded, squeezed = self.expanded_filters(block), self.squeezed_filters(block)
                total += expanded * (block.width_in + 9 + block.width + 2 * squeezed)
            else:
                attention = block.width if self.attention_from == "output" else block.width_in
                total += attention * (3 * block.width_in + block.width)
                total += 2 * self.ffn_expansion * block.width**2
        if total > MOST_PARAMETERS:
            raise ValueError(
                f"The network would have {total:.1e} parameters, and the most is "
                f"{MOST_PARAMETERS:.0e}. Lower `widths`, `depths`, `expansion`, `squeeze_ratio` or "
                "`ffn_expansion`."
            )

    def _check_conv_blocks(self) -> None:
        if self.conv_layer_scale is not None:
            number("conv_layer_scale", self.conv_layer_scale, above=0.0)
        if self.conv_block == "mbconv":
            if self.conv_layer_scale is not None:
                raise ValueError(
                    "Only ConvNeXt blocks have a `conv_layer_scale`. Received: "
                    f"conv_layer_scale={self.conv_layer_scale}, conv_block='mbconv'. Leave it out, "
                    "or use conv_block='convnext'."
                )
            return
        if self.stride_on == "expansion":
            raise ValueError(
                "A ConvNeXt block halves the map on its depthwise convolution or by pooling. "
                "Received: conv_block='convnext', stride_on='expansion'. Use stride_on='depthwise' "
                "or 'pool'."
            )
        for block in self.blocks():
            if block.kind == "C" and block.width % block.width_in:
                raise ValueError(
                    f"The depthwise convolution of {block.name} makes {block.width} channels of "
                    f"{block.width_in}: with conv_block='convnext' that must be a multiple. Change "
                    "`widths` or `stem_width`."
                )

    def blocks(self) -> Iterator[Block]:
        """Yields the residual blocks in order, each with its widths, stride and drop rate."""
        runs = [
            (stage, kind, depth, width)
            for stage, (kinds, depths, widths) in enumerate(
                zip(self.layout, self.depths, self.widths, strict=True), start=1
            )
            for kind, depth, width in zip(kinds, _pair(depths), _pair(widths), strict=True)
        ]
        total = sum(depth for _, _, depth, _ in runs)
        number, width_in, index, current = 0, self.stem_width[1], 0, 0
        for stage, kind, depth, width in runs:
            for _ in range(depth):
                index = index + 1 if stage == current else 1
                current = stage
                yield Block(
                    kind=kind,
                    stage=stage,
                    index=index,
                    width_in=width_in,
                    width=width,
                    stride=2 if index == 1 else 1,
                    stochastic_depth=self.stochastic_depth * number / max(total - 1, 1),
                )
                number, width_in = number + 1, width

    @property
    def input_sides(self) -> tuple[int, int]:
        """Height and width of `input_size`."""
        size = self.input_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def width(self) -> int:
        """Channels of the last feature map."""
        return _pair(self.widths[-1])[-1]

    @property
    def conv_norm(self) -> str:
        """The norm of the stem and the convolutional blocks: `"batch"` or `"layer"`."""
        return "batch" if self.conv_block == "mbconv" else "layer"

    def expanded_filters(self, block: Block) -> int:
        """Channels between the two pointwise layers of a convolutional block."""
        return self.expansion * (block.width if self.expansion_from == "output" else block.width_in)

    def squeezed_filters(self, block: Block) -> int:
        """Channels between the two layers of an MBConv block's squeeze-and-excitation."""
        base = {
            "output": block.width,
            "input": block.width_in,
            "expanded": self.expanded_filters(block),
        }[self.squeeze_from]
        return max(1, int(self.squeeze_ratio * base))

    def same_network(self, other: CoAtNetConfig) -> bool:
        """Whether weights of one fit the other and give the same outputs at inference."""
        free = {field: getattr(self, field) for field in FREE_FIELDS}
        return self == dataclasses.replace(other, **free)

    def replace(self, **changes: Any) -> CoAtNetConfig:
        """Returns a copy with some fields changed.

        Args:
            **changes: fields of `CoAtNetConfig` and their new values.

        Returns:
            A new `CoAtNetConfig`.

        Raises:
            ValueError: there is no such field, or the value makes no sense.

        Example:
            >>> small = CoAtNetConfig((64, 96, 192, 384), (2, 2, 3, 2))
            >>> small.replace(stochastic_depth=0.2).stochastic_depth
            0.2
        """
        fields = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in changes if name not in fields]
        if unknown:
            raise ValueError(
                f"CoAtNetConfig has no field {', '.join(map(repr, unknown))}. Its fields are: "
                f"{', '.join(fields)}"
            )
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CoAtNetConfig:
        """Returns the configuration that `to_dict` wrote.

        Args:
            fields: what `to_dict` returned, also after a round trip through JSON.

        Returns:
            A `CoAtNetConfig`.

        Raises:
            ValueError: a field is missing or unknown, or has no such value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if (
            not isinstance(fields, Mapping)
            or set(fields) - known
            or not {
                "widths",
                "depths",
            }
            <= set(fields)
        ):
            raise ValueError(
                "This is no configuration of a CoAtNet: expected the fields of CoAtNetConfig. "
                f"Received: {fields!r:.300}"
            )
        return cls(**fields)


def _pair(entry: int | tuple[int, ...]) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _tuples(field: str, value: Any) -> tuple[Any, ...]:
    """Lists, as JSON gives them, become tuples, so that a config is hashable."""
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"`{field}` must be a tuple. Received: {field}={value!r:.300}")
    return tuple(
        tuple(map(as_python, item)) if isinstance(item, (tuple, list)) else as_python(item)
        for item in value
    )
