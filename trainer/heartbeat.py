"""Signs of life of this process, and its stacks on request: by these the launcher tells a hang from a slow run.

The loop says where it is by `beat`, which costs an assignment; it never touches the disk. A thread writes that once a
second into heartbeat_rank_N.json of the log folder, also while the loop waits, so a rank that waits for others differs
from one that is frozen. The end of what may last is written at once: who froze just after must not be given that time.
All ranks take the same path and beat equally often: who has beaten least is behind.

No signal and no collective is needed, only the folder: it works for ranks of any host that shares it. Standard library only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import IO

INTERVAL_S = 1.0
LOCK_HELD_S = 60.0
"""Code that keeps the interpreter lock for so long gets its stack written unasked: no thread of Python could do it later."""
RECORD_BYTES = 512
STACKS_REQUEST = "stacks_request"
"""File of the log folder; when something is written into it, every rank writes its stacks."""


def heartbeat_file(log_dir: Path, rank: int) -> Path:
    """Where `rank` leaves its signs of life."""
    return log_dir / f"heartbeat_rank_{rank}.json"


def stacks_file(log_dir: Path, rank: int) -> Path:
    """Where `rank` writes its stacks when it is asked to."""
    return log_dir / f"stacks_rank_{rank}.txt"


def signal_stacks_file(log_dir: Path, rank: int) -> Path:
    """Where `rank` writes its stacks on SIGUSR1: a file of its own, as both may happen at once."""
    return log_dir / f"stacks_rank_{rank}_signal.txt"


class Heartbeat:
    """Where this process is in its work. There is one a process, `HEARTBEAT`; until `start` it only counts."""

    def __init__(self) -> None:
        self._at: tuple[int, str, int, int, bool] = (0, "start", -1, -1, True)
        self._steps_done = self._signs = 0
        self._owner = 0
        self._wake = threading.Event()
        self._stacks: tuple[IO[bytes], ...] = ()

    def beat(self, phase: str, step: int = -1, micro: int = -1, may_last: bool = False) -> None:
        """Say what comes next: a phase, in the 1-based `step` and the 0-based `micro` batch where there is one.

        `may_last`: its length has nothing to do with that of a step. Every rank must call it equally often.
        """
        has_lasted = self._at[4] and not may_last and self._steps_done > 0
        self._at = (self._at[0] + 1, phase, step, micro, may_last)
        if has_lasted:
            self._wake.set()

    def sign(self) -> None:
        """A sign of life within a phase, of work that other ranks do not do."""
        self._signs += 1

    def step_done(self, step: int) -> None:
        """The 1-based `step` is done. The first one of a process compiles, allocates and connects: it may last."""
        self._steps_done += 1
        self.beat("between steps", step)
        if self._steps_done == 1:
            self._wake.set()

    def start(self, log_dir: Path, rank: int) -> None:
        """Write signs of life into `log_dir` from now on, from a thread, and stacks into stacks_rank_N.txt when asked.

        To be called by the thread that does the work. A crash of a compiled library leaves its stack on stderr.
        """
        self._owner = threading.get_ident()
        paths = (stacks_file(log_dir, rank), signal_stacks_file(log_dir, rank))
        self._stacks = tuple(open(path, "wb", buffering=0) for path in paths)  # noqa: SIM115  # as long as the process
        faulthandler.enable()
        # For the launcher on the same host: works whoever holds the interpreter lock, and in a stopped process once it goes on.
        faulthandler.register(signal.SIGUSR1, self._stacks[1], all_threads=True)
        threading.Thread(target=self._write_for_ever, args=(log_dir, rank), name="heartbeat", daemon=True).start()

    def _write_for_ever(self, log_dir: Path, rank: int) -> None:
        path, request = heartbeat_file(log_dir, rank), log_dir / STACKS_REQUEST
        stacks = self._stacks[0]
        is_answered = False
        # Training must not end because a sign of life could not be written.
        while True:
            with contextlib.suppress(OSError):
                _overwrite(path, self._record())
            if not is_answered and _holds_anything(request):
                faulthandler.dump_traceback(stacks, all_threads=True)
                is_answered = True
            faulthandler.dump_traceback_later(LOCK_HELD_S, file=stacks)
            self._wake.wait(INTERVAL_S)
            self._wake.clear()

    def _record(self) -> bytes:
        beats, phase, step, micro, may_last = self._at
        row = {
            "pid": os.getpid(),
            "pid_start": _start_ticks(),
            "host": socket.gethostname(),
            "thread": self._owner,
            "beats": beats,
            "signs": self._signs,
            "phase": phase,
            "step": step,
            "micro": micro,
            "may_last": may_last or not self._steps_done,
            "cpu_s": round(time.process_time() - time.thread_time(), 3),
            "time": round(time.time(), 3),
        }
        return json.dumps(row).encode().ljust(RECORD_BYTES)


HEARTBEAT = Heartbeat()


def _overwrite(path: Path, data: bytes) -> None:
    """In place: renaming a file a second and rank is much to ask of a shared disk. Closing it sends it to an NFS server."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def _holds_anything(path: Path) -> bool:
    """The file is opened, and not asked for its size: NFS then looks at the server and not into its cache."""
    try:
        with open(path, "rb") as f:
            return bool(f.read(1))
    except OSError:
        return False


def _start_ticks() -> int:
    """Start time of this process in clock ticks since boot (proc_pid_stat(5)); 0 where there is no /proc."""
    try:
        text = Path("/proc/self/stat").read_bytes()
    except OSError:
        return 0
    return int(text[text.rindex(b")") + 2 :].split()[19])
