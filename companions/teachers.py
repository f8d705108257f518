"""The nets beside a student: those that are given are checked, a missing one is trained and kept.

infoard.get_nets asks for them here. What infoard.trained makes lies in runs/teachers, in a folder
for each choice of settings, and all runs that need the same one share it.
"""

from dataclasses import replace

import torch

import infoard as I
from companions import evaluation, identity, options


def get_nets(cfg: I.Config, data: I.Data, device: torch.device) -> dict:
    """The nets beside the student, as in infoard.Step, each checked, and trained if not given."""
    needs, classes = I.get_framework(cfg.framework).needs, len(data.classes)
    usual = replace(cfg, teacher=None).resolved().teacher_arch
    arch, plain = cfg.teacher_arch, (cfg.teacher_arch or usual).removesuffix("_ae")
    paths = {}
    asked = cfg.infoard and options.asks_teacher(cfg)
    if asked or cfg.plus or "teacher" in needs:
        path = cfg.teacher or I.trained(cfg, cfg.teacher_framework, arch or usual)
        paths["teacher"] = path, arch
    if cfg.transfer or "teacher_nat" in needs:
        path = cfg.teacher_nat or I.trained(cfg, "natural", plain)
        paths["teacher_nat"] = path, arch and plain
    nets, images = {"teacher": None}, I.test_images(data, 1000, device)
    benchmark = cfg.benchmark or cfg.dataset
    how = {"size": data.x_train.shape[-1], "dataset": benchmark, "device": device}
    norms = {"teacher": cfg.teacher_norm, "teacher_nat": cfg.teacher_nat_norm}
    for name, (path, named) in paths.items():
        if name == "teacher_nat" and cfg.teacher_nat:
            print("the natural net, whose normalisation is --teacher-nat-norm:")
        nets[name] = I.load_teacher(path, named, classes, norm=norms[name], **how)
        identity.same_classes(path, nets[name], data)
        nets[name].file = path
        by = I.flag_of(f"{name}_norm")
        evaluation.check_teacher(nets[name], *images, path, classes, by)
    return nets
