"""What a hang is, who is behind in it, and that the launcher reads what a rank writes."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import ROOT

from launcher.hang import Beat, HangWatch, read_beats, understand

BEAT = Beat(1, 2, "host", 0x10, 7, 0, "backward", 24, 1, False, 10.0, 100.0)


def watch(idle: bool = True, ranks: int = 2) -> HangWatch:
    """hang_s 10, patience 60, from second 0 on."""
    return HangWatch(ranks, 10, 60, idle, 0.0)


def observed(found: HangWatch, at: float, *beats: Beat | None) -> HangWatch:
    found.observe({rank: beat for rank, beat in enumerate(beats) if beat is not None}, at)
    return found


@pytest.mark.parametrize(
    ("beat", "now", "hung"),
    [
        (BEAT, 10, False),
        (BEAT, 10.1, True),
        (replace(BEAT, may_last=True, phase="save"), 59, False),
        (replace(BEAT, may_last=True, phase="save"), 60.1, True),
    ],
)
def test_how_long_is_long_depends_on_what_a_rank_does(beat: Beat, now: float, hung: bool) -> None:
    assert observed(watch(), 0, beat, beat).is_hung(now) == hung


def test_one_rank_that_goes_on_is_enough() -> None:
    found = observed(watch(), 0, BEAT, BEAT)
    observed(found, 9, replace(BEAT, beats=8))
    assert not found.is_hung(19)
    assert found.is_hung(19.1)
    observed(found, 19.2, replace(BEAT, beats=8, signs=1))
    assert not found.is_hung(29)


def test_a_rank_that_waits_for_a_slow_save_is_not_hung() -> None:
    assert not observed(watch(), 0, BEAT, replace(BEAT, may_last=True)).is_hung(50)


def test_ranks_that_have_not_begun_have_as_long_as_a_start_may_take() -> None:
    assert not observed(watch(), 0, BEAT).is_hung(59)
    assert observed(watch(), 0, BEAT).is_hung(61)


def test_off() -> None:
    assert not HangWatch(1, 0, 60, True, 0.0).is_hung(1e9)


@pytest.mark.parametrize(
    ("idle", "may_last", "cpu_s", "now", "hung"),
    [
        (True, False, 0.5, 12, False),  # 0.5 s in 8 s: computes
        (True, False, 0.3, 12, True),  # what idle threads use
        (False, False, 8.0, 12, True),  # NCCL spins while it waits
        (False, True, 8.0, 61, False),  # loads a model
        (False, True, 0.0, 61, True),
    ],
)
def test_computing_is_life_where_waiting_is_idle(
    idle: bool, may_last: bool, cpu_s: float, now: float, hung: bool
) -> None:
    beat = replace(BEAT, may_last=may_last)
    found = observed(watch(idle, 1), 0, beat)
    observed(found, 8, replace(beat, cpu_s=beat.cpu_s + cpu_s, time=beat.time + 8))
    assert found.is_hung(now) == hung


def test_silence_while_nothing_could_be_known_does_not_count() -> None:
    found = observed(watch(), 0, BEAT, BEAT)
    found.forgive(100)
    assert not found.is_hung(109)
    assert found.is_hung(111)


STACK = """Current thread 0x0000000000000099 (most recent call first):
  File "/x/trainer/heartbeat.py", line 80 in _write_for_ever

Thread 0x0000000000000010 (most recent call first):
{frames}"""
IN_ALL_REDUCE = STACK.format(
    frames="""  File "/v/torch/distributed/distributed_c10d.py", line 2862 in all_reduce
  File "/v/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/v/deepspeed/comm/torch.py", line 150 in all_reduce
  File "/x/trainer/train.py", line 177 in _totals
"""
)
IN_DATA = STACK.format(
    frames='  File "/x/trainer/data.py", line 88 in batch\n  File "/x/trainer/train.py", line 9 in f\n'
)


def test_who_has_come_least_far_is_behind() -> None:
    hang = understand({0: BEAT, 1: replace(BEAT, beats=5, phase="data")}, 2, (), {0: IN_ALL_REDUCE, 1: IN_DATA}, 12)
    assert hang.behind == (1,)
    assert hang.message == (
        "hang: no rank has gone on for 12 s; rank 1 is behind: "
        "rank 1: step 24, micro batch 2, data, at trainer/data.py:88 in batch"
    )
    assert "waits for the others in all_reduce, called at trainer/train.py:177 in _totals" in hang.page


def test_among_equals_who_waits_for_nobody_is_behind() -> None:
    hang = understand({0: BEAT, 1: BEAT, 2: BEAT}, 3, (), {0: IN_ALL_REDUCE, 1: IN_DATA, 2: IN_DATA}, 12)
    assert hang.behind == (1, 2)
    assert "rank 1, 2 are behind" in hang.message


def test_a_frozen_process_is_behind_whatever_it_had_done() -> None:
    ahead = replace(BEAT, beats=9)
    found = observed(watch(), 0, BEAT, ahead)
    for second in range(1, 12):
        observed(found, second, replace(BEAT, time=BEAT.time + second))
    assert found.frozen(11.0) == (1,)
    hang = understand(found.beats, 2, found.frozen(11.0), {0: IN_ALL_REDUCE}, 11)
    assert hang.behind == (1,)
    assert "its process is frozen" in hang.message
    assert "rank 1: step 24, micro batch 2, backward, its process is frozen\n    no stack" in hang.page


def test_when_all_wait_nobody_is_named_and_all_are_shown() -> None:
    hang = understand({0: BEAT, 1: BEAT}, 2, (), {0: IN_ALL_REDUCE, 1: IN_ALL_REDUCE}, 12)
    assert hang.behind == ()
    assert hang.message.count("called at trainer/train.py:177") == 2


def test_a_rank_that_never_began_is_named() -> None:
    assert understand({0: BEAT}, 2, (), {}, 60).message.endswith("rank 1 is behind: rank 1: has not begun")


WRITER = """
import sys, threading, time
from pathlib import Path
from trainer.heartbeat import HEARTBEAT
HEARTBEAT.beat("load the model")
HEARTBEAT.start(Path(sys.argv[1]), 0)
print(threading.get_ident(), flush=True)
sys.stdin.readline()
HEARTBEAT.beat("data", 1, 0)
HEARTBEAT.step_done(1)
HEARTBEAT.beat("forward", 2, 3)
sys.stdin.readline()
"""


def test_the_launcher_reads_what_a_rank_writes(tmp_path: Path) -> None:
    def seen(beats: int) -> Beat:
        deadline = time.monotonic() + 10
        while (found := read_beats(tmp_path, 2)).get(0, BEAT).beats != beats:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert list(found) == [0]
        return found[0]

    rank = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdin is not None
    assert rank.stdout is not None
    thread = int(rank.stdout.readline())
    first = seen(1)
    assert (first.pid, first.thread, first.place, first.may_last) == (rank.pid, thread, "load the model", True)
    rank.stdin.write("\n")
    rank.stdin.flush()
    second = seen(4)
    assert (second.place, second.may_last) == ("step 2, micro batch 4, forward", False)
    assert second.pid_start == first.pid_start > 0
    (tmp_path / "stacks_request").write_text("now")
    stacks, deadline = tmp_path / "stacks_rank_0.txt", time.monotonic() + 10
    while "<string>" not in stacks.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert f"Thread 0x{thread:016x}" in stacks.read_text()
    rank.communicate("\n", timeout=20)
