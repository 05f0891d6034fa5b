"""The data and the model that every contender is given, in the form that each reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from trainer.data import epoch_order

from .peer_venvs import BenchError

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The one of the model's own chat template; given to everybody, because peers' copies of the template differ from it."""
DEFAULT_ROWS = 999
LONG_TEXTS = 48
CHARACTERS_PER_TOKEN = 8
"""More than any text has, so that a long text is longer than the longest row."""
LONGEST_ROW = 4096
SHARED_CONTEXT = 64
"""Tokens kept free for system prompt and turn markers when rows that would be cut are left out."""
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
"""8 heads, 4 kv heads, about 90 M parameters with SmolLM2's vocabulary."""


@dataclass(frozen=True)
class DataRow:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Inputs:
    """Absolute paths of what the contenders read; made once in a work folder."""

    product_rows: Path
    """Alpaca rows in the order given."""
    product_texts: Path
    llamafactory_dir: Path
    """dataset_info.json with the data set `rows`."""
    trl_dir: Path
    """A data set folder with train.jsonl."""


def read_rows(path: Path) -> list[DataRow]:
    """Rows of an Alpaca file (JSON list or JSON lines). Raises BenchError when it is not one."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        return [DataRow("\n".join(filter(None, (v["instruction"], v.get("input")))), v["output"]) for v in values]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        hint = 'Give JSON or JSON lines of {"instruction": "...", "input": "...", "output": "..."}.'
        raise BenchError(f"--data {path} cannot be used: {type(e).__name__}: {e}", hint) from e


def default_rows(recipes_data: Path) -> list[DataRow]:
    """Question and answer of every row of the shipped chat data, again and again up to DEFAULT_ROWS."""
    found = []
    for file in sorted(recipes_data.glob("*_en.jsonl")) + sorted(recipes_data.glob("*_chat.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            turns = {turn["role"]: turn["content"] for turn in reversed(json.loads(line)["messages"])}
            found.append(DataRow(turns["user"], turns["assistant"]))
    return [found[i % len(found)] for i in range(DEFAULT_ROWS)]


def without_cut_rows(rows: list[DataRow], tokenizer_json: Path, max_length: int) -> list[DataRow]:
    """Rows that fit into `max_length` tokens whole: contenders cut longer ones in different ways."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    encodings = tokenizer.encode_batch([f"{row.question}\n{row.answer}" for row in rows])
    kept = zip(rows, encodings, strict=True)
    return [row for row, encoding in kept if len(encoding.ids) + SHARED_CONTEXT <= max_length]


def write_inputs(rows: list[DataRow], folder: Path, seed: int) -> Inputs:
    """Write the same rows for everybody.

    This project draws its order from the seed; peers are given the rows in that order and told not to shuffle, so that
    unpacked batches hold the same rows in every contender.
    """
    inputs = Inputs(folder / "rows.jsonl", folder / "texts.jsonl", folder / "llamafactory", folder / "trl")
    for made in (folder, inputs.llamafactory_dir, inputs.trl_dir):
        made.mkdir(parents=True, exist_ok=True)
    _write(inputs.product_rows, [{"instruction": r.question, "input": "", "output": r.answer} for r in rows])
    ordered = [rows[i] for i in epoch_order(len(rows), seed, 0).tolist()]
    alpaca = [{"instruction": r.question, "input": "", "output": r.answer} for r in ordered]
    _write(inputs.llamafactory_dir / "rows.jsonl", alpaca)
    info = json.dumps({"rows": {"file_name": "rows.jsonl", "formatting": "alpaca"}})
    (inputs.llamafactory_dir / "dataset_info.json").write_text(info, encoding="utf-8")
    _write(inputs.trl_dir / "train.jsonl", [_prompt_and_completion(row) for row in ordered])
    _write(inputs.product_texts, [{"text": text} for text in _long_texts(rows)])
    return inputs


def _prompt_and_completion(row: DataRow) -> dict[str, list[dict[str, str]]]:
    asked = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row.question}]
    return {"prompt": asked, "completion": [{"role": "assistant", "content": row.answer}]}


def _long_texts(rows: list[DataRow]) -> list[str]:
    """Answers end to end, each text beginning with another one."""
    answers = [row.answer for row in rows]
    texts = []
    for i in range(LONG_TEXTS):
        parts, size, at = [], 0, i * len(answers) // LONG_TEXTS
        while size < LONGEST_ROW * CHARACTERS_PER_TOKEN:
            parts.append(answers[at % len(answers)])
            size, at = size + len(parts[-1]) + 2, at + 1
        texts.append("\n\n".join(parts))
    return texts


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_fp32(model_dir: Path, folder: Path) -> Path:
    """`folder` as the same model, but for config.json, which says fp32: what some programs load the weights as."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model_dir.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return folder


def write_qwen2_shape(folder: Path, model_dir: Path) -> Path:
    """A model folder without weights: SHAPE's config.json with the tokenizer of `model_dir`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    special = {
        key: config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    (folder / "config.json").write_text(json.dumps({**SHAPE, **special}), encoding="utf-8")
    for file in (*model_dir.glob("tokenizer*"), *model_dir.glob("chat_template*")):
        shutil.copy(file, folder / file.name)
    return folder


def num_parameters(model_dir: Path) -> int:
    """Elements of all tensors of a folder of safetensors files; tied weights are stored once.

    The header of the format: https://github.com/huggingface/safetensors#format
    """
    total = 0
    for file in model_dir.glob("*.safetensors"):
        with file.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, tensor in header.items():
            size = 1
            for n in tensor.get("shape", ()):
                size *= n
            total += size if name != "__metadata__" else 0
    return total
