"""Squeeze-and-excitation."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import SqueezeExcite
from keras_coatnet.layers.fused import FusedSqueezeExcite
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
    precision,
    random_map,
    randomize,
    with_unknown_size,
)


def built(x: np.ndarray, *args: object, **kwargs: object) -> tuple[SqueezeExcite, dict]:
    """A layer of the test's precision with random weights, and these."""
    layer = SqueezeExcite(*args, **{"dtype": precision().dtype, **kwargs})
    layer.build(x.shape)
    return layer, randomize(layer)


@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 1)])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
def test_equals_the_reference(activation, size):
    x = random_map(3, *size, 8)
    layer, weights = built(x, 5, activation)
    expected = reference.squeeze_excite(x.astype("float64"), weights, activation)
    assert_matches(call_layer(layer, x), expected)


def test_activates_by_silu_unless_told():
    x = random_map(2, 4, 4, 8)
    layer, weights = built(x, 2)
    assert_matches(
        call_layer(layer, x), reference.squeeze_excite(x.astype("float64"), weights, "silu")
    )


def test_unknown_size():
    inputs = keras.Input((None, None, 8), dtype=precision().dtype)
    layer = SqueezeExcite(3, dtype=precision().dtype)
    model = keras.Model(inputs, layer(inputs))
    call = with_unknown_size(model)
    weights = randomize(layer)
    for size in ((5, 7), (8, 6)):
        x = random_map(2, *size, 8)
        expected = reference.squeeze_excite(x.astype("float64"), weights)
        assert_matches(call(x), expected)


def test_gradients():
    x = random_map(2, 5, 7, 8)
    layer, weights = built(x, 3)
    found = assert_gradients_reach(layer, x)
    assert_slopes(found, lambda w: reference.squeeze_excite(x.astype("float64"), w), weights)


def test_initial_values():
    layer = SqueezeExcite(24)
    layer.build((1, 2, 2, 96))
    assert_initial_values(layer)


def test_serialization_and_config():
    x = random_map(2, 5, 7, 8, dtype="float32")
    layer, _ = built(x, 3, "relu", dtype="float32")
    assert_same_after_serialization(layer, x)
    assert_config_covers(layer, {"squeezed_filters": 3, "activation": "relu"})


def test_shapes():
    assert_shapes(SqueezeExcite(3), random_map(2, 5, 7, 8, dtype="float32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(dtype):
    # The sum over 4096 positions of about 40 is beyond float16; their mean is not.
    x = 40 + random_map(1, 64, 64, 8, dtype="float32")
    layer, weights = built(x, 3, dtype=f"mixed_{dtype}")
    for path, variable in zip(weights, layer.variables, strict=True):
        if path.endswith("kernel"):
            variable.assign(variable / 40)
            weights[path] = weights[path] / 40
    output = call_layer(layer, x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    assert {keras.backend.standardize_dtype(v.dtype) for v in layer.variables} == {"float32"}
    assert_matches(output, reference.squeeze_excite(x.astype("float64"), weights), 2e-2)


@pytest.mark.parametrize("squeezed_filters", [0, -4])
def test_refuses_a_squeezed_width_below_one(squeezed_filters):
    with pytest.raises(ValueError, match=f"squeezed_filters={squeezed_filters}"):
        SqueezeExcite(squeezed_filters)


def test_refuses_other_activations():
    with pytest.raises(ValueError, match="'swish'"):
        SqueezeExcite(4, "swish")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", [SqueezeExcite, FusedSqueezeExcite])
def test_its_mean_is_added_up_in_float32(kind, dtype):
    """The sum of 12,544 values near 100 is beyond float16, and too coarse in both."""
    x = np.random.default_rng(0).uniform(90, 110, (2, 112, 112, 8))
    half = keras.ops.cast(x, dtype)
    mean = kind(2, dtype=dtype).mean(half)
    assert keras.backend.standardize_dtype(mean.dtype) == dtype
    expected = keras.ops.convert_to_numpy(keras.ops.cast(half, "float32")).mean((1, 2), "float64")
    found = keras.ops.convert_to_numpy(keras.ops.cast(mean, "float32"))
    # Half the distance of two neighbors about 100, and a rounding of float32.
    np.testing.assert_allclose(found, expected, atol={"float16": 0.032, "bfloat16": 0.26}[dtype])
