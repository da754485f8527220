"""`fuse`: the same outputs, in fewer operations, for every architecture there is."""

import logging
import re

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.architectures import find_architecture
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.layers.activations import compile_activation
from keras_coatnet.layers.fused import FusedAttention, FusedPointwiseConv2D
from tests import helpers

SHAPE = (72, 64, 3)  # not square, and odd from the third stage on
SMALL = {"widths": (16, 24, 32, 64), "depths": (1, 2, 2, 1), "stem_width": 8, "head_dim": 8}
CONVNEXT = {"conv_block": "convnext", "stride_on": "depthwise", "widths": (16, 32, 32, 64)}
# Of the paper's networks one for each place of the stride; the others differ in size only.
NETWORKS = [
    name
    for name in keras_coatnet.architectures()
    if name in ("coatnet0", "coatnet0_dw")
    or (
        name.startswith(("coatnet_", "coatnext_", "kecam"))
        and not re.match("coatnet_[2-5]_2", name)
    )
]


def small(name: str) -> CoAtNetConfig:
    """An architecture with few and narrow blocks."""
    config = find_architecture(name)
    if config.conv_block == "convnext":
        return config.replace(**{**SMALL, "widths": CONVNEXT["widths"]})
    if "CT" in config.layout:
        stages = {"widths": (16, 24, (32, 32), (64, 64)), "depths": (1, 2, (1, 1), (1, 1))}
        return config.replace(**{**SMALL, **stages})
    return config.replace(**SMALL)


def build(config: CoAtNetConfig, **options) -> keras_coatnet.CoAtNetModel:
    """A model in which every variable has a value of its own, so that none can be forgotten."""
    model = keras_coatnet.CoAtNet(config, **{"input_shape": SHAPE, **options})
    random = np.random.default_rng(0)
    for variable in model.weights:
        kind, shape = variable.path.rpartition("/")[2], variable.shape
        if kind == "kernel":
            value = random.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        elif kind == "moving_variance":
            value = random.uniform(0.5, 2, shape)
        else:  # also negative scales: they show what does not commute with a maximum
            value = random.uniform(-1.5, 1.5, shape)
        variable.assign(value)
    return model


def outputs(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(helpers.call_layer(model, images, training=False))


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (2, *SHAPE)).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head"),
    [(name, "logits") for name in NETWORKS]
    # The ends are of three kinds, which these have.
    + [
        (name, head)
        for name in ("coatnet0", "coatnet_bn_0_rw_224", "coatnet_0_rw_224")
        for head in ("probabilities", "map", "avg", "max")
    ],
)
def test_outputs_are_the_same(name, head, photographs):
    options = {
        "logits": {"classifier_activation": None, "classes": 7},
        "probabilities": {"classes": 7},
        "map": {"include_top": False},
        "avg": {"include_top": False, "pooling": "avg"},
        "max": {"include_top": False, "pooling": "max"},
    }[head]
    model = build(small(name), **options)
    expected, found = outputs(model, photographs), outputs(keras_coatnet.fuse(model), photographs)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"stride_on": "pool", "conv_stride_pool": "max2"},
        {"stride_on": "pool", "conv_stride_pool": "avg2"},
        {"transformer_pool": "avg2"},
        {"transformer_norm": "batch", "transformer_pool": "avg2"},
        {"conv_prenorm_activation": True},
        {"squeeze_place": "before_norm"},
        {"layer_scale": 0.1},
        {"hidden_head": False, "final_norm": None},
        {"attention_bias": False, "ffn_bias": False, "conv_bias": False, "stem_bias": False},
        {"layout": ("C", "C", "C", "C")},
        {"layout": ("C", "T", "T", "T")},
        {**CONVNEXT, "conv_padding": "symmetric"},
        {**CONVNEXT, "conv_layer_scale": 0.1, "conv_bias": False},
        {**CONVNEXT, "stride_on": "pool", "conv_stride_pool": "max2"},
    ],
    ids=str,
)
def test_each_switch_by_itself(changes, photographs):
    config = CoAtNetConfig(**SMALL).replace(**changes)
    model = build(config, classifier_activation=None, classes=7)
    expected = outputs(model, photographs)
    found = outputs(keras_coatnet.fuse(model), photographs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.slow
def test_norms_are_gone(photographs):
    """All of the paper's BatchNorms, and the scale and shift of all LayerNorms but the strided."""
    model = build(CoAtNetConfig(**SMALL))
    fused = keras_coatnet.fuse(model)
    kinds = [type(layer) for layer in fused.layers]
    assert not any(issubclass(kind, keras.layers.BatchNormalization) for kind in kinds)
    kept = [
        layer.name
        for layer in fused.layers
        if isinstance(layer, keras.layers.LayerNormalization) and layer.weights
    ]
    assert kept == ["stage3_block1_attention_norm", "stage4_block1_attention_norm"]
    assert kinds.count(FusedAttention) == 3 and kinds.count(FusedPointwiseConv2D) > 0
    assert not any("moving" in variable.path for variable in fused.weights)


@pytest.mark.slow
def test_the_original_is_left_alone(photographs):
    model = build(CoAtNetConfig(**SMALL))
    before = model.get_weights()
    fused = keras_coatnet.fuse(model)
    expected = outputs(fused, photographs)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for variable in model.weights:
        variable.assign(keras.ops.zeros_like(variable))
    np.testing.assert_array_equal(outputs(fused, photographs), expected)


@pytest.mark.slow
def test_it_saves_and_loads(tmp_path, photographs):
    fused = keras_coatnet.fuse(build(CoAtNetConfig(**SMALL)))
    fused.save(tmp_path / "fused.keras")
    again = keras.saving.load_model(tmp_path / "fused.keras")
    np.testing.assert_array_equal(outputs(again, photographs), outputs(fused, photographs))
    fused.save_weights(tmp_path / "fused.weights.h5")
    other = keras_coatnet.fuse(keras_coatnet.CoAtNet(CoAtNetConfig(**SMALL), input_shape=SHAPE))
    other.load_weights(tmp_path / "fused.weights.h5")
    np.testing.assert_array_equal(outputs(other, photographs), outputs(fused, photographs))


@pytest.mark.slow
@pytest.mark.tensorflow_only
@pytest.mark.parametrize("jit_compile", [True, False])
def test_it_exports_with_any_batch(jit_compile, tmp_path, photographs):
    import tensorflow as tf

    fused = keras_coatnet.fuse(build(CoAtNetConfig(**SMALL)), jit_compile)
    fused.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    for images in (photographs, photographs[:1]):
        np.testing.assert_allclose(served.serve(images).numpy(), outputs(fused, images), atol=1e-6)
    functions = served.serve.concrete_functions[0].graph.as_graph_def().library.function
    assert any(each.attr["_XlaMustCompile"].b for each in functions) == jit_compile


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_with_or_without_xla_it_is_the_same(tmp_path, photographs):
    model = build(CoAtNetConfig(**SMALL), classifier_activation=None, classes=7)
    one, other = (keras_coatnet.fuse(model, jit_compile) for jit_compile in (True, False))
    expected = outputs(other, photographs)
    np.testing.assert_allclose(
        outputs(one, photographs), expected, atol=1e-6 * np.abs(expected).max()
    )
    other.save(tmp_path / "plain.keras")
    again = keras.saving.load_model(tmp_path / "plain.keras")
    assert not again.get_layer("stage1_block1_activation").jit_compile


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_it_converts_to_litert(tmp_path, photographs):
    import tensorflow as tf

    fused = keras_coatnet.fuse(build(CoAtNetConfig(**SMALL)))
    fused.export(tmp_path / "served", verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "served"))
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], photographs.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], photographs)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(found, outputs(fused, photographs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_heap")
def test_it_quantizes(tmp_path, photographs):
    # Keras quantizes a layer at a time, each for a second: one block a stage is enough.
    config = CoAtNetConfig(**SMALL).replace(depths=(1, 1, 1, 1))
    model = build(config, classifier_activation=None, classes=7)
    fused = keras_coatnet.fuse(model)
    expected = outputs(fused, photographs)
    fused.quantize("int8")
    found = outputs(fused, photographs)
    assert any("int8" in variable.dtype for variable in fused.variables)
    assert 0 < np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
    fused.save(tmp_path / "quantized.keras")
    again = keras.saving.load_model(tmp_path / "quantized.keras")
    np.testing.assert_allclose(outputs(again, photographs), found, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_stays_as_near_as_it_was(policy):
    """At 224 pixels: a mean over 12,544 positions shows in which precision they are added up."""
    config, shape = CoAtNetConfig(**SMALL).replace(depths=(1, 1, 1, 1)), (224, 224, 3)
    options = {"input_shape": shape, "classifier_activation": None, "classes": 64}
    images = np.random.default_rng(1).uniform(0, 255, (2, *shape)).astype("float32")
    model = build(config, **options)
    exact = outputs(model, images)
    keras.config.set_dtype_policy(policy)
    half = keras_coatnet.CoAtNet(config, **options)
    half.set_weights(model.get_weights())
    fused = keras_coatnet.fuse(half)
    assert fused.output.dtype == "float32"
    kernels = {v.dtype for v in fused.weights if "stage" in v.path and v.path.endswith("kernel")}
    assert kernels == {policy.removeprefix("mixed_")}  # and not cast at each call
    plain, found = (np.sqrt(np.mean((outputs(m, images) - exact) ** 2)) for m in (half, fused))
    assert found <= 1.2 * plain


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_many_models_without_a_warning(tiny):
    """TensorFlow warns of a function that it traces again for each size."""
    compile_activation.cache_clear()  # it warns twice of each function, and no more
    config, messages = tiny.replace(depths=(1, 1, 1, 1)), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("tensorflow")
    logger.addHandler(handler)
    try:
        for size in (64, 80, 96, 128):
            model = keras_coatnet.CoAtNet(config, input_shape=(size, size, 3), classes=4)
            fused = keras_coatnet.fuse(model)
            for batch in (1, 2, 3):
                fused(np.zeros((batch, size, size, 3), "float32"), training=False)
            model(np.zeros((1, size, size, 3), "float32"), training=True)
    finally:
        logger.removeHandler(handler)
    assert not [message for message in messages if "retracing" in message]


@pytest.mark.slow
@pytest.mark.usefixtures("small_heap")
def test_what_cannot_be_fused_is_refused(tiny):
    model = keras_coatnet.CoAtNet(tiny, include_top=False)
    with pytest.raises(ValueError, match="known input size"):
        keras_coatnet.fuse(model)
    sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="Received: Sequential"):
        keras_coatnet.fuse(sequential)
    inputs = keras.Input(SHAPE)
    own = keras_coatnet.CoAtNet(
        tiny, input_tensor=keras.layers.Rescaling(0.5, name="mine")(inputs), include_top=False
    )
    with pytest.raises(ValueError, match="added layers.*mine"):
        keras_coatnet.fuse(own)
    shallow = tiny.replace(depths=(1, 1, 1, 1))
    quantized = keras_coatnet.CoAtNet(shallow, input_shape=SHAPE, classes=7)
    quantized.quantize("int8")
    with pytest.raises(ValueError, match="quantized"):
        keras_coatnet.fuse(quantized)
