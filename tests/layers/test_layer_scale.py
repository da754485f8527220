"""LayerScale."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import LayerScale
from tests.helpers import (
    assert_config_covers,
    assert_gradients_reach,
    assert_matches,
    assert_same_after_serialization,
    assert_shapes,
    precision,
    random_map,
    randomize,
    to_numpy,
)


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6), (2, 5, 7, 6)])
def test_multiplies_each_channel(shape):
    layer, x = LayerScale(0.5, dtype=precision().dtype), random_map(*shape)
    layer(x)
    scale = randomize(layer)["scale"]
    expected = np.stack([x[..., c].astype("float64") * scale[c] for c in range(6)], axis=-1)
    assert_matches(layer(x), expected)


@pytest.mark.parametrize("initial_scale", [1e-6, 0.25])
def test_starts_from_the_initial_scale(initial_scale):
    layer = LayerScale(initial_scale)
    layer(random_map(1, 2, 2, 4))
    np.testing.assert_array_equal(to_numpy(layer.scale), np.full(4, np.float32(initial_scale)))


def test_gradient():
    layer, x = LayerScale(0.5, dtype=precision().dtype), random_map(2, 5, 7, 6)
    layer(x)
    assert_gradients_reach(layer, x)


def test_serialization_and_config():
    layer, x = LayerScale(0.5), random_map(2, 5, 7, 6, dtype="float32")
    layer(x)
    randomize(layer)
    assert_same_after_serialization(layer, x)
    assert_config_covers(layer, {"initial_scale": 0.5})


def test_shapes():
    assert_shapes(LayerScale(0.5), random_map(2, 5, 7, 6, dtype="float32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(dtype):
    layer = LayerScale(0.5, dtype=f"mixed_{dtype}")
    x = random_map(2, 5, 7, 6, dtype="float32")
    output = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    assert keras.backend.standardize_dtype(layer.scale.dtype) == "float32"
    assert_matches(output, 0.5 * x, 1e-2)
