"""4-bit weights come back as code x scale of their own block, whatever the width of a row."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

from trainer import cpu_dequantize


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(8, 128), (8, 176), (48, 16), (5, 48), (3, 33)])
def test_every_block_has_its_own_scale(shape: tuple[int, int], nested: bool) -> None:
    cpu_dequantize.install()
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    # Blocks of very different size: another one's scale would be far off.
    weight = (rows.view(-1) * torch.linspace(0.01, 3, rows.numel())).view(shape)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1)[: weight.numel()].long()
    scales = absmax.repeat_interleave(64)[: weight.numel()]
    assert dequantize_4bit(packed, state).equal((state.code[codes] * scales).view(shape))


@pytest.mark.parametrize(
    ("shape", "expected"), [((8, 128), (8, 128)), ((8, 176), (22, 64)), ((5, 48), (1, 240)), ((2, 4, 96), (12, 64))]
)
def test_rows_are_whole_blocks(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert cpu_dequantize.rows_of(shape, 64) == expected
