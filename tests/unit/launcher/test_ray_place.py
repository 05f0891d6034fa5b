"""Places in a Ray cluster, or in a Ray of our own: what is asked for, the reasons, the refusals."""

from __future__ import annotations

import time

import pytest

from cluster.inventory import Device, Inventory, Selection
from cluster.ray_nodes import ClusterNode
from cluster.ray_placement import RayNode
from launcher.errors import LaunchError
from launcher.ray_place import choose_ray, on_cluster, own_ray
from launcher.where import Flags, Where

ADDRESS = "10.0.0.1:6379"


def flags(gpus: str | None = None, cpu: int | None = None, nodes: int = 1) -> Flags:
    return Flags(gpus, cpu, "ray", nodes, False, ())


def cluster(*sizes: tuple[int, int]) -> tuple[ClusterNode, ...]:
    """(CPUs, GPUs) of each node; the GPUs of node i have 40 + i GB free."""
    nodes = []
    for i, (cpus, gpus) in enumerate(sizes):
        devices = tuple(Device(str(g), "A100", f"GPU-{i}{g}", 80.0, 40.0 + i, False, False, "") for g in range(gpus))
        ray = RayNode(f"id{i}", f"10.0.0.{i + 1}", cpus, gpus, cpus, gpus)
        nodes.append(ClusterNode(ray, Inventory("cuda" if gpus else "cpu", devices, cpus, 100.0 + i)))
    return tuple(nodes)


def test_flags_count_per_node() -> None:
    where = on_cluster(flags("free:2", nodes=2), 120, ADDRESS, cluster((32, 4), (33, 4)))
    assert where.selection.num_processes == 4
    assert [node.share.num_processes for node in where.nodes] == [2, 2]
    assert where.ray is not None
    # (32 - 1) / 4: two of four GPUs bring half of the CPUs along, not all.
    assert (where.ray.address, where.ray.cpus_per_process, where.ray.gpus_per_process) == (ADDRESS, 7, 1)
    assert where.selection.threads_per_process == 7
    assert where.selection.devices[0].memory_free_gb == 40.0
    assert where.host_memory_gb == 100.0
    reasons = dict(where.reasons)
    assert reasons["ray"].startswith(f"joins the cluster at {ADDRESS}: 2 node(s)")
    assert "4 GPU + 28 CPU (2 nodes x 2 processes, each 1 GPU + 7 CPU)" in reasons["ray workers"]
    assert "7 = (32 of the node - 1 for Ray) / 4" in reasons["ray workers"]
    assert reasons["ray placement"].startswith("PACK: ")


@pytest.mark.parametrize("gpus", ["0,2", "GPU-1a2b", "all", "0-3", "free:0"])
def test_exact_devices_cannot_be_promised(gpus: str) -> None:
    with pytest.raises(LaunchError, match="cannot promise") as e:
        on_cluster(flags(gpus), 120, ADDRESS, cluster((32, 4), (16, 2)))
    assert e.value.exit_code == 2
    assert "10.0.0.1: 4 GPU + 32 CPU" in str(e.value)
    assert "10.0.0.2: 2 GPU + 16 CPU" in str(e.value)
    assert "--gpus free:N" in str(e.value)


def test_a_shared_cluster_asks_for_a_number() -> None:
    with pytest.raises(LaunchError, match="say how much of it"):
        on_cluster(flags(), 120, ADDRESS, cluster((32, 4)))


@pytest.mark.parametrize("wanted", [flags("free:5"), flags("free:3", nodes=2), flags(cpu=40), flags(cpu=1, nodes=3)])
def test_what_can_never_fit_is_refused_at_once(wanted: Flags) -> None:
    with pytest.raises(LaunchError, match="can never carry this") as e:
        on_cluster(wanted, 120, ADDRESS, cluster((32, 4), (16, 2)))
    assert e.value.exit_code == 2
    assert "10.0.0.2: 2 GPU + 16 CPU" in str(e.value)


def test_a_ray_of_our_own_sees_exactly_the_chosen_devices() -> None:
    gpus = tuple(Device(i, "A100", f"GPU-{i}", 80.0, 79.0, False, False, "") for i in ("0", "2"))
    where = own_ray(Where("ray", Selection("cuda", gpus, 2, 8), (), 100.0))
    assert where.selection.uuids == ("GPU-0", "GPU-2")
    assert where.nodes == ()
    assert where.ray is not None
    assert (where.ray.address, where.ray.cpus_per_process, where.ray.gpus_per_process) == ("", 7, 1)
    assert "it sees the chosen GPUs and no others" in dict(where.reasons)["ray"]


def test_several_nodes_need_a_cluster() -> None:
    with pytest.raises(LaunchError, match="no Ray cluster runs on this host"):
        choose_ray(flags(cpu=1, nodes=2), 120, {"RAY_ADDRESS": "local"})


def test_an_address_where_nothing_listens_is_told_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError, match="no Ray cluster answers at") as e:
        choose_ray(flags(cpu=1), 120, {"RAY_ADDRESS": "127.0.0.1:9"})
    assert e.value.exit_code == 75
    assert time.monotonic() - began < 5
