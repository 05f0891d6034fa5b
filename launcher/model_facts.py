"""What a model is, without torch: sizes from config.json, a GGUF header, the local Hub cache, or a built-in table."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from .attention_kinds import RECURRENT, REFUSED, kinds_of_config, kinds_of_gguf
from .errors import LaunchError
from .gguf_header import GgufHeader, SkippedArray, read_gguf_header
from .known_models import KnownModel, find_known, known_chat_template
from .model_layers import (
    Latent,
    ModelFacts,
    is_known_family,
    is_tied_by_default,
    linear_layers,
    lora_parameters,
    with_counts,
)
from .model_source import SourceRef, resolve_source

__all__ = [
    "ModelFacts",
    "SourceRef",
    "facts_of_known",
    "hub_cache_dir",
    "linear_layers",
    "lora_parameters",
    "read_facts",
    "resolve_source",
    "stored_quantisation",
]

_MAX_SAFETENSORS_HEADER_BYTES = 100_000_000


# Names of the same quantity in config.json, first match wins.
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"),
    "num_heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
}
_KV_HEADS = ("num_key_value_heads", "multi_query_group_num")
_POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "model_max_length")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


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
    known = find_known(ref.location)
    return facts_of_known(known) if known else None


def facts_of_known(model: KnownModel) -> ModelFacts:
    """Sizes of a model of the built-in table."""
    found = _facts_of_config(model.config, "built-in table", {}, 0, known_chat_template(model.model_id))
    assert found is not None
    return found


def hub_cache_dir() -> Path:
    """The folder in which huggingface_hub keeps downloads, by the same variables that it reads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


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
    dims = {key: _first(text, names) for key, names in _NAMES.items()}
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    attention = kinds_of_config({**text, "model_type": model_type})
    if not all(dims.values()):
        if RECURRENT in attention:
            raise LaunchError(f"{model_type} cannot be trained: {REFUSED[RECURRENT]}", "Choose a transformer model.")
        return None
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:
        has_head = any(name.endswith(("lm_head.weight", "output.weight")) for name in shapes)
        tied = not has_head if shapes else is_tied_by_default(model_type)
    window = _count(text, "sliding_window") if text.get("use_sliding_window", True) else 0
    latent = _latent(text, dims)
    head_dim = _count(text, "head_dim") or _count(text, "kv_channels") or dims["hidden_size"] // dims["num_heads"]
    if latent:
        head_dim = _count(text, "qk_nope_head_dim") + latent.rotary_dim
    facts = ModelFacts(
        model_type=model_type,
        num_kv_heads=_first(text, _KV_HEADS) or dims["num_heads"],
        head_dim=head_dim,
        tie_word_embeddings=bool(tied),
        max_positions=_first(text, _POSITIONS),
        sliding_window=window or None,
        attention=attention,
        num_parameters=0,
        num_linear_parameters=0,
        weight_bytes_on_disk=num_bytes,
        has_chat_template=has_template,
        known_from=known_from,
        is_approximate=not is_known_family(model_type) or text is not config,
        stretches_beyond=_stretches_beyond(text),
        latent=latent,
        has_vision=isinstance(config.get("vision_config"), dict) or "other_parameters" in config,
        **{**dims, **_experts(text, dims)},
    )
    # Some checkpoints store the tied head a second time.
    stored = sum(n for name, n in shapes.items() if not (facts.tie_word_embeddings and name == "lm_head.weight"))
    return with_counts(facts, text, stored)


def _experts(config: dict[str, Any], dims: dict[str, int]) -> dict[str, int]:
    """What config.json says of experts, under the names of ModelFacts."""
    experts = _first(config, _EXPERTS)
    if not experts:
        width = _first(config, _NAMES["intermediate_size"][1:])
        return {"num_experts": 0, "intermediate_size": width or dims["intermediate_size"]}
    shared = _count(config, "shared_expert_intermediate_size")
    return {
        "num_experts": experts,
        "experts_per_token": _count(config, "num_experts_per_tok"),
        "shared_intermediate": shared or _count(config, "n_shared_experts") * dims["intermediate_size"],
        "dense_layers": _count(config, "first_k_dense_replace"),
        "dense_intermediate": _count(config, "intermediate_size"),
    }


def _latent(config: dict[str, Any], dims: dict[str, int]) -> Latent | None:
    if not _count(config, "kv_lora_rank"):
        return None
    value_dim = _count(config, "v_head_dim") or dims["hidden_size"] // dims["num_heads"]
    rotary_dim = _count(config, "qk_rope_head_dim")
    return Latent(_count(config, "kv_lora_rank"), _count(config, "q_lora_rank"), rotary_dim, value_dim)


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    """The first of several names that config.json has as a positive whole number, or 0."""
    return next((value for name in names if (value := _count(config, name))), 0)


def _stretches_beyond(config: dict[str, Any]) -> int:
    """Where `dynamic` and `longrope` change over: transformers' modeling_rope_utils.dynamic_rope_update."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind not in ("dynamic", "longrope"):
        return 0
    original = "original_max_position_embeddings"
    return _count(rope, original) or _count(config, original) or _count(config, "max_position_embeddings")


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
    dims: dict[str, Any] = {key: _largest(meta.get(f"{arch}.{name}")) for key, name in names.items()}
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
        is_approximate=not is_known_family(arch) or bool(experts),
        **dims,
    )
    return with_counts(facts, {}, facts.num_parameters)


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
