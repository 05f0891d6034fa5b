"""Documents: links lead somewhere, and nothing unfinished is shipped."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from launcher.recipe import load_recipe

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
CODE_BLOCK = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|[Aa]s an AI\b|\blanguage model assistant\b")
EXPECTED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "launcher/README.md",
    "trainer/README.md",
    "cluster/README.md",
)


def anchor(heading: str) -> str:
    """The id that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def broken_links(path: Path, text: str) -> list[str]:
    text = CODE_BLOCK.sub("", text)
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists():
            broken.append(f"{path}: {target}")
        elif fragment and linked.suffix == ".md":
            anchors = {anchor(h) for h in HEADING.findall(linked.read_text(encoding="utf-8"))}
            if fragment not in anchors:
                broken.append(f"{path}: {target} (no such heading)")
    return broken


def test_relative_links_resolve(root: Path, shipped_texts: dict[str, str]) -> None:
    documents = {path: text for path, text in shipped_texts.items() if path.endswith(".md")}
    assert not [name for name in EXPECTED if name not in documents]
    broken = [link for path, text in documents.items() for link in broken_links(root / path, text)]
    assert not broken, "\n".join(broken)


def test_package_pages_name_every_module_and_no_other(root: Path) -> None:
    wrong = []
    for package in ("launcher", "trainer", "cluster"):
        page = (root / package / "README.md").read_text(encoding="utf-8")
        modules = {f.name for f in (root / package).glob("*.py") if not f.name.startswith("__")}
        rows = "\n".join(line for line in page.splitlines() if line.startswith("| `"))
        patterns = set(re.findall(r"`([\w*]+\.py)`", rows))
        named = {m for m in modules for pattern in patterns if fnmatch.fnmatch(m, pattern)}
        wrong += [f"{package}/README.md does not mention {m}" for m in sorted(modules - named)]
        wrong += [f"{package}/README.md names {p}" for p in sorted(patterns) if not fnmatch.filter(modules, p)]
    assert not wrong, "\n".join(wrong)


def test_nothing_unfinished_is_shipped(shipped_texts: dict[str, str]) -> None:
    found = []
    for path, text in shipped_texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if UNFINISHED.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_the_rules_catch_violations(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](#a-b) [y](#c) [z](gone.md) [w](https://example.org)\n", encoding="utf-8")
    assert broken_links(page, page.read_text(encoding="utf-8")) == [f"{page}: #c (no such heading)", f"{page}: gone.md"]
    assert UNFINISHED.search("# TODO: later")
    assert not UNFINISHED.search("a to-do list")


def test_the_recipe_of_the_readme_loads(root: Path, tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    (tmp_path / "my.yaml").write_text(found.group(1), encoding="utf-8")
    (tmp_path / "my.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    recipe = load_recipe(tmp_path / "my.yaml").recipe
    assert recipe.evaluate.prompts[0].contains == ["小鹪"]
