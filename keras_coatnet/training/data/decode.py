"""Encoded images in, pixels out; what cannot be read is named, counted and left out.

JPEG, of which data sets at this scale are made, is decoded by TensorFlow: only the rows and columns
of the crop, at a half, quarter or eighth of the size where that is still enough pixels, and with
the same exact transforms as Pillow. All else goes to Pillow, as `keras_coatnet.images` reads
images: other formats, files with something after their end, whatever TensorFlow refuses. So
training, evaluation and prediction see the same pixels in the same file.

Images that are only evaluated go through Pillow altogether: TensorFlow's antialiased bilinear
resize is within 1 of 255 of Pillow's, but its bicubic and Lanczos ones are up to 9 off where an
edge overshoots (Pillow cuts values off between its two passes), and published accuracies were
measured with Pillow's.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from PIL import Image

from keras_coatnet.images import MAX_PIXELS, ImageSettings, read_rgb, resize_and_crop
from keras_coatnet.training.data.augment import Augmentation

_SHOWN = 10  # names in an error's message
_ATTEMPTS = 10  # at a random crop that fits, as the TPU EfficientNet code has it
_JPEG_RATIOS = (8, 4, 2, 1)


class UnreadableImages:
    """Collects the images that cannot be read, and ends the run when there are too many.

    An error in a `tf.data` pipeline reaches the user as one of TensorFlow's, without its cause. It
    is kept in `error`, to be raised instead.

    Args:
        limit: how many different images may be unreadable, at least 0.

    Attributes:
        limit: as given.
        error: the ValueError that ended the run, with the images' names; None while all is well.

    Raises:
        ValueError: the limit is no such number.

    Example:
        >>> unreadable = UnreadableImages(limit=1)
        >>> unreadable.add("cat/17.jpg", "it is empty")
        >>> unreadable.names
        ['cat/17.jpg']
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise ValueError(f"`limit` must be a whole number, at least 0. Received: {limit!r}")
        self.limit = limit
        self.error: ValueError | None = None
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The images' names, each once, in the order in which they were met."""
        with self._lock:
            return list(self._reasons)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each image cannot be read, by its name."""
        with self._lock:
            return dict(self._reasons)

    def add(self, name: str, reason: str) -> None:
        """Notes an image.

        Args:
            name: its file or record.
            reason: why it cannot be read.

        Raises:
            ValueError: with this one, there are more than `limit` different ones.
        """
        with self._lock:
            self._reasons.setdefault(name, reason)
            if len(self._reasons) > self.limit:
                self._stop(
                    f"{len(self._reasons)} images cannot be read, more than the limit of "
                    f"{self.limit}"
                )

    def refuse_batch(self, size: int) -> None:
        """Ends the run because no image of a batch can be read, so that none can stand in.

        Args:
            size: how many images the batch should hold.

        Raises:
            ValueError: always.
        """
        with self._lock:
            self._stop(f"Not one image of a batch of {size} can be read")

    def _stop(self, problem: str) -> None:
        shown = [f"{name} ({reason})" for name, reason in self._reasons.items()][-_SHOWN:]
        more = f" and {len(self._reasons) - len(shown)} more" if len(self._reasons) > _SHOWN else ""
        self.error = ValueError(
            f"{problem}: {', '.join(shown)}{more}. Repair or remove them, or raise "
            "`unreadable_limit` (--unreadable-limit)."
        )
        raise self.error


# --- Training --------------------------------------------------------------------------------


def decode_for_training(
    contents: tf.Tensor,
    names: tf.Tensor,
    seeds: tf.Tensor,
    size: tuple[int, int],
    augmentation: Augmentation,
    unreadable: UnreadableImages,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes, crops and resizes a few images; meant for a parallel map over small groups.

    An operation that fails would end the pipeline. The one way to go on inside it is a dataset
    that ignores errors; a dataset of one's own for each image costs as much as half its
    decoding, one for each group next to nothing.

    Args:
        contents: (group,), the encoded files.
        names: (group,), their names, for messages.
        seeds: (group, 2), int64: decide the crops.
        size: height and width to return.
        augmentation: how to crop.
        unreadable: told of what cannot be read.

    Returns:
        (group, height, width, 3), uint8, and (group,), bool: whether each could be read. The others
        are black.
    """
    count = tf.shape(contents)[0]

    def fast(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index, _decode_jpeg(contents[index], seeds[index], size, augmentation)

    def slow(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels, is_valid = tf.numpy_function(
            functools.partial(_read_or_report, unreadable=unreadable),
            [contents[index], names[index]],
            [tf.uint8, tf.bool],
            stateful=True,
        )
        pixels.set_shape([None, None, 3])
        is_valid.set_shape([])
        return _crop_and_resize(pixels, seeds[index], size, augmentation), is_valid

    def with_slow() -> tuple[tf.Tensor, tf.Tensor]:
        missing = tf.reduce_all(tf.range(count)[:, None] != done[None], axis=1)
        rest = tf.where(missing)[:, 0]
        types = (tf.TensorSpec([*size, 3], tf.uint8), tf.TensorSpec([], tf.bool))
        others, are_valid = tf.map_fn(slow, rest, fn_output_signature=types)
        places = tf.concat([done, tf.cast(rest, tf.int32)], axis=0)
        order = tf.argsort(places)
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
    done, decoded = done[:-1], decoded[:-1]  # without the last, which keeps the dataset from none
    return tf.cond(tf.shape(done)[0] == count, lambda: (decoded, tf.fill([count], True)), with_slow)


def _is_plain_jpeg(contents: tf.Tensor) -> tf.Tensor:
    """Whether each has a JPEG's first and last two bytes.

    Without the check of the last two, a file that was cut off below the crop would count as whole
    in one epoch and as broken in the next.
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
    """Antialiased where the image shrinks to half or less; otherwise as JPEG, much faster."""
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
    """(4,), int32: top, left, height, width of the part to take of an image of a shape."""
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
        max_attempts=_ATTEMPTS,
    )
    # All of the image stands for "none fits", unless that is what was asked for.
    is_all = tf.reduce_all(extent[:2] == shape[:2])
    whole_fits = augmentation.area[1] == 1.0 and augmentation.area[0] == 1.0
    box = tf.concat([begin[:2], extent[:2]], axis=0)
    return box if whole_fits else tf.where(is_all, center, box)


def _center_box(shape, size, ratio):
    sides = tf.cast(shape[:2], tf.float64)
    target = tf.constant(size, tf.float64)
    kept = tf.cast(tf.round(target * tf.reduce_min(sides / target) * ratio), tf.int32)
    kept = tf.clip_by_value(kept, 1, shape[:2])
    return tf.concat([(shape[:2] - kept) // 2, kept], axis=0)


def _read_or_report(content, name, unreadable):
    pixels = _read(content, name, unreadable, np.asarray)
    if pixels is None:
        return np.zeros([1, 1, 3], "uint8"), np.bool_(False)
    return pixels, np.bool_(True)


def _read(
    content: bytes,
    name: bytes,
    unreadable: UnreadableImages,
    finish: Callable[[Image.Image], np.ndarray],
) -> np.ndarray | None:
    """The pixels that `finish` makes of an image; None, and noted, if it cannot be read."""
    try:
        return finish(read_rgb(io.BytesIO(content)))
    except Exception as error:  # each of Pillow's decoders has errors of its own
        unreadable.add(name.decode("utf-8", "replace"), _reason(content, error))
        return None


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image"  # Pillow's text names an object in memory
    return str(error)


# --- Evaluation ------------------------------------------------------------------------------


def decode_for_evaluation(
    content: tf.Tensor, name: tf.Tensor, settings: ImageSettings, unreadable: UnreadableImages
) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads one image as `keras_coatnet.images.load_image` does.

    Args:
        content: scalar string, the encoded file.
        name: scalar string, for messages.
        settings: size, interpolation and crop.
        unreadable: told of it when it cannot be read.

    Returns:
        (height, width, 3), uint8, and a scalar, bool: whether it could be read. If not, it is
        black.
    """

    def read(content: bytes, name: bytes) -> tuple[np.ndarray, np.bool_]:
        pixels = _read(content, name, unreadable, functools.partial(resize_and_crop, settings=settings))
        if pixels is None:
            return np.zeros([*settings.size, 3], "uint8"), np.bool_(False)
        return pixels, np.bool_(True)

    pixels, is_valid = tf.numpy_function(read, [content, name], [tf.uint8, tf.bool])
    return tf.ensure_shape(pixels, [*settings.size, 3]), tf.ensure_shape(is_valid, [])
