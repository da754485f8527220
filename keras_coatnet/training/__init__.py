"""Training and evaluation, with the paper's recipes.

`train` takes a `Recipe` and a folder; `find_recipe` knows those that have a name. The parts work
alone too: `training_dataset` feeds any `model.fit`, and `AdamW` and `WarmUpSchedule` go into any
`model.compile`.
"""

import importlib
from typing import Any

_PUBLIC = {
    "evaluation.evaluate": ("evaluate",),
    "engine.optimizer": ("AdamW",),
    "engine.schedule": ("WarmUpSchedule",),
    "data.augment": ("Augmentation",),
    "data.pipeline": ("evaluation_dataset", "training_dataset"),
    "data.unreadable": ("UnreadableImages",),
    "recipe": ("Recipe",),
    "named_recipes": ("find_recipe", "recipes"),
    "engine.remat": ("remat",),
    "data.datasets": ("ImageDataset", "open_dataset", "open_datasets"),
    "errors": ("TrainingError",),
    "run.result": ("Result",),
    "run.signals": ("Stopped",),
    "run.train": ("train",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a part when it is asked for: the command line reads recipes without TensorFlow."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
