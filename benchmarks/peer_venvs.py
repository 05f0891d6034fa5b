"""Each peer in an environment of its own, made from the package index under pinned versions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
"""The version of this project's own environment: the kernels are then the same for everybody."""
INSTALL_LIMIT_S = 1800
MADE = "bench_made.json"
REPORTED = ("torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "llamafactory", "trl", "tunelaunch")


class BenchError(Exception):
    """The benchmark cannot go on, or one contender cannot: what happened, and what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


@dataclass(frozen=True)
class Peer:
    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    """Packages taken out again: wheels that are linked with another torch than the one installed fail on import."""
    stubs: tuple[str, ...] = ()
    """Empty modules in place of packages that are imported but not used by text-only training."""


PEERS = {
    "llamafactory": Peer(
        "llamafactory",
        ("llamafactory==0.9.5",),
        removed=("torchvision", "torchaudio"),
        stubs=("torchaudio",),
    ),
    "trl": Peer("trl", ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2")),
}


def ensure_venv(peer: Peer, folder: Path) -> Path:
    """The peer's environment, made when it is absent or was made for other versions. Raises BenchError, naming the log."""
    venv = folder / peer.name
    wanted = {"torch": TORCH, "requirements": list(peer.requirements), "python": sys.version.split()[0]}
    marker = venv / MADE
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        return venv
    if venv.exists():
        shutil.rmtree(venv)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{peer.name}_install.log"
    print(f"making {venv} (minutes; log: {log})", flush=True)
    python = str(venv / "bin" / "python")
    with log.open("wb") as out:
        _call([sys.executable, "-m", "venv", str(venv)], out, log)
        _call([python, "-m", "pip", "install", TORCH, *peer.requirements], out, log)
        if peer.removed:
            _call([python, "-m", "pip", "uninstall", "-y", *peer.removed], out, log)
        site = next((venv / "lib").glob("python3*")) / "site-packages"
        for stub in peer.stubs:
            (site / stub).mkdir()
            (site / stub / "__init__.py").touch()
        # Some wheels hold test files that do not compile, so its exit code says nothing.
        subprocess.run([python, "-m", "compileall", "-q", "-j", "0", str(site)], stdout=out, stderr=out, check=False)
    marker.write_text(json.dumps(wanted), encoding="utf-8")
    return venv


def _call(argv: list[str], out: object, log: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    try:
        done = subprocess.run(argv, stdout=out, stderr=out, env=env, timeout=INSTALL_LIMIT_S, check=False)  # type: ignore[arg-type]
    except subprocess.TimeoutExpired:
        raise BenchError(f"{argv[0]} took more than {INSTALL_LIMIT_S} s", f"See {log}") from None
    if done.returncode != 0:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise BenchError(f"{' '.join(argv[:5])} ... failed: " + " / ".join(last), f"See {log}")


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages that matter, as the environment of `python` has them."""
    code = (
        "import json, sys\nfrom importlib import metadata\nfound = {'python': sys.version.split()[0]}\n"
        f"for name in {REPORTED!r}:\n"
        "    try:\n        found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n        continue\n"
        "print(json.dumps(found))"
    )
    # -P: the current folder holds packages of the same names.
    done = subprocess.run([str(python), "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)
