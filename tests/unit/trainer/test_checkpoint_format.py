import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_checkpoints import save_checkpoint

from trainer.checkpoint_format import (
    list_checkpoints,
    newest_verified,
    read_manifest,
    sha256_file,
    verify,
    write_manifest,
)
from trainer.spec import TrainError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def step_dir(tmp_path):
    torch.manual_seed(0)
    masters = {"a.weight": torch.randn(7, 3), "b.weight": torch.randn(40), "b.bias": torch.randn(1)}
    return save_checkpoint(tmp_path / "step_000200", masters, num_ranks=3)


def edit(step_dir, change):
    path = step_dir / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_what_is_written_is_read_back(step_dir, tmp_path):
    manifest = read_manifest(step_dir)
    assert manifest.run_id.startswith("小薇")
    assert manifest.parameters == {"a.weight": (7, 3), "b.weight": (40,), "b.bias": (1,)}
    assert [shard.fragments for shard in manifest.files] == [
        {"a.weight": (0, 21)},
        {"b.weight": (0, 21)},
        {"b.weight": (21, 19), "b.bias": (0, 1)},
    ]
    assert "小薇" in (step_dir / "manifest.json").read_text(encoding="utf-8")
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "step_000200"]


def test_a_whole_checkpoint_has_no_problems(step_dir):
    assert verify(step_dir) == []
    assert verify(step_dir, hashes=False) == []
    assert newest_verified(step_dir.parent) == (step_dir, [])


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(truncate, "cut short"), (flip, "damaged"), (os.unlink, "missing"), (lambda p: p.write_bytes(b""), "cut short")],
)
def test_a_damaged_file_is_named(step_dir, damage, said):
    damage(step_dir / "rank_00001.safetensors")
    (problem,) = verify(step_dir)
    assert "rank_00001.safetensors" in problem
    assert said in problem


def test_swapped_files_are_named_with_and_without_hashes(step_dir):
    first, second = step_dir / "rank_00000.safetensors", step_dir / "rank_00001.safetensors"
    shutil.move(first, step_dir / "x")
    shutil.move(second, first)
    shutil.move(step_dir / "x", second)
    for hashes in (True, False):
        problems = verify(step_dir, hashes)
        assert len(problems) == 2
        assert all("swapped" in p for p in problems)


def test_files_swapped_that_look_alike_are_told_apart_by_their_hash(tmp_path):
    step_dir = save_checkpoint(tmp_path / "step_000200", {"w": torch.randn(64)}, num_ranks=2)
    first, second = step_dir / "rank_00000.safetensors", step_dir / "rank_00001.safetensors"
    os.rename(first, step_dir / "x")
    os.rename(second, first)
    os.rename(step_dir / "x", second)
    assert verify(step_dir, hashes=False) == []
    problems = verify(step_dir)
    assert "rank_00000.safetensors: is the file of rank 1" in problems[0]
    assert "rank_00001.safetensors: is the file of rank 0" in problems[1]


def fragment(data, rank, name, value):
    data["files"][rank]["fragments"][name] = value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["parameters"].update({"c": [2]}), "'c' has 2 elements, its fragments hold 0"),
        (lambda d: d["parameters"].update({"a.weight": [7, 4]}), "'a.weight' has 28 elements"),
        (lambda d: d["parameters"].pop("a.weight"), "'a.weight', which is not a parameter"),
        (lambda d: d["parameters"].update({"c": [0]}), "is empty"),
        (lambda d: fragment(d, 0, "a.weight", [1, 21]), "from element 1, expected 0"),
        (lambda d: fragment(d, 1, "b.weight", [0, 0]), "holds other tensors"),
        (lambda d: d["files"].pop(), "expected each of 0 to 2"),
        (lambda d: d["files"].append(d["files"][0]), "listed for ranks"),
        (lambda d: d.update(step=100), "is of step 100"),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(step_dir, change, said):
    edit(step_dir, change)
    assert any(said in problem for problem in verify(step_dir)), verify(step_dir)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format="other-1"), "format"),
        (lambda d: d.pop("run_id"), "run_id"),
        (lambda d: d.update(step="200"), "step"),
        (lambda d: d.update(step=True), "step"),
        (lambda d: d.update(step=-1), "step"),
        (lambda d: d.update(step=1.0), "step"),
        (lambda d: d.update(world_size=0), "world_size"),
        (lambda d: d.update(dtype="fp8"), "allowed: bf16"),
        (lambda d: d.update(method="dora"), "allowed: full"),
        (lambda d: d.update(parameters=[]), "parameters"),
        (lambda d: d["parameters"].update({"\u001b[2J": [1]}), "name"),
        (lambda d: d["parameters"].update({"a.weight": [7, "3"]}), "a.weight"),
        (lambda d: d.update(files={}), "files"),
        (lambda d: d["files"].__setitem__(0, 3), "files"),
        (lambda d: d["files"][0].update(file="../../etc/passwd"), "passwd"),
        (lambda d: d["files"][0].update(file="rank_00001.safetensors"), "listed for rank 0"),
        (lambda d: d["files"][0].update(sha256="x"), "sha256"),
        (lambda d: fragment(d, 0, "a.weight", [0]), "fragments"),
        (lambda d: d.update(adapter_config=[1]), "adapter_config"),
        (lambda d: d.update(state=None), "state"),
    ],
)
def test_an_odd_manifest_is_refused_by_file_and_key(step_dir, change, said):
    edit(step_dir, change)
    with pytest.raises(TrainError, match=said) as e:
        read_manifest(step_dir)
    assert str(step_dir / "manifest.json") in e.value.message
    assert verify(step_dir) == [e.value.message]


@pytest.mark.parametrize("text", ["", "[]", "3", "{" * 10, '{"a":' * 50_000, "\ud800", '{"step": ' + "9" * 5000 + "}"])
def test_a_manifest_that_is_not_json_is_refused(step_dir, text):
    (step_dir / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(TrainError, match=r"manifest\.json"):
        read_manifest(step_dir)


def test_without_a_manifest_it_is_no_checkpoint(step_dir):
    (step_dir / "manifest.json").unlink()
    assert "manifest.json is missing" in verify(step_dir)[0]
    chosen, skipped = newest_verified(step_dir.parent)
    assert chosen is None
    assert skipped[0][0] == step_dir


def test_the_newest_whole_one_is_found_and_the_skipped_are_named(tmp_path):
    for step in (999_999, 1_000_000, 5):
        save_checkpoint(tmp_path / f"step_{step:06d}", {"w": torch.ones(3)}, step=step)
    shutil.copytree(tmp_path / "step_999999", tmp_path / "step_2000000.partial")
    shutil.copytree(tmp_path / "step_999999", tmp_path / "step_000005.old.partial")
    (tmp_path / "step_3000000").write_text("a file")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1_000_000, 999_999, 5]
    flip(tmp_path / "step_1000000" / "rank_00000.safetensors")
    chosen, skipped = newest_verified(tmp_path)
    assert chosen == tmp_path / "step_999999"
    assert [path.name for path, _ in skipped] == ["step_1000000"]
    assert "sha256" in skipped[0][1]
    assert list_checkpoints(tmp_path / "absent") == []


def test_the_hash_is_that_of_sha256sum(step_dir):
    path = step_dir / "rank_00000.safetensors"
    out = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert sha256_file(path) == out.split()[0]


def test_the_format_needs_the_standard_library_only():
    code = "import sys, trainer.checkpoint_format; print([m for m in ('numpy', 'torch', 'safetensors') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
