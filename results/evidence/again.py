"""Measures README's gain again, from the kept students, without training.

    python results/evidence/again.py --dataset cifar10
    python results/evidence/again.py plugins --dataset cifar10    those of the earlier protocol

Options are those of `infoard.py eval`. The numbers lie in runs/again; a table of them is printed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import infoard as I  # noqa: E402

SAME = "--image-size 16 --eval-subset 0 --attacks clean,fgsm,pgd_sat,cw"
PROTOCOLS = ("tuned", "plugins")


def main(words: list[str]) -> int:
    """Evaluates each student, then compares those with InfoARD with the plain ones, by seed."""
    protocol, options = PROTOCOLS[0], words
    if words and words[0] in PROTOCOLS:
        protocol, *options = words
    for file in sorted(Path(__file__).with_name(protocol).glob("students/*.pt")):
        base, cell, seed = file.stem.split("-")
        out = f"runs/again/{protocol}/{base}/{cell}/{seed}"
        code = I.main(["eval", str(file), *SAME.split(), "--out", out, *options])
        if code:
            return code
    return I.main(["compare", f"runs/again/{protocol}"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
