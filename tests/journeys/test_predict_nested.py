"""Somebody builds a model around a CoAtNet, or fuses one, and asks the command line about it."""

import json

import keras
import numpy as np
import pytest
from PIL import Image

import keras_coatnet
from keras_coatnet.cli import main
from keras_coatnet.inference import class_scores, open_model, predict_images
from tests import helpers

pytestmark = pytest.mark.tensorflow_only

SHAPE = (32, 32, 3)
CONFIG = keras_coatnet.CoAtNetConfig(
    (16, 24, 32, 64), depths=(1, 1, 1, 1), stem_width=8, head_dim=8
)
layers = keras.layers


def _coatnet(**options) -> keras_coatnet.CoAtNetModel:
    """The same weights each time, large enough that wrong pixels or logits show."""
    options = {"input_shape": SHAPE, "include_preprocessing": False, **options}
    keras.utils.set_random_seed(0)
    model = keras_coatnet.CoAtNet(CONFIG, classes=3, **options)
    random = np.random.default_rng(0)
    for variable in model.weights:
        if variable.path.endswith("kernel"):
            scale = np.prod(variable.shape[:-1]) ** -0.5
            variable.assign(random.normal(size=variable.shape) * scale)
    return model


def _around(function) -> keras.Model:
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, function(inputs))


def _stack(*parts) -> keras.Model:
    return keras.Sequential([keras.Input(SHAPE), *parts])


def _logits() -> keras_coatnet.CoAtNetModel:
    return _coatnet(classifier_activation=None)


def _flat() -> keras.Model:
    backbone = _logits()
    return keras.Model(backbone.input, layers.Softmax()(backbone.output))


def _to_range() -> keras.layers.Layer:
    return layers.Rescaling(1 / 127.5, -1)


SAME_SCORES = {
    "alone": _coatnet,
    "fused": lambda: keras_coatnet.fuse(_coatnet()),
    "fused, logits": lambda: keras_coatnet.fuse(_logits()),
    "clone of a fused one": lambda: _with_weights_of(keras_coatnet.fuse(_coatnet())),
    "with preprocessing": lambda: _stack(_coatnet(include_preprocessing=True)),
    "nested": lambda: _stack(_coatnet()),
    "nested logits": lambda: _stack(_logits()),
    "twice nested logits": lambda: _stack(_stack(_logits())),
    "nested, fused": lambda: _stack(keras_coatnet.fuse(_logits())),
    "softmax at the end": lambda: _stack(_logits(), layers.Softmax()),
    "activation at the end": lambda: _stack(_logits(), layers.Activation("softmax")),
    "operation at the end": lambda: _around(lambda x: keras.ops.softmax(_logits()(x))),
    "cast at the end": lambda: _stack(_coatnet(), layers.Activation("linear", dtype="float32")),
    "augmentation": lambda: _stack(layers.RandomFlip(), layers.RandomRotation(0.1), _coatnet()),
    "own rescaling": lambda: _around(lambda x: _logits()(_to_range()(x))),
    "own rescaling as input_tensor": lambda: _coatnet(
        input_shape=None, input_tensor=_to_range()(keras.Input(SHAPE))
    ),
    "one graph": _flat,
}


def _with_weights_of(model: keras.Model) -> keras.Model:
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *SHAPE), "uint8")


@pytest.fixture(scope="module")
def expected(images) -> np.ndarray:
    return helpers.outputs(_coatnet(), images / 127.5 - 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("model", SAME_SCORES)
def test_scores_are_those_of_the_coatnet_inside(model, images, expected, tmp_path):
    made = SAME_SCORES[model]()
    np.testing.assert_allclose(class_scores(made, images), expected, atol=1e-4)
    made.save(tmp_path / "mine.keras")
    opened, settings = open_model(tmp_path / "mine.keras")
    assert settings.size == SHAPE[:2]
    np.testing.assert_allclose(class_scores(opened, images), expected, atol=1e-4)


REFUSED = {
    "unknown layer": lambda: _around(lambda x: _coatnet()(layers.Conv2D(3, 1, name="odd")(x))),
    "unknown operation": lambda: _around(lambda x: _coatnet()(x / 255.0)),
    "rescaling of shares": lambda: _around(lambda x: _coatnet()(layers.Rescaling(2.0, -1.0)(x))),
    "different pixels": lambda: _around(
        lambda x: layers.Average()([_coatnet(name="a")(x), _coatnet(name="b")(_to_range()(x))])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", REFUSED)
def test_what_nobody_can_know_is_refused(model, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "gray.png")
    with pytest.raises(ValueError, match="include_preprocessing=True"):
        next(predict_images(REFUSED[model](), [tmp_path / "gray.png"]))


@pytest.mark.slow
def test_numbers_that_are_no_scores_are_refused(images):
    model = _around(lambda x: 5.0 * layers.UnitNormalization()(_logits()(x)))
    with pytest.raises(ValueError, match=r"they are not scores.*Softmax\(\)"):
        class_scores(model, images)


class Own(keras.Model):
    """A functional model with an attribute of the same name as one of `CoAtNetModel`."""

    architecture = "mine"


OTHERS = {
    "functional": lambda: _stack(layers.GlobalAveragePooling2D(), layers.Dense(3)),
    "a layer of the same name": lambda: _stack(
        layers.Conv2D(4, 3, name="stem_conv1"), layers.GlobalAveragePooling2D(), layers.Dense(3)
    ),
    "an attribute of the same name": lambda: Own(
        inputs := keras.Input(SHAPE), layers.Dense(3)(layers.GlobalAveragePooling2D()(inputs))
    ),
}


@pytest.mark.parametrize("model", OTHERS)
def test_models_of_other_kinds_take_raw_pixels(model, images):
    model = OTHERS[model]()
    scores = class_scores(model, images)
    expected = keras.ops.softmax(model(images.astype("float32")))
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.slow
def test_the_command_line(images, expected, tmp_path, capsys):
    Image.fromarray(images[0]).save(tmp_path / "one.png")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    _stack(layers.RandomFlip(), keras_coatnet.fuse(_logits())).save(tmp_path / "mine.keras")
    image = ["predict", "--json", str(tmp_path / "one.png"), "--crop-pct", "1"]
    options = ["--labels", str(tmp_path / "names.txt"), "--model"]
    assert main([*image, *options, str(tmp_path / "mine.keras")]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    scores = {entry["name"]: entry["score"] for entry in found["top"]}
    np.testing.assert_allclose([scores[name] for name in "abc"], expected[0], atol=1e-4)

    REFUSED["unknown layer"]().save(tmp_path / "odd.keras")
    assert main([*image, *options, str(tmp_path / "odd.keras")]) != 0
    error = capsys.readouterr().err.strip()
    assert "'odd'" in error and "\n" not in error.split("error:")[-1]
