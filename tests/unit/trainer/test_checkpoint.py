"""Publishing and pruning checkpoint folders; what training saves and loads is tested with real runs."""

from pathlib import Path

from trainer.checkpoint_format import list_checkpoints
from trainer.progress import Progress
from trainer.saver import _rename, prune


def folder(root: Path, name: str, content: str = "") -> Path:
    path = root / name
    path.mkdir()
    (path / "manifest.json").write_text(content)
    return path


def steps(root: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def test_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder(tmp_path, f"step_{step:06d}")
    prune(tmp_path, newest_step=30, keep=2)
    assert steps(tmp_path) == [30, 20]
    assert len(list(tmp_path.iterdir())) == 2


def test_later_step_that_was_skipped_on_resume_costs_no_good_one(tmp_path: Path) -> None:
    for step in (20, 25, 30):
        folder(tmp_path, f"step_{step:06d}")
    prune(tmp_path, newest_step=25, keep=1)
    assert steps(tmp_path) == [30, 25]


def test_same_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    final = folder(tmp_path, "step_000010", "old")
    _rename(folder(tmp_path, "step_000010.partial", "new"), final)
    assert (final / "manifest.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["step_000010"]


def test_progress_is_what_the_manifest_keeps() -> None:
    progress = Progress(step=3, rows_consumed=12, tokens=100, supervised_tokens=60, skipped_steps=1)
    kept = {"step": 3, "rows_consumed": 12, "tokens": 100, "supervised_tokens": 60}
    assert progress.state() == {**kept, "skipped_steps": 1}
