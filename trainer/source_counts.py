"""Several sources in one mix: how often each document is trained on in an epoch, and what became of each source. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .spec import DataFile


def drawn(digests: np.ndarray, sources: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Document numbers, int64 (M,), ascending: each source's documents as often as its weight says.

    digests uint64 (D,): what each document says; sources int64 (D,): its source's number in `weights`, -1 for documents that
    are held out. Of a source with n documents, weight 2.3 takes each twice, and round(0.3 n) a third time: those
    whose digests come first. So the choice depends on what documents say, and on no seed; it is the same in every epoch.
    """
    if all(weight == 1 for weight in weights):
        return np.flatnonzero(sources >= 0)
    times = np.zeros(len(digests), np.int64)
    for number, weight in enumerate(weights):
        own = np.flatnonzero(sources == number)
        whole = int(weight)
        times[own] = whole
        first = np.argsort(digests[own], kind="stable")[: round((weight - whole) * len(own))]
        times[own[first]] += 1
    return np.repeat(np.arange(len(digests), dtype=np.int64), times)


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source; held-out files are none."""

    path: str
    weight: float
    rows: int
    """Rows that were read; of a source with a map, those that it made."""
    documents: int
    """Different documents to train on: without those that are held out, too long, or have nothing to learn."""
    trained: int
    """Documents of one epoch: `documents` by the weight."""
    tokens: int
    """Of `trained`."""

    @classmethod
    def of(
        cls,
        files: Sequence[DataFile],
        rows: Sequence[int],
        sources: np.ndarray,
        is_held_out: np.ndarray,
        trained: np.ndarray,
        lengths: np.ndarray,
    ) -> list[SourceCounts]:
        """sources int64 (D,) and is_held_out bool (D,) say it of each document, trained (M,) is what `drawn` gives."""
        of_trained = sources[trained]
        return [
            cls(
                path=file.path,
                weight=file.weight,
                rows=rows[number],
                documents=int(((sources == number) & ~is_held_out).sum()),
                trained=int((of_trained == number).sum()),
                tokens=int(lengths[trained[of_trained == number]].sum()),
            )
            for number, file in enumerate(files)
        ]


def source_lines(sources: Sequence[SourceCounts]) -> list[str]:
    """One line a source, for people; nothing where a single source is taken as it is."""
    if len(sources) == 1 and sources[0].weight == 1:
        return []
    total = sum(source.tokens for source in sources) or 1
    return [
        f"data: {s.path}: {s.rows:,} rows -> {s.documents:,} documents x weight {s.weight:g} = {s.trained:,} an epoch, "
        f"{s.tokens:,} tokens ({s.tokens / total:.1%} of all)"
        for s in sources
    ]
