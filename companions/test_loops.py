"""What holds for InfoARD in loops of other people: passes in any order, many ranks, half precision,
averages of weights, torch.compile. The patch is the README's own.
"""

import contextlib
import copy
import gc
import socket
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import infoard as I
from test_infoard import PATCH, ROOT, begin_fork, end_fork, make_info, near, pair, rand, rng

each = pytest.mark.parametrize


def loop(b=6):
    """(info, student and teacher in eval mode, x, x_adv, y): what a loop has before its loss."""
    student, teacher, x, y = pair(b)
    info = make_info(student.eval(), teacher, w_att=0.1, w_rel=0.1)
    x_adv = (x + 0.02 * torch.randn(x.shape, generator=rng(1))).clamp(0, 1)
    return info, student, teacher, x, x_adv, y


def gradients(info, student, loss):
    """The gradients of a loss in student and critics, [N]."""
    learners = [*student[:-1].parameters(), *info.parameters()]
    grads = torch.autograd.grad(loss, learners, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


# ==== 1. Passes in any order ======================================================================


def plain(student, teacher, x, x_adv):
    teacher(x)
    student(x_adv)


def clean_pass_last(student, teacher, x, x_adv):
    teacher(x)
    student(x_adv)
    student(x)


def clean_pass_first(student, teacher, x, x_adv):
    student(x)
    student(x_adv)
    teacher(x)


def teacher_on_both(student, teacher, x, x_adv):
    with torch.no_grad():
        teacher(x)
        teacher(x_adv)
    student(x_adv)


def teacher_in_the_attack(student, teacher, x, x_adv):
    """As AdaAD's attack, which climbs through the teacher."""
    teacher(x)
    z = x.clone()
    for _ in range(7):
        z = z.detach().requires_grad_()
        objective = I.kl(teacher(z), student(z)).sum()
        z = z + 0.01 * torch.autograd.grad(objective, z)[0].sign()
    student(x_adv)


def teacher_asked_often_without_a_graph(student, teacher, x, x_adv):
    with torch.no_grad():
        teacher(x)
        for i in range(9):
            teacher(x + i / 255)
    student(x_adv)


def twice(student, teacher, x, x_adv):
    student(x_adv)
    teacher(x)
    student(x_adv)


def looked_at_before_the_loss(student, teacher, x, x_adv):
    """As a loop does that counts what is right."""
    teacher(x)
    student(x_adv)
    with torch.no_grad():
        student(x_adv)


def teacher_in_inference_mode(student, teacher, x, x_adv):
    student(x_adv)
    with torch.inference_mode():
        teacher(x)


def by_keyword(student, teacher, x, x_adv):
    teacher(input=x)
    student(input=x_adv)


LOOPS = [
    clean_pass_last,
    clean_pass_first,
    teacher_on_both,
    teacher_in_the_attack,
    teacher_asked_often_without_a_graph,
    twice,
    looked_at_before_the_loss,
    teacher_in_inference_mode,
    by_keyword,
]


@each("passes", LOOPS, ids=lambda passes: passes.__name__)
def test_the_passes_that_are_named_are_compared_whatever_else_is_passed(passes):
    info, student, teacher, x, x_adv, _ = loop()
    plain(student, teacher, x, x_adv)
    loss = info.loss(x_adv, x)
    truth = gradients(info, student, loss)
    assert not torch.equal(x, x_adv) and truth.any()
    passes(student, teacher, x, x_adv)
    again = info.loss(x_adv, x)
    near(again, loss, 0.0)
    near(gradients(info, student, again), truth, 0.0)


def test_other_passes_would_give_another_loss():
    info, student, teacher, x, x_adv, _ = loop()
    plain(student, teacher, x, x_adv)
    student(x)
    assert info.loss(x_adv, x) != info.loss(x, x)


@each("wrong", ["clone", "swapped", "earlier", "requires_grad"])
def test_a_pass_that_was_not_made_is_one_line(wrong):
    info, student, teacher, x, x_adv, _ = loop()
    plain(student, teacher, x, x_adv)
    if wrong == "clone":
        x_adv = x_adv.clone()
    elif wrong == "swapped":
        x, x_adv = x_adv, x
    elif wrong == "earlier":  # the step before has ended
        info.loss(x_adv, x).backward()
    else:
        x_adv = x_adv.clone().requires_grad_()
        student(x_adv)
        student(x)
    with pytest.raises(I.InfoardError, match="no pass of the student on this tensor"):
        info.loss(x_adv, x)


def test_what_cannot_be_compared_is_one_line():
    info, student, teacher, x, x_adv, _ = loop()
    with torch.no_grad():
        student(x_adv)
        teacher(x)
        assert info.loss(x_adv, x).isfinite()  # to be looked at, not learned from
    with pytest.raises(I.InfoardError, match="no graph"):
        info.loss(x_adv, x)
    few = x[:3].clone()
    teacher(few)
    student(x_adv)
    with pytest.raises(I.InfoardError, match="x_adv are 6 images, x are 3"):
        info.loss(x_adv, few)


def test_two_attacks_share_a_pass_of_the_teacher():
    info, student, teacher, x, x_adv, _ = loop()
    other = (x + 0.02).clamp(0, 1)
    plain(student, teacher, x, x_adv)
    student(other)
    both = info.loss(x_adv, x) + info.loss(other, x)
    plain(student, teacher, x, x_adv)
    first = info.loss(x_adv, x)
    plain(student, teacher, x, other)
    near(both, first + info.loss(other, x), 1e-6)


def test_accumulated_gradients_are_the_sum_of_their_parts():
    info, student, teacher, *_ = loop()
    truth = []
    batches = [rand(2, 4, 3, 16, 16, seed=seed).float().unbind() for seed in (1, 2)]
    for x, x_adv in batches:
        plain(student, teacher, x, x_adv)
        truth.append(gradients(info, student, info.loss(x_adv, x)))
    for x, x_adv in batches:
        plain(student, teacher, x, x_adv)
        info.loss(x_adv, x).backward()
    learners = [*student[:-1].parameters(), *info.parameters()]
    summed = torch.cat([p.grad.flatten() for p in learners])
    near(summed, sum(truth), 1e-6)


# ==== 2. Memory ===================================================================================


def test_no_features_and_no_graph_outlive_backward():
    info, student, teacher, x, x_adv, _ = loop()
    kept = []

    def note(module, inputs, output):
        kept.append(weakref.ref(output))

    student.layer3.register_forward_hook(note)
    teacher.layer3.register_forward_hook(note)
    teacher_in_the_attack(student, teacher, x, x_adv)
    student(x)
    loss = info.loss(x_adv, x)
    assert any(f() is not None for f in kept)
    loss.backward()
    del loss
    gc.collect()
    assert len(kept) > 16 and all(f() is None for f in kept)


def test_passes_that_are_never_asked_for_do_not_pile_up():
    info, student, teacher, x, x_adv, _ = loop()
    images = [x + i / 255 for i in range(12)]
    for z in images:
        student(z)
    assert len(info.student_taps.passes) == 4
    del images, z
    with torch.no_grad():  # of images that are gone nobody can ask
        for i in range(12):
            teacher(x + i / 255)
    assert len(info.teacher_taps.passes) <= 1


def test_copies_of_a_net_are_deaf_and_can_be_made_within_a_step():
    info, student, teacher, x, x_adv, _ = loop()
    plain(student, teacher, x, x_adv)
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    twin = copy.deepcopy(student)
    loss = info.loss(x_adv, x)
    ema(x_adv)
    near(twin(x_adv), student(x_adv), 0.0)
    near(info.loss(x_adv, x), loss, 0.0)
    ema.update_parameters(student)
    for net in (ema.module, twin):
        for module in net.modules():
            for hook in module._forward_hooks.values():
                taps = getattr(hook, "__self__", None) or hook.func.__self__
                assert taps is not info.student_taps and taps.maps is None


# ==== 3. Half precision, compiled nets, frameworks of this program ================================


def test_half_precision_compares_the_same():
    info, student, teacher, x, x_adv, _ = loop(b=16)
    plain(student, teacher, x, x_adv)
    truth = info.loss(x_adv, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain(student, teacher, x, x_adv)
        loss = info.loss(x_adv, x)
    assert loss.dtype == torch.float32
    near(loss, truth, 0.02)  # bf16 keeps 8 bits
    assert gradients(info, student, loss).isfinite().all()


@each("when", ["before", "after"])
def test_compiled_nets_are_heard_and_compiled_once(when):
    info, student, teacher, x, x_adv, _ = loop()
    plain(student, teacher, x, x_adv)
    truth = info.loss(x_adv, x)
    counter = CompileCounter()
    compiled = torch.compile(student, backend=counter)
    if when == "before":  # InfoARD gets the compiled net
        critics = info.critics
        info.student_taps.close()
        info = make_info(compiled, teacher, w_att=0.1, w_rel=0.1)
        info.critics = critics
    for _ in range(2):
        for _ in range(4):
            plain(compiled, teacher, x, x_adv)
            compiled(x)
            near(info.loss(x_adv, x), truth, 1e-5)
        info.loss(x_adv, x).backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_net_that_was_compiled_too_early_is_one_line():
    student, teacher, x, _ = pair()
    compiled = torch.compile(student, backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        compiled(x)
        info = make_info(student, teacher)
        compiled(x)
        teacher(x)
        with contextlib.suppress(I.InfoardError):
            info.loss(x, x)
            raise AssertionError("the hooks of a compiled net were not heard, nor missed")
    torch._dynamo.reset()


# ==== 4. A stranger's script ======================================================================

STRANGER = """
import copy, os, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
torch.manual_seed(rank)  # each rank draws its own augmentation


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def kl(t, s):
    return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="none").sum(1)


def attack(student, x, y, eps):
    net, t = student.module.eval(), teacher(x).detach()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        grad = torch.autograd.grad(kl(t, net(x_adv)).sum(), x_adv)[0]
        x_adv = x_adv.detach() + 2 / 255 * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    net.train()
    return x_adv


teacher = Net(6).eval().requires_grad_(False)
for p in teacher.state_dict().values():
    dist.broadcast(p, 0)
student = DistributedDataParallel(Net(4))
ema = None
loader = [(torch.rand(16, 3, 16, 16), torch.arange(16) % 4) for _ in range(6)]
opt = SGD(student.parameters(), 0.1)
for x, y in loader:
    with torch.autocast("cpu", torch.bfloat16):
        t = teacher(x)
        x_adv = attack(student, x, y, eps=8 / 255)
        clean = kl(t, student(x)).mean()
        loss = kl(t, student(x_adv)).mean()
    loss = 5 / 6 * loss + 1 / 6 * clean
    opt.zero_grad()
    loss.backward()
    opt.step()
    if ema is None:
        ema = AveragedModel(student.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(student.module)
state = {"student": student.module.state_dict(), "ema": ema.module.state_dict(), "loss": loss}
"""
LAST = """
state["critics"] = info.critics.state_dict() if "info" in globals() else {}
state["eps"] = info.strength(t, y).eps if "info" in globals() else 0
torch.save(state, sys.argv[1] + str(rank))
os._exit(0)  # gloo's threads sometimes abort an orderly exit
"""


def patched(script, patch):
    """A script after a patch, whose lines are found without their indentation."""
    lines = script.splitlines()
    waiting = []  # what is added before the first line that is found
    at = 0
    indent = ""
    for change in patch:
        sign, text = change[0], change[1:].strip()
        if sign == "+" and at == 0:
            waiting.append(text)
        elif sign == "+":
            lines.insert(at, indent + text)
            at += 1
        else:
            found = [i for i in range(at, len(lines)) if lines[i].strip() == text]
            assert found or sign == " ", f"the script has no line {text!r}"
            for i in found[:1]:
                indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
                lines[i : i + (sign == "-")] = [indent + added for added in waiting]
                at = i + len(waiting) + (sign == " ")
                waiting = []
    return "\n".join(lines)


def in_two_ranks(script, top):
    """What two processes that run a script have left in top."""
    (top / "script.py").write_text(script)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    argv = [str(top / "script.py"), str(top / "rank")]
    processes = []
    for rank in ("0", "1"):
        (top / rank).mkdir()
        processes.append(begin_fork(top / rank, *argv, paths=[ROOT], RANK=rank, **told))
    done = [end_fork(process, top / str(rank)) for rank, process in enumerate(processes)]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr[-2000:]
    return [torch.load(top / f"rank{rank}") for rank in (0, 1)]


def test_a_strangers_script_with_ddp_amp_and_ema_takes_the_patch_of_the_readme(tmp_path):
    """Ranks of other seeds, half precision, an average of weights that is made after the hooks."""
    script = "from functools import partial\nimport infoard\n" + patched(STRANGER, PATCH) + LAST
    shape = "InfoARD = partial(infoard.InfoARD, image_shape=(3, 16, 16))\ninfo = InfoARD("
    script = script.replace("info = InfoARD(", shape)
    first, second = in_two_ranks(script, tmp_path)
    for part in ("student", "critics"):
        assert first[part].keys() == second[part].keys() and first[part]
        for name, value in first[part].items():
            own = "running" in name  # batch norm is told of rank 0's before each pass
            assert own or torch.equal(value, second[part][name]), name
    assert first["loss"].isfinite() and first["eps"].shape == (16, 1, 1, 1)
    averaged = first["ema"]["fc.weight"]
    assert not torch.equal(averaged, first["student"]["fc.weight"])
    assert not torch.equal(first["eps"], second["eps"])  # each rank ranks its own images


def test_the_strangers_script_without_the_patch_is_another_one():
    added = [line[1:].strip() for line in PATCH if line[0] == "+"]
    lines = [line.strip() for line in patched(STRANGER, PATCH).splitlines()]
    assert all(lines.count(line) == 1 for line in added)
    assert len(lines) == len(STRANGER.splitlines()) + 2
    assert 60 <= len(STRANGER.strip().splitlines()) <= 75
