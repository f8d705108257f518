"""What holds for evaluation.py and autoattack.py: intervals, warnings, parts, teachers."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import infoard as I
from companions import autoattack, evaluation, options, protocol, runs
from test_infoard import (
    R,
    evaluate,
    identity_net,
    ints,
    near,
    one_line,
    percent_of,
    rand,
    seeded,
    snapshot,
)

each = pytest.mark.parametrize


# ==== 1. Confidence ===============================================================================


@given(data=st.data(), n=ints(1, 10_000))
def test_interval_holds_the_share(data, n):
    hits = data.draw(st.sampled_from([0, n]) | ints(0, n))
    low, high = evaluation.interval(hits / n, n)
    assert 0 <= low <= 100 * hits / n + 0.01  # two decimals
    assert 100 * hits / n - 0.01 <= high <= 100


@given(data=st.data(), n=ints(1, 10_000))
def test_interval_is_wilsons(data, n):
    hits = data.draw(ints(0, n))
    ends = evaluation.interval(hits / n, n)
    truth = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    near(ends, [100 * truth.low, 100 * truth.high], 0.007)  # two decimals; 1.96 is 1.959964


@given(hits=st.lists(st.booleans(), min_size=1, max_size=50))
def test_each_column_has_its_interval(hits):
    right = {"clean": torch.tensor(hits), "apgd-ce": torch.tensor(hits)}
    share = sum(hits) / len(hits)
    assert evaluation.intervals(right) == {"clean": evaluation.interval(share, len(hits))}


# ==== 2. Masked gradients =========================================================================


def first_right(**counts):
    """{attack: which of 100 samples are right after it}, as many as given, the first ones."""
    return {name.replace("_t", "-t"): torch.arange(100) < n for name, n in counts.items()}


@each("gap", [0, 4, 5, 6, 7, 8, 30])
@each("name", ["cw", "apgd", "aa"])
def test_a_gap_of_five_is_noted_and_of_eight_warned_of(name, gap):
    right = first_right(clean=80, pgd_sat=50, fab_t=50 - gap, **{name: 50 - gap})
    warnings = evaluation.masking(right)
    assert len(warnings) == (1 if gap >= 8 else 0)
    _, notes = evaluation.gaps(right)
    assert len(notes) == (1 if 5 <= gap < 8 else 0)
    assert all(f"{name} is {gap}.0 ± " in note for note in notes)


@each("pgd, other, warned", [(25, 15, False), (32, 22, False), (25, 12, True), (40, 31, True)])
def test_a_weak_net_is_warned_of_where_half_is_lost(pgd, other, warned):
    right = first_right(clean=60, pgd_sat=pgd, cw=other)
    assert bool(evaluation.masking(right)) == warned
    assert bool(evaluation.gaps(right)[1]) != warned


@each("repeats, warned", [(1, False), (2, False), (4, True)])
def test_of_few_images_a_gap_is_no_warning(repeats, warned):
    of_25 = {"clean": 20, "pgd_sat": 15, "cw": 13}  # 8 points
    right = {k: (torch.arange(25) < n).repeat(repeats) for k, n in of_25.items()}
    assert bool(evaluation.masking(right)) == warned


class OneClass(nn.Module):
    """Says class 3 of everything, whatever the image, but that it is a little brighter or not."""

    def __init__(self, classes=10):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.classes = classes

    def forward(self, x):
        logits = torch.zeros(len(x), self.classes)
        logits[:, 3] = 5 + self.weight * x.mean((1, 2, 3))
        return logits


def test_a_net_that_says_one_class_of_everything_masks_nothing():
    x = rand(20, 3, 4, 4).float()
    y = torch.arange(20) % 10
    result = I.evaluate(OneClass(), x, y, attacks="clean,pgd")
    assert result["clean"] == result["worst"] == 10.0
    assert not any("survive" in warning for warning in result["warnings"])


class Rounded(nn.Module):
    """A net that rounds its input first, so that no gradient passes; or takes a root of zero."""

    def __init__(self, net, how):
        super().__init__()
        self.net = net
        self.how = how

    def forward(self, x):
        if self.how == "zero":
            return self.net((8 * x).round() / 8)
        return self.net(x + (x - x.detach()).abs().sqrt())  # the root's slope at 0 is infinite


@each("how, told", [("zero", "is zero on"), ("root", "is not finite on")])
@each("attacks", ["clean,cw", "clean,fgsm", "clean,pgd_l2"])
def test_gradients_that_lead_nowhere_are_warned_of(how, told, attacks):
    net = Rounded(linear_net(), how).eval()
    x = rand(20, 3, 8, 8, lo=0.3, hi=0.7).float()
    y = I.predict(net, x).argmax(1)
    result = I.evaluate(net, x, y, attacks=attacks)
    assert any(f"{told} 20 of 20 images" in warning for warning in result["warnings"])
    name = attacks.partition(",")[2]
    if how == "root" and name != "cw":  # x' is x or NaN, which is no image and beats nobody
        assert result[name] == 100.0
    ordinary = I.evaluate(linear_net(), x, y, attacks=attacks)
    assert not any("gradient" in warning for warning in ordinary["warnings"])


def test_nan_is_no_class_and_is_told():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(torch.nan))

        def forward(self, x):
            return x.flatten(1)[:, :10] * self.weight

    result = I.evaluate(Dead(), rand(20, 3, 4, 4).float(), torch.arange(20) % 10, attacks="clean")
    assert result["clean"] == 0.0
    assert result["notes"] == [
        "warning: logits are NaN on 20 of 20 wrong images looked at: no class"
    ]


@each(
    "square, alive, warnings",
    [(48, 5, 0), (47, 10, 1), (46, 0, 1), (46, 11, 2)],  # one of the 80 right ones is 1.25%
)
def test_masking_warning_from_square_and_from_a_radius_that_nothing_survives(
    square, alive, warnings
):
    right = first_right(clean=80, pgd_sat=50, fab_t=48, aa=square)
    assert len(evaluation.masking(right, alive, 1000)) == warnings


@given(n=ints(1, 256), data=st.data())
def test_survivors_are_warned_of_where_they_are_more_than_one_per_cent(n, data):
    alive = data.draw(st.integers(0, n))
    warnings = evaluation.masking({}, alive, n)
    assert bool(warnings) == (100 * alive > n)
    assert all(f"{alive} of {n} right images survive" in warning for warning in warnings)


def test_survivors_are_counted_without_the_class_that_has_most():
    """The counts fit each other: those of the class left out are in neither number."""
    net, x, y = identity_net(4)
    x, y = x.repeat(5, 1, 1, 1), y.repeat(5)

    def spare(net, x, y, *, eps, generator):
        """Takes nothing from class 2, and from class 1 all but one image."""
        spared = (y == 2) | ((y == 1) & ((y == 1).cumsum(0) == 1))
        return torch.where(spared.view(-1, 1, 1, 1), x, 1 - x)

    right = I.predict(net, x).argmax(1) == y
    found = evaluation.survivors(net, x, y, right, attack=spare)
    assert found == {"alive": 1, "of": 15, "left_out": 2}
    words = protocol.of_masking({"attack": "pgd_sat", "eps": 64 / 255, **found})
    assert "1 of 15 right images are still right (the class 2 left out, which has most" in words


@each("attacks, radii", [("clean,pgd", [R, 64 / 255]), ("pgd_sat", [R, 64 / 255])])
def test_pgd_also_asks_for_a_radius_that_nothing_survives(attacks, radii, monkeypatch):
    seen = []

    def harmless(net, x, y, *, eps, generator):
        seen.append(eps)
        return x

    monkeypatch.setattr(I, "pgd_sat", harmless)
    monkeypatch.setitem(I.ATTACKS, "pgd_sat", harmless)
    net, x, y = identity_net(10)
    result = I.evaluate(net, x, y, attacks=attacks, eps=R)
    assert seen == radii
    assert "9 of 9 right images survive eps = 64/255" in result["warnings"][0]


@each("ran, by", [("pgd_trades", "pgd_sat"), ("apgd", "pgd_sat"), ("cw", "cw"), ("fgsm", "")])
def test_masked_gradients_are_looked_for_whatever_was_run(ran, by):
    assert evaluation.for_a_huge_radius({"clean": None, ran: None}) == by


# ==== 3. Precision ================================================================================


@each(
    "kind, capability, allowed, dtype, name",
    [
        ("cpu", (9, 0), True, torch.float32, "fp32"),
        ("cuda", (9, 0), True, torch.float32, "tf32"),
        ("cuda", (9, 0), False, torch.float32, "fp32"),
        ("cuda", (7, 5), True, torch.float32, "fp32"),  # a card that has none
        ("cuda", (9, 0), True, torch.bfloat16, "bf16"),
        ("cuda", (9, 0), True, torch.float16, "fp16"),
        ("cpu", (9, 0), True, torch.float64, "fp64"),
    ],
)
def test_a_precision_has_the_name_of_what_is_computed(
    kind, capability, allowed, dtype, name, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert evaluation.precision(torch.device(kind), dtype) == name


def test_every_result_names_the_precision_of_its_net():
    net, x, y = identity_net(10)
    assert I.evaluate(net, x, y, attacks="clean")["precision"] == "fp32"
    assert I.evaluate(net.double(), x.double(), y, attacks="clean")["precision"] == "fp64"
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluation.precision_of(net.float()) == "bf16"


@each("wanted", [True, False])
def test_tf32_is_off_inside_only_where_it_is_asked_for(wanted, monkeypatch):
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        with pytest.raises(ZeroDivisionError), evaluation.exact_fp32(wanted):
            assert torch.backends.cudnn.allow_tf32 == (before and not wanted)
            raise ZeroDivisionError
        assert torch.backends.cudnn.allow_tf32 == before


# ==== 4. AutoAttack ===============================================================================


def linear_net(size=8, classes=10):
    """A net whose robust accuracy has a closed form."""
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)))


def reach_of_linear(net, x, y):
    """The radius at which each sample of a linear net is lost, if it keeps away from 0 and 1:
    the least over other classes k of (z_y - z_k) / |w_y - w_k|_1.
    """
    z = net(x)
    weight = net[1].weight
    leads = z.gather(1, y[:, None]) - z  # [B,K]
    lengths = (weight[y][:, None] - weight[None]).abs().sum(2)
    lengths = lengths.scatter(1, y[:, None], 0.0)  # of its own class: 0/0
    return (leads / lengths).nan_to_num(torch.inf).amin(1).detach()


def test_autoattack_finds_the_closed_form_of_a_linear_net():
    net = linear_net()
    x = rand(20, 3, 8, 8, lo=0.3, hi=0.7).float()
    y = I.predict(net, x).argmax(1)
    reach = reach_of_linear(net, x, y)
    eps = reach.sort()[0][15:17].mean().item()  # sixteen of twenty fall
    assert 0 < eps < 0.25
    result = I.evaluate(net, x, y, eps=eps, attacks="clean,fgsm,pgd,apgd,aa")
    assert result["clean"] == 100.0
    assert result["aa"] == result["worst"] == 20.0
    assert result["aa"] <= result["apgd"] <= 100.0
    assert min(result["fgsm"], result["pgd_sat"], result["pgd_trades"]) >= 20.0


PARTS = [  # classes, attacks, parts that are run, their column
    (3, "apgd", ["apgd-ce"], "apgd"),
    (10, "apgd", ["apgd-ce", "apgd-t"], "apgd"),
    (3, "aa", ["apgd-ce", "fab-t", "square"], "aa"),
    (10, "aa", ["apgd-ce", "apgd-t", "fab-t", "square"], "aa"),
    (10, "aa,apgd", ["apgd-ce", "apgd-t", "fab-t", "square"], "aa"),
]


@each("classes, attacks, parts, column", PARTS)
def test_each_part_attacks_what_is_left(classes, attacks, parts, column, monkeypatch):
    net, x, y = identity_net(classes)
    wrong = x.roll(1, 0)  # images of another class
    done = []

    def beat_the_first(part, net, x, y, eps, generator, norm="Linf"):
        done.append((part, len(x)))
        return torch.cat([wrong[y[:1]], x[1:]])

    monkeypatch.setattr(autoattack, "attack_by", beat_the_first)
    result = I.evaluate(net, x, y, attacks=f"clean,{attacks}")
    assert done == [(part, classes - i) for i, part in enumerate(parts)]
    assert result[column] == result["worst"] == percent_of(classes - len(parts), classes)
    assert not set(I.PARTS) & (result.keys() | result["ci95"].keys())
    assert ("APGD-T is left out" in " ".join(result["notes"])) == ("apgd-t" not in parts)


@each("attack", ["apgd", "apgd_l2"])
def test_what_needs_four_classes_is_told_to_be_left_out(attack, monkeypatch):
    monkeypatch.setattr(autoattack, "attack_by", lambda part, net, x, *others: x)
    for classes, told in ((3, 1), (4, 0)):
        notes = I.evaluate(*identity_net(classes), attacks=f"clean,{attack}")["notes"]
        assert sum("APGD-T is left out" in note for note in notes) == told


# ==== 5. Attacks on another net, and images =======================================================


class WithQuality(nn.Module):
    """A net that says something of attacked images as well, as one that makes images does."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def quality(self, x, x_adv):
        return {"moved": (x_adv - x).abs().max().item()}


def test_transfer_is_from_the_source_in_every_part(lab, monkeypatch):
    attacked = []
    pgd_sat = I.pgd_sat

    def watched(net, *args, **options):
        attacked.append(net)
        return pgd_sat(net, *args, **options)

    def no_autoattack(part, net, x, *others):
        attacked.append(net)
        return x

    monkeypatch.setattr(I, "pgd_sat", watched)
    monkeypatch.setattr(autoattack, "attack_by", no_autoattack)
    model = WithQuality(lab.net)
    source = seeded(I.tiny).train()
    before = snapshot(source)
    result = evaluate(model, attacks="clean,pgd,apgd", source=source)
    assert attacked == [source] * 4  # pgd_sat, two parts of AutoAttack, images for quality
    assert snapshot(source) == before
    near(result["moved"], R, 1e-6)

    attacked.clear()
    evaluate(model, attacks="clean,pgd,apgd")
    assert attacked == [model] * 5  # and once more with a radius that nothing should survive


def test_attacks_on_another_net_transfer_and_warn_of_nothing(lab):
    white = evaluate(lab.net, 40, attacks="clean,fgsm,pgd")
    moved = evaluate(lab.net, 40, attacks="clean,fgsm,pgd", source=seeded(I.tiny).eval())
    assert moved["clean"] == white["clean"]
    assert moved["fgsm"] > white["fgsm"] and moved["pgd_sat"] > white["pgd_sat"]
    assert moved["warnings"] == []


# ==== 6. Teachers =================================================================================


def checking(right, classes, monkeypatch, name="t.pt"):
    """check_teacher of a net that is right on so many of 100 images; no more is said of it."""
    monkeypatch.setattr(I, "correct", lambda net, x, y: torch.arange(100) < right)
    monkeypatch.setattr(evaluation, "judge", lambda *about: "")
    y = torch.arange(100) % classes
    return partial(evaluation.check_teacher, None, torch.zeros(100, 3), y, name, classes)


@each("right", [10, 15, 16, 20, 21, 100])
def test_only_a_teacher_that_is_told_apart_from_chance_passes(right, monkeypatch, capsys):
    check = checking(right, 10, monkeypatch)
    told = f"teacher t.pt: clean accuracy {right}.0 on 100 test images"
    low, _ = stats.binomtest(right, 100).proportion_ci(0.95, method="wilson")
    assert (low > 0.1) == (right > 15)  # 10 of 100 are chance
    if right > 20:
        check()
        assert capsys.readouterr().out == f"{told}\n"
    elif low > 0.1:  # no more than twice chance is weak
        check()
        line = f"warning: {told}, chance is 10.0 (always one class)\n"
        assert capsys.readouterr().out == line
    else:
        with pytest.raises(I.InfoardError, match=f"{told}, chance is 10.0") as error:
            check()
        assert one_line(error.value)


@each("right", [10, 20, 21, 100])
def test_a_weak_teacher_that_was_trained_here_only_warns(right, monkeypatch, capsys):
    checking(right, 10, monkeypatch, "runs/teachers/a/best.pt")()
    shown = capsys.readouterr().out
    assert ("warning" in shown) == (right <= 20)
    assert ("(always one class): raise --teacher-epochs\n" in shown) == (right <= 20)


@each("right", [22, 40, 95])
def test_chance_is_one_for_teachers_and_students(right, monkeypatch, capsys):
    """Of five classes one is missing among the test images: chance is a fourth for both."""
    y = torch.arange(100) % 4
    monkeypatch.setattr(I, "correct", lambda net, x, y: torch.arange(100) < right)
    monkeypatch.setattr(evaluation, "judge", lambda *about: "")
    name = "runs/teachers/a/best.pt"
    evaluation.check_teacher(None, torch.zeros(100, 3), y, name, 5)
    of_teacher = capsys.readouterr().out
    low, high = evaluation.interval(right / 100, 100)
    result = {"clean": right, "n": 100, "ci95": {"clean": [low, high]}}
    of_student = "".join(runs.about_chance(result, y, "more"))
    assert ("chance is 25.0" in of_teacher) == (right <= 43.75)
    assert ("chance, 25.0 (always one class): more" in of_student) == (right == 22)


@each("right, stops", [(40, True), (70, False)])
def test_a_teacher_for_uneven_images_stops_nothing_unless_it_guesses(
    right, stops, monkeypatch, capsys
):
    y = (torch.arange(100) >= 90).long()
    monkeypatch.setattr(I, "correct", lambda net, x, y: torch.arange(100) < right)
    monkeypatch.setattr(evaluation, "judge", lambda *about: "")
    expected = pytest.raises(I.InfoardError) if stops else contextlib.nullcontext()
    with expected:
        evaluation.check_teacher(None, torch.zeros(100, 3), y, "t.pt", 2)
    assert ("warning: " in capsys.readouterr().out) == (not stops)


@each(
    "right, classes, passes",
    [(58, 2, False), (62, 2, True), (41, 3, False), (45, 3, True), (65, 3, True)],
)
def test_of_few_classes_a_teacher_needs_less_than_twice_chance(right, classes, passes, monkeypatch):
    check = checking(right, classes, monkeypatch)
    if passes:
        check()
    else:
        pytest.raises(I.InfoardError, check)


# ==== 6. How it was measured, and what is kept ====================================================


def watched_steps(name, monkeypatch):
    """[(eps, alpha, steps, start, objective)] of the pgd that an attack calls."""
    seen = []

    def look(objective, x, *, eps, alpha, steps, init="uniform", **options):
        seen.append((eps, alpha, steps, init, objective))
        return x

    monkeypatch.setattr(I, "pgd", look)
    attack = I.resolve(I.ATTACKS, name, "attack")
    attack(linear_net(), rand(4, 3, 8, 8).float(), torch.arange(4), eps=0.1)
    return seen


@each("name", list(protocol.STEPS))
def test_the_protocol_is_what_the_attack_does(name, monkeypatch):
    ((eps, alpha, steps, init, objective),) = watched_steps(name, monkeypatch)
    attack = I.resolve(I.ATTACKS, name, "attack")
    about = protocol.one_attack(name, attack, 0.1, 0.1)
    assert (about["eps"], about["steps"], about["start"]) == (eps, steps, init)
    near(about["step_size"], alpha)
    x = rand(4, 3, 8, 8).float()
    z = linear_net()(x)
    y = torch.arange(4)
    margin = z.scatter(1, y[:, None], -torch.inf).amax(1) - z[y, y]
    losses = {
        "cross-entropy": -z.log_softmax(1)[y, y],
        "margin": margin,
        "cross-entropy to another class": z.log_softmax(1)[y, 2 * y + 1],  # y + 1 + place
    }
    near(objective(x), losses[about["loss"]], 1e-5)  # float32


@each(
    "value, text",
    [
        (8 / 255, "8/255"),
        (2 / 255, "2/255"),
        (0.003, "0.003"),  # of TRADES, at 8/255
        (0.003 / 2, "0.0015"),  # and at 4/255
        (0.8 / 255, "0.8/255"),
        (0.3, "0.3"),
        (1.0, "1"),
        (0.0, "0"),
        (20 / 3 / 255, "6.67/255"),
    ],
)
def test_a_length_is_told_as_people_write_it(value, text):
    assert protocol.as_pixels(value) == text


@given(value=st.floats(1e-4, 1))
def test_a_length_is_told_to_three_digits(value):
    text = protocol.as_pixels(value)
    above, _, below = text.partition("/")
    near(float(above) / float(below or 1), value, 0.00501 * value)


def test_every_attack_has_a_protocol():
    attacks = {name: I.resolve(I.ATTACKS, name, "attack") for name in I.ATTACKS}
    about = protocol.protocol(attacks, 5, 8 / 255, 0.5, 0)
    for name, attack in about["attacks"].items():
        if attack["norm"] != "none":
            assert attack["eps"] == (0.5 if attack["norm"] == "l2" else 8 / 255), name
            assert attack.get("steps") or attack.get("queries"), name
            assert attack["start"] in protocol.START and attack["loss"], name
    json.dumps(about)


def test_a_line_says_of_how_many_and_under_what(lab, capsys):
    result = evaluate(lab.net, 10, attacks="clean,fgsm,pgd,pgd_l2", eps=4 / 255)
    result["about"].update(of=100, by_default=True)
    I.report("net", result)
    first, ways, masking, *_ = capsys.readouterr().out.splitlines()
    assert "cross-entropy, no random start: fgsm; cross-entropy, random start: pgd_sat" in ways
    assert ways.endswith("; margin, random start: pgd_l2")
    found = result["about"]["masking"]
    assert found["alive"] <= found["of"] <= round(result["clean"] / 10)  # of ten images
    told = f"which nothing should survive, {found['alive']} of {found['of']} right images"
    assert f"pgd_sat at eps 64/255, {told}" in masking
    for words in (
        "n 10 of 100 (so many on a CPU",
        "linf eps 4/255: fgsm 1 x 4/255, pgd_sat 20 x 1/255, pgd_trades 20 x 0.0015",
        "l2 eps 0.5: pgd_l2 20 x 0.0625",
    ):
        assert words in first


@each("n, noted", [(99, True), (100, False)])
def test_a_worst_class_of_few_images_is_noted_with_its_interval(n, noted):
    net, _, _ = identity_net(2)
    y = torch.arange(2).repeat_interleave(torch.tensor([n, 300]))
    x = torch.zeros(len(y), 2, 1, 1)  # one of both is right, whatever the radius
    right = {"clean": y == 0, "worst": (y == 1) | (torch.arange(len(y)) < 5)}
    options = {"model": net, "x": x, "y": y, "attacks": {}}
    more = evaluation.look_closer(right, **options)
    assert more["about"]["worst_class_n"] == n  # 5 of n, all of the others
    low, high = evaluation.interval(5 / n, n)
    note = f"note: worst_class is of {n} images, 95% interval {low:.1f} to {high:.1f}"
    assert (note in more["notes"]) == noted


@each(
    "per_class, name",
    [
        ([50.0, 0.0, 10.0], "dog"),
        ([20.0, 50.0, 20.0], "cat, fox"),
    ],
)
def test_the_worst_class_is_told_by_name(per_class, name):
    result = {"worst_class": min(per_class), "per_class": per_class}
    y = torch.tensor([3, 0, 1, 3])  # of class 2 there is no image
    classes = ["cat", "dog", "emu", "fox"]
    result["worst_class_name"] = evaluation.name_of_worst_class(result, y, classes)
    assert result["worst_class_name"] == name
    line = evaluation.told({**result, "about": {"n": 4, "attacks": {}}})
    assert line == f"worst_class is {name}  n 4  |  not attacked"


def test_an_evaluation_names_the_worst_class(desk, capsys):
    line = ["eval", "done/last.pt", "--eval-subset", "20", "--device", "cpu", "--out", "named"]
    for attacks in ("clean", "clean,fgsm"):
        assert I.main([*line, "--attacks", attacks]) == 0
        found = json.loads(Path("named/eval.json").read_text())
        name = found["worst_class_name"]
        if attacks == "clean":
            assert name is None
        else:
            of_them = I.render_shapes(20, 20).classes[
                found["per_class"].index(found["worst_class"])
            ]
            assert name.startswith(of_them)
            assert f"  worst_class is {name}  n 20 of" in capsys.readouterr().out


@each(
    "eps, eps_l2, told",
    [
        (0.0, 0.5, "warning: fgsm with a radius of 0: no attack, its x' is x"),
        (0.01, 0.0, "warning: pgd_l2 with a radius of 0: no attack, its x' is x"),
        (0.01, 0.5, None),
    ],
)
def test_an_attack_of_radius_zero_is_told(eps, eps_l2, told):
    net, x, y = identity_net(10)
    result = I.evaluate(net, x, y, attacks="clean,fgsm,pgd_l2", eps=eps, eps_l2=eps_l2)
    lines = [note for note in result["notes"] if "radius" in note]
    assert lines == [told] * (told is not None)


def test_what_was_not_attacked_has_no_worst(lab):
    for attacks in ("clean", "clean,corrupt", "clean,pgd_l2"):
        result = evaluate(lab.net, 10, attacks=attacks)
        assert result["worst"] is None and result["worst_class"] is None
        assert "worst" not in result["ci95"]
    assert protocol.told(evaluate(lab.net, 10, attacks="clean")["about"]) == "n 10  |  not attacked"


def darker(model, x, y, *, eps, generator=None):
    return (x - eps).clamp(0, 1)


def stopping_at(place, monkeypatch):
    """(the attacks that are called, a switch): the attack at a place of the list is interrupted."""
    called = []
    switch = {"on": True}
    for name in ("fgsm", "bim", "cw"):
        real = I.resolve(I.ATTACKS, name, "attack")

        def look(*args, name=name, real=real, **options):
            called.append(name)
            if switch["on"] and name == place:
                raise KeyboardInterrupt
            return real(*args, **options)

        monkeypatch.setitem(I.ATTACKS, name, look)
    return called, switch


def test_a_stopped_evaluation_goes_on_where_it_was(desk, lab, monkeypatch, capsys):
    mine = f"clean,fgsm,{__name__}:darker,bim,cw"
    line = ["eval", "done/last.pt", "--attacks", mine, "--eval-subset", "20", "--device", "cpu"]
    line += ["--out", "e"]
    called, switch = stopping_at("bim", monkeypatch)
    assert I.main(line) == 130
    (told,) = capsys.readouterr().err.splitlines()
    kept = str(next(Path("e").glob("unfinished-*")))
    expected = f"fgsm, darker kept in {kept}: the same command goes on"
    assert told == f"infoard: stopped by SIGINT: {expected}"
    assert called == ["fgsm", "bim"] and len(list(Path("e").glob("unfinished-*"))) == 1

    called.clear()
    switch["on"] = False
    other_radius = [*line, "--eps", "1/255"]
    assert I.main(other_radius) == 0
    assert called[:3] == ["fgsm", "bim", "cw"]  # another evaluation begins at its beginning

    called.clear()
    switch["on"] = True
    assert I.main([*line, "--teacher-norm", "cifar10"]) == 130  # the same weights, another net
    assert called == ["fgsm", "bim"] and len(list(Path("e").glob("unfinished-*"))) == 2
    capsys.readouterr()

    called.clear()
    switch["on"] = False
    assert I.main([*line, "--teacher-norm", "cifar10"]) == 0
    assert called[0] == "bim" and len(list(Path("e").glob("unfinished-*"))) == 1

    called.clear()
    assert I.main(line) == 0
    assert "fgsm" not in called and called[0] == "bim"
    assert "going on after fgsm (kept in e/" in capsys.readouterr().out  # not after one's own
    assert not list(Path("e").glob("unfinished-*"))
    found = json.loads(Path("e/eval.json").read_text())

    called.clear()
    assert I.main(line) == 0  # nothing is left over
    assert called[0] == "fgsm" and json.loads(Path("e/eval.json").read_text()) == found


def test_a_stop_before_an_attack_is_at_its_end_promises_nothing(desk, monkeypatch, capsys):
    stopping_at("fgsm", monkeypatch)
    line = ["eval", "done/last.pt", "--attacks", "clean,fgsm", "--eval-subset", "10"]
    assert I.main(line) == 130
    expected = "infoard: stopped by SIGINT: nothing of this evaluation is kept\n"
    assert capsys.readouterr().err == expected


@each("killed", [False, True])
def test_stages_of_autoattack_are_kept_one_by_one(killed, desk, monkeypatch):
    """After Ctrl-C, and after a kill, which leaves no time to write anything down."""
    called = []
    stop_at = ["fab-t"]

    def stage(part, net, x, y, *others):
        called.append(part)
        if part in stop_at:
            raise KeyboardInterrupt
        return x

    monkeypatch.setattr(autoattack, "attack_by", stage)
    if killed:
        monkeypatch.setattr(evaluation, "SLOW", 0)  # as hours are
        monkeypatch.setattr(evaluation.Kept, "stop", lambda self: "")
    line = ["eval", "done/last.pt", "--attacks", "clean,aa", "--eval-subset", "10", "--out", "e"]
    assert I.main(line) == 130
    assert called == ["apgd-ce", "apgd-t", "fab-t"]
    called.clear()
    stop_at.clear()
    assert I.main(line) == 0
    assert called == ["fab-t", "square"]


def best_first(monkeypatch):
    """Of a run's epochs the first is the best on validation images."""
    scores = iter(range(99, 0, -1))

    def validate(run):
        score = next(scores)
        return {"val_clean": score, "val_pgd": score}

    monkeypatch.setattr(I, "validate", validate)


@each("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_evaluation_of_a_run_keeps_what_both_nets_have(
    number, code, desk, monkeypatch, capsys
):
    line = "--framework natural --student tiny --epochs 2 --attacks clean,fgsm,bim,cw --device cpu"
    line += " --subset 64 --eval-subset 10 --no-figures --no-progress --out"
    called, _ = stopping_at(None, monkeypatch)
    bim = I.ATTACKS["bim"]
    turns = iter([1, 2])

    def stop_at_the_second(*args, **options):
        if next(turns, 0) == 2:
            os.kill(os.getpid(), number)
            time.sleep(5)
        return bim(*args, **options)

    monkeypatch.setitem(I.ATTACKS, "bim", stop_at_the_second)
    best_first(monkeypatch)
    try:
        ended = I.main([*line.split(), "r"])
    except SystemExit as stopped:
        ended = stopped.code
    assert ended == code
    shown = capsys.readouterr()
    assert "stopped" not in shown.out
    (told,) = shown.err.splitlines()
    assert told.startswith(f"infoard: stopped by {number.name}: fgsm kept in r/unfinished-")
    assert told.endswith(f"pt: {options.program()} --resume --out r goes on")
    assert called == ["fgsm", "bim", "cw", "fgsm"]  # of last; of best
    assert len(list(Path("r").glob("unfinished-*"))) == 2

    called.clear()
    assert I.main(["--resume", "--out", "r"]) == 0
    assert called == ["bim", "cw"]
    shown = capsys.readouterr().out
    assert "after fgsm, bim, cw (kept in r/" in shown and "after fgsm (kept in r/" in shown
    assert not list(Path("r").glob("unfinished-*"))

    best_first(monkeypatch)
    assert I.main([*line.split(), "whole"]) == 0
    results = [json.loads(Path(out, "results.json").read_text()) for out in ("r", "whole")]
    assert results[0] == results[1]


class Shifted(nn.Module):
    """A net whose weights and layers do not tell what it does with pixels."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.fc = shift, seeded(lambda: nn.Linear(12, 3))

    def forward(self, x):
        return self.fc(x.flatten(1) - self.shift)


def test_what_is_kept_is_of_the_net_that_it_was_found_with(tmp_path, monkeypatch):
    x, y = rand(9, 3, 2, 2).float(), torch.arange(9) % 3
    data = I.Data(x, y, x, y, ["a", "b", "c"])
    files = []

    class Noted(evaluation.Kept):
        def __init__(self, file, columns):
            files.append(file)
            super().__init__(file, columns)

    monkeypatch.setattr(evaluation, "Kept", Noted)
    cfg = I.Config(out=str(tmp_path))
    for net, source in ((0, None), (0, None), (0.5, None), (0, 0), (0, 0.5)):
        source = None if source is None else Shifted(source)
        evaluation.looked_at(cfg, data, Shifted(net), x, y, attacks="clean,fgsm", source=source)
    assert files[0] == files[1] and len(set(files)) == 4


def test_a_broken_file_of_kept_results_is_none(tmp_path):
    file = tmp_path / "unfinished-1.pt"
    file.write_bytes(b"broken")
    assert dict(evaluation.Kept(file, ["fgsm"])) == {}


def test_stages_of_autoattack_are_told(tmp_path, capsys):
    kept = evaluation.Kept(tmp_path / "k.pt", [])
    kept["fgsm"] = torch.tensor([True, False])
    kept["apgd-ce"] = torch.tensor([True, False])
    out = capsys.readouterr().out
    assert "AutoAttack 1/4, APGD-CE: 50.0% still right" in out and "fgsm" not in out


def test_a_slow_look_at_clean_images_is_told_as_that(tmp_path, capsys):
    kept = evaluation.Kept(tmp_path / "k.pt", [])
    kept.lasted -= 11
    kept["clean"] = torch.tensor([True, False])
    assert capsys.readouterr().out == "  clean: 50.0% right on clean images, 11 s\n"


def watched_minutes(seconds, monkeypatch, terminal=False):
    """What is told in so many seconds of one batch, if a minute lasts a twentieth of a second."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with evaluation.a_line_a_minute(every=0.05):
        for _ in I.progress_bar([1, 2], "apgd", 1000):
            time.sleep(seconds / 2)


def test_a_batch_that_takes_long_is_told_of_without_a_terminal(monkeypatch, capsys):
    watched_minutes(0.4, monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8  # a machine that is busy may be late
    line = r"  AutoAttack 2/4, APGD-T: at work for 00:00, 2 batches in all"
    assert set(lines) == {line}


def test_what_has_no_bar_is_told_of_as_well(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with evaluation.a_line_a_minute(every=0.05):
        time.sleep(0.3)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "  the evaluation has been at work for 00:00"


def test_what_is_quick_or_has_a_terminal_or_is_silenced_is_not_told_of(monkeypatch, capsys):
    watched_minutes(0.0, monkeypatch)
    assert capsys.readouterr().err == ""
    watched_minutes(0.2, monkeypatch, terminal=True)
    assert "at work" not in capsys.readouterr().err
    monkeypatch.setattr(threading, "Thread", None)  # none is started
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with evaluation.a_line_a_minute(every=0.05):
        pass


def test_every_evaluation_of_a_run_or_of_eval_is_watched(lab, tmp_path, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def watch():
        entered.append(True)
        yield

    monkeypatch.setattr(evaluation, "a_line_a_minute", watch)
    cfg = I.Config(attacks="clean", eval_subset=20, out=str(tmp_path))
    data = SimpleNamespace(y_test=torch.zeros(2000).long(), classes=["cat", "dog", "emu"])
    images = rand(20, 3, 32, 32).float(), torch.arange(20) % 3
    result = evaluation.looked_at(cfg, data, lab.net, *images, attacks="clean")
    assert entered == [True]
    about = result["about"]
    assert (about["n"], about["of"]) == (20, 2000)
    assert "n 20 of 2000, balanced over classes" in protocol.told(about)


def test_autoattack_in_l2_finds_the_closed_form_of_a_linear_net():
    net = linear_net()
    x = rand(20, 3, 8, 8, lo=0.3, hi=0.7).float()
    y = I.predict(net, x).argmax(1)
    weight = net[1].weight
    leads = net(x).gather(1, y[:, None]) - net(x)
    lengths = (weight[y][:, None] - weight[None]).norm(dim=2).scatter(1, y[:, None], 0.0)
    reach = (leads / lengths).nan_to_num(torch.inf).amin(1).detach()
    eps = reach.sort()[0][15:17].mean().item()  # sixteen of twenty fall
    result = I.evaluate(net, x, y, eps_l2=eps, attacks="clean,pgd_l2,apgd_l2")
    assert result["apgd_l2"] == 20.0 and result["pgd_l2"] >= 20.0
    assert result["worst"] is None


def test_under_aa_an_l2_column_has_apgd_beside_it(monkeypatch):
    done = []

    def harmless(part, net, x, y, eps, generator, norm="Linf"):
        done.append((part, norm, eps))
        return x

    monkeypatch.setattr(autoattack, "attack_by", harmless)
    net, x, y = identity_net(10)
    result = I.evaluate(net, x, y, attacks="clean,pgd_l2,aa", eps=0.01, eps_l2=0.02)
    l2 = [(part, eps) for part, norm, eps in done if norm == "L2"]
    assert l2 == [("apgd-ce", 0.02), ("apgd-t", 0.02)]
    assert result["apgd_l2"] is not None
    done.clear()
    I.evaluate(net, x, y, attacks="clean,aa", eps=0.01)
    assert all(norm == "Linf" for _, norm, _ in done)
