"""A contender: a process of its own, which times itself when it is told to."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from keras_coatnet.benchmarking.machine import peak_memory_mb


def serve(make: Callable[[], Callable[..., object]], versions: Sequence[str] = ()) -> None:
    """Runs a contender's side: answers a `TimedProcess` until that ends it.

    Args:
        make: imports and builds what is timed, and returns a function that runs it once. What a
            request says beside the number of runs is passed to that function.
        versions: the modules whose versions are reported, if they were imported.
    """
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
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        runs, *arguments = map(int, line.split())
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            run(*arguments)
            times.append(1000 * (time.perf_counter() - begin))
        print(statistics.median(times), flush=True)
    print(json.dumps({"memory_mb": peak_memory_mb()}), flush=True)


@dataclasses.dataclass
class TimedProcess:
    """A contender, as it is seen from the process that compares.

    Attributes:
        name: its name.
        process: its process, which runs `serve`.
        errors: what it writes to its error stream.
        ready: what it reported when it was ready: versions, and seconds to build and to run once.
    """

    name: str
    process: subprocess.Popen[str]
    errors: IO[str]
    ready: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(
        cls, name: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> TimedProcess:
        """Starts a contender, and does not wait for it.

        Args:
            name: its name.
            command: the command.
            environment: its environment variables.
        """
        errors = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        return cls(name, process, errors)

    def wait(self) -> None:
        """Waits until it is ready.

        Raises:
            RuntimeError: it ended instead; the message is the last line of its errors.
        """
        line = self._read()
        while not line.startswith("{"):  # a library that greets
            line = self._read()
        self.ready = json.loads(line)

    def time(self, runs: int, *arguments: int) -> float:
        """Has it run, and returns the median of the milliseconds.

        Args:
            runs: number of runs.
            *arguments: what its function is called with.

        Raises:
            RuntimeError: it ended, as where memory ran out.
        """
        assert self.process.stdin is not None
        try:
            print(runs, *arguments, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # reading says why
        return float(self._read())

    def finish(self) -> dict[str, Any]:
        """Ends it, and returns its memory with what it reported when it was ready."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        found = json.loads(self._read())
        self.process.wait()
        return {**found, **self.ready}

    def kill(self) -> None:
        """Ends it at once, whatever it does."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise RuntimeError(said[-1] if said else f"it ended with status {status}")
        return line
