"""What the options of a training ask for and do not get: attacks too short, options nobody reads,
more images than there are, steps enough to learn anything.

teachers.get_nets asks for asks_teacher(); runs.check_possible prints what remarks() finds, and
runs.go_on what about_few() does.

An attack of K steps of size alpha moves a pixel by K alpha at most; if that is less than eps, it
never sees the ball that it is named after. Where --step-size is not given it is 2/255, as in
[RSLAD] and its followers, unless that cannot reach eps: then 2.5 eps/K [Madry], and eps at most.
"""

import contextlib
import math
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import infoard as I

# Weights of frameworks: which of them one reads stands in its defaults.
WEIGHTS = ("alpha", "beta", "temperature")
# Frameworks with the loss alpha A + (1 - alpha) B.
MIXTURES = ("ard", "rslad", "akd", "absld", "adaad")
# What only InfoARD reads, and of that what only its terms, features or strengths do.
OF_INFOARD = "asa lam_lo lam_hi steps_lo mim w_feat w_att w_rel tau taps critic_dim".split()
OF_TERMS = "tau taps critic_dim".split()
OF_STRENGTH = "lam_lo lam_hi steps_lo".split()
OF_TEACHER = "teacher teacher_arch teacher_norm teacher_framework teacher_epochs".split()
OF_ATTACK = "steps step_size".split()
LAM_HI = 1.5  # the usual one, as in Config.resolved


def terms(cfg: I.Config) -> list[str]:
    """Which of InfoARD's terms count: feat, att, rel."""
    weights = {"feat": cfg.w_feat, "att": cfg.w_att, "rel": cfg.w_rel}
    if cfg.mim == "off":
        weights = {"rel": cfg.w_rel}
    return [name for name, weight in weights.items() if weight]


def asks_teacher(cfg: I.Config) -> bool:
    """Whether InfoARD, if it is on, looks at the teacher: for strengths or for its terms."""
    rule = I.resolve(I.ASA, cfg.asa, "--asa")
    needs = getattr(rule, "needs", ("t",)) if rule else ()
    return bool(terms(cfg)) or "t" in needs or "teacher" in needs


def as_pixels(value: float) -> str:
    """A radius or a step in [0,1] as 8/255, 0.77/255."""
    return f"{255 * value:.3g}/255"


def program() -> str:
    """How this program is called from the current folder: the command that pip installs, or python
    and the file.
    """
    if Path(sys.argv[0]).name in ("infoard", "infoard.exe"):
        return "infoard"
    file = os.path.abspath(I.__file__)
    with contextlib.suppress(ValueError):  # on another drive no path leads there from here
        file = min(file, os.path.relpath(file), key=len)
    return f"python {shlex.quote(file)}"


def command(*words) -> str:
    """A command line of this program that can be copied as it is."""
    return f"{program()} {shlex.join(map(str, words))}"


# ==== 1. Attacks that cannot reach eps ============================================================


def about_reach(cfg: I.Config) -> list[str]:
    """A line if the step was chosen to reach eps, or if the steps that were given cannot."""
    reach = cfg.steps * cfg.step_size
    goes = f"{cfg.steps} steps of {as_pixels(cfg.step_size)}"
    if reach < cfg.eps * (1 - 1e-6):  # a rounding below it is not below it
        told = f"warning: {goes} move a pixel by {as_pixels(reach)} at most, not by --eps"
        return [f"{told} {as_pixels(cfg.eps)}: raise --step-size or --steps"]
    usual = 2 / 255
    chosen = cfg.eps * min(1, 2.5 / cfg.steps)
    if cfg.steps * usual < cfg.eps and math.isclose(cfg.step_size, chosen):
        told = f"--step-size {as_pixels(chosen)}, 2.5 eps/steps and eps at most"
        return [f"{told}: {cfg.steps} steps of 2/255 do not reach eps {as_pixels(cfg.eps)}"]
    return []


def about_no_radius(cfg: I.Config) -> list[str]:
    """A line if the radius is zero."""
    if cfg.eps > 0:
        return []
    return ["warning: --eps 0 is no attack: x' is x in training and evaluation (8/255 is usual)"]


# ==== 2. Options that are not used ================================================================


def unread(cfg: I.Config) -> dict[str, list[str]]:
    """{why: names of settings} that this run does not read, whether they were given or not."""
    framework = I.get_framework(cfg.framework)
    settles = framework.settle is not None and not framework.infoard  # a defence with its own nets
    own = ":" in cfg.framework or settles  # it may read what it likes
    found = {}
    if ":" not in cfg.framework:
        weights = [name for name in WEIGHTS if name not in framework.defaults]
        if cfg.framework == "natural":
            weights += OF_ATTACK
        found[f"the framework {cfg.framework}"] = weights
    if not cfg.infoard:
        why = "a run without InfoARD"
        if not framework.infoard:
            why = f"{cfg.framework}, to which InfoARD cannot be added,"
        found[why] = [name for name in OF_INFOARD if name != "critic_dim" or not own]
    else:
        if cfg.asa == "off":
            found["--asa off"] = OF_STRENGTH
        if not terms(cfg):
            found["InfoARD without terms"] = OF_TERMS
        if cfg.mim == "off":
            found["--mim off"] = ["w_att"]
        if not cfg.w_feat:
            found["InfoARD with --w-feat 0"] = ["critic_dim"]
        if cfg.mim == "vid":
            found["--mim vid"] = ["critic_dim"]
    if cfg.augment == "none":
        found["--augment none"] = ["flip"]
    needs = framework.needs
    informed = cfg.plus or cfg.infoard and asks_teacher(cfg)
    if not own and not informed and "teacher" not in needs:
        found["a run that asks no teacher"] = OF_TEACHER
    if not own and "teacher_nat" not in needs and not cfg.transfer:
        found["a run without --transfer that asks no natural net"] = ["teacher_nat"]
    if cfg.teacher and not own:
        found["a run with --teacher"] = ["teacher_framework"]
    return found | unread_in_evaluation(cfg)


def unread_in_evaluation(cfg: I.Config) -> dict[str, list[str]]:
    """The same of the settings that an evaluation has, too."""
    found = {}
    if cfg.dataset == "shapes":
        found["the built-in data: --dataset names others"] = ["data_dir", "image_size"]
    norms = [getattr(attack, "norm", "linf") for attack in I.chosen_attacks(cfg.attacks).values()]
    if "l2" not in norms:
        found[f"--attacks {cfg.attacks}"] = ["eps_l2"]
    if not cfg.teacher_nat:
        found["what is done without --teacher-nat"] = ["teacher_nat_norm"]
    return found


def usual(name: str, cfg: I.Config):
    """The value of a setting that nobody has named, in a run with these settings."""
    default = next(f.default for f in fields(I.Config) if f.name == name)
    filled = {"lam_hi": LAM_HI, "teacher_framework": "trades", "teacher_epochs": cfg.epochs}
    by_data = I.SHAPES_DEFAULTS if cfg.dataset == "shapes" else I.IMAGES_DEFAULTS
    filled.update(by_data)
    filled.update(I.get_framework(cfg.framework).defaults)
    if name == "step_size":
        return I.Config(eps=cfg.eps, steps=cfg.steps, dataset=cfg.dataset).resolved().step_size
    if name == "teacher_arch" and cfg.teacher:
        return None
    return filled.get(name, default) if default is None else default


def about_unused(cfg: I.Config, found: dict[str, list[str]]) -> list[str]:
    """A line for each setting that was given, to another value than the usual one, for nothing."""
    lines = {}
    for why, names in found.items():
        for name in names:
            value = getattr(cfg, name)
            if value != usual(name, cfg) and name not in lines:
                lines[name] = f"warning: {I.flag_of(name)} {value} is not used by {why}"
    return list(lines.values())


def about_mixture(cfg: I.Config) -> list[str]:
    """A line if one of the two terms that alpha weighs is turned into its opposite."""
    if cfg.framework not in MIXTURES or cfg.alpha <= 1:
        return []
    told = f"warning: --alpha {cfg.alpha:g} weighs the other term of {cfg.framework}"
    return [f"{told} by {1 - cfg.alpha:g}, which is climbed: it should lie in [0, 1]"]


def about_nothing(cfg: I.Config) -> list[str]:
    """A line if InfoARD is on and changes nothing."""
    if not cfg.infoard or terms(cfg) or cfg.asa != "off":
        return []
    return [f"InfoARD has no strengths and no terms: this is plain {cfg.framework}"]


def remarks(cfg: I.Config) -> list[str]:
    """All lines, of resolved settings; an undefended net is not attacked."""
    lines = [] if cfg.framework in ("natural", "autoencoder") else about_reach(cfg)
    lines += about_no_radius(cfg) + about_unused(cfg, unread(cfg)) + about_mixture(cfg)
    return lines + about_nothing(cfg)


# ==== 3. Few images ===============================================================================

# A net of 100,000 weights needs as many to leave chance (three classes, 180 images).
FEW_STEPS = 100


def about_test_images(cfg: I.Config, test: int) -> list[str]:
    """A line if more images are to be evaluated than there are for a test."""
    asked = cfg.eval_subset or 0
    if asked <= test:
        return []
    return [f"note: --eval-subset {asked} takes all {test} test images: there are no more"]


def about_steps(cfg: I.Config, train: int, flag: str = "--epochs") -> list[str]:
    """A line if a training has too few steps to learn anything; flag: what says its epochs."""
    pool = min(cfg.subset or train, train)
    n = pool - min(cfg.val_size, pool // 10)
    steps = math.ceil(n / cfg.batch_size) * cfg.epochs
    if steps >= FEW_STEPS:
        return []
    told = f"warning: {steps} steps in all ({n} training images, --batch-size {cfg.batch_size},"
    told += f" {flag} {cfg.epochs}) are too few to learn much"
    smaller = "lower --batch-size to 16 or " if cfg.batch_size > 16 else ""
    return [f"{told}: {smaller}raise {flag}"]


SMALL = 8  # pixels that the nets here, which halve three times, see as one


def about_size(size: int) -> list[str]:
    """A line if images are too small for the nets here."""
    if size >= SMALL:
        return []
    told = f"warning: images of {size} pixels show next to nothing, and nets here halve them three"
    return [f"{told} times: --image-size 32 is usual, 0 leaves images as they are"]


FEW_TO_CHOOSE = 500  # of so many the standard error of a share of a half is above 2 points


def about_choice(cfg: I.Config, train: int, val: int) -> list[str]:
    """A line if `best` is chosen on so few validation images that luck chooses it.

    train, val: how many images are learned from, and how many are kept for the choice.
    """
    column = I.get_framework(cfg.framework).best_by
    if not 0 < val < FEW_TO_CHOOSE or cfg.epochs < 2 or column == "epoch":
        return []
    error = 100 * math.sqrt(0.25 / val)
    told = f"note: best is chosen by {column} on {val} validation images"
    told += f" (standard error: up to {error:.1f} points)"
    most = (train + val) // 10
    if cfg.val_size < most:
        return [f"{told}: raise --val-size (at most {most} here), or report last"]
    return [f"{told}, a tenth of the training images, which is the most: report last"]


def about_few(cfg: I.Config, train: int, test: int) -> list[str]:
    """All lines, for a training with so many images."""
    lines = about_test_images(cfg, test) + about_steps(cfg, train)
    if cfg.subset > train:
        lines.append(f"note: --subset {cfg.subset} takes all {train} training images")
    return lines
