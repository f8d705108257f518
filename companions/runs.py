"""What surrounds a training: may it go on, can it end well, where was it made.

infoard.train asks for these by name. Alone it goes on from exactly the settings with which a run
was begun, and keeps nothing but these.
"""

import importlib
import sys
from dataclasses import asdict

import torch

import infoard as I
from companions import options

# What a run may be resumed with another value of: its machine, its files, its evaluation.
FREE = (
    "device out resume figures progress attacks eval_subset eval_batch data_dir download compile "
    "fast transfer"
).split()
OF_INFOARD = "asa lam_lo lam_hi steps_lo mim w_feat w_att w_rel tau taps".split()


def same_settings(old: dict, cfg: I.Config) -> None:
    """One line, if a run was begun with other settings than these, those of FREE apart."""
    free = FREE if cfg.infoard else FREE + OF_INFOARD
    old = {**asdict(I.Config()), **old}  # what was no option then
    for name, value in cfg.own.items():  # settings of the framework, which once stood beside them
        old[name] = old["own"].get(name, old.get(name, value))
    new = {name: value for name, value in asdict(cfg).items() if name != "own"} | cfg.own
    for name, value in new.items():
        told = f"{cfg.out} was made with {I.flag_of(name)} {old[name]}, not {value}"
        I.require(name in free or old[name] == value, f"{told}: choose another --out")


def check_possible(cfg: I.Config, device: torch.device) -> None:
    """One line for what would fail only after hours, and one for each option of no effect."""
    if I.world()[0] == 0:
        for line in options.remarks(cfg):
            print(line)
    ranks = I.world()[1]
    told = f"--batch-size must be a multiple of {ranks}, the ranks"
    I.require(cfg.batch_size % ranks == 0, told)
    I.require(not cfg.sync_bn or device.type == "cuda", "--sync-bn needs CUDA")
    if cfg.figures:
        importlib.import_module("matplotlib")
    if ":" not in cfg.student:
        with torch.device("meta"):
            I.build_model(cfg.student)


def provenance(cfg: I.Config, device: torch.device) -> dict:
    """Where and by what a run is made, for its config.json."""
    return {
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": sys.platform,
        "ranks": I.world()[1],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "source_sha256": I.digest(I.__file__),
        "teacher_sha256": I.digest(cfg.teacher or ""),
    }
