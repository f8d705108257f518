"""What surrounds a training: may it go on, on which data, alone in its folder; where was it made.

infoard.py asks for these by name. Alone it goes on from exactly the settings with which a run was
begun, compares no data, locks nothing, and keeps nothing but its settings.

    1  settings    2  data of a run    3  alone in a folder    4  beginning    5  ending
"""

import contextlib
import copy
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import infoard as I
from companions import averaging, extra, options, own, plus
from companions.identity import described, difference, of_names
from companions.locks import locked

# ==== 1. Settings =================================================================================

# What a run may be resumed with another value of: its machine, its files, its evaluation.
FREE = (
    "device out resume figures progress attacks eval_subset eval_batch data_dir download compile "
    "fast transfer"
).split()
OF_INFOARD = "asa lam_lo lam_hi steps_lo mim w_feat w_att w_rel tau taps".split()


def read_json(path: Path) -> dict:
    """A dict from a file, or one line that says what is wrong with it."""
    content = None
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
    told = f"{path} is missing or broken: choose another --out"
    if path.name == "results.json":
        told += ", or delete it and the run is evaluated again by --resume"
    I.require(isinstance(content, dict), told)
    return content


def begun_with(out: Path) -> dict:
    """The content of a run's config.json, whose settings are a dict, or one line."""
    config = read_json(out / "config.json")
    whole = isinstance(config.get("settings"), dict)
    I.require(whole, f"{out}/config.json is broken: choose another --out")
    settings = config["settings"]
    if settings.get("teacher_nat"):  # whose normalisation once was that of the teacher
        settings.setdefault("teacher_nat_norm", settings.get("teacher_norm", "none"))
    return config


def begun_settings(given: dict) -> dict:
    """The settings that the run to be resumed in given["out"] was begun with; {} if there is none.

    Those of its framework alone stand under own, as in versions of today.
    """
    out = Path(given.get("out") or "").expanduser()
    if not given.get("resume") or not given.get("out") or not (out / "config.json").exists():
        return {}
    settings = begun_with(out)["settings"]
    options = I.get_framework(settings.get("framework", I.Config.framework)).options
    own = {name: settings[name] for name in options if name in settings}
    own.update(settings.get("own", {}))
    known = [f.name for f in fields(I.Config)]
    return {name: settings[name] for name in known if name in settings} | {"own": own}


def as_words(name: str, value) -> list[str]:
    """A setting as words of a command line: --lr 0.1, --infoard, --no-infoard."""
    if value is False:
        return [I.flag_of(f"no-{name}")]
    if value is True:
        return [I.flag_of(name)]
    return [I.flag_of(name), str(value)]


def in_words(cfg: I.Config, names: Iterable[str]) -> str:
    """Settings as words of a command line."""
    return " ".join(" ".join(as_words(name, getattr(cfg, name))) for name in names)


def words_of(cfg: I.Config) -> list[str]:
    """The command line of a run: all settings, resolved, that are not the usual ones."""
    words = []
    for f in fields(I.Config):
        value = getattr(cfg, f.name)
        usual = options.usual(f.name, cfg)
        if f.name == "out":
            usual = replace(cfg, out=None).resolved().out
        if f.name != "own" and value != usual:
            words += as_words(f.name, value)
    for name, (usual, _) in I.get_framework(cfg.framework).options.items():
        if cfg.own.get(name, usual) != usual:
            words += as_words(name, cfg.own[name])
    return words


# Options that alone begin no run.
OF_RESUMING = {"resume", "out", "device", "progress", "figures", "attacks", "eval_subset"}


def unfinished(folder: str = "runs") -> str:
    """In words, which runs below a folder have begun and have no results, teachers apart: those go
    on with the run that misses them.
    """
    runs = [file.parent for file in sorted(Path(folder).rglob("config.json"))]
    open_ones = [run for run in runs if not (run / "results.json").exists() and not is_shared(run)]
    if not open_ones:
        return f"there is none in {folder}/ that is unfinished"
    return f"add --out; unfinished are {of_names(open_ones)}"


def with_folder(given: dict) -> dict:
    """The same with the usual folder, if --resume is given and nothing that names a run; one line
    if there is none.
    """
    names_one = given.get("out") or given.keys() - OF_RESUMING
    if names_one or not given.get("resume"):
        return given
    out = I.Config(**given).resolved().out
    told = f"no run to go on is named, and {out} holds none: {unfinished()}"
    I.require((Path(out) / "config.json").exists(), told)
    return {**given, "out": out}


def begins(given: dict) -> str:
    """A line if --resume finds nothing to go on and a run is begun; one line to refuse that, if
    nothing that is given says which.
    """
    if not given.get("resume"):
        return ""
    out = given.get("out") or I.Config(**given).resolved().out
    if (Path(out).expanduser() / "config.json").exists():
        return ""
    told = f"{out} holds no run to go on: name the folder of one, or what is to begin"
    I.require(given.keys() - OF_RESUMING, told)
    return f"{out} holds no run yet: one is begun"


def completed(given: dict) -> tuple[dict, str]:
    """(settings of a run that is resumed, what was not given as it was begun; a line about it)."""
    given = with_folder(given)
    old = begun_settings(given)
    if not old:
        return given, begins(given)
    own = old.pop("own")
    taken = {name: old[name] for name in old if name not in ("out", "resume", *given)}
    made = {**taken, **given}
    if own and given.get("framework", old.get("framework")) == old.get("framework"):
        made["own"] = {**own, **given.get("own", {})}
    try:
        cfg = I.Config(**made).resolved()
    except TypeError:  # a number that is none
        raise I.InfoardError(
            f"{given['out']}/config.json is broken: choose another --out"
        ) from None
    told = [name for name in taken if getattr(cfg, name) != options.usual(name, cfg)]
    words = in_words(cfg, told) or "the usual settings"
    return made, f"taken from {given['out']}/config.json: {words}"


def same_settings(old: dict, cfg: I.Config, free: Iterable[str] = ()) -> None:
    """One line, if a run was begun with other settings than these, those of FREE and free apart."""
    free = [*FREE, *free] if cfg.infoard else [*FREE, *free, *OF_INFOARD]
    old = {**asdict(I.Config()), **old}  # what was no option then
    for name, value in cfg.own.items():  # settings of the framework, which once stood beside them
        old[name] = old["own"].get(name, old.get(name, value))
    new = {name: value for name, value in asdict(cfg).items() if name != "own"} | cfg.own
    for name, value in new.items():
        told = f"{cfg.out} was made with {' '.join(as_words(name, old[name]))}, not"
        told += f" {as_words(name, value)[-1]}: choose another --out"
        if name == "epochs":
            told += ", as a run keeps its number of epochs, finished or stopped"
        I.require(name in free or old[name] == value, told)


def same_file(name: str, config: dict, cfg: I.Config) -> bool:
    """Whether the file of an option is the one of before, however its path is written; one line if
    it has its old path and other content.
    """
    path, before = getattr(cfg, name), config["settings"].get(name)
    now, then = own.digest(path or ""), config.get(f"{name}_sha256")
    if now is None or not before:
        return False
    if then is None:  # earlier versions have kept no hash of teacher_nat
        return os.path.realpath(path) == os.path.realpath(before)
    told = f"{path} has changed since {cfg.out} was begun: choose another --out"
    I.require(now == then or path != before, told)
    return now == then


def same_run(cfg: I.Config, out: Path) -> None:
    """One line, if what lies in out is a run of other settings, files or, once finished, data.

    After a loss that was not finite a run may go on with another lr, and without half precision.
    """
    finished, begun = (out / "results.json").exists(), (out / "last.pt").exists()
    diverged = out / "diverged.json"
    if not finished and not begun:
        if I.world()[0] == 0:
            diverged.unlink(missing_ok=True)
        return
    config = begun_with(out)
    free = [name for name in ("teacher", "teacher_nat") if same_file(name, config, cfg)]
    if diverged.exists() and not finished:
        free += ["lr", "amp"] if cfg.amp == "off" else ["lr"]
    same_settings(config["settings"], cfg, free)
    if finished:
        read_json(out / "results.json")
        same_data_as_finished(cfg, out)


def new_lines(cfg: I.Config, remarks: Callable) -> list[str]:
    """What remarks(cfg) says, but for what it said when the run was begun."""
    lines = remarks(cfg)
    if not (Path(cfg.out) / "last.pt").exists():
        return lines
    begun = begun_settings({"resume": True, "out": cfg.out})
    told = remarks(I.Config(**begun).resolved())
    return [line for line in lines if line not in told]


def about_data(out: Path, data: I.Data, cfg: I.Config) -> list[str]:
    """What is to be said of a training from its data."""
    train = len(data.y_train)
    if is_shared(out):
        return options.about_steps(cfg, train, "--teacher-epochs")
    few = options.about_few(cfg, train, len(data.y_test))
    return options.about_size(data.x_train.shape[-1]) + few


def go_on(cfg: I.Config, out: Path, data: I.Data) -> None:
    """One line, if an unfinished run was begun with other data; notes and tells another lr.

    Of any run it is told if there are fewer images than its settings are for.
    """
    for line in new_lines(cfg, partial(about_data, out, data)):
        print(line)
    if not (out / "last.pt").exists():
        return
    why = difference(recorded(out), described(data))
    told = f"{out} was begun on {why}: name the --data-dir it had, or choose another --out"
    I.require(not why, told)
    config = read_json(out / "config.json")
    changed = {}
    for name in ("lr", "amp"):
        old, new = config["settings"].get(name), getattr(cfg, name)
        if old != new:
            changed[name] = [old, new]
            print(f"{out} goes on with {I.flag_of(name)} {new} in the place of {old}")
    if changed:
        config["settings"].update(lr=cfg.lr, amp=cfg.amp)
        config["changes"] = [*config.get("changes", []), changed]
        I.save(out / "config.json", config)
    if I.world()[0] == 0:
        (out / "diverged.json").unlink(missing_ok=True)


def same_shapes(a: dict, b: dict) -> bool:
    """Whether two state dicts have tensors of the same names and shapes."""
    return {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def balanced_as_before(y: Tensor, n: int) -> Tensor:
    """infoard.class_balanced as it was: a round that is cut short takes the first classes."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    classes = [order[y[order] == k] for k in y.unique()]
    rounds = nn.utils.rnn.pad_sequence(classes, padding_value=-1)  # [most, K]: one of each class
    return rounds[rounds >= 0][:n].sort().values


def of_earlier_versions(run: I.Run, state: dict, path: Path) -> None:
    """What must be known before a checkpoint of any version is brought back.

    The images that were learned from stay those, however validation images are chosen today.
    """
    told = f"{path} is of another net than {run.cfg.student} is now: choose another --out"
    I.require(same_shapes(run.parts["model"].state_dict(), state["model"]), told)
    told = f"{path} is of a version whose first convolution halved 64 pixels: begin again"
    I.require(state["size"] != 64 or "benchmark" in state["config"], told)
    y = run.data.y_train
    train = state["at"]["order"].sort().values
    told = f"{path} was begun on more training images than there are now, {len(y)}"
    I.require(train.max() < len(y), f"{told}: bring them back, or choose another --out")
    if not torch.equal(train, run.train):
        pool = I.class_balanced(y, run.cfg.subset or len(y))
        if not torch.isin(train, pool).all():
            pool = balanced_as_before(y, run.cfg.subset)
        run.train, run.val = train, pool[~torch.isin(pool, train)]


# ==== 2. Data of a run ============================================================================


def recorded(out: Path) -> dict:
    """What a run says of its data; of one of an earlier version the names of classes alone."""
    known = read_json(out / "config.json").get("data")
    if known:
        return known
    for name in ("best.pt", "last.pt"):
        with contextlib.suppress(I.InfoardError):
            return {"classes": I.load_tensors(out / name).get("classes", [])}
    return {}


def same_data_as_finished(cfg: I.Config, out: Path) -> None:
    """One line, if a finished run was made on other data; told, if they are not here."""
    known = recorded(out)
    if not known or (cfg.dataset == "shapes" and not cfg.extra):
        return
    about = {"download": False, "image_size": cfg.image_size}
    try:
        data = I.load_dataset(cfg.dataset, cfg.data_dir, **about)
        data.about = data.about | extra.identity(cfg)
    except I.InfoardError as error:
        print(f"{out}: its data cannot be compared with those of now ({error})")
        return
    why = difference(known, described(data))
    I.require(not why, f"{out} was made on {why}: choose another --out")


def teacher_folder(out: Path, cfg: I.Config) -> Path:
    """Where the teacher of these settings lies: out, unless it was made on other data.

    A run that is finished asks for it to be drawn beside it: then none is trained.
    """
    beside = out.parts[:2] == ("runs", "teachers")
    if beside and len(out.parts) > 3:  # a net or data of a file of one's own are in its name
        name = re.sub(r"/.*/([^/]*)\.py:", r"\1.", "/".join(out.parts[2:]))
        out = Path(*out.parts[:2], re.sub("[:/]", ".", name))
    if not cfg.flip:
        out = out.with_name(f"{out.name}-noflip")
    found = teacher_of_now(out, cfg)
    needless = (Path(cfg.out or "") / "results.json").exists()
    there = (found / "results.json").exists()
    I.require(there or not needless, f"its teacher is no longer in {found}")
    usual = I.IMAGES_DEFAULTS["teacher_arch"]
    if not there and cfg.teacher_arch == usual and I.pick_device(cfg.device).type == "cpu":
        print(f"note: on a CPU a {usual} learns for hours or days: name a --teacher, or --lite")
    return found


def teacher_of_now(out: Path, cfg: I.Config) -> Path:
    """out, or another folder if the teacher in out was made on other data."""
    known = {}
    if (out / "config.json").exists():
        known = read_json(out / "config.json").get("data")
    if not known:
        return out
    about = {"download": cfg.download, "image_size": cfg.image_size}
    now = described(I.load_dataset(cfg.dataset, cfg.data_dir, **about))
    why = difference(known, now)
    if not why:
        return out
    print(f"{out} was made on {why}: another one is needed")
    return out.with_name(f"{out.name}-{hashlib.sha256(json.dumps(now).encode()).hexdigest()[:8]}")


def is_shared(out: Path) -> bool:
    """Whether a folder is that of a teacher which many runs share."""
    return out.parts[-3:-1] == ("runs", "teachers")


# ==== 3. Alone in a folder ========================================================================


UNDER_WAY = []  # settings of the runs that this process is in: a student's, then its teacher's


def how_to_go_on(out: Path) -> str:
    """The command that goes on with what is stopped in a folder; for a teacher that a run misses,
    that of the run.
    """
    folder = Path(UNDER_WAY[0].out) if UNDER_WAY else out
    if folder == out or (folder / "last.pt").exists():
        return options.command("--resume", "--out", folder)
    return options.command(*words_of(UNDER_WAY[0]))


@contextlib.contextmanager
def alone_in(out: Path, cfg: I.Config | None = None) -> Iterator[None]:
    """Inside, no other process trains into the folder: one line if one does already.

    For a teacher in runs/teachers, which many runs share, it is waited for. cfg: of the run.
    """
    UNDER_WAY.append(cfg or I.Config(out=str(out)))
    try:
        with locked(out, wait=is_shared(out)):
            yield
    except KeyboardInterrupt as stopped:
        told = f"{how_to_go_on(out)} goes on"
        begun = I.world()[0] == 0 and (out / "last.pt").exists()
        if begun and told not in stopped.args:
            stopped.args += (told,)
        raise
    finally:
        UNDER_WAY.pop()


# ==== 4. Beginning ================================================================================


def takes_one(net: nn.Module, size: int) -> bool:
    """Whether a net can learn from one image: batch norm cannot, where that is one pixel."""
    device = next(net.parameters()).device
    with torch.random.fork_rng([]), torch.no_grad():
        try:
            copy.deepcopy(net).train()(torch.zeros(1, 3, size, size, device=device))
        except ValueError as error:
            return "more than 1 value" not in str(error)
        except Exception:  # whatever foreign nets raise when they are copied: training will tell
            return True
    return True


def learned_from(run: I.Run) -> int:
    """How many images of an epoch are learned from: all, but for a last one alone that batch norm
    cannot take.
    """
    n, ranks = len(run.train), run.ranks
    I.require(n >= 2 * ranks, f"{n} training images are too few for {ranks} processes: two each")
    rest = n % run.cfg.batch_size
    if rest // ranks != 1 or takes_one(run.student, run.size):
        return n
    print(f"the last batch of an epoch would be of one image, too few for batch norm at {run.size}")
    print(f"pixels: {n - rest} of {n} images are learned from in each, others each time")
    return n - rest


def check_radii(cfg: I.Config) -> None:
    """One line for limits of InfoARD's radii that no image or no rule can have."""
    if not cfg.infoard or cfg.asa == "off" or ":" in cfg.asa:  # each call of one's own is checked
        return
    by_distance = cfg.asa.startswith("distance")  # it clips: its upper limit may be any
    most = cfg.lam_lo if by_distance else max(cfg.lam_lo, cfg.lam_hi)
    told = f"--lam-lo and --lam-hi are factors of --eps, {cfg.eps:.3g}: {most:g} times that is more"
    I.require(most * cfg.eps <= 1, f"{told} than 1, all that a pixel has")
    if by_distance:
        told = f"--asa {cfg.asa} clips the teacher's distance to --lam-lo {cfg.lam_lo:g} and"
        I.require(cfg.lam_lo <= cfg.lam_hi, f"{told} --lam-hi {cfg.lam_hi:g}: the first is larger")
        I.require(not cfg.steps_lo, f"--asa {cfg.asa} takes no --steps-lo: leave it at 0")


def check_possible(cfg: I.Config, device: torch.device) -> None:
    """One line for what would fail only after hours, and one for each option of no effect."""
    if I.world()[0] == 0:
        for line in new_lines(cfg, options.remarks) + new_lines(cfg, plus.about_weights):
            print(line)
    averaging.check(cfg)
    extra.check(cfg)
    check_radii(cfg)
    if ":" in cfg.asa:
        own.checked_rule(cfg.asa, I.resolve(I.ASA, cfg.asa, "rule of radii"))
    if ":" in cfg.mim:
        own.check_bound(cfg.mim, I.resolve(I.BOUNDS, cfg.mim, "bound of information"))
    if cfg.infoard:
        own.check_attention(I.resolve(I.BOUNDS, cfg.mim, "--mim"), cfg.w_att)
    ranks = I.world()[1]
    told = f"--batch-size must be a multiple of {ranks}, the ranks"
    I.require(cfg.batch_size % ranks == 0, told)
    I.require(not cfg.sync_bn or device.type == "cuda", "--sync-bn needs CUDA")
    if cfg.sync_bn and ranks == 1:
        print("warning: --sync-bn has no effect in one process")
    if cfg.figures:
        importlib.import_module("matplotlib")
    if cfg.schedule != "cosine":
        late = [drop for drop in cfg.schedule.split(",") if int(drop) >= cfg.epochs]
        told = f"warning: --schedule {cfg.schedule} has no effect after epoch {cfg.epochs}"
        if late:
            print(f"{told}: the learning rate never falls at {', '.join(late)}")
    if ":" in cfg.student and not cfg.student.startswith("timm:"):
        I.resolve({}, cfg.student, "net")  # a name that is not there, before a teacher is trained
    elif ":" not in cfg.student:
        with torch.device("meta"):
            I.build_model(cfg.student)


def same_teachers(run: I.Run) -> None:
    """One line, if a run that goes on was begun with other nets beside its student."""
    config = Path(run.cfg.out, "config.json")
    begun = read_json(config) if run.at.step and config.exists() else {}
    for name in ("teacher", "teacher_nat"):
        file = file_beside(run, name)
        before, now = begun.get(f"{name}_sha256"), own.digest(file)
        told = f"{run.cfg.out} was begun with another {name} than {file}"
        same = not file or before in (None, now)
        I.require(same, f"{told}: bring that one back, or choose another --out")


def introduce(run: I.Run) -> None:
    """Compares its teachers with those of before; prints on how few images `best` is chosen and
    what InfoARD compares in student and teacher; tries attacks of anyone's own once.
    """
    cfg = run.cfg
    same_teachers(run)
    if run.at.step == 0 and not is_shared(Path(cfg.out)):
        for line in options.about_choice(cfg, len(run.train), len(run.val)):
            print(line)
    if any(isinstance(net, _DropoutNd) and net.p for net in run.student.modules()):
        print("note: the student has dropout, whose numbers neither --seed nor --resume repeats")
    images = I.test_images(run.data, 2, run.device)
    for entry in cfg.attacks.split(","):
        if ":" in entry:
            (attack,) = I.chosen_attacks(entry).values()
            eps = cfg.eps_l2 if attack.norm == "l2" else cfg.eps
            I.correct(run.evaluated, *images, I.repeatable(attack, run.device, eps=eps))
    if run.info:
        from companions.taps import describe

        print(describe(run.info))


def file_beside(run: I.Run, name: str) -> str:
    """The file of a net beside the student, of one that was trained here, too; or ""."""
    return getattr(run.nets.get(name), "file", None) or getattr(run.cfg, name) or ""


def provenance(run: I.Run) -> dict:
    """Where, by what and on which data a run is made, for its config.json."""
    cfg, device = run.cfg, run.device
    return {
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": sys.platform,
        "ranks": I.world()[1],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "source_sha256": own.digest(I.__file__),
        "teacher_sha256": own.digest(file_beside(run, "teacher")),
        "teacher_nat_sha256": own.digest(file_beside(run, "teacher_nat")),
        "plus": plus.weights_of(cfg) if cfg.plus else {},
        "data": described(run.data),
    }


# ==== 5. Ending ===================================================================================

LEARN_MORE = "raise --epochs, or try another --batch-size or --lr"


def chance_of(y: Tensor) -> float:
    """Chance, for students and teachers: what is right, in per cent, of always saying the class
    that most of these labels are of.
    """
    return 100 * y.bincount().max().item() / len(y)


def about_chance(result: dict, y: Tensor, hint: str) -> list[str]:
    """A line if the 95% interval of a net's clean accuracy reaches down to chance.

    y: the labels of all test images.
    """
    chance = chance_of(y[I.class_balanced(y, result["n"])])
    low, high = result["ci95"]["clean"]
    if low > chance:
        return []
    told = (
        f"warning: clean accuracy {result['clean']} on {result['n']} images (95%: {low} to {high})"
    )
    return [f"{told} cannot be told from chance, {chance:.1f} (always one class): {hint}"]


def add_findings(run: I.Run, net: nn.Module, results: dict) -> None:
    """Adds how the net does under attacks on an undefended one, if that is asked for; what its
    method findings, such as MID's, says of the test images; how the student itself does where an
    average of its weights is evaluated; a note to what is at chance.
    """
    if run.cfg.transfer:
        source = run.nets["teacher_nat"]
        results["transfer"] = I.evaluated(run.cfg, net, run.data, run.device, source=source)
    if "ema" in run.parts:
        averaging.add_raw(run, results)
    hint = LEARN_MORE
    if is_shared(Path(run.cfg.out)):
        hint = hint.replace("--epochs", "--teacher-epochs")
    results["last"]["notes"] += about_chance(results["last"], run.data.y_test, hint)
    if results["best"] is not results["last"]:
        results["best"]["notes"] += about_chance(results["best"], run.data.y_test, hint)
    if hasattr(net, "findings"):
        images = I.test_images(run.data, run.cfg.eval_subset, run.device)
        results["findings"] = net.findings(*images, run.cfg.eps)


def not_evaluated(cfg: I.Config, out: Path) -> list[str]:
    """A line if a finished run was not evaluated as it is asked for now."""
    best = read_json(out / "results.json").get("best", {})
    n, of = best.get("n", 0), best.get("about", {}).get("of", 0)
    columns = [name for name in I.chosen_attacks(cfg.attacks) if name not in I.PARTS]
    missing = [name for name in columns if best.get(name) is None]
    words = []
    if missing:
        words += ["--attacks", cfg.attacks]
    if cfg.eval_subset is not None and n < min(cfg.eval_subset or of, of):
        words += ["--eval-subset", cfg.eval_subset]
    if not words:
        return []
    done = [name for name in (*I.METRICS, *columns) if best.get(name) is not None]
    done = [name for name in dict.fromkeys(done) if not name.startswith("worst")]
    told = f"it was evaluated with {', '.join(done)} on {n} images"
    if missing:
        told += f", without {', '.join(missing)}"
    more = options.command("eval", out / "best.pt", *words, "--out", out)
    return [f"{told}; this does more: {more}"]


def draw_what_is_missing(cfg: I.Config, out: Path) -> None:
    """The figures of a finished run that has none; a line if they cannot be drawn any more."""
    try:
        figures = importlib.import_module("companions.figures")
        results = read_json(out / "results.json")
        if "over_eps" in results and (out / "sheet.pt").exists():
            figures.run_figures(out)
            return
        device = I.pick_device(cfg.device)
        about = {"download": False, "image_size": cfg.image_size}
        data = I.load_dataset(cfg.dataset, cfg.data_dir, **about)
        cfg = replace(cfg, fast=False, compile=False)  # nothing is learned
        run = I.Run(cfg, data, device, I.get_nets(cfg, data, device))
        run.load(out / "last.pt")
        figures.illustrate(run, results)
    except (I.InfoardError, ImportError) as error:
        print(f"the figures of {out} cannot be drawn: {error}")


def report_again(out: Path) -> None:
    """Prints what infoard.finish has printed of a run, from its results.json."""
    results = read_json(out / "results.json")
    names = ["best"] if results["best"] == results["last"] else ["best", "last"]
    for name in names:
        I.report(f"{out.name} {name} (epoch {results[name]['epoch']})", results[name])


def seen_finished(cfg: I.Config, out: Path) -> None:
    """Says that a run is finished, and what of the evaluation that is asked for it has not; draws
    figures that are asked for and missing. Of a teacher that is shared nothing is said.
    """
    if is_shared(out):
        return
    drawn = (out / "figures/sheet.pdf").exists() or not (out / "last.pt").exists()
    to_draw = cfg.figures and not drawn
    if to_draw:
        print(f"{out} is finished; drawing its figures")
        report_again(out)
    else:
        print(f"{out} is finished: another --out or --seed makes another run")
    for line in not_evaluated(cfg, out):
        print(line)
    if to_draw:
        draw_what_is_missing(cfg, out)
