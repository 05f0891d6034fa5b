"""16-bit products by way of fp32: the fp32 result, rounded once; everything else as torch does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from trainer import wide_products

PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "mm": lambda c, a, b: a @ b,
    "linear with bias": lambda c, a, b: F.linear(a, b.t(), c[0]),
    "few rows": lambda c, a, b: a[:3] @ b.t().contiguous().t(),
    "addmm": lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=0.25),
    "addmm_": lambda c, a, b: c.clone().addmm_(a, b, alpha=0.25),
    "bmm": lambda c, a, b: torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1)),
    "baddbmm": lambda c, a, b: torch.baddbmm(c.new_full((1,), torch.nan), a[None], b[None], beta=0, alpha=3),
    "baddbmm_": lambda c, a, b: c[None].clone().baddbmm_(a[None], b[None]),
    "mm.out": lambda c, a, b: torch.mm(a, b, out=c.new_empty(0)),
    "addmm.out": lambda c, a, b: torch.addmm(c, a, b, out=torch.empty_like(c)),
    "bmm.out": lambda c, a, b: torch.bmm(a[None], b[None], out=c.new_empty(1, *c.shape)),
    "baddbmm.out": lambda c, a, b: torch.baddbmm(c[None], a[None], b[None], out=c.new_empty(1, *c.shape)),
}


@pytest.fixture
def replaced() -> Iterator[None]:
    """The replacement, whatever this machine's CPU can do; undone afterwards."""
    library = wide_products.replaced()
    yield
    library._destroy()


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """c (20, 24), a (20, 16), b (16, 24)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in ((20, 24), (20, 16), (16, 24)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_fp32_rounded_once(replaced: None, name: str, dtype: torch.dtype) -> None:
    tensors = operands(dtype)
    found, expected = PRODUCTS[name](*tensors), PRODUCTS[name](*(t.float() for t in tensors)).to(dtype)
    assert found.dtype == dtype
    # torch's own loop, which few rows are left to, adds up in another order.
    torch.testing.assert_close(found, expected, rtol=0.01 if name == "few rows" else 0, atol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_fp32_is_left_alone(name: str) -> None:
    before = PRODUCTS[name](*operands(torch.float32))
    library = wide_products.replaced()
    try:
        assert PRODUCTS[name](*operands(torch.float32)).equal(before)
    finally:
        library._destroy()
    assert PRODUCTS[name](*operands(torch.float32)).equal(before)


def test_gradients_of_a_layer_are_those_of_fp32_rounded(replaced: None) -> None:
    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        c, a, b = (t.to(dtype).requires_grad_() for t in operands(torch.bfloat16))
        F.linear(a, b.t(), c[0]).backward(torch.ones(20, 24, dtype=dtype))
        return [t.grad.bfloat16() for t in (a, b)]

    for found, expected in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert found.equal(expected)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_fp32_rounded(replaced: None, causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 2, 40, 16, generator=generator).bfloat16() for _ in range(4)]

    def attend(dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, grad = (t.to(dtype, copy=True) for t in inputs)
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out.backward(grad)
        return [out.detach(), *(t.grad for t in (q, k, v))]

    out, *gradients = attend(torch.bfloat16)
    expected_out, *expected = attend(torch.float32)
    assert out.dtype == torch.bfloat16
    assert out.equal(expected_out.bfloat16())
    for found, wanted in zip(gradients, expected, strict=True):
        # The backward pass starts from an output that has been rounded already.
        torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


def test_only_the_dtypes_asked_for_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    original = wide_products._rounded

    def noted(wide: object, narrow: torch.dtype, *rest: object) -> object:
        taken.append(narrow)
        return original(wide, narrow, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(wide_products, "_rounded", noted)
    library = wide_products.replaced((torch.float16,))
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.mm(*operands(dtype)[1:])
    finally:
        library._destroy()
    assert taken == [torch.float16]


def test_it_is_installed_for_what_the_cpu_lacks() -> None:
    assert (wide_products.install() is not None) == bool(wide_products.slow_dtypes())
    for dtype in wide_products.NARROW:
        a = torch.randn(64, 64).to(dtype)
        assert wide_products.widened(a).dtype == (torch.float32 if dtype in wide_products.slow_dtypes() else dtype)
        torch.testing.assert_close(a @ a, (a.float() @ a.float()).to(dtype), rtol=0.02, atol=0.2)
