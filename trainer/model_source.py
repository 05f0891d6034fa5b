"""Wherever a base model comes from, it ends as a plain Hugging Face folder: config.json, safetensors, tokenizer.

torch and transformers are imported only when a model has to be converted or made.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .disk import new_folder, read_json, write_json
from .model_folder import TOKENIZER_FILES, has_vocabulary, read_config, stored_tensors, tokenizer_files
from .modelscope_hub import download
from .spec import EXIT_RETRY, EXIT_USER, ModelSpec, TrainError

CONVERTER_VERSION = 1
"""Part of the cache key: raise it whenever a converted model would differ."""
ALLOWED_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
IGNORED_PATTERNS = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
OTHER_SOURCES = (
    "Other ways to the same model: a mirror (HF_ENDPOINT=https://hf-mirror.com), `modelscope:ID` as model.source, or a "
    "local folder that holds a copy."
)


def materialise(model: ModelSpec) -> Path:
    """The model as a folder, checked. Downloads or converts what is not there yet. Raises TrainError (2 or 75).

    Side effects: files in the Hub's or ModelScope's own cache, or under `cache_dir`/models. Several processes may call
    this at once.
    """
    makers: dict[str, Callable[[ModelSpec], Path]] = {
        "folder": lambda m: Path(m.location),
        "hub": _from_hub,
        "modelscope": _from_modelscope,
        "gguf": _from_gguf,
        "random": _from_random,
    }
    folder = makers[model.kind](model)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raises TrainError unless config.json, whole safetensors and a tokenizer are there. Reads headers only."""
    if not folder.is_dir():
        raise TrainError(f"model folder {folder} does not exist", "Check model.source.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise TrainError(
            f"{folder} is an adapter, not a model",
            "Merge it into its base first, and give the merged folder as model.source.",
        )
    read_config(folder)
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as f:
            if f.read(7) == b"version":
                raise TrainError(
                    f"{path} is a Git LFS pointer, not the weights", f"Fetch them: git -C {folder} lfs pull"
                )
    stored_tensors(folder)
    _check_tokenizer(folder)


def _check_tokenizer(folder: Path) -> None:
    if has_vocabulary(folder):
        return
    raise TrainError(
        f"model folder {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})",
        "Copy the tokenizer files of the base model into it: tokenizer.json, tokenizer_config.json, "
        "special_tokens_map.json, and chat_template.jinja if there is one.",
    )


def _from_hub(model: ModelSpec) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    name = f"{model.location} (revision {model.revision})"
    try:
        found = snapshot_download(
            model.location, revision=model.revision, allow_patterns=ALLOWED_PATTERNS, ignore_patterns=IGNORED_PATTERNS
        )
    except errors.GatedRepoError as e:
        raise TrainError(
            f"the Hub does not let you read {name}: access is granted by its authors",
            f"Ask for access on {constants.ENDPOINT}/{model.location}, then set HF_TOKEN on this machine.",
        ) from e
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as e:
        raise TrainError(
            f"the Hub has no model {model.location}, or it is private",
            f"Check the spelling of model.source; for a private model set HF_TOKEN on this machine. {OTHER_SOURCES}",
        ) from e
    except errors.RevisionNotFoundError as e:
        raise TrainError(
            f"{model.location} has no revision {model.revision}", "Check model.revision; the usual one is main."
        ) from e
    except errors.LocalEntryNotFoundError as e:
        raise _no_network(name, offline=constants.is_offline_mode()) from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        refused = status in (401, 403)
        raise TrainError(
            f"the Hub answered {status} for {name}",
            f"{'Set HF_TOKEN on this machine to a token that may read it' if refused else 'Try again later'}. {OTHER_SOURCES}",
            EXIT_USER if refused else EXIT_RETRY,
        ) from e
    except (ConnectionError, TimeoutError) as e:
        raise _no_network(name, offline=False) from e
    return Path(found)


def _no_network(name: str, offline: bool) -> TrainError:
    if offline:
        return TrainError(
            f"{name} is not complete in the local Hub cache, and HF_HUB_OFFLINE forbids a download",
            f"Unset HF_HUB_OFFLINE, or download the model on a machine with network and copy the cache. {OTHER_SOURCES}",
        )
    return TrainError(
        f"the Hub cannot be reached to download {name}", f"Check the network. {OTHER_SOURCES}", EXIT_RETRY
    )


def _from_modelscope(model: ModelSpec) -> Path:
    # ModelScope calls its default branch master; "main" is what a recipe says when it says nothing.
    revision = {} if model.revision == "main" else {"revision": model.revision}
    patterns = {"allow_patterns": ALLOWED_PATTERNS, "ignore_patterns": IGNORED_PATTERNS}
    return download("model", model.location, "model.source and model.revision", **patterns, **revision)


def _from_gguf(model: ModelSpec) -> Path:
    """A bf16 copy of a GGUF file, made once."""
    path = Path(model.location)
    if not path.is_file():
        raise TrainError(f"GGUF file {path} does not exist", "Check model.source.")
    size = path.stat().st_size
    with path.open("rb") as f:
        first = f.read(1 << 20)
        f.seek(max(0, size - (1 << 20)))
        last = f.read()
    if not first.startswith(b"GGUF"):
        raise TrainError(f"{path} is not a GGUF file", "Download it again; a Git LFS pointer must be fetched first.")
    key = hashlib.sha256(b"gguf %d %d" % (CONVERTER_VERSION, size) + first + last).hexdigest()
    return _made_once(model, key, f"{path.name} to bf16 safetensors", lambda out: _convert_gguf(path, out))


def _convert_gguf(path: Path, out: Path) -> None:
    from transformers import GenerationConfig, TokenizersBackend

    try:
        loaded = _load_gguf(path)
        # AutoTokenizer would parse the whole file once more to end in the same class.
        tokenizer = TokenizersBackend.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as e:
        # What transformers raises for a file that is cut short, has no such key, or is of an unknown architecture.
        raise TrainError(
            f"{path} cannot be converted: {e}",
            "The file may be cut short, or its architecture may be unknown to transformers; take the model from the Hub instead.",
        ) from e
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    ends = _end_token_ids(path, loaded.config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=pad).save_pretrained(out)
    config = read_json(out / "config.json")
    # The name that a model carries inside the file is no path, and a copy must not point back to the original.
    config.pop("_model_name_or_path", None)
    write_json(out / "config.json", config)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and a cache may be shared


def _load_gguf(path: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    folder, name = str(path.parent), path.name
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, config=config, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )


def _end_token_ids(path: Path, config: Any, tokenizer: Any) -> list[int]:
    """End of text and end of turn, as the file, its config and its tokenizer name them."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(path))
    eos = config.eos_token_id
    ids = {
        *(eos if isinstance(eos, list) else [eos]),
        tokenizer.eos_token_id,
        metadata.get("tokenizer.ggml.eot_token_id"),
    }
    return sorted(i for i in ids if i is not None)


def _from_random(model: ModelSpec) -> Path:
    """Random weights (seed 0, bf16) for a folder with config.json and tokenizer, made once."""
    source = Path(model.location)
    if not source.is_dir():
        raise TrainError(f"model folder {source} does not exist", "Check model.source.")
    read_config(source)
    _check_tokenizer(source)
    files = [source / "config.json", *tokenizer_files(source)]
    files += [p for p in (source / "generation_config.json",) if p.is_file()]
    digest = hashlib.sha256(b"random %d" % CONVERTER_VERSION)
    for path in files:
        digest.update(str(path.relative_to(source)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    make = lambda out: _make_random(source, files, out, model.trust_remote_code)  # noqa: E731
    return _made_once(model, digest.hexdigest(), f"random weights for {source}", make)


def _make_random(source: Path, files: list[Path], out: Path, trust_remote_code: bool) -> None:
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, StrictDataclassError) as e:
        raise TrainError(f"{source / 'config.json'} cannot be used: {e}", "Check `model_type` and its values.") from e
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    made.to(torch.bfloat16).save_pretrained(out)
    for path in files[1:]:
        target = out / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _made_once(model: ModelSpec, key: str, what: str, make: Callable[[Path], None]) -> Path:
    """`cache_dir`/models/<key>, filled by `make` unless it exists. Appears whole or not at all."""
    final = Path(model.cache_dir) / "models" / key
    if final.is_dir():
        return final
    print(f"converting {what} in {final} (once)", flush=True)
    try:
        with new_folder(final) as partial:
            make(partial)
    except TrainError:
        # Another process may have made the same folder meanwhile; content decides the name, so it serves as well.
        if not final.is_dir():
            raise
    return final
