import json
from pathlib import Path

import pytest

from trainer.row_values import Message
from trainer.rows import read_rows, source_files
from trainer.spec import DataFile, RowNames, TrainError

DATA = Path(__file__).parents[3] / "recipes" / "data"
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path, format="auto", max_rows=0):
    return list(read_rows((DataFile(str(path), format),), max_rows))


def one(tmp_path, row, format="auto"):
    (found,) = read(jsonl(tmp_path / "d.jsonl", row), format)
    return found


def error(tmp_path, *rows, format="auto"):
    with pytest.raises(TrainError) as caught:
        read(jsonl(tmp_path / "d.jsonl", *rows), format)
    assert caught.value.exit_code == 2
    assert str(tmp_path / "d.jsonl") in caught.value.message
    return str(caught.value)


def pairs(row):
    return [(m.role, m.content) for m in row.messages]


def test_messages(tmp_path):
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
            {"role": "assistant", "content": "您好 😀", "weight": 0},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c", "weight": 1},
        ],
        "id": 7,
    }
    found = one(tmp_path, row)
    assert found.messages == (
        Message("system", "Be kind."),
        Message("user", "你好"),
        Message("assistant", "您好 😀", False),
        Message("user", "b"),
        Message("assistant", "c", True),
    )
    assert found.text is None
    assert found.source == f"{tmp_path / 'd.jsonl'}:1"


def test_a_bare_list_of_messages(tmp_path):
    assert pairs(one(tmp_path, CHAT["messages"])) == [("user", "Hi"), ("assistant", "Hello")]


def test_xtuner_conversation(tmp_path):
    row = {
        "conversation": [
            {"system": "S", "input": "a", "output": "b"},
            {"input": "c", "output": "d", "output_with_loss": False},
            {"system": "S", "input": "e", "output": "f"},
        ]
    }
    found = one(tmp_path, row)
    assert pairs(found) == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f"),
    ]  # fmt: skip
    assert [m.supervised for m in found.messages if m.role == "assistant"] == [None, False, None]


def test_xtuner_pretraining_row_is_plain_text(tmp_path):
    found = one(tmp_path, {"conversation": [{"input": "", "output": "从前有座山"}]})
    assert (found.messages, found.text) == ((), "从前有座山")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n1 2"), ("assistant", "3")]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"instruction": "Hi", "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        (
            {"instruction": "c", "input": None, "output": "d", "system": "S", "history": [["a", "b"]]},
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
    ],
)
def test_alpaca(tmp_path, row, expected):
    assert pairs(one(tmp_path, row)) == expected


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ],
)
def test_sharegpt(tmp_path, turns):
    row = {"conversations": turns, "system": "S", "tools": ""}
    assert pairs(one(tmp_path, row)) == [("system", "S"), ("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("prompt", "response"), ("query", "completion"), ("question", "answer"), ("input", "output")],
)
def test_pairs_under_their_usual_names(tmp_path, asked, answered):
    row = {"system": "S", "history": [["a", "b"]], asked: "c", answered: "d", "source": "web"}
    expected = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert pairs(one(tmp_path, row)) == expected


def test_pairs_of_message_lists(tmp_path):
    row = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]}
    row["completion"] = [{"role": "assistant", "content": "b"}]
    assert pairs(one(tmp_path, row)) == [("system", "S"), ("user", "a"), ("assistant", "b")]


def test_tokens(tmp_path):
    row = {"input_ids": [5, 6, 7, 8, 0], "labels": [-100, -100, 7, 8, -100], "attention_mask": [1, 1, 1, 1, 0]}
    found = one(tmp_path, row)
    assert (found.input_ids, found.supervised) == ((5, 6, 7, 8), (0, 0, 1, 1))
    assert one(tmp_path, {"input_ids": [5, 6]}).supervised == (1, 1)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.mark.parametrize(
    "row",
    [
        {
            "tools": [{"type": "function", "function": TOOL}],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
                ]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                {"role": "assistant", "content": "b"},
            ],
        },
        {
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "b"},
            ],
        },
    ],
)  # fmt: skip
def test_tool_calls_of_openai_and_sharegpt_are_the_same(tmp_path, row):
    found = one(tmp_path, row)
    assert found.messages == (
        Message("user", "a"),
        Message("assistant", "", None, (CALL,)),
        Message("tool", "sunny"),
        Message("assistant", "b"),
    )
    assert found.tools == ({"type": "function", "function": TOOL},)


@pytest.mark.parametrize("key", ["loss", "weight"])
def test_per_message_switches(tmp_path, key):
    row = {"messages": [
        {"role": "user", "content": "a", "loss": False}, {"role": "assistant", "content": "b", key: 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", key: 1},
    ]}  # fmt: skip
    assert [m.supervised for m in one(tmp_path, row).messages] == [None, False, None, True]


def test_a_system_prompt_of_a_later_turn(tmp_path):
    turns = [{"system": "S", "input": "a", "output": "b"}, {"system": "T", "input": "c", "output": "d"}]
    expected = [("system", "S"), ("user", "a"), ("assistant", "b"), ("system", "T"), ("user", "c"), ("assistant", "d")]
    assert pairs(one(tmp_path, {"conversation": turns})) == expected
    messages = [{"role": r, "content": c} for r, c in expected]
    assert pairs(one(tmp_path, {"messages": messages})) == expected


def test_columns_and_tags(tmp_path, capsys):
    def named(row, **names):
        source = DataFile(str(jsonl(tmp_path / "d.jsonl", row)), "auto", names=RowNames(**names))
        (found,) = read_rows((source,), 0)
        return found

    row = {"q": "a", "more": "b", "a": "c", "sys": "S", "id": 7, "system": "not this"}
    found = named(row, prompt="q", query="more", response="a", system="sys")
    assert pairs(found) == [("system", "S"), ("user", "a\nb"), ("assistant", "c")]
    out = capsys.readouterr().out
    assert "`alpaca` (columns and its first row say so); keys that are not read: id, system" in out
    assert named({"body": "从前"}, prompt="body").text == "从前"
    assert pairs(named({"chat": CHAT["messages"]}, messages="chat")) == [("user", "Hi"), ("assistant", "Hello")]
    turns = [{"who": "Q", "says": "a"}, {"who": "A", "says": "b"}]
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"}
    assert pairs(named({"dialog": turns}, messages="dialog", **tags)) == [("user", "a"), ("assistant", "b")]
    with pytest.raises(TrainError, match=r"d\.jsonl:1: the row has no `answer`, but the keys q"):
        named({"q": "a"}, prompt="q", response="answer")


def test_every_source_has_its_own_limit(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", {"text": "1"}, {"text": "2"}, {"text": "3"})
    b = jsonl(tmp_path / "b.jsonl", CHAT, CHAT)
    sources = (DataFile(str(a), "auto", max_rows=2), DataFile(str(b), "auto"))
    assert [(r.source_number, r.line) for r in read_rows(sources, 0)] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [(r.source_number, r.line) for r in read_rows(sources, 3)] == [(0, 1), (0, 2), (1, 1)]


def test_a_folder_and_a_pattern_are_one_source(tmp_path, capsys):
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    (tmp_path / "rows" / "README.md").write_text("no rows", encoding="utf-8")
    (tmp_path / "rows" / "dataset_info.json").write_text("{}", encoding="utf-8")
    for name, text in (("b.jsonl", "2"), ("a.jsonl", "1"), ("deep/c.jsonl", "3")):
        jsonl(tmp_path / "rows" / name, {"text": text})
    assert [r.text for r in read(tmp_path / "rows")] == ["1", "2", "3"]
    assert capsys.readouterr().out.count("rows are read as") == 1
    assert [r.text for r in read(tmp_path / "rows" / "[ab].jsonl")] == ["1", "2"]
    assert [r.text for r in read(tmp_path / "rows" / "**" / "*.jsonl", max_rows=2)] == ["1", "2"]
    jsonl(tmp_path / "rows" / "test.jsonl", {"text": "4"})
    source_files.cache_clear()
    with pytest.raises(TrainError, match=r"several splits: test\.jsonl is not for training"):
        read(tmp_path / "rows")


def test_plain_text(tmp_path):
    assert one(tmp_path, {"text": "Once upon a time", "meta": {}}).text == "Once upon a time"


def test_the_format_of_a_file_is_said(tmp_path, capsys):
    one(tmp_path, CHAT)
    assert f"{tmp_path / 'd.jsonl'}: rows are read as `messages` (its first row says so)" in capsys.readouterr().out


def test_a_json_array_knows_its_lines(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[\n  {"text": "a"},\n\n  {"text":\n "b"}, {"text": "c"}\n]\n', encoding="utf-8")
    assert [(r.text, r.line) for r in read(path)] == [("a", 2), ("b", 4), ("c", 5)]


def test_array_and_lines_are_told_apart_by_content(tmp_path):
    lines = tmp_path / "lines.json"
    lines.write_text('{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    array = tmp_path / "array.jsonl"
    array.write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n', encoding="utf-8")
    assert [(r.text, r.line) for r in read(lines)] == [("a", 1), ("b", 3)]
    assert [(r.text, r.line) for r in read(array)] == [("a", 2), ("b", 3)]


def test_max_rows_counts_over_all_files(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", {"text": "1"}, {"text": "2"})
    b = jsonl(tmp_path / "b.jsonl", CHAT, CHAT)
    files = (DataFile(str(a), "auto"), DataFile(str(b), "auto"))
    assert [r.line for r in read_rows(files, 3)] == [1, 2, 1]
    assert len(list(read_rows(files, 0))) == 4


def test_a_utf8_bom_is_accepted(tmp_path):
    for name, text in (("d.jsonl", '{"text": "鸟"}\n'), ("d.json", '[{"text": "鸟"}]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read(tmp_path / name)[0].text == "鸟"


@pytest.mark.parametrize(
    ("encoding", "named"), [("gbk", "GBK"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")]
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_other_encodings_are_named_with_the_command_that_converts(tmp_path, encoding, named, name):
    rows = [{"text": "plain"}, {"text": "我是小鹪，由团队开发的聊天助手。"}]
    text = (
        json.dumps(rows, ensure_ascii=False)
        if name == "d.json"
        else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(TrainError) as caught:
        read(tmp_path / name)
    assert f"not UTF-8; it looks like {named}" in caught.value.message
    target = tmp_path / name.replace("d.", "d.utf8.")
    assert f"iconv -f {named} -t UTF-8 {tmp_path / name} > {target}" in caught.value.hint
    if encoding == "gbk" and name == "d.jsonl":
        assert f"{tmp_path / name}:2:" in caught.value.message


def test_one_broken_byte_in_utf8_is_not_called_gbk(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"text": "鸟"}\n{"text": "'.encode() + b'\xe9"}\n')
    with pytest.raises(TrainError, match=r"d\.jsonl:2: a byte that is not UTF-8"):
        read(path)


def test_latin1_is_not_called_gbk(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"text": "café olé"}\n'.encode("latin-1"))
    with pytest.raises(TrainError, match="its encoding cannot be told"):
        read(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"[]", "holds no rows"),
        (b"PAR1\x15\x04", "is damaged"),
        (b"ARROW1\0\0\1\2", "is damaged"),
        (b"\xff\xff\xff\xff\1\2", "is damaged"),
        (b"\x1f\x8b\x08", "is damaged"),
        (b"\x28\xb5\x2f\xfd\1", "is damaged"),
        (b"PK\x03\x04abc", "binary file"),
    ],
)
def test_files_without_rows(tmp_path, content, expected):
    path = tmp_path / "d.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainError, match=expected) as caught:
        read(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_malformed_line_is_named_with_its_column(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b" "c"}\n{"text": "d"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(TrainError) as caught:
        read(path)
    first, second = caught.value.message.splitlines()
    assert first.startswith(f"{path}:2: not valid JSON: Expecting ',' delimiter at column 14")
    assert first.endswith("""near '{"text": "b" "c"} '""")
    assert second.startswith(f"{path}:4: not valid JSON")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"text": "a"},\n{"text": }\n]', 3),
        ('[{"text": "a"}\n{"text": "b"}]', 2),
        ('[{"text": "a"},\n', 2),
        ('[{"text": "a"}]\n\n[{"text": "b"}]', 3),
        ('[{"text": "a"},\n{"text": "b', 2),
        ('[{"text": "a"},\n]', 2),
    ],
)
def test_a_malformed_array_is_named_with_its_line(tmp_path, text, line):
    path = tmp_path / "d.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TrainError) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}:{line}: ")


def test_unknown_shape_names_the_keys_and_all_formats(tmp_path):
    message = error(tmp_path, {"question": "a", "reply": "b"}, {"question": "c"})
    assert "d.jsonl:1: the row has the keys question, reply, which is none of the known formats" in message
    assert message.count("d.jsonl:") == 1
    for name in ("conversation", "alpaca", "messages", "sharegpt", "pair", "text", "ids"):
        assert f"\n    {name} " in message


def test_a_row_of_another_shape_is_named(tmp_path):
    message = error(tmp_path, {"text": "a"}, {"instruction": "a", "output": "b"}, {"text": "c"}, "d")
    assert "d.jsonl:2: the row has the keys instruction, output, but the file is read as `text`" in message
    assert "d.jsonl:4: the row has no keys (it is a string)" in message
    assert "d.jsonl:3" not in message


def test_a_stated_format_is_held_against_the_row(tmp_path):
    message = error(tmp_path, CHAT, format="alpaca")
    assert "the row has the keys messages, but the file is read as `alpaca` (the recipe says format: alpaca)" in message


def turns(*roles):
    return {"messages": [{"role": r, "content": "x"} for r in roles]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": 3}, "`text` is a number, not a string"),
        ({"text": "a\ud83d"}, "half of a surrogate pair"),
        ({"instruction": "a", "output": None}, "`output` is null, not a string"),
        ({"instruction": "", "output": "b"}, "`instruction` and `input` are both empty"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "item 1 of `history` is not a pair"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": "x"}, "`messages` is a string, not a list"),
        ({"messages": ["x"]}, "turn 1 is a string, not an object"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no `content`, but the keys role"),
        (turns("user", "user"), "the last turn is a `user` turn: there is no answer to learn"),
        (turns("assistant", "user", "assistant"), "turn 1 is an assistant turn that is the first turn"),
        (turns("user", "assistant", "assistant"), "turn 3 is an assistant turn that follows a turn of `assistant`"),
        (turns("system", "assistant"), "turn 2 is an assistant turn that follows a turn of `system`"),
        (turns("user", "system", "assistant"), "turn 2 is a system prompt that follows a turn of `user`"),
        (turns("user", "bot"), "turn 2 has the unknown role `bot`"),
        (turns("user", "tool"), "turn 2 is the result of a tool, and the turn before it calls none"),
        (turns("user", "assistant", "tool", "assistant"), "turn 3 is the result of a tool, and the turn before it"),
        ({**CHAT, "tools": "[{"}, "`tools` is not valid JSON: Expecting property name"),
        ({**CHAT, "tools": [{"description": "x"}]}, "item 1 of `tools` has no `name`"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]},
            "turn 1 of `user` has `tool_calls`",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
            "`loss` or `weight` of turn 2 is 0.5",
        ),
        ({"messages": [{"role": "user", "content": "a", "loss": True}]}, "turn 1 of `user` is to be learnt"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "reasoning_content": "c"},
                ]
            },
            "turn 2 has its reasoning apart from `content`",
        ),
        (
            {"conversation": [{"input": "a", "output": "b", "output_with_loss": "no"}]},
            "`output_with_loss` of turn 1 is 'no'",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "`chosen` and `rejected`: ranking rows (DPO, KTO, reward models)",
        ),
        ({"instruction": "a", "output": "b", "images": ["x.png"]}, "the row has `images`"),
        ({"prompt": "a", "question": "b", "answer": "c"}, "the row has both `prompt` and `question`"),
        ({"prompt": "a", "response": "b", "answer": "c"}, "the row has both `response` and `answer`"),
        ({"prompt": "", "response": "b"}, "`prompt` is empty"),
        ({"input_ids": [1, "2"]}, "`input_ids` holds something else than whole numbers"),
        ({"input_ids": [1, True]}, "`input_ids` holds something else than whole numbers"),
        ({"input_ids": [1, 2], "labels": [2]}, "`input_ids` has 2 items, `labels` 1, `attention_mask` 2"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 3, -100]}, "label 2 is 3, the token there 2"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content part of type `image_url`"),
        ({"conversation": [{"input": "", "output": "a"}, {"input": "b", "output": "c"}]}, "`input` of turn 1 is empty"),
        ({"conversation": [{"input": "a"}]}, "turn 1 has no `output`, but the keys input"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
            "the call of turn 2 is not valid JSON: Expecting value at character 1",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": 1}'}]},
            "the name of a tool call of turn 2 is a number",
        ),
        ({"conversations": [{"from": "human", "text": "a"}]}, "turn 1 has no `value`"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(tmp_path, row, expected):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")  # escapes: a lone surrogate has no UTF-8
    with pytest.raises(TrainError) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}:1: ")
    assert expected in caught.value.message
    assert caught.value.hint


def test_two_user_turns_in_a_row_are_left_to_the_template(tmp_path):
    assert len(one(tmp_path, turns("user", "user", "assistant")).messages) == 3


def test_twenty_problems_are_shown_at_once(tmp_path):
    rows = [CHAT] + [turns("user")] * 30
    seen = []
    found = read_rows((DataFile(str(jsonl(tmp_path / "d.jsonl", *rows)), "auto"),), 0)
    with pytest.raises(TrainError) as caught:
        seen.extend(row.line for row in found)
    assert seen == [1]
    lines = caught.value.message.splitlines()
    assert len(lines) == 21
    assert lines[19].startswith(f"{tmp_path / 'd.jsonl'}:21: ")
    assert "stopped after 20" in lines[20]


def test_nothing_is_yielded_after_the_first_problem(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", {"text": "a"}, {"text": 1}, {"text": "b"})
    rows = read_rows((DataFile(str(path), "auto"),), 0)
    assert next(rows).text == "a"
    with pytest.raises(TrainError):
        next(rows)


@pytest.mark.parametrize(
    ("name", "known_as", "least"), [("identity_en.jsonl", "Wren", 105), ("identity_zh.jsonl", "小鹪", 95)]
)
def test_shipped_identity_rows(name, known_as, least):
    rows = read(DATA / name)
    assert len(rows) >= least
    answers = [r.messages[-1].content for r in rows]
    named = [a for a in answers if known_as in a]
    assert len(named) >= 65
    assert sum("Tunelaunch" in a for a in named) >= 0.95 * len(named)
    assert len(answers) - len(named) >= 25, "some rows are about other things"
    questions = [m.content for r in rows for m in r.messages if m.role == "user"]
    assert len(set(questions)) >= len(questions) - 2


def test_questions_of_the_demo_are_not_among_its_rows():
    recipe = (DATA.parent / "smollm2_identity.yaml").read_text(encoding="utf-8")
    asked = [line.split('"')[1] for line in recipe.splitlines() if "user:" in line]
    assert len(asked) >= 10
    questions = {m.content for r in read(DATA / "identity_en.jsonl") for m in r.messages if m.role == "user"}
    assert not questions & set(asked)
