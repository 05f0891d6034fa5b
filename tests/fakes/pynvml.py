"""Stands for the NVIDIA library: the calls that `cluster.nvml` makes, over cards that a test describes.

Calls, classes and their behaviour follow nvidia-ml-py 13: an empty MIG slot raises NotFound, a card without MIG raises
NotSupported, unknown memory of a process is None.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import SimpleNamespace

NVML_DEVICE_MIG_DISABLE = 0
NVML_DEVICE_MIG_ENABLE = 1


class NVMLError(Exception):
    text = "Unknown Error"

    def __str__(self) -> str:
        return self.text


class NVMLError_LibraryNotFound(NVMLError):
    text = "NVML Shared Library Not Found"


class NVMLError_DriverNotLoaded(NVMLError):
    text = "Driver Not Loaded"


class NVMLError_NotFound(NVMLError):
    text = "Not Found"


class NVMLError_NotSupported(NVMLError):
    text = "Not Supported"


class NVMLError_FunctionNotFound(NVMLError):
    text = "Function Not Found"


class NVMLError_NoPermission(NVMLError):
    text = "Insufficient Permissions"


class NVMLError_GpuIsLost(NVMLError):
    text = "GPU is lost"


class NVMLError_Unknown(NVMLError):
    text = "Unknown Error"


class NVMLLibraryMismatchError(Exception):
    pass


@dataclass
class FakeDevice:
    """A card, or with `bus` unused a MIG instance. Memory in bytes."""

    name: str
    uuid: str
    total: int
    used: int = 0
    bus: int = 0
    mig: int | None = None
    """None: the card does not know MIG."""
    slots: list[FakeDevice | None] = field(default_factory=list)
    """MIG slots; None is an empty one."""
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    error: NVMLError | None = None
    """Raised when the card is opened."""
    old_driver: bool = False
    memory_unknown: bool = False


# A test in this process sets `cards`; a command that a test starts gets its cards from the environment.
cards: list[FakeDevice] = [
    FakeDevice("NVIDIA A100-SXM4-80GB", f"GPU-{i:08x}-0000-0000-0000-000000000000", 80 * 2**30, bus=i)
    for i in range(int(os.environ.get("FAKE_NVML_CARDS", "0")))
]
init_error: NVMLError | None = None
initialised = 0


def nvmlInit() -> None:
    global initialised
    if init_error is not None:
        raise init_error
    initialised += 1


def nvmlShutdown() -> None:
    global initialised
    initialised -= 1


def nvmlDeviceGetCount() -> int:
    return len(cards)


def nvmlDeviceGetHandleByIndex(index: int) -> FakeDevice:
    error = cards[index].error
    if error is not None:
        raise error
    return cards[index]


def nvmlDeviceGetPciInfo(handle: FakeDevice) -> SimpleNamespace:
    return SimpleNamespace(domain=0, bus=handle.bus, device=0)


def nvmlDeviceGetName(handle: FakeDevice) -> str:
    return handle.name


def nvmlDeviceGetUUID(handle: FakeDevice) -> str:
    return handle.uuid


def nvmlDeviceGetMemoryInfo(handle: FakeDevice) -> SimpleNamespace:
    if handle.memory_unknown:
        raise NVMLError_NotSupported
    return SimpleNamespace(total=handle.total, used=handle.used, free=handle.total - handle.used)


def nvmlDeviceGetMigMode(handle: FakeDevice) -> list[int]:
    if handle.mig is None:
        raise NVMLError_NotSupported
    return [handle.mig, handle.mig]


def nvmlDeviceGetMaxMigDeviceCount(handle: FakeDevice) -> int:
    return len(handle.slots)


def nvmlDeviceGetMigDeviceHandleByIndex(handle: FakeDevice, index: int) -> FakeDevice:
    slot = handle.slots[index]
    if slot is None:
        raise NVMLError_NotFound
    return slot


def nvmlDeviceGetComputeRunningProcesses(handle: FakeDevice) -> list[SimpleNamespace]:
    if handle.old_driver:
        raise NVMLLibraryMismatchError
    return nvmlDeviceGetComputeRunningProcesses_v2(handle)


def nvmlDeviceGetComputeRunningProcesses_v2(handle: FakeDevice) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.processes]
