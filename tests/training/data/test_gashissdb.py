"""The builder of GasHisSDB, with small imitations of its files."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_coatnet.training.data.builders import gashissdb
from keras_coatnet.training.data.datasets import open_dataset, open_datasets
from tests.training import tars

pytestmark = [
    pytest.mark.tensorflow_only,
    pytest.mark.filterwarnings("ignore:GasHisSDB/.* were published"),
]

COUNTS = {"Abnormal": 10, "Normal": 25}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("gashissdb")
    tars.write_gashissdb(root, COUNTS)
    tars.write_gashissdb(root, {"Abnormal": 5, "Normal": 5}, size="80")
    return root


def names(source) -> set[str]:
    return {element["name"].decode() for element in source.examples(None, 0).as_numpy_iterator()}


@pytest.mark.slow
def test_a_fifth_of_each_class_is_held_out_for_validation(data_dir):
    train, validation = open_datasets("gashissdb/160", data_dir=data_dir)
    assert train.classes == ("Abnormal", "Normal")
    assert (train.count, validation.count) == (28, 7)
    for source, expected in ((train, [8, 20]), (validation, [2, 5])):
        labels = []
        for element in source.examples(0, 0).as_numpy_iterator():
            name = element["name"].decode()
            label = int(element["label"])
            assert name.startswith(f"{train.classes[label]}/")
            number = int(name[-9:-4])
            assert element["image"] == tars.image(label, number, (160, 160), "PNG")
            labels.append(label)
        assert np.bincount(labels).tolist() == expected
    assert names(train).isdisjoint(names(validation))


def test_each_size_is_a_configuration(data_dir):
    assert open_dataset("gashissdb/80", "train", data_dir=data_dir).count == 8
    assert set(gashissdb.Gashissdb.builder_configs) == {"160", "120", "80"}
    assert sum(count for size in gashissdb.PUBLISHED.values() for count in size.values()) == 245_196


@pytest.mark.slow
def test_the_split_depends_only_on_the_file_names(data_dir, tmp_path):
    """The zip file has another order and other dates than the folder."""
    tars.write_gashissdb(tmp_path, dict(reversed(COUNTS.items())), zipped=True)
    for split in ("train", "validation"):
        zipped = open_dataset("gashissdb", split, data_dir=tmp_path)
        unpacked = open_dataset("gashissdb/160", split, data_dir=data_dir)
        assert names(zipped) == names(unpacked)


def test_the_split_never_changes(data_dir):
    """Accuracies measured at different times have to be of the same images."""
    validation = open_dataset("gashissdb/160", data_dir=data_dir)
    assert names(validation) == {
        *(f"Abnormal/Abnormal-{number:05d}.png" for number in (8, 9)),
        *(f"Normal/Normal-{number:05d}.png" for number in (5, 8, 13, 18, 22)),
    }


def test_counts_other_than_published_give_a_warning(tmp_path):
    tars.write_gashissdb(tmp_path, {"Abnormal": 5, "Normal": 5}, size="120")
    with pytest.warns(UserWarning, match="5 images of the class Normal here; 40,460 were publi"):
        open_dataset("gashissdb/120", data_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_dataset("gashissdb/120", data_dir=tmp_path).count == 2


def test_the_data_set_has_a_description_citation_and_homepage(tmp_path):
    info = tfds.builder("gashissdb", data_dir=os.fspath(tmp_path)).info
    assert "245,196" in info.description
    assert "2106.02473" in info.citation
    assert info.homepage.startswith("https://")


def test_missing_files_raise_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"GasHisSDB.zip or GasHisSDB from https://\S+ ") as caught:
        open_datasets("gashissdb/160", data_dir=tmp_path)
    assert str(tmp_path / "downloads" / "manual") in str(caught.value)


def test_a_missing_class_raises_an_error(tmp_path):
    tars.write_gashissdb(tmp_path, {"Normal": 5})
    with pytest.raises(ValueError, match=r"has no images 160/Abnormal/\*\.png"):
        open_datasets("gashissdb/160", data_dir=tmp_path)


def test_a_damaged_zip_file_raises_an_error(tmp_path):
    tars.write_gashissdb(tmp_path, COUNTS, zipped=True)
    with open(tmp_path / "downloads" / "manual" / "GasHisSDB.zip", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"could not be prepared .* not a zip file"):
        open_datasets("gashissdb/160", data_dir=tmp_path)
