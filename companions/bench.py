"""What a training step costs, beside one of the ordinary kind.

    python infoard.py bench      frameworks: ordinary, plain, with InfoARD, with its step schedule
    python infoard.py effects    a plain step without what makes it fast, one thing at a time
    python infoard.py growth     a step at other batch sizes and attack steps, or of many ranks

    1  the ordinary step     3  steps to be timed     5  the table
    2  counting and waiting  4  measuring             6  commands

All kinds of step are timed in one run, in turn, on random images and with nets of random weights:
time depends on neither. Ratios of one run can be compared, times of two machines cannot.
"""

import contextlib
import copy
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

import infoard as I
from companions import averaging
from companions.evaluation import precision
from companions.tables import markdown

# ==== 1. The ordinary step ========================================================================


@contextlib.contextmanager
def eval_mode_alone(*models) -> Iterator[None]:
    """Half of frozen_eval: eval mode inside, but weights go on to ask for gradients."""
    nets = [model for model in models if isinstance(model, nn.Module)]
    modes = [(m, m.training) for net in nets for m in net.modules()]
    try:
        for net in nets:
            net.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def to_float_nchw(x: Tensor, device: str | torch.device) -> Tensor:
    """to_float in the usual memory layout."""
    x = x.to(device).contiguous()
    return x.float() / 255 if x.dtype == torch.uint8 else x


@contextlib.contextmanager
def ordinary(nchw: bool = True, unfrozen: bool = True) -> Iterator[None]:
    """Inside, a step is made as most released code makes it: images in NCHW (nchw), and weights
    that ask for gradients while the attack runs (unfrozen).

    It replaces frozen_eval and to_float of infoard for that time. With --amp off such a step is at
    least as fast as theirs: images are augmented all at once, gradients are those of the input
    alone, and the teacher is asked once.
    """
    with contextlib.ExitStack() as stack:
        if unfrozen:
            stack.enter_context(mock.patch.object(I, "frozen_eval", eval_mode_alone))
        if nchw:
            stack.enter_context(mock.patch.object(I, "to_float", to_float_nchw))
        yield


# ==== 2. Counting and waiting =====================================================================


class Counter(TorchDispatchMode):
    """Counts what is done inside: operations and bytes.

    flops: the operations of convolutions and matrix products by torch's own formulas, in which a
    multiplication and an addition are two. live: the bytes that tensors made inside hold; peak: the
    most of them at once. Torch's FlopCounterMode does not bear autograd.grad with respect to an
    input, and its formula for backward passes of convolutions forgets groups: each of the two
    gradients costs what the forward pass did.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.peak = 0
        self.live = 0
        self.known = set()  # storages made inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            self.flops += self.backward_flops(*args)
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.note_new(args, out)
        return out

    @staticmethod
    def backward_flops(grad, x, w, biases, stride, padding, dilation, transposed, *rest) -> int:
        """Those of convolution_backward, whose last argument says which gradients it makes."""
        of_input, of_weight, _ = rest[-1]
        return conv_flop_count(x.shape, w.shape, grad.shape, transposed) * (of_input + of_weight)

    def note_new(self, args, out) -> None:
        """Adds the bytes of new tensors, which are neither views nor made in place."""
        old = {t.untyped_storage()._cdata for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in tree_leaves(out):
            if not torch.is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known and key not in old:
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self.forget, key, size)
        self.peak = max(self.peak, self.live)

    def forget(self, key: int, size: int) -> None:
        """A storage was freed."""
        self.known.discard(key)
        self.live -= size


def wait(device: torch.device) -> None:
    """Until the device has done all it was told to: a clock read earlier would be wrong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def rate(product: Callable, device: torch.device) -> float:
    """Operations per second of a product, in its second call."""
    with Counter() as counter:
        product()
    wait(device)  # else the first call is timed too
    began = time.perf_counter()
    product()
    wait(device)
    return counter.flops / (time.perf_counter() - began)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that the hardware gives at best: of a large matrix product or of a 3x3
    convolution, whichever is faster, as products in fp32 are slow in some libraries.
    """
    size, images = 2048, 64
    if device.type == "cuda":
        size, images = 8192, 4096  # a millisecond or so: much longer than a launch
    a = torch.randn(size, size, device=device).to(dtype)
    x = torch.randn(images, 128, 16, 16, device=device).to(dtype)
    w = torch.randn(128, 128, 3, 3, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    w = w.to(memory_format=torch.channels_last)

    def matrix_product() -> Tensor:
        return a @ a

    def convolution() -> Tensor:
        return F.conv2d(x, w, padding=1)

    return max(rate(product, device) for product in [matrix_product, convolution] * 7)


def machine(device: torch.device) -> str:
    """The name of the GPU, or that of the CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    about = Path("/proc/cpuinfo")
    if about.exists():
        for line in about.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
    return f"{name}, {torch.get_num_threads()} threads"


# ==== 3. Steps to be timed ========================================================================


@dataclass(frozen=True)
class Kind:
    """A way to make a training step: its settings, and nchw and unfrozen as in ordinary()."""

    cfg: I.Config
    nchw: bool = False
    unfrozen: bool = False


def kinds_of_step(cfg: I.Config) -> dict[str, Kind]:
    """{name: kind} that bench times; terms of --plus and an average of weights each alone."""
    plain = replace(cfg, infoard=False, steps_lo=0, plus="", ema=0.0)
    info = replace(plain, infoard=True)
    kinds = {
        "ordinary": Kind(replace(plain, amp="off", compile=False), nchw=True, unfrozen=True),
        "plain": Kind(plain),
    }
    if I.get_framework(cfg.framework).infoard:
        kinds["infoard"] = Kind(info)
        if not cfg.asa.startswith("distance"):  # these rules know no schedule
            kinds["schedule"] = Kind(replace(info, steps_lo=cfg.steps_lo or 1))
    for term in filter(None, cfg.plus.split(",")):
        kinds[term] = Kind(replace(plain, plus=term))
    if cfg.ema:
        kinds["ema"] = Kind(replace(plain, ema=cfg.ema))
    return kinds


def kinds_without(cfg: I.Config) -> dict[str, Kind]:
    """{name: kind} that effects times: plain with something taken away, or compiled."""
    plain = replace(cfg, infoard=False, steps_lo=0)
    return {
        "ordinary": Kind(replace(plain, amp="off", compile=False), nchw=True, unfrozen=True),
        "plain": Kind(plain),
        "fp32": Kind(replace(plain, amp="off")),
        "eager": Kind(replace(plain, fast=False)),
        "unfrozen": Kind(replace(plain, fast=False), unfrozen=True),
        "nchw": Kind(plain, nchw=True),
        "compiled": Kind(replace(plain, compile=True)),
    }


def kinds_of_size(cfg: I.Config) -> dict[str, Kind]:
    """{name: kind} that growth times: a quarter to twice the batch, none to twice the steps."""
    cfg = replace(cfg, steps_lo=0)
    batch, steps = cfg.batch_size, cfg.steps
    fewest = max(2, I.world()[1])  # an image for each rank
    kinds = {}
    for n in sorted({max(fewest, batch // 4), max(fewest, batch // 2), batch, 2 * batch}):
        kinds[f"batch {n}"] = Kind(replace(cfg, batch_size=n))
    for n in sorted({1, max(1, steps // 2), steps, 2 * steps}):
        kinds[f"{n} steps"] = Kind(replace(cfg, steps=n))
    return kinds


def random_data(n: int, size: int) -> I.Data:
    """n images of random pixels in ten classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, size, size, 3), generator=generator, dtype=torch.uint8)
    x = x.permute(0, 3, 1, 2)  # [n,3,size,size], channels last as everywhere
    return I.Data(x, torch.arange(n) % 10, x[:2], torch.arange(2), list("0123456789"))


def refuse_training(cfg: I.Config, framework: str, *args, **options) -> None:
    """In the place of infoard.trained: a benchmark trains no net that a framework might miss."""
    told = f"needs a net trained by {framework}, and bench trains none"
    raise I.InfoardError(f"framework {cfg.framework} {told}")


class Bench:
    """Training steps of one kind, with nets of their own."""

    def __init__(self, kind: Kind, teacher: nn.Module, data: I.Data, device: torch.device):
        self.kind = kind
        self.device = device
        self.seconds = []
        memory = torch.contiguous_format if kind.nchw else torch.channels_last
        nets = {"teacher": copy.deepcopy(teacher).to(device, memory_format=memory)}
        if "teacher_nat" in I.get_framework(kind.cfg.framework).needs:
            nets["teacher_nat"] = nets["teacher"]
        with mock.patch.object(I, "trained", refuse_training):
            self.run = I.Run(kind.cfg, data, device, nets)
        if kind.unfrozen:
            self.run.frozen = eval_mode_alone  # a run keeps what it was made with
        self.run.student.to(memory_format=memory)

    def make_step(self) -> None:
        """The first step of an epoch, of this rank's share of the batch."""
        run = self.run
        order = run.train[torch.randperm(len(run.train), generator=run.generators["data"])]
        batch = order[: run.cfg.batch_size]
        equal = batch[: len(batch) // run.ranks * run.ranks]  # as many for each rank
        run.at.sums = {}
        I.train_step(run, equal[run.rank :: run.ranks], 0.0)

    def step(self) -> float:
        """Seconds of one whole step: images, attack, losses, gradients, optimiser."""
        with ordinary(self.kind.nchw, self.kind.unfrozen):
            wait(self.device)
            began = time.perf_counter()
            self.make_step()
            wait(self.device)
            return time.perf_counter() - began

    def count(self) -> dict:
        """The operations of a step (flops), and the MiB that it holds at most beyond what stays: of
        tensors on a CPU, whose libraries take more for themselves, of the allocator on CUDA.
        """
        forward, learn = self.run.forward, self.run.learn
        self.run.forward = self.run.student  # compiled code is no sequence of torch's operations,
        self.run.learn = partial(I.learn, self.run)  # nor is a CUDA graph
        with Counter() as counter:
            self.step()
        self.run.forward, self.run.learn = forward, learn
        held = counter.peak
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step()
            held = torch.cuda.max_memory_allocated(self.device) - before
        return {"flops": counter.flops, "mib": held / 2**20}

    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def per_image(self) -> float:
        """Seconds for each image of the batch."""
        return self.median() / self.kind.cfg.batch_size


# ==== 4. Measuring ================================================================================


def time_in_turn(benches: list[Bench], rounds: int) -> None:
    """Times each as often; in turn, so that a machine that slows down slows all."""
    for _ in range(rounds):
        for bench in benches:
            bench.seconds.append(bench.step())


def add_ratios(rows: dict[str, dict], benches: dict[str, Bench]) -> None:
    """Adds how much faster than the ordinary step, and its time and memory beside the plain one."""
    times = {name: bench.per_image() for name, bench in benches.items()}
    for name, row in rows.items():
        row["faster"] = times["ordinary"] / times[name]
        row["cost"] = times[name] / times["plain"]
        row["memory"] = row["mib"] / rows["plain"]["mib"]


def measured(
    kinds: dict[str, Kind],
    teacher: nn.Module,
    data: I.Data,
    device: torch.device,
    *,
    rounds: int,
    peaks: dict[torch.dtype, float],
) -> dict[str, dict]:
    """{name: what a step of this kind costs}. peaks, by precision: filled where it is not yet."""
    benches = {name: Bench(kind, teacher, data, device) for name, kind in kinds.items()}
    for bench in benches.values():
        for _ in range(5 if device.type == "cuda" else 1):  # the first are slow, the fourth records
            bench.step()
    rows = {name: bench.count() for name, bench in benches.items()}
    time_in_turn(list(benches.values()), rounds)

    for name, bench in benches.items():
        dtype = I.amp_dtype(bench.kind.cfg.amp, device) or torch.float32
        if dtype not in peaks:
            peaks[dtype] = peak(device, dtype)
        row = rows[name]
        row["ms"] = 1000 * bench.median()
        row["images_per_s"] = 1 / bench.per_image()
        row["seconds"] = bench.seconds
        row["share"] = 1000 * row["flops"] / row["ms"] / peaks[dtype]
    if "plain" in rows:
        add_ratios(rows, benches)
    return rows


# ==== 5. The table ================================================================================

COLUMNS = (  # key in a row, title, format
    ("ms", "ms", "{:.0f}"),
    ("images_per_s", "images/s", "{:.1f}"),
    ("share", "share of peak", "{:.0%}"),
    ("mib", "MiB", "{:.0f}"),
    ("faster", "times faster than ordinary", "{:.2f}"),
    ("cost", "time / plain", "{:.2f}"),
    ("memory", "memory / plain", "{:.2f}"),
)


def costs(rows: dict[str, dict]) -> str:
    """The rows of bench.json, {step: its cost}, as a Markdown table of what all of them hold."""
    columns = [column for column in COLUMNS if all(column[0] in row for row in rows.values())]
    lines = [["step", *(title for _, title, _ in columns)]]
    for name, row in rows.items():
        lines.append([name, *(form.format(row[key]) for key, _, form in columns)])
    return markdown(lines)


def about_scatter(rows: dict[str, dict]) -> list[str]:
    """A line if rounds differ by so much that medians of a few of them say little."""
    widest = {}
    for name, row in rows.items():
        seconds = row["seconds"]
        widest[name] = (max(seconds) - min(seconds)) / statistics.median(seconds)
    name = max(widest, key=widest.get)
    if widest[name] < 0.3:
        return []
    told = f"warning: of {name} the slowest round took {widest[name]:.0%} of the median more than"
    return [f"{told} the fastest: is the machine busy? ratios of less are no differences"]


# ==== 6. Commands =================================================================================


def lifted_frameworks() -> str:
    """Those that InfoARD can be added to, as a list with commas."""
    return ",".join(name for name in I.FRAMEWORKS if I.get_framework(name).infoard)


def time_kinds(
    kinds_of: Callable, rounds: int, frameworks: str, given: dict, peaks: dict | None = None
) -> None:
    """Times kinds_of(settings) for each framework of a list with commas; bench.json, a table.

    peaks: those of measured() that are known, to be filled.
    """
    device = I.pick_device(given.get("device", "auto"))
    ranks = I.world()[1]
    usual = {"dataset": "cifar10", "out": "runs/bench"}
    if device.type == "cpu":
        usual["batch_size"] = 32
    start = I.Config(**{**usual, **given})
    I.require(start.batch_size >= ranks, f"--batch-size must be at least {ranks}, the ranks")
    size = start.image_size or 32
    data = random_data(2 * start.batch_size + 2, size)

    settings = []  # all of them first: a mistake in the last must not lose what was timed
    for framework in frameworks.split(","):
        cfg = replace(start, framework=framework.strip(), teacher=None, val_size=0).resolved()
        averaging.check(cfg)
        settings.append(cfg)

    rows = {}
    peaks = {} if peaks is None else peaks
    for cfg in settings:
        framework = cfg.framework
        teacher = I.build_model(cfg.teacher_arch, size=size).eval().requires_grad_(False)
        found = measured(kinds_of(cfg), teacher, data, device, rounds=rounds, peaks=peaks)
        for kind, row in found.items():
            rows[f"{framework}/{kind}"] = row
            print(f"{framework}/{kind}: {row['ms']:.0f} ms", flush=True)

    about = {"machine": machine(device), "torch": torch.__version__, "ranks": ranks}
    about.update(student=cfg.student, teacher=cfg.teacher_arch, batch_size=start.batch_size)
    about.update(steps=cfg.steps, rounds=rounds, compiled=start.compile)
    about["precision"] = {
        name: precision(device, I.amp_dtype(kind.cfg.amp, device) or torch.float32)
        for name, kind in kinds_of(cfg).items()
    }
    about["peak"] = {str(dtype): f"{best / 1e12:.2f} TFLOP/s" for dtype, best in peaks.items()}
    I.save(Path(start.out, "bench.json"), {"about": about, "rows": rows})
    print("", *(f"{name}: {value}" for name, value in about.items()), "", costs(rows), sep="\n")
    for line in about_scatter(rows):
        print(line)
    print(f"\nin {start.out}: bench.json")


def run_bench(*, rounds: int = 5, **given) -> None:
    """Time training steps: ordinary (fp32, as most released code is written), plain, with InfoARD,
    with its step schedule, and plain with each term of --plus or --ema; --framework: a list with
    commas, default: all that InfoARD lifts.
    """
    frameworks = given.pop("framework", None) or lifted_frameworks()
    time_kinds(kinds_of_step, rounds, frameworks, given)


def run_effects(*, rounds: int = 5, **given) -> None:
    """Time plain steps of --framework without bf16, without frozen weights in the attack, without
    channels_last, and with --compile.
    """
    time_kinds(kinds_without, rounds, given.pop("framework", "rslad"), given)


def run_growth(*, rounds: int = 5, **given) -> None:
    """Time steps of --framework (InfoARD in it, if wanted) at other batch sizes and attack steps;
    under torchrun: of all ranks together.
    """
    time_kinds(kinds_of_size, rounds, given.pop("framework", "rslad"), given)
