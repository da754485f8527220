"""timm's CoAtNets, as the other side of a comparison: built, given random values, saved, run.

No test has trained weights. A conversion is proved on a file of the same layout: timm's own model,
every value of it random, saved as timm's author saves his, against ours with that file loaded.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.config import CoAtNetConfig

# Names of timm's architectures in our registry. Those of no checkpoint nobody has trained.
NAMES = tuple(name for name in ARCHITECTURES if name.startswith(("coatnet_", "coatnext_")))

# A reduced network: widths that all differ, so that no shape fits by chance, and two blocks in
# each stage, the one that halves the map and one that keeps it.
WIDTHS, DEPTHS, STEM, CLASSES = (24, 32, 64, 96), (2, 2, 2, 2), (8, 16), 10
# With ConvNeXt blocks: widths of which each is a multiple of the one before, once the same.
MULTIPLES = (16, 32, 64, 96)
SIZE = 96  # pixels: maps of 6 x 6 and 3 x 3 for attention, the odd one included


@functools.cache
def import_timm() -> types.ModuleType:
    """Imports timm, also beside a torchvision that fits another build of torch.

    Beside a CPU build of torch the common torchvision cannot load its own library, and then fails
    at import where it describes two of that library's operators. timm uses neither; declaring
    them is enough.
    """
    import torch

    # Keras's backend has nothing to do with it: both may run in one process.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            library.define(operator)
        except RuntimeError:
            pass  # torchvision's library did load, and has them
    import timm

    timm._declared_for_torchvision = library  # what it declared ends with the object
    return timm


def build(name: str, **kwargs: Any) -> Any:
    """timm's model in evaluation mode, e.g. `build("coatnet_0_rw_224", num_classes=10)`."""
    # Its initial values are overwritten, and drawing them takes seconds.
    return import_timm().create_model(name, weight_init="", **kwargs).eval()


def stages(layout: Sequence[str], widths: Sequence[int], depths: Sequence[int]) -> dict[str, tuple]:
    """Our `widths` and `depths` of timm's: one convolutional block begins a stage of both kinds."""
    mixed = [kinds == "CT" for kinds in layout]
    return {
        "widths": tuple((w, w) if both else w for w, both in zip(widths, mixed, strict=True)),
        "depths": tuple((1, d - 1) if both else d for d, both in zip(depths, mixed, strict=True)),
    }


def reduced_config(
    name: str, depths: Sequence[int] = DEPTHS, img_size: int = SIZE
) -> CoAtNetConfig:
    """Our configuration of a variant with few and narrow blocks."""
    ours = ARCHITECTURES[name]
    stem = STEM if ours.stem_width[0] != ours.stem_width[1] else STEM[1]
    widths = WIDTHS if ours.conv_block == "mbconv" else MULTIPLES
    return ours.replace(**stages(ours.layout, widths, depths), stem_width=stem, input_size=img_size)


def reduced(name: str, **kwargs: Any) -> tuple[Any, CoAtNetConfig]:
    """The same variant with few and narrow blocks: timm's model, and our configuration of it."""
    options = {"img_size": SIZE, "num_classes": CLASSES, "depths": DEPTHS, **kwargs}
    config = reduced_config(name, options["depths"], options["img_size"])
    if config.hidden_head:
        options["head_hidden_size"] = config.output_filters
    widths = [width if isinstance(width, int) else width[-1] for width in config.widths]
    model = build(name, embed_dim=tuple(widths), stem_width=config.stem_width, **options)
    return model, config


def randomize(model: Any, seed: int = 0) -> Any:
    """Gives every parameter and buffer random values, and returns the model.

    Kernels keep the size of what passes through them; everything that starts at 0 or 1, and whose
    misreading would therefore not show, is moved well away from there.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Any, mean: float, std: float) -> None:
        tensor.normal_(mean, std, generator=generator)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            kind = name.rsplit(".", 1)[-1]
            if kind in ("num_batches_tracked", "relative_position_index", "rel_coords_log"):
                continue  # a counter, and two constants
            if kind == "running_var":
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif kind == "relative_position_bias_table":
                normal(tensor, 0.0, 1.0)
            elif kind in ("bias", "running_mean"):
                normal(tensor, 0.0, 0.2)
            elif kind == "gamma" or (kind == "weight" and tensor.ndim == 1):
                normal(tensor, 1.0, 0.2)
            elif name == "head.fc.weight":
                normal(tensor, 0.0, 3 * tensor[0].numel() ** -0.5)  # logits from -10 to 10
            elif kind == "weight":
                normal(tensor, 0.0, tensor[0].numel() ** -0.5)
            else:
                raise ValueError(f"no rule for {name}")
    return model


def calibrate(model: Any, images: np.ndarray) -> Any:
    """Sets BatchNorm's statistics to those of real activations, and returns the model.

    In coatnet_bn_0_rw_224 they are all the norm that there is. With random ones its activations
    grow from block to block, its attention turns into a choice of one key, and rounding decides
    which: timm's model then differs from itself.
    """
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this one batch
    model.train()
    logits(model, images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def random_model(name: str, size: int, small: bool = False, **kwargs: Any) -> Any:
    """A randomized timm model, calibrated where it must be; and our configuration if reduced."""
    model, config = reduced(name, **kwargs) if small else (build(name, **kwargs), None)
    randomize(model)
    if ARCHITECTURES[name].transformer_norm == "batch":
        calibrate(model, images(4, size, seed=5))
    return (model, config) if small else model


def images(count: int, size: int | tuple[int, int], seed: int = 1) -> np.ndarray:
    """Normalized images, (count, height, width, 3), that a network of random values tells apart.

    Each has a color, quarters, patches and noise: what is fine alone is averaged away with depth,
    and every image would get the same logits.
    """
    height, width = (size, size) if isinstance(size, int) else size
    side = max(height, width)
    rng = np.random.default_rng(seed)
    total = np.zeros((count, side, side, 3))
    for patch, amplitude in ((side, 2.0), (-(-side // 2), 3.0), (16, 1.0), (1, 0.25)):
        pieces = -(-side // patch)
        layer = amplitude * rng.standard_normal((count, pieces, pieces, 3))
        total += layer.repeat(patch, 1).repeat(patch, 2)[:, :side, :side]
    return total[:, :height, :width].astype("float32")


def logits(model: Any, images: np.ndarray) -> np.ndarray:
    """What timm's model makes of (batch, height, width, channels)."""
    import torch

    with torch.no_grad():
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return model(x).cpu().numpy()


def save(model: Any, path: str | os.PathLike) -> str:
    """Saves a model as its author does, and returns the path."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), path, metadata={"format": "pt"})
    return str(path)
