"""What holds for checkpoints.py: any file of a net that we know loads, any other is one line."""

import argparse
import collections
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import types
import urllib.error
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import checkpoints, evaluation, nets, own, zoo
from test_infoard import noise, one_line

each = pytest.mark.parametrize
ROOT = Path(I.__file__).parent
X = torch.from_numpy(noise(2)).contiguous(memory_format=torch.channels_last) / 255


# ==== 1. Wrappings and families ===================================================================

FAMILIES = {  # name and options of I.build_model; the keys tell all but what TOLD says
    "resnet": ("resnet18", {"blocks": (1, 1, 1, 1)}),
    "preact": ("preact_resnet18", {"blocks": (1, 1, 1, 1)}),
    "preact_no_bn": ("preact_resnet18", {"blocks": (1, 1, 1, 1), "final_bn": False}),
    "wrn": ("wrn_10_2", {}),
    "wrn_deeper": ("wrn_16_1", {}),
    "wrn_no_bias": ("wrn_10_2", {"bias": False}),
    "wrn_silu": ("wrn_10_2_silu", {}),
    "mobilenet": ("mobilenet_v2", {}),
    "tiny": ("tiny", {}),
    "tiny_wide": ("tiny_wide", {}),
}
TOLD = {  # what must be said of a file
    "preact_no_bn": "preact_resnet10",
    "wrn_no_bias": "wrn_10_2",
    "wrn_silu": "wrn_10_2_silu",
}
FOUND = {  # the name that keys tell
    "resnet": "resnet10",
    "preact": "preact_resnet10",
    "preact_no_bn": "preact_resnet10",
    "wrn": "wrn_10_2",
    "wrn_deeper": "wrn_16_1",
    "wrn_no_bias": "wrn_10_2",
    "wrn_silu": "wrn_10_2",
    "mobilenet": "mobilenet_v2",
    "tiny": "tiny",
    "tiny_wide": "tiny_wide",
}


@functools.cache
def trained_looking(family):
    """A net whose weights and statistics all differ from their initial values."""
    name, options = FAMILIES[family]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = I.build_model(name, **options)
    g = torch.Generator().manual_seed(0)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * (value.abs().mean() + 0.1) * torch.rand(value.shape, generator=g))
    net.to(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


@functools.cache
def logits_of(family):
    """What that net says of X."""
    return trained_looking(family)(X)


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def changed(weights):
    return {key: value + 1 for key, value in weights.items()}


SIMPLE = {  # the key under which weights lie, the prefix of theirs, and what lies beside
    "plain": ("", "", {}),
    "parallel": ("", "module.", {}),
    "compiled": ("", "_orig_mod.", {}),
    "swa": ("", "module.module.", {"n_averaged": torch.tensor(3)}),
    "last": ("last", "", {"acc": 1.5}),
    "state_dict": ("state_dict", "module.", {"epoch": 3, "arch": "x"}),
    "net": ("net", "", {"acc": 91.2, "epoch": 5}),
    "model": ("model", "module.", {}),
    "sequential": ("model_state_dict", "module.0.", {}),
    "mair": ("rmodel", "model.module.", {}),
}


def wrapped(wrapping, weights):
    """A file that holds weights as files in the wild do."""
    if wrapping == "best":
        return {"last": changed(weights), "best": weights}
    if wrapping == "ema":
        return {"model": changed(weights), "ema": weights}
    if wrapping == "twice":
        return {"net": {"state_dict": prefixed("module.", weights), "epoch": 1}}
    if wrapping == "sub_block":  # TRADES' WRN has one that it never uses
        copies = {key: value for key, value in weights.items() if key.startswith("block1.")}
        return weights | prefixed("sub_", changed(copies))
    key, prefix, beside = SIMPLE[wrapping]
    weights = prefixed(prefix, weights)
    if key:
        weights = {key: weights}
    return weights | beside


@each("wrapping", [*SIMPLE, "best", "ema", "twice", "sub_block"])
@each("family", FAMILIES)
def test_any_wrapping_gives_the_same_frozen_net(family, wrapping, tmp_path):
    net = trained_looking(family)
    path = tmp_path / "t.pt"
    torch.save(wrapped(wrapping, dict(net.state_dict())), path)
    loaded = I.load_teacher(str(path), TOLD.get(family), num_classes=10)
    path.unlink()  # up to 20 MB
    assert torch.equal(loaded(X), logits_of(family))
    assert not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())


@each("family", FAMILIES)
def test_keys_tell_the_architecture(family):
    _, options = FAMILIES[family]
    found = checkpoints.infer_arch(trained_looking(family).state_dict())
    assert found.name == FOUND[family]
    for option, value in options.items():
        assert tuple(np.atleast_1d(found.options[option])) == tuple(np.atleast_1d(value))


@each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_float32_here(dtype):
    net = trained_looking("tiny")
    weights = {key: value.to(dtype) for key, value in net.state_dict().items()}
    loaded = checkpoints.from_file(weights, None, 32, "none")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    # Weights of up to 1 in bfloat16 are off by 2^-9 at most, and four layers add that up.
    assert torch.allclose(loaded.eval()(X), net(X), atol=0.05)


NORMALISERS = [  # mean, standard deviation and weights, as files name them
    ("mu", "sigma", ""),
    ("module.mu", "module.sigma", "module."),
    ("mean", "std", "model."),
    ("normalize.mean", "normalize.std", ""),
    ("0.mean", "0.std", "1."),
]


def normalised_by_hand(net):
    """What a net that normalises by CIFAR-10's constants gives for X."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in checkpoints.NORMS["cifar10"])
    return mean, std, net((X - mean) / std)


def check_normalised(file, norm, tmp_path):
    torch.save(file, tmp_path / "t.pt")
    net = trained_looking("tiny")
    loaded = I.load_teacher(str(tmp_path / "t.pt"), norm=norm)
    assert loaded.state_dict().keys() == net.state_dict().keys()
    _, _, logits = normalised_by_hand(net)
    assert torch.allclose(loaded(X), logits, 1e-4, 1e-4)  # fp32 sums in another order


@each("mean, std, inner", NORMALISERS)
@each("mean_first", [True, False])
def test_normalisation_of_the_file_is_inside(mean, std, inner, mean_first, tmp_path):
    net = trained_looking("tiny")
    mean_value, std_value, _ = normalised_by_hand(net)
    file = {mean: mean_value, std: std_value}
    if not mean_first:
        file = {std: std_value, mean: mean_value}
    check_normalised(file | prefixed(inner, net.state_dict()), "none", tmp_path)


def test_normalisation_that_is_told_is_inside(tmp_path):
    check_normalised(trained_looking("tiny").state_dict(), "cifar10", tmp_path)


@each("prefix", ["", "module.", "a.module.b."])
def test_a_prefix_is_what_stands_before_the_first_convolution(prefix):
    inside = {f"{prefix}conv1.weight": torch.zeros(1), f"{prefix}a.module.w": torch.zeros(1)}
    found = checkpoints.unwrap({"xconv1.weight": torch.zeros(1), "other.w": torch.ones(1)} | inside)
    assert list(found) == [prefix]
    others = set() if prefix else {"xconv1.weight", "other.w"}
    assert set(found[prefix]) == {"conv1.weight", "a.module.w"} | others


@each("size", [64, 128])
def test_the_stem_is_that_of_the_image_size(size, tmp_path):
    net = I.build_model("tiny", 10, size).to(memory_format=torch.channels_last).eval()
    x = torch.rand(2, 3, size, size)
    torch.save(net.state_dict(), tmp_path / "t.pt")
    assert torch.equal(I.load_teacher(str(tmp_path / "t.pt"), size=size)(x), net(x))


def test_loading_draws_no_random_numbers(tmp_path):
    torch.save(trained_looking("wrn").state_dict(), tmp_path / "t.pt")
    before = torch.get_rng_state()
    I.load_teacher(str(tmp_path / "t.pt"))
    assert torch.equal(torch.get_rng_state(), before)


# ==== 2. Files that are no checkpoint of a net that we know =======================================


def headless(weights):
    return {key: value for key, value in weights.items() if "linear" not in key}


FILES = {  # what torch.save writes, or bytes: why it is refused
    "deepmind": ({"init_conv.weight": X, "logits.weight": X}, "unknown.*init_conv.*robustbench"),
    "torchvision": (
        {"conv1.weight": X, "layer1.0.conv1.weight": X, "fc.weight": X},
        "unknown.*layer1.0.conv1.weight.*module:factory",
    ),
    "none": ({}, "no weights with names"),
    "one": ({"delta": X}, "unknown here, with keys delta in its top"),
    "deep": ({"a": {"b": {"delta": X}}}, "with keys delta in a.b"),
    "numbers": ({0: X, 1: X}, "no weights with names"),
    "list": ([1, 2], "holds a list, no dict"),
    "module": (nn.Linear(2, 2), "holds code, torch.nn.modules.linear.Linear.*weights_only=False"),
    "headless": (headless(I.tiny().state_dict()), "without its last layer"),
    "text": (b"hello", "truncated"),
    "empty": (b"", "truncated"),
    "html": (b"<!DOCTYPE html>", "web page"),
    "page": (b"\n\n <html><head><title>Google Drive - Virus scan", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "git lfs pull"),
    "extra": (I.tiny().state_dict() | {"layer3.5.weight": X}, "looks like a tiny and is none"),
    "nan": (I.tiny().state_dict() | {"linear.bias": torch.full((10,), torch.nan)}, "NaN"),
    "two": ({"s": I.tiny().state_dict(), "t": I.tiny().state_dict()}, r"several nets \(s, t\)"),
}


def write(name, content):
    """A file with this content in the current folder."""
    torch.save(content, f"{name}.pt")
    if isinstance(content, bytes):
        Path(f"{name}.pt").write_bytes(content)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each("name", FILES)
def test_a_file_that_is_no_net_is_one_line_and_exit_code_two(name, here, capsys):
    content, why = FILES[name]
    write(name, content)
    assert I.main(["export", f"{name}.pt"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"infoard: error: {name}.pt")
    assert one_line(err)
    assert re.search(why, err), err


REFUSED = [  # options of load_teacher, why
    ({"path_or_id": "nowhere.pt"}, "no checkpoint file at nowhere"),
    ({"path_or_id": "."}, "no checkpoint file"),
    ({"path_or_id": "three.pt", "num_classes": 10}, "3 classes, the data have 10"),
    ({"path_or_id": "three.pt", "arch": "resnet18"}, "holds a tiny, not the resnet18 asked for"),
    ({"path_or_id": "three.pt", "norm": "cifar"}, "choose from none, half, cifar10"),
    ({"path_or_id": "three.pt", "norm": "0.5,0.5/1"}, "m,m,m/s,s,s such as"),
    ({"path_or_id": "three.pt", "norm": "0.5/0"}, "m,m,m/s,s,s such as"),
    ({"path_or_id": "three.pt", "norm": "half/half"}, "m,m,m/s,s,s such as"),
    ({"path_or_id": "three.pt", "norm": "125,123,114/63,62,67"}, "divide numbers"),
    ({"path_or_id": "http://somewhere.org/t.pt"}, "only https"),
    ({"path_or_id": "robustbench:Nobody2020"}, "robustbench"),
]


@each("options, why", REFUSED)
def test_what_does_not_fit_is_one_line(options, why, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)  # as if it were not installed
    write("three", I.tiny(3).state_dict())
    with pytest.raises(I.InfoardError, match=why) as error:
        I.load_teacher(**options)
    assert one_line(error.value)


@given(share=st.floats(0, 0.95), cut=st.booleans())
def test_a_damaged_file_is_one_line_or_harmless(share, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "t.pt"
    torch.save(trained_looking("tiny").state_dict(), path)
    content = bytearray(path.read_bytes())
    begin = int(share * len(content))
    if cut:
        del content[begin:]
    else:
        content[begin] ^= 0x5A
    path.write_bytes(content)
    try:
        net = I.load_teacher(str(path))
    except I.InfoardError as error:
        assert one_line(error)
    else:
        assert not cut
        assert net(X).shape == (2, 10)
    shutil.rmtree(folder)


# ==== 3. Nets of DeepMind and variants that keys do not tell ======================================
# The same nets once more, as functions of the tensors of a file alone.


def batch_norm(x, w, name):
    stats = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return F.batch_norm(x, *stats, w[f"{name}.weight"], w[f"{name}.bias"])


def same_conv(x, weight, stride):
    """TensorFlow's SAME: as many zeros in all as are needed, the odd one at the right and below."""
    pixels = math.ceil(x.shape[-1] / stride)
    zeros = max((pixels - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
    left, right = zeros // 2, zeros - zeros // 2
    return F.conv2d(F.pad(x, (left, right, left, right)), weight, stride=stride)


def deepmind_wide(w, x, act):
    x = same_conv(x, w["init_conv.weight"], 1)
    for i in range(3):
        for j in itertools.count():
            at = f"layer.{i}.block.{j}"
            if f"{at}.conv_0.weight" not in w:
                break
            stride = 2 if i > 0 and j == 0 else 1
            f = act(batch_norm(x, w, f"{at}.batchnorm_0"))
            if j == 0:
                x = same_conv(f, w[f"{at}.shortcut.weight"], stride)
            f = same_conv(f, w[f"{at}.conv_0.weight"], stride)
            x = x + same_conv(
                act(batch_norm(f, w, f"{at}.batchnorm_1")), w[f"{at}.conv_1.weight"], 1
            )
    x = act(batch_norm(x, w, "batchnorm")).mean((2, 3))
    return F.linear(x, w["logits.weight"], w["logits.bias"])


def deepmind_preact(w, x, act):
    x = same_conv(x, w["conv_2d.weight"], 1)
    for i in range(4):
        stride = 2 if i > 0 else 1
        at = f"layer_{i}.0"
        f = act(batch_norm(x, w, f"{at}.batchnorm_0"))
        f = same_conv(f, w[f"{at}.conv_2d_1.weight"], stride)
        f = same_conv(act(batch_norm(f, w, f"{at}.batchnorm_1")), w[f"{at}.conv_2d_2.weight"], 1)
        if stride == 2:
            x = same_conv(x, w[f"{at}.shortcut.weight"], stride)
        x = x + f
    x = act(batch_norm(x, w, "batchnorm")).mean((2, 3))
    return F.linear(x, w["logits.weight"], w["logits.bias"])


def random_weights(shapes, seed=0):
    """Convolutions, and batch norms where a shape is a number of channels."""
    g = torch.Generator().manual_seed(seed)
    w = {}
    for key, shape in shapes.items():
        if isinstance(shape, int):
            for part in ("weight", "bias", "running_mean", "running_var"):
                w[f"{key}.{part}"] = 0.5 + torch.rand(shape, generator=g)
        else:
            fan = math.prod(shape[1:])
            w[f"{key}.weight"] = torch.randn(shape, generator=g) / fan**0.5
            if len(shape) == 2:
                w[f"{key}.bias"] = torch.randn(shape[0], generator=g)
    return w


@functools.cache
def deepmind_file(kind):
    """A state dict with the names and shapes of DeepMind's WRN-16-2 or of four blocks."""
    wide = kind == "wide"
    widths, blocks, first = ((32, 64, 128), 2, 16) if wide else ((64, 128, 256, 512), 1, 64)
    shapes = {"init_conv" if wide else "conv_2d": (first, 3, 3, 3)}
    names = ("conv_0", "conv_1") if wide else ("conv_2d_1", "conv_2d_2")
    c_in = first
    for i, c in enumerate(widths):
        for j in range(blocks):
            at = f"layer.{i}.block.{j}" if wide else f"layer_{i}.{j}"
            shapes.update({f"{at}.batchnorm_0": c_in, f"{at}.{names[0]}": (c, c_in, 3, 3)})
            shapes.update({f"{at}.batchnorm_1": c, f"{at}.{names[1]}": (c, c, 3, 3)})
            if c != c_in:
                shapes[f"{at}.shortcut"] = (c, c_in, 1, 1) if wide else (c, c_in, 3, 3)
            c_in = c
    shapes.update(batchnorm=c_in, logits=(10, c_in))
    return random_weights(shapes)


DEEPMIND = {
    "wide": (deepmind_wide, "dm_wrn_16_2"),
    "preact": (deepmind_preact, "dm_preact_resnet10"),
}
CIFAR10 = [torch.tensor(v).view(1, 3, 1, 1) for v in checkpoints.NORMS["cifar10"]]


def near(logits, expected):
    """Equal up to fp32 sums in another order, against the spread over images."""
    spread = (expected - expected.mean(0)).abs().max()
    assert spread > 1e-5
    assert (logits - expected).abs().max() < 0.01 * spread + 1e-6 * expected.abs().max()


@each("kind, size", [("wide", 32), ("wide", 64), ("preact", 32)])
@each("arch", ["", "_silu", "_relu"])
def test_nets_of_deepmind_compute_what_theirs_do(kind, arch, size, here):
    truth, name = DEEPMIND[kind]
    weights = deepmind_file(kind)
    write("t", {"model_state_dict": prefixed("module.0.", weights)})
    net = I.load_teacher("t.pt", name + arch if arch else None, 10, size=size)
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    act = F.relu if arch == "_relu" else F.silu
    mean, std = CIFAR10
    near(net(x), truth(weights, (x - mean) / std, act))


def test_what_is_assumed_of_a_file_is_said(here, capsys):
    write("t", deepmind_file("wide"))
    I.load_teacher("t.pt")
    out = capsys.readouterr().out
    assert "t.pt: dm_wrn_16_2_silu (dm_wrn_16_2_silu or dm_wrn_16_2_relu: if not," in out
    assert "normalised by cifar10, as nets of its kind are (if not, --teacher-norm)" in out
    write("cifar10_linf_wrn16-2_ddpm", deepmind_file("wide"))
    I.load_teacher("cifar10_linf_wrn16-2_ddpm.pt")
    assert "if not" not in capsys.readouterr().out
    write("u", trained_looking("tiny").state_dict())
    I.load_teacher("u.pt")
    assert (
        "98,970 parameters, pixels as they are (if not, --teacher-norm)" in capsys.readouterr().out
    )


def preact(w, x, early):
    """PreActResNet-10 without a batch norm at its end."""
    x = F.conv2d(x, w["conv1.weight"], padding=1)
    for i in (1, 2, 3, 4):
        at, stride = f"layer{i}.0", 1 if i == 1 else 2
        f = F.relu(batch_norm(x, w, f"{at}.bn1"))
        if stride == 2:
            x = F.conv2d(x if early else f, w[f"{at}.shortcut.0.weight"], stride=2)
        f = F.conv2d(f, w[f"{at}.conv1.weight"], stride=stride, padding=1)
        f = F.relu(batch_norm(f, w, f"{at}.bn2"))
        x = x + F.conv2d(f, w[f"{at}.conv2.weight"], padding=1)
    return F.linear(x.mean((2, 3)), w["linear.weight"], w["linear.bias"])


@each(
    "name, arch, early",
    [
        ("t", "preact_resnet10", False),
        ("t", "preact_resnet10_early", True),
        ("Andriushchenko2020Understanding", None, True),
    ],
)
def test_shortcuts_leave_where_it_is_said(name, arch, early, here):
    weights = trained_looking("preact_no_bn").state_dict()
    write(name, weights)
    near(I.load_teacher(f"{name}.pt", arch)(X), preact(weights, X, early))


@each(
    "name, arch, unit",
    [
        ("t", "wrn_10_2", False),
        ("t", "wrn_10_2_unit", True),
        ("Pang2020Boosting", None, True),
    ],
)
def test_heads_without_offsets_are_plain_or_cosines(name, arch, unit, here):
    weights = trained_looking("wrn_no_bias").state_dict()
    write(name, weights)
    net = I.load_teacher(f"{name}.pt", arch, norm="cifar10")
    f, w = [], weights["fc.weight"]
    net.flatten.register_forward_hook(lambda *args: f.append(args[2]))
    logits = net(X)
    expected = f[0] @ w.T
    if unit:
        expected = expected / (f[0].norm(dim=1, keepdim=True) * w.norm(dim=1))
    near(logits, expected)


@each(
    "family, names",
    [
        ("preact_no_bn", "preact_resnet10 or preact_resnet10_early"),
        ("wrn_no_bias", "wrn_10_2 or wrn_10_2_silu or wrn_10_2_unit"),
    ],
)
def test_variants_that_no_key_tells_are_asked_for(family, names, here):
    write("t", trained_looking(family).state_dict())
    with pytest.raises(I.InfoardError, match=f"do not tell.*--teacher-arch {names}") as error:
        I.load_teacher("t.pt")
    assert one_line(error.value)


NORMALISED = {  # --teacher-norm: what the net then sees
    "half": lambda x: 2 * x - 1,
    "0.5/0.5": lambda x: 2 * x - 1,
    "0,0.5,1/1,0.5,0.25": lambda x: (
        (x - torch.tensor([0, 0.5, 1]).view(3, 1, 1)) / torch.tensor([1, 0.5, 0.25]).view(3, 1, 1)
    ),
    "image": lambda x: torch.stack([(v - v.mean()) / v.std() for v in x]),
    "tinyimagenet": lambda x: (
        (x - torch.tensor([0.4802, 0.4481, 0.3975]).view(3, 1, 1))
        / torch.tensor([0.2302, 0.2265, 0.2262]).view(3, 1, 1)
    ),
}


@each("norm", NORMALISED)
def test_pixels_are_normalised_as_it_is_said(norm, here):
    write("t", trained_looking("tiny").state_dict())
    near(I.load_teacher("t.pt", norm=norm)(X), trained_looking("tiny")(NORMALISED[norm](X)))


def huang(weights, last):
    """The names of Huang's files for those of ours."""
    names = {}
    for key, value in weights.items():
        key = re.sub(r"^conv1\.", "stem_conv.", key)
        key = re.sub(r"^block(\d)\.", lambda m: f"blocks.{int(m[1]) - 1}.", key)
        if last == "norm1":
            key = re.sub(r"^bn1\.", "norm1.", key)
            key = key.replace("convShortcut.", "shortcut.0.")
        names[key] = value
    return names


@each("last, arch", [("bn1", None), ("norm1", "wide_resnet_silu"), ("norm1", "wide_resnet_relu")])
def test_stages_of_any_width_and_depth_load(last, arch, here):
    silu = arch == "wide_resnet_silu"
    net = nets.wide_resnet(10, 32, silu=silu, blocks=(1, 2, 1), channels=(32, 64, 48)).eval()
    write("t", huang(net.state_dict(), last))
    near(I.load_teacher("t.pt", arch)(X), net(X))
    if arch:
        with pytest.raises(I.InfoardError, match="do not tell its activation"):
            I.load_teacher("t.pt")


def test_an_image_without_contrast_is_standardised_too():
    grey = torch.full((2, 3, 8, 8), 0.3)
    assert torch.equal(nets.Standardize()(grey), torch.zeros_like(grey))


@each("name, norm", [("Hendrycks2019Using", "half"), ("cifar10-Ding2020MMA", "image")])
def test_names_of_the_zoo_tell_the_normalisation(name, norm, here):
    write(name, trained_looking("tiny").state_dict())
    near(I.load_teacher(f"{name}.pt")(X), trained_looking("tiny")(NORMALISED[norm](X)))


def test_another_name_tells_nothing():
    assert zoo.recognise("my_Ding2020MMA_student.pt", 10) == zoo.Known()
    assert zoo.recognise("Ding2020MMA.pt", 100) == zoo.Known()  # which RobustBench has not


@each("family", ["resnet", "wrn", "preact"])
def test_a_head_on_a_grid_of_averages_is_that_of_fixed_pools(family, here):
    net = trained_looking(family)
    weights = dict(net.state_dict())
    head = "fc.weight" if "fc.weight" in weights else "linear.weight"
    weights[head] = torch.randn(10, 4 * weights[head].shape[1])
    write("t", weights)
    x = torch.rand(2, 3, 64, 64)
    f = x
    for name, layer in net.named_children():
        if name == "avgpool":
            break
        f = layer(f)
    pooled = F.avg_pool2d(f, f.shape[-1] // 2).flatten(1)  # RiFT's AvgPool(8) of 16x16
    near(I.load_teacher("t.pt", size=64)(x), F.linear(pooled, weights[head], net[-1].bias))


def test_both_stems_of_64_pixels_have_a_name(here):
    write("t", trained_looking("resnet").state_dict())
    x = torch.rand(2, 3, 64, 64)
    net = trained_looking("resnet")
    near(I.load_teacher("t.pt", size=64)(x), net(x))
    old = I.build_model("resnet18_half", 10, 64, blocks=(1, 1, 1, 1))
    old.load_state_dict(net.state_dict())
    near(I.load_teacher("t.pt", "resnet10_half", size=64)(x), old.eval()(x))
    assert not torch.allclose(net(x), old(x), atol=1e-3)


def test_bottlenecks_are_told_from_blocks(here):
    net = nets.deep_resnet(10, 32, (1, 1, 1, 1)).eval()
    write("t", net.state_dict())
    assert checkpoints.infer_arch(net.state_dict()).name == "resnet14"
    near(I.load_teacher("t.pt")(X), net(X))


# ==== 4. What lies about ==========================================================================


class Settings(dict):
    """Called and pickled as a class of Lightning's."""


Settings.__module__ = "lightning_fabric.utilities.data"
Settings.__name__ = Settings.__qualname__ = "AttributeDict"


@pytest.fixture
def lightning_is_there(monkeypatch):
    """As if its package were installed, while files are written."""
    for name in ("lightning_fabric", "lightning_fabric.utilities", Settings.__module__):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[Settings.__module__].AttributeDict = Settings
    return monkeypatch


class Reduced:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


BESIDE = {  # what lies beside weights and is harmless
    "namespace": argparse.Namespace(lr=0.1, seeds=[1, 2]),
    "simple": types.SimpleNamespace(lr=0.1),
    "scalar": np.float64(91.2),
    "scalar32": np.float32(91.2),
    "int": np.int64(3),
    "bool": np.bool_(True),
    "array": np.arange(6.0).reshape(2, 3),
    "words": np.array(["a", "bc"]),
    "path": Path("a/b"),
    "lightning": Settings(lr=0.1),
    "default": collections.defaultdict(dict, a={}),
}


@each("zip", [True, False])
@each("kind", BESIDE)
def test_harmless_objects_beside_the_weights_are_read(kind, zip, here, lightning_is_there):
    file = {"net": trained_looking("tiny").state_dict(), "acc": BESIDE[kind]}
    torch.save(file, "t.t7", _use_new_zipfile_serialization=zip)
    lightning_is_there.delitem(sys.modules, Settings.__module__)
    assert torch.equal(I.load_teacher("t.t7")(X), trained_looking("tiny")(X))


@each("zip", [True, False])
def test_no_code_of_a_file_is_run(zip, here):
    file = trained_looking("tiny").state_dict() | {"x": Reduced(os.mkdir, "made")}
    torch.save(file, "t.pt", _use_new_zipfile_serialization=zip)
    with pytest.raises(I.InfoardError, match="holds code, posix.mkdir, which is not run") as error:
        I.load_teacher("t.pt")
    assert one_line(error.value)
    assert not Path("made").exists()


def test_the_line_that_converts_a_file_converts_it(here):
    file = {"state_dict": trained_looking("tiny").state_dict(), "x": Reduced(sorted, (2, 1))}
    torch.save(file, "t.pt")
    with pytest.raises(I.InfoardError) as error:
        I.load_teacher("t.pt")
    (line,) = re.findall('python -c "(.*)"', str(error.value))
    exec(line)
    assert torch.equal(I.load_teacher("plain.pt")(X), trained_looking("tiny")(X))


def write_safetensors(path, weights):
    """The format's own words: header length (8 bytes), header (JSON), little-endian numbers."""
    header, content = {"__metadata__": {"format": "pt"}}, b""
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
    for key, value in weights.items():
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ends = [len(content), len(content) + len(raw)]
        header[key] = {
            "dtype": kinds[value.dtype],
            "shape": list(value.shape),
            "data_offsets": ends,
        }
        content += raw
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + content)


@each("name", ["t.safetensors", "t.pt"])
def test_safetensors_are_read(name, here):
    weights = trained_looking("tiny").state_dict()
    flat = {
        key: value.reshape(-1).view(value.shape) if value.dim() else value.view(1)
        for key, value in weights.items()
    }
    scalars = {key: value.shape for key, value in weights.items()}
    write_safetensors(name, flat)
    content = json.loads(Path(name).read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    assert content.keys() == {*scalars, "__metadata__"}
    assert torch.equal(I.load_teacher(name)(X), trained_looking("tiny")(X))


def test_safetensors_of_the_package_are_read(here):
    writer = pytest.importorskip("safetensors.torch")
    weights = {key: v.contiguous() for key, v in trained_looking("wrn").state_dict().items()}
    writer.save_file(weights, "t.safetensors", {"format": "pt"})
    read = checkpoints.read("t.safetensors")
    assert read.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(read[key], value)
        assert read[key].dtype == value.dtype


@pytest.mark.filterwarnings("ignore")  # torch has another format by now
def test_a_torchscript_archive_is_named(here):
    torch.jit.script(nn.Linear(2, 2)).save("t.pt")
    with pytest.raises(I.InfoardError, match="TorchScript archive: save"):
        I.load_teacher("t.pt")


@each("cut", [4, 20, 2000])
def test_cut_safetensors_are_one_line(cut, here):
    write_safetensors("t.safetensors", {"conv1.weight": torch.zeros(1000)})
    whole = Path("t.safetensors").read_bytes()
    Path("t.safetensors").write_bytes(whole[:cut])
    with pytest.raises(I.InfoardError, match="truncated or no safetensors"):
        I.load_teacher("t.safetensors")


def lightning(w):
    beside = {"criterion.weight": torch.ones(10), "metric.total": torch.zeros(1)}
    return {
        "state_dict": prefixed("model.", w) | beside,
        "optimizer_states": [{"state": {}}],
        "callbacks": {"best": {"best_model_score": torch.zeros(1)}},
    }


def madry_lab(w):
    mean, std = CIFAR10
    weights = prefixed("module.model.", w) | prefixed("module.attacker.model.", w)
    for at in ("module.normalizer.", "module.attacker.normalize."):
        weights |= {f"{at}new_mean": mean[0], f"{at}new_std": std[0]}
    return {"model": weights, "optimizer": {"state": {0: {"momentum_buffer": X}}}, "epoch": 3}


def mair(w):
    mean, std = CIFAR10
    buffers = {"n_classes": torch.tensor(10), "mean": mean.flatten(), "std": std.flatten()}
    return {"rmodel": buffers | prefixed("model.", w), "optimizer": {"state": {0: {"exp": X}}}}


LYING = {  # a file of these weights, and whether it normalises by CIFAR-10's numbers
    "lightning": (lightning, False),
    "madry_lab": (madry_lab, True),
    "mair": (mair, True),
    "dm_improves": (
        lambda w: {"unaveraged_model_state_dict": changed(w), "model_state_dict": w},
        False,
    ),
    "deep": (lambda w: {"run": {"nets": {"student": prefixed("module.", w)}}}, False),
    "unknown_key": (lambda w: {"my_net": w, "scores": {"a": torch.ones(2)}}, False),
    "optimiser": (lambda w: w | {"optimizer.momentum": X, "scaler": torch.ones(1)}, False),
    "timm": (lambda w: {"state_dict": changed(w), "state_dict_ema": w}, False),
}


@each("kind", LYING)
def test_wrappers_of_other_programs_are_taken_off(kind, here, capsys):
    net = trained_looking("tiny")
    make, normalised = LYING[kind]
    write("t", make(dict(net.state_dict())))
    mean, std = CIFAR10
    near(I.load_teacher("t.pt")(X), net((X - mean) / std) if normalised else net(X))
    out = capsys.readouterr().out
    assert ("normalised as it says itself" in out) == normalised
    if kind == "dm_improves":
        assert "in model_state_dict, not unaveraged_model_state_dict" in out


def answer(content, length=None):
    reply = io.BytesIO(content)
    reply.headers = {"Content-Length": str(len(content) if length is None else length)}
    return reply


def test_an_address_is_fetched_once_and_its_hash_kept(here, monkeypatch, capsys):
    write("t", trained_looking("tiny").state_dict())
    content = Path("t.pt").read_bytes()
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        return answer(content)

    monkeypatch.setattr(checkpoints.urllib.request, "urlopen", urlopen)
    address = "https://somewhere.org/nets/a%20net.pt?download=true"
    for _ in range(2):
        assert torch.equal(I.load_teacher(address)(X), trained_looking("tiny")(X))
    assert asked == [address]
    known = hashlib.sha256(content).hexdigest()
    assert capsys.readouterr().out.count(known) == 2
    (path,) = Path(checkpoints.DOWNLOADS).rglob("a net.pt")
    assert path.read_bytes() == content
    assert path.with_name("a net.pt.sha256").read_text() == f"{known}  {address}\n"
    path.write_bytes(content + b"x")
    with pytest.raises(I.InfoardError, match="is not what was fetched"):
        I.load_teacher(address)


def test_a_connection_that_breaks_leaves_no_file(here, monkeypatch):
    monkeypatch.setattr(checkpoints.urllib.request, "urlopen", lambda *a, **b: answer(b"abc", 9))
    with pytest.raises(I.InfoardError, match="connection broke") as error:
        I.load_teacher("https://somewhere.org/t.pt")
    assert one_line(error.value)
    assert not list(here.rglob("t.pt*"))


def test_an_address_that_is_not_there_is_one_line(here, monkeypatch):
    def urlopen(address, timeout):
        raise urllib.error.HTTPError(address, 404, "Not Found", {}, None)

    monkeypatch.setattr(checkpoints.urllib.request, "urlopen", urlopen)
    with pytest.raises(I.InfoardError, match="cannot fetch https://somewhere.org/t.pt: .*404"):
        I.load_teacher("https://somewhere.org/t.pt")


# ==== 5. Nets that give more, or want their images otherwise ======================================


class Viewing(nn.Module):
    """A net that flattens by view, which channels last does not allow."""

    def __init__(self, wrap=lambda z: z):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 32 * 32, 10)
        self.wrap = wrap

    def forward(self, x):
        f = self.conv(x)
        return self.wrap(self.head(f.view(len(x), -1)))


WRAPS = {
    "plain": lambda z: z,
    "tuple": lambda z: (z, torch.zeros(len(z), 4, 8, 8)),
    "list": lambda z: [torch.zeros(len(z), 4, 8, 8), z],
    "dict": lambda z: {"logits": z},
    "field": lambda z: types.SimpleNamespace(logits=z),
}


@each("kind", WRAPS)
def test_foreign_nets_give_their_logits(kind, monkeypatch):
    torch.manual_seed(0)
    net = Viewing(WRAPS[kind])
    monkeypatch.setattr(own, "found", lambda name, classes, size: net)
    expected = net.head(net.conv(X).contiguous().flatten(1))
    loaded = I.load_teacher("my:net", None, 10)
    near(loaded(X), expected)
    x = X.clone().requires_grad_()
    loaded(x).sum().backward()
    assert x.grad.abs().sum() > 0


@each(
    "wrap, why",
    [
        (lambda z: None, "NoneType"),
        (lambda z: z[:, :, None], "for 2 images: it must give logits"),
        (lambda z: z * torch.nan, "gives NaN"),
    ],
)
def test_other_outputs_are_one_line(wrap, why, monkeypatch):
    monkeypatch.setattr(own, "found", lambda name, classes, size: Viewing(wrap))
    with pytest.raises(I.InfoardError, match=why) as error:
        I.load_teacher("my:net", None, 10)
    assert one_line(error.value)


# ==== 6. Judging ==================================================================================


def test_robust_accuracy_and_entropy_are_those_of_pgd(capsys):
    net = trained_looking("tiny")
    y = I.predict(net, X).argmax(1)
    robust, entropy = checkpoints.under_attack(net, X, y)
    g = torch.Generator().manual_seed(0)
    x_adv = I.pgd_ce(net, X, y, eps=8 / 255, alpha=2 / 255, steps=10, generator=g)
    z = net(x_adv)
    assert robust == (z.argmax(1) == y).double().mean().item()
    p = z.double().softmax(1)
    assert entropy == pytest.approx(-(p * p.log()).sum(1).mean().item(), 1e-5)


def test_a_path_names_a_teacher_as_its_text_does(lab):
    net = I.load_teacher(Path(lab.teacher))
    x = torch.rand(2, 3, 32, 32)
    assert I.predict(net, x).equal(I.predict(I.load_teacher(lab.teacher), x))
    with pytest.raises(I.InfoardError, match="^no checkpoint file at nowhere.pt$"):
        I.load_teacher(Path("nowhere.pt"))


def test_a_teacher_that_is_taken_says_what_it_is(here, capsys):
    images = I.render_shapes(400, 100)
    x = images.x_test[:, :, ::2, ::2]
    net = I.load_teacher(str(ROOT / "results/evidence/teachers/strong.pt"), None, 10, size=16)
    y = I.predict(net, x / 255).argmax(1)
    y[::4] += 1
    share = I.percent(I.correct(net, x, y))
    evaluation.check_teacher(net, x, y, "Zhang2019Theoretically.pt", 10)
    out = capsys.readouterr().out
    told = f"clean accuracy {share} on {len(x)} test images, published 84.92 and 53.08 under"
    assert told in out
    assert re.search(r"; \d+\.\d under PGD-10 on \d+ of them, where its entropy is", out)
    assert "of 2.30 nats" in out


@pytest.fixture
def half(here):
    """A file whose net is right on these images if it sees 2x - 1, with images and labels."""
    net = I.tiny()
    net.load_state_dict(trained_looking("tiny").state_dict())
    x = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z = net.eval()(2 * x - 1)
        net.linear.bias -= z.mean(0)  # else it says the same of all images
    write("t", net.state_dict())
    return x, (z - z.mean(0)).argmax(1)


@each("mixed", [False, True])  # near chance as it is, or far from it
def test_the_normalisation_that_fits_is_named(mixed, half):
    x, y = half
    net = I.load_teacher("t.pt")
    as_it_is = I.predict(net, x).argmax(1)
    if mixed:
        y = torch.where(torch.arange(100) < 25, as_it_is, y)
    else:
        x, y = x[as_it_is != y].repeat(2, 1, 1, 1)[:100], y[as_it_is != y].repeat(2)[:100]
    now = I.percent(I.correct(net, x, y))
    best = I.percent(I.correct(I.load_teacher("t.pt", norm="half"), x, y))
    assert best > now + 5
    assert (now > 20) == mixed
    told = f"{best} with --teacher-norm half, {now} as it is, on 100 images"
    with pytest.raises(I.InfoardError, match=told) as error:
        evaluation.check_teacher(net, x, y, "t.pt", 10)
    assert one_line(error.value)


def test_a_normalisation_that_was_told_is_not_tried(half, monkeypatch):
    x, y = half
    monkeypatch.setattr(checkpoints, "best_norm", None)  # it cannot be called
    evaluation.check_teacher(I.load_teacher("t.pt", norm="half"), x, y, "t.pt", 10)


def test_trying_normalisations_leaves_the_net_as_it_is(half):
    x, y = half
    net = I.load_teacher("t.pt")
    before = net(X)
    name, best, now = checkpoints.best_norm(net, x, y)
    assert (name, best) == ("half", 100.0)
    assert now == I.percent(I.correct(net, x, y))
    assert torch.equal(net(X), before)


def test_a_weak_teacher_stops_the_run_if_it_was_given_and_warns_if_not(here, capsys):
    net = trained_looking("tiny")
    label = {"student": "tiny", "framework": "trades", "epochs": 1, "subset": 500}
    file = {"format": "infoard-1", "config": label, "size": 32, "classes": [""] * 10}
    Path("runs/teachers/a").mkdir(parents=True)
    write("runs/teachers/a/best", file | {"model": net.state_dict()})
    shutil.copy("runs/teachers/a/best.pt", "best.pt")
    x = torch.rand(100, 3, 32, 32)
    y = (I.predict(net, x).argmax(1) + 1) % 10
    chance = y.bincount().max().item()  # of a hundred
    teacher = I.load_teacher("best.pt")
    with pytest.raises(I.InfoardError, match=f"chance is {chance}.0") as error:
        evaluation.check_teacher(teacher, x, y, "best.pt", 10)
    assert one_line(error.value)
    capsys.readouterr()
    evaluation.check_teacher(teacher, x, y, "runs/teachers/a/best.pt", 10)
    out = capsys.readouterr().out
    assert out.startswith("warning: ")
    assert f"chance is {chance}.0 (always one class), trained here by trades (epochs: 1" in out
    assert out.endswith("images: 500): too few epochs or images: raise --teacher-epochs\n")


# ==== 7. RobustBench and published accuracies =====================================================


def test_robustbench_is_imported_without_what_current_packages_lack(here, monkeypatch):
    Path("robustbench").mkdir()
    Path("robustbench/__init__.py").write_text("")
    Path("robustbench/utils.py").write_text(
        "from autoattack import AutoAttack\n"
        "from autoattack.state import EvaluationState\n"
        "import pkg_resources\n"
        "import infoard\n"
        "pkg_resources.resource_filename\n"
        "def load_model(name, dataset, threat_model):\n"
        "    return {'Known': infoard.tiny}[name]()\n"
    )
    monkeypatch.syspath_prepend(str(here))
    for name in ("robustbench", "robustbench.utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(zoo, "is_there", lambda module: False)
    assert I.load_teacher("robustbench:Known", None, 10, dataset="cifar10")(X).shape == (2, 10)
    assert sys.modules.get("autoattack") is None
    with pytest.raises(I.InfoardError, match="no L-infinity model.*near: Chen2021LTD_WRN34_10"):
        I.load_teacher("robustbench:Chen2021_WRN34_10")
    with pytest.raises(I.InfoardError, match="say which benchmark the data are, --benchmark"):
        I.load_teacher("robustbench:Known", dataset="folder")
    for name in ("robustbench", "robustbench.utils"):
        sys.modules.pop(name, None)


def test_a_package_that_robustbench_lacks_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(I.InfoardError, match="needs the package robustbench.*: pip install"):
        I.load_teacher("robustbench:Known")


def test_an_entry_of_the_zoo_is_tried_by_name_and_without(here):
    made = {"model": lambda: trained_looking("tiny"), "gdrive_id": "x"}
    by_name, bare = zoo.try_entry("Hendrycks2019Using", made, here, "cifar10")
    assert (by_name, bare) == ("DIFFERS", "equal")  # it is none of 2x - 1
    assert zoo.try_entry("Carmon2019Unlabeled", made, here, "cifar10") == ("equal", "equal")
    several = {"model": None, "gdrive_id": ["x", "y"]}
    assert "only via robustbench" in zoo.try_entry("Several2020", several, here, "cifar10")[0]


def test_robustbench_is_asked_for_its_linf_net(monkeypatch):
    asked = []

    def load_model(name, **options):
        asked.append({"name": name, **options})
        return trained_looking("tiny")

    package = ModuleType("robustbench")
    package.utils = ModuleType("robustbench.utils")
    package.utils.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", package.utils)
    net = I.load_teacher("robustbench:Somebody2020", None, 10, dataset="cifar100")
    assert asked == [{"name": "Somebody2020", "dataset": "cifar100", "threat_model": "Linf"}]
    assert torch.equal(net(X), trained_looking("tiny")(X))


def test_published_accuracies_are_found_by_name():
    told = ", published {} and {} under AutoAttack"
    ltd = "Chen2021LTD_WRN34_10"
    assert zoo.published(f"x/{ltd}.pt", 10) == told.format("85.21", "56.94")
    assert zoo.published(f"robustbench:{ltd}", 100) == told.format("64.07", "30.59")
    assert zoo.published("wang2023better-wrn-28-10", 10) == told.format("92.44", "67.31")
    assert zoo.published("Wu2020Adversarial_extra.pt", 10) == told.format("88.25", "60.04")
    for name in ("my.pt", "standard_net.pt", f"{ltd}.pt"):
        assert zoo.published(name, 200) == ""
    assert zoo.published("my_standard_net.pt", 10) == ""
    assert zoo.published("robustbench:Standard", 10) == told.format("94.78", "0.00")


def test_every_name_of_the_zoo_has_its_accuracies():
    for dataset, least in (("cifar10", 76), ("cifar100", 38)):
        rows = zoo.accuracies()[dataset]
        assert len(rows) >= least
        for name, (clean, robust) in rows.items():
            assert 0 <= robust <= clean <= 100, name
            assert f"{clean:.2f}" in zoo.published(name, 10 if dataset == "cifar10" else 100)


@each("name", ["strong", "medium"])
def test_kept_teachers_are_robust_nets(name):
    images = I.render_shapes(400, 100)
    x = images.x_test[:8, :, ::2, ::2] / 255
    y = images.y_test[:8]
    path = ROOT / f"results/evidence/teachers/{name}.pt"
    net = I.load_teacher(str(path), None, 10, size=16)
    x_adv = I.pgd_ce(net, x, y, eps=8 / 255, alpha=2 / 255, steps=10)
    lost = I.margin(I.predict(net, x), y) - I.margin(I.predict(net, x_adv), y)
    assert 0 < lost.mean() < 2  # 0.7; the undefended net of the same images loses 5.6


# ==== 8. Export ===================================================================================


ONE_SIZE = """
from torch import nn


def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))
"""


@pytest.fixture
def exported(here, monkeypatch):
    """The net that a checkpoint of our own evaluates; its files are written beside it."""
    net = trained_looking("tiny")
    average = prefixed("module.", net.state_dict()) | {"n_averaged": torch.tensor(3)}
    file = {"format": "infoard-1", "config": {"student": "tiny"}, "size": 32, "classes": ["a"] * 10}
    file.update(model=changed(net.state_dict()), ema=average, critics=I.Critic(4, 4).state_dict())
    torch.save(file, "last.pt")
    return net


def hide(monkeypatch, *packages):
    """As if these were not installed."""
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_export_holds_the_evaluated_weights_and_no_critics(exported, monkeypatch, capsys):
    hide(monkeypatch, "safetensors", "onnx")
    assert I.main(["export", "last.pt"]) == 0
    weights = torch.load("last.weights.pt", weights_only=True)
    assert weights.keys() == exported.state_dict().keys()
    for key, value in exported.state_dict().items():
        assert torch.equal(weights[key], value)
    count = sum(p.numel() for p in exported.parameters())
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"last.weights.pt: {count:,} parameters"
    names = {"infoard": I, "torch": torch}
    exec(last.removeprefix("in Python: "), names)  # as the line says
    assert torch.equal(names["net"](X), exported(X))
    assert checkpoints.how_to_load("a.pt", {}, exported) == "infoard.load_teacher('a.pt')"
    assert sorted(path.name for path in Path().iterdir()) == ["last.pt", "last.weights.pt"]


def test_export_makes_a_net_for_the_pixels_that_it_knows(here, monkeypatch, capsys):
    hide(monkeypatch, "safetensors", "onnx")
    Path("own.py").write_text(ONE_SIZE)
    sys.path_importer_cache.clear()
    torch.manual_seed(0)
    net = I.build_model("own.py:net", 10, 16)
    file = {"format": "infoard-1", "config": {"student": "own.py:net"}, "size": 16}
    torch.save(file | {"classes": ["a"] * 10, "model": net.state_dict()}, "last.pt")
    assert I.main(["export", "last.pt"]) == 0, capsys.readouterr().err
    weights = torch.load("last.weights.pt", weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in net.state_dict().items())


def test_plain_weights_load_as_anyones(exported, monkeypatch):
    hide(monkeypatch, "safetensors", "onnx")
    checkpoints.run_export("last.pt")
    assert torch.equal(I.load_teacher("last.weights.pt")(X), exported(X))


MEAN = {"mean": torch.tensor([0.4, 0.5, 0.6]), "std": torch.tensor([0.2, 0.3, 0.2])}


def test_export_keeps_the_normalisation_that_a_file_holds(here, monkeypatch):
    hide(monkeypatch, "safetensors", "onnx")
    net = trained_looking("tiny")
    torch.save({**net.state_dict(), **MEAN}, "t.pt")
    checkpoints.run_export("t.pt")
    found = I.load_teacher("t.weights.pt")(X)
    assert torch.equal(found, I.load_teacher("t.pt")(X))
    assert not torch.allclose(found, net(X))


def test_export_leaves_the_file_that_it_is_made_of(here, monkeypatch):
    writer = pytest.importorskip("safetensors.torch")
    hide(monkeypatch, "onnx")
    weights = prefixed("module.", trained_looking("tiny").state_dict())
    writer.save_file({k: value.contiguous() for k, value in weights.items()}, "t.safetensors")
    before = Path("t.safetensors").read_bytes()
    checkpoints.run_export("t.safetensors")
    assert Path("t.safetensors").read_bytes() == before


def test_a_factory_takes_no_normalisation(here, capsys):
    Path("own.py").write_text(ONE_SIZE)
    sys.path_importer_cache.clear()
    for how in ({"norm": "cifar10"}, {"arch": "resnet18"}, {}):
        I.load_teacher("own.py:net", how.get("arch"), 10, size=16, norm=how.get("norm", "none"))
        shown = capsys.readouterr().out
        assert ("own.py:net normalises by itself: --teacher-norm" in shown) == bool(how)


@each("size, told", [(32, ""), (96, "of stride 2 (if"), (128, "of stride 2 and a pool after it")])
def test_a_stem_for_large_images_is_told(size, told, here, capsys):
    torch.save(trained_looking("tiny").state_dict(), "r.pt")
    I.load_teacher("r.pt", size=size)
    shown = capsys.readouterr().out
    assert told in shown and ("stride 2" in shown) == bool(told)


def test_export_to_safetensors_holds_the_same_weights(exported, monkeypatch, capsys):
    reader = pytest.importorskip("safetensors.torch")
    hide(monkeypatch, "onnx")
    checkpoints.run_export("last.pt")
    weights = reader.load_file("last.safetensors")
    assert weights.keys() == exported.state_dict().keys()
    for key, value in exported.state_dict().items():
        assert torch.equal(weights[key], value)
    assert "last.safetensors: x [1, 3, 32, 32] in [0,1]" in capsys.readouterr().out


def test_export_to_onnx_computes_the_same(exported, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    hide(monkeypatch, "safetensors")
    checkpoints.run_export("last.pt")
    (images,) = onnx.load("last.onnx").graph.input
    batch, *rest = images.type.tensor_type.shape.dim
    assert batch.dim_param == "B"  # of any length
    assert [length.dim_value for length in rest] == [3, 32, 32]
    session = reference.ReferenceEvaluator("last.onnx")
    for x in (X, X[:1]):
        (logits,) = session.run(["logits"], {"x": x.contiguous().numpy()})
        assert np.allclose(logits, exported(x), atol=1e-4)  # float32 sums in another order
    assert "last.onnx: x [1, 3, 32, 32] in [0,1]" in capsys.readouterr().out
