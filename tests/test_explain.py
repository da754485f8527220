"""`keras_coatnet.explain`, where the answer is known."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_coatnet
from keras_coatnet import explain
from tests import helpers
from tests.test_features import AROUND, SMALL, Hidden

SHAPE = (64, 48, 3)


def make(config=SMALL, **options) -> keras_coatnet.CoAtNetModel:
    model = keras_coatnet.CoAtNet(config, **{"input_shape": SHAPE, "classes": 5, **options})
    helpers.randomize(model)
    return model


@pytest.fixture(scope="module")
def model() -> keras_coatnet.CoAtNetModel:
    return make()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (3, *SHAPE)).astype("float32")


def everything(model: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "cam": explain.grad_cam(model, images),
        "cam of stage 2": explain.grad_cam(model, images, [1, 4, 0], "stage2"),
        "attention": explain.attention_maps(model, images, "stage4_block1"),
        "rollout": explain.attention_rollout(model, images),
        "bias": explain.relative_bias(model, "stage3_block2"),
    }


@pytest.fixture(scope="module")
def expected(model, images) -> dict[str, np.ndarray]:
    return everything(model, images)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fused", "nested", "softmax apart"])
def test_it_is_the_same_wherever_the_coatnet_is(kind, model, images, expected):
    if kind == "softmax apart":
        inner = make(classifier_activation=None)
        whole = keras.Sequential([keras.Input(SHAPE), inner, keras.layers.Softmax()])
    else:
        whole = AROUND[kind](model)
    for name, found in everything(whole, images).items():
        helpers.assert_matches(found, expected[name], 1e-4)


@pytest.mark.slow
def test_shapes_and_ranges(images, expected):
    for name in ("cam", "cam of stage 2", "rollout"):
        assert expected[name].shape == (3, 64, 48) and expected[name].min() >= 0
        assert set(expected[name].max(axis=(1, 2))) <= {0.0, 1.0}
    assert expected["attention"].shape == (3, 2, 4, 4)
    np.testing.assert_allclose(expected["attention"].sum(axis=-1), 1, atol=1e-5)
    assert expected["bias"].shape == (2, 7, 5)
    assert all(found.dtype == "float32" for found in expected.values())


@pytest.mark.slow
def test_gradients_are_finite_differences():
    """What Grad-CAM weights a channel by is how the score changes with the whole channel."""
    model = make(classifier_activation=None)
    images = np.random.default_rng(1).uniform(0, 255, (1, *SHAPE)).astype("float32")
    block = model.get_layer("stage3_block2").output
    body, head = keras.Model(model.input, block), keras.Model(block, model.output)
    features = helpers.to_numpy(helpers.call_layer(body, images, training=False))
    channels = features.shape[-1]
    step = 1e-2 * np.abs(features).mean()
    moved = step * np.eye(channels)[:, None, None, :]
    two = [features + sign * moved for sign in (1, -1)]
    scores = [
        helpers.to_numpy(helpers.call_layer(head, x.astype("float32"), training=False)) for x in two
    ]
    weights = (scores[0] - scores[1]) / (2 * step * np.prod(features.shape[1:3]))
    cams = np.maximum(np.einsum("hwc,cn->nhw", features[0], weights), 0)
    assert cams.max() > 0
    for index, cam in enumerate(cams):
        cam = ops.image.resize(cam[None, ..., None], SHAPE[:2], data_format="channels_last")
        cam = helpers.to_numpy(cam)[..., 0]
        found = explain.grad_cam(model, images, index, "stage3")
        if cam.max() == 0:
            assert found.max() == 0
        else:
            np.testing.assert_allclose(found, cam / cam.max(), atol=2e-2)


@pytest.mark.slow
def test_a_class_of_its_own_for_each_image(model, images, expected):
    found = [
        explain.grad_cam(model, images[number : number + 1], index, "stage2")
        for number, index in enumerate([1, 4, 0])
    ]
    helpers.assert_matches(np.concatenate(found), expected["cam of stage 2"], 1e-5)
    top = helpers.to_numpy(helpers.call_layer(model, images, training=False)).argmax(axis=-1)
    helpers.assert_matches(explain.grad_cam(model, images, top), expected["cam"], 1e-5)


def test_attention_is_what_the_layer_computes_with(model, images):
    weights = explain.attention_maps(model, images, "stage3_block2")
    before = keras.Model(model.input, model.get_layer("stage3_block1").output)
    block = model.get_layer("stage3_block2")
    x = block.attention_norm(helpers.call_layer(before, images, training=False))
    value = helpers.to_numpy(block.attention.value(ops.reshape(x, (3, 12, 16))))
    value = value.reshape(3, 12, 2, 8)
    attended = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(3, 4, 3, 16)
    found = block.attention.projection(ops.convert_to_tensor(attended.astype("float32")))
    helpers.assert_matches(helpers.to_numpy(found), helpers.to_numpy(block.attention(x)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "mlp"])
def test_biases_are_those_of_pairs(kind):
    model = make(SMALL.replace(relative_position=kind))
    found = explain.relative_bias(model, "stage3_block1")
    position = model.get_layer("stage3_block1").attention.position
    pairs = helpers.to_numpy(position(height=4, width=3)).reshape(2, 4, 3, 4, 3)
    # Of the query at row 2, column 1: the key one above and one to the right.
    np.testing.assert_allclose(pairs[:, 2, 1, 1, 2], found[:, -1 + 3, 1 + 2], rtol=1e-6)
    np.testing.assert_allclose(pairs[:, 0, 0, 3, 2], found[:, 3 + 3, 2 + 2], rtol=1e-6)
    fused = explain.relative_bias(keras_coatnet.fuse(model), "stage3_block1")
    np.testing.assert_allclose(fused, found, rtol=1e-6)


def test_rollout_of_known_attention():
    """Where all look one to the right, what reaches the end comes from the right."""
    images = np.zeros((1, 64, 64, 3))
    model = make(input_shape=(64, 64, 3))
    for block in model.layers:
        if block.name.startswith(("stage3", "stage4")):
            for dense in (block.attention.query, block.attention.key):
                dense.set_weights([0 * each for each in dense.get_weights()])
            table = np.zeros(block.attention.position.table.shape, "float32")
            block.attention.position.table.assign(table)
    uniform = explain.attention_rollout(model, images)
    np.testing.assert_allclose(uniform, 1, atol=1e-5)  # on a map that halves without a rest
    for block in model.layers:
        if block.name.startswith("stage3"):
            table = np.zeros(block.attention.position.table.shape, "float32")
            table[:, 3, 4] = 100.0  # the same row, the next column
            block.attention.position.table.assign(table)
    right = explain.attention_rollout(model, images)
    assert right[:, :, 32:].min() > 1.5 * right[:, :, :8].max()


def corners(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise, and stripes in one corner; images, classes, and where the corners begin.

    Upright stripes are class 0, level ones are class 1.
    """
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 255, (count, 64, 64, 3))
    classes, places = rng.integers(0, 2, count), 32 * rng.integers(0, 2, (count, 2))
    stripes = np.where(np.arange(32) // 2 % 2, 255, 0)[:, None] * np.ones((32, 32))
    for image, number, (row, column) in zip(images, classes, places, strict=True):
        part = stripes if number else stripes.T
        image[row : row + 32, column : column + 32] = part[..., None]
    return images.astype("float32"), classes, places


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_a_network_that_has_learnt_looks_at_what_it_has_learnt():
    keras.utils.set_random_seed(0)
    config = SMALL.replace(depths=(1, 1, 1, 1), batch_norm_momentum=0.8)
    model = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=2)
    optimizer = keras.optimizers.AdamW(3e-3)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    images, classes, _ = corners(512, seed=1)
    model.fit(images, classes, batch_size=32, epochs=4, verbose=0)
    images, classes, places = corners(64, seed=2)
    assert model.evaluate(images, classes, verbose=0)[1] > 0.95
    for layer in (None, "stage2"):
        cam = explain.grad_cam(model, images, classes, layer)
        inside = [
            each[row : row + 32, column : column + 32].sum() / max(each.sum(), 1e-9)
            for each, (row, column) in zip(cam, places, strict=True)
        ]
        print(f"Grad-CAM of {layer or 'the last stage'}: {np.mean(inside):.0%} in a quarter")
        assert np.mean(inside) > 0.4


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_index": 5}, "below the model's 5 classes. Received: 5"),
        ({"class_index": -1}, "`class_index` must be a whole number of at least 0"),
        ({"class_index": "cat"}, "`class_index` must be a whole number"),
        ({"class_index": [1, 2]}, "one for each of the 3 images. Received: 2"),
        ({"layer": "stage7"}, "no layer 'stage7'. It has the stages stage1"),
        ({"layer": "avg_pool"}, r"`layer` must give a map. 'avg_pool' gives \(None, 16\)"),
        ({"layer": "stage3_block2/attention"}, "no layer 'stage3_block2/attention'"),
        ({"layer": 3}, "must be the name of a layer"),
    ],
)
def test_mistaken_arguments(model, images, options, message):
    with pytest.raises(ValueError, match=message):
        explain.grad_cam(model, images, **options)


@pytest.mark.parametrize("shape", [(64, 48, 3), (0, 64, 48, 3), (1, 48, 64, 3), (1, 64, 48, 1)])
def test_images_of_another_shape(model, shape):
    for function in (explain.grad_cam, explain.attention_maps, explain.attention_rollout):
        with pytest.raises(ValueError, match=r"of the shape that the model takes, \(None, 64, 48"):
            function(model, np.zeros(shape))


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_half_precision_and_quantized(images, expected):
    """Half precision: the same network gives nearly the same. Quantized by Keras: told, or so."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    half = make()
    keras.config.set_dtype_policy("float32")
    for name, found in everything(half, images).items():
        assert found.dtype == "float32" and np.isfinite(found).all(), name
    np.testing.assert_allclose(explain.relative_bias(half, "stage3_block2"), expected["bias"])
    quantized = make()
    quantized.quantize("int8")
    with pytest.raises(ValueError, match="was quantized.*Give the model that it was made from"):
        explain.grad_cam(quantized, images)
    maps = explain.attention_maps(quantized, images, "stage4_block1")
    assert np.abs(maps - expected["attention"]).max() < 0.1


@pytest.mark.slow
def test_what_cannot_be_explained(model, images):
    with pytest.raises(ValueError, match="'stage3_block2_attention' alone: another path leads aro"):
        explain.grad_cam(keras_coatnet.fuse(model), images, layer="stage3_block2_attention")
    with pytest.raises(ValueError, match="must be a Transformer block: stage3_block1, .*'stage1_b"):
        explain.attention_maps(model, images, "stage1_block1")
    features = keras_coatnet.CoAtNet(SMALL, input_shape=SHAPE, include_top=False)
    with pytest.raises(ValueError, match="must be a classifier"):
        explain.grad_cam(features, images)
    convolutions = keras_coatnet.CoAtNet(
        SMALL.replace(layout=("C", "C", "C", "C")), input_shape=SHAPE
    )
    with pytest.raises(ValueError, match="no Transformer blocks at its end"):
        explain.attention_rollout(convolutions, images)
    with pytest.raises(ValueError, match="the network has none"):
        explain.relative_bias(convolutions)
    with pytest.raises(ValueError, match="functional or sequential"):
        explain.relative_bias(Hidden())
