"""Rows of a run, its line of progress, its images and its summary."""

from __future__ import annotations

import builtins
import io
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from keras_coatnet.training.evaluation import plots
from keras_coatnet.training.run import log
from keras_coatnet.training.run.log import Progress, RunLog, read_history, summary

pytestmark = pytest.mark.tensorflow_only  # the event files are TensorFlow's


def _log(folder, steps, resume_step=None, **changes) -> None:
    """Logs these steps, and an evaluation at every fourth."""
    with RunLog(folder, resume_step=resume_step) as log:
        for step in steps:
            row = {"loss": 1 / step, "learning_rate": 1e-3 * step, "gradient_norm": 0.1, **changes}
            log.train(step=step, epoch=step / 8, **row)
            if step % 4 == 0:
                log.evaluation(step=step, loss=2 / step, top1=step / 100, top5=None)


def _events(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in the event files."""
    import tensorflow as tf

    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                number = float(tf.make_ndarray(value.tensor))
                found.setdefault(value.tag, []).append((event.step, number))
    return found


# --- Rows ------------------------------------------------------------------------------------


def test_rows_come_back_with_all_their_digits(tmp_path):
    third = np.float32(1) / np.float32(3)
    with RunLog(tmp_path, resume_step=None) as log:
        log.train(step=1, epoch=0.5, loss=third, learning_rate=1 / 3)
        log.train(step=2, epoch=1, loss=float("nan"), learning_rate=1e-30, images_per_second=7.5)
        log.evaluation(step=2, loss=third, top1=0.25, top5=None)
    training, evaluations = read_history(tmp_path)
    assert training[0] == {
        "step": 1,
        "epoch": 0.5,
        "loss": float(third),
        "learning_rate": 1 / 3,
        "gradient_norm": None,
        "images_per_second": None,
    }
    assert math.isnan(training[1]["loss"]) and training[1]["learning_rate"] == 1e-30
    assert evaluations == [
        {
            "step": 2,
            "validation_loss": float(third),
            "validation_top1": 0.25,
            "validation_top5": None,
        }
    ]
    assert (tmp_path / "history.csv").read_text().splitlines()[0] == (
        "step,epoch,loss,learning_rate,gradient_norm,images_per_second"
    )


def test_a_new_run_replaces_an_old_one_and_no_run_has_no_rows(tmp_path):
    _log(tmp_path, range(1, 9))
    _log(tmp_path, range(1, 3))
    assert [row["step"] for row in read_history(tmp_path).training] == [1, 2]
    assert read_history(tmp_path).evaluations == []
    assert {step for step, _ in _events(tmp_path)["loss"]} == {1, 2}
    assert read_history(tmp_path / "nothing") == ([], [])


def test_tensorboard_gets_the_same_numbers(tmp_path):
    _log(tmp_path, range(1, 9))
    found = _events(tmp_path)
    np.testing.assert_allclose(found["loss"], [(step, 1 / step) for step in range(1, 9)], 1e-6)
    np.testing.assert_allclose(found["validation_top1"], [(4, 0.04), (8, 0.08)], 1e-6)
    assert "images_per_second" not in found and "validation_top5" not in found


@pytest.mark.parametrize("cut", [0, 1, 20], ids="whole-no_newline-half_a_line".split("-"))
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path, cut):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _log(whole, range(1, 21))
    _log(killed, range(1, 14))
    if cut:
        for name in ("history.csv", "evaluations.csv"):
            content = (killed / name).read_bytes()
            (killed / name).write_bytes(content[:-cut])
    _log(killed, range(11, 21), resume_step=10)
    for name in ("history.csv", "evaluations.csv"):
        assert (killed / name).read_text() == (whole / name).read_text()
    assert _events(killed) == _events(whole)
    assert not list(killed.glob(".*"))


def test_a_run_may_go_on_from_before_its_first_row_or_without_files(tmp_path):
    _log(tmp_path, range(5, 9))
    _log(tmp_path, range(3, 5), resume_step=2)
    assert [row["step"] for row in read_history(tmp_path).training] == [3, 4]
    _log(tmp_path / "new", range(3, 5), resume_step=2)
    assert [row["step"] for row in read_history(tmp_path / "new").training] == [3, 4]


def test_a_killed_run_keeps_every_row(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from keras_coatnet.training.run.log import RunLog\n"
        "log = RunLog(sys.argv[1], resume_step=None)\n"
        "for step in range(1, 6):\n"
        "    log.train(step=step, epoch=0.5, loss=1.0, learning_rate=0.1)\n"
        "log.evaluation(step=5, top1=0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    history = read_history(tmp_path)
    assert [row["step"] for row in history.training] == [1, 2, 3, 4, 5]
    assert history.evaluations == [{"step": 5, "validation_top1": 0.5}]
    assert [step for step, _ in _events(tmp_path)["loss"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", ["9,1.0,what,1,1,1", "x,1,1,1,1,1", "9,1,1", "9,1,1,1,1,1,1,1"])
def test_a_damaged_file_is_named_and_kept(tmp_path, line):
    _log(tmp_path, range(1, 3))
    path = tmp_path / "history.csv"
    damaged = path.read_text() + line + "\n"
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"Line 4 of .*history\.csv"):
        RunLog(tmp_path, resume_step=2)
    assert path.read_text() == damaged


def test_other_metrics_than_before_are_refused(tmp_path):
    with RunLog(tmp_path, resume_step=None) as log:
        log.evaluation(step=1, top1=0.5)
        with pytest.raises(ValueError, match=r"evaluations\.csv has the columns.*validation_f1"):
            log.evaluation(step=2, top1=0.5, f1=0.5)
    assert len(read_history(tmp_path).evaluations) == 1


# --- Progress --------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What a terminal shows: text after a carriage return overwrites the line."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _run(progress: Progress, clock: _Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, f"epoch {step / 100:.2f}  loss {7 / step:.4f}  lr 1.00e-03")


def test_a_terminal_shows_one_line():
    clock, terminal = _Clock(), _Terminal()
    progress = Progress(20_000, 64, terminal, clock=clock)
    _run(progress, clock, range(1, 101), 0.5)
    expected = "step 100/20,000  epoch 1.00  loss 0.0700  lr 1.00e-03  128 images/s  2:45:50 left"[
        :79
    ]
    assert terminal.screen() == [expected]
    progress.close()
    progress.close()
    assert terminal.screen() == [expected, ""]


def test_a_wide_terminal_shows_all_of_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    clock, terminal = _Clock(), _Terminal()
    _run(Progress(20_000, 64, terminal, clock=clock), clock, range(1, 101), 0.5)
    assert terminal.screen()[0].endswith("128 images/s  2:45:50 left")


def test_a_terminal_is_not_rewritten_at_every_step():
    clock, terminal = _Clock(), _Terminal()
    _run(Progress(1001, 1, terminal, clock=clock), clock, range(1, 1001), 0.001)
    assert 9 <= terminal.getvalue().count("\r") <= 11


def test_a_shorter_line_leaves_nothing_of_a_longer_one():
    clock, terminal = _Clock(), _Terminal()
    progress = Progress(9, 1, terminal, clock=clock)
    progress.update(1, f"loss {123456.0:.4f}")
    clock.now += 1
    progress.update(1, f"loss {1.0:.4f}")
    assert terminal.screen() == ["step 1/9  loss 1.0000"]


def test_a_message_stands_above_the_line():
    clock, terminal = _Clock(), _Terminal()
    progress = Progress(9, 1, terminal, clock=clock)
    progress.message("first")
    progress.update(1, f"loss {1.0:.4f}")
    progress.message("top-1 50%\nsaved")
    line = "step 1/9  loss 1.0000"
    assert terminal.screen() == ["first", "top-1 50%", "saved", line]


def test_elsewhere_a_line_every_ten_seconds_and_the_last():
    clock, file = _Clock(), io.StringIO()
    progress = Progress(95, 8, file, clock=clock)
    _run(progress, clock, range(1, 96), 0.5)
    progress.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/95", "21/95", "41/95", "61/95", "81/95"] + [
        "95/95"
    ]
    assert "images/s" not in lines[0]
    assert lines[1].endswith("16 images/s  0:00:37 left") and lines[-1].endswith("0:00:00 left")


def test_the_speed_is_that_of_the_last_half_minute():
    clock = _Clock()
    progress = Progress(10_000, 10, io.StringIO(), clock=clock)
    assert progress.images_per_second is None
    _run(progress, clock, range(501, 511), 20.0)
    assert progress.images_per_second == pytest.approx(0.5)
    _run(progress, clock, range(511, 611), 1.0)
    assert progress.images_per_second == pytest.approx(10.0)


def test_going_back_measures_anew():
    clock = _Clock()
    progress = Progress(10_000, 10, io.StringIO(), clock=clock)
    _run(progress, clock, range(501, 551), 1.0)
    progress.restart()
    _run(progress, clock, range(401, 402), 1.0)
    assert progress.images_per_second is None
    _run(progress, clock, range(402, 404), 2.0)
    assert progress.images_per_second == pytest.approx(5.0)


def test_a_pause_does_not_count():
    clock = _Clock()
    progress = Progress(10_000, 10, io.StringIO(), clock=clock)
    _run(progress, clock, range(1, 11), 1.0)
    with progress.paused():
        clock.now += 500
    _run(progress, clock, range(11, 21), 1.0)
    assert progress.images_per_second == pytest.approx(10.0)


# --- Images --------------------------------------------------------------------------------


def _pixels(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _share_of(pixels: np.ndarray, color: str) -> float:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels.astype(int) - wanted).max(axis=-1) < 8).mean())


def test_the_learning_curve_shows_all_that_was_logged(tmp_path):
    _log(tmp_path, range(1, 301))
    assert plots.learning_curve(tmp_path) == tmp_path / "curves.png"
    full = _pixels(tmp_path / "curves.png")
    for color in plots._COLORS[:2]:
        assert _share_of(full, color) > 1e-3
    assert not list(tmp_path.glob(".*"))
    _log(tmp_path, range(1, 4))  # no evaluation, no smoothing
    plots.learning_curve(tmp_path)
    short = _pixels(tmp_path / "curves.png")
    assert short.shape[0] < full.shape[0] and _share_of(short, plots._COLORS[1]) == 0


def test_curves_with_nan_and_of_a_run_without_rows(tmp_path):
    with pytest.raises(ValueError, match="no row of training"):
        plots.learning_curve(tmp_path)
    with RunLog(tmp_path, resume_step=None) as log:
        for step in (1, 2):
            log.train(step=step, epoch=1, loss=float("nan"), learning_rate=0.0)
            log.evaluation(step=step, top1=float("nan"))
    assert plots.learning_curve(tmp_path).exists()


@pytest.mark.parametrize("number", [2, 12, 13, 40, 41, 300])
def test_confusion_images_of_all_sizes(tmp_path, number):
    rng = np.random.default_rng(0)
    matrix = np.diag(rng.integers(1, 50, number)) + rng.integers(0, 2, (number, number))
    path = plots.confusion(matrix, [f"class {i}" for i in range(number)], tmp_path / "c.png")
    pixels = _pixels(path)
    assert min(pixels.shape[:2]) > number
    # Blue cells, and more of them on the diagonal.
    assert (pixels[..., 2].astype(int) - pixels[..., 0] > 60).mean() > 1e-3


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
    _log(tmp_path, range(1, 3))
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"keras-coatnet\[training\]"):
        plots.learning_curve(tmp_path)


# --- Summary ---------------------------------------------------------------------------------


def test_summary_aligns_and_writes_numbers_for_readers(tmp_path):
    path = tmp_path / "best.weights.h5"
    rows = [("parameters", 24_000_000), ("top-1", 0.812345), ("saved", path), ("resumed", False)]
    assert summary([*rows, ("time", log.hours(90061)), ("f1", None)]).splitlines() == [
        "parameters  24,000,000",
        "top-1       0.8123",
        f"saved       {path}",
        "resumed     False",
        "time        25:01:01",
        "f1          -",
    ]
    assert summary({}) == ""


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
