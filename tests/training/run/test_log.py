"""Rows of a run, in CSV files and as TensorBoard events."""

from __future__ import annotations

import math
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from keras_coatnet.training.run.log import RunLog, read_history

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


@pytest.mark.slow
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
