"""What holds for radii by the teacher's distance to its boundary."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import adaptation, bench, runs
from test_infoard import (
    ROOT,
    each,
    ints,
    labels,
    make_info,
    near,
    pair,
    rand,
    rng,
    seeds,
    tiny_net,
)

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


def some_labels(d):
    return torch.zeros(len(d), dtype=torch.long)


@given(seeds, LIMITS)
def test_radii_are_distances_within_their_limits(seed, lam):
    d = 0.2 * torch.randn(9, generator=rng(seed))
    threat = I.Threat(eps=EPS, alpha=2 / 255, steps=7)
    found = adaptation.distance(None, some_labels(d), distance=d, threat=threat, lam=lam)
    assert found.steps == 7
    for i in range(9):
        radius = min(max(d[i].item(), lam[0] * EPS), lam[1] * EPS)
        near(found.eps[i], radius, 1e-6)  # float32
        near(found.alpha[i], 2 / 255 * radius / EPS, 1e-6)


@given(seeds)
def test_controls_have_the_same_radii_or_their_mean(seed):
    d = 0.1 * torch.randn(12, generator=rng(seed))
    y = some_labels(d)
    how = {"threat": I.Threat(), "lam": (1.0, 3.0), "distance": d}
    own = adaptation.distance(None, y, **how)
    dealt = adaptation.distance_shuffled(None, y, generator=rng(seed), **how)
    even = adaptation.distance_mean(None, y, **how)
    for name in ("eps", "alpha"):
        radii = getattr(own, name)
        assert torch.equal(radii.sort().values, getattr(dealt, name).sort().values)
        near(getattr(even, name), radii.mean().expand(12), 1e-6)


DISTANCES = ["distance", "distance_mean", "distance_shuffled"]


@each("asa", DISTANCES)
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


def test_with_the_teacher_they_find_the_distance_themselves():
    net = linear_net(0)
    x = rand(6, 3, 4, 4)
    y = net(x).argmax(1)
    how = {"threat": I.Threat(), "lam": (0.0, 9.0)}
    given = adaptation.distance(None, y, distance=adaptation.boundary_distance(net, x, y), **how)
    found = adaptation.distance(None, y, teacher=net, x=x, **how)
    assert torch.equal(given.eps, found.eps) and found.eps.unique().numel() > 3


def test_without_a_radius_nothing_moves():
    threat = I.Threat(eps=0.0)
    y = labels(3)
    found = adaptation.distance(None, y, distance=torch.ones(3), threat=threat, lam=(1.0, 2.0))
    assert torch.equal(found.eps, torch.zeros(3)) and torch.equal(found.alpha, torch.zeros(3))


# ==== Rules by rank ===============================================================================


@given(ints(2, 40), seeds, ints(1, 6), ints(1, 6))
def test_the_uniform_control_costs_the_same_and_does_not_adapt(b, seed, lo, more):
    how = {"threat": I.Threat(steps=lo + more), "steps_lo": lo, "lam": (1.0, 1.5)}
    own = I.teacher_margin(rand(b, 4, seed=seed), labels(b), **how)
    even = adaptation.uniform(None, labels(b), **how)
    near(even.eps, own.eps.mean().expand(b), 1e-7)
    near(even.alpha, own.alpha.mean().expand(b), 1e-7)
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
    assert torch.equal(mixed.eps.sort(0).values, own.eps.sort(0).values)
    again = info.strength(-t, y, generator=rng(9))
    assert torch.equal(mixed.eps, again.eps)


def images_of(asa, steps=3):
    """The images, labels and radii of a few steps of a training, and the state of its radii."""
    given = {"student": "tiny", "teacher": "given", "steps": 1, "batch_size": 8, "mim": "off"}
    cfg = I.Config(**given, framework="ard", val_size=0, device="cpu", asa=asa).resolved()
    torch.manual_seed(0)
    teacher = I.build_model("tiny")
    run = I.Run(cfg, bench.random_data(24, 32), torch.device("cpu"), {"teacher": teacher})
    batches, radii = [], []

    def learn(x, y, share):
        step = I.Step(run.student, teacher, x, y, cfg, run.info, generators=run.generators)
        step.threat = I.Threat()
        batches.append(x)
        radii.append(step.strength().eps.flatten().sort().values)
        return {}

    run.learn = learn
    for i in range(steps):
        I.train_step(run, run.train[8 * i : 8 * i + 8], i / steps)
    return torch.cat(batches), torch.cat(radii), run


@each("asa, control", [("teacher", "shuffled"), ("distance", "distance_shuffled")])
def test_a_control_that_draws_trains_on_the_images_of_what_it_controls(asa, control):
    x, radii, _ = images_of(asa)
    same, dealt, run = images_of(control)
    assert torch.equal(x, same) and torch.equal(radii, dealt)
    state = run.state()["generators"]
    fresh = I.Run(run.cfg, run.data, run.device, run.nets)
    assert not torch.equal(state["rule"], fresh.generators["rule"].get_state())


def test_a_checkpoint_of_before_rules_had_a_generator_goes_on(tmp_path):
    _, _, run = images_of("shuffled")
    state = run.state()
    del state["generators"]["rule"]
    I.save(tmp_path / "last.pt", state)
    fresh = I.Run(run.cfg, run.data, run.device, run.nets)
    begun = fresh.generators["rule"].get_state()
    fresh.load(tmp_path / "last.pt")
    for name in ("data", "attack"):
        assert torch.equal(fresh.generators[name].get_state(), run.generators[name].get_state())
    assert torch.equal(fresh.generators["rule"].get_state(), begun)


def test_student_and_gap_rank_what_they_are_named_after():
    t, s, y = rand(9, 4), rand(9, 4, seed=1), labels(9)
    how = {"threat": I.Threat(), "lam": (1.0, 1.5)}
    by_student = adaptation.student(None, y, s=s, **how)
    sure = s.softmax(1)
    lead = sure.gather(1, y[:, None])[:, 0] - sure.scatter(1, y[:, None], 0).amax(1)
    assert torch.equal(by_student.eps.argsort(), lead.argsort())
    divergence = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    assert torch.equal(adaptation.gap(t, y, s=s, **how).eps.argsort(), divergence.argsort())


@each("asa, missing", [("student", "student on x: s=s"), ("gap", "teacher: t")])
def test_a_rule_asks_for_logits_by_name(asa, missing):
    info = I.InfoARD(tiny_net(), tiny_net(1), image_shape=(3, 8, 8), asa=asa, mim="off")
    with pytest.raises(I.InfoardError, match=f"asa='{asa}' needs logits of the {missing}"):
        info.strength(None, labels(4))


OWN = """
from infoard import infonce, instance_strength

def brightness(t, y, *, teacher, x, generator, **how):
    return instance_strength(x.mean((1, 2, 3)), **how)

def half(scores):
    return infonce(scores) / 2

brightness.needs = ("teacher",)
"""


def test_a_rule_and_a_bound_of_ones_own_come_in_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rules.py").write_text(OWN)
    student, teacher, x, y = pair()
    cfg = I.Config(asa="my_rules.py:brightness", mim="my_rules.py:half", steps=1).resolved()
    info = make_info(student, teacher, asa=cfg.asa, mim=cfg.mim)
    step = I.Step(student, teacher, x, y, cfg=cfg, info=info)
    step.loss()
    radii = step.threat.eps.flatten()
    assert torch.equal(radii.argsort(), x.mean((1, 2, 3)).argsort())
    usual = make_info(student, teacher)
    usual.critics = info.critics
    student(x)
    teacher(x)
    near(2 * info.loss(x, x), usual.loss(x, x), 1e-6)


@each("option", ["asa", "mim"])
def test_a_misspelt_rule_or_bound_is_refused_before_anything_is_trained(option):
    with pytest.raises(I.InfoardError, match=f"unknown --{option} 'distanse'"):
        I.Config(**{option: "distanse"}).resolved()


@each(
    "options, why",
    [
        ({"lam_hi": 200.0}, "200 times that is more than 1"),
        ({"asa": "distance", "lam_lo": 100.0, "lam_hi": 100.0}, "100 times that is more than 1"),
        ({"asa": "distance", "lam_lo": 2.0, "lam_hi": 1.0}, "the first is larger"),
        ({"asa": "distance_mean", "lam_hi": 2.0, "steps_lo": 1}, "takes no --steps-lo"),
    ],
)
def test_limits_that_no_radius_can_have_are_told_before_anything_is_trained(options, why):
    cfg = I.Config(**options).resolved()
    with pytest.raises(I.InfoardError, match=why) as error:
        runs.check_possible(cfg, torch.device("cpu"))
    assert "\n" not in str(error.value)


SOFTMAX = str(ROOT / "results/evidence/distance/softmax.py:softmax")


@each(
    "options",
    [
        {"lam_lo": 2.0, "lam_hi": 1.0},
        {"asa": "distance", "lam_hi": 1000.0},
        {"asa": SOFTMAX, "lam_hi": 1000.0, "steps_lo": 1},
    ],
)
def test_the_limits_of_the_evidence_are_possible(options):
    runs.check_possible(I.Config(**options).resolved(), torch.device("cpu"))


def test_a_radius_for_each_image_is_the_base_of_its_distance():
    d = rand(6).abs() * EPS
    base = torch.linspace(0, 2 * EPS, 6, dtype=d.dtype)
    whole = adaptation.clipped(d, I.Threat(eps=base, alpha=base / 4), (0.5, 1.5))
    for i in range(6):
        alone = I.Threat(eps=base[i].item(), alpha=base[i].item() / 4)
        found = adaptation.clipped(d[i : i + 1], alone, (0.5, 1.5))
        near(whole.eps[i : i + 1], found.eps)
        near(whole.alpha[i : i + 1], found.alpha)
