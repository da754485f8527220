"""The start of the command `keras-coatnet`.

This module stands outside the package because `import keras_coatnet` imports Keras and TensorFlow,
which takes seconds. The command starts with a package whose `__init__` has not run yet, so that its
light modules (configurations, recipes, the registry of checkpoints) can be imported at once. The
first use of a public name, such as `keras_coatnet.CoAtNet`, runs `__init__`; from then on the
process is like any other that imported the package.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


def main() -> int:
    """Runs the command line.

    Returns:
        The exit status, see `keras_coatnet.cli.main`.
    """
    defer_package()
    from keras_coatnet.cli import main as run

    return run()


def defer_package() -> None:
    """Lets modules of the package be imported before its `__init__` has run.

    Raises:
        ImportError: the package is not installed.
    """
    if "keras_coatnet" not in sys.modules:
        sys.modules["keras_coatnet"] = _deferred("keras_coatnet")


def _deferred(name: str) -> ModuleType:
    """A package whose `__init__` runs at the first use of a name that it defines.

    `importlib.util.LazyLoader` does not serve: it runs `__init__` as soon as a module of the
    package is imported.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"The package {name} is not installed.")
    loader, package = spec.loader, importlib.util.module_from_spec(spec)

    def __getattr__(attribute: str) -> Any:
        # Removed first: while `__init__` runs, a missing name is an error as in any module.
        if vars(package).pop("__getattr__", None) is not None:
            loader.exec_module(package)
        return getattr(package, attribute)

    vars(package)["__getattr__"] = __getattr__
    return package
