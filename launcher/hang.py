"""Is training hung, and who is behind? Reads the signs of life that ranks leave in the job's log folder (trainer/heartbeat.py).

A hang is that NO rank has shown life for long: one that waits for a slow one is as silent as one that waits for a dead one,
but the slow one is not. Life is that the loop has gone on, or, where computing cannot be confused with waiting, that
the processor was used. How long is long depends on what a rank is doing: within a step `run.hang_s`; while the model is
loaded, in the first step, while a checkpoint is saved or answers are written, the longer of that and `run.timeout_s`, after
which the other ranks would give up anyway.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.heartbeat import heartbeat_file

BUSY_SHARE = 0.05
"""A rank that uses more of a core than this between two of its signs is computing."""
_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_STACK = re.compile(
    r"^(?:Current thread|Thread) (0x[0-9a-f]+) \(most recent call first\):\n((?:  .*\n)*)", re.MULTILINE
)
# The last line of the main thread's stack (of a script, of -m), of any other's, of one with more frames than faulthandler writes.
_OUTERMOST = re.compile(r"(?: in (?:<module>|_run_module_as_main|_bootstrap)|\n  \.\.\.)$")
# Where a rank waits for the others, and what only hands the call on.
_WAITS = "torch/distributed/distributed_c10d.py"
_PASSES_ON = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/utils/")


@dataclass(frozen=True)
class Beat:
    """What a rank last said; the keys of heartbeat_rank_N.json."""

    pid: int
    pid_start: int
    host: str
    thread: int
    """The thread that does the work, as faulthandler prints it."""
    beats: int
    """All ranks count alike: who has fewer is behind."""
    signs: int
    phase: str
    step: int
    """1-based; -1 outside of a step."""
    micro: int
    may_last: bool
    cpu_s: float
    time: float
    """By the clock of its host; only differences are used."""

    @property
    def place(self) -> str:
        """ "step 24, micro batch 1, backward"."""
        step = f"step {self.step}, " if self.step >= 0 else ""
        return step + (f"micro batch {self.micro + 1}, " if self.micro >= 0 else "") + self.phase


def read_beats(log_dir: Path, num_ranks: int) -> dict[int, Beat]:
    """rank -> its last sign; without those that have not begun, or are just being written."""
    found: dict[int, Beat] = {}
    for rank in range(num_ranks):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[rank] = Beat(**json.loads(heartbeat_file(log_dir, rank).read_text(encoding="utf-8")))
    return found


class HangWatch:
    """Keeps when each rank last showed life, by the launcher's own clock: those of other hosts may be wrong."""

    def __init__(self, num_ranks: int, hang_s: float, patience_s: float, waiting_is_idle: bool, now: float) -> None:
        """`waiting_is_idle`: a rank that waits uses no processor (gloo on CPU; NCCL spins)."""
        self.num_ranks, self.hang_s, self.patience_s = num_ranks, hang_s, max(hang_s, patience_s)
        self.waiting_is_idle = waiting_is_idle
        self.beats: dict[int, Beat] = {}
        self.life = dict.fromkeys(range(num_ranks), now)
        """rank -> when it last showed life."""
        self.seen = dict(self.life)
        """rank -> when its process last wrote anything: one that only waits goes on writing, a frozen one does not."""

    def observe(self, beats: Mapping[int, Beat], now: float) -> None:
        """Take in what `read_beats` found."""
        for rank, beat in beats.items():
            before = self.beats.get(rank)
            if before == beat:
                continue
            self.seen[rank] = now
            if before is None or _has_moved(before, beat) or (self._counts_work(beat) and _has_worked(before, beat)):
                self.life[rank] = now
            self.beats[rank] = beat

    def forgive(self, now: float) -> None:
        """Nothing could be known until now: all clocks begin anew."""
        self.life = dict.fromkeys(self.life, now)
        self.seen = dict(self.life)

    def _counts_work(self, beat: Beat) -> bool:
        return self.waiting_is_idle or beat.may_last

    def _limit_s(self, rank: int) -> float:
        beat = self.beats.get(rank)
        return self.patience_s if beat is None or beat.may_last else self.hang_s

    def is_hung(self, now: float) -> bool:
        """Whether no rank has shown life within its limit; never when `run.hang_s` is 0."""
        return self.hang_s > 0 and all(now - at > self._limit_s(rank) for rank, at in self.life.items())

    def quiet_s(self, now: float) -> float:
        """Seconds since any rank showed life."""
        return now - max(self.life.values())

    def silent_s(self, rank: int, now: float) -> float:
        """Seconds since this rank's process wrote anything."""
        return now - self.seen[rank]

    def frozen(self, now: float) -> tuple[int, ...]:
        """Ranks whose process has stopped writing, although writing needs nobody else."""
        return tuple(r for r in range(self.num_ranks) if self.silent_s(r, now) > max(self.quiet_s(now) / 2, 2.0))


def _has_moved(before: Beat, beat: Beat) -> bool:
    return (before.pid, before.beats, before.signs) != (beat.pid, beat.beats, beat.signs)


def _has_worked(before: Beat, beat: Beat) -> bool:
    return beat.cpu_s - before.cpu_s > BUSY_SHARE * (beat.time - before.time)


@dataclass(frozen=True)
class Hang:
    """A hang, understood."""

    behind: tuple[int, ...]
    message: str
    """One sentence: how long, where, who is behind and what it does."""
    page: str
    """Every rank: where it is, what it waits for, its stack."""


def understand(
    beats: Mapping[int, Beat],
    num_ranks: int,
    frozen: tuple[int, ...],
    stacks: Mapping[int, str],
    quiet_s: float,
) -> Hang:
    """Who is behind: frozen processes; else who has come least far; else, among equals, who does not wait for others.

    `stacks`: rank -> what it wrote. When all wait at the same place, none is named: each waits for another collective.
    """
    frames = {rank: _frames(stacks.get(rank, ""), beats[rank].thread) for rank in beats}
    absent = tuple(rank for rank in range(num_ranks) if rank not in beats)
    behind = frozen or absent or _behind(beats, frames)
    lines = {rank: _line(rank, beats.get(rank), rank in frozen, frames.get(rank, [])) for rank in range(num_ranks)}
    who = "; ".join(lines[rank] for rank in behind) or "all ranks wait, each for the others: " + "; ".join(
        lines.values()
    )
    names = f"rank {', '.join(map(str, behind))} {'is' if len(behind) == 1 else 'are'} behind: " if behind else ""
    message = f"hang: no rank has gone on for {quiet_s:.0f} s; {names}{who}"
    page = [message, ""]
    for rank in range(num_ranks):
        stack = [f"    {_where(frame)}" for frame in frames.get(rank, [])]
        page += [lines[rank], *(stack or ["    no stack: its process could not write one"])]
    return Hang(behind, message, "\n".join(page) + "\n")


def is_whole(text: str, thread: int) -> bool:
    """Whether the last stack of `thread` in what faulthandler has written so far goes down to its outermost frame."""
    stacks = _stacks_of(text, thread)
    return bool(stacks) and _OUTERMOST.search(stacks[-1].rstrip("\n")) is not None


def _behind(beats: Mapping[int, Beat], frames: Mapping[int, list[re.Match[str]]]) -> tuple[int, ...]:
    least = min(beat.beats for beat in beats.values())
    last = [rank for rank, beat in beats.items() if beat.beats == least]
    if len(last) == 1:
        return tuple(last)
    return tuple(rank for rank in last if frames[rank] and not _waits_in(frames[rank]))


def _line(rank: int, beat: Beat | None, is_frozen: bool, frames: list[re.Match[str]]) -> str:
    if beat is None:
        return f"rank {rank}: has not begun"
    state = ", its process is frozen" if is_frozen else ""
    if waits := _waits_in(frames):
        return f"rank {rank}: {beat.place}{state}, waits for the others in {waits}"
    return f"rank {rank}: {beat.place}{state}" + (f", at {_where(frames[0])}" if frames else "")


def _waits_in(frames: list[re.Match[str]]) -> str:
    """The collective that a rank waits in, and who called it; "" when it waits in none."""
    inside = [i for i, frame in enumerate(frames) if frame["file"].endswith(_WAITS)]
    if not inside:
        return ""
    callers = [f for f in frames[inside[-1] :] if not any(part in f["file"] for part in _PASSES_ON)]
    return frames[inside[-1]]["name"] + (f", called at {_where(callers[0])}" if callers else "")


def _where(frame: re.Match[str]) -> str:
    """ "trainer/data.py:88 in batch"."""
    return f"{'/'.join(Path(frame['file']).parts[-2:])}:{frame['line']} in {frame['name']}"


def _frames(text: str, thread: int) -> list[re.Match[str]]:
    """The frames of the thread that does the work, the innermost first, of the last stacks that a rank wrote."""
    stacks = _stacks_of(text, thread)
    return list(_FRAME.finditer(stacks[-1])) if stacks else []


def _stacks_of(text: str, thread: int) -> list[str]:
    return [stack for name, stack in _STACK.findall(text) if int(name, 16) == thread]
