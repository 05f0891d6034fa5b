"""Our loop against a plain one: transformers + peft, one document at a time, whole logits, no DeepSpeed, no packing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.commands import losses, train_only

from trainer.data import TokenData, num_steps, rows_per_step, step_rows
from trainer.spec import Prepared, TrainSpec, read_plan

RECIPE = """
model: {source: "random:%s", dtype: fp32}
method: {name: %s%s}
data: {files: rows.jsonl, max_length: 128, packing: %s}
train: {epochs: 2, micro_batch: 2, global_batch: 4, learning_rate: 1e-2, weight_decay: 0.1, schedule: linear, warmup_ratio: 0.2, gradient_checkpointing: %s}
parallel: {zero: %d}
"""


def reference_losses(spec: TrainSpec) -> list[float]:
    """The same rows in the same order, the plainest way that transformers and peft allow."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    prepared = Prepared.read(spec.paths.prepared)
    data, optim = TokenData.open(prepared.data_dir), spec.optim
    model = AutoModelForCausalLM.from_pretrained(prepared.model_dir, dtype=torch.float32)
    torch.manual_seed(optim.seed)
    if spec.method.name == "lora":
        config = LoraConfig(r=spec.method.rank, lora_alpha=spec.method.alpha, target_modules="all-linear")
        model = get_peft_model(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.learning_rate, betas=optim.betas)
    found: list[float] = []
    # One rank that takes the whole global batch in one micro batch after the other.
    one_rank = dataclasses.replace(optim, accumulate=rows_per_step(optim, spec.parallel.dp) // optim.micro_batch)
    steps = num_steps(data.num_rows, one_rank, 1)
    warmup = math.ceil(optim.warmup_ratio * steps)
    for step in range(steps):
        rate = (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (steps - warmup)
        for group in adamw.param_groups:
            group["lr"] = optim.learning_rate * rate
        documents = []
        for row in (r for micro in step_rows(step, 0, data.num_rows, one_rank, 1) for r in micro if r >= 0):
            batch = data.batch([row], data.row_length([row]))
            for ids, labels in zip(
                batch.input_ids_1T[0].split(batch.document_lengths),
                batch.labels_1T[0].split(batch.document_lengths),
                strict=True,
            ):
                documents.append((ids, labels))
        count = sum(int((labels != -100).sum()) for _, labels in documents)
        total = 0.0
        for ids, labels in documents:
            if (labels != -100).any():
                loss = F.cross_entropy(model(ids[None]).logits[0], labels, ignore_index=-100, reduction="sum") / count
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        found.append(total)
    return found


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Answers of very different lengths, so that a mean of means is far from the mean."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "q" * (i % 5 + 1)},
                    {"role": "assistant", "content": "a b " * (1 + 13 * (i % 4))},
                ]
            }
        )
        for i in range(22)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("method", "processes", "zero", "packing", "checkpointing"),
    [
        ("full", 1, 2, "true", "true"),
        ("full", 2, 1, "false", "false"),
        ("full", 2, 3, "true", "true"),
        ("lora", 2, 2, "true", "true"),
        ("lora", 2, 3, "false", "true"),
    ],
)
def test_losses_equal_the_plain_loop(
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    method: str,
    processes: int,
    zero: int,
    packing: str,
    checkpointing: str,
) -> None:
    tiny = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
    rank = ", rank: 4" if method == "lora" else ""
    (rows / "r.yaml").write_text(RECIPE % (tiny, method, rank, packing, checkpointing, zero), encoding="utf-8")
    monkeypatch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
    run = train_only(rows, "r.yaml", processes, "run")
    expected = reference_losses(read_plan(str(run / "plan.json")))
    got = losses(run)
    assert len(got) == len(expected) >= 4
    for step, loss in enumerate(expected, 1):
        assert got[step] == pytest.approx(loss, rel=1e-4), f"step {step}"


def test_dropout_is_on_in_training(rows: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    monkeypatch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
    tiny = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
    (rows / "r.yaml").write_text(RECIPE % (tiny, "lora", ", rank: 4", "true", "false", 2), encoding="utf-8")
    without = losses(train_only(rows, "r.yaml", 1, "without"))
    with_it = losses(train_only(rows, "r.yaml", 1, "with", ["method.dropout=0.5"]))
    # lora_B starts at zero, so the first step cannot tell.
    assert with_it[1] == without[1]
    assert with_it[4] != without[4]
