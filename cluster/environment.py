"""The environment of workers: which devices they see, what is inherited, what is dropped, and what looks like a slip."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from .inventory import Selection
from .job import JobSpec

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "NODE_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Set for workers by us; values from an outer job would make workers wait for strangers."""

SINGLE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    # 0 lets the operating system choose a free one, which a group of one can do.
    "MASTER_PORT": "0",
}
"""What a worker that has no peers is told; no agent does it."""

_DROPPED = frozenset((*RANK_VARIABLES, "PYTHON_EXEC"))
# torch.distributed.run takes the default of each of its flags from PET_<FLAG>, and the worker's Python from PYTHON_EXEC.
_DROPPED_PREFIXES = ("TORCHELASTIC_", "PET_")

_KNOWN = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "MODELSCOPE_CACHE",
    "OMP_NUM_THREADS",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
)
# Real names that resemble one above.
_ALSO_REAL = frozenset(
    (
        "NVIDIA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "ASCEND_VISIBLE_DEVICES",
        "HF_HUB_HOME",
        "HF_DATASETS_CACHE",
        "MKL_NUM_THREADS",
        "NCCL_P2P_LEVEL",
        "NCCL_NET_DISABLE",
        "NCCL_SHM_DISABLE",
        "NCCL_NVLS_DISABLE",
        "MODELSCOPE_CACHE_DIR",
    )
)


_TRAVELS = frozenset(
    (
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "CUDA_LAUNCH_BLOCKING",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "MODELSCOPE_CACHE",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TOKENIZERS_PARALLELISM",
        "TRANSFORMERS_OFFLINE",
        "TUNELAUNCH_CACHE",
    )
)
_TRAVELLING_PREFIXES = ("GLOO_", "NCCL_", "TORCH_DISTRIBUTED_", "TORCH_NCCL_", "UCX_", "FI_")

CPU_ENVIRONMENT = {
    # GNU OpenMP's own default spins so long at the end of each parallel region that one other busy process on the host made
    # training steps more than ten times slower; with this they were three times slower, and as fast on a quiet host.
    "GOMP_SPINCOUNT": "10000",
    # A training step allocates and frees the same gigabytes again and again. By default glibc gives them back to the kernel
    # each time, which then clears them page by page, 4 KB each: a quarter of a step on two cores. So: torch asks for pages of
    # 2 MB, and what is freed stays with the process. 32 MB is the largest threshold that glibc takes; the peak is the same.
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""What a process that computes on the CPU is started with."""


def device_env(selection: Selection) -> dict[str, str]:
    """The variables that make exactly the selected devices visible, and the thread count of each process."""
    return visible_devices_env(selection.uuids) | compute_env(selection)


def compute_env(selection: Selection) -> dict[str, str]:
    """The thread count of each process, and how it allocates memory."""
    threads = {"OMP_NUM_THREADS": str(selection.threads_per_process)}
    return threads | CPU_ENVIRONMENT if selection.kind == "cpu" else threads


def visible_devices_env(uuids: tuple[str, ...]) -> dict[str, str]:
    """UUIDs rather than numbers: they mean the same inside a container and whatever the device order. Empty: CPU only."""
    if not uuids:
        return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {"CUDA_VISIBLE_DEVICES": ",".join(uuids), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def job_env(job: JobSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a job's first process on this host. Pure."""
    env = base_env(inherited, job.devices, job.env)
    return env | SINGLE_RANK if job.num_processes == 1 else env


def base_env(inherited: Mapping[str, str], devices: tuple[str, ...], own: Mapping[str, str]) -> dict[str, str]:
    """Inherited, without rank variables of an outer job and without the entries of PYTHONPATH that depend on the current
    folder (a user's folder may hold a `trainer.py`); then the devices; then `own`. Pure.
    """
    env = {k: v for k, v in inherited.items() if k not in _DROPPED and not k.startswith(_DROPPED_PREFIXES)}
    python_path = [p for p in env.pop("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
    if python_path:
        env["PYTHONPATH"] = os.pathsep.join(python_path)
    env |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    env["PYTHONUTF8"] = "1"  # logs are UTF-8 under a GBK locale too
    return env | visible_devices_env(devices) | dict(own)


def travelling(inherited: Mapping[str, str]) -> dict[str, str]:
    """What of this process's environment goes along to workers on other hosts: settings by name, never what may be secret. Pure."""
    return {
        name: value
        for name, value in sorted(inherited.items())
        if (name in _TRAVELS or name.startswith(_TRAVELLING_PREFIXES)) and "@" not in value
    }


def environment_warnings(env: Mapping[str, str]) -> list[str]:
    """Variables that are probably misspelt, that we drop, or that change how processes connect. One line each. Pure."""
    warnings: list[str] = []
    for name in sorted(env):
        meant = _near_miss(name)
        if meant:
            warnings.append(f"{name} is set but nothing reads it; did you mean {meant}?")
    outer = [name for name in RANK_VARIABLES if name in env]
    if outer:
        warnings.append(f"{', '.join(f'{n}={env[n]}' for n in outer)}: from an outer job; not passed on to our workers")
    nccl = [name for name in sorted(env) if name.startswith("NCCL_")]
    if nccl:
        warnings.append(
            f"{', '.join(f'{n}={env[n]}' for n in nccl)}: passed on to the workers; unset what is left over"
        )
    return warnings


def _near_miss(name: str) -> str:
    """The known variable that `name` is probably meant to be, or ""."""
    if name in _KNOWN or name in _ALSO_REAL:
        return ""
    # In a short name one slip weighs more.
    cutoff = 0.84 if len(name) < 10 else 0.9
    close = difflib.get_close_matches(name.upper(), _KNOWN, n=1, cutoff=cutoff)
    return close[0] if close else ""
