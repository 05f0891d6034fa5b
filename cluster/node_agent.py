"""Runs on each host of an ssh job, at the other end of the launcher's link. `-m cluster.node_agent SILENCE_S`.

It answers questions, starts the host's share of a job, and ends it when it is told to, when the link is closed, or when
nothing has been heard for SILENCE_S seconds: a cut cable closes nothing. What it started ends with it, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
import uuid
from typing import Any

from . import node_report, processes
from .environment import base_env
from .job import ClusterError
from .node_messages import Decoder, encode
from .root_process import RootProcess

BEAT_S = 2.0
"""The agent, and the launcher, say something at least this often."""
POLITE_S = 8.0
"""After SIGTERM the job may take this long before it is killed."""
_TICK_S = 0.1
_KILL_WAIT_S = 10.0


class NodeAgent:
    """One host's end of a link. File descriptors `inlet` and `outlet` carry messages."""

    def __init__(self, inlet: int, outlet: int, silence_s: float) -> None:
        self.inlet, self.outlet, self.silence_s = inlet, outlet, silence_s
        self.decoder = Decoder()
        self.root: RootProcess | None = None
        self.listener: socket.socket | None = None
        self.heard_s = self.said_s = time.monotonic()
        self.polite_until_s: float | None = None

    def serve(self) -> None:
        """Until the link ends. Leaves no process behind."""
        try:
            self._say({"hello": 1, "pid": os.getpid()})
            while self._listen():
                self._look_at_job()
                if time.monotonic() - self.said_s >= BEAT_S:
                    self._say({"alive": 1})
        except BrokenPipeError:
            pass  # nobody is left to hear it
        finally:
            if self.root is not None:
                self.root.kill(_KILL_WAIT_S)

    def _listen(self) -> bool:
        """Handle what has arrived; False when the link is over."""
        ready, _, _ = select.select([self.inlet], [], [], _TICK_S)
        if ready:
            data = os.read(self.inlet, 2**16)
            if not data:
                return False
            self.heard_s = time.monotonic()
            for message in self.decoder.feed(data)[0]:
                self._handle(message)
        return time.monotonic() - self.heard_s < self.silence_s

    def _handle(self, message: dict[str, Any]) -> None:
        action, number = message.get("do"), message.get("id")
        if action is None:
            return  # a sign of life
        try:
            answer = getattr(self, f"do_{action}")(**message.get("with", {}))
            self._say({"id": number, "answer": answer})
        except ClusterError as e:
            self._say({"id": number, "error": e.message, "hint": e.hint, "exit_code": e.exit_code})
        except Exception as e:  # the border of this host: the launcher tells the person, with the host's name
            self._say({"id": number, "error": f"{type(e).__name__}: {e}", "hint": "", "exit_code": 70})

    def do_report(self, packages: list[str], folders: list[str], files: list[str]) -> dict[str, Any]:
        return node_report.collect(packages, folders, files)

    def do_clock(self) -> float:
        """This host's time, in seconds since 1970."""
        return time.time()

    def do_write_tokens(self, folders: list[str], name: str) -> dict[str, str]:
        return node_report.write_tokens(folders, name)

    def do_missing_tokens(self, folders: list[str], names: list[str]) -> dict[str, list[str]]:
        return node_report.missing_tokens(folders, names)

    def do_remove_tokens(self, folders: list[str], name: str) -> None:
        node_report.remove_tokens(folders, name)

    def do_listen(self, port: int) -> dict[str, Any]:
        """Open the port at which the ranks will meet (0: any free one), for the other hosts to try."""
        self._close_listener()
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            dual = family == socket.AF_INET6
            self.listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
        except OSError as e:
            raise ClusterError(
                f"port {port} cannot be used: {e.strerror}",
                "Set cluster.port to another one, or to 0, which takes a free one.",
                75,
            ) from e
        return {"port": self.listener.getsockname()[1], "addresses": node_report.addresses()}

    def do_reach(self, addresses: list[str], port: int, wait_s: float) -> dict[str, str]:
        """Which of the first host's addresses can be reached from here, and the interface on the way to each."""
        interfaces = {address: interface for interface, address in node_report.addresses()}
        reached = {}
        for address in addresses:
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=wait_s) as connection:
                own = connection.getsockname()[0].removeprefix("::ffff:")
                reached[address] = interfaces.get(own, "")
        return reached

    def do_start(
        self, argv: list[str], env: dict[str, str], devices: list[str], cwd: str, log_file: str, tag: str
    ) -> int:
        """Start this host's share of a job. Returns its process id.

        First what is left of an earlier attempt is ended: its launcher may have lost sight of this host, and two
        attempts must never run beside each other.
        """
        self._close_listener()
        processes.kill_tagged(f"{tag}/", _KILL_WAIT_S)
        environment = base_env(os.environ, tuple(devices), env)
        self.root = RootProcess.start(argv, environment, cwd, log_file, f"{tag}/{uuid.uuid4().hex}")
        return self.root.process.pid

    def do_stop(self) -> None:
        """SIGTERM; what is left after `POLITE_S` is killed."""
        if self.root is None:
            self._say({"ended": 0})  # not begun, or already over
        elif self.polite_until_s is None:
            self.polite_until_s = time.monotonic() + POLITE_S
            self.root.stop()

    def do_kill(self) -> None:
        if self.root is not None:
            self.root.kill(_KILL_WAIT_S)

    def _look_at_job(self) -> None:
        if self.root is None:
            return
        if self.polite_until_s is not None and time.monotonic() > self.polite_until_s:
            self.root.kill(_KILL_WAIT_S)
        code = self.root.poll()
        if code is not None:
            self.root = None
            self._say({"ended": code})

    def _close_listener(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def _say(self, message: dict[str, Any]) -> None:
        data = encode(message)
        while data:
            data = data[os.write(self.outlet, data) :]
        self.said_s = time.monotonic()


def main() -> int:
    """Take standard output for messages; whatever else is printed goes to standard error."""
    outlet = os.dup(1)
    os.dup2(2, 1)
    NodeAgent(0, outlet, float(sys.argv[1])).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
