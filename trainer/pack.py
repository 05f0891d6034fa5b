"""Packing: which documents share a row. numpy only.

Best-fit decreasing: the longest document first, each into the fullest row that still holds it.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack_documents(lengths: np.ndarray, max_length: int, packing: bool) -> tuple[np.ndarray, np.ndarray]:
    """(row_offsets (R + 1,), row_documents (D,)), both int64: row r holds `row_documents[offsets[r] : offsets[r + 1]]`.

    Every document is in exactly one row; no row is longer than `max_length` tokens, and no document may be. The
    result depends on nothing but the arguments. Without `packing` row r is document r.
    """
    num_documents = len(lengths)
    if not packing:
        return np.arange(num_documents + 1, dtype=np.int64), np.arange(num_documents, dtype=np.int64)
    assert num_documents == 0 or lengths.max() <= max_length, "documents are cut before they are packed"
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free lengths of the open rows, ascending
    rows_with_space: dict[int, list[int]] = {}
    # A stable sort of equal lengths keeps the order of the data.
    for document in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                del spaces[at]
        else:
            space, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        left = space - length
        if left > 0:
            if not rows_with_space.setdefault(left, []):
                insort(spaces, left)
            rows_with_space[left].append(row)
    sizes = np.fromiter((len(r) for r in rows), np.int64, len(rows))
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return offsets, np.fromiter((d for r in rows for d in sorted(r)), np.int64, num_documents)
