"""The devices of this host, and which of them a `--gpus` selector means. Standard library only; NVML is read elsewhere."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from .job import ClusterError

BUSY_GB = 1.0
"""Other processes may hold this much memory (2**30 bytes) on a device before it counts as busy."""

_NCCL_REASON = (
    "A CUDA process sees one MIG instance, and NCCL cannot connect two instances of one card "
    "(NVIDIA/nccl#1716, pytorch/pytorch#130181)."
)


@dataclass(frozen=True)
class DeviceProcess:
    """A process that computes on a device."""

    pid: int
    used_gb: float | None
    """In 2**30 bytes; None where the driver does not say."""


@dataclass(frozen=True)
class Device:
    """A GPU, or one MIG instance of it. Memory in 2**30 bytes; 0.0 where the driver does not say."""

    index: str
    """Physical index in PCI bus order ("2"); "2:1" is the second MIG instance of that card."""
    name: str
    uuid: str
    memory_total_gb: float
    memory_free_gb: float
    is_mig: bool
    """It is a MIG instance."""
    mig_mode: bool
    """It is a card that is split into MIG instances, so that it cannot be used as a whole."""
    parent_uuid: str
    """UUID of the card of a MIG instance; "" for a card."""
    processes: tuple[DeviceProcess, ...] = ()

    @property
    def busy_gb(self) -> float:
        """Memory held by the processes that the driver lists; all used memory when it does not say how much each holds."""
        if any(p.used_gb is None for p in self.processes):
            return self.memory_total_gb - self.memory_free_gb
        return sum(p.used_gb or 0.0 for p in self.processes)


@dataclass(frozen=True)
class Inventory:
    """What this host has: a plain value, so that a plan can be made for a pretended host."""

    kind: Literal["cuda", "cpu"]
    devices: tuple[Device, ...]
    cpu_count: int
    """Cores that this process may use."""
    memory_gb: float
    """Host memory that this process may use, in 2**30 bytes."""
    problem: str = ""
    """Why `devices` is empty or incomplete; "" when all is well."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inventory:
        """Exact inverse of `to_dict`, also after a JSON round trip."""
        devices = tuple(
            Device(**{**d, "processes": tuple(DeviceProcess(**p) for p in d["processes"])}) for d in data["devices"]
        )
        return cls(**{**data, "devices": devices})

    def table(self) -> str:
        """One line per device, for error texts and for `launch doctor`."""
        rows = [("index", "name", "free / total", "used by", "UUID")]
        for d in self.devices:
            memory = f"{d.memory_free_gb:.1f} / {d.memory_total_gb:.1f} GB"
            used_by = "split into MIG instances" if d.mig_mode else describe_processes(d.processes) or "-"
            rows.append((d.index, d.name, memory, used_by, d.uuid))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]])
            for row in rows
        )


@dataclass(frozen=True)
class Selection:
    """The devices of a run: one process per device, in rank order."""

    kind: Literal["cuda", "cpu"]
    devices: tuple[Device, ...]
    """Empty on CPU."""
    num_processes: int
    threads_per_process: int
    warnings: tuple[str, ...] = ()
    """Things worth a line on the screen; none of them stops the run."""

    @property
    def uuids(self) -> tuple[str, ...]:
        """For `JobSpec.devices`, in rank order."""
        return tuple(d.uuid for d in self.devices)


def host_inventory(devices: tuple[Device, ...], problem: str = "") -> Inventory:
    """This host's cores and memory (container limits included) together with `devices`. Reads /proc and /sys."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        memory = min(memory, int(limit))
    return Inventory("cuda" if devices else "cpu", devices, cores, memory / 2**30, problem)


def describe_processes(processes: Sequence[DeviceProcess]) -> str:
    """ "pid 4711 (12.0 GB), pid 4712 (memory unknown)"."""
    return ", ".join(
        f"pid {p.pid} ({'memory unknown' if p.used_gb is None else f'{p.used_gb:.1f} GB'})" for p in processes
    )


def cpu_selection(num_processes: int, inventory: Inventory) -> Selection:
    """`--cpu N`. Raises ClusterError when `num_processes` is not positive."""
    if num_processes < 1:
        raise ClusterError(f"--cpu {num_processes}: at least one process is needed", "Give --cpu 1 or more.")
    warnings: tuple[str, ...] = ()
    if num_processes > inventory.cpu_count:
        warnings = (f"--cpu {num_processes}: more processes than the {inventory.cpu_count} cores of this host",)
    return Selection("cpu", (), num_processes, max(1, inventory.cpu_count // num_processes), warnings)


def select(inventory: Inventory, selector: str | None, env: Mapping[str, str], allow_busy: bool = False) -> Selection:
    """The devices that `--gpus SELECTOR` means. Pure.

    `selector`: comma-separated indices ("0,2"), ranges ("0-3"), MIG labels ("0:1"), UUIDs or their unique beginnings
    ("GPU-1a2b", "MIG-..."), or alone "all" or "free:N". None takes every free device, and the CPU when there is none.
    An inherited CUDA_VISIBLE_DEVICES (in `env`) limits what may be chosen. Raises ClusterError, listing what exists,
    for devices that are absent, repeated, busy, excluded by CUDA_VISIBLE_DEVICES, or that cannot work together.
    """
    if not inventory.devices:
        return _without_devices(inventory, selector, env)
    visible, warnings = _visible_devices(inventory, env)
    if selector is None and visible == ():
        note = "CUDA_VISIBLE_DEVICES is set and names no device: using the CPU"
        return dataclasses.replace(cpu_selection(1, inventory), warnings=(note,))
    flag = "the default devices" if selector is None else f"--gpus {selector}"
    candidates = [d for d in inventory.devices if not d.mig_mode and _is_covered(d, visible)]
    words = [] if selector is None else [w.strip() for w in selector.replace("，", ",").split(",")]
    if selector is None:
        chosen = _default_devices(inventory, candidates, warnings)
    elif words == ["all"]:
        chosen = candidates
    elif len(words) == 1 and words[0].startswith("free:"):
        chosen = _free_devices(inventory, candidates, words[0])
    else:
        chosen = _named_devices(inventory, selector, words)
        _refuse_hidden(inventory, chosen, visible, flag, env)
    if not chosen:
        _refuse(inventory, f"{flag}: no usable device is left", "Unset CUDA_VISIBLE_DEVICES, or create MIG instances.")
    if len(chosen) > 1 and any(d.is_mig for d in chosen):
        _refuse(
            inventory,
            f"{flag}: a MIG instance must be the only device of a run, and {len(chosen)} devices are chosen",
            f"{_NCCL_REASON}\nChoose one instance, or whole cards.",
        )
    if not allow_busy:
        _refuse_busy(inventory, chosen, flag)
    warnings.extend(_memory_warnings(chosen))
    threads = max(1, inventory.cpu_count // len(chosen))
    return Selection("cuda", tuple(chosen), len(chosen), threads, tuple(warnings))


def _without_devices(inventory: Inventory, selector: str | None, env: Mapping[str, str]) -> Selection:
    if selector is not None:
        raise ClusterError(
            f"--gpus {selector}: {inventory.problem or 'no NVIDIA GPU found'}", "Use --cpu N to run on the CPU."
        )
    selection = cpu_selection(1, inventory)
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        return selection
    note = f"CUDA_VISIBLE_DEVICES={visible} is set, but {inventory.problem or 'no NVIDIA GPU was found'}: using the CPU"
    return dataclasses.replace(selection, warnings=(*selection.warnings, note))


def _visible_devices(inventory: Inventory, env: Mapping[str, str]) -> tuple[tuple[Device, ...] | None, list[str]]:
    """The devices that CUDA_VISIBLE_DEVICES names (None: not set, () : it hides all), and warnings about it."""
    value = env.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None, []
    if value.strip() in ("", "-1", "NoDevFiles"):
        return (), []
    warnings: list[str] = []
    words = [word.strip() for word in value.split(",")]
    devices: list[Device] = []
    for word in words:
        found = _matches(inventory, word)
        if len(found) != 1:
            what = "names no device of this host" if not found else "fits several devices"
            _refuse(
                inventory, f'CUDA_VISIBLE_DEVICES={value}: "{word}" {what}', "Unset or correct CUDA_VISIBLE_DEVICES."
            )
        devices.append(found[0])
    by_number = any(word.isdigit() for word in words)
    names = {d.name for d in inventory.devices if not d.is_mig}
    if by_number and len(names) > 1 and env.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        warnings.append(
            f"CUDA_VISIBLE_DEVICES={value} is read in PCI bus order (as nvidia-smi counts); other programs may count the "
            "fastest card first. Set CUDA_DEVICE_ORDER=PCI_BUS_ID to make both agree."
        )
    return tuple(devices), warnings


def _is_covered(device: Device, visible: tuple[Device, ...] | None) -> bool:
    return visible is None or any(v.uuid in (device.uuid, device.parent_uuid) for v in visible)


def _matches(inventory: Inventory, word: str) -> list[Device]:
    """Devices with this index, MIG label, UUID or beginning of a UUID ("GPU-..." or "MIG-...")."""
    if re.fullmatch(r"\d+(:\d+)?", word):
        label = ":".join(str(int(part)) for part in word.split(":"))
        return [d for d in inventory.devices if d.index == label]
    exact = [d for d in inventory.devices if d.uuid.lower() == word.lower()]
    if exact or not word.upper().startswith(("GPU-", "MIG-")):
        return exact
    return [d for d in inventory.devices if d.uuid.lower().startswith(word.lower())]


def _named_devices(inventory: Inventory, selector: str, words: list[str]) -> list[Device]:
    """The devices of an explicit list, in the order written."""
    flag = f"--gpus {selector}"
    chosen: dict[str, str] = {}
    devices: list[Device] = []
    for word in _expand_ranges(inventory, selector, words):
        if not re.fullmatch(r"\d+(:\d+)?|(GPU|MIG)-[0-9a-z/-]*", word, re.IGNORECASE):
            hint = 'Write indices ("0,2"), a range ("0-3"), UUIDs ("GPU-...", "MIG-..."), "all" or "free:2".'
            problem = "is empty" if not word else f'"{word}" is not a device'
            _refuse(inventory, f"{flag}: {problem}", hint)
        found = _matches(inventory, word)
        if not found:
            _refuse(inventory, f"{flag}: this host has no device {word}", "Choose from the list, or use --cpu N.")
        if len(found) > 1:
            _refuse(inventory, f"{flag}: {word} fits {len(found)} devices", "Write more of the UUID.")
        device = found[0]
        if device.mig_mode:
            _refuse_split_card(inventory, device, flag)
        if device.uuid in chosen:
            _refuse(
                inventory,
                f"{flag}: {word} repeats {chosen[device.uuid]} (device {device.index}, {device.uuid})",
                "Name each device once: every process needs a device of its own.",
            )
        chosen[device.uuid] = word
        devices.append(device)
    return devices


def _expand_ranges(inventory: Inventory, selector: str, words: list[str]) -> list[str]:
    expanded: list[str] = []
    for word in words:
        match = re.fullmatch(r"(\d{1,4})\s*-\s*(\d{1,4})", word)
        if match is None:
            expanded.append(word)
            continue
        first, last = int(match[1]), int(match[2])
        if last < first:
            _refuse(inventory, f"--gpus {selector}: the range {word} runs backwards", f"Write {last}-{first}.")
        expanded.extend(str(index) for index in range(first, last + 1))
    return expanded


def _default_devices(inventory: Inventory, candidates: list[Device], warnings: list[str]) -> list[Device]:
    """Every free card; on a host with MIG instances only, the one with the most free memory."""
    idle = [d for d in candidates if d.busy_gb <= BUSY_GB]
    cards = [d for d in idle if not d.is_mig]
    if cards or not idle:
        if not cards:
            _refuse(
                inventory,
                "no device is free for this run",
                "Name one with --gpus once it is free, create MIG instances where a card is split, or use --cpu N.",
            )
        return cards
    instance = max(idle, key=lambda d: d.memory_free_gb)
    if len(idle) > 1:
        warnings.append(
            f"using one MIG instance ({instance.index}, {instance.name}) of {len(idle)}: a run cannot span several"
        )
    return [instance]


def _free_devices(inventory: Inventory, candidates: list[Device], word: str) -> list[Device]:
    """free:N: the N cards (or, for N = 1, the MIG instance) without processes and with the least used memory."""
    count = int(word[5:]) if re.fullmatch(r"free:\d{1,4}", word) else 0
    if count < 1:
        _refuse(
            inventory, f"--gpus {word}: free needs a positive number of devices", "Write for example --gpus free:2."
        )
    free = [d for d in candidates if not d.processes]
    cards = [d for d in free if not d.is_mig]
    pool = free if count == 1 and not cards else cards
    if len(pool) < count:
        _refuse(
            inventory,
            f"--gpus {word}: {len(pool)} device(s) without other processes, {count} wanted",
            "Ask for fewer, or wait until others end.",
        )
    by_use = sorted(pool, key=lambda d: d.memory_total_gb - d.memory_free_gb)[:count]
    return [d for d in candidates if d in by_use]


def _refuse(inventory: Inventory, message: str, hint: str) -> NoReturn:
    raise ClusterError(f"{message}\nThis host has:\n{inventory.table()}", hint)


def _refuse_hidden(
    inventory: Inventory, chosen: list[Device], visible: tuple[Device, ...] | None, flag: str, env: Mapping[str, str]
) -> None:
    """Raises ClusterError when --gpus asks for a device that CUDA_VISIBLE_DEVICES hides."""
    hidden = [d for d in chosen if not _is_covered(d, visible)]
    if visible is None or not hidden:
        return
    allowed = ", ".join(f"{d.index} ({d.uuid})" for d in visible) or "no device"
    _refuse(
        inventory,
        f"{flag} means device {', '.join(f'{d.index} ({d.uuid})' for d in hidden)}, but "
        f'CUDA_VISIBLE_DEVICES="{env["CUDA_VISIBLE_DEVICES"]}" allows {allowed}',
        "Unset CUDA_VISIBLE_DEVICES, or choose among the devices that it names. Both count physical devices in PCI bus order.",
    )


def _refuse_split_card(inventory: Inventory, card: Device, flag: str) -> NoReturn:
    instances = [d for d in inventory.devices if d.parent_uuid == card.uuid]
    if not instances:
        _refuse(
            inventory,
            f"{flag}: MIG is on for device {card.index} ({card.name}), but it has no instance",
            "Create one (sudo nvidia-smi mig -cgi 1g.10gb -C), or turn MIG off (sudo nvidia-smi -mig 0).",
        )
    _refuse(
        inventory,
        f"{flag}: device {card.index} ({card.name}) is split into {len(instances)} MIG instance(s); choose one of them",
        "\n".join(
            f"--gpus {d.index}  or  --gpus {d.uuid}   ({d.name}, {d.memory_free_gb:.1f} GB free)" for d in instances
        ),
    )


def _refuse_busy(inventory: Inventory, chosen: list[Device], flag: str) -> None:
    busy = [d for d in chosen if d.busy_gb > BUSY_GB]
    if busy:
        details = "; ".join(f"device {d.index} by {describe_processes(d.processes)}" for d in busy)
        _refuse(
            inventory,
            f"{flag}: in use: {details}",
            "Choose others (--gpus free:1), or wait. To see whose they are: ps -o user,pid,etime,cmd -p PID",
        )


def _memory_warnings(chosen: list[Device]) -> list[str]:
    """Memory that no listed process holds (another container, a desktop), and cards of different size."""
    warnings = []
    for d in chosen:
        unseen = d.memory_total_gb - d.memory_free_gb - d.busy_gb
        if unseen > max(2 * BUSY_GB, 0.05 * d.memory_total_gb):
            warnings.append(
                f"device {d.index}: {unseen:.1f} of {d.memory_total_gb:.1f} GB are used by processes that cannot be seen "
                "from here (another container, or a desktop)"
            )
    if len({(d.name, round(d.memory_total_gb)) for d in chosen}) > 1:
        warnings.append(
            f"the devices differ ({', '.join(d.name for d in chosen)}): the slowest and smallest sets the pace"
        )
    return warnings


def _read(path: str) -> str:
    """A kernel file's text, or "" on systems without it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
