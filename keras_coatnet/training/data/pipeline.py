"""The input pipeline: from encoded images to batches, in `tf.data`.

Everything random about an example depends only on the seed and on the example's position in the
whole run, counted over all epochs. A resumed run therefore sees the same batches as one that was
not interrupted, and the global batches are the same for any number of replicas and machines:
replica k of n gets chunk k of n of each global batch.
"""

from __future__ import annotations

import inspect

import tensorflow as tf

from keras_coatnet.images import ImageSettings
from keras_coatnet.training.data.augment import Augmentation
from keras_coatnet.training.data.datasets import ImageDataset
from keras_coatnet.training.data.shard import Shard
from keras_coatnet.training.data.stages import (
    all_epochs,
    decode_and_crop,
    decode_examples,
    encode_labels_and_mix,
    examples_of_shard,
    finish,
    flip_and_randaugment,
    one_hot,
    without_autograph,
)
from keras_coatnet.training.data.unreadable import UnreadableImages


def training_dataset(
    data: ImageDataset,
    *,
    size: int | tuple[int, int],
    augmentation: Augmentation,
    label_smoothing: float,
    global_batch_size: int,
    seed: int,
    start_step: int = 0,
    parts: int = 1,
    replicas: int = 1,
    first_replica: int = 0,
    local_replicas: int = 1,
    unreadable: UnreadableImages,
) -> tf.data.Dataset:
    """Makes endless training batches, in another order in each epoch.

    With the default `parts` and `replicas`, pass it to `model.fit` with `steps_per_epoch`, and
    `evaluation_dataset`, whose labels have the same form, as `validation_data`. An epoch has
    `data.count // global_batch_size` steps; which examples are left over differs between epochs. An
    image that cannot be read is replaced by the nearest readable one in its chunk, with its label.

    Args:
        data: the images and their labels.
        size: height and width of the images; one number for a square.
        augmentation: how the images are cropped, changed and mixed.
        label_smoothing: s, at least 0 and below 1: labels become y (1 - s) + s / classes.
        global_batch_size: examples in a step of all replicas together; a multiple of
            `parts * replicas`.
        seed: decides the orders, crops, operations and mixing.
        start_step: how many steps to skip, counted from the beginning of the run.
        parts: number of equal parts of a global batch that are computed one after another, for
            gradient accumulation.
        replicas: number of equal chunks of each part.
        first_replica: index of the first chunk of each part that this process needs.
        local_replicas: how many consecutive chunks this process needs. The others are not decoded,
            and the files of a folder are not read for them.
        unreadable: collects the images that cannot be read, and ends the run if there are too many.

    Returns:
        A `tf.data.Dataset` of (images, labels), one chunk each: (chunk, height, width, 3), float32,
        0 to 255, and (chunk, classes), float32. A chunk has
        global_batch_size / (parts * replicas) examples.

    Raises:
        ValueError: the data hold less than one global batch, or an argument is out of range.
            Iterating raises TensorFlow's errors, see `UnreadableImages.error`.

    Example:
        batches = training_dataset(
            train, size=224, augmentation=Augmentation(mixup=0.8), label_smoothing=0.1,
            global_batch_size=256, seed=1, unreadable=UnreadableImages(limit=10),
        )
    """
    height_and_width = ImageSettings(size).height_and_width
    chunk = _chunk_size(global_batch_size, replicas, first_replica, local_replicas, parts)
    shard = Shard(chunk * replicas, chunk * first_replica, chunk * local_replicas)
    _check_can_share(data, shard)
    _check_training(data, augmentation, label_smoothing, chunk, global_batch_size, start_step)

    dataset = all_epochs(data, global_batch_size, seed, start_step, shard)
    dataset = decode_and_crop(dataset, height_and_width, augmentation, seed, unreadable)
    dataset = flip_and_randaugment(dataset, height_and_width, augmentation, seed)
    dataset = dataset.batch(chunk, drop_remainder=True)
    dataset = encode_labels_and_mix(
        dataset, data, augmentation, label_smoothing, global_batch_size, seed, unreadable
    )
    return finish(dataset)


def evaluation_dataset(
    data: ImageDataset,
    *,
    size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str,
    global_batch_size: int,
    crop_mode: str = "center",
    unreadable: UnreadableImages,
) -> tf.data.Dataset:
    """Makes batches for evaluation: every example once, in the order on disk.

    Pass it to `model.evaluate`, or to `model.fit` as `validation_data`. The pixels are those of
    `keras_coatnet.images.load_image`. Images that cannot be read are left out. The last batch may
    be smaller than the others.

    Args:
        data: the images and their labels.
        size: height and width of the images; one number for a square.
        crop_pct: share of the resized image's side that is kept (timm's `crop_pct`).
        interpolation: how images are resized, see `keras_coatnet.images.ImageSettings`.
        global_batch_size: examples in a batch, at least 1.
        crop_mode: `"center"` or `"squash"`, see `ImageSettings`.
        unreadable: collects the images that cannot be read, and ends the run if there are too many.

    Returns:
        A `tf.data.Dataset` of (images, labels): (batch, height, width, 3), float32, 0 to 255, and
        (batch, classes), float32, 1 for the class and 0 for all others.

    Raises:
        ValueError: an argument is out of range. Iterating raises TensorFlow's errors, see
            `UnreadableImages.error`.

    Example:
        batches = evaluation_dataset(
            validation, size=224, crop_pct=0.95, interpolation="bicubic", global_batch_size=64,
            unreadable=UnreadableImages(limit=0),
        )
        model.compile(AdamW(1e-4), keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
        model.fit(training_batches, steps_per_epoch=100, validation_data=batches)
    """
    settings = ImageSettings(size, interpolation, crop_pct, crop_mode)
    _chunk_size(global_batch_size, 1, 0, 1)

    @without_autograph
    def encode(images: tf.Tensor, labels: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.cast(images, tf.float32), one_hot(labels, data)

    dataset = decode_examples(data.examples(None, 0), settings, unreadable)
    # TensorFlow's annotation has one argument, but the parts of an element come as several.
    readable = dataset.filter(lambda image, label, is_valid: is_valid)  # pyright: ignore[reportArgumentType]
    return finish(readable.batch(global_batch_size).map(encode))


def padded_evaluation_dataset(
    data: ImageDataset,
    *,
    size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str,
    global_batch_size: int,
    crop_mode: str = "center",
    replicas: int = 1,
    first_replica: int = 0,
    local_replicas: int = 1,
    unreadable: UnreadableImages,
) -> tf.data.Dataset:
    """Makes evaluation batches of equal size, for several replicas.

    The last global batch is padded with black images of weight 0, so that every replica gets the
    same number of batches. An image that cannot be read is replaced by such an image, too. Use
    `evaluation_dataset` for `model.fit`: Keras divides a loss by the size of the batch, images of
    weight 0 included.

    Args:
        data: the images and their labels.
        size: as for `evaluation_dataset`.
        crop_pct: as for `evaluation_dataset`.
        interpolation: as for `evaluation_dataset`.
        global_batch_size: examples in a step of all replicas together; a multiple of `replicas`.
        crop_mode: as for `evaluation_dataset`.
        replicas: number of equal chunks of a global batch.
        first_replica: index of the first chunk of each global batch that this process needs.
        local_replicas: how many consecutive chunks this process needs, as for `training_dataset`.
        unreadable: collects the images that cannot be read, and ends the run if there are too many.

    Returns:
        A `tf.data.Dataset` of (images, labels, weights): (chunk, height, width, 3), float32,
        0 to 255; (chunk,), int64; (chunk,), float32, 0 or 1. A chunk has
        global_batch_size / replicas examples.

    Raises:
        ValueError: an argument is out of range. Iterating raises TensorFlow's errors, see
            `UnreadableImages.error`.
    """
    settings = ImageSettings(size, interpolation, crop_pct, crop_mode)
    chunk = _chunk_size(global_batch_size, replicas, first_replica, local_replicas)
    shard = Shard(global_batch_size, chunk * first_replica, chunk * local_replicas)
    _check_can_share(data, shard)
    padded = data.count + -data.count % global_batch_size
    own = shard.size(0, data.count)
    black = (
        tf.zeros([*settings.height_and_width, 3], tf.uint8),
        tf.zeros([], tf.int64),
        tf.constant(False),
    )

    @without_autograph
    def weigh(
        images: tf.Tensor, labels: tf.Tensor, are_valid: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return tf.cast(images, tf.float32), labels, tf.cast(are_valid, tf.float32)

    examples = examples_of_shard(data, None, 0, shard).take(own)
    dataset = decode_examples(examples, settings, unreadable)
    padding = tf.data.Dataset.from_tensors(black).repeat(shard.size(0, padded) - own)
    return finish(dataset.concatenate(padding).batch(chunk, drop_remainder=True).map(weigh))


# --- Arguments -------------------------------------------------------------------------------


def _chunk_size(
    global_batch_size: int, replicas: int, first_replica: int, local_replicas: int, parts: int = 1
) -> int:
    if min(global_batch_size, replicas, parts) < 1 or global_batch_size % (parts * replicas):
        of_parts = f"{parts} parts of " if parts != 1 else ""
        raise ValueError(
            f"A global batch of {global_batch_size} cannot be divided into {of_parts}{replicas} "
            f"equal chunks. Choose a positive multiple of {parts * replicas}."
        )
    if first_replica < 0 or local_replicas < 1 or first_replica + local_replicas > replicas:
        raise ValueError(
            f"There are {replicas} replicas, 0 to {replicas - 1}. Received: "
            f"first_replica={first_replica}, local_replicas={local_replicas}"
        )
    return global_batch_size // (parts * replicas)


def _check_training(
    data: ImageDataset,
    augmentation: Augmentation,
    label_smoothing: float,
    chunk: int,
    global_batch_size: int,
    start_step: int,
) -> None:
    if data.count < global_batch_size:
        raise ValueError(
            f"{data.name} has {data.count} examples, fewer than one global batch of "
            f"{global_batch_size}. Choose a smaller batch."
        )
    if augmentation.mixes and chunk % 2:
        raise ValueError(
            "mixup and CutMix mix images in pairs, so each replica's batch size must be even. "
            f"Received: {chunk}. Choose another batch size or number of replicas, or no mixing."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"`label_smoothing` must be at least 0 and below 1. Received: {label_smoothing!r}"
        )
    if start_step < 0:
        raise ValueError(f"`start_step` must be at least 0. Received: {start_step!r}")


def _check_can_share(data: ImageDataset, shard: Shard) -> None:
    """Raises ValueError if only a part is needed and `data.examples` takes no `Shard`."""
    if shard.is_everything:
        return
    try:
        inspect.signature(data.examples).bind(0, 0, shard)
    except TypeError as error:
        raise ValueError(
            f"Several processes share {data.name}, but its `examples` does not take a `Shard`. "
            "Expected a function of (seed, start, shard), see `ImageDataset`."
        ) from error
