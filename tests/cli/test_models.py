"""`models`, and what the command says of itself."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

import keras_coatnet
from keras_coatnet.weights.registry import CHECKPOINTS

pytestmark = pytest.mark.tensorflow_only


def test_the_table_of_checkpoints_is_the_registry(call):
    status, output, error_stream = call("models")
    assert status == 0 and error_stream == ""
    title, *lines = output.splitlines()
    assert len(lines) == len(CHECKPOINTS)
    for line, checkpoint in zip(lines, CHECKPOINTS.values(), strict=True):
        cells = re.split(r" {2,}", line)
        side = checkpoint.input_size
        macs = keras_coatnet.count_flops(
            checkpoint.architecture, (side, side, 3), classes=checkpoint.classes
        )
        assert cells[:2] == [checkpoint.name, checkpoint.architecture]
        assert cells[2] == f"{checkpoint.parameters / 1e6:.1f}M"
        assert cells[3:6] == [f"{macs / 1e9:.1f}", str(side), str(checkpoint.classes)]
        accuracies = [checkpoint.top1, checkpoint.top5]
        assert cells[6:8] == ["-" if a is None else f"{a:.2f}" for a in accuracies]
        size = checkpoint.size
        assert cells[8] == ("-" if size is None else f"{size / 1e6:.0f} MB")
        assert cells[9:] == [checkpoint.license, checkpoint.measured_by or "-"]


def test_the_list_of_checkpoints_is_the_registry(call):
    _, output, _ = call("models", "--json")
    entries = json.loads(output)
    assert [entry["name"] for entry in entries] == list(keras_coatnet.checkpoints())
    for entry in entries:
        multiply_adds = entry.pop("multiply_adds")
        expected = json.loads(json.dumps(dataclasses.asdict(CHECKPOINTS[entry["name"]])))
        assert entry == expected
        assert 1e9 < multiply_adds < 1e11


def test_the_architectures_as_table_and_list(call):
    _, output, _ = call("models", "--architectures", "--json")
    entries = json.loads(output)
    assert [entry["name"] for entry in entries] == list(keras_coatnet.architectures())
    named = [name for entry in entries for name in entry["checkpoints"]]
    assert sorted(named) == sorted(keras_coatnet.checkpoints())
    _, output, _ = call("models", "--architectures")
    for line, entry in zip(output.splitlines()[1:], entries, strict=True):
        side = entry["input_size"]
        params = keras_coatnet.count_params(entry["name"], (side, side, 3))
        assert entry["parameters"] == params
        assert line.split()[:2] == [entry["name"], f"{params / 1e6:.1f}M"]
        assert line.split()[3:] == [str(side), str(len(entry["checkpoints"]))]


@pytest.mark.parametrize("arguments", [[], ["predict"], ["models"]])
def test_help_has_examples(call, arguments):
    status, output, error_stream = call(*arguments, "--help")
    assert status == 0 and error_stream == ""
    assert "usage: keras-coatnet" in output and "examples:" in output
    assert max(map(len, output.splitlines())) <= 100


def test_version(call):
    assert call("--version") == (0, f"keras-coatnet {keras_coatnet.__version__}\n", "")
