"""From image files to pixels, with Pillow and NumPy alone.

Images are prepared as timm's evaluation transform prepares them, so that a public checkpoint gets
the pixels that its published accuracy was measured on. Pillow resizes, as it does in timm, and the
pixels are equal. The resize operations of deep-learning libraries give others: TensorFlow's
antialiased bicubic resize differs by 0.3 of 255 on average. As in timm, the orientation that a
camera writes into the EXIF tags is ignored.

Nothing here needs Keras, so that the command line and the workers that decode images start fast.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from typing import BinaryIO

import numpy as np
from PIL import Image

from keras_coatnet.arguments import as_python, choice, number, two_whole_numbers

CROP_MODES = ("center", "squash")
INTERPOLATIONS = tuple(method.name.lower() for method in Image.Resampling)

# Suffixes of the files that are taken for images where a folder is given. A file that is named
# itself may have any suffix.
SUFFIXES = tuple(".avif .bmp .gif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split())

# The formats to read, by Pillow's names. Without this list, Pillow tries every format it knows,
# whatever the file's suffix, and starts Ghostscript for an EPS file.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Pillow refuses more by default. The limit stands here, too, because a program may change
# `PIL.Image.MAX_IMAGE_PIXELS`.
MAX_PIXELS = 178_956_970


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images are prepared for a model.

    Args:
        size: height and width of the model's input, in pixels; one number for a square.
        interpolation: how images are resized: `"bicubic"`, `"bilinear"`, `"lanczos"`, ...; always
            antialiased.
        crop_pct: share of the resized image's side that is kept, above 0 and at most 1. The
            default is that of most public checkpoints.
        crop_mode: `"center"`: the shorter side is resized to size / crop_pct, and the center is
            cropped; `"squash"`: both sides are resized to it, which changes the proportions.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> ImageSettings(224).size
        (224, 224)
    """

    size: int | tuple[int, int]
    interpolation: str = "bicubic"
    crop_pct: float = 0.95
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        size = as_python(self.size)
        if isinstance(size, int):
            size = (size, size)
        try:
            size = two_whole_numbers("size", size)
        except ValueError as error:
            raise ValueError(
                f"`size` must be a number of pixels, or (height, width). Received: {self.size!r}"
            ) from error
        object.__setattr__(self, "size", size)
        for field, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            object.__setattr__(self, field, choice(field, getattr(self, field), choices))
        object.__setattr__(self, "crop_pct", number("crop_pct", self.crop_pct, above=0, most=1))

    @property
    def height_and_width(self) -> tuple[int, int]:
        """`size` as a pair, which it always is once an object is made."""
        assert not isinstance(self.size, int)
        return self.size


def load_image(
    path: str | os.PathLike,
    size: int | tuple[int, int],
    interpolation: str = "bicubic",
    crop_pct: float = 0.95,
    crop_mode: str = "center",
) -> np.ndarray:
    """Reads an image file and prepares it for a model, as timm's evaluation transform does.

    Gray, palette and CMYK images become RGB. Of an animation, the first frame is read. Two kinds
    of images differ from timm: transparent parts become white (timm shows the hidden colors), and
    16-bit values are scaled to 8 bits (timm cuts them off at 255).

    Args:
        path: an AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF or WebP file, of any name.
        size: height and width to return, in pixels; one number for a square.
        interpolation: how to resize, see `ImageSettings`.
        crop_pct: share of the resized image's side to keep.
        crop_mode: `"center"` or `"squash"`.

    Returns:
        (height, width, 3), uint8: raw pixels, 0 to 255.

    Raises:
        ValueError: the file is missing, damaged or not an image (the message names it), or an
            argument is out of its range.

    Example:
        >>> from skimage import data
        >>> load_image(os.path.join(data.data_dir, "coffee.png"), 224).shape
        (224, 224, 3)
    """
    settings = ImageSettings(size, interpolation, crop_pct, crop_mode)
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        image = read_rgb(path)
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise ValueError(f"{path} is not an image, or is damaged: {error}") from error
    try:
        return resize_and_crop(image, settings)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_rgb(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Reads an image as three channels of 8 bits, converted as `load_image` describes.

    Args:
        file: a path or an open file, in one of the formats of `load_image`.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: it has more than 178,956,970 pixels, or floating-point pixels.
        Exception: Pillow's decoders raise errors of many types for files they cannot read.

    Example:
        >>> from skimage import data
        >>> read_rgb(os.path.join(data.data_dir, "coffee.png")).size
        (600, 400)
    """
    with Image.open(file, formats=_formats()) as image:
        # So far, only the header has been read.
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} in "
                "all are read. Make it smaller."
            )
        return as_rgb(image)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats to read that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to three channels of 8 bits, as `load_image` describes.

    Args:
        image: of any of Pillow's modes.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: its pixels are floating-point numbers.

    Example:
        >>> as_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
        (255, 255, 255)
    """
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values / 257).round().astype("uint8"))
    elif image.mode == "F":
        raise ValueError("it holds floating-point pixels, of unknown range. Save it with 8 bits.")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Resizes and crops an image, as timm's evaluation transform does.

    Args:
        image: of mode RGB.
        settings: size, interpolation and crop.

    Returns:
        (height, width, 3), uint8.

    Raises:
        ValueError: the image is so narrow that it would become huge before the crop.

    Example:
        >>> resize_and_crop(Image.new("RGB", (500, 375)), ImageSettings(224)).shape
        (224, 224, 3)
    """
    width, height = resized_size(*image.size, settings)
    if width * height > MAX_PIXELS // 2:  # for example, an image of 1 x 10,000 pixels
        raise ValueError(
            f"it is too narrow for crop_mode='center': {image.width} x {image.height} pixels "
            f"would become {width} x {height}. Use crop_mode='squash', or cut it."
        )
    resized = image.resize((width, height), Image.Resampling[settings.interpolation.upper()])
    crop_height, crop_width = settings.height_and_width
    top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
    return np.array(resized.crop((left, top, left + crop_width, top + crop_height)))


def resized_size(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """Returns the width and height before the crop, rounded as torchvision and timm round.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        settings: how it is prepared.

    Returns:
        (width, height), in pixels.

    Example:
        >>> resized_size(500, 375, ImageSettings(224, crop_pct=0.875))
        (341, 256)
    """
    target_height, target_width = (
        math.floor(side / settings.crop_pct) for side in settings.height_and_width
    )
    if settings.crop_mode == "squash":
        return target_width, target_height
    if target_width == target_height:
        short = min(width, height)
        return int(target_width * width / short), int(target_height * height / short)
    ratio = min(width / target_width, height / target_height)
    return round(width / ratio), round(height / ratio)
