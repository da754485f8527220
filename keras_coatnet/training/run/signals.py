"""Signals that ask a run to stop: SIGTERM and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Seconds that the main thread has to end by itself after a second Ctrl-C.
_GRACE_SECONDS = 3.0


class Stopped(Exception):
    """A run was asked to stop, and has saved a checkpoint.

    Args:
        text: what happened.
        signal_number: the signal that asked; SIGTERM if another process of the run received it.

    Attributes:
        exit_status: the status that a program should exit with, by the convention of shells: 130
            after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, text: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(text)
        self.exit_status = 128 + signal_number


@contextlib.contextmanager
def on_stop_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler` with the signal's number where SIGTERM or Ctrl-C would end the process.

    A second Ctrl-C is handled as before, normally by KeyboardInterrupt. If the block has not ended
    three seconds later, for example because TensorFlow waits for a file system, the process exits
    with status 130. Outside the main thread, which alone may handle signals, nothing is changed.

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

    old: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
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
