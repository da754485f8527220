"""The quickstart as its users run it, in a process of its own."""

from __future__ import annotations

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

pytestmark = pytest.mark.tensorflow_only


def run(*arguments) -> subprocess.CompletedProcess:
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def check_output(folder: pathlib.Path, pictures: np.ndarray) -> keras.Model:
    """All files are there, and the two saved models say the same."""
    import tensorflow as tf

    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    reloaded = keras.models.load_model(folder / "model.keras")
    served = tf.saved_model.load(folder / "saved_model").serve(tf.constant(pictures)).numpy()
    np.testing.assert_allclose(served.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(served, reloaded.predict_on_batch(pictures), atol=1e-5)
    return reloaded


@pytest.mark.slow
def test_digits(tmp_path):
    """One epoch: all is written and agrees, but the accuracy is too low, which is said."""
    done = run("--epochs", 1, "--batch", 64, "--output", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("quickstart.py: error: the held-out accuracy is")
    assert "should be at least 98.00%" in last and "Traceback" not in done.stderr
    assert "1198 to train on, 599 held out" in done.stdout
    assert "Served without Keras  probabilities differ by at most" in done.stdout
    pictures = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 1)).astype("float32")
    check_output(tmp_path / "out", pictures)
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list("0123456789")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Twelve reddish and twelve bluish pictures of several sizes."""
    noise = np.random.default_rng(0)
    for name, colour, suffix in (("red", (200, 60, 60), "png"), ("blue", (60, 60, 200), "JPG")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            pixels = noise.normal(colour, 30, (40 + number, 60 - number, 3)).clip(0, 255)
            path = tmp_path / "pictures" / name / f"{number}.{suffix}"
            file_format = "jpeg" if suffix == "JPG" else "png"
            keras.utils.save_img(path, pixels, scale=False, file_format=file_format)
    return tmp_path / "pictures"


@pytest.fixture
def weights(tmp_path) -> pathlib.Path:
    """Weights of a CoAtNet-0 at 32 pixels, random but of a trained network's magnitude."""
    model = keras_coatnet.CoAtNet0(
        weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3)
    )
    initializer = keras.initializers.GlorotUniform(seed=0)
    for variable in model.trainable_variables:
        if variable.path.endswith("kernel"):
            variable.assign(initializer(variable.shape))
    model.save_weights(tmp_path / "backbone.weights.h5")
    return tmp_path / "backbone.weights.h5"


@pytest.mark.slow
def test_transfer_learning_on_a_folder(tmp_path, folder, weights):
    done = run(
        *("--images", folder, "--weights", weights, "--size", 64, "--batch", 8),
        *("--epochs", 12, "--fine-tune-epochs", 1, "--least-accuracy", 0.9),
        *("--output", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "Training all layers for 1 more epochs" in done.stdout
    pictures = np.stack([np.full((64, 64, 3), colour) for colour in ((60, 60, 200), (200, 60, 60))])
    model = check_output(tmp_path / "out", pictures.astype("float32"))
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["blue", "red"]
    assert model.predict_on_batch(pictures).argmax(-1).tolist() == [0, 1]


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
        ({"a/x.txt": b"", "b/y.txt": b""}, "at least 3 JPEG or PNG pictures. Found in FOLDER/a: 0"),
        ({**THREE, "b/y.txt": b""}, "at least 3 JPEG or PNG pictures. Found in FOLDER/b: 0"),
        (
            {**THREE, "b/0.jpg": b"RIFF", "b/1.jpg": PNG, "b/2.jpg": PNG},
            "FOLDER/b/0.jpg is no JPEG or PNG picture",
        ),
    ],
    ids=["no class", "one class", "no pictures", "a class without pictures", "not a picture"],
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
def test_the_serving_process_has_no_keras(module):
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    first_two_lines = "\n".join(quickstart.SERVE.splitlines()[:2])
    command = [sys.executable, "-c", f"{first_two_lines}\nimport {module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"import of {module} halted" in done.stderr
