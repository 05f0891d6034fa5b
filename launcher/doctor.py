"""`launch doctor`: what a run would meet on this machine. Nothing heavy is imported here; torch answers from a process of its own."""

from __future__ import annotations

import importlib.util
import json
import locale
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.spec import EXIT_OK, EXIT_USER

from .compiler import find_compiler, install_hint
from .stages import PACKAGE_ROOT

OUR_PACKAGES = ("launcher", "trainer", "cluster")
REQUIRED = (
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "safetensors",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "gguf",
    "pydantic",
    "typer",
    "pyyaml",
    "nvidia-ml-py",
    "ray",
)
MIN_PYTHON = (3, 11)
LOW_DISK_GB = 20.0
LOW_SHARED_MEMORY_GB = 1.0
TORCH_TIMEOUT_S = 120

_GB = 2**30
_TORCH_PROBE = """
import json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices, "cpu_bf16": bf16}))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool | None
    """False: a run will fail or be wrong. None: worth knowing. True: fine."""
    detail: str
    fix: str = ""


def run_doctor(env: Mapping[str, str] = os.environ, cwd: Path | None = None) -> list[Check]:
    """All checks, in the order of the report. Starts one process that imports torch (seconds); writes nothing."""
    from cluster.environment import environment_warnings
    from cluster.nvml import read_inventory

    from .model_facts import hub_cache_dir

    here = cwd or Path.cwd()
    inventory = read_inventory()
    num_cards = sum(not d.is_mig for d in inventory.devices)
    torch_info = probe_torch()
    return [
        check_python(sys.version_info[:3]),
        *check_packages(installed_versions(REQUIRED), read_constraints(PACKAGE_ROOT / "constraints.txt")),
        check_torch(torch_info, num_cards),
        check_devices(inventory.table() if inventory.devices else "", inventory.problem),
        Check("host", True, f"{inventory.cpu_count} cores, {inventory.memory_gb:.0f} GB memory"),
        *check_names(PACKAGE_ROOT, here, metadata.packages_distributions()),
        check_command(shutil.which("launch", path=env.get("PATH")), Path(sys.executable).parent),
        *check_disk(here, num_cards),
        check_hub(env, (hub_cache_dir().parent / "token").is_file()),
        *(Check("environment", None, text) for text in environment_warnings(env)),
        check_compiler(env),
        check_locale(locale.getpreferredencoding(False), sys.stdout.encoding or ""),
    ]


def render(checks: Iterable[Check]) -> str:
    """The report as text: one block per check, and a last line that sums up."""
    marks = {True: "ok  ", None: "note", False: "FAIL"}
    checks = list(checks)
    width = max((len(c.name) for c in checks), default=0)
    lines = []
    for check in checks:
        first, *rest = check.detail.splitlines() or [""]
        lines.append(f"{marks[check.ok]}  {check.name.ljust(width)}  {first}")
        indent = " " * (width + 8)
        lines.extend(indent + line for line in rest)
        if check.ok is not True:
            lines.extend(f"{indent}-> {line}" for line in check.fix.splitlines())
    failed = [c.name for c in checks if c.ok is False]
    lines.append(f"{len(failed)} problem(s): {', '.join(failed)}" if failed else "no problem found")
    return "\n".join(lines)


def exit_code(checks: Iterable[Check]) -> int:
    """2 when a check failed, else 0."""
    return EXIT_USER if any(c.ok is False for c in checks) else EXIT_OK


def check_python(version: tuple[int, ...]) -> Check:
    """The interpreter that runs this; workers run under the same one."""
    text = f"{'.'.join(map(str, version))} ({sys.executable})"
    least = ".".join(map(str, MIN_PYTHON))
    return Check("python", version >= MIN_PYTHON, text, f"Python {least} or newer is needed.")


def installed_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Distribution -> installed version, None where it is absent. Imports none of them."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def read_constraints(path: Path) -> dict[str, str]:
    """`name==version` lines of a constraints file; {} where there is none (an installed wheel)."""
    if not path.is_file():
        return {}
    pins = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {_normal(name): version for name, version in pins}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_packages(found: Mapping[str, str | None], pins: Mapping[str, str]) -> list[Check]:
    """One line with all versions, and one more for each package that is missing or is not the tested version."""
    present = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    checks = [Check("packages", True, present or "none")]
    pip = f"{sys.executable} -m pip install"
    for name, version in found.items():
        pin = pins.get(_normal(name))
        if version is None:
            ok = None if name == "ray" else False
            use = "only needed for Ray" if name == "ray" else "is not installed"
            checks.append(Check(name, ok, use, f"{pip} {name}{f'=={pin}' if pin else ''}"))
        elif pin and version.partition("+")[0] != pin.partition("+")[0]:
            detail = f"{version} is installed, {pin} is the tested version"
            checks.append(Check(name, None, detail, f"{pip} {name}=={pin}"))
    return checks


def probe_torch(executable: str = sys.executable, timeout_s: float = TORCH_TIMEOUT_S) -> dict[str, Any]:
    """{version, cuda, devices, cpu_bf16: the CPU has bf16 instructions} as a fresh process sees them, or {error}."""
    argv = [executable, "-P", "-c", _TORCH_PROBE]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"import torch did not end within {timeout_s:g} s"}
    except OSError as e:
        return {"error": f"{executable} cannot be started: {e.strerror}"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": f"import torch failed: {reason}"}
    return json.loads(lines[-1])


def check_torch(info: Mapping[str, Any], num_cards: int) -> Check:
    """Torch imports, and sees the cards that the driver lists."""
    if "error" in info:
        fix = f"Repair it: make demo, or {sys.executable} -m pip install --force-reinstall torch"
        return Check("torch", False, info["error"], fix)
    build = f"CUDA {info['cuda']}" if info["cuda"] else "CPU build"
    text = f"{info['version']}, {build}, {len(info['devices'])} device(s)"
    if num_cards and not info["cuda"]:
        return Check(
            "torch", False, f"{text}, but the driver lists {num_cards} GPU(s)", "Install a CUDA build of torch."
        )
    if num_cards and not info["devices"]:
        fix = (
            "The driver may be too old for this CUDA version (see nvidia-smi), or CUDA_VISIBLE_DEVICES hides the cards."
        )
        return Check("torch", False, f"{text}, but the driver lists {num_cards} GPU(s)", fix)
    if not info["devices"] and not info["cpu_bf16"]:
        text += "\nno bf16 instructions on this CPU: bf16 and fp16 are multiplied in fp32, at its speed"
    return Check("torch", True, text)


def check_devices(table: str, problem: str) -> Check:
    """What NVML lists. No GPU is a note: training runs on the CPU then."""
    if table:
        return Check("GPUs", None if problem else True, f"{problem}\n{table}".strip("\n"))
    return Check("GPUs", None, f"{problem or 'none'}; runs use the CPU")


def check_names(root: Path, cwd: Path, distributions: Mapping[str, list[str]]) -> list[Check]:
    """Whether `launcher`, `trainer` and `cluster` are ours, and who else brings packages of these names.

    `distributions`: import name -> distributions that install it.
    """
    checks = []
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        others = sorted(d for d in set(distributions.get(name, [])) if _normal(d) != "tunelaunch")
        fix = "Install tunelaunch in an environment of its own: uv tool install tunelaunch, or pipx install tunelaunch."
        if origin is None or origin.parent.parent != root:
            checks.append(Check("names", False, f"`import {name}` gives {origin}, not {root / name}", fix))
        elif others:
            text = f"{', '.join(others)} installs a package {name} too, over or beside ours"
            checks.append(Check("names", False, text, fix))
        own = [p for p in (cwd / f"{name}.py", cwd / name) if p.exists() and p.resolve() != root / name]
        checks.extend(Check("names", None, f"{p} is not ours; runs ignore it (python -P)") for p in own)
    return checks or [Check("names", True, f"launcher, trainer and cluster come from {root}")]


def check_command(found: str | None, scripts: Path) -> Check:
    """Whether `launch` on PATH belongs to this Python."""
    if found is None:
        return Check("command", None, "no `launch` on PATH", f"Add {scripts} to PATH, or call {scripts / 'launch'}.")
    if Path(found).parent.resolve() != scripts.resolve():
        fix = f"Use `tunelaunch`, the same command by another name, or put {scripts} first in PATH."
        return Check("command", None, f"`launch` on PATH is {found}, not the one of this Python ({scripts})", fix)
    return Check("command", True, found)


def check_disk(cwd: Path, num_cards: int) -> list[Check]:
    """Free space where runs and caches go, and shared memory when several cards talk to each other."""
    from .model_facts import hub_cache_dir
    from .start import cache_dir

    checks = []
    for name, path in (("runs", cwd / "runs"), ("cache", cache_dir()), ("Hub cache", hub_cache_dir())):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free / _GB
        writable = os.access(existing, os.W_OK)
        ok = False if not writable else (None if free < LOW_DISK_GB else True)
        text = f"{path}: {free:.0f} GB free" + ("" if writable else ", not writable")
        fix = "A 7 B model needs about 30 GB." if writable else "Change its owner, or choose another folder."
        checks.append(Check(f"disk {name}", ok, text, fix))
    shared = Path("/dev/shm")
    if num_cards > 1 and shared.is_dir() and shutil.disk_usage(shared).total / _GB < LOW_SHARED_MEMORY_GB:
        size = shutil.disk_usage(shared).total / _GB
        fix = "Start the container with --ipc=host or --shm-size=8g; NCCL needs it between cards."
        checks.append(Check("shared memory", None, f"/dev/shm has {size:.2f} GB", fix))
    return checks


def check_hub(env: Mapping[str, str], has_token_file: bool) -> Check:
    """Where models come from. Says whether there is a token, never which."""
    endpoint = env.get("HF_ENDPOINT") or "https://huggingface.co"
    offline = env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    text = "offline (HF_HUB_OFFLINE): only models in the cache" if offline else endpoint
    token = "set in HF_TOKEN" if env.get("HF_TOKEN") else "saved by `hf auth login`" if has_token_file else "none"
    return Check("Hub", None if offline else True, f"{text}; token: {token}")


def check_compiler(env: Mapping[str, str]) -> Check:
    """What torch.compile would call on the CPU. Nothing else in a run is compiled, offloading included."""
    found = find_compiler("cpu", env)
    if not found:
        return Check("compiler", None, "no C++ compiler; only train.compile needs one", install_hint("cpu"))
    return Check("compiler", True, f"{found} (only train.compile needs it)")


def check_locale(preferred: str, stdout: str) -> Check:
    """UTF-8, so that Chinese text survives on screen; files are UTF-8 whatever the locale."""
    names = {_normal(preferred).replace("-", ""), _normal(stdout).replace("-", "")}
    if names <= {"utf8", ""}:
        return Check("locale", True, "UTF-8")
    return Check("locale", None, f"{preferred}, screen {stdout}", "export PYTHONUTF8=1 (or LANG=C.UTF-8)")
