"""Saving, reloading, exporting, quantizing; nothing half written."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_coatnet
from tests import helpers, processes

SIZE = {"input_shape": (64, 64, 3)}
VARIANTS = [
    {},
    {"relative_position": "mlp", "relative_position_hidden_dim": 16, "layer_scale": 1e-6},
    {"transformer_norm": "batch", "final_norm": "before_pool", "hidden_head": False},
    {"conv_padding": "symmetric", "stride_on": "pool", "conv_activation": "silu"},
    {"stochastic_depth": 0.2, "transformer_pool": "max3", "ffn_activation": "gelu"},
]


def _model(tiny, **changes):
    model = keras_coatnet.CoAtNet(tiny.replace(**changes), input_shape=(64, 64, 3), classes=5)
    helpers.randomize(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_round_trips_are_exact(tiny, changes, suffix, tmp_path, images):
    model = _model(tiny, **changes)
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        model.save(path)
        restored = keras.models.load_model(path)
        assert isinstance(restored, keras_coatnet.CoAtNetModel)
        assert restored.identity() == model.identity()
        assert json.dumps(restored.get_config()) == json.dumps(model.get_config())
    else:
        model.save_weights(path)
        restored = keras_coatnet.CoAtNet(model.architecture, weights=path)
    for theirs, ours in zip(model.weights, restored.weights, strict=True):
        np.testing.assert_array_equal(helpers.to_numpy(theirs), helpers.to_numpy(ours))
    np.testing.assert_array_equal(
        helpers.to_numpy(model(images)), helpers.to_numpy(restored(images))
    )


def test_a_file_carries_its_architecture(tiny, tmp_path):
    import h5py

    _model(tiny).save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5") as file:
        identity = json.loads(file.attrs["keras_coatnet"])
    assert keras_coatnet.CoAtNetConfig.from_dict(identity["architecture"]).same_network(tiny)
    assert identity["classes"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64, 1), (64, 96, 4)])
def test_a_file_carries_its_input(tiny, shape, tmp_path):
    model = keras_coatnet.CoAtNet(tiny, input_shape=shape, classes=5)
    model.save_weights(tmp_path / "a.weights.h5")
    restored = keras_coatnet.CoAtNet(tiny, weights=tmp_path / "a.weights.h5")
    assert restored.input_shape == (None, *shape)
    with pytest.raises(ValueError, match=f"images of {shape[-1]} channels"):
        keras_coatnet.CoAtNet(tiny, weights=tmp_path / "a.weights.h5", input_shape=(64, 64, 3))
    backbone = keras_coatnet.CoAtNet(tiny, False, weights=tmp_path / "a.weights.h5")
    assert backbone.input_shape == (None, None, None, shape[-1])
    x = np.random.default_rng(0).uniform(0, 255, (1, *shape)).astype("float32")
    features = keras.Model(model.input, model.get_layer("stage4_block1").output)
    helpers.assert_matches(backbone(x), helpers.to_numpy(features(x)), 1e-6)


@pytest.mark.slow
def test_plain_keras_models_load_the_same_files(tiny, tmp_path):
    """The identity is no obstacle to Keras itself."""
    model = _model(tiny)
    model.save_weights(tmp_path / "a.weights.h5")
    plain = keras.Model(model.input, model.output)
    plain.load_weights(tmp_path / "a.weights.h5")
    plain.save_weights(tmp_path / "b.weights.h5")
    restored = keras_coatnet.CoAtNet(
        tiny, input_shape=(64, 64, 3), classes=5, weights=tmp_path / "b.weights.h5"
    )
    for theirs, ours in zip(model.weights, restored.weights, strict=True):
        np.testing.assert_array_equal(helpers.to_numpy(theirs), helpers.to_numpy(ours))


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    model = _model(tiny)
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    good = path.read_bytes()

    def break_off(self, filepath, **kwargs):
        pathlib.Path(filepath).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.Model, "save_weights", break_off)
    with pytest.raises(OSError, match="No space left"):
        model.save_weights(path)
    assert path.read_bytes() == good
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.weights.h5"]


@pytest.mark.slow
def test_sharded_weights_are_left_to_keras(tiny, tmp_path, images):
    model = _model(tiny)
    model.save_weights(tmp_path / "a.weights.json", max_shard_size=0.001)
    assert len(list(tmp_path.glob("*.weights.h5"))) >= 1
    other = keras_coatnet.CoAtNet(tiny, input_shape=(64, 64, 3), classes=5)
    other.load_weights(tmp_path / "a.weights.json")
    helpers.assert_matches(other(images), helpers.to_numpy(model(images)), 1e-6)


@pytest.mark.slow
def test_fine_tuned_part_of_a_larger_model(tiny, tmp_path, images):
    backbone = keras_coatnet.CoAtNet(
        tiny, include_top=False, pooling="avg", input_shape=(64, 64, 3)
    )
    model = keras.Sequential([backbone, keras.layers.Dense(2)])
    expected = helpers.to_numpy(model(images))
    model.save(tmp_path / "a.keras")
    restored = keras.models.load_model(tmp_path / "a.keras")
    assert restored.layers[0].architecture == backbone.architecture
    np.testing.assert_array_equal(helpers.to_numpy(restored(images)), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("small_heap")
def test_quantized_models_reload(tiny, tmp_path, images):
    model = _model(tiny)
    expected = helpers.to_numpy(model(images))
    model.quantize("int8")
    quantized = helpers.to_numpy(model(images))
    assert 0 < np.abs(quantized - expected).max() < 0.1
    attention = model.get_layer("stage3_block1").attention
    assert keras.backend.standardize_dtype(attention.query.kernel.dtype) == "int8"
    model.save(tmp_path / "a.keras")
    restored = keras.models.load_model(tmp_path / "a.keras")
    helpers.assert_matches(restored(images), quantized, 1e-6)


@pytest.mark.slow
def test_lora_reaches_the_attention(tiny, tmp_path, images):
    model = _model(tiny)
    expected = helpers.to_numpy(model(images))
    dense = model.get_layer("stage3_block1").attention.query
    dense.enable_lora(2)
    helpers.assert_matches(model(images), expected, 1e-6)
    dense.lora_kernel_b.assign(np.ones(dense.lora_kernel_b.shape, "float32"))
    tuned = helpers.to_numpy(model(images))
    assert np.abs(tuned - expected).max() > 0
    model.save(tmp_path / "a.keras")
    restored = keras.models.load_model(tmp_path / "a.keras")
    helpers.assert_matches(restored(images), tuned, 1e-5)


EXCHANGE = """
import sys
import numpy as np
import keras, keras_coatnet
folder, variants = sys.argv[1], int(sys.argv[2])
inputs = np.load(f"{folder}/in.npy")
for number in range(variants):
    model = keras.models.load_model(f"{folder}/{number}.keras")
    fresh = keras_coatnet.CoAtNet(model.architecture, weights=f"{folder}/{number}.weights.h5")
    results = [each.predict(inputs, verbose=0) for each in (model, fresh)]
    np.save(f"{folder}/{number}.npy", np.stack(results))
    model.save(f"{folder}/{number}.back.keras")
"""


@pytest.mark.tensorflow_only
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_files_cross_backends(tiny, backend, tmp_path, images):
    models = [_model(tiny, **changes) for changes in VARIANTS]
    np.save(tmp_path / "in.npy", images)
    for number, model in enumerate(models):
        model.save(tmp_path / f"{number}.keras")
        model.save_weights(tmp_path / f"{number}.weights.h5")
    subprocess.run(
        [sys.executable, "-c", EXCHANGE, str(tmp_path), str(len(models))],
        check=True,
        env={**os.environ, **processes.COMPILE_FAST, "KERAS_BACKEND": backend},
    )
    for number, model in enumerate(models):
        expected = helpers.to_numpy(model(images, training=False))
        for result in np.load(tmp_path / f"{number}.npy"):
            np.testing.assert_allclose(result, expected, atol=1e-6)
        back = keras.models.load_model(tmp_path / f"{number}.back.keras")
        np.testing.assert_array_equal(helpers.to_numpy(back(images, training=False)), expected)


@pytest.mark.slow
@pytest.mark.tensorflow_only
@pytest.mark.parametrize("size", [64, None])
def test_saved_model_serves_without_keras(tiny, size, tmp_path, images):
    model = keras_coatnet.CoAtNet(
        tiny, include_top=False, pooling="avg", input_shape=(size, size, 3)
    )
    helpers.randomize(model)
    model.export(tmp_path / "served", verbose=False)
    np.save(tmp_path / "in.npy", images)
    code = """
import sys
sys.modules["keras"] = sys.modules["keras_coatnet"] = None  # importing either fails now
import numpy as np, tensorflow as tf
served = tf.saved_model.load(sys.argv[1] + "/served")
np.save(sys.argv[1] + "/out.npy", served.serve(np.load(sys.argv[1] + "/in.npy")))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "out.npy"), helpers.to_numpy(model(images)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_weights_bring_the_preprocessing_that_was_saved(tiny, suffix, tmp_path, images):
    saved = keras_coatnet.CoAtNet(
        tiny, input_shape=(64, 64, 3), classes=5, include_preprocessing=False
    )
    path = tmp_path / f"a{suffix}"
    saved.save(path) if suffix == ".keras" else saved.save_weights(path)
    loaded = keras_coatnet.CoAtNet(tiny, weights=path)
    assert loaded.include_preprocessing is False
    normalized = images / 127.5 - 1
    expected = helpers.to_numpy(saved(normalized))
    np.testing.assert_array_equal(helpers.to_numpy(loaded(normalized)), expected)
    # Who asks for something else gets it.
    asked = keras_coatnet.CoAtNet(tiny, weights=path, include_preprocessing=True)
    assert asked.include_preprocessing is True
    helpers.assert_matches(asked(images), expected, 1e-5)
    keras.Model(saved.input, saved.output).save_weights(tmp_path / "plain.weights.h5")
    plain = keras_coatnet.CoAtNet(tiny, classes=5, weights=tmp_path / "plain.weights.h5", **SIZE)
    assert plain.include_preprocessing is True


def _rewritten(path, change):
    """Changes the identity in a file."""
    import zipfile

    import h5py

    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        config = json.loads(files["config.json"])
        change(config["config"]["keras_coatnet"])
        files["config.json"] = json.dumps(config)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with h5py.File(path, "r+") as file:
        identity = json.loads(file.attrs["keras_coatnet"])
        change(identity)
        file.attrs["keras_coatnet"] = json.dumps(identity)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_files_of_newer_versions_are_refused_and_of_older_ones_load(tiny, suffix, tmp_path):
    model = keras_coatnet.CoAtNet(tiny.replace(depths=(1, 1, 1, 1)), classes=5, **SIZE)
    path = tmp_path / f"a{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)

    def of_old(identity):
        for key in ("format", "version", "fused"):
            del identity[key]

    _rewritten(path, of_old)
    keras_coatnet.CoAtNet(model.architecture, weights=path)
    _rewritten(path, lambda identity: identity.update(format=99, version="7.0", more=1))
    message = rf"newer version of keras_coatnet, 7\.0.*version {keras_coatnet.__version__}.*pip"
    with pytest.raises(ValueError, match=message) as caught:
        keras_coatnet.CoAtNet(model.architecture, weights=path)
    assert str(path) in str(caught.value)
    if suffix == ".keras":
        with pytest.raises(ValueError, match=message):
            keras.saving.load_model(path)


@pytest.mark.parametrize(
    "change",
    [{"include_preprocessing": "False"}, {"classes": "5"}, {"channels": None}, {"x": 1}],
)
def test_an_identity_with_wrong_values_is_refused(tiny, change, tmp_path):
    path = tmp_path / "a.weights.h5"
    keras_coatnet.CoAtNet(tiny.replace(depths=(1, 1, 1, 1)), classes=5, **SIZE).save_weights(path)
    _rewritten(path, lambda identity: identity.update(change))
    with pytest.raises(ValueError, match=r"a\.weights\.h5 is damaged: .*" + next(iter(change))):
        keras_coatnet.CoAtNet(tiny, weights=path)
