"""Transformer blocks."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import TransformerBlock
from tests import reference
from tests.helpers import (
    assert_config_covers,
    assert_gradients_reach,
    assert_initial_values,
    assert_matches,
    assert_same_after_serialization,
    assert_shapes,
    assert_slopes,
    bias_tolerance,
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

STRIDES = {
    "none": {"strides": 1},
    "max2": {"strides": 2, "pool": "max2"},
    "avg2": {"strides": 2, "pool": "avg2"},
    "max3": {"strides": 2, "pool": "max3"},
}
POSITIONS = {
    "built": {},
    "resized": {"table_size": (3, 2)},
    "mlp": {"relative_position": "mlp", "relative_position_hidden_dim": 16},
}
CASES = pairwise(
    {
        "stride": list(STRIDES),
        "size": [(5, 7), (8, 6), (4, 4)],
        "position": list(POSITIONS),
        "filters": [8, 12],
        "attention_dim": [None, 8, 4],
        "attention_bias": [True, False],
        "norm": ["layer", "batch"],
        "norm_epsilon": [1e-5, 0.1],
        "shortcut_bias": [True, False],
        "ffn_expansion": [4, 2],
        "ffn_activation": ["gelu_tanh", "gelu", "silu", "relu"],
        "ffn_bias": [True, False],
        "layer_scale": [None, 0.5],
    }
)
# Softmax over keys does not see what all keys add alike.
INVARIANT = {
    "built": ("key/bias",),
    "resized": ("key/bias",),
    "mlp": ("key/bias", "values/bias"),
}


def built(x: np.ndarray, filters: int, **kwargs: object) -> tuple[TransformerBlock, dict]:
    """A block of the test's precision, heads of 4 and random weights, and these."""
    layer = TransformerBlock(filters, **{"head_dim": 4, "dtype": precision().dtype, **kwargs})
    layer.build(x.shape)
    return layer, randomize(layer)


def expect(
    x: np.ndarray, weights: dict, norms: reference.BatchNorms | None = None, **arguments: object
) -> np.ndarray:
    """The reference, of the arguments that it takes; it reads the rest off the weights."""
    taken = ("strides", "pool", "norm_epsilon", "ffn_activation")
    switches = {name: arguments[name] for name in taken if name in arguments}
    if norms is None and arguments.get("norm") == "batch":
        norms = reference.BatchNorms(weights, switches.get("norm_epsilon", 1e-5))
    return reference.transformer_block(
        x.astype("float64"), weights, head_dim=4, norms=norms, **switches
    )


# --- equality --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_the_reference(case):
    x = random_map(2, *case["size"], 8)
    arguments = {**case, **STRIDES[case["stride"]], **POSITIONS[case["position"]]}
    del arguments["stride"], arguments["size"], arguments["position"]
    layer, weights = built(x, **arguments)
    changes = case["filters"] != 8
    for path, there in {
        "attention/query/bias": case["attention_bias"],
        "attention/projection/bias": case["attention_bias"],
        "shortcut/kernel": changes,
        "shortcut/bias": changes and case["shortcut_bias"],
        "ffn_expand/bias": case["ffn_bias"],
        "ffn_project/bias": case["ffn_bias"],
        "attention_scale/scale": case["layer_scale"] is not None,
        "ffn_scale/scale": case["layer_scale"] is not None,
        "attention_norm/moving_mean": case["norm"] == "batch",
        "ffn_norm/moving_mean": case["norm"] == "batch",
    }.items():
        assert (path in weights) == there, path
    attention_dim = case["attention_dim"] or case["filters"]
    assert weights["attention/value/kernel"].shape == (8, attention_dim)
    assert weights["attention/projection/kernel"].shape == (attention_dim, case["filters"])
    hidden = case["ffn_expansion"] * case["filters"]
    assert weights["ffn_expand/kernel"].shape == (case["filters"], hidden)
    allowed = bias_tolerance(computed=case["position"] != "built")
    assert_matches(call_layer(layer, x, training=False), expect(x, weights, **arguments), allowed)


@pytest.mark.parametrize(("strides", "filters"), [(1, 8), (2, 8), (2, 12), (1, 12)])
def test_defaults_are_the_papers(strides, filters):
    x = random_map(2, 5, 7, 8)
    layer, weights = built(x, filters, strides=strides)
    assert weights["ffn_expand/kernel"].shape == (filters, 4 * filters)
    assert ("shortcut/bias" in weights) == (filters != 8)
    expected = expect(
        x, weights, strides=strides, pool="max2", norm_epsilon=1e-5, ffn_activation="gelu_tanh"
    )
    assert_matches(call_layer(layer, x), expected)


def test_default_head_size():
    layer = TransformerBlock(64)
    layer.build((1, 2, 2, 64))
    assert layer.attention.num_heads == 2


def test_the_reference_tells_the_switches_apart():
    # Else equality would prove nothing of a switch that neither reads.
    x = random_map(2, 5, 7, 8)
    _, weights = built(x, 8, strides=2)
    outputs = [expect(x, weights, **STRIDES[name]) for name in ("max2", "avg2", "max3")]
    outputs += [
        expect(x, weights, strides=2, ffn_activation="gelu"),
        expect(x, weights, strides=2, norm_epsilon=1e-3),
    ]
    for index, one in enumerate(outputs):
        for other in outputs[:index]:
            assert np.abs(one - other).max() > 1e-5


def test_the_pool_stands_after_the_norm():
    # LayerNorm and maximum do not commute: the reference pools what is normalized.
    x = random_map(2, 5, 7, 8)
    _, weights = built(x, 8, strides=2)
    shortcut, branch = reference.transformer_attention_branches(x, weights, head_dim=4, strides=2)
    pooled = reference.max_pool(x)
    same, other = reference.transformer_attention_branches(pooled, weights, head_dim=4)
    np.testing.assert_array_equal(shortcut, same)
    assert np.abs(branch - other).max() > 1e-2


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_initial_values(norm):
    layer = TransformerBlock(32, strides=2, norm=norm)
    layer.build((1, 4, 4, 16))
    assert_initial_values(layer)


def test_layer_scale_starts_from_its_argument():
    layer = TransformerBlock(8, head_dim=4, layer_scale=1e-6)
    layer.build((1, 4, 4, 8))
    for scale in (layer.attention_scale.scale, layer.ffn_scale.scale):
        np.testing.assert_array_equal(to_numpy(scale), np.full(8, np.float32(1e-6)))


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.99, 0.9])
def test_training_uses_and_moves_batch_statistics(momentum):
    x = 3 + 2 * random_map(4, 5, 7, 8)
    arguments = {"norm": "batch", "norm_epsilon": 1e-3, "strides": 2}
    layer, weights = built(x, 12, batch_norm_momentum=momentum, **arguments)
    norms = reference.BatchNorms(weights, 1e-3, training=True, momentum=momentum)
    expected = expect(x, weights, norms, **arguments)
    # Batch statistics are sums in another order, of values whose mean is not 0.
    assert_matches(call_layer(layer, x, training=True), expected, 10 * precision().tolerance)
    assert len(norms.moved) == 4
    for variable in layer.variables:
        path = path_within(layer, variable)
        if path in norms.moved:
            assert_matches(variable, norms.moved[path], 10 * precision().tolerance)
        else:
            np.testing.assert_array_equal(to_numpy(variable), weights[path])


@pytest.mark.parametrize(("rate", "scale"), [(0.5, 2.0), (0.75, 4.0)])
def test_stochastic_depth_draws_for_each_branch(rate, scale):
    keras.utils.set_random_seed(2)
    samples = 96
    x = random_map(samples, 3, 4, 8)
    layer, weights = built(x, 12, strides=2, stochastic_depth=rate, layer_scale=0.5)
    assert_matches(call_layer(layer, x), expect(x, weights, strides=2))
    shortcut, branch = reference.transformer_attention_branches(
        x.astype("float64"), weights, head_dim=4, strides=2
    )
    candidates = []
    for first in (0.0, scale):
        middle = shortcut + first * branch
        ffn = reference.transformer_ffn_branch(middle, weights)
        candidates += [middle, middle + scale * ffn]
    output = to_numpy(call_layer(layer, x, training=True))
    distances = np.abs(np.stack(candidates) - output).max(axis=(2, 3, 4))
    # Dropped are none, either or both; with 96 samples every outcome comes up.
    outcomes = distances.argmin(axis=0)
    assert set(outcomes) == {0, 1, 2, 3}
    expected = np.stack(candidates)[outcomes, np.arange(samples)]
    assert_matches(output, expected, 10 * precision().tolerance)


# --- unknown sizes ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "position"),
    [
        ("none", "resized"),
        ("none", "mlp"),
        ("max2", "resized"),
        ("avg2", "mlp"),
        ("max3", "resized"),
    ],
)
def test_unknown_size(stride, position):
    arguments = {**STRIDES[stride], **POSITIONS[position]}
    allowed = bias_tolerance(computed=True)
    inputs = keras.Input((None, None, 8), dtype=precision().dtype)
    layer = TransformerBlock(12, head_dim=4, dtype=precision().dtype, **arguments)
    model = keras.Model(inputs, layer(inputs))
    call = with_unknown_size(model)
    weights = randomize(layer)
    for size in ((5, 7), (6, 4)):
        x = random_map(2, *size, 8)
        output = call(x)
        assert_matches(output, expect(x, weights, **arguments), allowed)

        # A block built on that very map holds a table of its size after the stride.
        static, _ = built(x, 12, **{**arguments, "table_size": None})
        halved = [-(-side // arguments["strides"]) for side in size]
        copied = dict(weights)
        if position == "resized":
            table = reference.fit_table(weights["attention/position/table"], *halved)
            copied["attention/position/table"] = table
        for variable in static.variables:
            variable.assign(copied[path_within(static, variable)])
        assert_matches(output, to_numpy(call_layer(static, x)), allowed)


def test_unknown_size_needs_a_table_size():
    with pytest.raises(ValueError, match="table_size"):
        TransformerBlock(8, head_dim=4)(keras.Input((None, None, 8)))


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "position"),
    [
        *(("none", position) for position in POSITIONS),
        *(("max2", "built"), ("max2", "resized"), ("avg2", "mlp"), ("max3", "built")),
    ],
)
def test_gradients(stride, position):
    x = random_map(2, 5, 4, 8)
    arguments = {**STRIDES[stride], **POSITIONS[position], "layer_scale": 0.5}
    layer, weights = built(x, 12, **arguments)
    found = assert_gradients_reach(layer, x, without=INVARIANT[position])
    assert_slopes(found, lambda w: expect(x, w, **arguments), weights)


def test_gradients_in_training_with_batch_norm():
    x = random_map(4, 5, 4, 8)
    arguments = {"norm": "batch", "strides": 2}
    layer, weights = built(x, 12, **arguments)

    def output(weights: dict) -> np.ndarray:
        return expect(x, weights, reference.BatchNorms(weights, 1e-5, training=True), **arguments)

    found = assert_gradients_reach(layer, x, without=INVARIANT["built"], training=True)
    assert_slopes(found, output, weights)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["resized", "mlp"])
def test_gradients_at_unknown_size(position):
    inputs = keras.Input((None, None, 8), dtype=precision().dtype)
    arguments = {"strides": 2, **POSITIONS[position]}
    layer = TransformerBlock(12, head_dim=4, dtype=precision().dtype, **arguments)
    model = keras.Model(inputs, layer(inputs))
    weights = randomize(layer)
    x = random_map(2, 5, 7, 8)
    found = assert_gradients_reach(model, x, without=INVARIANT[position], unknown_size=True)
    found = {path.removeprefix(f"{layer.name}/"): gradient for path, gradient in found.items()}
    assert_slopes(found, lambda w: expect(x, w, **arguments), weights)


# --- the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("position", POSITIONS)
def test_mixed_precision(position, norm, dtype):
    x = random_map(2, 5, 7, 8, dtype="float32")
    arguments = {"strides": 2, "norm": norm, "layer_scale": 0.5, **POSITIONS[position]}
    layer, weights = built(x, 12, dtype=f"mixed_{dtype}", **arguments)
    output = call_layer(layer, x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    assert {keras.backend.standardize_dtype(v.dtype) for v in layer.variables} == {"float32"}
    assert_matches(output, expect(x, weights, **arguments), 1e-2 if dtype == "float16" else 5e-2)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("position", POSITIONS)
def test_serialization(position, norm):
    x = random_map(2, 5, 7, 8, dtype="float32")
    arguments = {"strides": 2, "norm": norm, "layer_scale": 0.5, **POSITIONS[position]}
    layer, _ = built(x, 12, dtype="float32", **arguments)
    assert_same_after_serialization(layer, x)


def test_config():
    arguments = {
        "filters": 12,
        "strides": 2,
        "head_dim": 4,
        "attention_dim": 8,
        "attention_bias": False,
        "relative_position": "mlp",
        "relative_position_hidden_dim": 16,
        "table_size": (3, 5),
        "pool": "max3",
        "norm": "batch",
        "norm_epsilon": 1e-6,
        "batch_norm_momentum": 0.9,
        "shortcut_bias": False,
        "ffn_expansion": 2,
        "ffn_activation": "gelu",
        "ffn_bias": False,
        "layer_scale": 1e-6,
        "stochastic_depth": 0.3,
    }
    assert_config_covers(TransformerBlock(**arguments), arguments)


@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
@pytest.mark.parametrize("stride", STRIDES)
def test_shapes(stride, size):
    layer = TransformerBlock(12, head_dim=4, **STRIDES[stride])
    x = random_map(2, *size, 8, dtype="float32")
    assert_shapes(layer, x, 12)
    strides = STRIDES[stride]["strides"]
    halved = [-(-length // strides) for length in size]
    assert tuple(layer.compute_output_shape(x.shape)) == (2, *halved, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": 3}, "strides=3"),
        ({"filters": 12, "head_dim": 8}, "attention_dim=12, head_dim=8"),
        ({"attention_dim": 6}, "attention_dim=6, head_dim=4"),
        ({"relative_position": "sine"}, "relative_position='sine'"),
        ({"pool": "avg3"}, "pool='avg3'"),
        ({"norm": "group"}, "norm='group'"),
        ({"ffn_activation": "swish"}, "'swish'"),
        ({"stochastic_depth": 1.0}, "=1.0"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    # Sublayers check some of them, when they are made.
    with pytest.raises(ValueError, match=message):
        TransformerBlock(**{"filters": 8, "head_dim": 4, **arguments})(
            random_map(1, 4, 4, 8, dtype="float32")
        )
