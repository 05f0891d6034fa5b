"""Where a LoRA adapter of mixture-of-experts weights finds them in a model folder. No torch.

In memory the experts of a layer are one tensor (experts, out, in), which PEFT adapts as a parameter (`target_parameters`).
Model folders mostly keep each expert's matrices apart, and gate and up projection, which are one in memory, as two
(transformers: conversion_mapping.py, "mixtral" and "qwen2_moe").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .spec import TrainError
from .tensor_header import TensorEntry

STORED_IN_OUT = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")
"""model_type of the models whose joined experts are (experts, in, out); all others store (experts, out, in)."""
REGISTERED = ("gate_up_proj", "down_proj")
"""In the order of the model's code, by which PEFT nests the adapters of one module: the first is innermost."""
SEPARATE = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Names of an expert's matrices in a folder, in the order in which they are joined: Qwen's and DeepSeek's, Mixtral's."""


@dataclass(frozen=True)
class Place:
    """One matrix of the folder, and the part of the adapter that belongs to it."""

    weight: str
    matrix: int
    """Which matrix of a weight of three dimensions."""
    expert: int
    num_experts: int
    rows: tuple[int, int] | None
    """Rows of the expert's update; None means all."""
    transposed: bool


def expert_places(
    module: str,
    parameter: str,
    lora_a: tuple[int, ...],
    lora_b: tuple[int, ...],
    rank: int,
    base: Mapping[str, TensorEntry],
    model_type: str,
) -> list[Place]:
    """Every matrix that the adapter of `parameter` of `module` changes.

    `lora_a` (experts x rank, in) and `lora_b` (out, rank x experts) are shapes. Raises TrainError when the base has no such
    experts, or another number of them.
    """
    if len(lora_a) != 2 or len(lora_b) != 2 or lora_a[0] % rank or lora_a[0] != lora_b[1]:
        raise TrainError(f"lora_A {list(lora_a)} and lora_B {list(lora_b)} are not of rank {rank}, as the config says")
    num_experts = lora_a[0] // rank
    joined = f"{module}.{parameter}"
    if joined in base:
        return _joined(joined, num_experts, (lora_b[0], lora_a[1]), base[joined].shape, model_type)
    for names in SEPARATE.get(parameter, ()):
        for folder in dict.fromkeys((module, module.replace(".mlp.", ".block_sparse_moe."))):
            if f"{folder}.0.{names[0]}.weight" in base:
                return _separate(folder, names, num_experts, base)
    raise TrainError(f"the base has no {joined}, and no experts {module}.0.*")


def adapted_parameter(module: str, depth: int, parameters: list[str]) -> str:
    """Which of target_parameters an adapter of `module` belongs to, around which stand `depth` others. Raises TrainError."""
    named = [(parameter.rpartition(".")[0], parameter.rpartition(".")[2]) for parameter in parameters]
    here = list(dict.fromkeys(name for owner, name in named if not owner or f".{module}".endswith(f".{owner}")))
    unknown = [name for name in here if name not in REGISTERED]
    if len(here) == 1 and depth == 0:
        return here[0]
    if unknown or depth >= len(here):
        raise TrainError(f"target_parameters {', '.join(parameters)}: which of them is adapted here is not known")
    return [name for name in REGISTERED if name in here][len(here) - 1 - depth]


def _joined(
    weight: str, num_experts: int, update: tuple[int, int], shape: tuple[int, ...], model_type: str
) -> list[Place]:
    if len(shape) == 2 and num_experts == 1:
        return [Place(weight, 0, 0, 1, None, transposed=False)]
    if len(shape) != 3 or shape[0] != num_experts:
        raise TrainError(f"{weight} of the base is {list(shape)}, the adapter has {num_experts} experts")
    is_square = shape[1] == shape[2]
    transposed = model_type in STORED_IN_OUT if is_square else shape[1:] != update
    return [Place(weight, n, n, num_experts, None, transposed) for n in range(num_experts)]


def _separate(folder: str, names: tuple[str, ...], num_experts: int, base: Mapping[str, TensorEntry]) -> list[Place]:
    places = []
    for expert in range(num_experts):
        at = 0
        for name in names:
            weight = f"{folder}.{expert}.{name}.weight"
            if weight not in base:
                raise TrainError(f"the base has no {weight}, the adapter has {num_experts} experts")
            end = at + base[weight].shape[0]
            places.append(Place(weight, 0, expert, num_experts, (at, end), transposed=False))
            at = end
    if f"{folder}.{num_experts}.{names[0]}.weight" in base:
        raise TrainError(f"the base has more experts than the {num_experts} of the adapter")
    return places
