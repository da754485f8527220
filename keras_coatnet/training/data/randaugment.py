"""RandAugment on 8-bit images in TensorFlow, one image at a time.

The sixteen operations, their equal probabilities and their strengths are those of the TPU
EfficientNet reference code (`models/official/efficientnet/autoaugment.py` of tensorflow/tpu;
RandAugment: Cubuk et al., arXiv 1909.13719). The level l is `magnitude / 10`; magnitudes above 10
go beyond AutoAugment's ranges:

| operation | at level l | magnitude 15, at 224 |
|---|---|---|
| AutoContrast, Equalize, Invert | independent of the level | |
| Rotate | 30 l degrees, in a random direction | 45 |
| Posterize | keeps 4 l bits: higher levels do less, levels from 2 on nothing | 6 |
| Solarize | inverts values of 256 l and above: levels from 1 on do nothing | nothing |
| SolarizeAdd | adds 110 l to values below 128 | 165 |
| Color, Contrast, Brightness, Sharpness | Pillow's factor 0.1 + 1.8 l; 1 changes nothing | 2.8 |
| ShearX, ShearY | 0.3 l, in a random direction | 0.45 |
| TranslateX, TranslateY | 100 l pixels, in a random direction | 150 |
| Cutout | a gray square with sides of 80 l pixels around a random point | 120 |

There are two differences from that code:

- The pixels of the last two rows are for images of 224 pixels and scale with the image's size. In
  the reference code they are fixed, which moves an image of 64 x 64 out of view.
- The operations that Pillow has match Pillow exactly (AutoContrast to 1 of 255, as Pillow has
  rounding errors). Those of the reference code differ: its Contrast takes the number of pixels
  divided by 256 for their mean.

For speed, only the chosen operation runs (`tf.switch_case`), and none is more than a few simple
tensor operations, a lookup in a table of 256 entries for each channel (Equalize), or a projective
transform to the nearest pixels, as in the reference code (Rotate, ShearX and ShearY).
"""

from __future__ import annotations

import functools
import math

import tensorflow as tf

GRAY = 128  # for pixels from outside the image, and for Cutout's square
DRAWS = 4  # random numbers for an operation: which one, its direction, a point's y and x

_REFERENCE_SIDE = 224.0


def randaugment(image: tf.Tensor, draws: tf.Tensor, magnitude: float) -> tf.Tensor:
    """Applies randomly chosen operations, one after another.

    Args:
        image: (height, width, 3), uint8, of known shape.
        draws: (num_ops, 4), float32, uniform in [0, 1): everything random about the result.
        magnitude: strength of the operations, 0 to 30; the CoAtNet paper uses 5, 15 and 20.

    Returns:
        (height, width, 3), uint8.

    Example:
        >>> gray = tf.fill([32, 32, 3], tf.constant(100, tf.uint8))
        >>> draws = tf.random.stateless_uniform([2, DRAWS], seed=[1, 2])
        >>> randaugment(gray, draws, magnitude=15).shape
        TensorShape([32, 32, 3])
    """
    for draw in tf.unstack(draws):
        direction = tf.where(draw[1] < 0.5, -1.0, 1.0)
        branches = [
            functools.partial(operation, image, magnitude / 10.0, direction, draw[2:])
            for operation in OPERATIONS.values()
        ]
        image = tf.switch_case(tf.cast(draw[0] * len(branches), tf.int32), branches)
    return image


# --- Color operations ------------------------------------------------------------------------
# Every operation takes the image, the level, a direction (-1 or 1) and a point in the unit square,
# whether it uses them or not.


def _autocontrast(image, level, direction, point):
    floats = tf.cast(image, tf.float32)  # TensorFlow reduces float32 faster than uint8
    low, high = (reduce(reduce(floats, 0), 0) for reduce in (tf.reduce_min, tf.reduce_max))
    scale = 255.0 / tf.maximum(high - low, 1.0)
    low, scale = (tf.where(high > low, low, 0.0), tf.where(high > low, scale, 1.0))
    height, width, channels = image.shape
    flat = tf.reshape(floats, [height, width * channels])  # two axes broadcast faster than three
    low, scale = tf.tile(low, [width]), tf.tile(scale, [width])
    # 1e-3 makes up for rounding errors. An exact result that is not an integer is at least 1 / 255
    # below the next one.
    return tf.reshape(tf.cast((flat - low) * scale + 1e-3, tf.uint8), image.shape)


def _equalize(image, level, direction, point):
    positions = tf.reshape(_by_channel(image), [-1])
    counts = tf.math.bincount(positions, minlength=768, maxlength=768)
    counts = tf.transpose(tf.reshape(counts, [3, 256]))
    values = tf.range(256)[:, None]
    brightest = values == tf.reduce_max(tf.where(counts > 0, values, 0), axis=0)
    step = tf.reduce_sum(tf.where(brightest, 0, counts), axis=0) // 255
    below = tf.cumsum(counts, axis=0, exclusive=True)
    spread = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    return _by_tables(image, tf.where(step > 0, spread, values))


def _by_tables(image, tables):
    """Looks up each value in its channel's column of `tables`, (256, 3)."""
    entries = tf.reshape(tf.transpose(tf.cast(tables, tf.uint8)), [-1])
    return tf.reshape(tf.gather(entries, _by_channel(image)), image.shape)


def _by_channel(image):
    """Returns (height, width * 3), int32: the values, plus 256 for green and 512 for blue."""
    height, width, channels = image.shape
    flat = tf.reshape(tf.cast(image, tf.int32), [height, width * channels])
    return flat + tf.tile(tf.constant([0, 256, 512]), [width])


def _invert(image, level, direction, point):
    return 255 - image


def _posterize(image, level, direction, point):
    kept = min(int(level * 4), 8)
    return tf.bitwise.bitwise_and(image, tf.constant(256 - 2 ** (8 - kept), tf.uint8))


def _solarize(image, level, direction, point):
    threshold = int(level * 256)
    if threshold > 255:
        return tf.identity(image)
    return tf.bitwise.bitwise_xor(image, tf.cast(image >= threshold, tf.uint8) * 255)


def _solarize_add(image, level, direction, point):
    floats = tf.cast(image, tf.float32)
    added = floats + int(level * 110) * tf.cast(floats < 128, tf.float32)
    return tf.cast(tf.minimum(added, 255.0), tf.uint8)


def _color(image, level, direction, point):
    gray = _luminance(image)
    return tf.stack([_blend(gray, one, level) for one in tf.unstack(image, axis=-1)], axis=-1)


def _contrast(image, level, direction, point):
    # Integers, as a sum of floats is rounded and depends on the order.
    total = tf.reduce_sum(tf.cast(_luminance(image), tf.int32))
    mean = tf.cast(total, tf.float64) / tf.cast(tf.reduce_prod(tf.shape(image)[:2]), tf.float64)
    return _blend(tf.cast(tf.floor(mean + 0.5), tf.float32), image, level)


def _brightness(image, level, direction, point):
    return _blend(tf.constant(0.0), image, level)


def _sharpness(image, level, direction, point):
    floats = tf.cast(image, tf.float32)
    rows = floats[:, :-2] + floats[:, 1:-1] + floats[:, 2:]
    sums = rows[:-2] + rows[1:-1] + rows[2:] + 4.0 * floats[1:-1, 1:-1]
    smooth = tf.floor(sums / 13.0 + 0.5)
    inner = _blend(smooth, image[1:-1, 1:-1], level)
    middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], middle, image[-1:]], axis=0)


def _luminance(image):
    """Returns Pillow's gray values, (height, width), float32; the integer weights sum exactly."""
    red, green, blue = tf.unstack(tf.cast(image, tf.float32), axis=-1)
    return tf.floor((19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0) / 65536.0)


def _blend(degenerate, image, level):
    """Interpolates from a degenerate image (factor 0) to the image (factor 1) and beyond."""
    factor = level * 1.8 + 0.1
    values = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


# --- Geometric operations --------------------------------------------------------------------
# `_transform` takes six numbers (a, b, c, d, e, f): the pixel at (x, y) comes from
# (a x + b y + c, d x + e y + f).


def _rotate(image, level, direction, point):
    angle = direction * level * math.radians(30)
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = ((side - 1) / 2 for side in image.shape[:2])
    return _transform(image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y])


def _shear_x(image, level, direction, point):
    return _transform(image, [1.0, direction * level * 0.3, 0.0, 0.0, 1.0, 0.0])


def _shear_y(image, level, direction, point):
    return _transform(image, [1.0, 0.0, 0.0, direction * level * 0.3, 1.0, 0.0])


def _translate_x(image, level, direction, point):
    return _translate(image, level * 100 * image.shape[1] / _REFERENCE_SIDE, direction, axis=1)


def _translate_y(image, level, direction, point):
    return _translate(image, level * 100 * image.shape[0] / _REFERENCE_SIDE, direction, axis=0)


def _translate(image, pixels, direction, axis):
    pixels = math.floor(pixels + 0.5)
    paddings = [[pixels, pixels] if axis == one else [0, 0] for one in range(3)]
    padded = tf.pad(image, paddings, constant_values=GRAY)
    first = pixels * (1 + tf.cast(direction, tf.int32))
    begin = [first if axis == one else 0 for one in range(3)]
    return tf.ensure_shape(tf.slice(padded, begin, image.shape), image.shape)


def _transform(image, numbers):
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.stack([*numbers, 0.0, 0.0])[None],
        output_shape=image.shape[:2],
        fill_value=float(GRAY),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


def _cutout(image, level, direction, point):
    height, width = image.shape[:2]
    center_y, center_x = tf.floor(point[0] * height), tf.floor(point[1] * width)
    rows = _within(height, center_y, int(level * 40 * height / _REFERENCE_SIDE))
    columns = _within(width, center_x, int(level * 40 * width / _REFERENCE_SIDE))
    hidden = rows[:, None] * tf.repeat(columns, 3)[None, :]
    flat = tf.reshape(image, [height, width * 3])
    return tf.reshape(flat * (1 - hidden) + GRAY * hidden, image.shape)


def _within(side, center, half):
    """Returns (side,), uint8: 1 at the 2 * half pixels around the center, 0 elsewhere."""
    offsets = tf.range(side, dtype=tf.float32) - center
    return tf.cast((offsets >= -half) & (offsets < half), tf.uint8)


OPERATIONS = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
