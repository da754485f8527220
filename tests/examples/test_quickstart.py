"""The quickstart as its users run it, in a process of its own."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_coatnet

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart.py"
FILES = ("model.keras", "saved_model", "classes.txt", "quickstart.png")

# What stands for CoAtNet-0 where the script runs in this process: most of a run is tracing.
SMALLEST = keras_coatnet.CoAtNetConfig(
    widths=(8, 16), depths=(1, 1), layout=("C", "T"), stem_width=8, head_dim=8
)

pytestmark = pytest.mark.tensorflow_only


@pytest.fixture
def quickstart():
    """The script as a module; its main function is not run."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments) -> subprocess.CompletedProcess:
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def served(folder: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """What the exported model says, after a look at the other files."""
    import tensorflow as tf

    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    model = tf.saved_model.load(folder / "saved_model")
    probabilities = model.serve(tf.constant(images, "float32")).numpy()
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-5)
    return probabilities


@pytest.mark.slow
def test_digits(tmp_path):
    """One epoch: all is written and agrees, but the accuracy is too low, which is said."""
    done = run("--epochs", 1, "--batch-size", 64, "--output", tmp_path)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("quickstart.py: error: the held-out accuracy is")
    assert "should be at least 98.00%" in last and "Traceback" not in done.stderr
    assert "1198 to train on, 599 held out" in done.stdout
    assert "Served without Keras  probabilities differ by at most" in done.stdout
    images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 1))
    reloaded = keras.models.load_model(tmp_path / "model.keras").predict_on_batch(images)
    np.testing.assert_allclose(served(tmp_path, images), reloaded, atol=1e-5)
    assert (tmp_path / "classes.txt").read_text().split() == list("0123456789")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Twelve reddish and twelve bluish images of several sizes."""
    noise = np.random.default_rng(0)
    for name, color, suffix in (("red", (200, 60, 60), "png"), ("blue", (60, 60, 200), "JPG")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = noise.normal(color, 30, (40 + number, 60 - number, 3)).clip(0, 255)
            path = tmp_path / "images" / name / f"{number}.{suffix}"
            file_format = "jpeg" if suffix == "JPG" else "png"
            keras.utils.save_img(path, pixels, scale=False, file_format=file_format)
    return tmp_path / "images"


def random_weights(make, path: pathlib.Path) -> pathlib.Path:
    """Weights of a network with its top, at 32 pixels, of a trained network's magnitude."""
    model = make(weights=None, input_shape=(32, 32, 3), classes=7)
    initializer = keras.initializers.GlorotUniform(seed=0)
    for variable in model.trainable_variables:
        if variable.path.endswith("kernel"):
            variable.assign(initializer(variable.shape))
    model.save_weights(path)
    return path


@pytest.mark.slow
def test_transfer_learning_on_a_folder(tmp_path, folder, quickstart, monkeypatch, capsys):
    """From weights in a file, frozen and then fine-tuned, by the smallest network of all."""
    make = functools.partial(keras_coatnet.CoAtNet, SMALLEST)
    monkeypatch.setattr(keras_coatnet, "CoAtNet0", make)
    weights = random_weights(make, tmp_path / "trained.weights.h5")
    arguments = (
        *("--images", folder, "--weights", weights, "--size", 64, "--batch-size", 4),
        *("--epochs", 15, "--fine-tune-epochs", 1, "--least-accuracy", 0.9),
        *("--output", tmp_path / "out"),
    )
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    quickstart.main()  # exits where the held-out accuracy is below 0.9
    printed = capsys.readouterr().out
    assert "Training for 15 epochs" in printed
    assert "Training all layers for 1 more epochs" in printed
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["blue", "red"]
    images = np.stack([np.full((64, 64, 3), color) for color in ((60, 60, 200), (200, 60, 60))])
    assert served(tmp_path / "out", images).argmax(-1).tolist() == [0, 1]


def test_frozen_backbone_of_transfer_learning(tmp_path, quickstart, monkeypatch):
    """Only the new head trains, and BatchNorm keeps its statistics."""
    make = functools.partial(keras_coatnet.CoAtNet, SMALLEST)
    monkeypatch.setattr(keras_coatnet, "CoAtNet0", make)
    weights = random_weights(make, tmp_path / "trained.weights.h5")
    args = argparse.Namespace(model="CoAtNet0", weights=str(weights), size=64)
    model, backbone = quickstart.transfer_model(args, 2)
    assert len(model.trainable_variables) == 4  # LayerNorm's two and the classifier's two
    before = backbone.get_weights()
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.train_on_batch(np.full((2, 64, 64, 3), 100.0), np.array([0, 1]))
    for was, became in zip(before, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(was, became)


@pytest.mark.slow
def test_weights_that_do_not_exist(tmp_path, folder):
    done = run("--images", folder, "--weights", tmp_path / "none.weights.h5", "--size", 32)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("quickstart.py: error:") and "none.weights.h5" in last


def make(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


PNG = b"\x89PNG and so on"
THREE = {f"a/{number}.png": PNG for number in range(3)}


@pytest.mark.parametrize(
    "files, said",
    [
        ({"a.png": PNG}, "at least two sub-folders, one a class. Found in FOLDER: none"),
        (THREE, "at least two sub-folders, one a class. Found in FOLDER: a"),
        ({"a/x.txt": b"", "b/y.txt": b""}, "at least 3 JPEG or PNG images. Found in FOLDER/a: 0"),
        ({**THREE, "b/y.txt": b""}, "at least 3 JPEG or PNG images. Found in FOLDER/b: 0"),
        (
            {**THREE, "b/0.jpg": b"RIFF", "b/1.jpg": PNG, "b/2.jpg": PNG},
            "FOLDER/b/0.jpg is no JPEG or PNG image",
        ),
    ],
    ids=["no class", "one class", "no images", "a class without images", "not an image"],
)
def test_bad_folders(tmp_path, files, said):
    check_refusal(run("--images", make(tmp_path, files)), said.replace("FOLDER", str(tmp_path)))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--images", "no_such_folder"], "Received: no_such_folder"),
        (["--size", "31"], "--size must be at least 32. Received: 31"),
        (["--images", ".", "--size", "16"], "--size must be at least 32. Received: 16"),
        (["--epochs", "0"], "--epochs must be at least 1. Received: 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--images", ".", "--model", "CoAtNet9"], "invalid choice: 'CoAtNet9'"),
        (["--images", ".", "--fine-tune-epochs", "-1"], "--fine-tune-epochs must be at least 0"),
        (["--weights", "imagenet"], "need --images FOLDER"),
        (["--output", str(SCRIPT)], "--output must be a folder"),
    ],
)
def test_bad_arguments(arguments, said):
    check_refusal(run(*arguments), said)


def check_refusal(done: subprocess.CompletedProcess, said: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("quickstart.py: error: ") and said in done.stderr


@pytest.mark.parametrize("module", ["keras", "keras_coatnet"])
def test_the_serving_process_has_no_keras(module, quickstart):
    first_two_lines = "\n".join(quickstart.SERVE.splitlines()[:2])
    command = [sys.executable, "-c", f"{first_two_lines}\nimport {module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"import of {module} halted" in done.stderr
