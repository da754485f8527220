"""The stages of the input pipeline, each from one `tf.data.Dataset` to the next."""

from __future__ import annotations

import hashlib
import os

import tensorflow as tf

from keras_coatnet.images import ImageSettings
from keras_coatnet.training.data.augment import Augmentation, flip, mix
from keras_coatnet.training.data.datasets import ImageDataset
from keras_coatnet.training.data.decode import decode_for_evaluation, decode_for_training
from keras_coatnet.training.data.randaugment import DRAWS, randaugment
from keras_coatnet.training.data.shard import Shard
from keras_coatnet.training.data.unreadable import UnreadableImages

_ELEMENT = {
    "image": tf.TensorSpec([], tf.string),
    "label": tf.TensorSpec([], tf.int64),
    "name": tf.TensorSpec([], tf.string),
}
_GROUP_SIZE = 8  # images that are decoded together, see `decode_for_training`

# The mapped functions have no Python control flow to convert, and AutoGraph takes seconds to search
# for it in everything that they call.
without_autograph = tf.autograph.experimental.do_not_convert


def _derived_seed(seed: int, purpose: str) -> int:
    """Returns a seed for one purpose, 0 to 2^31 - 1; other seeds or purposes give other ones."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


# --- Examples --------------------------------------------------------------------------------


def examples_of_shard(
    data: ImageDataset, seed: int | None, start: int, shard: Shard
) -> tf.data.Dataset:
    """Returns the examples of one epoch that this process needs, from position `start` on."""
    if shard.is_everything:
        return data.examples(seed, start)
    return data.examples(seed, start, shard)


def all_epochs(
    data: ImageDataset, global_batch_size: int, seed: int, start_step: int, shard: Shard
) -> tf.data.Dataset:
    """Returns endless (position in the run, example) pairs, of the examples of this process.

    `data.examples` is a Python function, called when an epoch begins. The `tf.data.Dataset` that it
    returns is passed on as a variant tensor, so that no example passes through Python.
    """
    steps = data.count // global_batch_size
    first_epoch = start_step // steps
    first_position = tf.constant(start_step * global_batch_size, tf.int64)

    def make(number: tf.Tensor) -> tf.Tensor:
        epoch = int(number)
        start = (start_step % steps) * global_batch_size if epoch == first_epoch else 0
        examples = examples_of_shard(data, _derived_seed(seed, f"epoch {epoch}"), start, shard)
        if examples.element_spec != _ELEMENT:
            raise ValueError(
                f"{data.name} must have elements of {_ELEMENT}. Received: {examples.element_spec}"
            )
        own = shard.size(start, steps * global_batch_size)
        return tf.data.experimental.to_variant(examples.take(own))

    @without_autograph
    def open_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        variant = tf.ensure_shape(tf.py_function(make, [epoch], tf.variant), [])
        return tf.data.experimental.from_variant(variant, _ELEMENT)

    @without_autograph
    def add_position(
        index: tf.Tensor, example: dict[str, tf.Tensor]
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        return first_position + shard.position(index), example

    epochs = tf.data.Dataset.range(first_epoch, tf.int64.max)
    return epochs.flat_map(open_epoch).enumerate().map(add_position)


def decode_and_crop(
    dataset: tf.data.Dataset,
    height_and_width: tuple[int, int],
    augmentation: Augmentation,
    seed: int,
    unreadable: UnreadableImages,
) -> tf.data.Dataset:
    """Decodes (position, example) to (position, image, label, whether the image is valid)."""
    key = tf.constant(_derived_seed(seed, "crop"), tf.int64)

    @without_autograph
    def decode(position: tf.Tensor, example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
        seeds = tf.stack([tf.fill(tf.shape(position), key), position], axis=1)
        images, are_valid = decode_for_training(
            example["image"], example["name"], seeds, height_and_width, augmentation, unreadable
        )
        return position, images, example["label"], are_valid

    groups = dataset.batch(_GROUP_SIZE)
    return groups.map(decode, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def flip_and_randaugment(
    dataset: tf.data.Dataset,
    height_and_width: tuple[int, int],
    augmentation: Augmentation,
    seed: int,
) -> tf.data.Dataset:
    """Flips each image at random, and applies RandAugment to it."""
    key = tf.constant(_derived_seed(seed, "augment"), tf.int64)
    num_ops = augmentation.randaugment_num_ops

    @without_autograph
    def augment(position: tf.Tensor, image: tf.Tensor, *rest: tf.Tensor) -> tuple[tf.Tensor, ...]:
        draws = tf.random.stateless_uniform([1 + num_ops * DRAWS], tf.stack([key, position]))
        image = tf.ensure_shape(image, [*height_and_width, 3])
        if augmentation.flip:
            image = flip(image, draws[0])
        if num_ops:
            draws_by_op = tf.reshape(draws[1:], [num_ops, DRAWS])
            image = randaugment(image, draws_by_op, augmentation.randaugment_magnitude)
        return position, image, *rest

    return dataset.map(augment, num_parallel_calls=tf.data.AUTOTUNE)


def decode_examples(
    examples: tf.data.Dataset, settings: ImageSettings, unreadable: UnreadableImages
) -> tf.data.Dataset:
    """Decodes each example to (image, label, whether the image is valid)."""

    @without_autograph
    def decode(example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
        image, is_valid = decode_for_evaluation(
            example["image"], example["name"], settings, unreadable
        )
        return image, example["label"], is_valid

    return examples.map(decode, num_parallel_calls=tf.data.AUTOTUNE)


# --- Batches ---------------------------------------------------------------------------------


def encode_labels_and_mix(
    dataset: tf.data.Dataset,
    data: ImageDataset,
    augmentation: Augmentation,
    label_smoothing: float,
    global_batch_size: int,
    seed: int,
    unreadable: UnreadableImages,
) -> tf.data.Dataset:
    """Makes (images, smoothed one-hot labels) of batches, without the unreadable images."""
    key = tf.constant(_derived_seed(seed, "mix"), tf.int64)

    @without_autograph
    def encode_and_mix(
        position: tf.Tensor, images: tf.Tensor, labels: tf.Tensor, are_valid: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = tf.cond(
            tf.reduce_all(are_valid),
            lambda: (images, labels),
            lambda: _replace_unreadable(images, labels, are_valid, unreadable),
        )
        labels = one_hot(labels, data, label_smoothing)
        if not augmentation.mixes:
            return tf.cast(images, tf.float32), labels
        step, first = position[0] // global_batch_size, tf.math.mod(position[0], global_batch_size)
        step_seed = tf.stack([key, step])
        return mix(images, labels, augmentation, step_seed, first, global_batch_size)

    return dataset.map(encode_and_mix, num_parallel_calls=tf.data.AUTOTUNE)


def _replace_unreadable(
    images: tf.Tensor, labels: tf.Tensor, are_valid: tf.Tensor, unreadable: UnreadableImages
) -> tuple[tf.Tensor, tf.Tensor]:
    """Replaces each unreadable image by the nearest valid one of its batch, with its label.

    Of two that are equally near, the one that the image would be mixed with is taken.
    """
    count = are_valid.shape[0]
    assert count is not None  # batches drop their remainder, so their size is known

    def check(any_valid: tf.Tensor) -> tf.Tensor:
        if not any_valid:
            unreadable.refuse_batch(count)
        return any_valid

    any_valid = tf.py_function(check, [tf.reduce_any(are_valid)], tf.bool)
    with tf.control_dependencies([any_valid]):
        indices = tf.range(count)
        distances = 2 * tf.abs(indices[:, None] - indices[None])
        distances -= tf.cast(indices[:, None] // 2 == indices[None] // 2, tf.int32)
        distances = tf.where(are_valid[None], distances, 2 * count)
        nearest = tf.where(are_valid, indices, tf.argmin(distances, axis=1, output_type=tf.int32))
    return tf.gather(images, nearest), tf.gather(labels, nearest)


def one_hot(labels: tf.Tensor, data: ImageDataset, smoothing: float = 0.0) -> tf.Tensor:
    """Returns smoothed one-hot labels. It fails on a label that is none of the classes."""
    classes = len(data.classes)
    message = f"A label of {data.name} is not among its {classes} classes, 0 to {classes - 1}."
    check = tf.debugging.Assert(
        tf.reduce_all((labels >= 0) & (labels < classes)), [message, labels]
    )
    with tf.control_dependencies([check]):
        return tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def finish(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes the order deterministic, and prefetches batches."""
    options = tf.data.Options()
    options.deterministic = True
    # Each worker reads its own part already, which tf.distribute would shard again.
    policy = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_distribute.auto_shard_policy = policy
    # Maps run in as many threads as there are, from the start. TensorFlow's tuner would wait out
    # its period, up to a minute, when an iterator ends: it is woken before it is told that it ends.
    options.autotune.enabled = False
    options.autotune.initial_parallelism = os.cpu_count() or 1
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)
