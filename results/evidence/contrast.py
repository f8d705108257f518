"""One cell less another, paired by seed, with 95% intervals over seeds (Student's t), in points.

    python results/evidence/contrast.py FOLDER CELL OTHER
    python results/evidence/contrast.py FOLDER,FOLDER CELL OTHER    the seeds of both

Of each column that decides: accuracies of the last epoch, and APGD's where it was looked at; of a
folder of looks alone (distance/medium-apgd) theirs.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t


def accuracies(run: Path) -> dict:
    """Those of a run: of its last epoch, with a closer look's as "apgd"; or of a look alone."""
    found = {}
    if (run / "results.json").exists():
        found = json.loads((run / "results.json").read_text())["last"]
    if (run / "eval.json").exists():
        look = json.loads((run / "eval.json").read_text())
        found = look | found | {"apgd": look["apgd"]}
    return found


def pairs(folder: str, cell: str, other: str) -> list[tuple[dict, dict]]:
    """The accuracies of both cells, for each seed that both have."""
    found = []
    for run in sorted(Path(folder, cell).glob("s*")):
        both = accuracies(run), accuracies(Path(folder, other, run.name))
        if all(both):
            found.append(both)
    return found


def main(folders: str, cell: str, other: str) -> None:
    """Prints the contrast of each column that decides."""
    found = [pair for folder in folders.split(",") for pair in pairs(folder, cell, other)]
    for name in ("clean", "pgd_sat", "cw", "worst", "apgd"):
        both = [pair for pair in found if all(one.get(name) is not None for one in pair)]
        gaps = [one[name] - two[name] for one, two in both]
        if len(gaps) < 2:
            continue
        half = t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
        print(f"{name}: {mean(gaps):+.2f} ± {half:.2f}, {len(gaps)} seeds")


if __name__ == "__main__":
    main(*sys.argv[1:])
