"""A run meets an error, its user follows the advice of the message, and the run goes on.

All through the command line. What does not decide a run's result may change when it goes on.
"""

import json
import os
import pathlib
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_coatnet
from keras_coatnet.cli import main
from keras_coatnet.training.progress import Progress
from keras_coatnet.training.run.log import read_history
from tests.training import runs

pytestmark = [pytest.mark.tensorflow_only, pytest.mark.slow]  # each trains a network, some twice


class User:
    """Runs one command in one folder, each time with other options."""

    def __init__(self, folder: pathlib.Path, capfd: pytest.CaptureFixture, **changes: object):
        self.output = folder / "run"
        self.capfd = capfd
        self.command = [
            *("train", str(runs.write_small_recipe(folder, **changes))),
            *("--output", str(self.output)),
        ]

    def runs(self, *options: object, status: int = 0) -> str:
        """What the command said on the error stream."""
        assert main([*self.command, *map(str, options)]) == status
        said = self.capfd.readouterr().err
        assert "Traceback" not in said
        return said

    def recipe(self) -> dict[str, object]:
        return json.loads((self.output / "recipe.json").read_text())


def test_too_many_broken_images(tmp_path, capfd):
    user = User(tmp_path, capfd, unreadable_limit=2)
    for number in (0, 1, 2):
        (tmp_path / "digits" / str(number) / f"{number:04d}.png").write_bytes(b"no image")
    advice = user.runs(status=1)
    said = user.runs("--unreadable-limit", 50, "--keep-checkpoints", 5)
    assert "more than the limit of 2" in advice
    assert "`--unreadable-limit` on the command line" in advice
    assert (
        "going on with unreadable_limit 50 instead of 2, keep_checkpoints 5 instead of 3\n" in said
    )
    assert user.recipe()["unreadable_limit"] == 50

    # What decides the result may not change, and the message says which fields those are.
    said = user.runs("--seed", 1, "--unreadable-limit", 7, status=2)
    assert "holds another run, with seed=0. Give the same recipe" in said
    assert user.recipe()["unreadable_limit"] == 50

    # A damaged history can be moved away, as its message says.
    history = user.output / "history.csv"
    history.write_text(history.read_text() + "what is this\n")
    assert "Move the file away, or repair it." in user.runs(status=2)
    history.rename(tmp_path / "history.csv")
    assert "more than the limit of 1" in user.runs("--unreadable-limit", 1, status=2)
    assert "going on with unreadable_limit 50 instead of 1" in user.runs("--unreadable-limit", 50)


def test_a_loss_that_is_not_a_number(tmp_path, capfd):
    # A first step of enormous length; the second is not a number.
    user = User(tmp_path, capfd, learning_rate=1e29, global_clipnorm=None)
    advice = user.runs(status=1)
    said = user.runs("--on-nan", "skip")
    assert "the loss of step 2 is nan" in advice and "--on-nan skip" in advice
    assert "going on with on_nan skip instead of stop\n" in said
    assert "that batch skipped" in said
    assert json.loads((user.output / "summary.json").read_text())["skipped steps"] == 1


def test_a_device_that_is_too_small(tmp_path, capfd, monkeypatch):
    """One that holds 40 images at once, as long as blocks keep what they computed."""
    held: list[int] = []

    def call_in_little_memory(model: keras.Model, inputs, *arguments, **options):
        if inputs.shape[0] is not None:
            held.append(inputs.shape[0])
            if inputs.shape[0] > 40:
                text = f"OOM when allocating tensor with shape{inputs.shape}"
                raise tf.errors.ResourceExhaustedError(None, None, text)
        return super(keras_coatnet.model.CoAtNetModel, model).call(inputs, *arguments, **options)

    monkeypatch.setattr(
        keras_coatnet.model.CoAtNetModel, "call", call_in_little_memory, raising=False
    )
    user = User(tmp_path, capfd, held_out=0.5)  # 100 images of each part
    said = user.runs(status=1)
    assert (
        "the device is out of memory" in said
        and "with --gradient-accumulation-steps 2 (smaller parts)" in said
    )
    assert 80 in held
    held.clear()
    said = user.runs("--gradient-accumulation-steps", 2)
    assert "going on with gradient_accumulation_steps 2 instead of 1" in said
    assert set(held) == {40}  # the evaluation of 100 images, too
    assert len(read_history(user.output).evaluations) == 1


def test_a_run_that_is_interrupted_and_moved(tmp_path, capfd, monkeypatch):
    """Stopped by Ctrl-C; the images move, and another machine has less memory.

    As many images are unreadable as may be: they are the same ones where they lie now.
    """
    user = User(
        tmp_path, capfd, epochs=2, stochastic_depth=0.2, ema_momentum=0.9, unreadable_limit=2
    )
    for number in (0, 1):
        (tmp_path / "digits" / str(number) / f"{number:04d}.png").write_bytes(b"no image")
    step = Progress.update

    def update_and_interrupt(progress, number, figures):
        step(progress, number, figures)
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", update_and_interrupt)
        assert "stopped at step 2 of 4, which is saved" in user.runs(status=130)
    moved = (tmp_path / "digits").rename(tmp_path / "elsewhere")
    said = user.runs(
        *("--data", moved, "--gradient-accumulation-steps", 2, "--remat", "--evaluation-epochs", 2),
        *("--log-steps", 2, "--checkpoint-steps", 1),
    )
    assert "going on from step 2\n" in said
    assert f"data {moved} instead of {tmp_path / 'digits'}" in said
    assert "gradient_accumulation_steps 2 instead of 1, remat True instead of False" in said
    history = read_history(user.output)
    assert [row["step"] for row in history.training] == [1, 2, 4]
    assert [row["step"] for row in history.evaluations] == [4]
    assert np.isfinite([row["loss"] for row in history.training]).all()
    assert main(["evaluate", "--run", str(user.output), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert json.loads((user.output / "summary.json").read_text())["unreadable images"] <= 2
    assert found["top1"] == pytest.approx(history.evaluations[0]["validation_top1"])


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"conv_activation": "relu"}, "conv_activation='gelu_tanh'"),
        ({"widths": [16], "expansion": 2}, "widths=(8,), expansion=4"),
    ],
)
def test_a_network_that_is_edited_meanwhile_is_another(tmp_path, capfd, changes, difference):
    """The recipe names a file, which says something else when the run goes on."""
    user = User(tmp_path, capfd)
    user.runs()
    network = tmp_path / "tiny.json"
    before = network.read_text()
    network.write_text(json.dumps({**json.loads(before), **changes}))
    (line,) = user.runs(status=2).splitlines()[-1:]
    assert f"{user.output} holds a run of another network, with {difference}; {network}" in line
    network.write_text(before)
    user.runs()
