"""The input pipeline: from a source of encoded images to batches, in `tf.data`.

What happens to an example is decided by the seed and by its place in the whole run, counted over
all epochs, and by nothing else. So a run that is taken up again at some step sees what it would
have seen, and 1, 2 or 4 replicas on one or more machines see the same global batches, each its
part: chunk k of n of a global batch belongs to replica k.
"""

from __future__ import annotations

import hashlib
import inspect

import tensorflow as tf

from keras_coatnet.inference import ImageSettings
from keras_coatnet.training.data.augment import Augmentation, flip, mix
from keras_coatnet.training.data.datasets import Source
from keras_coatnet.training.data.decode import (
    UnreadableImages,
    decode_for_evaluation,
    decode_for_training,
)
from keras_coatnet.training.data.randaugment import DRAWS, randaugment
from keras_coatnet.training.data.shard import Shard

__all__ = [
    "Augmentation",
    "UnreadableImages",
    "evaluation_dataset",
    "padded_evaluation_dataset",
    "training_dataset",
]

_ELEMENT = {
    "image": tf.TensorSpec([], tf.string),
    "label": tf.TensorSpec([], tf.int64),
    "name": tf.TensorSpec([], tf.string),
}
_GROUP = 8  # images that are decoded together, see `decode_for_training`
_NO_END = tf.int64.max

# The functions below have no Python control flow to turn into TensorFlow's, and looking for some in
# all that they call takes seconds.
_as_written = tf.autograph.experimental.do_not_convert


def training_dataset(
    source: Source,
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
    broken: UnreadableImages,
) -> tf.data.Dataset:
    """Batches for training, without an end: each epoch in an order of its own.

    Without `parts` and `replicas` it is what `model.fit` takes, with `steps_per_epoch`:
    `evaluation_dataset` has labels of the same form. An epoch has `source.count // global_batch_size`
    steps; the examples left over are others in each epoch. The place of an image that cannot be
    read is taken by the nearest one in its chunk that can, with its label.

    Args:
        source: where the examples come from.
        size: height and width of the images; one number for a square.
        augmentation: what is done to the images.
        label_smoothing: s, at least 0 and below 1: labels become y (1 - s) + s / classes.
        global_batch_size: examples in a step of all replicas together; a multiple of
            `parts * replicas`.
        seed: decides the orders, crops, operations and mixing.
        start_step: how many steps to leave out, counted from the beginning of the run.
        parts: into how many equal parts a global batch is cut that follow one another, where
            gradients are accumulated.
        replicas: into how many equal chunks each part is cut.
        first_replica: the first chunk of each part that is wanted here.
        local_replicas: how many chunks of each part are wanted here; they follow one another. The
            others are not decoded, and those of a folder not read.
        broken: told of images that cannot be read; ends the run if they are too many.

    Returns:
        A dataset of (images, labels), a chunk each: (chunk, height, width, 3), float32, 0 to 255,
        and (chunk, classes), float32, where a chunk has global_batch_size / (parts * replicas) examples.

    Raises:
        ValueError: the source holds less than one global batch, or an argument makes no sense.
            While it is iterated, TensorFlow's errors: see `UnreadableImages.error`.

    Example:
        batches = training_dataset(
            source, size=224, augmentation=Augmentation(mixup=0.8), label_smoothing=0.1,
            global_batch_size=256, seed=1, broken=UnreadableImages(limit=10),
        )
    """
    size = ImageSettings(size).size
    chunk = _chunk_size(global_batch_size, replicas, first_replica, local_replicas, parts)
    shard = Shard(chunk * replicas, chunk * first_replica, chunk * local_replicas)
    _check_can_share(source, shard)
    _check_training(source, augmentation, label_smoothing, chunk, global_batch_size, start_step)
    augment_key, crop_key, mixing_key = (
        tf.constant(_derived_seed(seed, purpose), tf.int64)
        for purpose in ("augment", "crop", "mix")
    )

    @_as_written
    def decode(position: tf.Tensor, example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
        seeds = tf.stack([tf.fill(tf.shape(position), crop_key), position], axis=1)
        images, are_valid = decode_for_training(
            example["image"], example["name"], seeds, size, augmentation, broken
        )
        return position, images, example["label"], are_valid

    @_as_written
    def augment(position: tf.Tensor, image: tf.Tensor, *rest: tf.Tensor) -> tuple[tf.Tensor, ...]:
        layers = augmentation.randaugment_num_ops
        draws = tf.random.stateless_uniform([1 + DRAWS * layers], tf.stack([augment_key, position]))
        image = tf.ensure_shape(image, [*size, 3])
        if augmentation.flip:
            image = flip(image, draws[0])
        if layers:
            by_layer = tf.reshape(draws[1:], [layers, DRAWS])
            image = randaugment(image, by_layer, augmentation.randaugment_magnitude)
        return position, image, *rest

    @_as_written
    def assemble(
        position: tf.Tensor, images: tf.Tensor, labels: tf.Tensor, are_valid: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = tf.cond(
            tf.reduce_all(are_valid),
            lambda: (images, labels),
            lambda: _with_stand_ins(images, labels, are_valid, broken),
        )
        labels = _smoothed_one_hot(labels, len(source.classes), label_smoothing, source.name)
        if not augmentation.mixes:
            return tf.cast(images, tf.float32), labels
        step, first = position[0] // global_batch_size, position[0] % global_batch_size
        step_seed = tf.stack([mixing_key, step])
        return mix(images, labels, augmentation, step_seed, first, global_batch_size)

    dataset = _all_epochs(source, global_batch_size, seed, start_step, shard)
    dataset = dataset.batch(_GROUP).map(decode, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
    dataset = dataset.map(augment, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(chunk, drop_remainder=True)
    dataset = dataset.map(assemble, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.with_options(_options()).prefetch(tf.data.AUTOTUNE)


def evaluation_dataset(
    source: Source,
    *,
    size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str,
    global_batch_size: int,
    crop_mode: str = "center",
    broken: UnreadableImages,
) -> tf.data.Dataset:
    """Batches for evaluation: every example once, in the source's natural order.

    It is what `model.evaluate` takes, and `validation_data` of `model.fit`. The pixels are those of
    `keras_coatnet.inference.load_image`. Images that cannot be read are left out, and the last
    batch is as large as the examples that are left.

    Args:
        source: where the examples come from.
        size: height and width of the images; one number for a square.
        crop_pct: share of the resized image's side that is kept (timm's `crop_pct`).
        interpolation: how images are resized, see `keras_coatnet.inference.ImageSettings`.
        global_batch_size: examples in a batch, at least 1.
        crop_mode: `"center"` or `"squash"`, see `ImageSettings`.
        broken: told of images that cannot be read; ends the run if they are too many.

    Returns:
        A dataset of (images, labels): (batch, height, width, 3), float32, 0 to 255, and
        (batch, classes), float32, 1 for the class and 0 for all others.

    Raises:
        ValueError: an argument makes no sense. While it is iterated, TensorFlow's errors: see
            `UnreadableImages.error`.

    Example:
        batches = evaluation_dataset(
            validation, size=224, crop_pct=0.95, interpolation="bicubic", global_batch_size=64,
            broken=UnreadableImages(limit=0),
        )
        model.compile(AdamW(1e-4), keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
        model.fit(training_batches, steps_per_epoch=100, validation_data=batches)
    """
    settings = ImageSettings(size, interpolation, crop_pct, crop_mode)
    _chunk_size(global_batch_size, 1, 0, 1)

    @_as_written
    def finish(images: tf.Tensor, labels: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        labels = _smoothed_one_hot(labels, len(source.classes), 0.0, source.name)
        return tf.cast(images, tf.float32), labels

    dataset = _decoded_for_evaluation(source.examples(None, 0), settings, broken)
    dataset = dataset.filter(lambda image, label, is_valid: is_valid)
    dataset = dataset.batch(global_batch_size).map(finish)
    return dataset.with_options(_options()).prefetch(tf.data.AUTOTUNE)


def padded_evaluation_dataset(
    source: Source,
    *,
    size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str,
    global_batch_size: int,
    crop_mode: str = "center",
    replicas: int = 1,
    first_replica: int = 0,
    local_replicas: int = 1,
    broken: UnreadableImages,
) -> tf.data.Dataset:
    """The examples of `evaluation_dataset` in batches of one size, for replicas that keep in step.

    The last global batch is filled up with black images of weight 0, so that all replicas have
    equally many batches; an image that cannot be read is one of those, too. Keras divides a loss
    by the size of the batch, weights of 0 included: for `model.fit` there is `evaluation_dataset`.

    Args:
        source: where the examples come from.
        size: as for `evaluation_dataset`.
        crop_pct: likewise.
        interpolation: likewise.
        global_batch_size: examples in a step of all replicas together; a multiple of `replicas`.
        crop_mode: as for `evaluation_dataset`.
        replicas: into how many equal chunks a global batch is cut.
        first_replica: the first chunk of each global batch that is wanted here.
        local_replicas: how many chunks of each global batch are wanted here. The others are not
            decoded, and those of a folder not read.
        broken: told of images that cannot be read; ends the run if they are too many.

    Returns:
        A dataset of (images, labels, weights): (global_batch_size / replicas, height, width, 3),
        float32, 0 to 255; (global_batch_size / replicas,), int64; the same, float32, 0 or 1.

    Raises:
        ValueError: an argument makes no sense. While it is iterated, TensorFlow's errors: see
            `UnreadableImages.error`.
    """
    settings = ImageSettings(size, interpolation, crop_pct, crop_mode)
    chunk = _chunk_size(global_batch_size, replicas, first_replica, local_replicas)
    shard = Shard(global_batch_size, chunk * first_replica, chunk * local_replicas)
    _check_can_share(source, shard)
    padded = source.count + -source.count % global_batch_size
    own = shard.size(0, source.count)
    black = tf.zeros([*settings.size, 3], tf.uint8), tf.zeros([], tf.int64), tf.constant(False)

    @_as_written
    def finish(
        images: tf.Tensor, labels: tf.Tensor, are_valid: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return tf.cast(images, tf.float32), labels, tf.cast(are_valid, tf.float32)

    examples = _shard_of(source, None, 0, shard).take(own)
    dataset = _decoded_for_evaluation(examples, settings, broken)
    padding = tf.data.Dataset.from_tensors(black).repeat(shard.size(0, padded) - own)
    dataset = dataset.concatenate(padding).batch(chunk, drop_remainder=True).map(finish)
    return dataset.with_options(_options()).prefetch(tf.data.AUTOTUNE)


# --- Arguments -------------------------------------------------------------------------------


def _chunk_size(
    global_batch_size: int, replicas: int, first_replica: int, local_replicas: int, parts: int = 1
) -> int:
    if min(global_batch_size, replicas, parts) < 1 or global_batch_size % (parts * replicas):
        of_parts = f"{parts} parts of " if parts != 1 else ""
        raise ValueError(
            f"A global batch of {global_batch_size} cannot be cut into {of_parts}{replicas} equal "
            "chunks. Choose a multiple of their number."
        )
    if first_replica < 0 or local_replicas < 1 or first_replica + local_replicas > replicas:
        raise ValueError(
            f"There are {replicas} replicas, 0 to {replicas - 1}. Received: "
            f"first_replica={first_replica}, local_replicas={local_replicas}"
        )
    return global_batch_size // (parts * replicas)


def _check_training(
    source: Source,
    augmentation: Augmentation,
    label_smoothing: float,
    chunk: int,
    global_batch_size: int,
    start_step: int,
) -> None:
    if source.count < global_batch_size:
        raise ValueError(
            f"{source.name} has {source.count} examples, less than one global batch of "
            f"{global_batch_size}. Choose a smaller batch."
        )
    if augmentation.mixes and chunk % 2:
        raise ValueError(
            "mixup and CutMix take images in pairs, so each replica's batch must be even. It is "
            f"{chunk}. Choose another batch or number of replicas, or leave out the mixing."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"`label_smoothing` must be at least 0 and below 1. Received: {label_smoothing!r}"
        )
    if start_step < 0:
        raise ValueError(f"`start_step` must be at least 0. Received: {start_step!r}")


def _check_can_share(source: Source, shard: Shard) -> None:
    """Refuses to read a part of a source whose `examples` takes no `Shard`."""
    if shard.is_everything:
        return
    try:
        inspect.signature(source.examples).bind(0, 0, shard)
    except TypeError as error:
        raise ValueError(
            f"Only a part of {source.name} is wanted here, and its `examples` does not take the "
            "`Shard` that says which. Expected a third argument, as `Source` describes."
        ) from error


def _derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, 0 to 2^31 - 1: neighboring seeds have nothing in common."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


# --- Examples --------------------------------------------------------------------------------


def _shard_of(source: Source, seed: int | None, start: int, shard: Shard) -> tf.data.Dataset:
    """The examples of one epoch that are wanted, from the place `start` on."""
    if shard.is_everything:
        return source.examples(seed, start)
    return source.examples(seed, start, shard)


def _all_epochs(
    source: Source, global_batch_size: int, seed: int, start_step: int, shard: Shard
) -> tf.data.Dataset:
    """(position in the run, example) of the wanted ones, without an end.

    Sources are Python functions, called when their epoch begins: the dataset they make is handed
    over as a value, so that no example passes through Python.
    """
    steps = source.count // global_batch_size
    first_epoch = start_step // steps
    first_position = tf.constant(start_step * global_batch_size, tf.int64)

    def make(epoch: tf.Tensor) -> tf.Tensor:
        epoch = int(epoch)
        start = (start_step % steps) * global_batch_size if epoch == first_epoch else 0
        examples = _shard_of(source, _derived_seed(seed, f"epoch {epoch}"), start, shard)
        if examples.element_spec != _ELEMENT:
            raise ValueError(
                f"{source.name} must give elements of {_ELEMENT}. It gives: {examples.element_spec}"
            )
        own = shard.size(start, steps * global_batch_size)
        return tf.data.experimental.to_variant(examples.take(own))

    @_as_written
    def open_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        variant = tf.ensure_shape(tf.py_function(make, [epoch], tf.variant), [])
        return tf.data.experimental.from_variant(variant, _ELEMENT)

    @_as_written
    def place(
        index: tf.Tensor, example: dict[str, tf.Tensor]
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        return first_position + shard.place(index), example

    epochs = tf.data.Dataset.range(first_epoch, _NO_END)
    return epochs.flat_map(open_epoch).enumerate().map(place)


def _decoded_for_evaluation(
    examples: tf.data.Dataset, settings: ImageSettings, broken: UnreadableImages
) -> tf.data.Dataset:
    """(image, label, whether it could be read) of each example."""

    @_as_written
    def decode(example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
        image, is_valid = decode_for_evaluation(example["image"], example["name"], settings, broken)
        return image, example["label"], is_valid

    return examples.map(decode, num_parallel_calls=tf.data.AUTOTUNE)


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # Each worker asks for its own part; sharding by tf.distribute would take a part of that.
    policy = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_distribute.auto_shard_policy = policy
    return options


# --- Batches ---------------------------------------------------------------------------------


def _with_stand_ins(
    images: tf.Tensor, labels: tf.Tensor, are_valid: tf.Tensor, broken: UnreadableImages
) -> tuple[tf.Tensor, tf.Tensor]:
    """Puts the nearest valid image in each broken one's place; of two, the one it mixes with."""
    count = images.shape[0]

    def check(any_valid: tf.Tensor) -> tf.Tensor:
        if not any_valid:
            broken.refuse_batch(count)
        return any_valid

    any_valid = tf.py_function(check, [tf.reduce_any(are_valid)], tf.bool)
    with tf.control_dependencies([any_valid]):
        places = tf.range(count)
        distances = 2 * tf.abs(places[:, None] - places[None])
        distances -= tf.cast(places[:, None] // 2 == places[None] // 2, tf.int32)
        distances = tf.where(are_valid[None], distances, 2 * count)
        nearest = tf.where(are_valid, places, tf.argmin(distances, axis=1, output_type=tf.int32))
    return tf.gather(images, nearest), tf.gather(labels, nearest)


def _smoothed_one_hot(labels: tf.Tensor, classes: int, smoothing: float, source: str) -> tf.Tensor:
    message = f"A label of {source} is not among its {classes} classes, 0 to {classes - 1}."
    check = tf.debugging.Assert(
        tf.reduce_all((labels >= 0) & (labels < classes)), [message, labels]
    )
    with tf.control_dependencies([check]):
        return tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
