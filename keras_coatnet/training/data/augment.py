"""Augmentation of training images: its settings, flips, and mixing within a batch.

Crops are in `decode`, because a JPEG is cropped while it is decoded; RandAugment is in
`randaugment`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from keras_coatnet.arguments import boolean, choice, number, whole_number
from keras_coatnet.training.choices import CROPS


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are augmented.

    Args:
        crop: `"random_resized"`: a crop of random position, area and aspect ratio, resized (Szegedy
            et al., arXiv 1409.4842, drawn by TensorFlow's `sample_distorted_bounding_box`);
            `"center"`: a center crop, resized; `"whole"`: the whole image, resized without keeping
            its aspect ratio.
        area: smallest and largest area of a random crop, as a share of the image's area.
        aspect: smallest and largest width over height of a random crop.
        center_ratio: share of the shorter side that a center crop keeps. A center crop is also
            taken if no random crop fits into the image.
        flip: whether to mirror each image left to right with a probability of 1/2.
        randaugment_num_ops: number of random operations of RandAugment, 0 (none) to 16.
        randaugment_magnitude: their strength, 0 to 30 on the scale of the TPU EfficientNet code;
            `keras_coatnet.training.data.randaugment` says what it means for each operation.
        mixup: alpha of mixup (arXiv 1710.09412), which blends two images in shares drawn from
            Beta(alpha, alpha); 0 (none), or 0.01 to 100.
        cutmix: alpha of CutMix (arXiv 1905.04899), which exchanges a box between two images; 0
            (none), or 0.01 to 100. With both, each pair gets either with a probability of 1/2.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> Augmentation(randaugment_num_ops=2, randaugment_magnitude=15, mixup=0.8).mixes
        True
    """

    crop: str = "random_resized"
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    center_ratio: float = 0.875
    flip: bool = True
    randaugment_num_ops: int = 0
    randaugment_magnitude: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        num_ops, magnitude = self.randaugment_num_ops, self.randaugment_magnitude
        checked = {
            "crop": choice("crop", self.crop, CROPS),
            "area": _two_numbers("area", self.area),
            "aspect": _two_numbers("aspect", self.aspect),
            "center_ratio": number("center_ratio", self.center_ratio, above=0, most=1),
            "flip": boolean("flip", self.flip),
            "randaugment_num_ops": whole_number("randaugment_num_ops", num_ops, 0, 16),
            "randaugment_magnitude": number("randaugment_magnitude", magnitude, least=0, most=30),
            "mixup": number("mixup", self.mixup, least=0),
            "cutmix": number("cutmix", self.cutmix, least=0),
        }
        for field, value in checked.items():
            object.__setattr__(self, field, value)
        self._require("area", 0 < self.area[0] <= self.area[1] <= 1, "0 < least <= most <= 1")
        self._require("aspect", 0 < self.aspect[0] <= self.aspect[1] <= 100, "0 < least <= most")
        for field in ("mixup", "cutmix"):
            value = getattr(self, field)
            # With a smaller alpha, both gamma samples of which a share is made may be 0.
            self._require(field, value == 0 or 0.01 <= value <= 100, "0 (none), or 0.01 to 100")

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"`{field}` must be {expected}. Received: {getattr(self, field)!r}")

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix mixes images in pairs."""
        return self.mixup > 0 or self.cutmix > 0


def _two_numbers(argument: str, value: Any) -> tuple[float, float]:
    """Returns a pair as a tuple; a recipe that was saved as JSON has a list."""
    try:
        first, second = (number(argument, part) for part in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must be two numbers. Received: {argument}={value!r:.100}"
        ) from error
    return first, second


def flip(image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """Mirrors an image left to right where `draw`, uniform in [0, 1), is below one half.

    Args:
        image: (height, width, 3).
        draw: a scalar, float32.

    Returns:
        (height, width, 3).
    """
    return tf.cond(draw < 0.5, lambda: tf.reverse(image, [1]), lambda: tf.identity(image))


def mix(
    images: tf.Tensor,
    labels: tf.Tensor,
    augmentation: Augmentation,
    seed: tf.Tensor,
    first: tf.Tensor,
    total: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes neighbors (image 0 with 1, 2 with 3 and so on) by mixup or CutMix.

    Both images of a pair keep the same share of themselves. The shares of the whole global batch
    are drawn at once, so that they do not depend on how it is divided into chunks.

    Args:
        images: (batch, height, width, 3), uint8, of known shape; the batch size is even.
        labels: (batch, classes), float32.
        augmentation: which of the two, and their alphas.
        seed: (2,), int64: decides everything random about this global batch.
        first: index of the first image in its global batch, even.
        total: size of the global batch, even.

    Returns:
        (batch, height, width, 3), float32, and (batch, classes), float32.
    """
    count, height, width = images.shape[:3]
    assert count is not None  # the pipeline drops the remainder of an epoch
    pairs = count // 2
    drawn = _mixing_shares(augmentation, seed, total // 2)
    share, cuts, y, x = (values[first // 2 : first // 2 + pairs] for values in drawn)
    weights = tf.reshape(share, [pairs, 1, 1, 1, 1])
    if augmentation.cutmix > 0:
        outside = 1.0 - _boxes(share, y, x, height, width)
        left = tf.reduce_mean(outside, axis=[1, 2])
        outside = outside[:, None, :, :, None]
        if augmentation.mixup > 0:
            weights = tf.where(tf.reshape(cuts, weights.shape), outside, weights)
            share = tf.where(cuts, left, share)
        else:
            weights, share = outside, left
    mixed_images = _with_neighbor(images, weights, [pairs, 2, height, width, 3])
    return mixed_images, _with_neighbor(labels, share[:, None, None], [pairs, 2, labels.shape[1]])


def _mixing_shares(augmentation, seed, pairs):
    """Draws for each pair the share that an image keeps, whether to use CutMix, a box's center."""
    gamma_seed, cut_seed, center_seed = tf.unstack(tf.random.split(seed, num=3))
    if augmentation.mixup > 0 and augmentation.cutmix > 0:
        cuts = tf.random.stateless_uniform([pairs], cut_seed) < 0.5
    else:
        cuts = tf.fill([pairs], augmentation.cutmix > 0)
    alpha = tf.where(cuts, augmentation.cutmix, augmentation.mixup)
    alpha = tf.cast(alpha, tf.float64)
    one, other = tf.unstack(
        tf.random.stateless_gamma([2, pairs], gamma_seed, alpha, dtype=tf.float64)
    )
    share = tf.cast(one / (one + other), tf.float32)
    y, x = tf.unstack(tf.random.stateless_uniform([2, pairs], center_seed))
    return share, cuts, y, x


def _boxes(share, y, x, height, width):
    """Returns (pairs, height, width): 1 in boxes of area 1 - share around (y, x), clipped."""
    side = tf.sqrt(1.0 - share)

    def inside(length, center):
        half = tf.floor(side * length / 2)
        center = tf.floor(center * length)
        positions = tf.range(length, dtype=tf.float32)[None]
        return (positions >= (center - half)[:, None]) & (positions < (center + half)[:, None])

    return tf.cast(inside(height, y)[:, :, None] & inside(width, x)[:, None, :], tf.float32)


def _with_neighbor(values, share, shape):
    pairs = tf.reshape(tf.cast(values, tf.float32), shape)
    mixed = share * pairs + (1.0 - share) * tf.reverse(pairs, [1])
    return tf.reshape(mixed, values.shape)
