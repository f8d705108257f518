"""One run of the search (README.md): a net trained with something tried, seen by validation images.

    python results/evidence/search.py NAME 'dec=1' [options of infoard.py]     from the project's root
    python results/evidence/search.py table [search2.jsonl]                    what the search found; of part 2

What is tried (nothing: ''), each with its weight or value: label: CE(S(x'), y) added; lack: the same, as
much as the teacher lacks, 1 - p_T(y); resp: KL(T(x') - T(x) || S(x') - S(x)), the response; dec, decc:
KL of the teacher's sharpened labels, softmax(T(x)/0.5), to S(x') or S(x); sharp: the teacher's logits
over this temperature, everywhere; fix: the teacher's top class and the true one swapped where it errs;
aim: RSLAD's label of x' is not T(x) but, in logits, this much of T(x'); ramp: ASA's strength grows over
this share of training; clean: MIM looks at S(x), not S(x'); both: at T(x'), not T(x); grow, fall:
InfoARD's weights rise from 0 or fall to 0 along a line; wide: so many dimensions of the critics.
It prints accuracies of the last epoch in per cent and keeps them in runs/search/NAME/sSEED.json.
"""
import json
import re
import sys
import time
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import extras
import infoard as I

def changed(name: str, get) -> None:
    """Step.name becomes get(step)."""
    setattr(I.Step, name, cached_property(get))
    getattr(I.Step, name).__set_name__(I.Step, name)

def added(step: I.Step, x: dict, base) -> torch.Tensor:
    """The framework's loss and what is added to it."""
    loss, y = base(step), step.y
    if "aim" in x:
        label = step.t + x["aim"] * (step.t_adv - step.t)
        loss = loss + step.alpha * (step.kl(label, step.s_adv) - step.kl(step.t, step.s_adv))
    if "label" in x:
        loss = loss + x["label"] * F.cross_entropy(step.s_adv, y)
    if "lack" in x:
        lack = 1 - step.t.softmax(1).gather(1, y[:, None]).squeeze(1)
        loss = loss + x["lack"] * (lack * F.cross_entropy(step.s_adv, y, reduction="none")).mean()
    if "resp" in x:
        loss = loss + x["resp"] * step.kl(step.t_adv - step.t, step.s_adv - step.s)
    if "dec" in x:
        loss = loss + x["dec"] * step.kl(step.t / 0.5, step.s_adv)
    if "decc" in x:
        loss = loss + x["decc"] * step.kl(step.t / 0.5, step.s)
    return loss

def try_out(x: dict, framework: str, now: dict) -> None:
    """Changes infoard's tables and steps so that x is tried."""
    I.require(framework == "rslad" or not {"aim", "climb"} & set(x), "aim, climb are made for rslad")
    clash = len({"both", "sharp", "fix"} & set(x)) > 1 or {"grow", "fall"} <= set(x)
    I.require(not clash, "of both, sharp, fix and of grow, fall only one")
    I.FRAMEWORKS[framework] = partial(added, x=x, base=I.FRAMEWORKS[framework])
    def logits(step):
        return step.tap("teacher_taps", I.predict(step.teacher, step.x))
    def swapped(step):
        z, true = logits(step).clone(), step.y[:, None]
        top = z.argmax(1, keepdim=True)
        high, low = z.gather(1, top), z.gather(1, true)
        return z.scatter(1, top, low).scatter(1, true, high)
    if "sharp" in x:
        changed("t", lambda step: logits(step) / x["sharp"])
    if "climb" in x:
        usual_attack = I.Step.attack
        I.Step.attack = lambda step, _, init: usual_attack(
            step, lambda z, rows=I.ALL: I.kl(step.teacher(z), step.student(z)), init)
    if "fix" in x:
        changed("t", swapped)
    if "clean" in x:
        changed("s", lambda step: step.tap("student_taps", I.full(step.student(step.x))))
        changed("s_adv", lambda step: I.full(step.student(step.x_adv)))
    if "both" in x:
        changed("t", lambda step: I.predict(step.teacher, step.x))
        changed("t_adv", lambda step: step.tap("teacher_taps", I.predict(step.teacher, step.x_adv)))
        passed = I.Step.s_adv.func
        changed("s_adv", lambda step: (step.t_adv, passed(step))[1])
    if {"grow", "fall"} & set(x):
        whole = I.InfoARD.loss
        I.InfoARD.loss = lambda info, *maps: whole(info, *maps) * (
            now["share"] if "grow" in x else 1 - now["share"])
    if "wide" in x:
        I.InfoARD = partial(I.InfoARD, dim=int(x["wide"]))
    if "ramp" in x:
        usual = I.instance_strength
        I.instance_strength = lambda signal, **more: usual(
            signal, ramp=min(1.0, now["share"] / x["ramp"]), **more)

def table(file: str = "search.jsonl") -> str:
    """The runs that a file beside this one holds, as Markdown; gains on the plain run of the same
    framework, lr and seed."""
    kept = [json.loads(line) for line in Path(__file__).with_name(file).open()]
    def setting(row):
        words = ("--framework rslad --lr 0.1 " + row["options"]).split()
        given = dict(zip(words, words[1:], strict=False))
        return given["--framework"] if row["name"] != "at" else "rslad", given["--lr"], row["seed"]
    bases = {setting(r): r for r in kept if re.fullmatch(r"plain|lr0.\d|\w+-lr0.\d", r["name"])}
    lines = [["tried", "options", "seed", "clean", "PGD-20", "pgd5_cw", "gain clean", "gain pgd5_cw"]]
    for r in sorted(kept, key=lambda r: (setting(r)[1], r is not bases[setting(r)], r["name"], r["seed"])):
        base = bases[setting(r)]
        lines.append([r["tried"] or "-", r["options"].replace("teachers/", "").replace("/best.pt", ""),
                      str(r["seed"]), *(f"{r[k]:.2f}" for k in ("clean", "pgd_sat", "pgd5_cw")),
                      *("-" if r is base else f"{r[k] - base[k]:+.2f}" for k in ("clean", "pgd5_cw"))])
    return extras.markdown(lines)

def main(name: str, tried: str, *options: str) -> None:
    x = {k: float(v) for k, v in (pair.split("=") for pair in tried.split())}
    cfg = I.Config(**I.parse("train", list(options))).resolved()
    out, now = Path(f"runs/search/{name}/s{cfg.seed}.json"), {}
    I.require(not out.exists(), f"{out} is there: another NAME or --seed")
    try_out(x, cfg.framework, now)
    device = I.pick_device(cfg.device)
    data = I.load_dataset(cfg.dataset, cfg.data_dir, image_size=cfg.image_size)
    size = data.x_train.shape[-1]
    nets = {k: path and I.load_teacher(path, None, len(data.classes), size=size, device=device)
            for k, path in dict(teacher=cfg.teacher, teacher_nat=cfg.teacher_nat).items()}
    run = I.Run(cfg, data, device, nets)
    n, began = len(run.train), time.time()
    for epoch in range(cfg.epochs):
        run.at |= dict(epoch=epoch, position=0)
        while run.at["position"] < n:
            now["share"] = (epoch + run.at["position"] / n) / cfg.epochs
            run.step()
    seconds = time.time() - began
    found = I.evaluate(run.evaluated, data.x_train[run.val], data.y_train[run.val], eps=cfg.eps,
                       attacks="clean,pgd,pgd5_cw", classes=len(data.classes))
    found = {k: found[k] for k in ("clean", "pgd_sat", "pgd5_cw", "n")}
    terms = {k: round(v.item() / n, 4) for k, v in run.at["sums"].items()}
    I.save(out, found | dict(seconds=round(seconds), terms=terms, tried=x, options=list(options)))
    print(f"{name}, seed {cfg.seed}:", *(f"{k} {v}" for k, v in found.items()))

if __name__ == "__main__":
    print(table(*sys.argv[2:])) if sys.argv[1:2] == ["table"] else main(*sys.argv[1:])
