"""What `launch doctor` says about good and bad environments."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from launcher import doctor
from launcher.doctor import Check

ROOT = Path(__file__).resolve().parents[3]


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def states(checks: list[Check]) -> list[bool | None]:
    return [c.ok for c in checks]


def test_this_environment_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing: real packages, real NVML, a real process that imports torch."""
    monkeypatch.setenv("TUNELAUNCH_CACHE", str(tmp_path / "cache"))
    checks = doctor.run_doctor({**os.environ, "CUDA_VISABLE_DEVICES": "0"}, tmp_path)
    text = doctor.render(checks)
    assert doctor.exit_code(checks) == 0, text
    by_name = {c.name: c for c in checks}
    assert by_name["torch"].ok is True
    assert "did you mean CUDA_VISIBLE_DEVICES" in by_name["environment"].detail
    assert "no problem found" in text


def test_render_shows_fixes_only_where_there_is_trouble() -> None:
    checks = [
        Check("good", True, "fine", "never shown"),
        Check("odd", None, "two\nlines", "maybe this"),
        Check("bad", False, "broken", "do this\nthen that"),
    ]
    text = doctor.render(checks)
    assert text.splitlines() == [
        "ok    good  fine",
        "note  odd   two",
        "            lines",
        "            -> maybe this",
        "FAIL  bad   broken",
        "            -> do this",
        "            -> then that",
        "1 problem(s): bad",
    ]
    assert doctor.exit_code(checks) == 2
    assert doctor.exit_code(checks[:2]) == 0


def test_python_that_is_too_old() -> None:
    assert doctor.check_python((3, 10, 12)).ok is False
    assert doctor.check_python((3, 11, 0)).ok is True


def test_packages_missing_and_of_another_version(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        "# tested\ntorch==2.13.0\nNvidia_ML.py==13.1\nray[default,train]==2.60.0 ; python_version > '3'\npeft>=0.1\n",
        encoding="utf-8",
    )
    pins = doctor.read_constraints(constraints)
    assert pins == {"torch": "2.13.0", "nvidia-ml-py": "13.1", "ray": "2.60.0"}
    found = {"torch": "2.13.0+cpu", "nvidia-ml-py": "12.0", "peft": "0.21", "ray": None, "deepspeed": None}
    all_, nvml, ray, deepspeed = doctor.check_packages(found, pins)
    assert "torch 2.13.0+cpu" in all_.detail
    assert (nvml.name, nvml.ok, nvml.detail) == ("nvidia-ml-py", None, "12.0 is installed, 13.1 is the tested version")
    assert (ray.ok, ray.fix.endswith("pip install ray==2.60.0")) == (None, True)
    assert (deepspeed.ok, deepspeed.detail) == (False, "is not installed")
    assert doctor.read_constraints(tmp_path / "gone") == {}


def test_versions_are_read_without_importing() -> None:
    assert doctor.installed_versions(["pytest", "no-such-distribution"]) == {
        "pytest": pytest.__version__,
        "no-such-distribution": None,
    }


def test_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    broken = executable(tmp_path / "python", 'echo "Traceback" >&2; echo "ImportError: libcudart.so.13" >&2; exit 1')
    info = doctor.probe_torch(str(broken))
    assert info == {"error": "import torch failed: ImportError: libcudart.so.13"}
    assert doctor.check_torch(info, 0).ok is False
    assert "cannot be started" in doctor.probe_torch(str(tmp_path / "gone"))["error"]


def test_torch_that_hangs_is_given_up(tmp_path: Path) -> None:
    slow = executable(tmp_path / "python", "exec sleep 30")
    start = time.monotonic()
    assert "did not end within 0.2 s" in doctor.probe_torch(str(slow), timeout_s=0.2)["error"]
    assert time.monotonic() - start < 10


def test_torch_that_does_not_see_the_cards() -> None:
    cpu_build = {"version": "2.13.0+cpu", "cuda": None, "devices": [], "cpu_bf16": True}
    blind = {"version": "2.13.0", "cuda": "13.0", "devices": [], "cpu_bf16": False}
    seeing = {"version": "2.13.0", "cuda": "13.0", "devices": ["H100"], "cpu_bf16": False}
    assert doctor.check_torch(cpu_build, 0).ok is True
    assert doctor.check_torch(cpu_build, 1).ok is False
    assert "driver" in doctor.check_torch(blind, 1).fix
    assert doctor.check_torch(seeing, 1).ok is True


def test_a_cpu_without_bf16_instructions_is_told_where_it_trains() -> None:
    words = "multiplied in fp32"
    for devices, bf16, told in (([], True, False), ([], False, True), (["H100"], False, False)):
        info = {"version": "2.13.0", "cuda": "13.0", "devices": devices, "cpu_bf16": bf16}
        check = doctor.check_torch(info, len(devices))
        assert check.ok is True
        assert (words in check.detail) == told


def test_no_gpu_is_a_note() -> None:
    assert doctor.check_devices("", "no NVIDIA driver found").ok is None
    assert doctor.check_devices("index name", "").ok is True
    partly = doctor.check_devices("index name", "GPU 1 cannot be used")
    assert (partly.ok, partly.detail) == (None, "GPU 1 cannot be used\nindex name")


def test_names_that_are_ours(tmp_path: Path) -> None:
    (check,) = doctor.check_names(ROOT, tmp_path, {"trainer": ["tunelaunch"], "cluster": ["Tunelaunch"]})
    assert check.ok is True


def test_another_distribution_with_a_package_of_our_name(tmp_path: Path) -> None:
    (check,) = doctor.check_names(ROOT, tmp_path, {"trainer": ["coqui-tts-trainer", "tunelaunch"]})
    assert check.ok is False
    assert "coqui-tts-trainer installs a package trainer too" in check.detail
    assert "environment of its own" in check.fix


def test_packages_imported_from_elsewhere(tmp_path: Path) -> None:
    checks = doctor.check_names(tmp_path, tmp_path, {})
    assert states(checks) == [False, False, False]
    assert str(ROOT) in checks[0].detail


def test_a_users_own_trainer_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("", encoding="utf-8")
    (tmp_path / "cluster").mkdir()
    checks = doctor.check_names(ROOT, tmp_path, {})
    assert states(checks) == [None, None]
    assert "trainer.py is not ours; runs ignore it" in checks[0].detail
    assert states(doctor.check_names(ROOT, ROOT, {})) == [True]


def test_launch_that_belongs_to_another_python(tmp_path: Path) -> None:
    assert doctor.check_command(None, tmp_path).ok is None
    foreign = doctor.check_command("/opt/other/bin/launch", tmp_path)
    assert foreign.ok is None
    assert "Use `tunelaunch`" in foreign.fix
    assert doctor.check_command(str(tmp_path / "launch"), tmp_path).ok is True


def test_disk_names_each_folder_and_low_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELAUNCH_CACHE", str(tmp_path / "缓存" / "deep"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    runs, cache, hub = doctor.check_disk(tmp_path, 1)[:3]
    assert str(tmp_path / "runs") in runs.detail
    assert "缓存" in cache.detail
    assert str(tmp_path / "hub") in hub.detail
    assert not (tmp_path / "hub").exists()
    monkeypatch.setattr(doctor, "LOW_DISK_GB", 1e9)
    assert states(doctor.check_disk(tmp_path, 1)[:3]) == [None, None, None]


def test_hub_says_whether_there_is_a_token_but_not_which() -> None:
    secret = "hf_abcdefghijk"
    check = doctor.check_hub({"HF_TOKEN": secret, "HF_ENDPOINT": "https://hf-mirror.com"}, False)
    assert check.ok is True
    assert check.detail == "https://hf-mirror.com; token: set in HF_TOKEN"
    assert doctor.check_hub({}, True).detail.endswith("saved by `hf auth login`")
    assert doctor.check_hub({"HF_HUB_OFFLINE": "1"}, False).ok is None


def test_compiler_is_only_for_torch_compile(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    assert "only train.compile needs one" in doctor.check_compiler(env).detail
    executable(tmp_path / "g++", "true")
    assert doctor.check_compiler(env).ok is True


@pytest.mark.parametrize(
    ("preferred", "stdout", "ok"),
    [("UTF-8", "utf-8", True), ("utf8", "UTF_8", True), ("GBK", "gbk", None), ("ANSI_X3.4-1968", "utf-8", None)],
)
def test_locale(preferred: str, stdout: str, ok: bool | None) -> None:
    assert doctor.check_locale(preferred, stdout).ok is ok
