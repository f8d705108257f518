"""What holds for bench.py: what is counted, what is timed, and that ways to make a step agree.

No test depends on how fast the machine is: clocks are faked where times are checked.
"""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import bench
from companions.test_tables import shown
from test_infoard import BASE, SMALL, near, tiny_net

ROOT = Path(I.__file__).parent
CPU = torch.device("cpu")
TOY = {"student": "tiny", "teacher_arch": "tiny", "steps": 4, "batch_size": 8, "device": "cpu"}
each = pytest.mark.parametrize


def flat(parameters) -> torch.Tensor:
    """Parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in parameters])


def a_bench(nchw: bool = False, unfrozen: bool = False, **options) -> bench.Bench:
    """Steps of 16 images with three attack steps, the same nets each time."""
    made = {**BASE, "teacher_arch": "tiny", "batch_size": 16, "steps": 3, **options}
    cfg = I.Config(**made).resolved()
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        teacher = I.tiny().eval().requires_grad_(False)
    return bench.Bench(bench.Kind(cfg, nchw, unfrozen), teacher, SMALL, CPU)


def learned_by(work: bench.Bench, steps: int = 2) -> torch.Tensor:
    """The student's parameters after so many steps."""
    for _ in range(steps):
        assert work.step() > 0
    assert all(p.requires_grad for p in work.run.student.parameters())
    return flat(work.run.student.parameters())


# ==== 1. The ordinary step ========================================================================


@each("framework", ["at", "trades", "rslad", "adaad", "mtard", "igdm", "saad"])
def test_ordinary_step_is_the_same_mathematics(framework, monkeypatch):
    seen = []
    real = I.Step.attack

    def attack(step, objective, **options):
        def watched(z, *rows):
            needs = next(step.student.parameters()).requires_grad
            seen.append((z.is_contiguous(), needs))
            return objective(z, *rows)

        real(step, watched, **options)

    monkeypatch.setattr(I.Step, "attack", attack)
    quick = a_bench(framework=framework, infoard=False)
    plain = a_bench(nchw=True, unfrozen=True, framework=framework, infoard=False)
    # float32 sums in another order, twice through a normalisation
    near(learned_by(quick), learned_by(plain), 1e-4)
    assert seen == [(False, False)] * 6 + [(True, True)] * 6
    for work, contiguous in ((quick, False), (plain, True)):
        for net in (work.run.student, work.run.nets["teacher"]):
            assert net.layer1[0].weight.is_contiguous() == contiguous


@each("nchw", [False, True])
@each("unfrozen", [False, True])
def test_ordinary_changes_what_it_says_and_puts_it_back(nchw, unfrozen):
    before = I.frozen_eval, I.to_float
    net = tiny_net().train()
    x = SMALL.x_test[:2]
    with bench.ordinary(nchw, unfrozen):
        images = I.to_float(x, "cpu")
        assert images.is_contiguous() == nchw
        with I.frozen_eval(net, None, len):  # as attacks call it: what is no net is no matter
            assert next(net.parameters()).requires_grad == unfrozen
            assert not any(m.training for m in net.modules())
    assert all(m.training for m in net.modules())
    usual = I.to_float(x, "cpu")
    assert images.equal(usual) and not usual.is_contiguous()
    assert before == (I.frozen_eval, I.to_float)


def test_ordinary_leaves_augmented_images_as_they_are():
    work = a_bench(framework="at", infoard=False, augment="idbh")
    draws = work.run.generators["data"].get_state()
    x, _ = I.draw(work.run, torch.arange(4))
    work.run.generators["data"].set_state(draws)
    with bench.ordinary():
        same, _ = I.draw(work.run, torch.arange(4))
    assert torch.equal(x, same) and same.is_contiguous()


def test_ordinary_puts_back_what_it_changed_after_an_error():
    before = I.frozen_eval, I.to_float
    with pytest.raises(KeyError), bench.ordinary():
        raise KeyError
    assert before == (I.frozen_eval, I.to_float)


# ==== 2. Counting and waiting =====================================================================


def products_of(net: nn.Module, images: int) -> dict[str, int]:
    """The operations of each layer of I.tiny on images of 32 pixels: two for each product."""
    pixels = {"conv1": 16 * 16, "layer1.0": 8 * 8, "layer2.0": 4 * 4, "layer3.0": 4 * 4}
    pixels["linear"] = 1
    return {
        name: 2 * images * n * net.get_submodule(name).weight.numel() for name, n in pixels.items()
    }


@each("images", [1, 4])
def test_operations_are_counted(images):
    net = I.tiny()
    x = torch.rand(images, 3, 32, 32)
    of_layer = products_of(net, images)
    forward = sum(of_layer.values())
    with bench.Counter() as counter:
        I.predict(net, x)
    assert counter.flops == forward

    # backward to the input alone costs as much again
    with bench.Counter() as counter, I.frozen_eval(net):
        z = x.clone().requires_grad_()
        torch.autograd.grad(net(z).sum(), z)
    assert counter.flops == 2 * forward

    # backward to weights and inputs twice as much; the images need no gradient
    with bench.Counter() as counter:
        net.eval()(x).sum().backward()
    assert counter.flops == 3 * forward - of_layer["conv1"]


@each("groups", [1, 2, 8])
def test_operations_of_grouped_convolutions_are_counted_in_both_passes(groups):
    net = nn.Conv2d(8, 8, 3, groups=groups)
    with bench.Counter() as counter:
        z = net(torch.rand(2, 8, 6, 6, requires_grad=True))  # [2, 8, 4, 4]
        passed = counter.flops
        z.sum().backward()
    assert passed == 2 * 2 * 8 * 4 * 4 * 9 * 8 // groups
    assert counter.flops == 3 * passed


def test_bytes_are_counted_while_they_are_held():
    before = torch.zeros(7, 9)
    with bench.Counter() as counter:
        first = torch.zeros(1000) + 1  # 4,000 bytes twice, for a moment
        del first
        second = torch.ones(500)
        view = second.view(50, 10)[3:].add_(1)  # no new bytes
        assert counter.live == 2000 and counter.peak == 8000
        del second, view
        assert counter.live == 0
        before.add_(1)
        views = before.t(), before[1:]
        assert counter.live == 0 and len(views) == 2
        torch.ones(3000)
        assert counter.live == 0 and counter.peak == 12_000


class SlowDevice:
    """A clock, and a device that only takes orders and does them when it is waited for."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.ordered = 0.0
        monkeypatch.setattr(bench, "wait", self.wait)
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

    def order(self, seconds: float) -> None:
        self.now += 0.5  # it takes time to order, too
        self.ordered += seconds

    def wait(self, device: torch.device) -> None:
        self.now += self.ordered
        self.ordered = 0.0


@given(st.floats(1, 9))
@settings(max_examples=5)
def test_a_rate_is_that_of_one_product(seconds):
    with pytest.MonkeyPatch.context() as patch:
        device = SlowDevice(patch)

        def product():
            device.order(seconds)
            return torch.ones(4, 5) @ torch.ones(5, 6)

        near(bench.rate(product, CPU), 2 * 4 * 5 * 6 / (seconds + 0.5))


def test_the_time_of_a_step_is_its_own(monkeypatch):
    work = a_bench(framework="at", infoard=False)
    device = SlowDevice(monkeypatch)
    monkeypatch.setattr(work, "make_step", lambda: device.order(3.0))
    device.order(7.0)  # of whatever was before
    assert work.step() == 3.5


@each("kind, waited", [("cpu", []), ("cuda:1", ["cuda:1"]), ("mps", ["mps"])])
def test_devices_are_waited_for(kind, waited, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("mps"))
    bench.wait(torch.device(kind))
    assert calls == waited


@each("best", ["matrix", "convolution"])
def test_the_peak_is_the_best_of_both_products(best, monkeypatch):
    speeds = {2: 3e9, 4: 2e9}  # by the number of dimensions of what comes out
    if best == "convolution":
        speeds = {2: 1e9, 4: 2.5e9}
    calls = []

    def rate(product, device):
        out = product()
        calls.append(out.dim())
        assert out.dtype == torch.bfloat16
        return speeds[out.dim()] - len(calls)  # slower each time

    monkeypatch.setattr(bench, "rate", rate)
    nowhere = torch.device("meta")  # nothing is computed
    near(bench.peak(nowhere, torch.bfloat16), max(speeds[2] - 1, speeds[4] - 2))
    assert calls == [2, 4] * 7


def test_the_machine_has_a_name(monkeypatch):
    assert bench.machine(CPU).endswith(f", {torch.get_num_threads()} threads")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert bench.machine(torch.device("cuda:1")) == "GPU 1"


# ==== 3. Steps to be timed ========================================================================


def having(kinds: dict[str, bench.Kind], name: str, value=True) -> list[str]:
    """The kinds that have this value of a setting, or of a field of Kind."""
    found = []
    for title, kind in kinds.items():
        values = {**vars(kind.cfg), **vars(kind)}
        if values[name] == value:
            found.append(title)
    return found


def test_kinds_differ_in_what_they_are_named_for():
    cfg = I.Config(steps_lo=2, amp="bf16", compile=True).resolved()
    kinds = bench.kinds_of_step(cfg)
    assert list(kinds) == ["ordinary", "plain", "infoard", "schedule"]
    assert having(kinds, "nchw") == ["ordinary"]
    assert having(kinds, "unfrozen") == ["ordinary"]
    assert having(kinds, "amp", "off") == ["ordinary"]
    assert having(kinds, "compile", False) == ["ordinary"]
    assert having(kinds, "infoard") == ["infoard", "schedule"]
    assert having(kinds, "steps_lo", 2) == ["schedule"]
    assert having(kinds, "steps_lo", 0) == ["ordinary", "plain", "infoard"]


def test_added_terms_and_averages_are_timed_alone():
    kinds = bench.kinds_of_step(I.Config(plus="igdm,saad_c:0.3", ema=0.9).resolved())
    assert list(kinds)[4:] == ["igdm", "saad_c:0.3", "ema"]
    assert having(kinds, "plus", "igdm") == ["igdm"]
    assert having(kinds, "plus", "saad_c:0.3") == ["saad_c:0.3"]
    assert having(kinds, "ema", 0.9) == ["ema"]
    assert having(kinds, "infoard") == ["infoard", "schedule"]


def test_what_cannot_be_lifted_is_timed_without():
    kinds = bench.kinds_of_step(I.Config(framework="natural").resolved())
    assert list(kinds) == ["ordinary", "plain"]


def test_radii_by_distance_are_timed_without_a_schedule():
    kinds = bench.kinds_of_step(I.Config(asa="distance", mim="off").resolved())
    assert list(kinds) == ["ordinary", "plain", "infoard"]


def test_a_schedule_begins_with_one_step_unless_told_otherwise():
    kinds = bench.kinds_of_step(I.Config().resolved())
    assert having(kinds, "steps_lo", 1) == ["schedule"]


def test_effects_take_one_thing_away():
    cfg = I.Config(compile=False, amp="bf16", steps_lo=1).resolved()
    kinds = bench.kinds_without(cfg)
    assert list(kinds) == ["ordinary", "plain", "fp32", "eager", "unfrozen", "nchw", "compiled"]
    assert having(kinds, "amp", "off") == ["ordinary", "fp32"]
    assert having(kinds, "unfrozen") == ["ordinary", "unfrozen"]
    assert having(kinds, "nchw") == ["ordinary", "nchw"]
    assert having(kinds, "fast", False) == ["eager", "unfrozen"]
    assert having(kinds, "compile") == ["compiled"]
    assert having(kinds, "infoard") == []
    assert having(kinds, "steps_lo", 0) == list(kinds)


@given(st.integers(2, 300), st.integers(1, 30), st.integers(1, 8))
def test_sizes_are_around_those_asked_for(batch, steps, ranks):
    cfg = I.Config(batch_size=max(batch, ranks), steps=steps).resolved()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "world", lambda: (0, ranks))
        kinds = bench.kinds_of_size(cfg)
    batches = []
    counts = []
    for name, kind in kinds.items():
        if name.startswith("batch"):
            assert name == f"batch {kind.cfg.batch_size}"
            assert kind.cfg.steps == steps
            batches.append(kind.cfg.batch_size)
        else:
            assert name == f"{kind.cfg.steps} steps"
            assert kind.cfg.batch_size == cfg.batch_size
            counts.append(kind.cfg.steps)
    for sizes, asked in ((batches, cfg.batch_size), (counts, steps)):
        assert sizes == sorted(set(sizes))
        assert {asked, 2 * asked} <= set(sizes)
    assert batches[0] >= max(2, ranks)
    assert counts[0] == 1


@each("ranks, rank", [(1, 0), (3, 2)])
def test_a_timed_step_is_the_first_of_a_training(ranks, rank, monkeypatch, tmp_path):
    calls = []

    def note(run, rows, share):
        calls.append((rows.tolist(), share, run.at.sums))
        raise StopIteration

    monkeypatch.setattr(I, "train_step", note)
    work = a_bench(framework="at", infoard=False)
    other = a_bench(framework="at", infoard=False)
    for run in (work.run, other.run):
        run.rank, run.ranks = rank, ranks
    with pytest.raises(StopIteration):
        work.make_step()
    with pytest.raises(StopIteration):
        I.fit(other.run, tmp_path)
    assert calls[0] == calls[1]
    assert len(calls[0][0]) == 16 // ranks


@each("framework", ["rslad", "adaad"])
@each("infoard", [False, True])
def test_half_precision_teaches_the_same(framework, infoard):
    """bf16 keeps 8 bits: each product is off by up to 0.4%, a sum of many by less."""
    how = {"framework": framework, "infoard": infoard}
    start = learned_by(a_bench(**how, lr=0.0))
    full = learned_by(a_bench(**how, amp="off")) - start
    half = learned_by(a_bench(**how, amp="bf16")) - start
    assert F.cosine_similarity(full, half, dim=0) > 0.99
    near(half.norm(), full.norm(), 0.02)


def test_compiled_steps_hear_their_own_hooks(monkeypatch):
    """What was compiled of a net without InfoARD's hooks must not serve one with them, and steps of
    several frameworks in one process must all be compiled.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    usual = {"skip_nnmodule_hook_guards": True, "recompile_limit": 8}
    kept = []  # dynamo forgets what it has compiled of a net that is gone
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, **usual):
        for framework in ("rslad", "adaad", "trades"):
            for kind in ({"infoard": False}, {"infoard": True}, {"steps_lo": 1}):
                how = {"framework": framework, **kind}
                kept.append(a_bench(**how, compile=True))
                near(learned_by(kept[-1]), learned_by(a_bench(**how)), 1e-6)
    torch._dynamo.reset()


# ==== 4. Measuring ================================================================================


def timed(images: int, seconds: list[float]) -> bench.Bench:
    """A Bench that has been timed already."""
    work = a_bench(framework="at", infoard=False, batch_size=images)
    work.seconds = seconds
    return work


def test_ratios_are_those_of_medians_per_image():
    benches = {
        "ordinary": timed(8, [9.0, 4.0, 1.0]),
        "plain": timed(8, [2.0, 2.0, 7.0]),
        "double": timed(16, [3.0]),
    }
    rows = {"ordinary": {"mib": 30.0}, "plain": {"mib": 10.0}, "double": {"mib": 5.0}}
    bench.add_ratios(rows, benches)
    assert rows == {
        "ordinary": {"mib": 30.0, "faster": 1.0, "cost": 2.0, "memory": 3.0},
        "plain": {"mib": 10.0, "faster": 2.0, "cost": 1.0, "memory": 1.0},
        "double": {"mib": 5.0, "faster": 8 / 3, "cost": 0.75, "memory": 0.5},
    }


def test_kinds_are_timed_in_turn():
    order = []

    class Noted:
        def __init__(self, name):
            self.name = name
            self.seconds = []

        def step(self):
            order.append(self.name)
            return 1.0

    benches = [Noted("a"), Noted("b")]
    bench.time_in_turn(benches, 3)
    assert order == ["a", "b"] * 3
    for work in benches:
        assert work.seconds == [1.0, 1.0, 1.0]


def test_counting_leaves_compiled_code_aside():
    work = a_bench(framework="at", infoard=False)
    work.run.forward = forward = nn.Identity()  # as if it were compiled
    found = work.count()
    assert work.run.forward is forward
    other = a_bench(framework="at", infoard=False).count()
    assert found == other and found["flops"] > 0


# ==== 5. The table ================================================================================


def test_a_table_has_the_columns_that_all_rows_have():
    rows = {
        "one": {"ms": 12.345, "images_per_s": 8.25, "share": 0.5, "seconds": [1.0], "cost": 2.0},
        "two": {"ms": 1.0, "images_per_s": 80.0, "share": 0.25},
    }
    lines = bench.costs(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["step", "ms", "images/s", "share of peak"]
    assert cells[2:] == [["one", "12", "8.2", "50%"], ["two", "1", "80.0", "25%"]]


def test_rounds_that_scatter_are_told():
    quiet = {"plain": {"seconds": [1.0, 1.1, 1.2]}, "infoard": {"seconds": [2.0, 2.0, 2.5]}}
    assert bench.about_scatter(quiet) == []
    busy = quiet | {"igdm": {"seconds": [1.0, 2.0, 3.0]}}
    (line,) = bench.about_scatter(busy)
    assert line.startswith("warning: of igdm the slowest round took 100% of the median more")


@each("folder, table", shown("costs "))
def test_costs_on_the_pages_are_generated_from_results(folder, table):
    content = json.loads((ROOT / folder / "bench.json").read_text())
    assert bench.costs(content["rows"]) == table


def test_pages_show_what_every_command_measures():
    folders = {Path(folder).name for folder, _ in shown("costs ")}
    assert folders == {"rslad", "all", "effects", "growth", "plus", "plus_adaad", "distance"}


# ==== 6. Commands =================================================================================


@pytest.fixture
def peaks(monkeypatch):
    """The peaks that are measured, without measuring them."""
    known = {torch.float32: 2e10, torch.bfloat16: 3e10}
    monkeypatch.setattr(bench, "peak", lambda device, dtype: known[dtype])
    return known


def rows_in(folder: Path) -> dict[str, dict]:
    """The rows of bench.json."""
    return json.loads((folder / "bench.json").read_text())["rows"]


def test_bench_measures_every_kind_of_step(tmp_path, peaks, capsys):
    options = {"framework": "rslad,mtard", "amp": "bf16", "out": str(tmp_path)}
    bench.run_bench(rounds=1, **TOY, **options)
    kinds = ["ordinary", "plain", "infoard", "schedule"]
    rows = rows_in(tmp_path)
    assert list(rows) == [f"{name}/{kind}" for name in ("rslad", "mtard") for kind in kinds]
    flops = [rows[f"rslad/{kind}"]["flops"] for kind in kinds]
    assert flops[0] == flops[1] <= flops[2] and flops[3] < flops[1]
    for name, row in rows.items():
        dtype = torch.float32 if name.endswith("ordinary") else torch.bfloat16
        near(row["images_per_s"], 8000 / row["ms"])
        near(row["seconds"], torch.tensor([row["ms"] / 1000]))
        near(row["share"], row["flops"] / row["ms"] * 1000 / peaks[dtype])
        assert 0 < row["mib"] < 100
    ordinary, plain = rows["rslad/ordinary"], rows["rslad/plain"]
    assert plain["faster"] == ordinary["ms"] / plain["ms"]
    assert ordinary["faster"] == rows["mtard/plain"]["cost"] == 1

    about = json.loads((tmp_path / "bench.json").read_text())["about"]
    told = capsys.readouterr().out
    assert bench.costs(rows) in told and about["machine"] in told and "steps: 4" in told
    expected = {"student": "tiny", "batch_size": 8, "steps": 4, "rounds": 1, "compiled": False}
    expected["precision"] = {"ordinary": "fp32"} | dict.fromkeys(kinds[1:], "bf16")
    assert {name: about[name] for name in expected} == expected
    assert about["peak"] == {
        "torch.float32": "0.02 TFLOP/s",
        "torch.bfloat16": "0.03 TFLOP/s",
    }


def test_growth_in_operations_is_linear_in_batch_and_steps(tmp_path, peaks, capsys):
    bench.run_growth(rounds=1, out=str(tmp_path), amp="off", **TOY)
    rows = rows_in(tmp_path)
    flops = {name.removeprefix("rslad/"): row["flops"] for name, row in rows.items()}
    batches = [f"batch {n}" for n in (2, 4, 8, 16)]
    assert list(flops) == [*batches, *(f"{n} steps" for n in (1, 2, 4, 8))]
    for n in (4, 8, 16):  # score matrices grow with the square
        more = flops[f"batch {n}"] - n * flops["batch 2"] / 2
        assert 0 <= more < 0.02 * flops[f"batch {n}"]
    per_step = flops["2 steps"] - flops["1 steps"]
    for n in (4, 8):
        assert flops[f"{n} steps"] - flops["1 steps"] == (n - 1) * per_step
    assert rows["rslad/batch 16"]["images_per_s"] > 0
    assert "plain" not in capsys.readouterr().out


def test_effects_are_those_of_one_framework(tmp_path, peaks, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net: net)
    bench.run_effects(rounds=1, framework="at", amp="bf16", out=str(tmp_path), **TOY)
    rows = rows_in(tmp_path)
    kinds = ["ordinary", "plain", "fp32", "eager", "unfrozen", "nchw", "compiled"]
    assert list(rows) == [f"at/{kind}" for kind in kinds]
    assert len({row["flops"] for row in rows.values()}) == 1  # no effect is less work


def test_what_infoard_lifts_is_timed_unless_told_otherwise(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "time_kinds", lambda kinds, rounds, names, given: seen.append(names))
    lifted = "at,trades,ard,rslad,adaad,akd,iad,adaiad,mtard,bmtard,absld,adr,adr_trades,igdm,saad"
    for verb in ("bench", "effects", "growth"):
        assert I.main([verb, "--out", str(tmp_path)]) == 0
    assert I.main(["bench", "--framework", "at,ard"]) == 0
    assert seen == [lifted, "rslad", "rslad", "at,ard"]


def test_the_command_line_takes_the_options_of_a_training(tmp_path, peaks, capsys):
    words = ["--dataset", "shapes", "--batch-size", "4", "--steps", "2", "--device", "cpu"]
    words += ["--image-size", "16", "--ema", "0.9", "--out", str(tmp_path)]
    assert I.main(["bench", "--framework", "ard", *words]) == 0
    assert len(rows_in(tmp_path)["ard/plain"]["seconds"]) == 5
    told = capsys.readouterr().out
    assert f"in {tmp_path}: bench.json" in told and "teacher: tiny_wide" in told


QUICK = "--student tiny --teacher-arch tiny --batch-size 4 --steps 1 --device cpu"


@each(
    "line, why",
    [
        ("bench --framework rslda", "choose from .*rslad"),
        ("bench --device nowhere", "--device"),
        ("bench --batch-size 1", "--batch-size"),
        ("effects --student resnet19", "resnet18"),
        ("growth --rounds 3", "rounds"),
        (f"bench --framework rslad,igdm --plus igdm {QUICK}", "has it already"),
        (f"bench --framework rslad, {QUICK}", "unknown framework ''"),
        (f"bench --framework rslad --ema-ramp {QUICK}", "add --ema"),
        ("growth --framework namid --student tiny --teacher-arch tiny", "bench trains none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(line, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert I.main(line.split()) == 2
    printed = capsys.readouterr()
    told = printed.err
    assert told.startswith("infoard: error: ") and told.count("\n") == 1
    assert re.search(why, told) and " ms" not in printed.out  # nothing was timed, to be lost


def test_fewer_images_than_ranks_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(I, "world", lambda: (0, 3))
    assert I.main(["bench", "--batch-size", "2", "--device", "cpu"]) == 2
    assert "at least 3" in capsys.readouterr().err
