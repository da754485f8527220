"""Models split over devices."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest

import keras_coatnet
from keras_coatnet.counting import memory
from keras_coatnet.counting.variables import variables
from keras_coatnet.training.engine import sharding
from tests.counting.configurations import MIXED, VARIANTS

# Eight devices are made out of the CPU before JAX starts, hence a process of its own.
SCRIPT = f"""
import json, sys
import numpy as np
import jax, keras, keras_coatnet
from keras_coatnet.training.engine import sharding
config = keras_coatnet.CoAtNetConfig(**{MIXED!r})
x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
y = np.arange(8) % 42
def train(start=None):
    keras.utils.set_random_seed(0)
    model = keras_coatnet.CoAtNet(config, input_shape=(32, 32, 3), classes=42)
    if start:
        model.set_weights(start)
    optimizer = keras.optimizers.AdamW(1e-3, use_ema=True)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    start = model.get_weights()
    return model, start, [float(model.train_on_batch(x, y)) for _ in range(4)]
def part(variable):
    return list(variable.value.addressable_shards[0].data.shape)
_, start, alone = train()
keras.distribution.set_distribution(sharding.model_parallel((2, 4), config))
model, _, split = train(start)
parts = {{v.path: part(v) for v in model.variables}}
followers = [v for v in model.optimizer.variables if v.shape]
print(json.dumps({{
    "alone": alone, "split": split, "parts": parts,
    "shapes": {{v.path: list(v.shape) for v in model.variables}},
    "followers": [int(np.prod(part(v))) for v in followers],
}}))
keras.distribution.set_distribution(sharding.data_parallel())
model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(42)])
model.compile("sgd", "mse")
model.fit(x / 255, np.zeros((8, 42)), verbose=0)
print(json.dumps(len(model.weights[0].value.addressable_shards)))
def refusal(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
print(json.dumps([
    refusal(sharding.data_parallel, ["gpu:0"]),
    refusal(sharding.model_parallel, (3, 2), config),
    refusal(sharding.model_parallel, (4,), config),
    refusal(sharding.model_parallel, (1, 8), "coatnet0"),
]))
"""


@pytest.fixture(scope="module")
def found() -> tuple[dict, int, list]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            # Compiled faster, to run slower: it is the compiling that takes time here.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(map(json.loads, done.stdout.splitlines()[-3:]))


def _config() -> keras_coatnet.CoAtNetConfig:
    return keras_coatnet.CoAtNetConfig(**MIXED)


pytestmark = pytest.mark.xdist_group("parallel")  # one process of eight devices, for all


@pytest.mark.slow
def test_a_split_model_trains_as_a_whole_one(found):
    split, devices, _ = found
    assert split["split"] == pytest.approx(split["alone"], abs=1e-4)
    assert split["split"][-1] < split["split"][0] - 0.1
    assert devices == 8  # of data parallelism


@pytest.mark.slow
def test_a_device_holds_its_part_of_every_large_variable(found):
    parts, shapes = found[0]["parts"], found[0]["shapes"]
    expected = {v.path: v for v in variables(_config(), (32, 32, 3), 42)}
    assert set(parts) == set(expected)
    for path, part in parts.items():
        assert tuple(shapes[path]) == expected[path].shape, path
        assert tuple(part) == expected[path].shard_shape(4), path
        whole = path.split("/")[-2].startswith("stem") or "shortcut" in path
        if math.prod(shapes[path]) >= 1000 and not whole:
            assert math.prod(part) * 4 == math.prod(shapes[path]), path
    assert parts["predictions/bias"] == [42]


@pytest.mark.slow
def test_the_worked_out_bytes_are_those_on_the_device(found):
    parts = found[0]["parts"]
    worked_out = memory.memory_per_device(_config(), (2, 4), (32, 32, 3), classes=42)
    assert worked_out.parameters == 4 * sum(map(math.prod, parts.values()))
    # Two moments and the average of each weight.
    assert worked_out.moments + worked_out.average == 4 * sum(found[0]["followers"])
    alone = memory.memory_per_device(_config(), (1, 1), (32, 32, 3), classes=42)
    assert worked_out.parameters < 0.35 * alone.parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, message",
    list(
        enumerate(
            [
                "`devices` must be among cpu:0, ",
                "for 8 devices in all. Received: shape=(3, 2)",
                "Received: shape=(4,)",
                "The 12 attention heads of stage3_block1 cannot be shared out evenly among 8",
            ]
        )
    ),
)
def test_what_does_not_divide_is_refused(found, place, message):
    assert message in found[2][place]


@pytest.mark.tensorflow_only
def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        sharding.data_parallel()
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        sharding.model_parallel((1, 1), "coatnet6")


def test_each_variable_has_the_rule_of_its_own_axis():
    for variant in VARIANTS.values():
        config = _config().replace(**variant)
        rules = sharding.split_axes(config)
        for variable in variables(config):
            found = [
                rule for pattern, rule in rules.items() if re.fullmatch(pattern, variable.path)
            ]
            axis = variable.split_axis
            # Keras wants one rule at most.
            assert found == ([] if axis is None else [(len(variable.shape), axis)]), variable.path
