"""Which nodes of a Ray cluster can carry a job, what each of its processes asks for, and what is missing. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .job import JobSpec

RAY_CPUS = 1
"""CPUs of a node that are left for Ray's own processes (raylet, agents, the controller of the job)."""


@dataclass(frozen=True)
class RayNode:
    """A living node, and what Ray may give away of it. Amounts as Ray counts them, which may be less than the host has."""

    node_id: str
    address: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class PerNode:
    """What a run asks of each of its nodes."""

    processes: int
    on_gpus: bool
    """Each process has a GPU."""


@dataclass(frozen=True)
class Placement:
    """How a job's processes are spread: a strategy of Ray's, and the node of each process where that is decided here."""

    strategy: str
    node_ids: tuple[str, ...]
    """One per process in rank order; empty: Ray chooses within the strategy."""

    @property
    def labels(self) -> list[dict[str, str]]:
        """The same as Ray's label selectors."""
        return [{"ray.io/node-id": node_id} for node_id in self.node_ids]


def cpus_of_process(node_cpus: int, shares: int) -> int:
    """CPUs that each of the `shares` processes of a node asks for: its CPUs without `RAY_CPUS`, divided; at least 1."""
    left = node_cpus - RAY_CPUS if node_cpus > shares else node_cpus
    return max(1, left // shares)


def cpus_reason(node_cpus: int, shares: int) -> str:
    """The arithmetic of `cpus_of_process`, for the plan."""
    result = cpus_of_process(node_cpus, shares)
    if node_cpus > shares:
        return f"{result} = ({node_cpus} of the node - {RAY_CPUS} for Ray) / {shares}"
    return f"{result} = {node_cpus} of the node / {shares}, at least 1"


def cpu_shares(node: RayNode, wanted: PerNode) -> int:
    """Into how many parts the CPUs of a node are divided: a GPU brings its share along, whoever uses the others."""
    return max(wanted.processes, int(node.gpus)) if wanted.on_gpus else wanted.processes


def carriers(nodes: Sequence[RayNode], wanted: PerNode) -> list[RayNode]:
    """The nodes that can carry a whole share; every process asks for at least one CPU."""
    return [n for n in nodes if n.cpus >= wanted.processes and (not wanted.on_gpus or n.gpus >= wanted.processes)]


def smallest(nodes: Sequence[RayNode], wanted: PerNode) -> RayNode | None:
    """Of the carriers, the one that decides how many CPUs every process asks for; None without any."""
    able = carriers(nodes, wanted)
    return min(able, key=lambda n: cpus_of_process(int(n.cpus), cpu_shares(n, wanted)), default=None)


def candidates(nodes: Sequence[RayNode], wanted: PerNode) -> tuple[RayNode, ...]:
    """All nodes on which Ray may start a process of the run. More than carry training: other stages are one process."""
    decides = smallest(nodes, wanted)
    if decides is None:
        return ()
    cpus = cpus_of_process(int(decides.cpus), cpu_shares(decides, wanted))
    return tuple(n for n in nodes if n.cpus >= cpus and n.gpus >= int(wanted.on_gpus))


def shares(job: JobSpec) -> tuple[int, ...]:
    """Processes of each node, in rank order."""
    return tuple(node.num_processes for node in job.nodes) if job.nodes else (job.num_processes,)


def choose_nodes(nodes: Sequence[RayNode], job: JobSpec, free: bool) -> tuple[RayNode, ...] | None:
    """A node for each share of the job, those with the most room first; None where there are not enough.

    `free`: count what is free now; else what the nodes have in all, which tells what can never fit.
    """
    chosen: list[RayNode] = []
    for share in shares(job):
        room = [n for n in nodes if n not in chosen and _fits(n, job, share, free)]
        if not room:
            return None
        chosen.append(max(room, key=lambda n: (n.free_gpus, n.free_cpus, n.address)))
    return tuple(chosen)


def place(nodes: Sequence[RayNode], job: JobSpec) -> Placement:
    """One node: all on one. One process a node: all on different ones. Else packed: on chosen nodes where there is room now.

    PACK alone may put five of four on a large node; then ranks that share rows (sp) would not be on one node.
    """
    parts = shares(job)
    if len(parts) == 1:
        return Placement("STRICT_PACK", ())
    if max(parts) == 1:
        return Placement("STRICT_SPREAD", ())
    chosen = choose_nodes(nodes, job, free=True) or ()
    return Placement("PACK", tuple(n.node_id for n, part in zip(chosen, parts, strict=False) for _ in range(part)))


def resources(job: JobSpec) -> dict[str, float]:
    """What each process asks Ray for; without GPU where it needs none, since Ray takes a 0 for a wish."""
    assert job.ray is not None
    asked: dict[str, float] = {"CPU": job.ray.cpus_per_process, "GPU": job.ray.gpus_per_process}
    return {name: count for name, count in asked.items() if count}


def wanted(job: JobSpec) -> str:
    """ "4 GPU + 16 CPU (2 nodes x 2 processes, each 1 GPU + 4 CPU)"."""
    assert job.ray is not None
    parts = shares(job)
    first = parts[0]
    spread = f"{len(parts)} nodes x {first} processes" if len(parts) > 1 else f"one node, {first} process(es)"
    each = _amount(job.ray.gpus_per_process, job.ray.cpus_per_process)
    total = _amount(job.ray.gpus_per_process * sum(parts), job.ray.cpus_per_process * sum(parts))
    return f"{total} ({spread}, each {each})"


def shortage(nodes: Sequence[RayNode], job: JobSpec) -> str:
    """ "wanted ..., the cluster has ... free; missing ...", or that the room there is lies on too many nodes."""
    assert job.ray is not None
    gpus, cpus = (count * sum(shares(job)) for count in (job.ray.gpus_per_process, job.ray.cpus_per_process))
    free_gpus, free_cpus = sum(n.free_gpus for n in nodes), sum(n.free_cpus for n in nodes)
    lacking = _amount(max(0.0, gpus - free_gpus), max(0.0, cpus - free_cpus))
    missing = lacking or "room on one node: what is free lies on several" if len(shares(job)) == 1 else lacking
    if nodes and (gone := len(shares(job)) - len(nodes)) > 0:
        missing = f"{gone} of {len(shares(job))} nodes"
    return (
        f"wanted {wanted(job)}, the cluster has {_amount(free_gpus, free_cpus) or 'nothing'} free of "
        f"{_amount(sum(n.gpus for n in nodes), sum(n.cpus for n in nodes)) or 'nothing'}; "
        f"missing {missing or 'room: what is free is spread over the wrong nodes'}"
    )


def table(nodes: Sequence[RayNode]) -> str:
    """One line per node, for error texts."""
    rows = [f"  {n.address}: {_amount(n.gpus, n.cpus)}, free {_amount(n.free_gpus, n.free_cpus) or '-'}" for n in nodes]
    return "\n".join(rows) or "  no node"


def _fits(node: RayNode, job: JobSpec, share: int, free: bool) -> bool:
    assert job.ray is not None
    gpus, cpus = (node.free_gpus, node.free_cpus) if free else (node.gpus, node.cpus)
    return job.ray.gpus_per_process * share <= gpus and job.ray.cpus_per_process * share <= cpus


def _amount(gpus: float, cpus: float) -> str:
    """ "2 GPU + 4 CPU", without what is zero."""
    return " + ".join(f"{count:g} {what}" for count, what in ((gpus, "GPU"), (cpus, "CPU")) if count)
