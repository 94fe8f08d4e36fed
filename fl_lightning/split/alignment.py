"""Keeps a client's private top near the server's copies of the same blocks, by a loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fl_lightning.checks import at_least, one_of

REDUCTIONS = ("per_token", "sum_tokens")


def alignment_loss(private: Tensor, server: Tensor, reduction: str = "per_token") -> Tensor:
    r"""Return :math:`\mathrm{KL}(\mathrm{softmax}(Z') \,\|\, \mathrm{softmax}(Z))`, softmax over the hidden dimension.

    Yuan et al., Flexible Personalized Split Federated Learning for On-Device Fine-Tuning of Foundation Models,
    2025, https://arxiv.org/abs/2508.10349. The formula is read from the authors' code; where that adds 1e-10 to a
    softmax before the logarithm, this takes ``log_softmax``. No gradient flows into ``server``.

    Args:
        private: Output of the client's private top, ``(N, T, D)``, where a row of zeros on both sides is padding;
            ``(N, D)`` counts as one token, and a feature map ``(N, D, H, W)`` as one token a pixel.
        server: Output of the server's copies on the same input, of the same shape.
        reduction: ``"per_token"`` is the mean over the tokens of all examples, padding not counted; ``"sum_tokens"``
            sums over the tokens and is the mean over examples, as the authors' code has it, so that it grows with the
            length of the sequence.
    """
    if private.shape != server.shape:
        raise ValueError(f"the private top gave {tuple(private.shape)}, but the server's copy {tuple(server.shape)}.")
    one_of("reduction", reduction, REDUCTIONS)
    hidden = 1 if private.ndim == 4 else -1
    target = server.detach().float().log_softmax(hidden)
    total = F.kl_div(private.float().log_softmax(hidden), target, reduction="sum", log_target=True)
    if reduction == "sum_tokens":
        return total / private.shape[0]
    if private.ndim == 3:
        real = (private.detach().ne(0) | server.detach().ne(0)).any(-1)
        return total / real.sum().clamp(min=1)
    return total / (private.numel() // private.shape[hidden])


class Alignment(nn.Module):
    """The settings of the alignment, checked once.

    Args:
        weight: λ, at least 0. At 0 nothing is aligned, computed or sent.
        at: ``"server"``: the base's output goes up with the cut's activation, and the server adds the gradient to its
            last message. ``"client"``: the server's copy comes down instead. The update is the same; the first keeps
            the server's activations private.
        kl_reduction: See `alignment_loss`.
    """

    def __init__(self, weight: float = 0.25, at: str = "server", kl_reduction: str = "per_token") -> None:
        super().__init__()
        at_least("weight", weight, 0)
        one_of("at", at, ("server", "client"))
        one_of("kl_reduction", kl_reduction, REDUCTIONS)
        self.weight, self.at, self.kl_reduction = weight, at, kl_reduction

    @property
    def place(self) -> str | None:
        """Where it is computed, or ``None`` when it is off."""
        return self.at if self.weight > 0 else None

    def forward(self, private: Tensor, server: Tensor) -> Tensor:
        """Return the weighted loss."""
        return self.weight * alignment_loss(private, server, self.kl_reduction)
