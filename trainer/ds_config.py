"""The DeepSpeed configuration of a run. Pure and standard library only: the launcher puts it into the plan."""

from __future__ import annotations

from typing import Any

from .spec import ModelSpec, OptimSpec, ParallelSpec

REDUCE_BUCKET = {"cuda": 50_000_000, "cpu": 10_000_000}
"""Elements that are reduced, or gathered ahead, at a time: enough to keep a link busy, little beside a model."""
LIVE_PARAMETERS = {"cuda": 300_000_000, "cpu": 30_000_000}
"""Elements of the weights that ZeRO-3 keeps gathered: a few layers. DeepSpeed's own 1e9 gathers a small model whole."""

SUB_GROUP = {"cuda": 100_000_000, "cpu": 20_000_000}
"""Elements of ZeRO-3's masters that are updated at a time: as many fp32 gradients exist beside them."""


def deepspeed_config(model: ModelSpec, optim: OptimSpec, parallel: ParallelSpec) -> dict[str, Any]:
    """Arguments of `deepspeed.initialize(config=...)`: https://www.deepspeed.ai/docs/config-json/

    The micro batch size is 1 here because the engine sees one row: our packed rows are laid end to end.
    """
    bucket = REDUCE_BUCKET[parallel.device]
    zero: dict[str, Any] = {"stage": parallel.zero_stage, "reduce_bucket_size": bucket}
    if parallel.zero_stage in (1, 2):
        zero |= {"overlap_comm": parallel.device == "cuda", "contiguous_gradients": True}
    if parallel.zero_stage == 3:
        live = LIVE_PARAMETERS[parallel.device]
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "sub_group_size": SUB_GROUP[parallel.device],
        }
    if parallel.offload in ("optimizer", "parameters"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": parallel.device == "cuda"}
    if parallel.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": parallel.device == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": optim.accumulate,
        # Whole fp32 gradients are clipped by `engine.clip_whole_gradient`.
        "gradient_clipping": 0.0 if parallel.zero_stage == 0 and model.dtype == "fp32" else optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload, torch's own fused AdamW updates on the CPU: DeepSpeed's would be compiled when the run starts.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    if model.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif model.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    if model.dtype != "fp32" and parallel.zero_stage > 0:
        # Micro batches are added up in fp32: 16 bits lose the small ones. Stage 0 knows no other dtype than the model's, and stage 2
        # with offload keeps to it too (DeepSpeed 0.19.8, accumulated_grads_in_cpu).
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
