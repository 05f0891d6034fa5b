"""Loading a base for ZeRO-3: a decoder layer at a time is read, quantised where asked for, and cut into shards.

transformers would read the whole state dict in each process first. Here a process holds its own shard and one layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model_folder import stored_tensors
from .spec import TrainError
from .tensor_files import StoredTensor, TensorFile

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def load_sharded(
    model_dir: str,
    dtype: torch.dtype,
    quantization: Any,
    deepspeed_config: dict[str, Any],
    device: torch.device,
    **options: Any,
) -> Any:
    """The model of `model_dir`, every parameter cut over all ranks. Collective: every rank must call.

    `options` go to `AutoModelForCausalLM.from_config`. Raises TrainError when the folder's tensors have other names
    than the model's parameters.
    """
    import deepspeed
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=options.get("trust_remote_code", False))
    # Buffers are real: rotary frequencies are in no checkpoint.
    with init_empty_weights(include_buffers=False), no_init_weights():
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    quantizer = _quantizer(quantization)
    if quantizer is not None:
        quantizer.preprocess_model(model=base, device_map={"": device}, dtype=dtype)
    tied = set(base.get_expanded_tied_weights_keys(all_submodels=True))
    files = stored_tensors(Path(model_dir))
    _check_names(base, files, tied, model_dir)
    fp32 = {*(base._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        fp32 |= {*(base._keep_in_fp32_modules or ())}
    for prefix, module in _units(base):
        _materialise(prefix, module, files, tied, dtype, fp32, device)
        # A tied weight is still without content: it gets its twin's below.
        if not any(p.is_meta for p in module.parameters()):
            deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config)
    for name, buffer in base.named_buffers():
        if name in files:
            buffer.copy_(_read(files[name], name))
    base.tie_weights()
    if quantizer is not None:
        quantizer.postprocess_model(base)
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return base


def _quantizer(quantization: Any) -> Any:
    if quantization is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    return AutoHfQuantizer.from_config(quantization, pre_quantized=False)


def _units(base: Any) -> list[tuple[str, nn.Module]]:
    """The decoder layers whole, and every other module that holds parameters by itself: (name, module) in order."""
    layers = set(base._no_split_modules or ())
    found: list[tuple[str, nn.Module]] = []
    done: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if done and name.startswith(done):
            continue
        if type(module).__name__ in layers:
            found.append((name, module))
            done = (*done, f"{name}.")
        elif next(module.parameters(recurse=False), None) is not None:
            found.append((name, module))
    return found


def _check_names(base: Any, files: dict[str, StoredTensor], tied: set[str], model_dir: str) -> None:
    missing = [name for name, _ in base.named_parameters() if name not in files and name not in tied]
    if missing:
        raise TrainError(
            f"{model_dir} lacks {len(missing)} parameters under the names of {type(base).__name__}, such as {missing[0]}",
            "This family is converted while it is loaded, which ZeRO-3 cannot do piece by piece: use parallel.zero: 2.",
        )


def _materialise(
    prefix: str,
    module: nn.Module,
    files: dict[str, StoredTensor],
    tied: set[str],
    dtype: torch.dtype,
    fp32: set[str],
    device: torch.device,
) -> None:
    """Put the stored tensors of `module` in the place of its empty parameters."""
    for owner_name, owner in module.named_modules():
        for name, empty in list(owner.named_parameters(recurse=False)):
            full = ".".join(part for part in (prefix, owner_name, name) if part)
            if full in tied or not empty.is_meta:
                continue
            wanted = torch.float32 if any(key in full for key in fp32) else dtype
            value = _read(files[full], full).to(device=device, dtype=wanted)
            setattr(owner, name, _parameter(empty, value))


def _parameter(empty: nn.Parameter, value: torch.Tensor) -> Any:
    settings = dict(vars(empty))
    if "quant_type" in settings:
        # bitsandbytes quantises when the parameter goes to its device.
        return type(empty)(value, requires_grad=False, **settings).to(value.device)
    return nn.Parameter(value, requires_grad=empty.requires_grad)


def _read(stored: StoredTensor, name: str) -> torch.Tensor:
    with TensorFile(stored.path) as file:
        entry = file.entries[name]
        flat = torch.from_numpy(file.read(name))
    return flat.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)
