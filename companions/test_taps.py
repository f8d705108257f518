"""What is tapped: stages of any net, never the inside of a block, and as [B,C,h,w] whatever the net
has. The nets are torchvision's with random weights and small ones of known pitfalls.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

import infoard as I
from companions import taps
from test_infoard import make_info, near, pair, rand

each = pytest.mark.parametrize


def shapes_of(net, size=32):
    return I.Taps(net.eval(), torch.zeros(2, 3, size, size)).shapes


# ==== 1. Features =================================================================================

X = torch.zeros(2, 3, 32, 32)
WIDE = torch.zeros(2, 3, 50, 30)


@each(
    "shape, x, given",
    [
        ((2, 5, 8, 8), X, (2, 5, 8, 8)),
        ((2, 8, 8, 5), X, (2, 5, 8, 8)),  # channels last
        ((2, 7, 7, 7), X, (2, 7, 7, 7)),
        ((2, 4, 17, 16), X, None),  # keys of four heads
        ((2, 4, 16, 17), X, None),
        ((2, 65, 6), X, (2, 6, 8, 8)),  # tokens, one of them of the class
        ((2, 64, 6), X, (2, 6, 8, 8)),
        ((2, 69, 6), X, (2, 6, 8, 8)),  # and four registers
        ((2, 77, 6), X, (2, 6)),  # no grid: their mean
        ((2, 65, 6), WIDE, (2, 6)),
        ((2, 5, 13, 8), WIDE, (2, 5, 13, 8)),  # a quarter of 50 and of 30 pixels, rounded
        ((2, 13, 8, 9), WIDE, (2, 9, 13, 8)),
        ((2, 5, 8, 8), WIDE, None),
        ((2, 9), X, (2, 9)),
        ((18, 5, 8, 8), X, None),  # windows
        ((2,), X, None),
    ],
)
def test_features_are_maps_or_vectors_whatever_the_net_has(shape, x, given):
    features = taps.as_features(torch.zeros(shape), x)
    assert (features is None and given is None) or tuple(features.shape) == given
    again = taps.as_features((torch.zeros(shape), None), x)
    assert (again is None) == (given is None)
    assert taps.as_features({"a": 1}, x) is None


def test_tokens_become_the_grid_they_were():
    f = rand(2, 6, 4, 4)
    tokens = torch.cat([rand(2, 3, 6, seed=1), f.flatten(2).movedim(1, 2)], dim=1)
    assert torch.equal(taps.as_features(tokens, X), f)
    assert torch.equal(taps.as_features(f.movedim(1, 3), X), f)


# ==== 2. Nets =====================================================================================


class Expanding(nn.Module):
    """A block that widens at the old resolution before it halves it, as MobileNetV2's."""

    def __init__(self, c_in, c, stride=2):
        super().__init__()
        layers = [nn.Conv2d(c_in, 6 * c_in, 1), nn.BatchNorm2d(6 * c_in), nn.ReLU()]
        layers += [nn.Conv2d(6 * c_in, c, 3, stride, 1), nn.BatchNorm2d(c)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Attentive(nn.Module):
    """A transformer of 4x4 pixel patches with a class token, whose keys go through modules."""

    def __init__(self, heads=4, width=16):
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.key = nn.Linear(width, width)
        self.k_norm = nn.Identity()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        f = self.embed(x).flatten(2).movedim(1, 2)
        f = torch.cat([self.token.expand(len(x), -1, -1), f], dim=1)
        k = self.k_norm(self.key(f).unflatten(2, (self.heads, -1)).movedim(2, 1))  # [B,heads,N,d]
        weights = (k @ k.movedim(2, 3)).softmax(3)
        f = self.norm(f + (weights @ k).movedim(1, 2).flatten(2))
        return self.head(f[:, 0])


class SharedRelu(nn.Module):
    """One module after each convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class Wrapped(nn.Module):
    """Normalisation in front of a net."""

    def __init__(self, net):
        super().__init__()
        self.normalize, self.net = I.Normalize(), net

    def forward(self, x):
        return self.net(self.normalize(x))


def expanding(classes=4):
    blocks = nn.Sequential(Expanding(8, 12), Expanding(12, 12, 1), Expanding(12, 24))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), blocks, *head)


class ByName(nn.Module):
    """A last layer that is called by the name of its argument."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(input=self.conv(x).mean((2, 3)))


def test_a_last_layer_that_is_called_by_name_has_no_tap():
    assert shapes_of(ByName()) == {"conv": [8, 16, 16]}


SMALL = {
    "expanding": (expanding, {"0": [8, 16, 16], "1.1": [12, 8, 8], "1": [24, 4, 4]}, 24),
    "attentive": (Attentive, {"norm": [16, 8, 8]}, 16),
    "shared": (SharedRelu, {"conv1": [8, 16, 16], "conv2": [16, 8, 8]}, 16),
}


@each("name", SMALL)
def test_pitfalls_are_not_taken_for_features(name):
    make, maps, width = SMALL[name]
    net = make()
    assert shapes_of(net) == {**maps, "penultimate": [width]}
    inside = {f"net.{tap}": shape for tap, shape in maps.items()}
    assert shapes_of(Wrapped(net)) == {**inside, "penultimate": [width]}


TORCHVISION = {  # pixels, the three deepest maps, width of the head
    "resnet18": (64, ["layer2 128x8x8", "layer3 256x4x4", "layer4 512x2x2"], 512),
    "mobilenet_v2": (64, ["features.6 32x8x8", "features.13 96x4x4", "features 1280x2x2"], 1280),
    "mobilenet_v3_small": (
        64,
        ["features.3 24x8x8", "features.8 48x4x4", "features 576x2x2"],
        1024,
    ),
    "shufflenet_v2_x0_5": (64, ["stage2 48x8x8", "stage3 96x4x4", "conv5 1024x2x2"], 1024),
    "regnet_y_400mf": (
        64,
        ["trunk_output.block2 104x8x8", "trunk_output.block3 208x4x4", "trunk_output 440x2x2"],
        440,
    ),
    "efficientnet_b0": (64, ["features.3 40x8x8", "features.5 112x4x4", "features 1280x2x2"], 1280),
}


@each("name", TORCHVISION)
def test_stages_of_torchvision_are_found(name):
    size, maps, width = TORCHVISION[name]
    shapes = shapes_of(models.get_model(name, weights=None), size)
    assert shapes.pop("penultimate") == [width]
    assert [f"{tap} {c}x{h}x{w}" for tap, (c, h, w) in shapes.items()][-3:] == maps


def test_attention_and_channels_last_of_torchvision_are_understood():
    vit = models.VisionTransformer(32, 4, 2, 2, 16, 32, num_classes=4)
    assert shapes_of(vit) == {"encoder": [16, 8, 8], "penultimate": [16]}
    swin = models.SwinTransformer([2, 2], 12, [1, 1], [2, 4], [4, 4], num_classes=4)
    shapes = {"features.1": [12, 16, 16], "permute": [24, 8, 8], "penultimate": [24]}
    assert shapes_of(swin) == shapes
    x = rand(2, 3, 32, 32).float()
    tapped = I.Taps(swin.eval(), x)
    swin(x)
    near(tapped.of(x)["permute"].mean((2, 3)), tapped.of(x)["penultimate"], 1e-5)


# ==== 3. Pairs ====================================================================================


def test_a_student_learns_from_a_net_of_another_kind():
    student, _, x, y = pair()
    teacher = Attentive().eval()
    info = make_info(student, teacher, w_att=0.1, w_rel=0.1)
    assert info.pairs == [("penultimate", "penultimate"), ("layer3", "norm")]
    told = taps.describe(info).splitlines()
    assert told[1] == "compared: layer3 [24, 2, 2] of the student, norm [16, 4, 4] of the teacher"
    student(x)
    teacher(x)
    info.loss(x, x).backward()
    assert next(student.parameters()).grad.any()
    assert taps.describe(make_info(student, teacher, mim="off")) == "InfoARD compares no features"


def test_taps_that_are_named_are_compared():
    student, _, x, y = pair()
    teacher = Attentive().eval()
    info = make_info(student, teacher, taps="layer1=embed, layer3=key,penultimate", w_att=0.1)
    assert info.pairs == [("layer1", "embed"), ("layer3", "key"), ("penultimate", "penultimate")]
    student(x)
    teacher(x)
    s, t = info.student_taps.of(x), info.teacher_taps.of(x)
    names = zip(info.critics, info.pairs, strict=True)
    truth = torch.stack([I.infonce(critic(s[a], t[b])) for critic, (a, b) in names]).mean()
    info.loss(x, x)
    near(info.terms["feat"], truth, 1e-6)
    maps = torch.stack([I.infonce(I.attention_scores(s[a], t[b])) for a, b in info.pairs[:2]])
    near(info.terms["att"], maps.mean(), 1e-6)


@each("named, why", [("layer9", "no module 'layer9'"), ("layer3=k_norm", "gives no features")])
def test_taps_that_cannot_be_read_are_one_line(named, why):
    student, *_ = pair()
    with pytest.raises(I.InfoardError, match=why):
        make_info(student, Attentive().eval(), taps=named)


def test_images_of_another_size_are_told():
    net = models.VisionTransformer(64, 8, 1, 2, 16, 32, num_classes=4)
    with pytest.raises(I.InfoardError, match="image_shape"):
        I.InfoARD(net, net)
    I.InfoARD(net, net, image_shape=(3, 64, 64))


def test_the_table_has_a_line_for_each_net():
    row = taps.row_of("infoard", "tiny")
    maps = "`relu` 16x16x16, `layer1` 32x8x8, `layer3` 128x4x4"
    assert row == f"| infoard | tiny | 32 | {maps} | 128 |\n"
    kept = (Path(I.__file__).parent / "results/taps/README.md").read_text()
    assert kept.startswith(taps.HEAD) and row in kept
    for library, (_, names) in taps.LIBRARIES.items():
        for name in names:
            assert kept.count(f"| {library} | {name} | ") == 1


# ==== 4. The page =================================================================================


def page():
    """What the code of docs/appendix.md defines, run in an empty file."""
    text = (Path(I.__file__).parent / "docs/appendix.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    names = {}
    exec(code, names)
    return code, names


def test_the_page_is_infoard():
    code, names = page()
    assert 30 <= len(code.splitlines()) <= 50
    student, teacher, x, y = pair(9)
    x_adv = (x + 0.02).clamp(0, 1)
    info = make_info(student.eval(), teacher)
    t = teacher(x)
    near(names["radii"](t, y), info.strength(t, y).eps, 1e-7)

    student(x_adv)
    s_maps, t_maps = info.student_taps.of(x_adv), info.teacher_taps.of(x)
    critics = []
    for ours, (a, b) in zip(info.critics, info.pairs, strict=True):
        critics.append(names["Critic"](s_maps[a].shape[1], t_maps[b].shape[1]))
        critics[-1].load_state_dict(ours.state_dict())
    features = [s_maps[a] for a, _ in info.pairs], [t_maps[b] for _, b in info.pairs]
    loss = names["information_loss"](critics, *features)
    near(loss, info.loss(x_adv, x), 1e-6)
    assert names["information_loss"](critics, *features) != 0
