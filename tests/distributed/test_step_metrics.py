"""What each step of a real run leaves behind: where its time went, a profile, and what happens when it is not finite."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import ROOT, try_training
from support.tiny_chat_model import save_tiny_model
from transformers import AutoTokenizer

from trainer.data import epoch_order
from trainer.loss_watch import MAX_SKIPS_IN_A_ROW

RECIPE = """
model: {source: %s, dtype: %s}
method: {name: lora, rank: 4}
data: {files: rows.jsonl, max_length: 128, packing: false}
train: {epochs: 1, micro_batch: 1, global_batch: %d, learning_rate: 1e-3, seed: 3}
parallel: {zero: %d}
checkpoint: {every_steps: 1}
"""
POISON = "\x7f"
"""A character whose embedding is not a number, in the model below."""


@pytest.fixture(autouse=True)
def cache(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNELAUNCH_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, environment[name])


def write_rows(folder: Path, answers: list[str]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def save_poisoned_model(folder: Path) -> None:
    save_tiny_model(folder)
    (token,) = AutoTokenizer.from_pretrained(folder).encode(POISON)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def failure(run: Path, rank: int) -> dict[str, Any]:
    path = run / "logs" / "attempt_1" / "train" / f"failure_rank_{rank}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_metrics_and_profile(tmp_path: Path) -> None:
    write_rows(tmp_path, ["I am a small model. " * (1 + n % 5) for n in range(20)])
    recipe = RECIPE % (f'"random:{ROOT / "recipes" / "tiny"}"', "fp32", 4, 2)
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    code, run = try_training(tmp_path, "r.yaml", 2, "run", profile=(2, 3))
    assert code == 0
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        parts = row["seconds_parts"]
        assert list(parts) == ["data", "forward", "backward", "optimizer", "communication"]
        assert all(seconds >= 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(row["seconds"], rel=0.01)
        # Two processes cannot take a step without talking.
        assert 0 < parts["communication"] < row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.01)
        rate = row["supervised_tokens"] / row["seconds"]
        assert row["supervised_tokens_per_second"] == pytest.approx(rate, rel=0.01)
        assert 0 < row["supervised_tokens"] < row["tokens"]
        assert 0.1 < row["memory_gb"] <= row["memory_gb_max"] < 8
        assert (row["skipped"], row["skipped_steps"]) == (False, 0)
        assert row["learning_rate"] > 0
        assert row["grad_norm"] > 0
    # The machine is measured after the first step, and not again where the cache knows it.
    assert all(0 < row["share_of_peak"] < 1 for row in rows[1:])
    assert [row.get("profiled", False) for row in rows] == [False, True, True, False, False]
    # Steps follow one another: their seconds are not more than the time between their rows.
    for before, row in itertools.pairwise(rows):
        assert row["seconds"] <= row["time"] - before["time"] + 0.01
    page = (run / "profile" / "summary.md").read_text(encoding="utf-8")
    assert page.startswith("# Profile of steps 2 to 3\n")
    assert "| communication | " in page
    assert (run / "profile" / "trace_rank_0.json.gz").stat().st_size > 1000
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [e["seconds"] > 0 for e in events if e["event"] == "checkpoint_saved"] == [True] * 5


def test_a_row_that_is_not_finite_stops_every_rank_and_is_kept(tmp_path: Path) -> None:
    save_poisoned_model(tmp_path / "model")
    write_rows(tmp_path, [f"bad {POISON}" if n == 10 else "I am a small model. " * (1 + n % 3) for n in range(16)])
    (tmp_path / "r.yaml").write_text(RECIPE % ("./model", "bf16", 4, 3), encoding="utf-8")
    code, run = try_training(tmp_path, "r.yaml", 2, "run")
    assert code == 2
    failures = [failure(run, rank) for rank in (0, 1)]
    bad_step = len(metrics(run)) + 1
    assert bad_step > 1, "the bad row must come after a good step"
    file = run / "bad_batches" / f"step_{bad_step:06}.json"
    for found in failures:
        assert found["message"].startswith(f"the loss of step {bad_step} is not finite")
        # Of the four rows of the step it is this one.
        assert found["message"].splitlines()[1:] == [f"  {tmp_path}/rows.jsonl:11"]
        assert str(file) in found["hint"]
    (micro,) = json.loads(file.read_text(encoding="utf-8"))["micro_batches"]
    assert micro["sources"] == [f"{tmp_path}/rows.jsonl:11"]
    (token,) = AutoTokenizer.from_pretrained(tmp_path / "model").encode(POISON)
    assert token in micro["input_ids"]
    checkpoints = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert checkpoints[-1] == f"step_{bad_step - 1:06}"
    saved = [load_file(shard) for shard in (run / "checkpoints" / checkpoints[-1]).glob("*.safetensors")]
    assert len(saved) == 2
    assert all(torch.isfinite(t).all() for tensors in saved for t in tensors.values() if t.is_floating_point())


def test_fp16_skips_and_counts_until_the_limit(tmp_path: Path) -> None:
    save_poisoned_model(tmp_path / "model")
    answers = ["bad " + POISON] * (MAX_SKIPS_IN_A_ROW + 7)
    # The seventh row is good: by then the scale has come down to what this model's gradient bears.
    answers[int(epoch_order(len(answers), seed=3, epoch=0)[6])] = "fine"
    write_rows(tmp_path, answers)
    (tmp_path / "r.yaml").write_text(RECIPE % ("./model", "fp16", 1, 2), encoding="utf-8")
    code, run = try_training(tmp_path, "r.yaml", 1, "run", ("checkpoint.every_steps=25",))
    assert code == 2
    rows = metrics(run)
    assert [row["step"] for row in rows if not row["skipped"]] == [7]
    assert len(rows) == 7 + MAX_SKIPS_IN_A_ROW
    assert rows[-1]["skipped_steps"] == len(rows) - 1
    assert all(row["loss"] is None and row["grad_norm"] is None for row in rows if row["skipped"])
    assert math.isfinite(rows[6]["loss"])
    # Halved down to 1, where it stays: DeepSpeed itself would give up there.
    scales = [row["loss_scale"] for row in rows]
    assert scales == sorted(scales, reverse=True)
    assert scales[-10:] == [1.0] * 10
    found = failure(run, 0)
    assert found["message"].startswith(f"{MAX_SKIPS_IN_A_ROW} steps in a row were skipped")
    assert (run / "bad_batches" / f"step_{len(rows):06}.json").is_file()
    assert (run / "checkpoints" / "step_000050" / "manifest.json").is_file()
