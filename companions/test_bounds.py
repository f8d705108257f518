"""What holds for the further bounds of information."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infoard as I
from companions import bounds
from test_infoard import (
    each,
    gaussians,
    ints,
    make_info,
    mean,
    near,
    rand,
    score_matrices,
    seeds,
    tiny_net,
)


@given(ints(2, 12), seeds)
def test_unpaired_control_takes_each_teacher_image_for_its_neighbours(b, seed):
    unpaired = bounds.unpaired
    scores = rand(b, b, seed=seed)
    neighbours = torch.arange(-1, b - 1)
    near(unpaired(scores), I.infonce(scores[:, neighbours]))
    knows_all = 20 * torch.eye(b)
    assert unpaired(knows_all) < -15 + math.log(b)  # and gets nothing


def log_normal(mean, var, y):
    """The log density of N(mean, var) at y."""
    gap = (mean - y) ** 2 / var
    return -0.5 * (gap + math.log(2 * math.pi * var))


@given(seeds, st.floats(-2, 2))
def test_gaussian_critic_is_a_density_of_the_normalised_target(seed, log_var):
    critic = bounds.GaussianCritic(3, 4).double()
    critic.log_var.data.fill_(log_var)
    s = rand(5, 3, seed=seed)
    t = rand(5, 4, seed=seed + 1)
    centred = t - t.mean(1, keepdim=True)
    var = centred.square().mean(1, keepdim=True)
    target = centred / (var + 1e-5).sqrt()
    density = log_normal(critic.mean(s)[:, None], math.exp(log_var), target)
    near(critic(s, t), density.mean(2))


def test_gaussian_critic_is_never_too_sure():
    critic = bounds.GaussianCritic(3, 4).double()
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
        found.append(bounds.vid(scores, entropy))
    return mean(found)


def test_variational_bound_is_tight_at_the_true_gaussian_alone():
    best = gaussian_bound(0.8, 0.36)
    near(best, -2 * math.log(0.36), 0.1)  # sd sqrt(2/4096) = 0.022
    for slope, var in ((0.4, 0.36), (0.8, 1.0), (0.8, 0.15), (-0.8, 0.36)):
        assert gaussian_bound(slope, var) < best - 0.1, (slope, var)


@given(score_matrices, st.floats(-5, 5))
def test_vid_is_the_entropy_and_the_mean_of_the_pairs(scores, entropy):
    near(bounds.vid(scores, entropy), entropy + scores.trace() / len(scores))
    f = scores.clone().requires_grad_()
    assert torch.autograd.gradcheck(bounds.vid, f)


@each(
    "bound, told",
    [
        (lambda scores: 1.0, "gives float"),
        (lambda scores: scores.diag(), r"gives \[4\]"),
        (lambda scores: scores.mean() / 0 * 0, "gives nan"),
        (lambda scores: scores.mean().detach(), "without a graph"),
        (lambda scores, labels: scores.mean(), "missing a required argument"),
    ],
)
def test_a_bound_that_is_none_is_refused(bound, told):
    with pytest.raises(I.InfoardError, match=f"the bound <lambda>.*{told}"):
        make_info(tiny_net(), tiny_net(1), mim=bound)


def test_a_bound_of_ones_own_is_taken_as_it_is():
    for bound in (I.infonce, I.donsker_varadhan, I.nwj, I.jsd, bounds.vid, bounds.unpaired):
        assert make_info(tiny_net(), tiny_net(1), mim=bound).bound is bound
    assert make_info(tiny_net(), tiny_net(1), mim=None).bound is None
