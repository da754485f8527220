"""Brings a published checkpoint's file onto this machine: whole and checked, or not at all.

timm's files come from the Hugging Face hub through its own client, into its own cache, so that
they are shared with timm and obey `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE`. keras_cv_attention_models' files come from a plain address into
`KERAS_HOME/models/keras_coatnet`.

What the hub's client and `keras.utils.get_file` leave to their caller is done here:

- the content is compared with its hash, once per file (`checking`);
- a file that fails is removed, and the error says what was expected and what came;
- without a network the answer comes within five seconds and says what to do.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import pathlib
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from keras_coatnet.weights.advice import (
    answer_seconds,
    by_path,
    http_status,
    place_by_hand,
    raise_failed_download,
    raise_no_answer,
    refuse_if_offline,
    revisions,
)
from keras_coatnet.weights.checking import (
    CHUNK,
    Expected,
    WrongContent,
    check_once,
    compare,
    note,
    unfinished,
)
from keras_coatnet.weights.passwords import hide, hide_in_error, hide_in_logs
from keras_coatnet.weights.registry import Checkpoint

# Neither format can run code when it is read; torch's own, a pickle, can.
SAFE_SUFFIXES = (".safetensors", ".h5")

READ_SECONDS = 10.0  # longest silence in the middle of a download
ATTEMPTS = 4  # how often one download is taken up again where it broke off
STALE_SECONDS = 24 * 3600  # after which an unfinished file surely has no process behind it

_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


def fetch(checkpoint: Checkpoint) -> pathlib.Path:
    """Returns the path of a checkpoint's file, and downloads it first if need be.

    A file that is cached is returned without any request. A download shows a progress bar (one
    line where the error stream is no terminal; nothing with `HF_HUB_DISABLE_PROGRESS_BARS=1`), is
    resumed when the connection breaks, and gets its final name only when it is complete.

    Args:
        checkpoint: What to fetch, from `keras_coatnet.weights.registry`.

    Returns:
        Path of the file in the hub's cache (timm's) or in Keras's folder (the others).

    Raises:
        ValueError: if the file cannot be had (no network, no such file, no permission, a server
            out of order, a broken connection) or is not the one expected. The message names the
            address, what came, and how to go on by hand.

    Example, which needs a network or a cached file:
        path = fetch(find("imagenet", "coatnet0"))
    """
    _refuse_unsafe(checkpoint.filename)
    hide_in_logs()
    try:
        if checkpoint.repo is not None:
            return _fetch_from_hub(checkpoint)
        return _fetch_from_address(checkpoint)
    except ValueError as error:
        failure = hide_in_error(error)
    raise failure  # here, where no other error is being handled that would be shown with it


def _refuse_unsafe(filename: str) -> None:
    if not filename.endswith(SAFE_SUFFIXES) or pathlib.PurePath(filename).name != filename:
        raise ValueError(
            f"Refusing to fetch {filename!r}: expected a plain file name that ends in "
            f"{' or '.join(SAFE_SUFFIXES)}. Other formats may run code when they are read; convert "
            "such a file to .safetensors where you trust it."
        )


# --- From the Hugging Face hub ---------------------------------------------------------------
# `huggingface_hub` is imported in the functions that need it: `import keras_coatnet` stays fast.


def _fetch_from_hub(checkpoint: Checkpoint) -> pathlib.Path:
    path = _find_in_hub_cache(checkpoint)
    if path is None:
        return _download_from_hub(checkpoint)
    check_once(path, _expected_of_cached(checkpoint, path), checkpoint.url)
    return path


def _find_in_hub_cache(checkpoint: Checkpoint) -> pathlib.Path | None:
    from huggingface_hub import try_to_load_from_cache

    for revision in revisions(checkpoint):
        found = try_to_load_from_cache(checkpoint.repo, checkpoint.filename, revision=revision)
        if isinstance(found, str):  # else None, or the client's mark for "known not to exist"
            return pathlib.Path(found)
    return None


def _expected_of_cached(checkpoint: Checkpoint, path: pathlib.Path) -> Expected:
    """What is known without a request: the record, or the name that the hub's client gave.

    The client stores a large file under its SHA-256 and links to that. One step of the link is
    what counts: the next may lead to a store of the client's where names are other hashes.
    """
    digest = checkpoint.sha256
    if digest is None and path.is_symlink():
        digest = _sha256_or_none(os.path.basename(os.readlink(path)))
    return Expected("sha256", digest) if digest else Expected()


def _download_from_hub(checkpoint: Checkpoint) -> pathlib.Path:
    from huggingface_hub import hf_hub_download, hf_hub_url

    revision, metadata = _ask_hub(checkpoint)
    url = hf_hub_url(checkpoint.repo, checkpoint.filename, revision=revision)  # HF_ENDPOINT's
    expected = _expected_of_answer(checkpoint, metadata, url)
    announce(url, metadata.size)
    try:
        found = hf_hub_download(checkpoint.repo, checkpoint.filename, revision=revision)
    except Exception as error:  # each version of the client has another transport's errors
        raise_failed_download(error, url, checkpoint, expected)
    path = pathlib.Path(found)
    check_once(path, expected, url)
    return path


def _ask_hub(checkpoint: Checkpoint) -> tuple[str, Any]:
    """Asks the hub what it holds, and answers `(revision, metadata)` within seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    seconds = answer_seconds()
    refuse_if_offline(checkpoint)
    for revision in revisions(checkpoint):
        url = hf_hub_url(checkpoint.repo, checkpoint.filename, revision=revision)
        ask = functools.partial(get_hf_file_metadata, url, timeout=seconds)
        try:
            return revision, _within(seconds, ask)
        except Exception as error:  # as above
            failure = error
        if http_status(failure) != 404:
            break
    raise_no_answer(failure, url, checkpoint)


def _expected_of_answer(checkpoint: Checkpoint, metadata: Any, url: str) -> Expected:
    """Combines the registry's hash with the hub's. They must agree before anything is loaded."""
    promised = _sha256_or_none(metadata.etag)
    if checkpoint.sha256 and promised and checkpoint.sha256 != promised:
        raise ValueError(
            f"{url} is not the file that keras_coatnet knows as {checkpoint.name!r}: expected "
            f"sha256 {checkpoint.sha256}, the server announces {promised}. Nothing was downloaded. "
            + by_path(checkpoint)
        )
    digest = checkpoint.sha256 or promised
    if digest is None:
        raise ValueError(
            f"The server announces no sha256 for {url} (its etag is {metadata.etag!r}), so a "
            f"download could not be checked. Is HF_ENDPOINT set? {by_path(checkpoint)}"
        )
    return Expected("sha256", digest, metadata.size)


def _sha256_or_none(text: str | None) -> str | None:
    return text if text and _SHA256.fullmatch(text) else None


# --- From a plain address --------------------------------------------------------------------


def _fetch_from_address(checkpoint: Checkpoint) -> pathlib.Path:
    target = place_by_hand(checkpoint)
    expected = _recorded(checkpoint)
    if target.is_file():
        check_once(target, expected, checkpoint.url)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        with unfinished(target) as part:
            _receive(checkpoint, part)
            try:
                compare(part, expected, checkpoint.url)
            except WrongContent as wrong:
                raise ValueError(f"{wrong} Nothing was kept: call again to retry.") from None
            os.replace(part, target)  # same folder: never a moment with half a file
    except (OSError, http.client.HTTPException) as error:
        raise_failed_download(error, checkpoint.url, checkpoint, expected)
    note(target, expected)
    return target


def _recorded(checkpoint: Checkpoint) -> Expected:
    for algorithm, digest in (("sha256", checkpoint.sha256), ("md5", checkpoint.md5)):
        if digest:
            return Expected(algorithm, digest)
    raise ValueError(
        f"No hash is on record for {checkpoint.url}, so a download could not be checked. "
        + by_path(checkpoint)
    )


def _remove_stale(target: pathlib.Path) -> None:
    """Removes what killed downloads of this file left behind, and spares running ones."""
    for part in target.parent.glob(f"{target.name}.*.incomplete"):
        with contextlib.suppress(OSError):  # another process may be removing it as well
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()


def _receive(checkpoint: Checkpoint, part: pathlib.Path) -> None:
    """Downloads to `part`, and takes a broken connection up again where it broke off."""
    from huggingface_hub.utils import tqdm  # the same bar, and the same switches, as for the hub

    response = _open_first(checkpoint)
    announce(checkpoint.url, int(response.headers["Content-Length"] or 0))
    bar = tqdm(unit="B", unit_scale=True, desc=checkpoint.filename, disable=None)
    with part.open("wb") as file, bar:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with response or _open(checkpoint.url, file.tell()) as response:
                    _append(response, file, bar)
                return
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException):
                if attempt == ATTEMPTS:
                    raise
            response = None
            time.sleep(0.5 * attempt)


def _open_first(checkpoint: Checkpoint) -> http.client.HTTPResponse:
    """Opens the address within seconds; only this one failure means "there is no network"."""
    refuse_if_offline(checkpoint)
    try:
        return _within(answer_seconds(), lambda: _open(checkpoint.url, 0))
    except (OSError, http.client.HTTPException) as error:
        raise_no_answer(error, checkpoint.url, checkpoint)


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "keras_coatnet", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(request, timeout=READ_SECONDS)


def _append(response: http.client.HTTPResponse, file: Any, bar: Any) -> None:
    if response.status != 206:  # the whole file, whatever was asked for
        file.seek(0)
        file.truncate()
    start = file.tell()
    length = response.headers["Content-Length"]
    total = start + int(length) if length else None
    bar.reset(total)
    bar.update(start)
    while chunk := response.read(CHUNK):
        file.write(chunk)
        bar.update(len(chunk))
    if total is not None and file.tell() != total:  # which http.client takes for the end
        raise ConnectionError(f"the connection was cut after {file.tell()} of {total} bytes")


# --- Both ------------------------------------------------------------------------------------


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
