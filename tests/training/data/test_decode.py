"""Damaged and hostile files are read, or named with the reason why they cannot be read."""

from __future__ import annotations

import warnings

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keras_coatnet.images import ImageSettings
from keras_coatnet.training import Augmentation, UnreadableImages
from keras_coatnet.training.data.decode import decode_for_evaluation, decode_for_training
from tests import hostile_images
from tests.hostile_images import EPS, ORIGINALS, encode, fake_ghostscript, huge_jpeg

pytestmark = pytest.mark.tensorflow_only

SIZE, BATCH = (64, 64), 32


class Reader:
    """Decodes files in a pipeline that is made once."""

    def __init__(self, decode) -> None:
        self.contents: tuple[bytes, ...] = ()
        self.unreadable = UnreadableImages(BATCH)
        spec = (tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.string))
        files = tf.data.Dataset.from_generator(self.files, output_signature=spec)
        self.dataset = decode(files, self)

    def files(self):
        for number, content in enumerate(self.contents):
            yield content, f"{number}.jpg"

    def add(self, name: str, reason: str) -> None:
        self.unreadable.add(name, reason)

    def __call__(self, *contents: bytes) -> dict[str, str]:
        """Returns why files cannot be read, by name; the first is 0.jpg."""
        self.contents, self.unreadable = contents, UnreadableImages(len(contents))
        ((images, are_valid),) = self.dataset.as_numpy_iterator()
        assert images.shape == (len(contents), *SIZE, 3) and images.dtype == "uint8"
        reasons = self.unreadable.reasons
        assert [f"{place}.jpg" in reasons for place in range(len(contents))] == list(~are_valid)
        return reasons


@pytest.fixture(scope="module")
def train() -> Reader:
    def decode(files: tf.data.Dataset, unreadable: UnreadableImages) -> tf.data.Dataset:
        def decode_group(contents, names):
            seeds = tf.zeros([tf.shape(contents)[0], 2], tf.int64)
            return decode_for_training(contents, names, seeds, SIZE, Augmentation(), unreadable)

        return files.batch(BATCH).map(decode_group)

    return Reader(decode)


@pytest.fixture(scope="module")
def evaluate() -> Reader:
    settings = ImageSettings(SIZE, crop_pct=0.875)

    def decode(files: tf.data.Dataset, unreadable: UnreadableImages) -> tf.data.Dataset:
        return files.map(
            lambda content, name: decode_for_evaluation(content, name, settings, unreadable)
        ).batch(BATCH)

    return Reader(decode)


@pytest.fixture(scope="module")
def readers(train, evaluate) -> tuple[Reader, Reader]:
    return train, evaluate


@pytest.mark.slow
def test_postscript_does_not_start_ghostscript(readers, tmp_path, monkeypatch):
    mark = fake_ghostscript(tmp_path / "bin", monkeypatch)
    for read in readers:
        assert read(EPS) == {"0.jpg": "it is not an image"}
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("side", [15000, 65000])
def test_small_files_that_declare_a_huge_jpeg_are_unreadable(readers, side):
    for read in readers:
        reasons = read(huge_jpeg(side))
        assert list(reasons) == ["0.jpg"]
        assert "pixels" in reasons["0.jpg"] and str(side * side) in reasons["0.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 10**12])
def test_the_limit_of_pixels_does_not_depend_on_pillow_s_setting(readers, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in readers:
        reasons = read(huge_jpeg(60000))
        assert "60000 x 60000 pixels; at most 178,956,970" in reasons["0.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_of_one_pixel_by_thousands_are_cropped_or_unreadable(train, evaluate, kind):
    high, wide = (encode(Image.new("RGB", size), kind) for size in ((1, 30000), (30000, 1)))
    assert train(high, wide) == {}  # cropped before they are resized
    reasons = evaluate(high, wide)
    assert "1 x 30000 pixels would become 73 x 2190000" in reasons["0.jpg"]
    assert "30000 x 1 pixels would become 2190000 x 73" in reasons["1.jpg"]


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=4)
@given(contents=st.lists(hostile_images.damaged(), min_size=12, max_size=BATCH))
def test_damaged_files_are_read_or_named(readers, contents):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what it repaired
        for read in readers:
            assert all(reason and "\n" not in reason for reason in read(*contents).values())


def test_the_undamaged_files_are_readable(readers):
    for read in readers:
        assert read(*ORIGINALS) == {}
