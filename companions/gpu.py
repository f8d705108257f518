"""What a machine with CUDA makes of all this: does it run, is it right, how fast, what comes out.

    bash reproduce.sh gpu                                       ten minutes; results in runs/gpu
    bash reproduce.sh gpu --minutes 20 --data-dir images.zip    CIFAR-10, or folders of images
    bash reproduce.sh gpu --device cpu                          a dry run of all parts at toy size

    1  speed                   3  parts and their time    5  the command
    2  teacher and students    4  the page

Whether everything runs and agrees with the CPU stands in trials.py. Each part is a process with a
time of its own. It writes what it finds to PART.json as it finds it, so one that is late loses only
what it had still to do; called again, the whole ones are kept.
"""

import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import infoard as I
from companions import bench, cli, loop, recipes
from companions.evaluation import interval
from companions.parity import LIMITS
from companions.tables import markdown
from companions.trials import (
    HELPERS,
    SHAPES,
    Job,
    attempt,
    machine,
    numbers,
    parity,
    read,
    resume,
    smoke,
)

# ==== 1. Speed ====================================================================================


def kinds(cfg: I.Config) -> dict[str, bench.Kind]:
    """Those of bench, and a plain step without folding and graphs."""
    found = bench.kinds_of_step(cfg)
    eager = bench.Kind(replace(cfg, infoard=False, steps_lo=0, fast=False))
    return {"ordinary": found.pop("ordinary"), "eager": eager, **found}


def small_rate() -> float:
    """Operations per second of a small product: enough to try the table with."""
    a = torch.randn(256, 256)
    return bench.rate(lambda: a @ a, torch.device("cpu"))


def speed(job: Job) -> None:
    """bench's rows for ResNet-18 and WRN-34-10, each framework in its turn while there is time."""
    nets, rounds, peaks = {}, 7, {}
    plan = [("rslad", 128), ("adaad", 128), ("rslad", 512)]
    if job.toy:
        nets, rounds = {"student": "tiny", "teacher_arch": "tiny", "steps": 2}, 1
        plan, peaks = [("rslad", 8)], dict.fromkeys((torch.float32, torch.bfloat16), small_rate())
    rows, about = {}, {}
    for framework, batch in plan:
        out = job.out / "speed" / f"{framework}-{batch}"
        given = {"device": job.device, "batch_size": batch, "out": str(out), **nets}
        bench.time_kinds(kinds, rounds, framework, given, peaks)
        found = json.loads((out / "bench.json").read_text())
        about = found["about"]
        rows |= {f"{name}, {batch} images": row for name, row in found["rows"].items()}
        job.note(about=about, rows=rows)


# ==== 2. Teacher and students =====================================================================

SHOWN = ["clean", "pgd_sat", "cw", "apgd", "worst"]
STUDENTS = recipes.lifted("rslad", "--framework rslad") + recipes.lifted(
    "adaad", "--framework adaad"
)


def data(job: Job) -> None:
    """Which images there are: CIFAR-10 or folders in --data-dir, or CIFAR-10 downloaded. Folders
    are decoded here, while other parts run.
    """
    why = ""
    for dataset, download in (("cifar10", False), ("folder", False), ("cifar10", True)):
        if job.toy:
            dataset = SHAPES
        try:
            found = I.load_dataset(dataset, job.data_dir, download=download)
        except I.InfoardError as error:
            why = str(error)
            continue
        job.note(dataset=dataset, train=len(found.y_train), test=len(found.y_test))
        return
    job.note(missing=why)


def common(job: Job) -> str:
    """The options of teacher and students."""
    dataset = read(job.out, "data").get("dataset")
    I.require(dataset, "no images: put CIFAR-10 or train/ and test/ into --data-dir")
    options = f"--dataset {dataset} --data-dir {shlex.quote(job.data_dir)}"
    options += f" --device {job.device} --val-size 0 --step-size 4/255 --attacks clean,pgd_sat"
    options += " --no-figures --no-progress --resume"
    if job.toy:
        return f"{options} --subset 100 --batch-size 50 --steps 2 --eval-subset 20"
    return f"{options} --batch-size 256 --lr 0.2 --steps 3 --eval-subset 200"


def settings(words: str) -> I.Config:
    """What a run makes of its words."""
    return I.Config(**cli.parse("train", shlex.split(words))).resolved()


def seconds_of_epoch(words: str) -> float:
    """From ten steps after ten: the first are slow, and the fourth is recorded."""
    cfg = settings(words)
    device = I.pick_device(cfg.device)
    images = I.load_dataset(cfg.dataset, cfg.data_dir, download=False)
    nets = {"teacher": None}
    if cfg.teacher:
        nets["teacher"] = I.load_teacher(cfg.teacher, device=device, size=images.x_train.shape[-1])
    run = I.Run(cfg, images, device, nets)
    steps = 2 if device.type == "cpu" else 10
    for _ in range(2):
        bench.wait(device)
        began = time.perf_counter()
        for _ in range(steps):
            I.train_step(run, run.train[: cfg.batch_size], 0.0)
        bench.wait(device)
    return (time.perf_counter() - began) / steps * len(run.train) / cfg.batch_size


def epochs_that_fit(job: Job, rows: dict[str, str]) -> int:
    """As many for each as the part has time for, a fifth of it aside; those planned before, if a
    run has been begun.
    """
    for words in rows.values():
        begun = Path(settings(words).out, "config.json")
        if begun.exists():
            return json.loads(begun.read_text())["settings"]["epochs"]
    costs = {name: seconds_of_epoch(words) for name, words in rows.items()}
    epochs = max(1, int(0.8 * job.left() / sum(costs.values())))
    epochs = min(epochs, 2 if job.toy else 100)
    job.note(epochs=epochs, seconds_of_epoch=costs)
    return epochs


def train_rows(job: Job, rows: dict[str, str]) -> None:
    """Trains each for equally many epochs, one after the other."""
    epochs, found = epochs_that_fit(job, rows), {}
    for name, words in rows.items():
        job.check_time()
        row = attempt(f"{words} --epochs {epochs}")
        found[name] = row if row["error"] else row | numbers(Path(settings(words).out))
        job.note(rows=found)
    bad = [row["error"] for row in found.values() if row["error"]]
    I.require(not bad, "; ".join(bad))


def teacher(job: Job) -> None:
    """A WRN-28-4 by TRADES, for as long as there is time."""
    arch = "tiny" if job.toy else "wrn_28_4"
    words = f"{common(job)} --framework trades --no-infoard --student {arch} --steps 5"
    if job.toy:
        words += " --framework natural --subset 0 --batch-size 25 --lr 0.05"
    train_rows(job, {"teacher": f"{words} --out {job.path('teacher')}"})


def students(job: Job) -> None:
    """Four ResNet-18 of that teacher: RSLAD and AdaAD, plain and with InfoARD."""
    net = "tiny" if job.toy else "resnet18"
    same = f"{common(job)} --student {net} --teacher {job.path('teacher/last.pt')}"
    train_rows(job, {n: f"{same} {more} --out {job.path(f'students/{n}')}" for n, more in STUDENTS})


def look(job: Job) -> None:
    """All under clean images, PGD-20, CW and APGD: the same test images for each, a chunk at a time
    while there is time.
    """
    files = {"teacher": job.out / "teacher/last.pt"}
    files |= {name: job.out / f"students/{name}/last.pt" for name, _ in STUDENTS}
    cfg = settings(common(job))
    images = I.load_dataset(cfg.dataset, cfg.data_dir, download=False)
    size, device = images.x_test.shape[-1], I.pick_device(job.device)
    files = {name: str(file) for name, file in files.items() if file.exists()}
    nets = {name: I.load_teacher(f, size=size, device=device) for name, f in files.items()}
    chunk, names = (10, "clean,pgd_sat") if job.toy else (500, "clean,pgd_sat,cw,apgd")
    attacks, right, rows = I.chosen_attacks(names), {name: [] for name in nets}, {}
    chosen = I.class_balanced(images.y_test, min(8 * chunk, len(images.y_test)))
    took = 0.0
    for k in range(8):
        if took > job.left() or (job.toy and k == 2):
            break
        some, began = chosen[k::8], time.time()
        for name, net in nets.items():
            seen = I.still_right(net, images.x_test[some], images.y_test[some], attacks)
            right[name].append(seen)
            whole = {key: torch.cat([part[key] for part in right[name]]) for key in seen}
            row = {key: I.percent(hits) for key, hits in whole.items()} | {"n": len(whole["clean"])}
            rows[name] = row | {"ci95": interval(row["worst"] / 100, row["n"])}
        took = 1.1 * (time.time() - began)
        job.note(rows=rows)


# ==== 3. Parts and their time =====================================================================


GRACE = 8  # seconds in which a part that is late may save


@dataclass(frozen=True)
class Part:
    """work(job); the seconds that it gets of ten minutes; its stage: those of one run beside each
    other, once those before have ended.
    """

    work: Callable
    seconds: float
    stage: int


PARTS = {"machine": Part(machine, 25, 0), "data": Part(data, 115, 1)}
PARTS.update({f"smoke{i}": Part(partial(smoke, share=i), 115, 1) for i in range(HELPERS)})
PARTS.update(
    parity=Part(parity, 115, 1),
    resume=Part(resume, 115, 1),
    speed=Part(speed, 100, 2),  # alone on the device, as all that follows
    teacher=Part(teacher, 130, 3),
    students=Part(students, 145, 4),
    look=Part(look, 90, 5),
)


def time_of(parts: dict[str, Part], stage: int, left: float) -> float:
    """The seconds of a stage: its share of what is left, so that what one spares others get."""
    longest = {part.stage: 0.0 for part in parts.values() if part.stage >= stage}
    for part in parts.values():
        if part.stage in longest:
            longest[part.stage] = max(longest[part.stage], part.seconds)
    return left * longest[stage] / sum(longest.values())


def work(part: Part, job: Job) -> None:
    """A part in its own process; what it prints goes to a log."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all; the first process tells
    log = job.out / "logs" / f"{job.part}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    torch.set_num_threads(job.threads)
    began = time.time()
    try:
        part.work(job)
        job.note(whole=True, took=time.time() - began)
    except Exception as error:
        traceback.print_exc()
        job.note(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])


def run_stage(parts: dict[str, Part], jobs: dict[str, Job], caught: list[int]) -> None:
    """Runs these parts beside each other. One that is late is told to end, then ended."""
    context = multiprocessing.get_context("fork")  # torch is imported once; nobody has used CUDA
    running = {name: context.Process(target=work, args=(parts[name], jobs[name])) for name in jobs}
    for process in running.values():
        process.start()
    began = time.time()
    told = set()  # a second signal would end a run before it has saved
    while running:
        for name, process in list(running.items()):
            if caught:
                jobs[name].until = min(jobs[name].until, time.time())
            late = time.time() - jobs[name].until
            if not process.is_alive():
                del running[name]
                print(f"{name}: {time.time() - began:.0f} s, {state(jobs[name])}", flush=True)
            elif late > GRACE:
                process.kill()
            elif late >= 0 and name not in told:
                told.add(name)
                process.terminate()
        time.sleep(0.05)


def state(job: Job) -> str:
    """How a part has ended, in words."""
    found = read(job.out, job.part)
    if found.get("whole"):
        return "whole"
    return found.get("error", "late or ended from outside: what it had found is kept")


# ==== 4. The page =================================================================================


def table_of(rows: dict[str, dict], names: list[str], first: str, form: str = "{:.2f}") -> str:
    """{row: {column: number}} as Markdown; what was not measured is left empty."""
    lines = [[first, *names]]
    for name, row in rows.items():
        lines.append([name, *(form.format(row[key]) if key in row else "" for key in names)])
    return markdown(lines)


def smoke_lines(out: Path) -> list[str]:
    """How many runs ended well, and what became of the others."""
    planned, rows = [], {}
    for i in range(HELPERS):
        found = read(out, f"smoke{i}")
        planned += found.get("of", [])
        rows |= found.get("rows", {})
    bad = {name: row["error"] for name, row in rows.items() if row["error"]}
    lines = [f"{len(rows) - len(bad)} of {len(planned)} runs trained and were evaluated."]
    lines += [f"- failed, {name}: {error}" for name, error in bad.items()]
    return lines + [f"- not run: {name}" for name in planned if name not in rows]


def parity_lines(found: dict) -> list[str]:
    """The worst of all frameworks in each precision, graphs, the evaluation."""
    rows = {}
    for label, (_, limit) in LIMITS.items():
        some = [row for name, row in found.get("rows", {}).items() if name.endswith(f" {label}")]
        if some:
            worst = {key: max(row[key] for row in some) for key in some[0]}
            rows[f"{label}, {len(some)} steps"] = worst
            near = max(worst["same loss"], worst["same gradient"]) < limit
            rows[f"{label}, {len(some)} steps"]["beyond the limit"] = 0.0 if near else 1.0
    lines = [table_of(rows, list(next(iter(rows.values()), {})), "largest difference", "{:.2g}")]
    graphs = found.get("graphs", {})
    recorded = [name for name, row in graphs.items() if row["recorded"]]
    gap = max((row["gap"] for row in graphs.values()), default=0.0)
    lines.append(f"\n{len(recorded)} of {len(graphs)} frameworks replayed, gap {gap:.2g}.\n")
    evaluations = found.get("evaluations", {})
    return [*lines, table_of(evaluations, SHOWN[:2], "evaluation")]


def page(out: Path) -> str:
    """All that was found, as Markdown."""
    about = read(out, "machine")
    lines = [f"# {about.get('name')}, torch {about.get('torch')}", "", "## Does it run", ""]
    lines += [*smoke_lines(out), "", "## Is it right", "", *parity_lines(read(out, "parity")), ""]
    gone_on = read(out, "resume")
    if "largest_gap" in gone_on:
        gap = gone_on["largest_gap"]
        lines += [f"Stopped and gone on: the largest difference of a weight is {gap:.2g}.", ""]
    lines += ["## What a step costs", ""]
    rows = read(out, "speed").get("rows", {})
    lines += [bench.costs(rows) if rows else "Not measured.", "", "## What students reach", ""]
    missing = read(out, "data").get("missing")
    trained = {**read(out, "teacher").get("rows", {}), **read(out, "students").get("rows", {})}
    for name, row in trained.items():
        end = row["error"] or f"{row['epoch']} epochs, {row['images_per_s']:.0f} images/s"
        lines.append(f"- {name}: {end}")
    rows = read(out, "look").get("rows", {})
    if rows:
        named = {f"{name}, n = {row['n']}": row for name, row in rows.items()}
        shown = [n for n in SHOWN if any(n in row for row in rows.values())]
        lines += ["", table_of(named, shown, "per cent right")]
        widest = max((high - low) / 2 for low, high in (row["ci95"] for row in rows.values()))
        lines.append(f"\n95% intervals of the last column: ±{widest:.1f} points at most.")
    elif missing:
        lines.append(f"Left out, as there are no images: {missing}")
    return "\n".join([*lines, ""])


# ==== 5. The command ==============================================================================


def run_gpu(**given) -> None:
    """Try a machine in ten minutes: smoke, parity with the CPU, speed, and four students; --device
    cpu: a dry run at toy size. No setting of the machine is changed.
    """
    minutes = given.pop("own", {}).get("minutes", 10.0)
    I.require(minutes > 0, f"--minutes must be above 0, got {minutes}")
    out, device = Path(given.get("out", "runs/gpu")), given.get("device", "cuda")
    known = device == "cpu" or device.startswith("cuda")
    I.require(known, f"--device must be cuda, cuda:1 or (a dry run) cpu, not {device}")
    end = time.time() + 60 * minutes - 3  # for the page
    before = read(out, "machine").get("device", device)
    I.require(before == device, f"{out} has results of {before}: choose another --out")
    for stage in sorted({part.stage for part in PARTS.values()}):
        missing = {n: p for n, p in PARTS.items() if not read(out, n).get("whole")}
        todo = [name for name, part in missing.items() if part.stage == stage]
        if not todo:
            continue
        until = time.time() + time_of(missing, stage, max(0.0, end - time.time()))
        same = {"out": out, "device": device, "data_dir": given.get("data_dir", "data")}
        threads = 1 if device == "cpu" else max(1, os.cpu_count() // len(todo))
        jobs = {name: Job(name, until=until, threads=threads, **same) for name in todo}
        with loop.noted_signals() as caught:
            run_stage(PARTS, jobs, caught)
        if caught:
            raise SystemExit(128 + caught[0])
        why = read(out, "machine").get("error")
        I.require(not why or stage, f"{device} cannot be used here: {why}")
    text = page(out)
    I.save(out / "summary.md", text.encode())
    print(f"\n{text}\nin {out}: summary.md, a .json and a log for each part")


run_gpu.takes = ["device", "data_dir", "out"]
run_gpu.options = {"minutes": (10.0, "how long all parts may take together")}
