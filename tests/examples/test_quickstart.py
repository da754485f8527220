"""The quickstart on its digits, for one epoch; `.ci/run` runs it as a whole."""

from __future__ import annotations

import argparse
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.examples import scripts

pytestmark = pytest.mark.tensorflow_only


@pytest.mark.slow
def test_one_epoch(tmp_path, capsys):
    """All is written and agrees, but the accuracy is too low, which is said."""
    import tensorflow as tf

    quickstart = scripts.load("quickstart")
    with pytest.raises(ValueError, match=r"the accuracy is .*%. Expected: 98% or more"):
        quickstart.main(argparse.Namespace(epochs=1, output=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "Reloaded model        probabilities differ by at most" in printed
    assert "Served without Keras  probabilities differ by at most" in printed
    assert (tmp_path / "out" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 1)).astype("float32")
    reloaded = keras.saving.load_model(tmp_path / "out" / "model.keras").predict_on_batch(images)
    exported = tf.saved_model.load(tmp_path / "out" / "saved_model")
    served = exported.serve(images).numpy()
    np.testing.assert_allclose(served, reloaded, atol=1e-5)
    np.testing.assert_allclose(served.sum(-1), 1.0, atol=1e-5)


def test_two_thirds_of_the_digits_are_for_training():
    train_images, images, train_labels, labels = scripts.load("quickstart").load_data()
    assert train_images.shape == (1198, 32, 32, 1) and images.shape == (599, 32, 32, 1)
    assert train_images.min() >= 0 and 250 < train_images.max() <= 255
    shares = np.bincount(train_labels) / np.bincount(labels)
    np.testing.assert_allclose(shares, 2, atol=0.1)


@pytest.mark.slow
def test_a_saved_model_that_predicts_something_else_is_told(tmp_path, monkeypatch):
    quickstart = scripts.load("quickstart")
    monkeypatch.setattr(quickstart, "fit", lambda *args: None)
    monkeypatch.setattr(quickstart.keras.Model, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(quickstart, "serve", lambda folder, images: np.full((599, 10), np.nan))
    with pytest.raises(ValueError, match="Served without Keras: probabilities differ by"):
        quickstart.main(argparse.Namespace(epochs=1, output=tmp_path))


@pytest.mark.parametrize("module", ["keras", "keras_coatnet"])
def test_the_server_has_no_keras(module):
    first_line = scripts.load("quickstart").SERVER.splitlines()[0]
    command = [sys.executable, "-c", f"{first_line}\nimport {module}"]
    done = subprocess.run(command, cwd=scripts.ROOT, capture_output=True, text=True)
    assert done.returncode and f"import of {module} halted" in done.stderr
