"""Accuracy on Fashion-MNIST after a given time of training, beside networks of keras.applications.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist.py --minutes 10 --json benchmarks/results/fashion_mnist_cpu.json
    python benchmarks/fashion_mnist.py --show benchmarks/results/fashion_mnist_cpu.json

60,000 images of 28 x 28 pixels train each network from random weights, 10,000 test it once, at the
end. All have the same recipe: batches of 128, shifts of up to 2 pixels, mirroring, AdamW with
weight decay 0.05 and clipping at 1, label smoothing 0.1, and a learning rate that rises for 5% of
the steps to 2e-3 and falls to 1e-5 along a cosine. The time is the processor's, of all threads
together, so that a busy machine changes nothing: on two idle cores a run takes half of it. How many
steps fit into it is measured at the start, after compilation, so that the schedule ends when the
time does. Each network is trained in a process of its own, one after the other.

keras.applications' networks divide an image by 32, and see little in 32 pixels: they are also
trained on images that are enlarged to 64. Their BatchNorm forgets with a momentum of 0.999, which
in so few steps leaves them with the statistics of untrained weights: here it is 0.99 for all, as
CoAtNet's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEBIAN = "/usr/share/datasets/fashion-mnist"
BATCH, PEAK, LAST = 128, 2e-3, 1e-5
CONTENDERS = ("CoAtNet", "MobileNetV2 at 32", "MobileNetV2 at 64", "MobileNetV3Small at 64")


def main() -> None:
    """Trains all contenders, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=DEBIAN, metavar="DIR", help="where the four files lie")
    parser.add_argument("--minutes", type=float, default=10, help="of processor time")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="where the figures go, too")
    parser.add_argument("--save", metavar="FILE", help="where the last network goes: *.keras")
    parser.add_argument("--show", metavar="FILE", help="print such figures, and train nothing")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        figures = train(args.only, args.data, 60 * args.minutes, args.seed, args.save)
        print(json.dumps(figures))
        return
    print("| network | parameters | epochs | processor minutes | test accuracy |")
    print("|---|---:|---:|---:|---:|")
    rows = []
    for row in json.loads(pathlib.Path(args.show).read_text()) if args.show else results(args):
        rows.append(row)
        print(
            f"| {row['network']} | {row['parameters']:,} | {row['epochs']:.1f} "
            f"| {row['processor_seconds'] / 60:.1f} | {row['accuracy']:.2%} |",
            flush=True,
        )
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains one contender after the other."""
    for contender in args.contenders:
        own = ["--data", args.data, "--minutes", str(args.minutes), "--seed", str(args.seed)]
        own += ["--save", args.save] if args.save else []
        done = subprocess.run(
            [sys.executable, __file__, "--only", contender, *own],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": str(ROOT)},
        )
        yield json.loads(done.stdout.splitlines()[-1])


def read_idx(path: pathlib.Path):
    """An array of a gzipped IDX file: two zero bytes, the type, the number of axes, the sizes."""
    import numpy as np

    with gzip.open(path) as file:
        axes = file.read(4)[3]
        sizes = np.frombuffer(file.read(4 * axes), ">i4")
        return np.frombuffer(file.read(), "uint8").reshape(sizes)


def make_network(contender: str):
    """A classifier of (size, size, 1) pixels from 0 to 255 that returns logits."""
    import keras

    import keras_coatnet

    name, _, size = contender.partition(" at ")
    if name == "CoAtNet":
        config = keras_coatnet.CoAtNetConfig(
            widths=(32, 64, 128),
            depths=(2, 2, 2),
            layout=("C", "C", "T"),
            stem_width=16,
            input_size=32,
        )
        return keras_coatnet.CoAtNet(
            config,
            input_shape=(32, 32, 1),
            classes=10,
            classifier_activation=None,
            stochastic_depth=0.1,
        )
    options = {"include_top": False, "weights": None, "pooling": "avg"}
    inputs = keras.Input((int(size), int(size), 1))
    x = keras.layers.Rescaling(1 / 127.5, -1.0)(inputs)
    options["input_shape"] = (int(size), int(size), 1)
    if name == "MobileNetV2":
        body = keras.applications.MobileNetV2(alpha=0.5, **options)
    else:
        body = keras.applications.MobileNetV3Small(include_preprocessing=False, **options)
    for layer in body.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.99
    x = body(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def train(contender: str, data: str, seconds: float, seed: int, save: str | None) -> dict[str, Any]:
    """Trains one network for a time, tests it, and saves it if asked to."""
    import keras
    import numpy as np
    import tensorflow as tf

    from keras_coatnet.training import AdamW, WarmUpSchedule

    keras.utils.set_random_seed(seed)
    model = make_network(contender)
    size = model.input_shape[1]
    folder = pathlib.Path(data)
    images, labels, test_images, test_labels = (
        read_idx(folder / f"{part}-{kind}-ubyte.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )

    def resized(pixels):
        """(..., 28, 28) to 32 pixels with a black border, and to more by interpolation."""
        around = [[0, 0]] * (len(pixels.shape) - 2) + [[2, 2], [2, 2]]
        pixels = tf.pad(tf.cast(pixels, tf.float32), around)[..., None]
        return pixels if size == 32 else tf.image.resize(pixels, (size, size))

    def augmented(pixels, label):
        pixels = tf.image.random_crop(tf.pad(pixels, [[2, 2], [2, 2]]), (28, 28))
        pixels = tf.cond(
            tf.random.uniform([]) < 0.5, lambda: pixels[:, ::-1], lambda: tf.identity(pixels)
        )
        return resized(pixels), tf.one_hot(label, 10)

    batches = (
        tf.data.Dataset.from_tensor_slices((images, labels.astype("int32")))
        .shuffle(len(images), seed=seed)
        .repeat()
        .map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(BATCH, drop_remainder=True)
        .prefetch(4)
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile(AdamW(PEAK, weight_decay=0.05, global_clipnorm=1.0), loss)
    initial = model.get_weights()
    model.fit(batches, steps_per_epoch=5, verbose=0)  # compiles the step
    begin = time.process_time()
    model.fit(batches, steps_per_epoch=40, verbose=0)
    steps = max(1, int(seconds / (time.process_time() - begin) * 40))

    model.set_weights(initial)
    schedule = WarmUpSchedule(PEAK, LAST, steps, steps // 20)
    model.compile(AdamW(schedule, weight_decay=0.05, global_clipnorm=1.0), loss)
    begin = time.process_time()
    model.fit(batches, steps_per_epoch=steps, verbose=0)
    spent = time.process_time() - begin
    if save:
        model.save(save)
    logits = np.concatenate(
        [model.predict_on_batch(resized(part)) for part in np.split(test_images, 100)]
    )
    return {
        "network": contender,
        "parameters": model.count_params(),
        "epochs": steps * BATCH / len(images),
        "processor_seconds": spent,
        "accuracy": float((logits.argmax(1) == test_labels).mean()),
    }


if __name__ == "__main__":
    main()
