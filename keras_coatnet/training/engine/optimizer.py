"""AdamW with a learning rate and a weight decay for each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_coatnet.arguments import as_python, boolean, number
from keras_coatnet.layers.base import PACKAGE

# Registers WarmUpSchedule: a saved model that holds this optimizer may hold that schedule.
from keras_coatnet.training.engine import schedule  # noqa: F401
from keras_coatnet.types import Tensor

# Weight decay leaves these out, as in the code of the paper's group: what has one number a channel,
# and the tables of relative positions.
NO_DECAY = (r"bias$", r"gamma$", r"beta$", r"scale$", r"/position/table$")


@keras.saving.register_keras_serializable(PACKAGE)
class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW with a learning rate for each layer, and without decay of biases and norms.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: decoupled decay, in units of the learning rate. The attribute `decay` holds
            it; `weight_decay`, by which the base class would decay, stays 0.
        no_decay: regular expressions. Variables whose path matches one of them (`re.search`) do
            not decay.
        rate_scales: factors on the learning rate, and so on the decay, by layer name: the first
            part of a variable's path. The factor of other layers is 1.
        gradients_are_summed: whether gradients are summed over a TensorFlow strategy's replicas
            before `apply`. Set it where they are clipped by their global norm, which must come
            after the sum; Keras has no other switch for it.
        **kwargs: further arguments of `keras.optimizers.AdamW`.

    Variables that `exclude_from_weight_decay` names do not decay either. As with Keras's own
    optimizers, a saved model does not keep them. It does keep `no_decay`.

    Raises:
        ValueError: `no_decay` is a single string or holds what is not a regular expression, or a
            decay or a factor is not a number of at least 0.

    Example:
        >>> AdamW(1e-3, weight_decay=0.05, rate_scales={"stem_conv1": 0.1}).rate_scales
        {'stem_conv1': 0.1}
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        weight_decay: float = 0.0,
        no_decay: Sequence[str] = NO_DECAY,
        rate_scales: Mapping[str, float] | None = None,
        gradients_are_summed: bool = False,
        **kwargs: Any,
    ) -> None:
        # Keras decays in a separate pass, at the unscaled rate. `update_step` does it instead.
        super().__init__(learning_rate, weight_decay=0.0, **kwargs)
        self.decay = number("weight_decay", weight_decay, least=0)
        self.no_decay = _checked_patterns("no_decay", no_decay)
        self.rate_scales = _checked_scales(rate_scales or {})
        self.gradients_are_summed = boolean("gradients_are_summed", gradients_are_summed)
        self._excluded_names: tuple[str, ...] = ()
        self._decays: list[float] = []
        self._scales: list[float] = []

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(var_list)
        for variable in var_list:
            patterns = (*self.no_decay, *self._excluded_names)
            excluded = any(re.search(pattern, variable.path) for pattern in patterns)
            excluded = excluded or not self._use_weight_decay(variable)
            self._decays.append(0.0 if excluded else self.decay)
            self._scales.append(self.rate_scales.get(variable.path.partition("/")[0], 1.0))

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[keras.Variable] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        """Excludes variables from weight decay, besides those that `no_decay` matches.

        A second call replaces the first, as in Keras.

        Args:
            var_list: the variables.
            var_names: regular expressions. Variables whose name or path matches one of them are
                excluded.

        Raises:
            ValueError: the optimizer is built already, by `build` or by its first step; or
                `var_names` is a single string or holds what is not a regular expression.

        Example:
            >>> optimizer = AdamW(1e-3, weight_decay=0.05)
            >>> optimizer.exclude_from_weight_decay(var_names=["embedding"])
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` was called on an optimizer that is built. Call it "
                "before the first step of training and before `build`."
            )
        names = _checked_patterns("var_names", var_names or ())
        super().exclude_from_weight_decay(var_list, var_names)
        self._excluded_names = names

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype) * self._scales[index]
        if self._decays[index]:
            self.assign_sub(variable, variable * (rate * self._decays[index]))
        super().update_step(gradient, variable, rate)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Does nothing: `update_step` decays."""

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        if self.gradients_are_summed:
            return list(grads_and_vars)
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "weight_decay": self.decay,
            "no_decay": self.no_decay,
            "rate_scales": self.rate_scales,
            "gradients_are_summed": self.gradients_are_summed,
        }


def _checked_patterns(argument: str, patterns: Any) -> tuple[str, ...]:
    """Regular expressions as a tuple. A single string would be read letter by letter."""
    several = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    found = tuple(map(as_python, patterns)) if several else ()
    if not several or not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(
            f"`{argument}` must be several regular expressions, such as ('bias$',). "
            f"Received: {argument}={patterns!r:.100}"
        )
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{argument}` must be regular expressions. {pattern!r} is not a regular "
                f"expression: {error}"
            ) from error
    return found


def _checked_scales(scales: Any) -> dict[str, float]:
    if not isinstance(scales, Mapping) or not all(isinstance(name, str) for name in scales):
        raise ValueError(
            "`rate_scales` must be a dictionary from names of layers to numbers. "
            f"Received: rate_scales={scales!r:.100}"
        )
    return {
        name: number(f"rate_scales[{name!r}]", scale, least=0) for name, scale in scales.items()
    }
