"""Where a run's processes go under Ray: a running cluster, or a Ray of our own on this host, with the reasons for the plan."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

from cluster.inventory import Device, Selection
from cluster.job import JobSpec, RayRequest
from cluster.nodes import Node, combined
from cluster.ray_nodes import ClusterNode, answers, find_cluster, nodes_from_json
from cluster.ray_placement import choose_nodes, cpus_of_process, cpus_reason, place, table, wanted

from .errors import LaunchError
from .where import BY_NUMBER, Flags, Where, on_this_host

ASK_TIMEOUT_S = 120


def choose_ray(flags: Flags, wait_s: int, env: Mapping[str, str]) -> Where:
    """A running Ray cluster where there is one, else a Ray of our own on this host. Raises LaunchError or ClusterError."""
    address = find_cluster(env)
    if address:
        return on_cluster(flags, wait_s, address, _ask(address))
    if flags.nodes > 1:
        raise LaunchError(
            f"--nodes {flags.nodes}: no Ray cluster runs on this host",
            "Start it on a machine of the cluster, or set RAY_ADDRESS=HEAD:6379.",
        )
    return own_ray(on_this_host(flags, "ray"))


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


def on_cluster(flags: Flags, wait_s: int, address: str, nodes: tuple[ClusterNode, ...]) -> Where:
    """Places in a running cluster. Pure. Raises LaunchError for devices that Ray cannot promise, and for what can never fit."""
    count, on_gpus = _per_node(flags, address, nodes)
    able = [n for n in nodes if (n.ray.gpus if on_gpus else n.ray.cpus) >= count]
    # The smallest decides: every process asks for the same.
    smallest = min(able or nodes, key=lambda n: _cpus(n, count, on_gpus))
    cpus = _cpus(smallest, count, on_gpus)
    ray = RayRequest(address, cpus, int(on_gpus))
    shares = tuple(Node("", _selection(smallest, count, on_gpus, cpus)) for _ in range(flags.nodes))
    total = combined(shares)
    job = JobSpec("train", "", (), total.num_processes, (), {}, "", "", "", tuple(n.share for n in shares), ray=ray)
    rays = [n.ray for n in nodes]
    if choose_nodes(rays, job, free=False) is None:
        raise LaunchError(
            f"the Ray cluster at {address} can never carry this: wanted {wanted(job)}, its nodes are\n{table(rays)}",
            "Ask for less: --gpus free:N and --cpu N count per node, --nodes M says on how many.",
        )
    placement = place(rays, job)
    reasons = (
        (
            "ray",
            f"joins the cluster at {address}: {len(nodes)} node(s), found by RAY_ADDRESS or ray start on this host",
        ),
        (
            "ray workers",
            f"{wanted(job)}; CPUs of each: {cpus_reason(int(smallest.ray.cpus), _shares(smallest, count, on_gpus))}",
        ),
        (
            "ray placement",
            f"{placement.strategy}: {_PLACEMENT[placement.strategy]}; waits {wait_s} s at most (cluster.wait_s)",
        ),
    )
    return Where("ray", total, shares, min(n.inventory.memory_gb for n in nodes), ray, reasons)


_PLACEMENT = {
    "STRICT_PACK": "all on one node",
    "STRICT_SPREAD": "every process on a node of its own",
    "PACK": "as many on a node as were asked for, so that ranks that share rows (sp) are neighbours",
}


def _per_node(flags: Flags, address: str, nodes: tuple[ClusterNode, ...]) -> tuple[int, bool]:
    """(processes per node, whether each has a GPU)."""
    if flags.cpu is not None:
        return flags.cpu, False
    match = re.fullmatch(BY_NUMBER, (flags.gpus or "").strip())
    if match:
        return int(match[1]), True
    has = table([n.ray for n in nodes])
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


def _shares(node: ClusterNode, count: int, on_gpus: bool) -> int:
    """Into how many parts the CPUs of a node are divided: a GPU brings its share along, whoever uses the others."""
    return max(count, int(node.ray.gpus)) if on_gpus else count


def _cpus(node: ClusterNode, count: int, on_gpus: bool) -> int:
    return cpus_of_process(int(node.ray.cpus), _shares(node, count, on_gpus))


def _selection(node: ClusterNode, count: int, on_gpus: bool, threads: int) -> Selection:
    """Which devices it will be is not known yet; for the memory estimate they are as the least free ones of the node."""
    devices: tuple[Device, ...] = ()
    if on_gpus:
        usable = [d for d in node.inventory.devices if not d.mig_mode]
        devices = tuple(sorted(usable, key=lambda d: d.memory_free_gb)[:count])
        while devices and len(devices) < count:
            devices = (*devices, devices[0])
    return Selection("cuda" if on_gpus else "cpu", devices, count, threads)


def _ask(address: str) -> tuple[ClusterNode, ...]:
    """What the nodes have. In a process of its own: the launcher never imports Ray."""
    if not answers(address):  # Ray itself would try for minutes
        raise LaunchError(
            f"no Ray cluster answers at {address}",
            "Is it the head's host:port, as ray start said? RAY_ADDRESS=local starts a Ray of its own.",
            75,
        )
    argv = [sys.executable, "-P", "-m", "cluster.ray_nodes", address]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"the Ray cluster at {address} did not say what it has within {ASK_TIMEOUT_S} s", "Check ray status.", 75
        ) from None
    if done.returncode or not done.stdout.strip():
        raise LaunchError(
            f"the Ray cluster at {address} did not say what it has",
            done.stderr.strip()[-2000:] or "Check ray status.",
            75,
        )
    return nodes_from_json(done.stdout.strip().splitlines()[-1])
