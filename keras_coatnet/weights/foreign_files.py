"""Reads files of weights of other libraries."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from keras_coatnet.weights import kecam_layout, timm_layout
from keras_coatnet.weights.hdf5 import DAMAGE, Refused, open_hdf5, refuse_whole_model

LAYOUTS = {".safetensors": timm_layout, ".h5": kecam_layout}
_FLOATS = ("F64", "F32", "F16", "BF16")


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all float arrays of a file, as float32, and checks them.

    Args:
        path: a `.safetensors` file of timm, or an `.h5` file of keras_cv_attention_models.

    Returns:
        Arrays by name; of an h5 file by "layer/variable".

    Raises:
        ValueError: the file is damaged or of another kind, or holds values of another type, NaN or
            infinity.
    """
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_h5(path)
    if not tensors:
        raise ValueError(f"{path} holds no weights.")
    for name, tensor in tensors.items():
        # If a value is not finite, neither is the sum, which needs no temporary array.
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.sum(tensor, dtype=np.float64))
        if not np.isfinite(total):
            raise ValueError(f"{path} is damaged: {name} holds NaN or infinite values.")
    return tensors


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors

    tensors, bfloat16 = {}, []
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if kind == "BF16":
                    bfloat16.append(name)
                elif kind in _FLOATS:
                    tensors[name] = file.get_tensor(name).astype("float32", copy=False)
                elif not name.endswith(("num_batches_tracked", "relative_position_index")):
                    raise ValueError(
                        f"{path} holds {name} as {kind}; weights must be {', '.join(_FLOATS)}. "
                        "Convert the file to float32."
                    )
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is cut short, damaged, or not a safetensors file: {error}. Fetch it again."
        ) from error
    if bfloat16:
        tensors.update(_read_bfloat16(path, bfloat16))
    return timm_layout.without_prefixes(tensors)


def _read_bfloat16(path: pathlib.Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields bfloat16 tensors, which NumPy lacks, of a file that `safe_open` has checked."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name in names:
            start, end = header[name]["data_offsets"]
            file.seek(8 + length + start)
            halves = np.frombuffer(file.read(end - start), "<u2").astype("uint32")
            # A bfloat16 is the upper half of a float32.
            yield name, (halves << 16).view("float32").reshape(header[name]["shape"])


def _read_h5(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return _read_keras_2(path)
    except Refused:
        raise
    except DAMAGE as error:
        raise ValueError(
            f"{path} is cut short, damaged, or not an HDF5 file: {error}. Fetch it again."
        ) from error


def _read_keras_2(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads weights of Keras 2: `layer/layer/variable:0`, of whole models in `model_weights`."""
    tensors: dict[str, np.ndarray] = {}
    with open_hdf5(path) as (file, datasets):
        if "model_weights" in datasets:
            raise Refused(f"{path} is damaged: its model_weights is not a group. Fetch it again.")
        # keras_cv_attention_models saves whole models, so those with its layers are read.
        if not any(name.split("/")[-2:-1] == [kecam_layout.FIRST_LAYER] for name in datasets):
            refuse_whole_model(file, path)
        whole = {name: item for name, item in datasets.items() if name.startswith("model_weights/")}
        for name, item in (whole or datasets).items():
            layer, variable = name.split("/")[-2:] if "/" in name else ("", name)
            variable = variable.removesuffix(":0")
            if item.dtype.kind != "f" or item.dtype.itemsize > 8:
                raise Refused(
                    f"{path} holds {name} as {item.dtype}; weights must be float. Give a file of "
                    "keras_cv_attention_models."
                )
            if f"{layer}/{variable}" in tensors:
                raise Refused(f"{path} holds {layer}/{variable} twice.")
            tensors[f"{layer}/{variable}"] = np.asarray(item, dtype="float32")
    return tensors
