"""Which compiler a run would find. Only `train.compile` needs one: nothing else in a run is compiled."""

from __future__ import annotations

import shutil
from collections.abc import Mapping


def find_compiler(device: str, env: Mapping[str, str]) -> str:
    """Path of what torch.compile would call, by its own rules; "" when there is none.

    cpu: $CXX, else g++ (torch/_inductor/config.py). cuda: Triton's $CC, else gcc or clang (triton/runtime/build.py).
    """
    variable, usual = ("CXX", ["g++"]) if device == "cpu" else ("CC", ["gcc", "clang"])
    names = [env[variable]] if env.get(variable) else usual
    found = (shutil.which(name, path=env.get("PATH")) for name in names)
    return next((path for path in found if path), "")


def install_hint(device: str) -> str:
    """What to do where `find_compiler` found nothing."""
    name, variable = ("g++", "CXX") if device == "cpu" else ("gcc", "CC")
    return f"Install one (apt install {name}), set {variable} to yours, or write train.compile: false."
