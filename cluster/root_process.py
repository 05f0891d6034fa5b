"""A job's first process on this host, together with all that comes from it: how they start, and how all of them end."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import processes
from .job import ClusterError
from .processes import ProcessIdentity

_LEFTOVER_S = 3.0
"""Helpers of a worker (data loading, clean-up of shared memory) may outlive the job by this much."""
_GIVE_UP_S = 15.0


@dataclass
class RootProcess:
    """The agent, or the only worker, and the tag by which all processes of the job are recognised on this host."""

    process: subprocess.Popen[bytes]
    identity: ProcessIdentity
    tag: str
    stop_requested: bool = False
    ended_s: float | None = field(default=None)
    """time.monotonic() at which the first process was seen to have ended."""

    @classmethod
    def start(cls, argv: Sequence[str], env: Mapping[str, str], cwd: str, log_file: str, tag: str) -> RootProcess:
        """Returns at once; output goes to `log_file`. Raises ClusterError when it cannot be started.

        Call it from a thread that lives as long as the job (see `processes.start_process`).
        """
        process = processes.start_process(argv, {**env, processes.TAG_VARIABLE: tag}, cwd, log_file)
        # Not yet waited for, so it has an identity even if it has already ended.
        identity = ProcessIdentity.of(process.pid)
        assert identity is not None
        return cls(process, identity, tag)

    def poll(self) -> int | None:
        """Its exit code once no process is left; stragglers are killed after a few seconds. Never blocks."""
        code = self.process.poll()
        return None if code is None or self._has_leftovers() else code

    def stop(self) -> None:
        """SIGTERM to its group, once; returns at once."""
        if not self.stop_requested and self.process.poll() is None:
            self.stop_requested = True
            processes.signal_group(self.identity, signal.SIGTERM)

    def kill(self, wait_s: float) -> None:
        """SIGKILL every process; returns when none is left. Raises ClusterError after `wait_s`."""
        if self.process.poll() is None:
            self.stop_requested = True
        survivors = processes.kill_tree(self.identity, self.tag, wait_s)
        if survivors:
            raise ClusterError(
                f"{len(survivors)} process(es) did not end {wait_s:g} s after SIGKILL: pid "
                + ", ".join(str(s.pid) for s in survivors),
                "They hang inside the kernel (a device or network file system). Wait; if they stay, restart the host.",
                75,
            )
        self.process.wait()

    def _has_leftovers(self) -> bool:
        leftovers = processes.tagged(self.tag)
        if not leftovers:
            return False
        self.ended_s = self.ended_s or time.monotonic()
        waited_s = time.monotonic() - self.ended_s
        if waited_s >= _LEFTOVER_S:
            for leftover in leftovers:
                processes.signal_process(leftover, signal.SIGKILL)
        # A process that hangs inside the kernel cannot be ended, and must not keep the result back for ever.
        return waited_s < _GIVE_UP_S
