"""Keras's own test of a layer, on every layer of the package.

`run_layer_test` checks what Keras asks of any layer: it serializes, builds by shape, by a symbolic
and by a real call to the same variables, trains under `fit`, and keeps float32 variables and its
declared output type under mixed precision. It is private in Keras, but it is the standard that
each of Keras's own layers meets.
"""

import pytest
from keras.src.testing import TestCase

import keras_coatnet
from keras_coatnet.layers.fused import (
    FusedActivation,
    FusedAttention,
    FusedPointwiseConv2D,
    FusedSqueezeExcite,
)
from keras_coatnet.layers.normalization import BatchNormalization

MAP = (2, 6, 5, 16)  # not square, and odd along one axis

# Arguments and the shape of the output, by layer: one case with the defaults, where there are any,
# and one in which each optional part is present.
PUBLIC = {
    "ConvNeXtBlock": [
        ({"filters": 32, "strides": 2}, (2, 3, 3, 32)),
        ({"filters": 16, "stochastic_depth": 0.5}, MAP),
    ],
    "Downsample": [({}, (2, 3, 3, 16)), ({"pool": "max3"}, (2, 3, 3, 16))],
    "LayerScale": [({"initial_scale": 0.5}, MAP)],
    "MBConv": [
        ({"filters": 24, "strides": 2}, (2, 3, 3, 24)),
        (
            {
                "filters": 16,
                "stride_on": "pool",
                "prenorm_activation": True,
                "squeeze_place": "before_norm",
                "stochastic_depth": 0.5,
            },
            MAP,
        ),
    ],
    "RelativeSelfAttention": [
        ({"filters": 24, "head_dim": 8}, (2, 6, 5, 24)),
        ({"filters": 16, "head_dim": 8, "relative_position": "mlp"}, MAP),
    ],
    "SqueezeExcite": [({"squeezed_filters": 4}, MAP)],
    "StochasticDepth": [({"rate": 0.5}, MAP)],
    "TransformerBlock": [
        ({"filters": 24, "head_dim": 8, "strides": 2}, (2, 3, 3, 24)),
        (
            {
                "filters": 16,
                "head_dim": 8,
                "norm": "batch",
                "relative_position": "mlp",
                "layer_scale": 0.1,
                "stochastic_depth": 0.5,
            },
            MAP,
        ),
    ],
    # These are called with two sizes, not with a tensor: Keras's test has no form for that, so only
    # its serialization is run. They are also inside the two layers above.
    "RelativePositionMLP": [({"num_heads": 4, "hidden_dim": 8}, None)],
    "RelativePositionTable": [({"num_heads": 4, "table_size": (6, 5)}, None)],
}
INTERNAL = [
    (BatchNormalization, {}, MAP),
    (FusedPointwiseConv2D, {"filters": 8, "activation": "relu", "strides": 2}, (2, 3, 3, 8)),
    (FusedActivation, {"activation": "silu"}, MAP),
    (FusedSqueezeExcite, {"squeezed_filters": 4}, MAP),
    (FusedAttention, {"filters": 24, "num_heads": 2, "head_dim": 8}, (2, 6, 5, 24)),
]
CASES = [
    (getattr(keras_coatnet.layers, name), arguments, shape)
    for name, cases in PUBLIC.items()
    for arguments, shape in cases
] + INTERNAL


def test_no_public_layer_is_left_out():
    assert set(PUBLIC) == set(keras_coatnet.layers.__all__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "arguments", "output_shape"),
    CASES,
    ids=[f"{layer.__name__}-{number}" for number, (layer, _, _) in enumerate(CASES)],
)
def test_keras_own_layer_test_passes(layer, arguments, output_shape):
    TestCase().run_layer_test(
        layer,
        arguments,
        input_shape=None if output_shape is None else MAP,
        expected_output_shape=output_shape,
    )
