"""What holds for mid.py: the meta-step on copies of the net, consistency, decoders, likeness."""

import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import evaluation, mid
from companions.runs import same_settings
from companions.test_namid import check_resumed, kinds_kept, used
from test_infoard import (
    F64,
    each,
    evaluate,
    make_step,
    near,
    one_line,
    rand,
    rng,
    seeds,
    snapshot,
)

# ==== 1. The autoencoder ==========================================================================


def tiny_autoencoder(size=16, **options):
    return mid.Autoencoder(I.tiny(4, size, **options), size)


@each("name", [*I.MODELS, "wrn_10_1"])
@each("size", [32, 64])
def test_autoencoders_classify_as_their_net_and_draw_images_of_its_size(name, size):
    if name == "wrn_34_10":
        pytest.skip("46 M parameters")
    net = I.build_model(name, 5, size).eval()
    both = mid.Autoencoder(net, size).eval()
    x = rand(2, 3, size, size).float()
    f, z = both(x, features=True)
    near(I.predict(both, x), I.predict(net, x), 0.0)
    near(z, both(x), 0.0)
    assert both.decoder(f).shape == x.shape == both.regenerated(x).shape
    more = {f"decoder.{key}" for key in both.decoder.state_dict()}
    assert both.state_dict().keys() - net.state_dict().keys() == more
    assert all(isinstance(m, nn.ConvTranspose2d) for m in both.decoder)


def test_decoder_of_resnet_has_the_published_shape():
    shapes = []
    for m in I.build_model("resnet18_ae").decoder:
        shapes.append((m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]))
    assert shapes == [
        (512, 256, 4, 2),
        (256, 128, 4, 2),
        (128, 64, 4, 2),
        (64, 64, 3, 1),
        (64, 3, 3, 1),
    ]


def test_decoders_are_never_narrower_than_64():
    widths = [m.out_channels for m in I.build_model("tiny_ae").decoder]
    assert widths == [64, 64, 64, 64, 3]  # 4 x 4 places of 128 channels, three doublings


@each("size", [28, 36, 50])
def test_sizes_that_cannot_be_doubled_back_to_are_refused(size):
    with pytest.raises(I.InfoardError, match=f"halves evenly, not {size} pixels"):
        I.build_model("resnet18_ae", 4, size)


def test_nets_that_cannot_be_cut_are_refused():
    with pytest.raises(I.InfoardError, match="a layer called avgpool"):
        mid.Autoencoder(nn.Sequential(nn.Conv2d(3, 4, 3)), 16)


def test_regenerated_images_lie_in_the_box_and_leave_the_net_as_found():
    net = tiny_autoencoder().train()
    before = snapshot(net)
    net.decoder[-1].bias.data.fill_(7.0)
    assert net.regenerated(rand(2, 3, 16, 16).float()).max() == 1.0
    net.decoder[-1].bias.data.fill_(-7.0)
    assert net.regenerated(rand(2, 3, 16, 16).float()).min() == 0.0
    assert snapshot(net) == before


# ==== 2. How like two images are ==================================================================


@given(seeds, st.floats(0.01, 0.4))
def test_likeness_in_closed_form(seed, c):
    x = rand(2, 3, 16, 16, seed=seed, hi=0.5).float()
    psnr, ssim = mid.likeness(x, x + c)
    assert abs(psnr + 20 * math.log10(c)) < 0.006 and ssim < 1  # two decimals
    assert mid.likeness(x, x) == (100.0, 1.0)
    flat = torch.full((1, 3, 16, 16), 0.25)  # no variance: the luminance term alone
    truth = (2 * 0.25 * (0.25 + c) + 1e-4) / (0.25**2 + (0.25 + c) ** 2 + 1e-4)
    assert abs(mid.likeness(flat, flat + c)[1] - truth) < 6e-4  # of a variance of 1e-8 in float32


@given(seeds)
def test_ssim_of_one_window_by_hand(seed):
    x = rand(1, 1, 11, 11, seed=seed)
    z = rand(1, 1, 11, 11, seed=seed + 1)
    g = torch.tensor([math.exp(-i * i / 4.5) for i in range(-5, 6)], dtype=F64)
    window = torch.outer(g, g) / g.sum() ** 2

    def average(f):
        return (window * f).sum()

    m_x = average(x)
    m_z = average(z)
    v_x = average((x - m_x) ** 2)
    v_z = average((z - m_z) ** 2)
    cov = average((x - m_x) * (z - m_z))
    luminance = (2 * m_x * m_z + 1e-4) / (m_x**2 + m_z**2 + 1e-4)
    structure = (2 * cov + 9e-4) / (v_x + v_z + 9e-4)
    found = mid.likeness(x.float(), z.float())[1]
    assert abs(found - luminance * structure) < 1e-4  # four decimals


def test_quality_is_against_the_clean_image():
    x, x_adv = rand(2, 2, 3, 16, 16).float()
    itself = SimpleNamespace(regenerated=lambda z: z)
    psnr, ssim = mid.likeness(x, x_adv)
    assert mid.Autoencoder.quality(itself, x, x_adv) == {
        "psnr": 100.0,
        "psnr_adv": psnr,
        "ssim": 1.0,
        "ssim_adv": ssim,
    }


def test_quality_of_transferred_attacks_is_by_those_on_the_source(lab, monkeypatch):
    source = I.tiny().train()
    seen = []
    before = snapshot(source)
    pgd_sat = I.pgd_sat

    def look(net, *args, **options):
        seen.append(net)
        return pgd_sat(net, *args, **options)

    monkeypatch.setattr(I, "pgd_sat", look)
    model = mid.Autoencoder(I.tiny(), 32).eval()
    model.load_state_dict(lab.net.state_dict(), strict=False)
    result = evaluate(model, attacks="clean,fgsm", source=source)
    assert seen == [source] and "psnr_adv" in result and snapshot(source) == before
    evaluate(model, attacks="clean,fgsm")
    assert seen == [source, model]


# ==== 3. Losses ===================================================================================


def mid_step(framework="mid", seed=6, progress=0.3, pool=mid.POOL, **options):
    """Four images; the student has a head and a decoder of the teacher's."""
    torch.manual_seed(0)
    teacher = tiny_autoencoder(width=2).double()
    student = tiny_autoencoder(width=2).double()
    x = rand(4, 3, 16, 16)
    y = torch.arange(4)
    used(teacher, x).requires_grad_(False)
    student = mid.prepare_mid(used(student, x), {"teacher": teacher}, None, 4).train()
    natural = I.tiny(4, 16, width=2).double()
    given = {"teacher_nat": natural, "progress": progress, "own": {"pool": pool}}
    step = make_step(framework, student, teacher, x, y, **given, **options)
    step.generators["data"] = rng(seed)
    return step


def encoder(net):
    """The parameters that MID trains."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def test_consistency_is_kl_per_position_and_its_cycle_has_a_gradient():
    step = mid_step()
    x_adv = torch.cat([step.x.flip(0), step.x])
    theta = encoder(step.student)

    def consistency(a, c):
        return mid.consistency(step, x_adv, theta, a, c)

    step.student.eval()  # so that all passes are alike
    f = step.student.encode(x_adv)
    t = step.teacher.encode(step.x).repeat(2, 1, 1, 1)
    again = step.teacher.encode(step.student.decoder(f))
    b, _, h, w = f.shape

    def by_hand(q):  # over channels, at each position
        return F.kl_div(q.log_softmax(1), t.softmax(1), reduction="sum") / (b * h * w)

    label = consistency(0, 0)
    near(consistency(1, 0) - label, by_hand(f))
    near(consistency(0, 1) - label, by_hand(again))
    near(label, F.cross_entropy(step.student(x_adv), step.y.repeat(2)))
    assert by_hand(again) > 1e-6
    grads = torch.autograd.grad(consistency(0, 1) - label, list(theta.values()), allow_unused=True)
    assert grads[0].abs().max() > 1e-9  # the cycle reaches the first convolution


def test_autoencoder_is_classification_and_reconstruction():
    step = mid_step()
    step.student.eval()
    f, z = step.student(step.x, features=True)
    mse = (step.student.decoder(f) - step.x).square().mean()
    near(mid.autoencoder(step), F.cross_entropy(z, step.y) + mse)
    near(step.terms["mse"], mse)


def watched_consistency(monkeypatch):
    """A list of (attacked images, a, c) of each J that is asked for, and the real function."""
    calls = []
    real = mid.consistency

    def look(step, x_adv, theta, a, c):
        calls.append((x_adv, a, c))
        return real(step, x_adv, theta, a, c)

    monkeypatch.setattr(mid, "consistency", look)
    return calls, real


def test_mid_is_a_first_order_meta_step(monkeypatch):
    """Gradients at theta and, of the held-out attack, at theta - lr grad, on copies of the net."""
    step = mid_step(lr=5.0)
    calls, real = watched_consistency(monkeypatch)
    before = copy.deepcopy(step.student)
    loss = step.loss()
    loss.backward()
    (known, *w_known), (unknown, *w_unknown) = calls
    assert (w_known, w_unknown) == ([1.5, 0.8], [1.0, 1.0])
    assert len(known) == 6 * len(unknown) == 6 * 4

    def gradients(net, x_adv, a, c):
        there = SimpleNamespace(student=net, teacher=step.teacher, x=step.x, y=step.y)
        value = real(there, x_adv, encoder(net), a, c)
        return value, torch.autograd.grad(value, list(encoder(net).values()))

    j, g = gradients(before, known, *w_known)
    moved = copy.deepcopy(before)
    for p, d in zip(encoder(moved).values(), g, strict=True):
        p.data -= step.cfg.lr_at(0.3) * d
    j_new, g_new = gradients(moved, unknown, *w_unknown)
    near(loss, j + j_new)
    _, g_plain = gradients(before, unknown, *w_unknown)
    apart = []
    for p, d, e, plain in zip(encoder(step.student).values(), g, g_new, g_plain, strict=True):
        near(p.grad, d + e)  # the held-out attack's gradient arrives
        apart.append((e - plain).abs().max().item())
    assert max(apart) > 1e-3  # and it is not that of plain multi-attack distillation


def test_mid_trains_a_new_encoder_under_the_teachers_head_and_decoder():
    step = mid_step()
    theirs = step.teacher.state_dict()
    new = encoder(step.student)
    assert any(not torch.equal(p, theirs[name]) for name, p in new.items())
    fixed = {}
    for name, value in step.student.state_dict().items():
        if name.startswith(("decoder", "linear")):
            fixed[name] = value
    assert fixed and all(torch.equal(value, theirs[name]) for name, value in fixed.items())
    step.loss().backward()
    assert all(p.grad is None for p in step.teacher.parameters())
    untaught = {name for name, p in step.student.named_parameters() if p.grad is None}
    assert untaught == fixed.keys() and not untaught & new.keys()


def filled(value):
    """An attack that gives images of one colour, to be told apart."""
    return lambda net, x, y, eps, generator=None: torch.full_like(x, value)


def test_the_attack_held_out_is_the_one_tested_on(monkeypatch):
    for name, value in (("pgd_sat", 0.1), ("bim", 0.2), ("mifgsm", 0.3)):
        monkeypatch.setitem(I.ATTACKS, name, filled(value))
    order = []

    def look(step, x_adv, theta, a, c):
        order.append(x_adv[:, 0, 0, 0].unique().tolist())
        return sum(p.sum() for p in theta.values())

    monkeypatch.setattr(mid, "consistency", look)
    clean = mid_step().x[:, 0, 0, 0].unique().tolist()
    held = set()
    for seed in range(12):
        mid_step(seed=seed, pool="clean,pgd_sat,bim,mifgsm").loss()
        known, unknown = order[-2:]
        assert not set(known) & set(unknown)
        assert sorted(known + unknown) == sorted([0.1, 0.2, 0.3, *clean])
        held.add(tuple(unknown))
    assert len(held) == 4  # each in its turn, the clean images too


@each("framework, attacked", [("mid", "student"), ("mid_transfer", "teacher_nat")])
def test_the_pool_attacks_the_net_that_is_named(framework, attacked, monkeypatch):
    seen = []

    def look(net, x, y, eps, generator=None, max_steps=None):
        seen.append((net, eps, max_steps, generator))
        return x

    def look_l2(net, x, y, eps, generator=None, max_steps=None):
        return look(net, x, y, eps, generator, max_steps)

    look_l2.norm = "l2"
    monkeypatch.setitem(I.ATTACKS, "bim", look)
    monkeypatch.setitem(I.ATTACKS, "pgd_l2", look_l2)
    step = mid_step(framework, pool="clean,bim,pgd_l2", eps=0.3, eps_l2=0.7, steps=2)
    step.loss()
    nets, radii, limits, generators = zip(*seen, strict=True)
    assert all(net is getattr(step, attacked) for net in nets) and len(nets) == 2
    assert sorted(radii) == [0.3, 0.7] and limits == (2, 2)
    assert all(generator is step.generators["attack"] for generator in generators)


def test_the_pool_of_infoards_own_attacks_is_limited_too(monkeypatch):
    seen = []
    real = I.pgd

    def look(objective, x, **options):
        seen.append((options["steps"], options["alpha"]))
        return real(objective, x, **options)

    monkeypatch.setattr(I, "pgd", look)
    mid_step(pool="fgsm,pgd_sat,pgd_trades,cw", eps=0.1, steps=4).loss()
    assert sorted(steps for steps, _ in seen) == [1, 4, 4, 4]
    assert sorted(alpha for _, alpha in seen) == [0.1 * 2.5 / 4] * 3 + [0.1]


# ==== 4. Training =================================================================================


def test_a_teacher_without_decoder_is_refused():
    student = tiny_autoencoder()
    for teacher in (I.tiny(4, 16), mid.Autoencoder(I.build_model("resnet18", 4, 16), 16)):
        with pytest.raises(I.InfoardError, match="decoder"):
            mid.prepare_mid(student, {"teacher": teacher}, None, 4)


def test_best_is_chosen_by_what_a_framework_is_for():
    best_by = {name: I.get_framework(name).best_by for name in I.FRAMEWORKS}
    others = {"natural": "val_clean", "autoencoder": "val_clean", "estimators": "epoch"}
    assert {name: best for name, best in best_by.items() if best != "val_pgd"} == others


@each("framework", ["mid", "mid_transfer"])
def test_settings_of_mid(framework):
    cfg = I.Config(framework=framework).resolved()
    assert cfg.own == {"pool": "clean,pgd_sat,pgd_t,mifgsm,mifgsm_t,pgd_l2,pgd_l2_t"}
    assert cfg.student == cfg.teacher_arch == "tiny_ae"
    assert cfg.teacher_framework == "autoencoder"
    assert not cfg.infoard
    assert cfg.out == f"runs/shapes-tiny_ae-{framework}-s0"
    assert cfg.resolved() == cfg
    given = I.Config(framework=framework, teacher="t.pt", student="resnet18").resolved()
    assert (given.student, given.teacher_arch) == ("resnet18_ae", None)
    needs = ("teacher", "teacher_nat") if framework == "mid_transfer" else ("teacher",)
    assert I.get_framework(framework).needs == needs


def test_settings_of_an_autoencoder():
    cfg = I.Config(framework="autoencoder", student="tiny_ae", dataset="cifar10").resolved()
    assert cfg.student == cfg.teacher_arch == "tiny_ae"
    assert cfg.teacher_framework == "trades" and not cfg.infoard and cfg.own == {}


def test_runs_made_when_the_pool_was_an_option_of_all_go_on():
    cfg = I.Config(framework="mid", own={"pool": "clean,bim"}).resolved()
    made = {**vars(cfg), "pool": "clean,bim", "mi_bound": "dv", "mi_ramp": 1.0}
    del made["own"]  # there was no such option
    same_settings(made, cfg)
    with pytest.raises(I.InfoardError, match="choose another --out"):
        same_settings({**made, "pool": "clean,cw"}, cfg)


REFUSED = [
    ("--pool clean", "--pool needs two different attacks or more, not clean"),
    ("--pool clean,clean", "--pool needs two different"),
    ("--pool clean,pgd", "unknown attack 'pgd' .*clean, fgsm, pgd_sat"),
    ("--pool clean,nowhere:attack", "cannot import the attack nowhere:attack"),
    ("--teacher stranger.pt", "chance is 10"),
    ("--teacher teacher.pt", "MID needs a teacher with a decoder"),
    ("--teacher-framework trades", "--teacher-framework autoencoder"),
    ("--student nets:good", "nets of MODELS alone, not to nets:good"),
]


@each("options, why", REFUSED)
def test_mid_refuses_what_it_cannot_use(desk, options, why, capsys):
    line = ["--framework", "mid", "--epochs", "1", "--no-figures", *options.split()]
    assert I.main(line) == 2
    error = capsys.readouterr().err
    assert one_line(error) and re.search(why, error), error


def test_mid_trains_end_to_end_and_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluation, "check_teacher", lambda *args: None
    )  # one epoch teaches it nothing
    options = {"framework": "mid", "teacher_epochs": 1, "transfer": True}
    options.update(subset=60, batch_size=20)  # three steps of an epoch
    whole = check_resumed(tmp_path, figures=True, **options)
    assert whole["transfer"]["n"] == 40 and {"best", "last"} <= whole.keys()
    log = (tmp_path / "whole/log.jsonl").read_text()
    row = json.loads(log.splitlines()[-1])
    assert math.isfinite(row["known"])
    assert math.isfinite(row["unknown"])
    assert kinds_kept() == {"autoencoder", "natural"}
    assert 0 < whole["best"]["psnr"] < 100 and 0 <= whole["best"]["ssim"] <= 1
    pictures = I.load_tensors(tmp_path / "whole/sheet.pt")["columns"]
    assert pictures["attacked\nregenerated"].shape == (5, 32, 32, 3)
    net = I.load_teacher(str(tmp_path / "whole/best.pt"))
    assert isinstance(net, mid.Autoencoder)
    assert I.main(["tables", str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    assert "transfer (%)" in shown and "psnr_adv" in shown
