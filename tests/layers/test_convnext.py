"""ConvNeXt blocks."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import ConvNeXtBlock
from tests import reference
from tests.helpers import (
    assert_config_covers,
    assert_gradients_reach,
    assert_initial_values,
    assert_matches,
    assert_same_after_serialization,
    assert_shapes,
    assert_slopes,
    call_layer,
    case_id,
    pairwise,
    precision,
    random_map,
    randomize,
    to_numpy,
    with_unknown_size,
)

# How a block may halve the map, or not: the arguments that have a say in it.
STRIDES = {
    "none": {"strides": 1, "padding": "symmetric"},
    "none-pool": {"strides": 1, "stride_on": "pool", "stride_pool": "max3"},
    "same": {"strides": 2, "padding": "same"},
    "symmetric": {"strides": 2, "padding": "symmetric"},
    "avg2": {"strides": 2, "stride_on": "pool", "stride_pool": "avg2"},
    "max2": {"strides": 2, "stride_on": "pool", "stride_pool": "max2"},
    "max3": {"strides": 2, "stride_on": "pool", "stride_pool": "max3"},
}
HALVING = [name for name, options in STRIDES.items() if options["strides"] == 2]
CASES = pairwise(
    {
        "stride": list(STRIDES),
        "size": [(5, 7), (8, 4)],
        "pool": ["avg2", "max3"],
        "activation": ["gelu", "silu"],
        "filters": [4, 12],
        "use_bias": [True, False],
        "expanded_filters": [None, 10],
        "norm_epsilon": [1e-6, 0.1],
        "layer_scale": [1e-6, None],
    }
)
# What the reference takes; it reads the rest off the weights.
SWITCHES = (
    *("strides", "stride_on", "pool", "stride_pool", "padding", "activation", "norm_epsilon"),
)


def built(x: np.ndarray, filters: int, **kwargs: object) -> tuple[ConvNeXtBlock, dict]:
    """A block of the test's precision with random weights, and these."""
    layer = ConvNeXtBlock(filters, **{"dtype": precision().dtype, **kwargs})
    layer.build(x.shape)
    return layer, randomize(layer)


def expect(x: np.ndarray, weights: dict, **arguments: object) -> np.ndarray:
    switches = {name: arguments[name] for name in SWITCHES if name in arguments}
    return reference.convnext(x.astype("float64"), weights, **switches)


# --- equality --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_the_reference(case):
    x = random_map(2, *case["size"], 4)
    arguments = {**case, **STRIDES[case["stride"]]}
    del arguments["stride"], arguments["size"]
    layer, weights = built(x, **arguments)
    filters, bias = case["filters"], case["use_bias"]
    assert weights["depthwise_conv/kernel"].shape == (7, 7, 4, filters // 4)
    assert weights["ffn_expand/kernel"].shape == (filters, case["expanded_filters"] or 4 * filters)
    assert ("shortcut/kernel" in weights) == (filters != 4)
    assert ("ffn_scale/scale" in weights) == (case["layer_scale"] is not None)
    biased = {path.removesuffix("/bias") for path in weights if path.endswith("bias")}
    products = {"depthwise_conv", "ffn_expand", "ffn_project", *(["shortcut"] * (filters != 4))}
    assert biased == (products if bias else set())
    assert_matches(call_layer(layer, x, training=False), expect(x, weights, **arguments))


@pytest.mark.parametrize(("strides", "filters"), [(1, 4), (2, 4), (2, 8)])
def test_defaults_are_timm_s(strides, filters):
    x = random_map(2, 5, 7, 4)
    layer, weights = built(x, filters, strides=strides)
    assert layer.expanded_filters == 4 * filters
    expected = expect(
        x,
        weights,
        strides=strides,
        stride_on="depthwise",
        pool="avg2",
        padding="same",
        activation="gelu",
        norm_epsilon=1e-6,
    )
    assert_matches(call_layer(layer, x), expected)


def test_the_reference_tells_the_switches_apart():
    # The sizes are even, since "same" padding of odd ones is symmetric.
    x = random_map(2, 8, 10, 4)
    _, weights = built(x, 4)
    outputs = [expect(x, weights, **STRIDES[name]) for name in HALVING]
    outputs += [expect(x, weights, strides=2, pool=pool) for pool in ("max2", "max3")]
    outputs += [expect(x, weights, strides=2, activation="silu")]
    outputs += [expect(x, weights, strides=2, norm_epsilon=0.1)]
    for index, one in enumerate(outputs):
        for other in outputs[:index]:
            assert np.abs(one - other).max() > 1e-5


def test_initial_values():
    layer = ConvNeXtBlock(32, strides=2, layer_scale=None)
    layer.build((1, 4, 4, 16))
    assert_initial_values(layer)
    scaled = ConvNeXtBlock(8, layer_scale=1e-5)
    scaled.build((None, 4, 4, 8))
    np.testing.assert_allclose(to_numpy(scaled.ffn_scale.scale), np.full(8, 1e-5), rtol=1e-6)


@pytest.mark.parametrize(("rate", "scale"), [(0.5, 2.0), (0.75, 4.0)])
def test_stochastic_depth_scales_the_branch_alone(rate, scale):
    keras.utils.set_random_seed(1)
    x = random_map(24, 5, 4, 4)
    layer, weights = built(x, 8, strides=2, stochastic_depth=rate)
    shortcut, branch = reference.convnext_branches(x.astype("float64"), weights, strides=2)
    output = to_numpy(call_layer(layer, x, training=True))
    # A dropped sample is its shortcut, to the last digits.
    dropped = np.abs(output - shortcut).max(axis=(1, 2, 3)) < 1e-4
    assert 0 < dropped.sum() < 24
    factors = np.where(dropped, 0.0, scale)[:, None, None, None]
    assert_matches(output, shortcut + factors * branch, 10 * precision().tolerance)
    assert_matches(call_layer(layer, x), shortcut + branch)


# --- unknown sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", ["none", "symmetric", "max3"])
def test_unknown_size(stride):
    inputs = keras.Input((None, None, 4), dtype=precision().dtype)
    layer = ConvNeXtBlock(8, dtype=precision().dtype, **STRIDES[stride])
    call = with_unknown_size(keras.Model(inputs, layer(inputs)))
    weights = randomize(layer)
    for size in ((5, 7), (8, 6)):
        x = random_map(2, *size, 4)
        assert_matches(call(x), expect(x, weights, **STRIDES[stride]))


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", ["none", "symmetric", "max3"])
def test_gradients(stride):
    x = random_map(2, 5, 4, 4)
    layer, weights = built(x, 8, **STRIDES[stride])
    found = assert_gradients_reach(layer, x, training=True)
    assert_slopes(found, lambda w: expect(x, w, **STRIDES[stride]), weights)


def test_gradients_at_unknown_size():
    inputs = keras.Input((None, None, 4), dtype=precision().dtype)
    layer = ConvNeXtBlock(8, strides=2, dtype=precision().dtype)
    model = keras.Model(inputs, layer(inputs))
    randomize(model)
    assert_gradients_reach(model, random_map(2, 5, 7, 4), unknown_size=True, training=True)


# --- the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stride", ["symmetric", "max3"])
def test_mixed_precision(stride, dtype):
    x = random_map(2, 5, 7, 4, dtype="float32")
    layer, weights = built(x, 8, dtype=f"mixed_{dtype}", **STRIDES[stride])
    output = call_layer(layer, x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    assert {keras.backend.standardize_dtype(v.dtype) for v in layer.variables} == {"float32"}
    allowed = 1e-2 if dtype == "float16" else 5e-2
    assert_matches(output, expect(x, weights, **STRIDES[stride]), allowed)


@pytest.mark.parametrize("stride", ["none", "symmetric", "max3"])
def test_serialization(stride):
    x = random_map(2, 5, 7, 4, dtype="float32")
    layer, _ = built(x, 8, dtype="float32", **STRIDES[stride])
    assert_same_after_serialization(layer, x)


def test_config():
    arguments = {
        "filters": 8,
        "expanded_filters": 20,
        "strides": 2,
        "stride_on": "pool",
        "pool": "max3",
        "stride_pool": "max2",
        "padding": "symmetric",
        "activation": "silu",
        "use_bias": False,
        "norm_epsilon": 1e-5,
        "layer_scale": None,
        "stochastic_depth": 0.3,
    }
    assert_config_covers(ConvNeXtBlock(**arguments), arguments)


@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
@pytest.mark.parametrize("stride", ["none", *HALVING])
def test_shapes(stride, size):
    layer, x = ConvNeXtBlock(8, **STRIDES[stride]), random_map(2, *size, 4, dtype="float32")
    assert_shapes(layer, x, 8)
    strides = STRIDES[stride]["strides"]
    halved = [-(-length // strides) for length in size]
    assert tuple(layer.compute_output_shape(x.shape)) == (2, *halved, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": 3}, "strides=3"),
        ({"stride_on": "expansion"}, "stride_on='expansion'"),
        ({"pool": "avg3"}, "pool='avg3'"),
        ({"stride_pool": "avg3"}, "stride_pool='avg3'"),
        ({"padding": "valid"}, "padding='valid'"),
        ({"activation": "swish"}, "'swish'"),
        ({"stochastic_depth": 1.0}, "=1.0"),
        ({"filters": 12}, "filters=12 for an input of 8 channels.*multiple"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    # Sublayers check some of them, when they are made.
    with pytest.raises(ValueError, match=message):
        ConvNeXtBlock(**{"filters": 8, **arguments})(random_map(1, 4, 4, 8, dtype="float32"))
