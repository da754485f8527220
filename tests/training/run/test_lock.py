"""One run a folder."""

import errno
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from keras_coatnet.training.run.lock import LOCK, locked

# Holds the lock of another run for as long as it lives, without the seconds of importing Keras.
HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on another")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


def test_another_run_is_refused_until_its_process_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            expected = (
                f"Another run is writing to {tmp_path}: process {holder.pid} on another. Wait"
            )
            with pytest.raises(ValueError, match=expected), locked(tmp_path):
                pass
        finally:
            holder.kill()  # signal 9: nothing can be cleaned up
            holder.wait()
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=f"process {os.getpid()} on "), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, number):
    def no_locks(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_a_folder_that_is_removed_meanwhile_hides_no_error(tmp_path):
    with pytest.raises(RuntimeError, match="the cause"), locked(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        raise RuntimeError("the cause")


def test_a_folder_in_which_nothing_was_written_leaves_no_trace(tmp_path):
    with locked(tmp_path / "runs" / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with locked(tmp_path / "runs"):
        pass
    assert (tmp_path / "runs").is_dir()  # it was there before
    with locked(tmp_path / "more" / "new") as _:
        pathlib.Path(tmp_path / "more" / "new" / "recipe.json").write_text("{}")
    assert (tmp_path / "more" / "new" / "recipe.json").exists()
