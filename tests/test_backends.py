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
# `.github/workflows/ci.yml` runs on both whatever is not `tensorflow_only`. Here is left out what
# costs most and tells a backend least: on JAX, which compiles each operation of each model, what
# tests/layers shows, too, but for files, which test_saving.py takes to JAX.
PATHS = {
    "jax": [
        "tests/layers",
        "tests/weights/test_timm_parity.py",
        "tests/test_fusion.py",
        "tests/test_explain.py",
    ],
    "torch": [
        "tests/layers",
        "tests/weights/test_timm_parity.py",
        "tests/weights/test_kecam_parity.py",
        "tests/test_fusion.py",
        "tests/test_features.py",
        "tests/test_explain.py",
        "tests/test_model.py",
        "tests/test_precision.py",
        "tests/test_saving.py",
    ],
}
# Of the architectures, JAX computes one for each kind of block and of relative position.
ON_JAX = (
    "not test_keras_own_layer_test_passes"
    " and (not test_fusion or test_it_saves_and_loads)"
    " and (not test_explain or test_gradients or test_attention or test_biases)"
    " and (not test_reduced_networks or coatnet_0_224 or rmlp_nano or nano_cc or coatnext)"
)


@pytest.mark.parametrize("backend", PATHS)
def test_the_same_tests_pass(backend):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
        + ["-m", "not tensorflow_only", *(["-k", ON_JAX] if backend == "jax" else [])]
        + PATHS[backend],
        cwd=ROOT,
        env={**os.environ, **processes.COMPILE_FAST, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    summary = result.stdout[-6000:]
    assert result.returncode == 0, summary + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 500, summary
    assert "skipped" not in summary.splitlines()[-1]
    print(f"{backend}: {summary.splitlines()[-1]}")
