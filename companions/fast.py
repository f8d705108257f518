"""A faster training step: the same operations in fewer and larger kernels.

    1  folding: while an attack climbs, batch norm is part of the convolutions, in half precision
    2  recording: a whole step as one CUDA graph, which the device replays without Python

infoard.py asks for speed_up(run) where half precision is on, unless --no-fast is given, and for
compiled(net) under --compile. What both parts gain: results/gpu, and `python infoard.py bench` with
and without --no-fast.
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import infoard as I

# ==== 1. Folding ==================================================================================
# An attack asks the same frozen weights ten times and more. Autocast would cast them in each pass,
# and the gradient of batch norm in eval mode is slow: on CUDA a third of a WRN's whole attack.


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is a layer of this kind, or a subclass that computes the same."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm that uses fixed statistics in eval mode."""
    return is_plain(module, nn.BatchNorm2d) and module.running_mean is not None


class Tracer(torch.fx.Tracer):
    """Follows a net past the hooks on its modules, which know nothing of proxies."""

    def call_module(self, module, forward, args, kwargs):
        return super().call_module(module, module.forward, args, kwargs)


def norms_of_convolutions(net: nn.Module) -> dict[str, str]:
    """{name of a convolution: name of the batch norm that alone takes its output}.

    Empty for a net that torch.fx cannot read.
    """
    try:
        graph = Tracer().trace(net)
    except Exception:  # whatever foreign code raises
        return {}
    modules = dict(net.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    pairs = {}
    for node in nodes:
        if not is_norm(modules[node.target]) or calls[node.target] > 1:
            continue
        source = node.args[0] if node.args else node.kwargs["input"]
        if source.op != "call_module" or len(source.users) > 1 or calls[source.target] > 1:
            continue
        if is_plain(modules[source.target], nn.Conv2d):
            pairs[source.target] = node.target
    return pairs


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """scale = gamma/sqrt(var + eps), shift = beta - mean scale of batch norm in eval mode: [C]."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale, shift


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that computes norm(conv(x)):

    w' = scale w,  b' = scale b + shift
    """
    scale, shift = affine(norm)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return weight, shift if conv.bias is None else shift + scale * conv.bias


def once(make: Callable, dtype: torch.dtype) -> Callable:
    """A function that gives make()'s tensors in this precision, made when first asked for."""
    made = []

    def get() -> list[Tensor | None]:
        if not made:
            with torch.no_grad():
                made.extend(f if f is None else f.to(dtype) for f in make())
        return made

    return get


def convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> Callable:
    """A forward pass of conv that gives norm(conv(x))."""
    get = once(lambda: folded(conv, norm) if norm else (conv.weight, conv.bias), dtype)
    return lambda input: conv._conv_forward(input, *get())


def linear(layer: nn.Linear, dtype: torch.dtype) -> Callable:
    """A forward pass of a linear layer."""
    get = once(lambda: (layer.weight, layer.bias), dtype)
    return lambda input: nn.functional.linear(input, *get())


def scaling(norm: nn.BatchNorm2d, dtype: torch.dtype) -> Callable:
    """A forward pass of a batch norm that stands alone: one product and one sum."""

    get = once(lambda: [f.view(-1, 1, 1) for f in affine(norm)], dtype)

    def forward(input: Tensor) -> Tensor:
        scale, shift = get()
        return torch.addcmul(shift, input, scale)

    return forward


def same(input: Tensor) -> Tensor:
    """A forward pass of a batch norm that its convolution has taken over."""
    return input


class Folding:
    """frozen_eval(*nets) in whose inside convolutions take over the batch norms behind them and
    weights are cast to half precision once: equal logits but for rounding. Every module is left as
    it was found. A net that torch.compile has made is left as it is.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.pairs = {}  # {net: norms_of_convolutions(net)}

    @contextlib.contextmanager
    def __call__(self, *nets) -> Iterator[None]:
        nets = [net for net in dict.fromkeys(nets) if isinstance(net, nn.Module)]
        owners = Counter(module for net in nets for module in net.modules())
        changed = []
        try:
            with I.frozen_eval(*nets):
                for net in nets:
                    if not hasattr(net, "_orig_mod"):
                        self.change(net, owners, changed)
                yield
        finally:
            for module in changed:
                del module.forward

    def change(self, net: nn.Module, owners: Counter, changed: list[nn.Module]) -> None:
        """Gives the layers of a net other forward passes, and adds these layers to the list."""
        if net not in self.pairs:
            self.pairs[net] = norms_of_convolutions(net)
        modules = dict(net.named_modules())
        # A layer that nets share is left as it is, and so is one with a pass of its own.
        own = {name for name, m in modules.items() if owners[m] > 1 or "forward" in vars(m)}
        pairs = {conv: norm for conv, norm in self.pairs[net].items() if not {conv, norm} & own}
        taken = {*pairs.values()}
        for name, module in modules.items():
            if name in own:
                continue
            if name in taken:
                module.forward = same
            elif is_plain(module, nn.Conv2d):
                norm = modules[pairs[name]] if name in pairs else None
                module.forward = convolution(module, norm, self.dtype)
            elif is_plain(module, nn.Linear):
                module.forward = linear(module, self.dtype)
            elif is_norm(module):
                module.forward = scaling(module, self.dtype)
            else:
                continue
            changed.append(module)


# ==== 2. Recording ================================================================================


class Recording:
    """infoard.learn(run, x, y, share), recorded as a CUDA graph at its fourth call, then replayed.

    The graph reads x, y, the learning rate and the share of training done from tensors that are
    filled before each replay; weights, momentum and gradients stay where they are. A batch of
    another size (the last of an epoch) is learnt from as usual.
    """

    eager_steps = 3  # libraries choose their algorithms in these

    def __init__(self, run: I.Run):
        self.run = run
        self.steps = 0
        self.graph = None
        self.failed = False
        self.side = torch.cuda.Stream(run.device)
        self.lr, self.share = (torch.zeros((), device=run.device) for _ in range(2))

    def __call__(self, x: Tensor, y: Tensor, share: float) -> dict[str, Tensor]:
        if self.failed or len(x) != self.run.cfg.batch_size:
            return I.learn(self.run, x, y, share)
        self.steps += 1
        if self.steps <= self.eager_steps:
            return self.aside(x, y, share)
        self.lr.fill_(self.run.cfg.lr_at(share))
        self.share.fill_(share)
        if self.graph is None:
            self.record(x, y)
            if self.failed:
                return I.learn(self.run, x, y, share)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.means

    def aside(self, x: Tensor, y: Tensor, share: float) -> dict[str, Tensor]:
        """A step as usual, on a stream of its own, as what is recorded next will be."""
        usual = torch.cuda.current_stream(self.run.device)
        self.side.wait_stream(usual)
        with torch.cuda.stream(self.side):
            means = I.learn(self.run, x, y, share)
        usual.wait_stream(self.side)
        return means

    def record(self, x: Tensor, y: Tensor) -> None:
        """Records a step, on the run's own device; no older graph may be freed meanwhile."""
        gc.collect()
        with torch.cuda.device(self.run.device):
            self.record_here(x, y)

    def record_here(self, x: Tensor, y: Tensor) -> None:
        """Records a step; one that cannot be recorded is made as before, and a line says why."""
        run, groups = self.run, self.run.optimizer.param_groups
        self.x, self.y = x.clone(), y.clone()
        run.optimizer.zero_grad()  # gradients are then made inside
        usual = [dict(group) for group in groups]
        graph = torch.cuda.CUDAGraph()
        begun = run.generators["attack"].get_state()
        graph.register_generator_state(run.generators["attack"])
        try:
            for group in groups:  # the SGD that reads lr from the device
                group.update(lr=self.lr, foreach=False, fused=True)
            with torch.cuda.graph(graph, stream=self.side):
                self.means = I.learn(run, self.x, self.y, self.share)
            self.graph = graph
        except Exception as error:  # whatever in a step cannot be recorded
            self.failed = True  # and the generator may still think that it is recorded
            run.generators["attack"] = torch.Generator(run.device)
            run.generators["attack"].set_state(begun)
            first, *_ = str(error).splitlines() or [type(error).__name__]
            print(f"steps are not replayed as a CUDA graph: {first}")
        finally:
            for group, before in zip(groups, usual, strict=True):
                group.update(before)


def is_static(name: str | None, net: nn.Module | None) -> bool:
    """Whether a net's pass is always the same operations. One of anyone's own (module:factory) may
    draw numbers in Python, which a graph would repeat: it must say static = True.
    """
    known = "robustbench:", "timm:", "https:", "http:"
    own = ":" in (name or "") and not name.startswith(known)
    return not own or Path(name).exists() or getattr(net, "static", False)


def can_record(run: I.Run) -> bool:
    """Whether each step of a run is the same sequence of operations on one CUDA device."""
    cfg = run.cfg
    return (
        run.device.type == "cuda"
        and run.ranks == 1
        and not cfg.compile
        and not run.scaler.is_enabled()
        and not (run.info and "shuffled" in cfg.asa)  # drawn on the CPU
        and not (run.info and ":" in cfg.asa + cfg.mim)  # of anyone's own: may do so, too
        and is_static(cfg.student, run.student)
        and is_static(cfg.teacher, run.nets["teacher"])
        and I.get_framework(cfg.framework).static
    )


def compiled(net: nn.Module) -> Callable:
    """torch.compile of a net, whose hooks are part of it: code made without them must not serve."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.cache_size_limit = 64  # attack and training, of several nets
    return torch.compile(net)


def speed_up(run: I.Run, dtype: torch.dtype) -> None:
    """Makes a run's steps faster, as far as what it trains allows."""
    run.frozen = Folding(dtype)
    if can_record(run):
        run.learn = Recording(run)
