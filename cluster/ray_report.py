"""What a job tells Ray while it runs: its newest metrics and checkpoint, as they lie on disk; nothing is copied."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from . import logs
from .job import JobReport

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that were reported (CHECKPOINT_MANAGER_SNAPSHOT_FILENAME of its v2/_internal/constants.py)."""


class Reporter:
    """Follows the files of a job. Rank 0 alone has one."""

    def __init__(self, report: JobReport) -> None:
        self.report = report
        self.told_metrics: dict[str, Any] = {}
        self.told_checkpoint: Path | None = None

    def news(self) -> tuple[dict[str, Any], Path | None] | None:
        """(newest metrics, a checkpoint that was not told yet or None), or None when nothing has changed."""
        metrics, checkpoint = newest_row(Path(self.report.metrics)), self._newest_checkpoint()
        new_checkpoint = None if checkpoint == self.told_checkpoint else checkpoint
        if metrics == self.told_metrics and new_checkpoint is None:
            return None
        self.told_metrics = metrics
        self.told_checkpoint = new_checkpoint or self.told_checkpoint
        return metrics, new_checkpoint

    def _newest_checkpoint(self) -> Path | None:
        found: list[tuple[int, Path]] = []
        for manifest in Path(self.report.checkpoints).glob(f"*/{self.report.manifest}"):
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint that goes at this moment
                found.append((manifest.stat().st_mtime_ns, manifest.parent))
        return max(found)[1] if found else None


def newest_row(metrics: Path) -> dict[str, Any]:
    """Numbers, texts and truth values of the last whole line; {} while there is none."""
    for line in reversed(logs.tail(metrics, 2).splitlines()):
        with contextlib.suppress(json.JSONDecodeError):  # cut short: it is being written
            return {k: v for k, v in json.loads(line).items() if isinstance(v, (int, float, str, bool))}
    return {}


def forget_missing(folder: Path, ray_version: str) -> None:
    """Take checkpoints that no longer exist from Ray's list in `folder`.

    Ray is told to keep every checkpoint, because it deletes what it does not keep; ours deletes the oldest itself. With
    a missing one in its list Ray neither restores the run nor starts it again, and neither with a list of another version
    or one that was cut short. Nothing of ours is in it: it may always go.
    """
    path = folder / SNAPSHOT
    if not path.is_file():
        return
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        is_known = state["ray_version"] == ray_version
    except (ValueError, KeyError, TypeError):  # Ray writes it in place: a kill leaves half of it
        is_known = False
    if not is_known:
        path.unlink()
        return
    pairs = zip(state["checkpoint_results"], state["checkpoint_report_indices"], strict=True)
    kept = [(result, index) for result, index in pairs if (folder / result["checkpoint_dir_name"]).is_dir()]
    state["checkpoint_results"] = [result for result, _ in kept]
    state["checkpoint_report_indices"] = [index for _, index in kept]
    state["latest_checkpoint_result"] = kept[-1][0] if kept else None
    logs.write_json(path, state)
