"""Where downloaded files are kept."""

from __future__ import annotations

import os
import pathlib
import re

from keras_coatnet.weights.registry import Checkpoint

_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


def keras_home() -> pathlib.Path:
    """Returns Keras's folder, for which Keras has no public function."""
    home = os.environ.get("KERAS_HOME") or os.path.join("~", ".keras")
    return pathlib.Path(home).expanduser()


def revisions(checkpoint: Checkpoint) -> list[str]:
    """Returns the revisions to ask the hub for, the preferred one first.

    For some checkpoints, only the first seven digits of the commit are known. The hub resolves
    them, but its mirrors may not. `main` can be used instead, because the content is checked.
    """
    revision = checkpoint.revision or "main"
    if revision == "main" or _FULL_COMMIT.fullmatch(revision):
        return [revision]
    return [revision, "main"]


def place_of(checkpoint: Checkpoint) -> pathlib.Path:
    """Returns the path at which `find_cached` looks for a checkpoint's file."""
    if checkpoint.repo is None:
        return keras_home() / "models" / "keras_coatnet" / checkpoint.filename
    from huggingface_hub import constants

    repo = "models--" + checkpoint.repo.replace("/", "--")
    snapshots = pathlib.Path(constants.HF_HUB_CACHE) / repo / "snapshots"
    return snapshots / (checkpoint.revision or "main") / checkpoint.filename


def find_cached(checkpoint: Checkpoint) -> pathlib.Path | None:
    """Finds a checkpoint's file in the caches, without a request.

    Args:
        checkpoint: from `keras_coatnet.weights.registry`.

    Returns:
        The path of the file, whose content is not checked; None if it is not cached.
    """
    if checkpoint.repo is None:
        path = place_of(checkpoint)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    for revision in revisions(checkpoint):
        found = try_to_load_from_cache(checkpoint.repo, checkpoint.filename, revision=revision)
        if isinstance(found, str):  # else None, or the client's object for "does not exist"
            return pathlib.Path(found)
    return None
