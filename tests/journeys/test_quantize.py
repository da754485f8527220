"""Somebody makes a model small with Keras's `quantize` or trains it with LoRA, and keeps it."""

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.architectures import find_architecture
from tests import helpers

SHAPE = (32, 32, 3)
CONFIG = keras_coatnet.CoAtNetConfig(
    (16, 24, 32, 64), depths=(1, 1, 1, 1), stem_width=8, head_dim=8, relative_position_hidden_dim=16
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method"),
    pytest.mark.usefixtures("small_heap"),
]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (4, *SHAPE)).astype("float32")


def _build(relative_position: str) -> keras_coatnet.CoAtNetModel:
    keras.utils.set_random_seed(0)  # how far 8 bits are off depends on the weights
    config = CONFIG.replace(relative_position=relative_position)
    return keras_coatnet.CoAtNet(config, input_shape=SHAPE, classes=3, classifier_activation=None)


def _outputs(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(images, training=False))


def _modes(model: keras.Model) -> list[str | None]:
    return [
        layer.quantization_mode
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Dense)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("relative_position", ["table", "mlp"])
@pytest.mark.parametrize("mode", ["int8", "int4", "float8", "int4 of 16"])
def test_a_quantized_model_reloads_and_clones(relative_position, mode, images, tmp_path):
    model = _build(relative_position)
    before = _outputs(model, images)
    if mode == "int4 of 16":
        model.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=16))
    else:
        model.quantize(mode)
    expected = _outputs(model, images)
    assert np.abs(expected - before).max() < 0.05
    assert set(_modes(model)) == {mode.partition(" ")[0]}
    model.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(_outputs(loaded, images), expected, atol=1e-6)
    clone = keras.models.clone_model(loaded)
    assert _modes(clone) == _modes(model)
    with pytest.raises(ValueError, match="quantized model cannot be fused"):
        keras_coatnet.fuse(loaded)


@pytest.mark.slow
@pytest.mark.tensorflow_only
@pytest.mark.parametrize("relative_position", ["table", "mlp"])
def test_a_fused_model_quantizes_reloads_and_exports(relative_position, images, tmp_path):
    fused = keras_coatnet.fuse(_build(relative_position))
    before = _outputs(fused, images)
    fused.quantize("int8")
    expected = _outputs(fused, images)
    assert 0 < np.abs(expected - before).max() < 0.05
    fused.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(_outputs(loaded, images), expected, atol=1e-6)
    report = keras_coatnet.export(loaded, tmp_path / "small.onnx", images=images, verbose=False)
    assert report.mean_difference < 0.02 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["coatnet_bn_0_rw_224", "coatnet_0_rw_224", "coatnext_nano_rw_224"]
)
def test_architectures_of_other_kinds_quantize_and_reload(name, images, tmp_path):
    config = find_architecture(name).replace(
        widths=(16, 32, 64, 64), depths=(1, 1, 1, 1), stem_width=8, head_dim=8
    )
    model = keras_coatnet.CoAtNet(config, input_shape=SHAPE, classes=3, classifier_activation=None)
    helpers.randomize(model)
    before = _outputs(model, images)
    model.quantize("int8")
    expected = _outputs(model, images)
    assert 0 < np.abs(expected - before).max() < 0.1 * np.abs(before).max()
    model.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(_outputs(loaded, images), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("relative_position", ["table", "mlp"])
def test_lora_of_every_dense_layer_reloads_and_goes_on(relative_position, images, tmp_path):
    model = _build(relative_position)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            layer.enable_lora(2)
            layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.05, "float32"))
    expected = _outputs(model, images)
    model.save(tmp_path / "tuned.keras")
    loaded = keras.saving.load_model(tmp_path / "tuned.keras")
    np.testing.assert_allclose(_outputs(loaded, images), expected, atol=1e-5)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


@pytest.mark.slow
def test_lora_on_a_quantized_backbone_trains_and_reloads(images, tmp_path):
    keras.utils.set_random_seed(0)
    backbone = keras_coatnet.CoAtNet(CONFIG, input_shape=SHAPE, include_top=False, pooling="avg")
    backbone.quantize("int8")
    for layer in backbone._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            layer.enable_lora(2)
    kernels = [layer.lora_kernel_b for layer in backbone._flatten_layers() if _has_lora(layer)]
    model = keras.Sequential([backbone, keras.layers.Dense(3)])
    model.compile(
        keras.optimizers.Adam(0.003), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    losses = model.fit(images, np.arange(4) % 3, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    # The last map has one position, to whose only key any query is alike.
    moved = [np.abs(keras.ops.convert_to_numpy(kernel)).max() > 1e-3 for kernel in kernels]
    assert moved.count(False) <= 2
    model.save(tmp_path / "tuned.keras")
    loaded = keras.saving.load_model(tmp_path / "tuned.keras")
    # Keras adds what was learnt to the kernels, and rounds those to eight bits again.
    expected = _outputs(model, images)
    assert np.abs(_outputs(loaded, images) - expected).max() < 0.02 * np.abs(expected).max()


def _has_lora(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.Dense) and layer.lora_enabled


@pytest.mark.slow
@pytest.mark.parametrize("relative_position", ["table", "mlp"])
def test_a_map_of_policies_quantizes_and_reloads(relative_position, images, tmp_path):
    half = keras.DTypePolicy("mixed_bfloat16")
    policies = {"stage[34].*": half}
    keras.config.set_dtype_policy(keras.dtype_policies.DTypePolicyMap("float32", policies))
    model = _build(relative_position)
    attention = model.get_layer("stage3_block1").attention
    assert attention.query.compute_dtype == "bfloat16"
    assert attention.position.compute_dtype == "float32"  # and with it logits and softmax
    assert model.get_layer("stage1_block1").expand.compute_dtype == "float32"
    model.quantize("int8")
    expected = _outputs(model, images)
    model.save(tmp_path / "small.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(_outputs(loaded, images), expected, atol=1e-6)
