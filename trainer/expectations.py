"""What an answer must be: expectations of the recipe checked, and oddities noted. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .spec import PromptSpec, TrainError

LANGUAGES = {"zh": "Chinese", "en": "English"}
MIN_UNIT, MAX_UNIT, MIN_REPEATS = 8, 200, 4
_LOOP = re.compile(rf"(.{{{MIN_UNIT},{MAX_UNIT}}}?)\1{{{MIN_REPEATS - 1},}}", re.DOTALL)
_HAN = re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['’][A-Za-z\u00c0-\u024f]+)*")


@dataclass(frozen=True)
class JudgedAnswer:
    """One model's answer to one prompt, with what is wrong or odd about it, in words."""

    text: str
    num_tokens: int
    stopped: bool
    """The model ended the answer itself; False: cut at the longest allowed length."""
    unmet: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """No unmet expectation; also True for a prompt without any."""
        return not self.unmet


@dataclass(frozen=True)
class PromptResult:
    """A prompt with the answers of the base and of the tuned model."""

    prompt: PromptSpec
    system: str | None
    """The system prompt that was used; None: the template's own behaviour."""
    base: JudgedAnswer | None
    """None when there is no base to compare with."""
    tuned: JudgedAnswer


def judge(prompt: PromptSpec, text: str, num_tokens: int, stopped: bool) -> JudgedAnswer:
    """Check `text` against the expectations of `prompt` and note loops and cuts."""
    notes = []
    loop = repetition(text)
    if loop is not None:
        notes.append(f"repeats “{loop}”")
    if not stopped:
        notes.append(f"cut at {num_tokens} tokens")
    return JudgedAnswer(text, num_tokens, stopped, tuple(check(prompt, text)), tuple(notes))


def check(prompt: PromptSpec, answer: str) -> list[str]:
    """The unmet expectations, each as a phrase that follows "the answer ...". Empty when all are met."""
    unmet = [f"does not contain “{part}”" for part in prompt.contains if part.casefold() not in answer.casefold()]
    if prompt.regex and re.search(prompt.regex, answer) is None:
        unmet.append(f"does not match /{prompt.regex}/")
    if prompt.language:
        share = script_share(answer, prompt.language)
        if share <= 0.5:
            unmet.append(f"is not mostly {LANGUAGES[prompt.language]} ({share:.0%})")
    return unmet


def describe(prompt: PromptSpec) -> str:
    """What is expected, in words; "" when nothing is."""
    parts = [f"contains “{part}”" for part in prompt.contains]
    if prompt.regex:
        parts.append(f"matches /{prompt.regex}/")
    if prompt.language:
        parts.append(f"is mostly {LANGUAGES[prompt.language]}")
    return ", ".join(parts)


def script_share(answer: str, language: str) -> float:
    """Share, 0 to 1, of `answer` in the script of `language` (zh | en).

    A Han character counts as much as a word in Latin letters or a letter of any other script; digits and
    punctuation count nothing, so a product name inside a Chinese sentence leaves it Chinese.
    """
    num_han = len(_HAN.findall(answer))
    num_latin = len(_LATIN_WORD.findall(answer))
    rest = _LATIN_WORD.sub("", _HAN.sub("", answer))
    total = num_han + num_latin + sum(c.isalpha() for c in rest)
    return (num_han if language == "zh" else num_latin) / total if total else 0.0


def repetition(answer: str) -> str | None:
    """The unit of at least 8 characters that `answer` repeats 4 times or more without a break, or None.

    Runs of spaces or of punctuation (a drawn line, a table) are no loop.
    """
    for match in _LOOP.finditer(answer):
        if any(c.isalnum() for c in match.group(1)):
            return " ".join(match.group(1).split()).strip(" .,;:!?。，；：！？、")
    return None


def check_rules(prompts: Sequence[PromptSpec]) -> None:
    """Raises TrainError for a regular expression or language that cannot be checked, before any model is loaded."""
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompt {number} (“{prompt.user}”)"
        if prompt.language not in ("", *LANGUAGES):
            raise TrainError(f"{where}: unknown language “{prompt.language}”", f"Allowed: {', '.join(LANGUAGES)}.")
        try:
            re.compile(prompt.regex)
        except re.error as e:
            raise TrainError(
                f"{where}: the regular expression /{prompt.regex}/ is not valid: {e}",
                "Correct it; a literal text is better given as `contains`.",
            ) from None


def tally(answers: Sequence[tuple[PromptSpec, JudgedAnswer]]) -> tuple[int, int]:
    """(passed, total) over the prompts that expect something."""
    expected = [answer for prompt, answer in answers if prompt.has_expectation]
    return sum(answer.passed for answer in expected), len(expected)


def tally_tuned(results: Sequence[PromptResult]) -> tuple[int, int]:
    """(met, asked) of the tuned model, over the prompts that have an expectation."""
    return tally([(r.prompt, r.tuned) for r in results])


def tally_base(results: Sequence[PromptResult]) -> tuple[int, int]:
    """Counts only the prompts that the base was asked."""
    return tally([(r.prompt, r.base) for r in results if r.base is not None])
