"""The property suite of infoard.py: what holds for all inputs, closed forms, parity, runs.

No data set, network or GPU. HYPOTHESIS_PROFILE: quick, ci (default, the same examples each time),
deep. Seeds and sizes are drawn, not large tensors. A tolerance of 1e-9 (float64), 1e-6 or 1e-7
(float32, of values about 1 or 0.1) is rounding; any other has its reason beside it. The helpers of
the first part serve the tests of companions/, too.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import symtable
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import cli

settings.register_profile("quick", max_examples=15, deadline=None)
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)  # the nets are tiny: threads would only wait for each other

F64 = torch.float64
K = 3  # classes of the tiny nets
R = 8 / 255  # the usual radius
ROOT = Path(I.__file__).parent
seeds = st.integers(0, 2**32 - 1)
ints = st.integers
each = pytest.mark.parametrize


# ==== 1. Helpers ==================================================================================


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, lo=0.0, hi=1.0):
    """Uniform float64 values in [lo, hi], the same for each seed."""
    values = torch.rand(*shape, generator=rng(seed), dtype=F64)
    return lo + (hi - lo) * values


def labels(b, classes=K, seed=0):
    """Random labels [B]."""
    return torch.randint(classes, (b,), generator=rng(seed))


def near(a, b, tol=1e-9):
    """a == b within tol, relative to b where b is above 1."""
    b = torch.as_tensor(b)
    gaps = (torch.as_tensor(a) - b).abs() / b.abs().clamp(min=1)
    gap = gaps.max().item()
    assert gap <= tol, f"off by {gap:.3g}, tolerance {tol:.3g}: {str(a)[:300]}, {str(b)[:300]}"


def mean(values):
    """The mean of tensors of one shape."""
    return torch.stack(list(values)).mean(0)


def one_line(error):
    """Whether a message is one line of a reasonable length."""
    return "\n" not in str(error).rstrip("\n") and 10 < len(str(error)) < 700


def noise(n, size=32, seed=0):
    """n images of random bytes, as numpy has them."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 3, size, size), np.uint8)


def snapshot(net):
    """Modes, buffers, requires_grad and gradients of a net, to be compared."""
    modes = [m.training for m in net.modules()]
    buffers = [b.tolist() for b in net.buffers()]
    parameters = [(p.requires_grad, p.grad) for p in net.parameters()]
    return str([modes, buffers, parameters])


def tiny_net(seed=0):
    """A net of K classes in eval mode, whose eval mode is not its train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, K),
        )
        net[1].running_mean.uniform_(-0.5, 0.5)
    return net.eval()


@st.composite
def problems(draw, dtype=torch.float32):
    """net, x with exact 0 and 1 and repeated pixels, y, eps: a float or [B]."""
    b = draw(ints(1, 4))
    seed = draw(seeds)
    x = rand(b, 3, 6, 6, seed=seed, lo=-0.25, hi=1.25)
    x = x.clamp(0, 1).to(dtype)
    x[:, :, 0] = x[:, :, 1]
    one = ints(0, 32)
    n = draw(one | st.lists(one, min_size=b, max_size=b))
    if isinstance(n, int):
        eps = n / 255
    else:
        eps = torch.tensor(n, dtype=dtype) / 255
    net = tiny_net(seed).to(dtype)
    return net, x, labels(b, seed=seed), eps


@st.composite
def score_matrices(draw):
    """Scores [B,B] from all equal to very sure ones."""
    b = draw(ints(2, 12))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
    return scale * rand(b, b, seed=draw(seeds), lo=-1)


@st.composite
def logit_pairs(draw):
    """Two times logits [B,K]."""
    b, k = draw(ints(1, 5)), draw(ints(2, 12))
    return rand(2, b, k, seed=draw(seeds), lo=-30, hi=30).unbind()


score_matrices = score_matrices()
logit_pairs = logit_pairs()


def pair(b=6, dtype=torch.float32):
    """student in train mode, teacher in eval mode, x, y."""
    torch.manual_seed(0)
    student = I.tiny(4, 16, width=3).to(dtype)
    teacher = I.tiny(4, 16, width=4).to(dtype).eval()
    x = rand(b, 3, 16, 16).to(dtype)
    y = torch.arange(b) % 4
    return student, teacher, x, y


make_info = partial(I.InfoARD, image_shape=(3, 16, 16))


def make_step(framework, student, teacher, x, y, info=None, *, progress=0.5, memory=None, **more):
    """A Step with random numbers of its own; more: fields of Step, options of Config."""
    in_step = {f.name for f in dataclasses.fields(I.Step)}
    options = {"framework": framework, "steps": 2}
    parts = {"progress": progress, "memory": {} if memory is None else memory}
    parts["generators"] = {"attack": rng(5), "data": rng(6)}
    for name, value in more.items():
        if name in in_step:
            parts[name] = value
        else:
            options[name] = value
    cfg = I.Config(**options).resolved()
    return I.Step(student, teacher, x, y, cfg=cfg, info=info, **parts)


# ==== 2. Attacks ==================================================================================
# By hand: the same attack in torch's own words. An attack of these tests takes a Threat.


def pgd_kl(net, x, y, **options):
    """PGD on the divergence from logits that name y."""
    t = 3.0 * F.one_hot(y, K)
    with I.frozen_eval(net):
        return I.pgd(I.kl_objective(net, t), x, **options)


def raw(init, net, x, y, threat):
    """The bare pgd from each kind of start."""
    if init == "tensor":
        init = rand(*x.shape, lo=-1, hi=2).to(x.dtype)
    objective = I.ce_objective(net, y)
    with I.frozen_eval(net):
        return I.pgd(objective, x, init=init, **vars(threat))


def by_fgsm(net, x, y, threat):
    return I.fgsm(net, x, y, eps=threat.eps)


def by_threat(attack, net, x, y, threat):
    return attack(net, x, y, **vars(threat))


ATTACKS = {
    "fgsm": by_fgsm,
    "pgd_ce": partial(by_threat, I.pgd_ce),
    "pgd_kl": partial(by_threat, pgd_kl),
    "cw_linf": partial(by_threat, I.cw_linf),
    "raw_uniform": partial(raw, "uniform"),
    "raw_normal": partial(raw, "normal"),
    "raw_none": partial(raw, "none"),
    "raw_tensor": partial(raw, "tensor"),
}
HERE = ["fgsm", "pgd_sat", "pgd_trades", "cw"]  # the evaluation attacks of infoard.py itself
each_attack = each("attack", ATTACKS.values(), ids=ATTACKS)


def linf_attack(student, x, y, eps):
    """A foreign attack, one step, that takes a float or a radius for each sample."""
    z = x.clone().requires_grad_()
    loss = F.cross_entropy(student(z), y)
    (grad,) = torch.autograd.grad(loss, z)
    eps = torch.as_tensor(eps, dtype=x.dtype)
    x_adv = x + eps.view(-1, 1, 1, 1) * grad.sign()
    return x_adv.clamp(0, 1)


def radius(x_adv, x, p=torch.inf):
    """How far each sample has gone, [B]."""
    return (x_adv - x).flatten(1).norm(p, dim=1)


def in_box(x_adv):
    return bool(x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1)


@each_attack
@given(problems(), ints(0, 3), st.booleans())
def test_attack_stays_in_each_ball_and_in_the_box(attack, problem, steps, graph):
    net, x, y, eps = problem
    before = x.clone()
    threat = I.Threat(eps=eps, alpha=3 / 255, steps=steps)
    with torch.set_grad_enabled(graph):  # an attack works inside no_grad too
        x_adv = attack(net, x, y, threat)
    assert torch.equal(x, before), "the attack wrote into x"
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert in_box(x_adv), x_adv
    # x + eps rounds by half an ulp, 3e-8; a radius of 0 changes nothing at all
    over = radius(x_adv, x) - eps
    room = 1e-7 * (torch.as_tensor(eps) > 0)
    assert (over <= room).all(), f"over the radius by {over}"


@each_attack
@each("training", [True, False])
@each("broken", [False, True])
def test_attack_leaves_the_model_as_found(attack, training, broken):
    net = tiny_net().train(training)
    net[1].training = not training  # a frozen batch norm, or one that adapts
    net[0].bias.requires_grad_(False)
    net[5].weight.grad = torch.ones(K, 16)
    before = snapshot(net)

    def look(*_):
        assert not any(m.training for m in net.modules()), "attacked in train mode"
        assert not any(p.requires_grad for p in net.parameters()), "built weight gradients"
        if broken:
            raise KeyError("broken")

    hook = net.register_forward_hook(look)
    x = rand(2, 3, 6, 6).float()
    with pytest.raises(KeyError) if broken else contextlib.nullcontext():
        attack(net, x, torch.tensor([0, 1]), I.Threat(eps=R, alpha=2 / 255, steps=2))
    hook.remove()
    assert snapshot(net) == before


@each("name", HERE)
@given(problems())
@settings(max_examples=10)
def test_named_attacks_keep_their_ball(name, problem):
    net, x, y, _ = problem
    before = x.clone()
    x_adv = I.ATTACKS[name](net, x, y, eps=R, generator=rng())
    assert torch.equal(x, before) and in_box(x_adv)
    assert (radius(x_adv, x) <= R + 1e-7).all()


@each(
    "name, steps, alpha", [("pgd_sat", 20, 2 / 255), ("pgd_trades", 20, 0.003), ("cw", 30, R / 4)]
)
def test_named_attacks_have_the_steps_that_the_field_reports(name, steps, alpha):
    net = tiny_net().double()
    x = rand(4, 3, 6, 6)
    y = labels(4)
    by_hand = I.cw_linf if name == "cw" else I.pgd_ce
    truth = by_hand(net, x, y, eps=R, alpha=alpha, steps=steps, generator=rng(3))
    attack = I.ATTACKS[name]
    near(attack(net, x, y, eps=R, generator=rng(3)), truth)
    near(attack(net, x, y, generator=rng(3)), truth)  # 8/255 is the default


@given(problems(F64))
def test_fgsm_is_one_signed_step_of_the_whole_radius(problem):
    net, x, y, eps = problem
    near(I.fgsm(net, x, y, eps=eps), linf_attack(net, x, y, eps))


def climb(w, x, init="none", **options):
    """What pgd adds to x for the objective <w, x'>."""

    def objective(z):
        return (w * z).sum(1)

    return I.pgd(objective, x, init=init, **options) - x


@given(ints(1, 4), seeds, ints(1, 32), ints(1, 12), ints(0, 8))
def test_linear_objective_gains_its_closed_form(b, seed, eps, alpha, steps):
    x = rand(b, 9, seed=seed, lo=0.2, hi=0.8)
    w = rand(b, 9, seed=seed + 1, lo=-1)
    assume(w.abs().min() > 1e-6)
    eps = rand(b, seed=seed) * eps / 255
    alpha = alpha / 255
    step = climb(w, x, eps=eps, alpha=alpha, steps=steps)
    reach = eps.clamp(max=alpha * steps)  # all of the budget, where the steps suffice
    gain = (w * step).sum(1)
    near(gain, reach * w.abs().sum(1))
    near(step.abs(), reach[:, None].expand(b, 9))


@given(ints(1, 4), seeds, st.floats(0.01, 0.4), ints(1, 6))  # the box is 0.4 away
def test_l2_attack_of_a_linear_objective_goes_straight_to_the_sphere(b, seed, eps, steps):
    x = rand(b, 9, seed=seed, lo=0.4, hi=0.6)
    w = rand(b, 9, seed=seed + 1, lo=-1)
    step = climb(w, x, eps=eps, alpha=0.1, steps=steps, norm="l2")
    reach = min(eps, 0.1 * steps)
    near(step, reach * F.normalize(w, dim=1))


@each("init", ["uniform", "normal", "none"])
@given(problem=problems(), steps=ints(0, 3))
def test_l2_attack_stays_in_its_ball_and_in_the_box(init, problem, steps):
    net, x, y, eps = problem
    eps = 10 * eps
    x_adv = I.pgd_ce(net, x, y, eps=eps, alpha=0.1, steps=steps, norm="l2", init=init)
    assert in_box(x_adv)
    length = radius(x_adv, x, 2)
    # float32 rounds a sum of 108 squares by less than 1e-5
    assert (length <= eps + 1e-5).all(), length - eps


@given(seeds, st.floats(0, 2))
def test_momentum_sums_gradients_of_unit_length(seed, mu):
    x = rand(2, 5, seed=seed, lo=0.4, hi=0.6)
    w = rand(2, 2, 5, seed=seed + 1, lo=-1)
    assume(w.abs().min() > 1e-3)
    one, two = F.normalize(w, p=1, dim=2)
    total = mu * one + two
    assume(total.abs().min() > 1e-6)
    gradients = [w[0], 100 * w[1]]  # of the first and of the second step

    def objective(z):
        gradient = gradients.pop(0)
        return (gradient * z).sum(1)

    x_adv = I.pgd(objective, x, eps=0.3, alpha=0.1, steps=2, init="none", momentum=mu)
    near(x_adv - x, 0.1 * one.sign() + 0.1 * total.sign())


def targets(kind, y):
    """What an objective of this kind is made of: labels, or logits that name them."""
    if kind == "kl":
        return 3.0 * F.one_hot(y, K).to(F64)
    return y


def objective_by_hand(kind, z, target):
    if kind == "ce":
        return F.cross_entropy(z, target, reduction="none")
    if kind == "kl":
        return I.kl(target, z)
    return -I.margin(z, target)


@each("kind", ["ce", "kl", "cw"])
@given(problem=problems(F64), seed=seeds)  # float64: no sign of a gradient flips by rounding
def test_each_sample_is_attacked_on_its_own(kind, problem, seed):
    net, x, y, eps = problem
    make = getattr(I, f"{kind}_objective")
    target = targets(kind, y)
    near(make(net, target)(x), objective_by_hand(kind, net(x), target))

    def attack(rows):
        own = eps if isinstance(eps, float) else eps[rows]
        objective = make(net, target[rows])
        return I.pgd(objective, x[rows], eps=own, alpha=3 / 255, steps=3, init="none")

    together = attack(I.ALL)
    mixed = torch.randperm(len(x), generator=rng(seed))
    near(attack(mixed), together[mixed])
    for b in range(len(x)):
        alone = slice(b, b + 1)
        near(attack(alone), together[alone])


def start(x, init, seed):
    """Where an attack begins: what pgd gives without a step."""
    return I.pgd(None, x, eps=R, alpha=0.0, steps=0, init=init, generator=rng(seed))


@each("init, std", [("uniform", R / 3**0.5), ("normal", 0.001)])
def test_generator_makes_an_attack_reproducible(init, std):
    x = rand(4, 108, lo=0.1, hi=0.9)
    state = torch.get_rng_state()
    one = start(x, init, seed=1)
    assert torch.equal(one, start(x, init, seed=1))
    assert not torch.equal(one, start(x, init, seed=2))
    spread = (one - x).std()
    near(spread / std, 1.0, 0.15)  # of 432 draws: sd 0.034
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


@each("init", ["uniform", "normal"])
def test_random_starts_do_not_depend_on_the_layout(init):
    x = rand(2, 3, 6, 6, lo=0.1, hi=0.9)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(start(last, init, seed=1), start(x, init, seed=1))


def test_small_gradients_survive_half_precision():
    x = torch.full((2, 4), 0.5, dtype=torch.float16)
    small = 2**-14  # its square is below the least number of float16

    def objective(z):
        return (z * small).sum(1) * small

    x_adv = I.pgd(objective, x, eps=0.25, alpha=0.25, steps=1, init="none")
    assert torch.equal(x_adv, x + 0.25)


def one_for_all(z):
    return z.sum()


def one_per_pixel(z):
    return z


def one_in_a_column(z):
    return z.sum(1, keepdim=True)


@each(
    "mistake, why",
    [
        ({"eps": 8.0}, "must lie in .* 8/255"),
        ({"eps": -0.1}, "must lie in"),
        ({"steps": torch.ones(3).long()}, r"steps must be an int or of shape \[2\]"),
        ({"steps": -1}, "must not be negative"),
        ({"objective": one_for_all}, r"must be \[2\], not \[\]"),
        ({"objective": one_per_pixel}, r"must be \[2\], not \[2, 4\]"),
        ({"objective": one_in_a_column}, r"must be \[2\], not \[2, 1\]"),
        ({"norm": "l1"}, "unknown norm 'l1' .*linf, l2"),
        ({"init": "gauss"}, "unknown attack start 'gauss' .*uniform, normal, none"),
    ],
)
def test_mistaken_attacks_are_refused(mistake, why):
    given = {"objective": None, "x": rand(2, 4), "eps": R, "alpha": 0.1, "steps": 1} | mistake
    with pytest.raises(I.InfoardError, match=why) as refused:
        I.pgd(**given)
    assert one_line(refused.value)


def test_l2_radii_may_exceed_one():
    x = rand(2, 4)
    step = climb(torch.ones(2, 4), x, eps=3.0, alpha=3.0, steps=2, norm="l2")
    near(x + step, torch.ones(2, 4))


def test_a_threat_is_given_by_name():
    with pytest.raises(TypeError):
        I.Threat(8 / 255, 2 / 255)  # no two can be swapped
    with pytest.raises(TypeError):
        I.pgd(one_for_all, rand(2, 4), R, R / 4, 10)
    usual = I.Threat()
    assert usual.eps == 8 / 255
    assert usual.alpha == 2 / 255  # 2/225 has been seen
    assert usual.steps == 10


@given(logit_pairs, seeds, st.floats(-50, 50))
def test_margin_is_the_lead_over_the_best_other_class(pair, seed, c):
    z = pair[0]
    y = labels(len(z), z.shape[1], seed)
    leads = []
    for row, k in zip(z.tolist(), y.tolist(), strict=True):
        true = row.pop(k)
        leads.append(true - max(row))
    near(I.margin(z, y), torch.tensor(leads, dtype=F64))
    near(I.margin(z + c, y), I.margin(z, y))


def test_margin_of_negative_logits():  # one_hot * z would take the others to be 0
    z = torch.tensor([[-1.0, -2.0]])
    near(I.margin(z, torch.tensor([0])), 1.0)


def ranks(signal):
    """How many of the others are smaller, [B]."""
    return torch.stack([(signal < value).sum() for value in signal])


# ==== 3. ASA ======================================================================================


@given(ints(2, 40), seeds, st.floats(0.5, 1), st.floats(1, 2), st.floats(0, 1), st.booleans())
def test_radii_follow_the_ranks_alone(b, seed, lo, hi, ramp, reverse):
    signal = rand(b, seed=seed)
    low, high = (hi, lo) if reverse else (lo, hi)
    how = {"threat": I.Threat(eps=R, alpha=R / 4), "lam": (low, high), "ramp": ramp}
    got = I.instance_strength(signal, **how)
    u = ranks(signal) / (b - 1)
    lam = low + (high - low) * u
    near(got.eps, R * (1 + ramp * (lam - 1)), 1e-7)
    middle = (low + high) / 2
    near(got.eps.double().mean(), R * (1 + ramp * (middle - 1)), 1e-7)
    near(got.alpha / got.eps, torch.full((b,), 0.25), 1e-6)
    assert got.steps == 10 and got.counts is None
    other = I.instance_strength((3 * signal).exp(), **how)
    assert torch.equal(got.eps, other.eps)


def test_one_instance_gets_the_middle_of_everything():  # u = 1/2 for eps and for K
    threat = I.Threat(steps=10)
    got = I.instance_strength(torch.zeros(1), threat=threat, steps_lo=2)
    near(got.eps, 1.25 * R, 1e-7)
    assert got.steps.tolist() == [6]
    assert got.counts == (1,) * 6


@given(ints(2, 40), seeds, ints(1, 6), ints(1, 6))
def test_controls_cost_the_same_and_do_not_adapt(b, seed, lo, more):
    signal = rand(b, seed=seed)
    how = {"threat": I.Threat(steps=lo + more), "steps_lo": lo}
    own = I.instance_strength(signal, **how)
    even = I.instance_strength(signal, uniform=True, **how)
    near(even.eps, own.eps.mean().expand(b), 1e-7)
    assert own.steps.sum() == even.steps.sum()
    spread = even.steps.max() - even.steps.min()
    assert spread <= 1, even.steps


@given(ints(2, 40), seeds)
def test_shuffled_strengths_are_the_same_ones_for_other_instances(b, seed):
    student, teacher, *_ = pair()
    t = rand(b, 4, seed=seed)
    y = torch.arange(b) % 4
    own = make_info(student, teacher).strength(t, y)
    info = make_info(student, teacher, asa="shuffled")
    mixed = info.strength(t, y, generator=rng(9))
    assert torch.equal(mixed.eps.sort().values, own.eps.sort().values)
    again = info.strength(-t, y, generator=rng(9))
    assert torch.equal(mixed.eps, again.eps)


@each("uniform", [False, True])
@given(b=ints(2, 40), seed=seeds, lo=ints(1, 6), more=ints(1, 6))
def test_step_counts_are_static_and_those_of_the_steps(uniform, b, seed, lo, more):
    signal = rand(b, seed=seed)
    how = {"threat": I.Threat(steps=lo + more), "steps_lo": lo, "uniform": uniform}
    one = I.instance_strength(signal, **how)
    other = I.instance_strength(-signal, **how)
    assert one.counts == other.counts
    assert one.counts == I.active_counts(one.steps.tolist())
    for n, count in enumerate(one.counts):
        assert count == (one.steps > n).sum() > 0
    assert one.steps.max() == len(one.counts)


@given(b=ints(2, 40), seed=seeds, lo=ints(1, 6), more=ints(1, 6))
def test_steps_follow_the_ranks(b, seed, lo, more):
    signal = rand(b, seed=seed)
    got = I.instance_strength(signal, threat=I.Threat(steps=lo + more), steps_lo=lo)
    wanted = []
    for rank in ranks(signal).tolist():
        share = rank / (b - 1)
        wanted.append(math.floor(lo + more * share + 0.5 + 1e-9))  # halves go up
    assert got.steps.tolist() == wanted


@each("init", ["none", "uniform", "normal", "tensor"])
@each("kind", ["ce", "kl", "cw"])
@given(problem=problems(F64), seed=seeds)
@settings(max_examples=20)
def test_step_schedule_equals_one_attack_per_sample(init, kind, problem, seed):
    """Random starts are dealt in the order of the batch: those of the attack without steps."""
    net, x, y, eps = problem
    make = getattr(I, f"{kind}_objective")
    target = targets(kind, y)
    steps = torch.randint(5, (len(x),), generator=rng(seed))
    eps = torch.as_tensor(eps, dtype=F64).expand(len(x))
    if init == "tensor":
        init = rand(*x.shape, seed=seed)

    def attack(rows, init, steps, counts=None):
        threat = I.Threat(eps=eps[rows], alpha=eps[rows] / 3, steps=steps, counts=counts)
        objective = make(net, target[rows])
        return I.pgd(objective, x[rows], init=init, generator=rng(5), **vars(threat))

    start = attack(I.ALL, init, 0)
    together = attack(I.ALL, init, steps)
    for b, k in enumerate(steps.tolist()):
        alone = slice(b, b + 1)
        near(attack(alone, start[alone], k), together[alone])
    counts = I.active_counts(steps.tolist())
    near(attack(I.ALL, init, steps, counts), together)


@each("options", [{}, {"momentum": 0.9}, {"norm": "l2"}], ids=str)
@given(problem=problems(F64), k=ints(0, 4))
def test_a_schedule_of_equal_steps_is_the_plain_attack(options, problem, k):
    net, x, y, eps = problem

    def attack(steps):
        how = {"eps": eps, "alpha": 3 / 255, "steps": steps, **options}
        return I.pgd_ce(net, x, y, generator=rng(), **how)

    each_its_own = torch.full((len(x),), k)
    near(attack(each_its_own), attack(k))


# ==== 4. Divergences ==============================================================================


def probabilities(z):
    return z.exp() / z.exp().sum(1, keepdim=True)


@given(logit_pairs)
def test_kl_is_nats_per_sample_summed_over_classes(pair):
    p = probabilities(pair[0])
    q = probabilities(pair[1])
    found = I.kl(*pair)
    near(found, (p * (p / q).log()).sum(1))
    twice = [z.repeat(2, 1) for z in pair]
    near(I.kl(*twice).mean(), found.mean())
    impossible = [F.pad(z, (0, 7), value=-1e4) for z in pair]  # further classes
    near(I.kl(*impossible), found)


@given(logit_pairs, st.floats(-9, 9))
def test_kl_is_positive_but_for_equal_logits(pair, c):
    p, q = pair
    near(I.kl(p, p + c), 0.0)
    distance = (p.softmax(1) - q.softmax(1)).abs().sum(1)
    pinsker = 0.5 * distance**2
    assert (I.kl(p, q) >= pinsker - 1e-12).all(), I.kl(p, q) - pinsker


@given(logit_pairs)
def test_kl_is_a_squared_distance_when_hot(pair):
    p, q = pair
    limit = (p - q).var(1, correction=0) / 2  # |centred difference|^2/(2K)
    assume(limit.min() > 0.1)
    found = 1e10 * I.kl(p, q, tau=1e5)
    near(found / limit, 1.0, 1e-3)  # next term: |z|/tau < 1e-3


@each("dtype", [torch.bfloat16, torch.float16])
def test_kl_is_not_symmetric_and_half_precision_is_computed_in_float32(dtype):
    p = torch.zeros(1, 2).to(dtype)
    q = torch.tensor([[0.0, 9.0]]).to(dtype)
    log_sum = math.log1p(math.exp(9))
    near(I.kl(p, q), log_sum - 4.5 - math.log(2), 1e-6)
    mean_of_q = 9 / (1 + math.exp(-9))
    near(I.kl(q, p), math.log(2) + mean_of_q - log_sum, 1e-6)
    assert I.kl(p, q).dtype == torch.float32


# ==== 5. Mutual information =======================================================================

BOUNDS = {name: bound for name, bound in I.BOUNDS.items() if name != "unpaired"}
BOUNDS["js"] = I.js_divergence


@given(score_matrices, st.floats(-3, 3))
def test_dv_is_the_best_shift_of_nwj(scores, away):
    dv = I.donsker_varadhan(scores)
    best = 1 - I.off_diagonal(scores).exp().mean().log()
    near(I.nwj(scores + best), dv)
    for shift in (0.0, best + away):
        assert I.nwj(scores + shift) <= dv + 1e-9, shift


@given(score_matrices)
def test_infonce_is_at_most_log_batch(scores):
    assert I.infonce(scores) <= math.log(len(scores)) + 1e-12, I.infonce(scores)


def test_dv_can_exceed_log_batch_and_infonce_cannot():  # 1.386 if dv took the diagonal in
    scores = 10 * torch.eye(4)
    near(I.donsker_varadhan(scores), 10.0, 1e-6)
    others = 3 * math.exp(-10)
    near(I.infonce(scores), math.log(4 / (1 + others)), 1e-6)


@given(score_matrices)
def test_jsd_has_the_value_of_nwj_and_the_gradient_of_js(scores):
    f = scores.clone().requires_grad_()
    assert I.js_divergence(f) <= math.log(2) + 1e-12, I.js_divergence(f)
    near(I.jsd(f), I.nwj(scores + 1))
    (ours,) = torch.autograd.grad(I.jsd(f), f)
    (truth,) = torch.autograd.grad(I.js_divergence(f), f)
    near(ours, truth)


@given(score_matrices)
def test_js_divergence_by_hand(scores):
    same = torch.eye(len(scores), dtype=bool)
    joint = scores[same].sigmoid()
    product = (-scores[~same]).sigmoid()
    truth = math.log(2) + (joint.log().mean() + product.log().mean()) / 2
    near(I.js_divergence(scores), truth)


@given(ints(2, 12), seeds)
def test_unpaired_control_takes_each_teacher_image_for_its_neighbours(b, seed):
    unpaired = I.BOUNDS["unpaired"]
    scores = rand(b, b, seed=seed)
    neighbours = torch.arange(-1, b - 1)
    near(unpaired(scores), I.infonce(scores[:, neighbours]))
    knows_all = 20 * torch.eye(b)
    assert unpaired(knows_all) < -15 + math.log(b)  # and gets nothing


@each("bound", BOUNDS.values(), ids=BOUNDS)
@given(scores=score_matrices, seed=seeds)
def test_bounds_ignore_the_order_of_the_batch_and_keep_their_input(bound, scores, seed):
    mixed = torch.randperm(len(scores), generator=rng(seed))
    before = scores.clone()
    near(bound(scores[mixed][:, mixed]), bound(scores))
    assert torch.equal(scores, before), "scores were written to"


@given(score_matrices)
def test_off_diagonal_leaves_one_of_each_row_out(scores):
    rows = []
    for i, row in enumerate(scores.tolist()):
        rows.append(row[:i] + row[i + 1 :])
    assert I.off_diagonal(scores).tolist() == rows


@given(score_matrices, st.floats(-5, 5), seeds)
def test_what_a_shift_does_to_each_bound(scores, c, seed):
    near(I.donsker_varadhan(scores + c), I.donsker_varadhan(scores))
    of_each_row = c * rand(len(scores), 1, seed=seed)
    near(I.infonce(scores + of_each_row), I.infonce(scores))
    expected = I.off_diagonal(scores - 1).exp().mean()
    loss = (math.exp(c) - 1) * expected
    near(I.nwj(scores + c), I.nwj(scores) + c - loss, 1e-9 * (1 + expected.item()))


@each("bound", [I.donsker_varadhan, I.nwj, I.jsd, I.js_divergence, I.off_diagonal])
@each("shape", [(1, 1), (3, 4), (4, 3)])
def test_scores_that_are_not_pairs_are_refused(bound, shape):
    scores = torch.zeros(shape)
    with pytest.raises(I.InfoardError, match="scores must be"):
        bound(scores)


SHAPES = {
    "kl": [(3, 4), (3, 4)],
    "relation_loss": [(3, 4), (3, 5)],
    "infonce": [(3, 3)],
    "nwj": [(3, 3)],
    "donsker_varadhan": [(3, 3)],
    "js_divergence": [(3, 3)],
    "variational_bound": [(3, 3)],
    "attention_scores": [(3, 2, 4, 4), (3, 3, 2, 2)],
}


@each("name, shapes", SHAPES.items(), ids=SHAPES)
def test_gradients_are_those_of_the_values(name, shapes):  # jsd's is js_divergence's, see above
    inputs = []
    for i, shape in enumerate(shapes):
        value = rand(*shape, seed=i, lo=-2, hi=2)
        inputs.append(value.requires_grad_())
    assert torch.autograd.gradcheck(getattr(I, name), inputs)


def gaussians(d, rho, batch, repeats=8):
    """x, y of unit variance and correlation rho, and the best critic, log p(y|x)/p(y)."""
    var = 1 - rho**2
    for seed in range(repeats):  # fixed, not drawn: these tests have a few sds of room
        x, z = torch.randn(2, batch, d, generator=rng(seed), dtype=F64)
        y = rho * x + math.sqrt(var) * z
        squares = x.square().sum(1)[:, None] + y.square().sum(1)
        exponent = rho * x @ y.T - rho**2 / 2 * squares
        yield x, y, exponent / var - d / 2 * math.log(var)


def four(f):
    """The four bounds that the log ratio f makes tight, but for sampling."""
    found = [I.infonce(f), I.donsker_varadhan(f), I.nwj(1 + f), I.jsd(f)]
    return torch.stack(found)


@each("rho, tol", [(0.5, 0.15), (0.8, 0.15), (0.0, 1e-9)])  # mean of 8 batches of 512: sd 0.025
def test_best_critic_recovers_the_gaussian_information(rho, tol):
    found = [four(f) for _, _, f in gaussians(4, rho, 512)]
    information = -2 * math.log(1 - rho**2)
    near(mean(found), information, tol)


def test_infonce_saturates_where_dv_does_not():  # I = 6.7, log B = 4.9; sd of the means: 0.2
    found = [four(f) for _, _, f in gaussians(20, 0.7, 128)]
    nce, dv, _, _ = mean(found)
    assert nce < math.log(128) < dv - 0.5, (nce, dv)


def log_normal(mean, var, y):
    """The log density of N(mean, var) at y."""
    gap = (mean - y) ** 2 / var
    return -0.5 * (gap + math.log(2 * math.pi * var))


@given(seeds, st.floats(-2, 2))
def test_gaussian_critic_is_a_density_of_the_normalised_target(seed, log_var):
    critic = I.GaussianCritic(3, 4).double()
    critic.log_var.data.fill_(log_var)
    s = rand(5, 3, seed=seed)
    t = rand(5, 4, seed=seed + 1)
    centred = t - t.mean(1, keepdim=True)
    var = centred.square().mean(1, keepdim=True)
    target = centred / (var + 1e-5).sqrt()
    density = log_normal(critic.mean(s)[:, None], math.exp(log_var), target)
    near(critic(s, t), density.mean(2))


def test_gaussian_critic_is_never_too_sure():
    critic = I.GaussianCritic(3, 4).double()
    s = rand(5, 3)
    t = rand(5, 4)
    critic.log_var.data.fill_(-6.0)
    least = critic(s, t)
    critic.log_var.data.fill_(-60.0)
    assert torch.equal(critic(s, t), least)


def gaussian_bound(slope, var):
    """The mean of the variational bound with q(y|x) = N(slope x, var), where rho = 0.8, d = 4."""
    entropy = 2 + 2 * math.log(2 * math.pi)
    found = []
    for x, y, _ in gaussians(4, 0.8, 512):
        scores = log_normal(slope * x[:, None], var, y).sum(2)
        found.append(I.variational_bound(scores, entropy))
    return mean(found)


def test_variational_bound_is_tight_at_the_true_gaussian_alone():
    best = gaussian_bound(0.8, 0.36)
    near(best, -2 * math.log(0.36), 0.1)  # sd sqrt(2/4096) = 0.022
    for slope, var in ((0.4, 0.36), (0.8, 1.0), (0.8, 0.15), (-0.8, 0.36)):
        assert gaussian_bound(slope, var) < best - 0.1, (slope, var)


@each("rho, low, high", [(0.9, 0.5, 3.3), (0.0, -1.0, 0.05)])  # truth: 3.3 and 0; log B = 4.2
def test_learned_critic_finds_information_where_there_is_some(rho, low, high):
    torch.manual_seed(0)
    critic = I.Critic(4, 4, dim=16).double()
    optimizer = torch.optim.Adam(critic.parameters(), 0.01)
    *seen, held_out = gaussians(4, rho, 64, 301)
    for x, y, _ in seen:
        optimizer.zero_grad()
        (-I.infonce(critic(x, y))).backward()
        optimizer.step()
    x, y, _ = held_out
    scores = critic(x, y)
    assert low < I.infonce(scores) < high, I.infonce(scores)
    assert scores.abs().max() <= 1 / 0.2


# ==== 6. InfoARD ==================================================================================


@given(seeds, st.floats(0.1, 10))
def test_attention_ignores_order_sign_and_scale_of_channels(seed, scale):
    f = rand(4, 3, 6, 6, seed=seed, lo=-1)
    signs = torch.tensor([1, -1, 1]).view(3, 1, 1)
    other = scale * f[:, [2, 0, 1]] * signs
    near(I.attention_map(other), I.attention_map(f))
    near(I.attention_map(f).norm(dim=1), torch.ones(4))


@given(seeds, st.floats(0.1, 2))
def test_attention_scores_are_correlations_at_the_smaller_size(seed, tau):
    f = rand(4, 3, 6, 6, seed=seed, lo=-1)
    energy = f.square().sum(1, keepdim=True)
    near(tau * I.attention_scores(f, f, tau), energy.flatten(1).corrcoef())
    g = rand(4, 7, 3, 3, seed=seed + 1, lo=-1)
    small = F.adaptive_avg_pool2d(energy, 3).sqrt()
    near(I.attention_scores(f, g, tau), I.attention_scores(small, g, tau))


def test_attention_of_large_half_precision_features_is_finite():
    f = 300 * rand(2, 3, 4, 4, lo=0.5)  # squares of 90,000 are no numbers of float16
    near(I.attention_map(f.half()), I.attention_map(f), 1e-3)  # its rounding


def centred_cosines(f):
    """Cosines [B,B] of centred features, no sample with itself."""
    f = F.normalize(f - f.mean(0), dim=1)
    alone = 1e4 * torch.eye(len(f))
    return f @ f.T - alone


@given(seeds, ints(3, 8))
def test_relation_is_a_divergence_of_similarities(seed, b):
    s, t = rand(2, b, 5, seed=seed, lo=-1)
    found = I.relation_loss(s, t)
    near(found, I.kl(5 * centred_cosines(t), 5 * centred_cosines(s)))
    assert (found >= -1e-12).all(), found
    near(I.relation_loss(s, s), torch.zeros(b))


@given(seeds, ints(3, 8), st.floats(0.1, 10))
def test_relation_is_blind_to_shift_scale_and_rotation(seed, b, scale):
    s, t = rand(2, b, 5, seed=seed, lo=-1)
    rotation = torch.linalg.qr(rand(5, 5, seed=seed + 1, lo=-1)).Q
    shift = rand(5, seed=seed)
    moved = scale * s @ rotation + shift
    near(I.relation_loss(moved, t), I.relation_loss(s, t))


TINY_TAPS = {"normalize": 3, "relu": 16, "layer1": 32, "layer3": 128, "penultimate": 128}
RESNET_TAPS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512, "penultimate": 512}


@each("arch, least", [("tiny", TINY_TAPS), ("resnet18", RESNET_TAPS)])
def test_taps_find_the_stages_and_change_nothing(arch, least):
    net = I.build_model(arch).eval()
    x = rand(2, 3, 32, 32).float()
    plain = net(x)
    before = snapshot(net)
    taps = I.Taps(net, x)
    assert torch.equal(net(x), plain)
    assert taps.widths.items() >= least.items(), taps.widths
    maps = taps.take()
    assert maps.keys() == taps.widths.keys()
    for name, f in maps.items():
        assert f.shape[1] == taps.widths[name]
    assert taps.take() == {}
    near(net.linear(maps["penultimate"]), plain, 1e-6)
    taps.close()
    assert not any(m._forward_hooks for m in net.modules())
    assert snapshot(net) == before


@each("mim", [*I.BOUNDS, "off"])
@each("b", [1, 3, 6])
def test_infoard_teaches_student_and_critics_only(mim, b):
    student, teacher, x, _ = pair(b)
    info = make_info(student, teacher, mim=mim, w_rel=0.1)
    student(x)
    teacher(x)  # with a graph: the detach has to be InfoARD's own
    loss = info.loss()
    if b == 1:
        assert loss == 0
        return
    loss.backward()
    assert loss.isfinite()
    for p in [*student[:-1].parameters(), *info.parameters()]:
        assert p.grad.isfinite().all()
    assert next(student.parameters()).grad.any()
    for critic in info.critics:
        assert next(critic.parameters()).grad.any()
    assert all(p.grad is None for p in teacher.parameters())
    for name, _ in info.named_parameters():
        assert name.startswith("critics.")


def test_infoard_is_the_weighted_sum_of_its_terms():
    student, teacher, x, _ = pair()
    info = make_info(student, teacher, w_feat=0.3, w_att=0.2, w_rel=0.7)
    student(x)
    teacher(x)
    s = info.student_taps.take()
    t = info.teacher_taps.take()
    names = ["penultimate", "layer3", "layer1", "relu"]
    feat = []
    for critic, name in zip(info.critics, names, strict=True):
        feat.append(I.infonce(critic(s[name], t[name])))
    att = []
    for name in names[1:]:
        att.append(I.infonce(I.attention_scores(s[name], t[name])))
    rel = I.relation_loss(s["penultimate"], t["penultimate"])
    truth = {"feat": mean(feat), "att": mean(att), "rel": rel.mean()}
    total = -0.3 * truth["feat"] - 0.2 * truth["att"] + 0.7 * truth["rel"]
    near(info.loss(s, t), total, 1e-6)
    assert info.terms.keys() == truth.keys()
    for name, term in truth.items():
        near(info.terms[name], term, 1e-6)


def test_infoard_of_nets_without_maps_uses_their_vectors():
    student = nn.Sequential(nn.Flatten(), nn.Linear(768, 9), nn.Linear(9, 4))
    teacher = copy.deepcopy(student)
    x = pair()[2]
    info = make_info(student, teacher)
    student(x)
    teacher(x)
    assert info.loss().isfinite()


def test_infoard_of_nets_with_nothing_to_compare_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.ReLU())
    net.register_parameter("weight", nn.Parameter(torch.ones(1)))
    with pytest.raises(I.InfoardError, match="--mim off"):
        make_info(net, net)
    make_info(net, net, mim="off")  # strengths can be had


def test_strength_needs_a_signal_that_is_known():
    student, teacher, x, y = pair()
    info = make_info(student, teacher, asa="teachr")
    with pytest.raises(I.InfoardError, match="unknown ASA signal 'teachr'"):
        info.strength(teacher(x), y)


def test_strength_can_be_left_as_it_is_or_raised_for_all():
    student, teacher, _, y = pair()
    threat = I.Threat(eps=0.1)
    off = make_info(student, teacher, asa="off")
    assert off.strength(None, y, threat) is threat
    uniform = make_info(student, teacher, asa="uniform", lam=(1.0, 2.0))
    even = uniform.strength(None, y, threat)
    near(even.eps, torch.full((6,), 0.15), 1e-7)


README = (ROOT / "README.md").read_text()
PATCH = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()


def trained_by_the_loop(without, **options):
    """The README's loop without the lines that begin so: names in it, losses [15], radii."""
    student, teacher, x, y = pair()
    losses = []
    radii = []

    def kl(t, s):
        losses.append(I.kl(t, s))
        return losses[-1]

    def attack(student, x, y, eps):
        radii.append(torch.as_tensor(eps))
        return linf_attack(student, x, y, eps)

    names = {
        "student": student,
        "teacher": teacher,
        "loader": [(x, y)] * 15,
        "SGD": torch.optim.SGD,
        "InfoARD": partial(make_info, **options),
        "kl": kl,
        "attack": attack,
    }
    loop = [line[1:] for line in PATCH if not line.startswith(without)]
    exec("\n".join(loop), names)
    means = torch.stack(losses).mean(1)
    return names, means.detach(), radii


@each("options", [{}, {"asa": "off", "w_feat": 0.0, "w_att": 0.0}], ids=["usual", "off"])
def test_patch_of_the_readme_works_in_a_foreign_loop(options):
    added = [line for line in PATCH if line.startswith("+")]
    assert len(added) <= 5
    names, losses, radii = trained_by_the_loop("-", **options)
    _, bare_losses, _ = trained_by_the_loop("+")
    assert losses[-1] < losses[0] / 2
    assert bare_losses[-1] < bare_losses[0] / 2
    if options:  # switched off, it is the plain loop
        assert torch.equal(losses, bare_losses)
        assert radii[0].numel() == 1
    else:
        assert not torch.equal(losses, bare_losses)
        assert radii[0].shape == (6,)
        assert all(p.grad.any() for p in names["info"].parameters())


# ==== 7. Frameworks ===============================================================================
# In torch's own words: FORMULAS, passes and y -> the cross-entropy and the divergence of a loss at
# half time; inner, the objective of its attack. companions/test_frameworks.py adds its own.


def batch_kl(p, q, tau=1.0, weight=1.0):
    """torch's own divergence, target first; weight [B] or a number."""
    target = (p / tau).softmax(1)
    log_q = (q / tau).log_softmax(1)
    each_sample = F.kl_div(log_q, target, reduction="none").sum(1)
    return tau**2 * (weight * each_sample).mean()


def passes(student, teacher, x, x_adv, natural=None):
    """All logits that a loss can name; slopes: from x - d to x + d; n: the natural teacher's."""
    x_minus = 2 * x - x_adv
    with torch.no_grad():
        t = teacher(x)
        t_adv = teacher(x_adv)
        t_slope = t_adv - teacher(x_minus)
        n = None if natural is None else natural(x)
    s = student(x)
    s_adv = student(x_adv)
    s_slope = s_adv - student(x_minus)
    return SimpleNamespace(t=t, t_adv=t_adv, n=n, s=s, s_adv=s_adv, slopes=(t_slope, s_slope))


def natural_formula(p, y):
    return F.cross_entropy(p.s, y), 0


def at_formula(p, y):
    return F.cross_entropy(p.s_adv, y), 0


def trades_formula(p, y):
    return F.cross_entropy(p.s, y), 6 * batch_kl(p.s, p.s_adv)


def ard_formula(p, y):
    return 0.3 * F.cross_entropy(p.s, y), 0.7 * batch_kl(p.t, p.s_adv, 30)


def rslad_formula(p, y):
    adv = batch_kl(p.t, p.s_adv)
    clean = batch_kl(p.t, p.s)
    return 0, (5 * adv + clean) / 6


def adaad_formula(p, y):
    adv = batch_kl(p.t_adv, p.s_adv)
    clean = batch_kl(p.t, p.s)
    return 0, 0.7 * adv + 0.3 * clean


FORMULAS = {
    "natural": natural_formula,
    "at": at_formula,
    "trades": trades_formula,
    "ard": ard_formula,
    "rslad": rslad_formula,
    "adaad": adaad_formula,
}
OPTIONS = {"ard": {"alpha": 0.7}, "adaad": {"alpha": 0.7}}  # those that the formulas hold for
ROBUST = [name for name in FORMULAS if name != "natural"]
each_framework = each("framework", ROBUST)


def ce_by_hand(student, y):
    """CE(S(x'), y) of the rows that have steps to go."""
    return lambda z, rows=I.ALL: F.cross_entropy(student(z), y[rows], reduction="none")


def toward(student, logits):
    """KL(logits(x', rows) || S(x'))."""

    def objective(z, rows=I.ALL):
        target = logits(z, rows).softmax(1)
        return F.kl_div(student(z).log_softmax(1), target, reduction="none").sum(1)

    return objective


def inner(framework, student, teacher, x, y):
    """The inner objective of a framework: z, rows -> [B]; student and teacher in eval mode."""
    if framework in ("at", "ard"):
        return ce_by_hand(student, y)
    if framework == "adaad":
        return toward(student, lambda z, rows: teacher(z))
    fixed = student(x).detach() if framework == "trades" else teacher(x).detach()
    return toward(student, lambda z, rows: fixed[rows])


def usual_start(framework):
    """Where its attack begins."""
    return "uniform" if framework in ("at", "ard") else "normal"


def check_formula(framework, formula, inner, init, b, reduction, **options):
    """Loss and gradients are the formula's, no teacher is taught, x' maximises the objective."""
    student, teacher, x, y = pair(b, F64)
    natural = I.tiny(4, 16, width=2).to(F64).eval()
    before = copy.deepcopy(student).eval()
    options.update(kl_reduction=reduction, teacher_nat=natural)
    options.update(eps=0.3, step_size=0.2)  # so large that KL(p||q) is not KL(q||p)
    step = make_step(framework, student, teacher, x, y, **options)
    loss = step.loss()
    loss.backward()
    grads = [p.grad.clone() for p in student.parameters()]

    logits = passes(student, teacher, x, step.x_adv, natural)
    cross_entropy, divergence = formula(logits, y)
    if reduction == "mean":
        divergence = divergence / 4  # classes
    truth = cross_entropy + divergence
    near(loss, truth)
    learners = list(student.parameters())
    truth.backward(inputs=learners)  # adds to the loss's: twice as much if right
    for p, ours in zip(learners, grads, strict=True):
        near(p.grad, 2 * ours)
    for net in (teacher, natural):
        assert all(p.grad is None for p in net.parameters())

    if inner is None:
        assert step.x_adv is x
        return
    objective = inner(framework, before, teacher, x, y)
    best = I.pgd(objective, x, eps=0.3, alpha=0.2, steps=2, init=init, generator=rng(5))
    near(step.x_adv, best, 0.0)


@each("framework", FORMULAS)
@each("reduction, b", [("batchmean", 1), ("batchmean", 5), ("mean", 5)])
def test_framework_is_its_formula_and_teaches_the_student_only(framework, reduction, b):
    objective = None if framework == "natural" else inner
    init = usual_start(framework)
    options = OPTIONS.get(framework, {})
    check_formula(framework, FORMULAS[framework], objective, init, b, reduction, **options)


def check_strength(framework, inner, init, **options):
    """Radii and steps of each instance reach the objective, teachers in the attack included."""
    student, teacher, x, y = pair(dtype=F64)
    info = make_info(student, teacher).double()
    before = copy.deepcopy(student).eval()
    options.update(steps_lo=1, steps=3, teacher_nat=teacher)
    step = make_step(framework, student, teacher, x, y, info, **options)
    step.loss()
    assert step.threat.eps.unique().numel() == 6
    assert len(step.threat.counts) == 3
    objective = inner(framework, before, teacher, x, y)
    threat = vars(step.threat)
    near(step.x_adv, I.pgd(objective, x, init=init, generator=rng(5), **threat), 0.0)


@each_framework
def test_strength_reaches_every_inner_objective(framework):
    check_strength(framework, inner, usual_start(framework))


def random_logits(b, seed):
    """s, s_adv, t, t_adv [B,K] and labels [B]."""
    logits = rand(4, b, K, seed=seed, lo=-9, hi=9)
    return *logits, labels(b, seed=seed)


@given(seeds, ints(1, 5), st.floats(0, 1), st.floats(0, 9))
def test_losses_of_logits_are_their_formulas(seed, b, alpha, beta):
    s, s_adv, t, t_adv, y = random_logits(b, seed)
    ce = F.cross_entropy(s, y)
    near(I.trades_loss(s, s_adv, y, beta), ce + beta * batch_kl(s, s_adv))
    rest = 1 - alpha
    soft = alpha * batch_kl(t, s_adv, 7.0)
    near(I.ard_loss(s, s_adv, t, y, alpha, 7.0), soft + rest * ce)
    clean = rest * batch_kl(t, s)
    adv = alpha * batch_kl(t, s_adv)
    near(I.rslad_loss(s, s_adv, t, alpha), adv + clean)
    adv = alpha * batch_kl(t_adv, s_adv)
    near(I.adaad_loss(s, s_adv, t, t_adv, alpha), adv + clean)


@given(seeds, ints(1, 5))
def test_losses_of_logits_have_the_papers_weights(seed, b):
    s, s_adv, t, t_adv, y = random_logits(b, seed)
    ce = F.cross_entropy(s, y)
    near(I.trades_loss(s, s_adv, y), ce + 6 * batch_kl(s, s_adv))
    weighted = 5 * batch_kl(t, s_adv) + batch_kl(t, s)
    near(I.rslad_loss(s, s_adv, t), weighted / 6)
    # what counts for nothing need not be there
    near(I.ard_loss(None, s_adv, t, y), batch_kl(t, s_adv, 30.0))
    near(I.adaad_loss(None, s_adv, None, t_adv), batch_kl(t_adv, s_adv))


@given(seeds, ints(1, 5), st.floats(0.5, 30))
def test_a_divergence_is_weighted_and_averaged_over_the_batch(seed, b, tau):
    p, q, *_ = random_logits(b, seed)
    weight = rand(b, seed=seed)
    truth = batch_kl(p, q, tau, weight)
    near(I.mean_kl(p, q, tau, weight), truth)
    near(I.mean_kl_per_class(p, q, tau, weight), truth / K)


@given(seeds, ints(1, 5))
def test_losses_of_logits_can_divide_by_the_classes(seed, b):
    s, s_adv, t, t_adv, y = random_logits(b, seed)
    per_class = I.mean_kl_per_class
    ce = F.cross_entropy(s, y)
    near(I.trades_loss(s, s_adv, y, 6.0, per_class), ce + 6 / K * batch_kl(s, s_adv))
    near(I.ard_loss(s, s_adv, t, y, mean_kl=per_class), batch_kl(t, s_adv, 30.0) / K)
    near(I.rslad_loss(s, s_adv, t, 0.0, per_class), batch_kl(t, s) / K)
    near(I.adaad_loss(s, s_adv, t, t_adv, 0.0, per_class), batch_kl(t, s) / K)


def test_trades_teaches_the_clean_pass_by_its_divergence_too():
    s, s_adv, _, _, y = random_logits(4, seed=0)
    s = s.clone().requires_grad_()
    (ours,) = torch.autograd.grad(I.trades_loss(s, s_adv, y), s)
    (of_ce,) = torch.autograd.grad(F.cross_entropy(s, y), s)
    (of_kl,) = torch.autograd.grad(6 * batch_kl(s, s_adv), s)
    near(ours, of_ce + of_kl)
    assert of_kl.abs().max() > 0.01


@given(problems(F64), seeds)
def test_an_attack_can_climb_through_the_teacher(problem, seed):
    student, x, _, _ = problem
    teacher = tiny_net(seed + 1).double()
    z = x.clone().requires_grad_()
    s = student(z)
    t = teacher(z)
    value = I.teacher_student_objective(student, teacher)(z)
    near(value, I.kl(t, s))
    (whole,) = torch.autograd.grad(value.sum(), z)
    (by_student,) = torch.autograd.grad(I.kl(t.detach(), s).sum(), z)
    (by_teacher,) = torch.autograd.grad(I.kl(t, s.detach()).sum(), z)
    near(whole, by_student + by_teacher)


def loss_of(framework, teacher=None, **options):
    """The loss of a pair that is the same each time; another teacher may be given."""
    student, usual, x, y = pair(dtype=F64)
    if teacher is None:
        teacher = usual
    step = make_step(framework, student, teacher, x, y, **options)
    return step.loss()


def test_losses_reduce_to_known_cases():
    student, teacher, x, y = pair(dtype=F64)
    s = student(x)
    clean = F.cross_entropy(s, y)
    near(loss_of("trades", beta=0.0), clean, 0.0)
    near(loss_of("ard", alpha=0.0), clean, 0.0)
    t = teacher(x).detach()
    near(loss_of("adaad", alpha=0.0), batch_kl(t, s))


@each("framework, options", [("rslad", {"eps": 0.0}), ("adaad", {})])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(framework, options):
    student, _, x, y = pair(dtype=F64)
    student.eval()
    twin = copy.deepcopy(student)
    step = make_step(framework, student, twin, x, y, **options)
    near(step.loss(), 0.0)


def check_teacher_in_train_mode(framework, **options):
    """It is asked in eval mode, and left alone."""
    _, teacher, *_ = pair(dtype=F64)
    truth = loss_of(framework, teacher, **options)
    before = snapshot(teacher.train())
    near(loss_of(framework, teacher, **options), truth, 0.0)
    assert snapshot(teacher) == before and teacher.training


@each("framework", ["ard", "rslad", "adaad"])
def test_a_teacher_in_train_mode_is_asked_in_eval_mode_and_left_alone(framework):
    check_teacher_in_train_mode(framework)


def test_ard_at_a_high_temperature_matches_logits():  # tau^2 KL -> mean (dz - mean dz)^2 / 2
    student, teacher, x, y = pair(dtype=F64)
    step = make_step("ard", student, teacher, x, y, temperature=1000.0)
    loss = step.loss()
    near(loss, step.mean_kl(step.t, step.s_adv, 1e3))
    gap = step.s_adv - step.t
    limit = 0.5 * gap.var(1, correction=0).mean()
    near(loss, limit, 1e-2)  # O(z/tau)


PASSES = {  # passes of the student in train mode, in the order in which batch norm sees them
    "natural": ["x"],
    "at": ["x_adv"],
    "trades": ["x", "x_adv"],
    "ard": ["x_adv", "x"],
    "rslad": ["x_adv", "x"],
    "adaad": ["x_adv", "x"],
}


@each("framework", PASSES)
def test_batch_norm_sees_each_pass_once_and_in_a_known_order(framework):
    student, teacher, x, y = pair(dtype=F64)
    twin = copy.deepcopy(student)
    step = make_step(framework, student, teacher, x, y, **OPTIONS.get(framework, {}))
    step.loss()
    for name in PASSES[framework]:
        twin(getattr(step, name))
    for ours, truth in zip(student.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, truth)


def forward_passes(net):
    """A list that grows with each pass of a net, by whether it is in train mode."""
    seen = []
    net.register_forward_hook(lambda *_: seen.append(net.training))
    return seen


ASKED = {"natural": 0, "at": 0, "trades": 0, "ard": 1, "rslad": 1, "adaad": 5}


@each("lifted", [False, True])
@each("framework", ASKED)
def test_the_teacher_is_asked_no_more_than_needed(framework, lifted):
    """Once on clean x, for labels, strengths and features; in AdaAD's attack at each step too."""
    student, teacher, x, y = pair()
    info = make_info(student, teacher) if lifted else None
    of_student, of_teacher = forward_passes(student), forward_passes(teacher)
    make_step(framework, student, teacher, x, y, info, steps=4).loss()
    asked = ASKED[framework]
    if lifted and framework != "ard" and framework != "rslad":
        asked += 1  # features of x are InfoARD's
    assert len(of_teacher) == asked and not any(of_teacher)
    learning = of_student.count(True)
    if framework in ("ard", "adaad"):  # alpha = 1: no clean pass
        assert learning == 1
    else:
        assert learning == len(PASSES[framework]) + (lifted and framework == "natural")


def test_shuffled_strengths_come_from_the_generator_of_the_run():
    student, teacher, x, y = pair()
    info = make_info(student, teacher, asa="shuffled")
    before = torch.get_rng_state()
    radii = []
    for _ in range(2):
        step = make_step("rslad", student, teacher, x, y, info)
        step.loss()
        radii.append(step.threat.eps)
    assert torch.equal(radii[0], radii[1])
    assert radii[0].unique().numel() == len(x)
    assert torch.equal(torch.get_rng_state(), before)


NEEDS = {"natural": (), "at": (), "trades": ()}
NEEDS.update(ard=("teacher",), rslad=("teacher",), adaad=("teacher",))


def test_needs_do_not_depend_on_the_order_of_the_table(monkeypatch):
    monkeypatch.setattr(I, "FRAMEWORKS", dict(reversed(I.FRAMEWORKS.items())))
    assert {name: I.get_framework(name).needs for name in NEEDS} == NEEDS


@each("framework", FORMULAS)
def test_a_missing_teacher_is_named(framework):
    student, _, x, y = pair(dtype=F64)
    step = make_step(framework, student, None, x, y)
    if NEEDS[framework]:
        with pytest.raises(I.InfoardError, match=f"{framework} needs a teacher"):
            step.loss()
    else:
        assert step.loss().isfinite()


def check_switched_off(framework, **options):
    """InfoARD without weights and strengths is the base, bit for bit, and has no parameters."""
    student, teacher, x, y = pair(dtype=F64)
    options.update(teacher_nat=teacher)
    twin = copy.deepcopy(student)
    base = make_step(framework, twin, teacher, x, y, **options).loss()
    info = make_info(student, teacher, asa="off", w_feat=0.0, w_att=0.0)
    lifted = make_step(framework, student, teacher, x, y, info, **options).loss()
    assert torch.equal(lifted, base)
    student(x)
    teacher(x)
    assert info.loss() == 0
    assert not list(info.parameters())


@each_framework
def test_infoard_without_weights_is_the_base_bit_for_bit(framework):
    check_switched_off(framework)


def check_lifted(framework, formula, asa, **options):
    """The loss is the formula's plus InfoARD's terms; radii and steps follow the signal's ranks."""
    student, teacher, x, y = pair(dtype=F64)
    info = make_info(student, teacher, asa=asa).double()
    clean = copy.deepcopy(student).eval()(x)
    options.update(lam_hi=1.5, steps_lo=1, teacher_nat=teacher)
    step = make_step(framework, student, teacher, x, y, info, **options)
    loss = step.loss()
    logits = passes(student, teacher, x, step.x_adv, teacher)
    student(step.x_adv)
    teacher(x)
    near(loss, sum(formula(logits, y)) + info.loss())
    assert step.terms.keys() == {"feat"}

    if asa == "gap":
        signal = I.kl(logits.t, clean)
    elif asa == "teacher":
        signal = I.margin(logits.t.softmax(1), y)
    else:
        signal = I.margin(clean.softmax(1), y)
    rank = ranks(signal)
    near(step.threat.eps, R * (1 + 0.1 * rank))
    assert step.threat.steps.tolist() == [1 + (r >= 3) for r in rank.tolist()]
    assert (radius(step.x_adv, x) <= step.threat.eps + 1e-7).all()


@each_framework
@each("asa", ["teacher", "student", "gap"])
def test_infoard_adds_its_terms_and_a_radius_for_each_instance(framework, asa):
    options = OPTIONS.get(framework, {})
    check_lifted(framework, FORMULAS[framework], asa, **options)


def check_no_graph_is_kept(framework, **options):
    """What a step leaves in the taps would hold memory and break copy.deepcopy."""
    student, teacher, x, y = pair(dtype=F64)
    info = make_info(student, teacher).double()
    options.update(teacher_nat=teacher)
    step = make_step(framework, student, teacher, x, y, info, **options)
    step.loss().backward()
    for taps in (info.student_taps, info.teacher_taps):
        for name, f in taps.take().items():
            assert not f.requires_grad, name


@each_framework
def test_no_graph_outlives_its_step(framework):
    check_no_graph_is_kept(framework)


OWN = """
import infoard
from infoard import Framework, ce_objective


def mine(step):
    step.attack(ce_objective(step.student, step.y))
    weight = step.cfg.own.get("weight", 1.0)
    return weight * step.mean_kl(step.t, step.s_adv)


def settle(cfg):
    infoard.require(cfg.own["kind"] != "odd", "no odd kind")
    return cfg


OPTIONS = {"weight": (2.0, "weight of mine"), "rounds": (3, "how often"), "kind": ("even", "which")}
FRAMEWORK = Framework(
    mine, needs=("teacher",), defaults={"steps": 7, "alpha": 0.5}, options=OPTIONS, settle=settle
)
number = 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A current folder with a stranger's own.py, which imports infoard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (tmp_path / "own.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own", None)


def test_a_bare_function_is_a_framework(own):
    student, teacher, x, y = pair(dtype=F64)
    framework = I.get_framework("own:mine")
    assert framework == I.Framework(framework.loss) and framework.loss.__name__ == "mine"
    step = make_step("own:mine", student, teacher, x, y)
    loss = step.loss()
    near(loss, batch_kl(step.t, step.s_adv))
    before = copy.deepcopy(student).eval()
    attack = {"eps": R, "alpha": 2 / 255, "steps": 2, "generator": rng(5)}
    near(step.x_adv, I.pgd(ce_by_hand(before, y), x, **attack), 0.0)


def test_an_own_framework_has_needs_defaults_and_options(own):
    student, teacher, x, y = pair(dtype=F64)
    cfg = I.Config(framework="own:FRAMEWORK").resolved()
    assert (cfg.steps, cfg.alpha, cfg.lam_hi) == (7, 0.5, 1.5) and cfg.infoard
    assert cfg.own == {"weight": 2.0, "rounds": 3, "kind": "even"}
    assert I.Config(framework="own:FRAMEWORK", steps=2).resolved().steps == 2
    with pytest.raises(I.InfoardError, match="own:FRAMEWORK needs a teacher"):
        make_step("own:FRAMEWORK", student, None, x, y).loss()
    with pytest.raises(I.InfoardError, match="no odd kind"):
        I.Config(framework="own:FRAMEWORK", own={"kind": "odd"}).resolved()
    step = make_step("own:FRAMEWORK", student, teacher, x, y, own={"weight": 3.0})
    near(step.loss(), 3 * batch_kl(step.t, step.s_adv))


def test_options_of_an_own_framework_are_options_of_the_command_line(own):
    line = "--framework own:FRAMEWORK --weight 1/4 --rounds 5 --lr 0.2"
    given = cli.parse("train", line.split())
    assert given == {
        "framework": "own:FRAMEWORK",
        "lr": 0.2,
        "own": {"weight": 0.25, "rounds": 5},
    }
    assert I.Config(**given).resolved().own == {"weight": 0.25, "rounds": 5, "kind": "even"}
    with pytest.raises(I.InfoardError, match="--weight"):
        cli.parse("train", ["--framework", "own:mine", "--weight", "2"])


def random_data(n=60, size=16, classes=4):
    """Images of random bytes in the form of a data set."""
    images = torch.from_numpy(noise(n, size)).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(n) % classes
    names = [f"class {k}" for k in range(classes)]
    return I.Data(images, labels, images[:20], labels[:20], names)


def test_an_own_framework_trains_by_its_name(own, monkeypatch, capsys):
    monkeypatch.setitem(I.DATASETS, "shapes", lambda data_dir, **options: random_data())
    monkeypatch.setattr(I, "check_teacher", lambda *_: None)
    (own / "nets.py").write_text(
        "import infoard\n\n\ndef teacher():\n    return infoard.tiny(4, 16)\n"
    )
    line = "--framework own:FRAMEWORK --teacher nets:teacher --epochs 1 --steps 1 --attacks clean"
    line += " --weight 0.5 --eval-subset 10 --no-figures --device cpu --out run"
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    assert I.main(line.split()) == 0
    sys.modules.pop("nets", None)
    kept = json.loads((own / "run/config.json").read_text())["settings"]
    assert kept["framework"] == "own:FRAMEWORK" and kept["own"]["weight"] == 0.5
    assert "tiny by own:FRAMEWORK + InfoARD" in capsys.readouterr().out
    assert json.loads((own / "run/results.json").read_text())["last"]["n"] == 10


@each("name, why", [("own:absent", "absent"), ("absent:mine", "absent"), ("own:", "own:")])
def test_what_cannot_be_imported_is_one_line(own, name, why, capsys):
    assert I.main(["--framework", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("infoard: error: cannot import the framework") and why in error
    assert one_line(error)


def test_prepare_makes_the_net_to_train_and_nets_of_its_own(monkeypatch):
    seen = {}

    def prepare(student, nets, cfg, classes):
        seen.update(student=student, teacher=nets["teacher"], classes=classes)
        nets["more"] = {"helper": nn.Identity()}
        return nn.Sequential(nn.Identity(), student)

    def loss(step):
        seen["helper"] = step.more["helper"]
        return F.cross_entropy(step.s, step.y)

    mine = I.Framework(loss, infoard=False, prepare=prepare)
    monkeypatch.setitem(I.FRAMEWORKS, "mine", mine)
    cfg = I.Config(framework="mine", device="cpu", amp="off").resolved()
    run = I.Run(cfg, random_data(), torch.device("cpu"), {"teacher": None})
    assert run.student[1] is seen["student"] and run.evaluated is run.student
    assert seen["classes"] == 4 and seen["teacher"] is None and run.info is None
    I.train_step(run, run.train[:8], 0.0)
    assert isinstance(seen["helper"], nn.Identity)


def test_the_natural_control_is_not_lifted_and_its_best_is_the_cleanest():
    natural = I.get_framework("natural")
    assert natural.best_by == "val_clean" and not natural.infoard
    for name in ROBUST:
        assert I.get_framework(name).best_by == "val_pgd" and I.get_framework(name).infoard
    cfg = I.Config(framework="natural", infoard=True).resolved()
    assert not cfg.infoard and cfg.out == "runs/shapes-tiny-natural-s0"


# ==== 8. Settings and names =======================================================================


def test_settings_of_the_framework_unless_told_otherwise():
    assert I.Config(framework="ard").resolved().temperature == 30
    assert I.Config(framework="ard").resolved().alpha == 1
    assert I.Config(framework="ard", alpha=0.5).resolved().alpha == 0.5
    assert I.Config(framework="trades").resolved().beta == 6
    assert I.Config(framework="at").resolved().beta is None
    assert I.Config().resolved().alpha == 5 / 6  # rslad's
    assert I.Config(framework="adaad", lam_hi=1.2).resolved().lam_hi == 1.2


@each("dataset", ["shapes", "cifar10"])
def test_radii_of_twice_eps_are_for_adaad_alone(dataset):  # its label is T(x'): they are free
    for name in FORMULAS:
        cfg = I.Config(dataset=dataset, framework=name).resolved()
        assert cfg.lam_hi == (2.0 if name == "adaad" else 1.5)


@each(
    "dataset, student, teacher, epochs, steps",
    [("shapes", "tiny", "tiny_wide", 8, 5), ("cifar10", "resnet18", "wrn_34_10", 100, 10)],
)
def test_settings_follow_the_data(dataset, student, teacher, epochs, steps):
    cfg = I.Config(dataset=dataset).resolved()
    assert (cfg.student, cfg.teacher_arch) == (student, teacher)
    assert (cfg.epochs, cfg.steps, cfg.teacher_epochs) == (epochs, steps, epochs)
    assert cfg.teacher_framework == "trades" and cfg.eps == R and cfg.step_size == 2 / 255
    given = I.Config(dataset=dataset, teacher="t.pt", epochs=3, teacher_epochs=4).resolved()
    assert given.teacher_arch is None  # the file says what it holds
    assert (given.epochs, given.teacher_epochs) == (3, 4)


@each("framework", FORMULAS)
@given(seed=ints(0, 9), infoard=st.booleans(), dataset=st.sampled_from(["shapes", "cifar10"]))
def test_settled_settings_are_settled(framework, seed, infoard, dataset):
    cfg = I.Config(framework=framework, seed=seed, infoard=infoard, dataset=dataset).resolved()
    assert cfg.resolved() == cfg
    plain = "" if infoard or framework == "natural" else "-plain"
    assert cfg.out == f"runs/{dataset}-{cfg.student}-{framework}{plain}-s{seed}"
    assert dataclasses.replace(cfg, out="here").resolved().out == "here"


def test_lr_falls_to_a_tenth_after_each_named_epoch():
    cfg = I.Config(schedule="100,150", epochs=200, lr=0.1)
    rates = [cfg.lr_at(epoch / 200) for epoch in (0, 99.9, 100, 149.9, 150, 199.9)]
    near(torch.tensor(rates), torch.tensor([0.1, 0.1, 0.01, 0.01, 0.001, 0.001]), 1e-7)
    backwards = I.Config(schedule="150,100", epochs=200, lr=0.1)
    assert [backwards.lr_at(epoch / 200) for epoch in (100, 150)] == rates[2::2]


@given(st.floats(1e-3, 1), st.floats(0, 1))
def test_lr_rises_for_a_twentieth_and_falls_as_a_cosine(lr, share):
    cfg = I.Config(lr=lr, epochs=10)
    rate = cfg.lr_at(share)
    assert 0.01 * lr <= rate <= lr
    if share < 0.05:
        near(rate, max(0.01, 20 * share) * lr)
    else:
        angle = math.pi * (share - 0.05) / 0.95
        near(rate, max(0.01, math.cos(angle / 2) ** 2) * lr)
    near(cfg.lr_at(0.05), lr)
    near(cfg.lr_at(0.525), lr / 2)
    near(cfg.lr_at(1.0), lr / 100)


FIELDS = {f.name: f for f in dataclasses.fields(I.Config)}
CHOICES = [name for name, f in FIELDS.items() if f.metadata.get("choices")]
BOUNDED = [name for name, f in FIELDS.items() if f.metadata.get("low") is not None]


@each("name", CHOICES)
def test_one_choice_is_taken_and_a_list_or_anything_else_refused(name, capsys):
    choices = FIELDS[name].metadata["choices"]
    for choice in choices:
        assert getattr(I.Config(**{name: choice}), name) == choice
    flag = "--" + name.replace("_", "-")
    for wrong in (",".join(choices[:2]), choices[0] + ",", "nonsense", "", choices[0].upper()):
        with pytest.raises(I.InfoardError, match=f"unknown {flag} .*choose from .*{choices[-1]}"):
            I.Config(**{name: wrong})
        assert I.main([flag, wrong]) == 2
        error = capsys.readouterr().err
        assert flag in error and choices[-1] in error and one_line(error), error


@each("line", ["--amp bf16,off", "--kl-reduction mean,batchmean", "--asa teacher,off"])
def test_lists_of_choices_are_refused_before_any_work(line, monkeypatch, capsys):
    monkeypatch.setattr(I, "load_dataset", None)
    assert I.main(line.split()) == 2
    error = capsys.readouterr().err
    assert line.split()[0] in error and "choose from" in error and one_line(error)


@each("name", BOUNDED)
def test_values_outside_their_range_are_refused(name):
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    wrong = [low - 1, math.nan]
    if high < math.inf:
        wrong.append(high + 1)
    for value in wrong:
        flag = "--" + name.replace("_", "-")
        with pytest.raises(I.InfoardError, match=f"{flag} must lie in .*: .") as refused:
            I.Config(**{name: value})
        assert one_line(refused.value)
    assert getattr(I.Config(**{name: low}), name) == low


@each(
    "settings, why",
    [
        ({"schedule": "linear"}, "--schedule must be cosine or epochs"),
        ({"schedule": "100,"}, "--schedule must be cosine or epochs"),
        ({"steps": 3, "steps_lo": 4}, "--steps-lo must be at most --steps, 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, why):
    with pytest.raises(I.InfoardError, match=why):
        I.Config(**settings).resolved()


def resolve_attack():
    I.chosen_attacks("clean,pgdd")


def resolve_bound():
    make_info(*pair()[:2], mim="infonse")


def resolve_framework():
    I.Config(framework="rsald").resolved()


def resolve_dataset():
    I.load_dataset("cifar")


def resolve_model():
    I.build_model("resnet19")


@each(
    "ask, known",
    [
        (resolve_attack, ["pgd", "aa", *I.ATTACKS]),
        (resolve_bound, I.BOUNDS),
        (resolve_framework, I.FRAMEWORKS),
        (resolve_dataset, I.DATASETS),
        (resolve_model, I.MODELS),
    ],
)
def test_unknown_names_come_with_the_known_ones(ask, known):
    with pytest.raises(I.InfoardError, match="unknown .*choose from") as refused:
        ask()
    listed = str(refused.value).partition("choose from ")[2].rstrip(")").split(", ")
    assert set(listed) >= set(known) and one_line(refused.value)


def test_an_unknown_verb_comes_with_the_known_ones(capsys):
    assert I.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("infoard: error: unknown verb 'trian'") and one_line(error)
    assert all(verb in error for verb in cli.VERBS)


# ==== 9. Copies ===================================================================================
# Of the whole file, under its own name and another, and of single functions with all they need.


def python(folder, *argv):
    """Runs Python in a folder that knows nothing of this one."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env.update(CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


QUICK = "--subset 60 --epochs 1 --steps 1 --attacks clean --eval-subset 10 --device cpu --out run"


def test_strange_files_beside_a_copy_are_never_executed(tmp_path):
    shutil.copy(I.__file__, tmp_path)
    for name in ("extras.py", "defences.py", "figures.py", "frameworks.py", "namid.py", "mid.py"):
        (tmp_path / name).write_text(f"raise SystemExit('{name} was executed')\n")
    done = python(tmp_path, "infoard.py", "--framework", "natural", *QUICK.split())
    assert done.returncode == 0, done.stderr
    assert "in run: results.json" in done.stdout and "executed" not in done.stdout + done.stderr


def test_a_copy_alone_names_the_companion_that_it_misses(tmp_path):
    shutil.copy(I.__file__, tmp_path)
    lines = ["import infoard as I", "assert not I.has_companions()"]
    for argv in (
        ["--framework", "igdm"],
        ["eval", "x.pt", "--dataset", "svhn"],
        ["tables", "runs"],
    ):
        lines.append(f"assert I.main({argv}) == 2")
    done = python(tmp_path, "-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 3 and all(line.startswith("infoard: error: cannot") for line in errors)
    assert "companions.frameworks:IGDM" in errors[0] and "companions.tables" in errors[2]


STRANGER = """
import infoard


def loss(step):
    step.attack(infoard.ce_objective(step.student, step.y))
    return infoard.F.cross_entropy(step.s_adv, step.y)


mine = infoard.Framework(loss, infoard=False)
"""


def test_a_renamed_copy_runs_as_a_script(tmp_path):
    shutil.copy(I.__file__, tmp_path / "infoard_v2.py")
    (tmp_path / "stranger.py").write_text(STRANGER)
    done = python(tmp_path, "infoard_v2.py", "--help")
    assert done.returncode == 0 and "--framework" in done.stdout and not done.stderr
    done = python(tmp_path, "infoard_v2.py", "--framework", "stranger:mine", *QUICK.split())
    assert done.returncode == 0, done.stderr
    assert "run: tiny by stranger:mine, 54 training" in done.stdout  # a Framework, not lifted


def test_a_renamed_copy_can_be_imported(tmp_path):
    shutil.copy(I.__file__, tmp_path / "infoard_v2.py")
    (tmp_path / "stranger.py").write_text(STRANGER)
    lines = [
        "import infoard_v2 as I",
        "found = I.get_framework('stranger:mine')",
        "import stranger",
        "assert found is stranger.mine and stranger.infoard is I",
        "assert I.main(['--framework', 'rslda']) == 2",
    ]
    done = python(tmp_path, "-c", "\n".join(lines))
    assert done.returncode == 0 and "unknown framework 'rslda'" in done.stderr, done.stderr


SOURCE = Path(I.__file__).read_text()


@functools.cache
def definitions():
    """{name: source} of functions, classes and tables, in the file's order; imports under ''."""
    lines = SOURCE.splitlines()
    found = {"": "from __future__ import annotations\n"}
    for node in ast.parse(SOURCE).body:
        first = node.lineno
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
            first = min([first, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        text = "\n".join(lines[first - 1 : node.end_lineno]) + "\n"
        if isinstance(node, ast.Import | ast.ImportFrom):
            found[""] += text
        for name in names:
            found[name] = text
    return found


def globals_of(text):
    """The names that a definition takes from its module; annotations may name what is not there."""
    whole = symtable.symtable("from __future__ import annotations\n" + text, "cut", "exec")
    names = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_referenced()}
    tables = whole.get_children()
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names


def cut(name):
    """The source of a definition and of all that it needs, recursively, without the imports."""
    known = definitions()
    needed = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in known and name not in needed:
            needed.add(name)
            waiting.extend(globals_of(known[name]))
    return "\n\n".join(text for other, text in known.items() if other in needed)


def lines_of(source):
    return sum(line.strip() != "" for line in source.splitlines())


@pytest.fixture
def paste(monkeypatch):
    """paste(name): a fresh module that holds what was cut below plain imports."""

    def fresh(name):
        module = ModuleType("pasted")
        monkeypatch.setitem(sys.modules, "pasted", module)  # dataclasses look there
        exec(definitions()[""] + "\n\n" + cut(name), module.__dict__)
        return module

    return fresh


def use_infonce(code):
    return code.infonce(rand(5, 5))


def use_kl(code):
    return code.kl(rand(5, 4), rand(5, 4, seed=1), 2.0)


def use_margin(code):
    return code.margin(rand(5, 4), torch.arange(5) % 4)


def use_pgd(code):
    net, x, y = tiny_net(), rand(4, 3, 6, 6).float(), torch.arange(4) % K
    options = {"eps": R, "alpha": R / 4, "steps": torch.arange(4), "generator": rng(1)}

    def objective(z, rows):
        return F.cross_entropy(net(z), y[rows], reduction="none")

    return code.pgd(objective, x, **options)


def use_instance_strength(code):
    threat = SimpleNamespace(eps=R, alpha=R / 4, steps=7)
    found = code.instance_strength(rand(6), threat=threat, steps_lo=2)
    return torch.stack([found.eps, found.alpha, found.steps])


def use_infoard(code):
    student, teacher, x, y = pair()
    options = {"image_shape": (3, 16, 16), "w_att": 0.1, "w_rel": 0.1}
    info = code.InfoARD(student, teacher, **options)
    eps = info.strength(teacher(x), y).eps
    student(x)
    return torch.cat([eps, info.loss()[None]])


def logits():
    return rand(4, 5, K, lo=-3, hi=3).unbind()


def use_rslad_loss(code):
    s, s_adv, t, _ = logits()
    return code.rslad_loss(s, s_adv, t)


def use_adaad_loss(code):
    return code.adaad_loss(*logits(), alpha=0.7)


def use_kl_objective(code):
    return code.kl_objective(tiny_net(), rand(2, K).float())(rand(2, 3, 6, 6).float())


def use_teacher_student_objective(code):
    objective = code.teacher_student_objective(tiny_net(), tiny_net(1))
    return objective(rand(2, 3, 6, 6).float())


def bare_step(alpha):
    """What rslad and adaad ask of a step, as anyone's loop has it; the student in eval mode."""
    student, teacher, x, _ = pair()
    student.eval()
    step = SimpleNamespace(student=student, teacher=teacher, cfg=SimpleNamespace(alpha=alpha))
    step.t = teacher(x).detach()
    step.s = student(x)
    step.mean_kl = I.mean_kl

    def attack(objective, init):
        options = {"eps": R, "alpha": R / 4, "steps": 2, "generator": rng(1)}
        step.x_adv = I.pgd(objective, x, init=init, **options)
        step.s_adv = student(step.x_adv)
        step.t_adv = teacher(step.x_adv).detach()

    step.attack = attack
    return step


def use_rslad(code):
    return code.rslad(bare_step(5 / 6))


def use_adaad(code):
    return code.adaad(bare_step(0.7))


def use_step(code):
    student, teacher, x, y = pair()
    cfg = I.Config(steps=2).resolved()
    return code.Step(student, teacher, x, y, cfg=cfg, generators={"attack": rng(5)}).loss()


def use_evaluate(code):
    x, y = rand(20, 3, 6, 6).float(), torch.arange(20) % K
    found = code.evaluate(tiny_net(), x, y, attacks="clean,fgsm,pgd", batch_size=7)
    return str(found)


CUTS = {  # how to use it, the most lines that it may drag along, itself included
    "infonce": (use_infonce, 8),
    "kl": (use_kl, 13),
    "margin": (use_margin, 10),
    "pgd": (use_pgd, 96),
    "instance_strength": (use_instance_strength, 53),
    "InfoARD": (use_infoard, 415),
    "rslad_loss": (use_rslad_loss, 20),
    "adaad_loss": (use_adaad_loss, 20),
    "kl_objective": (use_kl_objective, 18),
    "teacher_student_objective": (use_teacher_student_objective, 18),
    "rslad": (use_rslad, 30),
    "adaad": (use_adaad, 33),
    "Step": (use_step, 360),
    "evaluate": (use_evaluate, 355),
}


@each("name, use, most", [(name, *how) for name, how in CUTS.items()], ids=CUTS)
def test_what_is_cut_out_with_all_it_needs_works_as_here(name, use, most, paste):
    """Annotations are not needed: they may name what was not cut."""
    code = paste(name)
    assert getattr(code, name) is not getattr(I, name)
    found, truth = use(code), use(I)
    if isinstance(truth, str):
        assert found == truth
    else:
        assert torch.equal(found, truth)
    assert lines_of(cut(name)) <= most, f"{name} drags {lines_of(cut(name))} lines"
