"""A run that is killed while it saves, over and over, and what must be true after each kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.environment import CPU_ENVIRONMENT
from support.commands import ROOT
from support.many_runs import TINY, planned
from support.matrix import write_rows
from trainer.checkpoint_format import list_checkpoints, newest_verified, verify

WORLD, KEEP = 2, 2
RECIPE = """
model: {{source: "{source}", dtype: fp32}}
method: {{name: full}}
data: {{files: rows.jsonl, max_length: 64}}
train: {{max_steps: {steps}, micro_batch: 1, global_batch: 2, learning_rate: 1e-4}}
parallel: {{zero: {zero}}}
checkpoint: {{every_steps: 1, keep: {keep}, async: {asynchronous}, on_error: {on_error}}}
"""


class Server:
    """The process that forks the ranks; see chaos_server.py."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "server.log").open("wb")
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            **CPU_ENVIRONMENT,
        }
        env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "LOCAL_WORLD_SIZE": str(WORLD)}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "chaos_server.py")],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def attempt(self, run: Path, number: int, accident: dict[str, Any] | None) -> dict[str, Any]:
        """One start of the run's ranks, to its end or to the accident's."""
        order = {"plan": str(run / "plan.json"), "attempt": number, "world": WORLD, "accident": accident}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server has died; see server.log"
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


def plan_chaos(folder: Path, name: str, zero: int, asynchronous: bool, steps: int, on_error: str = "stop") -> Path:
    """A planned and prepared run of the tiny model that saves after every step. Returns its folder."""
    if not (folder / "rows.jsonl").exists():
        write_rows(folder, 8)
    text = RECIPE.format(
        source=TINY, keep=KEEP, zero=zero, asynchronous=str(asynchronous).lower(), steps=steps, on_error=on_error
    )
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return planned(folder, f"{name}.yaml", name, WORLD)


def every_loss(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step of every attempt, in the order in which they were taken."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def saved_steps(run: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


@dataclass
class Table:
    """What was killed, and where."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(who, before what) -> how often."""
    resumes: int = 0
    steps_compared: int = 0

    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(error, what happened) -> how often."""

    def page(self, num_random: int) -> str:
        """docs/chaos.md."""
        who = sorted({who for who, _ in self.kills})
        lines = [
            "# Kills and refusing disks",
            "",
            f"Written by `make chaos`: every call with which a save changes the disk, once for each rank, then {num_random} kills at random.",
            "Two processes, ZeRO-2 and ZeRO-3, written beside training and with training waiting. Each start is the resume of the kill before it.",
            "",
            f"{self.kills.total()} kills, {self.resumes} resumes, {self.steps_compared} losses compared with those of a run that was never",
            "interrupted: all bit-identical. After each kill every checkpoint that can be seen was whole, none that was whole had gone.",
            "",
            "| SIGKILL before | " + " | ".join(who) + " |",
            "|---|" + "---|" * len(who),
        ]
        for point in dict.fromkeys(point for _, point in self.kills):
            lines.append(f"| {point} | " + " | ".join(str(self.kills.get((w, point), 0) or "") for w in who) + " |")
        lines += ["", "| the disk answers | what happened | saves |", "|---|---|---|"]
        lines += [f"| {error} | {what} | {count} |" for (error, what), count in self.refusals.items()]
        return "\n".join(lines) + "\n"


class Chain:
    """One run, killed in one save after the other; each start is also the resume of the kill before."""

    def __init__(self, server: Server, run: Path, straight: dict[int, float], table: Table) -> None:
        self.server, self.run, self.straight, self.table = server, run, straight, table
        self.number = 0
        self.compared = 0

    def start(self, accident: dict[str, Any], codes: Sequence[int] = ()) -> list[list[str]]:
        """Start it once more; afterwards everything that must hold is checked. Returns the calls of the accident's save.

        `codes`: the exit codes of the ranks; without, at least one is killed.
        """
        self.number += 1
        before = saved_steps(self.run)
        answer = self.server.attempt(self.run, self.number, accident)
        found = answer["statuses"]
        assert found == list(codes) if codes else -9 in found, (found, accident, self.log(0), self.log(1))
        self.check(before)
        self.table.resumes += self.number > 1
        return answer["calls"]

    def check(self, before: list[int]) -> None:
        """No good checkpoint is gone, none that can be seen is damaged, and no loss differs from the straight run's.

        `before`: the steps that were saved when the attempt began.
        """
        root, newest_before = self.run / "checkpoints", max(before, default=0)
        for _, path in list_checkpoints(root):
            assert verify(path) == [], path
        newest, skipped = newest_verified(root) if root.is_dir() else (None, [])
        assert skipped == []
        step = int(newest.name.removeprefix("step_")) if newest else 0
        assert step >= newest_before, "a good checkpoint was deleted"
        assert len(saved_steps(self.run)) >= min(len(before), KEEP), "an older one went before the new one was there"
        losses = every_loss(self.run) if (self.run / "metrics.jsonl").exists() else []
        for at, loss in losses[self.compared :]:
            assert loss == self.straight[at], f"step {at} after attempt {self.number}"
        if losses[self.compared :] and self.number > 1:
            # The attempt has begun right after a checkpoint that could be seen.
            assert losses[self.compared][0] == newest_before + 1
        self.table.steps_compared += len(losses) - self.compared
        self.compared = len(losses)

    def log(self, rank: int) -> str:
        """The end of a rank's log."""
        return (self.run / f"rank_{rank}.log").read_text(encoding="utf-8", errors="replace")[-5000:]

    def kill(self, ranks: list[int], call: int, does: str = "kill") -> list[list[str]]:
        """Let these ranks die in the second save of a start; a call that is never reached leaves it whole."""
        step = max(saved_steps(self.run), default=0) + 2
        return self.start({"step": step, "ranks": ranks, "call": call, "does": does, "until": step + 1})

    def boundaries(self) -> list[list[tuple[int, str]]]:
        """What one save does to the disk, for each rank: (number of the call, what it is). Two saves are spent on it."""
        step = max(saved_steps(self.run), default=0) + 2
        return [points_of(calls, step) for calls in self.kill([], -1)]


def points_of(calls: list[str], step: int) -> list[tuple[int, str]]:
    """Of the many writes of one file the first, a middle one and the last; every other call. Named without numbers."""
    points: list[tuple[int, str]] = []
    at = 0
    while at < len(calls):
        end = at
        while end + 1 < len(calls) and calls[end + 1] == calls[at] and calls[at].startswith("write"):
            end += 1
        points += [(i, _named(calls[i], step)) for i in sorted({at, (at + end) // 2, end})]
        at = end + 1
    return points


def _named(call: str, step: int) -> str:
    """The call without the numbers that change from save to save."""
    for number, word in ((step, "N"), (step - 2, "N-2")):
        call = call.replace(f"step_{number:06d}", f"step_{word}")
    name, temporary, _ = call.partition(".tmp-")
    return name + ".tmp" if temporary else call
