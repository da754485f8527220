"""`benchmark`: one network in every runtime, timed in turns."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np

from keras_coatnet.applications import CoAtNet
from keras_coatnet.benchmarking import worker
from keras_coatnet.benchmarking.machine import describe_machine
from keras_coatnet.benchmarking.process import Contest
from keras_coatnet.benchmarking.runtimes import Contender
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.counting import count_flops
from keras_coatnet.exporting.card import Card
from keras_coatnet.exporting.conversion import Task, convert_in_process
from keras_coatnet.exporting.formats import FORMATS

# How often the contenders take turns, and for how long, about, each of them computes in a turn.
_ROUNDS = 3
_TURN_SECONDS = 0.4

# Images that the ranges of `"int8"` are measured on. Speed does not depend on what they are.
_CALIBRATION = 4


@dataclasses.dataclass(frozen=True)
class Timing:
    """How fast a contender is with batches of one size.

    Attributes:
        contender: the runtime, and how it stores weights.
        batch_size: images of a batch.
        milliseconds: median of a batch, over the rounds.
        low, high: the fastest and the slowest round.
        share: share of the processor's best rate for float32 products that it reaches. Eight bits
            can be above 1. None if no product could be timed.
        memory_mb: the process at its largest until then, with what it imported; None if unknown.
        size_mb: size of the model's files.
    """

    contender: Contender
    batch_size: int
    milliseconds: float
    low: float
    high: float
    share: float | None
    memory_mb: int | None
    size_mb: float

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch_size / self.milliseconds


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Attributes:
        machine: the machine, with its instruction sets.
        rates: float32 GFLOP/s of a product of two large matrices, by library.
        timings: a `Timing` for each contender and batch size.
        failed: why a contender could not run, by contender.
    """

    machine: str
    rates: dict[str, float]
    timings: list[Timing]
    failed: dict[Contender, str]

    def fastest(self, batch_size: int) -> Timing | None:
        """Returns the fastest of the contenders with batches of a size.

        Args:
            batch_size: the size.

        Returns:
            Its `Timing`; None if all failed.
        """
        timings = [each for each in self.timings if each.batch_size == batch_size]
        return min(timings, key=lambda each: each.milliseconds, default=None)


def benchmark(
    architecture: str | CoAtNetConfig,
    input_size: int,
    contenders: Sequence[Contender],
    batch_sizes: Sequence[int] = (1, 8),
    announce: Callable[[str], None] = lambda step: None,
    classes: int = 1000,
) -> Benchmark:
    """Times a network of random weights, on which speed does not depend, on the processor.

    Args:
        architecture: one of `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        input_size: height and width of the images, in pixels.
        contenders: the runtimes, all of them installed.
        batch_sizes: the batch sizes, at least one.
        announce: is called with each step that begins.
        classes: outputs of the classifier.

    Returns:
        A `Benchmark`.

    Raises:
        ValueError: there is no such architecture, or it cannot be built at that size.
    """
    announce(f"building the network at {input_size} x {input_size} pixels")
    shape = (input_size, input_size, 3)
    model = CoAtNet(architecture, input_shape=shape, classes=classes, classifier_activation=None)
    operations = 2 * count_flops(architecture, shape, classes=classes)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model.save(folder / "model.keras")
        failed = _write(model, folder, contenders, announce)
        commands = {each: _command(each, folder) for each in contenders if each not in failed}
        sizes = {each: _size(_path(each, folder)) for each in commands}
        rates, results = _time(commands, failed, batch_sizes, announce)
    best = max(rates.values(), default=None)
    timings = []
    for (contender, size), (times, memory) in results.items():
        middle = statistics.median(times)
        share = None if best is None else size * operations / (middle * 1e6) / best
        megabytes = sizes[contender] / 1e6
        timings.append(
            Timing(contender, size, middle, min(times), max(times), share, memory, megabytes)
        )
    return Benchmark(describe_machine(), rates, timings, failed)


# --- Files -------------------------------------------------------------------------------------


def _path(contender: Contender, folder: pathlib.Path) -> pathlib.Path:
    if not contender.is_exported:
        return folder / "model.keras"
    ending = FORMATS[contender.runtime].suffix
    return folder / f"{contender.runtime}-{contender.quantize}" / f"model{ending}"


def _size(path: pathlib.Path) -> int:
    files = [path] if path.suffix == ".keras" else path.parent.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _write(
    model: keras.Model,
    folder: pathlib.Path,
    contenders: Iterable[Contender],
    announce: Callable[[str], None],
) -> dict[Contender, str]:
    """Writes the model in each format, by a process for each core; returns why some failed."""
    exported = [each for each in contenders if each.is_exported]
    failed: dict[Contender, str] = {}
    if not exported:
        return failed
    announce(f"exporting it: {', '.join(map(str, exported))}")

    def write(group: list[Contender]) -> None:
        tasks = [_task(model, each, _path(each, folder)) for each in group]
        answers = convert_in_process(model, tasks)
        for contender, answer in zip(group, answers, strict=True):
            if isinstance(answer, str):
                failed[contender] = answer
            else:
                announce(f"exported: {contender}")

    processes = min(os.cpu_count() or 1, len(exported))
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        list(pool.map(write, [exported[start::processes] for start in range(processes)]))
    return failed


def _task(model: keras.Model, contender: Contender, path: pathlib.Path) -> Task:
    path.parent.mkdir()
    shape = model.input_shape[1:]
    card = Card(model.name, shape, model.output_shape[1:], quantize=contender.quantize)
    images = None
    if contender.quantize == "int8":
        values = np.random.default_rng(0).uniform(0, 255, (_CALIBRATION, *shape))
        images = values.astype("float32")
    return Task(contender.runtime, path, card, images)


def _command(contender: Contender, folder: pathlib.Path) -> list[str]:
    path = str(_path(contender, folder))
    if contender.is_exported:
        return worker.command("exported", contender.runtime, path)
    return worker.command("keras", path, "yes" if contender.runtime == "keras_fused" else "no")


# --- Times -------------------------------------------------------------------------------------


def _time(
    commands: dict[Contender, list[str]],
    failed: dict[Contender, str],
    batch_sizes: Sequence[int],
    announce: Callable[[str], None],
) -> tuple[dict[str, float], dict[tuple[Contender, int], tuple[list[float], int | None]]]:
    """Times all contenders and the products in turns; adds those that end early to `failed`.

    Returns:
        GFLOP/s of a product by library; and for each contender and batch size the milliseconds of
        each round, with the memory.
    """
    environment = worker.environment()
    rates: dict[str, float] = {}
    results: dict[tuple[Contender, int], tuple[list[float], int | None]] = {}
    with Contest[Contender]() as contest, Contest[str]() as products:
        announce(f"starting {len(commands)} contenders")
        for library in worker.installed_libraries():
            products.start(library, worker.command("product", library), environment)
        for contender, command in commands.items():
            contest.start(contender, command, environment)
        products.wait()
        contest.wait()
        for size in batch_sizes:
            announce(f"timing batches of {size}")
            counts = {}
            for contender in list(contest.running):
                contest.time(contender, 1, size)  # compiles, or lays out, for this size
                once = contest.time(contender, 1, size)
                counts[contender] = max(1, int(1000 * _TURN_SECONDS / once)) if once else 1
            for _ in range(_ROUNDS):
                for library in list(products.running):
                    taken = products.time(library, 3)
                    if taken is not None:
                        rate = worker.PRODUCT_OPERATIONS / taken / 1e6
                        rates[library] = max(rate, rates.get(library, 0.0))
                for contender in list(contest.running):
                    taken = contest.time(contender, counts[contender], size)
                    if taken is not None:
                        times, _ = results.get((contender, size), ([], None))
                        memory = contest.running[contender].memory_mb
                        results[contender, size] = [*times, taken], memory
        failed |= contest.failed
    return rates, results
