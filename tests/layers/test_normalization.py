"""BatchNorm's training step in one operation, against Keras's in many."""

import keras
import numpy as np
import pytest

from keras_coatnet.layers import normalization
from keras_coatnet.layers.normalization import BatchNormalization
from tests.helpers import to_numpy

SHAPE = (3, 5, 7, 8)


def layer_of(kind: type, dtype: str, **options) -> keras.layers.Layer:
    layer = kind(epsilon=1e-3, momentum=0.9, dtype=dtype, **options)
    layer.build(SHAPE)
    random = np.random.default_rng(0)
    for variable in layer.variables:
        variable.assign(random.uniform(0.5, 2.0, variable.shape))
    return layer


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(1.0, 3.0, SHAPE).astype("float32")


def step(layer: keras.layers.Layer, training: bool) -> list[np.ndarray]:
    """Output, gradients of input, gamma and beta, and the moving statistics after it."""
    import tensorflow as tf

    x = tf.cast(inputs(), layer.compute_dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training)
        weights = np.random.default_rng(2).normal(size=SHAPE).astype("float32")
        loss = tf.reduce_sum(tf.cast(y, tf.float32) * weights)
    gradients = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    return [
        to_numpy(keras.ops.cast(value, "float32"))
        for value in (y, *gradients, layer.moving_mean, layer.moving_variance)
    ]


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "dtype", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16"]
)
def test_a_step_equals_keras_own(dtype, training):
    expected = step(layer_of(keras.layers.BatchNormalization, dtype), training)
    found = step(layer_of(BatchNormalization, dtype), training)
    for plain, fused in zip(expected, found, strict=True):
        # In half precision the same values, but for one that lies between two roundings.
        allowed = 2e-6 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(fused, plain, atol=allowed * np.abs(plain).max())


@pytest.mark.tensorflow_only
def test_where_it_is_one_operation(monkeypatch):
    import tensorflow as tf

    def operations(layer, training: bool) -> set[str]:
        spec = tf.TensorSpec((None, None, None, 8), layer.compute_dtype)
        function = tf.function(lambda x: layer(x, training=training))
        return {each.type for each in function.get_concrete_function(spec).graph.get_operations()}

    for training in (True, False):
        layer = layer_of(BatchNormalization, "float32")
        assert "FusedBatchNormV3" in operations(layer, training)
        layer = layer_of(BatchNormalization, "float64")
        assert "FusedBatchNormV3" not in operations(layer, training)
        # Replicas in step need each other's sums.
        with monkeypatch.context() as patch:
            patch.setattr(normalization, "replicas_in_sync", lambda: 2)
            layer = layer_of(BatchNormalization, "float32")
        assert ("FusedBatchNormV3" in operations(layer, training)) != training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"scale": False}, {"center": False}, {"renorm": True}], ids=str
)
def test_it_computes_what_keras_does_with_other_options(training, options):
    ours = layer_of(BatchNormalization, "float32", **options)
    keras_own = layer_of(keras.layers.BatchNormalization, "float32", **options)
    found, expected = ours(inputs(), training=training), keras_own(inputs(), training=training)
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=1e-5)
    for one, other in zip(ours.variables, keras_own.variables, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-5)


def test_one_position_alone_has_no_variance():
    layer = layer_of(BatchNormalization, "float32")
    before = to_numpy(layer.moving_variance)
    y = layer(np.full((1, 1, 1, 8), 5.0, "float32"), training=True)
    np.testing.assert_allclose(to_numpy(y)[0, 0, 0], to_numpy(layer.beta), atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer.moving_variance), 0.9 * before, rtol=1e-6)


def test_it_is_known_to_keras():
    layer = layer_of(BatchNormalization, "float32")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is BatchNormalization and again.momentum == 0.9


@pytest.mark.parametrize("synchronized", [True, False])
def test_synchronization_is_no_part_of_the_configuration(synchronized):
    """An older file has it, from the strategy under which it was saved."""
    config = {**keras.layers.BatchNormalization().get_config(), "synchronized": synchronized}
    layer = BatchNormalization.from_config(config)
    layer.build(SHAPE)
    assert not layer.synchronized and "synchronized" not in layer.get_config()
