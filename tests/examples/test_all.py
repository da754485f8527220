"""What all examples have in common: they answer at once, and tell a mistake in one line."""

from __future__ import annotations

import re

import pytest

from tests.examples import scripts

pytestmark = pytest.mark.tensorflow_only


@pytest.mark.parametrize("name", scripts.NAMES)
def test_help_needs_no_tensorflow(name):
    done = scripts.run(name, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    # On a line of its own, to be copied.
    assert re.search(rf"^ +python examples/{name}\.py [^\n]*$", done.stdout, re.M)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"keras", "keras_coatnet", "numpy", "tensorflow"}


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("quickstart", ["--epochs", "0"], "--epochs must be at least 1. Received: 0"),
        ("quickstart", ["--epochs", "many"], "invalid int value: 'many'"),
        ("quickstart", ["--weights", "imagenet"], "unrecognized arguments: --weights imagenet"),
        ("finetune", [], "required: --images"),
        ("finetune", ["--images", ".", "--model", "CoAtNet9"], "invalid choice: 'CoAtNet9'"),
        ("finetune", ["--images", ".", "--epochs", "0"], "--epochs must be at least 1"),
        (
            "finetune",
            ["--images", ".", "--fine-tune-epochs", "-1"],
            "--fine-tune-epochs at least 0",
        ),
        ("train_loop", [], "required: DATA"),
        ("train_loop", [".", "--batch-size", "all"], "invalid int value: 'all'"),
    ],
)
def test_mistakes_in_a_call(name, arguments, said):
    check_refusal(scripts.run(name, *arguments), name, said)


def test_the_quickstart_hands_images_to_finetune():
    done = scripts.run("quickstart", "--images=.", "--epochs", "0")
    check_refusal(done, "finetune", "--epochs must be at least 1")


def check_refusal(done, name, said):
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{name}.py: error: ") and said in done.stderr


def test_length():
    """A quickstart that has grown is no longer read."""
    assert len((scripts.ROOT / "examples" / "quickstart.py").read_text().splitlines()) < 150
