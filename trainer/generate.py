"""Answers from a model: batched and greedy for evaluation, streamed for chat.

One decoding loop of our own over the key-value cache: what decides the next token is all here (nothing comes from a
model's generation_config.json), and a stream needs no second thread, so Ctrl-C stops it at once.

Shapes: B conversations, T prompt length (left-padded), V vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from . import wide_products
from .spec import TrainError
from .template import load_template

Messages = Sequence[tuple[str, str]]
"""One conversation: (role, content) pairs, the last of which is to be answered."""


class Prompter(Protocol):
    """How a conversation becomes tokens and when an answer is over: a `ChatTemplate`, or `Continuation`."""

    tokenizer: Any

    @property
    def stop_token_ids(self) -> Sequence[int]: ...

    def prompt_ids(self, messages: Messages) -> list[int]: ...


class Continuation:
    """For a tokenizer without chat template (a model trained on plain text): it continues what the user wrote."""

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        self.tokenizer, self.stop_token_ids = tokenizer, stop_token_ids

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The contents, a blank line apart, behind the tokenizer's own beginning-of-text token: as text rows train."""
        text = "\n\n".join(content for _, content in messages)
        starts_with_bos = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        bos = [self.tokenizer.bos_token_id] if starts_with_bos else []
        return bos + self.tokenizer(text, add_special_tokens=False)["input_ids"]


def load_prompter(model_dir: str, template: str, trust_remote_code: bool) -> Prompter:
    """The chat template of a model folder, or plain continuation (said on stdout) where its tokenizer has none."""
    loaded = load_template(model_dir, template, trust_remote_code)
    if template == "model" and not loaded.tokenizer.chat_template:
        print("the tokenizer has no chat template: the prompts are continued as plain text", flush=True)
        return Continuation(loaded.tokenizer, loaded.stop_token_ids)
    return loaded


@dataclass(frozen=True)
class Answer:
    text: str
    """Without special tokens; never ends in half a character."""
    num_tokens: int
    """Generated tokens, without the one that ended the answer."""
    stopped: bool
    """The model ended the answer itself; False: cut at `max_new_tokens`."""


def load_for_generation(
    model_dir: str,
    dtype: torch.dtype,
    device: torch.device,
    adapter_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The transformers model of `model_dir` in eval mode on `device`, with the PEFT adapter of `adapter_dir` if given.

    Raises TrainError when a folder is not what it should be.
    """
    from transformers import AutoModelForCausalLM

    check_folders(model_dir, adapter_dir)
    wide_products.install()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, trust_remote_code=trust_remote_code, device_map={"": device}
        )
    except (OSError, ValueError, SafetensorError) as e:
        raise TrainError(
            f"{model_dir} cannot be loaded: {e}", "Is the folder complete (config.json, *.safetensors)?"
        ) from e
    if adapter_dir is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=False)
    return model.eval()


def check_folders(model_dir: str, adapter_dir: str | None) -> None:
    """Raises TrainError unless `model_dir` is a Hugging Face model folder and `adapter_dir` a PEFT adapter folder."""
    model, adapter_config = Path(model_dir), Path(model_dir, "adapter_config.json")
    if model.suffix == ".gguf" or (
        model.is_dir() and not (model / "config.json").exists() and any(model.glob("*.gguf"))
    ):
        raise TrainError(
            f"{model_dir} is a GGUF model; only Hugging Face model folders can be loaded here",
            "Use the folder that holds config.json and *.safetensors, for example merged/ of a run.",
        )
    if not model.is_dir():
        raise TrainError(f"{model_dir} is not a folder", "Give a Hugging Face model folder, such as merged/ of a run.")
    if not (model / "config.json").is_file():
        if adapter_config.is_file():
            base = json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE"
            raise TrainError(f"{model_dir} is an adapter, not a model", f"Use --model {base} --adapter {model_dir}")
        raise TrainError(
            f"{model_dir} has no config.json, so it is not a Hugging Face model folder",
            "Give the folder that holds config.json and *.safetensors, such as merged/ of a run.",
        )
    if adapter_dir is not None and not Path(adapter_dir, "adapter_config.json").is_file():
        raise TrainError(
            f"{adapter_dir} has no adapter_config.json, so it is not a PEFT adapter folder",
            "Give adapter/ of a run, or leave the adapter out for a merged model.",
        )


def generate_answers(
    model: Any,
    template: Prompter,
    conversations: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Answer]:
    """Greedy answers, in the order of `conversations`. Deterministic; the caller puts the model into eval mode."""
    prompts = [template.prompt_ids(messages) for messages in conversations]
    # Prompts of like length share a batch, so that little is computed for padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        token_ids: list[list[int]] = [[] for _ in batch]
        stopped = [False] * len(batch)
        steps = _decode(model, [prompts[i] for i in batch], max_new_tokens, _greedy)
        for next_ids in steps:
            for row, token in enumerate(next_ids):
                stopped[row] = stopped[row] or token in template.stop_token_ids
                if not stopped[row]:
                    token_ids[row].append(token)
            if all(stopped):
                break
        for row, i in enumerate(batch):
            text = _decode_text(template, token_ids[row])
            answers[i] = Answer(text if stopped[row] else _whole(text), len(token_ids[row]), stopped[row])
    return [answers[i] for i in range(len(prompts))]


def stream_answer(
    model: Any,
    template: Prompter,
    messages: Messages,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Pieces of one answer as they are generated; joined, they are the text of `generate_answers`.

    No piece ends inside a character: tokens may hold parts of one, so text is held back until it is whole.
    `temperature` 0 is greedy; above it tokens are drawn from softmax(logits / temperature), repeatable with `seed`.
    """
    pick = _greedy if temperature == 0 else _sampler(temperature, seed, model.device)
    token_ids: list[int] = []
    # The window of ids[shown_from:] is decoded, not the single token: a tokenizer may drop a leading space, and a
    # character may span tokens. ids[shown_from:shown_to] is already shown.
    shown_from = shown_to = 0
    stopped = False
    for (token,) in _decode(model, [template.prompt_ids(messages)], max_new_tokens, pick):
        stopped = token in template.stop_token_ids
        if stopped:
            break
        token_ids.append(token)
        shown = _decode_text(template, token_ids[shown_from:shown_to])
        text = _decode_text(template, token_ids[shown_from:])
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown_from, shown_to = shown_to, len(token_ids)
    shown = _decode_text(template, token_ids[shown_from:shown_to])
    text = _decode_text(template, token_ids[shown_from:])
    rest = (text if stopped else _whole(text))[len(shown) :]
    if rest:
        yield rest


def _decode(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, pick: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[int]]:
    """The next token of each of the B prompts, again and again, at most `max_new_tokens` times."""
    device, longest = model.device, max(len(p) for p in prompts)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    padded = not bool(mask_BT.all())
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    # Prompt logits of all positions would be T x V floats; the last one is all that counts.
    keep = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    cache = None
    for _ in range(max_new_tokens):
        with torch.no_grad():
            out = model(
                input_ids=ids_BT,
                attention_mask=mask_BT if padded else None,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                **keep,
            )
            next_B = pick(out.logits[:, -1].float())
            cache = out.past_key_values
            ids_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
            mask_BT = torch.cat((mask_BT, mask_BT.new_ones(len(prompts), 1)), dim=1)
        yield next_B.tolist()


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    return logits_BV.argmax(dim=-1)


def _sampler(temperature: float, seed: int | None, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def sample(logits_BV: torch.Tensor) -> torch.Tensor:
        return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]

    return sample


def _decode_text(template: Prompter, token_ids: Sequence[int]) -> str:
    return template.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _whole(text: str) -> str:
    """`text` without the replacement characters that stand for a last character cut in two."""
    return text.rstrip("\ufffd")
