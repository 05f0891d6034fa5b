"""Every format from a hand-made file to the documents that are trained on: what the model reads, and what it learns.

The golden files show each document with its supervised spans in brackets. They are written by --update-golden.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
from support.handmade_run import make_spec
from support.tiny_chat_model import save_tiny_model

from trainer import prepare
from trainer.data import IGNORED, TokenData
from trainer.spec import DataFile, Prepared, RowNames, TrainError
from trainer.template import load_template

ROWS = Path(__file__).parents[2] / "golden" / "rows"
SOURCES = {
    "conversation": {"path": "conversation.jsonl"},
    "alpaca": {"path": "alpaca.jsonl"},
    "sharegpt": {"path": "sharegpt.jsonl"},
    "messages": {"path": "messages.jsonl"},
    "pair": {"path": "pair.csv"},
    "text": {"path": "text.jsonl"},
    "ids": {"path": "ids.jsonl"},
    "columns": {"path": "columns.json", "names": RowNames(prompt="q", query="numbers", response="a", system="who")},
    "mapped": {"path": "mapped.jsonl", "map": f"{ROWS / 'translate.py'}:both_ways"},
}
SHOWS_TOOLS = """
{%- if tools %}{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') + '\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory):
    """Its template shows tools as Qwen2.5's does."""
    return save_tiny_model(tmp_path_factory.mktemp("tools"), template=SHOWS_TOOLS, max_positions=2048)


@pytest.fixture
def prepared(model, tmp_path):
    """`prepared(*sources, **settings of data)` -> (Prepared, TokenData) of a run of the prepare stage."""

    def run(*sources, model_dir=model, **settings):
        spec = make_spec(tmp_path)
        data = dataclasses.replace(
            spec.data,
            files=sources,
            system=None,
            max_length=1024,
            packing=False,
            cache_dir=str(tmp_path / "cache"),
            **settings,
        )
        kind = dataclasses.replace(spec.model, kind="folder", location=str(model_dir))
        plan = tmp_path / "plan.json"
        plan.write_text(
            json.dumps({"spec": dataclasses.replace(spec, model=kind, data=data).to_dict()}), encoding="utf-8"
        )
        prepare.run(argparse.Namespace(plan=str(plan)))
        found = Prepared.read(spec.paths.prepared)
        return found, TokenData.open(found.data_dir)

    return run


def documents(data, model):
    """Each document as text, with [what is learnt] in brackets, behind its file and line."""
    tokenizer = load_template(str(model), "model").tokenizer
    lines = []
    for row in range(data.num_rows):
        batch = data.batch([row], data.row_length([row]))
        length = batch.document_lengths[0]
        ids, labels = batch.input_ids_1T[0, :length].tolist(), batch.labels_1T[0, :length].tolist()
        learnt = [False] + [label != IGNORED for label in labels[:-1]]
        assert all(label == token for label, token in zip(labels, ids[1:], strict=False) if label != IGNORED)
        text, start = "", 0
        for i in range(1, length + 1):
            if i == length or learnt[i] != learnt[start]:
                piece = tokenizer.decode(ids[start:i])
                text += f"⟦{piece}⟧" if learnt[start] else piece
                start = i
        (source,) = data.sources(row)
        lines.append(f"--- {Path(source).name}\n{text}\n")
    return "".join(lines)


@pytest.mark.parametrize("name", SOURCES)
def test_documents_of_every_format(name, prepared, model, golden):
    settings = {**SOURCES[name], "path": str(ROWS / SOURCES[name]["path"])}
    _, data = prepared(DataFile(format="auto", **settings))
    found = documents(data, model)
    assert golden(f"rows/{name}.txt", found) == found
    assert "⟦" in found


@pytest.mark.parametrize("name", ["tools_openai.jsonl", "tools_sharegpt.jsonl"])
def test_calls_of_tools_are_learnt_and_their_results_are_read(name, prepared, tool_model, golden):
    _, data = prepared(DataFile(str(ROWS / name), "auto"), model_dir=tool_model)
    found = documents(data, tool_model)
    assert golden("rows/tools.txt", found.replace(name, "tools")) == found.replace(name, "tools")


def test_a_template_that_leaves_tools_out_is_refused(prepared):
    with pytest.raises(
        TrainError, match=r"tools_openai\.jsonl:1: the row brings tools, and the chat template leaves out"
    ):
        prepared(DataFile(str(ROWS / "tools_openai.jsonl"), "auto"))
    with pytest.raises(TrainError, match=r"tools_openai\.jsonl:1: .* xtuner/qwen_chat has no place for them"):
        prepared(DataFile(str(ROWS / "tools_openai.jsonl"), "auto"), template="xtuner/qwen_chat")


def test_a_template_that_leaves_out_later_system_prompts_is_refused(prepared, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role != 'system' or loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    with pytest.raises(
        TrainError, match=r"conversation\.jsonl:1: turn 6 is a system prompt, and the chat template leaves"
    ):
        prepared(DataFile(str(ROWS / "conversation.jsonl"), "auto"), template=str(template))


def test_tokens_of_another_tokenizer_are_refused(prepared, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [1, 5000]}\n', encoding="utf-8")
    with pytest.raises(TrainError, match=r"d\.jsonl:2: token 5000 is beyond") as caught:
        prepared(DataFile(str(tmp_path / "d.jsonl"), "auto"))
    assert "another model's tokenizer" in caught.value.hint


def write_pairs(path, prefix, count):
    rows = [{"prompt": f"{prefix} {i}?", "response": f"answer {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_weights_decide_how_often_rows_are_trained_on(prepared, tmp_path, capsys):
    a, b = write_pairs(tmp_path / "a.jsonl", "first", 20), write_pairs(tmp_path / "b.jsonl", "second", 10)
    found, data = prepared(DataFile(a, "auto", weight=0.25), DataFile(b, "auto", weight=2.5))
    seen = [data.sources(row)[0] for row in range(data.num_rows)]
    of_a, of_b = [s for s in seen if s.startswith(a)], [s for s in seen if s.startswith(b)]
    assert (len(of_a), len(set(of_a))) == (5, 5)
    assert (len(of_b), len(set(of_b))) == (25, 10)
    assert {of_b.count(s) for s in of_b} == {2, 3}
    assert (found.num_documents, found.num_rows) == (30, 30)
    assert found.num_tokens == data.tokens_per_row.sum()
    assert found.num_supervised_tokens == data.supervised_per_row.sum()
    out = capsys.readouterr().out
    assert f"data: {a}: 20 rows -> 20 documents x weight 0.25 = 5 an epoch, " in out
    assert f"data: {b}: 10 rows -> 10 documents x weight 2.5 = 25 an epoch, " in out
    assert "data: 30 rows -> 30 documents" in out
    (event,) = [json.loads(line) for line in (tmp_path / "events").read_text(encoding="utf-8").splitlines()]
    assert [(s["rows"], s["documents"], s["trained"]) for s in event["sources"]] == [(20, 20, 5), (10, 10, 25)]


def test_weights_and_held_out_rows(prepared, tmp_path):
    a = write_pairs(tmp_path / "a.jsonl", "first", 20)
    found, data = prepared(DataFile(a, "auto", weight=2.0), held_out=0.25)
    held_out = {s for row in data.held_out_rows for s in data.sources(row)}
    trained = [s for row in range(data.num_rows) for s in data.sources(row)]
    assert (len(held_out), found.num_held_out_rows, len(trained)) == (5, 5, 30)
    assert not held_out & set(trained)


def test_all_that_decides_the_tokens_is_in_the_name_of_the_entry(prepared, tmp_path):
    a, b = write_pairs(tmp_path / "a.jsonl", "first", 4), write_pairs(tmp_path / "b.jsonl", "second", 3)
    code = tmp_path / "m.py"
    code.write_text("def f(row):\n    return row\n", encoding="utf-8")
    one, two = DataFile(a, "auto"), DataFile(b, "auto")
    mapped = dataclasses.replace(one, map=f"{code}:f")
    mixes = [
        (one,), (one, two), (two, one), (dataclasses.replace(one, weight=2.0), two), (one, dataclasses.replace(two, weight=2.0)),
        (dataclasses.replace(one, max_rows=3), two), (dataclasses.replace(one, names=RowNames(prompt="prompt")),), (mapped,),
    ]  # fmt: skip
    entries = [prepared(*mix)[0].data_dir for mix in mixes]
    assert len(set(entries)) == len(mixes)
    assert prepared(mapped)[0].data_dir == entries[-1]
    code.write_text("def f(row):\n    return {**row, 'system': 'S'}\n", encoding="utf-8")
    assert prepared(mapped)[0].data_dir not in entries
