import argparse
import gc
import json
import weakref

import pytest
import torch
from support.handmade_run import make_prepared, make_spec, write_run
from support.tiny_chat_model import save_tiny_model

from trainer import evaluate, worker
from trainer.generate import generate_answers, load_for_generation
from trainer.report import read_results
from trainer.spec import PromptSpec, TrainError
from trainer.template import load_template

MET = PromptSpec("Who are you?", None, (), "(?s).*", "")
UNMET = PromptSpec("你是谁？", "", ("zzzz",), "", "zh")
FREE = PromptSpec("Hi", "Be brief.", (), "", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tuned"), seed=1)


def stage(*argv):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args([str(a) for a in argv]))


def run_folder(tmp_path, base, prompts, strict=False):
    spec = make_spec(tmp_path, prompts, strict)
    return spec, write_run(tmp_path, spec, make_prepared(str(base)))


def answers(folder, conversations, adapter=None):
    model = load_for_generation(str(folder), torch.float32, torch.device("cpu"), adapter)
    return [a.text for a in generate_answers(model, load_template(str(folder), "model"), conversations, 12)]


def test_a_run_with_a_merged_model(tmp_path, base, tuned, capsys):
    _spec, plan = run_folder(tmp_path, base, (MET, UNMET, FREE))
    (tmp_path / "merged").symlink_to(tuned)
    stage("--plan", plan)
    results = read_results(tmp_path / "report")
    conversations = [
        [("system", "你是小薇。"), ("user", "Who are you?")],
        [("system", ""), ("user", "你是谁？")],
        [("system", "Be brief."), ("user", "Hi")],
    ]
    assert [r.base.text for r in results if r.base] == answers(base, conversations)
    assert [r.tuned.text for r in results] == answers(tuned, conversations)
    assert [r.system for r in results] == ["你是小薇。", "", "Be brief."]
    out = capsys.readouterr().out
    assert "expectations met: base 1 of 2, tuned 1 of 2" in out
    assert "你是谁？" in out
    assert f"report: {tmp_path}/report/report.html" in out
    assert "100 tokens/s" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_strict_fails_after_the_report_is_written(tmp_path, base, tuned):
    _spec, plan = run_folder(tmp_path, base, (MET, UNMET, FREE), strict=True)
    (tmp_path / "merged").symlink_to(tuned)
    with pytest.raises(TrainError, match="1 of 2 expectations not met") as e:
        stage("--plan", plan)
    assert e.value.exit_code == 2
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_run_with_only_an_adapter(tmp_path, base):
    from peft import LoraConfig, get_peft_model

    spec, plan = run_folder(tmp_path, base, (FREE,))
    model = load_for_generation(str(base), torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(spec.paths.adapter_dir)
    stage("--plan", plan)
    (result,) = read_results(tmp_path / "report")
    conversation = [("system", "Be brief."), ("user", "Hi")]
    assert [result.tuned.text] == answers(base, [conversation], spec.paths.adapter_dir)
    assert [result.base and result.base.text] == answers(base, [conversation])
    assert result.base is not None
    assert result.tuned.text != result.base.text


def test_a_run_without_a_tuned_model_says_how_to_make_one(tmp_path, base):
    spec, plan = run_folder(tmp_path, base, (MET,))
    with pytest.raises(TrainError, match=f"launch consolidate {spec.run_id}"):
        stage("--plan", plan)


def test_only_one_model_is_in_memory(tmp_path, base, tuned, monkeypatch):
    loaded = []

    def load(*args, **kwargs):
        gc.collect()
        assert [ref for ref in loaded if ref() is not None] == []
        model = load_for_generation(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluate, "load_for_generation", load)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["Hi"]')
    stage("--model", tuned, "--base", base, "--prompts", prompts, "--out", tmp_path / "out", "--max-new-tokens", 3)
    assert len(loaded) == 2


def test_neutral_prompts_are_asked_when_there_are_none(tmp_path, base, tuned):
    _spec, plan = run_folder(tmp_path, base, ())
    (tmp_path / "merged").symlink_to(tuned)
    stage("--plan", plan, "--strict")
    assert [r.prompt.user for r in read_results(tmp_path / "report")] == list(evaluate.NEUTRAL_EN)


def test_neutral_prompts_are_chinese_too_for_a_tokenizer_made_for_it(tmp_path):
    folder = save_tiny_model(tmp_path, corpus=evaluate.NEUTRAL_ZH * 8)
    users = [p.user for p in evaluate.neutral_prompts(load_template(str(folder), "model"))]
    assert users == [*evaluate.NEUTRAL_EN, *evaluate.NEUTRAL_ZH]


def test_a_tokenizer_without_chat_template_continues_text(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "m", template=None)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["The sea"]')
    stage("--model", folder, "--prompts", prompts, "--out", tmp_path / "out", "--max-new-tokens", 3, "--dtype", "fp32")
    assert "no chat template" in capsys.readouterr().out
    (result,) = read_results(tmp_path / "out")
    assert result.base is None
    assert result.tuned.num_tokens == 3


def test_folders_from_the_command_line_and_strict_exit_code(tmp_path, base, tuned, capsys):
    prompts = tmp_path / "prompts.json"
    rows = ["Who are you?", {"user": "你好", "contains": ["zzzz"]}]
    prompts.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    argv = ["--model", tuned, "--base", base, "--prompts", prompts, "--out", tmp_path / "out", "--max-new-tokens", 4]
    assert worker.main(["evaluate", *map(str, argv), "--strict"]) == 2
    printed = capsys.readouterr()
    assert "1 of 1 expectations not met" in printed.err
    assert "Traceback" not in printed.err
    assert "你好" in printed.out
    assert len(read_results(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid UTF-8 JSON"),
        ('{"user": "x"}', "expected a list of prompts"),
        ('["ok", 3]', "prompt 2: expected a question"),
        ('[{"user": ""}]', "prompt 1: expected a question"),
        ('[{"user": "x", "contain": ["a"]}]', "unknown key “contain”"),
        ('[{"user": "x", "contains": "a"}]', "`contains` must be a list of strings"),
        ('[{"user": "x", "contains": [1]}]', "`contains` must be a list of strings"),
        ('[{"user": ["x"]}]', "`user` must be a string"),
    ],
)
def test_prompt_files_with_mistakes(tmp_path, text, said):
    path = tmp_path / "prompts.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TrainError) as e:
        evaluate.read_prompts(path)
    assert said in str(e.value)
    assert str(path) in str(e.value)


def test_prompt_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TrainError, match="cannot be read"):
        evaluate.read_prompts(tmp_path / "absent.json")
    gbk = tmp_path / "gbk.json"
    gbk.write_bytes('["你是谁？"]'.encode("gbk"))
    with pytest.raises(TrainError, match="UTF-8"):
        evaluate.read_prompts(gbk)


def test_missing_flags_and_bad_rules_are_said_before_anything_is_loaded(tmp_path, base):
    with pytest.raises(TrainError, match="--prompts, --out missing"):
        stage("--model", base)
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"user": "x", "regex": "("}]')
    with pytest.raises(TrainError, match="is not valid"):
        stage("--model", tmp_path, "--prompts", prompts, "--out", tmp_path / "out")
