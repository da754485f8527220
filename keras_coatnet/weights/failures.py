"""Why a file could not be fetched. `explain` is the one place that words the messages."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib

from keras_coatnet.weights.places import place_of
from keras_coatnet.weights.registry import SAFE_SUFFIXES, Checkpoint

# Seconds in which a server must answer; the hub's client alone gives up after 23. The variable,
# which that client reads as well, raises the limit.
ANSWER_SECONDS = 3.5
ANSWER_VARIABLE = "HF_HUB_ETAG_TIMEOUT"


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a file must be. A field is None if it is not known.

    Attributes:
        algorithm: name of the hash, as `hashlib.new` takes it.
        digest: the hash in hexadecimal.
        size: exact size in bytes.
    """

    algorithm: str | None = None
    digest: str | None = None
    size: int | None = None


class FetchFailure(Exception):
    """A step of fetching failed. Its `__cause__` is the error behind it, if there is one.

    Args:
        url: the address that was asked.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


class UnsafeFormat(FetchFailure):
    """A file of that format may run code when it is read."""


class Offline(FetchFailure):
    """`HF_HUB_OFFLINE` forbids the request."""


class NoAnswer(FetchFailure):
    """The server did not answer, or refused the request."""


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
    """Neither the registry nor the server has a hash, so a download could not be checked.

    Args:
        url: the address that was asked.
        etag: what the server announces instead of a hash; None: it was not asked.
    """

    def __init__(self, url: str, etag: str | None = None) -> None:
        super().__init__(url)
        self.etag = etag


class DownloadFailed(FetchFailure):
    """A download was not completed.

    Args:
        url: the address of the file.
        expected: what the file should have been.
    """

    def __init__(self, url: str, expected: Expected) -> None:
        super().__init__(url)
        self.expected = expected


class WrongContent(FetchFailure):
    """A file is not the one expected.

    Args:
        url: the address that the file was downloaded from.
        path: the file.
        expected: its expected size or hash, for the message.
        received: its actual size or hash.

    Attributes:
        not_removed: the error that prevented the removal of the file; None: it was removed.
    """

    def __init__(self, url: str, path: pathlib.Path, expected: str, received: str) -> None:
        super().__init__(url)
        self.path, self.expected, self.received = path, expected, received
        self.not_removed: OSError | None = None


class Unreadable(FetchFailure):
    """A file in the cache cannot be read.

    Args:
        url: the address that the file was downloaded from.
        path: the file.
    """

    def __init__(self, url: str, path: pathlib.Path) -> None:
        super().__init__(url)
        self.path = path


def answer_seconds() -> float:
    """Returns the seconds that a server may take to answer."""
    return float(os.environ.get(ANSWER_VARIABLE) or ANSWER_SECONDS)


def explain(failure: FetchFailure, checkpoint: Checkpoint) -> str:
    """Returns why a checkpoint's file could not be fetched, and what to do.

    Args:
        failure: what the step raised.
        checkpoint: what was to be fetched.

    Returns:
        A few sentences: what happened, what was expected, and what to do.
    """
    url, cause, by_path = failure.url, failure.__cause__, _by_path(checkpoint)
    if isinstance(failure, UnsafeFormat):
        return (
            f"Refusing to fetch {checkpoint.filename!r}: expected a plain file name that ends in "
            f"{' or '.join(SAFE_SUFFIXES)}. Other formats may run code when they are read. Convert "
            "the file to .safetensors, if you trust it."
        )
    if isinstance(failure, WrongContent):
        removal = "The file was removed: call again to download it again."
        error = failure.not_removed
        if error is not None:
            removal = (
                f"The file could not be removed ({error.strerror or error}): remove "
                f"{error.filename} or choose another cache, and call again to download it again."
            )
        return (
            f"{failure.path} is not the file at {url}: expected {failure.expected}, received "
            f"{failure.received}. {removal}"
        )
    if isinstance(failure, Unreadable):
        return (
            f"{failure.path} cannot be read: {cause}. It should be {url}. Change its permissions, "
            "or remove it."
        )
    if isinstance(failure, Offline):
        return (
            f"{url} is not cached, and HF_HUB_OFFLINE forbids downloading it. Unset it, if there "
            f"is a network. {_by_hand(checkpoint)}"
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
        # Errors of a disk name a file. Those of a network do not.
        variable = "HF_HOME" if checkpoint.repo else "KERAS_HOME"
        return (
            f"Could not store {url}: {_one_line(cause)}. Make room, or set {variable} to a "
            "writable folder."
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
    """Returns the HTTP status behind an error, which the hub's client may wrap in others."""
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
        return "access denied. Does a proxy in between need a password?"
    if status == 404:
        question = "Is HF_ENDPOINT set to another server?" if on_hub else "Was it moved?"
        return f"no such file or revision there. {question}"
    if status == 429:
        return "too many requests. Try again later, or set HF_TOKEN."
    if status >= 500:
        return "an error of the server. Try again later."
    return "an unexpected answer."


def _by_hand(checkpoint: Checkpoint) -> str:
    return (
        f"By hand: download {checkpoint.url} elsewhere and put it at {place_of(checkpoint)}, or "
        f"anywhere else. {_by_path(checkpoint)}"
    )


def _by_path(checkpoint: Checkpoint) -> str:
    return f'A file is loaded by its path with weights="/path/{checkpoint.filename}".'


def _one_line(error: BaseException | None) -> str:
    """Returns an error's type and first line. The rest is advice about the client's functions."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
