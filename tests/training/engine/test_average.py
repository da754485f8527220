"""The momentum of the moving average. `test_learning` has the average of a whole network."""

import pytest

from keras_coatnet.training.engine.average import momentum_at


def test_the_average_starts_quickly_and_ends_slowly():
    assert float(momentum_at(0, 0.9999)) == pytest.approx(0.1)
    assert float(momentum_at(90, 0.9999)) == pytest.approx(0.91)
    assert float(momentum_at(10**7, 0.9999)) == pytest.approx(0.9999)


def test_a_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`momentum` must be a number at least 0 and at most 1"):
        momentum_at(0, 1.5)
