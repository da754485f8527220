"""The learning rate of each step: a warm-up, then a fall."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_coatnet.arguments import choice, number, whole_number
from keras_coatnet.layers.base import PACKAGE
from keras_coatnet.training.choices import SCHEDULES
from keras_coatnet.types import Tensor


@keras.saving.register_keras_serializable(PACKAGE)
class WarmUpSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly from zero, then falls to a minimum along a cosine or a line, or stays.

    Args:
        peak: the rate after the warm-up.
        minimum: the rate at the end. A constant schedule does not use it.
        total_steps: steps of the whole run, warm-up included.
        warmup_steps: steps in which the rate rises. The last of them has the peak.
        shape: `"cosine"`, `"linear"` or `"constant"`.

    Raises:
        ValueError: `shape` is none of these, a number is out of range, or the warm-up is longer
            than the run.

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
        self.shape = choice("shape", shape, SCHEDULES)
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                f"`warmup_steps` must be from 0 to total_steps={total_steps}. "
                f"Received: warmup_steps={warmup_steps}"
            )
        if self.minimum > self.peak and shape != "constant":
            raise ValueError(
                f"`minimum` must not be above `peak`. Received: minimum={minimum}, peak={peak}"
            )

    def __call__(self, step: Tensor) -> Tensor:
        return self._rate(ops.cast(step, "float32"), ops)

    def value(self, step: int) -> float:
        """The rate of a step as a number, without running an operation of the backend.

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
        """The rate, computed with `numpy`: either `keras.ops` or NumPy itself."""
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        done = numpy.clip(done, 0.0, 1.0)
        if self.shape == "cosine":
            left = 0.5 * (1.0 + numpy.cos(math.pi * done))
        elif self.shape == "linear":
            left = 1.0 - done
        else:
            left = numpy.ones_like(done)
        falling = self.minimum + (self.peak - self.minimum) * left
        rising = self.peak * (step + 1.0) / max(1, self.warmup_steps)
        return numpy.where(step < self.warmup_steps, rising, falling)

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "minimum": self.minimum,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "shape": self.shape,
        }
