"""What a real Ray Train run left behind, put together by `launch consolidate`. `make test-cluster`: Ray takes a minute to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from support.commands import LAUNCH, ROOT


def test_the_checkpoint_of_a_ray_run_is_consolidated(tmp_path: Path) -> None:
    script = ROOT / "tests" / "support" / "ray_train_process.py"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu"}
    storage = tmp_path / "ray"
    argv = [sys.executable, str(script), str(storage), "lora", "2"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = storage / "run"
    (stored,) = run.glob("checkpoint_*/checkpoint")
    expected = {
        name.replace(".default", ""): tensor.bfloat16()
        for name, tensor in get_fp32_state_dict_from_zero_checkpoint(str(stored)).items()
        if ".lora_" in name
    }
    for number, source in enumerate((run, stored.parent, stored)):
        out = tmp_path / f"adapter_{number}"
        command = [str(LAUNCH), "consolidate", str(source), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found = load_file(out / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
