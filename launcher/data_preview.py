"""`launch data preview`: the rows of a recipe as its model will read them, and how long they are.

The prepare stage runs as in training, on this host without a device, and its tokens are kept in the same cache.
"""

from __future__ import annotations

import html
import json
import os
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.spec import EXIT_OK

from .data_stage import run_stage
from .errors import LaunchError
from .run_dir import file_of_the_user
from .start import Request

_LEARNT, _DIM, _PLAIN = "\033[32m", "\033[2m", "\033[0m"
_BAR = 40


def preview(request: Request, num_documents: int, first: int, page: Path | None, as_json: bool) -> int:
    """Print documents, counts and lengths; with `page`, write them as HTML too. Returns the exit code."""
    if page is not None and page.suffix not in (".html", ".htm"):
        raise LaunchError(f"--out {page}: is no HTML file", "Name it like preview.html.")
    staged = run_stage(request, "preview", ("--documents", str(num_documents), "--first", str(first)), prepare=True)
    code, found = staged.exit_code, staged.found
    if code != EXIT_OK:
        return code
    if found["num_documents"] <= first:
        raise LaunchError(f"--first {first}: there are {found['num_documents']} documents", "They are counted from 0.")
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n".join(staged.said))
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(terminal_page(found, first, color))
    if page is not None:
        with file_of_the_user(page) as f:
            f.write(html_page(found, first))
        print(f"wrote {page}", file=sys.stderr)
    return EXIT_OK


def terminal_page(found: Mapping[str, Any], first: int, color: bool) -> str:
    """For a terminal; what is learnt is green, or stands between « and ». Pure."""
    lines = []
    for number, document in enumerate(found["documents"], start=first):
        heading = f"document {number}  {document['source']}  {_counts(document)}"
        lines += ["", f"{_DIM}{heading}{_PLAIN}" if color else heading]
        before, after = (_LEARNT, _PLAIN) if color else ("«", "»")
        lines.append("".join(f"{before}{_safe(t)}{after}" if kind else _safe(t) for t, kind in document["spans"]))
        if document["learnt_as_end"]:
            lines.append(f"({document['learnt_as_end']} of the learnt positions stand for the end of the text)")
    return "\n".join([*lines, "", *_histogram(found)])


def _counts(document: Mapping[str, Any]) -> str:
    return f"{document['tokens']:,} tokens, {document['learnt']:,} learnt"


def _histogram(found: Mapping[str, Any]) -> list[str]:
    shown = found["histogram"]
    most = max(shown["counts"])
    width = max(len(f"{edge:,}") for edge in shown["edges"])
    parts = ", ".join(f"{p} % up to {value:,}" for p, value in shown["percentiles"].items())
    lines = [f"tokens of a document: {shown['mean']:,} on average, {parts}, longest {shown['longest']:,}"]
    for count, start, end in zip(shown["counts"], shown["edges"], shown["edges"][1:], strict=False):
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        lines.append(f"{start:>{width},} to {end:>{width},}  {bar:<{_BAR}}  {count:,}")
    return lines


def _safe(text: str) -> str:
    """Without what a terminal would obey; line breaks stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in text)


_STYLE = """body{font:15px/1.6 system-ui,"Noto Sans CJK SC",sans-serif;max-width:960px;margin:32px auto;padding:0 16px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f3f4f6;padding:12px;border-radius:8px;color:#1c2128}
mark{background:#c9f0d5;color:inherit} h2{font-size:14px;font-weight:600} svg{width:100%;height:auto}
text{font:12px system-ui,sans-serif;fill:#5d6875} rect{fill:#3459d1}"""


def html_page(found: Mapping[str, Any], first: int) -> str:
    """One file without scripts or anything from outside. Pure."""
    parts = []
    for number, document in enumerate(found["documents"], start=first):
        spans = "".join(f"<mark>{html.escape(t)}</mark>" if kind else html.escape(t) for t, kind in document["spans"])
        parts.append(f"<h2>{number}: {html.escape(document['source'])}, {_counts(document)}</h2><pre>{spans}</pre>")
    summary = (
        f"{found['num_documents']:,} documents, {found['tokens']:,} tokens, {found['supervised_tokens']:,} learnt, "
        f"{found['num_rows']:,} rows of up to {found['max_length']:,}"
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>Data</title><style>{_STYLE}</style><h1>What the model reads</h1><p>{summary}. "
        f"<mark>Marked</mark>: what is learnt.</p>{_chart(found['histogram'])}{''.join(parts)}\n"
    )


def _chart(shown: Mapping[str, Any]) -> str:
    counts, edges = shown["counts"], shown["edges"]
    most, wide = max(counts), 900 / len(counts)
    bars = "".join(
        f'<rect x="{i * wide:.1f}" y="{150 - 140 * count / most:.1f}" width="{wide - 2:.1f}" height="{140 * count / most:.1f}">'
        f"<title>{edges[i]} to {edges[i + 1]} tokens: {count}</title></rect>"
        f'<text x="{i * wide:.1f}" y="166">{edges[i]}</text>'
        for i, count in enumerate(counts)
    )
    return f'<svg viewBox="0 0 900 172" role="img" aria-label="Lengths of documents in tokens">{bars}</svg>'
