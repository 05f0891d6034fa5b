"""Documents of the token cache as spans of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.tiny_chat_model import save_tiny_model

from trainer.data import TokenData, TokenWriter
from trainer.data_preview import histogram, shown_document
from trainer.pack import pack_documents
from trainer.rows import Message, Row
from trainer.template import load_template


def test_spans_are_the_text_with_what_is_learnt(tmp_path: Path) -> None:
    template = load_template(str(save_tiny_model(tmp_path / "model")), "model")
    turns = (("user", "你好"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "因为。"))
    row = Row(tuple(Message(*turn) for turn in turns), None, "/d.jsonl", 5)
    (tmp_path / "entry").mkdir()
    writer = TokenWriter(tmp_path / "entry")
    (document,) = template.encode_rows([row], None)
    writer.add(document.input_ids, document.supervised, 0, 5)
    offsets, order = pack_documents(np.asarray(writer.lengths), 512, True)
    index = {"packing": True, "max_length": 512, "pad_token_id": 0, "eos_token_id": 2, "data_files": ["/d.jsonl"]}
    writer.finish(offsets, order, {**index, "num_rows": 1, "num_held_out_rows": 0})
    shown = shown_document(TokenData.open(tmp_path / "entry"), template.tokenizer, 0)
    assert shown["source"] == "/d.jsonl:5"
    assert shown["tokens"] == len(document.input_ids)
    assert shown["learnt"] == sum(document.supervised)
    assert [text for text, kind in shown["spans"] if kind] == ["Yes.<|im_end|>", "因为。<|im_end|>"]
    assert "".join(text for text, _ in shown["spans"]) == template.tokenizer.decode(document.input_ids)


def test_every_document_is_in_one_bin() -> None:
    lengths = np.array([5, 5, 7, 100, 33])
    shown = histogram(lengths)
    assert sum(shown["counts"]) == 5
    assert (shown["edges"][0], shown["edges"][-1], shown["longest"]) == (5, 100, 100)
    assert histogram(np.array([4, 4]))["counts"] == [2]
