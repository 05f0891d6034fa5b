"""Reading log folders, also while they grow."""

import json

from cluster import logs


def test_tail_gives_the_last_lines_of_a_long_file(tmp_path):
    path = tmp_path / "rank_0.log"
    path.write_text("".join(f"第 {i} 行\n" for i in range(20_000)), encoding="utf-8")
    assert logs.tail(path, 2) == "第 19998 行\n第 19999 行"
    assert len(logs.tail(path, 100_000).splitlines()) == 20_000
    assert logs.tail(path, 5_000).splitlines()[0] == "第 15000 行"


def test_tail_of_nothing(tmp_path):
    assert logs.tail(tmp_path / "missing.log", 5) == ""
    (tmp_path / "empty.log").write_text("")
    assert logs.tail(tmp_path / "empty.log", 5) == ""


def test_failures_come_earliest_first_and_cut_files_are_left_out(tmp_path):
    for rank, time_ns in ((0, 30), (10, 20)):
        (tmp_path / f"failure_rank_{rank}.json").write_text(json.dumps({"rank": rank, "time_ns": time_ns}))
    (tmp_path / "failure_rank_2.json").write_text('{"rank": 2, "time')
    (tmp_path / "failure_rank_3.json").write_bytes(b'"\xe5')
    assert [f["rank"] for f in logs.read_failures(str(tmp_path))] == [10, 0]
    logs.remove_failures(str(tmp_path))
    assert logs.read_failures(str(tmp_path)) == []
    assert not list(tmp_path.glob("failure*"))


def test_the_log_of_the_rank_that_failed_first_is_read_first(tmp_path):
    for rank in (0, 1, 2, 10):
        (tmp_path / f"rank_{rank}.log").write_text(f"{rank}\n")
    (tmp_path / "agent.log").write_text("")
    (tmp_path / "failure_rank_2.json").write_text('{"rank": 2, "time_ns": 5}')
    (tmp_path / "failure_rank_0.json").write_text('{"rank": 0, "time_ns": 6}')
    names = [path.name for path in logs.ordered_logs(str(tmp_path))]
    assert names == ["rank_2.log", "rank_0.log", "rank_1.log", "rank_10.log", "agent.log"]
    assert logs.rank_log_tails(str(tmp_path)) == {0: "0", 1: "1", 2: "2", 10: "10"}


def test_lines_are_marked_with_their_rank(tmp_path):
    assert logs.format_line(tmp_path / "rank_3.log", "x") == "[rank 3] x"
    assert logs.format_line(logs.rank_log(str(tmp_path), -1), "x") == "[agent] x"


def test_following_joins_cut_lines_and_characters_and_finds_new_logs(tmp_path):
    first, second = tmp_path / "rank_0.log", tmp_path / "rank_1.log"
    text = "你好\n".encode()
    first.write_bytes(text[:2])

    def grow():
        with first.open("ab") as f:
            f.write(text[2:4])
        yield False
        with first.open("ab") as f:
            f.write(text[4:] + b"step 1\nla")
        second.write_text("late\r\n")
        yield False
        with first.open("ab") as f:
            f.write(b"st")
        yield True

    steps = grow()
    lines = list(logs.iter_follow(str(tmp_path), lambda: next(steps), poll_s=0))
    assert [(path.name, line) for path, line in lines] == [
        ("rank_0.log", "你好"),
        ("rank_0.log", "step 1"),
        ("rank_1.log", "late"),
        ("rank_0.log", "last"),
    ]


def test_following_an_empty_folder_ends(tmp_path):
    assert list(logs.iter_follow(str(tmp_path / "missing"), lambda: True)) == []
