"""The plots of a run and of an evaluation."""

import builtins
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from keras_coatnet.training.evaluation import plots


def _history(steps: range) -> tuple[list[plots.Row], list[plots.Row]]:
    """A run of these steps, evaluated at every fourth."""
    return (
        [{"step": n, "epoch": n / 8, "loss": 1 / n, "learning_rate": 1e-3 * n} for n in steps],
        [
            {"step": n, "validation_loss": 2 / n, "validation_top1": n / 100}
            for n in steps
            if n % 4 == 0
        ],
    )


def _pixels(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _share_of(pixels: np.ndarray, color: str) -> float:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels.astype(int) - wanted).max(axis=-1) < 8).mean())


@pytest.mark.slow
def test_the_learning_curve_shows_all_that_was_logged(tmp_path):
    path = tmp_path / "curves.png"
    assert plots.learning_curve(*_history(range(1, 301)), path) == path
    full = _pixels(path)
    for color in plots._COLORS[:2]:
        assert _share_of(full, color) > 1e-3
    assert not list(tmp_path.glob(".*"))
    short = _pixels(plots.learning_curve(*_history(range(1, 4)), path))  # no evaluation
    assert short.shape[0] < full.shape[0] and _share_of(short, plots._COLORS[1]) == 0


@pytest.mark.slow
def test_curves_with_nan_and_of_a_run_without_rows(tmp_path):
    with pytest.raises(ValueError, match="no row of training"):
        plots.learning_curve([], [], tmp_path / "curves.png")
    nan = float("nan")
    rows = [{"step": step, "loss": nan, "learning_rate": 0.0} for step in (1, 2)]
    evaluations = [{"step": step, "validation_top1": nan} for step in (1, 2)]
    assert plots.learning_curve(rows, evaluations, tmp_path / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 12, 13, 40, 41, 300])
def test_confusion_images_of_all_sizes(tmp_path, number):
    rng = np.random.default_rng(0)
    matrix = np.diag(rng.integers(1, 50, number)) + rng.integers(0, 2, (number, number))
    path = plots.confusion(matrix, [f"class {i}" for i in range(number)], tmp_path / "c.png")
    pixels = _pixels(path)
    assert min(pixels.shape[:2]) > number
    # Blue cells, and more of them on the diagonal.
    assert (pixels[..., 2].astype(int) - pixels[..., 0] > 60).mean() > 1e-3


@pytest.mark.slow
def test_an_empty_class_has_a_color_of_its_own(tmp_path):
    names = ["a", "b", "c"]
    full = plots.confusion(np.eye(3, dtype=int), names, tmp_path / "full.png")
    empty = plots.confusion(np.diag([1, 0, 1]), names, tmp_path / "empty.png")
    assert _share_of(_pixels(full), "#f0e6dc") == 0
    assert _share_of(_pixels(empty), "#f0e6dc") > 0.05


def test_a_matrix_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and 2 names"):
        plots.confusion(np.ones((2, 3)), ["a", "b"], tmp_path / "c.png")


def test_images_say_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"keras-coatnet\[training\]"):
        plots.learning_curve(*_history(range(1, 3)), tmp_path / "curves.png")


@pytest.mark.filterwarnings("error")
def test_classes_whose_letters_the_font_lacks_are_drawn(tmp_path):
    plots.confusion(np.eye(2, dtype=int), ["猫", "犬"], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_nothing_is_left_behind_where_an_image_fails(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        plots.confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "c.png")
    assert not list(tmp_path.iterdir())
