"""What holds for gpu.py, trials.py and parity.py: parts keep to their time and to themselves, a dry
run of all of them finds what there is to find.
"""

import dataclasses
import json
import os
import re
import signal
import time

import pytest
import torch

import infoard as I
from companions import bench, gpu, parity, trials
from test_infoard import each, near, one_line

# ==== 1. Parts and their time =====================================================================


def ends(job):
    job.note(seen=1)


def breaks(job):
    job.note(seen=2)
    raise RuntimeError("of this part\nalone")


def lasts(job):
    job.note(seen=3)
    time.sleep(60)


def saves_first(job):
    """A part that ends well when it is told to."""

    def end(number, frame):
        job.note(saved=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    time.sleep(60)


def will_not_end(job):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def stops_all(job):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command with parts as given, (work, seconds, stage), in twelve seconds."""

    def run(minutes=0.2, **parts):
        monkeypatch.setattr(gpu, "GRACE", 0.3)
        monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(*about) for name, about in parts.items()})
        gpu.run_gpu(out=str(tmp_path), device="cpu", own={"minutes": minutes})
        return {name: gpu.read(tmp_path, name) for name in parts}

    return run


def test_a_part_that_is_late_or_breaks_costs_itself_alone(command, capsys):
    began = time.time()
    found = command(
        minutes=0.15,
        a=(lasts, 0.5, 1),
        b=(breaks, 0.5, 1),
        c=(ends, 0.5, 1),
        d=(will_not_end, 0.5, 2),
        e=(saves_first, 0.5, 3),
        f=(ends, 1, 4),
    )
    assert time.time() - began < 15  # and not the minutes that its parts would take
    assert [found[name].get("seen") for name in "abcf"] == [3, 2, 1, 1]
    assert [name for name in found if found[name].get("whole")] == ["c", "f"]
    assert found["b"]["error"] == "RuntimeError: of this part alone"
    assert found["e"] == {"saved": True}
    shown = capsys.readouterr().out
    assert re.search(r"b: \d s, RuntimeError: of this part alone", shown)
    assert re.search(r"c: \d s, whole", shown)


def test_whole_parts_are_kept_and_others_made_again(command, tmp_path):
    command(a=(ends, 1, 1), b=(breaks, 1, 2))
    seen = (tmp_path / "a.json").stat().st_mtime_ns
    found = command(a=(breaks, 1, 1), b=(ends, 1, 2))
    assert found["a"]["whole"] and found["b"]["whole"] and found["b"]["seen"] == 1
    assert (tmp_path / "a.json").stat().st_mtime_ns == seen
    assert (tmp_path / "logs/b.log").exists() and (tmp_path / "summary.md").exists()


def test_ctrl_c_ends_all_parts(command):
    began = time.time()
    with pytest.raises(SystemExit) as stop:
        command(minutes=1, a=(stops_all, 1, 1), b=(lasts, 1, 1), c=(ends, 1, 2))
    assert stop.value.code == 130 and time.time() - began < 10


def test_what_a_stage_spares_the_others_get():
    parts = {
        "a": gpu.Part(ends, 10, 0),
        "b": gpu.Part(ends, 30, 1),
        "c": gpu.Part(ends, 50, 1),
        "d": gpu.Part(ends, 40, 2),
    }
    assert gpu.time_of(parts, 0, 100) == 10  # of 10 + 50 + 40
    assert gpu.time_of(parts, 1, 99) == 99 * 50 / 90
    assert gpu.time_of(parts, 2, 60) == 60
    seconds = {part.stage: part.seconds for part in gpu.PARTS.values()}
    assert sum(seconds.values()) <= 605  # ten minutes


def test_without_its_device_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"machine": gpu.Part(breaks, 10, 0)})
    assert I.main(["gpu", "--device", "cuda", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "cuda cannot be used here: RuntimeError" in error and one_line(error)
    trials.Job("machine", tmp_path, "cuda", "").note(device="cuda")
    assert I.main(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "has results of cuda: choose another --out" in capsys.readouterr().err
    assert I.main(["gpu", "--device", "auto"]) == 2
    assert "--device must be cuda, cuda:1 or (a dry run) cpu" in capsys.readouterr().err
    assert I.main(["gpu", "--minutes", "0"]) == 2
    assert "--minutes must be above 0" in capsys.readouterr().err


# ==== 2. A dry run ================================================================================


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """All parts at toy size, one after the other in this process."""
    out = tmp_path_factory.mktemp("a b")
    few = I.render_shapes(600, 200, size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "rendered", lambda: few)
        for name, part in gpu.PARTS.items():
            job = trials.Job(name, out, "cpu", "data", until=time.time() + 60)
            part.work(job)
            job.note(whole=True)
    return out


def test_every_part_finds_what_it_is_for(dry):
    found = {name: gpu.read(dry, name) for name in gpu.PARTS}
    runs = {
        name: row for i in range(trials.HELPERS) for name, row in found[f"smoke{i}"]["rows"].items()
    }
    assert {*runs} == {name for name, _ in trials.smoke_rows(toy=True)}
    assert not any(row["error"] for row in runs.values())
    assert found["resume"]["ends"] == ["", "stopped, exit code 143", ""]
    assert found["resume"]["largest_gap"] == 0  # on a CPU, bit for bit
    assert found["parity"]["evaluations"].keys() == {"cpu fp32"}
    kinds = ["ordinary", "eager", "plain", "infoard", "schedule"]
    assert [*found["speed"]["rows"]] == [f"rslad/{kind}, 8 images" for kind in kinds]
    names = [name for name, _ in gpu.STUDENTS]
    assert [*found["students"]["rows"]] == names and found["students"]["epochs"] == 2
    assert [*found["look"]["rows"]] == ["teacher", *names]
    assert {row["n"] for row in found["look"]["rows"].values()} == {20}
    config = json.loads((dry / "students/rslad/infoard/config.json").read_text())["settings"]
    assert config["teacher"] == f"{dry}/teacher/last.pt" and config["infoard"]


def test_the_page_has_all_of_it(dry):
    text = gpu.page(dry)
    assert "11 of 11 runs trained" in text and "largest difference of a weight is 0." in text
    for name in ("rslad/ordinary, 8 images", "float64, 3 steps", "adaad/infoard, n = 20"):
        assert f"| {name} " in text
    look = gpu.read(dry, "look")["rows"]["teacher"]
    assert f"| {look['clean']:.2f} | {look['pgd_sat']:.2f}" in text


def test_the_page_shows_what_students_were_looked_at_with(tmp_path):
    trained = {"teacher": {"error": "", "epoch": 1, "images_per_s": 9.0, "clean": 50.0}}
    trials.Job("teacher", tmp_path, "cuda", "").note(rows=trained)
    seen = {"clean": 50.0, "pgd_sat": 30.0, "cw": 28.0, "apgd": 27.0, "worst": 26.0, "n": 1000}
    trials.Job("look", tmp_path, "cuda", "").note(rows={"a": seen | {"ci95": [24, 28]}})
    lines = gpu.page(tmp_path).splitlines()
    head = next(i for i, line in enumerate(lines) if "worst" in line)
    named = [text.strip() for text in lines[head].split("|")[2:-1]]
    shown = [text.strip() for text in lines[head + 2].split("|")[2:-1]]
    assert named == ["clean", "pgd_sat", "cw", "apgd", "worst"]
    assert shown == ["50.00", "30.00", "28.00", "27.00", "26.00"]


def test_a_page_of_nothing_says_so(tmp_path):
    text = gpu.page(tmp_path)
    assert "0 of 0 runs" in text and "Not measured." in text
    trials.Job("data", tmp_path, "cuda", "").note(missing="no cifar10 in data")
    trials.Job("smoke1", tmp_path, "cuda", "").note(
        of=["a", "b"], rows={"a": {"error": "out of memory"}}
    )
    text = gpu.page(tmp_path)
    assert "there are no images: no cifar10 in data" in text
    assert "0 of 2 runs" in text and "- failed, a: out of memory" in text and "- not run: b" in text


def test_epochs_planned_before_are_kept(dry):
    job = trials.Job("students", dry, "cpu", "data", until=time.time() + 60)
    words = f"{gpu.common(job)} --framework natural --out {job.path('teacher')}"
    assert gpu.epochs_that_fit(job, {"teacher": words}) == 2


@each("seconds, epochs", [(100, 8), (1, 1)])
def test_epochs_fit_into_the_time(seconds, epochs, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "seconds_of_epoch", lambda words: 5.0)
    job = trials.Job("students", tmp_path, "cuda", "data", until=time.time() + seconds)
    rows = {name: f"--framework rslad --out {tmp_path}/{name}" for name in "ab"}
    assert gpu.epochs_that_fit(job, rows) in (epochs, epochs - 1)  # the clock goes on
    assert job.found["seconds_of_epoch"] == {"a": 5.0, "b": 5.0}


def test_data_are_found_or_said_to_be_missing(tmp_path, monkeypatch):
    tried = []

    def load(name, data_dir, *, download, **options):
        tried.append((name, download))
        I.require(name == "folder" and data_dir == "here", f"no {name}")
        return trials.rendered()

    monkeypatch.setattr(I, "load_dataset", load)
    job = trials.Job("data", tmp_path, "cuda", "here")
    gpu.data(job)
    assert job.found["dataset"] == "folder" and tried == [("cifar10", False), ("folder", False)]
    job = trials.Job("data", tmp_path, "cuda", "there")
    gpu.data(job)
    assert job.found["missing"] == "no cifar10" and tried[-1] == ("cifar10", True)
    with pytest.raises(I.InfoardError, match="no images: put CIFAR-10"):
        gpu.common(job)


def test_on_a_gpu_everything_is_tried():
    rows = dict(trials.smoke_rows(toy=False))
    for name in bench.lifted_frameworks().split(","):
        assert {f"{name}/plain", f"{name}/infoard"} <= rows.keys()
    job = trials.Job("smoke0", gpu.Path("x"), "cuda", "data")
    for options in rows.values():
        cfg = gpu.settings(f"{trials.little(job)} {options}")
        assert cfg.device == "cuda" and cfg.epochs == 1
    assert len(rows) == len(trials.smoke_rows(toy=False))


def test_an_attempt_says_what_went_wrong(tmp_path, monkeypatch, capsys):
    assert "unknown framework" in trials.attempt(f"--framework none --out {tmp_path}")["error"]

    def crash(**given):
        raise KeyError("penultimate")

    monkeypatch.setattr(I, "train", crash)
    assert trials.attempt(f"--out {tmp_path}")["error"] == "KeyError: 'penultimate'"


# ==== 3. Parity ===================================================================================


@each("framework", ["natural", "saad"])
def test_both_sides_agree_and_a_wrong_one_is_seen(framework, monkeypatch):
    lifted = framework != "natural"
    found = parity.compared(framework, lifted, "float64", "cpu")
    assert max(found["same loss"], found["same gradient"]) < parity.LIMITS["float64"][1]
    real, calls = parity.one_step, []

    def wrong(*args):
        calls.append(args)
        loss, grad, x_adv = real(*args)
        return loss, grad * (1 + 1e-5 * (len(calls) == 3)), x_adv

    monkeypatch.setattr(parity, "one_step", wrong)
    found = parity.compared(framework, lifted, "float64", "cpu")
    assert found["same gradient"] == pytest.approx(1e-5, rel=1e-3)


def test_attacks_start_alike_or_are_given():
    x, given = torch.rand(2, 3, 4, 4), [torch.rand(2, 3, 4, 4)]

    def objective(z, rows=I.ALL):
        return z.flatten(1).sum(1)

    options = {"eps": 0.1, "alpha": 0.01, "steps": 1, "init": "uniform"}
    seen = []
    for _ in range(2):
        with parity.same_attacks([]) as made:
            I.pgd(objective, x, generator=None, **options)
        seen.append(made[0])
    near(seen[0], seen[1])
    with parity.same_attacks(given):
        near(I.pgd(objective, x, **options), given[0])
    assert I.pgd.__module__ == "infoard"


def test_replaying_is_compared_with_steps_as_usual(monkeypatch):
    assert parity.replayed("natural", "cpu") == {"recorded": False, "gap": 0.0}
    runs = []
    real = I.train_step

    def drift(run, rows, share):
        real(run, rows, share)
        runs.append(run)
        if run is runs[0]:
            with torch.no_grad():
                run.student.linear.bias.add_(0.01)

    monkeypatch.setattr(I, "train_step", drift)
    assert parity.replayed("natural", "cpu")["gap"] > 1e-4


def test_a_job_keeps_what_it_finds(tmp_path):
    job = trials.Job("part", tmp_path, "cpu", "data", until=time.time() - 1)
    job.note(a=1)
    job.note(b=2)
    assert gpu.read(tmp_path, "part") == {"a": 1, "b": 2} and gpu.read(tmp_path, "other") == {}
    assert job.left() < 0 and job.toy and not dataclasses.replace(job, device="cuda").toy
    with pytest.raises(I.InfoardError, match="late"):
        job.check_time()
