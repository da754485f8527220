"""Records of a prepared tensorflow-datasets data set: which features count, and in which order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_coatnet.training.data.prepared import import_tfds
from keras_coatnet.training.data.shard import Shard

# Marks the message about a wrong label. Labels are checked inside TensorFlow's graph, where errors
# have no class of their own: it arrives as an InvalidArgumentError, with more text around it.
LABEL_ERROR = "LabelError: "

_MOST_SCANNED = 1_000_000  # labels that are read to learn how many classes there are

# A shuffle holds at most so many records, and about so many bytes of them.
_WINDOW, _WINDOW_BYTES = 16_384, 2**30


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which features of a data set are what.

    Attributes:
        image: name of the feature with the image.
        label: name of the one with the label, or with a list of one label.
        name: name of the one with the image's file name; None if there is none.
        classes: names of the classes in the order of their labels.
    """

    image: str
    label: str
    name: str | None
    classes: tuple[str, ...]


def find_columns(builder: Any) -> Columns:
    """Finds image and label among the features of a prepared data set.

    Of several, those that the builder declares for supervised learning come first, then those
    called "image" and "label" or "labels", then the first of their kind.

    Args:
        builder: a `tfds.core.DatasetBuilder`, prepared.

    Returns:
        Its `Columns`.

    Raises:
        ValueError: there is no image of 8 bits or no whole number for a label (the message lists
            the features), or fewer than two classes.
    """
    tfds = import_tfds()
    features = builder.info.features
    items = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    declared = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    order = [key for key in (*declared, "image", "label", "labels", *items) if key in items]

    def first(fits: Callable[[Any], bool]) -> str | None:
        return next((key for key in order if fits(items[key])), None)

    def is_image(feature: Any) -> bool:
        # A mask is a `LabeledImage`, which is an `Image` too.
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
        lacking = "no image of 8 bits" if image is None else "no label that is a whole number"
        listed = ", ".join(
            f"{key} ({type(value).__name__})" for key, value in sorted(items.items())
        )
        raise ValueError(
            f"The data set {builder.info.full_name!r} has {lacking} among its features: {listed}."
        )
    texts = [key for key, value in items.items() if isinstance(value, tfds.features.Text)]
    name = next((key for key in texts if "file" in key and "name" in key), None)
    classes = _class_names(builder, label, items[label])
    if len(classes) < 2:
        raise ValueError(
            f"The data set {builder.info.full_name!r} has one class only ({label!r} is its label). "
            "Expected at least two."
        )
    return Columns(image, label, name, classes)


def _class_names(builder: Any, key: str, feature: Any) -> tuple[str, ...]:
    feature = getattr(feature, "feature", feature)  # that of a list
    if getattr(feature, "num_classes", None) is not None:
        return tuple(feature.names)
    # A plain number says nothing of its range, so the labels of all splits are read.
    tfds = import_tfds()
    splits = builder.info.splits.values()
    if sum(split.num_examples for split in splits) > _MOST_SCANNED:
        raise ValueError(
            f"The data set {builder.info.full_name!r} does not say how many classes its label "
            f"{key!r} has, and is too large to look. Prepare it with "
            "tfds.features.ClassLabel(num_classes=...) for its label."
        )
    largest = -1
    for split in builder.info.splits:
        labels = builder.as_dataset(split, decoders=tfds.decode.PartialDecoding({key: True}))
        for batch in labels.batch(_WINDOW).as_numpy_iterator():
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

    With a seed, the files are read in a random order, sixteen at a time, and the records go through
    a buffer of up to 16,384, or 1 GiB, that gives out a random one whenever one comes in.

    Args:
        builder: a `tfds.core.DatasetBuilder`, prepared.
        columns: its `Columns`.
        split: what to read, in the words of tensorflow-datasets: `"train[:80%]"`.
        seed: decides the order, at least 0; None: the order of the files.
        start: how many records to leave out at the beginning. They are read, but not decoded.
        shard: which of the records after those to give; None: all. The others are read and
            parsed, too, as only the order of all of them tells which ones they are; their labels
            are not checked and their images not decoded.

    Returns:
        A data set of `{"image": bytes, "label": int64, "name": string}`. Reading a label out of
        range raises `tf.errors.InvalidArgumentError`, see `find_label_error`.
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
        records = _shuffle(records, _window_of(info), seed)
    records = records.skip(start)
    left = max(0, info.num_examples - start)
    if shard is not None:
        records = shard.filter(records, start)
        left = shard.size(start, start + left)
    records = records.map(_reader(columns), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return records.apply(tf.data.experimental.assert_cardinality(left))


def find_label_error(error: tf.errors.OpError) -> str | None:
    """Finds the message about a wrong label in an error of TensorFlow's.

    Args:
        error: raised while the records of `read_records` are read.

    Returns:
        What was expected for which record, and what was received; `None` if the error has another
        cause.
    """
    found = re.search(rf"{LABEL_ERROR}(.*)\]", error.message)
    return found[1] if found else None


def _file_order(seed: int) -> Callable[[list], list]:
    def reorder(files: list) -> list:
        return [files[index] for index in np.random.default_rng((seed, 0)).permutation(len(files))]

    return reorder


def _window_of(info: Any) -> int:
    record = max(1, (info.num_bytes or 0) // max(1, info.num_examples))
    return max(1, min(_WINDOW, _WINDOW_BYTES // record, info.num_examples))


def _shuffle(records: tf.data.Dataset, window: int, seed: int) -> tf.data.Dataset:
    """Shuffles by `seed` alone.

    `Dataset.shuffle` mixes the seed of `tf.random.set_seed` into its own. Inside a function that is
    the function's, which can be set without touching the program's.
    """

    def shuffled(_: tf.Tensor) -> tf.data.Dataset:
        tf.compat.v1.set_random_seed(0)
        return records.shuffle(window, seed=seed, reshuffle_each_iteration=False)

    return tf.data.Dataset.from_tensors(0).flat_map(shuffled)


def _reader(columns: Columns) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    highest = len(columns.classes) - 1

    def read(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        name = record[columns.name or "tfds_id"]
        labels = tf.reshape(tf.cast(record[columns.label], "int64"), [-1])
        fits = (tf.size(labels) == 1) & tf.reduce_all((labels >= 0) & (labels <= highest))
        received = tf.strings.reduce_join(tf.strings.as_string(labels), separator=", ")
        expected = f"{LABEL_ERROR}Expected one label from 0 to {highest} for "
        wrong = [expected, name, ". Received: ", received]
        with tf.control_dependencies([tf.debugging.Assert(fits, [tf.strings.join(wrong)])]):
            return {"image": record[columns.image], "label": labels[0], "name": tf.identity(name)}

    return read
