"""`launch recipes import` as a process: what it prints, its exit code, and the recipe that it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.commands import ROOT, Launch

IMPORTS = ROOT / "tests" / "golden" / "imports"


def test_an_xtuner_config_becomes_a_recipe_that_checks(launch: Launch, work: Path) -> None:
    shutil.copytree(IMPORTS, work / "theirs")
    done = launch("recipes", "import", "theirs/xtuner/qwen_qlora_alpaca.py", "--out", "mine.yaml", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    for heading in ("\nmapped\n", "\nno counterpart\n", "\nwhat XTuner did silently, and is otherwise now\n"):
        assert heading in done.stdout
    assert "to decide" not in done.stdout
    checked = launch("recipes", "check", "mine.yaml", cwd=work)
    assert (checked.returncode, checked.stdout.partition(":")[0]) == (0, "ok"), checked.stdout + checked.stderr


def test_mistakes_are_all_shown_at_once_and_nothing_is_written(launch: Launch, work: Path) -> None:
    (work / "lf.yaml").write_text(
        "model_name_or_path: m/m\nfinetuning_type: lora\nlr: 1e-4\ncutoff_length: 9\n", "utf-8"
    )
    done = launch("recipes", "import", "lf.yaml", "--out", "mine.yaml", cwd=work)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "lf.yaml:3:1: LLaMA-Factory has no key `lr`" in done.stderr
    assert "lf.yaml:4:1: LLaMA-Factory has no key `cutoff_length`; did you mean cutoff_len?" in done.stderr
    assert not (work / "mine.yaml").exists()
