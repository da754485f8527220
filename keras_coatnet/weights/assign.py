"""Sets a model's variables from named arrays: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from keras_coatnet.layers.relative_position import resize_table
from keras_coatnet.names import CLASSIFIER, FINAL_NORM, HIDDEN

# Layers that only a model with top has. `norm` is one of them in networks that normalize after
# the pooling.
_HEAD = (FINAL_NORM, HIDDEN, CLASSIFIER)


def assign(
    model: keras.Model, values: Mapping[str, np.ndarray], name: str, random_part: str | None = None
) -> None:
    """Sets every variable of a network from arrays of the same path.

    Kernels of 1x1 convolutions fit dense layers and the reverse, those of depthwise convolutions
    may have one kernel for each output channel, and tables of relative biases are resized. Nothing
    is changed unless everything fits.

    Args:
        model: the network.
        values: arrays by the paths of variables.
        name: what error messages call the arrays.
        random_part: what keeps its values: None, the `"classifier"`, or the whole `"head"`.

    Raises:
        ValueError: a variable has no array, an array has no variable, or their shapes differ.
    """
    variables = {
        variable.path: variable
        for variable in model.variables
        if "seed_generator" not in variable.path
    }
    if random_part == "classifier":
        variables = {p: v for p, v in variables.items() if not p.startswith(f"{CLASSIFIER}/")}
    elif random_part == "head":
        variables = {p: v for p, v in variables.items() if p in values or not _of_head(p)}
    unexpected = [
        path
        for path in values
        if path not in variables and not _belongs_to_absent_head(path, variables)
    ]
    missing = [path for path in variables if path not in values]
    if unexpected or missing:
        raise ValueError(
            f"{name} does not hold the weights of this network: nothing was loaded. Missing "
            f"variables: {_listed(missing)}. Unexpected variables: {_listed(unexpected)}."
        )
    fitted = {path: _fit(values[path], variables[path].shape, path) for path in variables}
    wrong = [
        f"{path} has shape {values[path].shape}, expected {tuple(variables[path].shape)}"
        for path, value in fitted.items()
        if value is None
    ]
    if wrong:
        raise ValueError(
            f"{name} does not hold the weights of this network: nothing was loaded. Variables of "
            f"another shape: {_listed(wrong)}."
        )
    for path, variable in variables.items():
        variable.assign(fitted[path])


def _of_head(path: str) -> bool:
    return path.split("/")[0] in _HEAD


def _belongs_to_absent_head(path: str, variables: Mapping[str, keras.Variable]) -> bool:
    layer = path.split("/")[0]
    return _of_head(path) and not any(known.startswith(f"{layer}/") for known in variables)


def _fit(value: np.ndarray, shape: tuple[int, ...], path: str) -> np.ndarray | None:
    """Returns the array in the shape of its variable; None if it does not fit."""
    shape = tuple(shape)
    is_kernel = path.endswith("/kernel")
    if is_kernel and (value.shape == (1, 1, *shape) or (1, 1, *value.shape) == shape):
        return value.reshape(shape)
    if path.endswith("depthwise_conv/kernel") and value.ndim == len(shape) == 4:
        per_output = (*shape[:2], shape[2] * shape[3], 1)
        return value.reshape(shape) if value.shape in (shape, per_output) else None
    if path.endswith("position/table") and value.ndim == 3 and value.shape[0] == shape[0]:
        return resize_table(value, (shape[1] + 1) // 2, (shape[2] + 1) // 2)
    return value if value.shape == shape else None


def _listed(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) + more) or "none"
