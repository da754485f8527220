"""The command line: as a process against a hub of this machine, and its parts in this process."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import skimage.data
from PIL import Image
from safetensors.numpy import save_file

import keras_coatnet
from keras_coatnet import cli, inference
from keras_coatnet.labels import class_names
from keras_coatnet.weights.registry import CHECKPOINTS
from tests import timm_models
from tests.hub_server import HubServer

pytestmark = pytest.mark.tensorflow_only

SKIMAGE = pathlib.Path(skimage.data.data_dir)  # these photographs come with the package
ASTRONAUT, COFFEE, CAT = (SKIMAGE / name for name in ("astronaut.png", "coffee.png", "chelsea.png"))
CHECKPOINT = "coatnet_0_rw_224.sw_in1k"


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "keras_coatnet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def said(error_stream: str) -> list[str]:
    """The lines of an error stream, less what TensorFlow's C++ says whenever it is imported."""
    return [line for line in error_stream.splitlines() if line.startswith("keras-coatnet:")]


# --- As a process, with a checkpoint of the real name and size -------------------------------


@dataclasses.dataclass
class Published:
    """A randomized checkpoint on a hub, and what timm makes of photographs with it."""

    hub: HubServer
    home: pathlib.Path
    best: dict[pathlib.Path, list[tuple[int, float]]]


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    model = timm_models.random_model("coatnet_0_rw_224", 224)
    best = {path: _timms_best(model, path) for path in (ASTRONAUT, COFFEE, CAT)}
    path = pathlib.Path(timm_models.save(model, folder / "model.safetensors"))
    with HubServer() as hub:
        hub.add_model(f"timm/{CHECKPOINT}", "model.safetensors", path.read_bytes())
        path.unlink()
        yield Published(hub, folder, best)


def _timms_best(model, path: pathlib.Path) -> list[tuple[int, float]]:
    """timm's own five likeliest, by its own transform with its own settings of this model."""
    timm = timm_models.import_timm()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    with Image.open(path) as image:
        pixels = transform(image.convert("RGB")).numpy().transpose(1, 2, 0)
    scores = np.asarray(keras.ops.softmax(timm_models.logits(model, pixels[None])))[0]
    best = np.argsort(-scores)[:5]
    return [(int(index), float(scores[index])) for index in best]


@pytest.mark.slow
def test_one_photograph_has_timms_predictions_in_a_table(published):
    environment = published.hub.environment(published.home)
    done = run("predict", COFFEE, env=environment)
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.strip().splitlines()
    assert title == str(COFFEE) and len(lines) == 5
    for line, (index, score) in zip(lines, published.best[COFFEE], strict=True):
        share, wordnet_id, name = line.split(maxsplit=2)
        assert (wordnet_id, name) == class_names(1000)[index]
        assert float(share.rstrip("%")) == pytest.approx(100 * score, abs=0.011)


@pytest.mark.slow
def test_images_a_folder_and_a_damaged_file_as_json(published, tmp_path):
    (tmp_path / "more" / "below").mkdir(parents=True)
    shutil.copy(COFFEE, tmp_path / "more" / "1.PNG")
    shutil.copy(CAT, tmp_path / "more" / "below" / "2.png")
    (tmp_path / "more" / "notes.txt").write_text("not an image, and not called one")
    damaged = tmp_path / "more" / "damaged.jpg"
    damaged.write_bytes(b"no image, though it is called one")
    done = run(
        *("predict", ASTRONAUT, tmp_path / "more", "--json", "--batch-size", 2),
        env=published.hub.environment(published.home),
    )
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == CHECKPOINT
    expected = [ASTRONAUT, tmp_path / "more" / "1.PNG", tmp_path / "more" / "below" / "2.png"]
    assert [entry["image"] for entry in answer["images"]] == list(map(str, expected))
    for entry, original in zip(answer["images"], (ASTRONAUT, COFFEE, CAT), strict=True):
        indices, scores = zip(*published.best[original], strict=True)
        assert [one["class"] for one in entry["top"]] == list(indices)
        named = [(one["wordnet_id"], one["name"]) for one in entry["top"]]
        assert named == [class_names(1000)[index] for index in indices]
        np.testing.assert_allclose([one["score"] for one in entry["top"]], scores, atol=1e-4)
    (skipped,) = answer["skipped"]
    assert skipped["image"] == str(damaged)
    # On a slow machine, lines of progress stand between.
    first, last = (line for line in said(done.stderr) if "skipped" in line)
    assert str(damaged) in first
    assert last == "keras-coatnet: 1 of 4 images skipped"


# --- In this process, with a small model -----------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A small classifier of ten classes in a file."""
    from tests.conftest import TINY

    keras.utils.set_random_seed(2)
    path = tmp_path_factory.mktemp("saved") / "small.keras"
    keras_coatnet.CoAtNet(TINY, input_shape=(64, 64, 3), classes=10).save(path)
    return path


def _document(call, *arguments: object) -> dict:
    status, output, error_stream = call("predict", *arguments, "--json")
    assert status == 0, error_stream
    return json.loads(output)


@pytest.mark.slow
def test_unnamed_classes_go_by_their_numbers(call, saved):
    status, output, error_stream = call("predict", COFFEE, "--model", saved, "--top", 2)
    assert status == 0 and error_stream == ""
    title, *lines = output.strip().splitlines()
    assert title == str(COFFEE) and len(lines) == 2
    assert all(re.fullmatch(r" +\d+\.\d\d%  class \d", line) for line in lines)


@pytest.mark.slow
def test_labels_name_the_classes(call, saved, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"leaf of kind {number}" for number in range(10)) + "\n")
    plain = _document(call, COFFEE, "--model", saved)["images"][0]["top"]
    named = _document(call, COFFEE, "--model", saved, "--labels", labels)["images"][0]["top"]
    assert [one["class"] for one in named] == [one["class"] for one in plain]
    assert [one["name"] for one in named] == [f"leaf of kind {one['class']}" for one in named]
    assert {one["wordnet_id"] for one in named} == {None}


@pytest.mark.slow
def test_labels_as_windows_editors_write_them(call, saved, tmp_path):
    labels = tmp_path / "labels.txt"
    lines = "".join(f"leaf {number}\r\n" for number in range(10))
    labels.write_text(f"{lines}\r\n", "utf-8-sig", newline="")
    named = _document(call, COFFEE, "--model", saved, "--labels", labels, "--top", 10)
    assert {one["name"] for one in named["images"][0]["top"]} == {f"leaf {n}" for n in range(10)}
    labels.write_text("a\nb\n\n" + "c\n" * 7)
    status, _, error_stream = call("predict", COFFEE, "--model", saved, "--labels", labels)
    assert status == 2 and f"Line 3 of the labels in {labels} is empty" in error_stream


@pytest.mark.slow
def test_more_classes_than_there_are(call, saved):
    top = _document(call, COFFEE, "--model", saved, "--top", 99)["images"][0]["top"]
    assert sorted(one["class"] for one in top) == list(range(10))
    scores = [one["score"] for one in top]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)


@pytest.mark.slow
def test_crop_options_change_what_the_model_sees(call, saved):
    model, settings = inference.open_model(saved)
    settings = dataclasses.replace(settings, crop_pct=1.0, crop_mode="squash")
    (expected,) = inference.predict_images(model, [CAT], settings)
    squash = ("--crop-mode", "squash", "--crop-pct", 1)
    (found,) = _document(call, CAT, "--model", saved, *squash)["images"]
    assert found["top"][0]["score"] == pytest.approx(expected.scores.max().item(), abs=1e-6)
    (default,) = _document(call, CAT, "--weights", saved)["images"]
    assert found["top"] != default["top"]


@pytest.mark.slow
def test_hidden_files_and_other_files_in_folders_are_passed_over(call, saved, tmp_path):
    shutil.copy(COFFEE, tmp_path / "b.png")
    shutil.copy(COFFEE, tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"a note of a file manager")
    (tmp_path / "a.csv").write_text("1,2")
    found = _document(call, tmp_path, "--model", saved)["images"]
    assert [entry["image"] for entry in found] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]


@pytest.mark.slow
def test_links_in_folders_are_followed_and_what_cannot_be_read_is_named(
    call, saved, tmp_path, monkeypatch
):
    place = tmp_path / "images"
    for folder in (place / "below", tmp_path / "elsewhere", place / "locked"):
        folder.mkdir(parents=True)
        shutil.copy(COFFEE, folder / "a.png")
    (place / "linked").symlink_to(tmp_path / "elsewhere")
    (place / "linked" / "circle").symlink_to(place)
    (place / "lost.png").symlink_to(tmp_path / "nothing")
    scan = os.scandir

    def scandir(path="."):
        if os.fspath(path) == str(place / "locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    status, output, error_stream = call("predict", place, "--model", saved, "--json")
    answer = json.loads(output)
    assert status == 1
    found = [entry["image"] for entry in answer["images"]]
    assert found == [str(place / "below" / "a.png"), str(place / "linked" / "a.png")]
    reasons = {entry["image"]: entry["error"] for entry in answer["skipped"]}
    assert "it is a link to nothing" in reasons[str(place / "lost.png")]
    assert "Permission denied" in reasons[str(place / "locked")]
    assert error_stream.count("skipped: ") == 2
    assert "2 of 4 images skipped" in error_stream


@pytest.mark.slow
def test_a_folder_of_which_nothing_can_be_read(call, saved, tmp_path):
    (tmp_path / "lost.png").symlink_to(tmp_path / "nothing")
    status, _, error_stream = call("predict", tmp_path, "--model", saved)
    assert status == 1 and f"{tmp_path}/lost.png cannot be read" in error_stream


@pytest.mark.slow
def test_names_that_are_no_text(call, saved, tmp_path):
    path = tmp_path / "caf\udce9.png"  # a byte that is not UTF-8, as Python shows it
    shutil.copy(COFFEE, path)
    (found,) = _document(call, path, "--model", saved)["images"]
    assert found["image"] == str(path)
    status, output, _ = call("predict", path, "--model", saved)
    assert status == 0 and "caf" in output


@pytest.mark.slow
def test_all_images_unreadable_is_status_1(call, saved, tmp_path):
    (tmp_path / "two\nlines.jpg").write_bytes(b"no image")
    status, output, error_stream = call("predict", tmp_path, "--model", saved)
    assert status == 1 and output == ""
    assert len(error_stream.splitlines()) == len(said(error_stream)) == 2


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_a_log_gets_lines(call, saved, monkeypatch):
    arguments = ("predict", COFFEE, CAT, "--model", saved, "--json")
    monkeypatch.setattr(cli.predict, "_LOG_SECONDS", 0)
    status, output, error_stream = call(*arguments)
    assert status == 0 and len(json.loads(output)["images"]) == 2
    assert said(error_stream)[-1] == "keras-coatnet: 2 of 2 images done"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, output, error_stream = call(*arguments)
    assert status == 0 and len(json.loads(output)["images"]) == 2
    assert "100%" in error_stream and "2/2" in error_stream and not said(error_stream)


@pytest.mark.slow
def test_an_interruption_is_one_line(call, saved, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "predict_images", interrupt)
    status, _, error_stream = call("predict", COFFEE, "--model", saved)
    assert status == 130 and error_stream == "keras-coatnet: interrupted\n"


# --- Mistakes --------------------------------------------------------------------------------

MISTAKES = {
    "unknown option": (["predict", COFFEE, "--size", "3"], "--size"),
    "top x": (["predict", COFFEE, "--top", "x"], "--top.*not 'x'"),
    "batch -1": (["predict", COFFEE, "--batch-size=-1"], "--batch.*not '-1'"),
    "crop share": (["predict", COFFEE, "--model", "SAVED", "--crop-pct", "2"], "--crop-pct"),
    "damaged model": (["predict", COFFEE, "--model", "DAMAGED"], "damaged.keras"),
    "offline": (["predict", COFFEE], "HF_HUB_OFFLINE"),
    "too few labels": (
        ["predict", COFFEE, "--model", "SAVED", "--labels", "LABELS"],
        "gives 2 names, and the model has 10 classes",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(call, saved, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "damaged.keras").write_bytes(b"no model")
    save_file({"stem.conv1.weight": np.ones(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    (tmp_path / "folder").mkdir()
    places = {
        "SAVED": saved,
        "DAMAGED": tmp_path / "damaged.keras",
        "FOREIGN": tmp_path / "foreign.safetensors",
        "LABELS": tmp_path / "labels.txt",
        "FOLDER": tmp_path / "folder",
    }
    arguments, message = MISTAKES[mistake]
    status, output, error_stream = call(*(places.get(word, word) for word in arguments))
    assert status == 2 and output == ""
    assert re.fullmatch(f"keras-coatnet: error: .*{message}.*\n", error_stream)


def test_the_default_model_exists():
    assert cli.predict.DEFAULT_MODEL in CHECKPOINTS
