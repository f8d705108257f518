"""What holds for fast.py: folding changes nothing but rounding, a recorded step is a step."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import infoard as I
from companions import bench, fast
from test_infoard import each, near, rand, seeded, seeds, with_statistics

# ==== 1. Folding ==================================================================================

NETS = ["tiny", "resnet18", "wrn_10_2", "wrn_10_1_silu", "preact_resnet18", "mobilenet_v2"]


def logits_and_gradient(net, frozen, x):
    """Logits of x and the gradient of their squares' sum, inside frozen(net)."""
    z = x.clone().requires_grad_()
    with frozen(net):
        logits = net(z)
        (grad,) = torch.autograd.grad(logits.square().sum(), z)
    return logits.detach(), grad


@each("name", NETS)
def test_a_folded_net_has_the_same_logits_and_gradients(name):
    net = with_statistics(I.build_model(name, 10, 16)).double()
    x = rand(3, 3, 16, 16).double()
    usual = logits_and_gradient(net, I.frozen_eval, x)
    folded = logits_and_gradient(net, fast.Folding(torch.float64), x)
    for a, b in zip(usual, folded, strict=True):
        near(a, b)


@settings(max_examples=30)
@given(seeds, st.booleans(), st.integers(1, 4), st.sampled_from([1, 2]))
def test_any_convolution_and_its_norm_fold_into_one(seed, bias, groups, stride):
    torch.manual_seed(seed)
    conv = nn.Conv2d(4 * groups, 8 * groups, 3, stride, 1, groups=groups, bias=bias).double()
    norm = with_statistics(nn.BatchNorm2d(8 * groups).double(), seed)
    x = torch.randn(2, 4 * groups, 6, 6, dtype=torch.float64)
    weight, bias = fast.folded(conv, norm)
    one = nn.functional.conv2d(x, weight, bias, stride, 1, groups=groups)
    near(one, norm(conv(x)), 1e-12)
    scale, shift = fast.affine(norm)
    near(
        norm(x.repeat(1, 2, 1, 1)),
        x.repeat(1, 2, 1, 1) * scale[:, None, None] + shift[:, None, None],
        1e-12,
    )


@each("name, folds, norms", [("tiny", 4, 4), ("resnet18", 20, 20), ("wrn_10_2", 4, 7)])
def test_each_norm_that_alone_takes_a_convolution_is_folded(name, folds, norms):
    net = I.build_model(name)
    assert len(fast.norms_of_convolutions(net)) == folds
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == norms


class Twice(nn.Module):
    """Whose convolution's output is used beside its norm, too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        f = self.conv(x)
        return (f + self.norm(f)).mean((2, 3))


class Shared(Twice):
    """Whose norm follows two convolutions' outputs."""

    def forward(self, x):
        return (self.norm(self.conv(x)) + self.norm(x)).mean((2, 3))


class Branching(Twice):
    """Which torch.fx cannot read."""

    def forward(self, x):
        f = self.norm(self.conv(x))
        return (f if f.sum() > 0 else -f).mean((2, 3))


class Doubled(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Own(Twice):
    """With a layer that only looks like a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = Doubled(3, 3, 3, padding=1)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))


class Named(Twice):
    """Whose norm gets its input by name: it folds."""

    def forward(self, x):
        return self.norm(input=self.conv(x)).square().mean((2, 3))


class Untracked(Twice):
    """With a norm that uses the statistics of the batch in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.conv(x)).square().mean((2, 3))


@each("kind", [Twice, Shared, Branching, Own, Untracked])
def test_what_cannot_be_folded_is_not(kind):
    net = with_statistics(kind().double())
    assert fast.norms_of_convolutions(net) == {}
    x = rand(4, 3, 8, 8).double()
    usual = logits_and_gradient(net, I.frozen_eval, x)
    folded = logits_and_gradient(net, fast.Folding(torch.float64), x)
    for a, b in zip(usual, folded, strict=True):
        near(a, b)


def test_a_norm_that_is_called_by_name_folds():
    net = with_statistics(Named().double())
    assert fast.norms_of_convolutions(net) == {"conv": "norm"}
    x = rand(4, 3, 8, 8).double()
    folded = logits_and_gradient(net, fast.Folding(torch.float64), x)
    for a, b in zip(logits_and_gradient(net, I.frozen_eval, x), folded, strict=True):
        near(a, b)


@each("layer", ["conv", "norm"])
def test_a_layer_with_a_pass_of_its_own_keeps_it_and_its_partner_too(layer):
    net = with_statistics(Named().double())
    module, usual = getattr(net, layer), getattr(net, layer).forward
    module.forward = lambda input: 2 * usual(input)
    x = rand(4, 3, 8, 8).double()
    truth = logits_and_gradient(net, I.frozen_eval, x)
    folded = logits_and_gradient(net, fast.Folding(torch.float64), x)
    for a, b in zip(truth, folded, strict=True):
        near(a, b)
    assert "forward" in vars(module)


def test_nets_that_share_a_convolution_but_no_norm():
    one, other = (with_statistics(Named().double(), seed) for seed in (0, 1))
    other.conv = one.conv
    x = rand(4, 3, 8, 8).double()
    with I.frozen_eval(one, other):
        truth = one(x), other(x)
    with fast.Folding(torch.float64)(one, other, one):
        near(one(x), truth[0])
        near(other(x), truth[1])
        assert "forward" not in vars(one.conv)


def everything(net):
    """All that a net holds: attributes, modes, wishes for gradients."""
    found = {name: (m.training, sorted(vars(m))) for name, m in net.named_modules()}
    return found, [p.requires_grad for p in net.parameters()]


def test_a_net_is_left_as_it_was_found_after_an_error_too():
    net = I.build_model("wrn_10_2").train()
    before = everything(net)
    with fast.Folding(torch.bfloat16)(net, None, len):
        assert everything(net) != before
    assert everything(net) == before
    with contextlib.suppress(ZeroDivisionError), fast.Folding(torch.bfloat16)(net, net):
        raise ZeroDivisionError
    assert everything(net) == before


def test_weights_that_have_changed_since_are_seen():
    net = with_statistics(I.build_model("tiny"))
    folding, x = fast.Folding(torch.float32), rand(2, 3, 32, 32).float()
    first, _ = logits_and_gradient(net, folding, x)
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    second, _ = logits_and_gradient(net, folding, x)
    truth, _ = logits_and_gradient(net, I.frozen_eval, x)
    near(second, truth, 1e-4)
    assert (first - second).abs().max() > 1e-2


def test_a_tapped_net_gives_its_features_as_before():
    net = with_statistics(I.build_model("tiny"))
    x = rand(2, 3, 32, 32).float()
    taps = I.Taps(net, x)
    with I.frozen_eval(net):
        net(x)
    usual = taps.of(x)
    with fast.Folding(torch.float32)(net):
        net(x)
    folded = taps.of(x)
    assert usual.keys() == folded.keys()
    for name, f in usual.items():
        near(folded[name], f, 1e-4)


# ==== 2. Steps ====================================================================================


def make_run(framework="rslad", device="cpu", nat=False, **options):
    """A run of toy nets on random images; nat: with an undefended teacher, too."""
    given = {"student": "tiny", "teacher": "given", "steps": 2, "batch_size": 8, "lr": 0.05}
    given.update(val_size=0, amp="bf16", device=str(device), framework=framework)
    cfg = I.Config(**given | options).resolved()
    teacher = with_statistics(seeded(lambda: I.build_model("tiny_wide"))).to(device)
    nets = {"teacher": teacher}
    if nat:
        nets["teacher_nat"] = with_statistics(I.build_model("tiny_wide")).to(device)
    return I.Run(cfg, bench.random_data(20, 32), torch.device(device), nets)


def flat(net):
    """All weights of a net in one vector."""
    return torch.cat([p.detach().flatten().cpu() for p in net.parameters()])


def five_steps(run, recorded=True):
    """The weights and sums of a run after five steps of equal batches and one of a smaller one."""
    if not recorded:
        run.learn = I.partial(I.learn, run)
    for i in range(6):
        size = run.cfg.batch_size if i < 5 else 3
        I.train_step(run, torch.arange(i, i + size), i / 6)
    weights = flat(run.student)
    return weights, {name: value.item() for name, value in run.at.sums.items()}


def test_half_precision_steps_fold_and_others_do_not():
    assert isinstance(make_run().frozen, fast.Folding)
    assert make_run(amp="off").frozen is I.frozen_eval
    assert make_run(fast=False).frozen is I.frozen_eval


def test_a_folded_step_goes_nearly_where_an_unfolded_one_goes():
    start = flat(make_run().student)
    usual, _ = five_steps(make_run(fast=False))
    folded, _ = five_steps(make_run())
    moved = (usual - start).norm()
    assert 0 < (folded - usual).norm() < 0.2 * moved  # bf16 keeps 8 bits; signs of pixels flip


class Replay:
    """In the place of a CUDA graph: what is recorded is made at once, and again in each replay but
    the first.
    """

    def __init__(self):
        self.recording = None
        self.seen = []  # learning rate and progress of each replay

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        recording, run = self.recording, self.recording.run
        self.seen.append([recording.lr.item(), recording.share.item()])
        if len(self.seen) == 1:
            return
        for group in run.optimizer.param_groups:
            group.update(lr=recording.lr, foreach=False, fused=True)
        means = I.learn(run, recording.x, recording.y, recording.share)
        for name, value in means.items():
            recording.means[name].copy_(value)


class Stream:
    """In the place of a CUDA stream."""

    def __init__(self, device):
        assert device == torch.device("cpu")  # that of the run, not the current one

    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def at_once(*args, **kwargs):
    """In the place of a context of torch.cuda."""
    yield


@pytest.fixture
def pretended(monkeypatch):
    """torch.cuda's streams and graphs on a CPU."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", at_once)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replay)
    monkeypatch.setattr(torch.cuda, "graph", at_once)
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or at_once())
    return asked


def recorded_run(framework="rslad"):
    """A run whose steps are recorded, as on CUDA."""
    run = make_run(framework)
    run.learn = fast.Recording(run)
    record = run.learn.record

    def record_and_tell(x, y):
        record(x, y)
        if run.learn.graph is not None:
            run.learn.graph.recording = run.learn

    run.learn.record = record_and_tell
    return run


@each("framework", ["rslad", "igdm"])
def test_a_replayed_step_reads_images_rate_and_progress_anew(pretended, framework):
    usual, sums = five_steps(make_run(framework), recorded=False)
    run = recorded_run(framework)
    weights, own = five_steps(run)
    rates = [[run.cfg.lr_at(i / 6), i / 6] for i in (3, 4)]  # of five steps, three are as usual
    near(torch.tensor(run.learn.graph.seen), torch.tensor(rates), 1e-6)
    assert (weights - usual).norm() < 1e-3 * usual.norm()  # the rate is a float32 here
    for name, value in sums.items():
        assert own[name] == pytest.approx(value, rel=1e-2)  # bf16


def test_the_optimiser_is_left_as_it_was_found(pretended):
    run = recorded_run()
    before = [
        {k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups
    ]
    run.learn.steps = run.learn.eager_steps
    x, y = I.draw(run, torch.arange(8))
    run.learn(x, y, 0.0)
    assert run.learn.graph is not None and pretended == [run.device]
    after = [
        {k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups
    ]
    assert before == after


def test_a_step_that_cannot_be_recorded_is_made_as_usual_and_said(pretended, monkeypatch, capsys):
    @contextlib.contextmanager
    def refuse(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    usual, sums = five_steps(make_run(), recorded=False)
    run = recorded_run()
    before = run.generators["attack"]
    weights, own = five_steps(run)
    assert run.generators["attack"] is not before  # which goes on where that one was
    assert torch.equal(usual, weights) and sums == own
    told = "steps are not replayed as a CUDA graph: operation not permitted"
    assert capsys.readouterr().out.count(told) == 1


def test_nets_of_anyones_own_are_recorded_only_if_they_say_that_they_are_static():
    net = I.build_model("tiny")
    kept = [None, "resnet18", "runs/teacher/best.pt", "timm:resnet18"]
    kept.append("https://a.b/teacher.pt")
    for name in (*kept, "robustbench:Chen2021LTD_WRN34_10"):
        assert fast.is_static(name, net)
    assert not fast.is_static("mine:net", net)
    net.static = True
    assert fast.is_static("mine:net", net)


STATIC = [name for name in I.FRAMEWORKS if I.get_framework(name).static]


def test_only_frameworks_without_memory_and_branches_are_static():
    assert {*STATIC} == {"natural", "at", "trades", "ard", "rslad", "akd", "adaad", "igdm", "saad"}


@each("framework", STATIC)
def test_no_step_that_can_be_replayed_copies_numbers_from_the_host(framework):
    """Such a copy would read old memory in a replay: torch counts none on tensors without data."""
    copies = copies_in_a_step(framework)
    if framework == "saad":
        copies = copies[2:]  # F.one_hot looks at the least and the largest label, on a CPU alone
    assert copies == []


def copies_in_a_step(framework):
    found = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._overloadpacket.__name__
            if name in ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero"):
                found.append(name)
            return func(*args, **(kwargs or {}))

    run = make_run(framework, steps_lo=1) if framework != "natural" else make_run(framework)
    x, y = I.draw(run, torch.arange(8))
    half = torch.tensor(0.5)
    with Log():
        I.learn(run, x, y, half)
    return found


class Waits(TorchDispatchMode):
    """Writes down what makes a program wait for its device: copies that block, numbers that become
    tensors (lift_fresh), values that are read, operations on tensors of two devices.
    """

    waiting = ("lift_fresh", "_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []
        self.copies = 0  # that do not block

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t)]
        across = len({t.device.type for t in tensors}) > 1
        blocks = across and not {"non_blocking": False, **(kwargs or {})}["non_blocking"]
        self.copies += across and not blocks
        if blocks or name in self.waiting:
            self.found.append(name)
        return out


def elsewhere(net):
    """Gives a net parameters and buffers on another device."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to("meta")


@pytest.fixture
def without_autocast(monkeypatch):
    """Autocast knows no device without data; it copies nothing to a device in any case."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def run_elsewhere(framework, **options):
    """A run whose nets and images are on another device, the one without data. Fake CUDA tensors
    cannot take its place: a torch without CUDA refuses to go backward through them.
    """
    run = make_run(framework, **options)
    for net in (run.student, run.info, *run.nets.values()):
        if net is not None:
            elsewhere(net)
    run.device, run.x = torch.device("meta"), run.x.to("meta")
    groups = [{"params": list(net.parameters())} for net in run.objective]
    run.optimizer = torch.optim.SGD(groups, 0.1, 0.9, weight_decay=5e-4)
    run.autocast, run.frozen = contextlib.nullcontext, fast.Folding(torch.float32)
    return run


@each(
    "framework",
    [*sorted({*I.FRAMEWORKS} & {"iad", "mtard", "bmtard", "absld", "adr", *STATIC}), "rslad plain"],
)
def test_no_step_waits_for_its_device(framework, without_autocast):
    name, _, plain = framework.partition(" ")
    options = {"infoard": not plain, "steps_lo": 1} if name != "natural" else {}
    run = run_elsewhere(name, nat=name in ("mtard", "bmtard"), **options)
    with Waits() as waits:
        I.train_step(run, torch.arange(8), 0.5)
    assert waits.found == []
    assert waits.copies == 3  # rows, labels, draws of the augmentation


def test_what_waits_is_counted():
    x = torch.zeros(3, device="meta")
    with Waits() as waits:
        torch.as_tensor(1.0)  # seen on the host alone, where the test above looks for it
        torch.zeros(3).to("meta")
        torch.zeros(3).to("meta", non_blocking=True)
        x + 1
    assert waits.found == ["lift_fresh", "_to_copy"] and waits.copies == 1


def test_steps_on_the_host_serve_images_on_a_device():
    """Indices may lie on the host: the attack runs, at the price of copies."""
    x, w = torch.zeros(4, 3, 8, 8, device="meta"), torch.ones(3, 8, 8, device="meta")
    steps = torch.tensor([1, 3, 2, 1])

    def objective(z, rows=I.ALL):
        return (z * w).flatten(1).sum(1)

    x_adv = I.pgd(objective, x, eps=0.1, alpha=0.05, steps=steps)
    assert x_adv.shape == x.shape and x_adv.device == x.device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each("framework", STATIC)
def test_a_cuda_graph_trains_the_same_weights(framework):
    options = {"infoard": I.get_framework(framework).infoard, "device": "cuda"}
    usual, sums = five_steps(make_run(framework, **options), recorded=False)
    run = make_run(framework, **options)
    weights, own = five_steps(run)
    assert run.learn.graph is not None
    assert (weights - usual).norm() <= 1e-4 * usual.norm()  # atomic sums of cuDNN
    assert all(abs(sums[k] - own[k]) <= 1e-2 * abs(sums[k]) + 1e-4 for k in sums)
