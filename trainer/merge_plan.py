"""What a merged model consists of: for each tensor where it comes from, and what is added to it. Reads headers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .lora_adapter import Adapter, Update, changes_of
from .model_folder import has_vocabulary, is_embedding, is_head, read_config, stored_tensors
from .spec import TrainError
from .tensor_files import STORED_DTYPES, Shard, StoredTensor, plan_shards
from .tensor_header import TensorSpec

TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Source:
    """A tensor before its updates."""

    stored: StoredTensor
    name: str
    """In the file that holds it."""
    updates: tuple[Update, ...] = ()
    quantised: bool = False
    """Taken as NF4 gives it back."""


@dataclass(frozen=True)
class Plan:
    """What will be written, all checked."""

    base: Path
    config: dict[str, Any]
    """config.json of the result."""
    adapters: tuple[Adapter, ...]
    sources: dict[str, Source]
    shards: list[Shard]
    dtype: str | None
    """As stored; None keeps each tensor's own."""
    num_changed: int
    """Tensors of the result that are not those of the base."""
    new_vocabulary: int | None
    """Rows of the embeddings, when an adapter brought others than the base has."""
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)

    @property
    def merged_dtype(self) -> str:
        """Recipe word (bf16, fp16, fp32) of the merged weights."""
        # As they are written: an embedding that comes from the adapter may lie there in another format.
        written = {tensor.name: tensor.dtype for shard in self.shards for tensor in shard.tensors}
        changed = [written[name] for name, source in self.sources.items() if source.updates]
        known = [dtype for dtype in (*changed, *written.values()) if dtype in STORED_DTYPES.values()]
        return next(word for word, name in STORED_DTYPES.items() if name == known[0])


def make_plan(
    base: Path, adapters: Sequence[Adapter], dtype: str | None, max_bytes: int, quantised: frozenset[str] = frozenset()
) -> Plan:
    """`quantised`: weights to take as NF4 gives them back. Raises TrainError when adapters and base do not fit together."""
    config = read_config(base)
    stored = stored_tensors(base)
    packed = sorted(name for name, tensor in stored.items() if not tensor.is_float)
    if config.get("quantization_config") and packed:
        raise TrainError(
            f"{base} is quantised ({packed[0]} is {stored[packed[0]].entry.dtype})",
            "Give the original model by --base.",
        )
    if unknown := sorted(quantised - stored.keys()):
        raise TrainError(
            f"{base} holds no {unknown[0]}, which NF4 would round", "Its names are others: use --base-precision bf16."
        )
    sources = {name: Source(tensor, name, quantised=name in quantised) for name, tensor in stored.items()}
    tie = _Tie.of(config, sources)
    if tie is not None:
        sources.setdefault(tie.head, sources[tie.embedding])
    for adapter in adapters:
        _apply(adapter, sources, str(config.get("model_type", "")))
    if tie is not None and not tie.settle(sources, stored):
        config = _with(config, TIED, False)
    vocabulary = _new_vocabulary(sources, stored)
    notes: tuple[str, ...] = ()
    if vocabulary is not None:
        config = _with(config, "vocab_size", vocabulary)
        notes = (f"the vocabulary of the adapter has {vocabulary} tokens; vocab_size of config.json says so too",)
        if not any(has_vocabulary(adapter.path.parent) for adapter in adapters):
            notes += ("no tokenizer lies beside the adapter: that of the base, which is used, lacks the new tokens",)
    as_stored = STORED_DTYPES[dtype] if dtype else None
    tensors = []
    for name, source in sources.items():
        entry = source.stored.entry
        # A weight that an adapter brings whole is stored as the base stores it.
        own = stored[name].entry.dtype if name in stored else entry.dtype
        tensors.append(TensorSpec(name, as_stored if as_stored and source.stored.is_float else own, entry.shape))
    num_changed = sum(s.updates != () or name not in stored or s.stored != stored[name] for name, s in sources.items())
    shards = plan_shards(tensors, max_bytes)
    return Plan(base, config, tuple(adapters), sources, shards, as_stored, num_changed, vocabulary, notes)


def _apply(adapter: Adapter, sources: dict[str, Source], model_type: str) -> None:
    changes = changes_of(adapter, {name: source.stored.entry for name, source in sources.items()}, model_type)
    if changes.replaced and adapter.weight != 1:
        raise TrainError(
            f"{adapter.path} brings {next(iter(changes.replaced))} whole, which cannot be weighted by {adapter.weight:g}",
            "Merge it with weight 1.",
        )
    for target, name in changes.replaced.items():
        if sources[target].updates or sources[target].stored.path.name == adapter.path.name:
            raise TrainError(
                f"{adapter.path} brings {target} whole, and another adapter changes it too", "Merge one of them."
            )
        sources[target] = Source(StoredTensor(adapter.path, adapter.entries[name]), name)
    for target, updates in changes.updates.items():
        all_updates = (*sources[target].updates, *updates)
        if any(update.magnitude for update in all_updates) and sources[target].updates:
            raise TrainError(
                f"{target} is changed by a DoRA adapter and by another one: their sum is no DoRA layer",
                "Merge one of them.",
            )
        sources[target] = replace(sources[target], updates=all_updates)


@dataclass(frozen=True)
class _Tie:
    """Input and output embedding of a base in which they are one weight."""

    embedding: str
    head: str

    @classmethod
    def of(cls, config: dict[str, Any], sources: dict[str, Source]) -> _Tie | None:
        """None when they are two."""
        heads = [name for name in sources if is_head(name)]
        # A config without the key was written by a version of transformers whose default was to tie.
        is_tied = config.get(TIED)
        if not (is_tied if isinstance(is_tied, bool) else not heads):
            return None
        embeddings = [name for name in sources if is_embedding(name)]
        if len(embeddings) != 1:
            return None
        stored_head = next(iter(heads), None)
        if stored_head is not None and not _same(sources[embeddings[0]], sources[stored_head]):
            # transformers does not tie them then, whatever the config says.
            return None
        head = "embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"
        return cls(embeddings[0], stored_head or head)

    def settle(self, sources: dict[str, Source], stored: dict[str, StoredTensor]) -> bool:
        """Whether both are still one weight; then the head is stored only where the base stores it."""
        embedding, head = sources[self.embedding], sources[self.head]
        untouched = self.head in stored and head == Source(stored[self.head], self.head, quantised=head.quantised)
        if untouched and embedding == Source(stored[self.embedding], self.embedding, quantised=embedding.quantised):
            return True
        if untouched:
            # The base stores one weight twice, so its head is the embedding as it was.
            head = Source(stored[self.embedding], self.embedding)
        if not _same(embedding, head):
            sources[self.head] = head
            return False
        sources[self.head] = embedding
        if self.head not in stored:
            del sources[self.head]
        return True


def _same(one: Source, other: Source) -> bool:
    if one == other:
        return True
    a, b = one.stored.entry, other.stored.entry
    if one.updates or other.updates or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with one.stored.path.open("rb") as first, other.stored.path.open("rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        left = a.nbytes
        while left:
            size = min(left, 2**24)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _with(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with `key` changed at the top, and where a nested text config has it too."""
    nested = {
        name: _with(part, key, value)
        for name, part in config.items()
        if name.endswith("_config") and isinstance(part, dict) and key in part
    }
    return config | nested | {key: value}


def _new_vocabulary(sources: dict[str, Source], stored: dict[str, StoredTensor]) -> int | None:
    """Rows of the embeddings, None when they are as many as in the base. Raises TrainError when input and output disagree."""
    rows = {
        name: source.stored.entry.shape[0] for name, source in sources.items() if is_embedding(name) or is_head(name)
    }
    if all(stored[name].entry.shape[0] == n for name, n in rows.items() if name in stored):
        return None
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} has {n} rows" for name, n in rows.items())
        raise TrainError(f"the vocabularies of input and output differ: {listed}", "The adapter lacks one of them.")
    return next(iter(rows.values()))
