"""MBConv blocks."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import MBConv
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
    path_within,
    precision,
    random_map,
    randomize,
    to_numpy,
    with_unknown_size,
)

# How a block may halve the map, or not: the arguments that have a say in it.
STRIDES = {
    "none": {"strides": 1},
    "none-depthwise": {"strides": 1, "stride_on": "depthwise", "padding": "symmetric"},
    "none-pool": {"strides": 1, "stride_on": "pool", "stride_pool": "max3"},
    "expansion": {"strides": 2, "stride_on": "expansion"},
    "same": {"strides": 2, "stride_on": "depthwise", "padding": "same"},
    "symmetric": {"strides": 2, "stride_on": "depthwise", "padding": "symmetric"},
    "avg2": {"strides": 2, "stride_on": "pool", "stride_pool": "avg2"},
    "max2": {"strides": 2, "stride_on": "pool", "stride_pool": "max2"},
    "max3": {"strides": 2, "stride_on": "pool", "stride_pool": "max3"},
}
CASES = pairwise(
    {
        "stride": list(STRIDES),
        "size": [(5, 7), (8, 6), (4, 4)],
        "pool": ["max2", "avg2", "max3"],
        "activation": ["gelu_tanh", "gelu", "silu", "relu"],
        "squeeze_activation": ["silu", "relu", "gelu_tanh", "gelu"],
        "filters": [8, 12],
        "prenorm_activation": [False, True],
        "squeeze_place": ["after_norm", "before_norm"],
        "use_bias": [True, False],
        "expanded_filters": [None, 20],
        "squeezed_filters": [None, 5],
        "batch_norm_epsilon": [1e-3, 0.1],
    }
)
# What the reference takes; it reads the rest off the weights.
SWITCHES = (
    *("strides", "stride_on", "pool", "stride_pool", "padding", "activation"),
    *("prenorm_activation", "squeeze_activation", "squeeze_place"),
)
HALVING = [name for name, options in STRIDES.items() if options["strides"] == 2]


def built(x: np.ndarray, filters: int, **kwargs: object) -> tuple[MBConv, dict]:
    """A block of the test's precision with random weights, and these."""
    layer = MBConv(filters, **{"dtype": precision().dtype, **kwargs})
    layer.build(x.shape)
    return layer, randomize(layer)


def switches(arguments: dict) -> dict:
    return {name: arguments[name] for name in SWITCHES if name in arguments}


def expect(x: np.ndarray, weights: dict, epsilon: float = 1e-3, **arguments: object) -> np.ndarray:
    norms = reference.BatchNorms(weights, epsilon)
    return reference.mbconv(x.astype("float64"), weights, norms, **switches(arguments))


# --- equality --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_the_reference(case):
    x = random_map(2, *case["size"], 8)
    arguments = {**case, **STRIDES[case["stride"]]}
    del arguments["stride"], arguments["size"]
    layer, weights = built(x, **arguments)
    expanded = case["expanded_filters"] or 4 * case["filters"]
    assert weights["expand/kernel"].shape == (1, 1, 8, expanded)
    assert weights["squeeze_excite/squeeze/kernel"].shape == (
        expanded,
        case["squeezed_filters"] or case["filters"] // 4,
    )
    assert ("shortcut/kernel" in weights) == (case["filters"] != 8)
    assert ("project/bias" in weights) == case["use_bias"]
    assert ("shortcut/bias" in weights) == (case["use_bias"] and case["filters"] != 8)
    epsilon = case["batch_norm_epsilon"]
    assert_matches(call_layer(layer, x, training=False), expect(x, weights, epsilon, **arguments))


@pytest.mark.parametrize(("strides", "filters"), [(1, 8), (2, 8), (2, 12)])
def test_defaults_are_the_papers(strides, filters):
    x = random_map(2, 5, 7, 8)
    layer, weights = built(x, filters, strides=strides)
    expected = expect(
        x,
        weights,
        strides=strides,
        stride_on="expansion",
        pool="max2",
        activation="gelu_tanh",
        prenorm_activation=False,
        squeeze_activation="silu",
        squeeze_place="after_norm",
    )
    assert_matches(call_layer(layer, x), expected)


def test_the_reference_tells_the_switches_apart():
    # Else equality would prove nothing of a switch that neither reads.
    # The sizes are even, since "same" padding of odd ones is symmetric.
    x = random_map(2, 8, 6, 8)
    _, weights = built(x, 8)
    outputs = [expect(x, weights, **STRIDES[name]) for name in HALVING]
    outputs += [expect(x, weights, strides=2, pool=pool) for pool in ("avg2", "max3")]
    outputs += [
        expect(x, weights, strides=2, **switch)
        for switch in (
            {"prenorm_activation": True},
            {"squeeze_place": "before_norm"},
            {"activation": "gelu"},
            {"squeeze_activation": "relu"},
        )
    ]
    for index, one in enumerate(outputs):
        for other in outputs[:index]:
            assert np.abs(one - other).max() > 1e-5


@pytest.mark.parametrize(("filters", "squeezed"), [(8, 2), (10, 2), (3, 1), (96, 24)])
def test_default_squeezed_filters(filters, squeezed):
    assert MBConv(filters).squeezed_filters == squeezed


def test_initial_values():
    layer = MBConv(32, strides=2)
    layer.build((1, 4, 4, 16))
    assert_initial_values(layer)


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.99, 0.9])
@pytest.mark.parametrize("stride", ["none", "expansion", "symmetric", "max2"])
def test_training_uses_and_moves_batch_statistics(stride, momentum):
    x = 3 + 2 * random_map(4, 5, 7, 8)
    arguments = {"prenorm_activation": True, **STRIDES[stride]}
    layer, weights = built(x, 12, batch_norm_momentum=momentum, **arguments)
    norms = reference.BatchNorms(weights, 1e-3, training=True, momentum=momentum)
    expected = reference.mbconv(x.astype("float64"), weights, norms, **switches(arguments))
    # Batch statistics are sums in another order, of values whose mean is not 0.
    assert_matches(call_layer(layer, x, training=True), expected, 10 * precision().tolerance)
    assert len(norms.moved) == 6
    for variable in layer.variables:
        path = path_within(layer, variable)
        if path in norms.moved:
            assert_matches(variable, norms.moved[path], 10 * precision().tolerance)
        else:
            np.testing.assert_array_equal(to_numpy(variable), weights[path])


@pytest.mark.parametrize("training", [False, None])
def test_inference_leaves_the_statistics_alone(training):
    x = random_map(4, 5, 7, 8)
    layer, weights = built(x, 12)
    assert_matches(call_layer(layer, x, training=training), expect(x, weights))
    for variable in layer.variables:
        path = path_within(layer, variable)
        np.testing.assert_array_equal(to_numpy(variable), weights[path])


@pytest.mark.parametrize(("rate", "scale"), [(0.5, 2.0), (0.75, 4.0)])
def test_stochastic_depth_scales_the_branch_alone(rate, scale):
    keras.utils.set_random_seed(1)
    x = random_map(24, 5, 4, 8)
    layer, weights = built(x, 12, strides=2, stochastic_depth=rate)
    norms = reference.BatchNorms(weights, 1e-3, training=True)
    shortcut, branch = reference.mbconv_branches(x.astype("float64"), weights, norms, strides=2)
    output = to_numpy(call_layer(layer, x, training=True))
    # A dropped sample is its shortcut, to the last digits.
    dropped = np.abs(output - shortcut).max(axis=(1, 2, 3)) < 1e-4
    assert 0 < dropped.sum() < 24
    factors = np.where(dropped, 0.0, scale)[:, None, None, None]
    assert_matches(output, shortcut + factors * branch, 10 * precision().tolerance)
    moved = {**weights, **_statistics(layer)}
    assert_matches(call_layer(layer, x), expect(x, moved, strides=2))


def _statistics(layer: MBConv) -> dict:
    return {
        path_within(layer, variable): to_numpy(variable)
        for variable in layer.variables
        if "moving" in variable.path
    }


# --- unknown sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", ["none", *HALVING])
def test_unknown_size(stride):
    inputs = keras.Input((None, None, 8), dtype=precision().dtype)
    layer = MBConv(12, dtype=precision().dtype, **STRIDES[stride])
    model = keras.Model(inputs, layer(inputs))
    call = with_unknown_size(model)
    weights = randomize(layer)
    for size in ((5, 7), (8, 6)):
        x = random_map(2, *size, 8)
        assert_matches(call(x), expect(x, weights, **STRIDES[stride]))


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", ["none", *HALVING])
def test_gradients(stride):
    x = random_map(2, 5, 4, 8)
    layer, weights = built(x, 12, **STRIDES[stride])
    found = assert_gradients_reach(layer, x, training=False)
    assert_slopes(found, lambda w: expect(x, w, **STRIDES[stride]), weights)


@pytest.mark.parametrize("stride", ["none", "symmetric"])
def test_gradients_in_training(stride):
    x = random_map(4, 5, 4, 8)
    arguments = {"squeeze_place": "before_norm", "prenorm_activation": True, **STRIDES[stride]}
    layer, weights = built(x, 12, **arguments)

    def output(weights: dict) -> np.ndarray:
        norms = reference.BatchNorms(weights, 1e-3, training=True)
        return reference.mbconv(x.astype("float64"), weights, norms, **switches(arguments))

    found = assert_gradients_reach(layer, x, training=True)
    assert_slopes(found, output, weights)


@pytest.mark.slow
def test_gradients_at_unknown_size():
    inputs = keras.Input((None, None, 8), dtype=precision().dtype)
    model = keras.Model(inputs, MBConv(12, strides=2, dtype=precision().dtype)(inputs))
    randomize(model)
    # What the first norm adds to all positions alike, the norm of the expansion takes away again.
    invariant = ("input_norm/beta",)
    x = random_map(2, 5, 7, 8)
    assert_gradients_reach(model, x, without=invariant, unknown_size=True, training=True)


# --- the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stride", ["none", "symmetric", "max3"])
def test_mixed_precision(stride, dtype):
    x = random_map(2, 5, 7, 8, dtype="float32")
    layer, weights = built(x, 12, dtype=f"mixed_{dtype}", **STRIDES[stride])
    output = call_layer(layer, x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    assert {keras.backend.standardize_dtype(v.dtype) for v in layer.variables} == {"float32"}
    allowed = 1e-2 if dtype == "float16" else 5e-2
    assert_matches(output, expect(x, weights, **STRIDES[stride]), allowed)


@pytest.mark.parametrize("stride", ["none", *HALVING])
def test_serialization(stride):
    x = random_map(2, 5, 7, 8, dtype="float32")
    layer, _ = built(x, 12, dtype="float32", **STRIDES[stride])
    assert_same_after_serialization(layer, x)


def test_config():
    arguments = {
        "filters": 12,
        "expanded_filters": 20,
        "squeezed_filters": 5,
        "strides": 2,
        "stride_on": "pool",
        "pool": "max3",
        "stride_pool": "max2",
        "padding": "symmetric",
        "activation": "silu",
        "prenorm_activation": True,
        "squeeze_activation": "relu",
        "squeeze_place": "before_norm",
        "use_bias": False,
        "batch_norm_epsilon": 1e-5,
        "batch_norm_momentum": 0.9,
        "stochastic_depth": 0.3,
    }
    assert_config_covers(MBConv(**arguments), arguments)


@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
@pytest.mark.parametrize("stride", ["none", *HALVING])
def test_shapes(stride, size):
    layer, x = MBConv(12, **STRIDES[stride]), random_map(2, *size, 8, dtype="float32")
    assert_shapes(layer, x, 12)
    strides = STRIDES[stride]["strides"]
    halved = [-(-length // strides) for length in size]
    assert tuple(layer.compute_output_shape(x.shape)) == (2, *halved, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": 3}, "strides=3"),
        ({"stride_on": "shortcut"}, "stride_on='shortcut'"),
        ({"pool": "avg3"}, "pool='avg3'"),
        ({"stride_pool": "avg3"}, "stride_pool='avg3'"),
        ({"padding": "valid"}, "padding='valid'"),
        ({"activation": "swish"}, "'swish'"),
        ({"squeeze_activation": "swish"}, "'swish'"),
        ({"squeeze_place": "first"}, "squeeze_place='first'"),
        ({"squeezed_filters": 0}, "squeezed_filters=0"),
        ({"stochastic_depth": 1.0}, "=1.0"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    # Sublayers check some of them, when they are made.
    with pytest.raises(ValueError, match=message):
        MBConv(8, **arguments)(random_map(1, 4, 4, 8, dtype="float32"))
