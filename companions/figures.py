"""Finished runs as pictures: curves, sheets of images, gains, attention.

    python infoard.py figures DIR      a finished run as PNG and PDF
    python infoard.py attention DIR    where students and their teachers look, clean and attacked

    1  drawing    2  the figures    3  a run    4  attention

Matplotlib is imported when something is drawn. `draw(folder, name=function)` is all that another
module needs: function(figure) fills an empty figure.
"""

import json
import math
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import infoard as I
from companions import cells, cli, evaluation, tables

# ==== 1. Drawing ==================================================================================

STYLE = {
    "font.size": 8,
    "figure.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType, which journals ask for
}
FEW = 256  # test images that accuracy over eps is measured on
RADII = (0, 2, 4, 8, 12, 16, 24, 32, 64)  # of the curve of accuracy over eps, in 1/255
RIGHT, WRONG = "#1b7837", "#b2182b"  # colours of predictions
NAMES = {  # of columns of a log, as a paper has them
    "val_clean": "clean",
    "val_pgd": "PGD-20",
    "loss": "loss, all terms",
    "feat": "feature information",
    "att": "attention information",
    "rel": "relation term",
    "eps": "mean radius (1/255)",
    "steps": "mean attack steps",
}


def name_of_folder(folder: Path) -> str:
    """A folder in the one above, rslad/s0; nothing of runs/, of the clone, and of what is above."""
    names = []
    for place in (folder.absolute(), folder.absolute().parent):
        if place.name == "runs" or place == Path(I.__file__).absolute().parent:
            break
        names.append(place.name)
    return "/".join(reversed(names))


def name_of_run(folder: Path) -> str:
    """A run as its pictures call it: its folder, after what it trained if config.json says so.

    RSLAD + InfoARD (rslad/s0), or rslad/s0.
    """
    name = name_of_folder(folder)
    settings = cells.settings_of(folder)
    if not settings:
        return name
    trained = cells.name_of_settings(settings)
    return f"{trained} ({name})" if name else trained


def draw(folder: str | Path, **figures: Callable) -> None:
    """Each function of a figure as name.png and name.pdf in the folder; by the first rank alone.

    A figure without a title gets that of the run, or the runs, that the folder belongs to.
    """
    if I.world()[0] != 0:
        return
    import matplotlib.figure

    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name, fill in figures.items():
        with matplotlib.rc_context(STYLE):
            figure = matplotlib.figure.Figure(layout="constrained")
            fill(figure)
            if not figure.get_suptitle():
                figure.suptitle(name_of_run(folder.absolute().parent))
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.pdf")
    print(f"in {folder}: {', '.join(figures)}, as png and pdf")


# ==== 2. The figures ==============================================================================


def legend_above(panel) -> None:
    """A legend above a panel, where it hides nothing, if there is anything to explain."""
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def plot_columns(panel, columns: dict[str, np.ndarray], names: list[str], title: str) -> None:
    """Columns of a log over epochs, by the names that a paper has for them."""
    marker = "o" if len(columns["epoch"]) == 1 else ""  # one point makes no line
    for name in names:
        panel.plot(
            columns["epoch"], columns[name], marker=marker, ms=3, label=NAMES.get(name, name)
        )
    panel.set(xlabel="epoch", ylabel=title)
    panel.xaxis.get_major_locator().set_params(integer=True)
    legend_above(panel)


def plot_over_eps(panel, over_eps: dict[str, float], n: int) -> None:
    """Accuracy in per cent under PGD-20 of {radius in 1/255: accuracy}, with Wilson's interval."""
    radii = [int(radius) for radius in over_eps]
    accuracies = list(over_eps.values())
    ends = [evaluation.interval(accuracy / 100, n) for accuracy in accuracies]
    panel.plot(radii, accuracies, "o-", ms=3, label=f"last epoch, n = {n}")
    panel.fill_between(radii, *zip(*ends, strict=True), alpha=0.2, label="95% interval")
    panel.set(xlabel=r"attack radius $\epsilon$ (1/255)", ylabel="PGD-20 accuracy (%)")
    panel.set_ylim(bottom=0)
    legend_above(panel)


def figure_curves(figure, log: list[dict], results: dict) -> None:
    """Over epochs: accuracy (dotted: best), loss and its terms, attacks; then accuracy over eps.

    What was not measured, or never changed, has no panel.
    """
    names = list(log[0])  # epoch, lr, loss, terms of the loss, eps, steps, ...
    columns = {name: np.array([row[name] for row in log]) for name in names}
    columns["eps"] = 255 * columns["eps"]
    accuracies = [name for name in ("val_clean", "val_pgd") if name in columns]
    terms = names[2 : names.index("eps")]
    changing = [name for name in ("eps", "steps") if np.ptp(columns[name]) > 0.01]
    over_eps = results.get("over_eps")

    over_epochs = partial(plot_columns, columns=columns)
    fills = []
    if accuracies:
        fills.append(partial(over_epochs, names=accuracies, title="validation accuracy (%)"))
    fills.append(partial(over_epochs, names=terms, title="nats"))
    if changing:
        fills.append(partial(over_epochs, names=changing, title="attack in training"))
    if over_eps:
        n = min(FEW, results["best"]["n"])
        fills.append(partial(plot_over_eps, over_eps=over_eps, n=n))

    panels = figure.subplots(1, len(fills), squeeze=False)[0]
    figure.set_size_inches(2.4 * len(fills), 2.4)
    for panel, fill in zip(panels, fills, strict=True):
        fill(panel)
    if accuracies:
        best = results["best"]["epoch"]
        panels[0].axvline(best, color="0.5", lw=0.8, ls=":", label=f"best: epoch {best}")
        legend_above(panels[0])


def figure_sheet(
    figure,
    labels: list[str],
    columns: dict[str, Tensor],
    predictions: dict[str, list[tuple[str, bool]]] | None = None,
    caption: str = "",
) -> None:
    """The columns that sheet() makes: pictures below each other, the weakest instance first.

    predictions: {title of a column: (what the net says there, is it right) for each row}.
    """
    figure.set_size_inches(0.98 * len(columns), 1.13 * len(labels) + 0.8)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    panels = figure.subplots(len(labels), len(columns), subplot_kw=bare, squeeze=False)
    for column, (title, pictures) in zip(panels.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=7)
        for panel, picture in zip(column, pictures, strict=True):
            panel.imshow(picture.numpy(), cmap="magma")
        said = (predictions or {}).get(title, [])
        for panel, (text, right) in zip(column, said, strict=False):
            panel.set_xlabel(text, fontsize=6, color=RIGHT if right else WRONG, labelpad=2)
    for panel, label in zip(panels[:, 0], labels, strict=True):
        panel.set_ylabel(label, fontsize=6)
    if caption:
        width = round(21 * len(columns))
        figure.supxlabel(textwrap.fill(caption, width), fontsize=6, x=0.01, ha="left")


def figure_gains(
    figure,
    rows: dict[str, dict[str, list[float]]],
    title: str = "gain on plain",
    about: str = "",
) -> None:
    """What each row gains on plain, with 95% intervals over seeds; two seeds as points.

    rows: {name: what tables.gains says of a cell}; about: how it was measured, in words.
    """
    about = textwrap.fill(about, 150)
    figure.set_size_inches(6.5, 0.9 + 0.19 * len(rows) + 0.1 * about.count("\n"))
    figure.suptitle(title)
    places = -np.arange(len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(panels, ("worst", "clean"), strict=True):
        means = []
        halves = []
        for place, row in zip(places, rows.values(), strict=True):
            values = row.get(name, [math.nan])
            mean, half = tables.interval_shown(values)
            means.append(mean)
            halves.append(half)
            if len(values) == 2:
                panel.plot(values, [place, place], "o", ms=3, mfc="none", color="C0", lw=0)
        panel.errorbar(means, places, xerr=halves, fmt="o", ms=3, lw=1, color="C0")
        panel.axvline(0, color="0.3", lw=0.8)
        panel.set_yticks(places, list(rows))
        panel.set_ylim(places[-1] - 0.6, 0.6)
        shown = {"worst": "robust", "clean": "clean"}
        panel.set_xlabel(f"gain in {shown[name]} accuracy (points)")
    figure.supxlabel(about, fontsize=6, x=0.01, ha="left")


def apart(places: list[float], gap: float) -> list[float]:
    """Sorted places, moved as little as it takes until no two are nearer than gap."""
    groups = []  # of places that touch each other, each spread around its mean
    for place in places:
        groups.append([place])
        while len(groups) > 1:
            left, right = groups[-2:]
            between = np.mean(right) - np.mean(left)
            if between >= gap * (len(left) + len(right)) / 2 - 1e-9:
                break
            groups[-2:] = [[*left, *right]]
    moved = []
    for group in groups:
        steps = np.arange(len(group)) - (len(group) - 1) / 2
        moved.extend((np.mean(group) + gap * steps).tolist())
    return moved


def figure_curve(figure, rows: list[tuple]) -> None:
    """Accuracy, its mean and standard deviation over seeds, against the time of a step.

    rows: (ms, cell, clean accuracies, worst accuracies) of tables.time_and_accuracy.
    """
    figure.set_size_inches(6.5, 2.9)
    clean_panel, worst_panel = figure.subplots(1, 2)
    for ms, _, clean, worst in rows:
        for panel, values in ((clean_panel, clean), (worst_panel, worst)):
            mean = np.mean(values)
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0
            panel.errorbar(ms, mean, deviation, fmt="o", ms=3, lw=1, color="C0")
    rows = sorted(rows, key=lambda row: row[0])
    times = [row[0] for row in rows]
    gap = 0.045 * (max(times) - min(times))  # the height of a name, as the panels are wide
    for panel in (clean_panel, worst_panel):
        above = panel.get_xaxis_transform()  # x: ms, y: shares of the panel's height
        for (ms, cell, _, _), place in zip(rows, apart(times, gap), strict=True):
            panel.axvline(ms, color="0.85", lw=0.5, zorder=0)
            panel.annotate(
                cell,
                (ms, 1),
                xytext=(place, 1.1),
                xycoords=above,
                textcoords=above,
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=6,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.6", "shrinkA": 0},
            )
        panel.grid(axis="x", visible=False)
    clean_panel.set(xlabel="ms per step", ylabel="clean accuracy (%)")
    worst_panel.set(xlabel="ms per step", ylabel="robust accuracy (%)")
    told = "points: means over seeds; bars: standard deviations; robust: right under every attack"
    figure.supxlabel(told, fontsize=6)


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


def predictions_of(net: nn.Module, x: Tensor, y: Tensor, classes: list[str]) -> list[tuple]:
    """(the class that a net names and its probability, whether it is y) for each image."""
    probability, named = I.predict(net, x).softmax(1).max(1)
    said = []
    for p, k, label in zip(probability.tolist(), named.tolist(), y.tolist(), strict=True):
        said.append((f"{classes[k]} {p:.2f}", k == label))
    return said


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
    return {f"{name} attention\nclean": clean, f"{name} attention\nattacked": attacked}


def sheet(run: I.Run, x: Tensor, y: Tensor, rows: int = 5) -> dict:
    """What figure_sheet shows: the weakest to the strongest image, attacked, with attention.

    x [N,C,H,W], y [N]; {labels: a text for each row, columns: {title: pictures}, predictions,
    caption}. Ranked by the teacher, or by the student where there is none; attacked by PGD-20 on
    the student. What a net says stands below its maps, or what the student says below the images.
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
    classes = run.data.classes
    predictions = {}
    nets = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    for name, net in nets.items():
        maps = attention_pictures(net, name, x, x_adv)
        columns.update(maps)
        places = list(maps)
        if not maps and name == "student":
            places = ["clean", "attacked"]
        for place, seen in zip(places, (x, x_adv), strict=False):
            predictions[place] = predictions_of(net, seen, y, classes)

    labels = []
    for label, value in zip(y.tolist(), lead.tolist(), strict=True):
        labels.append(f"{classes[label]}\nmargin {value:+.2f}")
    columns = {title: image.cpu() for title, image in columns.items()}
    caption = caption_of_sheet("student" if teacher is None else "teacher", eps)
    return {"labels": labels, "columns": columns, "predictions": predictions, "caption": caption}


def caption_of_sheet(judge: str, eps: float) -> str:
    """What a sheet shows and at which scale."""
    radius = f"{255 * eps:.4g}/255"
    return (
        f"Rows: test images, from the least to the greatest margin of the {judge} (probability of "
        "the true class less the largest other, on the clean image). Attacked: PGD-20 on the "
        f"student (last epoch), radius {radius}. Perturbation: black -{radius}, grey 0, white "
        f"+{radius}, each colour by itself. Attention (last resolution but one): squares summed "
        "over channels, each map from its least value (black) to its greatest (yellow). Below: the "
        "class that the net of the column names and its probability, green if right, red if wrong."
    )


def run_figures(folder: str | Path) -> None:
    """Draws finished runs as PNG and PDF, from their logs, results and sheets alone.

    The run that a folder holds, or each of those below it. What they gain on each other is drawn by
    `compare`.
    """
    out = Path(folder)
    runs = [out]
    if not is_drawable(out):
        runs = drawable_below(out)
    for run in runs:
        draw_run(run)
    if runs != [out]:
        for line in cells.left_out(out):
            tables.show(line)
        tables.show(f"what they gain on each other: compare {out}")


def is_drawable(run: Path) -> bool:
    """Whether a folder holds what a run's pictures are made of."""
    return (run / "results.json").exists() and (run / "log.jsonl").exists()


def drawable_below(out: Path) -> list[Path]:
    """The runs below a folder that can be drawn; one line if there are none."""
    told = f"{out} holds no finished run (no results.json)"
    if (out / "results.json").exists():
        told = f"{out} has no log.jsonl, so there is nothing to draw its curves from"
    found = sorted({file.parent for file in out.rglob("results.json")})
    runs = [run for run in found if is_drawable(run)]
    if not found:
        told = "; ".join([f"{told}, nor does a folder below it", *cells.left_out(out)])
    elif not runs and found != [out]:
        told = f"{told}; those below it, {len(found)}, have no log.jsonl to draw curves from"
    I.require(runs, told)
    return runs


def draw_run(out: Path) -> None:
    """The pictures of one run."""
    lines = (out / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    results = cells.read_json(out / "results.json")
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
    few = min(FEW, results["best"]["n"])
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
    made = cells.read_json(folder / "config.json")["settings"]
    names = ("teacher", "teacher_arch", "teacher_norm", "benchmark")
    settings = {name: made.get(name) for name in names}
    settings.update(given)
    cfg = I.Config(**cli.settings(str(folder / "best.pt"), settings))
    told = f"{folder} does not say where its teacher lies: add --teacher, such as"
    I.require(cfg.teacher, f"{told} runs/teachers/NAME/best.pt if it was trained for this run")
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
    """How alike attention maps are, clean and under PGD-20 on the student, of student and teacher.

    S is the student, T the teacher, x an image, x' that image attacked. For each run below a
    folder; --teacher: in the place of the one that a run names. The table is printed, and written
    into that folder as attention.md.
    """
    lines = []
    folders = cells.finished(folder)
    names_of_rows = cells.names_of(list(folders), cells.read_settings(folders))
    for cell, runs in folders.items():
        if cells.is_teacher(cell):
            continue
        found = [attention_of_run(run, given) for run in runs.values()]
        names = list(found[0])
        texts = [tables.spread([means[name] for means in found]) for name in names]
        lines.append([names_of_rows[cell], *texts, str(len(found))])
    header = ["cosine", *names, "seeds"]
    text = "\n\n".join([tables.markdown([header, *lines]), *cells.left_out(folder)])
    tables.show(text)
    tables.keep(Path(folder), {"attention.md": f"{text}\n"})


run_attention.takes = (
    "dataset data_dir download image_size benchmark teacher teacher_arch teacher_norm eps "
    "eval_subset device"
).split()
