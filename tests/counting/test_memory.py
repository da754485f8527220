"""The memory that a training step needs, compared with measurements."""

import pytest

import keras_coatnet
from keras_coatnet.counting import memory


@pytest.mark.parametrize("name", ["coatnet6", "coatnet7"])
def test_memory_of_the_largest_networks(name):
    weights = 4 * keras_coatnet.count_params(name)
    alone = memory.memory_per_device(name)
    assert alone.gradients == alone.average == weights and alone.moments == 2 * weights
    assert alone.copies == weights // 2
    assert 0 < alone.parameters - weights < 0.001 * weights
    split = memory.memory_per_device(name, (2, 4))
    for field in ("parameters", "gradients", "moments", "average", "copies"):
        assert 0.25 < getattr(split, field) / getattr(alone, field) < 0.26, field
    assert 0.25 < split.activations / alone.activations < 0.6
    assert split.rematerialized < 0.3 * split.activations
    assert split.total(remat=True) - split.rematerialized == sum(
        (split.parameters, split.gradients, split.moments, split.average, split.copies)
    )


def test_memory_follows_its_arguments():
    whole = memory.memory_per_device("coatnet0", dtype_policy="float32", use_ema=False)
    assert whole.copies == whole.average == 0
    half = memory.memory_per_device("coatnet0", batch_per_device=4)
    assert 0.24 < half.activations / whole.activations < 0.3  # logits stay float32
    # Measured at batch 8 on CPUs, with a GELU of several operations as on GPUs: TensorFlow's step
    # took 2,007 MiB more than the model, and 711 MiB more with rematerialization.
    assert whole.activations / 2**20 == pytest.approx(2007, rel=0.25)
    assert whole.rematerialized / 2**20 == pytest.approx(711, rel=0.25)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dtype_policy": "int8"}, "'float32', 'mixed_bfloat16'.*dtype_policy='int8'"),
        ({"architecture": "coatnet9"}, "architectures"),
        ({"shape": (1, 8)}, "The 12 attention heads of stage3_block9 .* 8 devices"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        memory.memory_per_device(**{"architecture": "coatnet6", **wrong})
