"""The experiments as rows of data, and the runner that works through them.

    python -m companions.recipes cells SCALE [options]        the runs of tables, one a line
    python -m companions.recipes cells evidence [PART]        those of evidence, cells lite of lite
    python -m companions.recipes tables SCALE [options]       frameworks, ablation, NAMID, MID
    python -m companions.recipes evidence [first] [options]   the runs of results/evidence
    python -m companions.recipes evidence gpu [options]       the same question with ResNet-18
    python -m companions.recipes evidence distance [options]  radii by the teacher's own distance
    python -m companions.recipes evidence plugins [options]   InfoARD beside IGDM, SAAD, averages
    python -m companions.recipes evidence wider [options]     a student seven times larger
    python -m companions.recipes evidence wider32 [options]   that student at 32x32 pixels, RSLAD
    python -m companions.recipes evidence tuned [options]     AdaAD at its own rate, and longer
    python -m companions.recipes lite [options]               accuracy against time

From the repository root. SCALE is smoke, cpu, gpu or paper; further options go to every run.
--dry-run says how many runs there are and how long they take, prints them, and begins none. A row
is (name, options): `table_runs`, `evidence_runs`, `first_runs` and `lite_runs` make runs of rows,
and `Runner` works through them. Killed and called again, it goes on.

1. Runs  2. Tables  3. Evidence  4. Lite  5. Cost  6. The runner  7. Experiments  8. Command line
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# ==== 1. Runs =====================================================================================

# A stage begins when all runs of the stages before it have ended.
NEEDED = 0  # these make what all others need: if one fails, nothing else is begun
SHARED = 1  # these make nets that runs beside them would make as well
SHARED_LATER = 2  # these do so, too, and take nets that those before them have made
REST = 3


@dataclass(frozen=True)
class Run:
    """One run of infoard.py: its folder, its options as words, and the stage that it belongs to."""

    out: str
    options: tuple[str, ...]
    stage: int = REST

    @property
    def words(self) -> list[str]:
        return ["--out", self.out, *self.options]


def expand(
    folder: str,
    rows: Iterable[tuple[str, str]],
    *,
    seeds: Iterable[int],
    common: str,
    extra: Sequence[str] = (),
    stage: int = REST,
) -> list[Run]:
    """A run for each seed and row, seed by seed, in folder/name/sSEED; of options that are given
    twice the later one holds: common ones, those of the row, the user's (extra).
    """
    runs = []
    for seed in seeds:
        for name, options in rows:
            words = ["--seed", str(seed), *common.split(), *options.split(), *extra]
            runs.append(Run(f"{folder}/{name}/s{seed}", tuple(words), stage))
    return runs


def lifted(name: str, options: str) -> list[tuple[str, str]]:
    """Two rows, a base plain and with InfoARD."""
    return [(f"{name}/plain", f"{options} --no-infoard"), (f"{name}/infoard", options)]


# ==== 2. Tables ===================================================================================


@dataclass(frozen=True)
class Paper:
    """A framework's own settings. alpha, beta and temperature are infoard.py's defaults, too, but
    for those that a paper chooses anew for each data set.
    """

    framework: str
    options: str
    cifar10: str = ""  # what holds on CIFAR-10 alone: the teacher, and the scale of KL
    cifar100: str = ""
    tinyimagenet: str = ""


ADR_CIFAR10 = "--adr-weight-lo 0.7 --adr-weight-hi 0.95 --adr-tau-lo 2 --adr-tau-hi 2.5"
ADR_CIFAR100 = "--adr-weight-lo 0.7 --adr-weight-hi 0.95 --adr-tau-lo 1 --adr-tau-hi 1.5"
ADR_TINY = (
    "--epochs 80 --schedule 40,60"
    " --adr-weight-lo 0.5 --adr-weight-hi 0.9 --adr-tau-lo 1.5 --adr-tau-hi 2"
)

# --kl-reduction mean is the scale (KL/K) of the code that the CIFAR-10 numbers came from; it makes
# the weight of InfoARD's terms K times larger beside it. Elsewhere KL is summed (on CIFAR-100
# released AdaAD sums, RSLAD and MTARD have a tenth).
PAPERS = [
    # MTARD, ECCV 2022, released code; the teacher is RSLAD's, the epochs of the natural one ours.
    Paper(
        "mtard",
        "--epochs 300 --schedule 215,260,285 --weight-decay 2e-4 --teacher-epochs 100",
        "--kl-reduction mean --teacher robustbench:Zhang2019Theoretically",
    ),
    # PGD-AT as the released code of AdaAD runs it beside its own method.
    Paper("at", "--epochs 110 --schedule 100,105 --weight-decay 5e-4"),
    # TRADES, ICML 2019, released code: 76 epochs, counted from 1, with a drop before the 75th.
    Paper("trades", "--epochs 76 --schedule 74 --weight-decay 2e-4 --beta 6"),
    # ARD, AAAI 2020, released code, whose second drop (150) sets the rate of the first one again.
    Paper(
        "ard",
        "--epochs 200 --schedule 100 --weight-decay 2e-4 --alpha 1 --temperature 30",
        "--kl-reduction mean --teacher robustbench:Zhang2019Theoretically",
    ),
    # RSLAD, ICCV 2021, released code.
    Paper(
        "rslad",
        "--epochs 300 --schedule 215,260,285 --weight-decay 2e-4 --alpha 0.833333",
        "--kl-reduction mean --teacher robustbench:Zhang2019Theoretically",
    ),
    # IAD, ICLR 2022, released code, whose second drop (150) sets the rate of the first one again;
    # its teacher, a ResNet-18 by AT, is the block's here.
    Paper("iad", "--epochs 200 --schedule 100 --weight-decay 2e-4 --beta 0.1 --temperature 1"),
    # AdaAD, CVPR 2023, released code.
    Paper(
        "adaad",
        "--epochs 200 --schedule 100,150 --weight-decay 5e-4 --alpha 1",
        "--kl-reduction mean --teacher robustbench:Chen2021LTD_WRN34_20",
    ),
    # IGDM, ICLR 2025, tables 17 and 18 (on AdaAD, with LTD teachers; Tiny-ImageNet: RiFT's).
    Paper(
        "igdm",
        "--epochs 200 --schedule 100,150 --weight-decay 5e-4",
        "--alpha 5 --teacher robustbench:Chen2021LTD_WRN34_10",
        "--alpha 15",
        "--alpha 10",
    ),
    # SAAD, TMLR 2026, the paper; it averages weights from epoch 95 on (SWA), which is missing here.
    Paper(
        "saad",
        "--epochs 200 --schedule 100,150 --weight-decay 5e-4 --beta 0",
        "--alpha 1 --teacher robustbench:Gowal2021Improving_28_10_ddpm_100m",
        "--alpha 20",
        "--alpha 10",
    ),
]

# Frameworks that came after results/evidence and results/gpu were planned: at scale `paper` alone.
LATER = [
    # AKD, 2203.07159, as IGDM's paper runs it; alpha, which nobody states, is ours.
    Paper(
        "akd",
        "--epochs 200 --schedule 100,150 --weight-decay 5e-4 --alpha 0.5",
        "--teacher robustbench:Chen2021LTD_WRN34_10",
    ),
    # AdaIAD, CVPR 2023, released code, which has a temperature of 30 and sums KL.
    Paper(
        "adaiad",
        "--epochs 200 --schedule 100,150 --weight-decay 5e-4 --beta 0.1 --temperature 30",
        "--teacher robustbench:Chen2021LTD_WRN34_20",
    ),
    # B-MTARD, TPAMI 2024, released code; the epochs of the natural teacher are ours.
    Paper(
        "bmtard",
        "--epochs 300 --schedule 215,260,285 --weight-decay 2e-4 --temperature-rate 0.001"
        " --teacher-epochs 100",
        "--kl-reduction mean --teacher robustbench:Zhang2019Theoretically",
    ),
    # ABSLD, NeurIPS 2024, released code, which is for CIFAR-10.
    Paper(
        "absld",
        "--epochs 300 --schedule 215,260,285 --weight-decay 2e-4 --alpha 0.833333"
        " --temperature-rate 0.1",
        "--kl-reduction mean --teacher robustbench:Zhang2019Theoretically",
    ),
    # ADR, ICLR 2024, released settings of ResNet-18 without AWP. No teacher but for InfoARD's.
    Paper(
        "adr",
        "--epochs 200 --schedule 100,150 --weight-decay 5e-4 --adr-decay 0.995",
        ADR_CIFAR10,
        ADR_CIFAR100,
        ADR_TINY,
    ),
    Paper(
        "adr_trades",
        "--epochs 200 --schedule 100,150 --weight-decay 5e-4 --adr-decay 0.995 --beta 6",
        ADR_CIFAR10,
        ADR_CIFAR100,
        ADR_TINY,
    ),
]

# IGDM on each base by its paper's settings; what --plus igdm weighs there: companions/plus.py.
T6_BASES = ("at", "trades", "ard", "iad", "akd", "rslad", "adaad")
T6_USUAL = "--epochs 200 --schedule 100,150 --weight-decay 5e-4"
T6_RSLAD = "--epochs 300 --schedule 215,260,285 --weight-decay 5e-4"

T2 = [  # parts of InfoARD and their controls, on RSLAD
    ("asa", "--mim off"),
    ("uniform", "--mim off --asa uniform"),
    ("shuffled", "--mim off --asa shuffled"),
    ("student", "--mim off --asa student"),
    ("steps", "--mim off --steps-lo 1"),
    ("features", "--asa off"),
    ("attention", "--asa off --w-feat 0 --w-att 0.05"),
    ("relation", "--asa off --mim off --w-rel 1"),
    ("mim", "--asa off --w-att 0.05"),
]

T4 = [  # NAMID on AT and on TRADES; papers_form: the estimators and the alpha of its paper
    ("at/namid", "--framework namid"),
    ("at/eq5", "--framework namid --mi-train difference"),  # estimators as the paper trains them
    ("at/papers_form", "--framework namid --mi-train difference --alpha 5 --mi-ramp 0"),
    ("trades/namid", "--framework namid_trades"),
]

T5 = [  # MID: known attacks (mifgsm, pgd_l2, pgd_t, pgd_sat) and others, white-box and transferred
    ("undefended", "--framework natural"),
    ("plain", "--framework at --no-infoard"),
    ("mid", "--framework mid --figures"),
    ("mid_transfer", "--framework mid_transfer"),
]

SHARED_STAGES = {  # of seed 0; what these make is taken by all seeds
    "T1/mtard/plain": SHARED,  # both teachers
    "T4/at/namid": SHARED,  # the AT net and its estimators
    "T5/mid": SHARED_LATER,  # the autoencoder, the net to transfer from
    "T4/at/eq5": SHARED_LATER,  # other estimators of the same AT net
}


@dataclass(frozen=True)
class Block:
    """Runs that have data and student in common."""

    student: str
    name: str = ""  # with a name: in a folder of their own, with the papers' settings
    options: str = ""
    teacher: str = ""  # of T1 and T2; NAMID and MID train their own


def paper_block(dataset: str, student: str, teacher: str = "", more: str = "") -> Block:
    """A block of scale `paper`."""
    options = f"--dataset {dataset} --student {student} {more}"
    return Block(student, f"{dataset}-{student}", options, teacher)


ZHANG = "--teacher robustbench:Zhang2019Theoretically"
CHEN = "--teacher robustbench:Chen2021LTD_WRN34_10"

PAPER_BLOCKS = (
    paper_block("cifar10", "resnet18", ZHANG),
    paper_block("cifar10", "mobilenet_v2", ZHANG),
    paper_block("cifar100", "resnet18", CHEN),
    paper_block("cifar100", "mobilenet_v2", CHEN),
    paper_block("tinyimagenet", "resnet18", more="--teacher-epochs 100"),
)


@dataclass(frozen=True)
class Scale:
    """What all tables of a scale have in common; workers: how many run at once."""

    common: str
    blocks: tuple[Block, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 1
    strongest: str = "aa"  # the strongest attack of T5
    published: str = ""  # which folders of results/published are set beside the tables


SCALES = {
    "smoke": Scale(
        common="--subset 300 --epochs 1 --steps 2 --teacher-epochs 24 --batch-size 50"
        " --eval-subset 40",
        blocks=(Block("tiny"),),
        seeds=(0, 1),
        workers=2,
        strongest="apgd",
    ),
    "cpu": Scale(
        common="--dataset cifar10 --subset 10000 --student tiny --teacher-arch tiny_wide"
        " --epochs 10 --steps 5 --teacher-epochs 20 --eval-subset 1000",
        blocks=(Block("tiny"),),
        seeds=(0, 1),
        workers=2,
        published="cifar10-resnet18",
    ),
    "gpu": Scale(  # T1 in a night on one H100: see section 5
        common="--dataset cifar10 --device cuda --student resnet18 --teacher-arch wrn_34_10"
        " --epochs 30 --eval-subset 0",
        blocks=(Block("resnet18"),),
        seeds=(0,),
        published="cifar10-resnet18",
    ),
    "paper": Scale(
        common="--device cuda --eval-subset 0 --attacks clean,fgsm,pgd,cw,aa",
        blocks=PAPER_BLOCKS,
        published="*",
    ),
}


def own_settings(paper: Paper, block: Block) -> str:
    """What a framework's paper sets in this block: nothing but at scale `paper`."""
    if not block.name:
        return ""
    dataset, _, _ = block.name.partition("-")
    return f"{paper.options} {getattr(paper, dataset)}"


def igdm_rows(block: Block) -> list[tuple[str, str]]:
    """T6, with the LTD teacher of IGDM's paper on CIFAR."""
    rows = []
    teacher = CHEN if block.teacher else ""
    for base in T6_BASES:
        settings = T6_RSLAD if base == "rslad" else T6_USUAL
        same = f"{block.options} {teacher} {settings} --framework {base} --no-infoard"
        rows += [(f"T6/{base}/plain", same), (f"T6/{base}/igdm", f"{same} --plus igdm")]
    return rows


def table_rows(scale: Scale, block: Block) -> list[tuple[str, str]]:
    """The rows of all tables in one block."""
    rows = []
    parts = []
    for paper in [*PAPERS, *LATER] if block.name else PAPERS:
        same = f"{block.options} {block.teacher} {own_settings(paper, block)}"
        rows += lifted(f"T1/{paper.framework}", f"{same} --framework {paper.framework}")
        if paper.framework == "rslad":
            parts = [(f"T2/{name}", f"{same} {options}") for name, options in T2]
    rows += parts

    for name, options in T4:
        rows.append((f"T4/{name}", f"{block.options} {options}"))

    attacks = f"clean,fgsm,bim,pgd,pgd_t,mifgsm,cw,{scale.strongest},pgd_l2,spatial"
    transfer = f"--transfer --teacher-arch {block.student} --attacks {attacks}"
    for name, options in T5:
        rows.append((f"T5/{name}", f"{block.options} {options} {transfer}"))
    return rows + igdm_rows(block) if block.name else rows


def table_stage(name: str, seed: int, workers: int) -> int:
    """Runs beside each other must not make the same net at the same time."""
    if workers == 1 or seed != 0:
        return REST
    return SHARED_STAGES.get(name, REST)


def tables_folder(scale_name: str, block: Block) -> str:
    """Where the tables of a block lie."""
    return str(Path("runs/tables", scale_name, block.name))


def table_runs(scale_name: str, extra: Sequence[str] = ()) -> list[Run]:
    """All runs of the tables: seed by seed, block by block."""
    scale = SCALES[scale_name]
    common = f"{scale.common} --no-figures --no-progress"
    runs = []
    for seed in scale.seeds:
        for block in scale.blocks:
            folder = tables_folder(scale_name, block)
            for row in table_rows(scale, block):
                stage = table_stage(row[0], seed, scale.workers)
                runs += expand(folder, [row], seeds=[seed], common=common, extra=extra, stage=stage)
    return runs


# ==== 3. Evidence =================================================================================
# Does InfoARD lift its bases, by which part, and with which teacher: the protocol of
# results/evidence.

EVIDENCE = "runs/evidence"
SAME = "--image-size 16 --no-figures --no-progress"
SHORT = f"{SAME} --steps 3 --step-size 4/255"
LONG = f"{SAME} --steps 5"
TEACHER = "--no-infoard --attacks clean,pgd,apgd --eval-subset 2000"
STUDENT = "--student tiny --lr 0.4 --val-size 0 --eval-subset 0"

TEACHERS = [
    ("teachers/strong", "--student wrn_10_1 --framework trades --epochs 10 --lr 0.2"),
    ("teachers/medium", "--student tiny_wide --framework trades --epochs 12"),
    ("teachers/weak", "--student tiny_wide --framework trades --epochs 2"),
    ("teachers/self", "--student tiny --framework trades --epochs 3"),
    ("teachers/natural", "--student tiny_wide --framework natural --epochs 4"),
    (
        "teachers/strong32",
        "--student wrn_10_1 --framework trades --epochs 10 --lr 0.2 --image-size 32",
    ),
]

CONTROLS = [
    ("controls/plain", "--no-infoard"),
    ("controls/infoard", ""),
    ("controls/asa", "--mim off"),
    ("controls/uniform", "--mim off --asa uniform"),
    ("controls/radii2", "--mim off --lam-hi 2"),
    ("controls/shuffled", "--mim off --asa shuffled"),
    ("controls/reversed", "--mim off --lam-lo 1.5 --lam-hi 1"),
    ("controls/features", "--asa off"),
    ("controls/unpaired", "--asa off --mim unpaired"),
    ("controls/matching", "--asa off --mim vid"),
    ("controls/attention", "--asa off --w-feat 0 --w-att 0.05"),
    ("controls/relation", "--asa off --mim off --w-rel 0.1"),
    ("controls/steps", "--steps-lo 1"),
    ("controls/longer", "--no-infoard --epochs 4"),
]

RADII = [  # larger radii, for attacks that climb through the teacher
    ("T1/adaad/radii2", "--lam-hi 2 --framework adaad"),
    ("T1/adaad/radii3", "--lam-hi 3 --framework adaad"),
    ("T1/igdm/radii2", "--lam-hi 2 --framework igdm --alpha 1"),
]

LONGER = [  # longer than InfoARD takes, whose teacher they lack
    ("T1/at/longer", "--framework at --no-infoard --epochs 6"),
    ("T1/trades/longer", "--framework trades --no-infoard --epochs 6"),
]

ADAAD = [  # whom the larger radii go to
    ("adaad/plain", "--framework adaad --no-infoard"),
    ("adaad/asa", "--framework adaad --mim off --asa teacher --lam-hi 2"),
    ("adaad/uniform", "--framework adaad --mim off --asa uniform --lam-hi 2"),
]

FIRST = [
    ("first/plain", "--no-infoard"),
    ("first/infoard", "--lam-hi 2"),
    ("first/asa", "--mim off --lam-hi 2"),
    ("first/uniform", "--mim off --asa uniform --lam-hi 2"),
    ("first/features", "--asa off"),
]

COPIES = [  # runs that comparisons have in common: from, to
    ("controls/plain", "T1/rslad/plain"),
    ("controls/infoard", "T1/rslad/infoard"),
    ("controls/plain", "teacher/strong/plain"),
    ("controls/infoard", "teacher/strong/infoard"),
    ("controls/plain", "attacks/plain"),
    ("controls/infoard", "attacks/infoard"),
]

KINDS = "noise,shot,impulse,blur,bright,contrast,pixelate,jpeg"

LOOKS = [  # evaluations of finished runs: which, of how many images, under which attacks
    ("T1/*/*/s0", 500, "clean,pgd_sat,cw,apgd"),  # does APGD see what CW does not?
    ("attacks/*/s?", 5000, f"clean,apgd,corrupt,{KINDS}"),
    ("longer/*/*/s?", 2000, "clean,pgd_sat,cw,apgd"),
    ("size32/*/*/s?", 1000, "clean,pgd_sat,cw,apgd"),
]

COMPARISONS = ["T1", "controls", "teacher", "attacks", "adaad", "longer", "size32"]


def taught_by(teacher: str, rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same rows with one of TEACHERS."""
    option = f"--teacher {EVIDENCE}/teachers/{teacher}/s77/last.pt"
    return [(name, f"{options} {option}") for name, options in rows]


def evidence_rows() -> list[tuple[str, str]]:
    """The rows of students."""
    rows = taught_by("strong", CONTROLS)
    for paper in PAPERS:
        if paper.framework != "rslad":  # which is among the controls
            options = f"--lam-hi 1.5 --framework {paper.framework}"  # the same radii for all
            if paper.framework == "igdm":
                options += " --alpha 1"  # the default then; its paper's is 5
            rows += taught_by("strong", lifted(f"T1/{paper.framework}", options))
    rows += taught_by("strong", RADII)
    rows += LONGER
    for teacher in ("medium", "weak", "self"):
        rows += taught_by(teacher, lifted(f"teacher/{teacher}", ""))
    rows += taught_by("strong", ADAAD)
    for framework in ("rslad", "adaad"):
        options = f"--framework {framework} --epochs 12"
        rows += taught_by("strong", lifted(f"longer/{framework}", options))
    rows += taught_by("strong32", lifted("size32/rslad", "--image-size 32"))
    return rows


def evidence_runs(extra: Sequence[str] = ()) -> list[Run]:
    """Teachers, then students of three seeds; three more for the contrast that these left open."""
    teachers = expand(
        EVIDENCE, TEACHERS, seeds=[77], common=f"{SHORT} {TEACHER}", extra=extra, stage=NEEDED
    )
    common = (
        f"{SHORT} {STUDENT} --epochs 3 --teacher-nat {EVIDENCE}/teachers/natural/s77/last.pt"
        " --attacks clean,fgsm,pgd_sat,cw,pgd_l2"
    )
    students = expand(EVIDENCE, evidence_rows(), seeds=[0, 1, 2], common=common, extra=extra)
    contrast = taught_by("strong", ADAAD)
    more = expand(EVIDENCE, contrast, seeds=[3, 4, 5], common=common, extra=extra)
    return teachers + students + more


def first_runs(extra: Sequence[str] = ()) -> list[Run]:
    """The longer runs of the first part, with a teacher of their own."""
    row = ("teachers/first", "--student wrn_10_2 --framework trades --epochs 20")
    teachers = expand(
        EVIDENCE, [row], seeds=[77], common=f"{LONG} {TEACHER}", extra=extra, stage=NEEDED
    )
    common = (
        f"{LONG} {STUDENT} --epochs 5 --teacher {EVIDENCE}/teachers/first/s77/best.pt"
        " --attacks clean,fgsm,pgd,cw,apgd,pgd_l2,corrupt"
    )
    return teachers + expand(EVIDENCE, FIRST, seeds=[0, 1, 2], common=common, extra=extra)


# The same question where nets are large: ResNet-18, all images, a WRN-34-10 as teacher.

GPU_EVIDENCE = f"{EVIDENCE}/gpu"
GPU_COMPARISONS = ["controls", "adaad"]
GPU_CONTROLS = ("plain", "infoard", "asa", "uniform", "shuffled", "features")


def gpu_evidence_runs(extra: Sequence[str] = ()) -> list[Run]:
    """A teacher, then students of three seeds: RSLAD with its controls, AdaAD with larger radii."""
    common = "--dataset cifar10 --device cuda --epochs 30 --val-size 0 --no-figures --no-progress"
    row = ("teacher", "--student wrn_34_10 --framework trades --no-infoard --attacks clean,pgd_sat")
    teachers = expand(GPU_EVIDENCE, [row], seeds=[77], common=common, extra=extra, stage=NEEDED)
    rows = [(name, options) for name, options in CONTROLS if name.split("/")[1] in GPU_CONTROLS]
    rows += [("adaad/infoard", "--framework adaad"), *ADAAD]
    common += f" --student resnet18 --teacher {GPU_EVIDENCE}/teacher/s77/last.pt --eval-subset 0"
    common += " --attacks clean,fgsm,pgd_sat,cw,apgd"
    return teachers + expand(GPU_EVIDENCE, rows, seeds=[0, 1, 2], common=common, extra=extra)


DISTANCE = [  # whom the larger radii go to, when the teacher's own distance decides
    ("plain", "--no-infoard"),
    ("distance", "--mim off --asa distance --lam-hi 2"),
    ("shuffled", "--mim off --asa distance_shuffled --lam-hi 2"),
    ("mean", "--mim off --asa distance_mean --lam-hi 2"),
    ("rank", "--mim off --asa teacher --lam-hi 2"),
]
LIMITS = [  # other limits of these radii
    ("distance15", "--mim off --asa distance --lam-hi 1.5"),
    ("distance3", "--mim off --asa distance --lam-hi 3"),
    ("inside", "--mim off --asa distance --lam-lo 0.5 --lam-hi 2"),
    ("unlimited", "--mim off --asa distance --lam-hi 1000"),
]
RULES = "results/evidence/distance/softmax.py"
SOFTMAX = [  # the distance of a margin of probabilities
    ("softmax", f"--mim off --asa {RULES}:softmax --lam-hi 2"),
    ("softmax_shuffled", f"--mim off --asa {RULES}:softmax_shuffled --lam-hi 2"),
]
BESIDE_MIM = [
    ("distance_mim", "--asa distance --lam-hi 2"),
    ("shuffled_mim", "--asa distance_shuffled --lam-hi 2"),
]
DISTANCE_CELLS = [  # base, teacher of results/evidence/teachers, rows; those that decide first
    ("rslad", "medium", DISTANCE),
    ("rslad", "strong", DISTANCE),
    ("adaad", "medium", DISTANCE),
    ("rslad", "medium", LIMITS),
    ("rslad", "medium", BESIDE_MIM),
    ("rslad", "medium", SOFTMAX),
    ("at", "medium", DISTANCE[:3]),
    ("trades", "medium", DISTANCE[:3]),
]


def distance_runs(extra: Sequence[str] = ()) -> list[Run]:
    """The protocol of results/evidence/distance: new seeds, teachers that are kept there."""
    common = f"{SHORT} {STUDENT} --epochs 3 --attacks clean,fgsm,pgd_sat,cw"
    runs = []
    for stage, (base, teacher, rows) in enumerate(DISTANCE_CELLS):
        same = f"{common} --framework {base} --teacher results/evidence/teachers/{teacher}.pt"
        folder = f"{EVIDENCE}/distance/{base}-{teacher}"
        for seed in (10, 11, 12, 13):
            runs += expand(folder, rows, seeds=[seed], common=same, extra=extra, stage=stage + 2)
    for teacher in ("strong", "medium"):  # the contrast once more, on seeds of its own
        same = f"{common} --framework rslad --teacher results/evidence/teachers/{teacher}.pt"
        folder = f"{EVIDENCE}/distance/again-{teacher}"
        for seed in range(14, 20):
            rows = DISTANCE[1:3]
            runs += expand(folder, rows, seeds=[seed], common=same, extra=extra, stage=9)
    return runs


PLUGINS = [  # what else can be added to a base, with InfoARD and without it
    ("plain", "--no-infoard"),
    ("infoard", ""),
    ("ema", "--no-infoard --ema 0.995"),
    ("infoard_ema", "--ema 0.995"),
    ("igdm", "--no-infoard --plus igdm"),
    ("infoard_igdm", "--plus igdm"),
    ("saad", "--no-infoard --plus saad"),
    ("all", "--plus igdm,saad --ema 0.995"),
]


def plugin_runs(extra: Sequence[str] = ()) -> list[Run]:
    """The protocol of results/evidence/plugins: InfoARD and its rivals on one base each."""
    common = f"{SHORT} {STUDENT} --epochs 3 --attacks clean,fgsm,pgd_sat,cw"
    common += " --teacher results/evidence/teachers/strong.pt"
    runs = []
    for stage, base in enumerate(("rslad", "adaad")):
        same = f"{common} --framework {base}"
        folder = f"{EVIDENCE}/plugins/{base}"
        for seed in (20, 21, 22):
            runs += expand(folder, PLUGINS, seeds=[seed], common=same, extra=extra, stage=stage + 2)
    more = [23, 24, 25]  # of the gain that README tells: `same` and folder are AdaAD's
    return runs + expand(folder, PLUGINS[:2], seeds=more, common=same, extra=extra, stage=4)


WIDER = [  # the same on a student of 692 k parameters: on AdaAD, and whom the larger radii go to
    ("adaad/plain", "--no-infoard"),
    ("adaad/infoard", ""),
    ("adaad/uniform", "--asa uniform"),
]


def wider_runs(extra: Sequence[str] = ()) -> list[Run]:
    """The protocol of results/evidence/wider: seeds of its own, the teacher of README's gain."""
    common = f"{SHORT} --student wrn_16_2 --framework adaad --epochs 3 --val-size 0"
    common += " --eval-subset 0 --attacks clean,fgsm,pgd_sat,cw"
    common += " --teacher results/evidence/teachers/strong.pt"
    folder = f"{EVIDENCE}/wider"
    return expand(folder, WIDER, seeds=[30, 31, 32, 33], common=common, extra=extra)


WIDER32 = [  # RSLAD at full size; each run gives the averaged weights and those of the last epoch
    ("rslad/plain", "--no-infoard"),
    ("rslad/infoard", ""),
    ("rslad/uniform", "--asa uniform"),
]


def wider32_runs(extra: Sequence[str] = ()) -> list[Run]:
    """The protocol of results/evidence/wider32: three epochs at 32x32, a teacher of that size."""
    common = f"{SHORT} --image-size 32 --student wrn_16_2 --epochs 3 --val-size 0 --ema 0.995"
    common += " --eval-subset 2000 --attacks clean,fgsm,pgd_sat,cw"
    common += " --teacher results/evidence/teachers/strong32.pt"
    folder = f"{EVIDENCE}/wider32"
    return expand(folder, WIDER32, seeds=[50, 51, 52, 53], common=common, extra=extra)


TUNED = [  # AdaAD at the rate that is best for it when plain
    ("adaad/plain", "--no-infoard --epochs 3"),
    ("adaad/infoard", "--epochs 3"),
    ("adaad/uniform", "--asa uniform --epochs 3"),
    ("adaad/longer", "--no-infoard --epochs 4"),
]
TUNED_LR = 1.6


def tuned_runs(extra: Sequence[str] = ()) -> list[Run]:
    """The protocol of results/evidence/tuned: seeds of its own, the teacher of README's gain."""
    common = f"{SHORT} --student tiny --framework adaad --lr {TUNED_LR} --val-size 0"
    common += " --eval-subset 0 --attacks clean,fgsm,pgd_sat,cw"
    common += " --teacher results/evidence/teachers/strong.pt"
    runs = []
    for seed in range(40, 46):
        runs += expand(f"{EVIDENCE}/tuned", TUNED, seeds=[seed], common=common, extra=extra)
    return runs


# ==== 4. Lite =====================================================================================
# What accuracy costs what time: attack steps, 1 to so many by rank, full and half precision.

LITE = "runs/lite"

STEPS = [
    ("k1", "--steps 1 --step-size 8/255"),
    ("k2", "--steps 2 --step-size 6/255"),
    ("k2-1", "--steps 2 --step-size 6/255 --steps-lo 1"),
    ("k3-1", "--steps 3 --step-size 4/255 --steps-lo 1"),
    ("k5", "--steps 5"),
    ("k5-1", "--steps 5 --steps-lo 1"),
    ("k10", "--steps 10"),
    ("k10-1", "--steps 10 --steps-lo 1"),
    ("k5fp32", "--steps 5 --amp off"),
    ("plain5", "--steps 5 --no-infoard"),
    ("plain5fp32", "--steps 5 --no-infoard --amp off"),
    ("plain10", "--steps 10 --no-infoard"),
]

BENCH = "--framework rslad --student tiny --teacher-arch tiny_wide --batch-size 128"


def lite_runs(extra: Sequence[str] = ()) -> list[Run]:
    """A teacher, then students of three seeds."""
    common = "--subset 10000 --no-figures --no-progress"
    row = (
        "teacher",
        "--student tiny_wide --framework trades --epochs 20 --steps 5 --attacks clean,pgd",
    )
    teachers = expand(LITE, [row], seeds=[0], common=common, extra=extra, stage=NEEDED)
    student = f"--teacher {LITE}/teacher/s0/best.pt --student tiny --epochs 10 --eval-subset 2000"
    students = expand(LITE, STEPS, seeds=[0, 1, 2], common=f"{common} {student}", extra=extra)
    return teachers + students


# ==== 5. What it costs ============================================================================
# Hours on one H100, from what was measured there (results/gpu/fast): milliseconds of a step of 128
# images and ten attack steps, ResNet-18 with a WRN-34-10, plain and with InfoARD.

STEP_MS = {
    "trades": (25.53, 32.16),
    "rslad": (29.92, 31.09),
    "adaad": (130.66, 136.8),
    "rslad, not replayed": (116.404, 135.706),  # as before the faster step, so at most
}

OPERATIONS = {  # GFLOP of a step for an image, plain and lifted, as bench counts them
    "at": (25.55, 38.87, "trades"),  # and the measured step that it is like
    "trades": (29.99, 43.31, "trades"),
    "ard": (38.86, 38.87, "rslad"),
    "rslad": (42.19, 42.19, "rslad"),
    "iad": (38.86, 38.87, "rslad, not replayed"),
    "adaad": (305.22, 318.54, "adaad"),
    "mtard": (55.51, 68.83, "rslad, not replayed"),
    "igdm": (321.87, 335.19, "adaad"),
    "saad": (95.46, 95.47, "rslad"),
}
WIDE_TRADES = 360.0  # GFLOP of TRADES on a WRN-34-10 itself: 27 passes of 13.3
WIDE_NATURAL = 40.0
EVALUATION_MS = 22.0  # of a test image: 19.3 for PGD-20 and APGD (fast/apgd.json), CW and more
VALIDATION_S = 2.0  # of an epoch
START_S = 30.0  # of a run: imports, data, the look at its teacher


def option(words: Sequence[str], flag: str, default: str) -> str:
    """The value that holds of an option: the last one."""
    places = [i for i, word in enumerate(words) if word == flag]
    return words[places[-1] + 1] if places else default


def step_ms(framework: str, infoard: bool) -> float:
    """Milliseconds of a step: measured, or those of a like one in proportion to the operations."""
    *operations, like = OPERATIONS[framework]
    *of_like, _ = OPERATIONS[like.partition(",")[0]]
    return STEP_MS[like][infoard] * operations[infoard] / of_like[infoard]


def wide_ms(gflop: float) -> float:
    """That of a WRN-34-10 in training, which is what AdaAD's attack passes through."""
    return STEP_MS["adaad"][0] * gflop / OPERATIONS["adaad"][0]


def hours(run: Run) -> float | None:
    """Those of a run on one H100; None for frameworks of which nothing like was measured."""
    words = run.words
    framework = option(words, "--framework", "rslad")
    if option(words, "--student", "") == "wrn_34_10":
        ms = wide_ms(WIDE_TRADES)
    elif framework in OPERATIONS:
        ms = step_ms(framework, "--no-infoard" not in words)
    else:
        return None
    epochs, images = int(option(words, "--epochs", "100")), 50_000
    images = int(option(words, "--subset", "0")) or images
    tested = int(option(words, "--eval-subset", "0")) or 10_000
    validated = option(words, "--val-size", "1000") != "0"
    looks = 2 if validated else 1  # at `last` and `best`
    seconds = START_S + epochs * (images / 128 * ms / 1000 + VALIDATION_S * validated)
    return (seconds + looks * tested * EVALUATION_MS / 1000) / 3600


def teachers_hours(runs: Sequence[Run]) -> float:
    """Those of the teachers that tables train first: a robust one, and mtard's natural one."""
    epochs = int(option(runs[0].words, "--epochs", "100"))
    epochs = int(option(runs[0].words, "--teacher-epochs", str(epochs)))
    ms = wide_ms(WIDE_TRADES) + wide_ms(WIDE_NATURAL)
    return epochs * (50_000 / 128 * ms / 1000 + 2 * VALIDATION_S) / 3600


def cost(runs: Sequence[Run], folder: str) -> dict[str, float | None]:
    """{table: hours on one H100}; None: not measured."""
    found: dict[str, float | None] = {}
    for run in runs:
        table = run.out.removeprefix(f"{folder}/").split("/")[0]
        before, own = found.get(table, 0.0), hours(run)
        found[table] = None if own is None or before is None else before + own
    return found


def kept_seconds(run: Run) -> float | None:
    """What training took in the kept runs of the same cell, in the mean; None if none says so."""
    cell = Path("results", Path(run.out).relative_to("runs")).parent
    found = []
    for log in sorted(cell.glob("s*/log.jsonl")):
        last = json.loads(log.read_text().splitlines()[-1])
        if "seconds" in last:
            found.append(last["seconds"])
    return sum(found) / len(found) if found else None


def kept_cost(runs: Sequence[Run], folder: str, workers: int) -> dict[str, float | None]:
    """{group: hours of training, so many at once, as long as the kept runs took}.

    A group is a folder in this one; a cell that was not kept counts as the mean of its group.
    """
    groups: dict[str, list[float | None]] = {}
    for run in runs:
        group = run.out.removeprefix(f"{folder}/").split("/")[0]
        groups.setdefault(group, []).append(kept_seconds(run))
    costs: dict[str, float | None] = {}
    for group, seconds in groups.items():
        known = [value for value in seconds if value is not None]
        costs[group] = None
        if known:
            costs[group] = sum(known) / len(known) * len(seconds) / workers / 3600
    return costs


ON_H100 = "on one H100, reckoned from its measured steps"
ON_CORES = "of training on two cores, by the logs kept in results; evaluation comes on top"


def print_cost(costs: dict[str, float | None], how: str = ON_H100) -> None:
    """A line for each table, before anything is begun."""
    print(f"about so many hours {how}:")
    for table, own in costs.items():
        print(f"  {table}: {'not measured' if own is None else f'{own:.1f}'}")


# ==== 6. The runner ===============================================================================

TICK = 0.05  # seconds between two looks at the processes


def environment(workers: int) -> dict[str, str]:
    """That of a process: one thread each where several run, and no busy waiting on full cores."""
    env = dict(os.environ)
    env.setdefault("GOMP_SPINCOUNT", "10000")
    if workers > 1:
        env["OMP_NUM_THREADS"] = "1"
    return env


def start(words: Iterable[str], workers: int = 1) -> subprocess.Popen:
    """infoard.py as a process in a session of its own: a Ctrl-C at the terminal reaches the runner
    alone, which passes it on once (a second signal would end a run before it has saved).
    """
    return subprocess.Popen(
        [sys.executable, "infoard.py", *words],
        stdin=subprocess.DEVNULL,
        env=environment(workers),
        start_new_session=True,
    )


def finished(run: Run) -> bool:
    """Whether this very run has ended before: the same words given to the same infoard.py. In any
    other case infoard.py is asked, which compares all settings with those of the folder.
    """
    config = Path(run.out, "config.json")
    if not Path(run.out, "results.json").exists() or not config.exists():
        return False
    made = json.loads(config.read_text())
    source = hashlib.sha256(Path("infoard.py").read_bytes()).hexdigest()
    same_words = made.get("argv", [])[1:] == ["--resume", *run.words]
    return same_words and made.get("source_sha256") == source


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def ending(status: int) -> str:
    """How a process ended, in words."""
    if status == 0:
        return "done"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"failed (exit code {status})"


class Runner:
    """Works through runs and commands of infoard.py, and knows what failed.

    In a with block SIGINT, SIGTERM and SIGHUP are passed on to the processes that run; when these
    have saved, the runner exits, with 130, 143 or 129. A process that fails or is killed stops no
    other one.
    """

    def __init__(self):
        self.failed: list[str] = []
        self.left_out = 0  # runs that were not begun, because what they need has failed
        self.handlers = {}  # of signals, as they were before
        self.caught: list[int] = []  # signals
        self.passed_on = 0  # how many of them
        self.total = 0
        self.found = 0  # runs that had been finished before
        self.ended = 0  # runs that have ended since
        self.began = time.time()

    def __enter__(self) -> "Runner":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.handlers[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self, number: int, _) -> None:
        """Only notes the signal; the loops below act on it."""
        self.caught.append(number)

    def pass_on(self, processes: Iterable[subprocess.Popen]) -> None:
        """SIGTERM for these processes, once for each signal caught; a second one stops at once."""
        while self.passed_on < len(self.caught):
            self.passed_on += 1
            for process in processes:
                process.terminate()

    def exit_if_stopped(self) -> None:
        if self.caught:
            name = signal.Signals(self.caught[0]).name
            print(f"stopped by {name}: the same command goes on", file=sys.stderr)
            raise SystemExit(128 + self.caught[0])

    def work(self, runs: list[Run], workers: int = 1) -> bool:
        """All runs, stage by stage; False if some were left out, because what they need failed."""
        self.total = len(runs)
        todo = [run for run in runs if not finished(run)]
        self.found = self.total - len(todo)
        print(f"{self.total} runs, {self.found} finished before; {workers} at once", flush=True)
        self.began = time.time()
        for stage in sorted({run.stage for run in todo}):
            self.work_on([run for run in todo if run.stage == stage], workers)
            if stage == NEEDED and self.failed:
                self.left_out = self.total - self.found - self.ended
                return False
        return True

    def work_on(self, queue: list[Run], workers: int) -> None:
        """The runs of a stage, so many at once, in their order."""
        waiting = list(queue)
        running = {}  # process: run and when it began
        while running or (waiting and not self.caught):
            while waiting and len(running) < workers and not self.caught:
                run = waiting.pop(0)
                running[start(["--resume", *run.words], workers)] = (run, time.time())
            self.pass_on(running)
            for process in list(running):
                if process.poll() is not None:
                    run, began = running.pop(process)
                    self.end_run(run, process.returncode, time.time() - began)
            time.sleep(TICK)
        self.exit_if_stopped()

    def end_run(self, run: Run, status: int, seconds: float) -> None:
        """Keeps how a run ended, and prints a line of progress."""
        self.ended += 1
        how = ending(status)
        if status != 0 and self.caught:
            how = "stopped"
        elif status != 0:
            self.failed.append(shlex.join(["python", "infoard.py", "--resume", *run.words]))
        past = time.time() - self.began
        left = self.total - self.found - self.ended
        print(
            f"[{self.found + self.ended} of {self.total}] {run.out}: {how} in"
            f" {clock(seconds)}; {left} left, {clock(past)} so far,"
            f" about {clock(past / self.ended * left)} still",
            flush=True,
        )

    def call(self, *words: str) -> None:
        """One command of infoard.py, alone; if it fails, the others still come."""
        self.exit_if_stopped()
        process = start(words)
        while process.poll() is None:
            self.pass_on([process])
            time.sleep(TICK)
        self.exit_if_stopped()
        if process.returncode != 0:
            self.failed.append(shlex.join(["python", "infoard.py", *words]))

    def copy(self, source: str | Path, target: str | Path) -> None:
        """A folder with all that it holds, into another one."""
        try:
            shutil.copytree(source, target, dirs_exist_ok=True)
        except OSError as error:
            self.failed.append(f"copying {source} to {target}: {error}")

    def report(self) -> int:
        """The list of what failed; returns the exit code."""
        if not self.failed:
            return 0
        print(f"{len(self.failed)} failed; the same command tries again:", file=sys.stderr)
        for line in self.failed:
            print(f"  {line}", file=sys.stderr)
        if self.left_out:
            print(f"{self.left_out} runs need what failed and were not begun", file=sys.stderr)
        return 1


# ==== 7. Experiments ==============================================================================


PARTS = {  # of evidence, and their runs
    "first": first_runs,
    "gpu": gpu_evidence_runs,
    "distance": distance_runs,
    "plugins": plugin_runs,
    "wider": wider_runs,
    "wider32": wider32_runs,
    "tuned": tuned_runs,
}
PROTOCOLS = ("distance", "plugins", "wider", "wider32", "tuned")  # with a page of their own


def say_cost(experiment: str, runs: list[Run]) -> None:
    """How many runs an experiment has and, as far as it was measured, how long they take."""
    print(f"{experiment}: {len(runs)} runs")
    folder = EVIDENCE
    if experiment == "tables gpu":
        costs = {"teachers": teachers_hours(runs)}
        print_cost(costs | cost(runs, tables_folder("gpu", SCALES["gpu"].blocks[0])))
        return
    if experiment == "evidence gpu":
        print_cost(cost(runs, GPU_EVIDENCE))
        return
    part = experiment.partition(" ")[2]
    if part in PROTOCOLS:
        folder = f"{EVIDENCE}/{part}"
    costs = kept_cost(runs, folder, workers=2)
    if not any(costs.values()):
        print("how long they take was not measured")
        return
    print_cost(costs, ON_CORES)
    print(f"  together: {sum(filter(None, costs.values())):.1f}", flush=True)


def run_tables(runner: Runner, scale_name: str, extra: list[str]) -> None:
    """The runs, the cells that tables have in common, numbers published by others, the tables."""
    scale = SCALES[scale_name]
    runs = table_runs(scale_name, extra)
    say_cost(f"tables {scale_name}", runs)
    runner.work(runs, scale.workers)
    for block in scale.blocks:
        folder = tables_folder(scale_name, block)
        runner.copy(f"{folder}/T1/rslad", f"{folder}/T2")
        for base in ("at", "trades"):
            runner.copy(f"{folder}/T1/{base}/plain", f"{folder}/T4/{base}/plain")
    if scale.published:
        for source in sorted(Path("results/published").glob(scale.published)):
            if source.is_dir():
                runner.copy(source, f"runs/tables/{scale_name}/published/{source.name}")
    runner.call("tables", f"runs/tables/{scale_name}")


def look(runner: Runner, folder: Path, images: int, attacks: str, out: Path | None = None) -> None:
    """eval.json of a finished run, in its folder or in out, unless it is newer than the run."""
    seen = (out or folder) / "eval.json"
    last = folder / "last.pt"
    if seen.exists() and not (last.exists() and last.stat().st_mtime >= seen.stat().st_mtime):
        return
    options = ["--eval-subset", str(images), "--attacks", attacks]
    runner.call("eval", str(last), "--out", str(out or folder), *options)


def run_evidence(runner: Runner, extra: list[str]) -> None:
    """Every framework, parts and controls, teachers; then a closer look and the comparisons."""
    runs = evidence_runs(extra)
    say_cost("evidence", runs)
    if not runner.work(runs, workers=2):
        return
    for source, target in COPIES:
        runner.copy(f"{EVIDENCE}/{source}", f"{EVIDENCE}/{target}")
    for pattern, images, attacks in LOOKS:
        for folder in sorted(Path(EVIDENCE).glob(pattern)):
            look(runner, folder, images, attacks)
    for name in COMPARISONS:
        runner.call("compare", f"{EVIDENCE}/{name}")


def run_first(runner: Runner, extra: list[str]) -> None:
    """The first part, its comparison, and where teacher and students look."""
    runs = first_runs(extra)
    say_cost("evidence first", runs)
    if not runner.work(runs, workers=2):
        return
    runner.call("compare", f"{EVIDENCE}/first")
    runner.call("attention", f"{EVIDENCE}/first", "--eval-subset", "2000")


def run_gpu_evidence(runner: Runner, extra: list[str]) -> None:
    """The runs on one GPU and their comparisons."""
    runs = gpu_evidence_runs(extra)
    say_cost("evidence gpu", runs)
    if runner.work(runs):
        for name in GPU_COMPARISONS:
            runner.call("compare", f"{GPU_EVIDENCE}/{name}")


ON_ALL_IMAGES = {  # looks under APGD at more than 2,000 images: base, cells, where they are kept
    "plugins": [("plugins/adaad", ("plain", "infoard"), "plugins/adaad-apgd")],
    "distance": [
        ("distance/rslad-medium", ("distance", "shuffled"), "distance/medium-apgd"),
        ("distance/again-medium", ("distance", "shuffled"), "distance/medium-apgd"),
    ],
    "tuned": [("tuned/adaad", ("plain", "infoard"), "tuned/adaad-apgd")],
}


def run_protocol(runner: Runner, name: str, runs: list[Run]) -> None:
    """The runs, a closer look at each under APGD, and the comparisons."""
    say_cost(f"evidence {name}", runs)
    if not runner.work(runs, workers=2):
        return
    for folder in sorted(Path(EVIDENCE, name).glob("*/*/s*")):
        if (folder / "results.json").exists():
            look(runner, folder, 2000, "clean,pgd_sat,cw,apgd")
    for base, cells, out in ON_ALL_IMAGES.get(name, ()):
        for cell in cells:
            for folder in sorted(Path(EVIDENCE, base, cell).glob("s*")):
                whole = Path(EVIDENCE, out, cell, folder.name)
                look(runner, folder, 0, "clean,pgd_sat,cw,apgd", whole)
    for folder in sorted(Path(EVIDENCE, name).iterdir()):
        if Path(folder, "plain").exists():
            runner.call("compare", str(folder))


def run_lite(runner: Runner, extra: list[str]) -> None:
    """The runs, then what a step of each costs, alone on the machine, and the curve of both."""
    runs = lite_runs(extra)
    say_cost("lite", runs)
    if not runner.work(runs, workers=2):
        return
    for name, options in STEPS:
        words = [*BENCH.split(), *options.split()]
        runner.call("bench", *words, "--out", f"{LITE}/{name}", *extra)
    runner.call("curve", LITE)


# ==== 8. Command line =============================================================================


def planned(verb: str, words: list[str]) -> tuple[str, list[Run]]:
    """(name, runs) of an experiment; its options go to every run."""
    if verb == "tables":
        return f"tables {words[0]}", table_runs(words[0], words[1:])
    if verb == "lite":
        return "lite", lite_runs(words)
    if words[:1] and words[0] in PARTS:
        return f"evidence {words[0]}", PARTS[words[0]](words[1:])
    return "evidence", evidence_runs(words)


def print_cells(runs: list[Run]) -> None:
    """A line of options for each run."""
    for run in runs:
        print(shlex.join(run.words))


def mistake(verb: str, words: list[str]) -> str:
    """What is wrong with a command, in a line; nothing if it names an experiment."""
    first = words[0] if words else ""
    if verb in ("cells", "tables") and first not in SCALES:
        told = f"SCALE is smoke, cpu, gpu or paper, not '{first}'"
        return f"{told}; cells also takes evidence and lite" if verb == "cells" else told
    if verb == "evidence" and first and not first.startswith("-") and first not in PARTS:
        return f"evidence has the parts {', '.join(PARTS)}, not '{first}'"
    return ""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    verb = argv[0] if argv else ""
    words = argv[1:]
    cells_only = verb == "cells"
    if cells_only and words[:1] and words[0] in ("evidence", "lite"):
        verb, *words = words
    wrong = mistake(verb, words)
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    if cells_only:
        print_cells(planned("tables" if verb == "cells" else verb, words)[1])
        return 0
    if not Path("infoard.py").exists():
        print("no infoard.py here: call this from the root of the repository", file=sys.stderr)
        return 2

    if "--dry-run" in words and verb in ("tables", "evidence", "lite"):
        name, runs = planned(verb, [word for word in words if word != "--dry-run"])
        say_cost(name, runs)
        print_cells(runs)
        return 0

    with Runner() as runner:
        if verb == "tables":
            run_tables(runner, words[0], words[1:])
        elif verb == "evidence" and words[:1] == ["first"]:
            run_first(runner, words[1:])
        elif verb == "evidence" and words[:1] == ["gpu"]:
            run_gpu_evidence(runner, words[1:])
        elif verb == "evidence" and words and words[0] in PROTOCOLS:
            run_protocol(runner, words[0], PARTS[words[0]](words[1:]))
        elif verb == "evidence":
            run_evidence(runner, words)
        elif verb == "lite":
            run_lite(runner, words)
        else:
            print(__doc__, file=sys.stderr)
            return 2
        return runner.report()


if __name__ == "__main__":
    if sys.argv[1:2] == ["cells"] or "--dry-run" in sys.argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `cells paper | head` ends in silence
    raise SystemExit(main(sys.argv[1:]))
