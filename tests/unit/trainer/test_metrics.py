"""Lines that may be cut by a crash, and the rows around them."""

from pathlib import Path

from trainer.metrics import append_line, event, read_lines


def test_row_after_a_cut_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(str(path), {"step": 1, "text": "中文"})
    with path.open("a", encoding="utf-8") as f:
        f.write('{"step": 2, "lo')
    append_line(str(path), {"step": 2})
    event(str(path), "saved", step=2)
    rows = read_lines(str(path))
    assert rows[:2] == [{"step": 1, "text": "中文"}, {"step": 2}]
    assert rows[2]["event"] == "saved"


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_lines(str(tmp_path / "none")) == []
