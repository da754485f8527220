"""The optimizer, against a plain loop and Keras's own."""

import json
import math

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.engine.schedule import WarmUpSchedule


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -1}, "`weight_decay` must be a number at least 0.*weight_decay=-1"),
        ({"weight_decay": None}, "`weight_decay`"),
        ({"no_decay": "bias$"}, r"`no_decay` must be several.*\('bias\$',\)"),
        ({"no_decay": None}, "`no_decay`"),
        ({"no_decay": (3,)}, "`no_decay`.*3"),
        ({"no_decay": ("bias$", "(")}, r"`no_decay`.*'\(' is not a regular expression: missing \)"),
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


@pytest.mark.slow
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
