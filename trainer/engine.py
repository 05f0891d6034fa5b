"""The DeepSpeed engine, and the only file that knows where DeepSpeed keeps master weights and moments.

Every function that talks to other ranks says so: "Collective: every rank must call".
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but missing from its stub

from .model import PackedLanguageModel
from .sequence_parallel import share_rows
from .spec import OptimSpec, TrainSpec

STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. Axes: dp (data parallel) and sp (sequence parallel); sp ranks are neighbours."""

    rank: int
    local_rank: int
    world_size: int
    dp_rank: int
    sp_rank: int
    device: torch.device


@dataclass(frozen=True)
class Fragment:
    """The slice of one trainable parameter whose master weights this rank owns."""

    name: str
    start: int
    numel: int
    tensors: dict[str, torch.Tensor]
    """Live fp32 views (numel,) under STATES: writing into them changes the optimizer."""


def init_ranks(spec: TrainSpec) -> Ranks:
    """Join the process group. Collective: every rank must call. The wait ends after `parallel.timeout_s`."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    assert world_size == spec.parallel.world_size, f"started {world_size} processes, planned {spec.parallel.world_size}"
    torch.set_num_threads(spec.parallel.threads_per_process)
    backend, device = "gloo", torch.device("cpu")
    if spec.parallel.device == "cuda":
        backend, device = "nccl", torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=spec.parallel.timeout_s)
    if not dist.is_initialized():
        if world_size == 1:
            # A store in memory: one process needs no port, and cannot fail for want of one.
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    # Here, and not in deepspeed.initialize: ZeRO-3 already cuts the weights while they are loaded.
    start_deepspeed(timeout)
    sp = spec.parallel.sp
    return Ranks(rank, local_rank, world_size, dp_rank=rank // sp, sp_rank=rank % sp, device=device)


def start_deepspeed(timeout: timedelta) -> None:
    """Let DeepSpeed use the process group that there is. Collective: every rank must call. `timeout` limits its waits."""
    import deepspeed
    from deepspeed.utils import groups

    _load_muon_uncompiled()
    # On CPU DeepSpeed would compile a shared-memory collective at its first start (30 s, and a compiler); gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        # It asks for 16-bit instructions, without which `wide_products` multiplies.
        accelerator.is_fp16_supported = lambda: True
    elif accelerator.device_name() == "cuda":
        ask_torch_for_free_memory(accelerator)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    if groups._WORLD_GROUP is None:
        # The group on which ZeRO reduces and gathers: DeepSpeed would make it with torch's default limit.
        groups._WORLD_GROUP = dist.new_group(range(dist.get_world_size()), timeout=timeout)


def ask_torch_for_free_memory(accelerator: Any) -> None:
    """DeepSpeed asks NVML by position, and takes what CUDA_VISIBLE_DEVICES says for numbers: it ends at a UUID (0.19.8)."""
    accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]


def _load_muon_uncompiled() -> None:
    """DeepSpeed loads its Muon optimizer at every start, and with it torch's compiler: 1.5 s for what nobody asks for."""
    from deepspeed.runtime import compiler

    compile_function, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # for its side effect
    finally:
        compiler.compile = compile_function


def build_engine(model: PackedLanguageModel, spec: TrainSpec) -> Any:
    """`deepspeed.initialize` with AdamW over the trainable parameters. Collective: every rank must call."""
    import deepspeed

    optimizer = _adamw(model, spec.optim)
    if spec.parallel.zero_stage == 3:
        # The loss reads the head's weight outside the head's own forward.
        head = model.base.get_output_embeddings()
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(model, parameter)
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=spec.deepspeed, dist_init_required=False
    )
    set_optimizer_step(engine, 0)
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        # The loop counts skipped steps, and stops with an error of its own.
        scaler.raise_error_at_min_scale = False
    if spec.parallel.sp > 1:
        share_rows(model.base, spec.parallel.sp, timedelta(seconds=spec.parallel.timeout_s))
    return engine


def _adamw(model: nn.Module, optim: OptimSpec) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(full_shape(p)) >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if len(full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    # Rate 0 until the first step sets it: some of DeepSpeed's optimizers take a step when they are made.
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Rate of the next update, for every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def local_fragments(engine: Any) -> list[Fragment]:
    """The fragments that this rank holds, in model order. Under ZeRO-0 every rank holds everything."""
    whole = _whole_masters(engine) if engine.zero_optimization_stage() == 0 else None
    fragments = []
    for name, parameter in engine.module.trainable().items():
        if whole is not None:
            place = (whole[parameter], 0, 0, parameter.numel())
        elif hasattr(parameter, "ds_tensor"):
            place = _place_zero3(engine, parameter)
        else:
            place = _place(engine, parameter)
        if place is None:
            continue
        flat, at, start, numel = place
        state = _adam_state(_adamw_of(engine), flat)
        tensors = {"master": flat.detach().view(-1).narrow(0, at, numel)}
        tensors |= {key: state[key].view(-1).narrow(0, at, numel) for key in STATES[1:]}
        fragments.append(Fragment(name, start, numel, tensors))
    return fragments


Place = tuple[torch.Tensor, int, int, int]
"""(flat fp32 partition, offset in it, first element of the parameter, number of elements)."""


def _whole_masters(engine: Any) -> dict[nn.Parameter, torch.Tensor]:
    """Stage 0: the fp32 copy of each 16-bit parameter, or the fp32 parameter itself."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return {p: p for group in optimizer.param_groups for p in group["params"]}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _place(engine: Any, parameter: Any) -> Place | None:
    """Stages 1 and 2: all parameters of a group end to end, cut into one slice a rank."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = _flat_partitions(engine.optimizer)[mapping.param_group_index]
    address = mapping.hp_fragment_address
    return flat, address.start, mapping.lp_fragment_address.start, address.numel


def _place_zero3(engine: Any, parameter: Any) -> Place | None:
    """Stage 3: every parameter cut into one slice a rank; the last ones are padded, or hold nothing at all."""
    optimizer = engine.optimizer
    group, at, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank() * padded
    numel = min(padded, parameter.ds_numel - start)
    return (_flat_partitions(optimizer)[group], at, start, numel) if numel > 0 else None


def weight_slice(parameter: Any) -> tuple[torch.Tensor, int]:
    """The part of a parameter that lies on this rank: its elements, flat, and the first one's number."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.data.view(-1), 0
    start = dist.get_rank() * shard.ds_numel
    return shard.data[: max(parameter.ds_numel - start, 0)], start


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The parameter's own shape, also where ZeRO-3 has left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def optimizer_step(engine: Any) -> int:
    """AdamW's own count of updates: the number that its bias correction uses."""
    return int(_adam_state(_adamw_of(engine), _masters(engine)[0])["step"])


def set_optimizer_step(engine: Any, step: int) -> None:
    """Put AdamW's count of updates back, as `optimizer_step` gave it."""
    for master in _masters(engine):
        _adam_state(_adamw_of(engine), master)["step"].fill_(float(step))


def clip_whole_gradient(engine: Any, max_norm: float) -> float | None:
    """Clip, and return the norm before, where no shard of DeepSpeed's does: fp32 under ZeRO-0; None elsewhere.

    To be called when a micro batch's backward pass is done. The sum is in fp64: on CPU torch's own fp32 norm of
    1e7 elements is off by 1e-3.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer) or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradients) ** 0.5
    if norm > max_norm > 0:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def _masters(engine: Any) -> list[torch.Tensor]:
    if engine.zero_optimization_stage() == 0:
        return list(_whole_masters(engine).values())
    return _flat_partitions(engine.optimizer)


def _adamw_of(engine: Any) -> torch.optim.Optimizer:
    """AdamW itself, inside DeepSpeed's optimizer or, for fp32 under ZeRO-0, without one."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """fp16's dynamic loss scale and its counters; empty for the other dtypes."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in LOSS_SCALER_STATE}


def set_loss_scaler_state(engine: Any, state: dict[str, float]) -> None:
    """Put the loss scale back, as `loss_scaler_state` gave it."""
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value)


def _flat_partitions(zero_optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 master partitions: one a parameter group, or one a sub-group for stage 3."""
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        partitions = getattr(zero_optimizer, name, None)
        if partitions:
            return partitions
    raise AssertionError(f"{type(zero_optimizer).__name__} keeps its master weights in an unknown place")


def _adam_state(adamw: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of one flat partition, made with zeros where no step has been taken yet."""
    state = adamw.state[flat]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)
    return state
