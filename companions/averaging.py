"""Averages of a student's weights, which are evaluated in its place and beside it.

    python infoard.py --ema 0.995 --ema-ramp     exponential, as it is used in adversarial training
    python infoard.py --swa 95                   equal, of the ends of epoch 95 and those after it

    ema       w <- d w + (1-d) v after each step; v: the weights, batch norm's statistics among them
    ema-ramp  the same of the weights alone, with d = 0 in the first 2.5% of the steps, and then
              min(D, (1+t)/(10+t)), t steps later; batch norm's statistics are the student's
    swa       w <- the mean of v over the ends of epochs; batch norm's statistics are measured anew
              on the training images, augmented and not attacked; before that epoch w = v

What is averaged is what the validation looks at, `best` and `last` hold, and load_own() loads;
results.json has the student as it is after the last epoch as `raw`. Averages, and the measurement
of statistics, are torch.optim.swa_utils'.

[EMA] Gowal et al., 2010.03593; the ramp: its reimplementation in DM-Improves-AT, 2302.04638
[SWA] 1803.05407; in adversarial training: Chen et al., ICLR 2021 (robust overfitting)
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import infoard as I

WARM_UP = 0.025  # the share of training in which --ema-ramp does not average yet


def check(cfg: I.Config) -> None:
    """One line for settings of averages that make no sense together."""
    I.require(not (cfg.ema and cfg.swa), "--ema and --swa are two averages: choose one")
    I.require(cfg.ema or not cfg.ema_ramp, "--ema-ramp is of --ema: add --ema 0.995")
    told = "--ema 1 stays at the weights of the first step: choose a decay below 1, such as 0.995"
    I.require(cfg.ema < 1 or cfg.ema_ramp, told)
    told = "--swa and --framework estimators: batch norm of its critics could not be measured anew"
    I.require(not cfg.swa or cfg.framework != "estimators", told)
    told = f"--swa {cfg.swa} is past the last epoch, {cfg.epochs}: nothing would be averaged"
    I.require(cfg.swa <= cfg.epochs, told)


# ==== 1. The exponential average with a ramp ======================================================


def decay_at(step: int, steps: int, limit: float) -> float:
    """The decay in a step, counted from 1, of a training of so many steps.

    d = 0 while step < 0.025 steps, then min(limit, (1+t)/(10+t)), t = step - 0.025 steps
    """
    later = step - WARM_UP * steps
    if later < 0:
        return 0.0
    return min(limit, (1 + later) / (10 + later))


def steps_of(run: I.Run) -> int:
    """The steps of a whole training."""
    per_epoch = -(-len(run.train) // run.cfg.batch_size)
    return run.cfg.epochs * per_epoch


def average_of(run: I.Run) -> AveragedModel:
    """The module that holds the average of a run's student, by --swa, --ema or --ema-ramp."""
    if run.cfg.swa:
        return AveragedModel(run.student)
    if not run.cfg.ema_ramp:
        fixed = get_ema_multi_avg_fn(run.cfg.ema)
        return AveragedModel(run.student, multi_avg_fn=fixed, use_buffers=True)

    def average(averaged: list[Tensor], current: list[Tensor], number: Tensor) -> None:
        decay = decay_at(run.at.step, steps_of(run), run.cfg.ema)
        get_ema_multi_avg_fn(decay)(averaged, current, number)

    return AveragedModel(run.student, multi_avg_fn=average)


# ==== 2. The equal average ========================================================================


def training_batches(run: I.Run):
    """Batches [B/ranks,3,H,W] as training draws them, the same in every call: an epoch of them.

    They leave the run's own generator as it is. A last, smaller batch is left out.
    """
    own = run.generators["data"]
    size = run.cfg.batch_size
    try:
        run.generators["data"] = torch.Generator().manual_seed(run.cfg.seed)
        order = torch.randperm(len(run.train), generator=run.generators["data"])
        rows = run.train[order]
        for i in range(0, max(1, len(rows) - size + 1), size):
            batch = rows[i : i + size]
            equal = batch[: len(batch) // run.ranks * run.ranks]
            x, _ = I.draw(run, equal[run.rank :: run.ranks])
            yield x
    finally:
        run.generators["data"] = own


def measure_statistics(run: I.Run) -> None:
    """Batch norm's statistics of the evaluated net, from training images; ranks share the work.

    In fp32, as the evaluation at the end.
    """
    update_bn(training_batches(run), run.evaluated)
    if run.ranks > 1:
        for buffer in run.evaluated.buffers():
            if buffer.is_floating_point():
                buffer.copy_(I.all_reduce_sum(buffer) / run.ranks)


def end_epoch(run: I.Run) -> None:
    """The average after an epoch, as validation is to see it."""
    average = run.parts["ema"]
    if run.at.epoch <= run.cfg.swa:
        average.n_averaged.zero_()  # the next update is a copy
    average.update_parameters(run.student)
    if run.at.epoch == run.cfg.swa:
        run.at.best = -1.0  # of students that were not averaged none is chosen
    if run.at.epoch >= run.cfg.swa:
        measure_statistics(run)


# ==== 3. The net beside its average ===============================================================


def add_raw(run: I.Run, results: dict) -> None:
    """Adds `raw`, the student itself after the last epoch, to the results, and prints it."""
    for buffer in run.student.buffers() if run.ranks > 1 else ():
        dist.broadcast(buffer, 0)  # batch norm's are rank 0's
    raw = I.evaluated(run.cfg, run.student, run.data, run.device)
    results["raw"] = raw | {"epoch": run.at.epoch}
    I.report(f"{Path(run.cfg.out).name} raw, without averaging", results["raw"])
