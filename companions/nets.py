"""More nets: PreActResNet, WideResNet, MobileNetV2, with the names of layers of files in the wild.

Each function takes (classes, size) and its own options and gives a net x in [0,1] -> logits [B,K],
as those of infoard.py do; infoard.MODELS names them. For equal seeds the initial weights stay the
same only if layers are made in the order in which they stand here.
"""

import inspect
import re
from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

import infoard as I
from infoard import conv, in_a_row, stage


class PreActBlock(nn.Module):
    """PreActResNet, 1603.05027: bn-relu-conv twice + shortcut from after the first relu."""

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, c, 3, stride)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = conv(c, c)
        self.shortcut = None
        if c_in != c:
            self.shortcut = nn.Sequential(conv(c_in, c, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(f)
        f = self.conv1(f)
        return self.conv2(F.relu(self.bn2(f))) + x


def preact_resnet(
    classes: int = 10, size: int = 32, blocks=(2, 2, 2, 2), final_bn: bool = True
) -> nn.Sequential:
    """PreActResNet with as many blocks in its four stages.

    final_bn: the batch norm before its head, which some files lack.
    """
    layers = {}
    c_in = 64
    for i, n in enumerate(blocks):
        c = 64 << i
        layers[f"layer{i + 1}"] = stage(PreActBlock, c_in, c, n, 1 if i == 0 else 2)
        c_in = c
    if final_bn:
        layers["bn"] = nn.BatchNorm2d(512)
        layers["relu"] = nn.ReLU()
    return in_a_row(size, conv(3, 64), layers, nn.Linear(512, classes))


class WideBlock(nn.Module):
    """WideResNet, 1605.07146: bn-act-conv twice + shortcut from after the first act."""

    def __init__(self, c_in: int, c: int, stride: int, act: type = nn.ReLU):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, c, 3, stride)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = conv(c, c)
        self.act = act()
        self.convShortcut = None
        if c_in != c:
            self.convShortcut = conv(c_in, c, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        f = self.act(self.bn1(x))
        if self.convShortcut is not None:
            x = self.convShortcut(f)
        f = self.conv1(f)
        return self.conv2(self.act(self.bn2(f))) + x


def wide_resnet(
    classes: int = 10,
    size: int = 32,
    depth: int = 34,
    width: int = 10,
    silu: bool = False,
    bias: bool = True,
) -> nn.Sequential:
    """WideResNet of depth 6n + 4. silu: SiLU, as some files, not ReLU; bias: of its head."""
    act = nn.SiLU if silu else nn.ReLU
    n = (depth - 4) // 6
    layers = {}
    c_in = 16
    for i in (1, 2, 3):
        c = width * (8 << i)
        blocks = stage(partial(WideBlock, act=act), c_in, c, n, 1 if i == 1 else 2)
        layers[f"block{i}"] = nn.Sequential(OrderedDict(layer=blocks))
        c_in = c
    layers["bn1"] = nn.BatchNorm2d(c_in)
    layers["act"] = act()
    return in_a_row(size, conv(3, 16), layers, nn.Linear(c_in, classes, bias), name="fc")


class InvertedBlock(nn.Module):
    """MobileNetV2, 1801.04381: expand 1x1, depthwise 3x3, project 1x1; shortcut at stride 1."""

    def __init__(self, c_in: int, c: int, stride: int, expansion: int = 6):
        super().__init__()
        wide = expansion * c_in
        self.stride = stride
        self.conv1 = conv(c_in, wide, 1)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = conv(wide, wide, 3, stride, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = conv(wide, c, 1)
        self.bn3 = nn.BatchNorm2d(c)
        self.shortcut = nn.Sequential()
        if stride == 1 and c_in != c:
            self.shortcut = nn.Sequential(conv(c_in, c, 1), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.bn1(self.conv1(x)))
        f = F.relu(self.bn2(self.conv2(f)))
        f = self.bn3(self.conv3(f))
        if self.stride == 1:
            f = f + self.shortcut(x)
        return f


# The stages of MobileNetV2: expansion, width, number of blocks, stride (for images of 32 pixels).
MOBILE_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(classes: int = 10, size: int = 32) -> nn.Sequential:
    """MobileNetV2 of width 1."""
    blocks = []
    c_in = 32
    for expansion, c, n, stride in MOBILE_STAGES:
        block = partial(InvertedBlock, expansion=expansion)
        blocks.extend(stage(block, c_in, c, n, stride))
        c_in = c
    conv1 = conv(3, 32)
    layers = {
        "bn1": nn.BatchNorm2d(32),
        "relu1": nn.ReLU(),
        "layers": nn.Sequential(*blocks),
        "conv2": conv(320, 1280, 1),
        "bn2": nn.BatchNorm2d(1280),
        "relu2": nn.ReLU(),
    }
    return in_a_row(size, conv1, layers, nn.Linear(1280, classes))


# ==== Nets by name ================================================================================

WRAPPERS = {"_ae": "companions.mid:Autoencoder"}  # suffix of a model's name: wrapper(net, size)


def from_factory(name: str, classes: int | None) -> nn.Module:
    """The net of anyone's module:factory, which gets num_classes if it takes that."""
    factory = I.resolve({}, name, "net")
    takes = inspect.signature(factory).parameters.values()
    kinds = {p.kind for p in takes}
    any_keyword = inspect.Parameter.VAR_KEYWORD in kinds
    bare = inspect.Parameter.VAR_POSITIONAL in kinds  # a class without an __init__ of its own
    told = (any_keyword and not bare) or any(p.name == "num_classes" for p in takes)
    net = factory(num_classes=classes) if told and classes else factory()
    I.require(isinstance(net, nn.Module), f"{name} gives a {type(net).__name__}, no nn.Module")
    return net


def by_name(name: str, classes: int | None = 10, size: int = 32, **options) -> nn.Module:
    """A net of infoard.MODELS, any wrn_<depth>_<width>[_silu] with depth 6n + 4, or module:factory.

    NAME_ae: one of these with a decoder. Options are those of the net's own function.
    """
    if ":" in name:
        return from_factory(name, classes)
    for suffix in WRAPPERS:
        if name.endswith(suffix):
            net = by_name(name.removesuffix(suffix), classes, size, **options)
            return I.resolve(WRAPPERS, suffix, "wrapper")(net, size)
    wide = re.fullmatch(r"wrn_(\d+)_([1-9]\d*)(_silu)?", name)
    if wide and int(wide[1]) in range(10, 10_000, 6):
        options.update(depth=int(wide[1]), width=int(wide[2]), silu=wide[3] is not None)
        return wide_resnet(classes, size, **options)
    return I.resolve(I.MODELS, name, "model")(classes, size, **options)
