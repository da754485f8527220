"""Our network against keras_cv_attention_models' CoAtNet, from recorded files and logits.

That library needs Keras 2, so its side was recorded once: see tests/fixtures/README.md.
"""

import pathlib
import shutil

import h5py
import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.architectures import ARCHITECTURES

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FILES = {64: "kecam_64_model.h5", 96: "kecam_96_weights.h5"}
CONFIG = ARCHITECTURES["kecam_coatnet0"].replace(
    widths=(64, 96, 64, 32), depths=(2, 1, 2, 1), stem_width=32
)
TOLERANCE = 2e-5  # float32; the recorded logits reach 2 to 6

both_files = pytest.mark.parametrize("size", FILES)


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURES / "kecam_io.npz") as arrays:
        return dict(arrays)


def build(path, size, config=CONFIG, **kwargs):
    kwargs = {"input_shape": (size, size, 3), "include_preprocessing": False, **kwargs}
    if kwargs.get("include_top", True):
        kwargs.setdefault("classifier_activation", None)
    return keras_coatnet.CoAtNet(config, weights=path, **kwargs)


def compute(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


def error(model, recorded, size):
    return np.abs(compute(model, recorded[f"images_{size}"]) - recorded[f"logits_{size}"]).max()


@both_files
def test_gives_the_recorded_logits(recorded, size):
    model = build(FIXTURES / FILES[size], size)
    ours, theirs = compute(model, recorded[f"images_{size}"]), recorded[f"logits_{size}"]
    assert 1 < np.abs(theirs).max() < 10
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.slow
@both_files
def test_every_variable_has_the_value_in_the_file(recorded, size):
    one, other = (build(FIXTURES / FILES[size], size) for _ in range(2))
    for ours, theirs in zip(one.variables, other.variables, strict=True):
        if "seed_generator" not in ours.path:
            np.testing.assert_array_equal(ours, theirs, ours.path)


@pytest.mark.slow
def test_normalizes_raw_pixels_itself(recorded):
    """With ImageNet's mean and standard deviation, as keras_cv_attention_models does."""
    images = recorded["images_64"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    raw = (255 * (images * std + mean)).astype("float32")
    model = build(FIXTURES / FILES[64], 64, include_preprocessing=True)
    np.testing.assert_allclose(compute(model, raw), recorded["logits_64"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_without_top_it_returns_the_input_of_the_classifier(recorded):
    images, path = recorded["images_64"], FIXTURES / FILES[64]
    features = compute(build(path, 64, include_top=False), images)
    assert features.shape == (2, 2, 2, 32)
    pooled = compute(build(path, 64, include_top=False, pooling="avg"), images)
    np.testing.assert_allclose(pooled, features.mean((1, 2)), rtol=0, atol=1e-5)
    kernel, bias = build(path, 64).get_layer("predictions").get_weights()
    np.testing.assert_allclose(pooled @ kernel + bias, recorded["logits_64"], atol=TOLERANCE)
    highest = compute(build(path, 64, include_top=False, pooling="max"), images)
    np.testing.assert_allclose(highest, features.max((1, 2)), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_file_of_one_size_loads_at_another(recorded):
    """A table for 64 pixels is resized for 96: at build, or at run time if the size is unknown."""
    images, path = recorded["images_96"], FIXTURES / FILES[64]
    static = compute(build(path, 96, include_top=False, pooling="avg"), images)
    unknown = build(path, None, include_top=False, pooling="avg", input_size=64)
    np.testing.assert_allclose(compute(unknown, images), static, rtol=0, atol=TOLERANCE)
    classified = compute(build(path, 96), images)
    assert classified.shape == (2, 10) and np.isfinite(classified).all()
    # Other values of the same network: not the logits of its own file.
    assert np.abs(classified - recorded["logits_96"]).max() > 0.1


@pytest.mark.slow
def test_an_image_that_is_not_square(recorded):
    model = build(FIXTURES / FILES[64], 64, input_shape=(64, 96, 3))
    scores = compute(model, recorded["images_96"][:, :64])
    assert scores.shape == (2, 10) and np.isfinite(scores).all()


def changed_copy(tmp_path, change):
    """The recorded weights, with each dataset changed in place."""
    path = tmp_path / "changed.h5"
    shutil.copy(FIXTURES / FILES[96], path)
    with h5py.File(path, "r+") as file:
        file.visititems(
            lambda name, item: change(name, item) if isinstance(item, h5py.Dataset) else None
        )
    return path


def test_a_mirrored_table_changes_the_logits(recorded, tmp_path):
    def mirror(name, dataset):
        if "positional_embedding" in name:
            dataset[:] = dataset[:][:, ::-1]

    assert error(build(changed_copy(tmp_path, mirror), 96), recorded, 96) > 1e-3


@pytest.mark.slow
def test_another_order_of_q_k_v_changes_the_logits(recorded, tmp_path):
    def reorder(name, dataset):
        if "mhsa_qkv_conv/kernel" in name:
            values = dataset[:]
            heads = values.shape[-1] // (3 * CONFIG.head_dim)
            split = values.reshape(*values.shape[:-1], 3, heads, CONFIG.head_dim)
            # As timm has it: of each head its query, key and value.
            dataset[:] = np.swapaxes(split, -2, -3).reshape(values.shape)

    assert error(build(changed_copy(tmp_path, reorder), 96), recorded, 96) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conv_padding", "same"),
        ("conv_activation", "gelu_tanh"),
        ("conv_activation", "silu"),
        ("conv_prenorm_activation", True),
        ("conv_pool", "avg2"),
        ("transformer_pool", "avg2"),
        ("stride_on", "expansion"),
        ("squeeze_activation", "silu"),
        ("squeeze_place", "before_norm"),
        ("ffn_activation", "gelu_tanh"),
        ("batch_norm_epsilon", 1e-3),
    ],
)
def test_a_wrong_field_changes_the_logits(recorded, field, value):
    model = build(FIXTURES / FILES[64], 64, CONFIG.replace(**{field: value}))
    assert error(model, recorded, 64) > 1e-4
