"""Some optimizer steps whose numbers are kept, so that two layouts of one run can be compared: `launch verify parallel`.

Model, engine and `train_step` are those of training, and the update is real; but no checkpoint is written. The folder holds
  probe.json                    what each step read and gave, and how far its gradients are from another probe's
  gradients_step_1.safetensors  chosen gradients, fp32, as they are before clipping
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from .data import Batch, TokenData, num_steps
from .disk import read_json, write_json, writing
from .engine import Ranks, build_engine, full_shape, init_ranks, loss_scaler_state, set_learning_rate
from .loss import IGNORE
from .model import load_model
from .spec import Prepared, TrainSpec, read_plan
from .train import learning_rate, train_step

PROBE = "probe.json"
MAX_SKIPPED = 16
"""Steps that fp16 may skip while it finds its loss scale; they do not count."""
MAX_TENSORS = 8
MAX_GATHERED = 2**28
"""Elements of the largest tensor whose gradient is gathered: 1 GiB in fp32."""
MAX_KEPT = 2**22
"""Elements of a gradient that are kept; of a larger one, evenly spread elements."""
NO_ROW = -2
_LAYER = re.compile(r"\.(\d+)\.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `-m trainer.worker probe`."""
    parser.add_argument("--plan", required=True, help="plan.json of this layout")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps to take")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--against", default="", help="folder of an earlier probe to compare the gradients with")


def run(args: argparse.Namespace) -> None:
    """Take the steps and write the folder. Collective: every rank must call."""
    spec = read_plan(args.plan)
    print(f"plan {spec.digest()} run {spec.run_id}", flush=True)
    ranks = init_ranks(spec)
    out = Path(args.out)
    found = probe(spec, Prepared.read(spec.paths.prepared), ranks, args.steps, out)
    if ranks.rank == 0:
        found["differences"] = differences(out, Path(args.against), found["steps"]) if args.against else []
        write_json(out / PROBE, found)
    dist.destroy_process_group()


def probe(spec: TrainSpec, prepared: Prepared, ranks: Ranks, num_wanted: int, out: Path) -> dict[str, Any]:
    """Take `num_wanted` steps, fewer where the run has fewer. Returns what probe.json holds, but for the differences.

    Collective: every rank must call. Rank 0 writes the gradients into `out`. `seconds` include gathering them.
    """
    data = ObservedData.open(prepared.data_dir)
    assert isinstance(data, ObservedData)
    total_steps = num_steps(data.num_rows, spec.optim, spec.parallel.dp)
    model = load_model(spec, prepared.model_dir, ranks.device)
    turn_dropout_off(model)
    engine = build_engine(model, spec)
    witness = Witness(engine, data, spec, ranks)
    if ranks.rank == 0:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    steps: list[dict[str, Any]] = []
    for step in range(min(total_steps, num_wanted + MAX_SKIPPED)):
        if sum(not s["skipped"] for s in steps) == num_wanted:
            break
        set_learning_rate(engine, learning_rate(step, total_steps, spec.optim))
        result = train_step(engine, spec, data, ranks, step, before_update=witness.take_gradients)
        row = {
            "step": step + 1,
            "loss": _finite(result.loss),
            "grad_norm": _finite(result.grad_norm),
            "skipped": result.skipped,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            **witness.observed(),
            "seconds": round(result.seconds, 4),
        }
        steps.append(row)
        if ranks.rank == 0:
            print(f"step {step + 1} loss {result.loss:.6f} grad_norm {result.grad_norm:.6f}", flush=True)
            _write_gradients(_gradient_file(out, step + 1), {} if result.skipped else witness.gradients)
    return {
        "digest": spec.digest(),
        "num_layers": model.base.config.get_text_config().num_hidden_layers,
        "gradients": {name: list(full_shape(p)) for name, p in witness.parameters.items()},
        "steps": steps,
    }


class ObservedData(TokenData):
    """The token cache, which also remembers the rows that it was asked for."""

    def __init__(self, data_dir: Path, index: dict[str, Any]) -> None:
        super().__init__(data_dir, index)
        self.asked: list[int] = []

    def batch(self, rows: Sequence[int], length: int) -> Batch:
        self.asked.extend(rows)
        return super().batch(rows, length)


class Witness:
    """Sees what a step feeds to the model and which gradients come of it, independently of what the step says."""

    def __init__(self, engine: Any, data: ObservedData, spec: TrainSpec, ranks: Ranks) -> None:
        self.engine, self.data, self.ranks = engine, data, ranks
        self.rows_per_rank = spec.optim.accumulate * spec.optim.micro_batch
        trainable: dict[str, nn.Parameter] = engine.module.trainable()
        names = choose_tensors({name: full_shape(p) for name, p in trainable.items()})
        self.parameters = {name: trainable[name] for name in names}
        self.gradients: dict[str, torch.Tensor] = {}
        """Of the last step, by name: fp32 on the CPU, see `kept`; on rank 0 only."""
        self.seen = torch.zeros(2, dtype=torch.int64, device=ranks.device)
        engine.module.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        input_ids_BT, labels_BT = inputs[:2]
        self.seen[0] += input_ids_BT.numel()
        self.seen[1] += (labels_BT != IGNORE).sum()

    def take_gradients(self) -> None:
        """Gather the chosen gradients, without fp16's loss scale. Collective: every rank must call."""
        from deepspeed.utils import safe_get_full_grad

        scale = loss_scaler_state(self.engine).get("cur_scale", 1.0)
        for name, parameter in self.parameters.items():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None, f"{name} got no gradient"
            if self.ranks.rank == 0:
                self.gradients[name] = kept(gradient.detach()) / scale

    def observed(self) -> dict[str, Any]:
        """What the ranks read since the last call. Collective: every rank must call.

        rows: row numbers by rank; positions and supervised_seen: tokens and labels that reached the model, all ranks together.
        """
        asked = [*self.data.asked[: self.rows_per_rank], *[NO_ROW] * (self.rows_per_rank - len(self.data.asked))]
        mine = torch.tensor(asked, dtype=torch.int64, device=self.ranks.device)
        rows = [torch.empty_like(mine) for _ in range(self.ranks.world_size)]
        dist.all_gather(rows, mine)
        dist.all_reduce(self.seen)
        positions, supervised = self.seen.tolist()
        self.data.asked.clear()
        self.seen.zero_()
        return {"rows": [r.tolist() for r in rows], "positions": positions, "supervised_seen": supervised}


def turn_dropout_off(model: nn.Module) -> None:
    """Every layout would draw other random numbers."""
    for module in model.modules():
        settings: Any = module
        if isinstance(module, nn.Dropout):
            settings.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            settings.attention_dropout = 0.0


def choose_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """At most 8 names, in model order: of the first, middle and last layer, and of embeddings, last norm and head if trainable."""
    names = [name for name, shape in shapes.items() if math.prod(shape) <= MAX_GATHERED]
    outside = [name for name in names if not _LAYER.search(name)]
    layers: dict[int, list[str]] = {}
    for name in names:
        if (layer := _LAYER.search(name)) and len(shapes[name]) > 1:
            layers.setdefault(int(layer.group(1)), []).append(name)
    inner = list(layers.values())
    chosen = [*outside[:1], *outside[-2:]]
    if inner:
        # In pairs: a LoRA module's two matrices stand side by side, and before the first update A has no gradient.
        middle = inner[len(inner) // 2]
        at = len(middle) // 4 * 2
        chosen += [*inner[0][:2], *inner[-1][-2:], *middle[at : at + 2]]
    few = set(list(dict.fromkeys(chosen))[:MAX_TENSORS])
    return [name for name in names if name in few]


def kept(gradient: torch.Tensor) -> torch.Tensor:
    """The elements of a gradient that are kept: flat, fp32, on the CPU, never a view."""
    flat = gradient.reshape(-1)
    stride = -(-flat.numel() // MAX_KEPT)
    # A stride that shares no factor with the row length passes through all columns.
    while math.gcd(stride, gradient.shape[-1]) > 1:
        stride += 1
    return flat[::stride].to("cpu", torch.float32, copy=True)


def differences(ours: Path, theirs: Path, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each step taken in both folders and each tensor: |a - b| / max(|a|, |b|) in L2, and the largest |a_i - b_i|.

    Both are None where a gradient is not finite. No row for a step that either skipped.
    """
    other = {s["step"]: s for s in read_json(theirs / PROBE)["steps"]}
    found = []
    for step in (s["step"] for s in steps if s["step"] in other and not s["skipped"]):
        if other[step]["skipped"]:
            continue
        here, there = load_file(_gradient_file(ours, step)), load_file(_gradient_file(theirs, step))
        for name, gradient in here.items():
            relative, largest = _difference(gradient.double(), there[name].double())
            found.append({"step": step, "name": name, "relative": _finite(relative), "max_abs": _finite(largest)})
    return found


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    apart = a - b
    size = max(a.norm().item(), b.norm().item())
    return (apart.norm().item() / size if size else 0.0), apart.abs().max().item()


def _gradient_file(folder: Path, step: int) -> Path:
    return folder / f"gradients_step_{step}.safetensors"


def _write_gradients(path: Path, gradients: dict[str, torch.Tensor]) -> None:
    if gradients:
        with writing(path):
            save_file(gradients, str(path))


def _finite(value: float) -> float | None:
    """JSON has no word for infinity or NaN."""
    return value if math.isfinite(value) else None
