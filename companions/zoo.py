"""RobustBench: its models by name, the package, and which of its files load here.

    python infoard.py --teacher robustbench:Chen2021LTD_WRN34_10    its net, by its own code
    python infoard.py --teacher Chen2021LTD_WRN34_10.pt             its file, known by its name
    python -m companions.zoo                                        all entries, tried one by one

    1  names    2  the package    3  the table of all entries

zoo.json holds clean and AutoAttack accuracy in per cent, {data set: {name: [clean, AutoAttack]}},
from model_info/*/Linf of github.com/RobustBench/robustbench (78fcc9e).
"""

import contextlib
import difflib
import importlib.util
import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import infoard as I

# ==== 1. Names ====================================================================================


@dataclass(frozen=True)
class Known:
    """What a name of RobustBench tells that keys do not.

    variants: suffixes of its architecture. norm: for --teacher-norm, where the file has none of
    its own. entry: the key of the file under which its weights lie, if there are several.
    """

    name: str = ""
    variants: tuple[str, ...] = ()
    norm: str = ""
    entry: str = ""


DEEPMIND = (
    "Gowal2020Uncovering Gowal2021Improving Rebuffi2021Fixing Rade2021Helper Pang2022Robustness "
    "Wang2023Better Xu2023Exploring Cui2023Decoupled_WRN-28-10 Bartoldson2024Adversarial"
).split()
DATASETS = {10: "cifar10", 100: "cifar100"}
# CIFAR-100's with all digits, and as Chen2020Efficient rounds it.
LONG100 = (
    "0.5070751592371323,0.48654887331495095,0.4409178433670343"
    "/0.2673342858792401,0.2564384629170883,0.27615047132568404"
)
CHEN100 = "0.5071,0.4867,0.4408/0.2675,0.2565,0.2761"
SPECIAL = {  # (data set, name): what is to be known of it
    ("cifar10", "Andriushchenko2020Understanding"): {"variants": ("_early",), "entry": "last"},
    ("cifar10", "Wong2020Fast"): {"variants": ("_early",), "norm": "cifar10"},
    ("cifar10", "Hendrycks2019Using"): {"norm": "half"},
    ("cifar100", "Hendrycks2019Using"): {"norm": "half"},
    ("cifar10", "Ding2020MMA"): {"norm": "image"},
    ("cifar10", "Pang2020Boosting"): {"variants": ("_unit",), "norm": "cifar10"},
    ("cifar10", "Rice2020Overfitting"): {"norm": "cifar10"},
    ("cifar100", "Rice2020Overfitting"): {"norm": LONG100},
    ("cifar10", "Engstrom2019Robustness"): {"norm": "cifar10_kuangliu"},
    ("cifar10", "Chen2020Efficient"): {"norm": "cifar10"},
    ("cifar100", "Chen2020Efficient"): {"norm": CHEN100},
    ("cifar100", "Wu2020Adversarial"): {"norm": LONG100},
    ("cifar10", "Huang2022Revisiting_WRN-A4"): {"variants": ("_silu",), "norm": "cifar10"},
}


@cache
def accuracies() -> dict[str, dict[str, list[float]]]:
    """{data set: {name: [clean, AutoAttack]}} in per cent."""
    return json.loads(Path(__file__).with_name("zoo.json").read_text())


def plain(name: str) -> str:
    """A name without the differences that file names have."""
    return name.lower().replace("-", "_")


def recognise(file: str, classes: int | None = None) -> Known:
    """What is known of a file that is called as RobustBench or DeepMind calls it."""
    stem = plain(Path(file).stem)
    if re.match(r"cifar100?_linf_(wrn|resnet18)", stem):
        return Known("DeepMind", ("_silu",), DATASETS.get(classes, ""))
    stem = re.sub(r"(^|_)(cifar_?100?|linf)(?=_|$)", "", stem).strip("_")
    for dataset in [DATASETS.get(classes)] if classes else accuracies():
        for name in accuracies().get(dataset, {}):
            if plain(name) == stem:
                if name.startswith(tuple(DEEPMIND)):
                    return Known(name, ("_silu",), dataset)
                return Known(name, **SPECIAL.get((dataset, name), {}))
    return Known()


def published(name: str, classes: int) -> str:
    """ ", published 85.21 and 56.94 under AutoAttack", if a part of this name is RobustBench's."""
    rows = accuracies().get(DATASETS.get(classes), {})
    for known in sorted(rows, key=len, reverse=True):
        whole = plain(Path(name.removeprefix("robustbench:")).stem) == plain(known)
        if whole or (re.search(r"\d{4}", known) and plain(known) in plain(name)):
            return ", published {:.2f} and {:.2f} under AutoAttack".format(*rows[known])
    return ""


# ==== 2. The package ==============================================================================

INSTALL = "pip install robustbench, or what it lacks: pip install"


def is_there(module: str) -> bool:
    """Whether a module can be imported."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def not_here(*args, **options) -> None:
    """What is called in the place of a function of a module that is missing."""
    raise ImportError("a stand-in was called")


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Names that robustbench imports and that current packages lack, only while it is imported.

    It wants autoattack, which the package index has as pyautoattack, and pkg_resources, which
    setuptools has no more; neither is needed for loading a net.
    """
    made = {}
    if not is_there("autoattack"):
        made["autoattack"] = ModuleType("autoattack")
        made["autoattack"].AutoAttack = not_here
        made["autoattack.state"] = ModuleType("autoattack.state")
        made["autoattack.state"].EvaluationState = not_here
    if not is_there("pkg_resources"):
        made["pkg_resources"] = ModuleType("pkg_resources")
        for name in ("get_distribution", "parse_version", "resource_filename"):
            setattr(made["pkg_resources"], name, not_here)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)


def from_robustbench(name: str, dataset: str) -> nn.Module:
    """A net of RobustBench's L-infinity models by its name there; asks for the package."""
    known = ("cifar10", "cifar100", "imagenet")
    told = f"RobustBench has no models for {dataset}: say which benchmark the data are"
    I.require(dataset in known, f"{told}, --benchmark {' or '.join(known)}")
    try:
        with stand_ins():
            from robustbench.utils import load_model
        return load_model(name, dataset=dataset, threat_model="Linf")
    except ImportError as error:
        raise I.InfoardError(f"needs the package {error.name}: {INSTALL} {error.name}") from None
    except KeyError:
        near = difflib.get_close_matches(name, accuracies().get(dataset, {}), 4, 0.3)
        told = f"is no L-infinity model of RobustBench for {dataset}"
        raise I.InfoardError(f"{told} (near: {', '.join(near)})") from None


# ==== 3. The table of all entries =================================================================

HEAD = """# RobustBench's L-infinity models as files

Made by `python -m companions.zoo` with robustbench {version}. Each net is built by RobustBench's
own code with random weights and random batch-norm statistics, its state dict is saved, loaded by
`companions/checkpoints.py` and asked for the logits of the same images. *equal*: they differ by at
most 1e-3 of their spread over images. *by its name*: the file is called as RobustBench calls it;
where its mean and standard deviation lie in the state dict, it is tried without them, too (files
in the wild lack them). *as t.pt*: under a name that says nothing. *differs, said*: pixels are
taken as they are, and the line that is printed says so. What is refused loads by
`--teacher robustbench:ID`.

"""


def randomised(net: nn.Module) -> nn.Module:
    """The net in eval mode, with statistics and offsets of batch norm that matter."""
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2, generator=g)
            m.running_var.uniform_(0.5, 1.5, generator=g)
            m.weight.data.uniform_(0.5, 1.5, generator=g)
            m.bias.data.normal_(0, 0.2, generator=g)
    return net.eval().requires_grad_(False)


def compare(path: Path, weights: dict, x: Tensor, expected: Tensor, dataset: str) -> str:
    """ "equal", "differs", or the line that refuses a file of these weights."""
    from companions import checkpoints

    torch.save(weights, path)
    try:
        net = checkpoints.load(str(path), None, None, x.shape[-1], "none", dataset)
        logits = net.eval()(x)
    except I.InfoardError as error:
        told = str(error).split(" whose keys do not tell ")[-1]
        return textwrap.shorten(told, 160, placeholder=" ...")
    finally:
        path.unlink()
    spread = (expected - expected.mean(0)).abs().max()
    if (logits - expected).abs().max() < 1e-3 * spread:
        return "equal"
    return "differs, said" if net.guessed else "DIFFERS"


def try_entry(name: str, entry: dict, folder: Path, dataset: str) -> tuple[str, str]:
    """What becomes of a model's file: by its name, and as t.pt."""
    if not isinstance(entry["gdrive_id"], str):
        return "only via robustbench (several files, or timm's)", ""
    torch.manual_seed(0)
    try:
        net = randomised(entry["model"]())
    except Exception as error:  # whatever foreign code raises
        return f"cannot be built without its files: {type(error).__name__}", ""
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
    weights = net.state_dict()
    del net
    named = compare(folder / f"{name}.pt", weights, x, expected, dataset)
    bare = {key: value for key, value in weights.items() if key not in ("mu", "sigma")}
    if named == "equal" and len(bare) < len(weights):
        named = compare(folder / f"{name}.pt", bare, x, expected, dataset)
    return named, compare(folder / "t.pt", weights, x, expected, dataset)


def main(folder: str = "results/zoo") -> None:
    """Tries all entries and writes their table."""
    with stand_ins():
        import robustbench.model_zoo  # noqa: F401
        from robustbench.utils import all_models
    from importlib.metadata import version

    text = [HEAD.format(version=version("robustbench"))]
    for dataset, models in list(all_models.items())[:2]:
        rows = []
        (entries,) = (entry for threat, entry in models.items() if threat.value == "Linf")
        for name, entry in entries.items():
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                with tempfile.TemporaryDirectory() as there:
                    row = (name, *try_entry(name, entry, Path(there), dataset.value))
            rows.append(row)
            print(dataset.value, *row, sep="  ", flush=True)
        count = sum(row[1] == "equal" for row in rows)
        text.append(
            f"## {dataset.value}: {count} of {len(rows)} load by name with equal logits\n\n"
        )
        text.append("| model | by its name | as t.pt |\n|---|---|---|\n")
        text.extend(f"| {' | '.join(row)} |\n" for row in rows)
        text.append("\n")
    I.save(Path(folder, "README.md"), "".join(text).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
