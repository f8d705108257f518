"""One cell less another, paired by seed, with 95% intervals over seeds (Student's t), in points.

    python results/evidence/contrast.py FOLDER CELL OTHER

Of each column that decides: accuracies of the last epoch, and APGD's where it was looked at.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t


def last(run: Path) -> dict:
    """The accuracies of a run's last epoch, with those of a closer look as "apgd"."""
    found = json.loads((run / "results.json").read_text())["last"]
    look = run / "eval.json"
    if look.exists():
        found["apgd"] = json.loads(look.read_text())["apgd"]
    return found


def main(folder: str, cell: str, other: str) -> None:
    """Prints the contrast of each column that decides."""
    seeds = sorted(file.parent.name for file in Path(folder, cell).glob("*/results.json"))
    seeds = [seed for seed in seeds if Path(folder, other, seed, "results.json").exists()]
    for name in ("clean", "pgd_sat", "cw", "worst", "apgd"):
        gaps = []
        for seed in seeds:
            one, two = last(Path(folder, cell, seed)), last(Path(folder, other, seed))
            if one.get(name) is not None and two.get(name) is not None:
                gaps.append(one[name] - two[name])
        if len(gaps) < 2:
            continue
        half = t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
        print(f"{name}: {mean(gaps):+.2f} ± {half:.2f}, {len(gaps)} seeds")


if __name__ == "__main__":
    main(*sys.argv[1:])
