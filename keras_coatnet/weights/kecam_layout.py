"""keras_cv_attention_models' layout of a CoAtNet, in its `.h5` files.

Kernels are as Keras has them. One layer computes q, k and v; its channels are ordered as
({q, k, v}, head, dim). A bias table is (heads, offsets). Its offsets are query minus key, ours are
key minus query: tables are mirrored. Only tables of square maps have that order.
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
    """Translates keras_cv_attention_models' variables to the paths and layouts of ours.

    Args:
        tensors: arrays by "layer/variable", e.g. `"stem_1_conv/kernel"`.

    Returns:
        Arrays by the paths of our variables, and the names that are not part of the layout.

    Raises:
        ValueError: an array has the wrong shape.
    """
    values, unknown = {}, []
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition("/")
        match = _BLOCK.fullmatch(layer)
        prefix, layers = "", _OUTSIDE_BLOCKS
        if match is not None:
            prefix, layers = f"{block_name(match[1], match[2])}/", _IN_BLOCKS
            layer = match[3]
        found = list(_translate_one(layer, part, tensor, layers, name))
        if not found or any(prefix + path in values for path, _ in found):
            unknown.append(name)  # or a second array for the same variable
        values.update((prefix + path, value) for path, value in found)
    return values, unknown


def _translate_one(
    layer: str, part: str, tensor: np.ndarray, layers: Mapping[str, str], name: str
) -> Iterator[tuple[str, np.ndarray]]:
    if layer == "mhsa_qkv_conv" and part == "kernel":
        if tensor.ndim != 4 or tensor.shape[-1] % 3:
            raise ValueError(f"{name} must be (1, 1, in, 3 * channels). Received: {tensor.shape}")
        for ours, kernel in zip(("query", "key", "value"), np.split(tensor, 3, -1), strict=True):
            yield f"attention/{ours}/kernel", kernel
    elif layer == "mhsa_pos_emb" and part == "positional_embedding":
        yield "attention/position/table", _mirrored_table(tensor, name)
    elif layer in layers and part == "depthwise_kernel":
        yield f"{layers[layer]}/kernel", tensor
    elif layer in layers and part in _PARTS:
        yield f"{layers[layer]}/{part}", tensor


def _mirrored_table(table: np.ndarray, name: str) -> np.ndarray:
    """Converts (heads, offsets), of a square map, to our (heads, 2H - 1, 2W - 1)."""
    side = round(table.shape[1] ** 0.5) if table.ndim == 2 else 0
    if not side % 2 or side**2 != table.shape[1]:
        raise ValueError(
            f"{name} must be (heads, (2 * size - 1) ** 2), for a square map. "
            f"Received: {table.shape}"
        )
    return table.reshape(-1, side, side)[:, ::-1, ::-1]


def describe(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns those fields of a `CoAtNetConfig` that a file's names and shapes determine.

    Args:
        tensors: arrays by "layer/variable".

    Returns:
        Values by field.
    """
    depths: dict[int, int] = {}
    for name in tensors:
        if match := _BLOCK.fullmatch(name.rpartition("/")[0]):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block)
    return {
        "depths": tuple(depths[stage] for stage in sorted(depths)),
        "final_norm": None,
        "ffn_bias": False,
    }
