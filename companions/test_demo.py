"""What holds for demo.py: three runs that differ in their defence alone, and a table of them."""

import pytest

import infoard as I
from companions import demo


@pytest.fixture
def trained(monkeypatch):
    """The settings of the runs that the demo makes; each student is right on 10 images more."""
    made = []

    def train(**given):
        made.append(given)
        worst = 10.0 * len(made)
        best = {"clean": 90.0, "pgd_sat": worst + 2, "cw": worst + 1, "worst": worst, "n": 2000}
        return {"best": best | {"ci95": {"worst": [worst - 1.5, worst + 1.5]}}, "last": {}}

    monkeypatch.setattr(I, "train", train)
    return made


def test_the_students_differ_in_nothing_but_their_defence(trained):
    assert I.main(["demo", "--seed", "3"]) == 0
    settings = [I.Config(**given).resolved() for given in trained]
    assert [cfg.framework for cfg in settings] == ["natural", "adaad", "adaad"]
    assert [cfg.infoard for cfg in settings] == [False, False, True]
    assert [cfg.out for cfg in settings] == [f"runs/demo-s3/{name}" for name in demo.STUDENTS]
    same = "dataset subset student epochs steps eps batch_size lr seed eval_subset attacks".split()
    for name in same:
        assert len({getattr(cfg, name) for cfg in settings}) == 1
    assert settings[0].seed == 3 and settings[0].eval_subset == 0  # all test images


def test_the_table_has_what_was_measured_its_interval_and_n(trained, capsys):
    assert I.main(["demo", "--out", "here", "--eps", "4/255"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("|")]
    rows = [[text.strip() for text in row] for row in rows]
    assert [row[0] for row in rows[2:]] == [name for name, _ in demo.STUDENTS.values()]
    assert rows[4][1:] == ["90.0", "32.0", "31.0", "30.0", "28.5 to 31.5", "2000"]
    assert "radius 4/255" in shown and "One seed" in shown and "here/infoard/figures" in shown
