"""Opens data sets: folders of images, IDX files, and data sets of tensorflow-datasets.

An `ImageDataset` yields encoded images, one epoch at a time, in an order that depends on a seed.
The input pipeline decodes them, and handles those that cannot be read.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_coatnet.paths import check_local
from keras_coatnet.training.data import folders, idx, prepared
from keras_coatnet.training.data.gpus import keep_tensorflow_off_gpus
from keras_coatnet.training.data.held_out import choose_held_out, count_held_out
from keras_coatnet.training.data.records import (
    Columns,
    find_columns,
    find_label_error,
    read_records,
)
from keras_coatnet.training.data.shard import Shard


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A set of labeled images.

    Attributes:
        name: its name for messages: `"imagenet2012, train"`, `"/data/flowers/train"`.
        count: number of examples.
        classes: names of the classes, in the order of their labels.
        examples: a function of `(seed, start)` that returns one epoch as a `tf.data.Dataset` of
            `{"image": scalar string, the encoded file; "label": scalar int64; "name": scalar
            string, the path, file name or record's id}`. The order depends only on `seed` (at least
            0), on every machine; None is the order on disk. The first `start` examples are skipped,
            in folders without reading them.
            To be shared by several processes, it also takes a third argument, a `shard.Shard`, and
            returns only the examples that the shard holds, in the same order. If it has to read all
            examples, it can end with `return shard.filter(dataset, start)`.
        fingerprint: equal for two data sets with the same names and labels, wherever they are;
            empty if unknown.
    """

    name: str
    count: int
    classes: tuple[str, ...]
    examples: Callable[..., tf.data.Dataset]
    fingerprint: str = ""


def open_datasets(
    data: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    held_out: float = 0.2,
    classes: str = "present",
    seed: int = 0,
) -> tuple[ImageDataset, ImageDataset]:
    """Opens a data set for training. Nothing is downloaded.

    `data` is one of:

    - A folder with one sub-folder to train on and one to validate on, such as `train` and `val` or
      `Training` and `Testing` (see `folders.find_pair`), each with one sub-folder for each class.
    - A folder with one sub-folder for each class. The same share of each class is held out for
      validation. `folders.read_folder` describes the images.
    - A folder with IDX files as those of MNIST, `train-images-idx3-ubyte.gz` and so on.
    - The name of a data set of tensorflow-datasets that is prepared under `data_dir`: `"cifar10"`,
      `"imagenet2012:5.1.0"`, `"gashissdb/160"`. `imagenet2012` and `gashissdb` are prepared first
      if necessary, from the published files in `<data_dir>/downloads/manual`.
    - A prepared folder of tensorflow-datasets, with its `dataset_info.json`.

    ImageNet-21k has no builder in tensorflow-datasets, so users prepare it with their own: with one
    split (`train`, or big_vision's `full`), and a `label` or a list `labels` out of 21,843 classes.
    Both are read; each list must hold a single label.

    Args:
        data: the data set. A folder is preferred to a data set of tensorflow-datasets of that name.
        data_dir: the folder of tensorflow-datasets; None: `TFDS_DATA_DIR`, or else
            `~/tensorflow_datasets`.
        train_split: what to train on: a sub-folder, or a split as tensorflow-datasets writes it
            (`"train[:90%]"`). None: `train`, or the only split if it is not for validation.
        validation_split: what to validate on, likewise. None: `validation` or `test`, or else a
            part of the training images.
        held_out: that part: a share above 0 and below 1, or a whole number of images from 2 on.
        classes: for folders named after WordNet ids of ImageNet: `"present"`: the classes are the
            folders; `"imagenet"`: all classes of ImageNet, with the labels of the public
            checkpoints.
        seed: decides which images of a folder are held out. Of a data set of tensorflow-datasets,
            the end of the split is held out: its records were shuffled when it was prepared.

    Returns:
        The `ImageDataset` to train on and the one to validate on, with the same classes.

    Raises:
        ValueError: there is no such data set or split, it is not prepared and files are missing, or
            it is not suitable for classification. The message is one line that says what to do.
        ImportError: tensorflow-datasets is needed but not installed.

    Example:
        train, validation = open_datasets("flowers", held_out=0.1)
    """
    keep_tensorflow_off_gpus()
    data = _checked(data, data_dir)
    root = prepared.folder_of_images(data)
    if root is not None:
        if idx.parts_of(root):
            train, validation = idx.open_parts(root, train_split, validation_split, held_out, seed)
            return _from_idx(train), _from_idx(validation)
        pair = folders.find_pair(root, train_split, validation_split)
        if pair is None:
            return _hold_out(folders.read_folder(root, classes), held_out, seed)
        first, second = (folders.read_folder(part, classes) for part in pair)
        folders.check_same_classes(first, second)
        return _from_folder(first), _from_folder(second)
    wanted = _names_in(train_split or "train") + _names_in(validation_split or "validation")
    builder = prepared.prepare(data, data_dir, wanted)
    first, second = _default_splits(builder, train_split, validation_split, held_out)
    columns = find_columns(builder)
    return (
        _from_builder(data, builder, columns, first),
        _from_builder(data, builder, columns, second),
    )


def open_dataset(
    data: str | os.PathLike,
    split: str | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    classes: str = "imagenet",
) -> ImageDataset:
    """Opens one part of a data set, for evaluation. Nothing is downloaded.

    Args:
        data: as for `open_datasets`; a folder may also be the part itself, such as ImageNet's
            validation images in one folder for each WordNet id.
        split: a sub-folder, or a split as tensorflow-datasets writes it. None: the one for
            validation, as in `open_datasets`, or the whole folder if it holds the classes.
        data_dir: as for `open_datasets`.
        classes: as for `open_datasets`. The default is for the public checkpoints; use `"present"`
            for a network that was trained on some of ImageNet's classes.

    Returns:
        The `ImageDataset`.

    Raises:
        ValueError: as for `open_datasets`.
        ImportError: tensorflow-datasets is needed but not installed.

    Example:
        validation = open_dataset("/data/imagenet/val")
    """
    keep_tensorflow_off_gpus()
    data = _checked(data, data_dir)
    root = prepared.folder_of_images(data)
    if root is not None:
        if idx.parts_of(root):
            return _from_idx(idx.open_part(root, split))
        return _from_folder(folders.read_folder(folders.find_part(root, split), classes))
    builder = prepared.prepare(data, data_dir, _names_in(split or "validation"))
    if split is None:
        names = builder.info.splits
        split = next((name for name in ("validation", "test") if name in names), "validation")
    return _from_builder(data, builder, find_columns(builder), split)


def _checked(data: str | os.PathLike, data_dir: str | os.PathLike | None) -> str:
    check_local(data, "data")
    check_local(data_dir, "data_dir")
    if data is None:
        raise ValueError("`data` must be a folder or a data set's name. Received: data=None")
    return os.fspath(data)


def describe(training: ImageDataset, validation: ImageDataset) -> str:
    """Describes what a run is trained and validated on.

    Args:
        training: what to train on.
        validation: what to validate on.

    Returns:
        A line for each, and another if the classes are some of ImageNet's.

    Example:
        print(describe(*open_datasets("flowers")))
    """
    lines = [
        f"training: {training.count:,} images of {len(training.classes):,} classes "
        f"({training.name})",
        f"validation: {validation.count:,} images ({validation.name})",
    ]
    known = folders.imagenet_of(training.classes)
    if known is not None and len(known) > len(training.classes):
        lines.append(
            f"The classes are {len(training.classes):,} of ImageNet's {len(known):,}, and the "
            f"network has {len(training.classes):,} outputs. For all {len(known):,}, in the order "
            'of the public checkpoints, use classes="imagenet" (--classes imagenet).'
        )
    return "\n".join(lines)


# --- Folders ----------------------------------------------------------------------------------


def _hold_out(
    folder: folders.Folder, held_out: float, seed: int
) -> tuple[ImageDataset, ImageDataset]:
    root = str(folder.root)
    kept, held = choose_held_out(folder.labels, folder.classes, held_out, seed, root)
    if held_out < 1:
        names = f"{1 - held_out:.0%} to train on", f"{held_out:.0%} held out"
    else:
        names = "all others", f"{held_out:,.0f} images held out"
    return (
        _from_folder(folder.part(kept), f"{root}, {names[0]}"),
        _from_folder(folder.part(held), f"{root}, {names[1]}"),
    )


def _from_folder(folder: folders.Folder, name: str | None = None) -> ImageDataset:
    with tf.device("CPU"):
        paths = tf.constant(folder.paths)

    def read(index: tf.Tensor, label: tf.Tensor) -> dict[str, tf.Tensor]:
        path = paths[index]
        return {"image": tf.io.read_file(path), "label": label, "name": path}

    return ImageDataset(
        name or str(folder.root),
        len(folder.paths),
        folder.classes,
        _examples(folder.labels, read),
        folder.fingerprint(),
    )


def _examples(
    labels: np.ndarray, read: Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]
) -> Callable[..., tf.data.Dataset]:
    """Makes `ImageDataset.examples`; `read` returns the example of an index and its label."""

    def examples(seed: int | None, start: int, shard: Shard | None = None) -> tf.data.Dataset:
        order = np.arange(len(labels))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        order = order[start:]
        if shard is not None:
            order = order[shard.holds(np.arange(start, start + len(order)))]
        chosen = tf.data.Dataset.from_tensor_slices((order, labels[order]))
        return chosen.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    return examples


# --- IDX files --------------------------------------------------------------------------------


def _from_idx(part: idx.Part) -> ImageDataset:
    with tf.device("CPU"):
        pixels = tf.constant(part.images[..., None])

    def read(index: tf.Tensor, label: tf.Tensor) -> dict[str, tf.Tensor]:
        name = tf.strings.join([f"{part.name}/", tf.strings.as_string(index)])
        return {"image": tf.io.encode_png(pixels[index]), "label": label, "name": name}

    examples = _examples(part.labels, read)
    return ImageDataset(part.name, len(part.labels), part.classes, examples, part.fingerprint())


# --- tensorflow-datasets ----------------------------------------------------------------------


def _names_in(split: str) -> list[str]:
    """Returns the names of the splits in a text such as `"train[:50%]+test"`."""
    return [re.split(r"\W", part.strip(), maxsplit=1)[0] for part in split.split("+")]


def _default_splits(
    builder: Any, train: str | None, validation: str | None, held_out: float
) -> tuple[str, str]:
    names = list(map(str, builder.info.splits))
    if train is None:
        is_only_split = len(names) == 1 and names[0] not in ("validation", "test")
        train = names[0] if is_only_split else "train"
    if validation is None:
        validation = next((name for name in ("validation", "test") if name in names), None)
    if validation is not None:
        return train, validation
    if train not in names:
        raise ValueError(
            f"The data set {builder.info.full_name!r} has no split for validation. It has: "
            f"{', '.join(names)}. Name one to validate on, beside train_split={train!r}."
        )
    count = builder.info.splits[train].num_examples
    kept = count - count_held_out(held_out, count, builder.info.full_name)
    return f"{train}[:{kept}]", f"{train}[{kept}:]"


def _from_builder(data: str, builder: Any, columns: Columns, split: str) -> ImageDataset:
    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        advice = (
            f" To add one, put its files into downloads/manual and remove {builder.data_path}."
            if builder.name in prepared.MANUAL_DATASETS
            else ""
        )
        raise ValueError(
            f"The data set {data!r} has no split {split!r}. It has: "
            f"{', '.join(builder.info.splits)}.{advice}"
        ) from error
    if not count:
        raise ValueError(f"The split {split!r} of the data set {data!r} is empty.")

    def examples(seed: int | None, start: int, shard: Shard | None = None) -> tf.data.Dataset:
        return read_records(builder, columns, split, seed, start, shard)

    try:  # Unlabeled splits are common; all their labels are -1.
        next(iter(examples(None, 0)))
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            f"The split {split!r} of the data set {data!r} cannot be used. "
            f"{find_label_error(error) or error.message}"
        ) from error
    fingerprint = f"{builder.info.full_name}, {split}"
    return ImageDataset(f"{data}, {split}", count, columns.classes, examples, fingerprint)
