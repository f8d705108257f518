"""What holds for cli.py: verbs and their options, evaluation of any checkpoint, and that every
command on the pages is understood.
"""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infoard as I
from companions import checkpoints, cli, options, own, recipes
from test_infoard import error_of, own_file

ROOT = Path(I.__file__).parent
SETTINGS = [f for f in dataclasses.fields(I.Config) if f.name != "own"]


# ==== 1. Verbs ====================================================================================


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        I.main([verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"infoard.py {verb}" in shown and len(shown) > 100


def test_help_lists_the_verbs_with_examples_that_are_understood(capsys):
    assert I.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("InfoARD: ")
    assert "    python infoard.py --dataset folder --data-dir images\n" in shown
    lines = shown.partition("its own --help:\n")[2].splitlines()
    assert [line.split()[0] for line in lines[::2]] == list(cli.VERBS)
    for verb, example in zip(cli.VERBS, lines[1::2], strict=True):
        program, file, named, *words = shlex.split(example)
        assert (program, file, named) == ("python", "infoard.py", verb)
        given = cli.parse(verb, words)
        if hasattr(cli.get_verb(verb), "options"):
            given.pop("own", None)  # what the verb alone has
        check_settings(given)


@pytest.mark.parametrize("place", [".", "docs", ".."])
def test_a_command_that_is_told_runs_from_where_one_is(place, monkeypatch):
    monkeypatch.chdir(Path(I.__file__).parent / place)
    monkeypatch.setattr(cli.sys, "argv", ["infoard.py"])
    told = options.command("eval", "a folder/best.pt", "--out", Path("e"))
    program, file, *words = shlex.split(told)
    assert program == "python" and Path(file).resolve() == Path(I.__file__).resolve()
    assert words == ["eval", "a folder/best.pt", "--out", "e"]
    monkeypatch.setattr(cli.sys, "argv", ["/usr/bin/infoard", "eval"])
    assert options.command("tables", "e") == "infoard tables e"


@pytest.mark.parametrize(
    "called_as", ["/usr/bin/infoard", "infoard.py", "/else/where.py", "pytest"]
)
def test_help_speaks_of_the_program_that_was_called(called_as, monkeypatch, capsys):
    monkeypatch.setattr(cli.sys, "argv", [called_as, "--help"])
    expected = "infoard" if called_as == "/usr/bin/infoard" else "python infoard.py"
    assert f" {expected} eval net.pt" in cli.overview()
    with pytest.raises(SystemExit):
        I.main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {expected} eval CKPT [options]")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_no_help_asks_to_look_elsewhere_for_a_name(verb, capsys):
    with pytest.raises(SystemExit):
        I.main([verb, "--help"])
    shown = capsys.readouterr().out
    for table in cli.TABLES:
        assert table not in shown
    for group in cli.GROUPS.values():  # none is without an option
        assert f"{group}:\n\n" not in shown and not shown.endswith(f"{group}:\n")


def test_help_tells_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        I.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: 8/255" in shown and "default: 2/255" in shown
    assert "--no-infoard" in shown and "{batchmean,mean}" in shown
    for f in SETTINGS:
        assert I.flag_of(f.name) in shown


@pytest.mark.parametrize("name", [*I.FRAMEWORKS])
def test_defaults_that_differ_by_framework_are_told_as_they_are(name):
    cfg = I.Config(framework=name).resolved()
    for setting in ("alpha", "beta", "temperature", "lam_hi"):
        told = cli.by_framework(setting).removeprefix("; default: ").split("; ")
        named = [part.partition(" for ")[::2] for part in told]
        mine = [value for value, names in named if name in names.split(", ")]
        value = getattr(cfg, setting)
        if mine:
            assert mine == [f"{value:.3g}"]
        else:
            assert value is None or (setting == "lam_hi" and value == float(told[0]))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_is_for_the_command_line(verb, capsys):
    with pytest.raises(SystemExit):
        I.main([verb, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "cfg." not in shown and "default: None" not in shown and "default: False" not in shown
    assert "; default: ; " not in shown
    for f in SETTINGS:  # each text begins with what an option is
        assert f"{I.flag_of(f.name)} {f.type.__name__.upper()} or " not in shown
    if verb in ("train", "eval"):
        assert "pgd (which is pgd_sat and pgd_trades)" in shown
        assert "train/CLASS/IMAGE and test/CLASS/IMAGE" in shown
    if verb == "eval":
        assert "in training" not in shown


def test_a_text_of_help_is_of_an_option_and_pgd_is_two_attacks():
    names = {f.name for f in SETTINGS}
    assert set(cli.TEXTS) <= names
    assert list(I.chosen_attacks("clean,pgd")) == ["pgd_sat", "pgd_trades"]
    for verb, texts in cli.OTHER_TEXTS.items():
        assert set(texts) <= set(cli.used_by(verb, cli.get_verb(verb))), verb


def test_without_a_verb_train_is_called(monkeypatch):
    assert called(["--seed", "3"]) == called(["train", "--seed", "3"]) == [{"seed": 3}]
    assert called([]) == [{}]


def called(argv):
    """With what the function of train is called by a command line."""
    calls = []

    def listen(cfg=None, **given):
        calls.append(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "train", listen)
        assert I.main(argv) == 0
    return calls


MISTAKES = [
    (["trian"], r"did you mean train\? choose from train, demo, eval"),
    (["--framwork", "rslad"], r"did you mean --framework\?"),
    (["--epoch=3"], r"did you mean --epochs\?"),
    (["--asa", "techer"], r"did you mean teacher\?"),
    (["--framework", "rsld"], r"did you mean rslad\? choose from natural, at"),
    (["--student", "resnt18"], r"did you mean resnet18\?"),
    (["eval", "done/last.pt", "--attack", "pgd"], r"did you mean --attacks\?"),
    (["eval", "done/last.pt", "--batch-size", "1"], "this verb does not use it"),
    (["bench", "--epochs", "3"], "this verb does not use it"),
    ([""], "choose from train, demo, eval"),
    (["train", "here"], "here"),
    (["eval"], "CKPT"),
    (["eval", "nowhere.pt"], "no checkpoint file at nowhere.pt"),
    (["eval", "done"], "no checkpoint file at done, which is a folder: .* best.pt"),
    (["export", "done"], "no checkpoint file at done, which is a folder: .* best.pt"),
    (["eval", "untrained.pt"], "--dataset"),
    (["eval", "text.pt", "--dataset", "shapes"], "truncated"),
    (["eval", "done/last.pt", "--attacks", "pgdd"], r"did you mean pgd\? choose from .*pgd"),
    (["eval", "done/last.pt", "--lr", "0.1"], "unrecognized arguments: --lr 0.1"),
    (["eval", "done/last.pt", "--eps", "2"], "8/255"),
    (["eval", "three.pt", "--dataset", "shapes"], "3 classes .*, shapes has 10"),
    (["tables"], "DIR"),
    (["tables", "nowhere"], "nowhere"),
    (["tables", "done", "--lr", "0.1"], "unrecognized arguments: --lr 0.1"),
    (["figures", "nowhere"], "nowhere"),
    (["--framework", "rslad", "--slope", "1"], "unrecognized arguments: --slope 1"),
    (
        ["--framwork", "rslad", "--epoch=3", "--zzz", "1"],
        r"--framwork: did you mean --framework\?; --epoch: did you mean --epochs\?",
    ),
    (["--num-classes", "4"], "classes come from the data: the names of their folders"),
    (["--dataset", "done"], "done is a folder: --dataset folder --data-dir done takes its images"),
    (["eval", "untrained.pt", "--dataset", "done/figures"], "folder --data-dir done/figures"),
    (["--framework", "nets.py"], "which --framework of it is meant"),
    (["--student", "nets:absent"], "module 'nets' has no attribute 'absent'"),
    (["--amp", "bf61", "--epoch", "3"], r"'bf61': did you mean bf16\?; --epoch: did you mean"),
    (
        ["eval", "done/last.pt", "--lr", "1", "--attack", "pgd"],
        "--lr: this verb does not use it; --attack: did you mean --attacks",
    ),
]


@pytest.mark.parametrize("argv, why", MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_two(desk, argv, why, capsys):
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(error_of(argv, capsys))


def test_under_torchrun_a_mistake_names_its_rank(desk, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert I.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("infoard: error (rank 1): unknown verb 'trian'")


def test_without_progress_there_is_no_bar(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")  # to be put back
    monkeypatch.delenv("TQDM_DISABLE")
    called(["--progress"])
    assert "TQDM_DISABLE" not in os.environ
    called(["--no-progress"])
    assert os.environ["TQDM_DISABLE"] == "1"


def test_where_no_terminal_is_a_line_now_and_then_tells_how_far_it_is(monkeypatch, capfd):
    def slowly(text, every=0.05):
        for i in I.progress_bar(range(10, 18), text, every):
            time.sleep(0.03)
            yield i

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(slowly("epoch 3")) == list(range(10, 18))
    lines = [line.strip() for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert 2 <= len(lines) <= 5
    assert all(re.fullmatch(r"epoch 3: +\d of 8 after 00:00", line) for line in lines)
    assert list(slowly("epoch 3", 60)) == list(slowly("")) == list(range(10, 18))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(slowly("epoch 3")) == list(range(10, 18))
    assert capfd.readouterr().err.strip() == ""


class ClosedPipe:
    """A pipe whose reader has gone, as the standard output."""

    def __init__(self, monkeypatch):
        reader, writer = os.pipe()
        os.close(reader)
        self.file = open(writer, "w")
        monkeypatch.setattr(sys, "stdout", self.file)


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_a_reader_that_stops_reading_ends_a_verb_without_a_word(verb, monkeypatch, capsys):
    pipe = ClosedPipe(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        I.main([*filter(None, [verb]), "--help"])
    assert stopped.value.code in (0, 141)  # argparse passes over it where it fills the pipe itself
    pipe.file.close()  # as at the end of the program
    assert capsys.readouterr().err == ""


def test_nor_is_it_told_what_was_made_of_a_closed_pipe(monkeypatch, capsys):
    def verb(**given):
        try:
            print("much", flush=True)
        except OSError as error:
            raise I.InfoardError(f"no usable data ({error})") from None

    monkeypatch.setattr(I, "train", verb)
    pipe = ClosedPipe(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        I.main([])
    assert stopped.value.code == 141
    pipe.file.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_sigterm_ends_a_verb_as_ctrl_c_does(by_torchrun, monkeypatch, capsys):
    tidied = []

    def verb(**given):
        if by_torchrun:
            tidied.append(signal.getsignal(signal.SIGTERM))
            return
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            tidied.append("all")
            raise

    monkeypatch.setattr(I, "train", verb)
    if by_torchrun:  # it waits for no rank that is gone
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setattr(cli.dist, "is_initialized", lambda: True)
        assert I.main([]) == 0 and tidied == [signal.SIG_DFL]
        return
    with pytest.raises(SystemExit) as stopped:
        I.main([])
    assert stopped.value.code == 143 and tidied == ["all"]
    assert capsys.readouterr().err == "infoard: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ==== 2. Options ==================================================================================


def words_of(name, value):
    """A setting as words of a command line."""
    flag = I.flag_of(name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, str(value)]


def values_of(f):
    """Values that a setting can have."""
    if f.name == "framework":
        return st.sampled_from(["at", "trades", "rslad"])
    if f.name == "schedule":
        return st.sampled_from(["cosine", "30", "100,150"])
    if f.metadata["choices"]:
        return st.sampled_from(f.metadata["choices"])
    if f.type is bool:
        return st.booleans()
    if f.type is float:
        return st.floats(0.01, 0.99)
    if f.type is int:
        return st.integers(2, 9)
    return st.text("ab_./:", min_size=1)


@given(data=st.data())
def test_every_setting_is_an_option_and_round_trips(data):
    chosen = data.draw(st.lists(st.sampled_from(SETTINGS), unique_by=lambda f: f.name))
    given = {f.name: data.draw(values_of(f), f.name) for f in chosen}
    argv = [word for name, value in given.items() for word in words_of(name, value)]
    assert cli.parse("train", argv) == given
    assert I.Config(**given)


def example_of(f):
    """The words that give a setting some value."""
    flag = I.flag_of(f.name)
    if f.type is bool:
        return [flag]
    if f.metadata["choices"]:
        return [flag, f.metadata["choices"][0]]
    return [flag, "at" if f.name == "framework" else "1"]


@pytest.mark.parametrize("verb", ["eval", "attention", "mi"])
@pytest.mark.parametrize("f", SETTINGS, ids=lambda f: f.name)
def test_a_verb_takes_the_options_that_it_uses_and_no_others(verb, f):
    argv = ["net.pt", *example_of(f)]
    if f.name in cli.get_verb(verb).takes:
        assert f.name in cli.parse(verb, argv)
    else:
        with pytest.raises(I.InfoardError, match="unrecognized"):
            cli.parse(verb, argv)


def test_abbreviations_are_not_taken(desk, capsys):
    assert "--resum" in error_of(["--resum"], capsys)


def test_lite_is_a_set_of_options_that_others_win_over():
    lite = cli.parse("train", ["--lite"])
    assert lite == cli.parse("train", cli.LITE.split()) and len(lite) == 5
    for argv in (["--steps", "7", "--lite"], ["--lite", "--steps", "7"]):
        assert cli.parse("train", argv) == {**lite, "steps": 7}
    assert I.Config(**lite).resolved().steps_lo == 1
    assert I.Config().steps_lo == 0


def hinge(step):
    """A loss with settings of its own."""
    return (step.cfg.own["slope"] - I.margin(step.s, step.y)).relu().mean()


HINGE = I.Framework(hinge, options={"slope": (0.5, "how far"), "power": (2, "how often")})


def test_a_framework_brings_options_of_its_own(capsys):
    argv = ["--framework", f"{__name__}:HINGE"]
    assert "own" not in cli.parse("train", argv)
    given = cli.parse("train", [*argv, "--slope", "1/4", "--power", "3", "--lr", "0.2"])
    assert given["own"] == {"slope": 0.25, "power": 3} and given["lr"] == 0.2
    assert I.Config(**given).resolved().own == {"slope": 0.25, "power": 3}
    given = cli.parse("train", [*argv, "--power", "3"])
    assert I.Config(**given).resolved().own == {"slope": 0.5, "power": 3}
    with pytest.raises(SystemExit):
        I.main([*argv, "--help"])
    assert "how far; default: 0.5" in capsys.readouterr().out


def test_a_framework_may_be_named_in_one_word():
    argv = [f"--framework={__name__}:HINGE", "--slope", "0.25"]
    assert cli.parse("train", argv)["own"] == {"slope": 0.25}


# ==== 3. Evaluation of any checkpoint =============================================================


def evaluated(line):
    """What `eval` keeps of a checkpoint."""
    assert (
        I.main(["eval", *line.split(), "--eval-subset", "40", "--device", "cpu", "--out", "e"]) == 0
    )
    return json.loads(Path("e/eval.json").read_text())


def test_images_that_a_net_learned_from_are_looked_at_and_kept_apart(desk, capsys):
    line = "eval done/last.pt --training-images --attacks clean,fgsm --eval-subset 30 --out e"
    assert I.main(line.split()) == 0
    shown = capsys.readouterr().out
    assert "note: on training images" in shown and "infoard.py tables" not in shown
    assert [path.name for path in Path("e").iterdir()] == ["training.json"]  # not one of the tables
    found = json.loads(Path("e/training.json").read_text())

    cfg = I.Config(**json.loads(Path("done/config.json").read_text())["settings"])
    data = I.load_dataset(cfg.dataset, image_size=cfg.image_size)
    learned, kept_apart = I.split_training(cfg, data.y_train)
    assert not set(learned.tolist()) & set(kept_apart.tolist())
    assert found["about"]["of"] == len(learned)
    assert "list_sha256" not in found["about"]["images"]
    rows = learned[I.class_balanced(data.y_train[learned], 30)]
    net = I.load_own(I.load_tensors("done/last.pt"))
    direct = I.evaluate(net, data.x_train[rows], data.y_train[rows], attacks="clean,fgsm")
    assert {name: found[name] for name in ("clean", "fgsm", "n")} == {
        name: direct[name] for name in ("clean", "fgsm", "n")
    }
    assert I.main([*line.split(), "--list", "images.txt"]) == 2
    assert "--training-images" in capsys.readouterr().err
    assert not Path("images.txt").exists()
    other = "eval done/last.pt --training-images --dataset folder --data-dir images"
    assert I.main(other.split()) == 2
    assert "images" in capsys.readouterr().err


def test_eval_of_a_checkpoint_repeats_its_results(desk, lab):
    again = evaluated("done/last.pt --attacks clean,fgsm,pgd")
    for name in (*I.METRICS, "ci95", "per_class", "n"):
        assert again[name] == lab.results["last"][name], name
    assert again["checkpoint"] == "done/last.pt"
    assert again["settings"]["dataset"] == "shapes"


@pytest.mark.parametrize("name", ["stranger.pt", "nets:good", "untrained.pt"])
def test_eval_takes_a_strangers_net(desk, name, capsys):
    result = evaluated(f"{name} --dataset shapes --attacks clean")
    assert result["n"] == 40
    shown = capsys.readouterr().out
    assert f"{name}:  clean {result['clean']:.2f}" in shown
    low, high = result["ci95"]["clean"]
    assert f"95% intervals: clean {low}-{high}" in shown


@pytest.mark.parametrize("words, allowed", [("", True), ("--exact", False), ("--no-exact", True)])
def test_eval_names_its_precision_and_can_do_without_tf32(
    desk, words, allowed, monkeypatch, capsys
):
    seen = []
    real = I.evaluated

    def watched(*args, **options):
        seen.append(torch.backends.cudnn.allow_tf32)
        return real(*args, **options)

    monkeypatch.setattr(I, "evaluated", watched)
    assert evaluated(f"teacher.pt --attacks clean {words}")["precision"] == "fp32"
    assert seen == [allowed] and torch.backends.cudnn.allow_tf32
    assert "precision: fp32" in capsys.readouterr().out


def test_eval_knows_the_l2_radius_and_another_net_to_attack(desk):
    usual = evaluated("teacher.pt --attacks clean,fgsm,pgd_l2")
    none = evaluated("teacher.pt --attacks clean,fgsm,pgd_l2 --eps-l2 0")
    moved = evaluated("teacher.pt --attacks clean,fgsm,pgd_l2 --teacher-nat untrained.pt")
    assert none["pgd_l2"] == none["clean"] > usual["pgd_l2"]
    assert moved["clean"] == usual["clean"] and moved["fgsm"] > usual["fgsm"]


def test_eval_takes_the_source_of_attacks_as_it_takes_a_net(desk, capsys):
    line = "teacher.pt --attacks clean,fgsm --teacher-nat stranger.pt"
    found = evaluated(line)
    assert any("attacks were made on stranger.pt" in note for note in found["notes"])
    assert "warning: teacher stranger.pt" in capsys.readouterr().out
    assert evaluated(f"{line} --teacher-nat-norm half")["fgsm"] != found["fgsm"]
    seven = I.build_model("tiny", 7, 32).state_dict()
    torch.save(seven, "seven.pt")
    words = ["eval", "teacher.pt", "--dataset", "shapes", "--device", "cpu"]
    assert I.main([*words, "--teacher-nat", "seven.pt"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "seven.pt" in told and "classes" in told


def darken(model, x, y, *, eps, generator=None):
    return (x - eps).clamp(0, 1)


def test_eval_tells_that_there_are_fewer_images_and_a_net_at_chance(desk, capsys):
    line = ["eval", "untrained.pt", "--dataset", "shapes", "--device", "cpu"]
    assert I.main([*line, "--attacks", "clean", "--eval-subset", "9999"]) == 0
    shown = capsys.readouterr().out
    n = len(I.render_shapes().x_test)
    assert f"note: --eval-subset 9999 takes all {n} test images" in shown
    own = "cannot be told from chance, 10.0 (always one class): train it again: raise --epochs"
    assert own in shown
    assert I.main(["eval", "stranger.pt", *line[2:], "--attacks", "clean"]) == 0
    assert "(always one class): are its data, its normalisation" in capsys.readouterr().out
    assert I.main(["eval", "teacher.pt", "--attacks", "clean", "--eval-subset", "40"]) == 0
    shown = capsys.readouterr().out
    assert "chance" not in shown and "takes all" not in shown


@pytest.mark.parametrize("size, told", [(32, False), (64, True)])
def test_eval_on_images_of_another_size_than_a_net_has_learned_from_is_told(
    size, told, desk, monkeypatch, capsys
):
    data = I.render_shapes()
    times = size // 32
    larger = data.x_test.repeat_interleave(times, 2).repeat_interleave(times, 3)
    data = dataclasses.replace(data, x_test=larger)
    monkeypatch.setattr(I, "load_dataset", lambda *args, **options: data)
    assert I.main(["eval", "teacher.pt", "--attacks", "clean", "--eval-subset", "10"]) == 0
    line = "warning: teacher.pt was trained on images of 32 pixels, not 64: --image-size 32"
    assert (line in capsys.readouterr().out) == told


def test_the_images_of_a_result_can_be_found_by_its_json(desk):
    line = ["eval", "teacher.pt", "--attacks", "clean", "--eval-subset", "25", "--device", "cpu"]
    assert I.main([*line, "--list", "images.txt", "--out", "e"]) == 0
    about = json.loads(Path("e/eval.json").read_text())["about"]
    assert about["images"]["list_sha256"] == own.digest("images.txt")
    assert about["images"]["rule"] == "infoard.class_balanced(y_test, 25)"
    rows = [row.split("\t") for row in Path("images.txt").read_text().splitlines()]
    data = I.render_shapes()
    x, y = I.test_images(data, 25, torch.device("cpu"))
    assert [name for _, name in rows] == [data.classes[k] for k in y]
    assert torch.equal(data.x_test[[int(i) for i, _ in rows]], x)


def test_eval_takes_attacks_of_anyones_own(desk):
    result = evaluated(f"teacher.pt --attacks clean,{__name__}:darken --eps 64/255")
    assert result["darken"] == result["worst"] <= result["clean"]
    assert result["settings"]["eps"] == 64 / 255


def test_a_checkpoint_says_its_data_and_radii_and_options_win(tmp_path):
    path = str(tmp_path / "net.pt")
    config = {"student": "tiny", "dataset": "svhn", "eps": 0.1, "lr": 0.3, "subset": 9}
    torch.save({**own_file(I.tiny()), "config": config}, path)
    assert cli.settings(path, {}) == {"dataset": "svhn", "eps": 0.1, "subset": 9}
    assert cli.settings(path, {"eps": 0.2, "seed": 1}) == {
        "dataset": "svhn",
        "eps": 0.2,
        "subset": 9,
        "seed": 1,
    }


def test_a_folder_of_images_is_no_place_for_other_data(tmp_path, capsys):
    """Another data set is looked for where it usually lies, and only if its classes may fit."""
    path = str(tmp_path / "net.pt")
    config = {"student": "tiny", "dataset": "folder", "data_dir": "/pets", "image_size": 32}
    file = {**own_file(I.tiny(4)), "config": config, "classes": ["cat", "deer", "dog", "horse"]}
    torch.save(file, path)
    assert cli.settings(path, {}) == {name: config[name] for name in config if name != "student"}
    assert cli.settings(path, {"dataset": "folder"})["data_dir"] == "/pets"
    assert "data_dir" not in cli.settings(path, {"dataset": "cifar10"})
    found = cli.settings(path, {"dataset": "cifar10", "data_dir": "/there"})
    assert found["data_dir"] == "/there" and found["image_size"] == 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "load_dataset", None)  # nothing is downloaded
        told = error_of(["eval", path, "--dataset", "cifar10"], capsys)
    assert "4 classes (cat, deer, dog, horse), cifar10 has 10: --dataset" in told


@pytest.mark.parametrize(
    "epoch, position, told",
    [(1, 64, "in epoch 2 of 3"), (2, 0, "after epoch 2 of 3"), (3, 0, None)],
)
def test_eval_of_a_training_that_has_not_ended_says_so(epoch, position, told, desk, capsys):
    file = I.load_tensors("done/last.pt")
    Path("half").mkdir()
    at = {**file["at"], "epoch": epoch, "position": position}
    torch.save({**file, "config": {**file["config"], "epochs": 3}, "at": at}, "half/last.pt")
    assert evaluated("half/last.pt --attacks clean")["n"] == 40
    shown = capsys.readouterr().out
    assert "\nhalf/last.pt:  clean " in shown or shown.startswith("half/last.pt:  clean ")
    line = f"note: the training of half/last.pt stopped {told}\n"
    assert line in shown if told else "stopped" not in shown


@pytest.mark.parametrize("config", ["a dataset", ["dataset"], {"dataset": "imagenet", "eps": "8"}])
def test_settings_of_a_strangers_file_are_not_ours(config, tmp_path):
    path = str(tmp_path / "net.pt")
    torch.save({"model": I.tiny().state_dict(), "config": config}, path)
    with pytest.raises(I.InfoardError, match="add --dataset"):
        cli.settings(path, {})


# ==== 4. Pages ====================================================================================

PAGES = [ROOT / "README.md", ROOT / "companions/README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("results/**/README.md"))


def blocks_of(page, kind):
    """The lines of the blocks of a kind on a page, of all together."""
    found = []
    inside = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == f"```{kind}"
        elif inside:
            found.append(line)
    return found


def commands_of(page):
    """The commands that a page shows, without their comments and variables of the environment."""
    commands = [line.split("  #")[0].strip() for line in blocks_of(page, "bash")]
    return [command.removeprefix("OMP_NUM_THREADS=1 ") for command in commands if command]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def check_settings(given):
    """Whether settings, of a verb or a run, are such as a run can have."""
    known = {f.name for f in dataclasses.fields(I.Config)}
    cfg = I.Config(**{name: value for name, value in given.items() if name in known})
    I.chosen_attacks(cfg.attacks)
    if "," not in cfg.framework:  # bench takes a list
        assert cfg.resolved()


def check_infoard(words):
    """Whether the command line understands the words after infoard.py."""
    verb = "train"
    if words and not words[0].startswith("-"):
        verb, *words = words
    if words != ["--help"] and "mine:" not in " ".join(words):  # that file is the reader's
        given = cli.parse(verb, words)
        if hasattr(cli.get_verb(verb), "options"):
            given.pop("own", None)  # what the verb alone has
        check_settings(given)


def check_recipes(words):
    """Whether recipes, called by hand or by reproduce.sh, understand these words."""
    verb, *rest = words
    assert verb in ("cells", "tables", "evidence", "lite")
    if verb in ("cells", "tables"):
        assert rest.pop(0) in recipes.SCALES
    if rest[:1] in [[part] for part in recipes.PARTS]:
        rest.pop(0)
    check_settings(cli.parse("train", rest))


def check_reproduce(words):
    """Whether the usage of reproduce.sh tells of these words."""
    script = ROOT / words[0]
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    usage = [line for line in script.read_text().splitlines() if line.startswith("# bash ")]
    assert any(line.startswith(f"# bash reproduce.sh {words[1]} ") for line in usage)
    if words[1] == "gpu":
        check_infoard(words[1:])
    elif words[1] not in ("demo", "test"):
        check_recipes(words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_pages_is_understood(command):
    program, *words = shlex.split(command)
    if program == "torchrun":
        words = words[words.index("infoard.py") :]
    if program == "bash":
        check_reproduce(words)
    elif words[0] == "infoard.py":
        check_infoard(words[1:])
    elif words[:2] == ["-m", "companions.recipes"]:
        check_recipes(words[2:])
    elif words[0] == "results/evidence/search.py":
        assert words[1] == "table" or cli.parse("train", words[3:])
    elif words[0] == "results/evidence/again.py":
        options = words[2:] if words[1] in ("tuned", "plugins") else words[1:]
        assert (ROOT / words[0]).exists() and cli.parse("eval", ["kept.pt", *options])
    elif words[0].endswith("contrast.py"):
        folders = [ROOT / folder / name for folder in words[1].split(",") for name in words[2:]]
        assert (ROOT / words[0]).exists() and all(folder.is_dir() for folder in folders)
    else:
        assert command == "python -m pip install -r requirements.txt"


def test_the_pages_show_every_kind_of_command():
    programs = {command.split()[0] for command in COMMANDS}
    assert programs == {"bash", "python", "torchrun"}
    assert len(COMMANDS) > 10


def test_the_framework_that_the_pages_show_can_be_trained(desk, monkeypatch):
    monkeypatch.syspath_prepend(desk)  # before the mine.py of any other test
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (desk / "mine.py").write_text("\n".join(blocks_of(ROOT / "companions/README.md", "python")))
    line = "--framework mine:MINE --gamma 0.5 --teacher teacher.pt --epochs 1 --steps 1"
    more = "--attacks clean --eval-subset 40 --no-figures --out r"
    assert I.main([*line.split(), *more.split()]) == 0
    settings = json.loads(Path("r/config.json").read_text())["settings"]
    assert settings["framework"] == "mine:MINE" and settings["infoard"]


def links_of(page):
    """The files that a page links to."""
    targets = [part.partition(")")[0] for part in page.read_text().split("](")[1:]]
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    return [file for file in files if file]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_pages_lead_to_files(page):
    for link in links_of(page):
        assert (page.parent / link).exists(), link


def test_a_run_keeps_the_file_of_an_address(monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "get_verb", lambda verb: lambda **given: seen.update(given))
    monkeypatch.setattr(cli, "parse", lambda verb, argv: {"teacher": argv[1], "seed": 3})
    monkeypatch.setattr(checkpoints, "download", lambda address: f"kept/{Path(address).name}")
    cli.run(["--teacher", "https://somewhere.org/t.pt"])
    assert seen == {"teacher": "kept/t.pt", "seed": 3}
    cli.run(["--teacher", "robustbench:Any"])
    assert seen["teacher"] == "robustbench:Any"


# ==== 5. The package ==============================================================================


def test_what_pip_installs_is_the_file_its_companions_and_a_command():
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = made["project"]["scripts"]["infoard"].partition(":")
    assert getattr(importlib.import_module(module), function) is I.main
    assert made["tool"]["setuptools"]["py-modules"] == [module]
    assert made["tool"]["setuptools"]["packages"] == ["companions"]
    kinds = made["tool"]["setuptools"]["package-data"]["companions"]
    for file in (ROOT / "companions").iterdir():  # what code reads from beside it comes along
        if file.is_file():
            assert file.suffix in (".py", ".md") or any(file.match(kind) for kind in kinds), file

    named = set()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        named.add(line.partition("#")[0].strip())
    project = made["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert set(needed) == named - {""} and len(needed) == len(set(needed))


def test_an_installed_copy_finds_its_companions_from_anywhere(tmp_path):
    place = tmp_path / "site-packages"
    shutil.copytree(ROOT / "companions", place / "companions")
    shutil.copy(ROOT / "infoard.py", place)
    (tmp_path / "elsewhere").mkdir()
    code = """
import sys
import infoard
assert infoard.__file__ == sys.argv[1] and infoard.has_companions()
assert infoard.optional("runs:same_settings").__module__ == "companions.runs"
sys.exit(infoard.main(["--help"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(place)}
    command = [sys.executable, "-c", code, str(place / "infoard.py")]
    where = {"cwd": tmp_path / "elsewhere", "env": environment}
    done = subprocess.run(command, **where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "growth" in done.stdout


def test_the_paper_and_this_code_are_cited_apart():
    text = (ROOT / "CITATION.cff").read_text()
    code, paper = text.split("preferred-citation:")
    assert "cff-version: 1.2.0" in code and "type: software" in code and "doi" not in code
    assert "unofficial reconstruction" in code
    assert "type: article" in paper and "10.1109/TIP.2025.3637689" in paper
    assert "10.1109/TIP.2025.3637689" in I.__doc__
