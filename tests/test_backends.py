"""The tests that must hold on every backend, run once more under JAX and torch.

Keras fixes its backend when it is imported, so each run is a process of its own.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import processes

pytestmark = [pytest.mark.tensorflow_only, pytest.mark.slow]

ROOT = pathlib.Path(__file__).parents[1]
ALIKE = ["tests/layers", "tests/weights/test_timm_parity.py"]
# JAX compiles each operation of each model; `.github/workflows/ci.yml` runs there what torch runs
# here. What it shows on JAX, tests/layers shows too, but for files, which test_saving.py takes to
# JAX, and fused models.
ON_JAX = ["tests/test_fusion.py::test_it_saves_and_loads"]
ON_TORCH = [
    "tests/weights/test_kecam_parity.py",
    "tests/test_applications.py",
    "tests/test_fusion.py",
    "tests/test_model.py",
    "tests/test_precision.py",
    "tests/test_saving.py",
]


@pytest.mark.parametrize(
    ("backend", "paths"),
    [("jax", ALIKE + ON_JAX), ("torch", ALIKE + ON_TORCH)],
    ids=["jax", "torch"],
)
def test_the_same_tests_pass(backend, paths):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
        # Of the paper's sizes one is enough here: the others are the same code.
        + ["-m", "not tensorflow_only", "-k", "not (CoAtNet1 or CoAtNet2 or CoAtNet3)", *paths],
        cwd=ROOT,
        env={**os.environ, **processes.COMPILE_FAST, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    summary = result.stdout[-6000:]
    assert result.returncode == 0, summary + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 300, summary
    assert "skipped" not in summary.splitlines()[-1]
    print(f"{backend}: {summary.splitlines()[-1]}")
