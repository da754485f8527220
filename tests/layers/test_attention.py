"""Relative self-attention."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import RelativeSelfAttention
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
    copy_weights,
    pairwise,
    path_within,
    precision,
    random_map,
    randomize,
    relative_error,
    to_numpy,
    with_unknown_size,
)

CASES = pairwise(
    {
        "size": [(5, 7), (8, 6), (4, 4), (1, 3)],
        "filters": [8, 12],
        "attention_dim": [None, 4, 12],
        "use_bias": [True, False],
        "position": ["built", "fitting", "smaller", "larger", "mlp"],
    }
)
# Softmax over keys does not see what all keys add alike.
INVARIANT = ("key/bias",)
MLP_INVARIANT = ("key/bias", "values/bias")


def position_options(position: str, size: tuple[int, int]) -> dict:
    """Constructor arguments for where the bias comes from."""
    if position == "mlp":
        return {"relative_position": "mlp", "relative_position_hidden_dim": 16}
    tables = {
        "fitting": size,
        "smaller": (max(size[0] - 1, 1), max(size[1] - 2, 1)),
        "larger": (size[0] + 1, size[1] + 4),
    }
    return {"table_size": tables[position]} if position in tables else {}


def built(x: np.ndarray, filters: int, **kwargs: object) -> tuple[RelativeSelfAttention, dict]:
    """A layer of the test's precision, heads of 4 and random weights, and these."""
    layer = RelativeSelfAttention(filters, **{"head_dim": 4, "dtype": precision().dtype, **kwargs})
    layer.build(x.shape)
    return layer, randomize(layer)


def expect(x: np.ndarray, weights: dict) -> np.ndarray:
    return reference.attention(x.astype("float64"), weights, 4)


# --- equality --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_the_reference(case):
    x = random_map(2, *case["size"], 8)
    layer, weights = built(
        x,
        case["filters"],
        attention_dim=case["attention_dim"],
        use_bias=case["use_bias"],
        **position_options(case["position"], case["size"]),
    )
    assert any("bias" in path for path in weights) == (
        case["use_bias"] or case["position"] == "mlp"
    )
    computed = case["position"] not in ("built", "fitting")
    assert_matches(call_layer(layer, x), expect(x, weights), bias_tolerance(computed=computed))


def test_defaults():
    x = random_map(1, 2, 3, 48)
    layer = RelativeSelfAttention(64, dtype=precision().dtype)
    layer(x)
    weights = randomize(layer)
    assert weights["query/kernel"].shape == (48, 64)
    assert weights["position/table"].shape == (2, 3, 5)
    assert "query/bias" in weights and "projection/bias" in weights
    assert_matches(call_layer(layer, x), reference.attention(x.astype("float64"), weights, 32))


def test_initial_values():
    layer = RelativeSelfAttention(64)
    layer.build((1, 4, 4, 64))
    assert_initial_values(layer)


# --- unknown sizes ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("known", [(None, None), (None, 5), (4, None)], ids=str)
@pytest.mark.parametrize("position", ["table", "mlp"])
def test_unknown_size(position, known):
    kind = {"table": {"table_size": (4, 5)}, "mlp": position_options("mlp", (4, 5))}[position]
    inputs = keras.Input((*known, 8), dtype=precision().dtype)
    layer = RelativeSelfAttention(12, 4, dtype=precision().dtype, **kind)
    model = keras.Model(inputs, layer(inputs))
    call = with_unknown_size(model)
    weights = randomize(layer)
    for size in ((4, 5), (6, 3), (3, 8)):
        size = tuple(
            side if fixed is None else fixed for side, fixed in zip(size, known, strict=True)
        )
        x = random_map(2, *size, 8)
        output = call(x)
        computed = position == "mlp" or size != (4, 5)
        assert_matches(output, expect(x, weights), bias_tolerance(computed=computed))

        static, _ = built(x, 12, **({} if position == "table" else kind))
        copied = dict(weights)
        if position == "table":
            copied["position/table"] = reference.fit_table(weights["position/table"], *size)
        for variable in static.variables:
            variable.assign(copied[path_within(static, variable)])
        assert_matches(output, to_numpy(call_layer(static, x)), bias_tolerance(computed=computed))


def test_unknown_size_needs_a_table_size():
    with pytest.raises(ValueError, match=r"table_size.*input_shape=\(None, None, None, 8\)"):
        RelativeSelfAttention(8, 4)(keras.Input((None, None, 8)))


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["built", "larger", "smaller", "mlp"])
def test_gradients(position):
    x = random_map(2, 3, 4, 8)
    layer, weights = built(x, 12, **position_options(position, (3, 4)))
    invariant = MLP_INVARIANT if position == "mlp" else INVARIANT
    found = assert_gradients_reach(layer, x, without=invariant)
    assert_slopes(found, lambda w: expect(x, w), weights)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["table", "mlp"])
@pytest.mark.parametrize("size", [(3, 4), (4, 2)])
def test_gradients_at_unknown_size(position, size):
    kind = {"table": {"table_size": (3, 4)}, "mlp": position_options("mlp", (3, 4))}[position]
    inputs = keras.Input((None, None, 8), dtype=precision().dtype)
    layer = RelativeSelfAttention(12, 4, dtype=precision().dtype, **kind)
    model = keras.Model(inputs, layer(inputs))
    weights = randomize(layer)
    x = random_map(2, *size, 8)
    invariant = MLP_INVARIANT if position == "mlp" else INVARIANT
    found = assert_gradients_reach(model, x, without=invariant, unknown_size=True)
    found = {path.removeprefix(f"{layer.name}/"): gradient for path, gradient in found.items()}
    assert_slopes(found, lambda w: expect(x, w), weights)


# --- mixed precision -------------------------------------------------------------------------


def in_both(dtype: str, x: np.ndarray, weights: dict, **kwargs: object) -> tuple:
    """Outputs of a float32 layer and of one in mixed precision, of the same weights."""
    outputs = []
    for policy in ("float32", f"mixed_{dtype}"):
        layer, _ = built(x, 8, dtype=policy, **kwargs)
        for variable in layer.variables:
            variable.assign(weights.get(path_within(layer, variable), np.zeros(variable.shape)))
        assert {keras.backend.standardize_dtype(v.dtype) for v in layer.variables} == {"float32"}
        outputs.append(call_layer(layer, x))
    assert keras.backend.standardize_dtype(outputs[0].dtype) == "float32"
    assert keras.backend.standardize_dtype(outputs[1].dtype) == dtype
    return outputs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_beyond_half_precision(dtype):
    # Small integers times a power of two: exact in either dtype, so only what is done with the
    # logits can make a difference.
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, 3, 4, 8)).astype("float32")
    kernels = {f"{name}/kernel": 32.0 * rng.integers(-2, 3, (8, 8)) for name in ("query", "key")}
    weights = {
        **kernels,
        "value/kernel": rng.normal(size=(8, 8)),
        "projection/kernel": rng.normal(size=(8, 8)),
        "position/table": rng.integers(-3, 4, (2, 5, 7)).astype("float64"),
    }
    query, key = (x.reshape(2, 12, 8) @ kernels[f"{name}/kernel"] for name in ("query", "key"))
    logits = np.einsum("bqd,bkd->bqk", query[..., :4], key[..., :4]) / 2
    assert logits.max() > 2 * 65504
    single, half = in_both(dtype, x, weights)
    assert_matches(single, expect(x, weights), 1e-5)
    assert_matches(half, to_numpy(single), 2e-3 if dtype == "float16" else 1.6e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_differences_between_large_logits(dtype):
    # Every logit is 2048 and a bit: float16 there counts in twos, bfloat16 in sixteens.
    rng = np.random.default_rng(1)
    x = np.concatenate([np.ones((2, 3, 4, 1)), rng.integers(-1, 2, (2, 3, 4, 7))], axis=-1)
    x = x.astype("float32")
    common = np.zeros((8, 8))
    common[0, [0, 4]] = 64.0
    weights = {"value/kernel": rng.normal(size=(8, 8)), "projection/kernel": np.eye(8)}
    for name in ("query", "key"):
        differing = rng.integers(-1, 2, (8, 8)) / 2.0
        differing[0] = differing[:, [0, 4]] = 0.0
        weights[f"{name}/kernel"] = common + differing
    weights["position/table"] = np.zeros((2, 5, 7))
    single, half = in_both(dtype, x, weights)
    assert_matches(single, expect(x, weights), 1e-4)
    assert_matches(half, to_numpy(single), 2e-3 if dtype == "float16" else 1.6e-2)
    # What rounded logits would give is far off: the common part alone, an even mean.
    even = expect(x, {**weights, "key/kernel": common})
    assert relative_error(even, to_numpy(single)) > 0.1


@pytest.mark.parametrize("position", ["built", "larger", "mlp"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_biases_are_not_rounded(dtype, position):
    # 1000 and a bit, where float16 counts in halves and bfloat16 in fours.
    x = random_map(2, 3, 4, 8, dtype="float32")
    options = position_options(position, (3, 4))
    _, weights = built(x, 8, dtype="float32", **options)
    for name in ("query", "key"):
        weights[f"{name}/kernel"] = np.zeros((8, 8))
    raised = "position/values/bias" if position == "mlp" else "position/table"
    weights[raised] = weights[raised] + 1000
    single, half = in_both(dtype, x, weights, **options)
    assert_matches(half, to_numpy(single), 5e-3 if dtype == "float16" else 3e-2)


@pytest.mark.parametrize("position", ["built", "larger", "smaller", "mlp"])
def test_float64_on_every_backend(position):
    # Even where it is not more precise, as the comparisons above are in float32 there.
    x = random_map(2, 3, 4, 8, dtype="float64")
    layer, weights = built(x, 8, dtype="float64", **position_options(position, (3, 4)))
    assert_matches(call_layer(layer, x), expect(x, weights), 1e-5)


# --- the rest --------------------------------------------------------------------------------


def test_serialization():
    x = random_map(2, 5, 7, 8, dtype="float32")
    for kind in ({}, {"table_size": (3, 3)}, position_options("mlp", (5, 7))):
        layer, _ = built(x, 12, dtype="float32", **kind)
        assert_same_after_serialization(layer, x)


def test_config():
    arguments = {
        "filters": 12,
        "head_dim": 4,
        "attention_dim": 8,
        "use_bias": False,
        "relative_position": "mlp",
        "relative_position_hidden_dim": 16,
        "table_size": (3, 5),
    }
    assert_config_covers(RelativeSelfAttention(**arguments), arguments)


def test_a_layer_from_the_config_has_the_built_table():
    # The size of the map it was built on: its weights must fit wherever it is built next.
    x = random_map(1, 5, 7, 8, dtype="float32")
    layer, _ = built(x, 8, dtype="float32")
    restored = RelativeSelfAttention.from_config(layer.get_config())
    other = random_map(1, 3, 4, 8, dtype="float32")
    restored(other)
    copy_weights(layer, restored)
    np.testing.assert_array_equal(to_numpy(restored(other)), to_numpy(layer(other)))


@pytest.mark.parametrize("attention_dim", [None, 4])
def test_shapes(attention_dim):
    layer = RelativeSelfAttention(12, 4, attention_dim=attention_dim)
    assert_shapes(layer, random_map(2, 5, 7, 8, dtype="float32"), 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": 10, "head_dim": 4}, "attention_dim=10, head_dim=4"),
        ({"filters": 8, "head_dim": 4, "attention_dim": 6}, "attention_dim=6, head_dim=4"),
        ({"filters": 8, "head_dim": 4, "relative_position": "sine"}, "relative_position='sine'"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RelativeSelfAttention(**arguments)
