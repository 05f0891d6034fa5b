"""How much memory and disk a run needs, before anything starts. Pure arithmetic; every term carries its formula.

Sources of the formulas:
  weights, gradients, optimizer states under ZeRO 0-3: Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1;
  NF4 and its constants: Dettmers et al. 2023, arXiv 2305.14314, section 3 (blocks of 64, second level of 256);
  activations: the tensors that autograd keeps for a transformers Llama or Qwen2 layer, counted with
  `torch.autograd.graph.saved_tensors_hooks`; recomputation: Korthikanti et al. 2022, arXiv 2205.05198;
  head: trainer/loss.py, which makes the logits of 256 supervised positions at a time, in fp32;
  live weights of ZeRO-3: `stage3_max_live_parameters`, 1e9 unless set.

1 GB is 2**30 bytes, as nvidia-smi and the names of cards count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.spec import TrainSpec

from .model_facts import ModelFacts, linear_layers, lora_parameters

GB = 2**30

_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_HEAD_CHUNK_TOKENS = 256
_REDUCE_BUCKET = 50_000_000
_LIVE_PARAMETERS = 1_000_000_000
_CUDA_CONTEXT_GB = 0.5
_NCCL_GB = 0.4
_CPU_PROCESS_GB = 0.6
_SLACK = 0.06
_LENGTH_STEP = 256
_DEFAULT_LORA_RANK = 16


@dataclass(frozen=True)
class MemoryInputs:
    """What the estimate depends on. Field meanings are those of `trainer.spec`."""

    facts: ModelFacts
    kind: str
    method: str
    rank: int
    targets: tuple[str, ...]
    dropout: float
    double_quant: bool
    dtype: str
    micro_batch: int
    max_length: int
    gradient_checkpointing: bool
    device: str
    dp: int
    sp: int
    zero_stage: int
    offload: str
    keep: int

    @property
    def num_trainable(self) -> int:
        """Parameters that the optimizer updates."""
        if self.method == "full":
            return self.facts.num_parameters
        return lora_parameters(self.facts, self.rank, self.targets)

    @property
    def shards(self) -> int:
        """ZeRO shards over all ranks: data-parallel and sequence-parallel alike."""
        return self.dp * self.sp


@dataclass(frozen=True)
class Term:
    """One line of the estimate: `gb` = `arithmetic`."""

    name: str
    gb: float
    arithmetic: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak need of one device (on CPU: of one process), of the host, and of the run folder's disk."""

    terms: tuple[Term, ...]
    """Of one device at its peak; their sum is `total_gb`."""
    total_gb: float
    host_terms: tuple[Term, ...]
    """CPU memory of one process, when something is offloaded."""
    disk_terms: tuple[Term, ...]
    disk_gb: float
    checkpoint_gb: float
    """One checkpoint."""
    is_approximate: bool
    """The model family's layers are not known exactly."""


@dataclass(frozen=True)
class Change:
    """One recipe key that makes the run fit."""

    key: str
    value: str
    reason: str
    total_gb: float


def inputs_of(spec: TrainSpec, facts: ModelFacts) -> MemoryInputs:
    """The part of a plan that decides memory."""
    return MemoryInputs(
        facts=facts,
        kind=spec.model.kind,
        method=spec.method.name,
        rank=spec.method.rank,
        targets=spec.method.targets,
        dropout=spec.method.dropout,
        double_quant=spec.method.double_quant,
        dtype=spec.model.dtype,
        micro_batch=spec.optim.micro_batch,
        max_length=spec.data.max_length,
        gradient_checkpointing=spec.optim.gradient_checkpointing,
        device=spec.parallel.device,
        dp=spec.parallel.dp,
        sp=spec.parallel.sp,
        zero_stage=spec.parallel.zero_stage,
        offload=spec.parallel.offload,
        keep=spec.checkpoint.keep,
    )


def estimate(inputs: MemoryInputs) -> MemoryEstimate:
    """Peak memory of one device and disk of the run. Raises LaunchError for LoRA targets that match no layer."""
    held = [_weights(inputs), _gradients(inputs), _optimizer(inputs)]
    working = [_activations(inputs), _working(inputs)]
    update = _update(inputs)
    # The fp32 gradients of the update exist when the activations are gone: only the larger of the two counts.
    if update.gb > sum(t.gb for t in working):
        working = [update]
    terms = [*held, *working, _runtime(inputs)]
    subtotal = sum(t.gb for t in terms)
    terms.append(Term("slack", subtotal * _SLACK, f"{_SLACK:.0%} of the above for rounding and fragmentation"))
    checkpoint_gb = 12 * inputs.num_trainable / GB
    disk = _disk(inputs, checkpoint_gb)
    return MemoryEstimate(
        terms=tuple(t for t in terms if t.gb > 0),
        total_gb=sum(t.gb for t in terms),
        host_terms=_host(inputs),
        disk_terms=disk,
        disk_gb=sum(t.gb for t in disk),
        checkpoint_gb=checkpoint_gb,
        is_approximate=inputs.facts.is_approximate,
    )


def smallest_change(inputs: MemoryInputs, budget_gb: float, max_zero_stage: int = 3) -> Change | None:
    """The first single change, from harmless to costly, with which one device needs at most `budget_gb`.

    None when the run fits as it is, or when no single change is enough. `max_zero_stage` is the highest that this
    device set can train.
    """
    if estimate(inputs).total_gb <= budget_gb:
        return None
    for key, value, reason, changed in _candidates(inputs, budget_gb, max_zero_stage):
        total = estimate(changed).total_gb
        if total <= budget_gb:
            return Change(key, value, reason, total)
    return None


def _candidates(
    inputs: MemoryInputs, budget_gb: float, max_zero_stage: int
) -> Iterator[tuple[str, str, str, MemoryInputs]]:
    replace = dataclasses.replace
    if not inputs.gradient_checkpointing:
        changed = replace(inputs, gradient_checkpointing=True)
        yield "train.gradient_checkpointing", "true", "same result, about a third more time", changed
    if inputs.micro_batch > 1:
        reason = f"with train.accumulate {inputs.micro_batch} times larger the result is the same"
        yield "train.micro_batch", "1", reason, replace(inputs, micro_batch=1)
    if inputs.method != "qlora":
        rank = inputs.rank or _DEFAULT_LORA_RANK
        targets = inputs.targets or ("all-linear",)
        if inputs.method == "full":
            changed = replace(inputs, method="lora", rank=rank, targets=targets)
            yield "method", "lora", f"trains {changed.num_trainable / 1e6:.1f} M adapter weights only", changed
        changed = replace(inputs, method="qlora", rank=rank, targets=targets, double_quant=True)
        if inputs.device == "cuda":
            yield "method", "qlora", "holds the base model in 4 bits", changed
    if inputs.shards > 1:
        for stage in range(inputs.zero_stage + 1, max_zero_stage + 1):
            changed = replace(inputs, zero_stage=stage)
            yield "parallel.zero", str(stage), f"shards more over the {inputs.shards} devices", changed
    length = _longest_that_fits(inputs, budget_gb)
    if length:
        reason = "longer documents are cut or dropped (data.too_long)"
        yield "data.max_length", str(length), reason, replace(inputs, max_length=length)
    if inputs.offload == "none" and inputs.device == "cuda":
        yield "parallel.offload", "optimizer", "same result, slower steps", replace(inputs, offload="optimizer")


def _longest_that_fits(inputs: MemoryInputs, budget_gb: float) -> int:
    """Largest multiple of 256 tokens below max_length that fits, or 0."""
    low, high = 0, (inputs.max_length - 1) // _LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = estimate(dataclasses.replace(inputs, max_length=middle * _LENGTH_STEP)).total_gb <= budget_gb
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * _LENGTH_STEP


def _billions(count: float) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _weights(inputs: MemoryInputs) -> Term:
    facts, size = inputs.facts, _ELEMENT_BYTES[inputs.dtype]
    adapters = 0 if inputs.method == "full" else inputs.num_trainable
    if inputs.method == "qlora":
        constants = 1 / 64 + 4 / (64 * 256) if inputs.double_quant else 4 / 64
        other = facts.num_parameters - facts.num_linear_parameters + adapters
        num_bytes = facts.num_linear_parameters * (0.5 + constants) + other * size
        text = f"{_billions(facts.num_linear_parameters)} x {0.5 + constants:.3f} (NF4) + {_billions(other)} x {size} bytes"
    else:
        num_bytes = float((facts.num_parameters + adapters) * size)
        text = f"{_billions(facts.num_parameters + adapters)} x {size} bytes ({inputs.dtype})"
    if inputs.zero_stage == 3 and inputs.shards > 1:
        live = min(num_bytes, _LIVE_PARAMETERS * num_bytes / facts.num_parameters)
        sharded = 0.0 if inputs.offload == "parameters" else num_bytes / inputs.shards
        text = f"({text}) / {inputs.shards} shards + {live / GB:.2f} GB gathered at a time"
        if inputs.offload == "parameters":
            text = f"{live / GB:.2f} GB gathered at a time; the rest is in CPU memory"
        num_bytes = sharded + live
    return Term("weights", num_bytes / GB, text)


def _gradients(inputs: MemoryInputs) -> Term:
    trainable, size = inputs.num_trainable, _ELEMENT_BYTES[inputs.dtype]
    if inputs.zero_stage >= 2 and inputs.shards > 1:
        bucket = min(trainable, _REDUCE_BUCKET) * size * (2 if inputs.device == "cuda" else 1)
        own = 0.0 if inputs.offload != "none" else trainable * size / inputs.shards
        text = (
            f"{_billions(trainable)} x {size} bytes / {inputs.shards} shards + {bucket / GB:.2f} GB reduction buckets"
        )
        return Term("gradients", (own + bucket) / GB, text)
    return Term("gradients", trainable * size / GB, f"{_billions(trainable)} x {size} bytes")


def _optimizer_bytes(inputs: MemoryInputs) -> tuple[float, str]:
    trainable = _billions(inputs.num_trainable)
    if inputs.zero_stage == 0 and inputs.dtype == "fp32":
        return inputs.num_trainable * 8.0, f"{trainable} x 8 bytes (two fp32 moments)"
    shards = inputs.shards if inputs.zero_stage >= 1 else 1
    text = f"{trainable} x 12 bytes (fp32 master and two moments)" + (f" / {shards} shards" if shards > 1 else "")
    return inputs.num_trainable * 12 / shards, text


def _optimizer(inputs: MemoryInputs) -> Term:
    num_bytes, text = _optimizer_bytes(inputs)
    return Term("optimizer", 0.0 if inputs.offload != "none" else num_bytes / GB, text)


def _layer_bytes(inputs: MemoryInputs) -> int:
    """Bytes per token that one layer keeps for its backward pass (the module docstring names the source)."""
    facts, size = inputs.facts, _ELEMENT_BYTES[inputs.dtype]
    h, i = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    # Two norms keep their fp32 input; a weight that trains keeps the normalised value too.
    norms = 8 * h + (4 if inputs.method == "full" else 2) * h * size
    adapters = 0
    if inputs.method != "full":
        shapes = linear_layers(facts).values()
        adapters = inputs.rank * len(shapes) * size
        if inputs.dropout > 0:
            adapters += sum(n for n, _ in shapes) * (size + 1)
    return norms + (3 * q + 2 * kv + 4 * i) * size + adapters


def _tokens(inputs: MemoryInputs) -> tuple[int, str]:
    tokens = -(-inputs.micro_batch * inputs.max_length // inputs.sp)
    text = f"{inputs.micro_batch} x {inputs.max_length} tokens" + (f" / sp {inputs.sp}" if inputs.sp > 1 else "")
    return tokens, text


def _activations(inputs: MemoryInputs) -> Term:
    tokens, text = _tokens(inputs)
    if inputs.gradient_checkpointing:
        per_token = inputs.facts.hidden_size * _ELEMENT_BYTES[inputs.dtype]
        what = "bytes (layer inputs; the rest is recomputed)"
    else:
        per_token, what = _layer_bytes(inputs), "bytes"
    num_bytes = tokens * inputs.facts.num_layers * per_token
    return Term("activations", num_bytes / GB, f"{text} x {inputs.facts.num_layers} layers x {per_token} {what}")


def _working(inputs: MemoryInputs) -> Term:
    """Short-lived tensors at the peak: the head's chunk and gradients, or one layer in its backward pass."""
    facts, size = inputs.facts, _ELEMENT_BYTES[inputs.dtype]
    tokens, _ = _tokens(inputs)
    chunk = _HEAD_CHUNK_TOKENS * facts.vocab_size * (8 + 2 * size)
    head = chunk + 2 * tokens * facts.hidden_size * size
    text = f"head: {_HEAD_CHUNK_TOKENS} positions x {facts.vocab_size} tokens x {8 + 2 * size} bytes"
    if inputs.method == "full":
        head += facts.vocab_size * facts.hidden_size * 8
        text += f" + its gradient {facts.vocab_size} x {facts.hidden_size} x 8 bytes"
    layer = tokens * (3 * facts.intermediate_size + 2 * facts.hidden_size) * size
    what = "gradients inside one layer"
    if inputs.gradient_checkpointing:
        layer += tokens * _layer_bytes(inputs)
        what = "one recomputed layer and its gradients"
    if inputs.method == "qlora":
        layer += facts.hidden_size * facts.intermediate_size * size
        what += ", one dequantised weight"
    if layer > head:
        return Term("working", layer / GB, f"{what} (the head needs {head / GB:.2f} GB at another time)")
    return Term("working", head / GB, text)


def _update(inputs: MemoryInputs) -> Term:
    shards = inputs.shards if inputs.zero_stage >= 1 else 1
    num_bytes = 0 if inputs.dtype == "fp32" or inputs.offload != "none" else inputs.num_trainable * 4 / shards
    return Term("update", num_bytes / GB, f"{_billions(inputs.num_trainable)} x 4 bytes (fp32 gradients) / {shards}")


def _runtime(inputs: MemoryInputs) -> Term:
    if inputs.device == "cpu":
        return Term("process", _CPU_PROCESS_GB, "Python, torch, transformers and DeepSpeed")
    if inputs.shards == 1:
        return Term("CUDA context", _CUDA_CONTEXT_GB, "kernels and libraries")
    return Term("CUDA context", _CUDA_CONTEXT_GB + _NCCL_GB, f"{_CUDA_CONTEXT_GB} GB + {_NCCL_GB} GB NCCL buffers")


def _host(inputs: MemoryInputs) -> tuple[Term, ...]:
    if inputs.offload == "none":
        return ()
    num_bytes, text = _optimizer_bytes(inputs)
    gradients = inputs.num_trainable * 4 / inputs.shards
    terms = [
        Term("optimizer", num_bytes / GB, text),
        Term("gradients", gradients / GB, f"{_billions(inputs.num_trainable)} x 4 bytes / {inputs.shards} shards"),
    ]
    if inputs.offload == "parameters":
        size = _ELEMENT_BYTES[inputs.dtype]
        text = f"{_billions(inputs.facts.num_parameters)} x {size} bytes / {inputs.shards} shards"
        terms.append(Term("weights", inputs.facts.num_parameters * size / inputs.shards / GB, text))
    return tuple(terms)


def _disk(inputs: MemoryInputs, checkpoint_gb: float) -> tuple[Term, ...]:
    """The run folder and the caches at their fullest: the newest checkpoint is written before the oldest goes."""
    size = _ELEMENT_BYTES[inputs.dtype]
    model_gb = inputs.facts.num_parameters * size / GB
    model = f"{_billions(inputs.facts.num_parameters)} x {size} bytes"
    trainable = _billions(inputs.num_trainable)
    copies = inputs.keep + 1
    terms = [
        Term("checkpoints", checkpoint_gb * copies, f"{trainable} x 12 bytes x ({inputs.keep} kept + 1 being written)")
    ]
    if inputs.method != "full":
        terms.append(Term("adapter", inputs.num_trainable * size / GB, f"{trainable} x {size} bytes"))
    terms.append(Term("model" if inputs.method == "full" else "merged", model_gb, model))
    if inputs.kind in ("gguf", "random"):
        terms.append(Term("converted base", model_gb, f"{model}, in the cache"))
    elif inputs.kind in ("hub", "modelscope") and inputs.facts.weight_bytes_on_disk == 0:
        terms.append(Term("download", model_gb, f"{model}, in the cache"))
    return tuple(terms)
