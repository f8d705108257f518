"""What holds for radii by the teacher's distance to its boundary."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import adaptation
from test_infoard import each, labels, near, rand, rng, seeds, tiny_net

EPS = 8 / 255


def linear_net(seed):
    """Logits of 5 classes that are linear in an image of 3x4x4 pixels, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()


@given(seeds)
def test_in_a_linear_net_a_step_of_this_length_reaches_the_boundary(seed):
    net = linear_net(seed)
    x = rand(6, 3, 4, 4, seed=seed)
    y = labels(6, 5, seed)
    d = adaptation.boundary_distance(net, x, y)
    z = net(x)
    near(d.sign(), I.margin(z, y).sign())
    for i in range(6):
        others = [k for k in range(5) if k != y[i]]
        rival = max(others, key=lambda k: z[i, k].item())
        slope = net[1].weight[y[i]] - net[1].weight[rival]
        near(d[i], (z[i, y[i]] - z[i, rival]) / slope.abs().sum())
        there = x[i] - d[i] * slope.sign().view(3, 4, 4)
        gap = net(there[None])[0, y[i]] - net(there[None])[0, rival]
        near(gap, 0.0)


def test_it_does_not_depend_on_the_scale_of_the_logits():
    net = linear_net(0)
    x, y = rand(6, 3, 4, 4), labels(6, 5)
    before = adaptation.boundary_distance(net, x, y)
    with torch.no_grad():
        net[1].weight.mul_(100)
        net[1].bias.mul_(100)
    near(adaptation.boundary_distance(net, x, y), before)


def test_the_model_and_the_images_are_left_as_they_were():
    net = tiny_net()
    net.train()
    x, y = rand(4, 3, 8, 8).float(), labels(4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    kept = x.clone()
    d = adaptation.boundary_distance(net, x, y)
    assert net.training and not d.requires_grad
    assert torch.equal(x, kept) and x.grad is None
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


LIMITS = st.floats(0, 1).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 4)))


@given(seeds, LIMITS)
def test_radii_are_distances_within_their_limits(seed, lam):
    d = 0.2 * torch.randn(9, generator=rng(seed))
    threat = I.Threat(eps=EPS, alpha=2 / 255, steps=7)
    found = adaptation.distance(d, threat=threat, lam=lam)
    assert found.steps == 7
    for i in range(9):
        radius = min(max(d[i].item(), lam[0] * EPS), lam[1] * EPS)
        near(found.eps[i], radius, 1e-6)  # float32
        near(found.alpha[i], 2 / 255 * radius / EPS, 1e-6)


@given(seeds)
def test_controls_have_the_same_radii_or_their_mean(seed):
    d = 0.1 * torch.randn(12, generator=rng(seed))
    how = {"threat": I.Threat(), "lam": (1.0, 3.0)}
    own = adaptation.distance(d, **how)
    dealt = adaptation.distance_shuffled(d, generator=rng(seed), **how)
    even = adaptation.distance_mean(d, **how)
    for name in ("eps", "alpha"):
        radii = getattr(own, name)
        assert torch.equal(radii.sort().values, getattr(dealt, name).sort().values)
        near(getattr(even, name), radii.mean().expand(12), 1e-6)


@each("asa", I.DISTANCES)
def test_strength_asks_for_the_distance_by_name(asa):
    info = I.InfoARD(tiny_net(), tiny_net(1), image_shape=(3, 8, 8), asa=asa, mim="off")
    y = labels(4)
    with pytest.raises(I.InfoardError, match="needs distance=boundary_distance"):
        info.strength(None, y)
    d = torch.tensor([0.0, 0.04, 0.05, 1.0])
    with pytest.raises(I.InfoardError, match="no steps_lo"):
        info.strength(None, y, distance=d, steps_lo=1)
    threat = info.strength(None, y, distance=d, generator=rng())
    assert threat.eps.shape == threat.alpha.shape == (4, 1, 1, 1)
    near(threat.eps.mean(), (EPS + 0.04 + 1.5 * EPS + 1.5 * EPS) / 4, 1e-6)


def test_without_a_radius_nothing_moves():
    found = adaptation.distance(torch.ones(3), threat=I.Threat(eps=0.0))
    assert torch.equal(found.eps, torch.zeros(3)) and torch.equal(found.alpha, torch.zeros(3))
