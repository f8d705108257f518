"""Radii by the teacher's own distance to its boundary, in the place of ASA's rank rule.

    python infoard.py --asa distance --lam-hi 2

    eps_i = clip(d_i, lam_lo eps, lam_hi eps),   alpha_i = alpha eps_i/eps,
    d_i = m(x_i)/|grad_x m(x_i)|_1,   m = margin(T(x), y), of logits

d is the L-infinity distance to the boundary of a linear model. An image that the teacher cannot
hold farther out is attacked no farther. distance_mean and distance_shuffled are controls: the same
radii in the mean for all, and dealt out at random.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

import infoard as I


def boundary_distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """d = m/|grad_x m|_1 [B] in pixel units; negative where the model is wrong.

    One pass and one gradient. x [B,C,H,W] in [0,1], y [B].
    """
    z = x.detach().requires_grad_()
    with torch.enable_grad(), I.frozen_eval(model):
        lead = I.margin(I.as_float32(model(z)), y)
        (grad,) = torch.autograd.grad(lead.sum(), z)
    return lead.detach() / grad.flatten(1).norm(1, dim=1).clamp(min=1e-12)


def distance(d: Tensor, *, threat: I.Threat, lam=(1.0, 2.0), generator=None) -> I.Threat:
    """eps_i = clip(d_i, lam_lo eps, lam_hi eps), alpha_i = alpha eps_i/eps, both [B]."""
    eps = d.clamp(lam[0] * threat.eps, lam[1] * threat.eps)
    return replace(threat, eps=eps, alpha=threat.alpha * eps / max(threat.eps, 1e-12))


def distance_shuffled(d: Tensor, *, generator=None, **how) -> I.Threat:
    """The control: the same radii, dealt out at random."""
    order = torch.randperm(len(d), generator=generator)
    return distance(d[order.to(d.device)], **how)


def distance_mean(d: Tensor, *, generator=None, **how) -> I.Threat:
    """The control: the mean of these radii for all."""
    found = distance(d, **how)
    means = {name: getattr(found, name).mean().expand(len(d)) for name in ("eps", "alpha")}
    return replace(found, **means)
