"""More base frameworks, each with and without InfoARD: akd, iad, adaiad, mtard, bmtard, igdm, saad,
absld for the worst class, and adr, adr_trades, which need no teacher.

    python infoard.py --framework iad

An outer loss is a function of logits alone, an inner objective one of images and nets; both can be
pasted anywhere. A step of a few lines says which passes go where, and a Framework what it needs.

    1  losses of logits    2  inner objectives    3  steps    4  frameworks

name     inner max, |x'-x| <= eps  outer min
akd      CE(S(x'),y)               alpha KL(T(x')||S(x')) + (1-alpha) CE(S(x'),y)      [AKD]
iad      CE(S(x'),y)               tau^2 (A KL(T(x)||S(x')) + (1-A) KL(S(x)||S(x')))   [IAD]
adaiad   KL(T(x')||S(x'))          tau^2 KL(T(x')||S(x')) + (1-A) KL(S(x)||S(x'))     [AdaAD]
mtard    CE(S(x'),y)               w KL(T(x')||S(x')) + (1-w) KL(T_nat(x)||S(x))       [MTARD]
bmtard   CE(S(x'),y)               the same with T(x')/a, T_nat(x)/c                   [B-MTARD]
absld    KL(T(x)/a_y||S(x'))       alpha KL(T(x)/a_y||S(x')) + (1-alpha) KL(T(x)/c_y||S(x))
                                                                                       [ABSLD]
igdm     KL(T(x')||S(x'))          KL(T(x')||S(x')) + alpha p G                        [IGDM]
saad     KL(T(x) + l e_y||S(x'))   h (KL(T(x')||S(x')) + alpha p G) + beta r KL(T(x)||S(x))
                                                                                       [SAAD]
adr      CE(S(x'),q)               CE(S(x'),q)                                         [ADR]
adr_trades  KL(S(x)||S(x'))        CE(S(x),q) + beta KL(S(x)||S(x'))                   [ADR]
A = T_y(x')^beta (1 while p < 0.3); d = x'-x; l = d . grad T_y(x); p: share of training;
G = KL(T(x+d)-T(x-d)||S(x+d)-S(x-d)); h = 5 (H - min H), H: the entropy of T(x'); r = 1 - h/max h;
a, c: temperatures that adapt, of a teacher or, a_y and c_y, of a class; q: label of an average of S

[AKD] 2203.07159   [IAD] 2106.04928   [AdaAD] Huang et al., CVPR 2023   [SAAD] 2512.10275
[ADR] 2305.12118   [ABSLD] 2312.05508   [MTARD] Zhao et al., ECCV 2022   [IGDM] 2312.03286
[B-MTARD] Zhao et al., TPAMI 2024
"""

import math
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


def balanced_temperatures(tau: Tensor, entropies: Tensor, rate: float) -> Tensor:
    """Temperatures [2] of two teachers, moved by rate so that the surer one becomes less sure.

        tau_i <- clip(tau_i - rate sign(H_i/H_j - 1), 1, 10)     [B-MTARD]

    entropies H [2] in nats: of their labels at these temperatures.
    """
    less_sure = torch.sign(entropies - entropies.flip(0))
    return (tau - rate * less_sure).clamp(1, 10)


def class_temperatures(tau: Tensor, losses: Tensor, rate: float) -> Tensor:
    """Temperatures of K classes after an epoch; that of a class with a large loss falls.

        tau_k <- clip(tau_k - rate (l_k - mean l)/max |l - mean l|, 0.5, 5)     [ABSLD]

    tau, losses: [...,K]; a factor that all losses share does not count.
    """
    gap = losses - losses.mean(-1, keepdim=True)
    largest = gap.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (tau - rate * gap / largest).clamp(0.5, 5)


def absld_loss(
    s: Tensor,
    s_adv: Tensor,
    t: Tensor,
    tau_adv: Tensor,
    tau_nat: Tensor,
    alpha: float = 5 / 6,
    mean_kl: Callable = I.mean_kl,
) -> Tensor:
    """alpha KL(t/tau_adv||s_adv) + (1-alpha) KL(t/tau_nat||s) [ABSLD].

    tau_adv, tau_nat [B]: temperatures of each sample's class; the student's is 1.
    """
    adversarial = mean_kl(t / tau_adv[:, None], s_adv)
    return alpha * adversarial + (1 - alpha) * mean_kl(t / tau_nat[:, None], s)


def adr_label(z: Tensor, y: Tensor, weight: float, tau: float) -> Tensor:
    """The label of an average's logits z, drawn to the truth where that is wrong: [B,K].

    q_i = w_i p_i + (1-w_i) e_y,  p = softmax(z/tau),
    w_i = clip(weight - (max_k p_ik - p_iy), 0, 1)     [ADR]
    """
    p = (z / tau).softmax(1)
    lead = p.amax(1, keepdim=True) - p.gather(1, y[:, None])  # 0 where the average is right
    own = (weight - lead).clamp(0, 1)
    truth = torch.zeros_like(p).scatter(1, y[:, None], 1.0)
    return own * p + (1 - own) * truth


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
    entropy = torch.special.entr(I.as_float32(t_adv).softmax(1)).sum(1)
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


def slowed(step: I.Step, rate: float) -> float:
    """A rate that falls as the learning rate does."""
    return rate * step.cfg.lr_at(step.progress) / (step.cfg.lr or 1)


def annealed(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def epochs_behind(progress: float, epochs: int) -> int:
    """How many epochs are over after a share of training, which is rounded."""
    return int(progress * epochs + 1e-9)


def slopes(
    student: Callable,
    teacher: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    s_adv: Tensor,
    t_adv: Tensor,
) -> tuple[Tensor, Tensor]:
    """S(x+d) - S(x-d) and T(x+d) - T(x-d), d = x'-x, both [B,K] [IGDM].

    s_adv, t_adv: logits on x' = x+d. One more pass of each net; x-d is not clipped, as published.
    """
    x_minus = 2 * x - x_adv
    t_slope = t_adv - I.predict(teacher, x_minus)
    s_slope = s_adv - I.as_float32(student(x_minus))
    return s_slope, t_slope


def slopes_of(step: I.Step) -> tuple[Tensor, Tensor]:
    """slopes() of a step, on the passes that it has."""
    t_adv, s_adv = step.t_adv, step.s_adv  # before S(x-d)
    return slopes(step.student, step.teacher, step.x, step.x_adv, s_adv, t_adv)


def iad(step: I.Step) -> Tensor:
    """IAD-I: the student trusts itself where the teacher is unsure of x'."""
    # differs: released code attacks in train mode, passes x' and x once more each (batch norm) and
    # loses its second lr drop
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
    # differs: the published weight was not in reach; half of each
    step.attack(I.ce_objective(step.student, step.y))
    return akd_loss(step.s_adv, step.t_adv, step.y, step.cfg.alpha, step.mean_kl)


def adaiad(step: I.Step) -> Tensor:
    """AdaIAD: AdaAD whose student trusts itself where the teacher is unsure of x'."""
    # differs: tau 1, released code 30, which also passes x twice more (batch norm)
    step.attack(I.teacher_student_objective(step.student, step.teacher), init="normal")
    warm_up = step.progress < 0.3  # epoch 60 of 200
    s_adv = step.s_adv  # before S(x)
    s = None if warm_up else step.s  # no pass that counts for nothing: batch norm would see it
    options = {"beta": step.cfg.beta, "tau": step.cfg.temperature, "warm_up": warm_up}
    return adaiad_loss(s, s_adv, step.t_adv, step.y, mean_kl=step.mean_kl, **options)


def two_teachers(
    step: I.Step, tau_adv: float | Tensor = 1.0, tau_nat: float | Tensor = 1.0
) -> Tensor:
    """MTARD's attack and loss, with a temperature for each teacher."""
    step.attack(I.ce_objective(step.student, step.y), init="normal")
    adversarial = step.mean_kl(step.t_adv / tau_adv, step.s_adv)
    natural = step.mean_kl(step.t_nat / tau_nat, step.s)
    losses = torch.stack([adversarial, natural])
    return (mtard_weights(losses, step.memory, slowed(step, 0.025)) * losses).sum()


def mtard(step: I.Step) -> Tensor:
    """MTARD: a robust teacher on x', a natural one on x; w favours the one that lags behind."""
    # differs: released code divides KL by 10 always; eta falls with lr, here under cosine too
    return two_teachers(step)


def bmtard(step: I.Step) -> Tensor:
    """B-MTARD: MTARD whose teachers become equally sure, by temperatures that both start from 1."""
    # differs: as mtard
    tau = step.memory.get("tau", step.t_nat.new_ones(2))
    loss = two_teachers(step, *tau)
    logits = torch.stack([step.t_adv, step.t_nat]) / tau[:, None, None]
    entropies = torch.special.entr(logits.softmax(-1)).sum(-1).mean(1)
    rate = slowed(step, step.cfg.own["temperature_rate"])
    step.memory["tau"] = balanced_temperatures(tau, I.all_reduce_sum(entropies), rate)
    return loss


def temperatures_of_classes(step: I.Step) -> Tensor:
    """ABSLD's temperatures in this epoch, [2,K]: for labels of x' and of x.

    The first step of an epoch moves them, by what was noted in the one before.
    """
    memory, k = step.memory, step.t.shape[1]
    if "tau" not in memory:
        memory.update(tau=step.t.new_ones(2, k), noted=step.t.new_zeros(3, k))
        memory["epoch"] = step.t.new_zeros(())
    over = epochs_behind(step.progress, step.cfg.epochs)
    begins = memory["epoch"] < over  # a tensor: no number is read from the device
    losses = memory["noted"][:2] / memory["noted"][2].clamp(min=1)
    rate = slowed(step, step.cfg.own["temperature_rate"])
    moved = class_temperatures(memory["tau"], losses, rate)
    memory["tau"] = torch.where(begins, moved, memory["tau"])
    memory["noted"] = memory["noted"] * ~begins
    memory["epoch"] = memory["epoch"].clamp(min=over)
    return memory["tau"]


def note_losses(step: I.Step) -> None:
    """Adds CE on x', CE on x and the number of samples of each class to memory["noted"] [3,K]."""
    with torch.no_grad():
        on_adv = F.cross_entropy(step.s_adv, step.y, reduction="none")
        on_clean = F.cross_entropy(step.s, step.y, reduction="none")
        each = torch.stack([on_adv, on_clean, torch.ones_like(on_adv)])  # [3, B]
        of_class = torch.zeros_like(step.t).scatter(1, step.y[:, None], 1.0)  # [B, K]
        sums = (each[:, :, None] * of_class).sum(1)
    step.memory["noted"] = step.memory["noted"] + I.all_reduce_sum(sums)


def absld(step: I.Step) -> Tensor:
    """ABSLD: RSLAD with sharper labels for classes that lag behind, softer ones for the others."""
    # differs: l_k is a mean over the class, in released code a sum (the same where classes are
    # even). There a shared tensor divides both labels by both temperatures, KL is divided by K,
    # `best` is chosen on test images, and the first save fails
    tau_adv, tau_nat = temperatures_of_classes(step)[:, step.y]
    step.attack(I.kl_objective(step.student, step.t / tau_adv[:, None]), init="normal")
    s_adv = step.s_adv  # before S(x)
    loss = absld_loss(step.s, s_adv, step.t, tau_adv, tau_nat, step.cfg.alpha, step.mean_kl)
    note_losses(step)
    return loss


def average_logits(step: I.Step, decay: float) -> Tensor:
    """Logits on x of an average of the student over all steps before, [B,K].

    average <- decay average + (1-decay) student, statistics of batch norm too. The memory keeps it,
    so that a checkpoint is larger by one net.
    """
    net = getattr(step.student, "_orig_mod", step.student)  # not what torch.compile has made of it
    average = {}
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point():
                kept = step.memory.get(f"average.{name}")
                kept = value.detach().clone() if kept is None else kept.lerp_(value, 1 - decay)
                step.memory[f"average.{name}"] = average[name] = kept
        with I.frozen_eval(net):
            return I.as_float32(torch.func.functional_call(net, average, (step.x,)))


def annealed_label(step: I.Step) -> Tensor:
    """ADR's label of x, [B,K]: more of the average's, and a sharper one, as training goes on."""
    own = step.cfg.own
    weight = annealed(own["adr_weight_lo"], own["adr_weight_hi"], step.progress)
    tau = annealed(own["adr_tau_hi"], own["adr_tau_lo"], step.progress)
    return adr_label(average_logits(step, own["adr_decay"]), step.y, weight, tau)


def adr(step: I.Step) -> Tensor:
    """ADR on AT: the label is that of the student's own average; no teacher."""
    # differs: released code attacks in train mode
    label = annealed_label(step)
    step.attack(I.ce_objective(step.student, label))
    return F.cross_entropy(step.s_adv, label)


def adr_trades(step: I.Step) -> Tensor:
    """ADR on TRADES."""
    # differs: released code attacks in train mode, passes x and x' as one batch (batch norm)
    label = annealed_label(step)
    step.attack(I.kl_objective(step.student, I.predict(step.student, step.x)), init="normal")
    return I.trades_loss(step.s, step.s_adv, label, step.cfg.beta, step.mean_kl)


def igdm(step: I.Step) -> Tensor:
    """IGDM on AdaAD: the student's slope follows the teacher's, more so as training goes on."""
    # differs: p grows with each step, not with each epoch; released code passes x too (batch norm)
    step.attack(I.teacher_student_objective(step.student, step.teacher), init="normal")
    weight = step.cfg.alpha * step.progress
    s_slope, t_slope = slopes_of(step)
    return igdm_loss(step.s_adv, step.t_adv, s_slope, t_slope, weight, step.mean_kl)


def saad(step: I.Step) -> Tensor:
    """SAAD: a linear teacher in the attack; samples weighted by the teacher's entropy on x'."""
    # differs: its weight average is left to --ema; released code always passes x too (batch norm)
    objective = linear_teacher_objective(step.student, step.teacher, step.x, step.y, step.t)
    step.attack(objective, init="normal")
    s_slope, t_slope = slopes_of(step)
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

OF_ADR = {  # those of ResNet-18 on CIFAR-10; others stand in recipes.py
    "adr_decay": (0.995, "decay of the average, in each step"),
    "adr_weight_lo": (0.7, "weight of its label at the start of training"),
    "adr_weight_hi": (0.95, "and at the end"),
    "adr_tau_lo": (2.0, "temperature of its label at the end of training"),
    "adr_tau_hi": (2.5, "and at the start"),
}


def settle_temperatures(cfg: I.Config) -> I.Config:
    """The settings as they are, or one line that says which cannot be."""
    rate = cfg.own["temperature_rate"]
    I.require(rate >= 0, f"--temperature-rate must lie in [0, inf], got {rate}")
    return cfg


def settle_adr(cfg: I.Config) -> I.Config:
    """The same for ADR."""
    for name in ("adr_decay", "adr_weight_lo", "adr_weight_hi"):
        value = cfg.own[name]
        I.require(0 <= value <= 1, f"{I.flag_of(name)} must lie in [0, 1], got {value}")
    for name in ("adr_tau_lo", "adr_tau_hi"):
        value = cfg.own[name]
        I.require(value > 0, f"{I.flag_of(name)} must be above 0, got {value}")
    return cfg


IAD = I.Framework(iad, needs=("teacher",), defaults={"beta": 0.1, "temperature": 1.0})
AKD = I.Framework(akd, needs=("teacher",), defaults={"alpha": 0.5}, static=True)
ADAIAD = I.Framework(
    adaiad, needs=("teacher",), defaults={"beta": 0.1, "temperature": 1.0, "lam_hi": 2.0}
)
MTARD = I.Framework(mtard, needs=("teacher", "teacher_nat"))
BMTARD = I.Framework(
    bmtard,
    needs=("teacher", "teacher_nat"),
    options={"temperature_rate": (0.001, "by which temperatures of the teachers move in a step")},
    settle=settle_temperatures,
)
ABSLD = I.Framework(
    absld,
    needs=("teacher",),
    defaults={"alpha": 5 / 6},
    options={"temperature_rate": (0.1, "by which temperatures of classes move after an epoch")},
    settle=settle_temperatures,
)
# IGDM's alpha is its paper's on CIFAR-10: 15 on CIFAR-100, 10 on Tiny-ImageNet.
IGDM = I.Framework(igdm, needs=("teacher",), defaults={"alpha": 5.0, "lam_hi": 2.0}, static=True)
SAAD = I.Framework(saad, needs=("teacher",), defaults={"alpha": 1.0, "beta": 0.0}, static=True)
ADR = I.Framework(adr, options=OF_ADR, settle=settle_adr)
ADR_TRADES = I.Framework(adr_trades, defaults={"beta": 6.0}, options=OF_ADR, settle=settle_adr)


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
        told = f"an option of your own cannot be called {name}, which is a setting of every run"
        meant = f"defaults={{{name!r}: {option[0]!r}}} is its default, step.cfg.{name} its value"
        I.require(name not in known, f"{told}: {meant}")
