"""What holds for idbh.py: each part beside torchvision's own words, image by image; whole runs."""

import math
import warnings

import pytest
import torch
import torchvision.transforms as transforms
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as vision

import infoard as I
from companions import idbh
from companions.test_fast import Waits
from test_infoard import FEW, SMALL, STEPS, begun, each, error_of, near, noise, rng, run

# Below 1: 16,777,215/2**24 is the largest number that torch.rand gives.
numbers = st.integers(0, 2**24 - 1).map(lambda n: n / 2**24)


def images(n=4, size=32, seed=0):
    """Images of random bytes, in [0,1]."""
    return torch.from_numpy(noise(n, size, seed)).float() / 255


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed))


def whole(u, n):
    """An integer of 0 to n, as Python has it."""
    return math.floor(u * (n + 1))


# ==== 1. Cropshift ================================================================================


def cropshift_by_hand(x, u, most):
    """One image [C,H,W]: cropped, padded on all sides, cropped to the size that it had."""
    height, width = x.shape[1:]
    lost = whole(u[0], most - 1)
    columns = whole(u[1], lost)
    rows = lost - columns
    left, right = whole(u[2], columns), whole(u[3], columns)
    top, below = whole(u[4], rows), whole(u[5], rows)
    x = vision.crop(x, top, left, height - rows, width - columns)
    x = vision.pad(x, [columns, rows])
    return vision.crop(x, rows - below, columns - right, height, width)


@given(st.lists(numbers, min_size=6, max_size=6), st.integers(1, 11), st.sampled_from([11, 16, 32]))
def test_cropshift_is_crop_pad_crop(u, most, size):
    x = images(1, size)
    made = idbh.cropshift(x, torch.tensor(u)[:, None], most)
    assert torch.equal(made[0], cropshift_by_hand(x[0], u, most))


def test_cropshift_loses_ten_lines_at_most_and_each_number_equally_often():
    n = 4400
    made = idbh.cropshift(torch.ones(n, 1, 32, 32), uniform(6, n), 11)
    rows = made.amax((1, 3)).sum(1)
    columns = made.amax((1, 2)).sum(1)
    assert torch.equal(made.sum((1, 2, 3)), rows * columns)  # what is kept is a rectangle
    lost = (64 - rows - columns).long()
    counts = torch.bincount(lost)
    assert len(counts) == 11  # 0 to 10: the upper limit of torch.randint(0, 11) is left out
    assert ((counts - 400.0).abs() < 5 * (400 * 10 / 11) ** 0.5).all()  # five deviations
    assert lost.double().mean() == pytest.approx(5, abs=5 * 10**0.5 / n**0.5)


def test_cropshift_of_nothing_is_the_image():
    x = images()
    assert torch.equal(idbh.cropshift(x, torch.zeros(6, 4), 11), x)


# ==== 2. Colour or shape ==========================================================================

TO = {  # function of torchvision, the range of its factor
    0: (vision.adjust_saturation, 0.1, 1.9),
    1: (vision.adjust_brightness, 0.5, 1.9),
    2: (vision.adjust_contrast, 0.5, 1.9),
    3: (vision.adjust_sharpness, 0.1, 1.9),
}


@each("kind", range(6))
def test_colours_are_those_of_torchvision(kind):
    x, u = images(), uniform(3, 4)
    made = idbh.changed(x, kind, u)
    for i in range(4):
        if kind in TO:
            function, low, high = TO[kind]
            expected = function(x[i], low + (high - low) * u[0, i].item())
        else:
            function = vision.autocontrast if kind == 4 else vision.equalize
            expected = function((255 * x[i]).byte()).float() / 255
        # float32; whole bytes where the library counts them: half a byte of rounding, and one
        near(made[i], expected, 1.5 / 255 if kind in (4, 5) else 1e-5)


def angles(u):
    """The rotation in degrees, and the shear in radians along x and y, that u stands for."""
    side = 1 if u[1] >= 0.5 else -1
    shear = side * (0.05 + 0.1 * u[0])
    along_x = u[2] < 0.5
    return side * (1 + whole(u[0], 9)), [shear * along_x, shear * (not along_x)]


@each("kind", [6, 7])
@given(st.lists(numbers, min_size=3, max_size=3))
@settings(max_examples=25)
def test_shapes_are_those_of_torchvision(kind, u):
    x = images(1)
    made = idbh.changed(x, kind, torch.tensor(u)[:, None])
    degrees, shear = angles(u)
    candidates = []
    for sign in (1, -1):  # both sides have equal chance
        if kind == 7:
            candidates.append(vision.rotate(x, sign * degrees, fill=0))
        else:
            slope = [sign * math.degrees(s) for s in shear]
            candidates.append(vision.affine(x, 0, [0, 0], 1, slope, fill=0))
    # a place between two pixels is rounded either way: few of 1024
    wrong = [(made != other).any(1).float().mean() for other in candidates]
    assert min(wrong) <= 0.01


def test_each_change_has_an_eighth(monkeypatch):
    seen = []

    def watched(x, kind, u):
        seen.extend([kind] * len(x))
        return x

    monkeypatch.setattr(idbh, "changed", watched)
    idbh.idbh(torch.zeros(4000, 3, 4, 4), rng(), pad=1)
    counts = torch.bincount(torch.tensor(seen), minlength=8)
    assert counts.sum() == 4000
    assert ((counts - 500.0).abs() < 5 * (500 * 7 / 8) ** 0.5).all()


# ==== 3. Erasing ==================================================================================


def test_half_of_the_images_lose_a_rectangle_as_torchvision_draws_it():
    n = 3000
    made = idbh.erased(torch.ones(n, 3, 32, 32), uniform(23, n))
    hole = (made == 0).float()
    assert torch.equal(hole[:, 0], hole[:, 1]) and torch.equal(hole[:, 0], hole[:, 2])
    rows = hole.amax((1, 3)).sum(1)
    columns = hole.amax((1, 2)).sum(1)
    area = hole[:, 0].sum((1, 2))
    assert torch.equal(area, rows * columns)  # whole, and within the image
    erased = area > 0
    assert abs(erased.float().mean() - 0.5) < 5 * 0.5 / n**0.5

    theirs = []
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for _ in range(1500):
            box = transforms.RandomErasing.get_params(
                torch.ones(3, 32, 32), (0.02, 0.33), (0.3, 3.3), [0.0]
            )
            theirs.append(torch.tensor(box[:4], dtype=torch.float))
    theirs = torch.stack(theirs, 1)
    top = (hole.amax((1, 3)) > 0).int().argmax(1).float()
    left = (hole.amax((1, 2)) > 0).int().argmax(1).float()
    mine = torch.stack([top, left, rows, columns])[:, erased]
    for own, other in zip(mine, theirs, strict=True):  # two samples of about 1,500
        bound = 5 * ((own.var() + other.var()) / 1500) ** 0.5
        assert abs(own.mean() - other.mean()) < bound
        assert own.std() == pytest.approx(other.std().item(), rel=0.15)


def test_the_first_rectangle_that_fits_is_erased():
    u = torch.zeros(23, 2)
    u[:10], u[10:20] = 0.999, 0.999  # 33% with aspect 3.3 are 33 rows: they do not fit
    u[3, 0], u[13, 0] = 0.0, 0.5  # 2%, square: 5 x 5 pixels
    u[4, 0] = 0.5
    made = idbh.erased(torch.ones(2, 1, 32, 32), u)
    assert (made[0, 0, :5, :5] == 0).all() and made[0].sum() == 1024 - 25
    assert (made[1] == 1).all()  # none of ten tries fits


# ==== 4. The recipe ===============================================================================


@given(
    n=st.integers(1, 9), size=st.sampled_from([8, 32]), seed=st.integers(0, 9), flip=st.booleans()
)
@settings(max_examples=15)
def test_images_stay_images(n, size, seed, flip):
    x = torch.from_numpy(noise(n, size))
    before = x.clone()
    made = idbh.idbh(x, rng(seed), size // 8, flip)
    assert made.shape == x.shape and made.dtype == torch.float32
    assert made.min() >= 0 and made.max() <= 1 and not made.isnan().any()
    assert torch.equal(x, before)
    assert torch.equal(made, idbh.idbh(x.float() / 255, rng(seed), size // 8, flip))


def test_mirror_images_are_half_or_none(monkeypatch):
    monkeypatch.setattr(idbh, "changed", lambda x, kind, u: x)
    monkeypatch.setattr(idbh, "erased", lambda x, u: x)
    monkeypatch.setattr(idbh, "cropshift", lambda x, u, most: x)
    ramp = torch.arange(8.0).expand(1000, 3, 8, 8) / 8
    mirrored = (idbh.idbh(ramp, rng(), 1) != ramp).any(3).any(2).any(1)
    assert abs(mirrored.float().mean() - 0.5) < 5 * 0.5 / 1000**0.5
    assert torch.equal(idbh.idbh(ramp, rng(), 1, flip=False), ramp)


@each("pad, most", [(4, 11), (8, 22), (1, 2), (0, 1)])
def test_cropshift_grows_with_the_images(pad, most, monkeypatch):
    seen = []
    monkeypatch.setattr(idbh, "cropshift", lambda x, u, most: seen.append(most) or x)
    idbh.idbh(images(2), rng(), pad)
    assert seen == [most]


def test_ranks_draw_the_images_of_one_process(monkeypatch):
    x = torch.from_numpy(noise(12))
    one = idbh.idbh(x, rng())
    for rank in (0, 1):
        monkeypatch.setattr(I, "world", lambda rank=rank: (rank, 2))
        near(idbh.idbh(x[rank::2], rng()), one[rank::2], 1e-6)


def test_a_run_draws_it_and_is_given_floats_channels_last():
    made = begun(framework="natural", augment="idbh")
    state = made.generators["data"].get_state()
    x, _ = I.draw(made, made.train[:8])
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    expected = idbh.idbh(SMALL.x_train[made.train[:8]], rng().set_state(state))
    assert torch.equal(x, expected)
    made = begun(framework="natural", augment="none")
    x, _ = I.draw(made, made.train[:8])
    near(255 * x, SMALL.x_train[made.train[:8]].float(), 1e-5)


def test_a_resumed_run_draws_the_same(tmp_path):
    options = {"framework": "natural", "augment": "idbh", **FEW}
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(SystemExit):
        run(tmp_path / "r", stop=STEPS + 2, **options)
    assert run(tmp_path / "r", resume=True, **options) == whole
    last = [I.load_tensors(tmp_path / out / "last.pt") for out in ("whole", "r")]
    for name, value in last[0]["model"].items():
        assert torch.equal(value, last[1]["model"][name])


def test_an_unknown_augmentation_is_one_line(capsys):
    assert "idbh" in error_of(["--augment", "cutmix"], capsys)


def test_nothing_waits_for_the_device():
    with Waits() as waits:
        made = idbh.idbh(torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="meta"), rng())
    assert waits.found == ["nonzero"] * 8  # of numbers on the CPU
    assert waits.copies == 9 and made.device.type == "meta"


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idbh.idbh(torch.from_numpy(noise(64)), rng())
