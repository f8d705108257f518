"""The property suite of infoard.py: what holds for all inputs, closed forms, parity, runs.

No data set, network or GPU. HYPOTHESIS_PROFILE: quick, ci (default, the same examples each time),
deep. Seeds and sizes are drawn, not large tensors. A tolerance of 1e-9 (float64), 1e-6 or 1e-7
(float32, of values about 1 or 0.1) is rounding; any other has its reason beside it.
"""
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import defences as D
import extras
import infoard as I

settings.register_profile("quick", max_examples=15, deadline=None)
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)  # the nets are tiny: threads would only wait for each other
F64, K, R = torch.float64, 3, 8 / 255  # K classes, R the usual radius
seeds, ints, each = st.integers(0, 2**32 - 1), st.integers, pytest.mark.parametrize

def rng(seed=0):
    return torch.Generator().manual_seed(seed)

def rand(*shape, seed=0, lo=0.0, hi=1.0):
    return lo + (hi - lo) * torch.rand(*shape, generator=rng(seed), dtype=F64)

def near(a, b, tol=1e-9):
    """a == b within tol, relative to b where b is above 1."""
    gap = ((torch.as_tensor(a) - b).abs() / torch.as_tensor(b).abs().clamp(min=1)).max().item()
    assert gap <= tol, f"off by {gap:.3g}, tolerance {tol:.3g}: {str(a)[:300]}, {str(b)[:300]}"

def tiny_net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, K))
        net[1].running_mean.uniform_(-0.5, 0.5)  # so that eval mode is not train mode
    return net.eval()

@st.composite
def problems(draw, dtype=torch.float32):
    """net, x with exact 0 and 1 and repeated pixels, y, eps: a float or [B]."""
    b, seed = draw(ints(1, 4)), draw(seeds)
    x = rand(b, 3, 6, 6, seed=seed, lo=-0.25, hi=1.25).clamp(0, 1).to(dtype)
    x[:, :, 0] = x[:, :, 1]
    n = draw(ints(0, 32) | st.lists(ints(0, 32), min_size=b, max_size=b))
    eps = n / 255 if isinstance(n, int) else torch.tensor(n, dtype=dtype) / 255
    return tiny_net(seed).to(dtype), x, torch.randint(K, (b,), generator=rng(seed)), eps

score_matrices = st.builds(lambda b, seed, scale: scale * rand(b, b, seed=seed, lo=-1),
                           ints(2, 12), seeds, st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
logit_pairs = st.builds(lambda b, k, seed: rand(2, b, k, seed=seed, lo=-30, hi=30).unbind(),
                        ints(1, 5), ints(2, 12), seeds)

# --- attacks --------------------------------------------------------------------------------------

def raw(init, net, x, y, threat):
    start = rand(*x.shape, lo=-1, hi=2).to(x.dtype) if init == "tensor" else init
    with I.frozen_eval(net):
        return I.pgd(I.ce_objective(net, y), x, threat=threat, init=start)

ATTACKS = dict(
    fgsm=lambda net, x, y, threat: I.fgsm(net, x, y, eps=threat.eps),
    pgd_ce=lambda net, x, y, threat: I.pgd_ce(net, x, y, threat=threat),
    pgd_kl=lambda net, x, y, threat: I.attacked(I.kl_objective, net, x, 3.0 * F.one_hot(y, K), threat=threat),
    cw_linf=lambda net, x, y, threat: I.cw_linf(net, x, y, threat=threat),
    **{f"raw_{init}": partial(raw, init) for init in ("uniform", "normal", "none", "tensor")})
each_attack = each("attack", ATTACKS.values(), ids=ATTACKS)

@each_attack
@given(problems(), ints(0, 3), st.booleans())
def test_attack_stays_in_each_ball_and_in_the_box(attack, problem, steps, graph):
    (net, x, y, eps), before = problem, problem[1].clone()
    with torch.set_grad_enabled(graph):  # an attack works inside no_grad too
        x_adv = attack(net, x, y, I.Threat(eps, 3 / 255, steps))
    over, eps = (x_adv - x).abs().flatten(1).amax(1) - eps, torch.as_tensor(eps)
    # x + eps rounds by half an ulp, 3e-8; a radius of 0 changes nothing at all
    assert (over <= 1e-7 * (eps > 0)).all(), f"over the radius by {over}"
    assert torch.equal(x, before), "the attack wrote into x"
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1, x_adv

def snapshot(net):
    return str([[m.training for m in net.modules()], [b.tolist() for b in net.buffers()],
                [(p.requires_grad, p.grad) for p in net.parameters()]])

@each_attack
@each("training", [True, False])
@each("broken", [False, True])
def test_attack_leaves_the_model_as_found(attack, training, broken):
    net, x = tiny_net().train(training), rand(2, 3, 6, 6).float()
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
    with pytest.raises(KeyError) if broken else contextlib.nullcontext():
        attack(net, x, torch.tensor([0, 1]), I.Threat(R, 2 / 255, 2))
    hook.remove()
    assert snapshot(net) == before

@given(ints(1, 4), seeds, ints(1, 32), ints(1, 12), ints(0, 8))
def test_linear_objective_gains_its_closed_form(b, seed, eps, alpha, steps):
    x, w = rand(b, 9, seed=seed, lo=0.2, hi=0.8), rand(b, 9, seed=seed + 1, lo=-1)
    assume(w.abs().min() > 1e-6)
    eps, alpha = rand(b, seed=seed) * eps / 255, alpha / 255
    step = I.pgd(lambda z: (w * z).sum(1), x, init="none", threat=I.Threat(eps, alpha, steps)) - x
    reach = eps.clamp(max=alpha * steps)  # all of the budget, where the steps suffice
    near((w * step).sum(1), reach * w.abs().sum(1))
    near(step.abs(), reach[:, None].expand(b, 9))

@each("kind", ["ce", "kl", "cw"])
@given(problem=problems(F64), seed=seeds)  # float64: no sign of a gradient flips by rounding
def test_each_sample_is_attacked_on_its_own(kind, problem, seed):
    net, x, y, eps = problem
    make, t = getattr(I, f"{kind}_objective"), 3 * F.one_hot(y, K).to(F64) if kind == "kl" else y

    def attack(rows):
        threat = I.Threat(eps if isinstance(eps, float) else eps[rows], 3 / 255, 3)
        return I.pgd(make(net, t[rows]), x[rows], threat=threat, init="none")
    hand = dict(ce=partial(F.cross_entropy, reduction="none"), kl=lambda z, t: I.kl(t, z),
                cw=lambda z, y: -I.margin(z, y))
    near(make(net, t)(x), hand[kind](net(x), t))
    together, mixed = attack(slice(None)), torch.randperm(len(x), generator=rng(seed))
    near(attack(mixed), together[mixed])
    near(torch.cat([attack(slice(b, b + 1)) for b in range(len(x))]), together)

@each("init, std", [("uniform", R / 3**0.5), ("normal", 0.001)])
def test_generator_makes_an_attack_reproducible(init, std):
    x, state = rand(4, 108, lo=0.1, hi=0.9), torch.get_rng_state()
    a, b, c = (I.pgd(lambda z: z.sum(1), x, threat=I.Threat(R, 0.0, 1), init=init, generator=rng(s))
               for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    near((a - x).std() / std, 1.0, 0.15)  # of 432 draws: sd 0.034
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"

@each("threat, objective", [
    (dict(eps=8.0), None), (dict(eps=-0.1), None), (dict(steps=torch.ones(3).long()), None),
    ({}, lambda z: z.sum()), ({}, lambda z: z), ({}, lambda z: z.sum(1, keepdim=True))])
def test_mistaken_threats_and_objectives_are_refused(threat, objective):
    with pytest.raises(I.InfoardError, match="must|one value per sample"):
        I.pgd(objective, rand(2, 4), threat=I.Threat(**threat))
    assert (I.Threat().eps, I.Threat().alpha) == (8 / 255, 2 / 255)  # 2/225 has been seen

@given(logit_pairs, seeds, st.floats(-50, 50))
def test_margin_is_the_lead_over_the_best_other_class(pair, seed, c):
    z, y = pair[0], torch.randint(pair[0].shape[1], (len(pair[0]),), generator=rng(seed))
    lead = [row[k] - max(row[:k] + row[k + 1:]) for row, k in zip(z.tolist(), y, strict=True)]
    near(I.margin(z, y), torch.tensor(lead, dtype=F64))
    near(I.margin(z + c, y), I.margin(z, y))
    assert I.margin(torch.tensor([[-1.0, -2.0]]), torch.tensor([0])) == 1  # not by one_hot * z


# --- ASA ------------------------------------------------------------------------------------------

@given(ints(2, 40), seeds, st.floats(0.5, 1), st.floats(1, 2), st.floats(0, 1), st.booleans())
def test_radii_follow_the_ranks_alone(b, seed, lo, hi, ramp, reverse):
    signal, lam = rand(b, seed=seed), (hi, lo) if reverse else (lo, hi)
    got = I.instance_strength(signal, threat=I.Threat(R, R / 4, 10), lam=lam, ramp=ramp)
    rank = torch.tensor([(signal < s).sum() for s in signal])
    near(got.eps, R * (1 + ramp * (lam[0] + (lam[1] - lam[0]) * rank / (b - 1) - 1)), 1e-7)
    near(got.eps.double().mean(), R * (1 + ramp * ((lo + hi) / 2 - 1)), 1e-7)
    near(got.alpha / got.eps, torch.full((b,), 0.25), 1e-6)
    other = I.instance_strength((3 * signal).exp(), threat=I.Threat(R, R / 4), lam=lam, ramp=ramp)
    assert torch.equal(got.eps, other.eps) and got.steps == 10 and got.counts is None

def test_one_instance_gets_the_middle_of_everything():  # u = 1/2 for eps and for K
    got = I.instance_strength(torch.zeros(1), threat=I.Threat(steps=10), steps_lo=2)
    near(got.eps, 1.25 * R, 1e-7)
    assert got.steps.tolist() == [6] and got.counts == (1,) * 6

@given(ints(2, 40), seeds, ints(1, 6), ints(1, 6))
def test_controls_cost_the_same_and_do_not_adapt(b, seed, lo, more):
    make = partial(I.instance_strength, threat=I.Threat(steps=lo + more), steps_lo=lo)
    own, even = (make(rand(b, seed=seed), uniform=u) for u in (False, True))
    near(even.eps, own.eps.mean().expand(b), 1e-7)
    assert own.steps.sum() == even.steps.sum()
    assert even.steps.max() - even.steps.min() <= 1, even.steps

@given(ints(2, 40), seeds)
def test_shuffled_strengths_are_the_same_ones_for_other_instances(b, seed):
    student, teacher, *_ = pair()
    t, y = rand(b, 4, seed=seed), torch.arange(b) % 4
    own = make_info(student, teacher).strength(t, y)
    info = make_info(student, teacher, asa="shuffled")
    mixed, again = (info.strength(logits, y, generator=rng(9)) for logits in (t, -t))
    assert torch.equal(mixed.eps.sort()[0], own.eps.sort()[0]) and torch.equal(mixed.eps, again.eps)

@each("uniform", [False, True])
@given(b=ints(2, 40), seed=seeds, lo=ints(1, 6), more=ints(1, 6))
def test_step_counts_are_static_and_those_of_the_steps(uniform, b, seed, lo, more):
    s, threat = rand(b, seed=seed), I.Threat(steps=lo + more)
    a, c = (I.instance_strength(v, threat=threat, steps_lo=lo, uniform=uniform) for v in (s, -s))
    assert a.counts == c.counts == I.Threat(steps=a.steps).schedule(b)[1]
    assert a.counts == tuple(int((a.steps > t).sum()) for t in range(a.steps.max()))
    u = [int((s < v).sum()) / (b - 1) for v in s]
    assert uniform or a.steps.tolist() == [math.floor(lo + more * v + 0.5 + 1e-9) for v in u]

@each("init, kind", [("none", "ce"), ("tensor", "kl"), ("tensor", "cw")])
@given(problem=problems(F64), seed=seeds)
def test_step_schedule_equals_one_attack_per_sample(init, kind, problem, seed):
    net, x, y, eps = problem
    make, t = getattr(I, f"{kind}_objective"), 3 * F.one_hot(y, K).to(F64) if kind == "kl" else y
    steps = torch.randint(5, (len(x),), generator=rng(seed))
    radius = torch.as_tensor(eps, dtype=F64).expand(len(x))
    start = rand(*x.shape, seed=seed) if init == "tensor" else x

    def attack(rows, k, counts=None):
        return I.pgd(make(net, t[rows]), x[rows], init=start[rows] if init == "tensor"
                     else init, threat=I.Threat(radius[rows], radius[rows] / 3, k, counts))
    alone = torch.cat([attack(slice(b, b + 1), k) for b, k in enumerate(steps.tolist())])
    near(attack(slice(None), steps), alone)
    near(attack(slice(None), steps, I.active_counts(steps.tolist())), alone)

# --- divergences ----------------------------------------------------------------------------------

@given(logit_pairs)
def test_kl_is_nats_per_sample_summed_over_classes(pair):
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in pair)
    near(I.kl(*pair), (p * (p / q).log()).sum(1))
    near(I.kl(*(z.repeat(2, 1) for z in pair)).mean(), I.kl(*pair).mean())
    near(I.kl(*(F.pad(z, (0, 7), value=-1e4) for z in pair)), I.kl(*pair))  # impossible classes

@given(logit_pairs, st.floats(-9, 9))
def test_kl_is_positive_but_for_equal_and_a_squared_distance_when_hot(pair, c):
    near(I.kl(pair[0], pair[0] + c), 0.0)
    least = 0.5 * (pair[0].softmax(1) - pair[1].softmax(1)).abs().sum(1) ** 2  # Pinsker
    assert (I.kl(*pair) >= least - 1e-12).all(), I.kl(*pair) - least
    limit = (pair[0] - pair[1]).var(1, correction=0) / 2  # |centred difference|^2/(2K)
    assume(limit.min() > 0.1)
    near(1e10 * I.kl(*pair, tau=1e5) / limit, 1.0, 1e-3)  # next term: |z|/tau < 1e-3

@each("dtype", [torch.bfloat16, torch.float16])
def test_kl_is_not_symmetric_and_half_precision_is_computed_in_float32(dtype):
    p, q = torch.zeros(1, 2).to(dtype), torch.tensor([[0.0, 9.0]]).to(dtype)
    near(I.kl(p, q), math.log1p(math.exp(9)) - 4.5 - math.log(2), 1e-6)
    near(I.kl(q, p), math.log(2) + 9 / (1 + math.exp(-9)) - math.log1p(math.exp(9)), 1e-6)
    assert I.kl(p, q).dtype == torch.float32

# --- mutual information ---------------------------------------------------------------------------

BOUNDS = {k: v for k, v in I.BOUNDS.items() if k != "unpaired"} | dict(js=I.js_divergence)

@given(score_matrices, st.floats(-3, 3))
def test_infonce_is_at_most_log_batch_and_dv_the_best_shift_of_nwj(scores, away):
    assert I.infonce(scores) <= math.log(len(scores)) + 1e-12, I.infonce(scores)
    c, dv = 1 - I.off_diagonal(scores).exp().mean().log(), I.donsker_varadhan(scores)
    near(I.nwj(scores + c), dv)
    assert dv >= max(I.nwj(scores), I.nwj(scores + c + away)) - 1e-9, dv

def test_dv_can_exceed_log_batch_and_infonce_cannot():  # 1.386 if dv took the diagonal in
    near(I.donsker_varadhan(10 * torch.eye(4)), 10.0, 1e-6)
    near(I.infonce(10 * torch.eye(4)), math.log(4 / (1 + 3 * math.exp(-10))), 1e-6)

@given(score_matrices)
def test_jsd_has_the_value_of_nwj_and_the_gradient_of_js(scores):
    f = scores.clone().requires_grad_()
    assert I.js_divergence(f) <= math.log(2) + 1e-12, I.js_divergence(f)
    near(I.jsd(f), I.nwj(scores + 1))
    near(*(torch.autograd.grad(bound(f), f)[0] for bound in (I.jsd, I.js_divergence)))

@given(ints(2, 12), seeds)
def test_unpaired_control_takes_each_teacher_image_for_its_neighbours(b, seed):
    scores = rand(b, b, seed=seed)
    near(I.BOUNDS["unpaired"](scores), I.infonce(scores[:, torch.arange(-1, b - 1)]))
    assert I.BOUNDS["unpaired"](20 * torch.eye(b)) < -15 + math.log(b)  # knows all, gets nothing

@each("bound", BOUNDS.values(), ids=BOUNDS)
@given(scores=score_matrices, seed=seeds)
def test_bounds_ignore_the_order_of_the_batch_and_keep_their_input(bound, scores, seed):
    mixed, before = torch.randperm(len(scores), generator=rng(seed)), scores.clone()
    near(bound(scores[mixed][:, mixed]), bound(scores))
    assert torch.equal(scores, before), "scores were written to"
    rows = [[v for j, v in enumerate(row) if j != i] for i, row in enumerate(scores.tolist())]
    assert I.off_diagonal(scores).tolist() == rows

@given(score_matrices, st.floats(-5, 5), seeds)
def test_what_a_shift_does_to_each_bound(scores, c, seed):
    near(I.donsker_varadhan(scores + c), I.donsker_varadhan(scores))
    near(I.infonce(scores + c * rand(len(scores), 1, seed=seed)), I.infonce(scores))
    mean = I.off_diagonal(scores - 1).exp().mean()
    near(I.nwj(scores + c), I.nwj(scores) + c - (math.exp(c) - 1) * mean, 1e-9 * (1 + mean.item()))

@each("bound", [I.donsker_varadhan, I.nwj, I.jsd, I.js_divergence, I.off_diagonal])
@each("shape", [(1, 1), (3, 4), (4, 3)])
def test_scores_that_are_not_pairs_are_refused(bound, shape):
    with pytest.raises(I.InfoardError, match="scores must be"):
        bound(torch.zeros(shape))

SHAPES = dict(kl=[(3, 4)] * 2, relation_loss=[(3, 4), (3, 5)], infonce=[(3, 3)], nwj=[(3, 3)],
              donsker_varadhan=[(3, 3)], js_divergence=[(3, 3)], variational_bound=[(3, 3)],
              attention_scores=[(3, 2, 4, 4), (3, 3, 2, 2)])

@each("name, shapes", SHAPES.items(), ids=SHAPES)
def test_gradients_are_those_of_the_values(name, shapes):  # jsd's is js_divergence's, see above
    args = [rand(*s, seed=i, lo=-2, hi=2).requires_grad_() for i, s in enumerate(shapes)]
    assert torch.autograd.gradcheck(getattr(I, name), args)

def gaussians(d, rho, batch, repeats=8):
    """x, y of unit variance and correlation rho, and the best critic, log p(y|x)/p(y)."""
    for seed in range(repeats):  # fixed, not drawn: these tests have a few sds of room
        x, noise = torch.randn(2, batch, d, generator=rng(seed), dtype=F64)
        y, v = rho * x + math.sqrt(1 - rho**2) * noise, 1 - rho**2
        squares = x.square().sum(1)[:, None] + y.square().sum(1)
        yield x, y, (rho * x @ y.T - rho**2 / 2 * squares) / v - d / 2 * math.log(v)

def mean(values):
    return torch.stack(list(values)).mean(0)

def four(f):
    return torch.stack([I.infonce(f), I.donsker_varadhan(f), I.nwj(1 + f), I.jsd(f)])

@each("rho, tol", [(0.5, 0.15), (0.8, 0.15), (0.0, 1e-9)])  # mean of 8 batches of 512: sd 0.025
def test_best_critic_recovers_the_gaussian_information(rho, tol):
    near(mean(four(f) for *_, f in gaussians(4, rho, 512)), -2 * math.log(1 - rho**2), tol)

def test_infonce_saturates_where_dv_does_not():  # I = 6.7, log B = 4.9; sd of the means: 0.2
    nce, dv = mean(four(f) for *_, f in gaussians(20, 0.7, 128))[:2]
    assert nce < math.log(128) < dv - 0.5, (nce, dv)

def log_normal(mean, var, y):
    return -0.5 * ((mean - y) ** 2 / var + math.log(2 * math.pi * var))

@given(seeds, st.floats(-2, 2))
def test_gaussian_critic_is_a_density_of_the_normalised_target(seed, log_var):
    critic = I.GaussianCritic(3, 4).double()
    critic.log_var.data.fill_(log_var)
    s, t = rand(5, 3, seed=seed), rand(5, 4, seed=seed + 1)
    y = (t - t.mean(1, True)) / (t.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    near(critic(s, t), log_normal(critic.mean(s)[:, None], math.exp(log_var), y).mean(2))

def test_variational_bound_is_tight_at_the_true_gaussian_alone():
    def bound(slope, var):  # 2 + 2 log 2 pi: the entropy of y
        return mean(I.variational_bound(log_normal(slope * x[:, None], var, y).sum(2),
                    2 + 2 * math.log(2 * math.pi)) for x, y, _ in gaussians(4, 0.8, 512))
    near(bound(0.8, 0.36), -2 * math.log(0.36), 0.1)  # sd sqrt(2/4096) = 0.022
    for wrong in ((0.4, 0.36), (0.8, 1.0), (0.8, 0.15), (-0.8, 0.36)):
        assert bound(*wrong) < bound(0.8, 0.36) - 0.1, wrong

@each("rho, low, high", [(0.9, 0.5, 3.3), (0.0, -1.0, 0.05)])  # truth: 3.3 and 0; log B = 4.2
def test_learned_critic_finds_information_where_there_is_some(rho, low, high):
    torch.manual_seed(0)
    critic = I.Critic(4, 4, dim=16).double()
    opt = torch.optim.Adam(critic.parameters(), 0.01)
    *seen, held_out = gaussians(4, rho, 64, 301)
    for x, y, _ in seen:
        opt.zero_grad()
        (-I.infonce(critic(x, y))).backward()
        opt.step()
    scores = critic(*held_out[:2])
    assert low < I.infonce(scores) < high and scores.abs().max() <= 1 / 0.2, I.infonce(scores)

# --- InfoARD --------------------------------------------------------------------------------------

def pair(b=6, dtype=torch.float32):
    """student in train mode, teacher in eval mode, x, y."""
    torch.manual_seed(0)
    nets = I.tiny(4, 16, width=3).to(dtype), I.tiny(4, 16, width=4).to(dtype).eval()
    return *nets, rand(b, 3, 16, 16).to(dtype), torch.arange(b) % 4

def make_step(framework, student, teacher, x, y, info=None, teacher_nat=None, progress=0.5,
              memory=None, **options):
    cfg = I.Config(**dict(framework=framework, steps=2) | options)
    return I.Step(student, teacher, x, y, cfg=cfg, info=info, teacher_nat=teacher_nat,
                  progress=progress, memory=memory, generators=dict(attack=rng(5), data=rng(6)))

make_info = partial(I.InfoARD, image_shape=(3, 16, 16))

@given(seeds, st.floats(0.1, 10))
def test_attention_ignores_order_sign_and_scale_of_channels(seed, scale):
    f, g = rand(4, 3, 6, 6, seed=seed, lo=-1), rand(4, 7, 3, 3, seed=seed + 1, lo=-1)
    h = scale * f[:, [2, 0, 1]] * torch.tensor([1, -1, 1]).view(3, 1, 1)
    near(I.attention_map(h), I.attention_map(f))
    near(0.2 * I.attention_scores(f, h), f.square().sum(1).flatten(1).corrcoef())
    small = F.adaptive_avg_pool2d(f.square().sum(1, True), 3).sqrt()
    near(I.attention_scores(f, g), I.attention_scores(small, g))  # they meet at the smaller size

@given(seeds, ints(3, 8), st.floats(0.1, 10))
def test_relation_is_zero_at_identity_and_blind_to_shift_scale_and_rotation(seed, b, scale):
    s, t = rand(2, b, 5, seed=seed, lo=-1)
    moved = scale * s @ torch.linalg.qr(rand(5, 5, seed=seed + 1, lo=-1)).Q + rand(5, seed=seed)
    c, d = (F.normalize(z - z.mean(0), dim=1) for z in (s, t))
    alone = 1e4 * torch.eye(b)  # the hand-written one: no sample is compared with itself
    near(I.relation_loss(s, t), I.kl(5 * d @ d.T - alone, 5 * c @ c.T - alone))
    near(I.relation_loss(s, s), torch.zeros(b))
    assert (I.relation_loss(s, t) >= -1e-12).all(), I.relation_loss(s, t)
    near(I.relation_loss(moved, t), I.relation_loss(s, t))

@each("arch, names, widths", [
    ("tiny", ["normalize", "relu", "layer1", "layer3", "penultimate"], [3, 16, 32, 128, 128]),
    ("resnet18", [*(f"layer{i}" for i in range(1, 5)), "penultimate"], [64, 128, 256, 512, 512])])
def test_taps_find_the_stages_and_change_nothing(arch, names, widths):
    net, x = I.build_model(arch).eval(), rand(2, 3, 32, 32).float()
    plain, before = net(x), snapshot(net)
    taps = I.Taps(net, x)
    assert torch.equal(net(x), plain)
    assert taps.widths.items() >= set(zip(names, widths, strict=True)), taps.widths
    maps = taps.take()
    assert {n: m.shape[1] for n, m in maps.items()} == taps.widths and taps.take() == {}
    near(F.linear(maps["penultimate"], net.linear.weight, net.linear.bias), plain, 1e-6)
    taps.close()
    assert not any(m._forward_hooks for m in net.modules()) and snapshot(net) == before

@each("mim", [*I.BOUNDS, "off"])
@each("b", [1, 3, 6])
def test_infoard_teaches_student_and_critics_only(mim, b):
    student, teacher, x, _ = pair(b)
    info = make_info(student, teacher, mim=mim, w_rel=0.1)
    student(x), teacher(x)  # with a graph: the detach has to be InfoARD's own
    loss = info.loss()
    if b == 1:
        assert loss == 0
        return
    loss.backward()
    taught = [*student[:-1].parameters(), *info.parameters()]
    grads = torch.stack([p.grad.abs().sum() for p in taught])
    assert loss.isfinite() and grads.isfinite().all() and grads[0] > 0 and grads[-2] > 0, grads
    assert all(p.grad is None for p in teacher.parameters())
    assert all(n.startswith("critics.") for n, _ in info.named_parameters())

def test_infoard_is_the_weighted_sum_of_its_terms():
    student, teacher, x, _ = pair()
    info = make_info(student, teacher, w_feat=0.3, w_att=0.2, w_rel=0.7)
    student(x), teacher(x)
    s, t = info.student_taps.take(), info.teacher_taps.take()
    names = ["penultimate", "layer3", "layer1", "relu"]
    feat = mean(I.infonce(c(s[n], t[n])) for c, n in zip(info.critics, names, strict=True))
    att = mean(I.infonce(I.attention_scores(s[n], t[n])) for n in names[1:])
    rel = I.relation_loss(s["penultimate"], t["penultimate"]).mean()
    near(info.loss(s, t), -0.3 * feat - 0.2 * att + 0.7 * rel, 1e-6)

def test_infoard_of_nets_without_maps_uses_their_vectors():
    student = nn.Sequential(nn.Flatten(), nn.Linear(768, 9), nn.Linear(9, 4))
    teacher, x = copy.deepcopy(student), pair()[2]
    info = make_info(student, teacher)
    student(x), teacher(x)
    assert info.loss().isfinite()

@each("mim, framework, near_one", [("infonse", "at", "infonce"), ("dv", "rsald", "rslad")])
def test_unknown_names_come_with_the_known_ones(mim, framework, near_one):
    with pytest.raises(I.InfoardError, match=f"choose from .*{near_one}"):
        make_step(framework, *pair(), make_info(*pair()[:2], mim=mim)).loss()

README = Path(I.__file__).with_name("README.md").read_text()

def linf_attack(student, x, y, eps):
    """A foreign attack that takes a float or a radius for each sample."""
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(student(z), y), z)
    return (x + torch.as_tensor(eps).view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1)

@each("options", [{}, dict(asa="off", w_feat=0.0, w_att=0.0)])
def test_patch_of_the_readme_works_in_a_foreign_loop(options):
    patch = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    assert sum(line[0] == "+" for line in patch) <= 5
    def trained(without):
        student, teacher, x, y = pair()
        losses, radii = [], []
        def kl(t, s):
            losses.append(I.kl(t, s))
            return losses[-1]
        def attack(student, x, y, eps):
            radii.append(torch.as_tensor(eps))
            return linf_attack(student, x, y, eps)
        names = dict(student=student, teacher=teacher, loader=[(x, y)] * 15, SGD=torch.optim.SGD,
                     InfoARD=partial(make_info, **options), kl=kl, attack=attack)
        exec("\n".join(line[1:] for line in patch if line[0] != without), names)
        return student, torch.stack(losses).mean(1).detach(), radii, names
    student, losses, radii, names = trained("-")
    bare, bare_losses, *_ = trained("+")
    assert losses[-1] < losses[0] / 2 and bare_losses[-1] < bare_losses[0] / 2
    assert torch.equal(losses, bare_losses) == bool(options)  # switched off, it is the plain loop
    assert radii[0].numel() == (1 if options else 6)
    assert options or all(p.grad.any() for p in names["info"].parameters())

# --- frameworks -----------------------------------------------------------------------------------

def batch_kl(p, q, tau=1.0, weight=1.0):
    """torch's own divergence, target first; weight [B] or a number."""
    each_sample = F.kl_div((q / tau).log_softmax(1), (p / tau).softmax(1), reduction="none").sum(1)
    return tau ** 2 * (weight * each_sample).mean()

def passes(student, teacher, x, x_adv, natural=None):
    """All logits that a loss can name; minus: at x - d, n: the natural teacher's."""
    with torch.no_grad():
        t, t_adv, t_minus = (teacher(v) for v in (x, x_adv, 2 * x - x_adv))
        n = natural and natural(x)
    s, s_adv, s_minus = (student(v) for v in (x, x_adv, 2 * x - x_adv))
    return SimpleNamespace(t=t, t_adv=t_adv, n=n, s=s, s_adv=s_adv,
                           slopes=(t_adv - t_minus, s_adv - s_minus))

def iad_formula(p, y):
    trust = p.t_adv.softmax(1)[range(len(y)), y] ** 0.1
    return 0, batch_kl(p.t, p.s_adv, 1, trust) + batch_kl(p.s, p.s_adv, 1, 1 - trust)

def saad_formula(p, y):
    h = torch.distributions.Categorical(logits=p.t_adv).entropy()
    h = 5 * (h - h.min())
    clean = batch_kl(p.t, p.s, 1, 1 - h / h.max().clamp(min=1e-8))
    return 0, batch_kl(p.t_adv, p.s_adv, 1, h) + 0.8 * batch_kl(*p.slopes, 1, h) + 0.5 * clean

OPTIONS = dict(ard=dict(alpha=0.7), adaad=dict(alpha=0.7), saad=dict(beta=0.5, alpha=1.6),
               igdm=dict(alpha=1.6))
FORMULAS = dict(  # passes, y -> the cross-entropy and the divergence of the loss at half time
    natural=lambda p, y: (F.cross_entropy(p.s, y), 0),
    at=lambda p, y: (F.cross_entropy(p.s_adv, y), 0),
    trades=lambda p, y: (F.cross_entropy(p.s, y), 6 * batch_kl(p.s, p.s_adv)),
    ard=lambda p, y: (0.3 * F.cross_entropy(p.s, y), 0.7 * batch_kl(p.t, p.s_adv, 30)),
    rslad=lambda p, y: (0, 5 / 6 * batch_kl(p.t, p.s_adv) + 1 / 6 * batch_kl(p.t, p.s)),
    iad=iad_formula,
    adaad=lambda p, y: (0, 0.7 * batch_kl(p.t_adv, p.s_adv) + 0.3 * batch_kl(p.t, p.s)),
    mtard=lambda p, y: (0, 0.5 * batch_kl(p.t_adv, p.s_adv) + 0.5 * batch_kl(p.n, p.s)),
    igdm=lambda p, y: (0, batch_kl(p.t_adv, p.s_adv) + 0.8 * batch_kl(*p.slopes)),
    saad=saad_formula)
each_framework = each("framework", list(FORMULAS)[1:])

def linear_teacher(teacher, x, y):
    """SAAD's: T(x) with the true logit raised by its own gradient, pixel by pixel, times x' - x."""
    t, b = teacher(x).detach(), torch.arange(len(x))
    slope = torch.autograd.functional.jacobian(lambda z: teacher(z)[b, y], x)[b, b]  # [B,C,H,W]
    def logits(z, rows):
        rise = torch.einsum("bchw,bchw->b", slope[rows], z - x[rows])
        return t[rows] + rise[:, None] * F.one_hot(y[rows], t.shape[1])
    return logits

def inner(framework, student, teacher, x, y):
    """The inner objective in torch's own words: z, rows -> [B]."""
    def toward(logits):
        return lambda z, rows=I.ALL: F.kl_div(student(z).log_softmax(1),
                                              logits(z, rows).softmax(1), reduction="none").sum(1)
    t, s, linear = teacher(x).detach(), student(x).detach(), linear_teacher(teacher, x, y)
    ce = lambda z, rows=I.ALL: F.cross_entropy(student(z), y[rows], reduction="none")  # noqa: E731
    return dict(at=ce, ard=ce, iad=ce, mtard=ce, trades=toward(lambda z, rows: s[rows]),
                rslad=toward(lambda z, rows: t[rows]), adaad=toward(lambda z, rows: teacher(z)),
                igdm=toward(lambda z, rows: teacher(z)), saad=toward(linear))[framework]

@each("framework", FORMULAS)
@each("reduction, b", [("batchmean", 1), ("batchmean", 5), ("mean", 5)])
def test_framework_is_its_formula_and_teaches_the_student_only(framework, reduction, b):
    student, teacher, x, y = pair(b, F64)
    natural = I.tiny(4, 16, width=2).to(F64).eval()
    before = copy.deepcopy(student).eval()
    step = make_step(framework, student, teacher, x, y, kl_reduction=reduction, eps=0.3,
                     step_size=0.2, teacher_nat=natural, **OPTIONS.get(framework, {}))
    loss = step.loss()  # radii are large, so that KL(p||q) is not KL(q||p)
    loss.backward()
    grads = [p.grad.clone() for p in student.parameters()]
    ce, divergence = FORMULAS[framework](passes(student, teacher, x, step.x_adv, natural), y)
    truth = ce + divergence / (4 if reduction == "mean" else 1)
    near(loss, truth)
    truth.backward(inputs=list(student.parameters()))  # adds to the loss's: twice as much if right
    for p, ours in zip(student.parameters(), grads, strict=True):
        near(p.grad, 2 * ours)
    assert all(p.grad is None for net in (teacher, natural) for p in net.parameters())
    if framework != "natural":  # and the attack is its inner maximum, on the student in eval mode
        init = "uniform" if framework in ("at", "ard", "iad") else "normal"
        near(step.x_adv, I.pgd(inner(framework, before, teacher, x, y), x, init=init,
                               threat=I.Threat(0.3, 0.2, 2), generator=rng(5)), 0.0)

@each_framework
def test_strength_reaches_every_inner_objective(framework):  # teachers in the attack included
    student, teacher, x, y = pair(dtype=F64)
    info, before = make_info(student, teacher).double(), copy.deepcopy(student).eval()
    step = make_step(framework, student, teacher, x, y, info, steps_lo=1, steps=3,
                     teacher_nat=teacher)
    step.loss()
    init = "uniform" if framework in ("at", "ard", "iad") else "normal"
    near(step.x_adv, I.pgd(inner(framework, before, teacher, x, y), x, init=init,
                           threat=step.threat, generator=rng(5)), 0.0)
    assert step.threat.eps.unique().numel() == 6 and len(step.threat.counts) == 3

def test_losses_reduce_to_known_cases():
    student, teacher, x, y = pair(dtype=F64)
    def loss(framework, teacher=teacher, **options):
        return make_step(framework, copy.deepcopy(student), teacher, x, y, **options).loss()
    near(loss("trades", beta=0.0), F.cross_entropy(student(x), y), 0.0)
    near(loss("ard", alpha=0.0), F.cross_entropy(student(x), y), 0.0)
    near(loss("igdm", alpha=0.0), loss("adaad"), 0.0)
    near(loss("adaad", alpha=0.0), batch_kl(teacher(x).detach(), student(x)))
    near(loss("iad", progress=0.29), loss("ard", temperature=1.0))  # before its epoch 60
    assert (loss("iad", progress=0.3) - loss("iad", progress=0.29)).abs() > 1e-6
    sure = nn.Sequential(teacher, nn.Linear(4, 4, dtype=F64)).requires_grad_(False)
    sure[1].weight.zero_(), sure[1].bias.zero_()  # of no opinion: all entropies are alike
    assert loss("saad", sure) == 0
    student.eval()
    twin = copy.deepcopy(student)
    for framework in ("rslad", "adaad", "igdm", "saad"):  # T = S
        near(loss(framework, twin, **dict(eps=0.0) if framework == "rslad" else {}), 0.0)

@each("framework", ["rslad", "adaad", "igdm", "saad"])
def test_a_teacher_in_train_mode_is_asked_in_eval_mode_and_left_alone(framework):
    student, teacher, x, y = pair(dtype=F64)
    truth = make_step(framework, copy.deepcopy(student), teacher, x, y).loss()
    before = snapshot(teacher.train())
    near(make_step(framework, copy.deepcopy(student), teacher, x, y).loss(), truth, 0.0)
    assert snapshot(teacher) == before and teacher.training

def test_ard_at_a_high_temperature_matches_logits():  # tau^2 KL -> mean (dz - mean dz)^2 / 2
    student, teacher, x, y = pair(dtype=F64)
    step = make_step("ard", student, teacher, x, y, temperature=1000.0)
    gap = (step.loss(), step.s_adv - step.t)[1]
    near(step.kl(step.t, step.s_adv, 1e3), 0.5 * gap.var(1, correction=0).mean(), 1e-2)  # O(z/tau)

def test_mtard_follows_the_slower_loss_and_remembers():
    student, teacher, x, y = pair(dtype=F64)
    natural, memory, w, first = I.tiny(4, 16, width=2).to(F64).eval(), {}, 0.5, None
    for progress in (0.0, 0.5, 0.99):  # lr falls by 10 at 215/300 and again twice
        student.layer1[0].weight.data *= 1.3
        step = make_step("mtard", student, teacher, x, y, teacher_nat=natural,
                         progress=progress, memory=memory, epochs=300,
                         schedule="215,260,285")
        loss = step.loss()
        adv, nat = batch_kl(step.t_adv, step.s_adv), batch_kl(step.t_nat, step.s)
        first = first or (adv.item(), nat.item())
        r_adv, r_nat = adv.item() / first[0], nat.item() / first[1]
        w -= 0.025 * (1e-3 if progress > 0.9 else 1) * (w - r_adv / (r_adv + r_nat))
        near(loss, w * adv + (1 - w) * nat)
    assert abs(w - 0.5) > 1e-4 and not memory["w"].requires_grad, memory

def test_mtard_survives_a_first_loss_of_zero():
    student, _, x, y = pair(dtype=F64)
    student.eval()
    twin, memory = copy.deepcopy(student), {}
    loss = make_step("mtard", student, twin, x, y, teacher_nat=twin, memory=memory).loss()
    near(loss, 0.0)
    near(memory["w"], torch.full((2,), 0.5, dtype=F64))

def test_shuffled_strengths_come_from_the_generator_of_the_run():
    student, teacher, x, y = pair()
    info, before = make_info(student, teacher, asa="shuffled"), torch.get_rng_state()
    one, two = (make_step("rslad", student, teacher, x, y, info) for _ in range(2))
    one.loss(), two.loss()
    assert torch.equal(one.threat.eps, two.threat.eps) and one.threat.eps.unique().numel() == len(x)
    assert torch.equal(torch.get_rng_state(), before)

@each("framework, needs", [(f, f in I.NEED_TEACHER) for f in FORMULAS])
def test_a_missing_teacher_is_named(framework, needs):
    student, _, x, y = pair(dtype=F64)
    with pytest.raises(I.InfoardError, match=f"{framework} needs a teacher") if needs else \
            contextlib.nullcontext():
        make_step(framework, student, None, x, y).loss()

@each_framework
def test_infoard_without_weights_is_the_base_bit_for_bit(framework):
    student, teacher, x, y = pair(dtype=F64)
    options = dict(teacher_nat=teacher)
    base = make_step(framework, copy.deepcopy(student), teacher, x, y, **options).loss()
    info = make_info(student, teacher, asa="off", w_feat=0.0, w_att=0.0)
    assert torch.equal(make_step(framework, student, teacher, x, y, info, **options).loss(), base)
    student(x), teacher(x)
    assert info.loss() == 0 and not list(info.parameters())

@each_framework
@each("asa", ["teacher", "student", "gap"])
def test_infoard_adds_its_terms_and_a_radius_for_each_instance(framework, asa):
    student, teacher, x, y = pair(dtype=F64)
    info, clean = make_info(student, teacher, asa=asa).double(), copy.deepcopy(student).eval()(x)
    step = make_step(framework, student, teacher, x, y, info, steps_lo=1, teacher_nat=teacher,
                     **OPTIONS.get(framework, {}))
    loss, p = step.loss(), passes(student, teacher, x, step.x_adv, teacher)
    lead = I.margin((p.t if asa == "teacher" else clean).softmax(1), y)
    rank = (I.kl(p.t, clean) if asa == "gap" else lead).argsort().argsort()
    near(step.threat.eps, R * (1 + 0.1 * rank))
    assert step.threat.steps.tolist() == [1 + (r >= 3) for r in rank.tolist()]
    assert ((step.x_adv - x).abs().flatten(1).amax(1) <= step.threat.eps + 1e-7).all()
    student(step.x_adv), teacher(x)
    near(loss, sum(FORMULAS[framework](p, y)) + info.loss())

@each_framework
def test_no_graph_outlives_its_step(framework):  # it would hold memory and break copy.deepcopy
    student, teacher, x, y = pair(dtype=F64)
    info = make_info(student, teacher).double()
    make_step(framework, student, teacher, x, y, info, teacher_nat=teacher).loss().backward()
    for taps in (info.student_taps, info.teacher_taps):
        assert not [n for n, m in taps.take().items() if m.requires_grad]

def test_settings_of_the_framework_unless_told_otherwise():
    assert I.Config(framework="ard").resolved().temperature == 30
    assert I.Config(framework="ard", alpha=0.5).resolved().alpha == 0.5
    assert I.Config(framework="saad").resolved().beta == 0 and I.Config().resolved().alpha == 5 / 6
    assert I.Config(framework="at").resolved().beta is None
    for dataset in ("shapes", "cifar10"):  # their label is T(x'): radii of 2 eps are free
        widest = {f: I.Config(dataset=dataset, framework=f).resolved().lam_hi for f in I.FRAMEWORKS}
        assert {f: v for f, v in widest.items() if v != 1.5} == dict(adaad=2, igdm=2)
    assert I.Config(framework="adaad", lam_hi=1.2).resolved().lam_hi == 1.2

def test_lr_falls_to_a_tenth_after_each_named_epoch():
    cfg = I.Config(schedule="100,150", epochs=200, lr=0.1)
    rates = [cfg.lr_at(e / 200) for e in (0, 99.9, 100, 149.9, 150, 199.9)]  # 150 is below 100's
    near(torch.tensor(rates), torch.tensor([0.1, 0.1, 0.01, 0.01, 0.001, 0.001]), 1e-7)

# --- models and teachers ----------------------------------------------------------------------

RESNET = functools.partial(I.resnet, blocks=(1, 1, 1, 1))
FAMILIES = dict(
    wrn=lambda: I.build_model("wrn_10_2"), wrn_10_2_silu=lambda: I.build_model("wrn_10_2_silu"),
    resnet=RESNET, preact=lambda: RESNET(preact=True), mobilenet=I.mobilenet_v2, tiny=I.tiny,
    preact_no_bn=lambda: RESNET(preact=True, final_bn=False))

@functools.cache
def trained_looking(family):
    """A net whose weights and statistics all differ from their initial values."""
    net, g = FAMILIES[family](), torch.Generator().manual_seed(0)
    for v in (v for v in net.state_dict().values() if v.is_floating_point()):
        v.add_(0.1 * (v.abs().mean() + 0.1) * torch.rand(v.shape, generator=g))
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)

def one_line(error):
    return "\n" not in str(error).rstrip("\n") and 10 < len(str(error)) < 700

def noise(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), np.uint8)

X = torch.from_numpy(noise(2)).contiguous(memory_format=torch.channels_last) / 255

@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("name", [n for n in I.MODELS if n != "wrn_34_10"] + ["wrn_10_1_silu"])
def test_output_is_batch_by_classes(name, size):
    assert I.build_model(name, 7, size).eval()(torch.rand(2, 3, size, size)).shape == (2, 7)

@pytest.mark.parametrize("name, options, count, tensors, keys", [
    ("resnet18", {}, 11_173_962, 122, "layer2.0.shortcut.0.weight layer4.0.shortcut.1.running_var"),
    ("preact_resnet18", {}, 11_172_170, 107,
    "layer1.0.bn1.bias layer2.0.shortcut.0.weight bn.bias"),
    ("preact_resnet18", dict(final_bn=False), 11_171_146, 102, "conv1.weight linear.weight"),
    ("wrn_34_10", {}, 46_160_474, 191, "block1.layer.4.conv2.weight bn1.running_mean fc.bias "
     "block2.layer.0.convShortcut.weight"),
    ("mobilenet_v2", {}, 2_296_922, 344, "layers.16.conv3.weight layers.0.shortcut.1.weight")])
def test_sizes_and_keys_are_those_of_files_in_the_wild(name, options, count, tensors, keys):
    with torch.device("meta"):
        net = I.build_model(name, **options)
    assert sum(p.numel() for p in net.parameters()) == count
    assert len(net.state_dict()) == tensors and set(keys.split()) <= net.state_dict().keys()

def at(prefix, state):
    return {prefix + k: v for k, v in state.items()}

WRAPPINGS = dict(
    plain=lambda s: s, parallel=lambda s: at("module.", s), last=lambda s: dict(last=s, acc=1.5),
    state_dict=lambda s: dict(state_dict=at("module.", s), epoch=3, arch="x"),
    net=lambda s: dict(net=s, acc=91.2, epoch=5), model=lambda s: dict(model=at("module.", s)),
    sequential=lambda s: dict(model_state_dict=at("module.0.", s)),
    mair=lambda s: dict(rmodel=at("model.module.", s)), compiled=lambda s: at("_orig_mod.", s),
    swa=lambda s: at("module.module.", s) | dict(n_averaged=torch.tensor(3)),
    best=lambda s: dict(last={k: v + 1 for k, v in s.items()}, best=s),
    sub_block=lambda s: s | {"sub_" + k: v + 1 for k, v in s.items() if k.startswith("block1.")})

@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_wrapping_gives_the_same_frozen_net(family, wrapping, tmp_path):
    net, path = trained_looking(family), tmp_path / "t.pt"
    torch.save(WRAPPINGS[wrapping](net.state_dict()), path)
    loaded = I.load_teacher(str(path), family if "silu" in family else None, num_classes=10)
    path.unlink()  # up to 20 MB
    assert torch.equal(loaded(X), net(X)) and not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())

@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("mean, std, inner", [
    ("mu", "sigma", ""), ("module.mu", "module.sigma", "module."), ("mean", "std", "model."),
    ("normalize.mean", "normalize.std", ""), ("0.mean", "0.std", "1."), ("", "", "")])
def test_normalisation_is_inside_from_the_file_or_as_told(mean, std, inner, order, tmp_path):
    net = trained_looking("tiny")
    m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in I.NORMS["cifar10"])
    extra = dict([(mean, m), (std, s)][::order]) if mean else {}
    torch.save(extra | at(inner, net.state_dict()), tmp_path / "t.pt")
    loaded = I.load_teacher(str(tmp_path / "t.pt"), norm="none" if mean else "cifar10")
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert torch.allclose(loaded(X), net((X - m) / s), 1e-4, 1e-4)  # fp32 sums in another order

@pytest.mark.parametrize("keys", [("conv1.w", "block.module.x"), ("module.a.w", "fc.w"),
    ("a.module.w", "b.w")])
def test_a_prefix_of_some_keys_only_stays(keys):
    assert set(I.unwrap({k: torch.zeros(1) for k in keys})[0]) == set(keys)

@pytest.mark.parametrize("right", [10, 19, 21, 100])
def test_only_a_teacher_above_twice_chance_passes(right, monkeypatch, capsys):
    monkeypatch.setattr(I, "correct", lambda net, x, y: torch.arange(100) < right)
    if right > 20:
        I.check_teacher(None, X, None, "my-Zhang2019Theoretically.pt", 10)
        assert f"accuracy {right}.0 on" in (out := capsys.readouterr().out) and "84.92" in out
    else:
        pytest.raises(I.InfoardError, I.check_teacher, None, X, None, "t", 10).match("chance is 10")

# --- evaluation -------------------------------------------------------------------------------

SMALL = I.render_shapes(400, 100)
BASE = dict(student="tiny", teacher_arch="tiny", epochs=2, steps=1, batch_size=64, device="cpu",
            attacks="clean,fgsm", figures=False, progress=False, eval_subset=40, val_size=40,
            amp="off")

def run(out, stop=0, **options):
    """train() on 400 small images; SIGTERM arrives in step `stop`."""
    real, done = I.Run.step, []

    def step(self):
        done.append(real(self))
        if len(done) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "render_shapes", lambda *args, **options: SMALL)
        patch.setattr(I.Run, "step", step)
        return I.train(I.Config(**BASE | options, out=str(out)))

@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A teacher far above chance; runs: finished, unfinished, `reference` by settings."""
    top = tmp_path_factory.mktemp("lab")
    run(top / "teacher", framework="natural", epochs=16, lr=0.05)  # 70% clean
    teacher = str(top / "teacher" / "last.pt")
    results = run(top / "done", teacher=teacher, figures=True, ema=0.9, w_att=0.05, attacks="clean,fgsm,pgd")
    with pytest.raises(SystemExit):
        run(top / "unfinished", stop=2, framework="natural")

    @functools.cache
    def reference(**options):
        out = top / f"reference{len(list(top.iterdir()))}"
        return out, run(out, teacher=teacher, **options)
    return SimpleNamespace(top=top, teacher=teacher, results=results, reference=reference,
                           net=I.load_teacher(teacher))

def evaluate(net, n=8, start=0, **options):
    return I.evaluate(net, SMALL.x_test[start:start + n], SMALL.y_test[start:start + n], **options)

@given(st.integers(0, 80), st.integers(0, 32))
@settings(max_examples=6)
def test_robust_never_exceeds_clean_nor_worst_any(lab, start, radius):
    result = evaluate(lab.net, 20, start, eps=radius / 255, attacks="clean,fgsm,pgd,cw")
    values = [result[k] for k in ("clean", "fgsm", "pgd_sat", "pgd_trades", "cw")]
    assert result["worst_class"] <= result["worst"] <= min(values) and max(values) == values[0]

def test_autoattack_is_at_most_its_parts(lab):
    result = evaluate(lab.net, eps=4 / 255, attacks="apgd,aa,pgd")
    assert result["worst"] <= result["aa"] <= result["apgd"] <= result["clean"]

@given(st.integers(1, 100), st.integers(1, 100))
def test_accuracy_counts_samples_whatever_the_batches(lab, n, size):
    hits = lab.net(SMALL.x_test[:n] / 255).argmax(1) == SMALL.y_test[:n]
    assert evaluate(lab.net, n, attacks="clean", batch_size=size)["clean"] == round(
        100 * int(hits.sum()) / n, 2)

@given(st.data(), st.integers(1, 10_000))
def test_interval_holds_the_share(data, n):
    k = data.draw(st.sampled_from([0, n]) | st.integers(0, n))
    lo, hi = I.interval(k / n, n)
    assert 0 <= lo <= 100 * k / n + 0.01 and 100 * k / n - 0.01 <= hi <= 100  # 2 decimals

@pytest.mark.parametrize("value", [1.5, -0.1, torch.nan])
def test_images_outside_the_unit_box_are_refused(lab, value):
    with pytest.raises(I.InfoardError, match=r"\[0, 1\]"):
        I.evaluate(lab.net, torch.full((2, 3, 32, 32), value), torch.tensor([0, 1]),
            attacks="clean")

@pytest.mark.parametrize("work", [lambda lab, out: evaluate(lab.net, attacks="clean,pgd,apgd"),
                                  lambda lab, out: run(out, teacher=lab.teacher, epochs=1)])
def test_global_randomness_is_left_alone(lab, work, tmp_path):
    before = torch.get_rng_state()
    work(lab, tmp_path / "r")
    assert torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_model_as_found(training):
    net = I.tiny().train(training)
    net.conv1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    evaluate(net, attacks="clean,pgd,cw,apgd")
    assert all(m.training == training for m in net.modules())
    assert all(p.requires_grad == (p is not net.conv1.weight) for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())

@pytest.mark.parametrize("gap", [0, 7, 8, 30])
@pytest.mark.parametrize("name", ["cw", "apgd", "aa"])
def test_masking_warning_from_a_gap_of_eight(name, gap):
    left = {"clean": 80, "pgd_sat": 50, name: 50 - gap}
    right = {k: torch.arange(100) < n for k, n in left.items()}
    assert bool(I.summary(right, torch.arange(100) % 10, 10)["warnings"]) == (gap >= 8)

@pytest.mark.parametrize("classes, attacks, parts", [
    (3, "apgd", ["apgd-ce"]), (10, "apgd", ["apgd-ce", "apgd-t"]),
    (10, "aa", ["apgd-ce", "apgd-t", "fab-t", "square"]), (10, "pgd", [])])
def test_each_part_attacks_what_is_left_and_the_last_counts(classes, attacks, parts, monkeypatch):
    done, radii, real = [], [], I.ATTACKS["pgd_sat"]
    def fake(part, net, x, y):  # each part beats the two samples that come first
        done.append((part, len(x)))
        return torch.cat([wrong[y[:2]], x[2:]])
    x = torch.eye(classes).view(classes, classes, 1, 1)
    wrong = x.roll(1, 0)  # images of another class
    monkeypatch.setattr(I, "autoattack", lambda *args: fake)
    monkeypatch.setitem(I.ATTACKS, "pgd_sat", lambda *args, eps, **options: radii.append(eps) or real(
        *args, eps=eps, **options))
    y = torch.arange(classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(classes, classes, bias=False))
    net[1].weight.data = torch.eye(classes)
    result = I.evaluate(net, x, y, attacks=f"clean,{attacks}", classes=classes)
    assert done == [(part, classes - 2 * i) for i, part in enumerate(parts)]
    last = {"apgd-ce": "apgd", "apgd-t": "apgd", "square": "aa"}.get((parts or [""])[-1])
    assert not last or result[last] == percent_of(classes - 2 * len(parts), classes)
    assert attacks != "pgd" or radii == [R, 64 / 255]

def percent_of(n, of):
    return round(100 * n / of, 2)

def test_masking_warning_from_square_and_from_a_radius_that_nothing_survives():
    def warned(square, far):
        left = dict(clean=80, pgd_sat=50) | {"fab-t": 48, "square": square}
        right = {k: torch.arange(100) < n for k, n in left.items()}
        return len(I.summary(right, torch.arange(100) % 10, 10, far)["warnings"])
    # more than 1% of the 80 that are right on x: one is 1.25%
    assert [warned(48, 0.5), warned(47, 1.0), warned(46, 0.0), warned(46, 1.1)] == [0, 1, 1, 2]

def test_worst_class_by_hand():
    y, hits = torch.tensor([0, 0, 0, 1, 1, 3]), dict(
        clean=[1, 1, 1, 1, 1, 1], fgsm=[1, 0, 1, 1, 0, 0], cw=[1, 1, 0, 1, 1, 1])
    result = I.summary({k: torch.tensor(v).bool() for k, v in hits.items()}, y, 4)
    assert result["per_class"] == [33.33, 50.0, 0.0] and result["worst_class"] == 0.0
    assert (result["clean"], result["fgsm"], result["worst"]) == (100.0, 50.0, 33.33)

# --- training ---------------------------------------------------------------------------------

def differences(a, b, where=""):
    """Where two values differ, but for the clock and the names of the folders."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted((a.keys() | b.keys()) - {"seconds", "images_per_s", "out", "resume"}, key=str)
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, v in enumerate(a) for d in differences(v, b[i], f"{where}.{i}")]
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return [] if (torch.equal(a, b) if tensors else a == b) else [where]

def files_differ(one, two):
    """last.pt holds weights, EMA, critics, optimizer, generators and the rows of the log."""
    return [d for f in ("last.pt", "best.pt") for d in differences(I.load_tensors(one / f),
        I.load_tensors(two / f))]

@pytest.mark.parametrize("options", [
    dict(ema=0.9), dict(ema=0.9, amp="bf16"), dict(asa="shuffled", steps=2, steps_lo=1, w_rel=0.1),
    dict(framework="at", infoard=False), dict(framework="trades", mim="vid", asa="gap")], ids=str)
@given(k=st.integers(1, 12))  # two epochs of six steps, the last one smaller
@example(k=6)
@settings(max_examples=2)
def test_resumed_is_uninterrupted_bit_for_bit(lab, tmp_path_factory, options, k):
    whole_out, whole_results = lab.reference(**options)
    out = tmp_path_factory.mktemp("resume") / "r"
    with pytest.raises(SystemExit) as stopped:
        run(out, stop=k, teacher=lab.teacher, resume=True, **options)  # nothing there: afresh
    assert stopped.value.code == 143 and I.load_tensors(out / "last.pt")["at"]["step"] == k
    results = run(out, teacher=lab.teacher, resume=True, **options)
    assert files_differ(whole_out, out) == [] and results == whole_results

def test_another_seed_gives_another_run(lab):
    one, two = (I.load_tensors(lab.reference(ema=0.9, **o)[0] / "last.pt") for o in ({},
        dict(seed=1)))
    assert {".conv1.weight", ".linear.weight"} <= set(differences(one["model"], two["model"]))

@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_killed_before_replace_keeps_the_old_checkpoint(trouble, tmp_path, monkeypatch):
    I.save(tmp_path / "last.pt", dict(step=1))
    monkeypatch.setattr(os, "replace", lambda *args: exec("raise trouble", dict(trouble=trouble)))
    with pytest.raises((I.InfoardError, KeyboardInterrupt)):
        I.save(tmp_path / "last.pt", dict(step=2))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]

def test_finished_run_is_not_run_again(lab, monkeypatch):
    monkeypatch.setattr(I, "Run", None)
    teacher, done = str(lab.top / "teacher/last.pt"), str(lab.top / "done")
    assert I.train(I.Config(**BASE, teacher=teacher, out=done, ema=0.9, w_att=0.05)) == lab.results
    with pytest.raises(I.InfoardError, match="--w-feat"):  # nor are its results those of others
        I.train(I.Config(**BASE, teacher=teacher, out=done, ema=0.9, w_att=0.05, w_feat=0.7))

def test_a_plain_run_is_not_bound_by_settings_of_infoard():
    other = dict(asa="off", lam_lo=0.5, lam_hi=9.0, steps_lo=1, mim="off", w_feat=9.0, w_att=9.0, w_rel=9.0, tau=9.0)
    for name, value in other.items():
        for infoard in (False, True):
            cfg = I.Config(infoard=infoard).resolved()
            then = vars(cfg) | {name: value}
            if infoard:
                with pytest.raises(I.InfoardError, match=name.replace("_", "-")):
                    I.same_settings(then, cfg)
            else:
                assert I.same_settings(then, cfg) is None
                with pytest.raises(I.InfoardError, match="--infoard"):  # and what was lifted is not plain
                    I.same_settings(then | dict(infoard=True), cfg)
    for name in ("critic_dim", "framework", "teacher", "alpha"):  # which others use too
        with pytest.raises(I.InfoardError, match=name.replace("_", "-")):
            I.same_settings(vars(cfg) | dict(infoard=False, **{name: 99}), dataclasses.replace(cfg, infoard=False))
    nets = []  # nor does anything of it change what is trained
    for options in ({}, other):
        torch.manual_seed(0)
        made = begun(**dict(framework="at", infoard=False) | options)
        nets.append(torch.cat([p.flatten() for p in made.student.parameters()]))
    assert torch.equal(*nets)

@pytest.mark.parametrize("changed", [dict(resume=False), dict(lr=0.02), dict(batch_size=32),
    dict(seed=4),
                                     dict(student="tiny_wide"), dict(eps=4 / 255)], ids=str)
def test_unfinished_run_goes_on_only_as_it_began(lab, changed):
    with pytest.raises(I.InfoardError, match="--" + next(iter(changed)).replace("_", "-")) as error:
        run(lab.top / "unfinished", **dict(framework="natural", resume=True) | changed)
    assert one_line(error.value)

def test_loss_that_is_not_finite_names_step_and_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(I.InfoardError, match=r"not finite at step \d+.*none"):
        run(tmp_path / "r", framework="natural", lr=1e9)
    real = I.Run.step
    monkeypatch.setattr(I.Run, "step", lambda self: (
        self.at["epoch"] and self.student.linear.bias.data.fill_(torch.nan), real(self)))
    with pytest.raises(I.InfoardError, match=r"not finite at step \d+.*last\.pt"):
        run(tmp_path / "s", framework="natural")
    assert I.load_tensors(tmp_path / "s" / "last.pt")["at"]["epoch"] == 1

def begun(teacher=None, **options):
    cfg = I.Config(**BASE | dict(infoard=bool(teacher)) | options).resolved()
    nets = {k: teacher and I.load_teacher(teacher) for k in ("teacher", "teacher_nat")}
    made = I.Run(cfg, SMALL, torch.device("cpu"), nets)
    made.step()
    return made

@given(st.integers(20, 400), st.integers(0, 60), st.integers(2, 90), st.integers(0, 99))
def test_epoch_is_a_permutation_apart_from_validation(subset, val, batch, seed):
    made = begun(subset=subset, val_size=val, batch_size=batch, seed=seed, framework="at")
    order, train, aside = (rows.tolist() for rows in (made.at["order"], made.train, made.val))
    assert sorted(order) == sorted(train) and len(set(order)) == len(order)
    assert not set(order) & set(aside)
    assert len(train) + len(aside) == subset and len(aside) == min(val, subset // 10)

@pytest.mark.parametrize("framework", ["at", "trades", "rslad"])
def test_gradients_reach_student_and_critics_only(lab, framework):
    made = begun(lab.teacher, framework=framework)
    learning = [*made.student.parameters(), *made.info.critics.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learning)
    assert all(p.grad is None for p in made.nets["teacher"].parameters())

def test_a_run_keeps_memory_and_tells_progress_and_both_teachers(lab, monkeypatch):
    seen, real = [], I.Step
    monkeypatch.setattr(I, "Step", lambda *args, **options: seen.append(
        real(*args, **options)) or seen[-1])
    made = begun(lab.teacher, framework="mtard")
    for _ in range(5):  # six steps make an epoch
        made.step()
    assert all(step.memory is made.at["memory"] for step in seen)
    assert seen[-1].teacher_nat is made.nets["teacher_nat"] is not seen[-1].teacher
    assert seen[-1].teacher is made.nets["teacher"]
    near(torch.tensor([step.progress for step in seen[:4]]), torch.arange(4) * 64 / 360 / 2, 1e-6)
    w = made.at["memory"]["w"]
    near(w.sum(), 1.0, 1e-6)
    assert (w - 0.5).abs().min() > 1e-4, w

def test_missing_teacher_is_trained_once_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(I, "check_teacher", lambda *args: 99.0)  # one epoch teaches it nothing
    for seed in (0, 1):
        run(tmp_path / f"r{seed}", teacher_epochs=1, epochs=1, seed=seed)
    told = capsys.readouterr().out.count("training by trades")
    assert len(os.listdir("runs/teachers")) == told == 1

# --- data -------------------------------------------------------------------------------------

INNER = dict(cifar10="cifar-10-batches-py", cifar100="cifar-100-python", svhn="", folder="",
             tinyimagenet="tiny-imagenet-200")
ARCHIVE = dict(cifar10="cifar-10-python.tar.gz", cifar100="cifar-100-python.tar.gz",
               tinyimagenet="tiny-imagenet-200.zip", folder="mine.tar.xz")

def write_cifar(to, files, meta, key, label):
    x, y, names = noise(4 * len(files)), [i % 7 for i in range(4 * len(files))], list("abcdefghij")
    for i, file in enumerate(files):
        part = {"data": x[4 * i:4 * i + 4].reshape(4, -1), label: y[4 * i:4 * i + 4]}
        (to / file).write_bytes(pickle.dumps(part, 2))
    (to / meta).write_bytes(pickle.dumps({key: names}, 2))
    return x[:-4], y[:-4], x[-4:], y[-4:], names

def write_svhn(to):
    x, y = noise(8), np.array([10, 1, 2, 9, 10, 3, 4, 5], np.uint8)
    for name, i in dict(train=slice(5), test=slice(5, 8)).items():
        pytest.importorskip("scipy.io").savemat(to / f"{name}_32x32.mat", dict(
            X=x[i].transpose(2, 3, 1, 0), y=y[i, None]), do_compression=True)
    return x[:5], list(y[:5] % 10), x[5:], list(y[5:] % 10), list("0123456789")

def write_images(to, *names, seed=0):
    """PNG whatever the name, since JPEG would change the pixels; the first one is gray."""
    x = noise(len(names), 8, seed)
    x[0] = x[0, :1]
    for i, name in enumerate(names):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i].transpose(1, 2, 0) if i else x[i, 0]).save(to / name, "PNG")
    return x

def write_tiny(to):
    """As published: unlabelled test images, wnids.txt in no order, labels of val in a file."""
    x = write_images(to, *(f"train/n0{k}/images/{i}.JPEG" for k in (1, 2, 3) for i in (0, 1)))
    x_val = write_images(to, *(f"val/images/val_{i}.JPEG" for i in range(4)), seed=1)
    write_images(to, "test/images/test_0.JPEG")
    (to / "wnids.txt").write_text("n03\nn01\nn02\n")
    (to / "val/val_annotations.txt").write_text("".join(
        f"val_{i}.JPEG\tn0{k}\t0\t0\t8\t8\n" for i, k in enumerate((3, 1, 2, 1))))
    return x, [0, 0, 1, 1, 2, 2], x_val, [2, 0, 1, 0], ["n01", "n02", "n03"]

def write_folder(to, other="test"):
    x = write_images(to / "train", "ant/1.png", "ant/2.png", "bee/0.png", "cow/7.png")
    x_test = write_images(to / other, "bee/a.png", "cow/a.png", seed=1)
    return x, [0, 0, 1, 2], x_test, [1, 2], ["ant", "bee", "cow"]

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
WRITE = dict(
    cifar10=lambda to: write_cifar(to, BATCHES, "batches.meta", "label_names", "labels"),
    cifar100=lambda to: write_cifar(to, ("train", "test"), "meta", "fine_label_names",
    "fine_labels"),
    svhn=write_svhn, tinyimagenet=write_tiny, folder=write_folder)

def publish(name, root):
    """A small data set as published in root/d, its archive in root/new; the truth."""
    inner, new = root / "d" / INNER[name], root / "new"
    for folder in (inner, new):
        folder.mkdir(parents=True)
    truth = WRITE[name](inner)
    if name in ARCHIVE:
        kind = dict(zip="zip", gz="gztar", xz="xztar")[ARCHIVE[name].rpartition(".")[2]]
        made = shutil.make_archive(root / "packed", kind, root / "d", INNER[name] or None)
        shutil.move(made, new / ARCHIVE[name])
    return truth

def load(name, root, place="d", **options):
    return I.load_dataset(name, root / place, download=False, cache=root / "cache", **options)

def agrees(data, truth):
    x, y, x_test, y_test, names = truth
    assert data.classes == names and data.x_train.dtype == data.x_test.dtype == torch.uint8
    assert data.y_train.tolist() == list(y) and data.y_test.tolist() == list(y_test)
    assert np.array_equal(data.x_train.numpy(), x) and np.array_equal(data.x_test.numpy(), x_test)
    return True

@pytest.mark.parametrize("name, place", [("svhn", "d"), ("folder", "d"), ("folder",
    "new/mine.tar.xz")] + [
    (n, p) for n in WRITE if INNER[n] for p in ("d", "d/" + INNER[n], "new", "new/" + ARCHIVE[n])])
def test_published_layout_loads_exactly(name, place, tmp_path):
    truth = publish(name, tmp_path)
    data = load(name, tmp_path, place)
    agrees(data, truth)
    assert data.flip == (name != "svhn")

@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("notes", [True, False])
def test_sorted_tiny_imagenet_val_loads(notes, below, tmp_path):
    publish("tinyimagenet", tmp_path)
    val = tmp_path / "d/tiny-imagenet-200/val"
    for i, label in enumerate(("n03", "n01", "n02", "n01")):
        (val / label / below).mkdir(parents=True, exist_ok=True)
        (val / f"images/val_{i}.JPEG").rename(val / label / below / f"val_{i}.JPEG")
    (val / "images").rmdir()
    if not notes:
        (val / "val_annotations.txt").unlink()
    assert sorted(load("tinyimagenet", tmp_path).y_test.tolist()) == [0, 0, 1, 2]

def test_folder_is_cached_and_renewed_when_files_change(tmp_path, monkeypatch):
    truth = write_folder(tmp_path / "d", "val")
    agrees(load("folder", tmp_path), truth)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        agrees(load("folder", tmp_path), truth)
    Image.new("RGB", (20, 9)).save(tmp_path / "d/train/bee/0.png")  # of another size, too
    data = load("folder", tmp_path)
    assert data.x_train.shape == (4, 3, 8, 8) and not data.x_train[2].any()
    assert load("folder", tmp_path, image_size=16).x_test.shape == (2, 3, 16, 16)

@pytest.mark.parametrize("name", ["cifar10", "svhn", "tinyimagenet"])
def test_missing_data_are_downloaded_once(name, tmp_path, monkeypatch, capsys):
    truth = publish(name, tmp_path)
    site = tmp_path / ("new" if name in ARCHIVE else "d")
    files = [site / file for file in I.PLACES[name][0].split(" and ")]
    sha256 = I.PLACES[name][4] and I.digest(files[0])[:8]
    monkeypatch.setitem(I.PLACES, name, (*I.PLACES[name][:3], site.as_uri(), sha256))
    options = dict(data_dir=tmp_path / "in/here", cache=tmp_path / "cache")
    assert agrees(I.load_dataset(name, **options), truth)
    assert "downloading" in capsys.readouterr().out
    shutil.rmtree(site)
    assert agrees(I.load_dataset(name, **options), truth)

def test_a_download_with_another_hash_is_refused(tmp_path, monkeypatch):
    publish("cifar10", tmp_path)
    site = (tmp_path / "new").as_uri()
    monkeypatch.setitem(I.PLACES, "cifar10", (*I.PLACES["cifar10"][:3], site, "0" * 8))
    with pytest.raises(I.InfoardError, match="hash"):
        I.load_dataset("cifar10", tmp_path / "in", cache=tmp_path / "cache")
    assert not list((tmp_path / "in").iterdir())

@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder with files to damage and the truth of each data set."""
    top = tmp_path_factory.mktemp("whole")
    truth = {name: publish(name, top / name) for name in WRITE}
    shutil.make_archive(top / "folder/new/mine", "tar", top / "folder/d")
    torch.save(trained_looking("tiny").state_dict(), top / "folder/d/t.pt")
    return SimpleNamespace(top=top, truth=truth)

@pytest.mark.parametrize("name, place, file", [
    ("cifar10", "d", "d/cifar-10-batches-py/data_batch_3"), ("cifar10", "new",
    "new/" + ARCHIVE["cifar10"]),
    ("cifar100", "d", "d/cifar-100-python/meta"), ("tinyimagenet", "new",
    "new/" + ARCHIVE["tinyimagenet"]),
    ("svhn", "d", "d/train_32x32.mat"), ("folder", "d", "d/test/bee/a.png"),
    ("folder", "d", "d/train/ant/1.png"), ("folder", "",
    "d/t.pt"),
    ("folder", "new/mine.tar", "new/mine.tar"), ("folder", "new/mine.tar.xz", "new/mine.tar.xz")])
@given(share=st.floats(0, 0.95), cut=st.booleans())
def test_a_damaged_file_is_one_line_or_harmless(whole, tmp_path_factory, name, place, file, share,
    cut):
    root = shutil.copytree(whole.top / name, tmp_path_factory.mktemp("damaged") / name)
    content = bytearray((root / file).read_bytes())
    begin = int(share * len(content))
    content[begin:] = b"" if cut else bytes([content[begin] ^ 0x5a]) + content[begin + 1:]
    (root / file).write_bytes(content)
    try:
        # a tar that is cut between two members looks whole
        data = load(name, root, place) if place else I.load_teacher(str(root / file))
        assert not cut or file.endswith(".tar") or agrees(data, whole.truth[name])
    except I.InfoardError as error:
        assert one_line(error)
    shutil.rmtree(root.parent)

@given(st.tuples(*[st.integers(*ends) for ends in ((1, 4), (5, 9), (5, 9), (0, 4), (0, 999))]),
    st.booleans())
def test_augmented_images_are_windows_of_the_padded_ones(sizes, flip):
    b, h, w, pad, seed = sizes
    x = torch.from_numpy(noise(b, 9, seed)[:, :, :h, :w]).clamp(1)
    out, again = (I.augment(x, torch.Generator().manual_seed(seed), pad, flip) for _ in range(2))
    assert out.shape == x.shape and out.dtype == x.dtype and torch.equal(out, again)
    for picture, frame in zip(out, nn.functional.pad(x, (pad,) * 4), strict=True):
        shifts = [(i, j) for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
        windows = [frame[:, i:i + h, j:j + w] for i, j in shifts]
        assert any(torch.equal(picture, v) or flip and torch.equal(picture,
            v.flip(2)) for v in windows)

@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40))
def test_class_balanced_is_sorted_unique_even_and_fixed(labels, n):
    y = torch.tensor(labels)
    rows = I.class_balanced(y, n)
    assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) == min(n, len(y))
    have, got = (torch.bincount(v, minlength=4) for v in (y, y[rows]))
    assert (got >= torch.minimum(have, got.max() - 1)).all()  # fewer only where there are no more
    assert torch.equal(rows, I.class_balanced(y, n))

def test_shapes_are_fixed_balanced_bytes():
    a, b = I.render_shapes(200, 50), I.render_shapes(200, 50)
    assert torch.equal(a.x_train, b.x_train) and torch.equal(a.x_test, b.x_test)
    assert a.x_train.dtype == torch.uint8 and a.x_train.shape == (200, 3, 32, 32)
    assert torch.bincount(a.y_train).tolist() == [20] * 10 and len(a.classes) == 10

# --- many processes ---------------------------------------------------------------------------

def without_norm(classes=10, size=32):
    """A net whose samples do not see each other."""
    c = [3, 8, 16, 32]
    layers = {f"layer{i}": nn.Sequential(I.conv(c[i], c[i + 1], 3, 2), nn.ReLU()) for i in (1, 2)}
    return I.in_a_row(size, I.conv(3, 8), relu=nn.ReLU(), **layers, head=nn.Linear(32, classes))

SHARED = dict(  # settings of steps that N processes must make as one does
    saad=dict(framework="saad", infoard=False, beta=0.5),
    rslad=dict(infoard=False), kd=dict(asa="uniform", w_rel=1.0), dv=dict(asa="off", mim="dv"),
    vid=dict(asa="off", mim="vid", w_att=0.0), mtard=dict(framework="mtard", infoard=False))

def work_of_a_rank(top, teacher):
    """A few steps in each of SHARED, an evaluation and a run that only rank 1 is told to stop."""
    torch.set_num_threads(1)
    with I.all_ranks("cpu"), pytest.MonkeyPatch.context() as patch:
        rank, ranks = I.world()
        real_attack, real_step = I.Step.attack, I.Run.step
        patch.setitem(I.MODELS, "without_norm", without_norm)
        found = dict(world=torch.tensor([rank, ranks]))
        with patch.context() as quiet:  # starts are drawn by each rank for itself
            quiet.setattr(I.Step, "attack", lambda self, objective, init="": real_attack(
                self, objective, "none"))
            for name, options in SHARED.items():
                cfg = I.Config(**BASE | dict(student="without_norm") | options).resolved()
                torch.manual_seed(7)
                net = without_norm().requires_grad_(False).eval()
                work = I.Run(cfg, SMALL, torch.device("cpu"), dict(teacher=net, teacher_nat=net))
                for _ in range(3):
                    work.step()
                learned = [*work.student.parameters(), *work.parts["critics"].parameters()]
                memory = [work.at["memory"]["w"]] if name == "mtard" else []
                found[name] = torch.cat([p.detach().flatten() for p in learned + memory])
                found[f"{name} means"] = torch.stack(
                    [I.summed(v) / 192 for v in work.at["sums"].values()])
        seen, real_fgsm = [], I.ATTACKS["fgsm"]
        patch.setitem(I.ATTACKS, "fgsm", lambda net, x, y, **options: seen.append(len(x)) or real_fgsm(
            net, x, y, **options))
        result = evaluate(I.load_teacher(teacher), 50, attacks="clean,fgsm,pgd,apgd,spatial",
                          batch_size=8, eps=2 / 255)
        found["attacked"] = torch.tensor([sum(seen)])
        found["evaluation"] = torch.tensor([result[k] or 0.0 for k in (*I.METRICS, "n")])
        torch.save(found, f"{top}/{ranks}-{rank}.pt")
        patch.setattr(I, "AT_END", [lambda run, _: torch.save(
            run.evaluated.state_dict(), f"{top}/net{rank}.pt")])
        for name in ("whole", "broken") if ranks > 1 else ():
            def step(self, name=name):
                real_step(self)
                if (name, rank, self.at["step"]) == ("broken", 1, 3):
                    os.kill(os.getpid(), signal.SIGTERM)
            patch.setattr(I.Run, "step", step)
            options = BASE | dict(out=f"{top}/{name}", val_size=39, batch_size=30, teacher=teacher,
                                  eval_batch=10)
            for _ in range(1 + (name == "broken")):
                try:
                    with pytest.MonkeyPatch.context() as small:
                        small.setattr(I, "render_shapes", lambda: SMALL)
                        I.train(resume=True, **options)
                except SystemExit as stopped:
                    assert stopped.code == 128 + signal.SIGTERM
                    Path(f"{top}/stopped{rank}").write_text("at step 10")

def dying_rank(top, teacher):
    """The command line, whose rank 1 is killed in its second epoch, the first time."""
    real_step = I.Run.step

    def step(self):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and self.rank == 1 and self.at["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real_step(self)
    I.Run.step, I.render_shapes = step, lambda: SMALL
    options = {k: v for k, v in BASE.items() if not isinstance(v, bool)} | dict(
        teacher=teacher, out=f"{top}/died", framework="rslad")
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    leave(I.main([*words, "--no-figures", "--no-progress", "--resume"]))

def leave(code):
    """As infoard.py itself leaves under torchrun."""
    sys.stdout.flush()
    os._exit(code)

def torchrun(call, *options):
    """Two processes that each make a call of a function of this file."""
    where = str(Path(I.__file__).parent)
    env = os.environ | dict(PYTHONPATH=where, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               *options, "--no-python", sys.executable, "-c", f"import test_infoard as t; t.leave(t.{call} or 0)"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)

def test_two_ranks_do_what_one_process_does(lab, tmp_path):
    done = torchrun(f"work_of_a_rank({str(tmp_path)!r}, {lab.teacher!r})")
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    work_of_a_rank(tmp_path, lab.teacher)
    torch.set_num_threads(threads)
    one, first, second = (torch.load(tmp_path / f"{k}.pt") for k in ("1-0", "2-0", "2-1"))
    assert first.pop("world").tolist() == [0, 2] and second.pop("world").tolist() == [1, 2]
    shares = [first.pop("attacked"), second.pop("attacked")]
    assert sum(shares).equal(one["attacked"]) and min(shares) > 0
    for name in first:
        assert first[name].equal(second[name]), name
        near(first[name], one[name], 1e-5)  # float32: the same sums in another order
    assert first["evaluation"].equal(one["evaluation"]) and first["evaluation"][-1] == 50
    logs = [[json.loads(line) for line in (tmp_path / k / "log.jsonl").read_text().splitlines()]
            for k in ("whole", "broken")]
    whole, other = (I.load_tensors(tmp_path / f"{k}/last.pt") for k in ("whole", "broken"))
    assert sorted(p.name for p in tmp_path.glob("stopped*")) == ["stopped0", "stopped1"]
    nets = [torch.load(tmp_path / f"net{rank}.pt") for rank in (0, 1)]
    assert all(v.equal(nets[1][k]) for k, v in nets[0].items())  # batch norm's buffers, too
    assert logs[0][0]["steps"] == 1.0  # of 361 images 360 are seen, and divided by
    results = json.loads((tmp_path / "whole/results.json").read_text())["last"]
    net, xy = I.load_teacher(f"{tmp_path}/whole/last.pt"), I.test_images(SMALL, 40, None)
    again = I.evaluate(net, *xy, attacks="clean,fgsm", batch_size=10, classes=10)
    assert [results[k] for k in ("clean", "fgsm")] == [again[k] for k in ("clean", "fgsm")]
    assert done.stdout.count("2 x cpu") == 3  # of whole, broken and broken again, by rank 0 alone
    for rows in zip(*logs, strict=True):  # what the ranks had summed up is now rank 0's
        near(*(torch.tensor([r[k] for k in list(r)[:-2]]) for r in rows), 1e-6)
    for part in ("model", "critics"):
        assert all(v.equal(other[part][k]) for k, v in whole[part].items())
    assert whole["generators"]["attack"].equal(other["generators"]["attack"])
    assert not whole["generators"]["attack"][0].equal(whole["generators"]["attack"][1])

def test_death_of_a_rank_is_one_line_and_costs_an_epoch_at_most(lab, tmp_path):
    done = torchrun(f"dying_rank({str(tmp_path)!r}, {lab.teacher!r})", "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if "infoard: error" in line]
    assert len(told) == 1 and "rank 0" in told[0] and "with --resume" in told[0]
    assert "from epoch 2" in done.stdout and (tmp_path / "died/results.json").exists()

def test_resume_with_more_ranks_keeps_the_common_draws(lab, tmp_path, monkeypatch):
    cfg = I.Config(**BASE, framework="natural").resolved()
    work = I.Run(cfg, SMALL, torch.device("cpu"), dict(teacher=None))
    work.step()
    I.save(tmp_path / "last.pt", work.state())
    other = I.Run(cfg, SMALL, torch.device("cpu"), dict(teacher=None))
    other.rank, fresh = 1, other.generators["attack"].get_state()
    other.load(tmp_path / "last.pt")
    assert other.generators["data"].get_state().equal(work.generators["data"].get_state())
    assert other.generators["attack"].get_state().equal(fresh)
    assert other.at["position"] == 64 and not other.at["sums"]["loss"]

def test_batch_must_be_a_multiple_of_the_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(I, "world", lambda: (0, 3))
    assert I.main(["--out", str(tmp_path), "--no-figures"]) == 2
    assert "multiple of 3" in capsys.readouterr().err
    monkeypatch.setattr(I, "world", lambda: (0, 1))
    assert I.main(["--out", str(tmp_path), "--sync-bn", "--device", "cpu"]) == 2

# --- speed ------------------------------------------------------------------------------------

def two_steps(*around, **options):
    """(a Bench, what its student has learned) after two steps."""
    cfg = I.Config(**BASE | dict(teacher_arch="tiny", batch_size=16, steps=3) | options).resolved()
    torch.manual_seed(3)
    work = extras.Bench(cfg, I.tiny().eval().requires_grad_(False), SMALL, torch.device("cpu"), *around)
    assert work.step() > 0 and work.step() > 0
    assert all(p.requires_grad for p in work.run.student.parameters())
    return work, torch.cat([p.detach().flatten() for p in work.run.student.parameters()])

@each("framework", ["at", "trades", "rslad", "adaad", "mtard", "igdm", "saad"])
def test_ordinary_step_is_the_same_mathematics(framework):
    seen, real = [], I.Step.attack

    def attack(step, objective, **options):
        def watched(z, *rows):
            seen.append((z.is_contiguous(), next(step.student.parameters()).requires_grad))
            return objective(z, *rows)
        real(step, watched, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I.Step, "attack", attack)
        quick, fast = two_steps(framework=framework, infoard=False)
        plain, slow = two_steps(extras.ordinary, True, framework=framework, infoard=False)
    near(fast, slow, 1e-4)  # float32 sums in another order, twice through a normalisation
    assert seen == [(False, False)] * 6 + [(True, True)] * 6
    for work, flat in ((quick, False), (plain, True)):
        for net in (work.run.student, work.run.nets["teacher"]):
            assert net.layer1[0].weight.is_contiguous() == flat

def test_effects_take_one_thing_away(tmp_path):
    found = extras.without(I.Config(compile=False).resolved())
    assert [k for k, (cfg, *_) in found.items() if cfg.amp == "off"] == ["ordinary", "fp32"]
    assert [k for k, (cfg, *_) in found.items() if cfg.compile] == ["compiled"]
    for name, *now in (("nchw", True, False), ("unfrozen", False, True), ("ordinary", True, True)):
        _, around, *layout = found[name]
        net = tiny_net().train()
        with around():
            assert I.to_float(SMALL.x_test[:2], "cpu").is_contiguous() == now[0] == bool(layout)
            with I.frozen_eval(net):
                assert next(net.parameters()).requires_grad == now[1] and not net[1].training
        assert net[1].training and not I.to_float(SMALL.x_test[:2], "cpu").is_contiguous()

@each("framework", ["rslad", "adaad"])
@each("infoard", [False, True])
def test_half_precision_teaches_the_same(framework, infoard):
    """bf16 keeps 8 bits: each product is off by up to 0.4%, a sum of many by less."""
    _, start = two_steps(framework=framework, infoard=infoard, lr=0.0)
    moves = [two_steps(framework=framework, infoard=infoard, amp=amp)[1] - start
             for amp in ("off", "bf16")]
    assert F.cosine_similarity(*moves, dim=0) > 0.99
    near(moves[1].norm(), moves[0].norm(), 0.02)

def test_operations_are_counted(lab):
    """Two for each multiplication of convolutions and of the head; backward to the input alone
    costs as much again, backward to weights and inputs twice as much."""
    x, pixels = torch.rand(4, 3, 32, 32), 0
    net = without_norm()
    for size, layer in ((32, net.conv1), (16, net.layer1[0]), (8, net.layer2[0])):
        pixels += size * size * layer.weight.numel()
    forward = 2 * 4 * (pixels + net.linear.weight.numel())
    with extras.Counter() as counter:
        I.predict(net, x)
    assert counter.flops == forward
    with extras.Counter() as counter, I.frozen_eval(net):
        z = x.requires_grad_()
        torch.autograd.grad(net(z).sum(), z)
    assert counter.flops == 2 * forward
    x.requires_grad_(False)
    with extras.Counter() as counter:
        net(x).sum().backward()
    first = 2 * 4 * 32 * 32 * net.conv1.weight.numel()  # the images need no gradient
    assert counter.flops == 3 * forward - first
    with extras.Counter() as counter:
        z = nn.Conv2d(8, 8, 3, groups=8)(torch.rand(2, 8, 6, 6, requires_grad=True))
        passed = counter.flops
        z.sum().backward()
    assert passed == 2 * 2 * 8 * 4 * 4 * 9 and counter.flops == 3 * passed

def test_bytes_are_counted_while_they_are_held():
    d = torch.zeros(7, 9)
    with extras.Counter() as counter:
        a = torch.zeros(1000) + 1
        del a
        b = torch.ones(500)
        c = b.view(50, 10)[3:].add_(1)  # no new bytes
        assert counter.live == 2000 and counter.peak == 8000
        del b, c
        assert counter.live == 0
        d.add_(1), d.t(), d[1:]
        assert counter.live == 0
        torch.ones(3000)
    assert counter.peak == 12000

def test_bench_measures_every_kind_of_step(tmp_path, monkeypatch, capsys):
    given = dict(student="tiny", teacher_arch="tiny", steps=4, batch_size=8, device="cpu")
    peaks = [2e10, 3e10]
    monkeypatch.setattr(extras, "peak", lambda device, dtype: peaks[dtype != torch.float32])
    extras.run_bench(rounds=1, framework="rslad,mtard", amp="bf16", out=str(tmp_path), **given)
    content = json.loads((tmp_path / "bench.json").read_text())
    rows, kinds = content["rows"], ["ordinary", "plain", "infoard", "schedule"]
    assert list(rows) == [f"{name}/{kind}" for name in ("rslad", "mtard") for kind in kinds]
    flops = [rows[f"rslad/{kind}"]["flops"] for kind in kinds]
    assert flops[0] == flops[1] <= flops[2] and flops[3] < flops[1]
    for name, r in rows.items():
        near(r["images_per_s"], 8000 / r["ms"])
        near(r["seconds"], torch.tensor([r["ms"] / 1000]))
        near(r["share"], r["flops"] / r["ms"] * 1000 / peaks["ordinary" not in name])
        assert 0 < r["mib"] < 100
    assert rows["rslad/plain"]["faster"] == rows["rslad/ordinary"]["ms"] / rows["rslad/plain"]["ms"]
    assert rows["rslad/ordinary"]["faster"] == rows["mtard/plain"]["cost"] == 1
    told = capsys.readouterr().out
    assert extras.costs(rows) in told and content["about"]["machine"] in told and "steps: 4" in told

def test_growth_in_operations_is_linear_in_batch_and_steps(tmp_path, capsys):
    given = dict(student="tiny", teacher_arch="tiny", steps=4, batch_size=8, device="cpu")
    extras.run_growth(rounds=1, out=str(tmp_path), **given)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    flops = {k.removeprefix("rslad/"): r["flops"] for k, r in rows.items()}
    assert list(flops) == [*(f"batch {n}" for n in (2, 4, 8, 16)), *(f"{n} steps" for n in (1, 2, 4, 8))]
    pairs = {n: flops[f"batch {n}"] - n * flops["batch 2"] / 2 for n in (4, 8, 16)}
    share = {n: gap / flops[f"batch {n}"] for n, gap in pairs.items()}
    assert all(0 <= v < 0.02 for v in share.values())  # score matrices grow with the square
    per_step = flops["2 steps"] - flops["1 steps"]
    assert [flops[f"{n} steps"] - flops["1 steps"] for n in (4, 8)] == [3 * per_step, 7 * per_step]
    assert rows["rslad/batch 16"]["images_per_s"] > 0 and "plain" not in capsys.readouterr().out

def test_curve_sets_accuracy_beside_time(tmp_path, capsys):
    for cell, ms, steps_lo, seeds in (("slow", 20.4, 0, (30.0, 32.0)), ("quick", 8.0, 1, (29.0,))):
        rows = {f"rslad/{k}": dict(ms=ms * f) for k, f in dict(plain=9, infoard=1, schedule=1).items()}
        I.save(tmp_path / cell / "bench.json", dict(rows=rows))
        for s, worst in enumerate(seeds):
            I.save(tmp_path / cell / f"s{s}" / "results.json", dict(best=dict(clean=50.0, worst=worst)))
            settings = dict(steps_lo=steps_lo, infoard=True, framework="rslad")
            I.save(tmp_path / cell / f"s{s}" / "config.json", dict(settings=settings))
    assert I.main(["curve", str(tmp_path)]) == 0
    lines = [[c.strip() for c in line.split("|")[1:-1]]
             for line in (tmp_path / "curve.md").read_text().splitlines()]
    assert lines[2:] == [["quick", "8", "50.00", "29.00", "1"],
                         ["slow", "20", "50.00 ± 0.00", "31.00 ± 1.41", "2"]]
    assert (tmp_path / "figures/curve.png").stat().st_size > 5000
    assert I.main(["curve", str(tmp_path / "figures")]) == 2

@each("limit", [0, 1, 5])
def test_batches_are_halved_until_they_fit(limit):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 32 * 32, 10)
        def forward(self, x):
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.linear(x.flatten(1))
    net, x, y = Small(), SMALL.x_test[:37], SMALL.y_test[:37]
    if not limit:
        with pytest.raises(torch.OutOfMemoryError):
            I.correct(net, x, y)
    else:
        truth = net.linear(x.flatten(1) / 255).argmax(1) == y
        assert I.correct(net, x, y).equal(truth) and I.correct(net, x[:0], y[:0]).numel() == 0

def test_results_do_not_depend_on_the_attacks_before(lab):
    alone, after = (evaluate(lab.net, 40, attacks=names, eps=2 / 255, seed=5)
                    for names in ("pgd", "clean,fgsm,cw,pgd5_cw,pgd"))
    assert all(alone[k] == after[k] for k in ("clean", "pgd_sat", "pgd_trades"))
    assert after["pgd5_cw"] <= min(after["pgd_sat"], after["clean"])

def test_cascade_attacks_only_what_is_left():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    net[1].weight.data = torch.stack([-torch.ones(12), torch.ones(12)])
    x, y, seen = torch.full((6, 3, 2, 2), 0.5), torch.tensor([1, 1, 1, 1, 0, 1]), []

    def flip(which):
        def attack(net, z, y, **options):
            seen.append(len(z))
            return torch.where((torch.arange(len(z)) % which == 0).view(-1, 1, 1, 1), -z, z)
        return attack
    x_adv = D.cascade(flip(2), flip(3), flip(1), flip(1))(net, x, y)
    assert seen == [5, 2, 1]  # one is wrong from the start, three fall, then one, then the last
    assert not (net(x_adv).argmax(1) == y).any() and (x == 0.5).all()

def test_lite_is_a_set_of_options(desk, monkeypatch):
    seen = []
    monkeypatch.setitem(I.VERBS, "train", functools.wraps(I.train)(lambda **given: seen.append(given)))
    assert I.main(["--lite"]) == I.main(["--steps", "7", "--lite", "--student", "resnet18"]) == 0
    assert seen[0] == I.parse("train", I.LITE.split()) and len(seen[0]) == 5
    assert seen[1] == seen[0] | dict(steps=7, student="resnet18")
    assert I.Config(**seen[1]).resolved().steps_lo == 1 and I.Config().steps_lo == 0

# --- command line -----------------------------------------------------------------------------

FILES = dict(  # files that are no checkpoint of a net we know
    deepmind={"init_conv.weight": X, "logits.weight": X}, list=[1, 2], none={}, one=dict(delta=X),
    torchvision={"conv1.weight": X, "layer1.0.conv1.weight": X, "fc.weight": X}, module=nn.Linear(2,
    2),
    numbers={0: X, 1: X}, headless={k: v for k,
    v in I.tiny().state_dict().items() if "linear" not in k},
    three=I.tiny(3).state_dict(), stranger=I.tiny().state_dict(), text=b"hello", empty=b"",
    html=b"<!DOCTYPE html>")
NETS = """import infoard, torch
class probs(torch.nn.Module):
    def forward(self, x): return x.new_full((len(x), 10), 0.1)
good, three, text, number = infoard.tiny, lambda: infoard.tiny(3), lambda: "net", 5
"""

@pytest.fixture
def desk(lab, tmp_path, monkeypatch):
    """A current folder with all that the command lines below name; there is no network."""
    def offline(*args, **options):
        raise OSError("no route to host")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setattr(I, "render_shapes", lambda *args, **options: SMALL)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setitem(sys.modules, "robustbench", None)
    for name, content in FILES.items():
        torch.save(content, f"{name}.pt")
        if isinstance(content, bytes):
            Path(f"{name}.pt").write_bytes(content)
    shutil.copytree(lab.top / "done", "done")
    Path("nets.py").write_text(NETS)
    publish("cifar10", tmp_path / "listed")
    Path("listed/d/cifar-10-batches-py/data_batch_2").write_bytes(pickle.dumps([1, 2]))
    write_folder(tmp_path / "dogs")
    write_images(tmp_path / "dogs/test", "dog/1.png")
    return tmp_path

REFUSED = """trian > choose from .*train ; --dataset cifar > choose from .*cifar10 ;
--student resnet19 > resnet18.*mobilenet_v2 ; --student wrn_11_2 > wrn_34_10 ;
--framework rslda > choose from .*rslad ; --attacks clean,pgdd > choose from .*pgd ;
--asa teachr > --asa ; --mim dvv > --mim ; --eps 2 > 8/255 ; --eps abc > --eps ; --eps nan > --eps ;
--eps 1/0 > --eps ; --epochs 0 > --epochs ; --steps-lo 9 > --steps-lo ; --device gpu > --device ;
--device cuda > --device ; --resum > resum ; --out text.pt/run > text.pt ;
--teacher nowhere.pt > no checkpoint file at nowhere ; --teacher done > no checkpoint file ;
--teacher three.pt > 3 classes, the data have 10 ; --teacher stranger.pt > chance is 10 ;
--teacher stranger.pt --teacher-norm imagenet > cifar100 ;
--teacher deepmind.pt > DeepMind.*robustbench ;
--teacher torchvision.pt > torchvision.*module:factory ; --teacher list.pt > holds code or no dict ;
--teacher module.pt > holds code ; --teacher none.pt > unknown ; --teacher one.pt > unknown ;
--teacher numbers.pt > numbers.pt ; --teacher headless.pt > headless ;
--teacher text.pt > truncated ;
--teacher empty.pt > truncated ; --teacher html.pt > truncated ;
--teacher nets:probs > probabilities ; --teacher nets:text > nn.Module ;
--teacher nets:three > 3 classes, the data have 10 ; --teacher nets:number > nets:number ;
--teacher nets:absent > absent ; --teacher nothing_there:net > nothing_there ;
--teacher robustbench:Nobody2020 > robustbench ;
--dataset cifar10 --data-dir void --no-download > cifar-10-python.tar.gz or cifar-10-batches-py.* ;
--dataset cifar10 --data-dir void > void.*no route.*cifar-10-batches-py ;
--dataset cifar100 --data-dir void > void.*no route.*cifar-100-python ;
--dataset svhn --data-dir void > void.*no route.*train_32x32.mat ;
--dataset tinyimagenet --data-dir void > void.*no route.*tiny-imagenet-200 ;
--dataset folder --data-dir void > void.*train and test ;
--dataset cifar10 --data-dir listed/d > listed ; --dataset folder --data-dir dogs > dog ;
eval > CKPT ; eval nowhere.pt > nowhere ; eval stranger.pt > --dataset ;
eval text.pt --dataset shapes > truncated ; eval done/sheet.pt > sheet.pt ;
eval done/last.pt --attacks pgdd > choose from .*pgd ; export text.pt > truncated ;
export done/sheet.pt > sheet.pt ; tables nowhere > nowhere ; figures nowhere > nowhere ;
figures done > pip install matplotlib ;
eval done/last.pt --attacks apgd > pip install pyautoattack"""

@pytest.mark.parametrize("line, why", [row.split(" > ") for row in re.split(r"\s;\s", REFUSED)])
def test_bad_input_is_one_line_and_exit_code_two(desk, line, why, capsys, monkeypatch):
    if line == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")

    def too_late(*args):
        raise AssertionError("training has begun, or there is no end")
    monkeypatch.setattr(I.Run, "step", too_late)
    if "pip install" in why:
        monkeypatch.setitem(sys.modules, why.split()[-1], None)
    usual, argv = signal.signal(signal.SIGALRM, too_late), line.split()
    signal.alarm(10)
    if argv[0].startswith("--"):
        plain = "--teacher" not in line and "--framework" not in line
        argv += ["--no-figures"] + ["--framework", "natural"] * plain
    try:
        code, err = I.main(argv), capsys.readouterr().err
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
    assert code == 2 and err.startswith("infoard: error: ") and one_line(err)
    assert re.search(why, err), err

def parsed(argv):
    """The Config that the command line makes of argv."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(I.VERBS, "train", lambda **given: got.append(I.Config(**given)))
        got = []
        assert I.main(argv) == 0
    return got[0]

def test_radius_is_a_fraction_or_a_number():
    assert abs(parsed(["--eps", "8/255"]).eps - 0.0313725) < 1e-7  # seven decimals
    assert parsed(["--eps", "0.0313725"]).eps == 0.0313725

def values(f):
    kinds = {bool: st.booleans(), float: st.floats(0.01, 0.99), int: st.integers(2, 9)}
    choices, text = f.metadata["choices"], st.text("ab_./:", min_size=1)
    return st.sampled_from(choices) if choices else kinds.get(f.type, text)

@given(st.data())
@settings(max_examples=40)
def test_every_setting_is_an_option_and_round_trips(data):
    fields = data.draw(st.lists(st.sampled_from(dataclasses.fields(I.Config)),
        unique_by=lambda f: f.name))
    given, argv = {f.name: data.draw(values(f), f.name) for f in fields}, []
    for name, value in given.items():
        flag = name.replace("_", "-")
        on = f"--{flag}" if value else f"--no-{flag}"
        argv += [on] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert parsed(argv) == I.Config(**given)

@pytest.mark.parametrize("verb", I.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        I.main([verb, "--help"])
    assert stopped.value.code == 0 and len(capsys.readouterr().out) > 100

def test_eval_of_a_checkpoint_repeats_its_results(desk, lab):
    line = "eval done/last.pt --attacks clean,fgsm,pgd --eval-subset 40 --device cpu --out e"
    assert I.main(line.split()) == 0
    again, was = json.loads(Path("e/eval.json").read_text()), lab.results["last"]
    assert [again[k] for k in I.METRICS] == [was[k] for k in I.METRICS]

@pytest.mark.parametrize("name", ["stranger.pt", "nets:good"])
def test_eval_takes_a_strangers_net(desk, name, capsys):
    assert I.main(f"eval {name} --dataset shapes --attacks clean --eval-subset 20".split()) == 0
    assert f"{name}:" in capsys.readouterr().out

def test_tables_show_best_and_last(desk, capsys):
    assert I.main(["tables", "."]) == 0
    cells = {c.strip() for c in capsys.readouterr().out.split("|")}
    assert {"best (%)", "last (%)", "done", "pgd_sat"} <= cells

def write_results(folder, cells):
    """cells: {path: worst accuracy of best}, in the form of finished runs."""
    for path, worst in cells.items():
        best = dict(clean=80.0, worst=worst, n=500, warnings=["w"] * (worst < 10))
        I.save(folder / path / "results.json", dict(best=best, last=best | dict(worst=1.5 * worst,
                                                                                warnings=["v"])))

def test_tables_give_mean_deviation_and_paired_gain(tmp_path, capsys):
    write_results(tmp_path, {
        "T1/at/plain/s0": 20.0, "T1/at/plain/s1": 30.0, "T1/at/infoard/s0": 21.0,
        "T1/at/infoard/s1": 34.0, "T1/at/infoard/s2": 99.0, "T1/ard/infoard/s0": 5.0, "s7": 1.0})
    I.save(tmp_path / "published/at/x/results.json", dict(best=dict(aa=45.83, n=10000)))
    extras.run_tables(str(tmp_path))
    text = (tmp_path / "tables.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = {c[0]: c[1:] for line in text.split("\n\n")[0].splitlines()
            if (c := [v.strip() for v in line.strip("| ").split("|")])}
    assert list(rows)[2:] == ["s7", "T1/ard/infoard", "T1/at/plain", "T1/at/infoard",
                              "published/at/x"]
    assert rows["best (%)"] == ["clean", "aa", "worst", "gain", "n", "seeds"]
    assert rows["T1/at/plain"] == ["80.00 ± 0.00", "-", "25.00 ± 7.07", "-", "500", "2"]
    # s0: +1, s1: +4; the seed without a partner counts in the mean, not in the gain
    assert rows["T1/at/infoard"][2:4] == ["51.33 ± 41.79", "2.50 ± 2.12"]
    assert rows["published/at/x"] == ["-", "45.83", "-", "-", "10000", "1"]
    assert "77.00 ± 62.68" in text and "3.75 ± 3.18" in text  # of last
    assert text.count("masked") == 2 and "T1/ard/infoard/s0: w" in text
    lines = [json.loads(v) for v in (tmp_path / "tables.jsonl").read_text().splitlines()]
    seeds = {row["cell"]: row["seeds"] for row in lines}["T1/at/plain"]
    assert {k: v["best"]["worst"] for k, v in seeds.items()} == {"s0": 20.0, "s1": 30.0}
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count("tabular") == 4 and r"25.00 $\pm$ 7.07" in latex and r"best (\%)" in latex
    assert all(line.count("&") in (0, 5, 6) for line in latex.splitlines())

def test_a_report_warns_of_masked_gradients(tmp_path, capsys):
    for name, warnings in dict(a=[], b=["w"]).items():
        result = dict(clean=80.0, aa=None, worst=9.0, n=5, warnings=warnings)
        I.save(tmp_path / name / "results.json", dict(best=result))
        I.report(name, result)
    told = "a:  clean 80.00  worst 9.00\nb:  clean 80.00  worst 9.00\nwarning, gradients may be masked: "
    assert capsys.readouterr().out == told + "w\n"
    extras.run_tables(str(tmp_path))
    assert re.findall("warning, gradients may be masked: (.*)", capsys.readouterr().out) == ["b: w"]

@given(ints(2, 30), seeds, st.floats(-5, 5))
def test_intervals_of_differences_are_students(n, seed, shift):
    from scipy import stats
    values = (shift + rand(n, seed=seed)).tolist()
    mean, half = extras.difference(values)
    low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
    near(mean, (low + high) / 2)
    near(half, (high - low) / 2, 0.02 * (high - low) / 2 + 1e-9)  # quantiles of three digits

def test_gains_are_paired_by_seed(tmp_path, capsys):
    write_results(tmp_path, {
        "T2/plain/s0": 20.0, "T2/plain/s1": 30.0, "T2/plain/s2": 25.0, "T2/one/s1": 33.0,
        "T2/asa/s0": 21.0, "T2/asa/s1": 32.0, "T2/asa/s2": 28.0, "T2/asa/s3": 99.0, "T1/at/x/s0": 1.0,
        "T2/uniform/s2": 23.0})
    for file in tmp_path.glob("T2/uniform/*/results.json"):  # without validation
        results = json.loads(file.read_text())
        I.save(file, results | dict(last=results["best"]))
    extras.run_compare(str(tmp_path))
    last, best, _, uniform = (tmp_path / "compare.md").read_text().split("\n\n")
    assert best in capsys.readouterr().out
    rows = {c[0]: c[1:] for line in best.splitlines() if (c := [v.strip() for v in line.strip("| ").split("|")])}
    assert list(rows)[2:] == ["T2/asa", "T2/one", "T2/uniform"]
    assert rows["gain of best on plain (points)"][-2:] == ["n", "seeds"]
    # +1, +2, +3: mean 2, sd 1, 4.30/sqrt(3) times that; a seed without a partner does not count
    assert rows["T2/asa"] == ["+0.00 ± 0.00", "+2.00 ± 2.48", "500", "3"]
    assert rows["T2/one"] == ["+0.00", "+3.00", "500", "1"] and  "+3.00 ± 3.72" in last
    assert last.startswith("| gain of last on plain") and "on uniform" in uniform and uniform.count("| +5.00 ") == 1 and "T2/plain" in uniform
    assert np.array(Image.open(tmp_path / "figures/gains.png").convert("L")).std() > 5
    for file in tmp_path.rglob("results.json"):
        I.save(file, dict.fromkeys(("last", "best"), json.loads(file.read_text())["best"]))
    extras.run_compare(str(tmp_path))
    text = (tmp_path / "compare.md").read_text()
    assert "gain of last on plain" in text and "best" not in text  # they are the same

@given(st.lists(st.dictionaries(st.integers(0, 4), st.floats(-5, 5), min_size=1), min_size=2, max_size=4))
def test_a_pooled_gain_is_the_mean_over_cells_of_each_seed(gains):
    common = set.intersection(*map(set, gains))  # the seeds that all cells have
    cells = {f"T1/{b}/infoard": {f"s{i}": dict(n=10, worst=v, clean=-v) for i, v in row.items()}
             for b, row in enumerate(gains)}
    alone = dict(s0=dict(n=10, worst=99.0))
    found = extras.pooled(cells | {"T2/x/infoard": alone, "T1/0/other": alone})
    assert list(found) == [f"T1/*/infoard ({len(gains)})"] * bool(common)  # no other table, no other cell
    for means in found.values():
        assert set(means) == {f"s{i}" for i in common}
        for i in common:
            mean = sum(row[i] for row in gains) / len(gains)
            near(torch.tensor([means[f"s{i}"][k] for k in ("worst", "clean")]), torch.tensor([mean, -mean]), 1e-6)

def test_pooled_gains_stand_in_the_table(tmp_path):
    write_results(tmp_path, {
        "T1/a/plain/s0": 20.0, "T1/a/infoard/s0": 21.0, "T1/b/plain/s0": 10.0, "T1/b/infoard/s0": 13.0,
        "T1/a/plain/s1": 20.0, "T1/a/infoard/s1": 23.0, "T1/b/plain/s1": 10.0, "T1/b/infoard/s1": 15.0})
    rows, lines = extras.gains(extras.read(extras.finished(str(tmp_path))), "best")
    # 2 and 4: mean 3, sd 1.41, 12.71/sqrt(2) times that
    near(torch.tensor(rows["T1/*/infoard (2)"]["worst"]), torch.tensor([3.0, 12.71]), 1e-6)
    assert ["T1/*/infoard (2)", "+3.00 ± 12.71", "500", "2"] == [lines[-1][0], lines[-1][-3], *lines[-1][-2:]]

def test_what_eval_adds_is_compared_where_it_is_alike(tmp_path, capsys):
    write_results(tmp_path, {f"{cell}/s{i}": v for i in range(5) for cell, v in dict(plain=20.0, asa=21.0).items()})
    one = dict(n=9, ci95={}, warnings=[], checkpoint="x/last.pt", settings=dict(eps=0.1))
    later = [  # s1: other attacks inside the ball; s2: other images; s3: another radius; s4: another epoch
        (dict(cw=5.0, worst=5.0), dict(cw=7.0, worst=7.0, warnings=["w"])),
        (dict(cw=5.0, worst=5.0), dict(cw=8.0, apgd=6.0, worst=6.0)),
        (dict(cw=5.0, worst=5.0), dict(cw=50.0, worst=50.0, n=8)),
        (dict(cw=5.0, worst=5.0), dict(cw=50.0, worst=50.0, settings=dict(eps=0.2))),
        (dict(cw=5.0, worst=5.0), dict(cw=50.0, worst=50.0, checkpoint="y/best.pt"))]
    for i, pair in enumerate(later):
        for cell, found in zip(("plain", "asa"), pair, strict=True):
            I.save(tmp_path / cell / f"s{i}/eval.json", one | found)
    results = extras.read(extras.finished(str(tmp_path)))
    assert extras.paired(results, "eval", "plain") == dict(
        asa=dict(s0=dict(n=9, cw=2.0, worst=2.0), s1=dict(n=9, cw=3.0)))
    extras.run_compare(str(tmp_path))
    assert "gain of eval on plain" in (tmp_path / "compare.md").read_text()
    extras.run_tables(str(tmp_path))
    text = (tmp_path / "tables.md").read_text()
    row = next(line for line in text[text.index("| eval (%)"):].splitlines() if line.startswith("| asa"))
    assert "| 2.00 " in row and "asa/s0: w" in text  # the gain of s0 alone, and its warning

def test_what_is_outside_the_ball_is_no_part_of_worst(tmp_path, capsys):
    write_results(tmp_path, {"a/plain/s0": 20.0, "a/mid/s0": 21.0, "a/more/s0": 22.0})
    for cell, more in dict(mid=dict(psnr=15.0, pgd_l2=3.0), more=dict(bim=30.0)).items():
        file = tmp_path / "a" / cell / "s0/results.json"
        results = json.loads(file.read_text())
        for r in results.values():
            r |= more
        I.save(file, results)
    extras.run_compare(str(tmp_path))  # and the figure copes with a cell that has no `worst`
    found = extras.paired(extras.read(extras.finished(str(tmp_path))), "best", "plain")
    assert found["a/mid"]["s0"]["worst"] == 1 and "worst" not in found["a/more"]["s0"]

def test_comparing_needs_a_plain_partner(tmp_path, capsys):
    write_results(tmp_path, {"a/plain/s0": 1.0, "a/infoard/s1": 1.0})
    assert I.main(["compare", str(tmp_path)]) == 2
    assert "no cell below" in capsys.readouterr().err

def test_attention_of_a_net_beside_itself_and_under_no_attack():
    net, x = I.tiny().eval(), rand(6, 3, 32, 32).float()
    hooks = sum(len(m._forward_hooks) for m in net.modules())
    same = extras.alike(net, net, x, x)
    for name, cosines in same.items():
        assert cosines.shape == (6,) and (cosines <= 1 + 1e-5).all()
        assert (cosines > 1 - 1e-5).all() == ("another" not in name)
    other = extras.alike(net, I.build_model("tiny_wide"), x, rand(6, 3, 32, 32, seed=1).float())
    assert len(set(torch.stack(list(other.values())).mean(1).tolist())) == 5  # all pairs differ
    assert sum(len(m._forward_hooks) for m in net.modules()) == hooks  # taps are closed again

def test_attention_is_compared_stage_by_stage():
    student, teacher = I.tiny().eval(), I.build_model("tiny_wide").eval()
    x, x_adv = rand(5, 3, 32, 32).float(), rand(5, 3, 32, 32, seed=1).float()
    def maps(net, images):  # the last map at each of three resolutions, by hand
        found, f = [], images
        for name, layer in net.named_children():
            f = layer(f)
            if name in ("relu", "layer1", "layer3"):
                found.append(F.normalize(f.square().sum(1).flatten(1)))
        return [F.normalize(m - m.mean(1, keepdim=True), dim=1) for m in found]
    s, s_adv, t, t_adv = maps(student, x), maps(student, x_adv), maps(teacher, x), maps(teacher, x_adv)
    pairs = {"S(x), S(x')": (s, s_adv), "S(x), T(x)": (s, t), "S(x'), T(x)": (s_adv, t),
             "S(x'), T(x')": (s_adv, t_adv), "S(x), T(another)": (s, [m.roll(1, 0) for m in t])}
    for name, (a, b) in pairs.items():
        cosines = torch.stack([(u * v).sum(1) for u, v in zip(a, b, strict=True)]).mean(0)
        near(extras.alike(student, teacher, x, x_adv)[name], cosines, 1e-5)

def test_attention_of_finished_runs(desk, capsys):
    assert I.main("attention . --eval-subset 20 --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert "| done" in out and "S(x'), T(x)" in out and out.strip() == Path("attention.md").read_text().strip()

@pytest.mark.parametrize("names", [[""], ["x_1/only_best"], ["a/plain", "a/infoard"]])
def test_tables_of_few_runs_are_plain(names, tmp_path, capsys):
    for name in names:
        seen = dict(aa=45.83, n=10000)
        I.save(tmp_path / name / "results.json", dict(best=seen, last=seen))
    extras.run_tables(str(tmp_path))
    out = capsys.readouterr().out
    assert "best (%)" in out and "last (%)" not in out and "seeds" not in out and "gain" not in out
    tex = (tmp_path / "tables.tex").read_text()
    assert names[0][:2] != "x_" or r"x\_1/only\_best" in tex

SCRIPT = Path(I.__file__).with_name("reproduce.sh")
STUB = """#!/bin/bash
trap 'sleep 0.5; echo saved >> log; exit ${STATUS:-143}' TERM
echo "$@" >> log
case "$*" in
    */ard/plain/s1*) [ -z "$FAIL" ] || exit 2 ;;
    *rslad/infoard*) mkdir -p runs/tables/smoke/{T1/{rslad,at,trades}/{plain,infoard},T2,T4/{at,trades}} ;;
    *rslad/plain/s1*) [ -z "$SLOW" ] || for i in {1..100}; do sleep 0.1; done ;;
esac
"""

@pytest.fixture
def shell(tmp_path):
    """A copy of reproduce.sh with an interpreter that only writes down what it is asked to do."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    for name, to in {"reproduce.sh": "reproduce.sh", "requirements.txt": ".venv/installed"}.items():
        shutil.copy(SCRIPT.with_name(name), tmp_path / to)
    shutil.copy(SCRIPT.with_name("requirements.txt"), tmp_path)
    (tmp_path / "runs/tables/smoke").mkdir(parents=True)
    return lambda *words, **env: subprocess.Popen(
        ["bash", "reproduce.sh", *words], cwd=tmp_path,
        env=os.environ | dict(FAIL="", SLOW="") | env)

@pytest.mark.parametrize("fail", ["", "1"])
def test_a_failing_cell_does_not_stop_the_others(shell, tmp_path, fail):
    assert shell("tables", "smoke", "--data-dir", "/a b", FAIL=fail).wait(60) == len(fail)
    log = (tmp_path / "log").read_text().splitlines()
    assert len(log) == 4 + 70 + 1 and log[-1] == "infoard.py tables runs/tables/smoke"
    assert all("--data-dir /a b" in line for line in log[:-1]) and len(set(log)) == 71

@pytest.mark.parametrize("part, teachers, students", [
    ("", 6, 14 + 8 * 2 + 3 + 2 + 3 * 2 + 2 + 2 * 2 + 2), ("first", 1, 5)])
def test_evidence_and_lite_run_their_grids(shell, tmp_path, part, teachers, students):
    there, parts = tmp_path / "runs/evidence", "T1 controls teacher attacks adaad longer size32"
    for name in ("controls/plain", "controls/infoard", "T1/adaad/plain", "T1/adaad/radii2",
                 "longer/adaad/infoard", "size32/rslad/plain"):
        (there / name / "s0").mkdir(parents=True)  # what the stub does not make
    (there / "adaad").mkdir()
    assert shell("evidence", *part.split(), "--data-dir", "/a b").wait(60) == 0
    log = (tmp_path / "log").read_text().splitlines()
    runs = [line for line in log if "--resume" in line]
    cells = [re.search(r"--out runs/evidence/(\S+)/(s\d+)", line).groups() for line in runs]
    assert len(set(cells)) == len(runs) == teachers + students * 3 + 2 * 3 * (not part)
    assert part or max(seed for cell, seed in cells if "teachers" not in cell) == "s5"
    assert [line.split()[-1] for line in log if " compare " in line] == [
        f"runs/evidence/{name}" for name in (part or parts).split()]
    for words, (cell, seed) in zip(map(str.split, runs), cells, strict=True):
        given = I.parse("train", words[2:-1])  # the stub's log has lost the quotes of "/a b"
        assert words[-2:] == ["/a", "b"] and given["seed"] == int(seed[1:])
        lifted = not re.search("plain|/longer|teachers", cell)
        assert I.Config(**given).resolved().infoard == lifted
        if "T1" in cell:
            assert given["framework"] == cell.split("/")[1]
            assert given.get("lam_hi") == dict(radii2=2, radii3=3, longer=None).get(cell.split("/")[2], 1.5)
        if re.fullmatch("T1/(at|trades)/longer", cell):
            assert given["epochs"] == 6 and "teacher" not in given  # which is what it lacks
        elif "teachers" not in cell:  # its own teacher, which has been made
            teacher = cell.split("/")[1] if "teacher/" in cell else part or "strong"
            teacher += "32" * ("size32" in cell)
            assert given["image_size"] == (32 if "32" in cell else 16)
            assert not cell.startswith("longer") or given["epochs"] == 12
            which = "best" if part else "last"
            assert given["teacher"] == f"runs/evidence/teachers/{teacher}/s77/{which}.pt"
            assert (f"teachers/{teacher}", "s77") in cells[:teachers]
            assert part or given["teacher_nat"] == "runs/evidence/teachers/natural/s77/last.pt"
    copies = [there / a / b for a in ("T1/rslad", "teacher/strong", "attacks") for b in ("plain", "infoard")]
    copies += [there / "adaad" / b for b in ("plain", "radii2")]
    assert all(folder.is_dir() != bool(part) for folder in copies)
    checked = [line for line in log if " eval " in line and "apgd" in line]
    for words in map(str.split, checked):
        for name in I.parse("eval", words[2:])["attacks"].split(","):
            assert name in I.ATTACKS | I.ASKED
    assert [re.search("subset \\d+", line)[0] for line in checked] == (
        
        [] if part else 4 * ["subset 500"] + 2 * ["subset 5000"] + ["subset 2000", "subset 1000"])
    assert ("attention" in log[-1]) == bool(part)
    assert shell("lite").wait(60) == 0
    lite = [line for line in (tmp_path / "log").read_text().splitlines() if "runs/lite" in line]
    assert len(lite) == 1 + 12 * 3 + 12 + 1 and not any(line.endswith(" ") for line in lite[:37])

@pytest.mark.parametrize("status", ["143", "0"])  # 0: of a run that had come to its end
def test_a_stopped_script_waits_until_its_runs_have_saved(shell, tmp_path, status):
    script, log = shell("tables", "smoke", SLOW="1", STATUS=status), tmp_path / "log"
    while not log.exists() or "rslad/plain/s1" not in log.read_text():
        assert script.poll() is None
    script.terminate()
    assert script.wait(30) == 130 and "saved" in log.read_text()
    lines = log.read_text().splitlines()
    assert set(lines[lines.index("saved"):]) == {"saved"}  # and nothing is begun

def cells(*words):
    """The runs of `reproduce.sh cells`, as settings."""
    done = subprocess.run(["bash", SCRIPT, "cells", *words], capture_output=True, text=True)
    return [I.Config(**I.parse("train", shlex.split(v))) for v in done.stdout.splitlines()]

@pytest.mark.parametrize("scale, blocks, seeds", [("smoke", 1, 2), ("cpu", 1, 2), ("gpu", 1, 1),
                                                  ("paper", 5, 3)])
def test_every_cell_of_the_tables_is_a_run_of_its_own(scale, blocks, seeds):
    runs = [c.resolved() for c in cells(scale, "--lr", "0.05")]
    names = [Path(c.out).relative_to(f"runs/tables/{scale}").parts for c in runs]
    assert len(runs) == len(set(names)) == blocks * seeds * (9 * 2 + 9 + 4 + 4)
    assert {c.lr for c in runs} == {0.05} and all(n[-1] == f"s{c.seed}" for n, c in zip(
        names, runs, strict=True))
    first = [c for c, n in zip(runs, names, strict=True) if "T1" in n][:18]
    assert {(c.framework, c.infoard) for c in first} == {
        (f, on) for f in FORMULAS if f != "natural" for on in (False, True)}
    whole = next(c for c in first if c.framework == "rslad" and c.infoard)
    for c, n in zip(runs, names, strict=True):  # T2 differs from T1's RSLAD in its own part only
        if "T2" in n and c.seed == 0 and n[0] in (*Path(whole.out).parts, "T2"):
            changed = [f.name for f in dataclasses.fields(c)
                       if getattr(c, f.name) != getattr(whole, f.name)]
            assert set(changed) <= {"out", "asa", "mim", "w_feat", "w_att", "w_rel", "steps_lo"}

def test_papers_settings_are_those_of_the_papers():
    runs = {c.framework: c for c in cells("paper")[:35] if "T1" in c.out}
    alone = {f: I.Config(framework=f).resolved() for f in runs}
    for f, c in runs.items():  # alpha, beta, temperature are infoard.py's own defaults
        same = [(getattr(c.resolved(), k), getattr(alone[f], k))
                for k in ("alpha", "beta", "temperature")]
        assert all(a == b or abs(a - b) < 1e-6 for a, b in same), f
    table = {f: (c.epochs, c.schedule, c.weight_decay, c.kl_reduction) for f, c in runs.items()}
    assert table["rslad"] == table["mtard"] == (300, "215,260,285", 2e-4, "mean")
    assert table["ard"] == (200, "100,150", 2e-4, "mean")
    assert table["adaad"] == (200, "100,150", 5e-4, "mean")
    assert table["igdm"] == table["saad"] == (200, "100,150", 2e-4, "batchmean")
    assert {c.kl_reduction for c in cells("paper") if c.dataset != "cifar10"} == {"batchmean"}

def test_smoke_tables_killed_and_restarted_give_the_same_files(lab, tmp_path, monkeypatch):
    """Every kind of cell, in one go or killed in the middle of four of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(I, "check_teacher", lambda *args: 99.0)
    def sweep(to, stops):
        for i, cell in enumerate(cells("smoke")[:35]):
            name, options = cell.out.removeprefix("runs/tables/smoke/"), dataclasses.asdict(cell)
            options |= BASE | dict(out=None, resume=True, teacher=lab.teacher, teacher_epochs=None,
                                   teacher_nat=lab.teacher, epochs=1, subset=100, eval_subset=20)
            options["teacher"] = None if cell.framework.startswith("mid") else lab.teacher
            options.pop("out")
            with contextlib.suppress(SystemExit):
                run(to / name, stop=stops.get(i, 0), **options)
    sweep(tmp_path / "whole", {})
    sweep(tmp_path / "killed", {1: 1, 12: 2, 28: 1, 33: 1})
    sweep(tmp_path / "killed", {})
    for top in ("whole", "killed"):
        extras.run_tables(str(tmp_path / top))
    tables = [[(tmp_path / top / f"tables.{kind}").read_bytes() for kind in ("md", "tex", "jsonl")]
              for top in ("whole", "killed")]
    assert tables[0] == tables[1] and tables[0][0].count(b"\n| T") == 35 + 4  # best is last

RESULTS = Path(I.__file__).with_name("results")
PAGES = "\n".join([README, *(p.read_text() for p in sorted(RESULTS.glob("*/README.md")))])
SHOWN = re.findall(r"<!-- results/(\S+) -->\n\n(.*?)\n\n<!-- end -->", PAGES, re.S)

KEPT = [*SHOWN, ("cpu", "")]

@pytest.mark.parametrize("folder, shown", KEPT, ids=[folder for folder, _ in KEPT])
def test_tables_of_the_readme_are_generated_from_results(folder, shown, tmp_path):
    shutil.copytree(RESULTS / folder, tmp_path / "r")
    kept = (tmp_path / "r" / "tables.md").read_text()
    extras.run_tables(str(tmp_path / "r"))
    made = (tmp_path / "r" / "tables.md").read_text()
    assert made == kept and set(shown.split("\n\n")) - {""} <= set(made.strip().split("\n\n"))

def test_kept_teachers_are_robust_nets():
    x, y = SMALL.x_test[:8, :, ::2, ::2] / 255, SMALL.y_test[:8]
    for name in ("strong", "medium"):
        net = I.load_teacher(str(RESULTS / f"evidence/teachers/{name}.pt"), None, 10, size=16)
        hard = I.pgd_ce(net, x, y, threat=I.Threat(8 / 255, 2 / 255, 10))
        lost = I.margin(I.predict(net, x), y) - I.margin(I.predict(net, hard), y)
        assert 0 < lost.mean() < 2  # 0.7; the undefended net of the same images loses 5.6

EVIDENCE = re.findall(r"<!-- compare (\S+) -->\n\n(.*?)\n\n<!-- end -->", PAGES, re.S)

@pytest.mark.parametrize("folder, shown", EVIDENCE, ids=[folder for folder, _ in EVIDENCE])
def test_gains_of_the_readme_are_generated_from_results(folder, shown, tmp_path):
    shutil.copytree(RESULTS / "evidence" / folder, tmp_path / "r")
    kept = (tmp_path / "r/compare.md").read_text()
    extras.run_compare(str(tmp_path / "r"))
    assert (tmp_path / "r/compare.md").read_text() == kept
    assert set(shown.split("\n\n")) <= set(kept.strip().split("\n\n"))

def test_evidence_of_the_readme_is_generated_from_results(tmp_path):
    assert sorted(folder for folder, _ in EVIDENCE) == sorted(
        f.parent.name for f in RESULTS.glob("evidence/*/compare.md"))
    assert f"<!-- attention -->\n\n{(RESULTS / 'evidence/first/attention.md').read_text()}" in PAGES
    for file in ("search.jsonl", "search2.jsonl", "search3.jsonl"):
        done = python(f"import sys; sys.path[:0] = [{str(RESULTS / 'evidence')!r}]\n"
                      f"import search; print(search.table({file!r}))", tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("| tried"), done.stderr
        assert done.stdout.strip() in (RESULTS / "evidence/README.md").read_text()

COSTS = re.findall(r"<!-- costs (\S+) -->\n\n(.*?)\n\n<!-- end -->", PAGES, re.S)

@pytest.mark.parametrize("folder, shown", COSTS, ids=[folder for folder, _ in COSTS])
def test_costs_of_the_readme_are_generated_from_results(folder, shown):
    content = json.loads((RESULTS.parent / folder / "bench.json").read_text())
    assert extras.costs(content["rows"]) == shown

def test_curve_of_the_readme_is_generated_from_results(tmp_path):
    shutil.copytree(RESULTS / "lite", tmp_path / "lite")
    kept = (tmp_path / "lite/curve.md").read_text()
    extras.run_curve(str(tmp_path / "lite"))
    assert (tmp_path / "lite/curve.md").read_text() == kept and kept in PAGES

def test_figures_are_drawn_again(desk):
    shutil.rmtree("done/figures")
    assert I.main(["figures", "done"]) == 0
    files = sorted(Path("done/figures").iterdir())
    assert [f.name for f in files] == ["curves.pdf", "curves.png", "sheet.pdf", "sheet.png"]
    assert all(f.stat().st_size > 5000 for f in files)
    assert all(np.array(Image.open(f).convert("L")).std() > 5 for f in files[1::2])  # not blank

def test_without_validation_the_log_is_json_and_best_is_the_last(lab, tmp_path):
    found = run(tmp_path, teacher=lab.teacher, val_size=0, figures=True, attacks="clean,pgd")
    log = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").open()]  # no NaN
    assert len(log) == 2 and not any("val_clean" in row for row in log)
    assert found["best"] == found["last"] and found["best"]["epoch"] == 2
    curves = np.array(Image.open(tmp_path / "figures/curves.png").convert("L"))
    assert curves.std() > 5

def test_export_holds_the_evaluated_weights_and_no_critics(desk):
    assert I.main(["export", "done/last.pt"]) == 0
    weights, file = (I.load_tensors(f"done/last{kind}.pt") for kind in (".weights", ""))
    assert weights.keys() == I.tiny().state_dict().keys() and file["critics"]
    assert all(torch.equal(v, file["ema"]["module." + k]) for k, v in weights.items())

def test_files_of_a_run_have_the_promised_keys(desk):
    config, results = (json.loads(Path(f"done/{n}.json").read_text()) for n in ("config",
        "results"))
    assert config["settings"].keys() == {f.name for f in dataclasses.fields(I.Config)}
    assert len(config["teacher_sha256"]) == len(config["source_sha256"]) == 64
    assert {"argv", "torch"} <= config.keys()
    keys = "clean fgsm pgd_sat pgd_trades cw apgd aa worst worst_class n ci95".split()
    assert all(set(keys) <= results[k].keys() for k in ("last", "best"))
    rows = [json.loads(line) for line in Path("done/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert set("loss feat att lr eps val_clean val_pgd images_per_s".split()) <= rows[1].keys()
    assert all(torch.load(f"done/{n}.pt", weights_only=True) for n in ("last", "best", "sheet"))

# --- NAMID and MID (defences.py) ------------------------------------------------------------------

LINF = [name for name in I.ATTACKS if name not in I.OUTSIDE]

@each("name", I.ATTACKS)
@given(problems(), st.sampled_from([None, 1, 3]))
@settings(max_examples=10)
def test_named_attacks_keep_their_ball_and_their_limit_of_steps(name, problem, most):
    net, x, y, _ = problem
    passes, before = [], x.clone()
    hook = net.register_forward_hook(lambda *_: passes.append(1))
    options = dict(most=most) if most else {}
    x_adv = I.ATTACKS[name](net, x, y, eps=R, eps_l2=0.3, generator=rng(), **options)
    hook.remove()
    assert torch.equal(x, before) and 0 <= x_adv.min() <= x_adv.max() <= 1
    radius = (x_adv - x).flatten(1).norm(2 if "l2" in name else torch.inf, dim=1)
    free = name == "spatial" or "corrupt" in I.OUTSIDE and name in ("corrupt", *D.SEVERITIES)
    # float32 rounds a sum of 108 squares by less than 1e-5
    assert free or (radius <= (0.3 if "l2" in name else R) + 1e-5).all()
    limit = 6 * (most or 0) + 6 if name == "pgd5_cw" else most  # six attacks, six looks at x'
    assert free or not most or len(passes) <= limit

@given(ints(1, 4), seeds, st.floats(0.01, 2), ints(1, 6))
def test_l2_attack_of_a_linear_objective_goes_straight_to_the_sphere(b, seed, eps, steps):
    x, w = rand(b, 9, seed=seed, lo=0.4, hi=0.6), rand(b, 9, seed=seed + 1, lo=-1)
    threat = I.Threat(min(eps, 0.4), 0.1, steps, norm="l2")
    step = I.pgd(lambda z: (w * z).sum(1), x, init="none", threat=threat) - x
    near(step, min(threat.eps, 0.1 * steps) * w / w.norm(dim=1, keepdim=True))

@given(seeds, st.floats(0, 2))
def test_momentum_sums_gradients_of_unit_length(seed, mu):
    x, w = rand(2, 5, seed=seed, lo=0.4, hi=0.6), rand(2, 2, 5, seed=seed + 1, lo=-1)
    assume(w.abs().min() > 1e-3)
    seen = []
    def objective(z):  # the gradient is w[0] in the first step and 100 w[1] in the second
        seen.append(z)
        return (100 ** (len(seen) - 1) * w[len(seen) - 1] * z).sum(1)
    x_adv = I.pgd(objective, x, init="none", threat=I.Threat(0.3, 0.1, 2), momentum=mu)
    one, two = (v / v.abs().sum(1, keepdim=True) for v in w)
    assume((mu * one + two).abs().min() > 1e-6)
    near(x_adv - x, 0.1 * one.sign() + 0.1 * (mu * one + two).sign())

def test_unknown_norms_are_refused_and_l2_radii_may_exceed_one():
    assert I.Threat(3.0, norm="l2").eps == 3.0
    with pytest.raises(I.InfoardError, match="linf, l2"):
        I.Threat(0.1, norm="l1")

@given(problems())
def test_targets_are_other_classes_and_come_nearer(problem):
    net, x, y, _ = problem
    z = torch.full((len(y), K), 0.0).requires_grad_()
    objective = D.target_objective(lambda v: v, y)
    (grad,) = torch.autograd.grad(objective(z).sum(), z)
    target = grad.argmax(1)  # to raise the objective is to raise this class
    assert (target != y).all() and (grad.sign() == 2 * F.one_hot(target, K) - 1).all()
    with I.frozen_eval(net):
        chosen = D.target_objective(net, y)
        rows = torch.arange(len(y)).flip(0)
        near(chosen(x[rows], rows), chosen(x)[rows], 1e-5)  # batched sums of float32
        after = I.pgd(chosen, x, threat=I.Threat(R, 1 / 255, 3), init="none")
        assert (chosen(after) >= chosen(x) - 0.05).all()  # a sign step may overshoot a little

def test_spatial_keeps_the_worst_view():
    net, x, y = tiny_net(), rand(5, 3, 6, 6).float(), torch.tensor([0, 1, 2, 0, 1])
    views = [D.spatial(net, x, y, generator=rng(1), tries=n) for n in (0, 3, 10)]
    leads = torch.stack([I.margin(I.predict(net, v), y) for v in views])
    assert torch.equal(views[0], x) and (leads.diff(dim=0) <= 0).all() and (leads[2] < leads[0]).any()
    near(D.spatial(net, x, y, generator=rng(1)), views[2], 0.0)

CLOSED = dict(  # what a corruption of strength c makes of an image of one colour (0.4, 0.2, 0)
    bright=lambda x, c: x * (0.4 + c) / 0.4, contrast=lambda x, c: x, pixelate=lambda x, c: x,
    blur=lambda x, c: x)

@each("kind", CLOSED)
@given(ints(0, 4), ints(5, 12))
def test_corruptions_of_one_colour_are_known(kind, level, size):
    x, c = torch.tensor([0.4, 0.2, 0.0]).view(1, 3, 1, 1).expand(2, 3, size, size), D.SEVERITIES[kind][level]
    near(D.corrupted(x, kind, c), CLOSED[kind](x, c).clamp(0, 1), 1e-6)

def test_noises_have_the_moments_of_their_strength():
    x, g = torch.full((64, 3, 32, 32), 0.5), rng()  # 196,608 draws: standard errors below 0.4%
    for level in range(5):
        noise, shot, salted = (D.corrupted(x, k, D.SEVERITIES[k][level], g)
                               for k in ("noise", "shot", "impulse"))
        near(noise.std() / D.SEVERITIES["noise"][level], 1, 0.01)
        near(shot.var() * D.SEVERITIES["shot"][level] / 0.5, 1, 0.02)  # Poisson: variance = mean
        c = D.SEVERITIES["impulse"][level]
        for value, share in ((0.0, c / 2), (1.0, c / 2), (0.5, 1 - c)):
            near((salted == value).double().mean(), share, 0.002)

def test_blur_jpeg_and_pixels_are_those_of_pillow():
    x = F.interpolate(rand(2, 3, 8, 8).float(), (32, 32), mode="bilinear")
    x = (255 * x).round() / 255
    losses = [(D.corrupted(x, "jpeg", c) - x).square().mean() for c in (95, *D.SEVERITIES["jpeg"])]
    assert losses[0] > 0 and all(a < b for a, b in zip(losses, losses[1:], strict=False))
    half = F.interpolate(F.avg_pool2d(x, 2), (32, 32))
    near(D.corrupted(x, "pixelate", 0.5), half, 1.001 / 255)  # 8 bits
    kept = (D.corrupted(x, "pixelate", 0.95) == x).double().mean()
    assert 0.6 < kept < 0.9, kept  # most pixels of Pillow's box are those that were there
    point = torch.zeros(1, 3, 9, 9)
    point[:, :, 4, 4] = 1
    row = D.corrupted(point, "blur", 0.8)[0, 0, 4]
    near(row / row[4], torch.exp(-(torch.arange(9) - 4.0) ** 2 / (2 * 0.8 ** 2)), 1e-5)

@given(ints(1, 60), seeds)
@settings(max_examples=10)
def test_common_corruptions_are_drawn_anew_for_each_image(b, seed):
    x = rand(b, 3, 8, 8, seed=seed).float()
    one, same, other = (D.common(None, x, None, generator=rng(s)) for s in (seed, seed, seed + 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    kinds, dealt = ["contrast", "blur"], []
    for image, new in zip(x, D.common(None, x, None, kinds=kinds, generator=rng(seed)), strict=True):
        dealt += [(k, c) for k in kinds for c in D.SEVERITIES[k]
                  if torch.allclose(D.corrupted(image[None], k, c)[0], new, atol=1e-6)][:1]
    counts = [dealt.count((k, c)) for k in kinds for c in D.SEVERITIES[k]]
    assert len(dealt) == b and max(counts) - min(counts) <= 1, counts

def test_severities_are_those_of_cifar_10_c():
    assert D.SEVERITIES == dict(
        noise=(0.04, 0.06, 0.08, 0.09, 0.1), shot=(500, 250, 100, 75, 50), blur=(0.4, 0.6, 0.7, 0.8, 1),
        impulse=(0.01, 0.02, 0.03, 0.05, 0.07), bright=(0.05, 0.1, 0.15, 0.2, 0.3),
        contrast=(0.75, 0.5, 0.4, 0.3, 0.15), pixelate=(0.95, 0.9, 0.85, 0.75, 0.65), jpeg=(80, 65, 58, 50, 40))

@each("dtype", [torch.float16, torch.bfloat16, F64])
@each("kind", D.SEVERITIES)
def test_corruptions_keep_shape_and_type(kind, dtype):
    x = rand(3, 3, 5, 7).to(dtype)
    new = D.common(None, x, None, kinds=[kind], generator=rng())
    assert new.shape == x.shape and new.dtype == dtype and 0 <= new.min() <= new.max() <= 1

@given(seeds, ints(0, 4))
@settings(max_examples=10)
def test_brightness_is_that_of_hsv(seed, level):
    import colorsys
    x, c = rand(1, 3, 3, 3, seed=seed).float(), D.SEVERITIES["bright"][level]
    x[0, :, 0, 0] = 0
    new = D.corrupted(x, "bright", c)
    for old, made in zip(x[0].flatten(1).T.tolist(), new[0].flatten(1).T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*old)
        near(made, torch.tensor(colorsys.hsv_to_rgb(h, s, min(1, v + c))), 1e-5)

def test_impulses_fall_on_each_colour_of_a_pixel_alone():
    hit = D.corrupted(torch.full((8, 3, 32, 32), 0.5), "impulse", 0.07, rng()) != 0.5
    assert hit.all(1).double().mean() < 0.002  # 0.07 cubed is 0.0003

# bounds per sample

@given(score_matrices)
def test_pointwise_bounds_are_the_summands_of_the_bounds(scores):
    scale = max(1, scores.abs().max().item())
    near(D.pointwise(scores, "infonce").mean(), I.infonce(scores), 1e-9 * scale)
    near(D.pointwise(scores, "jsd").mean(), I.js_divergence(scores), 1e-9 * scale)
    assert D.pointwise(scores).mean() >= I.donsker_varadhan(scores) - 1e-9 * scale  # Jensen
    both = D.pointwise(torch.stack([scores, 2 * scores]))
    near(both[1], D.pointwise(2 * scores), 1e-9 * scale)

@given(score_matrices, st.floats(-50, 50), seeds)
def test_dv_leaves_its_diagonal_out(scores, c, seed):
    near(D.pointwise(torch.full((4, 4), c, dtype=F64)), torch.zeros(4))  # no 1 is added for j = i
    i = seed % len(scores)
    moved = scores.clone()
    moved[i, i] += c  # raises its own row by as much, in no way another
    near(D.pointwise(moved) - D.pointwise(scores), c * torch.eye(len(scores), dtype=F64)[i],
         1e-9 * max(1, scores.abs().max().item() + abs(c)))
    for bound in ("dv", "infonce", "jsd"):
        scores = scores.clone().requires_grad_()
        assert torch.autograd.grad(D.pointwise(scores, bound).sum(), scores)[0].isfinite().all()

# NAMID

def critics(seed=0, **options):
    torch.manual_seed(seed)
    return D.Estimators(nn.Identity(), 4, dim=16, **options).eval()

def test_each_estimator_sees_its_own_pattern():
    x, x_adv, s, s_adv = rand(5, 3, 16, 16), rand(5, 3, 16, 16, seed=1), rand(5, 4), rand(5, 4, seed=2)
    both = critics().double()
    with torch.no_grad():
        (n, n_adv), (a, a_adv) = both.information(x, x_adv, s, s_adv)
        again, moved = both.information(x, x_adv.flip(0), s, s_adv), both.information(
            x + 0.1, x_adv + 0.1, s, s_adv)
    near(again[0], torch.stack([n, n_adv]))  # natural: not of x'
    near(moved[1], torch.stack([a, a_adv]))  # adversarial: of x' - x alone
    for value, other in ((again[1], (a, a_adv)), (moved[0], (n, n_adv))):
        assert (value - torch.stack(other)).abs().min() > 1e-6
    scores = both.natural(x, s)[0]
    assert scores.shape == (16, 5, 5)  # a 4 x 4 map of places
    z, a_p = both.natural.g(s), both.natural.encoder(x).flatten(2)[3, :, 7]
    near(scores[7, 2, 3], z[2] @ both.natural.h(a_p[None])[0] / both.natural.tau)
    near(n, D.pointwise(scores).mean(0))

@each("source, larger", [("x", 0), ("noise", 1)])
@each("bound", ["dv", "infonce", "jsd"])
def test_estimators_tell_what_logits_depend_on(source, larger, bound):
    def draw(seed, b=64):
        x, noise = (0.8 * rand(b, 3, 1, 1, seed=seed + i, lo=lo) + 0.2 * rand(b, 3, 8, 8, seed=seed + i)
                    for i, lo in enumerate((0, -1)))  # each of a colour of its own
        z = dict(x=x, noise=noise)[source].mean((2, 3)) @ torch.eye(3, 4, dtype=F64)
        return x.float(), (x + R * noise).float(), 5 * z.float()
    both = critics(bound=bound).train()
    opt = torch.optim.Adam(both.parameters(), 3e-3)
    for seed in range(0, 240, 2):
        x, x_adv, z = draw(seed)
        opt.zero_grad()
        (-both.information(x, x_adv, z, z).mean()).backward()
        opt.step()
    x, x_adv, z = draw(9_000)
    with torch.no_grad():
        found = both.eval().information(x, x_adv, z, z).mean((1, 2))
    # the one that can be known is far above the other, of which there is none to know
    assert found[larger] > found[1 - larger] + 0.05 and found[1 - larger] < 0.1, found

def test_selection_is_by_the_largest_logit_of_each_sample():
    y = torch.tensor([0, 1, 2, 0])
    s = torch.tensor([[9.0, 8, 0], [0, 1, 0], [0, 0, 2], [0, 1, 0]])
    s_adv = torch.tensor([[1.0, 2, 0], [0, 5, 4], [3, 0, 2], [0, 1, 0]])
    step = SimpleNamespace(s=s, s_adv=s_adv, y=y)
    near(D.fooled(step), torch.tensor([0.5, 0, 0.5, 0]))
    one = SimpleNamespace(s=s[:1], s_adv=s_adv[:1], y=y[:1])  # a softmax over the batch says 0, 0
    near(D.fooled(one), torch.ones(1))
    near(D.fooled(SimpleNamespace(s=s, s_adv=s, y=y)), torch.zeros(4))

def namid_step(framework="namid", b=6, seed=0, **options):
    student, _, x, _ = pair(b, F64)
    y = copy.deepcopy(student)(x).argmax(1)  # all are right on x
    cfg = I.Config(framework=framework, steps=2, **dict(eps=0.3, step_size=0.2) | options)
    return I.Step(student, None, x, y, cfg=cfg, estimators=critics(seed).double(), progress=0.5,
                  generators=dict(attack=rng(5), data=rng(6)))

@each("base, framework", [(I.at, "namid"), (I.trades, "namid_trades")])
def test_namid_is_its_formula_in_two_passes(base, framework):
    step = namid_step(framework, alpha=3.0, mi_lambda=0.2)
    twin, passes = copy.deepcopy(step.student), []
    hook = step.student.register_forward_hook(lambda m, *_: passes.append(1) if m.training else None)
    loss = I.FRAMEWORKS[framework](step)
    loss.backward()
    hook.remove()
    assert len(passes) == 2
    assert all(p.grad.isfinite().all() and p.grad.any() for p in step.student.parameters())
    s_adv, s = (twin(v) for v in ((step.x_adv, step.x) if base is I.at else (step.x, step.x_adv)))
    s_adv, s = (s_adv, s) if base is I.at else (s, s_adv)
    chosen = (s.argmax(1) == step.y) & (s_adv.argmax(1) != step.y)
    assert 1 < chosen.sum() < 6
    n, n_adv, a, a_adv = step.estimators.information(step.x, step.x_adv, s, s_adv).flatten(0, 1)
    def cos(u, v):
        u, v = u[chosen], v[chosen]
        return (u * v).sum() / (u.square().sum() * v.square().sum()).sqrt()
    mi = 2 - cos(n_adv, n) - cos(a_adv, a) + 0.2 * (a_adv - n_adv)[chosen].mean()
    first = F.cross_entropy(s_adv, step.y) if base is I.at else \
        F.cross_entropy(s, step.y) + 6 * batch_kl(s, s_adv)
    truth = first + 0.5 * 3.0 * mi  # half of the ramp
    near(loss, truth, 1e-8)  # cosine_similarity keeps its norms above 1e-8
    truth.backward()
    for p, q in zip(step.student.parameters(), twin.parameters(), strict=True):
        near(p.grad, q.grad, 1e-6)

def test_namid_without_fooled_samples_is_its_base():
    step, plain = namid_step(eps=0.0), namid_step("at", eps=0.0, infoard=False)
    loss = D.namid(step)
    near(loss, plain.loss(), 0.0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in step.student.parameters())

def test_the_measurement_groups_by_what_the_attack_did(lab):
    both = D.Estimators(lab.net, 10, dim=16)
    found = both.findings(SMALL.x_test[:70], SMALL.y_test[:70], 1 / 255, size=32)
    assert found["all"]["n"] == 69 == sum(found[k]["n"] for k in ("resisted", "fooled", "wrong"))
    for group in found.values():
        near(group["N(x')-N(x)"][0], group["N(x')"][0] - group["N(x)"][0], 1e-6)
        near(group["A(x')-A(x)"][0], group["A(x')"][0] - group["A(x)"][0], 1e-6)
    weighted = sum(found[k]["n"] * found[k]["N(x)"][0] for k in ("resisted", "fooled", "wrong"))
    near(weighted / 69, found["all"]["N(x)"][0], 1e-6)

def used(net, x):
    """A net whose batch norm knows its activations, so that eval mode is no constant function."""
    for _ in range(40):
        net.train()(x)
    return net.eval()

@each("train", ["max", "difference"])
def test_estimators_climb_their_objective(train):
    net, _, x, _ = pair(8)
    y = used(net, x)(x).argmax(1)
    both = D.Estimators(net.requires_grad_(False), 4, dim=16)
    cfg = I.Config(framework="estimators", steps=2, eps=0.06, step_size=0.03, mi_train=train)
    step = I.Step(both, net, x, y, cfg=cfg, generators=dict(attack=rng(5)))
    loss = step.loss()
    (n, n_adv), (a, a_adv) = both.information(x, step.x_adv, net(x), net(step.x_adv))
    w = D.fooled(step)
    assert 0 < (w > 0).sum() < 8
    truth = -(n + a_adv).mean() if train == "max" else -((n - n_adv + a_adv - a) * w).sum()
    near(loss, truth, 1e-4)  # batch norm in train mode, sums in float32
    loss.backward()
    assert all(p.grad is not None for p in both.parameters())
    assert all(p.grad is None for p in net.parameters())
    assert all("held" not in k and "net" not in k for k in both.state_dict())

# MID

def mid_step(framework="mid", b=4, **options):
    torch.manual_seed(0)
    teacher, student = (D.Autoencoder(I.tiny(4, 16, width=2), 16).double() for _ in range(2))
    x, y = rand(b, 3, 16, 16), torch.arange(b) % 4
    used(teacher, x).requires_grad_(False)
    student = D.prepare_mid(used(student, x), teacher, None, 4).train()
    cfg = I.Config(framework=framework, steps=2, **options)
    return I.Step(student, teacher, x, y, cfg=cfg, progress=0.3, generators=dict(
        attack=rng(5), data=rng(options.get("seed", 6))), teacher_nat=I.tiny(4, 16, width=2).double())

def encoder(net):
    return {k: p for k, p in net.named_parameters() if p.requires_grad}

def test_mid_is_a_first_order_meta_step(monkeypatch):
    """Gradients at theta and, of the held-out attack, at theta - lr grad, on copies of the net."""
    step, calls, real = mid_step(lr=5.0), [], D.consistency
    monkeypatch.setattr(D, "consistency", lambda step, x_adv, theta, a, c: calls.append(
        (x_adv, a, c)) or real(step, x_adv, theta, a, c))
    before = copy.deepcopy(step.student)
    loss = step.loss()
    loss.backward()
    (known, *w_known), (unknown, *w_unknown) = calls
    assert (w_known, w_unknown) == ([1.5, 0.8], [1.0, 1.0])
    assert len(known) == 6 * len(unknown) == 6 * 4
    def grads(net, x_adv, a, c):
        value = real(SimpleNamespace(student=net, teacher=step.teacher, x=step.x, y=step.y), x_adv,
                     encoder(net), a, c)
        return value, torch.autograd.grad(value, list(encoder(net).values()))
    j, g = grads(before, known, *w_known)
    moved = copy.deepcopy(before)
    for p, d in zip(encoder(moved).values(), g, strict=True):
        p.data -= step.cfg.lr_at(0.3) * d
    j_new, g_new = grads(moved, unknown, *w_unknown)
    near(loss, j + j_new)
    _, g_plain = grads(before, unknown, *w_unknown)
    apart = 0.0
    for p, d, e, plain in zip(encoder(step.student).values(), g, g_new, g_plain, strict=True):
        near(p.grad, d + e)  # the held-out attack's gradient arrives
        apart = max(apart, (e - plain).abs().max().item())
    assert apart > 1e-3  # and it is not that of plain multi-attack distillation
    assert any(not torch.equal(p, step.teacher.state_dict()[k]) for k, p in encoder(before).items())
    rest = {k: v for k, v in step.student.state_dict().items() if k.startswith(("decoder", "linear"))}
    assert rest and all(torch.equal(v, step.teacher.state_dict()[k]) for k, v in rest.items())
    assert all(p.grad is None for p in step.teacher.parameters())
    assert {k for k, p in step.student.named_parameters() if p.grad is None} == {
        k for k in dict(step.student.named_parameters()) if k in rest}

def test_the_attack_held_out_is_the_one_tested_on(monkeypatch):
    held, order = set(), []
    for name in ("pgd_sat", "bim", "mifgsm"):
        fill = {"pgd_sat": 0.1, "bim": 0.2, "mifgsm": 0.3}[name]
        monkeypatch.setitem(I.ATTACKS, name, lambda net, x, y, v=fill, **_: torch.full_like(x, v))
    monkeypatch.setattr(D, "consistency", lambda step, x_adv, theta, a, c: order.append(
        x_adv[:, 0, 0, 0].unique().tolist()) or sum(p.sum() for p in theta.values()))
    for seed in range(12):
        mid_step(pool="clean,pgd_sat,bim,mifgsm", seed=seed).loss()
        known, unknown = order[-2:]
        first = mid_step().x[:, 0, 0, 0].unique().tolist()  # the clean images
        assert not set(known) & set(unknown) and sorted(known + unknown) == sorted([0.1, 0.2, 0.3, *first])
        held.add(tuple(unknown))
    assert len(held) == 4  # each in its turn, the clean images too

@each("framework, attacked", [("mid", "student"), ("mid_transfer", "teacher_nat")])
def test_the_pool_attacks_the_net_that_is_named(framework, attacked, monkeypatch):
    nets, step = [], mid_step(framework, pool="clean,pgd_sat,bim", eps=0.3, eps_l2=0.7)
    for name in ("pgd_sat", "bim"):
        monkeypatch.setitem(I.ATTACKS, name, lambda net, x, y, **how: nets.append((net, how)) or x)
    step.loss()
    assert [net for net, _ in nets] == 2 * [getattr(step, attacked)]
    assert all((how["eps"], how["eps_l2"], how["most"]) == (0.3, 0.7, 2) for _, how in nets)

def test_consistency_is_kl_per_position_and_its_cycle_has_a_gradient():
    step = mid_step()
    x_adv, theta = torch.cat([step.x.flip(0), step.x]), encoder(step.student)
    def j(a, c):
        return D.consistency(step, x_adv, theta, a, c)
    step.student.eval()  # so that all passes are alike
    f, t = step.student.encode(x_adv), step.teacher.encode(step.x).repeat(2, 1, 1, 1)
    again = step.teacher.encode(step.student.decoder(f))
    b, c, h, w = f.shape
    def kl(q):  # over channels, at each position
        return F.kl_div(q.log_softmax(1), t.softmax(1), reduction="sum") / (b * h * w)
    near(j(1, 0) - j(0, 0), kl(f))
    near(j(0, 1) - j(0, 0), kl(again))
    near(j(0, 0), F.cross_entropy(step.student(x_adv), step.y.repeat(2)))
    assert kl(again) > 1e-6
    grads = torch.autograd.grad(j(0, 1) - j(0, 0), list(theta.values()), allow_unused=True)
    assert all(g.abs().max() > 1e-9 for g in grads[:1])  # the cycle reaches the first convolution

@each("name", [*I.MODELS, "wrn_10_1"])
@each("size", [32, 64])
def test_autoencoders_classify_as_their_net_and_draw_images_of_its_size(name, size):
    if name == "wrn_34_10":
        pytest.skip("46 M parameters")
    net = I.build_model(name, 5, size).eval()
    both = D.Autoencoder(net, size).eval()
    x = rand(2, 3, size, size).float()
    f, z = both(x, features=True)
    near(I.predict(both, x), I.predict(net, x), 0.0)
    near(z, both(x), 0.0)
    assert both.decoder(f).shape == x.shape == both.regenerated(x).shape
    assert both.state_dict().keys() - net.state_dict().keys() == {
        f"decoder.{k}" for k in both.decoder.state_dict()}
    assert not any(isinstance(m, nn.ReLU) for m in both.decoder)

def test_best_is_chosen_by_what_a_framework_is_for():
    assert I.SCORES == dict(natural="val_clean", autoencoder="val_clean", estimators="epoch")

def test_decoder_of_resnet_has_the_published_shape():
    up = [m for m in I.build_model("resnet18_ae").decoder]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in up] == [
        (512, 256, 4, 2), (256, 128, 4, 2), (128, 64, 4, 2), (64, 64, 3, 1), (64, 3, 3, 1)]

def test_a_teacher_without_decoder_is_refused():
    student = D.Autoencoder(I.tiny(4, 16), 16)
    for teacher in (I.tiny(4, 16), D.Autoencoder(I.build_model("resnet18", 4, 16), 16)):
        with pytest.raises(I.InfoardError, match="decoder"):
            D.prepare_mid(student, teacher, None, 4)

@given(seeds, st.floats(0.01, 0.4))
def test_likeness_in_closed_form(seed, c):
    x = rand(2, 3, 16, 16, seed=seed, hi=0.5).float()
    psnr, ssim = D.likeness(x, x + c)
    assert abs(psnr + 20 * math.log10(c)) < 0.006 and ssim < 1  # two decimals
    assert D.likeness(x, x) == (100.0, 1.0)
    flat = torch.full((1, 3, 16, 16), 0.25)  # no variance: the luminance term alone
    truth = (2 * 0.25 * (0.25 + c) + 1e-4) / (0.25**2 + (0.25 + c) ** 2 + 1e-4)
    assert abs(D.likeness(flat, flat + c)[1] - truth) < 6e-4  # of a variance of 1e-8 in float32
    patch, other = x[:1, :1, 3:14, 4:15].double(), rand(1, 1, 11, 11, seed=seed + 1)
    g = torch.tensor([math.exp(-i * i / 4.5) for i in range(-5, 6)], dtype=F64)
    w = torch.outer(g, g) / g.sum() ** 2
    m, n = (w * patch).sum(), (w * other).sum()
    cov, v, u = ((w * p).sum() for p in ((patch - m) * (other - n), (patch - m) ** 2, (other - n) ** 2))
    truth = (2 * m * n + 1e-4) * (2 * cov + 9e-4) / ((m * m + n * n + 1e-4) * (v + u + 9e-4))
    assert abs(D.likeness(patch.float(), other.float())[1] - truth) < 1e-4

def test_transferred_attacks_are_made_on_the_other_net_and_worst_is_linf(lab, monkeypatch):
    source, seen = I.tiny().eval(), []
    real = dict(I.ATTACKS)
    for name in ("fgsm", "spatial"):
        monkeypatch.setitem(I.ATTACKS, name, lambda net, *args, n=name, **options: seen.append(
            net) or real[n](net, *args, **options))
    white, moved = (evaluate(lab.net, 40, attacks="clean,fgsm,spatial", source=s)
                    for s in (None, source))
    assert seen == [lab.net] * 2 + [source] * 2
    assert moved["fgsm"] > white["fgsm"] and moved["clean"] == white["clean"]
    assert white["worst"] == white["fgsm"] and white["spatial"] < white["clean"]

@pytest.mark.parametrize("framework", ["namid", "mid"])
def test_defences_train_end_to_end_and_resume_bit_for_bit(framework, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(I, "check_teacher", lambda *args: 99.0)  # one epoch teaches it nothing
    options = dict(framework=framework, teacher_epochs=1, resume=True, figures=True, transfer=True,
                   subset=130)
    steps, real = [], I.Step
    monkeypatch.setattr(I, "Step", lambda *args, **how: steps.append(real(*args, **how)) or steps[-1])
    whole = run(tmp_path / "whole", **options)
    assert framework == "mid" or not any(m.training for m in steps[-1].estimators.modules())
    with pytest.raises(SystemExit):
        run(tmp_path / "killed", stop=3, **options)
    assert run(tmp_path / "killed", **options) == whole
    assert files_differ(tmp_path / "whole", tmp_path / "killed") == []
    assert whole["transfer"]["n"] == 40 and {"best", "last"} <= whole.keys()
    terms = dict(namid=("unlike", "push"), mid=("known", "unknown"))[framework]
    row = json.loads((tmp_path / "whole/log.jsonl").read_text().splitlines()[-1])
    assert all(math.isfinite(row[k]) for k in terms)
    kinds = {p.name.split("-")[-2] for p in Path("runs/teachers").iterdir()}
    assert kinds == dict(namid={"at", "natural", "estimators"}, mid={"autoencoder", "natural"})[framework]
    extras.run_tables(str(tmp_path / "whole"))
    assert "transfer (%)" in capsys.readouterr().out
    if framework == "mid":
        assert 0 < whole["best"]["psnr"] < 100 and 0 <= whole["best"]["ssim"] <= 1
        pictures = I.load_tensors(tmp_path / "whole/sheet.pt")["columns"]
        assert pictures["attacked\nregenerated"].shape == (5, 32, 32, 3)
        net = I.load_teacher(str(tmp_path / "whole/best.pt"))
        assert isinstance(net, D.Autoencoder)

def test_measurement_of_a_checkpoint_is_made_once(desk, capsys, monkeypatch):
    monkeypatch.setattr(I, "check_teacher", lambda *args: 99.0)
    line = ["mi", "done/last.pt", "--teacher-epochs", "1", "--device", "cpu", "--steps", "1",
            "--eval-subset", "40", "--critic-dim", "16", "--no-progress"]
    assert I.main(line) == 0
    first = capsys.readouterr().out
    assert "| fooled" in first and "N smaller on attacked images: " in first
    (out,) = [p for p in Path("runs/teachers").iterdir() if "estimators" in p.name]
    assert (out / "figures/information.png").stat().st_size > 10_000
    monkeypatch.setattr(I, "Run", None)
    assert I.main(line) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == first.splitlines()[-5:]

@given(seeds, st.sampled_from([1, 2, 5, 20, 40]))
def test_l2_attacks_use_their_own_radius_and_limited_ones_go_2_5_radii(seed, most):
    x, y = rand(2, 3, 6, 6, seed=seed, lo=0.4, hi=0.6).float(), torch.tensor([0, 1])
    x_adv = I.ATTACKS["pgd_l2"](tiny_net(seed), x, y, eps=1e-6, eps_l2=0.2)
    near((x_adv - x).flatten(1).norm(dim=1), torch.full((2,), 0.2), 1e-3)  # 20 steps of 1/8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "attacked", lambda make, net, x, y, threat, **_: threat)
        for name, radius, share in (("pgd_sat", R, 1 / 4), ("pgd_l2", 0.2, 1 / 8)):
            threat = I.ATTACKS[name](None, x, y, eps=R, eps_l2=0.2, most=most)
            assert threat.steps == min(most, 20)
            near(threat.alpha, radius * (share if most >= 20 else min(1, 2.5 / most)))

def test_rotations_and_shifts_are_bounded(monkeypatch):
    import torchvision.transforms.functional as T
    seen = []
    monkeypatch.setattr(T, "affine", lambda x, turn, shift, *_: seen.append((turn, *shift)) or x)
    D.spatial(tiny_net(), rand(2, 3, 30, 20).float(), torch.tensor([0, 1]), tries=200, generator=rng())
    turn, right, down = torch.tensor(seen).abs().amax(0).tolist()
    assert 25 < turn <= 30 and right == 2 and down == 3  # a tenth of 20 and of 30 pixels

def test_worst_is_of_the_linf_ball_alone():
    hits = dict(clean=[1, 1, 1, 1], fgsm=[1, 1, 1, 0], pgd_l2=[0, 1, 1, 1], spatial=[1, 0, 1, 1])
    result = I.summary({k: torch.tensor(v).bool() for k, v in hits.items()}, torch.arange(4), 4)
    assert (result["worst"], result["pgd_l2"], result["spatial"]) == (75.0, 75.0, 75.0)

@each("given, file", [(dict(eps=4 / 255), ""), (dict(subset=50), ""), (dict(mi_train="difference"), ""),
                      (dict(mi_bound="jsd"), ""), (dict(critic_dim=8), ""), ({}, "other"), ({}, "same")])
def test_estimators_are_kept_by_settings_and_by_the_net_itself(given, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(I, "train", lambda **options: made.append(options))
    for name in ("net.pt", "same.pt"):
        Path(name).write_bytes(b"weights")
    Path("other.pt").write_bytes(b"other weights")
    def folder(name="net", **options):
        return D.trained_estimators(I.Config(framework="namid", **options).resolved(), f"{name}.pt")
    first, again = folder(), folder(file or "net", **given)
    assert (first == again) == (file == "same")
    assert all(made[-1][k] == v for k, v in given.items()) and made[-1]["framework"] == "estimators"
    Path("net.pt").write_bytes(b"trained on")
    assert folder() != first

def test_alpha_is_whole_at_once_without_ramp():
    losses = [namid_step(alpha=3.0, mi_ramp=ramp) for ramp in (0.0, 0.5, 1.0)]
    base, *values = [namid_step("at", infoard=False).loss(), *map(D.namid, losses)]
    near(values[0], values[1], 0.0)  # half of the training is done
    near(values[0] - base, 2 * (values[2] - base))
    assert (values[0] - base).abs() > 1e-3

def test_batches_of_one_have_no_information():
    step = namid_step(b=1)
    step.student.eval()
    D.namid(step).backward()
    both = critics().train()
    found = both.information(*(rand(1, 3, 16, 16).float() for _ in range(2)), *2 * [torch.ones(1, 4)])
    found.sum().backward()
    assert found.shape == (2, 2, 1) and not found.any() and both.natural.g.shortcut.weight.grad is not None
    with pytest.raises(I.InfoardError, match="two test images"):
        both.findings(rand(1, 3, 16, 16), torch.zeros(1), R)

def test_measured_intervals_are_those_of_the_values(lab):
    both = D.Estimators(lab.net, 10, dim=16).train()
    x, y = I.to_float(SMALL.x_test[:50], "cpu"), SMALL.y_test[:50]
    found = both.findings(x, y, 0.0)["all"]  # x' = x
    assert both.training
    s = I.predict(lab.net, x)
    with torch.no_grad():
        n, _, a, _ = both.eval().information(x, x, s, s).double().flatten(0, 1)
    for name, v in (("N(x)", n), ("A(x')", a)):
        near(torch.tensor(found[name]), torch.stack([v.mean(), 1.96 * v.std() / 50**0.5]), 1e-6)

@each("n, a, told", [((-0.2, 0.1), (0.2, 0.1), "yes yes"), ((0.2, 0.1), (-0.2, 0.1), "no no"),
                     ((-0.2, 0.3), (0.2, 0.3), "unclear unclear")])
def test_verdict_of_the_measurement(n, a, told, tmp_path, monkeypatch, capsys):
    group = dict(n=9) | {k: (0.5, 0.1) for k in ("N(x)", "N(x')", "A(x)", "A(x')")}
    found = dict(all=group | {"N(x')-N(x)": n, "A(x')-A(x)": a})
    (tmp_path / "results.json").write_text(json.dumps(dict(findings=found)))
    torch.save(dict(config=dict(dataset="shapes")), tmp_path / "c.pt")
    monkeypatch.setattr(D, "trained_estimators", lambda *args: f"{tmp_path}/best.pt")
    D.run_mi(str(tmp_path / "c.pt"))
    assert " ".join(re.findall(r"images: (\w+) ", capsys.readouterr().out)) == told

def test_autoencoder_is_classification_and_reconstruction():
    step = mid_step()
    step.student.eval()
    f, z = step.student(step.x, features=True)
    truth = F.cross_entropy(z, step.y) + (step.student.decoder(f) - step.x).square().mean()
    near(D.autoencoder(step), truth)

def test_quality_is_against_the_clean_image():
    x, x_adv = rand(2, 3, 16, 16).float(), rand(2, 3, 16, 16, seed=1).float()
    quality = D.Autoencoder.quality(SimpleNamespace(regenerated=lambda z: z), x, x_adv)
    psnr, ssim = D.likeness(x, x_adv)
    assert quality == dict(psnr=100.0, psnr_adv=psnr, ssim=1.0, ssim_adv=ssim)
    net = D.Autoencoder(I.tiny(4, 16), 16)
    net.decoder[-1].bias.data.fill_(7.0)
    assert net.regenerated(x).max() == 1.0

def test_transfer_is_from_the_source_in_every_part(lab, monkeypatch):
    source, seen = I.tiny().train(), []
    before = snapshot(source)
    real = I.ATTACKS["pgd_sat"]
    monkeypatch.setattr(I, "autoattack", lambda net, *_: seen.append(net) or (
        lambda part, net, x, y: x))
    monkeypatch.setitem(I.ATTACKS, "pgd_sat", lambda net, *args, **options: seen.append(net) or real(
        net, *args, **options))
    model = D.Autoencoder(I.tiny(), 32).eval()
    model.load_state_dict(lab.net.state_dict(), strict=False)
    monkeypatch.setattr(I, "summary", lambda *args: dict(warnings=["masked"]))
    result = evaluate(model, attacks="clean,apgd", source=source)
    assert seen == [source] * 2 and result["warnings"] == [] and "psnr_adv" in result
    assert snapshot(source) == before
    assert evaluate(model, attacks="clean,apgd")["warnings"] == ["masked"] and seen[2:] == [model] * 2

def test_eval_knows_the_l2_radius_and_another_net_to_attack(desk, lab, capsys):
    for out, options in dict(a=["--eps-l2", "0"], b=[], c=["--teacher-nat", "stranger.pt"]).items():
        assert I.main(["eval", lab.teacher, "--attacks", "clean,fgsm,pgd_l2", "--eval-subset", "40",
                       "--out", out, *options]) == 0
    a, b, c = (json.loads(Path(out, "eval.json").read_text()) for out in "abc")
    assert a["pgd_l2"] == a["clean"] > b["pgd_l2"] and c["clean"] == b["clean"] and c["fgsm"] > b["fgsm"]

@each("options", ["--pool clean", "--pool clean,clean", "--pool clean,pgd", "--teacher stranger.pt",
                  "--teacher-framework trades"])
def test_mid_refuses_what_it_cannot_use(desk, options, capsys):
    assert I.main(["--framework", "mid", "--epochs", "1", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search("pool|choose from|decoder|chance|unknown", error), error

def test_natural_teachers_of_any_kind_are_taken(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(I, "check_teacher", lambda *args: 99.0)
    torch.save(I.build_model("mobilenet_v2").state_dict(), tmp_path / "mob.pt")
    cfg = I.Config(framework="mtard", teacher=lab.teacher, teacher_nat=str(tmp_path / "mob.pt"))
    nets = I.get_nets(cfg.resolved(), SMALL, torch.device("cpu"))
    assert len(list(nets["teacher_nat"].parameters())) > 100

def test_infoard_stands_alone(tmp_path):
    shutil.copy(I.__file__, tmp_path / "infoard.py")
    code = "import infoard as I; print(list(I.FRAMEWORKS)[-1], len(I.ATTACKS)); I.main(['mi', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["saad", "4"] and "unknown verb 'mi'" in done.stderr

def python(code, cwd):
    env = os.environ | dict(PYTHONPATH=str(Path(I.__file__).parent), CUDA_VISIBLE_DEVICES="",
        PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True,
        text=True, timeout=100)

def test_import_needs_torch_and_numpy_only_and_does_nothing(tmp_path):
    names = "matplotlib tqdm pyautoattack torchvision scipy".split()
    done = python(f"import sys\nfor n in {names}: sys.modules[n] = None\n"
                  "import infoard", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not os.listdir(tmp_path)

def test_full_disk_is_one_line(tmp_path):
    done = python("import resource, infoard as I\nd = I.render_shapes(400, 100)\n"
                  "I.render_shapes = lambda: d\nargs = '--framework natural --epochs 1'.split()\n"
                  "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
                  "raise SystemExit(I.main(args))", tmp_path)
    assert done.returncode == 2 and "cannot write" in done.stderr and one_line(done.stderr)
    assert not list(tmp_path.rglob("*.part*"))

def test_source_keeps_the_house_rules():
    lines = Path(I.__file__).read_text().splitlines()
    assert len(lines) < 1600
    beside = [Path(other.__file__).read_text() for other in (D, extras)]
    for line in lines + "".join(beside).splitlines():
        assert len(line) <= 100 and ".cuda()" not in line, line

COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", PAGES, re.S)
            for line in block.splitlines()]

@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_readme_command_is_understood(command, monkeypatch):
    """Each runs up to the point where the work would begin, with settings that Config accepts."""
    program, *words = command.removeprefix("OMP_NUM_THREADS=1 ").split()
    if program == "torchrun":
        words = words[[w[:2] for w in words].index("in"):]
    if program == "bash":
        script = Path(I.__file__).with_name(words[0])
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert f"    {words[1]}) " in script.read_text()
    elif words[0] == "infoard.py":
        seen = []
        known = {f.name for f in dataclasses.fields(I.Config)}
        def listen(verb):
            return functools.wraps(verb)(lambda **given: seen.append(given))
        monkeypatch.setattr(I, "VERBS", {k: listen(verb) for k, verb in I.VERBS.items()})
        assert I.main(words[1:]) == 0 and len(seen) == 1
        assert I.Config(**{k: v for k, v in seen[0].items() if k in known}).resolved()
    elif words[0] == "results/evidence/search.py":
        given = shlex.split(command)[4:]
        assert words[1] == "table" or I.Config(**I.parse("train", given)).resolved()
    else:
        assert command == "python -m pip install -r requirements.txt"

def test_readme_shows_every_kind_of_command_and_of_table():
    assert {folder for folder, _ in SHOWN} == {"shapes", "namid", "mid"}
    assert {Path(folder).name for folder, _ in COSTS} == {"rslad", "all", "effects", "growth"}
    assert len(COMMANDS) > 10 and {c.split()[0] for c in COMMANDS} == {
        "bash", "python", "torchrun", "OMP_NUM_THREADS=1"}
