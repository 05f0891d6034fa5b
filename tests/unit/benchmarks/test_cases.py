"""Every case is one command that its contender understands."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.cases import BUDGET_MINUTES, CONTENDERS, PRODUCT, ROWS, Case, cases_of
from benchmarks.contenders import Workshop, command_of
from benchmarks.inputs import DataRow, write_inputs, write_qwen2_shape
from benchmarks.run import Bench, arguments
from launcher.recipe import load_recipe

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    inputs = write_inputs([DataRow("q", "a")] * 3, tmp_path / "inputs", 42)
    folders = {name: tmp_path / name for name in ("cache", "venvs", "model")}
    qwen2 = write_qwen2_shape(tmp_path / "qwen2", REPO / "recipes/tiny")
    return Workshop(
        folders["cache"], folders["venvs"], folders["model"], qwen2, inputs, 2, "bf16", ("data.max_rows=2",)
    )


def every_case() -> list[Case]:
    return cases_of(list(ROWS), list(CONTENDERS), None, 2)


def test_names_are_unique_and_fit_a_file_name() -> None:
    cases = every_case()
    names = [case.name for case in (*cases, *(c.warm_up() for c in cases))]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") for name in names)
    assert set(BUDGET_MINUTES) == set(ROWS)


def test_rows_contenders_and_steps_are_chosen() -> None:
    chosen = cases_of(["padded", "sp"], ["trl", PRODUCT], 5, 2)
    assert {(c.row, c.contender) for c in chosen} == {("padded", PRODUCT), ("padded", "trl"), ("sp", PRODUCT)}
    assert {c.steps for c in chosen} == {5}
    assert {c.processes for c in cases_of(["zero", "sp"], [PRODUCT], None, 1)} == {1}


def test_compared_contenders_are_given_the_same_work() -> None:
    for row in ("packed", "padded"):
        work = {(c.steps, c.micro_batch, c.accumulate, c.max_length, c.packing) for c in every_case() if c.row == row}
        assert len(work) == 1


def test_every_recipe_is_one_that_the_launcher_takes(tmp_path: Path, shop: Workshop) -> None:
    for case in (c for c in every_case() if c.contender == PRODUCT):
        folder = tmp_path / case.name
        folder.mkdir()
        command = command_of(case, folder, shop)
        recipe = load_recipe(Path(command.argv[1])).recipe
        assert recipe.train.max_steps == case.steps
        assert (recipe.parallel.zero, recipe.parallel.sp) == ("auto" if case.zero is None else case.zero, case.sp)
        assert command.argv[2:4] == ("--cpu", str(case.processes))
        assert command.argv[-2:] == ("--set", "data.max_rows=2")


def test_peers_run_in_their_own_environment_and_are_traced(
    tmp_path: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for case in (c for c in every_case() if c.contender != PRODUCT):
        folder = tmp_path / case.name
        folder.mkdir()
        command = command_of(case, folder, shop)
        binaries = shop.venvs / case.contender / "bin"
        assert Path(command.argv[0]).parent == binaries
        assert command.env["PATH"].startswith(str(binaries))
        assert (Path(command.env["PYTHONPATH"]) / "sitecustomize.py").is_file()
        assert command.env["BENCH_TRACE"] == str(command.trace)
        assert "PYTHONDONTWRITEBYTECODE" not in command.env
    config = yaml.safe_load((tmp_path / "packed-llamafactory/config.yaml").read_text(encoding="utf-8"))
    assert all(config[key] for key in ("neat_packing", "disable_gradient_checkpointing", "use_cpu"))
    assert not config["default_system"].endswith(".")


@pytest.mark.parametrize(("dtype", "trl_dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_every_contender_computes_in_the_same_dtype(tmp_path: Path, shop: Workshop, dtype: str, trl_dtype: str) -> None:
    shop = dataclasses.replace(shop, dtype=dtype)
    seen = set()
    for case in every_case():
        folder = tmp_path / case.name
        folder.mkdir()
        argv = command_of(case, folder, shop).argv
        seen.add(case.contender)
        if case.contender == PRODUCT:
            assert load_recipe(Path(argv[1])).recipe.model.dtype == dtype
        elif case.contender == "llamafactory":
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            assert config["bf16"] is (dtype == "bf16")
            assert not config.get("fp16")
        else:
            options = dict(zip(argv[2::2], argv[3::2], strict=True))
            assert (options["--dtype"], options["--bf16"]) == (trl_dtype, str(dtype == "bf16"))
            assert "--fp16" not in options
    assert seen == set(CONTENDERS)


def test_the_dtype_is_chosen_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert [arguments(argv).dtype for argv in ([], ["--dtype", "fp32"], ["--dtype", "bf16"])] == [
        "auto",
        "fp32",
        "bf16",
    ]
    with pytest.raises(SystemExit):
        arguments(["--dtype", "fp16"])
    assert "fp16" in capsys.readouterr().err


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments(["--rows", "packed,paded"])
    assert stopped.value.code == 2
    assert "paded" in capsys.readouterr().err
    assert arguments(["--rows", "sp,packed"]).rows == ["packed", "sp"]
    assert arguments(["--quick"]).steps == 3


def test_results_are_only_continued_with_the_same_settings(tmp_path: Path) -> None:
    bench = Bench(arguments(["--out", str(tmp_path), "--steps", "4"]))
    bench.document["results"]["x"] = {"case": {"row": "zero", "label": "x"}, "command": "", "measured": None}
    bench.document["results"]["x"] |= {"state": "refused", "reason": "why"}
    bench.save()
    again = Bench(arguments(["--out", str(tmp_path), "--steps", "4", "--rows", "sp"]))
    assert again.document == bench.document
    with pytest.raises(Exception, match="other settings"):
        Bench(arguments(["--out", str(tmp_path), "--steps", "5"]))
    with pytest.raises(Exception, match="other settings"):
        Bench(arguments(["--out", str(tmp_path), "--steps", "4", "--dtype", "fp32"]))


def test_make_knows_the_benchmark() -> None:
    done = subprocess.run(
        ["make", "-n", "bench", "BENCH=--quick"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert "-m benchmarks.run --quick" in done.stdout
