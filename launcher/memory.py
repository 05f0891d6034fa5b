"""How much memory and disk a run needs, before anything starts. Pure arithmetic; every term carries its formula.

Sources of the formulas:
  weights, gradients, optimizer states under ZeRO 0-3: Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1;
  NF4 and its constants: Dettmers et al. 2023, arXiv 2305.14314, section 3 (blocks of 64, second level of 256);
  activations: the tensors that autograd keeps for a transformers Llama or Qwen2 layer, counted with
  `torch.autograd.graph.saved_tensors_hooks`; recomputation: Korthikanti et al. 2022, arXiv 2205.05198;
  head: trainer/loss.py, which makes the logits of 256 supervised positions at a time, in fp32;
  gradients, buckets and gathered weights: what DeepSpeed 0.19 keeps (runtime/bf16_optimizer.py, runtime/zero/), counted
  in full fine-tunes of an 82 M parameter model on two CPU processes.

1 GB is 2**30 bytes, as nvidia-smi and the names of cards count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.ds_config import LIVE_PARAMETERS, REDUCE_BUCKET, SUB_GROUP
from trainer.spec import TrainSpec

from .model_layers import ModelFacts, linear_layers, lora_parameters

GB = 2**30

_WHOLE_BUCKET = 500_000_000  # MEMORY_OPT_ALLREDUCE_SIZE: where whole gradients are reduced, whatever the configuration

_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_HEAD_CHUNK_TOKENS = 256
_CUDA_CONTEXT_GB = 0.5
_NCCL_GB = 0.4
_CPU_PROCESS_GB = 0.6
_SLACK = 0.06


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
    copies_checkpoint: bool
    """A checkpoint is written from a copy, while training goes on."""

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

    @property
    def moves_to_host(self) -> bool:
        """Something leaves the device. On CPU, offloading moves from CPU memory to CPU memory."""
        return self.offload != "none" and self.device == "cuda"


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
    """CPU memory of one process, when something leaves the device."""
    disk_terms: tuple[Term, ...]
    disk_gb: float
    checkpoint_gb: float
    """One checkpoint."""
    is_approximate: bool
    """The model family's layers are not known exactly."""


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
        copies_checkpoint=spec.checkpoint.asynchronous,
    )


def estimate(inputs: MemoryInputs) -> MemoryEstimate:
    """Peak memory of one device and disk of the run. Raises LaunchError for LoRA targets that match no layer."""
    held = [_weights(inputs), _gradients(inputs), _optimizer(inputs)]
    working = [_activations(inputs), _working(inputs)]
    update = _update(inputs)
    # The fp32 gradients of the update exist when the activations are gone: only the larger of the two counts.
    if update.gb > sum(t.gb for t in working):
        working = [update]
    copies = [*_copies(inputs), *([checkpoint_copy(inputs)] if inputs.device == "cpu" else [])]
    terms = [*held, *working, *copies, _runtime(inputs)]
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


def _billions(count: float) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _weights(inputs: MemoryInputs) -> Term:
    num_bytes, constants, text = _base_bytes(inputs)
    if inputs.zero_stage < 3 or inputs.shards == 1:
        return Term("weights", (num_bytes + constants) / GB, text)
    # The largest layer is gathered whole in any case, so loading, which reads layer by layer, never needs more.
    gathered = min(
        num_bytes, max(LIVE_PARAMETERS[inputs.device] * _ELEMENT_BYTES[inputs.dtype], _largest_layer_bytes(inputs))
    )
    text = f"({text}) / {inputs.shards} shards + {gathered / GB:.2f} GB gathered at a time"
    sharded = num_bytes / inputs.shards
    if inputs.device == "cpu":
        # DeepSpeed copies the shards into one piece, and the C library does not give the first ones back.
        sharded, text = 2 * sharded, f"2 x {text}"
    if inputs.offload == "parameters" and inputs.moves_to_host:
        sharded, text = 0.0, f"{gathered / GB:.2f} GB gathered at a time; the rest is in CPU memory"
    if constants:
        text += f" + {constants / GB:.2f} GB of constants on every device"
    return Term("weights", (sharded + gathered + constants) / GB, text)


def _base_bytes(inputs: MemoryInputs) -> tuple[float, float, str]:
    """Bytes of all weights, adapters included; bytes of NF4's constants, which ZeRO does not shard; the arithmetic."""
    facts, size = inputs.facts, _ELEMENT_BYTES[inputs.dtype]
    adapters = 0 if inputs.method == "full" else inputs.num_trainable
    if inputs.method != "qlora":
        count = facts.num_parameters + adapters
        return float(count * size), 0.0, f"{_billions(count)} x {size} bytes ({inputs.dtype})"
    constant = 1 / 64 + 4 / (64 * 256) if inputs.double_quant else 4 / 64
    linear = facts.num_linear_parameters
    other = facts.num_parameters - linear + adapters
    text = f"{_billions(linear)} x {0.5 + constant:.3f} (NF4) + {_billions(other)} x {size} bytes"
    return linear * 0.5 + other * size, linear * constant, text


def _largest_layer_bytes(inputs: MemoryInputs) -> int:
    """The largest of what ZeRO-3 gathers, and reads from disk, at once: the embedding or one linear layer."""
    facts = inputs.facts
    return max(facts.vocab_size, facts.intermediate_size) * facts.hidden_size * _ELEMENT_BYTES[inputs.dtype]


def _sum_bytes(inputs: MemoryInputs) -> int:
    """Bytes of one element in which the gradients of several micro batches are added up."""
    return 4 if inputs.dtype != "fp32" and inputs.zero_stage > 0 else _ELEMENT_BYTES[inputs.dtype]


def _keeps_both_gradients(inputs: MemoryInputs) -> bool:
    """Stage 1 in bf16 is DeepSpeed's BF16_Optimizer: bf16 gradients, and fp32 sums of them, whole on every rank."""
    return inputs.zero_stage == 1 and inputs.dtype == "bf16" and inputs.offload == "none"


def _gradients(inputs: MemoryInputs) -> Term:
    trainable, size, sums = inputs.num_trainable, _ELEMENT_BYTES[inputs.dtype], _sum_bytes(inputs)
    count = _billions(trainable)
    bucket, what = _bucket_bytes(inputs)
    if inputs.zero_stage == 0:
        return Term("gradients", (trainable * size + bucket) / GB, f"{count} x {size} bytes + {what}")
    if _keeps_both_gradients(inputs):
        text = f"{count} x ({size} + {sums}) bytes (bf16, and fp32 sums) + {what}"
        return Term("gradients", (trainable * (size + sums) + bucket) / GB, text)
    if inputs.zero_stage == 1:
        return Term("gradients", (trainable * sums + bucket) / GB, f"{count} x {sums} bytes + {what}")
    if inputs.moves_to_host:
        return Term("gradients", bucket / GB, f"{what}; the rest is in CPU memory")
    shards = f" / {inputs.shards} shards" if inputs.shards > 1 else ""
    return Term(
        "gradients", (trainable * sums / inputs.shards + bucket) / GB, f"{count} x {sums} bytes{shards} + {what}"
    )


def _bucket_bytes(inputs: MemoryInputs) -> tuple[float, str]:
    """Gradients on their way to the other ranks. On CUDA the buffer is made in full, and twice where it is overlapped."""
    size, sums, stage = _ELEMENT_BYTES[inputs.dtype], _sum_bytes(inputs), inputs.zero_stage
    if stage == 0 or _keeps_both_gradients(inputs):
        num_bytes = float(min(inputs.num_trainable, _WHOLE_BUCKET) * sums if inputs.shards > 1 else 0)
    else:
        bucket = REDUCE_BUCKET[inputs.device]
        touched = min(inputs.num_trainable, bucket)
        held = touched if inputs.device == "cpu" else bucket * (1 if stage == 3 else 2)
        # Stage 3 copies the bucket in the dtype of the sums before it cuts it.
        num_bytes = float(held * size + (touched * sums if stage == 3 else 0))
    return num_bytes, f"{num_bytes / GB:.2f} GB reduction buckets"


def _optimizer_bytes(inputs: MemoryInputs) -> tuple[float, str]:
    trainable = _billions(inputs.num_trainable)
    shards = inputs.shards if inputs.zero_stage >= 1 else 1
    per, what = 12, "fp32 master and two moments"
    if inputs.dtype == "fp32" and inputs.zero_stage == 0:
        # The weights are the masters: the other stages copy them.
        per, what = 8, "two fp32 moments"
    text = f"{trainable} x {per} bytes ({what})" + (f" / {shards} shards" if shards > 1 else "")
    return inputs.num_trainable * per / shards, text


def _optimizer(inputs: MemoryInputs) -> Term:
    num_bytes, text = _optimizer_bytes(inputs)
    return Term("optimizer", 0.0 if inputs.moves_to_host else num_bytes / GB, text)


def _layer_bytes(inputs: MemoryInputs) -> int:
    """Bytes per token that one layer keeps for its backward pass (the module docstring names the source)."""
    facts, size = inputs.facts, _ELEMENT_BYTES[inputs.dtype]
    h, i = facts.hidden_size, facts.mlp_width
    q, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    # Two norms keep their fp32 input; a weight that trains keeps the normalised value too.
    norms = 8 * h + (4 if inputs.method == "full" else 2) * h * size
    adapters = 0
    if inputs.method != "full":
        shapes = linear_layers(facts).values()
        adapters = inputs.rank * len(shapes) * size
        if inputs.dropout > 0:
            adapters += sum(layer.inputs for layer in shapes) * (size + 1)
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
    layer = tokens * (3 * facts.mlp_width + 2 * facts.hidden_size) * size
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
    """The fp32 gradients that AdamW reads, where they are a copy."""
    stage, is_fp32 = inputs.zero_stage, inputs.dtype == "fp32"
    is_view = _keeps_both_gradients(inputs) or (stage == 2 and inputs.dtype == "bf16") or (stage == 0 and is_fp32)
    count = inputs.num_trainable if stage == 0 else inputs.num_trainable / inputs.shards
    if stage == 3:
        count = min(count, SUB_GROUP[inputs.device])
    num_bytes = 0.0 if is_view or inputs.moves_to_host else 4.0 * count
    return Term("update", num_bytes / GB, f"{_billions(count)} x 4 bytes (fp32 gradients)")


def _runtime(inputs: MemoryInputs) -> Term:
    if inputs.device == "cpu":
        return Term("process", _CPU_PROCESS_GB, "Python, torch, transformers and DeepSpeed")
    if inputs.shards == 1:
        return Term("CUDA context", _CUDA_CONTEXT_GB, "kernels and libraries")
    return Term("CUDA context", _CUDA_CONTEXT_GB + _NCCL_GB, f"{_CUDA_CONTEXT_GB} GB + {_NCCL_GB} GB NCCL buffers")


def checkpoint_copy(inputs: MemoryInputs) -> Term:
    """What one process copies before a checkpoint is written while training goes on."""
    shards = inputs.shards if inputs.zero_stage >= 1 else 1
    num_bytes = 12 * inputs.num_trainable / shards if inputs.copies_checkpoint else 0.0
    cut = f" / {shards} shards" if shards > 1 else ""
    return Term("checkpoint copy", num_bytes / GB, f"{_billions(inputs.num_trainable)} x 12 bytes{cut}")


def _host(inputs: MemoryInputs) -> tuple[Term, ...]:
    copy = (checkpoint_copy(inputs),) if inputs.copies_checkpoint and inputs.device == "cuda" else ()
    if not inputs.moves_to_host:
        return copy
    num_bytes, text = _optimizer_bytes(inputs)
    terms = [Term("optimizer", num_bytes / GB, text), _gradients_on_host(inputs), *copy]
    if inputs.offload == "parameters":
        base, _, text = _base_bytes(inputs)
        terms.append(Term("weights", base / inputs.shards / GB, f"({text}) / {inputs.shards} shards"))
    return tuple(terms)


def _gradients_on_host(inputs: MemoryInputs) -> Term:
    """fp32 gradients for the update, sums of the micro batches, and the new weights on their way back."""
    per = 4 + _sum_bytes(inputs) + _ELEMENT_BYTES[inputs.dtype]
    text = f"{_billions(inputs.num_trainable)} x {per} bytes / {inputs.shards} shards"
    return Term("gradients", inputs.num_trainable * per / inputs.shards / GB, text)


def _copies(inputs: MemoryInputs) -> tuple[Term, ...]:
    """On CPU, offloading makes its copies all the same, in the memory that it should relieve."""
    if inputs.offload == "none" or inputs.moves_to_host:
        return ()
    return (replace(_gradients_on_host(inputs), name="offload copies"),)


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
