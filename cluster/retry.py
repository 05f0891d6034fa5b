"""Whether a failed attempt is followed by another one. Pure: the same faults and limits give the same verdict."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .failure import EXIT_USER
from .job import Failure

MAX_WAIT_S = 300.0
_TRACEBACK = "Traceback (most recent call last)"
# Addresses, pids, ports and counts differ from time to time. The line numbers of a traceback say where it is, and stay.
_VARYING = re.compile(r"0x[0-9a-fA-F]+|(?<!line )(?<![\w.])\d[\d.,]*")


class Cause(enum.Enum):
    """What ended an attempt. The first four may go otherwise next time; each has a budget of its own."""

    CRASH = "crash"
    """A worker was killed by a signal, or met an error that may pass: CUDA, NCCL, network."""
    NODE_LOST = "node_lost"
    """A host went away, with all that ran on it."""
    PREEMPTION = "preemption"
    """A scheduler, or somebody else who is not us, asked it to end."""
    HANG = "hang"
    USER = "user"
    """Recipe, data or machine must be changed first."""
    BUG = "bug"
    """A Python error that nobody foresaw: it would come again."""


_OF_KIND = {
    "node_lost": Cause.NODE_LOST,
    "preempted": Cause.PREEMPTION,
    "hang": Cause.HANG,
    "retry": Cause.CRASH,
    "bug": Cause.BUG,
    "user": Cause.USER,
}
# They come from outside: that one comes twice at the same step says nothing about the run.
_FROM_OUTSIDE = (Cause.NODE_LOST, Cause.PREEMPTION)


@dataclass(frozen=True)
class RetryLimits:
    """How many faults of each kind a run survives within `per_steps` optimizer steps; 0: it ends with the first."""

    crashes: int = 0
    node_losses: int = 0
    preemptions: int = 0
    hangs: int = 0
    per_steps: int = 1000
    wait_s: float = 5.0
    """Before the first further attempt, in seconds; twice as long before each that follows, at most MAX_WAIT_S."""

    def of(self, cause: Cause) -> tuple[int, str, str]:
        """(budget, what is counted, recipe key) of a cause that has a budget."""
        return {
            Cause.CRASH: (self.crashes, "crash", "retry.crashes"),
            Cause.NODE_LOST: (self.node_losses, "lost node", "retry.node_losses"),
            Cause.PREEMPTION: (self.preemptions, "preemption", "retry.preemptions"),
            Cause.HANG: (self.hangs, "hang", "retry.hangs"),
        }[cause]


@dataclass(frozen=True)
class Fault:
    """One attempt's end, as far as the policy looks at it."""

    cause: Cause
    stage: str
    step: int
    """The last optimizer step that was done."""
    fingerprint: str
    """Equal for failures that are the same but for addresses, pids and counts; see `fingerprint`."""


@dataclass(frozen=True)
class Verdict:
    """What follows."""

    retry: bool
    why: str
    """A clause for people: "crash 1 of 3 within 1000 steps"."""
    wait_s: float = 0.0


def cause_of(failure: Failure) -> Cause:
    """A signal that says "change something" (a full /dev/shm, an unknown instruction) is the user's to fix."""
    if failure.kind == "killed":
        return Cause.USER if failure.exit_code == EXIT_USER else Cause.CRASH
    return _OF_KIND[failure.kind]


def fingerprint(failure: Failure) -> str:
    """The last Python traceback in it, or else its message, without what varies."""
    _, found, trace = failure.traceback.rpartition(_TRACEBACK)
    return _VARYING.sub("N", trace if found and failure.kind != "killed" else failure.message).strip()


def decide(faults: Sequence[Fault], limits: RetryLimits) -> Verdict:
    """Whether the attempt that ended with the last of `faults` is followed by another one.

    1. A user's mistake and a bug are never tried again: they would come again.
    2. The same failure in the same stage at the same step twice stops, whatever is left: it is no accident. Lost nodes
       and preemptions are exempt, because they come from outside.
    3. Otherwise the budget of its cause decides. What counts are the faults of that cause that lie less than
       `per_steps` optimizer steps back, so that a run of a week has as good a chance as one of an hour, while one that
       gets nowhere, or only crawls on, ends. A budget is used up when it has been spent on that many further attempts.

    `faults`: all of this run since a person last started or resumed it, the oldest first.
    """
    last, earlier = faults[-1], faults[:-1]
    if last.cause is Cause.USER:
        return Verdict(False, "it would fail again until something is changed")
    if last.cause is Cause.BUG:
        return Verdict(False, "an error in the program would come again")
    place = f"step {last.step}" if last.stage == "train" else f"stage {last.stage}"
    if last.cause not in _FROM_OUTSIDE and any(
        (f.fingerprint, f.stage, f.step) == (last.fingerprint, last.stage, last.step) for f in earlier
    ):
        return Verdict(False, f"the same failure at the same place ({place}) twice is no accident")
    budget, noun, key = limits.of(last.cause)
    if not budget:
        return Verdict(False, f"{key} is 0")
    number = sum(f.cause is last.cause and last.step - f.step < limits.per_steps for f in faults)
    within = f"within {limits.per_steps} steps"
    if number > budget:
        return Verdict(False, f"{noun} {number} {within}, and {key} is {budget}")
    wait_s = min(limits.wait_s * 2 ** (number - 1), MAX_WAIT_S)
    return Verdict(True, f"{noun} {number} of {budget} {within}", wait_s)
