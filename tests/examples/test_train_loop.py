"""The loop on one device and on two.

TensorFlow splits its CPU into two only before it starts, so that all of it runs in a process.
"""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

import keras_coatnet
from tests.examples import scripts
from tests.training import tars

pytestmark = pytest.mark.tensorflow_only

NETWORK = keras_coatnet.CoAtNetConfig(
    widths=(8, 16),
    depths=(1, 1),
    layout=("C", "T"),
    stem_width=8,
    head_dim=8,
    batch_norm_momentum=0.5,
)
EPOCHS, STEPS = 5, 16  # of each epoch

RUNS = """
import argparse
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.examples import scripts
from tests.examples.test_train_loop import EPOCHS, NETWORK
loop = scripts.load("train_loop")
loop.LOG_STEPS = 1
loop.AUGMENTATION = loop.Augmentation()  # without RandAugment, which changes colors


def train(folder, devices, last_epoch=None):
    def log(line, **options):
        print(folder, devices, line)
        if line.startswith(f"epoch {last_epoch} "):
            raise KeyboardInterrupt

    loop.print = log
    args = argparse.Namespace(
        data=sys.argv[1], output=f"{sys.argv[2]}/{folder}", model=NETWORK, weights=None,
        image_size=32, batch_size=8, epochs=EPOCHS, learning_rate=5e-3, dtype_policy="float32",
    )
    try:
        loop.train(args, tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)]))
    except KeyboardInterrupt:
        pass


train("whole", 1)
train("parts", 2, last_epoch=1)
train("parts", 1)
"""


def read(printed: str, run: str) -> tuple[list[int], np.ndarray, list[float]]:
    """The steps of a run, their losses, and the accuracy after each epoch."""
    steps = re.findall(rf"^{run} step (\d+)/\d+  loss (\S+)", printed, re.M)
    accuracies = re.findall(rf"^{run} epoch \d+  accuracy (\S+)%", printed, re.M)
    return [int(step) for step, _ in steps], np.array([float(x) for _, x in steps]), accuracies


@pytest.mark.slow
def test_two_devices_learn_what_one_does_and_a_run_goes_on(tmp_path):
    """One run on one device; the same, ended after an epoch on two, and gone on with on one."""
    counts = {"ash": 54, "birch": 54, "cedar": 55}
    data = tars.write_classes(tmp_path / "data", counts, size=(32, 32))
    done = scripts.run("train_loop", data, tmp_path, code=RUNS)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    last = EPOCHS * STEPS
    steps, losses, accuracies = read(done.stdout, "whole 1")
    assert steps == [*range(1, last + 1)] and len(accuracies) == EPOCHS
    assert losses[-STEPS:].mean() < losses[:STEPS].mean() - 0.1
    assert float(accuracies[-1]) >= 90

    begun, on_two, _ = read(done.stdout, "parts 2")
    gone_on, on_one, _ = read(done.stdout, "parts 1")
    assert begun + gone_on == steps and len(begun) == STEPS
    np.testing.assert_allclose(on_two, losses[:STEPS], atol=1e-5)
    np.testing.assert_allclose(on_one, losses[STEPS:], atol=1e-3)

    model = keras_coatnet.CoAtNet(NETWORK, weights=tmp_path / "parts" / "final.weights.h5")
    images, labels = keras.utils.image_dataset_from_directory(
        data, label_mode="int", image_size=(32, 32), batch_size=200, verbose=False
    ).get_single_element()
    assert (model.predict_on_batch(images).argmax(-1) == labels.numpy()).mean() >= 0.9
