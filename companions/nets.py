"""More nets: PreActResNet, WideResNet, ResNet-50, MobileNetV2, with the names of files in the wild.

Each function takes (classes, size) and its own options and gives a net x in [0,1] -> logits [B,K],
as those of infoard.py do; infoard.MODELS names them. For equal seeds the initial weights stay the
same only if layers are made in the order in which they stand here.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

import infoard as I
from companions import own
from infoard import conv, in_a_row, stage


class SameConv(nn.Conv2d):
    """A 3x3 convolution of stride 2 padded at the right and below alone: DeepMind's."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def padded_conv(c_in: int, c_out: int, stride: int, same: bool) -> nn.Conv2d:
    """A 3x3 convolution; same: at stride 2 padded as DeepMind's nets do, which keys do not tell."""
    if same and stride == 2:
        return SameConv(c_in, c_out)
    return conv(c_in, c_out, 3, stride)


class UnitLinear(nn.Linear):
    """A last layer of cosines: features and weights have length 1 (hypersphere embedding)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Standardize(nn.Module):
    """(x - mean)/std with mean and std of each image; std is at least 1/sqrt(its values)."""

    def forward(self, x: Tensor) -> Tensor:
        floor = x[0].numel() ** -0.5
        std = x.std((1, 2, 3), keepdim=True).clamp(min=floor)
        return (x - x.mean((1, 2, 3), keepdim=True)) / std


def halved(net: nn.Sequential, size: int) -> nn.Sequential:
    """The net with a first convolution of stride 2, as ours were at 64 pixels at first."""
    net.conv1.stride = (2, 2)
    return net


class PreActBlock(nn.Module):
    """PreActResNet, 1603.05027: bn-act-conv twice + shortcut from after the first act.

    early: the shortcut from before the first bn, as in fast-AT's files. same: DeepMind's block,
    whose shortcut is early and a 3x3 convolution.
    """

    def __init__(
        self,
        c_in: int,
        c: int,
        stride: int,
        act: Callable = F.relu,
        early: bool = False,
        same: bool = False,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = padded_conv(c_in, c, stride, same)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = conv(c, c)
        self.act = act
        self.early = early or same
        self.shortcut = None
        if c_in != c and same:
            self.shortcut = padded_conv(c_in, c, stride, same)
        elif c_in != c:
            self.shortcut = nn.Sequential(conv(c_in, c, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        f = self.act(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(x if self.early else f)
        f = self.conv1(f)
        return self.conv2(self.act(self.bn2(f))) + x


def preact_resnet(
    classes: int = 10,
    size: int = 32,
    blocks=(2, 2, 2, 2),
    final_bn: bool = True,
    silu: bool = False,
    early: bool = False,
    same: bool = False,
) -> nn.Sequential:
    """PreActResNet with as many blocks in its four stages.

    final_bn: the batch norm before its head, which some files lack. silu: SiLU, not ReLU. early,
    same: see PreActBlock.
    """
    act = F.silu if silu else F.relu
    block = partial(PreActBlock, act=act, early=early, same=same)
    layers = {}
    c_in = 64
    for i, n in enumerate(blocks):
        c = 64 << i
        layers[f"layer{i + 1}"] = stage(block, c_in, c, n, 1 if i == 0 else 2)
        c_in = c
    if final_bn:
        layers["bn"] = nn.BatchNorm2d(512)
        layers["relu"] = nn.SiLU() if silu else nn.ReLU()
    return in_a_row(size, conv(3, 64), layers, nn.Linear(512, classes))


class Bottleneck(nn.Module):
    """ResNet-50, 1512.03385: conv-bn-relu of 1x1 and 3x3, conv-bn of 1x1 + shortcut, relu."""

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1 = conv(c_in, c // 4, 1)
        self.bn1 = nn.BatchNorm2d(c // 4)
        self.conv2 = conv(c // 4, c // 4, 3, stride)
        self.bn2 = nn.BatchNorm2d(c // 4)
        self.conv3 = conv(c // 4, c, 1)
        self.bn3 = nn.BatchNorm2d(c)
        self.shortcut = nn.Sequential()
        if c_in != c:
            self.shortcut = nn.Sequential(conv(c_in, c, 1, stride), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.bn1(self.conv1(x)))
        f = F.relu(self.bn2(self.conv2(f)))
        f = self.bn3(self.conv3(f))
        return F.relu(f + self.shortcut(x))


def deep_resnet(classes: int = 10, size: int = 32, blocks=(3, 4, 6, 3)) -> nn.Sequential:
    """ResNet with as many bottlenecks in its four stages; ResNet-50 has 3, 4, 6, 3."""
    layers = {"bn1": nn.BatchNorm2d(64), "relu": nn.ReLU()}
    c_in = 64
    for i, n in enumerate(blocks):
        c = 256 << i
        layers[f"layer{i + 1}"] = stage(Bottleneck, c_in, c, n, 1 if i == 0 else 2)
        c_in = c
    return in_a_row(size, conv(3, 64), layers, nn.Linear(2048, classes))


class WideBlock(nn.Module):
    """WideResNet, 1605.07146: bn-act-conv twice + shortcut from after the first act.

    same: padded as DeepMind's, see padded_conv.
    """

    def __init__(self, c_in: int, c: int, stride: int, act: type = nn.ReLU, same: bool = False):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = padded_conv(c_in, c, stride, same)
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
    same: bool = False,
    unit: bool = False,
    blocks=None,
    channels=None,
) -> nn.Sequential:
    """WideResNet of depth 6n + 4.

    silu: SiLU, as some files, not ReLU; bias: of its head; same: see padded_conv; unit: the head
    is a UnitLinear; blocks, channels: of each of the three stages, if not by depth and width.
    """
    # differs: TRADES' released WRN begins with convolutions of deviation sqrt(2/(k^2 C_out)) and a
    # head whose bias is 0; this one as torch's layers do
    act = nn.SiLU if silu else nn.ReLU
    blocks = blocks or [(depth - 4) // 6] * 3
    channels = channels or [16 * width, 32 * width, 64 * width]
    block = partial(WideBlock, act=act, same=same)
    layers = {}
    c_in = 16
    for i, (n, c) in enumerate(zip(blocks, channels, strict=True)):
        in_turn = stage(block, c_in, c, n, 1 if i == 0 else 2)
        layers[f"block{i + 1}"] = nn.Sequential(OrderedDict(layer=in_turn))
        c_in = c
    layers["bn1"] = nn.BatchNorm2d(c_in)
    layers["act"] = act()
    head = UnitLinear if unit else nn.Linear
    return in_a_row(size, conv(3, 16), layers, head(c_in, classes, bias), name="fc")


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

WRAPPERS = {
    "_ae": "companions.mid:Autoencoder",
    "_half": halved,
}  # suffix of a model's name: wrapper(net, size)


def by_name(name: str, classes: int | None = 10, size: int = 32, **options) -> nn.Module:
    """A net of infoard.MODELS, any wrn_<depth>_<width>[_silu] with depth 6n + 4, anyone's own.

    NAME_ae: one of these with a decoder. Options are those of the net's own function.
    """
    if ":" in name:
        return own.build(name, classes, size)
    for suffix in WRAPPERS:
        if name.endswith(suffix):
            net = by_name(name.removesuffix(suffix), classes, size, **options)
            return I.resolve(WRAPPERS, suffix, "wrapper")(net, size)
    wide = re.fullmatch(r"wrn_(\d+)_([1-9]\d*)(_silu)?", name)
    if wide and int(wide[1]) in range(10, 10_000, 6):
        options.update(depth=int(wide[1]), width=int(wide[2]), silu=wide[3] is not None)
        return wide_resnet(classes, size, **options)
    if name not in I.MODELS:
        return own.build(name, classes, size)
    return I.resolve(I.MODELS, name, "model")(classes, size, **options)
