"""timm's layout of a CoAtNet (timm/models/maxxvit.py), in its `.safetensors` files.

Kernels are (out, in, height, width). One layer computes q, k and v; its channels are ordered as
(head, {q, k, v}, dim). A bias table is (offsets, heads). Its offsets are query minus key, ours are
key minus query: tables are mirrored, and the first kernel of an MLP over offsets is negated, as its
inputs are odd functions of the offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_coatnet.names import (
    CLASSIFIER,
    FINAL_NORM,
    HIDDEN,
    STEM_CONV1,
    STEM_CONV2,
    STEM_NORM,
    block_name,
)

_BLOCK = re.compile(r"stages\.(0|[1-9][0-9]*)\.blocks\.(0|[1-9][0-9]*)\.(.+)")
_IGNORED = re.compile(r".*num_batches_tracked|.*relative_position_index|.*rel_coords_log")

_OUTSIDE_BLOCKS = {
    "stem.conv1": STEM_CONV1,
    "stem.norm1": STEM_NORM,
    "stem.conv2": STEM_CONV2,
    "norm": FINAL_NORM,
    "head.norm": FINAL_NORM,
    "head.pre_logits.fc": HIDDEN,
    "head.fc": CLASSIFIER,
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
_CONVNEXT = {
    "shortcut.expand": "shortcut",
    "conv_dw": "depthwise_conv",
    "norm": "ffn_norm",
    "mlp.fc1": "ffn_expand",
    "mlp.fc2": "ffn_project",
    "ls": "ffn_scale",
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
# Modules that only one kind of block has.
_KINDS = {"attn": _TRANSFORMER, "conv_dw": _CONVNEXT, "conv2_kxk": _MBCONV}

# Prefixes of all names, from torch's DataParallel, from torch.compile, and from trainers that hold
# the network as an attribute.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_NORM_PARTS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def without_prefixes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the prefixes that wrappers of a model put before all of its names.

    Args:
        tensors: arrays by name.

    Returns:
        The same arrays. A prefix that only some of the names have is kept.

    Example:
        >>> list(without_prefixes({"module._orig_mod.norm.weight": np.ones(8)}))
        ['norm.weight']
    """
    while tensors:
        first = next(iter(tensors))
        prefix = next((p for p in _PREFIXES if first.startswith(p)), None)
        if prefix is None or not all(name.startswith(prefix) for name in tensors):
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def translate(
    tensors: Mapping[str, np.ndarray], head_dim: int = 32
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Translates timm's tensors to the paths and layouts of our variables.

    Args:
        tensors: arrays by timm's names.
        head_dim: channels of one attention head.

    Returns:
        Arrays by the paths of our variables, and the names that are not part of timm's layout.

    Raises:
        ValueError: a tensor has the wrong rank or size.
    """
    values, unknown = {}, []
    kinds = _kinds(tensors)
    for name, tensor in tensors.items():
        if _IGNORED.fullmatch(name):
            continue
        match = _BLOCK.fullmatch(name)
        if match is None:
            prefix, modules, rest = "", _OUTSIDE_BLOCKS, name
        else:
            prefix = f"{block_name(int(match[1]) + 1, int(match[2]) + 1)}/"
            modules = kinds.get((match[1], match[2]), _MBCONV)
            rest = match[3]
        found = list(_translate_one(rest, tensor, modules, head_dim, name))
        if not found or any(prefix + path in values for path, _ in found):
            unknown.append(name)  # or a second tensor for the same variable
        values.update((prefix + path, value) for path, value in found)
    return values, unknown


def _kinds(names: Iterable[str]) -> dict[tuple[str, str], Mapping[str, str]]:
    """Returns the modules of each block's kind, by timm's numbers of stage and block."""
    kinds = {}
    for match in filter(None, map(_BLOCK.fullmatch, names)):
        module = match[3].partition(".")[0]
        if module in _KINDS:
            kinds[match[1], match[2]] = _KINDS[module]
    return kinds


def _translate_one(
    name: str, tensor: np.ndarray, modules: Mapping[str, str], head_dim: int, full_name: str
) -> Iterator[tuple[str, np.ndarray]]:
    module, _, part = name.rpartition(".")
    if module == "attn.qkv" and part in ("weight", "bias") and modules is _TRANSFORMER:
        yield from _split_qkv(tensor, part, head_dim, full_name)
    elif module == "attn.rel_pos" and part == "relative_position_bias_table":
        yield "attention/position/table", _mirrored_table(tensor, full_name)
    elif module in modules:
        ours = modules[module]
        if ours.endswith("norm"):
            if part in _NORM_PARTS:
                yield f"{ours}/{_NORM_PARTS[part]}", tensor
        elif ours.endswith("_scale"):
            if part == "gamma":
                yield f"{ours}/scale", tensor
        elif part == "bias":
            yield f"{ours}/bias", tensor
        elif part == "weight":
            kernel = _kernel(tensor, ours in ("depthwise", "depthwise_conv"), full_name)
            yield f"{ours}/kernel", -kernel if ours == "attention/position/hidden" else kernel


def _kernel(weight: np.ndarray, depthwise: bool, name: str) -> np.ndarray:
    """Transposes (out, in, ...) to (..., in, out), and a depthwise kernel to (..., out, 1)."""
    if weight.ndim not in (2, 4) or (depthwise and weight.ndim != 4):
        raise ValueError(f"{name} must be a kernel of rank 2 or 4. Received: {weight.shape}")
    if weight.ndim == 2:
        return weight.T
    return weight.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))


def _split_qkv(
    tensor: np.ndarray, part: str, head_dim: int, name: str
) -> Iterator[tuple[str, np.ndarray]]:
    allowed = (1,) if part == "bias" else (2, 4)
    if tensor.ndim not in allowed or not tensor.size or len(tensor) % (3 * head_dim):
        raise ValueError(
            f"{name} must have a multiple of {3 * head_dim} rows (q, k and v of each head). "
            f"Received: {tensor.shape}"
        )
    rows = tensor.reshape(-1, 3, head_dim, tensor[0].size)
    for index, ours in enumerate(("query", "key", "value")):
        matrix = rows[:, index].reshape(len(tensor) // 3, -1)
        if part == "bias":
            yield f"attention/{ours}/bias", matrix[:, 0]
        else:
            yield f"attention/{ours}/kernel", matrix.T


def _mirrored_table(table: np.ndarray, name: str) -> np.ndarray:
    """Converts (offsets, heads), of a square map, to our (heads, 2H - 1, 2W - 1)."""
    side = round(len(table) ** 0.5) if table.ndim == 2 else 0
    if not side % 2 or side**2 != len(table):
        raise ValueError(
            f"{name} must be ((2 * size - 1) ** 2, heads), for a square map. "
            f"Received: {table.shape}"
        )
    return table.T.reshape(-1, side, side)[:, ::-1, ::-1]


def describe(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns those fields of a `CoAtNetConfig` that a file's names and shapes determine.

    Args:
        tensors: arrays by timm's names.

    Returns:
        Values by field.
    """
    runs = _runs(tensors)

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in tensors)

    mlp = [t for n, t in tensors.items() if n.endswith("rel_pos.mlp.fc1.weight")]
    convnext = has(r".*\.conv_dw\..*")
    fields: dict[str, Any] = {
        "depths": tuple(_one_or_pair([len(run) for run in stage]) for stage in runs),
        "conv_block": "convnext" if convnext else "mbconv",
        "conv_bias": has(r".*\.conv_dw\.bias" if convnext else r".*\.conv3_1x1\.bias"),
        "transformer_norm": "batch"
        if has(r".*\.attn\.qkv\..*") and has(r"norm\.running_mean")
        else "layer",
        "relative_position": "mlp" if mlp else "table",
        "stem_bias": has(r"stem\.conv1\.bias"),
        "hidden_head": has(r"head\.pre_logits\..*"),
        "final_norm": "before_pool" if has(r"norm\.weight") else "after_pool",
    }
    projections = [
        f"stages.{stage}.blocks.{block}.shortcut.expand"
        for (stage, block), modules in _kinds(tensors).items()
        if modules is _TRANSFORMER
    ]
    if any(f"{name}.weight" in tensors for name in projections):
        fields["transformer_shortcut_bias"] = any(f"{name}.bias" in tensors for name in projections)
    if not convnext:
        early = has(r".*\.se_early\..*")
        fields["squeeze_place"] = "before_norm" if early else "after_norm"
    last = [[run[-1] for run in stage] for stage in runs]
    widths = [
        [width for width in (_width(tensors, block) for block in stage) if width is not None]
        for stage in last
    ]
    if list(map(len, widths)) == list(map(len, last)):
        fields["widths"] = tuple(map(_one_or_pair, widths))
    if mlp and mlp[0].ndim:
        fields["relative_position_hidden_dim"] = len(mlp[0])
    stem = [tensors.get(f"stem.conv{number}.weight") for number in (1, 2)]
    stem_width = tuple(len(kernel) for kernel in stem if kernel is not None and kernel.ndim)
    if len(stem_width) == 2:
        fields["stem_width"] = stem_width
    return fields


def _runs(names: Iterable[str]) -> list[list[list[str]]]:
    """Returns each stage's blocks: the convolutional ones, then the Transformer ones."""
    kinds = _kinds(names)
    blocks = {(int(m[1]), int(m[2])) for m in map(_BLOCK.fullmatch, names) if m}
    runs: dict[int, dict[bool, list[str]]] = {}
    for stage, block in sorted(blocks):
        is_transformer = kinds.get((str(stage), str(block))) is _TRANSFORMER
        run = runs.setdefault(stage, {}).setdefault(is_transformer, [])
        run.append(f"stages.{stage}.blocks.{block}")
    return [[stage[kind] for kind in sorted(stage)] for stage in runs.values()]


def _width(tensors: Mapping[str, np.ndarray], block: str) -> int | None:
    """Returns the channels of a block's output; None if its last layer is missing."""
    for layer in ("conv3_1x1", "mlp.fc2"):
        kernel = tensors.get(f"{block}.{layer}.weight")
        if kernel is not None and kernel.ndim:
            return len(kernel)
    return None


def _one_or_pair(numbers: Sequence[int]) -> int | tuple[int, ...]:
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
