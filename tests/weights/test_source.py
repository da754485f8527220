"""What `weights=` means if a file or a folder has the same name."""

from __future__ import annotations

import pathlib

import pytest
import skimage.data

import keras_coatnet
from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.cli import main
from keras_coatnet.cli.predict import DEFAULT_MODEL
from keras_coatnet.inference import open_model
from keras_coatnet.weights.registry import CHECKPOINTS, WORDS
from keras_coatnet.weights.source import find_source

CAT = pathlib.Path(skimage.data.data_dir) / "chelsea.png"
NAME = "coatnet_0_rw_224.sw_in1k"


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder in which the program runs; nothing is cached, and nothing can be fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.slow
def test_a_folder_called_imagenet_is_ignored(here):
    (here / "imagenet").mkdir()
    with pytest.raises(ValueError, match="is not cached.*HF_HUB_OFFLINE"):
        keras_coatnet.CoAtNet0(include_top=False, input_shape=(32, 32, 3))


@pytest.mark.slow
def test_on_the_command_line_names_take_precedence(here, capsys):
    (here / DEFAULT_MODEL).mkdir()
    assert main(["predict", str(CAT)]) == 2
    assert "is not cached" in capsys.readouterr().err
    (here / "data").mkdir()
    assert main(["train", "transfer", "--weights", NAME, "--data", "data", "--dry-run"]) == 0
    assert "coatnet_0_rw_224" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
@pytest.mark.parametrize("name", [*WORDS[:1], NAME, f"timm/{NAME}", "kecam_coatnet0_224"])
def test_names_take_precedence_over_files(here, name, kind):
    place = here / name
    place.parent.mkdir(exist_ok=True)
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_bytes(b"something else")
    else:
        place.symlink_to("nothing")
    found = find_source(name, list(ARCHITECTURES.values()), "coatnet0", "CoAtNet0")
    assert found.name in CHECKPOINTS and found.name.endswith(name.removeprefix("imagenet")[-20:])


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ("folder", "no file of that name, but a folder.*'folder'"),
        ("folder.keras", "no file of that name, but a folder"),
        (pathlib.Path("imagenet"), "must end in"),  # a path is never a name
        (pathlib.Path("nothing"), "no file of that name"),
        ("none.h5", r"no file of that name\."),
        ("coatnet_0", "Did you mean"),
        ("a" * 5000, "no file of that name: File name too long"),
        ("nul\0byte", "Unknown weights"),
        ("", "`weights` is an empty text"),
    ],
)
def test_neither_a_name_nor_a_file_is_refused(here, weights, match):
    (here / "folder").mkdir()
    (here / "folder.keras").mkdir()
    (here / "imagenet").write_bytes(b"something else")
    for call in (keras_coatnet.CoAtNet0, open_model):
        with pytest.raises(ValueError, match=match):
            call(weights=weights)
