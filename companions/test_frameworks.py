"""What holds for frameworks.py: formulas in torch's own words, weights, inner objectives, needs.

The checks that every framework passes stand in test_infoard.py; here are the formulas that they
compare with.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import evaluation, frameworks, nets, plus
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
    labels,
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


TAUS = torch.tensor([[0.5, 1.0, 2.0, 4.0], [3.0, 0.7, 1.0, 1.5]]).double()  # on x' and on x


def bmtard_formula(p, y):  # temperatures as in MEMORIES, equal weights
    return 0, 0.5 * batch_kl(p.t_adv / 1.7, p.s_adv) + 0.5 * batch_kl(p.n / 2.5, p.s)


def absld_formula(p, y):  # temperatures as in MEMORIES
    adversarial = torch.stack([p.t[i] / TAUS[0, y[i]] for i in range(len(y))])
    clean = torch.stack([p.t[i] / TAUS[1, y[i]] for i in range(len(y))])
    return 0, 5 / 6 * batch_kl(adversarial, p.s_adv) + 1 / 6 * batch_kl(clean, p.s)


def average_net():
    """A net of the student's kind, that ADR's memory holds as its average."""
    torch.manual_seed(3)
    return I.tiny(4, 16, width=3).to(F64).eval()


def label_by_hand(z, y, weight, tau):
    """ADR's label, one sample at a time."""
    rows = []
    for i in range(len(y)):
        p = torch.exp(z[i] / tau) / torch.exp(z[i] / tau).sum()
        own = min(1.0, max(0.0, weight - (p.max() - p[y[i]]).item()))
        row = own * p
        row[y[i]] += 1 - own
        rows.append(row)
    return torch.stack(rows).detach()


def label_at_half_time(y):
    """That of the images of pair(), with the average of MEMORIES."""
    *_, x, _ = pair(len(y), F64)
    return label_by_hand(average_net()(x), y, (0.7 + 0.95) / 2, (2.0 + 2.5) / 2)


def soft_ce(z, label):
    return -(label * z.log_softmax(1)).sum(1)


def adr_formula(p, y):
    return soft_ce(p.s_adv, label_at_half_time(y)).mean(), 0


def adr_trades_formula(p, y):
    return soft_ce(p.s, label_at_half_time(y)).mean(), 6 * batch_kl(p.s, p.s_adv)


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
    "bmtard": bmtard_formula,
    "absld": absld_formula,
    "adr": adr_formula,
    "adr_trades": adr_trades_formula,
    "igdm": igdm_formula,
    "saad": saad_formula,
}
OPTIONS = {  # those that the formulas hold for
    "akd": {"alpha": 0.3},
    "iad": {},
    "adaiad": {"temperature": 2.0},
    "mtard": {},
    "bmtard": {},
    "absld": {},
    "adr": {"own": {"adr_decay": 1.0}},
    "adr_trades": {"own": {"adr_decay": 1.0}},
    "igdm": {"alpha": 1.6},
    "saad": {"alpha": 1.6, "beta": 0.5},
}
STARTS = dict.fromkeys(FORMULAS, "normal") | dict.fromkeys(("akd", "iad", "adr"), "uniform")
each_framework = each("framework", FORMULAS)


def memory_of_adr():
    """An average that has been kept for a while."""
    net = average_net()
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    floats = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
    return {f"average.{name}": tensor for name, tensor in floats.items()}


def memory_of_absld():
    """Temperatures of an epoch that goes on: the fifth of eight."""
    return {"tau": TAUS, "noted": torch.ones(3, 4, dtype=F64), "epoch": torch.tensor(4.0)}


MEMORIES = {  # what the formulas hold for, where steps remember something
    "bmtard": lambda: {"tau": torch.tensor([1.7, 2.5], dtype=F64)},
    "absld": memory_of_absld,
    "adr": memory_of_adr,
    "adr_trades": memory_of_adr,
}


def options_of(framework):
    """OPTIONS, with a memory that no other test has written to."""
    memory = MEMORIES.get(framework, dict)()
    return {**OPTIONS[framework], "memory": memory}


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
    if framework in ("akd", "iad", "mtard", "bmtard"):
        return ce_by_hand(student, y)
    if framework == "adr":
        label = label_at_half_time(y)
        return lambda z, rows=I.ALL: soft_ce(student(z), label[rows])
    if framework == "adr_trades":
        clean = student(x).detach()
        return toward(student, lambda z, rows: clean[rows])
    if framework == "absld":
        t = teacher(x).detach() / TAUS[0, y, None]
        return toward(student, lambda z, rows: t[rows])
    if framework in ("adaiad", "igdm"):
        return toward(student, lambda z, rows: teacher(z))
    assert framework == "saad", f"say here what {framework} attacks by"
    return toward(student, linear_teacher(teacher, x, y))


# ==== 2. What every framework must be =============================================================


@each_framework
@each("reduction, b", [("batchmean", 1), ("batchmean", 5), ("mean", 5)])
def test_framework_is_its_formula_and_teaches_the_student_only(framework, reduction, b):
    formula, start = FORMULAS[framework], STARTS[framework]
    check_formula(framework, formula, inner, start, b, reduction, **options_of(framework))


@each_framework
def test_strength_reaches_every_inner_objective(framework):  # teachers in the attack included
    check_strength(framework, inner, STARTS[framework], **options_of(framework))


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
    check_lifted(framework, FORMULAS[framework], asa, lam_hi=1.5, **options_of(framework))


@each_framework
def test_no_graph_outlives_its_step(framework):
    check_no_graph_is_kept(framework)


NEEDS = [(name, "teacher") for name in ("iad", "mtard", "bmtard", "igdm", "saad", "absld")]
NEEDS += [("mtard", "teacher_nat"), ("bmtard", "teacher_nat")]


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
    "bmtard": ["x_adv", "x"],
    "absld": ["x_adv", "x"],
    "adr": ["x_adv"],
    "adr_trades": ["x", "x_adv"],
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
    check_passes(framework, PASSES[framework], **options_of(framework))


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
    assert found["teacher_nat"][0].mean.eq(0).all()
    cfg = replace(cfg, teacher_nat_norm="cifar10")
    found = I.get_nets(cfg, SMALL, torch.device("cpu"))
    assert found["teacher_nat"][0].mean.ne(0).all() and found["teacher"][0].mean.eq(0).all()


@given(seeds, st.floats(0, 20))
def test_the_surer_of_two_teachers_is_made_less_sure(seed, rate):
    tau = rand(2, seed=seed, lo=1, hi=10)
    entropies = rand(2, seed=seed + 1, hi=2.3)
    found = frameworks.balanced_temperatures(tau, entropies, rate)
    h_adv, h_nat = entropies.tolist()
    truth = [tau[0] - rate * math.copysign(1, h_adv / h_nat - 1)]
    truth.append(tau[1] - rate * math.copysign(1, h_nat / h_adv - 1))
    near(found, torch.stack(truth).clamp(1, 10))
    assert torch.equal(frameworks.balanced_temperatures(tau, torch.ones(2), rate), tau)


def test_bmtard_moves_its_temperatures_after_the_loss_and_slower_after_each_drop():
    _, teacher, x, y = pair(dtype=F64)
    natural = nn.Sequential(I.tiny(4, 16, width=2), nn.Linear(4, 4)).to(F64).eval()
    natural[1].weight.data *= 200  # very sure of itself
    tau, memory = [1.0, 1.0], {}
    options = {"teacher_nat": natural, "memory": memory, "schedule": "50", "epochs": 100}
    for progress, rate in ((0.1, 0.3), (0.2, 0.3), (0.6, 0.03)):
        student, *_ = pair(dtype=F64)
        own = {"temperature_rate": 0.3}
        step = make_step("bmtard", student, teacher, x, y, progress=progress, own=own, **options)
        loss = step.loss()
        adversarial = batch_kl(step.t_adv / tau[0], step.s_adv)
        clean = batch_kl(step.t_nat / tau[1], step.s)
        w_adv, w_nat = memory["w"]
        near(loss, w_adv * adversarial + w_nat * clean)
        tau[1] += rate
        near(memory["tau"], torch.tensor(tau, dtype=F64))


# ==== 5. ABSLD's classes ==========================================================================


@given(seeds, ints(2, 9), st.floats(0, 9))
def test_temperatures_of_classes_fall_where_losses_are_large(seed, k, rate):
    tau = rand(2, k, seed=seed, lo=0.5, hi=5)
    losses = rand(2, k, seed=seed + 1, hi=100)
    found = frameworks.class_temperatures(tau, losses, rate)
    near(frameworks.class_temperatures(tau, 7 * losses, rate), found)  # a sum or a mean
    truth = []
    for old, row in zip(tau.tolist(), losses.tolist(), strict=True):
        mean = sum(row) / k
        widest = max(abs(loss - mean) for loss in row)
        moved = [t - rate * (loss - mean) / widest for t, loss in zip(old, row, strict=True)]
        truth.append([min(5.0, max(0.5, t)) for t in moved])
    near(found, torch.tensor(truth, dtype=F64))
    hardest = losses.argmax(1, keepdim=True)
    assert (found.gather(1, hardest) <= tau.gather(1, hardest)).all()
    even = frameworks.class_temperatures(tau, torch.ones(2, k), rate)
    assert torch.equal(even, tau)  # no class lags behind


def test_absld_follows_the_released_procedure_over_epochs():
    """Sums of CE in an epoch, then one move of each temperature, by a rate that drops with lr."""
    student, teacher, _, _ = pair(dtype=F64)
    memory, taus = {}, torch.ones(2, 4, dtype=F64)
    options = {"memory": memory, "epochs": 6, "schedule": "2", "infoard": False}
    for epoch in range(4):
        sums = torch.zeros(2, 4, dtype=F64)
        for i in range(3):  # batches of four samples, each class once
            x = rand(4, 3, 16, 16, seed=10 * epoch + i)
            y = torch.arange(4)
            progress = (epoch + i / 3) / 6
            step = make_step("absld", student, teacher, x, y, progress=progress, **options)
            step.loss()
            near(memory["tau"], taus)
            for k in range(4):
                sums[0, k] -= step.s_adv[k].log_softmax(0)[k].item()
                sums[1, k] -= step.s[k].log_softmax(0)[k].item()
        rate = 0.1 if epoch + 1 < 2 else 0.01  # dropped before the move that follows the epoch
        for row in range(2):
            gap = sums[row] - sums[row].mean()
            taus[row] = (taus[row] - rate * gap / gap.abs().max()).clamp(0.5, 5)
    assert (taus - 1).abs().min() > 1e-3 and not memory["tau"].requires_grad


def test_large_classes_are_not_taken_for_hard_ones():
    student, teacher, x, _ = pair(dtype=F64)
    x, y = x[[0, 0, 0, 0, 1]], torch.tensor([2, 2, 2, 2, 1])
    step = make_step("absld", student.eval(), teacher, x, y, own={"temperature_rate": 0.0})
    step.loss()
    noted = step.memory["noted"]
    near(noted[2], torch.tensor([0, 1, 4, 0.0]))
    ce = F.cross_entropy(step.s, y, reduction="none")
    near(noted[1], torch.tensor([0, ce[4].item(), 4 * ce[0].item(), 0], dtype=F64))


def test_an_epoch_begins_with_its_first_batch():
    """A share of training is rounded; it must not fall into the epoch before."""
    last = 1_999_998 / 2_000_000  # where the last batch of an epoch begins
    for epochs in range(1, 301):
        for epoch in range(epochs):
            for within in (0.0, last):
                progress = (epoch + within) / epochs
                assert frameworks.epochs_behind(progress, epochs) == epoch


# ==== 6. ADR's average ============================================================================


@given(seeds, ints(1, 6), st.floats(0, 1), st.floats(0.3, 5))
def test_adrs_label_is_a_mixture_in_which_the_truth_leads(seed, b, weight, tau):
    z = rand(b, K, seed=seed, lo=-9, hi=9)
    y = labels(b, seed=seed)
    q = frameworks.adr_label(z, y, weight, tau)
    near(q, label_by_hand(z, y, weight, tau))
    near(q.sum(1), torch.ones(b))
    assert (q.gather(1, y[:, None]) >= q - 1e-12).all()
    assert torch.equal(frameworks.adr_label(z, y, 0.0, tau), F.one_hot(y, K).to(z.dtype))


def test_adr_averages_weights_and_statistics_over_all_steps_before():
    student, _, x, y = pair(dtype=F64)
    memory, own = {}, {"adr_decay": 0.8}
    truth = copy.deepcopy(student).eval()
    for k, progress in enumerate((0.0, 0.3, 1.0)):
        if k:
            with torch.no_grad():
                for mine, now in zip(truth.parameters(), student.parameters(), strict=True):
                    mine.copy_(0.8 * mine + 0.2 * now)
                for mine, now in zip(truth.buffers(), student.buffers(), strict=True):
                    if mine.is_floating_point():
                        mine.copy_(0.8 * mine + 0.2 * now)
        weight = 0.95 - 0.25 * (1 + math.cos(math.pi * progress)) / 2
        tau = 2.0 + 0.5 * (1 + math.cos(math.pi * progress)) / 2
        label = label_by_hand(truth(x), y, weight, tau)
        before = copy.deepcopy(student)
        step = make_step("adr", student, None, x, y, progress=progress, memory=memory, own=own)
        loss = step.loss()
        near(loss, soft_ce(before(step.x_adv), label).mean())
        loss.backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert not any(tensor.requires_grad for tensor in memory.values())


def test_adr_needs_no_teacher_and_asks_none():
    for framework in ("adr", "adr_trades"):
        student, _, x, y = pair()
        make_step(framework, student, None, x, y).loss().backward()
        assert I.FRAMEWORKS[framework] and not I.get_framework(framework).needs


# ==== 7. What they reduce to, and what is kept ====================================================

NOTHING = {"adr_weight_lo": 0.0, "adr_weight_hi": 0.0}
STILL = {"temperature_rate": 0.0}
REDUCTIONS = [
    ("absld", STILL, "rslad"),
    ("bmtard", STILL, "mtard"),
    ("adr", NOTHING, "at"),
    ("adr_trades", NOTHING, "trades"),
]


@each("framework, own, base", REDUCTIONS)
@each("dtype", [F64, torch.float32])
def test_without_what_is_new_they_teach_what_their_base_does_bit_for_bit(
    framework, own, base, dtype
):
    found = {}
    for name, settings in ((framework, own), (base, {})):
        student, teacher, x, y = pair(dtype=dtype)
        natural = I.tiny(4, 16, width=2).to(dtype).eval()
        options = {"teacher_nat": natural, "epochs": 4, "own": settings, "memory": {}}
        for progress in (0.0, 0.1, 0.25, 0.5):  # over several epochs
            step = make_step(name, student, teacher, x, y, progress=progress, **options)
            loss = step.loss()
            grads = torch.autograd.grad(loss, [*student.parameters()])
            with torch.no_grad():
                for p, grad in zip(student.parameters(), grads, strict=True):
                    p -= 0.5 * grad
        found[name] = [step.x_adv, *student.parameters(), *student.buffers()]
        found[name, "loss"] = loss
    for ours, theirs in zip(found[framework], found[base], strict=True):
        assert torch.equal(ours, theirs)
    near(found[framework, "loss"], found[base, "loss"], 1e-6)  # a sum over classes too, of zeros


@each("framework", ["bmtard", "absld", "adr"])
def test_what_steps_remember_is_resumed_bit_for_bit(framework, tmp_path):
    """Stopped within the second epoch, after a step that an epoch begins with."""
    options = {"framework": framework, "student": "tiny", "epochs": 3, "steps": 1, "amp": "off"}
    options.update(batch_size=8, device="cpu", val_size=0, infoard=False)
    cfg = I.Config(**options).resolved()

    def new_run():
        torch.manual_seed(1)
        made = {"teacher": I.tiny().eval(), "teacher_nat": I.tiny().eval()}
        return I.Run(cfg, SMALL, torch.device("cpu"), made)

    def go(run, first, last):
        for k in range(first, last):
            epoch, i = divmod(k, 2)  # two steps an epoch
            I.train_step(run, run.train[8 * k : 8 * (k + 1)], (epoch + i / 2) / 3)

    whole, stopped = new_run(), new_run()
    go(whole, 0, 6)
    go(stopped, 0, 3)
    I.save(tmp_path / "last.pt", stopped.state())
    resumed = new_run()
    resumed.load(tmp_path / "last.pt")
    go(resumed, 3, 6)
    learned = resumed.student.state_dict()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(learned[name], value), name
    assert resumed.at.memory.keys() == whole.at.memory.keys()
    for name, value in whole.at.memory.items():
        assert torch.equal(resumed.at.memory[name], value), name
    if framework == "absld":
        assert (whole.at.memory["tau"] - 1).abs().max() > 0.01


# ==== 8. Settings =================================================================================


def test_settings_of_the_framework_unless_told_otherwise():
    cfg = I.Config(framework="iad").resolved()
    assert (cfg.beta, cfg.temperature) == (0.1, 1.0)
    cfg = I.Config(framework="saad").resolved()
    assert (cfg.alpha, cfg.beta) == (1.0, 0.0)
    assert I.Config(framework="igdm").resolved().alpha == 5.0  # as --plus igdm on adaad
    assert plus.usual_weights("adaad", "cifar10")["igdm"] == 5.0
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


@each(
    "framework, own, told",
    [
        ("absld", {"temperature_rate": -0.1}, "--temperature-rate must lie in"),
        ("bmtard", {"temperature_rate": -1.0}, "--temperature-rate must lie in"),
        ("adr", {"adr_decay": 1.5}, "--adr-decay must lie in"),
        ("adr", {"adr_weight_hi": -0.1}, "--adr-weight-hi must lie in"),
        ("adr_trades", {"adr_tau_lo": 0.0}, "--adr-tau-lo must be above 0"),
    ],
)
def test_settings_out_of_range_are_one_line(framework, own, told):
    with pytest.raises(I.InfoardError, match=told):
        I.Config(framework=framework, own=own).resolved()


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
