"""Decodes images in a `tf.data` pipeline, and reports those that cannot be read.

For training, TensorFlow decodes JPEG files, the usual format: only the crop, at a half, a quarter
or an eighth of the size if that leaves enough pixels, and with the same integer transforms as
Pillow. Pillow reads everything else, as in `keras_coatnet.images`: other formats, files with data
after their end, and files that TensorFlow refuses. So training, evaluation and prediction see the
same pixels of the same file.

Images for evaluation are read by Pillow only. TensorFlow's antialiased bilinear resize is within 1
of 255 of Pillow's, but its bicubic and Lanczos resizes differ by up to 9 at edges, where the filter
overshoots (Pillow clips values between its two passes). Published accuracies were measured with
Pillow's pixels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from PIL import Image

from keras_coatnet.images import MAX_PIXELS, ImageSettings, read_rgb, resize_and_crop
from keras_coatnet.training.data.augment import Augmentation
from keras_coatnet.training.data.unreadable import UnreadableImages

_MAX_ATTEMPTS = 10  # at a random crop that fits, as in the TPU EfficientNet code
_JPEG_RATIOS = (8, 4, 2, 1)


# --- Training --------------------------------------------------------------------------------


def decode_for_training(
    contents: tf.Tensor,
    names: tf.Tensor,
    seeds: tf.Tensor,
    size: tuple[int, int],
    augmentation: Augmentation,
    unreadable: UnreadableImages,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes, crops and resizes a small group of images, for a parallel map over groups.

    TensorFlow can only recover from a failed operation with a dataset that ignores errors. One such
    dataset for each image costs half as much time as the decoding; one for each group costs almost
    none.

    Args:
        contents: (group,), string, the encoded files.
        names: (group,), string, their names for messages.
        seeds: (group, 2), int64: decide the crops.
        size: height and width to return.
        augmentation: how to crop.
        unreadable: collects the images that cannot be read.

    Returns:
        The images, (group, height, width, 3), uint8, black where one cannot be read; and whether
        each can be read, (group,), bool.
    """
    count = tf.shape(contents)[0]
    read = functools.partial(_read, finish=np.asarray, black_size=(1, 1), unreadable=unreadable)

    def fast(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index, _decode_jpeg(contents[index], seeds[index], size, augmentation)

    def slow(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels, is_valid = tf.numpy_function(
            read, [contents[index], names[index]], [tf.uint8, tf.bool], stateful=True
        )
        pixels.set_shape([None, None, 3])
        is_valid.set_shape([])
        return _crop_and_resize(pixels, seeds[index], size, augmentation), is_valid

    def with_slow() -> tuple[tf.Tensor, tf.Tensor]:
        is_missing = tf.reduce_all(tf.range(count)[:, None] != done[None], axis=1)
        rest = tf.where(is_missing)[:, 0]
        types = (tf.TensorSpec([*size, 3], tf.uint8), tf.TensorSpec([], tf.bool))
        others, are_valid = tf.map_fn(slow, rest, fn_output_signature=types)
        order = tf.argsort(tf.concat([done, tf.cast(rest, tf.int32)], axis=0))
        all_valid = tf.concat([tf.ones_like(done, tf.bool), are_valid], axis=0)
        return tf.gather(tf.concat([decoded, others], 0), order), tf.gather(all_valid, order)

    candidates = tf.where(_is_plain_jpeg(contents))[:, 0]
    done, decoded = (
        tf.data.Dataset.from_tensor_slices(tf.cast(candidates, tf.int32))
        .map(fast)
        .ignore_errors()
        .concatenate(tf.data.Dataset.from_tensors((-1, tf.zeros([*size, 3], tf.uint8))))
        .batch(tf.cast(count + 1, tf.int64))
        .get_single_element()
    )
    # `get_single_element` needs one element, so an extra one was appended.
    done, decoded = done[:-1], decoded[:-1]
    return tf.cond(tf.shape(done)[0] == count, lambda: (decoded, tf.fill([count], True)), with_slow)


def _is_plain_jpeg(contents: tf.Tensor) -> tf.Tensor:
    """Whether each file has the first two and the last two bytes of a JPEG.

    Without the check of the last two, a truncated file would be readable in the epochs whose crop
    is above the missing part, and unreadable in others.
    """
    last = tf.maximum(tf.strings.length(contents) - 2, 0)
    two = tf.fill(tf.shape(contents), 2)
    starts = tf.strings.substr(contents, 0, 2) == b"\xff\xd8"
    return starts & (tf.strings.substr(contents, last, two) == b"\xff\xd9")


def _decode_jpeg(content, seed, size, augmentation):
    shape = tf.io.extract_jpeg_shape(content)
    pixels = tf.reduce_prod(tf.cast(shape[:2], tf.int64))
    with tf.control_dependencies([tf.debugging.Assert(pixels <= MAX_PIXELS, [pixels])]):
        shape = tf.identity(shape)
    box = _crop_box(shape, seed, size, augmentation)
    shrink = tf.reduce_min(box[2:] // tf.constant(size))

    def decode(ratio: int) -> tf.Tensor:
        extent = box[2:] // ratio
        begin = tf.minimum((box[:2] + ratio // 2) // ratio, -(-shape[:2] // ratio) - extent)
        window = tf.concat([begin, extent], axis=0)
        return tf.io.decode_and_crop_jpeg(
            content, window, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    choices = [functools.partial(decode, ratio) for ratio in _JPEG_RATIOS]
    choice = tf.reduce_sum([tf.cast(shrink < ratio, tf.int32) for ratio in _JPEG_RATIOS[:-1]])
    return _rounded(tf.image.resize(tf.switch_case(choice, choices), size), size)


def _crop_and_resize(pixels, seed, size, augmentation):
    """Crops and resizes; antialiases, which is slow, only images that shrink to half or less.

    `_decode_jpeg` decodes those at a fraction of the size instead.
    """
    box = _crop_box(tf.shape(pixels), seed, size, augmentation)
    part = tf.slice(pixels, [box[0], box[1], 0], [box[2], box[3], 3])
    resized = tf.cond(
        tf.reduce_max(box[2:] // tf.constant(size)) >= 2,
        lambda: tf.image.resize(part, size, antialias=True),
        lambda: tf.image.resize(part, size),
    )
    return _rounded(resized, size)


def _rounded(pixels, size):
    return tf.cast(tf.ensure_shape(pixels, [*size, 3]) + 0.5, tf.uint8)


def _crop_box(shape, seed, size, augmentation):
    """The top, left, height and width of the crop, (4,), int32, for an image of shape `shape`."""
    if augmentation.crop == "whole":
        return tf.stack([0, 0, shape[0], shape[1]])
    center = _center_box(shape, size, augmentation.center_ratio)
    if augmentation.crop == "center":
        return center
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=augmentation.aspect,
        area_range=augmentation.area,
        max_attempts=_MAX_ATTEMPTS,
    )
    box = tf.concat([begin[:2], extent[:2]], axis=0)
    if augmentation.area == (1.0, 1.0):
        return box
    # TensorFlow returns the whole image if no attempt fits; the center is cropped instead.
    return tf.where(tf.reduce_all(extent[:2] == shape[:2]), center, box)


def _center_box(shape, size, ratio):
    sides = tf.cast(shape[:2], tf.float64)
    target = tf.constant(size, tf.float64)
    kept = tf.cast(tf.round(target * tf.reduce_min(sides / target) * ratio), tf.int32)
    kept = tf.clip_by_value(kept, 1, shape[:2])
    return tf.concat([(shape[:2] - kept) // 2, kept], axis=0)


def _read(
    content: bytes,
    name: bytes,
    finish: Callable[[Image.Image], np.ndarray],
    black_size: tuple[int, int],
    unreadable: UnreadableImages,
) -> tuple[np.ndarray, np.bool_]:
    """Returns `finish(image)` and True, or reports the image and returns black pixels and False."""
    try:
        return finish(read_rgb(io.BytesIO(content))), np.bool_(True)
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        unreadable.add(name.decode("utf-8", "replace"), _reason(content, error))
        return np.zeros([*black_size, 3], "uint8"), np.bool_(False)


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image"  # Pillow's text contains the address of an object
    return str(error)


# --- Evaluation ------------------------------------------------------------------------------


def decode_for_evaluation(
    content: tf.Tensor, name: tf.Tensor, settings: ImageSettings, unreadable: UnreadableImages
) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads one image as `keras_coatnet.images.load_image` does.

    Args:
        content: scalar string, the encoded file.
        name: scalar string, its name for messages.
        settings: size, interpolation and crop.
        unreadable: collects the images that cannot be read.

    Returns:
        The image, (height, width, 3), uint8, black if it cannot be read; and whether it can be
        read, a scalar, bool.
    """
    size = settings.height_and_width
    finish = functools.partial(resize_and_crop, settings=settings)
    read = functools.partial(_read, finish=finish, black_size=size, unreadable=unreadable)
    pixels, is_valid = tf.numpy_function(read, [content, name], [tf.uint8, tf.bool])
    return tf.ensure_shape(pixels, [*size, 3]), tf.ensure_shape(is_valid, [])
