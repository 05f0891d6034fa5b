"""`launch verify parallel`: layouts that must agree do, and a layout that computes something else is found.

The rows are packed, and their supervised tokens are spread unevenly over ranks and micro batches.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT, Launch, only_run

from trainer.data import TokenData
from trainer.spec import Prepared

TINY = ROOT / "recipes" / "tiny"
RECIPE = """
model: {source: "random:%s", dtype: fp32}
method: {name: full}
data: {files: rows.jsonl, max_length: 128}
train: {epochs: 3, micro_batch: 1, global_batch: 4, learning_rate: 1e-2, weight_decay: 0.1, warmup_ratio: 0.0}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A folder with r.yaml and its rows."""
    rows = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "q" * (30 if i % 3 else 2)},
                    {"role": "assistant", "content": "a b " * (1 + 13 * (i % 4))},
                ]
            }
        )
        for i in range(22)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "r.yaml").write_text(RECIPE % TINY, encoding="utf-8")
    return tmp_path


def assert_uneven(folder: Path, steps: list[dict[str, Any]]) -> None:
    """A mean over ranks of means would be far from the mean over all tokens."""
    data = TokenData.open(Prepared.read(str(folder / "plan" / "prepared.json")).data_dir)
    assert data.packing
    assert max(len(data.documents(row)) for row in range(data.num_rows)) > 1
    shares = [[int(data.supervised_per_row[rank].sum()) for rank in step["rows"]] for step in steps]
    assert max(max(s) / min(s) for s in shares) > 1.2, shares


def test_layouts_agree(recipe: Path, launch: Launch) -> None:
    references = ("dp=1,zero=1", "zero=3", "dp=1,sp=2,zero=0")
    flags = [flag for text in references for flag in ("--against", text)]
    done = launch("verify", "parallel", "r.yaml", "--cpu", "2", "--json", *flags, cwd=recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["equal"]
    assert_uneven(Path(result["folder"]), result["plan"]["steps"])
    layouts = [tuple(r["layout"][key] for key in ("dp", "sp", "zero", "accumulate")) for r in result["references"]]
    assert layouts == [(1, 1, 1, 4), (2, 1, 3, 2), (1, 2, 0, 4)]
    for reference in result["references"]:
        assert reference["equal"]
        for ours, theirs in zip(result["plan"]["steps"], reference["steps"], strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4) != 0
        differences = reference["gradient_differences"]
        assert {row["step"] for row in differences} == {1, 2, 3}
        assert len({row["name"] for row in differences}) == 8
        assert max(row["relative"] for row in differences) < 1e-4
    first, *_, last = result["plan"]["steps"]
    assert last["loss"] < first["loss"] - 0.1, "the optimizer really steps"
    written = only_run(recipe)
    assert not list(written.rglob("*.safetensors")), "no checkpoint, and no gradient that is not needed"
    assert json.loads((written / "verify.json").read_text(encoding="utf-8")) == result


def test_a_layout_that_fails_names_the_cause_and_the_folder(recipe: Path, launch: Launch) -> None:
    with open(recipe / "rows.jsonl", "a", encoding="utf-8") as f:
        f.write('{"messages": [\n')
    done = launch("verify", "parallel", "r.yaml", "--cpu", "2", cwd=recipe)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rows.jsonl:23" in done.stderr
    assert f"folder: {only_run(recipe)}" in done.stderr


# file, what stands there, what is put in its place, how the recipe is spread
BUGS = {
    "mean of means": (
        "trainer/train.py",
        "(ranks.world_size / max(supervised, 1))",
        "(1 / int(data.supervised_per_row[[r for m in rows_of_dp[ranks.dp_rank] for r in m if r >= 0]].sum()))",
        (),
    ),
    "sequence split twice": (
        "trainer/sequence_parallel.py",
        "    return Batch(*tensors, document_lengths=row.document_lengths)",
        "    part = slice(sp_rank * length // sp**2, (sp_rank + 1) * length // sp**2)\n"
        "    return Batch(*(t[:, part] for t in tensors), document_lengths=(length // sp,))",
        ("--set", "parallel.sp=2"),
    ),
    "positions counted anew in every slice": (
        "trainer/sequence_parallel.py",
        "    return Batch(*tensors, document_lengths=row.document_lengths)",
        "    ids, labels, positions = tensors\n"
        "    return Batch(ids, labels, positions - positions[:, :1], document_lengths=row.document_lengths)",
        ("--set", "parallel.sp=2"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, recipe: Path, environment: dict[str, str]) -> None:
    file, right, wrong, flags = BUGS[name]
    planted = recipe / "planted"
    for package in ("launcher", "cluster", "trainer", "recipes"):
        shutil.copytree(ROOT / package, planted / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (planted / file).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{file} has changed: plant the bug where it belongs now"
    (planted / file).write_text(source.replace(right, wrong), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "launcher", "verify", "parallel", "r.yaml", "--cpu", "2", "--steps", "1"]
    env = {**environment, "PYTHONPATH": str(planted), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *flags], cwd=recipe, env=env, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERS" in done.stdout
    (folder,) = (recipe / "runs").iterdir()
    assert str(folder) in done.stderr
    assert (folder / "plan" / "probe" / "gradients_step_1.safetensors").is_file(), os.listdir(folder)


def test_packed_rows_of_a_recipe_are_verified(recipe: Path, launch: Launch) -> None:
    done = launch("verify", "packing", "r.yaml", "--cpu", "2", "--rows", "4", cwd=recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "packed == unpacked: ok" in done.stdout
    (folder,) = (recipe / "runs").glob("verify-r-*")
    result = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 4
    assert all(row["documents"] > 1 for row in result["rows"])
    done = launch("verify", "packing", "r.yaml", "--cpu", "1", "--set", "data.packing=false", cwd=recipe)
    assert done.returncode == 2
    assert "data.packing is false" in done.stderr
