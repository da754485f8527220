"""`benchmark`: one network in every runtime, timed in turns."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np

from keras_coatnet.applications import CoAtNet
from keras_coatnet.benchmarking import worker
from keras_coatnet.benchmarking.machine import describe_machine
from keras_coatnet.benchmarking.process import TimedProcess
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
        share: share of the machine's best rate for float32 products that it reaches. Eight bits
            and sixteen can be above 1.
        memory_mb: the process at its largest, with all that it imported; None if unknown.
        size_mb: size of the model's files.
    """

    contender: Contender
    batch_size: int
    milliseconds: float
    low: float
    high: float
    share: float
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
        """Returns the fastest of the contenders with batches of a size; None if all failed."""
        timings = [each for each in self.timings if each.batch_size == batch_size]
        return min(timings, key=lambda each: each.milliseconds, default=None)


def benchmark(
    architecture: str | CoAtNetConfig,
    input_size: int,
    contenders: Sequence[Contender],
    batch_sizes: Sequence[int] = (1, 8),
    announce: Callable[[str], None] = lambda step: None,
) -> Benchmark:
    """Times a network of random weights, on which speed does not depend.

    Args:
        architecture: one of `keras_coatnet.architectures()`, or a `CoAtNetConfig`.
        input_size: height and width of the images, in pixels.
        contenders: the runtimes, all of them installed.
        batch_sizes: the batch sizes, at least one.
        announce: is called with each step that begins.

    Returns:
        A `Benchmark`.

    Raises:
        ValueError: there is no such architecture, or it cannot be built at that size.
    """
    announce(f"building the network at {input_size} x {input_size} pixels")
    model = CoAtNet(
        architecture, input_shape=(input_size, input_size, 3), classifier_activation=None
    )
    operations = 2 * count_flops(architecture, (input_size, input_size, 3))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model.save(folder / "model.keras")
        failed = _write(model, folder, contenders, announce)
        commands = {each: _command(each, folder) for each in contenders if each not in failed}
        sizes = {each: _size(_path(each, folder)) for each in commands}
        announce(f"starting {len(commands)} contenders")
        rates, results = _time(commands, failed, batch_sizes, announce)
    best = max(rates.values())
    timings = [
        Timing(
            contender,
            batch_size,
            float(np.median(times)),
            min(times),
            max(times),
            batch_size * operations / (float(np.median(times)) * 1e6) / best,
            memory,
            sizes[contender] / 1e6,
        )
        for contender, (memory, by_batch) in results.items()
        for batch_size, times in by_batch.items()
    ]
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
    announce(f"writing it in {len(exported)} formats")

    def write(group: list[Contender]) -> None:
        tasks = [_task(model, each, _path(each, folder)) for each in group]
        answers = convert_in_process(model, tasks)
        for contender, answer in zip(group, answers, strict=True):
            if isinstance(answer, str):
                failed[contender] = answer
            else:
                announce(f"wrote {contender}")

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
) -> tuple[dict[str, float], dict[Contender, tuple[int | None, dict[int, list[float]]]]]:
    """Times all contenders and the products in turns; adds those that end early to `failed`.

    Returns:
        GFLOP/s of a product by library; and for each contender its memory, and for each batch size
        the milliseconds of each round.
    """
    environment = worker.environment()
    products = {
        library: TimedProcess.start(library, worker.command("product", library), environment)
        for library in worker.installed_libraries()
    }
    runs = {
        contender: TimedProcess.start(str(contender), command, environment)
        for contender, command in commands.items()
    }
    everything = [*products.values(), *runs.values()]
    try:
        for process in products.values():
            process.wait()
        for contender in list(runs):
            _try(runs, failed, contender, TimedProcess.wait)
        rates: dict[str, list[float]] = {library: [] for library in products}
        times: dict[Contender, dict[int, list[float]]] = {each: {} for each in runs}
        for size in batch_sizes:
            announce(f"timing batches of {size}")
            first = {}
            for contender in list(runs):  # compiles, or lays out, for this size
                first[contender] = _try(runs, failed, contender, TimedProcess.time, 1, size)
            for _ in range(_ROUNDS):
                for library, process in products.items():
                    rates[library].append(worker.PRODUCT_OPERATIONS / process.time(3) / 1e6)
                for contender in list(runs):
                    count = max(1, int(1000 * _TURN_SECONDS / (first[contender] or 1000)))
                    found = _try(runs, failed, contender, TimedProcess.time, count, size)
                    if found is not None:
                        times[contender].setdefault(size, []).append(found)
        for process in products.values():
            process.finish()
        finished = {contender: process.finish() for contender, process in runs.items()}
    finally:
        for process in everything:
            process.kill()
    return (
        {library: max(found) for library, found in rates.items()},
        {each: (found["memory_mb"], times[each]) for each, found in finished.items()},
    )


def _try(
    runs: dict[Contender, TimedProcess],
    failed: dict[Contender, str],
    contender: Contender,
    method: Callable[..., float | None],
    *arguments: int,
) -> float | None:
    """Calls a method of a contender's process; one that has ended is out of the race."""
    try:
        return method(runs[contender], *arguments)
    except RuntimeError as error:
        failed[contender] = str(error)
        runs.pop(contender).kill()
        return None
