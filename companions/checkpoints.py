"""Other people's files: any address, format and wrapping, the net that their keys tell; export.

    python infoard.py --teacher FILE                    a teacher from anywhere
    python infoard.py eval FILE --dataset cifar10       how robust it is
    python infoard.py export CKPT                       plain weights, safetensors, ONNX

    1  files       3  families         5  loading    7  export
    2  wrappings   4  normalisation    6  judging

infoard.load_teacher asks for what stands here. No code of a file is run: what is not a tensor, a
number or another harmless object is named and refused.
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import infoard as I
from companions import nets, own, zoo
from companions.ranks import barrier

# ==== 1. Files ====================================================================================

DOWNLOADS = "runs/downloads"


def download(address: str) -> str:
    """Where the file of an https address lies here; it is fetched once, its sha256 beside it."""
    I.require(address.startswith("https://"), f"{address}: only https:// is fetched")
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(address).path)).name or "teacher.pt"
    path = Path(DOWNLOADS, hashlib.sha256(address.encode()).hexdigest()[:8], name)
    note = path.with_name(f"{name}.sha256")
    if I.world()[0] == 0 and not note.exists():
        try:
            fetch(address, path)
        except (OSError, ValueError) as error:
            raise I.InfoardError(f"cannot fetch {address}: {error}") from None
        I.save(note, f"{own.digest(path)}  {address}\n".encode())
    barrier()
    known = note.read_text().split()[0]
    told = f"{path} is not what was fetched from {address}: delete its folder"
    I.require(own.digest(path) == known, told)
    print(f"{address}: {path}, sha256 {known}")
    return str(path)


def fetch(address: str, path: Path) -> None:
    """Writes the content of an address to a file, whole or not at all, with a bar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")  # of two processes each has its own
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, open(part, "wb") as f:
            length = int(answer.headers.get("Content-Length") or 0)
            chunks = iter(lambda: answer.read(1 << 20), b"")
            with I.progress_bar(None, path.name) as bar:
                bar.total = math.ceil(length / (1 << 20)) or None  # in MiB
                for chunk in chunks:
                    f.write(chunk)
                    bar.update()
            I.require(not length or f.tell() == length, "the connection broke: try again")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def no_default(*args) -> collections.OrderedDict:
    """What stands in for a dict with a default, whose factory is not needed."""
    return collections.OrderedDict()


def harmless() -> list:
    """For safe_globals, what may lie beside tensors: settings, numpy's values, paths."""
    core = getattr(np, "_core", None) or np.core
    found = [argparse.Namespace, types.SimpleNamespace, dict, list, set, np.dtype]
    found.append((no_default, "collections.defaultdict"))
    found += [type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"]
    for module in ("numpy.core", "numpy._core"):  # the name of old files, and that of new ones
        found.append((core.multiarray.scalar, f"{module}.multiarray.scalar"))
        found.append((core.multiarray._reconstruct, f"{module}.multiarray._reconstruct"))
    found.append((np.ndarray, "numpy.ndarray"))
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PosixPath", "WindowsPath"):
            found.append((pathlib.PurePosixPath, f"{module}.{name}"))
    for module in (
        "pytorch_lightning.utilities.parsing",
        "lightning_fabric.utilities.data",
        "lightning.fabric.utilities.data",
    ):
        found.append((collections.OrderedDict, f"{module}.AttributeDict"))
    return found


CONVERT = (
    "import torch; f = torch.load('{path}', map_location='cpu', weights_only=False); "
    "torch.save(f.state_dict() if hasattr(f, 'state_dict') else "
    "{{k: v for k, v in f.items() if isinstance(v, (dict, torch.Tensor))}}, 'plain.pt')"
)


def read_torch(path: Path) -> dict:
    """What torch.save has written; no code of it is run."""
    try:
        with torch.serialization.safe_globals(harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the unpickler raise
        culprit = re.search(r"GLOBAL (\S+) (was not|whose)|[Uu]nsupported class (\S+)", str(error))
        if culprit:
            name = culprit[1] or culprit[3]
            told = f"{path} holds code, {name}, which is not run. If you trust it, convert it where"
            line = CONVERT.format(path=path)
            raise I.InfoardError(f'{told} its code is installed: python -c "{line}"') from None
        if "TorchScript" in str(error):
            told = f"{path} is a TorchScript archive: save torch.jit.load(...).state_dict()"
            raise I.InfoardError(told) from None
        told = f"{path} is truncated or no PyTorch file"
        raise I.InfoardError(f"{told}: get it again, or save its state_dict() alone") from None
    told = f"{path} holds a {type(content).__name__}, no dict: save a state_dict()"
    I.require(isinstance(content, dict), told)
    return dict(content)


SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format of safetensors: length of the header, header in JSON, numbers."""
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    try:
        weights = {}
        for name, about in json.loads(content[8:begin]).items():
            if name == "__metadata__":
                continue
            first, last = about["data_offsets"]
            kind = SAFETENSORS[about["dtype"]]
            values = torch.zeros(0, dtype=kind)
            if last > first:
                values = torch.frombuffer(content[begin + first : begin + last], dtype=kind)
            weights[name] = values.view(about["shape"])
    except (ValueError, KeyError, TypeError, RuntimeError):
        raise I.InfoardError(f"{path} is truncated or no safetensors file: get it again") from None
    return weights


def read(path: str | Path) -> dict:
    """What a file of weights holds, or one line that says what is wrong with it."""
    path = Path(path)
    I.require(path.is_file(), f"no checkpoint file at {path}")
    with open(path, "rb") as f:
        head = f.read(512)
    start = head.lstrip().lower()
    told = (
        f"{path} is a web page saved under this name, no checkpoint: open its address in a browser"
    )
    page = start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))
    I.require(not page, f"{told} (a log-in, a confirmation, /blob/ in the place of /resolve/)")
    pointer = start.startswith(b"version https://git-lfs")
    I.require(not pointer, f"{path} is a pointer of Git LFS, not the file: git lfs pull")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return read_safetensors(path)
    return read_torch(path)


# ==== 2. Wrappings ================================================================================

# Where files keep their weights; if several are there, the first of these counts.
NESTED = (
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "net",
    "net_state_dict",
    "model",
    "rmodel",
    "module",
    "network",
    "weights",
    "params",
    "best",
    "last",
)
# How files name their mean and standard deviation. In order of names the mean comes first.
NORMALISERS = ("mean", "mu", "new_mean", "new_std", "sigma", "std")
# The first convolution of each family: what stands before its name is a prefix of all weights.
FIRST = ("conv1.weight", "init_conv.weight", "conv_2d.weight", "stem_conv.weight")


# What training leaves beside a net in one dict of tensors.
BESIDE = re.compile(
    r"(criteri|loss|optim|sched|lr_sched|scaler|metric|attack|n_classes|n_averaged)"
)


def is_normaliser(key: str) -> bool:
    """Whether a key is that of a mean or a standard deviation of pixels."""
    return key.split(".")[-1] in NORMALISERS


def is_weight(key: str, value) -> bool:
    """Whether an entry belongs to the net: no normaliser, criterion or copy of TRADES' WRN."""
    if is_normaliser(key) or BESIDE.match(key) or "sub_block1" in key.split("."):
        return False
    return isinstance(value, Tensor)


def holders(file: dict, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """(keys that lead there, dict) of all dicts in a file that hold tensors with names."""
    if any(isinstance(key, str) and isinstance(value, Tensor) for key, value in file.items()):
        yield path, {key: value for key, value in file.items() if isinstance(key, str)}
    for key, value in file.items():
        if isinstance(value, dict):
            yield from holders(value, (*path, str(key)))


def normaliser_of(state: dict) -> list[Tensor]:
    """[mean, standard deviation] of the pixels if they lie beside the weights, else []."""
    found = {}
    for key in sorted(state):
        if is_normaliser(key):
            found.setdefault(key.rpartition(".")[0], []).append(state[key])
    pairs = [pair for pair in found.values() if len(pair) == 2]
    return pairs[0] if pairs else []


def unwrap(state: dict) -> dict[str, dict[str, Tensor]]:
    """{prefix: bare weights} of each net that tensors may hold, the shortest prefix first.

    Prefixes are those of DataParallel, compile, SWA, Sequential, Lightning and other wrappers; what
    has another one (a criterion, an attacker's copy) stays out.
    """
    prefixes = set()
    for key in state:
        for first in FIRST:
            if key == first or key.endswith(f".{first}"):
                prefixes.add(key.removesuffix(first))
    bare = {}
    for prefix in sorted(prefixes, key=len):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        bare[prefix] = {k: v for k, v in inside.items() if is_weight(k, v)}
    return bare


# ==== 3. Families =================================================================================
# Each looks at bare weights and gives a Found, or None if they are of another one. A family more is
# a function more. What keys do not tell is a variant: a suffix of a name for --teacher-arch.


@dataclass
class Found:
    """A net that keys tell.

    name: for --teacher-arch. build: a function (classes, size, **options). variants: {suffix:
    options}. assumed: the variant that is taken unless one is named, or None: one must be.
    why: what the keys do not tell. pixels: whether the family normalises by its data set.
    """

    name: str
    build: Callable
    options: dict
    weights: dict[str, Tensor]
    variants: dict = field(default_factory=dict)
    assumed: str | None = ""
    why: str = ""
    pixels: bool = False


DEEPMIND_WIDE = (
    (r"^init_conv\.", "conv1."),
    (r"^layer\.0\.block\.", "block1.layer."),
    (r"^layer\.1\.block\.", "block2.layer."),
    (r"^layer\.2\.block\.", "block3.layer."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv_0\.", ".conv1."),
    (r"\.conv_1\.", ".conv2."),
    (r"\.shortcut\.", ".convShortcut."),
    (r"^batchnorm\.", "bn1."),
    (r"^logits\.", "fc."),
)
DEEPMIND_PREACT = (
    (r"^conv_2d\.", "conv1."),
    (r"^layer_0\.", "layer1."),
    (r"^layer_1\.", "layer2."),
    (r"^layer_2\.", "layer3."),
    (r"^layer_3\.", "layer4."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv_2d_1\.", ".conv1."),
    (r"\.conv_2d_2\.", ".conv2."),
    (r"^batchnorm\.", "bn."),
    (r"^logits\.", "linear."),
)
STEM_WIDE = (
    (r"^stem_conv\.", "conv1."),
    (r"^blocks\.0\.layer\.", "block1.layer."),
    (r"^blocks\.1\.layer\.", "block2.layer."),
    (r"^blocks\.2\.layer\.", "block3.layer."),
    (r"\.shortcut\.0\.", ".convShortcut."),
    (r"^norm1\.", "bn1."),
)


def renamed(weights: dict[str, Tensor], names) -> dict[str, Tensor]:
    """The weights under our names of layers."""
    result = {}
    for key, value in weights.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        result[key] = value
    return result


def count_blocks(weights: dict[str, Tensor], stage: str) -> int:
    """How many blocks of two or more convolutions a stage has."""
    block = re.compile(re.escape(stage) + r"\.\d+\.conv2\.weight")
    return sum(block.fullmatch(key) is not None for key in weights)


def wide_resnet(weights: dict[str, Tensor]) -> Found | None:
    """TRADES' WideResNet, of any depth and width, and Huang's with widths and depths by stage."""
    other_acts = "norm1.weight" in weights
    if "stem_conv.weight" in weights:
        weights = renamed(weights, STEM_WIDE)
    stages = ["block1.layer", "block2.layer", "block3.layer"]
    blocks = [count_blocks(weights, stage) for stage in stages]
    if 0 in blocks:
        return None
    channels = [len(weights[f"{stage}.0.conv2.weight"]) for stage in stages]
    options = {"blocks": blocks, "channels": channels, "bias": "fc.bias" in weights}
    width = channels[0] // 16
    name = "wide_resnet"
    if len(set(blocks)) == 1 and channels == [16 * width, 32 * width, 64 * width]:
        name = f"wrn_{6 * blocks[0] + 4}_{width}"
    found = Found(name, nets.wide_resnet, options, weights, {"": {}, "_silu": {"silu": True}})
    if other_acts:
        found.variants["_relu"] = found.variants.pop("")
        found.assumed, found.why = None, "its activation"
    elif not options["bias"]:
        found.variants["_unit"] = {"unit": True}
        found.assumed = None
        found.why = "whether features and weights of its head have length 1 (_unit)"
    return found


def deepmind_wide_resnet(weights: dict[str, Tensor]) -> Found | None:
    """DeepMind's WideResNet, of any depth and width."""
    if "init_conv.weight" not in weights:
        return None
    found = wide_resnet(renamed(weights, DEEPMIND_WIDE))
    return found and deepmind(found)


def deepmind(found: Found) -> Found:
    """The same net padded as DeepMind's, with SiLU as all that are published."""
    found.name = f"dm_{found.name}"
    found.options["same"] = True
    found.variants = {"_silu": {"silu": True}, "_relu": {}}
    found.assumed, found.why, found.pixels = "_silu", "its activation", True
    return found


def resnet(weights: dict[str, Tensor]) -> Found | None:
    """kuangliu's ResNet with as many blocks, or bottlenecks, as there are."""
    blocks = [count_blocks(weights, f"layer{i}") for i in (1, 2, 3, 4)]
    if 0 in blocks or "bn1.weight" not in weights or "fc.weight" in weights:
        return None
    if "layer1.0.conv3.weight" in weights:
        name = f"resnet{3 * sum(blocks) + 2}"
        return Found(name, nets.deep_resnet, {"blocks": blocks}, weights)
    return Found(f"resnet{2 * sum(blocks) + 2}", I.resnet, {"blocks": blocks}, weights)


def preact_resnet(weights: dict[str, Tensor]) -> Found | None:
    """kuangliu's PreActResNet with as many blocks as there are."""
    blocks = [count_blocks(weights, f"layer{i}") for i in (1, 2, 3, 4)]
    if 0 in blocks or "bn1.weight" in weights or "layer1.0.conv3.weight" in weights:
        return None
    options = {"blocks": blocks, "final_bn": "bn.weight" in weights}
    name = f"preact_resnet{2 * sum(blocks) + 2}"
    found = Found(name, nets.preact_resnet, options, weights)
    found.variants = {"": {}, "_early": {"early": True}}
    if not options["final_bn"]:
        found.assumed = None
        found.why = "whether its shortcuts leave before the first activation (_early)"
    return found


def deepmind_preact_resnet(weights: dict[str, Tensor]) -> Found | None:
    """DeepMind's PreActResNet, whose shortcuts are 3x3 convolutions."""
    if "conv_2d.weight" not in weights:
        return None
    found = preact_resnet(renamed(weights, DEEPMIND_PREACT))
    return found and deepmind(found)


def mobilenet_v2(weights: dict[str, Tensor]) -> Found | None:
    """kuangliu's MobileNetV2."""
    if "layers.16.conv3.weight" not in weights:
        return None
    return Found("mobilenet_v2", nets.mobilenet_v2, {}, weights)


def tiny(weights: dict[str, Tensor]) -> Found | None:
    """infoard's tiny, of any width."""
    if "layer3.0.weight" not in weights:
        return None
    width = len(weights["conv1.weight"])
    name = {16: "tiny", 32: "tiny_wide"}.get(width, f"tiny_{width}")
    return Found(name, I.tiny, {"width": width}, weights)


FAMILIES = (
    deepmind_wide_resnet,
    deepmind_preact_resnet,
    wide_resnet,
    resnet,
    preact_resnet,
    mobilenet_v2,
    tiny,
)


def infer_arch(weights: dict[str, Tensor]) -> Found | None:
    """The net that bare weights belong to, if it is of a family."""
    for family in FAMILIES:
        found = family(weights)
        if found is not None:
            return found
    return None


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two dicts hold equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@dataclass
class Choice:
    """A net in a file: its place among the keys that count first, where it lies, in which dict."""

    rank: list[int]
    where: str
    found: Found
    state: dict


def nets_of(state: dict) -> list[tuple[str, Found]]:
    """(prefix, net) of each net that a dict of tensors holds; of equal ones the first."""
    nets_here = []
    for prefix, weights in unwrap(state).items():
        found = infer_arch(weights)
        copies = [other for _, other in nets_here if same_weights(other.weights, weights)]
        if found is not None and not copies:
            nets_here.append((prefix, found))
    return nets_here


def choices_in(file: dict, prefer: str) -> list[Choice]:
    """Every net of a file, those first that lie under keys that count first."""
    order = [prefer, *NESTED]
    choices = []
    for path, state in holders(file):
        rank = [order.index(key) if key in order else len(order) for key in path]
        for prefix, found in nets_of(state):
            where = ".".join([*path, prefix.rstrip(".")]).strip(".")
            choices.append(Choice(rank, where, found, state))
    return sorted(choices, key=lambda choice: choice.rank)


def what_it_holds(file: dict) -> str:
    """In words, of a file that holds no net that is known."""
    places = [".".join(path) or "its top" for path, _ in holders(file)]
    below = f" below {', '.join(map(str, file))[:80]}"
    if places:
        below = f" in {', '.join(places[:8])}"
    keys = [key for _, state in holders(file) for key in state][:4]
    if keys:
        return f"a net unknown here, with keys {', '.join(keys)}{below}"
    return f"no weights with names{below}"


def net_within(file: dict, prefer: str = "") -> tuple[Found, dict, str]:
    """(net, the dict it lies in, where) of a file, however deep; prefer: a key that counts first.

    One line if there is none that is known, or more than one and no telling which.
    """
    choices = choices_in(file, prefer)
    if not choices:
        told = f"holds {what_it_holds(file)}"
        raise I.InfoardError(f"{told}: use robustbench:ID or module:factory")
    best = [choice for choice in choices if choice.rank == choices[0].rank]
    told = f"holds several nets ({', '.join(choice.where for choice in best)})"
    I.require(len(best) == 1, f"{told}: save the state_dict() of the one that is meant")
    first, where = best[0], best[0].where
    others = [choice.where for choice in choices if choice.where != where]
    if others:
        where += f", not {', '.join(others)}"
    return first.found, first.state, where


# ==== 4. Normalisation ============================================================================

# Means and standard deviations of pixels in [0,1], by the names that --teacher-norm knows.
NORMS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # 2x - 1; also SVHN's of Wang2023
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar10_kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
OF_DATA = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn": "half"}
OF_CLASSES = {10: "cifar10", 100: "cifar100", 200: "tinyimagenet"}


def numbers(text: str) -> list[float]:
    """Three numbers, or one that counts for all three channels: "0.5" or "0.49,0.48,0.45"."""
    values = [float(value) for value in text.split(",")]
    return values * 3 if len(values) == 1 else values


def normaliser(norm: str) -> nn.Module:
    """The layer of a name in NORMS, of "image" (each image by its own), or of "m,m,m/s,s,s"."""
    if norm == "image":
        return nets.Standardize()
    if "/" not in norm:
        table = dict(NORMS, image=None)
        return I.Normalize(*I.lookup(table, norm, "normalisation"))
    told = f"--teacher-norm takes a name or m,m,m/s,s,s such as 0.5,0.5,0.5/0.5,0.5,0.5, not {norm}"
    try:
        mean, std = (numbers(part) for part in norm.split("/"))
    except ValueError:
        raise I.InfoardError(told) from None
    I.require(len(mean) == len(std) == 3 and min(std) > 0, told)
    in_range = max(map(abs, mean)) <= 1 and max(std) <= 1
    I.require(in_range, f"{told}: of pixels in [0,1], so divide numbers of 0 to 255 by 255")
    return I.Normalize(mean, std)


def choose_norm(
    found: Found, own: list[Tensor], norm: str, known: zoo.Known, dataset: str, classes: int
) -> tuple[nn.Module, str, bool]:
    """(layer, what is said of it, whether it is a guess): the file's, the one told, by its name."""
    if own:
        told = "" if norm == "none" else ", which counts, not --teacher-norm"
        fits = all(value.numel() in (1, 3) for value in own)
        I.require(fits, "has a normalisation of other than three channels")
        mean, std = (value.float().flatten().expand(3) for value in own)
        return I.Normalize(mean, std), f"normalised as it says itself{told}", False
    if norm != "none":
        return normaliser(norm), f"normalised by {norm}", False
    if known.norm:
        return normaliser(known.norm), f"normalised by {known.norm}, as {known.name} is", False
    if known.name:
        return normaliser("none"), f"pixels as they are, as {known.name} has them", False
    if found.pixels:
        by = OF_DATA.get(dataset) if dataset != "cifar10" else None
        by = by or OF_CLASSES.get(classes, "none")
        told = f"normalised by {by}, as nets of its kind are (if not, --teacher-norm)"
        return normaliser(by), told, True
    return normaliser("none"), "pixels as they are (if not, --teacher-norm)", True


# ==== 5. Loading ==================================================================================


def choose_variant(found: Found, arch: str | None, known: zoo.Known) -> tuple[str, str]:
    """(suffix of its name, what is said of it): the one told, that of its name, the one assumed."""
    names = [found.name + suffix for suffix in found.variants or [""]]
    if arch is not None:
        # A variant may be left out where all files that are known have the same one.
        plain = found.name if found.assumed is not None else None
        I.require(arch in (*names, plain), f"holds a {found.name}, not the {arch} asked for")
        suffix = arch.removeprefix(found.name)
        return suffix if suffix in found.variants else found.assumed, ""
    for suffix in found.variants:
        if suffix and suffix in known.variants:
            return suffix, ""
    if found.assumed is None:
        told = f"holds a {found.name} whose keys do not tell {found.why}"
        raise I.InfoardError(f"{told}: say --teacher-arch {' or '.join(names)}")
    if found.why and not known.name:
        return found.assumed, f" ({' or '.join(names)}: if not, --teacher-arch)"
    return found.assumed, ""


def check_values(weights: dict[str, Tensor]) -> None:
    """One line for weights that are not numbers."""
    for key, value in weights.items():
        finite = not value.is_floating_point() or bool(value.isfinite().all())
        I.require(finite, f"holds NaN or infinity in {key}: its training diverged")


def from_file(
    file: dict,
    arch: str | None,
    size: int,
    norm: str,
    *,
    name: str = "",
    dataset: str = "cifar10",
) -> nn.Module:
    """The net of a file: unwrapped, architecture from its keys, strictly loaded, float32.

    arch: the name it must have, which may say more than keys do (wrn_28_10_silu). size: pixels of
    the images. norm: see normaliser; "none" leaves it to the file, its name and its family. name:
    the file's, by which the models of RobustBench are known. What was inferred is printed.
    """
    known = zoo.recognise(name)
    found, state, where = net_within(file, known.entry)
    weights = found.weights
    check_values(weights)
    head = weights.get("fc.weight", weights.get("linear.weight"))
    I.require(head is not None, f"holds a {found.name} without its last layer, linear or fc")
    classes, features = head.shape
    known = zoo.recognise(name, classes)

    half = arch is not None and arch.endswith("_half")
    suffix, said = choose_variant(found, arch.removesuffix("_half") if half else arch, known)
    options = found.options | found.variants.get(suffix, {})
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        net = found.build(classes, size, **options)
        if half:
            net = nets.halved(net, size)
        fit_head(net, features)
    try:
        net.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:160]
        told = f"looks like a {found.name} and is none"
        raise I.InfoardError(f"{told}, use robustbench:ID or module:factory: {why}") from None
    own = normaliser_of(state)
    net[0], about, net.guessed = choose_norm(found, own, norm, known, dataset, classes)
    if size == 64 and not half:
        about += ", first convolution of stride 1 (if not, --teacher-arch ..._half)"
    elif size > 64:
        stem = "first convolution of stride 2"
        if size >= 128:
            stem += " and a pool after it"
        about += f", {stem} (if not, module:factory)"
    count = sum(p.numel() for p in net.parameters())
    within = f" in {where}" if where else ""
    print(f"{name or 'file'}: {found.name}{suffix}{said}{within}, {count:,} parameters, {about}")
    return net.float()


def fit_head(net: nn.Sequential, features: int) -> None:
    """A last layer of more inputs than channels sees a grid of averages, as after AvgPool(8)."""
    head = net[-1]
    grid = math.isqrt(features // head.in_features)
    told = f"has a last layer of {features} inputs on {head.in_features} channels"
    I.require(features == grid**2 * head.in_features, told)
    if grid > 1:
        net.avgpool = nn.AdaptiveAvgPool2d(grid)
        kind = type(head)
        name = list(dict(net.named_children()))[-1]
        setattr(net, name, kind(features, head.out_features, head.bias is not None))


def load(
    path_or_id: str,
    arch: str | None = None,
    classes: int | None = None,
    size: int = 32,
    norm: str = "none",
    dataset: str = "cifar10",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The net of a file, an https address, robustbench:ID or module:factory, on a device."""
    net = load_any(path_or_id, arch, classes, size, norm, dataset)
    return adapted(net, torch.full((2, 3, size, size), 0.5, device=device))


def load_any(
    path_or_id: str, arch: str | None, classes: int | None, size: int, norm: str, dataset: str
) -> nn.Module:
    """The net of a file, an https address, robustbench:ID or module:factory, as it comes."""
    if path_or_id.startswith(("https://", "http://")):
        path_or_id = download(path_or_id)
    if Path(path_or_id).exists() or ":" not in path_or_id:
        file = read(path_or_id)
        if file.get("format") == "infoard-1":
            if norm != "none":
                print(f"{path_or_id} normalises by itself: --teacher-norm is for files of others")
            net = I.load_own(file, arch)
            about = {"classes": file["classes"], "size": file["size"]}
            net.trained_on = about | file.get("data", {})
            return net
        return from_file(file, arch, size, norm, name=Path(path_or_id).name, dataset=dataset)
    told = f"{path_or_id} normalises by itself: --teacher-norm and --teacher-arch are for files"
    if norm != "none" or arch is not None:
        print(told)
    if path_or_id.startswith("robustbench:"):
        with torch.serialization.safe_globals(harmless()):
            net = zoo.from_robustbench(path_or_id.partition(":")[2], dataset)
        I.require(isinstance(net, nn.Module), f"{type(net)} is no nn.Module")
        return net
    return own.found(path_or_id, classes, size)


class Adapted(nn.Module):
    """A net that wants its images contiguous in memory, or that gives more than its logits."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return first_logits(self.net(x.contiguous()))


def first_logits(output) -> Tensor:
    """The first [B,K] of what a net gives: of a tuple, a list, a dict, or with a field logits."""
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, Tensor) and value.dim() == 2:
                return value
    return output


def adapted(net: nn.Module, x: Tensor) -> nn.Module:
    """The net on the device of x, in channels last if it computes in it, giving logits [B,K]."""
    net = net.to(x.device, memory_format=torch.channels_last).eval()
    try:
        with torch.no_grad():
            output = net(x.to(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        net = Adapted(net.to(memory_format=torch.contiguous_format))
        with torch.no_grad():
            output = net(x)
    if not isinstance(output, Tensor):
        net = Adapted(net)
        with torch.no_grad():
            output = net(x)
    told = "must give logits [B,K]"
    I.require(isinstance(output, Tensor), f"gives a {type(output).__name__}: it {told}")
    I.require(output.dim() == 2, f"gives {list(output.shape)} for {len(x)} images: it {told}")
    I.require(output.isfinite().all(), "gives NaN or infinity for a grey image")
    return net


# ==== 6. Judging ==================================================================================


def some(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n of the samples, evenly spread over them."""
    rows = torch.linspace(0, len(x) - 1, min(n, len(x))).long()
    return x[rows], y[rows]


def under_attack(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(share right on x and x', entropy of the predictions on x' in nats): PGD-10 at 8/255."""
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    right = entropy = 0.0
    for begin in range(0, len(x), 50):
        images = I.to_float(x[begin : begin + 50], device)
        labels = y[begin : begin + 50].to(device)
        x_adv = I.pgd_ce(
            net, images, labels, eps=8 / 255, alpha=2 / 255, steps=10, generator=generator
        )
        p = I.predict(net, x_adv).softmax(1)
        stays = (p.argmax(1) == labels) & (I.predict(net, images).argmax(1) == labels)
        right += stays.sum().item()
        entropy += torch.special.entr(p).sum().item()
    return right / len(x), entropy / len(x)


def best_norm(net: nn.Module, x: Tensor, y: Tensor) -> tuple[str, float, float]:
    """(the normalisation with which a net is best, its accuracy, that as it is), in per cent."""
    as_it_is, device = net[0], next(net.parameters()).device
    now = I.percent(I.correct(net, x, y))
    best = "", now
    try:
        for name in [*NORMS, "image"]:
            net[0] = normaliser(name).to(device)
            accuracy = I.percent(I.correct(net, x, y))
            if accuracy > best[1]:
                best = name, accuracy
    finally:
        net[0] = as_it_is
    return *best, now


def training_of(name: str) -> str:
    """What a checkpoint of our own says of its training."""
    cfg = read(name).get("config", {})
    images = cfg.get("subset") or "all"
    told = f"epochs: {cfg.get('epochs')}, images: {images}"
    return f", trained here by {cfg.get('framework')} ({told})"


def judge(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    classes: int,
    weak: bool,
    by: str = "--teacher-norm",
) -> str:
    """What is to be said beside the clean accuracy of a teacher; stops where its pixels are wrong.

    by: the option that tells its normalisation.

    That another normalisation than the one taken is right shows in its accuracy, which is tried
    where the file does not tell it, or where the net is near chance.
    """
    said, why = zoo.published(name, classes), f"a wrong file or {by}"
    if name.startswith("runs/teachers/"):
        said, why = training_of(name), "too few epochs or images"
    guessed = getattr(net, "guessed", None)  # None: no file of a stranger
    if guessed or (weak and guessed is not None):
        norm, best, now = best_norm(net, *some(x, y, 100))
        fits = f"{best} with {by} {norm}, {now} as it is, on 100 images"
        told = f"teacher {name} has clean accuracy {fits}: say which one is meant"
        I.require(best < now + 5, f"{told} (as it is: {by} 0/1)")
        why = "a wrong file, as no known normalisation helps"
    if weak:
        return f"{said}: {why}"
    small = sum(p.numel() for p in net.parameters()) < 1_000_000
    on_gpu = next(net.parameters()).is_cuda
    if on_gpu:
        n = 500
    elif small:
        n = 100
    else:
        n = 50
    x, y = some(x, y, n)
    robust, entropy = under_attack(net, x, y)
    told = f"; {100 * robust:.1f} under PGD-10 on {len(x)} of them, where its entropy is"
    return f"{said}{told} {entropy:.2f} of {math.log(classes):.2f} nats"


# ==== 7. Export ===================================================================================


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def export_onnx(net: nn.Module, path: str, size: int) -> None:
    """ONNX of a net for batches of any length, of images of so many pixels."""
    images = torch.zeros(1, 3, size, size)
    names = {"input_names": ["x"], "output_names": ["logits"], "dynamic_axes": {"x": {0: "B"}}}
    torch.onnx.export(net, (images,), path, dynamo=False, **names)


def exported(net: nn.Module) -> dict[str, Tensor]:
    """The weights of a net, and beside them mean and std of its pixels, where it has these."""
    tensors = net.state_dict()
    first = next(net.children(), None)
    if isinstance(first, I.Normalize) and (first.mean.any() or (first.std != 1).any()):
        tensors |= {"mean": first.mean.flatten(), "std": first.std.flatten()}
    return tensors


def how_to_load(path: str, file: dict, net: nn.Module) -> str:
    """The Python that loads the weights at path, which were exported from net, or from a file."""
    if file.get("format") != "infoard-1":
        by_itself = isinstance(next(net.children(), None), nets.Standardize)
        norm = ", norm='image'" if by_itself else ""
        return f"infoard.load_teacher({path!r}{norm})"
    classes = len(file["classes"]) or len([*net.state_dict().values()][-1])
    made = f"infoard.build_model({file['config']['student']!r}, {classes}, {file['size']})"
    return f"net = {made}; net.load_state_dict(torch.load({path!r})); net.eval()"


def run_export(path: str) -> None:
    """Write plain weights, and safetensors and ONNX where installed; without critics."""
    file = read(path) if Path(path).exists() else {}
    size = file["size"] if file.get("format") == "infoard-1" else 32
    net = I.load_teacher(path, size=size).to(memory_format=torch.contiguous_format)
    stem = Path(path).with_suffix("")
    tensors = net.state_dict()
    if file.get("format") != "infoard-1":
        tensors = exported(net)
    I.save(Path(f"{stem}.weights.pt"), tensors)
    print(f"{stem}.weights.pt: {sum(p.numel() for p in net.parameters()):,} parameters")

    written = []
    if is_installed("safetensors") and Path(path).suffix != ".safetensors":
        from safetensors.torch import save_file

        written.append(f"{stem}.safetensors")
        own = {name: value.clone().contiguous() for name, value in tensors.items()}
        save_file(own, written[-1])
    if is_installed("onnx"):
        written.append(f"{stem}.onnx")
        export_onnx(net, written[-1], size)
    if written:
        print(f"{', '.join(written)}: x [1, 3, {size}, {size}] in [0,1] -> logits")
    print(f"in Python: {how_to_load(f'{stem}.weights.pt', file, net)}")
