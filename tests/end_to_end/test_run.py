"""The main job on the tiny model: from recipe to merged model and report, in several shapes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from support.commands import FP32, LAUNCH, Launch, losses, only_run


def test_main_job_leaves_every_artefact(straight: Path) -> None:
    for name in (
        "recipe.yaml",
        "plan.json",
        "env.json",
        "status.json",
        "events.jsonl",
        "metrics.jsonl",
        "prepared.json",
    ):
        assert (straight / name).stat().st_size > 0, name
    status = json.loads((straight / "status.json").read_text())
    assert status["state"] == "succeeded"
    assert set(status["stages"].values()) == {"done"}
    steps = losses(straight)
    assert steps[max(steps)] < steps[1]
    assert (straight / "report" / "report.html").is_file()
    assert json.loads((straight / "merged" / "merge_report.json").read_text())["verified"] is True
    digest = json.loads((straight / "plan.json").read_text())["digest"]
    assert f"plan {digest}" in (straight / "logs" / "attempt_1" / "train" / "rank_0.log").read_text()


def test_adapter_and_merged_model_load_elsewhere_and_agree(straight: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base_dir = json.loads((straight / "prepared.json").read_text())["model_dir"]
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(straight / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(straight / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(straight / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], return_tensors="pt", add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        merged_logits, tuned_logits = merged(ids).logits, tuned(ids).logits
        with tuned.disable_adapter():
            learnt = (tuned(ids).logits - tuned_logits).abs().mean()
        # The merged weights are rounded to the base's dtype (bf16): far less than what was learnt.
        assert (merged_logits - tuned_logits).abs().mean() < 0.1 * learnt


def test_full_fine_tune_ends_in_a_whole_model(launch: Launch, work: Path) -> None:
    from transformers import AutoModelForCausalLM

    (work / "full.yaml").write_text("extends: tiny_cpu.yaml\nmethod: full\n", encoding="utf-8")
    done = launch("full.yaml", "--cpu", "1", *FP32, cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(work)
    assert not (run / "adapter").exists()
    model, info = AutoModelForCausalLM.from_pretrained(run / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32


def test_two_processes_give_the_losses_of_one(launch: Launch, work: Path, straight: Path) -> None:
    """The other ZeRO stages, and sequence parallelism: tests/distributed/test_matrix.py."""
    extra = ("--set", "parallel.zero=3", "--run-dir", "two")
    done = launch("tiny_cpu.yaml", "--cpu", "2", *FP32, *extra, cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = losses(straight), losses(work / "two")
    assert one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-5), f"step {step}"


def test_qlora_trains_and_merges(launch: Launch, work: Path) -> None:
    (work / "qlora.yaml").write_text("extends: tiny_cpu.yaml\nmethod: qlora\n", encoding="utf-8")
    done = launch("qlora.yaml", "--cpu", "2", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(work)
    steps = losses(run)
    assert steps[max(steps)] < steps[1]
    report = json.loads((run / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    assert report["verified"] is True
    assert report["proof"]["bases"]["merged_on"] == "bf16"
    done = launch("merge", str(run), "--base-precision", "nf4", "--out", "on_nf4", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    on_nf4 = json.loads((work / "on_nf4" / "merge_report.json").read_text(encoding="utf-8"))
    assert (on_nf4["base_precision"], on_nf4["proof"]["bases"]["nearer"]) == ("nf4", "nf4")


def test_debug_shows_the_first_batch_and_learns_it(launch: Launch, work: Path) -> None:
    done = launch("tiny_cpu.yaml", "--debug", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "⟦" in done.stdout
    assert "supervised" in done.stdout
    assert "one repeated batch is learnt" in done.stdout
    assert "GB used in these steps" in done.stdout
    assert "estimated for the whole run" in done.stdout


def test_chat_answers_and_saves(launch: Launch, work: Path, straight: Path, environment: dict[str, str]) -> None:
    session = "你好\n/save talk.jsonl\n/exit\n"
    done = subprocess.run(
        [LAUNCH, "chat", str(straight), "--max-new-tokens", "8"],
        cwd=work,
        env=environment,
        input=session,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((work / "talk.jsonl").read_text(encoding="utf-8"))
    assert [m["role"] for m in saved["messages"]][-2:] == ["user", "assistant"]
    assert saved["messages"][-2]["content"] == "你好"


def test_stages_run_alone_and_refuse_to_overwrite(launch: Launch, work: Path, straight: Path) -> None:
    again = launch("consolidate", str(straight), cwd=work)
    assert again.returncode == 2
    assert "exists" in again.stderr
    done = launch("consolidate", str(straight), "--out", "again", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    first = (straight / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (work / "again" / "adapter_model.safetensors").read_bytes() == first
    done = launch("merge", str(straight), "--out", "merged2", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    done = launch("evaluate", str(straight), cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
