"""The only module that talks to NVML, NVIDIA's management library: the list of physical GPUs and their MIG instances.

NVML needs no CUDA context, so reading it costs no GPU memory and works before workers exist.
API: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html and group__nvmlMultiInstanceGPU.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .inventory import Device, DeviceProcess, Inventory, host_inventory

_GB = 2**30


@dataclass(frozen=True)
class NvmlReading:
    """What NVML lists, and why it may be incomplete."""

    devices: tuple[Device, ...]
    """Cards in PCI bus order, each followed by its MIG instances."""
    problem: str
    """Why `devices` is empty or incomplete; "" when all could be read."""


def read_inventory() -> Inventory:
    """This host's GPUs, cores and memory."""
    reading = read_devices()
    return host_inventory(reading.devices, reading.problem)


def read_devices() -> NvmlReading:
    """The GPUs of this host; none, with the reason, where the driver or its library is missing. Never raises for that."""
    try:
        import pynvml  # here, because no other code may depend on the NVIDIA library
    except ModuleNotFoundError:
        return NvmlReading((), "no NVIDIA driver found: the Python package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        return NvmlReading((), f"no NVIDIA driver found: {e}")
    try:
        return _read_all(pynvml)
    except pynvml.NVMLError as e:
        return NvmlReading((), f"the NVIDIA driver does not list its devices: {e}")
    finally:
        pynvml.nvmlShutdown()


def _read_all(nvml: Any) -> NvmlReading:
    cards: list[tuple[tuple[int, int, int], Any]] = []
    problems: list[str] = []
    count = nvml.nvmlDeviceGetCount()
    for number in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            pci = nvml.nvmlDeviceGetPciInfo(handle)
        except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_NoPermission, nvml.NVMLError_Unknown) as e:
            # One broken or forbidden card must not hide the others.
            problems.append(f"GPU {number} cannot be used: {e}")
            continue
        cards.append(((pci.domain, pci.bus, pci.device), handle))
    devices: list[Device] = []
    for index, (_, handle) in enumerate(sorted(cards, key=lambda card: card[0])):
        card = _read_device(nvml, handle, str(index), parent_uuid="")
        devices.append(card)
        if card.mig_mode:
            devices.extend(_read_instances(nvml, handle, card))
    if not devices and not problems:
        problems.append("the NVIDIA driver is installed, but lists no GPU")
    return NvmlReading(tuple(devices), "; ".join(problems))


def _read_instances(nvml: Any, handle: Any, card: Device) -> list[Device]:
    """MIG slots are sparse: an empty one raises NotFound."""
    instances: list[Device] = []
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
        except nvml.NVMLError_NotFound:
            continue
        instances.append(_read_device(nvml, instance, f"{card.index}:{len(instances)}", card.uuid))
    return instances


def _read_device(nvml: Any, handle: Any, index: str, parent_uuid: str) -> Device:
    total, free = _memory_gb(nvml, handle)
    return Device(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        memory_total_gb=total,
        memory_free_gb=free,
        is_mig=bool(parent_uuid),
        mig_mode=not parent_uuid and _is_split(nvml, handle),
        parent_uuid=parent_uuid,
        processes=_processes(nvml, handle),
    )


def _memory_gb(nvml: Any, handle: Any) -> tuple[float, float]:
    """Total and free. (0.0, 0.0) for cards that share the host's memory, which NVML does not count."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return 0.0, 0.0
    return memory.total / _GB, memory.free / _GB


def _is_split(nvml: Any, handle: Any) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return False
    return current == nvml.NVML_DEVICE_MIG_ENABLE


def _processes(nvml: Any, handle: Any) -> tuple[DeviceProcess, ...]:
    """Compute processes only: a desktop's graphics do not make a card busy."""
    try:
        found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLLibraryMismatchError:  # a driver older than 510 has only the second version of this call
        found = nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
        return ()
    return tuple(DeviceProcess(p.pid, None if p.usedGpuMemory is None else p.usedGpuMemory / _GB) for p in found)
