"""Rules of radii beside ASA's own: other signals, controls, the teacher's distance to its boundary.

    python infoard.py --asa distance --lam-hi 2
    python infoard.py --asa mine.py:rule           your own, with the arguments of these here

rule(t, y, *, threat, lam, ...) -> Threat of [B], as infoard.teacher_margin. Its attribute needs
says what it asks a training for: "t", logits of the teacher on x; "s", those of the student in
eval mode; "teacher", the net itself and x. Without this attribute it gets t.

    student, gap       instance_strength by the student's margin, by KL(T(x)||S(x))
    uniform            control: the mean radius, and the mean number of steps, for all
    shuffled           control: the same radii, dealt out at random
    distance           eps_i = clip(d_i, lam_lo eps, lam_hi eps),   alpha_i = alpha eps_i/eps,
                       d_i = m(x_i)/|grad_x m(x_i)|_1,   m = margin(T(x), y), of logits
    distance_mean, distance_shuffled    its controls

d is the L-infinity distance to the boundary of a linear model. An image that the teacher cannot
hold farther out is attacked no farther.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

import infoard as I

# ==== 1. By rank ==================================================================================


def student(t, y: Tensor, *, s=None, generator=None, **how) -> I.Threat:
    """By the margin p_y - max_{k != y} p_k of the student's logits s [B,K] on x."""
    I.require(s is not None, "asa='student' needs logits of the student on x: s=s")
    return I.instance_strength(I.margin(I.as_float32(s).softmax(1), y), **how)


def gap(t, y: Tensor, *, s=None, generator=None, **how) -> I.Threat:
    """By KL(T(x)||S(x)), of logits t and s [B,K]."""
    I.require(t is not None, "asa='gap' needs logits of the teacher: t")
    I.require(s is not None, "asa='gap' needs logits of the student on x: s=s")
    return I.instance_strength(I.kl(t, s), **how)


def shuffled(t, y: Tensor, *, generator=None, **how) -> I.Threat:
    """Control: the same radii for instances chosen at random."""
    signal = torch.rand(len(y), generator=generator).to(y.device, non_blocking=True)
    return I.instance_strength(signal, **how)


def uniform(t, y: Tensor, *, threat: I.Threat, lam, steps_lo=0, generator=None) -> I.Threat:
    """Control of equal mean and cost: eps (lam_lo + lam_hi)/2 for all; steps differ by one."""
    batch, (low, high) = len(y), lam
    signal = torch.zeros(batch, device=y.device)
    scale = low + (high - low) * torch.full_like(signal, 0.5)
    found = I.instance_strength(signal, threat=threat, lam=lam, steps_lo=steps_lo)
    found = replace(found, eps=threat.eps * scale, alpha=threat.alpha * scale)
    if found.counts is None:
        return found
    total = sum(found.counts)  # attack steps of all instances together
    by_rank = [(total + i) // batch for i in range(batch)]
    counts = I.active_counts(by_rank)
    rank = torch.arange(batch, device=y.device)
    return replace(found, steps=sum(rank >= batch - n for n in counts), counts=counts)


student.needs = ("s",)
gap.needs = ("t", "s")
shuffled.needs = ()
uniform.needs = ()

# ==== 2. By the teacher's distance to its boundary ================================================


def boundary_distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """d = m/|grad_x m|_1 [B] in pixel units; negative where the model is wrong.

    One pass and one gradient. x [B,C,H,W] in [0,1], y [B].
    """
    z = x.detach().requires_grad_()
    with torch.enable_grad(), I.frozen_eval(model):
        lead = I.margin(I.as_float32(model(z)), y)
        (grad,) = torch.autograd.grad(lead.sum(), z)
    return lead.detach() / grad.flatten(1).norm(1, dim=1).clamp(min=1e-12)


def clipped(d: Tensor, threat: I.Threat, lam: tuple[float, float]) -> I.Threat:
    """eps_i = clip(d_i, lam_lo eps, lam_hi eps), alpha_i = alpha eps_i/eps, both [B]."""
    eps = d.clamp(lam[0] * threat.eps, lam[1] * threat.eps)
    base = threat.eps
    if isinstance(base, Tensor):  # a radius for each image
        base = base.clamp(min=1e-12)
    else:
        base = max(base, 1e-12)
    return replace(threat, eps=eps, alpha=threat.alpha * eps / base)


def asked_distance(y: Tensor, distance, teacher, x, steps_lo: int) -> Tensor:
    """The distance [B] that was given, or else that of the teacher on x."""
    told = "this rule of radii needs distance=boundary_distance(teacher, x, y), and no steps_lo"
    I.require(not steps_lo and (distance is not None or teacher is not None), told)
    return boundary_distance(teacher, x, y) if distance is None else distance


def distance(
    t,
    y: Tensor,
    *,
    threat: I.Threat,
    lam,
    distance=None,
    teacher=None,
    x=None,
    steps_lo=0,
    **others,
) -> I.Threat:
    """By the teacher's distance [B] to its boundary on x."""
    return clipped(asked_distance(y, distance, teacher, x, steps_lo), threat, lam)


def distance_shuffled(t, y: Tensor, *, generator=None, **how) -> I.Threat:
    """Control: the same radii, dealt out at random."""
    found = distance(t, y, **how)
    order = torch.randperm(len(y), generator=generator).to(y.device)
    return replace(found, eps=found.eps[order], alpha=found.alpha[order])


def distance_mean(t, y: Tensor, **how) -> I.Threat:
    """Control: the mean of these radii for all."""
    found = distance(t, y, **how)
    means = {name: getattr(found, name).mean().expand(len(y)) for name in ("eps", "alpha")}
    return replace(found, **means)


distance.needs = ("teacher",)
distance_shuffled.needs = ("teacher",)
distance_mean.needs = ("teacher",)
