"""The variables of a training step by keys that are the same in every process and every run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras


def named_variables(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> dict[str, keras.Variable]:
    """Every variable of a model and its optimizer, seeds of random draws among them.

    The key of a weight is its path. Optimizers and seeds have numbers in their paths that Keras
    counts up within a process, so the key of their variables is their place.

    Args:
        model: a built model.
        optimizer: its optimizer, built.

    Returns:
        The variables by key.
    """
    weights = {id(variable) for variable in model.weights}
    random = [variable for variable in model.variables if id(variable) not in weights]
    named = {f"model/{variable.path}": variable for variable in model.weights}
    return named | numbered("optimizer", optimizer.variables) | numbered("random", random)


def numbered(group: str, values: Iterable[Any]) -> dict[str, Any]:
    """Values by group and place: `"average/00000"` and so on."""
    return {f"{group}/{place:05d}": value for place, value in enumerate(values)}


def check_same_keys(known: Iterable[str], saved: Iterable[str]) -> None:
    """Checks that a checkpoint belongs to a model and its optimizer.

    Args:
        known: the keys of the run.
        saved: the keys of the checkpoint.

    Raises:
        ValueError: they are not the same.
    """
    if different := sorted(set(known) ^ set(saved)):
        raise ValueError(
            "The checkpoint belongs to another network or optimizer. These variables are only in "
            f"one of the two: {', '.join(different[:5])}. Choose another output folder."
        )
