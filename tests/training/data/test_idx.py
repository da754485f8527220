"""The IDX files of MNIST and similar data sets: plain, gzipped or damaged."""

from __future__ import annotations

import gzip
import io
import os
import pathlib
import struct

import numpy as np
import pytest
from PIL import Image

from keras_coatnet import cli
from keras_coatnet.training.data.datasets import ImageDataset, open_dataset, open_datasets
from tests.training.data.messages import error_message

pytestmark = pytest.mark.tensorflow_only

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 9, 7), "uint8")
LABELS = (np.arange(30) % 3).astype("uint8")


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def write(folder: pathlib.Path, part: str = "train", zipped: bool = True, **changes) -> None:
    """Writes a part; the bytes `images` and `labels` replace the contents of its files."""
    folder.mkdir(exist_ok=True)
    contents = {"images": idx(IMAGES), "labels": idx(LABELS), **changes}
    for kind, dimensions in (("images", 3), ("labels", 1)):
        path = folder / f"{part}-{kind}-idx{dimensions}-ubyte{'.gz' if zipped else ''}"
        content = contents[kind]
        path.write_bytes(gzip.compress(content) if zipped else content)


def pixels(source: ImageDataset) -> np.ndarray:
    files = [element["image"] for element in source.examples(None, 0).as_numpy_iterator()]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


@pytest.mark.parametrize("zipped", [True, False])
def test_both_parts_are_read_losslessly(tmp_path, zipped):
    write(tmp_path, zipped=zipped)
    write(tmp_path, "t10k", zipped, images=idx(IMAGES[::-1]))
    train, validation = open_datasets(tmp_path)
    assert (train.name, validation.name) == (f"{tmp_path}, train", f"{tmp_path}, t10k")
    assert train.classes == validation.classes == ("0", "1", "2")
    np.testing.assert_array_equal(pixels(train), IMAGES)
    np.testing.assert_array_equal(pixels(validation), IMAGES[::-1])
    found = list(train.examples(3, 5).as_numpy_iterator())
    assert len(found) == 25
    for element in found:
        place = int(element["name"].decode().rpartition("/")[2])
        assert element["label"] == LABELS[place]
    assert open_dataset(tmp_path).name == validation.name
    assert open_dataset(tmp_path, "train").count == 30
    assert train.fingerprint != validation.fingerprint


def test_images_are_held_out_if_there_is_no_validation_part(tmp_path):
    write(tmp_path)
    train, validation = open_datasets(tmp_path, held_out=6)
    assert (train.count, validation.count) == (24, 6)
    assert "no IDX files of a part named 't10k' or 'val'" in error_message(open_dataset, tmp_path)
    assert "no IDX files of a part named 'dev'. It has: train" in error_message(
        open_datasets, tmp_path, validation_split="dev"
    )


HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2**31)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"images": idx(IMAGES[:-1])}, "29 images, but"),
        ({"images": idx(IMAGES)[:-1]}, "but only 1,889 follow"),
        ({"images": idx(IMAGES) + b"0"}, "but more follow"),
        ({"images": HUGE}, "announces 2147483648 x 2147483648 x 2147483648 bytes"),
        ({"images": idx(IMAGES[:0])}, "announces 0 x 9 x 7 bytes"),
        ({"images": idx(LABELS)}, "begins with 00 00 08 01, not 00 00 08 03"),
        ({"images": b""}, "begins with nothing"),
        ({"labels": idx(IMAGES)}, "begins with 00 00 08 03, not 00 00 08 01"),
        ({"labels": idx(np.zeros(30, "uint8"))}, "one class only"),
    ],
)
def test_damaged_files_raise_an_error(tmp_path, changes, reason):
    write(tmp_path, "t10k", **changes)
    message = error_message(open_dataset, tmp_path)
    assert reason in message and str(tmp_path) in message


def test_a_damaged_gzip_file_and_missing_labels_raise_an_error(tmp_path):
    write(tmp_path, "t10k")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-20], b"no archive"):
        path.write_bytes(content)
        assert f"{path} cannot be read" in error_message(open_dataset, tmp_path)
    path.write_bytes(whole)
    os.remove(tmp_path / "t10k-labels-idx1-ubyte.gz")
    message = error_message(open_dataset, tmp_path)
    assert "has no labels. Expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz" in message


def test_the_command_line_reports_a_damaged_idx_file(tmp_path, capsys):
    write(tmp_path, images=b"\x1f")
    arguments = ["train", "transfer", "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    assert "train-images-idx3-ubyte.gz is not an IDX file" in capsys.readouterr().err
