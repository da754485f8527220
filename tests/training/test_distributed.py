"""One, two and four devices and two processes compute the same; processes come and go together."""

import contextlib
import json
import pathlib
import signal
import socket
import types

import numpy as np
import pytest

from keras_coatnet.cli import main
from keras_coatnet.training.checkpointing import CheckpointFolder
from keras_coatnet.training.devices import make_engine
from keras_coatnet.training.recipe import Recipe
from tests.training import faults, runs

pytestmark = [
    pytest.mark.tensorflow_only,
    pytest.mark.slow,
    pytest.mark.xdist_group("faults"),  # they need both cores, and so do those
]

MIRRORED = ("--strategy", "mirrored", "--devices")
# A block that is dropped is dropped on one device and not on another, so there is no such thing
# here; everything else is on.
ALONE = {
    "1 device": (),
    "2 devices": (*MIRRORED, "2"),
    "4 devices": (*MIRRORED, "4"),
    # BatchNorm sees a part at a time, so only without its statistics are parts a matter of memory.
    "1 device, fixed norms": ("--freeze-batch-norm",),
    "2 devices, 2 parts, fixed norms": (
        *(*MIRRORED, "2"),
        *("--accumulate", "2", "--freeze-batch-norm"),
    ),
}
TWO_PROCESSES = "2 processes"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("recipe")
    return runs.write_recipe(folder, stochastic_depth=0.0, epochs=2)


@contextlib.contextmanager
def processes(recipe: pathlib.Path, *outputs: pathlib.Path):
    """The two processes of a run, each with its output folder."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in outputs]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        workers = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    with contextlib.ExitStack() as stack:
        started = []
        for index, output in enumerate(outputs):
            task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            command = runs.command(recipe, output, "--strategy", "multi_worker")
            run = faults.Run(command, output, TF_CONFIG=json.dumps(task))
            started.append(stack.enter_context(run))
        yield started


@pytest.fixture(scope="module")
def folders(recipe, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The folders of the same run on different devices."""
    place = tmp_path_factory.mktemp("runs")
    found = {name: place / str(number) for number, name in enumerate([*ALONE, TWO_PROCESSES])}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                faults.Run(runs.command(recipe, found[name], *options), found[name])
            )
            for name, options in ALONE.items()
        ]
        for run in started:
            assert run.wait() == 0, run.text()[-3000:]
    shared = found[TWO_PROCESSES]
    with processes(recipe, shared, shared) as pair:
        for run in pair:
            assert run.wait() == 0, run.text()[-3000:]
    return found


def test_devices_and_processes_agree(folders):
    losses = {name: runs.losses(folder) for name, folder in folders.items()}
    differences = {}
    print(f"\n{'':32}  loss of step 1  loss of step 20  largest difference of 20 losses")
    for name, found in losses.items():
        assert len(found) == 20
        reference = losses["1 device" + (", fixed norms" if "fixed norms" in name else "")]
        differences[name] = np.abs(found - reference).max()
        print(f"{name:32}  {found[0]:14.6f}  {found[-1]:15.6f}  {differences[name]:.1e}")
    assert max(differences.values()) < 1e-4
    # It would be no wonder if all batches were alike to the network.
    assert np.abs(np.diff(losses["1 device"])).max() > 1e-2


def test_two_processes_stop_together_die_together_and_go_on(recipe, folders, tmp_path):
    with processes(recipe, tmp_path, tmp_path) as (first, second):
        first.wait_for_step(5)
        second.send(signal.SIGTERM)
        assert [first.wait(90), second.wait(90)] == [143, 143], first.text()[-3000:]
        assert "keras-coatnet: stopped at step" in first.text()
    stopped_at = CheckpointFolder(tmp_path / "checkpoints").steps()[-1]
    assert stopped_at >= 5

    # The first process is the one that the others ask whether all are well.
    with processes(recipe, tmp_path, tmp_path) as (first, second):
        first.wait_for_step(stopped_at + 1)
        first.send(signal.SIGKILL)
        assert second.wait(90) == 1
        lines = second.text().splitlines()
        assert "Traceback (most recent call last):" not in lines
        (line,) = (line for line in lines if line.startswith("keras-coatnet: error: "))
        assert "another process of this run is gone. Start the same command on all" in line

    with processes(recipe, tmp_path, tmp_path) as pair:
        assert [run.wait() for run in pair] == [0, 0], pair[0].text()[-3000:]
        assert pair[0].wait_for_begin() >= stopped_at
    assert runs.outcome(tmp_path) == runs.outcome(folders[TWO_PROCESSES])


def test_processes_that_do_not_share_a_folder_are_refused(recipe, tmp_path):
    with processes(recipe, tmp_path / "one", tmp_path / "two") as pair:
        statuses = [run.wait(90) for run in pair]
        text = pair[1].text()
    assert statuses == [2, 2]
    assert "Not all processes of this run see" in text.splitlines()[-1]
    assert "Traceback" not in text


# --- Refused before anything is computed -----------------------------------------------------


def test_a_batch_that_the_devices_do_not_divide_is_refused(recipe):
    four = types.SimpleNamespace(num_replicas_in_sync=4)
    with pytest.raises(ValueError, match="A batch of 18 cannot be divided among 4 devices times"):
        make_engine(four, None, None, Recipe.load(recipe).replace(batch=18, accumulate=2))


def test_a_batch_that_the_parts_do_not_divide_is_one_line(recipe, tmp_path, capfd):
    command = ["train", str(recipe), "--output", str(tmp_path), "--accumulate", "3"]
    assert main(command) == 2
    (line,) = capfd.readouterr().err.splitlines()[-1:]
    assert "A batch of 16 cannot be divided among 1 device times accumulate=3" in line
    assert not list(tmp_path.iterdir())


OF_ANOTHER = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}'


@pytest.mark.parametrize("strategy", ["multi_worker", "auto"])
@pytest.mark.parametrize("cluster", [None, "", "garbage", "[1]", '{"task": {}}', OF_ANOTHER])
def test_a_cluster_that_is_none_is_one_line(
    recipe, tmp_path, capfd, monkeypatch, cluster, strategy
):
    if strategy == "auto" and not cluster:
        strategy = "multi_worker"  # no cluster asked for is no mistake
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if cluster is not None:
        monkeypatch.setenv("TF_CONFIG", cluster)
    command = ["train", str(recipe), "--output", str(tmp_path), "--strategy", strategy]
    assert main(command) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "needs the environment variable TF_CONFIG, such as" in line
    assert f"Received: TF_CONFIG={cluster!r}" in line
