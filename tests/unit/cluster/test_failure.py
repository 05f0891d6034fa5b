"""The first cause among many errors, and what to do about it."""

import pytest

from cluster.explain import explain
from cluster.failure import first_cause, is_secondary, worker_exit_codes

AGENT_REPORT = """\
W1122 06:22:43.212000 7557 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 7561 closing signal SIGTERM
E1122 06:22:43.213000 7557 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 7562)
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
======================================================
trainer.worker FAILED
------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-22_06:22:43
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 7561)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 7561
[2]:
  time      : 2026-11-22_06:22:43
  host      : localhost
  rank      : 2 (local_rank: 2)
  exitcode  : 70 (pid: 7563)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_06:22:43
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 7562)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 7562
======================================================
"""
GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:30151"


def told(rank, message, time_ns, kind="bug", exit_code=70, hint="", traceback=""):
    return {
        "rank": rank,
        "kind": kind,
        "message": message,
        "hint": hint,
        "traceback": traceback,
        "exit_code": exit_code,
        "log_file": f"/logs/rank_{rank}.log",
        "time_ns": time_ns,
    }


def cause(failures=(), exit_codes=None, agent_log="", tails=None):
    return first_cause(failures, exit_codes or {}, agent_log, tails or {}, "/logs")


def test_the_agents_report_gives_the_codes_of_workers_that_ended_by_themselves_first_one_first():
    assert list(worker_exit_codes(AGENT_REPORT).items()) == [(1, -9), (2, 70)]
    assert worker_exit_codes("no report") == {}


def test_the_earliest_failure_is_the_cause():
    first = cause([told(0, "ValueError: b", 20), told(3, "ValueError: a", 10)])
    assert (first.rank, first.message, first.kind, first.exit_code) == (3, "ValueError: a", "bug", 70)
    assert first.log_file == "/logs/rank_3.log"


@pytest.mark.parametrize(
    "noise",
    [
        GLOO,
        "RuntimeError: Connection reset by peer",
        "BrokenPipeError: [Errno 32] Broken pipe",
        "torch.distributed.DistBackendError: NCCL error ... ncclRemoteError: A call failed possibly due to a network error",
        "RuntimeError: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)",
        "torch.distributed.DistStoreError: wait timeout after 1800000ms",
        "RendezvousConnectionError: The connection to the C10d store has failed",
        "RuntimeError: Timed out waiting 1800000ms for recv operation to complete",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError",
    ],
)
def test_noise_of_bereft_ranks_is_not_the_cause_even_when_it_comes_first(noise):
    assert is_secondary(noise)
    assert cause([told(0, noise, 10), told(1, "KeyError: 'labels'", 20)]).rank == 1


def test_a_mistake_of_the_user_is_a_cause_whatever_its_words():
    assert (
        cause(
            [told(0, "the hub answered: Connection reset by peer", 10, kind="user", exit_code=2), told(1, "X", 20)]
        ).rank
        == 0
    )


def test_a_killed_rank_goes_before_those_that_lost_their_connection():
    first = cause([told(0, GLOO, 10)], {1: -9, 0: 70}, AGENT_REPORT, {1: "step 3"})
    assert (first.rank, first.kind, first.exit_code) == (1, "killed", 75)
    assert first.message.startswith(
        "rank 1 was killed by SIGKILL (signal 9); the kernel does this when memory runs out"
    )
    assert "dmesg" in first.hint
    assert first.traceback == "step 3"
    assert first.log_file == "/logs/rank_1.log"


@pytest.mark.parametrize(
    ("signum", "exit_code", "words"),
    [
        (9, 75, "SIGKILL"),
        (7, 2, "/dev/shm"),
        (11, 70, "SIGSEGV"),
        (6, 70, "SIGABRT"),
        (4, 2, "CPU lacks an instruction"),
        (15, 75, "scheduler"),
        (1, 75, "terminal"),
        (24, 70, "SIGXCPU"),
        (63, 70, "signal 63"),
    ],
)
def test_each_signal_has_a_meaning(signum, exit_code, words):
    first = cause(exit_codes={0: -signum})
    assert (first.kind, first.exit_code) == ("preempted" if signum == 15 else "killed", exit_code)
    assert words in first.message
    assert first.hint


def test_among_killed_ranks_the_one_that_nobody_asked_to_end_is_the_cause():
    assert cause(exit_codes={0: -6, 1: -15, 2: -9}).rank == 2


def test_an_abort_is_explained_by_the_end_of_its_log():
    first = cause(
        exit_codes={0: -6}, tails={0: "terminate called\nncclUnhandledCudaError: Call to CUDA function failed"}
    )
    assert "NCCL_DEBUG=INFO" in first.hint


def test_only_noise_is_reported_with_a_hint_to_look_further():
    first = cause([told(1, "RuntimeError: Connection closed by peer", 20), told(0, GLOO, 10)])
    assert first.rank == 0
    assert "Another rank went first" in first.hint
    # Whoever went first may not do so again.
    assert (first.kind, first.exit_code) == ("retry", 75)


def test_an_agent_that_was_asked_to_end_is_the_cause_of_what_its_workers_ended_with():
    log = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 4711 got signal: 15"
    first = cause(exit_codes={0: -9, -1: 1}, agent_log=log)
    assert (first.rank, first.kind, first.exit_code) == (-1, "preempted", 75)


def test_a_worker_that_dies_before_it_can_write_is_read_from_the_agents_log():
    log = (
        f"Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'trainer'\n{AGENT_REPORT}"
    )
    first = cause(exit_codes={0: 1, 1: 1}, agent_log=log)
    assert (first.rank, first.kind, first.exit_code) == (0, "user", 2)
    assert first.message == "ModuleNotFoundError: No module named 'trainer'"
    assert "pip install -e ." in first.hint
    assert first.log_file == "/logs/agent.log"


def test_the_failing_ranks_own_log_is_read_before_others():
    first = cause(
        exit_codes={1: 1}, tails={0: "OSError: other", 1: "UserWarning: hm\nZeroDivisionError: division by zero\n"}
    )
    assert first.message == "ZeroDivisionError: division by zero"
    assert first.log_file == "/logs/rank_1.log"


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"), [(3, "bug", 70), (2, "user", 2), (75, "retry", 75), (1, "bug", 70)]
)
def test_a_silent_end_names_the_exit_code(code, kind, exit_code):
    first = cause(exit_codes={0: code})
    assert first.message == f"rank 0 ended with exit code {code} and left no message"
    assert (first.kind, first.exit_code) == (kind, exit_code)


def test_a_silent_agent_is_named():
    first = cause(exit_codes={-1: 1})
    assert first.rank == -1
    assert "the agent" in first.message
    assert "the agent that watches over the workers was killed by SIGKILL" in cause(exit_codes={-1: -9}).message


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "user", "train.micro_batch"),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
            "user",
            "host's memory",
        ),
        (
            "_pickle.UnpicklingError: Weights only load failed. Unsupported global: GLOBAL mmengine HistoryBuffer",
            "user",
            "run code",
        ),
        ("ModuleNotFoundError: No module named 'triton.ops'", "user", "bitsandbytes"),
        ("Watchdog caught collective operation timeout", "retry", "run.timeout_s"),
        ("ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda", "user", "flash-attn"),
        ("OSError: [Errno 28] No space left on device", "user", "df -h"),
        (
            "Error: mkl-service + Intel(R) MKL: MKL_THREADING_LAYER=INTEL is incompatible with libgomp",
            "user",
            "MKL_THREADING_LAYER=GNU",
        ),
        ("ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 65000", "user", "MIG"),
        ("/v/bin/python: No module named trainer.worker", "user", "pip install -e ."),
        ("ModuleNotFoundError: No module named 'launcher'", "user", "pip install -e ."),
        ("ModuleNotFoundError: No module named 'trainers'", "user", "A package is missing"),
        ("CUDA error: device-side assert triggered", "bug", "vocabulary"),
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "user", "generation"),
    ],
)
def test_known_errors_are_explained(text, kind, words):
    known = explain(text)
    assert known is not None
    assert known.kind == kind
    assert words in known.hint


def test_unknown_errors_are_not_explained():
    assert explain("ValueError: 小薇") is None


def test_a_known_exception_becomes_the_users_to_fix():
    first = cause([told(1, "OutOfMemoryError: CUDA out of memory.", 1)])
    assert (first.kind, first.exit_code) == ("user", 2)
    assert "train.micro_batch" in first.hint


def test_the_workers_own_hint_stays():
    first = cause([told(1, "no space", 1, kind="user", exit_code=2, hint="Delete old runs.")])
    assert first.hint == "Delete old runs."
