"""Settings and fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import pathlib
import socket

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# No test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Workers that run side by side fill the cores. torch's threads, more than cores then, wait for each
# other by spinning: without this, comparisons with timm take twice the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
import pytest

import keras_coatnet

# Much of what tracing makes lives long: to look through all of it again and again, as Python does
# by itself, would cost a tenth of all tests, and stop a test's server for seconds.
# `_collect_garbage` does it between tests.
gc.freeze()
gc.set_threshold(100_000, 50, 1_000_000)

TINY = keras_coatnet.CoAtNetConfig(
    widths=(16, 24, 32, 64), depths=(1, 2, 2, 1), stem_width=8, head_dim=8
)


@pytest.fixture(scope="session")
def tiny() -> keras_coatnet.CoAtNetConfig:
    """The paper's layout at a size that runs in milliseconds."""
    return TINY


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """What training on handwritten digits gives, for tests of the xdist_group "digits"."""
    from tests.training.digits import train_on_digits

    return train_on_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def images() -> np.ndarray:
    """Two raw images of 64 x 64 pixels."""
    return np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")


@pytest.fixture(autouse=True)
def _restore_global_settings():
    policy, layout = keras.config.dtype_policy(), keras.config.image_data_format()
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_image_data_format(layout)


@pytest.fixture(scope="session")
def _last_collection() -> dict[str, float]:
    return {"resident": 0.0}


@pytest.fixture(autouse=True)
def _collect_garbage(_last_collection):
    """A model is full of cycles, and the next may be as large."""
    yield
    resident = _resident_bytes()
    if resident is None or resident > _last_collection["resident"] + 3e8:
        gc.collect()
        _last_collection["resident"] = _resident_bytes() or 0.0


def _resident_bytes() -> float | None:
    """The memory of this process; None where the system does not tell it in Linux's way."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def small_heap():
    """For tests that quantize: Keras collects all garbage after each layer, and would go through
    what the tests before left alive each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_network(monkeypatch):
    """Whatever in this process asks for another machine, fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that two workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
