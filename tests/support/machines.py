"""The machines of one backend, and how to break them: one host for torchrun, two by ssh, two nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.commands import LAUNCH_TRAINING, ROOT
from support.hosts import Host, command_of, hosts
from support.ray_nodes import RayNodes, ray_nodes
from support.ssh_hosts import SshCluster, ssh_cluster


@dataclass
class Machines:
    """Hosts of one backend. The launcher runs on the first of them; the last one is what breaks."""

    backend: str
    hosts: Sequence[Host]
    devices: tuple[str, ...]
    """The flags that choose both ranks' places."""
    env: dict[str, str]
    ssh: SshCluster | None = None
    ray: RayNodes | None = None

    def launch(self, args: Sequence[str], cwd: Path, log: Path, **extra: str) -> subprocess.Popen[bytes]:
        """`launch ARGS`, without the stages after training, on the first host. Returns at once."""
        argv = [*self.hosts[0].prefix, *LAUNCH_TRAINING, *args]
        env = {**self.env, "PYTHONPATH": str(ROOT), **extra}
        with open(log, "wb") as out:
            return subprocess.Popen(argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    @property
    def broken(self) -> Host:
        """The host on which accidents happen."""
        return self.hosts[-1]

    def kill_worker(self) -> None:
        """kill -9 of the last rank's process."""
        workers = [pid for host in self.hosts for pid in host.pids() if b"trainer.worker\0train" in command_of(pid)]
        (pid,) = (pid for pid in workers if rank_of(pid) == 1)
        os.kill(pid, signal.SIGKILL)

    def kill_host(self) -> None:
        """Every process of the last host at once, as when its power fails."""
        if self.ray is not None:
            self.ray.kill(1)
        else:
            assert self.ssh is not None
            self.ssh.hosts[1].kill()

    def bring_back(self) -> None:
        """Start the last host's daemon again, where it has ended."""
        if self.ray is not None:
            self.ray.repair()
        elif self.ssh is not None and self.ssh.hosts[1].daemon.poll() is not None:
            self.ssh.hosts[1].start()

    def abandon(self) -> None:
        """End the last host for good, whatever still runs there; `bring_back` starts it anew."""
        self.kill_host()
        self.broken.mend()

    @contextlib.contextmanager
    def own_disk(
        self, folder: Path, size: str, launcher: subprocess.Popen[bytes] | None = None, holds: Sequence[str] = ()
    ) -> Iterator[None]:
        """From now on the last host has a small file system of its own at `folder`, in which are the folders `holds`.

        torchrun's host is the launcher's.
        """
        owner = self._owner() or launcher
        assert owner is not None
        inside = ("nsenter", "-t", str(owner.pid), "-m")
        subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        subprocess.run([*inside, "mkdir", "-p", *(str(folder / name) for name in (".", *holds))], check=True)
        try:
            yield
        finally:
            if owner.poll() is None:  # else its mounts have gone with it
                subprocess.run([*inside, "umount", "-l", str(folder)], check=True)

    def _owner(self) -> subprocess.Popen[bytes] | None:
        """The process whose mounts all others of the last host see."""
        if self.ray is not None:
            return self.ray.nodes[1]
        return self.ssh.hosts[1].daemon if self.ssh is not None else None

    def left_over(self, within_s: float) -> tuple[int, float]:
        """(processes of a run that are left after so long, seconds until there were none)."""
        began = time.monotonic()
        while left := [pid for host in self.hosts for pid in host.jobs()]:
            if time.monotonic() - began > within_s:
                break
            time.sleep(0.1)
        return len(left), time.monotonic() - began


def rank_of(pid: int) -> int:
    """Its RANK; -1 for none."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return int(entry[5:])
    return -1


def started_at(pid_start_ticks: int) -> float:
    """Unix seconds at which a process with this start time (proc_pid_stat(5), field 22) began."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + pid_start_ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def machines(backend: str, folder: Path, environment: Mapping[str, str]) -> Iterator[Machines]:
    """All processes on these hosts are gone afterwards."""
    env = dict(environment)
    if backend == "torchrun":
        with hosts(1) as found:
            yield Machines(backend, found, ("--cpu", "2"), env)
        return
    with ssh_cluster(folder, 2) as cluster:
        found = [host.host for host in cluster.hosts]
        if backend == "ssh":
            flags = ("--hosts", "alpha", "--hosts", "beta", "--cpu", "1")
            yield Machines(backend, found, flags, {**env, "PATH": cluster.path}, ssh=cluster)
            return
    with hosts(2) as found, ray_nodes(folder, found) as nodes:
        flags = ("--backend", "ray", "--cpu", "1", "--nodes", "2")
        yield Machines(backend, found, flags, nodes.environment(env), ray=nodes)
