"""Every key of every program is mapped or named: the tables against the key names that the programs themselves have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.import_docs import page
from launcher.import_table import PROGRAMS, Table, load_table
from launcher.recipe_fields import fields

ROOT = Path(__file__).parents[3]
KEYS = ROOT / "tests" / "golden" / "imports"
SOURCES = {f.name: f.read_text(encoding="utf-8") for f in (ROOT / "launcher").glob("import_*.py")}


def names(program: str) -> list[str]:
    """The checked-in names of a program's keys; the first line says where they are from."""
    lines = (KEYS / f"keys_{program}.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    return lines[1:]


@pytest.mark.parametrize("program", ["transformers", *PROGRAMS])
def test_table_covers_every_key_of_the_program(program: str) -> None:
    table = load_table(program)
    assert len(names(program)) > 60
    assert [key for key in names(program) if not table.knows(key)] == []


@pytest.mark.parametrize("program", ["llamafactory", "swift", "trl"])
def test_programs_on_top_of_transformers_have_its_keys_too(program: str) -> None:
    table = load_table(program)
    assert [key for key in names("transformers") if not table.knows(key)] == []


def test_axolotl_has_only_the_keys_that_it_takes_itself() -> None:
    assert not load_table("axolotl").knows("per_device_train_batch_size")
    assert sorted(set(load_table("axolotl").keys) - set(names("axolotl"))) == []


@pytest.mark.parametrize("program", ["transformers", *PROGRAMS])
def test_no_key_is_listed_twice(program: str) -> None:
    raw = json.loads((ROOT / "launcher" / f"import_{program}.json").read_text(encoding="utf-8"))
    keys = [k.partition("=")[0] for group in raw["without"] for k in group["keys"].split()] + list(raw["becomes"])
    assert sorted({key for key in keys if keys.count(key) > 1}) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_key_becomes_exists_and_is_looked_at(program: str) -> None:
    text = "\n".join(SOURCES.values())
    for key, role in load_table(program).becomes.items():
        ours, _, part = role.partition(":")
        assert ours in fields(), f"{program}: {key} -> {role}"
        whole = f'"{role}"' in text
        by_part = f'"{part}"' in text or f'":{part}"' in text
        assert whole or (part and by_part), f"nothing looks at {role} ({program}: {key})"


@pytest.mark.parametrize("program", PROGRAMS)
def test_defaults_and_conditions_are_those_of_the_code(program: str) -> None:
    table = load_table(program)
    assert all(ours in fields() for ours in table.defaults)
    text = "\n".join(SOURCES.values())
    said = {word for when, _ in table.differs for word in when.split()} - {"always"}
    assert {word for word in said if f'"{word}"' not in text} == set()
    assert {reason.effect for reason in table.without.values()} <= {"same", "changes", "stop"}


def test_a_value_matters_only_where_it_is_on_and_not_the_harmless_one() -> None:
    table = load_table("llamafactory")

    def matters(key: str, value: object) -> bool:
        reason = table.reason(key)
        assert reason is not None
        return reason.matters(value)

    assert not matters("plot_loss", True)
    assert [matters("use_dora", value) for value in (False, None, "false", True)] == [False, False, False, True]
    assert [matters("optim", value) for value in ("adamw_torch", "adafactor")] == [False, True]
    assert [matters("adam_epsilon", value) for value in (1e-8, "1e-08", 1e-6)] == [False, False, True]
    assert [matters("enable_thinking", value) for value in (True, False)] == [False, True]


def test_keys_below_a_star_have_its_reason() -> None:
    table: Table = load_table("xtuner")
    reason = table.reason("model.visual_encoder.some.new_key")
    assert reason is not None
    assert reason.effect == "stop"
    assert table.reason("model.llm.pretrained_model_name_or_path") is None
    assert not table.knows("model.lora.rank")
    assert table.nearest("model.lora.lora_alph") == "model.lora.lora_alpha"


def test_page_names_every_key() -> None:
    text = (ROOT / "docs" / "import.md").read_text(encoding="utf-8")
    assert text == page(), "python -m launcher.recipe_docs"
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) == len(PROGRAMS)
    for program, section in zip(PROGRAMS, sections, strict=True):
        named = {quoted.partition("=")[0] for quoted in re.findall(r"`([^`\n]+)`", section)}
        assert [key for key in load_table(program).keys if key not in named] == []
