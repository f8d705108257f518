"""The command line: verbs, their options in groups, and evaluation of any checkpoint.

    python infoard.py --help            the verbs, a line each
    python infoard.py VERB --help       the options that a verb uses
    python infoard.py eval CKPT         any checkpoint, ours or a stranger's, under any attacks

infoard.py hands its command line to run() if companions/ stands beside it; alone, it trains.
"""

import contextlib
import inspect
import os
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch.distributed as dist

import infoard as I

LITE = "--student tiny --teacher-arch tiny_wide --steps 3 --steps-lo 1 --step-size 4/255"
GROUPS = {  # the first option of each group of --help
    "dataset": "data",
    "student": "nets",
    "framework": "framework",
    "infoard": "InfoARD",
    "eps": "attack in training",
    "epochs": "training",
    "device": "machine",
    "attacks": "evaluation",
    "out": "files",
}


# ==== 1. Evaluation of any checkpoint =============================================================


def is_file(path: str) -> bool:
    """Whether a net is named by a file, in whose path a colon may be, not by module:factory."""
    in_a_file = "/" in path and ".py:" not in path  # even if it is missing
    return in_a_file or ":" not in path or Path(path).exists()


def settings(path: str, given: dict) -> dict:
    """The options given, on top of what a checkpoint says of its data."""
    saved = {}
    if is_file(path):
        from companions.checkpoints import read

        file = read(path)
        if file.get("format") == "infoard-1":
            saved = file["config"]
    wanted = ("dataset", "data_dir", "image_size", "eps", "eps_l2", "subset", "val_size")
    found = {name: saved[name] for name in wanted if name in saved}
    found.update(given)
    I.require("dataset" in found, f"{path} does not say its data: add --dataset")
    return found


def stoppable(cfg: I.Config, *args, **options) -> dict:
    """infoard.evaluated, which says when it is stopped what is kept of it."""
    try:
        return I.evaluated(cfg, *args, keep=cfg.out, **options)
    except KeyboardInterrupt:
        kept = "add --out DIR, and the next one keeps the attacks that have ended"
        if cfg.out:
            kept = f"the attacks that have ended are in {cfg.out}, the same command goes on"
        print(f"stopped: {kept}")
        raise


def run_eval(path: str, **given) -> None:
    """Evaluate any checkpoint; --out: keep eval.json there; --teacher-nat: transfer from it."""
    made = settings(path, given)
    cfg = I.Config(**made)
    device = I.pick_device(cfg.device)
    data = I.load_dataset(
        cfg.dataset, cfg.data_dir, download=cfg.download, image_size=cfg.image_size
    )
    size = data.x_test.shape[-1]
    net = I.load_teacher(
        path,
        cfg.teacher_arch,
        len(data.classes),
        size=size,
        norm=cfg.teacher_norm,
        dataset=cfg.benchmark or cfg.dataset,
        device=device,
    )
    from companions.runs import same_classes

    same_classes(path, net, data)
    source = None
    if cfg.teacher_nat:
        source = I.load_teacher(cfg.teacher_nat, size=size, device=device)
    result = stoppable(cfg, net, data, device, seed=cfg.seed, source=source)
    I.report(Path(path).name, result)
    intervals = [f"{name} {low}-{high}" for name, (low, high) in result["ci95"].items()]
    print("95% intervals:", ", ".join(intervals))
    if cfg.out:
        I.save(Path(cfg.out, "eval.json"), {**result, "checkpoint": path, "settings": made})
        if I.world()[0] == 0:
            Path(cfg.out, "evaluated.pt").unlink(missing_ok=True)


run_eval.takes = (
    "dataset data_dir download image_size benchmark teacher_arch teacher_norm teacher_nat attacks "
    "eps_l2 eval_subset eval_batch eps seed device out progress"
).split()


# ==== 2. Verbs ====================================================================================


VERBS = {
    "train": ("infoard:train", "teacher, student, evaluation: what is done without a verb"),
    "eval": ("companions.cli:run_eval", "any checkpoint under any attacks"),
    "tables": ("companions.tables:run_tables", "the runs below DIR, as Markdown and LaTeX"),
    "compare": ("companions.tables:run_compare", "what they gain on the plain ones, paired"),
    "curve": ("companions.tables:run_curve", "what accuracy costs what time"),
    "figures": ("companions.figures:run_figures", "a finished run as PNG and PDF"),
    "attention": ("companions.figures:run_attention", "where runs look, beside their teachers"),
    "export": ("companions.checkpoints:run_export", "plain weights, safetensors, ONNX"),
    "bench": ("companions.bench:run_bench", "what a training step costs"),
    "effects": ("companions.bench:run_effects", "the same without what makes it fast"),
    "growth": ("companions.bench:run_growth", "the same at other batch sizes and steps"),
    "mi": ("companions.namid:run_mi", "natural and adversarial information of a checkpoint"),
}


def get_verb(name: str) -> Callable:
    """The function of a verb: run(folder), run(path, **options) or run(**options).

    folder and path are named on the command line without a flag; options are those of Config, or
    the ones that the function's attribute `takes` lists.
    """
    known = {verb: target for verb, (target, _) in VERBS.items()}
    return I.resolve(known, I.lookup(list(known), name, "verb"), "verb")


def overview() -> str:
    """What --help prints without a verb."""
    about = I.__doc__.partition("\n\n    1 ")[0]
    lines = [f"    {name:10} {text}" for name, (_, text) in VERBS.items()]
    return "\n".join([about, "", "verbs, each with its own --help:", *lines])


def framework_options(argv: list[str]) -> dict:
    """The settings that only the framework named in argv has: {name: (default, help)}."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--framework", nargs="?")
    name = parser.parse_known_args(argv)[0].framework
    if name is None or "," in name:  # bench takes a list
        return {}
    return I.get_framework(name).options


def make_parser(verb: str, text: str) -> ArgumentParser:
    """A parser that gives the options that were named, and one line for a mistake."""
    parser = ArgumentParser(verb, description=text, allow_abbrev=False, argument_default=SUPPRESS)
    parser.error = lambda message: I.require(False, f"{message} (see --help)")
    return parser


def add_option(parser, f) -> None:
    """The option of a field of Config."""
    text, kind = f.metadata["help"], {"type": f.type, "metavar": f.type.__name__.upper()}
    if f.type is float:
        kind["type"] = I.number
    if f.type is bool:
        kind = {"action": BooleanOptionalAction}
    elif f.metadata["choices"]:
        kind = {"choices": f.metadata["choices"]}
    if f.default not in (None, "") and f.type is not bool:
        default = f"{255 * f.default:.0f}/255" if f.name in ("eps", "step_size") else f.default
        text += f"; default: {default}"
    parser.add_argument(I.flag_of(f.name), help=text, **kind)


def add_options(parser: ArgumentParser, names: list[str]) -> None:
    """An option for each of these fields of Config, in groups."""
    group = parser
    for f in fields(I.Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if f.name in names:
            add_option(group, f)


def parse(verb: str, argv: list[str]) -> dict:
    """The options that were given, as keywords of the verb's function."""
    function = get_verb(verb)
    parser = make_parser(f"infoard.py {verb}", function.__doc__)
    parameters = list(inspect.signature(function).parameters.values())
    if parameters[0].name == "path":
        parser.add_argument("path", metavar="CKPT")
    elif parameters[0].name == "folder":
        parser.add_argument("folder", metavar="DIR")

    own = {}
    if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        everything = [f.name for f in fields(I.Config) if f.name != "own"]
        add_options(parser, getattr(function, "takes", everything))
        own = getattr(function, "options", None) or framework_options(argv)
        group = parser.add_argument_group("of this framework alone")
        for name, (default, text) in own.items():
            kind = I.number if isinstance(default, float) else type(default)
            told = f"{text}; default: {default}".replace("%", "%%")
            group.add_argument(I.flag_of(name), type=kind, help=told)
    if verb == "train":
        parser.add_argument("--lite", action="store_true", help=f"for small machines: {LITE}")
        if "--lite" in argv:
            argv = [*LITE.split(), *argv]  # what is named besides comes later and wins

    given = vars(parser.parse_args(argv))
    given.pop("lite", None)
    mine = {name: given.pop(name) for name in own if name in given}
    if mine:
        given["own"] = mine
    return given


def fetched(given: dict) -> dict:
    """The settings with the files of https addresses, of which a run keeps names and hashes, and
    with ~ for the home, which shells leave as it is in --data-dir=~/x.
    """
    from companions.checkpoints import download

    local = {}
    for name, value in given.items():
        if isinstance(value, str) and value.startswith("~"):
            local[name] = os.path.expanduser(value)
    for name in ("teacher", "teacher_nat", "path"):
        if str(given.get(name)).startswith("https://"):
            local[name] = download(given[name])
    return {**given, **local}


def run(argv: list[str]) -> None:
    """Does what the command line asks for, on all ranks that torchrun has started."""
    if argv in (["--help"], ["-h"]):
        print(overview())
        return
    verb = "train"
    if argv and not argv[0].startswith("-"):
        verb, *argv = argv
    given = parse(verb, argv)
    if not given.get("progress", True):
        os.environ["TQDM_DISABLE"] = "1"
    joined = contextlib.nullcontext()
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        from companions.ranks import all_ranks

        joined = all_ranks(given.get("device", "auto"))
    with joined:
        get_verb(verb)(**fetched(given))
