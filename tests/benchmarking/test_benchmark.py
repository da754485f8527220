"""What is timed is what is said, and what cannot run is left out."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

import keras_coatnet
from keras_coatnet.benchmarking import machine, worker
from keras_coatnet.benchmarking.benchmark import benchmark
from keras_coatnet.benchmarking.process import Contest
from keras_coatnet.benchmarking.runtimes import Contender, find_contenders

pytestmark = pytest.mark.tensorflow_only

SMALL = keras_coatnet.CoAtNetConfig((8, 8, 16, 16), depths=(1, 1, 1, 1), stem_width=8, head_dim=8)
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_each_runtime_is_timed_and_one_that_dies_is_left_out(monkeypatch):
    contenders, missing = find_contenders(["keras", "keras_fused", "litert", "onnx"], "int8")
    assert missing == []
    assert [str(each) for each in contenders] == [
        *("Keras", "Keras, fused", "LiteRT", "ONNX", "LiteRT, int8", "ONNX, int8"),
    ]
    real = worker.command

    def command(kind: str, *arguments: str) -> list[str]:
        if arguments[-1] == "yes":  # the fused one
            return [sys.executable, "-c", "raise MemoryError('no room')"]
        return real(kind, *arguments)

    monkeypatch.setattr(worker, "command", command)
    steps = []
    found = benchmark(SMALL, 32, contenders, (1, 3), steps.append)
    dead = Contender("keras_fused")
    assert found.failed == {dead: "MemoryError: no room"}
    assert {f"exported: {each}" for each in contenders if each.is_exported} <= set(steps)
    assert set(found.rates) == set(worker.installed_libraries()) and min(found.rates.values()) > 1
    pairs = {(timing.contender, timing.batch_size) for timing in found.timings}
    assert pairs == {(each, size) for each in contenders if each != dead for size in (1, 3)}
    assert len(found.timings) == len(pairs)
    operations = 2 * keras_coatnet.count_flops(SMALL, (32, 32, 3))
    for timing in found.timings:
        assert 0 < timing.low <= timing.milliseconds <= timing.high
        reached = timing.batch_size * operations / timing.milliseconds / 1e6
        assert timing.share == pytest.approx(reached / max(found.rates.values()))
        assert 0 < timing.share < 1 and timing.size_mb > 0.01
    memory = {t.contender: t.memory_mb for t in found.timings if t.batch_size == 1}
    # Where Keras is not needed, it is not imported.
    for runtime in ("litert", "onnx"):
        assert memory[Contender(runtime)] < 0.6 * memory[Contender("keras")]
    of_three = [timing for timing in found.timings if timing.batch_size == 3]
    assert found.fastest(3) == min(of_three, key=lambda timing: timing.milliseconds)
    assert found.fastest(2) is None


def test_what_is_not_installed_is_left_out_unless_it_is_asked_for(monkeypatch):
    real = importlib.util.find_spec
    hidden = {"openvino", "ai_edge_quantizer"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else real(name)
    )
    found, missing = find_contenders(None, "dynamic_int8")
    assert [str(each) for each in found] == [
        *("Keras, fused", "LiteRT", "ONNX"),
        "ONNX, dynamic_int8",
    ]
    assert sorted(missing) == [
        'LiteRT needs ai_edge_quantizer. Install: pip install "keras-coatnet[litert]"',
        'OpenVINO needs openvino. Install: pip install "keras-coatnet[openvino]"',
    ]
    assert find_contenders(["litert", "keras", "litert"])[0] == [
        Contender("keras"),
        Contender("litert"),
    ]
    with pytest.raises(ImportError, match=r"keras-coatnet\[openvino\]"):
        find_contenders(["openvino"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_contenders(None)[0] == [Contender("keras_fused")]
    assert worker.installed_libraries() == []


SERVE = (
    "import keras_coatnet_command; keras_coatnet_command.defer_package()\n"
    "import os, time\n"
    "from keras_coatnet.benchmarking.process import serve\n"
)


@pytest.fixture
def contest():
    """A contest, whose contenders are given as code."""

    class CodeContest(Contest):
        def start(self, key, code):
            command = [sys.executable, "-c", code]
            super().start(key, command, {**os.environ, "PYTHONPATH": str(ROOT)})

    with CodeContest() as found:
        yield found


def test_a_process_answers_with_the_median_and_its_memory(contest):
    contest.start(
        "it",
        SERVE + "waits = iter([0, 0.5, 0.05, 0.05])\n"
        "def run(size=1):\n"
        "    print('a library that talks', b'\\xff')\n"
        "    time.sleep(size * next(waits))\n"
        "serve(lambda: run, ['json', 'no'])",
    )
    contest.wait()
    process = contest.running["it"]
    assert process.memory_mb is None
    assert 50 <= contest.time("it", 3, 1) < 500  # not the slow one, which came first
    assert 5 < process.memory_mb < 200
    assert process.ready["first_s"] < 0.5 and process.ready["build_s"] < 0.5
    assert process.ready["versions"] == {"json": json.__version__}
    contest.stop(["it"])
    assert process.process.returncode is not None and contest.failed == {}


def test_one_that_ends_is_out_and_says_why(contest):
    contest.start("raises", "raise ValueError('no such thing')")
    contest.start("exits", "import os; os._exit(7)")
    contest.start("not text", "import os; os.write(2, bytes([110, 255])); os._exit(1)")
    contest.start("later", SERVE + "serve(lambda: lambda size=0: size and os._exit(9))")
    contest.start("stays", SERVE + "serve(lambda: lambda size=0: None)")
    contest.wait()
    contest.wait()  # as after one more was started
    assert set(contest.running) == {"later", "stays"}
    assert contest.time("later", 1, 0) is not None
    assert contest.time("later", 1, 1) is None and contest.time("later", 1, 0) is None
    assert contest.time("stays", 1, 1) is not None
    assert contest.failed == {
        "raises": "ValueError: no such thing",
        "exits": "it ended with status 7",
        "not text": "n\ufffd",
        "later": "it ended with status 9",
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model name\t: A CPU\nflags\t\t: fpu avx avx2 avx_vnni\n", "A CPU (avx2+avx_vnni)"),
        (
            "model name\t: B\nflags\t: avx512f avx2 avx512_bf16 avx512_vnni amx_int8",
            "B (avx512f+avx512_bf16+amx_int8)",
        ),
        ("Features\t: fp asimd asimddp\n", " (asimd+asimddp)"),
        (None, " (instruction sets unknown)"),
    ],
)
def test_the_machine_is_told_with_its_instruction_sets(text, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(machine.pathlib, "Path", lambda name: file)
    assert expected in machine.describe_machine()
    if text is None:  # as on other systems, which have another way to tell it
        assert machine.peak_memory_mb() > 5


@pytest.mark.slow
@pytest.mark.parametrize("library", worker.PRODUCT_LIBRARIES)
def test_each_library_multiplies(library):
    """All of them the same matrices; NumPy's product is the reference of the others."""
    code = (
        "import numpy as np\n"
        "from keras_coatnet.benchmarking.worker import matrix_product\n"
        f"product, expected = matrix_product({library!r})(), matrix_product('NumPy')()\n"
        "product = np.asarray(product[0] if isinstance(product, list) else product)\n"
        "assert product.shape == (2048, 2048) and product.dtype == 'float32'\n"
        "np.testing.assert_allclose(product, expected, atol=1e-2)\n"
    )
    head = "import keras_coatnet_command; keras_coatnet_command.defer_package()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", head + code], env=environment, check=True)
