"""The backends by name. A new one is a file in this folder, one row here, and the contract tests (see README.md)."""

from __future__ import annotations

import importlib

from .job import Backend, ClusterError

BACKENDS = {
    "torchrun": "cluster.torchrun_backend:TorchrunBackend",
    "ssh": "cluster.ssh_backend:SshBackend",
    "ray": "cluster.ray_backend:RayBackend",
    "debug": "cluster.debug_backend:DebugBackend",
}
"""Name -> module:class. Imported on demand, so that one backend's libraries never burden another."""


def load(name: str) -> Backend:
    """Raises ClusterError, with the names that exist, for an unknown one."""
    if name not in BACKENDS:
        raise ClusterError(f'there is no backend "{name}"', f"Choose one of: {', '.join(BACKENDS)}")
    module, _, class_name = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)()
