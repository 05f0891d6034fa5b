"""Stacks are read whole, however slowly a rank writes them."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import launcher.job_watch
from cluster.job import JobSpec, JobState
from launcher.hang import is_whole
from launcher.job_watch import JobWatch
from trainer.heartbeat import heartbeat_file, stacks_file

DUMP = """
import faulthandler, threading
ask, asked = threading.Event(), threading.Event()
def work(deep):
    if deep:
        return work(deep - 1)
    asked.set()
    ask.wait()
thread = threading.Thread(target=work, args=(%d,))
thread.start()
asked.wait()
faulthandler.dump_traceback(all_threads=True)
ask.set()
print(thread.ident, threading.get_ident())
"""


@pytest.mark.parametrize("deep", [0, 150])
@pytest.mark.parametrize("how", ["script.py", "-mscript"])
def test_a_stack_is_whole_with_its_outermost_frame_and_not_a_line_before(tmp_path: Path, how: str, deep: int) -> None:
    (tmp_path / "script.py").write_text(DUMP % deep, encoding="utf-8")
    done = subprocess.run([sys.executable, how], cwd=tmp_path, capture_output=True, text=True, check=True)
    for thread in map(int, done.stdout.split()):
        begins = done.stderr.index(f"0x{thread:016x} (most")
        lines = re.match(r".*\n(?:  .*\n)+", done.stderr[begins:])
        assert lines is not None
        ends = begins + lines.end()
        before = done.stderr.rindex("\n", begins, ends - 1) + 1
        assert not any(is_whole(done.stderr[:n], thread) for n in range(before, ends))
        assert is_whole(done.stderr[:ends], thread)
        assert is_whole(done.stderr, thread)


def test_a_rank_that_writes_slowly_is_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.job_watch, "WRITING_S", 0.05)
    stack = f"""Thread 0x{7:016x} (most recent call first):
  File "/a/trainer/pack.py", line 5 in pack
  File "/a/trainer/train.py", line 9 in train_step
  File "/a/trainer/worker.py", line 2 in <module>
"""
    beat = {"pid": os.getpid(), "pid_start": 0, "host": "far", "thread": 7, "beats": 3, "signs": 0, "phase": "data"}
    beat |= {"step": 1, "micro": 0, "may_last": False, "cpu_s": 0.0, "time": time.time()}
    heartbeat_file(tmp_path, 0).write_text(json.dumps(beat))
    watch = JobWatch(JobSpec("train", "w", (), 1, (), {}, str(tmp_path), "/", "run"), 0.2, 60, True)
    assert watch.look(JobState.RUNNING) is None

    def write() -> None:
        for line in stack.splitlines(keepends=True):
            with open(stacks_file(tmp_path, 0), "a") as f:
                f.write(line)
            time.sleep(0.4)

    writer = threading.Timer(0.5, write)
    writer.start()
    time.sleep(0.4)
    watch.next_look = 0.0
    failure = watch.look(JobState.RUNNING)
    writer.join()
    assert failure is not None
    assert Path(failure.log_file).read_text().endswith("worker.py:2 in <module>\n")
