"""The attempts of a run: what each came to, from where the next one goes on, and how all that is told."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from cluster.job import Failure
from cluster.retry import Cause, Fault, Verdict, cause_of, fingerprint
from trainer.checkpoint_format import MANIFEST, list_checkpoints

from .progress import Follower, clock
from .run_dir import RunDir, append_event, read_json
from .status import Attempt

DONE_CAUSE, STOPPED_CAUSE = "done", "stopped"


def earlier_attempts(run: RunDir) -> list[Attempt]:
    """Those that status.json names, to be called before this launcher writes its own. One that has no end was cut off."""
    if not run.status.is_file():
        return []
    data = read_json(run.status)
    attempts = [Attempt(**row) for row in data.get("attempts", [])]
    for attempt in attempts:
        if attempt.ended is None:
            attempt.ended, attempt.stage, attempt.cause = data["updated"], data["stage"], Cause.CRASH.value
            attempt.step = last_step(run, attempt.number)
            attempt.message = f"its launcher (pid {data['pid']} on {data['host']}) ended without a word"
    return attempts


def last_step(run: RunDir, attempt: int) -> int | None:
    """The last optimizer step that this attempt has done."""
    steps = [row["step"] for row in Follower(run.metrics).rows() if row["attempt"] == attempt]
    return steps[-1] if steps else None


def newest_step(run: RunDir) -> int | None:
    """The step of the newest checkpoint; the worker verifies it, and takes an older one where it is damaged."""
    steps = [step for step, path in list_checkpoints(run.checkpoints) if (path / MANIFEST).is_file()]
    return max(steps, default=None)


def fault_of(run: RunDir, attempt: int, stage: str, failure: Failure) -> Fault:
    """A failure as the retry policy looks at it. Before its first step, an attempt is where it began."""
    step = last_step(run, attempt)
    return Fault(cause_of(failure), stage, (newest_step(run) or 0) if step is None else step, fingerprint(failure))


def close(
    run: RunDir, attempt: Attempt, stage: str, cause: str, failure: Failure | None, verdict: Verdict | None
) -> None:
    """Write down how the attempt ended, and what follows; also in events.jsonl."""
    attempt.ended, attempt.stage, attempt.cause = time.time(), stage, cause
    attempt.step = last_step(run, attempt.number)
    if failure is not None:
        attempt.message, attempt.noticed_s = one_line(failure), failure.noticed_s
    if verdict is not None:
        attempt.retried, attempt.why, attempt.wait_s = verdict.retry, verdict.why, verdict.wait_s
        attempt.next_step = newest_step(run) if verdict.retry else None
    row: dict[str, Any] = dataclasses.asdict(attempt)
    with contextlib.suppress(OSError):  # a full disk is the supervisor's to tell
        append_event(run.events, "attempt_ended", {"attempt": row.pop("number"), **row})


def one_line(failure: Failure) -> str:
    """The first cause: which rank, and the first line of what it said."""
    text = failure.message.strip().partition("\n")[0]
    return text if failure.rank < 0 or text.startswith(("rank ", "hang: ")) else f"rank {failure.rank}: {text}"


def retry_note(ended: Attempt) -> str:
    """What is said when another attempt follows."""
    start = "from the beginning" if ended.next_step is None else f"from step {ended.next_step}"
    where = start if ended.stage == "train" else f"with {ended.stage}"
    wait = f" in {ended.wait_s:g} s" if ended.wait_s else ""
    return f"attempt {ended.number + 1} ({ended.why}): {ended.message}; going on {where}{wait}"


def reach_note(is_unknown: bool) -> str:
    """What is said when a job cannot be asked, and when it can be again."""
    return "the job cannot be reached; it may well go on" if is_unknown else "the job is reachable again"


def end_note(attempts: Sequence[Attempt]) -> str:
    """Why it was not tried again; "" where nobody would expect it to be."""
    last = attempts[-1] if attempts else None
    if last is None or not last.why or last.retried:
        return ""
    if len(attempts) == 1 and last.cause in (Cause.USER.value, Cause.BUG.value):
        return ""
    return f"not tried again: {last.why}" + (f" ({len(attempts)} attempts)" if len(attempts) > 1 else "")


def attempt_lines(attempts: Sequence[Attempt], now: float) -> list[str]:
    """A row an attempt: number, where it ended, cause, length, the first cause, what followed."""
    lines = []
    for a in attempts:
        where = a.stage + (f" step {a.step}" if a.step is not None else "")
        length = clock((now if a.ended is None else a.ended) - a.started)
        lines.append(f"  {a.number:<3} {where:<18} {a.cause or 'running':<11} {length:>8}  {a.message}".rstrip())
        noticed = f"noticed after {a.noticed_s:.1f} s; " if a.noticed_s is not None else ""
        follows = "tried again" if a.retried else "not tried again"
        if a.why:
            lines.append(f"      {noticed}{follows}: {a.why}")
    return lines
