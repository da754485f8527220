"""`export` and `load_exported`: each format, in its own runtime, beside Keras."""

from __future__ import annotations

import http.server
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import keras
import numpy as np
import onnx
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image

import keras_coatnet
from keras_coatnet import cli
from keras_coatnet.cli.checks import check_weights
from keras_coatnet.exporting.card import Card
from keras_coatnet.exporting.export import ExportReport
from keras_coatnet.exporting.formats import FORMATS
from keras_coatnet.exporting.runtime import Runtime
from keras_coatnet.images import ImageSettings, load_image
from keras_coatnet.inference import class_scores, open_model
from keras_coatnet.training import Recipe, evaluate, open_datasets
from tests import helpers, processes

pytestmark = pytest.mark.tensorflow_only

# A block of each kind, with a shortcut that strides and one that does not.
SMALL = keras_coatnet.CoAtNetConfig((8, 8, 16, 16), depths=(1, 1, 1, 1), stem_width=8, head_dim=8)
ENDINGS = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx", "openvino": ".xml"}
PHOTOGRAPHS = [
    pathlib.Path(skimage.data.data_dir, name)
    for name in ("astronaut.png", "coffee.png", "chelsea.png")
]


def make(**options: object) -> keras.Model:
    model = keras_coatnet.CoAtNet(SMALL, **{"input_shape": (32, 32, 3), "classes": 5, **options})
    helpers.randomize(model)
    return model


def nested() -> keras.Model:
    """A classifier of a user's own around a backbone that takes normalized pixels."""
    backbone = make(include_top=False, pooling="avg", include_preprocessing=False)
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Dropout(0.5)(backbone(keras.layers.RandomFlip()(inputs)))
    return keras.Model(inputs, keras.layers.Dense(5, name="colors")(x))


def mixed() -> keras.Model:
    """The same under a mixed policy, which the program keeps."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    return nested()


MODELS: dict[str, Callable[[], keras.Model]] = {
    "plain": make,
    "fused": lambda: keras_coatnet.fuse(make()),
    "nested": nested,
    "mixed": mixed,
}
# Each kind and each format, and those pairs that have code of their own.
PAIRS = [
    ("saved_model", "nested"),
    ("saved_model", "mixed"),
    ("litert", "plain"),
    ("litert", "nested"),
    ("onnx", "fused"),
    ("onnx", "nested"),
    ("onnx", "mixed"),
    ("openvino", "plain"),
    ("openvino", "fused"),
    ("openvino", "nested"),
]


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype("float32")


def in_float32(kind: str, model: keras.Model, images: np.ndarray) -> np.ndarray:
    """What a model is to compute from raw pixels."""
    if kind in ("nested", "mixed"):
        images = images / 127.5 - 1
    if kind == "mixed":
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("float32")
        copy = nested()
        keras.config.set_dtype_policy(policy)
        copy.set_weights(model.get_weights())
        model = copy
    return helpers.outputs(model, images)


@pytest.mark.slow
@pytest.mark.parametrize("format, kind", PAIRS)
def test_each_kind_in_each_format(format, kind, tmp_path, batch):
    model = MODELS[kind]()
    path = tmp_path / f"model.v1{ENDINGS[format]}"
    report = keras_coatnet.export(model, path, format, images=batch, verbose=False)
    assert isinstance(report, ExportReport)
    assert (report.format, report.images, report.top1_agreement) == (format, 3, 1.0)
    assert report.max_difference < 1e-4
    assert report.fused == (kind != "fused" and format != "openvino")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert report.size_bytes == sum(file.stat().st_size for file in files)
    loaded = keras_coatnet.load_exported(path)
    assert loaded.input_shape == (None, 32, 32, 3) and loaded.output_shape == (None, 5)
    assert loaded.class_names == tuple(f"class {number}" for number in range(5))
    assert loaded.image_settings == ImageSettings(32)
    expected = in_float32(kind, model, batch)
    for size in (3, 1, 2):  # batches of any size, one after the other
        helpers.assert_matches(loaded.predict(batch[:size]), expected[:size], 1e-4)
    # Not beside the mixed model's own: each processor rounds bfloat16 in another way.
    if kind in ("nested", "mixed"):
        expected = keras.ops.convert_to_numpy(keras.ops.softmax(expected))
    helpers.assert_matches(class_scores(loaded, batch), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("mode, format", [("int8", "onnx"), ("int4", "litert")])
def test_a_model_that_keras_quantized(format, mode, tmp_path, batch):
    model = nested()
    model.quantize(mode)
    report = keras_coatnet.export(
        model, tmp_path / f"model{ENDINGS[format]}", images=batch, verbose=False
    )
    assert report.max_difference < 1e-5 and not report.fused
    if mode == "int8":
        for other in ("litert", "openvino"):
            with pytest.raises(ValueError, match=r"was quantized to int8 by Keras[^\n]*$"):
                keras_coatnet.export(model, tmp_path / f"other{ENDINGS[other]}", verbose=False)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["saved_model", "onnx", "openvino"])
def test_any_height_and_width(format, tmp_path):
    model = make(input_shape=(None, None, 3), include_top=False)
    path = tmp_path / f"model{ENDINGS[format]}"
    report = keras_coatnet.export(model, path, verbose=False)
    assert not report.fused and report.top1_agreement is None
    loaded = keras_coatnet.load_exported(path)
    for shape in ((1, 64, 32, 3), (2, 32, 96, 3)):
        images = np.random.default_rng(1).uniform(0, 255, shape).astype("float32")
        helpers.assert_matches(loaded.predict(images), helpers.outputs(model, images), 1e-4)


# --- Served ------------------------------------------------------------------------------------


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def photographs() -> dict[str, bytes]:
    """Photographs as files of each kind, and the kinds of pixels that each may have."""
    astronaut, coffee = (Image.open(path).convert("RGB") for path in PHOTOGRAPHS[:2])
    small = coffee.resize((90, 60))
    transparent = small.copy()
    transparent.putalpha(small.getchannel("R"))
    sixteen_bits = np.asarray(small.convert("L")).astype("uint16") * 257
    return {
        "JPEG": encode(coffee, "JPEG"),
        "progressive JPEG": encode(astronaut, "JPEG", progressive=True, quality=95),
        "gray JPEG": encode(small.convert("L"), "JPEG"),
        "CMYK JPEG": encode(small.convert("CMYK"), "JPEG"),
        "PNG": encode(astronaut, "PNG"),
        "PNG of one bit": encode(astronaut.convert("1"), "PNG"),
        "palette PNG": encode(small.convert("P"), "PNG"),
        "transparent PNG": encode(transparent, "PNG"),
        "16-bit PNG": encode(Image.fromarray(sixteen_bits), "PNG"),
        "GIF": encode(coffee, "GIF"),
        "BMP": encode(small, "BMP"),
        "WebP": encode(coffee, "WEBP"),
        "transparent WebP": encode(transparent, "WEBP", lossless=True),
    }


@pytest.mark.slow
def test_encoded_images_in_tensorflow_alone(tmp_path):
    """Labels and probabilities, from a process that can import neither Keras nor the package."""
    model = make(classes=3, classifier_activation=None)
    settings = ImageSettings(32, crop_pct=0.875)
    names = ["astronaut", "coffee", "cat"]
    path = tmp_path / "served"
    path.mkdir()
    (path / "saved_model.pb").write_text("an old one")
    options = {"image_settings": settings, "class_names": names, "verbose": False}
    keras_coatnet.export(model, path, overwrite=True, **options)
    assert [each.name for each in tmp_path.iterdir()] == ["served"]
    stored = tf.train.list_variables(path / "variables" / "variables")
    assert {name.partition("/")[0] for name, _ in stored[1:]} == {"weights"}  # none of them twice
    code = """
import sys
sys.modules["keras"] = sys.modules["keras_coatnet"] = None
import json
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1])
found = served.serve_images(
    tf.stack([tf.io.read_file(path) for path in sys.argv[2:]])
)
print(json.dumps({
    "classes": found["classes"].numpy().tolist(),
    "labels": [[name.decode() for name in row] for row in found["labels"].numpy()],
    "probabilities": found["probabilities"].numpy().tolist(),
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), *map(str, PHOTOGRAPHS)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    pixels = np.stack([load_image(path, 32, crop_pct=0.875) for path in PHOTOGRAPHS])
    scores = class_scores(model, pixels)
    order = np.argsort(-scores, axis=1)
    assert found["classes"] == order.tolist()
    assert found["labels"] == [[names[number] for number in row] for row in order]
    helpers.assert_matches(
        np.array(found["probabilities"]), np.take_along_axis(scores, order, 1), 1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ImageSettings(96),
        ImageSettings((64, 96), crop_pct=0.8),
        ImageSettings(64, "bilinear", 1.0, "squash"),
        ImageSettings(48, "lanczos"),
        ImageSettings(48, "box"),
        ImageSettings(48, "hamming"),
    ],
    ids=lambda settings: f"{settings.size}-{settings.interpolation}",
)
def test_pixels_are_those_of_pillow(settings, tmp_path):
    from keras_coatnet.exporting.pixels import decode_and_prepare

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def prepare(encoded):
        return decode_and_prepare(encoded, settings)

    files = photographs()
    found = prepare(list(files.values())).numpy()
    for pixels, (kind, encoded) in zip(found, files.items(), strict=True):
        file = tmp_path / "image"
        file.write_bytes(encoded)
        expected = load_image(
            file, settings.size, settings.interpolation, settings.crop_pct, settings.crop_mode
        )
        difference = np.abs(pixels - expected)
        # The libraries decode WebP with different roundings, and resize gray steps at their edge.
        # A box has an edge, and rounding decides on which side of it a pixel lies.
        assert difference.max() <= 2, kind
        assert difference.mean() < (0.5 if settings.interpolation == "box" else 0.01), kind


def test_a_file_that_cannot_be_decoded_is_told():
    from keras_coatnet.exporting.pixels import decode_and_prepare

    palette = encode(Image.new("P", (40, 40)), "BMP")
    for encoded in (b"\x89PNG is what it says" + b"." * 20, b"text" * 20, palette):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_and_prepare(tf.constant([encoded]), ImageSettings(32))


@pytest.mark.slow
def test_nothing_is_reported_to_anyone(tmp_path):
    """A user whose machine reaches the network through a proxy, which writes down who asks."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(502)

        def log_message(self, *args):
            """Says nothing."""

    code = """
import sys
import numpy as np
import keras_coatnet
config = keras_coatnet.CoAtNetConfig((8, 8, 16, 16), (1, 1, 1, 1), stem_width=8, head_dim=8)
model = keras_coatnet.CoAtNet(config, input_shape=(32, 32, 3), classes=5)
images = np.zeros((2, 32, 32, 3))
for name, quantize in (("m.onnx", None), ("m.xml", "int8")):
    path = f"{sys.argv[1]}/{name}"
    keras_coatnet.export(model, path, quantize=quantize, images=images, tolerance=9, verbose=False)
    keras_coatnet.load_exported(path).predict(images)
assert "onnxruntime" in sys.modules and "nncf" in sys.modules
"""
    home, models = tmp_path / "home", tmp_path / "models"
    home.mkdir()
    models.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HOME": str(home)}
    for name in ("CI", "ORT_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment[name] = f"http://127.0.0.1:{server.server_port}"
    for name in ("no_proxy", "NO_PROXY"):
        environment.pop(name, None)
    done = processes.run([sys.executable, "-c", code, str(models)], env=environment)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in models.iterdir()) == ["m.bin", "m.onnx", "m.xml"]
    assert not asked
    assert not list(home.iterdir())


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> keras.Model:
    return make()


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("model.h5", {}, "does not end like a file of any format"),
        ("model.onnx", {"format": "litert"}, r"must end in \.tflite"),
        ("model.tflite", {"format": "tflite"}, "must be one of 'saved_model'"),
        ("model.tflite", {"quantize": "int4"}, "`quantize` must be one of"),
        ("model.onnx", {"quantize": "float16"}, "ONNX models cannot be.*litert, openvino"),
        ("model", {"quantize": "int8"}, "SavedModel models cannot be"),
        ("model.tflite", {"quantize": "int8"}, "needs `images`"),
        ("nowhere/model.tflite", {}, "there is no folder .*nowhere"),
        ("gs://bucket/model.tflite", {}, "remote addresses are not supported"),
        ("model.tflite", {"images": np.zeros((2, 64, 64, 3))}, r"of shape \(batch, 32, 32, 3\)"),
        ("model.tflite", {"images": np.zeros((0, 32, 32, 3))}, r"of shape \(batch, 32, 32, 3\)"),
        ("model.tflite", {"images": np.full((1, 32, 32, 3), np.nan)}, "finite"),
        ("model.tflite", {"class_names": ["cat"]}, "`class_names` gives 1 names.*5 classes"),
        ("model.tflite", {"image_settings": ImageSettings(64)}, r"\(64, 64\).*takes \(32, 32\)"),
        ("model.tflite", {"image_settings": 32}, "must be ImageSettings"),
        ("model.tflite", {"tolerance": 0}, "`tolerance` must be a number above 0"),
        ("model.tflite", {"overwrite": 1}, "`overwrite` must be True or False"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(plain, tmp_path, path, options, message):
    where = path if "://" in path else tmp_path / path
    with pytest.raises(ValueError, match=message):
        keras_coatnet.export(plain, where, verbose=False, **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model(tmp_path):
    inputs = [keras.Input((4,)), keras.Input((4,))]
    two_inputs = keras.Model(inputs, keras.layers.Add()(inputs))
    for model in ("coatnet0", None, two_inputs):
        with pytest.raises(ValueError, match="model"):
            keras_coatnet.export(model, tmp_path / "model.tflite")


@pytest.mark.slow
def test_litert_needs_a_known_size(tmp_path):
    model = make(input_shape=(None, None, 3), include_top=False)
    with pytest.raises(ValueError, match="LiteRT needs a known height and width"):
        keras_coatnet.export(model, tmp_path / "model.tflite", verbose=False)
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r'pip install "keras-coatnet\[openvino\]"'):
        keras_coatnet.export(plain, tmp_path / "model.xml")
    with pytest.raises(ImportError, match=r'pip install "keras-coatnet\[onnx\]"'):
        cli_file = tmp_path / "model.onnx"
        cli_file.touch()
        keras_coatnet.load_exported(cli_file)


@pytest.mark.slow
def test_nothing_is_replaced_unasked(plain, tmp_path, capsys):
    file, own = tmp_path / "model.tflite", tmp_path / "own"
    file.write_text("mine")
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists.*overwrite=True"):
        keras_coatnet.export(plain, file)
    with pytest.raises(ValueError, match="not the folder of a SavedModel, and will not be"):
        keras_coatnet.export(plain, own, overwrite=True)
    assert (file.read_text(), (own / "thesis.txt").read_text()) == ("mine", "mine")
    keras_coatnet.export(plain, file, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.tflite", "own"]
    told = capsys.readouterr()
    assert told.out == "" and "LiteRT: verifying on 8 random patterns" in told.err


@pytest.mark.slow
def test_a_model_that_differs_is_not_written(plain, tmp_path, monkeypatch):
    """A runtime that computes something else, and one that fails."""
    file = tmp_path / "model.tflite"
    file.write_bytes(b"the old one")
    opened = "keras_coatnet.exporting.litert.LiteRTRuntime.open"
    monkeypatch.setattr(
        "keras_coatnet.exporting.export.convert",
        lambda model, task: bool(task.path.write_bytes(b"a new one")),
    )
    for run, message in (
        (lambda images: np.zeros((len(images), 5)), "differs from Keras by"),
        (lambda images: np.full((len(images), 5), np.nan), "differs from Keras by nan"),
    ):
        monkeypatch.setattr(opened, lambda self, path, threads, run=run: (None, run))
        with pytest.raises(ValueError, match=message):
            keras_coatnet.export(plain, file, overwrite=True, verbose=False)
    assert file.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.tflite"]


@pytest.mark.slow
def test_killed_before_the_end_it_leaves_the_old_file(tmp_path):
    code = """
import sys
import keras_coatnet
config = keras_coatnet.CoAtNetConfig((8, 8), (1, 1), layout=("C", "T"), stem_width=8, head_dim=8)
model = keras_coatnet.CoAtNet(config, input_shape=(32, 32, 3), classes=5)
keras_coatnet.export(model, sys.argv[1], overwrite=True, verbose=False)
"""
    file = tmp_path / "model.tflite"
    file.write_bytes(b"the old one")
    command = [sys.executable, "-c", code, str(file)]
    with (tmp_path / "said").open("w") as said:
        process = processes.start(command, said.fileno(), said.fileno())
    written = False
    while process.poll() is None and not written:
        written = any(tmp_path.glob(".model.tflite.*/model.tflite"))
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert written and file.read_bytes() == b"the old one"


def test_a_file_of_another_program_is_said_to_be_that(tmp_path):
    """One that `export` cannot have written: it adds two inputs."""
    kind, names = onnx.TensorProto.FLOAT, ("a", "b", "c")
    *inputs, output = (onnx.helper.make_tensor_value_info(name, kind, [1]) for name in names)
    node = onnx.helper.make_node("Add", names[:2], names[2:])
    graph = onnx.helper.make_graph([node], "sum", inputs, [output])
    opset = [onnx.helper.make_opsetid("", 15)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "s.onnx")
    with pytest.raises(ValueError, match="does not say how it is used, as keras_coatnet.export"):
        keras_coatnet.load_exported(tmp_path / "s.onnx")


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_and_foreign_files(format, tmp_path):
    path = tmp_path / f"model{ENDINGS[format]}"
    if format == "saved_model":
        path.mkdir()
        (path / "saved_model.pb").write_bytes(b"no model")
    else:
        path.write_bytes(b"no model")
    with pytest.raises(ValueError, match=f"cannot be opened as a {FORMATS[format].title} model"):
        keras_coatnet.load_exported(path)


@pytest.mark.slow
def test_images_of_another_shape(plain, tmp_path):
    keras_coatnet.export(plain, tmp_path / "model.tflite", verbose=False)
    loaded = keras_coatnet.load_exported(tmp_path / "model.tflite", threads=1)
    for shape in ((2, 64, 64, 3), (32, 32, 3), (0, 32, 32, 3)):
        with pytest.raises(ValueError, match=r"of shape \(batch, 32, 32, 3\)"):
            loaded.predict(np.zeros(shape))


def test_a_card_survives_json_and_refuses_a_newer_one():
    card = Card("model", (32, None, 3), (2,), True, ImageSettings(32), ((None, "é"), ("n1", "b")))
    assert Card.from_json(card.to_json()) == card
    newer = json.dumps({**json.loads(card.to_json()), "format": 2, "version": "9.0"})
    with pytest.raises(ValueError, match=r"newer version of keras_coatnet, 9\.0"):
        Card.from_json(newer)
    with pytest.raises(ValueError, match="not the fields of Card"):
        Card.from_json('{"format": 1}')


@pytest.mark.slow
def test_onnx_has_a_second_file_for_large_weights(tmp_path, monkeypatch):
    path, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    model = make()
    images = np.random.default_rng(0).uniform(0, 255, (2, *model.input_shape[1:]))
    with monkeypatch.context() as context:
        context.setattr("keras_coatnet.exporting.onnx._MAX_BYTES", 1000)
        report = keras_coatnet.export(model, path, images=images, verbose=False)
        with pytest.raises(ValueError, match=r"quantizes models of up to 2\.1 GB"):
            keras_coatnet.export(model, tmp_path / "8.onnx", quantize="dynamic_int8", verbose=False)
    assert weights.stat().st_mode == path.stat().st_mode
    assert report.size_bytes == path.stat().st_size + weights.stat().st_size
    found = keras_coatnet.load_exported(path).predict(images)
    np.testing.assert_allclose(found, model.predict(images, verbose=0), rtol=1e-4, atol=1e-5)
    keras_coatnet.export(model, path, overwrite=True, verbose=False)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("name", "other"), [("model.xml", "model.bin"), ("model.onnx", "model.onnx.data")]
)
def test_a_file_of_the_weights_name_is_not_written_over(name, other, tmp_path):
    (tmp_path / other).write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match=f"{other} exists"):
        keras_coatnet.export(make(), tmp_path / name, verbose=False)
    assert (tmp_path / other).read_bytes() == b"of somebody else"


def test_every_runtime_fulfills_the_contract():
    from keras_coatnet.exporting.runtime import find_runtime

    assert all(isinstance(find_runtime(name), Runtime) for name in FORMATS)


def test_a_checkpoint_s_name_goes_before_an_exported_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path("coatnet_0_rw_224.sw_in1k")
    folder.mkdir()
    (folder / "saved_model.pb").touch()
    checkpoint = check_weights(folder.name, None)
    assert checkpoint is not None and checkpoint.name == folder.name


# --- The command line --------------------------------------------------------------------------


@pytest.mark.slow
def test_exported_predicted_and_evaluated(tmp_path, capsys, monkeypatch):
    """What a user does who trained a model: weights and classes.txt of a run, out and in again."""
    monkeypatch.chdir(tmp_path)
    model = make()
    model.save_weights("final.weights.h5")
    pathlib.Path("classes.txt").write_text("red\ngreen\nblue\nn01440764\nother\n")
    for number, name in enumerate(["red", "green", "blue", "n01440764", "other"]):
        folder = pathlib.Path("data", name)
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), "uint8")
        Image.fromarray(pixels).save(folder / "1.png")
    common = ["--json", "--crop-pct", "1"]
    call = ["export", "final.weights.h5", "model.onnx", "--images", "data", "--max-images", "3"]
    assert cli.main([*call, *common]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["format"]) == (3, "onnx")
    answers = []
    for source in ("final.weights.h5", "model.onnx"):
        options = ["--model", source, "--json"]
        # The exported file knows the crop, the weights do not.
        options += ["--crop-pct", "1"] if source != "model.onnx" else []
        assert cli.main(["predict", "data", *options]) == 0
        answers.append(json.loads(capsys.readouterr().out)["images"])
    names = {entry["name"] for image in answers[1] for entry in image["top"]}
    assert names == {"red", "green", "blue", "tench", "other"}
    for ours, exported in zip(*answers, strict=True):
        assert [entry["name"] for entry in ours["top"]] == [
            entry["name"] for entry in exported["top"]
        ]
    figures = []
    for source in ("final.weights.h5", "model.onnx"):
        assert cli.main(["evaluate", "--weights", source, "--data", "data", *common]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["top1"] == figures[1]["top1"]
    assert cli.main(call) == 2
    assert "model.onnx exists" in capsys.readouterr().err


def keras_exports() -> list[tuple[str, str, str]]:
    """The rows of the documented table: backend, format and what becomes of it."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "exporting.md").read_text("utf-8")
    (table,) = re.findall(r"tried by: tests/exporting.*?-->\n(.*?)<!-- end", text, re.S)
    return [
        (backend.lower(), format, outcome)
        for backend, format, outcome in re.findall(r'\| (\w+) \| `"(\w+)"` \| (.*) \|', table)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_from_the_other_backends(backend, tmp_path):
    """Our conversion is TensorFlow's, in a process of its own; the verification is not. Keras's own
    exports give what is documented of them."""
    code = """
import json, sys
import keras, keras_coatnet, numpy as np
config = keras_coatnet.CoAtNetConfig((8, 8, 16, 16), (1, 1, 1, 1), stem_width=8, head_dim=8)
model = keras_coatnet.CoAtNet(config, input_shape=(32, 32, 3), classes=5)
path = sys.argv[1] + "/model.tflite"
report = keras_coatnet.export(model, path, verbose=False)
results = {"ours": [report.format, report.max_difference < 1e-4, report.fused]}

@keras.saving.register_keras_serializable()
class Own(keras.layers.Layer):
    def call(self, x):
        return x

if keras.backend.backend() == "jax":
    try:
        own = keras.Sequential([model, Own()])
        keras_coatnet.export(own, sys.argv[1] + "/own.tflite", verbose=False)
    except ValueError as error:
        results["own layer"] = str(error)
images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype("float32")
expected = keras.ops.convert_to_numpy(model(images))
for format, ending in json.loads(sys.argv[2]).items():
    path = f"{sys.argv[1]}/keras{ending}"
    size = 3 if format == "torch" else None
    signature = [keras.InputSpec(dtype="float32", shape=(size, 32, 32, 3), name="images")]
    try:
        model.export(path, format=format, verbose=False, input_signature=signature)
    except Exception as error:
        results[format] = str(error)
        continue
    if format == "torch":
        import torch
        found = torch.export.load(path).module()(torch.from_numpy(images)).detach().numpy()
    else:
        import tensorflow as tf
        loaded = tf.saved_model.load(path)
        found = loaded.serve(images).numpy()
    results[format] = float(np.abs(found - expected).max())
print(json.dumps(results))
"""
    endings = {"tf_saved_model": "", "onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps({**endings, "torch": ".pt2"})],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.pop("ours") == ["litert", True, True]
    if backend == "jax":
        refused = results.pop("own layer")
        assert refused.startswith("The model cannot be loaded in a process of its own")
    documented = {format: outcome for name, format, outcome in keras_exports() if name == backend}
    assert set(documented) == set(results)
    for format, outcome in documented.items():
        if outcome.startswith("works"):
            assert results[format] < 1e-5, (format, results[format])
        else:
            assert outcome.split('"')[1] in results[format], (format, results[format])


# --- Quantized ---------------------------------------------------------------------------------

QUANTIZED = [
    (format, quantize)
    for format, found in FORMATS.items()
    for quantize in found.quantizers
    if quantize is not None
]


@pytest.mark.slow
@pytest.mark.xdist_group("digits")
@pytest.mark.parametrize("format, quantize", QUANTIZED)
def test_quantized_and_true(format, quantize, digits_run, tmp_path):
    """A network that knows digits loses half a point of accuracy at most, and most of its size."""
    model, settings = open_model(digits_run.folder / "final.weights.h5")
    recipe = Recipe.load(digits_run.folder / "recipe.json")
    seen, held_out = open_datasets(recipe.data, **recipe.data_options())
    paths = sorted(pathlib.Path(recipe.data).rglob("*.png"))[::18]
    images = np.stack([load_image(path, **vars(recipe.image_settings())) for path in paths])
    path = tmp_path / f"quantized{ENDINGS[format]}"
    report = keras_coatnet.export(model, path, quantize=quantize, images=images, verbose=False)
    found = evaluate(keras_coatnet.load_exported(path), held_out, recipe.image_settings())
    before, after = digits_run.evaluation.top1, found.top1
    print(f"{format} {quantize}: {before:.2%} -> {after:.2%}, {report.size_bytes} bytes")
    assert found.count == 359 and after >= before - 0.005
    # Of so small a network, the graph and what stays float32 are a good part.
    share = 0.5 if quantize == "float16" else 0.4
    assert report.size_bytes < share * 4 * model.count_params() + 200_000
