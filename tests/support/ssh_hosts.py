"""Hosts that are reached by real ssh: an sshd in each network namespace, one key, checked host keys. Needs root and openssh-server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.commands import LAUNCH
from support.hosts import Host, hosts

SSHD = "/usr/sbin/sshd"
NAMES = ("alpha", "beta", "gamma")


@dataclass
class SshHost:
    """A host with an sshd, known to the client as `name`."""

    name: str
    host: Host
    folder: Path
    private: tuple[str, ...] = ()
    """Folders of which this host has a file system of its own, as "PATH" or "PATH:SIZE"."""
    daemon: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start sshd and wait until it listens. The private folders are made anew."""
        mounts = ""
        for entry in self.private:
            path, _, size = entry.partition(":")
            mounts += f"mount -t tmpfs -o size={size or '512m'} tmpfs '{path}' && "
        # Without -D's terminal: its log goes to a file, and `ip netns exec` gives it mounts of its own.
        command = f"{mounts}exec {SSHD} -D -e -f '{self.folder / 'sshd_config'}' 2>>'{self.folder / 'sshd.log'}'"
        self.daemon = subprocess.Popen([*self.host.on_one_core, "sh", "-c", command], start_new_session=True)
        deadline = time.monotonic() + 10
        while f"Server listening on {self.host.address}" not in self._log():
            assert time.monotonic() < deadline, self._log()
            assert self.daemon.poll() is None, self._log()
            time.sleep(0.05)

    def _log(self) -> str:
        path = self.folder / "sshd.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def kill(self) -> None:
        """As when the power fails: every process is gone at once."""
        for pid in self.host.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.daemon is not None:
            self.daemon.wait()
        (self.folder / "sshd.log").unlink(missing_ok=True)


@dataclass(frozen=True)
class SshCluster:
    """Some hosts, and the way to run `launch` on the first of them."""

    hosts: tuple[SshHost, ...]
    path: str
    """PATH whose first `ssh` reads this cluster's configuration."""

    def popen(
        self,
        args: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        log: Path,
        program: Sequence[str] = (str(LAUNCH),),
    ) -> subprocess.Popen[str]:
        """`launch ARGS` on the first host, with its output in `log`."""
        with open(log, "w", encoding="utf-8") as out:
            return subprocess.Popen(
                [*self.hosts[0].host.prefix, *program, *args],
                cwd=cwd,
                env={**env, "PATH": self.path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def launch(
        self, *args: str, cwd: Path, env: Mapping[str, str], timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """`launch ARGS` on the first host, to its end."""
        return subprocess.run(
            [*self.hosts[0].host.prefix, str(LAUNCH), *args],
            cwd=cwd,
            env={**env, "PATH": self.path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


@contextlib.contextmanager
def ssh_cluster(folder: Path, count: int, private: Mapping[str, tuple[str, ...]] | None = None) -> Iterator[SshCluster]:
    """`count` hosts that reach each other by ssh as alpha, beta, gamma. All processes on them are gone afterwards."""
    assert shutil.which("ssh"), "install openssh-client"
    assert Path(SSHD).is_file(), "install openssh-server"
    Path("/run/sshd").mkdir(exist_ok=True)
    with hosts(count) as found:
        _keygen(folder / "client_key")
        members = tuple(
            SshHost(name, host, folder / name, (private or {}).get(name, ()))
            for name, host in zip(NAMES, found, strict=False)
        )
        known = [_configure(member, folder) for member in members]
        (folder / "known_hosts").write_text("".join(known), encoding="utf-8")
        path = _client(folder, members)
        try:
            for member in members:
                member.start()
            yield SshCluster(members, path)
        finally:
            for member in members:
                member.kill()


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _configure(member: SshHost, folder: Path) -> str:
    """Write the daemon's configuration. Returns the host's line of known_hosts."""
    member.folder.mkdir()
    _keygen(member.folder / "host_key")
    lines = (
        f"ListenAddress {member.host.address}:22",
        f"HostKey {member.folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'client_key.pub'}",
        f"PidFile {member.folder / 'sshd.pid'}",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        "MaxStartups 50",
    )
    (member.folder / "sshd_config").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kind, key, *_ = (member.folder / "host_key.pub").read_text(encoding="utf-8").split()
    return f"{member.name} {kind} {key}\n"


def _client(folder: Path, members: Sequence[SshHost]) -> str:
    """A configuration as a user has it, and a PATH whose ssh reads it (OpenSSH looks for it in the passwd folder only)."""
    common = (
        f"  IdentityFile {folder / 'client_key'}\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder / 'known_hosts'}\n"
    )
    blocks = [
        f"Host {m.name}\n  HostName {m.host.address}\n  HostKeyAlias {m.name}\n  User root\n{common}" for m in members
    ]
    (folder / "ssh_config").write_text("".join(blocks), encoding="utf-8")
    programs = folder / "bin"
    programs.mkdir()
    program = programs / "ssh"
    program.write_text(f"#!/bin/sh\nexec {shutil.which('ssh')} -F '{folder / 'ssh_config'}' \"$@\"\n", encoding="utf-8")
    program.chmod(0o755)
    return f"{programs}{os.pathsep}{os.environ['PATH']}"
