"""What a `weights` argument means, without opening a file.

Keras is not imported, because the command line checks its arguments with this module.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.paths import check_local
from keras_coatnet.weights import foreign_files, pickles, registry

KERAS_SUFFIXES = (".weights.h5", ".keras")
SUFFIXES = (*KERAS_SUFFIXES, *foreign_files.LAYOUTS)
_OF_A_RUN = ("final.weights.h5", "best.weights.h5")  # what `train` writes, the preferred one first


def find_file(weights: str | os.PathLike) -> pathlib.Path | None:
    """Finds the file that a `weights` argument means, and checks that it can be read.

    Args:
        weights: as in `find_source`.

    Returns:
        The path of a file that ends in one of `SUFFIXES`. None if the argument is a name, which
        `registry.find` may know.

    Raises:
        ValueError: it is empty, a remote address, a folder, a missing file, a file of another
            kind, or one without permission to read.
    """
    check_local(weights, "weights", names="hf://")
    # Names take precedence over files and folders of the same name.
    if isinstance(weights, str) and registry.is_name(weights):
        return None
    path = pathlib.Path(weights)
    if _is_file(path):
        if path.name.endswith(pickles.SUFFIXES):
            raise pickles.refusal(path)
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"A file of weights must end in {', '.join(SUFFIXES)}: a file of Keras, of timm or "
                f"of keras_cv_attention_models. Received: weights={str(weights)!r}"
            )
        _check_readable(path)
        return path
    if path.name.endswith(SUFFIXES) or os.path.exists(path) or not isinstance(weights, str):
        instead, advice = _instead_of_a_file(path)
        raise ValueError(
            f"There is no file of that name{instead}. Received: weights={str(weights)!r}. {advice}"
        )
    return None


def _check_readable(path: pathlib.Path) -> None:
    """Raises a ValueError if a file cannot be read, so that it is not reported as damaged."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"The file {path} cannot be read: {error.strerror}. Give a readable file."
        ) from error


def _instead_of_a_file(path: pathlib.Path) -> tuple[str, str]:
    """Returns what the path is instead, to follow "There is no file of that name", and advice."""
    advice = (
        f"Give a file that ends in {', '.join(SUFFIXES)}, or one of the names of "
        "keras_coatnet.checkpoints()."
    )
    if not os.path.isdir(path):
        return ", but a device or a pipe" if os.path.exists(path) else "", advice
    held = [path / name for name in _OF_A_RUN if (path / name).is_file()]
    if not held and not (path / "recipe.json").is_file():
        return ", but a folder", advice
    if not held:
        advice = f"It holds no weights yet: neither {' nor '.join(_OF_A_RUN)}. Let the run end."
    elif held[0].name == _OF_A_RUN[0]:
        advice = f"Give {held[0]}, or, to evaluate, --run {path}"
    else:
        advice = f"Give {held[0]}, its best so far."
    return ", but a folder, the folder of a run", advice


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # for example, the name is too long
        raise ValueError(
            f"There is no file of that name: {error.strerror}. Received: weights={str(path)!r}"
        ) from error


def unknown_architecture(path: pathlib.Path) -> ValueError:
    """The error for a file that does not say which network its weights belong to.

    Args:
        path: The file.

    Returns:
        A `ValueError` whose message names the architectures.

    Example:
        >>> "Name the architecture" in str(unknown_architecture(pathlib.Path("a.safetensors")))
        True
    """
    return ValueError(
        f"{path} does not say which network its weights belong to. Name the architecture, one "
        f"of: {', '.join(ARCHITECTURES)}."
    )


def check_offered(
    name: str, architecture: CoAtNetConfig, candidates: Sequence[CoAtNetConfig], caller: str
) -> None:
    """Checks that the network of weights is one that the caller may build.

    Args:
        name: The name of the weights in error messages.
        architecture: The network that they belong to.
        candidates: The networks that the caller may build.
        caller: The name of the caller in error messages, e.g. `"CoAtNet0"`.

    Raises:
        ValueError: It is none of them.
    """
    if any(architecture.same_network(candidate) for candidate in candidates):
        return
    known = [n for n, config in ARCHITECTURES.items() if architecture.same_network(config)]
    if not known:
        raise ValueError(
            f"The weights {name} belong to a network without a name, and {caller} builds another "
            f"one. Use CoAtNet(config, weights=...) with config={architecture}."
        )
    raise ValueError(
        f"The weights {name} belong to the architecture {known[0]!r}, and {caller} builds another "
        f"one. Use CoAtNet({known[0]!r}, weights=...)."
    )
