"""What holds for runs.py, identity.py and locks.py: which run goes on, on which data, alone."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import infoard as I
from companions import bench, cli, evaluation, figures, identity, locks, own, runs
from companions.options import remarks
from companions.runs import same_settings
from test_infoard import (
    begun,
    differences,
    in_the_earlier_form,
    noise,
    one_line,
    rng,
    run,
)

each = pytest.mark.parametrize


# ==== 1. Settings =================================================================================


OTHER_INFOARD = {  # settings that only InfoARD reads, none as by default
    "asa": "off",
    "lam_lo": 0.5,
    "lam_hi": 9.0,
    "steps_lo": 1,
    "mim": "off",
    "w_feat": 9.0,
    "w_att": 9.0,
    "w_rel": 9.0,
    "tau": 9.0,
}


@each("name", OTHER_INFOARD)
def test_a_plain_run_is_not_bound_by_settings_of_infoard(name):
    other = {name: OTHER_INFOARD[name]}
    lifted = I.Config().resolved()
    plain = I.Config(infoard=False).resolved()
    with pytest.raises(I.InfoardError, match=I.flag_of(name)):
        same_settings(dataclasses.asdict(lifted) | other, lifted)
    same_settings(dataclasses.asdict(plain) | other, plain)
    with pytest.raises(I.InfoardError, match="--infoard"):  # what was lifted is not plain
        same_settings(dataclasses.asdict(lifted) | other, plain)


@each("name", ["critic_dim", "framework", "teacher", "alpha"])
def test_a_plain_run_is_bound_by_settings_of_others(name):
    plain = I.Config(infoard=False).resolved()
    with pytest.raises(I.InfoardError, match=I.flag_of(name)):
        same_settings(dataclasses.asdict(plain) | {name: 99}, plain)


def test_an_earlier_run_keeps_the_options_of_its_framework():
    namid = I.Config(infoard=False, framework="at", own={"mi_bound": "dv"})
    settings = in_the_earlier_form(dataclasses.asdict(namid))
    same_settings(settings, namid)
    with pytest.raises(I.InfoardError, match="jsd"):
        same_settings({**settings, "mi_bound": "jsd"}, namid)


def test_settings_of_infoard_change_nothing_in_a_plain_run():
    nets = []
    for options in ({}, OTHER_INFOARD):
        made = begun(framework="at", infoard=False, **options)
        nets.append(made.student.state_dict())
    assert differences(*nets) == []


# ==== 2. Runs on folders of images ================================================================

LINE = """--dataset folder --framework natural --student tiny --epochs 1 --batch-size 8 --lr 0.01
--attacks clean --no-figures --no-progress --device cpu"""


def write_images(root, classes=("ant", "bee"), n=12, m=4, seed=0):
    """A folder of small images, n of each class to train with and m to test."""
    for part, count in (("train", n), ("test", m)):
        for k, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i, image in enumerate(noise(count, 8, seed + 10 * k + len(part))):
                Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:02d}.png")
    return root


def said(capsys, *words):
    """(exit code, what was printed) of the command line."""
    code = I.main([*LINE.split(), *words])
    told = capsys.readouterr()
    return code, told.out + told.err


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A folder with images in A and a finished run on them in o."""
    top = tmp_path_factory.mktemp("finished")
    write_images(top / "A")
    with contextlib.chdir(top):
        assert I.main([*LINE.split(), "--data-dir", "A", "--out", "o"]) == 0
    return top


@pytest.fixture
def place(finished_run, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unfinished():
    """Takes the results away: the run is one to go on with."""
    Path("o/results.json").unlink()


def without_data():
    """Makes the run one of an earlier version, which kept no facts of its data."""
    for path in (Path("o/last.pt"), Path("o/best.pt")):
        file = I.load_tensors(path)
        del file["data"]
        torch.save(file, path)
    config = json.loads(Path("o/config.json").read_text())
    del config["data"]
    Path("o/config.json").write_text(json.dumps(config))


def another(change):
    """A copy B of the images, changed."""
    shutil.copytree("A", "B")
    change(Path("B"))


def rename_class(folder):
    for part in ("train", "test"):
        (folder / part / "ant").rename(folder / part / "cow")


def move_between_classes(folder):
    (folder / "train/ant/11.png").rename(folder / "train/bee/99.png")
    (folder / "train/bee/00.png").rename(folder / "train/ant/99.png")


OTHER_DATA = {
    "classes": (rename_class, r"2 classes, not these 2 \(only then: ant; only now: cow\)"),
    "more": (lambda d: shutil.copy(d / "train/ant/00.png", d / "train/ant/99.png"), "24 .* not 25"),
    "fewer": (lambda d: (d / "train/bee/03.png").unlink(), "24 training images, not 23"),
    "pixels": (
        lambda d: Image.new("RGB", (8, 8)).save(d / "train/bee/03.png"),
        "other training images",
    ),
    "test": (lambda d: Image.new("RGB", (8, 8)).save(d / "test/bee/03.png"), "other test images"),
    "swapped": (move_between_classes, "other training images"),
    "a third class": (
        lambda d: [
            shutil.copytree(d / part / "bee", d / part / "cow") for part in ("train", "test")
        ],
        r"2 classes, not these 3 \(only now: cow\)",
    ),
}


@each("begun_only", [False, True])
@each("name", OTHER_DATA)
def test_a_run_is_of_its_data(name, begun_only, place, capsys):
    change, why = OTHER_DATA[name]
    another(change)
    if begun_only:
        unfinished()
    code, told = said(capsys, "--data-dir", "B", "--out", "o", "--resume")
    assert code == 2
    assert re.search(f"error: o was (made|begun) on .*{why}", told)
    assert one_line(told.strip().splitlines()[-1])


@each("begun_only", [False, True])
def test_the_same_images_elsewhere_are_the_same_data(begun_only, place, capsys):
    another(lambda folder: None)
    if begun_only:
        unfinished()
    code, told = said(capsys, "--data-dir", "B", "--out", "o", "--resume")
    assert code == 0
    assert ("o is finished" in told) != begun_only
    assert Path("o/results.json").exists()


def test_a_finished_run_whose_data_are_gone_says_so(place, capsys):
    shutil.rmtree("A")
    code, told = said(capsys, "--data-dir", "A", "--out", "o")
    assert code == 0
    assert (
        "o: its data cannot be compared with those of now (no folder or archive is called A" in told
    )
    assert "o is finished" in told


def test_a_run_of_an_earlier_version_goes_on_but_not_with_other_classes(place, capsys):
    without_data()
    another(rename_class)
    code, told = said(capsys, "--data-dir", "B", "--out", "o")
    assert (
        code == 2 and "o was made on 2 classes, not these 2 (only then: ant; only now: cow)" in told
    )
    assert said(capsys, "--data-dir", "A", "--out", "o")[0] == 0
    unfinished()
    code, told = said(capsys, "--data-dir", "B", "--out", "o", "--resume")
    assert code == 2 and "o was begun on 2 classes" in told
    assert said(capsys, "--data-dir", "A", "--out", "o", "--resume")[0] == 0


def test_an_earlier_run_with_fewer_images_now_is_one_line(place, capsys):
    without_data()
    unfinished()
    for path in Path("A/train/bee").glob("0*.png"):
        path.unlink()
    code, told = said(capsys, "--data-dir", "A", "--out", "o", "--resume")
    assert code == 2 and "was begun on more training images than there are now, 14" in told


def test_a_net_is_not_evaluated_on_other_classes(place, capsys):
    another(rename_class)
    words = "--attacks clean --device cpu --data-dir".split()
    assert I.main(["eval", "o/best.pt", *words, "A"]) == 0
    assert "note" not in capsys.readouterr().out
    assert I.main(["eval", "o/best.pt", *words, "B"]) == 2
    err = capsys.readouterr().err
    assert (
        "o/best.pt was trained on 2 classes, not these 2 (only then: ant; only now: cow)" in err
        and one_line(err)
    )
    Image.new("RGB", (8, 8)).save("A/test/bee/03.png")
    assert I.main(["eval", "o/best.pt", *words, "A"]) == 0
    assert "note: the run of o/best.pt had other test images" in capsys.readouterr().out
    assert (
        said(capsys, *"--data-dir B --framework rslad --teacher o/best.pt --out t".split())[0] == 2
    )


def test_a_path_with_a_colon_keeps_what_a_checkpoint_says(place, capsys):
    file = I.load_tensors("o/best.pt")
    file["config"]["eps"] = 2 / 255
    Path("runs/12:30").mkdir(parents=True)
    torch.save(file, "runs/12:30/best.pt")
    assert cli.settings("runs/12:30/best.pt", {})["eps"] == 2 / 255
    with pytest.raises(I.InfoardError, match="no checkpoint file at runs/12:31/best.pt"):
        cli.settings("runs/12:31/best.pt", {})
    assert not cli.is_file("mine:net") and not cli.is_file("path/to/mine.py:net")


def test_a_tilde_is_the_home_of_any_option(place, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    code, told = said(capsys, "--data-dir=~/A", "--out=~/o")
    assert code == 0 and f"{place}/o is finished" in told


def test_kept_teachers_are_of_the_data_of_now(place, capsys):
    cfg = I.Config(dataset="folder", data_dir="A").resolved()
    out = Path("o")
    assert runs.teacher_folder(out, cfg) == out
    assert runs.teacher_folder(Path("none"), cfg) == Path("none")
    assert runs.teacher_folder(out, dataclasses.replace(cfg, flip=False)) == Path("o-noflip")
    another(rename_class)
    other = dataclasses.replace(cfg, data_dir="B")
    fresh = runs.teacher_folder(out, other)
    assert fresh != out and fresh == runs.teacher_folder(out, other)
    assert "o was made on 2 classes" in capsys.readouterr().out
    without_data()  # what an earlier version has trained is taken as it was
    assert runs.teacher_folder(out, other) == out


@each("content", [b"", b"{", b"[1]", b"\xff\xfe", None])
@each("file", ["results.json", "config.json"])
def test_broken_files_of_a_run_are_one_line(file, content, place, capsys):
    path = Path("o", file)
    if content is not None:
        path.write_bytes(content)
    elif file == "config.json":
        path.unlink()
    else:
        path.write_text('"text"')
    code, told = said(capsys, "--data-dir", "A", "--out", "o")
    assert code == 2
    assert f"error: o/{file} is missing or broken" in told and one_line(told)


def test_settings_that_are_none_are_one_line(place, capsys):
    Path("o/config.json").write_text('{"settings": [1]}')
    code, told = said(capsys, "--data-dir", "A", "--out", "o")
    assert code == 2 and "o/config.json is broken" in told


@each("seed, code", [(2**62, 0), (2**62 + 1, 2), (10**30, 2), (-1, 2)])
def test_any_seed_works_or_is_one_line(seed, code, place, capsys):
    got, told = said(capsys, "--data-dir", "A", "--out", "s", "--seed", str(seed))
    assert got == code
    if code:
        assert "--seed must lie in" in told and one_line(told)


def gone_on(capsys, *words):
    """(exit code, what was printed) of a run that is asked to go on by its folder alone."""
    code = I.main(["--resume", "--out", "o", *words])
    told = capsys.readouterr()
    return code, told.out + told.err


TAKEN = "taken from o/config.json: --dataset folder --data-dir A --student tiny --framework natural"
TAKEN += " --no-infoard --epochs 1 --batch-size 8 --lr 0.01 --device cpu --attacks clean"


@each("begun_only", [False, True])
def test_a_run_goes_on_by_its_folder_alone(begun_only, place, capsys):
    results = json.loads(Path("o/results.json").read_text())
    config = json.loads(Path("o/config.json").read_text())
    if begun_only:
        unfinished()
    code, told = gone_on(capsys)
    assert code == 0 and ("o is finished" in told) != begun_only
    assert f"{TAKEN} --no-figures --no-progress\n" in told
    assert json.loads(Path("o/results.json").read_text()) == results
    assert json.loads(Path("o/config.json").read_text()) == config


OTHERWISE = [
    (["--lr", "0.02"], "o was made with --lr 0.01, not 0.02"),
    (["--framework", "at"], "o was made with --framework natural, not at"),
    (["--dataset", "shapes"], "o was made with --dataset folder, not shapes"),
    (["--no-flip"], "o was made with --flip, not --no-flip"),
]


@each("words, why", OTHERWISE, ids=lambda value: str(value))
def test_what_is_given_otherwise_is_refused_as_ever(words, why, place, capsys):
    unfinished()
    code, told = gone_on(capsys, *words)
    assert code == 2 and f"infoard: error: {why}: choose another --out\n" in told
    code, told = gone_on(capsys, "--epochs", "9")
    keeps = "choose another --out, as a run keeps its number of epochs, finished or stopped\n"
    assert code == 2 and f"o was made with --epochs 1, not 9: {keeps}" in told


def test_what_may_be_given_otherwise_is_taken_as_given(place, capsys):
    unfinished()
    code, told = gone_on(capsys, "--attacks", "clean,fgsm", "--lr", "0.01")
    (taken,) = [line for line in told.splitlines() if line.startswith("taken from")]
    assert code == 0 and "--attacks" not in taken and "--lr" not in taken
    assert json.loads(Path("o/results.json").read_text())["best"]["fgsm"] is not None


def test_without_resume_or_a_run_nothing_is_taken(place, capsys, monkeypatch):
    assert runs.completed({"out": "o"}) == ({"out": "o"}, "")
    told = "none holds no run yet: one is begun"
    given = {"out": "none", "resume": True, "dataset": "shapes"}
    assert runs.completed(given) == (given, told)
    with pytest.raises(I.InfoardError, match="none holds no run to go on: name the folder"):
        runs.completed({"out": "none", "resume": True, "attacks": "clean"})
    told = "runs/shapes-tiny-at-s0 holds no run yet: one is begun"
    assert runs.completed({"resume": True, "framework": "at"})[1] == told
    monkeypatch.setenv("HOME", str(place))
    assert runs.completed({"out": "~/o", "resume": True})[0]["data_dir"] == "A"
    code, told = said(capsys, "--data-dir", "A", "--out", "new", "--resume")
    assert code == 0 and "taken from" not in told


def test_resume_that_names_no_run_lists_those_that_are_unfinished(place, capsys):
    """It begins nothing: what it would begin is the built-in job, which nobody has asked for."""
    line = ["--resume", "--no-progress"]
    assert I.main(line) == 2
    told = capsys.readouterr().err
    assert "runs/shapes-tiny-rslad-s0 holds none: there is none in runs/" in told and one_line(told)
    for name in ("cats", "dogs", "done", "teachers/kept"):
        I.save(Path("runs", name, "config.json"), {"settings": {}})
    I.save(Path("runs/done/results.json"), {})
    assert I.main(line) == 2
    told = capsys.readouterr().err
    assert told.endswith("unfinished are runs/cats, runs/dogs\n") and one_line(told)
    assert not Path("runs/shapes-tiny-rslad-s0").exists()
    out = "runs/shapes-tiny-rslad-s0"  # the usual folder: that run goes on as it was begun
    I.save(Path(out, "config.json"), {"settings": {"epochs": 3}})
    made, told = runs.completed({"resume": True})
    assert made["out"] == out and made["epochs"] == 3 and told.endswith("--epochs 3")


def test_the_words_of_a_run_make_it_again(tmp_path):
    """For settings of each kind: floats, switches, those of a framework alone, the usual ones."""
    made = [
        {"eps": 4 / 255, "steps": 3, "figures": False, "seed": 2},
        {"dataset": "cifar10", "infoard": False, "out": str(tmp_path / "a b"), "w_att": 0.05},
        {"framework": "adaad", "lam_hi": 1.25, "teacher_epochs": 2, "attacks": "clean,fgsm"},
        {"framework": "namid", "own": {"mi_bound": "dv"}},
        {},
    ]
    for one in made:
        cfg = I.Config(**one).resolved()
        words = runs.words_of(cfg)
        assert I.Config(**cli.parse("train", words)).resolved() == cfg
        assert len(words) <= 2 * len(one) + 1  # no more than was given


@each("begun", [False, True])
def test_a_stopped_teacher_goes_on_with_the_run_that_misses_it(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = I.Config(seed=5, epochs=3, figures=False).resolved()
    out = Path(asked.out)
    teacher = Path("runs/teachers/one")
    for folder in (teacher, out) if begun else (teacher,):
        I.save(folder / "last.pt", {})
    with pytest.raises(KeyboardInterrupt) as stopped:
        with runs.alone_in(out, asked), runs.alone_in(teacher, I.Config()):
            raise KeyboardInterrupt
    assert stopped.value.args == (f"{runs.options.program()} {words(asked, begun)} goes on",)
    assert runs.UNDER_WAY == []
    assert runs.how_to_go_on(teacher).endswith("--resume --out runs/teachers/one")


def words(asked, begun):
    """With which a run goes on that has begun to learn itself, or is called once more."""
    return f"--resume --out {asked.out}" if begun else "--epochs 3 --seed 5 --no-figures"


REFUSED = {  # what is found wrong once the folder is locked
    "a teacher's file": ["--framework", "rslad", "--teacher", "nowhere.pt"],
    "a student": ["--student", "resnet19"],
    "a student of one's own": ["--student", "three.py:net"],
    "an attack of one's own": ["--attacks", "clean,three.py:attack"],
}


@each("name", REFUSED)
def test_what_is_refused_leaves_no_run_behind(name, place, capsys):
    Path("three.py").write_text(
        "import torch\n\n\ndef net():\n    return torch.nn.Flatten()\n\n\n"
        "def attack(net, x, y, *, eps):\n    return x + 2\n"
    )
    code, told = said(capsys, "--data-dir", "A", "--out", "new", *REFUSED[name])
    assert code == 2 and one_line(told.splitlines()[-1]), told
    assert not Path("new").exists()


def test_a_teacher_that_is_stopped_leaves_no_run_of_a_student_behind(place, monkeypatch, capsys):
    def stopped(run, out):
        I.save(out / "last.pt", run.state())
        print(runs.how_to_go_on(out))
        raise SystemExit(143)

    monkeypatch.setattr(I, "fit", stopped)
    line = LINE.replace("natural", "rslad").split()
    line += ["--data-dir", "A", "--teacher-arch", "tiny", "--out", "new"]
    with pytest.raises(SystemExit):
        I.main(line)
    assert [file.parts[:2] for file in Path().rglob("config.json") if file.parts[0] != "o"] == [
        ("runs", "teachers")
    ]
    (told,) = [row for row in capsys.readouterr().out.splitlines() if "infoard.py --" in row]
    again = told.partition("infoard.py ")[2].split()
    made = I.Config(**cli.parse("train", again)).resolved()
    assert made == I.Config(**cli.parse("train", line)).resolved()


@each("settings", ["[1]", '{"lr": "much"}', '{"steps": []}'])
def test_settings_that_cannot_be_taken_are_one_line(settings, place, capsys):
    Path("o/config.json").write_text(f'{{"settings": {settings}}}')
    code, told = gone_on(capsys)
    assert code == 2 and "o/config.json is broken: choose another --out" in told and one_line(told)


@each("earlier", [False, True])
def test_options_of_a_framework_are_taken_and_understood(earlier, place):
    cfg = I.Config(framework="namid", own={"mi_bound": "dv"}, out="n").resolved()
    old = dataclasses.asdict(cfg)
    config = {"settings": in_the_earlier_form(old) if earlier else old}
    I.save(Path("n/config.json"), config)
    given = cli.parse("train", ["--resume", "--out", "n", "--mi-ramp", "0.5"])
    assert given["own"] == {"mi_ramp": 0.5}
    made, _ = runs.completed(given)
    assert made["own"] == {**cfg.own, "mi_ramp": 0.5}
    with pytest.raises(I.InfoardError, match="n was made with --mi-ramp 1.0, not 0.5"):
        same_settings(config["settings"], I.Config(**made).resolved())
    same_settings(
        config["settings"], I.Config(**runs.completed({**given, "own": {}})[0]).resolved()
    )


def test_what_was_said_when_a_run_began_is_not_said_again(place):
    cfg = I.Config(framework="at", alpha=0.5, infoard=False, out="n").resolved()
    I.save(Path("n/config.json"), {"settings": dataclasses.asdict(cfg)})
    (line,) = runs.new_lines(cfg, remarks)
    assert "--alpha 0.5 is not used" in line
    Path("n/last.pt").touch()
    assert runs.new_lines(cfg, remarks) == []
    other = dataclasses.replace(cfg, eps_l2=1.0)  # what may change when it goes on
    (line,) = runs.new_lines(other, remarks)
    assert "--eps-l2 1.0 is not used" in line


def test_a_diverged_run_goes_on_by_its_folder_and_another_lr(place, capsys):
    unfinished()
    Path("o/diverged.json").write_text("{}")
    code, told = gone_on(capsys, "--lr", "0.005")
    assert code == 0 and "o goes on with --lr 0.005 in the place of 0.01" in told


# ==== 2a. Finished runs ===========================================================================


def test_a_finished_run_tells_with_what_it_was_evaluated(place, capsys):
    code, told = gone_on(capsys, "--attacks", "clean,fgsm,pgd")
    assert code == 0
    line = "it was evaluated with clean on 8 images, without fgsm, pgd_sat, pgd_trades; this does"
    more = f"{cli.program()} eval o/best.pt --attacks clean,fgsm,pgd --out o\n"
    assert f"{line} more: {more}" in told
    command = told.partition(f"more: {cli.program()} ")[2].splitlines()[0]
    assert I.main([*command.split(), "--device", "cpu"]) == 0
    assert "fgsm" in capsys.readouterr().out
    assert "evaluated with" not in gone_on(capsys, "--attacks", "clean")[1]


@each("subset, told", [(None, False), (0, True), (3, False), (6, True)])
def test_a_finished_run_tells_of_how_many_images_it_is(subset, told, place):
    results = json.loads(Path("o/results.json").read_text())
    results["best"].update(n=5)
    I.save(Path("o/results.json"), results)
    cfg = I.Config(attacks="clean", eval_subset=subset)
    lines = runs.not_evaluated(cfg, Path("o"))
    assert bool(lines) == told
    if told:
        assert "evaluated with clean on 5 images; " in lines[0]
        assert lines[0].endswith(f"o/best.pt --eval-subset {subset} --out o")


def test_of_a_shared_teacher_that_is_finished_nothing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = "runs/teachers/t"
    first = run(out, framework="natural", infoard=False)
    capsys.readouterr()
    assert run(out, framework="natural", infoard=False) == first
    assert capsys.readouterr().out == ""


def touch(folder, **drawn):
    """figures.draw, which takes seconds, without its pictures."""
    folder.mkdir(exist_ok=True)
    for name in drawn:
        (folder / f"{name}.pdf").touch()
    print(f"drawn: {', '.join(drawn)}")


def test_what_figures_take_long_for_is_told_before_them(desk, lab, monkeypatch, capsys):
    """An interrupt while they are drawn loses no accuracy."""

    def interrupted(run, results):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "illustrate", interrupted)
    settings = {"framework": "natural", "infoard": False, "epochs": 1, "subset": 40}
    with pytest.raises(KeyboardInterrupt):
        run("new", figures=True, attacks="clean", eval_subset=20, **settings)
    results = json.loads(Path("new/results.json").read_text())
    assert f"best (epoch 1):  clean {results['best']['clean']:.2f}" in capsys.readouterr().out


LOST = {  # what a kill between the results and the figures leaves out
    "all figures": ["over_eps", "sheet.pt", "figures"],
    "the sheet": ["sheet.pt", "figures"],
    "the drawing": ["figures"],
    "a drawing": ["figures/sheet.pdf"],
}


@each("name", LOST)
def test_figures_that_are_missing_are_drawn_when_asked_for(name, desk, lab, monkeypatch, capsys):
    results = json.loads(Path("done/results.json").read_text())
    sheet = I.load_tensors("done/sheet.pt")
    for lost in LOST[name]:
        if lost == "over_eps":
            I.save(Path("done/results.json"), {k: v for k, v in results.items() if k != lost})
        elif lost == "figures":
            shutil.rmtree("done/figures")
        else:
            Path("done", lost).unlink()
    monkeypatch.setattr(figures, "draw", touch)
    monkeypatch.setattr(figures, "RADII", figures.RADII[:2])
    line = ["--resume", "--out", "done", "--no-figures"]
    assert I.main(line) == 0
    assert not Path("done/figures/sheet.pdf").exists()
    monkeypatch.setattr(I, "fit", None)  # nothing is learned
    assert I.main(line[:-1]) == 0
    shown = capsys.readouterr().out
    assert shown.index("done is finished; drawing its figures\n") < shown.index("done best (epoch")
    assert f"clean {results['best']['clean']:.2f}  " in shown
    assert shown.index("done best (epoch") < shown.index("drawn: curves, sheet")
    made = json.loads(Path("done/results.json").read_text())
    assert made.pop("over_eps").items() <= results.pop("over_eps").items()
    assert made == results
    again = I.load_tensors("done/sheet.pt")
    assert torch.equal(again["columns"]["attacked"], sheet["columns"]["attacked"])
    assert I.main(line[:-1]) == 0
    assert "drawn" not in capsys.readouterr().out  # they are there


@each("arch, told", [("wrn_34_10", True), ("tiny_wide", False)])
def test_a_large_teacher_on_a_cpu_is_told_before_it_is_trained(arch, told, place, capsys):
    cfg = I.Config(dataset="folder", data_dir="A", teacher_arch=arch, device="cpu").resolved()
    runs.teacher_folder(Path("o"), cfg)  # it is there
    assert capsys.readouterr().out == ""
    runs.teacher_folder(Path("gone"), cfg)
    shown = capsys.readouterr().out
    assert ("on a CPU a wrn_34_10 learns for hours or days" in shown) == told


def test_no_teacher_is_trained_for_a_picture(place, monkeypatch, capsys):
    cfg = I.Config(dataset="folder", data_dir="A", out="o").resolved()
    with pytest.raises(I.InfoardError, match="its teacher is no longer in gone"):
        runs.teacher_folder(Path("gone"), cfg)
    monkeypatch.setattr(I, "get_nets", lambda cfg, *about: runs.teacher_folder(Path("gone"), cfg))
    code, told = gone_on(capsys, "--figures")
    assert code == 0 and "the figures of o cannot be drawn: its teacher is no longer in" in told


@each(
    "right, n, classes, chance", [(4, 10, 10, 10), (5, 10, 2, 50), (9, 10, 2, 50), (40, 90, 3, 0)]
)
def test_a_net_is_held_against_always_one_class(right, n, classes, chance):
    y = torch.arange(n) % classes
    low, high = evaluation.interval(right / n, n)
    result = {"clean": 100 * right / n, "n": n, "ci95": {"clean": [low, high]}}
    lines = runs.about_chance(result, y, "try more")
    assert bool(lines) == (low <= 100 / classes)
    if lines:
        assert f"be told from chance, {chance:.1f} (always one class): try more" in lines[0]
    y = torch.tensor([0] * (n - 1) + [1])  # nearly all of one class
    assert runs.about_chance(result, y, "")


def test_a_student_that_has_learned_nothing_is_told(tmp_path, capsys):
    results = run(tmp_path / "r", framework="natural", lr=0.0, epochs=1)
    shown = capsys.readouterr().out
    assert shown.count("cannot be told from chance") == 1
    assert sum("cannot be told from chance" in note for note in results["best"]["notes"]) == 1
    about = "360 training images, --batch-size 64, --epochs 1"
    assert f"warning: 6 steps in all ({about}) are too few to learn much: lower" in shown


# ==== 3. What data are ============================================================================


def small_data(y, size=8, classes=2):
    images = torch.from_numpy(noise(len(y), size)).contiguous(memory_format=torch.channels_last)
    names = [str(k) for k in range(classes)]
    return I.Data(images, torch.tensor(y), images[:2], torch.tensor(y[:2]), names)


BAD_DATA = {
    "labels": (lambda d: d.y_train.fill_(2), "y_train must be long, in 0 to 1"),
    "numbers": (
        lambda d: setattr(d, "y_test", d.y_test[:1]),
        "x_test are 2 images, y_test 1 labels",
    ),
    "range": (lambda d: setattr(d, "x_train", d.x_train.float()), "must be uint8, or float32 in "),
    "double": (lambda d: setattr(d, "x_test", d.x_test.double() / 255), "must be uint8, or float"),
    "numpy": (lambda d: setattr(d, "x_train", d.x_train.numpy()), "must be tensors"),
    "a column": (lambda d: setattr(d, "y_train", d.y_train[:, None]), r"y_train is \[4, 1\]"),
    "sizes": (
        lambda d: setattr(d, "x_test", d.x_test[..., :4]),
        r"are \[3, 8, 8\], test images \[3,",
    ),
    "one class": (lambda d: setattr(d, "classes", ["a"]), "has one class"),
    "channels": (lambda d: setattr(d, "x_test", d.x_test[:, :1]), r"x_test is \[2, 1, 8, 8\]"),
    "none": (lambda d: setattr(d, "x_test", d.x_test[:0]), r"x_test is \[0, 3, 8, 8\]"),
    "dtype": (lambda d: setattr(d, "y_train", d.y_train.float()), "y_train must be long"),
}


@each("name", BAD_DATA)
def test_data_that_no_net_can_learn_from_are_one_line(name):
    change, why = BAD_DATA[name]
    data = small_data([0, 1, 1, 0])
    change(data)
    with pytest.raises(I.InfoardError, match=f"the data set mine:load: {why}|{why}") as error:
        identity.facts("mine:load", data)
    assert one_line(error.value)


def test_names_of_classes_that_were_no_words_are_the_same():
    assert identity.other_classes([0, 1], ["0", "1"]) == ""
    assert "another order" in identity.other_classes([0, 1], ["1", "0"])


def test_an_earlier_run_normalises_its_natural_teacher_as_it_did(tmp_path):
    for nat, found in (("nat.pt", "cifar10"), (None, "none")):
        given = {"teacher_norm": "cifar10", "teacher_nat": nat}
        settings = dataclasses.asdict(I.Config(**given, out=str(tmp_path)))
        del settings["teacher_nat_norm"]
        I.save(tmp_path / "config.json", {"settings": settings})
        begun = runs.begun_settings({"resume": True, "out": str(tmp_path)})
        assert I.Config(**begun).teacher_nat_norm == found


def test_what_is_no_data_is_one_line_and_names_of_classes_are_words():
    with pytest.raises(I.InfoardError, match="is a tuple, no infoard.Data"):
        identity.facts("mine:load", (1, 2))
    data = small_data([0, 1, 1, 0])
    data.classes = numpy.array([7, 9])
    identity.facts("mine:load", data)
    assert data.classes == ["7", "9"]


def test_facts_change_with_pixels_and_labels_alone():
    about = identity.facts("mine", small_data([0, 1, 1, 0]))
    assert about["train"] == [2, 2] and about["test"] == [1, 1]
    other_layout = small_data([0, 1, 1, 0])
    other_layout.x_train = other_layout.x_train.contiguous()
    assert identity.facts("mine", other_layout) == about
    assert identity.facts("mine", small_data([1, 0, 1, 0]))["train_sha256"] != about["train_sha256"]
    brighter = small_data([0, 1, 1, 0])
    brighter.x_train[0, 0, 0, 0] ^= 1
    assert identity.facts("mine", brighter)["train_sha256"] != about["train_sha256"]
    assert identity.facts("shapes", small_data([0, 1])) == {}  # rendered: bits differ by machine


def split_as_before(y, val_size):
    """Validation images as they were chosen before rare classes were kept from losing theirs."""
    return I.class_balanced(y, min(val_size, len(y) // 10))


def made_run(y, **options):
    data = small_data(y, classes=max(y) + 1)
    cfg = I.Config(framework="natural", student="tiny", device="cpu", **options).resolved()
    return I.Run(cfg, data, torch.device("cpu"), {"teacher": None})


@given(
    classes=st.integers(1, 6), n=st.integers(2, 40), more=st.integers(0, 5), val=st.integers(0, 40)
)
@settings(max_examples=10)
def test_balanced_sets_are_split_as_ever(classes, n, more, val):
    y = [k for k in range(classes) for _ in range(n)] + list(range(min(more, classes)))
    made = made_run(y, val_size=val)
    assert torch.equal(made.val, split_as_before(torch.tensor(y), val))


@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=6), val=st.integers(0, 60))
@settings(max_examples=15)
def test_no_class_loses_more_than_a_tenth_nor_its_last_image(counts, val):
    assume(max(counts) - min(counts) > 1)
    y = [k for k, n in enumerate(counts) for _ in range(n)]
    made = made_run(y, val_size=val)
    lost = torch.tensor(y)[made.val].bincount(minlength=len(counts))
    assert (10 * lost <= torch.tensor(counts)).all()
    assert sorted([*made.val.tolist(), *made.train.tolist()]) == list(range(len(y)))


def test_large_uneven_sets_are_split_as_ever():  # such as SVHN: a tenth is far from any class
    y = [k for k, n in enumerate((300, 500, 1300)) for _ in range(n)]
    made = made_run(y, val_size=60)
    assert torch.equal(made.val, split_as_before(torch.tensor(y), 60))


@each("subset", [100, 250, 500])
def test_an_earlier_choice_of_images_is_kept_when_a_run_goes_on(subset):
    """Of 200 classes, where a round that is cut short once took the first ones."""
    y = torch.arange(200).repeat(4)
    before = runs.balanced_as_before(y, subset)
    val = before[::10]
    train = before[~torch.isin(before, val)]
    data = small_data(y.tolist(), classes=200)
    cfg = I.Config(subset=subset, student="tiny", framework="natural", device="cpu").resolved()
    made = I.Run(cfg, data, torch.device("cpu"), {"teacher": None})
    state = {"size": 8, "config": {}, "at": {"order": train}, "model": made.student.state_dict()}
    runs.of_earlier_versions(made, state, Path("last.pt"))
    assert torch.equal(made.train, train) and torch.equal(made.val, val)


def test_an_earlier_split_is_kept_when_a_run_goes_on():
    y = [0] * 60 + [1] * 4
    made = made_run(y)
    aside = split_as_before(torch.tensor(y), 6)
    train = torch.arange(64)[~torch.isin(torch.arange(64), aside)]
    assert not torch.equal(train, made.train)
    order = train[torch.randperm(len(train), generator=rng())]
    state = {"size": 8, "config": {}, "at": {"order": order}}
    state["model"] = made.student.state_dict()
    runs.of_earlier_versions(made, state, Path("last.pt"))
    assert torch.equal(made.train, train) and torch.equal(made.val, aside)


@each("share, told", [(0.1, True), (0.0, False)])
def test_dropout_is_told(share, told, capsys):
    net = torch.nn.Sequential(torch.nn.Dropout2d(share))
    made = {"student": net, "device": torch.device("cpu"), "info": None, "nets": {}}
    made.update(cfg=I.Config(attacks="clean").resolved(), at=I.Progress(step=1))
    runs.introduce(SimpleNamespace(**made, data=bench.random_data(20, 8)))
    assert ("the student has dropout" in capsys.readouterr().out) == told


def test_no_flip_learns_from_images_as_they_lie():
    images = []
    for flip in (True, False):
        made = made_run([0, 1] * 20, flip=flip)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(I, "augment", lambda x, generator, pad, flip: images.append(flip) or x)
            I.draw(made, torch.arange(4))
    assert images == [True, False]


# ==== 4. Going on =================================================================================


def write_run(out, cfg, **more):
    """The files of a run that has begun."""
    out.mkdir()
    config = {"settings": dataclasses.asdict(cfg), **more}
    (out / "config.json").write_text(json.dumps(config))
    torch.save({"classes": []}, out / "last.pt")
    return dataclasses.replace(cfg, resume=True)


@each("name", ["teacher", "teacher_nat"])
def test_the_same_file_under_another_path_is_the_same_teacher(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.pt").write_bytes(b"weights")
    shutil.copy("t.pt", "copy.pt")
    Path("other.pt").write_bytes(b"others")
    cfg = I.Config(out="o", **{name: "t.pt"}).resolved()
    cfg = write_run(Path("o"), cfg, **{f"{name}_sha256": own.digest("t.pt")})
    for path in ("t.pt", "./t.pt", str(tmp_path / "t.pt"), "copy.pt"):
        runs.same_run(dataclasses.replace(cfg, **{name: path}), Path("o"))
    for path in ("other.pt", "missing.pt", None):
        with pytest.raises(I.InfoardError, match=I.flag_of(name)):
            runs.same_run(dataclasses.replace(cfg, **{name: path}), Path("o"))
    shutil.copy("other.pt", "t.pt")
    with pytest.raises(I.InfoardError, match="t.pt has changed since o was begun"):
        runs.same_run(cfg, Path("o"))


def begun_with_teacher(out, sha256, steps):
    """A run after so many steps, in whose folder it stands which teacher it was begun with."""
    I.save(out / "config.json", {"settings": {}, "teacher_sha256": sha256})
    teacher = nn.Linear(1, 1)
    teacher.file = str(out / "teacher.pt")
    Path(teacher.file).write_text("weights")
    cfg = I.Config(out=str(out))
    return SimpleNamespace(cfg=cfg, at=SimpleNamespace(step=steps), nets={"teacher": teacher})


def test_a_run_goes_on_with_the_teacher_that_it_was_begun_with_alone(tmp_path):
    right = hashlib.sha256(b"weights").hexdigest()
    for sha256, steps in ((right, 5), (None, 5), ("another", 0)):
        runs.same_teachers(begun_with_teacher(tmp_path, sha256, steps))
    without = begun_with_teacher(tmp_path, "another", 5)
    without.nets = {}  # a net that is not asked for now is no other one
    runs.same_teachers(without)
    with pytest.raises(I.InfoardError, match="begun with another teacher than .*teacher.pt"):
        runs.same_teachers(begun_with_teacher(tmp_path, "another", 5))


def test_a_run_of_another_net_than_its_name_means_now_is_one_line(tmp_path):
    made = begun(framework="natural")
    state = made.state()
    state["model"].popitem()
    I.save(tmp_path / "last.pt", state)
    with pytest.raises(I.InfoardError, match="is of another net than tiny is now") as error:
        made.load(tmp_path / "last.pt")
    assert one_line(error.value)


def test_the_advice_after_nan_can_be_followed(tmp_path, monkeypatch, capsys):
    train_step = I.train_step

    def break_the_second_epoch(made, rows, share):
        train_step(made, rows, share)
        if made.at.epoch == 1 and made.cfg.lr > 0.05:
            made.student.linear.bias.data.fill_(torch.nan)

    monkeypatch.setattr(I, "train_step", break_the_second_epoch)
    out = tmp_path / "r"
    options = {"framework": "natural", "resume": True}
    with pytest.raises(I.InfoardError, match=r"not finite .* --lr 0.1 .*last.pt: --resume goes on"):
        run(out, lr=0.1, **options)
    with pytest.raises(I.InfoardError, match="--batch-size 64, not 32"):
        run(out, lr=0.01, batch_size=32, **options)
    with pytest.raises(SystemExit):
        run(out, lr=0.01, stop=1, **options)
    assert "goes on with --lr 0.01 in the place of 0.1" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["lr"] == 0.01 and config["changes"] == [{"lr": [0.1, 0.01]}]
    assert not (out / "diverged.json").exists()
    with pytest.raises(I.InfoardError, match="--lr 0.01, not 0.02"):  # only after NaN
        run(out, lr=0.02, **options)
    run(out, lr=0.01, **options)
    assert I.load_tensors(out / "last.pt")["config"]["lr"] == 0.01


def test_weights_that_are_not_finite_are_never_the_last_good_checkpoint(tmp_path, monkeypatch):
    train_step = I.train_step

    def break_the_last_step(made, rows, share):
        train_step(made, rows, share)
        if made.at.position == len(made.train):
            made.student.conv1.weight.data[0] = torch.inf

    monkeypatch.setattr(I, "train_step", break_the_last_step)
    with pytest.raises(I.InfoardError, match="last good checkpoint: none"):
        run(tmp_path / "r", framework="natural")
    assert not (tmp_path / "r/last.pt").exists()


@each("schedule, told", [("1,9", "at 9"), ("8,9", "at 8, 9"), ("1,7", ""), ("cosine", "")])
def test_drops_after_the_end_are_told(schedule, told, capsys):
    cfg = I.Config(schedule=schedule, epochs=8, figures=False).resolved()
    runs.check_possible(cfg, torch.device("cpu"))
    out = capsys.readouterr().out
    assert ("never falls" in out) == bool(told)
    assert told in out


def test_a_last_batch_of_one_that_batch_norm_cannot_take_is_left_out(tmp_path, capsys):
    made = made_run([0, 1] * 9 + [0], batch_size=6, epochs=2, val_size=0, attacks="clean")
    assert runs.learned_from(made) == 18
    assert "18 of 19 images are learned from" in capsys.readouterr().out
    I.fit(made, tmp_path)
    assert made.at.step == 6
    assert len(made.at.order) == 19  # others each time
    assert math.isfinite(made.at.history[-1]["loss"])


def test_other_last_batches_are_learned_from():
    assert runs.learned_from(made_run([0, 1] * 9, batch_size=8, val_size=0)) == 18
    assert runs.learned_from(made_run([0, 1] * 9, batch_size=9, val_size=0)) == 18
    made = made_run([0, 1] * 9 + [0], batch_size=6, val_size=0)
    before = copy.deepcopy(made.student.state_dict())
    made.size = 32  # more than one pixel: batch norm takes it
    assert runs.learned_from(made) == 19
    assert differences(before, made.student.state_dict()) == []
    with pytest.raises(I.InfoardError, match="1 training images are too few"):
        runs.learned_from(made_run([0], val_size=0))


# ==== 5. One process in a folder ==================================================================


def test_a_second_process_is_refused_in_one_line(tmp_path):
    out = tmp_path / "in/o"
    with runs.alone_in(out):
        with pytest.raises(I.InfoardError, match=f"in use by process {os.getpid()} on") as error:
            with runs.alone_in(out):
                pass
        assert one_line(error.value)
        with runs.alone_in(tmp_path / "other"):
            pass
        (out / "last.pt").write_text("")
    assert [path.name for path in out.iterdir()] == ["last.pt"]
    with runs.alone_in(out):
        pass


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    for error in (None, I.InfoardError, KeyboardInterrupt, SystemExit):
        with contextlib.suppress(I.InfoardError, KeyboardInterrupt, SystemExit):
            with runs.alone_in(tmp_path / "in/o"):
                if error:
                    raise error
        assert list(tmp_path.iterdir()) == []


def test_a_shared_teacher_is_waited_for(tmp_path, capsys):
    out = tmp_path / "runs/teachers/t"
    order = []

    def second():
        with runs.alone_in(out):
            order.append("second")

    thread = threading.Thread(target=second)
    with runs.alone_in(out):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "waiting for it" in capsys.readouterr().out


def test_what_a_killed_process_left_is_taken_over_and_tidied(tmp_path):
    mine = {"my.part", "a.part1.txt", "photos.zip.part1", "photos.tar.part02"}
    for name in {".lock", "last.pt.part123", "config.json.part9"} | mine:
        (tmp_path / name).write_text("process 1 on another machine")
    with runs.alone_in(tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {".lock"} | mine


def test_without_locks_or_a_folder_to_write_in_a_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with runs.alone_in(tmp_path / "file/o"):
        pass
    monkeypatch.setattr(locks, "fcntl", None)
    with runs.alone_in(tmp_path / "o"), runs.alone_in(tmp_path / "o"):
        pass


# ==== 6. Busy machines ============================================================================

HEAD = Path(I.__file__).read_text().partition("\nimport torch\n")[0]


@each(
    "program, given, found",
    [
        ("/home/me/infoard.py", {}, "10000"),
        ("/usr/bin/infoard", {}, "10000"),
        ("mine.py", {}, None),
        ("", {}, None),
        ("infoard.py", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("infoard.py", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_the_program_lets_idle_threads_give_way(program, given, found, monkeypatch):
    """What stands before torch is loaded, since OpenMP reads its settings then."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [program])
    exec(HEAD, {"__name__": "infoard"})
    assert os.environ.get("GOMP_SPINCOUNT") == found


@pytest.mark.skipif(locks.fcntl is None, reason="a system without locks")
def test_a_lock_is_told_of_although_its_file_has_just_been_removed(tmp_path):
    path = tmp_path / ".lock"
    with open(path, "a+") as held, open(path, "a+") as file:
        assert locks.is_locked(held, wait=False)
        held.write("process 1")
        held.flush()
        path.unlink()
        with pytest.raises(I.InfoardError, match="is in use by process 1"):
            locks.is_locked(file, wait=False)
