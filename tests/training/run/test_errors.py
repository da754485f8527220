"""Nothing is lost: runs that are killed, damaged, starved and misled come to the same numbers."""

import dataclasses
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from keras_coatnet.cli import main
from keras_coatnet.training import open_datasets, progress
from keras_coatnet.training.data.records import LABEL_ERROR
from keras_coatnet.training.data.unreadable import UnreadableImages
from keras_coatnet.training.engine.tensorflow import TensorFlowEngine
from keras_coatnet.training.errors import explain_errors
from keras_coatnet.training.progress import Progress
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run import log, loop
from keras_coatnet.training.run.checkpoints import CheckpointFolder
from keras_coatnet.training.run.signals import Stopped, on_stop_signals
from keras_coatnet.training.run.train import memory_advice, train
from tests.training import faults, runs

pytestmark = [
    pytest.mark.tensorflow_only,
    pytest.mark.slow,
    pytest.mark.xdist_group("faults"),  # they share a run
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
    return runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    train(Recipe.load(recipe), folder)
    return folder


@pytest.fixture
def alone(whole, tmp_path) -> pathlib.Path:
    """A copy of that folder."""
    return shutil.copytree(whole, tmp_path / "copy")


# --- Killed, told to stop ---------------------------------------------------------------------


def test_killed_twice_and_told_to_stop_it_loses_nothing(recipe, whole, tmp_path):
    # What does not decide the result may be another each time.
    command = runs.command(recipe, tmp_path)
    other = runs.command(recipe, tmp_path, "--unreadable-limit", "50", "--keep-checkpoints", "4")
    random = np.random.default_rng()
    steps, delay = int(random.integers(1, 9)), random.uniform(0, 0.1)
    first = faults.kill(command, tmp_path, steps, delay)
    second = faults.kill(other, tmp_path, 1, delay=None)
    print(f"killed after {steps} steps and {delay:.3f} s: {first}, and while it saved: {second}")
    assert first is not None and second is not None and second.begun_at <= first.reached
    with faults.Run(command, tmp_path) as run:
        begun = run.wait_for_begin()
        run.wait_for_step(begun + 2)
        run.send(signal.SIGTERM)
        assert run.wait() == 143, run.text()
        last_line = run.text().splitlines()[-1]
    (step, *_) = CheckpointFolder(tmp_path / "checkpoints").steps()[::-1]
    assert begun + 2 <= step == faults.logged(tmp_path)
    assert last_line == (
        f"keras-coatnet: stopped at step {step} of 30, which is saved; the same command goes on"
    )
    assert Recipe.load(tmp_path / "recipe.json").unreadable_limit == 10
    train(Recipe.load(recipe).replace(unreadable_limit=50), tmp_path)
    assert Recipe.load(tmp_path / "recipe.json").unreadable_limit == 50
    assert runs.outcome(tmp_path) == runs.outcome(whole)


def at_step(monkeypatch, wanted: int, act) -> None:
    """Calls a function when the figures of a step are known, each time."""
    update = Progress.update

    def update_and_act(progress: Progress, step: int, figures: str) -> None:
        update(progress, step, figures)
        if step == wanted:
            act()

    monkeypatch.setattr(Progress, "update", update_and_act)


def test_ctrl_c_saves_and_ends_with_its_own_status(tmp_path, capfd):
    recipe = runs.write_small_recipe(tmp_path, epochs=2)
    command = ["train", str(recipe), "--output", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(command) == 130
    assert capfd.readouterr().err.splitlines()[-1] == (
        "keras-coatnet: stopped at step 2 of 4, which is saved; the same command goes on"
    )
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").newest().step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(command) == 0
    assert "going on from step 2" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once():
    seen = []
    with pytest.raises(KeyboardInterrupt), on_stop_signals(seen.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert seen == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert len(seen) == 3 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_shells_background_job_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_stop_signals(lambda number: pytest.fail("it was ignored")):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_off_the_main_thread_and_a_second_one_in_its_folder(tmp_path, monkeypatch, capfd):
    recipe = runs.write_small_recipe(tmp_path)
    command = ["train", str(recipe), "--output", str(tmp_path / "run")]
    results, refused = [], []
    at_step(monkeypatch, 1, lambda: refused.append((main(command), capfd.readouterr().err)))
    thread = threading.Thread(
        target=lambda: results.append(train(Recipe.load(recipe), tmp_path / "run"))
    )
    thread.start()
    thread.join()
    ((status, said),) = refused
    assert status == 2
    assert f"error: Another run is writing to {tmp_path / 'run'}: process {os.getpid()} on" in said
    assert results[0].figures["steps"] == 2


def test_a_stop_at_the_end_of_an_epoch_loses_no_evaluation(recipe, whole, alone, monkeypatch):
    (alone / "checkpoints" / "step-00000030.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_stop_wanted", lambda run, logs: run.step == 30)
        with pytest.raises(Stopped, match="step 30 of 30"):
            train(Recipe.load(recipe), alone)
    train(Recipe.load(recipe), alone)
    assert runs.outcome(alone) == runs.outcome(whole)


# --- Out of memory ----------------------------------------------------------------------------


def jax_error(text: str) -> Exception:
    import jax

    return jax.errors.JaxRuntimeError(text)


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[64]"),
        tf.errors.InternalError(None, None, "Dst tensor is not initialized."),
        jax_error("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."),
        MemoryError("Unable to allocate 3.2 GiB for an array"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line_that_says_what_helps(tmp_path, capfd, monkeypatch, error):
    recipe = runs.write_small_recipe(tmp_path)

    def train_step(engine: TensorFlowEngine, batches: object) -> None:
        raise error

    monkeypatch.setattr(TensorFlowEngine, "train_step", train_step)
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 1
    assert error_line(capfd) == (
        "keras-coatnet: error: the device is out of memory. Start the same command with "
        "--gradient-accumulation-steps 2 (smaller parts) or --remat (computes blocks twice) to go "
        "on. In another output folder, --dtype-policy mixed_bfloat16 or a smaller --batch-size or "
        "--image-size helps, too."
    )


def test_only_what_can_still_help_is_named():
    recipe = Recipe(batch_size=96, gradient_accumulation_steps=4, mixup=0.8)
    assert "--gradient-accumulation-steps 6 " in memory_advice(recipe, replicas=1)
    assert "--gradient-accumulation-steps 8 " in memory_advice(recipe, replicas=6)
    recipe = recipe.replace(remat=True, dtype_policy="mixed_bfloat16")
    assert memory_advice(recipe, replicas=12) == (
        "In another output folder, a smaller --batch-size or --image-size helps, too."
    )


def test_an_evaluation_that_fails_costs_no_step(recipe, whole, tmp_path, monkeypatch, capfd):
    def evaluate(*arguments: object, **options: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    command = ["train", str(recipe), "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_engine", evaluate)
        for _ in range(2):
            assert main(command) == 1
            assert "out of memory" in error_line(capfd)
            assert CheckpointFolder(tmp_path / "checkpoints").newest().step == 10
            assert faults.logged(tmp_path) == 10
    assert main(command) == 0
    assert runs.outcome(tmp_path) == runs.outcome(whole)


# --- Damaged checkpoints, a full disk ---------------------------------------------------------


def test_damaged_checkpoints_are_passed_over(recipe, whole, alone):
    folder = CheckpointFolder(alone / "checkpoints")
    assert folder.steps() == [24, 28, 30]
    newest, second = (folder.path / f"step-{step:08}.safetensors" for step in (30, 28))
    newest.write_bytes(newest.read_bytes()[:-1000])
    content = bytearray(second.read_bytes())
    content[-1000] ^= 1
    second.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged .*; falling back") as warnings:
        train(Recipe.load(recipe), alone)
    named = [str(warning.message) for warning in warnings if "damaged" in str(warning.message)]
    assert [str(path) in text for path, text in zip((newest, second), named, strict=True)]
    assert runs.outcome(alone) == runs.outcome(whole)


def test_a_full_disk_costs_an_evaluation_no_checkpoint():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(OSError, match="the disk is full") as raised,
        explain_errors(None, UnreadableImages(0), cluster=False),
    ):
        raise full
    assert "checkpoint" not in str(raised.value)


@pytest.fixture
def disk(tmp_path):
    """A real file system of 4 MB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=777", "tmpfs", str(place)]
    for prefix in ([], ["sudo", "-n"]):
        tool = shutil.which((prefix or mount)[0])
        if tool and not subprocess.run([*prefix, *mount], stderr=subprocess.DEVNULL).returncode:
            yield place
            subprocess.run([*prefix, "umount", "--lazy", place], check=True)
            return
    # Who may not mount anything may do so in a namespace of their own, seen through /proc.
    script = f"{subprocess.list2cmdline(mount)} && echo mounted && exec sleep 900"
    with subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline(), "This machine lets nobody mount a tmpfs."
        yield pathlib.Path(f"/proc/{holder.pid}/root{place}")
        holder.kill()


def test_a_full_disk_ends_the_run_in_one_line_and_room_lets_it_go_on(
    recipe, whole, disk, capfd, monkeypatch
):
    filling = disk / "filling"
    filling.write_bytes(bytes(4 * 2**20 - 300 * 2**10))  # room for two checkpoints
    output = disk / "run"
    assert main(["train", str(recipe), "--output", str(output)]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "keras-coatnet: error: [Errno 28] the checkpoint of step 8 could not be saved: the disk is "
        "full; the one of step 4 is whole. Make room and start the same command again to go on: "
        f"'{output / 'checkpoints'}'"
    )
    assert CheckpointFolder(output / "checkpoints").newest().step == 4

    # The next thing that finds no room is the log, of which every row goes to the disk.
    filling.write_bytes(bytes(3 * 2**20))
    write_row = loop.TrainingLoop._log_row

    def fill_first(run: loop.TrainingLoop) -> None:
        if run.step == 9:
            with pytest.raises(OSError, match="No space"), filling.open("ab", 0) as file:
                while True:
                    file.write(bytes(4096))
        write_row(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_log_row", fill_first)
        patch.setattr(loop.TrainingLoop, "_save", lambda run: None)
        assert main(["train", str(recipe), "--output", str(output)]) == 2
    *_, before, last = capfd.readouterr().err.splitlines()
    assert last == (
        "keras-coatnet: error: [Errno 28] the disk is full; the last checkpoint is whole. Make "
        f"room and start the same command again to go on: '{output}'"
    )
    assert before.startswith(("step", "epoch", "going on"))
    assert CheckpointFolder(output / "checkpoints").newest().step == 4

    filling.unlink()
    assert main(["train", str(recipe), "--output", str(output)]) == 0
    assert runs.outcome(output) == runs.outcome(whole)


# --- Losses that are not numbers --------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the labels of the batches of steps 6 and 13 not a number."""
    make = loop.training_dataset

    def spoilt(source, *, start_step, **options):
        def spoil(number, batch):
            images, labels = batch
            is_bad = (number == 5) | (number == 12)  # counted from 0
            return images, tf.where(is_bad, np.nan, labels)

        dataset = make(source, start_step=start_step, **options)
        return dataset.enumerate(start_step).map(spoil)

    monkeypatch.setattr(loop, "training_dataset", spoilt)


def test_a_loss_that_is_not_a_number_stops_the_run(recipe, poisoned, tmp_path, capfd):
    assert main(["train", str(recipe), "--output", str(tmp_path)]) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "error: " in line)
    assert "the loss of step 6 is nan" in line and "(--on-nan skip) to go on" in line
    assert CheckpointFolder(tmp_path / "checkpoints").newest().step == 4


class _Killed(BaseException):
    pass


def test_bad_batches_are_skipped_and_stay_skipped(recipe, poisoned, tmp_path, monkeypatch):
    skipping = dataclasses.replace(Recipe.load(recipe), on_nan="skip", epochs=2)
    with monkeypatch.context() as patch:

        def told_to_skip(run: loop.TrainingLoop) -> bool:
            run.skipped = [6, 13]
            return False

        patch.setattr(loop.TrainingLoop, "_resume", told_to_skip)
        train(skipping, tmp_path / "told")

    with monkeypatch.context() as patch:
        update = Progress.update

        def update_or_die(progress: Progress, step: int, figures: str) -> None:
            update(progress, step, figures)
            if step == 15:
                raise _Killed

        patch.setattr(Progress, "update", update_or_die)
        with pytest.raises(_Killed):
            train(skipping, tmp_path / "found")
    newest = CheckpointFolder(tmp_path / "found" / "checkpoints").newest()
    assert (newest.step, newest.notes["skipped"]) == (12, [6])
    newest = None
    result = train(skipping, tmp_path / "found")
    assert result.figures["skipped steps"] == 2
    steps = [int(row["step"]) for row in runs.outcome(tmp_path / "found").history]
    assert steps == [step for step in range(1, 21) if step not in (6, 13)]
    assert runs.outcome(tmp_path / "found") == runs.outcome(tmp_path / "told")


def test_going_back_measures_the_speed_anew_and_asks_the_other_processes(
    recipe, poisoned, tmp_path, monkeypatch
):
    monkeypatch.setattr(progress, "_WINDOW_SECONDS", 0.0)  # the speed of the last step
    questions = []

    def agree_at_first(engine: TensorFlowEngine, value: int) -> bool:
        questions.append(value)
        return len(questions) < 4

    monkeypatch.setattr(TensorFlowEngine, "same_in_all_processes", agree_at_first)
    skipping = dataclasses.replace(Recipe.load(recipe), on_nan="skip")
    with pytest.raises(ValueError, match="see different checkpoints in .* all machines share"):
        train(skipping, tmp_path)
    # Of the recipe, of the checkpoint at the start, and of those for the steps 6 and 13.
    assert questions[1:] == [-1, 4, 12]
    speeds = [row["images_per_second"] for row in log.read_history(tmp_path).training]
    assert len(speeds) == 11 and all(speed is None or speed > 0 for speed in speeds)


def test_losses_are_read_together_and_none_that_is_bad_is_saved(
    recipe, poisoned, tmp_path, monkeypatch
):
    """Where there is no need to know them at once: the run logs every 10 steps here."""
    counts, read = [], TensorFlowEngine.read

    def count(engine: TensorFlowEngine, values: list) -> np.ndarray:
        counts.append(len(values) // 2)
        return read(engine, values)

    monkeypatch.setattr(TensorFlowEngine, "read", count)
    changes = {"log_steps": 10, "checkpoint_steps": 100, "epochs": 1, "on_nan": "skip"}
    result = train(dataclasses.replace(Recipe.load(recipe), **changes), tmp_path)
    assert result.figures["skipped steps"] == 1
    assert counts == [1, 9, 9]  # the first step, the others, and all but the bad one again
    (row,) = log.read_history(tmp_path).training
    assert np.isfinite(row["loss"])
    for checkpoint in map(CheckpointFolder(tmp_path / "checkpoints").read, (0, 10)):
        assert all(np.isfinite(array).all() for array in checkpoint.arrays.values())


# --- Data that are not as they should be ------------------------------------------------------


def error_line(capfd) -> str:
    """The one line that a command ended with; TensorFlow's threads may log something after it."""
    lines = capfd.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    (line,) = (line for line in lines if "keras-coatnet: error" in line)
    return line


def break_images(data: pathlib.Path, count: int) -> list[str]:
    """Makes images unreadable that are trained on with the seed 0."""
    source, _ = open_datasets(data)
    names = [
        item["name"].decode() for item in source.examples(None, 0).take(count).as_numpy_iterator()
    ]
    for name in names:
        pathlib.Path(name).write_bytes(b"no image")
    return names


def test_too_many_broken_images_end_the_run(tmp_path, capfd):
    recipe = runs.write_recipe(tmp_path, unreadable_limit=2)
    names = break_images(tmp_path / "digits", 3)
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 1
    line = error_line(capfd)
    assert "3 images cannot be read, more than the limit of 2" in line
    assert all(name in line for name in names)


def test_a_few_broken_images_are_counted(tmp_path, capfd):
    recipe = runs.write_recipe(tmp_path, unreadable_limit=2, epochs=1)
    break_images(tmp_path / "digits", 2)
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 0
    assert "unreadable images      2\n" in capfd.readouterr().out


def with_sources(monkeypatch, change) -> None:
    """Changes what is trained on, after it was opened."""
    opened = open_datasets

    def open_and_change(*arguments, **options):
        training, validation = opened(*arguments, **options)
        return change(training), validation

    monkeypatch.setattr(sys.modules[train.__module__], "open_datasets", open_and_change)


def test_images_that_vanish_are_named(tmp_path, capfd, monkeypatch):
    recipe = runs.write_recipe(tmp_path)

    def remove(source):
        shutil.rmtree(tmp_path / "digits" / "3")
        return source

    with_sources(monkeypatch, remove)
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 1
    line = error_line(capfd)
    assert line.startswith(f"keras-coatnet: error: {tmp_path}/digits/3/")
    assert ".png was there at the start, and is gone. Put it back" in line


def test_wrong_labels_are_named(recipe, tmp_path, capfd, monkeypatch):
    text = "Expected one label from 0 to 9 for train.tfrecord__17. Received: 99"

    def mislabel(source):
        def check(item):
            fits = item["label"] != 3
            with tf.control_dependencies([tf.debugging.Assert(fits, [LABEL_ERROR + text])]):
                return {**item, "label": tf.identity(item["label"])}

        return dataclasses.replace(
            source, examples=lambda seed, start: source.examples(seed, start).map(check)
        )

    with_sources(monkeypatch, mislabel)
    assert main(["train", str(recipe), "--output", str(tmp_path)]) == 1
    assert error_line(capfd) == f"keras-coatnet: error: {text}. Repair the data set."


# --- Output folders ---------------------------------------------------------------------------


def test_the_folder_of_another_run_is_refused(recipe, whole, capfd):
    before = runs.outcome(whole)
    command = ["train", str(recipe), "--output", str(whole), "--seed", "1", "--mixup", "0.2"]
    assert main(command) == 2
    assert "holds another run, with seed=0, mixup=0.8. Give the same" in error_line(capfd)
    assert runs.outcome(whole) == before


def test_a_folder_of_other_things_is_refused(recipe, tmp_path, capfd):
    (tmp_path / "thesis.tex").write_text("all there is")
    assert main(["train", str(recipe), "--output", str(tmp_path)]) == 2
    assert "is not empty, and holds no run to go on with" in error_line(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


STUCK = """
import os, sys
import tensorflow as tf
from keras_coatnet.training.run.signals import on_stop_signals

os.mkfifo(sys.argv[1])
data = tf.data.Dataset.from_tensors(sys.argv[1]).map(tf.io.read_file).prefetch(1)
with on_stop_signals(lambda number: None):
    print("begun", flush=True)
    next(iter(data))  # nobody ever writes to that pipe
"""


def test_ctrl_c_twice_ends_a_process_that_waits_inside_tensorflow(tmp_path):
    """As for a file system that does not answer: the main thread runs no handler then."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path / "pipe")],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)  # the first one asks for the end of the step
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "keras-coatnet: interrupted while it waited" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
