"""What is tried on a machine: does every kind of run end well, is it right, does it go on.

    1  jobs    2  smoke    3  parity, resume

companions/gpu.py gives these their time. Each writes what it finds as it finds it.
"""

import contextlib
import io
import json
import os
import shlex
import signal
import time
import traceback
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch

import infoard as I
from companions import bench, recipes
from companions.evaluation import exact_fp32
from companions.parity import LIMITS, compared, replayed

# ==== 1. Jobs =====================================================================================


@dataclass
class Job:
    """What a part is told: where its results go, on what it runs, and until when (time.time())."""

    part: str
    out: Path
    device: str
    data_dir: str
    until: float = 0.0
    threads: int = 1
    found: dict = field(default_factory=dict)

    @property
    def toy(self) -> bool:
        return self.device == "cpu"

    def path(self, name: str) -> str:
        """A file or folder of the results, as a word of a command line."""
        return shlex.quote(str(self.out / name))

    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def check_time(self) -> None:
        """Ends a part that is late, after one of its runs was stopped."""
        I.require(self.left() > 0, "late: what was found is kept")

    def note(self, **found) -> None:
        """Keeps what was found."""
        self.found.update(found)
        I.save(self.out / f"{self.part}.json", self.found)


def read(out: Path, part: str) -> dict:
    """What a part has found so far."""
    file = out / f"{part}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def attempt(words: str) -> dict:
    """infoard.py with these words, in this process: seconds and, in a line, what went wrong."""
    began, told, error = time.time(), io.StringIO(), ""
    try:
        with contextlib.redirect_stderr(told):
            code = I.main(shlex.split(words))
        if code:
            error = (told.getvalue().strip().splitlines() or ["no reason given"])[-1]
    except SystemExit as stop:  # a signal has stopped it
        error = f"stopped, exit code {stop.code}"
    except Exception as found:  # whatever it raises is what is looked for
        traceback.print_exc()
        error = " ".join(f"{type(found).__name__}: {found}".split())[:200]
    print(f"{words}\n{told.getvalue()}{error}", flush=True)
    return {"seconds": round(time.time() - began, 1), "error": error}


def numbers(out: Path) -> dict:
    """Those of a finished run: of its last epoch and its evaluation."""
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    row = {name: last[name] for name in ("epoch", "loss", "images_per_s")}
    result = json.loads((out / "results.json").read_text())["last"]
    return row | {name: result[name] for name in ("clean", "pgd_sat", "n")}


# ==== 2. Smoke ====================================================================================

SHAPES = "companions.trials:little_shapes"
HELPERS = 4  # processes that share the smoke's runs


@lru_cache
def rendered() -> I.Data:
    """A small part of the built-in images, once for all runs of a process."""
    return I.render_shapes(1500, 400)


def little_shapes(data_dir="data", **options) -> I.Data:
    """That as a data set by name."""
    return rendered()


def little(job: Job) -> str:
    """The options of little runs."""
    options = f"--dataset {SHAPES} --device {job.device} --student tiny --epochs 1 --steps 2"
    options += " --step-size 4/255 --batch-size 50 --no-figures --no-progress --resume"
    teacher = job.path("little/last.pt")
    options += f" --teacher {teacher} --teacher-nat {teacher}"
    if job.toy:
        return f"{options} --subset 100 --val-size 10 --eval-subset 20 --attacks clean,pgd_sat"
    return f"{options} --val-size 100 --eval-subset 100 --attacks clean,fgsm,pgd"


def machine(job: Job) -> None:
    """What is there, and a little undefended net, which teaches in the smoke; without the device no
    other part is begun.
    """
    device = I.pick_device(job.device)
    job.note(device=job.device, name=bench.machine(device), torch=torch.__version__)
    job.note(cores=os.cpu_count(), half=str(I.amp_dtype("auto", device)))
    words = f"{little(job)} --framework natural --subset 0 --epochs 2 --batch-size 25 --lr 0.05"
    row = attempt(f"{words} --out {job.path('little')}")
    I.require(not row["error"], row["error"])


def smoke_rows(toy: bool) -> list[tuple[str, str]]:
    """(name, options) of the runs: every framework plain and lifted, and on a GPU also NAMID,
    precisions, bounds, signals, nets and what else changes a step.
    """
    rows = [("natural", "--framework natural")]
    for name in bench.lifted_frameworks().split(","):
        rows += recipes.lifted(name, f"--framework {name}")
    if toy:
        return rows[::3]
    more = {f"asa-{asa}": f"--asa {asa}" for asa in list(I.ASA)[1:]}
    more |= {f"mim-{mim}": f"--mim {mim}" for mim in ("dv", "nwj", "jsd", "vid", "unpaired")}
    more |= {f"amp-{amp}": f"--amp {amp}" for amp in ("fp16", "off")}
    for net in ("mobilenet_v2", "preact_resnet18", "wrn_10_2", "resnet18"):
        more[net] = f"--student {net} --attacks clean,pgd"
    more["schedule"] = "--steps-lo 1"
    more["terms"] = "--w-att 0.05 --w-rel 0.1"
    more["ema"] = "--ema 0.9"
    more["eager"] = "--no-fast"
    more["attacks"] = "--attacks clean,fgsm,pgd,cw,apgd,pgd_l2,mifgsm_t,spatial,corrupt,pgd5_cw"
    more["namid"] = "--framework namid"
    more["compile"] = "--compile"
    return [*more.items(), *rows]


def smoke(job: Job, share: int) -> None:
    """One in HELPERS of the runs: each trains an epoch and is evaluated."""
    mine = smoke_rows(job.toy)[share::HELPERS]
    rows = {}
    job.note(of=[name for name, _ in mine], rows=rows)
    for name, options in mine:
        job.check_time()
        row = attempt(f"{little(job)} {options} --out {job.path(f'smoke/{name}')}")
        rows[name] = row if row["error"] else row | numbers(job.out / "smoke" / name)
        job.note(rows=rows)


# ==== 3. Parity, resume ===========================================================================


def parity(job: Job) -> None:
    """Steps of every framework, graphs, and an evaluation, here and on the CPU."""
    rows, graphs, evaluations = {}, {}, {}
    frameworks = ["natural", *bench.lifted_frameworks().split(",")]
    for name in frameworks[:2] if job.toy else frameworks:
        if I.get_framework(name).static:
            graphs[name] = replayed(name, job.device)
        for lifted in [False, True][: 1 + I.get_framework(name).infoard]:
            for label in LIMITS:
                row = f"{name}{'/infoard' if lifted else ''} {label}"
                rows[row] = compared(name, lifted, label, job.device)
            job.note(rows=rows, graphs=graphs)
    data = rendered()
    some = I.class_balanced(data.y_test, 10 if job.toy else 40)
    for where, exact in (("cpu", True), (job.device, True), (job.device, False)):
        net = I.load_teacher(f"{job.out}/little/last.pt", device=where)
        with exact_fp32(exact):
            found = I.evaluate(net, data.x_test[some], data.y_test[some], attacks="clean,fgsm,pgd")
        evaluations[f"{where} {found['precision']}"] = {
            name: found[name] for name in ("clean", "pgd_sat")
        }
        job.note(evaluations=evaluations)


def resume(job: Job) -> None:
    """A run that SIGTERM stops in its second epoch and that goes on, beside one that goes through:
    the largest difference of a weight. On CUDA it need not be 0.
    """
    words = f"{little(job)} --epochs 2 --subset 300 --ema 0.9 --attacks clean,pgd_sat --out"
    train_step, taken = I.train_step, []

    def stopping(run, rows, share) -> None:
        train_step(run, rows, share)
        taken.append(run.at.step)
        if len(taken) == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    ends = [attempt(f"{words} {job.path('resume/whole')}")["error"]]
    with mock.patch.object(I, "train_step", stopping):
        ends.append(attempt(f"{words} {job.path('resume/stopped')}")["error"])
    ends.append(attempt(f"{words} {job.path('resume/stopped')}")["error"])
    job.note(ends=ends)
    files = [I.load_tensors(job.out / "resume" / name / "last.pt") for name in ("whole", "stopped")]
    whole, gone_on = (file["model"] for file in files)
    gaps = [(whole[name].double() - gone_on[name].double()).abs().max() for name in whole]
    job.note(largest_gap=max(gaps).item())
