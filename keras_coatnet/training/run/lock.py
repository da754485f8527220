"""One run a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCK = ".lock"

# How the system says that another process holds the lock; all else is a file system without locks.
_HELD = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be.

    The lock belongs to the open file, so that the system takes it back however the process ends.
    Where a file system has no locks, there is none.

    Args:
        folder: where a run writes. If it was made here and stays empty, it is removed again.

    Raises:
        ValueError: another run holds the lock; the message says which process.
        OSError: the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / LOCK).open("a+", encoding="utf-8") as file:
            _lock(file, folder)
            yield
    finally:
        # Others may use the folders by now, or have removed them.
        with contextlib.suppress(OSError):
            if made and os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()


def _lock(file: TextIO, folder: pathlib.Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise ValueError(
            f"Another run is writing to {folder}: {holder}. Wait for its end, stop it, or choose "
            "another output folder."
        ) from error
    with contextlib.suppress(OSError):  # what it says only helps; a full disk is told later
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
