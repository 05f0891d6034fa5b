"""The chunked loss equals the plain one, value and gradients, for every head that models bring."""

import pytest
import torch
import torch.nn.functional as F

from trainer.loss import CHUNK, IGNORE, supervised_loss_sum, supervised_losses

# B batch, T row length, D hidden size, V vocabulary
T, D, V = CHUNK * 2 + 37, 16, 101


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (1, T), generator=generator)
    labels[torch.rand(1, T, generator=generator) < 0.3] = IGNORE
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels, scale, softcap):
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)])
def test_value_and_gradients_equal_the_plain_loss(use_bias: bool, scale: float, softcap: float | None) -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    leaves = [hidden, weight, *([bias] if use_bias else [])]
    expected = plain(hidden, weight, bias if use_bias else None, labels, scale, softcap)
    expected_grads = torch.autograd.grad(expected * 0.37, leaves)
    loss = supervised_loss_sum(hidden, labels, weight, bias if use_bias else None, scale, softcap)
    grads = torch.autograd.grad(loss * 0.37, leaves)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    weight = weight.detach()
    supervised_loss_sum(hidden, labels, weight).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_row_without_labels_gives_zero_loss_and_zero_gradient() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    loss = supervised_loss_sum(hidden, torch.full_like(labels, IGNORE), weight)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_single_losses_are_the_addends_of_the_sum(scale: float, softcap: float | None) -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    losses = supervised_losses(hidden, labels, weight, bias, scale, softcap)
    logits = F.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    expected = F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses, expected[labels.view(-1) != IGNORE], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.sum(), supervised_loss_sum(hidden, labels, weight, bias, scale, softcap))
    assert supervised_losses(hidden, torch.full_like(labels, IGNORE), weight).shape == (0,)
