"""Fine-tune a CoAtNet that was trained on ImageNet, on your own images, with `model.fit`.

    python examples/finetune.py --images FOLDER --weights imagenet

FOLDER has one sub-folder of images per class, of which a fifth is held out; or two parts of that
form, such as train/ and val/. The weights, 110 MB for CoAtNet0, are downloaded at the first use.

First only a new classifier learns, on top of the network as it is, and then all of it, at a low
learning rate. A GPU of 8 GB is enough. With a few hundred images per class, more than 90% of the
held-out ones are usually recognized after a few epochs.

`keras-coatnet train transfer` needs no code, and has more against overfitting. train_loop.py is for
those who want to change the training step itself.
"""
# ruff: noqa: E402 - arguments are read before the imports that take seconds.

import argparse
import os
import sys
from pathlib import Path

MODELS = [f"CoAtNet{size}" for size in (0, 1, 2, 3, 4, 5, 6, 7, "Nano")]


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--images", metavar="FOLDER", required=True, help="your images")
    add("--model", choices=MODELS, default="CoAtNet0", metavar="NAME", help=default)
    add("--weights", default="imagenet", help=f"imagenet, a checkpoint or a file {default}")
    add("--image-size", type=int, default=224, help=f"height and width {default}")
    add("--batch-size", type=int, default=32, help=f"images in one step {default}")
    add("--epochs", type=int, default=5, help=f"for the classifier alone {default}")
    add("--fine-tune-epochs", type=int, default=10, help=f"for the whole network {default}")
    add("--output", default="finetune_output", help=default)
    args = parser.parse_args()
    if args.epochs < 1 or args.fine_tune_epochs < 0:
        fail("--epochs must be at least 1, and --fine-tune-epochs at least 0")
    return args


def fail(error):
    """Ends the script with one line on the error stream and exit status 1."""
    print(f"finetune.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    os._exit(1)  # sys.exit would wait for threads of TensorFlow that still read images


if __name__ == "__main__":
    args = parse_arguments()

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import keras_coatnet
from keras_coatnet.training import (
    AdamW,
    Augmentation,
    UnreadableImages,
    WarmUpSchedule,
    evaluation_dataset,
    open_datasets,
    training_dataset,
)

UNREADABLE = UnreadableImages(limit=10)  # images that are left out; more of them end the run


def main(args):
    """Trains twice, and writes what came of it."""
    keras.utils.set_random_seed(0)
    train, held_out, classes, steps = load_data(args)
    model, backbone = build_model(args, len(classes))

    print("Training the classifier")
    fit(model, train, held_out, steps, args.epochs, learning_rate=1e-3)
    if args.fine_tune_epochs:
        print("Training the whole network")
        backbone.trainable = True
        fit(model, train, held_out, steps, args.fine_tune_epochs, learning_rate=5e-5)

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    model.save(output / "model.keras")
    model.export(output / "saved_model", verbose=False)
    reloaded = keras.saving.load_model(output / "model.keras")
    _, accuracy = reloaded.evaluate(held_out, verbose=0)
    draw_mistakes(output / "mistakes.png", reloaded, held_out, classes)
    print(f"""Held-out accuracy: {accuracy:.2%}. Written to {output}:
  model.keras   for `keras.saving.load_model`, after `import keras_coatnet`
  saved_model   for `tf.saved_model.load` without Keras: raw pixels in, probabilities out
  classes.txt   names of the classes, in the order of the probabilities
  mistakes.png  held-out images that are not recognized""")
    for name, reason in UNREADABLE.reasons.items():
        print(f"Left out: {name} ({reason})")


def load_data(args):
    """Returns batches to train with and held-out ones, the classes, and the steps of an epoch."""
    train, held_out = open_datasets(args.images)
    options = {"size": args.image_size, "global_batch_size": args.batch_size, "unreadable": UNREADABLE}
    augmentation = Augmentation(area=(0.35, 1.0))  # random crops, and flips
    batches = training_dataset(
        train, augmentation=augmentation, label_smoothing=0.1, seed=0, **options
    )
    held_out_batches = evaluation_dataset(
        held_out, crop_pct=0.95, interpolation="bicubic", **options
    )
    return batches, held_out_batches, train.classes, train.count // args.batch_size


def build_model(args, classes):
    """Returns a classifier on top of a frozen CoAtNet, and that CoAtNet."""
    size = args.image_size
    backbone = getattr(keras_coatnet, args.model)(
        weights=args.weights, include_top=False, pooling="avg", input_shape=(size, size, 3)
    )
    backbone.trainable = False  # frozen, BatchNorm also keeps its statistics
    head = [
        keras.layers.LayerNormalization(),
        keras.layers.Dense(classes, activation="softmax", dtype="float32"),
    ]
    return keras.Sequential([backbone, *head]), backbone


def fit(model, train, held_out, steps, epochs, learning_rate):
    """Trains; the learning rate rises in the first tenth of the steps, and then falls to zero."""
    steps_in_all = steps * epochs
    schedule = WarmUpSchedule(learning_rate, 0.0, steps_in_all, steps_in_all // 10)
    model.compile(
        optimizer=AdamW(schedule, weight_decay=0.05),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(
        train,
        steps_per_epoch=steps,
        epochs=epochs,
        validation_data=held_out,
        shuffle=False,  # `train` shuffles
        verbose=1 if sys.stdout.isatty() else 2,
    )


def draw_mistakes(path, model, held_out, classes):
    """Draws the first 24 held-out images that are not recognized."""
    mistakes = []
    for images, labels in held_out:
        guesses, truths = model.predict_on_batch(images).argmax(-1), labels.numpy().argmax(-1)
        for index in np.flatnonzero(guesses != truths)[: 24 - len(mistakes)]:
            title = f"{classes[truths[index]]}, not {classes[guesses[index]]}"
            mistakes.append((images[index].numpy().astype("uint8"), title))
    figure = Figure(figsize=(12, 8), layout="constrained")
    for place, (image, title) in enumerate(mistakes, 1):
        axis = figure.add_subplot(4, 6, place)
        axis.imshow(image)
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    try:
        main(args)
    except (ValueError, OSError, ImportError, tf.errors.OpError) as error:
        fail(UNREADABLE.error or error)
