"""Refuses PyTorch's pickled files, which may run any program, and says how to convert them."""

from __future__ import annotations

import json
import os
import shlex

SUFFIXES = (".bin", ".pth.tar", ".pth", ".pt", ".ckpt")

# `weights_only` keeps torch from running code in a pickle. timm's training saves its arguments as a
# Namespace, which holds only data.
_SCRIPT = (
    "import argparse, torch; from safetensors.torch import save_file; "
    "torch.serialization.add_safe_globals([argparse.Namespace]); "
    'found = torch.load({source}, map_location="cpu", weights_only=True); '
    'found = found.get("state_dict", found); '
    "save_file({{name: tensor.contiguous().clone() for name, tensor in found.items() "
    "if torch.is_tensor(tensor)}}, {target})"
)


def conversion(path: str | os.PathLike) -> str:
    """Returns the shell command that converts a pickled file to `.safetensors`.

    Args:
        path: a file that ends in one of `SUFFIXES`.

    Returns:
        A command that needs torch and safetensors. It writes the new file beside the old one.

    Example:
        >>> conversion("a/model.bin").endswith("'")
        True
    """
    source = str(path)
    suffix = next(suffix for suffix in SUFFIXES if source.endswith(suffix))
    target = source.removesuffix(suffix) + ".safetensors"
    names = {
        key: json.dumps(name, ensure_ascii=False)
        for key, name in (("source", source), ("target", target))
    }
    return f"python -c {shlex.quote(_SCRIPT.format(**names))}"


def refusal(weights: str | os.PathLike) -> ValueError:
    """Returns the error for a pickled file.

    Args:
        weights: a `weights` argument that ends in one of `SUFFIXES`.

    Returns:
        A `ValueError` whose message has the command that converts the file.

    Example:
        >>> "weights_only=True" in str(refusal("model.bin"))
        True
    """
    return ValueError(
        "A pickled file of PyTorch may run any program when it is opened, so it is not opened. "
        f"Received: weights={str(weights)!r}. Convert it, with torch and safetensors installed, "
        f"and give the new file: {conversion(weights)}"
    )
