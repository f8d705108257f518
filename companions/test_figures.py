"""What holds for figures.py: what is drawn is what was given, and attention maps by hand.

Figures are asked for their data, not compared as pixels.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import infoard as I
from companions import evaluation, figures
from test_infoard import mean, near, rand

CPU = torch.device("cpu")
ROOT = Path(I.__file__).parent


def images(n: int, seed: int = 0) -> torch.Tensor:
    """Images [n,3,32,32] in [0,1]."""
    return rand(n, 3, 32, 32, seed=seed).float()


def filled(fill, **content) -> Figure:
    """The figure that a function fills, laid out."""
    figure = Figure(layout="constrained")
    fill(figure, **content)
    figure.canvas.draw()
    return figure


def points(line) -> list[tuple[float, float]]:
    """The points of a line."""
    points = line.get_xydata().tolist()
    return [(x, y) for x, y in points]


def means_of(bars) -> list[tuple[float, float]]:
    """The points of error bars."""
    return points(bars[0])


def ends_of(bars, axis: int) -> tuple[list[float], list[float]]:
    """Where error bars begin and end on an axis."""
    segments = bars[2][0].get_segments()
    low = [float(segment[0, axis]) for segment in segments]
    high = [float(segment[1, axis]) for segment in segments]
    return low, high


def is_no_blank_picture(file: Path) -> bool:
    """Whether the pixels of a PNG differ: white paper alone has a deviation of zero."""
    return np.array(Image.open(file).convert("L")).std() > 5


# ==== 1. Drawing ==================================================================================


TITLES = []  # of what was drawn


def plot_something(figure) -> None:
    figure.subplots().plot([0, 1, 0, 1], lw=20)
    kept = figure.savefig

    def savefig(file) -> None:
        TITLES.append(figure.get_suptitle())
        kept(file)

    figure.savefig = savefig


def test_each_figure_is_drawn_as_png_and_pdf(tmp_path, capsys):
    before = dict(matplotlib.rcParams)
    TITLES.clear()
    figures.draw(tmp_path / "figures", one=plot_something, two=plot_something)
    assert set(TITLES) == {f"{tmp_path.parent.name}/{tmp_path.name}"}
    assert "one, two, as png and pdf" in capsys.readouterr().out
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert names == ["one.pdf", "one.png", "two.pdf", "two.png"]
    assert is_no_blank_picture(tmp_path / "figures/two.png")
    assert (tmp_path / "figures/one.pdf").read_bytes().startswith(b"%PDF")
    assert dict(matplotlib.rcParams) == before


def test_a_figure_that_has_a_title_keeps_it(tmp_path):
    def fill(figure):
        plot_something(figure)
        figure.suptitle("its own")

    TITLES.clear()
    figures.draw(tmp_path / "figures", one=fill)
    assert set(TITLES) == {"its own"}


@pytest.mark.parametrize(
    "folder, name",
    [
        ("runs/shapes-s0", "shapes-s0"),
        ("runs/demo/infoard", "demo/infoard"),
        ("/a/b/c", "b/c"),
        (ROOT / "mine", "mine"),  # without the name of the clone
        ("/a/runs", ""),
    ],
)
def test_a_run_is_called_by_its_folder(folder, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no such runs
    assert figures.name_of_run(Path(folder)) == name


def test_a_run_that_keeps_its_settings_is_called_by_them(tmp_path):
    settings = {"framework": "rslad", "plus": "", "infoard": True, "data_dir": "data"}
    I.save(tmp_path / "a/s0/config.json", {"settings": settings})
    assert figures.name_of_run(tmp_path / "a/s0") == "RSLAD + InfoARD (a/s0)"


def test_only_the_first_rank_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(I, "world", lambda: (1, 2))
    figures.draw(tmp_path / "figures", one=plot_something)
    assert not (tmp_path / "figures").exists()


def test_importing_figures_and_tables_needs_no_matplotlib():
    code = "import sys, companions.figures, companions.tables"
    code += "; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0


# ==== 2. The figures ==============================================================================


def test_gains_are_drawn_in_order_with_their_intervals():
    rows = {
        "RSLAD + InfoARD": {"worst": [0.5, 1.0, 1.5], "clean": [-2.5, -2.0, -1.5]},
        "b": {"clean": [2.0, 3.0, 4.0]},  # of a cell with other attacks
    }
    figure = filled(figures.figure_gains, rows=rows, title="gain on plain RSLAD", about="3 seeds")
    assert (figure.get_suptitle(), figure.get_supxlabel()) == ("gain on plain RSLAD", "3 seeds")
    worst, clean = figure.axes
    assert [label.get_text() for label in worst.get_yticklabels()] == ["RSLAD + InfoARD", "b"]
    assert means_of(clean.containers[0]) == [(-2.0, 0.0), (3.0, -1.0)]  # a above b
    low, high = ends_of(clean.containers[0], axis=0)
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)  # t of two degrees in closed form
    assert low == pytest.approx([-2 - half / 2, 3 - half])
    assert high == pytest.approx([-2 + half / 2, 3 + half])
    first, second = means_of(worst.containers[0])
    assert first == (1.0, 0.0) and math.isnan(second[0])


def test_gains_of_two_seeds_are_points_without_a_bar():
    rows = {"b": {"worst": [2.0, 4.0], "clean": [1.0, 1.0]}}
    worst, clean = filled(figures.figure_gains, rows=rows).axes
    assert means_of(worst.containers[0]) == [(3.0, 0.0)]
    hollow = [line for line in worst.lines if line.get_mfc() == "none"]
    assert [line.get_xdata().tolist() for line in hollow] == [[2.0, 4.0]]
    for panel in (worst, clean):  # equal gains are no interval of no width either
        [segment] = panel.containers[0][2][0].get_segments()
        assert len(segment) == 0


def test_curve_shows_mean_and_deviation_beside_time():
    slow = (20.4, "slow", [51.0, 53.0], [30.0, 34.0])
    quick = (8.0, "quick", [50.0], [29.0])
    clean, worst = filled(figures.figure_curve, rows=[slow, quick]).axes
    assert [text.get_text() for text in worst.texts] == ["quick", "slow"]
    assert [text.xy[0] for text in worst.texts] == [8.0, 20.4]
    assert means_of(clean.containers[1]) == [(8.0, 50.0)]
    assert means_of(clean.containers[0]) == [(20.4, 52.0)]
    assert means_of(worst.containers[0]) == [(20.4, 32.0)]
    [low], [high] = ends_of(worst.containers[0], axis=1)
    assert (high - low) / 2 == pytest.approx(statistics.stdev([30.0, 34.0]))


def test_names_of_a_curve_do_not_overlap():
    times = [36, 40, 42, 46, 49, 52, 60, 60.5, 61, 67, 68, 75, 90]
    rows = [(ms, f"cell{i}", [40.0 + i], [20.0 + i]) for i, ms in enumerate(times)]
    figure = filled(figures.figure_curve, rows=rows)
    for panel in figure.axes:
        for text in panel.texts:
            text.arrowprops = text.arrow_patch = None  # the words alone count
        boxes = [text.get_window_extent() for text in panel.texts]
        for left, right in zip(boxes, boxes[1:], strict=False):
            assert left.x1 <= right.x0 + 1  # a pixel


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.1, 20))
def test_places_are_moved_apart_by_the_gap_and_keep_their_order_and_mean(places, gap):
    places = sorted(places)
    moved = figures.apart(places, gap)
    assert len(moved) == len(places)
    assert all(b - a >= gap - 1e-6 for a, b in zip(moved, moved[1:], strict=False))
    assert np.mean(moved) == pytest.approx(np.mean(places), abs=1e-6)  # of sums over floats
    again = figures.apart(moved, gap)
    assert again == pytest.approx(moved, abs=1e-6)  # what is apart is left where it is


def log_of(epochs: int, **more: float) -> list[dict]:
    """Rows of a log as training writes them."""
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "lr": 0.1}
        row.update(loss=2.0 / epoch, feat=-1.0 * epoch)
        row.update(eps=8 / 255, steps=3.0)
        row.update(more)
        row["seconds"] = 1.0
        rows.append(row)
    return rows


def labels_of(panel) -> list[str]:
    """What the legend of a panel names."""
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_curves_show_the_log():
    results = {"best": {"epoch": 2, "n": 50}, "over_eps": {"0": 60.0, "8": 30.0}}
    log = log_of(3, val_clean=50.0, val_pgd=20.0)
    log[1].update(eps=12 / 255, steps=2.5)
    figure = filled(figures.figure_curves, log=log, results=results)
    accuracy, loss, attack, over_eps = figure.axes
    clean, pgd, best = accuracy.lines
    assert points(clean) == [(1, 50), (2, 50), (3, 50)]
    assert points(pgd) == [(1, 20), (2, 20), (3, 20)]
    assert points(best)[0][0] == 2
    assert labels_of(accuracy) == ["clean", "PGD-20", "best: epoch 2"]
    assert labels_of(loss) == ["loss, all terms", "feature information"]
    assert labels_of(attack) == ["mean radius (1/255)", "mean attack steps"]
    total, feat = loss.lines
    assert points(total)[1] == (2, 1) and points(feat)[1] == (2, -2)
    radius, steps = attack.lines
    assert points(radius) == [(1, 8), (2, 12), (3, 8)]
    assert points(steps) == [(1, 3), (2, 2.5), (3, 3)]
    assert points(over_eps.lines[0]) == [(0, 60), (8, 30)]
    assert labels_of(over_eps) == ["last epoch, n = 50", "95% interval"]
    corners = over_eps.collections[0].get_paths()[0].vertices
    low, high = evaluation.interval(0.3, 50)
    ends = corners[corners[:, 0] == 8][:, 1]
    assert ends.min() == pytest.approx(low) and ends.max() == pytest.approx(high)


def test_curves_have_no_panel_of_what_was_not_measured_or_never_changed():
    results = {"best": {"epoch": 2, "n": 50}}
    figure = filled(figures.figure_curves, log=log_of(2), results=results)
    assert [panel.get_ylabel() for panel in figure.axes] == ["nats"]
    assert all(panel.lines for panel in figure.axes)
    figure = filled(figures.figure_curves, log=log_of(2, val_clean=3.0), results=results)
    assert [panel.get_ylabel() for panel in figure.axes] == ["validation accuracy (%)", "nats"]


def test_a_log_of_one_epoch_is_shown_as_points():
    figure = filled(figures.figure_curves, log=log_of(1), results={"best": {"epoch": 1, "n": 9}})
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "o"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_sheet_has_a_picture_in_each_place(rows):
    columns = {"clean": rand(rows, 8, 8, 3), "student\nclean": rand(rows, 4, 4)}
    labels = [f"cat {i}" for i in range(rows)]
    said = {"student\nclean": [(f"dog {i}", i == 0) for i in range(rows)]}
    more = {"predictions": said, "caption": "what is shown, " * 20}
    figure = filled(figures.figure_sheet, labels=labels, columns=columns, **more)
    assert figure.get_supxlabel().split() == more["caption"].split()
    filled(figures.figure_sheet, labels=labels, columns=columns)  # as earlier runs kept it
    assert len(figure.axes) == 2 * rows
    for i in range(rows):
        left = figure.axes[2 * i]
        right = figure.axes[2 * i + 1]
        assert left.get_ylabel() == labels[i]
        assert right.get_xlabel() == f"dog {i}" and left.get_xlabel() == ""
        assert right.xaxis.label.get_color() == (figures.WRONG if i else figures.RIGHT)
        near(left.images[0].get_array(), columns["clean"][i])
        near(right.images[0].get_array(), columns["student\nclean"][i])


# ==== 3. A run ====================================================================================


def run_of(student, teacher=None, eps: float = 8 / 255) -> SimpleNamespace:
    """What sheet() asks of a run."""
    return SimpleNamespace(
        evaluated=student,
        nets={"teacher": teacher},
        device=CPU,
        cfg=SimpleNamespace(eps=eps),
        data=SimpleNamespace(classes=[f"class{i}" for i in range(10)]),
    )


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_sheet_goes_from_the_weakest_to_the_strongest(with_teacher):
    student = I.build_model("tiny").eval()
    teacher = I.build_model("tiny_wide").eval() if with_teacher else None
    x = images(10)
    y = torch.arange(10)
    made = figures.sheet(run_of(student, teacher), x, y, rows=4)
    judge = teacher if with_teacher else student
    lead = I.margin(I.predict(judge, x).softmax(1), y)
    chosen = lead.argsort()[[0, 3, 6, 9]]
    assert torch.equal(made["columns"]["clean"], x[chosen].movedim(1, 3))
    assert made["labels"] == [f"class{i}\nmargin {lead[i]:+.2f}" for i in chosen.tolist()]
    assert ("teacher attention\nclean" in made["columns"]) == with_teacher
    assert {len(column) for column in made["columns"].values()} == {4}


def sheet_of(student, eps: float = 8 / 255) -> dict[str, torch.Tensor]:
    """The columns of a sheet of six images."""
    run = run_of(student, eps=eps)
    return figures.sheet(run, images(6), torch.arange(6))["columns"]


def test_a_sheet_shows_the_attack_within_its_radius():
    student = I.build_model("tiny").eval()
    columns = sheet_of(student)
    change = columns["attacked"] - columns["clean"]
    assert 0 < change.abs().max() <= 8 / 255 + 1e-7  # float32
    near(columns["perturbation"], 0.5 + change / (16 / 255), 1e-6)  # black: -eps, white: eps
    assert (sheet_of(student, eps=0.0)["perturbation"] == 0.5).all()


def test_a_sheet_is_attacked_in_20_steps_of_a_quarter_of_the_radius():
    student = I.build_model("tiny").eval()
    made = figures.sheet(run_of(student), images(5), torch.arange(5))
    x = made["columns"]["clean"].movedim(3, 1)
    y = torch.tensor([int(label[5]) for label in made["labels"]])  # class3
    x_adv = I.pgd_ce(student, x, y, eps=8 / 255, alpha=2 / 255, steps=20, init="none")
    near(made["columns"]["attacked"], x_adv.movedim(1, 3), 1e-6)


def test_below_maps_stands_what_their_net_says_of_the_image():
    student = I.build_model("tiny").eval()
    teacher = I.build_model("tiny_wide").eval()
    made = figures.sheet(run_of(student, teacher), images(6), torch.arange(6))
    said = made["predictions"]
    assert len(said) == 4
    for name, net in (("student", student), ("teacher", teacher)):
        for kind in ("clean", "attacked"):
            x = made["columns"][kind].movedim(3, 1)
            p, named = I.predict(net, x).softmax(1).max(1)
            for i, (text, right) in enumerate(said[f"{name} attention\n{kind}"]):
                assert text == f"class{named[i]} {p[i]:.2f}"
                assert right == made["labels"][i].startswith(f"class{named[i]}\n")
    assert "margin of the teacher" in made["caption"] and "8/255" in made["caption"]


def test_what_a_net_without_maps_says_stands_below_the_images():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    made = figures.sheet(run_of(net), images(6), torch.arange(6))
    assert list(made["predictions"]) == ["clean", "attacked"]
    assert "margin of the student" in made["caption"]


def test_a_sheet_shows_regenerated_images_if_there_are_any():
    student = I.build_model("tiny").eval()
    student.regenerated = lambda x: 1 - x
    columns = sheet_of(student)
    assert torch.equal(columns["clean\nregenerated"], 1 - columns["clean"])
    assert torch.equal(columns["attacked\nregenerated"], 1 - columns["attacked"])


def stages_by_hand(net, x) -> list[torch.Tensor]:
    """The last features of `tiny` at each of its three resolutions."""
    found = []
    features = x
    for name, layer in net.named_children():
        features = layer(features)
        if name in ("relu", "layer1", "layer3"):
            found.append(features.detach())
    return found


def attention_by_hand(features: torch.Tensor) -> torch.Tensor:
    """Sums of squares over channels, of length one: [N,C,H,W] -> [N,HW]."""
    return F.normalize(features.square().sum(1).flatten(1))


def test_attention_is_shown_at_the_last_resolution_but_one():
    net = I.build_model("tiny").eval()
    x = images(2)
    x_adv = images(2, seed=1)
    shown = figures.attention_pictures(net, "net", x, x_adv)
    assert list(shown) == ["net attention\nclean", "net attention\nattacked"]
    for picture, seen in zip(shown.values(), (x, x_adv), strict=True):
        expected = attention_by_hand(stages_by_hand(net, seen)[1])
        assert picture.shape == (2, 8, 8)
        near(picture.flatten(1), expected, 1e-6)
    assert hooks_of(net) == 0


def test_a_net_without_maps_has_no_attention_to_show():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    x = images(2)
    assert figures.attention_pictures(net, "net", x, x) == {}


def hooks_of(net) -> int:
    """How many hooks are left in a net."""
    return sum(len(module._forward_hooks) for module in net.modules())


@pytest.fixture
def done(lab, tmp_path):
    """A copy of a finished run that may be changed."""
    shutil.copytree(lab.top / "done", tmp_path / "done")
    return tmp_path / "done"


def test_figures_of_a_finished_run_are_drawn_again(done):
    shutil.rmtree(done / "figures")
    assert I.main(["figures", str(done)]) == 0
    names = sorted(file.name for file in (done / "figures").iterdir())
    assert names == ["curves.pdf", "curves.png", "sheet.pdf", "sheet.png"]
    assert is_no_blank_picture(done / "figures/curves.png")
    assert is_no_blank_picture(done / "figures/sheet.png")


def test_figures_need_a_finished_run(tmp_path, capsys):
    assert I.main(["figures", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds no finished run" in error and error.count("\n") == 1


def test_figures_of_a_folder_are_those_of_the_runs_below_it(done, capsys):
    top = done.parent
    done.rename(top / "a")
    shutil.copytree(top / "a", top / "b/s0", ignore=shutil.ignore_patterns("sheet.pt", "figures"))
    shutil.copytree(top / "a", top / "c", ignore=shutil.ignore_patterns("log.jsonl"))
    shutil.copytree(top / "a", top / "d", ignore=shutil.ignore_patterns("results.json"))
    assert I.main(["figures", str(top)]) == 0
    out = capsys.readouterr().out
    assert f"in {top}/a/figures: curves, sheet" in out
    assert f"in {top}/b/s0/figures: curves, as png" in out
    assert "left out (no results.json), 1: d\n" in out and f"compare {top}" in out
    assert out.count("as png and pdf") == 2


def test_runs_without_a_log_are_one_line(done, capsys):
    (done / "log.jsonl").unlink()
    for folder in (done, done.parent):
        assert I.main(["figures", str(folder)]) == 2
        error = capsys.readouterr().err
        assert "log.jsonl" in error and error.count("\n") == 1


def test_accuracy_over_eps_is_of_the_radii_named(monkeypatch):
    tried = []

    def attack(net, x, y, eps, generator):
        tried.append(eps)
        return x

    monkeypatch.setattr(I, "pgd_sat", attack)
    student = I.build_model("tiny").eval()
    x = images(10)
    right = I.predict(student, x).argmax(1)
    found = figures.accuracy_over_eps(run_of(student), x, right)
    assert found == {str(radius): 100.0 for radius in figures.RADII}
    assert tried == [radius / 255 for radius in figures.RADII]


def test_a_finished_run_holds_its_accuracy_over_eps(done):
    results = json.loads((done / "results.json").read_text())
    over_eps = results["over_eps"]
    assert list(over_eps) == [str(radius) for radius in figures.RADII]
    assert over_eps["0"] == results["last"]["clean"]
    assert over_eps["8"] <= over_eps["0"] and over_eps["64"] <= over_eps["8"]


# ==== 4. Attention ================================================================================


def test_a_net_beside_itself_looks_alike_and_leaves_no_hooks():
    net = I.build_model("tiny").eval()
    x = images(6)
    for name, cosines in figures.alike(net, net, x, x).items():
        assert cosines.shape == (6,)
        assert (cosines <= 1 + 1e-5).all()  # of sums over float32
        itself = bool((cosines > 1 - 1e-5).all())
        assert itself == (name != "S(x), T(another)")
    assert hooks_of(net) == 0


def test_attention_is_compared_stage_by_stage():
    student = I.build_model("tiny").eval()
    teacher = I.build_model("tiny_wide").eval()
    x = images(5)
    x_adv = images(5, seed=1)

    def maps(net, seen):
        attention = [attention_by_hand(features) for features in stages_by_hand(net, seen)]
        return [F.normalize(a - a.mean(1, keepdim=True)) for a in attention]

    s = maps(student, x)
    s_adv = maps(student, x_adv)
    t = maps(teacher, x)
    expected = {
        "S(x), S(x')": (s, s_adv),
        "S(x), T(x)": (s, t),
        "S(x'), T(x)": (s_adv, t),
        "S(x'), T(x')": (s_adv, maps(teacher, x_adv)),
        "S(x), T(another)": (s, [stage.roll(1, 0) for stage in t]),
    }
    found = figures.alike(student, teacher, x, x_adv)
    assert list(found) == list(expected)
    for name, (a, b) in expected.items():
        stages = [F.cosine_similarity(u, v) for u, v in zip(a, b, strict=True)]
        near(found[name], mean(stages), 1e-5)  # of sums over float32
    means = [cosines.mean().item() for cosines in found.values()]
    assert len(set(means)) == 5  # all pairs differ


def test_attention_of_finished_runs(done, capsys):
    above = done.parent
    argv = ["attention", str(above), "--eval-subset", "20", "--device", "cpu"]
    assert I.main(argv) == 0
    text = (above / "attention.md").read_text()
    out = capsys.readouterr().out
    assert text in out and f"written in {above}: attention.md" in out
    assert "| done" in text and "S(x'), T(x)" in text


def test_attention_needs_a_teacher(done, capsys):
    config = json.loads((done / "config.json").read_text())
    config["settings"]["teacher"] = None
    I.save(done / "config.json", config)
    assert I.main(["attention", str(done.parent), "--eval-subset", "20"]) == 2
    assert "add --teacher" in capsys.readouterr().err
