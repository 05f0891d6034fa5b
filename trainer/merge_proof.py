"""Is the merged model the base with its adapter? Both answer the same prompts, and their logits are compared.

Shapes: T tokens of one text, V vocabulary. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import MAX_JSON_BYTES, regular_size
from .spec import TrainError

DEFAULT_PROMPTS = (
    "Who are you, and who built you?",
    "Write one sentence about the sea.",
    "你是谁？是谁开发了你？",
    "用一句话介绍一下你自己。",
)
MAX_PROMPTS = 16
MAX_PROMPT_TOKENS = 64
NEW_TOKENS = 32


@dataclass(frozen=True)
class Tolerance:
    """Limits of the comparison."""

    argmax_agreement: float
    """Least share of positions at which both models rank the same token first."""
    mean_difference: float
    """Largest mean |difference| of logits, as a share of their standard deviation."""
    max_difference: float
    """Largest single |difference| of logits, as a share of their standard deviation."""


TOLERANCES = {
    "bf16": Tolerance(0.9, 0.05, 1.0),
    "fp16": Tolerance(0.9, 0.05, 1.0),
    "fp32": Tolerance(0.98, 0.001, 0.02),
}


def read_prompts(path: Path) -> list[str]:
    """A JSON list of texts, or of objects with `user` and, if wanted, `system`. Raises TrainError, naming the file."""
    try:
        if regular_size(path) > MAX_JSON_BYTES:
            raise TrainError(f"{path}: is too large for a list of prompts")
        items = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise TrainError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise TrainError(f"{path}: is not valid JSON: {e}") from e
    if not isinstance(items, list):
        raise TrainError(f"{path}: expected a JSON list of prompts")
    return [_prompt_text(path, number, item) for number, item in enumerate(items, 1)]


def _prompt_text(path: Path, number: int, item: Any) -> str:
    user, system = (item.get("user"), item.get("system")) if isinstance(item, dict) else (item, None)
    if not isinstance(user, str) or not user or not isinstance(system, str | None):
        raise TrainError(f"{path}: prompt {number} is neither a text nor an object with user (and system)")
    # In front of the question, since some chat templates refuse a system turn; here only the tokens matter.
    return f"{system}\n\n{user}" if system else user


def prove(
    base: Path, adapter: Path, merged: Path, prompts: list[str], dtype: str, device: str, trust_remote_code: bool
) -> dict[str, Any]:
    """Compare `merged` with `base` + `adapter`, both loaded the normal way in `dtype` (bf16, fp16, fp32).

    The first MAX_PROMPTS prompts count. `failures` of the result is empty when every limit is kept. Raises TrainError
    when a model cannot be loaded.
    """
    import torch

    where = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    with torch.inference_mode():
        prompts_T = _tokenise(base, prompts[:MAX_PROMPTS], trust_remote_code)
        model: Any = _load(base, dtype, where, trust_remote_code)
        model = _with_adapter(model, adapter)
        texts_T = [_continue(model, ids_T) for ids_T in prompts_T]
        expected_TV = [_logits(model, ids_T) for ids_T in texts_T]
        with model.disable_adapter():
            without_TV = [_logits(model, ids_T) for ids_T in texts_T]
        effect = _compare(expected_TV, without_TV)
        del model, without_TV
        gc.collect()
        model = _load(merged, dtype, where, trust_remote_code)
        found = _compare(expected_TV, [_logits(model, ids_T) for ids_T in texts_T])
        greedy = _greedy_agreement(prompts_T, texts_T, [_continue(model, ids_T) for ids_T in prompts_T])
    return _judge(found, effect, greedy, dtype, [len(ids_T) for ids_T in texts_T]) | {"device": str(where)}


def _tokenise(base: Path, prompts: list[str], trust_remote_code: bool) -> list[Any]:
    """Token ids of each prompt, through the chat template when there is one, cut to MAX_PROMPT_TOKENS."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = _loaded(base, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    ids = []
    for prompt in prompts:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            tokens = tokenizer(prompt)["input_ids"]
        if tokens:
            # The end is kept: it holds the question and the turn's opening.
            ids.append(torch.tensor(tokens[-MAX_PROMPT_TOKENS:]))
    return ids


def _load(folder: Path, dtype: str, device: Any, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    load = AutoModelForCausalLM.from_pretrained
    return _loaded(folder, load, dtype=kind, trust_remote_code=trust_remote_code).to(device).eval()


def _loaded(folder: Path, load: Any, **options: Any) -> Any:
    try:
        return load(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, ImportError) as e:
        raise TrainError(
            f"{folder} cannot be loaded for the comparison: {e}",
            "Give --trust-remote-code if the model brings its own code and you trust it, or --no-proof.",
        ) from e


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()


def _continue(model: Any, ids_T: Any) -> Any:
    """The prompt with up to NEW_TOKENS greedy tokens behind it. Settings that the model brings are not used."""
    from transformers import GenerationConfig

    end = model.generation_config.eos_token_id
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    ids_BT = ids_T[None].to(model.device)
    return model.generate(input_ids=ids_BT, attention_mask=ids_BT.new_ones(ids_BT.shape), generation_config=greedy)[0].cpu()


def _logits(model: Any, ids_T: Any) -> Any:
    """Logits (T, V) on the CPU, in the model's own dtype: half the memory of fp32."""
    return model(input_ids=ids_T[None].to(model.device), use_cache=False).logits[0].cpu()


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart over all positions."""

    maximum: float
    mean: float
    standard_deviation: float
    """Of the expected logits over the vocabulary, averaged over positions: the scale of the two above."""
    argmax_agreement: float


def _compare(expected_TV: list[Any], found_TV: list[Any]) -> Difference:
    import torch

    maximum, total, spread, agree, positions = 0.0, 0.0, 0.0, 0, 0
    for expected, found in zip(expected_TV, found_TV, strict=True):
        gap_TV = (expected.float() - found.float()).abs()
        # Not max(): it would drop a NaN, and every comparison with the limits would then hold.
        maximum = float(torch.maximum(torch.tensor(maximum), gap_TV.max()))
        total += float(gap_TV.mean(dim=-1).sum())
        spread += float(expected.float().std(dim=-1).sum())
        agree += int((expected.argmax(dim=-1) == found.argmax(dim=-1)).sum())
        positions += len(expected)
    return Difference(maximum, total / positions, spread / positions, agree / positions)


def _greedy_agreement(prompts_T: list[Any], expected_T: list[Any], found_T: list[Any]) -> float:
    """Share of the generated tokens that are equal up to the first one that differs, over all prompts."""
    same = total = 0
    for prompt, expected, found in zip(prompts_T, expected_T, found_T, strict=True):
        pairs = list(zip(expected[len(prompt) :].tolist(), found[len(prompt) :].tolist(), strict=False))
        same += next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(expected) - len(prompt)
    return same / max(1, total)
