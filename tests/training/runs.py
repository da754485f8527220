"""A training run that is as small as one can be, for tests of what happens to runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

import h5py
import numpy as np
from PIL import Image

import keras_coatnet
from keras_coatnet.training.recipe import Recipe

CONFIG = keras_coatnet.CoAtNetConfig(
    widths=(8, 16), depths=(1, 1), layout=("C", "T"), stem_width=8, head_dim=8
)
# Everything that draws random numbers or remembers something is on. 160 of the 200 images are
# trained on, so that an epoch has 10 steps.
RECIPE = Recipe(
    image_size=32,
    epochs=3,
    batch_size=16,
    learning_rate=1e-2,
    warmup=0.1,
    ema_momentum=0.9,
    stochastic_depth=0.2,
    randaugment_num_ops=1,
    randaugment_magnitude=5.0,
    mixup=0.8,
    crop_area=0.5,
    checkpoint_steps=4,
    log_steps=1,
)
IMAGES = 200

# As little as a run can compute, two steps: for what happens around the steps.
SMALL_CONFIG = keras_coatnet.CoAtNetConfig(
    widths=(8,), depths=(1,), layout=("C",), stem_width=8, head_dim=8
)
SMALL_RECIPE = Recipe(
    image_size=32,
    epochs=1,
    batch_size=80,
    learning_rate=1e-3,
    crop="whole",
    flip=False,
    log_steps=1,
)


def write_recipe(
    folder: pathlib.Path,
    base: Recipe = RECIPE,
    config: keras_coatnet.CoAtNetConfig = CONFIG,
    **changes: Any,
) -> pathlib.Path:
    """Writes images, a network's configuration and a recipe; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    data, model, path = folder / "digits", folder / "tiny.json", folder / "digits.json"
    if not data.exists():
        write_digits(data)
    model.write_text(json.dumps(dataclasses.asdict(config)))
    fields = {"name": "digits", "model": str(model), "data": str(data), **changes}
    dataclasses.replace(base, **fields).save(path)
    return path


def write_small_recipe(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """The same for a run of two steps."""
    return write_recipe(folder, SMALL_RECIPE, SMALL_CONFIG, **changes)


def write_digits(folder: pathlib.Path) -> None:
    """scikit-learn's handwritten digits as PNG files of 16 x 16, a folder for each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, label in enumerate(digits.target[:IMAGES]):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[number] * 15.9).astype("uint8"))
        image.resize((16, 16)).convert("RGB").save(place / f"{number:04d}.png")


def command(recipe: pathlib.Path, output: pathlib.Path, *options: str) -> list[str]:
    """The command line that trains."""
    start = [sys.executable, "-m", "keras_coatnet", "train", str(recipe), "--output", str(output)]
    return [*start, *options]


def environment(**more: str) -> dict[str, str]:
    """What such a process is started with."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    return {**os.environ, **quiet, **more}


class Outcome(NamedTuple):
    """All that a run computed; its measured speeds are left out."""

    history: list[dict[str, str]]
    evaluations: list[dict[str, str]]
    final: dict[str, bytes]
    best: dict[str, bytes]


def outcome(folder: pathlib.Path) -> Outcome:
    """Reads what a run wrote: numbers as the text of the files, weights as their bytes."""
    return Outcome(
        _rows(folder / "history.csv"),
        _rows(folder / "evaluations.csv"),
        _weights(folder / "final.weights.h5"),
        _weights(folder / "best.weights.h5"),
    )


def losses(folder: pathlib.Path) -> np.ndarray:
    """The loss of each step."""
    rows = _rows(folder / "history.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return np.array([float(row["loss"]) for row in rows])


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def _weights(path: pathlib.Path) -> dict[str, bytes]:
    found = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(path) as file:
        file.visititems(take)
    return found
