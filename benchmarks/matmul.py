"""`python -m benchmarks.matmul DTYPE N,K ...`: this machine's matmul rate at a model's layer shapes, as JSON on stdout.

DTYPE is bf16, fp32, or auto: bf16 unless the CPU has no instructions for it. What a contender does in useful work a second
is given as a share of what its matmuls alone could do on this machine.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable

ROWS = 1024
"""Tokens of one micro batch: the M of every product."""
OUTSIDE_CACHE_BYTES = 128 * 2**20
WINDOW_S = 0.3
WINDOWS = 5


def layer_shapes(config: dict[str, int]) -> dict[tuple[int, int], int]:
    """(out, in) of each linear layer of a Llama- or Qwen2-shaped config.json -> how many the model has, head included."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    all_of_a_layer = [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]
    all_of_a_layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    counts = {shape: layers * all_of_a_layer.count(shape) for shape in all_of_a_layer}
    return {**counts, (config["vocab_size"], hidden): 1}


def model_rate(rates: dict[str, float], counts: dict[tuple[int, int], int]) -> float:
    """GFLOP/s of all matmuls of one forward pass and of its input gradients, each at its own measured rate."""
    flops = seconds = 0.0
    for (out, inner), times in counts.items():
        for name in _names(out, inner):
            flops += times * out * inner
            seconds += times * out * inner / rates[name]
    return flops / seconds


def _names(out: int, inner: int) -> tuple[str, str]:
    return f"forward {ROWS}x{inner}x{out}", f"gradient {ROWS}x{out}x{inner}"


def useful_flops_per_token(num_parameters: int) -> int:
    """LoRA: 2 for the forward pass and 2 for the gradient of the input, a parameter; frozen weights have no own gradient."""
    return 4 * num_parameters


def chosen_dtype(wanted: str) -> str:
    """bf16 or fp32."""
    if wanted != "auto":
        return wanted
    import torch

    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def measured_rates(shapes: list[tuple[int, int]], dtype_name: str) -> dict[str, float]:
    """GFLOP/s of `x (M, in) @ w.T` and of its input gradient `g (M, out) @ w`, each the best of a few windows."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    found = {}
    for out, inner in shapes:
        # As in a model of many layers, a weight has left the cache when it is used again.
        copies = math.ceil(OUTSIDE_CACHE_BYTES / (dtype.itemsize * out * inner))
        weights = [torch.randn(out, inner).to(dtype) for _ in range(copies)]
        x, g = torch.randn(ROWS, inner).to(dtype), torch.randn(ROWS, out).to(dtype)
        flops = 2 * ROWS * out * inner
        forward, gradient = _names(out, inner)
        found[forward] = flops / _best_s([lambda x=x, w=w: x @ w.T for w in weights]) / 1e9
        found[gradient] = flops / _best_s([lambda g=g, w=w: g @ w for w in weights]) / 1e9
    return found


def _best_s(products: list[Callable[[], object]]) -> float:
    """Seconds of one product: the best of a few windows, each going round all of them."""
    products[0]()
    best = float("inf")
    for _ in range(WINDOWS):
        began, times = time.perf_counter(), 0
        while times < len(products) or time.perf_counter() - began < WINDOW_S:
            products[times % len(products)]()
            times += 1
        best = min(best, (time.perf_counter() - began) / times)
    return best


if __name__ == "__main__":
    name = chosen_dtype(sys.argv[1])
    pairs = [tuple(int(n) for n in argument.split(",")) for argument in sys.argv[2:]]
    print(json.dumps({"dtype": name, "rates": measured_rates([(a, b) for a, b in pairs], name)}))
