"""Finished runs as pictures: curves, sheets of images, gains, attention.

    python infoard.py figures DIR      a finished run as PNG and PDF
    python infoard.py attention DIR    where students and their teachers look, clean and attacked

    1  drawing    2  the figures    3  a run    4  attention

Matplotlib is imported when something is drawn. `draw(folder, name=function)` is all that another
module needs: function(figure) fills an empty figure.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import infoard as I
from companions import cli, tables

# ==== 1. Drawing ==================================================================================

STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType, which journals ask for
}
RADII = (0, 2, 4, 8, 12, 16, 24, 32, 64)  # of the curve of accuracy over eps, in 1/255


def draw(folder: str | Path, **figures: Callable) -> None:
    """Each function of a figure as name.png and name.pdf in the folder; by the first rank alone."""
    if I.world()[0] != 0:
        return
    import matplotlib.figure

    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name, fill in figures.items():
        with matplotlib.rc_context(STYLE):
            figure = matplotlib.figure.Figure(layout="constrained")
            fill(figure)
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.pdf")
    print(f"in {folder}: {', '.join(figures)}, as png and pdf")


# ==== 2. The figures ==============================================================================


def plot_columns(panel, columns: dict[str, np.ndarray], names: list[str], title: str) -> None:
    """Columns of a log over epochs, those of the names that it has."""
    for name in names:
        if name in columns:
            unit = 255 if name == "eps" else 1
            panel.plot(columns["epoch"], unit * columns[name], label=name)
    panel.set(xlabel="epoch", ylabel=title)
    if panel.lines:
        panel.legend()


def figure_curves(figure, log: list[dict], results: dict) -> None:
    """Over epochs: accuracy (dotted: best), loss and its terms, attacks; then accuracy over eps."""
    names = list(log[0])  # epoch, lr, loss, terms of the loss, eps, steps, ...
    terms = names[2 : names.index("eps")]
    columns = {name: np.array([row[name] for row in log]) for name in names}
    figure.set_size_inches(9, 1.9)
    accuracy, loss, attack, over_eps = figure.subplots(1, 4)
    plot_columns(accuracy, columns, ["val_clean", "val_pgd"], "validation accuracy (%)")
    plot_columns(loss, columns, terms, "loss and terms (nats)")
    plot_columns(attack, columns, ["eps", "steps"], "radius (1/255), steps")
    best = results["best"]["epoch"]
    accuracy.axvline(best, color="0.5", lw=0.8, ls=":")

    measured = results.get("over_eps", {})
    radii = [int(radius) for radius in measured]
    over_eps.plot(radii, list(measured.values()), "o-", ms=3)
    over_eps.set(xlabel=r"attack radius $\epsilon$ (1/255)", ylabel="PGD-20 accuracy (%)")


def figure_sheet(figure, labels: list[str], columns: dict[str, Tensor]) -> None:
    """The columns that sheet() makes: pictures below each other, the weakest instance first."""
    figure.set_size_inches(0.95 * len(columns), 1.05 * len(labels))
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    panels = figure.subplots(len(labels), len(columns), subplot_kw=bare, squeeze=False)
    for column, (title, pictures) in zip(panels.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=7)
        for panel, picture in zip(column, pictures, strict=True):
            panel.imshow(picture.numpy(), cmap="magma")
    for panel, label in zip(panels[:, 0], labels, strict=True):
        panel.set_ylabel(label, fontsize=6)


def figure_gains(figure, rows: dict[str, dict[str, tuple[float, float]]]) -> None:
    """What each cell gains on plain, with 95% intervals over seeds; rows: of tables.gains."""
    figure.set_size_inches(6.5, 0.6 + 0.19 * len(rows))
    places = -np.arange(len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(panels, ("worst", "clean"), strict=True):
        means = []
        halves = []
        for row in rows.values():
            mean, half = row.get(name, (math.nan, 0.0))
            means.append(mean)
            halves.append(half)
        panel.errorbar(means, places, xerr=halves, fmt="o", ms=3, lw=1, color="C0")
        panel.axvline(0, color="0.3", lw=0.8)
        panel.set_yticks(places, list(rows))
        panel.set_ylim(places[-1] - 0.6, 0.6)
        panel.set_xlabel(f"gain in {name} accuracy (points)")


def figure_curve(figure, rows: list[tuple]) -> None:
    """Accuracy, its mean and standard deviation over seeds, against the time of a step.

    rows: (ms, cell, clean accuracies, worst accuracies) of tables.time_and_accuracy.
    """
    figure.set_size_inches(6.5, 2.4)
    clean_panel, worst_panel = figure.subplots(1, 2)
    for ms, cell, clean, worst in rows:
        for panel, values in ((clean_panel, clean), (worst_panel, worst)):
            mean = np.mean(values)
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0
            panel.errorbar(ms, mean, deviation, fmt="o", ms=3, color="C0")
            panel.annotate(
                cell,
                (ms, mean),
                xytext=(2, 2),
                rotation=50,
                textcoords="offset points",
                fontsize=6,
            )
    clean_panel.set(xlabel="ms per step", ylabel="clean accuracy (%)")
    worst_panel.set(xlabel="ms per step", ylabel="worst accuracy (%)")


# ==== 3. A run ====================================================================================


def from_weak_to_strong(net: nn.Module, x: Tensor, y: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(indices, leads) [rows] of images, from the least to the largest lead of the true class."""
    probabilities = I.predict(net, x).softmax(1)
    lead = I.margin(probabilities, y)
    places = torch.linspace(0, len(x) - 1, rows).long()
    chosen = lead.argsort()[places]
    return chosen, lead[chosen]


def pictures(student: nn.Module, x: Tensor, x_adv: Tensor, eps: float) -> dict[str, Tensor]:
    """{title: [rows,H,W,C]}: the images, attacked, and regenerated if the student does that."""
    width = 2 * eps if eps > 0 else 1.0  # black to white: -eps to eps
    perturbation = (x_adv - x) / width + 0.5
    images = {"clean": x, "perturbation": perturbation, "attacked": x_adv}
    if hasattr(student, "regenerated"):
        images["clean\nregenerated"] = student.regenerated(x)
        images["attacked\nregenerated"] = student.regenerated(x_adv)
    return {title: image.movedim(1, 3).clamp(0, 1) for title, image in images.items()}


def attention_pictures(net: nn.Module, name: str, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    """{title: [rows,H,W]}: attention at the last resolution but one; none of a net without maps."""
    taps = I.Taps(net, x)
    both = torch.cat([x, x_adv])
    I.predict(net, both)
    found = taps.of(both).values()
    taps.close()
    maps = [features for features in found if features.dim() == 4]
    if not maps:
        return {}
    features = maps[max(len(maps) - 2, 0)]
    attention = I.attention_map(features).unflatten(1, features.shape[-2:])
    clean, attacked = attention.chunk(2)
    return {f"{name}\nclean": clean, f"{name}\nattacked": attacked}


def sheet(run: I.Run, x: Tensor, y: Tensor, rows: int = 5) -> dict:
    """What figure_sheet shows: the weakest to the strongest image, attacked, with attention.

    x [N,C,H,W], y [N]; {labels: a text for each row, columns: {title: pictures}}. Ranked by the
    teacher, or by the student where there is none; attacked by PGD-20 on the student.
    """
    student = run.evaluated
    teacher = run.nets["teacher"]
    x = I.to_float(x, run.device)
    y = y.to(run.device)
    judge = student if teacher is None else teacher
    chosen, lead = from_weak_to_strong(judge, x, y, rows)
    x = x[chosen]
    y = y[chosen]
    eps = run.cfg.eps
    x_adv = I.pgd_ce(student, x, y, eps=eps, alpha=eps / 4, steps=20, init="none")

    columns = pictures(student, x, x_adv, eps)
    if teacher is not None:
        columns.update(attention_pictures(teacher, "teacher", x, x_adv))
    columns.update(attention_pictures(student, "student", x, x_adv))

    labels = []
    for label, value in zip(y.tolist(), lead.tolist(), strict=True):
        labels.append(f"{run.data.classes[label]}\nlead {value:+.2f}")
    columns = {title: image.cpu() for title, image in columns.items()}
    return {"labels": labels, "columns": columns}


def run_figures(folder: str | Path) -> None:
    """Draw a finished run as PNG and PDF, from its log, results and sheet alone."""
    out = Path(folder)
    I.require((out / "results.json").exists(), f"{out} holds no finished run (no results.json)")
    lines = (out / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    results = tables.read_json(out / "results.json")
    figures = {"curves": partial(figure_curves, log=log, results=results)}
    if (out / "sheet.pt").exists():
        content = I.load_tensors(out / "sheet.pt")
        figures["sheet"] = partial(figure_sheet, **content)
    draw(out / "figures", **figures)


def accuracy_over_eps(run: I.Run, x: Tensor, y: Tensor) -> dict[str, float]:
    """{radius in 1/255: accuracy in per cent under PGD-20 of this radius}."""
    accuracies = {}
    for radius in RADII:
        attack = I.repeatable(I.pgd_sat, run.device, eps=radius / 255)
        right = I.correct(run.evaluated, x, y, attack)
        accuracies[str(radius)] = I.percent(right)
    return accuracies


def illustrate(run: I.Run, results: dict) -> None:
    """Adds accuracy over eps and the sheet to a run that is done, and draws them."""
    out = Path(run.cfg.out)
    few = min(256, results["best"]["n"])
    x, y = I.test_images(run.data, few, run.device)
    results["over_eps"] = accuracy_over_eps(run, x, y)
    I.save(out / "results.json", results)
    I.save(out / "sheet.pt", sheet(run, x, y))
    if run.rank == 0:
        run_figures(out)


# ==== 4. Attention ================================================================================


def stage_maps(net: nn.Module, taps: I.Taps, x: Tensor, names: list[str]) -> list[Tensor]:
    """The feature maps [N,C,H,W] of the named stages on x."""
    I.predict(net, x)
    maps = taps.of(x)
    return [maps[name] for name in names]


def cosines(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Cosines [N] of the centred attention maps of two lists of stages, their mean over stages."""
    found = []
    for s, t in zip(a, b, strict=True):
        scores = I.attention_scores(s, t, 1.0)  # [N,N], each image with itself on the diagonal
        found.append(scores.diag())
    return torch.stack(found).mean(0)


def alike(student: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    """How alike student and teacher look at x and x', at the stages that InfoARD compares.

    {which two: cosines [N]}. The last pair takes the teacher's maps of another image: what maps
    have in common whatever they show.
    """
    info = I.InfoARD(student, teacher, image_shape=x.shape[1:], mim="infonce")
    stages = [pair for pair in info.pairs if pair[0] != "penultimate"]
    s_names = [s_name for s_name, _ in stages]
    t_names = [t_name for _, t_name in stages]
    s = stage_maps(student, info.student_taps, x, s_names)
    s_adv = stage_maps(student, info.student_taps, x_adv, s_names)
    t = stage_maps(teacher, info.teacher_taps, x, t_names)
    t_adv = stage_maps(teacher, info.teacher_taps, x_adv, t_names)
    info.student_taps.close()
    info.teacher_taps.close()

    another = [features.roll(1, 0) for features in t]
    return {
        "S(x), S(x')": cosines(s, s_adv),
        "S(x), T(x)": cosines(s, t),
        "S(x'), T(x)": cosines(s_adv, t),
        "S(x'), T(x')": cosines(s_adv, t_adv),
        "S(x), T(another)": cosines(s, another),
    }


def settings_of_run(folder: Path, given: dict) -> I.Config:
    """The settings of a finished run, with its teacher, and what was given on top of them."""
    made = tables.read_json(folder / "config.json")["settings"]
    names = ("teacher", "teacher_arch", "teacher_norm", "benchmark")
    settings = {name: made.get(name) for name in names}
    settings.update(given)
    cfg = I.Config(**cli.settings(str(folder / "best.pt"), settings))
    I.require(cfg.teacher, f"{folder} names no teacher: add --teacher")
    return cfg


def attention_of_run(folder: Path, given: dict) -> dict[str, float]:
    """The means of alike() over test images, for the best net of a run and PGD-20 on it."""
    cfg = settings_of_run(folder, given)
    device = I.pick_device(cfg.device)
    data = I.load_dataset(
        cfg.dataset, cfg.data_dir, download=cfg.download, image_size=cfg.image_size
    )
    images, labels = I.test_images(data, cfg.eval_subset, device)
    load = partial(I.load_teacher, num_classes=len(data.classes), size=images.shape[-1])
    student = load(str(folder / "best.pt"), device=device)
    teacher = load(
        cfg.teacher,
        cfg.teacher_arch,
        norm=cfg.teacher_norm,
        dataset=cfg.benchmark or cfg.dataset,
        device=device,
    )
    attack = I.repeatable(I.pgd_sat, device, eps=cfg.eps)

    parts = []
    for x, y in zip(images.split(256), labels.split(256), strict=True):
        x = I.to_float(x, device)
        with I.frozen_eval(student):
            x_adv = attack(student, x, y.to(device))
        parts.append(alike(student, teacher, x, x_adv))

    means = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts])
        means[name] = values.mean().item()
    return means


def run_attention(folder: str, **given) -> None:
    """How alike attention maps are, clean and under PGD-20 on the student, of student and teacher,
    for each run below a folder; --teacher: in the place of the one that a run names."""
    lines = []
    for cell, runs in tables.finished(folder).items():
        found = [attention_of_run(run, given) for run in runs.values()]
        names = list(found[0])
        texts = [tables.spread([means[name] for means in found]) for name in names]
        lines.append([cell, *texts, str(len(found))])
    header = ["cosine", *names, "seeds"]
    text = tables.markdown([header, *lines])
    I.save(Path(folder, "attention.md"), f"{text}\n".encode())
    print(text)


run_attention.takes = (
    "dataset data_dir download image_size benchmark teacher teacher_arch teacher_norm eps "
    "eval_subset device"
).split()
