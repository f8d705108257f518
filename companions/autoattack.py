"""AutoAttack's parts as attacks by name: apgd (APGD-CE, then APGD-T) and aa (all four) [AA].

    python infoard.py eval CKPT --attacks clean,pgd,aa          in the L-infinity ball of --eps
    python infoard.py eval CKPT --attacks clean,pgd_l2,aa_l2    in the L2 ball of --eps-l2

apgd_l2 and aa_l2 are the same in L2. Where aa and an L2 attack such as pgd_l2 are asked for
together, apgd_l2 is run as well, since a few steps of PGD overstate what is left (usable.py).

Each part is attack(model, x, y, eps=..., generator=...) -> x' [B,C,H,W] as in attacks.py, and what
the others have left is attacked by it alone: its attribute first names those that go before it. The
seed is that of the generator; random numbers of the whole program are left as they are.

[AA] AutoAttack, 2003.01690, in the package pyautoattack
"""

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

import infoard as I


def attack_by(
    part: str, net: nn.Module, x: Tensor, y: Tensor, eps: float, generator, norm: str = "Linf"
) -> Tensor:
    """x' of one part of the standard version, called as AutoAttack calls it; norm: Linf or L2."""
    seed = generator.initial_seed() if generator else 0
    others = I.predict(net, x[:1]).shape[1] - 1  # classes to aim at
    gpus = [x.device.index or 0] if x.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        whole = AutoAttack(net, eps=eps, norm=norm, seed=seed, device=x.device)
        whole.apgd_targeted.n_target_classes = min(9, others)
        whole.fab.n_target_classes = min(9, others)
        whole.attacks_to_run = [part]
        return whole.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]


# ==== L-infinity ==================================================================================


def apgd_ce(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """APGD on the cross-entropy, 100 steps from one start."""
    return attack_by("apgd-ce", model, x, y, eps, generator)


def apgd(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """APGD-T: on the ratio of logits towards each other class; it needs four classes."""
    if I.predict(model, x[:1]).shape[1] < 4:
        return x
    return attack_by("apgd-t", model, x, y, eps, generator)


def fab_t(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """FAB-T: the nearest point across a linearised boundary."""
    return attack_by("fab-t", model, x, y, eps, generator)


def aa(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """Square: random search, which uses no gradients; the last part."""
    return attack_by("square", model, x, y, eps, generator)


apgd.first = {"apgd-ce": apgd_ce}
fab_t.first = {**apgd.first, "apgd": apgd}
aa.first = {**fab_t.first, "fab-t": fab_t}


# ==== L2 ==========================================================================================


def apgd_ce_l2(model: nn.Module, x: Tensor, y: Tensor, eps=0.5, generator=None) -> Tensor:
    """apgd_ce in the L2 ball."""
    return attack_by("apgd-ce", model, x, y, eps, generator, "L2")


def apgd_l2(model: nn.Module, x: Tensor, y: Tensor, eps=0.5, generator=None) -> Tensor:
    """apgd in the L2 ball."""
    if I.predict(model, x[:1]).shape[1] < 4:
        return x
    return attack_by("apgd-t", model, x, y, eps, generator, "L2")


def fab_t_l2(model: nn.Module, x: Tensor, y: Tensor, eps=0.5, generator=None) -> Tensor:
    """fab_t in the L2 ball."""
    return attack_by("fab-t", model, x, y, eps, generator, "L2")


def aa_l2(model: nn.Module, x: Tensor, y: Tensor, eps=0.5, generator=None) -> Tensor:
    """Square in the L2 ball, the last part."""
    return attack_by("square", model, x, y, eps, generator, "L2")


apgd_l2.first = {"apgd-ce_l2": apgd_ce_l2}
fab_t_l2.first = {**apgd_l2.first, "apgd_l2": apgd_l2}
aa_l2.first = {**fab_t_l2.first, "fab-t_l2": fab_t_l2}
for attack in (apgd_ce_l2, apgd_l2, fab_t_l2, aa_l2):
    attack.norm = "l2"


def with_l2(attacks: dict) -> dict:
    """The same attacks, and apgd_l2 if aa is among them and one in the L2 ball."""
    norms = [getattr(attack, "norm", "linf") for attack in attacks.values()]
    if "aa" in attacks and "l2" in norms:
        return attacks | apgd_l2.first | {"apgd_l2": apgd_l2} | attacks
    return attacks
