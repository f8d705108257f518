"""Generated images to learn from beside the real ones, in the files that the field exchanges.

    python infoard.py --dataset cifar10 --extra 1m.npz --extra-share 0.7
    python infoard.py --dataset cifar10 --extra 'edm/50m_part*.npz'        or a list with commas

A file is what numpy.savez(file, image=..., label=...) writes: image uint8 [N,H,W,3], label integers
[N] among the classes of the data set. It stays on the disk and is memory-mapped; a compressed one
is unpacked once into runs/cache.

Of a batch of B images floor(share B) are generated, drawn with replacement; the others are those
that come next in the epoch's order of real images. An epoch has as many batches as without them,
and so sees 1 - share of the real images, other ones each time. This is the sampler of DM-Improves-
AT (2302.04638), after Carmon et al. (1905.13736) and Rebuffi et al. (2103.01946), which wrote the
first such files.
"""

import glob
import hashlib
import json
import math
import os
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

import infoard as I
from companions.ranks import rank_0_first

SHARE = I.Config.extra_share  # by default
CACHE = Path("runs/cache")


def count(share: float, batch: int) -> int:
    """How many of a batch are generated: the integer below share * batch, but for rounding."""
    return math.floor(share * batch + 1e-9)


def check(cfg: I.Config) -> None:
    """One line for settings of generated images that make no sense together."""
    told = f"--extra-share {cfg.extra_share} is a share of --extra: add --extra FILE.npz"
    I.require(cfg.extra or cfg.extra_share == SHARE, told)
    told = f"--extra-share {cfg.extra_share} of --batch-size {cfg.batch_size} is no image"
    enough = cfg.extra_share == 0 or count(cfg.extra_share, cfg.batch_size) > 0
    I.require(not cfg.extra or enough, f"{told}: raise one of them")


# ==== 1. Files ====================================================================================


def files_of(text: str) -> list[Path]:
    """The files that --extra names: a path, a pattern with *, or several with commas."""
    files = []
    for part in text.split(","):
        part = os.path.expanduser(part.strip())
        found = [part]
        if glob.has_magic(part) and not Path(part).exists():
            found = sorted(glob.glob(part))
        I.require(found, f"--extra: no file is called {part}")
        for path in found:
            I.require(Path(path).is_file(), f"--extra: there is no file {path}")
            files.append(Path(path))
    return files


def member_of(archive: zipfile.ZipFile, path: Path, name: str) -> zipfile.ZipInfo:
    """What a .npz file says of one of its arrays."""
    named = [item.removesuffix(".npy") for item in archive.namelist()]
    told = f"--extra: {path} has {', '.join(named) or 'nothing'}, not image and label"
    I.require(name in named, f"{told}: write it with numpy.savez(file, image=x, label=y)")
    return archive.getinfo(archive.namelist()[named.index(name)])


def unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Path:
    """A compressed array as a file of its own in the cache."""
    store = CACHE / f"extra-{member.CRC:08x}-{member.file_size}-{member.filename}"
    if not store.exists():
        print(f"{path} is compressed: its {member.filename} is unpacked once, to {store}")
        CACHE.mkdir(parents=True, exist_ok=True)
        part = store.with_name(f"{store.name}.part{os.getpid()}")
        try:
            with archive.open(member) as packed, open(part, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            os.replace(part, store)
        finally:
            part.unlink(missing_ok=True)
    return store


def mapped(path: Path, start: int) -> np.ndarray:
    """The array in the .npy format that begins at a byte of a file, memory-mapped."""
    with open(path, "rb") as file:
        file.seek(start)
        version = npy.read_magic(file)
        read_header = npy.read_array_header_2_0
        if version == (1, 0):
            read_header = npy.read_array_header_1_0
        shape, by_columns, dtype = read_header(file)
        I.require(not dtype.hasobject, f"--extra: {path} holds Python objects, not numbers")
        order = "F" if by_columns else "C"
        array = np.memmap(path, dtype, "r", file.tell(), shape, order)
    return array.view(np.ndarray)


def array_of(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    """An array of a .npz file, memory-mapped.

    An array that is not compressed lies in the file as it is, behind a header of 30 bytes and two
    fields whose lengths stand in its bytes 26 to 29.
    """
    member = member_of(archive, path, name)
    if member.compress_type != zipfile.ZIP_STORED:
        return mapped(unpacked(archive, member, path), 0)
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        lengths = struct.unpack("<HH", file.read(4))
    return mapped(path, member.header_offset + 30 + sum(lengths))


def checked(path: Path, image: np.ndarray, label: np.ndarray, classes: int) -> None:
    """One line for arrays that are no images of these classes."""
    told = f"--extra: {path}: image is {image.dtype} {list(image.shape)}"
    shaped = image.ndim == 4 and image.shape[-1] == 3 and image.size > 0
    I.require(image.dtype == np.uint8 and shaped, f"{told}, not uint8 [N,H,W,3]")
    told = f"--extra: {path}: label is {label.dtype} {list(label.shape)}"
    integers = np.issubdtype(label.dtype, np.integer) and label.shape == image.shape[:1]
    I.require(integers, f"{told}, not integers [{len(image)}], one for each image")
    told = f"--extra: {path}: labels of {label.min()} to {label.max()}"
    known = 0 <= label.min() and label.max() < classes
    I.require(known, f"{told}, and the data have {classes} classes, 0 to {classes - 1}")


def opened(path: Path, classes: int) -> tuple[np.ndarray, Tensor]:
    """Images uint8 [N,H,W,3], memory-mapped, and labels long [N] of a .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            image, label = [array_of(archive, path, name) for name in ("image", "label")]
            checked(path, image, label, classes)
    except (I.InfoardError, OSError):
        raise
    except Exception as error:  # whatever a damaged file makes its readers raise
        why = " ".join(str(error).split())
        raise I.InfoardError(f"--extra: {path} is damaged or no .npz file ({why})") from None
    return image, torch.from_numpy(label.astype(np.int64))


# ==== 2. What a run learns from ===================================================================


class Extra:
    """Generated images [N,H,W,3] in parts, and their labels [N]."""

    def __init__(self, images: list[np.ndarray], labels: Tensor):
        self.images, self.labels = images, labels
        self.ends = np.cumsum([len(part) for part in images])

    def pick(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The images uint8 [B,3,H,W], channels last in memory, and labels [B] of these rows."""
        picked = []
        for row in rows.tolist():
            part = np.searchsorted(self.ends, row, side="right")
            picked.append(self.images[part][row - self.ends[part]])  # from its end
        return torch.from_numpy(np.stack(picked)).permute(0, 3, 1, 2), self.labels[rows]

    def mixed(self, run: I.Run, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of real images [B/ranks,C,H,W] whose last ones give way to generated ones.

        Each rank draws for the images of all ranks and takes its own.
        """
        whole = len(x) * run.ranks
        n = count(run.cfg.extra_share, whole)
        rows = torch.full((whole,), -1)  # -1: a real image
        if n:
            drawn = torch.randint(len(self.labels), (n,), generator=run.generators["data"])
            rows[whole - n :] = drawn
        rows = rows[run.rank :: run.ranks]
        rows = rows[rows >= 0]
        if not len(rows):
            return x, y
        images, labels = self.pick(rows)
        images = fitted(images, x)
        kept = len(x) - len(rows)
        x = torch.cat([x[:kept], images.to(x.device, non_blocking=True)])
        y = torch.cat([y[:kept], labels.to(y.device, non_blocking=True)])
        return x.contiguous(memory_format=torch.channels_last), y


def fitted(images: Tensor, x: Tensor) -> Tensor:
    """Images uint8 [B,3,h,w] in the size and the type of x [B,3,H,W]."""
    if images.shape[2:] != x.shape[2:]:
        from torchvision.transforms.v2 import InterpolationMode, functional

        images = functional.resize(images, x.shape[2:], InterpolationMode.BICUBIC)
    if x.dtype == torch.uint8:
        return images
    return I.to_float(images, images.device)


def identity(cfg: I.Config) -> dict:
    """What tells the generated images of a run from others: a hash of sizes and checksums that the
    files keep of their arrays; without such images nothing.
    """
    if not cfg.extra:
        return {}
    known = []
    for path in files_of(cfg.extra):
        I.require(zipfile.is_zipfile(path), f"--extra: {path} is damaged or no .npz file")
        with zipfile.ZipFile(path) as archive:
            members = [member_of(archive, path, name) for name in ("image", "label")]
            known += [[member.file_size, member.CRC] for member in members]
    return {"extra_sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest()}


def attached(cfg: I.Config, data: I.Data) -> I.Data:
    """The data of a run with the generated images of --extra, of which it tells."""
    open_one = rank_0_first(opened)  # it may have to unpack it
    parts = [open_one(path, len(data.classes)) for path in files_of(cfg.extra)]
    images = [image for image, _ in parts]
    labels = torch.cat([label for _, label in parts])
    n = count(cfg.extra_share, cfg.batch_size)
    about = f"{len(labels):,} generated images, {n} of each batch of {cfg.batch_size}"
    sizes = {image.shape[1:3] for image in images}
    told = f"--extra: the files of {cfg.extra} hold images of several sizes, {sorted(sizes)}"
    I.require(len(sizes) == 1, f"{told}: name files of one size")
    before, size = [*sizes.pop()], [*data.x_train.shape[2:]]
    if before != size:
        about += f", resampled from {before} to {size} pixels"
    print(f"{cfg.extra}: {about}")
    return replace(data, extra=Extra(images, labels), about=data.about | identity(cfg))
