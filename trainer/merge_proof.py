"""Is the merged model the base with its adapter? Both answer the same prompts, and their logits are compared.

Shapes: T tokens of one text, V vocabulary. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import MAX_JSON_BYTES, regular_size
from .model_folder import stored_tensors
from .nf4 import Nf4
from .spec import TrainError

DEFAULT_PROMPTS = (
    "Who are you, and who built you?",
    "Write one sentence about the sea.",
    "你是谁？是谁开发了你？",
    "用一句话介绍一下你自己。",
)
MAX_PROMPTS = 16
MAX_PROMPT_TOKENS = 64
NEW_TOKENS = 64


@dataclass(frozen=True)
class Limits:
    """A merge fails when its mean |difference| of logits exceeds BOTH: then it is neither noise nor a faithful sum."""

    of_spread: float
    """Share of the logits' standard deviation."""
    of_effect: float
    """Share of the adapter's own effect: the mean |difference| between the base with and without it."""


# Measured on SmolLM2-135M (bf16 weights, rank 8 to 64, 1 to 24 steps). A weight of the base lies on bf16's grid, so an
# update below half a step of that grid is rounded away: a correct bf16 merge differs by 0.02 to 0.09 of the spread and
# by 0.02 (well trained) to 0.9 (one step, no visible effect) of the adapter's effect, and PEFT's own merge gives the
# same bits. A merge that was left out differs by exactly the effect. In fp32 a correct merge differs by 0.000004 of the
# spread, one of 210 updates left out by 0.007. Agreement of the first-ranked token (0.90 to 1.00 for a correct bf16
# merge) is reported but not judged: it is lower for a correct merge of a short training than for a scale wrong by 10 %
# of a long one.
LIMITS = {"bf16": Limits(0.05, 0.5), "fp16": Limits(0.02, 0.25), "fp32": Limits(0.0001, 0.001)}
HALF_ARITHMETIC = Limits(0.1, 0.5)
"""When memory allows only bf16 or fp16 arithmetic: its own noise is 0.05 of the spread."""
LOSS_WORTH_A_NOTE = 0.05


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


@dataclass(frozen=True)
class Subject:
    """What is compared: `merged`, whose weights are in `dtype` (bf16, fp16, fp32), with `base` + `adapters`."""

    base: Path
    adapters: tuple[tuple[Path, float], ...]
    """Folders, each with its weight."""
    merged: Path
    dtype: str
    vocab_size: int | None = None
    """Rows of the embeddings that an adapter brings, when they are not as many as the base has."""
    nf4: Nf4 | None = None
    """How the adapter's base was quantised when it was trained; None when it was not, or nobody knows."""
    merged_on_nf4: bool = False
    """The merged weights were summed on what NF4 gives back, not on the base as it is."""


def prove(subject: Subject, prompts: list[str], device: str, trust_remote_code: bool) -> dict[str, Any]:
    """Compare the merged model with base + adapters as PEFT runs them.

    The first MAX_PROMPTS prompts count. `failures` of the result is empty when the limits are kept. Both sides compute
    in fp32 where memory allows, so that only the rounding of the weights is seen. Raises TrainError when a model cannot
    be loaded.
    """
    import torch

    where = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    dtype = subject.dtype
    arithmetic = "fp32" if dtype == "fp32" or _fits_as_fp32(subject.merged, where) else dtype
    loading = _Loading(subject, arithmetic, where, trust_remote_code)
    with torch.inference_mode():
        prompts_T = _tokenise(subject.merged, prompts[:MAX_PROMPTS], trust_remote_code)
        model: Any = _load(subject.merged, arithmetic, where, trust_remote_code)
        texts_T = _continue(model, prompts_T)
        merged_TV = [_logits(model, ids_T) for ids_T in texts_T]
        del model
        gc.collect()
        model = loading.adapted(nf4=subject.merged_on_nf4)
        expected_TV = [_logits(model, ids_T) for ids_T in texts_T]
        with model.disable_adapter():
            effect = _compare(expected_TV, (_logits(model, ids_T) for ids_T in texts_T))
        del model
        gc.collect()
        found = _compare(expected_TV, merged_TV)
        greedy = _greedy_agreement(prompts_T, texts_T, expected_TV)
        bases = _nearer_base(loading, texts_T, expected_TV, merged_TV) if subject.nf4 is not None else None
    limits = LIMITS[dtype] if arithmetic == "fp32" else HALF_ARITHMETIC
    setting = {"device": str(where), "arithmetic": arithmetic, "prompts": prompts[:MAX_PROMPTS]}
    proof = setting | _judge(found, effect, greedy, dtype, limits)
    if bases is not None:
        proof["bases"] = bases
        proof["notes"] += _note_on(bases)
    return proof


def _nearer_base(loading: _Loading, texts_T: list[Any], expected_TV: list[Any], merged_TV: list[Any]) -> dict[str, Any]:
    """How far a merge on the base as it is, and one on what NF4 gives back, are from what was trained: NF4 + adapter.

    One of the two is the merged model itself. The other is summed and rounded in memory.
    """
    from .model import DTYPES

    subject = loading.subject
    if subject.merged_on_nf4:
        trained_TV = expected_TV
        other = loading.adapted(nf4=False)
    else:
        other = loading.adapted(nf4=True)
        trained_TV = [_logits(other, ids_T) for ids_T in texts_T]
    other = other.merge_and_unload()
    kind = DTYPES[subject.dtype]
    for parameter in other.parameters():
        parameter.data = parameter.data.to(kind).to(parameter.dtype)
    own = _compare(trained_TV, merged_TV)
    another = _compare(trained_TV, (_logits(other, ids_T) for ids_T in texts_T))
    names = ("nf4", "bf16") if subject.merged_on_nf4 else ("bf16", "nf4")
    distances = {names[0]: own.mean, names[1]: another.mean}
    return {
        "merged_on": names[0],
        "mean_difference_from_training": distances,
        "argmax_agreement_with_training": {names[0]: own.argmax_agreement, names[1]: another.argmax_agreement},
        "nearer": min(distances, key=lambda name: distances[name]),
    }


def _note_on(bases: dict[str, Any]) -> list[str]:
    nearer, merged_on, distances = bases["nearer"], bases["merged_on"], bases["mean_difference_from_training"]
    if nearer == merged_on:
        return []
    return [
        f"QLoRA trained on NF4 weights. Merged on {merged_on} weights, the logits are {distances[merged_on]:.2g} from those of "
        f"training, on {nearer} {distances[nearer]:.2g}: --base-precision {nearer} merges there"
    ]


def _judge(found: Difference, effect: Difference, greedy: float, dtype: str, limits: Limits) -> dict[str, Any]:
    of_spread = found.mean / found.standard_deviation
    of_effect = found.mean / effect.mean if effect.mean else 0.0
    failures, notes = [], []
    # Written so that NaN fails.
    if not (of_spread <= limits.of_spread or of_effect <= limits.of_effect):
        failures.append(
            f"mean difference of the logits {found.mean:.4g} = {of_spread:.2%} of their standard deviation "
            f"(limit {limits.of_spread:.2%}) and {of_effect:.0%} of the adapter's effect (limit {limits.of_effect:.0%})"
        )
    elif of_effect > LOSS_WORTH_A_NOTE:
        notes.append(
            f"rounding the weights to {dtype} lost {of_effect:.0%} of the adapter's effect, since small updates vanish in "
            "it; --dtype fp32 keeps them, and so does serving base + adapter"
        )
    return {
        "num_positions": found.num_positions,
        "max_difference": found.maximum,
        "mean_difference": found.mean,
        "logit_standard_deviation": found.standard_deviation,
        "argmax_agreement": found.argmax_agreement,
        "greedy_agreement": greedy,
        "adapter_effect": {"max": effect.maximum, "mean": effect.mean, "argmax_agreement": effect.argmax_agreement},
        "mean_difference_of_effect": of_effect,
        "limits": {
            "mean_difference_of_standard_deviation": limits.of_spread,
            "mean_difference_of_effect": limits.of_effect,
        },
        "failures": failures,
        "notes": notes,
        "summary": f"logits differ by {found.mean:.2g} on average ({found.maximum:.2g} at most; standard deviation "
        f"{found.standard_deviation:.3g}), same first token at {found.argmax_agreement:.1%} of {found.num_positions} positions",
    }


def _fits_as_fp32(folder: Path, device: Any) -> bool:
    """Whether the weights in fp32, and a third more for everything else, fit into the free memory."""
    import torch

    needed = sum(tensor.entry.numel for tensor in stored_tensors(folder).values()) * 4 * 4 / 3
    if device.type == "cuda":
        return needed < torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return needed < next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


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


@dataclass(frozen=True)
class _Loading:
    """How models are loaded for the comparison."""

    subject: Subject
    arithmetic: str
    device: Any
    trust_remote_code: bool

    def adapted(self, nf4: bool) -> Any:
        """The base, or what NF4 makes of it, with the adapters as PEFT runs them."""
        from peft import PeftModel

        subject = self.subject
        model = _load(subject.base, self.arithmetic, self.device, self.trust_remote_code)
        if nf4:
            assert subject.nf4 is not None
            subject.nf4.apply(model)
        if subject.vocab_size is not None:
            model.resize_token_embeddings(subject.vocab_size, mean_resizing=False)
        (first, weight), *others = subject.adapters
        adapted: Any = PeftModel.from_pretrained(model, str(first))
        for number, (folder, _) in enumerate(others, 1):
            adapted.load_adapter(str(folder), f"adapter_{number}")
        weights = {"default": weight} | {f"adapter_{n}": w for n, (_, w) in enumerate(others, 1)}
        if others:
            adapted.base_model.set_adapter(list(weights))
        for module in adapted.modules():
            for name, factor in weights.items():
                # Attention modules of transformers have a number of that name.
                if factor != 1 and isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                    module.scaling[name] *= factor
        return adapted.eval()


def _load(folder: Path, dtype: str, device: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from . import wide_products
    from .model import DTYPES

    wide_products.install()
    config: Any = _loaded(folder, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        # The weights were found to be floats: this would only quantise them while they are loaded.
        del config.quantization_config
    load = AutoModelForCausalLM.from_pretrained
    return (
        _loaded(folder, load, config=config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code).to(device).eval()
    )


def _loaded(folder: Path, load: Any, **options: Any) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return load(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, StrictDataclassError) as e:
        raise TrainError(
            f"{folder} cannot be loaded for the comparison: {e}",
            "Give --trust-remote-code if the model brings its own code and you trust it, or --no-proof.",
        ) from e


def _continue(model: Any, prompts_T: list[Any]) -> list[Any]:
    """Each prompt with up to NEW_TOKENS greedy tokens behind it. Settings that the model brings are not used."""
    import torch
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    # Padded in front, so that all prompts take their next token together.
    width = max(len(ids_T) for ids_T in prompts_T)
    padding = [width - len(ids_T) for ids_T in prompts_T]
    ids_BT = torch.stack([torch.nn.functional.pad(ids, (n, 0)) for ids, n in zip(prompts_T, padding, strict=True)])
    mask_BT = torch.stack([(torch.arange(width) >= n).long() for n in padding])
    out_BT = model.generate(
        input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=greedy
    ).cpu()
    texts_T = []
    for row_T, n in zip(out_BT, padding, strict=True):
        new = row_T[width:].tolist()
        length = next((at + 1 for at, token in enumerate(new) if token in ends), len(new))
        texts_T.append(row_T[n : width + length])
    return texts_T


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
    num_positions: int


def _compare(expected_TV: Iterable[Any], found_TV: Iterable[Any]) -> Difference:
    """Logits of the same texts, one text (T, V) after another: generators keep only one of them in memory."""
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
    return Difference(maximum, total / positions, spread / positions, agree / positions, positions)


def _greedy_agreement(prompts_T: list[Any], texts_T: list[Any], logits_TV: list[Any]) -> float:
    """Share of the generated tokens that another model would have taken too, up to the first that it would not.

    Until then both have read the same tokens, so its logits of the finished text (one pass) say what it would take.
    """
    same = total = 0
    for prompt_T, text_T, logits in zip(prompts_T, texts_T, logits_TV, strict=True):
        at = len(prompt_T)
        equal = (logits[at - 1 : -1].argmax(dim=-1) == text_T[at:].cpu()).tolist()
        same += next((n for n, is_equal in enumerate(equal) if not is_equal), len(equal))
        total += len(equal)
    return same / max(1, total)
