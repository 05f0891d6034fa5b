"""`launch recipes ...` as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli_recipes import app, complete_name
from launcher.errors import LaunchError, RecipeError
from launcher.known_models import known_models
from launcher.model_families import FAMILIES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def run(*args: str) -> str:
    """What is printed. A LaunchError comes through: `launch` itself prints it."""
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_list() -> None:
    lines = run("list").splitlines()
    assert len(lines) == 19
    assert (
        lines[-1] == f"and {len(known_models())} known models of {len(FAMILIES)} families: launch recipes list PATTERN"
    )
    assert any(line.startswith("qwen_qlora ") for line in lines)
    assert run("list", "internlm2").splitlines()[0].startswith("internlm2_chat_1_8b_qlora ")
    with pytest.raises(LaunchError, match="no shipped recipe and no known model fits 'qwne_lora'") as caught:
        run("list", "qwne_lora")
    assert "Nearest recipes: qwen_lora, qwen_qlora, " in caught.value.hint


def test_list_of_a_model_without_a_shipped_recipe() -> None:
    lines = run("list", "Gemma 3").splitlines()
    assert lines[1] == "model google/gemma-3-1b-{pt,it}: 1 B parameters, Gemma 3, text"
    assert lines[-1] == (
        "start with one: launch recipes new --model google/gemma-3-270m-it --method qlora --data my.jsonl"
    )


def test_list_says_what_is_not_trained_and_what_to_take() -> None:
    text = run("list", "baichuan2-7b")
    assert "model baichuan-inc/Baichuan2-7B-{Base,Chat}: 7.51 B parameters, Baichuan2; not trained, see below" in text
    assert "not trained: transformers has no Baichuan" in text
    assert "Qwen/Qwen2.5-7B-Instruct" in text
    assert "start with one" not in text


def test_new_then_check_then_show(folder: Path) -> None:
    (folder / "my.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    out = run("new", "--model", "Qwen/Qwen3-8B", "--data", "my.jsonl", "--gpu-memory", "24")
    assert "wrote qwen3_8b_qlora.yaml (21 lines)" in out
    assert "launch plan qwen3_8b_qlora.yaml" in out
    assert run("check", "qwen3_8b_qlora.yaml").startswith(
        "ok: qwen3_8b_qlora.yaml: qlora on Qwen/Qwen3-8B, data my.jsonl"
    )
    assert any("qwen3_8b_qlora.yaml:4" in line for line in run("show", "qwen3_8b_qlora.yaml", "--origin").splitlines())


def test_check_refuses_what_a_plan_would(folder: Path) -> None:
    (folder / "d.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    (folder / "r.yaml").write_text("model: google/gemma-2-9b-it\nmethod: lora\ndata: d.jsonl\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml:1: model\.source: gemma2 cannot be trained") as caught:
        run("check", "r.yaml")
    assert "google/gemma-3-4b-it" in str(caught.value)


def test_check_takes_less_than_a_second_and_no_torch(folder: Path) -> None:
    run("copy", "qwen_qlora", ".")
    code = (
        "import sys, time; start = time.process_time()\n"
        "from launcher.cli import main; sys.argv = ['launch', 'recipes', 'check', 'qwen_qlora.yaml']\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert time.process_time() - start < 1.0, time.process_time() - start\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok: qwen_qlora.yaml")


def test_show_prints_the_file_with_its_comments() -> None:
    assert "# Hardware: " in run("show", "qwen_qlora")


def test_show_with_changes_prints_the_merged_values() -> None:
    assert "learning_rate: 0.001" in run("show", "qwen_qlora", "--set", "train.learning_rate=1e-3")


def test_show_origin() -> None:
    lines = [line.split() for line in run("show", "qwen_qlora", "--origin", "--set", "train.max_steps=7").splitlines()]
    assert ["train.max_steps", "7", "--set"] in lines
    assert ["train.weight_decay", "0.0", "default"] in lines
    source = next(line for line in lines if line[0] == "model.source")
    assert source[2].endswith("recipes/qwen_qlora.yaml:6")
    assert lines[-1][0] == "note:"
    assert not any(line[0] == "train.epochs" for line in lines)


def test_copy_then_check(folder: Path) -> None:
    out = run("copy", "tiny_cpu", ".")
    assert "wrote tiny_cpu.yaml" in out
    assert "run it: launch tiny_cpu.yaml" in out
    assert run("check", "tiny_cpu.yaml").startswith(f"ok: tiny_cpu.yaml: lora on random:{folder}/tiny")


def test_check_reports_every_mistake(folder: Path) -> None:
    (folder / "r.yaml").write_text("model: a/b\nlr: 1\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        run("check", "r.yaml")
    assert len(caught.value.problems) == 3


def test_schema_is_json() -> None:
    assert json.loads(run("schema"))["title"] == "Recipe"


def test_completion_offers_shipped_names() -> None:
    assert complete_name("qwen_q") == ["qwen_qlora"]


def test_importing_the_commands_costs_no_pydantic() -> None:
    code = "import sys, launcher.cli_recipes; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


def test_check_refuses_what_no_device_could_train(folder: Path) -> None:
    lines = "model: {source: a/b, dtype: fp16}\nmethod: lora\ndata: d.jsonl\ntrain: {compile: true}\n"
    (folder / "d.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    (folder / "r.yaml").write_text(f"{lines}parallel:\n  zero: 0\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        run("check", "r.yaml")
    text = str(caught.value)
    assert text.startswith("r.yaml:6: parallel.zero: stage 0 does not scale the loss for fp16")
    assert "\n    Nearest that works:\n        parallel:\n          zero: 1\n    Source: deepspeed==" in text
    (folder / "r.yaml").write_text(f"{lines}parallel:\n  zero: 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml:4: train\.compile: ZeRO-3 gathers weights"):
        run("check", "r.yaml")
    (folder / "r.yaml").write_text(lines, encoding="utf-8")
    assert run("check", "r.yaml").splitlines()[-1].startswith("ok: ")
