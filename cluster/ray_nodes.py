"""The running Ray cluster of this host, and what its nodes have: `-m cluster.ray_nodes ADDRESS` prints it as JSON.

A process of its own, because the launcher never imports Ray.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .failure import EXIT_RETRY, EXIT_USER
from .inventory import Inventory
from .job import ClusterError
from .ray_placement import RayNode

ASK_S = 60
"""A node that has not told what it has after this long is an error."""
_CONNECT_S = 2.0


@dataclasses.dataclass(frozen=True)
class ClusterNode:
    """A node as Ray counts it, and as its own operating system and driver see it."""

    ray: RayNode
    inventory: Inventory


def find_cluster(env: Mapping[str, str]) -> str:
    """host:port of the cluster to join, as Ray itself finds it: RAY_ADDRESS, else what `ray start` on this host wrote down.

    "" where there is none. Raises ClusterError for an address that a driver cannot use.
    """
    address = env.get("RAY_ADDRESS", "")
    if address == "local":
        return ""
    if "://" in address:
        raise ClusterError(
            f"RAY_ADDRESS={address} is no address that a job can join",
            "Run the command on a machine of the cluster, with RAY_ADDRESS=HEAD:6379 or without it.",
        )
    if address and address != "auto":
        return address
    file = Path(env.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    found = _written_by_ray(file)
    if answers(found):
        return found
    if address:
        raise ClusterError(
            "RAY_ADDRESS=auto, and no Ray runs on this host", "Start it (ray start), or unset RAY_ADDRESS."
        )
    return ""


def _written_by_ray(file: Path) -> str:
    """The address in it. Another user's file is not taken: a cluster runs code as who joins it, and gets the token."""
    try:
        with open(file, encoding="utf-8") as f:
            is_ours = os.fstat(f.fileno()).st_uid in (os.getuid(), 0)
            return f.read(256).strip() if is_ours else ""
    except (OSError, UnicodeDecodeError):
        return ""


def answers(address: str) -> bool:
    """Whether something listens there: what `ray start` wrote down outlives a cluster that was killed."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError:
        return False
    return True


def alive_nodes() -> tuple[RayNode, ...]:
    """The living nodes of the cluster that this process is connected to."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has, left = node["Resources"], free.get(node["NodeID"], {})
            nodes.append(
                RayNode(
                    node["NodeID"],
                    node["NodeManagerAddress"],
                    has.get("CPU", 0.0),
                    has.get("GPU", 0.0),
                    left.get("CPU", 0.0),
                    left.get("GPU", 0.0),
                )
            )
    return tuple(nodes)


def lost_nodes(nodes: Sequence[RayNode]) -> tuple[str, ...]:
    """Addresses of those of `nodes` that Ray has given up, or where Ray does not answer: it takes half a minute to give one up."""
    import ray

    now = {node["NodeID"]: node for node in ray.nodes()}
    lost = []
    for node in nodes:
        entry = now.get(node.node_id)
        if not (entry and entry["Alive"] and answers(f"{node.address}:{entry['NodeManagerPort']}")):
            lost.append(node.address)
    return tuple(lost)


def ask_nodes(address: str) -> list[dict[str, Any]]:
    """Connect, and ask every node what it has. Raises ClusterError for one that does not answer, or lacks this program."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .nvml import read_inventory

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, RayError) as e:
        raise ClusterError(
            f"cannot join the Ray cluster at {address}: {(str(e).strip() or type(e).__name__).splitlines()[0]}",
            "Check ray status, and that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds the cluster's token. "
            "RAY_ADDRESS=local starts a Ray of its own instead.",
            EXIT_RETRY if isinstance(e, ConnectionError) else EXIT_USER,
        ) from None
    nodes = alive_nodes()
    ask = ray.remote(num_cpus=0, max_retries=0)(lambda: read_inventory().to_dict())
    answers = {
        n: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n.node_id, soft=False)).remote()
        for n in nodes
    }
    told = []
    for node, answer in answers.items():
        try:
            told.append({"ray": dataclasses.asdict(node), "inventory": ray.get(answer, timeout=ASK_S)})
        except RayError as e:
            raise ClusterError(
                f"the node {node.address} does not say what it has: {(str(e).strip() or type(e).__name__).splitlines()[-1]}",
                "tunelaunch must be installed on every node, in the environment in which Ray was started.",
                EXIT_RETRY if isinstance(e, GetTimeoutError) else EXIT_USER,
            ) from None
    return told


def nodes_from_json(text: str) -> tuple[ClusterNode, ...]:
    """Inverse of what the command prints. Raises ClusterError with what it reports."""
    told = json.loads(text)
    if "error" in told:
        raise ClusterError(**told["error"])
    return tuple(ClusterNode(RayNode(**n["ray"]), Inventory.from_dict(n["inventory"])) for n in told["nodes"])


def main(argv: list[str]) -> int:
    """Prints {"nodes": [...]} or {"error": {...}} as the last line."""
    try:
        told: dict[str, Any] = {"nodes": ask_nodes(argv[0])}
    except ClusterError as e:
        told = {"error": {"message": e.message, "hint": e.hint, "exit_code": e.exit_code}}
    print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
