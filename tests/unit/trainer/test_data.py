import dataclasses

import numpy as np
import pytest
import torch

from trainer.data import TokenData, TokenWriter, damage, epoch_order, num_steps, step_rows
from trainer.pack import pack_documents
from trainer.spec import OptimSpec, TrainError

OPTIM = OptimSpec(
    epochs=1.0, max_steps=0, micro_batch=1, accumulate=1, learning_rate=1e-4, schedule="cosine", warmup_ratio=0.0,
    weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0, seed=5, gradient_checkpointing=False, compile=False,
)  # fmt: skip
PAD, END = 9, 8


def random_documents(count=40, longest=30):
    rng = np.random.default_rng(3)
    documents = []
    for length in rng.integers(1, longest + 1, size=count):
        ids = rng.integers(10, 70_000, size=length).tolist()  # beyond 16 bits
        documents.append((ids, rng.choice([0, 0, 0, 1, 2], size=length).tolist()))
    return documents


def write(folder, documents, max_length, packing, num_held_out=0):
    folder.mkdir()
    writer = TokenWriter(folder)
    for i, (ids, supervised) in enumerate(documents):
        writer.add(ids, supervised, i % 2, i + 1)
    offsets, order = pack_documents(np.asarray(writer.lengths), max_length, packing)
    index = {"packing": packing, "max_length": max_length, "pad_token_id": PAD, "eos_token_id": END}
    index |= {"data_files": ["/a.jsonl", "/鸟.jsonl"]}
    index |= {"num_rows": len(offsets) - 1 - num_held_out, "num_held_out_rows": num_held_out}
    writer.finish(offsets, order, index)
    return folder


@pytest.fixture(params=[True, False], ids=["packed", "unpacked"])
def written(request, tmp_path):
    documents = random_documents()
    return documents, TokenData.open(write(tmp_path / "entry", documents, 32, request.param))


def naive(documents, data, rows, length):
    """ids, labels, positions and lengths of a batch, token by token."""
    ids, labels, positions, lengths = [], [], [], []
    for r in rows:
        for d in data.documents(r):
            tokens, supervised = documents[d]
            for t in range(len(tokens)):
                last = t + 1 == len(tokens)
                ids.append(tokens[t])
                labels.append(-100 if last else (-100, tokens[t + 1], END)[supervised[t + 1]])
                positions.append(t)
            lengths.append(len(tokens))
    pad = length - len(ids)
    if pad:
        lengths.append(pad)
    return ids + [PAD] * pad, labels + [-100] * pad, positions + list(range(pad)), tuple(lengths)


@pytest.mark.parametrize("rows", [[0], [3, 1, 2], [2, -1], [-1, 0], [-1], [-1, -1]])
def test_batches_equal_a_naive_construction(written, rows):
    documents, data = written
    length = data.row_length(rows)
    batch = data.batch(rows, length)
    ids, labels, positions, lengths = naive(documents, data, rows, length)
    for tensor, expected in ((batch.input_ids_1T, ids), (batch.labels_1T, labels), (batch.position_ids_1T, positions)):
        assert tensor.dtype == torch.long
        assert tensor.shape == (1, length)
        assert tensor[0].tolist() == expected
    assert batch.document_lengths == lengths
    real = [r for r in rows if r >= 0]
    assert int((batch.labels_1T != -100).sum()) == data.supervised_per_row[real].sum()
    assert sum(len(documents[d][0]) for r in rows for d in data.documents(r)) == data.tokens_per_row[real].sum()


def test_every_token_and_label_of_the_data_is_in_some_row(written):
    documents, data = written
    assert sorted(d for r in range(data.num_rows) for d in data.documents(r)) == list(range(len(documents)))
    assert data.tokens_per_row.sum() == sum(len(ids) for ids, _ in documents)
    assert data.supervised_per_row.sum() == sum(np.count_nonzero(s[1:]) for _, s in documents)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_held_out_rows_lie_behind_those_that_are_trained_on(tmp_path, packing):
    documents = random_documents()
    whole = TokenData.open(write(tmp_path / "whole", documents, 32, packing))
    data = TokenData.open(write(tmp_path / "entry", documents, 32, packing, num_held_out=7))
    assert whole.held_out_rows == range(whole.num_rows, whole.num_rows)
    assert data.num_rows == whole.num_rows - 7
    assert data.held_out_rows == range(data.num_rows, whole.num_rows)
    assert data.supervised_per_row.tolist() == whole.supervised_per_row.tolist(), "held-out rows have labels too"
    assert data.tokens_per_row.tolist() == whole.tokens_per_row.tolist()
    for row in data.held_out_rows:
        assert data.sources(row) == whole.sources(row)
        assert data.batch([row], 32).labels_1T.tolist() == whole.batch([row], 32).labels_1T.tolist()


def test_row_lengths(tmp_path):
    documents = [(list(range(1, n + 1)), [True] * n) for n in (100, 28, 1, 300)]
    packed = TokenData.open(write(tmp_path / "p", documents, 512, True))
    assert packed.num_rows == 1
    assert [packed.row_length(rows) for rows in ([0], [0, -1], [-1])] == [512, 1024, 512]
    apart = TokenData.open(write(tmp_path / "u", documents, 512, False))
    assert [apart.row_length(rows) for rows in ([0], [0, 1], [0, 1, 2], [3, -1], [-1])] == [128, 128, 160, 320, 32]


def test_a_full_row_has_no_padding_document(tmp_path):
    data = TokenData.open(write(tmp_path / "e", [([1, 2, 3, 4], [True] * 4), ([5, 6], [True] * 2)], 6, True))
    assert data.batch([0], 6).document_lengths == (4, 2)
    assert data.batch([0], 6).labels_1T.tolist() == [[2, 3, 4, -100, 6, -100]]


def test_sources_name_file_and_line(written):
    _, data = written
    for row in (0, data.num_rows - 1):
        expected = [f"{('/a.jsonl', '/鸟.jsonl')[d % 2]}:{d + 1}" for d in data.documents(row)]
        assert data.sources(row) == expected
    assert data.sources(-1) == []


def test_damage_is_found(tmp_path):
    entry = write(tmp_path / "e", random_documents(), 32, True)
    assert damage(entry) == ""
    tokens = (entry / "tokens.bin").read_bytes()
    (entry / "tokens.bin").write_bytes(tokens[:-4])
    assert damage(entry).startswith("tokens.bin has ")
    with pytest.raises(TrainError, match=r"is damaged: tokens\.bin"):
        TokenData.open(entry)
    (entry / "tokens.bin").write_bytes(tokens[:-4] + b"\1\2\3\4")
    assert damage(entry) == "the content of tokens.bin has changed"
    (entry / "row_offsets.npy").unlink()
    (entry / "tokens.bin").write_bytes(tokens)
    assert damage(entry) == "row_offsets.npy is missing"
    (entry / "index.json").unlink()
    assert "cannot be read" in damage(entry)
    with pytest.raises(TrainError, match="cannot be read"):
        TokenData.open(entry)


@pytest.mark.parametrize(("num_rows", "seed", "epoch"), [(1, 0, 0), (1000, 42, 0), (1000, 42, 1), (1000, -1, 3)])
def test_epoch_order_is_a_permutation(num_rows, seed, epoch):
    order = epoch_order(num_rows, seed, epoch)
    assert sorted(order) == list(range(num_rows))
    assert (order == epoch_order(num_rows, seed, epoch)).all()


def test_epoch_order_is_the_same_for_ever():
    assert epoch_order(10, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert epoch_order(10, 42, 1).tolist() != epoch_order(10, 42, 0).tolist() != epoch_order(10, 43, 0).tolist()


def sequence(num_rows, optim, dp):
    """What is trained, step by step: the rows of all ranks of a step, in the order of micro batches and ranks."""
    steps = []
    for s in range(num_steps(num_rows, optim, dp)):
        ranks = [step_rows(s, r, num_rows, optim, dp) for r in range(dp)]
        assert all(len(rows) == optim.accumulate and all(len(m) == optim.micro_batch for m in rows) for rows in ranks)
        steps.append([row for m in range(optim.accumulate) for r in range(dp) for row in ranks[r][m]])
    return steps


def settings(**changes):
    return dataclasses.replace(OPTIM, **changes)


def test_other_devices_and_the_same_global_batch_see_the_same_steps():
    layouts = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (4, 1, 2)]
    runs = [sequence(101, settings(micro_batch=m, accumulate=a, epochs=2.5), dp) for m, a, dp in layouts]
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("epochs", [1.0, 3.0])
def test_every_epoch_has_every_row_once(epochs):
    rows = [r for step in sequence(37, settings(micro_batch=2, accumulate=2, epochs=epochs), 2) for r in step]
    used = [r for r in rows if r >= 0]
    assert len(used) == 37 * epochs
    for start in range(0, len(used), 37):
        assert sorted(used[start : start + 37]) == list(range(37))
    assert rows == used + [-1] * (len(rows) - len(used)), "empty rows come last"
    assert len(rows) - len(used) < 8


def test_resuming_with_fewer_devices_skips_and_repeats_nothing():
    before = sequence(50, settings(accumulate=1, epochs=2.0), 4)[:7]
    after = sequence(50, settings(accumulate=4, epochs=2.0), 1)[7:]
    assert before + after == sequence(50, settings(accumulate=2, epochs=2.0), 2)


@pytest.mark.parametrize(
    ("num_rows", "changes", "dp", "expected"),
    [
        (100, {}, 1, 100),
        (100, {"accumulate": 4, "micro_batch": 2}, 2, 7),
        (10, {"epochs": 1.1}, 1, 11),
        (10, {"epochs": 0.01}, 1, 1),
        (10, {"epochs": 0.25}, 2, 2),
        (10, {"max_steps": 500, "epochs": 1.0}, 4, 500),
    ],
)
def test_num_steps(num_rows, changes, dp, expected):
    assert num_steps(num_rows, settings(**changes), dp) == expected


def test_max_steps_goes_on_into_further_epochs():
    rows = [r for step in sequence(5, settings(max_steps=4, micro_batch=3), 1) for r in step]
    assert len(rows) == 12
    assert sorted(rows[:5]) == sorted(rows[5:10]) == list(range(5))
    assert min(rows) >= 0
