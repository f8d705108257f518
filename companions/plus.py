"""Terms of other methods on any framework, with InfoARD or without it.

    python infoard.py --framework rslad --plus igdm
    python infoard.py --framework adaad --plus igdm:15,saad

name      what it does to the loss of a framework
igdm      + alpha p KL(T(x+d)-T(x-d)||S(x+d)-S(x-d)),  d = x'-x, p: share of training    [IGDM]
saad      each sample's divergences times h = 5 (H - min H), H: the entropy of T(x')     [SAAD]
saad_c    as saad, + beta r KL(T(x)||S(x)),  r = 1 - h/max h                             [SAAD]

A number behind a colon is alpha or beta. In a loop of your own these are functions of logits:
frameworks.saad_weights(t_adv), and infoard.mean_kl(t_slope, s_slope) of the differences.

[IGDM] 2312.03286, tables 17 and 18   [SAAD] 2512.10275, table 16
"""

from collections.abc import Callable

from torch import Tensor

import infoard as I
from companions.frameworks import saad_weights, slopes

# IGDM's alpha by its base, for ResNet-18 on CIFAR-10 with the LTD teacher; others: that of rslad.
ALPHA = {"at": 60.0, "trades": 20.0, "ard": 5.0, "iad": 50.0, "rslad": 0.9, "adaad": 5.0}
BETA = 0.2  # of SAAD-C, on CIFAR-10
NAMES = ("igdm", "saad", "saad_c")


def weights_of(cfg: I.Config) -> dict[str, float]:
    """{term: its weight} of cfg.plus; one line for what cannot be added."""
    usual = {"igdm": ALPHA.get(cfg.framework, ALPHA["rslad"]), "saad": 1.0, "saad_c": BETA}
    found = {}
    for entry in cfg.plus.split(","):
        name, _, number = entry.strip().partition(":")
        I.lookup(NAMES, name, "term of --plus")
        twice = name in found or name.partition("_")[0] == cfg.framework
        I.require(not twice, f"--plus {name}: {cfg.framework} has it already, or it stands twice")
        I.require(name != "saad" or not number, "--plus saad has no weight: igdm:5 has, saad_c:0.2")
        try:
            found[name] = I.number(number) if number else usual[name]
        except ValueError:
            raise I.InfoardError(f"--plus {entry}: write a number, as in igdm:5") from None
        I.require(found[name] >= 0, f"--plus {entry}: a weight must not be negative")
    I.require(not {"saad", "saad_c"} <= found.keys(), "--plus: saad_c is saad with one term more")
    bare = cfg.framework in ("natural", "at") and {"saad", "saad_c"} & found.keys()
    I.require(not bare, f"--plus saad weighs divergences, and {cfg.framework} has none")
    return found


def weighted(mean_kl: Callable, of_samples: Callable) -> Callable:
    """mean_kl with of_samples() [B] on each sample, asked for when the attack is over."""

    def own(p: Tensor, q: Tensor, tau: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
        return mean_kl(p, q, tau, weight * of_samples())

    return own


def loss(step: I.Step, base: Callable) -> Tensor:
    """The loss of a framework, base(step), with the terms of step.cfg.plus."""
    found = weights_of(step.cfg)
    mean_kl = step.mean_kl
    if {"saad", "saad_c"} & found.keys():
        step.mean_kl = weighted(mean_kl, lambda: saad_weights(step.t_adv)[0])
    total = base(step)
    if "igdm" in found:
        s_slope, t_slope = slopes(step)
        pull = step.mean_kl(t_slope, s_slope)
        step.terms["igdm"] = pull.detach()
        total = total + found["igdm"] * step.progress * pull
    if found.get("saad_c"):
        _, rest = saad_weights(step.t_adv)
        total = total + found["saad_c"] * mean_kl(step.t, step.s, weight=rest)
    return total
