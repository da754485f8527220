"""Half precision: what stays float32, and that nothing overflows."""

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet import layers
from tests import helpers
from tests.conftest import TINY

POLICIES = ["mixed_float16", "mixed_bfloat16"]
# A block of each kind, for what is trained.
TWO_STAGES = TINY.replace(widths=TINY.widths[:2], depths=(1, 1), layout=("C", "T"))


def _model(tiny, **arguments):
    return keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_classifier_and_variables_stay_float32(tiny, policy, images):
    keras.config.set_dtype_policy(policy)
    model = _model(tiny)
    half = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(model(images).dtype) == "float32"
    assert model.layers[-1].compute_dtype == "float32"
    for block in tiny.blocks():
        assert model.get_layer(block.name).compute_dtype == half
        if block.kind == "T":
            attention = model.get_layer(block.name).attention
            assert attention.query.compute_dtype == half
            assert attention.position.compute_dtype == "float32"
    assert {variable.dtype for variable in helpers.seedless(model.variables)} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_close_to_float32(tiny, policy, images):
    keras.config.set_dtype_policy("float32")
    exact = _model(tiny, classifier_activation=None)
    keras.config.set_dtype_policy(policy)
    rounded = _model(tiny, classifier_activation=None)
    helpers.randomize(exact)
    rounded.set_weights(exact.get_weights())
    tolerance = 0.02 if policy == "mixed_float16" else 0.1
    helpers.assert_matches(rounded(images), helpers.to_numpy(exact(images)), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("training", [False, True])
def test_finite_at_ten_times_the_usual_scale(tiny, policy, training, images):
    """Inputs, kernels and tables ten times as large as at the start."""
    keras.config.set_dtype_policy(policy)
    model = _model(tiny, include_preprocessing=False)
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            variable.assign(10 * variable)
    x = 10 * (images / 127.5 - 1)
    assert np.isfinite(helpers.to_numpy(model(x, training=training))).all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_training_step_keeps_finite_gradients(policy, images):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    model = _model(TWO_STAGES, stochastic_depth=0.2)
    model.compile(keras.optimizers.AdamW(1e-3), "sparse_categorical_crossentropy")
    before = [helpers.to_numpy(variable) for variable in model.trainable_variables]
    history = model.fit(images, np.array([0, 1]), epochs=3, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    after = [helpers.to_numpy(variable) for variable in model.trainable_variables]
    assert all(np.isfinite(values).all() for values in after)
    # A loss scale that overflows skips the step: at least one of the three was taken.
    assert any(np.abs(a - b).max() > 0 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_raw_pixels_in_half_precision(tiny, policy):
    """Preprocessing in half precision is off by no more than its rounding."""
    keras.config.set_dtype_policy(policy)
    model = keras_coatnet.CoAtNet(tiny, include_top=False, input_shape=(32, 32, 3))
    x = np.arange(256, dtype="float32").repeat(12).reshape(1, 32, 32, 3)
    actual = helpers.to_numpy(model.get_layer("preprocessing")(x))
    rounding = 2**-11 if policy == "mixed_float16" else 2**-8
    assert np.abs(actual - (x / 127.5 - 1)).max() < 4 * rounding


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_variables_in_half_precision_too(policy, norm, tmp_path, images):
    """Policies that are not mixed: build, train, predict, fuse, save and reload."""
    keras.config.set_dtype_policy(policy)
    model = _model(TWO_STAGES.replace(transformer_norm=norm))
    assert model.get_layer("stage1_block1").variable_dtype == policy
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    losses = model.fit(images, np.array([0, 1]), verbose=0).history["loss"]
    expected = helpers.outputs(model, images)
    assert np.isfinite(losses).all() and np.isfinite(expected).all()
    allowed = 0.05 if policy == "bfloat16" else 0.005
    for kind, network in (("plain", model), ("fused", keras_coatnet.fuse(model))):
        found = helpers.outputs(network, images)
        np.testing.assert_allclose(found, expected, atol=allowed)
        network.save(tmp_path / f"{kind}.keras")
        again = keras.saving.load_model(tmp_path / f"{kind}.keras")
        np.testing.assert_array_equal(helpers.outputs(again, images), found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: layers.MBConv(8, dtype=dtype),
        lambda dtype: layers.TransformerBlock(8, head_dim=4, norm="batch", dtype=dtype),
    ],
    ids=["MBConv", "TransformerBlock"],
)
def test_a_layer_in_half_precision_alone(make, training, dtype):
    y = make(dtype)(helpers.random_map(2, 8, 8, 8, dtype="float32"), training=training)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert np.isfinite(helpers.to_numpy(keras.ops.cast(y, "float32"))).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_average_pooling_does_not_overflow(dtype):
    """Four values within float16 have a mean within float16, though their sum is beyond it."""
    x = keras.ops.full((1, 4, 4, 8), 3e4, dtype)
    y = layers.Downsample("avg2", dtype=dtype)(x)
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in (y, x[:, ::2, ::2]))
    )
