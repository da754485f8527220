"""Fetching, driven for real: a server on this machine, and a process of its own for each fetch.

A process of its own because the hub's client reads its environment variables once, at import, and
because being killed is one of the things to be tested. Most tests run for both kinds of source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import pty
import random
import signal
import subprocess
import sys
import termios
import time
import urllib.parse

import pytest

import keras_coatnet
from keras_coatnet.weights.fetch import fetch
from keras_coatnet.weights.registry import CHECKPOINTS
from tests.hub_server import COMMIT, HubServer

HUB_NAME = "coatnet_rmlp_2_rw_224.sw_in12k_ft_in1k"  # pinned to a full commit, no sha256 on record
ABBREVIATED_NAME = "coatnet_0_rw_224.sw_in1k"  # pinned to seven digits of one
ADDRESS_NAME = "kecam_coatnet0_224"
PINNED = CHECKPOINTS[HUB_NAME].revision

# Without the package's __init__, which imports Keras: five seconds for each process.
WORKER = """
import dataclasses, json, sys, time, types
package = types.ModuleType("keras_coatnet")
package.__path__ = json.loads(sys.argv[1])
sys.modules["keras_coatnet"] = package
from keras_coatnet.weights import checking, fetch, registry
job = json.loads(sys.argv[2])
checkpoint = dataclasses.replace(registry.CHECKPOINTS[job["name"]], **job["changes"])
exec(job["before"])
start = time.monotonic()
try:
    outcome = {"path": str(fetch.fetch(checkpoint))}
except ValueError as error:
    outcome = {"error": str(error)}
print(json.dumps(outcome | {"seconds": time.monotonic() - start}))
"""
NO_HASHING = "checking._hash = None"  # whoever calls it, fails
NO_PAUSES = "time.sleep = lambda seconds: None"  # between one attempt and the next


def safetensors(size: int, seed: int = 0) -> bytes:
    """A `.safetensors` file with one tensor of `size` random bytes."""
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "tensor": entry}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(size)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one process reported: a path or an error, the seconds in `fetch`, and its stderr."""

    path: pathlib.Path | None
    error: str
    seconds: float
    log: str


class Job:
    """One checkpoint, the server that has it, and the caches it goes to."""

    def __init__(self, server: HubServer, home: pathlib.Path, name: str, content: bytes) -> None:
        self.server, self.home, self.name = server, home, name
        self.on_hub = name != ADDRESS_NAME
        self.changes: dict[str, object] = {}
        self.put(content)

    def put(self, content: bytes) -> None:
        """Lets the server have `content`, and nobody know its hash but who asks the server."""
        self.content = content
        checkpoint = CHECKPOINTS[self.name]
        if self.on_hub:
            self.server.add_model(checkpoint.repo, checkpoint.filename, content)
        else:
            self.changes["url"] = self.server.add_asset(checkpoint.filename, content)
            self.changes["md5"] = hashlib.md5(content).hexdigest()

    def start(
        self, before: str = "", stderr: int = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen[str]:
        """Starts one process that fetches."""
        job = {"name": self.name, "changes": self.changes, "before": before}
        package = json.dumps(list(keras_coatnet.__path__))
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, package, json.dumps(job)],
            env=self.server.environment(self.home, **environment),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def fetch(self, before: str = "", **environment: str) -> Outcome:
        """Fetches in one process and waits for it."""
        return finish(self.start(before, subprocess.PIPE, **environment))

    @property
    def digest(self) -> str:
        """The hash that the content is checked against."""
        return (hashlib.sha256 if self.on_hub else hashlib.md5)(self.content).hexdigest()

    @property
    def address(self) -> str:
        """The address that is asked."""
        if not self.on_hub:
            return str(self.changes["url"])
        checkpoint = CHECKPOINTS[self.name]
        return (
            f"{self.server.url}/{checkpoint.repo}/resolve/{checkpoint.revision}/model.safetensors"
        )

    @property
    def place(self) -> pathlib.Path:
        """Where the file lies once fetched."""
        if not self.on_hub:
            return self.home / "keras/models/keras_coatnet" / CHECKPOINTS[self.name].filename
        repo = self.home / "hf/hub" / f"models--timm--{self.name}"
        return repo / "snapshots" / str(CHECKPOINTS[self.name].revision) / "model.safetensors"

    def large_files(self) -> list[pathlib.Path]:
        """All files, links and remains in the caches that could be taken for weights."""
        return [
            path
            for path in self.home.rglob("*")
            if path.is_symlink() or (path.is_file() and path.stat().st_size > 500)
        ]


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Waits for a process; anything but a path or a ValueError fails the test here."""
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    result = json.loads(stdout)
    path = pathlib.Path(result["path"]) if "path" in result else None
    return Outcome(path, result.get("error", ""), result["seconds"], stderr)


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_job(server, tmp_path):
    return Job(server, tmp_path, HUB_NAME, safetensors(8_000))


@pytest.fixture
def address_job(server, tmp_path):
    return Job(server, tmp_path, ADDRESS_NAME, random.Random(0).randbytes(8_000))


@pytest.fixture(params=["hub", "address"])
def job(request):
    return request.getfixturevalue(f"{request.param}_job")


def assert_fetches(job: Job, before: str = "", **environment: str) -> Outcome:
    """The next fetch gives the right content."""
    outcome = job.fetch(before, **environment)
    assert outcome.error == ""
    assert outcome.path.read_bytes() == job.content
    return outcome


# --- When all is well ------------------------------------------------------------------------


def test_downloads_across_a_redirect(job):
    outcome = assert_fetches(job)
    assert outcome.path == job.place
    assert [request.host for request in job.server.asked("GET")][-1] == "cdn"
    assert outcome.log == f"Downloading {job.address} (0.0 MB)\n"


def test_a_terminal_shows_a_progress_bar(job):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))  # a new one has no columns, and a bar fills what there is
    outcome = finish(job.start(stderr=theirs))
    assert outcome.error == ""
    assert "100%" in os.read(ours, 100_000).decode()
    os.close(ours), os.close(theirs)


def test_progress_can_be_switched_off(job):
    assert assert_fetches(job, HF_HUB_DISABLE_PROGRESS_BARS="1").log == ""


def test_a_warm_load_asks_nobody_and_hashes_nothing(job):
    assert_fetches(job)
    job.server.requests.clear()
    job.server.faults.hang = "answer"  # as without a network
    outcome = job.fetch(before=NO_HASHING)
    assert outcome.path == job.place
    assert outcome.seconds < 3 and job.server.requests == []


def test_works_without_redirect(hub_job):
    hub_job.server.faults.redirect = False
    assert_fetches(hub_job)
    assert {request.host for request in hub_job.server.requests} == {"hub"}


@pytest.mark.slow
def test_two_processes_at_once_both_end_well(job):
    job.put(safetensors(3_000_000))
    job.server.faults.hang, job.server.faults.hang_after = "body", 1_000_000
    processes = [job.start(), job.start()]
    assert job.server.sending.wait(20)
    time.sleep(0.5)  # both are under way: one waits for the other, or both download
    job.server.release()
    outcomes = [finish(process) for process in processes]
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert all(outcome.path.read_bytes() == job.content for outcome in outcomes)
    assert not list(job.home.rglob("*.incomplete"))


# --- Cut, killed, resumed --------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_download_leaves_nothing_that_loads(job):
    job.put(safetensors(3_000_000))
    job.server.faults.hang, job.server.faults.hang_after = "body", 2_000_000
    process = job.start()
    assert job.server.sending.wait(20)
    time.sleep(0.3)  # so that the bytes have reached its disk
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert all(path.suffix == ".incomplete" for path in job.large_files())
    assert "is not cached" in job.fetch(HF_HUB_OFFLINE="1").error
    job.server.release()
    assert_fetches(job)


@pytest.mark.slow
def test_a_cut_connection_is_an_error_and_the_next_call_succeeds(job):
    job.server.faults.cut_after = 3_000
    outcome = job.fetch(NO_PAUSES)
    assert job.address in outcome.error and job.digest in outcome.error
    assert "failed" in outcome.error and "call again" in outcome.error
    assert job.large_files() == []
    job.server.faults.cut_after = None
    assert_fetches(job)


def test_a_download_resumes_where_it_was_cut(job):
    # The hub's client writes 10 MiB at a time, and resumes behind what it wrote.
    job.put(safetensors(12 << 20))
    job.server.faults.cut_after, job.server.faults.cut_times = 11 << 20, 1
    assert_fetches(job, NO_PAUSES)
    ranges = [request.headers.get("range") for request in job.server.asked("GET")]
    assert ranges[0] is None
    assert f"bytes={10 << 20}-" in ranges


def test_resuming_starts_anew_where_the_server_knows_no_ranges(job):
    job.server.faults.cut_after, job.server.faults.cut_times = 3_000, 1
    job.server.faults.ranges = False
    assert_fetches(job, NO_PAUSES)


def test_remains_of_killed_downloads_go_after_a_day(address_job):
    folder = address_job.place.parent
    folder.mkdir(parents=True)
    old, young = (folder / f"{address_job.place.name}.{key}.incomplete" for key in ("a", "b"))
    for path in (old, young):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    assert_fetches(address_job)
    assert young.exists() and not old.exists()


# --- Wrong content ---------------------------------------------------------------------------


@pytest.mark.slow
def test_wrong_bytes_are_removed_and_named(job):
    job.server.faults.wrong_bytes = True
    outcome = job.fetch()
    came = bytes(255 - byte for byte in job.content)
    algorithm = hashlib.sha256 if job.on_hub else hashlib.md5
    assert job.digest in outcome.error and algorithm(came).hexdigest() in outcome.error
    assert job.address in outcome.error and job.place.name in outcome.error
    assert job.large_files() == []
    job.server.faults.wrong_bytes = False
    assert_fetches(job)


@pytest.mark.parametrize("extra", [-100, 100])
def test_a_wrong_length_is_refused(job, extra):
    job.server.faults.extra_length = extra
    outcome = job.fetch()
    assert job.address in outcome.error and job.digest in outcome.error
    assert str(len(job.content) + extra) in outcome.error
    assert job.large_files() == []


@pytest.mark.slow
def test_a_file_that_changed_in_the_cache_is_found_out(job):
    assert_fetches(job)
    target = job.place.resolve()
    target.write_bytes(bytes(len(job.content)))
    outcome = job.fetch(HF_HUB_OFFLINE="1")
    assert job.digest in outcome.error and str(job.place) in outcome.error
    assert not job.place.is_symlink() and not job.place.exists() and not target.exists()
    assert_fetches(job)


@pytest.mark.slow
def test_a_truncated_file_in_the_cache_is_found_out(job):
    assert_fetches(job)
    os.truncate(job.place, 5_000)
    assert "5000 bytes" in job.fetch(HF_HUB_OFFLINE="1").error
    assert not job.place.exists()


@pytest.mark.slow
def test_a_bad_file_goes_with_all_links_to_it(hub_job):
    # Newer clients keep a blob in a store shared by repositories, under a hash that is no SHA-256.
    store = hub_job.home / "hf/hub/blobs/ab" / ("ab" * 32)
    blob = hub_job.place.parents[2] / "blobs" / hub_job.digest
    for path in (store, blob, hub_job.place):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.symlink_to(store)
    hub_job.place.symlink_to(os.path.relpath(blob, hub_job.place.parent))
    store.write_bytes(hub_job.content)
    assert_fetches(hub_job, HF_HUB_OFFLINE="1")
    store.write_bytes(b"something else")
    assert hub_job.digest in hub_job.fetch(HF_HUB_OFFLINE="1").error
    assert hub_job.large_files() == [] and not store.exists()
    assert_fetches(hub_job)


@pytest.mark.slow
def test_the_recorded_hash_is_what_counts(hub_job):
    hub_job.changes["sha256"] = "0" * 64
    outcome = hub_job.fetch()
    assert "0" * 64 in outcome.error and hub_job.digest in outcome.error
    assert hub_job.server.asked("GET") == []  # found out before 300 MB were downloaded
    hub_job.changes["sha256"] = hub_job.digest
    assert_fetches(hub_job)


@pytest.mark.slow
def test_a_cached_file_must_have_the_recorded_hash(hub_job):
    assert_fetches(hub_job)
    hub_job.changes["sha256"] = "0" * 64
    assert "0" * 64 in hub_job.fetch(HF_HUB_OFFLINE="1").error


@pytest.mark.slow
def test_a_server_that_announces_no_hash_is_not_trusted(hub_job):
    hub_job.server.faults.no_hash = True
    outcome = hub_job.fetch()
    assert "no sha256" in outcome.error and hub_job.address in outcome.error
    assert hub_job.large_files() == []
    hub_job.changes["sha256"] = hub_job.digest  # then the registry's will do
    assert_fetches(hub_job)


def test_an_address_without_recorded_hash_is_not_fetched(address_job):
    address_job.changes["md5"] = None
    assert "No hash is on record" in address_job.fetch().error
    assert address_job.server.requests == []


@pytest.mark.parametrize("filename", ["pytorch_model.bin", "model.pth", "model.pkl", "../model.h5"])
@pytest.mark.parametrize("name", [HUB_NAME, ADDRESS_NAME])
def test_no_format_that_runs_code_is_fetched(name, filename):
    checkpoint = dataclasses.replace(CHECKPOINTS[name], filename=filename)
    with pytest.raises(ValueError, match="Refusing to fetch.*safetensors"):
        fetch(checkpoint)


# --- A cache that cannot be written ----------------------------------------------------------

# As the system refuses it for a file system that is mounted for reading only.
READ_ONLY = """
import errno, os, pathlib
def refuse(path, *rest, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
pathlib.Path.unlink = os.unlink = os.remove = refuse
"""


@pytest.mark.slow
def test_a_bad_file_that_cannot_be_removed_is_told_by_its_hash(job):
    assert_fetches(job)
    job.place.resolve().write_bytes(bytes(len(job.content)))
    outcome = job.fetch(READ_ONLY, HF_HUB_OFFLINE="1")
    assert job.digest in outcome.error and str(job.place) in outcome.error
    assert "could not be removed (Read-only file system)" in outcome.error
    assert "was removed" not in outcome.error and "\n" not in outcome.error
    assert job.place.exists()
    # The next call, where it may be removed, does so, and the one after it downloads.
    assert "was removed" in job.fetch(HF_HUB_OFFLINE="1").error
    assert_fetches(job)


@pytest.mark.slow
def test_a_link_whose_target_cannot_be_removed_is_kept(hub_job):
    """Without the link, the hub's client would make it again, to the same bad content."""
    assert_fetches(hub_job)
    blob = hub_job.place.resolve()
    blob.write_bytes(b"something else")
    only_blobs = READ_ONLY.replace("pathlib.Path.unlink = os.unlink = os.remove = refuse", "") + (
        "unlink = pathlib.Path.unlink\n"
        "pathlib.Path.unlink = lambda path, **o: "
        "(refuse if 'blobs' in str(path) else unlink)(path, **o)\n"
    )
    outcome = hub_job.fetch(only_blobs, HF_HUB_OFFLINE="1")
    assert hub_job.digest in outcome.error and f"remove {blob} " in outcome.error
    assert hub_job.place.is_symlink()


@pytest.mark.slow
def test_a_cached_file_that_cannot_be_read_is_named(job):
    assert_fetches(job)
    before = """
import errno
def refuse(path, algorithm):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))
checking._hash = refuse
"""
    for note in (job.home / "keras").rglob("*.json"):
        note.unlink()
    error = job.fetch(before, HF_HUB_OFFLINE="1").error
    assert str(job.place) in error and "Permission denied" in error


# --- Passwords -------------------------------------------------------------------------------

# All that a program may show or keep: the error with all behind it, and each line of every log.
SHOW_ALL = """
import logging, traceback
logging.basicConfig(level=logging.DEBUG)
def fetch_and_show(checkpoint, fetch_it=fetch.fetch):
    try:
        return fetch_it(checkpoint)
    except ValueError as error:
        behind = error
        while behind is not None:
            print(repr(behind), str(behind), file=sys.stderr)
            behind = behind.__cause__ or behind.__context__
        traceback.print_exc()
        raise
fetch.fetch = fetch_and_show
"""
FAULTS = {
    "none": {},
    "gone": {"status": 404},
    "denied": {"status": 401},
    "busy": {"status": 503},
    "no hash": {"no_hash": True},
    "another": {"wrong_bytes": True},
    "cut": {"cut_after": 3_000},
    "silent": {"hang": "answer"},
    "nobody": None,
    "offline": {},
}


@pytest.mark.parametrize(
    ("fault", "password"),
    [
        *((fault, "p%40ss%2Fw%C3%B6rd") for fault in FAULTS),
        ("gone", "half@way"),
        ("busy", "s3cret"),
    ],
)
def test_a_password_of_the_endpoint_is_never_shown(hub_job, fault, password):
    for key, value in (FAULTS[fault] or {}).items():
        setattr(hub_job.server.faults, key, value)
    if FAULTS[fault] is None:
        hub_job.server.__exit__()
    options = {"offline": {"HF_HUB_OFFLINE": "1"}, "silent": {"HF_HUB_ETAG_TIMEOUT": "1"}}
    endpoint = hub_job.server.url.replace("://", f"://somebody:{password}@")
    outcome = hub_job.fetch(NO_PAUSES + SHOW_ALL, HF_ENDPOINT=endpoint, **options.get(fault, {}))
    for text in (outcome.error, outcome.log):
        assert password not in text and urllib.parse.unquote(password) not in text, text
    if fault == "none":
        assert outcome.error == "" and "Downloading http://***@" in outcome.log
    else:
        assert "://***@" in outcome.error and "\n" not in outcome.error


# --- No network ------------------------------------------------------------------------------


def assert_says_what_to_do(outcome: Outcome, job: Job, place: pathlib.Path) -> None:
    assert outcome.path is None and outcome.seconds < 5
    assert job.address in outcome.error
    assert str(place) in outcome.error
    assert f'weights="/path/{place.name}"' in outcome.error
    assert "\n" not in outcome.error and "Traceback" not in outcome.log


def test_offline_by_choice(job):
    outcome = job.fetch(HF_HUB_OFFLINE="1")
    assert_says_what_to_do(outcome, job, job.place)
    assert "HF_HUB_OFFLINE" in outcome.error and job.server.requests == []


@pytest.mark.slow
def test_a_server_that_never_answers(hub_job, address_job):
    hub_job.server.faults.hang = "answer"
    jobs = [hub_job, address_job]
    for job, process in zip(jobs, [job.start() for job in jobs], strict=True):
        outcome = finish(process)
        assert_says_what_to_do(outcome, job, job.place)
        assert "HF_HUB_ETAG_TIMEOUT" in outcome.error


def test_no_server_at_all(job):
    job.server.__exit__()
    outcome = job.fetch()
    assert_says_what_to_do(outcome, job, job.place)
    assert outcome.seconds < 10


@pytest.mark.slow
def test_a_look_up_of_the_name_that_hangs(job):
    # As where packets to the name server are dropped: no socket's timeout covers this.
    before = "import socket; socket.getaddrinfo = lambda *a, **k: time.sleep(20)"
    outcome = job.fetch(before, HF_HUB_ETAG_TIMEOUT="1")
    assert_says_what_to_do(outcome, job, job.place)
    assert outcome.seconds < 10


@pytest.mark.parametrize("name", [HUB_NAME, ADDRESS_NAME, ABBREVIATED_NAME])
def test_a_file_put_where_the_error_says_is_found(server, tmp_path, name):
    job = Job(server, tmp_path, name, safetensors(8_000))
    assert str(job.place) in job.fetch(HF_HUB_OFFLINE="1").error
    job.place.parent.mkdir(parents=True, exist_ok=True)
    job.place.write_bytes(job.content)
    assert assert_fetches(job, HF_HUB_OFFLINE="1").path == job.place
    assert server.requests == []


@pytest.mark.parametrize("content", [safetensors(8_000)[:-1], b"", b"<html>not found</html>"])
def test_a_file_put_there_by_hand_must_be_whole(job, content):
    job.place.parent.mkdir(parents=True, exist_ok=True)
    job.place.write_bytes(content)
    outcome = job.fetch(HF_HUB_OFFLINE="1")
    assert str(job.place) in outcome.error and "expected" in outcome.error
    assert not job.place.exists()


# --- The server says no ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, advice",
    [(401, "denied"), (403, "denied"), (404, "no such file"), (500, "later")],
)
def test_a_refusal_gives_one_error_with_address_and_status(job, status, advice):
    job.server.faults.status = status
    outcome = job.fetch()
    assert outcome.path is None and outcome.seconds < 5 and "\n" not in outcome.error
    assert job.address in outcome.error and f"status {status}" in outcome.error
    assert advice in outcome.error and "weights=" in outcome.error
    if job.on_hub and status in (401, 403):
        assert "HF_TOKEN" in outcome.error
    assert job.large_files() == []


def test_a_missing_revision_is_an_error_of_one_line(hub_job):
    hub_job.server.faults.missing_revisions = (PINNED,)
    assert "status 404" in hub_job.fetch().error


# --- The hub's own settings ------------------------------------------------------------------


def test_the_pinned_revision_is_asked(hub_job):
    assert_fetches(hub_job)
    path = f"timm/{HUB_NAME}/resolve/{PINNED}/model.safetensors"
    assert {request.path for request in hub_job.server.requests if request.host == "hub"} == {path}


@pytest.mark.slow
def test_main_is_asked_where_no_revision_is_on_record(hub_job):
    hub_job.changes["revision"] = None
    outcome = assert_fetches(hub_job)
    assert "/resolve/main/" in hub_job.server.requests[0].path and COMMIT in str(outcome.path)
    hub_job.server.requests.clear()
    assert hub_job.fetch(NO_HASHING).path == outcome.path and hub_job.server.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), (CHECKPOINTS[ABBREVIATED_NAME].revision,)])
def test_an_abbreviated_revision_falls_back_to_main(server, tmp_path, missing):
    server.faults.missing_revisions = missing
    job = Job(server, tmp_path, ABBREVIATED_NAME, safetensors(8_000))
    outcome = assert_fetches(job)
    server.requests.clear()
    assert job.fetch(NO_HASHING).path == outcome.path and server.requests == []


@pytest.mark.slow
def test_the_token_goes_to_the_hub_and_nowhere_else(hub_job):
    hub_job.server.faults.token = "hf_secret"
    assert "HF_TOKEN" in hub_job.fetch().error
    hub_job.server.requests.clear()
    assert_fetches(hub_job, HF_TOKEN="hf_secret")
    sent = {
        request.host for request in hub_job.server.requests if "authorization" in request.headers
    }
    assert sent == {"hub"} and hub_job.server.requests[-1].host == "cdn"


def test_a_token_does_not_go_to_other_addresses(address_job):
    assert_fetches(address_job, HF_TOKEN="hf_secret")
    assert not any("authorization" in request.headers for request in address_job.server.requests)


@pytest.mark.parametrize("variable, below", [("HF_HOME", "hub"), ("HF_HUB_CACHE", "")])
def test_the_hubs_folders_are_honored(hub_job, variable, below):
    folder = hub_job.home / "elsewhere"
    outcome = assert_fetches(hub_job, **{variable: str(folder)})
    assert outcome.path.is_relative_to(folder / below / f"models--timm--{HUB_NAME}")


def test_keras_home_is_honored(address_job):
    folder = address_job.home / "elsewhere"
    outcome = assert_fetches(address_job, KERAS_HOME=str(folder))
    assert outcome.path.is_relative_to(folder)
    assert not (address_job.home / "keras").exists()


def test_a_folder_that_cannot_be_written_is_named(job):
    blocked = job.home / "a_file"
    blocked.write_text("where a folder should be")
    outcome = job.fetch(HF_HOME=str(blocked), KERAS_HOME=str(blocked))
    assert "Could not store" in outcome.error and str(blocked) in outcome.error


@pytest.mark.slow
def test_works_where_links_are_not_to_be_had(hub_job):
    outcome = assert_fetches(hub_job, HF_HUB_DISABLE_SYMLINKS="1")
    assert not outcome.path.is_symlink()
    hub_job.server.requests.clear()
    assert_fetches(hub_job, HF_HUB_DISABLE_SYMLINKS="1")
    assert hub_job.server.requests == []


@pytest.mark.slow
def test_files_of_other_programs_in_the_cache_are_checked_once(hub_job):
    # As timm leaves them: in the cache, and never compared with their hash.
    assert_fetches(hub_job)
    for note in (hub_job.home / "keras").rglob("*.json"):
        note.unlink()
    assert_fetches(hub_job, HF_HUB_OFFLINE="1")
    assert hub_job.fetch(NO_HASHING, HF_HUB_OFFLINE="1").path == hub_job.place


def test_importing_fetch_leaves_the_hubs_client_alone(hub_job):
    before = "assert 'huggingface_hub' not in sys.modules"
    assert hub_job.fetch(before).error == ""
