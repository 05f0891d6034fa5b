"""Sizes of sequence parallelism: what world and heads allow, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from launcher.known_models import known_config
from launcher.model_facts import ModelFacts, read_facts, resolve_source
from launcher.sequence_parallel import allowed_sp, row_notes, size_problem, sizes_of_heads


def facts(source: str, **changes: object) -> ModelFacts:
    found = read_facts(resolve_source(source, Path("/")))
    assert found is not None
    return dataclasses.replace(found, **changes)


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        (SMOLLM2, [1, 3, 9]),  # 9 heads, 3 kv
        ("HuggingFaceTB/SmolLM2-1.7B", [1, 2, 4, 8, 16]),  # 32, 32
        ("Qwen/Qwen2.5-0.5B", [1, 2, 14]),  # 14, 2
        ("Qwen/Qwen2.5-1.5B", [1, 2, 4, 6, 12]),  # 12, 2
        ("Qwen/Qwen2.5-7B", [1, 2, 4]),  # 28, 4
        ("Qwen/Qwen2.5-14B", [1, 2, 4, 8]),  # 40, 8
        ("meta-llama/Llama-3.2-3B", [1, 2, 4, 8]),  # 24, 8
        ("mistralai/Mistral-7B-v0.3", [1, 2, 4, 8, 16]),  # 32, 8
    ],
)
def test_sizes_that_the_heads_allow(source: str, sizes: list[int]) -> None:
    assert sizes_of_heads(facts(source), 16) == sizes


@pytest.mark.parametrize(("world", "sizes"), [(1, [1]), (2, [1]), (3, [1, 3]), (6, [1, 3]), (8, [1]), (18, [1, 3, 9])])
def test_sizes_divide_the_world_too(world: int, sizes: list[int]) -> None:
    assert allowed_sp(world, facts(SMOLLM2)) == sizes


def test_unknown_heads_leave_the_world() -> None:
    assert allowed_sp(6, None) == [1, 2, 3, 6]
    assert size_problem(4, 6, None, "--cpu ").hint.startswith("Allowed with 6 processes: 1, 2, 3, 6; write sp: 3")


def test_latent_attention_cannot_share_rows() -> None:
    latent = facts(SMOLLM2, attention=("latent",), model_type="deepseek_v3")
    assert allowed_sp(9, latent) == [1]
    problem = size_problem(3, 9, latent, "--cpu ")
    assert "deepseek_v3 cannot share rows" in problem.message
    assert "different sizes" in problem.hint


@pytest.mark.parametrize(
    ("wanted", "world", "flag", "parts"),
    [
        (2, 2, "--cpu ", ["with 2 processes: 1; write sp: 1", "--cpu 3 with sp: 3; --cpu 9 with sp: 9."]),
        (2, 3, "--cpu ", ["with 3 processes: 1, 3; write sp: 3", "--cpu 9 with sp: 9."]),
        (4, 9, "--gpus free:", ["with 9 processes: 1, 3, 9; write sp: 3"]),
        (3, 1, "--gpus free:", ["with 1 process: 1; write sp: 1", "--gpus free:3 with sp: 3"]),
    ],
)
def test_wrong_size_is_told_what_fits_here_and_elsewhere(wanted: int, world: int, flag: str, parts: list[str]) -> None:
    problem = size_problem(wanted, world, facts(SMOLLM2), flag)
    assert problem.where == "parallel.sp"
    assert "9 heads (3 kv)" in problem.message
    assert all(part in problem.hint for part in parts)
    assert ("other numbers of processes" in problem.hint) == (world != 9)


def test_notes_on_rows() -> None:
    plain, window = facts(SMOLLM2), facts("Qwen/Qwen2.5-7B", attention=("sliding window",), sliding_window=4096)
    assert row_notes(1, 1024, True, window) == []
    assert row_notes(3, 1024, True, plain) == ["each computes 342 of the 1024 tokens of a micro batch, padded to 1026"]
    assert row_notes(3, 1026, True, plain) == ["each computes 342 of the 1026 tokens of a micro batch"]
    assert row_notes(3, 1024, False, plain) == ["rows are padded to a multiple of 3"]
    assert "window of 4096 tokens is kept" in row_notes(2, 1024, True, window)[1]
    assert "training checks them" in row_notes(2, 1024, True, None)[1]


def test_the_table_of_the_documentation_is_right() -> None:
    page = Path(__file__).parents[3] / "docs" / "parallelism.md"
    rows = re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| ([\d, ]+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 16
    organisations = ("Qwen", "deepseek-ai", "HuggingFaceTB", "meta-llama", "mistralai")
    for name, heads, kv_heads, sizes in rows:
        (source,) = [f"{o}/{name}" for o in organisations if known_config(f"{o}/{name}")]
        known = facts(source)
        assert (known.num_heads, known.num_kv_heads) == (int(heads), int(kv_heads)), name
        assert sizes_of_heads(known, 16)[1:] == [int(n) for n in sizes.split(",")], name
