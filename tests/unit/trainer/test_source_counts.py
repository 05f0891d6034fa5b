"""How often each document of a mix is trained on."""

import numpy as np
import pytest

from trainer.source_counts import drawn

RANDOM = np.random.Generator(np.random.Philox(1))
DIGESTS = RANDOM.integers(0, 2**63, 1000).astype(np.uint64)
SOURCES = np.repeat([0, 1], [400, 600])


def times(weights, sources=SOURCES):
    return np.bincount(drawn(DIGESTS, sources, weights), minlength=len(DIGESTS))


@pytest.mark.parametrize(
    ("weights", "totals"),
    [((1.0, 1.0), (400, 600)), ((0.5, 1.0), (200, 600)), ((2.3, 0.25), (920, 150)), ((3.0, 0.001), (1200, 1))],
)
def test_totals_are_exact(weights, totals):
    found = times(weights)
    assert (found[:400].sum(), found[400:].sum()) == totals
    for weight, own in zip(weights, (found[:400], found[400:]), strict=True):
        assert set(own) <= {int(weight), int(weight) + 1}


def test_what_is_drawn_does_not_depend_on_where_it_stands():
    order = RANDOM.permutation(len(DIGESTS))
    moved = np.bincount(drawn(DIGESTS[order], SOURCES[order], (0.3, 1.7)), minlength=len(DIGESTS))
    assert (moved == times((0.3, 1.7))[order]).all()


def test_half_of_a_half_is_a_part_of_it():
    half, quarter = times((0.5, 1.0)), times((0.25, 1.0))
    assert (quarter <= half).all()


def test_periodic_rows_are_drawn_evenly():
    """Every other row in another language: a fixed stride would take only one of the two."""
    found = times((0.5, 0.5))
    assert 60 <= found[:400:2].sum() <= 140
    assert 100 <= found[400::2].sum() <= 200


def test_held_out_documents_are_not_drawn():
    sources = np.where(np.arange(1000) % 10 == 0, -1, SOURCES)
    assert times((2.0, 1.0), sources)[::10].sum() == 0
    assert drawn(DIGESTS, sources, (1.0, 1.0)).tolist() == [i for i in range(1000) if i % 10]
