"""One run of the search (README.md): a net trained with something tried, seen by validation images.

    python results/evidence/search.py NAME 'dec=1' [options of infoard.py]
    python results/evidence/search.py table [search2.jsonl]

The first, from the root of the repository, prints accuracies of the last epoch and keeps
them in runs/search/NAME/sSEED.json; the second prints what the search, or a part of it, found.

What is tried (nothing: ''), each with its weight or value:

    label       CE(S(x'), y) added
    lack        the same, as much as the teacher lacks, 1 - p_T(y)
    resp        KL(T(x') - T(x) || S(x') - S(x)) added, the response
    dec, decc   KL of the teacher's sharpened labels, softmax(T(x)/0.5), to S(x') or S(x) added
    sharp       the teacher's logits over this temperature, everywhere
    fix         the teacher's top class and the true one swapped where it errs
    aim         RSLAD's label of x' is not T(x) but, in logits, this much of T(x')
    climb       RSLAD's attack climbs through the teacher, too
    ramp        ASA's strength grows over this share of training
    clean       MIM looks at S(x), not S(x')
    both        MIM looks at T(x'), not T(x)
    grow, fall  InfoARD's weights rise from 0 or fall to 0 along a line

    1  what is tried     2  a run     3  tables     4  command line
"""

import json
import re
import sys
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import infoard as I
from companions import cli, tables

# ==== 1. What is tried ============================================================================

KNOWN = "label lack resp dec decc sharp fix aim climb ramp clean both grow fall".split()


def swapped(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Logits [B,K] with the largest value and that of the true class y [B] exchanged."""
    true = y[:, None]
    top = z.argmax(1, keepdim=True)
    high = z.gather(1, top)
    low = z.gather(1, true)
    return z.scatter(1, top, low).scatter(1, true, high)


class Step(I.Step):
    """A step of infoard.py with what is tried; tried: {name: value}."""

    tried = {}

    @cached_property
    def teacher_pass(self) -> tuple[torch.Tensor, dict]:
        t, maps = super().teacher_pass
        if "sharp" in self.tried:
            t = t / self.tried["sharp"]
        if "fix" in self.tried:
            t = swapped(t, self.y)
        return t, maps

    @cached_property
    def clean_pass(self) -> tuple[torch.Tensor, dict]:
        """S(x) and, if MIM looks at them, its feature maps."""
        s = super().s
        if "clean" in self.tried and self.info:
            return s, self.info.student_taps.take()
        return s, {}

    @property
    def s(self) -> torch.Tensor:
        return self.clean_pass[0]

    def attack(self, objective, init: str = "uniform") -> None:
        if "climb" in self.tried:
            objective = I.teacher_student_objective(self.student, self.teacher)
        super().attack(objective, init)

    def choose_maps(self) -> None:
        """What MIM looks at, when the framework has made its passes."""
        if "clean" in self.tried and self.info:
            self.student_pass = self.s_adv, self.clean_pass[1]
        if "both" in self.tried and self.info:
            t = self.t
            I.predict(self.teacher, self.x_adv)
            self.teacher_pass = t, self.info.teacher_taps.take()


def with_terms(step: Step, total: torch.Tensor) -> torch.Tensor:
    """The framework's loss, total, with what is tried as a further term."""
    tried = step.tried
    if "aim" in tried:
        label = step.t + tried["aim"] * (step.t_adv - step.t)
        other = step.mean_kl(label, step.s_adv) - step.mean_kl(step.t, step.s_adv)
        total = total + step.cfg.alpha * other
    if "label" in tried:
        total = total + tried["label"] * F.cross_entropy(step.s_adv, step.y)
    if "lack" in tried:
        lack = 1 - step.t.softmax(1).gather(1, step.y[:, None]).squeeze(1)
        losses = F.cross_entropy(step.s_adv, step.y, reduction="none")
        total = total + tried["lack"] * (lack * losses).mean()
    if "resp" in tried:
        response = step.mean_kl(step.t_adv - step.t, step.s_adv - step.s)
        total = total + tried["resp"] * response
    if "dec" in tried:
        total = total + tried["dec"] * step.mean_kl(step.t / 0.5, step.s_adv)
    if "decc" in tried:
        total = total + tried["decc"] * step.mean_kl(step.t / 0.5, step.s)
    return total


def try_out(tried: dict, framework: str, now: dict) -> None:
    """Changes infoard's steps, framework and parts so that this is tried.

    now["share"]: how much of the training is done.
    """
    for_rslad = {"aim", "climb"} & set(tried)
    I.require(framework == "rslad" or not for_rslad, "aim, climb are made for rslad")
    for names in ({"both", "sharp", "fix"}, {"grow", "fall"}):
        told = f"of {', '.join(sorted(names))} only one"
        I.require(len(names & set(tried)) < 2, told)
    base = I.get_framework(framework)

    def loss(step: Step) -> torch.Tensor:
        total = with_terms(step, base.loss(step))
        step.choose_maps()
        return total

    Step.tried = tried
    I.Step = Step
    I.FRAMEWORKS[framework] = replace(base, loss=loss)

    whole = I.InfoARD.loss
    usual = I.instance_strength

    def growing(info, *maps) -> torch.Tensor:
        return whole(info, *maps) * now["share"]

    def falling(info, *maps) -> torch.Tensor:
        return whole(info, *maps) * (1 - now["share"])

    def ramped(signal: torch.Tensor, lam: tuple[float, float], **options) -> I.Threat:
        grown = min(1.0, now["share"] / tried["ramp"])
        low, high = (1 + grown * (factor - 1) for factor in lam)
        return usual(signal, lam=(low, high), **options)

    if "grow" in tried:
        I.InfoARD.loss = growing
    if "fall" in tried:
        I.InfoARD.loss = falling
    if "ramp" in tried:
        I.instance_strength = ramped


# ==== 2. A run ====================================================================================


def make_run(cfg: I.Config) -> I.Run:
    """Data, given nets and a new student."""
    device = I.pick_device(cfg.device)
    data = I.load_dataset(cfg.dataset, cfg.data_dir, image_size=cfg.image_size)
    size = data.x_train.shape[-1]
    nets = {"teacher": None, "teacher_nat": None}
    for name in nets:
        path = getattr(cfg, name)
        if path:
            nets[name] = I.load_teacher(path, None, len(data.classes), size=size, device=device)
    return I.Run(cfg, data, device, nets)


def fit(run: I.Run, now: dict) -> float:
    """All epochs, without validation; returns the seconds."""
    n = len(run.train)
    began = time.time()
    for epoch in range(run.cfg.epochs):
        run.at.order = run.train[torch.randperm(n, generator=run.generators["data"])]
        run.at.sums = {}
        for i in range(0, n, run.cfg.batch_size):
            now["share"] = (epoch + i / n) / run.cfg.epochs
            I.train_step(run, run.at.order[i : i + run.cfg.batch_size], now["share"])
    return time.time() - began


def search(name: str, tried_text: str, options: list[str]) -> None:
    """One run, its accuracies printed and kept."""
    tried = {}
    for pair in tried_text.split():
        key, value = pair.split("=")
        tried[I.lookup(KNOWN, key, "trial")] = float(value)
    cfg = I.Config(**cli.parse("train", options)).resolved()
    out = Path(f"runs/search/{name}/s{cfg.seed}.json")
    I.require(not out.exists(), f"{out} is there: another NAME or --seed")

    now = {}
    try_out(tried, cfg.framework, now)
    run = make_run(cfg)
    seconds = fit(run, now)
    x = run.data.x_train[run.val]
    y = run.data.y_train[run.val]
    result = I.evaluate(run.evaluated, x, y, eps=cfg.eps, attacks="clean,pgd_sat,pgd5_cw")
    found = {key: result[key] for key in ("clean", "pgd_sat", "pgd5_cw", "n")}
    terms = {key: round(v.item() / len(run.train), 4) for key, v in run.at.sums.items()}
    about = {"seconds": round(seconds), "terms": terms, "tried": tried, "options": options}
    I.save(out, found | about)
    print(f"{name}, seed {cfg.seed}:", *(f"{key} {value}" for key, value in found.items()))


# ==== 3. Tables ===================================================================================


def setting(row: dict) -> tuple[str, str, int]:
    """(framework, lr, seed) of a run; runs called `at` are held against RSLAD."""
    words = ["--framework", "rslad", "--lr", "0.1", *row["options"].split()]
    given = dict(zip(words, words[1:], strict=False))
    framework = given["--framework"]
    if row["name"] == "at":
        framework = "rslad"
    return framework, given["--lr"], row["seed"]


def is_plain(row: dict) -> bool:
    """Whether others are held against this run."""
    return re.fullmatch(r"plain|(\w+-)?lr\d\.\d", row["name"]) is not None


def cells(row: dict, base: dict) -> list[str]:
    """A line of the table."""
    options = row["options"].replace("teachers/", "").replace("/best.pt", "")
    line = [row["tried"] or "-", options, str(row["seed"])]
    line += [f"{row[key]:.2f}" for key in ("clean", "pgd_sat", "pgd5_cw")]
    for key in ("clean", "pgd5_cw"):
        line.append("-" if row is base else f"{row[key] - base[key]:+.2f}")
    return line


def table(file: str = "search.jsonl") -> str:
    """The runs that a file beside this one holds, as Markdown; gains on the plain run of the same
    framework, lr and seed.
    """
    kept = [json.loads(line) for line in Path(__file__).with_name(file).open()]
    bases = {setting(row): row for row in kept if is_plain(row)}

    def order(row: dict) -> tuple:
        """By learning rate, the plain run first."""
        return setting(row)[1], row is not bases[setting(row)], row["name"], row["seed"]

    head = ["tried", "options", "seed", "clean", "PGD-20", "pgd5_cw", "gain clean", "gain pgd5_cw"]
    lines = [cells(row, bases[setting(row)]) for row in sorted(kept, key=order)]
    return tables.markdown([head, *lines])


# ==== 4. Command line =============================================================================


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    try:
        if words[:1] == ["table"]:
            print(table(*words[1:]))
        elif len(words) >= 2:
            search(words[0], words[1], words[2:])
        else:
            print(__doc__)
            return 2
    except (I.InfoardError, OSError) as error:
        print(f"search: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
