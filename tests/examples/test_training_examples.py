"""The training examples as their users run them, on data sets of a few images."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.training.named_recipes import FAMILIES, find_recipe
from tests.training import tars

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("train_imagenet", "finetune", "gashissdb")

SMALLEST = keras_coatnet.CoAtNetConfig(
    widths=(8, 16),
    depths=(1, 1),
    layout=("C", "T"),
    stem_width=8,
    head_dim=8,
    batch_norm_momentum=0.5,
)

pytestmark = pytest.mark.tensorflow_only


def load(name: str) -> types.ModuleType:
    """The script as a module; its main function is not run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(name: str, *arguments) -> None:
    load(name).main([str(argument) for argument in arguments])


@pytest.fixture
def smallest(tmp_path) -> pathlib.Path:
    path = tmp_path / "smallest.json"
    path.write_text(json.dumps(SMALLEST.to_dict()))
    return path


# --- ImageNet ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_imagenet_from_its_tars(tmp_path, smallest, capsys):
    """The paper's recipe, from a file that makes it small; and a batch that changes its rates."""
    tars.write_imagenet(tmp_path / "data")
    small = find_recipe("in1k_pretrain").replace(
        model=str(smallest),
        image_size=32,
        epochs=2,
        batch_size=16,
        learning_rate=1e-3,
        ema_momentum=0.9,
    )
    small.save(tmp_path / "small.json")
    arguments = ("--recipe", tmp_path / "small.json", "--data-dir", tmp_path / "data")
    arguments += (
        "--output",
        tmp_path / "run",
        "--batch-size",
        8,
        "--gradient-accumulation-steps",
        2,
    )
    main("train_imagenet", *arguments)
    printed = capsys.readouterr().out
    assert re.search(r"^learning_rate +0\.0005$", printed, re.M)
    assert re.search(r"^randaugment_magnitude +15\.0$", printed, re.M)
    assert re.search(r"^top1 +[01]\.?\d*$", printed, re.M)
    assert "more classes" in printed  # ten of a thousand are shown
    model = keras_coatnet.CoAtNet(SMALLEST, weights=tmp_path / "run" / "final.weights.h5")
    assert model.output_shape == (None, 1000)
    assert model.input_shape == (None, 32, 32, 3)


# --- One's own images --------------------------------------------------------------------------


@pytest.mark.slow
def test_finetuning_on_a_folder(tmp_path, smallest, capsys):
    """From weights for other classes; reloaded, tried, and served by TensorFlow alone."""
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    before = keras_coatnet.CoAtNet(SMALLEST, weights=None, input_shape=(32, 32, 3), classes=7)
    before.save_weights(tmp_path / "before.weights.h5")
    folder = tars.write_classes(tmp_path / "images", {"ash": 20, "birch": 20})
    output = tmp_path / "run"
    arguments = (folder, "--model", smallest, "--weights", tmp_path / "before.weights.h5")
    arguments += (
        "--size",
        32,
        "--batch-size",
        8,
        "--epochs",
        2,
        "--freeze",
        "stem",
        "--output",
        output,
    )
    main("finetune", *arguments)
    printed = capsys.readouterr().out
    found = json.loads((output / "summary.json").read_text())
    assert f"Reloaded weights: {found['top1']:.2%} of the held-out images" in printed
    assert re.search(r"^images to validate on +8$", printed, re.M)
    assert (output / "classes.txt").read_text().split() == ["ash", "birch"]

    pixels = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype("float32")
    after = keras_coatnet.CoAtNet(SMALLEST, weights=output / "final.weights.h5")
    loaded = tf.saved_model.load(output / "saved_model")
    served = loaded.serve(pixels).numpy()
    np.testing.assert_allclose(served, after.predict_on_batch(pixels), atol=1e-5)
    np.testing.assert_allclose(served.sum(-1), 1.0, atol=1e-5)
    for old, new in zip(before.weights, after.weights, strict=True):
        if old.path.startswith("stem") and "kernel" in old.path:
            np.testing.assert_array_equal(old.numpy(), new.numpy())


# --- GasHisSDB -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:GasHisSDB/160 has")  # a few images, where many are published
def test_gashissdb_beside_the_published_figures(tmp_path, smallest, capsys):
    tars.write_gashissdb(tmp_path / "data", {"Abnormal": 20, "Normal": 20})
    arguments = ("--model", smallest, "--data-dir", tmp_path / "data", "--output", tmp_path / "run")
    main("gashissdb", *arguments, "--image-size", 32, "--batch-size", 8, "--epochs", 2)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"{found['count']} held-out patches   ours   published" in printed
    for name, published in (("accuracy", 98.74), ("f1", 99.38), ("precision", 99.97)):
        shown = re.search(rf"^{name} +(\S+) +{published}$", printed, re.M)
        ours = "nan" if found[name] is None else f"{100 * found[name]:.2f}"
        assert shown[1] == ours
        assert str(published) in FAMILIES["gashissdb"].about
    assert "split that is not published" in printed
    saved = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert saved["positive_class"] == "Abnormal"


# --- All of them ---------------------------------------------------------------------------------


def run(name: str, *arguments) -> subprocess.CompletedProcess:
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("name", NAMES)
def test_help_and_length(name):
    done = run(name, "--help")
    assert done.returncode == 0 and f"python examples/{name}.py" in done.stdout
    lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 120


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("train_imagenet", ["--batch-size", "many"], "invalid int value: 'many'"),
        ("finetune", [], "required: FOLDER"),
        ("gashissdb", ["--positive", "Normal"], "unrecognized arguments"),
    ],
)
def test_arguments_that_cannot_be_read(name, arguments, said):
    done = run(name, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{name}.py: error: ") and said in done.stderr


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("train_imagenet", ["--model", "coatnet7"], "has no values for the model 'coatnet7'"),
        ("train_imagenet", ["--recipe", "in2k"], "There is no recipe 'in2k'"),
        ("train_imagenet", ["--data-dir", "TMP/empty"], "ILSVRC2012_img_train.tar"),
        ("finetune", ["TMP/nothing"], "TMP/nothing does not exist"),
        ("finetune", ["TMP", "--freeze", "all"], "`freeze` must be one of"),
        ("finetune", ["TMP", "--size", "16"], "`image_size` must be from 32 to 4096"),
        ("gashissdb", ["--data-dir", "TMP/empty"], "GasHisSDB.zip"),
        ("gashissdb", ["--image-size", "16"], "`image_size` must be from 32 to 4096"),
    ],
)
def test_mistakes(name, arguments, said, tmp_path, capsys):
    arguments = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(name, "--output", tmp_path / "run", *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.splitlines()[-1].startswith(f"{name}.py: error: ")
    assert said.replace("TMP", str(tmp_path)) in error.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_cannot_go_on(name, tmp_path, monkeypatch, capsys):
    from keras_coatnet.training.run import loop

    interrupted = loop.Stopped("at step 3", signal.SIGINT)
    for error, status in (
        (loop.TrainingError("nan"), 1),
        (loop.Stopped("at step 3"), 143),
        (interrupted, 130),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(loop, "train", fail)
        with pytest.raises(SystemExit) as stopped:
            main(name, *([tmp_path] if name == "finetune" else []))
        assert stopped.value.code == status
        assert capsys.readouterr().err == f"{name}.py: error: {error}\n"
