"""Every kind of network in every format: written, verified, and timed in its own runtime.

    python benchmarks/exports.py --json mine.json
    python benchmarks/exports.py --models small --backends tensorflow jax torch
    python benchmarks/exports.py --show mine.json      # a saved run again, as Markdown

The networks have random weights in all of their variables. `export` verifies each on eight images
of random patterns; the difference is the largest of any output, as a share of the largest output.
Each is then run on one image and on eight by a process without Keras, one network's formats in
turns; times are medians. A format that a network cannot be written in has what `export` says of it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from keras_coatnet.benchmarking import worker
from keras_coatnet.benchmarking.machine import describe_machine
from keras_coatnet.benchmarking.process import Contest
from keras_coatnet.exporting.formats import FORMATS

# "nested" is a classifier of a user's own around a backbone, after a step of training. "small" is
# a configuration that nobody has published.
MODELS = (
    "coatnet0",
    "coatnet1",
    "coatnet2",
    "coatnet3",
    "coatnet_rmlp_nano_rw_224",
    "coatnet_bn_0_rw_224",
    "nested",
    "small",
)
BATCHES = (1, 8)
ROUNDS = 5


def make(name: str):
    """The network of a row."""
    import keras
    import numpy as np
    from half_precision import randomize

    import keras_coatnet

    if name == "small":
        config = keras_coatnet.CoAtNetConfig((32, 64, 128, 256), (1, 1, 2, 1), stem_width=16)
        model = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        randomize(model)
        return model
    shape = (224, 224, 3)
    if name != "nested":
        model = keras_coatnet.CoAtNet(name, input_shape=shape, classifier_activation=None)
        randomize(model)
        return model
    options = {"include_top": False, "pooling": "avg", "input_shape": shape}
    backbone = keras_coatnet.CoAtNet("coatnet_nano_rw_224", **options)
    randomize(backbone)
    inputs = keras.Input(shape)
    features = backbone(keras.layers.RandomFlip("horizontal")(inputs))
    outputs = keras.layers.Dense(5, activation="softmax")(keras.layers.Dropout(0.2)(features))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(np.random.default_rng(0).uniform(0, 255, (4, *shape)), np.arange(4), verbose=0)
    return model


def write(name: str, format: str, folder: pathlib.Path) -> None:
    """Exports a network in a format, and prints a row of JSON."""
    import keras

    import keras_coatnet

    model = make(name)
    path = folder / f"{format}{FORMATS[format].suffix}"
    row = {"model": name, "backend": keras.backend.backend(), "format": format}
    began = time.monotonic()
    try:
        report = keras_coatnet.export(model, path, format, verbose=False)
    except ValueError as error:
        row["error"] = str(error)
    else:
        row |= report.to_dict() | {"path": str(path), "seconds": time.monotonic() - began}
        # The accepted one is a thousandth of the largest output.
        row["difference"] = report.max_difference / report.tolerance / 1000
    print(json.dumps(row), flush=True)


def measure(name: str, backend: str) -> list[dict]:
    """Exports a network to each format by a process of its own, and times what they wrote."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for format in FORMATS:
            done = subprocess.run(
                [sys.executable, __file__, "--write", name, format, folder],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            )
            if done.returncode == 0:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            else:  # as where memory ran out
                error = f"the process ended with status {done.returncode}"
                rows.append({"model": name, "backend": backend, "format": format, "error": error})
        with Contest[str]() as contest:
            for row in rows:
                if "path" in row:
                    command = worker.command("exported", row["format"], row.pop("path"))
                    contest.start(row["format"], command, worker.environment())
                    contest.wait()
            for batch in BATCHES:
                times: dict[str, list[float]] = {}
                for number in range(ROUNDS + 1):
                    for format in list(contest.running):
                        taken = contest.time(format, 1, batch)
                        if taken is not None and number:  # the first lays out for this size
                            times.setdefault(format, []).append(taken)
                for row in rows:
                    if row["format"] in times:
                        row[f"ms_{batch}"] = statistics.median(times[row["format"]])
            assert not contest.failed, contest.failed
    return rows


def summary(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| network | backend | format | fused | difference | top-1 | MB | s to export "
        "| ms, 1 | ms, 8 |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        head = f"| {row['model']} | {row['backend']} | {FORMATS[row['format']].title} |"
        if "error" in row:
            lines.append(f"{head} {row['error']} |||||||")
            continue
        lines.append(
            f"{head} {'yes' if row['fused'] else 'no'} | {row['difference']:.0e} "
            f"| {row['top1_agreement']:.0%} | {row['size_bytes'] / 1e6:.1f} "
            f"| {row['seconds']:.0f} | {row['ms_1']:.1f} | {row['ms_8']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the measurement, or shows one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--backends", nargs="+", choices=("tensorflow", "jax", "torch"), default=["tensorflow"])
    add("--json", metavar="FILE", help="rows that it has already, and a run has not, stay in it")
    add("--show", metavar="FILE", help="a saved run again, as Markdown")
    add("--write", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.show:
        print(summary(json.loads(pathlib.Path(args.show).read_text())), end="")
        return
    if args.write:
        name, format, folder = args.write
        write(name, format, pathlib.Path(folder))
        return
    results = {"machine": describe_machine(), "rows": []}
    file = pathlib.Path(args.json) if args.json else None
    if file is not None and file.exists():
        results = json.loads(file.read_text())
        if results["machine"] != describe_machine():
            parser.error(f"{file} was measured on another machine: {results['machine']}")
    for name in args.models:
        for backend in args.backends:
            others = [
                row for row in results["rows"] if (row["model"], row["backend"]) != (name, backend)
            ]
            results["rows"] = [*others, *measure(name, backend)]
            if file is not None:
                file.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results), end="")


if __name__ == "__main__":
    main()
