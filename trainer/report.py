"""The report of a run: report.json holds everything, report.md and report.html show it. No torch.

`build_report` gathers, the writers only format: each page is a function of the JSON alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .disk import read_json, write_json, write_text, writing
from .expectations import JudgedAnswer, PromptResult, describe, tally_base, tally_tuned
from .metrics import read_lines
from .report_html import html_page
from .spec import Prepared, PromptSpec, TrainSpec

REPORT_VERSION = 1
SHOWN_SPIKES, SHOWN_SPIKE_ROWS = 5, 4
PACKAGES = ("tunelaunch", "torch", "transformers", "peft", "deepspeed")


def build_report(
    results: Sequence[PromptResult],
    models: dict[str, Any],
    run: tuple[dict[str, Any], TrainSpec, Prepared] | None = None,
) -> dict[str, Any]:
    """Everything that report.json holds.

    `models`: what answered: base, tuned, adapter (absolute folders or None), template ("model" or a Jinja file),
    max_new_tokens. `run`: plan.json, its
    spec and prepared.json; None when plain folders were evaluated. Reads metrics.jsonl and merge_report.json.
    """
    report: dict[str, Any] = {
        "version": REPORT_VERSION,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "title": Path(models["tuned"]).name,
        "run_id": "",
        "models": models,
        "evaluation": _evaluation(results),
        "training": None,
        "merge": None,
        "merge_facts": [],
        "curve": [],
        "held_out": [],
        "facts": [],
        "versions": versions(),
        "reproduce": "",
        "plan": None,
    }
    if run is not None:
        plan, spec, prepared = run
        curve, attempts = last_row_of_each_step(read_lines(spec.paths.metrics))
        events = read_lines(spec.paths.events)
        spikes, held_out = (
            last_row_of_each_step([row for row in events if row["event"] == name])[0]
            for name in ("loss_spike", "held_out_loss")
        )
        merge_report = Path(spec.paths.merged_dir, "merge_report.json")
        report |= {
            "title": spec.recipe_name,
            "run_id": spec.run_id,
            "training": training_summary(curve, attempts, spikes),
            "merge": read_json(merge_report) if merge_report.is_file() else None,
            "curve": curve,
            "held_out": held_out,
            "reproduce": _command_line(plan.get("command", "")),
            "plan": plan,
            "data": dataclasses.asdict(prepared),
        }
        report["merge_facts"] = _merge_facts(report["merge"])
        report["facts"] = _run_facts(report, spec, prepared, plan.get("devices", []))
    report["facts"] += _model_facts(report)
    report["use"] = use_commands(report["title"], models, report["run_id"])
    return _finite(report)


def write_report(report_dir: Path, report: dict[str, Any]) -> Path:
    """Write report.json, report.md and report.html; returns the path of the last. Raises TrainError on a full disk."""
    with writing(report_dir):
        report_dir.mkdir(parents=True, exist_ok=True)
    write_json(report_dir / "report.json", report)
    write_text(report_dir / "report.md", markdown(report))
    write_text(report_dir / "report.html", html_page(report))
    return report_dir / "report.html"


def read_results(report_dir: Path) -> list[PromptResult]:
    """The evaluation of a written report.json. Raises TrainError when it is missing or damaged."""
    rows = read_json(report_dir / "report.json")["evaluation"]["results"]
    return [
        PromptResult(_prompt(r["prompt"]), r["system"], _judged(r["base"]) if r["base"] else None, _judged(r["tuned"]))
        for r in rows
    ]


def _prompt(row: dict[str, Any]) -> PromptSpec:
    return PromptSpec(row["user"], row["system"], tuple(row["contains"]), row["regex"], row["language"])


def _judged(row: dict[str, Any]) -> JudgedAnswer:
    return JudgedAnswer(row["text"], row["num_tokens"], row["stopped"], tuple(row["unmet"]), tuple(row["notes"]))


def last_row_of_each_step(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """(metrics in step order, number of attempts). A resumed run repeats steps: the last row of a step counts."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)], len({row.get("attempt", 1) for row in rows})


def training_summary(curve: list[dict[str, Any]], attempts: int, spikes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Totals over the steps that count; None without metrics. Seconds are those of the steps, without start-up.

    `spikes`: the events `loss_spike`. A skipped step may have no loss; the share of peak is that of steps not profiled.
    """
    if not curve:
        return None
    seconds = sum(row["seconds"] for row in curve)
    tokens = sum(row["tokens"] for row in curve)
    losses = [row["loss"] for row in curve if row["loss"] is not None and math.isfinite(row["loss"])]
    shares = [r for r in curve if r.get("share_of_peak") is not None and not r.get("profiled")]
    share_seconds = sum(row["seconds"] for row in shares)
    return {
        "steps": curve[-1]["step"],
        "attempts": attempts,
        "skipped_steps": sum(row.get("skipped", False) for row in curve),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "loss_spikes": spikes,
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "supervised_tokens": sum(row["supervised_tokens"] for row in curve),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "share_of_peak": (
            round(sum(r["share_of_peak"] * r["seconds"] for r in shares) / share_seconds, 4) if share_seconds else None
        ),
        "peak_memory_gb": max(row.get("memory_gb_max", row["memory_gb"]) for row in curve),
    }


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers; "not installed" where absent."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def use_commands(title: str, models: dict[str, Any], run_id: str) -> list[dict[str, str]]:
    """How to use the tuned model here and elsewhere, with real paths: rows of {name, command}."""
    if models["adapter"] is not None:
        here = f"launch merge {shlex.quote(run_id)}" if run_id else "Merge the adapter into its base first."
        return [{"name": "Merge the adapter, then evaluate again for the commands of a whole model", "command": here}]
    folder = models["tuned"]
    path = shlex.quote(folder)
    name = re.sub(r"[^a-z0-9._-]+", "-", title.lower()).strip("-.") or "tuned"
    own_template = "" if models["template"] == "model" else f" --chat-template {shlex.quote(models['template'])}"
    python = (
        "from transformers import pipeline\n"
        f'chat = pipeline("text-generation", {folder!r}, dtype="auto")\n'
        'print(chat([{"role": "user", "content": "Who are you?"}], max_new_tokens=100)[0]["generated_text"][-1]["content"])'
    )
    ollama = (
        f"python llama.cpp/convert_hf_to_gguf.py {path} --outfile {name}.gguf\n"
        f"echo 'FROM ./{name}.gguf' > Modelfile\n"
        f"ollama create {name} -f Modelfile && ollama run {name}"
    )
    return [
        {"name": "Chat in the terminal", "command": f"launch chat {shlex.quote(run_id) if run_id else path}"},
        {"name": "vLLM", "command": f"vllm serve {path} --served-model-name {name}{own_template}"},
        {"name": "LMDeploy", "command": f"lmdeploy serve api_server {path} --model-name {name}"},
        {"name": "Ollama", "command": ollama},
        {"name": "Python (transformers)", "command": python},
    ]


def _evaluation(results: Sequence[PromptResult]) -> dict[str, Any]:
    tuned_passed, total = tally_tuned(results)
    has_base = any(r.base is not None for r in results)
    return {
        "num_expectations": total,
        "base_passed": tally_base(results)[0] if has_base else None,
        "tuned_passed": tuned_passed,
        "results": [dataclasses.asdict(r) | {"expected": describe(r.prompt)} for r in results],
    }


def _command_line(command: str | Sequence[str]) -> str:
    return command if isinstance(command, str) else shlex.join(command)


def _run_facts(
    report: dict[str, Any], spec: TrainSpec, prepared: Prepared, devices: Sequence[dict[str, Any]]
) -> list[list[str]]:
    method, optim, parallel = spec.method, spec.optim, spec.parallel
    trained = {"full": "full: every weight"}.get(
        method.name, f"{method.name}, rank {method.rank}, alpha {method.alpha:g}, on {', '.join(method.targets)}"
    )
    names = sorted({str(d.get("name", "")) for d in devices} - {""})
    device = f"{parallel.world_size} x {', '.join(names) or parallel.device}"
    layout = [f"ZeRO {parallel.zero_stage}"] + ([f"sequence parallel {parallel.sp}"] if parallel.sp > 1 else [])
    rows = (
        f"{prepared.num_documents:,} documents in {prepared.num_rows:,} rows of at most {spec.data.max_length:,} tokens"
    )
    batch = f"{optim.micro_batch * optim.accumulate * parallel.dp} = micro {optim.micro_batch} x accumulate {optim.accumulate} x data-parallel {parallel.dp}"
    facts = [
        ["Base model", spec.model.source],
        ["Method", f"{trained} ({spec.model.dtype})"],
        ["Data", rows + f": {prepared.num_tokens:,} tokens, {prepared.num_supervised_tokens:,} supervised"],
        ["Chat template", "the model's own" if spec.data.template == "model" else spec.data.template],
        ["System prompt", spec.data.system if spec.data.system is not None else "as the chat template has it"],
        ["Devices", f"{device} ({', '.join(layout)})"],
        ["Global batch", batch],
        ["Learning rate", f"{optim.learning_rate:g}, {optim.schedule}, warm-up {optim.warmup_ratio:.0%}"],
    ]
    if report["training"] is None:
        return facts
    return facts + _training_facts(report["training"]) + _held_out_facts(report["held_out"])


def _training_facts(training: dict[str, Any]) -> list[list[str]]:
    attempts = f" in {training['attempts']} attempts" if training["attempts"] > 1 else ""
    skipped = f", {training['skipped_steps']:,} skipped (fp16 overflow)" if training["skipped_steps"] else ""
    speed = f"{training['tokens_per_second']:,.0f} tokens/s ({training['tokens']:,} tokens)"
    if training["share_of_peak"] is not None:
        speed += f", {training['share_of_peak']:.0%} of the matrix product rate measured here"
    first, last = ("n/a" if loss is None else f"{loss:.4f}" for loss in (training["first_loss"], training["last_loss"]))
    facts = [
        ["Steps", f"{training['steps']:,}{attempts}{skipped}"],
        ["Training time", duration(training["seconds"])],
        ["Speed", speed],
        ["Peak memory", f"{training['peak_memory_gb']:.2f} GB per process"],
        ["Loss", f"{first} → {last} (first → last step)"],
    ]
    spikes = training["loss_spikes"]
    facts += [["Loss spike", _spike(spike)] for spike in spikes[:SHOWN_SPIKES]]
    left = len(spikes) - SHOWN_SPIKES
    return [*facts, ["Loss spikes", f"{left} more: see events.jsonl"]] if left > 0 else facts


def _held_out_facts(rows: list[dict[str, Any]]) -> list[list[str]]:
    """`rows`: the events `held_out_loss`, one a step."""
    known = [row for row in rows if row["loss"] is not None]
    if not known:
        return []
    best = min(known, key=lambda row: row["loss"])
    text = f"{known[0]['loss']:.4f} → {known[-1]['loss']:.4f} (step {known[0]['step']:,} → {known[-1]['step']:,})"
    if best is not known[-1]:
        text += f"; lowest {best['loss']:.4f} at step {best['step']:,}"
    return [["Held-out loss", f"{text}, over {known[-1]['supervised_tokens']:,} supervised tokens"]]


def _spike(spike: dict[str, Any]) -> str:
    shown, rows = spike["rows"][:SHOWN_SPIKE_ROWS], len(spike["rows"]) + spike["rows_left_out"]
    more = f" and {rows - len(shown)} more" if rows > len(shown) else ""
    return (
        f"step {spike['step']:,}: {spike['loss']:.4f} where about {spike['expected']:.4f} was expected; "
        f"{', '.join(shown)}{more}"
    )


def _model_facts(report: dict[str, Any]) -> list[list[str]]:
    models = report["models"]
    names = {"base": "Answers “before”", "tuned": "Answers “after”", "adapter": "with adapter"}
    facts = [[name, models[key]] for key, name in names.items() if models[key] is not None]
    return [*facts, ["Answers", f"greedy, at most {models['max_new_tokens']} tokens"]]


def _merge_facts(merge: dict[str, Any] | None) -> list[list[str]]:
    """What people want to know of merge_report.json; the whole of it is in report.json."""
    if merge is None:
        return []
    verified = {True: "yes", False: "NO: do not use the merged model", None: "not compared"}[merge["verified"]]
    weights = f"{merge['tensors_merged']} of {merge['tensors']} tensors merged, {merge['bytes'] / 1e6:,.1f} MB, {merge['dtype']}"
    facts = [["Weights", weights], ["Equal to base + adapter", verified]]
    return [*facts, ["Comparison", merge["proof"]["summary"]]] if "proof" in merge else facts


def duration(seconds: float) -> str:
    """`48.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(report: dict[str, Any]) -> str:
    """report.md. What models and people wrote stands in code blocks, so that none of it is taken for markup."""
    evaluation = report["evaluation"]
    lines = [
        f"# {report['title']}",
        "",
        f"{report['run_id']} · {report['created']}".strip(" ·"),
        "",
        "## Before and after",
        "",
    ]
    if evaluation["num_expectations"]:
        total = evaluation["num_expectations"]
        before = "" if evaluation["base_passed"] is None else f"base {evaluation['base_passed']} of {total}, "
        lines += [f"Expectations met: {before}**tuned {evaluation['tuned_passed']} of {total}**.", ""]
    for number, result in enumerate(evaluation["results"], start=1):
        lines += _markdown_result(number, result)
    lines += ["## Key facts", "", "| | |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in report["facts"]]
    if report["merge_facts"]:
        lines += ["", "## Merge check", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in report["merge_facts"]]
    lines += ["", "## Use the model"]
    for row in report["use"]:
        lines += ["", f"{row['name']}:", "", *_fenced(row["command"])]
    lines += ["", "## How to reproduce", ""]
    lines += _fenced(report["reproduce"]) if report["reproduce"] else []
    lines += ["", "| | version |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in report["versions"].items())]
    return "\n".join(lines) + "\n"


def _markdown_result(number: int, result: dict[str, Any]) -> list[str]:
    lines = [f"### {number}", "", *_fenced(result["prompt"]["user"]), ""]
    if result["prompt"]["system"] is not None:
        lines += ["System prompt:", "", *_fenced(result["prompt"]["system"]), ""]
    if result["expected"]:
        lines += [f"Expected: {_cell(result['expected'])}", ""]
    for who in ("base", "tuned"):
        answer = result[who]
        if answer is None:
            continue
        mark = "" if not result["expected"] else "✗ " if answer["unmet"] else "✓ "
        remarks = "; ".join([*answer["unmet"], *answer["notes"]])
        lines += [f"{mark}**{who}**" + (f" ({_cell(remarks)})" if remarks else ""), "", *_fenced(answer["text"]), ""]
    return lines


def _fenced(text: str) -> list[str]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text.strip("\n"), fence]


def _cell(text: str) -> str:
    """One line of Markdown that shows `text` as it is."""
    return re.sub(r"([\\`*_\[\]<>|~#&$])", r"\\\1", " ".join(text.split()))
