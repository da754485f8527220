"""keras_cv_attention_models' layout of a CoAtNet, as its `.h5` files have it.

Kernels are Keras's already; q, k and v are one product whose channels run over ({q, k, v}, head,
dim); a bias table is (heads, offsets) and is indexed by query minus key, where ours goes by key
minus query. Only tables of square maps have that order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from keras_coatnet.names import CLASSIFIER, STEM_CONV1, STEM_CONV2, STEM_NORM, block_name

_BLOCK = re.compile(r"stack_([1-9][0-9]*)_block_([1-9][0-9]*)_(.+)")
FIRST_LAYER = "stem_1_conv"
_OUTSIDE_BLOCKS = {
    FIRST_LAYER: STEM_CONV1,
    "stem_1_bn": STEM_NORM,
    "stem_2_conv": STEM_CONV2,
    "predictions": CLASSIFIER,
}
_IN_BLOCKS = {
    "shortcut_conv": "shortcut",
    "preact_bn": "input_norm",
    "expand_conv": "expand",
    "expand_bn": "expand_norm",
    "MB_dw_conv": "depthwise",
    "MB_dw_bn": "depthwise_norm",
    "se_1_conv": "squeeze_excite/squeeze",
    "se_2_conv": "squeeze_excite/excite",
    "MB_pw_conv": "project",
    "preact_ln": "attention_norm",
    "mhsa_output": "attention/projection",
    "ffn_preact_ln": "ffn_norm",
    "ffn_1_conv": "ffn_expand",
    "ffn_2_conv": "ffn_project",
}
_PARTS = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")


def translate(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Gives keras_cv_attention_models' variables the paths and layouts of ours.

    Args:
        tensors: arrays by "layer/variable", e.g. `"stem_1_conv/kernel"`.

    Returns:
        Arrays by the paths of our variables, and the names that the layout does not have.

    Raises:
        ValueError: an array has a shape that its name does not allow.
    """
    values, unknown = {}, []
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition("/")
        match = _BLOCK.fullmatch(layer)
        if match is None:
            found = list(_translate_one(layer, part, tensor, _OUTSIDE_BLOCKS, name))
            prefix = ""
        else:
            found = list(_translate_one(match[3], part, tensor, _IN_BLOCKS, name))
            prefix = f"{block_name(match[1], match[2])}/"
        if not found or any(prefix + path in values for path, _ in found):
            unknown.append(name)  # or a second array for the same variable
        values.update((prefix + path, value) for path, value in found)
    return values, unknown


def _translate_one(
    layer: str, part: str, tensor: np.ndarray, layers: Mapping[str, str], name: str
) -> Iterator[tuple[str, np.ndarray]]:
    if layer == "mhsa_qkv_conv" and part == "kernel":
        if tensor.ndim != 4 or tensor.shape[-1] % 3:
            raise ValueError(f"{name} must be (1, 1, in, 3 * width). Received: {tensor.shape}")
        for ours, kernel in zip(("query", "key", "value"), np.split(tensor, 3, -1), strict=True):
            yield f"attention/{ours}/kernel", kernel
    elif layer == "mhsa_pos_emb" and part == "positional_embedding":
        yield "attention/position/table", _mirrored_table(tensor, name)
    elif layer in layers and part == "depthwise_kernel":
        yield f"{layers[layer]}/kernel", tensor
    elif layer in layers and part in _PARTS:
        yield f"{layers[layer]}/{part}", tensor


def _mirrored_table(table: np.ndarray, name: str) -> np.ndarray:
    """(heads, offsets) of a square map to our (heads, 2H - 1, 2W - 1)."""
    side = round(table.shape[1] ** 0.5) if table.ndim == 2 else 0
    if not side % 2 or side**2 != table.shape[1]:
        raise ValueError(
            f"{name} must be (heads, (2 * size - 1) ** 2), of a square map. Received: {table.shape}"
        )
    return table.reshape(-1, side, side)[:, ::-1, ::-1]


def describe(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Reads off a file those fields of a `CoAtNetConfig` that show in its names and shapes.

    Args:
        tensors: arrays by "layer/variable".

    Returns:
        Values by field.
    """
    depths: dict[int, int] = {}
    for match in filter(None, (_BLOCK.fullmatch(name.rpartition("/")[0]) for name in tensors)):
        depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]))
    return {
        "depths": tuple(depths[stage] for stage in sorted(depths)),
        "final_norm": None,
        "ffn_bias": False,
    }
