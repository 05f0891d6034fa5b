"""The token cache: how `prepare` writes it, how training reads it, and in which order.

One entry is a folder, and is not changed once it exists:
  tokens.bin             uint32 (N,)   all documents end to end
  supervised.bin         uint8 (N,)    1 where the token must be predicted, 2 where the end of the text must be in its place
  document_offsets.npy   int64 (D + 1,) document d is tokens[offsets[d] : offsets[d + 1]]
  document_labels.npy    int64 (D,)    labels of a document: its supervised tokens but for the first token
  document_sources.npy   int64 (D, 2)  index of the data file in index.json, and line
  row_offsets.npy        int64 (R + 1,) row r holds row_documents[offsets[r] : offsets[r + 1]]
  row_documents.npy      int64 (M,)     documents by number; by the weight of its source one may be there twice, or not at all
The first `num_rows` rows (index.json) are trained on; the ones behind them are held out.
  index.json             what the entry is, and size and sha256 of its files; written last

Shapes: N tokens, D documents, R rows, T tokens of one batch.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .disk import read_json, write_json
from .spec import OptimSpec, TrainError

if TYPE_CHECKING:
    import torch

CACHE_VERSION = 4
"""Part of the cache key: raise it whenever the same settings would give other tokens or another layout."""
INDEX = "index.json"
MAX_HASHED_BYTES = 64 * 2**20
"""Larger files are checked by size alone."""
ROUND_TO = 32
"""Unpacked batches are padded to a multiple of this, so that few different shapes reach the kernels.

Measured on a CPU: a new shape costs its first micro batch 60 ms; of alpaca's rows, four at a time, 2 % is padding (with
128: 8 %)."""
IGNORED = -100
"""Label of a token that is not learnt, as in torch.nn.functional.cross_entropy."""


class TokenWriter:
    """Writes an entry into an empty folder, chunk by chunk: what is held in memory is a few numbers per document."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._supervised = (folder / "supervised.bin").open("wb")
        self.lengths = array("q")
        self.labels = array("q")
        self.digests = bytearray()
        """What the tokens of each document are, in 8 bytes."""
        self._sources = array("q")

    def add(
        self,
        input_ids: Sequence[int],
        supervised: Sequence[int],
        file_index: int,
        line: int,
        whole: Sequence[int] | None = None,
    ) -> None:
        """`whole`: tokens of the row that this is a part of; None: it is all of it. Documents of one row have one digest."""
        tokens, learnt = _as_bytes(input_ids), bytes(supervised)
        self._tokens.write(tokens)
        named = tokens if whole is None or whole is input_ids else _as_bytes(whole)
        self.digests += hashlib.blake2b(named, digest_size=8).digest()
        self._supervised.write(learnt)
        self.lengths.append(len(input_ids))
        self.labels.append(len(learnt[1:]) - learnt.count(0, 1))
        self._sources.extend((file_index, line))

    def finish(self, row_offsets: np.ndarray, row_documents: np.ndarray, index: dict[str, Any]) -> None:
        """Write what is left, and `index` (with sizes and hashes) last."""
        self._tokens.close()
        self._supervised.close()
        offsets = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64))).astype(np.int64)
        arrays = {
            "document_offsets": offsets,
            "document_labels": np.asarray(self.labels, np.int64),
            "document_sources": np.asarray(self._sources, np.int64).reshape(-1, 2),
            "row_offsets": row_offsets,
            "row_documents": row_documents,
        }
        for name, values in arrays.items():
            np.save(self.folder / f"{name}.npy", values, allow_pickle=False)
        files = {p.name: _fingerprint(p) for p in sorted(self.folder.iterdir())}
        write_json(self.folder / INDEX, {"version": CACHE_VERSION, **index, "files": files})


def _as_bytes(token_ids: Sequence[int]) -> bytes:
    """uint32, little-endian. Of 200 tokens a third of the time that numpy takes for a list."""
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    found: dict[str, Any] = {"bytes": size}
    if size <= MAX_HASHED_BYTES:
        found["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def damage(data_dir: Path) -> str:
    """What is wrong with an entry, "" when nothing is. Reads its small files."""
    try:
        index = read_json(data_dir / INDEX)
    except TrainError as e:
        return e.message
    if index.get("version") != CACHE_VERSION:
        return f"its version is {index.get('version')}, not {CACHE_VERSION}"
    for name, expected in index["files"].items():
        path = data_dir / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, not {expected['bytes']}"
        if "sha256" in expected and _fingerprint(path) != expected:
            return f"the content of {name} has changed"
    return ""


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end, int64 with a batch dimension of 1. Documents never attend to each other."""

    input_ids_1T: torch.Tensor
    labels_1T: torch.Tensor
    """Already shifted: labels[t] is the token after t where that is of the same document and supervised, else -100."""
    position_ids_1T: torch.Tensor
    """Begins at 0 in every document."""
    document_lengths: tuple[int, ...]
    """Sums to T; the padding, if any, is the last document."""


class TokenData:
    """A cache entry, memory-mapped: opening it reads nothing but offsets."""

    def __init__(self, data_dir: Path, index: dict[str, Any]) -> None:
        self.index = index
        self.packing: bool = index["packing"]
        self.max_length: int = index["max_length"]
        self._end_id: int = index["eos_token_id"]
        self._tokens = np.memmap(data_dir / "tokens.bin", dtype="<u4", mode="r")
        self._supervised = np.memmap(data_dir / "supervised.bin", dtype=np.uint8, mode="r")
        self._offsets = _load(data_dir, "document_offsets")
        self._sources = _load(data_dir, "document_sources")
        self._row_offsets = _load(data_dir, "row_offsets")
        self._row_documents = _load(data_dir, "row_documents")
        lengths, labels = np.diff(self._offsets), _load(data_dir, "document_labels")
        self.supervised_per_row: np.ndarray = np.add.reduceat(labels[self._row_documents], self._row_offsets[:-1])
        """int64 (R,): labels of each row, held-out ones too, which are what the loss is summed over."""
        self.tokens_per_row: np.ndarray = np.add.reduceat(lengths[self._row_documents], self._row_offsets[:-1])
        """int64 (R,): tokens of each row, held-out ones too, without padding."""

    @classmethod
    def open(cls, data_dir: str | Path) -> TokenData:
        """Raises TrainError when the entry is absent or damaged."""
        folder = Path(data_dir)
        try:
            index = read_json(folder / INDEX)
            sizes = {name: (folder / name).stat().st_size for name in index["files"]}
        except (TrainError, OSError) as e:
            raise TrainError(f"token cache {folder} cannot be read: {e}", "Run the prepare stage again.") from e
        wrong = [name for name, size in sizes.items() if size != index["files"][name]["bytes"]]
        if wrong:
            raise TrainError(f"token cache {folder} is damaged: {', '.join(wrong)}", "Run the prepare stage again.")
        return cls(folder, index)

    @property
    def num_rows(self) -> int:
        """Rows to train on."""
        return self.index["num_rows"]

    @property
    def held_out_rows(self) -> range:
        """Numbers of the rows that are not trained on."""
        return range(self.num_rows, len(self._row_offsets) - 1)

    def documents(self, row: int) -> np.ndarray:
        """Document numbers of a row, int64; of row -1, none."""
        if row < 0:
            return np.empty(0, np.int64)
        return self._row_documents[self._row_offsets[row] : self._row_offsets[row + 1]]

    def sources(self, row: int) -> list[str]:
        """file:line of every document of a row."""
        return [self.source(int(d)) for d in self.documents(row)]

    def source(self, document: int) -> str:
        """file:line of a document."""
        file, line = self._sources[document]
        return f"{self.index['data_files'][file]}:{line}"

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 (D,): tokens of each document, in the order of the data."""
        return np.diff(self._offsets)

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, what is learnt of each: see `Document.supervised`), both (length,)."""
        span = slice(int(self._offsets[number]), int(self._offsets[number + 1]))
        return self._tokens[span], self._supervised[span]

    def row_length(self, rows: Sequence[int]) -> int:
        """Length T of a batch of these rows: a constant with packing, else the next multiple of ROUND_TO (never 0)."""
        if self.packing:
            return len(rows) * self.max_length
        total = sum(int(self.tokens_per_row[r]) for r in rows if r >= 0)
        return max(1, math.ceil(total / ROUND_TO)) * ROUND_TO

    def batch(self, rows: Sequence[int], length: int) -> Batch:
        """The rows end to end, padded to `length` tokens by one more document. Row -1 is empty: nothing but padding."""
        import torch

        documents = [int(d) for row in rows for d in self.documents(row)]
        spans = [(int(self._offsets[d]), int(self._offsets[d + 1])) for d in documents]
        lengths = [end - start for start, end in spans]
        used = sum(lengths)
        assert used <= length, f"{used} tokens do not fit into {length}"
        input_ids = np.full(length, self.index["pad_token_id"], np.int64)
        labels = np.full(length, IGNORED, np.int64)
        at = 0
        for start, end in spans:
            tokens = self._tokens[start:end].astype(np.int64)
            size = end - start
            input_ids[at : at + size] = tokens
            # The label of a token is the token after it, so the last one of a document has none.
            kinds = self._supervised[start + 1 : end]
            labels[at : at + size - 1] = np.where(kinds == 0, IGNORED, np.where(kinds == 2, self._end_id, tokens[1:]))
            at += size
        if used < length:
            lengths.append(length - used)
        positions = np.concatenate([np.arange(n) for n in lengths])
        as_batch = (torch.from_numpy(a).unsqueeze(0) for a in (input_ids, labels, positions))
        return Batch(*as_batch, document_lengths=tuple(lengths))


def _load(data_dir: Path, name: str) -> np.ndarray:
    return np.load(data_dir / f"{name}.npy", mmap_mode="r", allow_pickle=False)


@functools.lru_cache(maxsize=4)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows, int64 (R,), read-only.

    Ranks of raw Philox output: numpy keeps that stream the same for ever, which it does not promise of shuffle().
    """
    raw = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(num_rows)
    order = np.argsort(raw, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def rows_per_step(optim: OptimSpec, dp: int) -> int:
    """Rows of one optimizer step over all ranks (the global batch)."""
    return optim.micro_batch * optim.accumulate * dp


def total_rows(num_rows: int, optim: OptimSpec, dp: int) -> int:
    """Rows that training consumes, repeats included. Part of an epoch is rounded up to a whole row."""
    if optim.max_steps:
        return optim.max_steps * rows_per_step(optim, dp)
    return math.ceil(round(optim.epochs * num_rows, 6))  # 1.1 x 10 is 11.000000000000002


def num_steps(num_rows: int, optim: OptimSpec, dp: int) -> int:
    """Optimizer steps; the last one may have empty rows."""
    return math.ceil(total_rows(num_rows, optim, dp) / rows_per_step(optim, dp))


def step_rows(step: int, dp_rank: int, num_rows: int, optim: OptimSpec, dp: int) -> list[list[int]]:
    """Rows of one rank in the 0-based optimizer `step`: `accumulate` lists of `micro_batch` row numbers; -1 is no row.

    The sequence of all ranks is one permutation per epoch, one after the other. A step takes the next global batch of
    it, and micro batch m of rank r takes its part number m x dp + r: the order depends on the global batch alone.
    """
    micro, start = optim.micro_batch, step * rows_per_step(optim, dp)
    end = total_rows(num_rows, optim, dp)
    result = []
    for m in range(optim.accumulate):
        first = start + (m * dp + dp_rank) * micro
        positions = range(first, first + micro)
        result.append([_row_at(p, num_rows, optim.seed) if p < end else -1 for p in positions])
    return result


def _row_at(position: int, num_rows: int, seed: int) -> int:
    epoch, index = divmod(position, num_rows)
    return int(epoch_order(num_rows, seed, epoch)[index])
