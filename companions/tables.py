"""Finished runs as tables: accuracies over seeds, paired gains, accuracy beside time.

    python infoard.py tables DIR     the seeds of all runs below a folder, as Markdown and LaTeX
    python infoard.py compare DIR    what each of them gains on the plain one, with intervals
    python infoard.py curve DIR      what accuracy costs what time

    1  columns    2  finished runs    3  text    4  pairs    5  tables    6  gains
    7  accuracy beside time

A run is a folder with results.json: {which: result of evaluate}, where which is best, last, raw
or transfer; eval.json beside it, which `infoard.py eval --out` writes, is read as another, and
stands for a run where it is alone, as that of a stranger's checkpoint does. Runs in folders s0, s1,
... are the seeds of one cell, and cells of one folder are compared seed by seed: DIR/rslad/infoard
with DIR/rslad/plain. Between functions they travel as {cell: {seed: run}}.
"""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

import infoard as I
from companions import protocol

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
    "n": "$n$",
    "seeds": "Seeds",
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


# ==== 2. Finished runs ============================================================================


def reading_order(file: Path) -> tuple:
    """By folder, and within one the cell plain first."""
    folder = file.parts[:-3]
    other = file.parts[-3:-2] != ("plain",)
    return folder, other, file


def finished(folder: str | Path) -> dict[str, dict[str, Path]]:
    """{cell: {seed: folder of the run}} of all finished runs below a folder, plain ones first.

    A run that is no folder s0, s1, ... is a cell of its own, and its name stands for the seed.
    """
    cells = {}
    files = [*Path(folder).rglob("results.json"), *Path(folder).rglob("eval.json")]
    for file in sorted({file.with_name("results.json") for file in files}, key=reading_order):
        run = file.parent.relative_to(folder).as_posix()
        cell = re.sub(r"/s\d+$", "", run)
        cells.setdefault(cell, {})[file.parent.name] = file.parent
    told = f"no finished runs (results.json) and no evaluations (eval.json) below {folder}"
    I.require(cells, told)
    return cells


def read_json(file: Path) -> dict:
    """The content of a JSON file."""
    return json.loads(file.read_text())


def read_run(folder: Path) -> dict[str, dict]:
    """{which: result} of a run; eval: what `eval --out` has measured there since."""
    results = {}
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
    later = folder / "eval.json"
    if later.exists():
        results["eval"] = read_json(later)
    return results


def read(cells: dict[str, dict[str, Path]]) -> dict[str, dict[str, dict]]:
    """{cell: {seed: {which: result}}} of the folders that finished() found."""
    return {
        cell: {seed: read_run(folder) for seed, folder in runs.items()}
        for cell, runs in cells.items()
    }


def sizes(results: list[dict]) -> str:
    """On how many images the results were measured: 1000, or 1000/10000 if they differ."""
    return "/".join(sorted({f"{result['n']:.0f}" for result in results}))


# ==== 3. Text =====================================================================================


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
    return text.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$")


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


def best_in_bold(lines: list[list[str]]) -> list[list[str]]:
    """The table with the highest mean of each column, or all that share it, as LaTeX's bold."""
    rows = [list(line) for line in lines]
    for place, name in enumerate(lines[0]):
        means = [mean_in(line[place]) for line in lines[1:]]
        compared = [mean for mean in means if mean > -math.inf]
        if name in ("n", "seeds") or place == 0 or len(compared) < 2:
            continue
        for row, mean in zip(rows[1:], means, strict=True):
            if mean == max(compared):
                row[place] = rf"\textbf{{{row[place]}}}"
    return rows


def latex_table(lines: list[list[str]], caption: str) -> str:
    """A whole table environment: caption, best in bold."""
    about = re.sub(r"[A-Za-z0-9_-]+", proper_word, caption)
    about = about.replace("%", r"\%").replace("±", r"$\pm$")
    parts = [r"\begin{table}", r"\centering", rf"\caption{{{about}}}"]
    return "\n".join([*parts, latex(best_in_bold(lines)), r"\end{table}"])


def spread(values: list[float | None]) -> str:
    """The mean and, of more than one value, the standard deviation over seeds."""
    if not values or None in values:
        return "-"
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    return text


# ==== 4. Pairs ====================================================================================


def how_measured(result: dict) -> list:
    """What must be equal in two results that are compared."""
    settings = result.get("settings", {})
    checkpoint = Path(result.get("checkpoint", "")).name  # best.pt or last.pt
    radii = [settings.get("eps"), settings.get("eps_l2")]
    return [result["n"], checkpoint, *radii, settings.get("teacher_nat")]


def comparable(a: dict, b: dict) -> bool:
    """Whether two results are of as many images, the same radii, kind of checkpoint and source."""
    return how_measured(a) == how_measured(b)


def subtracted(result: dict, base: dict) -> dict[str, float]:
    """n, and in points what a result has more than a base in each number that both have.

    `worst` and `worst_class` count only if both are the worst of the same attacks.
    """
    mine = numbers(result)
    theirs = numbers(base)
    same_attacks = not any(in_ball(name) for name in mine.keys() ^ theirs.keys())
    difference = {"n": result["n"]}
    for name in mine:
        if name in theirs and (same_attacks or name not in ("worst", "worst_class")):
            difference[name] = mine[name] - theirs[name]
    return difference


def paired(results: dict, which: str, to: str) -> dict[str, dict[str, dict[str, float]]]:
    """{cell: {seed: n and differences}} to the cell called `to` beside it, where comparable."""
    found = {}
    for cell, runs in results.items():
        partner = re.sub(r"[^/]+$", to, cell)
        if partner == cell or partner not in results:
            continue
        for seed, run in runs.items():
            result = run.get(which)
            base = results[partner].get(seed, {}).get(which)
            if result and base and comparable(result, base):
                found.setdefault(cell, {})[seed] = subtracted(result, base)
    return found


# ==== 5. Tables ===================================================================================


def table_row(results: list[dict], columns: list[str], gains: list[dict]) -> dict[str, str]:
    """{column: text} of one cell, from the results of its seeds and what they gain."""
    row = {name: spread([result.get(name) for result in results]) for name in columns}
    row["gain"] = spread([gain["worst"] for gain in gains if "worst" in gain])
    row["n"] = sizes(results)
    row["seeds"] = str(len(results))
    return row


def table(results: dict, which: str = "best") -> list[list[str]]:
    """A header and a line for each cell of {cell: {seed: {which: result}}}.

    The gain is that of `worst` on the cell called plain beside it, paired by seed. Columns that say
    nothing are left out.
    """
    shown = {}
    for cell, runs in results.items():
        shown[cell] = [run[which] for run in runs.values() if which in run]
    gains = paired(results, which, "plain")
    columns = columns_of([result for cell in shown.values() for result in cell])

    rows = {}
    for cell, measured in shown.items():
        if measured:
            rows[cell] = table_row(measured, columns, list(gains.get(cell, {}).values()))

    used = []
    for column in [*columns, "gain", "n", "seeds"]:
        nothing = "1" if column == "seeds" else "-"
        if any(row[column] != nothing for row in rows.values()):
            used.append(column)
    lines = [[cell, *(row[column] for column in used)] for cell, row in rows.items()]
    return [[f"{which} (%)", *used], *lines]


def radii_of(folders: dict[str, dict[str, Path]], which: str, results: dict) -> list[str]:
    """The L-infinity radii under which results were found: 8/255, as far as is known."""
    found = set()
    for cell, runs in folders.items():
        for seed, folder in runs.items():
            result = results[cell][seed].get(which)
            if result is None:
                continue
            eps = result.get("about", {}).get("eps", result.get("settings", {}).get("eps"))
            config = folder / "config.json"
            if eps is None and which != "eval" and config.exists():
                eps = read_json(config).get("settings", {}).get("eps")
            if eps is not None:
                found.add(protocol.as_pixels(eps))
    return sorted(found)


def protocols_of(shown: list[dict]) -> list[str]:
    """What the attacks of results do: linf eps 8/255: pgd_sat 20 x 2/255, ..."""
    texts = []
    for result in shown:
        for text in protocol.of_attacks(result.get("about", {"attacks": {}})):
            if text not in texts:
                texts.append(text)
    return texts


WHICH = {
    "best": "the checkpoint chosen on validation images",
    "last": "the last epoch",
    "raw": "the last epoch, without the averaging of weights",
    "transfer": "attacks made on an undefended net",
    "eval": "evaluated afterwards",
}


def measured_how(folders: dict, which: str, results: dict) -> str:
    """n, eps, what the attacks do and what ± is, of the table of one kind of result."""
    shown = [run[which] for runs in results.values() for run in runs.values() if which in run]
    sizes_known = sizes(shown)
    totals = sorted({str(r["about"]["of"]) for r in shown if "of" in r.get("about", {})})
    parts = [f"n = {sizes_known}"]
    if totals:
        parts[0] += f" of {'/'.join(totals)}"
    parts[0] += " test images"
    radii = radii_of(folders, which, results)
    protocols = protocols_of(shown)
    if protocols:
        parts += protocols
    else:
        parts.append(f"L-infinity eps {', '.join(radii) or 'not kept'}")
    if any(len(runs) > 1 for runs in results.values()):
        parts.append("± is the standard deviation over seeds")
    return f"{which} ({WHICH[which]}): accuracy in per cent; {'; '.join(parts)}"


def masking_warnings(results: dict) -> list[str]:
    """A line for each warning that an evaluation gave."""
    lines = []
    for cell, runs in results.items():
        for seed, run in runs.items():
            name = f"{cell}/{seed}" if re.fullmatch(r"s\d+", seed) else cell
            for which in ("best", "eval"):
                for warning in run.get(which, {}).get("warnings", []):
                    lines.append(f"warning, gradients may be masked: {name}: {warning}")
    return lines


def run_tables(folder: str) -> None:
    """Tables over the seeds (folders s0, s1, ...) of the runs below a folder, printed and kept."""
    folders = finished(folder)
    results = read(folders)
    made = {which: table(results, which) for which in WHICH}
    if made["last"][1:] == made["best"][1:]:
        del made["last"]  # the last epoch was the best
    made = {which: lines for which, lines in made.items() if len(lines) > 1}
    about = {which: measured_how(folders, which, results) for which in made}

    parts = [markdown(lines) for lines in made.values()]
    parts.append("\n".join([*about.values(), *masking_warnings(results)]))
    rows = [json.dumps({"cell": cell, "seeds": runs}) for cell, runs in results.items()]
    content = {
        "md": "\n\n".join(parts),
        "tex": "\n\n".join(
            latex_table(lines, f"{about[which]}. Best in bold.") for which, lines in made.items()
        ),
        "jsonl": "\n".join(rows),
    }
    for kind, text in content.items():
        I.save(Path(folder, f"tables.{kind}"), f"{text}\n".encode())
    print(f"{content['md']}\n\nin {folder}: tables.md, tables.tex, tables.jsonl")


# ==== 6. Gains ====================================================================================


def mean_interval(values: list[float]) -> tuple[float, float]:
    """The mean m and half the width h of its 95% interval, over seeds; h is nan for one value.

    h = t s / sqrt(n), s the standard deviation, t Student's quantile 0.975 for n - 1 degrees
    """
    if len(values) == 1:
        return float(values[0]), math.nan
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(quantile * stats.sem(values))


def signed(mean: float, half: float) -> str:
    """A difference with half its interval, if it has one."""
    if math.isnan(half):
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ± {half:.2f}"


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


def differences(results: dict, which: str, to: str) -> dict[str, dict]:
    """What paired() finds, and the means over cells of the same name that pooled() makes of it."""
    cells = paired(results, which, to)
    return cells | pooled(cells)


def gains(cells: dict[str, dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """{cell: {column: (mean gain, half an interval)}} of the columns that all its seeds have."""
    rows = {}
    for cell, seeds in cells.items():
        found = list(seeds.values())
        rows[cell] = {
            name: mean_interval([difference[name] for difference in found])
            for name in columns_of(found)
            if all(name in difference for difference in found)
        }
    return rows


def gain_table(cells: dict[str, dict], title: str) -> list[list[str]]:
    """A header, and for each cell its gains, the images and the number of seeds."""
    rows = gains(cells)
    columns = columns_of([difference for seeds in cells.values() for difference in seeds.values()])
    used = [name for name in columns if any(name in row for row in rows.values())]

    lines = [[title, *used, "n", "seeds"]]
    for cell, row in rows.items():
        texts = [signed(*row[name]) if name in row else "-" for name in used]
        seeds = cells[cell]
        lines.append([cell, *texts, sizes(list(seeds.values())), str(len(seeds))])
    return lines


def compare_tables(results: dict) -> list[list[list[str]]]:
    """The gain on plain, then on uniform, of last, best and eval; without those seen before."""
    tables = []
    for to in ("plain", "uniform"):
        for which in ("last", "best", "eval"):
            cells = differences(results, which, to)
            lines = gain_table(cells, f"gain of {which} on {to} (points)")
            seen = [shown[1:] for shown in tables]  # best is not shown where it is the last
            if cells and lines[1:] not in seen:
                tables.append(lines)
    return tables


def run_compare(folder: str) -> None:
    """What each cell below a folder gains on those named plain and uniform beside it: differences
    paired by seed, in points, with 95% intervals over seeds; as tables and a figure."""
    from companions import figures

    results = read(finished(folder))
    rows = gains(differences(results, "last", "plain"))
    I.require(
        rows,
        f"no cell below {folder} with a last epoch of a seed that plain has too, seen by as many "
        "images",
    )
    parts = [markdown(lines) for lines in compare_tables(results)]
    text = "\n\n".join(
        [*parts, "± is half a 95% interval of the mean gain, over seeds (Student's t)"]
    )
    I.save(Path(folder, "compare.md"), f"{text}\n".encode())
    print(text)
    figures.draw(Path(folder, "figures"), gains=partial(figures.figure_gains, rows=rows))


# ==== 7. Accuracy beside time =====================================================================


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
    """What accuracy costs what time: for each cell below a folder the results of its seeds
    (s0, s1, ...) beside a step's time (bench.json), as a table and a figure."""
    from companions import figures

    rows = sorted(time_and_accuracy(bench) for bench in Path(folder).glob("*/bench.json"))
    I.require(rows, f"no cells with runs and bench.json in {folder}")
    lines = [["cell", "ms", "clean (%)", "worst (%)", "seeds"]]
    for ms, cell, clean, worst in rows:
        lines.append([cell, f"{ms:.0f}", spread(clean), spread(worst), str(len(clean))])
    text = markdown(lines)
    I.save(Path(folder, "curve.md"), f"{text}\n".encode())
    print(text)
    figures.draw(Path(folder, "figures"), curve=partial(figures.figure_curve, rows=rows))
