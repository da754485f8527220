"""Learning-rate schedule, AdamW as recipes want it, and the average of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_coatnet.arguments import as_python, boolean, choice, number, whole_number
from keras_coatnet.layers.base import PACKAGE
from keras_coatnet.model import CoAtNetModel
from keras_coatnet.names import STEM, stage_of
from keras_coatnet.training.recipe import FREEZES

# The paper's group leaves these out of weight decay: one number a channel, and the tables.
NO_DECAY = (r"bias$", r"gamma$", r"beta$", r"scale$", r"/position/table$")


@keras.saving.register_keras_serializable(PACKAGE)
class WarmUpSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly from zero, then falls to a minimum by a cosine, a line, or not at all.

    Args:
        peak: the rate after the warm-up.
        minimum: the rate at the end; a constant schedule does not use it.
        total_steps: steps of the whole run, warm-up included.
        warmup_steps: steps in which the rate rises; the last of them has the peak.
        shape: `"cosine"`, `"linear"` or `"constant"`.

    Raises:
        ValueError: there is no such shape, a number makes no sense, or the warm-up is longer than
            the run.

    Example:
        >>> float(WarmUpSchedule(1e-3, 1e-5, 100, 10)(4)) == float(keras.ops.cast(5e-4, "float32"))
        True
    """

    def __init__(
        self,
        peak: float,
        minimum: float,
        total_steps: int,
        warmup_steps: int = 0,
        shape: str = "cosine",
    ) -> None:
        super().__init__()
        self.peak = number("peak", peak, least=0)
        self.minimum = number("minimum", minimum, least=0)
        self.total_steps = whole_number("total_steps", total_steps)
        self.warmup_steps = whole_number("warmup_steps", warmup_steps, 0)
        self.shape = choice("shape", shape, ("cosine", "linear", "constant"))
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                f"`warmup_steps` must be from 0 to total_steps={total_steps}. "
                f"Received: warmup_steps={warmup_steps}"
            )
        if self.minimum > self.peak and shape != "constant":
            raise ValueError(
                f"`minimum` must not be above `peak`. Received: minimum={minimum}, peak={peak}"
            )

    def __call__(self, step: Any) -> Any:
        return self._rate(ops.cast(step, "float32"), ops)

    def value(self, step: int) -> float:
        """The rate of a step as a number, without an operation of the backend.

        Args:
            step: updates made before it, at least 0.

        Returns:
            The rate, in double precision.

        Example:
            >>> WarmUpSchedule(1e-3, 1e-5, 100, 10).value(4)
            0.0005
        """
        return float(self._rate(np.float64(step), np))

    def _rate(self, step: Any, numpy: Any) -> Any:
        """The rate by the functions of `keras.ops` or of NumPy."""
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        done = numpy.clip(done, 0.0, 1.0)
        if self.shape == "cosine":
            left = 0.5 * (1.0 + numpy.cos(math.pi * done))
        elif self.shape == "linear":
            left = 1.0 - done
        else:
            left = numpy.ones_like(done)
        rate = self.minimum + (self.peak - self.minimum) * left
        rising = self.peak * (step + 1.0) / max(1, self.warmup_steps)
        return numpy.where(step < self.warmup_steps, rising, rate)

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "minimum": self.minimum,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "shape": self.shape,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW with a rate for each variable, told by its path.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: decoupled decay, in units of the learning rate.
        no_decay: regular expressions; variables whose path one of them finds do not decay.
        rate_scales: factor on the learning rate (and so on the decay) for the layers of these
            names, the first part of a variable's path; 1 for all others.
        gradients_are_summed: whether the gradients that arrive are already summed over a
            TensorFlow strategy's replicas. Clipping by the global norm must come after that sum,
            and Keras has no other switch for it.
        **kwargs: further arguments of `keras.optimizers.AdamW`.

    Variables that `exclude_from_weight_decay` names do not decay either. As with Keras's own
    optimizers, a saved model does not remember them; it does remember `no_decay`.

    Raises:
        ValueError: `no_decay` is a single text or holds no regular expression, or a decay or a
            factor is no number of at least 0.

    Example:
        >>> AdamW(1e-3, weight_decay=0.05, rate_scales={"stem_conv1": 0.1}).weight_decay
        0.0
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
        # Keras would decay at the unscaled rate, in a pass of its own: `update_step` does both.
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
            spared = any(re.search(pattern, variable.path) for pattern in patterns)
            spared = spared or not self._use_weight_decay(variable)
            self._decays.append(0.0 if spared else self.decay)
            self._scales.append(self.rate_scales.get(variable.path.partition("/")[0], 1.0))

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[keras.Variable] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        """Leaves variables out of weight decay, besides those that `no_decay` finds.

        A second call replaces the first, as in Keras.

        Args:
            var_list: the variables.
            var_names: regular expressions; variables whose name or path one of them finds are left
                out.

        Raises:
            ValueError: the optimizer is built already: it has taken its first step, or `build` was
                called; or `var_names` is a single text or holds no regular expression.

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

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype) * self._scales[index]
        if self._decays[index]:
            self.assign_sub(variable, variable * (rate * self._decays[index]))
        super().update_step(gradient, variable, rate)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: see `update_step`."""

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
    """Regular expressions as a tuple; a single text would be taken letter by letter."""
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
                f"`{argument}` must be regular expressions. {pattern!r} is no regular expression: "
                f"{error}"
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


def layer_rate_scales(model: CoAtNetModel, decay: float) -> dict[str, float]:
    """Layer-wise decay of the learning rate (as BEiT's): smaller the further from the head.

    Args:
        model: the network.
        decay: factor from one block to the one below it.

    Returns:
        The factor for each layer's name: 1 for the head, `decay` for the last block, and so on
        down to the stem.

    Example:
        >>> from keras_coatnet import CoAtNet
        >>> round(layer_rate_scales(CoAtNet("coatnet0"), 0.5)["stage4_block1"], 2)
        0.25
    """
    decay = number("decay", decay, above=0)
    blocks = [block.name for block in model.architecture.blocks()]
    depth = {name: len(blocks) - index for index, name in enumerate(blocks)}
    scales = {}
    for layer in model.layers:
        below = len(blocks) + 1 if layer.name in STEM else 0
        scales[layer.name] = decay ** depth.get(layer.name, below)
    return scales


def freeze(model: CoAtNetModel, up_to: str, batch_norm: bool) -> None:
    """Makes a part of a network keep what it has learnt.

    A frozen BatchNorm also keeps its statistics, as everywhere in Keras.

    Args:
        model: the network.
        up_to: `"none"`, `"stem"`, or `"stage1"` to `"stage4"`: the stem and all stages to that one.
        batch_norm: whether every BatchNorm is frozen, wherever it is.

    Example:
        >>> from keras_coatnet import CoAtNet
        >>> model = CoAtNet("coatnet0")
        >>> freeze(model, "stage4", batch_norm=False)
        >>> sorted({v.path.split("/")[0] for v in model.trainable_variables})
        ['hidden', 'norm', 'predictions']
    """
    last = FREEZES.index(choice("up_to", up_to, FREEZES)) - 1
    batch_norm = boolean("batch_norm", batch_norm)
    for layer in model.layers:
        stage = stage_of(layer.name)
        if stage is not None and stage <= last:
            layer.trainable = False
        if batch_norm:
            _freeze_batch_norm(layer)


def _freeze_batch_norm(layer: keras.layers.Layer) -> None:
    if isinstance(layer, keras.layers.BatchNormalization):
        layer.trainable = False
    for part in vars(layer).values():
        if isinstance(part, keras.layers.Layer):
            _freeze_batch_norm(part)


def per_example_loss(kind: str, labels: Any, logits: Any) -> Any:
    """Cross-entropy of each example.

    Args:
        kind: `"softmax"`: classes exclude each other; `"sigmoid"`: each class is a question of its
            own, and their losses are summed, as in the code of the paper's group.
        labels: (batch, classes), shares or truth values.
        logits: (batch, classes), before any activation.

    Returns:
        (batch,), float32.

    Example:
        >>> round(float(per_example_loss("softmax", [[1.0, 0.0]], [[0.0, 0.0]])[0]), 4)
        0.6931
        >>> round(float(per_example_loss("sigmoid", [[1.0, 0.0]], [[0.0, 0.0]])[0]), 4)
        1.3863
    """
    kind = choice("kind", kind, ("softmax", "sigmoid"))
    labels, logits = ops.cast(labels, "float32"), ops.cast(logits, "float32")
    if kind == "softmax":
        return -ops.sum(labels * ops.log_softmax(logits, axis=-1), axis=-1)
    # max(x, 0) - x y + log(1 + exp(-|x|)): no overflow on either side.
    losses = ops.relu(logits) - logits * labels + ops.log1p(ops.exp(-ops.abs(logits)))
    return ops.sum(losses, axis=-1)


def average_share(decay: float, step: Any) -> Any:
    """How much of the old average stays when the weights of a step are mixed in.

    Short runs would keep their first weights for ever, so the share starts low: (1 + step) /
    (10 + step), as in TensorFlow's ExponentialMovingAverage with a step count.

    Args:
        decay: the share in the long run.
        step: updates so far.

    Returns:
        The share, a scalar.
    """
    decay = number("decay", decay, least=0, most=1)
    step = ops.cast(step, "float32")
    return ops.minimum(ops.cast(decay, "float32"), (1.0 + step) / (10.0 + step))
