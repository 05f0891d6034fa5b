"""`launch data check`: what is wrong with the rows of a recipe, weighed against how much of it is allowed."""

from __future__ import annotations

import difflib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.spec import EXIT_OK, EXIT_USER

from .data_stage import run_stage
from .errors import LaunchError, Problem
from .start import Request


@dataclass(frozen=True)
class Finding:
    """One kind of mistake."""

    what: str
    of: str
    """What its share is taken of."""
    allowed: float
    """Share from 0 to 1; 1 is only a note."""
    reason: str
    """Why so much and no more."""
    fix: str


_STOPS = "a run stops at the first"
FINDINGS = {
    "unreadable-files": Finding(
        "files that are not UTF-8, damaged or empty; their rest is not read", "files", 0, _STOPS, "Convert the file, or copy it again."
    ),
    "malformed": Finding("rows that cannot be read", "rows", 0, _STOPS, "Repair these rows, or remove them."),
    "order": Finding(
        "conversations whose turns are in a wrong order", "rows", 0, _STOPS, "Questions and answers take turns; the last is an answer."
    ),
    "refused": Finding(
        "rows that the chat template or the model cannot take", "rows", 0, _STOPS, "Change these rows, or data.template."
    ),
    "empty-answers": Finding(
        "rows with an empty answer or text", "rows", 0.01,
        "they teach nothing, or silence; more of them mean a wrong column", "Remove them, or name the column: data.files.columns.",
    ),
    "nothing-to-learn": Finding(
        "rows of which (a part) has nothing to learn, after cutting", "rows", 0.05,
        "they are left out; a few cost little", "Raise data.max_length, or see which answers are learnt: launch data preview.",
    ),
    "special-tokens": Finding(
        "rows with a special token of the tokenizer inside a text", "rows", 0,
        "the model reads it as a control token: an answer ends there, or a turn is faked",
        "launch data replace takes it out; for text that is meant to hold them, raise the limit.",
    ),
    "placeholders": Finding(
        "rows with a text in double braces, such as {{name}}", "rows", 0.05,
        "a template of rows that was not filled in: the model learns to say the braces",
        "Fill them in: launch data replace. For text about templates, raise the limit.",
    ),
    "damaged-text": Finding(
        "rows with text that was decoded wrongly once (\ufffd, 锟斤拷, Ã©, â€™)", "rows", 0.01,
        "the model learns to write it; scraped text always holds a little", "Make the file again from its source, as UTF-8.",
    ),
    "duplicates": Finding(
        "documents that equal an earlier one, token for token", "rows", 0.05,
        "repeated rows are learnt by heart", "Keep each once; to repeat on purpose there are train.epochs and weight.",
    ),
    "over-length": Finding(
        "documents longer than data.max_length", "rows", 1, "what becomes of them is counted below", "",
    ),
    "truncated": Finding(
        "rows of which a part is cut off (data.too_long)", "rows", 0.05,
        "an answer that is cut off is learnt without its end", "Raise data.max_length, or set data.too_long: split-turns.",
    ),
    "dropped": Finding(
        "rows with a part that is left out as too long (data.too_long: drop)", "rows", 0.05,
        "what is long is then never seen", "Raise data.max_length, or set data.too_long: split-turns.",
    ),
    "endless-answers": Finding(
        "rows with an answer that is learnt without an end", "rows", 0.01,
        "the model learns to go on for ever", "Set data.template to one that ends answers; rows of tokens need the end's token.",
    ),
    "unseen-system": Finding(
        "evaluate.prompts with a system prompt that training never saw", "prompts", 0,
        "the report would compare what was not trained", "Take the system prompt of the rows, or put this one into data.system.",
    ),
}  # fmt: skip
"""In the order in which they are shown; trainer/data_check.py looks for them."""


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """`["duplicates=0.1", "truncated=5%"]` -> shares from 0 to 1. Raises LaunchError that lists all that is wrong."""
    limits, wrong = {}, []
    for text in texts:
        name, _, value = text.partition("=")
        share = _share(value)
        if name not in FINDINGS:
            near = difflib.get_close_matches(name, FINDINGS, 1)
            wrong.append(f"--limit {text}: there is no finding `{name}`{f'; nearest: {near[0]}' if near else ''}")
        elif share is None:
            wrong.append(f"--limit {text}: {value or 'nothing'} is no share; write 0.05 or 5%, from 0 to 1")
        elif name in limits:
            wrong.append(f"--limit {text}: a second limit of {name}")
        else:
            limits[name] = share
    if wrong:
        raise LaunchError("\n".join(wrong), f"NAME is one of {', '.join(FINDINGS)}.")
    return limits


def _share(text: str) -> float | None:
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        return None
    return share if math.isfinite(share) and 0 <= share <= 1 else None


def check(request: Request, limits: Sequence[str], as_json: bool) -> int:
    """Print what was found. Returns 0, 2 where a finding is over its limit, or the exit code of a check that failed."""
    changed = parse_limits(limits)
    staged = run_stage(request, "check", (), prepare=False)
    if staged.exit_code != EXIT_OK:
        return staged.exit_code
    found = weighed(_located(staged.found, staged.loaded), changed)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n".join([*staged.said, page(found)]))
    return EXIT_USER if found["over"] else EXIT_OK


def _located(found: Mapping[str, Any], loaded: Any) -> dict[str, Any]:
    """Places that are keys of the recipe get its file and line."""
    unseen = found["findings"]["unseen-system"]
    origins = loaded.origins
    places = []
    for place in unseen["places"]:
        key = place["where"]
        own = f"{key}.system" if f"{key}.system" in origins else key
        (problem,) = loaded.located([Problem(own, place["what"])])
        places.append({**place, "where": problem.where})
    return {**found, "findings": {**found["findings"], "unseen-system": {**unseen, "places": places}}}


def weighed(found: Mapping[str, Any], changed: Mapping[str, float]) -> dict[str, Any]:
    """`found` with {"share", "allowed", "over"} of each finding, and the names of those that are over. Pure."""
    findings = {}
    for name, one in found["findings"].items():
        allowed = changed.get(name, FINDINGS[name].allowed)
        share = one["count"] / one["of"] if one["of"] else 0.0
        findings[name] = {**one, "share": share, "allowed": allowed, "over": share > allowed}
    return {**found, "findings": findings, "over": [name for name, one in findings.items() if one["over"]]}


def page(found: Mapping[str, Any]) -> str:
    """For a terminal: every finding with its count, its limit, why, and the first places. Pure."""
    lines = [
        f"checked {_counted(found['rows'], 'rows')} of {_counted(found['files'], 'files')}: {found['documents']:,} documents of up to "
        f"{found['max_length']:,} tokens, {found['tokens']:,} tokens, {found['supervised_tokens']:,} learnt",
        "",
    ]
    width = max(len(name) for name in found["findings"])
    for name, one in found["findings"].items():
        kind, mark = FINDINGS[name], "OVER" if one["over"] else "note" if one["count"] else "ok"
        if not one["count"]:
            lines.append(
                f"{mark:<4}  {name:<{width}}  none of {_counted(one['of'], kind.of)} ({_allowed(one['allowed'])})"
            )
            continue
        lines.append(
            f"{mark:<4}  {name:<{width}}  {one['count']:,} of {_counted(one['of'], kind.of)} ({_percent(one['share'])}; "
            f"{_allowed(one['allowed'])}): {kind.what}"
        )
        lines += [f"          {_one_line(place['where'])}: {_one_line(place['what'])}" for place in one["places"]]
        if one["count"] > len(one["places"]):
            lines.append(f"          ... and {one['count'] - len(one['places']):,} more")
        lines.append(f"      why: {kind.reason}")
        hints = dict.fromkeys(place["hint"].partition("\n")[0] for place in one["places"] if place["hint"])
        lines += [f"      fix: {fix}" for fix in hints or (kind.fix,) if fix]
    lines += ["", _verdict(found)]
    return "\n".join(lines)


def _verdict(found: Mapping[str, Any]) -> str:
    over = found["over"]
    if not over:
        return "nothing is over its limit"
    said = f"over the limit: {', '.join(over)}"
    may_be_raised = [name for name in over if FINDINGS[name].reason != _STOPS]
    if not may_be_raised:
        return said
    share = math.ceil(found["findings"][may_be_raised[0]]["share"] * 1e4) / 1e4
    return f"{said}. To allow more: --limit {may_be_raised[0]}={share:g}"


def _allowed(share: float) -> str:
    return "only a note" if share == 1 else f"allowed {_percent(share)}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what.removesuffix('s') if number == 1 else what}"


def _percent(share: float) -> str:
    return f"{share:.2%}".replace(".00%", "%").replace("%", " %") if share == 0 or share >= 0.0001 else "<0.01 %"


def _one_line(text: str) -> str:
    """Without what a terminal would obey, and no longer than is readable."""
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return plain if len(plain) <= 200 else f"{plain[:199]}…"
