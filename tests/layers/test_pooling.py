"""Pooling of stride 2."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import Downsample
from tests import reference
from tests.helpers import (
    assert_config_covers,
    assert_matches,
    assert_same_after_serialization,
    assert_shapes,
    precision,
    random_map,
    to_numpy,
    with_unknown_size,
)

POOLS = ("max2", "avg2", "max3")
MAPS = ((5, 7), (8, 6), (4, 5), (2, 2), (1, 3), (1, 1))


def layer_of(pool: str) -> Downsample:
    return Downsample(pool, dtype=precision().dtype)


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("pool", POOLS)
def test_equals_the_reference(pool, size):
    x = random_map(2, *size, 3)
    assert_matches(layer_of(pool)(x), reference.POOLS[pool](x.astype("float64")))


@pytest.mark.parametrize("pool", POOLS)
def test_padding_does_not_count(pool):
    # Zeros around a map of -2 would win a maximum, and halve a mean.
    output = layer_of(pool)(np.full((1, 5, 7, 2), -2.0, precision().dtype))
    np.testing.assert_array_equal(to_numpy(output), np.full((1, 3, 4, 2), -2.0))


@pytest.mark.parametrize("pool", POOLS)
def test_unknown_size(pool):
    inputs = keras.Input((None, None, 3), dtype=precision().dtype)
    model = keras.Model(inputs, layer_of(pool)(inputs))
    call = with_unknown_size(model)
    for size in MAPS:
        x = random_map(2, *size, 3)
        expected = reference.POOLS[pool](x.astype("float64"))
        assert_matches(call(x), expected)


@pytest.mark.parametrize("size", [(5, 7), (8, 6)])
@pytest.mark.parametrize("pool", POOLS)
def test_shapes(pool, size):
    assert_shapes(Downsample(pool), random_map(2, *size, 3, dtype="float32"))
    halved = (2, (size[0] + 1) // 2, (size[1] + 1) // 2, 3)
    assert tuple(Downsample(pool).compute_output_shape((2, *size, 3))) == halved
    assert tuple(Downsample(pool).compute_output_shape((None, size[0], None, 3))) == (
        *(None, halved[1], None, 3),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pool", POOLS)
def test_mixed_precision(pool, dtype):
    x = random_map(2, 5, 7, 3, dtype="float32")
    output = Downsample(pool, dtype=f"mixed_{dtype}")(x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    assert_matches(output, reference.POOLS[pool](x.astype("float64")), 1e-2)


def test_serialization_and_config():
    layer = Downsample("max3")
    assert_same_after_serialization(layer, random_map(2, 5, 7, 3, dtype="float32"))
    assert_config_covers(layer, {"pool": "max3"})
    assert Downsample().pool == "max2"


@pytest.mark.parametrize("pool", ["avg3", "max", None])
def test_refuses_other_pools(pool):
    with pytest.raises(ValueError, match=f"pool={pool!r}"):
        Downsample(pool)
