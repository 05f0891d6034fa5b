"""What a chosen template writes otherwise than the model's own: on conversations that show it, as text and in what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Message, Row
from .spec import TrainError
from .template import ChatTemplate

_PROBES = (
    ("a question", (Message("user", "Hi"),)),
    ("with a system prompt", (Message("system", "Be brief."), Message("user", "Hi"))),
    ("after an answer", (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Bye"))),
)


def template_difference(chosen: ChatTemplate, name: str) -> list[str]:
    """Lines for people; one line where the two write the same tokens. `name`: data.template, as the recipe has it."""
    own = chosen.of_the_model()
    if own is None:
        return [f"data.template {name}; the model has no chat template of its own"]
    lines = []
    for what, messages in _PROBES:
        given, expected = _prompt(chosen, messages), _prompt(own, messages)
        if given != expected:
            lines += [f"  {what}:", f"    {name} writes {_shown(given)}", f"    the model's own {_shown(expected)}"]
    given, expected = _learnt_end(chosen), _learnt_end(own)
    if given != expected:
        lines.append(f"  an answer ends with {given}; the model's own ends it with {expected}")
    if chosen.stop_token_ids != own.stop_token_ids:
        lines.append(f"  generation stops at {_tokens(chosen)}; the model's own at {_tokens(own)}")
    if not lines:
        return [f"data.template {name} writes the same tokens as the model's own"]
    return [f"data.template {name} differs from the model's own:", *lines]


def _prompt(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[int]] | str:
    """(text, token ids) before an answer, or why there is none: a template may refuse system prompts."""
    try:
        return template.prompt_text(messages), template.prompt_ids(messages)
    except TrainError as e:
        return e.message


def _shown(prompt: tuple[str, list[int]] | str) -> str:
    return prompt if isinstance(prompt, str) else f"{prompt[0]!r} ({len(prompt[1])} tokens)"


def _learnt_end(template: ChatTemplate) -> str:
    """What is learnt behind the answer, as text."""
    row = Row((Message("user", "Hi"), Message("assistant", "Hello.")), None, "a probe", 1)
    (document,) = template.encode_rows([row], None)
    learnt = [i for i, is_learnt in zip(document.input_ids, document.supervised, strict=True) if is_learnt]
    text = template.tokenizer.decode(learnt)
    return repr(text.partition("Hello.")[2])


def _tokens(template: ChatTemplate) -> str:
    return " ".join(template.tokenizer.convert_ids_to_tokens(list(template.stop_token_ids))) or "nothing"
