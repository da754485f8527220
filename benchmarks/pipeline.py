"""How many images a second the input pipeline gives, beside JPEG decoding alone, the floor.

    python benchmarks/pipeline.py [--json FILE] [--rounds 3]

The images are photographs of scikit-image, cut to about ImageNet's usual 500 x 375 in several
places and encoded at several qualities; they lie in memory. Rows are timed in turns, each round all
of them, and shown as median, lowest and highest; on a busy machine the CPU time tells more.
Magnitude 15 is outside the scales of keras-cv's and Keras's RandAugment: only their speed counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from keras_coatnet.training.data.augment import Augmentation
from keras_coatnet.training.data.datasets import ImageDataset
from keras_coatnet.training.data.pipeline import training_dataset
from keras_coatnet.training.data.randaugment import DRAWS, randaugment
from keras_coatnet.training.data.unreadable import UnreadableImages

SIZE, BATCH, LAYERS, MAGNITUDE = 224, 64, 2, 15
SLOW_BATCH = 8  # where few images are timed: a batch or two are always ready at the start
MEASURED = 256  # images in one timing of a fast row, after the first batch; fewer of slow ones
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")


def _photographs(kind: str) -> list[bytes]:
    import skimage.data

    rng = np.random.default_rng(0)
    contents = []
    for name in PHOTOGRAPHS:
        path = pathlib.Path(skimage.data.data_dir) / name
        if not path.is_file():  # some versions bring it, some download it
            continue
        image = Image.open(path).convert("RGB")
        scale = max(600 / image.width, 450 / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        for quality in (75, 85, 92, 96):
            left = int(rng.integers(0, image.width - 500 + 1))
            top = int(rng.integers(0, image.height - 375 + 1))
            file = io.BytesIO()
            options = {"quality": quality} if kind == "JPEG" else {}
            image.crop((left, top, left + 500, top + 375)).save(file, kind, **options)
            contents.append(file.getvalue())
    return contents


def _repeated(contents: list[bytes]) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(contents).repeat()


def _pipeline(contents: list[bytes], **augmentation) -> tf.data.Dataset:
    count = 64 * len(contents)

    def examples(seed: int | None, start: int) -> tf.data.Dataset:
        return (
            _repeated(contents)
            .take(count - start)
            .map(lambda image: {"image": image, "label": tf.constant(1, tf.int64), "name": "one"})
        )

    return training_dataset(
        ImageDataset("photographs", count, tuple(map(str, range(1000))), examples),
        size=SIZE,
        augmentation=Augmentation(**augmentation),
        label_smoothing=0.1,
        global_batch_size=BATCH,
        seed=1,
        unreadable=UnreadableImages(0),
    ).map(lambda images, labels: images)


def _decoded(contents: list[bytes]) -> tf.data.Dataset:
    """Batches of decoded images, uint8, which are there already."""
    images = [
        np.array(Image.open(io.BytesIO(content)).resize((SIZE, SIZE))) for content in contents
    ]
    return tf.data.Dataset.from_tensor_slices(np.stack(images)).repeat()


def _ours(images: tf.data.Dataset) -> tf.data.Dataset:
    def augment(index: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
        draws = tf.random.stateless_uniform(
            [LAYERS, DRAWS], tf.stack([tf.cast(1, tf.int64), index])
        )
        return randaugment(image, draws, MAGNITUDE)

    return images.enumerate().map(augment, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH)


def _layer(images: tf.data.Dataset, layer: Callable) -> tf.data.Dataset:
    def augment(images: tf.Tensor) -> tf.Tensor:
        return layer(tf.cast(images, tf.float32), training=True)

    return images.batch(SLOW_BATCH).map(augment, num_parallel_calls=tf.data.AUTOTUNE)


def _rows() -> dict[str, tuple[tf.data.Dataset, int]]:
    jpegs, pngs = _photographs("JPEG"), _photographs("PNG")
    strong = {"randaugment_num_ops": LAYERS, "randaugment_magnitude": MAGNITUDE}

    def decode(content: tf.Tensor) -> tf.Tensor:
        return tf.shape(tf.io.decode_jpeg(content, 3, dct_method="INTEGER_ACCURATE"))

    floor = _repeated(jpegs).map(decode, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH)
    decoded = _decoded(jpegs)
    rows = {
        "JPEG decoding alone, all of each image": (floor, MEASURED),
        "decoding and random crop": (_pipeline(jpegs, flip=False), MEASURED),
        "  + flip": (_pipeline(jpegs), MEASURED),
        "  + RandAugment(2, 15)": (_pipeline(jpegs, **strong), MEASURED),
        "  + mixup": (_pipeline(jpegs, mixup=0.8, **strong), MEASURED),
        "  + mixup and CutMix": (_pipeline(jpegs, mixup=0.8, cutmix=1.0, **strong), MEASURED),
        "decoding and random crop of PNG": (_pipeline(pngs, flip=False), 2 * BATCH),
        "RandAugment(2, 15) alone: ours": (_ours(decoded), MEASURED),
    }
    own = keras.layers.RandAugment(value_range=(0, 255), num_ops=LAYERS, factor=0.5)
    rows["RandAugment alone: Keras's own"] = (_layer(decoded, own), BATCH)
    try:
        import keras_cv
    except ImportError:
        print("keras-cv is not installed: no row for it.")
    else:
        theirs = keras_cv.layers.RandAugment((0, 255), LAYERS, magnitude=0.5)
        rows["RandAugment alone: keras-cv's"] = (_layer(decoded, theirs), 2 * BATCH)
    return rows


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(Images a second, CPU milliseconds an image) of each row, one pair a round."""
    found: dict[str, list[tuple[float, float]]] = {}
    rows = _rows()
    for _ in range(rounds):
        for name, (dataset, images) in rows.items():
            iterator = iter(dataset)
            next(iterator)  # tracing, and filling of buffers
            start, cpu, count = time.perf_counter(), time.process_time(), 0
            while count < images:
                count += int(next(iterator).shape[0])
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            found.setdefault(name, []).append((count / seconds, 1000 * cpu / count))
            del iterator  # which would go on filling its buffers while the next is timed
    return found


def main() -> None:
    """Prints the table, and writes it with the machine and the versions if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each row (3)")
    options = parser.parse_args()
    found = measure(options.rounds)
    versions = {"python": platform.python_version()}
    for package in ("tensorflow", "keras", "keras-cv", "pillow", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{threads} threads; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"{'images/s':42}{'median':>8}{'lowest':>8}{'highest':>8}{'CPU ms/image':>14}")
    for name, pairs in found.items():
        rates, costs = zip(*pairs, strict=True)
        print(
            f"{name:42}{statistics.median(rates):8.0f}{min(rates):8.0f}{max(rates):8.0f}"
            f"{statistics.median(costs):14.2f}"
        )
    if options.json:
        report = {"threads": threads, "versions": versions, "rate_and_cpu_ms": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
