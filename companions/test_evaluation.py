"""What holds for evaluation.py and autoattack.py: intervals, warnings, parts, teachers."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import infoard as I
from companions import autoattack, evaluation
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


@each("gap", [0, 7, 8, 30])
@each("name", ["cw", "apgd", "aa"])
def test_masking_warning_from_a_gap_of_eight(name, gap):
    right = first_right(clean=80, pgd_sat=50, fab_t=50 - gap, **{name: 50 - gap})
    warnings = evaluation.masking(right)
    assert len(warnings) == (1 if gap >= 8 else 0)


@each(
    "square, far, warnings",
    [(48, 0.5, 0), (47, 1.0, 1), (46, 0.0, 1), (46, 1.1, 2)],  # one of the 80 right ones is 1.25%
)
def test_masking_warning_from_square_and_from_a_radius_that_nothing_survives(square, far, warnings):
    right = first_right(clean=80, pgd_sat=50, fab_t=48, aa=square)
    assert len(evaluation.masking(right, far)) == warnings


@each("attacks, radii", [("clean,pgd", [R, 64 / 255]), ("pgd_sat", [R])])
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
    warned = "100.0% of the right ones survive eps = 64/255" in result["warnings"]
    assert warned == (64 / 255 in radii)


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

    def beat_the_first(part, net, x, y, eps, generator):
        done.append((part, len(x)))
        return torch.cat([wrong[y[:1]], x[1:]])

    monkeypatch.setattr(autoattack, "attack_by", beat_the_first)
    result = I.evaluate(net, x, y, attacks=f"clean,{attacks}")
    assert done == [(part, classes - i) for i, part in enumerate(parts)]
    assert result[column] == result["worst"] == percent_of(classes - len(parts), classes)
    assert not set(I.PARTS) & (result.keys() | result["ci95"].keys())


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
    return partial(evaluation.check_teacher, None, torch.zeros(100, 3), None, name, classes)


@each("right", [10, 19, 20, 21, 100])
def test_only_a_teacher_above_twice_chance_passes(right, monkeypatch, capsys):
    check = checking(right, 10, monkeypatch)
    told = f"teacher t.pt: clean accuracy {right}.0 on 100 test images"
    if right > 20:
        check()
        assert capsys.readouterr().out == f"{told}\n"
    else:
        with pytest.raises(I.InfoardError, match=f"{told}, chance is 10.0") as error:
            check()
        assert one_line(error.value)


@each("right", [10, 20, 21, 100])
def test_a_weak_teacher_that_was_trained_here_only_warns(right, monkeypatch, capsys):
    checking(right, 10, monkeypatch, "runs/teachers/a/best.pt")()
    assert ("warning" in capsys.readouterr().out) == (right <= 20)


@each("right, passes", [(75, False), (76, True)])
def test_of_two_classes_a_teacher_must_know_halfway_to_all(right, passes, monkeypatch):
    check = checking(right, 2, monkeypatch)
    if passes:
        check()
    else:
        pytest.raises(I.InfoardError, check)
