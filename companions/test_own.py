"""What people bring by a name of their own, through the whole life of a run; and what is wrong with
it in one line.
"""

import functools
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn

import infoard as I
from companions.runs import check_possible, teacher_folder
from test_infoard import (
    ROOT,
    begun,
    each,
    error_of,
    make_info,
    near,
    one_line,
    pair,
    rand,
    run,
    tiny_net,
)

MINE = """
import torch
from torch import nn
from helper import WIDTH


def net(num_classes):
    layers = [nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes)]
    return nn.Sequential(*layers)


def deep(num_classes, depth):
    return net(num_classes)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(10)

    def forward(self, x):
        return self.net(x), x


def probabilities():
    return nn.Sequential(net(10), nn.Softmax(1))


def three():
    return net(3)


def maps():
    return nn.Conv2d(3, 10, 3)


def large(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, num_classes))


def darker(net, x, y, *, eps, generator=None):
    return (x - eps).clamp(0, 1)


def simple(net, x, y, eps):
    return (x + eps).clamp(0, 1)


def too_far(net, x, y, *, eps, generator=None):
    return (x - 2 * eps).clamp(0, 1)


def outside(net, x, y, *, eps, generator=None):
    return x - eps


def nothing(net, x, y, *, eps, generator=None):
    pass


def without_eps(net, x, y):
    return x


def strange(net, x, y, *, eps):
    return x


strange.norm = "l3"


def loss(student, x):
    return 0


def no_loss(step):
    pass
"""


@pytest.fixture
def code(desk):
    """The desk, with code/mine.py and what it imports beside it."""
    Path("code").mkdir()
    Path("code/mine.py").write_text(MINE)
    Path("code/helper.py").write_text("WIDTH = 8\n")
    yield desk
    for name in [name for name in sys.modules if name == "helper" or name.startswith("mine")]:
        del sys.modules[name]


# ==== 1. The life of a run ========================================================================


def test_a_student_of_a_file_lives_as_one_that_is_built_in(code, monkeypatch, capsys):
    """Trained, stopped, resumed; its best is not its last epoch; evaluated, exported, in tables."""
    scores = [3.0, 9.0, 5.0]
    monkeypatch.setattr(I, "validate", lambda run: {"val_pgd": scores[run.at.epoch - 1]})
    options = {"student": "code/mine.py:net", "teacher": "teacher.pt", "epochs": 3}
    options["attacks"] = "clean,fgsm,code/mine.py:darker"
    with pytest.raises(SystemExit):
        run("r/s0", stop=8, **options)
    results = run("r/s0", resume=True, **options)
    assert results["best"]["epoch"] == 2 and results["last"]["epoch"] == 3
    shown = capsys.readouterr().out
    assert "compared: 2 [8, 16, 16] of the student" in shown
    assert re.search(r"s0 best .* darker \d", shown)
    assert json.loads(Path("r/s0/results.json").read_text())["best"]["darker"] is not None

    line = "eval r/s0/best.pt --attacks clean,code/mine.py:darker --eval-subset 40 --device cpu"
    assert I.main([*line.split(), "--out", "r/s0"]) == 0
    again = json.loads(Path("r/s0/eval.json").read_text())
    assert again["clean"] == results["best"]["clean"]
    assert again["darker"] == results["best"]["darker"]
    assert I.main(["export", "r/s0/best.pt"]) == 0
    weights = torch.load("r/s0/best.weights.pt", weights_only=True)
    net = I.build_model("code/mine.py:net", 10)
    net.load_state_dict(weights)
    assert I.main(["tables", "r"]) == 0
    header = Path("r/tables.md").read_text().splitlines()[0]
    assert " darker " in header


def test_names_of_folders_are_no_folders():
    cfg = I.Config(student="/a/b.py:net", framework="c/d.py:loss.MINE", infoard=False)
    with pytest.raises(I.InfoardError, match="no file c/d.py"):
        cfg.resolved()
    cfg = I.Config(student="/a/b.py:net")
    assert cfg.resolved().out == "runs/shapes-b.net-rslad-s0"
    cfg = I.Config(student="b-c.py:net", dataset="data/of.mine/d.py:load", plus="igdm:0.5")
    assert cfg.resolved().out == "runs/d.load-b-c.net-rslad+igdm.0.5-s0"
    assert I.Config(student="timm:a/b").resolved().out == "runs/shapes-timm.a.b-rslad-s0"
    made = Path("runs/teachers/folder-/home/me/b.py:net-trades-12345678")
    assert teacher_folder(made, I.Config()) == Path("runs/teachers/folder-b.net-trades-12345678")


def test_files_of_one_name_are_not_confused(tmp_path):
    for folder, width in (("one", 3), ("two", 5)):
        (tmp_path / folder).mkdir()
        text = f"from torch import nn\n\n\ndef net():\n    return nn.Linear({width}, 2)\n"
        (tmp_path / folder / "same.py").write_text(text)
    for folder, width in (("one", 3), ("two", 5)):
        factory = I.resolve({}, f"{tmp_path}/{folder}/same.py:net", "net")
        assert factory().in_features == width
        assert I.resolve({}, f"{tmp_path}/{folder}/same.py:net", "net") is factory  # imported once


# ==== 2. timm =====================================================================================


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm: one net that asks for the size of images, and one that does not."""
    made = []

    def create_model(name, **options):
        made.append(options)
        if name == "cnn" and "img_size" in options:
            raise TypeError("unexpected keyword argument 'img_size'")
        layers = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, options["num_classes"])]
        return nn.Sequential(*layers)

    module = ModuleType("timm")
    module.is_model = lambda name: name in ("cnn", "vit")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return made


@each("name, options", [("cnn", {}), ("vit", {"img_size": 64})])
def test_nets_of_timm_go_by_their_names(name, options, timm):
    for asked in (name, f"timm:{name}"):
        net = I.build_model(asked, 7, 64)
        assert net[-1].out_features == 7
        assert timm[-1] == {"num_classes": 7, **options}
    with pytest.raises(I.InfoardError, match="timm has no net called 'nope'"):
        I.build_model("timm:nope", 7)
    with pytest.raises(I.InfoardError, match="unknown model 'nope'.*resnet18"):
        I.build_model("nope", 7)


def test_our_names_win_over_those_of_timm(timm):
    timm_knows_it = sys.modules["timm"]
    timm_knows_it.is_model = lambda name: True
    assert isinstance(I.build_model("tiny", 7), nn.Sequential) and not timm


def test_without_timm_its_names_are_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(I.InfoardError, match="unknown model 'resnet34'"):
        I.build_model("resnet34")


# ==== 3. What is wrong ============================================================================

WRONG = [
    ("--student code/mine.py:deep", "missing a required argument: 'depth'"),
    ("--student code/mine.py:Pair", "gives a tuple, not logits"),
    ("--student code/mine.py:probabilities", "probabilities"),
    ("--student code/mine.py:three", "3 classes, the data have 10"),
    ("--student code/mine.py:maps", r"\[2, 10, 30, 30\] for two images"),
    ("--student code/mine.py:large", r"does not take images \[2,3,32,32\]"),
    ("--student code/mine.py:absent", "the net code/mine.py:absent: mine.py has no attribute"),
    ("--student code/mine.py:WIDTH", "WIDTH of mine.py is a int, which cannot be called"),
    ("--student code/mine.py", "code/mine.py is a file: .* Write code/mine.py:NAME"),
    ("--attacks clean,code/mine.py", "which attack of it is meant"),
    ("--student deep.mine:net", "path/to/deep/mine.py:net"),
    ("--student code/absent.py:net", "no file code/absent.py"),
    ("--framework code/mine.py:loss", "function of one Step: missing a required argument: 'x'"),
    ("--framework code/mine.py:no_loss --student tiny", "must be a scalar"),
    ("--attacks clean,code/mine.py:without_eps", "unexpected keyword argument 'eps'"),
    ("--attacks clean,code/mine.py:strange", "norm of the attack"),
]


@each("options, why", WRONG, ids=[options for options, _ in WRONG])
def test_what_is_missing_is_one_line(options, why, code, capsys):
    common = "--teacher teacher.pt --subset 100 --epochs 1 --steps 1 --device cpu --no-figures"
    error = error_of([*common.split(), *options.split()], capsys)
    assert re.search(why, error), error
    assert one_line(error)


@each(
    "name, meant",
    [("MIME", ": did you mean MINE?"), ("mine", ": did you mean MINE?"), ("strange", "")],
)
def test_a_name_that_a_module_does_not_have_is_told_with_the_nearest(name, meant, tmp_path):
    (tmp_path / "m.py").write_text("def MINE():\n    pass\n")
    with pytest.raises(I.InfoardError) as error:
        I.resolve({}, f"{tmp_path}/m.py:{name}", "framework")
    assert str(error.value).endswith(f"has no attribute {name!r}{meant}")


ATTACKS = [("too_far", "more than eps 0.03137"), ("outside", "leaves"), ("nothing", "NoneType")]


@each("name, why", ATTACKS)
def test_an_attack_that_cheats_is_refused(name, why, code, lab):
    x, y = torch.full((4, 3, 32, 32), 0.01), torch.zeros(4).long()
    if name == "too_far":
        x = x + 0.5
    attack = I.chosen_attacks(f"code/mine.py:{name}")[name]
    with pytest.raises(I.InfoardError, match=why):
        attack(lab.net, x, y, eps=8 / 255)


def test_an_attack_may_go_without_a_generator(code, lab):
    x, y = torch.rand(4, 3, 32, 32), torch.zeros(4).long()
    attack = I.chosen_attacks("code/mine.py:simple")["simple"]
    assert torch.equal(attack(lab.net, x, y, eps=0.1, generator=None), (x + 0.1).clamp(0, 1))
    assert attack.norm == "linf"


# ==== 4. The documents ============================================================================


def test_the_example_of_the_documents_runs(code, capsys):
    text = (ROOT / "docs/usage.md").read_text()
    section = text.partition("## Your own framework, attack and student")[2].partition("\n## ")[0]
    example = re.search(r"```python\n(.*?)```", section, re.S)[1]
    rule = example.index("def by_entropy")  # a framework and an attack are twelve lines
    assert len([line for line in example[:rule].splitlines() if line.strip()]) <= 12
    Path("mine.py").write_text(example)
    commands = re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()
    few = "--teacher teacher.pt --subset 100 --val-size 10 --epochs 1 --steps 1 --batch-size 50 "
    few += "--eval-subset 20 --device cpu --amp off --no-figures --out"
    line = commands[0].removeprefix("python infoard.py ").split()
    assert I.main([*line, "--student", "tiny", *few.split(), "a"]) == 0
    best = json.loads(Path("a/results.json").read_text())["best"]
    assert best["darker"] is not None and best["worst"] <= best["darker"]
    assert json.loads(Path("a/config.json").read_text())["settings"]["own"] == {"heat": 4.0}
    assert "--asa mine:by_entropy" in commands[1]
    assert I.Config(asa="mine:by_entropy").resolved().asa == "mine:by_entropy"
    assert "path/to/mine.py:net" in commands[2]
    assert I.main(["--student", "mine.py:net", "--attacks", "clean", *few.split(), "b"]) == 0
    assert "timm:" in commands[3]


@each("student", ["tiny", "code/mine.py:net"])
def test_the_result_is_loaded_as_the_documents_say(student, code, capsys):
    """The names that are printed are those of the net that was saved, for three image files."""
    text = (ROOT / "docs/usage.md").read_text().partition("## Load the result")[2]
    example = re.search(r"```python\n(.*?)```", text, re.S)[1]
    made = begun(framework="natural", student=student)
    for name in ("best.pt", "last.pt"):
        I.save(Path("runs/folder-tiny-rslad-s0", name), made.state())
    files = re.findall(r'"(\d\.\w+)"', example)
    colours = ["red", "lime", "blue"]
    for name, colour in zip(files, colours, strict=True):
        Image.new("RGB", (40, 30), colour).save(name)
    exec(example, {})
    exec(example.replace("best.pt", "last.pt"), {})
    x = torch.eye(3)[:, :, None, None].expand(3, 3, 32, 32)  # of one colour at any size
    names = [made.data.classes[k] for k in I.predict(made.student, x).argmax(1)]
    assert capsys.readouterr().out == f"{names}\n" * 2


# ==== Rules of radii ==============================================================================


def strength_of(rule, **asked):
    """The radii that InfoARD makes of a rule of one's own, for six images."""
    student, teacher, x, y = pair()
    info = make_info(student, teacher, asa=rule, mim="off")
    return info.strength(teacher(x), y, **asked)


def by_entropy(t, y, **how):
    p = t.softmax(1)
    return I.instance_strength((p * p.log()).sum(1), **how)


def test_a_function_is_a_rule_of_radii():
    student, teacher, x, y = pair()

    def mine(t, y, *, generator, **how):
        return by_entropy(t, y, **how)

    found = strength_of(mine).eps.flatten()
    p = teacher(x).softmax(1)
    entropy = -(p * p.log()).sum(1)
    assert torch.equal(found.argsort(), entropy.argsort(descending=True))
    near(found.min(), 8 / 255, 1e-7)
    near(found.max(), 12 / 255, 1e-7)


def test_a_number_of_a_rule_is_for_all():
    threat = strength_of(lambda t, y, *, threat, **others: threat)
    assert threat.eps.shape == threat.alpha.shape == (6, 1, 1, 1)
    near(threat.eps, torch.full((6, 1, 1, 1), 8 / 255), 1e-7)


@each(
    "eps, told",
    [
        (torch.ones(5), r"eps \[5\] for 6 images"),
        (torch.full((6,), -0.1), "eps from -0.1 to -0.1, outside"),
        (torch.full((6,), 1.5), "eps from 1.5 to 1.5, outside"),
        (torch.full((6,), math.nan), "eps from nan to nan, outside"),
        (None, "eps of type NoneType, no number or tensor"),
        ("8/255", "eps of type str, no number or tensor"),
    ],
)
def test_radii_that_are_none_are_refused(eps, told):
    def mine(t, y, **others):
        return I.Threat(eps=eps, alpha=torch.full((6,), 0.01))

    with pytest.raises(I.InfoardError, match=f"rule of radii mine gives {told}"):
        strength_of(mine)


def test_a_rule_that_is_none_is_refused():
    with pytest.raises(I.InfoardError, match="gives Tensor, no Threat"):
        strength_of(lambda t, y, **others: torch.ones(6))
    with pytest.raises(I.InfoardError, match="a rule is rule"):
        strength_of(lambda t: t)
    with pytest.raises(I.InfoardError, match="makes no use of steps_lo"):
        strength_of(lambda t, y, *, threat, **others: threat, steps_lo=1)
    with pytest.raises(I.InfoardError, match="a rule is rule"):
        strength_of(lambda t, y, *, threat: threat)


def test_a_bound_with_critics_of_its_own_is_none_of_attention_maps():
    nets = I.tiny(), I.tiny()
    I.InfoARD(*nets, mim="vid")
    for bound in ("vid", I.resolve(I.BOUNDS, "vid", "bound")):
        with pytest.raises(I.InfoardError, match="leave w_att at 0"):
            I.InfoARD(*nets, mim=bound, w_att=0.1)
    with pytest.raises(I.InfoardError, match="leave w_att at 0"):  # before a teacher is trained
        check_possible(I.Config(mim="vid", w_att=0.1).resolved(), torch.device("cpu"))


def test_steps_of_a_rule_are_whole_numbers_and_decide_alone():
    def mine(t, y, **others):
        return I.Threat(eps=0.1, alpha=0.1, steps=steps, counts=(6, 6, 6, 6))

    steps = torch.tensor([1, 2, 3, 1, 2, 3])
    assert strength_of(mine).counts is None
    steps = steps / 2
    with pytest.raises(I.InfoardError, match="mine gives steps that are no whole numbers"):
        strength_of(mine)


def test_a_rule_may_be_an_object_and_its_radii_have_no_graph():
    class Rule:
        def __call__(self, t, y, **others):
            return I.Threat(eps=torch.zeros(6, requires_grad=True) + 0.1, alpha=0)

        def __repr__(self):
            return "my rule"

    threat = strength_of(Rule())
    assert not threat.eps.requires_grad and threat.alpha.dtype == torch.float32
    with pytest.raises(I.InfoardError, match="rule of radii functools.partial.*missing"):
        strength_of(functools.partial(lambda t, y, others: None))


def test_radii_for_each_image_may_stand_as_images_do():
    for asa in ("teacher", "uniform"):
        flat = strength_of(asa, threat=I.Threat(eps=torch.full((6,), 0.03), alpha=0.01))
        wide = strength_of(asa, threat=I.Threat(eps=torch.full((6, 1, 1, 1), 0.03), alpha=0.01))
        assert flat.eps.shape == wide.eps.shape == (6, 1, 1, 1)
        assert torch.equal(flat.eps, wide.eps) and torch.equal(flat.alpha, wide.alpha)
    one = I.Threat(eps=torch.tensor(0.03), alpha=0.01)  # and one for all
    given_back = strength_of(lambda t, y, *, threat, **others: threat, threat=one)
    near(given_back.eps, torch.full((6, 1, 1, 1), 0.03), 1e-7)


@each(
    "numbers, told",
    [
        ({"lam": (1,)}, "two factors of eps"),
        ({"lam": 1.5}, "two factors of eps"),
        ({"lam": (-1, 1)}, "two factors of eps"),
        ({"lam": (1, math.nan)}, "two factors of eps"),
        ({"tau": 0}, "must be positive"),
        ({"dim": 0}, "dimension of 1 or more"),
        ({"w_feat": -1}, "finite and not negative"),
        ({"w_rel": math.inf}, "finite and not negative"),
    ],
)
def test_numbers_that_make_no_sense_are_one_line(numbers, told):
    with pytest.raises(I.InfoardError, match=told) as error:
        I.InfoARD(tiny_net(), tiny_net(1), image_shape=(3, 8, 8), **numbers)
    assert "\n" not in str(error.value)


def test_nets_of_other_precision_are_compared_in_their_own():
    single, double = [], []
    for nets, dtype in ((single, torch.float32), (double, torch.float64)):
        torch.manual_seed(0)
        student, teacher = tiny_net().to(dtype), tiny_net(1).to(dtype)
        info = I.InfoARD(student, teacher, image_shape=(3, 8, 8))
        x = rand(6, 3, 8, 8).to(dtype)
        student(x), teacher(x)
        assert {p.dtype for p in info.parameters()} == {dtype}
        nets.append(info.loss(x, x))
    near(single[0].double(), double[0], 1e-6)  # float32
    half = tiny_net().bfloat16()
    info = I.InfoARD(half, tiny_net(1).bfloat16(), image_shape=(3, 8, 8))
    assert {p.dtype for p in info.parameters()} == {torch.float32}


def test_no_rule_at_all_is_the_threat_as_it_is():
    assert strength_of(None).eps == I.Threat().eps


@each("option, why", [("asa", "rule of radii mine_too.py:broken"), ("mim", "bound mine_too.py")])
def test_a_broken_rule_or_bound_is_told_before_a_teacher_is_trained(option, why, desk, capsys):
    Path("mine_too.py").write_text("def broken(one, two, three): pass\n")
    assert I.main([f"--{option}", "mine_too.py:broken", "--no-figures"]) == 2
    error = capsys.readouterr().err
    assert why in error and "missing" in error
    assert not Path("runs/teachers").exists()
