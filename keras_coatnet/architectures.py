"""The paper's family and the published architectures, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from keras_coatnet.config import CoAtNetConfig


def _paper_family() -> dict[str, CoAtNetConfig]:
    """Tables 3 (CoAtNet-0 to 4) and 12 (CoAtNet-5 to 7) of the paper.

    Table 12 prints 2048 for the last stage of CoAtNet-6; 3072 is what gives its 1.47B parameters.
    """
    small = {"stem_width": 64, "widths": (96, 192, 384, 768)}
    mixed = ("C", "C", "CT", "T")
    family = {
        "coatnet0": CoAtNetConfig(**small, depths=(2, 3, 5, 2)),
        "coatnet1": CoAtNetConfig(**small, depths=(2, 6, 14, 2)),
        "coatnet2": CoAtNetConfig((128, 256, 512, 1024), (2, 6, 14, 2), stem_width=128),
        "coatnet3": CoAtNetConfig((192, 384, 768, 1536), (2, 6, 14, 2), stem_width=192),
        "coatnet4": CoAtNetConfig((192, 384, 768, 1536), (2, 12, 28, 2), stem_width=192),
        "coatnet5": CoAtNetConfig(
            (256, 512, 1280, 2048), (2, 12, 28, 2), stem_width=192, head_dim=64
        ),
        "coatnet6": CoAtNetConfig(
            (192, 384, (768, 1536), 3072), (2, 4, (8, 42), 2), mixed, 192, head_dim=128
        ),
        "coatnet7": CoAtNetConfig(
            (256, 512, (1024, 2048), 3072), (2, 4, (8, 42), 2), mixed, 192, head_dim=128
        ),
    }
    depthwise = {
        f"{name}_dw": config.replace(stride_on="depthwise") for name, config in family.items()
    }
    return family | depthwise


def _timm_family() -> dict[str, CoAtNetConfig]:
    """Every CoAtNet of timm (timm/models/maxxvit.py), and its CoAtNeXt."""
    # coatnet_0_224 and so on: timm's reading of the paper, never trained.
    paper_like = CoAtNetConfig(
        widths=(96, 192, 384, 768),
        depths=(2, 3, 5, 2),
        stem_bias=False,
        stride_on="depthwise",
        conv_pool="avg2",
        conv_padding="symmetric",
        conv_activation="gelu",
        batch_norm_epsilon=1e-5,
        batch_norm_momentum=0.9,
        transformer_pool="avg2",
        transformer_norm_epsilon=1e-6,
        ffn_activation="gelu",
    )
    # The trained ones, by Ross Wightman before MaxViT's code was public.
    rw = paper_like.replace(
        depths=(2, 3, 7, 2),
        stem_width=(32, 64),
        expansion_from="input",
        conv_activation="silu",
        conv_prenorm_activation=True,
        conv_bias=False,
        squeeze_from="expanded",
        squeeze_activation="relu",
        attention_from="input",
        final_norm="before_pool",
        hidden_head=False,
    )
    early = rw.replace(squeeze_place="before_norm", transformer_shortcut_bias=False)
    deep = {"depths": (2, 6, 14, 2)}
    wide = {"widths": (128, 256, 512, 1024), "stem_width": (64, 128), **deep}
    huge = {"widths": (192, 384, 768, 1536)}
    nano = rw.replace(
        widths=(64, 128, 256, 512),
        depths=(3, 4, 6, 3),
        conv_prenorm_activation=False,
        conv_bias=True,
        squeeze_activation="silu",
    )
    two = rw.replace(**wide, squeeze_activation="silu")
    three = two.replace(**huge, stem_width=(96, 192), layer_scale=1e-6)
    rmlp_two = two.replace(relative_position="mlp", layer_scale=1e-6)
    return {
        "coatnet_0_224": paper_like,
        "coatnet_1_224": paper_like.replace(**deep),
        "coatnet_2_224": paper_like.replace(**{**wide, "stem_width": 128}),
        "coatnet_3_224": paper_like.replace(**huge, stem_width=192, **deep),
        "coatnet_4_224": paper_like.replace(**huge, stem_width=192, depths=(2, 12, 28, 2)),
        "coatnet_5_224": paper_like.replace(
            widths=(256, 512, 1280, 2048), stem_width=192, depths=(2, 12, 28, 2)
        ),
        "coatnet_pico_rw_224": nano.replace(depths=(2, 3, 5, 2)),
        "coatnet_nano_rw_224": nano.replace(stride_on="pool"),
        "coatnet_rmlp_nano_rw_224": nano.replace(
            relative_position="mlp", relative_position_hidden_dim=384
        ),
        # Convolution and attention in both of the last stages.
        "coatnet_nano_cc_224": rw.replace(
            widths=(64, 128, (256, 256), (512, 512)),
            depths=(3, 4, (1, 5), (1, 2)),
            layout=("C", "C", "CT", "CT"),
            stride_on="pool",
        ),
        "coatnext_nano_rw_224": nano.replace(
            conv_block="convnext",
            conv_layer_scale=1e-5,
            conv_activation="gelu",
            expansion_from="output",
            batch_norm_epsilon=1e-6,
        ),
        "coatnet_0_rw_224": early.replace(stride_on="pool"),
        "coatnet_bn_0_rw_224": early.replace(
            transformer_norm="batch",
            pixel_mean=(0.485, 0.456, 0.406),
            pixel_std=(0.229, 0.224, 0.225),
        ),
        "coatnet_rmlp_0_rw_224": rw.replace(relative_position="mlp"),
        "coatnet_1_rw_224": early.replace(**deep),
        "coatnet_rmlp_1_rw_224": early.replace(
            **deep,
            stride_on="pool",
            conv_pool="max3",
            transformer_pool="max3",
            relative_position="mlp",
            relative_position_hidden_dim=384,
        ),
        "coatnet_rmlp_1_rw2_224": rw.replace(**deep, relative_position="mlp"),
        "coatnet_2_rw_224": two,
        "coatnet_rmlp_2_rw_224": rmlp_two,
        "coatnet_rmlp_2_rw_384": rmlp_two.replace(input_size=384),
        "coatnet_3_rw_224": three,
        "coatnet_rmlp_3_rw_224": three.replace(relative_position="mlp"),
    }


def _kecam_family() -> dict[str, CoAtNetConfig]:
    """The CoAtNet-0 of keras_cv_attention_models, the trained network nearest the paper's."""
    return {
        "kecam_coatnet0": CoAtNetConfig(
            widths=(96, 192, 384, 768),
            depths=(2, 3, 5, 2),
            stem_bias=False,
            expansion_from="input",
            stride_on="depthwise",
            conv_padding="symmetric",
            conv_activation="gelu",
            conv_bias=False,
            squeeze_from="input",
            squeeze_activation="gelu",
            batch_norm_epsilon=1e-5,
            batch_norm_momentum=0.9,
            attention_from="input",
            attention_bias=False,
            transformer_shortcut_bias=False,
            ffn_activation="gelu",
            ffn_bias=False,
            final_norm=None,
            hidden_head=False,
            pixel_mean=(0.485, 0.456, 0.406),
            pixel_std=(0.229, 0.224, 0.225),
        )
    }


ARCHITECTURES: Mapping[str, CoAtNetConfig] = MappingProxyType(
    _paper_family() | _timm_family() | _kecam_family()
)


def architectures() -> tuple[str, ...]:
    """Returns the names of all architectures that `CoAtNet` builds.

    Returns:
        A tuple of names: the paper's `"coatnet0"` to `"coatnet7"`, the same with the stride on the
        depthwise convolution (`"coatnet0_dw"`, ...), all of timm's, with or without published
        weights, and that of keras_cv_attention_models.

    Example:
        >>> "coatnet_0_rw_224" in architectures()
        True
    """
    return tuple(ARCHITECTURES)


def size_of(architecture: str) -> str:
    """Returns the size of an architecture, e.g. `"coatnet0"` for `"coatnet_bn_0_rw_224"`.

    Args:
        architecture: a name from `architectures()`.

    Returns:
        `"coatnet0"` to `"coatnet7"`, `"coatnet_pico"`, `"coatnet_nano"` or `"coatnext_nano"`.

    Raises:
        ValueError: no size is in the name.
    """
    found = re.search(r"(coatnet|coatnext)_?(?:rmlp_|bn_)?([0-7]|pico|nano)", architecture)
    if found is None:
        raise ValueError(
            "`architecture` must be one of the names of keras_coatnet.architectures(). Received: "
            f"{architecture!r:.300}"
        )
    return found[1] + ("" if found[2].isdigit() else "_") + found[2]


def find_architecture(architecture: str | CoAtNetConfig) -> CoAtNetConfig:
    """Returns the configuration of a name, or the configuration itself.

    Args:
        architecture: a name from `architectures()`, or a `CoAtNetConfig`.

    Returns:
        A `CoAtNetConfig`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(architecture, CoAtNetConfig):
        return architecture
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        advice = (
            " CoAtNetConfig.from_dict makes a configuration of a dictionary."
            if isinstance(architecture, Mapping)
            else ""
        )
        raise ValueError(
            "`architecture` must be a CoAtNetConfig or one of the names of "
            f"keras_coatnet.architectures(): {', '.join(ARCHITECTURES)}."
            f"{advice} Received: {architecture!r:.300}"
        )
    return ARCHITECTURES[architecture]
