"""Someone has images in folders, of whatever layout, and trains on them."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from keras_coatnet import cli
from keras_coatnet.labels import class_names
from keras_coatnet.training import Recipe, open_datasets
from tests.training import runs, tars

pytestmark = pytest.mark.tensorflow_only

WORDNET = [class_names(1000)[index][0] for index in (7, 300, 999)]
PETS = {"cat": 6, "dog": 6}


def flat(root: pathlib.Path) -> pathlib.Path:
    return tars.write_classes(root, PETS)


def parts(*names: str):
    def write(root: pathlib.Path) -> pathlib.Path:
        for number, name in enumerate(names):
            tars.write_classes(root / name, PETS, first=10 * number)
        return root

    return write


def links(root: pathlib.Path) -> pathlib.Path:
    tars.write_classes(root.with_name("store"), PETS)
    root.mkdir()
    for name in PETS:
        (root / name).symlink_to(root.with_name("store") / name)
    return root


def part_of_imagenet(root: pathlib.Path) -> pathlib.Path:
    for number, part in enumerate(("train", "val")):
        tars.write_classes(root / part, dict.fromkeys(WORDNET, 6), first=10 * number)
    return root


@pytest.mark.parametrize(
    "write, options, counts",
    [
        (flat, [], (10, 2)),
        (flat, ["--held-out", "4"], (8, 4)),
        (parts("train", "val"), [], (12, 12)),
        (parts("Training", "Testing"), [], (12, 12)),
        (parts("Train", "Valid", "Test"), [], (12, 12)),
        (
            parts("2023", "2024"),
            ["--train-split", "2023", "--validation-split", "2024"],
            (12, 12),
        ),
        (links, [], (10, 2)),
        (part_of_imagenet, [], (18, 18)),
    ],
)
def test_every_usual_layout(tmp_path, capsys, write, options, counts):
    root = write(tmp_path / "images")
    arguments = ["train", "transfer", "--data", str(root), *options]
    assert cli.main([*arguments, "--dry-run"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    recipe = Recipe(
        data=shown["data"],
        held_out=float(shown["held_out"]),
        **{name: None if shown[name] == "None" else shown[name] for name in SPLITS},
    )
    found = open_datasets(recipe.data, **recipe.data_options())
    assert tuple(source.count for source in found) == counts
    expected = WORDNET if write is part_of_imagenet else sorted(PETS)
    assert [list(source.classes) for source in found] == [expected] * 2


SPLITS = ("train_split", "validation_split")


def one_run(test):
    """For tests of the run below, which takes long to make: slow, and all on one worker."""
    return pytest.mark.slow(pytest.mark.xdist_group("part_of_imagenet")(test))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[pathlib.Path, list[str]]:
    """The folder of a run on three of ImageNet's classes, and the command that made it."""
    place = tmp_path_factory.mktemp("run")
    root = part_of_imagenet(place / "images")
    options = {"data": str(root), "epochs": 1, "batch_size": 6}
    cheap = {"ema_momentum": None, "mixup": 0.0, "stochastic_depth": 0.0, "randaugment_num_ops": 0}
    recipe = runs.write_recipe(place / "recipe", **options, **cheap)
    command = ["train", str(recipe), "--output", str(place / "run")]
    assert cli.main(command) == 0
    return place / "run", command


def said(capsys) -> str:
    return capsys.readouterr().err


@one_run
def test_a_part_of_imagenet_is_trained_and_used(run, capsys):
    folder, command = run
    assert cli.main(command) == 0  # complete: it says again what it was about
    lines = said(capsys).splitlines()
    root = folder.parent / "images"
    assert f"training: 18 images of 3 classes ({root / 'train'})" in lines
    assert f"validation: 18 images ({root / 'val'})" in lines
    assert any("3 of ImageNet's 1,000" in line and "--classes imagenet" in line for line in lines)

    weights = str(folder / "final.weights.h5")
    by_run = ["--run", str(folder)]
    by_weights = ["--weights", weights, "--data", str(root), "--crop-pct", "0.875"]
    figures = []
    for what in (by_run, by_weights):
        assert cli.main(["evaluate", *what, "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["count"] == 18
    assert figures[0]["top1"] == figures[1]["top1"]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-4)

    image = str(root / "val" / WORDNET[0] / "010.jpg")
    assert cli.main(["predict", image, "--model", weights, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    named = {(entry["wordnet_id"], entry["name"]) for entry in found["top"]}
    assert named == {class_names(1000)[index] for index in (7, 300, 999)}


@one_run
def test_a_run_is_not_taken_up_with_a_renamed_class(run, capsys):
    folder, command = run
    root = folder.parent / "images"
    classes = (folder / "classes.txt").read_text()
    other = class_names(1000)[0][0]
    for part in ("train", "val"):
        (root / part / WORDNET[2]).rename(root / part / other)
    try:
        assert cli.main(command) == 2
        reason = f"its 3 classes have changed (removed: {WORDNET[2]!r}; added: {other!r})"
        assert reason in said(capsys)
        assert (folder / "classes.txt").read_text() == classes
        assert cli.main(["evaluate", "--run", str(folder)]) == 2
        assert reason in said(capsys)
    finally:
        for part in ("train", "val"):
            (root / part / other).rename(root / part / WORDNET[2])


@one_run
def test_an_image_more_is_other_data(run, capsys):
    folder, command = run
    place = folder.parent / "images" / "train" / WORDNET[0]
    shutil.copy(place / "000.jpg", place / "999.jpg")
    try:
        assert cli.main(command) == 2
        assert "it had 18 training images, and there are now 19" in said(capsys)
    finally:
        (place / "999.jpg").unlink()
