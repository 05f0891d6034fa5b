"""Where a run's processes go: which backend, which hosts, which of their devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.inventory import Selection, cpu_selection, select
from cluster.job import Meeting, RayRequest
from cluster.nodes import Node, combined
from cluster.preflight import HostReport, Questions
from trainer.turn_templates import is_template_file

from .errors import LaunchError
from .model_source import SourceRef
from .plan_memory import FreeMemory
from .recipe_schema import Recipe

COMPARED_PACKAGES = (
    "tunelaunch",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
"""Hosts of one run must have the same versions of these."""
BY_NUMBER = r"free:([1-9]\d{0,3})"
"""What --gpus may be where Ray chooses the devices: how many of each node."""


@dataclass(frozen=True)
class Flags:
    """What the command line says about it."""

    gpus: str | None
    cpu: int | None
    backend: str | None
    nodes: int
    debug: bool
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Where:
    """The answer."""

    backend: str
    selection: Selection
    """All devices of all hosts."""
    nodes: tuple[Node, ...]
    """The hosts, in rank order; empty: this host alone."""
    host_memory_gb: float
    """Of the host that has least, in 2**30 bytes; 0 where it is unknown."""
    ray: RayRequest | None = None
    """What each job asks of Ray, where that is the backend."""
    reasons: tuple[tuple[str, str], ...] = ()
    """(name, text) for the plan: why there."""
    reports: tuple[HostReport, ...] = ()
    """What the hosts that were asked have; empty: this host alone."""
    free_memory: tuple[FreeMemory, ...] = ()
    """Of the hosts that may carry training, where there are several."""


def choose(flags: Flags, recipe: Recipe, source: SourceRef, run_root: Path, cache: Path) -> Where:
    """Raises LaunchError for flags that contradict each other, PlanError for hosts that do not fit together, ClusterError for devices."""
    backend = "debug" if flags.debug else flags.backend or ("ssh" if flags.hosts else "torchrun")
    require_consistent(flags, backend)
    if backend not in ("ssh", "ray"):
        return on_this_host(flags, backend)
    files = tuple(dict.fromkeys((*_data_files(recipe), *_model_files(source))))
    return on_several(flags, backend, meeting_of(recipe), questions_of(run_root, cache, source.kind, files))


def questions_of(run_root: Path, cache: Path, kind: str, files: tuple[str, ...]) -> Questions:
    """What hosts that carry a run are asked. `kind`: of the model's source."""
    from .hosts import questions_for, shared_folders

    return questions_for(shared_folders(run_root, cache, kind), files, COMPARED_PACKAGES)


def on_several(flags: Flags, backend: str, meeting: Meeting, questions: Questions) -> Where:
    """Under ssh or Ray, with what the hosts answered to `questions`. Raises as `choose`."""
    if backend == "ray":
        from .ray_place import choose_ray

        return choose_ray(flags, meeting.wait_s, os.environ, questions)
    from .hosts import gather, parse_hosts

    nodes, reports = gather(parse_hosts(flags.hosts, flags.gpus, flags.cpu), questions, meeting)
    memory_gb = min(report.inventory.memory_gb for report in reports)
    free = tuple(
        FreeMemory(node.host, report.report["memory_free_gb"], node.selection.num_processes)
        for node, report in zip(nodes, reports, strict=True)
    )
    return Where("ssh", combined(nodes), nodes, memory_gb, reports=reports, free_memory=free)


def on_this_host(flags: Flags, backend: str) -> Where:
    """The devices that `flags` name here. Raises LaunchError or ClusterError."""
    from cluster.nvml import read_inventory

    inventory = read_inventory()
    if flags.cpu is not None:
        selection = cpu_selection(flags.cpu, inventory)
    else:
        gpus = "free:1" if flags.gpus is None and backend == "debug" and inventory.devices else flags.gpus
        selection = select(inventory, gpus, os.environ)
    if backend == "debug" and selection.num_processes > 1:
        raise LaunchError(
            f"the debug backend runs one process, {selection.num_processes} devices were chosen", "Choose one device."
        )
    return Where(backend, selection, (), inventory.memory_gb)


def require_one_kind(gpus: str | None, cpu: int | None) -> None:
    """Raises LaunchError where both kinds of device are asked for."""
    if gpus is not None and cpu is not None:
        raise LaunchError("--gpus and --cpu contradict each other", "Give one of them.")


def require_consistent(flags: Flags, backend: str) -> None:
    """Raises LaunchError for flags that do not go together under this backend."""
    require_one_kind(flags.gpus, flags.cpu)
    if flags.hosts and backend == "ray":
        raise LaunchError(
            "--hosts goes with --backend ssh, not with ray",
            "Leave one of them out: Ray chooses among its own nodes, --nodes M says on how many.",
        )
    if flags.hosts and backend != "ssh":
        raise LaunchError(
            f"--hosts goes with --backend ssh, not with {backend}",
            "Leave --backend out, or use --debug without --hosts.",
        )
    if backend == "ssh" and not flags.hosts:
        raise LaunchError("--backend ssh needs hosts", "Name them: --hosts a:0,1 --hosts b:0,1")
    if backend != "ray" and flags.nodes > 1 and not (flags.hosts and flags.nodes == len(flags.hosts)):
        raise LaunchError(f"--nodes {flags.nodes}: which ones?", "Name them: --hosts a:0,1 --hosts b:0,1")


def meeting_of(recipe: Recipe) -> Meeting:
    """How the hosts of its jobs come together."""
    return Meeting(recipe.cluster.port, float(recipe.cluster.wait_s), float(recipe.cluster.silence_s))


def _data_files(recipe: Recipe) -> list[str]:
    files: list[Any] = [*recipe.data.files, *recipe.data.held_out_files]
    template = [recipe.data.template] if is_template_file(recipe.data.template) else []
    return [*(file.path for file in files), *template]


def _model_files(source: SourceRef) -> list[str]:
    return [source.location] if source.kind in ("folder", "gguf", "random") else []
