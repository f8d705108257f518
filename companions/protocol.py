"""How a result was measured: of how many images, under which attacks, radii, steps, starts, losses.

A result of infoard.evaluate has it under "about":

    n, of      images that were looked at, and how many test images there are
    chosen     how those were chosen
    images     by which rule, and the sha256 of the list that `eval --list FILE` writes
    eps, seed  the L-infinity radius in pixel units of [0,1]; of the attacks' random starts
    attacks    {column: norm, eps, steps, step_size, start, loss and more}; null: what its author
               knows

told() says it in words, for the line of a result; of_attacks() for a table.
"""

from collections.abc import Callable

START = {"uniform": "random start", "none": "no random start"}  # where an attack begins
CE, MARGIN, TARGET = "cross-entropy", "margin", "cross-entropy to another class"

# {column: steps, length of one in radii, start, loss}, for attacks.py and infoard.py.
STEPS = {
    "fgsm": (1, 1.0, "none", CE),
    "pgd_sat": (20, 1 / 4, "uniform", CE),
    "pgd_trades": (20, 0.003 * 255 / 8, "uniform", CE),
    "cw": (30, 1 / 4, "uniform", MARGIN),
    "bim": (10, 1 / 8, "none", CE),
    "mifgsm": (10, 1 / 10, "none", CE),
    "mifgsm_t": (10, 1 / 10, "none", TARGET),
    "pgd_t": (20, 1 / 4, "uniform", TARGET),
    "pgd_l2": (20, 1 / 8, "uniform", MARGIN),
    "pgd_l2_t": (20, 1 / 8, "uniform", TARGET),
}
# What has no fixed step: AutoAttack's parts halve theirs, others draw at random.
OTHERS = {
    "pgd5_cw": {
        "steps": 20,
        "step": 1 / 4,
        "starts": 5,
        "then": "cw",
        "start": "uniform",
        "loss": CE,
    },
    "apgd-ce": {"steps": 100, "start": "uniform", "loss": CE},
    "apgd": {
        "steps": 100,
        "start": "uniform",
        "loss": "ratio of logits to each of 9 classes",
        "after": "apgd-ce",
    },
    "fab-t": {"steps": 100, "start": "none", "loss": "distance to the boundary", "after": "apgd"},
    "aa": {"queries": 5000, "start": "uniform", "loss": MARGIN, "after": "apgd-ce, apgd, fab-t"},
    "spatial": {"tries": 10},
}
AUTO = ("apgd-ce", "apgd", "fab-t", "aa")  # AutoAttack's parts, in L-infinity; in L2: ..._l2


def one_attack(name: str, attack: Callable, eps: float, eps_l2: float) -> dict:
    """Norm, radius, steps, step size, start and loss of the attack of a column."""
    norm = getattr(attack, "norm", "linf")
    found = {"norm": norm}
    if norm != "none":
        found["eps"] = eps_l2 if norm == "l2" else eps
    if name in STEPS:
        steps, share, start, loss = STEPS[name]
        step_size = share * found["eps"]
        return {**found, "steps": steps, "step_size": step_size, "start": start, "loss": loss}
    known = dict(OTHERS.get(name.removesuffix("_l2"), {}))
    if "step" in known:
        known["step_size"] = known.pop("step") * found["eps"]
    if not known and norm != "none":
        known = {"steps": getattr(attack, "steps", None), "step_size": None}
    return {**found, **known}


def protocol(attacks: dict[str, Callable], n: int, eps: float, eps_l2: float, seed: int) -> dict:
    """What stands under "about"."""
    each = {name: one_attack(name, attack, eps, eps_l2) for name, attack in attacks.items()}
    return {"n": n, "eps": eps, "seed": seed, "attacks": each}


# ==== In words ====================================================================================


def is_exact(text: str, value: float) -> bool:
    """Whether a number in words, 8/255 or 0.003, is the value but for rounding of floats."""
    above, _, below = text.partition("/")
    return abs(float(above) / float(below or 1) - value) < 1e-9


def digits(text: str) -> int:
    """How many digits a number in words has, zeros at its head and /255 apart."""
    return len(text.removesuffix("/255").lstrip("0.").replace(".", ""))


def as_pixels(value: float) -> str:
    """A radius or a step in [0,1] as people write it: 8/255, 0.003; 0.383/255 if it is neither.

    The exact one is taken, of two that are exact the one of fewer digits.
    """
    in_255ths = f"{255 * value:.3g}/255"
    texts = [f"{value:.3g}", in_255ths]
    exact = [text for text in texts if is_exact(text, value)]
    return min(exact, key=digits, default=in_255ths)


def length(value: float, norm: str) -> str:
    """A radius or step of a norm: of a pixel, or an L2 length."""
    return as_pixels(value) if norm == "linf" else f"{value:.3g}"


def steps_in_words(attack: dict, times: str = " x ") -> str:
    """What an attack does: 20 x 2/255, 100 steps, 5000 queries; times: 20 steps of 2/255."""
    if attack.get("step_size") is not None:
        step = length(attack["step_size"], attack["norm"])
        starts = f"{attack['starts']} x " if "starts" in attack else ""
        then = f" then {attack['then']}" if "then" in attack else ""
        return f"{starts}{attack['steps']}{times}{step}{then}"
    if attack.get("steps"):
        return f"{attack['steps']} steps"
    if "queries" in attack:
        return f"{attack['queries']} queries"
    return ""


def in_words(name: str, attack: dict) -> str:
    """One attack in a line of a result: pgd_sat 20 x 2/255."""
    return f"{name} {steps_in_words(attack)}".strip()


def in_full(name: str, attack: dict) -> str:
    """One attack in a table's caption: pgd_sat (20 steps of 2/255)."""
    steps = steps_in_words(attack, " step of " if attack.get("steps") == 1 else " steps of ")
    return f"{name} ({steps})" if steps else name


def of_how_many(about: dict) -> str:
    """500 of 10000, how they were chosen, and why not more if nobody has said so."""
    text = f"n {about['n']}"
    if "of" in about:
        text += f" of {about['of']}"
    if "chosen" in about:
        text += f", {about['chosen']}"
    if about.get("by_default"):
        text += " (so many on a CPU: --eval-subset 0 takes all)"
    return text


def in_ball(norm: str, eps: float | None) -> str:
    """Where attacks look: linf eps 8/255."""
    return "in no ball" if eps is None else f"{norm} eps {length(eps, norm)}"


def of_attacks(about: dict) -> list[str]:
    """What each attack does, a text for each norm and radius."""
    balls = {}
    for name, attack in about["attacks"].items():
        balls.setdefault((attack["norm"], attack.get("eps")), []).append(in_words(name, attack))
    return [f"{in_ball(*ball)}: {', '.join(words)}" for ball, words in balls.items()]


def of_starts(about: dict) -> str:
    """Losses and starts: cross-entropy, random start: pgd_sat; margin, random start: cw."""
    ways = {}
    for name, attack in about["attacks"].items():
        if attack.get("start") in START:
            ways.setdefault((attack["loss"], START[attack["start"]]), []).append(name)
    return "; ".join(
        f"{loss}, {start}: {', '.join(names)}" for (loss, start), names in ways.items()
    )


def of_masking(looked: dict) -> str:
    """What was looked at for masked gradients: a huge radius, and who survives it."""
    where = f"{looked['attack']} at eps {as_pixels(looked['eps'])}, which nothing should survive"
    if "alive" not in looked:  # of an earlier version, which did not keep of how many
        right = f"{looked['survive']}% of right images are still right"
    else:
        right = f"{looked['alive']} of {looked['of']} right images are still right"
    if looked.get("left_out") is not None:
        name = looked.get("left_out_name", looked["left_out"])
        right += f" (the class {name} left out, which has most of them)"
    return f"looked for masked gradients: under {where}, {right}"


def told(about: dict) -> str:
    """The end of the line of a result: images, radii, steps and step sizes."""
    return "  |  ".join([of_how_many(about), *(of_attacks(about) or ["not attacked"])])
