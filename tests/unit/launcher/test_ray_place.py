"""Places in a Ray cluster, or in a Ray of our own: what is asked for, the reasons, the refusals."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from cluster.inventory import Device, Inventory, Selection
from cluster.preflight import HostReport, Questions
from cluster.ray_nodes import THIS_HOST, ClusterNode, Survey
from cluster.ray_placement import PerNode, RayNode, candidates
from launcher.errors import LaunchError
from launcher.plan_memory import FreeMemory
from launcher.ray_place import choose_ray, misfits, on_cluster, own_ray
from launcher.where import Flags, Where

ADDRESS = "10.0.0.1:6379"


def flags(gpus: str | None = None, cpu: int | None = None, nodes: int = 1) -> Flags:
    return Flags(gpus, cpu, "ray", nodes, False, ())


QUESTIONS = Questions(("transformers", "tunelaunch"), {"/runs": "Use --run-dir."}, ("/data/my.jsonl",))


def report(host: str, inventory: Inventory) -> HostReport:
    told = {
        "python": "3.11.2",
        "executable": "/venv/bin/python",
        "packages": {"transformers": "5.2.0", "tunelaunch": "0.1.0"},
        "code": "c0de",
        "cuda": "12.8",
        "inventory": inventory.to_dict(),
        "memory_free_gb": inventory.memory_gb / 2,
        "folders": {"/runs": {"nearest": "/runs", "free_gb": 100.0, "problem": ""}},
        "files": {"/data/my.jsonl": "d1"},
    }
    return HostReport(host, told, 0.0, {}, {})


def cluster(*sizes: tuple[int, int], **of_last: Any) -> Survey:
    """(CPUs, GPUs) of each node; the GPUs of node i have 40 + i GB free. `of_last`: what the last one answers differently."""
    nodes = []
    for i, (cpus, gpus) in enumerate(sizes):
        devices = tuple(Device(str(g), "A100", f"GPU-{i}{g}", 80.0, 40.0 + i, False, False, "") for g in range(gpus))
        ray = RayNode(f"id{i}", f"10.0.0.{i + 1}", cpus, gpus, cpus, gpus)
        changed = of_last if i == len(sizes) - 1 else {}
        inventory = Inventory("cuda" if gpus else "cpu", devices, cpus, 100.0 + i)
        told = report(ray.address, inventory)
        nodes.append(ClusterNode(ray, dataclasses.replace(told, report={**told.report, **changed})))
    here = report(THIS_HOST, Inventory("cpu", (), 2, 8.0))
    return Survey(tuple(nodes), dataclasses.replace(here, computes=False))


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
    assert where.free_memory == (FreeMemory("10.0.0.1", 50.0, 2), FreeMemory("10.0.0.2", 50.5, 2))
    assert [r.host for r in where.reports] == ["10.0.0.1", "10.0.0.2", THIS_HOST]
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


def test_a_node_that_ray_lists_and_nothing_answers_on_may_come_back() -> None:
    survey = dataclasses.replace(cluster((32, 4)), unreachable=("10.0.0.7",))
    with pytest.raises(LaunchError, match="cannot carry this now: wanted 62 CPU") as e:
        on_cluster(flags(cpu=1, nodes=2), 120, ADDRESS, survey)
    assert e.value.exit_code == 75
    assert "10.0.0.1: 4 GPU + 32 CPU" in str(e.value)
    assert "10.0.0.7: listed by Ray, but nothing answers there" in str(e.value)
    assert "Bring 10.0.0.7 back" in str(e.value)


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
        choose_ray(flags(cpu=1, nodes=2), 120, {"RAY_ADDRESS": "local"}, QUESTIONS)


def test_an_address_where_nothing_listens_is_told_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError, match="no Ray cluster answers at") as e:
        choose_ray(flags(cpu=1), 120, {"RAY_ADDRESS": "127.0.0.1:9"}, QUESTIONS)
    assert e.value.exit_code == 75
    assert time.monotonic() - began < 5


def told(survey: Survey, on_gpus: bool = True) -> list[tuple[str, str]]:
    return [(p.where, p.message) for p in misfits(survey, QUESTIONS, on_gpus)]


def test_nodes_that_fit_have_nothing_against_them() -> None:
    assert told(cluster((32, 4), (16, 2))) == []


def test_a_node_that_differs_is_named_with_both_values_and_the_fix() -> None:
    other = cluster(
        (32, 4), (16, 2), packages={"transformers": "4.0.0", "tunelaunch": "0.1.0"}, files={"/data/my.jsonl": None}
    )
    version, data = misfits(other, QUESTIONS, True)
    assert (version.where, version.message) == ("node 10.0.0.2", "transformers 4.0.0, but 5.2.0 on 10.0.0.1")
    assert "On 10.0.0.2, with /venv/bin/python: pip install transformers==5.2.0" in version.hint
    assert (data.where, data.message) == ("node 10.0.0.2", "/data/my.jsonl does not exist there")


def test_what_is_installed_beside_the_launcher_does_not_matter_but_our_own_code_and_its_files_do() -> None:
    survey = cluster((32, 4))
    assert survey.here is not None
    packages = {"transformers": None, "tunelaunch": "0.1.0"}
    here = {**survey.here.report, "packages": packages, "python": "3.12.1", "cuda": None, "memory_free_gb": 0.1}
    assert told(Survey(survey.nodes, dataclasses.replace(survey.here, report=here))) == []
    other = dataclasses.replace(
        survey.here, report={**here, "code": "beef"}, unseen={"/runs": ["10.0.0.1"]}, clock_ahead_s=-9.0
    )
    assert told(Survey(survey.nodes, other)) == [
        (THIS_HOST, "tunelaunch's code is another one (beef, c0de on 10.0.0.1)"),
        (THIS_HOST, "/runs is another folder there: what 10.0.0.1 wrote into it is not seen"),
        ("node 10.0.0.1", "its clock is 9.0 s ahead of that of this host"),
    ]


def test_devices_that_ray_counts_and_the_driver_does_not_list_are_told() -> None:
    empty = Inventory("cpu", (), 16, 64.0, "no NVIDIA driver found").to_dict()
    assert told(cluster((32, 4), (16, 2), inventory=empty)) == [
        ("node 10.0.0.2", "Ray counts 2 GPU(s) there, the NVIDIA driver lists 0 (no NVIDIA driver found)")
    ]
    assert told(cluster((32, 4), (16, 2), inventory=empty), on_gpus=False) == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        # The head without GPUs carries nothing of a run on GPUs; one with a single GPU may merge.
        (PerNode(2, True), ["10.0.0.2", "10.0.0.3"]),
        # Training fits on one node alone, with a CPU for each process: the other stages fit on any.
        (PerNode(31, False), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        (PerNode(40, False), []),
    ],
)
def test_nodes_on_which_a_process_may_come(wanted: PerNode, expected: list[str]) -> None:
    rays = [node.ray for node in cluster((2, 0), (32, 2), (16, 1)).nodes]
    assert [node.address for node in candidates(rays, wanted)] == expected
