"""Terms of other methods on any framework, with InfoARD or without it.

    python infoard.py --framework rslad --plus igdm
    python infoard.py --framework adaad --plus igdm:15,saad

name      what it does to the loss of a framework
igdm      + alpha p KL(T(x+d)-T(x-d)||S(x+d)-S(x-d)),  d = x'-x, p: share of training    [IGDM]
saad      each sample's divergences times h = 5 (H - min H), H: the entropy of T(x')     [SAAD]
saad_c    as saad, + beta r KL(T(x)||S(x)),  r = 1 - h/max h                             [SAAD]

A number behind a colon is alpha or beta; without one they are the papers', by base and data set:

igdm, ResNet-18     at  trades  ard  iad  akd  rslad  adaad   teacher
cifar10             60  20      5    50   7    0.9    5       LTD WRN-34-10
cifar100            100 5       50   20   50   3      15      LTD WRN-34-10
cifar100            220 5       100  50   25   10     70      BDM-AT WRN-28-10 (write igdm:70)
tinyimagenet        30  20      10   20   10   1      10      RiFT WRN-34-10, PreActResNet-18
saad_c              0.2 on cifar10, 0.5 on cifar100 and tinyimagenet

A base that is not in the table has what its nearest kin has, other data sets what cifar10 has. The
alphas were searched for cell by cell and differ by a factor of 100: search on images of your own,
not on the test set. In a loop of your own these are functions of images and logits, slopes and
saad_weights of companions/frameworks.py: docs/usage.md has the lines.

[IGDM] 2312.03286, tables 17 and 18   [SAAD] 2512.10275, table 16
"""

import math
from collections.abc import Callable

from torch import Tensor

import infoard as I
from companions.frameworks import saad_weights, slopes_of

BASES = "at trades ard iad akd rslad adaad".split()
IGDM_ALPHA = {  # of BASES in turn, as in the table above
    "cifar10": (60.0, 20.0, 5.0, 50.0, 7.0, 0.9, 5.0),
    "cifar100": (100.0, 5.0, 50.0, 20.0, 50.0, 3.0, 15.0),
    "tinyimagenet": (30.0, 20.0, 10.0, 20.0, 10.0, 1.0, 10.0),
}
KIN = {"adaiad": "adaad", "adr": "at", "adr_trades": "trades"}  # of all others: rslad
SAAD_BETA = {"cifar10": 0.2, "cifar100": 0.5, "tinyimagenet": 0.5}
NAMES = ("igdm", "saad", "saad_c")
UNATTACKED = ("natural", "autoencoder", "mid", "mid_transfer")  # no x' of IGDM's difference
# No divergence for SAAD to weigh.
WITHOUT = (*UNATTACKED, "at", "adr", "estimators", "namid", "namid_trades")


def usual_weights(framework: str, dataset: str) -> dict[str, float]:
    """{term: the papers' weight} for a base on a data set."""
    dataset = dataset if dataset in IGDM_ALPHA else "cifar10"
    alphas = dict(zip(BASES, IGDM_ALPHA[dataset], strict=True))
    base = framework if framework in BASES else KIN.get(framework, "rslad")
    return {"igdm": alphas[base], "saad": 1.0, "saad_c": SAAD_BETA[dataset]}


def weights_of(cfg: I.Config) -> dict[str, float]:
    """{term: its weight} of cfg.plus; one line for what cannot be added."""
    usual = usual_weights(cfg.framework, cfg.dataset)
    found = {}
    for entry in cfg.plus.split(","):
        name, colon, number = entry.strip().partition(":")
        I.lookup(NAMES, name, "term of --plus")
        I.require(number or not colon, f"--plus {entry}: write a number, as in igdm:5")
        held = ("saad", "igdm") if cfg.framework == "saad" else (cfg.framework,)
        twice = name in found or name.partition("_")[0] in held
        I.require(not twice, f"--plus {name}: {cfg.framework} has it already, or it stands twice")
        I.require(name != "saad" or not number, "--plus saad has no weight: igdm:5 has, saad_c:0.2")
        try:
            found[name] = I.number(number) if number else usual[name]
        except ValueError:
            raise I.InfoardError(f"--plus {entry}: write a number, as in igdm:5") from None
        usable = 0 <= found[name] < math.inf
        I.require(usable, f"--plus {entry}: a weight must be a finite number, not negative")
    I.require(not {"saad", "saad_c"} <= found.keys(), "--plus: saad_c is saad with one term more")
    bare = cfg.framework in WITHOUT and {"saad", "saad_c"} & found.keys()
    I.require(not bare, f"--plus saad weighs divergences, and {cfg.framework} has none")
    still = cfg.framework in UNATTACKED and "igdm" in found
    I.require(not still, f"--plus igdm compares x' with x, and {cfg.framework} makes no x'")
    return found


def about_weights(cfg: I.Config) -> list[str]:
    """A line that says the weights of the terms, and whose they are."""
    if not cfg.plus:
        return []
    weights = {name: weight for name, weight in weights_of(cfg).items() if name != "saad"}
    if not weights:
        return []
    told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    dataset = cfg.dataset if cfg.dataset in IGDM_ALPHA else "cifar10"
    return [f"weights of --plus: {told} (without a number of yours the papers', for {dataset})"]


def weighted(mean_kl: Callable, of_samples: Callable) -> Callable:
    """mean_kl with of_samples() [B] on each sample, asked for when the attack is over."""

    def own(p: Tensor, q: Tensor, tau: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
        return mean_kl(p, q, tau, weight * of_samples())

    return own


def loss(step: I.Step, base: Callable) -> Tensor:
    """The loss of a framework, base(step), with the terms of step.cfg.plus."""
    found = weights_of(step.cfg)
    mean_kl = step.mean_kl
    asked = []

    def unsure() -> Tensor:
        asked.append(True)
        told = f"--plus saad weighs by T(x'), and {step.cfg.framework} asks step.mean_kl before"
        I.require(step.x_adv is not step.x, f"{told} step.attack(), or makes none")
        return saad_weights(step.t_adv)[0]

    if {"saad", "saad_c"} & found.keys():
        step.mean_kl = weighted(mean_kl, unsure)
    total = base(step)
    told = f"--plus saad weighs divergences, and {step.cfg.framework} asks step.mean_kl for none"
    I.require(asked or step.mean_kl is mean_kl, told)
    if "igdm" in found:
        told = f"--plus igdm compares x' with x, and {step.cfg.framework} makes no step.attack()"
        I.require(step.x_adv is not step.x, told)
        s_slope, t_slope = slopes_of(step)
        pull = step.mean_kl(t_slope, s_slope)
        step.terms["igdm"] = pull.detach()
        total = total + found["igdm"] * step.progress * pull
    if found.get("saad_c"):
        _, rest = saad_weights(step.t_adv)
        total = total + found["saad_c"] * mean_kl(step.t, step.s, weight=rest)
    return total
