"""Stage `merge`: base + LoRA adapters -> one Hugging Face model folder, streamed, then compared with base + adapters.

Each weight is summed in fp32 and rounded once (`merge_sum`). Weights that no adapter changes are copied byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# One thread for each product, before numpy is loaded: the blocks of a weight are already spread over threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from .checkpoint_format import DTYPES
from .disk import new_folder, refuse_existing, require_space, write_json
from .lora_adapter import Adapter, read_adapter
from .merge_plan import Plan, Source, make_plan
from .merge_sum import Factors, Product, Rows, merged, product_of
from .model_folder import OWN_TEMPLATE, copy_companions, has_tokenizer, has_vocabulary, read_config, write_config
from .nf4 import Nf4, weights_of_folder
from .spec import ModelSpec, TrainError
from .tensor_files import (
    CHUNK,
    STORED_DTYPES,
    SafetensorsWriter,
    Shard,
    TensorFile,
    in_order,
    parse_size,
    read_as,
    to_float32,
    write_index,
)

REPORT = "merge_report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker merge`."""
    parser.add_argument("--base", help="base model; default: base_model_name_or_path of the adapter")
    parser.add_argument("--base-kind", choices=("folder", "gguf", "hub", "modelscope"), default="folder")
    parser.add_argument("--cache-dir", default="", help="for a base that has to be converted")
    parser.add_argument("--adapter", action="append", required=True, help="adapter folder (PEFT); several are added up")
    parser.add_argument("--weight", action="append", type=float, help="factor of the adapter in the same place; 1")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the result; default: as in the base")
    parser.add_argument("--template", default=OWN_TEMPLATE, help="Jinja chat template to put in place of the base's")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, such as 5GB or 2GiB")
    parser.add_argument("--base-precision", choices=("bf16", "nf4"), default="bf16", help="nf4: what QLoRA trained on")
    parser.add_argument("--trained-on-nf4", action="store_true", help="the adapter is one of QLoRA")
    parser.add_argument("--nf4-dtype", choices=DTYPES, help="of QLoRA's computations; default: as in the base")
    parser.add_argument("--nf4-single-quant", action="store_true", help="NF4's scales were not quantised themselves")
    parser.add_argument("--prompts", help="JSON file with more prompts for the comparison: texts, or {user, system}")
    parser.add_argument("--no-proof", action="store_true", help="do not compare the result with base + adapter")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the comparison runs")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")


def run(args: argparse.Namespace) -> None:
    """Raises TrainError: before publishing for a merge that cannot be right, after it when the comparison fails."""
    started = time.perf_counter()
    out = Path(args.out).absolute()
    refuse_existing(out)
    plan, nf4 = plan_of(args)
    prompts = _read_prompts(args, plan)
    with new_folder(out) as folder:
        report = write(plan, folder, args.template, nf4)
        merged_at = time.perf_counter()
        print(
            f"merged {report['tensors_merged']} of {report['tensors']} tensors, {report['bytes'] / 1e6:.1f} MB, "
            f"{merged_at - started:.2f} s",
            flush=True,
        )
        notes = list(plan.notes)
        if prompts is not None:
            report |= _proof(args, plan, folder, prompts, nf4)
            proof = report["proof"]
            report["proof_seconds"] = round(time.perf_counter() - merged_at, 2)
            print(f"compared with base + adapter: {proof['summary']}, {report['proof_seconds']:.2f} s", flush=True)
            notes += proof["notes"]
        for note in notes:
            print(f"note: {note}", flush=True)
        write_json(folder / REPORT, report)
    print(f"wrote {out}", flush=True)
    if report["verified"] is False:
        raise TrainError(
            f"the merged model differs from base + adapter: {'; '.join(report['proof']['failures'])}",
            f"Do not use {out} (its {REPORT} says so); remove it. A narrow miss in fp16 or bf16 goes away with --dtype fp32.",
        )


def plan_of(args: argparse.Namespace) -> tuple[Plan, Nf4 | None]:
    """What will be written, and how NF4 would round the base if the adapter was trained on that. Raises TrainError."""
    weights = args.weight or [1.0] * len(args.adapter)
    if len(weights) != len(args.adapter):
        raise TrainError(f"{len(args.adapter)} adapters and {len(weights)} weights", "Give each adapter its weight.")
    if not np.isfinite(weights).all():
        raise TrainError(f"weights {weights}: expected finite numbers")
    max_bytes = parse_size(args.max_shard_size)
    adapters = [read_adapter(Path(a).absolute(), weight) for a, weight in zip(args.adapter, weights, strict=True)]
    base = _base_folder(args, adapters[0])
    on_nf4 = args.base_precision == "nf4"
    nf4 = None
    if on_nf4 or args.trained_on_nf4:
        nf4 = Nf4(args.nf4_dtype or _half_dtype(base), not args.nf4_single_quant)
    quantised = weights_of_folder(base, args.trust_remote_code) if on_nf4 else frozenset()
    return make_plan(base, adapters, args.dtype, max_bytes, quantised), nf4


def _half_dtype(base: Path) -> str:
    """Of QLoRA's computations, where nobody says: that of a 16-bit base, else bf16."""
    config = read_config(base)
    return "fp16" if config.get("dtype", config.get("torch_dtype")) == "float16" else "bf16"


def _base_folder(args: argparse.Namespace, adapter: Adapter) -> Path:
    if args.base is not None and args.base_kind != "folder":
        from .model_source import materialise

        return materialise(
            ModelSpec(args.base, args.base_kind, args.base, "main", "bf16", args.trust_remote_code, args.cache_dir)
        )
    if args.base is not None:
        if not os.path.isdir(args.base):
            raise TrainError(f"--base {args.base} is not a folder", "Give a Hugging Face model folder.")
        return Path(args.base).absolute()
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not os.path.isdir(named):
        raise TrainError(
            f"the adapter's base {named!r} is not a folder of this machine", "Give its model folder by --base FOLDER."
        )
    return Path(named).absolute()


def write(plan: Plan, folder: Path, template: str = OWN_TEMPLATE, nf4: Nf4 | None = None) -> dict[str, Any]:
    """Write weights, config and companions into `folder`. Returns the start of merge_report.json. Raises TrainError."""
    require_space(folder, plan.nbytes)
    with contextlib.ExitStack() as stack:
        paths = {source.stored.path for source in plan.sources.values()} | {a.path for a in plan.adapters}
        files = {path: stack.enter_context(TensorFile(path)) for path in paths}
        pool, product = stack.enter_context(product_of(STORED_DTYPES[plan.merged_dtype]))
        factors = Factors(files)
        for shard in plan.shards:
            with SafetensorsWriter(folder / shard.file, shard.tensors) as writer:
                # Over all tensors at once: a pause at the end of each would leave the processor idle.
                work = _work(plan, shard, files, nf4, factors, pool, product)
                for name, values in in_order(pool, _done, work):
                    source = plan.sources[name]
                    if values is None:
                        writer.copy(name, files[source.stored.path], source.stored.entry)
                    else:
                        writer.write(name, values)
    write_index(folder, plan.shards)
    write_config(plan.config, folder, plan.dtype)
    copy_companions(plan.base, folder, template, [adapter.path.parent for adapter in plan.adapters])
    return {
        "format": "tunelaunch-merge-2",
        "base": str(plan.base),
        "base_precision": "nf4" if any(source.quantised for source in plan.sources.values()) else "bf16",
        "adapters": [{"folder": str(a.path.parent), "weight": a.weight} for a in plan.adapters],
        "dtype": plan.merged_dtype,
        "tensors": len(plan.sources),
        "tensors_merged": plan.num_changed,
        "bytes": plan.nbytes,
        "verified": None,
    }


Work = tuple[str, Callable[[], np.ndarray] | None]
"""A tensor, and what computes its next piece; None: it is copied whole."""


def _work(
    plan: Plan,
    shard: Shard,
    files: dict[Path, TensorFile],
    nf4: Nf4 | None,
    factors: Factors,
    pool: ThreadPoolExecutor,
    product: Product,
) -> Iterator[Work]:
    """All of a file, in order."""
    for tensor in shard.tensors:
        source = plan.sources[tensor.name]
        file, entry = files[source.stored.path], source.stored.entry
        if source.updates or source.quantised:
            read = _rows_of(source, file, nf4)
            for compute in merged(tensor, read, source.updates, factors, pool, product):
                yield tensor.name, compute
        elif entry.dtype == tensor.dtype:
            yield tensor.name, None
        else:
            for start in range(0, entry.numel, CHUNK):
                size = min(CHUNK, entry.numel - start)
                yield tensor.name, functools.partial(read_as, file, source.name, tensor.dtype, start, size)


def _done(work: Work) -> tuple[str, np.ndarray | None]:
    name, compute = work
    return name, None if compute is None else compute()


def _rows_of(source: Source, file: TensorFile, nf4: Nf4 | None) -> Rows:
    """Reads blocks of whole rows of one weight."""
    entry = source.stored.entry
    num_rows, num_columns = entry.shape[-2:]
    if source.quantised:
        assert nf4 is not None
        whole = _dequantised(source, file, nf4)
        return lambda _, first, last: whole[first:last].copy()

    def read(matrix: int, first: int, last: int) -> np.ndarray:
        start = (matrix * num_rows + first) * num_columns
        values = file.read(source.name, start, (last - first) * num_columns)
        return to_float32(values, entry.dtype).reshape(last - first, num_columns)

    return read


def _dequantised(source: Source, file: TensorFile, nf4: Nf4) -> np.ndarray:
    import torch

    entry = source.stored.entry
    values = to_float32(file.read(source.name), entry.dtype).reshape(entry.shape)
    return nf4.dequantised(torch.from_numpy(values)).float().numpy()


def _read_prompts(args: argparse.Namespace, plan: Plan) -> list[str] | None:
    """The texts to compare on; None when no comparison was asked for."""
    from .merge_proof import DEFAULT_PROMPTS, read_prompts

    if args.no_proof:
        return None
    if not has_tokenizer(plan.base) and not any(has_vocabulary(a.path.parent) for a in plan.adapters):
        raise TrainError(
            f"{plan.base} holds no tokenizer, which the comparison with base + adapter needs",
            "Download it again with its tokenizer, or give --no-proof.",
        )
    return [*DEFAULT_PROMPTS, *(read_prompts(Path(args.prompts)) if args.prompts else [])]


def _proof(args: argparse.Namespace, plan: Plan, folder: Path, prompts: list[str], nf4: Nf4 | None) -> dict[str, Any]:
    from .merge_proof import Subject, prove

    on_nf4 = args.base_precision == "nf4"
    subject = Subject(
        base=plan.base,
        adapters=tuple((adapter.path.parent, adapter.weight) for adapter in plan.adapters),
        merged=folder,
        dtype=plan.merged_dtype,
        vocab_size=plan.new_vocabulary,
        nf4=nf4,
        merged_on_nf4=on_nf4,
    )
    proof = prove(subject, prompts, args.device, args.trust_remote_code)
    return {"verified": not proof["failures"], "proof": proof}
