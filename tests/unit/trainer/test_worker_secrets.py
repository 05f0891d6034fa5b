"""Secrets on the worker: from its environment or a file, all missing ones at once, no value in any message."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.spec import SecretSpec, TrainError
from trainer.worker_secrets import provide


def test_values_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text("from-file\n", encoding="utf-8")
    env = {"HF_TOKEN": "from-env", "WANDB_API_KEY": "old"}
    provide([SecretSpec("HF_TOKEN", ""), SecretSpec("WANDB_API_KEY", "~/key")], env)
    assert env == {"HF_TOKEN": "from-env", "WANDB_API_KEY": "from-file"}


def test_all_that_are_missing_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"canary\0\xff")
    files = ["", str(tmp_path / "empty"), str(tmp_path / "gone"), str(tmp_path / "binary"), str(tmp_path)]
    with pytest.raises(TrainError) as caught:
        provide([SecretSpec(f"S{i}", file) for i, file in enumerate(files)], {"S0": ""})
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert all(f"S{i}" in text for i in range(5))
    assert "S0 is not set" in text
    assert "holds no value" in text
    assert "No such file" in text
    assert "not a text" in text
    assert "canary" not in text
