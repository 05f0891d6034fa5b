"""Commands with their memory and their limits, and the hook inside another program."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.contenders import HOOK_DIR
from benchmarks.processes import Ended, run_command

FAKE_TRAINER = """
class Trainer:
    processing_class = None
    def training_step(self, model, inputs, num_items_in_batch=None):
        return "loss"
"""
FAKE_CALLBACK = """
class CallbackHandler:
    def on_train_begin(self, args, state, control): return control
    def on_step_end(self, args, state, control): return control
    def on_log(self, args, state, control, logs): return control
"""
PROGRAM = """
import torch, types, inspect
from transformers.trainer import Trainer
from transformers.trainer_callback import CallbackHandler
class Own(Trainer):
    def training_step(self, *args, **kwargs): return super().training_step(*args, **kwargs)
assert list(inspect.signature(Trainer.training_step).parameters)[1] == "model"
trainer, handler, state = Own(), CallbackHandler(), types.SimpleNamespace(global_step=1)
handler.on_train_begin(None, state, 1)
trainer.processing_class = types.SimpleNamespace(pad_token_id=0)
batch = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "labels": torch.tensor([[-100, 6, 7, -100]])}
assert trainer.training_step(None, batch) == "loss"
batch["attention_mask"] = torch.tensor([[1, 1, 1, 1]])
trainer.training_step(None, inputs=batch)
handler.on_step_end(None, state, 1)
handler.on_log(None, state, 1, {"loss": 1.5})
handler.on_log(None, state, 1, {"epoch": 1.0})
"""


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_hook", HOOK_DIR / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counting_leaves_out_padding_of_either_kind(hook: ModuleType) -> None:
    none = -100
    # A mask that leaves out two slots; a pad token inside a document is a token like any other.
    assert hook.count_tokens([[0, 5, 0, 6, 0, 0]], [[1, 1, 1, 1, 0, 0]], [[none, none, 0, 6, none, none]], 0) == (
        4,
        2,
        6,
    )
    # A row filled up with unmasked pad tokens, as some packers do.
    assert hook.count_tokens([[5, 6, 7, 0, 0]], None, [[none, 6, 7, none, none]], 0) == (3, 2, 5)
    # Numbers of documents in place of ones; a learnt pad token at the end is the end of the answer.
    assert hook.count_tokens([[5, 0, 7, 0]], [[1, 1, 2, 2]], [[none, 0, none, 0]], 0) == (4, 2, 4)
    # Nothing comes before the first token of a row.
    assert hook.count_tokens([[5, 6], [7, 8]], None, [[5, 6], [7, 8]], None) == (4, 2, 4)


def test_the_hook_records_what_a_program_is_fed(tmp_path: Path) -> None:
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "trainer.py").write_text(
        "from . import trainer_callback" + textwrap.dedent(FAKE_TRAINER), encoding="utf-8"
    )
    (package / "trainer_callback.py").write_text(textwrap.dedent(FAKE_CALLBACK), encoding="utf-8")
    trace = tmp_path / "trace.jsonl"
    env = {**os.environ, "PYTHONPATH": f"{HOOK_DIR}{os.pathsep}{tmp_path}", "BENCH_TRACE": str(trace)}
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, timeout=60)
    lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert [line.pop("event") for line in lines] == ["train_begin", "step", "loss"]
    assert {k: v for k, v in lines[1].items() if k != "time"} == {"step": 1, "tokens": 6, "supervised": 4, "slots": 8}
    assert lines[2]["loss"] == 1.5


def python(code: str, folder: Path, limit_s: float, **options: object) -> Ended:
    return run_command([sys.executable, "-c", code], dict(os.environ), folder, folder / "log", limit_s, **options)  # type: ignore[arg-type]


def test_memory_of_child_processes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.processes.PSS_EVERY_S", 0.1)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; x = b\"1\" * 90_000_000; time.sleep(1.2)'])"
    ended = python(code + "; print('end'); sys.exit(3)", tmp_path, 30)
    assert (ended.exit_code, ended.timed_out) == (3, False)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "end\n"
    largest, tree = ended.peaks_until(time.time())
    assert 90 < largest <= ended.max_rss_mb + 1
    assert tree > 85
    assert ended.peaks_until(ended.started + 0.01)[0] < largest


def test_a_command_over_its_limit_is_stopped(tmp_path: Path) -> None:
    ended = python("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('asked')", tmp_path, 1.0)
    assert ended.timed_out
    assert ended.seconds < 10
    assert (tmp_path / "log").read_text(encoding="utf-8") == "asked\n"


def test_a_command_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.processes.STOP_S", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    ended = python(code, tmp_path, 0.8)
    assert (ended.exit_code, ended.timed_out) == (-9, True)


def test_a_command_that_has_shown_enough_is_stopped(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = f"import pathlib, time; pathlib.Path({str(seen)!r}).touch(); time.sleep(60)"
    ended = python(code, tmp_path, 30, finished=seen.exists)
    assert not ended.timed_out
    assert ended.seconds < 10
