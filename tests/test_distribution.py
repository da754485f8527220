"""Under a distribution strategy. TensorFlow splits its CPU into two only before it starts, so that
this runs in a process of its own."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tensorflow_only

SCRIPT = """
import json, sys
import numpy as np
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_coatnet
config = keras_coatnet.CoAtNetConfig(
    widths=(16, 24, 32, 64), depths=(1, 1, 1, 1), stem_width=8, head_dim=8
)
norms = lambda m: [l for l in m._flatten_layers() if isinstance(l, keras.layers.BatchNormalization)]
build = lambda: keras_coatnet.CoAtNet(config, input_shape=(32, 32, 3), classes=4)
x = np.random.default_rng(0).uniform(0, 255, (16, 32, 32, 3)).astype("float32")
y = np.arange(16) % 4
results = {}
start = None
for replicas in (1, 2):
    devices = [f"CPU:{i}" for i in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(devices)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = build()
        start = start or model.get_weights()
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    losses = model.fit(data, epochs=3, verbose=0).history["loss"]
    drift = max(
        [float(np.abs(v.numpy() - v.numpy()).max()) for v in model.non_trainable_variables]
        + [
            float(np.abs(part.numpy() - variable.value.values[0].numpy()).max())
            for variable in model.non_trainable_variables
            for part in getattr(variable.value, "values", [])
        ]
    )
    results[replicas] = {
        "synchronized": sorted({n.synchronized for n in norms(model)}),
        "losses": losses,
        "drift": drift,
    }
    model.save(sys.argv[1] + "/a.keras")
alone = keras.models.load_model(sys.argv[1] + "/a.keras")
results["reloaded"] = sorted({n.synchronized for n in norms(alone) if "/" in n.path or True})
results["predicts"] = bool(np.isfinite(alone.predict(x, verbose=0)).all())
print(json.dumps(results))
"""


@pytest.mark.slow
def test_batch_norm_is_synchronized_over_replicas(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["1"]["synchronized"] == [False]
    assert found["2"]["synchronized"] == [True]
    # One replica of 8 and two of 4: the same batch, so the same losses and statistics.
    assert found["2"]["losses"] == pytest.approx(found["1"]["losses"], abs=1e-4)
    assert found["2"]["drift"] < 1e-5
    assert found["predicts"]
