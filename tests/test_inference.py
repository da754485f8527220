"""Models from every kind of file, predictions in order."""

from __future__ import annotations

import os
import pathlib

import keras
import numpy as np
import pytest
import skimage.data
import sklearn.datasets

import keras_coatnet
from keras_coatnet import inference
from keras_coatnet.images import ImageSettings, load_image
from keras_coatnet.inference import open_model, predict_images
from tests import helpers, timm_models

pytestmark = pytest.mark.tensorflow_only

SKIMAGE = pathlib.Path(skimage.data.data_dir)
SKLEARN = pathlib.Path(sklearn.datasets.__file__).parent / "images"
# All of these come with the two packages; none is downloaded.
PHOTOGRAPHS = [
    SKIMAGE / "astronaut.png",  # 512 x 512
    SKIMAGE / "chelsea.png",  # 451 x 300
    SKIMAGE / "coffee.png",  # 600 x 400
    SKIMAGE / "rocket.jpg",  # 640 x 427
    SKLEARN / "china.jpg",  # 640 x 427
    SKLEARN / "flower.jpg",  # 640 x 427
]

# --- Models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> keras_coatnet.CoAtNetModel:
    keras.utils.set_random_seed(1)
    return _build()


def _build(**changes) -> keras_coatnet.CoAtNetModel:
    from tests.conftest import TINY

    return keras_coatnet.CoAtNet(TINY, **{"input_shape": (64, 48, 3), "classes": 10, **changes})


def _scores(model, paths=PHOTOGRAPHS, **options) -> np.ndarray:
    return np.stack([found.scores for found in predict_images(model, paths, **options)])


@pytest.mark.slow
def test_opens_a_whole_model(model, tmp_path):
    model.save(tmp_path / "saved.keras")
    opened, settings = open_model(tmp_path / "saved.keras")
    assert settings == ImageSettings((64, 48))
    np.testing.assert_allclose(_scores(opened), _scores(model), atol=1e-6)


@pytest.mark.slow
def test_opens_weights_of_a_model_of_this_package_without_its_architecture(tmp_path):
    square = _build(input_shape=(64, 64, 3), include_preprocessing=False)
    square.save_weights(tmp_path / "square.weights.h5")
    opened, settings = open_model(str(tmp_path / "square.weights.h5"))
    assert settings.size == (64, 64)
    np.testing.assert_allclose(_scores(opened), _scores(square), atol=1e-6)


@pytest.mark.slow
def test_opens_timms_file_when_told_the_architecture(tmp_path):
    theirs, config = timm_models.random_model("coatnet_rmlp_nano_rw_224", 96, small=True)
    path = timm_models.save(theirs, tmp_path / "model.safetensors")
    opened, settings = open_model(path, config)
    assert settings.size == (96, 96) and opened.output_shape == (None, timm_models.CLASSES)
    pixels = load_image(PHOTOGRAPHS[0], 96)[None] / 127.5 - 1
    logits = timm_models.logits(theirs, pixels.astype("float32"))
    expected = np.asarray(keras.ops.softmax(logits))
    np.testing.assert_allclose(_scores(opened, PHOTOGRAPHS[:1]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="does not say which network.*coatnet_0_rw_224"):
        open_model(path)


def test_weights_without_classifier_are_refused(tmp_path):
    _build(include_top=False).save_weights(tmp_path / "headless.weights.h5")
    with pytest.raises(
        ValueError, match="brings no classifier.*Give weights saved with include_top=True"
    ):
        open_model(tmp_path / "headless.weights.h5")


@pytest.mark.parametrize("name", ["no.keras", "no.weights.h5", "no.safetensors", "no.h5"])
def test_missing_files_are_named(name):
    with pytest.raises(ValueError, match=f"There is no file of that name.*'{name}'"):
        open_model(name)


@pytest.mark.parametrize("name", ["bad.keras", "bad.weights.h5"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(ValueError, match=name):
        open_model(tmp_path / name)


def test_checkpoints_are_found_by_name_and_refuse_another_architecture():
    with pytest.raises(ValueError, match=r"coatnet_0_rw_224\.sw_in1k"):
        open_model("coatnet_0_rw_224")
    with pytest.raises(ValueError, match="'coatnet_0_rw_224'. Received: architecture='coatnet0'"):
        open_model("coatnet_0_rw_224.sw_in1k", "coatnet0")


def test_settings_of_a_model_of_unknown_size():
    features = _build(include_top=False, input_shape=(None, 80, 3), pooling="avg")
    assert inference.default_settings(features).size == (224, 80)
    other = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 3)])
    assert inference.default_settings(other).size == (224, 224)


# --- Predictions -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 4, 32])
def test_predictions_come_in_order_with_the_unreadable_in_their_places(model, tmp_path, batch):
    first, second = tmp_path / "text.jpg", tmp_path / "cut.jpg"
    first.write_bytes(b"this is no image")
    second.write_bytes(PHOTOGRAPHS[3].read_bytes()[:20000])
    paths = [first, *PHOTOGRAPHS[:3], second, first, *map(str, PHOTOGRAPHS[3:])]
    found = list(predict_images(model, paths, batch_size=batch))
    assert [one.path for one in found] == [pathlib.Path(path) for path in paths]
    for one in found:
        if one.path in (first, second):
            assert one.scores is None and str(one.path) in one.error
            continue
        expected = model.predict(load_image(one.path, (64, 48))[None], verbose=0)[0]
        assert one.error is None
        np.testing.assert_allclose(one.scores, expected, atol=1e-6)


@pytest.mark.slow
def test_only_unreadable_or_no_images(model, tmp_path):
    path = tmp_path / "empty.png"
    path.write_bytes(b"")
    assert [one.scores for one in predict_images(model, [path, path])] == [None, None]
    assert list(predict_images(model, [])) == []


@pytest.mark.slow
def test_settings_reach_the_images(model):
    settings = ImageSettings((64, 48), "bilinear", 1.0, "squash")
    pixels = load_image(PHOTOGRAPHS[0], (64, 48), "bilinear", 1.0, "squash")
    expected = helpers.outputs(model, pixels[None])
    np.testing.assert_allclose(
        _scores(model, PHOTOGRAPHS[:1], settings=settings), expected, atol=1e-6
    )


@pytest.mark.slow
def test_logits_become_shares_and_normalized_input_is_given(model):
    logits = _build(classifier_activation=None, include_preprocessing=False)
    logits.set_weights(model.get_weights())
    np.testing.assert_allclose(_scores(logits), _scores(model), atol=1e-6)


@pytest.mark.slow
def test_a_classifier_with_one_output_keeps_its_score():
    one = _build(classes=1, classifier_activation=None)
    expected = one.predict(load_image(PHOTOGRAPHS[0], (64, 48))[None], verbose=0)
    np.testing.assert_allclose(_scores(one, PHOTOGRAPHS[:1]), expected, atol=1e-6)


@pytest.mark.slow
def test_what_is_no_classifier_of_rgb_images_is_refused(model):
    headless = _build(include_top=False)
    with pytest.raises(ValueError, match="must be a classifier"):
        next(predict_images(headless, PHOTOGRAPHS))
    with pytest.raises(ValueError, match=r"RGB.*64, 48, 1"):
        next(predict_images(_build(input_shape=(64, 48, 1)), PHOTOGRAPHS))
    with pytest.raises(ValueError, match="batch_size=0"):
        next(predict_images(model, PHOTOGRAPHS, batch_size=0))


@pytest.mark.slow
def test_a_run_can_be_left_in_the_middle(model):
    run = predict_images(model, PHOTOGRAPHS, batch_size=2)
    assert next(run).path == PHOTOGRAPHS[0]
    run.close()


@pytest.mark.slow
def test_paths_may_be_of_any_kind(model):
    paths = [str(PHOTOGRAPHS[0]), os.fspath(PHOTOGRAPHS[0]), PHOTOGRAPHS[0]]
    scores = _scores(model, paths)
    np.testing.assert_allclose(scores, scores[[1, 2, 0]], atol=1e-6)
