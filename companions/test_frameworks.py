"""What holds for frameworks.py: formulas in torch's own words, weights, inner objectives, needs.

The checks that every framework passes stand in test_infoard.py; here are the formulas that they
compare with.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import evaluation, frameworks, nets
from test_infoard import (
    F64,
    SMALL,
    K,
    batch_kl,
    ce_by_hand,
    check_formula,
    check_lifted,
    check_no_graph_is_kept,
    check_strength,
    check_switched_off,
    check_teacher_in_train_mode,
    each,
    ints,
    loss_of,
    make_step,
    near,
    pair,
    problems,
    rand,
    rng,
    seeds,
    tiny_net,
    toward,
)

# ==== 1. By hand ==================================================================================
# FORMULAS: passes and y -> the cross-entropy and the divergence of a loss at half time.


def iad_formula(p, y):
    trust = p.t_adv.softmax(1)[range(len(y)), y] ** 0.1
    guided = batch_kl(p.t, p.s_adv, 1, trust)
    return 0, guided + batch_kl(p.s, p.s_adv, 1, 1 - trust)


def akd_formula(p, y):  # alpha = 0.3
    rows = range(len(y))
    return -0.7 * p.s_adv.log_softmax(1)[rows, y].mean(), 0.3 * batch_kl(p.t_adv, p.s_adv)


def adaiad_formula(p, y):  # temperature 2
    trust = p.t_adv.softmax(1)[range(len(y)), y] ** 0.1
    guided = batch_kl(p.t_adv, p.s_adv, 2)
    return 0, guided + batch_kl(p.s, p.s_adv, 1, 1 - trust)


def mtard_formula(p, y):  # in the first step the weights are equal
    return 0, 0.5 * batch_kl(p.t_adv, p.s_adv) + 0.5 * batch_kl(p.n, p.s)


def igdm_formula(p, y):  # alpha = 1.6
    return 0, batch_kl(p.t_adv, p.s_adv) + 0.8 * batch_kl(*p.slopes)


def entropy_weights(t_adv):
    """SAAD's h and r."""
    entropy = torch.distributions.Categorical(logits=t_adv).entropy()
    h = 5 * (entropy - entropy.min())
    return h, 1 - h / h.max().clamp(min=1e-8)


def saad_formula(p, y):  # alpha = 1.6, beta = 0.5
    h, rest = entropy_weights(p.t_adv)
    clean = batch_kl(p.t, p.s, 1, rest)
    return 0, batch_kl(p.t_adv, p.s_adv, 1, h) + 0.8 * batch_kl(*p.slopes, 1, h) + 0.5 * clean


FORMULAS = {
    "akd": akd_formula,
    "iad": iad_formula,
    "adaiad": adaiad_formula,
    "mtard": mtard_formula,
    "igdm": igdm_formula,
    "saad": saad_formula,
}
OPTIONS = {  # those that the formulas hold for
    "akd": {"alpha": 0.3},
    "iad": {},
    "adaiad": {"temperature": 2.0},
    "mtard": {},
    "igdm": {"alpha": 1.6},
    "saad": {"alpha": 1.6, "beta": 0.5},
}
STARTS = dict.fromkeys(FORMULAS, "normal") | {"akd": "uniform", "iad": "uniform"}
each_framework = each("framework", FORMULAS)


def linear_teacher(teacher, x, y):
    """T(x) with the true logit raised by its own gradient, pixel by pixel, times x' - x."""
    t = teacher(x).detach()
    b = torch.arange(len(x))
    jacobian = torch.autograd.functional.jacobian(lambda z: teacher(z)[b, y], x)
    slope = jacobian[b, b]  # [B, C, H, W]

    def logits(z, rows):
        rise = torch.einsum("bchw,bchw->b", slope[rows], z - x[rows])
        return t[rows] + rise[:, None] * F.one_hot(y[rows], t.shape[1])

    return logits


def inner(framework, student, teacher, x, y):
    """The inner objective of a framework: z, rows -> [B]; student and teacher in eval mode."""
    if framework in ("akd", "iad", "mtard"):
        return ce_by_hand(student, y)
    if framework in ("adaiad", "igdm"):
        return toward(student, lambda z, rows: teacher(z))
    return toward(student, linear_teacher(teacher, x, y))


# ==== 2. What every framework must be =============================================================


@each_framework
@each("reduction, b", [("batchmean", 1), ("batchmean", 5), ("mean", 5)])
def test_framework_is_its_formula_and_teaches_the_student_only(framework, reduction, b):
    formula, options, start = FORMULAS[framework], OPTIONS[framework], STARTS[framework]
    check_formula(framework, formula, inner, start, b, reduction, **options)


@each_framework
def test_strength_reaches_every_inner_objective(framework):  # teachers in the attack included
    check_strength(framework, inner, STARTS[framework])


@each_framework
def test_a_teacher_in_train_mode_is_asked_in_eval_mode_and_left_alone(framework):
    natural = I.tiny(4, 16, width=2).to(F64).eval()
    check_teacher_in_train_mode(framework, teacher_nat=natural)


@each_framework
def test_infoard_without_weights_is_the_base_bit_for_bit(framework):
    check_switched_off(framework)


@each_framework
@each("asa", ["teacher", "student", "gap"])
def test_infoard_adds_its_terms_and_a_radius_for_each_instance(framework, asa):
    check_lifted(framework, FORMULAS[framework], asa, lam_hi=1.5, **OPTIONS[framework])


@each_framework
def test_no_graph_outlives_its_step(framework):
    check_no_graph_is_kept(framework)


NEEDS = [("iad", "teacher"), ("mtard", "teacher"), ("igdm", "teacher"), ("saad", "teacher")]
NEEDS.append(("mtard", "teacher_nat"))


@each("framework, missing", NEEDS)
def test_a_missing_teacher_is_named(framework, missing):
    student, teacher, x, y = pair(dtype=F64)
    given = {"teacher": teacher, "teacher_nat": teacher, missing: None}
    with pytest.raises(I.InfoardError, match=f"{framework} needs a {missing}:"):
        make_step(
            framework, student, given["teacher"], x, y, teacher_nat=given["teacher_nat"]
        ).loss()


PASSES = {  # passes of the student in train mode, in the order in which batch norm sees them
    "akd": ["x_adv"],
    "iad": ["x_adv", "x"],
    "adaiad": ["x_adv", "x"],
    "mtard": ["x_adv", "x"],
    "igdm": ["x_adv", "x_minus"],
    "saad": ["x_adv", "x_minus", "x"],
}


def check_passes(framework, names, **options):
    """Batch norm of the student has seen these images, in this order, and no others."""
    student, teacher, x, y = pair(dtype=F64)
    twin = copy.deepcopy(student)
    step = make_step(framework, student, teacher, x, y, teacher_nat=teacher, **options)
    step.loss()
    seen = {"x": x, "x_adv": step.x_adv, "x_minus": 2 * x - step.x_adv}
    for name in names:
        twin(seen[name])
    for ours, truth in zip(student.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, truth)


@each_framework
def test_batch_norm_sees_each_pass_once_and_in_a_known_order(framework):
    check_passes(framework, PASSES[framework], **OPTIONS[framework])


def test_no_pass_counts_for_nothing():
    check_passes("iad", ["x_adv"], progress=0.29)
    check_passes("adaiad", ["x_adv"], progress=0.29)
    check_passes("saad", ["x_adv", "x_minus"], beta=0.0)


# ==== 3. Losses of logits =========================================================================


@given(seeds, ints(1, 5), st.floats(0, 2), st.floats(0.5, 9))
def test_iad_trusts_the_teacher_by_its_probability_of_the_truth(seed, b, beta, tau):
    s, s_adv, t, t_adv = rand(4, b, K, seed=seed, lo=-3, hi=3)
    y = torch.randint(K, (b,), generator=rng(seed))
    trust = t_adv.softmax(1)[range(b), y] ** beta
    truth = batch_kl(t, s_adv, tau, trust) + batch_kl(s, s_adv, tau, 1 - trust)
    near(frameworks.iad_loss(s, s_adv, t, t_adv, y, beta, tau), truth)
    warm = frameworks.iad_loss(None, s_adv, t, None, y, beta, tau, warm_up=True)
    near(warm, batch_kl(t, s_adv, tau))


@given(seeds, ints(1, 5), st.floats(0, 2), st.floats(0, 2))
def test_igdm_and_saad_add_their_slopes(seed, b, weight, beta):
    s, s_adv, t, t_adv, s_slope, t_slope = rand(6, b, K, seed=seed, lo=-3, hi=3)
    found = frameworks.igdm_loss(s_adv, t_adv, s_slope, t_slope, weight)
    near(found, batch_kl(t_adv, s_adv) + weight * batch_kl(t_slope, s_slope))
    h, rest = entropy_weights(t_adv)
    near(torch.stack(frameworks.saad_weights(t_adv)), torch.stack([h, rest]))
    truth = batch_kl(t_adv, s_adv, 1, h) + weight * batch_kl(t_slope, s_slope, 1, h)
    near(frameworks.saad_loss(None, s_adv, None, t_adv, s_slope, t_slope, weight), truth)
    found = frameworks.saad_loss(s, s_adv, t, t_adv, s_slope, t_slope, weight, beta)
    near(found, truth + beta * batch_kl(t, s, 1, rest))


@given(seeds, ints(2, 9))
def test_saad_looks_most_where_the_teacher_is_least_sure(seed, b):
    t_adv = rand(b, K, seed=seed, lo=-3, hi=3)
    h, rest = frameworks.saad_weights(t_adv)
    near(h.min(), 0.0)
    near(rest.max(), 1.0)
    near(rest.min(), 0.0)
    assert torch.equal(h.argsort(), rest.argsort(descending=True))
    h, rest = frameworks.saad_weights(torch.zeros(b, K))  # of no opinion at all
    assert (h == 0).all() and (rest == 1).all()


@given(problems(F64), seeds)
def test_the_linear_teacher_is_the_teacher_in_first_order(problem, seed):
    student, x, y, _ = problem
    teacher = tiny_net(seed + 1).double()
    t = teacher(x).detach()
    objective = frameworks.linear_teacher_objective(student, teacher, x, y, t)
    truth = inner("saad", student, teacher, x, y)
    z = (x + 0.05 * rand(*x.shape, seed=seed, lo=-1)).detach()
    near(objective(z), truth(z))
    near(objective(x), I.kl(t, student(x)))  # without a step there is no rise
    rows = torch.arange(len(x)).flip(0)
    near(objective(z[rows], rows), objective(z)[rows])
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_losses_reduce_to_known_cases():
    near(loss_of("igdm", alpha=0.0), loss_of("adaad"), 0.0)
    near(loss_of("iad", progress=0.29), loss_of("ard", temperature=1.0))  # before its epoch 60
    assert (loss_of("iad", progress=0.3) - loss_of("iad", progress=0.29)).abs() > 1e-6
    _, teacher, *_ = pair(dtype=F64)
    unsure = nn.Linear(4, 4, dtype=F64)
    nn.init.zeros_(unsure.weight)
    nn.init.zeros_(unsure.bias)  # of no opinion: all entropies are alike
    assert loss_of("saad", nn.Sequential(teacher, unsure).requires_grad_(False)) == 0


@each("framework", ["igdm", "saad"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(framework):
    student, _, x, y = pair(dtype=F64)
    student.eval()
    twin = copy.deepcopy(student)
    near(make_step(framework, student, twin, x, y).loss(), 0.0)


# ==== 4. MTARD's weights ==========================================================================


def test_mtard_follows_the_slower_loss_and_remembers():
    student, teacher, x, y = pair(dtype=F64)
    natural = I.tiny(4, 16, width=2).to(F64).eval()
    options = {"teacher_nat": natural, "epochs": 300, "schedule": "215,260,285", "memory": {}}
    options["step_size"] = 2 / 255
    w = 0.5
    first = None
    for progress in (0.0, 0.5, 0.99):  # lr falls by 10 at 215/300 and again twice
        student.layer1[0].weight.data *= 1.3
        step = make_step("mtard", student, teacher, x, y, progress=progress, **options)
        loss = step.loss()
        adversarial = batch_kl(step.t_adv, step.s_adv)
        clean = batch_kl(step.t_nat, step.s)
        first = first or (adversarial.item(), clean.item())
        r_adv = adversarial.item() / first[0]
        r_nat = clean.item() / first[1]
        eta = 0.025 * (1e-3 if progress > 0.9 else 1)
        w = w + eta * (r_adv / (r_adv + r_nat) - w)
        near(loss, w * adversarial + (1 - w) * clean)
    assert abs(w - 0.5) > 1e-4 and not options["memory"]["w"].requires_grad


@given(seeds, st.floats(0, 1))
def test_mtard_weights_stay_a_mixture(seed, eta):
    memory = {}
    for k in range(4):
        losses = rand(2, seed=seed + k, lo=0.01)
        w = frameworks.mtard_weights(losses, memory, eta)
        near(w.sum(), 1.0)
        assert (w >= 0).all()
    near(memory["first"], rand(2, seed=seed, lo=0.01), 0.0)


def test_mtard_survives_a_first_loss_of_zero():
    student, _, x, y = pair(dtype=F64)
    student.eval()
    twin = copy.deepcopy(student)
    memory = {}
    loss = make_step("mtard", student, twin, x, y, teacher_nat=twin, memory=memory).loss()
    near(loss, 0.0)
    near(memory["w"], torch.full((2,), 0.5, dtype=F64))


def test_mtards_memory_is_kept_by_the_run(lab):
    options = {"framework": "mtard", "student": "tiny", "epochs": 1, "steps": 1, "amp": "off"}
    cfg = I.Config(**options, batch_size=64, device="cpu", infoard=False).resolved()
    natural = I.tiny().eval()
    made = {"teacher": lab.net, "teacher_nat": natural}
    run = I.Run(cfg, SMALL, torch.device("cpu"), made)
    for i in range(5):
        I.train_step(run, run.train[64 * i : 64 * (i + 1)], i / 5)
    w = run.at.memory["w"]
    near(w.sum(), 1.0, 1e-6)
    assert (w - 0.5).abs().min() > 1e-4, w


def test_natural_teachers_of_any_kind_are_taken(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "check_teacher", lambda *args: None)
    torch.save(nets.mobilenet_v2().state_dict(), tmp_path / "mob.pt")
    given = {"teacher": lab.teacher, "teacher_nat": str(tmp_path / "mob.pt")}
    cfg = I.Config(framework="mtard", **given).resolved()
    found = I.get_nets(cfg, SMALL, torch.device("cpu"))
    assert len(list(found["teacher_nat"].parameters())) > 100


# ==== 5. Settings =================================================================================


def test_settings_of_the_framework_unless_told_otherwise():
    cfg = I.Config(framework="iad").resolved()
    assert (cfg.beta, cfg.temperature) == (0.1, 1.0)
    cfg = I.Config(framework="saad").resolved()
    assert (cfg.alpha, cfg.beta) == (1.0, 0.0)
    assert I.Config(framework="igdm").resolved().alpha == 1.0
    assert I.Config(framework="igdm", alpha=0.5).resolved().alpha == 0.5
    assert I.Config(framework="mtard").resolved().beta is None


@each("dataset", ["shapes", "cifar10"])
def test_radii_of_twice_eps_are_for_three_alone(dataset):  # their label is T(x'): they are free
    widest = {}
    for name in I.FRAMEWORKS:
        widest[name] = I.Config(dataset=dataset, framework=name).resolved().lam_hi
    assert {name for name, value in widest.items() if value == 2} == {"adaad", "adaiad", "igdm"}
    assert {value for value in widest.values()} == {1.5, 2}
    assert I.Config(framework="igdm", lam_hi=1.2).resolved().lam_hi == 1.2


SLIPS = [  # what is said of a framework, and the words of the line that refuses it
    ({"needs": "teacher"}, "tuple"),
    ({"needs": ("teachers",)}, "tuple"),
    ({"defaults": {"gamma": 0.5}}, "options are your own"),
    ({"options": {"gamma": 0.7}}, "pair"),
    ({"options": {"alpha": (0.7, "help")}}, "cannot be called alpha"),
]


@each("said, words", SLIPS)
def test_a_framework_that_says_something_wrong_of_itself_is_refused(said, words):
    with pytest.raises(I.InfoardError, match=words):
        frameworks.check_framework(I.Framework(I.at, **said))
