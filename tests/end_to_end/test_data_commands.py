"""`launch data ...` on a real recipe."""

from __future__ import annotations

import json
from pathlib import Path

from support.commands import ROOT, Launch


def test_a_recipe_is_previewed_and_its_mistakes_are_told(launch: Launch, tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "tiny_cpu.yaml")
    done = launch("data", "preview", recipe, "-n", "2", "--out", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 rows -> 20 documents" in done.stdout
    assert "«The train will be late.<|im_end|>»" in done.stdout
    assert "<mark>The train will be late.&lt;|im_end|&gt;</mark>" in (tmp_path / "page.html").read_text(
        encoding="utf-8"
    )
    assert not (tmp_path / "runs").exists()
    done = launch("data", "preview", recipe, "--json", "--set", "data.template=xtuner/llama2_chat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["documents"][0]["spans"][0][0].startswith("[INST] How do I keep basil alive")
    assert "data.template xtuner/llama2_chat differs from the model's own:" in done.stderr
    done = launch("data", "preview", recipe, "--first", "20", cwd=tmp_path)
    assert done.returncode == 2
    assert "there are 20 documents" in done.stderr
