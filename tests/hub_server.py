"""A small server on this machine that speaks the Hugging Face hub's protocol, faults included.

It answers what `huggingface_hub` asks in order to download one file, and plain requests for release
assets as GitHub answers them. Both redirect to a second port, which to a client is another host, as
the real ones redirect to a content delivery network.

    with HubServer() as server:
        server.add_model("timm/some_model", "model.safetensors", content)
        server.faults.cut_after = 1000
        subprocess.run([...], env=server.environment(tmp_path))
        assert server.requests[0].method == "HEAD"
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import socket
import threading
import time
import urllib.parse

COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee01"  # what every branch and tag points at


@dataclasses.dataclass
class Faults:
    """What goes wrong. All can be changed while the server runs.

    Attributes:
        status: HTTP status of every answer, with nothing but an error's text.
        missing_revisions: Revisions that get a 404, as the hub gives one.
        token: Token without which the hub's port answers 401.
        cut_after: Offset in the file at which the connection is cut.
        cut_times: How many answers are cut; `None` for all.
        hang: `"answer"`: accept, and never say a word. `"body"`: send `hang_after` bytes, then wait
            for `release()`.
        hang_after: Bytes to send before hanging.
        wrong_bytes: Announce the right hash and send other content of the same length.
        extra_length: Bytes to send more (or fewer, if negative) than announced by the head.
        no_hash: Announce an etag that is no hash.
        redirect: Whether files come from the second port.
        ranges: Whether requests for a part of the file are understood.
    """

    status: int | None = None
    missing_revisions: tuple[str, ...] = ()
    token: str | None = None
    cut_after: int | None = None
    cut_times: int | None = None
    hang: str | None = None
    hang_after: int = 0
    wrong_bytes: bool = False
    extra_length: int = 0
    no_hash: bool = False
    redirect: bool = True
    ranges: bool = True


@dataclasses.dataclass(frozen=True)
class Request:
    """One request that arrived. `host` is `"hub"` or `"cdn"`."""

    host: str
    method: str
    path: str
    headers: dict[str, str]


class HubServer:
    """The server, as a context manager.

    Attributes:
        url: The hub's address, for `HF_ENDPOINT`, and for release assets below `/releases/`.
        cdn_url: Address of the second port.
        faults: What goes wrong.
        requests: What was asked, in order.
        sending: Set once a `"body"` hang has begun.
    """

    def __init__(self) -> None:
        """Prepares a server without files; it listens inside a `with` block."""
        self.faults = Faults()
        self.requests: list[Request] = []
        self.sending = threading.Event()
        self._files: dict[str, bytes] = {}
        self._released = threading.Event()
        self._servers: list[http.server.ThreadingHTTPServer] = []
        self.url = self.cdn_url = ""

    def __enter__(self) -> HubServer:
        """Starts both ports."""
        self.url, self.cdn_url = self._listen("hub"), self._listen("cdn")
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends all answers that hang, and both ports."""
        self.release()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _listen(self, host: str) -> str:
        handler = type("Handler", (_Handler,), {"hub": self, "host": host})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    def add_model(self, repo: str, filename: str, content: bytes) -> None:
        """Adds a file of a repository, the same at every revision."""
        self._files[f"{repo}/{filename}"] = content

    def add_asset(self, filename: str, content: bytes) -> str:
        """Adds a release's asset and returns its address."""
        self._files[f"releases/{filename}"] = content
        return f"{self.url}/releases/{filename}"

    def release(self) -> None:
        """Lets every answer that hangs go on, and later ones not hang."""
        self.faults.hang = None
        self._released.set()

    def asked(self, method: str) -> list[Request]:
        """Returns the requests of one method."""
        return [request for request in self.requests if request.method == method]

    def environment(self, home: pathlib.Path, **changes: str) -> dict[str, str]:
        """Environment for a process that shall see this hub, and caches below `home` only."""
        ours = ("HF_", "HUGGINGFACE_", "KERAS_HOME", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        return {
            **kept,
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "KERAS_HOME": str(home / "keras"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **changes,
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    host: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Keeps quiet: `HubServer.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        faults = self.hub.faults
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        self.hub.requests.append(
            Request(self.host, self.command, path, {k.lower(): v for k, v in self.headers.items()})
        )
        if faults.hang == "answer":
            self.hub._released.wait(60)
            self.close_connection = True
        elif faults.status is not None:
            self._send_error(faults.status)
        elif faults.token and self.host == "hub" and not self._is_authorized(faults.token):
            self._send_error(401, "GatedRepo")
        elif path.startswith("api/models/"):
            self._send(200, {}, json.dumps({"sha": COMMIT}).encode())
        else:
            self._answer_file(path)

    def _is_authorized(self, token: str) -> bool:
        return self.headers.get("Authorization") == f"Bearer {token}"

    def _answer_file(self, path: str) -> None:
        repo, _, rest = path.partition("/resolve/")
        revision, _, filename = rest.partition("/")
        key = f"{repo}/{filename}" if filename else path
        content = self.hub._files.get(key)
        if revision in self.hub.faults.missing_revisions:
            self._send_error(404, "RevisionNotFound")
        elif content is None:
            self._send_error(404, "EntryNotFound")
        elif self.host == "hub" and self.hub.faults.redirect:
            self._send(302, {"Location": f"{self.hub.cdn_url}/{key}"} | self._facts(content, rest))
        else:
            self._send_file(content, self._facts(content, rest))

    def _facts(self, content: bytes, rest: str) -> dict[str, str]:
        """What the hub says of a large file, whether it redirects or not."""
        sha256 = hashlib.sha256(content).hexdigest()
        etag = "some-text" if self.hub.faults.no_hash else sha256
        revision = rest.partition("/")[0]
        return {
            "ETag": f'"{etag}"',
            "X-Linked-ETag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": revision if len(revision) == 40 else COMMIT,
            "Accept-Ranges": "bytes",
        }

    def _send_file(self, content: bytes, facts: dict[str, str]) -> None:
        faults = self.hub.faults
        if faults.wrong_bytes:
            content = bytes(255 - byte for byte in content)
        if faults.extra_length and self.command == "GET":
            content = (content + bytes(max(faults.extra_length, 0)))[
                : len(content) + faults.extra_length
            ]
        start = self._range_start()
        if start:
            facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, facts, content[start:], start)

    def _range_start(self) -> int:
        asked = self.headers.get("Range", "")
        if not self.hub.faults.ranges or not asked.startswith("bytes="):
            return 0
        return int(asked.removeprefix("bytes=").split("-")[0])

    def _send(
        self, status: int, headers: dict[str, str], body: bytes = b"", start: int = 0
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET" and body:
            self._send_body(body, start)

    def _send_body(self, body: bytes, start: int) -> None:
        faults = self.hub.faults
        try:
            if faults.hang == "body":
                self.wfile.write(body[: faults.hang_after])
                self.wfile.flush()
                self.hub.sending.set()
                self.hub._released.wait(60)
                body = body[faults.hang_after :]
            if faults.cut_after is not None and faults.cut_times != 0:
                if faults.cut_times is not None:
                    faults.cut_times -= 1
                self._cut(body[: max(faults.cut_after - start, 0)])
            else:
                self.wfile.write(body)
        except OSError:  # the client is gone: it was killed, or gave up
            self.close_connection = True

    def _cut(self, body: bytes) -> None:
        self.wfile.write(body)
        self.wfile.flush()
        time.sleep(0.05)  # what was sent should arrive before the end does
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _send_error(self, status: int, code: str = "") -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"an error\n")
