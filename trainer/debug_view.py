"""What `--debug` shows: the first batch as the model sees it, and whether one repeated batch is learnt."""

from __future__ import annotations

import math

from .data import Batch
from .loss import IGNORE
from .spec import TrainError
from .template import ChatTemplate

OPEN, CLOSE = "⟦", "⟧"


def first_batch_page(template: ChatTemplate, batch: Batch, max_documents: int = 3) -> str:
    """The batch's first documents as text; what the model must produce stands between ⟦ and ⟧."""
    ids, labels = batch.input_ids_1T[0].tolist(), batch.labels_1T[0].tolist()
    pages, start = [], 0
    for number, length in enumerate(batch.document_lengths[:max_documents], 1):
        end = start + length
        # A label stands one position before its token: shift it back to mark the token itself.
        supervised = [False, *(label != IGNORE for label in labels[start : end - 1])]
        if any(supervised):
            text = _marked(template, ids[start:end], supervised)
            pages.append(f"document {number}: {length} tokens, {sum(supervised)} supervised\n{text}")
        start = end
    return "\n\n".join(pages)


def _marked(template: ChatTemplate, ids: list[int], supervised: list[bool]) -> str:
    spans: list[str] = []
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or supervised[i] != supervised[start]:
            text = template.tokenizer.decode(ids[start:i], skip_special_tokens=False)
            spans.append(f"{OPEN}{text}{CLOSE}" if supervised[start] else text)
            start = i
    return "".join(spans)


def check_losses(losses: list[float]) -> str:
    """One line for the log. Raises TrainError when the loss of one repeated batch is not finite or does not fall."""
    shown = " ".join(f"{loss:.3f}" for loss in losses)
    if not all(math.isfinite(loss) for loss in losses):
        raise TrainError(f"the loss is not finite: {shown}", "Lower train.learning_rate, or use model.dtype: fp32.")
    if losses[-1] >= losses[0]:
        raise TrainError(
            f"the loss of one repeated batch does not fall: {shown}",
            "Raise train.learning_rate, or check that the supervised tokens above are the ones you mean.",
        )
    return f"one repeated batch is learnt: loss {shown}"
