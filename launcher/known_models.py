"""Published models by name, so that plans, sequence-parallel checks and memory estimates work before a download.

The table is known_models.csv; it names the source of each line. The tests compare every parameter count with the published one.
"""

from __future__ import annotations

import csv
import difflib
import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .model_families import FAMILIES, Family

_FILE = Path(__file__).with_name("known_models.csv")
_COLUMNS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
}
# Organisations that keep the same models under the same names, on ModelScope and on the Hub.
_MIRRORS = (
    "01ai AI-ModelScope AI-ModelScope-Mirror LLM-Research OpenBMB Shanghai_AI_Laboratory THUDM ZhipuAI unsloth"
).lower().split()  # fmt: skip
_CHAT = re.compile(
    r"-(chat|instruct|it|sft|dpo|thinking|reasoning|0414)(-|$)|r1-distill|^(phi|qwen3|chatglm3|minicpm[35])-", re.I
)
_ORIGINAL = "original_max_position_embeddings"
_NEAR = 0.5


@dataclass(frozen=True)
class KnownModel:
    """One published model."""

    model_id: str
    names: str
    """All names of this size, written `a{,-b}`."""
    family: Family
    config: dict[str, Any]
    """The keys of its config.json that decide sizes, attention and positions."""
    num_parameters: int
    """As published."""
    source: str

    @property
    def is_chat(self) -> bool:
        """It was trained for chat, by its name."""
        name = self.model_id.partition("/")[2]
        return bool(_CHAT.search(name)) and "base" not in name.lower()


def known_models() -> tuple[KnownModel, ...]:
    """All of the table, in its order."""
    return tuple(_by_id().values())


def find_known(model_id: str) -> KnownModel | None:
    """The model of this id, in any case, also as a mirror's; None when the table lacks it."""
    org, _, name = model_id.lower().partition("/")
    found = _by_id().get(model_id.lower())
    return found or (_by_name().get(name) if org in _MIRRORS else None)


def known_config(model_id: str) -> dict[str, Any] | None:
    """The parts of config.json that decide sizes, or None for a model that is not in the table."""
    found = find_known(model_id)
    return found.config if found else None


def known_chat_template(model_id: str) -> bool | None:
    """Whether the tokenizer brings a chat template; None where only the download can tell."""
    found = find_known(model_id)
    if found is None or found.family.own_template == "unknown":
        return None
    return True if found.family.own_template == "always" or found.is_chat else None


def nearest_models(text: str, count: int = 3, cutoff: float = _NEAR) -> list[str]:
    """Up to `count` ids of the table that may have been meant by `text`, nearest first; 0 <= `cutoff` <= 1: how near."""
    wanted = _bare(text.rpartition("/")[2])
    names = {_bare(model.model_id.partition("/")[2]): model.model_id for model in known_models()}
    within = [name for name in names if wanted and wanted in name]
    close = difflib.get_close_matches(wanted, list(names), n=count, cutoff=cutoff)
    same = [wanted] if wanted in names else []
    best: dict[str, None] = dict.fromkeys([*same, *close[:1], *sorted(within, key=len), *close])
    return [names[name] for name in itertools.islice(best, count)]


def _bare(name: str) -> str:
    """Letters and digits alone: people write gemma3-4b and gemma-3_4b."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def did_you_mean(text: str) -> str:
    """A sentence with the known models nearest to a name that is none, or ""."""
    near = nearest_models(text)
    return f"Did you mean {', '.join(near[:-1])}{' or ' if near[1:] else ''}{near[-1]}?" if near else ""


@functools.cache
def _by_id() -> dict[str, KnownModel]:
    lines = (line for line in _FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    found = {}
    for row in csv.DictReader(lines):
        for model_id in itertools.chain.from_iterable(_expanded(text) for text in row["models"].split()):
            family = FAMILIES[row["family"]]
            count = int(float(row["parameters"]))
            found[model_id.lower()] = KnownModel(
                model_id, row["models"], family, _config(row, family), count, row["source"]
            )
    return found


@functools.cache
def _by_name() -> dict[str, KnownModel]:
    return {model_id.partition("/")[2]: model for model_id, model in _by_id().items()}


def _expanded(text: str) -> list[str]:
    """`a{,-b}c` -> [`ac`, `a-bc`], as a shell does."""
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"(\{[^}]*\})", text)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _config(row: dict[str, str], family: Family) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": family.model_type, "tie_word_embeddings": row["tied"] == "yes"}
    config |= {key: int(row[column]) for column, key in _COLUMNS.items() if row[column]}
    more: dict[str, Any] = dict(pair.split("=") for pair in row["more"].split())
    rope = {"rope_type": more.pop("rope_type", "default")}
    config |= {key: int(value) for key, value in more.items() if key != _ORIGINAL}
    if _ORIGINAL in more:
        rope[_ORIGINAL] = int(more[_ORIGINAL])
    return {**config, "rope_scaling": rope}
