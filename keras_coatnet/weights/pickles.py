"""PyTorch's pickled files: never opened, as a pickle may run any program; how to convert them."""

from __future__ import annotations

import json
import os
import shlex

SUFFIXES = (".bin", ".pth.tar", ".pth", ".pt", ".ckpt")

# `weights_only` keeps torch from running what a pickle asks for. timm's own training writes its
# arguments into its checkpoints, as a Namespace, which holds data alone.
_SCRIPT = (
    "import argparse, torch; from safetensors.torch import save_file; "
    "torch.serialization.add_safe_globals([argparse.Namespace]); "
    'found = torch.load({source}, map_location="cpu", weights_only=True); '
    'found = found.get("state_dict", found); '
    "save_file({{name: tensor.contiguous().clone() for name, tensor in found.items() "
    "if torch.is_tensor(tensor)}}, {target})"
)


def conversion(path: str | os.PathLike) -> str:
    """The line for a shell that makes a `.safetensors` file of a pickled one.

    Args:
        path: a file that ends in one of `SUFFIXES`.

    Returns:
        A command that needs torch and safetensors; the new file lies beside the old one.

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
    """The error for a pickled file.

    Args:
        weights: a `weights` argument that ends in one of `SUFFIXES`.

    Returns:
        A `ValueError` whose message has the line that converts the file.

    Example:
        >>> "weights_only=True" in str(refusal("model.bin"))
        True
    """
    return ValueError(
        "A pickled file of PyTorch may run any program when it is opened, so it is not. Received: "
        f"weights={str(weights)!r}. Convert it, where torch and safetensors are installed, and "
        f"load the file that this writes: {conversion(weights)}"
    )
