"""The demo: the same small student undefended, distilled, and distilled with InfoARD.

    python infoard.py demo

On the built-in images, with a teacher that is trained first: minutes on two cores, and nothing is
downloaded. The base is AdaAD, since it is there that larger radii cost no clean accuracy. Stopped
and started again, it goes on.
"""

from pathlib import Path

import infoard as I
from companions import tables

SAME = {"eval_subset": 0, "attacks": "clean,pgd,cw", "resume": True, "figures": False}
STUDENTS = {  # folder: what it is called, and its settings
    "undefended": ("undefended", {"framework": "natural"}),
    "plain": ("AdaAD", {"framework": "adaad", "infoard": False}),
    "infoard": ("AdaAD + InfoARD", {"framework": "adaad", "figures": True}),
}
COLUMNS = {"clean": "clean (%)", "pgd_sat": "PGD-20", "cw": "CW", "worst": "worst of these"}
CAVEAT = """\
One seed: the intervals are over test images alone, and seeds differ by more (results/demo). What is
gained comes from attacks in training of up to twice the radius that is evaluated; that it matters
which image they go to was not shown (results/evidence). No number here is the paper's."""


def demo_table(results: dict[str, dict]) -> list[list[str]]:
    """A header and a line for each student, from {name: result of evaluate}."""
    lines = [["same student, data, epochs", *COLUMNS.values(), "95% interval", "n"]]
    for name, result in results.items():
        accuracies = [f"{result[column]:.1f}" for column in COLUMNS]
        low, high = result["ci95"]["worst"]
        lines.append([name, *accuracies, f"{low:.1f} to {high:.1f}", str(result["n"])])
    return lines


def run_demo(**given) -> None:
    """Trains a teacher and three students on the built-in images, offline, and prints what plain
    distillation and InfoARD give: minutes on two cores."""
    usual = f"runs/demo-s{given['seed']}" if given.get("seed") else "runs/demo"
    out = given.pop("out", usual)
    results = {}
    for folder, (name, settings) in STUDENTS.items():
        made = {**SAME, **settings, **given, "out": str(Path(out, folder))}
        print(f"\n{name}:")
        results[name] = I.train(**made)["best"]

    radius = f"{255 * given.get('eps', I.Config.eps):.4g}/255"
    text = tables.markdown(demo_table(results))
    print(f"\n{text}\n\nattacks: L-infinity, radius {radius}, PGD with steps of 2/255")
    print(CAVEAT)
    print(f"pictures: {out}/infoard/figures")


run_demo.takes = (
    "subset teacher eps steps step_size epochs teacher_epochs batch_size lr seed device amp "
    "eval_subset out progress"
).split()
