"""The losses, against plain sums."""

import math

import keras
import numpy as np
import pytest

from keras_coatnet.training.engine.losses import per_example_loss


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_are_plain_sums(kind):
    random = np.random.default_rng(0)
    logits = random.normal(scale=10, size=(6, 4)).astype("float32")
    labels = random.dirichlet(np.ones(4), 6).astype("float32")
    found = keras.ops.convert_to_numpy(per_example_loss(kind, labels, logits))
    for row in range(6):
        total = 0.0
        for column in range(4):
            x, y = float(logits[row, column]), float(labels[row, column])
            if kind == "softmax":
                whole = sum(math.exp(float(other)) for other in logits[row])
                total -= y * math.log(math.exp(x) / whole)
            else:
                share = 1 / (1 + math.exp(-x))
                total -= y * math.log(share) + (1 - y) * math.log(1 - share)
        assert found[row] == pytest.approx(total, rel=1e-4)
    extreme = per_example_loss(kind, [[1.0, 0.0]], [[-1e4, 1e4]])
    assert np.isfinite(keras.ops.convert_to_numpy(extreme)).all()


def test_a_loss_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="`kind` must be one of 'softmax', 'sigmoid'"):
        per_example_loss("hinge", [[1.0, 0.0]], [[0.0, 0.0]])
