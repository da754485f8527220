"""Names of the classes that public checkpoints tell apart."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_coatnet.arguments import whole_number

# Files of lines "<WordNet id> <name>", in the order of a checkpoint's outputs, by their number.
_CLASS_FILES = {1000: "imagenet1k.txt", 11821: "imagenet12k.txt"}


@functools.cache
def class_names(classes: int) -> tuple[tuple[str, str], ...]:
    """Names of the outputs of an ImageNet classifier.

    Args:
        classes: 1000 (ImageNet-1k) or 11821 (the ImageNet-12k of timm's checkpoints).

    Returns:
        A tuple of (WordNet id, name) pairs, in the order of the outputs.

    Raises:
        ValueError: no label set has that many classes.

    Example:
        >>> class_names(1000)[0]
        ('n01440764', 'tench')
    """
    if classes not in _CLASS_FILES:
        known = " or ".join(map(str, _CLASS_FILES))
        raise ValueError(
            f"Class names are known for {known} classes (ImageNet-1k, ImageNet-12k). Received: "
            f"{classes} classes. Name the outputs of your own classifier yourself."
        )
    folder = importlib.resources.files("keras_coatnet") / "classes"
    lines = (folder / _CLASS_FILES[classes]).read_text("utf-8").splitlines()
    parts = (line.partition(" ") for line in lines)
    return tuple((wordnet_id, name) for wordnet_id, _, name in parts)


def name_classes(
    classes: int, names: Sequence[str] | None, argument: str
) -> list[tuple[str | None, str]]:
    """Names the outputs of any classifier.

    Args:
        classes: number of classes.
        names: the name or WordNet id of each; None: ImageNet's, if the number is that of one of its
            label sets, else numbers.
        argument: what the error message calls `names`.

    Returns:
        (WordNet id, name) of each class. The id is None where the class is not ImageNet's.

    Raises:
        ValueError: there are more or fewer names than classes.

    Example:
        >>> name_classes(2, ["cat", "n01440764"], "class_names")
        [(None, 'cat'), ('n01440764', 'tench')]
    """
    if names is None:
        if classes in _CLASS_FILES:
            return list(class_names(classes))
        return [(None, f"class {number}") for number in range(classes)]
    if len(names) != classes:
        raise ValueError(
            f"`{argument}` gives {len(names)} names, and the model has {classes} classes. Give one "
            "for each, in the order of the model's outputs."
        )
    known = dict(class_names(11821)) | dict(class_names(1000))
    return [(name, known[name]) if name in known else (None, name) for name in names]


def decode_predictions(preds: Any, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """Names the classes with the highest scores, as `keras.applications` does.

    Args:
        preds: (batch, classes), with 1000 or 11821 classes; an array or tensor.
        top: how many classes to name for each image, at least 1.

    Returns:
        For each image a list of (WordNet id, name, score), highest score first.

    Raises:
        ValueError: `preds` has another shape, or `top` is below 1.

    Example:
        >>> import numpy as np
        >>> decode_predictions(np.eye(1000)[:1], top=1)
        [[('n01440764', 'tench', 1.0)]]
    """
    from keras import ops

    preds = ops.convert_to_numpy(preds)
    if preds.ndim != 2 or preds.shape[1] not in _CLASS_FILES:
        known = " or ".join(f"(batch, {classes})" for classes in _CLASS_FILES)
        raise ValueError(
            f"`decode_predictions` expects a batch of ImageNet predictions of shape {known}. "
            f"Received: preds of shape {preds.shape}"
        )
    top = whole_number("top", top)
    names = class_names(preds.shape[1])
    order = np.argsort(-preds, axis=1, kind="stable")[:, :top]
    return [
        [(*names[index], row[index].item()) for index in best]
        for row, best in zip(preds, order, strict=True)
    ]
