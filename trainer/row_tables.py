"""Tables of data (parquet, Arrow) as streams of rows, and zstd streams: what pyarrow reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from .row_files import ARROW_FILE, PARQUET, damaged

BATCH_ROWS = 1000
"""Rows that are turned into Python values at once."""


def table_values(path: Path, head: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based row number, row) of a parquet file, or of an Arrow file of either kind. Raises TrainError.

    Columns that are null are left out of their row: tables give every row all columns.
    """
    number = 0
    try:
        for batch in _batches(path, head):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for row in batch.slice(start, BATCH_ROWS).to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as e:
        raise damaged(path, e) from e


def _batches(path: Path, head: bytes) -> Iterator[pa.RecordBatch]:
    if head.startswith(PARQUET):
        with pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            yield from file.iter_batches(BATCH_ROWS)
        return
    with pa.memory_map(str(path)) as source:
        if head.startswith(ARROW_FILE):
            with pyarrow.ipc.open_file(source) as reader:
                for i in range(reader.num_record_batches):
                    yield reader.get_batch(i)
        else:
            with pyarrow.ipc.open_stream(source) as reader:
                yield from reader


class _Zstd(io.RawIOBase):
    """A zstd stream as a plain file that says what is wrong in our words."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (pa.ArrowException, OSError) as e:
            raise damaged(self._path, e) from e
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_zstd(path: Path) -> IO[bytes]:
    """The unpacked bytes of a zstd file. Reading raises TrainError where it is damaged."""
    return io.BufferedReader(_Zstd(path), 1 << 17)
