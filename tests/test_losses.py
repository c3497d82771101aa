"""The loss of margins against torch's cross-entropy, and at its ends."""

import pytest
import torch
import torch.nn.functional as F

from evocert.bounds import logit_margins
from evocert.losses import cross_entropy_of_margins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_exact_margins_is_the_cross_entropy(dtype):
    logits = 8 * torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    labels = torch.arange(7) % 4
    found = cross_entropy_of_margins(logit_margins(logits, labels))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.repeat(5), reduction="none").reshape(5, 7)
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_is_finite_with_its_gradient_at_the_ends():
    margins = torch.tensor([[-1e4, 3.0], [1e4, 1e4], [0.0, 0.0]], requires_grad=True)
    losses = cross_entropy_of_margins(margins)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([1e4, 0.0, 1.0986123]))
    torch.testing.assert_close(margins.grad, torch.tensor([[-1.0, 0], [0, 0], [-1 / 3, -1 / 3]]))
