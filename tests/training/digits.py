"""Handwritten digits, and a small network that learns them."""

from __future__ import annotations

import json
import pathlib

import keras_coatnet
from keras_coatnet.training import Recipe, train
from keras_coatnet.training.run.result import Result

# The quickstart's: two stages of convolutions, one with attention.
SMALL = keras_coatnet.CoAtNetConfig(
    widths=(32, 64, 128),
    depths=(1, 1, 1),
    layout=("C", "C", "T"),
    stem_width=32,
    batch_norm_momentum=0.9,  # few steps: the moving statistics have to keep up
)


def write_digits(
    root: pathlib.Path, digits: range, which: slice = slice(None), negative: bool = False
) -> pathlib.Path:
    """Writes some of each of scikit-learn's handwritten digits, as `root/<digit>/<number>.png`."""
    from PIL import Image, ImageOps
    from sklearn.datasets import load_digits

    data = load_digits()
    for digit in digits:
        (root / str(digit)).mkdir(parents=True)
        for number, pixels in enumerate(data.images[data.target == digit][which]):
            image = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
            # With a margin, which random crops may take away.
            image = ImageOps.expand(image.resize((32, 32), Image.Resampling.BICUBIC), 4)
            image = ImageOps.invert(image) if negative else image
            image.save(root / str(digit) / f"{number:03d}.png")
    return root


def save_config(config: keras_coatnet.CoAtNetConfig, path: pathlib.Path) -> str:
    path.write_text(json.dumps(config.to_dict()))
    return str(path)


DIGITS = Recipe(
    name="digits",
    image_size=32,
    epochs=20,
    batch_size=32,
    learning_rate=2e-3,
    minimum_learning_rate=2e-5,
    warmup=0.1,
    ema_momentum=0.99,
    crop_area=0.6,
    flip=False,
    crop_pct=1.0,
    evaluation_epochs=100,
)


def train_on_digits(folder: pathlib.Path) -> Result:
    """Trains in `run/` of a folder on all digits, in `data/`, of which a fifth is held out."""
    data = write_digits(folder / "data", range(10))
    recipe = DIGITS.replace(model=save_config(SMALL, folder / "small.json"), data=str(data))
    return train(recipe, folder / "run")
