"""recipes.py: the runs of each experiment as settings, the runner with a stub of infoard.py, and
the scripts around it: reproduce.sh and the tables of results/evidence/search.py.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import infoard as I
from companions import bench, cli, evaluation, plus, tables
from companions import recipes as R
from test_infoard import ROOT, each, forked, near, one_line

SCALES = [("smoke", 1, 2), ("cpu", 1, 2), ("gpu", 1, 1), ("paper", 5, 3)]


# ==== 1. The runs as settings =====================================================================


by_framework = functools.cache(cli.by_framework)


@functools.cache
def parsed(words):
    """What infoard.py makes of a line of options; line and defaults of --help are read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "by_framework", by_framework)
        return I.Config(**cli.parse("train", list(words)))


def settings_of(words):
    """What infoard.py makes of options."""
    return parsed(tuple(words))


def settings_by_name(runs, folder):
    """{name: settings}, a name such as T1/rslad/plain/s0."""
    return {str(Path(run.out).relative_to(folder)): settings_of(run.words) for run in runs}


def differing(one, other):
    """The names of the settings in which two runs differ."""
    names = [f.name for f in dataclasses.fields(one)]
    return {name for name in names if getattr(one, name) != getattr(other, name)}


@each("scale, blocks, seeds", SCALES)
def test_every_cell_of_the_tables_is_a_run_of_its_own(scale, blocks, seeds):
    runs = R.table_runs(scale, ["--epochs", "3", "--data-dir", "/a b"])
    cells = settings_by_name(runs, f"runs/tables/{scale}")
    frameworks, parts, namid, mid, igdm = 9, 9, 4, 4, 0
    if scale == "paper":
        frameworks, igdm = 9 + 6, 2 * 7
    rows = 2 * frameworks + parts + namid + mid + igdm
    assert len(runs) == len(cells) == blocks * seeds * rows
    for name, cfg in cells.items():
        assert cfg.epochs == 3 and cfg.data_dir == "/a b"  # the user's options win
        assert cfg.out == f"runs/tables/{scale}/{name}" and name.endswith(f"/s{cfg.seed}")


@each("scale, blocks, seeds", SCALES)
def test_t1_has_every_framework_plain_and_lifted(scale, blocks, seeds):
    runs = [run for run in R.table_runs(scale) if "/T1/" in run.out]
    pairs = []
    for run in runs:
        cfg = settings_of(run.words).resolved()
        assert run.out.endswith(
            f"/{cfg.framework}/{'infoard' if cfg.infoard else 'plain'}/s{cfg.seed}"
        )
        pairs.append((cfg.framework, cfg.infoard))
    names = "at trades ard rslad iad adaad mtard igdm saad".split()
    if scale == "paper":
        names += "akd adaiad bmtard absld adr adr_trades".split()
    for name in names:
        assert pairs.count((name, True)) == pairs.count((name, False)) == blocks * seeds
    assert len(pairs) == 2 * len(names) * blocks * seeds


@each("scale", R.SCALES)
def test_t2_differs_from_lifted_rslad_in_its_own_part_only(scale):
    cells = settings_by_name(R.table_runs(scale), f"runs/tables/{scale}")
    seen = 0
    for name, cfg in cells.items():
        block, table, rest = name.rpartition("T2/")
        if table:
            seed = rest.split("/")[-1]
            whole = cells[f"{block}T1/rslad/infoard/{seed}"]
            part = {"asa", "mim", "w_feat", "w_att", "w_rel", "steps_lo"}
            assert {"out"} < differing(cfg, whole) <= {"out"} | part, name
            seen += 1
    scale = R.SCALES[scale]
    assert seen == len(R.T2) * len(scale.blocks) * len(scale.seeds)


ZHANG, CHEN = "Zhang2019Theoretically", "Chen2021LTD_WRN34_10"
CHEN20, GOWAL = "Chen2021LTD_WRN34_20", "Gowal2021Improving_28_10_ddpm_100m"


@dataclasses.dataclass
class Fact:
    """What a paper's row must hold, and where it was read. teacher: on CIFAR-10; mean: whether KL
    is divided by the number of classes there; more: further settings, on all data sets.
    """

    source: str
    epochs: int
    drops: str
    decay: float
    teacher: str = ZHANG
    mean: bool = False
    more: dict = dataclasses.field(default_factory=dict)


LONG = (300, "215,260,285", 2e-4)
USUAL = (200, "100,150", 5e-4)
FACTS = {
    "mtard": Fact("released code, mtard_resnet18_cifar10.py", *LONG, mean=True),
    "at": Fact("AdaAD's released code, README: Plain_Madry", 110, "100,105", 5e-4),
    "trades": Fact("released code: lr/10 if epoch >= 75, from 1", 76, "74", 2e-4),
    "ard": Fact("released code: lr is local, 0.01 again at 150", 200, "100", 2e-4, mean=True),
    "rslad": Fact("released code", *LONG, mean=True, more={"alpha": 5 / 6}),
    "iad": Fact("released code, as ARD's; its teacher: a ResNet-18 by AT", 200, "100", 2e-4),
    "adaad": Fact("released code", *USUAL, CHEN20, mean=True, more={"alpha": 1}),
    "igdm": Fact("2312.03286, tables 17 and 18", *USUAL, CHEN),
    "saad": Fact("2512.10275; 2e-4 in its code", *USUAL, GOWAL, more={"beta": 0}),
    "akd": Fact("2312.03286, which ran it; alpha is ours", *USUAL, CHEN, more={"alpha": 0.5}),
    "adaiad": Fact("AdaAD's released code: AdaAD_with_IAD1", *USUAL, CHEN20),
    "bmtard": Fact("released code, MTARD-extension", *LONG, mean=True),
    "absld": Fact("released code, resnet18_absld_cifar10.py", *LONG, mean=True),
    "adr": Fact("released code, config/*/resnet18_pgd_sgd_adr.gin", *USUAL),
    "adr_trades": Fact("released code, config/*/resnet18_trades_sgd_adr.gin", *USUAL),
}
FACTS["trades"].more = {"beta": 6}
FACTS["ard"].more = {"alpha": 1, "temperature": 30}
FACTS["iad"].more = {"beta": 0.1, "temperature": 1}
FACTS["adaiad"].more = {"beta": 0.1, "temperature": 30}
FACTS["bmtard"].more = {"temperature_rate": 0.001}
FACTS["absld"].more = {"alpha": 5 / 6, "temperature_rate": 0.1}
FACTS["adr"].more = {"adr_decay": 0.995}
FACTS["adr_trades"].more = {"adr_decay": 0.995, "beta": 6}
OF_ADR = {  # weight of the average's label and its temperature, at the start and at the end
    "cifar10": {"weight": (0.7, 0.95), "tau": (2.5, 2.0)},
    "cifar100": {"weight": (0.7, 0.95), "tau": (1.5, 1.0)},
    "tinyimagenet": {"weight": (0.5, 0.9), "tau": (2.0, 1.5)},
}
ALPHAS = {"igdm": (5, 15, 10), "saad": (1, 20, 10)}  # CIFAR-10, CIFAR-100, Tiny-ImageNet
DATASETS = ("cifar10", "cifar100", "tinyimagenet")


@each("framework", FACTS)
def test_papers_settings_are_those_of_the_papers(framework):
    cells = settings_by_name(R.table_runs("paper"), "runs/tables/paper")
    fact = FACTS[framework]
    for place, dataset in enumerate(DATASETS):
        cfg = cells[f"{dataset}-resnet18/T1/{framework}/plain/s0"].resolved()
        cifar10 = dataset == "cifar10"
        assert cfg.kl_reduction == ("mean" if fact.mean and cifar10 else "batchmean")
        facts = dict(fact.more)
        if framework in ALPHAS:
            facts["alpha"] = ALPHAS[framework][place]
        if framework.startswith("adr"):
            adr = OF_ADR[dataset]
            facts.update(adr_weight_lo=adr["weight"][0], adr_weight_hi=adr["weight"][1])
            facts.update(adr_tau_hi=adr["tau"][0], adr_tau_lo=adr["tau"][1])
        trained = (fact.epochs, fact.drops)
        if framework.startswith("adr") and dataset == "tinyimagenet":
            trained = (80, "40,60")
        assert (cfg.epochs, cfg.schedule, cfg.weight_decay) == (*trained, fact.decay)
        for name, value in facts.items():
            found = cfg.own[name] if name in cfg.own else getattr(cfg, name)
            assert found == pytest.approx(value, abs=1e-6), name
        defaults = I.get_framework(framework).defaults
        for name in ("alpha", "beta", "temperature"):  # none is read that no fact is known of
            assert name not in defaults or name in facts, name
    cfg = cells[f"cifar10-resnet18/T1/{framework}/plain/s0"]
    assert cfg.teacher == f"robustbench:{fact.teacher}" and fact.source


def test_facts_are_known_of_every_row_of_the_papers():
    assert [paper.framework for paper in [*R.PAPERS, *R.LATER]] == list(FACTS)
    others = {"natural", "estimators", "namid", "namid_trades", "autoencoder", "mid"}
    assert FACTS.keys() == I.FRAMEWORKS.keys() - others - {"mid_transfer"}


def test_teachers_and_scale_of_kl_of_the_papers_hold_on_cifar10_only():
    cells = settings_by_name(R.table_runs("paper"), "runs/tables/paper")
    assert {cfg.kl_reduction for cfg in cells.values() if cfg.dataset != "cifar10"} == {"batchmean"}
    for name, cfg in cells.items():
        if "/T4/" in name or "/T5/" in name or cfg.dataset == "tinyimagenet":
            assert cfg.teacher is None, name  # these train their own
        elif cfg.dataset == "cifar100":
            assert cfg.teacher == f"robustbench:{CHEN}", name


def test_t6_is_igdm_on_each_base_of_its_paper():
    """Base and base + IGDM, by the settings of 2312.03286: 200 epochs, RSLAD 300, 5e-4, LTD."""
    assert list(R.T6_BASES) == [*plus.BASES[:5], "rslad", "adaad"]
    cells = settings_by_name(R.table_runs("paper"), "runs/tables/paper")
    of_cifar10 = {name for name in cells if name.startswith("cifar10-resnet18/T6/")}
    assert len(of_cifar10) == 3 * 2 * len(R.T6_BASES)
    for name in of_cifar10:
        cfg = cells[name].resolved()
        base, kind, _ = name.split("/")[2:]
        assert cfg.framework == base and not cfg.infoard and cfg.kl_reduction == "batchmean"
        assert cfg.plus == {"plain": "", "igdm": "igdm"}[kind]
        long = base == "rslad"
        assert (cfg.epochs, cfg.schedule) == ((300, "215,260,285") if long else (200, "100,150"))
        assert cfg.weight_decay == 5e-4 and cfg.teacher == f"robustbench:{CHEN}"


def test_nets_that_all_seeds_share_are_made_first_and_one_by_one():
    """Two runs at once would make the same teacher twice, in one folder."""
    for scale in ("smoke", "cpu"):
        runs = R.table_runs(scale)
        early = {run.out.split(f"{scale}/")[1]: run.stage for run in runs if run.stage != R.REST}
        assert early == {
            "T1/mtard/plain/s0": R.SHARED,  # the robust and the natural teacher
            "T4/at/namid/s0": R.SHARED,  # the AT net
            "T5/mid/s0": R.SHARED_LATER,
            "T4/at/eq5/s0": R.SHARED_LATER,
        }
    for scale in ("gpu", "paper"):  # one run at a time
        assert {run.stage for run in R.table_runs(scale)} == {R.REST}


@pytest.fixture(scope="module")
def evidence():
    return settings_by_name(R.evidence_runs(["--data-dir", "/a b"]), "runs/evidence")


def test_evidence_has_its_grid(evidence):
    teachers = [name for name in evidence if name.startswith("teachers/")]
    controls, frameworks, radii, longer, taught = 14, 8 * 2, 3, 2, 3 * 2
    adaad, twelve, size32 = 3, 2 * 2, 2
    students = controls + frameworks + radii + longer + taught + adaad + twelve + size32
    assert len(teachers) == 6 and list(evidence)[:6] == teachers
    assert len(evidence) == len(R.evidence_runs()) == 6 + 3 * students + 3 * adaad
    seeds = {}
    for name, cfg in evidence.items():
        cell, seed = name.rsplit("/s", 1)
        assert cfg.seed == int(seed) and cfg.data_dir == "/a b"
        seeds.setdefault(cell, []).append(cfg.seed)
    for cell, found in seeds.items():
        if cell.startswith("teachers/"):
            assert found == [77]
        elif cell.startswith("adaad/"):
            assert found == [0, 1, 2, 3, 4, 5]
        else:
            assert found == [0, 1, 2]


def test_evidence_is_lifted_where_it_says_so(evidence):
    radii = {"radii2": 2, "radii3": 3, "longer": None}
    for name, cfg in evidence.items():
        group, cell = name.split("/")[:2]
        plain = "plain" in name or "/longer/" in name or group == "teachers"
        assert cfg.resolved().infoard != plain, name
        if group == "T1":
            kind = name.split("/")[2]
            assert cfg.framework == cell and cfg.lam_hi == radii.get(kind, 1.5), name
        if group == "longer":
            assert cfg.epochs == 12 and cfg.framework == cell
        assert cfg.image_size == (32 if "32" in name else 16)


def test_evidence_takes_teachers_that_it_has_made(evidence):
    made = {cfg.out for name, cfg in evidence.items() if name.startswith("teachers/")}
    for name, cfg in evidence.items():
        group, cell = name.split("/")[:2]
        if group == "T1" and name.split("/")[2] == "longer":
            assert cfg.epochs == 6 and cfg.teacher is None  # which is what they lack
        elif group != "teachers":
            teacher = cell if group == "teacher" else "strong"
            if group == "size32":
                teacher = "strong32"
            assert cfg.teacher == f"runs/evidence/teachers/{teacher}/s77/last.pt"
            assert cfg.teacher.removesuffix("/last.pt") in made
            assert cfg.teacher_nat == "runs/evidence/teachers/natural/s77/last.pt"


def test_first_part_of_evidence_has_its_grid():
    cells = settings_by_name(R.first_runs(), "runs/evidence")
    rows = ["plain", "infoard", "asa", "uniform", "features"]
    names = [f"first/{row}/s{seed}" for seed in range(3) for row in rows]
    assert list(cells) == ["teachers/first/s77", *names]
    teacher = cells.pop("teachers/first/s77")
    assert not teacher.infoard and teacher.framework == "trades"
    for name, cfg in cells.items():
        assert cfg.teacher == f"{teacher.out}/best.pt" and cfg.epochs == 5 and cfg.image_size == 16
        assert cfg.infoard == ("plain" not in name)


def test_lite_has_its_grid():
    cells = settings_by_name(R.lite_runs(), "runs/lite")
    assert len(cells) == 1 + 3 * 12 and list(cells)[0] == "teacher/s0"
    for name, cfg in cells.items():
        if not name.startswith("teacher"):
            assert cfg.teacher == "runs/lite/teacher/s0/best.pt"
            assert cfg.infoard == ("plain" not in name)
            steps = name.split("/")[0].removeprefix("plain").removeprefix("k").removesuffix("fp32")
            assert steps == f"{cfg.steps}-{cfg.steps_lo}" or steps == str(cfg.steps)
            assert ("fp32" in name) == (cfg.amp == "off")


def test_evidence_on_a_gpu_has_its_grid():
    runs = R.gpu_evidence_runs(["--data-dir", "/a b"])
    cells = settings_by_name(runs, R.GPU_EVIDENCE)
    assert runs[0].stage == R.NEEDED and len(cells) == len(runs) == 1 + 3 * (6 + 4)
    teacher = cells.pop("teacher/s77")
    assert teacher.framework == "trades" and not teacher.infoard and teacher.student == "wrn_34_10"
    for name, cfg in cells.items():
        assert cfg.teacher == f"{R.GPU_EVIDENCE}/teacher/s77/last.pt" and cfg.subset == 0
        assert cfg.framework == ("adaad" if name.startswith("adaad/") else "rslad")
        assert cfg.student == "resnet18" and cfg.data_dir == "/a b" and cfg.device == "cuda"
    for comparison in R.GPU_COMPARISONS:
        assert f"{comparison}/plain/s0" in cells and f"{comparison}/uniform/s2" in cells


def test_steps_cost_what_was_measured():
    found = json.loads((ROOT / "results/gpu/fast/step.json").read_text())
    for name in ("trades", "rslad", "adaad"):
        row = found[f"bench {name} 128"]
        assert R.STEP_MS[name] == (row["plain"]["ms"], row["infoard"]["ms"])
        near(R.step_ms(name, False), row["plain"]["ms"])
        near(R.step_ms(name, True), row["infoard"]["ms"])
    first = json.loads((ROOT / "results/gpu/first/bench_128.json").read_text())
    rows = [first["rslad/plain"]["ms"], first["rslad/infoard"]["ms"]]
    assert list(R.STEP_MS["rslad, not replayed"]) == rows


@each("framework", ["rslad"])
def test_operations_are_those_that_bench_counts(framework):
    data = bench.random_data(6, 32)
    teacher = I.build_model("wrn_34_10").eval().requires_grad_(False)
    cfg = I.Config(framework=framework, dataset="cifar10", batch_size=2, val_size=0, amp="off")
    cfg = dataclasses.replace(cfg, infoard=False, steps=2, device="cpu").resolved()
    run = bench.Bench(bench.Kind(cfg), teacher, data, torch.device("cpu"))
    attack = 8 * 2 * 0.5554  # GFLOP of eight more steps, forward and back, of 0.555 GMAC each
    near(run.count()["flops"] / 2e9 + 2 * attack, R.OPERATIONS[framework][0], 0.02)


def test_hours_are_counted_by_hand():
    words = ("--framework", "rslad", "--no-infoard", "--epochs", "3", "--epochs", "2")
    run = R.Run("x/T1/a", words)
    epoch = 50_000 / 128 * 29.92 / 1000 + R.VALIDATION_S
    near(R.hours(run) * 3600, 2 * epoch + R.START_S + 2 * 10_000 * 0.022, 1e-6)
    quick = R.Run("x/T1/b", (*words, "--subset", "6400", "--eval-subset", "100", "--val-size", "0"))
    near(R.hours(quick) * 3600, 2 * 50 * 29.92 / 1000 + R.START_S + 100 * 0.022, 1e-6)
    assert R.hours(R.Run("x/T4/c", ("--framework", "namid"))) is None
    costs = R.cost([run, quick, R.Run("x/T4/c", ("--framework", "mid")), run], "x")
    assert costs == {"T1": 2 * R.hours(run) + R.hours(quick), "T4": None}


def test_t1_fits_a_night_on_one_gpu_and_so_does_its_evidence(capsys):
    runs = R.table_runs("gpu")
    first = [run for run in runs if "/T1/" in run.out]
    assert runs[: len(first)] == first  # before all that is not counted
    for run in first:
        cfg = settings_of(run.words).resolved()
        usual = (cfg.student, cfg.teacher_arch, cfg.steps, cfg.batch_size, cfg.subset)
        assert usual == ("resnet18", "wrn_34_10", 10, 128, 0)  # what was measured
    costs = R.cost(runs, "runs/tables/gpu")
    assert 5 < costs["T1"] + R.teachers_hours(runs) < 10
    assert costs["T4"] is None and costs["T5"] is None
    evidence = R.cost(R.gpu_evidence_runs(), R.GPU_EVIDENCE)
    assert 5 < sum(evidence.values()) < 10
    R.print_cost(costs)
    shown = capsys.readouterr().out
    assert f"T1: {costs['T1']:.1f}" in shown and "T4: not measured" in shown
    page = (ROOT / "docs/usage.md").read_text()
    assert f"about {costs['T1'] + R.teachers_hours(runs):.0f} hours for T1" in page
    assert f"{sum(evidence.values()):.0f} hours for `evidence gpu`" in page


def test_all_runs_have_settings_that_fit_together():
    runs = R.evidence_runs() + R.first_runs() + R.lite_runs()
    for scale in R.SCALES:
        runs += R.table_runs(scale)
    for run in runs:
        assert settings_of(run.words).resolved().out == run.out


@each("pattern, images, attacks", R.LOOKS)
def test_looks_ask_for_attacks_that_there_are(pattern, images, attacks):
    for name in attacks.split(","):
        assert name in I.ATTACKS or name in ("clean", "apgd")


# ==== 2. The runner ===============================================================================
# The stub stands where infoard.py would: it keeps a journal, writes what a finished run leaves, and
# fails, is killed or takes its time where the environment says so.

STUB = """
import hashlib, json, os, signal, sys, time
from pathlib import Path


def write(event):
    line = {"event": event, "words": sys.argv[1:], "threads": os.environ.get("OMP_NUM_THREADS"),
            "spin": os.environ.get("GOMP_SPINCOUNT")}
    with open("journal", "a") as journal:
        journal.write(json.dumps(line) + "\\n")


def stop(*_):
    time.sleep(0.5)
    write("saved")
    os._exit(int(os.environ["STATUS"]))


def asked(name):
    return name in os.environ and os.environ[name] in " ".join(sys.argv)


signal.signal(signal.SIGTERM, stop)
write("begin")
if asked("FAIL"):
    sys.exit(2)
if asked("KILL"):
    os.kill(os.getpid(), signal.SIGKILL)
if asked("SLOW"):
    time.sleep(30)
time.sleep(float(os.environ.get("PAUSE", "0")))
if "--out" in sys.argv and "bench" not in sys.argv:
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    name = "eval.json" if "eval" in sys.argv else "results.json"
    source = hashlib.sha256(Path("infoard.py").read_bytes()).hexdigest()
    if name == "results.json":
        config = {"argv": sys.argv, "source_sha256": source}
        (out / "config.json").write_text(json.dumps(config))
        (out / "last.pt").write_text("weights")
    (out / name).write_text("{}")
write("end")
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a stub of infoard.py and the published numbers."""
    (tmp_path / "infoard.py").write_text(STUB)
    shutil.copytree(ROOT / "results/published", tmp_path / "results/published")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(R, "TICK", 0.002)
    for name in ("FAIL", "KILL", "SLOW", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def journal():
    """What the stub has written, line by line."""
    path = Path("journal")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def begun():
    """The words of each call, in order."""
    return [line["words"] for line in journal() if line["event"] == "begin"]


def finish(runs):
    """Leaves what these runs would have left."""
    source = hashlib.sha256(STUB.encode()).hexdigest()
    for run in runs:
        folder = Path(run.out)
        folder.mkdir(parents=True)
        argv = ["infoard.py", "--resume", *run.words]
        config = {"argv": argv, "source_sha256": source}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "results.json").write_text("{}")
        (folder / "last.pt").write_text("weights")


def heed_signals():
    """Behind & in a script SIGINT is ignored, under nohup SIGHUP; the runner would leave it so."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def background(*words, before=heed_signals, **env):
    """The runner as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "companions.recipes", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )


def test_tables_run_each_cell_once_and_then_the_tables(desk, capfd):
    assert R.main(["tables", "smoke", "--data-dir", "/a b"]) == 0
    calls = begun()
    expected = [["--resume", *run.words] for run in R.table_runs("smoke", ["--data-dir", "/a b"])]
    assert sorted(calls[:-1]) == sorted(expected)
    assert calls[-1] == ["tables", "runs/tables/smoke"]
    out = capfd.readouterr().out
    assert "70 runs, 0 finished before; 2 at once" in out
    assert "[70 of 70]" in out and out.count(" done in ") == 70


def test_stages_wait_for_each_other_and_workers_are_as_many_as_asked_for(desk, monkeypatch):
    monkeypatch.setenv("PAUSE", "0.3")  # so that runs do meet
    runs = [R.Run(f"runs/{i}", ("--seed", str(i)), stage=i % 3) for i in range(12)]
    R.Runner().work(runs, workers=3)
    stage_of = {run.out: run.stage for run in runs}
    running = []
    most = 0
    for line in journal():
        out = line["words"][2]
        if line["event"] == "begin":
            running.append(out)
            assert len({stage_of[name] for name in running}) == 1
        else:
            running.remove(out)
        most = max(most, len(running))
    assert most == 3 and running == []
    order = [stage_of[words[2]] for words in begun()]
    assert order == sorted(order)


@each("workers, threads", [(1, None), (2, "1")])
def test_workers_share_the_cores(desk, workers, threads, monkeypatch):
    R.Runner().work([R.Run("runs/a", ())], workers)
    assert journal()[0]["threads"] == threads and journal()[0]["spin"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the user's holds
    R.Runner().work([R.Run("runs/b", ())], workers)
    assert journal()[-1]["spin"] == "7"


@each("how, words", [("FAIL", "exit code 2"), ("KILL", "killed by SIGKILL")])
def test_a_failing_cell_does_not_stop_the_others(desk, monkeypatch, capfd, how, words):
    monkeypatch.setenv(how, "T1/ard/plain/s1")
    finish(run for run in R.table_runs("smoke") if "T1/ard" not in run.out)
    assert R.main(["tables", "smoke"]) == 1
    assert len(begun()) == 4 + 1 and begun()[-1][0] == "tables"
    out, error = capfd.readouterr()
    assert words in out and "1 failed" in error
    assert "python infoard.py --resume --out runs/tables/smoke/T1/ard/plain/s1 --seed 1" in error


def test_what_failed_is_tried_again_and_nothing_else(desk, monkeypatch):
    monkeypatch.setenv("FAIL", "T1/ard/plain/s1")
    finish(run for run in R.table_runs("smoke") if "T1/ard" not in run.out)
    R.main(["tables", "smoke"])
    monkeypatch.delenv("FAIL")
    Path("journal").unlink()
    assert R.main(["tables", "smoke"]) == 0
    assert [words[2].removeprefix("runs/tables/smoke/") for words in begun()[:-1]] == [
        "T1/ard/plain/s1"
    ]
    assert len(begun()) == 2


def test_without_its_teacher_nothing_else_is_begun(desk, monkeypatch, capfd):
    monkeypatch.setenv("FAIL", "teacher/s0")
    assert R.main(["lite"]) == 1
    assert len(begun()) == 1 and "36 runs need what failed" in capfd.readouterr().err


def test_a_run_is_finished_only_by_the_same_words_and_the_same_source(desk):
    run = R.Run("runs/a b", ("--seed", "1"))
    assert not R.finished(run)
    R.Runner().work([run])
    assert R.finished(run)
    assert not R.finished(R.Run("runs/a b", ("--seed", "1", "--lr", "0.4")))
    assert not R.finished(R.Run("runs/other", ("--seed", "1")))
    Path("infoard.py").write_text(STUB + "# newer\n")
    assert not R.finished(run)  # other defaults, perhaps: infoard.py is asked
    Path("infoard.py").write_text(STUB)
    assert R.finished(run)
    Path("runs/a b/results.json").unlink()
    assert not R.finished(run)


def stop_while_one_runs(number, status):
    """A runner whose group gets a signal, as at a terminal, while one of its runs takes long;
    returns the runner and what it has printed.
    """
    runner = background("tables", "smoke", SLOW="T1/mtard/infoard/s0", STATUS=status)
    while not any("T1/mtard/infoard/s0" in words[2] for words in begun()):
        assert runner.poll() is None
        time.sleep(0.01)
    os.killpg(runner.pid, number)
    out, _ = runner.communicate(timeout=30)
    return runner, out


@each("status", ["143", "0"])  # 0: of a run that had come to its end
@each("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_runner_waits_until_its_runs_have_saved(desk, number, status):
    runner, out = stop_while_one_runs(number, status)
    assert runner.returncode == 128 + number and "the same command goes on" in out
    assert "Traceback" not in out and "failed" not in out
    events = [line["event"] for line in journal()]
    assert "saved" in events
    assert "begin" not in events[events.index("saved") :]  # and nothing is begun


def test_under_nohup_a_hangup_stops_nothing(desk):
    def ignore_hangups():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    runner = background("evidence", "first", before=ignore_hangups)
    while not begun():
        time.sleep(0.01)
    runner.send_signal(signal.SIGHUP)
    runner.communicate(timeout=60)
    assert runner.returncode == 0


def test_a_stopped_runner_goes_on(desk):
    finish(run for run in R.table_runs("smoke") if "T1/" not in run.out)
    stop_while_one_runs(signal.SIGTERM, "143")
    finished_before = [line["words"][2] for line in journal() if line["event"] == "end"]
    assert R.main(["tables", "smoke"]) == 0
    ended = [line["words"] for line in journal() if line["event"] == "end"]
    assert ended.pop() == ["tables", "runs/tables/smoke"]
    names = [words[2] for words in ended]
    cells = [run.out for run in R.table_runs("smoke") if "T1/" in run.out]
    assert sorted(names) == sorted(cells)  # each once
    assert names[: len(finished_before)] == finished_before


def test_a_signal_between_two_commands_stops_the_runner(desk, monkeypatch):
    started = []
    monkeypatch.setattr(R, "start", started.append)
    with R.Runner() as runner:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            runner.call("tables", "a")
        with pytest.raises(SystemExit):
            runner.work([R.Run("runs/a", ())])
    assert stopped.value.code == 143 and started == []


def test_the_runner_leaves_signals_as_it_found_them():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with R.Runner() as runner:
        assert signal.getsignal(signal.SIGTERM) == runner.catch
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_progress_says_how_long_it_still_takes(desk, capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(R.time, "time", lambda: now[0])
    runner = R.Runner()
    runner.total, runner.found = 12, 2  # two were finished before and tell nothing of the time
    for i in range(4):
        now[0] = 60.0 * (i + 1)
        runner.end_run(R.Run(f"runs/{i}", ()), 0, 60)
    line = capfd.readouterr().out.splitlines()[-1]
    assert line == "[6 of 12] runs/3: done in 0:01:00; 6 left, 0:04:00 so far, about 0:06:00 still"


# ==== 3. Numbers of others ========================================================================

PUBLISHED = sorted((ROOT / "results/published").rglob("results.json"))


def published_results():
    """(dataset-student, method, source, result) of each."""
    found = []
    for file in PUBLISHED:
        results = json.loads(file.read_text())
        assert results and results.keys() <= {"best", "last"}, file
        found += [(*file.parts[-4:-1], result) for result in results.values()]
    return found


def test_published_numbers_say_where_they_come_from_and_who_the_teacher_was():
    page = (ROOT / "results/published/README.md").read_text()
    sources = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    for folder, method, label, result in published_results():
        assert result["source"] and result["teacher"] and result["n"] == 10_000
        listed = [name for name in sources if label.startswith(name) or folder == name]
        assert listed, f"{label} is not in the table of README"
        base, _, more = method.partition("+")
        alone = base in ("natural", "at", "trades", "adr") and more in ("", "average")
        assert (result["teacher"] == "none") == alone, (folder, method, label)
        assert base in I.FRAMEWORKS or base == "saad_c"
        assert more in ("", "igdm", "saad", "average")
    assert "Not ours" in page


def test_published_numbers_are_accuracies():
    for folder, method, label, result in published_results():
        found = tables.numbers(result)
        assert "aa" in found and found.keys() <= {*tables.COLUMNS}, (folder, method, label)
        assert all(0 <= value <= 100 for value in found.values())
        if method != "natural":  # which no attack leaves anything of
            assert found["aa"] == min(found.values()), (folder, method, label)
        deviations = result.get("sd", {})
        assert deviations.keys() <= found.keys() and all(0 < v < 2 for v in deviations.values())
        assert {*result.get("second_hand", ())} <= {*found, "sd"}


@each("method, aa", [("rslad", 52.21), ("adaad", 53.24), ("igdm", 53.45), ("akd", 50.95)])
def test_the_best_published_teacher_is_the_same_for_every_method(method, aa):
    """2512.10275, table 10: LTD WRN-34-10."""
    found = {}
    for folder, name, _, result in published_results():
        if folder == "cifar10-resnet18-teachers" and name == method:
            found[result["teacher"]] = result["aa"]
    assert len(found) == 10 and max(found, key=found.get) == "LTD WRN-34-10"
    assert found["LTD WRN-34-10"] == aa


def test_published_gains_of_igdm_are_those_of_its_paper():
    """2312.03286: 52.79 -> 54.02 on CIFAR-10 with LTD WRN-34-10, 28.06 -> 30.32 on CIFAR-100."""
    found = {}
    for folder, method, label, result in published_results():
        if label in ("IGDM-paper-LTD-34-10", "IGDM-paper-BDM-28-10"):
            found[folder, label[11:14], method] = result["aa"]
    assert found["cifar10-resnet18", "LTD", "adaad"] == 52.79
    assert found["cifar10-resnet18", "LTD", "igdm"] == 54.02
    assert found["cifar100-resnet18", "BDM", "adaad"] == 28.06
    assert found["cifar100-resnet18", "BDM", "igdm"] == 30.32
    with_term = [key for key in found if key[2].endswith("igdm")]
    assert len(with_term) == 5 * 7
    for folder, teacher, method in with_term:
        base = "adaad" if method == "igdm" else method.removesuffix("+igdm")
        if base not in ("at", "trades"):
            assert found[folder, teacher, method] > found[folder, teacher, base]


# ==== 4. What follows the runs ====================================================================


def test_tables_have_their_shared_cells_and_published_numbers(desk):
    finish(R.table_runs("smoke") + R.table_runs("cpu"))
    assert R.main(["tables", "smoke"]) == R.main(["tables", "cpu"]) == 0
    assert begun() == [["tables", "runs/tables/smoke"], ["tables", "runs/tables/cpu"]]
    folder = Path("runs/tables/smoke")
    for name in ("T2/plain", "T2/infoard", "T4/at/plain", "T4/trades/plain"):
        for seed in (0, 1):
            assert (folder / name / f"s{seed}/results.json").exists()
    assert not (folder / "published").exists()  # other data, other nets
    published = Path("runs/tables/cpu/published")
    assert [path.name for path in published.iterdir()] == ["cifar10-resnet18"]


def test_paper_tables_have_all_published_numbers(desk):
    finish(R.table_runs("paper"))
    assert R.main(["tables", "paper"]) == 0
    names = sorted(path.name for path in Path("runs/tables/paper/published").iterdir())
    assert names == sorted(p.name for p in (ROOT / "results/published").iterdir() if p.is_dir())


def test_what_it_costs_is_said_before_it_begins(desk, capsys):
    assert R.main(["evidence", "gpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("  teacher: 0.6") < shown.index("31 runs, 0 finished before; 1 at once")
    calls = [line["words"] for line in journal() if line["event"] == "begin"]
    assert calls[-2:] == [["compare", f"{R.GPU_EVIDENCE}/{name}"] for name in R.GPU_COMPARISONS]
    assert len(calls) == 31 + 2


def test_evidence_is_copied_looked_at_and_compared(desk):
    finish(R.evidence_runs(["--data-dir", "/a b"]))
    assert R.main(["evidence", "--data-dir", "/a b"]) == 0
    there = Path("runs/evidence")
    for source, target in R.COPIES:
        for seed in range(3):
            assert (there / source / f"s{seed}/last.pt").exists()
            assert (there / target / f"s{seed}/last.pt").exists()
    calls = begun()
    looks = [words for words in calls if words[0] == "eval"]
    subsets = [int(words[words.index("--eval-subset") + 1]) for words in looks]
    t1 = 9 * 2 + 3 + 2  # every framework, larger radii, longer ones; seed 0 of each
    assert subsets == t1 * [500] + 6 * [5000] + 12 * [2000] + 6 * [1000]
    for words in looks:
        assert words[1] == f"{words[words.index('--out') + 1]}/last.pt"
    names = "T1 controls teacher attacks adaad longer size32"
    assert calls[len(looks) :] == [["compare", f"runs/evidence/{name}"] for name in names.split()]

    Path("journal").unlink()
    assert R.main(["evidence", "--data-dir", "/a b"]) == 0
    assert [words[0] for words in begun()] == 7 * ["compare"]  # each look once, each run once


def test_a_look_is_taken_again_when_the_run_is_newer(desk):
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    (folder / "last.pt").write_text("weights")
    runner = R.Runner()
    R.look(runner, folder, 10, "clean")
    R.look(runner, folder, 10, "clean")
    assert begun() == ["eval runs/a/last.pt --out runs/a --eval-subset 10 --attacks clean".split()]
    os.utime(folder / "last.pt", (time.time() + 5, time.time() + 5))
    R.look(runner, folder, 10, "clean")
    assert len(begun()) == 2


def test_first_part_of_evidence_is_compared_and_looks_at_attention(desk):
    finish(R.first_runs())
    assert R.main(["evidence", "first"]) == 0
    assert begun() == [
        ["compare", "runs/evidence/first"],
        ["attention", "runs/evidence/first", "--eval-subset", "2000"],
    ]


def test_a_failing_comparison_does_not_stop_what_follows(desk, monkeypatch, capfd):
    monkeypatch.setenv("FAIL", "compare")
    finish(R.first_runs())
    assert R.main(["evidence", "first"]) == 1
    assert [words[0] for words in begun()] == ["compare", "attention"]
    assert "python infoard.py compare runs/evidence/first" in capfd.readouterr().err


def test_lite_measures_each_row_alone_and_draws_the_curve(desk):
    finish(R.lite_runs(["--data-dir", "/a b"]))
    assert R.main(["lite", "--data-dir", "/a b"]) == 0
    calls = journal()
    benches = [line for line in calls if line["words"][0] == "bench" and line["event"] == "begin"]
    for line, (name, options) in zip(benches, R.STEPS, strict=True):
        words = line["words"]
        assert words[words.index("--out") + 1] == f"runs/lite/{name}"
        assert words[-2:] == ["--data-dir", "/a b"] and options in " ".join(words)
        assert line["threads"] is None  # all of the machine
    events = [line["event"] for line in calls]
    assert events == 13 * ["begin", "end"]  # one after the other
    assert calls[-1]["words"] == ["curve", "runs/lite"]


def train_cell(run, folder, teacher, stop=0):
    """A cell of the smoke tables, smaller still; SIGTERM arrives in step `stop` of its training."""
    name = run.out.removeprefix("runs/tables/smoke/")
    small = {"student": "tiny", "teacher_arch": "tiny", "epochs": 1, "steps": 1, "subset": 60}
    small.update(batch_size=30, val_size=40, eval_subset=20, attacks="clean,fgsm", amp="off")
    small.update(teacher_epochs=1, device="cpu", figures=False, resume=True)
    if "T5/mid" not in name:  # whose teacher has a decoder
        small.update(teacher=teacher)
    small.update(teacher_nat=teacher, out=str(folder / name))
    steps = []
    real = I.train_step

    def train_step(*args):
        real(*args)
        steps.append(args)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "train_step", train_step)
        I.train(dataclasses.replace(settings_of(run.words), **small))
    assert stop == 0, "was not stopped"


def test_smoke_tables_killed_and_restarted_give_the_same_files(tmp_path, monkeypatch):
    """Every kind of cell, in one go or killed in the middle of four of them."""
    data = I.render_shapes(400, 100, size=16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(I.DATASETS, "shapes", lambda data_dir, **options: data)
    monkeypatch.setattr(evaluation, "check_teacher", lambda *args: None)
    torch.save(I.build_model("tiny").state_dict(), "teacher.pt")
    cells = [run for run in R.table_runs("smoke") if run.out.endswith("/s0")]
    for run in cells:
        train_cell(run, Path("whole"), "teacher.pt")

    shutil.copytree("whole", "killed")
    shutil.rmtree("runs")  # nets that the cells have made
    for name in ("T1/mtard/infoard/s0", "T2/student/s0", "T4/at/eq5/s0", "T5/mid/s0"):
        shutil.rmtree(f"killed/{name}")
        (run,) = [run for run in cells if run.out.endswith(name)]
        with pytest.raises(SystemExit):
            train_cell(run, Path("killed"), "teacher.pt", stop=1)
    for run in cells:
        train_cell(run, Path("killed"), "teacher.pt")

    for folder in ("whole", "killed"):
        tables.run_tables(folder)
    for kind in ("md", "tex", "jsonl"):
        whole, killed = (Path(f, f"tables.{kind}").read_text() for f in ("whole", "killed"))
        assert whole == killed.replace("{tab:killed-", "{tab:whole-")  # the labels of LaTeX
    lines = Path("whole/tables.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| T")]
    assert len(rows) == 35 + 4  # MID's cells are transferred, too


# ==== 5. Command line =============================================================================


@each("scale", R.SCALES)
def test_cells_prints_the_runs_as_lines_of_options(scale, capsys):
    assert R.main(["cells", scale, "--data-dir", "/a b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = R.table_runs(scale, ["--data-dir", "/a b"])
    assert [shlex.split(line) for line in lines] == [run.words for run in runs]


EXPERIMENTS = {
    "evidence": R.evidence_runs,
    "evidence first": R.first_runs,
    "evidence gpu": R.gpu_evidence_runs,
    "evidence distance": R.distance_runs,
    "evidence plugins": R.plugin_runs,
    "evidence wider": R.wider_runs,
    "evidence wider32": R.wider32_runs,
    "evidence tuned": R.tuned_runs,
    "lite": R.lite_runs,
}


@each("name", EXPERIMENTS)
def test_a_dry_run_says_how_many_prints_the_cells_and_begins_none(name, desk, capsys):
    extra = ["--data-dir", "/a b"]
    runs = EXPERIMENTS[name](extra)
    assert R.main(["cells", *name.split(), *extra]) == 0
    assert [shlex.split(line) for line in capsys.readouterr().out.splitlines()] == [
        run.words for run in runs
    ]
    assert R.main([*name.split(), "--dry-run", *extra]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{name}: {len(runs)} runs"
    assert len(runs) > 10
    assert [shlex.split(line) for line in lines[-len(runs) :]] == [run.words for run in runs]
    known = "hours on one H100" if name == "evidence gpu" else "was not measured"
    assert known in lines[0] and journal() == []  # nothing is kept at this desk


def test_hours_of_evidence_are_those_of_the_kept_runs(desk, capsys):
    """Two cells were kept, 900 and 1,800 s; the other six of the group count as their mean."""
    for cell, seconds in (("plain/s20", 600), ("plain/s21", 1200), ("ema/s20", 1800)):
        folder = Path("results/evidence/plugins/rslad", cell)
        folder.mkdir(parents=True)
        rows = [{"epoch": 1, "seconds": 5}, {"epoch": 2, "seconds": seconds}]
        (folder / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    costs = R.kept_cost(R.plugin_runs(), f"{R.EVIDENCE}/plugins", workers=2)
    assert list(costs) == ["rslad", "adaad"] and costs["adaad"] is None
    near(costs["rslad"] * 3600, 24 * 1350 / 2)
    finish(R.plugin_runs())
    assert R.main(["evidence", "plugins"]) == 0
    shown = capsys.readouterr().out
    assert "  rslad: 4.5\n  adaad: not measured\n  together: 4.5\n" in shown
    assert shown.index("together") < shown.index("54 runs, 54 finished before")
    evals = [words for words in begun() if words[0] == "eval"]
    on_all = [words for words in evals if words[words.index("--eval-subset") + 1] == "0"]
    assert len(evals) == 54 + 2 * 6 and len(on_all) == 2 * 6  # AdaAD's plain and infoard
    assert {words[3].split("/")[3] for words in on_all} == {"adaad-apgd"}


def test_a_part_that_there_is_not_is_one_line(desk, capsys):
    for words in (["evidence", "plugin"], ["cells", "evidence", "plugin"]):
        assert R.main(words) == 2
        error = capsys.readouterr().err
        parts = "first, gpu, distance, plugins, wider, wider32, tuned"
        assert f"{parts}, not 'plugin'" in error and one_line(error)
    assert journal() == []


@each("words", [["cells"], ["tables"], ["tables", "huge"], ["cells", "--lr"]])
def test_an_unknown_scale_is_one_line(words, capsys):
    assert R.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("SCALE is smoke, cpu, gpu or paper, not '") and one_line(error)


def test_elsewhere_than_in_the_repository_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert R.main(["lite"]) == 2
    error = capsys.readouterr().err
    assert "root of the repository" in error and one_line(error)


def test_without_a_verb_it_says_how_it_is_called(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in ([], ["table"]):
        assert R.main(words) == 2
        assert "recipes tables SCALE" in capsys.readouterr().err


def test_recipes_need_the_standard_library_only():
    code = "import sys, companions.recipes; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_cells_may_be_cut_short():
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m companions.recipes cells paper | head -n 1",
        shell=True,
        executable="bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.stdout.count("\n") == 1


# ==== 6. The scripts around it ====================================================================

PYTHON = """#!/usr/bin/env bash
for word in "$@"; do echo "[$word]"; done >> calls
"""


@pytest.fixture
def script(tmp_path):
    """A copy of reproduce.sh with an interpreter that writes down its words; calls it."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    for name in ("reproduce.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv/installed")
    (tmp_path / "companions").mkdir()
    for name in ("__init__.py", "recipes.py"):
        shutil.copy(ROOT / "companions" / name, tmp_path / "companions")

    def call(*words):
        done = subprocess.run(
            ["bash", str(tmp_path / "reproduce.sh"), *words],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
        )
        calls = tmp_path / "calls"
        words = calls.read_text().splitlines() if calls.exists() else []
        return done, [word.strip("[]") for word in words]

    return call


@each("words", ["tables smoke", "evidence first", "evidence", "lite"])
def test_reproduce_hands_all_words_to_recipes(script, words):
    words = [*words.split(), "--data-dir", "/a b"]
    done, calls = script(*words)
    assert done.returncode == 0 and calls == ["-m", "companions.recipes", *words]


def test_reproduce_tries_a_machine(script):
    done, calls = script("gpu", "--minutes", "5")
    assert done.returncode == 0 and calls == ["infoard.py", "gpu", "--minutes", "5"]


def test_reproduce_runs_the_tests(script):
    done, calls = script("test", "-k", "a or b")
    assert done.returncode == 0 and calls[:2] == ["-m", "pytest"]
    assert calls[-2:] == ["-k", "a or b"]


def test_reproduce_demo_is_the_verb_of_that_name(script):
    done, calls = script("demo", "--seed", "3")
    assert done.returncode == 0 and calls == ["infoard.py", "demo", "--seed", "3"]


def test_reproduce_installs_what_has_changed(script, tmp_path):
    (tmp_path / ".venv/installed").write_text("older")
    done, calls = script("lite")
    assert calls[:3] == ["-m", "pip", "install"] and calls[-3:] == [
        "-m",
        "companions.recipes",
        "lite",
    ]
    installed = (tmp_path / ".venv/installed").read_text()
    assert installed == (ROOT / "requirements.txt").read_text()


def test_reproduce_needs_no_environment_for_cells(script, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    done, calls = script("cells", "gpu")
    assert done.returncode == 0 and done.stdout.count("\n") == 35 and calls == []
    done, calls = script("evidence", "plugins", "--dry-run")
    assert calls == [] and done.stderr.count("\n") == 1  # no infoard.py in that folder
    assert not (tmp_path / ".venv").exists()


def test_reproduce_says_how_it_is_called(script):
    for words in ([], ["table"]):
        done, calls = script(*words)
        assert (
            done.returncode == 2 and calls == [] and "bash reproduce.sh tables SCALE" in done.stdout
        )
    done, calls = script("evidence", "plugin")
    assert done.returncode == 2 and calls == [] and "not 'plugin'" in done.stderr
    done, calls = script("tables", "huge")  # before anything is set up
    assert done.returncode == 2 and calls == [] and "not 'huge'" in done.stderr


SEARCH = ROOT / "results/evidence/search.py"


SEARCHES = {"search.jsonl": "README.md", "search2.jsonl": "README.md"}
SEARCHES |= {"search3.jsonl": "README.md", "search4.jsonl": "tuned/README.md"}


@each("file", SEARCHES)
def test_search_has_the_tables_of_its_page(file):
    spec = importlib.util.spec_from_file_location("search", SEARCH)
    search = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(search)
    table = search.table(file)
    assert table.startswith("| tried") and table in (SEARCH.parent / SEARCHES[file]).read_text()


def test_search_prints_its_table_from_anywhere(tmp_path):
    done = forked(tmp_path, str(SEARCH), "table")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip() in SEARCH.with_name("README.md").read_text()


def test_a_run_of_the_search_keeps_what_its_validation_images_say(tmp_path):
    toy = "--subset 320 --val-size 32 --student tiny --epochs 1 --steps 1 --framework trades"
    words = ["mine", "label=0.5", *toy.split(), "--no-infoard", "--device", "cpu"]
    done = forked(tmp_path, str(SEARCH), *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs/search/mine/s0.json").read_text())
    assert found["n"] == 32 and found["tried"] == {"label": 0.5}
    assert 0 <= found["pgd5_cw"] <= found["pgd_sat"] <= found["clean"] <= 100
    assert f"pgd5_cw {found['pgd5_cw']}" in done.stdout
    again = forked(tmp_path, str(SEARCH), *words)
    assert again.returncode == 2 and one_line(again.stderr) and "another NAME" in again.stderr


@each("words, protocol, first", [([], "tuned", 40), (["plugins"], "plugins", 20)])
def test_kept_students_are_evaluated_again_with_these_options_and_compared(
    words, protocol, first, monkeypatch
):
    again = runpy.run_path(str(ROOT / "results/evidence/again.py"))
    calls = []
    monkeypatch.setattr(I, "main", lambda words: calls.append(words) or 0)
    assert again["main"]([*words, "--dataset", "cifar10", "--eval-subset", "9"]) == 0
    *evals, compared = calls
    folder = f"runs/again/{protocol}"
    assert compared == ["compare", folder] and len(evals) == 12
    places = set()
    for verb, file, *options in evals:
        given = cli.parse("eval", [file, *options])
        assert verb == "eval" and given["dataset"] == "cifar10" and given["eval_subset"] == 9
        assert given["attacks"] == "clean,fgsm,pgd_sat,cw" and given["image_size"] == 16
        places.add(given["out"])
        weights = I.load_tensors(file)
        assert sum(w.numel() for name, w in weights.items() if "weight" in name) > 90_000
    seeds = range(first, first + 6)
    assert places == {f"{folder}/adaad/{c}/s{s}" for c in ("plain", "infoard") for s in seeds}
    monkeypatch.setattr(I, "main", lambda words: 2)
    assert again["main"]([]) == 2  # what eval has said once is not said twelve times
