"""`keras-coatnet benchmark`: how fast a network is on this machine, in each runtime."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

from keras_coatnet.architectures import find_architecture
from keras_coatnet.benchmarking.runtimes import KERAS, RUNTIMES, find_contenders
from keras_coatnet.cli.checks import whole_number_from
from keras_coatnet.cli.messages import FINE, MISTAKE, SOME_SKIPPED, say
from keras_coatnet.cli.parsers import Commands, add_command
from keras_coatnet.cli.start import load_package
from keras_coatnet.cli.tables import aligned, or_dash
from keras_coatnet.exporting.formats import FORMATS, QUANTIZATIONS
from keras_coatnet.weights import registry

if TYPE_CHECKING:
    from keras_coatnet.benchmarking.benchmark import Benchmark, Timing

_EXAMPLES = """\
examples:
  CoAtNet-0 of the paper:
    keras-coatnet benchmark

  A checkpoint's network at its own size; nothing is downloaded, as weights do not change the speed:
    keras-coatnet benchmark --model coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k --batch-sizes 1

  Eight bits beside float32, in two runtimes:
    keras-coatnet benchmark --runtimes litert onnx --quantize int8

runtimes:
  keras, keras_fused   Keras's own backend, and there the network that keras_coatnet.fuse returns
  saved_model          TensorFlow, with a SavedModel
  litert, onnx, openvino   as of `keras-coatnet export --help`

Each contender is a process of its own on this machine's processor; a GPU is not used. They are
timed in turns. "Of the best rate" compares with the fastest product of two large float32 matrices,
by TensorFlow, NumPy, torch or ONNX Runtime: what no network can be above in float32. Memory is that
of the whole process. Eight bits change predictions a little: `keras-coatnet evaluate` tells how
much.

exit status: 0 all fine; 1 some contenders could not run; 2 a mistake in the call, or none could run
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the sub-command `benchmark`.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(
        commands, "benchmark", "time a network in each runtime of this machine", _EXAMPLES, run
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        default="coatnet0",
        help="an architecture or a checkpoint, see `keras-coatnet models` (default: %(default)s)",
    )
    add(
        "--input-size",
        metavar="PIXELS",
        type=whole_number_from(32),
        help="height and width of the images, at least 32 (default: the checkpoint's, else 224)",
    )
    add(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        metavar="RUNTIME",
        help=f"some of: {', '.join(RUNTIMES)} (default: keras_fused, and those "
        "of litert, onnx and openvino that are installed)",
    )
    add(
        "--batch-sizes",
        nargs="+",
        metavar="N",
        type=whole_number_from(1),
        default=[1, 8],
        help="numbers of images to compute at once (default: 1 8)",
    )
    add(
        "--quantize",
        choices=[name for name in QUANTIZATIONS if name],
        help="also time weights that are stored so, where a runtime has it",
    )
    add("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Times a network, and prints a table.

    Args:
        args: the parsed arguments.

    Returns:
        The exit status.

    Raises:
        ValueError: a mistake in the call.
        ImportError: a runtime that was asked for is not installed.
    """
    architecture, size, classes = _network(args)
    contenders, missing = find_contenders(args.runtimes, args.quantize)
    for reason in missing:
        say(f"left out: {reason}")
    load_package()
    from keras_coatnet.benchmarking.benchmark import benchmark

    started = time.monotonic()

    def announce(step: str) -> None:
        say(f"{time.monotonic() - started:4.0f} s: {step}")

    sizes = sorted(set(args.batch_sizes))
    found = benchmark(architecture, size, contenders, sizes, announce, classes)
    for contender, reason in found.failed.items():
        say(f"{contender} failed: {reason}")
    print(json.dumps(_as_json(found), indent=2) if args.json else _as_text(found))
    if not found.timings:
        return MISTAKE
    return SOME_SKIPPED if found.failed else FINE


def _network(args: argparse.Namespace) -> tuple[str, int, int]:
    """The architecture, the size of its images, and the number of classes."""
    if registry.is_name(args.model):
        checkpoint = registry.find(args.model, None)
        size = args.input_size or checkpoint.input_size
        return checkpoint.architecture, size, checkpoint.classes
    find_architecture(args.model)
    return args.model, args.input_size or 224, 1000


def _as_json(found: Benchmark) -> dict[str, Any]:
    rows = []
    for timing in found.timings:
        row = dataclasses.asdict(timing)
        rows.append({**row.pop("contender"), **row, "images_per_second": timing.images_per_second})
    failed = [{**dataclasses.asdict(each), "error": why} for each, why in found.failed.items()]
    return {
        "machine": found.machine,
        "gflops": found.rates,
        "timings": rows,
        "failed": failed,
    }


def _as_text(found: Benchmark) -> str:
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found.rates.items())
    head = ("batch", "runtime", "ms", "low-high", "images/s", "of the best rate", "MB memory", "MB")
    rows: list[tuple[str, ...]] = [head]
    sizes = sorted({timing.batch_size for timing in found.timings})
    for size in sizes:
        timings = [timing for timing in found.timings if timing.batch_size == size]
        for timing in sorted(timings, key=lambda each: each.milliseconds):
            rows.append(
                (
                    str(size),
                    str(timing.contender),
                    f"{timing.milliseconds:.1f}",
                    f"{timing.low:.1f}-{timing.high:.1f}",
                    f"{timing.images_per_second:.1f}",
                    or_dash(timing.share, "{:.0%}"),
                    or_dash(timing.memory_mb, "{:,}"),
                    f"{timing.size_mb:.0f}",
                )
            )
    lines = [found.machine, f"float32 products, GFLOP/s: {rates}", ""]
    lines += aligned(rows, right=(0, 2, 3, 4, 5, 6, 7))
    advice = [_advice(timing) for size in sizes if (timing := found.fastest(size)) is not None]
    return "\n".join([*lines, "", *advice])


def _advice(timing: Timing) -> str:
    contender = timing.contender
    if contender.runtime in KERAS:
        how = "keras_coatnet.fuse(model)" if contender.runtime == "keras_fused" else "the model"
    else:
        quantize = f" --quantize {contender.quantize}" if contender.quantize else ""
        format = FORMATS[contender.runtime]
        how = f"keras-coatnet export WEIGHTS model{format.suffix}{quantize}"
    batch = f"a batch of {timing.batch_size}" if timing.batch_size > 1 else "single images"
    return f"Use for {batch}: {contender} ({how})"
