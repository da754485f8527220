"""What can end a run from outside, and how it is said: one line, with what to do.

TensorFlow reports an image that vanished, a disk that is full and a machine that is gone each with
an error of its own, many lines long and without the step or the cause.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pathlib
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import tensorflow as tf

from keras_coatnet.training.data.pipeline import UnreadableImages
from keras_coatnet.training.data.records import LABEL_EXPECTED
from keras_coatnet.training.recipe import Recipe

# What a second Ctrl-C leaves the main thread to end by itself.
_GRACE_SECONDS = 3.0
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
    """A run that cannot go on, in one line that says at which step, why, and what to do."""


@contextlib.contextmanager
def in_words(
    folder: pathlib.Path,
    broken: UnreadableImages,
    cluster: bool,
    memory_advice: str = "Choose a smaller batch.",
) -> Iterator[None]:
    """Turns errors that come from outside the program into one line each.

    Args:
        folder: where the run writes.
        broken: the images that could not be read.
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
        # That of a checkpoint is in words already. HDF5 says it in a text of its own, and may raise
        # a RuntimeError.
        is_bare = isinstance(error, OSError) and error.strerror in map(os.strerror, _NO_ROOM)
        if is_bare or any(f"errno = {number}," in str(error) for number in _NO_ROOM):
            raise _disk_full(folder) from error
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):  # JAX's
            raise _out_of_memory(memory_advice) from error
        raise
    except MemoryError as error:
        raise _out_of_memory(memory_advice) from error
    except tf.errors.OpError as error:
        if broken.error is not None:
            raise TrainingError(str(broken.error)) from error
        if "No space left on device" in error.message:
            raise _disk_full(folder) from error
        if _OUT_OF_MEMORY.search(error.message):
            raise _out_of_memory(memory_advice) from error
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


def _out_of_memory(advice: str) -> TrainingError:
    return TrainingError(f"the device is out of memory. {advice}")


def memory_advice(recipe: Recipe, replicas: int) -> str:
    """What helps a run that is out of memory, in words.

    Args:
        recipe: what is computed.
        replicas: over how many devices a batch is split.

    Returns:
        One sentence or two; each names an option of `train`.
    """
    share = recipe.batch_size // replicas
    smallest = 2 if recipe.mixes_pairs else 1
    parts = (
        parts
        for parts in range(recipe.gradient_accumulation_steps + 1, share // smallest + 1)
        if share % (parts * smallest) == 0
    )
    going_on = [
        f"--gradient-accumulation-steps {number} (smaller parts)"
        for number in itertools.islice(parts, 1)
    ]
    if not recipe.remat:
        going_on.append("--remat (computes blocks twice)")
    anew = ["--dtype-policy mixed_bfloat16"] if recipe.dtype_policy == "float32" else []
    anew += ["a smaller --batch-size or --image-size"]
    first = f"Start the same command with {' or '.join(going_on)} to go on. " if going_on else ""
    return f"{first}In another output folder, {' or '.join(anew)} helps, too."


@contextlib.contextmanager
def on_stop_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler` with the signal's number where SIGTERM or Ctrl-C would end the process.

    A second Ctrl-C does what it did before, or ends the process if that does not happen soon: where
    the main thread waits inside TensorFlow, for a file system that does not answer say, Python runs
    no handler. Outside the main thread, which alone may handle signals, nothing is changed.

    Args:
        handler: called in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(number, old[number])
        handler(number)

    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if old[signal.SIGINT] in (signal.SIG_IGN, None):  # a background job of a shell, or not Python's
        del old[signal.SIGINT]
    for number in old:
        signal.signal(number, on_signal)
    try:
        with _second_interrupt_ends() if signal.SIGINT in old else contextlib.nullcontext():
            yield
    finally:
        for number, before in old.items():
            signal.signal(number, before or signal.SIG_DFL)


@contextlib.contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """Ends the process some seconds after the second Ctrl-C, if this context is still open."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        # Each signal's number is written there at once, whatever the main thread is doing.
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if before != -1:  # an event loop's, such as a notebook's, which handles Ctrl-C itself
            signal.set_wakeup_fd(before)
            yield
            return
        is_over = threading.Event()

        def watch() -> None:
            interrupts = 0
            while interrupts < 2:
                received = reader.recv(64)
                if not received:
                    return
                interrupts += received.count(signal.SIGINT)
            if not is_over.wait(_GRACE_SECONDS):
                os.write(2, b"\nkeras-coatnet: interrupted while it waited for the system\n")
                os._exit(128 + signal.SIGINT)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            is_over.set()
            writer.close()
            watcher.join()
