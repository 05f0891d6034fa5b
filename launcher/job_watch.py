"""Looks at the ranks of a training job while it runs; when they hang, asks all for their stacks and says who is behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from pathlib import Path

from cluster.job import Failure, JobSpec, JobState
from cluster.processes import ProcessIdentity, signal_process
from trainer.heartbeat import STACKS_REQUEST, heartbeat_file, signal_stacks_file, stacks_file
from trainer.spec import EXIT_RETRY

from .errors import LaunchError
from .hang import Beat, HangWatch, is_whole, read_beats, understand
from .run_dir import write_atomic

LOOK_S = 1.0
SIGNAL_AFTER_S = 3.0
"""A rank that has not written its stacks by itself after so long is asked by a signal, where it is on this host."""
STACKS_WAIT_S = 10.0
WRITING_S = 0.5
"""Stacks are written line by line: whole ones, to which nothing has been added for so long, are read."""
PAGE = "hang.txt"


class JobWatch:
    """One training job's ranks. Nothing here is a collective, and no rank needs to answer for the others' sake."""

    def __init__(self, job: JobSpec, hang_s: float, patience_s: float, waiting_is_idle: bool) -> None:
        """`patience_s`: see hang.py. Side effect: the file by which ranks are asked for their stacks, still empty."""
        self.job, self.log_dir = job, Path(job.log_dir)
        self.watch = HangWatch(job.num_processes, hang_s, patience_s, waiting_is_idle, time.monotonic())
        self.next_look = 0.0
        (Path(job.log_dir) / STACKS_REQUEST).touch()

    def look(self, state: JobState) -> Failure | None:
        """The hang as the job's failure, once there is one. Takes up to twice STACKS_WAIT_S then, and no time before."""
        now = time.monotonic()
        if now < self.next_look:
            return None
        self.next_look = now + LOOK_S
        if state is not JobState.RUNNING:
            self.watch.forgive(now)
            return None
        self.watch.observe(read_beats(self.log_dir, self.job.num_processes), now)
        return self._hung(now) if self.watch.is_hung(now) else None

    def noticed_s(self, rank: int) -> float | None:
        """Seconds since the process of `rank` last wrote a sign of life; None when it never did."""
        try:
            return max(time.time() - heartbeat_file(self.log_dir, rank).stat().st_mtime, 0.0)
        except OSError:
            return None

    def tidy(self) -> None:
        """Remove what is empty because nobody asked, or nobody answered."""
        answers = [path for rank in range(self.job.num_processes) for path in _answers(self.log_dir, rank)]
        for path in (self.log_dir / STACKS_REQUEST, *answers):
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()

    def _hung(self, now: float) -> Failure:
        quiet_s, frozen = self.watch.quiet_s(now), self.watch.frozen(now)
        hang = understand(self.watch.beats, self.job.num_processes, frozen, self._stacks(), quiet_s)
        page = self.log_dir / PAGE
        with contextlib.suppress(LaunchError):  # a full disk: the sentence still goes into status.json
            write_atomic(page, hang.page)
        rank = hang.behind[0] if hang.behind else -1
        hint = "Every rank's place and stack stand in the log. Raise run.hang_s if a step may take so long; 0 turns this off."
        return Failure(rank, "hang", hang.message, hint, "", EXIT_RETRY, str(page), round(quiet_s, 1))

    def _stacks(self) -> dict[int, str]:
        """rank -> the stacks that it wrote on request, as far as it could."""
        ranks = range(self.job.num_processes)
        sizes = {rank: _sizes(self.log_dir, rank) for rank in ranks}
        with contextlib.suppress(OSError):
            (self.log_dir / STACKS_REQUEST).write_text("write your stacks\n", encoding="utf-8")
        began, is_signalled = time.monotonic(), False
        while missing := [rank for rank in ranks if _sizes(self.log_dir, rank) == sizes[rank]]:
            waited_s = time.monotonic() - began
            if waited_s > STACKS_WAIT_S:
                break
            if waited_s > SIGNAL_AFTER_S and not is_signalled:
                is_signalled = True
                for rank in missing:
                    _ask_by_signal(self.watch.beats.get(rank))
            time.sleep(0.1)
        self._wait_until_written()
        return {rank: "".join(map(_read, _answers(self.log_dir, rank))) for rank in ranks}

    def _wait_until_written(self) -> None:
        ends = time.monotonic() + STACKS_WAIT_S
        before: list[tuple[int, ...]] = []
        while (sizes := [_sizes(self.log_dir, rank) for rank in range(self.job.num_processes)]) != before or any(
            self._is_writing(rank) for rank in self.watch.beats
        ):
            if time.monotonic() > ends:
                return
            before = sizes
            time.sleep(WRITING_S)

    def _is_writing(self, rank: int) -> bool:
        """A busy machine may take longer than WRITING_S between two lines."""
        thread = self.watch.beats[rank].thread
        return any(answer and not is_whole(answer, thread) for answer in map(_read, _answers(self.log_dir, rank)))


def _ask_by_signal(beat: Beat | None) -> None:
    """Works whatever a process of this host does. A stopped one first writes where it stood, and only then goes on."""
    if beat is None or beat.host != socket.gethostname():
        return
    process = ProcessIdentity(beat.pid, beat.pid_start)
    signal_process(process, signal.SIGUSR1)
    signal_process(process, signal.SIGCONT)


def _answers(log_dir: Path, rank: int) -> tuple[Path, ...]:
    """Where a rank writes its stacks. The signal's come last: where a stopped process stood goes before where it went on to."""
    return stacks_file(log_dir, rank), signal_stacks_file(log_dir, rank)


def _read(answer: Path) -> str:
    try:
        return answer.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sizes(log_dir: Path, rank: int) -> tuple[int, ...]:
    sizes: list[int] = []
    for path in _answers(log_dir, rank):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            sizes.append(-1)
    return tuple(sizes)
