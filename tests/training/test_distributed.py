"""One, two and four devices and two processes compute the same; processes come and go together."""

import contextlib
import json
import pathlib
import signal
import socket
import sys

import numpy as np
import pytest

from keras_coatnet.cli import main
from keras_coatnet.training.engine.devices import Devices, make_engine
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run.checkpoints import CheckpointFolder
from keras_coatnet.training.run.lock import locked
from tests.processes import run
from tests.training import faults, runs

pytestmark = [
    pytest.mark.tensorflow_only,
    pytest.mark.slow,
    pytest.mark.xdist_group("faults"),  # they need both cores, and so do those
]

MIRRORED = ("--strategy", "mirrored", "--devices")
# Parts that follow one another draw which samples they drop one after the other.
WHOLE_OR_IN_PARTS = ("--freeze-batch-norm", "--stochastic-depth", "0")
ALONE = {
    "1 device": (),
    "2 devices": (*MIRRORED, "2"),
    "4 devices": (*MIRRORED, "4"),
    # BatchNorm sees a part at a time, so only without its statistics are parts a matter of memory.
    "1 device, fixed norms": WHOLE_OR_IN_PARTS,
    "2 devices, 2 parts, fixed norms": (
        *(*MIRRORED, "2"),
        *("--gradient-accumulation-steps", "2", *WHOLE_OR_IN_PARTS),
    ),
}
TWO_PROCESSES = "2 processes"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("recipe")
    return runs.write_recipe(folder, epochs=2)


@contextlib.contextmanager
def processes(recipe: pathlib.Path, *outputs: pathlib.Path, places: tuple = (None, None)):
    """The two processes of a run, each with its output folder and the folder that it runs in."""
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
            run = faults.Run(
                command,
                output,
                places[index],
                TF_CONFIG=json.dumps(task),
                PYTHONPATH=str(pathlib.Path(__file__).parents[2]),
            )
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


REPLICAS = """
import dataclasses, json
import keras
import numpy as np
import tensorflow as tf

from keras_coatnet.training.engine.devices import divide_cpu
divide_cpu(4)
import keras_coatnet
from keras_coatnet.layers import StochasticDepth
from keras_coatnet.training import AdamW, remat
from keras_coatnet.training.engine.tensorflow import TensorFlowEngine
from tests.training.runs import CONFIG, RECIPE

random = np.random.default_rng(0)
images = random.uniform(0, 255, (16, 32, 32, 3)).astype("float32")
labels = np.eye(10, dtype="float32")[np.arange(16) % 10]

def draw(strategy, count):
    with strategy.scope():
        layer = StochasticDepth(0.5, seed=1)

    @tf.function
    def run():
        call = lambda: layer(tf.ones((16 // count, 1)), training=True)
        return strategy.experimental_local_results(strategy.run(call))

    return [np.concatenate(run()).ravel().tolist() for _ in range(3)]

def fit(strategy):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        inputs = keras.Input((48,))
        x = StochasticDepth(0.5, seed=2)(keras.layers.Dense(8)(inputs))
        model = keras.Model(inputs, keras.layers.Dense(10)(x))
        model.compile(keras.optimizers.SGD(1e-2), "mse")
    x = images[:, ::8, ::8].reshape(16, -1) / 255
    return model.fit(x, labels, batch_size=8, shuffle=False, epochs=2, verbose=0).history["loss"]

def engine(strategy):
    # Two parts a step, and every block computed twice.
    keras.utils.set_random_seed(0)

    def make_model():
        options = {"input_shape": (32, 32, 3), "classes": 10, "classifier_activation": None}
        model = keras_coatnet.CoAtNet(CONFIG, **options, stochastic_depth=0.6)
        remat(model)
        return model

    config = dataclasses.replace(RECIPE.step_config(), gradient_accumulation_steps=2)
    make_optimizer = lambda model: AdamW(1e-2, gradients_are_summed=True)
    engine = TensorFlowEngine(strategy, make_model, make_optimizer, config)
    chunk = 16 // (2 * engine.num_chunks)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().batch(chunk)
    batches = engine.iterate(engine.num_chunks, lambda first, own: data)
    return [float(engine.train_step(batches)[0]) for _ in range(4)]

found = {"draws": {}, "fit": {}, "engine": {}}
for count in (1, 2, 4):
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{number}" for number in range(count)], tf.distribute.ReductionToOneDevice()
    )
    found["draws"][count] = draw(strategy, count)
    if count != 2:  # tracing takes the time, of each replica
        found["fit"][count] = fit(strategy)
        found["engine"][count] = engine(strategy)
print(json.dumps(found))
"""


def test_replicas_drop_the_samples_that_one_device_drops():
    command = [sys.executable, "-c", REPLICAS]
    result = run(command, cwd=pathlib.Path(__file__).parents[2], env=runs.environment())
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    draws = found["draws"]
    assert len(draws["1"]) == 3 and draws["1"][0] != draws["1"][1]
    assert draws["1"] == draws["2"] == draws["4"]
    for kind in ("fit", "engine"):
        losses = [np.array(found[kind][count]) for count in ("1", "4")]
        print(kind, *losses)
        assert np.abs(np.diff(losses, axis=0)).max() < 1e-4
        assert np.abs(np.diff(losses[0])).max() > 1e-3  # else the comparison would say nothing


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
        assert second.wait(90) == 1, second.text()[-3000:]
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


def refused(pair: list[faults.Run]) -> list[str]:
    """The last lines of two processes that both end, in words, when one of them is refused."""
    assert [run.wait(90) for run in pair] == [2, 2], pair[0].text()[-3000:]
    assert not any("Traceback" in run.text() for run in pair)
    return [run.text().splitlines()[-1] for run in pair]


def test_processes_with_other_images_end_together(tmp_path):
    places = (tmp_path / "0", tmp_path / "1")
    for place in places:
        place.mkdir()
        runs.write_digits(place / "digits")
    (places[1] / "digits" / "1").rename(places[1] / "digits" / "one")
    recipe = runs.write_recipe(tmp_path, data="digits")
    shared = tmp_path / "run"
    with processes(recipe, shared, shared, places=places) as pair:
        lines = refused(pair)
    assert "Another process of this run was refused" in lines[0]
    assert f"{shared} holds a run on other data" in lines[1]


def test_a_cluster_of_one_process_keeps_other_runs_away(recipe, tmp_path):
    with locked(tmp_path / "run"), processes(recipe, tmp_path / "run") as (alone,):
        assert alone.wait(90) == 2
        assert "Another run is writing to" in alone.text().splitlines()[-1]


def test_all_processes_end_where_another_run_writes(recipe, tmp_path):
    with locked(tmp_path / "run"), processes(recipe, *[tmp_path / "run"] * 2) as pair:
        lines = refused(pair)
    assert "Another run is writing to" in lines[0]
    assert "Another process of this run was refused" in lines[1]
    assert not (tmp_path / "run").exists()


# --- Refused before anything is computed -----------------------------------------------------


def test_a_batch_that_the_devices_do_not_divide_is_refused(recipe):
    recipe = Recipe.load(recipe).replace(batch_size=18, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="A batch of 18 cannot be divided among 4 devices times"):
        make_engine(Devices(None, replicas=4), None, None, recipe.step_config())


def test_a_batch_that_the_parts_do_not_divide_is_one_line(recipe, tmp_path, capfd):
    command = [
        "train",
        str(recipe),
        "--output",
        str(tmp_path),
        "--gradient-accumulation-steps",
        "3",
    ]
    assert main(command) == 2
    (line,) = capfd.readouterr().err.splitlines()[-1:]
    assert (
        "A batch of 16 cannot be divided among 1 device times gradient_accumulation_steps=3" in line
    )
    assert not list(tmp_path.iterdir())


OF_ANOTHER = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}'

OF_A_SERVER = (
    '{"cluster": {"worker": ["a:1", "b:1"], "ps": ["c:1"]}, "task": {"type": "ps", "index": 0}}'
)


@pytest.mark.parametrize("strategy", ["multi_worker", "auto"])
@pytest.mark.parametrize(
    "cluster", [None, "", "garbage", "[1]", '{"task": {}}', OF_ANOTHER, OF_A_SERVER]
)
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
    assert "TF_CONFIG must describe a cluster, and this process's task in it, such as" in line
    assert "multi_worker" not in line
    assert f"Received: TF_CONFIG={cluster!r}" in line
