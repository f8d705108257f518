"""What holds for nets.py: sizes and keys as in files in the wild, the order of initial weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import infoard as I
from companions import nets

each = pytest.mark.parametrize


@each("size", [32, 64, 128])
@each("name", ["preact_resnet18", "mobilenet_v2", "wrn_10_1", "wrn_10_1_silu"])
def test_output_is_batch_by_classes(name, size):
    net = I.build_model(name, 7, size).eval()
    assert net(torch.rand(2, 3, size, size)).shape == (2, 7)


KEYS = {  # name: parameters, entries of the state dict, some of its keys
    "preact_resnet18": (
        11_172_170,
        107,
        {"layer1.0.bn1.bias", "layer2.0.shortcut.0.weight", "bn.bias", "linear.weight"},
    ),
    "wrn_34_10": (
        46_160_474,
        191,
        {"block1.layer.4.conv2.weight", "block2.layer.0.convShortcut.weight", "fc.bias"},
    ),
    "mobilenet_v2": (
        2_296_922,
        344,
        {"layers.16.conv3.weight", "layers.0.shortcut.1.weight", "conv2.weight"},
    ),
}


def check_size(net, parameters, entries):
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == entries


@each("name", KEYS)
def test_sizes_and_keys_are_those_of_files_in_the_wild(name):
    parameters, entries, keys = KEYS[name]
    with torch.device("meta"):
        net = I.build_model(name)
    check_size(net, parameters, entries)
    assert keys <= net.state_dict().keys()


def test_options_take_away_what_some_files_lack():
    with torch.device("meta"):
        preact = I.build_model("preact_resnet18", final_bn=False)
        wide = I.build_model("wrn_34_10", bias=False)
    check_size(preact, 11_172_170 - 2 * 512, 107 - 5)
    check_size(wide, 46_160_474 - 10, 191 - 1)


@given(n=st.integers(1, 4), width=st.integers(1, 3), silu=st.booleans())
def test_a_wide_resnet_has_the_depth_and_width_of_its_name(n, width, silu):
    depth = 6 * n + 4
    name = f"wrn_{depth}_{width}"
    if silu:
        name += "_silu"
    with torch.device("meta"):
        net = I.build_model(name)
    convolutions = [
        m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 3 == depth  # which counts the 1x1 shortcuts of three stages, too
    assert net.fc.in_features == 64 * width
    acts = {type(m) for m in net.modules() if isinstance(m, nn.ReLU | nn.SiLU)}
    assert acts == {nn.SiLU if silu else nn.ReLU}


LAST_MAPS = {"preact_resnet18": (512, 4), "wrn_10_2": (128, 8), "mobilenet_v2": (1280, 4)}


@each("name", LAST_MAPS)
@each("size", [32, 64, 128])  # the field's nets keep Tiny-ImageNet's 64 pixels
def test_resolution_before_the_pool_is_that_of_the_papers(name, size):
    net = I.build_model(name, 10, size).eval()
    x = torch.rand(1, 3, size, size)
    for layer_name, layer in net.named_children():
        if layer_name == "avgpool":
            break
        x = layer(x)
    channels, pixels = LAST_MAPS[name]
    if size == 64:
        pixels *= 2
    assert x.shape == (1, channels, pixels, pixels)


def zeroed(block, name):
    """A block in eval mode whose last layer gives nothing."""
    for parameter in block.get_submodule(name).parameters():
        nn.init.zeros_(parameter)
    return block.eval()


IDENTITIES = [
    zeroed(nets.PreActBlock(8, 8, 1), "conv2"),
    zeroed(nets.WideBlock(8, 8, 1), "conv2"),
    zeroed(nets.InvertedBlock(8, 8, 1), "bn3"),
]


@each("block", IDENTITIES, ids=lambda block: type(block).__name__)
def test_a_block_that_has_learned_nothing_gives_its_input(block):
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x)


def bn(x):
    """Batch norm with its initial statistics, in eval mode."""
    return x / (1 + 1e-5) ** 0.5


def test_the_shortcut_of_a_new_width_begins_after_the_first_activation():
    x = torch.randn(2, 4, 6, 6)
    preact = zeroed(nets.PreActBlock(4, 8, 2), "conv2")
    assert torch.allclose(preact(x), preact.shortcut(bn(x).relu()), atol=1e-6)
    wide = zeroed(nets.WideBlock(4, 8, 2, nn.SiLU), "conv2")
    assert torch.allclose(wide(x), wide.convShortcut(nn.functional.silu(bn(x))), atol=1e-6)


def test_an_inverted_block_has_a_shortcut_at_stride_one_alone():
    x = torch.randn(2, 4, 6, 6)
    same = zeroed(nets.InvertedBlock(4, 8, 1), "bn3")
    assert torch.equal(same(x), same.shortcut(x))
    half = zeroed(nets.InvertedBlock(4, 8, 2), "bn3")
    assert torch.equal(half(x), torch.zeros(2, 8, 3, 3))


def test_an_inverted_block_is_expansion_depthwise_and_projection():
    block = nets.InvertedBlock(4, 8, 2, expansion=6).eval()
    assert (block.conv2.groups, block.conv2.stride) == (24, (2, 2))
    x = torch.randn(2, 4, 6, 6)
    f = bn(nn.functional.conv2d(x, block.conv1.weight)).relu()
    f = bn(nn.functional.conv2d(f, block.conv2.weight, None, 2, 1, groups=24)).relu()
    f = bn(nn.functional.conv2d(f, block.conv3.weight))
    assert torch.allclose(block(x), f, atol=1e-6)


DRAWN = {  # the order in which layers are made: old seeds give old weights
    "preact_resnet18": ["layer1", "layer2", "layer3", "layer4", "conv1", "linear"],
    "wrn_16_2": ["block1", "block2", "block3", "conv1", "fc"],
    "mobilenet_v2": ["layers", "conv1", "conv2", "linear"],
}


@each("name", DRAWN)
@each("seed", [0, 7])
def test_equal_seeds_draw_the_same_weights_in_the_same_order(name, seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = I.build_model(name)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        torch.manual_seed(seed)
        for layer in DRAWN[name]:
            for module in net.get_submodule(layer).modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.reset_parameters()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


STAGES = {  # the maps that InfoARD compares, and how many channels they have
    "preact_resnet18": {"layer1": 64, "layer2": 128, "layer3": 256, "relu": 512},
    "wrn_10_2": {"block1": 32, "block2": 64, "act": 128},
    "mobilenet_v2": {"layers.2": 24, "layers.5": 32, "layers.12": 96, "relu2": 1280},
}


@each("name", STAGES)
def test_taps_find_the_last_map_of_each_resolution(name):
    shapes = I.Taps(I.build_model(name), torch.rand(2, 3, 32, 32)).shapes
    widths = {tap: shape[0] for tap, shape in shapes.items()}
    last = list(STAGES[name].values())[-1]
    assert widths == {**STAGES[name], "penultimate": last}


def factory_with_classes(num_classes):
    return I.tiny(num_classes)


def factory_with_options(**options):
    return I.tiny(options["num_classes"])


def factory_without(width=4):
    return I.tiny(7, 32, width)


@each(
    "name, classes",
    [("factory_with_classes", 7), ("factory_with_options", 7), ("factory_without", 7)],
)
def test_factories_are_told_the_classes_if_they_ask(name, classes):
    net = I.build_model(f"{__name__}:{name}", 7)
    assert net.linear.out_features == classes
