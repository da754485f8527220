import json

import pytest

import keras_coatnet
from keras_coatnet import CoAtNetConfig, architectures
from keras_coatnet.architectures import ARCHITECTURES, find_architecture, size_of
from keras_coatnet.config import FREE_FIELDS

SMALL = {"widths": (32, 64, 128, 256), "depths": (1, 1, 2, 1)}
MIXED = {"widths": (32, (64, 64), 128, 256), "depths": (1, (1, 1), 2, 1)}
CONVNEXT = {"conv_block": "convnext", "stride_on": "depthwise", "stem_width": 16}


def test_family_is_the_papers_table_3():
    rows = {
        "coatnet0": ((96, 192, 384, 768), (2, 3, 5, 2), 64, 32),
        "coatnet1": ((96, 192, 384, 768), (2, 6, 14, 2), 64, 32),
        "coatnet2": ((128, 256, 512, 1024), (2, 6, 14, 2), 128, 32),
        "coatnet3": ((192, 384, 768, 1536), (2, 6, 14, 2), 192, 32),
        "coatnet4": ((192, 384, 768, 1536), (2, 12, 28, 2), 192, 32),
        "coatnet5": ((256, 512, 1280, 2048), (2, 12, 28, 2), 192, 64),
        "coatnet6": ((192, 384, (768, 1536), 3072), (2, 4, (8, 42), 2), 192, 128),
        "coatnet7": ((256, 512, (1024, 2048), 3072), (2, 4, (8, 42), 2), 192, 128),
    }
    for name, (widths, depths, stem, head_dim) in rows.items():
        for suffix, stride_on in (("", "expansion"), ("_dw", "depthwise")):
            config = ARCHITECTURES[name + suffix]
            assert (config.widths, config.depths) == (widths, depths)
            assert (config.stem_width, config.head_dim) == ((stem, stem), head_dim)
            assert config.stride_on == stride_on


def test_blocks_of_the_mixed_stage():
    blocks = [block for block in ARCHITECTURES["coatnet7"].blocks() if block.stage == 3]
    assert [block.kind for block in blocks] == ["C"] * 8 + ["T"] * 42
    assert [block.index for block in blocks] == list(range(1, 51))
    assert (blocks[0].strides, blocks[0].filters_in, blocks[0].filters) == (2, 512, 1024)
    first_transformer = blocks[8]
    assert first_transformer.strides == 1
    assert (first_transformer.filters_in, first_transformer.filters) == (1024, 2048)


def test_a_stage_may_begin_with_convolution_above_attention():
    """As in timm's coatnet_nano_cc_224."""
    blocks = list(ARCHITECTURES["coatnet_nano_cc_224"].blocks())
    assert "".join(block.kind for block in blocks) == "CCC" + "CCCC" + "CTTTTT" + "CTT"
    assert [block.name for block in blocks if block.strides == 2] == [
        f"stage{stage}_block1" for stage in (1, 2, 3, 4)
    ]
    assert {(block.filters_in, block.filters) for block in blocks if block.stage == 4} == {
        (256, 512),
        (512, 512),
    }


@pytest.mark.parametrize("layout", ["CCCC", "CCCT", "CCTT", "CTTT"])
def test_layouts_of_the_ablation(layout):
    config = CoAtNetConfig(**SMALL, layout=tuple(layout))
    assert "".join(block.kind for block in config.blocks() if block.index == 1) == layout
    assert all((block.strides == 2) == (block.index == 1) for block in config.blocks())


def test_stochastic_depth_grows_linearly_over_all_blocks():
    config = CoAtNetConfig(**SMALL, stochastic_depth=0.2)
    assert [block.stochastic_depth for block in config.blocks()] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (32, 64, 100, 256)}, "head_dim=32 does not divide"),
        ({"widths": (32, 64, 128)}, "one entry for each stage"),
        ({"widths": 32}, "must be a tuple"),
        ({"depths": (1, 1, -2, 1)}, r"at least 1. Received: depths\[2\]=-2"),
        ({"depths": (1, 1, 0, 1)}, "at least 1. Received: .*=0"),
        ({"depths": (1, 1, 2.5, 1)}, "whole number"),
        ({"layout": ("C", "T", "C", "T")}, "No MBConv may come after"),
        ({"layout": ("C", "C", "TC", "T")}, "Stage 3 of `layout`"),
        ({"layout": ("C", "C", "CT", "T")}, "Stage 3 of `widths` must have 2"),
        ({"layout": ("C", "C", "X", "T")}, "Received: 'X'"),
        ({"stride_on": "3x3"}, "'expansion', 'depthwise', 'pool'"),
        ({"stem_width": (16, 16, 16)}, "one number or a pair"),
        ({"stem_width": 0}, "`stem_width`"),
        ({"head_dim": 0}, "`head_dim`"),
        ({"expansion": 0}, "`expansion`"),
        ({"squeeze_ratio": 0.0}, "`squeeze_ratio` must be a number above 0"),
        ({"batch_norm_epsilon": 0}, "`batch_norm_epsilon`"),
        ({"batch_norm_momentum": 1.0}, "below 1"),
        ({"stochastic_depth": 1.0}, "below 1"),
        ({"stochastic_depth": -0.1}, "at least 0"),
        ({"layer_scale": -1e-6}, "`layer_scale`"),
        ({"input_size": 16}, "at least 32"),
        ({"input_size": (64, 16)}, "at least 32"),
        ({"input_size": (64, 64, 3)}, "one number, or a height and a width"),
        ({"pixel_std": (0.5, 0.0, 0.5)}, "`pixel_std`"),
        ({"pixel_mean": (0.5,)}, "one value for each channel"),
        ({"final_norm": "nowhere"}, "`final_norm`"),
        ({"layout": ("C", "CT", "C", "T"), **MIXED}, "No MBConv may come after"),
        ({"conv_block": "resnet"}, "'mbconv', 'convnext'. Received: conv_block='resnet'"),
        ({"conv_layer_scale": 1e-6}, "conv_block='mbconv'. Leave it out"),
        ({"conv_layer_scale": -1.0, **CONVNEXT}, "`conv_layer_scale` must be a number above 0"),
        ({"conv_block": "convnext"}, "stride_on='expansion'. Use stride_on='depthwise'"),
        ({**CONVNEXT, "stem_width": 24}, "stage1_block1 with 32 channels for 24.*`stem_width`"),
        ({**CONVNEXT, "widths": (32, 48, 96, 96)}, "stage2_block1 with 48 channels for 32"),
    ],
)
def test_nonsense_is_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        CoAtNetConfig(**{**SMALL, **changes})


def test_replace_refuses_unknown_fields():
    with pytest.raises(ValueError, match="no field 'strideon'.*stride_on"):
        CoAtNetConfig(**SMALL).replace(strideon="depthwise")


@pytest.mark.parametrize("name", architectures())
def test_json_round_trip(name):
    config = ARCHITECTURES[name]
    assert CoAtNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"Unknown: \[\]; missing: \['widths', 'depths'\]"),
        ({"widths": (1,), "depth": (1,)}, r"Unknown: \['depth'\]; missing: \['depths'\]"),
        ({**SMALL, "color": 1}, r"Unknown: \['color'\].*Known: widths, depths"),
        (None, "fields of CoAtNetConfig. Received: None"),
    ],
)
def test_from_dict_names_the_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        CoAtNetConfig.from_dict(fields)


def test_repr_shows_what_differs_from_the_paper():
    config = CoAtNetConfig(**SMALL, stride_on="pool")
    assert repr(config) == (
        "CoAtNetConfig(widths=(32, 64, 128, 256), depths=(1, 1, 2, 1), stride_on='pool')"
    )
    assert eval(repr(config)) == config
    assert "stem_width=(16, 16)" in repr(config.replace(stem_width=16))
    assert CoAtNetConfig(**SMALL, stem_width=64) == CoAtNetConfig(**SMALL)


def test_same_network_ignores_what_weights_do_not_see():
    config = CoAtNetConfig(**SMALL)
    free = config.replace(stochastic_depth=0.3, batch_norm_momentum=0.9, input_size=384)
    assert config.same_network(free) and set(FREE_FIELDS) == {
        "stochastic_depth",
        "batch_norm_momentum",
        "input_size",
    }
    assert not config.same_network(config.replace(conv_pool="avg2"))


def test_sizes():
    assert {size_of(name) for name in architectures()} == {
        *(f"coatnet{number}" for number in range(8)),
        "coatnet_nano",
        "coatnet_pico",
        "coatnext_nano",
    }
    assert size_of("coatnet_nano_cc_224") == "coatnet_nano"
    assert size_of("coatnet_5_224") == "coatnet5"
    assert size_of("coatnet_rmlp_1_rw2_224") == "coatnet1"
    assert size_of("kecam_coatnet0") == "coatnet0"


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match="coatnet0, coatnet1.*Received: 'coatnet8'"):
        find_architecture("coatnet8")


@pytest.mark.parametrize(
    "field",
    [
        "stem_bias",
        "conv_prenorm_activation",
        "conv_bias",
        "attention_bias",
        "transformer_shortcut_bias",
        "ffn_bias",
        "hidden_head",
    ],
)
def test_text_is_no_boolean(field):
    with pytest.raises(ValueError, match=f"`{field}` must be True or False.*'False'"):
        CoAtNetConfig((32, 64, 128, 256), (1, 1, 2, 1), **{field: "False"})


@pytest.mark.parametrize(
    ("layer", "argument"),
    [
        ("MBConv", "use_bias"),
        ("MBConv", "prenorm_activation"),
        ("RelativeSelfAttention", "use_bias"),
        ("TransformerBlock", "attention_bias"),
        ("TransformerBlock", "shortcut_bias"),
        ("TransformerBlock", "ffn_bias"),
    ],
)
def test_text_is_no_boolean_of_a_layer(layer, argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be True or False.*'False'"):
        getattr(keras_coatnet.layers, layer)(32, **{argument: "False"})
