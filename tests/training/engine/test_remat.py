"""A rematerialized model trains as the plain one does, in less memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections.abc import Sequence

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.training.engine.remat import remat
from tests.helpers import seedless, to_numpy

# Both kinds of block, with and without stride and shortcut; samples are dropped half the time.
CONFIG = keras_coatnet.CoAtNetConfig(
    widths=(16, 24, 32, 32),
    depths=(1, 2, 2, 1),
    stem_width=8,
    head_dim=8,
    stochastic_depth=0.5,
    batch_norm_momentum=0.5,
)
IMAGES = np.random.default_rng(0).uniform(0, 255, (8, 48, 48, 3)).astype("float32")
LABELS = np.arange(8) % 4


def _build(rematerialized: bool, config=CONFIG) -> keras_coatnet.CoAtNetModel:
    keras.utils.set_random_seed(0)
    model = keras_coatnet.CoAtNet(config, input_shape=(48, 48, 3), classes=4)
    if rematerialized:
        assert remat(model) == len(list(config.blocks()))
    return model


def _train(model: keras.Model, steps: int = 3, **options) -> list[float]:
    # Gradients of plain SGD show at once in the weights, where Adam would hide their scale.
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", **options)
    return [float(model.train_on_batch(IMAGES, LABELS)) for _ in range(steps)]


def _assert_same_variables(model, plain, allowed: float) -> None:
    assert len(model.variables) == len(plain.variables)
    for one, other in zip(model.variables, plain.variables, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=allowed, err_msg=one.path)


@pytest.mark.slow
def test_losses_weights_statistics_and_draws_are_the_same():
    plain, model = _build(False), _build(True)
    weights = [to_numpy(variable) for variable in seedless(plain.variables)]
    losses = _train(plain)
    assert _train(model) == pytest.approx(losses, abs=2e-6)
    _assert_same_variables(model, plain, allowed=2e-6)
    moved = [
        np.abs(to_numpy(variable) - before).max() > 1e-5
        for variable, before in zip(seedless(plain.variables), weights, strict=True)
    ]
    assert np.mean(moved) > 0.7  # else the comparison would say nothing
    seeds = [v for v in model.variables if v.path.endswith("seed_generator_state")]
    assert len(seeds) == 2 * 3 + 2
    assert all(to_numpy(seed)[1] == 3 for seed in seeds)  # one draw a step, not two


@pytest.mark.slow
def test_convnext_blocks_are_the_same_too():
    config = CONFIG.replace(
        conv_block="convnext", conv_layer_scale=0.1, stride_on="depthwise", widths=(16, 32, 32, 32)
    )
    plain, model = _build(False, config), _build(True, config)
    assert _train(model, 2) == pytest.approx(_train(plain, 2), abs=2e-6)
    _assert_same_variables(model, plain, allowed=2e-6)


@pytest.mark.slow
@pytest.mark.tensorflow_only
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_operation_by_operation_not_one_bit_changes(policy):
    # In a graph half precision differs by what TensorFlow fuses, and hides a wrong cast.
    keras.config.set_dtype_policy(policy)
    plain, model = _build(False), _build(True)
    options = {"run_eagerly": True, "jit_compile": False}
    assert _train(model, 2, **options) == _train(plain, 2, **options)
    _assert_same_variables(model, plain, allowed=0)


@pytest.mark.tensorflow_only
@pytest.mark.slow
def test_under_xla():
    small = CONFIG.replace(widths=(16, 16), depths=(1, 1), layout=("C", "T"))
    plain, model = _build(False, small), _build(True, small)
    losses = _train(plain, 2, jit_compile=True)
    assert _train(model, 2, jit_compile=True) == pytest.approx(losses, abs=2e-6)


@pytest.mark.slow
def test_frozen_layers_stay_and_the_others_learn_the_same():
    models = _build(False), _build(True)
    for model in models:
        for name in ("stage1_block1", "stage3_block1"):
            model.get_layer(name).trainable = False
        model.get_layer("stage2_block2").expand_norm.trainable = False
    frozen = to_numpy(models[1].get_layer("stage1_block1").expand.kernel)
    statistics = to_numpy(models[1].get_layer("stage2_block2").expand_norm.moving_mean)
    losses = [_train(model) for model in models]
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)
    _assert_same_variables(models[1], models[0], allowed=2e-6)
    block = models[1].get_layer("stage2_block2")
    np.testing.assert_array_equal(
        to_numpy(models[1].get_layer("stage1_block1").expand.kernel), frozen
    )
    np.testing.assert_array_equal(to_numpy(block.expand_norm.moving_mean), statistics)


@pytest.mark.slow
def test_inference_files_and_configuration_do_not_change(tmp_path):
    plain, model = _build(False), _build(True)
    assert [v.path for v in seedless(model.variables)] == [
        v.path for v in seedless(plain.variables)
    ]
    configs = ([layer.get_config() for layer in one.layers[1:]] for one in (model, plain))
    assert next(configs) == next(configs)
    _train(model, 1)
    expected = model.predict(IMAGES, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(plain.predict(IMAGES, verbose=0), expected, atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(IMAGES, verbose=0), expected, atol=1e-6)


@pytest.mark.slow
def test_telling_twice_is_telling_once():
    once, twice = _build(True), _build(True)
    remat(twice)
    for one, other in zip(once.layers, twice.layers, strict=True):
        # The block's own function, not one that computes it twice, is what is computed twice.
        if isinstance(one.call, type(once.get_layer("stage2_block1").call)):
            assert type(other.call._call) is type(one.call._call) is types.MethodType


def test_a_model_without_blocks_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="mine")
    with pytest.raises(ValueError, match="'mine' has no MBConv"):
        remat(model)


@pytest.mark.parametrize(
    "wrong", [None, "coatnet0", keras_coatnet.CoAtNetConfig((8,), (1,), ("C",))]
)
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(ValueError, match=f"must be a Keras model.*{type(wrong).__name__}"):
        remat(wrong)


# --- What a step keeps -----------------------------------------------------------------------


def _kept_by_tensorflow(model: keras.Model, batch: int) -> dict[str, tuple[int, ...]]:
    """The results of the forward pass that the backward pass reads: name and shape of each.

    Read off the traced step, before a kernel runs: neither the processor nor malloc decides them.
    """
    import tensorflow as tf

    forward = set()

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        forward.update(op.name for op in tf.compat.v1.get_default_graph().get_operations())
        return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    images = tf.TensorSpec((batch, *model.input_shape[1:]), tf.float32)
    graph = tf.function(step).get_concrete_function(images).graph
    kept = {}
    for op in graph.get_operations():
        for tensor in op.inputs if op.name not in forward else ():
            # An identity shares its input's memory.
            while tensor.op.type in ("Identity", "IdentityN"):
                tensor = tensor.op.inputs[tensor.value_index]
            # Variables are there in any case. Shapes are unknown where a kernel may keep notes.
            weight = tensor.dtype == tf.resource or tensor.op.type == "ReadVariableOp"
            if tensor.op.name in forward and not weight and tensor.shape.is_fully_defined():
                kept[tensor.name] = tuple(tensor.shape)
    return kept


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_a_step_on_tensorflow_keeps_one_tensor_for_each_block_its_input():
    plain, model = _build(False), _build(True)
    blocks = [block.name for block in CONFIG.blocks()]
    kept, kept_plain = _kept_by_tensorflow(model, 8), _kept_by_tensorflow(plain, 8)
    inside = {name: [] for name in blocks}
    for tensor, shape in kept.items():
        for name in blocks:
            if f"/{name}" in tensor:
                inside[name].append(shape)
    # The output of one block is the input of the next; the last one's is averaged at once.
    outputs = {name: [(8, *model.get_layer(name).output.shape[1:])] for name in blocks[:-1]}
    assert inside == {**outputs, blocks[-1]: []}
    # Of the stem and the head all is kept, as in the plain model.
    assert _size(kept) - _size(kept, blocks) == _size(kept_plain) - _size(kept_plain, blocks)
    assert _size(kept) < 0.25 * _size(kept_plain)  # 351,340 of 1,473,679 numbers


def _size(kept: dict[str, tuple[int, ...]], layers: Sequence[str] = ("",)) -> int:
    """How many numbers the tensors of these layers have."""
    return sum(
        math.prod(shape)
        for tensor, shape in kept.items()
        if any(f"/{name}" in tensor for name in layers)
    )


# --- In processes of their own ---------------------------------------------------------------

_START = """
import json, os, sys
import numpy as np
"""
_MODEL = """
import keras, keras_coatnet
from keras_coatnet.training.engine.remat import remat
def build(rematerialized, size, classes=4, **changes):
    keras.utils.set_random_seed(0)
    fields = dict(widths=(16, 32), depths=(2, 2), layout=("C", "T"), stem_width=8, head_dim=8)
    config = keras_coatnet.CoAtNetConfig(**{**fields, **changes})
    model = keras_coatnet.CoAtNet(config, input_shape=(size, size, 3), classes=classes)
    if rematerialized:
        remat(model)
    return model
"""

MIRRORED = f"""{_START}
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
{_MODEL}
x = np.random.default_rng(0).uniform(0, 255, (16, 32, 32, 3)).astype("float32")
data = tf.data.Dataset.from_tensor_slices((x, np.arange(16) % 4)).batch(8)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = build(int(sys.argv[1]), 32, depths=(1, 1), stochastic_depth=0.5)
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
losses = model.fit(data, epochs=2, shuffle=False, verbose=0).history["loss"]
sums = [float(np.abs(np.array(v)).sum()) for v in model.variables]
print(json.dumps([losses, sums]))
"""

# What JAX keeps for the gradients. XLA for CPUs merges the second computation with the first again,
# so that its own figures do not show it.
KEPT = f"""{_START}
os.environ["KERAS_BACKEND"] = "jax"
import jax
{_MODEL}
model = build(
    int(sys.argv[1]), 64, widths=(16, 32), depths=(1, 1),
    stochastic_depth=0.5,
)
learnt = [v.value for v in model.trainable_variables]
state = [v.value for v in model.non_trainable_variables]
def loss(learnt, x):
    y, _ = model.stateless_call(learnt, state, x, training=True)
    return keras.ops.mean(keras.ops.square(y))
x = jax.ShapeDtypeStruct((16, 64, 64, 3), "float32")
kept = jax.eval_shape(lambda learnt, x: jax.vjp(lambda v: loss(v, x), learnt)[1], learnt, x)
kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(kept))
print(json.dumps(kept))
"""


def _run(script: str, *arguments: int) -> list:
    """What the script prints, for each of these arguments; a process each, side by side."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(argument)], **pipes)
        for argument in arguments
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.tensorflow_only
@pytest.mark.slow
def test_under_a_strategy_of_two_replicas():
    # A process each: TensorFlow remembers the shapes of the first model's exchanges.
    (plain_losses, plain_sums), (losses, sums) = _run(MIRRORED, 0, 1)
    assert losses == pytest.approx(plain_losses, abs=2e-6)
    assert sums == pytest.approx(plain_sums, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_step_on_jax_keeps_less():
    plain, model = _run(KEPT, 0, 1)
    assert model < 0.4 * plain
