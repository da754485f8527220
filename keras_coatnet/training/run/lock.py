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
    try:
        with _open_locked(folder):
            try:
                yield
            finally:
                # Removed while it is locked: it would be another run's afterwards.
                with contextlib.suppress(OSError):
                    if made and os.listdir(folder) == [LOCK]:
                        (folder / LOCK).unlink()
    finally:
        # Others may use the folders by now, or have removed them.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # fails if it is not empty


def _open_locked(folder: pathlib.Path) -> TextIO:
    """Opens and locks the lock file. A run that ends meanwhile may remove it, and the folder."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("a+", encoding="utf-8"))
                _lock(file, folder)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    stack.pop_all()  # leaves it open
                    return file
            except FileNotFoundError:
                continue


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
    # The text only serves messages; a full disk is reported later.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
