"""The prepare stage: model as a folder, data as a packed token cache. Runs once, before any process group exists.

A cache entry is named by what it is made of, so a second run finds it and imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import shutil
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache_key import cache_key
from .data import INDEX, TokenWriter, damage
from .disk import new_folder, read_json, write_json
from .metrics import event
from .model_source import materialise
from .pack import pack_documents
from .row_documents import Counts, encoded, fit, parts_of, require_known_tokens, vocabulary_size
from .rows import Row, read_rows
from .source_counts import SourceCounts, drawn, source_lines
from .spec import DataFile, DataSpec, Prepared, TrainError, TrainSpec, read_plan
from .storage import Storage

if TYPE_CHECKING:
    from .template import ChatTemplate, Document

CHECKED_ROWS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `trainer.worker prepare`."""
    parser.add_argument("--plan", required=True, help="plan.json of the run")


def run(args: argparse.Namespace) -> None:
    """Writes prepared.json and an event. Raises TrainError for anything wrong with the storage, the model or the data."""
    started = time.monotonic()
    spec = read_plan(args.plan)
    print(f"plan {spec.digest()} run {spec.run_id}", flush=True)
    if spec.storage.url:
        Storage(spec.storage.url).probe()
    model_dir = materialise(spec.model)
    entry, reused = prepare_data(spec, model_dir)
    index = read_json(entry / INDEX)
    counts = Counts(**index["counts"])
    prepared = Prepared(
        model_dir=str(model_dir),
        data_dir=str(entry),
        num_documents=counts.documents,
        num_rows=index["num_rows"],
        num_tokens=counts.tokens,
        num_supervised_tokens=counts.supervised_tokens,
        num_held_out_rows=index["num_held_out_rows"],
    )
    write_json(Path(spec.paths.prepared), prepared.to_dict())
    seconds = round(time.monotonic() - started, 2)
    sources = [SourceCounts(**found) for found in index["sources"]]
    for line in (*index["template_notes"], *source_lines(sources), *summary(counts, index["num_rows"], spec.data)):
        print(line, flush=True)
    print(f"prepared in {seconds} s: tokens {'found' if reused else 'written'} in {entry}", flush=True)
    event(
        spec.paths.events,
        "prepared",
        seconds=seconds,
        reused=reused,
        **prepared.to_dict(),
        counts=dataclasses.asdict(counts),
        sources=index["sources"],
        template_notes=index["template_notes"],
    )


def summary(counts: Counts, num_rows: int, data: DataSpec) -> list[str]:
    """The counts in a few lines for people."""
    rows = f"{num_rows:,} rows of {data.max_length:,} tokens"
    if data.packing:
        rows += f", {counts.tokens / (num_rows * data.max_length):.1%} full"
    else:
        rows = f"{num_rows:,} rows (no packing), {counts.tokens / num_rows:,.0f} tokens on average"
    lines = [
        f"data: {counts.rows:,} rows -> {counts.documents:,} documents, {counts.tokens:,} tokens, "
        f"{counts.supervised_tokens:,} supervised ({counts.supervised_tokens / counts.tokens:.0%}) -> {rows}"
    ]
    if counts.truncated:
        lines.append(
            f"data: {counts.truncated:,} documents cut to {data.max_length:,} tokens ({counts.tokens_cut:,} tokens lost)"
        )
    if counts.split:
        lines.append(f"data: {counts.split:,} rows of more than {data.max_length:,} tokens split between their turns")
    if counts.dropped:
        lines.append(f"data: {counts.dropped:,} documents of more than {data.max_length:,} tokens left out")
    if counts.unsupervised:
        lines.append(
            f"data: {counts.unsupervised:,} rows left out: no token to learn (an empty answer, or all of it cut off)"
        )
    if counts.held_out:
        lines.append(
            f"data: {counts.held_out:,} documents held out ({counts.held_out_supervised_tokens:,} supervised tokens)"
        )
    if counts.held_out_but_seen:
        lines.append(
            f"data: WARNING: {counts.held_out_but_seen:,} of the held-out documents are among the training rows too, "
            "so their loss says nothing about new ones"
        )
    if counts.rewritten:
        lines.append(
            f"data: in {counts.rewritten:,} rows only later answers are learnt: the template rewrites earlier ones"
        )
    return lines


def prepare_data(spec: TrainSpec, model_dir: Path) -> tuple[Path, bool]:
    """(cache entry, whether it was there already). A damaged entry is said and made again. Raises TrainError."""
    entry = Path(spec.data.cache_dir) / "data" / cache_key(spec.data, model_dir)
    if entry.is_dir():
        reason = damage(entry)
        if not reason:
            return entry, True
        print(f"token cache {entry} is damaged ({reason}): it is made again", flush=True)
        shutil.rmtree(entry)
    try:
        with new_folder(entry) as partial:
            _build(partial, spec, model_dir)
    except TrainError:
        # Another process may have made the same entry meanwhile; content decides the name, so it serves as well.
        if not entry.is_dir() or damage(entry):
            raise
    return entry, False


def _build(folder: Path, spec: TrainSpec, model_dir: Path) -> None:
    from .template import load_template
    from .template_difference import template_difference

    data = spec.data
    template = load_template(str(model_dir), data.template, spec.model.trust_remote_code)
    counts, held_out_counts, files = Counts(), Counts(), {}
    encoder = _Encoder(template, data, vocabulary_size(model_dir), TokenWriter(folder), files)
    gc.freeze()  # a hundred thousand objects of imported libraries, which each collection while reading rows would walk through
    encoder.encode(data.files, 0, data.max_rows, counts)
    writer, num_own = encoder.writer, len(encoder.writer.lengths)
    if data.held_out_files:
        encoder.encode(data.held_out_files, len(data.files), 0, held_out_counts)
    digests = np.frombuffer(writer.digests, ">u8")
    is_held_out = np.arange(len(digests)) >= num_own
    if data.held_out and num_own:
        is_held_out = held_out_documents(digests, data.held_out)
    sources = np.asarray(encoder.source_of_document, np.int64)
    weights = [source.weight for source in data.files]
    trained = drawn(digests, np.where(is_held_out, -1, sources), weights)
    held_out = np.flatnonzero(is_held_out)
    _count(counts, writer, digests, trained, held_out)
    _require_documents(data, counts, held_out_counts)
    lengths = np.asarray(writer.lengths, np.int64)
    parts = [(which, *pack_documents(lengths[which], data.max_length, data.packing)) for which in (trained, held_out)]
    (_, offsets, _), (_, held_out_offsets, _) = parts
    tokenizer = template.tokenizer
    pads = (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    per_source = SourceCounts.of(data.files, encoder.rows_of_source, sources, is_held_out, trained, lengths)
    index: dict[str, Any] = {
        "packing": data.packing,
        "max_length": data.max_length,
        "num_rows": len(offsets) - 1,
        "num_held_out_rows": len(held_out_offsets) - 1,
        "pad_token_id": next(pads),
        "eos_token_id": -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        "data_files": list(files),
        "sources": [dataclasses.asdict(source) for source in per_source],
        "counts": dataclasses.asdict(counts),
        "template_notes": template_difference(template, data.template) if data.template != "model" else [],
    }
    row_offsets = np.concatenate((offsets, offsets[-1] + held_out_offsets[1:]))
    writer.finish(row_offsets, np.concatenate([which[documents] for which, _, documents in parts]), index)


def _require_documents(data: DataSpec, counts: Counts, held_out_counts: Counts) -> None:
    if counts.documents and counts.cut_off > data.max_cut_off * counts.rows:
        raise TrainError(
            f"{counts.cut_off} of {counts.rows} rows have nothing left to learn once they are cut to max_length = "
            f"{data.max_length}; data.max_cut_off allows {data.max_cut_off:.0%}",
            "Raise data.max_length, split conversations (data.too_long: split-turns), leave long rows out (drop), or allow more.",
        )
    if counts.documents == 0:
        raise _nothing_to_learn(counts, data, "the")
    if counts.held_out == 0 and data.held_out_files:
        raise _nothing_to_learn(held_out_counts, data, "data.held_out_files'")
    if counts.held_out == 0 and data.held_out:
        raise TrainError(
            f"data.held_out {data.held_out:g}: nothing can be held out, since all {counts.documents} documents are equal",
            "Remove data.held_out, or give rows that differ.",
        )


class _Encoder:
    """Rows -> tokens in `writer`, and what became of them."""

    def __init__(
        self, template: ChatTemplate, data: DataSpec, vocabulary: int, writer: TokenWriter, files: dict[str, int]
    ) -> None:
        self.template, self.data, self.vocabulary, self.writer = template, data, vocabulary, writer
        self.files = files
        """Number of each file that rows came from, in the order of the first."""
        self.source_of_document = array("q")
        """Number of the source of each document; held-out files go on behind the others."""
        self.rows_of_source: list[int] = [0] * (len(data.files) + len(data.held_out_files))

    def encode(self, sources: tuple[DataFile, ...], first: int, max_rows: int, counts: Counts) -> None:
        """`first`: number of the first of these sources. Raises TrainError for a row that cannot be read or encoded."""
        checked = False
        for rows, documents in encoded(read_rows(sources, max_rows), self.template, self.data):
            if not checked:
                _check_identity(self.template, rows, documents, self.data.system)
                checked = True
            counts.rows += len(rows)
            for row, document in zip(rows, documents, strict=True):
                source = first + row.source_number
                self.rows_of_source[source] += 1
                for part in parts_of(row, document, self.template, self.data, counts):
                    kept = fit(part, self.data, counts)
                    if kept is not None:
                        self._write(row, kept, source, document)

    def _write(self, row: Row, document: Document, source: int, whole: Document) -> None:
        """`whole`: what it is a part of, so that parts of one row are held out together."""
        require_known_tokens(row, document, self.vocabulary)
        number = self.files.setdefault(row.path, len(self.files))
        self.writer.add(document.input_ids, document.supervised, number, row.line, whole.input_ids)
        self.source_of_document.append(source)


def held_out_documents(digests: np.ndarray, share: float) -> np.ndarray:
    """bool (D,): which documents are held out, given digests (D,): at least `share`, and no more than equal ones force.

    Those whose digests come first: the choice depends on what a document says, not on where it stands, and equal
    documents are never on both sides. One kind of document is always left to train on, so of equal ones none is held out.
    """
    _, kind, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    last = np.searchsorted(np.cumsum(sizes), math.ceil(round(share * len(digests), 6)))
    return kind <= min(last, len(sizes) - 2)


def _count(counts: Counts, writer: TokenWriter, digests: np.ndarray, trained: np.ndarray, held_out: np.ndarray) -> None:
    """`trained` (M,) and `held_out` (H,) are document numbers; a document that is drawn twice counts twice."""
    lengths, labels = (np.asarray(values, np.int64) for values in (writer.lengths, writer.labels))
    counts.documents, counts.held_out = len(trained), len(held_out)
    counts.tokens, counts.supervised_tokens = int(lengths[trained].sum()), int(labels[trained].sum())
    counts.held_out_supervised_tokens = int(labels[held_out].sum())
    counts.held_out_but_seen = int(np.isin(digests[held_out], digests[trained]).sum())


def _check_identity(template: ChatTemplate, rows: list[Row], documents: list[Document], system: str | None) -> None:
    pairs = [pair for pair in zip(rows, documents, strict=True) if pair[0].input_ids is None][:CHECKED_ROWS]
    report = template.check_identity([row for row, _ in pairs], [document for _, document in pairs], system)
    if report.num_checked:
        print(
            f"training tokens equal chat tokens: prompts {report.num_checked} of {report.num_checked}, "
            f"whole conversations {report.num_whole_equal} of {report.num_checked} checked rows",
            flush=True,
        )


def _nothing_to_learn(counts: Counts, data: DataSpec, whose: str) -> TrainError:
    return TrainError(
        f"none of {whose} {counts.rows} rows has a token to learn: {counts.dropped} are longer than max_length = "
        f"{data.max_length} (too_long: drop), {counts.unsupervised} have no supervised token within max_length",
        "Raise data.max_length, shorten system prompt and questions, or give rows with answers.",
    )
