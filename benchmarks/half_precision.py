"""How far half precision is from float32, of the plain network and of the fused one.

    python benchmarks/half_precision.py --json mine.json
    python benchmarks/half_precision.py --show mine.json      # a saved run again, as Markdown

Every network has random weights in all of its variables, the same in each precision, and sees the
same random images at its real size. Errors are root mean squares of the difference from the plain
float32 network's logits, divided by the root mean square of those. "top-1" is how many of the
images have the same largest logit as in float32.

The kernels that a processor has decide in which precision they add up, so that each row is measured
with several of them, in a process each. "default" is what TensorFlow chooses here; "AVX512" is
oneDNN without the instructions for half precision (`ONEDNN_MAX_CPU_ISA`); "no oneDNN" is
TensorFlow's own kernels (`TF_ENABLE_ONEDNN_OPTS=0`), which it takes in half precision where the
processor has no AVX-512. ("AVX2" for the first variable is no simulation of such a processor:
TensorFlow asks the processor, and oneDNN then refuses bfloat16.)
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

PRECISIONS = ("bfloat16", "float16")
# Environment variables, and the precisions that oneDNN then has on a processor which has all.
INSTRUCTIONS = {
    "default": ({}, PRECISIONS),
    "AVX512": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ("bfloat16",)),
    "no oneDNN": ({"TF_ENABLE_ONEDNN_OPTS": "0"}, PRECISIONS),
}


def measure(model: str, size: int, precisions: list[str], images: int) -> list[dict]:
    """The errors of one network at one size, a row for each precision."""
    import keras
    import numpy as np

    import keras_coatnet

    pixels = np.random.default_rng(1).uniform(0, 255, (images, size, size, 3)).astype("float32")

    def logits(network: keras.Model) -> np.ndarray:
        each = [network(pixels[i : i + 1], training=False) for i in range(images)]
        return np.concatenate([keras.ops.convert_to_numpy(one) for one in each]).astype("float64")

    def build(policy: str) -> keras.Model:
        keras.config.set_dtype_policy(policy)
        return keras_coatnet.CoAtNet(
            model, weights=None, input_shape=(size, size, 3), classifier_activation=None
        )

    exact = build("float32")
    randomize(exact)
    expected = logits(exact)
    rows = []
    for precision in precisions:
        plain = build(f"mixed_{precision}")
        plain.set_weights(exact.get_weights())
        row = {"model": model, "size": size, "precision": precision, "images": images}
        for kind, network in (("plain", plain), ("fused", keras_coatnet.fuse(plain))):
            found = logits(network)
            error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
            row[kind] = float(error) if np.isfinite(error) else None
            same = np.argmax(found, -1) == np.argmax(expected, -1)
            row[f"{kind}_top1"] = int(np.sum(same & np.isfinite(found).all(-1)))
        rows.append(row)
    return rows


def randomize(model) -> None:
    """Gives every variable a value of its own, so that every layer has a part in the logits."""
    import numpy as np

    random = np.random.default_rng(0)
    for variable in model.weights:
        kind, shape = variable.path.rpartition("/")[2], tuple(variable.shape)
        if kind == "kernel":
            depthwise = len(shape) == 4 and shape[-1] == 1
            inputs = np.prod(shape[:2]) if depthwise else np.prod(shape[:-1])
            value = random.normal(size=shape) / np.sqrt(inputs)
        elif kind in ("gamma", "moving_variance"):
            value = random.uniform(0.5, 1.5, shape)
        else:
            value = random.normal(scale=0.2, size=shape)
        variable.assign(value)


def _ratio(row: dict) -> str:
    return "" if None in (row["plain"], row["fused"]) else f"{row['fused'] / row['plain']:.2f}"


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def summary(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| network | precision | instructions | plain | fused | fused / plain "
        "| top-1 plain | top-1 fused |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        top1 = (f"{row[f'{kind}_top1']} of {row['images']}" for kind in ("plain", "fused"))
        cells = (
            f"{row['model']}, {row['size']}",
            row["precision"],
            row["instructions"],
            _error(row["plain"]),
            _error(row["fused"]),
            _ratio(row),
            *top1,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _network(text: str) -> tuple[str, int]:
    name, _, size = text.rpartition(":")
    if not name or not size.isdigit():
        raise argparse.ArgumentTypeError(f"must be NAME:SIZE, such as coatnet0:224, not {text!r}")
    return name, int(size)


def main() -> None:
    """Runs the measurement, or shows one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    networks = [
        (name, size) for name in ("coatnet0", "coatnet_rmlp_nano_rw_224") for size in (224, 384)
    ]
    add("--networks", nargs="+", type=_network, default=networks, metavar="NAME:SIZE")
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    add("--instructions", nargs="+", choices=INSTRUCTIONS, default=list(INSTRUCTIONS))
    add("--images", type=int, default=4)
    add("--json", metavar="FILE")
    add("--show", metavar="FILE", help="a saved run again, as Markdown")
    add("--rows", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.show:
        print(summary(json.loads(pathlib.Path(args.show).read_text())), end="")
        return
    if args.rows:
        for name, size in args.networks:
            print(json.dumps(measure(name, size, args.precisions, args.images)), flush=True)
        return
    from keras_coatnet.benchmarking.machine import describe_machine

    results = {"machine": describe_machine(), "rows": []}
    for name, size in args.networks:
        for instructions in args.instructions:
            environment, known = INSTRUCTIONS[instructions]
            precisions = [each for each in args.precisions if each in known]
            if not precisions:
                continue
            command = [sys.executable, __file__, "--rows", "--networks", f"{name}:{size}"]
            command += ["--precisions", *precisions, "--images", str(args.images)]
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={
                    **os.environ,
                    "KERAS_BACKEND": "tensorflow",
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                    **environment,
                },
            )
            rows = json.loads(done.stdout.splitlines()[-1])
            results["rows"] += [{**row, "instructions": instructions} for row in rows]
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results), end="")


if __name__ == "__main__":
    main()
