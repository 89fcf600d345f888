"""The loss of a step against float64."""

import pytest
import torch
from torch.nn import functional as F

from flash_experts.training.loss import CausalLoss, log_probs_at

# What rounding the gradient to the logits' dtype may cost, and the least float32 for the values.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-5, 8e-3)}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_log_probabilities_at_tokens_are_those_of_a_whole_log_softmax(dtype: torch.dtype) -> None:
    """Also where a token is asked for twice, and where a logit is so large that its exponential overflows."""
    torch.manual_seed(0)
    logits = torch.randn(9, 50).mul(4).to(dtype)
    logits[0] += 800
    ids = torch.randint(50, (9, 4))
    ids[:, 3] = ids[:, 0]
    weights = torch.randn(9, 4, dtype=torch.float64)
    ours, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = log_probs_at(ours, ids), reference.log_softmax(-1).gather(1, ids)
    (found * weights.to(found.dtype)).sum().backward()
    (expected * weights).sum().backward()
    values, gradients = BOUNDS[dtype]
    assert found.dtype == torch.promote_types(dtype, torch.float32) and ours.grad.dtype == dtype
    large = 1600 * torch.finfo(found.dtype).eps  # rounding of logits of 800
    torch.testing.assert_close(found.double()[1:], expected[1:], atol=values, rtol=values)
    torch.testing.assert_close(found.double()[0], expected[0], atol=large, rtol=0)
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=gradients, rtol=gradients)
    assert torch.equal(logits, ours.detach()), "the logits themselves are not overwritten"


def test_a_second_backward_through_log_probabilities_is_refused() -> None:
    """The first one overwrites what it needs, so a second would be wrong without a word."""
    logits = torch.randn(3, 7, requires_grad=True)
    total = log_probs_at(logits, torch.zeros(3, 1, dtype=torch.long)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("chunk", [2**20, 22], ids=["whole", "chunks"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_of_the_loss_is_that_of_torchs_cross_entropy(
    chunk: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With positions that have no label, and a factor after the loss."""
    monkeypatch.setattr("flash_experts.training.loss._CHUNK", chunk)
    torch.manual_seed(1)
    logits, labels = torch.randn(1, 7, 11), torch.randint(11, (1, 7))
    labels[0, 2:4] = -100
    ours, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (3 * CausalLoss(smoothing)(ours, labels, 11, 20, shift_labels=labels)).backward()
    expected = F.cross_entropy(reference[0], labels[0], label_smoothing=smoothing, reduction="sum") / 20
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=1e-7, rtol=1e-5)
