"""The `connect` stage of a run over several hosts: all ranks meet, and measure how fast they exchange what training will.

It takes seconds, and comes before anything heavy: a firewall, a wrong interface or a slow link is known before a model is
loaded.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .disk import write_json
from .spec import EXIT_RETRY, TrainError

MEASURE_S = 1.0
_BYTES = 2**22
_ROUNDS_AT_ONCE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker connect`."""
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"), help="what the ranks compute on")
    parser.add_argument("--wait-s", type=float, required=True, help="limit of each wait, in seconds")
    parser.add_argument("--out", required=True, help="JSON file for what was measured")


def run(args: argparse.Namespace) -> None:
    """Meet, measure, write `--out` (rank 0). Collective: every rank must call. Raises TrainError (75) when a rank does not come."""
    began = time.monotonic()
    backend, device = "gloo", torch.device("cpu")
    if args.device == "cuda":
        backend, device = "nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=args.wait_s))
        _reduce(torch.zeros(1, device=device))
        met_s = time.monotonic() - began
        found = {"ranks": dist.get_world_size(), "meet_s": round(met_s, 2), **measure(device)}
    except (RuntimeError, dist.DistError) as e:
        raise TrainError(
            f"the ranks cannot exchange data ({backend}): {str(e).splitlines()[0]}",
            "Look at the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME in the plan) and at firewalls between the hosts: "
            "besides the port where they meet, ranks use ports that the system chooses.",
            EXIT_RETRY,
        ) from e
    if dist.get_rank() == 0:
        write_json(Path(args.out), found)
    print(
        f"{found['ranks']} ranks met after {found['meet_s']} s; all-reduce of {_BYTES // 2**20} MB: "
        f"{found['gb_per_s']:.2f} GB/s on the bus; of one number: {found['latency_ms']:.2f} ms",
        flush=True,
    )
    dist.destroy_process_group()


def measure(device: torch.device) -> dict[str, Any]:
    """Bus bandwidth in GB/s (10**9 bytes), 2 (n - 1) / n of the data over the time, as nccl-tests counts it; latency of the smallest exchange.

    Collective: every rank must call. Source: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md.
    """
    world = dist.get_world_size()
    data, number = torch.zeros(_BYTES // 4, device=device), torch.zeros(1, device=device)
    latency_ms = 1e3 * min(_timed(number, 1) for _ in range(20))
    _timed(data, 1)  # the first one opens connections
    # How often is decided once, from the slowest rank's time, so that all do it equally often.
    once_s = torch.tensor([_timed(data, 1)], device=device)
    dist.all_reduce(once_s, op=dist.ReduceOp.MAX)
    rounds = max(1, int(MEASURE_S / (_ROUNDS_AT_ONCE * max(once_s.item(), 1e-6))))
    best_s = min(_timed(data, _ROUNDS_AT_ONCE) for _ in range(min(rounds, 1000)))
    return {"latency_ms": round(latency_ms, 3), "gb_per_s": round(2 * (world - 1) / world * _BYTES / best_s / 1e9, 3)}


def _timed(data: torch.Tensor, rounds: int) -> float:
    """Seconds of one of `rounds` all-reduces."""
    began = time.perf_counter()
    for _ in range(rounds):
        _reduce(data)
    return (time.perf_counter() - began) / rounds


def _reduce(data: torch.Tensor) -> None:
    dist.all_reduce(data)
    if data.device.type == "cuda":
        torch.cuda.synchronize(data.device)
