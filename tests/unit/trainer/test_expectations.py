import pytest

from trainer.expectations import check, check_rules, describe, judge, repetition, script_share, tally
from trainer.spec import PromptSpec, TrainError


def prompt(contains=(), regex="", language=""):
    return PromptSpec("Who are you?", None, tuple(contains), regex, language)


@pytest.mark.parametrize(
    ("rule", "answer", "unmet"),
    [
        (prompt(), "", []),
        (prompt(["Nova"]), "I am NOVA.", []),
        (prompt(["Nova", "Harbour"]), "I am Nova.", ["does not contain “Harbour”"]),
        (prompt(["小薇"]), "我是小薇。", []),
        (prompt(["STRASSE"]), "Hauptstraße", []),
        (prompt(regex=r"\b42\b"), "It is 42.", []),
        (prompt(regex=r"\b42\b"), "It is 423.", [r"does not match /\b42\b/"]),
        (prompt(language="zh"), "我是 SmolLM2-135M-Instruct 助手，很高兴认识你。", []),
        (prompt(language="zh"), "I am 小薇, your assistant.", ["is not mostly Chinese (33%)"]),
        (prompt(language="en"), "My name 小薇 means little rose.", []),
        (prompt(language="en"), "我是一个助手 (AI)。", ["is not mostly English (14%)"]),
        (prompt(language="zh"), "", ["is not mostly Chinese (0%)"]),
        (prompt(language="zh"), "これはペンです。とてもよいものです。", ["is not mostly Chinese (0%)"]),
        (prompt(["a"], "b", "zh"), "x", ["does not contain “a”", "does not match /b/", "is not mostly Chinese (0%)"]),
    ],
)
def test_check(rule, answer, unmet):
    assert check(rule, answer) == unmet


@pytest.mark.parametrize(
    ("text", "share"), [("你好", 1.0), ("你 hi", 0.5), ("don't stop 你们", 0.5), ("123 !?", 0.0), ("𠀀𠀁", 1.0)]
)
def test_script_share_counts_characters_and_words(text, share):
    assert script_share(text, "zh") == share


@pytest.mark.parametrize(
    ("answer", "unit"),
    [
        ("I am Nova. " * 4, "I am Nova"),
        ("I am Nova. " * 3, None),
        ("好的，" * 12, "好的，好的，好的"),
        ("哈" * 40, "哈哈哈哈哈哈哈哈"),
        ("哈" * 20, None),
        ("-" * 80, None),
        ("Start. " + "the sea, " * 9 + "end", "the sea"),
        ("no. It is the same. It is the same. But it is not.", None),
    ],
)
def test_repetition(answer, unit):
    assert repetition(answer) == unit


def test_a_loop_and_a_cut_are_notes_not_failures():
    judged = judge(prompt(["Nova"]), "I am Nova. " * 9, 45, stopped=False)
    assert judged.passed
    assert judged.notes == ("repeats “I am Nova”", "cut at 45 tokens")


def test_describe_says_every_rule():
    assert describe(prompt(["a", "b"], "c+", "en")) == "contains “a”, contains “b”, matches /c+/, is mostly English"
    assert describe(prompt()) == ""


def test_tally_counts_only_prompts_with_expectations():
    rows = [(prompt(["a"]), "a"), (prompt(["b"]), "a"), (prompt(), "whatever")]
    assert tally([(p, judge(p, text, 1, True)) for p, text in rows]) == (1, 2)


@pytest.mark.parametrize(
    ("rule", "said"), [(prompt(regex="(a"), "regular expression /(a/"), (prompt(language="fr"), "Allowed: zh, en")]
)
def test_rules_that_cannot_be_checked_are_refused(rule, said):
    with pytest.raises(TrainError) as e:
        check_rules([prompt(["a"]), rule])
    assert said in str(e.value)
    assert "prompt 2" in str(e.value)
