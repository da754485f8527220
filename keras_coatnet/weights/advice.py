"""Where a file belongs, and what to tell a user whose download failed."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import urllib.error
from typing import NoReturn

from keras_coatnet.weights.checking import Expected, keras_home
from keras_coatnet.weights.registry import Checkpoint

# Seconds until a server must have said what it holds. The hub's client alone takes 23 to give up;
# who really is that far away raises the limit through the variable that this client reads as well.
ANSWER_SECONDS = 3.5
ANSWER_VARIABLE = "HF_HUB_ETAG_TIMEOUT"

_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


def revisions(checkpoint: Checkpoint) -> list[str]:
    """The revisions to ask for, best first.

    For some checkpoints only the first seven digits of the commit are on record. The hub resolves
    those, mirrors of it may not: then its `main` will do, as the content is checked in any case.
    """
    revision = checkpoint.revision or "main"
    if revision == "main" or _FULL_COMMIT.fullmatch(revision):
        return [revision]
    return [revision, "main"]


def place_by_hand(checkpoint: Checkpoint) -> pathlib.Path:
    """Where a file must lie to be found without a download."""
    if checkpoint.repo is None:
        return keras_home() / "models" / "keras_coatnet" / checkpoint.filename
    from huggingface_hub import constants

    repo = "models--" + checkpoint.repo.replace("/", "--")
    snapshots = pathlib.Path(constants.HF_HUB_CACHE) / repo / "snapshots"
    return snapshots / (checkpoint.revision or "main") / checkpoint.filename


def answer_seconds() -> float:
    """Seconds that a server may take to answer: the hub's variable, or `ANSWER_SECONDS`."""
    return float(os.environ.get(ANSWER_VARIABLE) or ANSWER_SECONDS)


def refuse_if_offline(checkpoint: Checkpoint) -> None:
    """Obeys the hub's switch for other addresses too: it is set where no request may be made."""
    from huggingface_hub import constants, hf_hub_url

    if not constants.HF_HUB_OFFLINE:
        return
    url = checkpoint.url
    if checkpoint.repo is not None:
        revision = revisions(checkpoint)[0]
        url = hf_hub_url(checkpoint.repo, checkpoint.filename, revision=revision)
    raise ValueError(
        f"{url} is not cached, and HF_HUB_OFFLINE forbids to download it. Unset it where "
        f"there is a network. {_by_hand(checkpoint)}"
    )


def raise_no_answer(error: Exception, url: str, checkpoint: Checkpoint) -> NoReturn:
    """For a request that got no useful answer: an HTTP status, or none at all."""
    status = http_status(error)
    if status is not None:
        raise ValueError(_explain_status(status, url, checkpoint)) from error
    _raise_if_not_stored(error, url, checkpoint)  # the client looks for a token on the disk first
    raise ValueError(
        f"Could not reach {url} ({_one_line(error)}), and the file is not cached. Check the "
        f"network ({ANSWER_VARIABLE} sets the seconds to wait for an answer, now "
        f"{answer_seconds():g}). {_by_hand(checkpoint)}"
    ) from error


def raise_failed_download(
    error: Exception, url: str, checkpoint: Checkpoint, expected: Expected
) -> NoReturn:
    """For a download that began and did not end well."""
    status = http_status(error)
    if status is not None:
        raise ValueError(_explain_status(status, url, checkpoint)) from error
    _raise_if_not_stored(error, url, checkpoint)
    size = f"{expected.size} bytes with " if expected.size is not None else ""
    raise ValueError(
        f"The download of {url} failed: {_one_line(error)}. Expected {size}{expected.algorithm} "
        f"{expected.digest}. Nothing was kept: call again to retry. {by_path(checkpoint)}"
    ) from error


def _raise_if_not_stored(error: Exception, url: str, checkpoint: Checkpoint) -> None:
    """For trouble with a disk, which is told from that with a network by the name of a file."""
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        variable = "HF_HOME" if checkpoint.repo else "KERAS_HOME"
        raise ValueError(
            f"Could not store {url}: {_one_line(error)}. Make room, or set {variable} to a folder "
            "that can be written to."
        ) from error


def _explain_status(status: int, url: str, checkpoint: Checkpoint) -> str:
    advice = _advice(status, on_hub=checkpoint.repo is not None)
    return f"{url} answered with HTTP status {status}: {advice} {by_path(checkpoint)}"


def _advice(status: int, on_hub: bool) -> str:
    if status in (401, 403) and on_hub:
        return (
            "access denied. The repository is gated, private or gone: accept its terms on its "
            "page, and set HF_TOKEN to a token that may read it."
        )
    if status in (401, 403):
        return "access denied. Is there a proxy between that wants a password?"
    if status == 404:
        question = "Is HF_ENDPOINT set to another server?" if on_hub else "Was it moved?"
        return f"no such file or revision there. {question}"
    if status == 429:
        return "too many requests. Try again later, or set HF_TOKEN."
    if status >= 500:
        return "the server is at fault. Try again later."
    return "an answer that was not expected."


def _by_hand(checkpoint: Checkpoint) -> str:
    return (
        f"By hand: download {checkpoint.url} elsewhere and put it at "
        f"{place_by_hand(checkpoint)}. Or leave it where you like. {by_path(checkpoint)}"
    )


def by_path(checkpoint: Checkpoint) -> str:
    """The sentence that says how a file is loaded from wherever it lies."""
    return f'A file is loaded by its path with weights="/path/{checkpoint.filename}".'


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error; the hub's client wraps some of its errors in others."""
    while error is not None:
        if isinstance(error, urllib.error.HTTPError):
            return error.code
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


def _one_line(error: Exception) -> str:
    """An error's first sentence; the rest is advice about other functions than ours."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
