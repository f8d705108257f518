"""NAMID: natural and adversarial mutual information, as a defence and as a measurement.

    python infoard.py --framework namid           adversarial training, and these informations
    python infoard.py --framework namid_trades    TRADES, and these informations
    python infoard.py mi CKPT                     the measurement behind it, of any checkpoint

    1  bounds for each sample    3  losses      5  the measurement
    2  estimators                4  training

estimators  max  N(x) + A(x')  (eq. 4)  or  N(x) - N(x') + A(x') - A(x) over the fooled  (eq. 5)
namid       min  L + alpha ( 1 - cos(N(x'), N(x)) + 1 - cos(A(x'), A(x))
                             + lambda mean(A(x') - N(x')) )  over the fooled, L of at or trades
N(x): what logits S(x) say of x, N(x'): what S(x') say of x; A likewise with x' - x in the place of
x; the fooled: samples that are right on x and wrong on x'.

[NAMID] Zhou et al., ICML 2022     [CPC] 1807.03748     [JSD] f-GAN, 1606.00709
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infoard as I

# ==== 1. Bounds for each sample ===================================================================

POINTWISE = ("dv", "infonce", "jsd")


def pointwise(scores: Tensor, bound: str = "dv") -> Tensor:
    """Each row's own share of a bound, [...,B,B] -> [...,B] in nats.

        dv: f_ii - log mean_{j != i} exp f_ij                                  [NAMID]
        infonce, jsd: what the means in I.infonce and I.js_divergence are taken of

    Of one sample it bounds no information: it is how far its critic tells its own partner from all
    others.
    """
    I.lookup(POINTWISE, bound, "bound")
    batch = scores.shape[-1]
    joint = scores.diagonal(dim1=-2, dim2=-1)  # [..., B]
    if bound == "infonce":
        return joint - scores.logsumexp(-1) + math.log(batch)
    itself = torch.eye(batch, dtype=torch.bool, device=scores.device)
    # differs: released code keeps the diagonal in the mean, with score 0; here it is left out
    others = scores.masked_fill(itself, -math.inf)
    if bound == "dv":
        return joint - others.logsumexp(-1) + math.log(batch - 1)
    positive = 0.5 * F.logsigmoid(joint)
    negative = 0.5 * F.logsigmoid(-others).sum(-1) / (batch - 1)
    return math.log(2) + positive + negative


# ==== 2. Estimators ===============================================================================


class Project(nn.Module):
    """Vectors [N,C] -> [N,D]: a hidden layer beside a linear shortcut, then normalised."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.deep = nn.Sequential(
            nn.Linear(width, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
        )
        self.shortcut = nn.Linear(width, dim, bias=False)

    def forward(self, v: Tensor) -> Tensor:
        return F.normalize(self.deep(v) + self.shortcut(v), dim=1)


class LocalCritic(nn.Module):
    """scores[p,i,j] = <g(z_i), h(a_jp)>/tau: logits against each place p of an encoded image."""

    # differs: released code has width 2048 and layer norms of free scale; eq. 5 is then unbounded

    def __init__(self, classes: int, dim: int = 128, tau: float = 0.1):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
        )
        self.g = Project(classes, dim)
        self.h = Project(128, dim)
        self.tau = tau

    def forward(self, a: Tensor, *logits: Tensor) -> list[Tensor]:
        """Scores [P,B,B] of images a [B,3,H,W] with each of the logits [B,K]."""
        places = self.encoder(a).flatten(2).permute(2, 0, 1)  # [P, B, 128]
        h = self.h(places.flatten(0, 1)).unflatten(0, places.shape[:2])  # [P, B, D]
        return [self.g(z) @ h.transpose(1, 2) / self.tau for z in logits]


MEASURED = ("N(x)", "N(x')", "N(x')-N(x)", "A(x)", "A(x')", "A(x')-A(x)")


def mean_and_half(values: Tensor) -> list[float]:
    """The mean of values [N] and half the width of its 95% interval."""
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return [values.mean().item(), half]


def group_means(values: list[Tensor], right: Tensor, right_adv: Tensor) -> dict:
    """{group: {"n": samples, name: mean_and_half}} of MEASURED, by what an attack made of them.

    values: a tensor [N] for each name; right, right_adv [N]: 1 where x, x' is classified right.
    """
    groups = {
        "all": right >= 0,
        "resisted": right * right_adv > 0,
        "fooled": right > right_adv,
        "wrong": right == 0,
    }
    found = {}
    for group, rows in groups.items():
        if rows.sum() > 1:
            found[group] = {"n": int(rows.sum())}
            for name, v in zip(MEASURED, values, strict=True):
                found[group][name] = mean_and_half(v[rows])
    return found


class Estimators(nn.Module):
    """How much logits z say of x (natural) and of n = x' - x (adversarial) [NAMID].

    As a net it is the one that they are trained on, which is no part of its state.
    """

    def __init__(self, net: nn.Module, classes: int, dim: int = 128, bound: str = "dv"):
        super().__init__()
        self.held = (net,)  # in a tuple nn.Module does not see it
        self.bound = bound
        self.natural = LocalCritic(classes, dim)
        self.adversarial = LocalCritic(classes, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)

    def information(self, x: Tensor, x_adv: Tensor, s: Tensor, s_adv: Tensor) -> Tensor:
        """N(z) and A(z) of z = s, s_adv, logits on x, x_adv: [2,2,B] in nats, mean over places."""
        if len(x) < 2:  # one image alone has no negatives
            nothing = 0 * sum(p.sum() for p in self.parameters())
            return nothing.expand(2, 2, len(x))
        with torch.autocast(x.device.type, enabled=False):
            natural = self.natural(x, s, s_adv)
            adversarial = self.adversarial(x_adv - x, s, s_adv)
            scores = torch.stack([*natural, *adversarial])  # [4, P, B, B]
        return pointwise(scores, self.bound).mean(1).view(2, 2, -1)

    def measured(self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """One batch under PGD-20: MEASURED and whether x and x' are classified right, [8,B]."""
        x_adv = I.pgd_sat(self.held[0], x, y, eps=eps, generator=generator)
        s = I.predict(self, x)
        s_adv = I.predict(self, x_adv)
        with torch.no_grad(), I.frozen_eval(self):
            (n, n_adv), (a, a_adv) = self.information(x, x_adv, s, s_adv)
        right = s.argmax(1) == y
        right_adv = s_adv.argmax(1) == y
        rows = [n, n_adv, n_adv - n, a, a_adv, a_adv - a, right, right_adv]
        return torch.stack(rows)

    def findings(self, x: Tensor, y: Tensor, eps: float, size: int = 256) -> dict:
        """group_means in nats of images x [N,C,H,W], y [N] under PGD-20.

        Negatives: the batch, one of equal ones up to size; what fills none is left out.
        """
        I.require(len(x) > 1, "the measurement needs two test images: raise --eval-subset")
        device = next(self.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        size = len(x) // math.ceil(len(x) / size)
        columns = []
        for i in range(0, len(x) - size + 1, size):
            x_b = I.to_float(x[i : i + size], device)
            y_b = y[i : i + size].to(device)
            columns.append(self.measured(x_b, y_b, eps, generator))
        *values, right, right_adv = torch.cat(columns, dim=1).double().cpu()  # each [N]
        return group_means(values, right, right_adv)


# ==== 3. Losses ===================================================================================
# n, n_adv = N(x), N(x'); a, a_adv = A(x), A(x'), all [B]; w [B]: weights of a mean


def fooled(s: Tensor, s_adv: Tensor, y: Tensor) -> Tensor:
    """Weights [B] of the mean over samples right on x and wrong on x'; all zero if none is."""
    right = s.argmax(1) == y
    right_adv = s_adv.argmax(1) == y
    w = (right & ~right_adv).float()
    return w / w.sum().clamp(min=1)


def largest_loss(n: Tensor, a_adv: Tensor) -> Tensor:
    """-mean(N(x) + A(x')), eq. 4 of [NAMID]."""
    return -(n + a_adv).mean()


def difference_loss(n: Tensor, n_adv: Tensor, a: Tensor, a_adv: Tensor, w: Tensor) -> Tensor:
    """-mean(N(x) - N(x') + A(x') - A(x)) over the fooled, eq. 5 of [NAMID]."""
    return -(w * (n - n_adv + a_adv - a)).sum()


def unlikeness(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """1 - cos(u, v), vectors over the batch where w is not zero; 0 if it is zero everywhere."""
    return w.any() * (1 - F.cosine_similarity(w * u, w * v, dim=0))


# ==== 4. Training =================================================================================


def informations(step: I.Step, critics: Estimators) -> tuple[Tensor, ...]:
    """N(x), N(x'), A(x), A(x') of a batch, each [B]; asks for S(x) and S(x') if nobody has yet."""
    found = critics.information(step.x, step.x_adv, step.s, step.s_adv)
    return found.flatten(0, 1).unbind()


def estimators(step: I.Step) -> Tensor:
    """NAMID's critics, of a fixed net whose logits step.s and step.s_adv are."""
    # differs: eq. 5 is the paper's choice, eq. 4 the default here (README says why); released code
    # has cosines between N(x) and N(x') instead; Adam there, the loop's SGD here
    step.attack(I.ce_objective(step.student, step.y))
    n, n_adv, a, a_adv = informations(step, step.student)
    step.terms["n"] = n.mean()
    step.terms["n_adv"] = n_adv.mean()
    step.terms["a"] = a.mean()
    step.terms["a_adv"] = a_adv.mean()
    if step.cfg.own["mi_train"] == "max":
        return largest_loss(n, a_adv)
    w = fooled(step.s, step.s_adv, step.y)
    return difference_loss(n, n_adv, a, a_adv, w)


def namid(step: I.Step, base: Callable = I.at) -> Tensor:
    """NAMID: what attacked logits say of x, and of x' - x, is to be what clean ones say.

    Two passes of the student; the cosine is that of vectors over the batch, as in released code.
    """
    # differs: paper and code have alpha = 5 from the start (--alpha 5 --mi-ramp 0, see README);
    # released code has no lambda, selects by a softmax over the batch, makes seven passes
    I.require("estimators" in step.more, "namid needs estimators")
    own = step.cfg.own
    loss = base(step)  # its passes are the first
    n, n_adv, a, a_adv = informations(step, step.more["estimators"])
    w = fooled(step.s, step.s_adv, step.y)
    unlike = unlikeness(n_adv, n, w) + unlikeness(a_adv, a, w)
    push = (w * (a_adv - n_adv)).sum()
    step.terms.update(unlike=unlike, push=push)
    ramp = 1
    if own["mi_ramp"]:
        ramp = min(1, step.progress / own["mi_ramp"])
    penalty = unlike + own["mi_lambda"] * push
    return loss + ramp * step.cfg.alpha * penalty


def namid_trades(step: I.Step) -> Tensor:
    """NAMID on TRADES."""
    return namid(step, base=I.trades)


OF_ESTIMATORS = {
    "mi_bound": ("dv", "bound of the estimators: dv, infonce or jsd"),
    "mi_train": ("max", "their objective: max, which is eq. 4, or difference, eq. 5"),
}
OF_NAMID = {
    **OF_ESTIMATORS,
    "mi_lambda": (0.1, "weight lambda"),
    "mi_ramp": (1.0, "share of training over which alpha grows"),
}


def settle_estimators(cfg: I.Config) -> I.Config:
    """The settings as they are, or one line that says which cannot be."""
    I.lookup(POINTWISE, cfg.own["mi_bound"], "--mi-bound")
    I.lookup(("max", "difference"), cfg.own["mi_train"], "--mi-train")
    return cfg


def settle_namid(cfg: I.Config) -> I.Config:
    """The same, and a missing teacher of the student's own kind."""
    weight = cfg.own["mi_lambda"]
    ramp = cfg.own["mi_ramp"]
    I.require(weight >= 0, f"--mi-lambda must lie in [0, inf], got {weight}")
    I.require(0 <= ramp <= 1, f"--mi-ramp must lie in [0, 1], got {ramp}")
    if not cfg.teacher:
        cfg = replace(cfg, teacher_arch=cfg.student)
    return settle_estimators(cfg)


def make_estimators(teacher: nn.Module, cfg: I.Config, classes: int) -> Estimators:
    """New ones, for what a teacher says."""
    return Estimators(teacher, classes, cfg.critic_dim, cfg.own["mi_bound"])


def trained_estimators(cfg: I.Config, path: str) -> str:
    """best.pt of those of the net at path: a run of its own, in runs/teachers."""
    more = {name: cfg.own[name] for name in OF_ESTIMATORS}
    for name in ("critic_dim", "eval_subset", "teacher_norm", "teacher_arch"):
        more[name] = getattr(cfg, name)
    return I.trained(cfg, "estimators", cfg.student, path, **more)


def prepare_estimators(student, nets: dict, cfg: I.Config, classes: int) -> Estimators:
    """They are what is trained, not the student."""
    return make_estimators(nets["teacher"], cfg, classes)


def prepare_namid(student: nn.Module, nets: dict, cfg: I.Config, classes: int) -> nn.Module:
    """Puts the teacher's estimators, trained once and then kept, beside the student."""
    teacher = nets["teacher"]
    path = cfg.teacher or I.trained(cfg, cfg.teacher_framework, cfg.teacher_arch)
    critics = make_estimators(teacher, cfg, classes)
    critics.load_state_dict(I.load_tensors(trained_estimators(cfg, path))["model"])
    critics.to(next(teacher.parameters()).device).eval().requires_grad_(False)
    nets["more"] = {"estimators": critics}
    return student


ESTIMATORS = I.Framework(
    estimators,
    needs=("teacher",),
    options=OF_ESTIMATORS,
    infoard=False,
    best_by="epoch",
    settle=settle_estimators,
    prepare=prepare_estimators,
)
NAMID = I.Framework(
    namid,
    needs=("teacher",),
    defaults={"teacher_framework": "at", "alpha": 1.0, "beta": 6.0},
    options=OF_NAMID,
    infoard=False,
    settle=settle_namid,
    prepare=prepare_namid,
)
NAMID_TRADES = replace(NAMID, loss=namid_trades)


# ==== 5. The measurement ==========================================================================


def figure_information(figure, found: dict) -> None:
    """Natural and adversarial information of clean and attacked images, with 95% intervals."""
    figure.set_size_inches(6, 2.5)
    places = np.arange(len(found))
    ticks = [f"{group}\nn = {values['n']}" for group, values in found.items()]
    titles = {"N": "natural", "A": "adversarial"}
    for panel, (letter, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        shown = {f"{letter}(x)": "clean images", f"{letter}(x')": "attacked images"}
        for (name, text), shift in zip(shown.items(), (-0.1, 0.1), strict=True):
            means = [values[name][0] for values in found.values()]
            halves = [values[name][1] for values in found.values()]
            panel.errorbar(places + shift, means, halves, fmt="o", ms=3, lw=1, label=text)
        panel.set(ylabel=f"{title} information (nats)")
        panel.set_xticks(places, ticks)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def verdict(mean: float, half: float, sign: int) -> str:
    """Whether a difference has this sign, by its 95% interval."""
    if abs(mean) < half:
        return "unclear"
    return "yes" if mean * sign > 0 else "no"


def run_mi(path: str, **given) -> None:
    """Is a net's natural information smaller, its adversarial one larger on attacked images? The
    estimators are trained once for a checkpoint; --mi-train difference presupposes the answer."""
    from companions import cli, figures, tables

    settings = {"framework": "estimators", "eval_subset": 1024}
    settings.update(cli.settings(path, given))
    cfg = I.Config(**{**settings, "teacher": path}).resolved()
    out = Path(trained_estimators(cfg, path)).parent
    found = json.loads((out / "results.json").read_text())["findings"]

    names = [name for name in found["all"] if name != "n"]
    lines = [["nats", "n", *names]]
    for group, values in found.items():
        texts = [f"{mean:.3f} ± {half:.3f}" for mean, half in map(values.get, names)]
        lines.append([group, str(values["n"]), *texts])
    print(tables.markdown(lines))
    for name, what, sign in (("N(x')-N(x)", "smaller", -1), ("A(x')-A(x)", "larger", 1)):
        mean, half = found["all"][name]
        told = f"{verdict(mean, half, sign)} ({mean:+.3f} ± {half:.3f})"
        print(f"{name[0]} {what} on attacked images: {told}")
    figures.draw(out / "figures", information=partial(figure_information, found=found))


run_mi.takes = (
    "dataset data_dir download subset val_size image_size teacher_arch teacher_norm teacher_epochs "
    "critic_dim eps steps step_size epochs batch_size lr amp eval_subset device progress"
).split()
run_mi.options = OF_ESTIMATORS
