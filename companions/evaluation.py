"""What infoard.evaluate says besides accuracies, and what is asked of a teacher before it teaches.

Confidence intervals, how a result was measured, warnings of masked gradients, the precision, the
images of nets that make some, results that are kept as they come, a line a minute of what takes
long, and whether a teacher is above chance. infoard.py asks for these by name and, alone, does
without.

    1  confidence          3  kept as it comes    5  what evaluate and a run ask for
    2  masked gradients    4  precision           6  teachers

[Wilson] E. B. Wilson, JASA 1927     [Masked] Athalye et al., 1802.00420     [AA] 2003.01690
[CGARD] 2026, table of CIFAR-10 and 100   [IGDM] ICLR 2025   [CRDND] 2302.08764
[GAIRAT] 2010.01736
"""

import contextlib
import hashlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import infoard as I
from companions import attacks as further_attacks
from companions import protocol
from companions.checkpoints import judge
from companions.identity import of_names
from companions.runs import chance_of

# ==== 1. Confidence ===============================================================================


def interval(share: float, n: int) -> list[float]:
    """Wilson's 95% interval of a share of n samples, in per cent [Wilson]."""
    z = 1.96 / math.sqrt(n)
    half = z * math.sqrt(share * (1 - share) + z * z / 4)
    middle = share + z * z / 2
    return [round(100 * (middle + side) / (1 + z * z), 2) for side in (-half, half)]


def intervals(right: dict[str, Tensor]) -> dict[str, list[float]]:
    """That of each column but for AutoAttack's parts, from who is still right after what."""
    shown = {name: hits.double() for name, hits in right.items() if name not in I.PARTS}
    return {name: interval(hits.mean().item(), len(hits)) for name, hits in shown.items()}


# ==== 2. Masked gradients =========================================================================
# Where gradients lead nowhere, PGD fails and the net is no safer for it [Masked].
#
# That CW and AutoAttack find more than PGD is no sign of it by itself. To CW, students of soft
# labels lose 2.6 to 2.8 points more than to PGD-20 on CIFAR-10 (ResNet-18: RSLAD 55.6 and 53.0,
# AdaAD 56.2 and 53.4 [CGARD]) and up to 4.6 on CIFAR-100, to AutoAttack 4 to 6 [CGARD, IGDM], small
# ones 5 to 8. Nets that mask gradients lose 10 (60.8 and 51.0, a log of [CRDND]) and more [GAIRAT].
# So 5 points are noted and 8 warned of. A net of which PGD leaves less than 40% loses more without
# masking anything (a toy TRADES net 10 of 32): it is warned of where half is lost.

USUAL = 2.6  # so much is lost anyway: of few images, a gap must be told apart from it
NOTED = 5
WARNED = 8
STRONG = 40  # per cent under PGD-20, from which WARNED holds
BLIND = 0.05  # the share of images without a usable gradient that is warned of
HUGE = 64 / 255  # a radius that nothing should survive
SURVIVE = 1  # per cent that may


def gap_of(right: dict[str, Tensor], name: str) -> tuple[float, float]:
    """How many points an attack finds more than PGD-20, and half its 95% interval."""
    difference = 100 * (right["pgd_sat"].double() - right[name].double())
    half = 1.96 * difference.std(correction=0) / math.sqrt(len(difference))
    return round(difference.mean().item(), 2), half.item()


def gaps(right: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """(warnings, notes) of what cw, apgd and aa find more than PGD-20."""
    warnings, notes = [], []
    if "pgd_sat" not in right:
        return warnings, notes
    left = I.percent(right["pgd_sat"])
    limit = WARNED if left >= STRONG else max(WARNED, left / 2)
    for name in ("cw", "apgd", "aa"):
        if name not in right:
            continue
        gap, half = gap_of(right, name)
        if gap >= limit and gap - half > USUAL:
            warnings.append(f"{name} is {gap:.1f} points under PGD-20")
        elif gap >= NOTED:
            told = f"note: {name} is {gap:.1f} ± {half:.1f} points under PGD-20, which flatters"
            usual = "usual for students of soft labels" if left >= STRONG else "usual for weak nets"
            notes.append(f"{told} ({usual}): quote {name}")
    return warnings, notes


def masking(right: dict[str, Tensor], alive: int = 0, of: int = 0) -> list[str]:
    """Warnings, from who is still right after what; so many of so many images survive 64/255.

    A share above SURVIVE is warned of; how little few images say, their interval says.
    """
    warnings, _ = gaps(right)
    if "aa" in right and right["clean"].any():
        by_square = (right["fab-t"] & ~right["aa"])[right["clean"]]
        if I.percent(by_square) > 1:
            warnings.append("Square, which uses no gradients, beats APGD")
    if 100 * alive > SURVIVE * of:
        low, high = interval(alive / of, of)
        told = f"{alive} of {of} right images survive eps = 64/255"
        warnings.append(f"{told}, {low:.1f}% to {high:.1f}% of such images (95%)")
    return warnings


def for_a_huge_radius(right: dict[str, Tensor]) -> str:
    """The attack that is made once more with a radius that nothing should survive, or "".

    One step alone, FGSM's, is no reason for it.
    """
    if {"pgd_sat", "pgd_trades", "apgd", "aa"} & right.keys():
        return "pgd_sat"
    return "cw" if "cw" in right else ""


def some_right(clean: Tensor) -> Tensor:
    """Indices of at most 256 images that are right."""
    return clean.nonzero().squeeze(1)[:: int(clean.sum()) // 256 + 1]


def survivors(
    net: nn.Module, x: Tensor, y: Tensor, clean: Tensor, seed=0, batch_size=0, attack=None
) -> dict:
    """How many images that are right survive 64/255, which nothing should, of at most 256.

    {"alive": so many, "of": of so many, "left_out": a class that does not count, or None}: the one
    that most of the survivors have. A weak net that says one class of nearly everything is right
    there whatever is done to the image, and masks nothing. attack: pgd_sat or another that takes
    eps.
    """
    if not clean.any():
        return {"alive": 0, "of": 0, "left_out": None}
    some = some_right(clean)
    device = next(net.parameters()).device
    huge = I.repeatable(attack or I.pgd_sat, device, seed, eps=HUGE)
    text = f"looking for masked gradients at {protocol.as_pixels(HUGE)}"
    alive = I.correct(net, x[some], y[some], huge, batch_size, text)
    classes = y[some].cpu()
    if len(y.unique()) == 1 or not alive.any():
        return {"alive": int(alive.sum()), "of": len(alive), "left_out": None}
    most = classes[alive].mode().values
    others = alive[classes != most]
    return {"alive": int(others.sum()), "of": len(others), "left_out": int(most)}


def without_gradient(objective, z: Tensor) -> tuple[int, int]:
    """(images whose gradient is zero, images of which it is not finite)."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(z)
        if not value.requires_grad:  # a net that no gradient passes through
            return len(z), 0
        (grad,) = torch.autograd.grad(1024 * value.sum(), z, allow_unused=True)
    if grad is None:
        return len(z), 0
    grad = grad.flatten(1)
    broken = ~grad.isfinite().all(1)
    return int((~broken & (grad == 0).all(1)).sum()), int(broken.sum())


def blindness(net: nn.Module, x: Tensor, y: Tensor, clean: Tensor, names: list[str]) -> list[str]:
    """Warnings of gradients that are zero or not finite, on at most 256 images that are right."""
    if not clean.any():
        return []
    some = some_right(clean)
    device = next(net.parameters()).device
    x, y = I.to_float(x[some], device), y[some].to(device)
    margins = {"cw", "pgd_l2", "pgd5_cw"}
    objectives = {}
    if margins & set(names):
        objectives["margin"] = I.cw_objective
    if set(names) - margins:
        objectives["cross-entropy"] = I.ce_objective
    warnings = []
    for kind, make in objectives.items():
        zero = broken = 0
        with I.frozen_eval(net):
            for i in range(0, len(x), 64):
                found = without_gradient(make(net, y[i : i + 64]), x[i : i + 64])
                zero, broken = zero + found[0], broken + found[1]
        for count, what in ((zero, "zero"), (broken, "not finite")):
            if count >= BLIND * len(x):
                told = f"the gradient of the {kind} is {what} on {count} of {len(x)} images"
                warnings.append(f"{told}: attacks that follow it say nothing")
    return warnings


def nan_logits(net: nn.Module, x: Tensor, clean: Tensor) -> list[str]:
    """A line if logits are NaN on images that are wrong, at most 256 of them."""
    wrong = (~clean).nonzero().squeeze(1)
    some = wrong[:: len(wrong) // 256 + 1]
    device = next(net.parameters()).device
    count = 0
    for rows in some.split(64):
        count += int(I.predict(net, I.to_float(x[rows], device)).isnan().any(1).sum())
    if not count:
        return []
    return [f"warning: logits are NaN on {count} of {len(some)} wrong images looked at: no class"]


# ==== 3. Kept as it comes =========================================================================

SLOW = 2  # seconds, after which what is found is written down
AUTO_NAMES = {
    "apgd-ce": "AutoAttack 1/4, APGD-CE",
    "apgd": "AutoAttack 2/4, APGD-T",
    "fab-t": "AutoAttack 3/4, FAB-T",
    "aa": "AutoAttack 4/4, Square",
}
AUTO_NAMES |= {f"{name}_l2": f"{text}, L2" for name, text in AUTO_NAMES.items()}


def fingerprint(*parts) -> str:
    """A hash of tensors, nets and values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                digest.update(name.encode())
                if isinstance(value, Tensor):
                    digest.update(
                        value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                    )
            digest.update(str(part).encode())
        elif isinstance(part, Tensor):
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


class Kept(dict):
    """Who is still right after what, written to a file as it comes and read from it at first.

    What anyone's own attack has found is not taken from the file: it may have changed since.
    """

    def __init__(self, file: Path, columns: list[str]):
        super().__init__()
        self.file = file
        self.lasted = time.time()
        if file.exists():
            with contextlib.suppress(Exception):  # a broken file is as good as none
                found = torch.load(file, weights_only=True)
                known = {*I.ATTACKS, *I.PARTS, *AUTO_NAMES}
                super().update({k: found[k] for k in columns if k in known and k in found})
        if self:
            print(f"going on after {', '.join(self)} (kept in {file})", flush=True)

    def __setitem__(self, name: str, hits: Tensor) -> None:
        super().__setitem__(name, hits)
        seconds, self.lasted = time.time() - self.lasted, time.time()
        if name in AUTO_NAMES or seconds > 10:
            right = "right on clean images" if name == "clean" else "still right"
            told = f"  {AUTO_NAMES.get(name, name)}: {I.percent(hits)}% {right}"
            print(f"{told}, {seconds:.0f} s", flush=True)
        if seconds > SLOW:
            with contextlib.suppress(I.InfoardError):  # the disk is full: no reason to stop
                self.write()

    def write(self) -> None:
        """All there is but the worst, which is made of it."""
        I.save(self.file, {name: hits for name, hits in self.items() if name != "worst"})

    def stop(self) -> str:
        """Writes down what is there, and says so; "" if that is nothing."""
        done = [name for name in self if name not in ("clean", "worst")]
        if not done:
            return ""
        self.write()
        return f"{', '.join(done)} kept in {self.file}"


CHOSEN = "balanced over classes, always the same ones"  # by infoard.test_images


@contextlib.contextmanager
def a_line_a_minute(every: float = 60) -> Iterator[None]:
    """Inside, without a terminal, a line every so many seconds for a batch that takes longer.

    A bar of infoard.progress_bar speaks up only between batches, and an attack of many steps on
    hundreds of images may be a single one.
    """
    if sys.stderr.isatty() or "TQDM_DISABLE" in os.environ or I.world()[0] != 0:
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=tell_of_batches, args=(done, every), daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def tell_of_batches(done: threading.Event, every: float) -> None:
    """Tells, until done, of bars that have said nothing for so many seconds, or of none."""
    from tqdm import tqdm

    begun = told = time.time()
    while not done.wait(every / 60):
        now = time.time()
        bars = list(tqdm._instances.copy())  # as tqdm's own monitor does
        if now - max([told, *(bar.last_print_t for bar in bars)]) < every:
            continue
        told = now
        text = f"  the evaluation has been at work for {tqdm.format_interval(now - begun)}"
        for bar in bars[-1:]:
            name = bar.desc.removesuffix(": ")
            lasts = tqdm.format_interval(now - bar.start_t)
            batches = "1 batch" if bar.total == 1 else f"{bar.total} batches"
            text = f"  {AUTO_NAMES.get(name, name)}: at work for {lasts}, {batches} in all"
        print(text, file=sys.stderr, flush=True)


def list_of_images(data: I.Data, n: int) -> str:
    """The n test images that infoard.test_images chooses, a line each: index, class and, of a
    folder, the file.
    """
    labels = data.y_test.tolist()
    files = getattr(data, "test_files", [])
    lines = []
    for i in I.class_balanced(data.y_test, n).tolist():
        words = [i, data.classes[labels[i]], *files[i : i + 1]]
        lines.append("\t".join(map(str, words)) + "\n")
    return "".join(lines)


def logits_of_some(net: nn.Module, x: Tensor) -> Tensor:
    """Those of eight images, which tell nets apart whose weights and layers are the same."""
    known = next(net.parameters(), x)
    images = I.to_float(x[:8], known.device)
    return I.predict(net, images).bfloat16()  # mostly whatever the order of sums


def kept_for(cfg: I.Config, net: nn.Module, x: Tensor, y: Tensor, options: dict) -> Kept:
    """Where it is kept what attacks find: on this net and these images, by this protocol alone."""
    attacks = I.chosen_attacks(options["attacks"])
    if "aa" in attacks:
        attacks = I.resolve({}, "companions.autoattack:with_l2", "attacks")(attacks)
    how = {name: options.get(name) for name in ("eps", "eps_l2", "seed", "batch_size")}
    # What weights and printed layers do not tell, and the arithmetic.
    how.update(norm=cfg.teacher_norm, arch=cfg.teacher_arch, device=cfg.device)
    how.update(tf32=torch.backends.cudnn.allow_tf32)
    source = options.get("source")
    seen = [logits_of_some(each, x) for each in (net, source) if each is not None]
    key = fingerprint(net, source, *seen, x, y, sorted(how.items()))
    folder = Path(cfg.out) if cfg.out else Path("runs/evaluations")
    return Kept(folder / f"unfinished-{key}.pt", list(attacks))


def is_under_way(cfg: I.Config) -> bool:
    """Whether --out is of a run that has begun and has no results yet."""
    begun, ended = (Path(cfg.out or "", name).exists() for name in ("config.json", "results.json"))
    return bool(cfg.out) and begun and not ended


def after_a_stop(kept: Kept | None, of_a_run: bool) -> tuple[str, ...]:
    """What is told when an evaluation is stopped: what is kept of it, and how it goes on."""
    found = kept.stop() if kept is not None else ""
    if not found:
        return ("nothing of this evaluation is kept",)
    if of_a_run:  # it says by itself how it goes on
        return (found,)
    return (found, "the same command goes on")


def add_images(result: dict, cfg: I.Config, data: I.Data, x: Tensor, y: Tensor) -> None:
    """Adds which of the test images a result is of, and the names of the classes in it."""
    about, n, of = result["about"], len(x), len(data.y_test)
    listed = list_of_images(data, n).encode(errors="surrogateescape")
    about["of"] = of
    about["images"] = {
        "rule": f"infoard.class_balanced(y_test, {n})",
        "list_sha256": hashlib.sha256(listed).hexdigest(),
    }
    if n < of:
        about["chosen"] = CHOSEN
    if n < of and cfg.eval_subset is None:
        about["by_default"] = True
    seen = len(y.unique())
    if seen < len(data.classes):
        told = f"note: the {n} test images are of {seen} of {len(data.classes)} classes"
        result["notes"].append(told)
    result["worst_class_name"] = name_of_worst_class(result, y, data.classes)
    masked = about.get("masking", {})
    if masked.get("left_out") is not None:
        masked["left_out_name"] = data.classes[masked["left_out"]]


def looked_at(cfg: I.Config, data, net: nn.Module, x: Tensor, y: Tensor, **options) -> dict:
    """infoard.evaluate for a run or the verb eval: of which images, kept as it comes."""
    of_a_run, kept = is_under_way(cfg), None
    if I.world()[1] == 1:
        kept = kept_for(cfg, net, x, y, options)
        options["kept"] = kept
    try:
        with a_line_a_minute():
            result = I.evaluate(net, x, y, **options)
    except KeyboardInterrupt as stopped:
        stopped.args += after_a_stop(kept, of_a_run)
        raise
    if kept is not None and of_a_run:
        with contextlib.suppress(I.InfoardError):
            kept.write()  # until the run has its results: another net may come
    elif kept is not None:
        kept.file.unlink(missing_ok=True)
    add_images(result, cfg, data, x, y)
    return result


# ==== 4. Precision ================================================================================
# On CUDA, torch's default for convolutions in fp32 is TF32: factors rounded to 10 bits of mantissa,
# sums in fp32. On an H100 it moves gradients by 5%, and no image out of 40 changed sides under any
# attack (results/gpu). It stays on, as in the field; every result names it.

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def precision(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """In what convolutions of a type are computed on a device: fp32, tf32, bf16, fp16, fp64."""
    if dtype in NAMES:
        return NAMES[dtype]
    rounds = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    if rounds and torch.cuda.get_device_capability(device) >= (8, 0):  # older cards have none
        return "tf32"
    return "fp32"


def precision_of(net: nn.Module) -> str:
    """That in which a net is evaluated here and now, inside autocast or outside."""
    first = next(net.parameters())
    dtype = first.dtype
    if dtype is torch.float32 and torch.is_autocast_enabled(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
    return precision(first.device, dtype)


@contextlib.contextmanager
def exact_fp32(wanted: bool = True) -> Iterator[None]:
    """Inside, if wanted, CUDA's convolutions do not round fp32 to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not wanted
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ==== 5. What evaluate and a run ask for ==========================================================


def classes_of(net: nn.Module, x: Tensor) -> int:
    """K, the length of its logits."""
    return I.predict(net, I.to_float(x[:1], next(net.parameters()).device)).shape[1]


FEW = 100  # images of a class, of which its accuracy carries 8 points and more


def of_worst_class(worst: Tensor, y: Tensor) -> tuple[float, int]:
    """(share, number of images) of the class that attacks leave least of."""
    found = []
    for k in y.unique():
        hits = worst[y == k].double()
        found.append((hits.mean().item(), len(hits)))
    return min(found)


def name_of_worst_class(result: dict, y: Tensor, classes: list) -> str | None:
    """The name of that class, or of all that have as little; None where nothing was attacked."""
    worst = result["worst_class"]
    if worst is None:
        return None
    present = y.unique().tolist()  # the order of per_class
    shares = zip(present, result["per_class"], strict=True)
    return of_names([classes[k] for k, share in shares if share == worst])


# Columns that say nothing of gradients.
NO_GRADIENTS = {"spatial", "corrupt", *further_attacks.SEVERITIES}


def look_closer(
    right: dict[str, Tensor],
    *,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: dict,
    eps: float = 8 / 255,
    eps_l2: float = 0.5,
    batch_size: int = 0,
    seed: int = 0,
    source: nn.Module | None = None,
    kept: dict | None = None,
) -> dict:
    """What is added to a result of infoard.evaluate, from its arguments and who is still right.

    precision; ci95; about, how it was measured; warnings of masked gradients, which no attack on
    another net can give; notes, which are no accusation; and what the method quality of a net that
    makes images, such as MID's, says of x and x'.
    """
    about = protocol.protocol(attacks, len(x), eps, eps_l2, seed)
    more = {"precision": precision_of(model), "ci95": intervals(right)}
    more.update(about=about, warnings=[])
    more["notes"] = nan_logits(model, x, right["clean"])
    unmoved = [name for name, attack in about["attacks"].items() if attack.get("eps") == 0]
    if unmoved:
        told = f"warning: {', '.join(unmoved)} with a radius of 0: no attack, its x' is x"
        more["notes"].append(told)
    if source is None:
        followed = [name for name in attacks if name not in NO_GRADIENTS]
        far = {"alive": 0, "of": 0}
        by = for_a_huge_radius(right)
        if by:
            far = survivors(model, x, y, right["clean"], seed, batch_size, getattr(I, by))
            about["masking"] = {"attack": by, "eps": HUGE, **far}
        more["warnings"] = masking(right, far["alive"], far["of"])
        if followed:
            more["warnings"] += blindness(model, x, y, right["clean"], followed)
        more["notes"] += gaps(right)[1]
    targeted = "apgd" in attacks or "apgd_l2" in attacks
    if targeted and classes_of(model, x) < 4:
        more["notes"].append("note: APGD-T is left out, as it needs four classes")
    if "worst" in right:
        accuracy, n = of_worst_class(right["worst"], y.cpu())
        about["worst_class_n"] = n
        if n < FEW:
            low, high = interval(accuracy, n)
            told = f"note: worst_class is of {n} images, 95% interval {low:.1f} to {high:.1f}"
            more["notes"].append(told)
    if hasattr(model, "quality"):
        device = next(model.parameters()).device
        x_b, y_b = I.to_float(x[:256], device), y[:256].to(device)
        attack = I.repeatable(I.pgd_sat, device, seed, eps=eps)
        more.update(model.quality(x_b, attack(source or model, x_b, y_b)))
    return more


def told(result: dict) -> str:
    """The end of the line of a result: how it was measured; then its notes, a line each."""
    about = result.get("about")
    if not about:
        return "\n".join([f"n {result['n']}", *result.get("notes", [])])
    lines = [protocol.told(about)]
    if result.get("worst_class_name"):
        lines = [f"worst_class is {result['worst_class_name']}  {lines[0]}"]
    starts = protocol.of_starts(about)
    if starts:
        lines.append(f"  {starts}")
    if "masking" in about:
        lines.append(f"  {protocol.of_masking(about['masking'])}")
    return "\n".join([*lines, *result.get("notes", [])])


# ==== 6. Teachers =================================================================================


def check_teacher(
    net: nn.Module, x: Tensor, y: Tensor, name: str, classes: int, by: str = "--teacher-norm"
) -> None:
    """Prints how good it is, in per cent; a guess that was not trained here stops the run.

    by: the option that tells its normalisation.

    Weak, and warned of: the 95% interval of its accuracy, on so many images, reaches down to
    chance, or it is at most twice chance, or a quarter of the way from chance to all if that is
    less. A guess: it reaches down to 1/K; where the images are uneven, a teacher may be of use
    below chance.
    """
    hits = I.correct(net, x, y)
    accuracy = I.percent(hits)
    chance = chance_of(y)
    low = interval(hits.double().mean().item(), len(hits))[0]
    weak = low <= chance or accuracy <= min(2 * chance, chance + (100 - chance) / 4)
    told = f"teacher {name}: clean accuracy {accuracy} on {len(x)} test images"
    if weak:
        told += f", chance is {chance:.1f} (always one class)"
    told += judge(net, x, y, name, classes, weak, by)
    from_here = name.startswith("runs/teachers/")
    if weak and from_here:
        told += ": raise --teacher-epochs"
    I.require(low > 100 / classes or from_here, told)
    print(f"warning: {told}" if weak else told)
