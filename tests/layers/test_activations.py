"""Activations by name."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import LayerScale
from keras_coatnet.layers.activations import (
    ACTIVATIONS,
    compile_activation,
    gelu,
    gelu_tanh,
    get_activation,
)
from tests import reference
from tests.helpers import assert_matches, cotangent_of, gradients, precision, to_numpy

NAMES = ("gelu", "gelu_tanh", "silu", "relu")
POINTS = np.concatenate([np.linspace(-8.0, 8.0, 65) + 0.01, [-1e3, -40.0, 40.0, 1e3]])


def slopes(name: str, points: np.ndarray, dtype: str) -> np.ndarray:
    """Derivatives of an activation, as the backend computes them."""
    scale = LayerScale(1.0, dtype=dtype)
    model = keras.Sequential([scale, keras.layers.Activation(get_activation(name), dtype=dtype)])
    ones = np.ones((1, len(points)), dtype)
    model(ones)
    scale.scale.assign(points)
    (gradient,) = gradients(model, ones)
    return gradient / cotangent_of((1, len(points)))[0]


def test_names():
    assert set(ACTIVATIONS) == set(NAMES) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_definition(name):
    points = POINTS.astype(precision().dtype)
    expected = reference.ACTIVATIONS[name](points.astype("float64"))
    actual = get_activation(name)(keras.ops.convert_to_tensor(points))
    assert keras.backend.standardize_dtype(actual.dtype) == precision().dtype
    assert_matches(actual, expected)
    # Once more where it is small: next to 1000 the values about 0 weigh nothing.
    near = np.abs(points) < 3
    assert_matches(to_numpy(actual)[near], expected[near])


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_that_of_the_definition(name):
    points = POINTS.astype(precision().dtype)
    function, step = reference.ACTIVATIONS[name], 1e-5
    around = points.astype("float64")
    expected = (function(around + step) - function(around - step)) / (2 * step)
    allowed = 1e-7 if precision().dtype == "float64" else 1e-5
    assert_matches(slopes(name, points, precision().dtype), expected, allowed)


def test_gelus_differ_by_more_than_the_tolerance():
    # Else the tests above could not tell one from the other.
    points = np.linspace(-4.0, 4.0, 81)
    difference = np.abs(reference.gelu(points) - reference.gelu_tanh(points)).max()
    assert difference > 2e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_finite(name, dtype):
    # The cube of 100 is beyond float16.
    points = np.array([-300.0, -100.0, -20.0, -1.0, 0.5, 1.0, 20.0, 100.0, 300.0])
    actual = get_activation(name)(keras.ops.convert_to_tensor(points, dtype))
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_matches(actual, reference.ACTIVATIONS[name](points), 1e-2)
    expected = reference.ACTIVATIONS[name]
    expected = (expected(points + 1e-5) - expected(points - 1e-5)) / 2e-5
    # The weights of the loss round as well, to 8 bits in bfloat16.
    np.testing.assert_allclose(slopes(name, points, dtype), expected, atol=0.05)


@pytest.mark.parametrize("function", [gelu, gelu_tanh])
def test_survives_serialization(function):
    layer = keras.layers.Activation(function)
    config = keras.saving.serialize_keras_object(layer)
    assert keras.saving.deserialize_keras_object(config).activation is function


@pytest.mark.parametrize("name", ["swish", "", None])
def test_refuses_other_names(name):
    with pytest.raises(ValueError, match=repr(name)):
        get_activation(name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_is_the_same(name, dtype):
    points = np.linspace(-8.0, 8.0, 1001).reshape(7, 11, 13)
    x = keras.ops.convert_to_tensor(points, dtype)
    found = compile_activation(get_activation(name))(x)
    assert found.dtype == x.dtype
    expected = reference.ACTIVATIONS[name](to_numpy(keras.ops.cast(x, "float64")))
    # About 8 the halves lie 1/128 and 1/16 apart; JAX may be one of them off.
    allowed = {"float16": 1e-2, "bfloat16": 7e-2, "float32": 2e-6, "float64": 2e-6}[dtype]
    np.testing.assert_allclose(to_numpy(keras.ops.cast(found, "float64")), expected, atol=allowed)


@pytest.mark.slow
@pytest.mark.tensorflow_only
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_its_gradients_are_the_same(name, dtype):
    import tensorflow as tf

    x = tf.cast(np.linspace(-8.0, 8.0, 64) + 0.01, dtype)
    weights = tf.cast(np.random.default_rng(0).normal(size=64), dtype)

    def first_and_second(function):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = function(x)
            first = inner.gradient(y, x, weights)
        # As a number where there is none: a ReLU has no second slope.
        zero = tf.UnconnectedGradients.ZERO
        return first, outer.gradient(first, x, weights, unconnected_gradients=zero)

    exact = tf.cast(x, tf.float64), tf.cast(weights, tf.float64)
    allowed = {"float16": 1e-2, "bfloat16": 6e-2, "float32": 1e-4, "float64": 1e-5}[dtype]
    found = first_and_second(compile_activation(get_activation(name)))
    x, weights = exact
    for one, other in zip(found, first_and_second(get_activation(name)), strict=True):
        np.testing.assert_allclose(tf.cast(one, tf.float64), other, atol=allowed)


@pytest.mark.tensorflow_only
def test_compiled_nothing_in_between_is_kept():
    """For the gradient: as six operations, a GELU keeps what each of them gave."""
    import tensorflow as tf

    def operations(function) -> set[str]:
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            return tape.gradient(y, x)

        graph = tf.function(step).get_concrete_function(tf.TensorSpec((8, 8))).graph
        return {each.type for each in graph.get_operations()}

    assert {"Tanh", "Pow"} <= operations(gelu_tanh)
    assert not {"Tanh", "Pow", "Mul"} & operations(compile_activation(gelu_tanh))


@pytest.mark.tensorflow_only
def test_beside_a_gpu_it_is_as_it_is(monkeypatch):
    import tensorflow as tf

    assert compile_activation.__wrapped__(gelu) is not gelu
    devices = [
        tf.config.PhysicalDevice(f"/physical_device:{kind}:0", kind) for kind in ("CPU", "GPU")
    ]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda: devices)
    assert compile_activation.__wrapped__(gelu) is gelu
