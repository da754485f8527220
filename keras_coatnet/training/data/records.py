"""Reads the records of a prepared tensorflow-datasets data set."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_coatnet.training.data.prepared import import_tfds
from keras_coatnet.training.data.shard import Shard

# Marks the message about a wrong label. Labels are checked in TensorFlow's graph, which can only
# raise TensorFlow's errors: the message arrives inside the text of an InvalidArgumentError.
LABEL_ERROR = "LabelError: "

_MAX_SCANNED = 1_000_000  # labels that are read to learn how many classes there are

# Most records, and about the most bytes of them, in the buffer of a shuffle.
_BUFFER_SIZE, _BUFFER_BYTES = 16_384, 2**30


@dataclasses.dataclass(frozen=True)
class Columns:
    """The features of a data set that are used.

    Attributes:
        image: key of the feature with the image.
        label: key of the feature with the label, or with a list of one label.
        name: key of the feature with the image's file name; None if there is none.
        classes: names of the classes in the order of their labels.
    """

    image: str
    label: str
    name: str | None
    classes: tuple[str, ...]


def find_columns(builder: Any) -> Columns:
    """Finds the image and the label among the features of a prepared data set.

    If several fit, the `supervised_keys` of the builder are preferred, then features called
    "image", "label" or "labels", then the first one.

    Args:
        builder: a `tfds.core.DatasetBuilder`, prepared.

    Returns:
        Its `Columns`.

    Raises:
        ValueError: there is no uint8 image or no integer label (the message lists the features),
            or there are fewer than two classes.
    """
    tfds = import_tfds()
    features = builder.info.features
    items = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    declared = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    order = [key for key in (*declared, "image", "label", "labels", *items) if key in items]

    def first(fits: Callable[[Any], bool]) -> str | None:
        return next((key for key in order if fits(items[key])), None)

    def is_image(feature: Any) -> bool:
        # Not `isinstance`: a mask is a `LabeledImage`, which is derived from `Image`.
        return type(feature) is tfds.features.Image and feature.np_dtype == np.uint8

    def is_class(feature: Any) -> bool:
        return isinstance(feature, tfds.features.ClassLabel)

    def is_number(feature: Any) -> bool:
        return (
            isinstance(feature, tfds.features.Tensor)
            and feature.shape == ()
            and np.issubdtype(feature.np_dtype, np.integer)
        )

    def is_list(feature: Any) -> bool:
        return isinstance(feature, tfds.features.Sequence) and is_class(feature.feature)

    image, label = first(is_image), first(is_class) or first(is_list) or first(is_number)
    if image is None or label is None:
        missing = "uint8 image" if image is None else "integer label"
        listed = ", ".join(
            f"{key} ({type(value).__name__})" for key, value in sorted(items.items())
        )
        raise ValueError(
            f"The data set {builder.info.full_name!r} has no {missing} among its features. It has: "
            f"{listed}."
        )
    texts = [key for key, value in items.items() if isinstance(value, tfds.features.Text)]
    name = next((key for key in texts if "file" in key and "name" in key), None)
    classes = _class_names(builder, label, items[label])
    if len(classes) < 2:
        raise ValueError(
            f"The data set {builder.info.full_name!r} has fewer than two classes (its label is "
            f"{label!r}). Expected at least two."
        )
    return Columns(image, label, name, classes)


def _class_names(builder: Any, key: str, feature: Any) -> tuple[str, ...]:
    feature = getattr(feature, "feature", feature)  # of a `Sequence`
    if getattr(feature, "num_classes", None) is not None:
        return tuple(feature.names)
    # A plain integer has no range, so the labels of all splits are read.
    tfds = import_tfds()
    splits = builder.info.splits.values()
    if sum(split.num_examples for split in splits) > _MAX_SCANNED:
        raise ValueError(
            f"The data set {builder.info.full_name!r} does not say how many classes its label "
            f"{key!r} has, and is too large to read all labels. Prepare it with the label as "
            "tfds.features.ClassLabel(num_classes=...)."
        )
    largest = -1
    for split in builder.info.splits:
        labels = builder.as_dataset(split, decoders=tfds.decode.PartialDecoding({key: True}))
        for batch in labels.batch(_BUFFER_SIZE).as_numpy_iterator():
            largest = max(largest, int(batch[key].max()))
    return tuple(map(str, range(largest + 1)))


def read_records(
    builder: Any,
    columns: Columns,
    split: str,
    seed: int | None,
    start: int,
    shard: Shard | None = None,
) -> tf.data.Dataset:
    """Reads a split of a prepared data set once, without decoding its images.

    With a seed, the files are read in a random order, sixteen at a time, and the records are
    shuffled with a buffer of at most 16,384 records or 1 GiB.

    Args:
        builder: a `tfds.core.DatasetBuilder`, prepared.
        columns: its `Columns`.
        split: what to read, as tensorflow-datasets writes it: `"train[:80%]"`.
        seed: decides the order, at least 0; None: the order of the files.
        start: how many records to skip. They are read, but not returned.
        shard: which of the records after `start` to return; None: all. The others are read and
            parsed, as their order is known only then, but their labels are not checked.

    Returns:
        A `tf.data.Dataset` of `{"image": bytes, "label": int64, "name": string}`. Reading a label
        out of range raises `tf.errors.InvalidArgumentError`, see `find_label_error`.
    """
    tfds = import_tfds()
    options = tf.data.Options()
    options.deterministic = True
    config = tfds.ReadConfig(
        options=options,
        try_autocache=False,
        add_tfds_id=columns.name is None,
        skip_prefetch=True,
        interleave_cycle_length=16,
        interleave_block_length=16,
        experimental_interleave_sort_fn=None if seed is None else _file_order(seed),
    )
    wanted = {key: True for key in (columns.image, columns.label, columns.name) if key}
    skipped = {columns.image: tfds.decode.SkipDecoding()}
    records = builder.as_dataset(
        split, decoders=tfds.decode.PartialDecoding(wanted, decoders=skipped), read_config=config
    )
    info = builder.info.splits[split]
    if seed is not None:
        records = _shuffle(records, _buffer_size(info), seed)
    records = records.skip(start)
    count = max(0, info.num_examples - start)
    if shard is not None:
        records = shard.filter(records, start)
        count = shard.size(start, start + count)
    records = records.map(_reader(columns), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return records.apply(tf.data.experimental.assert_cardinality(count))


def find_label_error(error: tf.errors.OpError) -> str | None:
    """Finds the message about a wrong label in an error that TensorFlow raised.

    Args:
        error: raised while the records of `read_records` are read.

    Returns:
        The message: what was expected, for which record, and what was received. None if the error
        has another cause.
    """
    found = re.search(rf"{LABEL_ERROR}(.*)\]", error.message)
    return found[1] if found else None


def _file_order(seed: int) -> Callable[[list], list]:
    def reorder(files: list) -> list:
        return [files[index] for index in np.random.default_rng((seed, 0)).permutation(len(files))]

    return reorder


def _buffer_size(info: Any) -> int:
    record_bytes = max(1, (info.num_bytes or 0) // max(1, info.num_examples))
    return max(1, min(_BUFFER_SIZE, _BUFFER_BYTES // record_bytes, info.num_examples))


def _shuffle(records: tf.data.Dataset, buffer_size: int, seed: int) -> tf.data.Dataset:
    """Shuffles in an order that depends on `seed` only.

    `Dataset.shuffle` also uses the global seed of `tf.random.set_seed`. A function's graph has a
    global seed of its own, which can be set without changing the program's.
    """

    def shuffled(_: tf.Tensor) -> tf.data.Dataset:
        tf.compat.v1.set_random_seed(0)
        return records.shuffle(buffer_size, seed=seed, reshuffle_each_iteration=False)

    return tf.data.Dataset.from_tensors(0).flat_map(shuffled)


def _reader(columns: Columns) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    highest = len(columns.classes) - 1

    def read(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        name = record[columns.name or "tfds_id"]
        labels = tf.reshape(tf.cast(record[columns.label], "int64"), [-1])
        is_valid = (tf.size(labels) == 1) & tf.reduce_all((labels >= 0) & (labels <= highest))
        received = tf.strings.reduce_join(tf.strings.as_string(labels), separator=", ")
        expected = f"{LABEL_ERROR}Expected one label from 0 to {highest} for "
        message = tf.strings.join([expected, name, ". Received: ", received])
        with tf.control_dependencies([tf.debugging.Assert(is_valid, [message])]):
            return {"image": record[columns.image], "label": labels[0], "name": tf.identity(name)}

    return read
