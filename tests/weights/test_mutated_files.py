"""Valid files of weights with random changes are read, or refused with a ValueError.

There is no other exception, no crash, no hang, and little use of time and memory. Another process
reads the files, because HDF5 is a C library that a damaged file may crash.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile
from select import select

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import keras_coatnet
from tests.conftest import TINY

pytestmark = pytest.mark.tensorflow_only

# For more examples, new ones in each run: KERAS_COATNET_EXAMPLES=5000 pytest tests/weights/...
EXAMPLES = os.environ.get("KERAS_COATNET_EXAMPLES")
many = settings(
    max_examples=int(EXAMPLES or 60),
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SECONDS, MEGABYTES = 10, 200  # for one file; the machine may be busy

# Reads each file whose path is on a line of stdin, and prints one line.
READER = """
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.weights import foreign_files, keras_files
from keras_coatnet.weights.source import find_source

def peak():
    (line,) = (x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

known = list(ARCHITECTURES.values())
print("ready", flush=True)
for line in sys.stdin:
    path = pathlib.Path(line.rstrip("\\n"))
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    try:
        find_source(path, known, None, "CoAtNet")
        if path.name.endswith((".h5", ".safetensors")) and ".weights." not in path.name:
            foreign_files.read(path)
        answer = "read"
    except ValueError as error:
        answer = "refused" if path.name in str(error) else f"not named: {error!r}"
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps([answer, peak() - before]), flush=True)
"""


class Reader:
    """A process that reads files. It is restarted if it dies."""

    def __init__(self) -> None:
        self.process = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=pathlib.Path(keras_coatnet.__file__).parents[1],
            env={**os.environ, "KERAS_BACKEND": "numpy"},  # imports seconds faster
        )
        assert self.process.stdout.readline() == "ready\n"

    def stop(self) -> int:
        self.process.kill()
        self.process.communicate()
        status, self.process = self.process.returncode, None
        return status

    def ask(self, path: pathlib.Path) -> tuple[str, int]:
        """What it says of a file, and the memory it took; if it died of the file, how."""
        if self.process is None:
            self.start()
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        if not select([self.process.stdout], [], [], SECONDS)[0]:
            self.stop()
            return f"no answer within {SECONDS} seconds", 0
        line = self.process.stdout.readline()
        return tuple(json.loads(line)) if line else (f"died: {self.stop()}", 0)


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    if reader.process is not None:
        reader.stop()


def _hdf5(arrays, attributes=(), **options) -> bytes:
    content = io.BytesIO()
    packing = {"compression": "gzip", "shuffle": True, "fletcher32": True}
    with h5py.File(content, "w", libver=options.pop("libver", None)) as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, **(packing if options.get("packed") else {}))
        file.attrs.update(attributes)
    return content.getvalue()


def _archive(content: bytes, config: dict, compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("config.json", json.dumps({"config": {"keras_coatnet": config}}))
        archive.writestr("model.weights.h5", content)
    return file.getvalue()


def _sound() -> dict[str, list[bytes]]:
    """A few small files of each kind. The arrays are not those of a whole network."""
    rng = np.random.default_rng(0)
    theirs = {
        "stem_1_conv/stem_1_conv/kernel:0": rng.normal(size=(3, 3)).astype("float32"),
        "stack_1_block_1_preact_bn/a/gamma:0": rng.normal(size=(4, 4)),
        "stack_3_block_1_mhsa_pos_emb/b/positional_embedding:0": np.ones((2, 9), "float16"),
    }
    tensors = {
        "stem.conv1.weight": np.ones((4, 3, 3, 3), "float32"),
        "stages.0.blocks.0.se.fc1.weight": np.ones((2, 2), "float16"),
        "stages.2.blocks.0.attn.rel_pos.mlp.fc1.weight": np.ones((3, 2), "float64"),
        "stages.2.blocks.0.attn.qkv.weight": np.ones((96, 4), "float32"),
        "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table": np.ones((9, 2), "float32"),
        "stages.0.blocks.0.norm1.num_batches_tracked": np.array(3),
    }
    identity = {
        "architecture": dataclasses.asdict(TINY),
        "include_preprocessing": True,
        "classes": 3,
        "channels": 3,
    }
    ours = {"layers/conv2d/vars/0": np.ones((3, 3, 3, 8), "float32"), "vars/0": np.zeros(2000)}
    attribute = {"keras_coatnet": json.dumps(identity)}
    own = [_hdf5(ours, attribute), _hdf5(ours, attribute, libver="latest")]
    return {
        ".h5": [
            _hdf5(theirs),
            _hdf5(theirs, libver="latest"),
            _hdf5(theirs, packed=True),
            _hdf5(theirs, packed=True, libver="latest"),
        ],
        ".weights.h5": own,
        ".keras": [
            _archive(own[0], identity, zipfile.ZIP_STORED),
            _archive(own[0], identity, zipfile.ZIP_DEFLATED),
        ],
        ".safetensors": [save(tensors)],
    }


SOUND = _sound()
NUMBERS = [0, 1, 2, 8, 255, 256, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


@st.composite
def mutated(draw, suffix: str) -> bytes:
    data = bytearray(draw(st.sampled_from(SOUND[suffix])))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3, 10]))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(
            st.sampled_from(["byte", "number", "number", "copy", "insert", "remove", "cut"])
        )
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * size)
            data[at : at + size] = number.to_bytes(size, "little")
        elif kind == "copy":
            source = draw(st.integers(0, len(data)))
            data[at : at + 64] = data[source : source + 64]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 32))]
        elif draw(st.booleans()):
            del data[at:]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SOUND)
def test_a_mutated_file_is_read_or_refused(reader, tmp_path, suffix):
    path = tmp_path / f"mutated{suffix}"

    @many
    @given(mutated(suffix))
    def is_read_or_refused(content):
        path.write_bytes(content)
        answer, megabytes = reader.ask(path)
        assert answer in ("read", "refused"), answer
        assert megabytes < MEGABYTES

    is_read_or_refused()
