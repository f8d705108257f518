"""What holds for checkpoints.py: any file of a net that we know loads, any other is one line."""

import functools
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import checkpoints, evaluation
from test_infoard import noise, one_line

each = pytest.mark.parametrize
ROOT = Path(I.__file__).parent
X = torch.from_numpy(noise(2)).contiguous(memory_format=torch.channels_last) / 255


# ==== 1. Wrappings and families ===================================================================

FAMILIES = {  # name and options of I.build_model; the keys tell all but the kind of activation
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
TOLD = {"wrn_silu": "wrn_10_2_silu"}  # what must be said of a file


@functools.cache
def trained_looking(family):
    """A net whose weights and statistics all differ from their initial values."""
    name, options = FAMILIES[family]
    net = I.build_model(name, **options)
    g = torch.Generator().manual_seed(0)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * (value.abs().mean() + 0.1) * torch.rand(value.shape, generator=g))
    net.to(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


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
    assert torch.equal(loaded(X), net(X))
    assert not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())


@each("family", FAMILIES)
def test_keys_tell_the_architecture(family):
    name, options = FAMILIES[family]
    found, found_options = checkpoints.infer_arch(trained_looking(family).state_dict())
    assert found == name.removesuffix("_silu").removesuffix("_wide")
    for option, value in options.items():
        assert tuple(np.atleast_1d(found_options[option])) == tuple(np.atleast_1d(value))


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


@each("keys", [("conv1.w", "block.module.x"), ("module.a.w", "fc.w"), ("a.module.w", "b.w")])
def test_a_prefix_of_some_keys_only_stays(keys):
    weights, normaliser = checkpoints.unwrap({key: torch.zeros(1) for key in keys})
    assert set(weights) == set(keys)
    assert normaliser == []


def test_a_prefix_ends_with_a_dot():
    weights, _ = checkpoints.unwrap({"net.conv1.w": torch.zeros(1), "net.conv2.w": torch.ones(1)})
    assert set(weights) == {"conv1.w", "conv2.w"}


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
    "deepmind": ({"init_conv.weight": X, "logits.weight": X}, "DeepMind.*robustbench"),
    "torchvision": (
        {"conv1.weight": X, "layer1.0.conv1.weight": X, "fc.weight": X},
        "torchvision.*module:factory",
    ),
    "none": ({}, "unknown"),
    "one": ({"delta": X}, "unknown"),
    "numbers": ({0: X, 1: X}, "no weights with names"),
    "list": ([1, 2], "holds code or no dict"),
    "module": (nn.Linear(2, 2), "holds code"),
    "headless": (headless(I.tiny().state_dict()), "without its last layer"),
    "text": (b"hello", "truncated"),
    "empty": (b"", "truncated"),
    "html": (b"<!DOCTYPE html>", "truncated"),
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
    ({"path_or_id": "three.pt", "norm": "imagenet"}, "choose from none, cifar10, cifar100"),
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


# ==== 3. RobustBench and published accuracies =====================================================


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
    assert checkpoints.published("x/Chen2021LTD_WRN34_10.pt", 10) == ", published 85.21"
    assert checkpoints.published("robustbench:Chen2021LTD_WRN34_20", 10) == ", published 86.03"
    assert checkpoints.published("wang2023better-wrn-28-10", 10) == ", published 92.44"
    assert checkpoints.published("my.pt", 10) == ""
    for name in checkpoints.PUBLISHED:
        assert checkpoints.published(name, 10)
        assert checkpoints.published(name, 100) == ""  # they are CIFAR-10's


@each("right", [10, 19, 21, 100])
def test_only_a_teacher_above_twice_chance_passes(right, monkeypatch, capsys):
    monkeypatch.setattr(I, "correct", lambda net, x, y: torch.arange(100) < right)
    if right < 20:
        with pytest.raises(I.InfoardError, match="chance is 10"):
            evaluation.check_teacher(None, X, None, "t", 10)
        return
    evaluation.check_teacher(None, X, None, "my-Zhang2019Theoretically.pt", 10)
    out = capsys.readouterr().out
    assert f"accuracy {right}.0 on" in out
    assert "84.92" in out


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


# ==== 4. Export ===================================================================================


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
    assert capsys.readouterr().out == f"last.weights.pt: {count:,} parameters\n"
    assert sorted(path.name for path in Path().iterdir()) == ["last.pt", "last.weights.pt"]


def test_plain_weights_load_as_anyones(exported, monkeypatch):
    hide(monkeypatch, "safetensors", "onnx")
    checkpoints.run_export("last.pt")
    assert torch.equal(I.load_teacher("last.weights.pt")(X), exported(X))


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
