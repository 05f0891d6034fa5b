"""What a model is, without torch: sizes from config.json, a GGUF header, the local Hub cache, or a built-in table."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attention_kinds import RECURRENT, REFUSED, kinds_of_config, kinds_of_gguf
from .errors import LaunchError
from .gguf_header import GgufHeader, SkippedArray, read_gguf_header
from .known_models import known_chat_template, known_config
from .model_source import SourceRef, resolve_source

__all__ = [
    "ModelFacts",
    "SourceRef",
    "hub_cache_dir",
    "linear_layers",
    "lora_parameters",
    "read_facts",
    "resolve_source",
    "stored_quantisation",
]

_MAX_SAFETENSORS_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder. Counts are in parameters, `weight_bytes_on_disk` in bytes (0: not on this disk)."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_positions: int
    """0 when the model does not say."""
    sliding_window: int | None
    """Tokens; None when every token may attend to all before it."""
    attention: tuple[str, ...]
    """Kinds of attention_kinds.py that its layers have; never empty."""
    num_experts: int
    """0 for a dense model."""
    num_parameters: int
    num_linear_parameters: int
    """Weights of the decoder's linear layers: what QLoRA holds in 4 bits and LoRA adds to. Not the head."""
    weight_bytes_on_disk: int
    has_chat_template: bool | None
    """None: only the download can tell."""
    known_from: str
    """For people: "config.json", "gguf header", "config.json in the Hub cache", "built-in table"."""
    is_approximate: bool
    """The family's layers are not known here: counts assume a Llama-like decoder."""
    stretches_beyond: int = 0
    """Row length in tokens above which rotary frequencies depend on the longest position of the row; 0: they never do."""


@dataclass(frozen=True)
class _Family:
    fused: str = ""
    """"" for q_proj, k_proj, ...; "internlm2" or "phi3" for families that fuse some of them."""
    qkv_bias: bool = False
    """Biases on q, k, v whatever config.json says."""
    qk_norm: bool = False
    norms_per_layer: int = 2
    tied_by_default: bool = False


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=True),
    "internlm2": _Family(fused="internlm2"),
    "phi3": _Family(fused="phi3"),
    "smollm3": _Family(tied_by_default=True),
    "gemma": _Family(tied_by_default=True),
    "gemma2": _Family(norms_per_layer=4, tied_by_default=True),
    "gemma3_text": _Family(norms_per_layer=4, qk_norm=True, tied_by_default=True),
}
# Names of the same quantity in config.json, first match wins.
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner"),
    "num_heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
}


def read_facts(ref: SourceRef, revision: str = "main") -> ModelFacts | None:
    """Sizes of the model that `ref` names, or None when only a download can tell. Reads headers, never weights.

    Raises LaunchError for a config.json or GGUF header that is damaged, with file and line or byte, and for a model
    without attention.
    """
    if ref.kind == "gguf":
        return _facts_of_gguf(read_gguf_header(Path(ref.location)))
    if ref.kind in ("folder", "random"):
        return _facts_of_folder(Path(ref.location), "config.json", count_weights=ref.kind == "folder")
    cached = _cached_folder(ref, revision)
    if cached is not None:
        where = "Hub" if ref.kind == "hub" else "ModelScope"
        return _facts_of_folder(cached, f"config.json in the {where} cache", count_weights=True)
    known = known_config(ref.location)
    if known is None:
        return None
    return _facts_of_config(known, "built-in table", {}, 0, known_chat_template(ref.location))


def linear_layers(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """The linear layers of one decoder layer: name as in transformers -> (inputs, outputs)."""
    h, i = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    fused = _FAMILIES.get(facts.model_type, _Family()).fused
    if fused == "internlm2":
        layers = {"attention.wqkv": (h, q + 2 * kv), "attention.wo": (q, h)}
        mlp = {"feed_forward.w1": (h, i), "feed_forward.w3": (h, i), "feed_forward.w2": (i, h)}
    elif fused == "phi3":
        layers = {"self_attn.qkv_proj": (h, q + 2 * kv), "self_attn.o_proj": (q, h)}
        mlp = {"mlp.gate_up_proj": (h, 2 * i), "mlp.down_proj": (i, h)}
    else:
        layers = {"self_attn.q_proj": (h, q), "self_attn.k_proj": (h, kv), "self_attn.v_proj": (h, kv)}
        layers["self_attn.o_proj"] = (q, h)
        mlp = {"mlp.gate_proj": (h, i), "mlp.up_proj": (h, i), "mlp.down_proj": (i, h)}
    # transformers keeps the experts of a layer in one tensor, which an adapter on linear layers does not touch.
    return layers if facts.num_experts else layers | mlp


def lora_parameters(facts: ModelFacts, rank: int, targets: tuple[str, ...]) -> int:
    """Trainable parameters of LoRA: rank x (inputs + outputs) of each adapted layer (arXiv 2106.09685, section 4.1).

    `targets` are name endings, or ("all-linear",). Raises LaunchError when one matches no layer of a known family.
    """
    layers = linear_layers(facts)
    if targets != ("all-linear",):
        missing = [t for t in targets if not any(_ends_with(name, t) for name in layers)]
        if missing and not facts.is_approximate:
            names = [name.rpartition(".")[2] for name in layers]
            near = difflib.get_close_matches(missing[0], names, n=1)
            raise LaunchError(
                f"method.targets: {', '.join(missing)} match no linear layer of {facts.model_type}",
                (f"Did you mean {near[0]}? " if near else "") + f"Allowed: all-linear, {', '.join(names)}.",
            )
        layers = {name: shape for name, shape in layers.items() if any(_ends_with(name, t) for t in targets)}
    return facts.num_layers * rank * sum(inputs + outputs for inputs, outputs in layers.values())


def hub_cache_dir() -> Path:
    """The folder in which huggingface_hub keeps downloads, by the same variables that it reads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _cached_folder(ref: SourceRef, revision: str) -> Path | None:
    """The downloaded copy of a Hub or ModelScope model, when its config.json is there."""
    org, name = ref.location.split("/")
    if ref.kind == "hub":
        repo = hub_cache_dir() / f"models--{org}--{name}"
        pointer = repo / "refs" / revision
        commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else revision
        candidates = [repo / "snapshots" / commit]
    else:
        # ModelScope writes dots of a model's name as three underscores.
        home = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope/hub").expanduser()
        escaped = name.replace(".", "___")
        candidates = [home / "models" / org / escaped, home / org / escaped]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def _facts_of_folder(folder: Path, known_from: str, count_weights: bool) -> ModelFacts | None:
    config = _read_json(folder / "config.json")
    shapes: dict[str, int] = {}
    num_bytes = 0
    if count_weights:
        files = sorted(folder.glob("*.safetensors"))
        num_bytes = sum(f.stat().st_size for f in files or folder.glob("*.bin"))
        # A quantised checkpoint packs several weights into one element: its shapes do not count parameters.
        if not config.get("quantization_config"):
            for file in _files_of_model(folder, files):
                shapes |= _safetensors_counts(file)
    return _facts_of_config(config, known_from, shapes, num_bytes, _has_chat_template(folder))


def _files_of_model(folder: Path, files: list[Path]) -> list[Path]:
    """All safetensors files of the model, or none when one that the index names has not been downloaded."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [f for f in files if f.name == "model.safetensors"]
    named = {folder / str(name) for name in _read_json(index).get("weight_map", {}).values()}
    return sorted(named) if all(f.is_file() for f in named) else []


def _safetensors_counts(path: Path) -> dict[str, int]:
    """Tensor name -> number of elements, from the header: https://huggingface.co/docs/safetensors"""
    with open(path, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_SAFETENSORS_HEADER_BYTES, path.stat().st_size - 8):
            raise LaunchError(f"{path} is not a whole safetensors file", "Download it again.")
        text = f.read(length)
    try:
        header = json.loads(text)
        end = 8 + length + max((int(t["data_offsets"][1]) for n, t in header.items() if n != "__metadata__"), default=0)
        counts = {n: _product(t["shape"]) for n, t in header.items() if n != "__metadata__"}
    except (ValueError, TypeError, LookupError, AttributeError):
        raise LaunchError(f"{path} has a damaged safetensors header", "Download it again.") from None
    if end > path.stat().st_size:
        raise LaunchError(f"{path} is cut short: {path.stat().st_size} of {end} bytes", "Download it again.")
    return counts


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(_read_json(path).get("chat_template"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise LaunchError(
            f"{path}:{e.lineno}:{e.colno}: not valid JSON: {e.msg}", "Repair it, or copy it again."
        ) from None
    except UnicodeDecodeError as e:
        raise LaunchError(f"{path}: not UTF-8 (byte {e.start})", "Save it as UTF-8, or copy it again.") from None
    except OSError as e:
        raise LaunchError(f"cannot read {path}: {e.strerror}", "Check the path and its permissions.") from None
    if not isinstance(value, dict):
        raise LaunchError(f"{path}:1: a JSON object is expected, not {type(value).__name__}", "Copy it again.")
    return value


def _facts_of_config(
    config: dict[str, Any], known_from: str, shapes: dict[str, int], num_bytes: int, has_template: bool | None
) -> ModelFacts | None:
    """None when config.json does not describe a decoder in a way that is known here. `shapes` may be empty."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    dims = {key: next((v for n in names if (v := _count(text, n))), 0) for key, names in _NAMES.items()}
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    attention = kinds_of_config({**text, "model_type": model_type})
    if not all(dims.values()):
        if RECURRENT in attention:
            raise LaunchError(f"{model_type} cannot be trained: {REFUSED[RECURRENT]}", "Choose a transformer model.")
        return None
    family = _FAMILIES.get(model_type, _Family())
    experts = _count(text, "num_experts") or _count(text, "num_local_experts") or _count(text, "n_routed_experts")
    if not experts:
        dims["intermediate_size"] = _count(text, "intermediate_size") or dims["intermediate_size"]
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:
        has_head = any(name.endswith(("lm_head.weight", "output.weight")) for name in shapes)
        tied = not has_head if shapes else family.tied_by_default
    window = _count(text, "sliding_window") if text.get("use_sliding_window", True) else 0
    facts = ModelFacts(
        model_type=model_type,
        num_kv_heads=_count(text, "num_key_value_heads") or dims["num_heads"],
        head_dim=_count(text, "head_dim") or dims["hidden_size"] // dims["num_heads"],
        tie_word_embeddings=bool(tied),
        max_positions=_count(text, "max_position_embeddings") or _count(text, "n_positions"),
        sliding_window=window or None,
        attention=attention,
        num_experts=experts,
        num_parameters=0,
        num_linear_parameters=0,
        weight_bytes_on_disk=num_bytes,
        has_chat_template=has_template,
        known_from=known_from,
        is_approximate=model_type not in _FAMILIES or bool(experts) or text is not config,
        stretches_beyond=_stretches_beyond(text),
        **dims,
    )
    return _with_counts(facts, text, shapes)


def _stretches_beyond(config: dict[str, Any]) -> int:
    """Where `dynamic` and `longrope` change over: transformers' modeling_rope_utils.dynamic_rope_update."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind not in ("dynamic", "longrope"):
        return 0
    original = "original_max_position_embeddings"
    return _count(rope, original) or _count(config, original) or _count(config, "max_position_embeddings")


def _with_counts(facts: ModelFacts, config: dict[str, Any], shapes: dict[str, int]) -> ModelFacts:
    family = _FAMILIES.get(facts.model_type, _Family())
    h, q, kv = facts.hidden_size, facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    linear = _linear_parameters(facts)
    per_layer = family.norms_per_layer * h + (2 * facts.head_dim if family.qk_norm else 0)
    if family.qkv_bias:
        per_layer += q + 2 * kv
    elif config.get("attention_bias") or config.get("bias"):
        per_layer += q + 2 * kv + h
    if config.get("mlp_bias"):
        per_layer += 2 * facts.intermediate_size + h
    embeddings = facts.vocab_size * h * (1 if facts.tie_word_embeddings else 2)
    total = linear + facts.num_layers * per_layer + embeddings + h
    if shapes:
        # Some checkpoints store the tied head a second time.
        total = sum(n for name, n in shapes.items() if not (facts.tie_word_embeddings and name == "lm_head.weight"))
    return dataclasses.replace(facts, num_parameters=total, num_linear_parameters=linear)


def _linear_parameters(facts: ModelFacts) -> int:
    layer = sum(inputs * outputs for inputs, outputs in linear_layers(facts).values())
    experts = facts.num_experts * 3 * facts.hidden_size * facts.intermediate_size
    return facts.num_layers * (layer + experts)


def _count(config: dict[str, Any], name: str) -> int:
    """A positive whole number of config.json, or 0."""
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _facts_of_gguf(header: GgufHeader) -> ModelFacts:
    meta = header.metadata
    arch = str(meta.get("general.architecture", ""))
    names = {
        "num_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_heads": "attention.head_count",
    }
    dims = {key: _largest(meta.get(f"{arch}.{name}")) for key, name in names.items()}
    missing = [f"{arch}.{names[key]}" for key, value in dims.items() if not value]
    if missing:
        raise LaunchError(f"the GGUF header has no {', '.join(missing)}", "Give a GGUF file of a text model.")
    tokens = meta.get("tokenizer.ggml.tokens", ())
    vocab = tokens.length if isinstance(tokens, SkippedArray) else len(tokens)
    experts = _largest(meta.get(f"{arch}.expert_count"))
    facts = ModelFacts(
        model_type=arch,
        num_kv_heads=_largest(meta.get(f"{arch}.attention.head_count_kv")) or dims["num_heads"],
        head_dim=_largest(meta.get(f"{arch}.attention.key_length")) or dims["hidden_size"] // dims["num_heads"],
        vocab_size=_largest(meta.get(f"{arch}.vocab_size")) or vocab,
        tie_word_embeddings=all(t.name != "output.weight" for t in header.tensors),
        max_positions=_largest(meta.get(f"{arch}.context_length")),
        sliding_window=_largest(meta.get(f"{arch}.attention.sliding_window")) or None,
        attention=kinds_of_gguf(arch, meta, (t.name for t in header.tensors)),
        num_experts=experts,
        # rope_freqs is a constant that llama.cpp stores, not a weight.
        num_parameters=sum(t.num_elements for t in header.tensors if not t.name.startswith("rope_")),
        num_linear_parameters=0,
        weight_bytes_on_disk=header.file_bytes,
        has_chat_template=bool(meta.get("tokenizer.chat_template")),
        known_from="gguf header",
        is_approximate=arch not in _FAMILIES or bool(experts),
        **dims,
    )
    return dataclasses.replace(facts, num_linear_parameters=_linear_parameters(facts))


def _largest(value: Any) -> int:
    """A GGUF number, or the largest of a per-layer list; 0 when it is absent."""
    numbers = value if isinstance(value, tuple) else (value,)
    return max((n for n in numbers if isinstance(n, int)), default=0)


def stored_quantisation(ref: SourceRef, revision: str = "main") -> str:
    """How a model folder's own files are quantised ("gptq", "awq", "fp8" ...); "" for not, or where only a download can tell.

    Raises LaunchError for a damaged config.json. GGUF files are turned into 16 bits when they are prepared.
    """
    folder = Path(ref.location) if ref.kind == "folder" else None
    if ref.kind in ("hub", "modelscope"):
        folder = _cached_folder(ref, revision)
    found = _read_json(folder / "config.json").get("quantization_config") if folder else None
    return str(found.get("quant_method") or "") if isinstance(found, dict) else ""
