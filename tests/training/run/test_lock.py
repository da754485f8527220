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


def flock_after(monkeypatch, act) -> None:
    """Calls a function between the opening of the next lock file and its locking."""
    flock, acts = fcntl.flock, [act]

    def act_and_lock(file: object, operation: int) -> None:
        if acts:
            acts.pop()()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", act_and_lock)


def test_a_lock_file_that_another_run_removed_meanwhile_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    flock_after(monkeypatch, lambda: shutil.rmtree(folder))
    with locked(folder):
        with pytest.raises(ValueError, match="Another run is writing"), locked(folder):
            pass
        (folder / "recipe.json").write_text("{}")
    assert folder.exists()


def test_a_run_that_ends_removes_the_lock_file_while_it_holds_it(tmp_path, monkeypatch):
    folder, unlink, refused = tmp_path / "run", pathlib.Path.unlink, []

    def start_and_unlink(path: pathlib.Path) -> None:
        with pytest.raises(ValueError, match="Another run is writing"), locked(folder):
            pass
        refused.append(path)
        unlink(path)

    with locked(folder):
        monkeypatch.setattr(pathlib.Path, "unlink", start_and_unlink)
    assert refused == [folder / LOCK] and not folder.exists()


def test_a_run_that_is_refused_leaves_the_lock_of_the_other(tmp_path, monkeypatch):
    """Both found no folder, and this one was the slower."""
    folder, others = tmp_path / "run", []

    def lock_first() -> None:
        others.append((folder / LOCK).open("a+"))
        fcntl.flock(others[0], fcntl.LOCK_EX)

    flock_after(monkeypatch, lock_first)
    with pytest.raises(ValueError, match="Another run is writing"), locked(folder):
        pass
    assert (folder / LOCK).exists()
    others[0].close()
