"""InfoARD: adversarial robustness distillation in one file.

A robust teacher T is distilled into a small student S that resists L-infinity attacks. InfoARD adds
two parts to any distillation framework: ASA attacks each image with a strength of its own, and MIM
keeps the student informative about the teacher's features and attention maps.

    python infoard.py                                     offline demo on rendered shapes, minutes
    python infoard.py --dataset cifar10 --device cuda     the main job: teacher, student, evaluation
    python infoard.py eval CKPT --attacks clean,pgd,aa    any checkpoint, ours or a stranger's
    from infoard import InfoARD, Threat, pgd, infonce     every part works in a foreign loop

    1  notation, configuration     5  InfoARD             9  evaluation
    2  divergences, margins        6  frameworks         10  checkpoints and training
    3  attacks and ASA             7  models, teachers   11  figures and tables
    4  mutual information          8  data               12  command line

What is public of InfoARD is its abstract: strength per instance, mutual information with the
teacher's features and attention, several granularities, a plug-in to existing frameworks. The
formulas that make this concrete (the rank rule of section 3, the critics and terms of section 5)
are our reconstruction, and no number made here is the paper's.

[InfoARD] Liu et al., IEEE TIP 2025, doi 10.1109/TIP.2025.3637689
[Madry]   PGD, adversarial training, 1706.06083   [TRADES] 1901.08573   [RSLAD] 2108.07969
[FGSM]    1412.6572    [CW] margin loss, 1608.04644       [AA]  AutoAttack, 2003.01690
[CPC]     InfoNCE, 1807.03748                     [Poole]  the bounds compared, 1905.06922
[DV]      Donsker and Varadhan 1983; MINE, 1801.04062      [NWJ] 0809.0853
[JSD]     f-GAN, 1606.00709; DIM, 1808.06670      [BA]  Barber and Agakov 2003; VID, 1904.05835
[AT]      attention transfer, 1612.03928          [RKD] relational distillation, 1904.05068
"""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib
import io
import json
import lzma
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# --------------------------------------------------------------------------------------------------
# 1. Notation and configuration
# --------------------------------------------------------------------------------------------------
# x [B,C,H,W] in [0,1] (normalisation lives inside the model), y [B], K classes
# x' = x_adv, |x' - x|_inf <= eps; eps and alpha (the step) in pixel units, written n/255
# S, T student and teacher, x -> logits [B,K]; s, t = S(x), T(x); taps {name: feature map [B,C_l,H_l,W_l]}
# scores [B,B]: row i the student on x'_i, column j the teacher on x_j
# divergences and mutual information in nats per sample, averaged over the batch

ALL = slice(None)
FORMAT = "infoard-1"  # of our checkpoints
PRESETS = dict(  # what None means in Config
    shapes=dict(student="tiny", teacher_arch="tiny_wide", epochs=12, steps=5),
    images=dict(student="resnet18", teacher_arch="wrn_34_10", epochs=100, steps=10),
)


class InfoardError(ValueError):
    """A mistake that one line can explain. The command line prints it and exits with code 2."""


def lookup(table, name: str, what: str):
    """table[name], or one line that lists the names there are."""
    if name in table:
        return table[name] if isinstance(table, dict) else name
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InfoardError(f"unknown {what} {name!r}{hint} (choose from {', '.join(table)})")


def progress_bar(items, text: str = ""):
    """items, with a bar if there is a text and a terminal, and neither --no-progress nor no tqdm."""
    if not text or not sys.stderr.isatty() or os.environ.get("INFOARD_PROGRESS") == "0":
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: pip install tqdm, or --no-progress", file=sys.stderr)
        os.environ["INFOARD_PROGRESS"] = "0"
        return items
    return tqdm(items, desc=text, leave=False)

def write_file(path: Path, content: bytes) -> None:
    """All of content at path or, on any failure, what was there before."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise InfoardError(f"cannot write {path} ({error.strerror}): what was saved before is "
                           "untouched; free space or choose another --out") from None


def write_json(path: Path, value) -> None:
    """value as indented JSON at path."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


@dataclass(frozen=True, eq=False)
class Threat:
    """What an attacker may do, as one object, so that eps and alpha cannot be swapped in a call.

    eps, alpha: float or [B], radius and step in pixel units of [0,1]. steps: int or [B] (long).
    counts: with steps [B], how many samples each step attacks, largest first; if not given they
    are read from `steps`, which waits for the device.
    """
    eps: float | Tensor = 8 / 255
    alpha: float | Tensor = 2 / 255
    steps: int | Tensor = 10
    counts: tuple[int, ...] | None = None

    def __post_init__(self):
        if isinstance(self.eps, float | int) and not 0 <= self.eps <= 1:
            raise InfoardError(f"eps must lie in [0, 1], got {self.eps:g}: write 8/255 or 0.0314")
        if isinstance(self.steps, int) and self.steps < 0:
            raise InfoardError(f"attack steps must be 0 or more, got {self.steps}")

    def schedule(self, batch: int) -> tuple[Tensor | None, tuple[int, ...]]:
        """(order, counts): samples by falling number of steps; step t attacks the first counts[t]."""
        if isinstance(self.steps, int):
            return None, (batch,) * self.steps
        if self.steps.shape != (batch,):
            raise InfoardError(f"steps must be an int or [{batch}], got {list(self.steps.shape)}")
        order = self.steps.argsort(descending=True, stable=True)
        return order, self.counts or active_counts(self.steps.tolist())


def active_counts(steps) -> tuple[int, ...]:
    """n_t = #{i: K_i > t}, the samples that step t of a schedule still attacks."""
    return tuple(sum(k > t for k in steps) for t in range(max(steps)))


def opt(default, text: str, choices: str = ""):
    """A field of Config with its line of --help."""
    return field(default=default, metadata={"help": text, "choices": choices.split()})


@dataclass(frozen=True)
class Config:
    """All settings of a run; each is a command-line option. None: see PRESETS and the text."""
    # data
    dataset: str = opt("shapes", "shapes, cifar10, cifar100, svhn, tinyimagenet or folder")
    data_dir: str = opt("data", "where the data lie or go: the root, the inner folder or the archive")
    download: bool = opt(True, "fetch a missing data set")
    subset: int = opt(0, "training images, class-balanced, the same for every seed; 0: all")
    val_size: int = opt(1000, "training images set aside to choose `best`, at most a tenth")
    image_size: int = opt(0, "pixels, for folders of larger images; 0: as the first one is")
    # models
    student: str | None = opt(None, "resnet18, preact_resnet18, mobilenet_v2, wrn_<depth>_<width>, tiny")
    teacher: str | None = opt(None, "file, robustbench:ID or module:factory; none: train one and cache it")
    teacher_arch: str | None = opt(None, "architecture of a teacher to train, or to insist on in a file")
    teacher_norm: str = opt("none", "what a teacher file expects: none, cifar10, cifar100 or m,m,m;s,s,s")
    teacher_framework: str = opt("trades", "how a missing teacher is trained", "trades at natural")
    teacher_epochs: int | None = opt(None, "epochs for a missing teacher; default: as --epochs")
    # method
    framework: str = opt("rslad", "the base framework: natural, at, trades or rslad")
    infoard: bool = opt(True, "add InfoARD to the base framework")
    asa: str = opt("teacher", "signal of an instance's strength; uniform, shuffled: controls; off: one eps",
                   "teacher student gap uniform shuffled off")
    lam_lo: float = opt(1.0, "eps_i of the weakest instance, in units of eps")
    lam_hi: float = opt(1.5, "eps_i of the strongest instance, in units of eps")
    asa_ramp: float = opt(0.0, "share of the training in which eps_i moves away from eps")
    steps_lo: int = opt(0, "attack steps of the weakest instance; 0: all take --steps")
    mim: str = opt("infonce", "bound of the mutual-information terms", "infonce dv nwj jsd vid off")
    w_feat: float = opt(0.1, "weight of feature mutual information")
    w_att: float = opt(0.05, "weight of attention mutual information")
    w_rel: float = opt(0.0, "weight of the relation term")
    w_logit: float = opt(0.0, "weight of KL(T(x)||S(x')), for bases without soft labels")
    critic_dim: int = opt(128, "width of the critics")
    tau: float = opt(0.2, "temperature of the scores")
    beta: float = opt(6.0, "TRADES' weight of KL(S(x)||S(x'))")
    kl_reduction: str = opt("batchmean", "batchmean: nats per sample; mean: divided by K too, as in "
                            "RSLAD's released code", "batchmean mean")
    # threat
    eps: float = opt(8 / 255, "L-infinity radius in pixel units of [0,1], 8/255 or 0.0314")
    steps: int | None = opt(None, "attack steps in training")
    step_size: float = opt(2 / 255, "attack step in pixel units")
    # optimisation
    epochs: int | None = opt(None, "passes over the training images")
    batch_size: int = opt(128, "images per step")
    lr: float = opt(0.1, "peak learning rate of SGD with momentum 0.9")
    weight_decay: float = opt(5e-4, "weight decay")
    schedule: str = opt("cosine", "cosine with 5%% warm-up; or step, x0.1 at 72, 87 and 95%% as RSLAD",
                        "cosine step")
    ema: float = opt(0.0, "decay of the weight average that is evaluated instead; 0: none")
    seed: int = opt(0, "seed of initialisation, order, augmentation and attack starts")
    # machine
    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps")
    amp: str = opt("auto", "mixed precision; auto: bf16 where the hardware has it", "auto bf16 fp16 off")
    compile: bool = opt(False, "torch.compile the student")
    # evaluation and files
    attacks: str = opt("clean,fgsm,pgd,cw,apgd", "final evaluation; aa: AutoAttack, apgd: its APGD parts")
    eval_subset: int | None = opt(None, "test images to evaluate on; 0: all; default: 500 on CPU, else all")
    eval_batch: int = opt(256, "images per evaluation batch")
    out: str | None = opt(None, "folder of the run; default: runs/<dataset>-<student>-<framework>-s<seed>")
    resume: bool = opt(False, "go on from last.pt in --out, if there is one")
    figures: bool = opt(True, "draw figures at the end")
    progress: bool = opt(True, "show a bar on a terminal")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, flag = getattr(self, f.name), "--" + f.name.replace("_", "-")
            if f.metadata["choices"]:
                lookup(f.metadata["choices"], value, flag)
            if f.name in ("eps", "step_size", "asa_ramp", "ema") and not 0 <= value <= 1:
                unit = ": write 8/255 or 0.0314" if f.name in ("eps", "step_size") else ""
                raise InfoardError(f"{flag} must lie in [0, 1], got {value:g}{unit}")
            if f.name in ("steps", "epochs", "teacher_epochs", "batch_size", "eval_batch", "lr", "tau",
                          "critic_dim") and value is not None and not 0 < value < math.inf:
                raise InfoardError(f"{flag} must be positive, got {value}")
            if f.name in ("subset", "val_size", "steps_lo", "image_size", "weight_decay") and value < 0:
                raise InfoardError(f"{flag} must be 0 or more, got {value}")

    def resolved(self) -> "Config":
        """The same with every None filled in."""
        preset = PRESETS["shapes" if self.dataset == "shapes" else "images"]
        fill = {k: v for k, v in preset.items() if getattr(self, k) is None}
        cfg = dataclasses.replace(self, infoard=self.infoard and self.framework != "natural", **fill)
        if cfg.steps_lo > cfg.steps:
            raise InfoardError(f"--steps-lo {cfg.steps_lo} is more than --steps {cfg.steps}")
        plain = "" if cfg.infoard or cfg.framework == "natural" else "-plain"
        out = cfg.out or f"runs/{cfg.dataset}-{cfg.student}-{cfg.framework}{plain}-s{cfg.seed}"
        return dataclasses.replace(cfg, out=out, teacher_epochs=cfg.teacher_epochs or cfg.epochs)


# --------------------------------------------------------------------------------------------------
# 2. Divergences and margins
# --------------------------------------------------------------------------------------------------

def full(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# KL(p || q) = sum_k p_k (log p_k - log q_k),   p = softmax(p_logits/tau), q = softmax(q_logits/tau)
def kl(p_logits: Tensor, q_logits: Tensor, tau: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence in nats, summed over classes: [B,K], [B,K] -> [B].

    Its mean over the batch is torch's "batchmean". Torch's "mean" divides by K as well: code that
    uses it has K times smaller losses.
    """
    log_p = F.log_softmax(full(p_logits) / tau, dim=1)
    log_q = F.log_softmax(full(q_logits) / tau, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


# margin = z_y - max_{k != y} z_k
def margin(z: Tensor, y: Tensor) -> Tensor:
    """The lead of the true class in logits or probabilities: [B,K], [B] -> [B]; positive = right."""
    y = y[:, None]
    return z.gather(1, y).squeeze(1) - z.scatter(1, y, -math.inf).amax(1)


# --------------------------------------------------------------------------------------------------
# 3. Attacks and ASA
# --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def frozen_eval(*models) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every flag as it was found afterwards."""
    nets = [m for m in models if isinstance(m, nn.Module)]
    modes = [(m, m.training) for net in nets for m in net.modules()]
    needs = [(p, p.requires_grad) for net in nets for p in net.parameters()]
    try:
        for net in nets:
            net.eval().requires_grad_(False)
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for p, need in needs:
            p.requires_grad_(need)


def per_sample(value: float | Tensor, x: Tensor) -> Tensor:
    """A float or [B] as [B,1,1,1], beside x [B,C,H,W]."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(len(x))
    return value.reshape(-1, *[1] * (x.dim() - 1))


def start_point(x: Tensor, eps: Tensor, init: str | Tensor, generator) -> Tensor:
    """Where an attack begins: uniform in the ball [Madry], normal [TRADES], none, or as given."""
    if isinstance(init, Tensor):
        return init
    draws = dict(uniform=lambda e: x + eps * e.uniform_(-1, 1, generator=generator),
                 normal=lambda e: x + 0.001 * e.normal_(generator=generator),
                 none=lambda e: x)
    return lookup(draws, init, "attack start")(torch.empty(x.shape, dtype=x.dtype, device=x.device))


# x'_0 = start(x),   x'_{t+1} = P( x'_t + alpha sign grad_x' objective(x'_t) ),                [Madry]
# P: onto {|x' - x|_inf <= eps} and [0,1]
def pgd(objective: Callable, x: Tensor, *, threat: Threat, init: str | Tensor = "uniform",
        generator: torch.Generator | None = None) -> Tensor:
    """Projected gradient ascent of a per-sample objective under an L-infinity threat.

    objective(x') -> [B], one value per sample; x [B,C,H,W] in [0,1] is never written to. With
    threat.steps [B], step t sees only the samples that have steps to go: it calls
    objective(x'[rows], rows), which must index its labels or targets with rows.
    Only the gradient with respect to x' is taken. Wrap the call in frozen_eval(model), so that
    batch norm stays as it is and no weight gradients are built. Returns x', like x.
    """
    order, counts = threat.schedule(len(x))
    rows = ALL if order is None else order
    x, eps, alpha = x[rows], per_sample(threat.eps, x)[rows], per_sample(threat.alpha, x)[rows]
    lo, hi = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    x_adv = start_point(x, eps, init[rows] if isinstance(init, Tensor) else init, generator)
    x_adv = x_adv.clamp(lo, hi)
    for n in counts:
        z = x_adv[:n].detach().requires_grad_()
        with torch.enable_grad():
            value = objective(z) if order is None else objective(z, order[:n])
            if value.shape != (n,):
                raise InfoardError(f"an objective returns one value per sample, [{n}], "
                                   f"not {list(value.shape)}")
            (grad,) = torch.autograd.grad(value.sum(), z)
        x_adv[:n] = (z.detach() + alpha[:n] * grad.sign()).clamp(lo[:n], hi[:n])
    return x_adv if order is None else torch.empty_like(x_adv).index_copy_(0, order, x_adv)


def ce_objective(model: Callable, y: Tensor) -> Callable:
    """CE(S(x'), y), for pgd."""
    return lambda z, rows=ALL: F.cross_entropy(full(model(z)), y[rows], reduction="none")


def kl_objective(model: Callable, t: Tensor) -> Callable:
    """KL(t || S(x')), for pgd; t [B,K] are logits."""
    return lambda z, rows=ALL: kl(t[rows], model(z))


def cw_objective(model: Callable, y: Tensor) -> Callable:
    """max_{k != y} S_k(x') - S_y(x') [CW], for pgd. Not implemented: the search over a constant c."""
    return lambda z, rows=ALL: -margin(full(model(z)), y[rows])


def pgd_ce(model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    """PGD on the cross-entropy [Madry]; options as in pgd."""
    with frozen_eval(model):
        return pgd(ce_objective(model, y), x, **options)


def pgd_kl(model: nn.Module, x: Tensor, t: Tensor, **options) -> Tensor:
    """PGD away from the distribution with logits t [B,K] [RSLAD]; options as in pgd."""
    with frozen_eval(model):
        return pgd(kl_objective(model, t), x, **options)


def cw_linf(model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    """PGD on the CW margin, the field's CW_inf; options as in pgd."""
    with frozen_eval(model):
        return pgd(cw_objective(model, y), x, **options)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 8 / 255) -> Tensor:
    """One step of size eps from x itself [FGSM]."""
    return pgd_ce(model, x, y, threat=Threat(eps, eps, 1), init="none")


def strength_signal(kind: str, y: Tensor, t: Tensor | None = None, s: Tensor | None = None) -> Tensor:
    """What an instance is like, [B]: the teacher's or the student's lead, or KL(T(x)||S(x)).

    The controls uniform and shuffled need no signal and get the position in the batch.
    """
    if kind in ("uniform", "shuffled"):
        return torch.arange(len(y), device=y.device)
    signals = dict(teacher=lambda: margin(full(t).softmax(1), y),
                   student=lambda: margin(full(s).softmax(1), y),
                   gap=lambda: kl(t, s))
    return lookup(signals, kind, "ASA signal")()


@functools.lru_cache
def step_table(batch: int, lo: int, hi: int, even: bool = False) -> tuple[int, ...]:
    """Steps at rank r = 0..B-1: lo + (hi - lo) r/(B-1), rounded half up; even: the same sum, spread."""
    last = max(batch - 1, 1)
    table = [(2 * lo * last + 2 * (hi - lo) * r + last) // (2 * last) for r in range(batch)]
    return tuple((sum(table) + r) // batch for r in range(batch)) if even else tuple(table)


# u_i = rank(signal_i)/(B-1),   lam_i = lam_lo + (lam_hi - lam_lo) u_i,                          [ours]
# eps_i = eps (1 + ramp (lam_i - 1)),   alpha_i = alpha eps_i/eps,   K_i = round(K_lo + (K - K_lo) u_i)
def instance_strength(signal: Tensor, *, threat: Threat, lam: tuple[float, float] = (1.0, 1.5),
                      ramp: float = 1.0, steps_lo: int = 0, control: str = "",
                      generator: torch.Generator | None = None) -> Threat:
    """ASA: a radius, a step size and, if asked for, a number of steps for each instance of a batch.

    signal [B]: larger = attacked harder. Ranks have no scale, so nothing drifts in training, and the
    mean radius is eps (1 + ramp (mean(lam) - 1)) whatever the signal. threat holds the base eps,
    alpha and the most steps; steps_lo > 0 turns the step schedule on, whose counts depend on B alone.
    control: "uniform" gives all instances the mean strength and as many gradients in total,
    "shuffled" the same strengths to random instances; both cost the same and do not adapt.
    """
    batch, device = len(signal), signal.device
    rank = signal.argsort(stable=True).argsort()
    if control == "shuffled":
        rank = torch.randperm(batch, generator=generator).to(device)
    u = torch.full((batch,), 0.5, device=device) if control == "uniform" or batch == 1 \
        else rank / (batch - 1)
    scale = 1 + ramp * (lam[0] + (lam[1] - lam[0]) * u - 1)
    steps, counts = threat.steps, None
    if steps_lo and steps_lo != threat.steps:
        table = step_table(batch, steps_lo, threat.steps, even=control == "uniform")
        steps, counts = torch.tensor(table, device=device)[rank], active_counts(table)
    return Threat(threat.eps * scale, threat.alpha * scale, steps, counts)


# --------------------------------------------------------------------------------------------------
# 4. Mutual information: lower bounds from a score matrix, in nats
# --------------------------------------------------------------------------------------------------
# f_ij = scores[i,j] = f(x_i, y_j);   E_p: mean of the diagonal, pairs of the joint distribution;
# E_q: mean off the diagonal, pairs of the product of marginals. Inputs are left as they are.

def off_diagonal(scores: Tensor) -> Tensor:
    """[B,B] -> [B,B-1], row by row, without the diagonal."""
    b = len(scores)
    if scores.shape != (b, b) or b < 2:
        raise InfoardError(f"scores must be [B,B] with B >= 2, got {list(scores.shape)}")
    return scores.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1)


# I >= log B + E_i[ f_ii - log sum_j exp f_ij ]                                     [CPC], [Poole] eq. 10
def infonce(scores: Tensor) -> Tensor:
    """InfoNCE: low variance, never above log B, hence biased low when I is larger."""
    return math.log(len(scores)) + (scores.diag() - scores.logsumexp(1)).mean()


# I >= E_p[f] - log E_q[exp f]                                                                      [DV]
def donsker_varadhan(scores: Tensor) -> Tensor:
    """Donsker-Varadhan: can exceed log B; the log of a batch mean makes it biased, of high variance."""
    others = off_diagonal(scores)
    return scores.diag().mean() - (others.logsumexp((0, 1)) - math.log(others.numel()))


# I >= E_p[f] - E_q[exp(f - 1)]                                                                    [NWJ]
def nwj(scores: Tensor) -> Tensor:
    """Nguyen-Wainwright-Jordan: unbiased, of higher variance than DV; best critic 1 + log p/q."""
    return scores.diag().mean() - (off_diagonal(scores) - 1).exp().mean()


# JS(p, q) >= log 2 + 1/2 E_p[log sigma(f)] + 1/2 E_q[log sigma(-f)]                               [JSD]
def js_divergence(scores: Tensor) -> Tensor:
    """Jensen-Shannon divergence of joint and product: stable, at most log 2, not an information."""
    positive, negative = F.logsigmoid(scores.diag()), F.logsigmoid(-off_diagonal(scores))
    return math.log(2) + 0.5 * (positive.mean() + negative.mean())


def jsd(scores: Tensor) -> Tensor:
    """The gradient of js_divergence with the value of a bound on I, nwj(f + 1) ([Poole] sec. 2).

    The critic that is best for js_divergence is f = log p/q, and nwj wants 1 + log p/q.
    """
    objective = js_divergence(scores)
    return objective + (nwj(scores + 1) - objective).detach()


# I >= H(Y) + E_p[ log q(y|x) ],   f_ij = log q(y_j | x_i)                                           [BA]
def variational_bound(scores: Tensor, entropy: float = 0.0) -> Tensor:
    """Barber-Agakov: needs no negatives but a normalised q; H(Y) is a constant when Y is fixed."""
    return entropy + scores.diag().mean()


BOUNDS = dict(infonce=infonce, dv=donsker_varadhan, nwj=nwj, jsd=jsd, vid=variational_bound)


# log q(y_j|x_i) = -1/2 sum_d [ (y_jd - mean_id)^2 / var_d + log var_d + log 2 pi ]
def gaussian_scores(mean: Tensor, y: Tensor, log_var: Tensor) -> Tensor:
    """Scores of a Gaussian q(y|x): mean [B,D], y [B,D], log_var [D] -> [B,B]."""
    scale = (-0.5 * log_var).exp()
    squares = ((mean * scale)[:, None] - (y * scale)[None]).square().sum(2)
    return -0.5 * (squares + log_var.sum() + y.shape[1] * math.log(2 * math.pi))


def pooled(f: Tensor) -> Tensor:
    """A feature map [B,C,H,W] as its spatial mean [B,C]; a vector as it is."""
    return full(f.flatten(2).mean(2) if f.dim() > 2 else f)


class Critic(nn.Module):
    """scores[i,j] = <g(s_i), h(t_j)>/tau, with linear, normalised g and h of pooled features.

    Small on purpose: a large critic finds information that the student cannot use.
    """

    def __init__(self, dim_s: int, dim_t: int, dim: int = 128, tau: float = 0.2):
        super().__init__()
        self.g, self.h, self.tau = nn.Linear(dim_s, dim), nn.Linear(dim_t, dim), tau

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        g = F.normalize(self.g(pooled(s)), dim=1)  # [B, dim]
        h = F.normalize(self.h(pooled(t)), dim=1)  # [B, dim]
        return g @ h.T / self.tau  # [B, B]


class GaussianCritic(nn.Module):
    """scores[i,j] = log q(t_j|s_i)/D: a Gaussian with linear mean, per dimension of the teacher's map.

    The target is standardised, not learned: a learned one could turn constant and make q perfect.
    """

    def __init__(self, dim_s: int, dim_t: int):
        super().__init__()
        self.mean, self.log_var = nn.Linear(dim_s, dim_t), nn.Parameter(torch.zeros(dim_t))

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        t = F.layer_norm(pooled(t), t.shape[1:2])  # [B, D]
        scores = gaussian_scores(self.mean(pooled(s)), t, self.log_var.clamp(min=-6))
        return scores / t.shape[1]  # [B, B]


# --------------------------------------------------------------------------------------------------
# 5. InfoARD: strength and multi-granularity loss as one object
# --------------------------------------------------------------------------------------------------

class Taps:
    """Named feature maps of any net, read by hooks: after net(x), take() gives {name: [B,C_l,H_l,W_l]}.

    Taken are the last map at each resolution and, as "penultimate", the input of the last linear
    layer; `x` is a batch to find them with. The net is not changed; close() takes the hooks off.
    """

    def __init__(self, net: nn.Module, x: Tensor):
        self.maps, found, self.hooks = {}, {}, []
        for name, module in net.named_modules():
            self.hooks.append(module.register_forward_hook(partial(self.find, found, name)))
        self.look(net, x)
        self.close()
        for key, name in found.items():
            self.hooks.append(net.get_submodule(name).register_forward_hook(partial(self.keep, key, name)))
        self.look(net, x)
        self.widths = {name: f.shape[1] for name, f in self.take().items()}

    @staticmethod
    def look(net: nn.Module, x: Tensor) -> None:
        with torch.no_grad(), frozen_eval(net):
            net(x)

    @staticmethod
    def find(found: dict, name: str, module: nn.Module, inputs, output) -> None:
        if isinstance(module, nn.Linear) and inputs[0].dim() == 2:
            found["penultimate"] = name
        elif isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1 and name:
            found[output.shape[-2:]] = name

    def keep(self, key, name: str, module: nn.Module, inputs, output) -> None:
        self.maps["penultimate" if key == "penultimate" else name] = \
            inputs[0] if key == "penultimate" else output

    def take(self) -> dict[str, Tensor]:
        """The maps of the latest pass, which are let go of here: no graph outlives its step."""
        maps, self.maps = self.maps, {}
        return maps

    def close(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


# A = normalise( sum_c f_c^2 )                                                          [AT] eq. 1, p = 2
def attention_map(f: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Where a net looks: [B,C,H,W] -> [B,h*w] of unit length; size: (h, w) to pool to."""
    energy = full(f).square().sum(1, keepdim=True)  # [B, 1, H, W]
    if size is not None and energy.shape[-2:] != size:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1), dim=1)


def attention_scores(s: Tensor, t: Tensor, tau: float = 0.2) -> Tensor:
    """Cosines of centred attention maps over tau: [B,C,H,W], [B,C',H',W'] -> [B,B], at most 1/tau.

    Centred because energies are positive: the raw cosine of any two maps is close to 1.
    """
    size = tuple(map(min, s.shape[-2:], t.shape[-2:]))
    a, b = (attention_map(f, size) for f in (s, t))
    a, b = (F.normalize(m - m.mean(1, keepdim=True), dim=1) for m in (a, b))
    return a @ b.T / tau


# R_i = KL( softmax_j(c^T_ij/tau) || softmax_j(c^S_ij/tau) ),  j != i,  c: cosines of centred features
def relation_loss(s: Tensor, t: Tensor, tau: float = 0.2) -> Tensor:
    """How the student's similarities within the batch differ from the teacher's; after [RKD].

    [B,..], [B,..] -> [B] in nats; unchanged when features are shifted, scaled or rotated.
    """
    def similarities(f):
        f = F.normalize(pooled(f) - pooled(f).mean(0), dim=1)
        return off_diagonal(f @ f.T) / tau  # [B, B-1]
    return kl(similarities(t), similarities(s))


class InfoARD(nn.Module):
    """ASA and MIM for any distillation loop. In a foreign script these lines are all that changes:

        info = InfoARD(student, teacher)                          # hooks; the nets stay as they are
        opt = SGD([*student.parameters(), *info.parameters()])    # the critics learn too
            t = teacher(x)
            x_adv = attack(..., eps=info.strength(t, y).eps)      # [B], a radius for each instance
            s_adv = student(x_adv)
            loss = ... + info.loss()                              # before either net's next pass

    loss = -w_feat I_feat - w_att I_att + w_rel R: mutual information in nats, by the bound that mim
    names, of the student's features on x' with the teacher's on clean x (last three stages and
    penultimate vector), and of their attention maps (stages); R: relation_loss of the penultimate
    vectors. A term is the mean over its taps; one of weight zero costs nothing. Cosine scores leave
    the scale of the logits free: these terms stand beside a loss on the logits, never alone.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, image_shape=(3, 32, 32),
                 asa: str = "teacher", lam: tuple[float, float] = (1.0, 1.5), mim: str = "infonce",
                 w_feat: float = 0.1, w_att: float = 0.05, w_rel: float = 0.0, dim: int = 128,
                 tau: float = 0.2):
        super().__init__()
        x = torch.zeros(2, *image_shape, device=next(student.parameters()).device)
        self.asa, self.lam, self.tau, self.w_rel, self.terms = asa, lam, tau, w_rel, {}
        self.bound = None if mim == "off" else lookup(BOUNDS, mim, "mutual-information bound")
        self.w_feat, self.w_att = (w_feat, w_att) if self.bound else (0.0, 0.0)
        self.active = bool(self.w_feat or self.w_att or self.w_rel)
        self.student_taps, self.teacher_taps = Taps(student, x), Taps(teacher, x)
        wide_s, wide_t = self.student_taps.widths, self.teacher_taps.widths
        stages = ([n for n in w if n != "penultimate"][::-1] for w in (wide_s, wide_t))
        self.stages = list(zip(*stages))[:3]  # deepest with deepest
        both = {"penultimate"} & set(wide_s) & set(wide_t)
        self.pairs = self.stages + [(n, n) for n in both]
        if self.active and not self.pairs:
            raise InfoardError("InfoARD finds no feature maps in student and teacher: --mim off")
        make = GaussianCritic if mim == "vid" else partial(Critic, dim=dim, tau=tau)
        self.critics = nn.ModuleList(make(wide_s[a], wide_t[b]) for a, b in self.pairs if self.w_feat)
        self.critics.to(x.device)

    def strength(self, t: Tensor | None, y: Tensor, threat: Threat = Threat(), *,  # noqa: B008
                 s: Tensor | None = None, **options) -> Threat:
        """ASA: threat with eps, alpha (and steps) per instance, from logits t, s [B,K] on clean x."""
        if self.asa == "off":
            return threat
        signal = strength_signal(self.asa, y, t, s)
        return instance_strength(signal, threat=threat, lam=self.lam, control=self.asa, **options)

    def loss(self, s_maps: dict | None = None, t_maps: dict | None = None) -> Tensor:
        """The weighted terms, a scalar, from the maps given or those of the latest passes.

        .terms keeps the single ones: feat and att are informations (higher is better), rel a loss.
        """
        s_maps = self.student_taps.take() if s_maps is None else s_maps
        t_maps = self.teacher_taps.take() if t_maps is None else t_maps
        feats = [(full(s_maps[a]), full(t_maps[b]).detach()) for a, b in self.pairs]
        total, self.terms = feats[0][0].new_zeros(()), {}
        if len(feats[0][0]) < 2:  # one image alone makes no pairs
            return total
        with torch.autocast(total.device.type, enabled=False):
            if self.w_feat:
                self.terms["feat"] = sum(self.bound(critic(s, t)) for critic, (s, t)
                                         in zip(self.critics, feats, strict=True)) / len(feats)
            if self.w_att and self.stages:
                self.terms["att"] = sum(self.attention_bound(s, t) for s, t
                                        in feats[:len(self.stages)]) / len(self.stages)
            if self.w_rel:
                self.terms["rel"] = relation_loss(*feats[-1], tau=self.tau).mean()
        for name, weight in dict(feat=-self.w_feat, att=-self.w_att, rel=self.w_rel).items():
            if name in self.terms:
                total = total + weight * self.terms[name]
                self.terms[name] = self.terms[name].detach()
        return total

    def attention_bound(self, s: Tensor, t: Tensor) -> Tensor:
        """The bound on attention maps, which need no learned critic; vid makes it attention transfer."""
        scores = attention_scores(s, t, self.tau)
        return self.bound(scores - 1 / self.tau if self.bound is variational_bound else scores)


# --------------------------------------------------------------------------------------------------
# 6. Frameworks
# --------------------------------------------------------------------------------------------------
# name      inner max, |x'-x| <= eps   outer min                                            source
# natural   -                          CE(S(x),y)
# at        CE(S(x'),y)                CE(S(x'),y)                                          [Madry] eq. 2.1
# trades    KL(S(x)||S(x'))            CE(S(x),y) + beta KL(S(x)||S(x'))                    [TRADES] eq. 5
# rslad     KL(T(x)||S(x'))            5/6 KL(T(x)||S(x')) + 1/6 KL(T(x)||S(x))             [RSLAD] eq. 7

class Step:
    """One batch and what is known of it; each pass through a net is made when it is first asked for.

    t, s, s_adv: logits T(x), S(x), S(x'). A framework calls attack(objective) and returns a loss.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor, *,
                 cfg: Config, info: InfoARD | None = None, progress: float = 1.0,
                 generators: dict | None = None):
        self.student, self.teacher, self.x, self.y = student, teacher, x, y
        self.cfg, self.info, self.progress, self.generators = cfg, info, progress, generators or {}
        self.threat = Threat(cfg.eps, cfg.step_size, cfg.steps)

    @cached_property
    def t(self) -> Tensor:
        if self.teacher is None:
            raise InfoardError(f"framework {self.cfg.framework} with these settings needs a teacher")
        with torch.no_grad():
            t = full(self.teacher(self.x))
        self.t_maps = self.info.teacher_taps.take() if self.info else {}
        return t

    @cached_property
    def s(self) -> Tensor:
        return full(self.student(self.x))

    @cached_property
    def s_adv(self) -> Tensor:
        s_adv = full(self.student(self.x_adv))
        self.s_maps = self.info.student_taps.take() if self.info else {}
        return s_adv

    def clean(self) -> Tensor:
        """S(x) in eval mode and without a graph, for targets and signals."""
        with torch.no_grad(), frozen_eval(self.student):
            return full(self.student(self.x))

    def kl(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        """The batch mean of kl, on the scale that --kl-reduction asks for."""
        classes = p_logits.shape[1] if self.cfg.kl_reduction == "mean" else 1
        return kl(p_logits, q_logits).mean() / classes

    def attack(self, objective: Callable, init: str = "uniform") -> None:
        """Sets x_adv: the one pgd of all frameworks, with a strength per instance under InfoARD."""
        if self.info and self.info.asa != "off":
            ramp = min(1.0, self.progress / self.cfg.asa_ramp) if self.cfg.asa_ramp else 1.0
            t = self.t if self.info.asa in ("teacher", "gap") else None
            s = self.clean() if self.info.asa in ("student", "gap") else None
            self.threat = self.info.strength(t, self.y, self.threat, s=s, ramp=ramp,
                                             steps_lo=self.cfg.steps_lo,
                                             generator=self.generators.get("data"))
        with frozen_eval(self.student):
            self.x_adv = pgd(objective, self.x, threat=self.threat, init=init,
                             generator=self.generators.get("attack"))

    def loss(self) -> Tensor:
        """The framework's loss plus InfoARD's, on the same passes."""
        loss = lookup(FRAMEWORKS, self.cfg.framework, "framework")(self)
        if self.info and self.info.active:
            _ = self.s_adv, self.t  # if the framework itself made no such pass
            loss = loss + self.info.loss(self.s_maps, self.t_maps)
        if self.info and self.cfg.w_logit:
            loss = loss + self.cfg.w_logit * self.kl(self.t, self.s_adv)
        return loss


def natural(step: Step) -> Tensor:
    """No defence: the control that every robust number is held against."""
    return F.cross_entropy(step.s, step.y)


def at(step: Step) -> Tensor:
    """Adversarial training."""
    step.attack(ce_objective(step.student, step.y))
    return F.cross_entropy(step.s_adv, step.y)


def trades(step: Step) -> Tensor:
    """TRADES; S(x) in the outer KL is not detached, as published."""
    step.attack(kl_objective(step.student, step.clean()), init="normal")
    return F.cross_entropy(step.s, step.y) + step.cfg.beta * step.kl(step.s, step.s_adv)


def rslad(step: Step) -> Tensor:
    """Robust soft labels. differs: released code divides both terms by K (--kl-reduction mean)."""
    step.attack(kl_objective(step.student, step.t), init="normal")
    return 5 / 6 * step.kl(step.t, step.s_adv) + 1 / 6 * step.kl(step.t, step.s)


FRAMEWORKS = dict(natural=natural, at=at, trades=trades, rslad=rslad)
NEED_TEACHER = ("rslad",)


# --------------------------------------------------------------------------------------------------
# 7. Models, teachers
# --------------------------------------------------------------------------------------------------
# Named layers in a row: the names are those of files in the wild, so that these load as they are.
# ResNet, PreActResNet and MobileNetV2 after kuangliu's CIFAR nets, WideResNet after TRADES. Images
# below 64 pixels keep their resolution at the first layer, those below 128 are halved there, larger
# ones quartered.

NORMS = dict(none=((0.0,) * 3, (1.0,) * 3),
             cifar10=((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
             cifar100=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))


class Normalize(nn.Module):
    """(x - mean)/std, inside the model; not in its state dict, as files have no such keys."""

    def __init__(self, mean=NORMS["none"][0], std=NORMS["none"][1]):
        super().__init__()
        for name, value in dict(mean=mean, std=std).items():
            self.register_buffer(name, torch.as_tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the resolution at stride 1."""
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """ResNet, 1512.03385: conv-bn-relu-conv-bn + shortcut, relu."""

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 3, stride), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv(c, c), nn.BatchNorm2d(c)
        change = [conv(c_in, c, 1, stride), nn.BatchNorm2d(c)] if stride > 1 or c_in != c else []
        self.shortcut = nn.Sequential(*change)

    def forward(self, x: Tensor) -> Tensor:
        f = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(f + self.shortcut(x))


class PreActBlock(nn.Module):
    """bn-act-conv twice + shortcut from after the first act, 1603.05027; wide: with WRN's names."""

    def __init__(self, c_in: int, c: int, stride: int, act: Callable = F.relu, wide: bool = False):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c, 3, stride)
        self.bn2, self.conv2, self.act = nn.BatchNorm2d(c), conv(c, c), act
        self.short = "convShortcut" if wide else "shortcut"
        change = conv(c_in, c, 1, stride) if stride > 1 or c_in != c else None
        setattr(self, self.short, change if wide or not change else nn.Sequential(change))

    def forward(self, x: Tensor) -> Tensor:
        f, shortcut = self.act(self.bn1(x)), getattr(self, self.short)
        x = x if shortcut is None else shortcut(f)
        return self.conv2(self.act(self.bn2(self.conv1(f)))) + x


class InvertedBlock(nn.Module):
    """MobileNetV2, 1801.04381: expand 1x1, depthwise 3x3, project 1x1; shortcut at stride 1."""

    def __init__(self, c_in: int, c: int, stride: int, expansion: int = 6):
        super().__init__()
        wide, self.stride = expansion * c_in, stride
        self.conv1, self.bn1 = conv(c_in, wide, 1), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = conv(wide, wide, 3, stride, groups=wide), nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = conv(wide, c, 1), nn.BatchNorm2d(c)
        change = [conv(c_in, c, 1), nn.BatchNorm2d(c)] if stride == 1 and c_in != c else []
        self.shortcut = nn.Sequential(*change)

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        f = self.bn3(self.conv3(f))
        return f + self.shortcut(x) if self.stride == 1 else f


def stage(block: Callable, c_in: int, c: int, n: int, stride: int) -> nn.Sequential:
    """n blocks, the first of which changes width and resolution."""
    return nn.Sequential(block(c_in, c, stride), *(block(c, c, 1) for _ in range(n - 1)))


def in_a_row(width: int, classes: int, size: int, *, head: str = "linear", bias: bool = True,
             **layers: nn.Module) -> nn.Sequential:
    """normalise, layers, pool, head: x [B,3,size,size] in [0,1] -> logits [B,K]."""
    if size >= 64:
        layers["conv1"].stride = (2, 2)
    shrink = dict(shrink=nn.MaxPool2d(2)) if size >= 128 else {}
    layers = dict(normalize=Normalize(), conv1=layers.pop("conv1")) | shrink | layers
    return nn.Sequential(OrderedDict(layers, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                                     **{head: nn.Linear(width, classes, bias)}))


def resnet(classes: int = 10, size: int = 32, blocks=(2, 2, 2, 2), preact: bool = False,
           final_bn: bool = True) -> nn.Sequential:
    """ResNet, or PreActResNet with the batch norm before the head that some files lack."""
    block = PreActBlock if preact else BasicBlock
    stages = {f"layer{i + 1}": stage(block, max(64, 32 << i), 64 << i, n, 1 + (i > 0))
              for i, n in enumerate(blocks)}
    if preact:
        stages |= dict(bn=nn.BatchNorm2d(512), relu=nn.ReLU()) if final_bn else {}
    else:
        stages = dict(bn1=nn.BatchNorm2d(64), relu=nn.ReLU()) | stages
    return in_a_row(512, classes, size, conv1=conv(3, 64), **stages)


def wide_resnet(classes: int = 10, size: int = 32, depth: int = 34, width: int = 10,
                act: str = "relu", bias: bool = True) -> nn.Sequential:
    """WideResNet, 1605.07146, depth = 6n + 4; act: relu, or silu for files trained with it."""
    block = partial(PreActBlock, act=getattr(F, act), wide=True)
    c, n = (16, 16 * width, 32 * width, 64 * width), (depth - 4) // 6
    stages = {f"block{i}": nn.Sequential(OrderedDict(
        layer=stage(block, c[i - 1], c[i], n, 1 + (i > 1)))) for i in (1, 2, 3)}
    net = in_a_row(c[3], classes, size, head="fc", bias=bias, conv1=conv(3, 16), **stages,
                   bn1=nn.BatchNorm2d(c[3]), act=nn.ReLU() if act == "relu" else nn.SiLU())
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def mobilenet_v2(classes: int = 10, size: int = 32) -> nn.Sequential:
    """MobileNetV2 with CIFAR strides."""
    plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2),  # expansion, width, blocks,
            (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))  # stride
    blocks, c_in = [], 32
    for expansion, c, n, stride in plan:
        blocks += stage(partial(InvertedBlock, expansion=expansion), c_in, c, n, stride)
        c_in = c
    return in_a_row(1280, classes, size, conv1=conv(3, 32), bn1=nn.BatchNorm2d(32), relu1=nn.ReLU(),
                    layers=nn.Sequential(*blocks), conv2=conv(320, 1280, 1),
                    bn2=nn.BatchNorm2d(1280), relu2=nn.ReLU())


def tiny(classes: int = 10, size: int = 32, width: int = 16) -> nn.Sequential:
    """Four convolutions, for the demo, for tests and for constrained hardware."""
    def layer(c_in, stride):
        return nn.Sequential(conv(c_in, 2 * c_in, 3, stride), nn.BatchNorm2d(2 * c_in), nn.ReLU())
    return in_a_row(8 * width, classes, size, conv1=conv(3, width, 3, 2), bn1=nn.BatchNorm2d(width),
                    relu=nn.ReLU(), layer1=layer(width, 2), layer2=layer(2 * width, 2),
                    layer3=layer(4 * width, 1))


MODELS = dict(resnet18=resnet, preact_resnet18=partial(resnet, preact=True), wrn_34_10=wide_resnet,
              mobilenet_v2=mobilenet_v2, tiny=tiny, tiny_wide=partial(tiny, width=32))


def build_model(name: str, classes: int = 10, size: int = 32, **options) -> nn.Module:
    """A net of MODELS or any wrn_<depth>_<width>[_silu] with depth 6n + 4."""
    wide = re.fullmatch(r"wrn_(\d+)_(\d+)(_silu)?", name)
    if wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]):
        options |= dict(depth=int(wide[1]), width=int(wide[2]), act="silu" if wide[3] else "relu")
        return wide_resnet(classes, size, **options)
    return lookup(MODELS, name, "model")(classes, size, **options)


PUBLISHED = dict(  # clean accuracy in RobustBench's model_info, if the name occurs in a teacher's
    Chen2021LTD_WRN34_10=85.21, Chen2021LTD_WRN34_20=86.03, Zhang2019Theoretically=84.92,
    model_cifar_wrn=84.92, Gowal2020Uncovering_34_20=85.64, Gowal2020Uncovering_70_16=85.29,
    Gowal2021Improving_28_10=87.50, Wang2023Better_WRN_28_10=92.44, Wang2023Better_WRN_70_16=93.25,
    Bartoldson2024Adversarial_WRN_94_16=93.68)


def parse_norm(text: str):
    """(mean, std) from a name in NORMS or from m,m,m;s,s,s."""
    with contextlib.suppress(ValueError):
        mean, std = (tuple(map(float, part.split(","))) for part in text.split(";"))
        if len(mean) == len(std) == 3 and min(std) > 0:
            return mean, std
    return lookup(NORMS, text, "normalisation")


def is_norm(key: str) -> bool:
    """Whether a key of a state dict is a normaliser's."""
    return key.split(".")[-1] in ("mu", "sigma", "mean", "std")


def unwrap(state: dict) -> dict[str, Tensor]:
    """The bare tensors of a file, without dicts around it, DataParallel, compile, SWA, Sequential."""
    nested = ("state_dict", "model_state_dict", "ema", "net", "model", "rmodel", "best", "last")
    while inner := [state[k] for k in nested if isinstance(state.get(k), dict)]:
        state = inner[0]
    state = {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "n_averaged"}
    while len(first := {k.partition(".")[0] for k in state if not is_norm(k)}) == 1:
        prefix = first.pop() + "."  # goes only when all keys have it
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return {k: v for k, v in state.items() if not k.startswith("sub_block1.")}


def infer_arch(state: dict[str, Tensor]) -> tuple[str, dict]:
    """(name, options) of the net that a bare state dict belongs to."""
    def blocks(stage):
        return len({k.split(".")[1 + stage.count(".")] for k in state if k.startswith(stage + ".")})

    if "block1.layer.0.conv1.weight" in state:
        width = state["block1.layer.0.conv1.weight"].shape[0] // 16
        return f"wrn_{6 * blocks('block1.layer') + 4}_{width}", dict(bias="fc.bias" in state)
    if "layer4.0.conv2.weight" in state and "linear.weight" in state:
        options = dict(blocks=tuple(blocks(f"layer{i}") for i in (1, 2, 3, 4)))
        if "bn1.weight" in state:
            return "resnet18", options
        return "preact_resnet18", options | dict(final_bn="bn.weight" in state)
    if "layers.16.conv3.weight" in state:
        return "mobilenet_v2", {}
    if "layer3.0.weight" in state:
        return "tiny", dict(width=state["conv1.weight"].shape[0])
    family = "torchvision's ResNet" if "layer1.0.conv1.weight" in state else "an unknown net"
    family = "DeepMind's nets" if {"logits.weight"} & state.keys() else family
    raise InfoardError(f"holds weights of {family} (first key {next(iter(state), 'none')!r}): use "
                       "robustbench:ID or module:factory, which return the net itself")


def load_tensors(path: str | Path) -> dict:
    """A checkpoint file as a dict, with weights_only, or one line that says what is wrong with it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise InfoardError(f"no checkpoint file at {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = "holds code as well as tensors, which is not safe to load: save its state_dict()" \
            if "weights_only" in str(error).lower() else "is truncated or not PyTorch's: get it again"
        raise InfoardError(f"{path} {reason}") from None
    if not isinstance(state, dict):
        raise InfoardError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def load_weights(path: str | Path, arch: str | None = None, size: int = 32,
                 norm: str = "none") -> nn.Module:
    """A net from any state-dict file: unwrapped, architecture from the keys, strictly loaded."""
    file = load_tensors(path)
    state = unwrap(file)
    normaliser = [state.pop(k) for k in list(state) if is_norm(k)] or parse_norm(norm)
    try:
        name, options = infer_arch(state)
        if arch and not arch.startswith(name):
            raise InfoardError(f"holds a {name}, not the {arch} that was asked for")
        classes = len(state["fc.weight" if "fc.weight" in state else "linear.weight"])
        net = build_model(arch or name, classes, file.get("size", size), **options)
        net.load_state_dict(state)
    except (InfoardError, RuntimeError) as error:
        raise InfoardError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    net[0] = Normalize(*normaliser)
    return net


def import_teacher(name: str, dataset: str) -> nn.Module:
    """robustbench:ID through an installed robustbench, or what module:factory() returns."""
    module, _, factory = name.partition(":")
    try:
        if module == "robustbench":
            from robustbench.utils import load_model
            return load_model(factory, dataset=dataset, threat_model="Linf")
        sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise InfoardError(f"teacher {name} cannot be imported: {error}") from None


def load_teacher(path_or_id: str, arch: str | None = None, num_classes: int | None = None, *,
                 size: int = 32, norm: str = "none", dataset: str = "cifar10",
                 device: str | torch.device = "cpu") -> nn.Module:
    """A frozen net in eval mode, from a file, robustbench:ID or module:factory.

    Keys do not tell everything: say norm (see parse_norm) and arch "wrn_28_10_silu" where needed,
    and follow with check_teacher, since a strict load proves little. num_classes is checked.
    """
    if re.fullmatch(r"[\w.]+:[\w.-]+", path_or_id) and not Path(path_or_id).exists():
        net = import_teacher(path_or_id, dataset)
    else:
        net = load_weights(path_or_id, arch, size, norm)
    if not isinstance(net, nn.Module):
        raise InfoardError(f"teacher {path_or_id} is a {type(net).__name__}, not an nn.Module")
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    with torch.no_grad():
        z = net(torch.full((2, 3, size, size), 0.5, device=device))  # [2, K]
    if num_classes and z.shape[1] != num_classes:
        raise InfoardError(f"{path_or_id} has {z.shape[1]} classes, the data have {num_classes}")
    if (z >= 0).all() and (z.sum(1) - 1).abs().max() < 1e-4:
        raise InfoardError(f"{path_or_id} returns probabilities: wrap it to return logits")
    return net


# --------------------------------------------------------------------------------------------------
# 8. Data
# --------------------------------------------------------------------------------------------------

@dataclass
class Data:
    """Images uint8 [N,C,H,W] (channels last in memory), labels long [N], names of the classes."""
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: list[str]
    flip: bool = True  # whether a mirror image keeps its label


SHAPES = ("disk", "ring", "square", "frame", "triangle", "cross", "star", "moon", "bar", "dots")


def shape_distance(kind: int, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline, negative inside, of one of SHAPES of about unit radius."""
    r, box = (x * x + y * y).sqrt(), torch.maximum(x.abs(), y.abs())
    bar = torch.maximum(x.abs() - 1, y.abs() - 0.3)
    column = torch.maximum(x.abs() - 0.3, y.abs() - 1)
    return (r - 0.95,
            (r - 0.75).abs() - 0.22,
            box - 0.8,
            (box - 0.7).abs() - 0.2,
            torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.5,
            torch.minimum(bar, column),
            r - 0.65 - 0.35 * torch.cos(5 * torch.atan2(x, -y)),
            torch.maximum(r - 0.95, 0.8 - ((x - 0.5) ** 2 + y * y).sqrt()),
            bar,
            ((x.abs() - 0.55) ** 2 + y * y).sqrt() - 0.4)[kind]


def render_shapes(train: int = 10_000, test: int = 2_000, size: int = 32, seed: int = 0) -> Data:
    """The built-in set: one of SHAPES per image, from easy (large, strong) to hard (small, faint)."""
    g, n, kinds = torch.Generator().manual_seed(seed), train + test, len(SHAPES)
    labels = torch.arange(n) % kinds
    hard, turn, cx, cy = torch.rand(4, n, 1, 1, generator=g).unbind()
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = grid.view(1, 1, -1) - 0.5 * (cx - 0.5), grid.view(1, -1, 1) - 0.5 * (cy - 0.5)
    angle, radius = 0.8 * (turn - 0.5), 0.8 - 0.25 * hard
    x, y = ((x * angle.cos() + y * angle.sin()) / radius,  # [N, H, W]
            (y * angle.cos() - x * angle.sin()) / radius)
    ink = torch.empty(n, 1, size, size)
    for k in range(kinds):
        ink[k::kinds, 0] = torch.sigmoid(-12 * shape_distance(k, x[k::kinds], y[k::kinds]))
    hard, tint = hard.view(n, 1, 1, 1), torch.rand(2, n, 3, 1, 1, generator=g)
    noise = (0.02 + 0.06 * hard) * torch.randn(n, 3, size, size, generator=g)
    images = 0.05 + 0.3 * tint[0] + (0.75 - 0.5 * hard) * (0.5 + 0.5 * tint[1]) * ink + noise
    images = (images.clamp(0, 1) * 255).round().byte().contiguous(memory_format=torch.channels_last)
    return Data(images[:train], labels[:train], images[train:], labels[train:], list(SHAPES))


PLACES = dict(  # the folder below the root, its archive, and something that is in it
    cifar10=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"),
    cifar100=("cifar-100-python", "cifar-100-python.tar.gz", "train"),
    svhn=("", "", "train_32x32.mat"),
    tinyimagenet=("tiny-imagenet-200", "tiny-imagenet-200.zip", "train"),
    folder=("", "", "train"),
)
DATASETS = ("shapes", *PLACES)


def locate(name: str, root: Path, cache: Path) -> Path | None:
    """The folder of a data set: root is its parent, the folder itself, its archive, or has that."""
    inner, archive, key = PLACES[name]
    for place in [root / inner, root] + (sorted(root.glob("*/")) if name == "folder" else []):
        if (place / key).exists():
            return place
    archive = root if root.is_file() else root / archive
    if not archive.is_file():
        return None
    target = cache / f"{archive.name}-{fingerprint(archive)}"
    if not target.exists():
        part = Path(f"{target}.part{os.getpid()}")
        try:
            options = {} if archive.suffix == ".zip" else dict(filter="data")
            shutil.unpack_archive(archive, part, **options)
            part.rename(target)
        except (shutil.ReadError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise InfoardError(f"cannot unpack {archive} ({error}): delete it, get it again") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return locate(name, target, cache)


def fingerprint(place: Path) -> str:
    """Changes with the names, sizes and times of the files at or below a place."""
    files = sorted(Path(d, f) for d, _, names in os.walk(place) for f in names) or [place]
    text = "".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fetch(name: str, root: Path) -> None:
    """Downloads a data set to root, with torchvision's addresses and checksums."""
    from torchvision import datasets
    url, md5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
    jobs = dict(
        cifar10=lambda: datasets.CIFAR10(root, download=True),
        cifar100=lambda: datasets.CIFAR100(root, download=True),
        svhn=lambda: [datasets.SVHN(root, split, download=True) for split in ("train", "test")],
        tinyimagenet=lambda: datasets.utils.download_and_extract_archive(url, root, md5=md5))
    print(f"downloading {name} to {root}")
    try:
        jobs[name]()
    except (OSError, RuntimeError) as error:
        raise InfoardError(f"no {name} in {root}, and no download ({error}): put {missing(name)} there, "
                           "or say with --data-dir where it is") from None


def missing(name: str) -> str:
    """What a user has to provide for a data set."""
    inner, archive, key = PLACES[name]
    return f"{archive} or {inner}/" if inner else f"{key} and {key.replace('train', 'test')}" + \
        ("" if "." in key else ", folders of one folder per class,")


def read_arrays(name: str, place: Path) -> Data:
    """CIFAR-10, CIFAR-100 or SVHN in the published layout, by torchvision, re-packed files too."""
    from torchvision import datasets
    kind = dict(cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100, svhn=datasets.SVHN)[name]
    lenient = dict(_check_integrity=lambda self: True, base_folder=place.name)
    if name == "svhn":
        parts = [type("Local", (kind,), lenient)(place, split=s) for s in ("train", "test")]
        arrays = [(p.data.transpose(0, 2, 3, 1), p.labels) for p in parts]
        classes = [str(digit) for digit in range(10)]
    else:
        lenient["meta"] = kind.meta | dict(md5=None)
        parts = [type("Local", (kind,), lenient)(place.parent, train=t) for t in (True, False)]
        arrays, classes = [(p.data, p.targets) for p in parts], parts[0].classes
    (x, y), (x_test, y_test) = [(torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2),
                                 torch.as_tensor(y, dtype=torch.long)) for x, y in arrays]
    return Data(x, y, x_test, y_test, list(classes), flip=name != "svhn")


def read_folder(place: Path, size: int, cache: Path) -> Data:
    """Images in train/ and test/ or val/, one folder per class, from memory-mapped files in cache.

    These are made first if they are not there, image by image. Tiny-ImageNet's val, which has its
    labels in a text file, is read as it comes. Images of another size than the first one's (or
    `size`) are resized and cropped.
    """
    names = [f"{kind}_{split}.npy" for split in ("train", "test") for kind in "xy"]
    if not (cache / "classes.json").exists():
        from torchvision.datasets import ImageFolder
        train = ImageFolder(place / "train")
        notes = place / "val" / "val_annotations.txt"
        if notes.exists():
            truth = [line.split("\t")[:2] for line in notes.read_text().splitlines()]
            test = [(place / "val" / "images" / f, train.class_to_idx[label]) for f, label in truth]
        else:
            other = ImageFolder(place / ("test" if (place / "test").exists() else "val"))
            test = [(f, train.class_to_idx[other.classes[k]]) for f, k in other.samples]
        part = Path(f"{cache}.part{os.getpid()}")
        part.mkdir(parents=True)
        try:
            for (x, y), samples in zip((names[:2], names[2:]), (train.samples, test), strict=True):
                decode([f for f, _ in samples], size, part / x)
                np.save(part / y, np.array([k for _, k in samples], np.int64))
            write_json(part / "classes.json", train.classes)
            part.rename(cache)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    x, y, x_test, y_test = (torch.from_numpy(np.load(cache / n, mmap_mode="c")) for n in names)
    classes = json.loads((cache / "classes.json").read_text())
    return Data(x.permute(0, 3, 1, 2), y, x_test.permute(0, 3, 1, 2), y_test, classes)


def decode(files: list, size: int, path: Path) -> None:
    """Image files as one uint8 array [N,H,W,3] in a .npy file, one image in memory at a time."""
    from PIL import Image, ImageOps
    shape, store = (size, size) if size else Image.open(files[0]).size, None
    store = np.lib.format.open_memmap(path, "w+", np.uint8, (len(files), shape[1], shape[0], 3))
    for i, file in enumerate(progress_bar(files, "decoding")):
        try:
            image = Image.open(file).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise InfoardError(f"image {file} is corrupt ({error}): delete or replace it") from None
        store[i] = image if image.size == shape else ImageOps.fit(image, shape)


def load_dataset(name: str, data_dir: str | Path = "data", *, download: bool = True,
                 image_size: int = 0, cache: str | Path = "runs/cache") -> Data:
    """A data set of DATASETS as uint8 tensors; data_dir: its parent, its folder or its archive."""
    if lookup(DATASETS, name, "data set") == "shapes":
        return render_shapes()
    root, cache = Path(data_dir), Path(cache)
    place = locate(name, root, cache)
    if place is None and download and name != "folder":
        fetch(name, root)
        place = locate(name, root, cache)
    if place is None:
        raise InfoardError(f"no {name} in {root}: put {missing(name)} there, or say with --data-dir "
                           "where it is")
    try:
        if name in ("folder", "tinyimagenet"):
            return read_folder(place, image_size, cache / f"{name}-{image_size}-{fingerprint(place)}")
        return read_arrays(name, place)
    except ImportError as error:
        raise InfoardError(f"{name} needs {error.name}: pip install {error.name}") from None
    except (OSError, EOFError, KeyError, pickle.UnpicklingError, RuntimeError, ValueError) as error:
        if isinstance(error, InfoardError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise InfoardError(f"{place} is incomplete or corrupt ({error}): get it again") from None


def class_balanced(y: Tensor, n: int) -> Tensor:
    """Sorted indices of n images, as evenly over the classes as they allow; always the same ones."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    place = torch.empty_like(y)  # of each image among those of its class
    for k in y.unique():
        mine = order[y[order] == k]
        place[mine] = torch.arange(len(mine))
    return order[place[order].argsort(stable=True)[:n]].sort().values


def to_float(x: Tensor, device: str | torch.device) -> Tensor:
    """uint8 (or float) images as float in [0,1] on the device, channels last."""
    x = x.to(device, non_blocking=True)
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return x.contiguous(memory_format=torch.channels_last)


def augment(x: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Random crop after zero padding, random mirror image; all at once: [B,C,H,W] -> like x."""
    (b, _, h, w), device = x.shape, x.device
    down, right = torch.randint(0, 2 * pad + 1, (2, b, 1), generator=generator)
    mirror = (torch.rand(b, 1, generator=generator) < 0.5) & flip
    columns = torch.arange(w).expand(b, w)
    columns = (right + torch.where(mirror, columns.flip(1), columns)).to(device)  # [B, W]
    rows = (down + torch.arange(h)).to(device)  # [B, H]
    picture = torch.arange(b, device=device)[:, None, None]
    x = F.pad(x, (pad,) * 4)[picture, :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return x.permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------
# 9. Evaluation
# --------------------------------------------------------------------------------------------------

def correct(net: nn.Module, x: Tensor, y: Tensor, attack: Callable | None = None, size: int = 256,
            text: str = "") -> Tensor:
    """Which samples are classified right, bool [N] on the CPU, after attack(net, x, y) if given."""
    device, hits = next(net.parameters()).device, [torch.zeros(0, dtype=torch.bool)]
    with frozen_eval(net):
        for i in progress_bar(range(0, len(x), size), text):
            x_b, y_b = to_float(x[i:i + size], device), y[i:i + size].to(device)
            x_b = attack(net, x_b, y_b) if attack else x_b
            with torch.no_grad():
                hits.append((net(x_b).argmax(1) == y_b).cpu())
    return torch.cat(hits)


def check_teacher(net: nn.Module, x: Tensor, y: Tensor, name: str, classes: int) -> float:
    """Clean accuracy in per cent beside the published; one below twice chance stops the run."""
    accuracy = 100 * correct(net, x, y).float().mean().item()
    plain = name.lower().replace("-", "_")
    known = next((f", published {v}" for k, v in PUBLISHED.items() if k.lower() in plain), "")
    print(f"teacher {name}: clean accuracy {accuracy:.2f} on {len(x)} test images{known}")
    if accuracy <= 200 / classes:
        raise InfoardError(f"teacher {name} has clean accuracy {accuracy:.1f}, chance is "
                           f"{100 / classes:.1f}: a wrong file, classes in another order, or a "
                           "normalisation that it expects (--teacher-norm)")
    return accuracy


ATTACKS = dict(  # attack(net, x, y, eps, generator); steps grow with eps, 2/255 and 0.003 at 8/255
    fgsm=lambda net, x, y, eps, g: fgsm(net, x, y, eps=eps),
    pgd_sat=lambda net, x, y, eps, g: pgd_ce(
        net, x, y, threat=Threat(eps, eps / 4, 20), generator=g),
    pgd_trades=lambda net, x, y, eps, g: pgd_ce(
        net, x, y, threat=Threat(eps, eps * 0.003 * 255 / 8, 20), generator=g),
    cw=lambda net, x, y, eps, g: cw_linf(net, x, y, threat=Threat(eps, eps / 4, 30), generator=g),
)
ASKED = dict(clean=(), fgsm=("fgsm",), pgd=("pgd_sat", "pgd_trades"), cw=("cw",), apgd=(), aa=())
METRICS = ("clean", "fgsm", "pgd_sat", "pgd_trades", "cw", "apgd", "aa", "worst", "worst_class")


def autoattack(net: nn.Module, x: Tensor, y: Tensor, parts: list[str], *, eps: float, size: int,
               seed: int, classes: int) -> Iterator[tuple[str, Tensor]]:
    """(part, still right [N]) after each part of AutoAttack [AA], run on what is left by then."""
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise InfoardError("AutoAttack is missing: pip install pyautoattack, or leave apgd and aa out "
                           "of --attacks") from None
    aa = AutoAttack(net, eps=eps, norm="Linf", seed=seed, device=next(net.parameters()).device)
    aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = min(9, classes - 1)
    alive = torch.ones(len(x), dtype=torch.bool)
    for part in parts:
        aa.attacks_to_run, rows = [part], alive.nonzero().squeeze(1)
        alive[rows] = correct(net, x[rows], y[rows], lambda _, x, y: aa.run_standard_evaluation(
            x.contiguous(), y, batch_size=len(x))[0], size, part)
        yield part, alive.clone()


def interval(share: float, n: int) -> list[float]:
    """Wilson's 95% interval of a share of n samples, in per cent."""
    z = 1.96
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    ends = (share + z * z / (2 * n) + side * half for side in (-1, 1))
    return [round(100 * end / (1 + z * z / n), 2) for end in ends]


def evaluate(model: nn.Module, x: Tensor, y: Tensor, *, eps: float = 8 / 255,
             attacks: str = "clean,fgsm,pgd,cw,apgd", batch_size: int = 256,
             classes: int | None = None, seed: int = 0) -> dict:
    """Accuracies in per cent under L-infinity attacks of radius eps; x [N,C,H,W], uint8 or in [0,1].

    A sample is robust if it is right on x and on x'. pgd: PGD-20 with steps of 2/255 ("SAT") and 0.003
    ("TRADES"); cw: CW_inf with 30 steps; apgd: AutoAttack's APGD-CE and APGD-T; aa: all of AutoAttack;
    worst: right under every attack that was run, worst_class: in the weakest class. None: not run.
    ci95: Wilson's intervals. warnings: signs that gradients are masked and PGD flatters.
    """
    wanted = [w.strip() for w in attacks.split(",") if w.strip()]
    for w in wanted:
        lookup(ASKED, w, "attack")
    if not len(x) or x.dtype != torch.uint8 and not 0 <= x.min() <= x.max() <= 1:
        raise InfoardError("evaluate needs images in [0, 1]: normalise inside the model")
    classes, after = classes or int(y.max()) + 1, {}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    survived = dict(clean=correct(model, x, y, None, batch_size))
    rows = survived["clean"].nonzero().squeeze(1)  # the others are lost already
    for name in (n for w in wanted for n in ASKED[w]):
        attack = partial(ATTACKS[name], eps=eps, g=generator)
        after[name] = correct(model, x[rows], y[rows], attack, batch_size, name)
    if {"apgd", "aa"} & set(wanted):
        parts = ["apgd-ce"] + ["apgd-t"] * (classes > 3)  # the targeted loss needs four classes
        parts += ["fab-t", "square"] if "aa" in wanted else []
        with torch.random.fork_rng():  # AutoAttack seeds torch
            after |= dict(autoattack(model, x[rows], y[rows], parts, eps=eps, size=batch_size,
                                     seed=seed, classes=classes))
            after |= dict(apgd=after.get("apgd-t", after["apgd-ce"]))
            after |= dict(aa=after["square"]) if "aa" in wanted else {}
    for name in METRICS:
        if name in after:
            survived[name] = torch.zeros_like(survived["clean"])
            survived[name][rows] = after[name]
    return summary(survived, after, y.cpu(), classes)


def summary(survived: dict[str, Tensor], after: dict[str, Tensor], y: Tensor, classes: int) -> dict:
    """The result of evaluate, from who survived what; after: among the clean ones, part by part."""
    worst = torch.stack(list(survived.values())).all(0)
    shares = {k: v.double().mean().item() for k, v in (survived | dict(worst=worst)).items()}
    result = {k: round(100 * shares[k], 2) if k in shares else None for k in METRICS}
    per_class = [100 * worst[y == k].double().mean().item() for k in range(classes) if (y == k).any()]
    warnings = [f"{k} is {result['pgd_sat'] - result[k]:.1f} points under PGD-20"
                for k in ("cw", "apgd", "aa") if None not in (result[k], result["pgd_sat"])
                and result["pgd_sat"] - result[k] >= 8]
    if "square" in after and (after["fab-t"] & ~after["square"]).double().mean() > 0.01:
        warnings.append("Square, which uses no gradients, beats APGD")
    return result | dict(worst_class=round(min(per_class), 2), n=len(y), warnings=warnings,
                         per_class=[round(v, 2) for v in per_class],
                         ci95={k: interval(v, len(y)) for k, v in shares.items()})


def accuracy_over_eps(net: nn.Module, x: Tensor, y: Tensor, radii=(0, 2, 4, 8, 12, 16, 24, 32, 64),
                      size: int = 256) -> dict[str, float]:
    """PGD-20 accuracy in per cent at each radius in 1/255; it has to reach zero."""
    generator = torch.Generator(next(net.parameters()).device).manual_seed(0)
    return {str(r): round(100 * correct(net, x, y, partial(
        ATTACKS["pgd_sat"], eps=r / 255, g=generator), size).double().mean().item(), 2) for r in radii}


# --------------------------------------------------------------------------------------------------
# 10. Checkpoints and training
# --------------------------------------------------------------------------------------------------

def save_checkpoint(path: Path, state: dict) -> None:
    """A dict of tensors and plain values, for load_tensors."""
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT) | state, buffer)
    write_file(path, buffer.getbuffer())


def pick_device(name: str) -> torch.device:
    """A device that is there; auto: CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InfoardError(f"device {name!r} is not available here: --device cpu or auto") from None


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The half precision to train in; auto: bf16 where the hardware multiplies it, else none."""
    if amp == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else \
            device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    return dict(bf16=torch.bfloat16, fp16=torch.float16, off=None)[amp]


def lr_at(cfg: Config, share: float) -> float:
    """The learning rate when a share of all steps is done."""
    if cfg.schedule == "step":
        return cfg.lr * 0.1 ** sum(share >= drop for drop in (0.72, 0.87, 0.95))
    rise, fall = share / 0.05, 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))
    return cfg.lr * max(0.01, rise if share < 0.05 else fall)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list to which the first SIGINT or SIGTERM is added; a second one acts as usual."""
    caught, usual = [], {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, usual[number])

    with contextlib.suppress(ValueError):  # outside the main thread signals are left alone
        usual = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Run:
    """All that changes during a training, to be saved and brought back whole, and its three verbs."""

    def __init__(self, cfg: Config, data: Data, teacher: nn.Module | None, device: torch.device):
        self.cfg, self.data, self.teacher, self.device = cfg, data, teacher, device
        size, dtype = data.x_train.shape[-1], amp_dtype(cfg.amp, device)
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            self.student = build_model(cfg.student, len(data.classes), size).to(
                device, memory_format=torch.channels_last)
            self.ema = AveragedModel(self.student, use_buffers=True,
                                     multi_avg_fn=get_ema_multi_avg_fn(cfg.ema)) if cfg.ema else None
            self.info = InfoARD(
                self.student, teacher, image_shape=(3, size, size), asa=cfg.asa, tau=cfg.tau,
                lam=(cfg.lam_lo, cfg.lam_hi), mim=cfg.mim, w_feat=cfg.w_feat, w_att=cfg.w_att,
                w_rel=cfg.w_rel, dim=cfg.critic_dim) if cfg.infoard else None
        groups = [self.student.parameters(), *([self.info.parameters()] if self.info else [])]
        groups = [dict(params=params) for params in map(list, groups) if params]
        self.optimizer = torch.optim.SGD(groups, cfg.lr, 0.9, weight_decay=cfg.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
        self.forward = torch.compile(self.student) if cfg.compile else self.student
        self.generators = dict(data=torch.Generator().manual_seed(cfg.seed),
                               attack=torch.Generator(device).manual_seed(cfg.seed))
        pool = class_balanced(data.y_train, cfg.subset or len(data.y_train))
        self.val = pool[class_balanced(data.y_train[pool], min(cfg.val_size, len(pool) // 10))]
        self.train = pool[~torch.isin(pool, self.val)]
        self.x = data.x_train
        if device.type == "cuda" and self.x.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.x = self.x.to(device)
        self.parts = dict(model=self.student, ema=self.ema, optimizer=self.optimizer,
                          critics=self.info and self.info.critics, scaler=self.scaler)
        self.parts = {k: part for k, part in self.parts.items() if part is not None}
        self.at = dict(epoch=0, position=0, step=0, best=-1.0, best_epoch=0, seconds=0.0)
        self.order, self.sums, self.history = torch.zeros(0, dtype=torch.long), {}, []

    @property
    def evaluated(self) -> nn.Module:
        """The net that is validated and reported: the weight average, if there is one."""
        return self.ema.module if self.ema else self.student

    def label(self) -> dict:
        """What every checkpoint says of its net."""
        return dict(config=dataclasses.asdict(self.cfg), size=self.x.shape[-1],
                    classes=self.data.classes)

    def state(self) -> dict:
        return self.label() | self.at | dict(
            order=self.order, sums=self.sums, history=self.history,
            generators={k: g.get_state() for k, g in self.generators.items()},
            **{k: part.state_dict() for k, part in self.parts.items()})

    def load(self, path: Path) -> None:
        """Back to the state of a checkpoint, if that was made with the same settings."""
        state = load_tensors(path)
        if state.get("format") != FORMAT or "order" not in state:
            raise InfoardError(f"{path} is no checkpoint to go on from: choose another --out")
        free = ("device", "out", "resume", "figures", "progress", "attacks", "eval_subset", "compile",
                "eval_batch", "data_dir", "download")
        for name, value in dataclasses.asdict(self.cfg).items():
            if name not in free and (old := state["config"].get(name)) != value:
                raise InfoardError(f"{path} was made with --{name.replace('_', '-')} {old}, not {value}"
                                   ": say the same or choose another --out")
        for k, part in self.parts.items():
            part.load_state_dict(state[k])
        for k, g in self.generators.items():
            g.set_state(state["generators"][k])
        self.at, self.order, self.history = {k: state[k] for k in self.at}, state["order"], state["history"]
        self.sums = {k: v.to(self.device) for k, v in state["sums"].items()}

    def begin_epoch(self) -> None:
        """A new order of the training images; a last batch of one is left out (batch norm)."""
        order = torch.randperm(len(self.train), generator=self.generators["data"])
        self.order, self.sums = self.train[order], {}
        if len(order) % self.cfg.batch_size == 1:
            self.order = self.order[:-1]

    def step(self) -> None:
        """One batch: draw, augment, attack, train, count. Nothing here waits for the device."""
        cfg, begin = self.cfg, self.at["position"]
        rows = self.order[begin:begin + cfg.batch_size]
        x = augment(self.x[rows.to(self.x.device)], self.generators["data"], self.x.shape[-1] // 8,
                    self.data.flip)
        x, y = to_float(x, self.device), self.data.y_train[rows].to(self.device)
        share = (self.at["epoch"] + begin / len(self.order)) / cfg.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(cfg, share)
        self.student.train()
        step = Step(self.forward, self.teacher, x, y, cfg=cfg, info=self.info, progress=share,
                    generators=self.generators)
        with self.autocast():
            loss = step.loss()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update_parameters(self.student)
        self.count(step, loss.detach())
        self.at |= dict(position=begin + len(rows), step=self.at["step"] + 1)

    def count(self, step: Step, loss: Tensor) -> None:
        """Adds a batch to the sums of the epoch, on the device."""
        b, threat = len(step.y), step.threat
        eps = torch.as_tensor(threat.eps, dtype=torch.float, device=self.device).expand(b)
        classes = F.one_hot(step.y, len(self.data.classes)).float()  # [B, K]
        gradients = float(sum(threat.schedule(b)[1])) if self.cfg.framework != "natural" else 0.0
        new = {k: v.float() * b for k, v in dict(loss=loss, **(self.info.terms if self.info else {})).items()}
        new |= dict(images=loss.new_tensor(float(b)), gradients=loss.new_tensor(gradients), eps=eps.sum(),
                    class_eps=eps @ classes, class_images=classes.sum(0),
                    eps_hist=torch.histc(eps, 40, 0, 2 * self.cfg.eps or 1))
        self.sums = {k: self.sums.get(k, 0) + v for k, v in new.items()}

    def check_finite(self, out: Path) -> None:
        if not math.isfinite(self.sums["loss"]):
            good = f"the last good checkpoint is {out / 'last.pt'}" if self.history else "none was saved yet"
            raise InfoardError(f"the loss is not finite at step {self.at['step']}: lower --lr or use "
                               f"--amp off; {good}")

    def end_epoch(self, out: Path, seconds: float) -> dict:
        """Validation, the row of the log, best.pt if it is the best, last.pt."""
        sums = {k: v.tolist() for k, v in self.sums.items()}
        per_class = [a / max(n, 1) for a, n in zip(sums.pop("class_eps"), sums.pop("class_images"), strict=True)]
        hist, images = sums.pop("eps_hist"), sums.pop("images")
        x, y = self.data.x_train[self.val], self.data.y_train[self.val]
        attack = partial(ATTACKS["pgd_sat"], eps=self.cfg.eps, g=torch.Generator(self.device).manual_seed(0))
        with self.autocast():
            hits = [correct(self.evaluated, x, y, a, self.cfg.eval_batch, "validation") for a in (None, attack)]
        clean, robust = (round(100 * h.double().mean().item(), 2) for h in (hits[0], hits[0] & hits[1]))
        self.at |= dict(epoch=self.at["epoch"] + 1, position=0, seconds=self.at["seconds"] + seconds)
        row = dict(epoch=self.at["epoch"], lr=self.optimizer.param_groups[0]["lr"], val_clean=clean,
                   val_pgd=robust, **{k: v / images for k, v in sums.items()}, eps_hist=hist, eps_top=2 * self.cfg.eps,
                   class_eps=per_class,
                   images_per_s=round(images / seconds, 1), seconds=round(self.at["seconds"], 1))
        self.history.append(row)
        if robust > self.at["best"] or not len(y):
            self.at |= dict(best=robust, best_epoch=row["epoch"])
            save_checkpoint(out / "best.pt", self.label() | dict(
                epoch=row["epoch"], val_pgd=robust, model=self.evaluated.state_dict()))
        save_checkpoint(out / "last.pt", self.state())
        write_file(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.history).encode())
        return row


def record(cfg: Config) -> dict:
    """What a run was made with: settings, command, versions, machine, source and teacher file."""
    teacher = Path(cfg.teacher or "")
    return dict(settings=dataclasses.asdict(cfg), argv=sys.argv, python=platform.python_version(),
                torch=torch.__version__, numpy=np.__version__, machine=platform.machine(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                source_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
                teacher_sha256=hashlib.sha256(teacher.read_bytes()).hexdigest() if teacher.is_file() else None)


def get_teacher(cfg: Config, data: Data, device: torch.device) -> nn.Module | None:
    """The teacher that the settings ask for, checked; if none is named, one is trained once, and kept."""
    if cfg.framework not in NEED_TEACHER and not cfg.infoard:
        return None
    path, size = cfg.teacher, data.x_train.shape[-1]
    if path is None:
        same = ("dataset", "subset", "val_size", "image_size", "beta", "kl_reduction", "eps", "steps", "step_size",
                "batch_size", "lr", "weight_decay", "schedule", "amp") + ("data_dir",) * (cfg.dataset == "folder")
        recipe = {k: getattr(cfg, k) for k in same} | dict(
            student=cfg.teacher_arch, framework=cfg.teacher_framework, epochs=cfg.teacher_epochs)
        digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
        out = Path("runs/teachers") / f"{cfg.dataset}-{cfg.teacher_arch}-{cfg.teacher_framework}-{digest}"
        if not (out / "results.json").exists():
            print(f"no --teacher: {cfg.teacher_epochs} epochs of {cfg.teacher_framework} for one, kept in {out}")
            train(Config(**recipe | dict(
                data_dir=cfg.data_dir, download=cfg.download, device=cfg.device, infoard=False, figures=False,
                out=str(out), resume=True, attacks="clean,pgd", eval_subset=cfg.eval_subset)))
        path = str(out / "best.pt")
    teacher = load_teacher(path, cfg.teacher and cfg.teacher_arch, len(data.classes), size=size,
                           norm=cfg.teacher_norm, dataset=cfg.dataset, device=device)
    check_teacher(teacher, data.x_test[:1000], data.y_test[:1000], path, len(data.classes))
    return teacher


def train(cfg: Config) -> dict:
    """The whole job: data, teacher, student, evaluation, files in cfg.out. Returns results.json."""
    cfg = cfg.resolved()
    out, device = Path(cfg.out), pick_device(cfg.device)
    if (out / "results.json").exists():
        print(f"{out} is finished: another --out or --seed makes another run")
        return json.loads((out / "results.json").read_text())
    if (out / "last.pt").exists() and not cfg.resume:
        raise InfoardError(f"{out} holds an unfinished run: go on with --resume, or choose another --out")
    lookup(FRAMEWORKS, cfg.framework, "framework")
    build_model(cfg.student, 2)
    write_json(out / "config.json", record(cfg))
    data = load_dataset(cfg.dataset, cfg.data_dir, download=cfg.download, image_size=cfg.image_size)
    run = Run(cfg, data, get_teacher(cfg, data, device), device)
    if (out / "last.pt").exists():
        run.load(out / "last.pt")
    print(f"{out}: {cfg.student} by {cfg.framework}{' + InfoARD' * cfg.infoard}, {len(run.train)} training and "
          f"{len(run.val)} validation images, {device}, from epoch {run.at['epoch'] + 1}")
    with caught_signals() as caught:
        for epoch in range(run.at["epoch"], cfg.epochs):
            if run.at["position"] == 0:
                run.begin_epoch()
            began, first = time.time(), run.at["position"]
            for i in progress_bar(range(first, len(run.order), cfg.batch_size), f"epoch {epoch + 1}"):
                run.step()
                if epoch == 0 and i == first + 4 * cfg.batch_size:
                    minutes = (time.time() - began) / 5 * len(run.order) / cfg.batch_size * cfg.epochs / 60
                    print(f"about {minutes:.1f} minutes for {cfg.epochs} epochs, without validation")
                if caught or run.at["step"] % 50 == 0:  # the log point
                    run.check_finite(out)
                if caught:
                    save_checkpoint(out / "last.pt", run.state())
                    print(f"stopped by {signal.Signals(caught[0]).name} at step {run.at['step']}, all saved in "
                          f"{out / 'last.pt'}: --resume goes on")
                    raise SystemExit(128 + caught[0])
            run.check_finite(out)
            row = run.end_epoch(out, time.time() - began)
            terms = "".join(f"{k} {row[k]:.3f}  " for k in ("feat", "att", "rel") if k in row)
            print(f"epoch {row['epoch']:3d}  lr {row['lr']:.4f}  loss {row['loss']:8.4f}  {terms}"
                  f"eps {255 * row['eps']:.2f}/255  val clean {row['val_clean']:.2f}  pgd {row['val_pgd']:.2f}"
                  f"  {row['images_per_s']:.0f} img/s", flush=True)
    return finish(run, out)


def test_images(data: Data, n: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """n class-balanced test images; 0: all; None: 500 on a CPU, else all."""
    n = n if n is not None else 500 * (device.type == "cpu")
    rows = class_balanced(data.y_test, n or len(data.y_test))
    return data.x_test[rows], data.y_test[rows]


def finish(run: Run, out: Path) -> dict:
    """The one look at the test images: last and best under all attacks, tables, figures."""
    cfg, device = run.cfg, run.device
    x, y = test_images(run.data, cfg.eval_subset, device)
    options = dict(eps=cfg.eps, attacks=cfg.attacks, batch_size=cfg.eval_batch, classes=len(run.data.classes))
    results = dict(classes=run.data.classes, last=evaluate(run.evaluated, x, y, **options) | dict(epoch=run.at["epoch"]))
    results["best"] = results["last"]
    if run.at["best_epoch"] != run.at["epoch"]:
        best = load_weights(out / "best.pt").to(device, memory_format=torch.channels_last)
        results["best"] = evaluate(best, x, y, **options) | dict(epoch=run.at["best_epoch"])
    if cfg.figures:
        curve = accuracy_over_eps(run.evaluated, x[:256], y[:256], size=cfg.eval_batch)
        results["over_eps"] = curve
        if curve["64"]:
            results["last"]["warnings"].append(f"{curve['64']:.1f}% survive eps = 64/255")
        save_checkpoint(out / "sheet.pt", sheet(run, x[:256], y[:256]))
    write_json(out / "results.json", results)
    print(report({f"{out.name} {k}": results[k] for k in ("best", "last")}))
    if cfg.figures:
        draw_figures(out)
    print(f"files in {out}: results.json, log.jsonl, best.pt, last.pt" + ", figures/" * cfg.figures)
    return results


# --------------------------------------------------------------------------------------------------
# 11. Figures and tables
# --------------------------------------------------------------------------------------------------

def report(rows: dict[str, dict]) -> str:
    """{name: result of evaluate} as a Markdown table, with the warnings below."""
    used = [m for m in METRICS if any(r[m] is not None for r in rows.values())]
    lines = [["accuracy (%)", *used, "n"]] + [
        [name, *("-" if r[m] is None else f"{r[m]:.2f}" for m in used), str(r["n"])] for name, r in rows.items()]
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * w for w in width])
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, width, strict=True)) + " |" for line in lines]
    return "\n".join(text + [f"warning, gradients may be masked: {name}: {w}" for name, r in rows.items()
                             for w in r["warnings"]])


def sheet(run: Run, x: Tensor, y: Tensor, rows: int = 5) -> dict:
    """What figure_sheet shows: images from the weakest to the strongest, attacked, with attention."""
    nets = dict(teacher=run.teacher, student=run.evaluated)
    nets = {name: net for name, net in nets.items() if net is not None}
    x, y = to_float(x, run.device), y.to(run.device)
    with torch.no_grad(), frozen_eval(*nets.values()):
        lead = margin(next(iter(nets.values()))(x).softmax(1), y)
    chosen = lead.argsort()[torch.linspace(0, len(x) - 1, rows).long()]
    x, y = x[chosen], y[chosen]
    x_adv = pgd_ce(run.evaluated, x, y, threat=Threat(run.cfg.eps, run.cfg.eps / 4, 20), init="none")
    maps, said = {}, {}
    for name, net in nets.items():
        taps = Taps(net, x)
        for state, images in dict(clean=x, attacked=x_adv).items():
            with torch.no_grad(), frozen_eval(net):
                said[f"{name} {state}"] = net(images).argmax(1).tolist()
            f = [f for k, f in taps.take().items() if k != "penultimate"][-2:][0]
            maps[f"{name} {state}"] = attention_map(f).view(rows, *f.shape[-2:]).cpu()
        taps.close()
    return dict(x=x.cpu(), x_adv=x_adv.cpu(), y=y.tolist(), lead=lead[chosen].tolist(), maps=maps, said=said,
                eps=run.cfg.eps, classes=run.data.classes)


def draw_figures(out: Path) -> list[Path]:
    """Figures of a finished run as PNG and PDF, from its config, log, results and sheet alone."""
    if not (out / "results.json").exists() or not (out / "log.jsonl").exists():
        raise InfoardError(f"{out} holds no finished run (results.json, log.jsonl)")
    try:
        import matplotlib
    except ImportError:
        raise InfoardError("figures need matplotlib: pip install matplotlib, or --no-figures") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    sheet = load_tensors(out / "sheet.pt") if (out / "sheet.pt").exists() else None
    (out / "figures").mkdir(exist_ok=True)
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 200, "pdf.fonttype": 42,
             "figure.constrained_layout.use": True}
    files = []
    with plt.rc_context(style):
        for draw in (figure_curves, figure_strength, figure_over_eps, figure_sheet):
            if fig := draw(plt, log, results, sheet):
                for kind in ("png", "pdf"):
                    files.append(out / "figures" / f"{draw.__name__.removeprefix('figure_')}.{kind}")
                    fig.savefig(files[-1])
                plt.close(fig)
    return files


def figure_curves(plt, log, results, sheet):
    """Validation accuracy, training loss and mutual information over epochs."""
    panels = {"validation accuracy (%)": dict(val_clean="clean", val_pgd="PGD-20"),
              "training loss (nats)": dict(loss=""),
              "mutual information (nats)": dict(feat="features", att="attention")}
    panels = {title: lines for title, lines in panels.items() if any(k in log[0] for k in lines)}
    fig, axes = plt.subplots(1, len(panels), figsize=(2.3 * len(panels), 2.0))
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for k, label in lines.items():
            if k in log[0]:
                ax.plot([r["epoch"] for r in log], [r[k] for r in log], label=label)
        ax.set(xlabel="epoch", ylabel=title)
        if len(lines) > 1:
            ax.legend()
    axes[0].axvline(results["best"]["epoch"], color="0.5", lw=0.8, ls=":")
    return fig


def figure_strength(plt, log, results, sheet):
    """How often each radius was used in each epoch, and each class's mean radius in the last."""
    share = np.array([r["eps_hist"] for r in log]).T
    share, top = 100 * share / share.sum(0).clip(1), 255 * log[0]["eps_top"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(5.2, 2.2))
    image = left.imshow(share, aspect="auto", origin="lower", extent=(0.5, len(log) + 0.5, 0, top))
    left.set(xlabel="epoch", ylabel=r"radius $\epsilon_i$ (1/255)")
    left.grid(False)
    fig.colorbar(image, ax=left, label="images (%)")
    means = dict(sorted(zip(results["classes"], log[-1]["class_eps"]), key=lambda pair: pair[1])[-20:])
    right.barh(list(means), [255 * v for v in means.values()])
    right.axvline(255 * log[-1]["eps"], color="0.5", lw=0.8, ls=":")
    right.set(xlabel=r"mean $\epsilon_i$ in the last epoch (1/255)", xlim=(0.9 * 255 * min(means.values()), None))
    return fig


def figure_over_eps(plt, log, results, sheet):
    """Accuracy under PGD-20 over the radius."""
    curve = results.get("over_eps")
    if not curve:
        return None
    fig, ax = plt.subplots(figsize=(2.8, 2.0))
    ax.plot([int(r) for r in curve], list(curve.values()), marker="o", ms=3)
    ax.set(xlabel=r"$\epsilon$ (1/255)", ylabel="PGD-20 accuracy (%)", ylim=(0, 100))
    return fig


def figure_sheet(plt, log, results, sheet):
    """Clean, perturbation, attacked, and the attention of both nets on both; weakest instance first."""
    if sheet is None:
        return None
    x, x_adv, names = sheet["x"], sheet["x_adv"], sheet["classes"]
    columns = ["clean", "perturbation", "attacked", *sheet["maps"]]
    fig, axes = plt.subplots(len(x), len(columns), figsize=(0.95 * len(columns), 1.05 * len(x)))
    for i, line in enumerate(axes):
        change = (x_adv[i] - x[i]) / (2 * sheet["eps"] or 1) + 0.5
        pictures = [p.permute(1, 2, 0).clamp(0, 1) for p in (x[i], change, x_adv[i])]
        for ax, title, picture in zip(line, columns, pictures + [m[i] for m in sheet["maps"].values()], strict=True):
            ax.imshow(picture, cmap="magma")
            ax.set(xticks=[], yticks=[])
            ax.set_title(title.replace(" ", "\n") if i == 0 else "", fontsize=7)
            if title in sheet["said"]:
                said = sheet["said"][title][i]
                ax.set_xlabel(names[said], fontsize=6, labelpad=1, color="C2" if said == sheet["y"][i] else "C3")
        line[0].set_ylabel(f"{names[sheet['y'][i]]}\nlead {sheet['lead'][i]:+.2f}", fontsize=6)
    return fig


# --------------------------------------------------------------------------------------------------
# 12. Command line
# --------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Errors as one line."""

    def error(self, message):
        raise InfoardError(f"{message} (see --help)")


def number(text: str) -> float:
    """8/255 or 0.0314 as a float."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each field of Config; the result holds only those that were given."""
    for f in dataclasses.fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                                help=f"{text} (default {'yes' if f.default else 'no'})")
            continue
        preset = "/".join(str(p[f.name]) for p in PRESETS.values() if f.name in p)
        default = f"{255 * f.default:.0f}/255" if f.name in ("eps", "step_size") else preset or f.default
        text += f" (default {default})" if default is not None else ""
        parser.add_argument(flag, default=argparse.SUPPRESS, choices=f.metadata["choices"] or None,
                            type={float: number, int: int, int | None: int}.get(f.type, str),
                            metavar=None if f.metadata["choices"] else f.name.upper(), help=text)


def run_train(**given) -> None:
    """Train a student (and a teacher), evaluate it, draw figures. The default verb."""
    train(Config(**given))


def run_eval(path: str, **given) -> None:
    """Evaluate a checkpoint, ours or a stranger's; with --out DIR, also write DIR/eval.json."""
    file = load_tensors(path) if Path(path).exists() else {}
    saved = file["config"] if file.get("format") == FORMAT else {}
    keep = ("dataset", "data_dir", "image_size", "eps", "eval_batch")
    cfg = Config(**{k: saved[k] for k in keep if k in saved} | given)
    if not saved and "dataset" not in given:
        raise InfoardError(f"{path} does not say what it was trained on: add --dataset")
    device = pick_device(cfg.device)
    data = load_dataset(cfg.dataset, cfg.data_dir, download=cfg.download, image_size=cfg.image_size)
    net = load_teacher(path, cfg.teacher_arch, len(data.classes), size=data.x_test.shape[-1],
                       norm=cfg.teacher_norm, dataset=cfg.dataset, device=device)
    result = evaluate(net, *test_images(data, cfg.eval_subset, device), eps=cfg.eps, attacks=cfg.attacks,
                      batch_size=cfg.eval_batch, classes=len(data.classes))
    print(report({Path(path).name: result}))
    print("95% intervals: " + ", ".join(f"{k} {lo} to {hi}" for k, (lo, hi) in result["ci95"].items()))
    if cfg.out:
        write_json(Path(cfg.out) / "eval.json", result | dict(checkpoint=path, eps=cfg.eps, dataset=cfg.dataset))


def run_tables(path: str) -> None:
    """Print a table of the finished runs below a folder."""
    files = sorted(Path(path).rglob("results.json"))
    if not files:
        raise InfoardError(f"no finished runs (results.json) below {path}")
    rows = {f.parent.name: json.loads(f.read_text()) for f in files}
    print(report({f"{name} {k}": r[k] for name, r in rows.items() for k in ("best", "last")}))


def run_figures(path: str) -> None:
    """Draw the figures of a finished run again."""
    print(*draw_figures(Path(path)), sep="\n")


def run_export(path: str) -> None:
    """Write plain weights, and safetensors and ONNX where these are installed; without critics."""
    net, stem, size = load_weights(path).eval(), Path(path).with_suffix(""), load_tensors(path).get("size", 32)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    write_file(Path(f"{stem}.weights.pt"), buffer.getbuffer())
    print(f"{stem}.weights.pt: state dict, {sum(p.numel() for p in net.parameters()):,} parameters")
    try:
        from safetensors.torch import save_file
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, f"{stem}.safetensors")
        print(f"{stem}.safetensors")
    except ImportError:
        print("no .safetensors: pip install safetensors")
    try:
        import onnx  # noqa: F401
        torch.onnx.export(net, (torch.zeros(1, 3, size, size),), f"{stem}.onnx", input_names=["x"],
                          output_names=["logits"], dynamic_axes={"x": {0: "batch"}}, dynamo=False)
        print(f"{stem}.onnx: x [batch,3,{size},{size}] in [0,1] -> logits")
    except ImportError:
        print("no .onnx: pip install onnx")


VERBS = dict(train=run_train, eval=run_eval, tables=run_tables, figures=run_figures, export=run_export)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    try:
        action = lookup(VERBS, verb, "verb")
        parser = Parser(f"infoard.py {verb}", description=action.__doc__, allow_abbrev=False,
                        epilog="verbs: " + ", ".join(VERBS))
        if verb != "train":
            parser.add_argument("path", metavar="DIR" if verb in ("tables", "figures") else "CKPT")
        if verb in ("train", "eval"):
            add_settings(parser)
        given = vars(parser.parse_args(argv))
        os.environ["INFOARD_PROGRESS"] = str(int(given.get("progress", True)))
        action(**given)
        return 0
    except InfoardError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "out of memory on the device: lower --batch-size or --eval-batch"
    except OSError as error:
        message = f"{error.strerror or error} {error.filename or ''}".strip()
    print(f"infoard: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
