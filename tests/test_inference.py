"""Images as timm makes them ready, models from every kind of file, predictions in order."""

from __future__ import annotations

import os
import pathlib
import tempfile

import hypothesis
import keras
import numpy as np
import pytest
import skimage.data
import sklearn.datasets
from PIL import Image

import keras_coatnet
from keras_coatnet import inference
from keras_coatnet.inference import ImageSettings, load_image, open_model, predict_images
from tests import hostile_images, timm_models

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
# Size, crop_pct and crop_mode: the public checkpoints', and what no checkpoint has.
SETTINGS = [
    (224, 0.95, "center"),
    (224, 0.9, "center"),
    (160, 0.95, "center"),
    (384, 1.0, "squash"),
    (224, 1.0, "center"),
    (224, 0.875, "squash"),
    ((160, 224), 0.95, "center"),
    ((224, 160), 0.9, "squash"),
]


@pytest.fixture(scope="module")
def images_of_all_shapes(tmp_path_factory) -> list[pathlib.Path]:
    """The photographs, and made from them a portrait and images smaller than a model's input."""
    folder = tmp_path_factory.mktemp("images")
    with Image.open(SKIMAGE / "chelsea.png") as cat:
        cat.transpose(Image.Transpose.ROTATE_90).save(folder / "portrait.png")
        cat.crop((0, 0, 451, 101)).save(folder / "wide.png")
        cat.resize((37, 23)).save(folder / "tiny.png")
        cat.resize((1, 2)).save(folder / "two_pixels.png")
    return [*PHOTOGRAPHS, *sorted(folder.iterdir())]


@pytest.mark.parametrize("size, crop_pct, crop_mode", SETTINGS)
def test_pixels_are_those_of_timms_evaluation(size, crop_pct, crop_mode, images_of_all_shapes):
    timm = timm_models.import_timm()
    height, width = (size, size) if isinstance(size, int) else size
    transform = timm.data.create_transform(
        (3, height, width),
        is_training=False,
        interpolation="bicubic",
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        normalize=False,
    )
    for path in images_of_all_shapes:
        with Image.open(path) as image:
            theirs = transform(image.convert("RGB")).numpy().transpose(1, 2, 0)
        ours = load_image(path, size, "bicubic", crop_pct, crop_mode)
        assert ours.shape == (height, width, 3) and ours.dtype == np.uint8
        difference = np.abs(ours.astype(float) - theirs)
        assert difference.max() == 0, f"{path.name}: mean {difference.mean()} of 255"


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos", "nearest"])
def test_other_interpolations_are_timms_too(interpolation):
    timm = timm_models.import_timm()
    transform = timm.data.create_transform(
        96, is_training=False, interpolation=interpolation, crop_pct=0.9, normalize=False
    )
    with Image.open(PHOTOGRAPHS[1]) as image:
        theirs = transform(image.convert("RGB")).numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(load_image(PHOTOGRAPHS[1], 96, interpolation, 0.9), theirs)


def test_every_checkpoint_has_settings_that_work():
    for checkpoint in keras_coatnet.weights.registry.CHECKPOINTS.values():
        options = (checkpoint.interpolation, checkpoint.crop_pct, checkpoint.crop_mode)
        side = checkpoint.input_size
        assert load_image(PHOTOGRAPHS[0], side, *options).shape == (side, side, 3)


# --- Kinds of images -----------------------------------------------------------------------


def _whole(path: pathlib.Path, side: int = 32) -> np.ndarray:
    return load_image(path, side, crop_pct=1.0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_parts_become_white_and_opaque_ones_stay(tmp_path, mode):
    path = tmp_path / "image.png"
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((90, 90, 90, 255), (0, 0, 32, 16))
    if mode == "L":  # gray values without an alpha channel, one of which counts as transparent
        image.convert("L").save(path, transparency=0)
    else:
        image.convert(mode).save(path)
    pixels = _whole(path)
    assert (pixels[:16] == 90).all() and (pixels[16:] == 255).all()


def test_what_hides_beneath_full_transparency_does_not_matter(tmp_path):
    with Image.open(PHOTOGRAPHS[1]) as cat:
        cat.convert("RGB").save(tmp_path / "without.png")
        cat.putalpha(255)
        cat.save(tmp_path / "opaque.png")
        cat.putalpha(0)
        cat.save(tmp_path / "invisible.png")
    opaque = load_image(tmp_path / "opaque.png", 64)
    np.testing.assert_array_equal(opaque, load_image(tmp_path / "without.png", 64))
    assert (load_image(tmp_path / "invisible.png", 64) == 255).all()


def test_gray_images_get_three_equal_channels():
    pixels = load_image(SKIMAGE / "camera.png", 64)
    assert (pixels == pixels[..., :1]).all() and pixels.std() > 10


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    eight = np.arange(256, dtype="uint8").repeat(4).reshape(32, 32)
    Image.fromarray(eight.astype("uint16") * 257).save(tmp_path / f"deep.{suffix}")
    pixels = _whole(tmp_path / f"deep.{suffix}")
    np.testing.assert_array_equal(pixels, np.stack([eight] * 3, axis=-1))


def test_printers_colors_become_rgb(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    red, green, blue = _whole(tmp_path / "red.tif")[16, 16]
    assert red > 200 and green < 60 and blue < 60


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "both.gif", save_all=True, append_images=frames[1:])
    assert (_whole(tmp_path / "both.gif")[16, 16] == (255, 0, 0)).all()


def test_a_cameras_orientation_is_ignored_as_timm_does(tmp_path):
    with Image.open(PHOTOGRAPHS[1]) as cat:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        cat.save(tmp_path / "plain.jpg")
        cat.save(tmp_path / "turned.jpg", exif=exif)
    plain, turned = (load_image(tmp_path / name, 64) for name in ("plain.jpg", "turned.jpg"))
    np.testing.assert_array_equal(plain, turned)


# --- Files that are no images --------------------------------------------------------------


def _broken_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    whole = {path.suffix: path.read_bytes() for path in (PHOTOGRAPHS[1], PHOTOGRAPHS[3])}
    flipped = bytearray(whole[".png"])
    flipped[1000:1100] = bytes(100)
    contents = {
        "text.jpg": b"this is no image",
        "empty.png": b"",
        "cut.jpg": whole[".jpg"][:20000],
        "cut.png": whole[".png"][:20000],
        "flipped.png": bytes(flipped),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.ones((32, 32), "float32")).save(folder / "float.tif")
    Image.new("RGB", (1, 60000)).save(folder / "narrow.png")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("text.jpg", "no image, or damaged"),
        ("empty.png", "no image, or damaged"),
        ("cut.jpg", "truncated"),
        ("cut.png", "damaged"),
        ("flipped.png", "damaged"),
        ("float.tif", "floating-point"),
        ("narrow.png", "too narrow"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, reason):
    path = _broken_files(tmp_path)[name]
    with pytest.raises(ValueError, match=reason) as caught:
        load_image(path, 224)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("limit", [None, 10**12])
def test_the_guard_against_huge_images_is_not_pillows(tmp_path, monkeypatch, limit):
    """`PIL.Image.MAX_IMAGE_PIXELS = None` is common in programs that have large images."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert load_image(PHOTOGRAPHS[0], 32).shape == (32, 32, 3)
    Image.new("RGB", (1, 60000)).save(tmp_path / "narrow.png")
    with pytest.raises(ValueError, match="too narrow"):
        load_image(tmp_path / "narrow.png", 224)
    (tmp_path / "huge.jpg").write_bytes(hostile_images.huge_jpeg())
    with pytest.raises(ValueError, match="65000 x 65000 pixels; at most 178,956,970"):
        load_image(tmp_path / "huge.jpg", 224)


def test_postscript_that_is_called_a_jpeg_starts_no_ghostscript(tmp_path, monkeypatch):
    mark = hostile_images.fake_ghostscript(tmp_path / "bin", monkeypatch)
    (tmp_path / "cat.jpg").write_bytes(hostile_images.EPS)
    with pytest.raises(ValueError, match="cat.jpg is no image, or damaged"):
        load_image(tmp_path / "cat.jpg", 224)
    assert not mark.exists()


@hypothesis.settings(deadline=None, derandomize=True, max_examples=80)
@hypothesis.given(content=hostile_images.damaged())
@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it mended
def test_any_damaged_file_is_read_or_named(content):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "it.jpg")
        path.write_bytes(content)
        try:
            pixels = load_image(path, 32)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert pixels.shape == (32, 32, 3) and pixels.dtype == "uint8"


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(ValueError, match="no file") as caught:
            load_image(str(path), 224)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"size": 0}, "size"),
        ({"size": (1, 2, 3)}, "size"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.1}, "crop_pct"),
        ({"crop_pct": float("nan")}, "crop_pct"),
        ({"crop_mode": "border"}, "'center', 'squash'. Received: 'border'"),
        ({"interpolation": "cubic"}, "'bicubic'.*Received: 'cubic'"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        load_image(PHOTOGRAPHS[0], **{"size": 64, **wrong})


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


def test_opens_a_whole_model(model, tmp_path):
    model.save(tmp_path / "saved.keras")
    opened, settings = open_model(tmp_path / "saved.keras")
    assert settings == ImageSettings((64, 48))
    np.testing.assert_allclose(_scores(opened), _scores(model), atol=1e-6)


def test_opens_weights_of_a_model_of_this_package_without_its_architecture(tmp_path):
    square = _build(input_shape=(64, 64, 3), include_preprocessing=False)
    square.save_weights(tmp_path / "square.weights.h5")
    opened, settings = open_model(str(tmp_path / "square.weights.h5"))
    assert settings.size == (64, 64)
    np.testing.assert_allclose(_scores(opened), _scores(square), atol=1e-6)


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
    with pytest.raises(ValueError, match="brings no classifier"):
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


@pytest.mark.parametrize("batch", [1, 2, 4, 32])
def test_predictions_come_in_order_with_the_unreadable_in_their_places(model, tmp_path, batch):
    broken = _broken_files(tmp_path)
    first, second = broken["text.jpg"], broken["cut.jpg"]
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


def test_only_unreadable_or_no_images(model, tmp_path):
    path = _broken_files(tmp_path)["empty.png"]
    assert [one.scores for one in predict_images(model, [path, path])] == [None, None]
    assert list(predict_images(model, [])) == []


def test_settings_reach_the_images(model):
    settings = ImageSettings((64, 48), "bilinear", 1.0, "squash")
    pixels = load_image(PHOTOGRAPHS[0], (64, 48), "bilinear", 1.0, "squash")
    expected = model.predict(pixels[None], verbose=0)
    np.testing.assert_allclose(
        _scores(model, PHOTOGRAPHS[:1], settings=settings), expected, atol=1e-6
    )


def test_logits_become_shares_and_normalized_input_is_given(model):
    logits = _build(classifier_activation=None, include_preprocessing=False)
    logits.set_weights(model.get_weights())
    np.testing.assert_allclose(_scores(logits), _scores(model), atol=1e-6)


def test_a_classifier_with_one_output_keeps_its_score():
    one = _build(classes=1, classifier_activation=None)
    expected = one.predict(load_image(PHOTOGRAPHS[0], (64, 48))[None], verbose=0)
    np.testing.assert_allclose(_scores(one, PHOTOGRAPHS[:1]), expected, atol=1e-6)


def test_what_is_no_classifier_of_rgb_images_is_refused(model):
    headless = _build(include_top=False)
    with pytest.raises(ValueError, match="must be a classifier"):
        next(predict_images(headless, PHOTOGRAPHS))
    with pytest.raises(ValueError, match=r"RGB.*64, 48, 1"):
        next(predict_images(_build(input_shape=(64, 48, 1)), PHOTOGRAPHS))
    with pytest.raises(ValueError, match="batch_size=0"):
        next(predict_images(model, PHOTOGRAPHS, batch_size=0))


def test_a_run_can_be_left_in_the_middle(model):
    run = predict_images(model, PHOTOGRAPHS, batch_size=2)
    assert next(run).path == PHOTOGRAPHS[0]
    run.close()


def test_paths_may_be_of_any_kind(model):
    paths = [str(PHOTOGRAPHS[0]), os.fspath(PHOTOGRAPHS[0]), PHOTOGRAPHS[0]]
    scores = _scores(model, paths)
    np.testing.assert_allclose(scores, scores[[1, 2, 0]], atol=1e-6)
