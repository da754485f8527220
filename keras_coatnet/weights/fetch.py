"""Downloads a published checkpoint's file: whole and checked, or not at all.

timm's files come from the Hugging Face hub through its own client, into its own cache, so that
they are shared with timm and obey `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE`. The files of keras_cv_attention_models come from a plain address into
`KERAS_HOME/models/keras_coatnet`.

The hub's client and `keras.utils.get_file` leave three things to their caller:

- the content is compared with its hash, once per file (`checking`);
- a file that fails is removed, and the error says what was expected and what came (`failures`);
- without a network the answer comes within five seconds and says what to do.
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

from keras_coatnet.weights.checking import (
    Expected,
    WrongContent,
    check_once,
    compare,
    note,
    unfinished,
)
from keras_coatnet.weights.failures import (
    DownloadFailed,
    FetchFailure,
    NoAnswer,
    NoHash,
    Offline,
    OtherFile,
    answer_seconds,
    explain,
    http_status,
)
from keras_coatnet.weights.passwords import hide, hide_in_error, hide_in_logs
from keras_coatnet.weights.places import find_cached, place_of, revisions
from keras_coatnet.weights.registry import Checkpoint

# Neither format can run code when it is read. torch's own, a pickle, can.
SAFE_SUFFIXES = (".safetensors", ".h5")

STALE_SECONDS = 24 * 3600  # after which an unfinished file surely has no process behind it

_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


def fetch(checkpoint: Checkpoint) -> pathlib.Path:
    """Returns the path of a checkpoint's file, and downloads it first if need be.

    A file that is cached is returned without any request. A download shows a progress bar (one
    line where the error stream is no terminal; nothing with `HF_HUB_DISABLE_PROGRESS_BARS=1`), is
    resumed when the connection breaks, and gets its final name only when it is complete.

    Args:
        checkpoint: from `keras_coatnet.weights.registry`.

    Returns:
        Path of the file in the hub's cache (timm's) or in Keras's folder (the others).

    Raises:
        ValueError: the file could not be fetched (no network, no such file, no permission, a server
            out of order, a broken connection), or is not the one expected. The message names the
            address, what came, and how to go on by hand.

    Example, which needs a network or a cached file:
        path = fetch(find("imagenet", "coatnet0"))
    """
    _refuse_unsafe(checkpoint.filename)
    hide_in_logs()
    try:
        path = find_cached(checkpoint)
        if path is not None:
            check_once(path, _expected_of_cached(checkpoint, path), checkpoint.url)
            return path
        if checkpoint.repo is not None:
            return _download_from_hub(checkpoint, checkpoint.repo)
        return _download_from_address(checkpoint)
    except (FetchFailure, WrongContent) as failure:
        error = ValueError(explain(failure, checkpoint))
        error.__cause__ = failure.__cause__
        shown = hide_in_error(error)
    raise shown  # here, where no other error is being handled that would be shown with it


def _refuse_unsafe(filename: str) -> None:
    if not filename.endswith(SAFE_SUFFIXES) or pathlib.PurePath(filename).name != filename:
        raise ValueError(
            f"Refusing to fetch {filename!r}: expected a plain file name that ends in "
            f"{' or '.join(SAFE_SUFFIXES)}. Other formats may run code when they are read; convert "
            "such a file to .safetensors where you trust it."
        )


def _expected_of_cached(checkpoint: Checkpoint, path: pathlib.Path) -> Expected:
    """What is known without a request: the record, or the name that the hub's client gave.

    The client stores a large file under its SHA-256 and links to that. One step of the link is
    what counts: the next may lead to a store of the client's where names are other hashes.
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
    """Asks the hub what it holds, and answers `(revision, metadata)` within seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    seconds = answer_seconds()
    *others, last = revisions(checkpoint)
    for revision in (*others, last):
        url = hf_hub_url(repo, checkpoint.filename, revision=revision)
        _refuse_if_offline(url)
        ask = functools.partial(get_hf_file_metadata, url, timeout=seconds)
        try:
            return revision, _within(seconds, ask)
        except Exception as error:  # as above
            if revision == last or http_status(error) != 404:
                raise NoAnswer(url) from error
    raise AssertionError("`revisions` returns at least one")


def _expected_of_answer(checkpoint: Checkpoint, metadata: Any, url: str) -> Expected:
    """Combines the registry's hash with the hub's. They must agree before anything is loaded."""
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
    # With its retries and its progress bar. Documented, but not among the client's top names.
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
            try:
                compare(part, expected, url)
            except WrongContent as wrong:
                text = f"{wrong} Nothing was kept: call again to retry."
                raise WrongContent(text) from None
            os.replace(part, target)  # same folder: never a moment with half a file
    except WrongContent:
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
    """Asks for a file's size, and answers within seconds."""
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
    """Removes what killed downloads of this file left behind, and spares running ones."""
    for part in target.parent.glob(f"{target.name}.*.incomplete"):
        with contextlib.suppress(OSError):  # another process may be removing it as well
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()


# --- Both ------------------------------------------------------------------------------------


def _refuse_if_offline(url: str) -> None:
    """Obeys the hub's switch for other addresses too: it is set where no request may be made."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise Offline(url)


def announce(url: str, size: int | None) -> None:
    """Says what is being downloaded: the bars that follow appear on terminals only."""
    from huggingface_hub.utils import are_progress_bars_disabled

    if not are_progress_bars_disabled():
        megabytes = f" ({size / 1e6:.1f} MB)" if size else ""
        print(f"Downloading {hide(url)}{megabytes}", file=sys.stderr)


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """Calls with a limit on the whole time.

    A socket's timeout starts anew with each address of a host and each byte received, and does not
    cover the look-up of the name at all. The thread is a daemon: it may outlast the call, but not
    the process.
    """
    outcomes: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((call(), None))
        except Exception as error:  # handed over to the caller, below
            outcomes.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result
