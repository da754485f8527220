"""Tells paths on this machine from remote addresses."""

from __future__ import annotations

import os
import re

# `pathlib` makes one slash of two. A scheme has two letters or more: "C:/" is a drive.
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_local(path: str | os.PathLike | None, argument: str, names: str | None = None) -> None:
    """Checks that a path is not empty, and not the address of a remote file or folder.

    Without this check, an address would be taken for a local folder, and an empty text for the
    working directory.

    Args:
        path: a path; None: there is none to check.
        argument: what error messages call it, e.g. `"output"`.
        names: a scheme with which names start that are not addresses; None: there is none.

    Raises:
        ValueError: it is not a path, is empty, or starts with a scheme, such as `"gs://"`.

    Example:
        >>> check_local("runs/flowers", "output")
    """
    if path is None:
        return
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"`{argument}` must be a path. Received: {argument}={path!r}")
    if names and os.fspath(path).startswith(names):
        return
    if not os.fspath(path):
        raise ValueError(f"`{argument}` is an empty text. Give a path or a name, or leave it out.")
    if _REMOTE.match(os.fspath(path)):
        raise ValueError(
            f"`{argument}` must be a path on this machine; remote addresses are not supported. "
            f"Received: {argument}={os.fspath(path)!r}. Copy the files to this machine, or mount "
            "the remote folder, and give that path."
        )
