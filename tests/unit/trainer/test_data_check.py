"""`launch data check`: each mistake is found where it is, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_chat_model import save_tiny_model

from trainer import row_documents
from trainer.data_check import FINDINGS, MAX_PLACES, Checker
from trainer.spec import DataFile, DataSpec, PromptSpec
from trainer.template import ChatTemplate, load_template

VOCABULARY = 330


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return load_template(str(save_tiny_model(tmp_path_factory.mktemp("model"))), "model")


def chat(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*([{"role": "system", "content": system}] if system is not None else []), *turns]}


Found = dict[str, Any]
Check = Callable[..., Found]


@pytest.fixture
def check(template: ChatTemplate, tmp_path: Path) -> Check:
    """`check(row, ..., prompts=(), **data settings)`: rows are values, or bytes that stand in the file as they are."""

    def check(*rows: Any, prompts: tuple[PromptSpec, ...] = (), by: ChatTemplate = template, **settings: Any) -> Found:
        path = tmp_path / "d.jsonl"
        lines = (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        data = DataSpec(
            files=(DataFile(str(path), "auto"),), system=None, template="model", max_length=128, packing=True,
            learn="answers", too_long="truncate", max_cut_off=1.0, max_rows=0, held_out=0.0, held_out_files=(), cache_dir="",
        )  # fmt: skip
        data = dataclasses.replace(data, **settings)
        checker = Checker(data, prompts, by, VOCABULARY)
        checker.read(data.files, data.max_rows, trained=True)
        checker.read(data.held_out_files, 0, trained=False)
        found = checker.result()
        assert tuple(found["findings"]) == FINDINGS
        return found

    return check


def only(found: Found, **expected: int) -> dict[str, list[tuple[str, str]]]:
    """Places (line, what) of each finding; there are exactly these, with these counts."""
    counts = {name.replace("-", "_"): one["count"] for name, one in found["findings"].items() if one["count"]}
    assert counts == expected
    return {
        name.replace("-", "_"): [(p["where"].rpartition(":")[2], p["what"]) for p in one["places"]]
        for name, one in found["findings"].items()
    }


def test_good_rows_have_nothing(check: Check) -> None:
    found = check(chat("a", "b"), chat("你好", "再见 café Ã la carte <b>", "S"), chat("c", "d"))
    only(found)
    assert (found["rows"], found["documents"], found["files"]) == (3, 3, 1)
    assert found["tokens"] > found["supervised_tokens"] > 0


def test_rows_that_cannot_be_read_stop_no_others(check: Check) -> None:
    wrong_order = [{"messages": [{"role": "assistant", "content": "x"}]}, {"messages": chat("a", "b")["messages"][:1]}]
    found = check(b"{oops", chat("a", "b"), *wrong_order, {"else": 1}, chat("c", "d"), {"messages": []})
    places = only(found, malformed=3, order=2)
    assert [line for line, _ in places["malformed"]] == ["1", "5", "7"]
    assert places["order"][0] == ("3", "turn 1 is an assistant turn that is the first turn")
    assert places["order"][1][0] == "4"
    assert (found["rows"], found["documents"]) == (7, 2)


def test_more_than_twenty_problems_are_all_counted(check: Check) -> None:
    found = check(*[b"{oops"] * 50, chat("a", "b"))
    assert len(only(found, malformed=50)["malformed"]) == MAX_PLACES
    assert found["findings"]["malformed"]["of"] == 51


def test_another_encoding_is_told_with_its_line(check: Check, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(chat("e", "f")) + "\n")
    found = check(
        chat("a", "b"), json.dumps(chat("你好", "再见"), ensure_ascii=False).encode("gbk"), chat("c", "d"),
        files=(DataFile(str(tmp_path / "d.jsonl"), "auto"), DataFile(str(other), "auto")),
    )  # fmt: skip
    places = only(found, unreadable_files=1)
    assert places["unreadable_files"] == [("2", "the file is not UTF-8; it looks like GBK")]
    assert found["findings"]["unreadable-files"]["of"] == 2
    assert "iconv -f GBK" in found["findings"]["unreadable-files"]["places"][0]["hint"]
    assert found["documents"] == 2  # the one before it, and that of the other file


def test_empty_answers(check: Check) -> None:
    not_learnt = chat("a", "")
    not_learnt["messages"][1]["loss"] = False
    not_learnt["messages"] += chat("b", "c")["messages"]
    places = only(check(chat("a", "b"), chat("a", " \n"), not_learnt), empty_answers=1, nothing_to_learn=1)
    assert places["empty_answers"] == [("2", "turn 2 is empty")]
    assert places["nothing_to_learn"] == [("2", "no token is to be learnt")]


def test_special_tokens_inside_texts(check: Check) -> None:
    places = only(
        check(chat("a", "b"), chat("x <|im_start|>system", "y"), chat("c", "d <|im_end|> e")), special_tokens=2
    )
    assert places["special_tokens"] == [
        ("2", "turn 1 holds '<|im_start|>', in 'x <|im_start|>system'"),
        ("3", "turn 2 holds '<|im_end|>', in 'd <|im_end|> e'"),
    ]
    assert only(check({"text": "a<|endoftext|>b"}), special_tokens=1)["special_tokens"][0][1].startswith("text holds")


def test_placeholders_that_were_not_filled_in(check: Check) -> None:
    places = only(
        check(chat("a", "I am {{name}}."), chat("c", "{x} {{1}} }} {{"), chat("e", "by {{ author }}")), placeholders=2
    )
    assert places["placeholders"] == [
        ("1", "turn 2 holds '{{name}}', in 'I am {{name}}.'"),
        ("3", "turn 2 holds '{{ author }}', in 'by {{ author }}'"),
    ]


@pytest.mark.parametrize(
    "text", ["caf\ufffd", "锟斤拷", "café".encode().decode("latin-1"), "it’s".encode().decode("cp1252")]
)
def test_text_that_was_decoded_wrongly(check: Check, text: str) -> None:
    places = only(check(chat("a", "b"), chat("c", text)), damaged_text=1)
    assert places["damaged_text"][0][0] == "2"


def test_duplicates_name_the_first(check: Check, tmp_path: Path) -> None:
    rows = [chat("a", "b"), chat("c", "d"), chat("a", "b"), chat("a", "e"), chat("c", "d"), chat("a", "b")]
    places = only(check(*rows), duplicates=3)
    first, second = (f"the same as {tmp_path / 'd.jsonl'}:{line}" for line in (1, 2))
    assert places["duplicates"] == [("3", first), ("5", second), ("6", first)]


def test_held_out_rows_are_checked_too(check: Check, tmp_path: Path) -> None:
    held_out = tmp_path / "h.jsonl"
    held_out.write_text(json.dumps(chat("a", "b")) + "\n" + json.dumps(chat("q", "")) + "\n")
    found = check(chat("a", "b"), held_out_files=(DataFile(str(held_out), "auto"),))
    places = only(found, duplicates=1, empty_answers=1, nothing_to_learn=1)
    assert found["findings"]["duplicates"]["places"][0]["where"] == f"{held_out}:1"
    assert places["empty_answers"][0][0] == "2"


LONG = "word " * 200


def test_what_is_cut_off(check: Check) -> None:
    places = only(
        check(chat("a", "b"), chat("a", LONG), chat(LONG, "b")), over_length=2, truncated=1, nothing_to_learn=1
    )
    assert [line for line, _ in places["over_length"]] == ["2", "3"]
    assert places["truncated"][0][0] == "2"
    assert "tokens are cut off" in places["truncated"][0][1]
    assert places["nothing_to_learn"] == [("3", "what is to be learnt is cut off")]


def test_what_is_dropped(check: Check) -> None:
    found = check(chat("a", "b"), chat("a", LONG), too_long="drop")
    assert only(found, over_length=1, dropped=1)["dropped"][0][0] == "2"
    assert found["documents"] == 1


def test_what_is_split_is_not_cut(check: Check) -> None:
    row = {"messages": [turn for k in range(8) for turn in chat(f"question {k}", f"{k} words " * 5)["messages"]]}
    found = check(row, too_long="split-turns")
    only(found, over_length=1)
    assert found["documents"] > 1


def test_answers_without_an_end(check: Check, template: ChatTemplate) -> None:
    prompt = [5, 6, 7]
    rows = [
        {"input_ids": [*prompt, 8, 2], "labels": [-100, -100, -100, 8, 2]},  # 2 is <|im_end|>
        {"input_ids": [*prompt, 8, 9], "labels": [-100, -100, -100, 8, 9]},
        {"input_ids": [5, 6, 7, 8]},  # a piece of a text
    ]
    assert template.tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert only(check(*rows), endless_answers=1)["endless_answers"] == [
        ("2", "answer 1 of 1 ends with token 9, which ends nothing")
    ]


def test_a_template_whose_end_is_no_token_of_the_model(check: Check, template: ChatTemplate, tmp_path: Path) -> None:
    from trainer.turn_templates import turn_templates

    # The tokenizer spells <eoa> in bytes, so nothing that is learnt would stop an answer.
    other = ChatTemplate(template.tokenizer, turn_templates()["xtuner/internlm_chat"])
    assert only(check(chat("a", "b"), by=other), endless_answers=1)


def test_rows_that_the_template_refuses_stop_no_others(check: Check, template: ChatTemplate) -> None:
    from trainer.turn_templates import turn_templates

    tools = {**chat("t", "u"), "tools": [{"name": "f"}]}
    twice = {"messages": [{"role": "user", "content": "a"}, *chat("b", "c")["messages"]]}
    pairs = ChatTemplate(template.tokenizer, turn_templates()["xtuner/llama2_chat"])
    found = check(chat("a", "b"), tools, chat("c", "d"), twice, {"input_ids": [VOCABULARY, 3, 2]}, by=pairs)
    places = only(found, refused=2, malformed=1)  # a row of tokens among conversations cannot be read
    assert [line for line, _ in places["refused"]] == ["2", "4"]
    assert "two turns of `user`" in places["refused"][1][1]
    assert found["documents"] == 2
    places = only(check({"input_ids": [5, VOCABULARY], "labels": [-100, VOCABULARY]}), refused=1)
    assert f"token {VOCABULARY} is beyond the model's {VOCABULARY} embeddings" in places["refused"][0][1]


def ask(system: str | None) -> PromptSpec:
    return PromptSpec("q", system, (), "", "")


def test_a_system_prompt_that_training_never_saw(check: Check) -> None:
    rows = [chat("a", "b", "Be kind."), chat("c", "d")]
    only(check(*rows, prompts=(ask("Be kind."), ask(None))))
    found = check(*rows, prompts=(ask("Be kind."), ask("Be a pirate.")))
    place = found["findings"]["unseen-system"]["places"][0]
    only(found, unseen_system=1)
    assert place["where"] == "evaluate.prompts.1"
    assert place["what"] == "system 'Be a pirate.', which no row that is trained on has (they have: 'Be kind.', none)"
    found = check(*rows[:1], prompts=(ask(None),))
    assert "no system prompt, which no row" in found["findings"]["unseen-system"]["places"][0]["what"]
    # data.system is what rows and prompts get that bring none.
    only(check(*rows[1:], prompts=(ask(None), ask("S")), system="S"))
    only(check(*rows[1:], prompts=(ask("S"),)), unseen_system=1)


def test_a_template_that_adds_the_same_system_prompt_by_itself(check: Check, template: ChatTemplate) -> None:
    """`only` asserts which findings there are."""
    adding = ChatTemplate(
        template.tokenizer,
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nDefault<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    only(check(chat("a", "b", "Default"), prompts=(ask(None),), by=adding))
    only(check(chat("a", "b", "Other"), prompts=(ask(None),), by=adding), unseen_system=1)


def test_memory_does_not_grow_with_the_texts(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_documents, "CHUNK_ROWS", 50)

    def peak(num_rows: int) -> int:
        path = tmp_path / "many.jsonl"
        path.write_text("".join(json.dumps(chat(f"question {k}", "长" * 80)) + "\n" for k in range(num_rows)))
        tracemalloc.start()
        found = check(chat("a", "b"), max_length=512, files=(DataFile(str(path), "auto"),))
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found["documents"] == num_rows
        assert found["tokens"] > 200 * num_rows
        return largest

    peak(50)  # what is loaded once
    # 20 bytes a row, twice while arrays grow, and what sorting needs; the tokens alone would be 3200.
    assert peak(1000) - peak(100) < 900 * 200


def test_files_that_break_off_or_are_empty(check: Check, tmp_path: Path) -> None:
    array, empty = tmp_path / "broken.json", tmp_path / "empty.jsonl"
    array.write_text("[\n" + json.dumps(chat("e", "f")) + ",\n{oops\n]")
    empty.write_text("\n")
    own = tmp_path / "d.jsonl"
    found = check(chat("a", "b"), files=tuple(DataFile(str(p), "auto") for p in (array, empty, own)))
    places = only(found, malformed=1, unreadable_files=1)
    assert places["malformed"][0][0] == "3"
    assert places["unreadable_files"][0][1] == f"data file {empty} is empty"
    assert (found["rows"], found["documents"]) == (3, 2)
