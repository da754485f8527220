"""The relative biases of attention, from a table and from a network."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import (
    RelativePositionMLP,
    RelativePositionTable,
    RelativeSelfAttention,
)
from keras_coatnet.layers.relative_position import (
    interpolation_matrix,
    resize_table,
    spread_to_pairs,
)
from tests import reference
from tests.helpers import (
    assert_config_covers,
    assert_gradients_reach,
    assert_initial_values,
    assert_matches,
    assert_same_after_serialization,
    assert_slopes,
    bias_tolerance,
    call_layer,
    precision,
    random_map,
    randomize,
    to_numpy,
)

# Of the table's own size, larger, smaller, larger along one axis and smaller along the other, and
# the smallest.
SIZES = ((4, 5), (7, 9), (2, 3), (8, 3), (4, 6), (1, 1))


def table_layer(size: tuple[int, int] = (4, 5), heads: int = 3) -> tuple:
    """A table of the test's precision, and its random values."""
    layer = RelativePositionTable(heads, size, dtype=precision().dtype)
    layer(height=1, width=1)
    return layer, randomize(layer)["table"]


def mlp_layer(heads: int = 3, hidden_dim: int = 16) -> tuple:
    """A network of the test's precision, and its random weights."""
    layer = RelativePositionMLP(heads, hidden_dim, dtype=precision().dtype)
    layer(height=1, width=1)
    return layer, randomize(layer)


def as_tensor(size: int) -> object:
    return keras.ops.convert_to_tensor(size, "int32")


# --- resizing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 5), (5, 1), (7, 13), (13, 7), (9, 9)])
def test_interpolation_matrix(source, target):
    expected = reference.resize_bilinear(np.eye(source), target, source)
    for size in (target, as_tensor(target)):
        matrix = to_numpy(interpolation_matrix(source, size))
        # Its own docstring promises float32.
        assert_matches(matrix, expected, 1e-6)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_resize_table(size):
    table = random_map(3, 7, 9)
    expected = reference.fit_table(table.astype("float64"), *size)
    allowed = bias_tolerance(computed=size != (4, 5))
    for height, width in (size, map(as_tensor, size)):
        resized = resize_table(keras.ops.convert_to_tensor(table), height, width)
        assert keras.backend.standardize_dtype(resized.dtype) == precision().dtype
        assert_matches(resized, expected, allowed)


def test_resize_table_leaves_a_fitting_one_alone():
    table = keras.ops.convert_to_tensor(random_map(3, 7, 9))
    assert resize_table(table, 4, 5) is table


@pytest.mark.parametrize("size", SIZES)
def test_spread_to_pairs(size):
    values = random_map(3, 2 * size[0] - 1, 2 * size[1] - 1)
    expected = reference.spread_to_pairs(values.astype("float64"), *size)
    for height, width in (size, map(as_tensor, size)):
        pairs = spread_to_pairs(keras.ops.convert_to_tensor(values), height, width)
        np.testing.assert_array_equal(to_numpy(pairs), expected)


# --- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize("size", SIZES)
def test_table_equals_the_reference(size, tensors):
    layer, table = table_layer()
    height, width = map(as_tensor, size) if tensors else size
    offsets = reference.fit_table(table, *size)
    biases = layer(height=height, width=width)
    assert tuple(biases.shape) == (3, size[0] * size[1], size[0] * size[1])
    # Sizes that are tensors may fit, but the resize cannot be left out.
    allowed = bias_tolerance(computed=size != (4, 5))
    assert_matches(biases, reference.spread_to_pairs(offsets, *size), allowed)


def test_table_is_read_by_key_minus_query():
    # On 1 x 2 positions the table is (-1, 0, 1): what the second key gives the first query is +1.
    layer = RelativePositionTable(1, (1, 2))
    layer(height=1, width=2)
    layer.table.assign([[[-1.0, 0.0, 1.0]]])
    np.testing.assert_array_equal(to_numpy(layer(height=1, width=2)), [[[0, 1], [-1, 0]]])


@pytest.mark.parametrize("size", [(4, 5), (7, 3)])
def test_table_gradients(size):
    layer, table = table_layer()
    found = assert_gradients_reach(layer, height=size[0], width=size[1])

    def biases(weights: dict) -> np.ndarray:
        return reference.spread_to_pairs(reference.fit_table(weights["table"], *size), *size)

    assert_slopes(found, biases, {"table": table})


def test_table_initial_values():
    layer = RelativePositionTable(8, (14, 14))
    layer(height=14, width=14)
    assert_initial_values(layer)
    assert tuple(layer.table.shape) == (8, 27, 27)


def test_table_serialization_and_config():
    layer, _ = table_layer()
    assert_same_after_serialization(layer, height=3, width=6)
    assert_config_covers(layer, {"num_heads": 3, "table_size": (4, 5)})


# --- the network -----------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize("size", SIZES)
def test_mlp_equals_the_reference(size, tensors):
    layer, weights = mlp_layer()
    height, width = map(as_tensor, size) if tensors else size
    offsets = reference.mlp_offsets(weights, *size)
    biases = layer(height=height, width=width)
    assert tuple(biases.shape) == (3, size[0] * size[1], size[0] * size[1])
    allowed = bias_tolerance(computed=True)
    assert_matches(biases, reference.spread_to_pairs(offsets, *size), allowed)


def test_mlp_gradients():
    layer, weights = mlp_layer()
    found = assert_gradients_reach(layer, height=3, width=4)

    def biases(weights: dict) -> np.ndarray:
        return reference.spread_to_pairs(reference.mlp_offsets(weights, 3, 4), 3, 4)

    assert_slopes(found, biases, weights)


def test_mlp_initial_values():
    layer = RelativePositionMLP(8)
    layer(height=2, width=2)
    assert_initial_values(layer)
    assert tuple(layer.hidden.kernel.shape) == (2, 512)


def test_mlp_serialization_and_config():
    layer, _ = mlp_layer()
    assert_same_after_serialization(layer, height=3, width=6)
    assert_config_covers(layer, {"num_heads": 3, "hidden_dim": 16})


# --- loading a table of another size ---------------------------------------------------------


def attention_model(size: tuple[int, int], heads: int = 2) -> keras.Model:
    inputs = keras.Input((*size, 8))
    return keras.Model(inputs, RelativeSelfAttention(4 * heads, 4, name="attention")(inputs))


@pytest.mark.parametrize("size", [(4, 5), (7, 9), (2, 3), (8, 3), (1, 1)])
def test_weights_load_at_another_size(tmp_path, size):
    saved, loaded = attention_model((4, 5)), attention_model(size)
    weights = reference.within(randomize(saved), "attention")
    saved.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")

    table = loaded.get_layer("attention").position.table
    expected = reference.fit_table(weights["position/table"], *size)
    if size == (4, 5):
        np.testing.assert_array_equal(to_numpy(table), expected)
    assert_matches(table, expected, 3e-6)
    x = random_map(2, *size, 8, dtype="float32")
    weights["position/table"] = expected
    assert_matches(
        call_layer(loaded, x), reference.attention(x.astype("float64"), weights, 4), 1e-5
    )


def test_weights_of_other_heads_do_not_load(tmp_path):
    # The other variables' shapes differ as well, so this is the layer on its own.
    class Biases(keras.layers.Layer):
        def __init__(self, heads):
            super().__init__()
            self.position = RelativePositionTable(heads, (4, 5))

        def call(self, x):
            return self.position(height=4, width=5) + keras.ops.sum(x)

    models = []
    for heads in (2, 3):
        inputs = keras.Input((1,))
        models.append(keras.Model(inputs, Biases(heads)(inputs)))
    models[0].save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError):
        models[1].load_weights(tmp_path / "model.weights.h5")


def test_whole_model_saves_and_loads(tmp_path):
    model = attention_model((4, 5))
    randomize(model)
    model.save(tmp_path / "model.keras")
    x = random_map(2, 4, 5, 8, dtype="float32")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


# --- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float16", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("make", [table_layer, mlp_layer])
def test_every_size_works_in_every_dtype(make, dtype):
    layer, _ = make()
    other = type(layer).from_config({**layer.get_config(), "dtype": dtype})
    own = other(height=4, width=5)
    # Not the policy's word for it: float64 is float32 on JAX.
    found = [call_layer(other, height=height, width=width) for height, width in SIZES]
    dtypes = {keras.backend.standardize_dtype(biases.dtype) for biases in found}
    assert dtypes == {keras.backend.standardize_dtype(own.dtype)}
    for variable, value in zip(other.variables, layer.get_weights(), strict=True):
        variable.assign(value.astype(keras.backend.standardize_dtype(variable.dtype)))
    # Half precision rounds the values once or twice; their sizes and places are right.
    allowed = {"float64": 1e-5, "mixed_bfloat16": 2e-2}.get(dtype, 4e-3)
    for height, width in SIZES:
        expected = to_numpy(call_layer(layer, height=height, width=width))
        assert_matches(call_layer(other, height=height, width=width), expected, allowed)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("make", [table_layer, mlp_layer])
def test_mixed_precision_keeps_variables_in_float32(make, dtype):
    layer, _ = make()
    mixed = type(layer).from_config({**layer.get_config(), "dtype": dtype})
    for size in ((4, 5), (3, 4)):
        biases = call_layer(mixed, height=size[0], width=size[1])
        assert keras.backend.standardize_dtype(biases.dtype) == dtype.removeprefix("mixed_")
    assert {keras.backend.standardize_dtype(v.dtype) for v in mixed.variables} == {"float32"}
