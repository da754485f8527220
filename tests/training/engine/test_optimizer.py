"""Schedule, optimizer and losses, against plain loops and PyTorch."""

import json
import math

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.training.engine.optimizer import (
    AdamW,
    WarmUpSchedule,
    average_share,
    freeze,
    layer_rate_scales,
    per_example_loss,
)


def plain_rate(step, peak, minimum, total, warmup, shape):
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return minimum + (peak - minimum) * left[shape]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule_is_a_plain_formula(shape, warmup):
    schedule = WarmUpSchedule(1e-3, 1e-5, 50, warmup, shape)
    again = WarmUpSchedule.from_config(schedule.get_config())
    for step in range(51):
        expected = plain_rate(step, 1e-3, 1e-5, 50, warmup, shape)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)
        assert float(again(step)) == float(schedule(step))
        assert schedule.value(step) == pytest.approx(expected, rel=1e-12)


def test_schedule_refuses_nonsense():
    with pytest.raises(ValueError, match="shape"):
        WarmUpSchedule(1e-3, 1e-5, 50, 0, "steps")
    with pytest.raises(ValueError, match="warmup_steps"):
        WarmUpSchedule(1e-3, 1e-5, 50, 51)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak": "a"}, "`peak` must be a number.*'a'"),
        ({"peak": -1e-3}, "`peak` must be a number at least 0"),
        ({"peak": float("nan")}, "`peak`"),
        ({"minimum": -1e-5}, "`minimum`"),
        ({"minimum": None}, "`minimum`"),
        ({"minimum": 1e-2}, "`minimum` must not be above `peak`.*minimum=0.01, peak=0.001"),
        ({"total_steps": 0}, "`total_steps` must be a whole number of at least 1"),
        ({"total_steps": 50.5}, "`total_steps`"),
        ({"warmup_steps": "a"}, "`warmup_steps`"),
        ({"warmup_steps": 2.5}, "`warmup_steps`"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"shape": ["cosine"]}, "`shape` must be one of 'cosine'"),
    ],
)
def test_schedule_refuses_values_of_another_kind(changes, message):
    with pytest.raises(ValueError, match=message):
        WarmUpSchedule(**{"peak": 1e-3, "minimum": 1e-5, "total_steps": 50, **changes})


def test_numpy_numbers_become_pythons():
    schedule = WarmUpSchedule(
        np.float64(1e-3), np.float32(0.0), np.int64(50), warmup_steps=np.int64(5)
    )
    optimizer = AdamW(
        schedule,
        weight_decay=np.float32(0.5),
        no_decay=tuple(np.array(["bias$"])),
        rate_scales={"a": np.float32(0.5)},
        gradients_are_summed=np.bool_(True),
        name="adam",
    )
    plain = AdamW(WarmUpSchedule(1e-3, 0.0, 50, 5), 0.5, ["bias$"], {"a": 0.5}, True, name="adam")
    assert json.dumps(optimizer.get_config()) == json.dumps(plain.get_config())


def test_a_constant_schedule_does_not_use_its_minimum():
    assert WarmUpSchedule(1e-3, 1e-2, 50, shape="constant").value(9) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -1}, "`weight_decay` must be a number at least 0.*weight_decay=-1"),
        ({"weight_decay": None}, "`weight_decay`"),
        ({"no_decay": "bias$"}, r"`no_decay` must be several.*\('bias\$',\)"),
        ({"no_decay": None}, "`no_decay`"),
        ({"no_decay": (3,)}, "`no_decay`.*3"),
        ({"no_decay": ("bias$", "(")}, r"`no_decay`.*'\(' is no regular expression: missing \)"),
        ({"rate_scales": {"a": -1}}, r"`rate_scales\['a'\]` must be a number at least 0"),
        ({"rate_scales": {"a": "b"}}, r"`rate_scales\['a'\]`"),
        ({"rate_scales": {3: 1.0}}, "`rate_scales`.*names of layers"),
        ({"rate_scales": "stem"}, "`rate_scales`.*names of layers"),
        ({"gradients_are_summed": "no"}, "`gradients_are_summed` must be True or False"),
    ],
)
def test_optimizer_refuses_nonsense_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**arguments)


@pytest.mark.parametrize(("names", "message"), [("bias", "several"), (["("], "regular expression")])
def test_excluded_names_are_checked_like_no_decay(names, message):
    with pytest.raises(ValueError, match=f"`var_names`.*{message}"):
        AdamW(weight_decay=0.1).exclude_from_weight_decay(var_names=names)


def plain_adamw(values, gradients, rate, decay, beta_1, beta_2, epsilon):
    """Loshchilov and Hutter's algorithm 2 with Keras's place of epsilon, in float64."""
    mean = square = np.zeros_like(values, "float64")
    for step, gradient in enumerate(gradients, 1):
        values = values - rate * decay * values
        mean = beta_1 * mean + (1 - beta_1) * gradient
        square = beta_2 * square + (1 - beta_2) * gradient**2
        size = rate * math.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        values = values - size * mean / (np.sqrt(square) + epsilon)
    return values


@pytest.mark.parametrize(
    "path, scale, decays",
    [("head/kernel", 1.0, True), ("head/bias", 1.0, False), ("stem/kernel", 0.25, True)],
)
def test_adamw_is_a_plain_loop(path, scale, decays):
    random = np.random.default_rng(0)
    start = random.normal(size=(3, 4)).astype("float32")
    gradients = random.normal(size=(5, 3, 4)).astype("float32")
    layer, name = path.split("/")
    with keras.name_scope(layer):
        variable = keras.Variable(start, name=name)
    assert variable.path == path
    optimizer = AdamW(1e-2, weight_decay=0.1, rate_scales={"stem": 0.25}, epsilon=1e-8)
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    rate, decay = 1e-2 * scale, 0.1 if decays else 0.0
    expected = plain_adamw(start, gradients, rate, decay, 0.9, 0.999, 1e-8)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), expected, atol=2e-6)
    again = AdamW.from_config(optimizer.get_config())
    assert (again.decay, again.rate_scales) == (0.1, {"stem": 0.25})


def _two_variables() -> dict[str, keras.Variable]:
    with keras.name_scope("head"):
        return {name: keras.Variable(np.ones(3, "float32"), name=name) for name in ("kernel", "w")}


@pytest.mark.parametrize(
    "excluded", [{"var_names": ["ern"]}, {"var_list": ["kernel"]}, {"var_names": ["x", "kernel"]}]
)
def test_what_is_excluded_does_not_decay(excluded):
    """As with Keras's own AdamW, whose gradients of zero leave the decay alone."""
    found = {}
    for kind in (AdamW, keras.optimizers.AdamW):
        variables = _two_variables()
        chosen = dict(excluded)
        if "var_list" in chosen:
            chosen["var_list"] = [variables[name] for name in chosen["var_list"]]
        optimizer = kind(0.5, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["w"])  # the next call replaces this one
        optimizer.exclude_from_weight_decay(**chosen)
        optimizer.build(list(variables.values()))
        for _ in range(2):
            zeros = [keras.ops.zeros(3) for _ in variables]
            optimizer.apply(zeros, list(variables.values()))
        found[kind] = {
            name: keras.ops.convert_to_numpy(v).tolist() for name, v in variables.items()
        }
    assert found[AdamW] == found[keras.optimizers.AdamW]
    assert found[AdamW] == {"kernel": [1.0] * 3, "w": [0.5625] * 3}


@pytest.mark.parametrize("pattern", ["^head/kernel$", "^kernel$"])
def test_names_to_exclude_are_found_in_names_and_paths(pattern):
    variables = _two_variables()
    optimizer = AdamW(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=[pattern])
    optimizer.build(list(variables.values()))
    assert optimizer._decays == [0.0, 0.5]


def test_it_is_too_late_to_exclude_from_a_built_optimizer():
    optimizer = AdamW(0.5, weight_decay=0.5)
    optimizer.build(list(_two_variables().values()))
    with pytest.raises(ValueError, match="Call it before the first step of training"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


@pytest.mark.parametrize(
    "architecture", ["tiny", "coatnet_rmlp_nano_rw_224", "coatnext_nano_rw_224"]
)
def test_what_decays_and_what_does_not(architecture, tiny):
    """Kernels decay, and nothing else does: biases, scales of norms and layers, tables."""
    config = tiny if architecture == "tiny" else architecture
    model = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=5)
    optimizer = AdamW(1e-3, weight_decay=0.1)
    optimizer.build(model.trainable_variables)
    kinds = {True: set(), False: set()}
    for variable, decay in zip(model.trainable_variables, optimizer._decays, strict=True):
        kinds[bool(decay)].add(variable.path.rpartition("/")[2])
    assert kinds[True] == {"kernel"}
    assert {"bias", "gamma", "beta"} <= kinds[False]
    assert ("table" in kinds[False]) == ("rmlp" not in architecture)
    assert ("scale" in kinds[False]) == ("coatnext" in architecture)


def test_layer_wise_rates_fall_from_head_to_stem(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    scales = layer_rate_scales(model, 0.5)
    names = [block.name for block in tiny.blocks()]
    for place, name in enumerate(reversed(names), 1):
        assert scales[name] == 0.5**place
    assert scales["stem_conv1"] == scales["stem_norm"] == 0.5 ** (len(names) + 1)
    assert scales["predictions"] == scales["hidden"] == scales["norm"] == 1.0
    assert set(layer_rate_scales(model, 1.0).values()) == {1.0}


def test_a_network_of_convnext_blocks_is_frozen_alike():
    config = keras_coatnet.CoAtNetConfig(
        (8, 16, 32, 64), (1, 1, 1, 1), stem_width=8, conv_block="convnext", stride_on="depthwise"
    )
    model = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=5)
    assert layer_rate_scales(model, 0.5)["stage1_block1"] == 0.5**4
    freeze(model, "stage2", batch_norm=True)
    layers = {variable.path.split("/")[0] for variable in model.trainable_variables}
    assert layers == {"stage3_block1", "stage4_block1", "norm", "hidden", "predictions"}


def test_freezing_leaves_the_rest_and_keeps_statistics(tiny):
    model = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    everything = len(model.trainable_variables)
    freeze(model, "none", batch_norm=True)
    paths = [variable.path for variable in model.trainable_variables]
    assert not any("_norm/" in path and "stage1" in path for path in paths)
    assert any("attention_norm/gamma" in path for path in paths)  # a LayerNorm
    assert 0 < len(paths) < everything
    freeze(model, "stage2", batch_norm=False)
    layers = {variable.path.split("/")[0] for variable in model.trainable_variables}
    assert {layer[:6] for layer in layers if layer.startswith("st")} == {"stage3", "stage4"}
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    before = [keras.ops.convert_to_numpy(variable) for variable in model.non_trainable_variables]
    model(pixels, training=True)
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


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


def test_the_average_starts_quickly_and_ends_slowly():
    assert float(average_share(0.9999, 0)) == pytest.approx(0.1)
    assert float(average_share(0.9999, 90)) == pytest.approx(0.91)
    assert float(average_share(0.9999, 10**7)) == pytest.approx(0.9999)


def test_parts_of_a_step_refuse_nonsense():
    model = keras_coatnet.CoAtNet(
        keras_coatnet.CoAtNetConfig((8, 8), (1, 1), ("C", "T"), stem_width=8, head_dim=8),
        input_shape=(32, 32, 3),
        classes=2,
    )
    with pytest.raises(ValueError, match="`decay` must be a number at least 0 and at most 1"):
        average_share(1.5, 0)
    with pytest.raises(ValueError, match="`decay` must be a number above 0"):
        layer_rate_scales(model, "a")
    with pytest.raises(ValueError, match="`up_to` must be one of 'none', 'stem', 'stage1'"):
        freeze(model, "head", batch_norm=False)
    with pytest.raises(ValueError, match="`batch_norm` must be True or False"):
        freeze(model, "none", batch_norm="no")
    with pytest.raises(ValueError, match="`kind` must be one of 'softmax', 'sigmoid'"):
        per_example_loss("hinge", [[1.0, 0.0]], [[0.0, 0.0]])
