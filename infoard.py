"""InfoARD: adversarial robustness distillation in one file.

A robust teacher T is distilled into a small student S that resists L-infinity attacks. InfoARD adds
two parts to any distillation framework: ASA (attack-strength adaptation) attacks each image with a
strength of its own, and MIM (mutual-information maximisation) keeps the student informative about
the teacher's features (and, if asked to, attention maps).

    python infoard.py                                     offline demo on rendered shapes, minutes
    python infoard.py --dataset cifar10 --device cuda     the main job: teacher, student, evaluation
    python infoard.py eval CKPT --attacks clean,pgd,aa    any checkpoint, ours or a stranger's
    torchrun --nproc-per-node=8 infoard.py ...            the same on many devices or machines
    from infoard import InfoARD, Threat, pgd, infonce     every part works in a foreign loop

    1  notation, configuration     5  InfoARD              9  evaluation
    2  divergences, margins        6  frameworks          10  training
    3  attacks and ASA             7  models, teachers    11  command line
    4  mutual information          8  data

Of InfoARD only the abstract is public: the rank rule of section 3 and the critics and terms of
section 5 are our reconstruction. What stands beside the method is in companions/ (more frameworks,
attacks, data sets, nets, other people's files, `eval`, intervals and warnings, tables, figures);
alone, this file trains on the built-in data, evaluates, and resumes from the end of an epoch.

[InfoARD] Liu et al., IEEE TIP 2025, doi 10.1109/TIP.2025.3637689     [AA] AutoAttack, 2003.01690
[Madry] PGD, 1706.06083   [TRADES] 1901.08573   [ARD] 1905.09747   [RSLAD] 2108.07969
[AdaAD] Huang et al., CVPR 2023   [FGSM] 1412.6572   [MI-FGSM] 1710.06081   [CW] 1608.04644
[CPC] InfoNCE, 1807.03748   [Poole] bounds compared, 1905.06922   [RKD] 1904.05068
[DV] Donsker and Varadhan 1983; MINE, 1801.04062     [NWJ] 0809.0853     [JSD] f-GAN, 1606.00709
[BA] Barber and Agakov 2003; VID, 1904.05835   [Maps] attention, 1612.03928
"""

import argparse
import contextlib
import difflib
import hashlib
import importlib
import json
import math
import os
import pkgutil
import re
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property, partial
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ and Path(sys.argv[0]).stem == "infoard":  # the program
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads soon give way to other work

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# ==== 1. Notation and configuration ===============================================================
# x [B,C,H,W] in [0,1] (normalisation lives inside the model), y [B], K classes
# x' = x_adv, |x' - x|_inf <= eps; eps and alpha (the step; in section 6 a weight) are fractions of
# the range [0,1], written n/255
# S, T student and teacher, x -> logits [B,K]; s, t = S(x), T(x); maps {name: [B,C_l,H_l,W_l]}
# scores [B,B]: row i the student on x'_i, column j the teacher on x_j; divergences, MI in nats

ALL = slice(None)  # all rows of a batch


class InfoardError(ValueError):
    """A mistake that one line can explain. The command line prints it and exits with code 2."""


def require(condition, message: str) -> None:
    """InfoardError(message) unless condition."""
    if not condition:
        raise InfoardError(message)


def lookup(table, name: str, what: str):
    """table[name] (or name itself, from a list), or one line that lists the names there are."""
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise InfoardError(f"unknown {what} {name!r} ({meant}choose from {', '.join(table)})")
    return table[name] if isinstance(table, dict) else name


def resolve(table: dict, name: str, what: str):
    """The entry called name, or anyone's own, "module:name" (of this folder too), "file.py:name".
    An entry that is such a name itself, of a companion, is imported when it is asked for.
    """
    entry = name if ":" in name else lookup(table, name, what)
    if not isinstance(entry, str):
        return entry
    sys.modules.setdefault("infoard", sys.modules[__name__])  # others import this file as infoard
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if ".py:" in entry:
            entry = pkgutil.resolve_name("companions.own:imported")(entry)
        found = pkgutil.resolve_name(entry)
    except Exception as error:  # whatever foreign code raises
        if isinstance(error, ImportError) and not entry.startswith(error.name or entry):
            raise  # a package that it needs: the command line says how to install it
        meant = None if what == "companion" else optional("own:nearest")(error, entry)
        raise InfoardError(f"cannot import the {what} {entry}: {error}{meant or ''}") from None
    usable = callable(found) or is_dataclass(found)
    require(usable, f"the {what} {entry} is a {type(found).__name__}, which cannot be called")
    return found


def has_companions() -> bool:
    """Whether companions/ stands beside this file, which does without."""
    return Path(__file__).with_name("companions").is_dir()


def optional(name: str) -> Callable:
    """A "module:function" of companions/, or without them a function that gives {}."""
    if has_companions():
        return resolve({}, f"companions.{name}", "companion")
    return lambda *args, **options: {}


def progress_bar(items, text: str = "", every: float = 60):
    """items; if there is a text, with a bar or, without a terminal, a line every so many seconds.

    TQDM_DISABLE in the environment silences both.
    """
    from tqdm import tqdm

    silent = not text or "TQDM_DISABLE" in os.environ
    lines = {}
    if not sys.stderr.isatty():
        told = "{desc}: {n_fmt} of {total_fmt} after {elapsed}\n"
        lines = {"delay": every, "mininterval": every, "bar_format": told}
    return tqdm(items, text, leave=False, disable=silent, **lines)


def world() -> tuple[int, int]:
    """(rank of this process, number of ranks): those of torch.distributed, or (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks."""
    if world()[1] > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def gathered(f: Tensor) -> Tensor:
    """The rows of all N ranks, [B/N,...] -> [B,...], for a loss L that couples a batch.

    Each rank has the graph of its own rows alone, and DistributedDataParallel takes the mean over
    ranks: hence their gradient N-fold, sum_r N dL/df_r df_r/dtheta / N = dL/dtheta.
    """
    rank, ranks = world()
    if ranks == 1:
        return f
    own = f.detach().contiguous()
    rows = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(rows, own)
    rows[rank] = own + ranks * (f - own)
    return torch.cat(rows)


def save(path: Path, content) -> None:
    """Writes bytes, a dict (.pt) or values (.json), whole or not at all; rank 0 alone writes."""
    if world()[0] != 0:
        return
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            if path.suffix == ".pt":
                torch.save(content, f)
            elif path.suffix == ".json":
                f.write((json.dumps(content, indent=1) + "\n").encode())
            else:
                f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes one of the other
        told = f"cannot write {path} ({str(error).splitlines()[0]}); what was saved before is "
        raise InfoardError(told + "untouched: free space or choose another --out") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


SHAPES_DEFAULTS = {"student": "tiny", "teacher_arch": "tiny_wide", "epochs": 8, "steps": 5}
IMAGES_DEFAULTS = {"student": "resnet18", "teacher_arch": "wrn_34_10", "epochs": 100, "steps": 10}
DEFAULT_ATTACKS = "clean,fgsm,pgd,cw,apgd"  # in evaluation


def opt(value, text: str, among: str = "", low: float | None = None, high: float = math.inf):
    """A field of Config: its default, its line of --help, and the values that it may have."""
    metadata = {"help": text, "choices": among.split(), "low": low, "high": high}
    return field(default=value, metadata=metadata)


def flag_of(name: str) -> str:
    """The option of a field of Config."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Config:
    """All settings of a run; each is a command-line option. None: see resolved()."""

    dataset: str = opt("shapes", "one of DATASETS, or your own as module:function")
    data_dir: str = opt("data", "where the data lie or go: their parent, folder or archive")
    download: bool = opt(True, "fetch a missing data set")
    subset: int = opt(0, "training images, class-balanced, the same for every seed; 0: all", low=0)
    val_size: int = opt(1000, "training images kept to choose `best`, at most a tenth", low=0)
    image_size: int = opt(0, "pixels to resize to; 0: as they are, or as most are", low=0)
    flip: bool = opt(True, "mirror images in training; --no-flip for letters, signs, left or right")
    augment: str = opt("crop", "crops and mirror images, idbh, or none", "crop idbh none")
    extra: str = opt("", "generated images beside the real ones: FILE.npz, a pattern or a list")
    extra_share: float = opt(0.7, "share of each batch that is of --extra", low=0, high=1)
    student: str = opt(None, "one of MODELS, wrn_<depth>_<width>, of timm, or module:factory")
    benchmark: str = opt(None, "what a folder is in RobustBench", "cifar10 cifar100 imagenet")
    teacher: str = opt(None, "file, https://..., robustbench:ID, module:factory; else trained once")
    teacher_arch: str = opt(None, "a teacher to train, or the one that a file must hold")
    teacher_norm: str = opt("none", "normalisation: a name such as cifar10, or m,m,m/s,s,s")
    teacher_nat: str = opt(None, "an undefended net, for mtard or to transfer from")
    teacher_nat_norm: str = opt("none", "that of --teacher-nat, as --teacher-norm is of --teacher")
    teacher_framework: str = opt(None, "that of a missing teacher", "trades at natural autoencoder")
    teacher_epochs: int = opt(None, "epochs for a missing teacher; default: --epochs", low=1)
    framework: str = opt("rslad", "one of FRAMEWORKS, or your own as module:function")
    alpha: float = opt(None, "weight alpha of a framework: ard, rslad, adaad, igdm, ...", low=0)
    beta: float = opt(None, "weight beta of trades or saad, exponent of iad", low=0)
    temperature: float = opt(None, "temperature of ard or iad", low=1e-6)
    kl_reduction: str = opt("batchmean", "mean: KL/K, RSLAD's on CIFAR-10", "batchmean mean")
    own: dict = field(default_factory=dict)  # settings that only this framework has
    plus: str = opt("", "terms of other methods to add: igdm, saad or saad_c, igdm:5 its weight")
    infoard: bool = opt(True, "add InfoARD to the base framework")
    asa: str = opt("teacher", "one of ASA, or your own rule of radii as module:function")
    lam_lo: float = opt(1.0, "eps_i of the weakest instance, in units of eps", low=0)
    lam_hi: float = opt(None, "eps_i of the strongest instance, in units of eps", low=0)
    steps_lo: int = opt(0, "attack steps of the weakest instance; 0: all take --steps", low=0)
    mim: str = opt("infonce", "bound of information: of BOUNDS, or yours as module:function")
    w_feat: float = opt(0.1, "weight of feature information", low=0)
    w_att: float = opt(0.0, "weight of attention information", low=0)
    w_rel: float = opt(0.0, "weight of the relation term", low=0)
    taps: str = opt("", "modules to compare, student's=teacher's: layer4=norm,layer3=blocks.5")
    critic_dim: int = opt(128, "width of the critics", low=1)
    tau: float = opt(0.2, "temperature of the scores", low=1e-6)
    eps: float = opt(8 / 255, "L-infinity radius, x in [0,1]; write 8/255 or 0.0314", low=0, high=1)
    steps: int = opt(None, "attack steps in training", low=1)
    step_size: float = opt(None, "step; default: 2/255; to reach eps, 2.5 eps/steps", low=0, high=1)
    epochs: int = opt(None, "passes over the training images", low=1)
    batch_size: int = opt(128, "images per step, of all ranks together", low=2)
    lr: float = opt(0.1, "peak learning rate of SGD with momentum 0.9", low=0)
    weight_decay: float = opt(5e-4, "weight decay", low=0)
    schedule: str = opt("cosine", "cosine, or epochs after which lr falls to a tenth: 100,150")
    ema: float = opt(0.0, "decay of a weight average to evaluate instead; 0: none", low=0, high=1)
    ema_ramp: bool = opt(False, "--ema as in the field: a rising decay, batch norm copied")
    swa: int = opt(0, "epoch from which weights are averaged to evaluate; 0: none", low=0)
    seed: int = opt(0, "of initialisation, order, augmentation, attacks", low=0, high=1 << 62)
    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps")
    amp: str = opt("auto", "half precision; auto: bf16 if in hardware", "auto bf16 fp16 off")
    compile: bool = opt(False, "torch.compile the student")
    fast: bool = opt(True, "in half precision: fold batch norm in attacks, replay steps on CUDA")
    sync_bn: bool = opt(False, "batch norm over all ranks' images, not each rank's own (CUDA)")
    attacks: str = opt(DEFAULT_ATTACKS, "a list with commas: pgd, aa, any of ATTACKS")
    eps_l2: float = opt(0.5, "L2 radius of the attacks that have one", low=0)
    transfer: bool = opt(False, "also evaluate attacks made on an undefended net")
    eval_subset: int = opt(None, "test images; 0: all; default: 500 on a CPU, else all", low=0)
    eval_batch: int = opt(0, "images per evaluation batch; 0: 256 on a CPU, else 512", low=0)
    out: str = opt(None, "folder; default: runs/<dataset>-<student>-<framework>[-plain]-s<seed>")
    resume: bool = opt(False, "go on from last.pt in --out, if there is one")
    figures: bool = opt(True, "draw figures at the end")
    progress: bool = opt(True, "show a bar, or a line a minute where no terminal is")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None or f.name == "own":
                continue
            flag, known = flag_of(f.name), f.metadata
            if known["choices"]:
                lookup(known["choices"], value, flag)
            if known["low"] is not None:
                told = f"{flag} must lie in [{known['low']}, {known['high']}], got {value}"
                require(known["low"] <= value <= known["high"], f"{told}: {known['help']}")
        told = f"--schedule must be cosine or epochs such as 100,150, not {self.schedule}"
        require(re.fullmatch(r"cosine|\d+(,\d+)*", self.schedule), told)

    def resolved(self) -> "Config":
        """The same with every None filled in: by the data, and by what the framework says of it."""
        framework = get_framework(self.framework)  # section 6
        by_data = SHAPES_DEFAULTS if self.dataset == "shapes" else IMAGES_DEFAULTS
        fill = {"lam_hi": 1.5, "teacher_framework": "trades", **by_data, **framework.defaults}
        if self.teacher:
            del fill["teacher_arch"]  # the file says what it holds
        steps = self.steps or fill["steps"]
        step = 2 / 255 if steps * 2 / 255 >= self.eps else self.eps * min(1, 2.5 / steps)
        fill = {"step_size": step} | fill
        missing = {name: value for name, value in fill.items() if getattr(self, name) is None}
        unknown = ", ".join(self.own.keys() - framework.options.keys())
        require(not unknown, f"the framework {self.framework} has no option {unknown}")
        resolve(ASA, self.asa, "--asa")  # section 3
        resolve(BOUNDS, self.mim, "--mim")  # section 4
        own = {name: default for name, (default, _) in framework.options.items()} | self.own
        cfg = replace(self, **missing, own=own, infoard=self.infoard and framework.infoard)
        if framework.settle:
            cfg = framework.settle(cfg)
            require(isinstance(cfg, Config), f"settle of {self.framework} must return the Config")
        require(cfg.steps_lo <= cfg.steps, f"--steps-lo must be at most --steps, {cfg.steps}")
        if cfg.plus:
            optional("plus:weights_of")(cfg)  # or one line
        plain = "-plain" if framework.infoard and not cfg.infoard else ""
        added = f"+{cfg.plus}" if cfg.plus else ""
        names = [cfg.dataset, cfg.student, cfg.framework + added]
        short = [re.sub(r"^(.*/)?(.*)\.py:", r"\2.", name) for name in names]  # of files' names
        named = re.sub("[:/]", ".", "-".join(short))
        out = cfg.out or f"runs/{named}{plain}-s{cfg.seed}"
        return replace(cfg, out=out, teacher_epochs=cfg.teacher_epochs or cfg.epochs)

    def lr_at(self, share: float) -> float:
        """The learning rate after a share of training: 5% warm-up, cosine to lr/100, or drops."""
        if self.schedule != "cosine":
            drops = [int(epoch) - 1e-9 for epoch in self.schedule.split(",")]  # 220/300 rounds down
            return self.lr * 0.1 ** sum(share * self.epochs >= drop for drop in drops)
        if share < 0.05:
            return self.lr * max(0.01, share / 0.05)
        return self.lr * max(0.01, 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95)))


# ==== 2. Divergences and margins ==================================================================


def as_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def kl(p_logits: Tensor, q_logits: Tensor, tau: float = 1.0) -> Tensor:
    """KL(p||q) = sum_k p_k log(p_k/q_k) in nats, p, q = softmax(logits/tau): [B,K] twice -> [B]."""
    log_p = F.log_softmax(as_float32(p_logits) / tau, dim=1)
    log_q = F.log_softmax(as_float32(q_logits) / tau, dim=1)
    return (log_p.exp() * (log_p - log_q).where(log_p.exp() > 0, 0)).sum(1)  # 0 log 0 = 0


def margin(z: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{k != y} z_k of logits or probabilities: [B,K], [B] -> [B]; positive = right."""
    others = z.scatter(1, y[:, None], -math.inf)
    return z.gather(1, y[:, None]).squeeze(1) - others.amax(1)


# ==== 3. Attacks and ASA ==========================================================================
# To paste pgd, take ALL, InfoardError, require and section 2 from above, then what precedes it.


@dataclass(frozen=True, eq=False, kw_only=True)
class Threat:
    """How strong an attack is, by name, so that no two can be swapped: pgd(f, x, **vars(threat)).

    eps, alpha: radius and step in pixel units of [0,1], a number, [B] or [B,1,1,1]. steps: int or
    [B] (long). counts: with steps [B], active_counts(steps.tolist()) if known; saves a wait.
    """

    eps: float | Tensor = 8 / 255
    alpha: float | Tensor = 2 / 255
    steps: int | Tensor = 10
    counts: tuple[int, ...] | None = None


@contextlib.contextmanager
def frozen_eval(*models) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every flag as it was found afterwards."""
    nets = [model for model in models if isinstance(model, nn.Module)]
    modes = [m for net in nets for m in net.modules() if m.training]
    needs = [p for net in nets for p in net.parameters() if p.requires_grad]
    try:
        for m in modes:
            m.training = False
        for p in needs:
            p.requires_grad_(False)
        yield
    finally:
        for m in modes:
            m.training = True
        for p in needs:
            p.requires_grad_(True)


def predict(model: Callable, x: Tensor) -> Tensor:
    """Logits [B,K] in eval mode and without a graph."""
    with torch.no_grad(), frozen_eval(model):
        return as_float32(model(x))


def per_sample(value: float | Tensor, x: Tensor) -> Tensor:
    """A number, [B] or [B,1,1,1] as [B,1,1,1], to be multiplied with x [B,C,H,W]."""
    if isinstance(value, Tensor):
        value = value.to(x.device, x.dtype).flatten()
    value = x.new_zeros(1) + value  # to make a tensor of a number would wait for the device
    return value.expand(len(x)).view(-1, *[1] * (x.dim() - 1))


def sample_norm(v: Tensor, p: int = 2) -> Tensor:
    """The p-norm of each sample: [B,C,H,W] -> [B,1,1,1], never zero."""
    return per_sample(v.flatten(1).norm(p, dim=1).clamp(min=1e-12), v)


def project(z: Tensor, x: Tensor, eps: Tensor, norm: str = "linf") -> Tensor:
    """z onto the ball |z - x| <= eps and the box [0,1]."""
    if norm == "linf":
        return z.clamp((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
    require(norm == "l2", f"unknown norm {norm!r} (choose from linf, l2)")
    shrink = (eps / sample_norm(z - x)).clamp(max=1)
    return (x + (z - x) * shrink).clamp(0, 1)  # the box only moves z towards x


def starting_point(x: Tensor, eps: Tensor, init: str | Tensor, generator=None) -> Tensor:
    """Where an attack begins: uniform [Madry], normal [TRADES], none (x itself) or a given x'."""
    if isinstance(init, Tensor):
        return init
    noise = torch.zeros(x.shape, dtype=x.dtype, device=x.device)  # in one order for all layouts
    if init == "uniform":
        return x + eps * noise.uniform_(-1, 1, generator=generator)
    if init == "normal":
        return x + 0.001 * noise.normal_(generator=generator)
    require(init == "none", f"unknown attack start {init!r} (choose from uniform, normal, none)")
    return x


def active_counts(steps: list[int]) -> tuple[int, ...]:
    """n_t = #{i: M_i > t}, the samples that step t of a schedule still attacks."""
    return tuple(sum(k > t for k in steps) for t in range(max(steps)))


def active_rows(steps: int | Tensor, counts: tuple[int, ...] | None, batch: int) -> list:
    """For each attack step the samples that take it: ALL, or the indices [n_t] of some."""
    if not isinstance(steps, Tensor):
        require(steps >= 0, f"steps must not be negative, got {steps}")
        return [ALL] * steps
    require(steps.shape == (batch,), f"steps must be an int or of shape [{batch}]")
    order = steps.argsort(descending=True, stable=True)
    return [order[:n] for n in counts or active_counts(steps.tolist())]


def pgd(
    objective: Callable,
    x: Tensor,
    *,
    eps: float | Tensor,
    alpha: float | Tensor,
    steps: int | Tensor,
    counts: tuple[int, ...] | None = None,
    init: str | Tensor = "uniform",
    norm: str = "linf",
    momentum: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent of objective(x') [B], from x [B,C,H,W] in [0,1]; x stays as it is.

        x'_{t+1} = P( x'_t + alpha d(m_t) ),  m_t = mu m_{t-1} + g_t/|g_t|_1,  g_t = grad objective

    d: the sign (linf) or m/|m|_2 (l2); mu: momentum [MI-FGSM], without it m = g [Madry]. eps and
    alpha: numbers or [B], in pixel units. With steps [B], objective(x'[rows], rows) is asked of the
    samples that have steps to go: it must index its labels with rows. frozen_eval(model) around the
    call keeps batch norm as it is and builds no weight gradients.
    """
    in_range = norm == "l2" or isinstance(eps, Tensor) or 0 <= eps <= 1
    require(in_range, f"eps must lie in [0, 1], got {eps}: write 8/255 or 0.0314")
    eps, alpha = per_sample(eps, x), per_sample(alpha, x)
    x_adv = project(starting_point(x, eps, init, generator), x, eps, norm)
    velocity = torch.zeros_like(x)
    for rows in active_rows(steps, counts, len(x)):
        z = x_adv[rows].detach().requires_grad_()
        with torch.enable_grad():
            value = objective(z) if rows is ALL else objective(z, rows)
            told = f"objective(x') must be [{len(z)}], not {list(value.shape)}"
            require(value.shape == (len(z),), told)
            (grad,) = torch.autograd.grad(1024 * value.sum(), z)  # no sign is lost in fp16
        if momentum:
            grad = momentum * velocity[rows] + grad / sample_norm(grad, p=1)
            velocity[rows] = grad
        direction = grad.sign() if norm == "linf" else grad / sample_norm(grad)
        z = z.detach() + alpha[rows] * direction
        x_adv[rows] = project(z, x[rows], eps[rows], norm)
    return x_adv


def ce_objective(model: Callable, y: Tensor) -> Callable:
    """CE(S(x'), y) for pgd."""
    return lambda z, rows=ALL: F.cross_entropy(as_float32(model(z)), y[rows], reduction="none")


def kl_objective(model: Callable, t: Tensor) -> Callable:
    """KL(t || S(x')) for pgd, t fixed logits [B,K]."""
    return lambda z, rows=ALL: kl(t[rows], model(z))


def cw_objective(model: Callable, y: Tensor) -> Callable:
    """-margin(S(x'), y) for pgd: the loss of [CW] without its constant c."""
    return lambda z, rows=ALL: -margin(as_float32(model(z)), y[rows])


def pgd_ce(model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    """PGD on the cross-entropy [Madry] with the options of pgd; the model is left as found."""
    with frozen_eval(model):
        return pgd(ce_objective(model, y), x, **options)


def cw_linf(model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    """PGD on the margin with the options of pgd, the field's CW_inf; the model is left as found."""
    with frozen_eval(model):
        return pgd(cw_objective(model, y), x, **options)


# An attack for evaluation is attack(model, x, y, eps=..., generator=...) -> x'. Its attribute norm
# says in which ball eps is a radius: "linf" (or no attribute), "l2", or "none"; its attribute
# first, {column: attack}, which ones go before it: it gets the images that they have left.


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """One step of size eps from x [FGSM]."""
    return pgd_ce(model, x, y, eps=eps, alpha=eps, steps=1, init="none")


def pgd_sat(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """PGD-20 with steps of eps/4, which are 2/255 at 8/255 [Madry]."""
    return pgd_ce(model, x, y, eps=eps, alpha=eps / 4, steps=20, generator=generator)


def pgd_trades(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """PGD-20 with steps that are 0.003 at 8/255 [TRADES]."""
    alpha = eps * (0.003 * 255 / 8)
    return pgd_ce(model, x, y, eps=eps, alpha=alpha, steps=20, generator=generator)


def cw(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """CW_inf with 30 steps of eps/4."""
    return cw_linf(model, x, y, eps=eps, alpha=eps / 4, steps=30, generator=generator)


ATTACKS = {"fgsm": fgsm, "pgd_sat": pgd_sat, "pgd_trades": pgd_trades, "cw": cw}
ATTACKS.update({name: f"companions.autoattack:{name}" for name in "apgd aa apgd_l2 aa_l2".split()})
FURTHER_ATTACKS = (
    "bim mifgsm mifgsm_t pgd_t pgd_l2 pgd_l2_t pgd5_cw spatial "
    "corrupt noise shot impulse blur bright contrast pixelate jpeg"
)
ATTACKS.update({name: f"companions.attacks:{name}" for name in FURTHER_ATTACKS.split()})


def instance_strength(signal: Tensor, *, threat: Threat, lam=(1.0, 1.5), steps_lo=0) -> Threat:
    """ASA: a radius, a step size and, if asked for, a number of steps for each instance.

        u_i = rank(signal_i)/(B-1),   lam_i = lam_lo + (lam_hi - lam_lo) u_i,           [ours]
        eps_i = lam_i eps,   alpha_i = lam_i alpha,   M_i = round(M_lo + (M - M_lo) u_i)

    signal [B]: larger = attacked harder; equal ones rank as they stand in the batch. threat: base
    eps and alpha, the most steps M. steps_lo: M_lo of 1 to M, or 0 for no step schedule.
    """
    batch, (low, high) = len(signal), lam
    rank = signal.argsort(stable=True).argsort()
    u = rank / (batch - 1) if batch > 1 else rank + 0.5
    scale = low + (high - low) * u
    steps, counts = threat.steps, None
    if steps_lo and steps_lo != threat.steps:
        slope = (threat.steps - steps_lo) / max(batch - 1, 1)
        ranks = range(batch) if batch > 1 else [0.5]
        counts = active_counts([int(steps_lo + slope * r + 0.5) for r in ranks])
        steps = sum(rank >= batch - n for n in counts)  # step t is taken by the counts[t] hardest
    return Threat(eps=threat.eps * scale, alpha=threat.alpha * scale, steps=steps, counts=counts)


def teacher_margin(t, y: Tensor, *, generator=None, **how) -> Threat:
    """ASA's rule: by the margin p_y - max_{k != y} p_k of T(x); how: as instance_strength has it.

    A rule: rule(t, y, *, threat, lam, steps_lo, generator, ...) -> Threat with eps, alpha [B]. Its
    attribute needs lists what it asks for: "t" (default); "s": logits of S(x); "teacher": net, x.
    """
    require(t is not None, "this rule of radii needs logits of the teacher: t")
    return instance_strength(margin(as_float32(t).softmax(1), y), **how)


ASA = {"teacher": teacher_margin, "off": None}
FURTHER_RULES = "student gap uniform shuffled distance distance_mean distance_shuffled"
ASA.update({name: f"companions.adaptation:{name}" for name in FURTHER_RULES.split()})


# ==== 4. Mutual information: lower bounds from a score matrix, in nats ============================
# f_ij = scores[i,j] = f(s_i, t_j);   E_p: mean of the diagonal, pairs of the joint distribution;
# E_q: mean off the diagonal, pairs of the product of marginals. Inputs are left as they are.


def off_diagonal(scores: Tensor) -> Tensor:
    """[B,B] -> [B,B-1], row by row, without the diagonal, each (B+1)-th of the flat scores."""
    b = len(scores)
    told = f"scores must be [B,B], B > 1, not {list(scores.shape)}"
    require(scores.shape == (b, b) and b > 1, told)
    return scores.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1)


def infonce(scores: Tensor) -> Tensor:
    """I >= log B + E_i[ f_ii - log sum_j exp f_ij ] [CPC], [Poole] eq. 10.

    Of low variance, never above log B, hence biased low when I is larger.
    """
    return math.log(scores.shape[1]) + (scores.diag() - scores.logsumexp(1)).mean()


def donsker_varadhan(scores: Tensor) -> Tensor:
    """I >= E_p[f] - log E_q[exp f] [DV]; can exceed log B, biased and of high variance."""
    others = off_diagonal(scores)
    return scores.diag().mean() - (others.logsumexp((0, 1)) - math.log(others.numel()))


def nwj(scores: Tensor) -> Tensor:
    """I >= E_p[f] - E_q[exp(f - 1)] [NWJ]; unbiased, of higher variance than DV."""
    return scores.diag().mean() - (off_diagonal(scores) - 1).exp().mean()


def js_divergence(scores: Tensor) -> Tensor:
    """JS(p, q) >= log 2 + 1/2 E_p[log sigma(f)] + 1/2 E_q[log sigma(-f)] [JSD].

    The divergence of joint and product: stable, at most log 2, not an information.
    """
    positive = F.logsigmoid(scores.diag())
    negative = F.logsigmoid(-off_diagonal(scores))
    return math.log(2) + 0.5 * (positive.mean() + negative.mean())


def jsd(scores: Tensor) -> Tensor:
    """The gradient of js_divergence with the value of nwj at its best critic, f + 1 [Poole]."""
    objective = js_divergence(scores)
    return objective + (nwj(scores + 1) - objective).detach()


# A bound is bound(scores [B,B]) -> a number; its attribute critic, if it has one, makes the module
# that gives the scores, critic(dim_s, dim_t, dim, tau), in the place of Critic.
BOUNDS = {"infonce": infonce, "dv": donsker_varadhan, "nwj": nwj, "jsd": jsd, "off": None}
BOUNDS.update(vid="companions.bounds:vid", unpaired="companions.bounds:unpaired")


def pooled(f: Tensor) -> Tensor:
    """A feature map [B,C,H,W] as its spatial mean [B,C]; a vector as it is."""
    return as_float32(f.mean((2, 3)) if f.dim() > 2 else f)


class Critic(nn.Module):
    """scores[i,j] = <g(s_i), h(t_j)>/tau, with linear, normalised g and h of pooled features."""

    def __init__(self, dim_s: int, dim_t: int, dim: int = 128, tau: float = 0.2):
        super().__init__()
        self.g = nn.Linear(dim_s, dim)
        self.h = nn.Linear(dim_t, dim)
        self.tau = tau

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        g = F.normalize(self.g(pooled(s)), dim=1)  # [B, dim]
        h = F.normalize(self.h(pooled(t)), dim=1)  # [B, dim]
        return g @ h.T / self.tau  # [B, B]


# ==== 5. InfoARD: strength and multi-granularity loss as one object ===============================


def plain_features(f, x: Tensor) -> Tensor | None:
    """What a module gives of images x, if it is maps [B,C,h,w], w > 1, or vectors [B,C]."""
    known = isinstance(f, Tensor) and (f.dim() == 2 or f.dim() == 4 and f.shape[-1] > 1)
    return f if known and len(f) == len(x) else None


class Taps:
    """Hooks that keep the features of a net's latest passes, asked for by the images that went in.

    names: modules to read, or "penultimate", the input of the last linear layer; default: that and
    what companions/taps.py finds, or the net's children. shapes: {name: [C,h,w] or [C]}.
    """

    def __init__(self, net: nn.Module, x: Tensor, names: list[str] | None = None):
        self.passes = []  # (weak reference to images, outputs, has it a graph), the latest last
        self.maps = {}  # outputs in the pass that goes on
        self.read = plain_features
        modules, found = dict(net.named_modules()), {}
        for name, module in net.named_children():
            found["penultimate" if isinstance(module, nn.Linear) else name] = name
        with contextlib.suppress(ImportError):  # looks deeper and knows tokens, channels last
            special = importlib.import_module("companions.taps")
            found, self.read = special.find_taps(net, x), special.as_features
        self.end_of_pass = torch.compiler.disable(self.keep_pass)  # it changes in every pass
        self.hooks = [net.register_forward_hook(self.end, with_kwargs=True)]
        for name in names or found:
            module = modules.get(found.get(name, name))
            require(module is not None, f"no module {name!r} to tap; found: {', '.join(found)}")
            self.hooks.append(module.register_forward_hook(partial(self.keep, name)))
        with torch.compiler.set_stance("force_eager"):
            predict(net, x)
        _, maps, _ = self.passes[-1]
        self.names = names or [name for name, f in maps.items() if self.read(f, x) is not None]
        self.shapes = {name: list(f.shape[1:]) for name, f in self.of(x).items()}
        self.passes = []

    def __getstate__(self) -> dict:
        """In a copy of the net, such as an average of weights, the hooks keep nothing."""
        return {"maps": None, "passes": []}

    def keep(self, name: str, module: nn.Module, inputs: tuple, output) -> None:
        if self.maps is not None:
            self.maps[name] = inputs[0] if name == "penultimate" else output

    def end(self, net: nn.Module, inputs: tuple, named: dict, output) -> None:
        tensors = [f for f in (*inputs, *named.values()) if isinstance(f, Tensor)]
        if self.maps is not None and tensors:
            self.end_of_pass(tensors[0])

    def keep_pass(self, x: Tensor) -> None:
        maps, self.maps = self.maps, {}
        graph = torch.is_grad_enabled()
        if not graph and any(seen() is x and had for seen, _, had in self.passes):
            return  # a look at what was learned from is no other pass
        others = [one for one in self.passes if one[0]() is not None and one[0]() is not x]
        kept = [one for one in others if not one[0]().requires_grad]  # none of an attack
        self.passes = [*kept[-3:], (weakref.ref(x), maps, graph)]

    def of(self, x: Tensor, net: str = "net") -> dict[str, Tensor]:
        """{name: [B,C,h,w] or [B,C]} of the latest pass on this very tensor."""
        found = [maps for seen, maps, _ in self.passes if seen() is x]
        told = f"no pass of the {net} on this tensor: it must be the one that went into {net}(...)"
        require(found, f"{told} since the last backward, without requires_grad")
        features = {name: self.read(found[-1].get(name), x) for name in self.names}
        for name, f in features.items():
            told = f"{name} of the {net} gives no features of {len(x)} images: name others in taps"
            require(f is not None, f"{told}, and compile a net after InfoARD is made")
        return features

    def close(self) -> None:
        """Takes the hooks off the net."""
        for hook in self.hooks:
            hook.remove()


def attention_map(f: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """A = normalise(sum_c f_c^2) [Maps] eq. 1: [B,C,H,W] -> [B,h*w]; size: (h, w) to pool to."""
    if f.dtype == torch.float16:
        f = f.float()  # squares would leave its range
    energy = as_float32(f.square().sum(1, keepdim=True))  # [B, 1, H, W]
    if size is not None:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1), dim=1)


def attention_scores(s: Tensor, t: Tensor, tau: float = 0.2) -> Tensor:
    """Cosines of centred attention maps over tau, [B,C,H,W] twice -> [B,B], of all ranks' images.

    Centred, because raw maps are positive and their cosines all near 1.
    """
    size = min(s.shape[-2], t.shape[-2]), min(s.shape[-1], t.shape[-1])
    a = gathered(attention_map(s, size))  # [B, h*w]
    b = gathered(attention_map(t, size))
    a = F.normalize(a - a.mean(1, keepdim=True), dim=1)
    b = F.normalize(b - b.mean(1, keepdim=True), dim=1)
    return a @ b.T / tau


def similarities(f: Tensor, tau: float) -> Tensor:
    """Cosines of centred features to all others in the batch, over tau: [B,...] -> [B,B-1]."""
    f = pooled(f)
    f = F.normalize(f - f.mean(0), dim=1)
    return off_diagonal(f @ f.T) / tau


def relation_loss(s: Tensor, t: Tensor, tau: float = 0.2) -> Tensor:
    """How similarities within the batch differ, [B,...] twice -> [B] in nats; after [RKD].

    R_i = KL( softmax_j(c^T_ij/tau) || softmax_j(c^S_ij/tau) ), j != i
    """
    return kl(similarities(t, tau), similarities(s, tau))


class InfoARD(nn.Module):
    """ASA and MIM for any distillation loop. In a foreign script these lines are all that changes:

        info = InfoARD(student, teacher)                        # hooks; the nets stay as they are
        opt = SGD([*student.parameters(), *info.parameters()])  # the critics learn too
            t = teacher(x)
            x_adv = attack(..., eps=info.strength(t, y).eps)    # [B,1,1,1], one for each instance
            loss = ... student(x_adv) ... + info.loss(x_adv, x) # what the nets were given

    loss = -w_feat I_feat - w_att I_att + w_rel R: the information, by the bound mim, of features
    (last three stages, penultimate) and attention maps of S(x') with T(x), a mean over taps; R: the
    relation_loss of the first tap. All beside a framework's loss: they leave logits' scale free.
    asa, mim: of ASA and BOUNDS, your own module:function, or a function itself. taps: modules to
    compare instead, student's = teacher's, "layer4=norm,layer3=blocks.5".
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        asa: str = "teacher",
        lam: tuple[float, float] = (1.0, 1.5),
        mim: str = "infonce",
        w_feat: float = 0.1,
        w_att: float = 0.0,
        w_rel: float = 0.0,
        dim: int = 128,
        tau: float = 0.2,
        taps: str = "",
    ):
        super().__init__()
        self.rule = resolve(ASA, asa, "rule of radii") if isinstance(asa, str) else asa
        self.lam, self.tau = lam, tau
        self.terms = {}
        self.bound = resolve(BOUNDS, mim, "bound of information") if isinstance(mim, str) else mim
        optional("own:check_parts")(self, asa, mim, dim, (w_feat, w_att, w_rel))
        x = next(student.parameters()).new_zeros(2, *image_shape)
        named = [pair.strip().partition("=") for pair in taps.split(",") if pair]
        self.student_taps = Taps(student, x, [name for name, _, _ in named])
        self.teacher_taps = Taps(teacher, x, [other or name for name, _, other in named])
        shapes_s, shapes_t = self.student_taps.shapes, self.teacher_taps.shapes
        self.pairs = [(name, other or name) for name, _, other in named] or self.found_pairs()
        maps = any(len(shapes_s[a]) == len(shapes_t[b]) == 3 for a, b in self.pairs)
        weights = {"feat": -w_feat, "rel": w_rel, "att": -w_att}
        possible = {"feat": self.bound, "rel": True, "att": self.bound and maps}
        self.weights = {name: w for name, w in weights.items() if w and possible[name]}
        told = "no features to compare: name modules in taps, or mim='off'"
        require(self.pairs or not self.weights, told)

        self.critics = nn.ModuleList()
        make = getattr(self.bound, "critic", Critic)
        with torch.random.fork_rng([]):  # a script draws what it draws without InfoARD
            for name_s, name_t in self.pairs if "feat" in self.weights else []:
                widths = shapes_s[name_s][0], shapes_t[name_t][0]
                self.critics.append(make(*widths, dim, tau).to(as_float32(x)))
        for p in self.parameters() if world()[1] > 1 else []:
            dist.broadcast(p.data, 0)  # the ranks' critics begin as one, and have equal gradients
        if not self.weights:  # what nobody reads costs nothing
            self.student_taps.close()
            self.teacher_taps.close()

    def found_pairs(self) -> list[tuple[str, str]]:
        """Taps to compare: penultimate, then up to three resolutions, the deepest first."""
        stages = []
        for shapes in (self.student_taps.shapes, self.teacher_taps.shapes):
            last = {tuple(f[1:]): name for name, f in shapes.items() if len(f) == 3}
            stages.append(list(reversed(last.values())))
        pairs = list(zip(*stages, strict=False))[:3]
        if "penultimate" in self.student_taps.names and "penultimate" in self.teacher_taps.names:
            pairs.insert(0, ("penultimate", "penultimate"))
        return pairs

    def strength(self, t, y: Tensor, threat: Threat | None = None, **asked) -> Threat:
        """ASA: threat with eps, alpha [B,1,1,1] (and steps [B]), from the teacher's logits t [B,K].

        threat: that of all, default Threat(). asked: what the rule takes (steps_lo, s, x, ...).
        """
        threat = threat or Threat()
        told = f"eps must lie in [0, 1], got {threat.eps}: write 8/255 or 0.0314"
        require(isinstance(threat.eps, Tensor) or 0 <= threat.eps <= 1, told)
        if self.rule is None:
            return threat
        flat = {k: v.flatten() for k, v in vars(threat).items() if isinstance(v, Tensor)}
        asked = {"steps_lo": 0, "generator": None, "lam": self.lam, **asked}
        found = self.rule(t, y, threat=replace(threat, **flat), **asked)
        as_images = (-1, 1, 1, 1)  # so that x + eps is meant
        return replace(found, eps=found.eps.view(as_images), alpha=found.alpha.view(as_images))

    def loss(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The weighted sum of .terms, from the student's latest pass on x_adv, the teacher's on x.

        Backward through it forgets all passes: no graph outlives its step.
        """
        if not self.weights:
            return torch.zeros(())
        s_maps, t_maps = self.student_taps.of(x_adv, "student"), self.teacher_taps.of(x, "teacher")
        maps = [(s_maps[a], t_maps[b].detach()) for a, b in self.pairs]
        require(len(x_adv) == len(x), f"x_adv are {len(x_adv)} images, x are {len(x)}")
        if len(x) * world()[1] < 2:  # one image alone has no negatives
            return torch.zeros(())
        taught = any(s.requires_grad for s, _ in maps) or not torch.is_grad_enabled()
        require(taught, "the student's pass on x_adv has no graph: make it without no_grad")
        terms = {}
        with torch.autocast(x.device.type, enabled=False):
            if "feat" in self.weights:
                rows = [(gathered(pooled(s)), gathered(pooled(t))) for s, t in maps]
                scores = [critic(s, t) for critic, (s, t) in zip(self.critics, rows, strict=True)]
                terms["feat"] = torch.stack([self.bound(each) for each in scores]).mean()
            if "rel" in self.weights:
                s, t = (gathered(pooled(f)) for f in maps[0])
                terms["rel"] = relation_loss(s, t, self.tau).mean()
            if "att" in self.weights:
                both = [(s, t) for s, t in maps if s.dim() == t.dim() == 4]
                scores = [attention_scores(s, t, self.tau) for s, t in both]
                terms["att"] = torch.stack([self.bound(each) for each in scores]).mean()
        self.terms = {name: value.detach() for name, value in terms.items()}
        loss = sum(self.weights[name] * value for name, value in terms.items())
        if loss.requires_grad:
            loss.register_hook(self.forget)
        return loss

    def forget(self, grad: Tensor | None = None) -> None:
        """Lets go of all passes."""
        self.student_taps.passes, self.teacher_taps.passes = [], []


# ==== 6. Frameworks ===============================================================================
# name     inner max, |x'-x| <= eps  outer min
# at       CE(S(x'),y)               CE(S(x'),y)                                         [Madry]
# trades   KL(S(x)||S(x'))           CE(S(x),y) + beta KL(S(x)||S(x'))                   [TRADES]
# ard      CE(S(x'),y)               alpha tau^2 KL(T(x)||S(x')) + (1-alpha) CE(S(x),y)  [ARD]
# rslad    KL(T(x)||S(x'))           alpha KL(T(x)||S(x')) + (1-alpha) KL(T(x)||S(x))    [RSLAD]
# adaad    KL(T(x')||S(x'))          alpha KL(T(x')||S(x')) + (1-alpha) KL(T(x)||S(x))   [AdaAD]
# akd, iad, adaiad, mtard, bmtard, absld, igdm, saad, adr, adr_trades: companions/frameworks.py


# ---- losses of logits alone: s = S(x), s_adv = S(x'), t = T(x), t_adv = T(x'), all [B,K] ----
# The teacher's are made by predict, without a graph: no loss detaches them.


def mean_kl(p: Tensor, q: Tensor, tau: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
    """tau^2 KL(p||q) of logits at temperature tau in nats, weighted [B], a mean over the batch."""
    return tau**2 * (weight * kl(p, q, tau)).mean()


def mean_kl_per_class(p: Tensor, q: Tensor, tau: float = 1.0, weight: Tensor | float = 1.0):
    """The same divided by the number of classes, as much released code has it."""
    return mean_kl(p, q, tau, weight) / p.shape[1]


def trades_loss(s: Tensor, s_adv: Tensor, y: Tensor, beta=6.0, mean_kl=mean_kl) -> Tensor:
    """CE(s,y) + beta KL(s||s_adv); s is not detached, as published [TRADES]."""
    return F.cross_entropy(s, y) + beta * mean_kl(s, s_adv)


def ard_loss(s, s_adv: Tensor, t: Tensor, y: Tensor, alpha=1.0, tau=30.0, mean_kl=mean_kl):
    """alpha tau^2 KL(t||s_adv) + (1-alpha) CE(s,y); with alpha = 1, s may be None [ARD]."""
    soft = alpha * mean_kl(t, s_adv, tau)
    return soft if alpha == 1 else soft + (1 - alpha) * F.cross_entropy(s, y)


def rslad_loss(s: Tensor, s_adv: Tensor, t: Tensor, alpha=5 / 6, mean_kl=mean_kl) -> Tensor:
    """alpha KL(t||s_adv) + (1-alpha) KL(t||s) [RSLAD]."""
    return alpha * mean_kl(t, s_adv) + (1 - alpha) * mean_kl(t, s)


def adaad_loss(s, s_adv: Tensor, t, t_adv: Tensor, alpha=1.0, mean_kl=mean_kl) -> Tensor:
    """alpha KL(t_adv||s_adv) + (1-alpha) KL(t||s); with alpha = 1, s and t may be None [AdaAD]."""
    soft = alpha * mean_kl(t_adv, s_adv)
    return soft if alpha == 1 else soft + (1 - alpha) * mean_kl(t, s)


def teacher_student_objective(student: Callable, teacher: Callable) -> Callable:
    """KL(T(x')||S(x')) for pgd, which climbs through the teacher, too."""
    return lambda z, rows=ALL: kl(teacher(z), student(z))


# ---- one batch: its passes, its attack, and which loss takes what ----


@dataclass(eq=False)
class Step:
    """One batch and the logits [B,K] on it, each pass made when it is first asked for: t, t_adv of
    the teacher on x, x_adv; t_nat of a second, natural one; s, s_adv of the student in train mode.

    cfg: resolved. progress: the share of training done. more: nets of the framework's own. memory:
    tensors kept between steps. generators: "attack" for starts; alike in all ranks "data" for
    images, "rule" for radii. attack() sets x_adv; terms: parts of the loss, for the log.
    """

    student: nn.Module
    teacher: nn.Module | None
    x: Tensor
    y: Tensor
    cfg: Config
    info: InfoARD | None = None
    teacher_nat: nn.Module | None = None
    more: dict = field(default_factory=dict)
    generators: dict = field(default_factory=dict)
    progress: float = 0.0
    memory: dict = field(default_factory=dict)
    terms: dict = field(default_factory=dict)
    frozen: Callable = frozen_eval  # around attacks; or a faster one

    def __post_init__(self):
        self.x_adv = self.x
        self.threat = Threat(eps=self.cfg.eps, alpha=self.cfg.step_size, steps=self.cfg.steps)
        self.mean_kl = mean_kl_per_class if self.cfg.kl_reduction == "mean" else mean_kl

    def needed(self, name: str) -> nn.Module:
        """The teacher or teacher_nat, or a line that says that there is none."""
        told = f"framework {self.cfg.framework} needs a {name}: Framework(..., needs=({name!r},))"
        require(getattr(self, name) is not None, told)
        return getattr(self, name)

    @cached_property
    def t(self) -> Tensor:
        return predict(self.needed("teacher"), self.x)

    @cached_property
    def s_adv(self) -> Tensor:
        return as_float32(self.student(self.x_adv))

    @cached_property
    def s(self) -> Tensor:
        return as_float32(self.student(self.x))

    @cached_property
    def t_adv(self) -> Tensor:
        return predict(self.needed("teacher"), self.x_adv)

    @cached_property
    def t_nat(self) -> Tensor:
        return predict(self.needed("teacher_nat"), self.x)

    def strength(self) -> Threat:
        """That of all instances, or under InfoARD one for each."""
        if not self.info or not self.info.rule:
            return self.threat
        needs = getattr(self.info.rule, "needs", ("t",))
        asked = {"steps_lo": self.cfg.steps_lo, "generator": self.generators.get("rule")}
        if "s" in needs:
            asked["s"] = predict(self.student, self.x)
        if "teacher" in needs:
            asked.update(teacher=self.needed("teacher"), x=self.x)
        t = self.t if "t" in needs else None
        return self.info.strength(t, self.y, self.threat, **asked)

    def attack(self, objective: Callable, init: str = "uniform") -> None:
        """Sets x_adv: the one pgd of all frameworks, of objective(z, rows=ALL) [B] as in pgd."""
        self.__dict__.pop("s_adv", None)  # passes on an earlier x_adv are made anew
        self.__dict__.pop("t_adv", None)
        self.threat = self.strength()
        generator = self.generators.get("attack")
        with self.frozen(self.student, self.teacher):
            self.x_adv = pgd(objective, self.x, init=init, generator=generator, **vars(self.threat))

    def loss(self) -> Tensor:
        """The framework's loss plus InfoARD's, on the same passes."""
        framework = get_framework(self.cfg.framework)
        for name in framework.needs:
            self.needed(name)
        if self.cfg.plus:
            loss = resolve({}, "companions.plus:loss", "further terms")(self, framework.loss)
        else:
            loss = framework.loss(self)
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        told = f"the loss of {self.cfg.framework} must be a scalar tensor, of shape [], not {shape}"
        require(shape == [], told)
        if self.info and self.info.weights:
            told = f"student and teacher have {self.s_adv.shape[1]} and {self.t.shape[1]} classes"
            require(self.s_adv.shape == self.t.shape, told)  # by now both passes are made
            loss = loss + self.info.loss(self.x_adv, self.x)
            self.terms.update(self.info.terms)
        return loss


@dataclass(frozen=True)
class Framework:
    """A base framework: its loss, a function of a Step, and what it needs besides.

    needs: the nets it asks for, of teacher and teacher_nat. defaults: what None means in Config.
    options: settings of its own, {name: (default, help)}, read as step.cfg.own[name]. infoard:
    whether InfoARD can be added. best_by: the column of the log that chooses `best`, or "epoch" for
    the last. static: whether all steps are the same operations (no step.memory, no number that
    changes but step.progress), so that CUDA can replay one. settle(cfg): the settings it runs with,
    or an InfoardError. prepare(student, nets, cfg, classes): the net to train; it may put nets of
    its own into the dict nets["more"].
    """

    loss: Callable
    needs: tuple[str, ...] = ()
    defaults: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    infoard: bool = True
    best_by: str = "val_pgd"
    static: bool = False
    settle: Callable | None = None
    prepare: Callable | None = None


def natural(step: Step) -> Tensor:
    """No defence, CE(S(x),y): the control that every robust number is held against."""
    return F.cross_entropy(step.s, step.y)


def at(step: Step) -> Tensor:
    """Adversarial training, CE(S(x'),y): no teacher but for InfoARD's strengths and features."""
    step.attack(ce_objective(step.student, step.y))
    return F.cross_entropy(step.s_adv, step.y)


def trades(step: Step) -> Tensor:
    """TRADES: the student's own soft label in both problems."""
    # differs: released code passes x twice in train mode (batch norm), drops lr after 74 epochs
    step.attack(kl_objective(step.student, predict(step.student, step.x)), init="normal")
    return trades_loss(step.s, step.s_adv, step.y, step.cfg.beta, step.mean_kl)


def ard(step: Step) -> Tensor:
    """Adversarially robust distillation: the teacher sees clean images alone."""
    # differs: released code divides KL by K, attacks in train mode, passes x too, loses an lr drop
    step.attack(ce_objective(step.student, step.y))
    alpha, tau, s_adv = step.cfg.alpha, step.cfg.temperature, step.s_adv
    s = None if alpha == 1 else step.s  # no pass that counts for nothing: batch norm would see it
    return ard_loss(s, s_adv, step.t, step.y, alpha, tau, step.mean_kl)


def rslad(step: Step) -> Tensor:
    """Robust soft labels in both problems."""
    # differs: released code divides KL by 10, on CIFAR-100 too
    step.attack(kl_objective(step.student, step.t), init="normal")
    s_adv = step.s_adv  # before S(x): the order in which batch norm sees them
    return rslad_loss(step.s, s_adv, step.t, step.cfg.alpha, step.mean_kl)


def adaad(step: Step) -> Tensor:
    """AdaAD: the attack climbs through the teacher, too; hence radii of up to 2 eps (README)."""
    # differs: released code divides KL by K on CIFAR-10 and always passes x too (batch norm)
    step.attack(teacher_student_objective(step.student, step.teacher), init="normal")
    alpha, t_adv, s_adv = step.cfg.alpha, step.t_adv, step.s_adv
    s, t = (None, None) if alpha == 1 else (step.s, step.t)  # no pass that counts for nothing
    return adaad_loss(s, s_adv, t, t_adv, alpha, step.mean_kl)


TAUGHT = {"needs": ("teacher",), "static": True}
FRAMEWORKS = {
    "natural": Framework(natural, infoard=False, best_by="val_clean", static=True),
    "at": Framework(at, static=True),
    "trades": Framework(trades, defaults={"beta": 6.0}, static=True),
    "ard": Framework(ard, defaults={"alpha": 1.0, "temperature": 30.0}, **TAUGHT),
    "rslad": Framework(rslad, defaults={"alpha": 5 / 6}, **TAUGHT),
    "adaad": Framework(adaad, defaults={"alpha": 1.0, "lam_hi": 2.0}, **TAUGHT),
}
FURTHER_FRAMEWORKS = {
    "frameworks": "akd iad adaiad mtard bmtard absld adr adr_trades igdm saad",
    "namid": "estimators namid namid_trades",
    "mid": "autoencoder mid mid_transfer",
}
for file, names in FURTHER_FRAMEWORKS.items():
    FRAMEWORKS.update({name: f"companions.{file}:{name.upper()}" for name in names.split()})
del file, names


def get_framework(name: str) -> Framework:
    """That of a name in FRAMEWORKS or of anyone's module:name; a bare function is wrapped."""
    found = resolve(FRAMEWORKS, name, "framework")
    framework = found if isinstance(found, Framework) else Framework(found)
    if ":" in name:
        optional("frameworks:check_framework")(framework)
    return framework


# ==== 7. Models, teachers =========================================================================
# Layers are named as in files in the wild (kuangliu's CIFAR nets, TRADES' WRN): these load.


class Normalize(nn.Module):
    """(x - mean)/std, inside the model; not in its state dict, as files have no such keys."""

    def __init__(self, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the resolution at stride 1."""
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """ResNet, 1512.03385: conv-bn-relu-conv-bn + shortcut, relu."""

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1 = conv(c_in, c, 3, stride)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = conv(c, c)
        self.bn2 = nn.BatchNorm2d(c)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c:
            self.shortcut = nn.Sequential(conv(c_in, c, 1, stride), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.bn1(self.conv1(x)))
        f = self.bn2(self.conv2(f))
        return F.relu(f + self.shortcut(x))


def stage(block: Callable, c_in: int, c: int, n: int, stride: int) -> nn.Sequential:
    """n blocks, the first of which changes width and resolution."""
    return nn.Sequential(block(c_in, c, stride), *(block(c, c, 1) for _ in range(n - 1)))


def in_a_row(size: int, conv1: nn.Conv2d, layers: dict, head: nn.Linear, name: str = "linear"):
    """normalise, conv1, layers, pool, head; above 64 pixels they are halved, from 128 quartered."""
    first = OrderedDict(normalize=Normalize(), conv1=conv1)
    if size > 64:
        conv1.stride = (2, 2)
    if size >= 128:
        first["shrink"] = nn.MaxPool2d(2)
    last = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), name: head}
    return nn.Sequential(OrderedDict(**first, **layers, **last))


def resnet(classes: int = 10, size: int = 32, blocks=(2, 2, 2, 2)) -> nn.Sequential:
    """ResNet with as many basic blocks in its four stages."""
    layers = {"bn1": nn.BatchNorm2d(64), "relu": nn.ReLU()}
    for i, n in enumerate(blocks):
        stride = 1 if i == 0 else 2
        layers[f"layer{i + 1}"] = stage(BasicBlock, max(64, 32 << i), 64 << i, n, stride)
    return in_a_row(size, conv(3, 64), layers, nn.Linear(512, classes))


def tiny(classes: int = 10, size: int = 32, width: int = 16) -> nn.Sequential:
    """Four convolutions, for the demo, for tests and for constrained hardware."""
    conv1 = conv(3, width, 3, 2)
    layers = {"bn1": nn.BatchNorm2d(width), "relu": nn.ReLU()}
    for i, stride in ((1, 2), (2, 2), (3, 1)):
        c = width << i
        block = [conv(c // 2, c, 3, stride), nn.BatchNorm2d(c), nn.ReLU()]
        layers[f"layer{i}"] = nn.Sequential(*block)
    return in_a_row(size, conv1, layers, nn.Linear(8 * width, classes))


MODELS = {
    "resnet18": resnet,
    "preact_resnet18": "companions.nets:preact_resnet",
    "wrn_34_10": "companions.nets:wide_resnet",
    "mobilenet_v2": "companions.nets:mobilenet_v2",
    "tiny": tiny,
    "tiny_wide": partial(tiny, width=32),
}


def build_model(name: str, classes: int | None = 10, size: int = 32, **options) -> nn.Module:
    """A net of MODELS; by companions any wrn_<depth>_<width>[_silu], module:factory or timm's."""
    if name in MODELS:
        return resolve(MODELS, name, "model")(classes, size, **options)
    build = resolve({}, "companions.nets:by_name", f"net {name}, by")
    return build(name, classes, size, **options)


def load_tensors(path: str | Path) -> dict:
    """A checkpoint file as a dict, with weights_only, or one line that says what is wrong."""
    require(Path(path).is_file(), f"no checkpoint file at {path}")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # whatever a broken file makes the unpickler raise
        told = f"{path} is truncated or no PyTorch file, or it holds code or no dict"
        raise InfoardError(f"{told}: get it again, or save its state_dict() alone") from None


def load_own(file: dict, arch: str | None = None) -> nn.Module:
    """The net that a checkpoint of this program evaluates: the average of weights if it has one."""
    require(file.get("format") == "infoard-1", "another program's file: it needs companions/")
    weights, name = file["model"], file["config"]["student"]
    if "ema" in file:
        weights = {k.removeprefix("module."): v for k, v in file["ema"].items()}
        weights.pop("n_averaged")
    require(arch in (None, name), f"holds a {name}, not the {arch} asked for")
    classes = len(file["classes"]) or len(list(weights.values())[-1])
    if file["size"] == 64 and "benchmark" not in file["config"] and ":" not in name:
        name = re.sub("(_ae)?$", r"_half\1", name, count=1)  # conv1 once halved 64 pixels
    with torch.random.fork_rng([]):
        net = build_model(name, classes, file["size"])
    net.load_state_dict(weights)
    return net


def load_teacher(
    path_or_id: str,
    arch: str | None = None,
    num_classes: int | None = None,
    *,
    size: int = 32,
    norm: str = "none",
    dataset: str = "cifar10",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A frozen net in eval mode, from a file or address, robustbench:ID or module:factory.

    What a stranger's file does not tell must be said: norm, arch "wrn_28_10_silu".
    """
    path_or_id = str(path_or_id)
    try:
        if has_companions():
            load = resolve({}, "companions.checkpoints:load", "loader")
            net = load(path_or_id, arch, num_classes, size, norm, dataset, device)
        else:
            net = load_own(load_tensors(path_or_id), arch)
            net = net.to(device, memory_format=torch.channels_last)
        net = net.eval().requires_grad_(False)
        z = predict(net, torch.full((2, 3, size, size), 0.5, device=device))  # [2, K]
        told = f"has {z.shape[1]} classes, the data have {num_classes}"
        require(num_classes in (z.shape[1], None), told)
        is_logits = (z < 0).any() or (z.sum(1) - 1).abs().max() > 1e-4
        require(is_logits, "gives probabilities, not logits")
    except Exception as error:  # whatever foreign code raises
        why = " ".join(str(error).split())[:600] or type(error).__name__
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
    about: dict = field(default_factory=dict)  # counts and fingerprint, for checkpoints
    extra: object = None  # generated images to learn from, too


def render_shapes(train: int = 10_000, test: int = 2_000, size: int = 32, seed: int = 0) -> Data:
    """The built-in set, a shape per image, from easy (large, clear) to hard (small, faint)."""
    outlines = {"disk": 0, "peanut": 2, "trefoil": 3, "clover": 4, "star": 5}  # their lobes
    classes = [*outlines, *(f"hollow {name}" for name in outlines)]
    g, n = torch.Generator().manual_seed(seed), train + test
    labels = torch.arange(n) % len(classes)
    kind = labels.view(n, 1, 1, 1)
    lobes = torch.tensor([*outlines.values(), *outlines.values()])[kind]
    hard, turn, cx, cy = torch.rand(4, n, 1, 1, 1, generator=g).unbind()
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    right, down = grid - 0.5 * (cx - 0.5), grid[:, None] - 0.5 * (cy - 0.5)
    angle = torch.atan2(down, right) + turn - 0.5
    outline = 1 + 0.35 * (lobes > 0) * torch.cos(lobes * angle)
    depth = outline - (right * right + down * down).sqrt() / (0.6 - 0.2 * hard)  # inside: > 0
    depth = torch.where(kind < len(outlines), depth, 0.2 - (depth - 0.1).abs())  # hollow
    ink = torch.sigmoid(12 * depth)
    paper, colour = torch.rand(2, n, 3, 1, 1, generator=g)
    noise = (0.02 + 0.06 * hard) * torch.randn(n, 3, size, size, generator=g)
    images = 0.05 + 0.3 * paper + (0.75 - 0.5 * hard) * (0.5 + 0.5 * colour) * ink + noise
    images = (images.clamp(0, 1) * 255).round().byte().contiguous(memory_format=torch.channels_last)
    return Data(images[:train], labels[:train], images[train:], labels[train:], classes)


DATASETS = {  # each: loader(data_dir, download=..., image_size=..., cache=...) -> Data
    "shapes": lambda data_dir, **options: render_shapes(),
    "cifar10": "companions.datasets:cifar10",
    "cifar100": "companions.datasets:cifar100",
    "svhn": "companions.datasets:svhn",
    "tinyimagenet": "companions.datasets:tinyimagenet",
    "folder": "companions.datasets:folder",
}


def load_dataset(name: str, data_dir="data", *, download=True, image_size=0, cache="runs/cache"):
    """Data of one of DATASETS, or of your own module:function, which takes the same arguments.

    data_dir: its parent, folder or archive. image_size: pixels to resize to, 0: as they are.
    """
    load = resolve(DATASETS, name, "data set")
    if world()[1] > 1:
        load = resolve({}, "companions.ranks:rank_0_first", "order")(load)
    data = load(data_dir, download=download, image_size=image_size, cache=cache)
    data.about = optional("identity:facts")(name, data)
    return data


def class_balanced(y: Tensor, n: int, part: int = 1) -> Tensor:
    """Sorted indices of n images, even over classes, of each one in part at most; the same ones."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    classes = [order[y[order] == k] for k in dict.fromkeys(y[order].tolist())]  # drawn, too
    classes = [rows[: len(rows) // part] for rows in classes]
    rounds = nn.utils.rnn.pad_sequence(classes, padding_value=-1)  # [most, K]: one of each class
    return rounds[rounds >= 0][:n].sort().values


def split_training(cfg: Config, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the training labels y to learn from, and those whose images choose `best`."""
    pool = class_balanced(y, cfg.subset or len(y))
    _, counts = y[pool].unique(return_counts=True)
    even = counts.max() - counts.min() < 2 <= counts.min()
    kept = min(cfg.val_size, len(pool) // 10)  # of each class of uneven ones a tenth, too
    val = pool[class_balanced(y[pool], kept, 1 if even else 10)]
    return pool[~torch.isin(pool, val)], val


def to_float(x: Tensor, device: str | torch.device) -> Tensor:
    """uint8 (or float) images as float in [0,1] on the device, channels last."""
    x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augment(x: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Random crop after zero padding, random mirror image; all at once: [B,C,H,W] -> like x.

    Each rank draws for the images of all ranks and takes its own, so they are those of one process.
    """
    b, _, h, w = x.shape
    rank, ranks = world()
    crops = torch.randint(0, 2 * pad + 1, (2, b * ranks), generator=generator)
    mirrors = (torch.rand(1, b * ranks, generator=generator) < 0.5) & flip
    draws = torch.cat([crops, mirrors])[:, rank::ranks]  # one copy to the device for all three
    down, right, mirror = draws.to(x.device, non_blocking=True)
    windows = F.pad(x, (pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # [B,C,2 pad+1,2 pad+1,H,W]
    x = windows[torch.arange(b, device=x.device), :, down, right]
    return torch.where(mirror.bool().view(b, 1, 1, 1), x.flip(3), x)


# ==== 9. Evaluation ===============================================================================


def correct(net, x: Tensor, y: Tensor, attack=None, batch=0, text="", source=None) -> Tensor:
    """Which samples net classifies right, bool [N] on the CPU, after attack(net or source, x, y).

    The ranks, which must all call it, share the batches out; one that is too large is halved.
    """
    device = next(net.parameters()).device
    rank, ranks = world()
    batch = batch or (256 if device.type == "cpu" else 512)
    hits = torch.zeros(len(x), device=device)

    def judge(x: Tensor, y: Tensor) -> Tensor:
        try:
            x_b, y_b = to_float(x, device), y.to(device)
            if attack:
                x_adv = attack(source or net, x_b, y_b)
                x_b = torch.where(x_adv.isnan(), x_b, x_adv)  # NaN is no value of a pixel
            z = predict(net, x_b)
            return (z.argmax(1) == y_b) & ~z.isnan().any(1)  # nor is it a class
        except torch.OutOfMemoryError:
            if len(x) == 1:
                raise
        return torch.cat([judge(*half) for half in zip(x.chunk(2), y.chunk(2), strict=True)])

    with frozen_eval(net, source):
        for i in progress_bar(range(rank * batch, len(x), ranks * batch), text):
            hits[i : i + batch] = judge(x[i : i + batch], y[i : i + batch])
    return all_reduce_sum(hits).cpu() > 0


def repeatable(attack: Callable, device: torch.device, seed: int = 0, **options) -> Callable:
    """attack(net, x, y) that draws the same numbers in every call, as AutoAttack does: its result
    depends neither on the calls before nor on which rank makes them.
    """
    generator = torch.Generator(device)

    def same(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(net, x, y, generator=generator.manual_seed(seed), **options)

    return same


def percent(hits: Tensor) -> float:
    """The share of true values in per cent, with two decimals."""
    return round(100 * hits.double().mean().item(), 2)


METRICS = ["clean", "fgsm", "pgd_sat", "pgd_trades", "cw", "apgd", "aa", "worst", "worst_class"]
PARTS = ["apgd-ce", "fab-t", "apgd-ce_l2", "fab-t_l2"]  # of AutoAttack, on the way: no columns


def chosen_attacks(attacks: str) -> dict[str, Callable]:
    """{column: attack} of a list with commas, in the order in which they are run."""
    if attacks == DEFAULT_ATTACKS and not has_companions():
        print("apgd is left out of the evaluation, as companions/ is missing")
        attacks = "clean,fgsm,pgd,cw"
    known = {"clean": None, "pgd": None, **ATTACKS}
    chosen = {}
    for name in dict.fromkeys(name.strip() for name in attacks.split(",")):
        column = name.rpartition(":")[2]
        if ":" in name:
            taken = {*known, *METRICS, *chosen}
            attack = resolve({}, "companions.own:attack_called", "attacks")(name, taken)
        else:
            attack = resolve(known, name, "attack")
        if name == "pgd":
            chosen.update(pgd_sat=pgd_sat, pgd_trades=pgd_trades)
        elif name != "clean":
            chosen.update(getattr(attack, "first", {}))
            chosen[column] = attack
    return chosen


def still_right(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: dict[str, Callable],
    *,
    eps: float = 8 / 255,
    eps_l2: float = 0.5,
    batch_size: int = 0,
    seed: int = 0,
    source: nn.Module | None = None,
    kept: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Who is right on x and on x', {name: bool [N]}: clean, each attack, the worst of L-infinity.

    x [N,C,H,W] uint8 or in [0,1]; eps, eps_l2: the radius, by the norm of an attack. source: the
    net attacked in the model's place (AutoAttack: where right). kept: what is known, and goes on.
    """
    in_box = len(x) and (x.dtype == torch.uint8 or 0 <= x.min() <= x.max() <= 1)
    require(in_box, "evaluation needs images, in [0, 1]: normalise inside the model")
    device = next(model.parameters()).device
    right = {} if kept is None else kept
    right["clean"] = correct(model, x, y, None, batch_size, "clean")
    for name, attack in attacks.items():
        if name not in right:
            l2 = getattr(attack, "norm", "linf") == "l2"
            same = repeatable(attack, device, seed, eps=eps_l2 if l2 else eps)
            alive = right[["clean", *getattr(attack, "first", ())][-1]]
            hits = alive.clone()  # who is lost stays lost
            hits[alive] = correct(model, x[alive], y[alive], same, batch_size, name, source)
            right[name] = hits
    in_ball = [right[n] for n, a in attacks.items() if getattr(a, "norm", "linf") == "linf"]
    if in_ball:
        right["worst"] = torch.stack([right["clean"], *in_ball]).all(0)
    return right


def evaluate(model: nn.Module, x: Tensor, y: Tensor, *, attacks=DEFAULT_ATTACKS, **options) -> dict:
    """Accuracies in per cent under attacks of ATTACKS by name, with the options of still_right.

    pgd: PGD-20 with steps of 2/255 (sat), 0.003 (trades); cw: CW_inf, 30 steps; apgd: AutoAttack's
    APGD-CE and APGD-T; aa: all of it; worst: all L-infinity ones that were run, worst_class of it.
    """
    given = {"model": model, "x": x, "y": y, "attacks": chosen_attacks(attacks), **options}
    given |= optional("usable:made_usable")(**given)
    right = still_right(**given)
    return summary(right, given["y"].cpu()) | optional("evaluation:look_closer")(right, **given)


def summary(right: dict[str, Tensor], y: Tensor) -> dict:
    """Accuracies in per cent, from who is still right after what; None: not run."""
    others = [name for name in right if name not in METRICS and name not in PARTS]
    result = {name: percent(right[name]) if name in right else None for name in METRICS + others}
    per_class = [percent(right.get("worst", right["clean"])[y == k]) for k in y.unique()]
    result.update(per_class=per_class, n=len(y))
    result["worst_class"] = min(per_class) if "worst" in right else None
    return result | {"warnings": ["not looked for, as companions/ is missing"]}


def report(name: str, result: dict) -> None:
    """Prints a result of evaluate, in per cent, how it was measured, and its warnings."""
    shown = (f"{k} {v:.2f}" for k, v in result.items() if type(v) is float)
    print(f"{name}:", *shown, optional("evaluation:told")(result) or f"n {result['n']}", sep="  ")
    for warning in result["warnings"]:
        print(f"warning, gradients may be masked: {warning}")


# ==== 10. Checkpoints and training ================================================================


def pick_device(name: str) -> torch.device:
    """A device that is there; auto: CUDA if possible."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InfoardError(f"device {name!r} is not available here: --device cpu or auto") from None


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The half precision to train in; auto: bf16 where the hardware multiplies it, else none."""
    if amp == "auto":
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if fast else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


class Objective(nn.ModuleList):
    """What learns, with the loss of a Step as its pass: a module whose gradients ranks share."""

    def forward(self, **parts) -> tuple[Tensor, Step]:
        step = Step(**parts)
        return step.loss(), step


@dataclass
class Progress:
    """Where a training stands. position: in order, the epoch's images. memory: of the framework."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0
    order: Tensor | None = None
    sums: dict = field(default_factory=dict)  # of the log, over the epoch
    memory: dict = field(default_factory=dict)
    history: list = field(default_factory=list)


@dataclass(eq=False)
class Run:
    """All that changes during a training, to be saved and brought back whole.

    Of N processes each has an N-th of every batch: ASA's order, batch norm, NAMID and MID's inner
    step know no more of it.
    """

    cfg: Config
    data: Data
    device: torch.device
    nets: dict  # teacher, teacher_nat and more, as in Step

    def __post_init__(self):
        cfg, data, device = self.cfg, self.data, self.device
        self.rank, self.ranks = world()
        self.size = data.x_train.shape[-1]
        with torch.random.fork_rng([]):  # nets are made on the CPU
            torch.default_generator.manual_seed(cfg.seed)
            self.student = self.make_student().to(device, memory_format=torch.channels_last)
            self.evaluated = self.student
            self.parts = {"model": self.student, "critics": nn.ModuleList()}  # of a checkpoint
            if cfg.ema or cfg.swa:
                average = resolve({}, "companions.averaging:average_of", "average")
                self.parts["ema"] = average(self)
                self.evaluated = self.parts["ema"].module
            self.info = None
            if cfg.infoard:
                self.info = self.make_info()
                self.parts["critics"] = self.info.critics
        learners = [self.student, self.parts["critics"]]
        groups = [{"params": list(net.parameters())} for net in learners]
        dtype = amp_dtype(cfg.amp, device)
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.optimizer = torch.optim.SGD(groups, cfg.lr, 0.9, weight_decay=cfg.weight_decay)
        self.parts.update(optimizer=self.optimizer, scaler=self.scaler)
        self.forward = self.student
        if cfg.compile:
            self.forward = resolve({}, "companions.fast:compiled", "compiler")(self.student)
        self.objective = Objective(learners)
        if self.ranks > 1:
            self.objective = DistributedDataParallel(self.objective)
        self.frozen, self.learn = frozen_eval, partial(learn, self)

        seed = cfg.seed + 1_000_003 * self.rank  # attack starts of their own
        attack = torch.Generator(device).manual_seed(seed)
        self.generators = {"data": torch.Generator().manual_seed(cfg.seed), "attack": attack}
        self.generators["rule"] = torch.Generator().manual_seed(cfg.seed + 500_009)
        self.train, self.val = split_training(cfg, data.y_train)
        room = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 0
        self.x = data.x_train.to(device) if data.x_train.nbytes < room else data.x_train
        self.at = Progress(order=self.train)
        if cfg.fast and dtype:
            optional("fast:speed_up")(self, dtype)

    def make_student(self) -> nn.Module:
        cfg, classes = self.cfg, len(self.data.classes)
        student = build_model(cfg.student, classes, self.size)
        prepare = get_framework(cfg.framework).prepare
        if prepare:
            student = prepare(student, self.nets, cfg, classes)
        if cfg.sync_bn:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        return student

    def make_info(self) -> InfoARD:
        names = ("asa", "mim", "w_feat", "w_att", "w_rel", "tau", "taps")
        same = {name: getattr(self.cfg, name) for name in names}
        same.update(lam=(self.cfg.lam_lo, self.cfg.lam_hi), dim=self.cfg.critic_dim)
        shape = (3, self.size, self.size)
        teacher = self.nets["teacher"] or self.student  # none: nobody asks it
        return InfoARD(self.student, teacher, image_shape=shape, **same)

    def label(self) -> dict:
        """What every checkpoint says of itself."""
        about = {"format": "infoard-1", "config": asdict(self.cfg), "size": self.size}
        return about | {"classes": self.data.classes, "data": self.data.about}

    def state(self) -> dict:
        """Everything that a resumed run needs, of all ranks."""
        sums = {name: all_reduce_sum(value) for name, value in self.at.sums.items()}
        generators = {name: g.get_state() for name, g in self.generators.items()}
        generators["attack"] = gathered(generators["attack"][None])
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        at = vars(self.at) | {"sums": sums}
        return self.label() | parts | {"at": at, "generators": generators}

    def load(self, path: Path) -> None:
        """Brings back what state() gave, in as many ranks or in others."""
        state = load_tensors(path)
        whole = {"at", *self.parts} <= state.keys()
        require(whole, f"{path} is no run to go on: change --out")
        optional("runs:of_earlier_versions")(self, state, path)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, generator in self.generators.items():
            row = self.rank if name == "attack" else 0
            with contextlib.suppress(RuntimeError, LookupError):  # other devices, more ranks
                states = torch.atleast_2d(state["generators"][name])
                generator.set_state(states[row].clone())  # a view crashes
        self.at = Progress(**state["at"])
        mine = 1 if self.rank == 0 else 0  # the sums of all ranks are rank 0's now
        self.at.sums = {k: mine * v.to(self.device) for k, v in self.at.sums.items()}
        self.at.memory = {k: v.to(self.device) for k, v in self.at.memory.items()}


def draw(run: Run, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Augmented images [B,C,H,W] in [0,1] and labels [B] of these rows, on the device."""
    x = run.x[rows.to(run.x.device, non_blocking=True)]
    y = run.data.y_train[rows].to(run.device, non_blocking=True)
    if run.data.extra:
        x, y = run.data.extra.mixed(run, x, y)
    change = augment
    if run.cfg.augment != "crop":
        change = resolve({}, f"companions.idbh:{run.cfg.augment}", "augmentation")
    x = change(x, run.generators["data"], run.size // 8, run.data.flip and run.cfg.flip)
    return to_float(x, run.device), y


def learn(run: Run, x: Tensor, y: Tensor, share: float | Tensor) -> dict[str, Tensor]:
    """Attack, loss, gradients and SGD on one batch; gives the log's means. Nothing is read from the
    device. share: of the training done.
    """
    about = {"cfg": run.cfg, "info": run.info, "progress": share, "memory": run.at.memory}
    about.update(generators=run.generators, frozen=run.frozen, **run.nets)
    with run.autocast():
        loss, step = run.objective(student=run.forward, x=x, y=y, **about)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    means = {"loss": loss, **step.terms, "eps": step.threat.eps, "steps": step.threat.steps}
    for name, value in means.items():
        if not isinstance(value, Tensor):
            value = torch.full((), value, device=run.device)  # torch.as_tensor would wait
        means[name] = value.detach().float().mean()
    return means


def train_step(run: Run, rows: Tensor, share: float) -> None:
    """One batch: draw, learn, average, sums of the log; no number is read from the device."""
    x, y = draw(run, rows)
    for group in run.optimizer.param_groups:
        group["lr"] = run.cfg.lr_at(share)
    run.student.train()
    means = run.learn(x, y, share)
    if run.cfg.ema:
        run.parts["ema"].update_parameters(run.student)
    for name, value in means.items():
        run.at.sums[name] = run.at.sums.get(name, 0) + value * len(y)


def validate(run: Run) -> dict:
    """Accuracy on the validation images, clean and under PGD-20; nothing if there are none."""
    x, y = run.data.x_train[run.val], run.data.y_train[run.val]
    attack = repeatable(pgd_sat, run.device, eps=run.cfg.eps)
    for buffer in run.evaluated.buffers() if run.ranks > 1 else ():
        dist.broadcast(buffer, 0)  # batch norm's are rank 0's
    with run.autocast():
        clean = correct(run.evaluated, x, y, None, run.cfg.eval_batch)
        attacked = correct(run.evaluated, x, y, attack, run.cfg.eval_batch)
    if not len(x):
        return {}
    return {"val_clean": percent(clean), "val_pgd": percent(clean & attacked)}


def check_in(run: Run, out: Path, caught: list[int]) -> None:
    """A log point, which waits for the device: stops if the loss is not finite or if told to."""
    last = out / "last.pt"
    weights = sum(p.detach().sum() for p in run.student.parameters())  # NaN or infinite if one is
    loss = torch.tensor((run.at.sums["loss"] + 0 * weights).item())
    if not all_reduce_sum(loss).isfinite():
        save(out / "diverged.json", {"step": run.at.step, "lr": run.cfg.lr})
        told = f"the loss is not finite at step {run.at.step}: lower --lr {run.cfg.lr} or --amp off"
        good = f"{last}: --resume goes on from it" if last.exists() else "none"
        raise InfoardError(f"{told}; last good checkpoint: {good}")
    optional("loop:stop_if_told")(run, out, caught)


def fit(run: Run, out: Path) -> None:
    """The training loop: draw, attack, loss and step (train_step), log, validate, save."""
    cfg, at, n = run.cfg, run.at, optional("runs:learned_from")(run) or len(run.train)
    every = 50 if run.ranks == 1 else 10  # steps between log points
    with optional("loop:noted_signals")() or contextlib.nullcontext([]) as caught:
        while at.epoch < cfg.epochs:
            began, first = time.time(), at.position
            if first == 0:
                order = torch.randperm(len(run.train), generator=run.generators["data"])
                at.order = run.train[order]
                at.sums = {}
            begins = progress_bar(range(first, n, cfg.batch_size), f"epoch {at.epoch + 1}")
            for i in optional("loop:with_estimate")(run, begins, n) or begins:
                batch = at.order[i : i + cfg.batch_size]
                share = (at.epoch + i / n) / cfg.epochs
                at.position, at.step = i + len(batch), at.step + 1
                equal = batch[: len(batch) // run.ranks * run.ranks]  # as many for each rank
                if len(equal):
                    train_step(run, equal[run.rank :: run.ranks], share)
                now = caught and run.ranks == 1  # ranks stop together
                if now or at.step % every == 0 or at.position == n:
                    check_in(run, out, caught)

            seconds = max(time.time() - began, 1e-6)
            at.epoch, at.position, at.seconds = at.epoch + 1, 0, at.seconds + seconds
            if cfg.swa:
                resolve({}, "companions.averaging:end_epoch", "average")(run)
            seen = n // run.ranks * run.ranks
            row = {"epoch": at.epoch, "lr": run.optimizer.param_groups[0]["lr"]}
            row.update({k: all_reduce_sum(v).item() / seen for k, v in at.sums.items()})
            row.update(validate(run), images_per_s=round((n - first) / seconds, 1))
            row["seconds"] = round(at.seconds, 1)
            at.history.append(row)
            score = row.get(get_framework(cfg.framework).best_by, 0.0)
            if score > at.best or not len(run.val):
                at.best, at.best_epoch = score, at.epoch
                weights = {"epoch": at.epoch, "model": run.evaluated.state_dict()}
                save(out / "best.pt", run.label() | weights)
            save(out / "last.pt", run.state())
            save(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in at.history).encode())
            print(*(f"{k} {v:.4g}" for k, v in row.items()), sep="  ", flush=True)
        check_in(run, out, caught)  # a signal during the last validation


def test_images(data: Data, n: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """n class-balanced test images, always the same; 0: all; None: 500 on a CPU, else all."""
    if n is None:
        n = 500 if device.type == "cpu" else 0
    rows = class_balanced(data.y_test, n or len(data.y_test))
    return data.x_test[rows], data.y_test[rows]


def trained(cfg: Config, framework: str, arch: str, teacher: str | None = None, **more) -> str:
    """best.pt of a net that is trained once with these settings, and then kept."""
    same = "dataset data_dir subset val_size image_size eps steps step_size lr amp batch_size"
    made = {name: getattr(cfg, name) for name in same.split()}
    made.update(student=arch, framework=framework, epochs=cfg.teacher_epochs, **more)
    if framework in ("autoencoder", "natural") and cfg.framework != "mtard":
        made["seed"] = 99  # no student of the tables begins with it
    of = (optional("own:digest")(teacher) or teacher) if teacher else ""
    key = hashlib.sha256(f"{json.dumps(made)}{of}".encode()).hexdigest()[:8]
    out = Path(f"runs/teachers/{cfg.dataset}-{arch}-{framework}-{key}")
    out = optional("runs:teacher_folder")(out, cfg) or out
    if not (out / "results.json").exists():
        print(f"training by {framework} what is missing, kept in {out}")
        made.update({name: getattr(cfg, name) for name in ("download", "device", "eval_subset")})
        own = {name: made.pop(name) for name in get_framework(framework).options if name in made}
        made.update(own=own, teacher=teacher, out=str(out), attacks="clean,pgd", resume=True)
        train(infoard=False, figures=False, flip=cfg.flip, **made)
    return f"{out}/best.pt"


def get_nets(cfg: Config, data: Data, device: torch.device) -> dict:
    """The nets beside the student, as in Step; without companions/ a teacher alone, unchecked."""
    if has_companions():
        return resolve({}, "companions.teachers:get_nets", "teachers")(cfg, data, device)
    require(not cfg.transfer, "--transfer needs companions/ beside this file")
    if not cfg.infoard and "teacher" not in get_framework(cfg.framework).needs:
        return {"teacher": None}
    with torch.device("meta"):
        build_model(cfg.student)  # or one line, before a teacher is trained
    path = cfg.teacher or trained(cfg, cfg.teacher_framework, cfg.teacher_arch)
    how = {"size": data.x_train.shape[-1], "device": device}
    return {"teacher": load_teacher(path, cfg.teacher_arch, len(data.classes), **how)}


def train(cfg: Config | None = None, **given) -> dict:
    """The whole job: data, teacher, student, evaluation, files in cfg.out; gives results.json."""
    cfg = (cfg or Config(**given)).resolved()
    out, device = Path(cfg.out), pick_device(cfg.device)
    with optional("runs:alone_in")(out, cfg) or contextlib.nullcontext():
        finished, begun = (out / "results.json").exists(), (out / "last.pt").exists()
        optional("runs:same_run")(cfg, out)
        if not has_companions() and (finished or begun):
            old = json.loads((out / "config.json").read_text())["settings"]
            same = old == asdict(replace(cfg, resume=old["resume"]))
            require(same, f"{out} was begun with other settings: choose another --out")
        if finished:
            if not has_companions():
                print(f"{out} is finished: another --out or --seed makes another run")
            optional("runs:seen_finished")(cfg, out)
            return json.loads((out / "results.json").read_text())
        require(cfg.resume or not begun, f"{out} is an unfinished run: --resume or another --out")
        chosen_attacks(cfg.attacks)
        optional("runs:check_possible")(cfg, device)
        how = {"download": cfg.download, "image_size": cfg.image_size}
        data = load_dataset(cfg.dataset, cfg.data_dir, **how)
        if cfg.extra:
            data = resolve({}, "companions.extra:attached", "companion")(cfg, data)
        optional("runs:go_on")(cfg, out, data)
        run = Run(cfg, data, device, get_nets(cfg, data, device))
        if begun:
            run.load(out / "last.pt")
        lifted = " + InfoARD" if cfg.infoard else ""
        told = f"{out}: {cfg.student} by {cfg.framework}{lifted}, {len(run.train)} training and"
        told += f" {len(run.val)} validation images, {run.ranks} x {device}"
        done = run.at.epoch == cfg.epochs
        print(told, "trained already" if done else f"from epoch {run.at.epoch + 1}", sep=", ")
        optional("runs:introduce")(run)
        if not begun:  # what is refused above leaves nothing behind
            about = optional("runs:provenance")(run)
            save(out / "config.json", {"settings": asdict(cfg)} | about)
        fit(run, out)
        return finish(run, out)


def evaluated(cfg: Config, net: nn.Module, data: Data, device: torch.device, **options) -> dict:
    """evaluate() of a net on the test images that the settings ask for."""
    x, y = test_images(data, cfg.eval_subset, device)
    options.update(eps=cfg.eps, eps_l2=cfg.eps_l2, attacks=cfg.attacks, batch_size=cfg.eval_batch)
    looked_at = optional("evaluation:looked_at")(cfg, data, net, x, y, **options)
    return looked_at or evaluate(net, x, y, **options)


def finish(run: Run, out: Path) -> dict:
    """The one look at the test images: last and best under all attacks, figures."""
    cfg, at, net = run.cfg, run.at, run.evaluated
    look = partial(evaluated, cfg, data=run.data, device=run.device)
    last = best = look(net) | {"epoch": at.epoch}
    if at.best_epoch != at.epoch:
        file = load_tensors(out / "best.pt")
        net = load_own(file).to(run.device, memory_format=torch.channels_last)
        best = look(net) | {"epoch": file.get("epoch", at.best_epoch)}
    results = {"last": last, "best": best}
    optional("runs:add_findings")(run, net, results)
    save(out / "results.json", results)
    for name in ["best"] if best is last else ["best", "last"]:
        report(f"{out.name} {name} (epoch {results[name]['epoch']})", results[name])
    if cfg.figures:
        optional("figures:illustrate")(run, results)
    print(f"in {out}: results.json, log.jsonl, best.pt, last.pt")
    optional("ranks:barrier")()  # no rank asks for these files before they are there
    return results


# ==== 11. Command line ============================================================================
# This is what stands alone; with companions/cli.py there are verbs (eval, tables, bench, ...).


def number(text: str) -> float:
    """8/255 or 0.0314."""
    above, _, below = text.partition("/")
    return float(above) / (float(below or 1) or math.nan)  # 1/0 is NaN, which Config refuses


def run_alone(argv: list[str]) -> None:
    """train() with the options of the command line, in one process."""
    require("LOCAL_RANK" not in os.environ, "many processes need companions/ beside this file")
    verb = "".join(argv[:1])
    require(verb[:1] in ("", "-"), f"the verb {verb!r} needs companions/ beside this file")
    parser = argparse.ArgumentParser("infoard.py", allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message} (see --help)")
    for f in fields(Config):
        about = {"help": f.metadata.get("help"), "default": argparse.SUPPRESS}
        if f.type is bool:
            parser.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, **about)
        elif f.name != "own":
            kind = number if f.type is float else f.type
            parser.add_argument(flag_of(f.name), type=kind, **about)
    given = vars(parser.parse_args(argv))
    if not given.get("progress", True):
        os.environ["TQDM_DISABLE"] = "1"
    train(**given)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run = resolve({}, "companions.cli:run", "command line") if has_companions() else run_alone
        run(argv)
        return 0
    except KeyboardInterrupt as stopped:
        print("infoard: stopped by SIGINT", *stopped.args, sep=": ", file=sys.stderr)
        return 130
    except (InfoardError, OSError, ImportError, torch.OutOfMemoryError) as error:
        hint = ""
        if isinstance(error, torch.OutOfMemoryError):
            hint = ": lower --batch-size or --eval-batch"
        elif isinstance(error, ImportError):
            hint = f": pip install {error.name}"
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        first, *_ = str(error).splitlines() or [type(error).__name__]
        print(f"infoard: error{rank}: {first}{hint}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    if "LOCAL_RANK" in os.environ:  # gloo's threads sometimes abort an orderly exit
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)
