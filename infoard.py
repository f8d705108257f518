"""InfoARD: adversarial robustness distillation in one file.

A robust teacher T is distilled into a small student S that resists L-infinity attacks. InfoARD adds
two parts to any distillation framework: ASA attacks each image with a strength of its own, and MIM
keeps the student informative about the teacher's features (and, if asked to, attention maps).

    python infoard.py                                     offline demo on rendered shapes, minutes
    python infoard.py --dataset cifar10 --device cuda     the main job: teacher, student, evaluation
    python infoard.py eval CKPT --attacks clean,pgd,aa    any checkpoint, ours or a stranger's
    torchrun --nproc-per-node=8 infoard.py ...            the same on many devices or machines
    from infoard import InfoARD, Threat, pgd, infonce     every part works in a foreign loop

    1  notation, configuration     5  InfoARD              9  evaluation
    2  divergences, margins        6  frameworks          10  checkpoints and training
    3  attacks and ASA             7  models, teachers    11  command line
    4  mutual information          8  data

Of InfoARD only the abstract is public: the rank rule of section 3 and the critics and terms of
section 5 are our reconstruction. Beside this file: extras.py (tables, figures, export, speed) and
defences.py (NAMID and MID, two other defences); it does without them.

[InfoARD] Liu et al., IEEE TIP 2025, doi 10.1109/TIP.2025.3637689     [AA] AutoAttack, 2003.01690
[Madry] PGD, 1706.06083   [TRADES] 1901.08573   [ARD] 1905.09747   [RSLAD] 2108.07969   [IAD]
2106.04928   [AdaAD] Huang et al., CVPR 2023   [MTARD] Zhao et al., ECCV 2022   [IGDM] 2312.03286
[SAAD] 2512.10275   [FGSM] 1412.6572   [MI-FGSM] 1710.06081   [CW] margin loss, 1608.04644
[CPC] InfoNCE, 1807.03748   [Poole] bounds compared, 1905.06922   [RKD] 1904.05068
[DV] Donsker and Varadhan 1983; MINE, 1801.04062     [NWJ] 0809.0853     [JSD] f-GAN, 1606.00709
[BA] Barber and Agakov 2003; VID, 1904.05835   [AT] attention, 1612.03928
"""
import argparse
import contextlib
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# ==== 1. Notation and configuration ===============================================================
# x [B,C,H,W] in [0,1] (normalisation lives inside the model), y [B], K classes
# x' = x_adv, |x' - x|_inf <= eps; eps and alpha (the step; in section 6 a weight) in n/255
# S, T student and teacher, x -> logits [B,K]; s, t = S(x), T(x); maps {name: [B,C_l,H_l,W_l]}
# scores [B,B]: row i the student on x'_i, column j the teacher on x_j; divergences, MI in nats

ALL = slice(None)
LITE = "--student tiny --teacher-arch tiny_wide --steps 3 --steps-lo 1 --step-size 4/255"
PRESETS = dict(  # what None means in Config: by data; by framework as its paper has it, lam_hi ours
    shapes=dict(student="tiny", teacher_arch="tiny_wide", epochs=8, steps=5, lam_hi=1.5),
    images=dict(student="resnet18", teacher_arch="wrn_34_10", epochs=100, steps=10, lam_hi=1.5),
    natural=dict(infoard=False), trades=dict(beta=6.0), ard=dict(alpha=1.0, temperature=30.0),
    rslad=dict(alpha=5 / 6), iad=dict(beta=0.1, temperature=1.0), adaad=dict(alpha=1.0, lam_hi=2.0),
    igdm=dict(alpha=1.0, lam_hi=2.0), saad=dict(alpha=1.0, beta=0.0))

class InfoardError(ValueError):
    """A mistake that one line can explain. The command line prints it and exits with code 2."""

def require(condition, message: str) -> None:
    """InfoardError(message) unless condition."""
    if not condition:
        raise InfoardError(message)

def lookup(table, name: str, what: str):
    """table[name] (or name itself, from a list), or one line that lists the names there are."""
    require(name in table, f"unknown {what} {name!r} (choose from {', '.join(table)})")
    return table[name] if isinstance(table, dict) else name

def progress_bar(items, text: str = ""):
    """items, with a bar if there are a text, a terminal (asked by None) and no TQDM_DISABLE."""
    from tqdm import tqdm
    return tqdm(items, text, leave=False, disable=not text or "TQDM_DISABLE" in os.environ or None)

def world() -> tuple[int, int]:
    """(rank of this process, number of ranks): those of torch.distributed, or (0, 1)."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

def summed(value: Tensor) -> Tensor:
    """The sum over ranks."""
    if world()[1] > 1:
        dist.all_reduce(value := value.clone())
    return value

meet = partial(summed, torch.zeros(1))  # no rank goes on before all are here

# sum_r N dL/df_r df_r/dtheta / N = dL/dtheta: each of N ranks has the whole loss L but the graph of
# its own rows f_r alone, and DistributedDataParallel takes the mean of gradients over ranks
def gathered(f: Tensor) -> Tensor:
    """The rows of all ranks, [B/N,...] -> [B,...], for a loss that couples a batch."""
    rank, ranks = world()
    if ranks == 1:
        return f
    own = f.detach().contiguous()
    rows = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(rows, own)
    rows[rank] = own + ranks * (f - own)  # f, with the gradient N-fold
    return torch.cat(rows)

def save(path: Path, content) -> None:
    """content at path (bytes, dict for .pt, values for .json), or what was there; from rank 0."""
    if world()[0]:
        return
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    text = (json.dumps(content, indent=1) + "\n").encode() if path.suffix == ".json" else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            torch.save(content, f) if path.suffix == ".pt" else f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes one of the other
        raise InfoardError(f"cannot write {path} ({str(error).splitlines()[0]}); what was saved "
                           "before is untouched: free space or choose another --out") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()

def digest(path: str | Path) -> str | None:
    """The sha256 of a file, if it is one."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None

@dataclass(frozen=True, eq=False)
class Threat:
    """What an attacker may do, as one object, so that eps and alpha cannot be swapped in a call:
    eps, alpha: float or [B], radius and step in pixel units of [0,1]. steps: int or [B] (long).
    counts: with steps [B], how many each step attacks (no device wait). norm: linf or l2."""
    eps: float | Tensor = 8 / 255
    alpha: float | Tensor = 2 / 255
    steps: int | Tensor = 10
    counts: tuple[int, ...] | None = None
    norm: str = "linf"
    def __post_init__(self):
        lookup(("linf", "l2"), self.norm, "norm")
        require(isinstance(self.eps, Tensor) or 0 <= self.eps <= (1, math.inf)[self.norm == "l2"],
                f"eps must lie in [0, 1], got {self.eps}: write 8/255 or 0.0314")
        require(isinstance(self.steps, Tensor) or self.steps >= 0, "steps must not be negative")
    def schedule(self, batch: int) -> tuple[Tensor | None, tuple[int, ...]]:
        """(order, counts): samples by falling steps; step t attacks the first counts[t] of them."""
        if isinstance(self.steps, int):
            return None, (batch,) * self.steps
        require(self.steps.shape == (batch,), f"steps must be an int or of shape [{batch}]")
        order = self.steps.argsort(descending=True, stable=True)
        return order, self.counts or active_counts(self.steps.tolist())

def active_counts(steps) -> tuple[int, ...]:
    """n_t = #{i: K_i > t}, the samples that step t of a schedule still attacks."""
    return tuple(sum(k > t for k in steps) for t in range(max(steps)))

def opt(value, text: str, among: str = "", low=None, high=math.inf):
    """A field of Config: its default, its line of --help, and the values that it may have."""
    return field(default=value, metadata=dict(help=text, choices=among.split(), low=low, high=high))

@dataclass(frozen=True)
class Config:
    """All settings of a run; each is a command-line option. None: see PRESETS and the text."""
    dataset: str = opt("shapes", "shapes, cifar10, cifar100, svhn, tinyimagenet or folder")
    data_dir: str = opt("data", "where the data lie or go: their parent, folder or archive")
    download: bool = opt(True, "fetch a missing data set")
    subset: int = opt(0, "training images, class-balanced, the same for every seed; 0: all", low=0)
    val_size: int = opt(1000, "training images kept to choose `best`, at most a tenth", low=0)
    image_size: int = opt(0, "pixels, for folders of larger images; 0: as the first one", low=0)
    student: str = opt(None, "resnet18, preact_resnet18, mobilenet_v2, wrn_<depth>_<width>, tiny")
    teacher: str = opt(None, "file, robustbench:ID or module:factory; default: train one, once")
    teacher_arch: str = opt(None, "a teacher to train, or the one that a file must hold")
    teacher_norm: str = opt("none", "normalisation a file expects: none, cifar10, cifar100")
    teacher_nat: str = opt(None, "an undefended net, for mtard or to transfer from, like --teacher")
    teacher_framework: str = opt(None, "that of a missing teacher", "trades at natural autoencoder")
    teacher_epochs: int = opt(None, "epochs for a missing teacher; default: --epochs", low=1)
    framework: str = opt("rslad", "a name in FRAMEWORKS")
    infoard: bool = opt(True, "add InfoARD to the base framework")
    asa: str = opt("teacher", "signal, control or off", "teacher student gap uniform shuffled off")
    lam_lo: float = opt(1.0, "eps_i of the weakest instance, in units of eps", low=0)
    lam_hi: float = opt(None, "eps_i of the strongest instance, in units of eps", low=0)
    steps_lo: int = opt(0, "attack steps of the weakest instance; 0: all take --steps", low=0)
    mim: str = opt("infonce", "bound of information terms", "infonce dv nwj jsd vid unpaired off")
    w_feat: float = opt(0.1, "weight of feature information", low=0)
    w_att: float = opt(0.0, "weight of attention information", low=0)
    w_rel: float = opt(0.0, "weight of the relation term", low=0)
    critic_dim: int = opt(128, "width of the critics", low=1)
    tau: float = opt(0.2, "temperature of the scores", low=1e-6)
    alpha: float = opt(None, "weight alpha of ard, rslad, adaad, igdm or saad", low=0)
    beta: float = opt(None, "weight beta of trades or saad, exponent of iad", low=0)
    temperature: float = opt(None, "temperature of ard or iad", low=1e-6)
    kl_reduction: str = opt("batchmean", "mean: KL over K, as RSLAD's code", "batchmean mean")
    mi_bound: str = opt("dv", "bound of NAMID's estimators", "dv infonce jsd")
    mi_train: str = opt("max", "their objective: eq. 4 or, difference, eq. 5", "max difference")
    mi_lambda: float = opt(0.1, "weight lambda of NAMID", low=0)
    mi_ramp: float = opt(1.0, "share of training over which NAMID's alpha grows", low=0, high=1)
    pool: str = opt("clean,pgd_sat,pgd_t,mifgsm,mifgsm_t,pgd_l2,pgd_l2_t", "MID's attacks")
    transfer: bool = opt(False, "also evaluate attacks made on an undefended net")
    eps_l2: float = opt(0.5, "L2 radius of the attacks that have one", low=0)
    eps: float = opt(8 / 255, "L-infinity radius, x in [0,1]; write 8/255 or 0.0314", low=0, high=1)
    steps: int = opt(None, "attack steps in training", low=1)
    step_size: float = opt(2 / 255, "attack step; write 2/255 or 0.0078", low=0, high=1)
    epochs: int = opt(None, "passes over the training images", low=1)
    batch_size: int = opt(128, "images per step, of all ranks together", low=2)
    lr: float = opt(0.1, "peak learning rate of SGD with momentum 0.9", low=0)
    weight_decay: float = opt(5e-4, "weight decay", low=0)
    schedule: str = opt("cosine", "or a list of epochs after which lr falls to a tenth: 100,150")
    ema: float = opt(0.0, "decay of a weight average to evaluate instead; 0: none", low=0, high=1)
    seed: int = opt(0, "seed of initialisation, order, augmentation and attack starts", low=0)
    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps")
    amp: str = opt("auto", "half precision; auto: bf16 if in hardware", "auto bf16 fp16 off")
    compile: bool = opt(False, "torch.compile the student")
    sync_bn: bool = opt(False, "batch norm over all ranks' images, not each rank's own (CUDA)")
    attacks: str = opt("clean,fgsm,pgd,cw,apgd", "a list with commas: these, aa or any of ATTACKS")
    eval_subset: int = opt(None, "test images; 0: all; default: 500 on a CPU, else all", low=0)
    eval_batch: int = opt(0, "images per evaluation batch; 0: 256 on a CPU, else 512", low=0)
    out: str = opt(None, "folder; default: runs/<dataset>-<student>-<framework>[-plain]-s<seed>")
    resume: bool = opt(False, "go on from last.pt in --out, if there is one")
    figures: bool = opt(True, "draw figures at the end")
    progress: bool = opt(True, "show a bar on a terminal")
    def __post_init__(self):
        for f in fields(self):
            value, flag, known = getattr(self, f.name), f"--{f.name.replace('_', '-')}", f.metadata
            for name in str(value).split(",") * bool(known["choices"] and value is not None):
                lookup(known["choices"], name.strip(), flag)
            low, high = known["low"], known["high"]
            require(None in (low, value) or low <= value <= high,
                    f"{flag} must lie in [{low}, {high}], got {value}: {known['help']}")
    def resolved(self) -> "Config":
        """The same with every None filled in."""
        preset = PRESETS["shapes" if self.dataset == "shapes" else "images"]
        preset = preset | PRESETS.get(self.framework, {})
        fill = {k: v for k, v in preset.items() if k in asdict(self) and getattr(self, k) is None
                and not (self.teacher and k == "teacher_arch")}
        lifted = preset.get("infoard", True)  # whether InfoARD can be added
        cfg = replace(self, infoard=self.infoard and lifted, **fill)
        if "twin" in preset:  # a teacher of the student's own kind, both with this suffix
            net = cfg.student.removesuffix(preset["twin"]) + preset["twin"]
            cfg = replace(cfg, student=net, teacher_arch=self.teacher_arch if self.teacher else net)
        require(cfg.steps_lo <= cfg.steps, f"--steps-lo must be at most --steps, {cfg.steps}")
        require(re.fullmatch(r"cosine|\d+(,\d+)*", cfg.schedule),
                f"--schedule must be cosine or epochs such as 100,150, not {cfg.schedule}")
        plain = "-plain" if lifted and not cfg.infoard else ""
        out = cfg.out or f"runs/{cfg.dataset}-{cfg.student}-{cfg.framework}{plain}-s{cfg.seed}"
        return replace(cfg, out=out, teacher_epochs=cfg.teacher_epochs or cfg.epochs,
                       teacher_framework=cfg.teacher_framework or "trades")
    def lr_at(self, share: float) -> float:
        if self.schedule != "cosine":
            drops = [int(epoch) for epoch in self.schedule.split(",")]
            return self.lr * 0.1 ** sum(share * self.epochs >= drop for drop in drops)
        rise, fall = share / 0.05, 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))
        return self.lr * max(0.01, rise if share < 0.05 else fall)

# ==== 2. Divergences and margins ==================================================================
def full(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

# KL(p || q) = sum_k p_k (log p_k - log q_k),   p = softmax(p_logits/tau), q = softmax(q_logits/tau)
def kl(p_logits: Tensor, q_logits: Tensor, tau: float = 1.0) -> Tensor:
    """Divergence in nats, summed over classes: [B,K], [B,K] -> [B]; its mean is "batchmean"."""
    log_p, log_q = (F.log_softmax(full(z) / tau, dim=1) for z in (p_logits, q_logits))
    return (log_p.exp() * (log_p - log_q)).sum(1)

# margin = z_y - max_{k != y} z_k
def margin(z: Tensor, y: Tensor) -> Tensor:
    """The true class's lead in logits or probabilities: [B,K], [B] -> [B]; positive = right."""
    y = y[:, None]
    return z.gather(1, y).squeeze(1) - z.scatter(1, y, -math.inf).amax(1)

# ==== 3. Attacks and ASA ==========================================================================
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

def predict(net: Callable, x: Tensor) -> Tensor:
    """Logits [B,K] in eval mode and without a graph."""
    with torch.no_grad(), frozen_eval(net):
        return full(net(x))

def length(f: Tensor, p: int = 2) -> Tensor:
    """The p-norm of each sample, in a shape that divides them: [B,...] -> [B,1,...]."""
    return f.flatten(1).norm(p, dim=1).clamp(min=1e-12).view(-1, *[1] * (f.dim() - 1))

# x'_{t+1} = P( x'_t + alpha d(m_t) ),  m_t = mu m_{t-1} + g_t/|g_t|_1,  g_t = grad objective(x'_t)
# d: the sign (Linf) or m/|m|_2 (L2); P: onto |x' - x| <= eps and [0,1]; mu: momentum [MI-FGSM]
# x'_0 = x + uniform(-eps, eps) [Madry], x + 0.001 normal [TRADES], x (none), or a given tensor
def pgd(objective: Callable, x: Tensor, *, threat: Threat, init: str | Tensor = "uniform",
        momentum: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Projected gradient ascent of objective(x') -> [B] under a threat; x [B,C,H,W] in [0,1] is
    never written to. With threat.steps [B], step t calls objective(x'[rows], rows) on the
    samples that have steps to go: it must index its labels or targets with rows.
    frozen_eval(model) around the call keeps batch norm as it is and builds no weight gradients."""
    order, counts = threat.schedule(len(x))
    rows = ALL if order is None else order
    eps, alpha = (torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x))[rows]
                  .view(-1, *[1] * (x.dim() - 1)) for v in (threat.eps, threat.alpha))  # [B,1,1,1]
    x, linf = x[rows], threat.norm == "linf"
    lo, hi = ((x - eps).clamp(0, 1), (x + eps).clamp(0, 1)) if linf else (0 * x, 0 * x + 1)
    def project(z: Tensor, n: int) -> Tensor:
        if not linf:  # the box then moves z towards x, so that both hold
            z = x[:n] + (z - x[:n]) * (eps[:n] / length(z - x[:n])).clamp(max=1)
        return z.clamp(lo[:n], hi[:n])
    noise = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    starts = dict(uniform=lambda: x + eps * noise.uniform_(-1, 1, generator=generator),
                  normal=lambda: x + 0.001 * noise.normal_(generator=generator), none=lambda: x)
    x_adv = init[rows] if isinstance(init, Tensor) else lookup(starts, init, "attack start")()
    x_adv, m = project(x_adv, len(x)), 0 * x
    for n in counts:
        z = x_adv[:n].detach().requires_grad_()
        with torch.enable_grad():
            value = objective(z) if order is None else objective(z, order[:n])
            require(value.shape == (n,), f"objective(x') must be [{n}], not {list(value.shape)}")
            (grad,) = torch.autograd.grad(1024 * value.sum(), z)  # no sign is lost in fp16
        if momentum:
            grad = m[:n] = momentum * m[:n] + grad / length(grad, 1)
        step = grad.sign() if linf else grad / length(grad)
        x_adv[:n] = project(z.detach() + alpha[:n] * step, n)
    return x_adv if order is None else torch.empty_like(x_adv).index_copy_(0, order, x_adv)

def against(loss: Callable, model: Callable, target: Tensor) -> Callable:
    """The objective loss(S(x'), target) -> [B], for pgd."""
    return lambda z, rows=ALL: loss(full(model(z)), target[rows])

ce_objective = partial(against, partial(F.cross_entropy, reduction="none"))  # (model, y)
kl_objective = partial(against, lambda z, t: kl(t, z))  # (model, t): KL(t || S(x')), t logits
cw_objective = partial(against, lambda z, y: -margin(z, y))  # (model, y), without CW's constant c

def attacked(make: Callable, model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    """pgd on make(model, y), y being labels or target logits, with the model left as found."""
    with frozen_eval(model):
        return pgd(make(model, y), x, **options)

pgd_ce = partial(attacked, ce_objective)  # (model, x, y, threat=Threat(...)) [Madry]
cw_linf = partial(attacked, cw_objective)  # (model, x, y, threat=Threat(...)), the field's CW_inf

def recipe(make: Callable, share: float, steps: int, norm: str = "linf", **options) -> Callable:
    """attack(net, x, y); most: a limit to its steps, which then go 2.5 radii in all [Madry]."""
    def attack(net, x, y, *, eps=8 / 255, eps_l2=0.5, generator=None, most=steps):
        radius, n = eps if norm == "linf" else eps_l2, min(steps, most)
        alpha = radius * (share if n == steps else min(1, 2.5 / n))
        return attacked(make, net, x, y, threat=Threat(radius, alpha, n, norm=norm),
                        generator=generator, **options)
    return attack

fgsm = recipe(ce_objective, 1, 1, init="none")  # (model, x, y, eps=8/255), one step from x [FGSM]
ATTACKS = dict(  # name: attack(net, x, y); at 8/255, 1/4 is 2/255
    fgsm=fgsm, pgd_sat=recipe(ce_objective, 1 / 4, 20),
    pgd_trades=recipe(ce_objective, 0.003 * 255 / 8, 20),
    cw=recipe(cw_objective, 1 / 4, 30))

# u_i = rank(signal_i)/(B-1),  lam_i = lam_lo + (lam_hi - lam_lo) u_i,                        [ours]
# eps_i = eps (1 + ramp (lam_i - 1)), alpha_i = alpha eps_i/eps, K_i = round(K_lo + (K - K_lo) u_i)
def instance_strength(signal: Tensor, *, threat: Threat, lam: tuple[float, float] = (1.0, 1.5),
                      ramp: float = 1.0, steps_lo: int = 0, uniform: bool = False) -> Threat:
    """ASA: a radius, a step size and, if asked for, a number of steps for each instance of a batch.
    signal [B]: larger = attacked harder. threat: base eps and alpha, the most steps. steps_lo > 0:
    a step schedule, whose counts depend on B alone. uniform: the control of equal mean and cost."""
    batch, rank = len(signal), signal.argsort(stable=True).argsort()
    u = 0.5 + 0.0 * rank if uniform or batch == 1 else rank / (batch - 1)
    scale = 1 + ramp * (lam[0] + (lam[1] - lam[0]) * u - 1)
    steps, counts = threat.steps, None
    if steps_lo and steps_lo != threat.steps:
        more = (threat.steps - steps_lo) / max(batch - 1, 1)
        table = [int(steps_lo + more * (r if batch > 1 else 0.5) + 0.5) for r in range(batch)]
        table = [(sum(table) + r) // batch for r in range(batch)] if uniform else table
        steps, counts = torch.tensor(table, device=signal.device)[rank], active_counts(table)
    return Threat(threat.eps * scale, threat.alpha * scale, steps, counts, threat.norm)

# ==== 4. Mutual information: lower bounds from a score matrix, in nats ============================
# f_ij = scores[i,j] = f(x_i, y_j);   E_p: mean of the diagonal, pairs of the joint distribution;
# E_q: mean off the diagonal, pairs of the product of marginals. Inputs are left as they are.
def off_diagonal(scores: Tensor) -> Tensor:
    """[B,B] -> [B,B-1], row by row, without the diagonal."""
    b = len(scores)
    require(scores.shape == (b, b) and b > 1, f"scores must be [B,B], B > 1, not {scores.shape}")
    return scores.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1)

# I >= log B + E_i[ f_ii - log sum_j exp f_ij ]                                [CPC], [Poole] eq. 10
def infonce(scores: Tensor) -> Tensor:
    """InfoNCE: low variance, never above log B, hence biased low when I is larger."""
    return math.log(scores.shape[1]) + (scores.diag() - scores.logsumexp(1)).mean()

# I >= E_p[f] - log E_q[exp f]                                                                  [DV]
def donsker_varadhan(scores: Tensor) -> Tensor:
    """Donsker-Varadhan: can exceed log B; biased (log of a batch mean) and of high variance."""
    others = off_diagonal(scores)
    return scores.diag().mean() - (others.logsumexp((0, 1)) - math.log(others.numel()))

# I >= E_p[f] - E_q[exp(f - 1)]                                                                [NWJ]
def nwj(scores: Tensor) -> Tensor:
    """Nguyen-Wainwright-Jordan: unbiased, of higher variance than DV; best critic 1 + log p/q."""
    return scores.diag().mean() - (off_diagonal(scores) - 1).exp().mean()

# JS(p, q) >= log 2 + 1/2 E_p[log sigma(f)] + 1/2 E_q[log sigma(-f)]                           [JSD]
def js_divergence(scores: Tensor) -> Tensor:
    """Jensen-Shannon divergence of joint and product: stable, at most log 2, not an information."""
    positive, negative = F.logsigmoid(scores.diag()), F.logsigmoid(-off_diagonal(scores))
    return math.log(2) + 0.5 * (positive.mean() + negative.mean())

def jsd(scores: Tensor) -> Tensor:
    """The gradient of js_divergence with the value of nwj at its best critic, f + 1 [Poole]."""
    objective = js_divergence(scores)
    return objective + (nwj(scores + 1) - objective).detach()

# I >= H(Y) + E_p[ log q(y|x) ],   f_ij = log q(y_j | x_i)                                      [BA]
def variational_bound(scores: Tensor, entropy: float = 0.0) -> Tensor:
    """Barber-Agakov: needs no negatives but a normalised q; H(Y) is a constant when Y is fixed."""
    return entropy + scores.diag().mean()

BOUNDS = dict(infonce=infonce, dv=donsker_varadhan, nwj=nwj, jsd=jsd, vid=variational_bound,
              unpaired=lambda scores: infonce(scores.roll(1, 1)))  # a control: no i with its own

def pooled(f: Tensor) -> Tensor:
    """A feature map [B,C,H,W] as its spatial mean [B,C]; a vector as it is."""
    return full(f.mean((2, 3)) if f.dim() > 2 else f)

class Critic(nn.Module):
    """scores[i,j] = <g(s_i), h(t_j)>/tau, with linear, normalised g and h of pooled features."""
    def __init__(self, dim_s: int, dim_t: int, dim: int = 128, tau: float = 0.2):
        super().__init__()
        self.g, self.h, self.tau = nn.Linear(dim_s, dim), nn.Linear(dim_t, dim), tau
    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        g = F.normalize(self.g(pooled(s)), dim=1)  # [B, dim]
        h = F.normalize(self.h(pooled(t)), dim=1)  # [B, dim]
        return g @ h.T / self.tau  # [B, B]

class GaussianCritic(nn.Module):
    """scores[i,j] = log q(t_j|s_i)/D: Gaussian with a linear mean, per dimension of the target."""
    def __init__(self, dim_s: int, dim_t: int):
        super().__init__()
        self.mean, self.log_var = nn.Linear(dim_s, dim_t), nn.Parameter(torch.zeros(dim_t))
    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        t = F.layer_norm(pooled(t), t.shape[1:2])  # [B, D], not learned: it could turn constant
        gap, log_var = (self.mean(pooled(s))[:, None] - t).square(), self.log_var.clamp(min=-6)
        return -0.5 * (gap / log_var.exp() + log_var + math.log(2 * math.pi)).mean(2)  # [B, B]

# ==== 5. InfoARD: strength and multi-granularity loss as one object ===============================
class Taps:
    """Feature maps of any net, by hooks: after net(x), take() gives {name: [B,C_l,H_l,W_l]}, the
    last map at each resolution and, as "penultimate", the input of the last linear layer."""
    def __init__(self, net: nn.Module, x: Tensor):
        self.maps, self.hooks, modules = {}, [], dict(net.named_modules())
        for _ in range(2):  # hook all modules first, then only those whose output was kept
            names = [name for name, _ in self.maps.values()] or list(modules)[1:]
            self.close()
            self.hooks = [modules[n].register_forward_hook(partial(self.keep, n)) for n in names]
            predict(net, x)
        self.widths = {name: f.shape[1] for name, f in self.take().items()}
    def keep(self, name: str, module: nn.Module, inputs: tuple, output) -> None:
        if isinstance(module, nn.Linear) and inputs[0].dim() == 2:
            self.maps["penultimate"] = name, inputs[0]
        elif isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
            size = output.shape[-2:]
            held = self.maps.get(size, (name,))[0].rpartition(".")[0]
            if held == name.rpartition(".")[0] or next(module.children(), None) is not None:
                self.maps[size] = name, output  # a stage, not the first layer of the next
    def take(self) -> dict[str, Tensor]:
        """The maps of the latest pass, once: no graph outlives its step."""
        maps, self.maps = self.maps, {}
        return {key if key == "penultimate" else name: f for key, (name, f) in maps.items()}
    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

# A = normalise( sum_c f_c^2 )                                                     [AT] eq. 1, p = 2
def attention_map(f: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Where a net looks: [B,C,H,W] -> [B,h*w] of unit length; size: (h, w) to pool to."""
    f = f.float() if f.dtype == torch.float16 else f  # whose range squares would leave
    energy = full(f.square().sum(1, keepdim=True))  # [B, 1, H, W]
    energy = F.adaptive_avg_pool2d(energy, size or energy.shape[-2:])
    return F.normalize(energy.flatten(1), dim=1)

def attention_scores(s: Tensor, t: Tensor, tau: float = 0.2) -> Tensor:
    """Cosines of centred maps (raw ones are all near 1) over tau, [B,C,H,W] twice -> [B,B], of all
    ranks' images."""
    size = tuple(map(min, s.shape[-2:], t.shape[-2:]))
    maps = (gathered(attention_map(f, size)) for f in (s, t))
    a, b = (F.normalize(m - m.mean(1, keepdim=True), dim=1) for m in maps)  # [B, h*w]
    return a @ b.T / tau

# R_i = KL( softmax_j(c^T_ij/tau) || softmax_j(c^S_ij/tau) ), j != i, c: cosines of centred features
def relation_loss(s: Tensor, t: Tensor, tau: float = 0.2) -> Tensor:
    """How similarities within the batch differ, [B,..], [B,..] -> [B] in nats; after [RKD]."""
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
            loss = ... student(x_adv) ... + info.loss()           # before either net's next pass

    loss = -w_feat I_feat - w_att I_att + w_rel R: the information, by the bound mim, of features
    (last three stages, penultimate) and attention maps of S(x') with T(x), a mean over taps; R: the
    relation_loss of the deepest, over all ranks. Not alone: cosines leave logits' scale free."""
    def __init__(self, student: nn.Module, teacher: nn.Module, *, image_shape=(3, 32, 32),
                 asa: str = "teacher", lam: tuple[float, float] = (1.0, 1.5), mim: str = "infonce",
                 w_feat: float = 0.1, w_att: float = 0.0, w_rel: float = 0.0, dim: int = 128,
                 tau: float = 0.2):
        super().__init__()
        x = torch.zeros(2, *image_shape, device=next(student.parameters()).device)
        self.asa, self.lam, self.tau, self.terms = asa, lam, tau, {}
        self.bound = None if mim == "off" else lookup(BOUNDS, mim, "mutual-information bound")
        self.student_taps, self.teacher_taps = Taps(student, x), Taps(teacher, x)
        wide_s, wide_t = self.student_taps.widths, self.teacher_taps.widths
        stages = ([n for n in w if n != "penultimate"][::-1] for w in (wide_s, wide_t))
        self.pairs = list(zip(*stages))[:3]  # noqa: B905, deepest with deepest
        weights = dict(feat=-w_feat if self.bound else 0, rel=w_rel,
                       att=-w_att if self.bound and self.pairs else 0)
        self.weights = {name: w for name, w in weights.items() if w}
        self.pairs[:0] = [(n, n) for n in wide_s if n == "penultimate" and n in wide_t]
        require(self.pairs or not self.weights, "no feature maps to compare: use --mim off")
        make = GaussianCritic if mim == "vid" else partial(Critic, dim=dim, tau=tau)
        pairs = self.pairs if "feat" in self.weights else []
        self.critics = nn.ModuleList(make(wide_s[a], wide_t[b]) for a, b in pairs).to(x.device)
        if not self.weights:  # what nobody reads costs nothing
            self.student_taps.close(), self.teacher_taps.close()
    def strength(self, t: Tensor | None, y: Tensor, threat: Threat = Threat(), *,  # noqa: B008
                 s: Tensor | None = None, generator: torch.Generator | None = None,
                 steps_lo: int = 0) -> Threat:
        """ASA: threat with eps, alpha (and steps) per instance, from logits t, s on clean x."""
        if self.asa == "off":
            return threat
        signals = dict(
            teacher=lambda: margin(full(t).softmax(1), y), gap=lambda: kl(t, s),
            student=lambda: margin(full(s).softmax(1), y), uniform=lambda: y * 0,  # and a control:
            shuffled=lambda: torch.rand(len(y), generator=generator).to(y.device))
        return instance_strength(lookup(signals, self.asa, "ASA signal")(), threat=threat,
                                 lam=self.lam, uniform=self.asa == "uniform", steps_lo=steps_lo)
    def loss(self, s_maps: dict | None = None, t_maps: dict | None = None) -> Tensor:
        """The weighted sum of .terms, from the maps given or those of the latest passes."""
        latest = self.student_taps.take(), self.teacher_taps.take()  # no graph outlives its step
        s_maps, t_maps = s_maps or latest[0], t_maps or latest[1]
        if not self.weights or len(s_maps[self.pairs[0][0]]) * world()[1] < 2:  # no pairs of one
            return torch.zeros(())
        maps = [(s_maps[a], t_maps[b].detach()) for a, b in self.pairs]
        def scores(critic, pair):
            return critic(*(gathered(pooled(f)) for f in pair))
        values = dict(
            feat=lambda: [self.bound(scores(*p)) for p in zip(self.critics, maps, strict=True)],
            att=lambda: [self.bound(attention_scores(*m, self.tau)) for m in maps if m[0].ndim > 2],
            rel=lambda: [scores(partial(relation_loss, tau=self.tau), maps[0]).mean()])
        with torch.autocast(maps[0][0].device.type, enabled=False):
            terms = {name: torch.stack(values[name]()).mean() for name in self.weights}
        self.terms = {name: v.detach() for name, v in terms.items()}
        return sum(self.weights[name] * v for name, v in terms.items())

# ==== 6. Frameworks ===============================================================================
# name     inner max, |x'-x| <= eps  outer min
# at       CE(S(x'),y)               CE(S(x'),y)                                         [Madry]
# trades   KL(S(x)||S(x'))           CE(S(x),y) + beta KL(S(x)||S(x'))                   [TRADES]
# ard      CE(S(x'),y)               alpha tau^2 KL(T(x)||S(x')) + (1-alpha) CE(S(x),y)  [ARD]
# rslad    KL(T(x)||S(x'))           alpha KL(T(x)||S(x')) + (1-alpha) KL(T(x)||S(x))    [RSLAD]
# iad      CE(S(x'),y)               tau^2 (A KL(T(x)||S(x')) + (1-A) KL(S(x)||S(x')))   [IAD]
# adaad    KL(T(x')||S(x'))          alpha KL(T(x')||S(x')) + (1-alpha) KL(T(x)||S(x))   [AdaAD]
# mtard    CE(S(x'),y)               w KL(T(x')||S(x')) + (1-w) KL(T_nat(x)||S(x))       [MTARD]
# igdm     KL(T(x')||S(x'))          KL(T(x')||S(x')) + alpha p G                        [IGDM]
# saad     KL(T(x) + l e_y||S(x'))   h (KL(T(x')||S(x')) + alpha p G) + beta r KL(T(x)||S(x))
# A = T_y(x')^beta (1 while p < 0.3); d = x'-x; l = d . grad T_y(x); p: share of training;   [SAAD]
# G = KL(T(x+d)-T(x-d)||S(x+d)-S(x-d)); h = 5 (H - min H), H: the entropy of T(x'); r = 1 - h/max h
class Step:
    """One batch and the logits [B,K] on it, each pass made when it is first asked for: t, t_adv of
    the teacher on x, x_adv; t_nat of MTARD's second one; s, s_adv of the student in train mode.
    progress: the share of training done. memory: kept between steps. terms: of the loss, to log."""
    def __init__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor, *,
                 cfg: Config, info: InfoARD | None = None, generators: dict | None = None,
                 teacher_nat: nn.Module | None = None, progress: float = 0.0,
                 estimators: nn.Module | None = None, memory: dict | None = None):
        self.student, self.teacher, self.teacher_nat = student, teacher, teacher_nat
        self.estimators, self.terms = estimators, {}
        self.x, self.y, self.x_adv, self.progress = x, y, x, progress
        self.cfg, self.info, self.maps = cfg.resolved(), info, {}
        self.alpha, self.beta = self.cfg.alpha, self.cfg.beta
        self.generators, self.memory = generators or {}, {} if memory is None else memory
        self.threat = Threat(cfg.eps, cfg.step_size, self.cfg.steps)
    def tap(self, whose: str, logits: Tensor) -> Tensor:
        """Keeps the feature maps of the pass that made these logits."""
        if self.info:
            self.maps[whose] = getattr(self.info, whose).take()
        return logits
    t = cached_property(lambda self: self.tap("teacher_taps", predict(self.teacher, self.x)))
    t_adv = cached_property(lambda self: predict(self.teacher, self.x_adv))
    t_nat = cached_property(lambda self: predict(self.teacher_nat, self.x))
    s = cached_property(lambda self: full(self.student(self.x)))
    s_adv = cached_property(lambda self: self.tap("student_taps", full(self.student(self.x_adv))))
    def kl(self, p: Tensor, q: Tensor, tau: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
        """tau^2 KL of logits at temperature tau, weighted [B], averaged; see --kl-reduction."""
        classes = p.shape[1] if self.cfg.kl_reduction == "mean" else 1
        return tau ** 2 * (weight * kl(p, q, tau)).mean() / classes
    def attack(self, objective: Callable, init: str = "uniform") -> None:
        """Sets x_adv: the one pgd of all frameworks, with a strength per instance under InfoARD."""
        cfg, info = self.cfg, self.info
        if info and info.asa != "off":
            self.threat = info.strength(
                self.t if info.asa in ("teacher", "gap") else None, self.y, self.threat,
                s=predict(self.student, self.x) if info.asa in ("student", "gap") else None,
                steps_lo=cfg.steps_lo, generator=self.generators.get("data"))
        with frozen_eval(self.student, self.teacher):
            self.x_adv = pgd(objective, self.x, threat=self.threat, init=init,
                             generator=self.generators.get("attack"))
    def loss(self) -> Tensor:
        """The framework's loss plus InfoARD's, on the same passes."""
        name = self.cfg.framework
        require(self.teacher or name not in NEED_TEACHER, f"framework {name} needs a teacher")
        require(self.teacher_nat or name not in NEED_NATURAL, f"{name} needs a teacher_nat")
        loss = lookup(FRAMEWORKS, name, "framework")(self)
        if self.info and self.info.weights:
            _ = self.t, self.s_adv  # made here if the framework made no such pass
            loss = loss + self.info.loss(self.maps["student_taps"], self.maps["teacher_taps"])
            self.terms |= self.info.terms
        return loss

def natural(step: Step) -> Tensor:
    """No defence, CE(S(x),y): the control that every robust number is held against."""
    return F.cross_entropy(step.s, step.y)

def at(step: Step) -> Tensor:
    """Adversarial training, CE(S(x'),y): no teacher but for InfoARD's strengths and features."""
    step.attack(ce_objective(step.student, step.y))
    return F.cross_entropy(step.s_adv, step.y)

def trades(step: Step) -> Tensor:
    """TRADES; S(x) is not detached in the outer KL, as published."""
    # differs: released code passes x twice in train mode (batch norm)
    step.attack(kl_objective(step.student, predict(step.student, step.x)), init="normal")
    return F.cross_entropy(step.s, step.y) + step.beta * step.kl(step.s, step.s_adv)

def ard(step: Step) -> Tensor:
    """Adversarially robust distillation: the teacher sees clean images alone."""
    # differs: released code divides KL by K, attacks in train mode, passes x too, loses an lr drop
    step.attack(ce_objective(step.student, step.y))
    loss = step.alpha * step.kl(step.t, step.s_adv, step.cfg.temperature)
    return loss if step.alpha == 1 else loss + (1 - step.alpha) * F.cross_entropy(step.s, step.y)

def rslad(step: Step) -> Tensor:
    """Robust soft labels in both problems. differs: released code divides KL by K."""
    step.attack(kl_objective(step.student, step.t), init="normal")
    return step.alpha * step.kl(step.t, step.s_adv) + (1 - step.alpha) * step.kl(step.t, step.s)

def iad(step: Step) -> Tensor:
    """IAD-I: the student trusts itself where the teacher is unsure of x'; S(x) is not detached."""
    # differs: released code has no A in its first term, no tau in its second, attacks in train mode
    step.attack(ce_objective(step.student, step.y))
    if step.progress < 0.3:  # epoch 60 of 200
        return step.kl(step.t, step.s_adv, step.cfg.temperature)
    trust = step.t_adv.softmax(1).gather(1, step.y[:, None]).squeeze(1) ** step.beta  # [B]
    guided = step.kl(step.t, step.s_adv, step.cfg.temperature, weight=trust)
    return guided + step.kl(step.s, step.s_adv, step.cfg.temperature, weight=1 - trust)

def adaad(step: Step) -> Tensor:
    """AdaAD: the attack climbs through the teacher too; radii of 2 eps: +0.6, clean 0 (README)."""
    # differs: released code divides KL by K on CIFAR-10 and always passes x too (batch norm)
    step.attack(lambda z, rows=ALL: kl(step.teacher(z), step.student(z)), init="normal")
    loss = step.alpha * step.kl(step.t_adv, step.s_adv)
    return loss if step.alpha == 1 else loss + (1 - step.alpha) * step.kl(step.t, step.s)

# w <- w + eta (r_adv/(r_adv + r_nat) - w), r = loss now/loss of the first batch
def mtard(step: Step) -> Tensor:
    """MTARD: a robust teacher on x', a natural one on x; w favours the one that lags behind."""
    # differs: released code divides KL by K; eta falls with lr, here under cosine too
    step.attack(ce_objective(step.student, step.y), init="normal")
    losses = torch.stack([step.kl(step.t_adv, step.s_adv), step.kl(step.t_nat, step.s)])
    now = summed(losses.detach()).clamp(min=1e-12)
    r = now / step.memory.setdefault("first", now)
    w = step.memory.get("w", torch.full_like(r, 0.5))
    eta = 0.025 * step.cfg.lr_at(step.progress) / (step.cfg.lr or 1)
    step.memory["w"] = w + eta * (r / r.sum() - w)
    return (step.memory["w"] * losses).sum()

def differences(step: Step) -> tuple[Tensor, Tensor]:
    """T(x+d) - T(x-d) and S(x+d) - S(x-d): slopes along d; x - d is not clipped, as published."""
    x = 2 * step.x - step.x_adv
    return step.t_adv - predict(step.teacher, x), step.s_adv - full(step.student(x))

def igdm(step: Step) -> Tensor:
    """IGDM on AdaAD: the student's slope follows the teacher's, more so as training goes on."""
    # differs: p grows with each step, not with each epoch
    step.attack(lambda z, rows=ALL: kl(step.teacher(z), step.student(z)), init="normal")
    pull = step.alpha * step.progress * step.kl(*differences(step))
    return step.kl(step.t_adv, step.s_adv) + pull

def saad(step: Step) -> Tensor:
    """SAAD: a linear teacher in the attack; samples weighted by the teacher's entropy on x'."""
    # differs: its weight average is left to --ema; released code always passes x too (batch norm)
    true, z = F.one_hot(step.y, step.t.shape[1]), step.x.detach().requires_grad_()
    with torch.enable_grad(), frozen_eval(step.teacher):
        (slope,) = torch.autograd.grad((full(step.teacher(z)) * true).sum(), z)  # grad T_y
    def objective(z, rows=ALL):
        rise = ((z - step.x[rows]) * slope[rows]).flatten(1).sum(1, keepdim=True)  # [B, 1]
        return kl(step.t[rows] + rise * true[rows], step.student(z))
    step.attack(objective, init="normal")
    h = torch.special.entr(step.t_adv.softmax(1)).sum(1)  # [B], the teacher's entropy in nats
    h = 5 * (h - gathered(h).min())
    pull = step.alpha * step.progress * step.kl(*differences(step), weight=h)
    loss = step.kl(step.t_adv, step.s_adv, weight=h) + pull
    rest = 1 - h / gathered(h).max().clamp(min=1e-8)
    return loss + step.beta * step.kl(step.t, step.s, weight=rest) if step.beta else loss

FRAMEWORKS = dict(natural=natural, at=at, trades=trades, ard=ard, rslad=rslad, iad=iad, adaad=adaad,
                  mtard=mtard, igdm=igdm, saad=saad)
NEED_TEACHER, NEED_NATURAL = list(FRAMEWORKS)[3:], ["mtard"]
SCORES = dict(natural="val_clean")  # by what `best` is chosen; else val_pgd

# ==== 7. Models, teachers =========================================================================
# Layers are named as in files in the wild (kuangliu's CIFAR nets, TRADES' WRN): these load.
NORMS = dict(none=((0.0,) * 3, (1.0,) * 3),
             cifar10=((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
             cifar100=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)))

class Normalize(nn.Module):
    """(x - mean)/std, inside the model; not in its state dict, as files have no such keys."""
    def __init__(self, mean=NORMS["none"][0], std=NORMS["none"][1]):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1), persistent=False)
    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

def conv(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)

class BasicBlock(nn.Module):
    """ResNet, 1512.03385: conv-bn-relu-conv-bn + shortcut, relu."""
    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 3, stride), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv(c, c), nn.BatchNorm2d(c)
        change = (conv(c_in, c, 1, stride), nn.BatchNorm2d(c)) if c_in != c else ()
        self.shortcut = nn.Sequential(*change)
    def forward(self, x: Tensor) -> Tensor:
        f = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(f + self.shortcut(x))

class PreActBlock(nn.Module):
    """1603.05027: bn-act-conv twice + shortcut from after the first act; wide: with WRN's names."""
    def __init__(self, c_in: int, c: int, stride: int, act: type = nn.ReLU, wide: bool = False):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c, 3, stride)
        self.bn2, self.conv2, self.act = nn.BatchNorm2d(c), conv(c, c), act()
        change = conv(c_in, c, 1, stride) if c_in != c else None
        self.convShortcut = change if wide else None
        self.shortcut = nn.Sequential(change) if change and not wide else None
    def forward(self, x: Tensor) -> Tensor:
        f, change = self.act(self.bn1(x)), self.convShortcut or self.shortcut
        x = change(f) if change else x
        return self.conv2(self.act(self.bn2(self.conv1(f)))) + x

class InvertedBlock(nn.Module):
    """MobileNetV2, 1801.04381: expand 1x1, depthwise 3x3, project 1x1; shortcut at stride 1."""
    def __init__(self, c_in: int, c: int, stride: int, expansion: int = 6):
        super().__init__()
        wide, self.stride = expansion * c_in, stride
        self.conv1, self.bn1 = conv(c_in, wide, 1), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = conv(wide, wide, 3, stride, groups=wide), nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = conv(wide, c, 1), nn.BatchNorm2d(c)
        change = (conv(c_in, c, 1), nn.BatchNorm2d(c)) if stride == 1 and c_in != c else ()
        self.shortcut = nn.Sequential(*change)
    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        f = self.bn3(self.conv3(f))
        return f + self.shortcut(x) if self.stride == 1 else f

def stage(block: Callable, c_in: int, c: int, n: int, stride: int) -> nn.Sequential:
    """n blocks, the first of which changes width and resolution."""
    return nn.Sequential(block(c_in, c, stride), *(block(c, c, 1) for _ in range(n - 1)))

def in_a_row(size: int, conv1: nn.Conv2d, *, head: nn.Linear, name: str = "linear",
             **layers: nn.Module) -> nn.Sequential:
    """normalise, layers, pool, head; conv1 halves 64 pixels, or, with a pool, quarters 128."""
    conv1.stride = (2, 2) if size >= 64 else conv1.stride
    shrink = dict(shrink=nn.MaxPool2d(2)) if size >= 128 else {}
    return nn.Sequential(OrderedDict(
        normalize=Normalize(), conv1=conv1, **shrink, **layers,
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), **{name: head}))

def resnet(classes: int = 10, size: int = 32, blocks=(2, 2, 2, 2), preact: bool = False,
           final_bn: bool = True) -> nn.Sequential:
    """ResNet, or PreActResNet with the batch norm before its head that some files lack."""
    block = PreActBlock if preact else BasicBlock
    layers = {f"layer{i + 1}": stage(block, max(64, 32 << i), 64 << i, n, 1 + (i > 0))
              for i, n in enumerate(blocks)}
    first = {} if preact else dict(bn1=nn.BatchNorm2d(64), relu=nn.ReLU())
    last = dict(bn=nn.BatchNorm2d(512), relu=nn.ReLU()) if preact and final_bn else {}
    return in_a_row(size, conv(3, 64), **first, **layers, **last, head=nn.Linear(512, classes))

def wide_resnet(classes: int = 10, size: int = 32, depth: int = 34, width: int = 10,
                act: type = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """WideResNet, 1605.07146, depth = 6n + 4; act: nn.ReLU or, as some files, nn.SiLU."""
    block, n = partial(PreActBlock, act=act, wide=True), (depth - 4) // 6
    c = 16, 16 * width, 32 * width, 64 * width
    layers = {f"block{i}": nn.Sequential(OrderedDict(
        layer=stage(block, c[i - 1], c[i], n, 1 + (i > 1)))) for i in (1, 2, 3)}
    return in_a_row(size, conv(3, 16), **layers, bn1=nn.BatchNorm2d(c[3]), act=act(),
                    head=nn.Linear(c[3], classes, bias), name="fc")

def mobilenet_v2(classes: int = 10, size: int = 32) -> nn.Sequential:
    blocks, c_in = [], 32
    for expansion, c, n, stride in ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2),
                                    (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
        blocks += stage(partial(InvertedBlock, expansion=expansion), c_in, c, n, stride)
        c_in = c
    return in_a_row(size, conv(3, 32), bn1=nn.BatchNorm2d(32), relu1=nn.ReLU(),
                    layers=nn.Sequential(*blocks), conv2=conv(320, 1280, 1),
                    bn2=nn.BatchNorm2d(1280), relu2=nn.ReLU(), head=nn.Linear(1280, classes))

def tiny(classes: int = 10, size: int = 32, width: int = 16) -> nn.Sequential:
    """Four convolutions, for the demo, for tests and for constrained hardware."""
    c, conv1 = [width, 2 * width, 4 * width, 8 * width], conv(3, width, 3, 2)
    layers = {f"layer{i}": nn.Sequential(conv(c[i - 1], c[i], 3, 1 + (i < 3)),
                                         nn.BatchNorm2d(c[i]), nn.ReLU()) for i in (1, 2, 3)}
    return in_a_row(size, conv1, bn1=nn.BatchNorm2d(width), relu=nn.ReLU(), **layers,
                    head=nn.Linear(c[3], classes))

MODELS = dict(resnet18=resnet, preact_resnet18=partial(resnet, preact=True), wrn_34_10=wide_resnet,
              mobilenet_v2=mobilenet_v2, tiny=tiny, tiny_wide=partial(tiny, width=32))
WRAPPERS = {}  # suffix of a model's name: the wrapper(net, size)
PUBLISHED = dict(  # CIFAR-10 clean accuracy in RobustBench, where a teacher's name contains:
    Chen2021LTD_WRN34_10=85.21, Chen2021LTD_WRN34_20=86.03, Zhang2019Theoretically=84.92,
    Gowal2021Improving_28_10=87.50, Wang2023Better_WRN_28_10=92.44, Bartoldson2024=93.68)

def build_model(name: str, classes: int = 10, size: int = 32, **options) -> nn.Module:
    """A net of MODELS or any wrn_<depth>_<width>[_silu] with depth 6n + 4, maybe with a suffix."""
    for suffix, wrap in WRAPPERS.items():
        if name.endswith(suffix):
            return wrap(build_model(name.removesuffix(suffix), classes, size, **options), size)
    wide = re.fullmatch(r"wrn_(\d+)_([1-9]\d*)(_silu)?", name)
    if wide and int(wide[1]) in range(10, 10_000, 6):
        act = nn.SiLU if wide[3] else nn.ReLU
        return wide_resnet(classes, size, int(wide[1]), int(wide[2]), act, **options)
    return lookup(MODELS, name, "model")(classes, size, **options)

def load_tensors(path: str | Path) -> dict:
    """A checkpoint file as a dict, with weights_only, or one line that says what is wrong."""
    require(Path(path).is_file(), f"no checkpoint file at {path}")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # whatever a broken file makes the unpickler raise
        raise InfoardError(f"{path} is truncated or no PyTorch file, or it holds code or no dict: "
                           "get it again, or save its state_dict() alone") from None

def unwrap(state: dict) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(weights, normaliser) of a file, out of dicts, DataParallel, compile, SWA, Sequential."""
    nested = "state_dict model_state_dict ema net model rmodel best last".split()
    while inner := [state[k] for k in nested if isinstance(state.get(k), dict)]:
        state = inner[0]
    norm = [state[k] for k in sorted(state) if re.fullmatch(r"(.*\.)?(mu|sigma|mean|std)", k)]
    other = r"(.*\.)?(mu|sigma|mean|std|n_averaged|sub_block1\..*)"
    state = {k: v for k, v in state.items() if isinstance(v, Tensor) and not re.fullmatch(other, k)}
    prefix = os.path.commonprefix(list(state)).rfind(".") + 1  # as long as all keys have it
    return {k[prefix:]: v for k, v in state.items()}, norm

def infer_arch(state: dict[str, Tensor]) -> tuple[str, dict]:
    """(name, options) of the net that bare weights belong to."""
    wide, *blocks = (sum(bool(re.fullmatch(rf"{part}\.\d+\.conv2\.weight", k)) for k in state)
                     for part in ("block1.layer", "layer1", "layer2", "layer3", "layer4"))
    if wide:
        width = len(state["block1.layer.0.conv2.weight"]) // 16
        return f"wrn_{6 * wide + 4}_{width}", dict(bias="fc.bias" in state)
    if all(blocks) and "linear.weight" in state:
        name = "resnet18" if "bn1.weight" in state else "preact_resnet18"
        return name, dict(blocks=blocks, final_bn="bn.weight" in state)
    if "layers.16.conv3.weight" in state:
        return "mobilenet_v2", {}
    require("layer3.0.weight" in state, "a net unknown here (torchvision's? DeepMind's?)"
            ": use robustbench:ID or module:factory")
    return "tiny", dict(width=len(state["conv1.weight"]))

def load_weights(path: str | Path, arch="", size: int = 32, norm: str = "none") -> nn.Module:
    """A net from any state-dict file: unwrapped, architecture from the keys, strictly loaded."""
    state, normaliser = unwrap(file := load_tensors(path))
    name, options = infer_arch(state)
    arch = arch or (file["config"]["student"] if file.get("format") == "infoard-1" else name)
    require(arch.startswith(name), f"holds a {name}, not the {arch} asked for")
    head = state.get("fc.weight", state.get("linear.weight", ()))
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        net = build_model(arch, len(head), file.get("size", size), **options)
    net.load_state_dict(state, assign=True)
    net[0] = Normalize(*(normaliser or lookup(NORMS, norm, "normalisation")))
    return net.float()

def load_teacher(path_or_id: str, arch: str | None = None, num_classes: int | None = None, *,
                 size: int = 32, norm: str = "none", dataset: str = "cifar10",
                 device: str | torch.device = "cpu") -> nn.Module:
    """A frozen net in eval mode, from a file, robustbench:ID or module:factory. What keys do not
    tell must be said: norm (of NORMS), arch "wrn_28_10_silu"; see check_teacher."""
    module, _, name = path_or_id.partition(":")
    try:
        if not name or Path(path_or_id).exists():
            net = load_weights(path_or_id, arch, size, norm)
        elif module == "robustbench":
            from robustbench.utils import load_model
            net = load_model(name, dataset=dataset, threat_model="Linf")
        else:
            sys.path.append(os.getcwd())
            net = getattr(importlib.import_module(module), name)()
        require(isinstance(net, nn.Module), f"{type(net)} is no nn.Module")
        net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        z = predict(net, torch.full((2, 3, size, size), 0.5, device=device))  # [2, K]
        k = z.shape[1]
        require(num_classes in (k, None), f"has {k} classes, the data have {num_classes}")
        require((z < 0).any() or (z.sum(1) - 1).abs().max() > 1e-4, "probabilities, not logits")
    except Exception as error:  # whatever foreign code raises
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InfoardError(why if path_or_id in why else f"{path_or_id}: {why}") from None
    return net

# ==== 8. Data =====================================================================================
@dataclass
class Data:
    """Images uint8 [N,C,H,W] (channels last in memory), labels long [N], names of the classes."""
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: list[str]
    flip: bool = True  # whether a mirror image keeps its label

SHAPES = {"disk": 0, "peanut": 2, "trefoil": 3, "clover": 4, "star": 5}  # lobes of the outline
SHAPES |= {f"hollow {name}": lobes for name, lobes in SHAPES.items()}

def render_shapes(train: int = 10_000, test: int = 2_000, size: int = 32, seed: int = 0) -> Data:
    """The built-in set, a shape per image, from easy (large, clear) to hard (small, faint)."""
    g, n = torch.Generator().manual_seed(seed), train + test
    labels = torch.arange(n) % len(SHAPES)
    kind = labels.view(n, 1, 1, 1)
    lobes = torch.tensor(list(SHAPES.values()))[kind]
    hard, turn, cx, cy = torch.rand(4, n, 1, 1, 1, generator=g).unbind()
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = grid - 0.5 * (cx - 0.5), grid[:, None] - 0.5 * (cy - 0.5)
    outline = 1 + 0.35 * (lobes > 0) * torch.cos(lobes * (torch.atan2(y, x) + turn - 0.5))
    depth = outline - (x * x + y * y).sqrt() / (0.6 - 0.2 * hard)  # [N,1,H,W], positive inside
    depth = torch.where(kind < len(SHAPES) // 2, depth, 0.2 - (depth - 0.1).abs())  # hollow
    ink, tint = torch.sigmoid(12 * depth), torch.rand(2, n, 3, 1, 1, generator=g)
    noise = (0.02 + 0.06 * hard) * torch.randn(n, 3, size, size, generator=g)
    images = 0.05 + 0.3 * tint[0] + (0.75 - 0.5 * hard) * (0.5 + 0.5 * tint[1]) * ink + noise
    images = (images.clamp(0, 1) * 255).round().byte().contiguous(memory_format=torch.channels_last)
    return Data(images[:train], labels[:train], images[train:], labels[train:], list(SHAPES))

TORONTO, STANFORD = "https://www.cs.toronto.edu/~kriz", "http://cs231n.stanford.edu"
PLACES = dict(  # archive or files, folder, something in it, site, how the archive's sha256 begins
    cifar10=("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1", TORONTO, "6d958be0"),
    cifar100=("cifar-100-python.tar.gz", "cifar-100-python", "train", TORONTO, "85cd44d0"),
    svhn=("train_32x32.mat and test_32x32.mat", "", "test_32x32.mat",
          "http://ufldl.stanford.edu/housenumbers", None),
    tinyimagenet=("tiny-imagenet-200.zip", "tiny-imagenet-200", "val", STANFORD, None),
    folder=("train and test", "", "train", None, None))
DATASETS = ("shapes", *PLACES)

def locate(name: str, root: Path) -> Path | None:
    """The folder or archive of a data set: root itself, or something in it."""
    archive, inner, key, *_ = PLACES[name]
    below = sorted(root.glob("*/")) if name == "folder" else []
    found = [p for p in (root / inner, root, *below) if (p / key).exists()]
    return next(iter(found + [p for p in (root, root / archive) if p.is_file()]), None)

def open_parts(name: str, place: Path) -> list:
    """Training and test images by torchvision, as sequences of (image, label)."""
    from torchvision import datasets
    if kind := getattr(datasets, name.upper(), None):
        parts = ("train", "test") if name == "svhn" else (True, False)
        unchecked = dict(_check_integrity=lambda self: True, base_folder="",
                         meta=getattr(kind, "meta", {}) | dict(md5=None))
        return [type(name, (kind,), unchecked)(place, part) for part in parts]
    train, notes = datasets.ImageFolder(place / "train"), place / "val/val_annotations.txt"
    labelled = any((place / "test" / k).is_dir() for k in train.classes)
    test = datasets.ImageFolder(place / ("test" if labelled else "val"))
    lines = notes.read_text().splitlines() if notes.exists() else []  # Tiny-ImageNet's labels
    truth = dict(line.split("\t")[:2] for line in lines)
    test.samples = [(file, train.class_to_idx[truth.get(Path(file).name, test.classes[k])])
                    for file, k in test.samples]
    return [train, test]

def decode(parts: list, size: int, store: str) -> dict:
    """Writes images [N,H,W,3] to the file store, in `size` pixels or those of the first image."""
    from PIL import ImageOps
    places, labels = [(p, i) for p in parts for i in range(len(p))], []
    def pixels(part, i, fit=True):
        try:
            image, label = part[i]
        except (OSError, SyntaxError) as error:
            raise InfoardError(f"replace {part.samples[i][0]}: corrupt, {error}") from None
        return ImageOps.fit(image, shape).tobytes() if fit else image.size, label
    shape = (size, size) if size else pixels(*places[0], fit=False)[0]  # width, height
    with open(store, "wb") as f, ThreadPool() as pool:
        for i in progress_bar(range(0, len(places), 1024), "decoding 1,024 images each"):
            images, some = zip(*pool.starmap(pixels, places[i:i + 1024]), strict=True)
            f.write(b"".join(images))
            labels += some
    classes = list(map(str, getattr(parts[0], "classes", range(10))))
    return dict(labels=labels, train=len(parts[0]), shape=(*shape[::-1], 3), classes=classes)

def read_cached(name: str, source: Path, size: int, cache: Path) -> Data:
    """A folder or archive, memory-mapped; it is decoded once for each state of its files."""
    files = sorted(Path(d, f) for d, _, names in os.walk(source) for f in names) or [source]
    state = "".join(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
    facts = cache / f"{name}-{size}-{hashlib.sha256(state.encode()).hexdigest()[:12]}.json"
    if not facts.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            if source.is_file():
                shutil.unpack_archive(source, work, filter=("data", None)[source.suffix == ".zip"])
                source = locate(name, Path(work)) or Path(work)
            found = decode(open_parts(name, source), size, f"{work}/.images")
            os.replace(f"{work}/.images", facts.with_suffix(".images"))
            save(facts, found)
    found = json.loads(facts.read_text())
    x = np.memmap(facts.with_suffix(".images"), np.uint8, "c").reshape(-1, *found["shape"])
    x, n = torch.from_numpy(x).permute(0, 3, 1, 2), found["train"]
    y = torch.tensor(found["labels"])
    return Data(x[:n], y[:n], x[n:], y[n:], found["classes"], flip=name != "svhn")

def load_dataset(name: str, data_dir: str | Path = "data", *, download: bool = True,
                 image_size: int = 0, cache: str | Path = "runs/cache") -> Data:
    """A data set as uint8 tensors, for all ranks; data_dir: its parent, folder or archive."""
    if lookup(DATASETS, name, "data set") == "shapes":
        return render_shapes()
    root, (archive, inner, _, site, sha256) = Path(data_dir), PLACES[name]
    rank = world()[0]
    _ = rank and meet()  # the others wait, and find what rank 0 makes
    hint = f"put {archive}{f' or {inner}/' if inner else ''} there, or name its --data-dir"
    try:
        if download and site and not locate(name, root):
            root.mkdir(parents=True, exist_ok=True)
            for file in archive.split(" and "):
                print(f"downloading {site}/{file} to {root}")
                torch.hub.download_url_to_file(f"{site}/{file}", root / file, sha256)
        source = locate(name, root)
        require(source, f"no {name} in {root}: {hint}")
        return read_cached(name, source, image_size, Path(cache))
    except (InfoardError, ImportError):
        raise
    except Exception as error:  # whatever broken files and networks make their readers raise
        raise InfoardError(f"no usable {name} in {root} ({error}): {hint}") from None
    finally:
        _ = rank or meet()

def class_balanced(y: Tensor, n: int) -> Tensor:
    """Sorted indices of n images, spread evenly over the classes; always the same ones."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    classes = [order[y[order] == k] for k in y.unique()]
    rounds = nn.utils.rnn.pad_sequence(classes, padding_value=-1)  # [most, K]: one of each class
    return rounds[rounds >= 0][:n].sort().values

def to_float(x: Tensor, device: str | torch.device) -> Tensor:
    """uint8 (or float) images as float in [0,1] on the device, channels last."""
    x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
    return x.float() / 255 if x.dtype == torch.uint8 else x

def augment(x: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Random crop after zero padding, random mirror image; all at once: [B,C,H,W] -> like x. Each
    rank draws for the images of all ranks and takes its own, so they are those of one process."""
    (b, _, h, w), (rank, ranks) = x.shape, world()
    draws = (torch.randint(0, 2 * pad + 1, (2, b * ranks), generator=generator),
             (torch.rand(1, b * ranks, generator=generator) < 0.5) & flip)
    down, right, mirror = torch.cat(draws)[:, rank::ranks].to(x.device, non_blocking=True)
    mirror = mirror.bool().view(b, 1, 1, 1)
    windows = F.pad(x, (pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # [B,C,2 pad+1,2 pad+1,H,W]
    x = windows[torch.arange(b, device=x.device), :, down, right]
    return torch.where(mirror, x.flip(3), x)

# ==== 9. Evaluation ===============================================================================
def correct(net: nn.Module, x: Tensor, y: Tensor, attack=None, size=0, text="") -> Tensor:
    """Which samples are classified right, bool [N] on the CPU, after attack(net, x, y) if given.
    The ranks, which must all call it, share the batches out; one that is too large is halved."""
    device, (rank, ranks) = next(net.parameters()).device, world()
    size, hits = size or (256 if device.type == "cpu" else 512), torch.zeros(len(x), device=device)
    def judge(x, y):
        try:
            z, y_b = to_float(x, device), y.to(device)
            return predict(net, attack(net, z, y_b) if attack else z).argmax(1) == y_b
        except torch.OutOfMemoryError:
            if len(x) == 1:
                raise
        return torch.cat([judge(*half) for half in zip(x.chunk(2), y.chunk(2), strict=True)])
    with frozen_eval(net):
        for i in progress_bar(range(rank * size, len(x), ranks * size), text):
            hits[i:i + size] = judge(x[i:i + size], y[i:i + size])
    return summed(hits).cpu() > 0

def repeatable(attack: Callable, device: torch.device, seed: int = 0, **options) -> Callable:
    """attack(net, x, y) that draws the same numbers in every call, as AutoAttack does: its result
    depends neither on the calls before nor on which rank makes them."""
    g = torch.Generator(device)
    return lambda net, x, y, **more: attack(net, x, y, generator=g.manual_seed(seed),
                                            **options | more)

def percent(hits: Tensor) -> float:
    """The share of true values in per cent, with two decimals."""
    return round(100 * hits.double().mean().item(), 2)

def check_teacher(net: nn.Module, x: Tensor, y: Tensor, name: str, classes: int) -> None:
    """Clean accuracy in per cent beside the published one; one below twice chance stops the run."""
    accuracy, plain = percent(correct(net, x, y)), name.lower().replace("-", "_")
    known = [f", published {v}" for k, v in PUBLISHED.items() if k.lower() in plain][:classes == 10]
    print(f"teacher {name}: clean accuracy {accuracy} on {len(x)} test images{''.join(known)}")
    require(accuracy > min(200 / classes, 50 + 50 / classes), f"teacher {name} has clean accuracy "
            f"{accuracy}, chance is {100 / classes:.1f}: wrong file, --teacher-norm or -epochs?")

ASKED = dict(clean=(), pgd=("pgd_sat", "pgd_trades"), apgd=(), aa=())
METRICS = ["clean", *ATTACKS, "apgd", "aa", "worst", "worst_class"]
AT_END = []  # functions (run, results), for what is to be added to a finished run
OUTSIDE = []  # attacks outside the L-infinity ball: no part of `worst`

def autoattack(net: nn.Module, eps: float, seed: int, classes: int) -> Callable:
    """attack(part, net, x, y), for the parts of AutoAttack [AA]."""
    from pyautoattack import AutoAttack
    aa = AutoAttack(net, eps=eps, norm="Linf", seed=seed, device=next(net.parameters()).device)
    aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = min(9, classes - 1)
    def attack(part, net, x, y):
        aa.attacks_to_run = [part]
        return aa.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]
    return attack

def interval(share: float, n: int) -> list[float]:
    """Wilson's 95% interval of a share of n samples, in per cent."""
    z = 1.96 / math.sqrt(n)
    half = z * math.sqrt(share * (1 - share) + z * z / 4)
    return [round(100 * (share + z * z / 2 + d) / (1 + z * z), 2) for d in (-half, half)]

def evaluate(model: nn.Module, x: Tensor, y: Tensor, *, eps: float = 8 / 255,
             eps_l2: float = 0.5, attacks: str = "clean,fgsm,pgd,cw,apgd", batch_size: int = 0,
             classes: int | None = None, seed: int = 0, source: nn.Module | None = None) -> dict:
    """Accuracies in per cent under attacks of radius eps or eps_l2; x [N,C,H,W] uint8 or in [0,1].
    A sample is robust if it is right on x and on x'. pgd: PGD-20 with steps of 2/255 (sat), 0.003
    (trades); cw: CW_inf, 30 steps; apgd: AutoAttack's APGD-CE and APGD-T; aa: all of it; more in
    ATTACKS; worst: all L-infinity ones that were run; worst_class: of it; ci95: Wilson's; warnings:
    of masked gradients. source: the net attacked in the model's place (AutoAttack: where right)."""
    wanted, known = attacks.replace(" ", "").split(","), {k: (k,) for k in ATTACKS} | ASKED
    names = [name for w in wanted for name in lookup(known, w, "attack")]
    require(len(x) and (x.dtype == torch.uint8 or 0 <= x.min() <= x.max() <= 1),
            "evaluate needs images in [0, 1]: normalise inside the model")
    classes, clean = classes or int(y.max()) + 1, correct(model, x, y, None, batch_size)
    device, seen = next(model.parameters()).device, source or model
    def still_right(before: Tensor, attack: Callable, text: str = "") -> Tensor:
        after = before.clone()  # who is lost stays lost
        with frozen_eval(seen):
            after[before] = correct(model, x[before], y[before], lambda _, *xy: attack(seen, *xy),
                                    batch_size, text)
        return after
    attack = {k: repeatable(f, device, seed, eps=eps, eps_l2=eps_l2) for k, f in ATTACKS.items()}
    right = {name: still_right(clean, attack[name], name) for name in names}
    some = clean.nonzero().squeeze(1)[::int(clean.sum()) // 256 + 1] if "pgd" in wanted else []
    far = correct(model, x[some], y[some], partial(attack["pgd_sat"], eps=64 / 255), batch_size)
    if {"apgd", "aa"} & set(wanted):
        parts = ["apgd-ce"] + ["apgd-t"] * (classes > 3)  # the targeted loss needs four classes
        parts += ["fab-t", "square"] * ("aa" in wanted)
        standard, alive = autoattack(seen, eps, seed, classes), clean
        with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
            for part in parts:
                alive = right[part] = still_right(alive, partial(standard, part), part)
        right |= dict(apgd=right.get("apgd-t", right["apgd-ce"]))
        right |= dict(aa=alive) if "aa" in wanted else {}
    result = summary(dict(clean=clean) | right, y.cpu(), classes, percent(far))
    if hasattr(model, "quality"):
        few = to_float(x[:256], device)
        result |= model.quality(few, attack["pgd_sat"](seen, few, y[:256].to(device)))
    return result if source is None else result | dict(warnings=[])

def summary(right: dict[str, Tensor], y: Tensor, classes: int, far: float = 0.0) -> dict:
    """The result of evaluate, from who is still right after what; far: the share at 64/255, %."""
    within = [hits for name, hits in right.items() if name not in OUTSIDE]
    right = right | dict(worst=torch.stack(within).all(0))
    result = {k: percent(right[k]) if k in right else None for k in METRICS}
    per_class = [percent(right["worst"][y == k]) for k in range(classes) if (y == k).any()]
    warnings = [f"{k} is {result['pgd_sat'] - result[k]:.1f} points under PGD-20"
                for k in ("cw", "apgd", "aa") if None not in (result[k], result["pgd_sat"])
                and result["pgd_sat"] - result[k] >= 8]
    if "square" in right and percent((right["fab-t"] & ~right["square"])[right["clean"]]) > 1:
        warnings.append("Square, which uses no gradients, beats APGD")
    if far > 1:
        warnings.append(f"{far}% of the right ones survive eps = 64/255")
    ci95 = {k: interval(right[k].double().mean().item(), len(y)) for k in METRICS if k in right}
    return result | dict(worst_class=min(per_class), per_class=per_class, n=len(y), ci95=ci95,
                         warnings=warnings)

# ==== 10. Checkpoints and training ================================================================
def pick_device(name: str) -> torch.device:
    """A device that is there; auto: CUDA if possible."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError):
        raise InfoardError(f"device {name!r} is not available here: --device cpu or auto") from None

def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The half precision to train in; auto: bf16 where the hardware multiplies it, else none."""
    fast = dict(cuda=partial(torch.cuda.is_bf16_supported, including_emulation=False),
                cpu=torch.cpu._is_avx512_bf16_supported).get(device.type, bool)
    amp = ("bf16" if fast() else "off") if amp == "auto" else amp
    return dict(bf16=torch.bfloat16, fp16=torch.float16, off=None)[amp]

class Objective(nn.ModuleList):
    """What learns, with the loss of a Step as its pass: a module whose gradients ranks share."""
    def forward(self, **step) -> tuple[Tensor, Step]:
        step = Step(**step)
        return step.loss(), step

class Run:
    """All that changes during a training, to be saved and brought back whole. Of N ranks each has
    an N-th of every batch: ASA ranks, batch norm, NAMID and MID's inner step know no more of it."""
    def __init__(self, cfg: Config, data: Data, device: torch.device, nets: dict):
        self.cfg, self.data, self.device, self.nets = cfg, data, device, nets
        teacher = nets["teacher"]
        size, dtype = data.x_train.shape[-1], amp_dtype(cfg.amp, device)
        self.label = dict(format="infoard-1", config=asdict(cfg), size=size, classes=data.classes)
        with torch.random.fork_rng([]):  # nets are made on the CPU
            torch.default_generator.manual_seed(cfg.seed)
            self.student = build_model(cfg.student, len(data.classes), size)
            if prepare := getattr(FRAMEWORKS[cfg.framework], "prepare", None):
                self.student = prepare(self.student, teacher, cfg, len(data.classes))
            if cfg.sync_bn:
                self.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)
            self.student.to(device, memory_format=torch.channels_last)
            ema = cfg.ema and AveragedModel(
                self.student, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True)
            same = {k: getattr(cfg, k) for k in ("asa", "mim", "w_feat", "w_att", "w_rel", "tau")}
            self.info = cfg.infoard and InfoARD(
                self.student, teacher, image_shape=(3, size, size), dim=cfg.critic_dim,
                lam=(cfg.lam_lo, cfg.lam_hi), **same)
        self.evaluated = ema.module if ema else self.student
        critics = self.info.critics if self.info else nn.ModuleList()
        groups = [dict(params=list(net.parameters())) for net in (self.student, critics)]
        self.optimizer = torch.optim.SGD(groups, cfg.lr, 0.9, weight_decay=cfg.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.parts = dict(model=self.student, critics=critics, optimizer=self.optimizer,
                          scaler=self.scaler) | (dict(ema=ema) if ema else {})
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
        self.forward = torch.compile(self.student) if cfg.compile else self.student
        self.objective, (self.rank, self.ranks) = Objective([self.student, critics]), world()
        if self.ranks > 1:
            self.objective = DistributedDataParallel(self.objective)
        seed = cfg.seed + 1_000_003 * self.rank  # attack starts of their own
        self.generators = dict(data=torch.Generator().manual_seed(cfg.seed),
                               attack=torch.Generator(device).manual_seed(seed))
        pool = class_balanced(data.y_train, cfg.subset or len(data.y_train))
        self.val = pool[class_balanced(data.y_train[pool], min(cfg.val_size, len(pool) // 10))]
        self.train = pool[~torch.isin(pool, self.val)]
        room = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 0
        self.x = data.x_train.to(device) if data.x_train.nbytes < room else data.x_train
        self.at = dict(epoch=0, position=0, step=0, best=-1.0, best_epoch=0, seconds=0.0,
                       order=self.train, sums={}, memory={}, history=[])
    def state(self) -> dict:
        states = {k: g.get_state() for k, g in self.generators.items()}
        states["attack"] = gathered(states["attack"][None])
        sums = {k: summed(v) for k, v in self.at["sums"].items()}
        return self.label | {k: part.state_dict() for k, part in self.parts.items()} | dict(
            at=self.at | dict(sums=sums), generators=states)
    def load(self, path: Path) -> None:
        state = load_tensors(path)
        require({"at", *self.parts} <= state.keys(), f"{path} is no run to go on: change --out")
        for k, part in self.parts.items():
            part.load_state_dict(state[k])
        for k, g in self.generators.items():
            with contextlib.suppress(RuntimeError, IndexError):  # other devices or more ranks
                states = torch.atleast_2d(state["generators"][k])
                g.set_state(states[self.rank if k == "attack" else 0].clone())  # a view crashes
        self.at = state["at"]
        for name, share in dict(sums=self.rank == 0, memory=1).items():
            self.at[name] = {k: share * v.to(self.device) for k, v in self.at[name].items()}
    def step(self) -> None:
        """One batch: draw, augment, attack, train, add up; no number is read from the device."""
        cfg, at, draw, optimizer = self.cfg, self.at, self.generators["data"], self.optimizer
        if at["position"] == 0:
            at |= dict(order=self.train[torch.randperm(len(self.train), generator=draw)], sums={})
        batch = at["order"][at["position"]:at["position"] + cfg.batch_size]
        share = (at["epoch"] + at["position"] / len(self.train)) / cfg.epochs
        at |= dict(position=at["position"] + len(batch), step=at["step"] + 1)
        rows = batch[:len(batch) // self.ranks * self.ranks][self.rank::self.ranks]  # equal shares
        if not len(rows):
            return
        x = self.x[rows.to(self.x.device, non_blocking=True)]
        y = self.data.y_train[rows].to(self.device, non_blocking=True)
        x = to_float(augment(x, draw, x.shape[-1] // 8, self.data.flip), self.device)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr_at(share)
        self.student.train()
        with self.autocast():
            loss, step = self.objective(
                student=self.forward, x=x, y=y, cfg=cfg, info=self.info, **self.nets,
                generators=self.generators, progress=share, memory=at["memory"])
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        if "ema" in self.parts:
            self.parts["ema"].update_parameters(self.student)
        means = dict(loss=loss, **step.terms, eps=step.threat.eps, steps=step.threat.steps)
        new = {k: torch.as_tensor(v, dtype=torch.float, device=self.device).detach().mean() * len(y)
               for k, v in means.items()}
        at["sums"] = {k: at["sums"].get(k, 0) + v for k, v in new.items()}
    def end_epoch(self, out: Path, seconds: float, images: int) -> dict:
        """Validation, the row of the log, best.pt if it is the best, last.pt."""
        cfg, at, net, n = self.cfg, self.at, self.evaluated, len(self.train)
        x, y = self.data.x_train[self.val], self.data.y_train[self.val]
        attack = repeatable(ATTACKS["pgd_sat"], self.device, eps=cfg.eps)
        for buffer in net.buffers() if self.ranks > 1 else ():  # batch norm's are rank 0's
            dist.broadcast(buffer, 0)
        with self.autocast():
            clean, attacked = (correct(net, x, y, a, cfg.eval_batch) for a in (None, attack))
        at |= dict(epoch=at["epoch"] + 1, position=0, seconds=at["seconds"] + seconds)
        val = dict(val_clean=percent(clean), val_pgd=percent(clean & attacked)) if len(x) else {}
        row = dict(epoch=at["epoch"], lr=self.optimizer.param_groups[0]["lr"],
                   **{k: summed(v).item() / (n // self.ranks * self.ranks)
                      for k, v in at["sums"].items()},
                   **val, images_per_s=round(images / seconds, 1), seconds=round(at["seconds"], 1))
        at["history"].append(row)
        score = row.get(SCORES.get(cfg.framework, "val_pgd"), 0.0)
        if score > at["best"] or not len(x):
            at |= dict(best=score, best_epoch=at["epoch"])
            save(out / "best.pt", self.label | dict(epoch=at["epoch"], model=net.state_dict()))
        save(out / "last.pt", self.state())
        save(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in at["history"]).encode())
        return row
    def look(self, out: Path, caught: list[int]) -> None:
        """The log point, where the device is waited for: stops if the loss is not finite and, with
        all saved, if any rank has caught a signal."""
        at, last = self.at, out / "last.pt"
        loss, signals = summed(torch.tensor([at["sums"]["loss"].item(), sum(caught)])).tolist()
        require(math.isfinite(loss), f"the loss is not finite at step {at['step']}: lower --lr or "
                f"--amp off; last good checkpoint: {last if at['history'] else 'none'}")
        if signals:
            save(last, self.state())
            meet()  # no rank is gone before it is saved
            number = caught[0] if caught else signal.SIGTERM
            print(f"stopped by {signal.Signals(number).name} at step {at['step']}, all saved in "
                  f"{last}: --resume goes on")
            raise SystemExit(128 + number)

def test_images(data: Data, n: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """n class-balanced test images, always the same; 0: all; None: 500 on a CPU, else all."""
    n = n if n is not None else 500 * (device.type == "cpu")
    rows = class_balanced(data.y_test, n or len(data.y_test))
    return data.x_test[rows], data.y_test[rows]

def trained(cfg: Config, framework: str, arch: str, teacher: str | None = None, **more) -> str:
    """best.pt of a net that is trained once with these settings, and then kept."""
    same = "dataset data_dir subset val_size image_size eps steps step_size lr amp batch_size"
    recipe = {k: getattr(cfg, k) for k in same.split()} | dict(
        student=arch, framework=framework, epochs=cfg.teacher_epochs) | more
    if framework in ("autoencoder", "natural") and cfg.framework != "mtard":
        recipe["seed"] = 99  # no student of the tables begins with it
    key = json.dumps(recipe) + (digest(teacher) or teacher if teacher else "")
    key = hashlib.sha256(key.encode()).hexdigest()[:8]
    out = Path(f"runs/teachers/{cfg.dataset}-{arch}-{framework}-{key}")
    if not (out / "results.json").exists():
        print(f"training by {framework} what is missing, kept in {out}")
        here = {k: getattr(cfg, k) for k in ("download", "device", "eval_subset")}
        train(**here | recipe, teacher=teacher, out=str(out), infoard=False, attacks="clean,pgd",
              figures=False, resume=True)
    return f"{out}/best.pt"

def get_nets(cfg: Config, data: Data, device: torch.device) -> dict:
    """The nets beside the student that a framework needs, named as in Step, and checked."""
    nets, paths, classes = {}, {}, len(data.classes)
    arch = cfg.teacher_arch or replace(cfg, teacher=None).resolved().teacher_arch
    plain = re.sub(f"({'|'.join(WRAPPERS)})$", "", arch)
    if cfg.infoard or cfg.framework in NEED_TEACHER:
        path = cfg.teacher or trained(cfg, cfg.teacher_framework, arch)
        paths["teacher"] = path, cfg.teacher_arch
    if cfg.framework in NEED_NATURAL or cfg.transfer:
        arch = cfg.teacher_arch and plain
        paths["teacher_nat"] = cfg.teacher_nat or trained(cfg, "natural", plain), arch
    for name, (path, arch) in paths.items():
        nets[name] = load_teacher(path, arch, classes, size=data.x_train.shape[-1], device=device,
                                  norm=cfg.teacher_norm, dataset=cfg.dataset)
        check_teacher(nets[name], *test_images(data, 1000, device), path, classes)
    if more := getattr(FRAMEWORKS[cfg.framework], "nets", None):
        nets |= more(cfg, nets["teacher"], paths["teacher"][0], classes)
    return dict(teacher=None) | nets

def same_settings(old: dict, cfg: Config) -> None:
    """One line, if a run was begun with other settings than these (its machine and files apart)."""
    idle = "" if cfg.infoard else "asa lam_lo lam_hi steps_lo mim w_feat w_att w_rel tau"
    free = (idle + " device out resume figures progress attacks eval_subset eval_batch data_dir "
            "download compile transfer").split()
    old = asdict(Config()) | old  # what was no option then
    for name, value in asdict(cfg).items():
        require(name in free or old[name] == value, f"{cfg.out} was made with --"
                f"{name.replace('_', '-')} {old[name]}, not {value}: choose another --out")

def train(cfg: Config | None = None, **given) -> dict:
    """The whole job: data, teacher, student, evaluation, files in cfg.out; gives results.json."""
    cfg = (cfg or Config(**given)).resolved()
    out, device = Path(cfg.out), pick_device(cfg.device)
    finished, begun = (out / "results.json").exists(), (out / "last.pt").exists()
    if finished or begun:
        same_settings(json.loads((out / "config.json").read_text())["settings"], cfg)
    if finished:
        print(f"{out} is finished: another --out or --seed makes another run")
        return json.loads((out / "results.json").read_text())
    require(cfg.resume or not begun, f"{out} holds an unfinished run: --resume or another --out")
    check = getattr(lookup(FRAMEWORKS, cfg.framework, "framework"), "check", None)
    _ = check and check(cfg), [lookup(ATTACKS | ASKED, w.strip(), "attack")
                               for w in cfg.attacks.split(",")]
    ranks = world()[1]
    require(cfg.batch_size % ranks == 0, f"--batch-size must be a multiple of {ranks}, the ranks")
    require(not cfg.sync_bn or device.type == "cuda", "--sync-bn needs CUDA")
    with torch.device("meta"):  # a look at the name before the work begins
        build_model(cfg.student)
    _ = re.search("apgd|aa", cfg.attacks) and importlib.import_module("pyautoattack")
    _ = cfg.figures and AT_END and importlib.import_module("matplotlib")
    data = load_dataset(cfg.dataset, cfg.data_dir, download=cfg.download, image_size=cfg.image_size)
    if not begun:
        save(out / "config.json", dict(
            settings=asdict(cfg), argv=sys.argv, python=sys.version.split()[0],
            torch=torch.__version__, machine=sys.platform, threads=torch.get_num_threads(),
            ranks=ranks, gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
            source_sha256=digest(__file__), teacher_sha256=digest(cfg.teacher or ""),
            defences_sha256=digest(Path(__file__).with_name("defences.py"))))
    run = Run(cfg, data, device, get_nets(cfg, data, device))
    if begun:
        run.load(out / "last.pt")
    at, n, caught = run.at, len(run.train), []
    print(f"{out}: {cfg.student} by {cfg.framework}{' + InfoARD' * cfg.infoard}, {n} training and "
          f"{len(run.val)} validation images, {ranks} x {device}, from epoch {at['epoch'] + 1}")
    with contextlib.ExitStack() as stack:
        for signum in (signal.SIGINT, signal.SIGTERM):  # the first is noted, a second acts at once
            with contextlib.suppress(ValueError):  # outside the main thread
                stack.callback(signal.signal, signum, signal.signal(signum, lambda number, _: (
                    caught.append(number), signal.signal(number, signal.SIG_DFL))))
        while at["epoch"] < cfg.epochs:
            began, first = time.time(), at["position"]
            for _ in progress_bar(range(first, n, cfg.batch_size), f"epoch {at['epoch'] + 1}"):
                run.step()
                if at["step"] == 5:
                    minutes = (time.time() - began) / (at["position"] - first) * n * cfg.epochs / 60
                    print(f"about {minutes:.1f} minutes for {cfg.epochs} epochs, plus validation")
                every, now = (50, caught) if ranks == 1 else (10, False)  # ranks stop together
                if now or at["step"] % every == 0 or at["position"] == n:
                    run.look(out, caught)
            row = run.end_epoch(out, max(time.time() - began, 1e-6), n - first)
            print(*(f"{k} {v:.4g}" for k, v in row.items()), sep="  ", flush=True)
    return finish(run, out)

def report(name: str, r: dict) -> None:
    """Prints a result r of evaluate, in per cent, and its warnings."""
    print(f"{name}:", *(f"{k} {r[k]:.2f}" for k in METRICS if r.get(k) is not None), sep="  ")
    print(*(f"warning, gradients may be masked: {w}\n" for w in r["warnings"]), sep="", end="")

def finish(run: Run, out: Path) -> dict:
    """The one look at the test images: last and best under all attacks, tables, figures."""
    cfg, at, (x, y) = run.cfg, run.at, test_images(run.data, run.cfg.eval_subset, run.device)
    examine = partial(evaluate, x=x, y=y, eps=cfg.eps, eps_l2=cfg.eps_l2, attacks=cfg.attacks,
                      batch_size=cfg.eval_batch, classes=len(run.data.classes))
    last = best = examine(net := run.evaluated) | dict(epoch=at["epoch"])
    if at["best_epoch"] != at["epoch"]:
        net = load_weights(out / "best.pt").to(run.device, memory_format=torch.channels_last)
        best = examine(net) | dict(epoch=at["best_epoch"])
    results = dict(last=last, best=best)
    if cfg.transfer:
        results["transfer"] = examine(net, source=run.nets["teacher_nat"])
    if hasattr(net, "findings"):
        results["findings"] = net.findings(x, y, cfg.eps)
    save(out / "results.json", results)
    for add in AT_END:
        add(run, results)
    _ = [report(f"{out.name} {k}", results[k]) for k in ("best", "last")]
    print(f"in {out}: results.json, log.jsonl, best.pt, last.pt")
    meet()  # no rank asks for these files before they are there
    return results

# ==== 11. Command line ============================================================================
def number(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / (float(below or 1) or math.nan)

def settings(path: str, given: dict) -> dict:
    """The options given, on top of what a checkpoint says of its data."""
    saved = load_tensors(path).get("config", {}) if ":" not in path else {}
    wanted = "dataset data_dir image_size eps eps_l2 subset val_size"
    found = {k: saved[k] for k in wanted.split() if k in saved} | given
    require("dataset" in found, f"{path} does not say its data: add --dataset")
    return found

def run_eval(path: str, **given) -> None:
    """Evaluate any checkpoint; --out: keep eval.json there; --teacher-nat: transfer from it."""
    cfg = Config(**(made := settings(path, given)))
    device = pick_device(cfg.device)
    data = load_dataset(cfg.dataset, cfg.data_dir, download=cfg.download, image_size=cfg.image_size)
    net = load_teacher(path, cfg.teacher_arch, len(data.classes), size=data.x_test.shape[-1],
                       norm=cfg.teacher_norm, dataset=cfg.dataset, device=device)
    source = load_teacher(cfg.teacher_nat, device=device) if cfg.teacher_nat else None
    result = evaluate(net, *test_images(data, cfg.eval_subset, device), eps=cfg.eps, seed=cfg.seed,
                      eps_l2=cfg.eps_l2, attacks=cfg.attacks, batch_size=cfg.eval_batch,
                      classes=len(data.classes), source=source)
    report(Path(path).name, result)
    print("95% intervals:", ", ".join(f"{k} {lo}-{hi}" for k, (lo, hi) in result["ci95"].items()))
    if cfg.out:
        save(Path(cfg.out, "eval.json"), result | dict(checkpoint=path, settings=made))

@contextlib.contextmanager
def all_ranks(device: str) -> Iterator[None]:
    """Joins the processes that torchrun has started, if any; all but rank 0 print nothing."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() * (device != "cpu")
    require(":" not in device and local < (gpus or math.inf), f"each process takes one of {gpus} "
            "GPUs: use --device cuda and no larger --nproc-per-node")
    torch.cuda.set_device(local if gpus else -1)  # -1: none
    store, rank, ranks = next(dist.rendezvous("env://"))  # which may know of an earlier attempt
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(hours=1),
                            store=store, rank=rank, world_size=ranks)
    os.environ |= dict(TQDM_DISABLE="1") if rank else {}
    try:
        with contextlib.redirect_stdout(None if rank else sys.stdout):
            yield
        meet()
        dist.destroy_process_group()
    except RuntimeError as error:
        gone = re.search("(?i)gloo|nccl|peer|timed out", str(error))
        require(not gone, f"another rank is gone: start all again with --resume; {str(error)[:99]}")
        raise

VERBS = dict(train=train, eval=run_eval)  # extras.py and defences.py have more

def parse(verb: str, argv: list[str]) -> dict:
    """The options that were given: those of train and eval are the fields of Config."""
    text = f"{lookup(VERBS, verb, 'verb').__doc__} Verbs: {', '.join(VERBS)}."
    parser = argparse.ArgumentParser(f"infoard.py {verb}", description=text, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda message: require(False, f"{message} (see --help)")
    wants = list(inspect.signature(VERBS[verb]).parameters.values())
    if wants[0].name in ("path", "folder"):
        parser.add_argument(wants[0].name, metavar=dict(path="CKPT").get(wants[0].name, "DIR"))
    takes_all = wants[-1].kind is inspect.Parameter.VAR_KEYWORD
    for f in fields(Config) if takes_all else ():
        preset = " or ".join(f"{v[f.name]} ({k})" for k, v in PRESETS.items() if f.name in v)
        default = f"{255 * f.default:.0f}/255" if f.name in ("eps", "step_size") else f.default
        text = ", ".join(FRAMEWORKS) if f.name == "framework" else f.metadata["help"]
        text += f"; default: {preset if default is None else default}" * bool(preset or default)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=number if f.type is float else f.type,
            metavar="|".join(f.metadata["choices"]) or f.type.__name__.upper())
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    if verb == "train":
        parser.add_argument("--lite", action="store_true", help=f"for small machines: {LITE}")
    given = vars(parser.parse_args(LITE.split() * ("--lite" in argv) + argv))
    return {k: v for k, v in given.items() if k != "lite"}

def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb, argv = (argv[0], argv[1:]) if argv and argv[0][0] != "-" else ("train", argv)
    try:
        given = parse(verb, argv)
        os.environ |= {} if given.get("progress", True) else dict(TQDM_DISABLE="1")
        with all_ranks(given.get("device", "auto")):
            VERBS[verb](**given)
        return 0
    except KeyboardInterrupt:
        return 130
    except (InfoardError, OSError, ImportError, torch.OutOfMemoryError) as error:
        hint = ": lower --batch-size or --eval-batch" * isinstance(error, torch.OutOfMemoryError)
        hint += f": pip install {error.name}" if isinstance(error, ImportError) else ""
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"infoard: error{rank}: {str(error).splitlines()[0]}{hint}", file=sys.stderr)
        return 2

if __name__ == "__main__":  # by its name: the module to which the others add
    code = importlib.import_module(Path(__file__).stem).main()
    if "LOCAL_RANK" in os.environ:  # gloo's threads sometimes abort an orderly exit
        _ = sys.stdout.flush(), os._exit(code)
    raise SystemExit(code)
for name in ("extras", "defences"):  # they enter themselves in the tables above
    if Path(__file__).with_name(f"{name}.py").exists():
        importlib.import_module(name)
