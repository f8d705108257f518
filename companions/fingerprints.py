"""Fingerprints of small runs: does one infoard.py still compute what another one does?

    python companions/fingerprints.py old/infoard.py --out old.json --keep old_runs
    python companions/fingerprints.py infoard.py --out new.json --against old.json --old old_runs

The first trains eighty toy nets through the command line alone, in about ten minutes on two cores,
and writes down a hash of each tensor and every number in their files. The second does so with
another file, goes on from the first one's checkpoints, and says of each case `same` or what
differs, with exit code 1. All runs have one thread: equal code gives equal bits on one machine with
one PyTorch.

    1  cases     2  running them     3  fingerprints     4  command line
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

# ==== 1. Cases ====================================================================================
# {name: options}: a run in a folder of that name, whose options win over the common ones.

COMMON = """--dataset shapes --subset 400 --val-size 40 --eval-subset 40 --student tiny
--teacher-arch tiny_wide --epochs 2 --steps 2 --step-size 2/255 --batch-size 50 --lr 0.05
--device cpu --amp off --attacks clean,pgd --no-figures --no-progress"""
GIVEN = "--teacher teacher/best.pt --teacher-nat teacher-nat/best.pt"
TEACHERS = {  # without validation images `best` is the last epoch
    "teacher": "--framework trades --no-infoard --student tiny_wide --epochs 20 --val-size 0",
    "teacher-nat": "--framework natural --student tiny_wide --epochs 10 --val-size 0",
}
HERE = "clean,fgsm,pgd,cw,apgd"
THERE = "clean,bim,mifgsm,mifgsm_t,pgd_t,pgd_l2,pgd_l2_t,pgd5_cw,spatial,corrupt"
CORRUPTIONS = "noise,shot,impulse,blur,bright,contrast,pixelate,jpeg"
CASES = {  # by rslad where no framework is named
    "attacks-here": f"--attacks {HERE}",
    "attacks-there": f"--attacks {THERE}",
    "transfer": "--transfer --attacks clean,pgd,cw,pgd_l2",
    "steps-lo": "--steps 4 --steps-lo 1",
    "terms": "--w-att 0.1 --w-rel 0.1",
    "attention": "--w-att 0.1 --w-feat 0",
    "critics": "--critic-dim 16 --tau 0.5 --w-feat 0.3 --lam-lo 0.5 --lam-hi 2",
    "numbers": "--alpha 0.5 --seed 3 --eps 4/255 --step-size 0.01 --weight-decay 0 --val-size 0",
    "ema": "--ema 0.9",
    "bf16": "--amp bf16",
    "bf16-terms": "--amp bf16 --w-att 0.1 --w-rel 0.1 --steps-lo 1",
    "kl-mean": "--kl-reduction mean",
    "schedule": "--schedule 1",
    "batch-of-one": "--batch-size 359 --epochs 1",
    "lite": "--lite",
    "trades-options": "--framework trades --beta 3",
    "ard-options": "--framework ard --alpha 0.5 --temperature 3 --kl-reduction mean",
    "iad-options": "--framework iad --beta 0.2 --temperature 2",
    "adaad-options": "--framework adaad --alpha 0.7 --steps 4 --steps-lo 1",
    "igdm-options": "--framework igdm --alpha 3 --amp bf16",
    "saad-options": "--framework saad --beta 0.5 --alpha 2 --steps 4 --steps-lo 1",
    "autoencoder": "--framework autoencoder",
    "estimators": "--framework estimators",
    "estimators-options": "--framework estimators --mi-train difference --mi-bound jsd",
    "ranks-rslad": "--framework rslad --w-att 0.1 --w-rel 0.1",
    "ranks-mtard": "--framework mtard --no-infoard",
    "ranks-saad": "--framework saad --no-infoard --beta 0.5",
}
STOPPED = "--framework mtard --asa shuffled --ema 0.9 --steps 30 --batch-size 20"
CASES["uninterrupted"] = STOPPED
CASES["resumed"] = f"{STOPPED} --resume"
for framework in "natural at trades ard rslad iad adaad mtard igdm saad".split():
    CASES[f"{framework}-plain"] = f"--framework {framework} --no-infoard"
    CASES[f"{framework}-infoard"] = f"--framework {framework}"
for asa in "student gap uniform shuffled off".split():
    CASES[f"asa-{asa}"] = f"--asa {asa}"
    CASES[f"asa-{asa}-steps-lo"] = f"--asa {asa} --steps 4 --steps-lo 1"
for mim in "dv nwj jsd vid unpaired off".split():
    CASES[f"mim-{mim}"] = f"--mim {mim} --w-att 0.1"
for net in "resnet18 preact_resnet18 mobilenet_v2 wrn_10_1 wrn_10_1_silu".split():
    short = "--subset 60 --batch-size 30 --epochs 1 --attacks clean,fgsm --eval-subset 20"
    CASES[net] = f"--student {net} {short}"

OWN = {  # one after the other: they train teachers of their own, and share them in runs/teachers
    "own-teacher": "--teacher-epochs 12",
    "own-teachers": "--framework mtard --teacher-epochs 12",
    "namid": "--framework namid --teacher-epochs 12",
    "namid-options": "--framework namid --teacher-epochs 12 --alpha 5 --mi-ramp 0 --mi-lambda 0.5",
    "namid-trades": "--framework namid_trades --teacher-epochs 12 --beta 3",
    "mid": "--framework mid --teacher-epochs 6 --epochs 1 --transfer --attacks clean,pgd,pgd_l2",
    "mid-pool": "--framework mid --teacher-epochs 6 --epochs 1 --pool clean,fgsm,bim,spatial,cw",
    "mid-transfer": "--framework mid_transfer --teacher-epochs 6 --epochs 1 --ema 0.9",
}
EVALS = {  # of the robust teacher, on which no attack is at its end
    "eval": f"--attacks {HERE}",
    "eval-there": f"--attacks {THERE} --eps 4/255 --eval-batch 32",
    "eval-corruptions": f"--attacks {CORRUPTIONS} --seed 5",
    "eval-aa": "--attacks clean,pgd,aa --eval-subset 10",
    "eval-transfer": "--attacks clean,pgd,apgd --teacher-nat teacher-nat/best.pt",
}


# ==== 2. Running them =============================================================================
def command(infoard: Path, name: str) -> list[str]:
    """The command line of a case, but for --out."""
    python = [sys.executable]
    if name.startswith("ranks-"):
        python += "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    if name in EVALS:
        options = f"eval evaluated.pt --device cpu --eval-subset 100 {EVALS[name]}"
    elif name in TEACHERS:
        options = f"{COMMON} {TEACHERS[name]}"
    elif name in OWN:
        options = f"{COMMON} --val-size 0 {OWN[name]}"
    else:
        options = f"{COMMON} {GIVEN} {CASES[name]}"
    return [*python, str(infoard), *options.split()]


def start(words: list[str], folder: Path, out: str) -> subprocess.Popen:
    """Starts a run in folder/out; what it prints goes to a file beside that."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}
    with open(folder / f"{out}.txt", "w") as text:
        return subprocess.Popen(
            [*words, "--out", out], cwd=folder, env=env, stdout=text, stderr=text
        )


def run_chain(names, infoard: Path, folder: Path) -> None:
    """Runs cases one after the other."""
    for name in names:
        began = time.time()
        code = start(command(infoard, name), folder, name).wait()
        print(f"{name}: exit code {code} after {time.time() - began:.1f} s", flush=True)


def stop_midway(infoard: Path, folder: Path) -> None:
    """Begins the case `resumed` in folder/stopped, and stops it in its second epoch."""
    process = start(command(infoard, "resumed"), folder, "stopped")
    while process.poll() is None and not (folder / "stopped/log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # for some steps
    process.send_signal(signal.SIGTERM)
    print(f"stopped: exit code {process.wait()}")
    at = torch.load(folder / "stopped/last.pt", weights_only=True)["at"]
    if at["position"] == 0:
        raise SystemExit(f"error: not stopped within an epoch, see {folder / 'stopped.txt'}")


def go_on(infoard: Path, folder: Path, old: Path) -> None:
    """Makes the case `resumed` beside the nets of old, whose hashes the stopped run knows."""
    with tempfile.TemporaryDirectory() as there:
        for name in TEACHERS:
            shutil.copytree(old / name, Path(there, name))
        shutil.copytree(old / "stopped", Path(there, "resumed"))
        run_chain(["resumed"], infoard, Path(there))
        shutil.move(Path(there, "resumed"), folder)


def run_all(infoard: Path, folder: Path, old: Path, only: tuple[str, ...]) -> None:
    """Runs the teachers, then, two at a time, the cases whose names begin with a word of only.

    What is evaluated and what is resumed lies in old, an earlier such folder or this one.
    """
    run = partial(run_chain, infoard=infoard, folder=folder)
    run(TEACHERS)
    shutil.copy(old / "teacher/best.pt", folder / "evaluated.pt")
    if "resumed".startswith(only):
        if old == folder:
            stop_midway(infoard, folder)
        go_on(infoard, folder, old)
    chains = [[name for name in OWN if name.startswith(only)]]
    others = [name for name in [*CASES, *EVALS] if name != "resumed"]
    chains += [[name] for name in others if name.startswith(only)]
    with ThreadPool(2) as pool:
        pool.map(run, chains, chunksize=1)


# ==== 3. Fingerprints =============================================================================
# Times, paths and words, which are no numbers of a run.
APART = ("seconds images_per_s checkpoint settings about notes checkpoint_sha256 precision").split()


def leaves(value, path: str) -> dict:
    """What nested dicts and lists hold, as {path: number, text or, of a tensor, hash}."""
    if isinstance(value, torch.Tensor):
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        kind = f"{value.dtype} {list(value.shape)} ".encode()
        return {path: hashlib.sha256(kind + content).hexdigest()}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    found = {}
    for name, inner in value.items():
        if name not in APART:
            found |= leaves(inner, f"{path} {name}")
    return found


def fingerprint(run: Path) -> dict:
    """What the files of a finished run hold, but for times and paths; of another, nothing."""
    results = [run / name for name in ("results.json", "eval.json") if (run / name).exists()]
    if not results:
        return {}
    tree = {path.name: json.loads(path.read_text()) for path in results}
    if (run / "last.pt").exists():
        last = torch.load(run / "last.pt", weights_only=True)
        rows = (run / "log.jsonl").read_text().splitlines()
        tree["log.jsonl"] = [json.loads(row) for row in rows]
        tree["last.pt"] = {k: last.get(k, {}) for k in ("model", "critics", "ema", "generators")}
        tree["last.pt"]["generators"].pop("rule", None)  # earlier versions had none
        tree["momentum"] = last["optimizer"]["state"]
        tree["best.pt"] = torch.load(run / "best.pt", weights_only=True)["model"]
    return leaves(tree, "")


def fingerprints(folder: Path) -> dict[str, dict]:
    """Those of all runs in a folder, and of the teachers that they have trained."""
    found = {}
    for run in sorted(folder.iterdir()):
        if run.is_dir() and run.name not in ("runs", "stopped"):  # where that stopped is chance
            found[run.name] = fingerprint(run)
    for run in sorted(folder.glob("runs/teachers/*")):
        name = run.name.rpartition("-")[0]  # without the key of its settings
        found[f"runs/teachers/{name}"] = fingerprint(run)
    return found


def report(name: str, old: dict, new: dict) -> bool:
    """Prints `same`, or what of a case differs; says whether it is the same.

    What the old files have no name for, a column that was added since, is counted apart.
    """
    lines = []
    added = [path for path in new if old and path not in old and new[path] is not None]
    for path in old | new:
        before = repr(old.get(path))  # an attack that was not run is null or missing
        after = repr(new.get(path))
        if before != after and path not in added:
            lines.append(f"   {path}: {before[:20]} -> {after[:20]}")
    if not new:
        print(f"{name}: failed")
    elif lines:
        print(f"{name}: {len(lines)} of {len(old | new)} differ", *lines[:12], sep="\n")
    else:
        print(f"{name}: same" + (f", and {len(added)} new" if added else ""))
    return bool(new) and not lines


# ==== 4. Command line =============================================================================
def main() -> int:
    """Runs, writes, compares; 1 if anything has failed or differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("infoard", type=Path, help="the file to run")
    parser.add_argument("--out", type=Path, required=True, help="the fingerprints, .json")
    parser.add_argument("--against", type=Path, help="fingerprints to compare with")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, to be kept")
    parser.add_argument("--old", type=Path, help="a kept folder whose checkpoints are read")
    parser.add_argument("--only", default="", help="how names of cases begin, with commas")
    args = parser.parse_args()
    if not args.infoard.is_file() or (args.keep and args.keep.exists()):
        parser.error("the file must be there, and the folder --keep must not")

    folder = args.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    run_all(args.infoard.resolve(), folder, args.old or folder, tuple(args.only.split(",")))
    found = fingerprints(folder)
    args.out.write_text(json.dumps(found, indent=0) + "\n")
    if not args.keep:
        shutil.rmtree(folder)

    same = [all(found.values())]  # none has failed
    if args.against:
        kept = json.loads(args.against.read_text())
        for name in found if args.only else kept | found:
            same.append(report(name, kept.get(name, {}), found.get(name, {})))
    if "uninterrupted" in found and "resumed" in found:
        same.append(report("resumed = uninterrupted", found["uninterrupted"], found["resumed"]))
    return 0 if all(same) else 1


if __name__ == "__main__":
    raise SystemExit(main())
