"""`train` and `evaluate` on the command line: whole runs as processes, mistakes in this process."""

from __future__ import annotations

import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from keras_coatnet import CoAtNet, cli
from keras_coatnet.labels import class_names
from keras_coatnet.training.recipe import Recipe
from keras_coatnet.training.run.log import read_history
from tests import processes, timm_models
from tests.hub_server import HubServer
from tests.training import runs, tars

pytestmark = pytest.mark.tensorflow_only

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments: object, env: dict | None = None) -> subprocess.CompletedProcess:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "keras_coatnet", *map(str, arguments)]
    if env is None:
        return processes.run(command, cwd=ROOT)
    # The client of Hugging Face's hub reads its environment when it is imported.
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny) -> pathlib.Path:
    """A network's configuration as a file."""
    path = tmp_path_factory.mktemp("network") / "small.json"
    path.write_text(json.dumps(tiny.replace(depths=(1, 1, 1, 1)).to_dict()))
    return path


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> pathlib.Path:
    """ImageNet's two tars, with few images."""
    folder = tmp_path_factory.mktemp("imagenet")
    tars.write_imagenet(folder, train=16, validation=6)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, imagenet, small):
    """The paper's recipe on the real builder's data, from the command line."""
    output = tmp_path_factory.mktemp("runs") / "small"
    done = run(
        *("train", "in1k_pretrain", "--model", small, "--data-dir", imagenet, "--output", output),
        *("--image-size", 32, "--batch-size", 16, "--epochs", 40, "--learning-rate", 5e-3),
        *("--evaluation-epochs", 20, "--log-steps", 10, "--dtype-policy", "float32"),
        *("--randaugment-num-ops", 0, "--stochastic-depth", 0, "--warmup", 0.05),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done


@pytest.mark.slow
def test_imagenet_is_trained_and_evaluated_from_the_command_line(trained, imagenet):
    output, done = trained
    assert re.search("^epochs +40$", done.stdout, re.MULTILINE)  # the effective recipe
    assert "images/s" in done.stdout and "best top1" in done.stdout  # the summary
    assert "images/s" in done.stderr and "left" in done.stderr  # the progress
    files = {path.name for path in output.iterdir()}
    assert files >= {
        "recipe.json",
        "classes.txt",
        "history.csv",
        "evaluations.csv",
        "tensorboard",
        "curves.png",
        "confusion.png",
        "per_class.csv",
        "summary.json",
        "checkpoints",
        "best.weights.h5",
        "final.weights.h5",
    }
    recipe = Recipe.load(output / "recipe.json")
    assert (recipe.epochs, recipe.learning_rate, recipe.mixup) == (40, 5e-3, 0.8)
    history, evaluations = read_history(output)
    steps = [row["step"] for row in history]
    assert steps == [*range(10, steps[-1] + 1, 10)] and history[-1]["epoch"] == 40
    assert len(evaluations) == 2
    assert evaluations[-1]["validation_top1"] > 0.3  # of a thousand classes

    again = run("evaluate", "--run", output, "--data-dir", imagenet, "--json")
    assert again.returncode == 0, again.stderr[-3000:]
    figures = json.loads(again.stdout)
    assert figures["top1"] == pytest.approx(evaluations[-1]["validation_top1"])
    assert figures["loss"] == pytest.approx(evaluations[-1]["validation_loss"], rel=1e-4)

    table = run(
        *("evaluate", "--weights", output / "final.weights.h5", "--data", "imagenet2012"),
        *("--data-dir", imagenet, "--crop-pct", recipe.crop_pct, "--classes", 3),
        *("--output", output / "evaluation"),
    )
    assert table.returncode == 0, table.stderr[-3000:]
    assert f"{figures['top1']:.4f}" in table.stdout
    assert (output / "evaluation" / "confusion.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_complete_run_is_not_trained_again(trained, imagenet, small):
    output, done = trained
    before = (output / "history.csv").read_bytes(), (output / "evaluations.csv").read_bytes()
    command = [*done.args[2:]]
    again = run(*command[1:])
    assert again.returncode == 0, again.stderr[-3000:]
    assert before == (
        (output / "history.csv").read_bytes(),
        (output / "evaluations.csv").read_bytes(),
    )


@pytest.mark.slow
def test_a_checkpoint_of_the_registry_is_evaluated_as_timm_would(tmp_path):
    """Randomized weights of the real name and size, fetched from a hub of this machine."""
    name = "coatnet_nano_rw_224.sw_in1k"
    model = timm_models.random_model("coatnet_nano_rw_224", 224)
    path = pathlib.Path(timm_models.save(model, tmp_path / "model.safetensors"))
    synsets = [identifier for identifier, _ in class_names(1000)]
    chosen = {synsets[index]: 2 for index in (3, 500, 998)}
    folder = tars.write_classes(tmp_path / "val", chosen, suffix=".jpg", size=(300, 260))
    timm = timm_models.import_timm()
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    hits, losses = [], []
    from PIL import Image

    for file in sorted(folder.rglob("*.jpg")):
        pixels = transform(Image.open(file).convert("RGB")).numpy().transpose(1, 2, 0)
        logits = np.asarray(timm_models.logits(model, pixels[None]), "float64")[0]
        label = synsets.index(file.parent.name)
        hits.append(label in np.argsort(-logits)[:5])
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    with HubServer() as hub:
        hub.add_model(f"timm/{name}", "model.safetensors", path.read_bytes())
        done = run(
            *("evaluate", "--weights", name, "--data", folder, "--json", "--batch-size", 4),
            env=hub.environment(tmp_path / "home"),
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["count"] == 6
    assert found["top5"] == pytest.approx(np.mean(hits))
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.filterwarnings("ignore:GasHisSDB/160 has")  # a few images, where many are published
@pytest.mark.slow
def test_gashissdb_is_trained_and_evaluated(capsys, tmp_path):
    """The recipe names the class that precision and F1 are about, and what others report."""
    tars.write_gashissdb(tmp_path / "data", {"Abnormal": 20, "Normal": 20})
    (tmp_path / "model.json").write_text(json.dumps(runs.CONFIG.to_dict()))
    where = ("--data-dir", str(tmp_path / "data"))
    options = ("--image-size", "32", "--batch-size", "8", "--epochs", "2", "--log-steps", "1")
    output = ("--output", str(tmp_path / "run"))
    options += ("--model", str(tmp_path / "model.json"))
    assert cli.main(["train", "gashissdb", *where, *options, *output]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(tmp_path / "run"), *where, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["positive_class"] == "Abnormal" and found["count"] == 8
    for name in ("accuracy", "f1", "precision"):
        assert found[name] == (None if math.isnan(summary[name]) else summary[name])
    cli.main(["train", "--list"])
    assert "accuracy 98.74, F1 99.38, precision 99.97" in capsys.readouterr().out


def mistake(capsys, *arguments: object) -> str:
    """What the command line says of a mistake: one line."""
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as end:  # of arguments that do not parse
        status = end.code
    assert status not in (0, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("keras-coat")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def damaged(tmp_path) -> pathlib.Path:
    """A file of weights that is there, and is refused as soon as somebody opens it."""
    path = tmp_path / "damaged.keras"
    path.write_bytes(b"no model")
    return path


@pytest.fixture
def flowers(tmp_path) -> pathlib.Path:
    return tars.write_classes(tmp_path / "flowers", {"rose": 6, "tulip": 6})


def test_folders_that_cannot_be_learnt(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    one = tars.write_classes(tmp_path / "one", {"rose": 3})
    for data, expected in (
        (tmp_path / "empty", "empty"),
        (one, "class"),
        (tmp_path / "missing", "missing"),
    ):
        line = mistake(capsys, "train", "transfer", "--data", data, "--output", tmp_path / "run")
        assert expected in line and str(data) in line
        assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_network")
def test_a_missing_data_set_is_told_at_once(capsys, tmp_path):
    line = mistake(
        capsys, "train", "in1k_pretrain", "--data-dir", tmp_path, "--output", tmp_path / "run"
    )
    assert "ILSVRC2012_img_train.tar" in line and f"{tmp_path}/downloads/manual" in line
    assert "image-net.org" in line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["in1k_pretrain", "--model", "coatnet7"], "'in1k_pretrain' has no values for the model"),
        (["in2k"], "There is no recipe 'in2k'"),
        ([], "Which recipe?"),
        (["transfer", "--model", "coatnet9"], "one of: coatnet0"),
        (["transfer"], "names no data"),
        (["transfer", "--batch-size", "0"], "`batch_size` must be at least 1"),
        (["transfer", "--data", "no_such_data_set"], "no_such_data_set"),
        (["transfer", "--strategy", "magic"], "strategy"),
    ],
)
def test_calls_that_make_no_sense(capsys, arguments, expected, tmp_path, flowers):
    if "--strategy" in arguments:
        arguments = [*arguments, "--data", flowers, "--batch-size", 4]
    line = mistake(capsys, "train", *arguments, "--output", tmp_path / "run")
    assert expected in line


def test_a_batch_that_the_devices_do_not_divide(capsys, tmp_path, flowers, small):
    line = mistake(
        capsys,
        *("train", "transfer", "--model", small, "--data", flowers, "--output", tmp_path / "run"),
        *("--batch-size", 8, "--gradient-accumulation-steps", 3, "--image-size", 32),
    )
    assert (
        "A batch of 8 cannot be divided among 1 device times gradient_accumulation_steps=3" in line
    )


def test_a_batch_that_the_data_cannot_fill(capsys, tmp_path, flowers):
    line = mistake(
        capsys,
        "train",
        "transfer",
        "--data",
        flowers,
        "--batch-size",
        64,
        "--output",
        tmp_path / "run",
    )
    assert "fewer than a batch of 64" in line


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--mixup", 0.001, "`mixup` must be 0 (none), or 0.01 to 100"),
        ("--cutmix", 200, "`cutmix` must be 0 (none), or 0.01 to 100"),
        ("--label-smoothing", 1, "`label_smoothing` must be at least 0 and below 1"),
        ("--randaugment-num-ops", 17, "`randaugment_num_ops` must be from 0 to 16"),
        ("--randaugment-magnitude", 31, "`randaugment_magnitude` must be from 0 to 30"),
        ("--learning-rate", "inf", "`learning_rate` must be above 0"),
    ],
)
def test_values_out_of_range_are_told_before_the_first_step(
    capsys, tmp_path, flowers, small, option, value, expected
):
    line = mistake(
        capsys,
        *("train", "transfer", "--model", small, "--data", flowers, "--output", tmp_path / "run"),
        *("--batch-size", 4, "--image-size", 32, option, value),
    )
    assert expected in line and str(value) in line
    assert not (tmp_path / "run").exists()  # or the right value would be refused in that folder


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--batch-size", 6, "--gradient-accumulation-steps", 2, "--mixup", 0.8], "has 3 in each"),
        (
            ["--batch-size", 6, "--gradient-accumulation-steps", 4],
            "cannot be divided among 1 device",
        ),
        (["--batch-size", 4, "--weights", "no_such.weights.h5"], "no_such.weights.h5"),
        (["--batch-size", 4, "--strategy", "magic"], "strategy"),
    ],
)
def test_what_needs_no_data_is_told_before_they_are_read(
    capsys, tmp_path, small, options, expected
):
    images = tars.write_classes(tmp_path / "images", {"rose": 3})
    (images / "tulip").mkdir()  # without images, which shows when the data are read
    line = mistake(
        capsys,
        *("train", "transfer", "--model", small, "--data", images),
        *("--output", tmp_path / "run", "--image-size", 32, *options),
    )
    assert expected in line and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_warning_is_a_line(tmp_path, damaged):
    flowers = tars.write_classes(tmp_path / "flowers", {"rose": 1, "tulip": 1})
    (flowers / "rose" / "notes.txt").touch()
    done = run("evaluate", "--weights", damaged, "--data", flowers)
    (line,) = (line for line in done.stderr.splitlines() if "notes.txt" in line)
    assert line.startswith("keras-coatnet: warning: 1 files below")
    assert "warnings.warn" not in done.stderr


@pytest.mark.parametrize("positive, classes", [("Rose", 2), ("rose", 3)])
def test_a_positive_class_that_there_is_not_is_told_before_the_first_step(
    capsys, tmp_path, small, damaged, positive, classes
):
    names = {name: 4 for name in ("rose", "tulip", "daisy")[:classes]}
    flowers = tars.write_classes(tmp_path / "flowers", names)
    line = mistake(
        capsys,
        *("train", "transfer", "--model", small, "--data", flowers, "--output", tmp_path / "run"),
        *("--batch-size", 4, "--image-size", 32, "--positive", positive),
    )
    assert f"positive='{positive}'" in line and not (tmp_path / "run").exists()
    line = mistake(
        capsys,
        *("evaluate", "--weights", damaged, "--data", flowers, "--positive", positive),
    )
    assert f"positive='{positive}'" in line  # before the model is opened


@pytest.mark.slow
def test_the_positive_one_of_two_classes_of_imagenet(capsys, tmp_path, tiny):
    """All of ImageNet's classes are meant at first, two when the model turns out to know two."""
    images = tars.write_classes(tmp_path / "two", {"n01440764": 4, "n02102040": 4})
    model = CoAtNet(tiny, input_shape=(32, 32, 3), classes=2)
    model.save(tmp_path / "two.keras")
    command = ("evaluate", "--weights", tmp_path / "two.keras", "--data", images, "--json")
    assert cli.main([*map(str, command), "--positive", "n01440764"]) == 0
    assert json.loads(capsys.readouterr().out)["positive_class"] == "n01440764"
    line = mistake(capsys, *command, "--positive", "tench")
    assert "one of 'n01440764', 'n02102040', or 0 or 1. Received: positive='tench'" in line


def test_without_matplotlib_nothing_begins(capsys, tmp_path, small, flowers, damaged, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    line = mistake(
        capsys,
        *("train", "transfer", "--model", small, "--data", flowers, "--output", tmp_path / "run"),
        *("--batch-size", 4, "--image-size", 32),
    )
    assert 'pip install "keras-coatnet[training]"' in line and not (tmp_path / "run").exists()
    line = mistake(
        capsys,
        *("evaluate", "--weights", damaged, "--data", flowers, "--output", tmp_path / "e"),
    )
    assert 'pip install "keras-coatnet[training]"' in line and not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "train",
            "transfer",
            "--data",
            "flowers",
            "--batch-size",
            4,
            "--output",
            "gs://bucket/run",
        ],
        ["train", "transfer", "--data", "gs://bucket/flowers", "--output", "run"],
        ["train", "transfer", "--data", "cifar10", "--data-dir", "s3://b/d", "--output", "run"],
        ["train", "transfer", "--weights", "gs://b/a.weights.h5", "--data", "flowers"],
        ["train", "transfer", "--weights", "gs://b/a", "--data", "flowers"],
        ["train", "gs://bucket/recipe.json", "--data", "flowers"],
        ["train", "transfer", "--model", "gs://bucket/model.json", "--data", "flowers"],
        ["evaluate", "--weights", "x.keras", "--data", "gs://bucket/flowers"],
        ["evaluate", "--weights", "x.keras", "--data", "flowers", "--output", "hdfs://host/found"],
        ["evaluate", "--weights", "https://host/x.keras", "--data", "flowers"],
        ["evaluate", "--run", "gs://bucket/run"],
        ["predict", "https://host/cat.jpg"],
        ["predict", "flowers", "--model", "gs://bucket/x.keras"],
        ["predict", "flowers", "--model", "gs://bucket/x"],
        ["predict", "flowers", "--labels", "gs://bucket/labels.txt"],
    ],
)
def test_remote_addresses_are_refused_by_name(capsys, tmp_path, flowers, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (address,) = (argument for argument in map(str, arguments) if "://" in argument)
    line = mistake(capsys, *arguments)
    assert "must be a path on this machine" in line and f"'{address}'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["flowers"]


def test_options_that_do_not_parse_end_with_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "transfer", "--epochs", "many"])
    assert stopped.value.code == 2
    assert "--epochs: invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--weights", "coatnet_0_rw_224.sw_in1k"], "Give --data"),
        (["--run", "nowhere"], "not the folder of a run"),
    ],
)
def test_evaluations_that_make_no_sense(capsys, arguments, expected):
    assert expected in mistake(capsys, "evaluate", *arguments)


@pytest.mark.slow
def test_a_model_of_other_classes_is_not_evaluated(capsys, tmp_path, flowers, tiny):
    CoAtNet(tiny, input_shape=(32, 32, 3), classes=5).save_weights(tmp_path / "a.weights.h5")
    line = mistake(capsys, "evaluate", "--weights", tmp_path / "a.weights.h5", "--data", flowers)
    assert "5 classes" in line and "has 2" in line


def test_every_recipe_is_listed_and_every_field_is_an_option(capsys):
    assert cli.main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in ("in1k_pretrain", "jft_finetune", "transfer", "gashissdb"):
        assert f"{name}\n" in listed
    for field in Recipe().to_dict():
        if field != "name":
            assert f"--{field.replace('_', '-')}" in shown


def test_overrides_reach_the_effective_recipe(capsys):
    cli.main(
        "train in1k_pretrain --ema-momentum 0.99 --no-flip --global-clipnorm none "
        "--batch-size 2048 --dry-run".split()
    )
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    expected = {
        "ema_momentum": "0.99",
        "flip": "False",
        "global_clipnorm": "None",
        "learning_rate": "0.0005",
    }
    assert {name: shown[name] for name in expected} == expected
