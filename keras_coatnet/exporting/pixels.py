"""From encoded images to pixels within TensorFlow's graph, as `images.py` does it with Pillow.

TensorFlow's own antialiased resizing differs from Pillow's by a third of a gray level on average,
because Pillow rounds to whole numbers between its two passes, along rows and then along columns.
Here, each pass is a matrix product with Pillow's weights, and rounds as Pillow does. One value in
ten thousand differs by one gray level; more where Pillow 13 takes the columns first, as it does for
some tall images: one value in five, by one gray level and seldom by up to six.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_coatnet.images import ImageSettings


def _bicubic(x: Any) -> Any:
    x = tf.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return tf.where(x < 1, near, tf.where(x < 2, far, 0))


def _hamming(x: Any) -> Any:
    return tf.where(tf.abs(x) < 1, _sinc(x) * (0.54 + 0.46 * tf.cos(math.pi * x)), 0)


def _sinc(x: Any) -> Any:
    return tf.where(
        x == 0, tf.ones_like(x), tf.math.divide_no_nan(tf.sin(math.pi * x), math.pi * x)
    )


# The filters of Pillow: a function of the distance to the center, and the distance where it ends.
_FILTERS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "box": (lambda x: tf.cast((x > -0.5) & (x <= 0.5), x.dtype), 0.5),
    "bilinear": (lambda x: tf.maximum(1 - tf.abs(x), 0), 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (lambda x: tf.where(tf.abs(x) < 3, _sinc(x) * _sinc(x / 3), 0), 3.0),
}


def decode_and_prepare(encoded: Any, settings: ImageSettings) -> Any:
    """Decodes images, and resizes and crops them as `ImageSettings` say.

    JPEG, PNG, GIF, BMP and WebP are read. As in `images.py`, transparent parts become white, of an
    animation the first frame is read, and the orientation that a camera writes into the EXIF tags
    is ignored.

    Args:
        encoded: (batch,), strings: the bytes of image files.
        settings: size, interpolation and crop. Interpolation `"nearest"` is computed as `"box"`.

    Returns:
        (batch, height, width, 3), float32: raw pixels, 0 to 255.
    """
    return tf.map_fn(
        lambda each: _resize_and_crop(_decode(each), settings),
        encoded,
        fn_output_signature=tf.TensorSpec((*settings.height_and_width, 3), tf.float32),
    )


def _decode(encoded: Any) -> Any:
    """Returns (height, width, 3), float32."""

    def has(position: int, mark: bytes) -> Any:
        return tf.strings.substr(encoded, position, len(mark)) == mark

    def on_white(image: Any) -> Any:
        color, alpha = tf.split(tf.cast(image, tf.float32), [3, 1], axis=-1)
        return tf.round(color * (alpha / 255) + (255 - alpha))

    def webp() -> Any:
        image = tf.io.decode_webp(encoded)[0]  # of three or four channels, as the file has
        return tf.cond(
            tf.shape(image)[-1] == 4,
            lambda: on_white(image),
            lambda: tf.cast(image, tf.float32)[..., :3],
        )

    def plain() -> Any:
        # TensorFlow takes the palette of a BMP file for its pixels.
        bits = tf.strings.unicode_decode(tf.strings.substr(encoded, 28, 1), "US-ASCII")
        tf.debugging.Assert(
            ~has(0, b"BM") | tf.reduce_all(bits >= 24),
            ["A BMP file must have 24 or 32 bits per pixel. Received, bits per pixel:", bits],
        )
        # The accurate cosine transform is the one that Pillow uses.
        image = tf.cond(
            has(0, b"\xff\xd8"),
            lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
            lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
        )
        return tf.cast(image, tf.float32)

    # Gray of fewer than 8 bits has no alpha, and TensorFlow would give it one of 1 in 255.
    header = tf.strings.substr(encoded, 24, 2)
    is_small_gray = tf.reduce_any([header == bytes([bits, 0]) for bits in (1, 2, 4)])
    image = tf.cond(
        has(0, b"\x89PNG") & ~is_small_gray,
        lambda: on_white(tf.io.decode_png(encoded, channels=4)),
        lambda: tf.cond(
            has(8, b"WEBP"),
            webp,
            plain,
        ),
    )
    return tf.ensure_shape(image, (None, None, 3))


def _resize_and_crop(image: Any, settings: ImageSettings) -> Any:
    height, width = tf.unstack(tf.shape(image)[:2])
    new_height, new_width = _resized_size(height, width, settings)
    crop_height, crop_width = settings.height_and_width
    rows = _weights(height, new_height, crop_height, settings.interpolation)
    columns = _weights(width, new_width, crop_width, settings.interpolation)
    image = _to_whole(tf.einsum("oi,hic->hoc", columns, image))
    return _to_whole(tf.einsum("oi,iwc->owc", rows, image))


def _to_whole(pixels: Any) -> Any:
    return tf.floor(tf.clip_by_value(pixels, 0, 255) + 0.5)


def _resized_size(height: Any, width: Any, settings: ImageSettings) -> tuple[Any, Any]:
    """Returns height and width before the crop, as `images.resized_size` does."""
    target_height, target_width = (
        math.floor(side / settings.crop_pct) for side in settings.height_and_width
    )
    if settings.crop_mode == "squash":
        return tf.constant(target_height), tf.constant(target_width)
    height, width = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
    if target_width == target_height:
        short = tf.minimum(width, height)
        sides = tf.floor(target_width * height / short), tf.floor(target_width * width / short)
    else:
        ratio = tf.minimum(width / target_width, height / target_height)
        sides = tf.round(height / ratio), tf.round(width / ratio)
    return tf.cast(sides[0], tf.int32), tf.cast(sides[1], tf.int32)


def _weights(size: Any, new_size: Any, crop: int, interpolation: str) -> Any:
    """Returns (crop, size): the share of each pixel in each of those that the crop keeps."""
    function, support = _FILTERS[interpolation]
    margin = tf.cast(tf.round(tf.cast(new_size - crop, tf.float64) / 2), tf.int32)
    scale = tf.cast(size, tf.float64) / tf.cast(new_size, tf.float64)
    spread = tf.maximum(scale, 1)
    centers = (tf.cast(margin + tf.range(crop), tf.float64) + 0.5) * scale
    # Pillow leaves out the pixels at the edge of the filter that are rounded away.
    first = tf.maximum(tf.floor(centers - support * spread + 0.5), 0)
    last = tf.floor(centers + support * spread + 0.5)
    pixels = tf.cast(tf.range(size), tf.float64)
    distance = (pixels + 0.5 - centers[:, None]) / spread
    inside = (pixels >= first[:, None]) & (pixels < last[:, None])
    weights = tf.where(inside, function(distance), 0)
    return tf.cast(weights / tf.reduce_sum(weights, axis=1, keepdims=True), tf.float32)
