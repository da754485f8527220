"""A network, described as data: its choices as fields, and the operations that result.

`CoAtNetConfig` has a field for each choice by which the published networks differ. Its methods
`stem`, `blocks` and `head` describe the network: channels, strides, sublayers and their names. The
layers get their arguments from this description, and `keras_coatnet.counting` gets variables,
operations and memory from it. Keras is not imported.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keras_coatnet.arguments import check_fields, whole_number
from keras_coatnet.fields import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_PARAMETERS,
    as_input_size,
    as_stem_width,
    as_tuple,
    bounded,
    checked,
    count,
    one_of,
    optional,
    per_channel,
    true_or_false,
)
from keras_coatnet.names import (
    CLASSIFIER,
    FINAL_NORM,
    HIDDEN,
    STEM_CONV1,
    STEM_CONV2,
    STEM_NORM,
    block_name,
)
from keras_coatnet.sublayers import Kind, Part, Place, Sublayer

# Fields that change neither the variables of a network nor its outputs at inference. Weights fit
# any value of them.
FREE_FIELDS = ("stochastic_depth", "batch_norm_momentum", "input_size")


@dataclass(frozen=True, repr=False)
class CoAtNetConfig:
    """All architectural choices of a CoAtNet. The defaults are the paper's (arXiv 2106.04803).

    Args:
        widths: channels of each stage. A stage of layout `"CT"` takes a pair: the channels of its
            convolutional blocks and of its Transformer blocks.
        depths: number of blocks in each stage, at least 1; a pair for `"CT"`.
        layout: the blocks of each stage: `"C"` (convolutional blocks), `"T"` (Transformer blocks),
            or `"CT"` (convolutional blocks, the first of which halves the map, then Transformer
            blocks, as in stage 3 of CoAtNet-6 and 7). `"C"` must not follow a stage that ends with
            Transformer blocks (section 2.2 of the paper); `"CT"` may, as in timm's
            coatnet_nano_cc_224.
        stem_width: channels of the stem's two convolutions: one number for both, or a pair.
        stem_bias: whether the stem's convolutions have a bias.
        conv_block: the convolutional block: `"mbconv"` (the paper's), or `"convnext"` (a 7x7
            depthwise convolution, LayerNorm and two dense layers). With `"convnext"`, the stem's
            norm is a LayerNorm, too, and the fields of squeeze-and-excitation have no effect.
        expansion: channels between the two 1x1 convolutions of a convolutional block, as a multiple
            of its input's or output's.
        expansion_from: `"output"` or `"input"`: which channels `expansion` multiplies.
        stride_on: where a convolutional block halves the map: on its 1x1 `"expansion"` (equation 5;
            not for ConvNeXt blocks), on its `"depthwise"` convolution (the paper's "Stride-2
            DConv2D" rows), or with a `"pool"` before the expansion.
        conv_pool: pooling of a convolutional block's shortcut: `"max2"`, `"avg2"` (2x2) or `"max3"`
            (3x3).
        conv_stride_pool: pooling for `stride_on="pool"`; the same values.
        conv_padding: padding of convolutions of stride 2: `"same"` (TensorFlow's, which pads less
            at the top and left) or `"symmetric"` (torch's, equal on all sides).
        conv_activation: activation of the stem and the convolutional blocks: `"gelu_tanh"`,
            `"gelu"` (by erf), `"silu"` or `"relu"`.
        conv_prenorm_activation: whether `conv_activation` also follows an MBConv's first norm.
        conv_bias: whether the last 1x1 convolution of an MBConv and its shortcut's have a bias. In
            a ConvNeXt block, whether all layers have one.
        conv_layer_scale: initial scale of a ConvNeXt block's residual branch; None: no scale.
        squeeze_ratio: channels between the two layers of squeeze-and-excitation, as a share of
            those that `squeeze_from` names.
        squeeze_from: `"output"`, `"input"` (channels of the block) or `"expanded"` (channels
            between its 1x1 convolutions).
        squeeze_activation: activation between the two layers of squeeze-and-excitation.
        squeeze_place: where an MBConv has squeeze-and-excitation: `"after_norm"` and activation of
            its depthwise convolution, or `"before_norm"`.
        batch_norm_epsilon: added to the variance in the norms of the stem and the convolutional
            blocks, which are BatchNorms, or LayerNorms with ConvNeXt blocks.
        batch_norm_momentum: momentum of the moving statistics of all BatchNorms.
        head_dim: channels of one attention head.
        attention_from: `"output"` or `"input"`: q, k and v have as many channels as the block's.
        attention_bias: whether q, k, v and the output projection have a bias.
        relative_position: source of the relative biases: a `"table"` (equation 3), or an `"mlp"`
            over log-spaced offsets.
        relative_position_hidden_dim: units of the MLP's hidden layer.
        transformer_pool: pooling of a Transformer block of stride 2, in both branches.
        transformer_norm: `"layer"` or `"batch"`: the norm of Transformer blocks and of the head.
        transformer_norm_epsilon: added to the variance in these norms.
        transformer_shortcut_bias: whether a Transformer block's shortcut projection has a bias.
        ffn_expansion: units of the feed-forward part's hidden layer, as a multiple of the block's
            channels.
        ffn_activation: activation of the feed-forward part.
        ffn_bias: whether its two layers have a bias.
        layer_scale: initial scale of a Transformer block's residual branches; None: no scale.
        final_norm: `"after_pool"` (the paper's), `"before_pool"`, or None.
        hidden_head: whether a dense layer with tanh precedes the classifier.
        stochastic_depth: probability that a residual branch of the last block is dropped for a
            sample in training. It grows linearly with the blocks, from 0 for the first.
        input_size: the image size that the network is for, in pixels: one number, or a pair of
            height and width. It is the default of `input_shape`, and the size whose relative-bias
            tables a model of unknown size has.
        pixel_mean: what preprocessing subtracts from each channel, as a share of 255.
        pixel_std: what preprocessing divides each channel by, as a share of 255.

    Raises:
        ValueError: a field has no such value, the fields do not fit together, or the network would
            have more than 1,000 blocks or 100 billion parameters.

    Example:
        >>> config = CoAtNetConfig(widths=(32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> [block.kind for block in config.blocks()]
        ['C', 'C', 'T', 'T', 'T']
    """

    widths: tuple[int | tuple[int, int], ...] = checked(as_tuple)
    depths: tuple[int | tuple[int, int], ...] = checked(as_tuple)
    layout: tuple[str, ...] = checked(as_tuple, default=("C", "C", "T", "T"))
    stem_width: int | tuple[int, int] = checked(as_stem_width, default=(64, 64))
    stem_bias: bool = true_or_false(True)

    conv_block: str = one_of("mbconv", "convnext")
    expansion: int = count(4)
    expansion_from: str = one_of("output", "input")
    stride_on: str = one_of("expansion", "depthwise", "pool")
    conv_pool: str = one_of("max2", "avg2", "max3")
    conv_stride_pool: str = one_of("avg2", "max2", "max3")
    conv_padding: str = one_of("same", "symmetric")
    conv_activation: str = one_of("gelu_tanh", "gelu", "silu", "relu")
    conv_prenorm_activation: bool = true_or_false(False)
    conv_bias: bool = true_or_false(True)
    conv_layer_scale: float | None = optional(above=0.0)
    squeeze_ratio: float = bounded(0.25, above=0.0)
    squeeze_from: str = one_of("output", "input", "expanded")
    squeeze_activation: str = one_of("silu", "gelu_tanh", "gelu", "relu")
    squeeze_place: str = one_of("after_norm", "before_norm")
    batch_norm_epsilon: float = bounded(1e-3, above=0.0)
    batch_norm_momentum: float = bounded(0.99, least=0.0, below=1.0)

    head_dim: int = count(32)
    attention_from: str = one_of("output", "input")
    attention_bias: bool = true_or_false(True)
    relative_position: str = one_of("table", "mlp")
    relative_position_hidden_dim: int = count(512)
    transformer_pool: str = one_of("max2", "avg2", "max3")
    transformer_norm: str = one_of("layer", "batch")
    transformer_norm_epsilon: float = bounded(1e-5, above=0.0)
    transformer_shortcut_bias: bool = true_or_false(True)
    ffn_expansion: int = count(4)
    ffn_activation: str = one_of("gelu_tanh", "gelu", "silu", "relu")
    ffn_bias: bool = true_or_false(True)
    layer_scale: float | None = optional(above=0.0)

    final_norm: str | None = one_of("after_pool", "before_pool", None)
    hidden_head: bool = true_or_false(True)
    stochastic_depth: float = bounded(0.0, least=0.0, below=1.0)
    input_size: int | tuple[int, int] = checked(as_input_size, default=224)
    pixel_mean: tuple[float, ...] = per_channel(least=0.0)
    pixel_std: tuple[float, ...] = per_channel(above=0.0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["check"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if len(self.pixel_mean) != len(self.pixel_std) or not self.pixel_mean:
            raise ValueError(
                "`pixel_mean` and `pixel_std` must have one value for each channel. Received: "
                f"pixel_mean={self.pixel_mean}, pixel_std={self.pixel_std}"
            )
        self._check_stages()
        self._check_order()
        self._check_conv_block()
        for block in self.blocks():
            block.check()
        self._check_parameters()

    def __repr__(self) -> str:
        """Shows the fields that differ from the paper's."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"CoAtNetConfig({', '.join(shown)})"

    def _check_stages(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.layout) or not self.widths:
            raise ValueError(
                "`widths`, `depths` and `layout` must have one entry for each stage. Received: "
                f"widths={self.widths}, depths={self.depths}, layout={self.layout}"
            )
        for stage, kinds in enumerate(self.layout):
            if kinds not in ("C", "T", "CT"):
                raise ValueError(
                    f"Stage {stage + 1} of `layout` must be 'C' (convolutional blocks), 'T' "
                    "(Transformer) or 'CT' (convolutional blocks, then Transformer). Received: "
                    f"{kinds!r}"
                )
            for field, most in (("widths", MAX_CHANNELS), ("depths", MAX_BLOCKS)):
                entry = getattr(self, field)[stage]
                if len(_pair(entry)) != len(kinds):
                    raise ValueError(
                        f"Stage {stage + 1} of `{field}` must have {len(kinds)} number(s) for the "
                        f"layout {kinds!r}. Received: {entry}"
                    )
                for index, part in enumerate(_pair(entry)):
                    inside = f"[{index}]" if isinstance(entry, tuple) else ""
                    whole_number(f"{field}[{stage}]{inside}", part, most=most)
        if self._block_count > MAX_BLOCKS:
            raise ValueError(
                f"`depths` must be at most {MAX_BLOCKS} blocks in total. Received "
                f"{self._block_count} blocks."
            )

    def _check_order(self) -> None:
        for before, after in itertools.pairwise(self.layout):
            if before.endswith("T") and after == "C":
                raise ValueError(
                    "No MBConv may come after a Transformer block (section 2.2 of the paper). "
                    f"Received: layout={self.layout}. Reorder it, such as "
                    f"{tuple(sorted(self.layout))}."
                )

    def _check_conv_block(self) -> None:
        if self.conv_block == "mbconv" and self.conv_layer_scale is not None:
            raise ValueError(
                "Only ConvNeXt blocks have a `conv_layer_scale`. Received: "
                f"conv_layer_scale={self.conv_layer_scale}, conv_block='mbconv'. Leave it out, "
                "or use conv_block='convnext'."
            )
        if self.conv_block == "convnext" and self.stride_on == "expansion":
            raise ValueError(
                "A ConvNeXt block halves the map on its depthwise convolution or by pooling. "
                "Received: conv_block='convnext', stride_on='expansion'. Use stride_on='depthwise' "
                "or 'pool'."
            )

    def _check_parameters(self) -> None:
        parts = (self.stem(), *self.blocks(), self.head())
        total = sum(
            math.prod(sublayer.kernel_shape) for part in parts for sublayer in part.sublayers
        )
        if total > MAX_PARAMETERS:
            raise ValueError(
                f"A network must have at most {MAX_PARAMETERS:.0e} parameters. Received "
                f"{total:.1e}. Lower `widths`, `depths`, `expansion`, `squeeze_ratio` or "
                "`ffn_expansion`."
            )

    def stem(self, channels: int = 3) -> Part:
        """Describes the stem: two 3x3 convolutions, the first of stride 2.

        Args:
            channels: channels of the images.

        Returns:
            A `Part`.
        """
        first, second = _pair(self.stem_width)
        bias = self.stem_bias
        sublayers = (
            Sublayer("conv", STEM_CONV1, channels, first, kernel_size=3, use_bias=bias),
            _norm(self.conv_norm, STEM_NORM, first),
            _activation(self.conv_activation, first),
            Sublayer("conv", STEM_CONV2, first, second, kernel_size=3, use_bias=bias),
        )
        return Part("", channels, 2, sublayers)

    def blocks(self) -> Iterator[Block]:
        """Yields the residual blocks in order."""
        number, last = 0, max(self._block_count - 1, 1)
        _, filters_in = _pair(self.stem_width)
        stages = zip(self.layout, self.depths, self.widths, strict=True)
        for stage, (kinds, depths, widths) in enumerate(stages, start=1):
            runs = zip(kinds, _pair(depths), _pair(widths), strict=True)
            blocks = [(kind, filters) for kind, depth, filters in runs for _ in range(depth)]
            for index, (kind, filters) in enumerate(blocks, start=1):
                yield Block(
                    config=self,
                    kind=kind,
                    stage=stage,
                    index=index,
                    filters_in=filters_in,
                    filters=filters,
                    strides=2 if index == 1 else 1,
                    stochastic_depth=self.stochastic_depth * number / last,
                )
                number, filters_in = number + 1, filters

    def head(self, classes: int | None = 1000) -> Part:
        """Describes what follows the blocks.

        Args:
            classes: outputs of the classifier; None for a network without top.

        Returns:
            A `Part`.
        """
        return Part("", self.output_filters, 1, tuple(_head_sublayers(self, classes)))

    @property
    def _block_count(self) -> int:
        return sum(sum(_pair(depths)) for depths in self.depths)

    @property
    def input_sides(self) -> tuple[int, int]:
        """Height and width of `input_size`."""
        size = self.input_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def output_filters(self) -> int:
        """Channels of the last feature map."""
        return _pair(self.widths[-1])[-1]

    @property
    def conv_norm(self) -> str:
        """The norm of the stem and the convolutional blocks: `"batch"` or `"layer"`."""
        return "batch" if self.conv_block == "mbconv" else "layer"

    def same_network(self, other: CoAtNetConfig) -> bool:
        """Returns whether weights of one network fit the other and give the same outputs.

        Args:
            other: the configuration to compare with.

        Returns:
            True if all fields but those of `FREE_FIELDS` are equal.
        """
        free = {field: getattr(self, field) for field in FREE_FIELDS}
        return self == dataclasses.replace(other, **free)

    def replace(self, **changes: Any) -> CoAtNetConfig:
        """Returns a copy with some fields changed.

        Args:
            **changes: fields of `CoAtNetConfig` and their new values.

        Returns:
            A new `CoAtNetConfig`.

        Raises:
            ValueError: there is no such field, or a value is refused.

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
        check_fields(fields, cls)
        return cls(**fields)


def _pair(entry: int | tuple[int, ...]) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


# --- Blocks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One residual block of a network.

    Attributes:
        config: the network's configuration.
        kind: "C" for a convolutional block (MBConv or ConvNeXt), "T" for Transformer.
        stage: the block's stage, from 1.
        index: the block's place within the stage, from 1.
        filters_in: channels of the input.
        filters: channels of the output.
        strides: 2 if the block halves the feature map, else 1.
        stochastic_depth: probability that a residual branch is dropped in training.
    """

    config: CoAtNetConfig = dataclasses.field(repr=False)
    kind: str
    stage: int
    index: int
    filters_in: int
    filters: int
    strides: int
    stochastic_depth: float

    @property
    def name(self) -> str:
        """Name of the block's layer, such as `"stage3_block2"`."""
        return block_name(self.stage, self.index)

    @property
    def layer(self) -> str:
        """Name of the layer's class: `"MBConv"`, `"ConvNeXtBlock"` or `"TransformerBlock"`."""
        if self.kind == "T":
            return "TransformerBlock"
        return "MBConv" if self.config.conv_block == "mbconv" else "ConvNeXtBlock"

    @property
    def expanded_filters(self) -> int:
        """Channels between the two pointwise layers of a convolutional block."""
        of_output = self.config.expansion_from == "output"
        return self.config.expansion * (self.filters if of_output else self.filters_in)

    @property
    def squeezed_filters(self) -> int:
        """Channels between the two layers of an MBConv block's squeeze-and-excitation."""
        base = {
            "output": self.filters,
            "input": self.filters_in,
            "expanded": self.expanded_filters,
        }[self.config.squeeze_from]
        return max(1, int(self.config.squeeze_ratio * base))

    @property
    def attention_dim(self) -> int:
        """Channels of q, k and v of a Transformer block."""
        return self.filters if self.config.attention_from == "output" else self.filters_in

    @property
    def num_heads(self) -> int:
        """Attention heads of a Transformer block."""
        return self.attention_dim // self.config.head_dim

    @property
    def hidden_dim(self) -> int:
        """Channels between the two layers of a Transformer block's feed-forward part."""
        return self.config.ffn_expansion * self.filters

    def check(self) -> None:
        """Raises a ValueError if the block's channels do not fit together."""
        if self.layer == "TransformerBlock" and self.attention_dim % self.config.head_dim:
            raise ValueError(
                f"The attention of {self.name} has {self.attention_dim} channels, which "
                f"head_dim={self.config.head_dim} does not divide. Change `widths` or `head_dim`."
            )
        if self.layer == "ConvNeXtBlock" and self.filters % self.filters_in:
            raise ValueError(
                "With conv_block='convnext', the channels of a block must be a multiple of its "
                f"input's. Received: {self.name} with {self.filters} channels for "
                f"{self.filters_in} of its input. Change `widths` or `stem_width`."
            )

    @property
    def layer_options(self) -> dict[str, Any]:
        """Arguments of the layer, except `filters` and `table_size`, which depends on the input."""
        options = {
            "MBConv": _mbconv_options,
            "ConvNeXtBlock": _convnext_options,
            "TransformerBlock": _transformer_options,
        }
        return {
            "strides": self.strides,
            "stochastic_depth": self.stochastic_depth,
            "name": self.name,
            **options[self.layer](self),
        }

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The operations of the block. The last one is the residual sum that is the output."""
        describe = {
            "MBConv": _mbconv_sublayers,
            "ConvNeXtBlock": _convnext_sublayers,
            "TransformerBlock": _transformer_sublayers,
        }
        return tuple(describe[self.layer](self))


def _conv_options(block: Block) -> dict[str, Any]:
    """Returns the arguments that `MBConv` and `ConvNeXtBlock` share."""
    config = block.config
    return {
        "expanded_filters": block.expanded_filters,
        "stride_on": config.stride_on,
        "pool": config.conv_pool,
        "stride_pool": config.conv_stride_pool,
        "padding": config.conv_padding,
        "activation": config.conv_activation,
        "use_bias": config.conv_bias,
    }


def _mbconv_options(block: Block) -> dict[str, Any]:
    config = block.config
    return {
        **_conv_options(block),
        "squeezed_filters": block.squeezed_filters,
        "prenorm_activation": config.conv_prenorm_activation,
        "squeeze_activation": config.squeeze_activation,
        "squeeze_place": config.squeeze_place,
        "batch_norm_epsilon": config.batch_norm_epsilon,
        "batch_norm_momentum": config.batch_norm_momentum,
    }


def _convnext_options(block: Block) -> dict[str, Any]:
    config = block.config
    return {
        **_conv_options(block),
        "norm_epsilon": config.batch_norm_epsilon,
        "layer_scale": config.conv_layer_scale,
    }


def _transformer_options(block: Block) -> dict[str, Any]:
    config = block.config
    return {
        "head_dim": config.head_dim,
        "attention_dim": block.attention_dim,
        "attention_bias": config.attention_bias,
        "relative_position": config.relative_position,
        "relative_position_hidden_dim": config.relative_position_hidden_dim,
        "pool": config.transformer_pool,
        "norm": config.transformer_norm,
        "norm_epsilon": config.transformer_norm_epsilon,
        "batch_norm_momentum": config.batch_norm_momentum,
        "shortcut_bias": config.transformer_shortcut_bias,
        "ffn_expansion": config.ffn_expansion,
        "ffn_activation": config.ffn_activation,
        "ffn_bias": config.ffn_bias,
        "layer_scale": config.layer_scale,
    }


# --- Sublayers, with the names that the classes in `layers/` give them ---------------------------


def _norm(
    kind: str, name: str, filters: int, place: Place = "output", split: Any = None
) -> Sublayer:
    norm: Kind = "batch_norm" if kind == "batch" else "layer_norm"
    return Sublayer(norm, name, filters, filters, place, split=split)


def _activation(
    function: str, filters: int, place: Place = "output", split: Any = None
) -> Sublayer:
    return Sublayer("activation", "", filters, filters, place, split=split, activation=function)


def _shortcut(block: Block, kind: Kind, use_bias: bool) -> Iterator[Sublayer]:
    filters_in, filters = block.filters_in, block.filters
    if block.strides > 1:
        yield Sublayer("pool", "", filters_in, filters_in)
    if filters_in != filters:
        yield Sublayer(kind, "shortcut", filters_in, filters, use_bias=use_bias)
    yield Sublayer("add", "", filters, filters)


def _mbconv_sublayers(block: Block) -> Iterator[Sublayer]:
    config, filters_in = block.config, block.filters_in
    wide, squeezed = block.expanded_filters, block.squeezed_filters
    act = config.conv_activation
    # The map has its new size after the operation with the stride.
    place: Place = "input" if config.stride_on == "depthwise" else "output"

    yield _norm("batch", "input_norm", filters_in, "input")
    if config.conv_prenorm_activation:
        yield _activation(act, filters_in, "input")
    if block.strides > 1 and config.stride_on == "pool":
        yield Sublayer("pool", "", filters_in, filters_in)
    yield Sublayer("conv", "expand", filters_in, wide, place, split="filters")
    yield _norm("batch", "expand_norm", wide, place, split="filters")
    yield _activation(act, wide, place, split="filters")
    yield Sublayer("depthwise", "depthwise", wide, wide, kernel_size=3, split="filters")
    yield _norm("batch", "depthwise_norm", wide, split="filters")
    yield _activation(act, wide, split="filters")

    squeeze, excite = "squeeze_excite/squeeze", "squeeze_excite/excite"
    yield Sublayer("dense", squeeze, wide, squeezed, "vector", use_bias=True, split="filters_in")
    yield Sublayer("dense", excite, squeezed, wide, "vector", use_bias=True, split="filters")
    yield Sublayer("gate", "", wide, wide, split="filters")

    bias = config.conv_bias
    yield Sublayer("conv", "project", wide, block.filters, use_bias=bias, split="filters_in")
    yield from _shortcut(block, "conv", bias)


def _convnext_sublayers(block: Block) -> Iterator[Sublayer]:
    config, filters, wide = block.config, block.filters, block.expanded_filters
    bias = config.conv_bias

    if block.strides > 1 and config.stride_on == "pool":
        yield Sublayer("pool", "", block.filters_in, block.filters_in)
    yield Sublayer(
        "depthwise", "depthwise_conv", block.filters_in, filters, kernel_size=7, use_bias=bias
    )
    yield _norm("layer", "ffn_norm", filters)
    yield Sublayer("dense", "ffn_expand", filters, wide, use_bias=bias, split="filters")
    yield _activation(config.conv_activation, wide, split="filters")
    yield Sublayer("dense", "ffn_project", wide, filters, use_bias=bias, split="filters_in")
    if config.conv_layer_scale is not None:
        yield Sublayer("scale", "ffn_scale", filters, filters)
    yield from _shortcut(block, "dense", bias)


def _transformer_sublayers(block: Block) -> Iterator[Sublayer]:
    config, filters_in, filters = block.config, block.filters_in, block.filters
    attention_dim, heads, hidden = block.attention_dim, block.num_heads, block.hidden_dim

    yield _norm(config.transformer_norm, "attention_norm", filters_in, "input")
    if block.strides > 1:
        yield Sublayer("pool", "", filters_in, filters_in)
    bias = config.attention_bias
    for name in ("attention/query", "attention/key", "attention/value"):
        yield Sublayer("dense", name, filters_in, attention_dim, use_bias=bias, split="filters")
    if config.relative_position == "table":
        yield Sublayer("table", "attention/position", heads, heads, "offsets", split="filters")
    else:
        between = config.relative_position_hidden_dim
        yield Sublayer("dense", "attention/position/hidden", 2, between, "offsets", use_bias=True)
        values = "attention/position/values"
        yield Sublayer("dense", values, between, heads, "offsets", use_bias=True, split="filters")
    yield Sublayer("attention_weights", "", attention_dim, heads, split="filters")
    yield Sublayer("attention_values", "", heads, attention_dim, split="filters")
    yield Sublayer(
        "dense", "attention/projection", attention_dim, filters, use_bias=bias, split="filters_in"
    )
    if config.layer_scale is not None:
        yield Sublayer("scale", "attention_scale", filters, filters)
    yield from _shortcut(block, "dense", config.transformer_shortcut_bias)

    bias = config.ffn_bias
    yield _norm(config.transformer_norm, "ffn_norm", filters)
    yield Sublayer("dense", "ffn_expand", filters, hidden, use_bias=bias, split="filters")
    yield _activation(config.ffn_activation, hidden, split="filters")
    yield Sublayer("dense", "ffn_project", hidden, filters, use_bias=bias, split="filters_in")
    if config.layer_scale is not None:
        yield Sublayer("scale", "ffn_scale", filters, filters)
    yield Sublayer("add", "", filters, filters)


def _head_sublayers(config: CoAtNetConfig, classes: int | None) -> Iterator[Sublayer]:
    filters = config.output_filters
    if config.final_norm == "before_pool":
        yield _norm(config.transformer_norm, FINAL_NORM, filters)
    if classes is None:
        return
    yield Sublayer("global_pool", "", filters, filters)
    if config.final_norm == "after_pool":
        yield _norm(config.transformer_norm, FINAL_NORM, filters, "vector")
    if config.hidden_head:
        yield Sublayer("dense", HIDDEN, filters, filters, "vector", use_bias=True, split="filters")
    yield Sublayer(
        "dense", CLASSIFIER, filters, classes, "vector", use_bias=True, split="filters_in"
    )
