"""Which runtimes a network can be timed in on this machine. Needs no Keras."""

from __future__ import annotations

import dataclasses

from keras_coatnet.arguments import choice
from keras_coatnet.exporting.formats import FORMATS, QUANTIZATIONS, check_installed

# Keras's own backend, with the network as it is built and fused; and the formats.
KERAS = ("keras", "keras_fused")
RUNTIMES = (*KERAS, *FORMATS)

# A SavedModel is what Keras computes on TensorFlow, and slow to write.
_DEFAULT = ("keras_fused", "litert", "onnx", "openvino")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A network in a runtime.

    Attributes:
        runtime: one of `RUNTIMES`.
        quantize: how weights are stored, as of `export`.
    """

    runtime: str
    quantize: str | None = None

    @property
    def is_exported(self) -> bool:
        return self.runtime in FORMATS

    def __str__(self) -> str:
        title = {"keras": "Keras", "keras_fused": "Keras, fused"}.get(self.runtime)
        title = title or FORMATS[self.runtime].title
        return title if self.quantize is None else f"{title}, {self.quantize}"


def find_contenders(
    runtimes: list[str] | None, quantize: str | None = None
) -> tuple[list[Contender], list[str]]:
    """Finds the contenders that can run here.

    Args:
        runtimes: those of `RUNTIMES` that were asked for; None: the fused network in Keras, and
            what is installed of LiteRT, ONNX Runtime and OpenVINO.
        quantize: a quantization to time beside float32, in the runtimes that have it.

    Returns:
        The contenders, and why others cannot run.

    Raises:
        ValueError: a name is unknown, or none of the runtimes has the quantization.
        ImportError: a runtime that was asked for is not installed.

    Example:
        >>> find_contenders(["keras_fused"])[0]
        [Contender(runtime='keras_fused', quantize=None)]
    """
    quantize = choice("quantize", quantize, QUANTIZATIONS)
    found, missing = [], []
    for name in dict.fromkeys(runtimes or _DEFAULT):
        if name in KERAS:
            found.append(Contender(name))
            continue
        format = FORMATS[choice("runtimes", name, RUNTIMES)]
        for each in dict.fromkeys((None, quantize)):
            if each not in format.quantizers:
                continue
            try:
                check_installed(format, each)
            except ImportError as error:
                if runtimes is not None:
                    raise
                missing.append(str(error))
                continue
            found.append(Contender(name, each))
    if quantize is not None and all(each.quantize is None for each in found):
        raise ValueError(
            f"None of the runtimes has quantize={quantize!r}: {', '.join(runtimes or _DEFAULT)}. "
            + " ".join(missing)
        )
    found.sort(key=lambda each: (each.quantize is not None, RUNTIMES.index(each.runtime)))
    return found, list(dict.fromkeys(missing))
