"""The model that trains: base weights in the recipe's dtype or in 4 bits, with or without adapters.

Shapes: B batch (always 1: a packed row), T row length, D hidden size.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from . import attention, compiled, cpu_dequantize, fused_layers, lora_linear, wide_products
from .loss import supervised_loss_sum, supervised_losses
from .sharded_load import load_sharded
from .spec import MethodSpec, ModelSpec, TrainError, TrainSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PackedLanguageModel(nn.Module):
    """What the engine drives: one packed row in, the summed loss of its supervised tokens out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> Any:
        """The transformers model, adapters injected."""
        peft_model: Any = self.model
        return peft_model.get_base_model() if hasattr(peft_model, "peft_config") else self.model

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        document_lengths: tuple[int, ...],
    ) -> torch.Tensor:
        """fp32 scalar: the sum, not the mean; only the loop knows the step's count of supervised tokens."""
        hidden_BTD = self._hidden(input_ids_BT, position_ids_BT, document_lengths)
        return supervised_loss_sum(hidden_BTD, labels_BT, *self._head())

    def losses(
        self,
        input_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        document_lengths: tuple[int, ...],
    ) -> torch.Tensor:
        """losses_N (fp32): what `forward` adds up, token by token. Without gradient."""
        with torch.no_grad():
            hidden_BTD = self._hidden(input_ids_BT, position_ids_BT, document_lengths)
        return supervised_losses(hidden_BTD, labels_BT, *self._head())

    def _hidden(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, document_lengths: tuple[int, ...]
    ) -> torch.Tensor:
        return self.base.get_decoder()(
            input_ids=input_ids_BT, position_ids=position_ids_BT, document_lengths=document_lengths, use_cache=False
        ).last_hidden_state

    def _head(self) -> tuple[torch.Tensor, torch.Tensor | None, float, float | None]:
        """(weight_VD, bias_V, logit scale, softcap) of the output embedding."""
        base = self.base
        head = base.get_output_embeddings()
        return head.weight, head.bias, _logit_scale(base.config), _softcap(base.config)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters under the names that PEFT or transformers gives them, in model order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load_model(spec: TrainSpec, model_dir: str, device: torch.device) -> PackedLanguageModel:
    """Load the base from `model_dir` and make it trainable, in training mode. Deterministic in `train.seed`.

    Under ZeRO-3 it is loaded in shards. Collective: every rank must call.
    Raises TrainError for a model family whose attention or head packed training does not cover.
    """
    attention.register()
    wide_products.install()
    model, method, optim = spec.model, spec.method, spec.optim
    base = _load_base(spec, model_dir, device)
    _check_family(base)
    base.config.use_cache = False
    torch.manual_seed(optim.seed)
    base.requires_grad_(method.name == "full")
    trainable = base if method.name == "full" else _add_adapters(base, method, model)
    if method.name != "full":
        (lora_linear.fuse if spec.parallel.zero_stage < 3 else lora_linear.round_once)(trainable)
    if optim.compile:
        compiled.compile_layers(base)
    else:
        fused_layers.fuse(trainable)
    if optim.gradient_checkpointing:
        # Non-reentrant: the reentrant kind gives adapters below a frozen embedding no gradient.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # from_pretrained leaves a model in evaluation mode, where dropout does nothing.
    return PackedLanguageModel(trainable).train()


def _load_base(spec: TrainSpec, model_dir: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[spec.model.dtype]
    quantization = None
    if spec.method.name == "qlora":
        cpu_dequantize.install()
        quantization = _nf4(dtype, spec.method.double_quant)
    options = {"attn_implementation": attention.NAME, "trust_remote_code": spec.model.trust_remote_code}
    if spec.parallel.zero_stage == 3:
        base = load_sharded(model_dir, dtype, quantization, spec.deepspeed, device, **options)
    else:
        base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, quantization_config=quantization, device_map={"": device}, **options
        )
    module: Any
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In evaluation bitsandbytes would repack the weights in place, which training then misreads.
            module.support_avx512bf16_for_cpu = False
    return base


def _nf4(compute_dtype: torch.dtype, double_quant: bool) -> Any:
    from transformers import BitsAndBytesConfig

    # Storage in the compute dtype, so that ZeRO-3 may shard the packed weights like any others.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype,
    )


def _add_adapters(base: Any, method: MethodSpec, model: ModelSpec) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets: Any = "all-linear" if method.targets == ("all-linear",) else list(method.targets)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # peft divides it, and any number will do
        lora_dropout=method.dropout,
        target_modules=targets,
        exclude_modules=decoder_only(base),
        task_type="CAUSAL_LM",
    )
    try:
        # The adapters keep the model's dtype: their fp32 masters live in the optimizer.
        peft_model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as e:
        if "arget modules" not in str(e):
            raise
        names = sorted({n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)})
        raise TrainError(
            f"method.targets {list(method.targets)} match no module of {model.source}",
            f"Linear layers: {', '.join(names)}",
        ) from e
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[model.dtype])
    if hasattr(peft_model.get_base_model().get_output_embeddings(), "lora_A"):
        raise TrainError("an adapter on the language-model head is not supported", "Remove it from method.targets.")
    return peft_model


def decoder_only(base: Any) -> str | None:
    """Pattern of the modules beside the decoder (a vision tower), which text does not pass; None where there are none."""
    decoder = base.get_decoder()
    (name,) = [name for name, module in base.named_modules() if module is decoder]
    beside = [
        other
        for other, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not base.get_output_embeddings()
        if not other.startswith(f"{name}.")
    ]
    return rf"(?!{re.escape(name)}\.).*" if beside else None


def _check_family(base: Any) -> None:
    if not getattr(base, "_supports_attention_backend", False):
        raise TrainError(
            f"{type(base).__name__} does not use the attention interface of transformers, which packed rows need",
            "Remove model.trust_remote_code so that transformers' own implementation is used, or choose another model.",
        )


def _logit_scale(config: Any) -> float:
    """Cohere multiplies the logits by `logit_scale`, Granite divides them by `logits_scaling`."""
    scale = getattr(config, "logit_scale", None) or 1.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


def _softcap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None)
