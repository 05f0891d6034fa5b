"""What XTuner's and LLaMA-Factory's own code makes of a few conversations: writes tokens.jsonl beside this file.

    pip download --no-deps xtuner==0.2.0rc0 llamafactory==0.9.5, and unpack both wheels into FOLDER
    python tests/golden/templates/make.py FOLDER

Of LLaMA-Factory the modules that lay out text are loaded without those that load images and models.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from enum import StrEnum
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from support.template_tokenizer import CONVERSATIONS, template_tokenizer  # noqa: E402


def fake_module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


def from_file(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def xtuner(folder: Path):
    """(name, conversation number, ids, labels) of every template."""
    fake_module("mmengine")
    fake_module("mmengine.config", ConfigDict=lambda **entries: entries)
    fake_module("mmengine.utils")
    fake_module("mmengine.utils.misc", get_object_from_string=None)
    fake_module("PIL", Image=None)
    fake_module("requests")
    fake_module("xtuner")
    fake_module("xtuner.utils", DEFAULT_IMAGE_TOKEN="<image>", IGNORE_INDEX=-100, IMAGE_TOKEN_INDEX=-200)
    templates = from_file(folder / "xtuner/utils/templates.py", "xtuner_templates").PROMPT_TEMPLATE
    layout = from_file(folder / "xtuner/dataset/map_fns/template_map_fn.py", "xtuner_layout").template_map_fn
    encode = from_file(folder / "xtuner/dataset/utils.py", "xtuner_encode").encode_fn

    class Attributes(dict):
        __getattr__ = dict.__getitem__

    for name, strings in templates.items():
        for number, turns in enumerate(CONVERSATIONS):
            if turns[0].system and "SYSTEM" not in strings:
                continue  # XTuner itself fails
            row = [{"input": t.question, "output": t.answer, "output_with_loss": t.supervised} for t in turns]
            row[0]["system"] = turns[0].system
            laid_out = layout({"conversation": row}, Attributes(strings))
            done = encode(laid_out, template_tokenizer(), max_length=10**6)
            yield f"xtuner/{name}", number, done["input_ids"], done["labels"]


def llamafactory(folder: Path):
    """(name, conversation number, ids, labels) of every template that needs no images."""

    class Logger:
        def __getattr__(self, name: str):
            return lambda *args, **kwargs: None

    class Role(StrEnum):
        USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
        FUNCTION, OBSERVATION = "function", "observation"

    sys.path.insert(0, str(folder))
    for name in ("llamafactory", "llamafactory.data", "llamafactory.extras", "llamafactory.data.processor"):
        fake_module(name, __path__=[str(folder / name.replace(".", "/"))])
    logging = fake_module("llamafactory.extras.logging", get_logger=lambda name: Logger())
    sys.modules["llamafactory.extras"].logging = logging  # type: ignore[attr-defined]
    fake_module("llamafactory.extras.constants", IGNORE_INDEX=-100)
    fake_module("llamafactory.data.mm_plugin", get_mm_plugin=lambda name="base", **kwargs: Plugin(name))
    fake_module("llamafactory.data.data_utils", Role=Role, SLOTS=list)
    fake_module("llamafactory.data.processor.processor_utils", **_processor_utils(folder))
    templates = importlib.import_module("llamafactory.data.template")
    supervised = importlib.import_module("llamafactory.data.processor.supervised")
    for name, template in templates.TEMPLATES.items():
        if template.mm_plugin.name != "base":
            continue
        for number, turns in enumerate(CONVERSATIONS):
            if not all(t.supervised for t in turns):
                continue  # it has no such switch
            tokenizer = template_tokenizer()
            arguments = types.SimpleNamespace(
                template=name, train_on_prompt=False, mask_history=False, cutoff_len=10**6, tool_format=None,
                default_system=None, enable_thinking=True, preserve_thinking=False,
            )  # fmt: skip
            found = templates.get_template_and_fix_tokenizer(tokenizer, arguments)
            processor = supervised.SupervisedDatasetProcessor(found, tokenizer, None, arguments)
            messages = [m for t in turns for m in (("user", t.question), ("assistant", t.answer))]
            rows = [{"role": role, "content": content} for role, content in messages]
            ids, labels = processor._encode_data_example(
                rows[:-1], rows[-1:], turns[0].system or None, None, [], [], []
            )
            yield f"llamafactory/{name}", number, ids, labels


class Plugin:
    """Of a template for text: it changes nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def process_messages(self, messages, *_):
        return messages

    def process_token_ids(self, ids, labels, *_):
        return ids, labels


def _processor_utils(folder: Path) -> dict[str, Any]:
    from dataclasses import dataclass

    source = (folder / "llamafactory/data/processor/processor_utils.py").read_text(encoding="utf-8")
    start = source.index("def infer_seqlen")
    members: dict[str, Any] = {}
    exec(source[start:].split("\n\n\n")[0], members)

    @dataclass
    class DatasetProcessor:
        template: Any
        tokenizer: Any
        processor: Any
        data_args: Any

    return {"DatasetProcessor": DatasetProcessor, "greedy_knapsack": None, "infer_seqlen": members["infer_seqlen"]}


def main(folder: Path) -> None:
    with open(HERE / "tokens.jsonl", "w", encoding="utf-8") as file:
        for make in (xtuner, llamafactory):
            for name, number, ids, labels in make(folder):
                file.write(json.dumps([name, number, ids, labels], separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
