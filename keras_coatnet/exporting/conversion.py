"""Writes a prepared model in a format, which only TensorFlow's backend can do for all of them.

On another backend it is done in a process of its own, which this module is the start of:
`python -m keras_coatnet.exporting.conversion FOLDER`. The weights are the same on all backends.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import keras
import numpy as np

from keras_coatnet.exporting.card import Card
from keras_coatnet.exporting.formats import FORMATS
from keras_coatnet.exporting.preparation import fuse_all
from keras_coatnet.exporting.runtime import find_runtime


def convert(
    model: keras.Model,
    format: str,
    path: pathlib.Path,
    card: Card,
    calibration: np.ndarray | None,
) -> bool:
    """Writes a model, fused where that is faster.

    Args:
        model: a prepared model, see `preparation.prepare`.
        format: the format's name.
        path: the file or folder to write, which does not exist.
        card: the model's card.
        calibration: images to measure ranges on; None unless the card says `"int8"`.

    Returns:
        Whether a CoAtNet was fused.

    Raises:
        ValueError: the model cannot be written in the format.
    """
    if keras.backend.backend() != "tensorflow":
        return _convert_elsewhere(model, format, path, card, calibration)
    is_fused = False
    # A fully quantized network is always fused: operations of its layers keep their names then.
    if FORMATS[format].fuses or card.quantize == "int8":
        model, is_fused = fuse_all(model)
    find_runtime(format).write(model, path, card, calibration)
    return is_fused


def _convert_elsewhere(
    model: keras.Model,
    format: str,
    path: pathlib.Path,
    card: Card,
    calibration: np.ndarray | None,
) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model.save(folder / "model.keras")
        if calibration is not None:
            np.save(folder / "calibration.npy", calibration)
        task = {"format": format, "path": os.fspath(path.absolute()), "card": card.to_json()}
        (folder / "task.json").write_text(json.dumps(task))
        environment = {
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__, name], env=environment, capture_output=True, text=True
        )
        answer = folder / "answer.json"
        if not answer.is_file():
            raise ValueError(
                f"{model.name!r} could not be written in TensorFlow's process: "
                f"{done.stderr.strip().splitlines()[-1:]}"
            )
        found = json.loads(answer.read_text())
        if "error" in found:
            raise ValueError(found["error"])
        return found["is_fused"]


def main(folder: pathlib.Path) -> None:
    """Does what `_convert_elsewhere` asks for in a folder, and writes an answer there.

    Args:
        folder: holds `model.keras`, `task.json` and perhaps `calibration.npy`.
    """
    task = json.loads((folder / "task.json").read_text())
    file = folder / "calibration.npy"
    try:
        model = _load(folder / "model.keras")
        is_fused = convert(
            model,
            task["format"],
            pathlib.Path(task["path"]),
            Card.from_json(task["card"]),
            np.load(file) if file.is_file() else None,
        )
        answer = {"is_fused": is_fused}
    except ValueError as error:
        answer = {"error": str(error)}
    (folder / "answer.json").write_text(json.dumps(answer))


def _load(path: pathlib.Path) -> keras.Model:
    try:
        model: Any = keras.saving.load_model(path, compile=False)
    except Exception as error:  # of any type: Keras passes on what a layer raises
        raise ValueError(
            "The model cannot be loaded in a process of its own, where it is converted by "
            f"TensorFlow: {error}. If it has layers of your own, set KERAS_BACKEND=tensorflow, "
            "load it in a program that defines them, and export it there."
        ) from error
    return model


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
