"""What `launch submit` sends: the recipe as one file, the local files that it names, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.turn_templates import is_template_file

from .errors import LaunchError, Problem, RecipeError
from .recipe import LoadedRecipe, dump_recipe
from .recipe_paths import lies_in

# What decides how a text becomes tokens, and the shape of a model with random weights; never weights.
_MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "*.tiktoken",
)  # fmt: skip
_NEVER = re.compile(
    r"(^|/)(\.env[^/]*|\.git|\.ssh|\.aws|\.ray|\.netrc|\.kube|\.docker|\.config/gcloud|huggingface/(?:token|stored_tokens)|"
    r"id_(?:rsa|dsa|ecdsa|ed25519)|[^/]*\.pem|checkpoints/step_\d+)(/|$)"
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
NUM_OFFENDERS = 5


@dataclass(frozen=True)
class Item:
    """One file of an upload."""

    name: str
    """Inside the upload, relative to the recipe there."""
    source: Path | None
    """Where it is read; None for the recipe, which is `text`."""
    size: int
    text: str = ""


@dataclass(frozen=True)
class Package:
    """An upload, packed. The name follows from names and contents alone, so the same upload is never sent twice."""

    name: str
    file: IO[bytes]
    size: int
    """Bytes of `file`."""


def parse_size(text: str) -> int:
    """`100MB`, `1.5GB`, `20000` -> bytes. Raises LaunchError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise LaunchError(f"--upload-limit {text}: is not a size", "Write it like 100MB or 1.5GB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def collect(loaded: LoadedRecipe, shared: Sequence[Path]) -> list[Item]:
    """The recipe, rewritten to name its files inside the upload, and these files. Reads sizes only.

    Files in `shared` folders stay where they are. Raises RecipeError for a local model, and for what is never sent.
    """
    problems: list[Problem] = []
    files: dict[str, Path] = {}
    data: dict[str, Any] = {**loaded.values["data"]}
    for key in ("files", "held_out_files"):
        rows = [dict(row) for row in data.get(key, ())]
        for i, row in enumerate(rows):
            row["path"] = _sent(loaded, f"data.{key}.{i}.path", row["path"], shared, files, problems)
        if rows:
            data[key] = rows
    if is_template_file(data.get("template", "model")):
        data["template"] = _sent(loaded, "data.template", data["template"], shared, files, problems)
    model = {**loaded.values["model"]}
    model["source"] = _model(loaded, model["source"], shared, files, problems)
    if problems:
        raise RecipeError(problems)
    recipe = dump_recipe(dataclasses.replace(loaded, values={**loaded.values, "data": data, "model": model}))
    items = [Item(name, path, path.stat().st_size) for name, path in files.items()]
    return [Item(f"{loaded.name}.yaml", None, len(recipe.encode()), recipe), *items]


def _sent(
    loaded: LoadedRecipe,
    key: str,
    path: str,
    shared: Sequence[Path],
    files: dict[str, Path],
    problems: list[Problem],
) -> str:
    """The path to write into the recipe; the file itself is added to `files` unless it is there already."""
    if lies_in(path, shared):
        return path
    source = Path(path)
    _refuse_private(loaded, key, source, problems)
    for name, other in files.items():
        if other == source:
            return name
    base = source.name.replace("\\", "_").encode("utf-8", "replace").decode()  # Ray unpacks no name with a backslash
    name, number = f"data/{base}", 2
    while name in files:
        name, number = f"data/{number}/{base}", number + 1
    files[name] = source
    return name


def _refuse_private(loaded: LoadedRecipe, key: str, source: Path, problems: list[Problem]) -> None:
    """Both as written and where links lead: a link named rows.jsonl may end at .env."""
    for path in (source, source.resolve()):
        if found := _NEVER.search(str(path)):
            where = str(loaded.origins.get(key, key))
            message = f"{source} is not sent: nothing in {found[2]} ever is"
            problems.append(Problem(where, message, "Name a file that holds data and nothing else."))
            return


def _model(
    loaded: LoadedRecipe, source: str, shared: Sequence[Path], files: dict[str, Path], problems: list[Problem]
) -> str:
    if source.startswith(("modelscope:", "package:")) or lies_in(source.removeprefix("random:"), shared):
        return source
    if source.startswith("random:"):
        folder = Path(source.removeprefix("random:"))
        for path in sorted({p for pattern in _MODEL_FILES for p in folder.glob(pattern) if p.is_file()}):
            _refuse_private(loaded, "model.source", path, problems)
            files[f"model/{path.relative_to(folder).as_posix()}"] = path
        return "random:model"
    if source.startswith("/"):
        where = str(loaded.origins.get("model.source", "model.source"))
        hint = (
            "Name it by its Hub id (the cluster downloads it), or copy it to a path that the cluster sees and give that "
            f"folder: --shared {Path(source).parent}"
        )
        problems.append(Problem(where, f"the model {source} is on this machine, and models are not sent", hint))
    return source


def require_size(items: Sequence[Item], limit_bytes: int) -> None:
    """Raises LaunchError, with the largest files, where they are more than the limit together."""
    total = sum(item.size for item in items)
    if total <= limit_bytes:
        return
    largest = sorted(items, key=lambda item: -item.size)[:NUM_OFFENDERS]
    lines = [f"  {shown_size(item.size):>9}  {item.source or item.name}" for item in largest]
    raise LaunchError(
        f"the upload would be {shown_size(total)}, the limit is {shown_size(limit_bytes)}; the largest files:\n"
        + "\n".join(lines),
        "Put large files on a path that the cluster sees, name that path in the recipe, and give the folder: --shared DIR\n"
        "Or raise the limit: --upload-limit SIZE (packed, Ray takes at most 100 MiB)",
    )


def shown_size(size: int) -> str:
    """1234567 -> 1.2 MB."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def pack(items: Sequence[Item]) -> Package:
    """Each file is read once, into a file that has no name. Raises LaunchError for one that cannot be read."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    digest = hashlib.sha256()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for item in sorted(items, key=lambda item: item.name):
            entry = zipfile.ZipInfo(item.name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            digest.update(f"{len(item.name.encode())} {item.name}".encode() + _write(archive, entry, item))
    return Package(f"_ray_pkg_{digest.hexdigest()[:32]}.zip", file, file.tell())


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, item: Item) -> bytes:
    """Returns the sha256 of what was written."""
    digest = hashlib.sha256()
    with archive.open(entry, "w", force_zip64=item.size > 2**31) as out:
        if item.source is None:
            out.write(item.text.encode())
            return hashlib.sha256(item.text.encode()).digest()
        try:
            with open(item.source, "rb") as f:
                while block := f.read(2**20):
                    digest.update(block)
                    out.write(block)
        except OSError as e:
            raise LaunchError(f"cannot read {item.source}: {e.strerror}", "Check its permissions.") from None
    return digest.digest()


def page(items: Sequence[Item]) -> str:
    """The exact list, with sizes, as shown before anything goes."""
    lines = []
    for item in items:
        source = "this recipe, with all that it extends and --set" if item.source is None else _with_link(item.source)
        lines.append(f"  {shown_size(item.size):>9}  {item.name}  <- {source}")
    return "\n".join([f"upload        {len(items)} files, {shown_size(sum(i.size for i in items))}", *lines])


def _with_link(source: Path) -> str:
    real = os.path.realpath(source)
    return str(source) if real == str(source) else f"{source} -> {real}"
