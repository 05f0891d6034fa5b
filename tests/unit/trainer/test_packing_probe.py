"""Packed rows give the losses of their documents alone, and a model that lets documents see each other is found out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.handmade_run import make_spec
from support.tiny_chat_model import save_tiny_model

from launcher.verify_packing import judged, page
from trainer import attention
from trainer.data import TokenData, TokenWriter
from trainer.model import load_model
from trainer.pack import pack_documents
from trainer.packing_probe import choose_rows, compare_rows
from trainer.spec import TrainError

CPU = torch.device("cpu")


def write(folder: Path, lengths: list[int]) -> TokenData:
    """Documents of random tokens, of which the second half is supervised."""
    folder.mkdir()
    writer, rng = TokenWriter(folder), np.random.default_rng(0)
    for i, length in enumerate(lengths):
        ids = rng.integers(3, 300, size=length).tolist()
        writer.add(ids, [int(t >= length // 2) for t in range(length)], 0, i + 1)
    offsets, order = pack_documents(np.asarray(lengths), 64, True)
    index = {"packing": True, "max_length": 64, "pad_token_id": 0, "eos_token_id": 2, "data_files": ["/d.jsonl"]}
    writer.finish(offsets, order, {**index, "num_rows": len(offsets) - 1, "num_held_out_rows": 0})
    return TokenData.open(folder)


@pytest.fixture
def data(tmp_path: Path) -> TokenData:
    return write(tmp_path / "entry", [40, 14, 9, 30, 20, 13, 60, 25, 22])


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture
def model(tmp_path: Path, dtype: str):
    spec = make_spec(tmp_path)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, dtype=dtype))
    return load_model(spec, str(save_tiny_model(tmp_path / "model")), CPU)


def test_losses_of_packed_documents_are_those_of_the_documents_alone(model, data: TokenData, dtype: str) -> None:
    rows = choose_rows(data, 0)
    found = compare_rows(model, data, rows, CPU)
    assert [row["row"] for row in found["rows"]] == rows
    assert sum(row["tokens"] for row in found["rows"]) == int(data.supervised_per_row[rows].sum())
    result = judged({**found, "dtype": dtype, "rows_in_all": data.num_rows})
    assert result["equal"]
    assert page(result, color=False).endswith("packed == unpacked: ok")


def test_documents_that_see_each_other_are_found(model, data: TokenData, dtype: str, monkeypatch) -> None:
    """As with every trainer that packs without telling the attention: the row is one long document."""
    packed = attention.packed_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def leaking(*args, document_lengths=None, **kwargs):
        return packed(*args, document_lengths=None, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, leaking)
    found = compare_rows(model, data, choose_rows(data, 0), CPU)
    result = judged({**found, "dtype": dtype, "rows_in_all": data.num_rows})
    assert not result["equal"]
    worst = next(row for row in result["rows"] if row["row"] == result["worst_row"])
    # The first document of a row sees nothing before it; the worst is a later one, and is named.
    assert worst["worst"]["document"] > 0
    assert worst["worst"]["source"].startswith("/d.jsonl:")
    assert page(result, color=False).endswith("packed == unpacked: DIFFERS")


def test_the_rows_with_the_most_documents_are_among_those_compared(tmp_path: Path) -> None:
    data = write(tmp_path / "many", [60] * 3 + [30] * 8 + [8] * 16)
    counts = {row: len(data.documents(row)) for row in range(data.num_rows)}
    chosen = choose_rows(data, 3)
    assert len(chosen) == 3
    assert all(counts[row] > 1 for row in chosen)
    assert sorted(counts.values())[-2:] == sorted(counts[row] for row in chosen)[-2:]
    assert choose_rows(data, 0) == [row for row, count in counts.items() if count > 1]


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no packed row has two documents"):
        choose_rows(write(tmp_path / "long", [60, 61]), 4)
