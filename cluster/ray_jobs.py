"""Ray's Jobs REST API (ray/dashboard/modules/job, Ray 2.60) over the standard library: 0.1 s to load, ray's own client 1.3 s.

No redirect is followed and no proxy variable is looked at: the token goes to the address that was given, or nowhere.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import re
import socket
import ssl
import time
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import quote, urlsplit

from .failure import EXIT_RETRY
from .job import ClusterError
from .ray_token import HOW_TO_GET_ONE, Token

DEFAULT_PORT = 8265
_BLOCK_BYTES = 2**20
_HOW_TO_PROTECT = (
    "Whoever reaches this port runs programs on the cluster (CVE-2023-48022). Start every Ray process of it with "
    "RAY_AUTH_MODE=token and one token (Ray 2.52 or newer), and let only trusted networks reach the port."
)
_HOW_TO_ENCRYPT = (
    "The token would travel in the clear, and Ray's dashboard itself offers no https. Use a tunnel: "
    "ssh -N -L {port}:localhost:{port} {host}, then --ray http://localhost:{port}; or put a reverse proxy with a "
    "certificate in front of it and give its https address. In a network that nobody else listens to: --insecure"
)


@dataclass(frozen=True)
class RayAddress:
    """Where a cluster's dashboard answers."""

    scheme: str
    host: str
    port: int
    path: str
    """"" or a prefix such as "/ray", as reverse proxies have it."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def is_private(self) -> bool:
        """Whether nobody on a network can read along: https, or this very machine."""
        if self.scheme == "https" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class RayJob:
    """What Ray knows of a submitted job."""

    state: str
    """pending | running | succeeded | failed | stopped."""
    message: str
    error_type: str
    """Ray's name for what failed; JOB_ENTRYPOINT_COMMAND_ERROR when it was the command itself."""
    started: float | None
    ended: float | None
    exit_code: int | None


def parse_address(text: str) -> RayAddress:
    """`http(s)://host[:port][/prefix]`. Raises ClusterError for anything else, without repeating what may be a password."""
    allowed = f"Allowed: http://HOST:{DEFAULT_PORT} or https://HOST, the address of the cluster's dashboard."
    named = "--ray" if "@" in text else f"--ray {text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
        parts.path.encode("ascii")
    except ValueError:  # UnicodeError too
        raise ClusterError("--ray: that is no address", allowed) from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ClusterError(
            "--ray: an address holds no user, password or query", f"They would be written down. {allowed}"
        )
    if parts.scheme == "ray":
        raise ClusterError(f"{named}: that is the address of Ray Client, which jobs do not use", allowed)
    if parts.scheme not in ("http", "https") or not host or " " in parts.path:
        raise ClusterError(f"{named}: is not the address of a Ray dashboard", allowed)
    default = 443 if parts.scheme == "https" else DEFAULT_PORT
    return RayAddress(parts.scheme, host, port or default, parts.path.rstrip("/"))


def require_private(address: RayAddress, insecure: bool) -> None:
    """Raises ClusterError where a token would cross a network unencrypted."""
    if address.is_private or insecure:
        return
    hint = _HOW_TO_ENCRYPT.format(port=address.port, host=address.host)
    raise ClusterError(f"{address} is plain http to another machine", hint)


class RayJobs:
    """A cluster's jobs. Every call raises ClusterError: 2 where something must be changed, 75 where it may work later."""

    def __init__(self, address: RayAddress, token: Token | None, ca: str | None = None, timeout_s: float = 60) -> None:
        """`ca`: a file of certificates to trust in place of the system's. `timeout_s`: limit of a whole request."""
        self.address, self._token, self.timeout_s = address, token, timeout_s
        self._context: ssl.SSLContext | None = None
        if address.scheme == "https":
            try:
                self._context = ssl.create_default_context(cafile=ca)
            except (OSError, ssl.SSLError):
                raise ClusterError(
                    f"--ca {ca}: no certificates can be read from it", "Give a file in PEM format."
                ) from None

    def require_protected(self) -> None:
        """Raises ClusterError unless requests without a token are refused, for reading jobs and for submitting them."""
        # The empty request names no command: a cluster that takes it without a token says what is missing, and runs nothing.
        for method, body in (("GET", None), ("POST", b"{}")):
            status, _ = self._request(method, "/api/jobs/", body, with_token=False)
            if status not in (401, 403):
                raise ClusterError(
                    f"{self.address} does not ask for a token (it answered {status} without one)",
                    f"{_HOW_TO_PROTECT} To submit all the same: --insecure",
                )

    def ray_version(self) -> str:
        """The cluster's Ray version; the first request with the token, so a wrong one is noticed here."""
        answer = self._json("GET", "/api/version")
        if not isinstance(answer, dict) or "ray_version" not in answer:
            raise ClusterError(f"{self.address} is not a Ray dashboard", f"Its port is usually {DEFAULT_PORT}.")
        return str(answer["ray_version"])

    def has_package(self, name: str) -> bool:
        """Whether `gcs://name` is there; if so, Ray keeps it for the next minutes."""
        status, body = self._request("GET", f"/api/packages/gcs/{quote(name)}")
        if status == 404:
            return False
        self._require_ok(status, body)
        return True

    def upload_package(self, name: str, file: IO[bytes], size: int) -> None:
        """Store `file` (`size` bytes, read from its beginning) as `gcs://name`."""
        file.seek(0)
        status, body = self._request("PUT", f"/api/packages/gcs/{quote(name)}", file, size=size)
        if status == 413:
            raise ClusterError(
                f"{self.address} takes no package of {size / 1e6:.1f} MB (413)",
                "Ray's own limit is 100 MiB, packed; a proxy in front of it may have a lower one. Put large files on a "
                "path that the cluster sees, and name that folder: --shared DIR",
            )
        self._require_ok(status, body)

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Start a job. When the answer is lost it may run: `job` tells."""
        request = {
            "entrypoint": entrypoint,
            "submission_id": job_id,
            "runtime_env": runtime_env,
            "metadata": metadata,
        }
        self._json("POST", "/api/jobs/", json.dumps(request).encode())

    def job(self, job_id: str) -> RayJob | None:
        """What the cluster knows of it; None when it knows nothing (another cluster, or it was restarted)."""
        status, body = self._request("GET", f"/api/jobs/{quote(job_id, safe='')}")
        if status == 404:
            return None
        self._require_ok(status, body)
        return _job(self._parsed(body))

    def jobs(self) -> dict[str, RayJob]:
        """Every submitted job by its id."""
        rows = self._json("GET", "/api/jobs/")
        return {row["submission_id"]: _job(row) for row in rows if row.get("submission_id")}

    def logs(self, job_id: str) -> str:
        """All that the job's command has printed; Ray has no cheaper question."""
        return str(self._json("GET", f"/api/jobs/{quote(job_id, safe='')}/logs")["logs"])

    def stop(self, job_id: str) -> None:
        """Ask Ray to end it: SIGTERM, and SIGKILL after the job's RAY_JOB_STOP_WAIT_TIME_S. Returns at once."""
        self._json("POST", f"/api/jobs/{quote(job_id, safe='')}/stop", b"")

    def _json(self, method: str, path: str, body: bytes | None = None) -> Any:
        status, answer = self._request(method, path, body)
        self._require_ok(status, answer)
        return self._parsed(answer)

    def _parsed(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError:
            raise ClusterError(
                f"{self.address} does not answer as a Ray dashboard does: {self._said(answer)}",
                "Does a proxy stand in between? Give the address of the dashboard itself.",
            ) from None

    def _require_ok(self, status: int, body: bytes) -> None:
        if status == 200:
            return
        if status == 401:
            sent = "although one was sent: a proxy may drop it" if self._token else "and none was found"
            raise ClusterError(f"{self.address} asks for a token (401), {sent}", HOW_TO_GET_ONE)
        if status == 403:
            source = f"from {self._token.source}" if self._token else "(none)"
            raise ClusterError(f"{self.address} refuses the token {source} (403)", HOW_TO_GET_ONE)
        if status >= 500 or status in (408, 429):
            raise ClusterError(
                f"{self.address} failed ({status}): {self._said(body)}", "Try again later.", exit_code=EXIT_RETRY
            )
        raise ClusterError(f"{self.address} answered {status}: {self._said(body)}")

    def _said(self, body: bytes) -> str:
        """The last line of an answer: of a traceback, the one that says what happened. Never the token."""
        lines = [line.strip() for line in body.decode("utf-8", errors="replace").splitlines() if line.strip()]
        text = re.sub(r"<[^>]*>", "", lines[-1]) if lines else "nothing"
        return (text.replace(self._token.value, "***") if self._token else text)[:300]

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        size: int | None = None,
        with_token: bool = True,
    ) -> tuple[int, bytes]:
        """(status, whole answer). A redirect is an error that names its target."""
        deadline = time.monotonic() + self.timeout_s
        connection = self._connection(min(self.timeout_s, 10.0))
        try:
            connection.connect()
            connection.putrequest(method, self.address.path + path)
            if with_token and self._token:
                connection.putheader("Authorization", f"Bearer {self._token.value}")
            if body is not None:
                connection.putheader("Content-Type", "application/json" if size is None else "application/zip")
                connection.putheader("Content-Length", str(len(body) if isinstance(body, bytes) else size))
            connection.endheaders()
            if body is not None:
                _send(connection, body, deadline)
            _limit(connection, deadline)
            response = connection.getresponse()
            answer = _read(response, connection, deadline)
        except (OSError, http.client.HTTPException) as e:
            # `from None`: nothing of a library's own error, which may show what was sent, is printed.
            raise self._unreachable(e) from None
        finally:
            connection.close()
        if 300 <= response.status < 400:
            target = urlsplit(response.headers.get("Location", ""))
            where = f"{target.scheme}://{target.hostname}" if target.hostname else "another path"
            raise ClusterError(
                f"{self.address} redirects to {where} ({response.status})",
                "A token is not carried elsewhere. Give the address that answers itself, https included.",
            )
        return response.status, answer

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._context is not None:
            return http.client.HTTPSConnection(
                self.address.host, self.address.port, timeout=timeout_s, context=self._context
            )
        return http.client.HTTPConnection(self.address.host, self.address.port, timeout=timeout_s)

    def _unreachable(self, e: Exception) -> ClusterError:
        if isinstance(e, ssl.SSLCertVerificationError):
            return ClusterError(
                f"the certificate of {self.address} is not trusted: {e.verify_message}",
                "Give the file of the authority that signed it: --ca FILE",
            )
        broke_off = isinstance(e, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        if isinstance(e, ssl.SSLError) and not broke_off:
            return ClusterError(f"{self.address} does not speak https ({e.reason})", "Is it http?")
        if isinstance(e, socket.gaierror):
            return ClusterError(
                f"{self.address}: there is no host {self.address.host}", "Check the name.", exit_code=EXIT_RETRY
            )
        if isinstance(e, TimeoutError):
            what = f"did not answer within {self.timeout_s:g} s"
            return ClusterError(
                f"{self.address} {what}", "--timeout-s of launch submit raises the limit.", exit_code=EXIT_RETRY
            )
        if isinstance(e, OSError) and e.strerror and not broke_off:
            return ClusterError(
                f"{self.address} cannot be reached: {e.strerror}",
                "Is the cluster up, and its dashboard listening there (ray start --head --dashboard-host ...)?",
                exit_code=EXIT_RETRY,
            )
        return ClusterError(
            f"{self.address} broke off the connection ({type(e).__name__})", "Try again later.", exit_code=EXIT_RETRY
        )


def _limit(connection: http.client.HTTPConnection, deadline: float) -> None:
    """What is left until `deadline` for the next operation; a socket's own timeout starts anew with each."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    if connection.sock is not None:
        connection.sock.settimeout(left_s)


def _send(connection: http.client.HTTPConnection, body: bytes | IO[bytes], deadline: float) -> None:
    # A server that refuses a body early answers and hangs up: the answer is then worth more than the error of sending.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
        if isinstance(body, bytes):
            connection.send(body)
            return
        while block := body.read(_BLOCK_BYTES):
            _limit(connection, deadline)
            connection.send(block)


def _read(response: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float) -> bytes:
    answer = bytearray()
    while True:
        _limit(connection, deadline)
        block = response.read1(_BLOCK_BYTES)
        if not block:
            expected = response.headers.get("Content-Length", "")
            if expected.isdigit() and len(answer) < int(expected):  # read1 does not say so itself
                raise http.client.IncompleteRead(bytes(answer), int(expected) - len(answer))
            return bytes(answer)
        answer += block


def _job(row: dict[str, Any]) -> RayJob:
    times = [None if row.get(key) is None else row[key] / 1000 for key in ("start_time", "end_time")]
    return RayJob(
        str(row["status"]).lower(),
        row.get("message") or "",
        row.get("error_type") or "",
        times[0],
        times[1],
        row.get("driver_exit_code"),
    )
