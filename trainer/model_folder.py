"""Hugging Face model folders: where their tensors are, and the files that must travel with them. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .disk import read_json, write_json, writing
from .spec import TrainError
from .template_export import export_template
from .tensor_files import INDEX, WEIGHTS, StoredTensor
from .tensor_header import is_printable_name, read_header

TRANSFORMERS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
"""Of the names in an adapter's file."""
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
HEADS = ("lm_head", "embed_out")
"""Modules of the input and the output embedding, as the model families call them."""
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids")
"""Endings of what old versions of transformers stored beside the weights, and made again from the config."""
COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".vocab", ".spm", ".bpe")
COMPANION_PREFIXES = ("LICENSE", "LICENCE", "NOTICE")
OWN_FILES = ("config.json", "consolidation.json", "merge_report.json", ADAPTER_CONFIG)
TRAINER_FILES = ("trainer_state.json", "all_results.json", "train_results.json", "zero_to_fp32.py", "zero_to_torch.py")
"""What HF Trainer and DeepSpeed put beside the model that they train."""
TEMPLATE_FOLDER = "additional_chat_templates"
OWN_TEMPLATE = "model"
"""`DataSpec.template` for the template that the model brings."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Each of these alone says that a folder has a tokenizer."""
TOKENIZER_PATTERNS = (
    *TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "*.tiktoken", "tokenization*.py",
)  # fmt: skip
"""All files that can change what a text becomes."""


def is_head(weight: str) -> bool:
    """Whether this is the name of an output embedding's weight."""
    return weight.removesuffix(".weight").rpartition(".")[2] in HEADS


def is_embedding(weight: str) -> bool:
    """Whether this is the name of an input embedding's weight."""
    return weight.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors, whole or in shards."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json names, in file order.

    Raises TrainError when there are no safetensors, or a shard is missing, damaged, or lacks a tensor of the index.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        return {name: StoredTensor(single, entry) for name, entry in read_header(single).entries.items()}
    if not index.is_file():
        raise TrainError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}",
            "Give a Hugging Face model folder with safetensors; a .bin model is converted by save_pretrained().",
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(f, str) and f == Path(f).name for f in weight_map.values()
    ):
        raise TrainError(f"{index}: weight_map is not a map from tensors to files of this folder")
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise TrainError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}", "Download it again."
        )
    found: dict[str, StoredTensor] = {}
    for name in files:
        path = folder / name
        entries = read_header(path).entries
        found |= {tensor: StoredTensor(path, e) for tensor, e in entries.items() if weight_map.get(tensor) == name}
    absent = sorted(weight_map.keys() - found.keys())
    if absent:
        raise TrainError(
            f"{index}: {len(absent)} tensors are not where it says, such as {absent[0]!r}", "Download it again."
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises TrainError."""
    path = folder / "config.json"
    if not path.is_file():
        raise TrainError(f"{folder} holds no config.json", "Give a Hugging Face model folder.")
    return read_json(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that transformers can load."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return any((folder / name).is_file() for name in names)


def has_vocabulary(folder: Path) -> bool:
    """Whether the folder holds the tokens themselves, not only a tokenizer's settings."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))


def tokenizer_files(folder: Path) -> list[Path]:
    """Files that decide what a text becomes, sorted."""
    return sorted({p for pattern in TOKENIZER_PATTERNS for p in folder.glob(pattern) if p.is_file()})


def write_config(config: dict[str, Any], out: Path, stored_dtype: str | None) -> None:
    """config.json for full-precision weights: no quantization_config, and the dtype of the weights (None: unchanged)."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if stored_dtype is not None:
        config = _with_dtype(config, TRANSFORMERS_DTYPES[stored_dtype])
        if "dtype" not in config and "torch_dtype" not in config:
            # The older of the two names: every version of transformers reads it.
            config["torch_dtype"] = TRANSFORMERS_DTYPES[stored_dtype]
    write_json(out / "config.json", config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
    nested = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    return changed | {key: _with_dtype(config[key], dtype) for key in nested}


def copy_companions(base: Path, out: Path, template: str = OWN_TEMPLATE, trained: Sequence[Path] = ()) -> list[str]:
    """Copy tokenizer, chat templates, generation config, model code and licence. Returns the names, sorted.

    The tokenizer is that of the first of `trained` (folders that a training program left) that has one: it may know more
    tokens, and another chat template, than the base's. A `template` other than the model's own becomes the folder's
    (see `export_template`).
    """
    sources = {path.name: path for path in base.iterdir() if path.is_file() and _is_companion(path.name)}
    sources |= {f"{TEMPLATE_FOLDER}/{path.name}": path for path in (base / TEMPLATE_FOLDER).glob("*.jinja")}
    if trainer := next((folder for folder in trained if has_vocabulary(folder)), None):
        _refuse_foreign_code(trainer, base)
        for path in tokenizer_files(base):
            if path.suffix != ".py":
                sources.pop(str(path.relative_to(base)), None)
        sources |= {str(path.relative_to(trainer)): path for path in tokenizer_files(trainer) if path.suffix != ".py"}
    for name, path in sources.items():
        with writing(out / name):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)
    exported = export_template(template, out) if template != OWN_TEMPLATE else []
    return sorted({*sources, *exported})


def _refuse_foreign_code(trained: Path, base: Path) -> None:
    """Raises TrainError for a tokenizer that asks for other code than the base's, or for files of another place.

    Trust in a base's code (model.trust_remote_code) is no trust in that of an adapter.
    """
    settings = [f / "tokenizer_config.json" for f in (trained, base)]
    code = [read_json(path).get("auto_map") if path.is_file() else None for path in settings]
    if code[0] is not None and code[0] != code[1]:
        raise TrainError(
            f"{settings[0]} asks for tokenizer code that is not the base's (auto_map)",
            "Remove auto_map there, or the tokenizer's files, if the base's tokenizer will do.",
        )
    home = trained.resolve()
    # A snapshot in the Hub's cache consists of links into `blobs` beside the snapshots.
    allowed = (home, home.parent.parent / "blobs")
    for path in tokenizer_files(trained):
        if not any(path.resolve().is_relative_to(folder) for folder in allowed):
            raise TrainError(f"{path} is a link out of the adapter's folder", "Put the file itself there.")


def _is_companion(name: str) -> bool:
    if (
        name in (*OWN_FILES, *TRAINER_FILES)
        or name.endswith(".index.json")
        or name.startswith(".")
        or not is_printable_name(name)
    ):
        return False
    return name.endswith(COMPANION_SUFFIXES) or name.startswith(COMPANION_PREFIXES)
