"""How much of the machine training uses: useful FLOPs of a token, over the matrix product rate measured here.

Shapes: M rows of a product, K its inner size, N its outer size.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .disk import write_json, writing
from .engine import Ranks, full_shape
from .model import DTYPES, PackedLanguageModel
from .spec import TrainError, TrainSpec

RATES_FILE = "matmul_rates.json"
MEASUREMENTS = 3
"""Runs that measure; later ones take the best of theirs. One on a busy machine alone would be too low for ever."""
WINDOW_S = 0.06
WINDOWS = 3
WEIGHT_BYTES = 32 * 2**20
"""Of all weights that a measurement goes round: in a model of many layers a weight has left the fast caches when it is used again."""
MAX_FLOPS_CPU = 8e9
"""Of one product, so that a measurement of a large model's shapes stays short."""


def matmul_parameters(model: nn.Module, config: Any) -> int:
    """Weights that one token is multiplied with: every matrix, head and adapters included, that is not an embedding table.

    A head tied to the embedding counts once. Of a layer of experts, the share that a token is sent to counts. Sizes are
    those of the whole model, also where it is sharded or packed into 4 bits.
    """
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    used = getattr(config, "num_experts_per_tok", None) or experts
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # The weight's own shape would be that of packed bytes, or of a shard.
            total += module.in_features * module.out_features
        elif not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                shape = full_shape(parameter)
                expert_share = used / experts if len(shape) == 3 and shape[0] == experts else 1.0
                total += math.prod(shape) * expert_share if len(shape) >= 2 else 0.0
    return round(total)


def flops_per_token(parameters: int, method: str) -> int:
    """Useful floating-point operations of one token's forward and backward pass.

    2 a parameter for the forward pass and 2 for the gradient of its input; with `full`, 2 more for its own gradient.
    The definition is kept simple so that programs can be compared by it: attention scores, the adapters' own gradients
    and the recomputing of activations are left out, and the head counts for every token.
    """
    return (6 if method == "full" else 4) * parameters


class Throughput:
    """Share of the machine's matrix product rate. Rank 0 measures, at most once a run, outside of any step."""

    def __init__(self, spec: TrainSpec, ranks: Ranks, model: PackedLanguageModel) -> None:
        config = model.base.config.get_text_config()
        self.flops_per_token = flops_per_token(matmul_parameters(model, config), spec.method.name)
        self.world_size = ranks.world_size
        self.device, self.dtype = ranks.device, spec.model.dtype
        self.file = Path(spec.model.cache_dir) / RATES_FILE
        self.shape = product_shape(config.hidden_size, getattr(config, "intermediate_size", None), ranks.device.type)
        self.key = " | ".join(
            (
                device_name(ranks.device),
                self.dtype,
                f"{torch.get_num_threads()} threads",
                "x".join(str(n) for n in self.shape),
            )
        )
        self.rates = read_rates(self.file).get(self.key, [])

    def share_of_peak(self, tokens: int, seconds: float) -> float | None:
        """Useful FLOP/s of all processes over `world_size` times the rate of one; None before the first measurement."""
        if not self.rates or not seconds:
            return None
        return self.flops_per_token * tokens / seconds / (max(self.rates) * self.world_size)

    def measure(self) -> None:
        """Measure unless enough runs have, and keep the result in the cache folder. About 0.2 s."""
        if len(self.rates) >= MEASUREMENTS:
            return
        rate = measure_rate(self.shape, DTYPES[self.dtype], self.device)
        known = read_rates(self.file)
        self.rates = [*known.get(self.key, []), rate]
        try:
            with writing(self.file):
                self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {**known, self.key: self.rates})
        except TrainError as e:
            # A cache that may only be read is no reason to stop: the next run measures again.
            print(f"the matrix product rate is not kept: {e.message}", flush=True)


def product_shape(hidden: int, inner: Any, device_type: str) -> tuple[int, int, int]:
    """(M, K, N) of the product that is measured: the model's feed-forward layer, or that of a small model."""
    k = max(hidden, 512)
    n = max(inner if isinstance(inner, int) else 4 * hidden, 2 * k)
    if device_type == "cuda":
        return 8192, max(k, 4096), max(n, 4096)
    return max(64, min(1024, int(MAX_FLOPS_CPU / (2 * k * n)))), k, n


def measure_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of x (M, K) @ w (N, K)ᵀ, as a layer does it: the best of a few windows, each the mean of the products in it."""
    m, k, n = shape
    with torch.no_grad():
        x = torch.randn(m, k, device=device).to(dtype)
        copies = max(1, WEIGHT_BYTES // (n * k * dtype.itemsize))
        weight = torch.randn(n, k, device=device).to(dtype)
        weights = itertools.cycle([weight.clone() for _ in range(copies)])
        seconds = best_seconds(lambda: nn.functional.linear(x, next(weights)), device)
    return 2 * m * k * n / seconds


def best_seconds(product: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds of one call, best of WINDOWS windows of about WINDOW_S."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = 1
    best = math.inf
    for window in range(WINDOWS + 1):
        wait()
        began = time.perf_counter()
        for _ in range(times):
            product()
        wait()
        each = (time.perf_counter() - began) / times
        # The first window is one call, which builds the kernel; the second is still sized by that.
        best = each if window <= 1 else min(best, each)
        times = max(1, round(WINDOW_S / each))
    return best


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines: Iterable[str] = info.read_text(encoding="utf-8").splitlines() if info.is_file() else ()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_rates(file: Path) -> dict[str, list[float]]:
    """FLOP/s measured so far, by machine, dtype, threads and shape. A damaged file counts as none: it is measured anew."""
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return rates if isinstance(rates, dict) else {}
