"""metrics.jsonl and events.jsonl: one JSON object a line, appended and flushed, so that a reader may follow along."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def append_line(path: str, row: dict[str, Any]) -> None:
    """Append one JSON line. A crash leaves at most a cut last line; the next row then begins on a line of its own."""
    with open(path, "ab+") as f:
        if f.tell() > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def event(path: str, name: str, **fields: Any) -> None:
    """Append {"time", "event": name, **fields} to the events file at `path`."""
    append_line(path, {"time": round(time.time(), 3), "event": name, **fields})


def read_lines(path: str) -> list[dict[str, Any]]:
    """All whole lines; a cut last line (after a crash) is left out. A missing file has none."""
    file = Path(path)
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def peak_memory_gb(device: str) -> float:
    """Peak memory of this process so far in 2**30 bytes: allocated on the GPU, or resident on CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
