"""What a chosen template is said to change, and what the trained model's folder says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.commands import ROOT
from support.template_tokenizer import CONVERSATIONS, template_tokenizer

from trainer.template import ChatTemplate, load_template
from trainer.template_difference import template_difference
from trainer.template_export import export_template
from trainer.turn_templates import turn_templates


@pytest.fixture(scope="module")
def tokenizer():
    return template_tokenizer()


def test_the_same_tokens_are_said_to_be_the_same() -> None:
    """recipes/tiny has ChatML."""
    tiny = str(ROOT / "recipes" / "tiny")
    assert template_difference(load_template(tiny, "xtuner/internlm2_chat"), "xtuner/internlm2_chat") == [
        "data.template xtuner/internlm2_chat writes the same tokens as the model's own"
    ]
    assert template_difference(load_template(tiny, "xtuner/qwen_chat"), "xtuner/qwen_chat") == [
        "data.template xtuner/qwen_chat differs from the model's own:",
        "  generation stops at <|endoftext|> <|im_end|>; the model's own at <|im_end|>",
    ]


def test_every_difference_is_shown(tokenizer) -> None:
    lines = "\n".join(
        template_difference(ChatTemplate(tokenizer, turn_templates()["xtuner/llama2_chat"]), "xtuner/llama2_chat")
    )
    assert lines.startswith("data.template xtuner/llama2_chat differs from the model's own:")
    assert "a question:\n    xtuner/llama2_chat writes '<s>[INST] Hi [/INST]'" in lines
    assert "the model's own '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'" in lines
    assert "an answer ends with '</s>'; the model's own ends it with '<|im_end|>'" in lines
    assert "with a system prompt:" in lines
    assert "after an answer:" in lines


def test_a_model_without_a_template_is_said_to_have_none(tokenizer, tmp_path: Path) -> None:
    plain = template_tokenizer()
    plain.chat_template = None
    chosen = ChatTemplate(plain, turn_templates()["xtuner/default"])
    assert template_difference(chosen, "xtuner/default") == [
        "data.template xtuner/default; the model has no chat template of its own"
    ]


@pytest.fixture
def folder(tokenizer, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    return tmp_path


@pytest.mark.parametrize("name", sorted(turn_templates()))
def test_the_trained_model_speaks_as_it_was_trained(name: str, tokenizer, folder: Path) -> None:
    """Read back by the library alone: the same text for each conversation, and it stops where the template stops."""
    assert "chat_template.jinja" in export_template(name, folder)
    template = turn_templates()[name]
    loaded = load_template(str(folder), "model").tokenizer
    ours = ChatTemplate(tokenizer, template)
    for turns in CONVERSATIONS:
        messages = []
        for turn in turns:
            messages += [{"role": "system", "content": turn.system}] if turn.system else []
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        text = loaded.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert text == "".join(
            {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}.get(piece.kind, piece.text)
            for piece in template.pieces([*turns[:-1], turns[-1]._replace(answer=None)])
        )
    stops = {tokenizer.convert_tokens_to_ids(word) for word in template.stop_words}
    if stops:
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings["eos_token_id"][0] == 7
        assert stops == set(settings["eos_token_id"][1:])
    assert stops <= set(ours.stop_token_ids)


def test_a_jinja_file_is_copied_as_it_is(folder: Path) -> None:
    (folder / "mine.jinja").write_text("{{ messages }}é", encoding="utf-8")
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    assert export_template(str(folder / "mine.jinja"), folder / "out") == ["chat_template.jinja"]
    assert (folder / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}é"
    assert not (folder / "out" / "generation_config.json").exists()
