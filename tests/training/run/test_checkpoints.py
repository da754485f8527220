"""Checkpoints: whole or not at all, whatever happens to the disk."""

import errno
import os
import pathlib
import sys

import numpy as np
import pytest

from keras_coatnet.training.run.checkpoints import CheckpointFolder, RunState
from tests import processes

NOTES = {"skipped": [3], "pending": [[0.1, 1 / 3]], "best_top1": 0.5}


def checkpoint(step: int, size: int = 1000) -> RunState:
    random = np.random.default_rng(step)
    arrays = {
        "model/a": random.normal(size=(size, 3)).astype("float32"),
        "optimizer/0": np.asarray(step, "int64"),
        "random/0": random.integers(0, 2**31, 2).astype("uint32"),
    }
    return RunState(step, arrays, NOTES)


def assert_equal(found: RunState, expected: RunState) -> None:
    assert (found.step, found.notes) == (expected.step, expected.notes)
    assert set(found.arrays) == set(expected.arrays)
    for key, array in expected.arrays.items():
        assert (found.arrays[key].dtype, found.arrays[key].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found.arrays[key], array)


def test_round_trip_is_exact_and_the_oldest_go(tmp_path):
    folder = CheckpointFolder(tmp_path / "new", keep=2)
    assert folder.newest() is None
    for step in (0, 5, 10):
        folder.save(checkpoint(step))
    assert folder.steps() == [5, 10]
    assert_equal(folder.newest(), checkpoint(10))
    assert_equal(folder.read(5), checkpoint(5))


def damage(path: pathlib.Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "emptied":
        content = b""
    elif how == "flipped in the numbers":
        content[-1] ^= 1
    elif how == "flipped in the notes":
        content[content.index(b"best_top1") + 14] ^= 1
    elif how == "not ours":
        content = b"\x00" * 100
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how",
    ["truncated", "emptied", "flipped in the numbers", "flipped in the notes", "not ours"],
)
def test_a_damaged_one_is_named_and_passed_over(tmp_path, how):
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))
    newest = folder.save(checkpoint(2))
    damage(newest, how)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        assert_equal(folder.newest(), checkpoint(1))


def test_all_damaged_is_an_error(tmp_path):
    folder = CheckpointFolder(tmp_path)
    damage(folder.save(checkpoint(1)), "truncated")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="All checkpoints .* are damaged"),
    ):
        folder.newest()


def test_any_flipped_bit_is_noticed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(checkpoint(1, size=20))
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for position in random.integers(0, len(content), 200):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        try:
            found = folder.read(1)
        except ValueError:
            continue
        assert_equal(found, checkpoint(1, size=20))  # a bit of padding


@pytest.mark.slow
def test_a_half_written_file_never_takes_a_good_ones_place(tmp_path):
    """Killed with -9 while it saves, many times over."""
    code = (
        "import sys; from tests.training.run.test_checkpoints import *;"
        "folder = CheckpointFolder(sys.argv[1]); print('ready', flush=True)\n"
        "for step in range(1, 10_000): folder.save(checkpoint(step, size=200_000))"
    )
    root = pathlib.Path(__file__).parents[3]
    for _ in range(3):
        output, said = os.pipe()
        command = [sys.executable, "-c", code, str(tmp_path)]
        process = processes.start(command, said, said, cwd=root)
        os.close(said)
        with os.fdopen(output) as lines:
            assert "ready\n" in iter(lines.readline, "")
        while len(CheckpointFolder(tmp_path).steps()) < 2:
            pass
        process.kill()
        process.wait()
        found = CheckpointFolder(tmp_path).newest()
        assert_equal(found, checkpoint(found.step, size=200_000))
    CheckpointFolder(tmp_path).save(checkpoint(20_000))
    assert not list(tmp_path.glob(".*"))  # what the killed ones left


def test_room_that_will_be_missing_is_known(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=3)
    assert folder.missing_room() == 0
    size = folder.save(checkpoint(1)).stat().st_size
    free = {"free": 10 * size}
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Usage", (), free) if path == tmp_path else None
    )
    assert folder.missing_room() == 0
    free["free"] = 3 * size - 7  # one is there, and a fourth is written before the first goes
    assert folder.missing_room() == 7


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    """The system's own error; `test_faults` fills a real tmpfs."""
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"step 2 could not be saved: the disk is full.*step 1"):
        folder.save(checkpoint(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert_equal(folder.newest(), checkpoint(1))
