"""A real Ray over hosts of `support.hosts`, or on this host: token authentication, and every process of it gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.processes import ProcessIdentity, descendants, is_alive, signal_process
from support.commands import LAUNCH, ROOT
from support.hosts import Host

PORT = 6379


@dataclass
class RayNodes:
    """Running nodes; `env` is what a process needs to join them."""

    address: str
    env: dict[str, str]
    commands: list[list[str]]
    """`ray start --block` for each, the head first."""
    folder: Path
    prefix: tuple[str, ...]
    """Put before a command, it runs on the head's host."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """The process of each that was started."""

    def start(self, index: int) -> None:
        """Start a node, also one that was killed; returns without waiting for it."""
        with open(self.folder / "ray.log", "ab") as log:
            node = subprocess.Popen(self.commands[index], env=self.env, stdout=log, stderr=log, cwd=self.folder)
        self.nodes[index : index + 1] = [node]

    def repair(self) -> None:
        """Start those that have ended, and return once Ray has as many as there were."""
        gone = [index for index, node in enumerate(self.nodes) if node.poll() is not None]
        for index in gone:
            self.start(index)
        if gone:
            self.wait(len(self.nodes))

    def environment(self, of_a_user: Mapping[str, str]) -> dict[str, str]:
        """`of_a_user`, with what it takes to join this Ray in place of what is said there of another."""
        env = {k: v for k, v in of_a_user.items() if not k.startswith("RAY_")} | self.env
        return env | {k: v for k, v in of_a_user.items() if k.startswith(("TUNELAUNCH_", "HF_"))}

    def launch(
        self,
        host: Host,
        args: Sequence[str],
        cwd: Path,
        of_a_user: Mapping[str, str],
        program: Sequence[str] = (str(LAUNCH),),
    ) -> subprocess.Popen[str]:
        """`launch ARGS --backend ray` on a host; returns at once, its output can be read from it."""
        argv, env = [*host.prefix, *program, *args, "--backend", "ray"], self.environment(of_a_user)
        return subprocess.Popen(argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def on_last(self, cwd: Path) -> tuple[str, ...]:
        """Put before a command, it runs in `cwd` on the host of the last node, which has its own processes by `of_last`."""
        last = self.nodes[-1].pid
        return ("nsenter", "-t", str(last), "-n", "-m", f"--pid=/proc/{last}/ns/pid_for_children", f"--wd={cwd}")

    def wait(self, count: int) -> None:
        """Until Ray has exactly so many living nodes."""
        deadline = time.monotonic() + 120
        said = ""
        while said.count('"node_id"') != count:
            text = (self.folder / "ray.log").read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, f"Ray has not {count} node(s): {said}\n{text}"
            time.sleep(1.0)
            said = self.survey()

    def survey(self) -> str:
        """What `cluster.ray_nodes` prints of the nodes, as JSON."""
        argv = [*self.prefix, sys.executable, "-P", "-m", "cluster.ray_nodes", self.address]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=120, check=False).stdout

    def members(self, index: int) -> list[ProcessIdentity]:
        """All processes of a node, workers and what they started too."""
        root = ProcessIdentity.of(self.nodes[index].pid)
        return [*descendants(self.nodes[index].pid), *([root] if root else [])]

    def kill(self, index: int) -> None:
        """kill -9 of everything on a node at once, again until nothing is left."""
        known = set(self.members(index))
        deadline = time.monotonic() + 20
        while alive := [p for p in known if is_alive(p)]:
            assert time.monotonic() < deadline, f"processes that do not end: {alive}"
            for process in alive:
                known.update(descendants(process.pid))
                signal_process(process, signal.SIGKILL)
            time.sleep(0.02)
        self.nodes[index].wait()


@contextlib.contextmanager
def ray_nodes(
    folder: Path, hosts: Sequence[Host] = (), num_cpus: int = 2, of_last: Path | None = None
) -> Iterator[RayNodes]:
    """A head on the first of `hosts` and a node on each other; none: one node on this host, on a port of its own.

    `of_last`: a folder that comes first on the import path of the last node, which also sees no processes but its own. Ray
    takes for the node of a driver any whose process the driver can see, and a head before others: of all hosts of this
    machine, and then what the driver puts into Ray reaches no other node.
    """
    token = folder / "cluster_token"
    token.write_text("5" * 64, encoding="utf-8")
    session = Path(tempfile.mkdtemp(prefix="tlr", dir="/tmp"))  # sockets lie in it: their paths must be short
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNELAUNCH_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "contract")))
    addresses = [host.address for host in hosts] or ["127.0.0.1"]
    port = PORT if hosts else _free_port()
    joined = f"{addresses[0]}:{port}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={num_cpus}"]
    start += ["--object-store-memory=100000000", "--disable-usage-stats"]
    commands = []
    for index, address in enumerate(addresses):
        which = ["--head", f"--port={port}", "--include-dashboard=false"] if index == 0 else []
        which += [f"--temp-dir={session}"] if index == 0 else [f"--address={joined}"]
        prefix = hosts[index].prefix if hosts else ()
        if of_last is not None and index == len(addresses) - 1:
            prefix = (*prefix, "unshare", "--mount-proc", "--fork", "--pid", "--kill-child")
            prefix = (*prefix, "env", f"PYTHONPATH={of_last}{os.pathsep}{env['PYTHONPATH']}")
        commands.append([*prefix, *start, *which, f"--node-ip-address={address}"])
    found = RayNodes(joined, {**env, "RAY_ADDRESS": joined}, commands, folder, hosts[0].prefix if hosts else ())
    try:
        for index in range(len(commands)):
            found.start(index)
            found.wait(index + 1)
        yield found
    finally:
        for index, node in enumerate(found.nodes):
            if node.poll() is None:
                found.kill(index)
        shutil.rmtree(session, ignore_errors=True)


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
