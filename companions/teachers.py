"""The nets beside a student: those that are given are checked, a missing one is trained and kept.

infoard.get_nets asks for them here. What is trained lies in runs/teachers, in a folder for each
choice of settings, and all runs that need the same one share it. Alone, infoard.py trains a teacher
for each run.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

import infoard as I
from companions import evaluation, options, own, runs


def trained(cfg: I.Config, framework: str, arch: str, teacher: str | None = None, **more) -> str:
    """best.pt of a net that is trained once with these settings, and then kept."""
    same = "dataset data_dir subset val_size image_size eps steps step_size lr amp batch_size"
    made = {name: getattr(cfg, name) for name in same.split()}
    made.update(student=arch, framework=framework, epochs=cfg.teacher_epochs, **more)
    if framework in ("autoencoder", "natural") and cfg.framework != "mtard":
        made["seed"] = 99  # no student of the tables begins with it
    by = ""
    if teacher:
        by = own.digest(teacher) or teacher
    key = hashlib.sha256((json.dumps(made) + by).encode()).hexdigest()[:8]
    out = Path(f"runs/teachers/{cfg.dataset}-{arch}-{framework}-{key}")
    out = runs.teacher_folder(out, cfg)
    if not (out / "results.json").exists():
        print(f"training by {framework} what is missing, kept in {out}")
        made.update({name: getattr(cfg, name) for name in ("download", "device", "eval_subset")})
        names = I.get_framework(framework).options
        settings = {name: made.pop(name) for name in names if name in made}
        made.update(own=settings, teacher=teacher, out=str(out), attacks="clean,pgd", resume=True)
        I.train(infoard=False, figures=False, flip=cfg.flip, **made)
    return f"{out}/best.pt"


def get_nets(cfg: I.Config, data: I.Data, device: torch.device) -> dict:
    """The nets beside the student, as in infoard.Step, each checked, and trained if not given."""
    needs, classes = I.get_framework(cfg.framework).needs, len(data.classes)
    usual = replace(cfg, teacher=None).resolved().teacher_arch
    arch, plain = cfg.teacher_arch, (cfg.teacher_arch or usual).removesuffix("_ae")
    paths = {}
    asked = cfg.infoard and options.asks_teacher(cfg)
    if asked or cfg.plus or "teacher" in needs:
        path = cfg.teacher or trained(cfg, cfg.teacher_framework, arch or usual)
        paths["teacher"] = path, arch
    if cfg.transfer or "teacher_nat" in needs:
        path = cfg.teacher_nat or trained(cfg, "natural", plain)
        paths["teacher_nat"] = path, arch and plain
    nets, images = {"teacher": None}, I.test_images(data, 1000, device)
    benchmark = cfg.benchmark or cfg.dataset
    how = {"size": data.x_train.shape[-1], "norm": cfg.teacher_norm, "dataset": benchmark}
    for name, (path, named) in paths.items():
        nets[name] = I.load_teacher(path, named, classes, device=device, **how)
        runs.same_classes(path, nets[name], data)
        evaluation.check_teacher(nets[name], *images, path, classes)
    return nets
