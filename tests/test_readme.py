"""The README says what is true."""

import inspect
import pathlib
import re
import runpy
import shlex
import sys
import textwrap
import types

import pytest

import keras_coatnet
from keras_coatnet import cli, training

pytestmark = pytest.mark.tensorflow_only

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_table_of_checkpoints_is_the_registry(capsys):
    assert cli.main(["models", "--markdown"]) == 0
    (table,) = re.findall(r"models --markdown -->\n(.*?)<!-- end -->", README, re.S)
    assert table == capsys.readouterr().out


@pytest.mark.parametrize(
    "path, count", [("README.md", 2), ("benchmarks/README.md", 14), ("docs/exporting.md", 2)]
)
def test_tables_are_what_was_measured(path, count, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script, and taken back
    text = (ROOT / path).read_text("utf-8")
    printed = re.findall(r"printed by: (python benchmarks.*?) -->\n(.*?)<!-- end", text, re.S)
    printed += re.findall(r"\$ (python benchmarks/speed.py --compare.*?json)\n(.*?)```", text, re.S)
    assert len(printed) == count
    for command, table in printed:
        _, *arguments = shlex.split(command.replace("\\\n", " "))
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")
        assert table == capsys.readouterr().out, command


def test_table_of_the_paper_is_counted():
    rows = re.findall(r"\| `CoAtNet(\d)` \| ([\d,]+) \| ([\d.]+)G", README)
    assert [number for number, *_ in rows] == list("01234567")
    for number, parameters, operations in rows:
        name = f"coatnet{number}"
        assert int(parameters.replace(",", "")) == keras_coatnet.count_params(name)
        assert float(operations) == round(keras_coatnet.count_flops(name) / 1e9, 2)


def test_every_command_is_in_a_block_of_its_own():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert blocks == [
        'pip install ".[examples]" && python examples/quickstart.py\n',
        'pip install ".[test]" && pytest\n',
    ]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_training_from_python(monkeypatch):
    """The lines under "From Python:"; the run itself is replaced."""
    (code,) = re.findall(r"From Python:\n\n((?: {4}.*\n|\n)+)", README)
    run, runs = inspect.signature(training.train), []

    def train(*args):
        runs.append(run.bind(*args).arguments)
        return types.SimpleNamespace(summary=lambda: "top1 1.0")

    monkeypatch.setattr(training, "train", train, raising=False)
    exec(compile(textwrap.dedent(code), "README.md", "exec"), {})
    recipe = runs[0]["recipe"]
    assert (recipe.data, recipe.weights) == ("flowers/", "coatnet_0_rw_224.sw_in1k")
    assert runs[0]["output"] == "runs/flowers"
    assert recipe.model == "coatnet_0_rw_224"


@pytest.mark.slow
def test_code_runs(monkeypatch):
    """The example, with what it would download replaced by random weights."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    used = []

    def untrained(weights, **arguments):
        used.append(weights)
        return keras_coatnet.CoAtNet("coatnet_0_rw_224", input_shape=(64, 64, 3), **arguments)

    monkeypatch.setattr(keras_coatnet, "CoAtNet0", untrained)
    exec(compile(code, "README.md", "exec"), {})
    assert used == ["imagenet", "imagenet"]
