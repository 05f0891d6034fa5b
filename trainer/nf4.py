"""The base as QLoRA trained on it: each linear layer rounded to NF4 by bitsandbytes, and back.

An adapter of QLoRA learns against these weights (https://arxiv.org/abs/2305.14314, section 3), not against those in the
model's folder. Which layers are rounded is what transformers decides: every linear layer but the output embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .spec import TrainError

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 64
"""Weights that share a scale; bitsandbytes' own default, which nothing here changes."""


@dataclass(frozen=True)
class Nf4:
    dtype: str
    """bf16 | fp16 | fp32: what the weights were rounded to before NF4, and what NF4 gives back."""
    double_quant: bool
    """The scales are quantised too."""

    def dequantised(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in) of any dtype -> what NF4 makes of it, in `dtype`."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        from . import cpu_dequantize
        from .model import DTYPES

        cpu_dequantize.install()
        packed, state = quantize_4bit(
            weight.to(DTYPES[self.dtype]).contiguous(),
            blocksize=BLOCK_SIZE,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        return dequantize_4bit(packed, state)

    def apply(self, model: Any) -> None:
        """Put NF4's rounding of them in place of a loaded model's linear weights, in the model's own dtype."""
        names = quantised_weights(model)
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.data = self.dequantised(parameter.data).to(parameter.dtype)


def weights_of_folder(folder: Path, trust_remote_code: bool) -> frozenset[str]:
    """Names of the weights that QLoRA quantises in the model of this folder. Raises TrainError when it cannot be built."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, StrictDataclassError) as e:
        raise TrainError(
            f"{folder}: which of its layers are quantised cannot be told: {e}", "Merge with --base-precision bf16."
        ) from e
    return quantised_weights(model)


def quantised_weights(model: Any) -> frozenset[str]:
    """Names of the weights that bitsandbytes quantises when transformers loads this model. Raises TrainError for Conv1D."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            raise TrainError(f"{name} is a Conv1D layer", "Merge with --base-precision bf16.")
        if isinstance(module, torch.nn.Linear) and should_convert_module(name, kept):
            names.add(f"{name}.weight")
    return frozenset(names)
