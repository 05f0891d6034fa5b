"""Hosts for tests of what crosses a network: network namespaces of this machine, joined by a bridge. Needs root and `ip`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    name: str
    """Of the network namespace."""
    address: str
    interface: str = "eth0"

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command, it runs on this host."""
        return ("ip", "netns", "exec", self.name)

    def received_bytes(self) -> int:
        """What has come in over the network so far."""
        path = f"/sys/class/net/{self.interface}/statistics/rx_bytes"
        return int(subprocess.run([*self.prefix, "cat", path], check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other and nothing else. They are removed again, also after a failure."""
    assert os.geteuid() == 0, "network namespaces need root"
    assert shutil.which("ip"), "install iproute2"
    tag = f"tl{os.getpid() % 100000}"
    bridge, found = f"{tag}br", [Host(f"{tag}h{i}", f"10.213.7.{i + 1}") for i in range(count)]
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
