"""What `launch data preview` shows of documents."""

from __future__ import annotations

import re
from typing import Any

from launcher.data_preview import html_page, terminal_page


def found(**changes: Any) -> dict[str, Any]:
    document = {"source": "/d/a.jsonl:7", "tokens": 9, "learnt": 3, "learnt_as_end": 0}
    document["spans"] = [["<|im_start|>user\nHi \x1b[31m", 0], ["Yes & <no>", 1]]
    histogram = {"counts": [1, 0, 40], "edges": [2, 5, 8, 11], "percentiles": {"50": 4, "90": 9, "99": 10}}
    histogram |= {"longest": 11, "mean": 5.5}
    base = {"documents": [document], "histogram": histogram, "num_documents": 41, "num_rows": 3, "max_length": 512}
    return {**base, "tokens": 900, "supervised_tokens": 300, "packing": True, **changes}


def test_what_is_learnt_stands_out() -> None:
    plain = terminal_page(found(), 4, color=False)
    assert "document 4  /d/a.jsonl:7  9 tokens, 3 learnt" in plain
    assert "<|im_start|>user\nHi \\x1b[31m«Yes & <no>»" in plain
    colored = terminal_page(found(), 4, color=True)
    assert "\033[32mYes & <no>\033[0m" in colored
    # What the data holds cannot steer the terminal.
    assert "\033[31m" not in colored


def test_lengths_are_counted() -> None:
    lines = terminal_page(found(), 0, color=False).splitlines()
    bars = [re.fullmatch(r" *(\d+) to +(\d+)  ([█▏]*) *  (\d+)", line) for line in lines[-3:]]
    assert [(int(b[1]), int(b[2]), int(b[4])) for b in bars if b] == [(2, 5, 1), (5, 8, 0), (8, 11, 40)]
    assert [len(b[3]) for b in bars if b] == [1, 0, 40]
    assert "5.5 on average, 50 % up to 4, 90 % up to 9, 99 % up to 10, longest 11" in lines[-4]


def test_positions_that_mean_the_end_of_the_text_are_said() -> None:
    document = {**found()["documents"][0], "learnt_as_end": 2}
    assert "2 of the learnt positions stand for the end of the text" in terminal_page(
        found(documents=[document]), 0, False
    )


def test_the_page_holds_nothing_but_text() -> None:
    page = html_page(found(), 0)
    assert "<mark>Yes &amp; &lt;no&gt;</mark>" in page
    assert "&lt;|im_start|&gt;user" in page
    assert "default-src 'none'" in page
    assert page.count("<rect") == 3
    assert "<script" not in page
