"""Further bounds for --mim: regression of the teacher's features, and a control.

    python infoard.py --mim vid
    python infoard.py --mim mine.py:bound             of your own: bound(scores [B,B]) -> a number

[BA] Barber and Agakov 2003; VID, 1904.05835
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infoard as I


class GaussianCritic(nn.Module):
    """scores[i,j] = log q(t_j|s_i)/D: Gaussian with a linear mean, per dimension of the target."""

    def __init__(self, dim_s: int, dim_t: int, dim: int = 0, tau: float = 0.0):  # unused: as Critic
        super().__init__()
        self.mean = nn.Linear(dim_s, dim_t)
        self.log_var = nn.Parameter(torch.zeros(dim_t))

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        t = F.layer_norm(I.pooled(t), t.shape[1:2])  # [B, D], not learned: it could turn constant
        gap = (self.mean(I.pooled(s))[:, None] - t).square()  # [B, B, D]
        log_var = self.log_var.clamp(min=-6)
        return -0.5 * (gap / log_var.exp() + log_var + math.log(2 * math.pi)).mean(2)  # [B, B]


def vid(scores: Tensor, entropy: float = 0.0) -> Tensor:
    """I >= H(Y) + E_p[ log q(y|x) ], f_ij = log q(y_j | x_i) [BA]: no negatives, a normalised q."""
    return entropy + scores.diag().mean()


def unpaired(scores: Tensor) -> Tensor:
    """A control: infonce of pairs that do not belong together, each i with the next j."""
    return I.infonce(scores.roll(1, 1))


vid.critic = GaussianCritic
