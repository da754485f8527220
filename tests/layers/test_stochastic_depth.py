"""Stochastic depth."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import StochasticDepth
from tests.helpers import (
    assert_config_covers,
    assert_same_after_serialization,
    assert_shapes,
    gradients,
    random_map,
    to_numpy,
)


def draws(layer: StochasticDepth, samples: int, dtype: str = "float32") -> np.ndarray:
    """What one call in training multiplies each of so many samples by."""
    ones = keras.ops.ones((samples, 1, 1, 1), dtype)
    return to_numpy(layer(ones, training=True)).ravel()


@pytest.mark.parametrize("training", [False, None])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_is_the_identity_at_inference(rate, training):
    x = random_map(8, 5, 7, 3, dtype="float32")
    output = StochasticDepth(rate)(x, training=training)
    np.testing.assert_array_equal(to_numpy(output), to_numpy(x))


def test_is_the_identity_without_a_rate():
    x = random_map(64, 2, 3, 3, dtype="float32")
    np.testing.assert_array_equal(to_numpy(StochasticDepth(0.0)(x, training=True)), to_numpy(x))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize(("rate", "scale"), [(0.5, 2.0), (0.75, 4.0)])
def test_samples_are_dropped_or_scaled_as_a_whole(rate, scale, shape):
    x = random_map(64, *shape, dtype="float32")
    output = to_numpy(StochasticDepth(rate, seed=1)(x, training=True))
    dropped = (output == 0).reshape(64, -1).all(axis=1)
    assert 0 < dropped.sum() < 64
    np.testing.assert_array_equal(output[~dropped], scale * to_numpy(x)[~dropped])


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.7])
def test_scale_is_one_over_keep(rate):
    factors = draws(StochasticDepth(rate, seed=2), 64)
    kept = factors[factors != 0]
    assert 0 < len(kept) < 64
    # 1 / keep is no float32: one rounding off at most.
    np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1.2e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.45, 0.9])
def test_mean_over_many_samples(rate, dtype):
    samples = 200_000
    layer = StochasticDepth(rate, seed=3, dtype=dtype)
    factors = draws(layer, samples, dtype)
    # Four standard deviations; draws made in half precision would be off by more in bfloat16.
    allowed = 4 * np.sqrt(rate * (1 - rate) / samples)
    assert abs((factors == 0).mean() - rate) < allowed
    if dtype == "float32":
        assert abs(factors.mean() - 1) < allowed / (1 - rate)


def test_samples_draw_independently():
    samples = 20_000
    kept = (draws(StochasticDepth(0.4, seed=4), samples) != 0) - 0.6
    for lag in (1, 2, 3, 16):
        correlation = (kept[lag:] * kept[:-lag]).mean() / kept.var()
        assert abs(correlation) < 4 / np.sqrt(samples)


def test_seeds():
    assert np.array_equal(
        draws(StochasticDepth(0.5, seed=5), 64), draws(StochasticDepth(0.5, seed=5), 64)
    )
    assert not np.array_equal(
        draws(StochasticDepth(0.5, seed=5), 64), draws(StochasticDepth(0.5, seed=6), 64)
    )
    # Without a seed, two layers still draw differently.
    assert not np.array_equal(draws(StochasticDepth(0.5), 64), draws(StochasticDepth(0.5), 64))


def test_every_call_draws_anew():
    layer, again = StochasticDepth(0.5, seed=7), StochasticDepth(0.5, seed=7)
    first, second = draws(layer, 64), draws(layer, 64)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, draws(again, 64)) and np.array_equal(second, draws(again, 64))


def test_a_global_seed_repeats_the_draws():
    def once() -> np.ndarray:
        keras.utils.set_random_seed(8)
        return draws(StochasticDepth(0.5), 64)

    np.testing.assert_array_equal(once(), once())


def test_gradient_passes_kept_samples_alone():
    # Samples as channels of the layer before: the gradient of each shows what multiplied it.
    class Samples(keras.layers.Layer):
        def build(self, input_shape):
            self.samples = self.add_weight(shape=(64, 3), initializer="ones", name="samples")

        def call(self, x):
            return self.samples + x

    x = np.zeros((64, 3), "float32")
    model = keras.Sequential([Samples(), StochasticDepth(0.5, seed=9)])
    model(x)
    (gradient,) = gradients(model, x, training=True)
    dropped = (gradient == 0).all(axis=1)
    assert 0 < dropped.sum() < 64
    assert (gradient[~dropped] != 0).all()


def test_serialization_and_config():
    layer = StochasticDepth(0.3, seed=10)
    restored = assert_same_after_serialization(layer, random_map(2, 5, 7, 3, dtype="float32"))
    assert_config_covers(layer, {"rate": 0.3, "seed": 10})
    np.testing.assert_array_equal(draws(restored, 64), draws(StochasticDepth(0.3, seed=10), 64))


def test_shapes():
    assert_shapes(StochasticDepth(0.3), random_map(2, 5, 7, 3, dtype="float32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(dtype):
    output = StochasticDepth(0.3, dtype=f"mixed_{dtype}")(
        random_map(2, 5, 7, 3, dtype="float32"), training=True
    )
    assert keras.backend.standardize_dtype(output.dtype) == dtype


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_refuses_rates_out_of_range(rate):
    with pytest.raises(ValueError, match=f"rate={rate!r}"):
        StochasticDepth(rate)
