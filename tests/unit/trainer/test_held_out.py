"""Rows that are not trained on: which, how many, where they lie, and when their loss is taken."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.handmade_run import make_spec
from support.tiny_chat_model import save_tiny_model

from trainer import prepare
from trainer.cache_key import cache_key
from trainer.data import TokenData
from trainer.engine import Ranks
from trainer.held_out import HeldOut, rounds_of
from trainer.prepare import held_out_documents
from trainer.spec import DataFile, ModelSpec, Prepared, TrainError, TrainSpec

Pair = tuple[str, str]
PAIRS: list[Pair] = [(f"Question {i}?", f"Answer {i}: " + "word " * (i % 4)) for i in range(30)]
OTHERS: list[Pair] = [(f"New question {i}?", f"New answer {i}.") for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def spec(model: Path, tmp_path: Path) -> TrainSpec:
    """Of an empty run folder, with the tiny model."""
    spec = make_spec(tmp_path)
    cache = str(tmp_path / "cache")
    data = dataclasses.replace(spec.data, files=(), system=None, max_length=256, cache_dir=cache)
    return dataclasses.replace(
        spec, model=ModelSpec(str(model), "folder", str(model), "main", "fp32", False, cache), data=data
    )


def write(path: Path, pairs: list[Pair]) -> DataFile:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataFile(str(path), "auto")


def settings(spec: TrainSpec, **changes: Any) -> TrainSpec:
    return dataclasses.replace(spec, data=dataclasses.replace(spec.data, **changes))


def run(spec: TrainSpec) -> tuple[Prepared, TokenData, dict[str, Any]]:
    """What the prepare stage leaves: prepared.json, the tokens, and the counts of its event."""
    plan = Path(spec.paths.run_dir) / "plan.json"
    plan.write_text(json.dumps({"spec": spec.to_dict()}), encoding="utf-8")
    prepare.run(argparse.Namespace(plan=str(plan)))
    prepared = Prepared.read(spec.paths.prepared)
    events = Path(spec.paths.events).read_text(encoding="utf-8").splitlines()
    return prepared, TokenData.open(prepared.data_dir), json.loads(events[-1])["counts"]


def texts(data: TokenData, rows: range) -> list[tuple[str, str]]:
    """(file name, question) of every document of these rows, read from the lines that the rows name."""
    found = []
    for source in (source for row in rows for source in data.sources(row)):
        path, _, line = source.rpartition(":")
        row = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1])
        found.append((Path(path).name, row["messages"][0]["content"]))
    return found


def sides(data: TokenData) -> tuple[list[str], list[str]]:
    """Questions that are trained on, and questions that are held out."""
    trained, held_out = texts(data, range(data.num_rows)), texts(data, data.held_out_rows)
    return [question for _, question in trained], [question for _, question in held_out]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_a_share_is_held_out_and_every_document_is_on_one_side(
    spec: TrainSpec, tmp_path: Path, packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = settings(spec, files=(write(tmp_path / "rows.jsonl", PAIRS),), held_out=0.21, packing=packing)
    prepared, data, counts = run(spec)
    trained, held_out = sides(data)
    assert len(held_out) == 7, "at least 21 % of 30, and not one more"
    assert Counter(trained + held_out) == Counter(question for question, _ in PAIRS)
    documents = [int(d) for row in (*range(data.num_rows), *data.held_out_rows) for d in data.documents(row)]
    assert sorted(documents) == list(range(30))
    assert (prepared.num_rows, prepared.num_held_out_rows) == (data.num_rows, len(data.held_out_rows))
    if not packing:
        assert (prepared.num_rows, prepared.num_held_out_rows) == (23, 7)
    tokens, labels = data.tokens_per_row, data.supervised_per_row
    assert prepared.num_documents == counts["documents"] == 23
    assert prepared.num_tokens == counts["tokens"] == tokens[: data.num_rows].sum()
    assert prepared.num_supervised_tokens == counts["supervised_tokens"] == labels[: data.num_rows].sum()
    assert (counts["rows"], counts["held_out"], counts["held_out_but_seen"]) == (30, 7, 0)
    assert counts["held_out_supervised_tokens"] == labels[data.num_rows :].sum() > 0
    out = capsys.readouterr().out
    assert "data: 30 rows -> 23 documents" in out
    assert f"data: 7 documents held out ({labels[data.num_rows :].sum():,} supervised tokens)" in out
    assert "WARNING" not in out


def test_held_out_documents_do_not_share_rows_with_others(spec: TrainSpec, tmp_path: Path) -> None:
    spec = settings(spec, files=(write(tmp_path / "rows.jsonl", PAIRS),), held_out=0.3, max_length=512)
    _, data, _ = run(spec)
    assert data.num_rows < 21
    assert len(data.held_out_rows) < 9
    trained, held_out = sides(data)
    assert not set(trained) & set(held_out)
    assert (len(trained), len(held_out)) == (21, 9)


def test_the_order_of_the_file_does_not_change_which_are_held_out(spec: TrainSpec, tmp_path: Path) -> None:
    found = []
    for seed in range(3):
        pairs = random.Random(seed).sample(PAIRS, len(PAIRS))
        spec = settings(spec, files=(write(tmp_path / f"{seed}.jsonl", pairs),), held_out=0.2)
        prepared, data, _ = run(spec)
        found.append((prepared.data_dir, frozenset(sides(data)[1])))
    assert len({folder for folder, _ in found}) == 3
    assert len({held_out for _, held_out in found}) == 1
    assert len(found[0][1]) == 6


@pytest.mark.parametrize(("share", "count"), [(0.01, 4), (0.3, 12), (0.32, 16), (0.9, 36)])
def test_equal_documents_are_never_on_both_sides(spec: TrainSpec, tmp_path: Path, share: float, count: int) -> None:
    """10 questions, each 4 times."""
    pairs = random.Random(0).sample(PAIRS[:10] * 4, 40)
    _, data, counts = run(settings(spec, files=(write(tmp_path / "rows.jsonl", pairs),), held_out=share))
    trained, held_out = sides(data)
    assert not set(trained) & set(held_out)
    assert len(held_out) == counts["held_out"] == count
    assert set(Counter(held_out).values()) == {4}
    assert counts["held_out_but_seen"] == 0


@pytest.mark.parametrize("share", [0.001, 0.07, 0.1, 0.29, 0.5, 0.93])
@pytest.mark.parametrize("kinds", [3, 20, 10**9])
def test_no_more_are_held_out_than_equal_ones_force(share: float, kinds: int) -> None:
    digests = np.random.default_rng(1).integers(0, kinds, size=100).astype(">u8")
    chosen = held_out_documents(digests, share)
    sizes = Counter(digests[chosen].tolist())
    assert not np.isin(digests[~chosen], digests[chosen]).any()
    left = set(digests[~chosen].tolist())
    assert chosen.sum() >= round(share * 100, 6) or len(left) == 1, "unless that would leave nothing to train on"
    assert left
    assert chosen.sum() - sizes[max(sizes)] < share * 100, "without the last kind it would be too few"
    order = np.random.default_rng(2).permutation(100)
    assert (held_out_documents(digests[order], share) == chosen[order]).all()


def test_more_rows_move_few_others() -> None:
    digests = np.random.default_rng(1).integers(0, 2**63, size=1000).astype(">u8")
    before = held_out_documents(digests[:990], 0.1)
    assert (held_out_documents(digests, 0.1)[:990] != before).sum() <= 10


def test_a_whole_number_of_rows_is_held_out_exactly() -> None:
    """0.07 x 100 is 7.000000000000001."""
    assert held_out_documents(np.arange(100).astype(">u8"), 0.07).sum() == 7


def test_one_kind_of_document_is_left_to_train_on(spec: TrainSpec, tmp_path: Path) -> None:
    """0.9 x 5 rounds up to all of them."""
    _, _, counts = run(settings(spec, files=(write(tmp_path / "rows.jsonl", PAIRS[:5]),), held_out=0.9))
    assert (counts["documents"], counts["held_out"]) == (1, 4)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_rows_of_held_out_files_are_held_out_and_no_others(
    spec: TrainSpec, tmp_path: Path, packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    own, test = write(tmp_path / "own.jsonl", PAIRS), write(tmp_path / "test.jsonl", OTHERS)
    prepared, data, counts = run(settings(spec, files=(own,), held_out_files=(test,), packing=packing))
    trained, held_out = texts(data, range(data.num_rows)), texts(data, data.held_out_rows)
    assert sorted(trained) == sorted(("own.jsonl", question) for question, _ in PAIRS)
    assert sorted(held_out) == sorted(("test.jsonl", question) for question, _ in OTHERS)
    assert prepared.num_documents == 30
    assert prepared.num_held_out_rows == len(data.held_out_rows) == (1 if packing else 4)
    assert (counts["rows"], counts["documents"], counts["held_out"], counts["held_out_but_seen"]) == (30, 30, 4, 0)
    out = capsys.readouterr().out
    assert "data: 4 documents held out" in out
    assert "WARNING" not in out


def test_max_rows_leaves_held_out_files_whole(spec: TrainSpec, tmp_path: Path) -> None:
    own, test = write(tmp_path / "own.jsonl", PAIRS), write(tmp_path / "test.jsonl", OTHERS)
    _, data, counts = run(settings(spec, files=(own,), held_out_files=(test,), max_rows=3))
    trained, held_out = sides(data)
    assert sorted(trained) == sorted(question for question, _ in PAIRS[:3])
    assert sorted(held_out) == sorted(question for question, _ in OTHERS)
    assert counts["rows"] == 3


def test_held_out_documents_that_are_trained_on_too_are_warned_of(
    spec: TrainSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The same question with another answer is another document.
    mixed = [*OTHERS, PAIRS[3], PAIRS[8], (PAIRS[9][0], "Something else.")]
    own, test = write(tmp_path / "own.jsonl", PAIRS), write(tmp_path / "test.jsonl", mixed)
    spec = settings(spec, files=(own,), held_out_files=(test,))
    _, data, counts = run(spec)
    assert (counts["documents"], counts["held_out"], counts["held_out_but_seen"]) == (30, 7, 2)
    assert len(sides(data)[1]) == 7
    warning = "data: WARNING: 2 of the held-out documents are among the training rows too"
    assert warning in capsys.readouterr().out
    run(spec)
    assert warning in capsys.readouterr().out, "also when the tokens are found"


def test_without_held_out_rows_nothing_is_said_of_them(
    spec: TrainSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared, data, counts = run(settings(spec, files=(write(tmp_path / "rows.jsonl", PAIRS),)))
    assert prepared.num_held_out_rows == len(data.held_out_rows) == counts["held_out"] == 0
    assert len(data.tokens_per_row) == data.num_rows
    out = capsys.readouterr().out
    assert "held out" not in out
    assert "held-out" not in out


@pytest.mark.parametrize("copies", [1, 5])
def test_of_equal_documents_none_can_be_held_out(spec: TrainSpec, tmp_path: Path, copies: int) -> None:
    spec = settings(spec, files=(write(tmp_path / "rows.jsonl", PAIRS[:1] * copies),), held_out=0.1)
    with pytest.raises(TrainError, match=rf"held_out 0\.1: nothing can be held out, since all {copies} doc") as caught:
        run(spec)
    assert "Remove data.held_out" in caught.value.hint
    assert not Path(spec.paths.prepared).exists()


def test_held_out_files_without_anything_to_learn_are_an_error(spec: TrainSpec, tmp_path: Path) -> None:
    own, test = write(tmp_path / "own.jsonl", PAIRS), write(tmp_path / "test.jsonl", [("a", ""), ("b", "")])
    with pytest.raises(TrainError, match=r"none of data\.held_out_files' 2 rows has a token to learn") as caught:
        run(settings(spec, files=(own,), held_out_files=(test,)))
    assert "answers" in caught.value.hint


def test_other_held_out_rows_are_another_entry(spec: TrainSpec, model: Path, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", OTHERS)
    c = write(tmp_path / "c.jsonl", OTHERS[:2])
    wanted: list[dict[str, Any]] = [
        {"files": (a,)},
        {"files": (a,), "held_out": 0.1},
        {"files": (a,), "held_out": 0.2},
        {"files": (a,), "held_out_files": (b,)},
        {"files": (a,), "held_out_files": (c,)},
        {"files": (b,), "held_out_files": (a,)},
        {"files": (a, b)},
        {"files": (a, b), "held_out_files": (c,)},
        {"files": (a,), "held_out_files": (b, c)},
        {"files": (a, b, c)},
    ]
    keys = [cache_key(settings(spec, **w, packing=packing).data, model) for w in wanted for packing in (True, False)]
    assert len(set(keys)) == 2 * len(wanted)
    moved = write(tmp_path / "moved.jsonl", OTHERS)
    same = cache_key(settings(spec, files=(a,), held_out_files=(moved,)).data, model)
    assert same == cache_key(settings(spec, files=(a,), held_out_files=(b,)).data, model), "the same rows elsewhere"


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.parametrize("rows", [range(7, 7), range(7, 8), range(7, 19), range(0, 30), range(3, 34)])
def test_rounds_have_every_row_once_and_work_for_every_rank(rows: range, micro: int, dp: int) -> None:
    rounds = rounds_of(rows, micro, dp)
    assert all(len(ranks) == dp for ranks in rounds)
    assert all(len(batch) == micro for ranks in rounds for batch in ranks)
    flat = [row for ranks in rounds for batch in ranks for row in batch]
    assert flat == [*rows, *[-1] * (len(flat) - len(rows))], "every row once, in order, and -1 after them"
    assert len(flat) - len(rows) < micro * dp, "no round without a row"


def test_rounds_are_filled_up() -> None:
    assert rounds_of(range(5, 10), 2, 2) == [[[5, 6], [7, 8]], [[9, -1], [-1, -1]]]
    assert rounds_of(range(5, 5), 2, 2) == []


@pytest.fixture
def held_out(spec: TrainSpec, tmp_path: Path, request: pytest.FixtureRequest) -> HeldOut:
    """Of a run of 20 steps, with `loss_every_steps` and the share as the test says."""
    every, share = request.param
    spec = settings(spec, files=(write(tmp_path / "rows.jsonl", PAIRS),), held_out=share)
    spec = dataclasses.replace(spec, evaluate=dataclasses.replace(spec.evaluate, loss_every_steps=every))
    _, data, _ = run(spec)
    return HeldOut(spec, Ranks(0, 0, 2, dp_rank=0, sp_rank=0, device=torch.device("cpu")), data, total_steps=20)


@pytest.mark.parametrize(
    ("held_out", "due"),
    [
        ((0, 0.2), [0, 20]),
        ((1, 0.2), list(range(21))),
        ((6, 0.2), [0, 6, 12, 18, 20]),
        ((10, 0.2), [0, 10, 20]),
        ((50, 0.2), [0, 20]),
    ],
    indirect=["held_out"],
)
def test_the_loss_is_due_before_the_first_step_every_so_many_and_after_the_last(
    held_out: HeldOut, due: list[int]
) -> None:
    assert [step for step in range(21) if held_out.is_due(step)] == due
    assert held_out.supervised == held_out.data.supervised_per_row[held_out.data.num_rows :].sum() > 0
    assert [row for ranks in held_out.rounds for batch in ranks for row in batch if row >= 0] == list(
        held_out.data.held_out_rows
    )


@pytest.mark.parametrize("held_out", [(1, 0.0)], indirect=True)
def test_without_held_out_rows_it_is_never_due(held_out: HeldOut) -> None:
    assert (held_out.rounds, held_out.supervised) == ([], 0)
    assert not any(held_out.is_due(step) for step in range(21))
