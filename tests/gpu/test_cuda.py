"""What only a CUDA device can show, one device is enough. `make test-gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.commands import ROOT
from torch import nn

from trainer.attention import packed_attention

pytestmark = pytest.mark.gpu

LENGTHS = (700, 1, 131, 1216)


def qkv(kv_heads: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, h, sum(LENGTHS), 64, generator=generator) for h in (6, kv_heads, kv_heads)]
    return [t.to(device, dtype).requires_grad_() for t in made]


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("window", [None, 100])
def test_packed_attention_computes_what_fp32_does_on_cpu(kv_heads: int, window: int | None) -> None:
    """Outputs and gradients, each document by itself; the error is bf16's own (8 bits of mantissa)."""
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        q, k, v = qkv(kv_heads, device, dtype)
        out, _ = packed_attention(nn.Module(), q, k, v, None, document_lengths=LENGTHS, sliding_window=window)
        (out.float() * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for exact, found in zip(*results, strict=True):
        error = (found.cpu().float() - exact).norm() / exact.norm()
        assert error < 0.01, error


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("zero", [2, 3])
def test_a_whole_run_on_one_device(method: str, zero: int, tmp_path: Path) -> None:
    """All stages in bf16, with devices named by their UUIDs; the loss falls."""
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny_cpu.yaml").read_text(encoding="utf-8"))
    recipe["model"] = {"source": f"random:{ROOT / 'recipes' / 'tiny'}", "dtype": "bf16"}
    recipe["method"] = {"name": method} if method == "full" else {"name": method, "rank": 8}
    recipe["data"]["files"] = str(ROOT / "recipes" / "data" / "example_chat.jsonl")
    recipe["train"] |= {"micro_batch": 2}
    recipe["parallel"] = {"zero": zero}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    argv = [sys.executable, "-m", "launcher", "run", str(tmp_path / "recipe.yaml"), "--gpus", "0"]
    done = subprocess.run(
        [*argv, "--run-dir", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "succeeded"
