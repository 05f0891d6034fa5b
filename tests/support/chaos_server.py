"""Starts the ranks of a training again and again, each time with one accident planned for one of its saves.

Importing torch, transformers and DeepSpeed takes longer than a tiny run, so it is done once and every attempt is a
fork. Reads a JSON object a line, answers with one:

    {"plan", "attempt", "world", "accident"} -> {"statuses": [...], "calls": [[...], ...]}

`accident`: {"step", "ranks": [...], "call": K, "does": "kill" | "half" | an errno's name, "until"}; null for none. K counts
the calls that change the disk under checkpoints/ while the checkpoint of `step` is being saved, on each rank by itself,
from 0. kill: SIGKILL before the call; half: half of what os.write was given, then SIGKILL; an errno: the call fails.
All ranks die, without an accident of their own, when the save of step `until` begins.
`calls`: those of the accident's step, a list for each rank, as they happened.
A status is an exit code, or minus the number of the signal.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer.engine
import trainer.saver
import trainer.train
from trainer.spec import Prepared, TrainError, read_plan
from trainer.storage_copy import Copier

CHANGES = ("mkdir", "write", "fsync", "replace", "rename", "unlink", "rmdir")


class Watch:
    """Counts, and once disturbs, the calls of this process that change the disk under `root`."""

    def __init__(self, root: str, rank: int, accident: dict[str, Any] | None, record: Path) -> None:
        self.root, self.record = root, record
        self.accident = accident if accident and rank in accident["ranks"] else None
        self.step = accident["step"] if accident else 0
        self.is_on = False
        self.calls: list[str] = []
        for name in CHANGES:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            where = _place(args[0], kwargs.get("dir_fd"))
            if not self.is_on or not where.startswith(self.root):
                return real(*args, **kwargs)
            number = len(self.calls)
            self.calls.append(f"{name} {Path(where).name}")
            if self.accident and self.accident["call"] == number:
                self._happen(name, real, args)
            return real(*args, **kwargs)

        return call

    def _happen(self, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> None:
        assert self.accident is not None
        does = self.accident["does"]
        self.write_record()
        if does not in ("kill", "half"):
            raise OSError(getattr(errno, does), os.strerror(getattr(errno, does)))
        if does == "half" and name == "write":
            real(args[0], args[1][: max(len(args[1]) // 2, 1)])
        os.kill(os.getpid(), signal.SIGKILL)

    def write_record(self) -> None:
        self.record.write_text(json.dumps(self.calls))


def _place(target: Any, dir_fd: int | None) -> str:
    """The path that a call is about: given as a path, as an open file, or relative to an open folder."""
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    path = os.fspath(target)
    path = path.decode() if isinstance(path, bytes) else path
    return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else os.path.abspath(path)


def train_as(rank: int, order: dict[str, Any], record: Path) -> int:
    """The exit code of one rank."""
    spec = read_plan(order["plan"])
    watch = Watch(spec.paths.checkpoints_dir, rank, order["accident"], record)
    begin = trainer.saver.Saver._begin

    def begin_watched(saver: Any, progress: dict[str, int]) -> None:
        if order["accident"] and progress["step"] >= order["accident"]["until"]:
            watch.write_record()
            os.kill(os.getpid(), signal.SIGKILL)
        watch.is_on = progress["step"] == watch.step
        begin(saver, progress)

    trainer.saver.Saver._begin = begin_watched  # type: ignore[method-assign]  # only in this process
    try:
        ranks = trainer.engine.init_ranks(spec)
        trainer.train.train(spec, Prepared.read(spec.paths.prepared), ranks, order["attempt"], Copier(spec, ranks))
    except TrainError as e:
        print(e, flush=True)
        return e.exit_code
    finally:
        watch.write_record()
    return 0


def attempt(order: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks and wait for them. When one has died the others live on for a moment, as under torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = Path(order["plan"]).parent
    records = [folder / f"calls_rank_{rank}.json" for rank in range(order["world"])]
    pids = {}
    for rank in range(order["world"]):
        records[rank].unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["world"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 70
            try:
                code = train_as(rank, order, records[rank])
            except BaseException as e:  # the border of the process
                print(f"{type(e).__name__}: {e}", flush=True)
            finally:
                os._exit(code)
        pids[pid] = rank
    statuses: dict[int, int] = {}
    while pids:
        pid, status = os.wait()
        statuses[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        if os.waitstatus_to_exitcode(status) != 0 and pids:
            time.sleep(order.get("grace_s", 0.1))
            for other in pids:
                os.kill(other, signal.SIGKILL)
    calls = [json.loads(r.read_text()) if r.exists() else [] for r in records]
    return {"statuses": [statuses[rank] for rank in range(order["world"])], "calls": calls}


if __name__ == "__main__":
    # What a training imports on its way: once, here.
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)
