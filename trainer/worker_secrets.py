"""Secrets of a run: named in the plan, read by each worker on its own machine, put into its environment and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from .spec import SecretSpec, TrainError


def provide(secrets: Iterable[SecretSpec], env: MutableMapping[str, str]) -> None:
    """Every secret is in `env` afterwards, for the libraries that look for it there.

    Raises TrainError with all that are missing. A value is in no message, of whatever length or form.
    """
    missing = []
    for secret in secrets:
        if not secret.path:
            if not env.get(secret.name):
                missing.append(f"{secret.name} is not set in the workers' environment")
            continue
        try:
            value = Path(os.path.expanduser(secret.path)).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            why = (e.strerror or "unreadable") if isinstance(e, OSError) else "not a text"
            missing.append(f"{secret.name}: {secret.path}: {why}")
            continue
        if not value or "\0" in value:
            missing.append(f"{secret.name}: {secret.path} holds no value")
            continue
        env[secret.name] = value
    if missing:
        host = os.uname().nodename
        raise TrainError(
            f"secrets of the recipe are missing on {host}: {'; '.join(missing)}",
            "Set the variable where the workers start (on a Ray cluster: before `ray start`, on every node), or name a file "
            "there: secrets: [{name: HF_TOKEN, path: ~/.hf_token}]",
        )
