"""The template of a run, written into the folder of its model: whatever loads the folder speaks as it was trained. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .disk import read_json, write_json, write_text, writing
from .turn_templates import is_template_file, turn_templates

TEMPLATE_FILE = "chat_template.jinja"
_GENERATION = "generation_config.json"


def export_template(template: str, out: Path) -> list[str]:
    """Make `template` (tool/name or a Jinja file; `DataSpec.template`) that of the model folder `out`. Returns the names of files written.

    The stop words of a named template become ends of generation, beside those that the model has.
    """
    if is_template_file(template):
        with writing(out / TEMPLATE_FILE):
            shutil.copyfile(template, out / TEMPLATE_FILE)
        return [TEMPLATE_FILE]
    chosen = turn_templates()[template]
    write_text(out / TEMPLATE_FILE, chosen.jinja())
    stops = [i for word in chosen.stop_words if (i := _token_id(out, word)) is not None]
    if not stops:
        return [TEMPLATE_FILE]
    settings = _read(out / _GENERATION)
    known = settings.get("eos_token_id", _read(out / "config.json").get("eos_token_id"))
    ends = known if isinstance(known, list) else [known] if isinstance(known, int) else []
    write_json(out / _GENERATION, {**settings, "eos_token_id": list(dict.fromkeys([*ends, *stops]))})
    return [TEMPLATE_FILE, _GENERATION]


def _token_id(folder: Path, token: str) -> int | None:
    """Of a whole token, as tokenizer.json has it; None where that file or the token is not there."""
    tokenizer = _read(folder / "tokenizer.json")
    for added in tokenizer.get("added_tokens", ()):
        if added["content"] == token:
            return added["id"]
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return vocabulary.get(token) if isinstance(vocabulary, dict) else None


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
