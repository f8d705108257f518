"""Data sets on the disk or in the net: CIFAR-10, CIFAR-100, SVHN, Tiny-ImageNet, image folders.

    python infoard.py --dataset cifar10 --data-dir ~/data            downloaded if it is missing
    python infoard.py --dataset folder --data-dir photos.zip --image-size 64

    1  what all share    2  torchvision's sets    3  reading images    4  the cache    5  folders

Each of cifar10, cifar100, svhn, tinyimagenet and folder is a loader that infoard.DATASETS names:

    loader(data_dir, *, download, image_size, cache) -> infoard.Data

data_dir: the parent of the data, their folder or archive. download: fetch what is missing.
image_size: pixels to resize to; 0: as they are, or as most are. cache: the folder for what is
unpacked or decoded. Missing or damaged data are one line that says what to put where.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
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
    train, test = open_cifar(kind, name, Path(data_dir).expanduser(), download, Path(cache))
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
    root = Path(data_dir).expanduser()
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


# ==== 3. Reading images ===========================================================================
# What an image needs before it is 8-bit RGB as a viewer shows it; each is told once, with a count.

DEEP = "have 16 bits a pixel and are divided by 257"
FLOATS = "hold floats in [0, 1] and are taken times 255"
ALPHA = "have an alpha channel and are laid on white (on black where that would hide them)"
TURNED = "are turned as their EXIF says"
FRAMES = "have several frames, of which the first is taken"
FLAT = "are of almost one colour (no channel varies by more than 15 of 255)"


def to_8_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Gray images of other numbers as 8 bits, and what was done; refused if their range is open."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)), [DEEP]
    if mode not in ("I", "F"):
        return image, []
    values = np.asarray(image)
    low, high = values.min(), values.max()
    in_range = mode == "F" and 0 <= low <= high <= 1  # false for NaN
    told = f"its 32-bit numbers from {low} to {high} have no known range: save it with 8 bits"
    I.require(in_range, told)
    return Image.fromarray((255 * values).round().astype(np.uint8)), [FLOATS]


def without_alpha(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """RGB of an image, laid on white or, where white would hide it, on black; what was done."""
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if not has_alpha and "transparency" not in image.info:
        return image.convert("RGB"), []
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB"), []
    pixels = np.asarray(image)
    visible = pixels[pixels[..., 3] > 0][:, :3]
    background = "white"
    if len(visible) and visible.min() > 127 and np.ptp(visible, axis=0).max() < 16:
        background = "black"
    paper = Image.new("RGBA", image.size, background)
    paper.alpha_composite(image)
    return paper.convert("RGB"), [ALPHA]


def as_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """An open image in 8-bit RGB, upright, and what was done to it."""
    done = []
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photo and its preview
        image.seek(0)
        done.append(FRAMES)
    if 2 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8:
        done.append(TURNED)
    image.load()  # TIFF is turned here
    kind = image.format
    image = ImageOps.exif_transpose(image)
    image.format = kind
    image, more = to_8_bits(image)
    done += more
    image, more = without_alpha(image)
    done += more
    if max(high - low for low, high in image.getextrema()) < 16:
        done.append(FLAT)
    return image, done


def read_image(file: str) -> tuple[Image.Image, list[str], bytes]:
    """(image in RGB, what was done to it, sha256 of the file), or one line that names the file."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise I.InfoardError(f"cannot read {file}: {error.strerror}") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            rgb, done = as_rgb(image)
    except I.InfoardError as error:
        raise I.InfoardError(f"{file}: {error}") from None
    except Exception as error:  # whatever broken files make their decoders raise
        told = re.sub(" ?<_io.BytesIO[^>]*>", "", " ".join(str(error).split()))
        raise I.InfoardError(f"replace {file}: corrupt, {told}") from None
    return rgb, done, hashlib.sha256(content).digest()


@dataclass
class Part:
    """The image files of a part of a set, in the order of their names, and their labels."""

    files: list[str]
    labels: list[int]


@dataclass
class Found:
    """What lies in a folder: its parts, names of classes, what is to be said of it."""

    train: Part
    test: Part
    classes: list[str]
    notes: list[str] = field(default_factory=list)


def decode_at(found: Found, shape: tuple[int, int], store: Path) -> tuple[list, list, list]:
    """Writes images [N,H,W,3] of this width and height to the file store.

    Gives, of each image, its own width and height, what was done to it, the sha256 of its file.
    """

    def fitted(file: str) -> tuple[bytes, tuple, list[str], bytes]:
        image, done, digest = read_image(file)
        return ImageOps.fit(image, shape).tobytes(), image.size, done, digest

    files = found.train.files + found.test.files
    rows = []
    with open(store, "wb") as f, ThreadPool() as pool:
        for i in I.progress_bar(range(0, len(files), 1024), "decoding 1,024 images each"):
            for pixels, *about in pool.map(fitted, files[i : i + 1024]):
                f.write(pixels)
                rows.append(about)
        f.flush()
        os.fsync(f.fileno())
    sizes, done, digests = zip(*rows, strict=True)
    return sizes, done, digests


def sizes_told(sizes: Counter, shape: tuple[int, int]) -> list[str]:
    """What is to be said of images of several sizes."""
    if len(sizes) < 2:
        return []
    equal = f"{sizes[shape]} of {sizes.total()} have it"
    told = f"images of {len(sizes)} sizes: all are cropped and resampled to {shape[0]}x{shape[1]}"
    return [f"{told} ({equal}); --image-size says another"]


def repeated(digests: list[bytes], found: Found) -> list[str]:
    """What is to be said of equal files in both parts, or of two classes."""
    n = len(found.train.files)
    labels = {}
    for digest, label in zip(digests[:n], found.train.labels, strict=True):
        labels.setdefault(digest, set()).add(label)
    notes = []
    leaked = sum(digest in labels for digest in digests[n:])
    if leaked:
        notes.append(f"{leaked} of {len(digests) - n} test images are training images, too")
    torn = sum(len(of_one) > 1 for of_one in labels.values())
    if torn:
        notes.append(f"{torn} training images lie in folders of several classes")
    return notes


def decode(found: Found, size: int, store: Path) -> dict:
    """Writes all images to the file store; gives what must be known to read them.

    size: pixels to resize to; 0: as most images are.
    """
    files = found.train.files + found.test.files
    shape = (size, size)  # width, height
    if size == 0:
        shape = read_image(files[0])[0].size
    sizes, done, digests = decode_at(found, shape, store)
    counts = Counter(sizes)
    most_common, most = counts.most_common(1)[0]
    if size == 0 and most > counts[shape]:
        shape = most_common
        decode_at(found, shape, store)

    notes = list(found.notes)
    if size == 0:
        notes += sizes_told(counts, shape)
    for kind in (DEEP, FLOATS, ALPHA, TURNED, FRAMES, FLAT):
        such = [file for file, of_file in zip(files, done, strict=True) if kind in of_file]
        if such:
            notes.append(f"images that {kind}: {len(such)}, such as {inner_name(such[0])}")
    notes += repeated(digests, found)
    n = len(found.train.files)
    width, height = shape
    return {
        "labels": found.train.labels + found.test.labels,
        "train": n,
        "shape": [height, width, 3],
        "classes": found.classes,
        "notes": notes,
        "files_sha256": [
            hashlib.sha256(b"".join(digests[:n])).hexdigest(),
            hashlib.sha256(b"".join(digests[n:])).hexdigest(),
        ],
    }


MANY = 5_000  # images, or
LARGE = 50e6  # bytes of their files, above which two cores take seconds to decode them


def takes_a_while(files: list[str]) -> bool:
    """Whether so many images are to be decoded that it is said beforehand."""
    sizes = [os.path.getsize(file) for file in files if os.path.exists(file)]
    return len(files) > MANY or sum(sizes) > LARGE


@dataclass
class FolderData(I.Data):
    """Data of image files; test_files: the paths of the test images below their folder."""

    test_files: list[str] = field(default_factory=list)


def inner_name(file: str) -> str:
    """The last three parts of a path: train/class/name."""
    return "/".join(Path(file).parts[-3:])


# ==== 4. The cache ================================================================================

READER = "reader 2"  # what others have decoded is decoded again: 1 made 16-bit images white


def is_hidden(name: str) -> bool:
    """Whether a name is that of a hidden file, or of a folder that only machines use."""
    return name.startswith((".", "@")) or name in ("__MACOSX", "__pycache__", "lost+found")


def not_readable(error: OSError) -> None:
    """For os.walk, which would pass over what it may not read."""
    raise error


def walk(top: Path) -> list[tuple[str, list[str]]]:
    """Sorted (folder, names in it) below a folder, through links, without what is hidden."""
    found = []
    for here, folders, names in os.walk(top, followlinks=True, onerror=not_readable):
        real = os.path.realpath(here) + os.sep
        inner = []
        for name in folders:
            back = real.startswith(os.path.realpath(os.path.join(here, name)) + os.sep)
            if not is_hidden(name) and not back:  # a link to where one comes from has no end
                inner.append(name)
        folders[:] = inner
        found.append((here, sorted(name for name in names if not is_hidden(name))))
    return sorted(found)


def state_of(file: str) -> str:
    """What changes when a file does: size, times and, of a link, where it leads."""
    try:
        stat = os.stat(file)
    except FileNotFoundError:
        return "leads nowhere"
    leads = os.path.realpath(file) if os.path.islink(file) else ""
    return f"{leads} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def fingerprint(source: Path) -> str:
    """12 digits that change with the name, size, times or place of any file in train/, test/ and
    val/ of a folder, or of an archive; not with how the path to it is written.
    """
    lines = [READER, os.path.realpath(source)]
    if source.is_file():
        lines.append(state_of(str(source)))
    for part in ("train", "test", "val"):
        if (source / part).is_dir():
            for here, names in walk(source / part):
                lines.append(f"{os.path.relpath(here, source)} {os.path.realpath(here)}")
                lines += [f"{name} {state_of(os.path.join(here, name))}" for name in names]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:12]


@contextlib.contextmanager
def blaming(cache: Path) -> Iterator[None]:
    """Errors of the disk inside are the cache's: its folder, not the data, is to be looked at."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a broken archive
            raise
        told = f"cannot write decoded images to {cache} ({error.strerror})"
        raise I.InfoardError(f"{told}: free space there, or work in another folder") from None


@contextlib.contextmanager
def working_in(cache: Path) -> Iterator[Path]:
    """A folder in the cache for as long as it is needed; those of killed processes go."""
    with blaming(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(".decoding*"):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > 86_400:  # so long takes none that lives
                    shutil.rmtree(old, ignore_errors=True)
        work = tempfile.mkdtemp(dir=cache, prefix=".decoding")
    try:
        yield Path(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def written(images: Path) -> list[int]:
    """Size and time of the file of images: others, and it is not what was written."""
    stat = images.stat()
    return [stat.st_size, stat.st_mtime_ns]


def known_facts(facts: Path, images: Path) -> dict | None:
    """What a cache says of its images; None if there is none or it is broken."""
    try:
        found = json.loads(facts.read_text())
        whole = found["written"] == written(images) and "test_files" in found
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def read_cached(name: str, source: Path, size: int, cache: Path, find: Callable) -> I.Data:
    """Images of a folder or archive, memory-mapped; decoded once for each state of its files.

    find: Path -> Path, the folder of the data in what the archive holds.
    """
    facts = cache / f"{name}-{size}-{fingerprint(source)}.json"
    images = facts.with_suffix(".images")
    found = known_facts(facts, images)
    if found is None:
        with working_in(cache) as work:
            if source.is_file():
                with blaming(cache):
                    unpack(source, work)
                source = find(work) or work
            listed = train_and_test(source)
            files = listed.train.files + listed.test.files
            if takes_a_while(files):
                print(f"decoding {len(files):,} images, once: kept in {cache}", flush=True)
            with blaming(cache):
                store = work / ".images"
                found = decode(listed, size, store)
                os.replace(store, images)
                found["written"] = written(images)
            found["test_files"] = [os.path.relpath(file, source) for file in listed.test.files]
            I.save(facts, found)
    for note in found["notes"]:
        print(f"warning: {note}")

    x = np.memmap(images, np.uint8, "c").reshape(-1, *found["shape"])
    x = channels_last(x)
    y = torch.tensor(found["labels"])
    n = found["train"]
    data = FolderData(x[:n], y[:n], x[n:], y[n:], found["classes"])
    data.test_files = found["test_files"]
    data.about = {"files_sha256": found["files_sha256"]}
    return data


# ==== 5. Image folders ============================================================================

TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def labels_of_files(notes: Path) -> dict[str, str]:
    """{file: class} of Tiny-ImageNet's val_annotations.txt, nothing if there is none."""
    if not notes.exists():
        return {}
    rows = [line.split("\t") for line in notes.read_text().splitlines()]
    return {file: label for file, label, *_ in rows}


ENDINGS = (
    ".avif .bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
).split()


def as_meant(name: str) -> str:
    """A name without what people and systems write in different ways: case, accents, spaces."""
    return unicodedata.normalize("NFC", name).casefold().strip().replace("_", " ")


def listed(names: Iterable[str]) -> str:
    """The first names of some, and how many there are if that is not all."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def class_folders(top: Path) -> tuple[list[str], list[str]]:
    """(sorted names of the folders in a folder, what is to be said of what else lies there)."""
    entries = sorted(top.iterdir())
    names = [entry.name for entry in entries if entry.is_dir()]
    loose = [entry.name for entry in entries if entry.suffix.lower() in ENDINGS]
    loose = [name for name in loose if not is_hidden(name) and name not in names]
    notes = []
    if loose:
        told = f"{len(loose)} images lie in {top.name}/ itself, in no folder of a class, and are"
        notes.append(f"{told} passed over: {listed(loose)}")
    hidden = [name for name in names if is_hidden(name)]
    if hidden:
        notes.append(f"no classes, passed over in {top.name}/: {listed(hidden)}")
    return [name for name in names if not is_hidden(name)], notes


def files_of(top: Path) -> tuple[list[str], list[str]]:
    """(image files below a folder, in the order of their names; all other files)."""
    images, others = [], []
    for here, names in walk(top):
        for name in names:
            kind = images if Path(name).suffix.lower() in ENDINGS else others
            kind.append(os.path.join(here, name))
    return images, others


def others_told(part: str, others: list[str]) -> list[str]:
    """What is to be said of files that are not read, of each ending apart."""
    endings = Counter(Path(file).suffix.lower() or "without an ending" for file in others)
    kinds = listed(f"{ending} ({n})" for ending, n in endings.most_common())
    return [f"files in {part}/ that are not read as images: {kinds}"] if others else []


def training_part(top: Path) -> tuple[Part, list[str], list[str]]:
    """The images of train/ with their classes, and what is to be said of it."""
    classes, notes = class_folders(top)
    told = f"{top} has {len(classes)} folders of classes ({listed(classes)}): two at least"
    I.require(len(classes) > 1, told)
    twins = [name for name, n in Counter(map(as_meant, classes)).items() if n > 1]
    same = [name for name in classes if as_meant(name) in twins]
    I.require(not same, f"{top} has {listed(same)}: one class or two? Rename or join them")
    part, strange = Part([], []), []
    for k, name in enumerate(classes):
        images, others = files_of(top / name)
        told = f"{top / name} is a class without images"
        if others:
            told += f" (it holds {listed(Path(file).name for file in others)})"
        I.require(images, f"{told}: put some there, or remove it")
        part.files += images
        part.labels += [k] * len(images)
        strange += others
    return part, classes, notes + others_told(top.name, strange)


def test_folder(place: Path, classes: list[str]) -> Path:
    """test/ if it has folders of these classes, else val/."""
    found = []
    for name in ("test", "val"):
        if (place / name).is_dir():
            inner, _ = class_folders(place / name)
            found += [f"{name}/{folder}" for folder in inner]
            as_classes = {as_meant(folder) for folder in inner} & set(map(as_meant, classes))
            if as_classes or (place / name / "val_annotations.txt").exists():
                return place / name
    lies = listed(found or sorted(entry.name for entry in place.iterdir() if entry.is_dir()))
    told = f"{place} has no folders of its classes ({listed(classes)}) in test/ or val/: it has"
    raise I.InfoardError(f"{told} {lies}")


def test_part(top: Path, classes: list[str]) -> tuple[Part, list[str]]:
    """The images of test/ or val/, and what is to be said of it."""
    known = {name: k for k, name in enumerate(classes)}
    noted = labels_of_files(top / "val_annotations.txt")
    folders, notes = class_folders(top)
    part, strange = Part([], []), []
    for folder in folders:
        images, others = files_of(top / folder)
        strange += others
        for file in images:
            label = noted.get(Path(file).name, folder)
            if label not in known:
                near = [name for name in classes if as_meant(name) == as_meant(label)]
                told = f"{file} is of class {label}, which train/ does not have"
                hint = f": it has {near[0]}, which must be written equally" if near else ""
                raise I.InfoardError(f"{told}{hint}")
            part.files.append(file)
            part.labels.append(known[label])
    I.require(part.files, f"{top} holds no images")
    seen = set(part.labels)
    missing = [name for name in classes if known[name] not in seen]
    if missing:
        notes.append(f"{top.name}/ has no images of {listed(missing)}")
    return part, notes + others_told(top.name, strange)


def train_and_test(place: Path) -> Found:
    """The class folders in train/, and those in test/ or, if it has none, in val/."""
    train, classes, notes = training_part(place / "train")
    test, more = test_part(test_folder(place, classes), classes)
    return Found(train, test, classes, notes + more)


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
    root = Path(data_dir).expanduser()
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
    if (root / "train").is_dir() or root.is_file():
        return root
    inner = [folder for folder in sorted(root.glob("*/")) if not is_hidden(folder.name)]
    found = [folder for folder in inner if (folder / "train").is_dir()]
    names = listed([folder.name for folder in found])
    I.require(len(found) < 2, f"several folders in {root} have a train/ ({names}): name one")
    return found[0] if found else None


def folder(data_dir="data", *, download=True, image_size=0, cache="runs/cache") -> I.Data:
    """Anyone's images: train/CLASS/IMAGE and test/CLASS/IMAGE or val/CLASS/IMAGE."""
    root = Path(data_dir).expanduser()
    hint = "put train/CLASS/IMAGE and test/CLASS/IMAGE there, or name its --data-dir"
    with told_in_one_line("image folder", root, hint):
        source = find_folder(root)
        if source is None and root.is_dir():
            lies = listed(sorted(entry.name for entry in root.iterdir())) or "nothing"
            raise I.InfoardError(f"no train/ in {root}, which holds {lies}: {hint}")
        I.require(source, f"no folder or archive is called {root}: {hint}")
        return read_cached("folder", source, image_size, Path(cache), find_folder)
