"""What holds for tables.py and cells.py: pairs, intervals, texts, and the tables in results/.

The kept tables are made anew from the kept runs and compared byte for byte; the pages that show
them are compared with the kept files.
"""

import json
import math
import os
import shutil
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

import infoard as I
from companions import cells, figures, tables

each = pytest.mark.parametrize
approx = partial(pytest.approx, rel=1e-9, abs=1e-9)  # rounding of float64
RESULTS = Path(I.__file__).with_name("results")
HOUSE = RESULTS.parent
PAGES = [HOUSE / "README.md", *HOUSE.glob("docs/*.md"), *RESULTS.rglob("README.md")]

# Accuracies in per cent, with the two decimals that evaluate gives them.
accuracies = st.integers(0, 10_000).map(lambda hundredths: hundredths / 100)
gains_of_seeds = st.dictionaries(st.integers(0, 4), st.floats(-5, 5), min_size=1)
words = st.text("abcx_%± 019.-", max_size=8).map(str.strip)


def lines_of(columns: int) -> st.SearchStrategy:
    """Tables of so many columns."""
    line = st.lists(words, min_size=columns, max_size=columns)
    return st.lists(line, min_size=1, max_size=6)


def write_results(folder: Path, worst: dict[str, float]) -> None:
    """Finished runs at {path: `worst` of best}; last is half as much again, and warns otherwise."""
    for path, value in worst.items():
        warnings = ["w"] if value < 10 else []
        best = {"clean": 80.0, "worst": value, "n": 500, "warnings": warnings}
        last = best | {"worst": 1.5 * value, "warnings": ["v"]}
        I.save(folder / path / "results.json", {"best": best, "last": last})


def change_results(folder: Path, **more) -> None:
    """Further keys in each result of a run."""
    results = json.loads((folder / "results.json").read_text())
    for result in results.values():
        result.update(more)
    I.save(folder / "results.json", results)


def results_below(folder: Path) -> dict:
    """The results of all finished runs below a folder."""
    return cells.read(cells.finished(folder))


def cells_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the rule below its header."""
    lines = [line.strip("|").split("|") for line in text.splitlines()]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [rows[0], *rows[2:]]


def rows_of(text: str) -> dict[str, list[str]]:
    """A Markdown table as {first cell: other cells}."""
    return {first: others for first, *others in cells_of(text)}


# ==== 1. Columns ==================================================================================


def test_every_attack_and_metric_of_infoard_has_a_column():
    assert {*I.METRICS, *I.ATTACKS} <= set(tables.COLUMNS)
    assert len(set(tables.COLUMNS)) == len(tables.COLUMNS)


@each("name", list(I.ATTACKS))
def test_columns_in_the_ball_are_the_attacks_of_its_norm(name):
    attack = I.resolve(I.ATTACKS, name, "attack")
    assert tables.in_ball(name) == (getattr(attack, "norm", "linf") == "linf")


def test_columns_are_in_the_order_of_the_kept_tables():
    ball = "fgsm pgd_sat pgd_trades cw bim mifgsm mifgsm_t pgd_t pgd5_cw apgd aa"
    outside = (
        "pgd_l2 pgd_l2_t apgd_l2 aa_l2 "
        "spatial corrupt noise shot impulse blur bright contrast pixelate jpeg"
    )
    order = f"clean {ball} worst worst_class {outside} psnr psnr_adv ssim ssim_adv"
    assert list(tables.COLUMNS) == order.split()


def test_bookkeeping_is_no_column():
    texts = {"checkpoint": "a", "dataset": "shapes", "ok": True, "aa": None}
    lists = {"ci95": {}, "settings": {}, "per_class": [1.0], "warnings": []}
    counts = {"n": 5, "epoch": 2}
    accuracies = {"clean": 9.0, "mine": 3}
    assert tables.numbers(texts | lists | counts | accuracies) == accuracies


def test_anyones_attack_is_a_column_after_aa():
    one = {"mine": 3.0}
    two = {"yours": 1.0, "mine": 2.0, "jpeg": 5.0}
    columns = tables.columns_of([one, two])
    place = columns.index("aa") + 1
    assert columns[place : place + 3] == ["mine", "yours", "worst"]
    assert columns[:place] + columns[place + 2 :] == list(tables.COLUMNS)


def test_anyones_attack_stands_in_both_tables(tmp_path):
    write_results(tmp_path, {"plain/s0": 20.0, "plain/s1": 20.0})
    write_results(tmp_path, {"x/s0": 21.0, "x/s1": 21.0})
    change_results(tmp_path / "plain/s0", mine=30.0)
    change_results(tmp_path / "x/s0", mine=34.0)
    change_results(tmp_path / "x/s1", mine=40.0)
    tables.run_tables(str(tmp_path))
    text = (tmp_path / "tables.md").read_text()
    best = rows_of(text.split("\n\n")[1])
    assert best["best (%)"][:3] == ["clean", "mine", "worst"]
    assert best["x"][1] == "37.00 ± 4.24"
    # In seed 1 plain was not attacked by it, so `worst` is not of the same attacks.
    found = tables.paired(results_below(tmp_path), "best", "plain")
    assert found["x"]["s0"] == {"n": 500, "clean": 0.0, "mine": 4.0, "worst": 1.0}
    assert found["x"]["s1"] == {"n": 500, "clean": 0.0}


# ==== 2. Text =====================================================================================


@given(st.integers(1, 5).flatmap(lines_of))
def test_markdown_holds_every_cell_in_aligned_columns(lines):
    rows = tables.markdown(lines).splitlines()
    assert cells_of("\n".join(rows)) == lines
    cells_wide = [[len(cell) for cell in row.split("|")] for row in rows]
    assert all(row == cells_wide[0] for row in cells_wide)


@given(lines_of(3))
def test_latex_holds_every_cell_and_escapes_what_it_must(lines):
    begin, *body, end = tables.latex(lines).splitlines()
    assert begin == r"\begin{tabular}{lrr} \toprule"
    assert end == r"\bottomrule \end{tabular}"
    assert body.pop(1) == r"\midrule"
    for row, line in zip(body, lines, strict=True):
        plain = row.replace(r"\%", "%").replace(r"\_", "_").replace(r"$\pm$", "±")
        assert plain == " & ".join(line) + r" \\"
        assert row.count("%") == row.count(r"\%")
        assert row.count("_") == row.count(r"\_")
        assert "±" not in row


@given(st.lists(accuracies, min_size=1, max_size=6))
def test_spread_is_mean_and_sample_deviation(values):
    mean, _, deviation = tables.spread(values).partition(" ± ")
    assert float(mean) == pytest.approx(statistics.mean(values), abs=0.00501)  # two decimals
    assert bool(deviation) == (len(values) > 1)
    if deviation:
        assert float(deviation) == pytest.approx(statistics.stdev(values), abs=0.00501)
    assert tables.spread([*values, None]) == tables.spread([]) == "-"


def test_sizes_are_told_once_each():
    results = [{"n": n} for n in (300, 100, 200, 100.0, 300)]
    assert tables.sizes(results) == "100/200/300"


# ==== 3. Pairs and tables =========================================================================


def test_tables_give_mean_deviation_and_paired_gain(tmp_path, capsys):
    write_results(
        tmp_path,
        {
            "T1/at/plain/s0": 20.0,
            "T1/at/plain/s1": 30.0,
            "T1/at/infoard/s0": 21.0,
            "T1/at/infoard/s1": 34.0,
            "T1/at/infoard/s2": 99.0,
            "T1/ard/infoard/s0": 5.0,
            "s7": 1.0,
        },
    )
    I.save(tmp_path / "published/at/x/results.json", {"best": {"aa": 45.83, "n": 10000}})
    tables.run_tables(str(tmp_path))
    text = (tmp_path / "tables.md").read_text()
    assert text.strip() in capsys.readouterr().out
    last, best = map(rows_of, text.split("\n\n")[:2])  # what nobody has chosen is first
    names = ["s7", "T1: ARD + InfoARD", "T1: AT", "T1: AT + InfoARD", "published: AT, x"]
    assert list(best) == ["best (%)", *names]
    assert best["best (%)"] == ["clean", "aa", "worst", "gain", "n", "seeds"]
    assert best["T1: AT"] == ["80.00 ± 0.00", "-", "25.00 ± 7.07", "-", "500", "2"]
    # s0: +1, s1: +4; the seed without a partner counts in the mean, not in the gain
    assert best["T1: AT + InfoARD"][2:4] == ["51.33 ± 41.79", "+2.50 (+1.00, +4.00)"]
    assert best["published: AT, x"] == ["-", "45.83", "-", "-", "10000", "1"]
    assert last["T1: AT + InfoARD"][1:3] == ["77.00 ± 62.68", "+3.75 (+1.50, +6.00)"]
    assert text.count("best: w") == 2 and text.count("last: v") == 7
    assert "T1/ard/infoard/s0, best: w" in text and "masked: s7, best: w" in text


def test_tables_are_kept_as_latex_and_with_all_that_was_measured(tmp_path):
    write_results(tmp_path, {"at/plain/s0": 20.0, "at/plain/s1": 30.0, "at/infoard/s0": 21.0})
    tables.run_tables(str(tmp_path))
    lines = (tmp_path / "tables.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["cell"]: row["seeds"] for row in rows} == results_below(tmp_path)
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}{lrrrrr}") == 2
    assert r"25.00 $\pm$ 7.07" in latex and r"best (\%)" in latex
    assert all(line.count("&") in (0, 5) for line in latex.splitlines())


def test_tables_repeat_the_warnings_of_masked_gradients(tmp_path, capsys):
    for name, warnings in {"a": [], "b": ["w"]}.items():
        best = {"clean": 80.0, "worst": 9.0, "aa": None}
        best.update(n=5, warnings=warnings)
        I.save(tmp_path / name / "results.json", {"best": best})
    tables.run_tables(str(tmp_path))
    out = capsys.readouterr().out
    assert out.count("masked") == 1 and "may be masked: b, best: w\n" in out


@each("names", [[""], ["x_1/only_best"], ["a/plain", "a/infoard"]])
def test_tables_of_few_runs_are_plain(names, tmp_path, capsys):
    seen = {"aa": 45.83, "n": 10000}
    for name in names:
        I.save(tmp_path / name / "results.json", {"best": seen, "last": seen})
    tables.run_tables(str(tmp_path))
    out = capsys.readouterr().out
    assert "last (%)" in out and "images: the last epoch) has the same numbers" in out
    assert not any(word in out for word in ("best (%)", "seeds", "gain"))
    latex = (tmp_path / "tables.tex").read_text()
    if names[0].startswith("x_"):
        assert r"x\_1/only\_best" in latex


def test_tables_show_best_and_last_of_a_run(lab, capsys):
    assert I.main(["tables", str(lab.top)]) == 0
    out = capsys.readouterr().out
    cells = {cell.strip() for cell in out.split("|")}
    assert {"best (%)", "last (%)", "done", "pgd_sat"} <= cells


def test_what_eval_adds_is_compared_where_it_is_alike(tmp_path):
    for seed in range(5):
        write_results(tmp_path, {f"plain/s{seed}": 20.0, f"asa/s{seed}": 21.0})
    made = {"checkpoint": "x/last.pt", "settings": {"eps": 0.1}}
    base = made | {"n": 9, "ci95": {}, "warnings": []}
    base.update(cw=5.0, worst=5.0)
    alike = base | {"cw": 7.0, "worst": 7.0, "warnings": ["w"]}
    more_attacks = base | {"cw": 8.0, "apgd": 6.0, "worst": 6.0}
    other = base | {"cw": 50.0, "worst": 50.0}
    other_images = other | {"n": 8}
    other_radius = other | {"settings": {"eps": 0.2}}
    other_epoch = other | {"checkpoint": "y/best.pt"}
    found = [alike, more_attacks, other_images, other_radius, other_epoch]
    for seed, result in enumerate(found):
        I.save(tmp_path / f"plain/s{seed}/eval.json", base)
        I.save(tmp_path / f"asa/s{seed}/eval.json", result)

    gains = tables.paired(results_below(tmp_path), "eval", "plain")
    assert list(gains) == ["asa"] and list(gains["asa"]) == ["s0", "s1"]
    assert gains["asa"]["s0"] == {"n": 9, "cw": 2.0, "worst": 2.0}
    assert gains["asa"]["s1"] == {"n": 9, "cw": 3.0}
    tables.run_compare(str(tmp_path))
    assert "gain of eval on plain" in (tmp_path / "compare.md").read_text()
    tables.run_tables(str(tmp_path))
    *_, later, warnings = (tmp_path / "tables.md").read_text().split("\n\n")
    rows = rows_of(later)
    assert rows["asa"][rows["eval (%)"].index("gain")] == "+2.00"  # of s0 alone
    assert "asa/s0, eval: w" in warnings


@each("key", ["eps", "eps_l2", "teacher_nat"])
def test_results_under_other_settings_are_not_comparable(key):
    one = {"n": 9, "settings": {key: 0.1}}
    assert tables.comparable(one, dict(one))
    assert not tables.comparable(one, {"n": 9, "settings": {key: 0.2}})
    assert not tables.comparable(one, {"n": 9})
    harmless = {"n": 9, "settings": {"batch_size": 5}}
    assert tables.comparable(harmless, {"n": 9})


def test_results_of_other_images_are_not_comparable():
    lists = [{"n": 9, "about": {"images": {"list_sha256": name}}} for name in ("a", "b")]
    assert tables.comparable(lists[0], dict(lists[0]))
    assert tables.comparable(lists[0], {"n": 9})  # which does not say so
    assert not tables.comparable(*lists)


@each("a, b", [("best.pt", "last.pt"), ("last.pt", "student.pt"), ("best.pt", "")])
def test_best_and_last_epochs_are_not_compared_with_others(a, b):
    one, two = ({"n": 9, "checkpoint": f"x/{name}"} for name in (a, b))
    assert not tables.comparable(one, two) and not tables.comparable(two, one)
    assert tables.comparable(one, {"n": 9, "checkpoint": f"y/{a}"})


def test_kept_weights_of_any_name_are_compared():
    one, two = ({"n": 9, "checkpoint": f"x/{name}-s0.pt"} for name in ("plain", "infoard"))
    assert tables.comparable(one, two)


def test_what_is_outside_the_ball_is_no_part_of_worst(tmp_path):
    write_results(tmp_path, {"a/plain/s0": 20.0, "a/mid/s0": 21.0, "a/more/s0": 22.0})
    change_results(tmp_path / "a/mid/s0", psnr=15.0, pgd_l2=3.0)
    change_results(tmp_path / "a/more/s0", bim=30.0)
    tables.run_compare(str(tmp_path))  # and the figure copes with a cell that has no `worst`
    found = tables.paired(results_below(tmp_path), "best", "plain")
    assert found["a/mid"]["s0"]["worst"] == 1
    assert "worst" not in found["a/more"]["s0"]


@each("name", tables.COLUMNS)
def test_worst_is_compared_unless_an_attack_of_the_ball_is_missing(name):
    both = {"n": 9, "clean": 50.0, "worst": 20.0, "worst_class": 5.0}
    one = both | {name: 30.0}
    found = tables.subtracted(one, both)
    assert ("worst" in found) == ("worst_class" in found) == (name not in tables.LINF)


# ==== 4. Gains ====================================================================================


def test_interval_has_students_quantile_in_closed_form():
    one_degree = math.tan(0.475 * math.pi)  # of Cauchy's distribution
    _, half = tables.mean_interval([1.0, 3.0])
    assert half == approx(one_degree * math.sqrt(2) / math.sqrt(2))
    two_degrees = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    _, half = tables.mean_interval([1.0, 2.0, 3.0])
    assert half == approx(two_degrees * 1 / math.sqrt(3))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=30))
def test_95_per_cent_of_students_distribution_lie_inside(values):
    mean, half = tables.mean_interval(values)
    assert mean == approx(statistics.fmean(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    assume(error > 0)
    above = stats.t.sf(half / error, len(values) - 1)
    assert 1 - 2 * above == approx(0.95)


def test_one_seed_has_no_interval():
    mean, half = tables.mean_interval([3.0])
    assert mean == 3.0 and math.isnan(half)
    assert tables.with_half([3.0]) == tables.with_ends([3.0]) == "+3.00"


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6))
def test_fewer_than_three_seeds_have_no_interval(values):
    half, ends = tables.with_half(values), tables.with_ends(values)
    mean, width = tables.mean_interval(values)
    if len(values) == 2:  # two equal ones would have an interval of no width
        assert half == ends == f"{mean:+.2f} ({values[0]:+.2f}, {values[1]:+.2f})"
        assert math.isnan(tables.interval_shown(values)[1])
    else:
        assert half == f"{mean:+.2f} ± {width:.2f}"
        assert ends == f"{mean:+.2f} [{mean - width:+.2f}, {mean + width:+.2f}]"


def test_a_sign_has_one_meaning_in_a_table_and_is_told_once(tmp_path):
    """± is a deviation in tables of accuracy, [..] an interval, (..) the gains of two seeds."""
    write_results(tmp_path, {f"plain/s{seed}": 20.0 + seed for seed in range(3)})
    write_results(tmp_path, {"a/s0": 21.0, "a/s1": 23.0, "a/s2": 25.0, "b/s0": 22.0, "b/s1": 23.0})
    tables.run_tables(str(tmp_path))
    text = (tmp_path / "tables.md").read_text()
    best = rows_of(text.split("\n\n")[1])
    # +1, +2, +3: mean 2, sd 1, 4.303/sqrt(3) times that
    assert best["a"][1:3] == ["23.00 ± 2.00", "+2.00 [-0.48, +4.48]"]
    assert best["b"][1:3] == ["22.50 ± 0.71", "+2.00 (+2.00, +2.00)"]
    signs = ["± is the standard deviation", "[..]: 95% interval", tables.TWO_SEEDS]
    assert [text.count(sign) for sign in signs] == [1, 1, 1]
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count(r"[..]: 95\% interval of the mean gain") == 2  # each caption for itself
    tables.run_compare(str(tmp_path))
    text = (tmp_path / "compare.md").read_text()
    assert "+2.00 ± 2.48" in text and "+2.00 (+2.00, +2.00)" in text
    assert text.count("± is half a 95% interval") == text.count(tables.TWO_SEEDS) == 1


def test_gains_are_paired_by_seed(tmp_path, capsys):
    plain = {"T2/plain/s0": 20.0, "T2/plain/s1": 30.0, "T2/plain/s2": 25.0}
    asa = {"T2/asa/s0": 21.0, "T2/asa/s1": 32.0, "T2/asa/s2": 28.0, "T2/asa/s3": 99.0}
    alone = {"T2/one/s1": 33.0, "T1/at/x/s0": 1.0, "T2/uniform/s2": 23.0}
    write_results(tmp_path, plain | asa | alone)
    uniform = tmp_path / "T2/uniform/s2/results.json"  # as of a run without validation
    best = json.loads(uniform.read_text())["best"]
    I.save(uniform, {"best": best, "last": best})

    tables.run_compare(str(tmp_path))
    text = (tmp_path / "compare.md").read_text()
    assert text.strip() in capsys.readouterr().out
    last, best, _, on_uniform, about = text.split("\n\n")
    assert "half a 95% interval" in about
    rows = rows_of(best)
    assert list(rows) == ["gain of best on plain (points)", "T2/asa", "T2/one", "T2/uniform"]
    assert rows["gain of best on plain (points)"] == ["clean", "worst", "n", "seeds"]
    # +1, +2, +3: mean 2, sd 1, 4.303/sqrt(3) times that; a seed without a partner does not count
    assert rows["T2/asa"] == ["+0.00 ± 0.00", "+2.00 ± 2.48", "500", "3"]
    assert rows["T2/one"] == ["+0.00", "+3.00", "500", "1"]
    rows = rows_of(last)
    assert "gain of last on plain (points)" in rows and rows["T2/asa"][1] == "+3.00 ± 3.73"
    rows = rows_of(on_uniform)
    assert "gain of best on uniform (points)" in rows and "T2/plain" in rows
    assert rows["T2/asa"][1] == "+5.00"


def test_the_figure_shows_what_the_last_epoch_gains(tmp_path, monkeypatch):
    write_results(tmp_path, {"plain/s0": 20.0, "asa/s0": 22.0})
    drawn = {}
    monkeypatch.setattr(figures, "draw", lambda folder, **fill: drawn.update(fill))
    tables.run_compare(str(tmp_path))
    rows = drawn["gains"].keywords["rows"]
    assert list(rows) == ["asa"]
    assert rows["asa"]["worst"][0] == 3.0  # best gains 2


def test_the_figure_of_gains_says_what_it_shows(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(figures, "draw", lambda folder, **fill: told.append(fill))
    shutil.copytree(RESULTS / "evidence/adaad", tmp_path / "adaad")
    shutil.rmtree(tmp_path / "adaad/figures")
    tables.run_compare(str(tmp_path / "adaad"))
    shown = told[0]["gains"].keywords
    assert shown["title"].endswith("/adaad: gain on plain AdaAD")
    assert r"right under FGSM, PGD-20, CW$_\infty$; eps 8/255; on 10000 test" in shown["about"]
    assert "(the last epoch); bars: 95% intervals over 6 seeds" in shown["about"]
    assert "Teacher: evidence/teachers/strong.pt." in shown["about"]
    shutil.copytree(RESULTS / "evidence/controls", tmp_path / "controls")
    shutil.rmtree(tmp_path / "controls/figures")
    tables.run_compare(str(tmp_path / "controls"))
    about = told[-1]["gains"].keywords["about"]
    assert "Teacher: strong/s77/last.pt, evidence/teachers/strong.pt." in about
    assert "bars: 95% intervals over 3 seeds" in about


def test_the_figure_of_runs_is_not_called_by_their_folder(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(figures, "draw", lambda folder, **fill: told.append(fill))
    write_usual_runs(tmp_path / "clone/runs")
    tables.run_compare(str(tmp_path / "clone/runs"))
    shown = told[0]["gains"].keywords
    assert shown["title"] == "gain on plain RSLAD"
    assert "two seeds: no intervals" in shown["about"]


def test_the_figure_of_gains_says_what_was_not_kept(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(figures, "draw", lambda folder, **fill: told.append(fill))
    write_results(tmp_path, {"plain/s0": 20.0, "a/s0": 22.0, "b/s0": 22.0})
    change_results(tmp_path / "plain/s0", cw=20.0, aa=19.0)
    change_results(tmp_path / "a/s0", cw=20.0, aa=19.0)
    change_results(tmp_path / "b/s0", cw=20.0)
    tables.run_compare(str(tmp_path))
    shown = told[0]["gains"].keywords
    assert shown["title"].endswith(": gain on the plain runs")
    assert "one seed, no intervals" in shown["about"] and "eps not kept" in shown["about"]
    assert r"under those of CW$_\infty$, AutoAttack that a row" in shown["about"]


def test_an_evaluation_alone_is_a_row(tmp_path):
    write_results(tmp_path, {"ours/s0": 20.0})
    attack = {"norm": "linf", "eps": 4 / 255, "steps": 30, "step_size": 1 / 255}
    about = {"n": 50, "of": 2000, "eps": 4 / 255, "attacks": {"cw": attack}}
    found = {"clean": 80.0, "cw": 33.0, "worst": 33.0, "n": 50, "warnings": [], "about": about}
    I.save(tmp_path / "stranger/eval.json", found | {"checkpoint": "s.pt"})
    tables.run_tables(str(tmp_path))
    best, _, later, about = (tmp_path / "tables.md").read_text().split("\n\n")
    assert list(rows_of(best)) == ["last (%)", "ours"]
    assert rows_of(later)["stranger"] == ["80.00", "33.00", "33.00", "50"]
    assert "n = 50 of 2000 test images; linf eps 4/255: cw (30 steps of 1/255)" in about
    latex = (tmp_path / "tables.tex").read_text()
    assert r"$n$ = 50 of 2000 test images; $L_\infty$ $\epsilon$ 4/255" in latex
    assert r"CW$_\infty$ (30 steps of 1/255)" in latex
    assert "eval (evaluated afterwards: s.pt)" in latex


def test_papers_names_and_the_best_in_bold():
    lines = [["best (%)", "pgd_sat", "cw", "aa", "n"]]
    lines += [["a_1", "50.00 ± 1.00", "9.00", "-", "10"], ["b", "50.00 ± 2.00", "10.00", "7", "10"]]
    lines += [["c", "40.00", "3.00", "-", "10"]]
    lines = tables.best_in_bold(lines)
    text = tables.latex_table(lines, "best: n = 10; ± is a deviation, 20 steps of eps/4", "tab:x")
    assert r"best (\%) & PGD-20 & CW$_\infty$ & AutoAttack & $n$ \\" in text
    assert r"a\_1 & \textbf{50.00 $\pm$ 1.00} & 9.00 & - & 10 \\" in text
    assert r"b & \textbf{50.00 $\pm$ 2.00} & \textbf{10.00} & 7 & 10 \\" in text
    assert r"\caption{best: $n$ = 10; $\pm$ is a deviation, 20 steps of $\epsilon$/4}" in text
    assert set(tables.PROPER) >= set(tables.COLUMNS)


def test_best_is_not_compared_where_it_is_the_last(tmp_path):
    write_results(tmp_path, {"plain/s0": 20.0, "asa/s0": 21.0})
    for file in tmp_path.rglob("results.json"):
        best = json.loads(file.read_text())["best"]
        I.save(file, {"best": best, "last": best})
    tables.run_compare(str(tmp_path))
    text = (tmp_path / "compare.md").read_text()
    assert "gain of last on plain" in text and "best" not in text


@given(st.lists(gains_of_seeds, min_size=2, max_size=4))
def test_a_pooled_gain_is_the_mean_over_cells_of_each_seed(gains):
    cells = {}
    for base, row in enumerate(gains):
        cell = cells[f"T1/{base}/infoard"] = {}
        for i, gain in row.items():
            cell[f"s{i}"] = {"n": 10, "worst": gain, "clean": -gain}
    alone = {"s0": {"n": 10, "worst": 99.0}}
    found = tables.pooled(cells | {"T2/x/infoard": alone, "T1/0/other": alone})

    common = set.intersection(*[set(row) for row in gains])  # the seeds that all cells have
    name = f"T1/*/infoard ({len(gains)})"
    assert list(found) == ([name] if common else [])  # no other table, no other cell
    assert set(found.get(name, {})) == {f"s{i}" for i in common}
    for i in common:
        mean = statistics.fmean(row[i] for row in gains)
        assert found[name][f"s{i}"]["worst"] == approx(mean)
        assert found[name][f"s{i}"]["clean"] == approx(-mean)


def test_a_pooled_gain_is_of_what_all_cells_have():
    a = {"s0": {"n": 10, "worst": 1.0, "cw": 5.0}}
    b = {"s0": {"n": 20, "worst": 2.0}}
    expected = {"s0": {"n": 15, "worst": 1.5}}
    for given_cells in ({"a/x": a, "b/x": b}, {"b/x": b, "a/x": a}):
        assert tables.pooled(given_cells) == {"*/x (2)": expected}


def test_pooled_gains_stand_in_the_table(tmp_path):
    write_results(tmp_path, {"T1/a/plain/s0": 20.0, "T1/a/plain/s1": 20.0})
    write_results(tmp_path, {"T1/b/plain/s0": 10.0, "T1/b/plain/s1": 10.0})
    write_results(tmp_path, {"T1/a/infoard/s0": 21.0, "T1/a/infoard/s1": 23.0})
    write_results(tmp_path, {"T1/b/infoard/s0": 13.0, "T1/b/infoard/s1": 15.0})
    cells = tables.differences(results_below(tmp_path), "best", "plain")
    gains = tables.gains(cells)["T1/*/infoard (2)"]["worst"]
    assert gains == approx([2.0, 4.0])
    mean, half = tables.mean_interval(gains)
    assert mean == approx(3.0)  # standard deviation sqrt(2), 12.7062/sqrt(2) times that
    assert half == pytest.approx(12.7062, abs=5e-5)  # the quantile as tables print it
    row = tables.gain_table(cells, "gain")[-1]
    both = ["+0.00 (+0.00, +0.00)", "+3.00 (+2.00, +4.00)"]
    assert row == ["T1: mean of 2 + InfoARD", *both, "500", "2"]


def test_comparing_needs_a_plain_partner(tmp_path, capsys):
    write_results(tmp_path, {"a/plain/s0": 1.0, "a/infoard/s1": 1.0})
    assert I.main(["compare", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "nothing to compare below" in error and error.count("\n") == 1
    assert "--no-infoard" in error and "NAME/plain/s0 and NAME/infoard/s0" in error
    assert not (tmp_path / "compare.md").exists()


def write_run(folder: Path, worst: float, n: int = 500, **given) -> None:
    """A finished run with the settings that train would keep of it, in a folder of any name."""
    settings = asdict(I.Config(**given).resolved())
    I.save(folder / "config.json", {"settings": settings, "data": {"classes": ["a"]}})
    result = {"clean": 80.0, "worst": worst, "n": n, "warnings": []}
    I.save(folder / "results.json", {"best": result, "last": result})


USUAL = "shapes-tiny-rslad"


def write_usual_runs(folder: Path) -> None:
    """Plain and lifted runs of two seeds, called as train calls them."""
    for seed in (0, 1):
        plain = Path(I.Config(infoard=False, seed=seed).resolved().out).name
        lifted = Path(I.Config(seed=seed).resolved().out).name
        assert (plain, lifted) == (f"{USUAL}-plain-s{seed}", f"{USUAL}-s{seed}")
        write_run(folder / plain, 20.0 + seed, infoard=False, seed=seed)
        write_run(folder / lifted, 21.0 + 3 * seed, seed=seed)


def test_runs_as_train_calls_them_are_seeds_and_pairs(tmp_path, capsys):
    write_usual_runs(tmp_path)
    assert I.main(["compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out.split("\n\n")[0])
    assert rows["RSLAD + InfoARD"][1:] == ["+2.00 (+1.00, +3.00)", "500", "2"]
    assert "two seeds: no interval" in out and "three or more (--seed 1, 2, ...) give" in out
    assert f"compared by their settings: {USUAL} with {USUAL}-plain" in out
    assert I.main(["tables", str(tmp_path)]) == 0
    rows = rows_of(capsys.readouterr().out.split("\n\n")[0])
    assert rows["RSLAD"][1] == "20.50 ± 0.71"
    assert rows["RSLAD + InfoARD"][2] == "+2.00 (+1.00, +3.00)"


def test_pairs_are_found_by_settings_whatever_the_folders_are_called(tmp_path):
    write_run(tmp_path / "deep/one", 20.0, infoard=False, epochs=3)
    write_run(tmp_path / "two", 25.0, epochs=3, lam_hi=2.0, mim="off", attacks="clean")
    write_run(tmp_path / "three", 26.0, epochs=3, asa="uniform", lam_hi=2.0, mim="off")
    write_run(tmp_path / "other-seed", 30.0, infoard=False, epochs=3, seed=1)
    write_run(tmp_path / "other-lr", 31.0, infoard=False, epochs=3, lr=0.2)
    folders = cells.finished(tmp_path)
    results, made = cells.read(folders), cells.read_settings(folders)
    found = tables.paired(results, "best", "plain", made)
    assert {cell: seeds[cell]["worst"] for cell, seeds in found.items()} == {"two": 5, "three": 6}
    found = tables.paired(results, "best", "uniform", made)
    assert list(found) == ["two"] and found["two"]["two"]["worst"] == -1


@each(
    "one, other",
    [
        ({"epochs": 3}, {"epochs": 4}),
        ({"seed": 1}, {"seed": 2}),
        ({"teacher": "a.pt"}, {"teacher": "b.pt"}),
        ({"eps": 4 / 255}, {"eps": 8 / 255}),
        ({"student": "resnet18"}, {"student": "tiny"}),
        ({"framework": "adaad"}, {"framework": "rslad"}),
        ({"plus": "igdm"}, {}),
    ],
)
def test_runs_that_differ_in_more_are_no_pair_and_the_line_says_in_what(one, other, tmp_path):
    write_run(tmp_path / "one", 20.0, **one)
    write_run(tmp_path / "other", 20.0, infoard=False, **other)
    with pytest.raises(I.InfoardError, match="the nearest, one and other, differ in --") as error:
        tables.run_compare(str(tmp_path))
    assert I.flag_of(next(iter(one))) in str(error.value)


def test_a_teacher_counts_only_for_those_who_learn_from_it(tmp_path):
    for framework, pairs in (("at", 1), ("rslad", 0)):
        folder = tmp_path / framework
        write_run(folder / "a", 20.0, framework=framework, teacher="t.pt")
        write_run(folder / "b", 20.0, framework=framework, infoard=False)
        folders = cells.finished(folder)
        made = cells.read_settings(folders)
        assert len(tables.paired(cells.read(folders), "best", "plain", made)) == pairs


def test_other_data_or_images_are_no_pair(tmp_path):
    write_run(tmp_path / "a", 20.0)
    write_run(tmp_path / "b", 20.0, infoard=False)
    tables.run_compare(str(tmp_path))
    config = json.loads((tmp_path / "b/config.json").read_text())
    I.save(tmp_path / "b/config.json", config | {"data": {"classes": ["b"]}})
    with pytest.raises(I.InfoardError, match="differ in --data"):
        tables.run_compare(str(tmp_path))
    write_run(tmp_path / "b", 20.0, n=400, infoard=False)
    with pytest.raises(I.InfoardError, match="differ in the images or attacks"):
        tables.run_compare(str(tmp_path))


def hash_teachers(folder: Path, hashes: dict[str, str]) -> None:
    """Runs whose config.json keeps the hash of their teacher."""
    for name, digit in hashes.items():
        settings = asdict(I.Config(teacher="t.pt", infoard=name != "plain").resolved())
        config = {"settings": settings, "teacher_sha256": 64 * digit if digit else None}
        I.save(folder / name / "s0/config.json", config)


def test_a_partner_with_another_teacher_is_told(tmp_path, capsys):
    write_results(tmp_path, {f"{name}/s0": 20.0 for name in ("plain", "asa", "mim", "x", "y")})
    hash_teachers(tmp_path, {"plain": "a", "asa": "a", "mim": "b", "x": "b", "y": ""})
    tables.run_compare(str(tmp_path))
    told = "learned from another teacher file than plain (sha256 bbbbbbbb and aaaaaaaa)"
    assert capsys.readouterr().out.count("warning") == 1
    assert f"warning: mim, x {told}\n" in (tmp_path / "compare.md").read_text()


@each("plus, warnings", [("igdm", 1), ("", 0)])
def test_a_teacher_is_read_by_a_term_of_plus_too(plus, warnings, tmp_path):
    write_results(tmp_path, {"plain/s0": 20.0, "x/s0": 21.0})
    for name, digit in (("plain", "a"), ("x", "b")):
        given = {"framework": "at", "plus": plus, "teacher": "t.pt", "infoard": name == "x"}
        settings = asdict(I.Config(**given).resolved())
        config = {"settings": settings, "teacher_sha256": 64 * digit}
        I.save(tmp_path / name / "s0/config.json", config)
    found = cells.finished(tmp_path)
    told = tables.other_teachers(cells.read(found), cells.read_settings(found))
    assert len(told) == warnings


def test_pairs_of_the_evidence_that_have_other_teacher_files_are_told():
    """Those that a later machine paired with the runs of an earlier one: results/evidence."""
    told = {}
    for folder in ("T1", "adaad", "controls", "longer", "size32", "teacher"):
        found = cells.finished(RESULTS / "evidence" / folder)
        told[folder] = tables.other_teachers(cells.read(found), cells.read_settings(found))
    [on_plain, *on_uniform] = told.pop("controls")
    assert on_plain.startswith("warning: attention, radii2, relation, reversed learned")
    assert len(on_uniform) == 1
    assert not any(told.values())


def test_seeds_of_other_settings_are_told(tmp_path, capsys):
    write_run(tmp_path / "x-s0", 20.0, epochs=3)
    write_run(tmp_path / "x-s1", 21.0, epochs=4, seed=1)
    write_run(tmp_path / "y-s5", 21.0, epochs=4, seed=1)  # no seed 5: y-s5 is only a name
    tables.run_tables(str(tmp_path))
    out = capsys.readouterr().out
    assert "warning: the seeds of x differ: --teacher-epochs 3 and 4, --epochs 3 and 4" in out
    assert list(cells.finished(tmp_path)) == ["x", "y-s5"]


def test_teachers_have_a_table_of_their_own(tmp_path, capsys):
    write_usual_runs(tmp_path)
    made = {"framework": "trades", "student": "tiny_wide", "infoard": False}
    write_run(tmp_path / "teachers/shapes-tiny_wide-trades-37b1c99b", 66.0, **made)
    write_run(tmp_path / "teachers/shapes-tiny-trades-00000000", 55.0, **made | {"student": "tiny"})
    tables.run_tables(str(tmp_path))
    best, teachers, about, _ = capsys.readouterr().out.split("\n\n")
    assert list(rows_of(best))[1:] == ["RSLAD", "RSLAD + InfoARD"]
    rows = rows_of(teachers)
    assert rows["TRADES, tiny_wide"][1] == "66.00" and rows["TRADES, tiny"][1] == "55.00"
    assert "teacher (trained for the runs above" in about
    tables.run_tables(str(tmp_path / "teachers"))  # who asks for them gets them as runs
    assert list(rows_of(capsys.readouterr().out.split("\n\n")[0]))[0] == "last (%)"


def test_a_run_itself_is_a_row_by_its_name(tmp_path, capsys):
    write_usual_runs(tmp_path)
    tables.run_tables(str(tmp_path / f"{USUAL}-s1"))
    assert list(rows_of(capsys.readouterr().out.split("\n\n")[0]))[1:] == ["RSLAD + InfoARD"]


def test_names_are_all_different_and_say_what_differs(tmp_path):
    write_run(tmp_path / f"{USUAL}-s0", 20.0)
    write_run(tmp_path / "shapes-tiny-rslad+igdm:2-s0".replace(":", "."), 20.0, plus="igdm:2")
    write_run(tmp_path / "shapes-resnet18-rslad-s0", 20.0, student="resnet18")
    write_run(tmp_path / "mine", 20.0, epochs=2)
    folders = cells.finished(tmp_path)
    names = cells.names_of(list(folders), cells.read_settings(folders))
    expected = ["RSLAD + IGDM:2 + InfoARD, tiny", "RSLAD + InfoARD, resnet18"]
    assert {*names.values()} == {*expected, "RSLAD + InfoARD, tiny", "mine"}
    same = {"a/rslad": "a/rslad", "rslad/plain": "rslad/plain", "rslad/x": "RSLAD, x"}
    assert cells.names_of(["a/rslad", "rslad/plain", "rslad/x"], {})["rslad/x"] == same["rslad/x"]


@each(
    "cell, name",
    [
        ("rslad/infoard", "RSLAD + InfoARD"),
        ("rslad/plain", "RSLAD"),
        ("T1/rslad/plain", "T1: RSLAD"),
        ("adaad/radii2", "AdaAD, radii2"),
        ("*/infoard (9)", "mean of 9 + InfoARD"),
        ("*/radii2 (2)", "mean of 2, radii2"),
        ("infoard", "InfoARD"),
        ("uniform", "uniform"),
        ("T2/plain", "T2/plain"),
        ("size/16/mtard/longer", "size/16: MTARD, longer"),
        ("mine/infoard", "mine + InfoARD"),
        ("x/adr+average/ADR-paper", "x: ADR + averaged weights, ADR-paper"),
        ("rslad+igdm/plain", "RSLAD + IGDM"),
        ("mine+igdm/x", "mine+igdm/x"),
    ],
)
def test_a_cell_is_called_as_in_a_paper(cell, name):
    assert cells.name_of_cell(cell) == name


def result_at(eps: float, n: int = 50, **columns: float) -> dict:
    """A result of evaluate under PGD-20 with this radius."""
    attack = {"norm": "linf", "eps": eps, "steps": 20, "step_size": eps / 4}
    attack.update(start="uniform", loss="cross-entropy")
    about = {"n": n, "of": 2000, "eps": eps, "attacks": {"pgd_sat": attack}, "worst_class_n": 5}
    return {**columns, "n": n, "warnings": [], "about": about}


def test_numbers_of_others_say_whose_they_are(tmp_path, capsys):
    """Source, teacher, its own deviation, what is second hand; bold within a data set alone."""
    write_results(tmp_path, {"at/plain/s0": 20.0, "at/plain/s1": 21.0})
    source = {"source": "A & B, 2026", "n": 10_000, "teacher": "none"}
    more = {"teacher": "WRN_1", "sd": {"aa": 0.2}, "second_hand": ["clean"]}
    rows = {
        "published/c10-r18/adr+average/P": {"aa": 50.0, **source},
        "published/c10-r18/saad/P": {"aa": 49.0, "clean": 80.0, **source, **more},
        "published/c100-r18/rslad+igdm/P": {"aa": 29.0, **source},
        "published/c100-r18/at/P": {"aa": 28.0, **source},
    }
    for name, row in rows.items():
        I.save(tmp_path / name / "results.json", {"best": row})
    tables.run_tables(str(tmp_path))
    text = (tmp_path / "tables.md").read_text()
    best = rows_of(text.split("\n\n")[1])
    columns = "clean aa worst n seeds teacher source"
    assert best["best (%)"] == columns.split()
    assert best["AT"][-3:] == ["2", "-", "-"]
    saad = ["80.00", "49.00 ± 0.20", "-", "10000", "-", "WRN_1"]
    assert best["published/c10-r18: SAAD, P"] == [*saad, "A & B, 2026 (second hand: clean)"]
    assert best["published/c10-r18: ADR + averaged weights, P"][-2:] == ["none", "A & B, 2026"]
    assert "seeds, of a row with a source the one that it reports" in text
    assert "L-infinity eps not kept; eps of rows with a source: as there" in text
    tables.run_tables(str(tmp_path / "published"))
    alone = (tmp_path / "published/tables.md").read_text()
    assert "images; eps: as in the source of a row\n± is the" in alone
    assert alone.endswith("± is the standard deviation over seeds that the source reports\n")
    latex = (tmp_path / "tables.tex").read_text()
    assert r"\textbf{50.00}" in latex and r"\textbf{29.00}" in latex
    assert latex.count("textbf") == 2 and r"WRN\_1 & A \& B, 2026" in latex


def test_only_rows_of_equal_n_and_eps_are_compared(tmp_path, capsys):
    found = {
        "a": result_at(8 / 255, pgd_sat=40.0),
        "b": result_at(8 / 255, pgd_sat=41.0),
        "c": result_at(4 / 255, pgd_sat=60.0),
        "d": result_at(4 / 255, pgd_sat=59.0),
        "e": result_at(8 / 255, n=10, pgd_sat=90.0),
    }
    for name, result in found.items():
        I.save(tmp_path / name / "eval.json", result)
    tables.run_tables(str(tmp_path))
    rows = rows_of(capsys.readouterr().out.split("\n\n")[0])
    assert rows["eval (%)"] == ["pgd_sat", "n", "eps"]
    assert rows["c"] == ["60.00", "50", "4/255"] and rows["e"] == ["90.00", "10", "8/255"]
    latex = (tmp_path / "tables.tex").read_text()
    bold = [line.split(" &")[0] for line in latex.splitlines() if "textbf" in line]
    assert bold == ["b", "c"]
    assert r"Best in bold, among rows of equal $n$, $\epsilon$" in latex
    about = (tmp_path / "tables.md").read_text().split("\n\n")[1]
    assert (
        "rows a, b, e at linf eps 8/255: pgd_sat (20 steps of 2/255); rows c, d at linf eps"
        in about
    )
    assert "cross-entropy, random start: pgd_sat" in about
    assert "worst_class is of 5 images" in about


def test_a_latex_file_names_the_package_that_it_needs(tmp_path):
    write_usual_runs(tmp_path)
    tables.run_tables(str(tmp_path))
    first, *lines = (tmp_path / "tables.tex").read_text().splitlines()
    assert first.startswith("%") and r"\usepackage{booktabs}" in first
    assert any(r"\toprule" in line for line in lines)


def test_gains_are_latex_with_caption_label_and_what_is_shown_in_bold(tmp_path):
    write_results(tmp_path, {"plain/s0": 20.0, "plain/s1": 30.0, "plain/s2": 25.0})
    write_results(tmp_path, {"a_1/s0": 22.0, "a_1/s1": 32.1, "a_1/s2": 27.0})
    write_results(tmp_path, {"b/s0": 20.0, "b/s1": 33.0, "b/s2": 25.0})
    for file in tmp_path.rglob("results.json"):
        change_results(file.parent, about={"n": 500, "of": 2000, "eps": 4 / 255})
    tables.run_compare(str(tmp_path))
    head, _, best = (tmp_path / "compare.tex").read_text().split("\n\n")
    assert "booktabs" in head and "graphicx" in head
    caption = best.splitlines()[2]
    assert "best (" in caption and "$n$ = 500 of 2000 test images" in caption
    assert r"$L_\infty$ $\epsilon$ 4/255; $\pm$ is half a 95\% interval" in caption
    assert rf"\label{{tab:{tmp_path.name.replace('_', '-')}-gain-best-plain}}" in best
    # 2.0, 2.1, 2.0: t 4.303 times the deviation 0.0577 over sqrt(3) is 0.143; 0, 3, 0: of no sign
    assert r"a\_1 & +0.00 $\pm$ 0.00 & \textbf{+2.03 $\pm$ 0.14} & 500 & 3 \\" in best
    assert r"b & +0.00 $\pm$ 0.00 & +1.00 $\pm$ 4.30 & 500 & 3 \\" in best


@each("verb", ["tables", "compare"])
def test_latex_tables_are_labelled_and_no_wider_than_a_line(verb, tmp_path):
    write_usual_runs(tmp_path)
    assert I.main([verb, str(tmp_path)]) == 0
    text = (tmp_path / f"{verb}.tex").read_text()
    labels = [line for line in text.splitlines() if line.startswith(r"\label{tab:")]
    assert len(labels) == len(set(labels)) == text.count(r"\begin{table}")
    assert text.count(r"\resizebox{\ifdim\width>\linewidth") == len(labels)
    for part in text.split(r"\begin{table}")[1:]:
        assert part.count("{") == part.count("}")


@given(
    st.integers(1, 100).map(lambda n: 100 * n), st.lists(st.floats(0, 1), min_size=4, max_size=4)
)
def test_differences_of_kept_numbers_are_off_by_a_hundredth_at_most(n, shares):
    """Accuracies are kept with two decimals, which is exact where n divides 10,000."""
    exact = [100 * round(share * n) / n for share in shares]
    kept = [{"n": n, "clean": round(value, 2)} for value in exact]
    found = [tables.subtracted(kept[0], kept[1]), tables.subtracted(kept[2], kept[3])]
    mean = statistics.mean(difference["clean"] for difference in found)
    header = ["gain", "n"]
    told = tables.of_rounding([[header, ["a", f"500/{n}"]], [header, ["b", "1000"]]])
    assert bool(told) == (10_000 % n != 0) and all(f"n = {n}: " in line for line in told)
    error = abs(mean - (exact[0] - exact[1] + exact[2] - exact[3]) / 2)
    assert error <= (1e-9 if 10_000 % n == 0 else 0.01 + 1e-9)


def test_what_is_written_is_said_and_what_is_there_is_left(tmp_path, capsys, monkeypatch):
    write_usual_runs(tmp_path)
    for verb, files in (
        ("tables", ["tables.md", "tables.tex"]),
        ("compare", ["compare.md", "compare.tex"]),
    ):
        assert I.main([verb, str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert f"written in {tmp_path}: {', '.join(files)}" in out
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda *args, **fill: drawn.append(fill))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for verb in ("tables", "compare"):
        assert I.main([verb, str(tmp_path)]) == 0
        assert f"as it was in {tmp_path}: {verb}.md" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert drawn == []


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, capsys, monkeypatch):
    write_usual_runs(tmp_path)

    def full(path, content):
        raise I.InfoardError(f"cannot write {path} (disk full); free space or choose another --out")

    monkeypatch.setattr(I, "save", full)
    assert I.main(["tables", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "RSLAD + InfoARD" in out and "not written: cannot write" in out and "--out" not in out


def test_a_reader_who_has_seen_enough_is_no_mistake(tmp_path, monkeypatch):
    write_usual_runs(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)  # as head does
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert I.main(["tables", str(tmp_path)]) == 0
        print("and goes on")
    assert (tmp_path / "tables.md").exists()


def begin_run(folder: Path) -> None:
    """What a run leaves that has been stopped."""
    I.save(folder / "config.json", {"settings": asdict(I.Config().resolved())})


@each("verb", ["tables", "compare", "curve"])
def test_unfinished_runs_are_counted_and_named(verb, tmp_path, capsys):
    if verb == "curve":
        write_cell(tmp_path / "cell", 8.0, 0, [29.0])
    else:
        write_usual_runs(tmp_path)
    assert I.main([verb, str(tmp_path)]) == 0
    assert "not finished" not in (tmp_path / f"{verb}.md").read_text()
    for name in ("a/s0", "a/s1", "b", "c"):
        begin_run(tmp_path / name)
    I.save(tmp_path / "of_others/config.json", {"model_type": "vit"})
    I.save(tmp_path / "c/eval.json", {"clean": 80.0, "n": 50, "warnings": []})  # a row by itself
    capsys.readouterr()
    assert I.main([verb, str(tmp_path)]) == 0
    line = "not finished and left out (no results.json), 3: a/s0, a/s1, b\n"
    assert line in (tmp_path / f"{verb}.md").read_text() and line in capsys.readouterr().out


def test_if_all_are_unfinished_the_line_names_them(tmp_path, capsys):
    begin_run(tmp_path / "a/s0")
    assert I.main(["tables", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no finished runs" in error and "left out (no results.json), 1: a/s0" in error
    assert error.count("\n") == 1


@each(
    "verb, why",
    [("tables", "no finished runs"), ("compare", "no finished runs"), ("curve", "no cells")],
)
def test_a_folder_without_runs_is_one_line(verb, why, tmp_path, capsys):
    assert I.main([verb, str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert why in error and "nowhere" in error and error.count("\n") == 1


# ==== 5. Accuracy beside time =====================================================================


def write_cell(folder: Path, ms: float, steps_lo: int, worst: list[float]) -> None:
    """A cell with runs and with the time of its step."""
    rows = {
        "rslad/plain": {"ms": 9 * ms},
        "rslad/infoard": {"ms": ms if not steps_lo else 7 * ms},
        "rslad/schedule": {"ms": ms if steps_lo else 5 * ms},
    }
    I.save(folder / "bench.json", {"rows": rows})
    settings = {"steps_lo": steps_lo, "infoard": True, "framework": "rslad"}
    for seed, value in enumerate(worst):
        best = {"clean": 50.0, "worst": value}
        I.save(folder / f"s{seed}/results.json", {"best": best})
        I.save(folder / f"s{seed}/config.json", {"settings": settings})


def test_curve_sets_accuracy_beside_time(tmp_path, capsys):
    write_cell(tmp_path / "slow", 20.4, 0, [30.0, 32.0])
    write_cell(tmp_path / "quick", 8.0, 1, [29.0])
    assert I.main(["curve", str(tmp_path)]) == 0
    text = (tmp_path / "curve.md").read_text()
    assert text.strip() in capsys.readouterr().out
    header, *rows = cells_of(text)
    assert header == ["cell", "ms", "clean (%)", "worst (%)", "seeds"]
    assert rows[0] == ["quick", "8", "50.00", "29.00", "1"]
    assert rows[1] == ["slow", "20", "50.00 ± 0.00", "31.00 ± 1.41", "2"]
    assert len(rows) == 2 and (tmp_path / "figures/curve.png").exists()


def test_a_bench_without_runs_is_one_line(tmp_path, capsys):
    I.save(tmp_path / "cell/bench.json", {"rows": {}})
    assert I.main(["curve", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


# ==== 6. The tables in results/ ===================================================================


def shown(kind: str) -> list[tuple[str, str]]:
    """(name, tables) of all that pages show between `<!-- kind name -->` and `<!-- end -->`."""
    found = []
    for page in PAGES:
        for part in page.read_text().split(f"<!-- {kind}")[1:]:
            name, _, rest = part.partition(" -->\n\n")
            content, end, _ = rest.partition("\n\n<!-- end -->")
            assert end, f"{page}: no end of {kind}{name}"
            found.append((name.strip(), content))
    return found


def tables_in(file: Path) -> list[str]:
    """The tables of a kept file, which empty lines part."""
    return file.read_text().strip().split("\n\n")


def kept(name: str) -> list[str]:
    """The folders in results/ that hold a file of this name."""
    folders = [file.parent.relative_to(RESULTS) for file in RESULTS.rglob(name)]
    return sorted(folder.as_posix() for folder in folders)


@each("folder", kept("tables.md"))
def test_kept_tables_are_generated_from_results(folder, tmp_path):
    made = tmp_path / Path(folder).name
    shutil.copytree(RESULTS / folder, made)
    tables.run_tables(str(made))
    for file in (RESULTS / folder).glob("tables.*"):
        assert (made / file.name).read_bytes() == file.read_bytes()


@each("folder", kept("compare.md"))
def test_kept_gains_are_generated_from_results(folder, tmp_path):
    made = tmp_path / Path(folder).name
    shutil.copytree(RESULTS / folder, made)
    tables.run_compare(str(made))
    for file in (RESULTS / folder).glob("compare.*"):
        assert (made / file.name).read_bytes() == file.read_bytes()


def test_kept_curve_is_generated_from_results(tmp_path):
    shutil.copytree(RESULTS / "lite", tmp_path / "lite")
    tables.run_curve(str(tmp_path / "lite"))
    assert (tmp_path / "lite/curve.md").read_bytes() == (RESULTS / "lite/curve.md").read_bytes()


def test_pages_show_the_kept_files():
    for folder, content in shown("results/"):
        file = RESULTS / folder / "tables.md"
        assert set(content.split("\n\n")) <= set(tables_in(file)), folder
    for folder, content in shown("compare "):
        file = RESULTS / "evidence" / folder / "compare.md"
        assert set(content.split("\n\n")) <= set(tables_in(file)), folder
    [(_, attention)] = shown("attention")
    assert [attention] == tables_in(RESULTS / "evidence/first/attention.md")
    [(_, curve)] = shown("curve")
    assert [curve] == tables_in(RESULTS / "lite/curve.md")


def test_pages_show_every_kind_of_table():
    assert {folder for folder, _ in shown("results/")} == {"shapes", "namid", "mid"}
    compared = {Path(folder).name for folder in kept("compare.md")}
    assert {Path(folder).name for folder, _ in shown("compare ")} == compared


def test_the_readme_shows_what_the_gpu_said():
    found = json.loads((RESULTS / "gpu/fast/apgd.json").read_text())
    readme = (HOUSE / "README.md").read_text()
    table = readme.partition("<!-- gpu -->")[2].partition("<!-- end -->")[0]
    names = {"rslad": "RSLAD", "adaad": "AdaAD"}
    rows = []
    for base, name in names.items():
        for kind, added in (("plain", ""), ("infoard", " + InfoARD")):
            row = found[f"{base}_{kind}"]
            assert row["n"] == 1000
            cells = [f"{row[key]:.1f}" for key in ("clean", "pgd_sat", "apgd")]
            rows.append(f"| {name}{added} | {' | '.join(cells)} |")
    assert table.strip().splitlines()[2:] == rows
