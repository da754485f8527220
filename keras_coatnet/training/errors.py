"""Failures from outside the program, each explained in one line that says what to do.

TensorFlow reports a missing image, a full disk or a lost machine with errors that are many lines
long and name neither the step nor the cause.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator

import tensorflow as tf

from keras_coatnet.training.data.records import find_label_error
from keras_coatnet.training.data.unreadable import UnreadableImages

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# How the runtime says that another process of a cluster does not answer.
_CONNECTION_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)
# How TensorFlow, XLA and CUDA say that a device has no memory left, each with some error class.
_OUT_OF_MEMORY = re.compile(
    "out of memory|OOM when allocating|RESOURCE_EXHAUSTED|Dst tensor is not initialized|"
    "(failed|unable|cannot) to allocate|cannot allocate memory",
    re.IGNORECASE,
)


class TrainingError(RuntimeError):
    """A run cannot go on. The message is one line: what happened, why, and what to do."""


@contextlib.contextmanager
def explain_errors(
    folder: pathlib.Path | None,
    unreadable: UnreadableImages,
    cluster: bool,
    memory_advice: str = "Choose a smaller batch.",
) -> Iterator[None]:
    """Raises errors from outside the program again, with a message of one line.

    Args:
        folder: where the run writes checkpoints; None: it writes none.
        unreadable: the images that could not be read.
        cluster: whether the run has several processes, or devices elsewhere.
        memory_advice: what to do if a device has too little memory.

    Raises:
        TrainingError: too many images cannot be read, one is gone, a label is wrong, a device is
            out of memory, or another process is gone.
        OSError: there is no room for what the run writes.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # A checkpoint's error is explained already. HDF5 has a text of its own for a full disk,
        # and may raise a RuntimeError.
        is_bare = isinstance(error, OSError) and error.strerror in {
            os.strerror(number) for number in _NO_ROOM
        }
        if is_bare or any(f"errno = {number}," in str(error) for number in _NO_ROOM):
            raise _disk_full(folder) from error
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):  # JAX's
            raise _out_of_memory(memory_advice) from error
        raise
    except MemoryError as error:
        raise _out_of_memory(memory_advice) from error
    except tf.errors.OpError as error:
        if unreadable.error is not None:
            raise TrainingError(str(unreadable.error)) from error
        if "No space left on device" in error.message:
            raise _disk_full(folder) from error
        if _OUT_OF_MEMORY.search(error.message):
            raise _out_of_memory(memory_advice) from error
        if label := find_label_error(error):
            raise TrainingError(f"{label}. Repair the data set.") from error
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


def _disk_full(folder: pathlib.Path | None) -> OSError:
    if folder is None:
        return OSError(errno.ENOSPC, "the disk is full. Make room, and start the command again")
    return OSError(
        errno.ENOSPC,
        "the disk is full; the last checkpoint is whole. Make room and start the same command "
        "again to go on",
        str(folder),
    )


def _out_of_memory(advice: str) -> TrainingError:
    return TrainingError(f"the device is out of memory. {advice}")
