"""What holds for options.py: attacks reach eps or it is said, and what nobody reads is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infoard as I
from companions import options
from test_infoard import SMALL

each = pytest.mark.parametrize


def settings_of(**given_options):
    """Resolved settings."""
    return I.Config(**given_options).resolved()


# ==== 1. Attacks that cannot reach eps ============================================================


@each("eps, steps, step", [(8 / 255, 10, 2 / 255), (8 / 255, 5, 2 / 255), (8 / 255, 4, 2 / 255)])
def test_published_steps_are_as_published(eps, steps, step):
    assert settings_of(eps=eps, steps=steps).step_size == step
    assert settings_of(dataset="cifar10").step_size == 2 / 255
    assert 2.5 * (8 / 255) / 10 == 2 / 255  # the rule agrees with what is published, to the bit


@given(eps=st.floats(0, 1), steps=st.integers(1, 50))
def test_a_step_that_was_not_given_reaches_eps(eps, steps):
    cfg = settings_of(eps=eps, steps=steps)
    assert cfg.steps * cfg.step_size >= eps * (1 - 1e-6)
    assert cfg.step_size == 2 / 255 or cfg.step_size <= eps
    lines = options.about_reach(cfg)
    assert not any("warning" in line for line in lines)
    assert bool(lines) == (cfg.step_size != 2 / 255)


@each(
    "given_options, told",
    [
        ({"steps": 3}, "--step-size 6.67/255, 2.5 eps/steps"),
        ({"eps": 0.3}, "5 steps of 2/255 do not reach eps 76.5/255"),
        ({"steps": 3, "step_size": 2 / 255}, "warning: 3 steps of 2/255 move a pixel by 6/255"),
        ({"eps": 0.3, "step_size": 0.01}, "raise --step-size or --steps"),
    ],
)
def test_steps_that_do_not_reach_eps_are_told(given_options, told):
    (line,) = options.about_reach(settings_of(**given_options))
    assert told in line


@each("eps, told", [(0.0, True), (1e-4, False)])
def test_a_radius_of_zero_is_told(eps, told):
    lines = [line for line in options.remarks(settings_of(eps=eps)) if "--eps 0 is no" in line]
    assert bool(lines) == told


def test_what_is_given_is_taken():
    assert settings_of(steps=3, step_size=2 / 255).step_size == 2 / 255
    assert settings_of(steps=3, step_size=0.0).step_size == 0.0


# ==== 2. Options that are not used ================================================================

UNUSED = [
    ({"framework": "at", "alpha": 0.5}, "--alpha 0.5", "framework at"),
    ({"framework": "rslad", "beta": 2.0}, "--beta 2.0", "framework rslad"),
    ({"framework": "rslad", "temperature": 2.0}, "--temperature 2.0", "framework rslad"),
    ({"framework": "natural", "steps": 3}, "--steps 3", "natural"),
    ({"infoard": False, "lam_hi": 2.0}, "--lam-hi 2.0", "without InfoARD"),
    ({"infoard": False, "asa": "gap"}, "--asa gap", "without InfoARD"),
    ({"infoard": False, "steps_lo": 1}, "--steps-lo 1", "without InfoARD"),
    ({"framework": "natural", "w_feat": 0.3}, "--w-feat 0.3", "cannot be added"),
    ({"asa": "off", "lam_hi": 2.0}, "--lam-hi 2.0", "--asa off"),
    ({"mim": "off", "w_att": 0.1}, "--w-att 0.1", "--mim off"),
    ({"mim": "off", "tau": 0.5}, "--tau 0.5", "without terms"),
    ({"mim": "vid", "critic_dim": 16}, "--critic-dim 16", "--mim vid"),
    ({"framework": "at", "infoard": False, "teacher": "t.pt"}, "--teacher t.pt", "no teacher"),
    ({"teacher": "t.pt", "teacher_framework": "at"}, "--teacher-framework at", "--teacher"),
    ({"teacher_nat": "t.pt"}, "--teacher-nat t.pt", "--transfer"),
    ({"eps_l2": 1.0}, "--eps-l2 1.0", "--attacks"),
    ({"data_dir": "x"}, "--data-dir x", "built-in data"),
]


@each("given_options, name, why", UNUSED)
def test_an_option_that_nobody_reads_is_named(given_options, name, why):
    lines = options.remarks(settings_of(**given_options))
    named = [line for line in lines if line.startswith(f"warning: {name} is not used by")]
    assert len(named) == 1 and why in named[0], lines


@each("framework", [name for name in I.FRAMEWORKS])
def test_usual_settings_are_no_remark(framework):
    assert options.remarks(settings_of(framework=framework)) == []
    assert options.remarks(settings_of(framework=framework, infoard=False)) == []
    assert options.remarks(settings_of(framework=framework, dataset="cifar10")) == []


USED = [
    {"alpha": 0.5},
    {"framework": "trades", "beta": 2.0},
    {"framework": "namid", "alpha": 5.0, "critic_dim": 16},
    {"framework": "estimators", "critic_dim": 16},
    {"framework": "saad", "alpha": 0.5, "beta": 1.0},
    {"w_att": 0.1, "w_rel": 0.1, "critic_dim": 16, "tau": 0.5, "lam_hi": 2.0},
    {"eps_l2": 1.0, "attacks": "clean,pgd_l2"},
    {"transfer": True, "teacher_nat": "t.pt"},
    {"framework": "at", "teacher": "t.pt"},
]


@each("given_options", USED)
def test_an_option_that_is_read_is_not_named(given_options):
    assert options.remarks(settings_of(**given_options)) == []


def test_eval_names_what_it_does_not_use(desk, capsys):
    line = "eval done/last.pt --attacks clean --eval-subset 5 --device cpu --eps-l2 1".split()
    assert I.main(line) == 0
    assert "warning: --eps-l2 1.0 is not used by --attacks clean\n" in capsys.readouterr().out


# ==== 3. Few images ===============================================================================


@given(
    train=st.integers(2, 5000),
    subset=st.integers(0, 5000),
    val_size=st.integers(0, 600),
    batch=st.integers(2, 300),
    epochs=st.integers(1, 60),
)
@settings(max_examples=25)
def test_few_steps_are_told_as_many_as_they_are(train, subset, val_size, batch, epochs):
    about = {"subset": subset, "val_size": val_size, "batch_size": batch, "epochs": epochs}
    cfg = settings_of(framework="natural", **about)
    n = min(subset or train, train)
    n -= min(val_size, n // 10)
    steps = len(range(0, n, batch)) * epochs
    lines = options.about_steps(cfg, train)
    assert bool(lines) == (steps < options.FEW_STEPS)
    for line in lines:
        assert f"{steps} steps in all ({n} training images, --batch-size {batch}" in line
        assert ("lower --batch-size to 16 or raise --epochs" in line) == (batch > 16)


@each("asked, told", [(None, 0), (0, 0), (45, 0), (46, 1), (100, 1)])
def test_more_test_images_than_there_are_is_told(asked, told):
    cfg = settings_of(eval_subset=asked, subset=181, epochs=400)
    lines = options.about_few(cfg, 180, 45)
    takes_all = [f"note: --eval-subset {asked} takes all 45 test images: there are no more"]
    assert lines == takes_all * told + ["note: --subset 181 takes all 180 training images"]


@each("size, told", [(3, True), (7, True), (8, False), (32, False)])
def test_images_that_show_nothing_are_told(size, told):
    lines = options.about_size(size)
    assert [line.startswith(f"warning: images of {size} pixels") for line in lines] == [True] * told


@each(
    "val, val_size, advice",
    [
        (499, 499, "raise --val-size (at most 1000 here), or report last"),
        (60, 1000, "a tenth of the training images, which is the most: report last"),
        (500, 500, None),
        (0, 0, None),  # best is the last epoch
    ],
)
def test_a_choice_on_few_images_is_told(val, val_size, advice):
    train = 10_000 - val if val != 60 else 540
    lines = options.about_choice(settings_of(val_size=val_size), train, val)
    assert len(lines) == (advice is not None)
    for line in lines:
        error = 100 * (0.5 * 0.5 / val) ** 0.5  # of the share of heads among so many coins
        told = f"by val_pgd on {val} validation images (standard error: up to {error:.1f} points)"
        assert told in line
        assert advice in line and error > 2
    assert options.about_choice(settings_of(epochs=1), train, val) == []


# ==== 4. A teacher that nobody needs ==============================================================

NO_TEACHER = [
    {"asa": "off", "mim": "off"},
    {"asa": "uniform", "mim": "off"},
    {"asa": "student", "w_feat": 0.0},
]


@each("given_options", NO_TEACHER)
def test_no_teacher_is_trained_that_nobody_asks(given_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(I, "load_dataset", lambda *args, **options: SMALL)
    for name in ("asks", "trained"):
        assert options.asks_teacher(settings_of(framework="at", **given_options)) is False, name
    asked = []
    monkeypatch.setattr(I, "trained", lambda *args, **more: asked.append(args))
    common = {"framework": "at", "student": "tiny", "epochs": 1, "steps": 1, "subset": 40}
    common |= {"attacks": "clean", "eval_subset": 10, "device": "cpu", "figures": False}
    I.train(**common, **given_options, out="r")
    assert not asked


@each(
    "given_options",
    [{}, {"asa": "off"}, {"mim": "off"}, {"asa": "off", "mim": "off", "w_rel": 1.0}],
)
def test_a_teacher_is_asked_for_strengths_and_terms(given_options):
    assert options.asks_teacher(settings_of(**given_options)) is True


@each("framework", ["ard", "rslad", "akd", "absld", "adaad"])
def test_a_mixture_that_is_none_is_told(framework):
    cfg = I.Config(framework=framework, alpha=1.5).resolved()
    (line,) = [line for line in options.remarks(cfg) if "--alpha" in line]
    assert f"weighs the other term of {framework} by -0.5, which is climbed" in line
    for alpha in (0.0, 1.0):
        cfg = I.Config(framework=framework, alpha=alpha).resolved()
        assert not [line for line in options.remarks(cfg) if "--alpha" in line]


def test_a_teacher_that_nobody_asks_is_told():
    cfg = I.Config(framework="adr", infoard=False, teacher="net.pt").resolved()
    assert any("--teacher net.pt is not used by" in line for line in options.remarks(cfg))
    cfg = I.Config(framework="adr", augment="none", flip=False).resolved()
    assert any(
        "--flip False is not used by --augment none" in line for line in options.remarks(cfg)
    )
