"""Where a run's processes go under Ray: a running cluster, or a Ray of our own on this host, with the reasons for the plan."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.inventory import Device, Inventory, Selection
from cluster.job import JobSpec, NodeShare, RayRequest
from cluster.nodes import Node, combined
from cluster.preflight import Questions, compare
from cluster.ray_nodes import THIS_HOST, Survey, answers, find_cluster, questions_to_json, survey_from_json
from cluster.ray_placement import (
    PerNode,
    carriers,
    choose_nodes,
    cpu_shares,
    cpus_of_process,
    cpus_reason,
    place,
    smallest,
    table,
    wanted,
)

from .errors import LaunchError, PlanError, Problem
from .plan_memory import FreeMemory
from .where import BY_NUMBER, Flags, Where, on_this_host

JOIN_TIMEOUT_S = 120
"""Until a process of ours has joined the cluster; what the nodes may take for their answers is `cluster.wait_s`."""
_QUESTIONS = 4
"""Times that all nodes are asked at most, each limited on its own: what they have, then tokens written, read, removed."""
_NO_CLUSTER_HINT = "Start it on a machine of the cluster, or set RAY_ADDRESS=HEAD:6379."


def choose_ray(flags: Flags, wait_s: float, env: Mapping[str, str], questions: Questions) -> Where:
    """A running Ray cluster where there is one, else a Ray of our own on this host. Raises as `join_cluster`."""
    address = find_cluster(env)
    if address:
        return join_cluster(flags, wait_s, address, questions)
    if flags.nodes > 1:
        raise LaunchError(f"--nodes {flags.nodes}: no Ray cluster runs on this host", _NO_CLUSTER_HINT)
    return own_ray(on_this_host(flags, "ray"))


def require_cluster(env: Mapping[str, str]) -> str:
    """The address of the running cluster. Raises LaunchError where there is none, ClusterError for one that cannot be joined."""
    address = find_cluster(env)
    if not address:
        raise LaunchError("no Ray cluster runs on this host: there is nothing to check", _NO_CLUSTER_HINT)
    return address


def join_cluster(flags: Flags, wait_s: float, address: str, questions: Questions) -> Where:
    """Places in the running cluster, once its nodes fit together.

    Raises LaunchError for flags that the cluster cannot take, PlanError with everything in which nodes differ, ClusterError for
    nodes that do not answer. Side effect: see `preflight.survey`.
    """
    survey = _ask(address, _wanted(flags), questions, wait_s)
    where = on_cluster(flags, wait_s, address, survey)
    if problems := misfits(survey, questions, bool(where.ray and where.ray.gpus_per_process)):
        raise PlanError(problems)
    return where


def misfits(survey: Survey, questions: Questions, on_gpus: bool) -> list[Problem]:
    """All that keeps the asked nodes, and this host, from working together; every one of them may be chosen by Ray. Pure."""
    problems = []
    for node in survey.nodes:
        devices = _devices(node.report.inventory) if node.report else ()
        if on_gpus and node.report and len(devices) < int(node.ray.gpus):
            why = f" ({node.report.inventory.problem})" if node.report.inventory.problem else ""
            problems.append(
                Problem(
                    f"node {node.ray.address}",
                    f"Ray counts {node.ray.gpus:g} GPU(s) there, the NVIDIA driver lists {len(devices)}{why}",
                    f"See nvidia-smi there; then start Ray there again, with --num-gpus={len(devices)}.",
                )
            )
    for finding in compare(survey.reports, questions):
        where = finding.host if finding.host == THIS_HOST else f"node {finding.host}"
        problems.append(Problem(where, finding.message, finding.hint))
    return problems


def own_ray(host: Where) -> Where:
    """A Ray that the training job starts and ends. The devices are exact: it sees no others. Pure."""
    selection = host.selection
    count, cpus = selection.num_processes, selection.threads_per_process * selection.num_processes
    each = cpus_of_process(cpus, count)
    request = RayRequest("", each, int(selection.kind == "cuda"))
    devices = "; it sees the chosen GPUs and no others" if selection.kind == "cuda" else ""
    reasons = (
        ("ray", f"none runs here (RAY_ADDRESS, ray start): one of our own for training, ended with it{devices}"),
        (
            "ray workers",
            f"{count} on this host; CPUs of each: {cpus_reason(cpus, count)}; other stages: plain processes",
        ),
    )
    return replace(host, ray=request, reasons=reasons)


def on_cluster(flags: Flags, wait_s: float, address: str, survey: Survey) -> Where:
    """Places in a running cluster. Pure. Raises LaunchError for devices that Ray cannot promise, and for what can never fit."""
    rays = [n.ray for n in survey.nodes]
    share = _per_node(flags, address, table(rays))
    # The smallest decides: every process asks for the same.
    decides = smallest(rays, share)
    parts = cpu_shares(decides, share) if decides else 1
    cpus = cpus_of_process(int(decides.cpus), parts) if decides else 1
    ray = RayRequest(address, cpus, int(share.on_gpus))
    count = share.processes * flags.nodes
    wants = tuple(NodeShare("", share.processes, ()) for _ in range(flags.nodes))
    job = JobSpec("train", "", (), count, (), {}, "", "", "", wants, ray=ray)
    if decides is None or choose_nodes(rays, job, free=False) is None:
        raise _too_small(address, wanted(job), table(rays), survey.unreachable)
    told = {n.ray.node_id: n.report for n in survey.nodes if n.report}
    selection = _selection(told[decides.node_id].inventory, share, cpus)
    nodes = tuple(Node("", selection) for _ in range(flags.nodes))
    placement = place(rays, job)
    reasons = (
        (
            "ray",
            f"joins the cluster at {address}: {len(rays)} node(s), found by RAY_ADDRESS or ray start on this host",
        ),
        (
            "ray workers",
            f"{wanted(job)}; CPUs of each: {cpus_reason(int(decides.cpus), parts)}",
        ),
        (
            "ray placement",
            f"{placement.strategy}: {_PLACEMENT[placement.strategy]}; waits {wait_s:g} s at most (cluster.wait_s)",
        ),
    )
    memory_gb = min(report.inventory.memory_gb for report in told.values())
    free = tuple(
        FreeMemory(n.address, told[n.node_id].report["memory_free_gb"], share.processes) for n in carriers(rays, share)
    )
    return Where("ray", combined(nodes), nodes, memory_gb, ray, reasons, survey.reports, free)


def _too_small(address: str, what: str, has: str, unreachable: Sequence[str]) -> LaunchError:
    """What the cluster lacks; with nodes that may come back it is worth another try."""
    less = "ask for less: --gpus free:N and --cpu N count per node, --nodes M says on how many."
    can, hint, code = "can never carry this", less[0].upper() + less[1:], 2
    if unreachable:
        has += "".join(f"\n  {node}: listed by Ray, but nothing answers there" for node in unreachable)
        hint = f"Bring {', '.join(unreachable)} back (ray start there) and start again, or {less}"
        can, code = "cannot carry this now", 75
    return LaunchError(f"the Ray cluster at {address} {can}: wanted {what}, its nodes are\n{has}", hint, code)


_PLACEMENT = {
    "STRICT_PACK": "all on one node",
    "STRICT_SPREAD": "every process on a node of its own",
    "PACK": "as many on a node as were asked for, so that ranks that share rows (sp) are neighbours",
}


def _wanted(flags: Flags) -> PerNode | None:
    """None where the flags do not say it as Ray takes it."""
    if flags.cpu is not None:
        return PerNode(flags.cpu, False)
    match = re.fullmatch(BY_NUMBER, (flags.gpus or "").strip())
    return PerNode(int(match[1]), True) if match else None


def _per_node(flags: Flags, address: str, has: str) -> PerNode:
    """`has`: the table of nodes, for the errors."""
    if share := _wanted(flags):
        return share
    if flags.gpus is None:
        raise LaunchError(
            f"the Ray cluster at {address} is shared: say how much of it this run may use. Its nodes are\n{has}",
            "For each node: --gpus free:N or --cpu N; on several: --nodes M.",
        )
    raise LaunchError(
        f"--gpus {flags.gpus}: Ray gives devices away by number and cannot promise these. The cluster at {address} has\n{has}",
        "For each node: --gpus free:N; on several: --nodes M. "
        "For exact devices of this host, use a Ray of its own: RAY_ADDRESS=local",
    )


def _devices(inventory: Inventory) -> tuple[Device, ...]:
    """What a process can use: a card that is split into MIG instances is none."""
    return tuple(d for d in inventory.devices if not d.mig_mode)


def _selection(inventory: Inventory, share: PerNode, threads: int) -> Selection:
    """Which devices it will be is not known yet; for the memory estimate they are as the least free ones of the node."""
    devices: tuple[Device, ...] = ()
    if share.on_gpus:
        devices = tuple(sorted(_devices(inventory), key=lambda d: d.memory_free_gb)[: share.processes])
        while devices and len(devices) < share.processes:
            devices = (*devices, devices[0])
    return Selection("cuda" if share.on_gpus else "cpu", devices, share.processes, threads)


def _ask(address: str, share: PerNode | None, questions: Questions, wait_s: float) -> Survey:
    """What the nodes have. In a process of its own: the launcher never imports Ray. `share` None: nothing is asked of them."""
    if not answers(address):  # Ray itself would try for minutes
        raise LaunchError(
            f"no Ray cluster answers at {address}",
            "Is it the head's host:port, as ray start said? RAY_ADDRESS=local starts a Ray of its own.",
            75,
        )
    argv = [sys.executable, "-P", "-m", "cluster.ray_nodes", address, *(["-"] if share else [])]
    said = questions_to_json(share, questions, wait_s) if share else ""
    limit_s = JOIN_TIMEOUT_S + _QUESTIONS * wait_s
    try:
        # Ray puts the current folder on the import path of its workers: here the user's, which may hold a `cluster.py`.
        with tempfile.TemporaryDirectory(prefix="tunelaunch-survey-") as empty:
            done = subprocess.run(
                argv, input=said, capture_output=True, text=True, timeout=limit_s, check=False, cwd=empty
            )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"the Ray cluster at {address} did not say what it has within {limit_s:g} s", "Check ray status.", 75
        ) from None
    if done.returncode or not done.stdout.strip():
        raise LaunchError(
            f"the Ray cluster at {address} did not say what it has",
            done.stderr.strip()[-2000:] or "Check ray status.",
            75,
        )
    return survey_from_json(done.stdout.strip().splitlines()[-1])
