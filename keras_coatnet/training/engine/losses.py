"""Losses of single examples, which a training step sums over a global batch."""

from __future__ import annotations

from keras import ops

from keras_coatnet.arguments import choice
from keras_coatnet.training.choices import LOSSES
from keras_coatnet.types import Tensor


def per_example_loss(kind: str, labels: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of each example.

    Args:
        kind: `"softmax"`: each example has one class. `"sigmoid"`: each class is a binary label
            of its own, and an example's loss is their sum, as in the code of the paper's group.
        labels: (batch, classes), from 0 to 1.
        logits: (batch, classes), before any activation.

    Returns:
        (batch,), float32.

    Raises:
        ValueError: `kind` is neither.

    Example:
        >>> round(float(per_example_loss("softmax", [[1.0, 0.0]], [[0.0, 0.0]])[0]), 4)
        0.6931
        >>> round(float(per_example_loss("sigmoid", [[1.0, 0.0]], [[0.0, 0.0]])[0]), 4)
        1.3863
    """
    kind = choice("kind", kind, LOSSES)
    labels, logits = ops.cast(labels, "float32"), ops.cast(logits, "float32")
    if kind == "softmax":
        return ops.negative(ops.sum(labels * ops.log_softmax(logits, axis=-1), axis=-1))
    # max(x, 0) - x y + log(1 + exp(-|x|)): no overflow on either side.
    losses = ops.relu(logits) - logits * labels + ops.log1p(ops.exp(ops.negative(ops.abs(logits))))
    return ops.sum(losses, axis=-1)
