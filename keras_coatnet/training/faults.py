"""What can end a run from outside, and how it is said: one line, with what to do.

TensorFlow reports a picture that vanished, a disk that is full and a machine that is gone each with
an error of its own, many lines long and without the step or the cause.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import signal
from collections.abc import Callable, Iterator

import tensorflow as tf

from keras_coatnet.training.pipeline import BrokenPictures
from keras_coatnet.training.records import LABEL_EXPECTED

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# How the runtime says that another process of a cluster does not answer.
_CONNECTION_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)


class TrainingError(RuntimeError):
    """A run that cannot go on, in one line that says at which step, why, and what to do."""


@contextlib.contextmanager
def in_words(folder: pathlib.Path, broken: BrokenPictures, cluster: bool) -> Iterator[None]:
    """Turns errors that come from outside the program into one line each.

    Args:
        folder: where the run writes.
        broken: the pictures that could not be read.
        cluster: whether the run has several processes, or devices elsewhere.

    Raises:
        TrainingError: too many pictures cannot be read, one is gone, a label is wrong, or another
            process is gone.
        OSError: there is no room for what the run writes.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # That of a checkpoint is in words already. HDF5 says it in a text of its own, and may raise
        # a RuntimeError.
        is_bare = isinstance(error, OSError) and error.strerror in map(os.strerror, _NO_ROOM)
        if is_bare or any(f"errno = {number}," in str(error) for number in _NO_ROOM):
            raise _disk_full(folder) from error
        raise
    except tf.errors.OpError as error:
        if broken.error is not None:
            raise TrainingError(str(broken.error)) from error
        if "No space left on device" in error.message:
            raise _disk_full(folder) from error
        if label := re.search(rf"{LABEL_EXPECTED}[^\]]*", error.message):
            raise TrainingError(f"{label[0].strip()}. Repair the data set.") from error
        if lost := re.search(r"([^\n]+); No such file or directory", error.message):
            path = re.sub(r".*(Iterator::\S*: |\}\} )", "", lost[1])
            raise TrainingError(
                f"{path} was there at the start, and is gone. Put it back and start the same "
                "command again."
            ) from error
        if cluster and isinstance(error, _CONNECTION_ERRORS):
            raise TrainingError(
                "another process of this run is gone. Start the same command on all machines to "
                f"go on from the last checkpoint. ({type(error).__name__})"
            ) from error
        raise


def _disk_full(folder: pathlib.Path) -> OSError:
    return OSError(
        errno.ENOSPC,
        "the disk is full; the last checkpoint is whole. Make room and start the same command "
        "again to go on",
        str(folder),
    )


@contextlib.contextmanager
def on_sigterm(handler: Callable[[], None]) -> Iterator[None]:
    """Calls `handler` where SIGTERM would end the process."""
    old = signal.signal(signal.SIGTERM, lambda number, frame: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
