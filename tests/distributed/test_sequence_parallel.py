"""Ulysses over packed rows, in fp64: several ranks that share a row compute what one rank computes of the whole row."""

from __future__ import annotations

import json

import pytest
from support.commands import ROOT
from support.many_runs import carry_out

TINY = ROOT / "recipes" / "tiny"
# 4 heads and 2 key-value heads: with sp 4 two ranks hold the same key-value head. No document ends where a slice does.
CASES = [
    {"sp": 2, "lengths": [37, 5, 1, 61], "window": None},
    {"sp": 4, "lengths": [37, 5, 1, 61], "window": None},
    {"sp": 4, "lengths": [104], "window": None},
    {"sp": 2, "lengths": [37, 6, 61], "window": 16},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("shared")
    out = folder / "results.json"
    items = [{**case, "config": str(TINY), "out": str(out)} for case in CASES]
    carry_out(folder, 4, items, script="shared_rows_process.py")
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_a_shared_row_equals_the_whole_row(results: list[dict[str, float]], case: int) -> None:
    assert results[case]["hidden"] < 1e-12
    assert results[case]["gradients"] < 1e-10


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_no_other_model_is_touched_and_samples_see_whole_rows(results: list[dict[str, float]], case: int) -> None:
    assert results[case]["other_model"] == 0
    assert results[case]["whole_rows"] < 1e-12
    assert results[case]["back_again"] == 0


def test_a_row_is_cut_into_equal_slices_with_the_documents_of_the_whole() -> None:
    import torch

    from trainer.data import Batch
    from trainer.sequence_parallel import padded_length, slice_of

    tokens = torch.arange(12)[None]
    row = Batch(tokens, tokens + 100, tokens + 200, (7, 5))
    parts = [slice_of(row, rank, 3) for rank in range(3)]
    assert torch.cat([p.input_ids_1T for p in parts], 1).equal(tokens)
    assert torch.cat([p.labels_1T for p in parts], 1).equal(tokens + 100)
    assert torch.cat([p.position_ids_1T for p in parts], 1).equal(tokens + 200)
    assert {p.document_lengths for p in parts} == {(7, 5)}
    assert [padded_length(n, 3) for n in (1, 3, 4, 128)] == [3, 3, 6, 129]
