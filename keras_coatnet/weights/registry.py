"""The published checkpoints: their files, networks and accuracies.

`checkpoints.json`, beside this file, has the data.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One published file of trained CoAtNet weights.

    Attributes:
        name: The registry's name for it, for instance `"coatnet_0_rw_224.sw_in1k"`.
        architecture: Name of the network that the weights fit, as `keras_coatnet.CoAtNet` takes it.
        source: Whose layout the file has: `"timm"` or `"keras_cv_attention_models"`.
        repo: Repository on the Hugging Face hub, or `None` for a file at a plain address.
        filename: Name of the file. It ends in one of `SAFE_SUFFIXES`.
        revision: Commit of `repo` to take, in full or abbreviated; `None` means branch `main`.
        url: Full address of the file, for a browser or another machine.
        sha256: SHA-256 of the file in hexadecimal, or `None` if unknown.
        md5: MD5 of the file in hexadecimal, or `None` if unknown.
        size: Approximate size of the file in bytes (published as rounded megabytes), or `None`.
        license: License of the weights.
        classes: Outputs of the classifier: 1000 for ImageNet-1k, 11821 for ImageNet-12k.
        input_size: Height and width in pixels of its training, or of its last fine-tuning.
        mean: What training subtracted from red, green and blue, of pixels in 0..1.
        std: What training then divided them by.
        interpolation: How images were resized for the measurement.
        crop_pct: Fraction of the resized image's side that the measurement kept, in (0, 1].
        crop_mode: `"center"` (the shorter side is resized, the middle is cut out) or `"squash"`
            (both sides are resized, nothing is cut off).
        pretraining: Description of its training data.
        top1: ImageNet-1k validation top-1 accuracy in percent, or `None` if nobody published one.
        top5: The same for top-5.
        measured_by: Where the two figures come from, or `None` without figures.
        parameters: Number of trainable parameters, with the classifier.
    """

    name: str
    architecture: str
    source: str
    repo: str | None
    filename: str
    revision: str | None
    url: str
    sha256: str | None
    md5: str | None
    size: int | None
    license: str
    classes: int
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str
    pretraining: str
    top1: float | None
    top5: float | None
    measured_by: str | None
    parameters: int


def _read_registry() -> dict[str, Checkpoint]:
    text = (
        importlib.resources.files("keras_coatnet.weights")
        .joinpath("checkpoints.json")
        .read_text("utf-8")
    )
    return {entry["name"]: _as_checkpoint(entry) for entry in json.loads(text)}


def _as_checkpoint(entry: dict[str, Any]) -> Checkpoint:
    # JSON has lists. A frozen dataclass should have immutable values.
    triples = {key: tuple(entry[key]) for key in ("mean", "std")}
    return Checkpoint(**{**entry, **triples})


CHECKPOINTS: dict[str, Checkpoint] = _read_registry()

# Neither format can run code when it is read. PyTorch's own format, a pickle, can.
SAFE_SUFFIXES = (".safetensors", ".h5")

# What the words in `weights=` mean for each size. All checkpoints can also be given by name.
SIZES: dict[str, dict[str, str]] = {
    "coatnet0": {"imagenet": "coatnet_0_rw_224.sw_in1k"},
    "coatnet1": {
        "imagenet": "coatnet_1_rw_224.sw_in1k",
        "imagenet12k_ft": "coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k",
        "imagenet12k": "coatnet_rmlp_1_rw2_224.sw_in12k",
    },
    "coatnet2": {
        # No training on ImageNet-1k alone was published for this network.
        "imagenet": "coatnet_2_rw_224.sw_in12k_ft_in1k",
        "imagenet12k_ft": "coatnet_2_rw_224.sw_in12k_ft_in1k",
        "imagenet12k": "coatnet_2_rw_224.sw_in12k",
    },
    "coatnet3": {"imagenet12k": "coatnet_3_rw_224.sw_in12k"},
    "coatnet4": {},
    "coatnet5": {},
    "coatnet6": {},
    "coatnet7": {},
    "coatnet_nano": {"imagenet": "coatnet_rmlp_nano_rw_224.sw_in1k"},
}

# Values of `weights=` that mean a checkpoint of the constructor's size.
WORDS = ("imagenet", "imagenet12k", "imagenet12k_ft")


def checkpoints() -> tuple[str, ...]:
    """Names all published checkpoints that can be loaded.

    Returns:
        The names, each of which is a valid `weights=` argument.

    Example:
        >>> "coatnet_0_rw_224.sw_in1k" in checkpoints()
        True
    """
    return tuple(CHECKPOINTS)


def is_name(weights: str) -> bool:
    """Whether a `weights=` argument is one of `WORDS` or a checkpoint's name, not a path.

    Args:
        weights: any string.

    Returns:
        True if `find` knows it, at least for some size.

    Example:
        >>> is_name("imagenet"), is_name("imagenet.h5")
        (True, False)
    """
    return weights in WORDS or _without_prefix(weights) in CHECKPOINTS


def find(weights: str, size: str | None) -> Checkpoint:
    """Finds the checkpoint that a `weights=` argument means.

    Args:
        weights: `"imagenet"`, `"imagenet12k"`, `"imagenet12k_ft"`, or a checkpoint's name; timm's
            ones also with a leading `timm/` or `hf://timm/`.
        size: A key of `SIZES`, such as `"coatnet0"`: the constructor's size. `None` is the generic
            constructor, for which the three words are not defined.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, or none for that size.

    Example:
        >>> find("imagenet", "coatnet0").name
        'coatnet_0_rw_224.sw_in1k'
        >>> find("hf://timm/coatnet_3_rw_224.sw_in12k", None).classes
        11821
    """
    if size is not None:
        _refuse_size_without_weights(weights, size)
    if weights in WORDS:
        return _find_word(weights, size)
    checkpoint = CHECKPOINTS.get(_without_prefix(weights))
    if checkpoint is None:
        raise _unknown(weights, size)
    return checkpoint


def check_architecture(checkpoint: Checkpoint, architecture: object) -> None:
    """Checks that an architecture that was given with a checkpoint is the checkpoint's.

    Args:
        checkpoint: The checkpoint.
        architecture: A name of an architecture, or `None`.

    Raises:
        ValueError: if it is another architecture.

    Example:
        >>> check_architecture(find("coatnet_0_rw_224.sw_in1k", None), "coatnet_0_rw_224")
    """
    if architecture not in (None, checkpoint.architecture):
        raise ValueError(
            f"The checkpoint {checkpoint.name} is of the architecture "
            f"{checkpoint.architecture!r}. Received: architecture={architecture!r}. Leave it out."
        )


def _refuse_size_without_weights(weights: str, size: str) -> None:
    if size not in SIZES:
        raise ValueError(f"Unknown size {size!r}. Expected one of {', '.join(SIZES)}, or None.")
    if not SIZES[size]:
        raise ValueError(
            f"Nobody published weights for {size}, so weights={weights!r} cannot be loaded. "
            "Pass weights=None to build it untrained, or the path of a file of your own. "
            f"Sizes with published weights: {', '.join(key for key in SIZES if SIZES[key])}."
        )


def _find_word(word: str, size: str | None) -> Checkpoint:
    if size is None:
        raise ValueError(
            f"weights={word!r} is defined only for the constructors of one size, such as "
            "CoAtNet0. CoAtNet takes a checkpoint's own name: "
            f"{', '.join(CHECKPOINTS)}; or None, or a path."
        )
    offered = SIZES[size]
    if word not in offered:
        raise ValueError(
            f"No weights {word!r} were published for {size}. "
            f"Expected {' or '.join(repr(key) for key in offered)} "
            f"({', '.join(dict.fromkeys(offered.values()))}), None, or a path."
        )
    return CHECKPOINTS[offered[word]]


def _without_prefix(weights: str) -> str:
    """Removes the address of timm's account from names of timm's checkpoints."""
    for prefix in ("hf://timm/", "timm/"):
        bare = weights.removeprefix(prefix)
        if bare != weights and bare in CHECKPOINTS and CHECKPOINTS[bare].source == "timm":
            return bare
    return weights


def _unknown(weights: str, size: str | None) -> ValueError:
    words = list(SIZES[size]) if size is not None else []
    bare = weights.removeprefix("hf://").removeprefix("timm/")
    close = difflib.get_close_matches(bare, [*words, *CHECKPOINTS], n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    return ValueError(
        f"Unknown weights {weights!r}: neither a checkpoint's name nor a file that exists.{hint} "
        f"Expected None, a path, or one of: {', '.join([*words, *CHECKPOINTS])}."
    )
