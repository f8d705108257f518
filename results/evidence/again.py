"""Measures README's gain again, from the kept students, without training.

    python results/evidence/again.py --dataset cifar10

Options are those of `infoard.py eval`. The numbers lie in runs/again; a table of them is printed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import infoard as I  # noqa: E402

SAME = "--image-size 16 --eval-subset 0 --attacks clean,fgsm,pgd_sat,cw"


def main(options: list[str]) -> int:
    """Evaluates each student, then compares those with InfoARD with the plain ones, by seed."""
    for file in sorted(Path(__file__).with_name("plugins").glob("students/*.pt")):
        base, cell, seed = file.stem.split("-")
        out = f"runs/again/{base}/{cell}/{seed}"
        code = I.main(["eval", str(file), *SAME.split(), "--out", out, *options])
        if code:
            return code
    return I.main(["compare", "runs/again"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
