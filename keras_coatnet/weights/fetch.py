"""Downloads the files of published checkpoints, and checks them.

timm's files come from the Hugging Face hub through its own client, into its own cache, so that
they are shared with timm and obey `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE`. The files of keras_cv_attention_models come from a plain address into
`KERAS_HOME/models/keras_coatnet`.

This module adds what the hub's client and `keras.utils.get_file` do not do:

- The content is compared with its hash, once per file (`checking`).
- A file with wrong content is removed, and the error says what was expected (`failures`).
- Without a network, the call fails within five seconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from keras_coatnet.weights.checking import check_once, compare, note, unfinished
from keras_coatnet.weights.failures import (
    DownloadFailed,
    Expected,
    FetchFailure,
    NoAnswer,
    NoHash,
    Offline,
    OtherFile,
    UnsafeFormat,
    answer_seconds,
    explain,
    http_status,
)
from keras_coatnet.weights.passwords import hide, hide_in_error, hide_in_logs
from keras_coatnet.weights.places import find_cached, place_of, revisions
from keras_coatnet.weights.registry import SAFE_SUFFIXES, Checkpoint

STALE_SECONDS = 24 * 3600  # an older unfinished file was left by a process that was killed

_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


def fetch(checkpoint: Checkpoint) -> pathlib.Path:
    """Returns the path of a checkpoint's file, which is downloaded if it is not cached.

    For a cached file, no request is made. A download shows a progress bar on a terminal, and prints
    one line elsewhere (neither with `HF_HUB_DISABLE_PROGRESS_BARS=1`). It is resumed when the
    connection breaks, and gets its final name only when it is complete.

    Args:
        checkpoint: from `keras_coatnet.weights.registry`.

    Returns:
        The path, in the hub's cache (timm's files) or in Keras's folder (the others).

    Raises:
        ValueError: the file could not be fetched, or is not the one expected. The message names the
            address, the failure, and how to fetch the file by hand.

    Example, which needs a network or a cached file:
        path = fetch(find("imagenet", "coatnet0"))
    """
    hide_in_logs()
    try:
        filename = checkpoint.filename
        if not filename.endswith(SAFE_SUFFIXES) or pathlib.PurePath(filename).name != filename:
            raise UnsafeFormat(checkpoint.url)
        path = find_cached(checkpoint)
        if path is not None:
            check_once(path, _expected_of_cached(checkpoint, path), checkpoint.url)
            return path
        if checkpoint.repo is not None:
            return _download_from_hub(checkpoint, checkpoint.repo)
        return _download_from_address(checkpoint)
    except FetchFailure as failure:
        error = ValueError(explain(failure, checkpoint))
        error.__cause__ = failure.__cause__
        shown = hide_in_error(error)
    raise shown  # outside `except`, so that the traceback does not show `failure` as well


def _expected_of_cached(checkpoint: Checkpoint, path: pathlib.Path) -> Expected:
    """Returns what is known without a request: the registry's hash, or the hub client's.

    The client stores a large file under its SHA-256, and links to that. Only the first link is
    read: further ones may lead to files of the client that are named by other hashes.
    """
    if checkpoint.repo is None:
        return _recorded(checkpoint)
    digest = checkpoint.sha256
    if digest is None and path.is_symlink():
        digest = _sha256_or_none(os.path.basename(os.readlink(path)))
    return Expected("sha256", digest) if digest else Expected()


# --- From the Hugging Face hub ---------------------------------------------------------------
# `huggingface_hub` is imported in the functions that need it: `import keras_coatnet` stays fast.


def _download_from_hub(checkpoint: Checkpoint, repo: str) -> pathlib.Path:
    from huggingface_hub import hf_hub_download, hf_hub_url

    revision, metadata = _ask_hub(checkpoint, repo)
    url = hf_hub_url(repo, checkpoint.filename, revision=revision)  # HF_ENDPOINT's
    expected = _expected_of_answer(checkpoint, metadata, url)
    announce(url, metadata.size)
    try:
        path = pathlib.Path(hf_hub_download(repo, checkpoint.filename, revision=revision))
    except Exception as error:  # each version of the client has another transport's errors
        raise DownloadFailed(url, expected) from error
    check_once(path, expected, url)
    return path


def _ask_hub(checkpoint: Checkpoint, repo: str) -> tuple[str, Any]:
    """Returns the revision that the hub has, and the metadata of its file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    seconds = answer_seconds()
    candidates = revisions(checkpoint)
    for revision in candidates:
        url = hf_hub_url(repo, checkpoint.filename, revision=revision)
        _refuse_if_offline(url)
        ask = functools.partial(get_hf_file_metadata, url, timeout=seconds)
        try:
            return revision, _within(seconds, ask)
        except Exception as error:  # as above
            if revision == candidates[-1] or http_status(error) != 404:
                raise NoAnswer(url) from error
    raise AssertionError("`revisions` returns at least one")


def _expected_of_answer(checkpoint: Checkpoint, metadata: Any, url: str) -> Expected:
    """Returns the registry's hash or the hub's, which must agree, and the hub's size."""
    promised = _sha256_or_none(metadata.etag)
    if checkpoint.sha256 and promised and checkpoint.sha256 != promised:
        raise OtherFile(url, checkpoint.sha256, promised)
    digest = checkpoint.sha256 or promised
    if digest is None:
        raise NoHash(url, str(metadata.etag))
    return Expected("sha256", digest, metadata.size)


def _sha256_or_none(text: str | None) -> str | None:
    return text if text and _SHA256.fullmatch(text) else None


# --- From a plain address --------------------------------------------------------------------


def _download_from_address(checkpoint: Checkpoint) -> pathlib.Path:
    # It has retries and a progress bar. It is documented, but not among the client's public names.
    from huggingface_hub.file_download import http_get

    url, target, expected = checkpoint.url, place_of(checkpoint), _recorded(checkpoint)
    size = _ask_address(url)
    announce(url, size)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        with unfinished(target) as part:
            with part.open("wb") as file:
                http_get(url, file, displayed_filename=checkpoint.filename)
            compare(part, expected, url)
            os.replace(part, target)  # atomic within a folder
    except FetchFailure:
        raise
    except Exception as error:  # each version of the client has another transport's errors
        raise DownloadFailed(url, expected) from error
    note(target, expected)
    return target


def _recorded(checkpoint: Checkpoint) -> Expected:
    for algorithm, digest in (("sha256", checkpoint.sha256), ("md5", checkpoint.md5)):
        if digest:
            return Expected(algorithm, digest)
    raise NoHash(checkpoint.url)


def _ask_address(url: str) -> int | None:
    """Returns the size of the file at an address; None if the server does not say it."""
    from huggingface_hub import get_session

    _refuse_if_offline(url)
    seconds = answer_seconds()
    ask = functools.partial(get_session().head, url, follow_redirects=True, timeout=seconds)
    try:
        answer = _within(seconds, ask).raise_for_status()
    except Exception as error:  # as above
        raise NoAnswer(url) from error
    return int(answer.headers.get("Content-Length", 0)) or None


def _remove_stale(target: pathlib.Path) -> None:
    """Removes unfinished files of killed downloads, but not those of running ones."""
    for part in target.parent.glob(f"{target.name}.*.incomplete"):
        with contextlib.suppress(OSError):  # another process may be removing it as well
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()


# --- Both ------------------------------------------------------------------------------------


def _refuse_if_offline(url: str) -> None:
    """Obeys `HF_HUB_OFFLINE`, also for addresses outside the hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise Offline(url)


def announce(url: str, size: int | None) -> None:
    """Prints what is downloaded. The progress bar that follows appears on terminals only."""
    from huggingface_hub.utils import are_progress_bars_disabled

    if not are_progress_bars_disabled():
        megabytes = f" ({size / 1e6:.1f} MB)" if size else ""
        print(f"Downloading {hide(url)}{megabytes}", file=sys.stderr)


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """Calls a function with a limit on its whole time.

    A socket's timeout starts again for each address of a host and each byte received, and does not
    cover the look-up of the host's name. The thread may outlast this call, but not the process.
    """
    outcomes: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((call(), None))
        except Exception as error:  # raised below, in the caller's thread
            outcomes.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result
