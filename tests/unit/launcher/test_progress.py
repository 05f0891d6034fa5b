"""The live line: numbers from the run folder, and a terminal that may go away."""

import io
import json
from pathlib import Path

import pytest

from cluster.job import JobSpec, JobState, JobStatus
from launcher.progress import Follower, Progress, clock
from launcher.run_dir import RunDir

JOB = JobSpec("train", "trainer.worker", (), 1, (), {}, "/tmp", "/tmp", "run")
ROW = {"step": 3, "total_steps": 9, "loss": 1.5, "tokens_per_second": 310.0, "seconds": 2.0, "memory_gb": 1.4}


class ClosedTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3675, "1:01:15")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_summary_of_a_finished_stage(tmp_path: Path) -> None:
    run, out = RunDir(tmp_path), io.StringIO()
    progress = Progress(run, out)
    progress.stage_started(JOB)
    run.metrics.write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    progress.stage_ended(JOB, JobStatus(JobState.SUCCEEDED, 0, None), 12.0)
    assert "done" in out.getvalue()
    assert "3 steps, loss 1.5000, 310 tokens/s" in out.getvalue()


def test_share_of_peak_and_skipped_steps(tmp_path: Path) -> None:
    run, out = RunDir(tmp_path), io.StringIO()
    progress = Progress(run, out)
    progress.stage_started(JOB)
    row = {**ROW, "loss": None, "share_of_peak": 0.412, "skipped_steps": 2}
    run.metrics.write_text(json.dumps(row) + "\n", encoding="utf-8")
    progress.drawn -= 60
    progress.tick(JOB)
    progress.stage_ended(JOB, JobStatus(JobState.SUCCEEDED, 0, None), 12.0)
    assert "step 3/9  loss n/a  310 tokens/s  41% of peak  ETA 0:12  1.4 GB  2 skipped\n" in out.getvalue()
    assert "3 steps, loss n/a, 310 tokens/s, 41% of peak, 1.4 GB, 2 skipped\n" in out.getvalue()


def test_closed_terminal_does_not_stop_the_run(tmp_path: Path) -> None:
    progress = Progress(RunDir(tmp_path), ClosedTerminal())
    progress.note("stopping")
    progress.stage_started(JOB)
    progress.stage_ended(JOB, JobStatus(JobState.STOPPED, 130, None), 1.0)
    assert not progress.live


def test_follower_keeps_half_a_line_for_later_and_skips_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.rows() == []
    path.write_text('{"step": 1}\n{"st', encoding="utf-8")
    assert follower.rows() == [{"step": 1}]
    with path.open("a", encoding="utf-8") as f:
        f.write('ep": 2}\n{"cut\n{"step": 3}\n')
    assert follower.rows() == [{"step": 2}, {"step": 3}]
