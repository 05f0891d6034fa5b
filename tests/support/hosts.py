"""Hosts for tests of what crosses a network: network namespaces of this machine, joined by a bridge. Needs root and `ip`."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TAGS = itertools.cycle("abcdefghij")
"""Several sets of hosts may be there at a time; the names of interfaces have at most 15 characters."""
OF_A_RUN = (
    b"/bin/launch\0",
    b"-m\0launcher\0",
    b"/train_stages.py\0",
    b"cluster.node_agent",
    b"cluster.ray_driver",
    b"cluster.ray_guard",
    b"torch.distributed.run",
    b"trainer.worker",
)
"""What stands in the command line of each process of a run, on whatever backend."""


@dataclass(frozen=True)
class Host:
    name: str
    """Of the network namespace."""
    address: str
    core: int
    """For what counts the cores of its host: hosts do not have theirs in common, and each would count all of this machine."""
    interface: str = "eth0"

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command, it runs on this host."""
        return ("ip", "netns", "exec", self.name)

    @property
    def on_one_core(self) -> tuple[str, ...]:
        """The same, for a process that is to believe that the host has only one core."""
        return (*self.prefix, "taskset", "-c", str(self.core))

    def pids(self) -> list[int]:
        """Every process of this host."""
        done = subprocess.run(["ip", "netns", "pids", self.name], check=False, capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def jobs(self) -> list[int]:
        """Those of a run: launchers, agents, drivers and workers."""
        return [pid for pid in self.pids() if any(word in command_of(pid) for word in OF_A_RUN)]

    def cut(self) -> None:
        """Pull the cable: nothing gets through, and nobody is told."""
        subprocess.run([*self.prefix, "ip", "link", "set", self.interface, "down"], check=True)

    def mend(self) -> None:
        """Put the cable back."""
        subprocess.run([*self.prefix, "ip", "link", "set", self.interface, "up"], check=True)

    def received_bytes(self) -> int:
        """What has come in over the network so far."""
        path = f"/sys/class/net/{self.interface}/statistics/rx_bytes"
        return int(subprocess.run([*self.prefix, "cat", path], check=True, capture_output=True, text=True).stdout)


def command_of(pid: int) -> bytes:
    """Its words, each with a zero byte behind it; empty for a zombie, and for one that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other and nothing else. They are removed again, also after a failure."""
    assert os.geteuid() == 0, "network namespaces need root"
    assert shutil.which("ip"), "install iproute2"
    tag, cores = f"tl{os.getpid() % 100000}{next(_TAGS)}", sorted(os.sched_getaffinity(0))
    bridge = f"{tag}br"
    found = [Host(f"{tag}h{i}", f"10.213.7.{i + 1}", cores[i % len(cores)]) for i in range(count)]
    try:
        _ip(f"link add {bridge} type bridge")
        _ip(f"link set {bridge} up")
        for i, host in enumerate(found):
            _ip(f"netns add {host.name}")
            _ip(f"link add {tag}v{i} type veth peer name {host.interface} netns {host.name}")
            _ip(f"link set {tag}v{i} master {bridge} up")
            _ip(f"-n {host.name} addr add {host.address}/24 dev {host.interface}")
            _ip(f"-n {host.name} link set {host.interface} up")
            _ip(f"-n {host.name} link set lo up")
        yield found
    finally:
        # A namespace takes its end of the cable along, and the cable its other end.
        for command in (*(f"netns del {host.name}" for host in found), f"link del {bridge}"):
            subprocess.run(["ip", *command.split()], check=False, capture_output=True)


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {command}: {done.stderr}"
