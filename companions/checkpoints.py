"""Other people's files: any wrapping, the net that their keys tell, published accuracies; export.

    python infoard.py --teacher FILE                    a teacher from anywhere
    python infoard.py eval FILE --dataset cifar10       how robust it is
    python infoard.py export CKPT                       plain weights, safetensors, ONNX

    1  wrappings    2  families    3  loading    4  export

infoard.load_teacher asks for what stands here when a file is none of its own.
"""

import importlib.util
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

import infoard as I

# ==== 1. Wrappings ================================================================================

# Where files keep their weights, beside an epoch or an accuracy; the first that is there counts.
NESTED = ("state_dict", "model_state_dict", "ema", "net", "model", "rmodel", "best", "last")
# How files name their mean and standard deviation. In order of names the mean comes first.
NORMALISERS = ("mean", "mu", "sigma", "std")

# Means and standard deviations of pixels in [0,1], by the names that --teacher-norm knows.
NORMS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def innermost(file: dict) -> dict:
    """The dict of weights in a file that may hold it within others."""
    for name in NESTED:
        if isinstance(file.get(name), dict):
            return innermost(file[name])
    return file


def is_normaliser(key: str) -> bool:
    """Whether a key is that of a mean or a standard deviation of pixels."""
    return key.split(".")[-1] in NORMALISERS


def is_weight(key: str, value) -> bool:
    """Whether an entry belongs to the net: no normaliser, count of SWA or copy of TRADES' WRN."""
    *parents, name = key.split(".")
    if is_normaliser(key) or name == "n_averaged" or "sub_block1" in parents:
        return False
    return isinstance(value, Tensor)


def unwrap(file: dict) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(weights, [mean, std] or []) of a file: out of dicts, DataParallel, compile, SWA, Sequential.

    The prefix of keys that goes is as long as all weights have it.
    """
    state = innermost(file)
    I.require(all(isinstance(key, str) for key in state), "holds no weights with names")
    normaliser = [state[key] for key in sorted(state) if is_normaliser(key)]
    weights = {key: value for key, value in state.items() if is_weight(key, value)}
    prefix = os.path.commonprefix(list(weights))
    cut = prefix.rfind(".") + 1
    return {key[cut:]: value for key, value in weights.items()}, normaliser


# ==== 2. Families =================================================================================
# Each looks at bare weights and gives (name, options for infoard.build_model), or None if they are
# of another one. A family more is a function more.


def count_blocks(weights: dict[str, Tensor], stage: str) -> int:
    """How many blocks of two or more convolutions a stage has."""
    block = re.compile(re.escape(stage) + r"\.\d+\.conv2\.weight")
    return sum(block.fullmatch(key) is not None for key in weights)


def wide_resnet(weights: dict[str, Tensor]) -> tuple[str, dict] | None:
    """TRADES' WideResNet, of any depth and width."""
    n = count_blocks(weights, "block1.layer")
    if n == 0:
        return None
    width = len(weights["block1.layer.0.conv2.weight"]) // 16
    return f"wrn_{6 * n + 4}_{width}", {"bias": "fc.bias" in weights}


def resnet(weights: dict[str, Tensor]) -> tuple[str, dict] | None:
    """kuangliu's ResNet or PreActResNet, with as many blocks as there are."""
    blocks = [count_blocks(weights, f"layer{i}") for i in (1, 2, 3, 4)]
    if 0 in blocks or "linear.weight" not in weights:
        return None
    if "bn1.weight" in weights:
        return "resnet18", {"blocks": blocks}
    return "preact_resnet18", {"blocks": blocks, "final_bn": "bn.weight" in weights}


def mobilenet_v2(weights: dict[str, Tensor]) -> tuple[str, dict] | None:
    """kuangliu's MobileNetV2."""
    if "layers.16.conv3.weight" not in weights:
        return None
    return "mobilenet_v2", {}


def tiny(weights: dict[str, Tensor]) -> tuple[str, dict] | None:
    """infoard's tiny, of any width."""
    if "layer3.0.weight" not in weights:
        return None
    return "tiny", {"width": len(weights["conv1.weight"])}


FAMILIES = (wide_resnet, resnet, mobilenet_v2, tiny)


def infer_arch(weights: dict[str, Tensor]) -> tuple[str, dict]:
    """(name, options) of the net that bare weights belong to."""
    for family in FAMILIES:
        found = family(weights)
        if found is not None:
            return found
    told = "a net unknown here (torchvision's? DeepMind's?)"
    raise I.InfoardError(f"{told}: use robustbench:ID or module:factory")


# ==== 3. Loading ==================================================================================


def from_file(file: dict, arch: str | None, size: int, norm: str) -> nn.Module:
    """The net of a file: unwrapped, architecture from its keys, strictly loaded, float32.

    arch: the name it must have, which may say more than keys do (wrn_28_10_silu). size: pixels of
    the images. norm: a name in NORMS, for files that have no normaliser of their own.
    """
    weights, normaliser = unwrap(file)
    name, options = infer_arch(weights)
    arch = arch or name
    I.require(arch.startswith(name), f"holds a {name}, not the {arch} asked for")
    head = weights.get("fc.weight", weights.get("linear.weight", ()))
    I.require(len(head), f"holds a {name} without its last layer, linear or fc")
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        net = I.build_model(arch, len(head), size, **options)
    net.load_state_dict(weights, assign=True)
    if not normaliser:
        normaliser = I.lookup(NORMS, norm, "normalisation")
    net[0] = I.Normalize(*normaliser)
    return net.float()


def from_robustbench(name: str, dataset: str) -> nn.Module:
    """A net of RobustBench's L-infinity models by its name there; asks for the package."""
    from robustbench.utils import load_model

    return load_model(name, dataset=dataset, threat_model="Linf")


# CIFAR-10 clean accuracy in RobustBench, in per cent, where the name of a teacher contains this.
PUBLISHED = {
    "Chen2021LTD_WRN34_10": 85.21,
    "Chen2021LTD_WRN34_20": 86.03,
    "Zhang2019Theoretically": 84.92,
    "Gowal2021Improving_28_10": 87.50,
    "Wang2023Better_WRN_28_10": 92.44,
    "Bartoldson2024": 93.68,
}


def published(name: str, classes: int) -> str:
    """ ", published 85.21", to be said beside a teacher's accuracy, or "" if we know of none."""
    if classes != 10:
        return ""
    plain = name.lower().replace("-", "_")
    for part, accuracy in PUBLISHED.items():
        if part.lower() in plain:
            return f", published {accuracy}"
    return ""


# ==== 4. Export ===================================================================================


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def export_onnx(net: nn.Module, path: str, size: int) -> None:
    """ONNX of a net for batches of any length, of images of so many pixels."""
    images = torch.zeros(1, 3, size, size)
    names = {"input_names": ["x"], "output_names": ["logits"], "dynamic_axes": {"x": {0: "B"}}}
    torch.onnx.export(net, (images,), path, dynamo=False, **names)


def run_export(path: str) -> None:
    """Write plain weights, and safetensors and ONNX where installed; without critics."""
    net = I.load_teacher(path).to(memory_format=torch.contiguous_format)
    size = I.load_tensors(path).get("size", 32)
    stem = Path(path).with_suffix("")
    I.save(Path(f"{stem}.weights.pt"), net.state_dict())
    print(f"{stem}.weights.pt: {sum(p.numel() for p in net.parameters()):,} parameters")

    written = []
    if is_installed("safetensors"):
        from safetensors.torch import save_model

        written.append(f"{stem}.safetensors")
        save_model(net, written[-1])
    if is_installed("onnx"):
        written.append(f"{stem}.onnx")
        export_onnx(net, written[-1], size)
    if written:
        print(f"{', '.join(written)}: x [1, 3, {size}, {size}] in [0,1] -> logits")


# ==== 5. Whatever is not of this program ==========================================================


def load_foreign(
    path_or_id: str,
    file: dict,
    classes: int | None,
    *,
    arch: str | None,
    size: int,
    norm: str,
    dataset: str,
) -> nn.Module:
    """The net of a file that is none of ours, of robustbench:ID or of module:factory.

    The arguments are those of infoard.load_teacher; file: what the file holds, if it is one.
    """
    if ":" not in path_or_id or Path(path_or_id).exists():
        net = from_file(file, arch, size, norm)
    elif path_or_id.startswith("robustbench:"):
        net = from_robustbench(path_or_id.partition(":")[2], dataset)
    else:
        net = I.build_model(path_or_id, classes)
    I.require(isinstance(net, nn.Module), f"{type(net)} is no nn.Module")
    z = I.predict(net, torch.full((2, 3, size, size), 0.5))
    is_logits = (z < 0).any() or (z.sum(1) - 1).abs().max() > 1e-4
    I.require(is_logits, "gives probabilities, not logits")
    return net
