"""The command line: arguments in, calls to the package out.

Each sub-command is a function that takes the parsed arguments and returns the exit status. What a
command answers goes to the standard output, all else (progress, what was skipped, errors) to the
error stream. What a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import keras_coatnet
from keras_coatnet import cli_training
from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.paths import check_local
from keras_coatnet.weights import registry

if TYPE_CHECKING:
    from keras_coatnet.inference import Prediction

# Exit statuses.
FINE, SOME_SKIPPED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

DEFAULT_MODEL = "coatnet_0_rw_224.sw_in1k"

_LOG_SECONDS = 10  # between two lines of progress where the error stream is no terminal

# What is taken for an image inside a folder. A file that is named itself may have any suffix.
IMAGE_SUFFIXES = tuple(
    ".avif .bmp .gif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()
)

_EXAMPLES = """\
examples:
  keras-coatnet predict cat.jpg
  keras-coatnet predict holiday/ more/*.png --top 3
  keras-coatnet models
  keras-coatnet train transfer --weights coatnet_0_rw_224.sw_in1k --data flowers/
  keras-coatnet evaluate --weights coatnet_0_rw_224.sw_in1k --data imagenet/val

`keras-coatnet COMMAND --help` explains a command and its options.

exit status: 0 all fine; 1 some images were skipped; 2 a mistake in the call
"""

_PREDICT_EXAMPLES = """\
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

_MODELS_EXAMPLES = """\
examples:
  keras-coatnet models
  keras-coatnet models --architectures
  keras-coatnet models --json | jq '.[] | select(.top1 > 86) | .name'

GMACs are billions of multiply-adds of convolutions and matrix products, for one image of that
size. top-1 and top-5 are percent on ImageNet-1k's validation set; checkpoints of 11,821 classes
have none. Of architectures, parameters are counted with 1000 classes.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows the command's name; None: those of this process.

    Returns:
        The exit status: 0 fine, 1 some images were skipped, 2 a user's mistake.

    Raises:
        SystemExit: after `--help` and `--version`, and for arguments that cannot be parsed.

    Example:
        >>> main(["predict", "no_such_image.jpg"])
        2
    """
    # The name of a file may hold what the terminal's encoding does not.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    formatted, warnings.formatwarning = warnings.formatwarning, _formatted_warning
    try:
        parsed = _parser().parse_args(arguments)
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe, such as `head`, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        _say(f"error: {error}")
        return MISTAKE
    finally:
        warnings.formatwarning = formatted


def _formatted_warning(message: Warning | str, *source: object) -> str:
    """A warning in one line, without the line of code that it comes from."""
    return f"keras-coatnet: warning: {' '.join(str(message).split())}\n"


def _say(message: str) -> None:
    """One line on the error stream, whatever the message holds."""
    print(f"keras-coatnet: {' '.join(message.split())}", file=sys.stderr)


# --- Arguments -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"keras-coatnet: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="keras-coatnet",
        description="CoAtNet for Keras 3: classify images, train and evaluate networks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"keras-coatnet {keras_coatnet.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_predict(commands)
    _add_models(commands)
    cli_training.add_commands(commands, _add_command)
    return parser


def _add_command(commands: Any, name: str, run: Any, help: str, epilog: str) -> _Parser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_predict(commands: Any) -> None:
    parser = _add_command(commands, "predict", _predict, "say what is on images", _PREDICT_EXAMPLES)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, or a folder of them")
    add(
        "--model",
        "--weights",
        default=DEFAULT_MODEL,
        help="a checkpoint's name (see `keras-coatnet models`), or a file: .keras, .weights.h5, "
        ".safetensors, .h5 (default: %(default)s)",
    )
    add(
        "--architecture",
        metavar="NAME",
        help="the network that a file's weights belong to, where the file does not say "
        "(see `keras-coatnet models --architectures`)",
    )
    add(
        "--labels",
        metavar="FILE",
        help="names of the model's classes, one a line, in order "
        "(default: those that `train` wrote beside the weights, or ImageNet's)",
    )
    add(
        "--top",
        "-k",
        type=_count,
        default=5,
        metavar="N",
        help="how many classes to name for an image (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=_count,
        default=32,
        metavar="N",
        help="images to compute at once (default: %(default)s)",
    )
    add(
        "--crop-pct",
        type=float,
        metavar="SHARE",
        help="share of the resized side that is kept, above 0 and at most 1 (default: the "
        "checkpoint's, or 0.95)",
    )
    add(
        "--crop-mode",
        choices=("center", "squash"),
        help="center: cut out the middle; squash: change the proportions (default: the "
        "checkpoint's, or center)",
    )
    add("--json", action="store_true", help="print one JSON document instead of tables")


def _add_models(commands: Any) -> None:
    parser = _add_command(
        commands,
        "models",
        _models,
        "list the public checkpoints, or the architectures",
        _MODELS_EXAMPLES,
    )
    parser.add_argument(
        "--architectures", action="store_true", help="every network that can be built, untrained"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON list instead")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table instead")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


# --- predict ---------------------------------------------------------------------------------


def _predict(args: argparse.Namespace) -> int:
    # What costs nothing is checked first: a model may have to be downloaded.
    paths, unreadable = _find_images(args.images)
    labels = None if args.labels is None else _read_labels(args.labels)
    from keras_coatnet import inference

    model, settings = inference.open_model(args.model, args.architecture)
    asked = {"crop_pct": args.crop_pct, "crop_mode": args.crop_mode}
    given = {field: value for field, value in asked.items() if value is not None}
    settings = dataclasses.replace(settings, **given)
    classes = inference.check_classifier(model)
    names = _name_classes(
        classes, _labels_of_run(args.model, classes) if labels is None else labels
    )

    found, skipped = [], []
    for error in unreadable:
        text = f"{error.filename} cannot be read: {error.strerror}"
        skipped.append({"image": str(error.filename), "error": text})
        _say(f"skipped: {text}")
    predictions = inference.predict_images(model, paths, settings, args.batch_size)
    for prediction in _with_progress(predictions, len(paths)):
        if prediction.error is not None:
            skipped.append({"image": str(prediction.path), "error": prediction.error})
            continue
        found.append({"image": str(prediction.path), "top": _top(prediction, names, args.top)})
        if not args.json:
            _print_above_bar(_as_text(found[-1]) + "\n")
    if args.json:
        print(json.dumps({"model": args.model, "images": found, "skipped": skipped}, indent=2))
    if skipped:
        _say(f"{len(skipped)} of {len(paths) + len(unreadable)} images skipped")
    return SOME_SKIPPED if skipped else FINE


def _find_images(arguments: Sequence[str]) -> tuple[list[pathlib.Path], list[OSError]]:
    """Files as they are named; of folders all images, also in the folders below.

    The errors are those of folders and links that cannot be read.
    """
    paths: list[pathlib.Path] = []
    unreadable: list[OSError] = []
    for argument in arguments:
        check_local(argument, "image")
        path = pathlib.Path(argument)
        if not path.exists():
            raise ValueError(f"There is no file or folder {path}.")
        before = len(unreadable)
        found = list(_images_below(path, unreadable)) if path.is_dir() else [path]
        if not found and len(unreadable) == before:
            raise ValueError(
                f"There is no image in the folder {path}: no file ends in "
                f"{', '.join(IMAGE_SUFFIXES)}."
            )
        paths += found
    return paths, unreadable


def _images_below(folder: pathlib.Path, unreadable: list[OSError]) -> Iterator[pathlib.Path]:
    from keras_coatnet.training.data.folders import files_below

    # Hidden files are notes of file managers, some with an image's suffix.
    for path in files_below(folder, unreadable.append):
        if path.lower().endswith(IMAGE_SUFFIXES):
            yield pathlib.Path(path)


def _read_labels(path: str) -> list[str]:
    check_local(path, "labels")
    try:
        # Some editors put a byte-order mark first.
        lines = pathlib.Path(path).read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"The labels in {path} cannot be read: {error}") from error
    labels = [line.strip() for line in lines]
    if "" in labels:
        raise ValueError(
            f"Line {labels.index('') + 1} of the labels in {path} is empty. Expected the name of a "
            "class on each line."
        )
    return labels


def _labels_of_run(model: str, classes: int) -> list[str] | None:
    """Names of the classes that `train` wrote beside the weights; None if it did not."""
    path = pathlib.Path(model).with_name("classes.txt")
    if not pathlib.Path(model).is_file() or not path.is_file():
        return None
    labels = _read_labels(str(path))
    return labels if len(labels) == classes else None


def _name_classes(classes: int, labels: list[str] | None) -> list[tuple[str | None, str]]:
    """(WordNet id, name) of each class; the id is None, and the name a number, if unknown."""
    from keras_coatnet.labels import class_names

    if labels is not None:
        if len(labels) != classes:
            raise ValueError(
                f"The file of --labels has {len(labels)} lines, and the model {classes} classes. "
                "Give one name a line, in the order of the model's outputs."
            )
        known = dict(class_names(11821)) | dict(class_names(1000))
        return [(label, known[label]) if label in known else (None, label) for label in labels]
    try:
        return list(class_names(classes))
    except ValueError:  # a classifier of the user's own
        return [(None, f"class {number}") for number in range(classes)]


def _top(
    prediction: Prediction, names: Sequence[tuple[str | None, str]], count: int
) -> list[dict[str, Any]]:
    best = (-prediction.scores).argsort(kind="stable")[:count].tolist()
    return [
        {
            "class": number,
            "wordnet_id": names[number][0],
            "name": names[number][1],
            "score": prediction.scores[number].item(),
        }
        for number in best
    ]


def _as_text(found: dict[str, Any]) -> str:
    rows = [
        (f"{entry['score']:.2%}", *filter(None, [entry["wordnet_id"]]), entry["name"])
        for entry in found["top"]
    ]
    return "\n".join([found["image"], *_aligned(rows, right=(0,), indent="  ")])


def _with_progress(predictions: Iterator[Prediction], total: int) -> Iterator[Prediction]:
    """A bar on a terminal; a line now and then where a long run goes to a log file."""
    from huggingface_hub.utils import tqdm  # the bar, and the switch, of the downloads

    told = time.monotonic()
    bar = tqdm(predictions, total=total, unit="image", disable=None)
    for done, prediction in enumerate(bar, start=1):
        if prediction.error is not None:
            with bar.external_write_mode(file=sys.stderr):
                _say(f"skipped: {prediction.error}")
        if not sys.stderr.isatty() and time.monotonic() - told > _LOG_SECONDS:
            _say(f"{done} of {total} images done")
            told = time.monotonic()
        yield prediction


def _print_above_bar(text: str) -> None:
    from huggingface_hub.utils import tqdm

    tqdm.write(text, file=sys.stdout)


# --- models ----------------------------------------------------------------------------------


def _models(args: argparse.Namespace) -> int:
    facts = _architecture_facts() if args.architectures else _checkpoint_facts()
    if args.json:
        print(json.dumps(facts, indent=2))
        return FINE
    rows = _architecture_rows(facts) if args.architectures else _checkpoint_rows(facts)
    numbers = [index for index, title in enumerate(rows[0]) if title in _NUMBERS]
    table = _markdown(rows, numbers) if args.markdown else _aligned(rows, right=numbers)
    print("\n".join(table))
    return FINE


def _markdown(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[str]:
    """Lines of a Markdown table; the columns `right` are aligned to the right."""
    titles, *others = rows
    yield f"| {' | '.join(titles)} |"
    yield f"|{'|'.join('---:' if index in right else '---' for index in range(len(titles)))}|"
    for row in others:
        yield f"| {' | '.join(row)} |"


_NUMBERS = ("params", "GMACs", "pixels", "classes", "top-1", "top-5", "file", "checkpoints")


def _checkpoint_facts() -> list[dict[str, Any]]:
    return [
        {
            **dataclasses.asdict(checkpoint),
            "multiply_adds": keras_coatnet.count_flops(
                checkpoint.architecture,
                (checkpoint.input_size, checkpoint.input_size, 3),
                classes=checkpoint.classes,
            ),
        }
        for checkpoint in registry.CHECKPOINTS.values()
    ]


def _checkpoint_rows(facts: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    titles = ("checkpoint", "architecture", "params", "GMACs", "pixels", "classes")
    return [
        (*titles, "top-1", "top-5", "file", "license", "measured by"),
        *(
            (
                entry["name"],
                entry["architecture"],
                f"{entry['parameters'] / 1e6:.1f}M",
                f"{entry['multiply_adds'] / 1e9:.1f}",
                str(entry["input_size"]),
                str(entry["classes"]),
                _or_dash(entry["top1"], "{:.2f}"),
                _or_dash(entry["top5"], "{:.2f}"),
                _or_dash(entry["size"] and entry["size"] / 1e6, "{:.0f} MB"),
                entry["license"],
                _or_dash(entry["measured_by"], "{}"),
            )
            for entry in facts
        ),
    ]


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _architecture_facts() -> list[dict[str, Any]]:
    facts = []
    for name in keras_coatnet.architectures():
        side = ARCHITECTURES[name].input_size
        known = registry.CHECKPOINTS.values()
        facts.append(
            {
                "name": name,
                "parameters": keras_coatnet.count_params(name, (side, side, 3)),
                "multiply_adds": keras_coatnet.count_flops(name, (side, side, 3)),
                "input_size": side,
                "checkpoints": [one.name for one in known if one.architecture == name],
            }
        )
    return facts


def _architecture_rows(facts: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        ("architecture", "params", "GMACs", "pixels", "checkpoints"),
        *(
            (
                entry["name"],
                f"{entry['parameters'] / 1e6:.1f}M",
                f"{entry['multiply_adds'] / 1e9:.1f}",
                str(entry["input_size"]),
                str(len(entry["checkpoints"])),
            )
            for entry in facts
        ),
    ]


def _aligned(
    rows: Sequence[tuple[str, ...]], right: Iterable[int], indent: str = ""
) -> Iterator[str]:
    """Lines with the columns of a table below each other, those in `right` by their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (indent + "  ".join(cells)).rstrip()
