import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_chat_model import save_tiny_model

from trainer import prepare, row_documents
from trainer.data import TokenData
from trainer.spec import (
    SPEC_VERSION,
    CheckpointSpec,
    DataFile,
    DataSpec,
    EvaluateSpec,
    MethodSpec,
    ModelSpec,
    OptimSpec,
    ParallelSpec,
    PathsSpec,
    Prepared,
    StorageSpec,
    TrainError,
    TrainSpec,
)
from trainer.template import load_template

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    write_chats(path, [(f"Question {i}?", f"Answer {i}: 我是小鹪。" * (1 + i % 4)) for i in range(30)])
    return path


def write_chats(path, pairs):
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def make(model, data_file, tmp_path):
    """`make(**data settings)` writes a plan and returns it."""

    def make(kind="folder", location=None, **settings):
        location, run = str(location or model), tmp_path / "run"
        run.mkdir(exist_ok=True)
        defaults = DataSpec(
            files=(DataFile(str(data_file), "auto"),), system=None, template="model", max_length=256, packing=True,
            learn="answers", too_long="truncate", max_cut_off=1.0, max_rows=0, held_out=0.0, held_out_files=(), cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        names = [f.name for f in dataclasses.fields(PathsSpec) if f.name != "run_dir"]
        spec = TrainSpec(
            version=SPEC_VERSION,
            run_id="r",
            recipe_name="r",
            package_root=str(ROOT),
            model=ModelSpec(location, kind, location, "main", "bf16", False, str(tmp_path / "cache")),
            method=MethodSpec("lora", 4, 8.0, 0.0, ("all-linear",), True),
            data=dataclasses.replace(defaults, **settings),
            optim=OptimSpec(1.0, 0, 1, 1, 1e-4, "cosine", 0.0, 0.0, (0.9, 0.999), 1e-8, 1.0, 0, False, False),
            parallel=ParallelSpec("cpu", 1, 1, 1, 2, "none", 1, 60),
            checkpoint=CheckpointSpec(0, 2, False, "stop"),
            storage=StorageSpec("", ()),
            evaluate=EvaluateSpec((), 16, 0, 2, 0, False),
            paths=PathsSpec(run_dir=str(run), **{n: str(run / n) for n in names}),
            deepspeed={},
            debug=False,
            profile_steps=(),
        )
        (run / "plan.json").write_text(json.dumps({"spec": spec.to_dict()}), encoding="utf-8")
        return run / "plan.json"

    return make


def run(plan):
    """Prepared and TokenData of a finished run."""
    prepare.run(argparse.Namespace(plan=str(plan)))
    prepared = Prepared.read(str(plan.parent / "prepared"))
    return prepared, TokenData.open(prepared.data_dir)


def test_prepare(make, model, capsys):
    plan = make()
    prepared, data = run(plan)
    assert prepared.model_dir == str(model)
    assert (prepared.num_documents, prepared.num_rows) == (30, data.num_rows)
    assert prepared.num_tokens == data.tokens_per_row.sum()
    assert prepared.num_supervised_tokens == data.supervised_per_row.sum()
    assert data.num_rows < 30
    assert data.tokens_per_row.max() <= 256
    events = [json.loads(line) for line in (plan.parent / "events").read_text(encoding="utf-8").splitlines()]
    assert [(e["event"], e["num_documents"], e["reused"]) for e in events] == [("prepared", 30, False)]
    out = capsys.readouterr().out
    assert "prompts 30 of 30, whole conversations 30 of 30" in out
    assert "data: 30 rows -> 30 documents" in out
    assert "left out" not in out


def test_rows_hold_the_text_of_the_file(make, model, data_file):
    _, data = run(make())
    tokenizer = load_template(str(model), "model").tokenizer
    seen = []
    for row in range(data.num_rows):
        batch, at = data.batch([row], 256), 0
        for length, source in zip(batch.document_lengths, data.sources(row), strict=False):
            labels = [i for i in batch.labels_1T[0, at : at + length].tolist() if i != -100]
            line = int(source.removeprefix(f"{data_file}:"))
            answer = f"Answer {line - 1}: 我是小鹪。" * (1 + (line - 1) % 4)
            assert tokenizer.decode(labels) == answer + "<|im_end|>"
            seen.append(line)
            at += length
    assert sorted(seen) == list(range(1, 31))


def test_the_second_run_finds_the_tokens_and_imports_no_torch(make):
    plan = make()
    first, _ = run(plan)
    code = (
        "import sys, argparse; from trainer import prepare; "
        f"prepare.run(argparse.Namespace(plan={str(plan)!r})); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "tokens found in" in done.stdout
    assert "data: 30 rows -> 30 documents" in done.stdout
    assert Prepared.read(str(plan.parent / "prepared")) == first


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 300},
        {"packing": False},
        {"too_long": "drop"},
        {"max_rows": 29},
        {"system": "Be kind."},
    ],
)
def test_other_settings_are_another_entry(make, settings):
    assert run(make())[0].data_dir != run(make(**settings))[0].data_dir


def test_another_tokenizer_template_or_content_is_another_entry(make, model, data_file, tmp_path):
    entries = {run(make())[0].data_dir}
    copy = shutil.copytree(model, tmp_path / "copy")
    entries.add(run(make(location=copy))[0].data_dir)
    assert len(entries) == 1, "the same model in another place"
    shutil.copy(data_file, tmp_path / "same.jsonl")
    entries.add(run(make(files=(DataFile(str(tmp_path / "same.jsonl"), "auto"),)))[0].data_dir)
    assert len(entries) == 1, "the same data in another place"
    template = (copy / "chat_template.jinja").read_text(encoding="utf-8")
    (copy / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")
    entries.add(run(make(location=copy))[0].data_dir)
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    entries.add(run(make(template=str(tmp_path / "t.jinja")))[0].data_dir)
    data_file.write_text(data_file.read_text(encoding="utf-8").replace("Answer 3:", "Answer 4:"), encoding="utf-8")
    entries.add(run(make())[0].data_dir)
    assert len(entries) == 4


def test_a_damaged_entry_is_made_again(make, capsys):
    prepared, data = run(make())
    expected = data.batch([0], 256).input_ids_1T.tolist()
    tokens = Path(prepared.data_dir) / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-8])
    capsys.readouterr()
    again, data = run(make())
    assert again == prepared
    assert "is damaged (tokens.bin has" in capsys.readouterr().out
    assert data.batch([0], 256).input_ids_1T.tolist() == expected


def test_nothing_is_left_of_a_failed_run(make, data_file, tmp_path):
    with data_file.open("a", encoding="utf-8") as f:
        f.write('{"messages": [\n')
    with pytest.raises(TrainError, match=r"data\.jsonl:31: not valid JSON"):
        run(make())
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    assert not (tmp_path / "run" / "prepared").exists()


def test_another_process_may_make_the_entry_first(make, monkeypatch):
    plan = make()
    build = prepare._build

    def slower(folder, spec, model_dir):
        build(folder, spec, model_dir)
        if not slower.done:
            slower.done = True
            command = [sys.executable, "-m", "trainer.worker", "prepare", "--plan", str(plan)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)

    slower.done = False
    monkeypatch.setattr(prepare, "_build", slower)
    prepared, data = run(plan)
    assert slower.done
    assert prepared.num_rows == data.num_rows
    assert [p.name for p in Path(prepared.data_dir).parent.iterdir()] == [Path(prepared.data_dir).name]


def test_long_documents_are_cut_or_dropped_and_counted(make, data_file, capsys):
    # Lines 1 and 2 fit into 60 tokens, 3 loses the end of its answer, 4 all of it; 5 has an empty one.
    write_chats(data_file, [("a", "b"), ("c", "d"), ("e", "f" * 200), ("g" * 300, "h"), ("i", "")])
    cut, data = run(make(max_length=60, packing=False))
    assert [data.sources(r)[0].split(":")[-1] for r in range(data.num_rows)] == ["1", "2", "3"]
    assert data.tokens_per_row.tolist()[2] == 60
    out = capsys.readouterr().out
    assert "1 documents cut to 60 tokens" in out
    assert "2 rows left out: no token to learn" in out
    dropped, data = run(make(max_length=60, packing=False, too_long="drop"))
    assert (cut.num_documents, dropped.num_documents) == (3, 2)
    out = capsys.readouterr().out
    assert "2 documents of more than 60 tokens left out" in out
    assert "1 rows left out: no token to learn" in out


def turns(number, words):
    """A conversation of that many questions, the k-th answered by `words` times its own word."""
    pairs = [(f"Question {k}?", " ".join([f"answer{k}"] * words)) for k in range(number)]
    messages = [{"role": "system", "content": "Be kind."}]
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def texts(plan, model):
    """(all of a document, what is learnt of it) as texts, for each document in the order of the data."""
    _, data = run(plan)
    tokenizer = load_template(str(model), "model").tokenizer
    found = []
    for number in range(len(data.document_lengths)):
        ids, kinds = data.document(number)
        found.append((tokenizer.decode(ids.tolist()), tokenizer.decode(ids[kinds > 0].tolist())))
    return found


def test_what_is_learnt_can_be_chosen(make, model, data_file):
    data_file.write_text(json.dumps(turns(3, 1)) + "\n", encoding="utf-8")
    learnt = {learn: texts(make(learn=learn), model)[0] for learn in ("answers", "last", "all")}
    whole = learnt["answers"][0]
    assert {text for text, _ in learnt.values()} == {whole}
    assert learnt["answers"][1] == "answer0<|im_end|>answer1<|im_end|>answer2<|im_end|>"
    assert learnt["last"][1] == "answer2<|im_end|>"
    assert whole == "<|im_start|>" + learnt["all"][1]  # nothing comes before the first token


def test_long_conversations_are_split_between_turns(make, model, data_file, capsys):
    """Each part begins with the system prompt, fits, and every answer is learnt in exactly one."""
    rows = [turns(7, 6), turns(1, 1), turns(2, 3)]
    data_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plan = make(too_long="split-turns", max_length=128, held_out=0.5)
    found = texts(plan, model)
    assert "data: 1 rows of more than 128 tokens split between their turns" in capsys.readouterr().out
    _, data = run(plan)
    assert max(data.document_lengths) <= 128
    parts = [pair for pair in found if "answer0 answer0 answer0 answer0" in pair[0] or "answer6" in pair[0]]
    assert len(found) > 4
    assert all(
        text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQuestion") for text, _ in found
    )
    answers = [f"{' '.join([f'answer{k}'] * 6)}<|im_end|>" for k in range(7)]
    learnt = [text for _, text in found]
    assert "".join(learnt).startswith("".join(answers))
    assert parts
    # Parts of one row are held out together, or not at all.
    held_out = {int(d) for row in data.held_out_rows for d in data.documents(row)}
    first_row = {number for number in range(len(found)) if data.source(number).endswith(":1")}
    assert first_row <= held_out or not first_row & held_out


def test_an_exchange_that_is_too_long_by_itself_is_cut(make, model, data_file, capsys):
    row = turns(3, 3)
    row["messages"][4]["content"] = "long " * 200
    data_file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = texts(make(too_long="split-turns", max_length=100), model)
    assert [("answer0" in text, "long" in text, "answer2" in text) for _, text in found] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert "1 documents cut to 100 tokens" in capsys.readouterr().out


def test_long_texts_are_split_anywhere(make, model, data_file):
    text = " ".join(f"word{n}" for n in range(200))
    data_file.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    found = texts(make(too_long="split-turns", max_length=64), model)
    assert len(found) > 5
    assert "".join(whole for whole, _ in found).startswith(text)


def test_too_many_rows_without_anything_left_to_learn_are_an_error(make, data_file):
    long_question = {"messages": [{"role": "user", "content": "why " * 300}, {"role": "assistant", "content": "So."}]}
    rows = [long_question, *[turns(1, 1)] * 4]
    data_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(TrainError, match=r"1 of 5 rows have nothing left to learn .* allows 10%") as caught:
        run(make(max_length=128, max_cut_off=0.1))
    assert "split-turns" in caught.value.hint
    run(make(max_length=128, max_cut_off=0.2))
    # An empty answer is no cut.
    rows[0] = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": ""}]}
    data_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(make(max_length=128, max_cut_off=0.0))


def test_nothing_to_learn_is_an_error(make):
    with pytest.raises(TrainError, match="none of the 30 rows has a token to learn") as caught:
        run(make(max_length=8))
    assert "max_length" in caught.value.hint


def test_more_rows_than_one_chunk(make, data_file, monkeypatch):
    whole, data = run(make(packing=False))
    monkeypatch.setattr(row_documents, "CHUNK_ROWS", 7)
    shutil.rmtree(whole.data_dir)
    pieces, again = run(make(packing=False))
    assert pieces == whole
    for row in range(30):
        assert again.sources(row) == [f"{data_file}:{row + 1}"]
        assert again.batch([row], 256).labels_1T.tolist() == data.batch([row], 256).labels_1T.tolist()


def test_text_needs_no_template_and_chat_does(make, tmp_path, data_file):
    base = save_tiny_model(tmp_path / "base", template=None)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "从前有座山"}\n', encoding="utf-8")
    prepared, _ = run(make(location=base, files=(DataFile(str(text), "auto"),)))
    assert prepared.num_supervised_tokens == prepared.num_tokens - 1, "all but the first token, and the end of text"
    with pytest.raises(TrainError, match="has no chat template") as caught:
        run(make(location=base))
    assert "data.template" in caught.value.hint
    assert f"{data_file}:1" in caught.value.message


def test_a_tokenizer_of_another_model_is_refused(make, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 100}), encoding="utf-8")
    with pytest.raises(TrainError, match="beyond the model's 100 embeddings"):
        run(make(location=other))


def test_a_missing_file_is_said_before_anything_is_loaded(make, tmp_path):
    with pytest.raises(TrainError, match=r"absent\.jsonl does not exist"):
        run(make(files=(DataFile(str(tmp_path / "absent.jsonl"), "auto"),)))


WORKER_WITHOUT_TORCH = """
import sys
from trainer import worker
code = worker.main(sys.argv[1:])
print(code, "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_process_of_its_own_makes_the_same_tokens_without_torch(make, tmp_path):
    plan = make()
    here, _ = run(plan)
    entry = {p.name: p.read_bytes() for p in Path(here.data_dir).iterdir()}
    shutil.rmtree(here.data_dir)
    logs = tmp_path / "logs"
    logs.mkdir()
    argv = [sys.executable, "-c", WORKER_WITHOUT_TORCH, "prepare", "--log-dir", str(logs), "--plan", str(plan)]
    subprocess.run(argv, cwd=ROOT, check=True, timeout=120)
    log = (logs / "rank_0.log").read_text(encoding="utf-8")
    assert log.splitlines()[-1] == "0 False True"
    assert "PyTorch was not found" not in log
    assert {p.name: p.read_bytes() for p in Path(here.data_dir).iterdir()} == entry
