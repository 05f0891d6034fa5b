"""Which sequence-parallel sizes a model and a set of processes allow, and which one `auto` takes. Pure.

The rules are those of DeepSpeed Ulysses (arXiv 2309.14509; deepspeed/runtime/sequence_parallel/ulysses_sp.py): an
all-to-all gives each of sp processes the whole row for a part of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .attention_kinds import SLIDING
from .combinations import source_of
from .compatibility import broken
from .compatibility_table import MANY, RULES, Rule
from .errors import Problem
from .model_facts import ModelFacts

_MAX_SHOWN = 64
_HEADS = next(rule for rule in RULES if rule.name == "shared-heads")


@dataclass(frozen=True)
class Candidate:
    """One layout that `auto` may take, with its estimate."""

    sp: int
    zero_stage: int
    needs_gb: float


def sizes_of_heads(facts: ModelFacts, largest: int) -> list[int]:
    """Sizes up to `largest` that the heads allow: they divide the query heads; they and the kv heads divide one another.

    1 only, where the model's attention cannot be shared at all.
    """
    if _unshared(facts):
        return [1]
    kv = facts.num_kv_heads
    return [n for n in range(1, largest + 1) if facts.num_heads % n == 0 and (kv % n == 0 or n % kv == 0)]


def _unshared(facts: ModelFacts) -> Rule | None:
    """The rule by which this model's attention is never shared."""
    rules = [rule for kind in facts.attention for rule in broken({"sp": MANY, "attention": kind})]
    return next((rule for rule in rules if "sp" in rule.when), None)


def allowed_sp(world: int, facts: ModelFacts | None) -> list[int]:
    """Sizes that divide `world` processes and that the heads allow; without facts, the former only."""
    sizes = sizes_of_heads(facts, world) if facts else range(1, world + 1)
    return [n for n in sizes if world % n == 0]


def size_problem(wanted: int, world: int, facts: ModelFacts | None, flag: str) -> Problem:
    """Why `wanted` does not fit, what does here, and with which number of processes more would.

    `flag` is the option that sets the number of processes, such as "--cpu " or "--gpus free:".
    """
    allowed = allowed_sp(world, facts)
    heads = f" and {facts.num_heads} heads ({facts.num_kv_heads} kv)" if facts else ""
    processes = f"{world} process{'es' if world > 1 else ''}"
    nearest = min(allowed, key=lambda n: (abs(n - wanted), -n))
    hint = [f"Allowed with {processes}: {', '.join(map(str, allowed))}; write sp: {nearest}, or auto."]
    change, source = f"parallel:\n  sp: {nearest}", source_of(_HEADS.name)
    if facts is None:
        hint.append("sp must divide the number of processes.")
        return Problem("parallel.sp", f"sp {wanted} does not fit {processes}", "\n".join(hint), change, source)
    unshared = _unshared(facts)
    if unshared:
        hint.append(f"{unshared.reason[0].upper()}{unshared.reason[1:]}.")
        message = f"sp {wanted}: {facts.model_type} cannot share rows"
        return Problem("parallel.sp", message, "\n".join(hint), change, source_of(unshared.name))
    hint.append(f"{_HEADS.reason}.")
    others = [n for n in sizes_of_heads(facts, min(facts.num_heads, _MAX_SHOWN)) if n > 1 and n not in allowed]
    if others:
        starts = "; ".join(f"{flag}{n} with sp: {n}" for n in others[:3])
        hint.append(f"With other numbers of processes (or a multiple of them): {starts}.")
    return Problem("parallel.sp", f"sp {wanted} does not fit {processes}{heads}", "\n".join(hint), change, source)


def smallest_that_fits(candidates: Sequence[Candidate], budget_gb: float) -> Candidate:
    """The first candidate that needs at most `budget_gb`; else, of those with the largest sp, the one that needs least."""
    fitting = [c for c in candidates if c.needs_gb <= budget_gb]
    return fitting[0] if fitting else min(candidates, key=lambda c: (-c.sp, c.needs_gb))


def row_notes(sp: int, row_length: int, packing: bool, facts: ModelFacts | None) -> list[str]:
    """What sharing rows means for this model and data, for the reason line. `row_length`: tokens of a micro batch."""
    if sp == 1:
        return []
    notes = []
    padded = -(-row_length // sp) * sp
    if packing:
        total = f"{row_length} tokens of a micro batch" + (f", padded to {padded}" if padded != row_length else "")
        notes.append(f"each computes {padded // sp} of the {total}")
    else:
        notes.append(f"rows are padded to a multiple of {sp}")
    if facts is None:
        notes.append("the heads are not known before the download; training checks them when it starts")
    if facts is not None and SLIDING in facts.attention and facts.sliding_window:
        notes.append(f"the window of {facts.sliding_window} tokens is kept: in attention every head sees the whole row")
    return notes
