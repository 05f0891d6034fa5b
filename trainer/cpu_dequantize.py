"""bitsandbytes' 4-bit weights on CPU, with the right scale for every block.

Its AVX-512 kernel (0.50.2, csrc/cpu_ops.cpp) looks for a block's scale by row and column. Where a row is not a whole
number of blocks, that is another block's scale: a layer with 176 inputs and blocks of 64 would compute with wrong weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch


@functools.cache
def install() -> torch.library.Library:
    """Give that kernel whole blocks as rows, in this process. Calling it again changes nothing."""
    import bitsandbytes  # noqa: F401  # registers the kernel

    own = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def dequantize(
        packed: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return own.call_boxed(keys, packed, absmax, blocksize, quant_type, rows_of(shape, blocksize), dtype).view(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", dequantize, "CPU", allow_override=True)
    return library


def rows_of(shape: Sequence[int], blocksize: int) -> tuple[int, ...]:
    """A shape of as many elements whose rows are whole numbers of blocks; one row where there is none."""
    if shape[-1] % blocksize == 0:
        return tuple(shape)
    count = math.prod(shape)
    return (count // blocksize, blocksize) if count % blocksize == 0 else (1, count)
