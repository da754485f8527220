"""Somebody gives a file that is not the one that is wanted, and is told which one is."""

import errno
import pathlib
import shutil

import keras
import numpy as np
import pytest
import skimage.data

import keras_coatnet
from keras_coatnet import cli, inference

CAT = pathlib.Path(skimage.data.data_dir) / "chelsea.png"
SHAPE = (32, 32, 3)
CONFIG = keras_coatnet.CoAtNetConfig(
    (16, 24, 32, 64), depths=(1, 1, 1, 1), stem_width=8, head_dim=8, relative_position_hidden_dim=16
)


@pytest.fixture(scope="module")
def model() -> keras_coatnet.CoAtNetModel:
    return keras_coatnet.CoAtNet(CONFIG, input_shape=SHAPE, classes=3)


@pytest.fixture
def said(capsys):
    """What is said of a file, in one line: the same by a constructor and the command line."""

    def said(path: object) -> str:
        messages = []
        for call in (
            lambda: keras_coatnet.CoAtNet(CONFIG, weights=path, input_shape=SHAPE),
            lambda: inference.open_model(path),
            lambda: inference.open_model(path, CONFIG),
        ):
            with pytest.raises(ValueError) as caught:
                call()
            messages.append(str(caught.value))
        capsys.readouterr()
        assert cli.main(["predict", str(CAT), "--model", str(path)]) == 2
        output, errors = capsys.readouterr()
        assert output == "" and errors.count("\n") == 1
        messages.append(errors.removeprefix("keras-coatnet: error: ").removesuffix("\n"))
        assert len(set(messages)) == 1, messages
        assert "\n" not in messages[0] and ".." not in messages[0].replace(str(path), "")
        return messages[0]

    return said


def _refusal(path: object) -> str:
    with pytest.raises(ValueError) as caught:
        keras_coatnet.CoAtNet(CONFIG, weights=path, input_shape=SHAPE)
    return str(caught.value)


# --- whole models in Keras's old format --------------------------------------------------------


def _others() -> dict[str, keras.Model]:
    backbone = keras_coatnet.CoAtNet(CONFIG, include_top=False, pooling="avg", input_shape=SHAPE)
    flat = [keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(2)]
    return {
        "around": keras.Sequential([keras.Input(SHAPE), backbone, keras.layers.Dense(2)]),
        "functional": keras.Model(backbone.inputs, keras.layers.Dense(2)(backbone.output)),
        "another": keras.Sequential(flat),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*HDF5 file")
@pytest.mark.parametrize(
    ("name", "compiled"), [("m.h5", True), ("m.hdf5", False), ("m.weights.h5", False)]
)
def test_the_old_format_keeps_a_whole_model(tmp_path, name, compiled):
    model = keras_coatnet.CoAtNet(CONFIG, input_shape=SHAPE, classes=3)
    if compiled:
        model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
        model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / name)
    loaded = keras.models.load_model(tmp_path / name)
    assert loaded.identity() == model.identity()
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))
    if compiled:
        assert loaded.optimizer.get_config() == model.optimizer.get_config()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*HDF5 file")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("coatnet", "m.h5"), ("coatnet", "m.weights.h5"), ("around", "m.h5"), ("another", "m.h5")],
)
def test_a_whole_model_in_the_old_format_is_no_file_of_weights(model, said, tmp_path, kind, name):
    path = tmp_path / name
    ({"coatnet": model, **_others()}[kind]).save(path)
    message = said(path)
    assert "holds a whole model" in message and message.count(str(path)) == 2
    assert f"keras.models.load_model({str(path)!r}).save(" in message
    new = path.with_name("m.keras")
    assert repr(str(new)) in message
    # As it says:
    keras.models.load_model(path).save(new)
    if kind == "coatnet":
        assert keras_coatnet.CoAtNet(CONFIG, weights=new).classes == 3
    else:
        assert cli.main(["predict", str(CAT), "--model", str(new)]) == 0


# --- whole models that are no CoAtNet any more -------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_a_quantized_model_is_loaded_whole(tmp_path, mode):
    model = keras_coatnet.CoAtNet(CONFIG, input_shape=SHAPE, classes=3)
    model.quantize(mode)
    path = tmp_path / "q.keras"
    model.save(path)
    message = _refusal(path)
    assert f"keras.models.load_model({str(path)!r})" in message and "quantized" in message
    assert "\n" not in message and "object" not in message and len(message) < 400
    assert keras.models.load_model(path).classes == 3

    weights = tmp_path / "q.weights.h5"
    model.save_weights(weights)
    message = _refusal(weights)
    assert "quantized" in message and "load_weights" in message
    assert "\n" not in message and "object" not in message and len(message) < 400
    other = keras_coatnet.CoAtNet(CONFIG, input_shape=SHAPE, classes=3)
    other.quantize(mode)
    other.load_weights(weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["around", "functional"])
def test_a_classifier_around_a_coatnet_is_loaded_whole(tmp_path, kind):
    path = tmp_path / "mine.keras"
    _others()[kind].save(path)
    message = _refusal(path)
    assert f"keras.models.load_model({str(path)!r})" in message and message.count(str(path)) == 2
    assert "\n" not in message and "object" not in message and len(message) < 400
    assert keras.models.load_model(path).output_shape == (None, 2)


@pytest.mark.slow
def test_weights_of_another_saver_that_do_not_fit_are_told_in_one_line(tmp_path):
    path = tmp_path / "other.weights.h5"
    _others()["around"].save_weights(path)
    message = _refusal(path)
    assert "do not fit" in message and "Keras says: " in message
    assert "\n" not in message and "List of objects" not in message


# --- damaged files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.weights.h5", "m.keras", "m.safetensors", "m.h5"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "image"])
def test_a_damaged_file_is_told_once_with_one_advice(model, said, tmp_path, name, damage):
    path = tmp_path / name
    if damage == "cut":
        whole = tmp_path / ("whole.keras" if name == "m.keras" else "whole.weights.h5")
        model.save(whole) if name == "m.keras" else model.save_weights(whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    else:
        content = {"empty": b"", "text": b"no model\n" * 300, "image": CAT.read_bytes()}
        path.write_bytes(content[damage])
    message = said(path)
    assert "damaged" in message and message.count(str(path)) == 1 and message.count(".") >= 2
    assert message.count(" again") == 1


@pytest.mark.parametrize("name", ["m.weights.h5", "m.keras", "m.safetensors", "m.h5"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(said, tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"a secret")

    def forbidden(self, *arguments, **options):  # the tests may run as root, who may read all
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", forbidden)
    message = said(path)
    assert "cannot be read: Permission denied" in message and "damaged" not in message


# --- what is no file ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "folder.weights.h5", "folder.keras"])
def test_a_folder_is_called_one(said, tmp_path, name):
    (tmp_path / name).mkdir()
    message = said(str(tmp_path / name))
    assert "no file of that name, but a folder" in message and ".weights.h5, .keras" in message


@pytest.mark.slow
@pytest.mark.parametrize("held", [["final", "best"], ["best"], []])
def test_the_folder_of_a_run_is_told_which_file_to_give(model, said, tmp_path, capsys, held):
    folder = tmp_path / "r1"
    folder.mkdir()
    shutil.copy(CAT, folder)
    (folder / "recipe.json").write_text("{}")
    for name in held:
        model.save_weights(folder / f"{name}.weights.h5")
    message = said(str(folder))
    assert "the folder of a run" in message
    if held:
        assert f"Give {folder / held[0]}.weights.h5" in message
        assert inference.open_model(f"{folder / held[0]}.weights.h5")[0].classes == 3
    else:
        assert "holds no weights yet" in message
    assert (f"--run {folder}" in message) == ("final" in held)
    assert "must end in .weights.h5, .keras" in said(str(folder / "recipe.json"))
    capsys.readouterr()
    for kind in ("cats", "others"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        shutil.copy(CAT, tmp_path / "data" / kind)
    for command in (["train", "transfer"], ["evaluate"]):
        data = ["--data", str(tmp_path / "data")]
        assert cli.main([*command, "--weights", str(folder), *data]) == 2
        assert message in capsys.readouterr().err


def test_a_device_is_called_one(said):
    assert "no file of that name, but a device" in said("/dev/null")


@pytest.mark.parametrize("name", ["no.keras", "no.weights.h5", "no.safetensors", "no.h5"])
def test_a_missing_file_is_called_one(said, name):
    assert "There is no file of that name. Received" in said(name)


# --- texts that are empty ----------------------------------------------------------------------


def test_empty_texts_are_no_paths(said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CAT, tmp_path)  # which `predict ""` found before
    assert "`weights` is an empty text" in said("")
    for arguments, argument in (
        (["predict", ""], "image"),
        (["predict", str(CAT), "--labels", ""], "labels"),
        (["train", "transfer", "--weights", "", "--data", "."], "weights"),
        (["train", "transfer", "--model", "", "--data", "."], "model"),
        (["train", "transfer", "--model", "coatnet0", "--data", ""], "data"),
        (["train", "transfer", "--model", "coatnet0", "--data", ".", "--output", ""], "output"),
        (["evaluate", "--run", ""], "run"),
        (["evaluate", "--weights", "", "--data", "."], "weights"),
        (["evaluate", "--weights", "x", "--data", ""], "data"),
        (["evaluate", "--weights", "x", "--data", ".", "--output", ""], "output"),
    ):
        assert cli.main(arguments) == 2
        output, errors = capsys.readouterr()
        assert errors.count("\n") == 1 and f"`{argument}` is an empty text" in errors, arguments
