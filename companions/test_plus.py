"""What holds for --plus: formulas by hand, published combinations, weight 0, errors."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import infoard as I
from companions import bench, frameworks, plus, runs
from test_infoard import batch_kl, each, labels, make_step, near, rand, tiny_net

X, Y = rand(6, 3, 8, 8).float(), labels(6)
BASES = ["at", "trades", "ard", "rslad", "iad", "adaad", "akd", "absld", "adr"]


def stepped(framework, terms="", **options):
    """The loss and the step of a framework with terms, on fixed nets and images."""
    student, teacher = tiny_net(), tiny_net(1)
    step = make_step(
        framework, student.train(), teacher, X, Y, plus=terms, infoard=False, **options
    )
    return step.loss(), step


def gradient(loss, step):
    return torch.autograd.grad(loss, [*step.student.parameters()], retain_graph=True)


@each("base", BASES)
def test_weight_zero_is_the_base_bit_for_bit(base):
    plain, first = stepped(base)
    added, second = stepped(base, "igdm:0")
    assert torch.equal(plain, added)
    for a, b in zip(gradient(plain, first), gradient(added, second), strict=True):
        assert torch.equal(a, b)


@each("base", BASES)
def test_igdm_adds_the_divergence_of_differences(base):
    plain, _ = stepped(base)
    added, step = stepped(base, "igdm:7")
    x_minus = 2 * step.x - step.x_adv
    t_slope = step.t_adv - I.predict(step.teacher, x_minus)
    student = step.student.train()
    s_slope = step.s_adv - student(x_minus)
    near(added, plain + 7 * 0.5 * batch_kl(t_slope, s_slope), 1e-5)  # at half time, in float32


def test_igdm_on_adaad_is_the_framework_igdm():
    published, _ = stepped("igdm", alpha=3.0)
    added, _ = stepped("adaad", "igdm:3", alpha=1.0)
    near(added, published, 1e-6)


def test_saad_weighs_the_divergences_of_each_sample():
    added, step = stepped("rslad", "saad")
    p = step.t_adv.softmax(1)
    entropy = -(p * p.log()).sum(1)
    h = 5 * (entropy - entropy.min())
    rows = 5 / 6 * I.kl(step.t, step.s_adv) + 1 / 6 * I.kl(step.t, step.s)
    near(added, (h * rows).mean(), 1e-5)  # float32


def test_saad_c_brings_back_the_clean_divergence_of_sure_samples():
    with_saad, _ = stepped("rslad", "saad")
    added, step = stepped("rslad", "saad_c:0.4")
    _, rest = frameworks.saad_weights(step.t_adv)
    near(added, with_saad + 0.4 * (rest * I.kl(step.t, step.s)).mean(), 1e-5)


def test_both_together_weigh_the_differences_too():
    saad, _ = stepped("adaad", "saad")
    both, step = stepped("adaad", "saad,igdm:2")
    h, _ = frameworks.saad_weights(step.t_adv)
    x_minus = 2 * step.x - step.x_adv
    t_slope = step.t_adv - I.predict(step.teacher, x_minus)
    s_slope = step.s_adv - step.student(x_minus)
    near(both, saad + 2 * 0.5 * (h * I.kl(t_slope, s_slope)).mean(), 1e-5)
    assert step.terms["igdm"] > 0


def test_the_lines_of_the_documents_are_these_terms_in_a_loop_of_ones_own():
    text = (Path(I.__file__).parent / "docs/usage.md").read_text()
    (lines,) = re.findall(r"```python\n([^`]*saad_weights[^`]*)```", text)
    expected, step = stepped("adaad", "igdm:5,saad")
    student, teacher = tiny_net().train(), tiny_net(1)
    names = {"student": student, "teacher": teacher, "x": X, "x_adv": step.x_adv, "share": 0.5}
    exec(lines, names)
    near(names["loss"], expected, 1e-6)  # float32: a mean of sums, a sum of means
    found = torch.autograd.grad(names["loss"], [*student.parameters()])
    for a, b in zip(found, gradient(expected, step), strict=True):
        near(a, b, 1e-6)


def test_terms_stand_beside_infoard():
    student, teacher = tiny_net(), tiny_net(1)
    info = I.InfoARD(student, teacher, image_shape=(3, 8, 8))
    step = make_step("rslad", student.train(), teacher, X, Y, info, plus="igdm,saad")
    step.loss().backward()
    assert {"feat", "igdm"} <= step.terms.keys()


# IGDM's alpha on CIFAR-10, CIFAR-100 (LTD teacher) and Tiny-ImageNet: 2312.03286, tables 17, 18.
FACTS = {
    "at": (60, 100, 30),
    "trades": (20, 5, 20),
    "ard": (5, 50, 10),
    "iad": (50, 20, 20),
    "akd": (7, 50, 10),
    "rslad": (0.9, 3, 1),
    "adaad": (5, 15, 10),
}


@each("framework", FACTS)
def test_published_weights_are_the_usual_ones(framework):
    found = []
    for dataset in ("cifar10", "cifar100", "tinyimagenet"):
        cfg = I.Config(framework=framework, dataset=dataset, plus="igdm").resolved()
        found.append(plus.weights_of(cfg)["igdm"])
    assert tuple(found) == FACTS[framework]
    numbers = {line.split()[0]: line.split() for line in plus.__doc__.splitlines() if line}
    place = plus.BASES.index(framework) + 1
    assert float(numbers["cifar10"][place]) == FACTS[framework][0]  # of the table in its help
    assert float(numbers["tinyimagenet"][place]) == FACTS[framework][2]


@each(
    "framework, dataset, alpha",
    [
        ("mtard", "shapes", 0.9),
        ("absld", "cifar100", 3),
        ("adaiad", "cifar100", 15),
        ("adr", "svhn", 60),
        ("adr_trades", "cifar10", 20),
        ("trades", "mine:load", 20),
    ],
)
def test_other_bases_and_data_sets_have_the_weights_of_their_kin(framework, dataset, alpha):
    assert plus.usual_weights(framework, dataset)["igdm"] == alpha


@each("dataset, beta", [("cifar10", 0.2), ("cifar100", 0.5), ("tinyimagenet", 0.5)])
def test_saad_c_has_its_papers_weight(dataset, beta):  # 2512.10275, table 16
    cfg = I.Config(dataset=dataset, plus="saad_c").resolved()
    assert plus.weights_of(cfg) == {"saad_c": beta}


@each(
    "framework, terms, why",
    [
        ("rslad", "idgm", "unknown term of --plus 'idgm'"),
        ("igdm", "igdm", "igdm has it already"),
        ("saad", "saad_c", "saad has it already"),
        ("saad", "igdm", "saad has it already"),
        ("rslad", "igdm,igdm:3", "stands twice"),
        ("rslad", "saad,saad_c", "one term more"),
        ("at", "saad", "at has none"),
        ("adr", "saad_c", "adr has none"),
        ("rslad", "saad:3", "has no weight"),
        ("rslad", "igdm:x", "write a number"),
        ("rslad", "igdm:", "write a number"),
        ("rslad", "igdm:-1", "finite number, not negative"),
        ("rslad", "saad_c:inf", "finite number, not negative"),
        ("natural", "igdm", "natural makes no x'"),
        ("mid", "igdm", "mid makes no x'"),
        ("namid", "saad", "namid has none"),
    ],
)
def test_what_cannot_be_added_is_one_line(framework, terms, why):
    with pytest.raises(I.InfoardError, match=why) as error:
        I.Config(framework=framework, plus=terms).resolved()
    assert "\n" not in str(error.value)


def test_weights_are_told_and_kept():
    cfg = I.Config(framework="rslad", dataset="cifar100", plus="igdm,saad_c:0.3").resolved()
    (line,) = plus.about_weights(cfg)
    assert "igdm 3, saad_c 0.3" in line and "papers', for cifar100" in line
    assert plus.about_weights(I.Config(plus="saad").resolved()) == []
    made = SimpleNamespace(
        cfg=cfg, device=torch.device("cpu"), data=bench.random_data(4, 8), nets={}
    )
    kept = runs.provenance(made)["plus"]
    assert kept == {"igdm": 3.0, "saad_c": 0.3}
    assert plus.about_weights(I.Config().resolved()) == []


def unattacked(step):
    return step.mean_kl(step.t, step.s)


def too_early(step):
    clean = step.mean_kl(step.t, step.s)
    step.attack(I.kl_objective(step.student, step.t))
    return clean + step.mean_kl(step.t, step.s_adv)


def own_divergence(step):
    step.attack(I.ce_objective(step.student, step.y))
    return I.mean_kl(step.t, step.s_adv)


@each(
    "loss, terms, why",
    [
        (unattacked, "igdm", "no step.attack"),
        (unattacked, "saad", "before step.attack"),
        (too_early, "saad_c", "before step.attack"),
        (own_divergence, "saad", "step.mean_kl for none"),
    ],
)
def test_a_term_that_would_change_nothing_is_refused(loss, terms, why, monkeypatch):
    monkeypatch.setitem(I.FRAMEWORKS, "mine", I.Framework(loss))
    with pytest.raises(I.InfoardError, match=why):
        stepped("mine", terms)
