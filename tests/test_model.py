"""Whole networks: against plain NumPy, of every layout and size, with gradients everywhere."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.layers.relative_position import resize_table
from tests import helpers, reference

MIXED = {
    "layout": ("C", "C", "CT", "T"),
    "widths": (8, 16, (24, 32), 64),
    "depths": (1, 1, (1, 2), 1),
}
CONVNEXT = {
    "layout": ("C", "CT", "CT", "T"),
    "widths": (16, (16, 24), (48, 32), 64),
    "depths": (2, (1, 1), (1, 1), 1),
    "conv_block": "convnext",
    "conv_layer_scale": 0.1,
    "conv_pool": "avg2",
    "stride_on": "depthwise",
}
LAYOUTS = [
    {"layout": tuple(layout), "widths": (16, 24, 32, 64), "depths": (1, 2, 2, 1)}
    for layout in ("CCCC", "CCCT", "CCTT", "CTTT")
] + [MIXED, CONVNEXT]


def layout_id(changes):
    return "".join(changes["layout"]) + ("-convnext" if changes is CONVNEXT else "")


def _reference_output(config, model, x):
    """The whole network in NumPy, from the variables of a built model."""
    weights = {variable.path: helpers.to_numpy(variable) for variable in model.variables}
    epsilon = config.batch_norm_epsilon
    x = x / 127.5 - 1

    def layer_norm(x, name):
        return reference.layer_norm(x, weights[f"{name}/gamma"], weights[f"{name}/beta"], epsilon)

    convnext = config.conv_block == "convnext"
    norms = layer_norm if convnext else reference.BatchNorms(weights, epsilon)
    x = reference.stem(x, weights, norms)
    for block in config.blocks():
        own = reference.within(weights, block.name)
        if block.kind == "C" and convnext:
            x = reference.convnext(
                x,
                own,
                strides=block.strides,
                activation=config.conv_activation,
                norm_epsilon=epsilon,
            )
        elif block.kind == "C":
            norms = reference.BatchNorms(own, epsilon)
            x = reference.mbconv(x, own, norms, strides=block.strides)
        else:
            x = reference.transformer_block(x, own, strides=block.strides, head_dim=config.head_dim)
    return reference.head(x, weights)


@pytest.mark.slow
@pytest.mark.parametrize("changes", LAYOUTS, ids=layout_id)
def test_forward_pass_is_the_specification(tiny, changes):
    config = tiny.replace(**changes)
    model = keras_coatnet.CoAtNet(
        config, input_shape=(37, 64, 3), classes=5, classifier_activation=None
    )
    helpers.randomize(model)
    x = np.random.default_rng(0).uniform(0, 255, (2, 37, 64, 3)).astype("float32")
    helpers.assert_matches(model(x, training=False), _reference_output(config, model, x), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("unknown_size", [False, True])
def test_gradients_reach_every_weight(tiny, changes, unknown_size):
    # Large enough that stage 4 has several positions: with one, softmax passes no gradient.
    size = None if unknown_size else 96
    config = tiny.replace(**changes)
    model = keras_coatnet.CoAtNet(config, include_top=False, input_shape=(size, size, 3))
    helpers.randomize(model)
    x = np.random.default_rng(0).uniform(0, 255, (2, 96, 64, 3)).astype("float32")
    x = x if unknown_size else np.concatenate([x, x[:, :, :32]], 2)
    # How large they must be, tests/layers says for every layer; here none may be cut off.
    found = helpers.gradients(model, x, unknown_size=unknown_size, training=True)
    for variable, gradient in zip(model.trainable_variables, found, strict=True):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, variable.path


def test_initial_values(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=50)
    helpers.assert_initial_values(model)


def test_stochastic_depth_is_in_every_block(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), stochastic_depth=0.3)
    rates = [
        layer.rate
        for layer in model._flatten_layers()
        if isinstance(layer, keras_coatnet.layers.StochasticDepth)
    ]
    blocks = list(tiny.replace(stochastic_depth=0.3).blocks())
    expected = [b.stochastic_depth for b in blocks for _ in range(1 if b.kind == "C" else 2)]
    assert rates == pytest.approx(expected) and max(rates) == 0.3


@pytest.mark.slow
def test_training_and_inference_differ_only_by_norms_and_drops(tiny, images):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), stochastic_depth=0.5, classes=5)
    first, second = (helpers.to_numpy(model(images, training=False)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    first, second = (helpers.to_numpy(model(images, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 0


SIZES = [(64, 64), (123, 123), (200, 240), (32, 97)]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_unknown_size_equals_static_size(tiny, size):
    """A model of unknown size computes what a static one with resized tables does."""
    unknown = keras_coatnet.CoAtNet(tiny, include_top=False)
    helpers.randomize(unknown)
    static = keras_coatnet.CoAtNet(tiny, include_top=False, input_shape=(*size, 3))
    for theirs, ours in zip(unknown.variables, static.variables, strict=True):
        value = np.asarray(keras.ops.convert_to_numpy(theirs))
        if ours.path.endswith("table"):
            rows, columns = ours.shape[1:]
            value = resize_table(value, (rows + 1) // 2, (columns + 1) // 2)
        ours.assign(value)
    x = np.random.default_rng(0).uniform(0, 255, (1, *size, 3)).astype("float32")
    expected = helpers.to_numpy(static(x))
    helpers.assert_matches(helpers.with_unknown_size(unknown)(x), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_weights_of_one_size_load_at_any_other(tiny, size, tmp_path):
    saved = keras_coatnet.CoAtNet(tiny, include_top=False, input_shape=(96, 64, 3))
    helpers.randomize(saved)
    saved.save_weights(tmp_path / "a.weights.h5")
    loaded = keras_coatnet.CoAtNet(
        tiny, include_top=False, input_shape=(*size, 3), weights=tmp_path / "a.weights.h5"
    )
    for theirs, ours in zip(saved.variables, loaded.variables, strict=True):
        expected = helpers.to_numpy(theirs)
        if ours.path.endswith("table"):
            rows, columns = ours.shape[1:]
            expected = reference.resize_bilinear(expected, rows, columns)
        np.testing.assert_allclose(helpers.to_numpy(ours), expected, atol=1e-5)


@pytest.mark.slow
def test_unknown_size_keeps_the_tables_of_the_file(tiny, tmp_path, images):
    """Saved at 64 and loaded at unknown size, a model computes exactly the same at 64."""
    saved = keras_coatnet.CoAtNet(tiny, include_top=False, input_shape=(64, 64, 3))
    saved.save_weights(tmp_path / "a.weights.h5")
    loaded = keras_coatnet.CoAtNet(tiny, include_top=False, weights=tmp_path / "a.weights.h5")
    helpers.assert_matches(loaded(images), helpers.to_numpy(saved(images)), 1e-6)


def test_every_block_can_be_reached_by_name(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3))
    names = [layer.name for layer in model.layers]
    assert names[1:7] == [
        "preprocessing",
        "network",
        "stem_conv1",
        "stem_norm",
        "stem_activation",
        "stem_conv2",
    ]
    assert names[7:-4] == [block.name for block in tiny.blocks()]
    assert names[-4:] == ["avg_pool", "norm", "hidden", "predictions"]
    assert not any("." in variable.path for variable in model.variables)


@pytest.mark.slow
def test_clone_and_recall(tiny, images):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    helpers.assert_matches(clone(images), helpers.to_numpy(model(images)), 1e-6)
    inputs = keras.Input((64, 64, 3))
    nested = keras.Model(inputs, model(inputs))
    helpers.assert_matches(nested(images), helpers.to_numpy(model(images)), 1e-6)


@pytest.mark.slow
def test_fit_learns(tiny):
    """Two kinds of images that a few steps tell apart."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 32)
    x = rng.uniform(0, 40, (32, 32, 32, 3)) + 120 * labels[:, None, None, None]
    model = keras_coatnet.CoAtNet(tiny, input_shape=(32, 32, 3), classes=2)
    model.compile(
        keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    history = model.fit(x, labels, batch_size=16, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.3 < history["loss"][0]
    assert history["accuracy"][-1] > 0.95


@pytest.mark.tensorflow_only
@pytest.mark.slow
def test_construction_holds_the_parameters_once():
    """CoAtNet-5, 2.7 GB. CoAtNet-7 is made by the same code, but would fill a small machine."""
    code = """
import re
import keras_coatnet
# Not getrusage, whose peak a process inherits from the one that started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model = keras_coatnet.CoAtNet5(weights=None)
print((peak() - before) / (4 * model.count_params()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert 0.9 < float(result.stdout) < 1.3
