"""Around finished runs and around the step: tables, pictures, export, speed.

    python infoard.py tables DIR      the seeds of all runs below a folder, as Markdown and LaTeX
    python infoard.py compare DIR     what each of them gains on the plain one, with intervals
    python infoard.py attention DIR   where they look, clean and attacked, beside their teachers
    python infoard.py figures DIR     a finished run as PNG and PDF
    python infoard.py export CKPT     plain weights, safetensors, ONNX
    python infoard.py bench           what a training step costs, beside one of the ordinary kind
    python infoard.py effects         the same without what makes it fast
    python infoard.py growth          the same at other batch sizes and attack steps, or many ranks
    python infoard.py curve DIR       what accuracy costs what time

    1  tables    2  pictures    3  export    4  speed

infoard.py does without this file; it is here that its results are shown and its cost is measured.
"""
import contextlib
import copy
import json
import math
import platform
import re
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

import infoard as I

# ==== 1. Tables ===================================================================================
def spread(values: list[float | None]) -> str:
    """The mean and, of more than one value, the standard deviation."""
    text = f"{np.mean(values):.2f}" if values and None not in values else "-"
    return text + (f" ± {np.std(values, ddof=1):.2f}" if text != "-" and values[1:] else "")

def comparable(a: dict, b: dict) -> bool:
    """Whether two results are of as many images, the same radii, kind of checkpoint and source."""
    def how(r):
        made = r.get("settings", {})
        return [r["n"], Path(r.get("checkpoint", "")).name,
                *(made.get(k) for k in ("eps", "eps_l2", "teacher_nat"))]
    return how(a) == how(b)

def paired(results: dict, which: str, to: str) -> dict[str, dict]:
    """{cell: {seed: {metric: difference to the cell of that name beside it}}}, and n, of results
    that are comparable; `worst` if both are the worst of the same attacks."""
    cells, inside = {}, {*I.ATTACKS, "apgd", "aa"} - set(I.OUTSIDE)
    for cell, runs in results.items():
        base = results.get(re.sub(r"[^/]+$", to, cell), {})
        for seed, r in runs.items():
            a, b = base.get(seed, {}).get(which), r.get(which)
            if a and b and runs is not base and comparable(a, b):
                known = [{k for k in I.METRICS if one.get(k) is not None} for one in (a, b)]
                differ = (known[0] ^ known[1]) & inside
                cells.setdefault(cell, {})[seed] = dict(n=b["n"]) | {
                    k: b[k] - a[k] for k in known[0] & known[1]
                    if not (differ and k.startswith("worst"))}
    return cells

def table(cells: dict[str, dict], which: str = "best") -> list[list[str]]:
    """A header and a line for each cell {name: {seed: {which: result of evaluate}}}; gain: of
    `worst` on the cell named plain beside it, paired by seed. Empty columns are left out."""
    rows, columns = {}, (*I.METRICS, "gain", "n", "seeds")
    found = paired(cells, which, "plain")
    cells = {k: {s: r[which] for s, r in runs.items() if which in r} for k, runs in cells.items()}
    for name, runs in ((k, runs) for k, runs in cells.items() if runs):
        gains = [d["worst"] for d in found.get(name, {}).values() if "worst" in d]
        rows[name] = {m: spread([r.get(m) for r in runs.values()]) for m in I.METRICS} | dict(
            gain=spread(gains), n="/".join(sorted({str(r["n"]) for r in runs.values()})),
            seeds=str(len(runs)))
    used = [c for c in columns if any(row[c] not in ("-", "1") for row in rows.values())]
    return [[f"{which} (%)", *used], *([name, *map(row.get, used)] for name, row in rows.items())]

def markdown(lines: list[list[str]]) -> str:
    """A table as Markdown, in aligned columns."""
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * w for w in width], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, width)) + " |" for line in lines)

def latex(lines: list[list[str]]) -> str:
    """A table as LaTeX, for booktabs."""
    text = " \\\\\n".join(map(" & ".join, lines)).replace("\n", "\n\\midrule\n", 1)
    text = re.sub("([%_])", r"\\\1", text).replace("±", r"$\pm$")
    columns = "l" + "r" * (len(lines[0]) - 1)
    return f"\\begin{{tabular}}{{{columns}}} \\toprule\n{text} \\\\\n\\bottomrule \\end{{tabular}}"

def finished(folder: str) -> dict[str, dict[str, Path]]:
    """{cell: {seed: folder of the run}} of all finished runs below a folder, plain ones first."""
    files, cells = Path(folder).rglob("results.json"), {}
    for file in sorted(files, key=lambda f: (f.parts[:-3], f.parts[-3:-2] != ("plain",), f)):
        run = str(file.parent.relative_to(folder))
        cells.setdefault(re.sub(r"/s\d+$", "", run), {})[file.parent.name] = file.parent
    I.require(cells, f"no finished runs (results.json) below {folder}")
    return cells

def read(cells: dict[str, dict[str, Path]]) -> dict:
    """The same cells with each run's results; eval: what `eval --out` has measured there since."""
    def content(run: Path) -> dict:
        found = json.loads((run / "results.json").read_text())
        more = run / "eval.json"
        return found | (dict(eval=json.loads(more.read_text())) if more.exists() else {})
    return {cell: {s: content(run) for s, run in runs.items()} for cell, runs in cells.items()}

def run_tables(folder: str) -> None:
    """Tables over the seeds (folders s0, s1, ...) of the runs below a folder, printed and kept."""
    cells = read(finished(folder))
    made = {which: table(cells, which) for which in ("best", "last", "transfer", "eval")}
    if made["last"][1:] == made["best"][1:]:
        del made["last"]  # the last epoch was the best
    tables = [lines for lines in made.values() if lines[1:]]
    warnings = [f"warning, gradients may be masked: {cell + '/' * seeded + seed * seeded}: {w}"
                for cell, runs in cells.items() for seed, results in runs.items()
                for seeded in [re.fullmatch(r"s\d+", seed) is not None]
                for which in ("best", "eval") for w in results.get(which, {}).get("warnings", ())]
    content = dict(
        md="\n\n".join([*map(markdown, tables), *["\n".join(warnings)] * bool(warnings)]),
        tex="\n\n".join(map(latex, tables)),
        jsonl="\n".join(json.dumps(dict(cell=k, seeds=seeds)) for k, seeds in cells.items()))
    for kind, text in content.items():
        I.save(Path(folder, f"tables.{kind}"), f"{text}\n".encode())
    print(f"{content['md']}\n\nin {folder}: tables.md, tables.tex, tables.jsonl")

T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 1 to 10 degrees of freedom

def difference(values: list[float]) -> tuple[float, float]:
    """The mean of paired differences and half the width of its 95% interval (Student's t, over
    seeds; nan for one)."""
    n = len(values)
    quantile = [math.nan, *T975][n - 1] if n <= 11 else 1.96 + 2.8 / (n - 1)  # to 0.02 above 10
    return float(np.mean(values)), quantile * float(np.std(values, ddof=n > 1)) / math.sqrt(n)

def signed(mean: float, half: float) -> str:
    """A difference with half its interval, if it has one."""
    return f"{mean:+.2f}" + f" ± {half:.2f}" * (half == half)

def pooled(cells: dict[str, dict]) -> dict[str, dict]:
    """Means over n > 1 cells a/b/c, named "a/*/c (n)", for each seed that all of them have."""
    groups, means = {}, {}
    for cell, seeds in cells.items():
        groups.setdefault(re.sub(r"[^/]+/([^/]+)$", r"*/\1", cell), []).append(seeds)
    for name, group in groups.items():
        for seed in group[0] if group[1:] else ():
            rows = [seeds[seed] for seeds in group if seed in seeds]
            if len(rows) == len(group):
                means.setdefault(f"{name} ({len(group)})", {})[seed] = {
                    k: np.mean([r[k] for r in rows]).item() for k in rows[0]
                    if all(k in r for r in rows)}
    return means

def gains(results: dict, which: str, to: str = "plain") -> tuple[dict[str, dict], list[list[str]]]:
    """{cell: {metric: (mean difference to the cell of that name beside it, half an interval)}},
    and the same as a table; "a/*/c (n)" is the mean over n cells a/b/c of each seed."""
    cells = paired(results, which, to)
    cells |= pooled(cells)
    rows = {cell: {k: difference([d[k] for d in seeds.values()]) for k in I.METRICS
                   if all(k in d for d in seeds.values())} for cell, seeds in cells.items()}
    used = [k for k in I.METRICS if any(k in row for row in rows.values())]
    lines = [[cell, *(signed(*row[k]) if k in row else "-" for k in used),
              "/".join(sorted({f"{d['n']:.0f}" for d in cells[cell].values()})),
              str(len(cells[cell]))] for cell, row in rows.items()]
    return rows, [[f"gain of {which} on {to} (points)", *used, "n", "seeds"], *lines]

def run_compare(folder: str) -> None:
    """What each cell below a folder gains on those named plain and uniform beside it: differences
    paired by seed, in points, with 95% intervals over seeds; as tables and a figure."""
    results = read(finished(folder))
    found = {(which, to): gains(results, which, to)
             for to in ("plain", "uniform") for which in ("last", "best", "eval")}
    rows = found["last", "plain"][0]
    I.require(rows, f"no cell below {folder} with a last epoch of a seed that plain has too, seen "
              "by as many images")
    tables = []
    for _, lines in found.values():  # best is not shown where it is the last
        if lines[1:] and lines[1:] not in [shown[1:] for shown in tables]:
            tables.append(lines)
    text = "\n\n".join(map(markdown, tables))
    I.save(Path(folder, "compare.md"), f"{text}\n".encode())
    print(text)
    draw(Path(folder, "figures"), gains=partial(figure_gains, rows=rows))

# ==== 2. Pictures =================================================================================
def sheet(run: I.Run, x: Tensor, y: Tensor, rows: int = 5) -> dict:
    """What figure_sheet shows: the weakest to the strongest image, attacked, with attention."""
    nets = {k: n for k, n in dict(teacher=run.nets["teacher"], student=run.evaluated).items() if n}
    x, y, eps = I.to_float(x, run.device), y.to(run.device), run.cfg.eps
    lead = I.margin(I.predict(next(iter(nets.values())), x).softmax(1), y)
    chosen = lead.argsort()[torch.linspace(0, len(x) - 1, rows).long()]
    x, y, lead = x[chosen], y[chosen], lead[chosen]
    x_adv = I.pgd_ce(run.evaluated, x, y, threat=I.Threat(eps, eps / 4, 20), init="none")
    columns = dict(clean=x, perturbation=(x_adv - x) / (2 * eps or 1) + 0.5, attacked=x_adv)
    if hasattr(run.evaluated, "regenerated"):
        columns |= {f"{k}\nregenerated": run.evaluated.regenerated(columns[k])
                    for k in ("clean", "attacked")}
    columns = {k: v.movedim(1, 3).clamp(0, 1) for k, v in columns.items()}
    for name, net in nets.items():
        taps = I.Taps(net, x)
        I.predict(net, torch.cat([x, x_adv]))
        for f in [f for f in taps.take().values() if f.dim() == 4][-2:][:1]:  # the last but one
            maps = I.attention_map(f).unflatten(1, f.shape[-2:]).chunk(2)
            columns |= {f"{name}\nclean": maps[0], f"{name}\nattacked": maps[1]}
        taps.close()
    labels = [f"{run.data.classes[k]}\nlead {v:+.2f}" for k, v in zip(y, lead, strict=True)]
    return dict(labels=labels, columns={k: v.cpu() for k, v in columns.items()})

def figure_curves(figure, log: list[dict], results: dict) -> None:
    """Over epochs: accuracy (dotted: best), loss and its terms, attacks; accuracy over eps."""
    rows, far = {k: np.array([r[k] for r in log]) for k in log[0]}, results.get("over_eps", {})
    panels = {"validation accuracy (%)": ["val_clean", "val_pgd"],
              "loss and terms (nats)": list(rows)[2:list(rows).index("eps")],
              "radius (1/255), steps": ["eps", "steps"]}
    figure.set_size_inches(9, 1.9)
    *axes, over_eps = figure.subplots(1, len(panels) + 1)
    for ax, (title, keys) in zip(axes, panels.items(), strict=True):
        for k in [k for k in keys if k in rows]:
            ax.plot(rows["epoch"], rows[k] * (255 if k == "eps" else 1), label=k)
        ax.set(xlabel="epoch", ylabel=title)
        _ = ax.lines and ax.legend()
    axes[0].axvline(results["best"]["epoch"], color="0.5", lw=0.8, ls=":")
    over_eps.plot(list(map(int, far)), list(far.values()), "o-", ms=3)
    over_eps.set(xlabel=r"attack radius $\epsilon$ (1/255)", ylabel="PGD-20 accuracy (%)")

def figure_sheet(figure, labels: list[str], columns: dict[str, Tensor]) -> None:
    """The columns of sheet(): pictures below each other, the weakest instance first."""
    figure.set_size_inches(0.95 * len(columns), 1.05 * len(labels))
    axes = figure.subplots(len(labels), len(columns),
                           subplot_kw=dict(xticks=[], yticks=[], frame_on=False))
    for line, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        line[0].set_title(title, fontsize=7)
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture, cmap="magma")
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, fontsize=6)

def figure_curve(figure, rows: list[tuple]) -> None:
    """Accuracy, its mean and standard deviation over seeds, against the time of a step."""
    figure.set_size_inches(6.5, 2.4)
    for i, (ax, what) in enumerate(zip(figure.subplots(1, 2), ("clean", "worst"), strict=True)):
        for ms, name, *values in rows:
            mean, half = np.mean(values[i]), np.std(values[i], ddof=1) if values[i][1:] else 0
            ax.errorbar(ms, mean, half, fmt="o", ms=3, color="C0")
            ax.annotate(name, (ms, mean), xytext=(2, 2), rotation=50,
                        textcoords="offset points", fontsize=6)
        ax.set(xlabel="ms per step", ylabel=f"{what} accuracy (%)")

def figure_gains(figure, rows: dict[str, dict[str, tuple[float, float]]]) -> None:
    """What each cell gains on plain, with 95% intervals over seeds."""
    figure.set_size_inches(6.5, 0.6 + 0.19 * len(rows))
    places = -np.arange(len(rows))
    for ax, what in zip(figure.subplots(1, 2, sharey=True), ("worst", "clean"), strict=True):
        mean, half = np.array([row.get(what, (math.nan, 0)) for row in rows.values()]).T
        ax.errorbar(mean, places, xerr=half, fmt="o", ms=3, lw=1, color="C0")
        ax.axvline(0, color="0.3", lw=0.8)
        ax.set(yticks=places, yticklabels=rows, ylim=(places[-1] - 0.6, 0.6),
               xlabel=f"gain in {what} accuracy (points)")

STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 200, "pdf.fonttype": 42}

def draw(folder: Path, **fill: Callable) -> None:
    """fill[name](figure) as name.png and name.pdf in the folder."""
    if I.world()[0]:
        return
    import matplotlib.figure
    folder.mkdir(exist_ok=True)
    for name in fill:
        with matplotlib.rc_context(STYLE):
            fill[name](figure := matplotlib.figure.Figure(layout="constrained"))
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.pdf")
    print(f"in {folder}: {', '.join(fill)}, as png and pdf")

def run_figures(folder: str | Path) -> None:
    """Draw a finished run as PNG and PDF, from its log, results and sheet alone."""
    out = Path(folder)
    I.require((out / "results.json").exists(), f"{out} holds no finished run (no results.json)")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    fill = dict(curves=partial(figure_curves, log=log, results=results))
    if (out / "sheet.pt").exists():
        fill["sheet"] = partial(figure_sheet, **I.load_tensors(out / "sheet.pt"))
    draw(out / "figures", **fill)

def illustrate(run: I.Run, results: dict) -> None:
    """Adds accuracy over eps and the sheet to a run that is done, and draws them."""
    if not run.cfg.figures:
        return
    out = Path(run.cfg.out)
    few = I.test_images(run.data, min(256, results["best"]["n"]), run.device)
    attack = I.repeatable(I.ATTACKS["pgd_sat"], run.device)
    results["over_eps"] = {str(n): I.percent(I.correct(run.evaluated, *few, partial(
        attack, eps=n / 255))) for n in (0, 2, 4, 8, 12, 16, 24, 32, 64)}
    I.save(out / "results.json", results)
    I.save(out / "sheet.pt", sheet(run, *few))
    if run.rank == 0:
        run_figures(out)

def alike(net: nn.Module, teacher: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    """Cosines [N] of centred attention maps, their mean over the stages that InfoARD compares."""
    info = I.InfoARD(net, teacher, image_shape=x.shape[1:], mim="infonce")
    stages = [pair for pair in info.pairs if pair[0] != "penultimate"]
    seen = {}
    for name, who, taps, images in (
            ("S(x)", net, info.student_taps, x), ("S(x')", net, info.student_taps, x_adv),
            ("T(x)", teacher, info.teacher_taps, x), ("T(x')", teacher, info.teacher_taps, x_adv)):
        I.predict(who, images)
        maps = taps.take()
        seen[name] = [maps[pair[name[0] == "T"]] for pair in stages]
    info.student_taps.close(), info.teacher_taps.close()
    def cosines(a, b, shift=0):
        scores = [I.attention_scores(s, t.roll(shift, 0), 1.0).diag()
                  for s, t in zip(seen[a], seen[b], strict=True)]
        return torch.stack(scores).mean(0)
    pairs = [("S(x)", "S(x')"), ("S(x)", "T(x)"), ("S(x')", "T(x)"), ("S(x')", "T(x')")]
    return {f"{a}, {b}": cosines(a, b) for a, b in pairs} | {
        "S(x), T(another)": cosines("S(x)", "T(x)", 1)}

def run_attention(folder: str, **given) -> None:
    """How alike attention maps are, clean and under PGD-20 on the student, of student and teacher,
    for each run below a folder; --teacher: in the place of the one that a run names."""
    cells, lines = finished(folder), []
    for cell, runs in cells.items():
        found = []
        for run in runs.values():
            made = json.loads((run / "config.json").read_text())["settings"]
            names = "teacher", "teacher_arch", "teacher_norm"
            path, found_in = str(run / "best.pt"), {k: made[k] for k in names} | given
            cfg = I.Config(**I.settings(path, found_in))
            I.require(cfg.teacher, f"{run} names no teacher: add --teacher")
            device = I.pick_device(cfg.device)
            data = I.load_dataset(cfg.dataset, cfg.data_dir, image_size=cfg.image_size)
            same = dict(num_classes=len(data.classes), size=data.x_test.shape[-1], device=device)
            net = I.load_teacher(path, **same)
            teacher = I.load_teacher(cfg.teacher, cfg.teacher_arch, norm=cfg.teacher_norm,
                                     dataset=cfg.dataset, **same)
            x, y = I.test_images(data, cfg.eval_subset, device)
            attack, parts = I.repeatable(I.ATTACKS["pgd_sat"], device, eps=cfg.eps), []
            for x_b, y_b in zip(x.split(256), y.split(256), strict=True):
                x_b = I.to_float(x_b, device)
                with I.frozen_eval(net):
                    x_adv = attack(net, x_b, y_b.to(device))
                parts.append(alike(net, teacher, x_b, x_adv))
            found.append({k: torch.cat([p[k] for p in parts]).mean().item() for k in parts[0]})
        lines.append([cell, *(spread([f[k] for f in found]) for k in found[0]), str(len(found))])
    text = markdown([["cosine", *found[0], "seeds"], *lines])
    I.save(Path(folder, "attention.md"), f"{text}\n".encode())
    print(text)

# ==== 3. Export ===================================================================================
def run_export(path: str) -> None:
    """Write plain weights, and safetensors and ONNX where installed; without critics."""
    net = I.load_teacher(path).to(memory_format=torch.contiguous_format)
    stem, size = Path(path).with_suffix(""), I.load_tensors(path).get("size", 32)
    I.save(Path(f"{stem}.weights.pt"), net.state_dict())
    print(f"{stem}.weights.pt: {sum(p.numel() for p in net.parameters()):,} parameters")
    with contextlib.suppress(ImportError):
        from safetensors.torch import save_model
        save_model(net, f"{stem}.safetensors")
        torch.onnx.export(net, (torch.zeros(1, 3, size, size),), f"{stem}.onnx", dynamo=False,
                          input_names=["x"], output_names=["logits"], dynamic_axes=dict(x={0: "B"}))
        print(f"{stem}.safetensors, {stem}.onnx: x [1, 3, {size}, {size}] in [0,1] -> logits")

# ==== 4. Speed ====================================================================================
@contextlib.contextmanager
def ordinary(nchw: bool = True, unfrozen: bool = True) -> Iterator[None]:
    """Inside, a step is made as most released code makes it: in NCHW, and with weights that ask for
    gradients while the attack runs. With --amp off it is at least as fast as theirs: images are
    augmented at once, gradients are the input's alone, and the teacher is asked once."""
    @contextlib.contextmanager
    def eval_alone(*models):
        nets = [(m, m.training) for net in models if isinstance(net, nn.Module)
                for m in net.modules()]
        for m, _ in nets:
            m.training = False
        yield
        for m, mode in nets:
            m.training = mode
    def contiguous(x, device):
        return x.to(device).contiguous().float() / 255
    swap = dict(frozen_eval=eval_alone) if unfrozen else {}
    with mock.patch.multiple(I, **swap | (dict(to_float=contiguous) if nchw else {})):
        yield

class Counter(TorchDispatchMode):
    """Counts, by torch's own formulas, the operations of convolutions and matrix products (flops: a
    multiplication and an addition are two), and at each one the bytes that new tensors hold (peak).
    Torch's FlopCounterMode does not bear autograd.grad with respect to an input, and its formula
    for convolutions backward forgets groups: each of the gradients costs what the pass did."""
    def __init__(self):
        super().__init__()
        self.flops, self.peak, self.live, self.known = 0, 0, 0, set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            grad, x, w, *_, transposed, _, _, mask = args
            self.flops += conv_flop_count(x.shape, w.shape, grad.shape, transposed) * sum(mask[:2])
        elif formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        old = {t.untyped_storage()._cdata for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known | old:  # no view, nothing in place
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out
    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

class Bench:
    """Training steps of one kind, on random images and with nets of their own."""
    def __init__(self, cfg: I.Config, teacher: nn.Module, data: I.Data, device: torch.device,
                 around: Callable = contextlib.nullcontext, nchw: bool = False):
        self.cfg, self.around, self.device, self.seconds = cfg, around, device, []
        memory = torch.contiguous_format if nchw else torch.channels_last
        nets = dict(teacher=copy.deepcopy(teacher).to(device, memory_format=memory))
        if cfg.framework in I.NEED_NATURAL:
            nets["teacher_nat"] = nets["teacher"]
        self.run = I.Run(cfg, data, device, nets)
        self.run.student.to(memory_format=memory)
    def step(self) -> float:
        """Seconds of one whole step: images, attack, losses, gradients, optimiser."""
        self.run.at["position"] = 0
        with self.around():
            self.wait()
            began = time.perf_counter()
            self.run.step()
            self.wait()
            return time.perf_counter() - began
    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
    def count(self) -> dict:
        """Operations of a step, and MiB that it holds at most beyond what stays: of tensors on a
        CPU (its libraries take more for themselves), of the allocator on a GPU."""
        compiled, self.run.forward = self.run.forward, self.run.student
        with Counter() as counter:
            self.step()
        self.run.forward, held = compiled, counter.peak
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step()
            held = torch.cuda.max_memory_allocated(self.device) - before
        return dict(flops=counter.flops, mib=held / 2 ** 20)

def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product or 3x3 convolution, whichever is faster (fp32
    products are slow in some libraries): what the hardware gives at best."""
    n, images = (8192, 512) if device.type == "cuda" else (2048, 64)
    a, x, w = (torch.randn(shape, device=device).to(dtype)
               for shape in ((n, n), (images, 128, 16, 16), (128, 128, 3, 3)))
    x, w, best = *(v.to(memory_format=torch.channels_last) for v in (x, w)), 0.0
    for product in [lambda: a @ a, lambda: F.conv2d(x, w, padding=1)] * 7:
        with Counter() as counter:
            product()
        began = time.perf_counter()
        product()[0, 0].flatten()[0].item()
        best = max(best, counter.flops / (time.perf_counter() - began))
    return best

def machine(device: torch.device) -> str:
    """Its name, and the threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):
        name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
        return f"{name}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"

def kinds(cfg: I.Config) -> dict[str, tuple]:
    """{name: (settings, how the step is made)} of what bench times."""
    info, plain = replace(cfg, infoard=True, steps_lo=0), replace(cfg, infoard=False, steps_lo=0)
    return dict(ordinary=(replace(plain, amp="off", compile=False), ordinary, True),
                plain=(plain,), infoard=(info,),
                schedule=(replace(info, steps_lo=cfg.steps_lo or 1),))

def without(cfg: I.Config) -> dict[str, tuple]:
    """The same of what effects times: plain with one thing taken away, or compiled."""
    plain = replace(cfg, infoard=False, steps_lo=0)
    return dict(ordinary=(replace(plain, amp="off", compile=False), ordinary, True), plain=(plain,),
                fp32=(replace(plain, amp="off"),), unfrozen=(plain, partial(ordinary, nchw=False)),
                nchw=(plain, partial(ordinary, unfrozen=False), True),
                compiled=(replace(plain, compile=True),))

def sizes(cfg: I.Config) -> dict[str, tuple]:
    """The same of what growth times."""
    cfg, b, k = replace(cfg, steps_lo=0), cfg.batch_size, cfg.steps
    batches = sorted({max(2, b // 4), max(2, b // 2), b, 2 * b})
    steps = sorted({1, k // 2, k, 2 * k})
    return {f"batch {n}": (replace(cfg, batch_size=n),) for n in batches} \
        | {f"{n} steps": (replace(cfg, steps=n),) for n in steps if n}

def costs(rows: dict[str, dict]) -> str:
    """What bench and growth have found, as a Markdown table."""
    columns = [("ms", "ms", "{:.0f}"), ("images_per_s", "images/s", "{:.1f}"),
               ("share", "share of peak", "{:.0%}"), ("mib", "MiB", "{:.0f}"),
               ("faster", "times faster than ordinary", "{:.2f}"),
               ("cost", "time / plain", "{:.2f}"), ("memory", "memory / plain", "{:.2f}")]
    columns = [c for c in columns if all(c[0] in r for r in rows.values())]
    return markdown([["step", *(title for _, title, _ in columns)]] + [
        [name, *(form.format(r[k]) for k, _, form in columns)] for name, r in rows.items()])

def run_bench(*, rounds: int = 5, kinds: Callable = kinds, **given) -> None:
    """Time training steps: ordinary (fp32, as most released code is written), plain, with InfoARD,
    and with its step schedule; --framework: a list with commas, default: all that InfoARD lifts."""
    lifted = [k for k in I.FRAMEWORKS if I.PRESETS.get(k, {}).get("infoard", True)]
    names = given.pop("framework", ",".join(lifted)).split(",")
    device = I.pick_device(given.get("device", "auto"))
    small = dict(batch_size=32) if device.type == "cpu" else {}
    start = I.Config(**dict(dataset="cifar10", out="runs/bench") | small | given)
    size, g = start.image_size or 32, torch.Generator().manual_seed(0)
    n = 2 * start.batch_size + 2
    x = torch.randint(0, 256, (n, size, size, 3), generator=g, dtype=torch.uint8)
    x = x.permute(0, 3, 1, 2)  # [N,3,H,W], channels last as everywhere
    data = I.Data(x, torch.arange(n) % 10, x[:2], torch.arange(2), list("0123456789"))
    rows, dtypes, ranks = {}, {}, I.world()[1]
    for name in names:
        cfg = replace(start, framework=name, val_size=0).resolved()
        teacher = I.build_model(cfg.teacher_arch, size=size).eval().requires_grad_(False)
        steps = {kind: Bench(c, teacher, data, device, *around)
                 for kind, (c, *around) in kinds(cfg).items()}
        for b in steps.values():
            b.step()
        found = {kind: b.count() for kind, b in steps.items()}
        for _ in range(rounds):  # in turn, so that a machine that slows down slows all
            for b in steps.values():
                b.seconds.append(b.step())
        for kind, b in steps.items():
            dtype = I.amp_dtype(b.cfg.amp, device) or torch.float32
            if dtype not in dtypes:
                dtypes[dtype] = peak(device, dtype)
            t = {k: statistics.median(s.seconds) / s.cfg.batch_size for k, s in steps.items()}
            ms = 1000 * statistics.median(b.seconds)
            rows[f"{name}/{kind}"] = found[kind] | dict(
                ms=ms, images_per_s=1 / t[kind], seconds=b.seconds,
                share=1000 * found[kind]["flops"] / ms / dtypes[dtype])
            if "plain" in steps:
                rows[f"{name}/{kind}"] |= dict(
                    faster=t["ordinary"] / t[kind], cost=t[kind] / t["plain"],
                    memory=found[kind]["mib"] / found["plain"]["mib"])
            print(f"{name}/{kind}: {ms:.0f} ms", flush=True)
    about = dict(machine=machine(device), torch=torch.__version__, ranks=ranks,
                 student=cfg.student, teacher=cfg.teacher_arch, batch_size=start.batch_size,
                 steps=cfg.steps, rounds=rounds, compiled=start.compile,
                 peak={str(k): f"{v / 1e12:.2f} TFLOP/s" for k, v in dtypes.items()})
    I.save(Path(start.out, "bench.json"), dict(about=about, rows=rows))
    print("", *(f"{k}: {v}" for k, v in about.items()), "", costs(rows), sep="\n")
    print(f"\nin {start.out}: bench.json")

def run_effects(**given) -> None:
    """Time plain steps of --framework without bf16, without frozen weights in the attack, without
    channels_last, and with --compile."""
    run_bench(kinds=without, **dict(framework="rslad") | given)

def run_growth(**given) -> None:
    """Time steps of --framework (InfoARD in it, if wanted) at other batch sizes and attack steps;
    under torchrun: of all ranks together."""
    run_bench(kinds=sizes, **dict(framework="rslad") | given)

def run_curve(folder: str) -> None:
    """What accuracy costs what time: for each cell below a folder the results of its seeds
    (s0, s1, ...) beside a step's time (bench.json), as a table and a figure."""
    rows = []
    for file in Path(folder).glob("*/bench.json"):
        runs, configs = ([json.loads(f.read_text()) for f in sorted(file.parent.glob(f"s*/{name}"))]
                         for name in ("results.json", "config.json"))
        I.require(runs and configs, f"no finished run (s0, s1, ...) beside {file}")
        made = configs[0]["settings"]
        lifted = "schedule" if made["steps_lo"] else "infoard"
        kind = lifted if made["infoard"] else "plain"
        ms = json.loads(file.read_text())["rows"][f"{made['framework']}/{kind}"]["ms"]
        rows.append((ms, file.parent.name,
                     *([r["best"][k] for r in runs] for k in ("clean", "worst"))))
    I.require(rows, f"no cells with runs and bench.json in {folder}")
    rows.sort()
    lines = [[name, f"{ms:.0f}", spread(clean), spread(worst), str(len(clean))]
             for ms, name, clean, worst in rows]
    text = markdown([["cell", "ms", "clean (%)", "worst (%)", "seeds"], *lines])
    I.save(Path(folder, "curve.md"), f"{text}\n".encode())
    print(text)
    draw(Path(folder, "figures"), curve=partial(figure_curve, rows=rows))

# ==== Entries in the tables of infoard.py =========================================================
I.VERBS |= dict(tables=run_tables, compare=run_compare, attention=run_attention,
                figures=run_figures, export=run_export, bench=run_bench, effects=run_effects,
                growth=run_growth, curve=run_curve)
I.AT_END.append(illustrate)
