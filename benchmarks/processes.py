"""Runs one command to its end: its whole output in a log, its memory sampled, never without a limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import TAG_VARIABLE, ProcessIdentity, descendants, kill_tree, start_process

POLL_S = 0.25
PSS_EVERY_S = 2.0
"""The kernel walks a process's page tables for its PSS, which a process of several GB would feel if asked more often."""
STOP_S = 60.0
"""A command that was asked to stop has this long before its processes are killed."""


@dataclass(frozen=True)
class MemorySample:
    time: float
    largest_mb: float
    """Peak resident set so far of the largest process alive, in 2**20 bytes."""
    tree_pss_mb: float
    """Proportional set size of the whole process tree, in 2**20 bytes; 0 where it was not read this time."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    """Negative: the number of the signal that ended it."""
    started: float
    """Unix time."""
    seconds: float
    max_rss_mb: float
    """From wait4: the largest process of the tree over the whole command."""
    timed_out: bool
    samples: tuple[MemorySample, ...]

    def peaks_until(self, when: float) -> tuple[float, float]:
        """(largest process, whole tree) in 2**20 bytes up to the Unix time `when`."""
        seen = [s for s in self.samples if s.time <= when + POLL_S] or list(self.samples)
        return max((s.largest_mb for s in seen), default=0.0), max((s.tree_pss_mb for s in seen), default=0.0)


def run_command(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    limit_s: float,
    finished: Callable[[], bool] = lambda: False,
    poll_s: float = POLL_S,
    sampled: bool = True,
) -> Ended:
    """Run `argv` until it ends, `limit_s` is over, or `finished()`: then it gets one SIGINT, as from Ctrl-C.

    Looked at every `poll_s`, which is how exact its seconds are. Not `sampled`, it is left alone, and `max_rss_mb` is what is
    known of its memory. Nothing that it started outlives this call. Raises ClusterError when it cannot be started.
    """
    tag = f"bench/{os.getpid()}/{log.stem}/{time.time():.6f}"
    started, clock = time.time(), time.monotonic()
    process = start_process(argv, {**env, TAG_VARIABLE: tag}, str(cwd), str(log))
    identity = ProcessIdentity.of(process.pid)
    assert identity is not None
    samples: list[MemorySample] = []
    next_pss = stop_at = 0.0
    timed_out = False
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                rss_mb = usage.ru_maxrss / 1024
                return Ended(process.returncode, started, now - clock, rss_mb, timed_out, tuple(samples))
            if sampled:
                samples.append(_sample(process.pid, with_pss=now >= next_pss))
                next_pss = now + PSS_EVERY_S if now >= next_pss else next_pss
            if not stop_at and (finished() or now - clock > limit_s):
                timed_out = now - clock > limit_s
                stop_at = now + STOP_S
                os.kill(process.pid, signal.SIGINT)
            elif stop_at and now > stop_at:
                kill_tree(identity, tag, STOP_S)
            time.sleep(poll_s)
    finally:
        kill_tree(identity, tag, STOP_S)


def _sample(root: int, with_pss: bool) -> MemorySample:
    pids = [root, *(identity.pid for identity in descendants(root))]
    largest = max((_field_mb(f"/proc/{pid}/status", "VmHWM:") for pid in pids), default=0.0)
    pss = sum(_field_mb(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids) if with_pss else 0.0
    return MemorySample(time.time(), largest, pss)


def _field_mb(path: str, name: str) -> float:
    """A kB line of a /proc file in 2**20 bytes; 0 when the process is gone."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return 0.0
    line = next((line for line in text.splitlines() if line.startswith(name)), f"{name} 0 kB")
    return int(line.split()[1]) / 1024
