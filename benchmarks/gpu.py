"""How fast the networks are on a GPU, beside timm compiled on the same card in the same run.

    python benchmarks/gpu.py --json results/gpu.json
    python benchmarks/gpu.py --show results/gpu.json

Inference and training in bfloat16 at 224 pixels: ours on JAX, where Keras compiles the whole step,
and on torch; timm by `torch.compile`, channels last. Training is AdamW with clipping. Each
contender is a process of its own; those of a model start together, so that they compile on all
cores, and are timed in turns. The rate that all are held against is the card's for a product of
two bfloat16 matrices of 8192 x 8192, in the same turns; a training step counts three times the
operations. It needs JAX and torch for CUDA, and no TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import keras_coatnet_command

keras_coatnet_command.defer_package()  # its import would want TensorFlow

from keras_coatnet.benchmarking.process import Contest
from keras_coatnet.counting.operations import count_flops

PRODUCT = "matmul bf16 8192"
PRODUCT_OPERATIONS = 2 * 8192**3
INFERENCE = ("ours fused jax bf16", "ours fused torch bf16", "timm compiled last bf16")
TRAINING = ("ours jax bf16", "timm compiled last bf16")
# Images of a batch: training of the larger ones leaves room for the others on the card.
BATCHES = {"coatnet0": (256, 128), "coatnet1": (256, 128)}
BATCHES |= {"coatnet2": (256, 64), "coatnet3": (128, 64)}


def measure(model: str, rounds: int) -> list[dict]:
    """Times all contenders of a model in turns."""
    modes = {"infer": (INFERENCE, BATCHES[model][0]), "train": (TRAINING, BATCHES[model][1])}
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    operations, rates, times, rows = 2 * count_flops(model), [], {}, []
    with Contest[tuple[str, str]]() as contest:
        contenders = [(mode, name) for mode, (names, _) in modes.items() for name in names]
        for mode, name in [("infer", PRODUCT), *contenders]:
            command = [sys.executable, str(HERE / "contenders.py"), name, model, "224"]
            arguments = [str(modes[mode][1]), mode]
            contest.start((mode, name), [*command, *arguments], environment)
        contest.wait()
        for _ in range(rounds):
            for key in list(contest.running):
                taken = contest.time(key, 10)
                if key[1] == PRODUCT and taken is not None:
                    rates.append(PRODUCT_OPERATIONS / taken / 1e9)
                elif taken is not None:
                    times.setdefault(key, []).append(taken)
        for (mode, name), process in contest.running.items():
            if name == PRODUCT:
                continue
            batch, milliseconds = modes[mode][1], statistics.median(times[mode, name])
            work = operations * batch * (3 if mode == "train" else 1)
            rows.append(
                {
                    **{"model": model, "mode": mode, "batch": batch, "contender": name},
                    **{"ms": milliseconds, "low": min(times[mode, name])},
                    **{"high": max(times[mode, name])},
                    "images_per_second": 1000 * batch / milliseconds,
                    "tflops": work / milliseconds / 1e9,
                    "product_tflops": statistics.median(rates),
                    **process.ready,
                }
            )
        for (mode, name), why in contest.failed.items():
            print(f"{model} {mode} {name}: {why}", file=sys.stderr, flush=True)
    return rows


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| images/s (share of the card's rate) | inference | training |", "|---|---:|---:|"]
    rows = results["rows"]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        for name in dict.fromkeys(row["contender"] for row in of_model):
            cells = []
            for mode in ("infer", "train"):
                found = [r for r in of_model if (r["contender"], r["mode"]) == (name, mode)]
                cells += [
                    f"{row['images_per_second']:,.0f} "
                    f"({row['tflops'] / row['product_tflops']:.0%}), batch {row['batch']}"
                    for row in found
                ] or [""]
            lines.append(f"| {model}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark, or shows one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    add("--rounds", type=int, default=5)
    add("--json", metavar="FILE")
    add("--show", metavar="FILE", help="a saved run again, as Markdown")
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(pathlib.Path(args.show).read_text())))
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    results = {"card": card, "rows": []}
    for model in args.models:
        results["rows"] += measure(model, args.rounds)
        if args.json:  # after each model, should the time be short
            pathlib.Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    print(card)
    print(table(results))


if __name__ == "__main__":
    main()
