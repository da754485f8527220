"""Training and evaluation, with the paper's recipes.

`train` takes a `Recipe` and a folder. `find_recipe` knows the recipes that have a name. The parts
work alone too: `training_dataset` feeds any `model.fit`, and `AdamW` and `WarmUpSchedule` can be
used in any `model.compile`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_coatnet.training.data.augment import Augmentation
    from keras_coatnet.training.data.datasets import ImageDataset, open_dataset, open_datasets
    from keras_coatnet.training.data.pipeline import evaluation_dataset, training_dataset
    from keras_coatnet.training.data.unreadable import UnreadableImages
    from keras_coatnet.training.engine.optimizer import AdamW
    from keras_coatnet.training.engine.remat import remat
    from keras_coatnet.training.engine.schedule import WarmUpSchedule
    from keras_coatnet.training.errors import TrainingError
    from keras_coatnet.training.evaluation.evaluate import evaluate
    from keras_coatnet.training.named_recipes import find_recipe, recipes
    from keras_coatnet.training.recipe import Recipe
    from keras_coatnet.training.run.result import Result
    from keras_coatnet.training.run.signals import Stopped
    from keras_coatnet.training.run.train import train

__all__ = [
    "AdamW",
    "Augmentation",
    "ImageDataset",
    "Recipe",
    "Result",
    "Stopped",
    "TrainingError",
    "UnreadableImages",
    "WarmUpSchedule",
    "evaluate",
    "evaluation_dataset",
    "find_recipe",
    "open_dataset",
    "open_datasets",
    "recipes",
    "remat",
    "train",
    "training_dataset",
]

# Where each name is defined. It is imported when it is asked for: the command line reads recipes
# without TensorFlow.
_MODULES = {
    "data.augment": ("Augmentation",),
    "data.datasets": ("ImageDataset", "open_dataset", "open_datasets"),
    "data.pipeline": ("evaluation_dataset", "training_dataset"),
    "data.unreadable": ("UnreadableImages",),
    "engine.optimizer": ("AdamW",),
    "engine.remat": ("remat",),
    "engine.schedule": ("WarmUpSchedule",),
    "errors": ("TrainingError",),
    "evaluation.evaluate": ("evaluate",),
    "named_recipes": ("find_recipe", "recipes"),
    "recipe": ("Recipe",),
    "run.result": ("Result",),
    "run.signals": ("Stopped",),
    "run.train": ("train",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
