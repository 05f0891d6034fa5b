"""`python -m benchmarks.artefacts`: consolidating and merging, timed beside DeepSpeed's tool, PEFT, LLaMA-Factory and `cp`.

Every command is run whole, `--repeat` times, in turn; median, least and most are kept. Memory is the largest resident set of the
command's processes, as the kernel counts it (wait4).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .contenders import DROPPED_VARIABLES
from .model_shapes import SHAPES, write_adapter, write_checkpoint, write_model
from .peer_venvs import PEERS, BenchError, ensure_venv
from .processes import run_command

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("consolidate", "consolidate_1b", "adapter_7b", "merge", "merge_1.5b", "memory")
RANK = 64
LIMIT_S = 900
POLL_S = 0.005
BARE = "python with numpy"
COPY = "cp of the result"


@dataclass
class Entry:
    """One command of one row."""

    row: str
    what: str
    contender: str
    argv: list[str]
    out: Path
    """What it writes; removed before each run."""
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    """In 2**20 bytes."""
    result_mb: float = 0.0
    failed: str = ""

    def line(self) -> str:
        if self.failed:
            return f"| {self.what} | {self.contender} | {self.failed} | | |"
        low, high = min(self.seconds), max(self.seconds)
        return (
            f"| {self.what} | {self.contender} | {statistics.median(self.seconds):.2f} ({low:.2f}-{high:.2f}) "
            f"| {statistics.median(self.peak_mb):.0f} | {self.result_mb:.0f} |"
        )


def main(argv: list[str]) -> int:
    """Returns 0, or 1 when a command failed. Raises BenchError when it cannot begin."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.artefacts", description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}; default: all")
    parser.add_argument(
        "--smollm2", type=Path, required=True, help="SmolLM2 as a model folder: prepared.json of a demo run names it"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache/bench/artefacts", help="models and checkpoints; up to 40 GB"
    )
    parser.add_argument("--venvs", type=Path, default=ROOT / ".cache/bench/venvs", help="the peers' environments")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/out/artefacts")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="this project, DeepSpeed and PEFT only")
    args = parser.parse_args(argv)
    rows = args.rows.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        raise BenchError(f"--rows {','.join(unknown)}: unknown", f"Allowed: {', '.join(ROWS)}.")
    if not (args.smollm2 / "config.json").is_file():
        raise BenchError(f"--smollm2 {args.smollm2} is no model folder", "prepared.json of a demo run names one.")
    args.smollm2, args.work = args.smollm2.absolute(), args.work.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    done: list[Entry] = []
    for row in rows:
        for entries in entries_of(row, args):
            measure(entries, args.repeat, args.work)
            done += entries
            write_page(done, args.out)
            print("\n".join(entry.line() for entry in entries), flush=True)
    print(f"wrote {args.out / 'table.md'}")
    return int(any(entry.failed for entry in done))


def entries_of(row: str, args: argparse.Namespace) -> Iterator[list[Entry]]:
    """Lists of commands that are run in turn; inputs are made when their list is asked for."""
    work: Path = args.work
    if row == "consolidate":
        config = json.loads((args.smollm2 / "config.json").read_text(encoding="utf-8"))
        for zero in (2, 3):
            folder = _made(write_checkpoint, work / f"smollm2_zero{zero}", config, zero, 2)
            yield _consolidating(row, f"SmolLM2-135M, ZeRO-{zero}, 2 shards", folder, args.smollm2, work)
    elif row == "consolidate_1b":
        base = _made(write_model, "llama_1.1b", work / "llama_1.1b", args.smollm2)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        for zero, ranks in ((2, 2), (2, 4), (3, 2), (3, 4)):
            # Of its own name: one that an interrupted run left must not pass for another.
            folder = _made(write_checkpoint, work / f"llama_1.1b_zero{zero}_{ranks}", config, zero, ranks)
            yield _consolidating(row, f"1.1B, ZeRO-{zero}, {ranks} shards", folder, base, work)
            shutil.rmtree(folder)
    elif row == "adapter_7b":
        folder = _made(write_checkpoint, work / "qwen2_7b_lora", SHAPES["qwen2_7b"] or {}, 3, 2, RANK)
        out = work / "out"
        argv = [_launch(), "consolidate", str(folder), "--out", str(out)]
        what = f"LoRA r {RANK} of a 7B shape, ZeRO-3, 2 shards"
        yield [Entry(row, what, "tunelaunch", argv, out), _bare(row, what, work)]
    elif row in ("merge", "merge_1.5b"):
        yield _merging(row, "smollm2" if row == "merge" else "qwen2_1.5b", args)
    else:
        for name in ("smollm2", "qwen2_0.5b", "qwen2_1.5b", "qwen2_3b"):
            yield [e for e in _merging(row, name, args) if e.contender in ("tunelaunch", "peft", BARE)]


def _made(make: Callable[..., Path], *args: Any) -> Path:
    """What `make` returns, made by another process: the kernel counts the memory of this one as that of what it starts."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(make, *args).result()


def _launch() -> str:
    return str(Path(sys.executable).parent / "launch")


def _bare(row: str, what: str, work: Path) -> Entry:
    return Entry(row, what, BARE, [sys.executable, "-c", "import numpy"], work / "nothing")


def _consolidating(row: str, what: str, folder: Path, base: Path, work: Path) -> list[Entry]:
    out, theirs, copied = work / "out", work / "out_deepspeed", work / "out_cp"
    ours = [_launch(), "consolidate", str(folder), "--out", str(out), "--base", str(base)]
    deepspeed = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", str(folder), str(theirs)]
    fp32 = [*ours[:-3], str(work / "out_fp32"), *ours[-2:], "--dtype", "fp32"]
    return [
        Entry(row, what, "tunelaunch", ours, out),
        Entry(row, what, "tunelaunch --dtype fp32", fp32, work / "out_fp32"),
        Entry(row, what, "zero_to_fp32 (fp32, a .bin)", deepspeed, theirs),
        Entry(row, what, COPY, ["cp", "-r", str(out), str(copied)], copied),
        _bare(row, what, work),
    ]


def _merging(row: str, name: str, args: argparse.Namespace) -> list[Entry]:
    work: Path = args.work
    base = _made(write_model, name, work / name, args.smollm2)
    adapter = _made(write_adapter, work / f"{name}_adapter", base, RANK)
    what = f"{name}, LoRA r {RANK}"
    out, copied = work / "merged", work / "merged_cp"
    argv = [_launch(), "merge", str(adapter), "--base", str(base), "--out", str(out), "--no-proof"]
    script = str(Path(__file__).with_name("peft_merge.py"))
    peft = work / "merged_peft"
    entries = [
        Entry(row, what, "tunelaunch", argv, out),
        Entry(row, what, "peft", [sys.executable, script, str(base), str(adapter), str(peft)], peft),
        Entry(row, what, COPY, ["cp", "-r", str(out), str(copied)], copied),
        _bare(row, what, work),
    ]
    if row != "memory" and not args.no_peers:
        entries.insert(2, _llamafactory(row, what, base, adapter, args))
    return entries


def _llamafactory(row: str, what: str, base: Path, adapter: Path, args: argparse.Namespace) -> Entry:
    out = args.work / "merged_llamafactory"
    entry = Entry(row, what, "llamafactory export", [], out)
    try:
        venv = ensure_venv(PEERS["llamafactory"], args.venvs.absolute())
    except BenchError as e:
        entry.failed = str(e)
        return entry
    config = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "template": "smollm2",
        "finetuning_type": "lora",
        "export_dir": str(out),
        "export_size": 5,
        "export_device": "cpu",
        "export_legacy_format": False,
        "infer_dtype": "bfloat16",
    }
    file = args.work / "export.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    entry.argv = [str(venv / "bin/llamafactory-cli"), "export", str(file)]
    return entry


def measure(entries: list[Entry], repeat: int, work: Path) -> None:
    """Run the commands in turn, so that a slow minute of the machine meets all of them; the first round warms up."""
    environment = {k: v for k, v in os.environ.items() if k not in DROPPED_VARIABLES} | {"HF_HUB_OFFLINE": "1"}
    for number in range(repeat + 1):
        for entry in entries:
            if entry.failed:
                continue
            for path in (entry.out, *(e.out for e in entries if e.contender == COPY)):
                shutil.rmtree(path, ignore_errors=True)
            log = work / f"{entry.row}_{entries.index(entry)}.log"
            log.unlink(missing_ok=True)
            os.sync()
            ended = run_command(entry.argv, environment, work, log, LIMIT_S, poll_s=POLL_S, sampled=False)
            if ended.exit_code != 0 or ended.timed_out:
                entry.failed = f"exit {ended.exit_code}{', over its limit' * ended.timed_out}, see {log}"
            elif number > 0:
                entry.seconds.append(round(ended.seconds, 3))
                entry.peak_mb.append(round(ended.max_rss_mb, 1))
                entry.result_mb = sum(f.stat().st_size for f in entry.out.rglob("*") if f.is_file()) / 2**20
    for entry in entries:
        shutil.rmtree(entry.out, ignore_errors=True)


def write_page(entries: list[Entry], out: Path) -> None:
    """results.json and table.md, rewritten after each list of commands."""
    lines = []
    for row in dict.fromkeys(entry.row for entry in entries):
        lines += [
            f"## {row}",
            "",
            "| what | contender | s, median (least-most) | peak MB | result MB |",
            "|---|---|---|---|---|",
        ]
        lines += [entry.line() for entry in entries if entry.row == row] + [""]
    lines += ["Commands:", ""]
    lines += [f"- {e.contender}, {e.what}: `{' '.join(e.argv)}`" for e in entries]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    document = json.dumps([asdict(entry) | {"out": str(entry.out)} for entry in entries], indent=1)
    (out / "results.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
