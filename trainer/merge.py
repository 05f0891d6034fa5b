"""Stage `merge`: base + LoRA adapter -> one Hugging Face model folder, streamed, then compared with base + adapter.

Each weight is summed in fp32 and rounded once, which gives the bits that PEFT's merge_and_unload gives. Weights
without an adapter are copied byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint_format import DTYPES
from .disk import new_folder, refuse_existing, require_space, write_json
from .lora_adapter import Adapter, LoraPair, plan_pairs, read_adapter
from .model_folder import OWN_TEMPLATE, copy_companions, has_tokenizer, read_config, stored_tensors, write_config
from .spec import TrainError
from .tensor_files import (
    NUMPY_DTYPES,
    STORED_DTYPES,
    SafetensorsWriter,
    Shard,
    StoredTensor,
    TensorFile,
    all_finite,
    converted,
    in_order,
    parse_size,
    plan_shards,
    write_index,
)
from .tensor_header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

REPORT = "merge_report.json"
BLOCK_ELEMENTS = 2**19
"""Elements of a weight that are summed at a time: 2 MiB of fp32, which stay in the processor's cache."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker merge`."""
    parser.add_argument("--base", help="base model folder; default: base_model_name_or_path of the adapter")
    parser.add_argument("--adapter", required=True, help="adapter folder (PEFT)")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the result; default: as in the base")
    parser.add_argument("--template", default=OWN_TEMPLATE, help="Jinja chat template to put in place of the base's")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, such as 5GB or 2GiB")
    parser.add_argument("--prompts", help="JSON file with more prompts for the comparison: texts, or {user, system}")
    parser.add_argument("--no-proof", action="store_true", help="do not compare the result with base + adapter")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the comparison runs")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")


def run(args: argparse.Namespace) -> None:
    """Raises TrainError: before publishing for a merge that cannot be right, after it when the comparison fails."""
    started = time.perf_counter()
    out = Path(args.out).absolute()
    refuse_existing(out)
    plan = make_plan(args.base, Path(args.adapter).absolute(), args.dtype, parse_size(args.max_shard_size))
    prompts = _read_prompts(args, plan)
    with new_folder(out) as folder:
        report = write(plan, folder, args.template)
        merged_at = time.perf_counter()
        print(
            f"merged {report['tensors_merged']} of {report['tensors']} tensors, {report['bytes'] / 1e6:.1f} MB, "
            f"{merged_at - started:.2f} s",
            flush=True,
        )
        if prompts is not None:
            report |= _proof(args, plan, folder, prompts)
            proof = report["proof"]
            print(
                f"compared with base + adapter: {proof['summary']}, {time.perf_counter() - merged_at:.2f} s", flush=True
            )
            for note in proof["notes"]:
                print(f"note: {note}", flush=True)
        write_json(folder / REPORT, report)
    print(f"wrote {out}", flush=True)
    if report["verified"] is False:
        raise TrainError(
            f"the merged model differs from base + adapter: {'; '.join(report['proof']['failures'])}",
            f"Do not use {out} (its {REPORT} says so); remove it. A narrow miss in fp16 or bf16 goes away with --dtype fp32.",
        )


@dataclass(frozen=True)
class Plan:
    """What will be written, all checked."""

    base: Path
    config: dict[str, Any]
    stored: dict[str, StoredTensor]
    adapter: Adapter
    pairs: dict[str, LoraPair]
    shards: list[Shard]
    dtype: str | None
    """As stored; None keeps each tensor's own."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)

    @property
    def merged_dtype(self) -> str:
        """Recipe word (bf16, fp16, fp32) of the merged weights."""
        stored = self.dtype or self.stored[next(iter(self.pairs))].entry.dtype
        return next(word for word, name in STORED_DTYPES.items() if name == stored)


def make_plan(base: str | None, adapter_dir: Path, dtype: str | None, max_bytes: int) -> Plan:
    """Reads headers and configs only. Raises TrainError when adapter and base do not fit together."""
    adapter = read_adapter(adapter_dir)
    base_dir = _base_folder(base, adapter)
    config = read_config(base_dir)
    stored = stored_tensors(base_dir)
    packed = sorted(name for name, tensor in stored.items() if not tensor.is_float)
    if config.get("quantization_config") and packed:
        raise TrainError(
            f"{base_dir} is quantised ({packed[0]} is {stored[packed[0]].entry.dtype})",
            "Give the original model by --base.",
        )
    pairs = plan_pairs(adapter, stored, bool(config.get("tie_word_embeddings")))
    as_stored = STORED_DTYPES[dtype] if dtype else None
    tensors = [
        TensorSpec(n, as_stored if as_stored and t.is_float else t.entry.dtype, t.entry.shape)
        for n, t in stored.items()
    ]
    return Plan(base_dir, config, stored, adapter, pairs, plan_shards(tensors, max_bytes), as_stored)


def _base_folder(base: str | None, adapter: Adapter) -> Path:
    if base is not None:
        if not Path(base).is_dir():
            raise TrainError(f"--base {base} is not a folder", "Give a Hugging Face model folder.")
        return Path(base).absolute()
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        raise TrainError(
            f"the adapter's base {named!r} is not a folder of this machine", "Give its model folder by --base FOLDER."
        )
    return Path(named).absolute()


def write(plan: Plan, folder: Path, template: str = OWN_TEMPLATE) -> dict[str, Any]:
    """Write weights, config and companions into `folder`. Returns the start of merge_report.json. Raises TrainError."""
    require_space(folder, plan.nbytes)
    with contextlib.ExitStack() as stack:
        paths = {tensor.path for tensor in plan.stored.values()}
        files = {path: stack.enter_context(TensorFile(path)) for path in (*paths, plan.adapter.path)}
        pool = stack.enter_context(_one_thread_each())
        for shard in plan.shards:
            with SafetensorsWriter(folder / shard.file, shard.tensors) as writer:
                for tensor in shard.tensors:
                    _write_tensor(plan, tensor, files, writer, pool)
    write_index(folder, plan.shards)
    write_config(plan.config, folder, plan.dtype)
    copy_companions(plan.base, folder, template)
    return {
        "format": "tunelaunch-merge-1",
        "base": str(plan.base),
        "adapter": str(plan.adapter.path.parent),
        "dtype": plan.merged_dtype,
        "tensors": len(plan.stored),
        "tensors_merged": len(plan.pairs),
        "bytes": plan.nbytes,
        "verified": None,
    }


@contextlib.contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch would use threads, each with a torch of one thread.

    OpenMP's threads meet at a barrier after every operation, which makes a merge 8 times slower on a busy machine.
    """
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


def _write_tensor(
    plan: Plan, tensor: TensorSpec, files: dict[Path, TensorFile], writer: SafetensorsWriter, pool: ThreadPoolExecutor
) -> None:
    source = plan.stored[tensor.name]
    file = files[source.path]
    if tensor.name in plan.pairs:
        _write_merged(plan.pairs[tensor.name], tensor, file, files[plan.adapter.path], writer, pool)
    elif source.entry.dtype == tensor.dtype:
        writer.copy(tensor.name, file, source.entry)
    else:
        for piece in converted(file, tensor.name, tensor.dtype):
            writer.write(tensor.name, piece)


def _write_merged(
    pair: LoraPair,
    tensor: TensorSpec,
    base: TensorFile,
    adapter: TensorFile,
    writer: SafetensorsWriter,
    pool: ThreadPoolExecutor,
) -> None:
    """W + scaling * B @ A, in blocks of whole rows of W. The order of operations is that of peft's LoraLayer."""
    import torch

    lora_a, lora_b = _load_fp32(adapter, pair.lora_a), _load_fp32(adapter, pair.lora_b)
    entry = base.entries[tensor.name]
    num_columns = entry.shape[1]

    def merged_rows(block: tuple[int, int]) -> np.ndarray:
        first, last = block
        weight = torch.empty(last - first, num_columns, dtype=_torch_dtypes()[entry.dtype])
        base.read_bytes_into(entry.start + first * num_columns * weight.element_size(), _bytes_of(weight))
        if pair.transposed:
            update = torch.mm(lora_b, lora_a[:, first:last]).t()
        else:
            update = torch.mm(lora_b[first:last], lora_a)
        update *= pair.scaling
        update += weight
        stored = update.to(_torch_dtypes()[tensor.dtype]).contiguous().view(torch.uint8).numpy()
        if not all_finite(stored.view(NUMPY_DTYPES[tensor.dtype]), tensor.dtype):
            raise TrainError(
                f"{tensor.name} is not finite after merging as {tensor.dtype}",
                "fp16 ends at 65504: try --dtype bf16; if that fails too, base or adapter hold NaN or infinity.",
            )
        return stored

    for rows in in_order(pool, merged_rows, row_blocks(*entry.shape)):
        writer.write(tensor.name, rows)


def row_blocks(num_rows: int, num_columns: int) -> list[tuple[int, int]]:
    """(first, last + 1) of blocks of about BLOCK_ELEMENTS. None is short of 16 rows unless the weight is.

    A matrix product of one row takes another path in BLAS than one of many, and its last bit may differ.
    """
    size = max(16, BLOCK_ELEMENTS // num_columns // 16 * 16)
    bounds = list(range(0, num_rows, size))
    if len(bounds) > 1 and num_rows - bounds[-1] < 16:
        bounds.pop()
    return list(zip(bounds, [*bounds[1:], num_rows], strict=True))


def _load_fp32(file: TensorFile, name: str) -> torch.Tensor:
    import torch

    entry = file.entries[name]
    flat = torch.empty(entry.shape, dtype=_torch_dtypes()[entry.dtype])
    file.read_bytes_into(entry.start, _bytes_of(flat))
    return flat.float()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    import torch

    return tensor.view(torch.uint8).numpy().reshape(-1).data


def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _read_prompts(args: argparse.Namespace, plan: Plan) -> list[str] | None:
    """The texts to compare on; None when no comparison was asked for."""
    from .merge_proof import DEFAULT_PROMPTS, read_prompts

    if args.no_proof:
        return None
    if not has_tokenizer(plan.base):
        raise TrainError(
            f"{plan.base} holds no tokenizer, which the comparison with base + adapter needs",
            "Download it again with its tokenizer, or give --no-proof.",
        )
    return [*DEFAULT_PROMPTS, *(read_prompts(Path(args.prompts)) if args.prompts else [])]


def _proof(args: argparse.Namespace, plan: Plan, folder: Path, prompts: list[str]) -> dict[str, Any]:
    from .merge_proof import prove

    proof = prove(
        base=plan.base,
        adapter=plan.adapter.path.parent,
        merged=folder,
        prompts=prompts,
        dtype=plan.merged_dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    return {"verified": not proof["failures"], "proof": proof}
