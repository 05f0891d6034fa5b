import itertools
import time

import numpy as np
import pytest

from trainer.pack import pack_documents


def rows(lengths, max_length, packing=True):
    offsets, documents = pack_documents(np.asarray(lengths, np.int64), max_length, packing)
    assert offsets.dtype == documents.dtype == np.int64
    return [documents[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize("seed", range(5))
def test_every_document_once_and_no_row_too_long(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 101, size=500)
    packed = rows(lengths, 100)
    assert sorted(d for row in packed for d in row) == list(range(500))
    assert max(lengths[row].sum() for row in packed) <= 100
    fills = sorted(lengths[row].sum() for row in packed)
    assert fills[0] + fills[1] > 100, "the two emptiest rows could have been one"


def test_best_fit():
    # 6 opens a row, 5 another; 4 fits the first exactly, 3 and 2 the second.
    assert rows([2, 6, 3, 5, 4], 10) == [[1, 4], [0, 2, 3]]


def test_a_full_document_fills_its_row():
    assert rows([10, 10, 1], 10) == [[0], [1], [2]]


def test_without_packing_a_row_is_a_document():
    assert rows([3, 20, 1], 10, packing=False) == [[0], [1], [2]]


def test_52000_documents_in_under_a_second():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.8, 52_000).astype(np.int64), 3, 2048)
    started = time.process_time()
    offsets, _ = pack_documents(lengths, 2048, True)
    assert time.process_time() - started < 1
    assert lengths.sum() / ((len(offsets) - 1) * 2048) > 0.995
