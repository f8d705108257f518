"""More base frameworks, each with and without InfoARD: akd, iad, adaiad, mtard, igdm, saad.

    python infoard.py --framework iad

An outer loss is a function of logits alone, an inner objective one of images and nets; both can be
pasted anywhere. A step of a few lines says which passes go where, and a Framework what it needs.

    1  losses of logits    2  inner objectives    3  steps    4  frameworks

name     inner max, |x'-x| <= eps  outer min
akd      CE(S(x'),y)               alpha KL(T(x')||S(x')) + (1-alpha) CE(S(x'),y)      [AKD]
iad      CE(S(x'),y)               tau^2 (A KL(T(x)||S(x')) + (1-A) KL(S(x)||S(x')))   [IAD]
adaiad   KL(T(x')||S(x'))          tau^2 KL(T(x')||S(x')) + (1-A) KL(S(x)||S(x'))     [AdaAD]
mtard    CE(S(x'),y)               w KL(T(x')||S(x')) + (1-w) KL(T_nat(x)||S(x))       [MTARD]
igdm     KL(T(x')||S(x'))          KL(T(x')||S(x')) + alpha p G                        [IGDM]
saad     KL(T(x) + l e_y||S(x'))   h (KL(T(x')||S(x')) + alpha p G) + beta r KL(T(x)||S(x))
                                                                                       [SAAD]
A = T_y(x')^beta (1 while p < 0.3); d = x'-x; l = d . grad T_y(x); p: share of training;
G = KL(T(x+d)-T(x-d)||S(x+d)-S(x-d)); h = 5 (H - min H), H: the entropy of T(x'); r = 1 - h/max h

[AKD] 2203.07159   [IAD] 2106.04928   [AdaAD] Huang et al., CVPR 2023   [SAAD] 2512.10275
[MTARD] Zhao et al., ECCV 2022        [IGDM] 2312.03286
"""

from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infoard as I
from companions.own import check_loss

# ==== 1. Losses of logits =========================================================================
# s = S(x), s_adv = S(x'), t = T(x), t_adv = T(x'), t_nat = T_nat(x), all [B,K]; each gives a scalar
# in nats. mean_kl(p, q, tau, weight): the divergence of two logits, I.mean_kl or one divided by K.


def trust_in_teacher(t_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """A = softmax(t_adv)_y^beta, [B]: how far a student follows its teacher on x' [IAD]."""
    return t_adv.softmax(1).gather(1, y[:, None]).squeeze(1) ** beta


def iad_loss(
    s: Tensor | None,
    s_adv: Tensor,
    t: Tensor,
    t_adv: Tensor | None,
    y: Tensor,
    beta: float = 0.1,
    tau: float = 1.0,
    warm_up: bool = False,
    mean_kl: Callable = I.mean_kl,
) -> Tensor:
    """tau^2 (A KL(t||s_adv) + (1-A) KL(s||s_adv)) at temperature tau, A = softmax(t_adv)_y^beta.

    s is not detached. In the warm-up A is 1; s and t_adv may then be None [IAD].
    """
    # differs: released code has no A in its first term, no tau in its second
    if warm_up:
        return mean_kl(t, s_adv, tau)
    trust = trust_in_teacher(t_adv, y, beta)
    guided = mean_kl(t, s_adv, tau, trust)
    return guided + mean_kl(s, s_adv, tau, 1 - trust)


def akd_loss(
    s_adv: Tensor, t_adv: Tensor, y: Tensor, alpha: float = 0.5, mean_kl: Callable = I.mean_kl
) -> Tensor:
    """alpha KL(t_adv||s_adv) + (1-alpha) CE(s_adv,y) [AKD]."""
    return alpha * mean_kl(t_adv, s_adv) + (1 - alpha) * F.cross_entropy(s_adv, y)


def adaiad_loss(
    s: Tensor | None,
    s_adv: Tensor,
    t_adv: Tensor,
    y: Tensor,
    beta: float = 0.1,
    tau: float = 1.0,
    warm_up: bool = False,
    mean_kl: Callable = I.mean_kl,
) -> Tensor:
    """tau^2 KL(t_adv||s_adv) at temperature tau + (1-A) KL(s||s_adv), A = softmax(t_adv)_y^beta.

    In the warm-up the second term is missing; s may then be None [AdaAD].
    """
    guided = mean_kl(t_adv, s_adv, tau)
    if warm_up:
        return guided
    trust = trust_in_teacher(t_adv, y, beta)
    return guided + mean_kl(s, s_adv, weight=1 - trust)


def mtard_weights(losses: Tensor, memory: dict, eta: float) -> Tensor:
    """[w, 1-w] for the losses [adversarial, natural], moved by eta towards the one that lags.

    w <- w + eta (r_adv/(r_adv + r_nat) - w),  r = loss now/loss of the first batch  [MTARD]

    memory keeps "first" and "w" between steps; a sum over ranks makes them the same everywhere.
    """
    now = I.all_reduce_sum(losses.detach()).clamp(min=1e-12)
    if "first" not in memory:
        memory["first"] = now
        memory["w"] = torch.full_like(now, 0.5)
    ratio = now / memory["first"]
    memory["w"] = memory["w"] + eta * (ratio / ratio.sum() - memory["w"])
    return memory["w"]


def igdm_loss(
    s_adv: Tensor,
    t_adv: Tensor,
    s_slope: Tensor,
    t_slope: Tensor,
    weight: float,
    mean_kl: Callable = I.mean_kl,
) -> Tensor:
    """KL(t_adv||s_adv) + weight KL(t_slope||s_slope), weight = alpha p [IGDM].

    s_slope, t_slope: logits on x+d less those on x-d.
    """
    pull = weight * mean_kl(t_slope, s_slope)
    return mean_kl(t_adv, s_adv) + pull


def saad_weights(t_adv: Tensor) -> tuple[Tensor, Tensor]:
    """(h, r), each [B]: h = 5 (H - min H), H the entropies of t_adv; r = 1 - h/max h [SAAD].

    The least and the largest are those of all ranks.
    """
    entropy = torch.special.entr(t_adv.softmax(1)).sum(1)
    unsure = 5 * (entropy - I.gathered(entropy).min())
    largest = I.gathered(unsure).max()
    return unsure, 1 - unsure / largest.clamp(min=1e-8)


def saad_loss(
    s: Tensor | None,
    s_adv: Tensor,
    t: Tensor | None,
    t_adv: Tensor,
    s_slope: Tensor,
    t_slope: Tensor,
    weight: float,
    beta: float = 0.0,
    mean_kl: Callable = I.mean_kl,
) -> Tensor:
    """h (KL(t_adv||s_adv) + weight KL(t_slope||s_slope)) + beta r KL(t||s); h, r: saad_weights.

    With beta = 0, s and t may be None [SAAD].
    """
    unsure, rest = saad_weights(t_adv)
    pull = weight * mean_kl(t_slope, s_slope, weight=unsure)
    loss = mean_kl(t_adv, s_adv, weight=unsure) + pull
    if beta:
        loss = loss + beta * mean_kl(t, s, weight=rest)
    return loss


# ==== 2. Inner objectives =========================================================================


def linear_teacher_objective(
    student: Callable, teacher: nn.Module, x: Tensor, y: Tensor, t: Tensor
) -> Callable:
    """KL(t + l e_y||S(x')) for pgd, with one pass through the teacher for the whole attack [SAAD].

    l = (x'-x) . grad T_y(x) raises the true class's logit in t = T(x) [B,K] as a linear teacher
    would; e_y: one-hot labels.
    """
    true_class = F.one_hot(y, t.shape[1])  # [B, K]
    start = x.detach().requires_grad_()
    with torch.enable_grad(), I.frozen_eval(teacher):
        true_logits = I.as_float32(teacher(start)) * true_class
        (slope,) = torch.autograd.grad(true_logits.sum(), start)  # grad T_y(x), [B, C, H, W]

    def objective(z: Tensor, rows=I.ALL) -> Tensor:
        rise = ((z - x[rows]) * slope[rows]).flatten(1).sum(1, keepdim=True)  # l, [B, 1]
        return I.kl(t[rows] + rise * true_class[rows], student(z))

    return objective


# ==== 3. Steps ====================================================================================
# The order of the student's passes is that in which batch norm sees them.


def slopes(step: I.Step) -> tuple[Tensor, Tensor]:
    """S(x+d) - S(x-d) and T(x+d) - T(x-d), d = x'-x; x - d is not clipped, as published."""
    x_minus = 2 * step.x - step.x_adv
    t_slope = step.t_adv - I.predict(step.teacher, x_minus)
    s_adv = step.s_adv  # before S(x-d)
    s_slope = s_adv - I.as_float32(step.student(x_minus))
    return s_slope, t_slope


def iad(step: I.Step) -> Tensor:
    """IAD-I: the student trusts itself where the teacher is unsure of x'."""
    # differs: released code attacks in train mode
    step.attack(I.ce_objective(step.student, step.y))
    warm_up = step.progress < 0.3  # epoch 60 of 200
    s_adv = step.s_adv  # before S(x)
    return iad_loss(
        None if warm_up else step.s,  # no pass that counts for nothing: batch norm would see it
        s_adv,
        step.t,
        None if warm_up else step.t_adv,
        step.y,
        step.cfg.beta,
        step.cfg.temperature,
        warm_up,
        step.mean_kl,
    )


def akd(step: I.Step) -> Tensor:
    """AKD: AT with the teacher's label of x' mixed in; the attack asks the student alone."""
    # differs: the released weight was not in reach; half of each
    step.attack(I.ce_objective(step.student, step.y))
    return akd_loss(step.s_adv, step.t_adv, step.y, step.cfg.alpha, step.mean_kl)


def adaiad(step: I.Step) -> Tensor:
    """AdaIAD: AdaAD whose student trusts itself where the teacher is unsure of x'."""
    # differs: tau 1, released code 30; KL there is a mean over classes too in the second term
    step.attack(I.teacher_student_objective(step.student, step.teacher), init="normal")
    warm_up = step.progress < 0.3  # epoch 60 of 200
    s_adv = step.s_adv  # before S(x)
    s = None if warm_up else step.s  # no pass that counts for nothing: batch norm would see it
    options = {"beta": step.cfg.beta, "tau": step.cfg.temperature, "warm_up": warm_up}
    return adaiad_loss(s, s_adv, step.t_adv, step.y, mean_kl=step.mean_kl, **options)


def mtard(step: I.Step) -> Tensor:
    """MTARD: a robust teacher on x', a natural one on x; w favours the one that lags behind."""
    # differs: released code divides KL by K; eta falls with lr, here under cosine too
    step.attack(I.ce_objective(step.student, step.y), init="normal")
    adversarial = step.mean_kl(step.t_adv, step.s_adv)
    natural = step.mean_kl(step.t_nat, step.s)
    losses = torch.stack([adversarial, natural])
    eta = 0.025 * step.cfg.lr_at(step.progress) / (step.cfg.lr or 1)
    return (mtard_weights(losses, step.memory, eta) * losses).sum()


def igdm(step: I.Step) -> Tensor:
    """IGDM on AdaAD: the student's slope follows the teacher's, more so as training goes on."""
    # differs: p grows with each step, not with each epoch
    step.attack(I.teacher_student_objective(step.student, step.teacher), init="normal")
    weight = step.cfg.alpha * step.progress
    s_slope, t_slope = slopes(step)
    return igdm_loss(step.s_adv, step.t_adv, s_slope, t_slope, weight, step.mean_kl)


def saad(step: I.Step) -> Tensor:
    """SAAD: a linear teacher in the attack; samples weighted by the teacher's entropy on x'."""
    # differs: its weight average is left to --ema; released code always passes x too (batch norm)
    objective = linear_teacher_objective(step.student, step.teacher, step.x, step.y, step.t)
    step.attack(objective, init="normal")
    s_slope, t_slope = slopes(step)
    return saad_loss(
        step.s if step.cfg.beta else None,
        step.s_adv,
        step.t,
        step.t_adv,
        s_slope,
        t_slope,
        weight=step.cfg.alpha * step.progress,
        beta=step.cfg.beta,
        mean_kl=step.mean_kl,
    )


# ==== 4. Frameworks ===============================================================================

IAD = I.Framework(iad, needs=("teacher",), defaults={"beta": 0.1, "temperature": 1.0})
AKD = I.Framework(akd, needs=("teacher",), defaults={"alpha": 0.5}, static=True)
ADAIAD = I.Framework(
    adaiad, needs=("teacher",), defaults={"beta": 0.1, "temperature": 1.0, "lam_hi": 2.0}
)
MTARD = I.Framework(mtard, needs=("teacher", "teacher_nat"))
IGDM = I.Framework(igdm, needs=("teacher",), defaults={"alpha": 1.0, "lam_hi": 2.0}, static=True)
SAAD = I.Framework(saad, needs=("teacher",), defaults={"alpha": 1.0, "beta": 0.0}, static=True)


# ==== 5. What frameworks of anyone's own say ======================================================


def check_framework(framework: I.Framework) -> None:
    """One line for what a Framework says wrong of itself."""
    known = [f.name for f in fields(I.Config)]
    check_loss(framework.loss)
    nets = isinstance(framework.needs, tuple) and {*framework.needs} <= {"teacher", "teacher_nat"}
    I.require(nets, f"needs must be a tuple such as ('teacher',), not {framework.needs!r}")
    strange = ", ".join(name for name in framework.defaults if name not in known)
    I.require(not strange, f"defaults are those of Config, options are your own: {strange}")
    for name, option in framework.options.items():
        pair = isinstance(option, tuple) and len(option) == 2
        I.require(pair, f"an option is a pair (default, help), not {name}: {option!r}")
        I.require(name not in known, f"an option of your own cannot be called {name}")
