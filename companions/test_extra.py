"""What holds for extra.py: files as they are and as they should not be, batches, whole runs."""

import dataclasses
import json
import os
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infoard as I
from companions import extra, identity
from test_infoard import (
    BASE,
    FEW,
    SMALL,
    STEPS,
    begun,
    differences,
    each,
    error_of,
    near,
    noise,
    rng,
    run,
)

CPU = torch.device("cpu")
GENERATED = 50


def content(n=GENERATED, size=32, seed=1):
    """Images [N,size,size,3] and labels that numpy.savez is to write."""
    images = noise(n, size, seed).transpose(0, 2, 3, 1)
    return {"image": images, "label": np.arange(n) % 10}


def written(path, write=np.savez, **changes):
    """A file of generated images, some of its arrays replaced."""
    write(path, **{**content(), **changes})
    return str(path)


def prepared(path, data=SMALL, **options):
    """A run with the generated images of a file."""
    given_options = {**BASE, "framework": "natural", "augment": "none", **options}
    cfg = I.Config(**given_options, extra=str(path)).resolved()
    return I.Run(cfg, extra.attached(cfg, data), CPU, {"teacher": None})


# ==== 1. Files ====================================================================================


@given(
    n=st.integers(1, 7), size=st.integers(1, 5), kind=st.sampled_from(["<i8", "<i4", ">i8", "u1"])
)
def test_an_array_is_read_where_it_lies(tmp_path_factory, n, size, kind):
    path = tmp_path_factory.mktemp("files") / "a.npz"
    arrays = content(n, size)
    arrays["label"] = arrays["label"].astype(kind)
    np.savez(path, other=np.ones(3), **arrays)
    image, label = extra.opened(path, 10)
    assert image.base is not None and np.array_equal(image, arrays["image"])
    assert label.dtype == torch.long and label.tolist() == arrays["label"].tolist()


def test_an_array_in_the_order_of_columns_is_read_as_it_is(tmp_path):
    arrays = content(5, 4)
    path = written(tmp_path / "f.npz", image=np.asfortranarray(arrays["image"]), label=np.arange(5))
    assert np.array_equal(extra.opened(path, 10)[0], arrays["image"])


def test_names_of_arrays_may_go_without_npy(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in content().items():
            with archive.open(name, "w") as file:
                np.save(file, array)
    assert np.array_equal(extra.opened(path, 10)[0], content()["image"])


def test_images_stay_on_the_disk(tmp_path):
    image, _ = extra.opened(written(tmp_path / "a.npz"), 10)
    assert isinstance(image.base, np.memmap) and not image.flags.writeable


def test_a_compressed_file_is_unpacked_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = written(tmp_path / "plain.npz")
    packed = written(tmp_path / "packed.npz", np.savez_compressed)
    for path in (packed, packed, plain):
        image, label = extra.opened(path, 10)
        assert isinstance(image.base, np.memmap)
        assert np.array_equal(image, content()["image"])
        assert label.tolist() == content()["label"].tolist()
    assert capsys.readouterr().out.count("is compressed") == 2  # image and label, the first time
    assert len(list((tmp_path / "runs/cache").iterdir())) == 2
    hashes = {extra.identity(I.Config(extra=path))["extra_sha256"] for path in (plain, packed)}
    assert len(hashes) == 2 - 1  # the same images


def test_files_are_named_by_paths_patterns_and_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b", "a", "c[1]"):
        written(tmp_path / f"{name}.npz")

    def names(text):
        return [path.name for path in extra.files_of(text)]

    assert names(f"{tmp_path}/[ab].npz") == ["a.npz", "b.npz"]
    assert names(f"~/b.npz, {tmp_path}/a.npz") == ["b.npz", "a.npz"]
    assert names(f"{tmp_path}/c[1].npz") == ["c[1].npz"]


def damaged(path):
    """A file whose first bytes are lost."""
    written(path)
    path.write_bytes(b"x" + path.read_bytes()[40:-30])


def damaged_inside(path):
    """A compressed file that zlib cannot read."""
    written(path, np.savez_compressed)
    content = path.read_bytes()
    start = 30 + sum(struct.unpack("<HH", content[26:30]))  # behind its header
    path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])


def encrypted(path):
    """A compressed file that says that it is encrypted."""
    written(path, np.savez_compressed)
    first, *rest = path.read_bytes().split(b"PK\1\2")  # rest: what the end says of each array
    rest = [part[:4] + b"\1" + part[5:] for part in rest]
    path.write_bytes(b"PK\1\2".join([first, *rest]))


def without_key(path):
    np.savez(path, images=content()["image"], label=content()["label"])


def not_whole(path):
    """A file that is whole to zipfile, and not to numpy."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", b"nothing")
        archive.writestr("label.npy", b"nothing")


BROKEN = [
    (lambda path: None, "there is no file"),
    (lambda path: path.write_text("text"), "damaged or no .npz file"),
    (damaged, "damaged or no .npz file"),
    (not_whole, "damaged or no .npz file"),
    (damaged_inside, "damaged or no .npz file"),
    (encrypted, "damaged or no .npz file .*encrypted"),
    (
        lambda path: written(path, image=np.zeros((50, 0, 32, 3), np.uint8)),
        "\\[50, 0, 32, 3\\], not",
    ),
    (without_key, "has images, label, not image and label"),
    (lambda path: written(path, image=content()["image"] / 255), "image is float64"),
    (lambda path: written(path, image=noise(GENERATED)), "not uint8 \\[N,H,W,3\\]"),
    (lambda path: written(path, label=np.arange(49) % 10), "one for each image"),
    (lambda path: written(path, label=np.arange(50) / 5), "label is float64"),
    (lambda path: written(path, label=np.arange(50) % 11), "labels of 0 to 10, and .* 10 classes"),
    (lambda path: written(path, label=np.arange(50) % 10 - 1), "labels of -1 to 8"),
    (lambda path: written(path, label=np.array([0, "a"] * 25, object)), "Python objects"),
    (lambda path: written(path, image=content(0)["image"], label=np.arange(0)), "not uint8"),
]


@each("make, told", BROKEN, ids=[told for _, told in BROKEN])
def test_files_that_cannot_be_used_are_one_line(make, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.npz")
    cfg = I.Config(extra=f"{tmp_path}/a.npz").resolved()
    with pytest.raises(I.InfoardError, match=told) as error:
        extra.attached(cfg, SMALL)
    assert "\n" not in str(error.value) and "a.npz" in str(error.value)


def test_no_file_of_a_pattern_and_several_sizes_are_one_line(tmp_path):
    with pytest.raises(I.InfoardError, match="no file is called"):
        extra.files_of(f"{tmp_path}/*.npz")
    written(tmp_path / "a.npz")
    written(tmp_path / "b.npz", **content(size=16))
    with pytest.raises(I.InfoardError, match="several sizes"):
        prepared(f"{tmp_path}/*.npz")


@each(
    "words, told",
    [
        ("--extra-share 0.5", "add --extra"),
        ("--extra a.npz --extra-share 0.01 --batch-size 50", "is no image"),
        ("--extra a.npz --extra-share 1.1", "--extra-share must lie in"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told in error_of(["--no-figures", *words.split()], capsys)
    assert not list(tmp_path.iterdir())


# ==== 2. Batches ==================================================================================


@given(st.floats(0, 1), st.integers(1, 1024))
def test_a_share_is_counted_downwards(share, batch):
    n = extra.count(share, batch)
    assert 0 <= n <= batch and abs(n - share * batch) < 1


@each("share, batch, n", [(0.7, 128, 89), (0.7, 10, 7), (0.29, 100, 29), (1, 64, 64), (0, 64, 0)])
def test_counts_of_known_batches(share, batch, n):
    assert extra.count(share, batch) == n  # of 128, as the released sampler has it, 39 are real


def test_a_batch_is_real_images_and_then_generated_ones(tmp_path):
    parts = []
    for k in range(3):
        arrays = content(seed=k)
        parts.append(arrays["image"])
        written(tmp_path / f"{k}.npz", **arrays)
    every = np.concatenate(parts)
    made = prepared(f"{tmp_path}/*.npz", extra_share=0.7)
    rows = made.train[10:74]
    x, y = I.draw(made, rows)
    assert x.shape == (64, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    near(255 * x[:20], SMALL.x_train[rows[:20]].float(), 1e-5)
    assert torch.equal(y[:20], SMALL.y_train[rows[:20]])
    drawn = torch.randint(150, (44,), generator=rng(BASE.get("seed", 0)))
    picked = torch.from_numpy(every[drawn]).permute(0, 3, 1, 2)
    near(255 * x[20:], picked.float(), 1e-5)
    assert y[20:].tolist() == [int(row) % 50 % 10 for row in drawn]


def test_generated_images_are_drawn_with_equal_chance(tmp_path):
    made = prepared(written(tmp_path / "a.npz", **content(10)), extra_share=1.0)
    labels = torch.cat([I.draw(made, made.train[:64])[1] for _ in range(40)])
    counts = torch.bincount(labels, minlength=10).double()
    expected = len(labels) / 10  # each within five standard deviations
    assert ((counts - expected).abs() < 5 * (expected * 0.9) ** 0.5).all()


def test_each_batch_draws_others(tmp_path):
    made = prepared(written(tmp_path / "a.npz"), extra_share=1.0)
    first, _ = I.draw(made, made.train[:64])
    second, _ = I.draw(made, made.train[:64])
    assert not torch.equal(first, second)


@each("rows", [64, 30])
def test_ranks_draw_the_images_of_one_process(rows, tmp_path, monkeypatch):
    path = written(tmp_path / "a.npz")
    one = prepared(path, augment="crop")
    x, y = I.draw(one, one.train[:rows])
    for rank in (0, 1):
        monkeypatch.setattr(I, "world", lambda: (0, 1))
        made = prepared(path, augment="crop")
        monkeypatch.setattr(I, "world", lambda rank=rank: (rank, 2))
        made.rank, made.ranks = rank, 2
        mine, labels = I.draw(made, made.train[:rows][rank::2])
        assert torch.equal(mine, x[rank::2]) and torch.equal(labels, y[rank::2])


def test_other_sizes_are_resampled_and_told(tmp_path, capsys):
    image = np.full((GENERATED, 64, 48, 3), 7, np.uint8)
    image[:, :, 24:] = 200
    path = written(tmp_path / "a.npz", image=image)
    made = prepared(path, extra_share=1.0)
    assert "resampled from [64, 48] to [32, 32] pixels" in capsys.readouterr().out
    x, _ = I.draw(made, made.train[:64])
    assert x.shape == (64, 3, 32, 32)
    near(255 * x[..., :10], 7.0, 1e-5)
    near(255 * x[..., -10:], 200.0, 1e-5)


def test_real_images_may_be_floats(tmp_path):
    floats = dataclasses.replace(SMALL, x_train=SMALL.x_train.float() / 255)
    path = written(tmp_path / "a.npz")
    x, _ = I.draw(prepared(path), torch.arange(64))
    other, _ = I.draw(prepared(path, data=floats), torch.arange(64))
    near(x, other, 1e-6)


# ==== 3. Whole runs ===============================================================================


def test_a_share_of_zero_is_no_share_bit_for_bit(lab, tmp_path):
    path = written(tmp_path / "a.npz")
    options = {"framework": "at", "infoard": False, **FEW}
    whole, results = lab.reference(**options)
    again = run(tmp_path / "r", teacher=lab.teacher, extra=path, extra_share=0.0, **options)
    assert again == results
    for name in ("model", "optimizer", "generators", "at"):
        one, two = (I.load_tensors(out / "last.pt")[name] for out in (whole, tmp_path / "r"))
        if name == "at":
            for known in (one, two):
                known["history"] = [row["loss"] for row in known["history"]]
                known["seconds"] = 0
        assert differences(one, two) == []


def test_a_resumed_run_draws_the_same_images(tmp_path):
    path = written(tmp_path / "a.npz")
    options = {"framework": "natural", "extra": path, "extra_share": 0.5, **FEW}
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(SystemExit):
        run(tmp_path / "r", stop=STEPS + 2, **options)
    assert run(tmp_path / "r", resume=True, **options) == whole
    one, two = (I.load_tensors(tmp_path / out / "last.pt") for out in ("whole", "r"))
    assert differences(one["model"], two["model"]) == []
    assert differences(one["generators"], two["generators"]) == []
    assert one["data"]["extra_sha256"] == two["data"]["extra_sha256"]


def test_an_epoch_has_as_many_batches_as_without(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(I, "check_in", lambda *args: None)
    train_step = I.train_step

    def counted(run, rows, share):
        steps.append(len(rows))
        train_step(run, rows, share)

    monkeypatch.setattr(I, "train_step", counted)
    made = prepared(written(tmp_path / "a.npz"), epochs=1)
    I.fit(made, tmp_path)
    assert steps == [64] * 5 + [40]


def test_other_generated_images_are_other_data(tmp_path, capsys):
    path = written(tmp_path / "a.npz")
    options = {"framework": "natural", "extra": path, "epochs": 1}
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", stop=2, **options)
    done = run(tmp_path / "done", **options)
    assert run(tmp_path / "done", **options) == done  # it is finished

    shutil.copy(path, tmp_path / "kept.npz")
    written(tmp_path / "a.npz", **content(seed=9))
    for name in ("stopped", "done"):
        with pytest.raises(I.InfoardError, match="other generated images"):
            run(tmp_path / name, resume=True, **options)
    os.replace(tmp_path / "kept.npz", path)
    run(tmp_path / "stopped", resume=True, **options)

    os.remove(path)
    capsys.readouterr()
    assert run(tmp_path / "done", **options) == done
    assert "cannot be compared" in capsys.readouterr().out


def test_what_a_run_keeps_of_its_generated_images(tmp_path):
    path = written(tmp_path / "a.npz")
    run(tmp_path / "r", framework="natural", epochs=1, extra=path)
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert len(config["data"]["extra_sha256"]) == 64
    assert config["settings"]["extra"] == path and config["settings"]["extra_share"] == 0.7
    net = I.load_teacher(f"{tmp_path}/r/last.pt", None, 10)
    identity.same_classes("last.pt", net, dataclasses.replace(SMALL, about={}))


def test_a_run_without_generated_images_knows_nothing_of_them():
    assert begun(framework="natural").data.extra is None
    assert extra.identity(I.Config()) == {}
