"""Harder augmentation for training images: the recipe IDBH (cifar10-weak), or none at all.

    python infoard.py --augment idbh

A mirror image with p = 1/2; cropshift; one of eight changes of colour or shape, of equal chance;
with p = 1/2 a rectangle is erased. All are drawn for each image from the generator of a run, and
made at once on the device where the images are. u: numbers in [0,1) for each image, [n,B].

[IDBH] Li and Spratling, Data augmentation alone can improve adversarial training, ICLR 2023; what
    is drawn from which range is that of its released code
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

import infoard as I

BLENDS = (  # f x + (1-f) function(x, 0) with f of so much to 1.9
    (vision.adjust_saturation, 0.1),
    (vision.adjust_brightness, 0.5),
    (vision.adjust_contrast, 0.5),
    (vision.adjust_sharpness, 0.1),
)
KINDS = 8  # of changes: the four blends, then these, of which a rotation is what is left
AUTOCONTRAST, EQUALIZE, SHEAR = 4, 5, 6


def none(x: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """The images as they are."""
    return x


def up_to(u: Tensor, n: Tensor | int) -> Tensor:
    """Integers of 0 to n, of equal chance, from u in [0,1)."""
    return (u * (n + 1)).long()


def between(u: Tensor, low: float, high: float) -> Tensor:
    """Numbers between two others, from u in [0,1)."""
    return low + (high - low) * u


def warped(x: Tensor, matrix: list[Tensor]) -> Tensor:
    """x'(p) = x(A p + b) by the nearest pixel, zero outside; [a, b, b1, c, d, b2] of each image, p
    from the centre in units of half the image.
    """
    grid = F.affine_grid(torch.stack(matrix, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, "nearest", "zeros", align_corners=False)


def box(x: Tensor, top: Tensor, rows: Tensor, left: Tensor, columns: Tensor) -> Tensor:
    """True [B,1,H,W] in a rectangle of each image, whose corner and size are [B]."""
    below = torch.arange(x.shape[2], device=x.device) - top[:, None]
    right = torch.arange(x.shape[3], device=x.device) - left[:, None]
    high = (below >= 0) & (below < rows[:, None])
    wide = (right >= 0) & (right < columns[:, None])
    return (high[:, :, None] & wide[:, None, :])[:, None]


def cropshift(x: Tensor, u: Tensor, most: int) -> Tensor:
    """Cropshift(0, most): l of 0 to most - 1 lines are cut off, some of them columns and the rest
    rows, from either side, and what is left lies anywhere within zeros.
    """
    height, width = x.shape[2:]
    lost = up_to(u[0], most - 1)
    columns = up_to(u[1], lost)
    rows = lost - columns
    from_left, left = up_to(u[2], columns), up_to(u[3], columns)
    from_top, top = up_to(u[4], rows), up_to(u[5], rows)
    right = 2 * (from_left - left) / width
    down = 2 * (from_top - top) / height
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    moved = warped(x, [one, zero, right, zero, one, down])
    return moved * box(x, top, height - rows, left, width - columns)


def changed(x: Tensor, kind: int, u: Tensor) -> Tensor:
    """Images [n,C,H,W] in [0,1] with one of eight changes of colour or shape; u [3,n]."""
    if kind < len(BLENDS):
        function, low = BLENDS[kind]
        f = between(u[0], low, 1.9).view(-1, 1, 1, 1)
        return (f * x + (1 - f) * function(x, 0.0)).clamp(0, 1)
    if kind == AUTOCONTRAST:
        return vision.autocontrast(x)
    if kind == EQUALIZE:
        return vision.equalize(x)
    side = 2 * up_to(u[1], 1) - 1
    one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])
    if kind == SHEAR:
        slope = side * between(u[0], 0.05, 0.15).tan()
        across = u[2] < 0.5
        return warped(x, [one, slope * across, zero, slope * ~across, one, zero])
    angle = side * (1 + up_to(u[0], 9)).deg2rad()
    return warped(x, [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero])


def erased(x: Tensor, u: Tensor) -> Tensor:
    """A rectangle of zeros with p = 1/2: 2 to 33% of the area, aspect 0.3 to 3.3 (its logarithm is
    uniform), the first of ten tries that fits; u [23,B].
    """
    height, width = x.shape[2:]
    area = height * width * between(u[:10], 0.02, 0.33)
    aspect = between(u[10:20], math.log(0.3), math.log(3.3)).exp()
    rows = (area * aspect).sqrt().round()
    columns = (area / aspect).sqrt().round()
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(0, keepdim=True)
    rows = rows.gather(0, first)[0]
    columns = columns.gather(0, first)[0]
    hole = box(x, up_to(u[20], height - rows), rows, up_to(u[21], width - columns), columns)
    chosen = fits.any(0) & (u[22] < 0.5)
    return x.masked_fill(hole & chosen.view(-1, 1, 1, 1), 0)


def idbh(x: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Images [B,C,H,W], uint8 or in [0,1], augmented: float in [0,1].

    Cropshift is (0, 11) at 32 pixels, where pad is 4, and in proportion elsewhere. Each rank draws
    for the images of all ranks and takes its own.
    """
    rank, ranks = I.world()
    u = torch.rand(34, len(x) * ranks, generator=generator)[:, rank::ranks]
    kinds = up_to(u[33], KINDS - 1)  # on the CPU: nothing waits for the device
    u = u.to(x.device, non_blocking=True)
    x = I.to_float(x, x.device)
    mirrored = (u[0] < 0.5) & flip
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    x = cropshift(x, u[1:7], max(1, 11 * pad // 4))
    for kind in range(KINDS):
        rows = (kinds == kind).nonzero().flatten().to(x.device, non_blocking=True)
        if len(rows):
            x[rows] = changed(x[rows], kind, u[7:10, rows])
    return erased(x, u[10:33])
