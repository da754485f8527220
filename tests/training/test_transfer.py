"""Frozen layers, and learning rates that fall from the head to the stem."""

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.training.transfer import freeze, layer_rate_scales


def test_layer_wise_rates_fall_from_head_to_stem(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    scales = layer_rate_scales(model, 0.5)
    names = [block.name for block in tiny.blocks()]
    for place, name in enumerate(reversed(names), 1):
        assert scales[name] == 0.5**place
    assert scales["stem_conv1"] == scales["stem_norm"] == 0.5 ** (len(names) + 1)
    assert scales["predictions"] == scales["hidden"] == scales["norm"] == 1.0
    assert set(layer_rate_scales(model, 1.0).values()) == {1.0}


def test_a_network_of_convnext_blocks_is_frozen_alike():
    config = keras_coatnet.CoAtNetConfig(
        (8, 16, 32, 64), (1, 1, 1, 1), stem_width=8, conv_block="convnext", stride_on="depthwise"
    )
    model = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=5)
    assert layer_rate_scales(model, 0.5)["stage1_block1"] == 0.5**4
    freeze(model, "stage2", batch_norm=True)
    layers = {variable.path.split("/")[0] for variable in model.trainable_variables}
    assert layers == {"stage3_block1", "stage4_block1", "norm", "hidden", "predictions"}


@pytest.mark.slow
def test_freezing_leaves_the_rest_and_keeps_statistics(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    everything = len(model.trainable_variables)
    freeze(model, "none", batch_norm=True)
    paths = [variable.path for variable in model.trainable_variables]
    assert not any("_norm/" in path and "stage1" in path for path in paths)
    assert any("attention_norm/gamma" in path for path in paths)  # a LayerNorm
    assert 0 < len(paths) < everything
    freeze(model, "stage2", batch_norm=False)
    layers = {variable.path.split("/")[0] for variable in model.trainable_variables}
    assert {layer[:6] for layer in layers if layer.startswith("st")} == {"stage3", "stage4"}
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    before = [keras.ops.convert_to_numpy(variable) for variable in model.non_trainable_variables]
    model(pixels, training=True)
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


def test_values_out_of_range_are_refused(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    with pytest.raises(ValueError, match="`decay` must be a number above 0"):
        layer_rate_scales(model, "a")
    with pytest.raises(ValueError, match="`up_to` must be one of 'none', 'stem', 'stage1'"):
        freeze(model, "head", batch_norm=False)
    with pytest.raises(ValueError, match="`batch_norm` must be True or False"):
        freeze(model, "none", batch_norm="no")


@pytest.mark.slow
def test_a_fused_network_is_refused(tiny):
    model = keras_coatnet.fuse(keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5))
    with pytest.raises(ValueError, match="before `fuse`. Received a fused model"):
        freeze(model, "none", batch_norm=True)
    with pytest.raises(ValueError, match="before `fuse`. Received a fused model"):
        layer_rate_scales(model, 0.5)


def test_a_model_that_is_no_whole_network_has_no_rates(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    inputs = keras.Input((64, 64, 16))
    part = type(model)(inputs, model.get_layer("stage2_block1")(inputs))
    assert part.architecture is None
    with pytest.raises(ValueError, match="must be one whole CoAtNet"):
        layer_rate_scales(part, 0.5)
