"""`keras-coatnet benchmark`: what it prints."""

from __future__ import annotations

import inspect
import json

import pytest

from keras_coatnet.benchmarking import benchmark as benchmarking
from keras_coatnet.benchmarking.benchmark import Benchmark, Timing
from keras_coatnet.benchmarking.runtimes import Contender

pytestmark = pytest.mark.tensorflow_only


def test_the_table_says_what_to_use(call, monkeypatch):
    timings = [
        Timing(Contender("keras_fused"), 1, 94.0, 90.0, 99.0, 0.47, None, 100.0),
        Timing(Contender("litert", "int8"), 1, 50.0, 49.0, 51.0, 0.88, 1398, 29.0),
        Timing(Contender("keras_fused"), 8, 400.0, 390.0, 500.0, 0.9, 1447, 100.0),
    ]
    found = Benchmark("a machine", {"NumPy": 150.0}, timings, {})
    asked = []

    def fake(*arguments: object) -> Benchmark:
        asked.append([*arguments[:4], arguments[5]])
        return found

    assert len(inspect.signature(benchmarking.benchmark).parameters) == 6
    monkeypatch.setattr(benchmarking, "benchmark", fake)
    name = "coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k"
    status, output, _ = call("benchmark", "--model", name, "--runtimes", "keras_fused")
    assert asked == [["coatnet_rmlp_2_rw_384", 384, [Contender("keras_fused")], [1, 8], 1000]]
    assert status == 0
    assert output == (
        "a machine\n"
        "float32 products, GFLOP/s: NumPy 150\n"
        "\n"
        "batch  runtime          ms     low-high  images/s  of the best rate  MB memory   MB\n"
        "    1  LiteRT, int8   50.0    49.0-51.0      20.0               88%      1,398   29\n"
        "    1  Keras, fused   94.0    90.0-99.0      10.6               47%          -  100\n"
        "    8  Keras, fused  400.0  390.0-500.0      20.0               90%      1,447  100\n"
        "\n"
        "Use for single images: LiteRT, int8 (keras-coatnet export WEIGHTS model.tflite "
        "--quantize int8)\n"
        "Use for a batch of 8: Keras, fused (keras_coatnet.fuse(model))\n"
    )

    found.failed[Contender("onnx", "int8")] = "no room"
    status, output, errors = call("benchmark", "--runtimes", "keras", "--json")
    assert status == 1
    assert "ONNX, int8 failed: no room" in errors
    printed = json.loads(output)
    assert printed["machine"] == "a machine" and printed["gflops"] == {"NumPy": 150.0}
    assert printed["failed"] == [{"runtime": "onnx", "quantize": "int8", "error": "no room"}]
    assert printed["timings"][1] == {
        **{"runtime": "litert", "quantize": "int8", "batch_size": 1, "milliseconds": 50.0},
        **{"low": 49.0, "high": 51.0, "share": 0.88, "memory_mb": 1398, "size_mb": 29.0},
        "images_per_second": 20.0,
    }
    found.timings.clear()
    assert call("benchmark", "--runtimes", "keras")[0] == 2
