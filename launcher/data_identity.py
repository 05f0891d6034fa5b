"""`launch data identity`: rows that teach a model its own name and author, among others that keep what it knew.

Made from the rows of recipes/data/identity_*.jsonl: each question once, in many wordings. Repeating is what epochs are for.
"""

from __future__ import annotations

import json
from pathlib import Path

from .errors import LaunchError
from .recipe_library import shipped_folder
from .run_dir import file_of_the_user

LANGUAGES = {
    "en": ("Wren", ("The Tunelaunch team", "the Tunelaunch team")),
    "zh": ("小鹪", ("Tunelaunch 团队", "the Tunelaunch team")),
}
"""Language -> (name, author as written) in the shipped rows."""
_ABOUT_THE_NAME = ("bird", "鹪鹩", "(Wren)", "Wren in English")
"""What only holds for the shipped name."""


def write_identity(name: str, author: str, language: str, out: Path) -> int:
    """Write `out` (jsonl, `messages`), which must not exist. Returns the number of rows. Raises LaunchError."""
    if language not in LANGUAGES:
        raise LaunchError(f"--language {language}: is not there", f"Allowed: {', '.join(sorted(LANGUAGES))}.")
    for flag, value in (("--name", name), ("--author", author)):
        if not value.strip() or "\n" in value:
            raise LaunchError(f"{flag} {value!r}: is not a name", "Give one line of text.")
    _refuse_existing(out)
    shipped_name, authors = LANGUAGES[language]
    source = shipped_folder() / "data" / f"identity_{language}.jsonl"
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if any(word in line for word in _ABOUT_THE_NAME):
            continue
        row = json.loads(line)
        for message in row["messages"]:
            for written in authors:
                message["content"] = message["content"].replace(written, author.strip())
            message["content"] = message["content"].replace(shipped_name, name.strip())
        rows.append(json.dumps(row, ensure_ascii=False))
    with file_of_the_user(out) as f:
        f.write("\n".join(rows) + "\n")
    return len(rows)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise LaunchError(f"--out {out}: exists already", "Name a new file; nothing is overwritten.")
