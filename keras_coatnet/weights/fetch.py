"""Brings a published checkpoint's file onto this machine: whole and checked, or not at all.

timm's files come from the Hugging Face hub through its own client, into its own cache, so that
they are shared with timm and obey `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE`. keras_cv_attention_models' files come from a plain address into
`KERAS_HOME/models/keras_coatnet`.

What the hub's client and `keras.utils.get_file` leave to their caller is done here:

- the content is compared with its hash, once per file. The size and the time of change of a file
  that passed are noted under `KERAS_HOME/keras_coatnet/checked`, so that the next start reads a few
  hundred bytes instead of hashing 300 MB; a file that changed since is hashed again. The notes
  do not lie beside the files, because the hub's cache has a layout of its own and is often shared
  and read-only.
- a file that fails is removed, and the error says what was expected and what came;
- without a network the answer comes within five seconds and says what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.client
import json
import os
import pathlib
import queue
import re
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from keras_coatnet.weights.registry import Checkpoint

# Neither format can run code when it is read; torch's own, a pickle, can.
SAFE_SUFFIXES = (".safetensors", ".h5")

# Seconds until a server must have said what it holds. The hub's client alone takes 23 to give up;
# who really is that far away raises the limit through the variable that this client reads as well.
ANSWER_SECONDS = 3.5
ANSWER_VARIABLE = "HF_HUB_ETAG_TIMEOUT"

READ_SECONDS = 10.0  # longest silence in the middle of a download
ATTEMPTS = 4  # how often one download is taken up again where it broke off
CHUNK = 1 << 20  # bytes
STALE_SECONDS = 24 * 3600  # after which an unfinished file surely has no process behind it

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What a file must be. A field is `None` where nobody can say.

    Attributes:
        algorithm: Name of the hash, as `hashlib.new` takes it.
        digest: The hash in hexadecimal.
        size: Exact size in bytes.
    """

    algorithm: str | None = None
    digest: str | None = None
    size: int | None = None


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

    Example:
        >>> path = fetch(find("imagenet", "coatnet0"))
        >>> path.name
        'model.safetensors'
    """
    _refuse_unsafe(checkpoint.filename)
    if checkpoint.repo is not None:
        return _fetch_from_hub(checkpoint)
    return _fetch_from_address(checkpoint)


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
    _check_once(path, _expected_of_cached(checkpoint, path), checkpoint.url)
    return path


def _revisions(checkpoint: Checkpoint) -> list[str]:
    """The revisions to ask for, best first.

    For some checkpoints only the first seven digits of the commit are on record. The hub resolves
    those, mirrors of it may not: then its `main` will do, as the content is checked in any case.
    """
    revision = checkpoint.revision or "main"
    if revision == "main" or _FULL_COMMIT.fullmatch(revision):
        return [revision]
    return [revision, "main"]


def _find_in_hub_cache(checkpoint: Checkpoint) -> pathlib.Path | None:
    from huggingface_hub import try_to_load_from_cache

    for revision in _revisions(checkpoint):
        found = try_to_load_from_cache(checkpoint.repo, checkpoint.filename, revision=revision)
        if isinstance(found, str):  # else None, or the client's mark for "known not to exist"
            return pathlib.Path(found)
    return None


def _expected_of_cached(checkpoint: Checkpoint, path: pathlib.Path) -> _Expected:
    """What is known without a request: the record, or the name that the hub's client gave.

    The client stores a large file under its SHA-256 and links to that. One step of the link is
    what counts: the next may lead to a store of the client's where names are other hashes.
    """
    digest = checkpoint.sha256
    if digest is None and path.is_symlink():
        digest = _sha256_or_none(os.path.basename(os.readlink(path)))
    return _Expected("sha256", digest) if digest else _Expected()


def _download_from_hub(checkpoint: Checkpoint) -> pathlib.Path:
    from huggingface_hub import hf_hub_download, hf_hub_url

    revision, metadata = _ask_hub(checkpoint)
    url = hf_hub_url(checkpoint.repo, checkpoint.filename, revision=revision)  # HF_ENDPOINT's
    expected = _expected_of_answer(checkpoint, metadata, url)
    _announce(url, metadata.size)
    try:
        found = hf_hub_download(checkpoint.repo, checkpoint.filename, revision=revision)
    except Exception as error:  # each version of the client has another transport's errors
        _raise_failed_download(error, url, checkpoint, expected)
    path = pathlib.Path(found)
    _check_once(path, expected, url)
    return path


def _ask_hub(checkpoint: Checkpoint) -> tuple[str, Any]:
    """Asks the hub what it holds, and answers `(revision, metadata)` within seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    seconds = _answer_seconds()
    _refuse_if_offline(checkpoint)
    for revision in _revisions(checkpoint):
        url = hf_hub_url(checkpoint.repo, checkpoint.filename, revision=revision)
        ask = functools.partial(get_hf_file_metadata, url, timeout=seconds)
        try:
            return revision, _within(seconds, ask)
        except Exception as error:  # as above
            failure = error
        if _status(failure) != 404:
            break
    _raise_no_answer(failure, url, checkpoint)


def _expected_of_answer(checkpoint: Checkpoint, metadata: Any, url: str) -> _Expected:
    """Combines the registry's hash with the hub's. They must agree before anything is loaded."""
    promised = _sha256_or_none(metadata.etag)
    if checkpoint.sha256 and promised and checkpoint.sha256 != promised:
        raise ValueError(
            f"{url} is not the file that keras_coatnet knows as {checkpoint.name!r}: expected "
            f"sha256 {checkpoint.sha256}, the server announces {promised}. Nothing was downloaded. "
            + _by_path(checkpoint)
        )
    digest = checkpoint.sha256 or promised
    if digest is None:
        raise ValueError(
            f"The server announces no sha256 for {url} (its etag is {metadata.etag!r}), so a "
            f"download could not be checked. Is HF_ENDPOINT set? {_by_path(checkpoint)}"
        )
    return _Expected("sha256", digest, metadata.size)


def _sha256_or_none(text: str | None) -> str | None:
    return text if text and _SHA256.fullmatch(text) else None


# --- From a plain address --------------------------------------------------------------------


def _fetch_from_address(checkpoint: Checkpoint) -> pathlib.Path:
    target = _place_by_hand(checkpoint)
    expected = _recorded(checkpoint)
    if target.is_file():
        _check_once(target, expected, checkpoint.url)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        with _unfinished(target) as part:
            _receive(checkpoint, part)
            _compare(part, expected, checkpoint.url)
            os.replace(part, target)  # same folder: never a moment with half a file
    except (OSError, http.client.HTTPException) as error:
        _raise_failed_download(error, checkpoint.url, checkpoint, expected)
    _note(target, expected)
    return target


def _recorded(checkpoint: Checkpoint) -> _Expected:
    for algorithm, digest in (("sha256", checkpoint.sha256), ("md5", checkpoint.md5)):
        if digest:
            return _Expected(algorithm, digest)
    raise ValueError(
        f"No hash is on record for {checkpoint.url}, so a download could not be checked. "
        + _by_path(checkpoint)
    )


@contextlib.contextmanager
def _unfinished(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name that no other process uses, gone afterwards whatever happens."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


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
    _announce(checkpoint.url, int(response.headers["Content-Length"] or 0))
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
    _refuse_if_offline(checkpoint)
    try:
        return _within(_answer_seconds(), lambda: _open(checkpoint.url, 0))
    except (OSError, http.client.HTTPException) as error:
        _raise_no_answer(error, checkpoint.url, checkpoint)


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


# --- Checking --------------------------------------------------------------------------------


def _check_once(path: pathlib.Path, expected: _Expected, url: str) -> None:
    """Checks a file unless it passed before and is unchanged; removes it if it fails."""
    if _is_noted(path, expected):
        return
    try:
        _compare(path, expected, url)
    except ValueError:
        _remove_with_links(path)
        raise
    _note(path, expected)


def _compare(path: pathlib.Path, expected: _Expected, url: str) -> None:
    """Raises `ValueError` unless size and content are as expected."""
    size = path.stat().st_size
    if expected.size not in (None, size):
        _raise_wrong(path, f"{expected.size} bytes", f"{size} bytes", url)
    if expected.algorithm is None:
        _check_layout(path, url)
        return
    digest = _hash(path, expected.algorithm)
    if digest != expected.digest:
        came = f"{expected.algorithm} {digest} ({size} bytes)"
        _raise_wrong(path, f"{expected.algorithm} {expected.digest}", came, url)


def _hash(path: pathlib.Path, algorithm: str) -> str:
    # MD5 is no defence against forgery, and none is claimed: it is all that was published.
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _check_layout(path: pathlib.Path, url: str) -> None:
    """Checks the one thing that a file of unknown hash tells of itself: how long it should be.

    Only a `.safetensors` that somebody put into the hub's cache by hand comes here. It begins with
    the length of its header as eight bytes; the header gives the offset at which each tensor ends.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        _raise_wrong(path, "a .safetensors header", "something else", url)
    if whole != size:
        _raise_wrong(path, f"{whole} bytes, by its own header", f"{size} bytes", url)


def _raise_wrong(path: pathlib.Path, expected: str, came: str, url: str) -> NoReturn:
    raise ValueError(
        f"{path} is not what {url} should be: expected {expected}, got {came}. The file was "
        "removed; call again to download it anew."
    )


def _remove_with_links(path: pathlib.Path) -> None:
    """Removes a file and each link on the way to it.

    In the hub's cache that is the snapshot's link and the blob: with the blob alone left, the
    client would link to the bad content again instead of downloading it.
    """
    while True:
        target = path.parent / os.readlink(path) if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target


def _note_path(path: pathlib.Path) -> pathlib.Path:
    # One note for each file: two processes never write into each other's.
    key = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
    return _keras_home() / "keras_coatnet" / "checked" / f"{key}.json"


def _state(path: pathlib.Path, expected: _Expected) -> dict[str, Any]:
    stat = path.stat()
    return {
        "file": os.path.realpath(path),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "hash": f"{expected.algorithm}:{expected.digest}",
    }


def _is_noted(path: pathlib.Path, expected: _Expected) -> bool:
    try:
        return json.loads(_note_path(path).read_text("utf-8")) == _state(path, expected)
    except (OSError, ValueError):  # no note, or one that is no JSON: check the file again
        return False


def _note(path: pathlib.Path, expected: _Expected) -> None:
    # Without the note the file is checked again next time: slower, not wrong.
    with contextlib.suppress(OSError):
        note = _note_path(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        with _unfinished(note) as part:
            part.write_text(json.dumps(_state(path, expected)), "utf-8")
            os.replace(part, note)


# --- Places, and time limits -----------------------------------------------------------------


def _keras_home() -> pathlib.Path:
    """Keras's own folder. Keras has no public function for it."""
    home = os.environ.get("KERAS_HOME") or os.path.join("~", ".keras")
    return pathlib.Path(home).expanduser()


def _place_by_hand(checkpoint: Checkpoint) -> pathlib.Path:
    """Where a file must lie to be found without a download."""
    if checkpoint.repo is None:
        return _keras_home() / "models" / "keras_coatnet" / checkpoint.filename
    from huggingface_hub import constants

    repo = "models--" + checkpoint.repo.replace("/", "--")
    snapshots = pathlib.Path(constants.HF_HUB_CACHE) / repo / "snapshots"
    return snapshots / (checkpoint.revision or "main") / checkpoint.filename


def _answer_seconds() -> float:
    return float(os.environ.get(ANSWER_VARIABLE) or ANSWER_SECONDS)


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


# --- What to tell the user -------------------------------------------------------------------


def _announce(url: str, size: int | None) -> None:
    """Says what is being downloaded: the bars that follow appear on terminals only."""
    from huggingface_hub.utils import are_progress_bars_disabled

    if not are_progress_bars_disabled():
        megabytes = f" ({size / 1e6:.1f} MB)" if size else ""
        print(f"Downloading {url}{megabytes}", file=sys.stderr)


def _refuse_if_offline(checkpoint: Checkpoint) -> None:
    """Obeys the hub's switch for other addresses too: it is set where no request may be made."""
    from huggingface_hub import constants, hf_hub_url

    if not constants.HF_HUB_OFFLINE:
        return
    url = checkpoint.url
    if checkpoint.repo is not None:
        revision = _revisions(checkpoint)[0]
        url = hf_hub_url(checkpoint.repo, checkpoint.filename, revision=revision)
    raise ValueError(
        f"{url} is not cached, and HF_HUB_OFFLINE forbids to download it. Unset it where "
        f"there is a network. {_by_hand(checkpoint)}"
    )


def _raise_no_answer(error: Exception, url: str, checkpoint: Checkpoint) -> NoReturn:
    """For a request that got no useful answer: an HTTP status, or none at all."""
    status = _status(error)
    if status is not None:
        raise ValueError(_explain_status(status, url, checkpoint)) from error
    _raise_if_not_stored(error, url, checkpoint)  # the client looks for a token on the disk first
    raise ValueError(
        f"Could not reach {url} ({_one_line(error)}), and the file is not cached. Check the "
        f"network ({ANSWER_VARIABLE} sets the seconds to wait for an answer, now "
        f"{_answer_seconds():g}). {_by_hand(checkpoint)}"
    ) from error


def _raise_failed_download(
    error: Exception, url: str, checkpoint: Checkpoint, expected: _Expected
) -> NoReturn:
    """For a download that began and did not end well."""
    status = _status(error)
    if status is not None:
        raise ValueError(_explain_status(status, url, checkpoint)) from error
    _raise_if_not_stored(error, url, checkpoint)
    size = f"{expected.size} bytes with " if expected.size is not None else ""
    raise ValueError(
        f"The download of {url} failed: {_one_line(error)}. Expected {size}{expected.algorithm} "
        f"{expected.digest}. Nothing was kept: call again to retry. {_by_path(checkpoint)}"
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
    return f"{url} answered with HTTP status {status}: {advice} {_by_path(checkpoint)}"


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
        f"{_place_by_hand(checkpoint)}. Or leave it where you like. {_by_path(checkpoint)}"
    )


def _by_path(checkpoint: Checkpoint) -> str:
    return f'A file is loaded by its path with weights="/path/{checkpoint.filename}".'


def _status(error: BaseException | None) -> int | None:
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
