"""The variables of built models against those listed from their configuration."""

import pytest

import keras_coatnet
from keras_coatnet.counting.variables import variables
from tests.counting.configurations import MIXED, VARIANTS
from tests.helpers import seedless


@pytest.mark.parametrize("variant", VARIANTS)
def test_variables_are_those_of_the_model(variant):
    config = keras_coatnet.CoAtNetConfig(**MIXED).replace(**VARIANTS[variant])
    model = keras_coatnet.CoAtNet(config, input_shape=(40, 56, 3), classes=7)
    trainable = {id(variable) for variable in model.trainable_variables}
    expected = {v.path: (tuple(v.shape), id(v) in trainable) for v in seedless(model.variables)}
    found = {v.path: (v.shape, v.trainable) for v in variables(config, (40, 56, 3), 7)}
    assert found == expected
