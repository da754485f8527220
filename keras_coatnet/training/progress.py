"""The line of progress that long work shows."""

from __future__ import annotations

import collections
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

# Seconds between two updates of the line on a terminal, and between two lines elsewhere.
_TERMINAL_SECONDS, _FILE_SECONDS = 0.1, 10.0
# The speed is measured over this many seconds.
_WINDOW_SECONDS = 30.0


class Progress:
    """Shows how far a run is: the step, figures, images per second, and the time left.

    On a terminal, tqdm keeps one line up to date. Elsewhere, such as in a log file, a line is added
    every ten seconds. The speed is measured here and not by tqdm: pauses for evaluations and
    checkpoints do not count, and a run may go back to an earlier step.

    Args:
        total_steps: number of steps in the whole run.
        batch_size: images per step, over all devices.
        stream: where the line is written. Default: the error stream.
        clock: returns seconds that never decrease. Default: `time.monotonic`.

    Example:
        >>> progress = Progress(100, batch_size=32, stream=sys.stdout)
        >>> progress.update(1, "epoch 0.10  loss 2.3000")
        step 1/100  epoch 0.10  loss 2.3000
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._batch_size = total_steps, batch_size
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._times: collections.deque[tuple[float, int]] = collections.deque()
        self._shown = float("-inf")
        self._bar: tqdm | None = None

    @property
    def images_per_second(self) -> float | None:
        """Speed of the last half minute; None until two steps were counted."""
        if len(self._times) < 2:
            return None
        (first, before), (last, after) = self._times[0], self._times[-1]
        return (after - before) * self._batch_size / (last - first) if last > first else None

    def update(self, step: int, figures: str) -> None:
        """Counts a step, and shows it if the last one was shown long enough ago.

        Args:
            step: number of steps done.
            figures: text that describes the step.
        """
        now = self._clock()
        self._times.append((now, step))
        while len(self._times) > 2 and self._times[1][0] <= now - _WINDOW_SECONDS:
            self._times.popleft()
        pause = _TERMINAL_SECONDS if self._stream.isatty() else _FILE_SECONDS
        if now - self._shown < pause and step < self._total:
            return
        self._shown = now
        parts = [f"step {step:,}/{self._total:,}", figures]
        speed = self.images_per_second
        if speed:
            left = (self._total - step) * self._batch_size / speed
            parts += [f"{speed:,.{0 if speed >= 10 else 1}f} images/s"]
            parts += [f"{tqdm.format_interval(left)} left"]
        self._show("  ".join(parts))

    def restart(self) -> None:
        """Forgets the speed measured so far. Called when the run goes back to an earlier step."""
        self._times.clear()

    def message(self, text: str) -> None:
        """Writes text above the line of progress.

        Args:
            text: one line or several.
        """
        tqdm.write(text, file=self._stream)
        self._stream.flush()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside, for an evaluation or a checkpoint, from the speed."""
        start = self._clock()
        yield
        passed = self._clock() - start
        self._times = collections.deque((when + passed, step) for when, step in self._times)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, line: str) -> None:
        if not self._stream.isatty():
            self.message(line)
            return
        # A line that the terminal wraps could not be overwritten.
        line = line[: shutil.get_terminal_size().columns - 1]
        if self._bar is None:
            self._bar = tqdm(desc=line, bar_format="{desc}", file=self._stream, position=0)
        else:
            self._bar.set_description_str(line)
