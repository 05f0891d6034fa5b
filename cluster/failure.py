"""Which failure came first, and what it means. Pure functions over text."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from .explain import explain
from .job import Failure
from .logs import rank_log

EXIT_USER = 2
EXIT_BUG = 70
EXIT_RETRY = 75
EXIT_STOPPED = 130

# What healthy ranks say when another one has gone: true, but never the cause.
_SECONDARY = re.compile(
    r"""
    Connection\ (closed|reset)\ by\ (remote\ )?peer | Broken\ pipe | Connection\ refused | pair\ closure
    | Socket\ (Timeout|closed) | socket\ error | Timed\ out\ waiting\ \d+ms\ for\ (send|recv)
    | ncclRemoteError | remote\ process\ exited | ncclSystemError | NCCL\ communicator\ was\ aborted
    | Watchdog\ caught\ collective\ operation\ timeout | collective\ operation\ timeout | Monitored\ ?Barrier
    | TCPStore | DistStoreError | DistNetworkError | Rendezvous\w*Error | ChildFailedError | SignalException
    | failed\ to\ (recv|send),\ got\ 0\ bytes | Timeout\ waiting\ for\ key | wait\ timeout\ after
    """,
    re.IGNORECASE | re.VERBOSE,
)
_AGENT_EXIT = re.compile(
    r"^\s*rank\s*: (?P<rank>\d+) \(local_rank: \d+\)\n\s*exitcode\s*: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)",
    re.MULTILINE,
)
_AGENT_CLOSED = re.compile(r"Sending process (\d+) closing signal")
_AGENT_SIGNALLED = re.compile(r"SignalException: Process \d+ got signal: (\d+)")
_EXCEPTION_LINE = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*|\S*python[\d.]*: .+)$")

_SIGNAL_NOTES: dict[int, tuple[int, str, str]] = {
    signal.SIGKILL: (
        EXIT_RETRY,
        "the kernel does this when memory runs out",
        "Look for it: dmesg -T | grep -i 'killed process'. Then use fewer processes on this host, a smaller "
        "train.micro_batch or data.max_length, or parallel.offload: none.",
    ),
    signal.SIGBUS: (
        EXIT_USER,
        "shared memory (/dev/shm) or the disk behind a mapped file is full, or a mapped file was cut short",
        "Check: df -h /dev/shm . In a container, start it with --shm-size=16g or --ipc=host.",
    ),
    signal.SIGSEGV: (
        EXIT_BUG,
        "a compiled library crashed",
        "The end of the rank's log names the Python line. Usual cause: packages that were not built for each other; launch doctor",
    ),
    signal.SIGABRT: (EXIT_BUG, "a compiled library gave up", "The end of the rank's log says why."),
    signal.SIGILL: (
        EXIT_USER,
        "this CPU lacks an instruction that a compiled library uses",
        "Install builds for this CPU, or run on a newer one.",
    ),
    signal.SIGTERM: (
        EXIT_RETRY,
        "somebody or a scheduler asked it to end",
        "Look at the scheduler's limits (time, memory, preemption); then launch runs resume RUN",
    ),
    signal.SIGHUP: (EXIT_RETRY, "its terminal or session was closed", "Start it with --detach."),
}


def worker_exit_codes(agent_log: str) -> dict[int, int]:
    """rank -> exit code (negative: a signal) of each worker that ended by itself, the first to end first.

    Read from the report that torch.distributed.run prints when it fails. Workers that it ended itself are left out.
    """
    closed = set(_AGENT_CLOSED.findall(agent_log))
    report, _, root = agent_log.rpartition("Root Cause (first observed failure):")
    matches = [*_AGENT_EXIT.finditer(root), *_AGENT_EXIT.finditer(report)]
    codes = {int(m["rank"]): int(m["code"]) for m in matches if m["pid"] not in closed}
    # When the agent signalled all of them, it was itself asked to end.
    return codes or {int(m["rank"]): int(m["code"]) for m in matches}


def is_secondary(text: str) -> bool:
    """Whether an error text only says that another rank has gone."""
    return _SECONDARY.search(text) is not None


def first_cause(
    failures: Sequence[Mapping[str, Any]],
    exit_codes: Mapping[int, int],
    agent_log: str,
    rank_log_tails: Mapping[int, str],
    log_dir: str,
) -> Failure:
    """The failure that started it all.

    `failures`: contents of failure_rank_N.json. `exit_codes`: rank -> code of the workers that ended by themselves, the
    first to end first; rank -1 is the agent. A rank that said why it failed goes before one that could not; a rank that
    was killed goes before those that only lost their connection to it.
    """
    told = sorted(failures, key=lambda f: int(f.get("time_ns", 0)))
    primary = [f for f in told if _is_primary(f)]
    if primary:
        return _from_file(primary[0], log_dir)
    killed = [(rank, -code) for rank, code in exit_codes.items() if code < 0]
    if told_to_end := _AGENT_SIGNALLED.search(agent_log):
        # What its workers then ended with follows from it.
        return _from_signal(-1, int(told_to_end[1]), agent_log, log_dir)
    if killed:
        # SIGTERM and SIGABRT often follow from another rank's end; the others never do.
        rank, signum = min(killed, key=lambda k: k[1] in (signal.SIGTERM, signal.SIGABRT))
        return _from_signal(rank, signum, rank_log_tails.get(rank, ""), log_dir)
    if told:
        return _from_file(told[0], log_dir)
    return _from_logs(exit_codes, agent_log, rank_log_tails, log_dir)


def _is_primary(data: Mapping[str, Any]) -> bool:
    """A mistake of the user is a cause whatever its words are."""
    if data.get("exit_code") == EXIT_STOPPED:
        return False
    return data.get("kind") == "user" or not is_secondary(str(data.get("message", "")))


def _from_file(data: Mapping[str, Any], log_dir: str) -> Failure:
    """A failing worker's own words; an exception that nobody foresaw is looked up in the table of known ones."""
    rank = int(data.get("rank", -1))
    message, traceback = str(data.get("message", "")), str(data.get("traceback", ""))
    kind, exit_code, hint = (
        str(data.get("kind", "bug")),
        int(data.get("exit_code", EXIT_BUG)),
        str(data.get("hint", "")),
    )
    if kind == "bug" and (known := explain(f"{message}\n{traceback}")):
        kind, exit_code = known.kind, {"user": EXIT_USER, "retry": EXIT_RETRY}.get(known.kind, EXIT_BUG)
        hint = hint or known.hint
    if kind == "bug" and is_secondary(message):
        # Whoever went first may not do so again.
        kind, exit_code = "retry", EXIT_RETRY
    if is_secondary(message) and not hint:
        hint = "Another rank went first and left no message; look at the ends of all logs, and at dmesg -T."
    log_file = str(data.get("log_file", "")) or str(rank_log(log_dir, rank))
    return Failure(rank, kind, message, hint, traceback, exit_code, log_file)


def _from_signal(rank: int, signum: int, log_tail: str, log_dir: str) -> Failure:
    try:
        name = signal.Signals(signum).name
    except ValueError:
        name = "an unknown signal"
    exit_code, cause, hint = _SIGNAL_NOTES.get(signum, (EXIT_BUG, "", "The end of the log may say more."))
    who = f"rank {rank}" if rank >= 0 else "the agent that watches over the workers"
    message = f"{who} was killed by {name} (signal {signum})" + (f"; {cause}" if cause else "")
    if signum == signal.SIGABRT and (known := explain(log_tail)):
        hint = known.hint
    kind = "preempted" if signum == signal.SIGTERM else "killed"
    return Failure(rank, kind, message, hint, log_tail, exit_code, str(rank_log(log_dir, rank)))


def _from_logs(
    exit_codes: Mapping[int, int], agent_log: str, rank_log_tails: Mapping[int, str], log_dir: str
) -> Failure:
    """Workers that ended before they could write a failure file: their last exception is in a log."""
    by_rank = {rank: code for rank, code in exit_codes.items() if rank >= 0}
    rank, code = next(iter(by_rank.items()), (-1, exit_codes.get(-1, EXIT_BUG)))
    who = f"rank {rank}" if rank >= 0 else "the agent that watches over the workers"
    texts = [(rank, rank_log_tails.get(rank, "")), *rank_log_tails.items(), (-1, agent_log)]
    told = [(owner, text, line) for owner, text in texts if (line := _exception_line(text))]
    owner, text, message = (
        told[0] if told else (rank, agent_log, f"{who} ended with exit code {code} and left no message")
    )
    known = explain(f"{message}\n{text}")
    kind = known.kind if known else {EXIT_USER: "user", EXIT_RETRY: "retry"}.get(code, "bug")
    exit_code = {"user": EXIT_USER, "retry": EXIT_RETRY}.get(kind, EXIT_BUG)
    hint = known.hint if known else "The whole log may say more."
    return Failure(rank, kind, message, hint, text, exit_code, str(rank_log(log_dir, owner)))


def _exception_line(log: str) -> str:
    """The line "SomeError: what" that ends the last traceback which is a cause, or Python's own complaint; else ""."""
    lines = [line for line in log.splitlines() if _EXCEPTION_LINE.match(line)]
    return next((line for line in reversed(lines) if not is_secondary(line)), "")
