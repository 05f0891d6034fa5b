"""What can be combined with what: the choices, and one rule for each combination that is refused. Data only.

The single source: the checker refuses by these rules, `launch explain compatibility` prints them, and
docs/compatibility.md is made from them. `compatibility.py` has the questions that can be asked of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FULL = "full"
SLIDING = "sliding window"
CHUNKED = "chunked"
LATENT = "latent"
RECURRENT = "recurrent"
SINKS = "sinks"
SOFTCAPPED = "softcapped"
SPARSE = "sparse"

MANY = ">1"
"""Two or more: how many processes, or how many of them share a row."""


JOINED_WHILE_LOADING = frozenset([
    "afmoe", "aria_text", "cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "minimax_m2", "mixtral", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_moe", "solar_open",
])  # fmt: skip
"""model_type of mixtures of experts whose files hold them otherwise than transformers: one by one, or under other names."""


@dataclass(frozen=True)
class Axis:
    """One choice. Values are texts, and neighbours stand in for one another best."""

    name: str
    values: tuple[str, ...]
    key: str
    """The recipe key that decides it; "" for what the model is and where it runs."""
    meaning: str


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("method", ("full", "lora", "qlora"), "method.name", "what is trained"),
        Axis(
            "quantisation",
            ("none", "nf4", "nf4-double", "stored"),
            "method.double_quant",
            "how the base is held: as it is, in 4 bits, its constants quantised too; stored: its files are quantised (GPTQ, AWQ ...)",
        ),
        Axis("zero", ("0", "1", "2", "3"), "parallel.zero", "ZeRO stage"),
        Axis("offload", ("none", "optimizer", "parameters"), "parallel.offload", "what is kept in CPU memory"),
        Axis("dtype", ("fp32", "bf16", "fp16"), "model.dtype", "number format of the forward and backward pass"),
        Axis("sp", ("1", MANY), "parallel.sp", "processes that share a row"),
        Axis("packing", ("off", "on"), "data.packing", "several documents in a row"),
        Axis(
            "attention",
            (FULL, SLIDING, LATENT, CHUNKED, RECURRENT, SINKS, SOFTCAPPED, SPARSE),
            "",
            "what the model's layers do; model.source decides",
        ),
        Axis("device", ("cpu", "cuda"), "", "--gpus or --cpu"),
        Axis("processes", ("1", MANY), "", "devices that train together"),
        Axis("generation", ("off", "on"), "evaluate.samples_every_steps", "answers while training goes on"),
        Axis("compile", ("off", "on"), "train.compile", "torch.compile of the decoder layers"),
    )
}


@dataclass(frozen=True)
class Source:
    """Where a reason can be checked."""

    where: str
    """`PACKAGE==VERSION FILE:LINE`, a file of this project, or an address."""
    quote: str = ""
    """Words of that line of that version; "" for an address."""


@dataclass(frozen=True)
class Rule:
    """A combination that is refused, or that works with a warning."""

    name: str
    when: Mapping[str, tuple[str, ...]]
    """Axis -> the values for which it holds; all of them must. An axis that is not named does not matter."""
    key: str
    """The recipe key that is blamed."""
    reason: str
    """May name the values of axes: "stage {zero} keeps ..."; up to a colon it says what is needed."""
    sources: tuple[Source, ...]
    condition: str = ""
    """What numbers decide as well, in words; such a rule is applied by the code that has the numbers."""
    hint: str = ""
    """What to do where no other value of a recipe key helps."""
    contradiction: bool = False
    """The recipe contradicts itself: refused as soon as it is read, before a plan is made."""
    tried: bool = True
    """False: refused because nobody has seen it work, not because it was seen to fail."""


def _deepspeed(file: str, quote: str) -> Source:
    return Source(f"deepspeed==0.19.8 deepspeed/runtime/{file}", quote)


def _transformers(file: str, quote: str) -> Source:
    return Source(f"transformers==5.23.0 transformers/{file}", quote)


_ULYSSES = "sequence_parallel/ulysses_sp.py"
_OFFLOADED = ("optimizer", "parameters")
_SOFTMAX_MODELS = (
    "What works: models whose layers are all softmax attention, with or without a sliding window, such as\n"
    "Qwen2.5, Qwen3, Llama 3, Mistral, Gemma 3 and SmolLM2."
)


def _kind(kind: str, reason: str, source: Source) -> Rule:
    """A kind of attention that documents in one row do not allow."""
    own = Source("trainer/attention.py")
    return Rule(
        f"{kind}-attention", {"attention": (kind,)}, "model.source", reason, (source, own), hint=_SOFTMAX_MODELS
    )


_OF_QUANTISATION = (
    Rule(
        "full-in-4-bits",
        {"method": ("full",), "quantisation": ("nf4", "nf4-double")},
        "method.double_quant",
        "a weight in 4 bits gets no gradient, so only adapters on top of it can be trained",
        (
            Source(
                "bitsandbytes==0.50.2 bitsandbytes/nn/modules.py:217", "quantized weights should be frozen by default"
            ),
            _transformers("trainer_utils.py:133", "You cannot perform fine-tuning on purely quantized models"),
        ),
    ),
    Rule(
        "lora-in-4-bits",
        {"method": ("lora",), "quantisation": ("nf4", "nf4-double")},
        "method.double_quant",
        "adapters on a base in 4 bits are called qlora; lora keeps the base as it is",
        (Source("https://arxiv.org/abs/2305.14314"),),
    ),
    Rule(
        "qlora-without-4-bits",
        {"method": ("qlora",), "quantisation": ("none",)},
        "method.name",
        "qlora holds the base in 4 bits (NF4); adapters on a base as it is are called lora",
        (Source("https://arxiv.org/abs/2305.14314"),),
    ),
    Rule(
        "stored-quantisation",
        {"quantisation": ("stored",)},
        "model.source",
        "its files hold weights that are quantised already: adapters cannot be merged into them, and they take no gradient",
        (
            Source("https://github.com/hiyouga/LlamaFactory/issues/5625"),
            Source("https://github.com/hiyouga/LlamaFactory/issues/1545"),
            _transformers("trainer_utils.py:133", "You cannot perform fine-tuning on purely quantized models"),
        ),
        hint="Take the model that it was made from, with 16-bit weights; method: qlora holds that in 4 bits while it trains.",
    ),
)

_OF_ZERO = (
    Rule(
        "fp16-without-loss-scale",
        {"dtype": ("fp16",), "zero": ("0",)},
        "parallel.zero",
        "stage 0 does not scale the loss for fp16, so its gradients would be wrong",
        (
            _deepspeed("engine.py:3418", "loss = self.optimizer.scale_if_loss(loss)"),
            _deepspeed("fp16/unfused_optimizer.py:256", "param.grad.data.mul_(1. / combined_scale)"),
        ),
    ),
    Rule(
        "optimizer-without-shards",
        {"offload": ("optimizer",), "zero": ("0",)},
        "parallel.offload",
        "optimizer needs ZeRO stage 1, 2 or 3: stage 0 has no shards to move",
        (_deepspeed("zero/config.py:175", "Valid for ZeRO stage 1, 2, 3."),),
        contradiction=True,
    ),
    Rule(
        "parameters-without-stage-3",
        {"offload": ("parameters",), "zero": ("0", "1", "2")},
        "parallel.offload",
        "parameters needs ZeRO stage 3: stage {zero} keeps the weights whole on the device",
        (_deepspeed("zero/config.py:167", "Valid only with stage 3."),),
        contradiction=True,
    ),
    Rule(
        "4-bit-parameters-moved",
        {"method": ("qlora",), "offload": ("parameters",), "zero": ("3",), "device": ("cuda",)},
        "parallel.offload",
        "parameters is not for 4-bit weights on a GPU: their constants are no parameters, and are not moved",
        (
            Source("bitsandbytes==0.50.2 bitsandbytes/nn/modules.py:237", "self.quant_state = quant_state"),
            Source("https://huggingface.co/docs/peft/accelerate/deepspeed"),
        ),
        tried=False,
    ),
    Rule(
        "experts-under-stage-3",
        {"zero": ("3",)},
        "parallel.zero",
        "the files hold its experts in another form than the model, which ZeRO-3 cannot change while it loads piece by piece",
        (
            _transformers("conversion_mapping.py:368", "MergeModulelist(dim=0)"),
            Source("trainer/sharded_load.py"),
        ),
        condition="the model is a mixture of experts (Mixtral, Qwen2/3-MoE, DeepSeek-V2/V3 ...)",
    ),
    Rule(
        "samples-under-stage-3",
        {"generation": ("on",), "zero": ("3",)},
        "evaluate.samples_every_steps",
        "no rank holds the whole model under ZeRO-3, so it cannot answer while it trains",
        (
            _transformers("generation/utils.py:2644", "DeepSpeed ZeRO Stage 3 with multiple GPUs"),
            Source("trainer/sampling.py"),
        ),
    ),
    Rule(
        "compile-under-stage-3",
        {"compile": ("on",), "zero": ("3",)},
        "train.compile",
        "ZeRO-3 gathers weights between the parts of a layer, which breaks it into pieces that compile anew",
        (
            _deepspeed("zero/parameter_offload.py:358", "@torch.compiler.disable"),
            Source("https://github.com/pytorch/pytorch/issues/115484"),
        ),
    ),
    Rule(
        "compile-without-compiler",
        {"compile": ("on",)},
        "train.compile",
        "torch.compile needs a compiler, and this machine has none on its PATH",
        (Source("torch==2.13.0 torch/_inductor/config.py:1692", 'os.environ.get("CXX"'),),
        condition="the machine has no compiler",
    ),
)

_OF_SHARED_ROWS = (
    Rule(
        "shared-by-one",
        {"sp": (MANY,), "processes": ("1",)},
        "parallel.sp",
        "a row is shared by several processes, and there is one",
        (_deepspeed(f"{_ULYSSES}:110", "self.world_size = dist.get_world_size(process_group)"),),
    ),
    Rule(
        "shared-latent-attention",
        {"sp": (MANY,), "attention": (LATENT,)},
        "parallel.sp",
        "latent attention has keys and values of different sizes, which Ulysses does not send",
        (_deepspeed(f"{_ULYSSES}:302", "assert key.shape == value.shape"),),
    ),
    Rule(
        "shared-heads",
        {"sp": (MANY,)},
        "parallel.sp",
        "sp must divide the processes and the heads; sp and the kv heads must divide one another",
        (
            _deepspeed(f"{_ULYSSES}:148", "is not divisible by SP size"),
            _deepspeed(f"{_ULYSSES}:151", "is not divisible by SP size"),
            Source("https://arxiv.org/abs/2309.14509"),
        ),
        condition="sp does not divide the processes or the heads, or it and the kv heads do not divide one another",
    ),
)

_OF_MODELS = (
    _kind(
        CHUNKED,
        "its chunked attention cuts a row at fixed positions, also inside a document",
        _transformers("masking_utils.py:100", "def chunked_overlay(chunk_size: int"),
    ),
    _kind(
        RECURRENT,
        "its recurrent layers (linear attention, Mamba or convolution) carry one document of a row into the next",
        _transformers("models/qwen3_next/modeling_qwen3_next.py:392", "initial_state: The recurrent state"),
    ),
    _kind(
        SINKS,
        "its attention has sinks, which packed attention does not compute",
        _transformers("models/gpt_oss/modeling_gpt_oss.py:321", "s_aux=self.sinks"),
    ),
    _kind(
        SOFTCAPPED,
        "its attention scores are capped (attn_logit_softcapping), which packed attention does not do",
        _transformers("models/gemma2/modeling_gemma2.py:196", "attn_weights = attn_weights / softcap"),
    ),
    _kind(
        SPARSE,
        "its sparse attention picks positions by an index that does not stop at the end of a document",
        _transformers("models/deepseek_v32/modeling_deepseek_v32.py:240", "topk = min(self.index_topk"),
    ),
    Rule(
        "internlm2-code",
        {},
        "model.source",
        "transformers has no InternLM2, and the code beside its weights fits version 4",
        (Source("https://github.com/InternLM/InternLM/blob/main/tools/convert2llama.py"),),
        condition="model_type is internlm2",
        hint=(
            "InternLM's own tools/convert2llama.py (github.com/InternLM/InternLM) writes the same weights in Llama's format:\n"
            "run it once and give its output folder as model.source; the rest of the recipe stays as it is."
        ),
    ),
    Rule(
        "stretched-positions",
        {},
        "data.max_length",
        "rows of {length} tokens (max_length x micro_batch) are longer than {limit}, where this model's rotary positions "
        "change for all documents of a row at once: packed rows would not equal single ones",
        (_transformers("modeling_rope_utils.py:49", "seq_len = torch.max(position_ids) + 1"),),
        condition="rows are longer than the length at which the model's rotary frequencies change (longrope, dynamic)",
        hint="Keep data.max_length x train.micro_batch at or below {limit}.",
    ),
)

RULES: tuple[Rule, ...] = (*_OF_QUANTISATION, *_OF_ZERO, *_OF_SHARED_ROWS, *_OF_MODELS)
"""Every refusal."""

CAUTIONS: tuple[Rule, ...] = (
    Rule(
        "fp16-on-cpu",
        {"dtype": ("fp16",), "device": ("cpu",)},
        "model.dtype",
        "model.dtype fp16 on a CPU: slower than bf16 (7 times where there are bf16 units), which needs no loss scale either",
        (Source("trainer/wide_products.py"),),
    ),
    Rule(
        "bf16-sums",
        {"dtype": ("bf16",), "zero": ("0",)},
        "parallel.zero",
        "ZeRO stage 0 adds up the gradients of {accumulate} micro batches in bf16, where small ones are lost; parallel.zero: 1 "
        "adds them up in fp32",
        (_deepspeed("engine.py:2323", "unsupported mix of"),),
        condition="a step has several micro batches",
    ),
    Rule(
        "offload-to-itself",
        {"offload": _OFFLOADED, "device": ("cpu",)},
        "parallel.offload",
        "parallel.offload {offload}: this run computes on the CPU, so it costs copies and saves nothing",
        (Source("trainer/ds_config.py"),),
    ),
)
"""What works but is worth a line."""


@dataclass(frozen=True)
class Trial:
    """Combinations that somebody has seen train on a GPU, and where."""

    choice: Mapping[str, str] = field(default_factory=dict)
    where: str = ""


TRIALS: tuple[Trial, ...] = (
    Trial(
        {
            "method": "qlora",
            "quantisation": "nf4-double",
            "zero": "2",
            "offload": "none",
            "dtype": "bf16",
            "sp": "1",
            "packing": "on",
            "attention": FULL,
            "device": "cuda",
            "processes": "1",
            "generation": "off",
            "compile": "off",
        },
        "one H100",
    ),
)
"""What ran on CUDA devices. Whatever is not here has not been run on one."""
