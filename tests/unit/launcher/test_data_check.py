"""How findings of `launch data check` are weighed and shown."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.data_check import FINDINGS, page, parse_limits, weighed
from launcher.errors import LaunchError
from trainer.data_check import FINDINGS as LOOKED_FOR


def found(**counts: int) -> dict[str, Any]:
    place = {"where": "/d/a.jsonl:7", "what": "a \x1b[31m text", "hint": ""}
    findings = {}
    for name, kind in FINDINGS.items():
        count = counts.get(name.replace("-", "_"), 0)
        of = {"files": 2, "prompts": 4, "rows": 1000}[kind.of]
        findings[name] = {"count": count, "of": of, "places": [place] * min(count, 5)}
    base = {"rows": 1000, "files": 2, "documents": 990, "tokens": 9000, "supervised_tokens": 4000, "max_length": 512}
    return {**base, "findings": findings}


def test_limits_are_shares_or_percent() -> None:
    assert parse_limits(["duplicates=0.1", "truncated=5%", "malformed=0"]) == {
        "duplicates": 0.1, "truncated": 0.05, "malformed": 0,
    }  # fmt: skip


def test_wrong_limits_are_told_at_once() -> None:
    with pytest.raises(LaunchError) as caught:
        parse_limits(["duplicate=0.1", "truncated=5", "order", "dropped=nan", "malformed=0", "malformed=1"])
    lines = caught.value.message.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "--limit duplicate=0.1", "--limit truncated=5", "--limit order", "--limit dropped=nan", "--limit malformed=1",
    ]  # fmt: skip
    assert "nearest: duplicates" in lines[0]
    assert "write 0.05 or 5%" in lines[1]
    assert "unseen-system" in caught.value.hint
    assert caught.value.exit_code == 2


def test_what_is_at_its_limit_passes() -> None:
    assert weighed(found(duplicates=50, over_length=1000), {})["over"] == []
    assert weighed(found(duplicates=51), {})["over"] == ["duplicates"]
    assert weighed(found(duplicates=51), {"duplicates": 0.051})["over"] == []
    assert weighed(found(malformed=1, unseen_system=1, empty_answers=3), {"empty-answers": 0.0})["over"] == [
        "malformed", "empty-answers", "unseen-system",
    ]  # fmt: skip


def test_the_page_says_count_limit_reason_and_place() -> None:
    lines = page(weighed(found(duplicates=120, over_length=6, unreadable_files=1), {})).splitlines()
    assert lines[0].startswith("checked 1,000 rows of 2 files: 990 documents of up to 512 tokens")
    at = next(k for k, line in enumerate(lines) if line.startswith("OVER  duplicates"))
    assert "120 of 1,000 rows (12 %; allowed 5 %)" in lines[at]
    assert lines[at + 1] == "          /d/a.jsonl:7: a  [31m text"  # nothing that a terminal would obey
    assert lines[at + 6 : at + 8] == ["          ... and 115 more", "      why: repeated rows are learnt by heart"]
    assert any(line.startswith("note  over-length") and "only a note" in line for line in lines)
    assert any(line.startswith("ok    order") and "none of 1,000 rows (allowed 0 %)" in line for line in lines)
    assert lines[-1] == "over the limit: unreadable-files, duplicates. To allow more: --limit duplicates=0.12"
    assert page(weighed(found(), {})).endswith("nothing is over its limit")


def test_the_share_that_is_proposed_is_enough() -> None:
    first = weighed(found(duplicates=333), {})
    assert page(first).endswith("--limit duplicates=0.333")
    shares = found(duplicates=1)
    shares["findings"]["duplicates"]["of"] = 3
    line = page(weighed(shares, {})).splitlines()[-1]
    limits = parse_limits([line.rpartition(" ")[2]])
    assert weighed(shares, limits)["over"] == []


def test_every_finding_has_a_reason_and_a_fix() -> None:
    assert tuple(FINDINGS) == LOOKED_FOR
    for name, kind in FINDINGS.items():
        assert kind.reason, name
        assert kind.fix or kind.allowed == 1, name
        assert 0 <= kind.allowed <= 1
