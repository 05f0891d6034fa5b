"""A single file of torch.save with the weights of a model: XTuner's `iter_N.pth`, `pytorch_model.bin`, FSDP's full state.

XTuner 0.1 (mmengine) keeps them under "state_dict", beside message_hub and meta, whose objects nobody needs; meta["cfg"] is the
training config as text. The adapter of a LoRA or QLoRA run is named as PEFT names it, with `llm.` in front.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from .foreign import ForeignCheckpoint, Given, Known, common_dtype, describe, home_of, program_of, step_in_name
from .spec import TrainError
from .tensor_header import FLOAT_DTYPES
from .torch_archive import ArchiveTensor, read_archive

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
NESTED = ("state_dict", "model", "module", "model_state_dict")
"""Keys under which programs keep the weights."""


def read(path: Path, given: Given) -> ForeignCheckpoint:
    """Describe the weights in the file. Raises TrainError."""
    if re.search(r"-\d+-of-\d+", path.name):
        raise TrainError(f"{path} is one file of several", "Save the model whole, or as safetensors.")
    content = read_archive(path)
    tensors = _weights(content, path)
    broken = next((name for name, tensor in tensors.items() if not tensor.is_contiguous), None)
    if broken is not None:
        raise TrainError(f"{path}: {broken} is a view that is not contiguous", "Save it again as .contiguous().")
    meta = content.get("meta") if isinstance(content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    number = meta.get("iter")
    return describe(
        {name: [(0, tensor, 0, tensor.numel)] for name, tensor in tensors.items()},
        {name: tensor.shape for name, tensor in tensors.items()},
        common_dtype(tensors.values()),
        Known(given, home_of(path.parent), program_of(content)),
        step=number if type(number) is int and number > 0 else step_in_name(path),
    )


def _weights(content: Any, path: Path) -> dict[str, ArchiveTensor]:
    found = content
    for _ in range(2):
        nested = (
            next((found[k] for k in NESTED if isinstance(found.get(k), dict)), None)
            if isinstance(found, dict)
            else None
        )
        found = found if nested is None else nested
    tensors = (
        {str(name): t for name, t in found.items() if isinstance(t, ArchiveTensor) and t.dtype in FLOAT_DTYPES}
        if isinstance(found, dict)
        else {}
    )
    tensors = {name: tensor for name, tensor in tensors.items() if math.prod(tensor.shape) > 0}
    if not tensors:
        raise TrainError(
            f"{path}: holds no weights", f"Expected a dictionary of tensors, or one under {', '.join(NESTED)}."
        )
    return tensors
