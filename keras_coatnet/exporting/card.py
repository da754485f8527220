"""The card of an exported model: what its runtime does not know, and travels inside the file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from keras_coatnet.arguments import check_fields
from keras_coatnet.images import ImageSettings
from keras_coatnet.version import __version__

# What the card is called where a format keeps it by name.
CARD = "keras_coatnet"

# The format of a card. A reader refuses a higher number than its own.
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of an exported model.

    Attributes:
        name: the model's name.
        input_shape: (height, width, channels) of an image; None: any.
        output_shape: of one image, without the batch.
        is_logits: whether the outputs are logits; None if unknown.
        image_settings: how images are prepared; None if it does not take RGB images.
        classes: (WordNet id or None, name) of each output; None without a classifier.
        quantize: as of `export`.
        version: the version of keras_coatnet that wrote it.
        format: the format of the card.
    """

    name: str
    input_shape: tuple[int | None, ...]
    output_shape: tuple[int | None, ...]
    is_logits: bool | None = None
    image_settings: ImageSettings | None = None
    classes: tuple[tuple[str | None, str], ...] | None = None
    quantize: str | None = None
    version: str = __version__
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Returns the card as one JSON document, in ASCII."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Card:
        """Reads what `to_json` wrote.

        Args:
            text: the JSON document.

        Raises:
            ValueError: it is no card, or one of a newer version of the package.
        """
        found: Any = json.loads(text)
        written = found.get("format") if isinstance(found, dict) else None
        if isinstance(written, int) and written > FORMAT_VERSION:
            raise ValueError(
                f"it was exported by a newer version of keras_coatnet, {found.get('version')}. "
                f"This is version {__version__}. Upgrade it: pip install -U keras-coatnet"
            )
        check_fields(found, cls)
        settings, classes = found.get("image_settings"), found.get("classes")
        if settings is not None:
            check_fields(settings, ImageSettings)
            found["image_settings"] = ImageSettings(**{**settings, "size": tuple(settings["size"])})
        if classes is not None:
            found["classes"] = tuple((wordnet_id, str(name)) for wordnet_id, name in classes)
        for field in ("input_shape", "output_shape"):
            found[field] = tuple(found[field])
        return cls(**found)


def as_batch(images: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns images as an array that a model takes.

    Args:
        images: (batch, height, width, channels), raw pixels.
        shape: (height, width, channels) that the model takes; None: any.

    Returns:
        The same, float32.

    Raises:
        ValueError: they have another shape, or there is none.
    """
    batch = np.asarray(images, "float32")
    fits = batch.ndim == 4 and all(
        side in (None, given) for side, given in zip(shape, batch.shape[1:], strict=True)
    )
    if not fits or not len(batch):
        raise ValueError(
            f"`images` must be raw pixels of shape (batch, {', '.join(map(str, shape))}), at least "
            f"one image. Received: an array of shape {batch.shape}"
        )
    return batch
