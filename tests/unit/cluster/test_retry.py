"""The retry policy as a table: (what died, how, how often) -> whether there is another attempt, after how long, and why."""

from dataclasses import replace

import pytest

from cluster.job import Failure
from cluster.retry import MAX_WAIT_S, Cause, Fault, RetryLimits, cause_of, decide, fingerprint

LIMITS = RetryLimits(crashes=2, node_losses=3, preemptions=4, hangs=1, per_steps=100, wait_s=5)


def failure(kind: str, message: str = "m", exit_code: int = 75, traceback: str = "", rank: int = 0) -> Failure:
    return Failure(rank, kind, message, "", traceback, exit_code, "/logs/rank_0.log")


@pytest.mark.parametrize(
    ("kind", "exit_code", "cause"),
    [
        ("killed", 75, Cause.CRASH),  # SIGKILL
        ("killed", 70, Cause.CRASH),  # SIGSEGV, and SIGABRT, by which NCCL's watchdog ends a process
        ("killed", 2, Cause.USER),  # SIGBUS: /dev/shm is full
        ("retry", 75, Cause.CRASH),
        ("preempted", 75, Cause.PREEMPTION),
        ("node_lost", 75, Cause.NODE_LOST),
        ("hang", 75, Cause.HANG),
        ("user", 2, Cause.USER),
        ("bug", 70, Cause.BUG),
    ],
)
def test_cause(kind: str, exit_code: int, cause: Cause) -> None:
    assert cause_of(failure(kind, exit_code=exit_code)) is cause


def faults(text: str) -> list[Fault]:
    """ "C5 C7b": crashes at steps 5 and 7, of which the second is like no other; a stage stands before a colon."""
    causes = {"C": Cause.CRASH, "N": Cause.NODE_LOST, "P": Cause.PREEMPTION, "H": Cause.HANG}
    causes |= {"U": Cause.USER, "B": Cause.BUG}
    found = []
    for word in text.split():
        stage, _, rest = word.rpartition(":")
        digits = rest[1:].rstrip("abcdef")
        found.append(Fault(causes[rest[0]], stage or "train", int(digits), rest[0] + rest[1 + len(digits) :]))
    return found


@pytest.mark.parametrize(
    ("history", "retry", "wait_s", "why"),
    [
        ("C5", True, 5, "crash 1 of 2 within 100 steps"),
        ("C5 C7", True, 10, "crash 2 of 2 within 100 steps"),
        ("C5 C7 C9", False, 0, "crash 3 within 100 steps, and retry.crashes is 2"),
        # What lies far enough back no longer counts, and waits are short again.
        ("C5 C7 C105", True, 10, "crash 2 of 2 within 100 steps"),
        ("C5 C7 C107", True, 5, "crash 1 of 2 within 100 steps"),
        ("C5 C7 C107 C150 C199", False, 0, "crash 3 within 100 steps"),
        # A run that goes back to its checkpoint and gets nowhere does not gain by it.
        ("C50 C20 C30", False, 0, "crash 3 within"),
        # Each cause has a budget of its own.
        ("C5 C7 N8", True, 5, "lost node 1 of 3"),
        ("C5 N6 P7 H8", True, 5, "hang 1 of 1"),
        ("H8 H9", False, 0, "hang 2 within 100 steps, and retry.hangs is 1"),
        ("N1 N2 N3 N4", False, 0, "retry.node_losses is 3"),
        ("P1 P2 P3 P4", True, 40, "preemption 4 of 4"),
        # The same failure at the same step twice is no accident.
        ("C5 C5", False, 0, "the same failure at the same place (step 5) twice"),
        ("C5 C5b", True, 10, "crash 2 of 2"),
        ("C5 P6 C5", False, 0, "(step 5) twice"),
        ("C5 prepare:C5", True, 10, "crash 2 of 2"),
        ("merge:C5 merge:C5", False, 0, "(stage merge) twice"),
        # From outside, and not from what the run does.
        ("P5 P5", True, 10, "preemption 2 of 4"),
        ("N0 N0 N0", True, 20, "lost node 3 of 3"),
        # They would come again.
        ("U5", False, 0, "until something is changed"),
        ("B5", False, 0, "would come again"),
        ("C5 B6", False, 0, "would come again"),
    ],
)
def test_decision(history: str, retry: bool, wait_s: float, why: str) -> None:
    verdict = decide(faults(history), LIMITS)
    assert (verdict.retry, verdict.wait_s) == (retry, wait_s)
    assert why in verdict.why


@pytest.mark.parametrize(
    ("history", "key"), [("C1", "crashes"), ("N1", "node_losses"), ("P1", "preemptions"), ("H1", "hangs")]
)
def test_nothing_is_tried_again_unless_asked(history: str, key: str) -> None:
    assert decide(faults(history), RetryLimits()).why == f"retry.{key} is 0"


def test_waits_are_finite() -> None:
    many = [replace(faults("P1")[0], step=step) for step in range(20)]
    assert decide(many, replace(LIMITS, preemptions=20)).wait_s == MAX_WAIT_S


TRACE = """log line 17
Traceback (most recent call last):
  File "/x/trainer/train.py", line {line}, in train_step
    engine.step()
RuntimeError: CUDA error at 0x7f{address} in process {pid}
"""


def test_the_same_failure_is_recognised_whatever_varies() -> None:
    one = failure("retry", "CUDA error at 0x7fab", traceback=TRACE.format(line=88, address="ab12", pid=4711))
    again = failure("retry", "CUDA error at 0x7fcd", traceback="later\n" + TRACE.format(line=88, address="01", pid=12))
    elsewhere = failure("retry", "CUDA error at 0x7fab", traceback=TRACE.format(line=99, address="ab12", pid=4711))
    assert fingerprint(one) == fingerprint(again) != fingerprint(elsewhere)


def test_a_killed_rank_is_known_by_its_signal_and_not_by_the_end_of_its_log() -> None:
    kill = failure("killed", "rank 1 was killed by SIGKILL (signal 9)", traceback="step 3", rank=1)
    other = failure("killed", "rank 0 was killed by SIGKILL (signal 9)", traceback=TRACE)
    assert fingerprint(kill) == fingerprint(other)
    assert fingerprint(kill) != fingerprint(failure("killed", "rank 1 was killed by SIGSEGV (signal 11)"))
