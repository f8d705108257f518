"""Whether a device agrees with the CPU: single steps of every framework, and CUDA graphs.

A step is made on the CPU and on the device, from the same attack starts: the loss of each, then the
loss and the gradient on the x' that the CPU has found, as an attack may turn a rounding error into
a pixel. And some steps are made with a CUDA graph and without. companions/gpu.py asks for both.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import infoard as I
from companions import bench
from companions.evaluation import exact_fp32

LIMITS = {  # of relative differences: double and single precision; TF32 is measured, not judged
    "float64": (torch.float64, 1e-9),
    "float32": (torch.float32, 1e-3),
    "tf32": (torch.float32, float("inf")),
}


def little_nets() -> list[nn.Module]:
    """Student, teacher and undefended teacher that differ from their initial values."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        nets = [I.build_model(name) for name in ("tiny", "tiny_wide", "tiny_wide")]
        for net in nets:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.3, 0.3)
                    module.running_var.uniform_(0.5, 1.5)
            net.linear.weight.data.mul_(8)  # confident
    return nets


def flat(tensors) -> Tensor:
    """All of them in one vector of doubles on the CPU."""
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])


@contextlib.contextmanager
def same_attacks(given: list[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, attacks start from numbers that the CPU has drawn, or give what is given instead; the
    list has what they gave.
    """
    made, pgd = [], I.pgd

    def attack(objective, x, *, init, generator=None, **options) -> Tensor:
        if given:
            x_adv = given[len(made)].to(x)
        else:
            start = I.starting_point(x.cpu(), torch.tensor(0.03, dtype=x.dtype), init, drawn)
            x_adv = pgd(objective, x, init=start.to(x), **options)
        made.append(x_adv.detach())
        return x_adv

    drawn = torch.Generator().manual_seed(0)
    with mock.patch.object(I, "pgd", attack):
        yield made


def one_step(framework: str, lifted: bool, dtype, device: str, memory, given=()) -> tuple:
    """(loss, gradient of all that learns, attacked images) of a step, as doubles on the CPU."""
    nets = [net.to(device, dtype, memory_format=memory) for net in little_nets()]
    student, teacher, natural = nets[0].train(), nets[1].eval(), nets[2].eval()
    settings = {"framework": framework, "infoard": lifted, "teacher": "given", "steps": 3}
    cfg = I.Config(student="tiny", steps_lo=1 if lifted else 0, **settings).resolved()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(16, 3, 32, 32, generator=generator, dtype=torch.float64)
    x = x.to(device, dtype, memory_format=memory)
    y = torch.randint(10, (16,), generator=generator).to(device)
    info, learners = None, list(student.parameters())
    if lifted:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(1)
            info = I.InfoARD(student.float(), teacher.float(), w_att=0.05, w_rel=0.1)
        for net in (student, teacher, info):
            net.to(dtype)
        learners += info.parameters()
    step = I.Step(student, teacher, x, y, cfg, info, natural, progress=0.5)
    with same_attacks(list(given)) as attacked:
        loss = step.loss()
    grads = torch.autograd.grad(loss, learners, allow_unused=True)
    whole = flat(g for g in grads if g is not None)
    return flat([loss]), whole, [x_adv.double().cpu() for x_adv in attacked]


def compared(framework: str, lifted: bool, precision: str, device: str) -> dict:
    """How far the device is from the CPU, relative; pixels: the share of x' that differs."""
    dtype, _ = LIMITS[precision]
    with exact_fp32(precision != "tf32"):
        return differences(framework, lifted, dtype, device)


def differences(framework: str, lifted: bool, dtype: torch.dtype, device: str) -> dict:
    """Those of compared, in the precision that the device is set to."""
    here = partial(one_step, framework, lifted, dtype, "cpu", torch.contiguous_format)
    there = partial(one_step, framework, lifted, dtype, device, torch.channels_last)
    loss, grad, x_adv = here()
    own_loss, _, own_x_adv = there()
    same_loss, same_grad, _ = there(x_adv)
    size = loss.abs()
    gaps = [(a - b).abs() > 1e-5 for a, b in zip(x_adv, own_x_adv, strict=True)]
    return {
        "loss": ((own_loss - loss).abs() / size).item(),
        "same loss": ((same_loss - loss).abs() / size).item(),
        "same gradient": ((same_grad - grad).norm() / grad.norm()).item(),
        "pixels": torch.stack(gaps).double().mean().item() if gaps else 0.0,
    }


def replayed(framework: str, device: str) -> dict:
    """Six steps, from the fourth on as a CUDA graph, beside six without: the gap of the weights."""
    weights = []
    for whole in (True, False):
        given = {"framework": framework, "teacher": "given", "student": "tiny", "steps": 2}
        cfg = I.Config(**given, batch_size=16, val_size=0, amp="bf16", device=device).resolved()
        teacher = little_nets()[1].to(device).eval().requires_grad_(False)
        run = I.Run(cfg, bench.random_data(34, 32), I.pick_device(device), {"teacher": teacher})
        recorded = run.learn
        if not whole:
            run.learn = partial(I.learn, run)
        for i in range(6):
            I.train_step(run, run.train[i : i + 16], i / 6)
        weights.append(flat(run.student.parameters()))
        if whole:
            was_recorded = getattr(recorded, "graph", None) is not None
    gap = (weights[0] - weights[1]).norm() / weights[1].norm()
    return {"recorded": was_recorded, "gap": gap.item()}
