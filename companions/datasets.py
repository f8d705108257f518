"""Data sets on the disk or in the net: CIFAR-10, CIFAR-100, SVHN, Tiny-ImageNet, image folders.

    python infoard.py --dataset cifar10 --data-dir ~/data            downloaded if it is missing
    python infoard.py --dataset folder --data-dir photos.zip --image-size 64

    1  what all share    2  torchvision's sets    3  the cache    4  image folders

Each of cifar10, cifar100, svhn, tinyimagenet and folder is a loader that infoard.DATASETS names:

    loader(data_dir, *, download, image_size, cache) -> infoard.Data

data_dir: the parent of the data, their folder or archive. download: fetch what is missing.
image_size: pixels to resize to; 0: as they are, or as the first image. cache: the folder for what
is unpacked or decoded. Missing or damaged data are one line that says what to put where.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, ImageFolder
from torchvision.datasets.utils import check_integrity, download_url

import infoard as I

# ==== 1. What all share ===========================================================================


@contextlib.contextmanager
def told_in_one_line(name: str, root: Path, hint: str) -> Iterator[None]:
    """Whatever broken files, disks and networks make their readers raise, as an InfoardError."""
    try:
        yield
    except (I.InfoardError, ImportError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        raise I.InfoardError(f"no usable {name} in {root} ({why}): {hint}") from None


@contextlib.contextmanager
def arriving(root: Path) -> Iterator[Path]:
    """An empty folder whose files move to root at the end: each whole or not at all."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".arriving") as work:
        yield Path(work)
        for file in sorted(Path(work).rglob("*")):
            if file.is_file():
                target = root / file.relative_to(work)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)


def unpack(archive: Path, folder: Path) -> None:
    """The content of a zip, or of a tar of any kind, nothing of which may leave the folder."""
    if archive.suffix == ".zip":
        shutil.unpack_archive(archive, folder)
    else:
        shutil.unpack_archive(archive, folder, filter="data")


def channels_last(images: np.ndarray) -> Tensor:
    """Images [N,H,W,3] as [N,3,H,W], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# ==== 2. torchvision's sets =======================================================================


def broken(root: Path, sums: dict[str, str]) -> list[str]:
    """The files, of {name: md5}, that root does not hold or holds with other content."""
    return [name for name, md5 in sums.items() if not check_integrity(root / name, md5)]


def what_is_wrong(name: str, root: Path, sums: dict[str, str], archive: Path | None = None) -> str:
    """Why a data set is not whole."""
    if any((root / file).exists() for file in sums):
        return f"{name} in {root} is damaged or not complete ({', '.join(broken(root, sums))})"
    if archive is not None and archive.exists():
        return f"{archive} is damaged"
    return f"no {name} in {root}"


def pixels(images: np.ndarray, size: int) -> Tensor:
    """Images [N,H,W,3] as [N,3,size,size], resized by PIL; size 0: as they are."""
    if size == 0:
        return channels_last(np.ascontiguousarray(images))

    def fitted(image: np.ndarray) -> Image.Image:
        return ImageOps.fit(Image.fromarray(image), (size, size))

    resized = np.empty((len(images), size, size, 3), np.uint8)
    with ThreadPool() as pool:
        for i, image in enumerate(pool.imap(fitted, images, chunksize=256)):
            resized[i] = image
    return channels_last(resized)


def open_cifar(kind: type[CIFAR10], name: str, data_dir: Path, download: bool, cache: Path) -> list:
    """[training set, test set] of a class of torchvision, unpacked or downloaded if need be."""
    root = data_dir
    archive = data_dir / kind.filename
    if data_dir.is_file():
        archive = data_dir
    if data_dir.is_file() or data_dir.absolute().name == kind.base_folder:
        root = data_dir.absolute().parent
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    sums = {f"{kind.base_folder}/{file}": md5 for file, md5 in files}
    hint = f"put {kind.filename} or {kind.base_folder}/ there, or name its --data-dir"

    with told_in_one_line(name, root, hint):
        if not broken(root, sums):
            place = root
        elif not broken(cache, sums):
            place = cache
        elif check_integrity(archive, kind.tgz_md5):
            place = cache
            with arriving(cache) as work:
                unpack(archive, work)
        else:
            I.require(download, f"{what_is_wrong(name, root, sums, archive)}: {hint}")
            place = root
            print(f"downloading {kind.url} to {root}")
            with arriving(root) as work:
                kind(work, download=True)
        return [kind(place, train=True), kind(place, train=False)]


def cifar(kind: type[CIFAR10], name: str, data_dir, download, image_size, cache) -> I.Data:
    """CIFAR as a class of torchvision reads it."""
    train, test = open_cifar(kind, name, Path(data_dir), download, Path(cache))
    return I.Data(
        x_train=pixels(train.data, image_size),
        y_train=torch.tensor(train.targets),
        x_test=pixels(test.data, image_size),
        y_test=torch.tensor(test.targets),
        classes=train.classes,
    )


def cifar10(data_dir="data", *, download=True, image_size=0, cache="runs/cache") -> I.Data:
    """CIFAR-10: 50,000 and 10,000 images of 32 pixels, 10 classes."""
    return cifar(CIFAR10, "cifar10", data_dir, download, image_size, cache)


def cifar100(data_dir="data", *, download=True, image_size=0, cache="runs/cache") -> I.Data:
    """CIFAR-100: 50,000 and 10,000 images of 32 pixels, its 100 fine classes."""
    return cifar(CIFAR100, "cifar100", data_dir, download, image_size, cache)


def svhn(data_dir="data", *, download=True, image_size=0, cache="runs/cache") -> I.Data:
    """SVHN, cropped: 73,257 and 26,032 digits of 32 pixels; a mirror image is another digit."""
    root = Path(data_dir)
    if root.is_file():
        root = root.parent
    wanted = [SVHN.split_list[split] for split in ("train", "test")]
    sums = {file: md5 for _, file, md5 in wanted}
    hint = f"put {' and '.join(sums)} there, or name its --data-dir"

    with told_in_one_line("svhn", root, hint):
        lost = broken(root, sums)
        if lost and not download:
            raise I.InfoardError(f"{what_is_wrong('svhn', root, sums)}: {hint}")
        for url, file, md5 in wanted:
            if file in lost:
                print(f"downloading {url} to {root}")
                with arriving(root) as work:
                    download_url(url, work, file, md5)
        train = SVHN(root, "train")
        test = SVHN(root, "test")
    return I.Data(
        x_train=pixels(train.data.transpose(0, 2, 3, 1), image_size),
        y_train=torch.from_numpy(train.labels),
        x_test=pixels(test.data.transpose(0, 2, 3, 1), image_size),
        y_test=torch.from_numpy(test.labels),
        classes=[str(digit) for digit in range(10)],
        flip=False,
    )


# ==== 3. The cache ================================================================================


def read_image(part: ImageFolder, i: int) -> tuple[Image.Image, int]:
    """(image, label), or one line that names a file that cannot be read."""
    try:
        return part[i]
    except (OSError, SyntaxError) as error:
        file, _ = part.samples[i]
        raise I.InfoardError(f"replace {file}: corrupt, {error}") from None


def decode(parts: list[ImageFolder], size: int, store: Path) -> dict:
    """Writes images [N,H,W,3] to the file store; gives what must be known to read them.

    size: pixels to resize to; 0: those of the first image.
    """
    rows = [(part, i) for part in parts for i in range(len(part))]
    shape = (size, size)  # width, height
    if size == 0:
        first, _ = read_image(*rows[0])
        shape = first.size

    def fitted(part: ImageFolder, i: int) -> tuple[bytes, int]:
        image, label = read_image(part, i)
        return ImageOps.fit(image, shape).tobytes(), label

    labels = []
    with open(store, "wb") as f, ThreadPool() as pool:
        for i in I.progress_bar(range(0, len(rows), 1024), "decoding 1,024 images each"):
            for image, label in pool.starmap(fitted, rows[i : i + 1024]):
                f.write(image)
                labels.append(label)
    width, height = shape
    about = {"labels": labels, "train": len(parts[0]), "shape": [height, width, 3]}
    return about | {"classes": parts[0].classes}


def fingerprint(source: Path) -> str:
    """12 digits that change with the name, size or time of any file in a folder or archive."""
    files = sorted(Path(top, name) for top, _, names in os.walk(source) for name in names)
    text = ""
    for file in files or [source]:
        stat = file.stat()
        text += f"{file} {stat.st_size} {stat.st_mtime_ns}\n"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_cached(name: str, source: Path, size: int, cache: Path, find: Callable) -> I.Data:
    """Images of a folder or archive, memory-mapped; decoded once for each state of its files.

    find: Path -> Path, the folder of the data in what the archive holds.
    """
    facts = cache / f"{name}-{size}-{fingerprint(source)}.json"
    images = facts.with_suffix(".images")
    if not facts.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            if source.is_file():
                unpack(source, Path(work))
                source = find(Path(work)) or Path(work)
            store = Path(work, ".images")
            found = decode(train_and_test(source), size, store)
            os.replace(store, images)
            I.save(facts, found)

    found = json.loads(facts.read_text())
    x = np.memmap(images, np.uint8, "c").reshape(-1, *found["shape"])
    x = channels_last(x)
    y = torch.tensor(found["labels"])
    n = found["train"]
    return I.Data(x[:n], y[:n], x[n:], y[n:], found["classes"])


# ==== 4. Image folders ============================================================================

TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def labels_of_files(notes: Path) -> dict[str, str]:
    """{file: class} of Tiny-ImageNet's val_annotations.txt, nothing if there is none."""
    if not notes.exists():
        return {}
    rows = [line.split("\t") for line in notes.read_text().splitlines()]
    return {file: label for file, label, *_ in rows}


def train_and_test(place: Path) -> list[ImageFolder]:
    """The class folders in train/, and those in test/ or, if it has none, in val/."""
    train = ImageFolder(place / "train")
    labelled = any((place / "test" / name).is_dir() for name in train.classes)
    test = ImageFolder(place / ("test" if labelled else "val"))
    noted = labels_of_files(place / "val" / "val_annotations.txt")
    samples = []
    for file, k in test.samples:
        label = noted.get(Path(file).name, test.classes[k])
        I.require(
            label in train.class_to_idx, f"{file} is of class {label}, which train/ does not have"
        )
        samples.append((file, train.class_to_idx[label]))
    test.samples = samples
    return [train, test]


def find_tiny(root: Path) -> Path | None:
    """Tiny-ImageNet's folder or archive: root itself, or in it."""
    for folder in (root / TINY, root):
        if (folder / "val").exists():
            return folder
    for file in (root, root / f"{TINY}.zip"):
        if file.is_file():
            return file
    return None


def tinyimagenet(data_dir="data", *, download=True, image_size=0, cache="runs/cache") -> I.Data:
    """Tiny-ImageNet: 100,000 images and 10,000 of its val, 64 pixels, 200 classes.

    val may lie there as published, with labels in a file, or sorted into folders of classes.
    """
    root = Path(data_dir)
    hint = f"put {TINY}.zip or {TINY}/ there, or name its --data-dir"
    with told_in_one_line("tinyimagenet", root, hint):
        if find_tiny(root) is None and download:
            print(f"downloading {TINY_URL} to {root}")
            with arriving(root) as work:
                download_url(TINY_URL, work, md5=TINY_MD5)
        source = find_tiny(root)
        I.require(source, f"no tinyimagenet in {root}: {hint}")
        return read_cached("tinyimagenet", source, image_size, Path(cache), find_tiny)


def find_folder(root: Path) -> Path | None:
    """The folder that holds train/: root itself or one in it; or root, an archive."""
    for folder in (root, *sorted(root.glob("*/"))):
        if (folder / "train").exists():
            return folder
    return root if root.is_file() else None


def folder(data_dir="data", *, download=True, image_size=0, cache="runs/cache") -> I.Data:
    """Anyone's images: train/CLASS/IMAGE and test/CLASS/IMAGE or val/CLASS/IMAGE."""
    root = Path(data_dir)
    hint = "put train and test there, or name its --data-dir"
    with told_in_one_line("folder", root, hint):
        source = find_folder(root)
        I.require(source, f"no folder in {root}: {hint}")
        return read_cached("folder", source, image_size, Path(cache), find_folder)
