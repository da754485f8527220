"""Image files become the pixels that timm's evaluation gives a model."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile

import hypothesis
import numpy as np
import pytest
import skimage.data
import sklearn.datasets
from PIL import Image

import keras_coatnet
from keras_coatnet.images import load_image
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


@pytest.mark.slow
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
        ("text.jpg", "not an image, or is damaged"),
        ("empty.png", "not an image, or is damaged"),
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
    with pytest.raises(ValueError, match="cat.jpg is not an image, or is damaged"):
        load_image(tmp_path / "cat.jpg", 224)
    assert not mark.exists()


@pytest.mark.slow
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
        ({"crop_mode": "border"}, "'center', 'squash'. Received: crop_mode='border'"),
        ({"interpolation": "cubic"}, "'bicubic'.*Received: interpolation='cubic'"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        load_image(PHOTOGRAPHS[0], **{"size": 64, **wrong})


# --- The module ------------------------------------------------------------------------------


def test_reading_images_imports_neither_keras_nor_tensorflow():
    """The package's `__init__`, which imports Keras, is left out, as the command line does."""
    code = f"""
import sys, types
package = types.ModuleType("keras_coatnet")
package.__path__ = {list(keras_coatnet.__path__)!r}
sys.modules["keras_coatnet"] = package
from keras_coatnet.images import load_image
assert load_image({str(PHOTOGRAPHS[0])!r}, 32).shape == (32, 32, 3)
print(*sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split())
    assert not modules & {"keras", "tensorflow", "jax", "torch"}
    ours = {name for name in modules if name.startswith("keras_coatnet.")}
    assert ours == {"keras_coatnet.images", "keras_coatnet.arguments"}
