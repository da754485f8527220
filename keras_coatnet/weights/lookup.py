"""What a `weights` argument means, as far as that shows before a file is opened.

Nothing here imports Keras: the command line checks its arguments with it.
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
_OF_A_RUN = ("final.weights.h5", "best.weights.h5")  # what `train` writes, the one to prefer first


def find_file(weights: str | os.PathLike) -> pathlib.Path | None:
    """Finds the file that a `weights` argument means, and sees that it may be read.

    Args:
        weights: as of `find_source`.

    Returns:
        The path of a file whose name ends in one of `SUFFIXES`; None: it is a name, which
        `registry.find` may know.

    Raises:
        ValueError: it is empty, a remote address, a folder, a missing file, a file of another
            kind, or one that may not be read.
    """
    check_local(weights, "weights", names="hf://")
    # A name is a name, whatever files and folders there are.
    if isinstance(weights, str) and registry.is_name(weights):
        return None
    path = pathlib.Path(weights)
    if _is_file(path):
        if path.name.endswith(pickles.SUFFIXES):
            raise pickles.refusal(path)
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"A file of weights must end in {', '.join(SUFFIXES)}: as Keras saves them, as "
                f"timm, or as keras_cv_attention_models does. Received: weights={str(weights)!r}"
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
    """Tells a file that is not the user's to read from a damaged one."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"The file {path} cannot be read: {error.strerror}. Give a file that you may read."
        ) from error


def _instead_of_a_file(path: pathlib.Path) -> tuple[str, str]:
    """What there is of that name, and what to give."""
    advice = (
        f"Give a file that ends in {', '.join(SUFFIXES)}, or one of the names of "
        "keras_coatnet.checkpoints()."
    )
    if not os.path.isdir(path):
        return ", but a device or a pipe" * os.path.exists(path), advice
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
    except OSError as error:  # a name that is too long, a folder that may not be looked into
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
    name: str, architecture: CoAtNetConfig, candidates: Sequence[CoAtNetConfig], asker: str
) -> None:
    """Checks that the network of weights is one that the caller may build.

    Args:
        name: What error messages call the weights.
        architecture: The network that they belong to.
        candidates: The networks that the caller may build.
        asker: What error messages call the caller, e.g. `"CoAtNet0"`.

    Raises:
        ValueError: It is none of them.
    """
    if any(architecture.same_network(candidate) for candidate in candidates):
        return
    known = [n for n, config in ARCHITECTURES.items() if architecture.same_network(config)]
    if not known:
        raise ValueError(
            f"The weights {name} belong to a network without a name, and {asker} builds another "
            f"one. Use CoAtNet(config, weights=...) with config={architecture}."
        )
    raise ValueError(
        f"The weights {name} belong to the architecture {known[0]!r}, and {asker} builds another "
        f"one. Use CoAtNet({known[0]!r}, weights=...)."
    )
