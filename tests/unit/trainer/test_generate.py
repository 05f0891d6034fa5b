import json

import pytest
import torch
from support.tiny_chat_model import save_tiny_model

from trainer.generate import (
    Continuation,
    check_folders,
    generate_answers,
    load_for_generation,
    stream_answer,
)
from trainer.spec import TrainError
from trainer.template import load_template

CPU = torch.device("cpu")
CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "What is the capital of France? " * 3)],
    [("user", "你是谁？请介绍一下你自己。")],
    [("user", "a"), ("assistant", "b"), ("user", "Who are you?")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(folder):
    return load_for_generation(folder, torch.float32, CPU)


@pytest.fixture(scope="module")
def template(folder):
    return load_template(folder, "model")


class Script:
    """A language model that says fixed tokens, whatever the prompt: the boundary where real weights would stand."""

    def __init__(self, template, token_ids):
        self.token_ids, self.said = [*token_ids, template.stop_token_ids[0]], 0
        self.positions, self.masks = [], []
        self.device, self.vocab = CPU, len(template.tokenizer)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        self.positions.append(position_ids.tolist())
        self.masks.append(attention_mask.tolist() if attention_mask is not None else None)
        logits = torch.zeros(*input_ids.shape, self.vocab)
        logits[:, -1, self.token_ids[self.said]] = 1.0
        self.said += 1
        return type("Output", (), {"logits": logits, "past_key_values": None})()

    __call__ = forward


def test_a_batch_answers_like_one_by_one(model, template):
    together = generate_answers(model, template, CONVERSATIONS, 24, batch_size=4)
    alone = [generate_answers(model, template, [c], 24)[0] for c in CONVERSATIONS]
    assert together == alone
    assert len({a.text for a in together}) == 4
    assert generate_answers(model, template, CONVERSATIONS, 24, batch_size=3) == alone


def test_padded_rows_count_positions_from_their_own_beginning(template):
    script = Script(template, [5, 6])
    short, long = [("user", "Hi")], [("user", "Hi Hi")]
    generate_answers(script, template, [long, short], 2)
    length_short, length_long = (len(template.prompt_ids(c)) for c in (short, long))
    padding = length_long - length_short
    assert padding > 0
    assert script.positions[0] == [[0] * padding + list(range(length_short)), list(range(length_long))]
    assert script.positions[1] == [[length_short], [length_long]]
    assert script.masks[0] == [[0] * padding + [1] * length_short, [1] * length_long]
    assert script.masks[1] == [[0] * padding + [1] * (length_short + 1), [1] * (length_long + 1)]


def test_rows_of_a_batch_stop_independently(model, template):
    uncut = generate_answers(model, template, CONVERSATIONS, 24)

    class StopsEarly:
        tokenizer, prompt_ids = template.tokenizer, template.prompt_ids
        stop_token_ids = (template.tokenizer.encode(uncut[0].text, add_special_tokens=False)[3],)

    together = generate_answers(model, StopsEarly(), CONVERSATIONS, 24)
    assert together == [generate_answers(model, StopsEarly(), [c], 24)[0] for c in CONVERSATIONS]
    assert together[0].stopped
    assert together[0].num_tokens <= 3
    assert not all(a.stopped for a in together)


def test_greedy_is_that_of_transformers(model, template):
    ids = torch.tensor([template.prompt_ids(CONVERSATIONS[1])])
    stop = list(template.stop_token_ids)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=stop, pad_token_id=0
    )[0, ids.shape[1] :]
    (answer,) = generate_answers(model, template, [CONVERSATIONS[1]], 24)
    text = template.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.text == text.rstrip("\ufffd")


def test_generation_config_of_the_model_decides_nothing(model, template):
    before = generate_answers(model, template, CONVERSATIONS, 12)
    old = model.generation_config.repetition_penalty
    model.generation_config.repetition_penalty, model.config.use_cache = 5.0, False
    try:
        assert generate_answers(model, template, CONVERSATIONS, 12) == before
    finally:
        model.generation_config.repetition_penalty, model.config.use_cache = old, True


def test_stops_at_the_end_token_and_says_so(template):
    ids = template.tokenizer.encode("I am 小薇 😀!", add_special_tokens=False)
    (answer,) = generate_answers(Script(template, ids), template, [CONVERSATIONS[0]], 100)
    assert (answer.text, answer.num_tokens, answer.stopped) == ("I am 小薇 😀!", len(ids), True)


def test_an_answer_cut_inside_a_character_ends_before_it(template):
    ids = template.tokenizer.encode("好的，小薇", add_special_tokens=False)
    (answer,) = generate_answers(Script(template, ids), template, [CONVERSATIONS[0]], len(ids) - 1)
    assert (answer.text, answer.stopped) == ("好的，小", False)
    assert "".join(stream_answer(Script(template, ids), template, CONVERSATIONS[0], len(ids) - 1)) == "好的，小"


def test_special_tokens_inside_an_answer_are_not_shown(template):
    ids = template.tokenizer.encode("a<|im_start|>b", add_special_tokens=False)
    (answer,) = generate_answers(Script(template, ids), template, [CONVERSATIONS[0]], 100)
    assert answer.text == "ab"


def test_stream_never_splits_a_character(template):
    text = "你好，我是小薇。 Hello 😀👍🏽 naïve\n\t done"
    ids = template.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    pieces = list(stream_answer(Script(template, ids), template, CONVERSATIONS[0], 200))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == "你"


def test_stream_equals_the_batched_answer(model, template):
    for conversation in CONVERSATIONS:
        (answer,) = generate_answers(model, template, [conversation], 30)
        assert "".join(stream_answer(model, template, conversation, 30)) == answer.text


def test_temperature_is_repeatable_with_a_seed_and_varies_without(model, template):
    def answer(seed):
        return "".join(stream_answer(model, template, CONVERSATIONS[0], 20, temperature=2.0, seed=seed))

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_an_adapter_changes_the_answers(folder, template, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load_for_generation(folder, torch.float32, CPU)
    plain = generate_answers(base, template, CONVERSATIONS, 8)
    peft_model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    peft_model.save_pretrained(tmp_path)
    tuned = load_for_generation(folder, torch.float32, CPU, adapter_dir=str(tmp_path))
    answers = generate_answers(tuned, template, CONVERSATIONS, 8)
    assert answers != plain
    assert answers == [generate_answers(tuned, template, [c], 8)[0] for c in CONVERSATIONS]


def test_plain_continuation_without_a_chat_template(model, tmp_path):
    tokenizer = load_template(str(save_tiny_model(tmp_path, template=None)), "model").tokenizer
    prompter = Continuation(tokenizer, [tokenizer.eos_token_id])
    ids = prompter.prompt_ids([("system", "Sea."), ("user", "The sea")])
    assert tokenizer.decode(ids) == "Sea.\n\nThe sea"
    assert generate_answers(model, prompter, [[("user", "The sea")]], 5)[0].num_tokens == 5


def test_what_is_no_model_folder_is_named(tmp_path):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/base"}))
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, said in [
        (gguf, "is a GGUF model"),
        (tmp_path, "is a GGUF model"),
        (adapter, f"Use --model /models/base --adapter {adapter}"),
        (empty, "has no config.json"),
        (tmp_path / "absent", "is not a folder"),
    ]:
        with pytest.raises(TrainError) as e:
            check_folders(str(path), None)
        assert said in str(e.value)
    with pytest.raises(TrainError, match=r"no adapter_config\.json"):
        check_folders(str(save_tiny_model(tmp_path / "m")), str(empty))


def test_a_truncated_weight_file_is_a_user_error(tmp_path):
    folder = save_tiny_model(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TrainError, match="cannot be loaded"):
        load_for_generation(str(folder), torch.float32, CPU)
