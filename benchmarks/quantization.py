"""What eight and four bits cost in accuracy, on a network that has learnt Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist.py --contenders CoAtNet --save coatnet.keras
    python benchmarks/quantization.py coatnet.keras --json mine.json
    python benchmarks/quantization.py --show mine.json      # a saved run again, as Markdown

The network is tested on all 10,000 test images in each runtime and each quantization that the
runtime has; ranges of full int8 are measured on 500 of the training images. "Keras" are its own
`quantize` modes, of the plain network and of the fused one, and float16 as a policy. Agreement is
the share of the images with the same class as in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fashion_mnist import DEBIAN, make_network, read_idx

from keras_coatnet.benchmarking.machine import describe_machine
from keras_coatnet.exporting.formats import FORMATS

CALIBRATION = 500


def main() -> None:
    """Measures, or shows what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="what fashion_mnist.py --save wrote")
    parser.add_argument("--data", default=DEBIAN, metavar="DIR", help="where the four files lie")
    parser.add_argument("--json", metavar="FILE", help="where the figures go, too")
    parser.add_argument("--show", metavar="FILE", help="print such figures, and measure nothing")
    args = parser.parse_args()
    if args.show:
        print(summary(json.loads(pathlib.Path(args.show).read_text())), end="")
        return
    if not args.model:
        parser.error("give the file that fashion_mnist.py --save wrote, or --show FILE")
    results = {"machine": describe_machine(), "rows": list(measure(args.model, args.data))}
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results), end="")


def measure(file: str, data: str) -> Iterator[dict]:
    """A row for each runtime and quantization."""
    import keras
    import numpy as np

    import keras_coatnet

    folder = pathlib.Path(data)
    images, seen = (
        np.pad(read_idx(folder / f"{part}-images-idx3-ubyte.gz"), ((0, 0), (2, 2), (2, 2))).astype(
            "float32"
        )[..., None]
        for part in ("t10k", "train")
    )
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    seen = seen[np.random.default_rng(0).permutation(len(seen))[:CALIBRATION]]
    model = keras.saving.load_model(file, compile=False)
    exact = model.predict(images, batch_size=200, verbose=0).argmax(1)

    def row(runtime: str, quantize: str, run: Callable, size: int) -> dict:
        parts = [np.asarray(run(part)) for part in np.split(images, 50)]
        classes = np.concatenate(parts).argmax(1)
        return {
            "runtime": runtime,
            "quantize": quantize,
            "accuracy": float((classes == labels).mean()),
            "agreement": float((classes == exact).mean()),
            "size_bytes": size,
        }

    with tempfile.TemporaryDirectory() as name:
        written = pathlib.Path(name)

        def keras_row(kind: str, quantize: str, network: keras.Model) -> dict:
            path = written / "model.keras"
            network.save(path)
            return row(kind, quantize, network.predict_on_batch, path.stat().st_size)

        yield keras_row("Keras", "float32", model)
        keras.config.set_dtype_policy("mixed_float16")
        half = make_network("CoAtNet")
        half.set_weights(model.get_weights())
        yield keras_row("Keras", "mixed_float16", half)
        keras.config.set_dtype_policy("float32")
        for mode in ("int8", "int4"):
            plain, fused = keras.saving.load_model(file, compile=False), keras_coatnet.fuse(model)
            for kind, network in (("Keras", plain), ("Keras, fused", fused)):
                network.quantize(mode)
                yield keras_row(kind, mode, network)
        for format, found in FORMATS.items():
            for quantize in found.quantizers:
                path = written / f"{format}-{quantize}{found.suffix}"
                report = keras_coatnet.export(
                    model, path, format, quantize, images=seen, verbose=False
                )
                run = keras_coatnet.load_exported(path).predict_on_batch
                yield row(found.title, quantize or "float32", run, report.size_bytes)


def summary(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| runtime | weights | accuracy | points lost | agreement | MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    best = results["rows"][0]["accuracy"]
    lines += [
        f"| {row['runtime']} | {row['quantize']} | {row['accuracy']:.2%} "
        f"| {100 * (best - row['accuracy']):.2f} | {row['agreement']:.2%} "
        f"| {row['size_bytes'] / 1e6:.2f} |"
        for row in results["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
