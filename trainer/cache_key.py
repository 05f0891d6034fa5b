"""The name of a token cache entry: everything that decides the tokens, and nothing else, as one sha256."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .data import CACHE_VERSION
from .model_source import tokenizer_files
from .row_files import inner_suffix, read_head
from .row_map import split_map
from .rows import source_files
from .spec import DataFile, DataSpec


def cache_key(data: DataSpec, model_dir: Path) -> str:
    """sha256 over all that decides the tokens: data, tokenizer, template, settings, versions. Reads the data once."""
    settings = [
        CACHE_VERSION,
        {name: version(name) for name in ("tokenizers", "transformers")},
        _template_text(data.template),
        data.system,
        data.max_length,
        data.packing,
        data.learn,
        data.too_long,
        data.max_cut_off,
        data.max_rows,
        data.held_out,
        len(data.held_out_files),
    ]
    digest = hashlib.sha256(json.dumps(settings, ensure_ascii=False).encode())
    for source in (*data.files, *data.held_out_files):
        digest.update(f"\0{_source_settings(source)}\0".encode())
        for path in source_files(source):
            read_head(path)
            digest.update(_file_digest(path))
    for path in tokenizer_files(model_dir):
        digest.update(f"\0{path.relative_to(model_dir)}\0".encode() + _file_digest(path))
    return digest.hexdigest()


def _source_settings(source: DataFile) -> str:
    """What decides how the bytes of a source become rows; not where they are."""
    settings = dataclasses.asdict(dataclasses.replace(source, path="", kind="", subset="", split="", map=""))
    suffixes = [inner_suffix(path) for path in source_files(source)]
    code = ""
    if source.map:
        path, function = split_map(source.map)
        code = f"{function} {_file_digest(path).hex()}" if path.is_file() else ""
    return json.dumps([settings, suffixes, code], ensure_ascii=False, sort_keys=True)


def _template_text(template: str) -> Any:
    """What decides the layout, as JSON can hold it."""
    from .template import read_template
    from .turn_templates import TurnTemplate

    found = read_template(template)
    return dataclasses.asdict(found) if isinstance(found, TurnTemplate) else found


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").digest()
