"""Writes a prepared model in a format, which only TensorFlow's backend can do for all of them.

On another backend it is done in a process of its own, which this module is the start of:
`python -m keras_coatnet.exporting.conversion FOLDER`. The weights are the same on all backends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_coatnet.exporting.card import Card
from keras_coatnet.exporting.formats import FORMATS
from keras_coatnet.exporting.preparation import fuse_all
from keras_coatnet.exporting.runtime import find_runtime


@dataclasses.dataclass(frozen=True)
class Task:
    """A format that a model is to be written in.

    Attributes:
        format: the format's name.
        path: the file or folder to write, which does not exist.
        card: the model's card.
        calibration: images to measure ranges on; None unless the card says `"int8"`.
    """

    format: str
    path: pathlib.Path
    card: Card
    calibration: np.ndarray | None = None


def convert(model: keras.Model, task: Task) -> bool:
    """Writes a model, fused where that is faster.

    Args:
        model: a prepared model, see `preparation.prepare`.
        task: how to write it.

    Returns:
        Whether a CoAtNet was fused.

    Raises:
        ValueError: the model cannot be written in the format.
    """
    if keras.backend.backend() != "tensorflow":
        (answer,) = convert_in_process(model, [task])
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer
    is_fused = False
    # A fully quantized network is always fused: operations of its layers keep their names then.
    if FORMATS[task.format].fuses or task.card.quantize == "int8":
        model, is_fused = fuse_all(model)
    try:
        find_runtime(task.format).write(model, task.path, task.card, task.calibration)
    except ValueError:
        raise
    except Exception as error:  # each converter has errors of its own, some of many lines
        raise ValueError(
            f"{model.name!r} cannot be written as a {FORMATS[task.format].title} model: "
            f"{type(error).__name__}: {error!s:.300}"
        ) from error
    return is_fused


def convert_in_process(model: keras.Model, tasks: Sequence[Task]) -> list[bool | str]:
    """Writes a model in several formats, in a process of its own whose backend is TensorFlow.

    Args:
        model: a prepared model.
        tasks: how to write it.

    Returns:
        For each task whether a CoAtNet was fused; or, a text, why it failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model.save(folder / "model.keras")
        described = []
        for number, task in enumerate(tasks):
            if task.calibration is not None:
                np.save(folder / f"calibration-{number}.npy", task.calibration)
            path = os.fspath(task.path.absolute())
            described.append({"format": task.format, "path": path, "card": task.card.to_json()})
        (folder / "tasks.json").write_text(json.dumps(described))
        environment = {
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__, name], env=environment, capture_output=True, text=True
        )
        file = folder / "answers.json"
        answers = json.loads(file.read_text()) if file.is_file() else []
        if len(answers) < len(tasks):
            said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            why = f"{model.name!r} could not be written in TensorFlow's process: {said[-1]}"
            answers += [why] * (len(tasks) - len(answers))
        return answers


def main(folder: pathlib.Path) -> None:
    """Does what `convert_in_process` asks for in a folder, and writes the answers there.

    Args:
        folder: holds `model.keras`, `tasks.json`, and images to calibrate with where they are
            needed.
    """
    answers = []
    for number, described in enumerate(json.loads((folder / "tasks.json").read_text())):
        file = folder / f"calibration-{number}.npy"
        task = Task(
            described["format"],
            pathlib.Path(described["path"]),
            Card.from_json(described["card"]),
            np.load(file) if file.is_file() else None,
        )
        try:
            answers.append(convert(_load(folder / "model.keras"), task))
        except ValueError as error:
            answers.append(str(error))
        # After each, should the next take all memory.
        (folder / "answers.json").write_text(json.dumps(answers))


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
