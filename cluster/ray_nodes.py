"""The running Ray cluster of this host, and what its nodes have: `-m cluster.ray_nodes ADDRESS` prints it as JSON.

A process of its own, because the launcher never imports Ray. With `-` behind the address it reads questions from standard
input (`questions_to_json`), and puts them to this host and to every node on which Ray may start a process of the run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import node_report
from .failure import EXIT_RETRY, EXIT_USER
from .job import ClusterError
from .preflight import HostReport, Questions, put_questions
from .ray_placement import PerNode, RayNode, candidates

THIS_HOST = "this host"
"""The launcher's own machine among the hosts that are compared; nodes go by their addresses."""
_CONNECT_S = 2.0
_AT_ONCE = 32
_ANSWERS: dict[str, Callable[..., Any]] = {
    "report": node_report.collect,
    "write_tokens": node_report.write_tokens,
    "missing_tokens": node_report.missing_tokens,
    "remove_tokens": node_report.remove_tokens,
}


@dataclasses.dataclass(frozen=True)
class ClusterNode:
    """A node as Ray counts it, and as its own operating system and driver see it."""

    ray: RayNode
    report: HostReport | None
    """None: it was not asked, since no process of the run can come there."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a cluster answered."""

    nodes: tuple[ClusterNode, ...]
    """The one on this host first."""
    here: HostReport | None
    """This host, as the launcher sees it: the run folder and the data are read here too. None where nobody was asked."""
    unreachable: tuple[str, ...] = ()
    """Addresses of nodes that Ray takes for alive and that do not answer; they are not among `nodes`."""

    @property
    def reports(self) -> tuple[HostReport, ...]:
        """Of all that were asked; the launcher's own is the last."""
        told = [node.report for node in self.nodes] + [self.here]
        return tuple(report for report in told if report is not None)


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
    """The nodes of the cluster that this process is connected to which answer: Ray counts a lost one for another half a minute."""
    return _as_ray_nodes(node for node, is_reached in _counted() if is_reached)


def lost_nodes(nodes: Sequence[RayNode]) -> tuple[str, ...]:
    """Addresses of those of `nodes` that Ray has given up, or where Ray does not answer."""
    found = {node["NodeID"] for node, is_reached in _counted() if is_reached}
    return tuple(node.address for node in nodes if node.node_id not in found)


def _counted() -> list[tuple[dict[str, Any], bool]]:
    """What Ray says of each node that it takes for alive, and whether Ray there can be reached."""
    import ray

    counted = [node for node in ray.nodes() if node["Alive"]]
    places = [f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in counted]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(zip(counted, pool.map(answers, places), strict=True))


def _as_ray_nodes(told: Iterable[dict[str, Any]]) -> tuple[RayNode, ...]:
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    nodes = []
    for node in told:
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


def _join(address: str) -> None:
    """Connect to the cluster. Raises ClusterError."""
    import ray
    from ray.exceptions import RayError

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


def survey(address: str, wanted: PerNode | None, questions: Questions, wait_s: float) -> Survey:
    """Connect; ask all nodes at once on which a process of the run may come, and this host. `wanted` None: nobody is asked.

    Raises ClusterError naming all nodes that lack this program, or do not answer a question within `wait_s`.
    """
    import ray

    _join(address)
    own = ray.get_runtime_context().get_node_id()
    counted = _counted()
    unreachable = tuple(sorted(node["NodeManagerAddress"] for node, is_reached in counted if not is_reached))
    reached = _as_ray_nodes(node for node, is_reached in counted if is_reached)
    nodes = sorted(reached, key=lambda node: (node.node_id != own, node.address))
    asked = candidates(nodes, wanted) if wanted else ()
    if not asked:
        return Survey(tuple(ClusterNode(node, None) for node in nodes), None, unreachable)
    ask = _AskNodes(asked, wait_s)
    *reports, here = put_questions([*(node.address for node in asked), THIS_HOST], ask, questions)
    told = {
        node.node_id: dataclasses.replace(report, clock_ahead_s=ahead_s)
        for node, report, (_, ahead_s) in zip(asked, reports, ask.clocks, strict=True)
    }
    found = tuple(ClusterNode(node, told.get(node.node_id)) for node in nodes)
    return Survey(found, dataclasses.replace(here, computes=False), unreachable)


class _AskNodes:
    """A `preflight.Ask` for nodes of the connected cluster and, as the last, this process's own host."""

    def __init__(self, nodes: Sequence[RayNode], wait_s: float) -> None:
        self.nodes, self.wait_s = nodes, wait_s
        self.clocks = [(math.inf, 0.0) for _ in nodes]
        """The best `clock_offset` of each node so far: a node's first answer may take seconds to come, a later one does not."""

    def __call__(self, what: str, given: list[dict[str, Any]]) -> list[Any]:
        import ray
        from ray.exceptions import RayError

        function, sent = _ANSWERS[what], time.time()
        waiting = {
            _task_on(node).remote(function, arguments): number
            for number, (node, arguments) in enumerate(zip(self.nodes, given[:-1], strict=True))
        }
        found: list[Any] = [None for _ in self.nodes]
        here = function(**given[-1])
        deadline = time.monotonic() + self.wait_s
        errors = []
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            heard, number = time.time(), waiting.pop(ready[0])
            try:
                began, found[number], ended = ray.get(ready[0])
            except RayError as e:
                errors.append(_trouble(self.nodes[number], e))
            else:
                self.clocks[number] = min(self.clocks[number], clock_offset(sent, began, ended, heard))
        errors += [
            ClusterError(
                f"the node {self.nodes[number].address}: no answer for {self.wait_s:g} s",
                "Is it up, and not overloaded (ray status)? cluster.wait_s raises the limit.",
                EXIT_RETRY,
            )
            for number in waiting.values()
        ]
        if errors:
            hints = dict.fromkeys(e.hint for e in errors)
            raise ClusterError("\n".join(e.message for e in errors), "\n".join(hints), min(e.exit_code for e in errors))
        return [*found, here]


def _task_on(node: RayNode) -> Any:
    """A remote function that calls what it is given on that node: (time there, result, time there). It takes nothing of what Ray counts."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Defined here, so that it is sent whole: a node with another version of ours can still say which one that is.
    def answer(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[float, Any, float]:
        began = time.time()
        return began, function(**arguments), time.time()

    strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(answer).options(scheduling_strategy=strategy)


def _trouble(node: RayNode, error: Exception) -> ClusterError:
    from ray.exceptions import RayTaskError

    said = (str(error).strip() or type(error).__name__).splitlines()[-1]
    message = f"the node {node.address} does not say what it has: {said}"
    if isinstance(error, RayTaskError):  # it was asked, and could not tell
        hint = "The same tunelaunch must be installed on every node, in the environment in which Ray was started."
        return ClusterError(message, hint, EXIT_USER)
    return ClusterError(message, "It may be down, or Ray on it: ray status.", EXIT_RETRY)


def clock_offset(sent: float, began: float, ended: float, heard: float) -> tuple[float, float]:
    """(largest error, seconds by which the other clock is ahead) from two times here and two times there. Source: RFC 5905, 8.

    The error is half the time that question and answer were on their way.
    """
    return ((heard - sent) - (ended - began)) / 2, ((began - sent) + (ended - heard)) / 2


def questions_to_json(wanted: PerNode, questions: Questions, wait_s: float) -> str:
    """What the command reads from its standard input."""
    asked = {"wanted": dataclasses.asdict(wanted), "questions": dataclasses.asdict(questions), "wait_s": wait_s}
    return json.dumps(asked)


def survey_from_json(text: str) -> Survey:
    """Inverse of what the command prints. Raises ClusterError with what it reports."""
    told = json.loads(text)
    if "error" in told:
        raise ClusterError(**told["error"])
    nodes = tuple(ClusterNode(RayNode(**n["ray"]), _report(n["report"])) for n in told["nodes"])
    return Survey(nodes, _report(told["here"]), tuple(told["unreachable"]))


def _report(told: dict[str, Any] | None) -> HostReport | None:
    return HostReport(**told) if told else None


def main(argv: list[str]) -> int:
    """Prints a `Survey` as JSON, or {"error": {...}}, as the last line."""
    wanted, questions, wait_s = None, Questions((), {}, ()), 0.0
    if argv[1:] == ["-"]:
        asked = json.load(sys.stdin)
        wanted, questions, wait_s = PerNode(**asked["wanted"]), Questions(**asked["questions"]), asked["wait_s"]
    try:
        told = dataclasses.asdict(survey(argv[0], wanted, questions, wait_s))
    except ClusterError as e:
        told = {"error": {"message": e.message, "hint": e.hint, "exit_code": e.exit_code}}
    print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
