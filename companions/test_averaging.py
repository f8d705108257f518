"""What holds for averaging.py: decays, averages by hand, statistics, resuming, results, errors."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infoard as I
from companions import averaging, tables
from test_infoard import BASE, FEW, SMALL, STEPS, begun, each, error_of, files_differ, near, run

CPU = torch.device("cpu")


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def weights_of(net):
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ==== 1. The ramp =================================================================================


@given(st.integers(1, 20_000), st.integers(40, 20_000), st.floats(0, 1))
def test_the_decay_waits_rises_and_has_a_limit(step, steps, limit):
    decay = averaging.decay_at(step, steps, limit)
    assert 0 <= decay <= limit
    assert decay <= averaging.decay_at(step + 1, steps, limit)
    if step < 0.025 * steps:
        assert decay == 0


@each("step, decay", [(99, 0.0), (100, 0.1), (101, 2 / 11), (190, 91 / 100), (10_000, 0.995)])
def test_the_decay_is_that_of_the_field(step, decay):
    assert averaging.decay_at(step, 4000, 0.995) == pytest.approx(decay, rel=1e-12)


def test_a_ramped_average_is_that_by_hand(tmp_path, monkeypatch):
    train_step = I.train_step
    seen = []

    def watched(run, rows, share):
        train_step(run, rows, share)
        seen.append(state_of(run.student))

    monkeypatch.setattr(I, "train_step", watched)
    run(tmp_path / "r", framework="natural", ema=0.5, ema_ramp=True)
    average = dict(seen[0])
    for i in range(2, 2 * STEPS + 1):
        decay = min(0.5, (1 + i - 0.3) / (10 + i - 0.3))  # 2.5% of 12 steps are 0.3
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * seen[i - 1][name]
    last = I.load_tensors(tmp_path / "r/last.pt")
    norms = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in average.items():
        found = last["ema"][f"module.{name}"]
        if name.endswith(norms):
            assert torch.equal(found, seen[-1][name])  # copied, as in the field
        else:
            near(found, value, 1e-6)
            assert not torch.equal(found, seen[-1][name])


def test_without_the_ramp_no_decay_is_reckoned(monkeypatch):
    monkeypatch.setattr(averaging, "decay_at", None)
    made = begun(framework="natural", ema=0.9)
    made.parts["ema"].update_parameters(made.student)
    assert made.parts["ema"].use_buffers


def test_batch_norm_of_critics_is_not_measured_anew():
    with pytest.raises(I.InfoardError, match="--swa and --framework estimators"):
        averaging.check(I.Config(framework="estimators", swa=1, epochs=2))


# ==== 2. The equal average ========================================================================


def test_an_equal_average_is_that_of_the_ends_of_epochs(tmp_path, monkeypatch):
    validate = I.validate
    ends, looked_at = [], []

    def watched(run):
        ends.append(state_of(run.student))
        looked_at.append(state_of(run.evaluated))
        return validate(run)

    monkeypatch.setattr(I, "validate", watched)
    run(tmp_path / "r", framework="natural", epochs=4, swa=2)
    assert same(looked_at[0], ends[0])  # before its first epoch the student itself
    for epoch in (2, 3, 4):
        averaged = ends[1:epoch]
        for name, value in looked_at[epoch - 1].items():
            if name.endswith(("weight", "bias")):
                near(value, torch.stack([end[name] for end in averaged]).mean(0), 1e-6)
    last = I.load_tensors(tmp_path / "r/last.pt")
    assert same(looked_at[-1], state_of(I.load_own(last)))  # which a checkpoint evaluates
    assert same(ends[-1], last["model"])


def test_the_average_of_one_net_is_that_net():
    made = begun(framework="natural", swa=1, lr=0.0, epochs=3)
    before = weights_of(made.student)
    for epoch in (1, 2, 3):
        made.at.epoch = epoch
        averaging.end_epoch(made)
    assert same(before, weights_of(made.evaluated))
    assert made.parts["ema"].n_averaged == 3


def swa_run(**options):
    """A run at the end of the epoch in which the averaging begins."""
    made = begun(framework="natural", swa=1, **options)
    made.at.epoch = 1
    return made


def test_statistics_are_means_over_training_batches():
    made = swa_run()
    averaging.end_epoch(made)
    batches = list(averaging.training_batches(made))
    assert [len(x) for x in batches] == [64] * 5  # 360 images; the smaller batch is left out
    with torch.no_grad():
        first = [made.evaluated.conv1(x) for x in batches]
    norm = made.evaluated.bn1
    near(norm.running_mean, torch.stack([f.mean((0, 2, 3)) for f in first]).mean(0), 1e-5)
    near(norm.running_var, torch.stack([f.var((0, 2, 3)) for f in first]).mean(0), 1e-5)


def test_statistics_leave_everything_else_as_it_was():
    made = swa_run()
    draws = made.generators["data"].get_state()
    averaging.end_epoch(made)
    first = state_of(made.evaluated)
    weights, student = weights_of(made.evaluated), state_of(made.student)
    mode, momentum = made.evaluated.training, made.evaluated.bn1.momentum
    averaging.measure_statistics(made)
    assert same(first, state_of(made.evaluated))  # the same each time
    assert same(weights, weights_of(made.evaluated)) and same(student, state_of(made.student))
    assert torch.equal(draws, made.generators["data"].get_state())
    assert (mode, momentum) == (made.evaluated.training, made.evaluated.bn1.momentum)


def test_a_net_without_batch_norm_needs_no_statistics(monkeypatch):
    made = swa_run()
    bare = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    made.evaluated = bare
    monkeypatch.setattr(I, "draw", None)  # and no image
    averaging.measure_statistics(made)


def test_few_images_are_one_batch():
    made = swa_run(batch_size=400)
    assert [len(x) for x in averaging.training_batches(made)] == [360]


def test_ranks_share_the_work_and_agree(monkeypatch):
    made = swa_run()
    whole = list(averaging.training_batches(made))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(I, "world", lambda rank=rank: (rank, 2))
        made.rank, made.ranks = rank, 2
        shares.append(list(averaging.training_batches(made)))
    for x, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(x[0::2], first) and torch.equal(x[1::2], second)

    other = copy.deepcopy(made.evaluated)
    torch.optim.swa_utils.update_bn(shares[0], other)  # what rank 0 measures
    theirs = iter([buffer for buffer in other.buffers() if buffer.is_floating_point()])
    monkeypatch.setattr(I, "all_reduce_sum", lambda value: value + next(theirs))
    averaging.measure_statistics(made)  # as rank 1
    with torch.no_grad():
        means = [made.evaluated.conv1(x).mean((0, 2, 3)) for x in whole]
    near(made.evaluated.bn1.running_mean, torch.stack(means).mean(0), 1e-5)
    assert next(theirs, None) is None


# ==== 3. Resuming, results ========================================================================


RESUMED = [
    ({"ema": 0.9, "ema_ramp": True}, 3),
    ({"swa": 1, "amp": "bf16"}, STEPS + 2),
    ({"swa": 2}, STEPS),  # the end of an epoch
]


@each("options, stop", RESUMED, ids=str)
def test_resumed_is_uninterrupted_bit_for_bit(lab, tmp_path, options, stop):
    options = {"framework": "at", "infoard": False, **options, **FEW}
    whole, whole_results = lab.reference(**options)
    with pytest.raises(SystemExit):
        run(tmp_path / "r", stop=stop, teacher=lab.teacher, **options)
    results = run(tmp_path / "r", resume=True, teacher=lab.teacher, **options)
    assert files_differ(whole, tmp_path / "r") == []
    assert results == whole_results


@each("options", [{"ema": 0.9}, {"swa": 1}], ids=str)
def test_results_have_the_net_beside_its_average(lab, tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    results = run(tmp_path / "r", framework="natural", **options)
    printed = capsys.readouterr().out
    last = I.load_tensors("r/last.pt")
    averaged = I.load_own(last)
    raw = copy.deepcopy(averaged)
    raw.load_state_dict(last["model"])
    cfg = I.Config(**BASE)
    for which, net in {"raw": raw, "last": averaged}.items():
        again = I.evaluated(cfg, net, SMALL, CPU)
        assert results[which]["epoch"] == 2
        assert again["clean"] == results[which]["clean"]
        assert again["fgsm"] == results[which]["fgsm"]
    assert f"raw, without averaging:  clean {results['raw']['clean']:.2f}" in printed
    assert json.loads((tmp_path / "r/results.json").read_text()) == results

    tables.run_tables(str(tmp_path))
    shown = capsys.readouterr().out
    assert "raw (%)" in shown and "without the averaging of weights" in shown


def test_without_an_average_there_is_no_other_net(tmp_path):
    results = run(tmp_path / "r", framework="natural", epochs=1)
    assert results.keys() == {"last", "best"}


# ==== 4. Mistakes =================================================================================


@each(
    "words, told",
    [
        ("--ema 0.9 --swa 1", "two averages"),
        ("--ema-ramp", "add --ema"),
        ("--ema 1", "a decay below 1"),
        ("--swa 4 --epochs 3", "past the last epoch, 3"),
        ("--swa -1", "--swa must lie in"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told in error_of(["--no-figures", *words.split()], capsys)
    assert not list(tmp_path.iterdir())


@each("options", [{"swa": 3, "epochs": 3}, {"ema": 1.0, "ema_ramp": True}, {"ema": 0.999}, {}])
def test_what_makes_sense_is_not(options):
    averaging.check(I.Config(**options).resolved())
