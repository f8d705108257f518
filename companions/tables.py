"""Finished runs as tables: accuracies over seeds, paired gains, accuracy beside time.

    python infoard.py tables DIR     the seeds of all runs below a folder, as Markdown and LaTeX
    python infoard.py compare DIR    what each of them gains on the plain one, with intervals
    python infoard.py curve DIR      what accuracy costs what time

    1  columns    2  text    3  pairs    4  tables    5  gains    6  accuracy beside time

A run is a folder with results.json: {which: result of evaluate}, where which is best, last, raw or
transfer; eval.json beside it, which `infoard.py eval --out` writes, is read as another, and stands
for a run where it is alone, as that of a stranger's checkpoint does. Runs in folders CELL/s0,
CELL/s1, ... or, as train names them, CELL-s0, CELL-s1, ... are the seeds of one cell. Each is
compared with the plain one of its seed: DIR/rslad/infoard/s0 with DIR/rslad/plain/s0, or wherever
the run lies whose config.json differs in InfoARD alone. Between functions runs travel as
{cell: {seed: run}}, and what config.json says of them as {cell: {seed: settings}}.
"""

import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

import infoard as I
from companions import protocol
from companions.cells import (
    finished,
    is_teacher,
    left_out,
    mixed_seeds,
    name_of_settings,
    names_of,
    partner_of,
    place_of,
    read,
    read_json,
    read_settings,
    reads_teacher,
    settings_of,
    some_names,
    test_images_of,
    unlike,
    unread_by,
)

# ==== 1. Columns ==================================================================================

# Attacks inside the L-infinity ball; `worst` is the worst of those that were run.
LINF = (
    "fgsm",
    "pgd_sat",
    "pgd_trades",
    "cw",
    "bim",
    "mifgsm",
    "mifgsm_t",
    "pgd_t",
    "pgd5_cw",
    "apgd",
    "aa",
)
# Attacks outside of it: L2, rotations and shifts, common corruptions.
OUTSIDE = (
    "pgd_l2",
    "pgd_l2_t",
    "apgd_l2",
    "aa_l2",
    "spatial",
    "corrupt",
    "noise",
    "shot",
    "impulse",
    "blur",
    "bright",
    "contrast",
    "pixelate",
    "jpeg",
)
QUALITY = ("psnr", "psnr_adv", "ssim", "ssim_adv")  # of regenerated images
COLUMNS = ("clean", *LINF, "worst", "worst_class", *OUTSIDE, *QUALITY)
# Their names in papers, as LaTeX.
PROPER = {
    "clean": "Clean",
    "fgsm": "FGSM",
    "pgd_sat": "PGD-20",
    "pgd_trades": r"PGD-20$_\mathrm{TRADES}$",
    "cw": r"CW$_\infty$",
    "bim": "BIM-10",
    "mifgsm": "MI-FGSM",
    "mifgsm_t": r"MI-FGSM$_\mathrm{targeted}$",
    "pgd_t": r"PGD-20$_\mathrm{targeted}$",
    "pgd5_cw": r"5$\times$PGD-20 + CW$_\infty$",
    "apgd": r"APGD-CE + APGD-T",
    "aa": "AutoAttack",
    "worst": "Worst",
    "worst_class": "Worst class",
    "pgd_l2": r"PGD-20-$L_2$",
    "pgd_l2_t": r"PGD-20-$L_2{}_\mathrm{,targeted}$",
    "apgd_l2": r"APGD-$L_2$",
    "aa_l2": r"AutoAttack-$L_2$",
    "spatial": "Spatial",
    "corrupt": "Corruptions",
    "noise": "Gaussian noise",
    "shot": "Shot noise",
    "impulse": "Impulse noise",
    "blur": "Gaussian blur",
    "bright": "Brightness",
    "contrast": "Contrast",
    "pixelate": "Pixelate",
    "jpeg": "JPEG",
    "psnr": "PSNR",
    "psnr_adv": r"PSNR$_\mathrm{adv}$",
    "ssim": "SSIM",
    "ssim_adv": r"SSIM$_\mathrm{adv}$",
    "gain": "Gain",
    "eps": r"$\epsilon$",
    "n": "$n$",
    "seeds": "Seeds",
    "teacher": "Teacher",
    "source": "Source",
}
BOOKKEEPING = ("n", "epoch")  # numbers in a result that are no column


def numbers(result: dict) -> dict[str, float]:
    """What a result says of accuracy and quality: its numbers, without the bookkeeping."""
    return {
        name: value
        for name, value in result.items()
        if type(value) in (int, float) and name not in BOOKKEEPING
    }


def columns_of(results: list[dict]) -> list[str]:
    """COLUMNS, and after `aa` whatever other numbers the results hold: attacks of anyone's own."""
    others = []
    for result in results:
        for name in numbers(result):
            if name not in COLUMNS and name not in others:
                others.append(name)
    place = COLUMNS.index("aa") + 1
    return [*COLUMNS[:place], *others, *COLUMNS[place:]]


def in_ball(name: str) -> bool:
    """Whether an attack may have a part in `worst`; one of anyone's own is taken to have."""
    return name in LINF or name not in COLUMNS


# ==== 2. Text =====================================================================================


def sizes(results: list[dict]) -> str:
    """On how many images the results were measured: 1000, or 1000/10000 if they differ."""
    return "/".join(sorted({f"{result['n']:.0f}" for result in results}))


def markdown(lines: list[list[str]]) -> str:
    """A table, its header first, as Markdown in aligned columns."""
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    rows = []
    for line in [lines[0], rule, *lines[1:]]:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        rows.append(f"| {' | '.join(padded)} |")
    return "\n".join(rows)


def escaped(text: str) -> str:
    """Text as LaTeX has it."""
    for sign in "%_&#":
        text = text.replace(sign, rf"\{sign}")
    return text.replace("±", r"$\pm$")


PACKAGES = r"% These tables need \usepackage{booktabs} and \usepackage{graphicx}."


def latex(lines: list[list[str]]) -> str:
    """The same table as LaTeX, for the package booktabs; columns have the names of papers."""
    header = [PROPER.get(name, escaped(name)) for name in lines[0]]
    rows = [[escaped(cell) for cell in line] for line in lines[1:]]
    header, *rows = [rf"{' & '.join(line)} \\" for line in [header, *rows]]
    text = "\n".join([header, r"\midrule", *rows])
    columns = "l" + "r" * (len(lines[0]) - 1)
    return f"\\begin{{tabular}}{{{columns}}} \\toprule\n{text}\n\\bottomrule \\end{{tabular}}"


def proper_word(found: re.Match) -> str:
    """A word of a caption as LaTeX: names of attacks and symbols as papers have them."""
    words = {
        **PROPER,
        "clean": "clean",  # words of sentences
        "gain": "gain",
        "seeds": "seeds",
        "teacher": "teacher",
        "source": "source",
        "apgd": "APGD-T",  # its two parts are told apart there
        "apgd-ce": "APGD-CE",
        "fab-t": "FAB-T",
        "eps": r"$\epsilon$",
        "L-infinity": r"$L_\infty$",
        "linf": r"$L_\infty$",
        "l2": "$L_2$",
        "x": r"$\times$",
    }
    return words.get(found.group(), escaped(found.group()))


def mean_in(cell: str) -> float:
    """The number that a cell begins with, or minus infinity."""
    try:
        return float(cell.partition(" ")[0])
    except ValueError:
        return -math.inf


def compared_rows(lines: list[list[str]], column: str, images: list | None) -> list[list[int]]:
    """The rows of a table, from 1, that can be compared in a column, in groups: those of equal n,
    eps and images (of each row, if they are known), for `worst` and what is made of it also of the
    same attacks.
    """
    places = [place for place, name in enumerate(lines[0]) if name in ("n", "eps")]
    groups = {}
    for row, line in enumerate(lines[1:], start=1):
        kind = [line[place] for place in places]
        kind.append(images[row - 1] if images else ())
        if column in ("worst", "worst_class", "gain"):
            kind.append(tuple(cell == "-" for cell in line))
        groups.setdefault(tuple(kind), []).append(row)
    return list(groups.values())


def best_in_bold(lines: list[list[str]], images: list | None = None) -> list[list[str]]:
    """The table with the highest mean of each column in bold, among rows that can be compared.

    All that share it are bold; nothing is where a column says the same of all.
    """
    rows = [list(line) for line in lines]
    for place, name in enumerate(lines[0]):
        if name in ("n", "eps", "seeds", "teacher", "source") or place == 0:
            continue
        for group in compared_rows(lines, name, images):
            means = {row: mean_in(lines[row][place]) for row in group}
            known = [mean for mean in means.values() if mean > -math.inf]
            if len(set(known)) < 2:
                continue
            for row, mean in means.items():
                if mean == max(known):
                    rows[row][place] = rf"\textbf{{{rows[row][place]}}}"
    return rows


def without_zero_in_bold(lines: list[list[str]]) -> list[list[str]]:
    """A table of gains with those in bold whose interval, mean ± half, leaves zero out."""
    rows = []
    for line in lines:
        cells = []
        for cell in line:
            mean, interval, half = cell.partition(" ± ")
            shown = interval and abs(float(mean)) > float(half)
            cells.append(rf"\textbf{{{cell}}}" if shown else cell)
        rows.append(cells)
    return rows


def label_of(folder: str | Path, *words: str) -> str:
    """What a table of a folder is called in LaTeX: tab:cpu-best."""
    name = "-".join([Path(folder).resolve().name, *words])
    return "tab:" + re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


NO_WIDER = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def latex_table(lines: list[list[str]], caption: str, label: str) -> str:
    """A whole table environment with caption and label, made smaller if it is wider than a line."""
    about = re.sub(r"[A-Za-z0-9_-]+", proper_word, caption)
    about = about.replace("%", r"\%").replace("±", r"$\pm$")
    head = [r"\begin{table}", r"\centering", rf"\caption{{{about}}}", rf"\label{{{label}}}"]
    head += [r"\small", r"\setlength{\tabcolsep}{4pt}", NO_WIDER]
    return "\n".join([*head, f"{latex(lines)}}}", r"\end{table}"])


def spread(values: list[float | None]) -> str:
    """The mean and, of more than one value, the standard deviation over seeds."""
    if not values or None in values:
        return "-"
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    return text


# ==== 3. Pairs ====================================================================================


def radii_of(result: dict) -> dict[str, float]:
    """{norm: radius} under which a result was found, as far as it says so itself."""
    radii = {}
    for attack in result.get("about", {}).get("attacks", {}).values():
        if attack.get("eps") is not None:
            radii[attack["norm"]] = attack["eps"]
    return radii


def how_measured(result: dict) -> list:
    """What must be equal in two results that are compared."""
    settings = result.get("settings", {})
    name = Path(result.get("checkpoint", "")).name
    kind = [word for word in ("best", "last") if name.startswith(word)]  # of a run's two files
    radii = [settings.get("eps"), settings.get("eps_l2")]
    return [result["n"], kind, *radii, settings.get("teacher_nat")]


def list_of(result: dict) -> str | None:
    """The hash of the list of images that a result is of, if it says so."""
    return result.get("about", {}).get("images", {}).get("list_sha256")


def comparable(a: dict, b: dict) -> bool:
    """Whether two results are of the same images, as far as they say so, of as many, of the same
    radii, kind of checkpoint and source.
    """
    if list_of(a) and list_of(b) and list_of(a) != list_of(b):
        return False
    mine, theirs = radii_of(a), radii_of(b)
    same_radii = all(mine[norm] == theirs[norm] for norm in mine.keys() & theirs.keys())
    return same_radii and how_measured(a) == how_measured(b)


def subtracted(result: dict, base: dict) -> dict[str, float]:
    """n, and in points what a result has more than a base in each number that both have.

    `worst` and `worst_class` count only if both are the worst of the same attacks. Results are kept
    with two decimals, which is exact if n divides 10,000 (500, 1,000, 10,000 images); else a
    difference, and so a mean of differences, is off by at most 0.01 points.
    """
    mine = numbers(result)
    theirs = numbers(base)
    same_attacks = not any(in_ball(name) for name in mine.keys() ^ theirs.keys())
    difference = {"n": result["n"]}
    for name in mine:
        if name in theirs and (same_attacks or name not in ("worst", "worst_class")):
            difference[name] = mine[name] - theirs[name]
    return difference


def paired(
    results: dict, which: str, to: str, made: dict | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """{cell: {seed: n and differences}} to the run called `to` of the same seed, where comparable.

    made: the settings of runs, by which those are paired that no cell of that name stands beside.
    """
    found = {}
    for cell, its_runs in results.items():
        for seed, run in its_runs.items():
            partner = partner_of(cell, seed, to, results, made or {})
            if partner is None:
                continue
            result = run.get(which)
            base = results[partner[0]][partner[1]].get(which)
            if result and base and comparable(result, base):
                found.setdefault(cell, {})[seed] = subtracted(result, base)
    return found


# ==== 4. Tables ===================================================================================


def mean_interval(values: list[float]) -> tuple[float, float]:
    """The mean m and half the width h of its 95% interval, over seeds; h is nan for one value.

    h = t s / sqrt(n), s the standard deviation, t Student's quantile 0.975 for n - 1 degrees
    """
    if len(values) == 1:
        return float(values[0]), math.nan
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(quantile * stats.sem(values))


# Two equal differences would have an interval of no width, and two others have one of 12.7
# standard errors: of fewer seeds than these no interval is shown.
SEEDS_OF_AN_INTERVAL = 3


def interval_shown(values: list[float]) -> tuple[float, float]:
    """mean_interval of gains of seeds; half a width of nan where they are fewer than three."""
    mean, half = mean_interval(values)
    if len(values) < SEEDS_OF_AN_INTERVAL:
        half = math.nan
    return mean, half


def without_interval(values: list[float]) -> str:
    """The mean gain of one seed or two; of two also that of each: +2.00 (+1.00, +3.00)."""
    text = f"{np.mean(values):+.2f}"
    if len(values) == 2:
        text += f" ({values[0]:+.2f}, {values[1]:+.2f})"
    return text


def with_half(values: list[float]) -> str:
    """The mean gain and half its interval, for tables of gains alone: +2.00 ± 0.50."""
    mean, half = interval_shown(values)
    if math.isnan(half):
        return without_interval(values)
    return f"{mean:+.2f} ± {half:.2f}"


def with_ends(values: list[float]) -> str:
    """The mean gain and its interval, where ± is a deviation: +2.00 [+1.50, +2.50]."""
    mean, half = interval_shown(values)
    if math.isnan(half):
        return without_interval(values)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def table_row(results: list[dict], columns: list[str], gains: list[dict]) -> dict[str, str]:
    """{column: text} of one cell, from the results of its seeds and what they gain."""
    row = {name: spread([result.get(name) for result in results]) for name in columns}
    if len(results) == 1:
        for name, deviation in results[0].get("sd", {}).items():
            row[name] = f"{results[0][name]:.2f} ± {deviation:.2f}"
    for name in ("teacher", "source"):
        row[name] = "; ".join(dict.fromkeys(of_others(result, name) for result in results))
    gained = [gain["worst"] for gain in gains if "worst" in gain]
    row["gain"] = with_ends(gained) if gained else "-"
    row["n"] = sizes(results)
    row["seeds"] = str(len(results))
    if "source" in results[0]:
        row["seeds"] = "-"  # those of other people are not counted here
    return row


def of_others(result: dict, name: str) -> str:
    """The teacher or the source that a result of other people names."""
    if "source" not in result:
        return "-"
    text = result.get(name, "-")
    if name == "source" and result.get("second_hand"):
        text += f" (second hand: {', '.join(result['second_hand'])})"
    return text


def says_something(column: str, texts: list[str]) -> bool:
    """Whether a column is worth its place in a table."""
    if column == "eps":
        return len(set(texts)) > 1
    nothing = ("1", "-") if column == "seeds" else ("-",)
    return any(text not in nothing for text in texts)


def table(results: dict, which: str = "best", made: dict | None = None) -> list[list[str]]:
    """A header and a line for each cell of {cell: {seed: {which: result}}}.

    The gain is that of `worst` on the plain run of the same seed. Columns that say nothing are left
    out, and eps where all rows have the same; results of other people have their teacher and their
    source last. made: settings of the runs.
    """
    made = made or {}
    shown = shown_in(results, which)
    gains = paired(results, which, "plain", made)
    columns = columns_of([result for measured in shown.values() for result in measured])
    radii = radii_in_words(shown, made)

    rows = {}
    for cell, measured in shown.items():
        rows[cell] = table_row(measured, columns, list(gains.get(cell, {}).values()))
        rows[cell]["eps"] = radii[cell]

    used = []
    for column in [*columns, "gain", "n", "eps", "seeds", "teacher", "source"]:
        if says_something(column, [row[column] for row in rows.values()]):
            used.append(column)
    names = names_of(list(rows), made)
    lines = [[names[cell], *(row[column] for column in used)] for cell, row in rows.items()]
    return [[f"{which} (%)", *used], *lines]


def shown_in(results: dict, which: str) -> dict[str, list[dict]]:
    """{cell: results of its seeds} of the cells that have any of this kind."""
    shown = {}
    for cell, runs in results.items():
        measured = [run[which] for run in runs.values() if which in run]
        if measured:
            shown[cell] = measured
    return shown


def radii_in_words(shown: dict[str, list[dict]], made: dict) -> dict[str, str]:
    """{cell: the radii of its attacks}: 8/255, L2 0.5; - if they were not kept."""
    found = {}
    for cell, measured in shown.items():
        texts = []
        for result in measured:
            radii = radii_of(result)
            eps = result.get("about", {}).get("eps", result.get("settings", {}).get("eps"))
            if eps is None and "checkpoint" not in result:  # no evaluation of other settings
                eps = next(
                    (made_by["eps"] for made_by in made.get(cell, {}).values() if made_by), None
                )
            if not radii and eps is not None:
                radii["linf"] = eps
            for norm, radius in radii.items():
                text = protocol.length(radius, norm)
                texts.append(text if norm == "linf" else f"L2 {text}")
        found[cell] = ", ".join(dict.fromkeys(texts)) or "-"
    return found


def protocols_of(shown: dict[str, list[dict]]) -> list[str]:
    """What the attacks of results do, a text for each norm and radius, and then for their starts.

    shown: {name of a row: results}. Where rows differ in the radius, it says whose it is.
    """
    balls, every = {}, {}
    for row, measured in shown.items():
        for result in measured:
            attacks = result.get("about", {}).get("attacks", {})
            every.update(attacks)
            for name, attack in attacks.items():
                ball = attack["norm"], attack.get("eps")
                words, rows = balls.setdefault(ball, ([], []))
                words.append(protocol.in_full(name, attack))
                rows.append(row)

    norms = [norm for norm, _ in balls]
    texts = []
    for (norm, eps), (words, rows) in balls.items():
        text = f"{protocol.in_ball(norm, eps)}: {', '.join(dict.fromkeys(words))}"
        if norms.count(norm) > 1:
            text = f"rows {some_names(list(dict.fromkeys(rows)))} at {text}"
        texts.append(text)
    starts = protocol.of_starts({"attacks": every})
    return [*texts, starts] if starts else texts


WHICH = {  # in the order of tables: what nobody has chosen is first
    "last": "the last epoch",
    "best": "the checkpoint chosen on validation images",
    "raw": "the last epoch, without the averaging of weights",
    "transfer": "attacks made on an undefended net",
    "eval": "evaluated afterwards",
    "teacher": "trained for the runs above, the checkpoint chosen on validation images",
}


def what_is_shown(which: str, results: dict, made: dict) -> str:
    """Which checkpoint the rows of a table are, in words."""
    found = [run for runs in results.values() for run in runs.values() if which in run]
    text = WHICH[which]
    if found and all("source" in run[which] for run in found):
        return "as published by others"
    if which == "eval":
        nets = sorted({Path(run["eval"].get("checkpoint", "")).name for run in found} - {""})
        return f"{text}: {some_names(nets)}" if nets else text
    known = [settings for runs in made.values() for settings in runs.values() if settings]
    if which == "best" and known and all(settings["val_size"] == 0 for settings in known):
        return "the last epoch, as there were no validation images"
    if which == "best" and all(run.get("last") == run["best"] for run in found):
        return f"{text}: the last epoch"
    return text


def images_in_words(every: list[dict]) -> str:
    """Of how many images results are, and how these were chosen."""
    abouts = [result.get("about", {}) for result in every]
    text = f"n = {sizes(every)}"
    totals = sorted({about["of"] for about in abouts if "of" in about})
    if totals:
        text += f" of {'/'.join(map(str, totals))}"
    text += " test images"
    chosen = {about.get("chosen") for about in abouts}
    if len(chosen) == 1 and None not in chosen:
        text += f", {chosen.pop()}"
    of_a_class = [about["worst_class_n"] for about in abouts if "worst_class_n" in about]
    if of_a_class and min(of_a_class) < 100:
        text += f"; worst_class is of {min(of_a_class)} images, too few to compare"
    return text


def under_what(shown: dict[str, list[dict]], names: dict[str, str], made: dict) -> list[str]:
    """Of how many images {cell: results of its seeds} are, and under which attacks and radii."""
    parts = [images_in_words([result for measured in shown.values() for result in measured])]
    ours = [cell for cell, measured in shown.items() if "source" not in measured[0]]
    of_others = []
    if not ours:
        of_others.append("eps: as in the source of a row")
    elif len(ours) < len(shown):
        of_others.append("eps of rows with a source: as there")
    attacks = protocols_of({names[cell]: measured for cell, measured in shown.items()})
    if attacks:
        return parts + attacks + of_others
    radii = radii_in_words(shown, made)
    known = sorted({radii[cell] for cell in ours} - {"-"})
    if ours:
        parts.append(f"L-infinity eps {', '.join(known) or 'not kept'}")
    return parts + of_others


def measured_how(which: str, results: dict, made: dict) -> str:
    """n, eps and what the attacks do, of the table of one kind of result."""
    shown = shown_in(results, which)
    names = names_of(list(shown), made)
    parts = under_what(shown, names, made)
    others = []
    for cell, measured in shown.items():
        if "source" in measured[0] or cell.startswith("published/"):
            others.append(names[cell])
    if others:
        text = f"of other people, as published: {some_names(others)}"
        if len(others) < len(shown):
            parts.append(text)
    what = what_is_shown(which, results, made)
    return f"{which} ({what}): accuracy in per cent; {'; '.join(parts)}"


TWO_SEEDS = "two seeds: no interval, in parentheses the gain of each"


def signs_in_words(tables: list[list[list[str]]]) -> list[str]:
    """What ±, brackets and parentheses mean in tables of accuracy, one line, if they occur."""
    gained = []
    over_seeds, told_by_source = False, False
    for header, *rows in tables:
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            gained.append(cells.get("gain", "-"))
            if any("±" in cells[name] for name in header[1:]):
                of_source = cells.get("source", "-") != "-"
                over_seeds = over_seeds or not of_source
                told_by_source = told_by_source or of_source

    parts = []
    deviation = "± is the standard deviation over seeds"
    if over_seeds and told_by_source:
        parts.append(f"{deviation}, of a row with a source the one that it reports")
    elif told_by_source:
        parts.append(f"{deviation} that the source reports")
    elif over_seeds:
        parts.append(deviation)
    if any(text != "-" for text in gained):
        parts.append("gain: worst less that of the plain run of the same seed")
    if any("[" in text for text in gained):
        parts.append("[..]: 95% interval of the mean gain over seeds (Student's t)")
    if any("(" in text for text in gained):
        parts.append(TWO_SEEDS)
    return ["; ".join(parts)] if parts else []


def images_of(cell: str, measured: list[dict], made: dict) -> tuple:
    """What rows must have in common to be compared: test images; of other people's numbers the
    folder, DATASET-STUDENT/METHOD/SOURCE."""
    if "source" in measured[0]:
        return (cell.rpartition("/")[0].rpartition("/")[0],)
    return test_images_of(made.get(cell, {}))


def masking_warnings(folders: dict, results: dict, folder: str) -> list[str]:
    """A line for each warning that evaluations of a run gave, with the checkpoints it is of."""
    found = {}
    for cell, runs in results.items():
        for seed, run in runs.items():
            place = place_of(folders[cell][seed], Path(folder))
            for which in ("last", "best", "eval"):
                for warning in run.get(which, {}).get("warnings", []):
                    found.setdefault((place, warning), []).append(which)
    lines = []
    for (place, warning), kinds in found.items():
        lines.append(f"warning, gradients may be masked: {place}, {' and '.join(kinds)}: {warning}")
    return lines


def show(text: str) -> None:
    """Prints; a reader who has seen enough, as head has, is no mistake."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep(folder: Path, files: dict[str, str]) -> None:
    """Writes {name: text} into a folder, but not what is there already, and says so."""
    changed = []
    for name, text in files.items():
        file = folder / name
        if file.exists() and file.read_text() == text:
            continue
        try:
            I.save(file, text.encode())
        except I.InfoardError as error:  # a folder to be read only: what is printed is enough
            show(f"\nnot written: {str(error).partition(';')[0]}")
            return
        changed.append(name)
    if changed:
        show(f"\nwritten in {folder}: {', '.join(changed)}")
    else:
        show(f"\nas it was in {folder}: {', '.join(files)}")


def run_tables(folder: str) -> None:
    """Tables of the runs below a folder, over their seeds (CELL/s0, CELL/s1 or CELL-s0, CELL-s1).

    They are printed, and written into that folder as tables.md, tables.tex (LaTeX, which needs
    booktabs and graphicx) and tables.jsonl (all that was measured). A teacher that a run has
    trained has a table of its own.
    """
    folders = finished(folder)
    results = read(folders)
    made = read_settings(folders)
    students = {cell: runs for cell, runs in results.items() if not is_teacher(cell)}
    teachers = {}
    for cell, runs in results.items():
        if is_teacher(cell):
            shown_of = {seed: run.get("best", run.get("eval")) for seed, run in runs.items()}
            teachers[cell] = {seed: {"teacher": result} for seed, result in shown_of.items()}
    shown = {which: students for which in WHICH if which != "teacher"}
    shown["teacher"] = teachers
    made_tables = {which: table(rows, which, made) for which, rows in shown.items()}
    same = made_tables["last"][1:] == made_tables["best"][1:]
    if same:
        del made_tables["best"]  # the last epoch was the best
    made_tables = {which: lines for which, lines in made_tables.items() if len(lines) > 1}
    about = {which: measured_how(which, shown[which], made) for which in made_tables}
    if same and "last" in about:
        about["last"] += f"; best ({what_is_shown('best', students, made)}) has the same numbers"

    parts = [markdown(lines) for lines in made_tables.values()]
    remarks = [
        *left_out(folder),
        *mixed_seeds(made),
        *masking_warnings(folders, results, folder),
    ]
    signs = signs_in_words(list(made_tables.values()))
    parts.append("\n".join([*about.values(), *signs, *remarks]))
    rows = [json.dumps({"cell": cell, "seeds": runs}) for cell, runs in results.items()]
    latex_tables = []
    for which, lines in made_tables.items():
        bold = "Best in bold, among rows of equal n, eps, images and, for worst, attacks"
        rows_shown = shown_in(shown[which], which)
        images = [images_of(cell, found, made) for cell, found in rows_shown.items()]
        label = label_of(folder, which)
        shown_best = best_in_bold(lines, images)
        caption = "; ".join([about[which], *signs_in_words([lines])])
        latex_tables.append(latex_table(shown_best, f"{caption}. {bold}.", label))
    text = "\n\n".join(parts)
    show(text)
    files = {
        "tables.md": f"{text}\n",
        "tables.tex": "\n\n".join([PACKAGES, *latex_tables]) + "\n",
        "tables.jsonl": "\n".join(rows) + "\n",
    }
    keep(Path(folder), files)


# ==== 5. Gains ====================================================================================


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number that all rows have."""
    common = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in common}


def pooled(cells: dict[str, dict]) -> dict[str, dict]:
    """Means over n > 1 cells a/b/c, called "a/*/c (n)", for each seed that all of them have."""
    groups = {}
    for cell, seeds in cells.items():
        name = re.sub(r"[^/]+/([^/]+)$", r"*/\1", cell)
        groups.setdefault(name, []).append(seeds)

    found = {}
    for name, group in groups.items():
        if len(group) == 1:
            continue
        for seed in group[0]:
            if all(seed in seeds for seeds in group):
                rows = [seeds[seed] for seeds in group]
                found.setdefault(f"{name} ({len(group)})", {})[seed] = means(rows)
    return found


def differences(results: dict, which: str, to: str, made: dict | None = None) -> dict[str, dict]:
    """What paired() finds, and the means over cells of the same name that pooled() makes of it."""
    cells = paired(results, which, to, made)
    return cells | pooled(cells)


def gains(cells: dict[str, dict]) -> dict[str, dict[str, list[float]]]:
    """{cell: {column: the gain of each seed}} of the columns that all its seeds have."""
    rows = {}
    for cell, seeds in cells.items():
        found = list(seeds.values())
        rows[cell] = {
            name: [difference[name] for difference in found]
            for name in columns_of(found)
            if all(name in difference for difference in found)
        }
    return rows


def gain_table(cells: dict[str, dict], title: str, made: dict | None = None) -> list[list[str]]:
    """A header, and for each cell its gains, the images and the number of seeds."""
    rows = gains(cells)
    columns = columns_of([difference for seeds in cells.values() for difference in seeds.values()])
    used = [name for name in columns if any(name in row for row in rows.values())]
    names = names_of(list(rows), made or {})

    lines = [[title, *used, "n", "seeds"]]
    for cell, row in rows.items():
        texts = [with_half(row[name]) if name in row else "-" for name in used]
        seeds = cells[cell]
        lines.append([names[cell], *texts, sizes(list(seeds.values())), str(len(seeds))])
    return lines


def compare_tables(
    results: dict, made: dict | None = None
) -> dict[tuple[str, str], list[list[str]]]:
    """{(which, to): table}: the gain on plain, then on uniform, of last, best and eval; without
    those seen before."""
    tables = {}
    for to in ("plain", "uniform"):
        for which in ("last", "best", "eval"):
            cells = differences(results, which, to, made)
            lines = gain_table(cells, f"gain of {which} on {to} (points)", made)
            seen = [shown[1:] for shown in tables.values()]  # best is not shown where it is last
            if cells and lines[1:] not in seen:
                tables[which, to] = lines
    return tables


def gained_how(which: str, to: str, results: dict, made: dict) -> str:
    """n, eps and what its signs are, of a table of gains, for the caption of its LaTeX."""
    cells = [cell for cell in differences(results, which, to, made) if cell in results]
    shown = {cell: shown_in(results, which)[cell] for cell in cells}
    on = {"plain": "the plain run", "uniform": "the run of one radius for all images"}[to]
    about = f"{which} ({what_is_shown(which, results, made)}): gain on {on} of the same seed"
    parts = under_what(shown, names_of(cells, made), made)
    counts = {len(differences(results, which, to, made)[cell]) for cell in cells}
    if max(counts) >= SEEDS_OF_AN_INTERVAL:
        parts.append(
            "± is half a 95% interval of the mean over seeds (Student's t), in bold where it "
            "leaves zero out"
        )
    if 2 in counts:
        parts.append(TWO_SEEDS)
    if max(counts) == 1:
        parts.append("one seed: no interval")
    return f"{about}, in points of accuracy; {'; '.join(parts)}."


PAIRS = (
    "two runs that differ in --no-infoard alone, with the same --seed and settings (their "
    "config.json says so), or folders NAME/plain/s0 and NAME/infoard/s0"
)


def why_unpaired(results: dict, made: dict, folder: str) -> str:
    """Why nothing below a folder can be compared, in one line, and what would be."""
    told = f"nothing to compare below {folder}: it takes {PAIRS}, evaluated on as many images"
    of_info, plain = [], []
    for cell, runs in results.items():
        for seed in runs:
            settings = made.get(cell, {}).get(seed, {})
            if settings.get("infoard"):
                of_info.append((cell, settings))
            elif settings:
                plain.append((cell, settings))
    if of_info and not plain:
        return f"{told}; no run here is plain (--no-infoard)"
    nearest = None
    for cell, mine in of_info:
        for other, theirs in plain:
            names = unlike(mine, theirs, unread_by("plain", mine))
            if nearest is None or len(names) < len(nearest[2]):
                nearest = cell, other, names
    if nearest:
        cell, other, names = nearest
        differ = some_names([I.flag_of(name) for name in names]) or "the images or attacks"
        told += f"; the nearest, {cell} and {other}, differ in {differ}"
    return told


def pairs_in_words(results: dict, made: dict) -> list[str]:
    """A line for each cell whose partner was found by its settings, not by the name of a folder."""
    lines = {}
    for to in ("plain", "uniform"):
        for cell, runs in results.items():
            for seed in runs:
                partner = partner_of(cell, seed, to, results, made)
                if partner and Path(partner[0]).name != to:
                    lines[f"compared by their settings: {cell} with {partner[0]}"] = True
    return list(lines)


def other_teachers(results: dict, made: dict) -> list[str]:
    """Lines that name the cells which learned from another teacher, or on other data, than their
    partners, as far as the hashes in their config.json tell."""
    told = {}
    for to in ("plain", "uniform"):
        for cell, runs in results.items():
            for seed in runs:
                partner = partner_of(cell, seed, to, results, made)
                if partner is None:
                    continue
                mine = made.get(cell, {}).get(seed, {})
                theirs = made.get(partner[0], {}).get(partner[1], {})
                what = []
                if reads_teacher(theirs) and different_hashes(mine, theirs, "teacher"):
                    hashes = f"sha256 {mine['teacher'][:8]} and {theirs['teacher'][:8]}"
                    what.append(f"another teacher file than {partner[0]} ({hashes})")
                if different_hashes(mine, theirs, "data"):
                    what.append(f"other data than {partner[0]}")
                for one in what:
                    told.setdefault(one, {})[cell] = True
    return [f"warning: {', '.join(cells)} learned from {what}" for what, cells in told.items()]


def of_rounding(tables: list[list[list[str]]]) -> list[str]:
    """A line if gains are of numbers of images of which two decimals are not exact."""
    counts = set()
    for header, *rows in tables:
        for row in rows:
            counts.update(row[header.index("n")].split("/"))
    rounded = sorted((n for n in counts if 10_000 % int(n) != 0), key=int)
    if not rounded:
        return []
    told = "accuracies are kept with two decimals, so gains may be off by 0.01"
    return [f"n = {', '.join(rounded)}: {told}"]


def different_hashes(a: dict, b: dict, name: str) -> bool:
    """Whether two settings hold fingerprints of files, not their paths, and these differ."""
    found = [a.get(name), b.get(name)]
    hashed = all(isinstance(one, dict) or re.fullmatch("[0-9a-f]{64}", one or "") for one in found)
    return hashed and found[0] != found[1]


def on_which_bases(results: dict, made: dict) -> str:
    """On what runs gain, for the title of a picture: gain on plain AdaAD."""
    bases = {}
    for cell, runs in results.items():
        for seed in runs:
            partner = partner_of(cell, seed, "plain", results, made)
            settings = made.get(partner[0], {}).get(partner[1]) if partner else None
            if settings:
                bases[name_of_settings(settings)] = True
    if not bases:
        return "gain on the plain runs"
    return f"gain on plain {some_names(list(bases))}"


def teachers_in_words(folders: list[Path]) -> str:
    """The teachers that config.json names in some runs, by the ends of their paths."""
    names = {}
    for folder in folders:
        settings = settings_of(folder)
        if not settings or not reads_teacher(settings) and not settings["infoard"]:
            continue
        given = read_json(folder / "config.json")["settings"].get("teacher")
        names["/".join(Path(given).parts[-3:]) if given else "trained for the runs"] = True
    return some_names(list(names)) or "not kept"


def attacks_in_words(measured: list[dict]) -> str:
    """Under what an image must be right to count as robust in some results."""
    used = [[name for name in numbers(result) if in_ball(name)] for result in measured]
    names = {}
    for attacks in used:
        names.update(dict.fromkeys(attacks))
    text = ", ".join(PROPER.get(name, name) for name in names) or "every attack"
    alike = all(set(attacks) == set(names) for attacks in used)
    return text if alike else f"those of {text} that a row was put to"


def picture_in_words(which: str, folders: dict, results: dict, made: dict) -> str:
    """What the picture of gains shows: checkpoint, seeds, attacks, radius, images, teachers."""
    pairs = paired(results, which, "plain", made)
    shown, measured, runs = {}, [], []
    for cell, seeds in pairs.items():
        shown[cell] = [results[cell][seed][which] for seed in seeds]
        measured += shown[cell]
        runs += [folders[cell][seed] for seed in seeds]

    counts = sorted({len(seeds) for seeds in pairs.values()})
    bars = "one seed, no intervals"
    if counts[-1] == 2:
        bars = "two seeds: no intervals, hollow points are the gains of each"
    elif counts[-1] > 2:
        ends = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
        bars = f"bars: 95% intervals over {ends} seeds"
        if 2 in counts:
            bars += ", of two seeds the gains of each as hollow points"
    radii = sorted({*radii_in_words(shown, made).values()} - {"-"})
    return (
        f"Gain on the plain run of the same seed ({what_is_shown(which, results, made)}); {bars}. "
        f"Robust: right under {attacks_in_words(measured)}; eps {', '.join(radii) or 'not kept'}; "
        f"on {sizes(measured)} test images. Teacher: {teachers_in_words(runs)}."
    )


def gains_in_words(tables: list[list[list[str]]]) -> list[str]:
    """What ± and parentheses are in tables of gains, by the numbers of their seeds."""
    counts = {int(row[-1]) for _, *rows in tables for row in rows}
    lines = []
    if max(counts) >= SEEDS_OF_AN_INTERVAL:
        lines.append("± is half a 95% interval of the mean gain, over seeds (Student's t)")
    if 2 in counts:
        lines.append(TWO_SEEDS)
    if not lines:
        lines.append("one seed for each")
    if max(counts) < SEEDS_OF_AN_INTERVAL:
        lines[-1] += "; three or more (--seed 1, 2, ...) give 95% intervals"
    return lines


def run_compare(folder: str) -> None:
    """What runs below a folder gain on their plain partners, and on those of uniform radii.

    Partners are runs that differ in --no-infoard (or --asa uniform) alone, wherever they lie, or
    cells named plain and uniform beside a cell: NAME/infoard/s0 and NAME/plain/s0. Differences are
    paired by seed, in points, with 95% intervals over three and more seeds. They are printed, and
    written into that folder as compare.md, compare.tex (LaTeX, which needs booktabs and graphicx)
    and figures/gains (png and pdf).
    """
    from companions import figures

    folders = finished(folder)
    results = {cell: runs for cell, runs in read(folders).items() if not is_teacher(cell)}
    made = read_settings(folders)
    tables = compare_tables(results, made)
    I.require(tables, why_unpaired(results, made, folder))
    about = gains_in_words(list(tables.values()))
    about += [
        *left_out(folder),
        *pairs_in_words(results, made),
        *mixed_seeds(made),
        *other_teachers(results, made),
        *of_rounding(list(tables.values())),
    ]
    text = "\n\n".join([*map(markdown, tables.values()), "\n".join(about)])
    show(text)

    kept = Path(folder, "compare.md")
    as_it_was = kept.exists() and kept.read_text() == f"{text}\n"
    latex_tables = []
    for (which, to), lines in tables.items():
        caption = gained_how(which, to, results, made)
        label = label_of(folder, "gain", which, to)
        latex_tables.append(latex_table(without_zero_in_bold(lines), caption, label))
    files = {
        "compare.md": f"{text}\n",
        "compare.tex": "\n\n".join([PACKAGES, *latex_tables]) + "\n",
    }
    keep(Path(folder), files)
    if as_it_was and Path(folder, "figures/gains.png").exists():
        return
    for which in ("last", "best", "eval"):
        rows = gains(differences(results, which, "plain", made))
        if rows:
            names = names_of(list(rows), made)
            rows = {names[cell]: row for cell, row in rows.items()}
            above = figures.name_of_folder(Path(folder))
            title = ": ".join(filter(None, [above, on_which_bases(results, made)]))
            about = picture_in_words(which, folders, results, made)
            fill = partial(figures.figure_gains, rows=rows, title=title, about=about)
            figures.draw(Path(folder, "figures"), gains=fill)
            break


# ==== 6. Accuracy beside time =====================================================================


def step_kind(settings: dict) -> str:
    """Which row of bench.json is the step of a run with these settings."""
    if not settings["infoard"]:
        return "plain"
    if settings["steps_lo"]:
        return "schedule"
    return "infoard"


def time_and_accuracy(bench: Path) -> tuple[float, str, list[float], list[float]]:
    """(ms of a step, cell, clean accuracy of each seed, worst of each seed) of one cell."""
    cell = bench.parent
    runs = [read_json(file) for file in sorted(cell.glob("s*/results.json"))]
    configs = [read_json(file) for file in sorted(cell.glob("s*/config.json"))]
    I.require(runs and configs, f"no finished run (s0, s1, ...) beside {bench}")

    settings = configs[0]["settings"]
    step = f"{settings['framework']}/{step_kind(settings)}"
    ms = read_json(bench)["rows"][step]["ms"]
    clean = [run["best"]["clean"] for run in runs]
    worst = [run["best"]["worst"] for run in runs]
    I.require(None not in worst, f"a run in {cell} was not attacked, so it has no worst")
    return ms, cell.name, clean, worst


def run_curve(folder: str) -> None:
    """What accuracy costs what time: the results of each cell in a folder beside a step's time.

    A cell is a folder with runs s0, s1, ... and the bench.json of `infoard.py bench`. The table is
    printed, and written into that folder as curve.md and figures/curve (png and pdf).
    """
    from companions import figures

    rows = sorted(time_and_accuracy(bench) for bench in Path(folder).glob("*/bench.json"))
    told = f"no cells with runs and bench.json in {folder}: it takes {folder}/NAME/bench.json"
    I.require(rows, f"{told} (bench --out) beside {folder}/NAME/s0, s1, ... (train --out)")
    lines = [["cell", "ms", "clean (%)", "worst (%)", "seeds"]]
    for ms, cell, clean, worst in rows:
        lines.append([cell, f"{ms:.0f}", spread(clean), spread(worst), str(len(clean))])
    text = "\n\n".join([markdown(lines), *left_out(folder)])
    show(text)
    keep(Path(folder), {"curve.md": f"{text}\n"})
    figures.draw(Path(folder, "figures"), curve=partial(figures.figure_curve, rows=rows))
