"""Fine-tuning on a folder of images, with the smallest network that has all parts."""

from __future__ import annotations

import argparse
import functools

import keras
import numpy as np
import pytest

import keras_coatnet
from tests.examples import scripts
from tests.training import tars

# What stands for CoAtNet-0: most of a run is tracing.
SMALLEST = keras_coatnet.CoAtNetConfig(
    widths=(8, 16),
    depths=(1, 1),
    layout=("C", "T"),
    stem_width=8,
    head_dim=8,
    batch_norm_momentum=0.5,
)

pytestmark = pytest.mark.tensorflow_only


@pytest.fixture
def finetune(monkeypatch):
    make = functools.partial(keras_coatnet.CoAtNet, SMALLEST)
    monkeypatch.setattr(keras_coatnet, "CoAtNet0", make)
    return scripts.load("finetune")


@pytest.fixture
def args(tmp_path) -> argparse.Namespace:
    """Images of two colors, and weights of a trained network's magnitude."""
    model = keras_coatnet.CoAtNet(SMALLEST, weights=None, input_shape=(32, 32, 3), classes=7)
    initializer = keras.initializers.GlorotUniform(seed=0)
    for variable in model.trainable_variables:
        if variable.path.endswith("kernel"):
            variable.assign(initializer(variable.shape))
    model.save_weights(tmp_path / "trained.weights.h5")
    return argparse.Namespace(
        images=tars.write_classes(tmp_path / "images", {"ash": 25, "birch": 25}),
        model="CoAtNet0",
        weights=tmp_path / "trained.weights.h5",
        image_size=32,
        batch_size=8,
        epochs=15,
        fine_tune_epochs=10,
        output=tmp_path / "out",
    )


@pytest.mark.slow
def test_two_colors_are_learned(finetune, args, capsys):
    import tensorflow as tf

    broken = sorted((args.images / "ash").iterdir())[3]
    broken.write_bytes(b"no image")
    fit = finetune.fit  # rates that suit so small a network
    finetune.fit = lambda *args, learning_rate: fit(*args, learning_rate=20 * learning_rate)
    finetune.main(args)
    printed = capsys.readouterr().out
    assert "Training the classifier" in printed and "Training the whole network" in printed
    assert f"Left out: {broken}" in printed
    files = {path.name for path in args.output.iterdir()}
    assert files == {"classes.txt", "mistakes.png", "model.keras", "saved_model"}
    assert (args.output / "classes.txt").read_text().split() == ["ash", "birch"]
    assert (args.output / "mistakes.png").read_bytes().startswith(b"\x89PNG")

    held_out = finetune.load_data(args)[1].unbatch().batch(100)
    images, labels = next(iter(held_out))
    model = keras.saving.load_model(args.output / "model.keras")
    probabilities = model.predict_on_batch(images)
    right = probabilities.argmax(-1) == labels.numpy().argmax(-1)
    assert right.mean() >= 0.9
    assert f"Held-out accuracy: {right.mean():.2%}" in printed
    exported = tf.saved_model.load(args.output / "saved_model")
    served = exported.serve(images).numpy()
    np.testing.assert_allclose(served, probabilities, atol=1e-5)


@pytest.mark.slow
def test_what_is_trained(finetune, args):
    """The classifier alone, then all of it; frozen, BatchNorm keeps its statistics, too."""
    model, backbone = finetune.build_model(args, 2)
    assert len(model.trainable_variables) == 4  # LayerNorm's two and the classifier's two
    images, labels = np.full((2, 32, 32, 3), 100.0), np.eye(2)
    for trainable in (False, True):
        backbone.trainable = trainable
        before = {variable.path: variable.numpy() for variable in backbone.variables}
        model.compile("sgd", "categorical_crossentropy")
        model.train_on_batch(images, labels)
        changed = {v.path for v in backbone.variables if (v.numpy() != before[v.path]).any()}
        assert any(path.endswith("kernel") for path in changed) == trainable
        assert any("moving" in path for path in changed) == trainable


@pytest.mark.slow
def test_mistakes_are_drawn(finetune, args, tmp_path):
    """As many as there is room for, of more; none, where there is none."""
    import tensorflow as tf

    images = np.random.default_rng(0).uniform(0, 255, (30, 32, 32, 3)).astype("float32")
    held_out = tf.data.Dataset.from_tensor_slices((images, np.eye(2)[[0] * 30])).batch(16)

    class AlwaysWrong:
        def predict_on_batch(self, images):
            return np.eye(2)[[1] * len(images)]

    sizes = []
    for number in (0, 1, 2):  # batches: no image, 16, and 30 for 24 places
        path = tmp_path / f"{number}.png"
        finetune.draw_mistakes(path, AlwaysWrong(), held_out.take(number), ("ash", "birch"))
        sizes.append(path.stat().st_size)
    assert 0 < sizes[0] < sizes[1] < sizes[2]


# The script with the smallest network, as a process.
SMALL_SCRIPT = """
import os, runpy, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
import keras_coatnet
from tests.examples.test_finetune import SMALLEST
keras_coatnet.CoAtNet0 = lambda **options: keras_coatnet.CoAtNet(SMALLEST, **options)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_unreadable_images_end_the_process_with_one_line(args):
    """Threads that still read images do not keep it from ending."""
    for path in args.images.glob("*/*"):
        path.write_bytes(b"no image")
    done = scripts.run(
        "finetune",
        *("--images", args.images, "--weights", args.weights, "--output", args.output),
        *("--image-size", 32, "--batch-size", 8),
        code=SMALL_SCRIPT,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    (line,) = (line for line in lines if line.startswith("finetune.py: error: "))
    assert "cannot be read, more than the limit of 10" in line or "No image" in line
    assert "not an image" in line and not args.output.exists()
