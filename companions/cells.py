"""Finished runs: where they lie, what they are called, and which of them belong together.

    1  finished runs    2  names    3  partners

tables.py and figures.py show what is found here. Runs travel as {cell: {seed: run}}, and what
config.json says of them as {cell: {seed: settings}}.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import infoard as I
from companions.runs import FREE, OF_INFOARD

# ==== 1. Finished runs ============================================================================


def reading_order(file: Path) -> tuple:
    """By folder, and within one the cell plain first."""
    folder = file.parts[:-3]
    other = file.parts[-3:-2] != ("plain",)
    return folder, other, file


def place_of(run: Path, folder: Path) -> str:
    """Where a run lies below a folder; of a run that is the folder itself its own name."""
    place = run.relative_to(folder).as_posix()
    if place != ".":
        return place
    parts = run.resolve().parts
    return "/".join(parts[-3:] if re.fullmatch(r"s\d+", parts[-1]) else parts[-1:])


def cell_and_seed(run: Path, folder: Path) -> tuple[str, str]:
    """(cell, seed) of a run: CELL/s0, CELL-s0 if its settings have that seed, else its own name."""
    place = place_of(run, folder)
    named = re.fullmatch(r"(.+)/(s\d+)", place)
    if named:
        return named[1], named[2]
    named = re.fullmatch(r"(.+)-(s(\d+))", place)
    if named and settings_of(run).get("seed") == int(named[3]):
        return named[1], named[2]
    return place, Path(place).name


def finished(folder: str | Path) -> dict[str, dict[str, Path]]:
    """{cell: {seed: folder of the run}} of all finished runs below a folder, plain ones first."""
    cells = {}
    files = [*Path(folder).rglob("results.json"), *Path(folder).rglob("eval.json")]
    for file in sorted({file.with_name("results.json") for file in files}, key=reading_order):
        cell, seed = cell_and_seed(file.parent, Path(folder))
        cells.setdefault(cell, {})[seed] = file.parent
    told = f"no finished runs (results.json) and no evaluations (eval.json) below {folder}"
    if not cells:
        told = "; ".join([told, *left_out(folder)])
    I.require(cells, told)
    return cells


def unfinished(folder: str | Path) -> list[str]:
    """Where runs below a folder lie that have begun (config.json) and have nothing to show yet."""
    places = []
    for file in sorted(Path(folder).rglob("config.json")):
        run = file.parent
        measured = (run / "results.json").exists() or (run / "eval.json").exists()
        if not measured and settings_of(run):
            places.append(place_of(run, Path(folder)))
    return places


def left_out(folder: str | Path) -> list[str]:
    """A line that counts and names the unfinished runs below a folder, if there are any."""
    places = unfinished(folder)
    if not places:
        return []
    return [f"not finished and left out (no results.json), {len(places)}: {some_names(places)}"]


def some_names(names: list[str]) -> str:
    """The first three of some names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_json(file: Path) -> dict:
    """The content of a JSON file."""
    return json.loads(file.read_text())


def settings_of(folder: Path) -> dict:
    """What config.json says of a run; nothing, if there is none.

    Its settings, with the hash of a teacher in the place of its path, and under "data" the
    fingerprint of the data, or where they lie.
    """
    file = folder / "config.json"
    config = read_json(file) if file.exists() else {}
    if "settings" not in config:
        return {}
    settings = {**asdict(I.Config()), **config["settings"]}  # what was no option then
    for name in ("teacher", "teacher_nat"):
        if settings[name]:
            settings[name] = config.get(f"{name}_sha256") or settings[name]
    settings["data"] = config.get("data") or settings["data_dir"]
    return settings


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


def read_settings(cells: dict[str, dict[str, Path]]) -> dict[str, dict[str, dict]]:
    """{cell: {seed: settings}} of the folders that finished() found, as far as they are known."""
    return {
        cell: {seed: settings_of(folder) for seed, folder in runs.items()}
        for cell, runs in cells.items()
    }


def test_images_of(made: dict[str, dict]) -> tuple:
    """Fingerprints of the test images of runs, as far as their settings tell them."""
    data = [settings["data"] for settings in made.values() if settings]
    return tuple(sorted({part["test_sha256"] for part in data if "test_sha256" in part}))


def is_teacher(cell: str) -> bool:
    """Whether a cell is a teacher that a run has trained for itself, below runs/teachers."""
    return "teachers" in cell.split("/")[:-1]


# ==== 2. Names ====================================================================================

FRAMEWORKS = {  # as papers call them
    "at": "AT",
    "trades": "TRADES",
    "ard": "ARD",
    "rslad": "RSLAD",
    "akd": "AKD",
    "iad": "IAD",
    "adaad": "AdaAD",
    "adaiad": "AdaIAD",
    "mtard": "MTARD",
    "bmtard": "B-MTARD",
    "absld": "ABSLD",
    "adr": "ADR",
    "adr_trades": "ADR on TRADES",
    "igdm": "IGDM",
    "saad": "SAAD",
    "namid": "NAMID",
    "namid_trades": "NAMID on TRADES",
    "mid": "MID",
    "saad_c": "SAAD-C",
    "natural": "undefended",
}


def name_of_framework(text: str) -> str:
    """One as papers call it, with what is added: rslad+igdm is RSLAD + IGDM; else as it is."""
    name, *added = text.split("+")
    if name not in FRAMEWORKS:
        return text
    names = {**FRAMEWORKS, "average": "averaged weights"}
    return " + ".join(names.get(part, part) for part in [name, *added])


def name_of_cell(cell: str) -> str:
    """A cell as a paper has it: rslad/infoard is RSLAD + InfoARD, */infoard (9) the mean of 9.

    What is above a framework stands before it, T1/rslad/plain is T1: RSLAD; names of another
    pattern are left as they are.
    """
    *above, last = cell.split("/")
    last, _, count = last.partition(" (")
    base = above.pop() if above else ""
    name = name_of_framework(base)
    if base == "*":
        name = f"mean of {count.rstrip(')')}"
    if last == "infoard":
        name = f"{name} + InfoARD".removeprefix(" + ")
    elif name == base:  # no framework
        return cell
    elif last != "plain":
        name = f"{name}, {last}"
    return f"{'/'.join(above)}: {name}" if above else name


def has_usual_name(cell: str, settings: dict) -> bool:
    """Whether a run lies where train puts it if nobody says --out."""
    if not settings:
        return False
    parts = [settings["dataset"], settings["student"], settings["framework"]]
    usual = re.sub("[:/]", ".", "-".join(parts))
    return Path(cell).name.startswith(usual)


def name_of_settings(settings: dict) -> str:
    """A run as a paper has it: RSLAD + IGDM + InfoARD."""
    framework = settings["framework"]
    added = []
    for term in filter(None, settings["plus"].split(",")):  # igdm:5, with its weight
        name, _, weight = term.strip().partition(":")
        added.append(":".join(filter(None, [FRAMEWORKS.get(name, name), weight])))
    if settings["infoard"]:
        added.append("InfoARD")
    return " + ".join([FRAMEWORKS.get(framework, framework), *added])


def names_of(cells: list[str], made: dict[str, dict[str, dict]]) -> dict[str, str]:
    """{cell: name in a table}, all different; data set and student are named where they differ."""
    usual = {}
    for cell in cells:
        settings = next(iter(made.get(cell, {}).values()), {})
        if has_usual_name(cell, settings):
            usual[cell] = settings
    names = {}
    for cell in cells:
        if cell not in usual:
            names[cell] = name_of_cell(cell)
            continue
        above = cell.rpartition("/")[0]
        name = name_of_settings(usual[cell])
        names[cell] = f"{above}: {name}" if above and not is_teacher(cell) else name
    for what in ("student", "dataset"):
        if len({settings[what] for settings in usual.values()}) > 1:
            for cell, settings in usual.items():
                names[cell] += f", {settings[what]}"
    taken = list(names.values())
    return {cell: cell if taken.count(name) > 1 else name for cell, name in names.items()}


# ==== 3. Partners =================================================================================


def reads_teacher(settings: dict) -> bool:
    """Whether a plain run with these settings learns from a teacher, as far as is known."""
    framework = settings.get("framework")
    if framework not in I.FRAMEWORKS or settings.get("plus"):
        return True
    return "teacher" in I.get_framework(framework).needs


def unread_by(to: str, settings: dict) -> list[str]:
    """What may differ between a run with these settings and the one called plain or uniform."""
    unread = [*FREE, "eps_l2"]
    if to == "uniform":
        return [*unread, "asa"]
    unread += ["infoard", *OF_INFOARD, "critic_dim"]
    if not reads_teacher(settings):
        unread += [name for name in settings if name.startswith("teacher")]
    return unread


def unlike(a: dict, b: dict, unread: list[str]) -> list[str]:
    """The names of settings in which two runs differ, but for those that do not count."""
    return [name for name in a if name not in unread and a[name] != b.get(name)]


def is_called(settings: dict, to: str) -> bool:
    """Whether a run is plain, or one of uniform radii."""
    if to == "plain":
        return settings.get("infoard") is False
    return bool(settings.get("infoard")) and settings.get("asa") == to


def partner_of(cell: str, seed: str, to: str, results: dict, made: dict) -> tuple[str, str] | None:
    """(cell, seed) of the run with which one is compared: the cell called `to` beside it; else, by
    their settings, the run that differs in that alone."""
    settings = made.get(cell, {}).get(seed, {})
    named = re.sub(r"[^/]+$", to, cell)
    if named in results and not has_usual_name(cell, settings):
        return (named, seed) if named != cell and seed in results[named] else None
    if not settings.get("infoard") or is_called(settings, to):
        return None
    unread = unread_by(to, settings)
    for other, its_runs in made.items():
        for its_seed, theirs in its_runs.items():
            if is_called(theirs, to) and not unlike(settings, theirs, unread):
                return other, its_seed
    return None


def mixed_seeds(made: dict) -> list[str]:
    """A line for each cell of which one seed was made with other settings than another."""
    lines = []
    for cell, runs in made.items():
        first, *others = [settings for settings in runs.values() if settings] or [{}]
        different = {}
        for settings in others:
            for name in unlike(first, settings, [*FREE, "eps_l2", "seed"]):
                different[name] = f"{I.flag_of(name)} {first[name]} and {settings.get(name)}"
        if different:
            lines.append(f"warning: the seeds of {cell} differ: {', '.join(different.values())}")
    return lines
