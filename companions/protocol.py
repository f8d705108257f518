"""How a result was measured: of how many images, under which attacks, radii, steps and step sizes.

A result of infoard.evaluate has it under "about":

    n, of      images that were looked at, and how many test images there are
    eps, seed  the L-infinity radius in pixel units of [0,1]; of the attacks' random starts
    attacks    {column: norm, eps, steps, step_size and more}; null: what its author knows

told() says it in words, for the line of a result; caption() for a table.
"""

from collections.abc import Callable

# {column: number of steps, length of one in radii}, for attacks.py and infoard.py.
STEPS = {
    "fgsm": (1, 1.0),
    "pgd_sat": (20, 1 / 4),
    "pgd_trades": (20, 0.003 * 255 / 8),
    "cw": (30, 1 / 4),
    "bim": (10, 1 / 8),
    "mifgsm": (10, 1 / 10),
    "mifgsm_t": (10, 1 / 10),
    "pgd_t": (20, 1 / 4),
    "pgd_l2": (20, 1 / 8),
    "pgd_l2_t": (20, 1 / 8),
}
# What has no fixed step: AutoAttack's parts halve theirs, others draw at random.
OTHERS = {
    "pgd5_cw": {"steps": 20, "step": 1 / 4, "starts": 5, "then": "cw"},
    "apgd-ce": {"steps": 100, "loss": "cross-entropy"},
    "apgd": {"steps": 100, "loss": "ratio of logits to each of 9 classes", "after": "apgd-ce"},
    "fab-t": {"steps": 100, "after": "apgd"},
    "aa": {"queries": 5000, "after": "apgd-ce, apgd, fab-t"},
    "spatial": {"tries": 10},
}
AUTO = ("apgd-ce", "apgd", "fab-t", "aa")  # AutoAttack's parts, in L-infinity; in L2: ..._l2


def one_attack(name: str, attack: Callable, eps: float, eps_l2: float) -> dict:
    """Norm, radius, steps and step size of the attack of a column."""
    norm = getattr(attack, "norm", "linf")
    found = {"norm": norm}
    if norm != "none":
        found["eps"] = eps_l2 if norm == "l2" else eps
    if name in STEPS:
        steps, share = STEPS[name]
        return {**found, "steps": steps, "step_size": share * found["eps"]}
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


def as_pixels(value: float) -> str:
    """A radius or a step in [0,1] as 8/255, 0.765/255."""
    return f"{255 * value:.3g}/255"


def length(value: float, norm: str) -> str:
    """A radius or step of a norm: pixels in 255ths, or an L2 length."""
    return as_pixels(value) if norm == "linf" else f"{value:.3g}"


def in_words(name: str, attack: dict) -> str:
    """One attack: pgd_sat 20 x 2/255."""
    if attack.get("step_size") is not None:
        step = length(attack["step_size"], attack["norm"])
        starts = f"{attack['starts']} x " if "starts" in attack else ""
        then = f" then {attack['then']}" if "then" in attack else ""
        return f"{name} {starts}{attack['steps']} x {step}{then}"
    if attack.get("steps"):
        return f"{name} {attack['steps']} steps"
    if "queries" in attack:
        return f"{name} {attack['queries']} queries"
    return name


def of_how_many(about: dict) -> str:
    """500 of 10000, and why not more if nobody has said so."""
    text = f"n {about['n']}"
    if "of" in about:
        text += f" of {about['of']}"
    if about.get("by_default"):
        text += " (so many on a CPU: --eval-subset 0 takes all)"
    return text


def of_attacks(about: dict) -> list[str]:
    """What each attack does, a text for each norm."""
    norms = {}
    for name, attack in about["attacks"].items():
        norms.setdefault((attack["norm"], attack.get("eps")), []).append(in_words(name, attack))
    texts = []
    for (norm, eps), words in norms.items():
        where = "in no ball" if eps is None else f"{norm} eps {length(eps, norm)}"
        texts.append(f"{where}: {', '.join(words)}")
    return texts


def told(about: dict) -> str:
    """The end of the line of a result: images, radii, steps and step sizes."""
    return "  |  ".join([of_how_many(about), *(of_attacks(about) or ["not attacked"])])
