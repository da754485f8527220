"""How the tests load and run the examples."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
import types

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("quickstart", "finetune", "train_loop")


def load(name: str) -> types.ModuleType:
    """An example as a module; it reads no arguments and trains nothing."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    name: str, *arguments: object, python: tuple[str, ...] = (), code: str | None = None
) -> subprocess.CompletedProcess:
    """An example as users run it, in a process of its own; or `code`, as if it were the example."""
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "KERAS_BACKEND": "tensorflow"}
    script = str(ROOT / "examples" / f"{name}.py")
    if code is not None:
        script = f"import sys; sys.argv[0] = {script!r}\n{code}"
        python = (*python, "-c")
    command = [sys.executable, *python, script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
