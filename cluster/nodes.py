"""The hosts of a run that spans several: what was chosen on each, and all of it together."""

from __future__ import annotations

from dataclasses import dataclass

from .inventory import Selection
from .job import ClusterError, NodeShare


@dataclass(frozen=True)
class Node:
    """A host, and what a run uses of it."""

    host: str
    """As the backend knows it: an ssh destination, or the address of a Ray node ("" where Ray is to choose)."""
    selection: Selection
    python: str = ""
    """Its Python; "": the same path as here."""

    @property
    def share(self) -> NodeShare:
        return NodeShare(self.host, self.selection.num_processes, self.selection.uuids, self.python)


def combined(nodes: tuple[Node, ...]) -> Selection:
    """All devices of all nodes in rank order, as one selection. Raises ClusterError where some have GPUs and others not."""
    kinds = {node.selection.kind for node in nodes}
    if len(kinds) > 1:
        found = ", ".join(f"{node.host}: {node.selection.kind}" for node in nodes)
        raise ClusterError(
            f"the hosts of a run must all use GPUs or all use the CPU ({found})",
            "Name the devices of each host (--hosts a:0,1), or give --cpu N for the CPU of all of them.",
        )
    selections = [node.selection for node in nodes]
    return Selection(
        kind=selections[0].kind,
        devices=tuple(device for s in selections for device in s.devices),
        num_processes=sum(s.num_processes for s in selections),
        threads_per_process=min(s.threads_per_process for s in selections),
        warnings=tuple(f"{node.host}: {text}" for node in nodes for text in node.selection.warnings),
    )
