"""The choice of devices on TensorFlow. Those of JAX are in `test_jax.py`."""

import json

import pytest
import tensorflow as tf

from keras_coatnet.cli import main
from keras_coatnet.training.engine import devices
from keras_coatnet.training.engine.devices import choose_devices
from keras_coatnet.training.engine.strategies import choose_strategy
from tests.training import runs

pytestmark = pytest.mark.tensorflow_only


def cluster(**tasks: int) -> str:
    """A TF_CONFIG for the first worker."""
    hosts = {job: [f"{job}{index}:1" for index in range(count)] for job, count in tasks.items()}
    return json.dumps({"cluster": hosts, "task": {"type": "worker", "index": 0}})


@pytest.mark.parametrize("count", ["2", 2.0, True, 0])
def test_a_number_of_devices_is_whole(count):
    with pytest.raises(ValueError, match="`devices` must be a whole number of at least 1"):
        choose_devices("coatnet0", devices=count)


@pytest.mark.parametrize("strategy", ["multi_worker", "tpu", "auto", "one_device"])
def test_a_number_of_devices_that_would_be_ignored_is_refused(
    strategy, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TF_CONFIG", cluster(worker=2))
    monkeypatch.setattr(devices, "divide_cpu", lambda count: None)  # for all tests of the process
    recipe = runs.write_small_recipe(tmp_path)
    command = ["train", str(recipe), "--output", str(tmp_path / "run"), "--devices", "3"]
    assert main([*command, "--strategy", strategy]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    name = "multi_worker" if strategy == "auto" else strategy
    assert f"The strategy '{name}' uses" in line and line.endswith("Received: devices=3")


def test_servers_and_evaluators_are_no_workers(monkeypatch):
    """One worker is no cluster, whatever serves it."""
    monkeypatch.setenv("TF_CONFIG", cluster(worker=1, ps=2, evaluator=1))
    assert not choose_devices("coatnet0").in_cluster
    assert choose_strategy("auto", None).num_replicas_in_sync == 1


def test_one_cpu_reads_without_the_iterator_of_several_devices():
    """That one has a tuner of its own, which sleeps on for seconds when the iterator ends."""
    dataset = tf.data.Dataset.range(3)
    chosen = choose_strategy("one_device", None)
    assert chosen.distribute_datasets_from_function(lambda context: dataset) is dataset
