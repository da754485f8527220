"""What keras.applications promises of its models, and what it does badly.

The first part follows Keras's own applications test, case by case, for our models. Runs on every
backend.
"""

import inspect

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.architectures import ARCHITECTURES, find_architecture
from keras_coatnet.weights import registry
from tests import helpers
from tests.conftest import TINY

SIGNATURE = {
    "include_top": True,
    "weights": "imagenet",
    "input_tensor": None,
    "input_shape": None,
    "pooling": None,
    "classes": None,
    "classifier_activation": "softmax",
    "include_preprocessing": None,
    "name": ...,
}


def test_sizes_without_imagenet_weights_say_so():
    for number in range(8):
        constructor = getattr(keras_coatnet, f"CoAtNet{number}")
        says = "No ImageNet-1k weights are published" in inspect.getdoc(constructor)
        try:
            registry.find("imagenet", f"coatnet{number}")
            assert not says
        except ValueError:
            assert says
            with pytest.raises(ValueError, match=f"coatnet{number}"):
                constructor()


def tiny_app(**kwargs):
    return keras_coatnet.CoAtNet(TINY, **kwargs)


FAMILY = [
    pytest.param(keras_coatnet.CoAtNet0, 768, id="CoAtNet0", marks=pytest.mark.slow),
    pytest.param(keras_coatnet.CoAtNet1, 768, id="CoAtNet1", marks=pytest.mark.slow),
    pytest.param(keras_coatnet.CoAtNet2, 1024, id="CoAtNet2", marks=pytest.mark.slow),
    pytest.param(keras_coatnet.CoAtNet3, 1536, id="CoAtNet3", marks=pytest.mark.slow),
    pytest.param(tiny_app, 64, id="tiny"),
]
family = pytest.mark.parametrize(("app", "last_dim"), FAMILY)
# For what does not depend on the size, which costs seconds to build.
smallest = pytest.mark.parametrize(("app", "last_dim"), [FAMILY[0], FAMILY[-1]])


# --- Keras's own cases -----------------------------------------------------------------------


@pytest.mark.slow
@smallest
def test_notop_variable_input_channels(app, last_dim):
    for channels in (1, 4):
        model = app(weights=None, include_top=False, input_shape=(None, None, channels))
        assert model.output_shape == (None, None, None, last_dim)


@pytest.mark.slow
@family
def test_base(app, last_dim):
    model = app(weights=None)
    assert model.input_shape == (None, 224, 224, 3)
    x = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype="uint8")
    scores = helpers.outputs(model, keras_coatnet.preprocess_input(x))
    assert scores.shape == (1, 1000)
    np.testing.assert_allclose(scores.sum(), 1, rtol=1e-5)
    assert len(keras_coatnet.decode_predictions(scores)[0]) == 5

    config = keras.saving.serialize_keras_object(model)
    restored = keras.saving.deserialize_keras_object(config)
    assert len(model.weights) == len(restored.weights)


@smallest
def test_notop_custom_input_shape(app, last_dim):
    model = app(weights=None, include_top=False, input_shape=(123, 123, 3))
    assert model.output_shape == (None, 4, 4, last_dim)


@pytest.mark.slow
@smallest
def test_notop_custom_input_tensor(app, last_dim):
    inputs = keras.Input((200, 200, 4), name="custom_input")
    x = keras.layers.Conv2D(3, 2, 2, data_format="channels_last")(inputs)
    model = app(weights=None, include_top=False, input_tensor=x)
    assert model.output_shape[-1] == last_dim
    assert model.inputs[0] is inputs


@family
def test_pooling(app, last_dim):
    model = app(weights=None, include_top=False, pooling="max")
    assert model.input_shape == (None, None, None, 3)
    assert model.output_shape == (None, last_dim)


@smallest
def test_classifier_activation(app, last_dim):
    model = app(weights=None, include_top=True, classifier_activation="softmax")
    assert model.layers[-1].activation.__name__ == "softmax"


# --- the rest of the conventions -------------------------------------------------------------


@pytest.mark.parametrize("number", [*range(8), "Nano"])
def test_signature(number):
    parameters = inspect.signature(getattr(keras_coatnet, f"CoAtNet{number}")).parameters
    named = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert [p.name for p in named] == list(SIGNATURE)
    for parameter in named[:-1]:
        assert parameter.default == SIGNATURE[parameter.name]
    assert named[-1].default == ("coatnet_nano" if number == "Nano" else f"coatnet{number}")


@pytest.mark.parametrize("number", [*range(8), "Nano"])
def test_constructors_are_functions_of_their_own(number):
    """A language server shows and finds them, and a traceback names them."""
    name = f"CoAtNet{number}"
    function = getattr(keras_coatnet, name)
    assert inspect.getsource(function).startswith(f"def {name}(\n")
    for part in ("`CoAtNet`", "Returns:", "Example:"):
        assert part in function.__doc__
    with pytest.raises(ValueError) as caught:
        function(pooling="median")
    assert name in [entry.name for entry in caught.traceback]


def test_arguments_are_documented_once():
    parameters = inspect.signature(keras_coatnet.CoAtNet).parameters
    for name in parameters:
        assert f"{name}: " in keras_coatnet.CoAtNet.__doc__
    for number in [*range(8), "Nano"]:
        function = inspect.signature(getattr(keras_coatnet, f"CoAtNet{number}"))
        assert [*function.parameters] == [*parameters][1:]


@pytest.mark.slow
def test_the_depthwise_stride_is_reachable_from_the_sizes():
    shape = (32, 32, 3)
    by_size = keras_coatnet.CoAtNet0(weights=None, input_shape=shape, stride_on="depthwise")
    by_name = keras_coatnet.CoAtNet("coatnet0_dw", input_shape=shape)
    assert by_size.architecture == by_name.architecture
    assert by_size.architecture.stride_on == "depthwise"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 32, 3), (123, 123, 3), (200, 240, 1), (64, 96, 4)])
def test_static_sizes_with_top(shape):
    model = tiny_app(input_shape=shape, classes=5)
    x = np.random.default_rng(0).uniform(0, 255, (2, *shape))
    assert helpers.outputs(model, x).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_unknown_sizes_without_top(channels):
    model = tiny_app(include_top=False, input_shape=(None, None, channels))
    for height, width in ((64, 64), (123, 123), (32, 240)):
        x = np.random.default_rng(0).uniform(0, 255, (1, height, width, channels))
        expected = (1, -(-height // 32), -(-width // 32), 64)
        assert helpers.outputs(model, x).shape == expected


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "rank"), [(None, 4), ("avg", 2), ("max", 2)])
def test_pooling_is_of_the_feature_map(pooling, rank, images):
    model = tiny_app(include_top=False, input_shape=(64, 64, 3), pooling=pooling)
    output = helpers.outputs(model, images)
    assert output.ndim == rank
    plain = keras.Model(model.input, model.get_layer("stage4_block1").output)
    features = helpers.outputs(plain, images)
    reduced = {None: features, "avg": features.mean((1, 2)), "max": features.max((1, 2))}[pooling]
    np.testing.assert_allclose(output, reduced, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "linear", "sigmoid", keras.activations.softmax])
def test_any_activation_without_weights(activation):
    model = tiny_app(input_shape=(32, 32, 3), classifier_activation=activation)
    assert model.layers[-1].activation == keras.activations.get(activation)
    assert model.layers[-1].name == "predictions"


@pytest.mark.slow
def test_nothing_hangs_on_the_name(tmp_path, images):
    model = tiny_app(input_shape=(64, 64, 3), classes=5, name="something_else")
    model.save_weights(tmp_path / "a.weights.h5")
    other = tiny_app(weights=tmp_path / "a.weights.h5", name="mine")
    assert (model.name, other.name) == ("something_else", "mine")
    np.testing.assert_array_equal(helpers.outputs(model, images), helpers.outputs(other, images))


@pytest.mark.slow
def test_preprocessing_is_in_the_model(images):
    raw = tiny_app(input_shape=(64, 64, 3), classes=5)
    normalized = tiny_app(input_shape=(64, 64, 3), classes=5, include_preprocessing=False)
    normalized.set_weights(raw.get_weights())
    np.testing.assert_allclose(
        helpers.outputs(raw, images),
        helpers.outputs(normalized, images / 127.5 - 1),
        rtol=1e-4,
        atol=1e-6,
    )
    assert keras_coatnet.preprocess_input(images) is images
    assert keras_coatnet.preprocess_input(images, data_format="channels_last") is images


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_preprocessing_by_another_mean_and_std(channels):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = TINY.replace(pixel_mean=mean, pixel_std=std)
    model = keras_coatnet.CoAtNet(config, include_top=False, input_shape=(32, 32, channels))
    x = np.random.default_rng(0).uniform(0, 255, (1, 32, 32, channels)).astype("float32")
    if channels != 3:  # no mean is known for each of them: the average stands for all
        mean, std = np.mean(mean), np.mean(std)
    expected = (x / 255 - np.array(mean)) / np.array(std)
    actual = keras.ops.convert_to_numpy(model.get_layer("preprocessing")(x))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coatnet0", "coatnet_bn_0_rw_224", "coatnet_rmlp_nano_rw_224"])
def test_channels_first_setting_changes_nothing(name, tmp_path, images):
    """Build, predict, fuse, save and reload, by one mean and standard deviation and by three."""
    config = find_architecture(name).replace(
        widths=TINY.widths, depths=(1, 1, 1, 1), stem_width=TINY.stem_width, head_dim=8
    )
    model = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=5)
    expected = helpers.outputs(model, images)
    keras.config.set_image_data_format("channels_first")
    other = keras_coatnet.CoAtNet(config, input_shape=(64, 64, 3), classes=5)
    other.set_weights(model.get_weights())
    for kind, network in (("plain", other), ("fused", keras_coatnet.fuse(other))):
        np.testing.assert_allclose(helpers.outputs(network, images), expected, atol=1e-5)
        network.save(tmp_path / f"{kind}.keras")
        again = keras.saving.load_model(tmp_path / f"{kind}.keras")
        np.testing.assert_allclose(helpers.outputs(again, images), expected, atol=1e-5)


@pytest.mark.slow
def test_input_tensor_with_a_path(tmp_path, images):
    saved = tiny_app(include_top=False, input_shape=(64, 64, 3))
    saved.save_weights(tmp_path / "a.weights.h5")
    inputs = keras.Input((64, 64, 3))
    x = keras.layers.Conv2D(3, 1, data_format="channels_last", name="ahead")(inputs)
    model = tiny_app(include_top=False, input_tensor=x, weights=tmp_path / "a.weights.h5")
    model.get_layer("ahead").set_weights([np.eye(3)[None, None], np.zeros(3)])
    np.testing.assert_allclose(
        helpers.outputs(model, images), helpers.outputs(saved, images), atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("classes", [3, 1000, 1500])
def test_paths_and_any_number_of_classes(tmp_path, suffix, classes, images):
    model = tiny_app(input_shape=(64, 64, 3), classes=classes)
    path = tmp_path / f"model{suffix}"
    (model.save if suffix == ".keras" else model.save_weights)(path)
    path = str(path) if classes == 3 else path
    expected = helpers.outputs(model, images)
    for arguments in ({}, {"classes": classes}):
        other = tiny_app(weights=path, input_shape=(64, 64, 3), **arguments)
        np.testing.assert_array_equal(helpers.outputs(other, images), expected)


@pytest.mark.slow
def test_a_new_number_of_classes_is_a_new_head_and_says_so(tmp_path, images):
    model = tiny_app(input_shape=(64, 64, 3), classes=5)
    model.save_weights(tmp_path / "a.weights.h5")
    with pytest.warns(UserWarning, match="classifier for 7 classes starts from random.*one of 5"):
        other = tiny_app(input_shape=(64, 64, 3), classes=7, weights=tmp_path / "a.weights.h5")
    assert other.output_shape == (None, 7)
    for name in ("hidden", "stage3_block2"):
        ours, theirs = other.get_layer(name).get_weights(), model.get_layer(name).get_weights()
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_weights_without_a_head_get_a_new_one_and_it_says_so(tmp_path):
    model = tiny_app(input_shape=(64, 64, 3), include_top=False)
    model.save_weights(tmp_path / "a.weights.h5")
    with pytest.warns(UserWarning, match="head for 4 classes starts from random.*brings none"):
        other = tiny_app(weights=tmp_path / "a.weights.h5", classes=4)
    assert other.output_shape == (None, 4)
    x = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 3))
    features = keras.Model(other.input, other.get_layer("stage4_block1").output)
    np.testing.assert_array_equal(helpers.outputs(features, x), helpers.outputs(model, x))


SHAPE = {"input_shape": (64, 64, 3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "mean", "include_top": False}, "None, 'avg' or 'max'. Received.*'mean'"),
        ({"classes": 0}, "at least 1. Received: classes=0.*include_top=False"),
        ({"classes": -3}, "classes=-3"),
        ({"classes": 2.5}, "classes=2.5"),
        ({"input_shape": (16, 64, 3)}, "at least 32 pixels"),
        ({"input_shape": (64, 64)}, r"\(height, width, channels\)"),
        ({"input_shape": (64, 64, None)}, "channels"),
        ({"input_shape": 64}, "Received: input_shape=64"),
        ({"input_shape": (None, None, 3)}, "include_top=True the height and width must be known"),
        ({"input_tensor": np.zeros((1, 64, 64, 3))}, "must be a KerasTensor.*ndarray"),
        ({"weights": "no_such_name"}, "no_such_name"),
        ({"weights": "no/such/file.weights.h5"}, "no file of that name.*no/such/file"),
        ({"weights": 3}, "a name or a path. Received: weights of type int"),
        ({"weights": "imagenet"}, "a checkpoint's own name"),
        ({"stride_at": "depthwise"}, "no field 'stride_at'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_app(**{**SHAPE, **arguments})


def test_input_tensor_of_another_shape():
    with pytest.raises(ValueError, match=r"is not that of `input_tensor`, \(64, 64, 3\)"):
        tiny_app(input_tensor=keras.Input((64, 64, 3)), input_shape=(32, 32, 3))


@pytest.mark.slow
def test_activation_with_weights(tmp_path):
    tiny_app(**SHAPE, classes=5).save_weights(tmp_path / "a.weights.h5")
    path = tmp_path / "a.weights.h5"
    for allowed in (None, "softmax", keras.activations.softmax):
        tiny_app(weights=path, classifier_activation=allowed)
    with pytest.raises(ValueError, match="must be 'softmax' or None. Received.*'relu'"):
        tiny_app(weights=path, classifier_activation="relu")
    tiny_app(weights=path, classifier_activation="relu", include_top=False)


def test_files_of_the_wrong_kind(tmp_path):
    (tmp_path / "a.weights.h5").write_bytes(b"no weights at all")
    (tmp_path / "a.keras").write_bytes(b"no weights at all")
    (tmp_path / "a.txt").write_bytes(b"no weights at all")
    (tmp_path / "a.bin").write_bytes(b"\x80\x04 a pickle, perhaps")
    for name, message in (
        ("a.weights.h5", "damaged, or not a file that Keras saved"),
        ("a.keras", "damaged, or not a file that Keras saved"),
        ("a.txt", "must end in .weights.h5, .keras"),
        ("a.bin", "A pickled file of PyTorch"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_app(weights=tmp_path / name)


@pytest.mark.slow
def test_weights_of_another_network(tmp_path):
    keras_coatnet.CoAtNet("coatnet_nano_rw_224", **SHAPE).save_weights(tmp_path / "a.weights.h5")
    path = tmp_path / "a.weights.h5"
    with pytest.raises(
        ValueError, match="architecture 'coatnet_nano_rw_224', and CoAtNet0 builds another"
    ):
        keras_coatnet.CoAtNet0(weights=path)
    with pytest.raises(ValueError, match="'coatnet_nano_rw_224'"):
        tiny_app(weights=path)
    model = keras_coatnet.CoAtNetNano(weights=path)
    assert model.architecture.same_network(ARCHITECTURES["coatnet_nano_rw_224"])


@pytest.mark.slow
def test_weights_and_changes_of_their_network_are_refused(tmp_path):
    path = tmp_path / "a.weights.h5"
    keras_coatnet.CoAtNet("coatnet_0_rw_224", **SHAPE, classes=2).save_weights(path)
    with pytest.raises(ValueError, match="with stride_on='pool'. Received: stride_on='depthwise'"):
        keras_coatnet.CoAtNet0(weights=path, stride_on="depthwise")
    model = keras_coatnet.CoAtNet0(weights=path, stochastic_depth=0.1)
    assert model.architecture.stochastic_depth == 0.1


@pytest.mark.slow
def test_own_architecture_loads_without_being_named(tmp_path, images):
    """What is fine-tuned from a public network and saved loads through the size's constructor."""
    tuned = keras_coatnet.CoAtNet("coatnet_0_rw_224", input_shape=(64, 64, 3), classes=2)
    tuned.save_weights(tmp_path / "tuned.weights.h5")
    model = keras_coatnet.CoAtNet0(weights=tmp_path / "tuned.weights.h5")
    assert model.architecture == tuned.architecture
    np.testing.assert_array_equal(helpers.outputs(model, images), helpers.outputs(tuned, images))


def test_decode_predictions():
    preds = np.zeros((2, 1000), "float32")
    preds[0, 386], preds[0, 0], preds[1, 999] = 0.7, 0.2, 1.0
    first, second = keras_coatnet.decode_predictions(preds, top=2)
    assert [entry[:2] for entry in first] == [
        ("n02504458", "African_elephant"),
        ("n01440764", "tench"),
    ]
    assert [entry[2] for entry in first] == pytest.approx([0.7, 0.2])
    assert second[0][2] == 1.0
    assert len(keras_coatnet.decode_predictions(np.zeros((1, 11821)))[0]) == 5
    as_tensor = keras.ops.convert_to_tensor(preds)
    assert keras_coatnet.decode_predictions(as_tensor, top=2)[0] == first
    for wrong in (np.zeros(1000), np.zeros((1, 10)), np.zeros((1, 2, 1000))):
        with pytest.raises(ValueError, match=r"\(batch, 1000\) or \(batch, 11821\)"):
            keras_coatnet.decode_predictions(wrong)
    with pytest.raises(ValueError, match="`top`"):
        keras_coatnet.decode_predictions(preds, top=0)
