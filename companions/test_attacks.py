"""What holds for attacks.py: balls and limits, closed forms of corruptions, parity with Pillow."""

import colorsys
import inspect
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import attacks
from test_infoard import (
    F64,
    K,
    R,
    each,
    evaluate,
    in_box,
    ints,
    near,
    problems,
    radius,
    rand,
    rng,
    seeds,
    snapshot,
    tiny_net,
)

LINF = ["bim", "mifgsm", "mifgsm_t", "pgd_t", "pgd5_cw"]
L2 = ["pgd_l2", "pgd_l2_t"]
KINDS = list(attacks.SEVERITIES)
FREE = ["spatial", "corrupt", *KINDS]  # in no ball
HERE = ["fgsm", "pgd_sat", "pgd_trades", "cw"]  # those of infoard.py
STEPS = {  # usual number of steps, and how long one is in radii
    "pgd_sat": (20, 1 / 4),
    "pgd_trades": (20, 0.003 / R),
    "cw": (30, 1 / 4),
    "bim": (10, 1 / 8),
    "mifgsm": (10, 1 / 10),
    "mifgsm_t": (10, 1 / 10),
    "pgd_t": (20, 1 / 4),
    "pgd_l2": (20, 1 / 8),
    "pgd_l2_t": (20, 1 / 8),
}


def problem_of_four(dtype=torch.float32):
    """A net, four images, labels."""
    net = tiny_net().to(dtype)
    x = rand(4, 3, 6, 6).to(dtype)
    return net, x, torch.arange(4) % K


def by_name(name, net, x, y, max_steps=100, **options):
    """attack_by_name with radii that tell the balls apart."""
    given = {"eps": R, "eps_l2": 0.3, "generator": rng(), "max_steps": max_steps} | options
    return attacks.attack_by_name(name, net, x, y, **given)


# ==== 1. Projected gradients ======================================================================


def test_the_table_of_infoard_names_them_all():
    assert set(I.ATTACKS) == {*HERE, *LINF, *L2, *FREE, "apgd", "aa", "apgd_l2", "aa_l2"}
    for name in I.ATTACKS:
        attack = I.resolve(I.ATTACKS, name, "attack")
        norm = "l2" if name in L2 or name.endswith("_l2") else "none" if name in FREE else "linf"
        assert getattr(attack, "norm", "linf") == norm, name
        assert attack.__doc__ and attack.__name__ == name
        assert {"eps", "generator"} <= inspect.signature(attack).parameters.keys()


@each("name", [*HERE, *LINF, *L2, *FREE])
@given(problem=problems(), max_steps=st.sampled_from([1, 3, 100]))
@settings(max_examples=10)
def test_named_attacks_keep_their_ball_and_their_limit_of_steps(name, problem, max_steps):
    net, x, y, _ = problem
    passes = []
    hook = net.register_forward_hook(lambda *_: passes.append(1))
    before = x.clone()
    x_adv = by_name(name, net, x, y, max_steps)
    hook.remove()
    assert torch.equal(x, before) and in_box(x_adv)
    if name in FREE:
        return
    if name in L2:  # float32 rounds a sum of 108 squares by less than 1e-5
        assert (radius(x_adv, x, 2) <= 0.3 + 1e-5).all()
    else:
        assert (radius(x_adv, x) <= R + 1e-7).all()
    if name == "pgd5_cw":  # six attacks, six looks at x'
        assert len(passes) <= 5 * min(max_steps, 20) + min(max_steps, 30) + 6
    else:
        usual, _ = STEPS.get(name, (1, 1))
        assert len(passes) == min(usual, max_steps)


@each("name", [*LINF, *L2, "spatial"])
@each("training", [True, False])
def test_they_leave_the_model_as_found(name, training):
    net, x, y = problem_of_four()
    net.train(training)
    net[0].bias.requires_grad_(False)
    before = snapshot(net)
    by_name(name, net, x, y)
    assert snapshot(net) == before


@each("name", STEPS)
@given(max_steps=ints(1, 40))
@settings(max_examples=10)
def test_fewer_steps_than_usual_go_two_and_a_half_radii(name, max_steps):
    seen = []

    def look(objective, x, *, eps, alpha, steps, **options):
        seen.append((eps, alpha, steps))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "pgd", look)
        by_name(name, None, rand(2, 3, 6, 6), torch.tensor([0, 1]), max_steps)
    usual, share = STEPS[name]
    ((eps, alpha, steps),) = seen
    assert eps == (0.3 if name in L2 else R) and steps == min(max_steps, usual)
    if max_steps < usual:
        share = min(1, 2.5 / max_steps)
    near(alpha, eps * share)


@each("name", HERE)
def test_without_a_limit_those_of_infoard_are_infoards(name):
    net, x, y = problem_of_four()
    truth = I.ATTACKS[name](net, x, y, eps=R, generator=rng())
    assert torch.equal(by_name(name, net, x, y), truth)


@each("name", STEPS)
@each("limited", [False, True])
def test_named_attacks_are_the_pgd_of_their_papers(name, limited):
    net, x, y = problem_of_four(F64)
    usual, share = STEPS[name]
    eps = 0.3 if name in L2 else R
    options = {"eps": eps, "alpha": eps * share, "steps": usual, "generator": rng()}
    if name in L2:
        options["norm"] = "l2"
    if name in ("bim", "mifgsm", "mifgsm_t"):
        options["init"] = "none"
    if name in ("mifgsm", "mifgsm_t"):
        options["momentum"] = 1.0
    with I.frozen_eval(net):
        if name.endswith("_t"):
            objective = attacks.target_objective(net, y)
        elif name == "cw" or (name == "pgd_l2" and not limited):
            objective = I.cw_objective(net, y)
        else:
            objective = I.ce_objective(net, y)
        truth = I.pgd(objective, x, **options)
    found = by_name(name, net, x, y)  # MID's pool, which keeps the cross-entropy in L2
    if not limited:
        attack = I.resolve(I.ATTACKS, name, "attack")
        found = attack(net, x, y, eps=eps, generator=rng())
    near(found, truth)


@given(seeds)
def test_l2_attacks_use_their_own_radius(seed):
    x = rand(2, 3, 6, 6, seed=seed, lo=0.4, hi=0.6).float()
    y = torch.tensor([0, 1])
    x_adv = by_name("pgd_l2", tiny_net(seed), x, y, eps=1e-6, eps_l2=0.2)
    near(radius(x_adv, x, 2), torch.full((2,), 0.2), 1e-3)  # 20 steps of an eighth


def test_attacks_of_anyones_own_are_taken_with_what_they_ask_for(monkeypatch):
    seen = []

    def mine(model, x, y, eps, generator=None):
        seen.append((eps, None))
        return x

    def stepwise(model, x, y, eps, generator=None, max_steps=7):
        seen.append((eps, max_steps))
        return x

    stepwise.norm = "l2"
    monkeypatch.setattr(attacks, "mine", mine, raising=False)
    monkeypatch.setitem(I.ATTACKS, "stepwise", stepwise)
    for name in ("companions.attacks:mine", "stepwise"):
        by_name(name, None, rand(1, 3, 2, 2), torch.zeros(1), 5)
    assert seen == [(R, None), (0.3, 5)]
    with pytest.raises(I.InfoardError, match="unknown attack 'bimm' .*bim"):
        by_name("bimm", None, None, None)


def gradient_of_targets(y, classes):
    """The gradient of the objective for equal logits: it raises the target, lowers the others."""
    z = torch.zeros(len(y), classes).requires_grad_()
    objective = attacks.target_objective(lambda logits: logits, y)
    (grad,) = torch.autograd.grad(objective(z).sum(), z)
    return grad


@given(problems())
def test_targets_are_other_classes_and_come_nearer(problem):
    net, x, y, _ = problem
    grad = gradient_of_targets(y, K)
    target = grad.argmax(1)
    assert (target != y).all()
    assert (grad.sign() == 2 * F.one_hot(target, K) - 1).all()
    with I.frozen_eval(net):
        chosen = attacks.target_objective(net, y)
        rows = torch.arange(len(y)).flip(0)
        near(chosen(x[rows], rows), chosen(x)[rows], 1e-5)  # batched sums of float32
        after = I.pgd(chosen, x, eps=R, alpha=1 / 255, steps=3, init="none")
        assert (chosen(after) >= chosen(x) - 0.05).all()  # a sign step may overshoot a little


def test_targets_differ_within_a_batch():
    grad = gradient_of_targets(torch.zeros(6).long(), 4)
    assert grad.argmax(1).tolist() == [1, 2, 3, 1, 2, 3]


# ==== 2. One attack after another =================================================================


def test_cascade_attacks_only_what_is_left():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    net[1].weight.data = torch.stack([-torch.ones(12), torch.ones(12)])
    x = torch.full((6, 3, 2, 2), 0.5)
    y = torch.tensor([1, 1, 1, 1, 0, 1])
    seen = []

    def flip(which):
        def attack(net, z, y, **options):
            seen.append(len(z))
            chosen = torch.arange(len(z)) % which == 0
            return torch.where(chosen.view(-1, 1, 1, 1), -z, z)

        return attack

    x_adv = attacks.cascade([flip(2), flip(3), flip(1), flip(1)], net, x, y)
    assert seen == [5, 2, 1]  # one is wrong from the start, three fall, then one, then the last
    assert not (net(x_adv).argmax(1) == y).any() and (x == 0.5).all()


def test_the_cascade_is_the_worst_of_its_attacks(lab):
    names = "clean,pgd_sat,cw,pgd5_cw"
    result = evaluate(lab.net, 40, attacks=names, eps=2 / 255, seed=5)
    assert result["pgd5_cw"] <= min(result["pgd_sat"], result["cw"], result["clean"])
    alone = evaluate(lab.net, 40, attacks="pgd_sat", eps=2 / 255, seed=5)
    assert alone["pgd_sat"] == result["pgd_sat"]  # whatever the attacks before


# ==== 3. Rotations and shifts =====================================================================


def test_spatial_keeps_the_worst_view():
    net, x, y = problem_of_four()
    views = []
    leads = []
    for tries in (0, 3, 10):
        views.append(attacks.spatial(net, x, y, generator=rng(1), tries=tries))
        leads.append(I.margin(I.predict(net, views[-1]), y))
    assert torch.equal(views[0], x)
    assert (leads[1] <= leads[0]).all() and (leads[2] <= leads[1]).all()
    assert (leads[2] < leads[0]).any()
    near(attacks.spatial(net, x, y, generator=rng(1)), views[2], 0.0)


def test_rotations_and_shifts_are_bounded(monkeypatch):
    import torchvision.transforms.functional as transforms

    seen = []

    def look(x, turn, shift, *others):
        seen.append((turn, *shift))
        return x

    monkeypatch.setattr(transforms, "affine", look)
    x = rand(2, 3, 30, 20).float()
    y = torch.tensor([0, 1])
    attacks.spatial(tiny_net(), x, y, tries=200, generator=rng())
    turn, right, down = torch.tensor(seen).abs().amax(0).tolist()
    assert 25 < turn <= 30 and right == 2 and down == 3  # a tenth of 20 and of 30 pixels


# ==== 4. Common corruptions =======================================================================


def brightened_by_hand(x, strength):
    """Of an image whose largest value is 0.4."""
    return x * (0.4 + strength) / 0.4


def unchanged(x, strength):
    return x


CLOSED = {  # what a corruption makes of an image of one colour
    "bright": brightened_by_hand,
    "contrast": unchanged,
    "pixelate": unchanged,
    "blur": unchanged,
}


@each("kind", CLOSED)
@given(level=ints(0, 4), size=ints(5, 12))
def test_corruptions_of_one_colour_are_known(kind, level, size):
    x = torch.tensor([0.4, 0.2, 0.0]).view(1, 3, 1, 1).expand(2, 3, size, size)
    strength = attacks.SEVERITIES[kind][level]
    truth = CLOSED[kind](x, strength).clamp(0, 1)
    near(attacks.corrupted(x, kind, strength), truth, 1e-6)


@each("level", range(5))
def test_noises_have_the_moments_of_their_strength(level):
    x = torch.full((64, 3, 32, 32), 0.5)  # 196,608 draws: standard errors below 0.4%
    strength = {kind: attacks.SEVERITIES[kind][level] for kind in KINDS}
    noisy = attacks.corrupted(x, "noise", strength["noise"], rng(level))
    near(noisy.std() / strength["noise"], 1, 0.01)
    shot = attacks.corrupted(x, "shot", strength["shot"], rng(level))
    near(shot.var() * strength["shot"] / 0.5, 1, 0.02)  # Poisson: variance = mean
    salted = attacks.corrupted(x, "impulse", strength["impulse"], rng(level))
    replaced = strength["impulse"]
    for value, share in ((0.0, replaced / 2), (1.0, replaced / 2), (0.5, 1 - replaced)):
        near((salted == value).double().mean(), share, 0.002)


def test_contrast_moves_each_colour_towards_its_own_mean():
    x = rand(2, 3, 4, 5, lo=0.3, hi=0.7)
    found = attacks.corrupted(x, "contrast", 0.4)
    means = x.mean((2, 3), keepdim=True)
    near(found.mean((2, 3), keepdim=True), means)
    near(found - means, 0.4 * (x - means))


def test_jpeg_loses_more_at_each_severity():
    x = F.interpolate(rand(2, 3, 8, 8).float(), (32, 32), mode="bilinear")
    x = (255 * x).round() / 255
    qualities = (95, *attacks.SEVERITIES["jpeg"])
    losses = [(attacks.corrupted(x, "jpeg", c) - x).square().mean() for c in qualities]
    assert losses[0] > 0
    assert all(a < b for a, b in itertools.pairwise(losses))


def test_pixels_are_pillows_boxes():
    x = F.interpolate(rand(2, 3, 8, 8).float(), (32, 32), mode="bilinear")
    x = (255 * x).round() / 255
    half = F.interpolate(F.avg_pool2d(x, 2), (32, 32))
    near(attacks.corrupted(x, "pixelate", 0.5), half, 1.001 / 255)  # 8 bits
    kept = (attacks.corrupted(x, "pixelate", 0.95) == x).double().mean()
    assert 0.6 < kept < 0.9, kept  # most pixels of Pillow's box are those that were there


def test_blur_of_a_point_is_a_gaussian():
    point = torch.zeros(1, 3, 9, 9)
    point[:, :, 4, 4] = 1
    row = attacks.corrupted(point, "blur", 0.8)[0, 0, 4]
    truth = torch.exp(-((torch.arange(9) - 4.0) ** 2) / (2 * 0.8**2))
    near(row / row[4], truth, 1e-5)


@given(seeds, ints(0, 4))
@settings(max_examples=10)
def test_brightness_is_that_of_hsv(seed, level):
    x = rand(1, 3, 3, 3, seed=seed).float()
    x[0, :, 0, 0] = 0
    strength = attacks.SEVERITIES["bright"][level]
    new = attacks.corrupted(x, "bright", strength)
    pixels = x[0].flatten(1).T.tolist()
    found = new[0].flatten(1).T
    for pixel, made in zip(pixels, found, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        truth = colorsys.hsv_to_rgb(hue, saturation, min(1, value + strength))
        near(made, torch.tensor(truth), 1e-5)


def test_impulses_fall_on_each_colour_of_a_pixel_alone():
    x = torch.full((8, 3, 32, 32), 0.5)
    hit = attacks.corrupted(x, "impulse", 0.07, rng()) != x
    assert hit.all(1).double().mean() < 0.002  # 0.07 cubed is 0.0003


def recognised(image, new, kinds):
    """Which (kind, strength) has made new of an image."""
    for kind in kinds:
        for strength in attacks.SEVERITIES[kind]:
            made = attacks.corrupted(image[None], kind, strength)[0]
            if torch.allclose(made, new, atol=1e-6):
                return kind, strength


@given(ints(1, 60), seeds)
@settings(max_examples=10)
def test_common_corruptions_do_not_depend_on_the_batch(b, seed):
    x = rand(b, 3, 8, 8, seed=seed).float()
    one = attacks.corrupt(None, x, None, generator=rng(seed))
    same = attacks.corrupt(None, x, None, generator=rng(seed))
    other = attacks.corrupt(None, x, None, generator=rng(seed + 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    order = torch.arange(b).flip(0)
    assert torch.equal(attacks.corrupt(None, x[order], None, generator=rng(seed)), one[order])
    parts = [attacks.corrupt(None, part, None, generator=rng(seed)) for part in x.split(7)]
    assert torch.equal(torch.cat(parts), one)


def test_each_kind_and_severity_is_drawn_as_often():
    x = rand(4000, 3, 1, 1).float()
    drawn = torch.tensor([attacks.image_seed(image, 5) % 40 for image in x])
    counts = drawn.bincount(minlength=40)
    chi = ((counts - 100).square() / 100).sum().item()
    assert chi < 72.1  # the quantile 0.999 of chi-square with 39 degrees


@given(ints(1, 60), seeds)
@settings(max_examples=10)
def test_common_corruptions_are_those_of_the_list(b, seed):
    x = rand(b, 3, 8, 8, seed=seed).float()
    kinds = ["contrast", "blur"]
    corrupted = attacks.corrupt(None, x, None, kinds=kinds, generator=rng(seed))
    pairs = zip(x, corrupted, strict=True)
    dealt = [recognised(image, new, kinds) for image, new in pairs]
    assert None not in dealt


@each("kind", KINDS)
def test_each_kind_is_an_attack_of_its_own(kind):
    x = rand(9, 3, 8, 8).float()
    attack = I.resolve(I.ATTACKS, kind, "attack")
    truth = attacks.corrupt(None, x, None, kinds=[kind], generator=rng(1))
    assert torch.equal(attack(None, x, None, eps=R, generator=rng(1)), truth)


def test_severities_are_those_of_cifar_10_c():
    assert attacks.SEVERITIES == {
        "noise": (0.04, 0.06, 0.08, 0.09, 0.1),
        "shot": (500, 250, 100, 75, 50),
        "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
        "blur": (0.4, 0.6, 0.7, 0.8, 1),
        "bright": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg": (80, 65, 58, 50, 40),
    }
    assert attacks.CORRUPTIONS.keys() == attacks.SEVERITIES.keys()
    with pytest.raises(I.InfoardError, match="unknown corruption 'fog' .*noise"):
        attacks.corrupted(rand(1, 3, 2, 2), "fog", 1.0)


@each("dtype", [torch.float16, torch.bfloat16, F64])
@each("kind", KINDS)
def test_corruptions_keep_shape_and_type(kind, dtype):
    x = rand(3, 3, 5, 7).to(dtype)
    new = attacks.corrupt(None, x, None, kinds=[kind], generator=rng())
    assert new.shape == x.shape and new.dtype == dtype and in_box(new)


# ==== 5. In evaluation ============================================================================


def test_what_is_outside_the_ball_is_no_part_of_worst(lab):
    options = {"eps": 1 / 255, "eps_l2": 3.0}
    result = evaluate(lab.net, 40, attacks="clean,fgsm,pgd_l2,spatial,corrupt", **options)
    assert result["worst"] == min(result["clean"], result["fgsm"])
    assert result["pgd_l2"] < result["worst"] and result["spatial"] < result["clean"]


def test_transferred_attacks_are_made_on_the_other_net(lab, monkeypatch):
    source = I.tiny().eval()
    seen = []
    for name in ("fgsm", "spatial"):
        real = I.resolve(I.ATTACKS, name, "attack")

        def look(net, *args, real=real, **options):
            seen.append(net)
            return real(net, *args, **options)

        monkeypatch.setitem(I.ATTACKS, name, look)
    white = evaluate(lab.net, 40, attacks="clean,fgsm,spatial")
    moved = evaluate(lab.net, 40, attacks="clean,fgsm,spatial", source=source)
    assert seen == [lab.net, lab.net, source, source]
    assert moved["fgsm"] > white["fgsm"] and moved["clean"] == white["clean"]


def evaluated_by_command(out, *options):
    """eval.json of the verb eval, for the fixture's teacher."""
    line = ["eval", "teacher.pt", "--attacks", "clean,fgsm,pgd_l2", "--eval-subset", "40"]
    assert I.main([*line, "--device", "cpu", "--out", out, *options]) == 0
    return json.loads(Path(out, "eval.json").read_text())


def test_eval_knows_the_l2_radius_and_another_net_to_attack(desk):
    still = evaluated_by_command("still", "--eps-l2", "0")
    usual = evaluated_by_command("usual")
    moved = evaluated_by_command("moved", "--teacher-nat", "stranger.pt")
    assert still["pgd_l2"] == still["clean"] > usual["pgd_l2"]
    assert moved["clean"] == usual["clean"] and moved["fgsm"] > usual["fgsm"]
    assert math.isfinite(moved["pgd_l2"])
