"""What the plan says about memory and disk: the estimate, and a warning with the smallest change that fits. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.inventory import Selection
from trainer.spec import TrainSpec

from .combinations import joins_experts, on_or_off
from .compatibility import works
from .compatibility_table import AXES
from .memory import MemoryEstimate, MemoryInputs, checkpoint_copy, estimate, inputs_of
from .memory_change import smallest_change
from .model_facts import ModelFacts


@dataclass(frozen=True)
class FreeMemory:
    """What one of several hosts has free now."""

    host: str
    free_gb: float
    """In 2**30 bytes."""
    num_processes: int
    """Of the run, on that host."""


def estimate_plan(spec: TrainSpec, facts: ModelFacts | None) -> MemoryEstimate | None:
    """None when the model's sizes are unknown. Raises LaunchError for LoRA targets that match no layer."""
    return None if facts is None else estimate(inputs_of(spec, facts))


def budget_gb(selection: Selection, host_gb: float) -> float:
    """Memory that one process may use, in 2**30 bytes: of the fullest device, or its part of the host; 0: unknown."""
    if selection.kind == "cpu":
        return host_gb / selection.num_processes
    return min(d.memory_free_gb for d in selection.devices)


def has_room_for_a_copy(inputs: MemoryInputs, selection: Selection, host_gb: float) -> bool:
    """Whether `checkpoint.async: auto` copies: on CPU a tenth of what the process needs, on GPUs half of the host's memory.

    False where the host's memory is unknown.
    """
    inputs = replace(inputs, copies_checkpoint=True)
    needs, copy_gb = estimate(inputs), checkpoint_copy(inputs).gb
    if selection.kind == "cpu":
        return copy_gb <= needs.total_gb / 10 and needs.total_gb <= budget_gb(selection, host_gb)
    return sum(t.gb for t in needs.host_terms) * selection.num_processes <= host_gb / 2


def memory_warnings(
    spec: TrainSpec, memory: MemoryEstimate | None, selection: Selection, facts: ModelFacts | None, host_gb: float
) -> list[str]:
    """A line for each device, or for the host, that has less than the estimate."""
    if memory is None or facts is None:
        return []
    needs = memory.total_gb
    if selection.kind == "cpu":
        tight = [("this host", host_gb / selection.num_processes)] if host_gb else []
    else:
        tight = [(f"device {d.index}", d.memory_free_gb) for d in selection.devices if d.memory_free_gb]
    warnings = []
    rest = {
        "generation": on_or_off(spec.evaluate.samples_every_steps),
        "compile": on_or_off(spec.optim.compile),
        "dtype": spec.model.dtype,
    }
    stages = AXES["zero"].values[:3] if joins_experts(facts) else AXES["zero"].values
    max_zero_stage = max(int(stage) for stage in stages if works({**rest, "zero": stage}))
    for name, has in tight:
        if needs > has:
            change = smallest_change(inputs_of(spec, facts), has, host_gb, max_zero_stage)
            advice = f"; {change.key}: {change.value} would need {change.total_gb:.1f} GB" if change else ""
            warnings.append(f"about {needs:.1f} GB are needed per process, {name} has {has:.1f} GB for it{advice}")
    moved = sum(t.gb for t in memory.host_terms) * selection.num_processes
    if host_gb and moved > host_gb:
        what = [f"parallel.offload {spec.parallel.offload}"] * (spec.parallel.offload != "none")
        what += ["the copy of checkpoint.async"] * spec.checkpoint.asynchronous
        needing = " and ".join(what) + (" needs" if len(what) == 1 else " need")
        warnings.append(f"{needing} about {moved:.0f} GB of CPU memory, this host has {host_gb:.0f} GB")
    return warnings


def free_memory_warnings(memory: MemoryEstimate | None, kind: str, hosts: tuple[FreeMemory, ...]) -> list[str]:
    """A line for each of several hosts whose memory others use at the moment. `kind`: of the devices, cpu or cuda."""
    if memory is None:
        return []
    each_gb = memory.total_gb if kind == "cpu" else sum(term.gb for term in memory.host_terms)
    return [
        f"about {each_gb * host.num_processes:.1f} GB of memory are needed on {host.host}, which has {host.free_gb:.1f} GB free: "
        "end other programs there, or choose another host"
        for host in hosts
        if each_gb * host.num_processes > host.free_gb
    ]
