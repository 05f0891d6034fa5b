"""What one host has: versions, devices, files, disk, clock, addresses. Collected on the host, compared in `preflight`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .nvml import read_inventory

_WHOLE_FILE_BYTES = 2**30
"""Larger files are compared by their size and their ends, so that a terabyte costs no minutes."""
_END_BYTES = 2**24
_OUR_PACKAGES = ("cluster", "launcher", "trainer")


def collect(packages: list[str], folders: list[str], files: list[str]) -> dict[str, Any]:
    """A plain value, ready for JSON. `folders` must become writable, `files` must be the same everywhere."""
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in packages},
        "code": code_digest(),
        "cuda": _cuda_of_torch(),
        "inventory": read_inventory().to_dict(),
        "memory_free_gb": _free_memory_gb(),
        "folders": {folder: _folder(Path(folder)) for folder in folders},
        "files": {file: _content(Path(file)) for file in files},
        "addresses": addresses(),
    }


def code_digest() -> str:
    """The first 16 hex digits of the sha256 over our own source: two checkouts may bear the same version."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in _OUR_PACKAGES:
        for path in sorted((root / package).glob("*.py")):
            digest.update(f"{package}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _free_memory_gb() -> float:
    """Memory that further processes may take here, in 2**30 bytes: what the kernel can free counts, and a container's limit."""
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no control group of version 2, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - used + (int(cached[1]) if cached else 0))
    return free / 2**30


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda_of_torch() -> str | None:
    """The CUDA version that torch was built for; None for a CPU build. Read from its version file: importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    with contextlib.suppress(OSError):
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
        if match := re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            return match[1]
    return None


def _folder(folder: Path) -> dict[str, Any]:
    """Of the nearest folder that exists: its path, free space in GB (10**9 bytes), and why nothing can be written there ("" when it can)."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    problem = "" if os.access(nearest, os.W_OK | os.X_OK) else "not writable"
    try:
        free_gb = shutil.disk_usage(nearest).free / 1e9
    except OSError as e:
        free_gb, problem = 0.0, e.strerror or str(e)
    return {"nearest": str(nearest), "free_gb": free_gb, "problem": problem}


def _content(path: Path) -> str | None:
    """What tells whether two hosts see the same: a digest of a file, of a folder's names and sizes; None when it is absent."""
    try:
        if path.is_dir():
            rows = sorted(f"{p.name} {p.stat().st_size}" for p in path.iterdir() if p.is_file())
            return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                digest.update(file.read(_END_BYTES))
                file.seek(-_END_BYTES, os.SEEK_END)
                digest.update(file.read())
        return digest.hexdigest()[:16]
    except OSError:
        return None


def addresses() -> list[tuple[str, str]]:
    """(interface, IPv4 or global IPv6 address) of every interface but the loopback, as others may reach this host."""
    import psutil

    found = []
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            usable = entry.family in (socket.AF_INET, socket.AF_INET6) and not entry.address.startswith(
                ("127.", "fe80")
            )
            if usable and entry.address != "::1":
                found.append((interface, entry.address))
    return sorted(found, key=lambda pair: (":" in pair[1], pair[0].startswith(("docker", "br-", "virbr", "veth"))))


def write_tokens(folders: list[str], name: str) -> dict[str, str]:
    """Leave a file called `name` in each folder, for the other hosts to find. Returns folder -> why it could not be written."""
    problems = {}
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_text(name, encoding="ascii")
        except OSError as e:
            problems[folder] = e.strerror or str(e)
    return problems


def missing_tokens(folders: list[str], names: list[str]) -> dict[str, list[str]]:
    """folder -> the tokens of other hosts that cannot be read there."""
    missing = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            os.listdir(folder)  # NFS answers from its cache of names until the folder is read again
        lost = [name for name in names if _read(Path(folder) / name) != name]
        if lost:
            missing[folder] = lost
    return missing


def remove_tokens(folders: list[str], name: str) -> None:
    """Take one's own tokens away again."""
    for folder in folders:
        with contextlib.suppress(OSError):
            (Path(folder) / name).unlink()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
