"""Our loop against a plain one: transformers + peft, one document at a time, whole logits, no DeepSpeed, no packing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.commands import ROOT, held_out_losses, losses
from support.many_runs import carry_out, planned
from support.matrix import write_rows

from trainer.data import TokenData, num_steps, rows_per_step, step_rows
from trainer.spec import Prepared, TrainSpec, read_plan

TINY_FOLDER = ROOT / "recipes" / "tiny"
RECIPE = """
model: {source: "random:%s", dtype: fp32}
method: {name: %s%s}
data: {files: rows.jsonl, max_length: 128, packing: %s, held_out: 0.2}
train: {epochs: 2, micro_batch: 2, global_batch: 4, learning_rate: 1e-2, weight_decay: 0.1, schedule: linear, warmup_ratio: 0.2, gradient_checkpointing: %s}
parallel: {zero: %d}
"""


Documents = list[tuple[torch.Tensor, torch.Tensor]]
"""(token ids, labels) of each."""


def documents_of(data: TokenData, rows: Iterable[int]) -> Documents:
    found = []
    for row in rows:
        batch = data.batch([row], data.row_length([row]))
        parts = (t[0].split(batch.document_lengths) for t in (batch.input_ids_1T, batch.labels_1T))
        found += [(ids, labels) for ids, labels in zip(*parts, strict=True) if (labels != -100).any()]
    return found


def plain_losses(model: Any, documents: Documents) -> Iterator[torch.Tensor]:
    """Each document's share of the mean over all supervised tokens."""
    count = sum(int((labels != -100).sum()) for _, labels in documents)
    for ids, labels in documents:
        yield F.cross_entropy(model(ids[None]).logits[0], labels, ignore_index=-100, reduction="sum") / count


def reference_losses(spec: TrainSpec) -> tuple[list[float], list[float]]:
    """Of each step, and of the held-out rows before and after: the plainest way that transformers and peft allow.

    The rows and their order are those of `spec`'s run.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    prepared = Prepared.read(spec.paths.prepared)
    data, optim = TokenData.open(prepared.data_dir), spec.optim
    quantization = None
    if spec.method.name == "qlora":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        prepared.model_dir, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    torch.manual_seed(optim.seed)
    if spec.method.name != "full":
        config = LoraConfig(r=spec.method.rank, lora_alpha=spec.method.alpha, target_modules="all-linear")
        model = get_peft_model(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.learning_rate, betas=optim.betas)
    held_out = documents_of(data, data.held_out_rows)
    found, found_held_out = [], [sum(loss.item() for loss in plain_losses(model, held_out))]
    # One rank that takes the whole global batch in one micro batch after the other.
    one_rank = dataclasses.replace(optim, accumulate=rows_per_step(optim, spec.parallel.dp) // optim.micro_batch)
    steps = num_steps(data.num_rows, one_rank, 1)
    warmup = math.ceil(optim.warmup_ratio * steps)
    for step in range(steps):
        rate = (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (steps - warmup)
        for group in adamw.param_groups:
            group["lr"] = optim.learning_rate * rate
        rows = (r for micro in step_rows(step, 0, data.num_rows, one_rank, 1) for r in micro if r >= 0)
        total = 0.0
        for loss in plain_losses(model, documents_of(data, rows)):
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        found.append(total)
    found_held_out.append(sum(loss.item() for loss in plain_losses(model, held_out)))
    return found, found_held_out


CASES = (
    # method, processes, ZeRO stage, packing, gradient checkpointing
    ("full", 1, 2, "true", "true"),
    ("full", 2, 1, "false", "false"),
    ("full", 2, 3, "true", "true"),
    ("lora", 2, 2, "true", "true"),
    ("lora", 2, 3, "false", "true"),
    ("qlora", 2, 2, "true", "true"),
)
DROPOUT = ("without dropout", "with dropout")


def plan_case(folder: Path, name: str, case: tuple[str, int, int, str, str], sets: Sequence[str] = ()) -> Path:
    method, processes, zero, packing, checkpointing = case
    rank = "" if method == "full" else ", rank: 4"
    text = RECIPE % (TINY_FOLDER, method, rank, packing, checkpointing, zero)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return planned(folder, f"{name}.yaml", name, processes, sets)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A folder with one finished training a case."""
    folder = tmp_path_factory.mktemp("reference")
    write_rows(folder)
    work: dict[int, list[Path]] = {1: [], 2: []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELAUNCH_CACHE", environment["TUNELAUNCH_CACHE"])
        for number, case in enumerate(CASES):
            work[case[1]].append(plan_case(folder, f"case {number}", case))
        for name, dropout in zip(DROPOUT, ("0.0", "0.5"), strict=True):
            case = ("lora", 1, 2, "true", "false")
            work[1].append(plan_case(folder, name, case, [f"method.dropout={dropout}"]))
    for processes, planned_runs in work.items():
        carry_out(folder, processes, [{"plan": str(run / "plan.json")} for run in planned_runs])
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_losses_equal_the_plain_loop(runs: Path, number: int) -> None:
    run = runs / f"case {number}"
    expected, expected_held_out = reference_losses(read_plan(str(run / "plan.json")))
    got, held_out = losses(run), held_out_losses(run)
    assert len(got) == len(expected) >= 4
    for step, loss in enumerate(expected, 1):
        assert got[step] == pytest.approx(loss, rel=1e-4), f"step {step}"
    assert held_out == {
        0: pytest.approx(expected_held_out[0], rel=1e-4),
        len(got): pytest.approx(expected_held_out[1], rel=1e-4),
    }


def test_dropout_is_on_in_training(runs: Path) -> None:
    without, with_it = (losses(runs / name) for name in DROPOUT)
    # lora_B starts at zero, so the first step cannot tell.
    assert with_it[1] == without[1]
    assert with_it[4] != without[4]
