"""Matrix products of 16-bit tensors on a CPU that has no 16-bit instructions: in fp32, and rounded once at the end.

torch multiplies bf16 matrices with a plain loop there: on AMD's Zen 3 8 times slower than fp32 in the forward direction,
70 times in the backward one. The fp32 product of the same values gives the same numbers: every product of two bf16 or
fp16 values is exact in fp32, and both ways add up in fp32. The fp32 copies live as long as one product.

Shapes: M rows, K inner size, N columns.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

NARROW = (torch.bfloat16, torch.float16)
FEW_ROWS = 8
"""Below this many rows times a transposed matrix (a linear layer on one new token) torch's loop beats the copy."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@functools.cache
def install() -> torch.library.Library | None:
    """Replace torch's kernels of products and attention, in this process, for the dtypes that this CPU has no instructions for.

    Tensors of other dtypes, and of other devices, reach the replaced kernels as before. Calling it again changes nothing.
    """
    return replaced(slow_dtypes()) if slow_dtypes() else None


@functools.cache
def slow_dtypes() -> tuple[torch.dtype, ...]:
    """16-bit dtypes that oneDNN, and so torch, has no products for on this CPU.

    It has those of bf16 with AVX-512, AVX2-VNNI-2 or Arm's bf16 extension, those of fp16 with AVX512-FP16 or AMX-FP16.
    """
    bf16, fp16 = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return tuple(dtype for dtype, has in zip(NARROW, (bf16, fp16), strict=True) if not has)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or its fp32 copy where its products would be made in fp32 anyway: several then share one copy."""
    return tensor.float() if tensor.device.type == "cpu" and tensor.dtype in slow_dtypes() else tensor


def replaced(dtypes: tuple[torch.dtype, ...] = NARROW) -> torch.library.Library:
    """The kernels for tensors of `dtypes`, in force as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name in PRODUCTS:
            _replace(library, dtypes, name, name, _rounded)
            _replace(library, dtypes, f"{name}.out", name, _into_out)
            if name in ("addmm", "baddbmm"):
                _replace(library, dtypes, f"{name}_", name, _into_first)
        for name in (ATTENTION, f"{ATTENTION}_backward"):
            _replace(library, dtypes, name, name, _rounded)
    return library


Kernel = Callable[..., Any]
Finish = Callable[[Kernel, torch.dtype, tuple[Any, ...], dict[str, Any]], Any]


def _replace(
    library: torch.library.Library, dtypes: tuple[torch.dtype, ...], overload: str, functional: str, finish: Finish
) -> None:
    """`overload` of tensors of `dtypes` becomes `functional` of fp32 copies, whose result `finish` hands over."""
    own, wide = _kernel(overload), _kernel(functional)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        narrow = next(a.dtype for a in args if isinstance(a, torch.Tensor))
        if narrow not in dtypes or _is_quicker_narrow(args):
            return own(*args, **kwargs)
        return finish(wide, narrow, args, kwargs)

    library.impl(overload, kernel, "CPU", allow_override=True)


def _kernel(overload: str) -> Kernel:
    """torch's own kernel, also after it has been replaced."""
    found = torch.library.get_kernel(f"aten::{overload}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return functools.partial(found.call_boxed, keys)


def _is_quicker_narrow(args: tuple[Any, ...]) -> bool:
    right_KN = args[1]
    return len(args) == 2 and right_KN.dim() == 2 and len(args[0]) < FEW_ROWS and right_KN.stride(0) == 1


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in NARROW else value


def _rounded(wide: Kernel, narrow: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every fp32 result as `narrow`, but for the log-sum-exp (H, T) of attention, which is fp32 in torch too."""
    found = wide(*map(_float, args), **{name: _float(value) for name, value in kwargs.items()})
    if isinstance(found, torch.Tensor):
        return found.to(narrow)
    return tuple(part.to(narrow) if part.dim() == args[0].dim() else part for part in found)


def _into_first(wide: Kernel, narrow: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0].copy_(_rounded(wide, narrow, args, kwargs))


def _into_out(wide: Kernel, narrow: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    out = kwargs.pop("out")
    found = _rounded(wide, narrow, args, kwargs)
    return out.resize_(found.shape).copy_(found)
