"""timm's layout of a CoAtNet (timm/models/maxxvit.py), as its `.safetensors` files have it.

Kernels are (out, in, height, width); q, k and v are one product whose channels run over (head,
{q, k, v}, dim); a bias table is (offsets, heads) and is indexed by query minus key, where ours
goes by key minus query. That mirrors a table, and turns the sign of an MLP's coordinates, which
are odd functions of the offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_BLOCK = re.compile(r"stages\.(0|[1-9][0-9]*)\.blocks\.(0|[1-9][0-9]*)\.(.+)")
_IGNORED = re.compile(r".*num_batches_tracked|.*relative_position_index|.*rel_coords_log")

_OUTSIDE_BLOCKS = {
    "stem.conv1": "stem_conv1",
    "stem.norm1": "stem_norm",
    "stem.conv2": "stem_conv2",
    "norm": "norm",
    "head.norm": "norm",
    "head.pre_logits.fc": "hidden",
    "head.fc": "predictions",
}
_MBCONV = {
    "shortcut.expand": "shortcut",
    "pre_norm": "input_norm",
    "conv1_1x1": "expand",
    "norm1": "expand_norm",
    "conv2_kxk": "depthwise",
    "norm2": "depthwise_norm",
    "se.fc1": "squeeze_excite/squeeze",
    "se.fc2": "squeeze_excite/excite",
    "se_early.fc1": "squeeze_excite/squeeze",
    "se_early.fc2": "squeeze_excite/excite",
    "conv3_1x1": "project",
}
_TRANSFORMER = {
    "shortcut.expand": "shortcut",
    "norm1.norm": "attention_norm",
    "norm1": "attention_norm",
    "attn.rel_pos.mlp.fc1": "attention/position/hidden",
    "attn.rel_pos.mlp.fc2": "attention/position/values",
    "attn.proj": "attention/projection",
    "ls1": "attention_scale",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn_expand",
    "mlp.fc2": "ffn_project",
    "ls2": "ffn_scale",
}
_NORM_PARTS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def translate(
    tensors: Mapping[str, np.ndarray], head_size: int = 32
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Gives timm's tensors the paths and layouts of our variables.

    Args:
        tensors: arrays by timm's names.
        head_size: channels of one attention head.

    Returns:
        Arrays by the paths of our variables, and the names that timm's layout does not have.

    Raises:
        ValueError: a tensor has a rank that its name does not allow.
    """
    values, unknown = {}, []
    transformers = {
        match.group(1, 2)
        for match in map(_BLOCK.fullmatch, tensors)
        if match and match[3][:4] == "attn"
    }
    for name, tensor in tensors.items():
        if _IGNORED.fullmatch(name):
            continue
        match = _BLOCK.fullmatch(name)
        if match is None:
            prefix, modules, rest = "", _OUTSIDE_BLOCKS, name
        else:
            prefix = f"stage{int(match[1]) + 1}_block{int(match[2]) + 1}/"
            modules = _TRANSFORMER if match.group(1, 2) in transformers else _MBCONV
            rest = match[3]
        found = list(_translate_one(rest, tensor, modules, head_size, name))
        if not found or any(prefix + path in values for path, _ in found):
            unknown.append(name)  # or a second tensor for the same variable
        values.update((prefix + path, value) for path, value in found)
    return values, unknown


def _translate_one(
    name: str, tensor: np.ndarray, modules: Mapping[str, str], head_size: int, full_name: str
) -> Iterator[tuple[str, np.ndarray]]:
    module, _, part = name.rpartition(".")
    if module == "attn.qkv" and part in ("weight", "bias") and modules is _TRANSFORMER:
        yield from _split_qkv(tensor, part, head_size, full_name)
    elif module == "attn.rel_pos" and part == "relative_position_bias_table":
        yield "attention/position/table", _mirrored_table(tensor, full_name)
    elif module in modules:
        ours = modules[module]
        if ours.endswith("norm") and part in _NORM_PARTS:
            yield f"{ours}/{_NORM_PARTS[part]}", tensor
        elif ours.endswith("_scale") and part == "gamma":
            yield f"{ours}/scale", tensor
        elif not ours.endswith(("norm", "_scale")) and part == "bias":
            yield f"{ours}/bias", tensor
        elif not ours.endswith(("norm", "_scale")) and part == "weight":
            kernel = _kernel(tensor, ours == "depthwise", full_name)
            yield f"{ours}/kernel", -kernel if ours == "attention/position/hidden" else kernel


def _kernel(weight: np.ndarray, depthwise: bool, name: str) -> np.ndarray:
    """(out, in, ...) to Keras's (..., in, out), or (..., channels, 1) for a depthwise one."""
    if weight.ndim not in (2, 4) or (depthwise and weight.ndim != 4):
        raise ValueError(f"{name} must be a kernel of rank 2 or 4. Received: {weight.shape}")
    if weight.ndim == 2:
        return weight.T
    return weight.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))


def _split_qkv(
    tensor: np.ndarray, part: str, head_size: int, name: str
) -> Iterator[tuple[str, np.ndarray]]:
    allowed = (1,) if part == "bias" else (2, 4)
    if tensor.ndim not in allowed or not tensor.size or len(tensor) % (3 * head_size):
        raise ValueError(
            f"{name} must have a multiple of {3 * head_size} rows, q, k and v of each head. "
            f"Received: {tensor.shape}"
        )
    rows = tensor.reshape(-1, 3, head_size, tensor[0].size)
    for index, ours in enumerate(("query", "key", "value")):
        matrix = rows[:, index].reshape(len(tensor) // 3, -1)
        if part == "bias":
            yield f"attention/{ours}/bias", matrix[:, 0]
        else:
            yield f"attention/{ours}/kernel", matrix.T


def _mirrored_table(table: np.ndarray, name: str) -> np.ndarray:
    """(offsets, heads) of a square map to our (heads, 2H - 1, 2W - 1)."""
    side = round(len(table) ** 0.5) if table.ndim == 2 else 0
    if not side % 2 or side**2 != len(table):
        raise ValueError(
            f"{name} must be ((2 * size - 1) ** 2, heads), of a square map. Received: {table.shape}"
        )
    return table.T.reshape(-1, side, side)[:, ::-1, ::-1]


def describe(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Reads off a file those fields of a `CoAtNetConfig` that show in its names and shapes.

    Args:
        tensors: arrays by timm's names.

    Returns:
        Values by field; no more than the file shows.
    """
    names = set(tensors)
    depths: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.fullmatch, names)):
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    mlp = [t for n, t in tensors.items() if n.endswith("rel_pos.mlp.fc1.weight")]
    fields: dict[str, Any] = {
        "depths": tuple(depths[stage] for stage in sorted(depths)),
        "squeeze_place": "before_norm" if has(r".*\.se_early\..*") else "after_norm",
        "conv_bias": has(r".*\.conv3_1x1\.bias"),
        "transformer_norm": "batch"
        if has(r".*\.attn\.qkv\..*") and has(r"norm\.running_mean")
        else "layer",
        "relative_position": "mlp" if mlp else "table",
        "stem_bias": has(r"stem\.conv1\.bias"),
        "hidden_head": has(r"head\.pre_logits\..*"),
        "final_norm": "before_pool" if has(r"norm\.weight") else "after_pool",
        "transformer_shortcut_bias": has(r"stages\.3\.blocks\.0\.shortcut\.expand\.bias"),
    }
    if mlp and mlp[0].ndim:
        fields["relative_position_width"] = len(mlp[0])
    stem = [tensors.get(f"stem.conv{number}.weight") for number in (1, 2)]
    if all(kernel is not None and kernel.ndim for kernel in stem):
        fields["stem_width"] = tuple(len(kernel) for kernel in stem)
    return fields
