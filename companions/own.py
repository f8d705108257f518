"""What people bring by a name of their own: nets, attacks, files; what is missing is one line.

    python infoard.py --student mine:net               a module that can be imported
    python infoard.py --student code/mine.py:net       a file, wherever it lies
    python infoard.py --student timm:resnet18          timm's nets, if timm is installed
    python infoard.py eval CKPT --attacks clean,pgd,mine:attack

    1  names and files    2  nets    3  attacks    4  rules of radii

A net maps images [B,3,H,W] in [0,1] to logits [B,K]; it is made by a factory, which gets
num_classes if it takes that. An attack is attack(net, x, y, eps=..., generator=...) -> x' of the
shape of x; it may go without generator. infoard.py asks for imported, nearest, digest,
build, attack_called and check_parts by name.
"""

import difflib
import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import infoard as I

# ==== 1. Names and files ==========================================================================


def digest(path: str | Path) -> str | None:
    """The sha256 of a file, if it is one."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def imported(entry: str) -> str:
    """Imports the file of "path/file.py:name", once; "module:name" of the module that it became.

    Errors speak of the file as it was named.
    """
    path, _, name = entry.rpartition(":")
    file = Path(path).expanduser().resolve()
    I.require(file.is_file(), f"there is no file {path}")
    key = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    module_name = f"{file.stem}_{key}"  # no file of the same name elsewhere is meant
    if module_name not in sys.modules:
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))  # for what lies beside it
        spec = importlib.util.spec_from_file_location(module_name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    module, first = sys.modules[module_name], name.partition(".")[0]
    if not hasattr(module, first):
        told = f"{file.name} has no attribute {first!r}"
        raise AttributeError(told, name=first, obj=module)
    if first == name:
        named = getattr(module, name)
        told = f"{name} of {file.name} is a {type(named).__name__}, which cannot be called"
        I.require(callable(named) or is_dataclass(named), told)
    return f"{module_name}:{name}"


def nearest(error: BaseException, entry: str = "") -> str:
    """What may have been meant by the entry "module:name" that an error was raised for, or ""."""
    if isinstance(error, ModuleNotFoundError):
        module, _, name = entry.partition(":")
        return f": if it is a file, name its path, path/to/{module.replace('.', '/')}.py:{name}"
    if not isinstance(error, AttributeError) or not error.name:
        return ""
    names = [name for name in dir(error.obj) if not name.startswith("__")]
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(error.name.lower(), lower, 1)
    return f": did you mean {lower[near[0]]}?" if near else ""


def check_entry(entry: str, what: str) -> None:
    """One line for a file that is named without what it is to give."""
    told = f"{entry} is a file: which {what} of it is meant? Write {entry}:NAME, a name in it"
    I.require(not entry.endswith(".py"), told)


def fits(function: Callable, *arguments, **named) -> str:
    """Why a function cannot be called so, or "" if it can."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        return str(error)
    except ValueError:  # it does not tell what it takes
        return ""
    return ""


def check_loss(loss: Callable) -> None:
    """One line, unless it can be called as the loss of a framework."""
    why = fits(loss, None)
    I.require(not why, f"a framework is a function of one Step: {why}")


# ==== 2. Nets =====================================================================================


def takes(function: Callable, name: str) -> bool:
    """Whether a function has an argument of this name, or takes any; a bare class takes none."""
    parameters = inspect.signature(function).parameters.values()
    kinds = {p.kind for p in parameters}
    bare = inspect.Parameter.VAR_POSITIONAL in kinds  # a class without an __init__ of its own
    any_name = inspect.Parameter.VAR_KEYWORD in kinds and not bare
    return any_name or any(p.name == name for p in parameters)


def made(name: str, classes: int | None) -> nn.Module:
    """What the factory of a name gives."""
    factory = I.resolve({}, name, "net")
    given = {"num_classes": classes} if classes and takes(factory, "num_classes") else {}
    why = fits(factory, **given)
    I.require(not why, f"the net {name}: {why}; a factory gets num_classes, if it takes that")
    net = factory(**given)
    I.require(isinstance(net, nn.Module), f"{name} gives a {type(net).__name__}, no nn.Module")
    return net


def from_timm(name: str, classes: int | None, size: int) -> nn.Module:
    """A net of timm with random weights, for images of this size if it asks for that."""
    import timm

    I.require(timm.is_model(name), f"timm has no net called {name!r}")
    options = {"num_classes": classes} if classes else {}
    try:
        return timm.create_model(name, img_size=size, **options)
    except TypeError:  # most nets take any size
        return timm.create_model(name, **options)


def known_to_timm(name: str) -> bool:
    """Whether timm is installed and has a net of this name."""
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)


def check_net(net: nn.Module, name: str, classes: int | None, size: int) -> None:
    """One line, unless the net maps images [B,3,H,W] to logits [B,K] of these classes."""
    parameters = [*net.parameters(), *net.buffers()]
    if any(p.is_meta for p in parameters):
        return
    x = torch.full((2, 3, size, size), 0.5).to(memory_format=torch.channels_last)
    modes = [(module, module.training) for module in net.modules()]
    try:
        with torch.no_grad():
            z = net.eval()(x)
    except Exception as error:  # whatever foreign code raises
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise I.InfoardError(f"{name} does not take images [2,3,{size},{size}]: {why}") from None
    finally:
        for module, mode in modes:
            module.training = mode
    told = f"{name} gives a {type(z).__name__}, not logits [B,K]: wrap it in a net that does"
    I.require(isinstance(z, Tensor), told)
    told = f"{name} gives {list(z.shape)} for two images, not logits [2,K]"
    I.require(z.dim() == 2 and len(z) == 2, told)
    told = f"{name} has {z.shape[1]} classes, the data have {classes}"
    I.require(classes in (None, z.shape[1]), told)
    z = I.as_float32(z)
    is_logits = (z < 0).any() or (z.sum(1) - 1).abs().max() > 1e-4
    I.require(is_logits, f"{name} gives probabilities, not logits: leave out its softmax")


def found(name: str, classes: int | None, size: int) -> nn.Module:
    """The net of module:factory, path/file.py:factory, timm:name or a bare name of timm."""
    if ":" not in name:
        check_entry(name, "net")
        if not known_to_timm(name):
            I.lookup(list(I.MODELS), name, "model")
        return from_timm(name, classes, size)
    if name.startswith("timm:"):
        return from_timm(name.removeprefix("timm:"), classes, size)
    return made(name, classes)


def build(name: str, classes: int | None, size: int) -> nn.Module:
    """That net, if it maps images to logits of these classes."""
    net = found(name, classes, size)
    check_net(net, name, classes, size)
    return net


# ==== 3. Attacks ==================================================================================


def attack_called(name: str, taken: Iterable[str]) -> Callable:
    """The attack "module:name" or "file.py:name", checked; taken: what other columns are called."""
    column = name.rpartition(":")[2]
    I.require(column not in taken, f"--attacks {name}: another column is called {column}")
    return checked_attack(name, I.resolve({}, name, "attack"))


def checked_attack(name: str, attack: Callable) -> Callable:
    """An attack of anyone's own, called by its name: refused if it gives no x' of its ball.

    Its attribute norm says in which ball eps is a radius: "linf" (or no attribute), "l2", "none".
    """
    given = {"eps": 8 / 255}
    if takes(attack, "generator"):
        given["generator"] = None
    why = fits(attack, None, None, None, **given)
    contract = "an attack is attack(net, x, y, eps=..., generator=...) -> x'"
    I.require(not why, f"the attack {name}: {why}; {contract}")
    norm = getattr(attack, "norm", "linf")
    I.lookup(("linf", "l2", "none"), norm, f"norm of the attack {name}")

    def checked(net: nn.Module, x: Tensor, y: Tensor, *, eps: float, generator=None) -> Tensor:
        options = {"generator": generator} if "generator" in given else {}
        x_adv = attack(net, x, y, eps=eps, **options)
        shape = list(getattr(x_adv, "shape", []))
        told = f"the attack {name} gives {type(x_adv).__name__} {shape}, not x' {list(x.shape)}"
        I.require(isinstance(x_adv, Tensor) and x_adv.shape == x.shape, told)
        x_adv = x_adv.detach()
        far = x_adv.min() < -1e-6 or x_adv.max() > 1 + 1e-6 or not x_adv.isfinite().all()
        I.require(not far, f"the attack {name} leaves [0, 1]: clamp its x'")
        moved = (x_adv - x).flatten(1).norm(2 if norm == "l2" else torch.inf, dim=1).max().item()
        told = f"the attack {name} moves an image by {moved:.4g} ({norm}), more than eps {eps:.4g}"
        I.require(norm == "none" or moved <= eps + 1e-5, f"{told}: project, or set its norm")
        return x_adv

    checked.norm = norm
    checked.first = getattr(attack, "first", {})
    return checked


# ==== 4. Rules of radii ===========================================================================


def called_as(given) -> str:
    """The name of what was given, a name or a function or an object of one's own."""
    return given if isinstance(given, str) else getattr(given, "__name__", repr(given))


def radii_of(found: I.Threat, part: str, y: Tensor, told: str) -> Tensor:
    """eps or alpha of a rule's Threat as float [B], without a graph; refused outside [0, 1]."""
    value = getattr(found, part)
    number = isinstance(value, (int, float, Tensor))
    I.require(number, f"{told} {part} of type {type(value).__name__}, no number or tensor")
    value = torch.as_tensor(value, device=y.device).detach()
    value = value if value.is_floating_point() else value.float()
    if value.numel() == 1:  # for all images
        value = value.reshape(()).expand(len(y))
    why = f"{part} {list(value.shape)} for {len(y)} images, not [{len(y)}]"
    I.require(value.numel() == len(y), f"{told} {why}")
    low, high = value.min().item(), value.max().item()
    within = 0 <= low <= high <= 1  # NaN is not
    I.require(within, f"{told} {part} from {low:.4g} to {high:.4g}, outside [0, 1]")
    return value.flatten()


def checked_rule(name, rule: Callable) -> Callable:
    """A rule of radii of anyone's own (asa: a name or the function): refused if it gives no Threat
    whose eps and alpha are [B], or a number for all, in [0, 1].
    """
    called = called_as(name)
    needs = getattr(rule, "needs", ("t",))
    given = dict.fromkeys(["threat", "lam", "steps_lo", "generator"])
    given.update({part: None for part in needs if part != "t"})
    if "teacher" in needs:
        given["x"] = None
    why = fits(rule, None, None, **given)
    contract = "a rule is rule(t, y, *, threat, lam, steps_lo, generator, ...) -> Threat"
    I.require(not why, f"the rule of radii {called}: {why}; {contract}")

    def checked(t, y: Tensor, **asked) -> I.Threat:
        found = rule(t, y, **asked)
        told = f"the rule of radii {called} gives"
        I.require(isinstance(found, I.Threat), f"{told} {type(found).__name__}, no Threat")
        radii = {part: radii_of(found, part, y, told) for part in ("eps", "alpha")}
        most = asked["threat"].steps
        steps = torch.as_tensor(found.steps)
        I.require(not steps.is_floating_point(), f"{told} steps that are no whole numbers")
        scheduled = isinstance(found.steps, Tensor) or asked["steps_lo"] in (0, most)
        I.require(scheduled, f"the rule of radii {called} makes no use of steps_lo: leave it at 0")
        return replace(found, counts=None, **radii)  # they follow from steps

    checked.needs = needs
    return checked


def check_bound(name, bound: Callable) -> None:
    """A bound of anyone's own (mim: a name or the function): refused if it gives no finite number
    of the scores that can be climbed.
    """
    told = f"the bound {called_as(name)}"
    why = fits(bound, None)
    I.require(not why, f"{told}: {why}; a bound is bound(scores [B,B]) -> a number")
    scores = torch.linspace(-1, 1, 16).view(4, 4).requires_grad_()
    with torch.enable_grad():
        value = bound(scores.clone())
    kind = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    I.require(kind == [], f"{told} gives {kind}, not a scalar tensor, of shape []")
    I.require(value.isfinite(), f"{told} gives {value.item()} for scores of -1 to 1")
    I.require(value.requires_grad, f"{told} gives a number without a graph: nothing is learned")


def is_own(given) -> bool:
    """Whether a rule or bound is anyone's own: module:name, or the function itself."""
    return ":" in given if isinstance(given, str) else given is not None


def check_attention(bound: Callable | None, w_att: float) -> None:
    """One line, if the information of attention maps is asked for by a bound of critics."""
    told = "this bound has critics of its own, which attention maps have not: leave w_att at 0"
    I.require(not (w_att and hasattr(bound, "critic")), told)


def check_numbers(info: I.InfoARD, dim: int, weights: tuple) -> None:
    """One line for numbers of InfoARD that make no sense."""
    lam = info.lam
    pair = isinstance(lam, tuple | list) and len(lam) == 2 and all(f >= 0 for f in lam)
    told = f"lam={lam}: write two factors of eps, the weakest and the strongest, as in (1, 1.5)"
    I.require(pair, told)
    I.require(0 < info.tau < math.inf, f"tau={info.tau}: the temperature must be positive")
    I.require(dim >= 1, f"dim={dim}: critics need a dimension of 1 or more")
    usable = all(0 <= w < math.inf for w in weights)
    I.require(usable, f"w_feat, w_att, w_rel = {weights}: weights are finite and not negative")
    check_attention(info.bound, weights[1])


def check_parts(info: I.InfoARD, asa, mim, dim: int, weights: tuple) -> None:
    """Checks the numbers, a rule of radii and a bound of anyone's own, the rule in each call."""
    check_numbers(info, dim, weights)
    if is_own(asa):
        info.rule = checked_rule(asa, info.rule)
    if is_own(mim):
        check_bound(mim, info.bound)
