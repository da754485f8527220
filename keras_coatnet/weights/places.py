"""Where downloaded files are kept."""

from __future__ import annotations

import os
import pathlib
import re

from keras_coatnet.weights.registry import Checkpoint

_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


def keras_home() -> pathlib.Path:
    """Keras's own folder. Keras has no public function for it."""
    home = os.environ.get("KERAS_HOME") or os.path.join("~", ".keras")
    return pathlib.Path(home).expanduser()


def revisions(checkpoint: Checkpoint) -> list[str]:
    """The revisions to ask the hub for, best first.

    For some checkpoints only the first seven digits of the commit are on record. The hub resolves
    them, but its mirrors may not. Their `main` serves as well: the content is checked in any case.
    """
    revision = checkpoint.revision or "main"
    if revision == "main" or _FULL_COMMIT.fullmatch(revision):
        return [revision]
    return [revision, "main"]


def place_of(checkpoint: Checkpoint) -> pathlib.Path:
    """The path at which a checkpoint's file is found without a download."""
    if checkpoint.repo is None:
        return keras_home() / "models" / "keras_coatnet" / checkpoint.filename
    from huggingface_hub import constants

    repo = "models--" + checkpoint.repo.replace("/", "--")
    snapshots = pathlib.Path(constants.HF_HUB_CACHE) / repo / "snapshots"
    return snapshots / (checkpoint.revision or "main") / checkpoint.filename


def find_cached(checkpoint: Checkpoint) -> pathlib.Path | None:
    """Finds a checkpoint's file on this machine, without a request.

    Args:
        checkpoint: from `keras_coatnet.weights.registry`.

    Returns:
        The path of the file, whose content is yet to be checked; None: it is not here.
    """
    if checkpoint.repo is None:
        path = place_of(checkpoint)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    for revision in revisions(checkpoint):
        found = try_to_load_from_cache(checkpoint.repo, checkpoint.filename, revision=revision)
        if isinstance(found, str):  # else None, or the client's mark for "known not to exist"
            return pathlib.Path(found)
    return None
