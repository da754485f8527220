"""Train under a TensorFlow strategy, save, and go on elsewhere: the other way round, too.

TensorFlow splits its CPU into two only before it starts, so that this runs in a process of its own;
and so does each backend.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import processes

pytestmark = [pytest.mark.tensorflow_only, pytest.mark.slow]

TRAIN = """
import json, sys
import numpy as np
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_coatnet
folder = sys.argv[1]
x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
data = tf.data.Dataset.from_tensor_slices((x, np.arange(8) % 4)).batch(8)

def train(model):
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    model.fit(data, epochs=2, verbose=0)
    return model

config = keras_coatnet.CoAtNetConfig(
    widths=(16, 24, 32, 64), depths=(1, 1, 1, 1), stem_width=8, head_dim=8
)
keras.utils.set_random_seed(0)
keras_coatnet.CoAtNet(config, input_shape=(32, 32, 3), classes=4).save(folder + "/start.keras")

# Saved outside, loaded under a strategy: two replicas of four images learn what one of eight does.
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    mirrored = train(keras.saving.load_model(folder + "/start.keras"))
    built = train(keras_coatnet.CoAtNet(config, input_shape=(32, 32, 3), classes=4))
alone = train(keras.saving.load_model(folder + "/start.keras"))
built.save(folder + "/mirrored.keras")

# Built and saved under a strategy, loaded outside.
again = keras.saving.load_model(folder + "/mirrored.keras")
before = again.predict(x, verbose=0).tolist()
train(again)
print(json.dumps({
    "apart": max(
        float(np.abs(one - other).max())
        for one, other in zip(mirrored.get_weights(), alone.get_weights(), strict=True)
    ),
    "moved": max(float(np.abs(one - other).max()) for one, other in zip(
        alone.get_weights(), keras.saving.load_model(folder + "/start.keras").get_weights()
    )),
    "scores": before,
    "trains_on": bool(np.isfinite(again.predict(x, verbose=0)).all()),
}))
"""

PREDICT = """
import json, sys
import numpy as np
import keras, keras_coatnet
x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
model = keras.saving.load_model(sys.argv[1] + "/mirrored.keras")
print(json.dumps({"backend": keras.backend.backend(), "scores": model.predict(x).tolist()}))
"""


def run(script: str, folder: object, backend: str) -> dict:
    command = [sys.executable, "-c", script, str(folder)]
    if backend == "tensorflow":
        result = processes.run(command)
    else:
        environment = {**os.environ, **processes.COMPILE_FAST, "KERAS_BACKEND": backend}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model trained under a strategy, and what the process found."""
    folder = tmp_path_factory.mktemp("across_backends")
    return folder, run(TRAIN, folder, "tensorflow")


def test_loaded_under_a_strategy_the_statistics_are_those_of_all_replicas(trained):
    _, found = trained
    assert found["apart"] < 1e-3 * found["moved"]
    assert found["trains_on"]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_saved_under_a_strategy_it_loads_on_another_backend(backend, trained):
    folder, expected = trained
    found = run(PREDICT, folder, backend)
    assert found["backend"] == backend
    for one, other in zip(found["scores"], expected["scores"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
