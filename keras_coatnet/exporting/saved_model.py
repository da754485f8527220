"""SavedModel: a folder that TensorFlow and TensorFlow Serving load, without Keras."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_coatnet.exporting.card import CARD, Card
from keras_coatnet.exporting.runtime import Runner, Runtime, read_card, serving_module

if TYPE_CHECKING:
    import keras

# TensorFlow leaves this folder of a SavedModel to others.
_CARD_FILE = pathlib.Path("assets.extra", f"{CARD}.json")

_TOP = 5  # how many classes `serve_images` names


class SavedModelRuntime(Runtime):
    """Writes two endpoints: `serve`, for pixels, and `serve_images`, for encoded images."""

    def write(
        self,
        model: keras.Model,
        path: pathlib.Path,
        card: Card,
        calibration: np.ndarray | None,
    ) -> None:
        import tensorflow as tf

        from keras_coatnet.exporting.pixels import decode_and_prepare

        settings, names = card.image_settings, [name for _, name in card.classes or ()]

        def serve_images(encoded: Any) -> dict[str, Any]:
            assert settings is not None
            images = decode_and_prepare(encoded, settings)
            scores = model(images, training=False)
            if card.is_logits:
                scores = tf.nn.softmax(scores)
            found = tf.math.top_k(scores, min(_TOP, len(names)))
            return {
                "classes": found.indices,
                "labels": tf.gather(tf.constant(names), found.indices),
                "probabilities": found.values,
            }

        module = serving_module(model)
        signatures = {"serve": module.serve, "serving_default": module.serve}
        if names and settings is not None:
            encoded = tf.TensorSpec([None], tf.string, name="encoded")
            module.serve_images = tf.function(serve_images, [encoded], autograph=False)
            signatures["serve_images"] = module.serve_images
        tf.saved_model.save(module, str(path), signatures)
        (path / _CARD_FILE).parent.mkdir()
        (path / _CARD_FILE).write_text(card.to_json())

    def open(self, path: pathlib.Path, threads: int | None) -> tuple[Card, Runner]:
        import tensorflow as tf

        file = path / _CARD_FILE
        card = read_card(file.read_text() if file.is_file() else None)
        loaded: Any = tf.saved_model.load(str(path))

        def run(images: np.ndarray) -> np.ndarray:
            return loaded.serve(images).numpy()

        return card, run
