"""What a check says of a recipe's model before a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.recipe import load_recipe
from launcher.recipe_model import ModelCheck, check_model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    return tmp_path


def check(text: str) -> ModelCheck:
    Path("r.yaml").write_text(f"{text}\ndata: d.jsonl\n", encoding="utf-8")
    return check_model(load_recipe(Path("r.yaml")))


def test_a_model_that_trains_has_no_problem_and_no_note() -> None:
    assert check("model: Qwen/Qwen3-8B\nmethod: lora") == ModelCheck((), ())


def test_every_problem_is_found_at_once_and_has_its_place() -> None:
    found = check("model: google/gemma-2-9b-it\nmethod:\n  name: lora\n  targets: [q_porj]")
    assert [p.where for p in found.problems] == ["r.yaml:1: model.source", "r.yaml:4: method.targets"]
    assert found.problems[0].message.startswith("gemma2 cannot be trained: its attention scores are capped")
    assert found.problems[1].message == "q_porj match no linear layer of gemma2"
    assert found.problems[1].hint.startswith("Did you mean q_proj?")


def test_rows_longer_than_the_positions_allow() -> None:
    text = "model: microsoft/Phi-3.5-mini-instruct\nmethod: lora\ntrain: {micro_batch: 4}"
    (problem,) = check(text).problems
    assert problem.where == "data.max_length"
    assert "rows of 8192 tokens" in problem.message


def test_a_vision_tower_is_not_trained_on_text() -> None:
    assert not check("model: google/gemma-3-4b-it\nmethod: lora").problems
    (problem,) = check("model: google/gemma-3-4b-it\nmethod: full").problems
    assert problem.where == "r.yaml:2: method.name"
    assert problem.message == "full is not for a model with a vision tower, which text does not train"
    assert "method: lora or qlora" in problem.hint


@pytest.mark.parametrize("model", ["internlm/internlm2-chat-7b", "zai-org/chatglm3-6b", "openbmb/MiniCPM-2B-sft-bf16"])
def test_models_that_come_with_their_own_code(model: str) -> None:
    for more in ("", "\n  trust_remote_code: true"):
        (problem,) = check(f"model:\n  source: {model}{more}\nmethod: lora").problems
        assert problem.where == "r.yaml:2: model.source"
        assert problem.message.startswith("transformers has no ")


def test_a_downloaded_chatglm_is_known_by_its_own_names_of_sizes(folder: Path) -> None:
    config = {
        "model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128,
        "num_attention_heads": 32, "multi_query_group_num": 2, "padded_vocab_size": 65024, "seq_length": 8192,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "glm").mkdir()
    (folder / "glm" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "glm" / "tokenizer.model").write_bytes(b"x")
    (problem,) = check("model: ./glm\nmethod: lora").problems
    assert problem.message.startswith("transformers has no ChatGLM")


def test_a_model_that_is_not_known_is_a_note_with_the_nearest() -> None:
    found = check("model: Qwen/Qwen2.5-7B-Instuct\nmethod: lora")
    assert not found.problems
    assert "known models of nearly this name: Qwen/Qwen2.5-7B-Instruct" in found.notes[0]
    assert check("model: someone/else\nmethod: lora").notes == (
        "someone/else: not known here, so nothing of it is checked before the download",
    )


def test_a_name_without_an_organisation_is_a_problem_with_the_three_nearest() -> None:
    (problem,) = check("model: qwen3-8b\nmethod: lora").problems
    assert problem.where == "r.yaml:1: model.source"
    assert problem.hint.startswith("Did you mean Qwen/Qwen3-8B, Qwen/Qwen3-8B-Base or ")
