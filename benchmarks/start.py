"""How long it takes to begin: import, construction, first batch.

    python benchmarks/start.py --json results/start_cpu.json

Each is a process of its own, several times in turns (CoAtNet7, which takes its while, once); shown
are medians and spread, in seconds.
The first batch is one image at 224 through `model.predict`, compiling included; the second is
what it costs from then on. Keras's import is what a program pays that imports Keras alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMPORT_KERAS = """
import json, time
begin = time.perf_counter()
import keras
print(json.dumps({"import keras": time.perf_counter() - begin}))
"""
IMPORT_OURS = """
import json, time
begin = time.perf_counter()
import keras_coatnet
print(json.dumps({"import keras_coatnet": time.perf_counter() - begin}))
"""
NETWORK = """
import json, time
import numpy as np
import keras_coatnet
name, runs, fuses = {name!r}, {runs}, {fuses}
begin = time.perf_counter()
model = getattr(keras_coatnet, name)(weights=None, input_shape=(224, 224, 3))
found = {{f"{{name}}: construct": time.perf_counter() - begin}}
if fuses:
    begin = time.perf_counter()
    model = keras_coatnet.fuse(model)
    found[f"{{name}}: fuse"] = time.perf_counter() - begin
images = np.zeros((1, 224, 224, 3), "float32")
for run in ("first batch", "second batch")[:runs]:
    begin = time.perf_counter()
    model.predict(images, verbose=0)
    found[f"{{name}}{{' fused' * fuses}}: {{run}}"] = time.perf_counter() - begin
print(json.dumps(found))
"""


def main() -> None:
    """Times all of it, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    programs = [IMPORT_KERAS, IMPORT_OURS]
    for name, runs, fuses in (
        ("CoAtNet0", 2, False),
        ("CoAtNet0", 2, True),
        ("CoAtNet3", 2, False),
    ):
        programs.append(NETWORK.format(name=name, runs=runs, fuses=fuses))
    once = NETWORK.format(name="CoAtNet7", runs=0, fuses=False)
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": str(ROOT)}
    times: dict[str, list[float]] = {}
    for round_ in range(args.rounds):
        for program in [*programs, once] if round_ == 0 else programs:
            done = subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            )
            for name, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                times.setdefault(name, []).append(seconds)
    for name, seconds in times.items():
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        print(f"{name:32} {statistics.median(seconds):6.2f} s  {spread}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
