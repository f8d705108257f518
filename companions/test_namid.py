"""What holds for namid.py: bounds of single samples, what estimators see, the defence, the verb."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import evaluation, figures, namid
from companions.runs import same_settings
from test_infoard import (
    F64,
    SMALL,
    R,
    batch_kl,
    each,
    files_differ,
    ints,
    make_step,
    near,
    one_line,
    pair,
    rand,
    run,
    score_matrices,
    seeds,
)

# ==== 1. Bounds for each sample ===================================================================


def rounding(*values):
    """A tolerance for sums of values of this size."""
    return 1e-9 * max(1.0, *(abs(float(value)) for value in values))


@given(score_matrices)
def test_pointwise_bounds_are_the_summands_of_the_bounds(scores):
    tol = rounding(scores.abs().max())
    near(namid.pointwise(scores, "infonce").mean(), I.infonce(scores), tol)
    near(namid.pointwise(scores, "jsd").mean(), I.js_divergence(scores), tol)
    assert namid.pointwise(scores).mean() >= I.donsker_varadhan(scores) - tol  # Jensen
    both = namid.pointwise(torch.stack([scores, 2 * scores]))
    near(both[1], namid.pointwise(2 * scores), tol)


@given(score_matrices)
def test_dv_of_a_sample_by_hand(scores):
    for i, row in enumerate(scores.tolist()):
        others = [math.exp(f) for j, f in enumerate(row) if j != i]  # at most exp(100)
        truth = row[i] - math.log(sum(others) / len(others))
        tol = rounding(scores.abs().max())
        near(namid.pointwise(scores)[i], torch.tensor(truth, dtype=F64), tol)


@given(score_matrices, st.floats(-50, 50), seeds)
def test_dv_leaves_its_diagonal_out(scores, c, seed):
    flat = torch.full((4, 4), c, dtype=F64)
    near(namid.pointwise(flat), torch.zeros(4))  # no 1 is added for j = i
    i = seed % len(scores)
    moved = scores.clone()
    moved[i, i] += c  # raises its own row by as much, in no way another
    gain = namid.pointwise(moved) - namid.pointwise(scores)
    near(gain, c * torch.eye(len(scores), dtype=F64)[i], rounding(scores.abs().max(), c))


@each("bound", namid.POINTWISE)
@given(scores=score_matrices)
def test_pointwise_bounds_have_finite_gradients(bound, scores):
    scores.requires_grad_()
    (grad,) = torch.autograd.grad(namid.pointwise(scores, bound).sum(), scores)
    assert grad.isfinite().all()


def test_unknown_bounds_are_refused():
    with pytest.raises(I.InfoardError, match="unknown bound 'nwj' .*dv, infonce, jsd"):
        namid.pointwise(rand(3, 3), "nwj")


# ==== 2. Estimators ===============================================================================


def critics(seed=0, **options):
    """Small estimators in eval mode; the net that they hold gives x itself."""
    torch.manual_seed(seed)
    return namid.Estimators(nn.Identity(), 4, dim=16, **options).eval()


def test_each_estimator_sees_its_own_pattern():
    x, x_adv = rand(2, 5, 3, 16, 16)
    s, s_adv = rand(2, 5, 4)
    both = critics().double()
    with torch.no_grad():
        natural, adversarial = both.information(x, x_adv, s, s_adv)
        flipped = both.information(x, x_adv.flip(0), s, s_adv)
        moved = both.information(x + 0.1, x_adv + 0.1, s, s_adv)
    near(flipped[0], natural)  # natural: not of x'
    near(moved[1], adversarial)  # adversarial: of x' - x alone
    assert (flipped[1] - adversarial).abs().min() > 1e-6
    assert (moved[0] - natural).abs().min() > 1e-6


def test_scores_are_cosines_at_each_place():
    x = rand(5, 3, 16, 16)
    s = rand(5, 4)
    critic = critics().double().natural
    (scores,) = critic(x, s)
    assert scores.shape == (16, 5, 5)  # a 4 x 4 map of places
    place = critic.encoder(x).flatten(2)[3, :, 7]
    g = critic.g(s)[2]
    h = critic.h(place[None])[0]
    near(scores[7, 2, 3], g @ h / critic.tau)
    natural, _ = critics().double().information(x, x, s, s)
    near(natural[0], namid.pointwise(scores).mean(0))
    assert scores.abs().max() <= 1 / critic.tau


def patterns(source, seed, b=64):
    """x, x' and logits that depend on x alone or on x' - x alone, each of a colour of its own."""
    x = 0.8 * rand(b, 3, 1, 1, seed=seed) + 0.2 * rand(b, 3, 8, 8, seed=seed)
    noise = 0.8 * rand(b, 3, 1, 1, seed=seed + 1, lo=-1)
    noise = noise + 0.2 * rand(b, 3, 8, 8, seed=seed + 1)
    seen = x if source == "x" else noise
    logits = 5 * seen.mean((2, 3)) @ torch.eye(3, 4, dtype=F64)
    x_adv = x + R * noise
    return x.float(), x_adv.float(), logits.float()


@each("source, larger", [("x", 0), ("noise", 1)])
@each("bound", namid.POINTWISE)
def test_estimators_tell_what_logits_depend_on(source, larger, bound):
    both = critics(bound=bound).train()
    optimizer = torch.optim.Adam(both.parameters(), 3e-3)
    for seed in range(0, 240, 2):
        x, x_adv, z = patterns(source, seed)
        loss = -both.information(x, x_adv, z, z).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, x_adv, z = patterns(source, 9_000)
    with torch.no_grad():
        found = both.eval().information(x, x_adv, z, z).mean((1, 2))
    # the one that can be known is far above the other, of which there is none to know
    smaller = 1 - larger
    assert found[larger] > found[smaller] + 0.05, found
    assert found[smaller] < 0.1, found


def test_the_net_that_estimators_hold_is_no_part_of_them():
    net = nn.Linear(3, 4)
    both = namid.Estimators(net, 4, dim=16)
    x = rand(2, 3).float()
    assert torch.equal(both(x), net(x))
    assert all("held" not in name and "net" not in name for name in both.state_dict())
    assert not set(net.parameters()) & set(both.parameters())
    both.train()
    net.eval()
    both.requires_grad_(False)
    assert net.weight.requires_grad and not net.training


def test_a_batch_of_one_has_no_information():
    both = critics().train()
    x = rand(1, 3, 16, 16).float()
    z = torch.ones(1, 4)
    found = both.information(x, x, z, z)
    found.sum().backward()
    assert found.shape == (2, 2, 1) and not found.any()
    for p in both.parameters():
        assert p.grad is not None and not p.grad.any()
    with pytest.raises(I.InfoardError, match="two test images"):
        both.findings(rand(1, 3, 16, 16), torch.zeros(1), R)


# ==== 3. Losses ===================================================================================


def test_selection_is_by_the_largest_logit_of_each_sample():
    y = torch.tensor([0, 1, 2, 0])
    s = torch.tensor([[9.0, 8, 0], [0, 1, 0], [0, 0, 2], [0, 1, 0]])
    s_adv = torch.tensor([[1.0, 2, 0], [0, 5, 4], [3, 0, 2], [0, 1, 0]])
    near(namid.fooled(s, s_adv, y), torch.tensor([0.5, 0, 0.5, 0]))
    one = namid.fooled(s[:1], s_adv[:1], y[:1])  # a softmax over the batch says 0, 0
    near(one, torch.ones(1))
    near(namid.fooled(s, s, y), torch.zeros(4))


@given(seeds, ints(2, 6))
def test_unlikeness_is_one_less_the_cosine_over_the_selected(seed, b):
    u, v = rand(2, b, seed=seed, lo=-1)
    chosen = torch.arange(b) % 2 == 0
    w = chosen / chosen.sum()
    truth = 1 - F.cosine_similarity(u[chosen], v[chosen], dim=0)
    near(namid.unlikeness(u, v, w), truth, 1e-6)  # cosine_similarity keeps its norms above 1e-8
    near(namid.unlikeness(u, u, w), 0.0, 1e-6)
    assert namid.unlikeness(u, v, torch.zeros(b)) == 0


def namid_step(framework="namid", b=6, own=None, **options):
    """Half of the training is done, and all are right on x; radii are large."""
    student, _, x, _ = pair(b, F64)
    y = copy.deepcopy(student)(x).argmax(1)
    given = {"eps": 0.3, "step_size": 0.2, "own": own or {}} | options
    more = {"estimators": critics().double()}
    return make_step(framework, student, None, x, y, more=more, **given)


def loss_of(step):
    """The framework's loss, though there is no teacher."""
    return I.get_framework(step.cfg.framework).loss(step)


def train_mode_passes(net):
    """A list that grows with each pass in train mode."""
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1) if net.training else None)
    return passes


def logits_of_twin(step, base):
    """A twin of the student, and its logits on x and x' in the order of the base's passes."""
    twin = copy.deepcopy(step.student)
    if base == "at":
        s_adv = twin(step.x_adv)
        return twin, twin(step.x), s_adv
    s = twin(step.x)
    return twin, s, twin(step.x_adv)


def penalty_by_hand(step, s, s_adv):
    """The paper's L_mi with lambda = 0.2, over the fooled alone."""
    chosen = (s.argmax(1) == step.y) & (s_adv.argmax(1) != step.y)
    assert 1 < chosen.sum() < 6
    found = step.more["estimators"].information(step.x, step.x_adv, s, s_adv)
    n, n_adv, a, a_adv = found.flatten(0, 1)[:, chosen]

    def cosine(u, v):
        return (u * v).sum() / (u.square().sum() * v.square().sum()).sqrt()

    return 2 - cosine(n_adv, n) - cosine(a_adv, a) + 0.2 * (a_adv - n_adv).mean()


@each("base, framework", [("at", "namid"), ("trades", "namid_trades")])
def test_namid_is_its_formula_in_two_passes(base, framework):
    step = namid_step(framework, alpha=3.0, own={"mi_lambda": 0.2})
    untouched = copy.deepcopy(step.student)
    passes = train_mode_passes(step.student)
    loss = loss_of(step)
    loss.backward()
    assert len(passes) == 2
    for p in step.student.parameters():
        assert p.grad.isfinite().all() and p.grad.any()

    ours = step.student
    step.student = untouched
    twin, s, s_adv = logits_of_twin(step, base)
    if base == "at":
        first = F.cross_entropy(s_adv, step.y)
    else:
        first = F.cross_entropy(s, step.y) + 6 * batch_kl(s, s_adv)
    truth = first + 0.5 * 3.0 * penalty_by_hand(step, s, s_adv)  # half of the ramp
    near(loss, truth, 1e-8)  # cosine_similarity keeps its norms above 1e-8
    truth.backward()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        near(p.grad, q.grad, 1e-6)
    assert step.terms.keys() == {"unlike", "push"}


def test_namid_without_fooled_samples_is_its_base():
    step = namid_step(eps=0.0)
    plain = namid_step("at", eps=0.0, infoard=False)
    loss = loss_of(step)
    near(loss, loss_of(plain), 0.0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in step.student.parameters())


def test_namid_of_one_image_is_its_base():
    step = namid_step(b=1)
    step.student.eval()
    loss_of(step).backward()
    assert all(p.grad.isfinite().all() for p in step.student.parameters())


def test_alpha_is_whole_at_once_without_ramp():
    base = loss_of(namid_step("at", infoard=False))
    whole = loss_of(namid_step(alpha=3.0, own={"mi_ramp": 0.0}))
    half = loss_of(namid_step(alpha=3.0, own={"mi_ramp": 0.5}))
    ramped = loss_of(namid_step(alpha=3.0, own={"mi_ramp": 1.0}))
    near(whole, half, 0.0)  # half of the training is done
    near(whole - base, 2 * (ramped - base))
    assert (whole - base).abs() > 1e-3


def test_namid_without_estimators_is_one_line():
    step = namid_step()
    step.more = {}
    with pytest.raises(I.InfoardError, match="namid needs estimators"):
        loss_of(step)


def used(net, x):
    """A net whose batch norm knows its activations, so that eval mode is no constant function."""
    for _ in range(40):
        net.train()(x)
    return net.eval()


@each("objective", ["max", "difference"])
def test_estimators_climb_their_objective(objective):
    net, _, x, _ = pair(8)
    y = used(net, x)(x).argmax(1)
    both = namid.Estimators(net.requires_grad_(False), 4, dim=16)
    options = {"eps": 0.06, "step_size": 0.03, "own": {"mi_train": objective}}
    step = make_step("estimators", both, net, x, y, **options)
    loss = step.loss()
    s = net(x)
    s_adv = net(step.x_adv)
    n, n_adv, a, a_adv = both.information(x, step.x_adv, s, s_adv).flatten(0, 1)
    w = namid.fooled(s, s_adv, y)
    assert 0 < (w > 0).sum() < 8
    if objective == "max":
        truth = -(n + a_adv).mean()
    else:
        truth = -((n - n_adv + a_adv - a) * w).sum()
    near(loss, truth, 1e-4)  # batch norm in train mode, sums in float32
    loss.backward()
    assert all(p.grad is not None for p in both.parameters())
    assert all(p.grad is None for p in net.parameters())


# ==== 4. Training =================================================================================


def steps_seen(monkeypatch):
    """A list that grows with each Step of a run."""
    seen = []
    real = I.Step

    def look(*args, **options):
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(I, "Step", look)
    return seen


def check_resumed(tmp_path, **options):
    """A run that is stopped in its third step goes on bit for bit; gives its results. Figures are
    drawn of the one that was not stopped.
    """
    whole = run(tmp_path / "whole", resume=True, **options)
    with pytest.raises(SystemExit):
        run(tmp_path / "killed", stop=3, resume=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda folder, **fill: None)
        assert run(tmp_path / "killed", resume=True, **options) == whole
    assert files_differ(tmp_path / "whole", tmp_path / "killed") == []
    return whole


def kinds_kept():
    """The frameworks that teachers in runs/teachers were trained by."""
    return {folder.name.split("-")[-2] for folder in Path("runs/teachers").iterdir()}


def test_namid_trains_end_to_end_and_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluation, "check_teacher", lambda *args: None
    )  # one epoch teaches it nothing
    steps = steps_seen(monkeypatch)
    options = {"framework": "namid", "teacher_epochs": 1, "transfer": True}
    options.update(subset=60, batch_size=20)  # three steps of an epoch
    whole = check_resumed(tmp_path, figures=True, **options)
    estimators = steps[-1].more["estimators"]
    assert not any(m.training for m in estimators.modules())
    assert not any(p.requires_grad for p in estimators.parameters())
    assert whole["transfer"]["n"] == 40 and {"best", "last"} <= whole.keys()
    log = (tmp_path / "whole/log.jsonl").read_text()
    row = json.loads(log.splitlines()[-1])
    assert math.isfinite(row["unlike"])
    assert math.isfinite(row["push"])
    assert kinds_kept() == {"at", "natural", "estimators"}
    assert I.main(["tables", str(tmp_path / "whole")]) == 0
    assert "transfer (%)" in capsys.readouterr().out


def made_estimators(monkeypatch, name="net", **options):
    """(the folder of estimators of NAME.pt, what they would be trained with)."""
    made = []
    monkeypatch.setattr(I, "train", lambda **given: made.append(given))
    cfg = I.Config(**{"framework": "namid", **options}).resolved()
    folder = namid.trained_estimators(cfg, f"{name}.pt")
    return folder, made[-1]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A current folder with the files of three nets, two of them the same."""
    monkeypatch.chdir(tmp_path)
    for name in ("net.pt", "same.pt"):
        Path(name).write_bytes(b"weights")
    Path("other.pt").write_bytes(b"other weights")
    return tmp_path


GIVEN = [{"eps": 4 / 255}, {"subset": 50}, {"critic_dim": 8}]
OWN = [{"mi_train": "difference"}, {"mi_bound": "jsd"}]


@each("given, own", [(given, {}) for given in GIVEN] + [({}, own) for own in OWN])
def test_estimators_are_kept_by_settings(given, own, files, monkeypatch):
    first, _ = made_estimators(monkeypatch)
    again, made = made_estimators(monkeypatch, own=own, **given)
    assert again != first
    assert made["framework"] == "estimators" and made["teacher"] == "net.pt"
    assert given.items() <= made.items()
    assert own.items() <= made["own"].items()


def test_estimators_are_kept_by_the_net_itself(files, monkeypatch):
    first, made = made_estimators(monkeypatch)
    assert made_estimators(monkeypatch, "same")[0] == first
    assert made_estimators(monkeypatch, "other")[0] != first
    assert made_estimators(monkeypatch, own={"mi_lambda": 3.0, "mi_ramp": 0.0})[0] == first
    Path("net.pt").write_bytes(b"trained on")
    assert made_estimators(monkeypatch)[0] != first


FROZEN = {  # where they lie since the first version, by settings; those of the field are costly
    "ae6297a0": {},
    "9967d6f3": {"own": {"mi_train": "difference"}, "critic_dim": 16, "teacher_epochs": 3},
}


@each("key", FROZEN)
def test_estimators_lie_where_they_always_lay(key, files, monkeypatch):
    folder, _ = made_estimators(monkeypatch, **FROZEN[key])
    assert folder == f"runs/teachers/shapes-tiny-estimators-{key}/best.pt"


def test_runs_made_when_these_were_options_of_all_go_on():
    old = {"mi_bound": "jsd", "mi_train": "max", "mi_lambda": 0.3, "mi_ramp": 1.0, "pool": "x"}
    cfg = I.Config(framework="namid", own={"mi_bound": "jsd", "mi_lambda": 0.3}).resolved()
    made = {**vars(cfg), **old}
    del made["own"]  # there was no such option
    same_settings(made, cfg)
    with pytest.raises(I.InfoardError, match="made with --mi-lambda .*choose another --out"):
        same_settings({**made, "mi_lambda": 0.1}, cfg)


@each("framework", ["namid", "namid_trades"])
def test_settings_of_namid(framework):
    cfg = I.Config(framework=framework).resolved()
    assert cfg.own == {"mi_bound": "dv", "mi_train": "max", "mi_lambda": 0.1, "mi_ramp": 1.0}
    assert cfg.alpha == 1.0
    assert cfg.beta == 6.0
    assert cfg.teacher_framework == "at"
    assert not cfg.infoard
    assert cfg.out == f"runs/shapes-tiny-{framework}-s0"
    assert cfg.resolved() == cfg
    large = I.Config(framework=framework, dataset="cifar10", teacher_arch="tiny").resolved()
    assert large.teacher_arch == large.student == "resnet18"  # of the student's own kind
    given = I.Config(framework=framework, teacher="t.pt", teacher_arch="tiny_wide").resolved()
    assert given.teacher_arch == "tiny_wide"
    assert I.Config(framework=framework, teacher="t.pt").resolved().teacher_arch is None


def test_settings_of_estimators():
    cfg = I.Config(framework="estimators", own={"mi_bound": "jsd"}).resolved()
    assert cfg.own == {"mi_bound": "jsd", "mi_train": "max"} and not cfg.infoard
    assert I.get_framework("estimators").best_by == "epoch"
    assert I.get_framework("namid").best_by == "val_pgd"


REFUSED = [
    ("--mi-bound nwj", "unknown --mi-bound 'nwj' .*dv, infonce, jsd"),
    ("--mi-bound dv,jsd", "unknown --mi-bound"),
    ("--mi-train eq5", "unknown --mi-train 'eq5' .*max, difference"),
    ("--mi-lambda -1", r"--mi-lambda must lie in \[0, inf\], got -1"),
    ("--mi-lambda nan", "--mi-lambda must lie in"),
    ("--mi-ramp 1.5", r"--mi-ramp must lie in \[0, 1\], got 1.5"),
    ("--mi-lambda much", "--mi-lambda"),
]


@each("options, why", REFUSED)
def test_mistaken_options_are_one_line(options, why, capsys):
    assert I.main(["--framework", "namid", *options.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(why, error) and one_line(error), error


# ==== 5. The measurement ==========================================================================


def test_the_measurement_groups_by_what_the_attack_did(lab):
    both = namid.Estimators(lab.net, 10, dim=16)
    found = both.findings(SMALL.x_test[:70], SMALL.y_test[:70], 1 / 255, size=32)
    for group in found.values():
        means = {name: group[name][0] for name in namid.MEASURED}
        near(means["N(x')-N(x)"], means["N(x')"] - means["N(x)"], 1e-6)
        near(means["A(x')-A(x)"], means["A(x')"] - means["A(x)"], 1e-6)
    everything = found.pop("all")
    assert found.keys() == {"resisted", "fooled", "wrong"}
    assert everything["n"] == 69 == sum(group["n"] for group in found.values())
    weighted = sum(group["n"] * group["N(x)"][0] for group in found.values())
    near(weighted / 69, everything["N(x)"][0], 1e-6)


def test_groups_by_hand():
    right = torch.tensor([1.0, 1, 1, 1, 0, 0, 0])
    right_adv = torch.tensor([1.0, 1, 0, 0, 0, 0, 1])
    values = [torch.arange(7.0).double() + k for k in range(6)]
    found = namid.group_means(values, right, right_adv)
    assert {group: values["n"] for group, values in found.items()} == {
        "all": 7,
        "resisted": 2,
        "fooled": 2,
        "wrong": 3,
    }
    near(torch.tensor(found["fooled"]["A(x)"]), torch.tensor([5.5, 1.96 / 2]))  # of 5 and 6
    alone = namid.group_means(values, right, right)
    assert alone.keys() == {"all", "resisted", "wrong"}  # no group of fewer than two


def test_measured_intervals_are_those_of_the_values(lab):
    both = namid.Estimators(lab.net, 10, dim=16).train()
    x = I.to_float(SMALL.x_test[:50], "cpu")
    y = SMALL.y_test[:50]
    found = both.findings(x, y, 0.0)["all"]  # x' = x
    assert both.training
    s = I.predict(lab.net, x)
    with torch.no_grad():
        n, _, a, _ = both.eval().information(x, x, s, s).double().flatten(0, 1)
    for name, values in (("N(x)", n), ("A(x')", a)):
        half = 1.96 * values.std() / 50**0.5
        near(torch.tensor(found[name]), torch.stack([values.mean(), half]), 1e-6)


def test_measurement_of_a_checkpoint_is_made_once(desk, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "check_teacher", lambda *args: None)
    line = "mi teacher.pt --teacher-epochs 1 --device cpu --steps 1 --eval-subset 40"
    line = [*line.split(), "--critic-dim", "16", "--no-progress"]
    assert I.main(line) == 0
    first = capsys.readouterr().out
    assert "| all" in first and "N smaller on attacked images: " in first
    (out,) = Path("runs/teachers").iterdir()
    assert "-estimators-" in out.name
    assert (out / "figures/information.png").stat().st_size > 10_000
    monkeypatch.setattr(I, "Run", None)
    assert I.main(line) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == first.splitlines()[-5:]


def measured_by_verb(tmp_path, monkeypatch, natural, adversarial):
    """What the verb mi makes of two differences, each (mean, half of its interval)."""
    group = {"n": 9}
    group.update({name: (0.5, 0.1) for name in namid.MEASURED})
    group.update({"N(x')-N(x)": natural, "A(x')-A(x)": adversarial})
    I.save(tmp_path / "results.json", {"findings": {"all": group}})
    torch.save({"format": "infoard-1", "config": {"dataset": "shapes"}}, tmp_path / "c.pt")
    seen = []

    def trained_estimators(cfg, path):
        seen.append(cfg)
        return f"{tmp_path}/best.pt"

    monkeypatch.setattr(namid, "trained_estimators", trained_estimators)
    namid.run_mi(str(tmp_path / "c.pt"), own={"mi_train": "difference"})
    return seen[0]


VERDICTS = [
    ((-0.2, 0.1), (0.2, 0.1), "yes yes"),
    ((0.2, 0.1), (-0.2, 0.1), "no no"),
    ((-0.2, 0.3), (0.2, 0.3), "unclear unclear"),
]


@each("natural, adversarial, told", VERDICTS)
def test_verdict_of_the_measurement(natural, adversarial, told, tmp_path, monkeypatch, capsys):
    cfg = measured_by_verb(tmp_path, monkeypatch, natural, adversarial)
    assert cfg.own["mi_train"] == "difference" and cfg.eval_subset == 1024
    shown = capsys.readouterr().out
    assert " ".join(re.findall(r"images: (\w+) ", shown)) == told
    header, _, row = shown.splitlines()[:3]
    names = [name.strip() for name in header.strip("|").split("|")]
    texts = [text.strip() for text in row.strip("|").split("|")]
    assert names == ["nats", "n", *namid.MEASURED]
    assert texts[:3] == ["all", "9", "0.500 ± 0.100"]


def test_the_verb_asks_for_what_decides_where_estimators_are_kept():
    decides = "dataset data_dir subset val_size image_size eps steps step_size lr amp batch_size"
    assert {*decides.split(), "teacher_epochs", "critic_dim"} <= set(namid.run_mi.takes)
    assert namid.run_mi.options.keys() == {"mi_bound", "mi_train"}
