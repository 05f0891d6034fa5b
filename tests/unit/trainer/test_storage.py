"""Copies of checkpoints in a bucket: whole, read back, pruned, and brought back; what the bucket does wrong is told."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from support.handmade_run import make_spec
from support.tiny_checkpoints import save_checkpoint

import trainer.storage_copy
from trainer.checkpoint_format import MANIFEST, verify
from trainer.engine import Ranks
from trainer.heartbeat import HEARTBEAT
from trainer.metrics import read_lines
from trainer.saver import Saved, prune
from trainer.spec import StorageSpec, TrainError, TrainSpec
from trainer.storage import Storage
from trainer.storage_copy import Copier


def checkpoint(root: Path, step: int, value: float = 1.0) -> Path:
    masters = {"a.weight": torch.full((40, 30), value), "b.weight": torch.full((7,), value)}
    return save_checkpoint(root / f"step_{step:06d}", masters, num_ranks=3, step=step)


def steps(storage: Storage) -> list[int]:
    return [step for step, _ in storage.steps()]


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The run's folder in the "bucket"."""
    return tmp_path / "bucket" / "team runs" / "run-1"


@pytest.fixture
def storage(there: Path) -> Storage:
    return Storage(f"file://{there}")


def test_copied_whole_and_brought_back_bit_by_bit(storage: Storage, there: Path, tmp_path: Path) -> None:
    own = checkpoint(tmp_path, 10)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: 小薇\n", encoding="utf-8")
    assert storage.put_checkpoint(own, 2, [recipe, tmp_path / "absent.json"])
    assert verify(there / "checkpoints" / "step_000010") == []
    ((step, path),) = storage.steps()
    assert step == 10
    back = storage.fetch_checkpoint(path, tmp_path / "elsewhere")
    assert {p.name: p.read_bytes() for p in back.iterdir()} == {p.name: p.read_bytes() for p in own.iterdir()}
    assert storage.fetch_files(["recipe.yaml", "plan.json"], tmp_path / "elsewhere") == ["plan.json"]
    assert (tmp_path / "elsewhere" / "recipe.yaml").read_bytes() == recipe.read_bytes()


def test_one_that_is_there_is_not_copied_again(storage: Storage, tmp_path: Path) -> None:
    own = checkpoint(tmp_path, 10)
    assert storage.put_checkpoint(own, 2)
    assert not storage.put_checkpoint(own, 2)
    shutil.rmtree(own)
    assert storage.put_checkpoint(checkpoint(tmp_path, 10, value=2.0), 2), "other bytes of the same step"


def test_the_newest_are_kept_and_what_was_cut_off_goes(storage: Storage, there: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        storage.put_checkpoint(checkpoint(tmp_path, step), 2)
    cut_off = there / "checkpoints" / "step_000025"
    shutil.copytree(there / "checkpoints" / "step_000020", cut_off)
    (cut_off / MANIFEST).unlink()
    assert steps(storage) == [20, 10]
    storage.put_checkpoint(checkpoint(tmp_path, 30), 2)
    assert steps(storage) == [30, 20]
    assert sorted(p.name for p in (there / "checkpoints").iterdir()) == ["step_000020", "step_000030"]


def test_a_later_step_costs_no_good_one(storage: Storage, tmp_path: Path) -> None:
    for step in (20, 30):
        storage.put_checkpoint(checkpoint(tmp_path, step), 2)
    storage.put_checkpoint(checkpoint(tmp_path, 25), 1)
    assert steps(storage) == [30, 25]


def test_other_bytes_read_back_are_no_checkpoint(
    storage: Storage, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = storage._fs.put_file

    def flip_a_bit(file: str, path: str, **kwargs: Any) -> None:
        put_file(file, path, **kwargs)
        if path.endswith("rank_00001.safetensors"):
            content = bytearray(Path(path).read_bytes())
            content[-1] ^= 1
            Path(path).write_bytes(content)

    monkeypatch.setattr(storage._fs, "put_file", flip_a_bit)
    with pytest.raises(TrainError, match=r"rank_00001.safetensors is read back as other bytes") as told:
        storage.put_checkpoint(checkpoint(tmp_path, 10), 2)
    assert told.value.exit_code == 75
    assert storage.steps() == []


def test_a_damaged_copy_is_not_brought_back(storage: Storage, there: Path, tmp_path: Path) -> None:
    storage.put_checkpoint(checkpoint(tmp_path, 10), 2)
    file = there / "checkpoints" / "step_000010" / "rank_00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    ((_, path),) = storage.steps()
    with pytest.raises(TrainError, match=r"step_000010 is damaged: .*sha256"):
        storage.fetch_checkpoint(path, tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_error_is_no_proof_that_there_is_nothing(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        storage.put_checkpoint(checkpoint(tmp_path, step), 2)

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("slow down")

    monkeypatch.setattr(storage._fs, "info", fail)
    with pytest.raises(TrainError, match="slow down"):
        storage.put_checkpoint(checkpoint(tmp_path, 30), 2)
    monkeypatch.undo()
    assert steps(storage) == [30, 20, 10]


@pytest.mark.parametrize(
    ("url", "message", "hint", "code"),
    [
        ("file:///proc/no/such", "cannot write to file:///proc/no/such", "storage.url names it", 2),
        ("gs://bucket/x", "the package for gs:// is missing", "pip install gcsfs", 2),
    ],
)
def test_what_is_wrong_is_told_at_once(url: str, message: str, hint: str, code: int) -> None:
    with pytest.raises(TrainError) as told:
        Storage(url).probe()
    assert message in told.value.message
    assert hint in told.value.hint
    assert told.value.exit_code == code


@pytest.fixture
def spec(tmp_path: Path, there: Path) -> TrainSpec:
    own = make_spec(tmp_path / "run-1")
    Path(own.paths.checkpoints_dir).mkdir(parents=True)
    return dataclasses.replace(own, storage=StorageSpec(f"file://{there}", ()))


RANK_0 = Ranks(0, 0, 1, 0, 0, torch.device("cpu"))


def saved(step: int) -> list[Saved]:
    return [Saved(f"step_{step:06d}", 1.0, 0.0)]


def events(spec: TrainSpec) -> list[str]:
    return [f"{row['event']} {row['checkpoint']}" for row in read_lines(spec.paths.events)]


class Gate:
    """Holds the copying of one checkpoint until it is opened."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        put = storage.put_checkpoint

        def held(*args: Any) -> bool:
            self.reached.set()
            assert self.opened.wait(20)
            return put(*args)

        monkeypatch.setattr(storage, "put_checkpoint", held)


def test_one_that_is_being_copied_stays_until_it_is_there(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    root, copier = Path(spec.paths.checkpoints_dir), Copier(spec, RANK_0)
    gate = Gate(copier._storage, monkeypatch)
    checkpoint(root, 10)
    copier.saved(saved(10))
    assert gate.reached.wait(20)
    for step in (20, 30, 40):
        checkpoint(root, step)
        prune(root, step, 2, copier.copying)
        copier.saved(saved(step))
    assert sorted(p.name for p in root.iterdir()) == ["step_000010", "step_000030", "step_000040"]
    gate.opened.set()
    copier.finish()
    assert steps(copier._storage) == [40, 10], "20 and 30 were left out: a newer one was there"
    assert sorted(p.name for p in root.iterdir()) == ["step_000030", "step_000040"], "checkpoint.keep holds again"
    assert events(spec) == ["checkpoint_copied step_000010", "checkpoint_copied step_000040"]


def test_what_may_pass_is_tried_again(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.storage_copy, "RETRY_WAITS_S", (0.01, 0.01))
    copier = Copier(spec, RANK_0)
    tries = failing_put(copier._storage, monkeypatch, times=2)
    checkpoint(Path(spec.paths.checkpoints_dir), 10)
    copier.saved(saved(10))
    copier.finish()
    assert len(tries) == 3
    assert steps(copier._storage) == [10]
    assert events(spec) == ["checkpoint_not_copied step_000010"] * 2 + ["checkpoint_copied step_000010"]


def test_what_does_not_pass_fails_the_run_at_its_end(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer.storage_copy, "RETRY_WAITS_S", (0.01,))
    copier = Copier(spec, RANK_0)
    failing_put(copier._storage, monkeypatch, times=99)
    checkpoint(Path(spec.paths.checkpoints_dir), 10)
    copier.saved(saved(10))
    with pytest.raises(TrainError, match="connection reset") as told:
        copier.finish()
    assert told.value.exit_code == 75
    assert "WARNING: step_000010 is not copied" in capfd.readouterr().out


def test_a_client_that_hangs_is_not_waited_for_for_ever(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(spec, parallel=dataclasses.replace(spec.parallel, timeout_s=1))
    copier = Copier(spec, RANK_0)
    gate = Gate(copier._storage, monkeypatch)
    checkpoint(Path(spec.paths.checkpoints_dir), 10)
    copier.saved(saved(10))
    with pytest.raises(TrainError, match="nothing has moved for 1 s"):
        copier.finish()
    gate.opened.set()
    wait(copier._work)


def test_bytes_that_move_beside_training_are_no_sign_of_its_life(spec: TrainSpec) -> None:
    copier = Copier(spec, RANK_0)
    before = HEARTBEAT._signs
    checkpoint(Path(spec.paths.checkpoints_dir), 10)
    copier.saved(saved(10))
    wait(copier._work)
    assert HEARTBEAT._signs == before, "a loop that hangs would not be noticed"
    checkpoint(Path(spec.paths.checkpoints_dir), 20)
    copier._is_awaited = True
    copier.saved(saved(20))
    wait(copier._work)
    assert HEARTBEAT._signs > before, "a long wait at the end would be taken for a hang"


def test_a_bug_of_the_thread_ends_the_run_and_not_its_patience(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = Copier(spec, RANK_0)

    def broken(*_: object) -> bool:
        raise RuntimeError("a bug")

    monkeypatch.setattr(copier._storage, "put_checkpoint", broken)
    copier.saved(saved(10))
    wait(copier._work)
    assert copier.copying is None
    with pytest.raises(RuntimeError, match="a bug"):
        copier.finish()


def test_other_ranks_and_runs_without_a_storage_do_nothing(spec: TrainSpec, there: Path) -> None:
    for copier in (
        Copier(spec, dataclasses.replace(RANK_0, rank=1)),
        Copier(dataclasses.replace(spec, storage=StorageSpec("", ())), RANK_0),
    ):
        copier.saved(saved(10))
        copier.finish()
    assert not there.exists()


def failing_put(storage: Storage, monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """The first `times` shards that are written fail; returns a list that grows with each try of a checkpoint."""
    tries: list[int] = []
    put_file: Callable[..., None] = storage._fs.put_file

    def fail(file: str, path: str, **kwargs: Any) -> None:
        if path.endswith("rank_00000.safetensors"):
            tries.append(1)
            if len(tries) <= times:
                raise ConnectionError("connection reset")
        put_file(file, path, **kwargs)

    monkeypatch.setattr(storage._fs, "put_file", fail)
    return tries
