"""The arithmetic of a merge: a weight and what adapters add to it, in blocks of rows that stay in the processor's cache.

Every sum is taken in fp32 and rounded once. Matrix products are numpy's, except where the result is fp32: there they are
torch's, so that every bit is the one that PEFT's merge_and_unload gives. Importing torch takes longer than most merges.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint_format import num_threads
from .lora_adapter import Update
from .spec import TrainError
from .tensor_files import TensorFile, bf16_bits, from_float32, in_order, to_float32
from .tensor_header import TensorSpec

BLOCK_ELEMENTS = 2**18
"""Elements of a weight that are summed at a time: 1 MiB of fp32."""
LARGEST = {"BF16": 3.3961775292304601e38, "F16": 65520.0, "F32": float("inf")}
"""From here on a value is rounded to infinity."""
KEPT_FACTORS = 4

Rows = Callable[[int, int, int], np.ndarray]
"""(matrix, first row, last row + 1) -> these rows of the weight as fp32, in memory that the caller may change."""
Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


@contextlib.contextmanager
def product_of(dtype: str) -> Iterator[tuple[ThreadPoolExecutor, Product]]:
    """Threads, and the product of fp32 matrices that they use for a result of `dtype` (as stored).

    One thread computes one block. OpenMP's threads would meet at a barrier after every operation, which makes a merge 8
    times slower on a busy machine.
    """
    if dtype != "F32":
        with ThreadPoolExecutor(num_threads()) as pool:
            yield pool, np.matmul
        return
    import torch

    def product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
        return torch.mm(torch.from_numpy(b), torch.from_numpy(a)).numpy()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads()) as pool:
            yield pool, product
    finally:
        torch.set_num_threads(threads)


def row_blocks(num_rows: int, num_columns: int) -> list[tuple[int, int]]:
    """(first, last + 1) of blocks of about BLOCK_ELEMENTS. None is short of 16 rows unless the weight is.

    A matrix product of one row takes another path in BLAS than one of many, and its last bit may differ.
    """
    size = max(16, BLOCK_ELEMENTS // num_columns // 16 * 16)
    bounds = list(range(0, num_rows, size))
    if len(bounds) > 1 and num_rows - bounds[-1] < 16:
        bounds.pop()
    return list(zip(bounds, [*bounds[1:], num_rows], strict=True))


class Factors:
    """Tensors of adapter files as fp32, the last few kept: all experts of a layer stand in the same two."""

    def __init__(self, files: dict[Path, TensorFile]) -> None:
        self.files = files
        self._kept: dict[tuple[Path, str], np.ndarray] = {}

    def get(self, path: Path, name: str) -> np.ndarray:
        key = (path, name)
        if key not in self._kept:
            entry = self.files[path].entries[name]
            values = to_float32(self.files[path].read(name), entry.dtype).reshape(entry.shape)
            while len(self._kept) >= KEPT_FACTORS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = values
        return self._kept[key]


@dataclass(frozen=True)
class _Term:
    """One update with its factors in memory: lora_a (rank, in), lora_b (out, rank)."""

    a: np.ndarray
    b: np.ndarray
    scaling: float
    transposed: bool
    lengths: np.ndarray | None
    """DoRA: of each output."""

    @classmethod
    def of(cls, update: Update, factors: Factors) -> _Term:
        a, b = factors.get(update.file, update.lora_a), factors.get(update.file, update.lora_b)
        lengths = None if update.magnitude is None else factors.get(update.file, update.magnitude).reshape(-1)
        if update.num_experts > 1:
            # PEFT lays them out as (experts, rank, in) and (out, rank, experts).
            a = a.reshape(update.num_experts, update.rank, -1)[update.expert]
            b = b.reshape(len(b), update.rank, update.num_experts)[:, :, update.expert]
        if update.rows is not None:
            b = b[slice(*update.rows)]
        return cls(np.ascontiguousarray(a), np.ascontiguousarray(b), update.scaling, update.transposed, lengths)

    def rows(self, first: int, last: int, product: Product) -> np.ndarray:
        """These rows of the update, in the order of operations of peft's LoraLayer.get_delta_weight."""
        if self.transposed:
            added = np.ascontiguousarray(product(self.b, np.ascontiguousarray(self.a[:, first:last])).T)
        else:
            added = product(self.b[first:last], self.a)
        added *= np.float32(self.scaling)
        return added


def merged(
    tensor: TensorSpec,
    read: Rows,
    updates: Sequence[Update],
    factors: Factors,
    pool: ThreadPoolExecutor,
    product: Product,
) -> Iterator[Callable[[], np.ndarray]]:
    """What computes the pieces of the merged weight, in order, as stored; each may be called by any thread.

    Calling one raises TrainError when a value is not finite in that dtype.
    """
    num_rows, num_columns = tensor.shape[-2:]
    blocks = row_blocks(num_rows, num_columns)
    for number in range(tensor.shape[0] if len(tensor.shape) == 3 else 1):
        terms = [_Term.of(update, factors) for update in updates if update.matrix == number]
        matrix = _Matrix(tensor, number, read, terms, product)
        scales = matrix.column_scales(blocks, pool)
        for block in blocks:
            yield functools.partial(matrix.stored, scales, block)


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a weight, with all that is added to it."""

    tensor: TensorSpec
    number: int
    read: Rows
    terms: list[_Term]
    product: Product

    def summed(self, block: tuple[int, int]) -> np.ndarray:
        rows = self.read(self.number, *block)
        for term in self.terms:
            rows += term.rows(*block, self.product)
        return rows

    def stored(self, scales: np.ndarray | None, block: tuple[int, int]) -> np.ndarray:
        rows = self.summed(block)
        if scales is not None:
            rows *= scales
        elif self.terms and (lengths := self.terms[0].lengths) is not None:
            rows *= (lengths[slice(*block)] / np.linalg.norm(rows, axis=1))[:, None]
        return rounded(rows, self.tensor)

    def column_scales(self, blocks: list[tuple[int, int]], pool: ThreadPoolExecutor) -> np.ndarray | None:
        """DoRA on a weight stored as (in, out): an output is a column, whose length takes a pass over all rows."""
        if not self.terms or (lengths := self.terms[0].lengths) is None or not self.terms[0].transposed:
            return None
        total = np.zeros(len(lengths), np.float64)
        for squares in in_order(pool, self._squares, blocks):
            total += squares
        return (lengths / np.sqrt(total)).astype(np.float32)

    def _squares(self, block: tuple[int, int]) -> np.ndarray:
        return np.square(self.summed(block), dtype=np.float64).sum(axis=0)


def rounded(rows: np.ndarray, tensor: TensorSpec) -> np.ndarray:
    """fp32 -> as stored. Raises TrainError when a value is not finite there."""
    # Both are NaN when one element is, and every comparison with NaN is false.
    if not max(float(rows.max()), -float(rows.min())) < LARGEST[tensor.dtype]:
        raise TrainError(
            f"{tensor.name} is not finite after merging as {tensor.dtype}",
            "fp16 ends at 65504: try --dtype bf16; if that fails too, base or adapter hold NaN or infinity.",
        )
    return bf16_bits(rows) if tensor.dtype == "BF16" else from_float32(rows, tensor.dtype)
