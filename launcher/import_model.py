"""Model, method, lengths and packing of another program's settings, in our words."""

from __future__ import annotations

import math
import re
from typing import Any

from .import_draft import Draft, one_line, word
from .recipe_words import FOREIGN_VALUES
from .recipe_yaml import Node

_METHODS = {"lora": "lora", "qlora": "qlora", "full": "full", "none": "full", "false": "full"}
_TOO_LONG = {"delete": "drop", "drop": "drop", "raise": "drop", "truncate": "truncate", "right": "truncate"}
_CLEAN_ATTENTION = frozenset(
    ["flash_attention", "flex_attention", "xformers_attention", "sage_attention", "attn_implementation"]
)
LORA_ROLES = (
    "method.rank",
    "method.alpha",
    "method.alpha:rslora",
    "method.dropout",
    "method.targets",
    "method.targets:linear",
)
"""Roles that say how adapters are made."""


def map_model(d: Draft) -> None:
    """`model`: source, revision, number format."""
    found = d.one("model.source")
    if found is None:
        d.choose(None, "the file names no model", "Write one: model: Qwen/Qwen2.5-7B-Instruct")
    else:
        _map_source(d, *found)
    revision = d.one("model.revision")
    if revision is not None and str(revision[1].value) != "main":
        d.write("model.revision", str(revision[1].value))
    elif revision is not None:
        d.note(*revision, "model.revision", "main")
    if d.is_on("model.trust_remote_code"):
        d.write("model.trust_remote_code", True)
        d.facts.add("trust")
    _map_dtype(d)


def _map_source(d: Draft, key: str, node: Node) -> None:
    source = str(node.value)
    path = d.start.folder / source
    if (path / "config.json").is_file() or path.suffix == ".gguf":
        source = str(path)
    elif source.startswith((".", "/", "~")) and "config.json" not in source:
        d.facts.add("local_model")
    hub = d.one("model.source:hub")
    from_hf = hub is not None and bool(hub[1].value)
    if d.table.name == "swift" and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        if not from_hf:
            source = f"modelscope:{source}"
        if hub is not None:
            d.note(*hub, "model.source", source)
    elif hub is not None:
        d.leave(*hub, "the model is a folder", matters=False)
    d.write("model.source", source)


def _map_dtype(d: Draft) -> None:
    for role, dtype in (("pure_bf16", "bf16"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32")):
        found = d.one(f"model.dtype:{role}")
        if found is not None and d.is_on(f"model.dtype:{role}"):
            d.write("model.dtype", dtype, f"model.dtype:{role}")
            break
    else:
        for role in ("amp", "name"):
            found = d.one(f"model.dtype:{role}")
            dtype = FOREIGN_VALUES.get(word(found[1]), word(found[1])) if found else ""
            if found and dtype in ("bf16", "fp16", "fp32"):
                d.write("model.dtype", dtype, f"model.dtype:{role}")
                break
        else:
            off = d.one("model.dtype:bf16")
            if off is not None and d.table.name == "trl" and not off[1].value:
                d.write("model.dtype", "fp32", "model.dtype:bf16")
            else:
                d.write_default("model.dtype", d.table.defaults.get("model.dtype"))
    dtype = d.values.get("model.dtype", "bf16")
    d.facts |= {dtype, *({"fp32_weights"} if d.table.name == "trl" and not d.one("model.dtype:name") else ())}
    noted = {m.key for m in d.mapped}
    for role in ("pure_bf16", "fp16", "bf16", "fp32", "amp", "name"):
        for key, node in d.all_of(f"model.dtype:{role}"):
            if key not in noted:
                d.leave(key, node, f"model.dtype is {dtype}: one number format for both passes", matters=False)


def map_method(d: Draft) -> None:
    """`method`: what is trained, in how many bits, with which adapters."""
    name, node = _method_name(d)
    bits, bits_node = _bits(d)
    if name == "lora" and bits == 4:
        name = "qlora"
    elif bits == 8 and name == "lora":
        d.choose(
            bits_node,
            "8 bits are not offered",
            "`method: qlora` (4 bits) is written; `method: lora` takes more memory.",
        )
        name = "qlora"
    elif bits and name == "full":
        d.choose(
            bits_node, "full training of a quantised base is not possible", "Write `method: qlora`, or leave it full."
        )
    elif bits not in (0, 4, 8):
        d.choose(bits_node, f"{bits} bits are not offered", "`method: qlora` has 4.")
        name = "qlora" if name == "lora" else name
    d.values["method.name"] = name
    seen = [
        f
        for role in ("", ":peft", ":lora", ":bits", ":4bit", ":8bit", ":quantiser")
        for f in d.all_of(f"method.name{role}")
    ]
    for key, found in seen:
        d.note(key, found, "method.name", name)
    if not seen or node is None:
        d.write_default("method.name", name)
    d.facts |= {name, *({"adapters"} if name != "full" else ())}
    if name == "full":
        d.leave_all((*LORA_ROLES, "method.double_quant"), "full training has no adapters", matters=False)
        return
    _map_lora(d)
    if name == "qlora":
        double = d.one("method.double_quant")
        if double is not None:
            d.write("method.double_quant", d.is_on("method.double_quant"))
        else:
            d.write_default("method.double_quant", d.table.defaults.get("method.double_quant"))
    else:
        d.leave_all(("method.double_quant",), "the base is not quantised", matters=False)


def _method_name(d: Draft) -> tuple[str, Node | None]:
    """lora, full or qlora, and where it is said."""
    if d.table.name == "xtuner":
        lora = d.one("method.name:lora")
        return ("lora", lora[1]) if lora else ("full", None)
    if d.table.name == "trl":
        peft = d.one("method.name:peft")
        return ("lora" if d.is_on("method.name:peft") else "full"), peft[1] if peft else None
    found = d.one("method.name")
    if found is None:
        return d.table.defaults.get("method.name", "full"), None
    key, node = found
    given = str(node.value).lower()
    if given not in _METHODS:
        d.choose(node, f"{key}: {node.value} is not offered", "A recipe trains lora, qlora or full; lora is written.")
    return _METHODS.get(given, "lora"), node


def _bits(d: Draft) -> tuple[int, Node | None]:
    """How many bits the base has; 0: it is not quantised."""
    bits = d.number("method.name:bits", whole=True)
    found = d.one("method.name:bits")
    quantiser = d.one("method.name:quantiser")
    if quantiser is not None and word(quantiser[1]) not in ("bnb", "fp8"):
        d.choose(
            quantiser[1],
            f"{quantiser[0]}: {word(quantiser[1])} is not offered",
            "Quantised bases are NF4: method: qlora.",
        )
    for role, number in (("method.name:4bit", 4), ("method.name:8bit", 8)):
        if d.is_on(role):
            one = d.one(role)
            return number, one[1] if one else None
    return int(bits or 0), found[1] if found else None


def _map_lora(d: Draft) -> None:
    rank, found = d.number("method.rank", whole=True), d.one("method.rank")
    if rank is not None and rank <= 0 and found is not None:
        d.problem(found[1], f"{found[0]}: {rank}; expected a whole number, 1 or more", "")
        return
    if rank:
        d.write("method.rank", int(rank))
    else:
        d.write_default("method.rank", d.table.defaults.get("method.rank"))
    rank = d.values.get("method.rank", 16)
    alpha = d.number("method.alpha")
    if d.one("method.alpha") is None and "method.alpha" in d.table.defaults:
        d.facts.add("default_lora_alpha")
    alpha = alpha if alpha is not None else d.table.defaults.get("method.alpha", 2 * rank)
    if d.is_on("method.alpha:rslora"):
        scaled = round(alpha * math.sqrt(rank), 6)
        note = f"rsLoRA scales by alpha / sqrt(rank), a recipe by alpha / rank: {alpha:g} x sqrt({rank})"
        d.write("method.alpha", scaled, "method.alpha", note)
        d.write("method.alpha", scaled, "method.alpha:rslora", note)
    else:
        for key, node in d.all_of("method.alpha:rslora"):
            d.leave(key, node, "alpha / rank is the usual scale", matters=False)
        if d.one("method.alpha") is not None:
            d.write("method.alpha", alpha)
        elif alpha != 2 * rank:
            d.write_default("method.alpha", alpha)
    dropout = d.number("method.dropout")
    if dropout is not None:
        d.write("method.dropout", dropout)
    else:
        d.write_default("method.dropout", d.table.defaults.get("method.dropout"))
    _map_targets(d)


def _map_targets(d: Draft) -> None:
    linear, found = d.one("method.targets:linear"), d.one("method.targets")
    if linear is not None and d.is_on("method.targets:linear"):
        d.write("method.targets", "all-linear", "method.targets:linear")
        return
    for key, node in d.all_of("method.targets:linear"):
        d.leave(key, node, "the modules are named", matters=False)
    if found is None:
        if "method.targets" in d.table.defaults:
            d.facts.add("default_lora_targets")
            d.write_default("method.targets", d.table.defaults["method.targets"])
        return
    key, node = found
    items = node.value if isinstance(node.value, list) else re.split(r"[,\s]+", str(node.value).strip())
    names = [str(item.value if isinstance(item, Node) else item) for item in items]
    if any(name in ("all", "all-linear") for name in names):
        d.write("method.targets", "all-linear")
    elif any(not re.fullmatch(r"[\w.]+", name) for name in names):
        d.choose(
            node,
            f"{key}: a regular expression cannot name targets: {one_line(names)}",
            "Write name endings, method.targets: [q_proj, v_proj]; all-linear is used now.",
        )
    else:
        d.write("method.targets", names)


def map_lengths(d: Draft, texts_only: bool) -> None:
    """`data.max_length`, `packing`, `too_long`. `texts_only`: continued pre-training."""
    length = d.number("data.max_length", whole=True)
    if length:
        d.write("data.max_length", int(length))
    else:
        d.facts |= {"no_length", "default_length"}
        d.write_default("data.max_length", d.table.defaults.get("data.max_length"))
    packed: Any = d.is_on("data.packing") or d.is_on("data.packing:clean")
    if d.one("data.packing") is None and not packed:
        packed = (texts_only and d.table.name == "llamafactory") or d.table.defaults.get("data.packing", False)
    if d.one("data.packing") is not None:
        d.write("data.packing", bool(packed))
    else:
        d.write_default("data.packing", bool(packed))
    d.facts.add("packing" if packed else "unpacked")
    clean = d.is_on("data.packing:clean")
    for key, node in d.all_of("data.packing:clean"):
        d.note(key, node, "data.packing", bool(packed), "packing is always clean")
    if d.table.name == "axolotl":
        clean = any(key in _CLEAN_ATTENTION and node.value for key, node in d.settings)
    if packed and not clean and d.table.name in ("xtuner", "llamafactory", "axolotl"):
        d.facts.add("dirty_packing")
    _map_too_long(d, bool(packed))
    for learn in ("last", "all"):
        if d.is_on(f"data.learn:{learn}"):
            d.write("data.learn", learn, f"data.learn:{learn}")
        else:
            for key, node in d.all_of(f"data.learn:{learn}"):
                d.note(key, node, "data.learn", "answers")


def _map_too_long(d: Draft, packed: bool) -> None:
    found = d.one("data.too_long")
    dropped = packed and d.table.name == "llamafactory" and "texts" not in d.facts
    default = "drop" if dropped else d.table.defaults.get("data.too_long", "truncate")
    if found is None:
        d.write_default("data.too_long", default)
    elif str(found[1].value) in _TOO_LONG:
        d.write("data.too_long", _TOO_LONG[str(found[1].value)])
    else:
        d.leave(*found, "a document that is too long is left out, or loses its end (data.too_long)", matters=True)
    d.facts.add("long_drop" if d.values.get("data.too_long") == "drop" else "cut")
