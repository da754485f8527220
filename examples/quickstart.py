"""Train a CoAtNet on handwritten digits, save it, export it, serve it without Keras, and draw it.

    python examples/quickstart.py

Two thirds of scikit-learn's 1,797 digits are for training. About 99% of the others are recognized
after a minute or two on two CPU cores. With a folder of your own images,

    python examples/quickstart.py --images FOLDER --weights imagenet

runs finetune.py, which has more options: see `python examples/finetune.py --help`.
"""
# ruff: noqa: E402 - arguments are read before the imports that take seconds.

import os
import subprocess
import sys
from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path

LEAST_ACCURACY = 0.98  # with less, something is broken

# What a server would run. Its first line makes every import of Keras an error.
SERVER = """import sys; sys.modules["keras"] = sys.modules["keras_coatnet"] = None
import numpy, tensorflow
model = tensorflow.saved_model.load("saved_model")
numpy.save("probabilities.npy", model.serve(numpy.load("images.npy")))
"""


def parse_arguments():
    """Reads the command line; `--images` is for another script."""
    if any(argument.startswith("--images") for argument in sys.argv):
        finetune = Path(__file__).with_name("finetune.py")
        sys.exit(subprocess.call([sys.executable, finetune, *sys.argv[1:]]))
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.error = fail
    parser.add_argument("--epochs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default="quickstart_output", help="a folder")
    args = parser.parse_args()
    if args.epochs < 1:
        fail(f"--epochs must be at least 1. Received: {args.epochs}")
    return args


def fail(error):
    """Ends the script with one line on the error stream and exit status 1."""
    sys.exit(f"quickstart.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    args = parse_arguments()

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_coatnet
from keras_coatnet.training import WarmUpSchedule


def main(args):
    """Trains, saves, exports, and compares what the files predict with the trained model."""
    keras.utils.set_random_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    train_images, images, train_labels, labels = load_data()
    model = build_model()
    fit(model, (train_images, train_labels), (images, labels), args.epochs)

    expected = model.predict(images, verbose=0)
    accuracy = np.mean(expected.argmax(-1) == labels)
    draw(args.output / "quickstart.png", images, labels, expected.argmax(-1))
    model.save(args.output / "model.keras")
    reloaded = keras.saving.load_model(args.output / "model.keras").predict(images, verbose=0)
    model.export(args.output / "saved_model", verbose=False)
    served = serve(args.output, images)

    print(f"Held-out accuracy     {accuracy:.2%}, see {args.output / 'quickstart.png'}")
    for name, found in ("Reloaded model", reloaded), ("Served without Keras", served):
        difference = abs(found - expected).max()
        print(f"{name:21} probabilities differ by at most {difference:.1e}")
        if not difference <= 1e-4:
            raise ValueError(f"{name}: probabilities differ by {difference}. Expected: 0.0001")
    if accuracy < LEAST_ACCURACY:
        raise ValueError(f"the accuracy is {accuracy:.2%}. Expected: {LEAST_ACCURACY:.0%} or more")


def load_data():
    """Returns images and labels: training and held-out ones. Pixels are raw, from 0 to 255."""
    digits = load_digits()
    images = tf.image.resize(digits.images[..., None] * (255 / 16), (32, 32)).numpy()
    return train_test_split(
        images, digits.target, test_size=1 / 3, stratify=digits.target, random_state=0
    )


def build_model():
    """Returns a small CoAtNet: two stages of MBConv blocks, one of attention."""
    config = keras_coatnet.CoAtNetConfig(
        widths=(32, 64, 128),
        depths=(1, 1, 1),
        layout=("C", "C", "T"),
        stem_width=32,
        batch_norm_momentum=0.9,  # the run is short: moving statistics have to follow quickly
    )
    return keras_coatnet.CoAtNet(config, input_shape=(32, 32, 1), classes=10)


def fit(model, train, validation, epochs):
    """Trains with AdamW; the learning rate rises for a tenth of the run, then falls to zero."""
    shift = keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant")
    rotate = keras.layers.RandomRotation(0.04, fill_mode="constant")
    zoom = keras.layers.RandomZoom(0.1, fill_mode="constant")
    augment = keras.Sequential([shift, rotate, zoom])
    batches = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[0])).batch(32)
    batches = batches.map(lambda x, y: (augment(x, training=True), y)).prefetch(2)
    steps = epochs * len(batches)
    learning_rate = WarmUpSchedule(1e-3, 0.0, total_steps=steps, warmup_steps=steps // 10)
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=0.05)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(batches, validation_data=validation, epochs=epochs, shuffle=False, verbose=2)


def serve(folder, images):
    """Returns what the SavedModel in a folder predicts in a process without Keras."""
    np.save(folder / "images.npy", images)
    subprocess.run([sys.executable, "-c", SERVER], cwd=folder, check=True)
    return np.load(folder / "probabilities.npy")


def draw(path, images, labels, guesses):
    """Draws held-out digits as they were recognized: wrong ones first, in red."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    wrong_first = np.argsort(guesses == labels, kind="stable")
    for axis, index in zip(figure.subplots(4, 6).flat, wrong_first, strict=False):
        axis.imshow(images[index], cmap="gray_r")
        axis.set_title(guesses[index], color="black" if guesses[index] == labels[index] else "red")
        axis.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    try:
        main(args)
    except (ValueError, OSError) as error:
        fail(error)
