"""What values arguments take: NumPy's numbers as Python's, and nothing of another kind."""

import json

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet import CoAtNet, CoAtNetConfig, count_flops, count_params, layers
from keras_coatnet.images import ImageSettings
from keras_coatnet.training import Recipe
from tests.helpers import random_map

TINY = CoAtNetConfig((8, 8), (1, 1), ("C", "T"), stem_width=8, head_dim=8, input_size=32)
MAP = random_map(1, 4, 4, 8, dtype="float32")


# --- NumPy's numbers -------------------------------------------------------------------------


def test_numpy_numbers_of_a_configuration_are_pythons():
    plain = TINY.replace(
        squeeze_ratio=0.25, stem_bias=True, stem_width=(8, 16), input_size=(32, 64), layer_scale=0.5
    )
    config = CoAtNetConfig(
        widths=(np.int64(8), np.int32(8)),
        depths=tuple(np.array([1, 1])),
        layout=tuple(np.array(["C", "T"])),
        stem_width=tuple(np.array([8, 16])),
        stem_bias=np.bool_(True),
        squeeze_ratio=np.float32(0.25),
        layer_scale=np.float16(0.5),
        stochastic_depth=np.float64(0.0),
        head_dim=np.uint8(8),
        input_size=(np.int64(32), np.int64(64)),
        pixel_mean=tuple(np.full(3, 0.5)),
        conv_pool=np.str_("max2"),
    )
    assert config == plain and hash(config) == hash(plain)
    assert repr(config) == repr(plain)
    assert json.dumps(config.to_dict()) == json.dumps(plain.to_dict())
    assert TINY.replace(stem_width=np.int64(8)) == TINY


def test_numpy_numbers_of_a_mixed_stage():
    pairs = {"widths": ((np.int64(8), np.int64(16)),), "depths": ((np.int64(1), np.int64(2)),)}
    config = CoAtNetConfig(**pairs, layout=("CT",), stem_width=8, head_dim=8)
    assert json.loads(json.dumps(config.to_dict()))["widths"] == [[8, 16]]


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
def test_numpy_numbers_of_a_model(tmp_path):
    labels = np.array([0, 1, 2], "int32")
    model = CoAtNet(
        TINY,
        classes=labels.max() + 1,
        input_shape=tuple(np.array([32, 48, 3])),
        include_top=np.bool_(True),
        include_preprocessing=np.bool_(False),
        stochastic_depth=np.float32(0.25),
    )
    assert model.output_shape == (None, 3) and model.input_shape == (None, 32, 48, 3)
    assert type(model.classes) is int and model.include_preprocessing is False
    model.save(tmp_path / "a.keras")
    assert keras.models.load_model(tmp_path / "a.keras").identity() == model.identity()
    model.save_weights(tmp_path / "a.weights.h5")
    again = CoAtNet(model.architecture, weights=tmp_path / "a.weights.h5", classes=np.int64(3))
    assert again.identity() == model.identity()


def test_numpy_numbers_of_the_counts_and_the_class_names():
    count = count_params(TINY, (64, 32, 3), classes=3)
    found = count_params(TINY, tuple(np.array([64, 32, 3])), np.int64(3), np.bool_(True))
    assert found == count and type(found) is int
    operations = count_flops(TINY, tuple(np.array([64, 32, 3])), classes=np.int64(3))
    assert operations == count_flops(TINY, (64, 32, 3), classes=3) and type(operations) is int
    (named,) = keras_coatnet.decode_predictions(np.eye(1000)[:1], top=np.int64(2))
    assert len(named) == 2


def test_numpy_numbers_of_image_settings():
    settings = ImageSettings(np.int64(64), crop_pct=np.float32(0.5))
    assert settings == ImageSettings(64, crop_pct=0.5)
    pair = ImageSettings(tuple(np.array([64, 32])))
    assert repr(pair) == repr(ImageSettings((64, 32)))


@pytest.mark.parametrize("wrong", [{"size": True}, {"size": 64.0}, {"size": None}, {"size": (64,)}])
def test_what_are_no_image_settings(wrong):
    with pytest.raises(ValueError, match="`size` must be a number of pixels, or"):
        ImageSettings(**wrong)


def test_no_number_of_image_settings_and_recipes():
    with pytest.raises(ValueError, match="`crop_pct` must be a number above 0 and at most 1"):
        ImageSettings(64, crop_pct="a")
    with pytest.raises(ValueError, match="`mixup` must be a number below"):
        Recipe(mixup=10**400)


def test_numpy_numbers_of_a_recipe(tmp_path):
    recipe = Recipe(batch_size=np.int64(8), warmup=np.float32(0.25), flip=np.bool_(False), mixup=1)
    plain = Recipe(batch_size=8, warmup=0.25, flip=False, mixup=1.0)
    assert recipe == plain and recipe.to_dict() == plain.to_dict()
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == plain
    assert json.dumps(plain.replace(batch_size=np.int32(16)).to_dict()) == json.dumps(
        plain.replace(batch_size=16).to_dict()
    )


LAYERS = [
    (
        layers.MBConv,
        {
            "filters": np.int64(8),
            "expanded_filters": np.int64(16),
            "squeezed_filters": np.int64(2),
            "strides": np.int64(2),
            "use_bias": np.bool_(False),
            "batch_norm_epsilon": np.float32(0.5),
            "batch_norm_momentum": np.float32(0.5),
            "stochastic_depth": np.float32(0.5),
        },
    ),
    (
        layers.ConvNeXtBlock,
        {
            "filters": np.int64(8),
            "expanded_filters": np.int64(16),
            "strides": np.int64(2),
            "use_bias": np.bool_(False),
            "norm_epsilon": np.float32(0.5),
            "layer_scale": np.float32(0.5),
            "stochastic_depth": np.float32(0.5),
        },
    ),
    (
        layers.TransformerBlock,
        {
            "filters": np.int64(8),
            "strides": np.int64(2),
            "head_dim": np.int64(4),
            "attention_dim": np.int64(8),
            "relative_position_hidden_dim": np.int64(4),
            "table_size": tuple(np.array([2, 2])),
            "norm_epsilon": np.float32(0.5),
            "ffn_expansion": np.int64(2),
            "ffn_bias": np.bool_(False),
            "layer_scale": np.float32(0.5),
        },
    ),
    (
        layers.RelativeSelfAttention,
        {
            "filters": np.int64(8),
            "head_dim": np.int64(4),
            "relative_position_hidden_dim": np.int64(4),
        },
    ),
    (layers.SqueezeExcite, {"squeezed_filters": np.int64(2)}),
    (layers.StochasticDepth, {"rate": np.float32(0.5), "seed": np.int64(3)}),
    (layers.LayerScale, {"initial_scale": np.float32(0.5)}),
]


@pytest.mark.parametrize(("layer", "arguments"), LAYERS)
def test_numpy_numbers_of_a_layer(layer, arguments):
    numpys = layer(**arguments, name="a")
    plain = layer(
        **{
            name: tuple(map(int, value)) if isinstance(value, tuple) else value.item()
            for name, value in arguments.items()
        },
        name="a",
    )
    assert json.dumps(numpys.get_config()) == json.dumps(plain.get_config())
    assert numpys(MAP).shape == plain(MAP).shape


def test_numpy_numbers_of_relative_positions():
    table = layers.RelativePositionTable(np.int64(2), tuple(np.array([3, 4])), name="a")
    mlp = layers.RelativePositionMLP(np.int64(2), np.int64(4), name="a")
    for layer in (table, mlp):
        json.dumps(layer.get_config())
        assert layer(height=3, width=4).shape == (2, 12, 12)


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 8.0, np.float32(8), "8", None])
def test_what_is_no_whole_number(wrong):
    with pytest.raises(ValueError, match=r"`widths\[1\]` must be a whole number of at least 1"):
        TINY.replace(widths=(8, wrong))
    with pytest.raises(ValueError, match="`classes` must be a whole number of at least 1"):
        count_params(TINY, classes=wrong)
    with pytest.raises(ValueError, match="`input_shape`"):
        count_params(TINY, (64, wrong, 3))
    with pytest.raises(ValueError, match="`top` must be a whole number of at least 1"):
        keras_coatnet.decode_predictions(np.eye(1000)[:1], top=wrong)
    with pytest.raises(ValueError, match="`batch_size` must be int"):
        Recipe(batch_size=wrong)


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 8.0, np.float32(8), "8"])
def test_what_is_no_number_of_classes(wrong):
    with pytest.raises(ValueError, match="`classes` must be a whole number of at least 1"):
        CoAtNet(TINY, classes=wrong)


@pytest.mark.parametrize("wrong", [1, 0, np.int64(1), "no", 3.0])
def test_what_is_no_boolean(wrong):
    for field in ("stem_bias", "hidden_head"):
        with pytest.raises(ValueError, match=f"`{field}` must be True or False"):
            TINY.replace(**{field: wrong})
    with pytest.raises(ValueError, match="`include_top` must be True or False.*include_top="):
        CoAtNet(TINY, include_top=wrong)
    with pytest.raises(ValueError, match="`include_top` must be True or False"):
        keras_coatnet.CoAtNet0(include_top=wrong, weights=None)
    with pytest.raises(ValueError, match="`include_preprocessing` must be True, False or None"):
        CoAtNet(TINY, include_preprocessing=wrong)
    for count in (count_params, count_flops):
        with pytest.raises(ValueError, match="`include_top` must be True or False"):
            count(TINY, include_top=wrong)
    with pytest.raises(ValueError, match="`flip` must be bool"):
        Recipe(flip=wrong)


def test_none_is_no_boolean_either():
    with pytest.raises(ValueError, match="`include_top` must be True or False.*None"):
        CoAtNet(TINY, include_top=None)


@pytest.mark.parametrize("wrong", [1, "x", None])
def test_whether_to_compile_is_true_or_false(wrong):
    model = CoAtNet(TINY, classes=2)
    with pytest.raises(ValueError, match="`jit_compile` must be True or False.*jit_compile="):
        keras_coatnet.fuse(model, jit_compile=wrong)


# --- Values of another kind ------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [TINY.to_dict(), ["coatnet0"], 3, None])
def test_what_is_no_architecture(wrong):
    for ask in (CoAtNet, count_params, count_flops):
        with pytest.raises(ValueError, match="must be a CoAtNetConfig or one of the names"):
            ask(wrong)


def test_a_dictionary_is_told_how_to_become_a_configuration():
    with pytest.raises(ValueError, match=r"CoAtNetConfig\.from_dict"):
        CoAtNet(TINY.to_dict())


WRONG_LAYERS = [
    (layers.MBConv, {"filters": "8"}, "`filters` must be a whole number.*filters='8'"),
    (layers.MBConv, {"filters": 0}, "`filters`"),
    (layers.MBConv, {"filters": 8, "expanded_filters": 2.5}, "`expanded_filters`"),
    (layers.MBConv, {"filters": 8, "squeezed_filters": "a"}, "`squeezed_filters`"),
    (layers.MBConv, {"filters": 8, "strides": True}, "`strides` must be one of 1, 2.*strides=True"),
    (layers.MBConv, {"filters": 8, "batch_norm_epsilon": -1}, "`batch_norm_epsilon`.*=-1"),
    (layers.MBConv, {"filters": 8, "batch_norm_momentum": 2}, "`batch_norm_momentum`"),
    (layers.MBConv, {"filters": 8, "stochastic_depth": "a"}, "`stochastic_depth`"),
    (layers.MBConv, {"filters": 8, "stochastic_depth": 1.0}, "`stochastic_depth`.*below 1"),
    (layers.MBConv, {"filters": 8, "activation": ["gelu"]}, "gelu"),
    (layers.ConvNeXtBlock, {"filters": "8"}, "`filters`"),
    (layers.ConvNeXtBlock, {"filters": 8, "strides": 2.0}, "`strides`"),
    (layers.ConvNeXtBlock, {"filters": 8, "use_bias": "no"}, "`use_bias` must be True or False"),
    (layers.ConvNeXtBlock, {"filters": 8, "norm_epsilon": None}, "`norm_epsilon`"),
    (layers.ConvNeXtBlock, {"filters": 8, "layer_scale": "a"}, "`layer_scale`"),
    (layers.TransformerBlock, {"filters": None}, "`filters`"),
    (layers.TransformerBlock, {"filters": 32, "head_dim": "a"}, "`head_dim`"),
    (layers.TransformerBlock, {"filters": 32, "head_dim": 5}, "attention_dim=32, head_dim=5"),
    (layers.TransformerBlock, {"filters": 32, "relative_position": "x"}, "`relative_position`"),
    (
        layers.TransformerBlock,
        {"filters": 32, "relative_position_hidden_dim": 0},
        "position_hidden_dim`",
    ),
    (layers.TransformerBlock, {"filters": 32, "table_size": 8}, "`table_size`.*two.*table_size=8"),
    (layers.TransformerBlock, {"filters": 32, "table_size": (0, 0)}, r"`table_size`.*\(0, 0\)"),
    (layers.TransformerBlock, {"filters": 32, "table_size": (7, 7, 7)}, "`table_size`.*two"),
    (layers.TransformerBlock, {"filters": 32, "norm_epsilon": float("nan")}, "`norm_epsilon`"),
    (layers.TransformerBlock, {"filters": 32, "ffn_expansion": 1.5}, "`ffn_expansion`"),
    (layers.TransformerBlock, {"filters": 32, "layer_scale": "a"}, "`layer_scale`.*'a'"),
    (layers.TransformerBlock, {"filters": 32, "strides": True}, "`strides`"),
    (layers.RelativeSelfAttention, {"filters": "a"}, "`filters`"),
    (layers.RelativeSelfAttention, {"filters": 32, "head_dim": 0}, "`head_dim`"),
    (layers.RelativeSelfAttention, {"filters": 32, "table_size": 8}, "`table_size`"),
    (layers.RelativePositionTable, {"num_heads": 2, "table_size": 7}, "`table_size`.*table_size=7"),
    (
        layers.RelativePositionTable,
        {"num_heads": 0, "table_size": (7, 7)},
        "`num_heads`.*num_heads=0",
    ),
    (layers.RelativePositionMLP, {"num_heads": 0}, "`num_heads`"),
    (layers.RelativePositionMLP, {"num_heads": 2, "hidden_dim": "a"}, "`hidden_dim`"),
    (layers.SqueezeExcite, {"squeezed_filters": None}, "`squeezed_filters`.*squeezed_filters=None"),
    (layers.StochasticDepth, {"rate": "a"}, "`rate` must be a number.*rate='a'"),
    (layers.StochasticDepth, {"rate": True}, "`rate`"),
    (layers.StochasticDepth, {"rate": 0.0, "seed": "a"}, "`seed`"),
    (layers.LayerScale, {"initial_scale": "a"}, "`initial_scale`.*'a'"),
    (layers.LayerScale, {"initial_scale": float("inf")}, "`initial_scale`"),
]


@pytest.mark.parametrize(("layer", "arguments", "message"), WRONG_LAYERS)
def test_layers_refuse_values_of_another_kind_at_construction(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**arguments)
