"""Folders of images: names of the parts, links, held-out images, and what cannot be read."""

from __future__ import annotations

import os
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_coatnet.labels import class_names
from keras_coatnet.training.data import folders
from keras_coatnet.training.data.datasets import open_dataset, open_datasets
from tests.training import tars
from tests.training.data.messages import error_message

pytestmark = pytest.mark.tensorflow_only

TWO = {"cat": 3, "dog": 3}
WORDNET = [class_names(1000)[index][0] for index in (7, 300, 999)]


def write_parts(root: pathlib.Path, *parts: str, classes: dict[str, int] = TWO) -> pathlib.Path:
    for number, part in enumerate(parts):
        tars.write_classes(root / part, classes, first=10 * number)
    return root


# --- Names of the parts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, expected",
    [
        (("Training", "Testing"), ("Training", "Testing")),
        (("Train", "Test"), ("Train", "Test")),
        (("TRAIN", "VAL"), ("TRAIN", "VAL")),
        (("train", "valid"), ("train", "valid")),
        (("train", "dev"), ("train", "dev")),
        (("training_set", "test_set"), ("training_set", "test_set")),
        (("Train", "Valid", "Test"), ("Train", "Valid")),
        (("train", "test", "validation"), ("train", "validation")),
    ],
)
def test_common_names_of_the_parts_are_found(tmp_path, parts, expected):
    write_parts(tmp_path, *parts)
    found = open_datasets(tmp_path)
    assert tuple(source.name for source in found) == tuple(str(tmp_path / x) for x in expected)
    assert found[0].classes == found[1].classes == ("cat", "dog")
    assert open_dataset(tmp_path).name == str(tmp_path / expected[1])


def test_two_possible_parts_raise_an_error(tmp_path):
    write_parts(tmp_path, "train", "Training", "val")
    message = error_message(open_datasets, tmp_path)
    assert "2 sub-folders that may be for training: 'Training', 'train'" in message
    train, _ = open_datasets(tmp_path, train_split="Training")
    assert train.name == str(tmp_path / "Training")


def test_parts_with_other_names_are_not_taken_for_classes(tmp_path):
    write_parts(tmp_path, "2023", "2024")
    for call in (open_datasets, open_dataset):
        message = error_message(call, tmp_path)
        assert "('2023', '2024') hold the same folders, 'cat', 'dog'" in message
        assert "--train-split" in message
    train, validation = open_datasets(tmp_path, train_split="2024", validation_split="2023")
    assert (train.name, validation.name) == (str(tmp_path / "2024"), str(tmp_path / "2023"))


def test_one_part_cannot_be_for_both_training_and_validation(tmp_path):
    write_parts(tmp_path, "train", "val")
    message = error_message(open_datasets, tmp_path, train_split="val", validation_split="val")
    assert "both to train and to validate on" in message


def test_folders_inside_the_classes_are_not_classes(tmp_path):
    """As in Tiny ImageNet, or if there are images beside the folders."""
    for name in ("cat", "dog"):
        tars.write_classes(tmp_path / "one" / name, {"images": 3})
        tars.write_classes(tmp_path / "beside" / name, {"front": 1, "side": 1})
        (tmp_path / "beside" / name / "it.jpg").write_bytes(tars.image(0, 0))
    for root in (tmp_path / "one", tmp_path / "beside"):
        assert open_dataset(root).classes == ("cat", "dog")


# --- How many are held out --------------------------------------------------------------------


def test_a_number_of_images_is_held_out(tmp_path):
    tars.write_classes(tmp_path, {"a": 31, "b": 13, "c": 6})
    train, validation = open_datasets(tmp_path, held_out=20)
    assert (train.count, validation.count) == (30, 20)
    labels = [int(element["label"]) for element in validation.examples(None, 0)]
    assert np.bincount(labels).tolist() == [13, 5, 2]  # 12.4, 5.2 and 2.4
    assert "20 images held out" in validation.name
    assert open_datasets(tmp_path, held_out=25)[0].count == 25


@pytest.mark.parametrize("held_out", [26, 1, 2.5, float("nan"), float("inf")])
def test_a_wrong_number_of_held_out_images_raises_an_error(tmp_path, held_out):
    tars.write_classes(tmp_path, {"a": 25, "b": 25})
    assert f"held_out={held_out}" in error_message(open_datasets, tmp_path, held_out=held_out)


# --- ImageNet's classes -----------------------------------------------------------------------


def test_some_classes_of_imagenet_are_the_classes_unless_imagenet_is_asked_for(tmp_path):
    tars.write_classes(tmp_path, dict.fromkeys(WORDNET, 4))
    train, validation = open_datasets(tmp_path)
    assert train.classes == validation.classes == tuple(WORDNET)
    assert {int(element["label"]) for element in train.examples(None, 0)} == {0, 1, 2}
    all_of_them, _ = open_datasets(tmp_path, classes="imagenet")
    assert len(all_of_them.classes) == len(open_dataset(tmp_path).classes) == 1000
    assert {int(element["label"]) for element in all_of_them.examples(None, 0)} == {7, 300, 999}
    assert open_dataset(tmp_path, classes="present").classes == tuple(WORDNET)
    assert "Received: classes='some'" in error_message(open_dataset, tmp_path, classes="some")


# --- Links, and what cannot be read -----------------------------------------------------------


def test_links_to_folders_are_followed(tmp_path):
    tars.write_classes(tmp_path / "data", TWO)
    tars.write_classes(tmp_path / "elsewhere", {"more": 5})
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    tars.write_classes(tmp_path / "apart", {"emu": 2})
    (tmp_path / "data" / "emu").symlink_to(tmp_path / "apart" / "emu")
    source = open_dataset(tmp_path / "data")
    labels = [int(element["label"]) for element in source.examples(None, 0)]
    assert np.bincount(labels).tolist() == [8, 3, 2]


def test_circular_links_are_followed_once(tmp_path):
    tars.write_classes(tmp_path, TWO)
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "self").symlink_to(tmp_path / "cat")
    assert open_dataset(tmp_path).count == 3 + 3 + 3  # the dogs are below the cats, too
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat" / "loop")
    assert f"{tmp_path / 'cat' / 'loop'} cannot be read" in error_message(open_dataset, tmp_path)


@pytest.mark.parametrize("where", ["emu", "cat/emu", "cat/9.jpg"])
def test_a_broken_link_raises_an_error(tmp_path, where):
    tars.write_classes(tmp_path, TWO)
    (tmp_path / where).symlink_to(tmp_path / "gone")
    message = error_message(open_datasets, tmp_path)
    assert f"{tmp_path / where} cannot be read: it is a link to nothing" in message


@pytest.mark.parametrize("where", ["cat", "cat/deeper", ""])
def test_an_unreadable_folder_raises_an_error(tmp_path, monkeypatch, where):
    tars.write_classes(tmp_path, TWO)
    tars.write_classes(tmp_path / "cat", {"deeper": 2})
    deny(monkeypatch, tmp_path / where)
    message = error_message(open_datasets, tmp_path)
    assert f"{tmp_path / where} cannot be read: Permission denied" in message


def deny(monkeypatch, folder: pathlib.Path) -> None:
    """Makes a folder unreadable, even for the superuser."""
    scan = os.scandir

    def scandir(path="."):
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)


# --- Any folder -------------------------------------------------------------------------------

NAMES = st.sampled_from(
    "a b cat Train test VAL valid images .hidden n01440764 n02119789 café 梨 x\udcff".split()
)
LEAVES = st.sampled_from(["", "1.jpg", "2.PNG", "3.webp", "notes.txt", "link", "lost", "fifo"])
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.lists(LEAVES, max_size=3),
        lambda inner: st.dictionaries(NAMES, inner, max_size=4),
        max_leaves=9,
    ),
    max_size=4,
)


def write_tree(folder: pathlib.Path, tree: dict | list, root: pathlib.Path) -> None:
    folder.mkdir(exist_ok=True)
    if isinstance(tree, dict):
        for name, inside in tree.items():
            write_tree(folder / name, inside, root)
        return
    for name in filter(None, set(tree)):
        if name == "link":
            (folder / name).symlink_to(root)
        elif name == "lost":
            (folder / name).symlink_to("nowhere.jpg")
        elif name == "fifo":
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(b"")


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=60)
@given(tree=TREES, held_out=st.sampled_from([0.2, 0.9, 2, 7]))
@pytest.mark.filterwarnings("ignore:.*are not images:UserWarning")
def test_any_folder_is_opened_or_raises_an_error_of_one_line(tree, held_out):
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place, "root")
        write_tree(root, tree, root)
        for call, options in ((open_datasets, {"held_out": held_out}), (open_dataset, {})):
            try:
                found = call(root, **options)
            except ValueError as error:
                assert "\n" not in str(error)
                continue
            for source in found if isinstance(found, tuple) else (found,):
                elements = list(source.examples(0, 0).as_numpy_iterator())
                assert len(elements) == source.count > 0
                assert all(0 <= element["label"] < len(source.classes) for element in elements)
                assert len(source.classes) > 1 and source.fingerprint


def test_the_fingerprint_does_not_depend_on_how_the_path_is_written(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    found = {
        folders.read_folder(root).fingerprint() for root in (".", "./", tmp_path, f"{tmp_path}/")
    }
    monkeypatch.chdir(tmp_path.parent)
    found |= {
        folders.read_folder(root).fingerprint() for root in (tmp_path.name, f"./{tmp_path.name}")
    }
    assert len(found) == 1


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_raises_an_error(tmp_path, linked):
    """Opening a pipe that no process writes to would block forever."""
    root = tars.write_classes(tmp_path / "flowers", {"rose": 2, "tulip": 2})
    pipe = tmp_path / "pipe" if linked else root / "rose" / "pipe.png"
    os.mkfifo(pipe)
    if linked:
        (root / "rose" / "pipe.png").symlink_to(pipe)
    with pytest.raises(ValueError, match=r"pipe\.png cannot be read: it is not a file, but a pipe"):
        open_datasets(root)


@pytest.mark.parametrize(
    "data, options, message",
    [
        (None, {}, "`data` must be a folder or a data set's name. Received: data=None"),
        (3, {}, "`data` must be a path. Received: data=3"),
        ("", {}, "`data` is an empty text"),
        ("flowers", {"held_out": "a"}, "Received: held_out='a'"),
        ("flowers", {"seed": -1}, "Received: seed=-1"),
        ("flowers", {"seed": 0.5}, "Received: seed=0.5"),
    ],
)
def test_wrong_arguments_raise_an_error(tmp_path, monkeypatch, data, options, message):
    tars.write_classes(tmp_path / "flowers", {"rose": 2, "tulip": 2})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_datasets(data, **options)
