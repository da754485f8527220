"""The start of the command: what needs no Keras answers without it, and the rest works as ever."""

from __future__ import annotations

import configparser
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import keras_coatnet
from keras_coatnet import cli

pytestmark = pytest.mark.tensorflow_only

ROOT = pathlib.Path(__file__).parents[2]

# None of these may be imported by a command that needs no network.
HEAVY = ["keras", "tensorflow", "jax", "torch", "matplotlib", "tensorflow_datasets"]
HEAVY += ["huggingface_hub", "scipy", "pandas"]

# Other work on the machine adds to a time and takes nothing off: the least of a few tries counts.
MAX_TRIES = 5

# The share of a call's time that is left for what follows the start of Python.
ROOM = 0.6

# What every start takes: the processor time of Python, NumPy and Pillow.
BARE_START = """
import argparse, dataclasses, json, resource, numpy, PIL.Image

used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""

# What pip writes into the installed command.
INSTALLED = "import sys; from keras_coatnet_command import main; sys.exit(main())"

# The same, and a line on what it took.
ONE_CALL = f"""
import atexit, json, resource, sys

def report():
    used = resource.getrusage(resource.RUSAGE_SELF)
    imported = sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY}))
    package = vars(sys.modules["keras_coatnet"])
    took = [used.ru_utime + used.ru_stime, imported, "CoAtNet" in package]
    print(json.dumps(took), file=sys.stderr)

atexit.register(report)
{INSTALLED}
"""

# The same for a list of calls, one after the other in one process.
MANY_CALLS = f"""
import contextlib, io, json, sys, time
from keras_coatnet_command import main

answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["keras-coatnet", *arguments]
    output, errors, began = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = main()
        except SystemExit as end:
            status = end.code
    answers.append({{
        "status": status,
        "output": output.getvalue(),
        "errors": errors.getvalue(),
        "seconds": time.process_time() - began,
        "imported": sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY})),
    }})
json.dump(answers, sys.stdout)
"""


def start(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Runs code in a process that imported nothing."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def max_seconds() -> float:
    """Half a second of processor time; more on a machine where a bare start takes over 0.1 s."""
    bare = min(float(start(BARE_START).stdout) for _ in range(MAX_TRIES))
    return max(0.5, 5 * bare)


def test_the_installed_command_is_this_start():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"].strip()
    assert scripts == "keras-coatnet = keras_coatnet_command:main"
    assert setup["options"]["py_modules"] == "keras_coatnet_command"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--help"], "usage: keras-coatnet"),
        (["--version"], f"keras-coatnet {keras_coatnet.__version__}\n"),
        (["models"], "coatnet_0_rw_224.sw_in1k"),
        (["models", "--architectures", "--json"], '"coatnet7_dw"'),
        (["train", "--help"], "--gradient-accumulation-steps"),
        (["train", "--list"], "in21k_finetune_150\n"),
        (["train", "in1k_pretrain", "--batch-size", "512", "--dry-run"], "0.000125"),
        (["export", "--help"], "--quantize"),
        (["benchmark", "--help"], "--runtimes"),
        (["predict", "no_such_image.jpg"], "no_such_image.jpg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_answers_at_once(arguments, expected, max_seconds):
    done = start(ONE_CALL, *arguments)
    *errors, took = done.stderr.splitlines()
    seconds, imported, whole = json.loads(took)
    assert done.returncode == (2 if "predict" in arguments else 0), done.stderr
    assert expected in done.stdout + "\n".join(errors)
    assert imported == [] and not whole
    for _ in range(MAX_TRIES - 1):
        if seconds < max_seconds:
            break
        again = start(ONE_CALL, *arguments).stderr.splitlines()[-1]
        seconds = min(seconds, json.loads(again)[0])
    assert seconds < max_seconds


WEIGHTS = ["--weights", "coatnet_0_rw_224.sw_in1k"]
MISTAKES = {
    # Of `export`.
    "format": (["export", "m.keras", "m.h5"], "does not end like a file of any format"),
    "ending": (["export", "m.keras", "m.onnx", "--format", "litert"], r"must end in \.tflite"),
    "quantize": (["export", "m.keras", "served", "--quantize", "int8"], "SavedModel models cannot"),
    "calibration": (["export", "m.keras", "m.tflite", "--quantize", "int8"], "needs --images"),
    "exists": (["export", "m.keras", "a.png", "--format", "saved_model"], "a.png exists"),
    "exported": (["export", "m.tflite", "m.onnx"], "m.tflite is exported already"),
    "no export": (["predict", "a.png", "--model", "m.tflite"], "no file or folder m.tflite"),
    # Of `benchmark`.
    "network to time": (["benchmark", "--model", "coatnet9"], "coatnet9"),
    "runtime": (["benchmark", "--runtimes", "tensorrt"], "'tensorrt' .choose from 'keras'"),
    "no quantization": (
        ["benchmark", "--runtimes", "saved_model", "--quantize", "int8"],
        "None of the runtimes has quantize='int8': saved_model",
    ),
    "size": (["benchmark", "--input-size", "31"], "--input-size: must be .* at least 32"),
    # Calls that argparse refuses.
    "no command": ([], "COMMAND"),
    "unknown command": (["predcit"], "predcit"),
    "no image": (["predict"], "IMAGE"),
    "top": (["predict", "a.png", "--top", "0"], "--top.*at least 1, not '0'"),
    "batch": (["evaluate", *WEIGHTS, "--batch-size", "0"], "--batch-size.*at least 1, not '0'"),
    "rows": (["evaluate", *WEIGHTS, "--classes=-1"], "--classes.*at least 0, not '-1'"),
    "limit": (["evaluate", *WEIGHTS, "--unreadable-limit", "x"], "--unreadable-limit.*not 'x'"),
    "crop mode": (["predict", "a.png", "--crop-mode", "border"], "border"),
    "epochs": (["train", "transfer", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
    "schedule": (["train", "transfer", "--schedule", "up"], "--schedule: invalid choice: 'up'"),
    "strategy": (["train", "transfer", "--strategy", "magic"], "--strategy: .*'magic'.*mirrored"),
    "devices": (["train", "transfer", "--devices", "0"], "--devices: .*at least 1, not '0'"),
    "two subjects": (["evaluate", *WEIGHTS, "--run", "run"], "not allowed with"),
    "no subject": (["evaluate", "--data", "flowers"], "--weights --run is required"),
    "models": (["models", "coatnet0"], "coatnet0"),
    # predict
    "missing image": (["predict", "no.png"], "There is no file or folder no.png"),
    "empty folder": (["predict", "empty"], "no image in the folder empty"),
    "remote image": (["predict", "https://host/a.png"], "must be a path on this machine"),
    "missing labels": (["predict", "a.png", "--labels", "no.txt"], "labels in no.txt cannot be"),
    "gap in labels": (["predict", "a.png", "--labels", "gap.txt"], "Line 2 of the labels"),
    "few labels": (
        ["predict", "a.png", "--labels", "two.txt"],
        "gives 2 names, and the model has 1000",
    ),
    "crop share": (["predict", "a.png", "--crop-pct", "2"], "--crop-pct: must be a number above 0"),
    "unknown model": (["predict", "a.png", "--model", "coatnet_0"], "Did you mean.*coatnet_0_rw"),
    "missing model": (["predict", "a.png", "--model", "no.keras"], "no file of that name.*no.ker"),
    "pickle": (["predict", "a.png", "--model", "model.pth"], "weights_only=True"),
    "other file": (["predict", "a.png", "--model", "two.txt"], "A file of weights must end in"),
    "a run": (["predict", "a.png", "--model", "run"], "It holds no weights yet"),
    "remote model": (["predict", "a.png", "--model", "gs://b/x.keras"], "on this machine"),
    "no architecture": (["predict", "a.png", "--model", "foreign.safetensors"], "which network"),
    "unknown architecture": (
        ["predict", "a.png", "--model", "foreign.safetensors", "--architecture", "coatnet99"],
        "coatnet99",
    ),
    "another architecture": (
        ["predict", "a.png", "--architecture", "coatnet0"],
        "is of the architecture 'coatnet_0_rw_224'.*'coatnet0'",
    ),
    # train
    "no recipe": (["train"], "Which recipe"),
    "unknown recipe": (["train", "in2k"], "There is no recipe 'in2k'"),
    "missing recipe": (["train", "no.json"], "There is no file no.json"),
    "recipe's model": (
        ["train", "in1k_pretrain", "--model", "coatnet7"],
        "no values for the model",
    ),
    "network": (["train", "transfer", "--model", "coatnet9", "--data", "flowers"], "one of: coatn"),
    "network's file": (["train", "transfer", "--model", "no.json"], "There is no file no.json"),
    "no data": (["train", "transfer"], "names no data"),
    "field": (["train", "transfer", "--batch-size", "0"], "`batch_size` must be at least 1"),
    "field of a dry run": (["train", "transfer", "--mixup", "1e-3", "--dry-run"], "`mixup` must"),
    "remote output": (["train", "transfer", "--output", "gs://b/run"], "must be a path on this"),
    "remote data": (["train", "transfer", "--data", "gs://b/flowers"], "must be a path on this"),
    "missing data": (["train", "transfer", "--data", "./no"], "no does not exist"),
    "data without folders": (["train", "transfer", "--data", "empty"], "empty is empty"),
    "images alone": (["train", "transfer", "--data", "flowers/rose"], "1 images but no folders"),
    "one class": (["train", "transfer", "--data", "lone/train"], "one class only: 'rose'"),
    "part": (["train", "transfer", "--data", "flowers", "--train-split", "no"], "'no'"),
    "lone part": (["train", "transfer", "--data", "lone"], "has train/ but no second part"),
    "start": (
        ["train", "transfer", "--data", "flowers", "--weights", "no.weights.h5"],
        "no file of that name.*no.weights.h5",
    ),
    "unknown start": (
        ["train", "transfer", "--data", "flowers", "--weights", "coatnet_9"],
        "Unknown weights 'coatnet_9'",
    ),
    "start of another network": (
        ["train", "transfer", "--data", "flowers", *WEIGHTS, "--model", "coatnet0"],
        "belong to the architecture 'coatnet_0_rw_224'",
    ),
    "full output": (
        ["train", "transfer", "--data", "flowers", "--output", "lone"],
        "lone is not empty, and holds no run to go on with",
    ),
    "another run's output": (
        ["train", "transfer", "--data", "flowers", "--output", "run"],
        "run holds another run, with epochs=300",
    ),
    "positive class": (
        ["train", "transfer", "--data", "flowers", "--positive", "daisy"],
        "'rose', 'tulip'.*positive='daisy'",
    ),
    # evaluate
    "positive": (
        ["evaluate", *WEIGHTS, "--data", "flowers", "--positive", "daisy"],
        "'rose', 'tulip'.*positive='daisy'",
    ),
    "no images": (["evaluate", *WEIGHTS], "Give --data"),
    "missing images": (["evaluate", *WEIGHTS, "--data", "./no"], "no does not exist"),
    "missing part": (["evaluate", *WEIGHTS, "--data", "flowers", "--split", "no"], "'no'"),
    "missing weights": (["evaluate", "--weights", "no.h5", "--data", "flowers"], "no.h5"),
    "share": (
        ["evaluate", *WEIGHTS, "--data", "flowers", "--crop-pct", "0"],
        "--crop-pct: must be",
    ),
    "no run": (["evaluate", "--run", "no"], "not the folder of a run"),
    "run that goes on": (["evaluate", "--run", "run"], "holds no final.weights.h5"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory, max_seconds) -> dict[str, dict]:
    """What is said of each mistake, all in one process; of its seconds, the least of some tries."""
    place = tmp_path_factory.mktemp("mistakes")
    for folder in ("empty", "run", "flowers/rose", "flowers/tulip", "lone/train/rose"):
        (place / folder).mkdir(parents=True)
    for name in ("a.png", "flowers/rose/1.png", "flowers/tulip/1.png", "model.pth"):
        (place / name).touch()
    (place / "run" / "recipe.json").write_text("{}")
    (place / "two.txt").write_text("one\ntwo\n")
    (place / "gap.txt").write_text("one\n\ntwo\n")
    save_file({"stem.conv1.weight": np.ones(3)}, place / "foreign.safetensors")
    calls = json.dumps([arguments for arguments, _ in MISTAKES.values()])
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    answers = []
    for _ in range(MAX_TRIES):
        done = start(MANY_CALLS, cwd=place, input=calls)
        assert done.returncode == 0, done.stderr
        answers, earlier = json.loads(done.stdout), answers
        for answer, before_it in zip(answers, earlier, strict=False):
            answer["seconds"] = min(answer["seconds"], before_it["seconds"])
        if max(answer["seconds"] for answer in answers) < ROOM * max_seconds:
            break
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    return dict(zip(MISTAKES, answers, strict=True))


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = start(INSTALLED, "predict", tmp_path / "nothing.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"keras-coatnet: error: There is no file or folder {tmp_path}/nothing.jpg.\n"
    )


def test_a_reader_that_leaves_early_is_no_error():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", INSTALLED, "models"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.close()
        error_stream = process.stderr.read()
    assert (process.returncode, error_stream) == (0, "")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_at_once_in_one_line(told, mistake, max_seconds):
    answer, (_, message) = told[mistake], MISTAKES[mistake]
    assert re.fullmatch(f"keras-coatnet: error: .*{message}.*\n", answer["errors"])
    assert (answer["status"], answer["output"], answer["imported"]) == (2, "", [])
    assert answer["seconds"] < max_seconds


def test_every_mistake_leaves_room_for_the_start(told, max_seconds):
    """The calls above share one start of Python, which is a fifth of what one may take."""
    assert max(answer["seconds"] for answer in told.values()) < ROOM * max_seconds


@pytest.mark.slow
def test_layers_are_registered_before_a_model_is_opened(tmp_path, tiny, capsys):
    """A whole model from a `.keras` file, as in a process that imported the package."""
    keras.utils.set_random_seed(1)
    model = keras_coatnet.CoAtNet(tiny, input_shape=(32, 32, 3), classes=3)
    outputs = keras_coatnet.layers.LayerScale(3)(model.output)
    outputs = keras.layers.Activation("softmax")(outputs)
    keras.Model(model.input, outputs).save(tmp_path / "own.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), "uint8")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ["predict", str(tmp_path / "a.png"), "--model", str(tmp_path / "own.keras")]
    assert cli.main([*arguments, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)

    done = start(ONE_CALL, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    *_, whole = json.loads(done.stderr.splitlines()[-1])
    assert whole  # all names are there, and so all layers are registered
    found = json.loads(done.stdout)
    shares = [
        {one["name"]: one["score"] for one in answer["images"][0]["top"]}
        for answer in (found, expected)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6) and len(shares[0]) == 3


@pytest.mark.slow
def test_the_package_is_whole_after_the_first_use_of_a_name():
    code = """
import sys
sys.argv = ["keras-coatnet", "models"]
import keras_coatnet_command
assert keras_coatnet_command.main() == 0
import keras_coatnet
assert "keras" not in sys.modules and "CoAtNet" not in vars(keras_coatnet)
from keras_coatnet import CoAtNet0
assert "keras" in sys.modules
assert set(keras_coatnet.__all__) <= set(vars(keras_coatnet))
assert keras_coatnet.CoAtNet0 is CoAtNet0
assert keras_coatnet.layers.__name__ == "keras_coatnet.layers"
assert not hasattr(keras_coatnet, "CoAtNet8")
from keras_coatnet.applications import CoAtNet0 as other
assert other is CoAtNet0
"""
    done = start(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["keras", "tensorflow"])
def test_a_package_that_cannot_be_imported_is_one_line(tmp_path, missing):
    (tmp_path / "a.png").touch()
    (tmp_path / "model.keras").touch()
    code = f"import sys; sys.modules[{missing!r}] = None\n{ONE_CALL}"
    done = start(code, "predict", "a.png", "--model", "model.keras", cwd=tmp_path)
    line, _ = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert line.startswith("keras-coatnet: error: Keras and TensorFlow cannot be imported")
    assert missing in line and "pip install" in line
