"""A stand-in for the dashboard of a Ray cluster: an HTTP server with the documented behaviours of its Jobs API, and faults on request."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "canary-token-51b7c0d9e2"


@dataclass
class RayHead:
    token: str | None = TOKEN
    """None: an unprotected cluster."""
    packages: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Authorization header) of each."""
    faults: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """(method, start of the path) -> (status, body) in place of the usual answer."""
    open_to: str = ""
    """Method that needs no token, as behind a half-configured proxy."""
    redirect_to: str = ""
    drip_s: float = 0.0
    """Send each byte of an answer after this long."""
    lose_answers_to: str = ""
    """Method whose requests are carried out, and whose connections are then cut."""
    max_body: int = 100 * 2**20
    url: str = ""

    def set_job(self, job_id: str, status: str, log: str = "", **more: Any) -> None:
        self.jobs[job_id] = {**self.jobs.get(job_id, {}), "status": status, **more}
        self.logs[job_id] = log


@contextlib.contextmanager
def ray_head(certificate: Path | None = None, **settings: Any) -> Iterator[RayHead]:
    head = RayHead(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self) -> None:
            _answer(head, self)

        do_GET = do_POST = do_PUT = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    head.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
    try:
        yield head
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(head: RayHead, request: BaseHTTPRequestHandler) -> None:
    sent = request.headers.get("Authorization", "")
    head.requests.append((request.command, request.path, sent))
    length = int(request.headers.get("Content-Length", 0))
    if length > head.max_body:
        request.close_connection = True  # as aiohttp does: the rest of the body is not read
        return _send(head, request, 413, "Maximum request body size exceeded")
    body = request.rfile.read(length)
    if head.redirect_to:
        return _send(head, request, 302, "", head.redirect_to)
    if head.token is not None and request.command != head.open_to and sent != f"Bearer {head.token}":
        return _send(head, request, 403 if sent else 401, "Unauthorized: authentication token")
    for (method, start), (status, text) in head.faults.items():
        if request.command == method and request.path.startswith(start):
            return _send(head, request, status, text)
    status, text = _carry_out(head, request.command, unquote(request.path), body)
    if request.command == head.lose_answers_to:
        request.close_connection = True
        return None
    return _send(head, request, status, text)


def _carry_out(head: RayHead, method: str, path: str, body: bytes) -> tuple[int, str]:
    _, _, kind, *rest = path.split("/")
    if kind == "version":
        return 200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})
    if kind == "packages":
        name = rest[1]
        if method == "PUT":
            head.packages[name] = body
            return 200, ""
        return (200, "") if name in head.packages else (404, f"Package {name} does not exist")
    if method == "POST" and rest == [""]:
        return _submit(head, json.loads(body))
    if rest == [""]:
        return 200, json.dumps([{**job, "submission_id": job_id} for job_id, job in head.jobs.items()])
    job_id = rest[0]
    if job_id not in head.jobs:
        return 404, f"Job {job_id} does not exist"
    if rest[1:] == ["logs"]:
        return 200, json.dumps({"logs": head.logs.get(job_id, "")})
    if rest[1:] == ["stop"]:
        head.jobs[job_id] |= {"status": "STOPPED", "end_time": int(time.time() * 1000)}
        return 200, json.dumps({"stopped": True})
    return 200, json.dumps({**head.jobs[job_id], "submission_id": job_id})


def _submit(head: RayHead, request: dict[str, Any]) -> tuple[int, str]:
    if "entrypoint" not in request:
        return 400, "Traceback\nTypeError: missing 1 required positional argument: 'entrypoint'"
    if request["submission_id"] in head.jobs:
        return 400, f"Traceback\nValueError: Job with submission_id {request['submission_id']} already exists."
    head.jobs[request["submission_id"]] = {**request, "status": "PENDING", "start_time": int(time.time() * 1000)}
    return 200, json.dumps({"job_id": request["submission_id"], "submission_id": request["submission_id"]})


def _send(head: RayHead, request: BaseHTTPRequestHandler, status: int, text: str, location: str = "") -> None:
    data = text.encode()
    with contextlib.suppress(OSError):
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        if location:
            request.send_header("Location", location)
        request.end_headers()
        if not head.drip_s:
            request.wfile.write(data)
            return
        for byte in data:
            time.sleep(head.drip_s)
            request.wfile.write(bytes([byte]))
            request.wfile.flush()
