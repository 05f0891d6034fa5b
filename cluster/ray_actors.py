"""A job that reports nothing to Ray, as one plain actor per rank: Ray Train takes some 20 s to start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import ray_placement, ray_worker
from .job import JobSpec
from .ray_placement import RayNode
from .ray_room import no_room


class RanksFailed(Exception):
    """Ranks ended with an error, or Ray lost them."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__(", ".join(f"rank {rank}: {error}" for rank, error in failures.items()))
        self.worker_failures = failures
        """rank -> what its actor raised, or Ray in its place; named as in Ray Train's WorkerGroupError."""


@dataclass(frozen=True)
class Place:
    """Where an actor has come to be."""

    node_id: str
    address: str
    port: int
    """One that was free a moment ago."""
    devices: tuple[str, ...]
    """As Ray numbers those it gave to this actor."""


def run_actors(job: JobSpec, nodes: Sequence[RayNode], config: dict[str, Any]) -> None:
    """Run the job until all ranks have ended. `nodes`: those that live. `config`: see `ray_worker.train`.

    Raises ClusterError where there is no room in time, RanksFailed, and what Ray raises when an actor does not start.
    """
    import ray
    from ray.exceptions import RayTaskError
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    asked = ray_placement.resources(job)
    placement = ray_placement.place(nodes, job)
    group = placement_group(
        [asked] * job.num_processes,
        strategy=placement.strategy,
        bundle_label_selector=placement.labels or [{}] * job.num_processes,
    )
    actors: list[Any] = []
    try:
        if not group.wait(job.meeting.wait_s):
            raise no_room(job)
        actor_class = ray.remote(num_cpus=asked["CPU"], num_gpus=asked.get("GPU", 0))(ray_worker.RankActor)
        for number in range(job.num_processes):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            actors.append(actor_class.options(scheduling_strategy=strategy).remote(config))
        seats = seated([Place(**told) for told in ray.get([actor.place.remote() for actor in actors])])
        _wait_for_all([actors[seat.actor].run.remote(seat.ranks, seat.devices) for seat in seats])
    except RayTaskError as e:  # `place`: as it was raised there
        raise e.cause from None
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


@dataclass(frozen=True)
class Seat:
    """The actor that carries a rank; seats are in rank order."""

    actor: int
    ranks: dict[str, str]
    """The rank variables of torch.distributed."""
    devices: tuple[str, ...]
    """Those of all ranks of its node in their order, LOCAL_RANK counts among them: as Ray Train shares them."""


def seated(places: Sequence[Place]) -> list[Seat]:
    """Ranks node by node, in the order of the places. Pure."""
    nodes: dict[str, list[int]] = {}
    for number, place in enumerate(places):
        nodes.setdefault(place.node_id, []).append(number)
    order = [number for on_node in nodes.values() for number in on_node]
    first = places[order[0]]
    common = {
        "WORLD_SIZE": str(len(places)),
        "MASTER_ADDR": "127.0.0.1" if len(nodes) == 1 else first.address,
        "MASTER_PORT": str(first.port),
    }
    seats = []
    for rank, number in enumerate(order):
        peers = nodes[places[number].node_id]
        ranks = {"RANK": rank, "LOCAL_RANK": peers.index(number), "LOCAL_WORLD_SIZE": len(peers)}
        devices = tuple(device for peer in peers for device in places[peer].devices)
        seats.append(Seat(number, {**common, **{name: str(value) for name, value in ranks.items()}}, devices))
    return seats


def _wait_for_all(running: Sequence[Any]) -> None:
    """`running`: one reference per rank. Returns when all have ended well. Raises RanksFailed as soon as one has not."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    rank_of = {reference: rank for rank, reference in enumerate(running)}
    waiting, failures = list(running), {}
    while waiting and not failures:
        ended, waiting = ray.wait(waiting, num_returns=1)
        also_ended, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
        for reference in (*ended, *also_ended):
            try:
                ray.get(reference)
            except RayTaskError as e:
                failures[rank_of[reference]] = e.cause
            except RayError as e:
                failures[rank_of[reference]] = e
    if failures:
        raise RanksFailed(failures)
