"""One cell less another, paired by seed, with 95% intervals over seeds (Student's t), in points.

python results/evidence/distance/contrast.py FOLDER CELL OTHER
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t


def last(run: Path) -> dict:
    """The accuracies of a run's last epoch."""
    return json.loads((run / "results.json").read_text())["last"]


def main(folder: str, cell: str, other: str) -> None:
    """Prints the contrast of each column that decides."""
    seeds = sorted(file.parent.name for file in Path(folder, cell).glob("*/results.json"))
    seeds = [seed for seed in seeds if Path(folder, other, seed, "results.json").exists()]
    for name in ("clean", "pgd_sat", "cw", "worst"):
        gaps = []
        for seed in seeds:
            gaps.append(
                last(Path(folder, cell, seed))[name] - last(Path(folder, other, seed))[name]
            )
        half = t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
        print(f"{name}: {mean(gaps):+.2f} ± {half:.2f}, {len(gaps)} seeds")


if __name__ == "__main__":
    main(*sys.argv[1:])
