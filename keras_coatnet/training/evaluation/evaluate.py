"""Evaluation of a classifier on a set of labeled images."""

from __future__ import annotations

from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf

from keras_coatnet.arguments import whole_number
from keras_coatnet.images import ImageSettings
from keras_coatnet.inference import check_classifier, class_scores
from keras_coatnet.training.data.datasets import ImageDataset
from keras_coatnet.training.data.pipeline import padded_evaluation_dataset
from keras_coatnet.training.data.unreadable import UnreadableImages
from keras_coatnet.training.engine.base import Engine
from keras_coatnet.training.errors import TrainingError, explain_errors
from keras_coatnet.training.evaluation.metrics import Evaluation, EvaluationCounter
from keras_coatnet.training.progress import Progress


def evaluate(
    model: keras.Model,
    source: ImageDataset,
    settings: ImageSettings,
    *,
    batch_size: int = 64,
    positive: str | None = None,
    unreadable_limit: int = 10,
    stream: TextIO | None = None,
) -> Evaluation:
    """Evaluates any classifier of images, such as `keras_coatnet.inference.open_model` returns.

    Args:
        model: (batch, height, width, 3), raw pixels, to (batch, classes).
        source: the images, with as many classes and in the same order.
        settings: how the images are resized and cropped.
        batch_size: number of images per step, at least 1. Default: 64.
        positive: of two classes, the one that precision and F1 are about. Default: the second.
        unreadable_limit: number of images that may be unreadable; they do not count.
        stream: where progress is shown. Default: the error stream.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: the model is not a classifier, has another number of classes, or too many images
            cannot be read.

    Example:
        model, settings = open_model("coatnet_0_rw_224.sw_in1k")
        found = evaluate(model, open_dataset("/data/imagenet/val"), settings)
    """
    classes = check_classifier(model)
    if classes != len(source.classes):
        raise ValueError(
            f"The model has {classes} classes, and {source.name} has "
            f"{len(source.classes)}. Choose the model that was trained on such data."
        )
    batch_size = min(whole_number("batch_size", batch_size), source.count)
    unreadable = UnreadableImages(unreadable_limit)
    dataset = padded_evaluation_dataset(
        source, **_pipeline_options(settings), global_batch_size=batch_size, unreadable=unreadable
    )
    counter = EvaluationCounter(source.classes, positive)
    progress = Progress(-(-source.count // batch_size), batch_size, stream)
    try:
        with explain_errors(None, unreadable, cluster=False):
            for step, (images, labels, weights) in enumerate(dataset, 1):
                scores = class_scores(model, images.numpy())
                labels = labels.numpy()
                top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
                share = np.maximum(scores[np.arange(len(labels)), labels], 1e-30)
                counter.update(labels, top, -np.log(share), weights.numpy())
                progress.update(step, f"top1 {counter.top1:.4f}")
    except TrainingError as error:
        raise ValueError(str(error)) from error
    finally:
        progress.close()
    for name in unreadable.names:
        progress.message(f"not counted, as it cannot be read: {name}")
    return counter.result()


def evaluate_engine(
    engine: Engine,
    source: ImageDataset,
    settings: ImageSettings,
    *,
    batch_size: int,
    unreadable: UnreadableImages,
    positive: str | None = None,
) -> Evaluation:
    """Evaluates the network of a training engine, with its averaged weights if there are any.

    Args:
        engine: what `devices.make_engine` returned.
        source: the images.
        settings: how they are made ready.
        batch_size: images at once, over all devices; it becomes a multiple of them.
        unreadable: collects the images that cannot be read; they do not count.
        positive: of two classes, the one that precision and F1 are about.

    Returns:
        An `Evaluation`.
    """
    batch_size = -(-min(batch_size, source.count) // engine.replicas) * engine.replicas

    def make_dataset(first_chunk: int, local_chunks: int) -> tf.data.Dataset:
        return padded_evaluation_dataset(
            source,
            **_pipeline_options(settings),
            global_batch_size=batch_size,
            replicas=engine.num_chunks,
            first_replica=first_chunk,
            local_replicas=local_chunks,
            unreadable=unreadable,
        )

    counter = EvaluationCounter(source.classes, positive)
    for labels, top, losses, weights in engine.evaluate(
        engine.iterate(engine.num_chunks, make_dataset)
    ):
        counter.update(labels, top, losses, weights)
    return counter.result()


def _pipeline_options(settings: ImageSettings) -> dict[str, Any]:
    return {
        "size": settings.size,
        "crop_pct": settings.crop_pct,
        "crop_mode": settings.crop_mode,
        "interpolation": settings.interpolation,
    }
