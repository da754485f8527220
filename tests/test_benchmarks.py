"""The benchmarks run, count what they say they count, and compare what they saved."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import keras_coatnet
from keras_coatnet.benchmarking.machine import describe_machine

pytestmark = [pytest.mark.tensorflow_only, pytest.mark.slow]

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_speed_measures_saves_and_compares(tmp_path):
    # A run adds its cell to a file that has another.
    results = tmp_path / "results.json"
    row = {"ms": 9.0, "low": 8.0, "high": 9.5, "memory_mb": 300, "build_s": 1, "first_s": 1}
    other = {"model": "coatnet0", "cell": ["infer", 1, 32], "floor_ms": 3.0, "gflops": 50.0}
    other["found"] = {"timm": {**row, "versions": {"torch": "2.0"}}}
    results.write_text(json.dumps({"machine": describe_machine(), "cells": [other]}))
    cell = ["--cells", "infer:2:64", "--rounds", "2", "--together", "2", "--json", results]
    names = ["ours", "ours litert", "timm"]
    printed = run(BENCHMARKS / "speed.py", *cell, "--contenders", *names)
    first, entry = json.loads(results.read_text())["cells"]
    assert first == other and entry["cell"] == ["infer", 2, 64]
    operations = 2 * 2 * keras_coatnet.count_flops("coatnet0", input_shape=(64, 64, 3))
    assert entry["floor_ms"] * entry["gflops"] * 1e6 == pytest.approx(operations)
    floors = {f"matmul {name}" for name in ("TensorFlow", "NumPy", "torch", "ONNX Runtime")}
    assert set(entry["found"]) == {*floors, *names}
    best = min(entry["found"][name]["ms"] for name in floors)
    assert entry["gflops"] == pytest.approx(2 * 2048**3 / best / 1e6)
    for name, row in entry["found"].items():
        assert 0 < row["low"] <= row["ms"] <= row["high"] and row["memory_mb"] > 50
        # A network of 0.6 G operations within what no CPU of this decade is beyond.
        assert name in floors or row["ms"] > entry["floor_ms"] / 2
        assert (name in printed) == (name not in floors)
    assert f"keras {entry['found']['ours']['versions']['keras']}" in printed
    compared = run(BENCHMARKS / "speed.py", "--compare", results, results)
    assert compared.count("x1.00") == 4
    shown = run(BENCHMARKS / "speed.py", "--show", results, "--cells", "infer:1:32")
    assert "| timm |" in shown and "infer, 2 x 64" not in shown
    results.write_text(json.dumps({"machine": "an abacus", "cells": [other]}))
    with pytest.raises(AssertionError, match="measured on another machine: an abacus"):
        run(BENCHMARKS / "speed.py", *cell, "--contenders", "timm")


@pytest.mark.parametrize(
    "name, cell, message",
    [
        ("ours fused", "train:1:64", "'ours fused' cannot be trained: it is for inference alone"),
        ("ours onnx", "train:1:64", "'ours onnx' cannot be trained"),
        ("ours melted", "infer:1:64", "there is no contender 'ours melted', but ours, "),
    ],
)
def test_what_would_be_another_measurement_is_refused(name, cell, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        run(BENCHMARKS / "speed.py", "--cells", "infer:1:64", cell, "--contenders", name)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_breakdown_knows_where_the_time_goes(mode, tmp_path):
    results = tmp_path / "results.json"
    size = ["--size", "64", "--batch-size", "2", "--runs", "1", "--mode", mode]
    names = ["ours"] if mode == "train" else ["ours", "ours fused"]
    run(BENCHMARKS / "breakdown.py", *size, "--contenders", *names, "--json", results)
    times = json.loads(results.read_text())["found"]
    for name, found in times.items():
        kinds = {"1x1 convolutions and dense layers", "depthwise convolutions", "activations"}
        assert kinds <= set(found), name
        # Small things that no rule names; a layer that none did would be more.
        assert found.get("other", 0) < 0.1 * sum(found.values()), (name, found)
    if mode == "infer":  # what is folded away takes no time
        assert times["ours fused"]["norms"] < times["ours"]["norms"]


def test_fused_half_precision_is_as_near_to_float32_as_plain(tmp_path):
    """With TensorFlow's own kernels, which add up in the precision of what they add."""
    results = tmp_path / "results.json"
    command = [BENCHMARKS / "half_precision.py", "--networks", "coatnet0:224", "--images", "1"]
    printed = run(*command, "--instructions", "no oneDNN", "--json", results)
    rows = json.loads(results.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["bfloat16", "float16"]
    for row in rows:
        assert row["fused"] <= 1.2 * row["plain"] and row["fused_top1"] == 1
    assert run(BENCHMARKS / "half_precision.py", "--show", results) == printed


def test_what_was_measured_on_a_gpu_is_shown_without_one(tmp_path):
    row = {"model": "coatnet0", "tflops": 200.0, "product_tflops": 800.0, "batch": 128}
    rows = [
        {**row, "mode": "infer", "contender": "ours", "images_per_second": 12345.6},
        {**row, "mode": "train", "contender": "ours", "images_per_second": 3000.0},
        {**row, "mode": "train", "contender": "timm", "images_per_second": 2500.4},
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"card": "a card", "rows": rows}))
    assert run(BENCHMARKS / "gpu.py", "--show", results).splitlines()[2:] == [
        "| coatnet0, ours | 12,346 (25%), batch 128 | 3,000 (25%), batch 128 |",
        "| coatnet0, timm |  | 2,500 (25%), batch 128 |",
    ]
