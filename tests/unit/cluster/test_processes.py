"""Real processes: how they are recognised and how they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from cluster.job import ClusterError
from cluster.processes import (
    TAG_VARIABLE,
    ProcessIdentity,
    descendants,
    is_alive,
    kill_tree,
    signal_group,
    signal_process,
    start_process,
    tagged,
)

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
# A child in a session of its own, as torch.distributed.run makes them, and its pid on stdout.
PARENT = [
    sys.executable,
    "-S",
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
    "print(child.pid, flush=True); time.sleep(60)",
]


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path):
    """Starts a process through `start_process`, and sees to its end."""
    started = []

    def run(argv, name="log.txt", **options):
        env = {**os.environ, TAG_VARIABLE: f"{tmp_path}/tag"}
        process = start_process(argv, env, str(tmp_path), str(tmp_path / name), **options)
        identity = ProcessIdentity.of(process.pid)
        started.append((process, identity))
        return process, identity

    yield run
    for process, identity in started:
        assert kill_tree(identity, f"{tmp_path}/tag", 5) == ()
        process.wait()


def test_a_recycled_pid_is_another_process_and_is_never_signalled(start):
    process, identity = start(SLEEP)
    earlier = replace(identity, start_ticks=identity.start_ticks - 1)
    assert is_alive(identity)
    assert not is_alive(earlier)
    assert not signal_process(earlier, signal.SIGKILL)
    assert not signal_group(earlier, signal.SIGKILL)
    assert kill_tree(earlier, "no such tag", 1) == ()
    assert process.poll() is None


def test_a_zombie_is_dead(start):
    process, identity = start([sys.executable, "-S", "-c", ""])
    until(lambda: not is_alive(identity))
    assert ProcessIdentity.of(process.pid) == identity  # still in the table, because nobody waited for it
    process.wait()
    assert ProcessIdentity.of(process.pid) is None


def test_a_process_leads_a_session_of_its_own_and_writes_to_its_log(start, tmp_path):
    process, identity = start(
        [sys.executable, "-c", "import os, sys; print('小薇', os.getsid(0) == os.getpid(), sys.stdin.read() == '')"]
    )
    assert process.wait() == 0
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "小薇 True True\n"
    assert not signal_group(identity, signal.SIGTERM)


def test_a_group_is_signalled_only_through_its_leader(start, tmp_path):
    process, identity = start([word.replace("start_new_session=True", "") for word in PARENT])
    until(lambda: (tmp_path / "log.txt").read_text())
    member = ProcessIdentity.of(int((tmp_path / "log.txt").read_text()))
    assert not signal_group(member, signal.SIGTERM)
    assert is_alive(member)
    assert signal_group(identity, signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    until(lambda: not is_alive(member))


def test_kill_tree_reaches_children_in_other_sessions_and_orphans(start, tmp_path):
    process, identity = start(PARENT)
    until(lambda: (tmp_path / "log.txt").read_text())
    child = ProcessIdentity.of(int((tmp_path / "log.txt").read_text()))
    assert descendants(process.pid) == (child,)
    assert set(tagged(f"{tmp_path}/tag")) == {identity, child}
    signal_process(identity, signal.SIGKILL)
    process.wait()
    assert tagged(f"{tmp_path}/tag") == (child,)  # an orphan is still recognised
    assert kill_tree(identity, f"{tmp_path}/tag", 5) == ()
    assert not is_alive(child)


def test_a_process_without_our_tag_is_not_ours(tmp_path):
    with subprocess.Popen(SLEEP, env={**os.environ, TAG_VARIABLE: f"{tmp_path}/tag-2"}) as other:
        assert tagged(f"{tmp_path}/tag") == ()
        other.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel call exists on Linux only")
@pytest.mark.parametrize("outlives_us", [False, True])
def test_a_process_ends_with_the_thread_that_started_it_unless_told_otherwise(start, outlives_us):
    started = []
    thread = threading.Thread(target=lambda: started.append(start(SLEEP, outlives_us=outlives_us)))
    thread.start()
    thread.join()
    process, _ = started[0]
    if outlives_us:
        time.sleep(0.3)
        assert process.poll() is None
    else:
        assert process.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("argv", "cwd", "log", "message"),
    [
        (SLEEP, "missing", "log.txt", "the working folder"),
        (SLEEP, ".", "file/log.txt", "cannot write the log"),
        (["/no/such/python"], ".", "log.txt", "cannot start /no/such/python"),
    ],
)
def test_what_cannot_be_started_is_explained(tmp_path, argv, cwd, log, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=message) as e:
        start_process(argv, {}, str(tmp_path / cwd), str(tmp_path / log))
    assert e.value.hint
