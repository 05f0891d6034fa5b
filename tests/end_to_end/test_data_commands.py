"""`launch data ...` on a real recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_rows_are_checked_and_converted(launch: Launch, tmp_path: Path) -> None:
    good = [{"instruction": f"问题 {k}", "input": "", "output": f"回答 {k}"} for k in range(40)]
    write_rows(tmp_path / "good.jsonl", good)
    done = launch("data", "convert", "good.jsonl", "chat.jsonl", "--to", "messages", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote chat.jsonl: 40 rows as `messages`" in done.stdout
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model:\n  source: random:{ROOT / 'recipes' / 'tiny'}\n  dtype: fp32\nmethod: full\ndata:\n  files: chat.jsonl\n"
        "  max_length: 128\nevaluate:\n  prompts:\n    - Hi\n    - {user: Hi, system: Be a pirate.}\n",
        encoding="utf-8",
    )
    done = launch("data", "check", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "r.yaml:11: evaluate.prompts.1.system: system 'Be a pirate.', which no row" in done.stdout
    assert done.stdout.rstrip().endswith("over the limit: unseen-system. To allow more: --limit unseen-system=0.5")
    done = launch("data", "check", "r.yaml", "--limit", "unseen-system=50%", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("nothing is over its limit")

    lines = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "chat.jsonl").write_text("\n".join(["{oops", *lines, lines[0], ""]), encoding="utf-8")
    done = launch("data", "check", "r.yaml", "--json", "--limit", "unseen-system=1", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert found["over"] == ["malformed"]
    assert found["findings"]["malformed"]["places"][0]["where"] == f"{tmp_path / 'chat.jsonl'}:1"
    assert found["findings"]["duplicates"]["places"][0]["where"] == f"{tmp_path / 'chat.jsonl'}:42"
    assert (found["rows"], found["documents"]) == (42, 41)
    assert not (tmp_path / "runs").exists()

    done = launch("data", "convert", "good.jsonl", "chat.jsonl", "--to", "pair", cwd=tmp_path)
    assert done.returncode == 2
    assert "chat.jsonl exists already" in done.stderr
