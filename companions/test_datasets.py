"""What holds for datasets.py: published layouts load exactly, what is missing or damaged is told.

Small sets are written as the published ones are; the md5 sums that torchvision knows are replaced
by theirs. There is no network: urlopen is replaced by one that reads a folder.
"""

import contextlib
import hashlib
import io
import os
import pickle
import re
import shutil
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

import infoard as I
from companions import datasets, evaluation
from test_infoard import noise, one_line

each = pytest.mark.parametrize


# ==== 1. Small sets, as published =================================================================


@dataclass
class Truth:
    """What a loader must give: images [N,3,H,W], labels, names of the classes."""

    x_train: np.ndarray
    y_train: list
    x_test: np.ndarray
    y_test: list
    classes: list = field(default_factory=list)


def write_cifar(folder, batches, meta, names_key, labels_key):
    """Pickles of four images each, the last of which is the test set."""
    n = 4 * len(batches)
    x = noise(n)
    y = [i % 7 for i in range(n)]
    names = list("abcdefghij")
    for i, batch in enumerate(batches):
        rows = slice(4 * i, 4 * i + 4)
        content = {"data": x[rows].reshape(4, -1), labels_key: y[rows]}
        (folder / batch).write_bytes(pickle.dumps(content, 2))
    (folder / meta).write_bytes(pickle.dumps({names_key: names}, 2))
    return Truth(x[:-4], y[:-4], x[-4:], y[-4:], names)


def write_cifar10(folder):
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return write_cifar(folder, batches, "batches.meta", "label_names", "labels")


def write_cifar100(folder):
    return write_cifar(folder, ["train", "test"], "meta", "fine_label_names", "fine_labels")


def write_svhn(folder):
    """MATLAB's files, in which the digit 0 has the label 10."""
    matlab = pytest.importorskip("scipy.io")
    x = noise(8)
    y = np.array([10, 1, 2, 9, 10, 3, 4, 5], np.uint8)
    for name, rows in (("train", slice(5)), ("test", slice(5, 8))):
        content = {"X": x[rows].transpose(2, 3, 1, 0), "y": y[rows, None]}
        matlab.savemat(folder / f"{name}_32x32.mat", content, do_compression=True)
    digits = list(y % 10)
    return Truth(x[:5], digits[:5], x[5:], digits[5:], list("0123456789"))


def write_images(folder, *names, seed=0):
    """PNG whatever the name, since JPEG would change the pixels; the first one is gray."""
    x = noise(len(names), 8, seed)
    x[0] = x[0, :1]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = x[i, 0] if i == 0 else x[i].transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / name, "PNG")
    return x


def write_tiny(folder):
    """Unlabelled test images, wnids.txt in no order, labels of val in a file."""
    names = [f"train/n0{k}/images/{i}.JPEG" for k in (1, 2, 3) for i in (0, 1)]
    x = write_images(folder, *names)
    x_val = write_images(folder, *(f"val/images/val_{i}.JPEG" for i in range(4)), seed=1)
    write_images(folder, "test/images/test_0.JPEG")
    (folder / "wnids.txt").write_text("n03\nn01\nn02\n")
    lines = [f"val_{i}.JPEG\tn0{k}\t0\t0\t8\t8\n" for i, k in enumerate((3, 1, 2, 1))]
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    return Truth(x, [0, 0, 1, 1, 2, 2], x_val, [2, 0, 1, 0], ["n01", "n02", "n03"])


def write_folder(folder, test="test"):
    """Anyone's own images."""
    x = write_images(folder / "train", "ant/1.png", "ant/2.png", "bee/0.png", "cow/7.png")
    x_test = write_images(folder / test, "bee/a.png", "cow/a.png", seed=1)
    return Truth(x, [0, 0, 1, 2], x_test, [1, 2], ["ant", "bee", "cow"])


@dataclass
class Published:
    """How a set is published: its folder, its archive, which shutil makes, and who writes it."""

    write: object
    inner: str = ""
    archive: str = ""
    kind: str = ""


SETS = {
    "cifar10": Published(write_cifar10, "cifar-10-batches-py", "cifar-10-python.tar.gz", "gztar"),
    "cifar100": Published(write_cifar100, "cifar-100-python", "cifar-100-python.tar.gz", "gztar"),
    "svhn": Published(write_svhn),
    "tinyimagenet": Published(write_tiny, "tiny-imagenet-200", "tiny-imagenet-200.zip", "zip"),
    "folder": Published(write_folder, "", "mine.tar.xz", "xztar"),
}


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def tell_cifar(patch, kind, root):
    """torchvision's sums of CIFAR are those of the small set in root."""
    folder = root / "d" / kind.base_folder
    for name in ("train_list", "test_list"):
        files = [file for file, _ in getattr(kind, name)]
        patch.setattr(kind, name, [[file, md5(folder / file)] for file in files])
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    patch.setattr(kind, "tgz_md5", md5(root / "new" / kind.filename))


def tell_sums(patch, name, root):
    """The sums that the loaders know are those of the small set in root, until the patch ends."""
    if name == "cifar10":
        tell_cifar(patch, CIFAR10, root)
    elif name == "cifar100":
        tell_cifar(patch, CIFAR100, root)
    elif name == "svhn":
        for split in ("train", "test"):
            url, file, _ = SVHN.split_list[split]
            patch.setitem(SVHN.split_list, split, [url, file, md5(root / "d" / file)])
    elif name == "tinyimagenet":
        patch.setattr(datasets, "TINY_MD5", md5(root / "new" / SETS[name].archive))


def publish(name, root):
    """A small set in root/d, its archive in root/new; the truth."""
    published = SETS[name]
    folder = root / "d" / published.inner
    folder.mkdir(parents=True)
    (root / "new").mkdir()
    truth = published.write(folder)
    if published.archive:
        inner = published.inner or None
        made = shutil.make_archive(root / "packed", published.kind, root / "d", inner)
        shutil.move(made, root / "new" / published.archive)
    return truth


@pytest.fixture
def small(tmp_path, monkeypatch):
    """small(name): a small set in tmp_path, whose sums are known; the truth."""

    def make(name):
        truth = publish(name, tmp_path)
        tell_sums(monkeypatch, name, tmp_path)
        return truth

    return make


def load(name, root, place="d", **options):
    """What lies in root/place, without a network."""
    return I.load_dataset(name, root / place, download=False, cache=root / "cache", **options)


def check(data, truth):
    """Images and labels are the true ones, in the types and the layout that training expects."""
    assert data.classes == truth.classes
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.dtype == torch.uint8
        assert y.dtype == torch.long
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert data.y_train.tolist() == list(truth.y_train)
    assert data.y_test.tolist() == list(truth.y_test)
    assert np.array_equal(data.x_train.numpy(), truth.x_train)
    assert np.array_equal(data.x_test.numpy(), truth.x_test)


# ==== 2. What lies there ==========================================================================


def places(name):
    """Where a user may say that a set lies: parent, folder, parent of the archive, archive."""
    published = SETS[name]
    found = ["d"]
    if published.inner:
        found += [f"d/{published.inner}", "new"]
    if published.archive:
        found.append(f"new/{published.archive}")
    return found


@each("name, place", [(name, place) for name in SETS for place in places(name)])
def test_published_layout_loads_exactly(name, place, small, tmp_path):
    truth = small(name)
    data = load(name, tmp_path, place)
    check(data, truth)
    assert data.flip == (name != "svhn")


@each("name", SETS)
def test_the_current_folder_is_a_place_like_any_other(name, small, tmp_path, monkeypatch):
    truth = small(name)
    monkeypatch.chdir(tmp_path / "d" / SETS[name].inner)
    check(I.load_dataset(name, ".", download=False, cache=tmp_path / "cache"), truth)


def test_one_file_of_svhn_is_where_the_other_is(small, tmp_path):
    truth = small("svhn")
    check(load("svhn", tmp_path, "d/test_32x32.mat"), truth)


def test_an_archive_may_have_any_name(small, tmp_path):
    truth = small("cifar10")
    archive = tmp_path / "new" / SETS["cifar10"].archive
    archive.rename(tmp_path / "new/mine.tgz")
    check(load("cifar10", tmp_path, "new/mine.tgz"), truth)


def test_an_archive_is_unpacked_once_and_stays_alone(small, tmp_path, monkeypatch):
    truth = small("cifar10")
    check(load("cifar10", tmp_path, "new"), truth)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [SETS["cifar10"].archive]
    monkeypatch.setattr(datasets, "unpack", None)
    check(load("cifar10", tmp_path, "new"), truth)


def fitted(x, size):
    """Images [N,3,H,W] as PIL fits them."""
    images = [Image.fromarray(image) for image in x.transpose(0, 2, 3, 1)]
    made = [np.asarray(ImageOps.fit(image, (size, size))) for image in images]
    return np.stack(made).transpose(0, 3, 1, 2)


@each("name", SETS)
@each("size", [8, 16, 40])
def test_images_are_resized_by_pillow(name, size, small, tmp_path):
    truth = small(name)
    truth.x_train = fitted(truth.x_train, size)
    truth.x_test = fitted(truth.x_test, size)
    check(load(name, tmp_path, image_size=size), truth)


def test_without_scipy_its_name_is_told(small, tmp_path, monkeypatch):
    small("svhn")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="scipy"):  # which the command line turns into advice
        load("svhn", tmp_path)


# ==== 3. Image folders and their cache ============================================================


@each("below", ["", "images"])
@each("with_notes", [True, False])
def test_sorted_tiny_imagenet_val_loads(with_notes, below, small, tmp_path):
    small("tinyimagenet")
    val = tmp_path / "d/tiny-imagenet-200/val"
    for i, label in enumerate(("n03", "n01", "n02", "n01")):
        (val / label / below).mkdir(parents=True, exist_ok=True)
        (val / f"images/val_{i}.JPEG").rename(val / label / below / f"val_{i}.JPEG")
    (val / "images").rmdir()
    if not with_notes:
        (val / "val_annotations.txt").unlink()
    assert sorted(load("tinyimagenet", tmp_path).y_test.tolist()) == [0, 0, 1, 2]


def test_folder_is_cached_and_renewed_when_files_change(tmp_path, monkeypatch):
    truth = write_folder(tmp_path / "d", "val")
    check(load("folder", tmp_path), truth)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        check(load("folder", tmp_path), truth)
    Image.new("RGB", (20, 9)).save(tmp_path / "d/train/bee/0.png")  # of another size, too
    data = load("folder", tmp_path)
    assert data.x_train.shape == (4, 3, 8, 8)
    assert not data.x_train[2].any()


def test_of_several_folders_with_images_none_is_taken_unasked(tmp_path):
    write_folder(tmp_path / "a")
    truth = write_folder(tmp_path / "b")
    with pytest.raises(
        I.InfoardError, match="several folders in .* have a train/ .a, b.: name one"
    ):
        load("folder", tmp_path, "")
    check(load("folder", tmp_path, "b"), truth)


def test_images_take_the_size_of_most_not_of_the_first_one(tmp_path, capsys):
    write_folder(tmp_path / "d")
    Image.new("RGB", (20, 9)).save(tmp_path / "d/train/ant/1.png")
    data = load("folder", tmp_path)
    assert data.x_train.shape == (4, 3, 8, 8)
    assert data.x_test.shape == (2, 3, 8, 8)
    assert (
        "2 sizes: all are cropped and resampled to 8x8 (5 of 6 have it)" in capsys.readouterr().out
    )
    load("folder", tmp_path, image_size=8)
    assert "sizes" not in capsys.readouterr().out


def test_a_cache_holds_the_pixels_and_leaves_nothing_else(small, tmp_path):
    truth = small("folder")
    load("folder", tmp_path)
    (facts,) = (tmp_path / "cache").glob("*.json")
    x = np.concatenate([truth.x_train, truth.x_test])
    images = facts.with_suffix(".images").read_bytes()
    assert images == x.transpose(0, 2, 3, 1).tobytes()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@each("place", ["d", "d.zip"])
def test_the_files_of_test_images_are_known(place, tmp_path):
    """Of a folder and of its archive the same, whether they are decoded now or were before."""
    write_folder(tmp_path / "d")
    shutil.make_archive(tmp_path / "d", "zip", tmp_path / "d")
    for _ in range(2):
        data = load("folder", tmp_path, place)
        lines = evaluation.list_of_images(data, 2).splitlines()
        assert lines == ["0\tbee\ttest/bee/a.png", "1\tcow\ttest/cow/a.png"]
    assert evaluation.list_of_images(data, 1).splitlines() == lines[:1]


def break_in_place(images, facts):
    damage(images, 0.5, cut=False)


BROKEN_CACHES = {
    "cut images": lambda images, facts: damage(images, 0.9, cut=True),
    "other images": break_in_place,
    "no images": lambda images, facts: images.unlink(),
    "cut facts": lambda images, facts: damage(facts, 0.5, cut=True),
    "empty facts": lambda images, facts: facts.write_text(""),
    "other facts": lambda images, facts: facts.write_text("[1]"),
    "facts without files": lambda images, facts: facts.write_text(
        facts.read_text().replace('"test_files"', '"others"')
    ),
    "facts of reader 1": lambda images, facts: facts.write_text('{"labels": [0], "train": 1}'),
}


@each("name", BROKEN_CACHES)
def test_a_broken_cache_is_made_again(name, small, tmp_path):
    truth = small("folder")
    load("folder", tmp_path)
    (facts,) = (tmp_path / "cache").glob("*.json")
    BROKEN_CACHES[name](facts.with_suffix(".images"), facts)
    check(load("folder", tmp_path), truth)


def test_a_cache_that_cannot_be_written_is_blamed_not_the_data(small, tmp_path):
    truth = small("folder")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(I.InfoardError, match="cannot write decoded images to .*/cache") as error:
        load("folder", tmp_path)
    assert one_line(error.value)
    assert "put train" not in str(error.value)
    (tmp_path / "cache").unlink()
    load("folder", tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # what is decoded is read where nothing is written
        patch.setattr(datasets, "working_in", None)
        check(load("folder", tmp_path), truth)


def test_what_killed_processes_left_in_the_cache_goes(small, tmp_path):
    small("folder")
    for name, age in (("old", 90_000), ("new", 0)):
        work = tmp_path / f"cache/.decoding{name}"
        work.mkdir(parents=True)
        os.utime(work, (time.time() - age,) * 2)
    load("folder", tmp_path)
    assert [path.name for path in (tmp_path / "cache").glob(".decoding*")] == [".decodingnew"]


def test_a_tilde_is_the_home(small, tmp_path, monkeypatch):
    truth = small("folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    check(I.load_dataset("folder", "~/d", cache=tmp_path / "cache"), truth)


# ---- what changes, and what does not, when a cache is asked for ----


def other_version(root):
    """The same names, sizes and times with other pixels, as an archive may unpack them."""
    shutil.copytree(root / "d", root / "e")
    for path in (root / "e").rglob("*.png"):
        image = np.asarray(Image.open(path))
        Image.fromarray(255 - image).save(path, compress_level=0)
    for path in (root / "d").rglob("*.png"):
        Image.open(path).save(path, compress_level=0)
        twin = root / "e" / path.relative_to(root / "d")
        assert twin.stat().st_size == path.stat().st_size
        os.utime(path, (1, 1))
        os.utime(twin, (1, 1))


@each("link", ["train", "train/ant", "train/ant/1.png"])
def test_a_link_that_leads_elsewhere_is_followed(link, small, tmp_path):
    truth = small("folder")
    other_version(tmp_path)
    shutil.copytree(tmp_path / "d", tmp_path / "set")
    place = tmp_path / "set" / link
    first = []
    for version in "de":
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()
        place.symlink_to(tmp_path / version / link)
        first.append(load("folder", tmp_path, "set").x_train[0].numpy())
    assert np.array_equal(first[0], truth.x_train[0])
    assert np.array_equal(first[1], 255 - truth.x_train[0])


def test_a_file_with_its_old_size_and_time_is_read_again(small, tmp_path):
    small("folder")
    other_version(tmp_path)
    before = load("folder", tmp_path)
    shutil.copy2(tmp_path / "e/train/ant/1.png", tmp_path / "d/train/ant/1.png")
    after = load("folder", tmp_path)
    assert torch.equal(after.x_train[0], 255 - before.x_train[0])
    assert before.about != after.about


def test_a_link_back_has_no_end_and_is_passed_over(small, tmp_path):
    truth = small("folder")
    (tmp_path / "d/train/ant/again").symlink_to(tmp_path / "d/train")
    check(load("folder", tmp_path), truth)


def test_other_spellings_and_other_files_beside_the_images_decode_nothing(
    small, tmp_path, monkeypatch
):
    truth = small("folder")
    data = load("folder", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    (tmp_path / "d/runs").mkdir()
    (tmp_path / "d/runs/log.txt").write_text("of a run that is started here")
    (tmp_path / "d/train/ant/.DS_Store").write_text("of a file manager")
    monkeypatch.setattr(datasets, "decode", None)
    for place in ("d", "d/", "d/../d", "link"):
        again = load("folder", tmp_path, place)
        check(again, truth)
        assert again.about == data.about


def test_the_fingerprint_is_of_the_files_wherever_they_lie(small, tmp_path):
    small("folder")
    shutil.copytree(tmp_path / "d", tmp_path / "copy")
    about = [load("folder", tmp_path, place).about for place in ("d", "copy", "new/mine.tar.xz")]
    assert about[0] == about[1] == about[2]
    Image.new("RGB", (8, 8)).save(tmp_path / "copy/test/bee/a.png")
    changed = load("folder", tmp_path, "copy").about
    assert changed["train_sha256"] == about[0]["train_sha256"]
    assert changed["test_sha256"] != about[0]["test_sha256"]


# ---- images of all kinds ----


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # 0 to 252
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def two_colours():
    """A palette of transparent and of opaque red."""
    image = Image.fromarray((RAMP > 127).astype(np.uint8), "P")
    image.putpalette([0, 0, 255, 255, 0, 0])
    return image


def with_alpha(level):
    """A gray level whose picture lies in the alpha channel."""
    return Image.merge("LA", [Image.new("L", (8, 8), level), Image.fromarray(RAMP)])


def upright(orientation):
    """An image that EXIF turns so that it is COLOURS again."""
    turns = {3: np.rot90(COLOURS, 2), 6: np.rot90(COLOURS, 1), 8: np.rot90(COLOURS, 3)}
    image = Image.fromarray(np.ascontiguousarray(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image, {"exif": exif}


GRAY = np.repeat(RAMP[..., None], 3, axis=2)
RED = np.where(RAMP[..., None] > 127, [255, 0, 0], 255).astype(np.uint8)
IMAGES = {  # how it is saved; the pixels that must be read; what is told
    "rgb.png": (lambda: Image.fromarray(COLOURS), COLOURS, None),
    "gray.png": (lambda: Image.fromarray(RAMP), GRAY, None),
    "bits.png": (lambda: Image.fromarray(RAMP > 127), np.where(GRAY > 127, 255, 0), None),
    "sixteen.png": (lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), GRAY, datasets.DEEP),
    "sixteen.tif": (lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), GRAY, datasets.DEEP),
    "sixteen.pgm": (lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), GRAY, datasets.DEEP),
    "big_endian.tif": (lambda: Image.fromarray(RAMP.astype(">u2") * 257), GRAY, datasets.DEEP),
    "float.tiff": (lambda: Image.fromarray(RAMP.astype(np.float32) / 255), GRAY, datasets.FLOATS),
    "dark_alpha.png": (lambda: with_alpha(0), 255 - GRAY, datasets.ALPHA),
    "light_alpha.png": (lambda: with_alpha(255), GRAY, datasets.ALPHA),
    "opaque.png": (lambda: Image.fromarray(COLOURS).convert("RGBA"), COLOURS, None),
    "palette.png": (lambda: (two_colours(), {"transparency": 0}), RED, datasets.ALPHA),
    "palette.gif": (lambda: (two_colours(), {"transparency": 0}), RED, datasets.ALPHA),
    "gray.gif": (lambda: Image.fromarray(RAMP), GRAY, None),
    "turned.png": (lambda: upright(6), COLOURS, datasets.TURNED),
    "turned.webp": (lambda: upright_lossless(8), COLOURS, datasets.TURNED),
    "turned.tif": (lambda: upright(3), COLOURS, datasets.TURNED),
    "frames.gif": (lambda: frames(), GRAY, datasets.FRAMES),
    "frames.tif": (lambda: frames(), GRAY, datasets.FRAMES),
    "white.png": (lambda: Image.new("L", (8, 8), 255), np.full_like(GRAY, 255), datasets.FLAT),
    "clear.png": (lambda: Image.new("RGBA", (8, 8)), np.full_like(GRAY, 255), datasets.FLAT),
    "photo.jfif": (lambda: (Image.fromarray(GRAY), {"format": "PNG"}), GRAY, None),
}


def upright_lossless(orientation):
    image, options = upright(orientation)
    return image, options | {"lossless": True}


def frames():
    more = [Image.fromarray(255 - RAMP)]
    return Image.fromarray(RAMP), {"save_all": True, "append_images": more}


def save_as(made, path):
    image, options = made if isinstance(made, tuple) else (made, {})
    image.save(path, **options)


@each("name", IMAGES)
def test_images_are_read_as_a_viewer_shows_them(name, tmp_path, capsys):
    make, pixels, told = IMAGES[name]
    write_folder(tmp_path / "d")
    save_as(make(), tmp_path / "d/train/ant" / name)  # after 1.png and 2.png
    save_as(make(), tmp_path / "d/test/cow" / name)
    data = load("folder", tmp_path)
    assert np.array_equal(data.x_train[2].permute(1, 2, 0), pixels)
    lines = [line for line in capsys.readouterr().out.splitlines() if "images that" in line]
    if told is None:
        assert lines == []
    else:  # once, with a count
        assert f"warning: images that {told}: 2, such as train/ant/{name}" in lines
    load("folder", tmp_path)
    assert [line for line in capsys.readouterr().out.splitlines() if "images that" in line] == lines


REFUSED = {  # an image that cannot be meant; why
    "float.tiff": (lambda: Image.fromarray(RAMP.astype(np.float32)), "from 0.0 to 252.0"),
    "nan.tiff": (lambda: Image.fromarray(np.full((8, 8), np.nan, np.float32)), "from nan to nan"),
    "long.tiff": (lambda: Image.fromarray(RAMP.astype(np.int32) * 9999), "32-bit numbers"),
    "empty.png": (None, "corrupt, cannot identify image file"),
}


@each("name", REFUSED)
def test_images_without_a_meaning_are_refused_by_name(name, tmp_path):
    make, why = REFUSED[name]
    write_folder(tmp_path / "d")
    file = tmp_path / "d/train/ant" / name
    file.write_bytes(b"")
    if make:
        save_as(make(), file)
    with pytest.raises(I.InfoardError, match=f"{name}.*{why}") as error:
        load("folder", tmp_path)
    assert one_line(error.value)
    assert "0x" not in str(error.value)  # an address is no help


# ---- folders of all kinds ----


def test_hidden_files_and_folders_are_no_classes_and_no_images(tmp_path, capsys):
    truth = write_folder(tmp_path / "d")
    for name in (".ipynb_checkpoints/1.png", "__MACOSX/1.png", "ant/.cache/1.png", "ant/._1.png"):
        write_images(tmp_path / "d/train", name)
    (tmp_path / "d/train/ant/._2.png").write_text("of a Macintosh")
    write_images(tmp_path / "d", ".Trash/train/a/1.png", "__MACOSX/train/a/1.png")
    check(load("folder", tmp_path), truth)
    told = "no classes, passed over in train/: .ipynb_checkpoints, __MACOSX"
    assert told in capsys.readouterr().out


def test_what_is_not_read_is_told_once_by_its_endings(tmp_path, capsys):
    truth = write_folder(tmp_path / "d")
    for name in ("ant/a.heic", "ant/b.HEIC", "bee/c.npy", "cow/README"):
        (tmp_path / "d/train" / name).write_text("")
    write_images(tmp_path / "d/train", "loose.png")
    check(load("folder", tmp_path), truth)
    out = capsys.readouterr().out
    told = "files in train/ that are not read as images: .heic (2), .npy (1), without an ending (1)"
    assert told in out
    assert "1 images lie in train/ itself, in no folder of a class" in out
    assert "test/ has no images of ant" in out


def test_images_in_both_parts_or_in_two_classes_are_told(tmp_path, capsys):
    write_folder(tmp_path / "d")
    shutil.copy(tmp_path / "d/train/bee/0.png", tmp_path / "d/test/bee/b.png")
    shutil.copy(tmp_path / "d/train/bee/0.png", tmp_path / "d/train/cow/0.png")
    load("folder", tmp_path)
    out = capsys.readouterr().out
    assert "1 of 3 test images are training images, too" in out
    assert "1 training images lie in folders of several classes" in out


MISTAKEN = {  # what is done to a folder, and what is told
    "empty class": (lambda d: (d / "train/bat").mkdir(), "train/bat is a class without images"),
    "unreadable class": (
        lambda d: (d / "train/bee/0.png").rename(d / "train/bee/0.heic"),
        "train/bee is a class without images .it holds 0.heic.",
    ),
    "twins": (lambda d: write_images(d, "train/Ant/1.png"), "train has Ant, ant: one class or two"),
    "test in capitals": (
        lambda d: [(d / "test" / k).rename(d / "test" / k.upper()) for k in ("bee", "cow")],
        "BEE/a.png is of class BEE, .*: it has bee, which must be written equally",
    ),
    "no test": (
        lambda d: (d / "test").rename(d / "valid"),
        "in test/ or val/: it has train, valid",
    ),
    "other test": (
        lambda d: [(d / "test" / k).rename(d / "test" / f"x{k}") for k in ("bee", "cow")],
        "in test/ or val/: it has test/xbee, test/xcow",
    ),
    "empty test": (lambda d: [p.unlink() for p in d.glob("test/*/*")], "test holds no images"),
    "one class": (
        lambda d: [shutil.rmtree(d / "train" / k) for k in ("bee", "cow")],
        "has 1 folders of classes .ant.: two at least",
    ),
    "Train": (lambda d: (d / "train").rename(d / "Train"), "no train/ in .* holds Train, test"),
    "a dead link": (
        lambda d: (d / "train/ant/z.png").symlink_to(d / "nowhere"),
        "cannot read .*z.png: No such file",
    ),
}


@each("name", MISTAKEN)
def test_mistaken_folders_are_told_by_name(name, tmp_path):
    change, why = MISTAKEN[name]
    write_folder(tmp_path / "d")
    change(tmp_path / "d")
    with pytest.raises(I.InfoardError, match=why) as error:
        load("folder", tmp_path)
    assert one_line(error.value)


@each("name, few, told", [("MANY", 5, 1), ("MANY", 6, 0), ("LARGE", 9, 1), ("LARGE", 1e6, 0)])
def test_decoding_of_many_or_large_images_is_told_once(
    name, few, told, tmp_path, monkeypatch, capsys
):
    write_folder(tmp_path / "d")  # of six images
    monkeypatch.setattr(datasets, name, few)
    for times in (told, 0):  # what is decoded is kept
        load("folder", tmp_path)
        out = capsys.readouterr().out
        assert out.count(f"decoding 6 images, once: kept in {tmp_path}/cache") == times


def test_images_of_an_unknown_class_are_told(tmp_path):
    write_folder(tmp_path / "d")
    write_images(tmp_path / "d/test", "dog/1.png")
    with pytest.raises(I.InfoardError, match="dog/1.png is of class dog") as error:
        load("folder", tmp_path)
    assert one_line(error.value)


# ==== 4. Downloads ================================================================================


class Reply(io.BytesIO):
    """What urlopen gives for a file."""

    def __init__(self, url, content, length):
        super().__init__(content)
        self.url = url
        self.length = length


@dataclass
class Site:
    """A site that has the files of a folder, as long as it is up, and cuts them if told to."""

    folder: Path
    keep: float = 1.0
    asked: list = field(default_factory=list)

    def urlopen(self, request, *args, **options):
        url = request if isinstance(request, str) else request.full_url
        self.asked.append(url)
        path = self.folder / url.rpartition("/")[2]
        if not path.is_file():
            raise OSError("no route to host")
        content = path.read_bytes()
        return Reply(url, content[: int(self.keep * len(content))], len(content))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The one site that can be reached, which has nothing yet."""
    made = Site(tmp_path / "nowhere")
    monkeypatch.setattr(urllib.request, "urlopen", made.urlopen)
    return made


def on_line(name, root):
    """The folder whose files a set's site has."""
    return root / ("d" if name == "svhn" else "new")


@each("name", ["cifar10", "cifar100", "svhn", "tinyimagenet"])
def test_missing_data_are_downloaded_once(name, small, site, tmp_path, capsys):
    truth = small(name)
    site.folder = on_line(name, tmp_path)
    options = {"data_dir": tmp_path / "in/here", "cache": tmp_path / "cache"}
    check(I.load_dataset(name, **options), truth)
    out = capsys.readouterr().out
    assert out.startswith("downloading http")
    assert f" to {tmp_path}/in/here\n" in out
    shutil.rmtree(site.folder)
    site.asked.clear()
    check(I.load_dataset(name, **options), truth)
    assert site.asked == []
    assert "downloading" not in capsys.readouterr().out


@each("name", ["cifar10", "cifar100", "svhn", "tinyimagenet"])
def test_what_is_there_is_not_downloaded(name, small, site, tmp_path):
    truth = small(name)
    check(I.load_dataset(name, tmp_path / "d", cache=tmp_path / "cache"), truth)
    assert site.asked == []


def test_only_the_missing_half_of_svhn_is_downloaded(small, site, tmp_path):
    truth = small("svhn")
    site.folder = tmp_path / "site"
    shutil.move(tmp_path / "d", site.folder)
    (tmp_path / "d").mkdir()
    shutil.copy(site.folder / "train_32x32.mat", tmp_path / "d")
    check(I.load_dataset("svhn", tmp_path / "d"), truth)
    assert {url.rpartition("/")[2] for url in site.asked} == {"test_32x32.mat"}


def test_a_damaged_file_is_replaced_by_a_download(small, site, tmp_path):
    truth = small("cifar10")
    site.folder = tmp_path / "new"
    batch = tmp_path / "d/cifar-10-batches-py/data_batch_2"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    check(I.load_dataset("cifar10", tmp_path / "d", cache=tmp_path / "cache"), truth)
    assert batch.read_bytes() == whole


@each("name", ["cifar10", "cifar100", "svhn", "tinyimagenet"])
@each("keep", [0.0, 0.5, 0.99])
def test_a_download_that_is_not_whole_leaves_nothing(name, keep, small, site, tmp_path):
    small(name)
    site.folder = on_line(name, tmp_path)
    site.keep = keep
    with pytest.raises(I.InfoardError, match="corrupted.*: put") as error:
        I.load_dataset(name, tmp_path / "in", cache=tmp_path / "cache")
    assert one_line(error.value)
    assert list((tmp_path / "in").iterdir()) == []


HINTS = {  # what to put where
    "cifar10": "void.*: put cifar-10-python.tar.gz or cifar-10-batches-py/ there",
    "cifar100": "void.*: put cifar-100-python.tar.gz or cifar-100-python/ there",
    "svhn": "void.*: put train_32x32.mat and test_32x32.mat there",
    "tinyimagenet": "void.*: put tiny-imagenet-200.zip or tiny-imagenet-200/ there",
    "folder": "no folder or archive is called void: put train/CLASS/IMAGE and test/CLASS/IMAGE",
}


@each("name", SETS)
@each("download", [True, False])
def test_missing_data_are_one_line(name, download, site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(I.InfoardError, match=HINTS[name]) as error:
        I.load_dataset(name, "void", download=download)
    assert one_line(error.value)
    assert str(error.value).endswith(", or name its --data-dir")
    tried = download and name != "folder"
    assert bool(site.asked) == tried
    assert ("no route to host" in str(error.value)) == tried


def test_missing_data_end_the_command_line_with_code_two(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "--dataset cifar10 --data-dir void --no-download --framework natural --student tiny"
    assert I.main([*line.split(), "--attacks", "clean", "--no-figures"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("infoard: error: no cifar10 in void: put cifar-10-python.tar.gz")
    assert one_line(err)


def test_an_error_of_many_lines_is_told_in_one():
    with pytest.raises(I.InfoardError) as error:
        with datasets.told_in_one_line("cifar10", Path("void"), "put it there"):
            raise RuntimeError("first\n  second\n")
    assert str(error.value) == "no usable cifar10 in void (first second): put it there"


def test_files_arrive_whole_or_not_at_all(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("old")
    with pytest.raises(OSError, match="broken off"):
        with datasets.arriving(tmp_path / "in") as work:
            (work / "a").write_text("new")
            raise OSError("broken off")
    assert [path.read_text() for path in (tmp_path / "in").iterdir()] == ["old"]
    with datasets.arriving(tmp_path / "in") as work:
        (work / "a").write_text("new")
        (work / "b/c").mkdir(parents=True)
        (work / "b/c/d").write_text("more")
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a", "b"]
    assert (tmp_path / "in/a").read_text() == "new"
    assert (tmp_path / "in/b/c/d").read_text() == "more"


# ==== 5. Damage ===================================================================================


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a folder with all sets to be copied and damaged, the truth of each)."""
    top = tmp_path_factory.mktemp("whole")
    truth = {name: publish(name, top / name) for name in SETS}
    shutil.make_archive(top / "folder/new/mine", "tar", top / "folder/d")
    return top, truth


def damage(path, share, cut):
    """Cuts a file after a share of its bytes, or changes the one that stands there."""
    content = bytearray(path.read_bytes())
    begin = int(share * len(content))
    if cut:
        del content[begin:]
    else:
        content[begin] ^= 0x5A
    path.write_bytes(content)


@contextlib.contextmanager
def damaged(whole, name, file, share, cut):
    """The copy of a set with a damaged file, of which torchvision knows the whole one's sum."""
    top, _ = whole
    with pytest.MonkeyPatch.context() as patch:
        tell_sums(patch, name, top / name)
        root = shutil.copytree(top / name, top / "damaged")
        damage(root / file, share, cut)
        try:
            yield root
        finally:
            shutil.rmtree(root)


SUMMED = [  # sets of which every byte is known, where they are said to lie, a file
    ("cifar10", "d", "d/cifar-10-batches-py/data_batch_3"),
    ("cifar10", "new", "new/cifar-10-python.tar.gz"),
    ("cifar100", "d", "d/cifar-100-python/meta"),
    ("svhn", "d", "d/train_32x32.mat"),
]
OTHERS = [
    ("tinyimagenet", "new", "new/tiny-imagenet-200.zip"),
    ("folder", "d", "d/test/bee/a.png"),
    ("folder", "d", "d/train/ant/1.png"),
    ("folder", "new/mine.tar", "new/mine.tar"),
    ("folder", "new/mine.tar.xz", "new/mine.tar.xz"),
]
shares = st.floats(0, 0.95)


@each("name, place, file", SUMMED)
@given(share=shares, cut=st.booleans())
def test_a_damaged_file_with_a_known_sum_is_named(whole, name, place, file, share, cut):
    with damaged(whole, name, file, share, cut) as root:
        with pytest.raises(I.InfoardError, match="is damaged.*: put") as error:
            load(name, root, place)
        assert one_line(error.value)
        assert Path(file).name in str(error.value)


@each("name, place, file", OTHERS)
@given(share=shares, cut=st.booleans())
def test_any_other_damaged_file_is_one_line_or_harmless(whole, name, place, file, share, cut):
    _, truth = whole
    with damaged(whole, name, file, share, cut) as root:
        try:
            data = load(name, root, place)
        except I.InfoardError as error:
            assert one_line(error)
        else:
            if cut and not file.endswith(".tar"):  # one cut between two members looks whole
                check(data, truth[name])


def test_half_of_a_set_is_told(small, tmp_path):
    small("svhn")
    (tmp_path / "d/test_32x32.mat").unlink()
    with pytest.raises(I.InfoardError, match="not complete .test_32x32.mat.: put"):
        load("svhn", tmp_path)


def test_a_damaged_image_is_named(small, tmp_path):
    small("folder")
    damage(tmp_path / "d/test/bee/a.png", 0.5, cut=True)
    with pytest.raises(I.InfoardError, match=re.escape("test/bee/a.png: corrupt")):
        load("folder", tmp_path)


def test_a_damaged_folder_beside_its_archive_is_passed_over(small, tmp_path):
    truth = small("cifar10")
    shutil.copy(tmp_path / "new/cifar-10-python.tar.gz", tmp_path / "d")
    damage(tmp_path / "d/cifar-10-batches-py/test_batch", 0.5, cut=True)
    check(load("cifar10", tmp_path), truth)
