"""Processes of Python that do not import TensorFlow again, each forked from one that has.

Importing TensorFlow, Keras and what Keras imports takes seconds of a core, and the tests of runs
start dozens of processes. `start` gives what `subprocess.Popen` gives of `python -m`, `python -c`
and nothing else: a process with its own environment, folder, streams, session, signals and exit
status, in which TensorFlow has computed nothing yet.

Not for tests of what happens at import, or before it, as when the client of Hugging Face's hub
reads its environment: those start Python themselves.
"""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]

# For processes under JAX that run most of what they compile once: nearly all of their time is
# compiling. XLA's older emitters, without threads for each, do that in two thirds of the time.
COMPILE_FAST = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
}


class Process:
    """As much of a `subprocess.Popen` as the tests use."""

    def __init__(self, command: list[str], status: int) -> None:
        self.args = command
        self.returncode: int | None = None
        self._status = os.fdopen(status, "rb", 0)
        self.pid = int(self._status.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative if a signal ended it."""
        if self.returncode is None:
            if timeout is not None and not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit status if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


def start(
    command: list[str],
    stdout: int,
    stderr: int,
    cwd: str | os.PathLike | None = None,
    env: dict[str, str] | None = None,
) -> Process | subprocess.Popen:
    """Starts `[python, "-m", module, ...]` or `[python, "-c", code, ...]`, in a new session.

    The streams are file descriptors. Where the system has no descriptors of processes, as macOS,
    Python is started anew.
    """
    cwd, env = os.fspath(cwd or os.getcwd()), dict(os.environ) if env is None else env
    if not hasattr(os, "pidfd_open"):
        options: dict[str, Any] = {"stdout": stdout, "stderr": stderr, "cwd": cwd, "env": env}
        return subprocess.Popen(command, start_new_session=True, **options)
    assert command[0] == sys.executable and command[1] in ("-m", "-c")
    found, told = os.pipe()
    request = json.dumps({"command": command, "cwd": cwd, "env": env}).encode()
    descriptors = array.array("i", [stdout, stderr, told])
    _server().sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    os.close(told)
    return Process(command, found)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
    """Runs such a command to its end; its streams as text.

    Takes `cwd`, `env` and `timeout`, in seconds.
    """
    timeout = options.pop("timeout", 300)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        process = start(command, *(stream.fileno() for stream in streams), **options)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        for stream in streams:
            stream.seek(0)
        return subprocess.CompletedProcess(command, status, *(each.read() for each in streams))


@functools.cache
def _server() -> socket.socket:
    """A connection to the process that forks; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, "-m", "tests.processes", str(theirs.fileno())],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"},
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    return ours


# --- In the process that forks -----------------------------------------------------------------


def _serve(requests: socket.socket) -> dict | None:
    """Forks for each request. Returns the request in the child, None when there are no more."""
    children: dict[int, int] = {}  # the pipes for exit statuses, by descriptors of processes
    while True:
        for ready in select.select([requests, *children], [], [])[0]:
            if ready is not requests:
                end = os.waitid(os.P_PIDFD, ready, os.WEXITED)
                ended = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                    os.write(children[ready], f"{ended}\n".encode())
                os.close(children.pop(ready))
                os.close(ready)
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
            if not message:
                return None
            stdout, stderr, told = descriptors
            child = os.fork()
            if not child:
                os.setsid()
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                for descriptor in (*descriptors, requests.fileno(), *children, *children.values()):
                    os.close(descriptor)
                requests.detach()
                return json.loads(message)
            os.write(told, f"{child}\n".encode())
            children[os.pidfd_open(child)] = told
            os.close(stdout)
            os.close(stderr)


def _become(request: dict) -> None:
    """Runs what the command line says, as Python itself would."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    _, option, what, *arguments = request["command"]
    sys.path[0] = ""  # as for python -c; -m, too, begins where it is started
    sys.argv = ["-c" if option == "-c" else what, *arguments]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        names = {"__name__": "__main__"}
        exec(compile(what, "<string>", "exec"), names)


def main() -> None:
    """Imports what takes long, and forks until its parent ends."""
    from tensorflow.python.eager import context

    import keras_coatnet.cli
    import keras_coatnet.training  # noqa: F401

    # What TensorFlow starts with its first tensor, its threads among it, no fork would have.
    assert not context.context()._initialized
    # As tests/conftest.py has it. What is imported is garbage at no time, in a child neither.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1_000_000)
    requests = socket.socket(fileno=int(sys.argv[1]))
    request = _serve(requests)
    if request is not None:
        _become(request)


if __name__ == "__main__":
    main()
