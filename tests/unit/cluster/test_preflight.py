"""What hosts must agree on: each difference is told with the host's name, both values and the fix."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.inventory import Inventory
from cluster.node_report import collect
from cluster.preflight import HostReport, Questions, compare, host_table, put_questions

QUESTIONS = Questions(("torch", "tunelaunch"), {"/data/runs": "Use --run-dir."}, ("/data/my.jsonl",))


def host(name: str, ahead_s: float = 0.0, **changed: Any) -> HostReport:
    report = {
        "host": f"{name}.lab",
        "python": "3.11.2",
        "executable": "/venv/bin/python",
        "packages": {"torch": "2.13.0", "tunelaunch": "0.1.0"},
        "code": "c0de",
        "cuda": "12.8",
        "inventory": Inventory("cpu", (), 8, 64.0).to_dict(),
        "memory_free_gb": 50.0,
        "folders": {"/data/runs": {"nearest": "/data/runs", "free_gb": 100.0, "problem": ""}},
        "files": {"/data/my.jsonl": "d1"},
    }
    return HostReport(name, {**report, **changed}, ahead_s, {}, {})


def told(*reports: HostReport) -> list[tuple[str, str, str]]:
    return [(f.host, f.message, f.hint) for f in compare(reports, QUESTIONS)]


def test_equal_hosts_fit() -> None:
    assert told(host("a"), host("b", 0.5), host("c", -0.5)) == []


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        (
            {"packages": {"torch": "2.12.0", "tunelaunch": "0.1.0"}},
            "torch 2.12.0, but 2.13.0 on a",
            "pip install torch==2.13.0",
        ),
        (
            {"packages": {"torch": None, "tunelaunch": "0.1.0"}},
            "torch none, but 2.13.0 on a",
            "On b, with /venv/bin/python",
        ),
        (
            {"packages": {"torch": "2.13.0", "tunelaunch": "0.2.0"}, "code": "x"},
            "tunelaunch 0.2.0, but 0.1.0 on a",
            "tunelaunch==0.1.0",
        ),
        ({"python": "3.12.1"}, "Python 3.12.1, but 3.11.2 on a", "the same environment"),
        ({"cuda": None}, "torch's CUDA none, but 12.8 on a", "the same environment"),
        ({"code": "beef"}, "tunelaunch's code is another one (beef, c0de on a)", "the same commit"),
        ({"files": {"/data/my.jsonl": None}}, "/data/my.jsonl does not exist there", "copy it"),
        ({"files": {"/data/my.jsonl": "d2"}}, "/data/my.jsonl differs (d2, d1 on a)", "copy it"),
        (
            {"folders": {"/data/runs": {"nearest": "/data/runs", "free_gb": 0.4, "problem": ""}}},
            "0.4 GB free at /data/runs",
            "Free at least 2 GB.",
        ),
        ({"memory_free_gb": 0.3}, "0.3 GB of its 64 GB of memory are free", "End other programs"),
    ],
)
def test_a_difference_is_told_once_with_both_values_and_the_fix(
    changed: dict[str, Any], message: str, hint: str
) -> None:
    ((name, said, fix),) = told(host("a"), host("b", **changed))
    assert (name, said) == ("b", message)
    assert hint in fix


def test_a_clock_that_is_ahead_is_told() -> None:
    ((name, said, fix),) = told(host("a"), host("b", 7.5), host("c", -0.5))
    assert (name, said) == ("b", "its clock is 8.0 s ahead of that of c")
    assert "NTP" in fix


def test_a_folder_that_is_not_shared_or_not_writable_is_told() -> None:
    elsewhere = dataclasses.replace(host("b"), unseen={"/data/runs": ["a"]})
    ((name, said, fix),) = told(host("a"), elsewhere)
    assert (name, fix) == ("b", "Use --run-dir.")
    assert said == "/data/runs is another folder there: what a wrote into it is not seen"
    locked = dataclasses.replace(
        host("b"), unwritable={"/data/runs": "Permission denied"}, unseen={"/data/runs": ["a"]}
    )
    ((name, said, _),) = told(host("a"), locked)
    assert (name, said) == ("b", "cannot write to /data/runs: Permission denied")


def test_of_many_hosts_only_the_one_that_lies_elsewhere_is_told() -> None:
    a, b, c = (dataclasses.replace(host(name), unseen={"/data/runs": ["c"]}) for name in "abc")
    c = dataclasses.replace(c, unseen={"/data/runs": ["a", "b"]})
    assert [(name, said) for name, said, _ in told(a, b, c)] == [
        ("c", "/data/runs is another folder there: what a, b wrote into it is not seen")
    ]


def test_the_questions_reach_every_host_and_tokens_are_taken_away_again() -> None:
    asked: list[tuple[str, int]] = []
    written: dict[str, int] = {}

    def ask(what: str, given: list[dict[str, Any]]) -> list[Any]:
        asked.append((what, len(given)))
        if what == "write_tokens":
            written.update((g["name"], i) for i, g in enumerate(given))
            return [{}, {}, {"/data/runs": "Permission denied"}]
        if what == "missing_tokens":  # the second host sees its own only
            lost = [name for name in given[1]["names"] if written[name] != 1]
            return [{}, {"/data/runs": lost}, {}]
        return [{"host": i} for i in range(3)]

    reports = put_questions(["a", "b", "c"], ask, QUESTIONS)
    assert asked == [("report", 3), ("write_tokens", 3), ("missing_tokens", 3), ("remove_tokens", 3)]
    assert [r.report["host"] for r in reports] == [0, 1, 2]
    assert [r.unseen for r in reports] == [{}, {"/data/runs": ["a"]}, {}]
    assert reports[2].unwritable == {"/data/runs": "Permission denied"}


def test_a_file_that_no_host_has_is_told_for_each() -> None:
    missing = {"files": {"/data/my.jsonl": None}}
    assert [name for name, _, _ in told(host("a", **missing), host("b", **missing))] == ["a", "b"]


def test_a_real_report_fits_itself(tmp_path) -> None:
    file = tmp_path / "数据.jsonl"
    file.write_text("{}\n", encoding="utf-8")
    questions = Questions(("torch", "no-such-package"), {str(tmp_path / "runs" / "x"): ""}, (str(file), str(tmp_path)))
    report = collect(list(questions.packages), list(questions.shared_folders), list(questions.files))
    assert report["packages"]["no-such-package"] is None
    assert report["folders"][str(tmp_path / "runs" / "x")]["nearest"] == str(tmp_path)
    reports = [HostReport(name, report, 0.0, {}, {}) for name in ("a", "b")]
    assert compare(reports, questions) == []
    file.write_text("{ }\n", encoding="utf-8")
    other = collect(list(questions.packages), list(questions.shared_folders), list(questions.files))
    found = compare([reports[0], HostReport("b", other, 0.0, {}, {})], questions)
    assert [f.message.split(" (")[0] for f in found] == [f"{file} differs", f"{tmp_path} differs"]
    assert "no GPU" in host_table(reports)
