"""`feature_pyramid` and `feature_extractor`: the model's own tensors, wherever the CoAtNet is."""

import keras
import numpy as np
import pytest

import keras_coatnet
from tests import helpers, timm_models

SMALL = keras_coatnet.CoAtNetConfig((8, 8, 16, 16), depths=(1, 1, 2, 2), stem_width=8, head_dim=8)
LEVELS = ("P1", "P2", "P3", "P4", "P5")
ENDS = ("stem_conv2", "stage1_block1", "stage2_block1", "stage3_block2", "stage4_block2")


def make(size=(70, 64), **options) -> keras_coatnet.CoAtNetModel:
    model = keras_coatnet.CoAtNet(SMALL, input_shape=(*size, 3), classes=5, **options)
    helpers.randomize(model)
    return model


def assert_same(found, expected) -> None:
    helpers.assert_matches(helpers.to_numpy(found), helpers.to_numpy(expected), 1e-5)


def nested(backbone: keras.Model) -> keras.Model:
    """A classifier of a user's own around a backbone."""
    inputs = keras.Input(backbone.input_shape[1:])
    x = backbone(keras.layers.RandomFlip()(inputs), training=False)
    inner = keras.Model(inputs, keras.layers.Dropout(0.5)(x))
    return keras.Sequential([keras.Input(backbone.input_shape[1:]), inner])


@pytest.fixture(scope="module")
def model() -> keras_coatnet.CoAtNetModel:
    return make()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (2, 70, 64, 3)).astype("float32")


@pytest.fixture(scope="module")
def maps(model, images) -> list[np.ndarray]:
    """The maps by Keras's own means."""
    tensors = [model.get_layer(name).output for name in ENDS]
    found = helpers.call_layer(keras.Model(model.input, tensors), images, training=False)
    return [helpers.to_numpy(each) for each in found]


AROUND = {"alone": lambda model: model, "fused": keras_coatnet.fuse, "nested": nested}


@pytest.mark.slow
@pytest.mark.parametrize("kind", AROUND)
def test_the_maps_are_those_of_the_model(kind, model, images, maps):
    whole = AROUND[kind](model)
    pyramid = keras_coatnet.feature_pyramid(whole)
    found = helpers.call_layer(pyramid, images, training=False)
    assert tuple(found) == LEVELS
    for level, expected in zip(LEVELS, maps, strict=True):
        assert_same(found[level], expected)
    sizes = {level: pyramid.output[level].shape[1:3] for level in LEVELS}
    assert sizes == {"P1": (35, 32), "P2": (18, 16), "P3": (9, 8), "P4": (5, 4), "P5": (3, 2)}
    own = {id(variable) for variable in helpers.seedless(whole.variables)}
    assert {id(variable) for variable in helpers.seedless(pyramid.variables)} <= own


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_it_trains(model):
    """What is built upon it trains the model's own weights."""
    model = make((32, 32), include_top=False)
    pyramid = keras_coatnet.feature_pyramid(model)
    x = keras.layers.UpSampling2D(8)(pyramid.output["P5"])
    x = keras.layers.Concatenate()([x, pyramid.output["P2"]])
    segmenter = keras.Model(pyramid.input, keras.layers.Conv2D(2, 1)(x))
    before = helpers.to_numpy(model.get_layer("stage4_block2").ffn_project.kernel)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    segmenter.compile("adam", loss, run_eagerly=True)
    images = np.random.default_rng(1).uniform(0, 255, (4, 32, 32, 3))
    segmenter.train_on_batch(images, np.zeros((4, 8, 8)))
    after = helpers.to_numpy(model.get_layer("stage4_block2").ffn_project.kernel)
    assert np.abs(after - before).max() > 1e-5


@pytest.mark.parametrize(
    "name",
    ["coatnet_0_224", "coatnet_rmlp_nano_rw_224", "coatnet_bn_0_rw_224", "coatnext_nano_rw_224"],
)
def test_every_kind_and_unknown_sizes(name):
    config = timm_models.reduced_config(name, (1, 2, 2, 2), 64)
    model = keras_coatnet.CoAtNet(config, input_shape=(None, None, 3), include_top=False)
    pyramid = keras_coatnet.feature_pyramid(model)
    shapes = [pyramid.output[level].shape for level in LEVELS]
    _, stem = (config.stem_width,) * 2 if isinstance(config.stem_width, int) else config.stem_width
    assert shapes == [(None, None, None, width) for width in (stem, *config.widths)]
    found = helpers.call_layer(pyramid, np.zeros((1, 45, 64, 3), "float32"), training=False)
    sizes = [tuple(found[level].shape[1:3]) for level in LEVELS]
    assert sizes == [(23, 32), (12, 16), (6, 8), (3, 4), (2, 2)]


@pytest.mark.slow
@pytest.mark.tensorflow_only
def test_models_save_and_load_afterwards(images, tmp_path):
    model = make()
    inside = keras_coatnet.feature_extractor(model, ["stage3_block1/attention", "stage2"])
    for number, each in enumerate((model, keras_coatnet.feature_pyramid(model), inside)):
        each.save(tmp_path / f"{number}.keras")
        loaded = keras.models.load_model(tmp_path / f"{number}.keras")
        found, expected = (keras.tree.flatten(made(images)) for made in (loaded, each))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        if each is model:
            assert loaded.architecture == model.architecture
            assert_same(keras_coatnet.fuse(loaded)(images), model(images))


PARTS = ["stage3_block2/attention", "stage1_block1/depthwise", "stage2", "avg_pool"]


def test_parts_of_blocks(model, images):
    inside = keras_coatnet.feature_extractor(model, PARTS)
    assert [inside.output[name].shape[1:] for name in PARTS] == [
        *((5, 4, 16), (18, 16, 32), (9, 8, 8), (16,)),
    ]
    found = helpers.call_layer(inside, images, training=False)
    block = model.get_layer("stage3_block2")
    before = keras.Model(model.input, model.get_layer("stage3_block1").output)
    x = helpers.call_layer(before, images, training=False)
    expected = helpers.call_layer(block.attention, block.attention_norm(x))
    assert_same(found["stage3_block2/attention"], expected)
    block = model.get_layer("stage1_block1")
    before = keras.Model(model.input, model.get_layer("stem_conv2").output)
    x = block.expand(block.input_norm(helpers.call_layer(before, images, training=False)))
    expected = block.depthwise(keras.ops.gelu(block.expand_norm(x), approximate=True))
    assert_same(found["stage1_block1/depthwise"], expected)


def test_parts_of_a_fused_network(model, images):
    """Another layer than the plain one's, with what was folded into it, has another name."""
    fused = keras_coatnet.fuse(model)
    with pytest.raises(ValueError, match="parts .*stage1_block1_depthwise, "):
        keras_coatnet.feature_extractor(fused, ["stage1_block1/depthwise"])
    inside = keras_coatnet.feature_extractor(fused, ["stage3_block2_attention", *PARTS[2:]])
    found = helpers.call_layer(inside, images, training=False)
    plain = keras_coatnet.feature_extractor(model, PARTS)
    expected = helpers.call_layer(plain, images, training=False)
    for name, each in found.items():
        assert_same(each, expected[name.replace("2_a", "2/a")])


def _two() -> keras.Model:
    inputs = keras.Input((64, 64, 3))
    coatnets = [
        keras_coatnet.CoAtNet(SMALL, input_shape=(64, 64, 3), name=name)(inputs)
        for name in ("one", "other")
    ]
    return keras.Model(inputs, keras.layers.Average()(coatnets))


def _two_inputs() -> keras.Model:
    inputs = [keras.Input((4,)), keras.Input((4,))]
    return keras.Model(inputs, keras.layers.Add()(inputs))


class Hidden(keras.Model):
    """A model that Keras cannot look into."""

    def call(self, x):
        return x


@pytest.mark.parametrize(
    "model, message",
    [
        (_two, "'functional.*' has 2 in its graph. Give the CoAtNet itself"),
        (_two_inputs, "functional or sequential Keras model of one input"),
        (lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), "has 0 in its"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), "Received: Sequential"),
        (Hidden, "Received: Hidden"),
        (lambda: "coatnet0", "Received: str"),
    ],
)
def test_what_has_not_one_coatnet_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        keras_coatnet.feature_pyramid(model())


@pytest.mark.parametrize(
    "layers, message",
    [
        (["stage9"], "no layer 'stage9'. It has the stages stage1, stage2, stage3, stage4, the"),
        (["stage3_block2/nose"], "and the parts stage3_block2/attention, stage3_block2/atten"),
        (["stage3_block1/pooling"], "calls 'stage3_block1/pooling' 2 times"),
        ("stage3", "must be a list of names"),
        ([], "must be a list of names"),
        ([3], "must be a list of names"),
    ],
)
def test_layers_that_are_not_there(model, layers, message):
    with pytest.raises(ValueError, match=message):
        keras_coatnet.feature_extractor(model, layers)
