"""AutoAttack's parts as attacks by name: apgd (APGD-CE, then APGD-T) and aa (all four) [AA].

    python infoard.py eval CKPT --attacks clean,pgd,aa

Each part is attack(model, x, y, eps=..., generator=...) -> x' [B,C,H,W] as in attacks.py, and what
the others have left is attacked by it alone: its attribute first names those that go before it. The
seed is that of the generator; random numbers of the whole program are left as they are.

[AA] AutoAttack, 2003.01690, in the package pyautoattack
"""

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

import infoard as I


def attack_by(part: str, net: nn.Module, x: Tensor, y: Tensor, eps: float, generator) -> Tensor:
    """x' of one part of the standard version, called as AutoAttack calls it."""
    seed = generator.initial_seed() if generator else 0
    others = I.predict(net, x[:1]).shape[1] - 1  # classes to aim at
    gpus = [x.device.index or 0] if x.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        whole = AutoAttack(net, eps=eps, norm="Linf", seed=seed, device=x.device)
        whole.apgd_targeted.n_target_classes = min(9, others)
        whole.fab.n_target_classes = min(9, others)
        whole.attacks_to_run = [part]
        return whole.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]


def apgd_ce(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, generator=None) -> Tensor:
    """APGD on the cross-entropy, 100 steps from five starts."""
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
