"""Contenders: processes that time themselves when they are told to; and their contest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Generic, TypeVar

from keras_coatnet.benchmarking.machine import peak_memory_mb

Key = TypeVar("Key", bound=Hashable)


def serve(make: Callable[[], Callable[..., object]], versions: Sequence[str] = ()) -> None:
    """Runs a contender's side: answers a `TimedProcess` until that ends it.

    Args:
        make: imports and builds what is timed, and returns a function that runs it once. What a
            request says beside the number of runs is passed to that function.
        versions: the modules whose versions are reported, if they were imported.
    """
    # What libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    started = time.perf_counter()
    run = make()
    built = time.perf_counter()
    run()
    first = time.perf_counter()
    known = {name: getattr(sys.modules.get(name), "__version__", None) for name in versions}
    ready = {
        "versions": {name: version for name, version in known.items() if version},
        "build_s": built - started,
        "first_s": first - built,
    }
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        runs, *arguments = map(int, line.split())
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            run(*arguments)
            times.append(1000 * (time.perf_counter() - begin))
        answer = {"ms": statistics.median(times), "memory_mb": peak_memory_mb()}
        print(json.dumps(answer), file=answers, flush=True)


@dataclasses.dataclass
class TimedProcess:
    """A contender, as it is seen from the process that compares.

    Attributes:
        process: its process, which runs `serve`.
        errors: what it writes to its error stream.
        ready: what it reported when it was ready: versions, and seconds to build and to run once.
        memory_mb: the most memory that it had taken at its last answer; None if that is unknown.
    """

    process: subprocess.Popen[str]
    errors: IO[str]
    ready: dict[str, Any] = dataclasses.field(default_factory=dict)
    memory_mb: int | None = None

    @classmethod
    def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> TimedProcess:
        """Starts a contender, and does not wait for it.

        Args:
            command: the command.
            environment: its environment variables.

        Returns:
            The contender.
        """
        errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        )
        return cls(process, errors)

    def wait(self) -> None:
        """Waits until it is ready.

        Raises:
            RuntimeError: it ended instead; the message is the last line of its errors.
        """
        self.ready = self._read()

    def time(self, runs: int, *arguments: int) -> float:
        """Has it run, and returns the median of the milliseconds.

        Args:
            runs: number of runs.
            *arguments: what its function is called with.

        Raises:
            RuntimeError: it ended, as where memory ran out.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # where it has ended, reading says why
            print(runs, *arguments, file=self.process.stdin, flush=True)
        answer = self._read()
        self.memory_mb = answer["memory_mb"]
        return answer["ms"]

    def stop(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was still to be written
                stream.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise RuntimeError(said[-1] if said else f"it ended with status {status}")
        return json.loads(line)


class Contest(Generic[Key]):
    """Contenders that are timed in turns. One that ends by itself is out; the others go on.

    It is a context manager, which ends all of them.

    Attributes:
        running: the contenders, by key.
        failed: why others ended, by key.
    """

    def __init__(self) -> None:
        self.running: dict[Key, TimedProcess] = {}
        self.failed: dict[Key, str] = {}

    def __enter__(self) -> Contest[Key]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(list(self.running))

    def start(self, key: Key, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts a contender, and does not wait for it.

        Args:
            key: what it is called here.
            command: as of `TimedProcess.start`.
            environment: as of `TimedProcess.start`.
        """
        self.running[key] = TimedProcess.start(command, environment)

    def wait(self) -> None:
        """Waits until each contender is ready, or has ended. One that is ready stays so."""
        for key, process in list(self.running.items()):
            if not process.ready:
                self._try(key, TimedProcess.wait)

    def time(self, key: Key, runs: int, *arguments: int) -> float | None:
        """Has a contender run, and returns the median of the milliseconds.

        Args:
            key: the contender.
            runs: number of runs.
            *arguments: what its function is called with.

        Returns:
            The milliseconds; None if it has ended, now or before.
        """
        return self._try(key, TimedProcess.time, runs, *arguments)

    def stop(self, keys: Sequence[Key]) -> None:
        """Ends contenders.

        Args:
            keys: which.
        """
        for key in keys:
            self.running.pop(key).stop()

    def _try(self, key: Key, method: Callable[..., float | None], *arguments: int) -> float | None:
        if key not in self.running:
            return None
        try:
            return method(self.running[key], *arguments)
        except RuntimeError as error:
            self.failed[key] = str(error)
            self.stop([key])
            return None
