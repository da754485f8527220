"""Training on JAX, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import processes
from tests.training import runs

pytestmark = [pytest.mark.tensorflow_only, pytest.mark.slow]

ROOT = pathlib.Path(__file__).parents[3]
SCRIPT = """
import dataclasses, json
import numpy as np
import tensorflow as tf
import keras_coatnet
from keras_coatnet.training.engine.devices import choose_devices
from keras_coatnet.training.engine.jax import JaxEngine
from keras_coatnet.training.engine.optimizer import AdamW
from tests.training.runs import CONFIG, RECIPE

hidden = []
set_visible_devices = tf.config.set_visible_devices
tf.config.set_visible_devices = lambda *devices: hidden.append(devices)
choose_devices(CONFIG, "one_device")
tf.config.set_visible_devices = set_visible_devices

options = {"input_shape": (32, 32, 3), "classes": 10, "classifier_activation": None}
engine = JaxEngine(
    None,
    lambda: keras_coatnet.CoAtNet(CONFIG, **options, stochastic_depth=0.2),
    lambda model: AdamW(1e-2, gradients_are_summed=True),
    dataclasses.replace(RECIPE, gradient_accumulation_steps=2).step_config(),
)
images = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
labels = np.eye(10, dtype="float32")[np.arange(8)]
data = tf.data.Dataset.from_tensors((images, labels)).repeat()
batches = engine.iterate(2, lambda first, own: data)
step = lambda: [float(value) for value in engine.train_step(batches)]
step()
state = engine.state()
first = [step() for _ in range(3)]
engine.restore(state)
again = [step() for _ in range(3)]
try:
    engine.restore(dict(list(state.items())[1:]))
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps({"first": first, "again": again, "refused": refused, "hidden": hidden}))
"""


def test_a_restored_state_goes_on_to_the_same_losses_and_the_gpus_are_jax_s():
    """With stochastic depth, an average of the weights and two parts a step."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, **processes.COMPILE_FAST, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["first"] == found["again"]
    assert len({loss for loss, _ in found["first"]}) == 3
    assert "stem_conv1/kernel" in found["refused"]
    # TensorFlow only reads the data, and would take the memory of the GPUs.
    assert found["hidden"] == [[[], "GPU"]]


DISTRIBUTION = """
import io, json, pathlib, sys
import keras
from keras_coatnet.training import Recipe, train
from keras_coatnet.training.engine.devices import choose_devices

own = keras.distribution.DataParallel(auto_shard_dataset=False)
keras.distribution.set_distribution(own)
folder = pathlib.Path(sys.argv[1])
train(Recipe.load(folder / "digits.json"), folder / "run", strategy="one_device",
      stream=io.StringIO())
kept = keras.distribution.distribution() is own
try:
    choose_devices("coatnet0", "one_device", 2)
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps({"kept": kept, "refused": refused}))
"""


def test_a_run_leaves_the_distribution_as_it_was_and_one_device_is_one(tmp_path):
    runs.write_small_recipe(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", DISTRIBUTION, str(tmp_path)],
        cwd=ROOT,
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kept"]
    assert "The strategy 'one_device' uses one device" in found["refused"]
