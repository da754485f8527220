"""Our networks against timm's: with the same random values, both give the same logits.

Reduced networks run on every backend; the whole ones, as published, on TensorFlow. Nothing here
imports a backend of Keras.
"""

import dataclasses
import functools
import gc
import math
import os
import re
import sys

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.config import FREE_FIELDS, CoAtNetConfig
from keras_coatnet.counting.operations import count_params
from keras_coatnet.counting.variables import variables
from keras_coatnet.weights import foreign_files, timm_layout
from keras_coatnet.weights.assign import _fit as fit
from keras_coatnet.weights.assign import assign
from keras_coatnet.weights.registry import CHECKPOINTS
from tests import helpers, timm_models
from tests.helpers import CHOICES
from tests.timm_models import NAMES, SIZE

CHECKPOINT_NAMES = [name for name, c in CHECKPOINTS.items() if c.source == "timm"]


def tolerance(name):
    """The largest difference of logits in float32, which reach 4 to 12.

    Nothing in coatnet_bn_0_rw_224 scales activations back to 1, so its logits reach 40, and their
    rounding errors are larger still.
    """
    return 2e-4 if name == "coatnet_bn_0_rw_224" else 2e-5


def compute(model, images):
    return keras.ops.convert_to_numpy(helpers.call_layer(model, images, training=False))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One architecture's logits, timm's and ours."""

    name: str
    theirs: np.ndarray
    ours: np.ndarray

    @property
    def difference(self):
        return float(np.abs(self.theirs - self.ours).max())

    @property
    def agreement(self):
        return float((self.theirs.argmax(-1) == self.ours.argmax(-1)).mean())

    def check(self):
        assert 1 < np.abs(self.theirs).max() < 100  # a tolerance means little without a scale
        assert self.ours.shape == self.theirs.shape
        assert self.difference <= tolerance(self.name)
        assert self.agreement == 1

    def __str__(self):
        return f"{self.name:26} {self.difference:14.1e} {self.agreement:16.0%}"


# --- the same logits -------------------------------------------------------------------------


# Left out: when reduced, these are equal to others, as only their widths and depths differ.
AMONG_OTHERS = {
    *(f"coatnet_{number}_224" for number in range(1, 6)),
    "coatnet_rmlp_0_rw_224",
    "coatnet_rmlp_3_rw_224",
}
REDUCED = [name for name in NAMES if name not in AMONG_OTHERS]


def test_every_architecture_is_compared_reduced():
    compared = [timm_models.reduced_config(name) for name in REDUCED]
    for name in AMONG_OTHERS:
        assert timm_models.reduced_config(name) in compared, name


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_reduced_networks_give_timm_s_logits(name, tmp_path):
    theirs, config = timm_models.random_model(name, SIZE, small=True)
    path = timm_models.save(theirs, tmp_path / "model.safetensors")
    ours = keras_coatnet.CoAtNet(
        config, weights=path, include_preprocessing=False, classifier_activation=None
    )
    images = timm_models.images(4, SIZE)
    Comparison(name, timm_models.logits(theirs, images), compute(ours, images)).check()


@pytest.fixture
def report(tmp_path_factory, capsys):
    """Prints a comparison, and all of them once the last is in, captured or not.

    Two workers of pytest-xdist share a folder, and of their streams only stderr is shown.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def report(comparison):
        (folder / f"{comparison.name}.parity").write_text(str(comparison))
        paths = [folder / f"{name}.parity" for name in WHOLE]
        with capsys.disabled():
            print(f"\n{comparison}", file=sys.stderr)
            if all(path.exists() for path in paths):
                head = f"{'architecture':26} {'max difference':>14} {'top-1 agreement':>16}"
                print("", head, *(p.read_text() for p in paths), sep="\n", file=sys.stderr)

    return report


# The largest take 3 GB each while they are compared: one worker of pytest-xdist runs them all.
LARGE = ("coatnet_2_rw_224", "coatnet_rmlp_2_rw_224", "coatnet_rmlp_2_rw_384", "coatnet_3_rw_224")


# Those with published weights, and two of timm's versions of the paper's networks. The others have
# other widths and depths only; their configurations and variables are compared below.
WHOLE = [
    name
    for name in NAMES
    if name in ("coatnet_0_224", "coatnet_1_224", *(c.architecture for c in CHECKPOINTS.values()))
]


@pytest.mark.slow
@pytest.mark.tensorflow_only
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xdist_group("large") if name in LARGE else ())
        for name in WHOLE
    ],
)
def test_whole_networks_give_timm_s_logits(name, tmp_path, report):
    size = ARCHITECTURES[name].input_size
    # One image of 384 pixels costs what three of 224 do.
    images = timm_models.images(1 if size > 224 else 2, size)
    theirs = timm_models.random_model(name, size, num_classes=1000)
    path = timm_models.save(theirs, tmp_path / "model.safetensors")
    expected = timm_models.logits(theirs, images)
    del theirs
    gc.collect()  # models are in cycles, and two of these fill a gigabyte
    ours = keras_coatnet.CoAtNet(
        name, weights=path, include_preprocessing=False, classifier_activation=None
    )
    (tmp_path / "model.safetensors").unlink()  # pytest keeps the folders of three runs
    assert ours.input_shape == (None, size, size, 3)
    comparison = Comparison(name, expected, compute(ours, images))
    del ours
    gc.collect()
    report(comparison)
    comparison.check()


# --- every mistake changes the logits --------------------------------------------------------

# Another value of each field that has no list of choices and that files do not determine.
OTHER_NUMBERS = {
    "batch_norm_epsilon": 1e-3,
    "transformer_norm_epsilon": 1e-5,
    "expansion": 2,
    "head_dim": 16,
    "ffn_expansion": 2,
    "squeeze_ratio": 0.125,
    "stem_bias": True,
    "conv_prenorm_activation": False,
    "conv_bias": True,
    "attention_bias": False,
    "transformer_shortcut_bias": True,
    "ffn_bias": False,
    "layer_scale": 1.0,
    "conv_layer_scale": 1.0,
    "hidden_head": True,
}
# Fields that hardly change a logit of coatnet_0_rw_224, and why. The first is therefore compared
# with timm's modules below.
INVISIBLE = {
    "transformer_norm_epsilon": "1e-5 and 1e-6 beside a variance of about 1",
    "relative_position_hidden_dim": "it has a table",
    "pixel_mean": "preprocessing only",
    "pixel_std": "preprocessing only",
}
RIGHT = ARCHITECTURES["coatnet_0_rw_224"]
MISTAKES = [
    (field, value)
    for field, value in [
        *((field, value) for field, values in CHOICES.items() for value in values),
        *OTHER_NUMBERS.items(),
    ]
    if getattr(RIGHT, field) != value
]


@pytest.fixture(scope="module")
def right():
    """coatnet_0_rw_224, reduced: its configuration, its values, a batch and timm's logits."""
    theirs, config = timm_models.random_model(
        "coatnet_0_rw_224", SIZE, small=True, depths=(1, 1, 2, 1)
    )
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    images = timm_models.images(2, SIZE)
    return config, tensors, images, timm_models.logits(theirs, images)


def error_of(config, tensors, images, expected):
    """Largest difference to timm's logits; infinite if the values do not even fit."""
    inputs = {"include_preprocessing": False, "classifier_activation": None}
    model = keras_coatnet.CoAtNet(config, classes=timm_models.CLASSES, **inputs)
    values, unknown = timm_layout.translate(tensors, config.head_dim)
    assert not unknown
    try:
        assign(model, values, "the file")
    except ValueError:
        return np.inf
    return np.abs(compute(model, images) - expected).max()


def test_the_list_of_mistakes_is_complete():
    fields = {field.name for field in dataclasses.fields(CoAtNetConfig)}
    shapes = {"widths", "depths", "layout", "stem_width"}
    assert fields == {*CHOICES, *OTHER_NUMBERS, *INVISIBLE, *FREE_FIELDS, *shapes}
    assert {field for field, _ in MISTAKES} == {*CHOICES, *OTHER_NUMBERS}


@pytest.mark.slow
def test_the_right_configuration_gives_timm_s_logits(right):
    assert error_of(*right) <= tolerance("coatnet_0_rw_224")


@pytest.mark.slow
@pytest.mark.tensorflow_only  # one backend is enough
@pytest.mark.parametrize(("field", "value"), MISTAKES, ids=str)
def test_a_wrong_field_changes_the_logits(right, field, value):
    config, *rest = right
    if field in ("conv_block", "conv_layer_scale"):  # they only fit together
        with pytest.raises(ValueError, match=field):
            config.replace(**{field: value})
        return
    error = error_of(config.replace(**{field: value}), *rest)
    assert error < 1e-4 if field in INVISIBLE else error > 1e-4


@pytest.fixture(scope="module")
def right_convnext():
    """The same as `right`, for coatnext_nano_rw_224."""
    theirs, config = timm_models.random_model(
        "coatnext_nano_rw_224", SIZE, small=True, depths=(1, 1, 2, 1)
    )
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    images = timm_models.images(2, SIZE)
    return config, tensors, images, timm_models.logits(theirs, images)


@pytest.mark.tensorflow_only
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv_block": "mbconv", "conv_layer_scale": None},
        {"conv_layer_scale": None},
        {"conv_activation": "silu"},
        {"conv_bias": False},
        {"conv_padding": "same"},
        {"conv_pool": "max2"},
        {"stride_on": "pool"},
        {"expansion": 2},
        {"batch_norm_epsilon": 1e-2},
    ],
    ids=str,
)
def test_a_wrong_field_of_convnext_changes_the_logits(right_convnext, changes):
    config, *rest = right_convnext
    error = error_of(config.replace(**changes), *rest)
    assert error > 1e-4 if changes else error <= tolerance("coatnext_nano_rw_224")


def test_a_mirrored_table_changes_the_logits(right):
    config, tensors, *rest = right
    mirrored = {
        name: tensor[::-1] if name.endswith("bias_table") else tensor
        for name, tensor in tensors.items()
    }
    assert error_of(config, mirrored, *rest) > 1e-4


@pytest.mark.slow
def test_the_sign_of_offsets_changes_the_logits():
    """The same mistake, if an MLP computes the biases."""
    theirs, config = timm_models.random_model("coatnet_rmlp_1_rw_224", SIZE, small=True)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    turned = {
        name: -tensor if name.endswith("rel_pos.mlp.fc1.weight") else tensor
        for name, tensor in tensors.items()
    }
    images = timm_models.images(4, SIZE)
    expected = timm_models.logits(theirs, images)
    assert error_of(config, tensors, images, expected) <= tolerance("coatnet_rmlp_1_rw_224")
    assert error_of(config, turned, images, expected) > 1e-4


# --- the configurations, field by field ------------------------------------------------------

# timm's fields that have one value in all of these networks, which is what our code assumes.
ONE_VALUE = {
    "": {},
    "mbconv": {
        "kernel_size": 3,
        "group_size": 1,  # depthwise
        "padding": "",  # symmetric
        "attn_layer": "se",
        "norm_layer": "batchnorm2d",
    },
    "convnext": {"padding": "", "norm_layer": "layernorm2d"},
    "transformer_cfg": {
        "head_first": True,
        "attn_drop": 0.0,
        "proj_drop": 0.0,
        "window_size": None,
        "grid_size": None,
        "no_block_attn": False,
        "use_nchw_attn": False,
    },
}
# timm's fields that a CoAtNet does not read at inference.
WITHOUT_MEANING = {
    "": {"weight_init"},
    "mbconv": {"init_values", "norm_layer_cl"},  # ConvNeXt blocks only
    "convnext": {
        *("expand_output", "kernel_size", "group_size", "pre_norm_act", "norm_layer_cl"),
        *("pool_type", "attn_early", "attn_layer", "attn_act_layer", "attn_ratio"),
    },
    "transformer_cfg": {"partition_ratio", "norm_layer_cl"},  # MaxViT's windows only
}
ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "relu": "relu"}  # timm's "gelu" is by erf
POOLS = {"avg2": "avg2", "max": "max3", "max2": "max2"}
LAYOUTS = {"C": "C", "T": "T", ("C", "T"): "CT"}
STRIDES = {"pool": "pool", "dw": "depthwise", "1x1": "expansion"}
NORMS = {"layernorm2d": "layer", "batchnorm2d": "batch"}
POSITIONS = {"bias": "table", "mlp": "mlp"}


class Reader:
    """One of timm's configurations, which records the fields that were read."""

    def __init__(self, section, cfg):
        self.cfg, self.unread = cfg, {field.name for field in dataclasses.fields(cfg)}
        self.unread -= WITHOUT_MEANING[section]
        for field, value in ONE_VALUE[section].items():
            assert self(field) == value, field

    def __call__(self, field):
        self.unread.discard(field)
        return getattr(self.cfg, field)


def mbconv_fields(conv):
    by_output = conv("expand_output")
    return {
        "expansion_from": "output" if by_output else "input",
        "conv_pool": POOLS[conv("pool_type")],
        "conv_prenorm_activation": conv("pre_norm_act"),
        "conv_layer_scale": None,
        "squeeze_ratio": conv("attn_ratio"),
        "squeeze_from": "output" if by_output else "expanded",
        "squeeze_activation": ACTIVATIONS[conv("attn_act_layer")],
        "squeeze_place": "before_norm" if conv("attn_early") else "after_norm",
    }


def convnext_fields(conv):
    """timm's block widens its output by the factor, and pools its shortcut by means, always."""
    return {
        "expansion_from": "output",
        "conv_pool": "avg2",
        "conv_layer_scale": conv("init_values"),
    }


# Fields that ConvNeXt blocks do not use.
OF_MBCONV = {
    *("conv_prenorm_activation", "squeeze_ratio", "squeeze_from"),
    *("squeeze_activation", "squeeze_place"),
}


def configuration_of(cfg):
    """Translates timm's configuration to ours, without the fields of a checkpoint."""
    whole = Reader("", cfg)
    block = whole("conv_cfg").block_type
    conv = Reader(block, whole("conv_cfg"))
    transformer = Reader("transformer_cfg", whole("transformer_cfg"))
    hidden = whole("head_hidden_size")
    assert hidden in (None, whole("embed_dim")[-1])
    expansions = {conv("expand_ratio"), transformer("expand_ratio")}
    assert all(ratio == int(ratio) for ratio in expansions)
    layout = tuple(LAYOUTS[kinds] for kinds in whole("block_type"))
    fields = {
        **(mbconv_fields(conv) if block == "mbconv" else convnext_fields(conv)),
        "conv_block": conv("block_type"),
        "layout": layout,
        **timm_models.stages(layout, whole("embed_dim"), whole("depths")),
        "stem_width": whole("stem_width"),
        "stem_bias": whole("stem_bias"),
        "hidden_head": hidden is not None,
        # timm's NormMlpClassifierHead pools and then normalizes; its ClassifierHead has no norm,
        # and one stands before it.
        "final_norm": "before_pool" if hidden is None else "after_pool",
        "expansion": int(conv("expand_ratio")),
        "stride_on": STRIDES[conv("stride_mode")],
        "conv_stride_pool": POOLS[conv("downsample_pool_type")],
        "conv_padding": "symmetric",
        "conv_activation": ACTIVATIONS[conv("act_layer")],
        "conv_bias": conv("output_bias"),
        "batch_norm_epsilon": conv("norm_eps"),
        "batch_norm_momentum": 0.9,  # torch's default of 0.1 is the share of the new batch
        "head_dim": transformer("dim_head"),
        "attention_from": "output" if transformer("expand_first") else "input",
        "attention_bias": transformer("attn_bias"),
        "relative_position": POSITIONS[transformer("rel_pos_type")],
        "relative_position_hidden_dim": transformer("rel_pos_dim"),
        "transformer_pool": POOLS[transformer("pool_type")],
        "transformer_norm": NORMS[transformer("norm_layer")],
        "transformer_norm_epsilon": transformer("norm_eps"),
        "transformer_shortcut_bias": transformer("shortcut_bias"),
        "ffn_expansion": int(transformer("expand_ratio")),
        "ffn_activation": ACTIVATIONS[transformer("act_layer")],
        "ffn_bias": True,
        "layer_scale": transformer("init_values"),
        "stochastic_depth": 0.0,
    }
    unread = whole.unread | conv.unread | transformer.unread
    assert not unread, f"timm has fields that this test does not know: {unread}"
    return fields


def timm_configuration(name):
    maxxvit = timm_models.import_timm().models.maxxvit
    return maxxvit.model_cfgs[name.rsplit("_", 1)[0]]


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_timm_s_field_by_field(name):
    expected = configuration_of(timm_configuration(name))
    of_checkpoint = {"input_size", "pixel_mean", "pixel_std"}
    ours = ARCHITECTURES[name]
    without_meaning = OF_MBCONV if ours.conv_block == "convnext" else set()
    fields = {f.name for f in dataclasses.fields(CoAtNetConfig)}
    assert {*expected, *of_checkpoint} == fields - without_meaning
    # Built anew, so that both have gone through the same normalization (a stem's pair of widths).
    theirs = CoAtNetConfig(**{**ours.to_dict(), **expected})
    for field in expected:
        assert getattr(ours, field) == getattr(theirs, field), field

    default = timm_models.import_timm().get_pretrained_cfg(name)
    assert (3, ours.input_size, ours.input_size) == default.input_size
    assert (ours.pixel_mean, ours.pixel_std) == (default.mean, default.std)


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_epsilons_and_momenta_are_those_of_timm_s_modules(name):
    import torch

    model, config = timm_models.reduced(name)
    conv, transformer = config.batch_norm_epsilon, config.transformer_norm_epsilon
    # The stem and blocks of convolution are convolutional; those of attention, and the end, not.
    kinds = {block.name: block.kind for block in config.blocks()}
    met = set()
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.LayerNorm | torch.nn.modules.batchnorm._BatchNorm):
            continue
        part = "conv" if path.startswith("stem.") else "transformer"
        if match := re.match(r"stages\.(\d)\.blocks\.(\d)\.", path):
            kind = kinds[f"stage{int(match[1]) + 1}_block{int(match[2]) + 1}"]
            part = "conv" if kind == "C" else "transformer"
        final = path in ("norm", "head.norm")
        met.add((part, final))
        assert module.eps == (conv if part == "conv" else transformer), path
        batch = not isinstance(module, torch.nn.LayerNorm)
        norm = config.conv_norm if part == "conv" else config.transformer_norm
        assert batch == (norm == "batch"), path
        if batch:
            assert module.momentum == pytest.approx(1 - config.batch_norm_momentum), path
    assert met == {("conv", False), ("transformer", False), ("transformer", True)}

    ours = keras_coatnet.CoAtNet(config, classes=timm_models.CLASSES)
    for layer in ours._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization | keras.layers.LayerNormalization):
            convolutional = kinds.get(layer.path.partition("/")[0], "C") == "C"
            convolutional &= layer.path != "norm"
            assert layer.epsilon == (conv if convolutional else transformer), layer.path


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_the_registry_says_what_timm_says_of_a_checkpoint(name):
    ours, theirs = CHECKPOINTS[name], timm_models.import_timm().get_pretrained_cfg(name)
    assert ours.architecture == theirs.architecture
    # timm's entry has the account only. The hub's client adds the model's name.
    assert ours.repo in (theirs.hf_hub_id, f"{theirs.hf_hub_id}{name}")
    assert ours.classes == theirs.num_classes
    assert (3, ours.input_size, ours.input_size) == theirs.input_size
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)
    assert ours.interpolation == theirs.interpolation
    assert (ours.crop_pct, ours.crop_mode) == (theirs.crop_pct, theirs.crop_mode)
    assert ours.license == theirs.license
    # A checkpoint is loaded with the normalization of its architecture.
    architecture = ARCHITECTURES[ours.architecture]
    assert (architecture.pixel_mean, architecture.pixel_std) == (ours.mean, ours.std)


def test_the_registry_has_every_coatnet_that_timm_has():
    timm = timm_models.import_timm()
    assert sorted(timm.list_models("coatn*", pretrained=True)) == sorted(CHECKPOINT_NAMES)
    assert sorted(timm.list_models("coatn*")) == sorted(NAMES)


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_the_registry_counts_timm_s_parameters(name):
    timm = timm_models.import_timm()
    import torch

    with torch.device("meta"):  # shapes only
        model = timm.create_model(
            CHECKPOINTS[name].architecture, num_classes=CHECKPOINTS[name].classes
        )
    assert sum(p.numel() for p in model.parameters()) == CHECKPOINTS[name].parameters


@functools.cache
def shapes_of(name):
    """timm's whole network: its number of parameters, and zeros that take no memory."""
    timm = timm_models.import_timm()
    import torch

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    tensors = {
        key: np.broadcast_to(np.float32(0), tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
    }
    return sum(p.numel() for p in model.parameters()), tensors


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_timm_s_variables(name):
    """Of whole networks: as many parameters, of the shapes that timm's have in our layout."""
    size = ARCHITECTURES[name].input_size
    parameters, tensors = shapes_of(name)
    assert parameters == count_params(name, (size, size, 3))
    values, unknown = timm_layout.translate(tensors, ARCHITECTURES[name].head_dim)
    assert not unknown
    expected = {v.path: v.shape for v in variables(ARCHITECTURES[name], (size, size, 3))}
    assert set(values) == set(expected)
    for path, shape in expected.items():
        fitted = fit(values[path], shape, path)
        assert fitted is not None and fitted.shape == shape, path
        assert values[path].size == math.prod(shape), path  # a table is not resized


@pytest.mark.slow
def test_files_determine_their_architecture():
    """Of all architectures, only those with the same variables and outputs fit timm's names."""
    for name in NAMES:
        _, tensors = shapes_of(name)
        shown = foreign_files.LAYOUTS[".safetensors"].describe(tensors)
        fitting = [
            known
            for known, config in ARCHITECTURES.items()
            if all(getattr(config, field) == value for field, value in shown.items())
        ]
        others = [
            other for other in fitting if not ARCHITECTURES[other].same_network(ARCHITECTURES[name])
        ]
        assert name in fitting and not others, f"{name}: also taken for {others}"
