"""The formats that a model can be exported to, and what each needs. Needs no Keras."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping

from keras_coatnet.arguments import choice
from keras_coatnet.paths import check_local

QUANTIZATIONS = (None, "float16", "dynamic_int8", "int8")


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of exported models.

    Attributes:
        name: what `export(format=)` calls it, and the extra that installs what it needs.
        title: what people call it.
        suffix: the ending of its files; empty for a folder.
        runtime: the modules that run it, beside TensorFlow.
        writer: further modules that write it.
        quantizers: the quantizations that it has, each with the further modules that it needs.
        fuses: whether the fused network is the faster one in its runtime, in float32.
        weights: the name of a file that holds the weights beside the model's `{stem}{suffix}`;
            empty where there is none.
    """

    name: str
    title: str
    suffix: str
    runtime: tuple[str, ...]
    writer: tuple[str, ...]
    quantizers: Mapping[str | None, tuple[str, ...]]
    fuses: bool
    weights: str = ""

    def weights_file(self, path: pathlib.Path) -> pathlib.Path | None:
        """Returns the file beside a model's that holds its weights, or would if they were large.

        Args:
            path: the model's file or folder.
        """
        if not self.weights:
            return None
        return path.with_name(self.weights.format(stem=path.stem, suffix=path.suffix))


FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        Format("saved_model", "SavedModel", "", (), (), {None: ()}, True),
        Format(
            "litert",
            "LiteRT",
            ".tflite",
            ("ai_edge_litert",),
            (),
            {
                None: (),
                "float16": (),
                "dynamic_int8": ("ai_edge_quantizer",),
                "int8": ("ai_edge_quantizer",),
            },
            True,
        ),
        Format(
            "onnx",
            "ONNX",
            ".onnx",
            ("onnxruntime",),
            ("onnx", "tf2onnx"),
            {None: (), "dynamic_int8": (), "int8": ()},
            True,
            "{stem}{suffix}.data",
        ),
        Format(
            "openvino",
            "OpenVINO",
            ".xml",
            ("openvino",),
            (),
            {None: (), "float16": (), "dynamic_int8": ("nncf",), "int8": ("nncf",)},
            False,
            "{stem}.bin",
        ),
    )
}


def find_format(path: str | os.PathLike, name: str | None = None) -> Format:
    """Finds the format that a path is to be written in.

    Args:
        path: the file or folder to write.
        name: the format's name; None: by the ending of the path. A folder that exists is that of a
            SavedModel, whatever its name.

    Returns:
        The `Format`.

    Raises:
        ValueError: there is no such format, or the path does not end as its files do.

    Example:
        >>> find_format("coatnet.tflite").name
        'litert'
    """
    check_local(path, "path")
    suffix = pathlib.Path(path).suffix
    if name is None and os.path.isdir(path):
        return FORMATS["saved_model"]
    if name is None:
        for found in FORMATS.values():
            if found.suffix == suffix:
                return found
        known = ", ".join(f"{each.suffix or 'a folder'} ({each.name})" for each in FORMATS.values())
        raise ValueError(
            f"{os.fspath(path)} does not end like a file of any format: {known}. Give another "
            "name, or format="
        )
    found = FORMATS[choice("format", name, tuple(FORMATS))]
    if found.suffix and suffix != found.suffix:
        raise ValueError(
            f"A file of format {found.name!r} must end in {found.suffix}. "
            f"Received: {os.fspath(path)}"
        )
    return found


def check_installed(found: Format, quantize: str | None = None, runs_only: bool = False) -> None:
    """Checks that what a format needs is installed.

    Args:
        found: the format.
        quantize: the quantization.
        runs_only: whether models are run, and none is written.

    Raises:
        ValueError: the format does not have that quantization.
        ImportError: something is missing; the message says how to install it.

    Example:
        >>> check_installed(FORMATS["saved_model"])
    """
    if quantize not in found.quantizers:
        having = [each.name for each in FORMATS.values() if quantize in each.quantizers]
        raise ValueError(
            f"{found.title} models cannot be written with quantize={quantize!r}. Formats that can: "
            f"{', '.join(having)}."
        )
    modules = found.runtime if runs_only else found.runtime + found.writer
    missing = [
        module
        for module in modules + found.quantizers[quantize]
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ImportError(
            f"{found.title} needs {', '.join(missing)}. "
            f'Install: pip install "keras-coatnet[{found.name}]"'
        )


def check_target(path: str | os.PathLike, found: Format, overwrite: bool) -> None:
    """Checks that a model can be written to a path.

    Args:
        path: the file or folder to write.
        found: its format.
        overwrite: whether it may exist.

    Raises:
        ValueError: its folder does not exist; it exists, or its file of weights does, and
            `overwrite` is False; or it is not a model of the format.

    Example:
        >>> check_target("coatnet.tflite", FORMATS["litert"], overwrite=False)
    """
    target = pathlib.Path(path).absolute()
    if not target.parent.is_dir():
        raise ValueError(f"{target} cannot be written: there is no folder {target.parent}.")
    for file in (target, found.weights_file(target)):
        if file is not None and file.exists() and not overwrite:
            raise ValueError(
                f"{file} exists. Give another path, or overwrite=True (--overwrite) to replace it."
            )
    if not target.exists():
        return
    is_model = target.is_file() if found.suffix else (target / "saved_model.pb").is_file()
    if not is_model:
        kind = "a file" if found.suffix else "the folder of a SavedModel"
        raise ValueError(f"{target} is not {kind}, and will not be replaced. Give another path.")


def is_exported(path: str | os.PathLike) -> bool:
    """Returns whether a path names a file or folder of one of the formats, by its ending.

    Args:
        path: a path, or any other text.

    Example:
        >>> is_exported("model.onnx"), is_exported("model.keras")
        (True, False)
    """
    # Unlike pathlib's, it returns False for too long a name.
    if os.path.isfile(os.path.join(path, "saved_model.pb")):
        return True
    suffix = pathlib.Path(path).suffix
    return any(suffix == each.suffix for each in FORMATS.values() if each.suffix)
