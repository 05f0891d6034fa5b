"""results.json -> table.md, with a mark on every comparison that does not hold. Pure and standard library only."""

from __future__ import annotations

import statistics
from typing import Any

from .cases import COMPARED_ROWS, PEERS, PRODUCT, ROWS
from .matmul import useful_flops_per_token
from .trace import LAST_STEPS

FIRST_LOSS_TOLERANCE = 1e-2
LAST_LOSS_TOLERANCE = 2e-2
"""Wider: by then every contender has taken steps of its own, with adapters of other random values and number formats."""
EQUAL_WORK_ROWS = (*COMPARED_ROWS, "zero", "sp")
"""Rows whose cases are given the same work, so that their losses should agree."""

TITLES = {
    "packed": "Packed to 1024 tokens, documents kept apart: 4 micro batches of one row",
    "padded": "Not packed: 4 rows a micro batch, the same rows in the same order for everybody",
    "length": "Length of a packed row, natural documents (tunelaunch)",
    "document": "One document a row (tunelaunch)",
    "zero": "ZeRO stage and processes, two packed rows a step (tunelaunch)",
    "sp": "Sequence parallelism, two packed rows of 2048 tokens a step (tunelaunch, random weights of Qwen2's shape)",
}
NOTES = (
    "Seconds a step: median from the end of one optimizer step to the end of the next; the first 3 steps are left out "
    "(1 where fewer than 6 were taken).",
    "Tokens and supervised tokens are counted from what was fed, without padding, by one rule for everybody.",
    "Matmul share: 4 x parameters x tokens/s, over the matmul rate measured in this run for all layers of the model, "
    "forward and input gradient, 1024 tokens. The head counts for every token, also where it need not be computed.",
    "Peak memory: largest resident set of one process, and sum of proportional set sizes of the process tree (sampled), "
    "both up to the last optimizer step.",
    "First step: from the start of the command to the end of its first optimizer step, with tokenised data cached and byte "
    "code written. It holds 4 micro batches where rows are packed, one where they are not.",
    "All: LoRA r 16, alpha 32, no dropout, all linear layers; AdamW, 2e-4, constant; gradient checkpointing off. "
    "In bf16, LLaMA-Factory's adapters are fp32 under autocast (it allows no pure bf16 on a CPU), and TRL's are what its "
    "command makes of `--dtype bfloat16`.",
)


def table_page(document: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    results = list(document["results"].values())
    parts = [_head(document)]
    for row in ROWS:
        cases = [r for r in results if r["case"]["row"] == row]
        if cases:
            parts.append(f"## {TITLES[row]}\n\n{_table(row, cases, document)}")
    commands = "\n".join(f"{r['case']['row']}, {r['case']['label']}: {r['command']}" for r in results)
    notes = "\n".join(f"- {note}" for note in NOTES)
    return "\n\n".join([*parts, f"## Notes\n\n{notes}", f"## Commands\n\n```\n{commands}\n```"]) + "\n"


def _head(document: dict[str, Any]) -> str:
    machine, matmul = document["machine"], document["matmul"]
    lines = [
        f"# Benchmark of {machine['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['platform']}. "
        f"Data: {document['settings']['data']}, {document['num_rows']} rows.",
        "",
        "| environment | versions |",
        "|---|---|",
    ]
    for name, versions in document["versions"].items():
        lines.append(f"| {name} | {', '.join(f'{k} {v}' for k, v in versions.items())} |")
    if matmul:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in matmul.items())
        rate = f"{document['matmul_rate']:.0f} over all layers of the model"
        lines += ["", f"{document['dtype']} matmul, GFLOP/s: {rate}; {rates}."]
    return "\n".join(lines)


def _table(row: str, results: list[dict[str, Any]], document: dict[str, Any]) -> str:
    marks = marks_of(results) if row in EQUAL_WORK_ROWS else {}
    if row in COMPARED_ROWS:
        columns = ("contender", "steps", "s/step", "tokens/s", "of the best peer", "supervised tokens/s", "padding")
        columns += ("matmul share", "peak MB (tree)", "first step s", "loss", "comparison")
        cells = [_compared(r, results, document, marks) for r in results]
    else:
        columns = (
            "case",
            "steps",
            "s/step",
            "tokens/s",
            "ms a 1000 tokens",
            "of the first",
            "peak MB (tree)",
            "loss",
            "comparison",
        )
        cells = [_scaled(r, results, marks) for r in results]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _compared(
    result: dict[str, Any], results: list[dict[str, Any]], document: dict[str, Any], marks: dict[str, str]
) -> list[str]:
    name, measured = result["case"]["label"], result["measured"]
    if measured is None:
        return [name, *[""] * 10, _state(result)]
    peers = [r["measured"]["tokens_per_s"] for r in results if r["measured"] and r["case"]["contender"] in PEERS]
    ratio = f"{measured['tokens_per_s'] / max(peers):.2f} x" if peers else ""
    padding = "" if measured["padding_share"] is None else f"{measured['padding_share']:.0%}"
    return [
        name,
        _steps(measured),
        f"{measured['seconds_per_step']:.2f}",
        f"{measured['tokens_per_s']:.1f}",
        ratio,
        f"{measured['supervised_per_s']:.1f}",
        padding,
        _matmul_share(measured["tokens_per_s"], document),
        _memory(result),
        f"{measured['first_step_s']:.1f}",
        _losses(measured),
        "; ".join(filter(None, (_state(result), marks.get(name)))),
    ]


def _scaled(result: dict[str, Any], results: list[dict[str, Any]], marks: dict[str, str]) -> list[str]:
    name, measured = result["case"]["label"], result["measured"]
    if measured is None:
        return [name, *[""] * 7, _state(result)]
    base = next(r["measured"]["tokens_per_s"] for r in results if r["measured"])
    return [
        name,
        _steps(measured),
        f"{measured['seconds_per_step']:.2f}",
        f"{measured['tokens_per_s']:.1f}",
        f"{1e6 / measured['tokens_per_s']:.0f}",
        f"{base / measured['tokens_per_s']:.2f} x",
        _memory(result),
        _losses(measured),
        "; ".join(filter(None, (_state(result), marks.get(name)))),
    ]


def _state(result: dict[str, Any]) -> str:
    """Empty for a run that did all its steps and ended well."""
    words = "" if result["state"] == "done" else result["state"]
    reason = " ".join(result["reason"].split()).replace("|", "\\|")
    return ": ".join(filter(None, (words, reason)))


def _steps(measured: dict[str, Any]) -> str:
    return f"{measured['steps']} ({measured['steps'] - measured['skipped_steps']} timed)"


def _memory(result: dict[str, Any]) -> str:
    return f"{result['peak_mb']:.0f} ({result['tree_pss_mb']:.0f})"


def _losses(measured: dict[str, Any]) -> str:
    if measured["first_loss"] is None:
        return ""
    return f"{measured['first_loss']:.4f} -> {measured['last_loss']:.4f}"


def _matmul_share(tokens_per_s: float, document: dict[str, Any]) -> str:
    gflops = useful_flops_per_token(document["num_parameters"]) * tokens_per_s / 1e9
    return f"{gflops:.0f} GF/s, {gflops / document['matmul_rate']:.0%}" if document["matmul_rate"] else ""


def marks_of(results: list[dict[str, Any]]) -> dict[str, str]:
    """Label -> how its losses compare with those of the row's reference: this project's, or the first case's."""
    measured = {r["case"]["label"]: r for r in results if r["measured"]}
    if len(measured) < 2:
        return {}
    reference = measured[PRODUCT] if PRODUCT in measured else next(iter(measured.values()))
    case = reference["case"]
    # A packed row holds any number of documents: there, only equal counts show that the rows are the same.
    rows = 0 if case["packing"] else case["micro_batch"] * case["accumulate"]
    return {
        name: compare(found["measured"], reference["measured"], rows)
        for name, found in measured.items()
        if found is not reference
    }


def compare(found: dict[str, Any], reference: dict[str, Any], spare_tokens: int) -> str:
    """How one run's losses compare with another's, and why they differ when they do.

    Two steps hold the same rows when their tokens differ by `spare_tokens` at most: one a document, because some
    programs learn the line end after an answer and some do not. Such a token adds next to nothing to a sum of losses,
    but something to their number, so sums are compared, over the reference's number.
    """
    pairs = list(zip(found["tokens_of_steps"], reference["tokens_of_steps"], strict=False))
    other = next((i for i, (a, b) in enumerate(pairs, start=1) if abs(a - b) > spare_tokens), None)
    if None in (*found["losses"], *reference["losses"]):
        return "no losses to compare"
    if other == 1:
        a, b = pairs[0]
        means = " and ".join(f"{statistics.fmean(run['losses']):.3f}" for run in (found, reference))
        return (
            f"MARK: losses cannot be compared (means {means}): other rows, {a} tokens in the first step and not {b}, "
            "because every program packs and orders in its own way"
        )
    first = _apart(found, reference, slice(0, 1))
    last = _apart(found, reference, slice(-LAST_STEPS, None))
    extra = pairs[0][0] - pairs[0][1]
    also = f", {abs(extra)} {'more' if extra > 0 else 'fewer'} tokens a step: line ends after answers" if extra else ""
    if first > FIRST_LOSS_TOLERANCE:
        return f"MARK: losses disagree by {first:.4f} in the first step, on the same rows{also}"
    if other is not None:
        a, b = pairs[other - 1]
        return f"MARK: other rows from step {other} on ({a} tokens, not {b}); first losses agree to {first:.4f}"
    if found["steps"] != reference["steps"]:
        return f"first losses agree to {first:.4f}; {found['steps']} steps, not {reference['steps']}"
    if last > LAST_LOSS_TOLERANCE:
        return f"MARK: losses disagree by {last:.4f} at the end, on the same rows{also}"
    return f"same rows{also}; losses agree to {first:.4f} at first, {last:.4f} at the end"


def _apart(found: dict[str, Any], reference: dict[str, Any], steps: slice) -> float:
    """Difference of two runs' sums of losses over `steps`, a supervised token of the reference."""

    def total(run: dict[str, Any]) -> float:
        pairs = zip(run["losses"][steps], run["supervised_of_steps"][steps], strict=True)
        return sum(loss * supervised for loss, supervised in pairs)

    return abs(total(found) - total(reference)) / sum(reference["supervised_of_steps"][steps])
