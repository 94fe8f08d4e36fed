"""The alignment loss against scipy and its own definition."""

from __future__ import annotations

import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from fl_lightning.split.alignment import Alignment, alignment_loss


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 5), (2, 5, 2, 3)])
def test_loss_is_the_kullback_leibler_divergence(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    private, server = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = [z.movedim(1, -1) if len(shape) == 4 else z for z in (private, server)]
    q, p = (softmax(z.reshape(-1, z.shape[-1]).numpy(), axis=1) for z in rows)
    divergences = entropy(p, q, axis=1)
    assert alignment_loss(private, server).item() == pytest.approx(divergences.mean(), rel=1e-5)
    summed = alignment_loss(private, server, "sum_tokens").item()
    assert summed == pytest.approx(divergences.sum() / shape[0], rel=1e-5)


def test_padding_does_not_count() -> None:
    private, server = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    padded = [torch.cat([torch.zeros(1, 5, 4), z], 1) for z in (private, server)]
    for reduction in ("per_token", "sum_tokens"):
        torch.testing.assert_close(alignment_loss(*padded, reduction), alignment_loss(private, server, reduction))
    assert alignment_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)) == 0


def test_gradient_pulls_the_private_top_and_leaves_the_server() -> None:
    private, server = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    alignment_loss(private, server).backward()
    assert server.grad is None
    expected = (private.softmax(-1) - server.softmax(-1)).detach() / 6
    torch.testing.assert_close(private.grad, expected)


def test_saturated_softmax_stays_finite() -> None:
    private = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = alignment_loss(private, torch.tensor([[0.0, 200.0]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(private.grad).all()


def test_settings_are_checked() -> None:
    assert Alignment(weight=0.0).place is None
    assert Alignment(weight=0.1, at="client").place == "client"
    for arguments, sentence in [
        ({"weight": -1.0}, "must be at least 0, got -1"),
        ({"at": "edge"}, "at must be one of server, client, got 'edge'"),
        ({"kl_reduction": "mean"}, "kl_reduction must be one of per_token, sum_tokens, got 'mean'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Alignment(**arguments)
    with pytest.raises(ValueError, match="the private top gave"):
        alignment_loss(torch.zeros(1, 2), torch.zeros(1, 3))
