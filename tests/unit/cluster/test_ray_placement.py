"""Which nodes can carry a job, what each process asks for, and what is said when there is no room."""

from __future__ import annotations

import pytest

from cluster.job import JobSpec, NodeShare, RayRequest
from cluster.ray_placement import (
    Placement,
    RayNode,
    choose_nodes,
    cpus_of_process,
    cpus_reason,
    place,
    shortage,
    wanted,
)


def node(
    name: str, cpus: float, gpus: float, free_cpus: float | None = None, free_gpus: float | None = None
) -> RayNode:
    free = (cpus if free_cpus is None else free_cpus, gpus if free_gpus is None else free_gpus)
    return RayNode(f"id-{name}", name, cpus, gpus, *free)


def job(shares: tuple[int, ...], cpus: int = 4, gpus: int = 1) -> JobSpec:
    nodes = tuple(NodeShare("", share, ()) for share in shares)
    return JobSpec("train", "w", (), sum(shares), (), {}, "L", "C", "run", nodes, ray=RayRequest("h:1", cpus, gpus))


@pytest.mark.parametrize(
    ("node_cpus", "shares", "each"),
    [(16, 4, 3), (16, 1, 15), (8, 8, 1), (3, 2, 1), (2, 2, 1), (1, 1, 1), (2, 4, 1), (65, 8, 8)],
)
def test_cpus_of_a_process_come_from_the_node(node_cpus: int, shares: int, each: int) -> None:
    assert cpus_of_process(node_cpus, shares) == each
    assert cpus_reason(node_cpus, shares).startswith(f"{each} = ")


def test_the_arithmetic_is_told() -> None:
    assert cpus_reason(16, 4) == "3 = (16 of the node - 1 for Ray) / 4"
    assert cpus_reason(2, 2) == "1 = 2 of the node / 2, at least 1"


def test_nodes_with_most_room_are_taken_and_none_twice() -> None:
    nodes = [node("a", 16, 4, free_gpus=1), node("b", 16, 4, free_gpus=3), node("c", 16, 4)]
    chosen = choose_nodes(nodes, job((2, 2)), free=True)
    assert chosen is not None
    assert [n.address for n in chosen] == ["c", "b"]
    assert choose_nodes(nodes, job((2, 2, 2)), free=True) is None
    assert choose_nodes(nodes, job((2, 2, 2)), free=False) is not None
    assert choose_nodes(nodes, job((5,)), free=False) is None


def test_placement_keeps_ranks_that_share_rows_on_one_node() -> None:
    nodes = [node("a", 64, 8), node("b", 64, 8)]
    assert place(nodes, job((4,))) == Placement("STRICT_PACK", ())
    assert place(nodes, job((1, 1))) == Placement("STRICT_SPREAD", ())
    # PACK alone would put five of six on the first node.
    assert place(nodes, job((3, 3))) == Placement("PACK", ("id-b",) * 3 + ("id-a",) * 3)
    busy = [node("a", 64, 8, free_gpus=0), nodes[1]]
    assert place(busy, job((3, 3))) == Placement("PACK", ())


def test_a_shortage_names_what_is_wanted_there_and_missing() -> None:
    nodes = [node("a", 16, 2, 10, 1), node("b", 16, 2, 2, 0)]
    assert shortage(nodes, job((2, 2))) == (
        "wanted 4 GPU + 16 CPU (2 nodes x 2 processes, each 1 GPU + 4 CPU), the cluster has 1 GPU + 12 CPU free of "
        "4 GPU + 32 CPU; missing 3 GPU + 4 CPU"
    )
    spread = [node("a", 4, 0, 2), node("b", 4, 0, 2)]
    assert shortage(spread, job((1,), cpus=4, gpus=0)).endswith(
        "missing room on one node: what is free lies on several"
    )
    assert shortage([], job((1,), cpus=4, gpus=0)).endswith("nothing free of nothing; missing 4 CPU")
    assert wanted(job((1,), cpus=4, gpus=0)) == "4 CPU (one node, 1 process(es), each 4 CPU)"
