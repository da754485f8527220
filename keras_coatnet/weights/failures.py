"""Why a file could not be fetched: the one place where a failure becomes a message."""

from __future__ import annotations

import errno
import os

from keras_coatnet.weights.checking import Expected, WrongContent
from keras_coatnet.weights.places import place_of
from keras_coatnet.weights.registry import Checkpoint

# Seconds until a server must have said what it holds. The hub's client alone takes 23 to give up.
# A user whose server is far away raises the limit by the variable that this client reads as well.
ANSWER_SECONDS = 3.5
ANSWER_VARIABLE = "HF_HUB_ETAG_TIMEOUT"


class FetchFailure(Exception):
    """A step of fetching failed. Its `__cause__` says how, `explain` says it to the user.

    Args:
        url: the address that was asked.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


class Offline(FetchFailure):
    """`HF_HUB_OFFLINE` forbids the request."""


class NoAnswer(FetchFailure):
    """The server did not say what it holds."""


class OtherFile(FetchFailure):
    """The server announces another file than the registry knows.

    Args:
        url: the address that was asked.
        expected: hash of the file that the registry knows.
        announced: hash that the server announces.
    """

    def __init__(self, url: str, expected: str, announced: str) -> None:
        super().__init__(url)
        self.expected, self.announced = expected, announced


class NoHash(FetchFailure):
    """Neither the registry nor the server knows a hash, so that no download can be checked.

    Args:
        url: the address that was asked.
        etag: what the server announces in place of a hash; None: it was not asked.
    """

    def __init__(self, url: str, etag: str | None = None) -> None:
        super().__init__(url)
        self.etag = etag


class DownloadFailed(FetchFailure):
    """A download began, and did not end well.

    Args:
        url: the address of the file.
        expected: what the file should have been.
    """

    def __init__(self, url: str, expected: Expected) -> None:
        super().__init__(url)
        self.expected = expected


def answer_seconds() -> float:
    """Seconds that a server may take to answer: the hub's variable, or `ANSWER_SECONDS`."""
    return float(os.environ.get(ANSWER_VARIABLE) or ANSWER_SECONDS)


def explain(failure: FetchFailure | WrongContent, checkpoint: Checkpoint) -> str:
    """Says why a checkpoint's file could not be fetched, and what to do.

    Args:
        failure: what the step raised.
        checkpoint: what was to be fetched.

    Returns:
        A few sentences: what happened, what was expected, and how to go on, by hand if need be.
    """
    if isinstance(failure, WrongContent):
        return str(failure)
    url, cause, by_path = failure.url, failure.__cause__, _by_path(checkpoint)
    if isinstance(failure, Offline):
        return (
            f"{url} is not cached, and HF_HUB_OFFLINE forbids to download it. Unset it where "
            f"there is a network. {_by_hand(checkpoint)}"
        )
    if isinstance(failure, OtherFile):
        return (
            f"{url} is not the file that keras_coatnet knows as {checkpoint.name!r}: expected "
            f"sha256 {failure.expected}, the server announces {failure.announced}. Nothing was "
            f"downloaded. {by_path}"
        )
    if isinstance(failure, NoHash):
        if failure.etag is None:
            return f"No hash is on record for {url}, so a download could not be checked. {by_path}"
        return (
            f"The server announces no sha256 for {url} (its etag is {failure.etag!r}), so a "
            f"download could not be checked. Is HF_ENDPOINT set? {by_path}"
        )
    status = http_status(cause)
    if status is not None:
        advice = _advice(status, on_hub=checkpoint.repo is not None)
        return f"{url} answered with HTTP status {status}: {advice} {by_path}"
    if isinstance(cause, OSError) and (cause.filename or cause.errno == errno.ENOSPC):
        # A disk's error names a file, a network's does not. The client reads a token first.
        variable = "HF_HOME" if checkpoint.repo else "KERAS_HOME"
        return (
            f"Could not store {url}: {_one_line(cause)}. Make room, or set {variable} to a folder "
            "that can be written to."
        )
    if isinstance(failure, DownloadFailed):
        expected = failure.expected
        size = f"{expected.size} bytes with " if expected.size is not None else ""
        return (
            f"The download of {url} failed: {_one_line(cause)}. Expected {size}"
            f"{expected.algorithm} {expected.digest}. Nothing was kept: call again to retry. "
            f"{by_path}"
        )
    return (
        f"Could not reach {url} ({_one_line(cause)}), and the file is not cached. Check the "
        f"network ({ANSWER_VARIABLE} sets the seconds to wait for an answer, now "
        f"{answer_seconds():g}). {_by_hand(checkpoint)}"
    )


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error. The hub's client wraps some of its errors in others."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


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
        f"By hand: download {checkpoint.url} elsewhere and put it at {place_of(checkpoint)}. Or "
        f"leave it where you like. {_by_path(checkpoint)}"
    )


def _by_path(checkpoint: Checkpoint) -> str:
    return f'A file is loaded by its path with weights="/path/{checkpoint.filename}".'


def _one_line(error: BaseException | None) -> str:
    """An error's first sentence. The rest is advice about other functions than ours."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
