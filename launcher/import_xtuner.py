"""XTuner 0.1 configs: what the Runner of mmengine reads, as a flat list of dotted keys. The config is read as syntax, never run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .import_data import Source, is_file_name, write_sources, write_system, write_template
from .import_draft import Draft, word
from .import_python import PythonConfig, Symbol, Unreadable
from .recipe_yaml import Node

ROOTS = [
    "model",
    "tokenizer",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "val_cfg",
    "test_cfg",
    "val_evaluator",
    "test_evaluator",
    "custom_hooks",
    "default_hooks",
    "env_cfg",
    "visualizer",
    "log_level",
    "load_from",
    "resume",
    "randomness",
    "log_processor",
    "work_dir",
    "launcher",
    "default_scope",
    "custom_imports",
    "experiment_name",
    "runner_type",
    "strategy",
    "auto_scale_lr",
    "framework",
    "trainer",
    "training_args",
    "sequence_parallel_size",
]
"""Names at the left margin that mmengine's Runner or `xtuner train` reads; every other one is a variable of the config's own."""
_DATASETS = ("datasets", "dataset_cfg")
"""Keys of a data set that hold data sets: ConcatDataset, build_packed_dataset."""


def settings_of(config: PythonConfig) -> list[tuple[str, Node]]:
    """(dotted key, value) of everything that the Runner reads, in the order of the file.

    Items of a list go by their type (`custom_hooks[EvaluateChatHook].system`), every data set by `dataset`, every tokenizer
    by `tokenizer`: the same key may occur several times.
    """
    return [found for name in ROOTS if name in config.variables for found in _flat(name, config.variables[name])]


def datasets_of(config: PythonConfig) -> list[dict[str, Node]]:
    """The data sets that are trained on: those that a ConcatDataset or a packed one is made of, one by one."""
    loader = config.variables.get("train_dataloader")
    node = loader.value.get("dataset") if loader is not None and isinstance(loader.value, dict) else None
    return list(_leaves(node)) if node is not None else []


def _leaves(node: Node) -> Iterator[dict[str, Node]]:
    if not isinstance(node.value, dict):
        return
    inner = [node.value[key] for key in _DATASETS if key in node.value]
    for found in inner:
        for item in found.value if isinstance(found.value, list) else [found]:
            yield from _leaves(item)
    if not inner:
        yield node.value


def _flat(path: str, node: Node) -> Iterator[tuple[str, Node]]:
    if isinstance(node.value, dict) and node.value:
        for key, below in node.value.items():
            if key == "tokenizer" or (key == "dataset" and path == "train_dataloader"):
                yield from _flat(key, below)
            elif key in _DATASETS and path == "dataset":
                for item in below.value if isinstance(below.value, list) else [below]:
                    yield from _flat(path, item)
            else:
                yield from _flat(f"{path}.{key}", below)
    elif isinstance(node.value, list) and any(isinstance(item.value, dict) for item in node.value):
        for item in node.value:
            kind = item.value.get("type") if isinstance(item.value, dict) else None
            name = (kind.value.last if isinstance(kind.value, Symbol) else kind.text) if kind is not None else ""
            yield from _flat(f"{path}[{name}]", item)
    else:
        yield path, node


def map_xtuner(d: Draft, config: PythonConfig) -> bool:
    """Data sets, template, and the questions of EvaluateChatHook. Returns whether rows are texts for continued pre-training."""
    found = [(_source(d, entry), entry) for entry in datasets_of(config)]
    sources = [source for source, _ in found if source is not None]
    if not sources:
        d.choose(None, "no data set can be taken over", "Write the file itself: data: my.jsonl")
    write_sources(d, "data.files:path", "data.files", sources)
    for part in ("kind", "loader", "files", "folder", "subset", "split", "format"):
        for key, node in d.all_of(f"data.files:{part}"):
            d.note(key, node, "data.files[]")
    limit = d.number("data.max_rows", whole=True)
    if limit and len(sources) == 1:
        d.write("data.max_rows", int(limit))
    elif limit:
        d.leave_all(("data.max_rows",), "the first rows of one data set of several", matters=True)
    texts = bool(sources) and all(s.format == "text" for s in sources)
    _map_template(d, texts)
    trained = _trained_system(d, [entry for _, entry in found])
    _map_questions(d, trained)
    d.facts |= {"alpaca"} if any(_map_function(entry) == "alpaca_map_fn" for _, entry in found) else set()
    return texts


def _map_function(entry: dict[str, Node]) -> str:
    node = entry.get("dataset_map_fn")
    if node is not None and isinstance(node.value, dict):
        node = node.value.get("type")
    if node is None or node.value is None:
        return ""
    return word(node).rpartition(".")[2]


def _source(d: Draft, entry: dict[str, Node]) -> Source | None:
    loader = entry.get("dataset")
    kind = entry.get("type")
    name = word(kind) if kind is not None else ""
    if loader is None or name not in ("process_hf_dataset", "process_ms_dataset"):
        d.choose(
            kind,
            f"data sets of the kind {name or 'without a type'} are not read",
            "Write the rows as JSON, and name the file.",
        )
        return None
    inner: dict[str, Node] = loader.value if isinstance(loader.value, dict) else {"path": loader}
    path, hub = _place(d, inner, loader)
    function = _map_function(entry)
    rules: dict[str, Any] = (
        {"format": "conversation"} if not function else d.table.extra["map_functions"].get(function, {})
    )
    if not rules:
        hint = f"Write it as a function of its own: data.files[].map: ./my_rows.py:{function}"
        d.choose(
            entry.get("dataset_map_fn", loader), f"what {function} makes of a row is only known by running it", hint
        )
    subset, split = (str(inner[k].value or "") if k in inner else "" for k in ("name", "split"))
    return Source(path, loader, hub, rules.get("format", "auto"), 0, subset, split or "train", rules.get("columns", {}))


def _place(d: Draft, inner: dict[str, Node], loader: Node) -> tuple[str, str]:
    """(file or id, hub) of a loader: load_dataset, MsDataset.load, load_jsonl_dataset."""
    files = inner.get("data_files")
    if files is not None and isinstance(files.value, dict):
        files = files.value.get("train") or next(iter(files.value.values()), None)
    if files is not None and isinstance(files.value, list):
        if len(files.value) > 1:
            names = ", ".join(str(item.value) for item in files.value)
            d.choose(files, f"several files stand below one data set: {names}", "Name each in data.files.")
        files = files.value[0] if files.value else None
    if files is not None and isinstance(files.value, str):
        return files.value, ""
    if "dataset_name" in inner:
        return str(inner["dataset_name"].value), "modelscope"
    node = inner.get("path") or inner.get("data_dir")
    if node is None or isinstance(node.value, Unreadable | Symbol):
        d.choose(node or loader, "where the rows are is not known", "Write the file itself: data: my.jsonl")
        return "", ""
    path = str(node.value)
    return path, "" if is_file_name(d, path) else "hub"


def _map_template(d: Draft, texts: bool) -> None:
    found = d.one("data.template")
    for key, node in d.all_of("data.template:kind"):
        d.note(key, node, "data.template")
    if texts:
        d.leave_all(("data.template",), "texts have no chat template", matters=False)
    elif found is not None and not isinstance(found[1].value, dict):
        write_template(d, word(found[1]), found[1], found[0])
    elif found is not None:
        d.choose(
            found[1],
            "the template is written out in the config",
            "Save it as my.jinja, and write data.template: my.jinja",
        )


def _trained_system(d: Draft, entries: list[dict[str, Node]]) -> str | None:
    """The system prompt that every row is trained with; "" for none, None where the rows bring their own."""
    systems = d.table.extra["systems"]
    rules = [d.table.extra["map_functions"].get(_map_function(entry), {}) for entry in entries]
    names = {rule.get("system") for rule in rules}
    if len(names) > 1 and any(names):
        node = entries[0].get("dataset_map_fn")
        d.choose(
            node,
            "the map functions add different system prompts",
            "A recipe has one, data.system: write them into the rows.",
        )
        return None
    name = next(iter(names), None)
    if name:
        where = [(key, node) for key, node in d.all_of("data.files:format")][:1]
        write_system(d, systems[name], where)
    return systems.get(name, "") if name is not None else None


def _map_questions(d: Draft, trained: str | None) -> None:
    """EvaluateChatHook -> evaluate.prompts, asked every so many optimizer steps."""
    found, system = d.one("evaluate.prompts"), d.one("evaluate.prompts:system")
    every, longest = d.number("evaluate.samples_every_steps"), d.number("evaluate.max_new_tokens", whole=True)
    roles = (
        "evaluate.prompts:system",
        "evaluate.samples_every_steps",
        "evaluate.max_new_tokens",
        "evaluate.prompts:template",
    )
    questions = (
        [str(i.value) for i in found[1].value if isinstance(i.value, str)]
        if found and isinstance(found[1].value, list)
        else []
    )
    if found is not None and isinstance(found[1].value, str):
        questions = [found[1].value]
    if found is None or not questions:
        d.leave_all(("evaluate.prompts", *roles), "there are no questions to ask", matters=False)
        return
    text = _system_text(d, system[1]) if system is not None else ""
    extra: dict[str, Any] = {}
    if text and trained == "":
        d.facts.add("eval_system")
    elif text and text != trained:
        extra = {"system": text}
    d.write("evaluate.prompts", [{"user": q, **extra} for q in questions] if extra else questions)
    for key, node in d.all_of("evaluate.prompts:system"):
        if text and trained == "":
            d.leave(
                key, node, "training never saw this system prompt: the questions are asked without it", matters=True
            )
        else:
            d.note(key, node, "evaluate.prompts[].system" if extra else "data.system", text)
    if every and every > 0:
        accumulate = max(1, int(d.number("train.accumulate", whole=True) or 1))
        d.write(
            "evaluate.samples_every_steps",
            max(1, round(every / accumulate)),
            note=f"{every:g} iterations / {accumulate}",
        )
    if longest:
        d.write("evaluate.max_new_tokens", int(longest))
    else:
        d.write_default("evaluate.max_new_tokens", 600)
    for key, node in d.all_of("evaluate.prompts:template"):
        d.note(key, node, "data.template", "the training template asks too")


def _system_text(d: Draft, node: Node) -> str:
    if isinstance(node.value, Symbol):
        text = d.table.extra["systems"].get(node.value.last)
        if text is None:
            d.choose(
                node,
                f"the system prompt {node.text} is not known here",
                "Write it out: data.system, or system under a prompt.",
            )
        return text or ""
    return node.value if isinstance(node.value, str) else ""
