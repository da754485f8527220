"""Train a CoAtNet, save and reload it, export it, serve it without Keras, and draw what it learnt.

    python examples/quickstart.py

reads scikit-learn's 1,797 handwritten digits, holds a third of them out, and trains a small CoAtNet
on the others: about 99% of the held-out digits are right after a minute or two on two CPU cores.

    python examples/quickstart.py --images FOLDER --weights imagenet

does the same with your pictures, one sub-folder a class, on top of a CoAtNet-0 trained on ImageNet.
"""

import argparse
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow, Keras and the package are imported where they are used, so that --help and a mistake
# in the call are answered at once.

MODELS = [f"CoAtNet{size}" for size in (0, 1, 2, 3, 4, 5, 6, 7, "Nano")]
SUFFIXES = (".jpeg", ".jpg", ".png")
TOLERANCE = 1e-4  # of probabilities that should be the same
SHOWN = 24  # pictures in the drawing

# What a server would run. From the second line on, importing keras or keras_coatnet is an error.
SERVE = """\
import sys
sys.modules["keras"] = sys.modules["keras_coatnet"] = None
import numpy as np
import tensorflow as tf
saved_model, pictures, probabilities = sys.argv[1:]
model = tf.saved_model.load(saved_model)
np.save(probabilities, model.serve(tf.constant(np.load(pictures))).numpy())
"""


def main():
    """Does everything, in the order in which it is printed."""
    args = read_arguments()
    class_names = find_classes(args.images) if args.images else list("0123456789")
    began = time.perf_counter()
    import keras

    keras.utils.set_random_seed(args.seed)
    if args.images:
        train, held_out = read_folder(args)
        model, backbone = transfer_model(args, len(class_names))
    else:
        train, held_out = read_digits(args)
        model, backbone = small_model(args.size, len(class_names)), None

    print(f"\nTraining for {args.epochs} epochs")
    history = fit(model, train, held_out, args.epochs, rate=1e-3)
    if args.fine_tune_epochs:
        print(f"\nTraining all layers for {args.fine_tune_epochs} more epochs, at a low rate")
        backbone.trainable = True
        more = fit(model, train, held_out, args.fine_tune_epochs, rate=2e-5)
        history = {name: values + more[name] for name, values in history.items()}

    print("\nSaving, reloading and serving the model")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "classes.txt").write_text("\n".join(class_names) + "\n", encoding="utf-8")
    pictures = next(iter(held_out))[0].numpy()
    reloaded = save_and_reload(model, args.output / "model.keras", pictures)
    served = export_and_serve(model, args.output / "saved_model", pictures)
    accuracy, examples = judge(model, held_out)
    draw(args.output / "quickstart.png", history, accuracy, examples, class_names)

    print(f"\nHeld-out accuracy     {accuracy:.2%}")
    print(f"Parameters            {model.count_params():,}")
    print(f"Time                  {time.perf_counter() - began:.0f} s")
    print(f"Reloaded model        probabilities differ by at most {reloaded:.1e}")
    print(f"Served without Keras  probabilities differ by at most {served:.1e}")
    print(f"Written to            {args.output.resolve()}")
    print("  model.keras           the trained model, for keras.models.load_model")
    print("  saved_model           for TensorFlow alone: raw pixels in, probabilities out")
    print("  classes.txt           names of the classes, in the order of the probabilities")
    print("  quickstart.png        held-out pictures with predictions, and the learning curves")
    if not (reloaded <= TOLERANCE and served <= TOLERANCE):
        fail(f"a saved model's probabilities differ by more than {TOLERANCE}", status=1)
    if accuracy < args.least_accuracy:
        least = f"{args.least_accuracy:.2%}"
        fail(f"the held-out accuracy is {accuracy:.2%}, and should be at least {least}", status=1)


def fail(message, status=2):
    """Ends the script with one line on the error stream."""
    print(f"quickstart.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def read_arguments():
    """Reads the command line, fills in what depends on the kind of pictures, and checks it."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="exit status: 0 all fine; 1 the accuracy is too low, or a saved model predicts\n"
        "something else than the trained one; 2 a mistake in the call",
    )
    parser.error = lambda message: fail(f"{message} (see --help)")
    add, folder = parser.add_argument, {"type": pathlib.Path, "metavar": "FOLDER"}
    add("--output", **folder, default="quickstart_output", help="default: %(default)s")
    add("--epochs", type=int, help="times through the pictures; default: 30, 10 with --images")
    add("--batch", type=int, default=32, help="pictures in one step; default: %(default)s")
    add("--size", type=int, help="height and width, from 32; default: 32, 224 with --images")
    add("--seed", type=int, default=0, help="of all that is random; default: %(default)s")
    text = "held-out accuracy, 0 to 1, below which this fails; default: 0.98, 0 with --images"
    add("--least-accuracy", type=float, metavar="SHARE", help=text)
    add = parser.add_argument_group("your own pictures").add_argument
    add("--images", **folder, help="JPEG and PNG pictures, one sub-folder a class")
    add("--model", choices=MODELS, metavar="NAME", help="CoAtNet0 (default) to 7, or CoAtNetNano")
    text = "imagenet (default), a checkpoint's name, the path of a file, or none"
    add("--weights", help=text)
    text = "epochs afterwards that train all layers at a low rate; default: 0"
    add("--fine-tune-epochs", type=int, default=0, metavar="EPOCHS", help=text)
    args = parser.parse_args()

    defaults = {"epochs": 30, "size": 32, "least_accuracy": 0.98}
    if args.images:
        defaults = {"epochs": 10, "size": 224, "least_accuracy": 0.0}
        defaults |= {"model": "CoAtNet0", "weights": "imagenet"}
    elif args.model or args.weights or args.fine_tune_epochs:
        fail("--model, --weights and --fine-tune-epochs need --images FOLDER")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = {"size": 32, "epochs": 1, "batch": 1, "fine_tune_epochs": 0, "seed": 0}
    for name, value in least.items():
        if getattr(args, name) < value:
            option = name.replace("_", "-")
            fail(f"--{option} must be at least {value}. Received: {getattr(args, name)}")
    if args.output.is_file():
        fail(f"--output must be a folder. Received: {args.output}, which is a file")
    return args


def find_classes(folder):
    """Returns the names of a folder's classes, after checking that each has pictures."""
    if not folder.is_dir():
        fail(f"--images must be a folder with one sub-folder a class. Received: {folder}")
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    if len(classes) < 2:
        found = ", ".join(path.name for path in classes) or "none"
        fail(f"--images needs at least two sub-folders, one a class. Found in {folder}: {found}")
    for path in classes:
        files = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES]
        if len(files) < 3:
            fail(f"each class needs at least 3 JPEG or PNG pictures. Found in {path}: {len(files)}")
        for file in files:
            with file.open("rb") as opened:
                if not opened.read(4).startswith((b"\xff\xd8\xff", b"\x89PNG")):
                    fail(f"{file} is no JPEG or PNG picture, whatever its name says. Remove it")
    return [path.name for path in classes]


def read_digits(args):
    """Returns scikit-learn's digits, raw pixels 0 to 255: two thirds to train on, a third not."""
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pictures = digits.images[..., None] * (255 / 16)
    pictures = tf.image.resize(pictures, (args.size, args.size)).numpy()
    train_x, held_out_x, train_y, held_out_y = train_test_split(
        pictures, digits.target, test_size=1 / 3, stratify=digits.target, random_state=args.seed
    )
    print(f"Digits: {len(train_y)} to train on, {len(held_out_y)} held out")
    train = tf.data.Dataset.from_tensor_slices((train_x, train_y)).shuffle(len(train_y))
    layers = [
        keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant"),
        keras.layers.RandomRotation(0.04, fill_mode="constant"),
        keras.layers.RandomZoom(0.1, fill_mode="constant"),
    ]
    held_out = tf.data.Dataset.from_tensor_slices((held_out_x, held_out_y)).batch(args.batch)
    return augmented(train.batch(args.batch), layers), held_out


def read_folder(args):
    """Returns a folder's pictures, raw pixels 0 to 255: two thirds to train on, a third not."""
    import keras

    train, held_out = keras.utils.image_dataset_from_directory(
        args.images,
        validation_split=1 / 3,
        subset="both",
        seed=args.seed,
        image_size=(args.size, args.size),
        batch_size=args.batch,
    )
    layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomZoom(0.1)]
    return augmented(train, layers), held_out.prefetch(2)


def augmented(train, layers):
    """Changes the pictures of a data set a little, differently in each epoch."""
    import keras

    augment = keras.Sequential(layers)
    return train.map(lambda x, y: (augment(x, training=True), y)).prefetch(2)


def small_model(size, classes):
    """Builds a CoAtNet for small grey pictures: two MBConv stages, one with attention."""
    import keras_coatnet

    config = keras_coatnet.CoAtNetConfig(
        widths=(32, 64, 128),
        depths=(1, 1, 1),
        layout=("C", "C", "T"),
        stem_width=32,
        batch_norm_momentum=0.9,  # few steps: the moving statistics have to keep up
    )
    return keras_coatnet.CoAtNet(config, input_shape=(size, size, 1), classes=classes)


def transfer_model(args, classes):
    """Builds a frozen CoAtNet with a new classifier on top; returns both."""
    import keras

    import keras_coatnet

    weights = None if args.weights == "none" else args.weights
    shape = (args.size, args.size, 3)
    make = getattr(keras_coatnet, args.model)
    try:
        backbone = make(weights=weights, include_top=False, pooling="avg", input_shape=shape)
    except (ValueError, OSError) as error:
        fail(error)
    # Frozen, also BatchNorm keeps its statistics. Without weights there is nothing to keep.
    backbone.trainable = weights is None
    head = [keras.layers.LayerNormalization(), keras.layers.Dense(classes, "softmax")]
    return keras.Sequential([backbone, *head]), backbone


def fit(model, train, held_out, epochs, rate):
    """Trains with AdamW: the rate warms up for a tenth of the epochs, then falls as a cosine.

    The held-out pictures are only measured: nothing is chosen by them.
    """
    import keras

    def rate_in(epoch):
        warm = (epoch + 1) / max(1, epochs // 10)
        return rate * min(warm, 0.5 + 0.5 * math.cos(math.pi * epoch / epochs))

    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.05),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model.fit(
        train,
        validation_data=held_out,
        epochs=epochs,
        callbacks=[keras.callbacks.LearningRateScheduler(rate_in)],
        shuffle=False,  # `train` shuffles itself
        verbose=1 if sys.stdout.isatty() else 2,  # a bar for people, a line an epoch for files
    ).history


def save_and_reload(model, path, pictures):
    """Saves a `.keras` file; returns by how much the reloaded model's predictions differ."""
    import keras

    model.save(path)
    reloaded = keras.models.load_model(path)
    return abs(reloaded.predict_on_batch(pictures) - model.predict_on_batch(pictures)).max()


def export_and_serve(model, folder, pictures):
    """Exports a SavedModel; returns by how much it differs in a process that has no Keras."""
    import numpy as np

    model.export(folder, verbose=False)
    with tempfile.TemporaryDirectory() as exchange:
        sent, answer = f"{exchange}/pictures.npy", f"{exchange}/probabilities.npy"
        np.save(sent, pictures)
        command = [sys.executable, "-c", SERVE, folder, sent, answer]
        served = subprocess.run(command, capture_output=True, text=True)
        if served.returncode:
            fail(f"the SavedModel cannot be served without Keras: {served.stderr[-500:]}", status=1)
        return abs(np.load(answer) - model.predict_on_batch(pictures)).max()


def judge(model, held_out):
    """Returns the share of held-out pictures that is right, and some to show, wrong ones first."""
    right, count, shown = 0, 0, {True: [], False: []}
    for pictures, labels in held_out:
        guesses = model.predict_on_batch(pictures).argmax(-1)
        for picture, label, guess in zip(pictures.numpy(), labels.numpy(), guesses, strict=True):
            right, count = right + (guess == label), count + 1
            if len(shown[guess == label]) < SHOWN:
                shown[guess == label].append((picture, label, guess))
    return right / count, (shown[False] + shown[True])[:SHOWN]


def draw(path, history, accuracy, examples, class_names):
    """Draws held-out pictures with their predictions, and the learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    left.suptitle("Held-out pictures as they were recognised: wrong ones in red, and first")
    axes = left.subplots(4, 6).ravel()
    for axis in axes[len(examples) :]:
        axis.set_axis_off()
    for axis, (picture, label, guess) in zip(axes, examples, strict=False):
        title, colour = class_names[guess], "black"
        if guess != label:
            title, colour = f"{title} (is {class_names[label]})", "crimson"
        axis.set_title(title, color=colour, fontsize=12 if len(title) < 12 else 7)
        axis.imshow(picture.astype("uint8"), cmap="gray_r")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color(colour)
    right.suptitle(f"Held-out accuracy {accuracy:.2%}")
    epochs = range(1, len(history["loss"]) + 1)
    for axis, name in zip(right.subplots(2, 1, sharex=True), ("loss", "accuracy"), strict=True):
        axis.plot(epochs, history[name], ".-", label="training (augmented)")
        axis.plot(epochs, history[f"val_{name}"], ".-", label="held out")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
