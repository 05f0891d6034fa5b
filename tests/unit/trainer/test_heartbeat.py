"""What a rank leaves behind of where it was, when its process ends or freezes just then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.heartbeat import heartbeat_file

PROCESS = """
import os, signal, sys, time
from pathlib import Path
from trainer.heartbeat import HEARTBEAT as h
h.start(Path(sys.argv[1]), 0)
{steps}
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def last_sign(folder: Path, steps: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", PROCESS.format(steps=steps), str(folder)], check=False)
    assert done.returncode == -9
    return json.loads(heartbeat_file(folder, 0).read_text())


@pytest.mark.parametrize(
    ("steps", "phase", "may_last"),
    [
        ("h.beat('forward', 1); time.sleep(0.3)", "forward", True),
        ("h.beat('forward', 1); time.sleep(0.3); h.step_done(1)", "between steps", False),
        ("h.step_done(1); h.beat('save', 1, may_last=True); time.sleep(1.3); h.beat('data', 2)", "data", False),
        ("h.step_done(1); time.sleep(1.3); h.beat('save', 1, may_last=True); time.sleep(1.3)", "save", True),
    ],
    ids=["first step", "first step done", "saved", "saving"],
)
def test_what_may_last_ends_on_disk_at_once(tmp_path: Path, steps: str, phase: str, may_last: bool) -> None:
    """A rank frozen within its first second after that would be given run.timeout_s, not run.hang_s."""
    found = last_sign(tmp_path, steps)
    assert found["may_last"] is may_last
    if may_last:
        assert found["phase"] in (phase, "start")  # written once a second
    else:
        assert found["phase"] == phase
