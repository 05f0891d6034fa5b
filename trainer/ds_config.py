"""The DeepSpeed configuration of a run. Pure and standard library only: the launcher puts it into the plan."""

from __future__ import annotations

from typing import Any

from .spec import ModelSpec, OptimSpec, ParallelSpec


def deepspeed_config(model: ModelSpec, optim: OptimSpec, parallel: ParallelSpec) -> dict[str, Any]:
    """Arguments of `deepspeed.initialize(config=...)`: https://www.deepspeed.ai/docs/config-json/

    The micro batch size is 1 here because the engine sees one row: our packed rows are laid end to end.
    """
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage in (1, 2):
        # One bucket of a few hundred MB of fp32 gradients is enough to keep a link busy, and small models need no more.
        zero |= {
            "overlap_comm": parallel.device == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
        }
    if parallel.offload in ("optimizer", "parameters"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": parallel.device == "cuda"}
    if parallel.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": parallel.device == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": optim.accumulate,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    if parallel.sp > 1:
        config["sequence_parallel_size"] = parallel.sp
    if model.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        # Micro batches are added up in fp32: bf16 loses the small ones.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif model.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    return config
