"""How fast the networks are, beside all others, interleaved in one run.

    python benchmarks/speed.py --json results/mine.json
    python benchmarks/speed.py --cells infer:1:224 infer:8:224 train:8:224 --models coatnet0
    python benchmarks/speed.py --compare results/before.json results/mine.json
    python benchmarks/speed.py --show results/mine.json

A cell is what is done, the batch and the size. For each cell every contender is a process of its
own, and they are timed in turns, one at a time, so that a slow minute of the machine slows all
alike; shown are the median of the rounds and their spread. The floor is the network's operations
(two for each multiply-add of its convolutions and matrix products) at the machine's best rate for a
large float32 matrix product: that of TensorFlow, NumPy, torch or ONNX Runtime, timed in the same
turns. A share of it is how near a contender comes. A training step counts three times the
operations. Memory is the process's peak; "build" is imports and construction, and what is written
for another runtime, where an earlier cell has not written it; "first" is the first run, compiling
included.

How cost grows is the share of the floor at other sizes and for other models:

    python benchmarks/speed.py --contenders "ours fused" --cells infer:1:224 infer:1:512
    python benchmarks/speed.py --contenders "ours fused" --models coatnet0 coatnet2 coatnet4

timm's networks have a few percent other operations than ours; ConvNeXt and EfficientNetV2 are those
of about the same number: beside coatnet0 stand ConvNeXtTiny (4.5G) and EfficientNetV2B3 (3.0G).
keras_cv_attention_models needs an environment with Keras 2: give its Python with --kecam-python.
All contenders of a cell are in memory at once: where that is short, let fewer be --together. A file
of results may be written by several runs: the cells that it has and a run has not stay in it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from contenders import FLOORS, check

from keras_coatnet.benchmarking.machine import describe_machine
from keras_coatnet.benchmarking.process import Contest
from keras_coatnet.benchmarking.worker import PRODUCT_OPERATIONS

INFERENCE = (
    "ours",
    "ours fused",
    "ours fused bf16",
    "ours litert",
    "ours onnx",
    "ours openvino",
    "timm",
    "timm last",
    "timm compiled",
    "timm compiled last",
    "timm bf16",
    "timm compiled bf16",
    "timm onnx",
    "timm openvino",
    "kecam",
    "ConvNeXt",
    "EfficientNetV2",
)
TRAINING = (
    "ours",
    "ours bf16",
    "timm",
    "timm last",
    "timm compiled",
    "timm bf16",
    "kecam",
    "ConvNeXt",
    "EfficientNetV2",
)


def measure(
    model: str, cell: tuple, names: list[str], rounds: int, pythons: dict, together: int
) -> dict:
    """Times the contenders of a cell in turns, so many at once, the floor among all of them."""
    mode, batch, size = cell
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    times: dict[str, list[float]] = {}
    found: dict[str, dict] = {}
    with Contest[str]() as contest:

        def start(group: list[str]) -> None:
            for name in group:
                python = pythons.get(name, sys.executable)
                command = [python, str(HERE / "contenders.py"), name, model]
                contest.start(name, [*command, str(size), str(batch), mode], environment)
                contest.wait()  # one after the other: some are compiled by all cores

        start(list(FLOORS))
        for first in range(0, len(names), together):
            group = names[first : first + together]
            start(group)
            for _ in range(rounds):
                for name in list(contest.running):
                    taken = contest.time(name, 10 if name in FLOORS else max(1, 6 // batch))
                    if taken is not None:
                        times.setdefault(name, []).append(taken)
            for name, process in contest.running.items():
                found[name] = {"memory_mb": process.memory_mb, **process.ready}
            contest.stop([name for name in group if name in contest.running])
        for name, why in contest.failed.items():
            print(f"  {name}: {why}", file=sys.stderr)
    order = [*FLOORS, *names]
    return {name: {**_spread(times[name]), **found[name]} for name in order if name in found}


def _spread(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "low": min(times), "high": max(times)}


def floor_ms(model: str, cell: tuple, found: dict) -> tuple[float, float]:
    """The floor of a cell in milliseconds, and the machine's best rate in GFLOP/s."""
    import keras_coatnet

    mode, batch, size = cell
    rate = max(PRODUCT_OPERATIONS / found[name]["ms"] / 1e6 for name in FLOORS if name in found)
    operations = 2 * batch * keras_coatnet.count_flops(model, input_shape=(size, size, 3))
    return operations * (3 if mode == "train" else 1) / rate / 1e6, rate


def table(results: dict) -> str:
    """The results as text."""
    lines = [f"{results['machine']}"]
    for entry in results["cells"]:
        mode, batch, size = entry["cell"]
        head = f"{entry['model']} {mode} batch {batch} at {size}"
        floor, rate = entry["floor_ms"], entry["gflops"]
        lines.append(f"\n{head}: floor {floor:.1f} ms at {rate:.0f} GFLOP/s")
        columns = (
            f"{'ms':>8} {'low-high':>17} {'of floor':>8} {'MB':>6} {'build s':>8} {'first s':>8}"
        )
        lines.append(f"{'':20} {columns}")
        versions = {}
        for name, row in entry["found"].items():
            if name.startswith("matmul"):
                continue
            where = "kecam: " if name == "kecam" else ""  # an environment of its own
            versions |= dict.fromkeys(f"{where}{k} {v}" for k, v in row["versions"].items())
            spread = f"{row['low']:.1f}-{row['high']:.1f}"
            lines.append(
                f"{name:20} {row['ms']:8.1f} {spread:>17} {floor / row['ms']:8.0%} "
                f"{row['memory_mb']:6} {row['build_s']:8.1f} {row['first_s']:8.1f}"
            )
        lines.append(", ".join(versions))
    return "\n".join(lines)


def _time(row: dict, floor: float) -> str:
    return f"{row['ms']:.0f} ({floor / row['ms']:.0%})"


def _memory(row: dict, floor: float) -> str:
    return f"{row['memory_mb']:,} ({row['build_s']:.0f} + {row['first_s']:.0f})"


def summary(
    results: dict,
    models: list[str],
    names: list[str] | None,
    cells: list[tuple] | None,
    memory: bool = False,
) -> str:
    """The results as Markdown: a table for each model, a column for each cell, or these alone."""
    shows, text = (
        ("peak MB (seconds to import and build + first run)", _memory)
        if memory
        else ("ms (share of the floor)", _time)
    )
    lines = []
    for model in models:
        known = {tuple(e["cell"]): e for e in results["cells"] if e["model"] == model}
        entries = [known[cell] for cell in cells or sorted(known) if cell in known]
        found = list(dict.fromkeys(name for entry in entries for name in entry["found"]))
        heads = ["{}, {} x {}".format(*entry["cell"]) for entry in entries]
        lines.append(f"| {model}, {shows} | {' | '.join(heads)} |")
        lines.append("|---" + "|---:" * len(heads) + "|")
        if not memory:
            floors = [f"{entry['floor_ms']:.0f}" for entry in entries]
            lines.append(f"| the floor | {' | '.join(floors)} |")
        for name in names or [name for name in found if not name.startswith("matmul")]:
            rows = [(entry["found"].get(name), entry["floor_ms"]) for entry in entries]
            texts = [text(row, floor) if row else "" for row, floor in rows]
            lines.append(f"| {name} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def compare(before: dict, after: dict) -> str:
    """Two results side by side, as ratios: below 1 is faster."""
    known = {(e["model"], *e["cell"]): e for e in before["cells"]}
    lines = [f"before: {before['machine']}", f"after:  {after['machine']}"]
    for entry in after["cells"]:
        old = known.get((entry["model"], *entry["cell"]))
        if old is None:
            continue
        mode, batch, size = entry["cell"]
        lines.append(f"\n{entry['model']} {mode} batch {batch} at {size}")
        for name, row in entry["found"].items():
            if not name.startswith("matmul") and name in old["found"]:
                was, now = old["found"][name]["ms"], row["ms"]
                shares = old["floor_ms"] / was, entry["floor_ms"] / now
                lines.append(
                    f"{name:20} {was:8.1f} -> {now:8.1f} ms  x{now / was:.2f}; share of the floor "
                    f"{shares[0]:.0%} -> {shares[1]:.0%}"
                )
    return "\n".join(lines)


def _results(path: str | None) -> dict:
    """What a file has already; nothing yet if there is none."""
    if path is None or not pathlib.Path(path).exists():
        return {"machine": describe_machine(), "cells": []}
    results = json.loads(pathlib.Path(path).read_text())
    if results["machine"] != describe_machine():
        sys.exit(f"{path} was measured on another machine: {results['machine']}. Name a new file.")
    return results


def _cell(text: str) -> tuple[str, int, int]:
    mode, batch, size = text.split(":")
    if mode not in ("infer", "train"):
        raise argparse.ArgumentTypeError(f"must begin with infer: or train:, not {text!r}")
    return mode, int(batch), int(size)


def main() -> None:
    """Runs the benchmark, shows one, or compares two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = ["infer:1:224", "infer:8:224", "infer:32:224", "infer:1:384", "train:8:224"]
    add("--cells", nargs="+", type=_cell, help=f"default: {' '.join(default)}; shown: all")
    add("--models", nargs="+", default=["coatnet0"])
    add("--contenders", nargs="+", help="default: all that the cell's kind has")
    add("--rounds", type=int, default=7)
    add("--together", type=int, default=100, help="how many contenders are in memory at once")
    add("--kecam-python", help="Python of an environment with keras_cv_attention_models")
    add("--json", metavar="FILE")
    add("--compare", nargs=2, metavar="FILE")
    add("--show", metavar="FILE", help="a saved run again, as Markdown")
    add("--memory", action="store_true", help="shown: memory and seconds to start, not speed")
    args = parser.parse_args()
    if args.together < 1:
        parser.error(f"--together must be at least 1, not {args.together}")
    if args.show:
        saved = json.loads(pathlib.Path(args.show).read_text())
        print(summary(saved, args.models, args.contenders, args.cells, args.memory), end="")
        return
    if args.compare:
        before, after = (json.loads(pathlib.Path(path).read_text()) for path in args.compare)
        print(compare(before, after))
        return
    cells = args.cells or [_cell(text) for text in default]
    try:
        for mode, _, _ in cells:
            for name in args.contenders or ():
                check(name, mode)
    except ValueError as error:
        parser.error(str(error))
    results = _results(args.json)
    pythons = {"kecam": args.kecam_python} if args.kecam_python else {}
    # Exported models are written once for all cells of a run.
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("BENCHMARK_EXPORTS", folder)
        _measure_all(args, cells, pythons, results)


def _measure_all(
    args: argparse.Namespace, cells: list[tuple], pythons: dict, results: dict
) -> None:
    for model in args.models:
        for cell in cells:
            names = args.contenders or (INFERENCE if cell[0] == "infer" else TRAINING)
            names = [name for name in names if name != "kecam" or pythons]
            found = measure(model, cell, names, args.rounds, pythons, args.together)
            floor, rate = floor_ms(model, cell, found)
            entry = {"model": model, "cell": list(cell), "floor_ms": floor, "gflops": rate}
            others = [e for e in results["cells"] if (e["model"], e["cell"]) != (model, list(cell))]
            results["cells"] = [*others, {**entry, "found": found}]
            print(table({**results, "cells": results["cells"][-1:]}), flush=True)
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
