"""What infoard.evaluate says besides accuracies, and what is asked of a teacher before it teaches.

Confidence intervals, warnings of masked gradients, the precision, the images of nets that make any,
and whether a teacher is above chance. infoard.py asks for these by name and, alone, does without.

[Wilson] E. B. Wilson, JASA 1927     [Masked] Athalye et al., 1802.00420
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import infoard as I
from companions.checkpoints import judge

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


def masking(right: dict[str, Tensor], far: float = 0.0) -> list[str]:
    """Warnings, from who is still right after what; far: per cent that survive 64/255."""
    warnings = []
    for name in ("cw", "apgd", "aa"):
        if name in right and "pgd_sat" in right:
            gap = I.percent(right["pgd_sat"]) - I.percent(right[name])
            if gap >= 8:
                warnings.append(f"{name} is {gap:.1f} points under PGD-20")
    if "aa" in right and right["clean"].any():
        by_square = (right["fab-t"] & ~right["aa"])[right["clean"]]
        if I.percent(by_square) > 1:
            warnings.append("Square, which uses no gradients, beats APGD")
    if far > 1:
        warnings.append(f"{far}% of the right ones survive eps = 64/255")
    return warnings


def survivors(net: nn.Module, x: Tensor, y: Tensor, clean: Tensor, seed=0, batch_size=0) -> float:
    """Per cent of at most 256 images that are right and survive 64/255, which nothing should."""
    if not clean.any():
        return 0.0
    some = clean.nonzero().squeeze(1)[:: int(clean.sum()) // 256 + 1]
    device = next(net.parameters()).device
    huge = I.repeatable(I.pgd_sat, device, seed, eps=64 / 255)
    return I.percent(I.correct(net, x[some], y[some], huge, batch_size))


# ==== 3. Precision ================================================================================
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


# ==== 4. What evaluate and a run ask for ==========================================================


def look_closer(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    right: dict[str, Tensor],
    *,
    eps: float = 8 / 255,
    eps_l2: float = 0.5,
    batch_size: int = 0,
    seed: int = 0,
    source: nn.Module | None = None,
) -> dict:
    """What is added to a result of infoard.evaluate, from its arguments and who is still right.

    precision; ci95; warnings, which no attack on another net can give; and what the method quality
    of a net that makes images, such as MID's, says of x and x'.
    """
    more = {"precision": precision_of(model), "ci95": intervals(right), "warnings": []}
    if source is None:
        far = 0.0
        if "pgd_sat" in right and "pgd_trades" in right:  # what pgd stands for
            far = survivors(model, x, y, right["clean"], seed, batch_size)
        more["warnings"] = masking(right, far)
    if hasattr(model, "quality"):
        device = next(model.parameters()).device
        x_b, y_b = I.to_float(x[:256], device), y[:256].to(device)
        attack = I.repeatable(I.pgd_sat, device, seed, eps=eps)
        more.update(model.quality(x_b, attack(source or model, x_b, y_b)))
    return more


def check_teacher(net: nn.Module, x: Tensor, y: Tensor, name: str, classes: int) -> None:
    """Prints how good it is, in per cent; a weak one that was not trained here stops the run."""
    accuracy = I.percent(I.correct(net, x, y))
    weak = accuracy <= min(200 / classes, 50 + 50 / classes)
    told = f"teacher {name}: clean accuracy {accuracy} on {len(x)} test images"
    if weak:
        told += f", chance is {100 / classes:.1f}"
    told += judge(net, x, y, name, classes, weak)
    I.require(not weak or name.startswith("runs/teachers/"), told)
    print(f"warning: {told}" if weak else told)
