"""The log folder of a job: rank_N.log, agent.log, failure_rank_N.json, and what else its processes leave there."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

AGENT_LOG = "agent.log"
AGENT_FAILURE = "failure_agent.json"
"""Like failure_rank_N.json, for what no worker could write: its node was lost, or it never started."""
WAITING = "waiting.txt"
"""One line, there as long as the job waits for something: for whom, and how long it will."""
_BLOCK_BYTES = 64 * 1024


def rank_log(log_dir: str, rank: int) -> Path:
    """The log of a rank; of the agent for rank -1."""
    return Path(log_dir) / (f"rank_{rank}.log" if rank >= 0 else AGENT_LOG)


def tail(path: Path, num_lines: int) -> str:
    """The last lines, without reading the whole file; "" when there is no such file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return ""
    with file:
        position = file.seek(0, 2)
        data = b""
        while position > 0 and data.count(b"\n") <= num_lines:
            step = min(_BLOCK_BYTES, position)
            position = file.seek(position - step)
            data = file.read(step) + data
    return "\n".join(data.decode("utf-8", errors="replace").splitlines()[-num_lines:])


def rank_log_tails(log_dir: str, num_lines: int = 60) -> dict[int, str]:
    """rank -> the end of its log."""
    return {rank: tail(rank_log(log_dir, rank), num_lines) for rank in _ranks(log_dir, "rank_*.log")}


def read_failures(log_dir: str) -> list[dict[str, Any]]:
    """What failing workers, and the agent, wrote, earliest first. A file cut short by a kill is left out."""
    return _read_dated(_failure_files(log_dir))


def remove_failures(log_dir: str) -> None:
    """Deletes failure files of an earlier job in the same folder, which would be taken for this one's."""
    for path in _failure_files(log_dir):
        path.unlink()


def write_agent_failure(log_dir: str, rank: int, kind: str, message: str, hint: str, exit_code: int) -> None:
    """A failure (see `job.Failure`) that the worker of `rank`, or -1, could not write itself."""
    value = {"rank": rank, "kind": kind, "message": message, "hint": hint, "exit_code": exit_code}
    write_json(Path(log_dir) / AGENT_FAILURE, {**value, "time_ns": time.time_ns()})


def write_exit(log_dir: str, rank: int, code: int) -> None:
    """How the worker of a rank ended (negative: by a signal), written by the process that started it."""
    write_json(Path(log_dir) / f"exit_rank_{rank}.json", {"rank": rank, "code": code, "time_ns": time.time_ns()})


def read_exits(log_dir: str) -> dict[int, int]:
    """rank -> exit code of the workers that have ended, the first to end first."""
    paths = [Path(log_dir) / f"exit_rank_{rank}.json" for rank in _ranks(log_dir, "exit_rank_*.json")]
    return {row["rank"]: row["code"] for row in _read_dated(paths)}


def remove_exits(log_dir: str) -> None:
    """Deletes what workers of an earlier job in the same folder left."""
    for rank in _ranks(log_dir, "exit_rank_*.json"):
        (Path(log_dir) / f"exit_rank_{rank}.json").unlink()


def waiting_for(log_dir: str) -> str:
    """What the job waits for at the moment; "" when it does not."""
    with contextlib.suppress(FileNotFoundError):
        return (Path(log_dir) / WAITING).read_text(encoding="utf-8").strip()
    return ""


def write_json(path: Path, value: Any) -> None:
    """Through a temporary name: a reader sees all of it or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)


def ordered_logs(log_dir: str) -> list[Path]:
    """The log to read first comes first: of the rank that failed first, then all ranks, then the agent."""
    ranks = _ranks(log_dir, "rank_*.log")
    failed = [f.get("rank") for f in read_failures(log_dir)][:1]
    ranks.sort(key=lambda rank: (rank not in failed, rank))
    paths = [rank_log(log_dir, rank) for rank in ranks]
    agent = Path(log_dir) / AGENT_LOG
    return [*paths, agent] if agent.is_file() else paths


def format_line(path: Path, line: str) -> str:
    """ "[rank 3] line"; "[agent] line" for the log of the agent."""
    return f"[{path.stem.replace('_', ' ')}] {line}"


def iter_follow(
    log_dir: str, is_over: Callable[[], bool], poll_s: float = 0.2, start: Mapping[Path, int] | None = None
) -> Iterator[tuple[Path, str]]:
    """Yields (log, line) from the beginning of every log, also of those that appear later, until `is_over()`.

    `start`: the byte from which a log is read, where it is not its first. All that was written before `is_over()` turned true is yielded, the unfinished last lines too. Blocks in between.
    """
    followed = {path: _Follower(position) for path, position in (start or {}).items()}
    while True:
        over = is_over()
        for path in ordered_logs(log_dir):
            follower = followed.setdefault(path, _Follower())
            for line in follower.read(path, final=over):
                yield path, line
        if over:
            return
        time.sleep(poll_s)


class _Follower:
    """The reading position in one growing file; keeps a cut line, or half a character, until the rest arrives."""

    def __init__(self, position: int = 0) -> None:
        self._position = position
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._partial = ""

    def read(self, path: Path, final: bool) -> list[str]:
        """The complete lines since the last call; with `final` also the last, incomplete one."""
        with path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._partial = (self._partial + self._decoder.decode(data, final)).split("\n")
        if final and self._partial:
            lines.append(self._partial)
            self._partial = ""
        return [line.rstrip("\r") for line in lines]


def _failure_files(log_dir: str) -> list[Path]:
    paths = [Path(log_dir) / f"failure_rank_{rank}.json" for rank in _ranks(log_dir, "failure_rank_*.json")]
    agent = Path(log_dir) / AGENT_FAILURE
    return [*paths, agent] if agent.is_file() else paths


def _read_dated(paths: list[Path]) -> list[dict[str, Any]]:
    """The JSON objects, by their `time_ns`. A file cut short by a kill is left out."""
    found: list[dict[str, Any]] = []
    for path in paths:
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(value, dict):
                found.append(value)
    return sorted(found, key=lambda row: row.get("time_ns", 0))


def _ranks(log_dir: str, pattern: str) -> list[int]:
    """N of the files rank_N.log or failure_rank_N.json, in numeric order."""
    found = (re.search(r"rank_(\d+)\.", path.name) for path in Path(log_dir).glob(pattern))
    return sorted(int(match[1]) for match in found if match)
