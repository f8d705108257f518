"""The command line: verbs, their options in groups, and evaluation of any checkpoint.

    python infoard.py --help            the verbs, a line each
    python infoard.py VERB --help       the options that a verb uses
    python infoard.py eval CKPT         any checkpoint, ours or a stranger's, under any attacks

infoard.py hands its command line to run() if companions/ stands beside it; alone, it trains.
"""

import contextlib
import difflib
import inspect
import json
import os
import re
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

import infoard as I
from companions import options
from companions.evaluation import check_teacher, exact_fp32, list_of_images
from companions.identity import of_names, same_classes
from companions.options import program
from companions.own import check_entry, digest

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
OPTIONS = [I.flag_of(f.name) for f in fields(I.Config)]
FOLDER = "train/CLASS/IMAGE and test/CLASS/IMAGE (or val/CLASS/IMAGE) in --data-dir"
TEXTS = {  # of --help, where a line of Config is too short for it
    "dataset": f"one of DATASETS, or your own as module:function; folder: your images, {FOLDER}",
    "student": "one of MODELS, wrn_<depth>_<width>, a net of timm, or module:factory",
    "benchmark": "of RobustBench, which the images of --dataset folder are, for robustbench:ID",
    "teacher": "file, https://..., robustbench:ID or module:factory; default: one is trained, and "
    "kept in runs/teachers",
    "teacher_framework": "how a missing teacher is trained",
    "alpha": "weight alpha of the framework",
    "beta": "weight beta of the framework, or exponent",
    "temperature": "temperature of its soft labels",
    "kl_reduction": "KL summed over classes, or divided by their number as in RSLAD's code on "
    "CIFAR-10",
    "plus": "terms of other methods to add: igdm, saad or saad_c; igdm:5 with another weight",
    "step_size": "of the attack; default: 2/255, or 2.5 eps/steps if eps is out of reach with it",
    "ema": "decay of an average of weights, which then is evaluated in their place; 0: none",
    "seed": "seed of initialisation, order of images, augmentation and attacks",
    "amp": "half precision in training; auto: bf16 where the hardware has it",
    "attacks": "a list with commas of clean, pgd (which is pgd_sat and pgd_trades), ATTACKS, or "
    "your own as module:function; aa is AutoAttack",
    "transfer": "also evaluate attacks made on an undefended net: --teacher-nat, or one is trained",
    "eval_subset": "how many test images; 0: all; default: 500 on a CPU, else all",
    "resume": "go on with the run in --out, or begin it if there is none; options that are not "
    "given are taken from its config.json",
}
TABLES = {  # in texts of Config, for the names of what is there
    "DATASETS": I.DATASETS,
    "FRAMEWORKS": I.FRAMEWORKS,
    "MODELS": I.MODELS,
    "ATTACKS": I.ATTACKS,
    "ASA": I.ASA,
    "BOUNDS": I.BOUNDS,
}
NAMED_BY = {"CKPT": "path", "DIR": "folder"}  # places on the command line, and their arguments
PLACES = {
    "CKPT": "a checkpoint: file, https://..., robustbench:ID or module:factory",
    "DIR": "a folder of finished runs, or one of them",
}
OTHER_PLACES = {
    "figures": "the folder of a finished run",
    "curve": "a folder of cells with finished runs and bench.json",
}


# ==== 1. Evaluation of any checkpoint =============================================================


def is_file(path: str) -> bool:
    """Whether a net is named by a file, in whose path a colon may be, not by module:factory."""
    in_a_file = "/" in path and ".py:" not in path  # even if it is missing
    return in_a_file or ":" not in path or Path(path).exists()


def own_checkpoint(path: str) -> dict:
    """The content of a checkpoint of this program; {} of any other net."""
    if not is_file(path):
        return {}
    from companions.checkpoints import read

    file = read(path)
    return file if file.get("format") == "infoard-1" else {}


def settings(path: str, given: dict) -> dict:
    """The options given, on top of what a checkpoint says of its data.

    Where other data lie it does not say: nothing is downloaded into a folder of images.
    """
    saved = own_checkpoint(path).get("config", {})
    wanted = ("dataset", "data_dir", "image_size", "eps", "eps_l2", "subset", "val_size")
    found = {name: saved[name] for name in wanted if name in saved}
    if given.get("dataset", found.get("dataset")) != found.get("dataset"):
        found.pop("data_dir", None)
    found.update(given)
    I.require("dataset" in found, f"{path} does not say its data: add --dataset")
    return found


CLASSES = {"shapes": 10, "cifar10": 10, "cifar100": 100, "svhn": 10, "tinyimagenet": 200}


def check_number_of_classes(path: str, file: dict, dataset: str) -> None:
    """One line, before anything is downloaded, if a net has not as many classes as a data set."""
    names = file.get("classes", [])
    k = CLASSES.get(dataset)
    if names and k:
        told = f"{path} was trained on {len(names)} classes ({of_names(names)}), {dataset} has {k}"
        I.require(len(names) == k, f"{told}: --dataset names the data that it knows")


def row_name(path: str, file: dict) -> str:
    """What a result is called: of a checkpoint of this program its folder, too."""
    if file:
        return "/".join(Path(path).absolute().parts[-2:])
    return Path(path).name


def about_unfinished(path: str, file: dict) -> list[str]:
    """A line if a checkpoint is the last one of a training that has not ended."""
    at = file.get("at", {})
    epochs = file.get("config", {}).get("epochs") or 0
    epoch = at.get("epoch", epochs)
    if epoch >= epochs:
        return []
    where = f"in epoch {epoch + 1}" if at.get("position") else f"after epoch {epoch}"
    return [f"note: the training of {row_name(path, file)} stopped {where} of {epochs}"]


def keep_evaluation(file: Path, result: dict, path: str, made: dict) -> None:
    """Writes an evaluation, with the checkpoint, its hash, the settings; says what it replaces."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not one of ours
        before = json.loads(file.read_text()).get("checkpoint")
        if before != path:
            print(f"warning: {file} was of {before}, and now is of {path}")
    about = {"checkpoint": path, "checkpoint_sha256": digest(path), "settings": made}
    I.save(file, {**result, **about})
    shown = f"; {options.command('tables', file.parent)} shows it" if file.stem == "eval" else ""
    print(f"in {file}{shown}")


def with_training_images(data: I.Data, cfg: I.Config, file: dict) -> I.Data:
    """The data, with the images that a training learns from in the place of test images.

    A last.pt of this program (file) says which these were; else they are split as ever.
    """
    asked = cfg.dataset
    learned_from = file.get("config", {}).get("dataset", asked)
    I.require(asked == learned_from, f"--training-images: it learned from {learned_from}")
    rows, _ = I.split_training(cfg, data.y_train)
    order = file.get("at", {}).get("order")
    if order is not None:
        rows = order.sort().values
    I.require(rows.max() < len(data.y_train), "--training-images: it learned from other images")
    return replace(data, x_test=data.x_train[rows], y_test=data.y_train[rows])


def source_of(cfg: I.Config, data: I.Data, device: torch.device) -> torch.nn.Module | None:
    """The net that attacks are made on, if that is another one; a poor one is warned of."""
    if not cfg.teacher_nat:
        return None
    path, classes = cfg.teacher_nat, len(data.classes)
    about = {"norm": cfg.teacher_nat_norm, "dataset": cfg.benchmark or cfg.dataset}
    size = data.x_test.shape[-1]
    net = I.load_teacher(path, None, classes, size=size, device=device, **about)
    same_classes(path, net, data)
    images = I.test_images(data, 1000, device)
    try:
        check_teacher(net, *images, path, classes, "--teacher-nat-norm")
    except I.InfoardError as error:
        print(f"warning: {error}")
    return net


def save_list(path: str, data: I.Data, n: int) -> None:
    """Writes which n test images are looked at, a line each."""
    Path(path).write_bytes(list_of_images(data, n).encode(errors="surrogateescape"))
    print(f"{path} lists the {n} test images: index, class, file of a folder")


def add_notes(result: dict, net: torch.nn.Module, data: I.Data, cfg: I.Config) -> None:
    """Adds whether a net is at chance, and through which other net it was attacked."""
    from companions.runs import LEARN_MORE, about_chance

    hint = "are its data, its normalisation and the order of its classes these?"
    if hasattr(net, "trained_on"):  # of our own, which knows all three
        hint = f"train it again: {LEARN_MORE}"
    notes = about_chance(result, data.y_test, hint)
    if cfg.teacher_nat:
        told = f"attacks were made on {cfg.teacher_nat}, and tried on this net"
        notes.append(f"note: {told}: how robust it is, attacks on itself tell")
    result["notes"] += notes


def print_evaluation(name: str, result: dict) -> None:
    """The line of a result, its intervals, and in which arithmetic it was found."""
    I.report(name, result)
    intervals = [f"{name} {low}-{high}" for name, (low, high) in result["ci95"].items()]
    print("95% intervals:", ", ".join(intervals), "(Wilson, over images)")
    print("precision:", result["precision"])


def run_eval(path: str, **given) -> None:
    """Evaluate any checkpoint; --out: keep eval.json there; --teacher-nat: transfer from it."""
    own = given.pop("own", {})
    made = settings(path, given)
    cfg = I.Config(**made)
    for line in options.about_unused(cfg, options.unread_in_evaluation(cfg)):
        print(line)
    device = I.pick_device(cfg.device)
    file = own_checkpoint(path)
    check_number_of_classes(path, file, cfg.dataset)
    about = {"download": cfg.download, "image_size": cfg.image_size}
    data = I.load_dataset(cfg.dataset, cfg.data_dir, **about)
    learned = own.get("training_images", False)
    if learned:
        I.require(not own.get("list"), "--list is of test images: leave out --training-images")
        data = with_training_images(data, cfg, file)
    size = data.x_test.shape[-1]
    for line in options.about_test_images(cfg, len(data.y_test)) + options.about_size(size):
        print(line)

    how = {"norm": cfg.teacher_norm, "dataset": cfg.benchmark or cfg.dataset, "device": device}
    net = I.load_teacher(path, cfg.teacher_arch, len(data.classes), size=size, **how)
    same_classes(path, net, data)
    if own.get("list"):
        _, y = I.test_images(data, cfg.eval_subset, device)
        save_list(own["list"], data, len(y))
    source = source_of(cfg, data, device)
    with exact_fp32(own.get("exact", False)):
        result = I.evaluated(cfg, net, data, device, seed=cfg.seed, source=source)

    result["notes"] += about_unfinished(path, file)
    add_notes(result, net, data, cfg)
    if learned:
        result["notes"].append("note: on training images; how robust it is, test images tell")
        rule = "of those that training learns from, balanced over classes"
        result["about"]["images"] = {"rule": rule}
    print_evaluation(row_name(path, file), result)
    if cfg.out:
        kept = "training.json" if learned else "eval.json"  # the tables read eval.json
        keep_evaluation(Path(cfg.out, kept), result, path, made)


run_eval.takes = (
    "dataset data_dir download image_size benchmark teacher_arch teacher_norm teacher_nat "
    "teacher_nat_norm attacks eps_l2 eval_subset eval_batch eps seed device out progress"
).split()
run_eval.options = {
    "exact": (False, "fp32 proper, without CUDA's TF32 in convolutions"),
    "list": ("", "file to list the test images in that are looked at"),
    "training_images": (False, "look at images that it learned from: what test images lack of it"),
}


# ==== 2. Verbs ====================================================================================


VERBS = {  # each: what does it, in a line, an example
    "train": (
        "infoard:train",
        "teacher, student, evaluation: what is done without a verb",
        "--dataset cifar10 --framework adaad --teacher robust.pt",
    ),
    "demo": (
        "companions.demo:run_demo",
        "what distillation and InfoARD give, on built-in images: minutes",
        "--seed 1",
    ),
    "eval": (
        "companions.cli:run_eval",
        "any checkpoint under any attacks",
        "net.pt --dataset cifar10 --attacks clean,pgd,aa",
    ),
    "tables": (
        "companions.tables:run_tables",
        "the runs below a folder, as Markdown and LaTeX",
        "runs",
    ),
    "compare": (
        "companions.tables:run_compare",
        "what they gain on those called plain beside them, paired by seed",
        "runs",
    ),
    "curve": ("companions.tables:run_curve", "what accuracy costs what time", "runs/lite"),
    "figures": (
        "companions.figures:run_figures",
        "a finished run as PNG and PDF",
        "runs/shapes-tiny-rslad-s0",
    ),
    "attention": (
        "companions.figures:run_attention",
        "where runs look, beside their teachers",
        "runs --eval-subset 500",
    ),
    "export": (
        "companions.checkpoints:run_export",
        "plain weights, safetensors, ONNX",
        "runs/shapes-tiny-rslad-s0/best.pt",
    ),
    "bench": (
        "companions.bench:run_bench",
        "what a training step costs",
        "--framework rslad,adaad",
    ),
    "effects": (
        "companions.bench:run_effects",
        "the same without what makes it fast",
        "--framework rslad",
    ),
    "growth": (
        "companions.bench:run_growth",
        "the same at other batch sizes and steps",
        "--framework rslad",
    ),
    "gpu": ("companions.gpu:run_gpu", "a machine with CUDA tried in ten minutes", "--minutes 10"),
    "mi": (
        "companions.namid:run_mi",
        "natural and adversarial information of a checkpoint",
        "runs/shapes-tiny-rslad-s0/best.pt",
    ),
}
# What no step that is timed depends on: bench has random images and an untrained teacher.
UNTIMED = (
    "data_dir download subset val_size benchmark extra extra_share teacher teacher_norm "
    "teacher_nat teacher_nat_norm teacher_framework teacher_epochs epochs schedule swa attacks "
    "eps_l2 transfer eval_subset eval_batch resume figures progress"
).split()

DESCRIPTIONS = {  # of --help, where the words of the function are for Python
    "train": "The whole job: data, a teacher if none is named, the student, its evaluation under "
    "attacks; all files in --out. Stopped by Ctrl-C or SIGTERM it goes on with --resume --out DIR.",
    "eval": "Evaluate any checkpoint on test images, clean and under attacks, with intervals and "
    "warnings.",
}
OF_FILE = "; default: what the checkpoint says, else"
TIMED = {
    "dataset": "whose usual nets and settings: shapes, or any other; default: cifar10",
    "framework": "one of FRAMEWORKS; default: rslad",
    "batch_size": "images per step, of all ranks together; default: 32 on a CPU, else 128",
    "out": "folder for bench.json; default: runs/bench",
}
OF_RUN = "; default: what each run says"
OTHER_TEXTS = {  # of --help, where a setting means something else than in train
    "eval": {
        "dataset": f"one of DATASETS, or your own as module:function; folder: {FOLDER}{OF_FILE} "
        "none",
        "data_dir": f"where the data lie or go: parent, folder or archive{OF_FILE} data",
        "image_size": f"pixels to resize to{OF_FILE} as they are",
        "eps": f"L-infinity radius; write 8/255 or 0.0314{OF_FILE} 8/255",
        "eps_l2": f"L2 radius of the attacks that have one{OF_FILE} 0.5",
        "seed": "seed of the attacks; default: 0",
        "teacher_arch": "the net that the file must hold",
        "teacher_norm": "normalisation of the net: a name such as cifar10, or m,m,m/s,s,s",
        "teacher_nat": "attack this net instead and see what transfers",
        "teacher_nat_norm": "normalisation of that net",
        "out": "folder to keep eval.json in; default: none is written",
    },
    "demo": {
        "epochs": "passes over the training images; default: 8",
        "steps": "attack steps in training; default: 5",
        "eval_subset": "how many test images; 0: all; default: 0",
        "out": "folder; default: runs/demo, of another seed runs/demo-s1",
    },
    "attention": {
        "dataset": f"one of DATASETS, or your own as module:function{OF_RUN}",
        "data_dir": f"where the data lie: parent, folder or archive{OF_RUN}",
        "image_size": f"pixels to resize to{OF_RUN}",
        "eps": f"L-infinity radius of PGD-20{OF_RUN}",
        "teacher": f"a teacher: file, https://..., robustbench:ID, module:factory{OF_RUN}",
        "teacher_arch": "the net that the teacher's file must hold",
        "eval_subset": f"how many test images; 0: all{OF_RUN}",
    },
    "mi": {
        "dataset": f"one of DATASETS, or your own as module:function{OF_FILE} none",
        "data_dir": f"where the data lie or go: parent, folder or archive{OF_FILE} data",
        "image_size": f"pixels to resize to{OF_FILE} as they are",
        "eps": f"L-infinity radius; write 8/255 or 0.0314{OF_FILE} 8/255",
        "teacher_arch": "the net that the file must hold",
        "teacher_norm": "normalisation of the net: a name such as cifar10, or m,m,m/s,s,s",
        "eval_subset": "how many test images; 0: all; default: 1024",
    },
    "gpu": {
        "data_dir": "where CIFAR-10 lies or goes: parent, folder or archive; default: data",
        "device": "cuda, cuda:1, or cpu for a dry run; default: cuda",
        "out": "folder; default: runs/gpu",
    },
    "bench": {**TIMED, "framework": "a list of FRAMEWORKS with commas; default: all"},
    "effects": TIMED,
    "growth": TIMED,
}


def get_verb(name: str) -> Callable:
    """The function of a verb: run(folder), run(path, **options) or run(**options).

    folder and path are named on the command line without a flag; options are those of Config, or
    the ones that the function's attribute `takes` lists.
    """
    known = {verb: target for verb, (target, _, _) in VERBS.items()}
    return I.resolve(known, I.lookup(list(known), name, "verb"), "verb")


def overview() -> str:
    """What --help prints without a verb."""
    about = I.__doc__.partition("\n\n    1 ")[0].replace("python infoard.py", program())
    own = f"{program()} --dataset folder --data-dir images"
    lines = [about, "", f"your own images, in images/train/CLASS and images/test/CLASS:\n    {own}"]
    lines += ["", "verbs, each with its own --help:"]
    for name, (_, text, example) in VERBS.items():
        lines.append(f"    {name:10} {text}")
        lines.append(f"{'':14} {program()} {name} {example}")
    return "\n".join(lines)


def framework_options(argv: list[str]) -> dict:
    """The settings that only the framework has that argv names, or the run that is to be resumed:
    {name: (default, help)}.
    """
    from companions.runs import begun_settings

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--framework", nargs="?")
    parser.add_argument("--out", nargs="?")
    parser.add_argument("--resume", action=BooleanOptionalAction)
    named = vars(parser.parse_known_args(argv)[0])
    name = named["framework"] or begun_settings(named).get("framework")
    if name is None or "," in name:  # bench takes a list
        return {}
    check_entry(name, "--framework")
    return I.get_framework(name).options


FOLLOWS = {  # what others ask for by an option, and what it follows from here
    "--num-classes": "classes come from the data: the names of their folders, or of the data set",
}
FOLLOWS["--classes"] = FOLLOWS["--num-classes"]


def hint(word: str, known: list[str]) -> str:
    """What may have been meant by a word that is not known, or ""."""
    if word in FOLLOWS:
        return FOLLOWS[word]
    if word in OPTIONS and word not in known:
        return "this verb does not use it"
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else ""


def with_nearest(message: str, flags: list[str], argv: list[str]) -> str:
    """A message of argparse, with all options and the value that may have been meant.

    flags: the options there are. argparse itself names unknown ones only if all else is right.
    """
    hints = {}
    word, _, listed = message.partition("invalid choice: ")[2].partition(" (choose from ")
    if listed:
        hints[word] = hint(word.strip("'"), re.findall(r"[\w-]+", listed))
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in flags:
            hints[flag] = hint(flag, flags)
    told = [f"{word}: {text}" for word, text in hints.items() if text]
    if len(hints) == 1:
        told = [text for text in hints.values() if text]
    return f"{message}: {'; '.join(told)}" if told else message


def make_parser(verb: str, text: str, argv: list[str], place: str = "") -> ArgumentParser:
    """A parser that gives the options that were named, and one line for a mistake.

    argv: what it is to parse. place: CKPT or DIR, what the verb takes without a flag.
    """
    parser = ArgumentParser(
        prog=f"{program()} {verb}",
        usage=" ".join(f"%(prog)s {place} [options]".split()),
        description=text,
        epilog=f"example: {program()} {verb} {VERBS[verb][2]}",
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )

    def refuse(message: str) -> None:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        I.require(False, f"{with_nearest(message, flags, argv)} (see --help)")

    parser.error = refuse
    if place:
        text = OTHER_PLACES.get(verb, PLACES[place])
        parser.add_argument(NAMED_BY[place], metavar=place, help=text)
    return parser


def by_framework(name: str) -> str:
    """The default of a setting that frameworks have their own of."""
    values = {}
    for framework in I.FRAMEWORKS:
        value = I.get_framework(framework).defaults.get(name)
        if value is not None:
            values.setdefault(f"{value:.3g}", []).append(framework)
    told = [f"{value} for {', '.join(names)}" for value, names in values.items()]
    if name == "lam_hi":
        told = [f"{options.LAM_HI:g}", *told]
    return f"; default: {'; '.join(told)}"


def in_words(default) -> str:
    """A default as --help says it."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default) or "none"


def usual(f) -> str:
    """What --help says of the default of a field of Config."""
    if f.name in I.IMAGES_DEFAULTS:
        return f"; default: {I.IMAGES_DEFAULTS[f.name]}, for shapes {I.SHAPES_DEFAULTS[f.name]}"
    if f.name in ("lam_hi", "alpha", "beta", "temperature"):
        return by_framework(f.name)
    if f.name == "teacher_framework":
        return "; default: trades"
    if f.default in (None, ""):
        return ""
    if f.type is bool:
        return f"; default: {in_words(f.default)}"
    if f.name in ("eps", "step_size"):
        return f"; default: {255 * f.default:.0f}/255"
    return f"; default: {f.default}"


def add_option(parser, f, text: str = "") -> None:
    """The option of a field of Config; text: of --help, in the place of the field's own."""
    text = text or TEXTS.get(f.name, f.metadata["help"]) + usual(f)
    for name, table in TABLES.items():
        text = text.replace(name, ", ".join(table))
    kind = {"type": f.type, "metavar": f.type.__name__.upper()}
    if f.type is float:
        kind["type"] = I.number
    if f.type is bool:
        kind = {"action": BooleanOptionalAction}
    elif f.metadata["choices"]:
        kind = {"choices": f.metadata["choices"]}
    parser.add_argument(I.flag_of(f.name), help=text, **kind)


def add_options(parser: ArgumentParser, names: list[str], texts: dict[str, str]) -> None:
    """An option for each of these fields of Config, in groups; texts: of --help, by name."""
    titles = GROUPS
    if "epochs" not in names:  # nothing is trained
        titles = GROUPS | {"eps": "evaluation", "epochs": "evaluation"}
    groups = {title: parser.add_argument_group(title) for title in titles.values()}
    for f in fields(I.Config):
        if f.name in titles:
            group = groups[titles[f.name]]
        if f.name in names:
            add_option(group, f, texts.get(f.name, ""))


def used_by(verb: str, function: Callable) -> list[str]:
    """The settings that a verb uses: those that its function lists, or all that matter to it."""
    everything = [f.name for f in fields(I.Config) if f.name != "own"]
    if verb in ("bench", "effects", "growth"):
        everything = [name for name in everything if name not in UNTIMED]
    return getattr(function, "takes", everything)


def check_values(given: dict) -> None:
    """One line for a file or a folder in a place where something else is to be named."""
    for name in ("student", "teacher", "teacher_arch", "dataset", "asa", "mim"):
        check_entry(given.get(name) or "", I.flag_of(name))
    for entry in given.get("attacks", "").split(","):
        check_entry(entry, "attack")
    name = given.get("dataset")
    if name and name not in I.DATASETS:
        told = f"--dataset {name} is a folder: --dataset folder --data-dir {name} takes its images"
        I.require(not Path(name).expanduser().is_dir(), told)


def parse(verb: str, argv: list[str]) -> dict:
    """The options that were given, as keywords of the verb's function."""
    function = get_verb(verb)
    parameters = list(inspect.signature(function).parameters.values())
    places = {name: place for place, name in NAMED_BY.items()}
    text = DESCRIPTIONS.get(verb, function.__doc__)
    parser = make_parser(verb, text, argv, places.get(parameters[0].name, ""))

    own = {}
    if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        add_options(parser, used_by(verb, function), OTHER_TEXTS.get(verb, {}))
        own = getattr(function, "options", None) or framework_options(argv)
        title = "of this verb alone" if hasattr(function, "options") else "of this framework alone"
        group = parser.add_argument_group(title)
        for name, (default, text) in own.items():
            kind = {"type": I.number if isinstance(default, float) else type(default)}
            if isinstance(default, bool):
                kind = {"action": BooleanOptionalAction}
            told = f"{text}; default: {in_words(default)}".replace("%", "%%")
            group.add_argument(I.flag_of(name), help=told, **kind)
    if verb == "train":
        parser.add_argument("--lite", action="store_true", help=f"for small machines: {LITE}")
        if "--lite" in argv:
            argv = [*LITE.split(), *argv]  # what is named besides comes later and wins

    given = vars(parser.parse_args(argv))
    given.pop("lite", None)
    check_values(given)
    path = given.get("path", "")
    told = f"no checkpoint file at {path}, which is a folder: name a file in it, such as best.pt"
    I.require(not path or not Path(path).is_dir(), told)
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


# ==== 3. Ends =====================================================================================


class Terminated(KeyboardInterrupt):
    """SIGTERM: what tidies up after Ctrl-C does so after it, too."""


def terminate(number: int, frame) -> None:
    """What SIGTERM does."""
    raise Terminated


def comes_from(error: BaseException | None, kind: type) -> bool:
    """Whether an error is of a kind, or was raised when one of that kind was being handled."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__context__
    return False


@contextlib.contextmanager
def ended_well() -> Iterator[None]:
    """Inside, SIGTERM ends the program as Ctrl-C does, and whoever reads its output, such as head,
    may stop reading: it then ends without a word.

    What torchrun has started ends at once: it may be waiting for a rank that is gone.
    """
    usual = None
    if "LOCAL_RANK" not in os.environ and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # outside the main thread
            usual = signal.signal(signal.SIGTERM, terminate)
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()  # a reader that is gone is noticed here
    except Terminated as stopped:
        print("infoard: stopped by SIGTERM", *stopped.args, sep=": ", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except BaseException as error:
        if not comes_from(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        if usual is not None:
            signal.signal(signal.SIGTERM, usual)


def run(argv: list[str]) -> None:
    """Does what the command line asks for, on all ranks that torchrun has started."""
    with contextlib.suppress(AttributeError):  # a stream of another kind
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    with ended_well():
        run_verb(argv)


def run_verb(argv: list[str]) -> None:
    """The same, ended by signals and errors of any kind."""
    if argv in (["--help"], ["-h"]):
        print(overview())
        return
    verb = "train"
    if argv and not argv[0].startswith("-"):
        verb, *argv = argv
    given, told = parse(verb, argv), ""
    if verb == "train":
        from companions.runs import completed

        given, told = completed(given)
    if not given.get("progress", True):
        os.environ["TQDM_DISABLE"] = "1"
    joined = contextlib.nullcontext()
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        from companions.ranks import all_ranks

        joined = all_ranks(given.get("device", "auto"))
    with joined:
        if told:
            print(told)
        get_verb(verb)(**fetched(given))
