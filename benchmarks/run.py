"""`python -m benchmarks.run`: time this project and its peers in turn, and write results.json and table.md.

A folder given by --out that holds results is continued: what has been measured is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.job import ClusterError

from .cases import BUDGET_MINUTES, COMPARED_ROWS, CONTENDERS, PRODUCT, QUICK_STEPS, ROWS, SEED, Case, cases_of
from .contenders import Workshop, command_of
from .inputs import as_fp32, default_rows, num_parameters, read_rows, without_cut_rows, write_inputs, write_qwen2_shape
from .matmul import layer_shapes, model_rate
from .peer_venvs import PEERS, BenchError, ensure_venv, versions
from .processes import run_command
from .table import table_page
from .trace import Trace, measure, read_peer, read_product
from .verdict import DONE, FAILED, judge

ROOT = Path(__file__).resolve().parents[1]
MATMUL_LIMIT_S = 120
MAX_LENGTH = 1024
"""Data rows that are longer are left out of every contender's data."""


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}; default: all")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help=f"of {','.join(CONTENDERS)}; default: all")
    parser.add_argument("--steps", type=int, help="optimizer steps of every case; default: each row's own")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps: does it work? Not for figures")
    parser.add_argument("--data", type=Path, help="Alpaca rows (json, jsonl); default: the shipped chat data, repeated")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of every contender; auto: bf16, or fp32 on a CPU without bf16 instructions, where the peers' bf16 takes hours",
    )
    parser.add_argument("--set", action="append", default=[], dest="sets", help="recipe key of tunelaunch to change")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache/bench", help="models, tokenised data, environments"
    )
    parser.add_argument("--venvs", type=Path, help="the peers' environments; default: CACHE/venvs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/out/<date>-<time>")
    parser.add_argument("--list", action="store_true", help="show the cases and the time they take, and stop")
    args = parser.parse_args(argv)
    for name, allowed in (("rows", ROWS), ("contenders", CONTENDERS)):
        chosen = getattr(args, name).split(",")
        if unknown := [word for word in chosen if word not in allowed]:
            parser.error(f"--{name} {','.join(unknown)}: allowed are {', '.join(allowed)}")
        setattr(args, name, [word for word in allowed if word in chosen])
    if args.steps is not None and args.steps < 2:
        parser.error("--steps must be 2 or more: the first step is never timed")
    if args.quick:
        args.steps = args.steps or QUICK_STEPS
    return args


class Bench:
    """One run of the benchmark: what is known so far is always on disk."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = (args.out or ROOT / "benchmarks/out" / time.strftime("%Y%m%d-%H%M%S")).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.cores = len(os.sched_getaffinity(0))
        settings = {
            "data": str(args.data.resolve()) if args.data else "recipes/data, repeated",
            "steps": args.steps,
            "dtype": args.dtype,
            "sets": args.sets,
        }
        self.document: dict[str, Any] = {
            "settings": settings,
            "machine": _machine(self.cores),
            "versions": {},
            "dtype": "",
            "matmul": {},
            "matmul_rate": 0.0,
            "num_parameters": 0,
            "num_rows": 0,
            "results": {},
        }
        file = self.out / "results.json"
        if file.is_file():
            old = json.loads(file.read_text(encoding="utf-8"))
            if old["settings"] != settings:
                raise BenchError(f"{file} was measured with other settings: {old['settings']}", "Give another --out.")
            self.document = old
        self.broken: dict[str, str] = {}
        """Contender -> why it cannot run."""

    def save(self) -> None:
        """Write results.json and table.md, each whole."""
        for name, text in (
            ("results.json", json.dumps(self.document, indent=1, ensure_ascii=False) + "\n"),
            ("table.md", table_page(self.document)),
        ):
            temporary = self.out / f".{name}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.out / name)

    def prepare(self) -> Workshop:
        """Model, data, environments, machine figures. Raises BenchError."""
        cache = self.args.cache.absolute()
        venvs = (self.args.venvs or cache / "venvs").absolute()
        shipped = default_rows(ROOT / "recipes/data")
        rows = read_rows(self.args.data) if self.args.data else shipped
        first = write_inputs(shipped[:20], self.out / "work/model_inputs", SEED)
        shop = Workshop(cache, venvs, None, None, first, self.cores, "bf16", ())
        model_dir = self._convert_model(shop)
        rows = without_cut_rows(rows, model_dir / "tokenizer.json", MAX_LENGTH)
        self.document["num_parameters"] = num_parameters(model_dir)
        self.document["num_rows"] = len(rows)
        self.document["versions"][PRODUCT] = versions(Path(sys.executable))
        cases = cases_of(self.args.rows, self.args.contenders, self.args.steps, self.cores)
        for name in sorted({case.contender for case in cases} - {PRODUCT}):
            try:
                venv = ensure_venv(PEERS[name], venvs)
                self.document["versions"][name] = versions(venv / "bin/python")
            except BenchError as e:
                self.broken[name] = str(e)
        if not self.document["matmul"]:
            self._measure_matmul(model_dir)
        return replace(
            shop,
            model_dir=as_fp32(model_dir, cache / "model_fp32") if self.document["dtype"] == "fp32" else model_dir,
            qwen2_dir=write_qwen2_shape(cache / "qwen2_shape", model_dir),
            inputs=write_inputs(rows, self.out / "work/inputs", SEED),
            dtype=self.document["dtype"],
            sets=tuple(self.args.sets),
        )

    def _convert_model(self, shop: Workshop) -> Path:
        """SmolLM2 as a Hugging Face folder, by one step of this project. Raises BenchError when that fails."""
        (case,) = cases_of(["padded"], [PRODUCT], 1, self.cores)
        case = replace(case, row="model", micro_batch=1, max_length=256)
        result = self.run_case(case, shop)
        prepared = self.out / "work" / case.name / "run/prepared.json"
        if not prepared.is_file():
            raise BenchError(f"the model could not be prepared: {result['reason']}", f"See {result['log']}")
        return Path(json.loads(prepared.read_text(encoding="utf-8"))["model_dir"])

    def _measure_matmul(self, model_dir: Path) -> None:
        counts = layer_shapes(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
        shapes = [f"{out},{inner}" for out, inner in counts]
        log = self.out / "logs/matmul.log"
        argv = [sys.executable, "-m", "benchmarks.matmul", self.args.dtype, *shapes]
        run_command(argv, {**os.environ, "OMP_NUM_THREADS": str(self.cores)}, ROOT, log, MATMUL_LIMIT_S)
        try:
            measured = json.loads(log.read_text(encoding="utf-8").strip().splitlines()[-1])
            self.document |= {"dtype": measured["dtype"], "matmul": measured["rates"]}
        except (ValueError, IndexError):
            raise BenchError("the matmul rate could not be measured", f"See {log}") from None
        self.document["matmul_rate"] = model_rate(self.document["matmul"], counts)

    def run_case(self, case: Case, shop: Workshop) -> dict[str, Any]:
        """Run one case to its end, whatever that is."""
        folder, log = self.out / "work" / case.name, self.out / "logs" / f"{case.name}.log"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        command = command_of(case, folder, shop)

        def trace() -> Trace:
            return read_product(command.trace) if case.contender == PRODUCT else read_peer(command.trace)

        # This project goes on to merge and evaluate; what is compared ends with training.
        finished = (lambda: len(trace().steps) >= case.steps) if case.contender == PRODUCT else (lambda: False)
        result: dict[str, Any] = {"case": asdict(case), "command": command.line, "log": str(log), "measured": None}
        try:
            ended = run_command(command.argv, command.env, folder, log, case.limit_s, finished)
        except ClusterError as e:
            return {**result, "state": FAILED, "reason": str(e)}
        found = trace()
        text = log.read_text(encoding="utf-8", errors="replace")
        state, reason = judge(case, len(found.steps), ended.exit_code, ended.timed_out, text)
        measured = measure(found, ended.started)
        peak_mb, tree_mb = ended.peaks_until(measured.last_step_time if measured else ended.started + ended.seconds)
        return {
            **result,
            "state": state,
            "reason": reason,
            "exit_code": ended.exit_code,
            "seconds": round(ended.seconds, 2),
            "peak_mb": round(peak_mb, 1),
            "tree_pss_mb": round(tree_mb, 1),
            "max_rss_mb": round(ended.max_rss_mb, 1),
            "measured": measured.to_dict() if measured else None,
        }

    def go(self) -> int:
        """Every case that has no result yet. Returns 1 when one failed; a refused one is a result."""
        shop = self.prepare()
        self.save()
        for row in self.args.rows:
            cases = cases_of([row], self.args.contenders, self.args.steps, self.cores)
            waiting = [c for c in cases if self.document["results"].get(c.name, {}).get("state") != DONE]
            for case in waiting:
                if row in COMPARED_ROWS and case.contender not in self.broken:
                    self._say(case.warm_up(), self.run_case(case.warm_up(), shop))
            for case in waiting:
                result = self._broken(case) if case.contender in self.broken else self.run_case(case, shop)
                self._say(case, result)
                self.document["results"][case.name] = result
                self.save()
        print((self.out / "table.md").read_text(encoding="utf-8"))
        print(f"{self.out / 'table.md'}")
        return int(any(r["state"] == FAILED for r in self.document["results"].values()))

    def _broken(self, case: Case) -> dict[str, Any]:
        reason = self.broken[case.contender]
        return {"case": asdict(case), "command": "", "log": "", "measured": None, "state": FAILED, "reason": reason}

    def _say(self, case: Case, result: dict[str, Any]) -> None:
        measured = result["measured"]
        rate = f"{measured['tokens_per_s']:.1f} tokens/s" if measured else ""
        seconds = f"{result.get('seconds', 0):.0f} s"
        words = (time.strftime("%H:%M:%S"), case.row, case.label, result["state"], rate, seconds, result["reason"])
        print("  ".join(filter(None, words)), flush=True)


def _machine(cores: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": model,
        "cores": cores,
        "memory_gb": round(memory, 1),
        "platform": platform.platform(),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 when a case failed, 2 when the benchmark could not be run."""
    args = arguments(sys.argv[1:] if argv is None else argv)
    if args.list:
        for case in cases_of(args.rows, args.contenders, args.steps, len(os.sched_getaffinity(0))):
            print(f"{case.row:10} {case.label:20} {case.steps} steps, at most {case.limit_s} s")
        print(
            f"about {sum(BUDGET_MINUTES[row] for row in args.rows)} minutes on two cores, and once 5 to install the peers"
        )
        return 0
    # As from Ctrl-C: what is running is ended, and the same command goes on from there.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return Bench(args).go()
    except KeyboardInterrupt:
        return 130
    except BenchError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
