"""What is measured: every row of the benchmark as a list of cases. Pure and standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

PRODUCT = "tunelaunch"
PEERS = ("llamafactory", "trl")
CONTENDERS = (PRODUCT, *PEERS)

COMPARED_ROWS = ("packed", "padded")
"""Rows that every contender runs; the others are of this project alone."""
ROWS = (*COMPARED_ROWS, "length", "document", "zero", "sp")

LORA_RANK = 16
LORA_ALPHA = 32
LEARNING_RATE = 2e-4
SEED = 42
QUICK_STEPS = 3


@dataclass(frozen=True)
class Case:
    """One training run of one contender."""

    row: str
    contender: str
    label: str
    """What sets it apart from the other cases of its row."""
    steps: int
    """Optimizer steps."""
    micro_batch: int
    """Rows of one forward pass of one process."""
    accumulate: int
    max_length: int
    """Tokens."""
    packing: bool
    processes: int
    zero: int | None
    """ZeRO stage; None leaves it to the recipe's default."""
    sp: int
    model: str
    """smollm2 | qwen2_shape."""
    data: str
    """rows: the chat rows given by --data; long: texts longer than any row."""
    limit_s: int
    """The whole command, training and start included."""

    @property
    def name(self) -> str:
        """Unique over all rows, and usable as a file name."""
        return f"{self.row}-{self.label}".replace(" ", "_").replace(",", "")

    def warm_up(self) -> Case:
        """The same command for one small step: byte code is written and tokenised data is cached."""
        return dataclasses.replace(self, label=f"{self.label} warm-up", steps=1, accumulate=1)


_BASE = Case(
    row="",
    contender=PRODUCT,
    label="",
    steps=0,
    micro_batch=1,
    accumulate=1,
    max_length=1024,
    packing=True,
    processes=1,
    zero=None,
    sp=1,
    model="smollm2",
    data="rows",
    limit_s=300,
)

BUDGET_MINUTES = {"packed": 10, "padded": 6, "length": 4, "document": 3, "zero": 5, "sp": 2}
"""Expected on two cores, warm-ups included; about 30 minutes in all."""


def cases_of(rows: list[str], contenders: list[str], steps: int | None, cores: int) -> list[Case]:
    """Every case, in the order in which it is run. `steps` replaces each row's own number of optimizer steps."""
    made = {"packed": _packed, "padded": _padded, "length": _length, "document": _document, "zero": _zero, "sp": _sp}
    found = [case for row in rows for case in made[row](cores)]
    chosen = [case for case in found if case.contender in contenders]
    return chosen if steps is None else [dataclasses.replace(case, steps=steps) for case in chosen]


def _packed(cores: int) -> list[Case]:
    base = dataclasses.replace(_BASE, row="packed", steps=7, accumulate=4, limit_s=600)
    return [dataclasses.replace(base, contender=c, label=c) for c in CONTENDERS]


def _padded(cores: int) -> list[Case]:
    base = dataclasses.replace(_BASE, row="padded", steps=9, micro_batch=4, packing=False, limit_s=300)
    return [dataclasses.replace(base, contender=c, label=c) for c in CONTENDERS]


def _length(cores: int) -> list[Case]:
    """Packed rows of natural documents: the cost of a token should hardly depend on the length of a row."""
    base = dataclasses.replace(_BASE, row="length")
    plan = ((512, 10), (1024, 8), (2048, 6), (4096, 4), (8192, 3))
    return [dataclasses.replace(base, label=f"{n} tokens", max_length=n, steps=steps) for n, steps in plan]


def _document(cores: int) -> list[Case]:
    """One document fills a row: here attention grows with the square of the length."""
    base = dataclasses.replace(_BASE, row="document", data="long")
    plan = ((1024, 6), (2048, 4), (4096, 3))
    return [dataclasses.replace(base, label=f"{n} tokens", max_length=n, steps=steps) for n, steps in plan]


def _zero(cores: int) -> list[Case]:
    """Two packed rows a step on one process or on two: what a stage, and what a second process costs."""
    base = dataclasses.replace(_BASE, row="zero", steps=4)
    cases = []
    for stage in (0, 1, 2, 3):
        for processes in (1, 2):
            label = f"ZeRO {stage}, {processes} process{'es' if processes > 1 else ''}"
            changes = {"label": label, "zero": stage, "processes": processes, "accumulate": 2 // processes}
            cases.append(dataclasses.replace(base, **changes))
    return [case for case in cases if case.processes <= max(cores, 1)]


def _sp(cores: int) -> list[Case]:
    """Two packed rows a step; SmolLM2's 9 heads do not divide by two, so a model of Qwen2's shape stands in."""
    base = dataclasses.replace(_BASE, row="sp", model="qwen2_shape", max_length=2048, steps=4, zero=2)
    plan = ((1, 1, 2), (2, 1, 1), (2, 2, 2))
    cases = []
    for processes, sp, accumulate in plan:
        label = f"sp {sp}, {processes} process{'es' if processes > 1 else ''}"
        changes = {"label": label, "processes": processes, "sp": sp, "accumulate": accumulate}
        cases.append(dataclasses.replace(base, **changes))
    return [case for case in cases if case.processes <= max(cores, 1)]
