"""Data sets from folders, tensorflow-datasets (by name and by path) and ImageNet's tars."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_coatnet.labels import class_names
from keras_coatnet.training.data import prepared, records
from keras_coatnet.training.data.datasets import ImageDataset, open_dataset, open_datasets
from keras_coatnet.training.data.shard import Shard
from tests.training import tars
from tests.training.data.messages import error_message

pytestmark = [pytest.mark.tensorflow_only, pytest.mark.usefixtures("no_network")]


def elements(source: ImageDataset, seed: int | None = None, start: int = 0) -> list[dict]:
    return list(source.examples(seed, start).as_numpy_iterator())


def names(source: ImageDataset, seed: int | None = None, start: int = 0) -> list[str]:
    return [os.fsdecode(element["name"]) for element in elements(source, seed, start)]


# --- Folders ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("pair")
    return tars.write_pair(root, {"cat": 4, "ant": 3, "bee": 2}, {"ant": 1, "bee": 1, "cat": 2})


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("flat")
    return tars.write_classes(root, {"ant": 20, "bee": 10, "cat": 2}, suffix=".png")


def test_a_folder_with_training_and_validation_parts(pair):
    train, validation = open_datasets(pair)
    assert (train.name, validation.name) == (str(pair / "train"), str(pair / "val"))
    assert (train.count, validation.count) == (9, 4)
    assert train.classes == validation.classes == ("ant", "bee", "cat")
    for source in (train, validation):
        found = elements(source)
        assert len(found) == source.count == len({element["name"] for element in found})
        for element in found:
            path = pathlib.Path(os.fsdecode(element["name"]))
            assert element["image"] == path.read_bytes()
            assert source.classes[element["label"]] == path.parent.name


def test_elements_are_scalars_of_the_documented_types(pair):
    dataset = open_datasets(pair)[0].examples(0, 0)
    assert dataset.element_spec == {
        "image": tf.TensorSpec((), tf.string),
        "label": tf.TensorSpec((), tf.int64),
        "name": tf.TensorSpec((), tf.string),
    }
    assert dataset.cardinality() == 9
    assert dataset.options().deterministic is not False


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_validation_part(tmp_path, name):
    tars.write_pair(tmp_path, {"a": 1, "b": 1}, {"a": 1, "b": 1}, name=name)
    assert open_datasets(tmp_path)[1].name == str(tmp_path / name)
    assert open_dataset(tmp_path).name == str(tmp_path / name)


def test_parts_can_be_named(pair):
    train, validation = open_datasets(pair, train_split="val", validation_split="train")
    assert (train.count, validation.count) == (4, 9)
    assert open_dataset(pair, "train").count == 9


def test_a_share_is_held_out_of_each_class(flat):
    train, validation = open_datasets(flat, held_out=0.2)
    assert (train.count, validation.count) == (16 + 8 + 1, 4 + 2 + 1)
    labels = [int(element["label"]) for element in elements(validation)]
    assert np.bincount(labels).tolist() == [4, 2, 1]
    together = names(train) + names(validation)
    assert len(set(together)) == 32
    assert "80% to train on" in train.name
    assert "20% held out" in validation.name


def test_held_out_images_depend_on_the_seed(flat):
    first, again, other = (names(open_datasets(flat, seed=seed)[1]) for seed in (1, 1, 2))
    assert first == again
    assert set(first) != set(other)


def test_a_folder_of_classes_can_be_evaluated_as_a_whole(flat):
    assert open_dataset(flat).count == 32


def test_each_seed_has_another_order(flat):
    source = open_dataset(flat)
    natural = names(source)
    assert natural == sorted(natural)
    first, second = names(source, 1), names(source, 2)
    assert names(source, 1) == first
    assert len({tuple(natural), tuple(first), tuple(second)}) == 3
    assert set(first) == set(second) == set(natural)


def test_start_skips_the_first_images(flat):
    source = open_dataset(flat)
    for seed in (None, 3):
        whole = names(source, seed)
        assert names(source, seed, 5) == whole[5:]
        assert source.examples(seed, 5).cardinality() == 27
    assert names(source, 3, 32) == []


def test_skipped_images_are_not_read(flat, tmp_path):
    shutil.copytree(flat, tmp_path / "copy")
    source = open_dataset(tmp_path / "copy")
    whole = names(source, 4)
    for path in whole[:30]:
        os.remove(path)
    assert names(source, 4, 30) == whole[30:]


def test_images_are_found_by_suffix_in_nested_folders_except_hidden_ones(tmp_path):
    tars.write_classes(tmp_path, {"a": 1, "b": 1})
    for suffix in (".JPG", ".jpeg", ".PNG", ".bmp", ".gif"):
        tars.write_classes(tmp_path / "a" / "deeper" / "still", {"x": 1}, suffix=suffix)
    tars.write_classes(tmp_path / "a", {".hidden": 3})
    tars.write_classes(tmp_path, {".hidden": 3})
    (tmp_path / "b" / "._000.jpg").write_bytes(b"litter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_dataset(tmp_path)
    assert source.classes == ("a", "b")
    assert source.count == 7


def test_file_names_of_any_encoding(tmp_path):
    tars.write_classes(tmp_path, {"Äpfel": 2, "梨": 2})
    os.rename(tmp_path / "梨" / "000.jpg", os.fsencode(tmp_path / "梨") + b"/\xff.jpg")
    assert len(elements(open_dataset(tmp_path))) == 4


def test_other_files_give_a_warning(tmp_path):
    tars.write_classes(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "b" / "Makefile").write_text("")
    with pytest.warns(UserWarning, match=r"^2 files below .* not images .* \S+notes.txt\.$"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("ending", [".webp", ".TIF", ".tiff"])
def test_formats_that_are_not_read_raise_an_error(tmp_path, ending):
    tars.write_classes(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "b" / f"one{ending}").write_bytes(b"")
    message = error_message(open_datasets, tmp_path)
    assert ending.lower() in message
    assert "one" + ending in message
    assert "Convert" in message


# --- ImageNet's labels ------------------------------------------------------------------------


def test_a_few_classes_of_imagenet_keep_its_labels(tmp_path):
    some = {class_names(1000)[index][0]: 1 for index in (7, 300, 999)}
    tars.write_classes(tmp_path, some)
    source = open_dataset(tmp_path)
    assert source.classes == tuple(identifier for identifier, _ in class_names(1000))
    assert [int(element["label"]) for element in elements(source)] == [7, 300, 999]
    assert [source.classes[label] for label in (7, 300, 999)] == list(some)


def test_classes_outside_imagenet_1k_are_of_imagenet_12k(tmp_path):
    common = class_names(1000)[0][0]
    rare = next(name for name, _ in class_names(11821) if name not in dict(class_names(1000)))
    tars.write_classes(tmp_path, {common: 1, rare: 1})
    source = open_dataset(tmp_path)
    assert len(source.classes) == 11821
    found = {source.classes[element["label"]] for element in elements(source)}
    assert found == {common, rare}


def test_one_name_outside_imagenet_makes_the_folders_the_classes(tmp_path):
    tars.write_classes(tmp_path, {"n01440764": 1, "zebra": 1})
    assert open_dataset(tmp_path).classes == ("n01440764", "zebra")


# --- Errors of folders ------------------------------------------------------------------------


def test_a_missing_folder_raises_an_error(tmp_path):
    for path in (tmp_path / "none", "./none", "none/"):
        assert "does not exist" in error_message(open_datasets, path)
    (tmp_path / "file").write_text("")
    assert "is a file" in error_message(open_datasets, tmp_path / "file")


def test_an_empty_folder_raises_an_error(tmp_path):
    assert f"{tmp_path} is empty" in error_message(open_datasets, tmp_path)


def test_images_without_class_folders_raise_an_error(tmp_path):
    tars.write_classes(tmp_path, {"a": 3})
    assert "holds 3 images but no folders" in error_message(open_dataset, tmp_path / "a")


def test_a_single_class_raises_an_error(tmp_path):
    tars.write_classes(tmp_path, {"a": 3})
    assert "one class only: 'a'" in error_message(open_datasets, tmp_path)


def test_a_class_without_images_raises_an_error(tmp_path):
    tars.write_classes(tmp_path, {"a": 3, "b": 3, "c": 0})
    assert "without images: 'c'" in error_message(open_datasets, tmp_path)


def test_a_class_with_a_single_image_raises_an_error(tmp_path):
    tars.write_classes(tmp_path, {"a": 3, "b": 1})
    assert "single image of 'b'" in error_message(open_datasets, tmp_path)


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 20])
def test_a_held_out_share_out_of_range_raises_an_error(flat, held_out):
    assert f"held_out={held_out}" in error_message(open_datasets, flat, held_out=held_out)


def test_parts_with_different_classes_raise_an_error(tmp_path):
    tars.write_pair(tmp_path, {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "d": 1})
    message = error_message(open_datasets, tmp_path)
    assert f"nly in {tmp_path / 'train'}: 'c'; only in {tmp_path / 'val'}: 'd'" in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_one_part_without_the_other_raises_an_error(tmp_path, part):
    tars.write_classes(tmp_path / part, {"a": 2, "b": 2})
    message = error_message(open_datasets, tmp_path)
    assert f"{part}/ but no second part" in message
    assert str(tmp_path / part) in message
    if part == "train":
        assert "no part for validation" in error_message(open_dataset, tmp_path)
    else:
        assert open_dataset(tmp_path).count == 4


def test_a_class_may_be_called_train(tmp_path):
    tars.write_classes(tmp_path, {"bus": 2, "train": 2})
    assert open_datasets(tmp_path)[0].classes == ("bus", "train")


def test_a_missing_part_raises_an_error(pair):
    for call, options in ((open_datasets, {"validation_split": "dev"}), (open_dataset, {})):
        message = error_message(call, pair, **options, **({} if options else {"split": "dev"}))
        assert "no sub-folder 'dev'. It has: 'train', 'val'" in message


# --- tensorflow-datasets ----------------------------------------------------------------------


def example(label: int, number: int = 0, **others) -> dict:
    content = tars.image(max(0, label), number, kind="PNG")
    return {"image": content, "label": label, **others}


def many(count: int, classes: int) -> list[dict]:
    return [example(number % classes, number) for number in range(count)]


IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format="png")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """Prepared data sets without a builder in tensorflow-datasets."""
    root = tmp_path_factory.mktemp("prepared")
    label = tfds.features.ClassLabel(names=["ant", "bee", "cat"])
    features = {"image": IMAGE, "label": label}
    tars.store(root, "three_splits", features, dict.fromkeys(("train", "test"), many(40, 3)))
    tars.store(root, "four_files", features, {"train": many(40, 3)}, shards=4)
    tars.store(root, "one_split", features, {"full": many(20, 3)})
    number = {"image": IMAGE, "label": np.int32}
    unsure = {"train": many(6, 2), "test": many(5, 5)}
    tars.store(root, "numbers", number, unsure)
    unlabeled = {"train": many(6, 3), "test": [example(-1), example(-1, 1)]}
    tars.store(root, "unlabeled", features, unlabeled)
    tars.store(root, "negative", number, {"train": [example(0), example(1), example(-2, 2)]})
    several = [
        {"image": tars.image(0, number), "labels": labels}
        for number, labels in enumerate([[2], [0], [1], [0, 1]])
    ]
    lists = {"image": tfds.features.Image(), "labels": tfds.features.Sequence(label)}
    tars.store(root, "lists", lists, {"full": several[:3], "several": several[3:]})
    masked = {
        "a_mask": tfds.features.LabeledImage(labels=2, shape=(None, None, 1)),
        "coarse": tfds.features.ClassLabel(num_classes=2),
        "file_name": tfds.features.Text(),
        **features,
    }
    mask = np.zeros((4, 4, 1), "uint8")
    rich = [example(n % 3, n, a_mask=mask, coarse=0, file_name=f"{n}.png") for n in range(6)]
    tars.store(root, "rich", masked, {"train": rich, "validation": rich})
    text = tfds.features.Text()
    tars.store(root, "texts", {"a": text, "label": label}, {"train": [{"a": "", "label": 0}]})
    plain = {"image": example(0)["image"], "b": ""}
    tars.store(root, "plain", {"image": IMAGE, "b": text}, {"train": [plain]})
    depth = tfds.features.Image(shape=(None, None, 1), dtype=np.float32)
    deep = {"image": np.zeros((4, 4, 1), "float32"), "label": 0}
    tars.store(root, "depth", {"image": depth, "label": label}, {"train": [deep]})
    only = tfds.features.ClassLabel(num_classes=1)
    tars.store(root, "single", {"image": IMAGE, "label": only}, {"train": many(3, 1)})
    return root


@pytest.mark.slow
def test_a_data_set_by_name(data_dir):
    train, test = open_datasets("three_splits", data_dir=data_dir)
    assert (train.name, test.name) == ("three_splits, train", "three_splits, test")
    assert (train.count, test.count) == (40, 40)
    assert train.classes == test.classes == ("ant", "bee", "cat")
    published = {tars.image(n % 3, n, kind="PNG"): n % 3 for n in range(40)}
    found = {element["image"]: int(element["label"]) for element in elements(train, 0)}
    assert found == published


@pytest.mark.slow
def test_a_data_set_by_path_by_version_and_by_environment_variable(data_dir, monkeypatch):
    by_path = open_datasets(data_dir / "three_splits" / "1.0.0")
    assert [source.count for source in by_path] == [40, 40]
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert open_dataset("three_splits:1.0.0").name == "three_splits:1.0.0, test"


@pytest.mark.slow
def test_records_have_the_documented_types(data_dir):
    for seed in (None, 0):
        dataset = open_dataset("three_splits", data_dir=data_dir).examples(seed, 10)
        assert dataset.element_spec == {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int64),
            "name": tf.TensorSpec((), tf.string),
        }
        assert dataset.cardinality() == 30


@pytest.mark.slow
def test_each_seed_has_another_order_of_records(data_dir):
    source = open_dataset("three_splits", "train", data_dir=data_dir)
    natural, first, second = (names(source, seed) for seed in (None, 1, 2))
    assert len({tuple(natural), tuple(first), tuple(second)}) == 3
    assert len(set(first)) == 40
    assert set(first) == set(second) == set(natural)
    assert names(source, 1) == first
    assert names(source, 1, 15) == first[15:]
    assert names(source, None, 15) == natural[15:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("start", [0, 8, 13])
def test_a_shard_of_records_or_files_has_the_order_of_the_whole(data_dir, flat, seed, start):
    for source in (open_dataset("three_splits", "train", data_dir=data_dir), open_dataset(flat)):
        whole = names(source, seed)
        for first in (0, 3):
            shard = Shard(8, first, 3)
            dataset = source.examples(seed, start, shard)
            expected = [
                name for index, name in enumerate(whole) if index >= start and shard.holds(index)
            ]
            found = [os.fsdecode(element["name"]) for element in dataset.as_numpy_iterator()]
            assert found == expected and dataset.cardinality() == len(expected) > 0


@pytest.mark.slow
def test_the_shuffle_buffer_is_bounded(data_dir, monkeypatch):
    monkeypatch.setattr(records, "_BUFFER_SIZE", 8)
    source = open_dataset("three_splits", "train", data_dir=data_dir)
    natural, shuffled = names(source), names(source, 1)
    ahead = [natural.index(name) - index for index, name in enumerate(shuffled)]
    assert max(ahead) == 7
    assert sorted(shuffled) == sorted(natural)


def test_the_shuffle_buffer_is_bounded_in_bytes_too(data_dir, monkeypatch):
    info = tfds.builder_from_directory(data_dir / "three_splits" / "1.0.0").info.splits["train"]
    assert records._buffer_size(info) == 40
    monkeypatch.setattr(records, "_BUFFER_BYTES", info.num_bytes // 4)
    assert records._buffer_size(info) == 10


@pytest.mark.slow
def test_each_seed_has_another_order_of_files(data_dir, monkeypatch):
    monkeypatch.setattr(records, "_BUFFER_SIZE", 1)  # records are not shuffled
    source = open_dataset("four_files", "train", data_dir=data_dir)
    orders = [tuple(names(source, seed)) for seed in (None, 2, 3, 2)]
    assert orders[1] == orders[3]
    assert len(set(orders)) == 3
    assert len({frozenset(order) for order in orders}) == 1


@pytest.mark.slow
def test_the_order_depends_only_on_the_seed(data_dir, flat):
    """It does not depend on the process, nor on the random numbers drawn before."""
    program = """
import json, os, sys
import tensorflow as tf
from keras_coatnet.training.data.datasets import open_dataset, open_datasets
tf.random.set_seed(99)
tf.random.uniform([3])
sources = open_dataset("three_splits", data_dir=sys.argv[1]), *open_datasets(sys.argv[2])
orders = [[os.fsdecode(e["name"]) for e in s.examples(7, 2).as_numpy_iterator()] for s in sources]
print(json.dumps(orders))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, data_dir, flat], capture_output=True, text=True, check=True
    )
    sources = open_dataset("three_splits", data_dir=data_dir), *open_datasets(flat)
    assert json.loads(run.stdout) == [names(source, 7, 2) for source in sources]


def test_splits_in_the_notation_of_tensorflow_datasets(data_dir):
    train, validation = open_datasets(
        "three_splits",
        data_dir=data_dir,
        train_split="train[:30]+test[:10]",
        validation_split="train[75%:]",
    )
    assert (train.count, validation.count) == (40, 10)
    assert len(names(train, 0)) == 40


@pytest.mark.slow
def test_a_share_of_the_only_split_is_held_out(data_dir):
    train, validation = open_datasets("one_split", data_dir=data_dir, held_out=0.1)
    assert (train.name, validation.name) == ("one_split, full[:18]", "one_split, full[18:]")
    assert (train.count, validation.count) == (18, 2)
    assert set(names(train)).isdisjoint(names(validation))
    assert "held_out=1" in error_message(open_datasets, "one_split", data_dir=data_dir, held_out=1)


@pytest.mark.slow
def test_classes_of_plain_integers_are_counted_over_all_splits(data_dir, monkeypatch):
    train, _ = open_datasets("numbers", data_dir=data_dir)
    assert train.classes == ("0", "1", "2", "3", "4")
    assert {int(element["label"]) for element in elements(train)} == {0, 1}
    monkeypatch.setattr(records, "_MAX_SCANNED", 10)
    message = error_message(open_datasets, "numbers", data_dir=data_dir)
    assert "does not say how many classes its label 'label' has" in message


@pytest.mark.slow
def test_lists_of_one_label_are_read(data_dir):
    source = open_dataset("lists", "full", data_dir=data_dir)
    assert sorted(int(element["label"]) for element in elements(source)) == [0, 1, 2]
    message = error_message(open_dataset, "lists", "several", data_dir=data_dir)
    assert re.search(r"one label from 0 to 2 for lists-several\S+\. Received: 0, 1$", message)


@pytest.mark.slow
def test_the_image_and_label_are_found_among_many_features(data_dir):
    source = open_dataset("rich", data_dir=data_dir)
    assert source.classes == ("ant", "bee", "cat")
    assert sorted(names(source)) == [f"{number}.png" for number in range(6)]
    assert {int(element["label"]) for element in elements(source)} == {0, 1, 2}
    images = {tars.image(number % 3, number, kind="PNG") for number in range(6)}
    assert {element["image"] for element in elements(source)} == images


# --- Errors of tensorflow-datasets -------------------------------------------------------------


def test_an_unknown_name_raises_an_error(data_dir):
    message = error_message(open_datasets, "three_split", data_dir=data_dir)
    assert "neither a folder nor a data set" in message
    assert "three_splits" in message
    assert "imagenette" in error_message(open_datasets, "imagenet", data_dir=data_dir)


@pytest.mark.parametrize("name", ["flowers/new ones", "hub:cifar10", "no such", "a/b/c/d"])
def test_an_invalid_name_raises_an_error(name, data_dir):
    assert "neither a folder nor a data set" in error_message(
        open_datasets, name, data_dir=data_dir
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [("cifar10:9.9.9", "only: 3.0.2"), ("cifar10_corrupted/fog", "BuilderConfig fog not found")],
)
def test_an_unknown_version_or_configuration_raises_an_error(name, reason, data_dir):
    assert reason in error_message(open_datasets, name, data_dir=data_dir)


def test_a_data_set_that_is_not_prepared_raises_an_error(tmp_path):
    message = error_message(open_datasets, "cifar10", data_dir=tmp_path)
    assert f"`tfds build cifar10 --data_dir {tmp_path}`" in message
    assert "https://www.cs.toronto.edu" in message
    assert not os.listdir(tmp_path)
    (tmp_path / "cifar10" / "1.2.3").mkdir(parents=True)
    assert "versions: 1.2.3." in error_message(open_datasets, "cifar10", data_dir=tmp_path)


def test_an_unknown_split_raises_an_error(data_dir):
    for split in ("dev", "dev[:10%]", "train[oops]"):
        message = error_message(open_dataset, "three_splits", split, data_dir=data_dir)
        assert f"no split {split!r}. It has: train, test." in message
    assert "no split 'validation'" in error_message(open_dataset, "one_split", data_dir=data_dir)
    message = error_message(open_datasets, "one_split", data_dir=data_dir, train_split="full[:50%]")
    assert "no split for validation. It has: full" in message


def test_an_empty_split_raises_an_error(data_dir):
    message = error_message(open_dataset, "three_splits", "train[:0]", data_dir=data_dir)
    assert "'train[:0]' of the data set 'three_splits' is empty" in message


def test_missing_features_raise_an_error(data_dir):
    for name, reason in (
        ("texts", "no uint8 image among its features. It has: a (Text), label (ClassLabel)"),
        ("depth", "no uint8 image among its features. It has: image (Image), label (ClassLabel)"),
        ("single", "fewer than two classes (its label is 'label')"),
        ("plain", "no integer label among its features. It has: b (Text), image (Image)"),
    ):
        assert reason in error_message(open_datasets, name, data_dir=data_dir)


@pytest.mark.slow
def test_labels_out_of_range_raise_an_error(data_dir):
    """When the split is opened if the first is, as in an unlabeled split, else when it is read."""
    message = error_message(open_dataset, "unlabeled", "test", data_dir=data_dir)
    assert re.search(r"one label from 0 to 2 for unlabeled-test\S+__0\. Received: -1$", message)
    assert open_dataset("unlabeled", "train", data_dir=data_dir).count == 6
    builder = prepared.prepare("negative", data_dir)
    columns = records.find_columns(builder)
    assert columns.classes == ("0", "1")
    with pytest.raises(tf.errors.InvalidArgumentError, match="from 0 to 1 for .*: -2"):
        list(records.read_records(builder, columns, "train", None, 0))


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "importlib_resources"])
def test_folders_do_not_need_tensorflow_datasets(missing, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert open_dataset(pair).count == 4
    with pytest.raises(ImportError, match=r'pip install "keras-coatnet\[training\]"'):
        open_datasets("cifar10")


# --- ImageNet's builder ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> pathlib.Path:
    """Small imitations of ImageNet's two tars, in the manual folder."""
    root = tmp_path_factory.mktemp("imagenet")
    tars.write_imagenet(root, train=3, validation=8)
    return root


@pytest.mark.slow
def test_imagenet_is_prepared_from_its_tars(imagenet, capsys):
    train, validation = open_datasets("imagenet2012", data_dir=imagenet)
    said = capsys.readouterr().err
    assert f"Preparing imagenet2012/5.1.0 in {imagenet}" in said
    assert "train: 24 images; 1,281,167 were published" in said
    assert (train.count, validation.count) == (24, 8)
    assert train.classes == tuple(identifier for identifier, _ in class_names(1000))
    for element in elements(train, 0):
        assert element["name"].decode().startswith(train.classes[element["label"]] + "_")
    found = {element["name"].decode(): element for element in elements(validation)}
    synsets = tars.validation_synsets(8)
    classes = sorted(set(synsets))
    for number, synset in enumerate(synsets, 1):
        element = found[f"ILSVRC2012_val_{number:08d}.JPEG"]
        assert validation.classes[element["label"]] == synset
        assert element["image"] == tars.image(classes.index(synset), 1000 + number)
    # Once prepared, it is opened without the tars.
    shutil.move(imagenet / "downloads", imagenet / "elsewhere")
    try:
        assert open_dataset("imagenet2012:5.1.0", data_dir=imagenet).count == 8
    finally:
        shutil.move(imagenet / "elsewhere", imagenet / "downloads")
    assert "Preparing" not in capsys.readouterr().err


def test_imagenet_without_its_tars_raises_an_error(tmp_path):
    message = error_message(open_datasets, "imagenet2012", data_dir=tmp_path)
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net" in message
    assert str(tmp_path / "downloads" / "manual") in message
    assert f"tfds build imagenet2012 --data_dir {tmp_path}" in message


def manual_with(tmp_path: pathlib.Path, imagenet: pathlib.Path, *files: str) -> pathlib.Path:
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    for file in files:
        shutil.copy(imagenet / "downloads" / "manual" / file, manual)
    return manual


def test_imagenet_s_validation_part_is_prepared_without_the_other(imagenet, tmp_path):
    manual_with(tmp_path, imagenet, "ILSVRC2012_img_val.tar")
    message = error_message(open_datasets, "imagenet2012", data_dir=tmp_path)
    assert "Download ILSVRC2012_img_train.tar from" in message
    assert open_dataset("imagenet2012", data_dir=tmp_path).count == 8
    message = error_message(open_datasets, "imagenet2012", data_dir=tmp_path)
    assert "no split 'train'. It has: validation." in message
    assert f"remove {tmp_path / 'imagenet2012' / '5.1.0'}" in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_imagenet_s_truncated_tars_raise_an_error(imagenet, tmp_path, part):
    files = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    manual = manual_with(tmp_path, imagenet, *files)
    with open(manual / f"ILSVRC2012_img_{part}.tar", "r+b") as file:
        file.truncate(3000)
    message = error_message(open_datasets, "imagenet2012", data_dir=tmp_path)
    assert "could not be prepared" in message or "is damaged" in message
    assert "unexpected end of data" in message
    assert not prepared.is_prepared_folder(tmp_path / "imagenet2012" / "5.1.0")


def test_a_missing_image_of_imagenet_s_validation_tar_raises_an_error(imagenet, tmp_path):
    manual = manual_with(tmp_path, imagenet, "ILSVRC2012_img_val.tar")
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (1, 3):
            member = tarfile.TarInfo(f"ILSVRC2012_val_{number:08d}.JPEG")
            tar.addfile(member, io.BytesIO())
    message = error_message(open_dataset, "imagenet2012", data_dir=tmp_path)
    assert "expected ILSVRC2012_val_00000002.JPEG" in message
    assert "found ILSVRC2012_val_00000003.JPEG" in message
