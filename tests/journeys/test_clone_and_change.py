"""Somebody copies a model in one of Keras's ways, trains the copy, saves, reloads, fuses it."""

import copy

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet import CoAtNetModel
from tests import helpers

CONFIG = keras_coatnet.CoAtNetConfig(
    (16, 24, 32, 64), depths=(1, 1, 1, 1), stem_width=8, head_dim=8
)
SHAPE = (32, 32, 3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (4, *SHAPE)).astype("float32")


@pytest.fixture
def model() -> CoAtNetModel:
    return keras_coatnet.CoAtNet(CONFIG, input_shape=SHAPE, classes=3)


def _outputs(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(images, training=False))


def _again(layer: keras.layers.Layer) -> keras.layers.Layer:
    return type(layer).from_config(layer.get_config())


WAYS = {
    "clone_model": keras.models.clone_model,
    "clone_function": lambda model: keras.models.clone_model(model, clone_function=_again),
    "input_tensors": lambda model: keras.models.clone_model(
        model, input_tensors=keras.Input(SHAPE)
    ),
    "clone of a clone": lambda model: keras.models.clone_model(keras.models.clone_model(model)),
    "deepcopy": copy.deepcopy,
    "from_config": lambda model: type(model).from_config(model.get_config()),
    "from_config of its layers": lambda model: CoAtNetModel.from_config(
        {key: value for key, value in model.get_config().items() if key != "keras_coatnet"}
    ),
    "by hand": lambda model: CoAtNetModel(model.input, model.output),
    "subclass": lambda model: keras.models.clone_model(
        type("Mine", (CoAtNetModel,), {})(model.input, model.output)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_a_coatnet(way, model, tmp_path, images):
    clone = WAYS[way](model)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(_outputs(clone, images), _outputs(model, images), atol=1e-6)
    assert clone.identity() == model.identity()
    assert clone.get_config()["keras_coatnet"] == model.get_config()["keras_coatnet"]
    clone.save_weights(tmp_path / "clone.weights.h5")
    loaded = keras_coatnet.CoAtNet(CONFIG, weights=tmp_path / "clone.weights.h5")
    np.testing.assert_array_equal(_outputs(loaded, images), _outputs(clone, images))
    fused = _outputs(keras_coatnet.fuse(clone), images)
    np.testing.assert_allclose(fused, _outputs(clone, images), atol=1e-5)


@pytest.mark.slow
def test_clone_train_save_reload_fuse_predict(model, tmp_path, images):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    clone.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    clone.fit(images, np.array([0, 1, 2, 0]), batch_size=2, verbose=0)
    assert np.abs(_outputs(clone, images) - _outputs(model, images)).max() > 0
    clone.save(tmp_path / "clone.keras")
    loaded = keras.saving.load_model(tmp_path / "clone.keras")
    fused = keras_coatnet.fuse(loaded)
    expected = helpers.outputs(clone, images)
    np.testing.assert_allclose(helpers.outputs(fused, images), expected, atol=1e-5)
    assert (fused.classes, fused.architecture) == (3, model.architecture)


@pytest.mark.slow
def test_a_part_of_a_network_knows_that_it_has_no_classifier(model):
    backbone = CoAtNetModel(model.input, model.get_layer("avg_pool").output)
    assert backbone.classes is None and backbone.architecture == model.architecture
    assert keras_coatnet.fuse(backbone).output_shape == (None, 64)


@pytest.mark.slow
def test_another_end_makes_an_ordinary_model(model, tmp_path, images):
    """It has no identity, all of Keras's ways work, and `fuse` says why it does not."""
    head = keras.layers.Dense(2, name="mine")(model.get_layer("avg_pool").output)
    changed = CoAtNetModel(model.input, head)
    assert changed.architecture is None and changed.identity() is None
    expected = _outputs(changed, images)
    np.testing.assert_array_equal(_outputs(copy.deepcopy(changed), images), expected)
    changed.save(tmp_path / "changed.keras")
    loaded = keras.saving.load_model(tmp_path / "changed.keras")
    np.testing.assert_array_equal(_outputs(loaded, images), expected)
    changed.save_weights(tmp_path / "changed.weights.h5")
    loaded.load_weights(tmp_path / "changed.weights.h5")
    with pytest.raises(ValueError, match="does not say which CoAtNet it is.*'mine'"):
        keras_coatnet.fuse(changed)


def test_a_norm_after_the_pooling_is_not_the_end_of_a_whole_network(model):
    """Built without top, the network ends with the pooling. `fuse` must not drop the norm."""
    features = CoAtNetModel(model.input, model.get_layer("norm").output)
    assert features.architecture is None
    with pytest.raises(ValueError, match="does not say which CoAtNet it is.*'norm'"):
        keras_coatnet.fuse(features)
    before_pool = CONFIG.replace(final_norm="before_pool")
    whole = keras_coatnet.CoAtNet(before_pool, include_top=False, input_shape=(32, 32, 3))
    assert CoAtNetModel(whole.input, whole.get_layer("norm").output).identity() == whole.identity()


@pytest.mark.slow
def test_a_fused_model_is_no_network_to_fuse_or_to_load_weights_from(model, tmp_path, images):
    fused = keras_coatnet.fuse(model)
    with pytest.raises(ValueError, match="fused already"):
        keras_coatnet.fuse(keras.models.clone_model(fused))
    fused.save_weights(tmp_path / "fused.weights.h5")
    with pytest.raises(ValueError, match=r"fused\.weights\.h5 holds the weights of a model that `"):
        keras_coatnet.CoAtNet(CONFIG, weights=tmp_path / "fused.weights.h5")


@pytest.mark.slow
def test_lora_is_fused_into_the_kernels(model, images):
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            layer.enable_lora(2)
            layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.05, "float32"))
    fused = _outputs(keras_coatnet.fuse(model), images)
    np.testing.assert_allclose(fused, _outputs(model, images), atol=1e-5)
