"""`keras-coatnet predict`: what is on images."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from keras_coatnet.cli.checks import (
    check_weights,
    find_images,
    labels_beside,
    read_labels,
    whole_number_from,
)
from keras_coatnet.cli.messages import FINE, SOME_SKIPPED, say
from keras_coatnet.cli.parsers import (
    Commands,
    add_classifier_options,
    add_command,
    cropped_as_asked,
)
from keras_coatnet.cli.start import load_package
from keras_coatnet.cli.tables import aligned
from keras_coatnet.labels import name_classes

if TYPE_CHECKING:
    import numpy as np

    from keras_coatnet.inference import Prediction

DEFAULT_MODEL = "coatnet_0_rw_224.sw_in1k"

_LOG_SECONDS = 10  # between two lines of progress where the error stream is not a terminal

_EXAMPLES = """\
examples:
  The five likeliest of ImageNet's 1000 classes, by the default model:
    keras-coatnet predict cat.jpg

  All images in a folder and below, by the most accurate checkpoint (384 pixels, 296 MB):
    keras-coatnet predict holiday/ --model coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k

  A model of your own, with the names of your classes, one on each line of a file, and images
  made square as keras.utils.image_dataset_from_directory does:
    keras-coatnet predict leaf.jpg --model leaves.keras --labels leaves.txt \\
        --crop-mode squash --crop-pct 1

  What `train` made, with the names of its classes:
    keras-coatnet predict leaf.jpg --model runs/leaves/final.weights.h5

  A file that you downloaded:
    keras-coatnet predict cat.jpg --model model.safetensors --architecture coatnet_0_rw_224

  As JSON, for another program:
    keras-coatnet predict holiday/ --json > found.json

--json prints one document:
  {"model": NAME,
   "images": [{"image": PATH,
                 "top": [{"class": NUMBER, "wordnet_id": ID, "name": NAME, "score": SHARE}, ...]},
                ...],
   "skipped": [{"image": PATH, "error": WHY}, ...]}
wordnet_id is null where the classes are not ImageNet's.

Hidden files and folders are passed over. Links to folders are followed, each folder once.

Checkpoints are downloaded at their first use, into the Hugging Face hub's cache (HF_HOME). Images
are resized and cropped as in the measurement of the checkpoint's accuracy; for files of your own to
the size of the model's input, of which --crop-pct 0.95 of the middle is kept. A camera's note of
which way up it was held (EXIF) is ignored, as it was there.

exit status: 0 all fine; 1 some images, or all, could not be read and were skipped; 2 a mistake in
the call: no such file, folder, model or option
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `predict`.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(commands, "predict", "say what is on images", _EXAMPLES, run)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images")
    add(
        "--model",
        "--weights",
        default=DEFAULT_MODEL,
        help="a checkpoint's name (see `keras-coatnet models`), or a file: .keras, .weights.h5, "
        ".safetensors, .h5, or what `export` wrote (default: %(default)s)",
    )
    add(
        "--labels",
        metavar="FILE",
        help="names of the model's classes, one on each line, in the order of its outputs "
        "(default: those in the exported file, those that `train` wrote beside the weights, or "
        "ImageNet's)",
    )
    add(
        "--top",
        "-k",
        type=whole_number_from(1),
        default=5,
        metavar="N",
        help="number of classes to name for each image (default: %(default)s)",
    )
    add_classifier_options(parser, batch_size=32)


def run(args: argparse.Namespace) -> int:
    """Classifies images, and prints the likeliest classes of each.

    Args:
        args: the parsed arguments.

    Returns:
        The exit status.

    Raises:
        ValueError: a mistake in the call.
    """
    paths, unreadable = find_images(args.images)
    labels = _check(args)
    load_package()
    from keras_coatnet import inference

    model, settings = inference.open_model(args.model, args.architecture)
    settings = cropped_as_asked(settings, args)
    classes = inference.check_classifier(model)
    if labels is None:
        labels = inference.class_names_of(model) or labels_beside(args.model, classes)
    names = name_classes(classes, labels, "--labels")
    predictions = inference.predict_images(model, paths, settings, args.batch_size)
    return _report(args, _with_progress(predictions, len(paths)), unreadable, names)


def _check(args: argparse.Namespace) -> list[str] | None:
    """Checks the call as far as that costs nothing, and returns the names of the classes."""
    labels = None if args.labels is None else read_labels(args.labels)
    checkpoint = check_weights(args.model, args.architecture)
    if checkpoint is not None:
        name_classes(checkpoint.classes, labels, "--labels")
    return labels


def _report(
    args: argparse.Namespace,
    predictions: Iterator[Prediction],
    unreadable: Sequence[OSError],
    names: Sequence[tuple[str | None, str]],
) -> int:
    """Prints each prediction as it comes, or all of them as JSON, and returns the exit status."""
    found, skipped = [], []
    for error in unreadable:
        text = f"{error.filename} cannot be read: {error.strerror}"
        skipped.append({"image": str(error.filename), "error": text})
        say(f"skipped: {text}")
    for prediction in predictions:
        if prediction.scores is None:
            skipped.append({"image": str(prediction.path), "error": prediction.error})
            continue
        top = _top(prediction.scores, names, args.top)
        found.append({"image": str(prediction.path), "top": top})
        if not args.json:
            _print_above_bar(_as_text(found[-1]) + "\n")
    if args.json:
        print(json.dumps({"model": args.model, "images": found, "skipped": skipped}, indent=2))
    if skipped:
        say(f"{len(skipped)} of {len(found) + len(skipped)} images skipped")
    return SOME_SKIPPED if skipped else FINE


def _top(
    scores: np.ndarray, names: Sequence[tuple[str | None, str]], count: int
) -> list[dict[str, Any]]:
    best = (-scores).argsort(kind="stable")[:count].tolist()
    return [
        {
            "class": number,
            "wordnet_id": names[number][0],
            "name": names[number][1],
            "score": scores[number].item(),
        }
        for number in best
    ]


def _as_text(found: dict[str, Any]) -> str:
    rows = [
        (f"{entry['score']:.2%}", *filter(None, [entry["wordnet_id"]]), entry["name"])
        for entry in found["top"]
    ]
    return "\n".join([found["image"], *aligned(rows, right=(0,), indent="  ")])


def _with_progress(predictions: Iterator[Prediction], total: int) -> Iterator[Prediction]:
    """A bar on a terminal; a line now and then where a long run goes to a log file."""
    from huggingface_hub.utils import tqdm  # obeys HF_HUB_DISABLE_PROGRESS_BARS, as downloads do

    told = time.monotonic()
    bar = tqdm(predictions, total=total, unit="image", disable=None)
    for done, prediction in enumerate(bar, start=1):
        if prediction.error is not None:
            with bar.external_write_mode(file=sys.stderr):
                say(f"skipped: {prediction.error}")
        if not sys.stderr.isatty() and time.monotonic() - told > _LOG_SECONDS:
            say(f"{done} of {total} images done")
            told = time.monotonic()
        yield prediction


def _print_above_bar(text: str) -> None:
    from huggingface_hub.utils import tqdm

    tqdm.write(text, file=sys.stdout)
