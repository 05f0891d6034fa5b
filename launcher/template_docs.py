"""docs/templates.md: the chat templates that data.template takes by name, from trainer/turn_templates.json."""

from __future__ import annotations

from trainer.turn_templates import Turn, turn_templates

_HEAD = """# Chat templates by name

`data.template` is `model` (the default: the tokenizer's own template), the path of a Jinja file, or one of these names. Each is that
program's template token for token, in training, in samples, in `launch chat`, in evaluation, and in the folder of the trained model,
where other programs find it as `chat_template.jinja`, with its stop words among the ends of generation. A bare name will do where only
one of the two programs has it: `template: qwen_chat`.

A template that is not the one which the model was trained with costs quality. Where the two differ, `prepare` prints each difference:
what a question, a system prompt and an earlier answer become, how an answer ends, and where generation stops.

`launch recipes templates [PATTERN]` lists them. *Prompt* is what the model reads of the question `Hi` with the system prompt `S`
(¶: line break); beginning-of-text tokens are added as the program does. Made from its own code:
XTuner 0.2.0rc0 (`utils/templates.py`), LLaMA-Factory 0.9.5 (`data/template.py`). Templates for images, audio and tools are not there.

"""
_CONVERSATION = [Turn("S", "Hi", None)]


def templates_page() -> str:
    """docs/templates.md."""
    lines = ["| name | prompt | stops at | default system prompt |\n", "| --- | --- | --- | --- |\n"]
    for key, template in turn_templates().items():
        prompt = "".join(piece.text for piece in template.pieces(_CONVERSATION))
        stops = " ".join(map(_code, template.stop_words)) or "end of text"
        system = _code(template.default_system) if template.default_system else ""
        lines.append(f"| `{key}` | {_code(prompt)} | {stops} | {system} |\n")
    return _HEAD + "".join(lines)


def _code(text: str) -> str:
    """As code in a table cell; HTML, since Markdown's own takes neither bars nor backticks there."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
    return f"<code>{escaped}</code>".replace("\n", "¶")
