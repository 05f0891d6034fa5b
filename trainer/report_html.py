"""report.html: one file without scripts or anything from outside, readable on screen, in print and in the dark.

Every text goes through `esc`, and a content security policy forbids scripts: an answer can show nothing but itself.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import Any

from .expectations import script_share

CSS = """
:root { --ink:#1c2128; --soft:#5d6875; --paper:#fff; --page:#f5f6f8; --rule:#e1e5ea; --accent:#3459d1; --faint:#a9b8ee;
  --good:#137a45; --good-bg:#e4f5ea; --bad:#b3261e; --bad-bg:#fbe9e7; --note:#7a5600; --note-bg:#fdf3d8; --code:#f1f3f6 }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e8ee; --soft:#98a4b3; --paper:#181c22; --page:#101318; --rule:#2b323c;
  --accent:#8ea8ff; --faint:#46558f; --good:#6fd69a; --good-bg:#15321f; --bad:#ff9a92; --bad-bg:#3d1b19; --note:#e9c46a;
  --note-bg:#362b10; --code:#20262e } }
* { box-sizing:border-box }
html { color-scheme:light dark; -webkit-text-size-adjust:100% }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
  "PingFang SC","Microsoft YaHei","Noto Sans CJK SC","Noto Sans SC",sans-serif }
main { max-width:1080px; margin:0 auto; padding:40px 24px 64px }
h1 { margin:0; font-size:30px; line-height:1.2; letter-spacing:-.01em; overflow-wrap:anywhere }
h2 { margin:0 0 16px; font-size:18px; letter-spacing:-.005em }
h3 { margin:20px 0 6px; font-size:14px; font-weight:600 }
.sub { margin:6px 0 28px; color:var(--soft); overflow-wrap:anywhere }
section { background:var(--paper); border:1px solid var(--rule); border-radius:12px; padding:24px; margin:0 0 20px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(172px,1fr)); gap:12px; margin:0 0 20px }
.tile { background:var(--paper); border:1px solid var(--rule); border-radius:12px; padding:14px 18px }
.tile .name { color:var(--soft); font-size:13px }
.tile .value { font-size:20px; font-weight:650; line-height:1.35; font-variant-numeric:tabular-nums; white-space:nowrap }
.tile .value small { font-size:14px; font-weight:400; color:var(--soft) }
.tile.good .value { color:var(--good) } .tile.bad .value { color:var(--bad) }
table { width:100%; border-collapse:collapse; table-layout:fixed }
th { text-align:left; font-size:13px; font-weight:600; color:var(--soft); padding:0 12px 8px 0; border-bottom:1px solid var(--rule) }
td { vertical-align:top; padding:14px 18px 14px 0; border-bottom:1px solid var(--rule); overflow-wrap:anywhere }
tr:last-child td { border-bottom:0; padding-bottom:0 }
.text { white-space:pre-wrap }
.question { font-weight:600 }
.small { font-size:13px; color:var(--soft); margin-top:6px }
.mark { display:inline-block; border-radius:99px; padding:0 10px; margin-bottom:6px; font-size:12.5px; font-weight:600; line-height:22px }
.pass { color:var(--good); background:var(--good-bg) } .fail { color:var(--bad); background:var(--bad-bg) }
.why { color:var(--bad) }
.note { display:inline-block; border-radius:6px; padding:0 8px; margin-top:6px; font-size:13px; color:var(--note); background:var(--note-bg) }
.answers col:nth-child(1) { width:26% } .answers col { width:37% }
.facts col:first-child { width:200px }
.facts td { padding:8px 12px 8px 0 } .facts td:first-child { color:var(--soft) }
pre { margin:0; padding:12px 14px; background:var(--code); border-radius:8px; white-space:pre-wrap; overflow-wrap:anywhere;
  font:13px/1.55 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono","Noto Sans Mono CJK SC",monospace }
svg { display:block; width:100%; height:auto; margin:0 0 4px }
svg text { fill:var(--soft); font-size:12px; font-variant-numeric:tabular-nums }
svg .grid { stroke:var(--rule) } svg .raw { stroke:var(--faint); stroke-width:1.25 } svg .line { stroke:var(--accent); stroke-width:2.25 }
svg path { fill:none; stroke-linejoin:round; stroke-linecap:round } svg .again { stroke:var(--soft); stroke-dasharray:3 4 }
svg .dot { fill:var(--accent) } svg .last { fill:var(--ink); font-weight:600 }
footer { color:var(--soft); font-size:13px; text-align:center; margin-top:28px }
@media (max-width:720px) { svg text { font-size:17px } main { padding:24px 14px } section { padding:18px }
  .answers thead, .answers colgroup { display:none } .answers tr, .answers td { display:block; width:auto }
  .answers td { border:0; padding:6px 0 } .answers tr { border-bottom:1px solid var(--rule); padding:10px 0 }
  .answers tr:last-child { border:0 } .answers td[data-who]::before { content:attr(data-who); display:block; font-size:12px; color:var(--soft) }
  .facts col:first-child { width:34% } }
@media print { @page { margin:16mm 14mm } body { background:#fff; font-size:11.5px } main { max-width:none; padding:0 }
  h1 { font-size:22px } h2 { font-size:14px } h3, .tile .value { font-size:13px } .small, .note, .mark, .tile .name, .tile .value small, th, pre { font-size:10px }
  .tiles { grid-template-columns:repeat(6,1fr); gap:8px } .tile { padding:8px 10px } td { padding:8px 10px 8px 0 } section, .tile { border-color:#ccc } tr, .tile, svg, pre { break-inside:avoid } h2, h3 { break-after:avoid }
  * { print-color-adjust:exact; -webkit-print-color-adjust:exact } }
@media print and (prefers-color-scheme: dark) { :root { --ink:#000; --soft:#444; --paper:#fff; --page:#fff; --rule:#ccc; --accent:#3459d1;
  --faint:#a9b8ee; --good:#137a45; --good-bg:#e4f5ea; --bad:#b3261e; --bad-bg:#fbe9e7; --note:#7a5600; --note-bg:#fdf3d8; --code:#f1f3f6 } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def esc(text: str) -> str:
    """Text for an element or a quoted attribute. Control characters, which HTML does not allow, become U+FFFD."""
    return "".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in html.escape(text.replace("\r\n", "\n")))


def html_page(report: dict[str, Any]) -> str:
    """The whole page of a report.json. Pure."""
    body = [
        f"<h1>{esc(report['title'])}</h1>",
        f'<p class="sub">{esc(" · ".join(t for t in (report["run_id"], report["created"]) if t))}</p>',
        _tiles(report),
        _section("Before and after", _answers(report["evaluation"])),
        _section("Training", _charts(report["curve"], report["held_out"])) if report["curve"] else "",
        _section("Key facts", _facts(report["facts"])),
        _section("Merge check", _facts(report["merge_facts"])) if report["merge_facts"] else "",
        _section("Use the model", "".join(f"<h3>{esc(r['name'])}</h3>{_pre(r['command'])}" for r in report["use"])),
        _section("How to reproduce", _reproduce(report)),
        "<footer>Written by tunelaunch. The same content for programs: report.json</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(report['title'])} · report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _pre(text: str) -> str:
    return f"<pre>{esc(text)}</pre>"


def _tiles(report: dict[str, Any]) -> str:
    """The numbers to see first."""
    evaluation, training = report["evaluation"], report["training"]
    tiles: list[tuple[str, str, str]] = []
    total = evaluation["num_expectations"]
    if total:
        good = "good" if evaluation["tuned_passed"] == total else "bad"
        before = "" if evaluation["base_passed"] is None else f"<small>base {evaluation['base_passed']} →</small> "
        value = f"{before}{evaluation['tuned_passed']} <small>of {total}</small>"
        tiles.append(("Expectations met", value, good))
    if training is not None:
        first, last = (_number(training[key], "{:.3f}") for key in ("first_loss", "last_loss"))
        minutes, seconds = divmod(round(training["seconds"]), 60)
        time = (
            f"{minutes}:{seconds:02d} <small>min</small>" if minutes else f"{training['seconds']:.1f} <small>s</small>"
        )
        tiles += [
            ("Loss", f"<small>{first} →</small> {last}", ""),
            ("Steps", f"{training['steps']:,}", ""),
            ("Training time", time, ""),
            ("Speed", f"{training['tokens_per_second']:,.0f} <small>tokens/s</small>", ""),
            ("Peak memory", f"{training['peak_memory_gb']:.2f} <small>GB</small>", ""),
        ]
    cells = [
        f'<div class="tile {k}"><div class="name">{n}</div><div class="value">{v}</div></div>' for n, v, k in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def _answers(evaluation: dict[str, Any]) -> str:
    rows = evaluation["results"]
    has_base = any(row["base"] is not None for row in rows)
    names = ["Question", *(["Base"] if has_base else []), "Tuned"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(
        f"<tr>{_question(row)}{_answer(row, 'base') if has_base else ''}{_answer(row, 'tuned')}</tr>\n" for row in rows
    )
    columns = "<col>" * len(names)
    return f'<table class="answers"><colgroup>{columns}</colgroup><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


def _text(text: str, kind: str) -> str:
    # The language attribute picks the right Han glyphs.
    language = ' lang="zh"' if script_share(text, "zh") > 0.5 else ""
    return f'<div class="text{kind}"{language}>{esc(text)}</div>'


def _question(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    system = f'<div class="small">System: {esc(prompt["system"])}</div>' if prompt["system"] is not None else ""
    expected = f'<div class="small">Expected: {esc(row["expected"])}</div>' if row["expected"] else ""
    return f"<td>{_text(prompt['user'], ' question')}{system}{expected}</td>"


def _answer(row: dict[str, Any], who: str) -> str:
    answer = row[who]
    if answer is None:
        return f'<td data-who="{who}"><div class="small">not asked</div></td>'
    mark = ""
    if row["expected"]:
        mark = '<div class="mark fail">✗ not met</div>' if answer["unmet"] else '<div class="mark pass">✓ met</div>'
    unmet = "".join(f'<div class="small why">{esc(u)}</div>' for u in answer["unmet"])
    notes = "".join(f'<div><span class="note">{esc(n)}</span></div>' for n in answer["notes"])
    return f'<td data-who="{who}">{mark}{_text(answer["text"].strip() or "(empty)", "")}{unmet}{notes}</td>'


def _facts(rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr><td>{esc(name)}</td><td>{esc(value)}</td></tr>\n" for name, value in rows)
    return f'<table class="facts"><colgroup><col><col></colgroup><tbody>\n{body}</tbody></table>'


def _reproduce(report: dict[str, Any]) -> str:
    command = _pre(report["reproduce"]) if report["reproduce"] else ""
    return f"{command}<h3>Versions</h3>{_facts(list(report['versions'].items()))}"


def _charts(curve: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> str:
    again = [row["step"] for before, row in itertools.pairwise(curve) if row.get("attempt") != before.get("attempt")]
    loss = _points(curve, "loss")
    rate = _points(curve, "learning_rate")
    charts = [line_chart(loss, 300, "loss", again, smooth=True)] if loss else []
    held_out_loss = _points(held_out, "loss")
    if held_out_loss:
        seen = [step for step in again if step <= held_out_loss[-1][0]]
        charts.append(line_chart(held_out_loss, 200, "loss of the held-out rows", seen))
    charts += [line_chart(rate, 150, "learning rate", again)] if rate else []
    explanation = "Dashed line: the run was continued from a checkpoint." if again else ""
    if len(loss) >= SMOOTH_FROM:
        explanation = f"Loss: pale, each step; strong, a running mean. {explanation}"
    return "".join(charts) + (f'<div class="small">{explanation.strip()}</div>' if explanation else "")


def _points(curve: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) pairs; steps without a finite value are left out."""
    return [(row["step"], row[key]) for row in curve if row.get(key) is not None and math.isfinite(row[key])]


WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1000, 64, 70, 26, 40
SMOOTH_FROM = 30
MAX_POINTS = 1000


def line_chart(
    points: Sequence[tuple[float, float]], height: int, name: str, again: Sequence[float] = (), smooth: bool = False
) -> str:
    """Inline SVG of `points` (step, value), with ticks and axis labels; `again`: steps that get a dashed line."""
    low, high = min(v for _, v in points), max(v for _, v in points)
    y_ticks = ticks(0.0 if 0 <= low < 0.4 * high else low, high, max(2, height // 60))
    x0, x1 = points[0][0], max(points[-1][0], points[0][0] + 1)
    x_ticks = [t for t in ticks(x0, x1, 8) if x0 <= t <= x1 and t == int(t)]
    y0, y1 = min(y_ticks[0], low), max(y_ticks[-1], high)

    def x(step: float) -> float:
        return LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - y0) / ((y1 - y0) or 1.0) * (height - BOTTOM - TOP)

    def path(line: Sequence[tuple[float, float]], kind: str) -> str:
        return f'<path class="{kind}" d="M{" L".join(f"{x(s):.1f},{y(v):.1f}" for s, v in line)}"/>'

    last_step, last_value = points[-1]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name} by step: {last_value:.4g} at the end">'
    ]
    parts += [f'<path class="grid" d="M{LEFT},{y(t):.1f}H{WIDTH - RIGHT}"/>' for t in y_ticks]
    parts += [f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in y_ticks]
    parts += [f'<text x="{x(t):.1f}" y="{height - 22}" text-anchor="middle">{t:g}</text>' for t in x_ticks]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 4}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{LEFT}" y="14">{name}</text>')
    parts += [f'<path class="again" d="M{x(s):.1f},{TOP}V{height - BOTTOM}"/>' for s in again]
    if smooth and len(points) >= SMOOTH_FROM:
        parts.append(path(thin(points), "raw"))
        parts.append(path(thin(running_mean(points)), "line"))
    else:
        parts.append(path(thin(points), "line"))
    parts.append(f'<circle class="dot" cx="{x(last_step):.1f}" cy="{y(last_value):.1f}" r="4"/>')
    parts.append(
        f'<text class="last" x="{x(last_step) + 9:.1f}" y="{y(last_value) + 4:.1f}">{last_value:.3g}</text></svg>'
    )
    return "\n".join(parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of up to n/20 steps on each side of every point; as many on both, so that it ends on the last value."""
    widest = max(2, len(points) // 20)
    sums = [0.0, *itertools.accumulate(v for _, v in points)]
    smooth = []
    for i, (step, _) in enumerate(points):
        reach = min(widest, i, len(points) - 1 - i)
        start, end = i - reach, i + reach + 1
        smooth.append((step, (sums[end] - sums[start]) / (end - start)))
    return smooth


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    kept = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]
