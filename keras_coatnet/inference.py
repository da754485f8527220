"""Images in, predictions out, on a finished model.

An image is made ready as timm does for its evaluations, so that a public checkpoint meets the
pixels that its published accuracy was measured on. Pillow does the resizing, as it does there: the
pixels are equal, which no resize of a deep-learning library is (TensorFlow's antialiased bicubic
one differs by 0.3 of 255 on average), and every common file format is read. As in timm, the
orientation that a camera wrote into an image's EXIF tags is ignored.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import keras
import numpy as np
from PIL import Image

from keras_coatnet.applications import CoAtNet
from keras_coatnet.architectures import find_architecture
from keras_coatnet.arguments import as_python, number, two_whole_numbers
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.model_graph import gives_logits, normalization_before
from keras_coatnet.weights import foreign_files, keras_files, registry
from keras_coatnet.weights.lookup import KERAS_SUFFIXES, find_file, unknown_architecture
from keras_coatnet.weights.source import find_source

CROP_MODES = ("center", "squash")
INTERPOLATIONS = tuple(method.name.lower() for method in Image.Resampling)

# Pillow's names of the formats that are read. Left to itself it tries every format it knows, and
# starts Ghostscript for an EPS file, whatever the file is called.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# What Pillow refuses to decode by default. `PIL.Image.MAX_IMAGE_PIXELS` is the program's to change.
MOST_PIXELS = 178_956_970

# Reading is mostly decompression, which Pillow does outside Python's lock.
_READERS = 4


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images are made ready for a model.

    Args:
        size: height and width that the model takes, in pixels; one number for a square.
        interpolation: how images are resized: `"bicubic"`, `"bilinear"`, `"lanczos"`, ...; always
            antialiased.
        crop_pct: share of the resized image's side that is kept, above 0 and at most 1. The
            default is that of most public checkpoints.
        crop_mode: `"center"`: the shorter side is resized to size / crop_pct and the middle cut
            out; `"squash"`: both sides are resized to it, which changes the proportions.

    Raises:
        ValueError: an argument has no such value.

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
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"`{field}` must be one of {', '.join(map(repr, choices))}. "
                    f"Received: {getattr(self, field)!r}"
                )
        object.__setattr__(self, "crop_pct", number("crop_pct", self.crop_pct, above=0, most=1))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        path: the image's file.
        scores: (classes,), a score for each class; None if the image cannot be read.
        error: why it cannot be read; None if it can.
    """

    path: pathlib.Path
    scores: np.ndarray | None = None
    error: str | None = None


# --- Images --------------------------------------------------------------------------------


def load_image(
    path: str | os.PathLike,
    size: int | tuple[int, int],
    interpolation: str = "bicubic",
    crop_pct: float = 0.95,
    crop_mode: str = "center",
) -> np.ndarray:
    """Reads an image and makes it ready for a model, as timm's evaluation transform does.

    Gray, palette and CMYK images become RGB. Transparent parts become white, and 16-bit values
    are scaled to 8 bits, where timm would show what lies beneath and cut values off at 255. Of an
    animation the first frame is taken.

    Args:
        path: a file in one of the formats AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF and WebP;
            its name may be any.
        size: height and width to return, in pixels; one number for a square.
        interpolation: how to resize, see `ImageSettings`.
        crop_pct: share of the resized image's side to keep.
        crop_mode: `"center"` or `"squash"`.

    Returns:
        (height, width, 3), uint8: raw pixels, 0 to 255.

    Raises:
        ValueError: the file is missing, damaged or no image (the message names it), or an
            argument makes no sense.

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
        raise ValueError(f"{path} is no image, or damaged: {error}") from error
    try:
        return resize_and_crop(image, settings)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_rgb(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Reads an image as one of three channels of 8 bits, as `load_image` says.

    Args:
        file: a path, or a file that is open: AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF or
            WebP.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: it has more than 178,956,970 pixels, or floating-point ones.
        Exception: any other that Pillow's decoders raise for files they cannot read.

    Example:
        >>> from skimage import data
        >>> read_rgb(os.path.join(data.data_dir, "coffee.png")).size
        (600, 400)
    """
    with Image.open(file, formats=_formats()) as image:
        # The header alone is read yet.
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} in "
                "all are read. Make it smaller."
            )
        return as_rgb(image)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this build of Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def resize_and_crop(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Resizes an image and cuts it to size, as timm's evaluation transform does.

    Args:
        image: of mode RGB.
        settings: size, interpolation and crop.

    Returns:
        (height, width, 3), uint8.

    Raises:
        ValueError: the image is so narrow that it would become huge before it is cut.

    Example:
        >>> resize_and_crop(Image.new("RGB", (500, 375)), ImageSettings(224)).shape
        (224, 224, 3)
    """
    width, height = resized_size(*image.size, settings)
    if width * height > MOST_PIXELS // 2:  # one pixel high and thousands wide, say
        raise ValueError(
            f"it is too narrow for crop_mode='center': {image.width} x {image.height} pixels "
            f"would become {width} x {height}. Use crop_mode='squash', or cut it."
        )
    resized = image.resize((width, height), Image.Resampling[settings.interpolation.upper()])
    top, left = round((height - settings.size[0]) / 2), round((width - settings.size[1]) / 2)
    return np.array(resized.crop((left, top, left + settings.size[1], top + settings.size[0])))


def as_rgb(image: Image.Image) -> Image.Image:
    """Any image as one of three channels of 8 bits, as `load_image` says.

    Args:
        image: of any of Pillow's modes.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: its pixels are floating-point numbers.
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


def resized_size(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """Width and height to resize to before the crop, rounded as torchvision and timm round.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        settings: how it is made ready.

    Returns:
        (width, height), in pixels.

    Example:
        >>> resized_size(500, 375, ImageSettings(224, crop_pct=0.875))
        (341, 256)
    """
    target_height, target_width = (math.floor(side / settings.crop_pct) for side in settings.size)
    if settings.crop_mode == "squash":
        return target_width, target_height
    if target_width == target_height:
        short = min(width, height)
        return int(target_width * width / short), int(target_height * height / short)
    ratio = min(width / target_width, height / target_height)
    return round(width / ratio), round(height / ratio)


# --- Models ----------------------------------------------------------------------------------


def open_model(
    weights: str | os.PathLike, architecture: str | CoAtNetConfig | None = None
) -> tuple[keras.Model, ImageSettings]:
    """Opens a classifier by name or from a file, and says how its images are made ready.

    Args:
        weights: the name of one of `keras_coatnet.checkpoints()`, which is fetched first if need
            be; a whole model in a `.keras` file; or weights in a `.weights.h5`, `.safetensors` or
            `.h5` file.
        architecture: the network of a file of weights, a name out of
            `keras_coatnet.architectures()` or a `CoAtNetConfig`. Only files of other libraries need
            it: weights saved from a model of this package know theirs.

    Returns:
        The model, and the `ImageSettings` that its accuracy was measured with; of a file, its
        input's size and the defaults. It takes raw pixels, unless it was saved from a CoAtNet with
        include_preprocessing=False; `class_scores` and `predict_images` know.

    Raises:
        ValueError: there is no such checkpoint or file, it cannot be loaded, its network is not
            known, or it has no classifier.

    Example, which needs a network or a cached file:
        model, settings = open_model("coatnet_0_rw_224.sw_in1k")
    """
    path = find_file(weights)
    if path is None:
        return _open_checkpoint(str(weights), architecture)
    if path.suffix == ".keras":
        model = _load_whole_model(path)
        return model, default_settings(model)
    config = _architecture_of(path) if architecture is None else architecture
    if find_source(weights, [find_architecture(config)], None, "open_model").classes == 0:
        raise ValueError(f"{path} brings no classifier, so nothing can be predicted with it.")
    model = CoAtNet(config, weights=weights)
    return model, default_settings(model)


def _load_whole_model(path: pathlib.Path) -> keras.Model:
    keras_files.read_identity(path)  # refuses what is not safe to load
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises what the first part that fails does
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _open_checkpoint(
    name: str, architecture: str | CoAtNetConfig | None
) -> tuple[keras.Model, ImageSettings]:
    found = registry.find(name, None)
    registry.check_architecture(found, architecture)
    model = CoAtNet(found.architecture, weights=found.name)
    return model, ImageSettings(
        found.input_size, found.interpolation, found.crop_pct, found.crop_mode
    )


def _architecture_of(path: pathlib.Path) -> CoAtNetConfig:
    """The configuration that `CoAtNetModel.save_weights` wrote into a file."""
    if path.name.endswith(KERAS_SUFFIXES):
        identity = keras_files.read_identity(path)
    else:
        identity = None
        foreign_files.read(path)  # a damaged file has no architecture that could be named
    if identity is None:
        raise unknown_architecture(path)
    return identity.architecture


def default_settings(model: keras.Model) -> ImageSettings:
    """How images are made ready for a model of which nothing else is known.

    Args:
        model: a model that takes (batch, height, width, 3).

    Returns:
        `ImageSettings` of the model's size, or of the size that a CoAtNet of unknown height and
        width is for, with `crop_pct=0.95` of the middle.

    Raises:
        ValueError: the model takes something else.

    Example:
        >>> default_settings(CoAtNet("coatnet0")).size
        (224, 224)
    """
    shape = getattr(model, "input_shape", None)  # a subclassed model has none
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(
            "The model must take one batch of RGB images, (batch, height, width, 3). It takes: "
            f"{shape}"
        )
    config = getattr(model, "architecture", None)
    sides = config.input_sides if isinstance(config, CoAtNetConfig) else (224, 224)
    known = zip(shape[1:3], sides, strict=True)
    return ImageSettings(tuple(side or default for side, default in known))


# --- Predictions -----------------------------------------------------------------------------


def predict_images(
    model: keras.Model,
    paths: Sequence[str | os.PathLike],
    settings: ImageSettings | None = None,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """Classifies images, a batch at a time; the next is read while one is computed.

    Args:
        model: a classifier: (batch, height, width, 3) to (batch, classes). Where its last layer
            gives logits, the scores are their softmax. It takes raw pixels, or has a
            CoAtNet inside that knows what it takes, as for `class_scores`.
        paths: the images' files.
        settings: how they are made ready; None: `default_settings(model)`.
        batch_size: images that the model sees at once, at least 1.

    Yields:
        A `Prediction` for each path, in their order, also for those that cannot be read.

    Raises:
        ValueError: the model is no classifier of images, or `batch_size` is below 1.

    Example:
        >>> from skimage import data
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> (found,) = predict_images(model, [os.path.join(data.data_dir, "coffee.png")])
        >>> found.scores.shape
        (10,)
    """
    settings = settings or default_settings(model)
    check_classifier(model)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size!r}")
    options = dataclasses.asdict(settings)

    def read(path: str | os.PathLike) -> np.ndarray | str:
        try:
            return load_image(path, **options)
        except ValueError as error:
            return str(error)

    groups = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        ahead = [pool.map(read, group) for group in groups[:1]]
        for number, group in enumerate(groups):
            read_ones = list(ahead.pop())
            ahead += [pool.map(read, following) for following in groups[number + 1 : number + 2]]
            yield from _predict_group(model, group, read_ones)


def check_classifier(model: keras.Model) -> int:
    """Checks that a model is a classifier, and that the pixels which it takes are known.

    Args:
        model: a model.

    Returns:
        How many classes it tells apart.

    Raises:
        ValueError: its output is not (batch, classes), or a CoAtNet without preprocessing stands
            in it behind layers that may or may not normalize.

    Example:
        >>> check_classifier(CoAtNet("coatnet0"))
        1000
    """
    shape = getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[-1] is None:
        raise ValueError(
            "The model must be a classifier, with an output of shape (batch, classes). Its output "
            f"is {shape}: it was probably built with include_top=False."
        )
    normalization_before(model)
    return shape[-1]


def _predict_group(
    model: keras.Model, paths: Sequence[str | os.PathLike], read_ones: list[np.ndarray | str]
) -> Iterator[Prediction]:
    images = [image for image in read_ones if not isinstance(image, str)]
    scores = iter(class_scores(model, np.stack(images)) if images else ())
    for path, image in zip(map(pathlib.Path, paths), read_ones, strict=True):
        if isinstance(image, str):
            yield Prediction(path, error=image)
        else:
            yield Prediction(path, next(scores))


def class_scores(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """What a classifier says of images.

    Args:
        model: a classifier: a CoAtNet, also fused, or a model with one inside. Where that was built
            without preprocessing, the pixels are normalized for it, unless a layer before it does
            so. Any other model takes raw pixels.
        images: (batch, height, width, 3), raw pixels, 0 to 255.

    Returns:
        (batch, classes), float32: the model's output, or the softmax of its logits, wherever in the
        model the last layer stands.

    Raises:
        ValueError: nobody can know which pixels the model takes, or whether it gives logits.

    Example:
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> class_scores(model, np.zeros((1, 64, 64, 3), "uint8")).shape
        (1, 10)
    """
    pixels = images.astype("float32")
    config = normalization_before(model)
    if config is not None:
        mean, std = np.float32(config.pixel_mean), np.float32(config.pixel_std)
        if len(mean) != pixels.shape[-1]:
            mean, std = mean.mean(), std.mean()
        pixels = (pixels / 255.0 - mean) / std
    scores = np.asarray(model.predict_on_batch(pixels), "float32")
    is_logits = gives_logits(model)
    if is_logits is None and (scores.min() < -1e-3 or scores.max() > 1 + 1e-3):
        raise ValueError(
            f"The model's outputs lie between {scores.min():.3g} and {scores.max():.3g}, so they "
            f"are no scores, and its last layer, {model.layers[-1].name!r}, does not say that they "
            "are logits. End the model with keras.layers.Softmax() or with a Dense layer."
        )
    if is_logits and scores.shape[1] > 1:
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True)
    return scores
