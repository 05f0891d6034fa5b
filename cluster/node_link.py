"""The launcher's end of a link to one host: an OpenSSH client, and the messages that go through it. Nothing here blocks."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import logs, processes
from .job import ClusterError
from .node_agent import BEAT_S
from .node_messages import Decoder, encode

CONNECT_S = 15
"""OpenSSH's own limit of one attempt to connect."""
_CLOSE_WAIT_S = 5.0
RAISE_HINT = "cluster.wait_s raises the limit."


@dataclass(frozen=True)
class _Trouble:
    """What a line of ssh's means."""

    pattern: str
    hint: str
    may_pass: bool
    """Trying again may help."""


_TROUBLES = (
    _Trouble(
        r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known",
        "Connect once by hand and compare the fingerprint with the host's own: ssh {host}",
        False,
    ),
    _Trouble(
        r"Permission denied|Too many authentication failures|no matching",
        "It must work without a password: ssh-copy-id {host}, or load the key (ssh-add); then try: ssh {host} true",
        False,
    ),
    _Trouble(r"Could not resolve hostname|Bad configuration|Bad owner or permissions", "See ~/.ssh/config.", False),
    _Trouble(
        r"No module named|ModuleNotFoundError",
        "Install the same tunelaunch there, or name the right Python: `python:` of this host in hosts.yaml",
        False,
    ),
    _Trouble(
        r"not found|No such file or directory",
        "There is no such Python on that host. Name its own: `python:` of this host in hosts.yaml",
        False,
    ),
    _Trouble(
        r"Connection refused|timed out|No route to host|Network is unreachable|Connection (reset|closed)|Broken pipe|Timeout",
        "Is the host up, and its sshd running? Try: ssh {host} true",
        True,
    ),
)


class NodeLink:
    """One host's link. Call `pump` often: it reads what has arrived and keeps the link alive."""

    def __init__(self, host: str, python: str, log_file: str, silence_s: float) -> None:
        """Raises ClusterError when there is no ssh client."""
        self.host, self.log_file = host, log_file
        self.decoder = Decoder()
        self.answers: dict[int, dict[str, Any]] = {}
        self.is_up = False
        self.ended: int | None = None
        """Exit code of the host's share of the job."""
        self.ended_s: float | None = None
        """time.monotonic() when that was heard."""
        self.heard_s = self.said_s = time.monotonic()
        self._number = 0
        self._unsent = b""
        self.log_start = Path(log_file).stat().st_size if Path(log_file).exists() else 0
        self.process = processes.start_piped(agent_command(host, python, silence_s), log_file)
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self._outlet, self._inlet = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._inlet, False)
        os.set_blocking(self._outlet, False)

    def ask(self, action: str, **arguments: Any) -> int:
        """Send a request. Returns the number under which `answer` finds what comes back."""
        self._number += 1
        self._send({"do": action, "with": arguments, "id": self._number})
        return self._number

    def answer(self, number: int) -> Any:
        """What came back, as [value]; None while nothing has. Raises ClusterError when the host could not do it."""
        message = self.answers.get(number)
        if message is None:
            return None
        if "error" in message:
            raise ClusterError(f"{self.host}: {message['error']}", message["hint"], message["exit_code"])
        return [message["answer"]]

    def pump(self) -> None:
        """Take in what has arrived, send what is waiting, and say something when nothing was said for a while."""
        self._flush()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._inlet, 2**20):
                self.heard_s = time.monotonic()
                self._take(data)
        if self.is_up and time.monotonic() - self.said_s >= BEAT_S:
            self._send({})

    def _take(self, data: bytes) -> None:
        messages, others = self.decoder.feed(data)
        if others:
            with open(self.log_file, "a", encoding="utf-8") as log:
                log.writelines(f"{line}\n" for line in others)
        for message in messages:
            if "hello" in message:
                self.is_up = True
            elif "ended" in message and self.ended is None:
                self.ended, self.ended_s = message["ended"], time.monotonic()
            elif "id" in message:
                self.answers[message["id"]] = message

    @property
    def silent_s(self) -> float:
        """Seconds since the host was last heard."""
        return time.monotonic() - self.heard_s

    @property
    def is_closed(self) -> bool:
        """The ssh client has ended, and all that it received is taken in."""
        return self.process.poll() is not None

    def trouble(self) -> ClusterError:
        """Why the link ended: what ssh, or the host's Python, said last. `exit_code` 75 where trying again may help."""
        said = [line for line in self._said() if not re.match(r"\s|Traceback|Warning: Permanently added", line)]
        known = next(((t, line) for t in _TROUBLES for line in reversed(said) if re.search(t.pattern, line)), None)
        if known is not None:
            trouble, line = known
            return ClusterError(
                f"{self.host}: {line}", trouble.hint.format(host=self.host), 75 if trouble.may_pass else 2
            )
        what = said[-1] if said else f"the ssh client ended with exit code {self.process.poll()}"
        return ClusterError(f"{self.host}: {what}", f"Try: ssh {self.host} true\nlog: {self.log_file}", 75)

    def _said(self) -> list[str]:
        with open(self.log_file, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode("utf-8", errors="replace").splitlines()[-50:]

    def hang_up(self) -> None:
        """The agent, once it notices, ends whatever it still runs. Returns at once."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()

    def close(self) -> None:
        """Hang up, and return when the ssh client has ended."""
        self.hang_up()
        try:
            self.process.wait(_CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent += encode(message)
        self.said_s = time.monotonic()
        self._flush()

    def _flush(self) -> None:
        # A full pipe, or one that is closed, is a link that does not work: `silent_s` and `is_closed` tell.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                self._unsent = self._unsent[os.write(self._outlet, self._unsent) :]


def agent_command(host: str, python: str, silence_s: float) -> tuple[str, ...]:
    """The exact argv that starts the agent of a host. Pure but for this host's own name, which needs no ssh."""
    remote = (python or sys.executable, "-P", "-m", "cluster.node_agent", f"{silence_s:g}")
    if host in ("localhost", socket.gethostname()):
        return remote
    options = (
        *("-T", "-oBatchMode=yes", "-oClearAllForwardings=yes", f"-oConnectTimeout={CONNECT_S}"),
        # ssh itself must not give up before we do; that a host is silent is noticed by our own messages.
        *("-oServerAliveInterval=15", f"-oServerAliveCountMax={max(4, int(silence_s // 15) + 2)}"),
    )
    # Any login shell understands this one word by word; everything that could need quoting goes through standard input.
    return ("ssh", *options, "--", host, f"exec {shlex.join(remote)}")


def open_links(hosts: list[tuple[str, str]], log_files: list[str], silence_s: float, wait_s: float) -> list[NodeLink]:
    """Links to all (host, python), each of which has answered. Raises ClusterError with the trouble of every host that has not."""
    links = [NodeLink(host, python, log, silence_s) for (host, python), log in zip(hosts, log_files, strict=True)]
    deadline = time.monotonic() + wait_s
    while not all(link.is_up or link.is_closed for link in links) and time.monotonic() < deadline:
        for link in links:
            link.pump()
        time.sleep(0.02)
    for link in links:
        link.pump()
    down = [link for link in links if not link.is_up]
    if not down:
        return links
    errors = [
        link.trouble() if link.is_closed else ClusterError(f"{link.host}: no answer for {wait_s:g} s", RAISE_HINT, 75)
        for link in down
    ]
    close_all(links)
    hints = list(dict.fromkeys(e.hint for e in errors if e.hint))
    raise ClusterError("\n".join(e.message for e in errors), "\n".join(hints), max(e.exit_code for e in errors))


def ask_all(links: list[NodeLink], action: str, wait_s: float, arguments: list[dict[str, Any]]) -> list[Any]:
    """The answers of all hosts, asked at the same time. Raises ClusterError for one that cannot, or does not in `wait_s`."""
    numbers = [link.ask(action, **given) for link, given in zip(links, arguments, strict=True)]
    deadline = time.monotonic() + wait_s
    while True:
        for link in links:
            link.pump()
        found = [link.answer(number) for link, number in zip(links, numbers, strict=True)]
        if all(answer is not None for answer in found):
            return [answer[0] for answer in found]
        for link, answer in zip(links, found, strict=True):
            if answer is None and link.is_closed:
                raise link.trouble()
            if answer is None and time.monotonic() > deadline:
                raise ClusterError(f"{link.host}: no answer to {action!r} for {wait_s:g} s", RAISE_HINT, 75)
        time.sleep(0.02)


def close_all(links: list[NodeLink]) -> None:
    """Hang up on all hosts, and return when every ssh client has ended."""
    for link in links:
        link.hang_up()
    for link in links:
        link.close()


def log_of(log_dir: str, number: int) -> str:
    """Where the ssh client and the agent of the host with this number write what they have to say."""
    return str(Path(log_dir) / f"ssh_{number}.log")


def node_log(log_dir: str, number: int) -> str:
    """Where the first process of that host's share writes."""
    return str(Path(log_dir) / f"node_{number}.{logs.AGENT_LOG}")
