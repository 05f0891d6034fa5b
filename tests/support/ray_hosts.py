"""A real Ray cluster over the hosts of `support.hosts`: token authentication, and a dashboard behind https."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.commands import ROOT, wait_until
from support.hosts import Host

RAY = Path(sys.executable).with_name("ray")
HTTPS_PORT = 8443
_SELF_SIGNED = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=head")


@dataclass(frozen=True)
class RayCluster:
    url: str
    """https, for a client on another host."""
    certificate: Path
    """Of the authority that clients have to trust."""
    token_file: Path
    session: Path
    """What Ray writes: logs of jobs and of itself, uploads."""
    hosts: Sequence[Host]

    def _pids(self) -> list[int]:
        return [pid for host in self.hosts for pid in host.pids()]

    def commands(self) -> str:
        """The command line of every process on the cluster's hosts."""
        lines = []
        for pid in self._pids():
            with contextlib.suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return "\n".join(lines)

    def processes(self, *words: str) -> list[int]:
        """Processes on the cluster's hosts whose command line holds all of `words`; no zombies."""
        found = []
        for pid in self._pids():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if all(word in command for word in words) and state != "Z":
                    found.append(pid)
        return found


@contextlib.contextmanager
def ray_cluster(found: Sequence[Host], folder: Path, token: str, **extra: str) -> Iterator[RayCluster]:
    """A head on the first host and a node on each other one, 2 CPUs each. `extra`: variables of all its processes.

    Every process on these hosts is ended afterwards.
    """
    token_file = folder / "cluster_token"
    token_file.write_text(token, encoding="utf-8")
    session = Path(tempfile.mkdtemp(prefix="tlray", dir="/tmp"))  # Unix sockets lie in it: the path must be short
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNELAUNCH_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"PYTHONPATH": str(ROOT), "PATH": f"{RAY.parent}:{os.environ['PATH']}", **extra}
    head, *others = found
    start = [str(RAY), "start", "--block", "--num-cpus=2", "--disable-usage-stats"]
    options = ["--head", "--port=6379", "--dashboard-host=127.0.0.1", f"--temp-dir={session}"]
    certificate = self_signed(head.address, folder)
    proxy = [sys.executable, str(Path(__file__).with_name("tls_proxy.py")), str(HTTPS_PORT), "8265", str(folder)]
    log = open(folder / "ray.log", "wb")  # noqa: SIM115  # closed below
    started: list[subprocess.Popen[bytes]] = []

    def run(host: Host, command: list[str]) -> None:
        started.append(subprocess.Popen([*host.prefix, *command], env=env, stdout=log, stderr=log))

    try:
        run(head, [*start, *options, f"--node-ip-address={head.address}"])
        run(head, proxy)
        _wait_for_dashboard(head, folder)
        for host in others:
            run(host, [*start, f"--address={head.address}:6379", f"--node-ip-address={host.address}"])
        yield RayCluster(f"https://{head.address}:{HTTPS_PORT}", certificate, token_file, session, found)
    finally:
        _end(found)
        for process in started:
            process.wait(timeout=30)
        log.close()
        shutil.rmtree(session, ignore_errors=True)


def _wait_for_dashboard(head: Host, folder: Path) -> None:
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8265/api/authentication_mode', timeout=5)"

    def answers() -> bool:
        done = subprocess.run([*head.prefix, sys.executable, "-c", code], check=False, capture_output=True, timeout=60)
        time.sleep(0.5)
        return done.returncode == 0

    try:
        wait_until(answers, 120, "an answer of Ray's dashboard")
    except AssertionError as e:
        raise AssertionError((folder / "ray.log").read_text(errors="replace")[-4000:]) from e


def self_signed(address: str, folder: Path) -> Path:
    """A certificate for `address`, which is its own authority; its key lies beside it."""
    path = folder / "proxy.pem"
    made = subprocess.run(
        [
            *_SELF_SIGNED,
            "-addext",
            f"subjectAltName=IP:{address}",
            "-keyout",
            str(folder / "proxy.key"),
            "-out",
            str(path),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return path


def _end(found: Sequence[Host]) -> None:
    """Nothing but this test's own processes lives in its namespaces."""
    deadline = time.monotonic() + 30
    while pids := [pid for host in found for pid in host.pids()]:
        assert time.monotonic() < deadline, f"processes that do not end: {pids}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
