"""Kills a training run at random moments, and shows that nothing is lost.

    python -m tests.training.faults --kills 10

It trains once without interruption and once killed with signal 9 again and again, every other time
while a checkpoint is being written, and prints the losses of both runs side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests import processes
from tests.training import runs

PATIENCE = 240.0  # seconds until a run must have come to the next step


class Kill(NamedTuple):
    """A moment at which a run was killed."""

    begun_at: int  # the step from which it went on
    reached: int  # the last step that it logged
    left_half: bool  # whether it left a checkpoint half written


class Run:
    """A process that trains; what it writes on both streams goes to a file."""

    def __init__(
        self,
        command: list[str],
        output: pathlib.Path,
        cwd: pathlib.Path | None = None,
        **environment: str,
    ) -> None:
        self.output = output
        self.log = tempfile.TemporaryFile("w+")
        streams = self.log.fileno(), self.log.fileno()
        self.process = processes.start(command, *streams, cwd, runs.environment(**environment))

    def text(self) -> str:
        """What it said so far."""
        position = self.log.tell()
        self.log.seek(0)
        text = self.log.read()
        self.log.seek(position)
        return text

    def wait_for_begin(self) -> int:
        """Waits until it trains, or is over; returns the step from which it goes on."""

        def first() -> re.Match | None:
            return re.search(r"^going on from step (\d+)|^step \d+/", self.text(), re.MULTILINE)

        self._wait_until(first)
        found = first()
        return int(found[1] or 0) if found else 0

    def wait_for_step(self, step: int) -> None:
        """Waits until it has itself logged this step, or a later one, or is over."""
        self.wait_for_begin()  # by then the rows that it will write again are gone
        self._wait_until(lambda: logged(self.output) >= step)

    def _wait_until(self, is_so: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and not is_so():
            assert time.monotonic() < end, self.text()[-3000:]
            time.sleep(0.001)

    def wait_for_save(self) -> None:
        """Waits until it writes a checkpoint."""
        self._wait_until(self.half_written)

    def half_written(self) -> bool:
        """Whether there is a checkpoint of this process that does not have its name yet."""
        return any((self.output / "checkpoints").glob(f".{self.process.pid}.*"))

    def send(self, number: int) -> None:
        """Sends a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it does not end: {self.text()[-3000:]}") from None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def logged(output: pathlib.Path) -> int:
    """The last step in `history.csv`, 0 without one."""
    with contextlib.suppress(OSError):
        numbers = re.findall(r"^(\d+),.*\n", (output / "history.csv").read_text(), re.MULTILINE)
        return int(numbers[-1]) if numbers else 0
    return 0


def kill(command: list[str], output: pathlib.Path, steps: int, delay: float | None) -> Kill | None:
    """Starts a run and kills it `delay` seconds after some steps, or while it saves after those.

    Returns:
        The moment; None if the run was over before.
    """
    with Run(command, output) as run:
        begun = run.wait_for_begin()
        run.wait_for_step(begun + steps)
        if delay is None:
            run.wait_for_save()
        else:
            time.sleep(delay)
        run.send(signal.SIGKILL)
        if run.wait() == 0:
            return None
        assert run.process.returncode == -signal.SIGKILL, run.text()[-3000:]
        return Kill(begun, logged(output), run.half_written())


def main() -> int:
    """Prints the table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20, help="of 10 steps each")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        recipe = runs.write_recipe(folder, epochs=options.epochs)
        whole, killed = folder / "whole", folder / "killed"
        with Run(runs.command(recipe, whole), whole) as run:
            assert run.wait() == 0, run.text()[-3000:]
        again = runs.command(recipe, killed)
        kills = []
        for number in range(options.kills):
            steps, delay = int(random.integers(1, 30)), random.uniform(0, 0.2)
            moment = kill(again, killed, steps, None if number % 2 else delay)
            if moment is None:
                break
            kills.append(moment)
            print(f"kill {number + 1}: {moment}", flush=True)
        with Run(again, killed) as run:
            assert run.wait() == 0, run.text()[-3000:]
            last = run.wait_for_begin()
        return _compare(runs.outcome(whole), runs.outcome(killed), kills, last)


def _compare(whole: runs.Outcome, killed: runs.Outcome, kills: list[Kill], last: int) -> int:
    print("\nkill  went on from  reached  next went on from  half a checkpoint left")
    following = [*(kill.begun_at for kill in kills[1:]), last]
    for number, (moment, after) in enumerate(zip(kills, following, strict=True), 1):
        print(
            f"{number:4}  {moment.begun_at:12}  {moment.reached:7}  {after:17}  {moment.left_half}"
        )
    print("\nstep  uninterrupted       killed              equal")
    for one, other in zip(whole.history, killed.history, strict=True):
        equal = "yes" if one == other else "NO"
        print(f"{one['step']:>4}  {one['loss']:<18}  {other['loss']:<18}  {equal}")
    print()
    for field in runs.Outcome._fields:
        equal = getattr(whole, field) == getattr(killed, field)
        print(f"{field}: {'equal' if equal else 'DIFFERENT'}")
    return int(whole != killed)


if __name__ == "__main__":
    sys.exit(main())
