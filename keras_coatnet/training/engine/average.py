"""The exponential moving average of a network's weights."""

from __future__ import annotations

from keras import ops

from keras_coatnet.arguments import number
from keras_coatnet.types import Tensor


def momentum_at(step: Tensor, momentum: float) -> Tensor:
    """The share of the old average that stays when the weights of a step are mixed in.

    A constant share would keep the first, random weights through a short run. So it starts low:
    (1 + step) / (10 + step), as in `tf.train.ExponentialMovingAverage` with `num_updates`.

    Args:
        step: updates made so far.
        momentum: the share in a long run, from 0 to 1.

    Returns:
        The share, a float32 scalar.

    Raises:
        ValueError: `momentum` is not from 0 to 1.

    Example:
        >>> round(float(momentum_at(90, 0.9999)), 2)
        0.91
    """
    momentum = number("momentum", momentum, least=0, most=1)
    step = ops.cast(step, "float32")
    return ops.minimum(ops.cast(momentum, "float32"), (1.0 + step) / (10.0 + step))
