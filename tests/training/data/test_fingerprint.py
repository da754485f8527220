"""A run is resumed only with the data that it was started with."""

from __future__ import annotations

import io
import pathlib
import shutil

import pytest

from keras_coatnet.training import Recipe, open_datasets, train
from keras_coatnet.training.data.fingerprint import check_same_data, note_data
from keras_coatnet.training.run.lock import LOCK
from tests.training import runs, tars

pytestmark = pytest.mark.tensorflow_only


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> tuple[Recipe, pathlib.Path]:
    """A run that has just been started; tests/journeys/test_folder_layouts.py has a whole one."""
    place = tmp_path_factory.mktemp("started")
    tars.write_classes(place / "pets", {"ant": 8, "bee": 8, "cat": 8})
    options = {"data": str(place / "pets"), "batch_size": 8, "held_out": 6.0}
    path = runs.write_recipe(place / "recipe", **options)
    (place / "run").mkdir()
    shutil.copy(path, place / "run" / "recipe.json")
    recipe = Recipe.load(path)
    note_data(place / "run", *open_datasets(recipe.data, **recipe.data_options()))
    return recipe, place


def contents(run: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """The contents of a run's files, except its lock, which changes with every process."""
    return {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK
    }


def rename_class(pets: pathlib.Path) -> None:
    (pets / "ant").rename(pets / "dog")


def add_image(pets: pathlib.Path) -> None:
    (pets / "ant" / "new.jpg").write_bytes(tars.image(0, 99))


def rename_image(pets: pathlib.Path) -> None:
    (pets / "ant" / "000.jpg").rename(pets / "ant" / "new.jpg")


@pytest.mark.parametrize(
    "change, reason",
    [
        (rename_class, "its 3 classes have changed (removed: 'ant'; added: 'dog')"),
        (add_image, "it had 18 training images, and there are now 19"),
        (rename_image, "the names or labels of the training images differ"),
    ],
)
def test_a_run_is_not_resumed_with_other_data(started, tmp_path, monkeypatch, change, reason):
    recipe, place = started
    run = shutil.copytree(place / "run", tmp_path / "run")
    before = contents(run)
    kept = shutil.copytree(place / "pets", tmp_path / "kept")
    try:
        change(place / "pets")
        with pytest.raises(ValueError, match="holds a run on other data") as caught:
            train(recipe, run, stream=io.StringIO())
    finally:
        shutil.rmtree(place / "pets")
        shutil.move(kept, place / "pets")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert contents(run) == before


def test_data_in_another_place_are_the_same(started, tmp_path):
    recipe, place = started
    moved = shutil.copytree(place / "pets", tmp_path / "moved")
    sources = open_datasets(moved, **recipe.data_options())
    check_same_data(place / "run", *sources)
    note_data(place / "run", *sources)  # keeps the files that are there
    assert str(moved) not in (place / "run" / "data.json").read_text()
    others = open_datasets(moved, **{**recipe.data_options(), "seed": recipe.seed + 1})
    with pytest.raises(ValueError, match="the names or labels of the training images"):
        check_same_data(place / "run", *others)


def test_a_run_of_an_older_version_has_only_its_classes(started, tmp_path):
    recipe, place = started
    tmp_path.joinpath("classes.txt").write_text("ant\ncat\nbee\n")
    sources = open_datasets(recipe.data, **recipe.data_options())
    with pytest.raises(
        ValueError, match="order of its classes was 'ant', 'cat', 'bee', and is now"
    ):
        check_same_data(tmp_path, *sources)
    tmp_path.joinpath("classes.txt").write_text("ant\nbee\ncat\n")
    check_same_data(tmp_path, *sources)


@pytest.mark.parametrize("content", ["", "[]", '{"classes": []}', '{"classes": 1, "training": 2}'])
def test_a_damaged_data_file_raises_an_error(started, tmp_path, content):
    recipe, _ = started
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match="data.json is damaged"):
        check_same_data(tmp_path, *open_datasets(recipe.data, **recipe.data_options()))


@pytest.mark.slow
def test_data_sets_of_tensorflow_datasets_are_compared(tmp_path):
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=["ant", "bee"])
    features = {"image": tfds.features.Image(), "label": label}
    examples = [{"image": tars.image(n % 2, n), "label": n % 2} for n in range(20)]
    tars.store(tmp_path, "pets", features, {"train": examples})
    sources = open_datasets("pets", data_dir=tmp_path, held_out=4)
    assert [source.count for source in sources] == [16, 4]
    (tmp_path / "run").mkdir()
    note_data(tmp_path / "run", *sources)
    check_same_data(tmp_path / "run", *open_datasets(tmp_path / "pets" / "1.0.0", held_out=4))
    with pytest.raises(ValueError, match="it had 16 training images, and there are now 15"):
        check_same_data(tmp_path / "run", *open_datasets("pets", data_dir=tmp_path, held_out=5))
