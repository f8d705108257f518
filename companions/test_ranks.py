"""What holds for many processes: two ranks do what one does, and no death of one costs a run.

Functions of this file are run in two processes, by torchrun where one is to die; what they find
they leave in files.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import infoard as I
from companions import locks, ranks
from companions.test_extra import content
from test_infoard import BASE, FEW, SMALL, evaluate, near

CPU = torch.device("cpu")
# Settings of steps that N processes must make as one does.
SHARED = {
    "saad": {"framework": "saad", "infoard": False, "beta": 0.5},
    "rslad": {"infoard": False},
    "kd": {"asa": "uniform", "w_rel": 1.0},
    "dv": {"asa": "off", "mim": "dv"},
    "vid": {"asa": "off", "mim": "vid", "w_att": 0.0},
    "mtard": {"framework": "mtard", "infoard": False},
    "bmtard": {"framework": "bmtard", "infoard": False},
    "absld": {"framework": "absld", "infoard": False},
    "adr": {"framework": "adr", "infoard": False},
    "idbh": {"augment": "idbh", "infoard": False},
}
each = pytest.mark.parametrize


# ==== 1. What the processes do ====================================================================


def without_norm(classes: int = 10, size: int = 32) -> nn.Module:
    """A net whose samples do not see each other."""
    layers = {
        "relu": nn.ReLU(),
        "layer1": nn.Sequential(I.conv(8, 16, 3, 2), nn.ReLU()),
        "layer2": nn.Sequential(I.conv(16, 32, 3, 2), nn.ReLU()),
    }
    return I.in_a_row(size, I.conv(3, 8), layers, nn.Linear(32, classes))


def first_steps(run: I.Run, n: int) -> None:
    """The first n steps of a training, this rank's share of them."""
    order = run.train[torch.randperm(len(run.train), generator=run.generators["data"])]
    for i in range(0, n * run.cfg.batch_size, run.cfg.batch_size):
        batch = order[i : i + run.cfg.batch_size]
        share = i / len(run.train) / run.cfg.epochs
        I.train_step(run, batch[run.rank :: run.ranks], share)


def steps_of_each(found: dict) -> None:
    """Three steps of each of SHARED: adds what is learned, and the means of the log."""
    for name, options in SHARED.items():
        given = {**BASE, "student": "without_norm", "step_size": 2 / 255, **options}
        cfg = I.Config(**given).resolved()  # longer steps overturn signs that rounding decides
        torch.manual_seed(7)
        net = without_norm().requires_grad_(False).eval()
        run = I.Run(cfg, SMALL, CPU, {"teacher": net, "teacher_nat": net})
        first_steps(run, 3)
        learned = [*run.student.parameters(), *run.parts["critics"].parameters()]
        run.at.memory.pop("first", None)  # MTARD's unit: a sum over ranks, whose number cancels
        learned += run.at.memory.values()
        found[name] = torch.cat([p.detach().flatten() for p in learned])
        sums = [I.all_reduce_sum(value) for value in run.at.sums.values()]
        found[f"{name} means"] = torch.stack(sums) / (3 * cfg.batch_size)


def evaluation_of(teacher: str, found: dict, patch: pytest.MonkeyPatch) -> None:
    """An evaluation: adds its numbers, and how many images this rank has attacked."""
    seen = []
    real = I.ATTACKS["fgsm"]

    def fgsm(net, x, y, **options):
        seen.append(len(x))
        return real(net, x, y, **options)

    patch.setitem(I.ATTACKS, "fgsm", fgsm)
    attacks = "clean,fgsm,pgd,apgd,spatial"
    result = evaluate(I.load_teacher(teacher), 30, attacks=attacks, batch_size=8, eps=2 / 255)
    found["attacked"] = torch.tensor([sum(seen)])
    columns = [*I.METRICS, "spatial", "n"]
    found["evaluation"] = torch.tensor([result[name] or 0.0 for name in columns])


def train_small(**options) -> None:
    """I.train on few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(I, "render_shapes", lambda: SMALL)
        I.train(resume=True, **options)


def two_runs(top: str, teacher: str, patch: pytest.MonkeyPatch) -> None:
    """A whole run, and one that rank 1 alone is told to stop in its third step, begun twice."""
    rank = I.world()[0]
    real_finish = I.finish
    real_step = I.train_step

    def finish(run, out):
        torch.save(run.evaluated.state_dict(), f"{top}/net{rank}.pt")
        return real_finish(run, out)

    def step_and_stop(run, rows, share):
        real_step(run, rows, share)
        if rank == 1 and run.at.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {**BASE, "val_size": 39, "batch_size": 30, "teacher": teacher, "eval_batch": 10}
    options.update(swa=1, extra=f"{top}/extra.npz", extra_share=0.3)
    patch.setattr(I, "finish", finish)
    train_small(**options, out=f"{top}/whole")
    patch.setattr(I, "train_step", step_and_stop)
    try:
        train_small(**options, out=f"{top}/broken")
    except SystemExit as stopped:
        assert stopped.code == 128 + signal.SIGTERM
        Path(f"{top}/stopped{rank}").write_text("at the log point after it")
    train_small(**options, out=f"{top}/broken")


def work_of_a_rank(top: str, teacher: str) -> None:
    """A few steps in each of SHARED, an evaluation and, of many ranks, whole runs."""
    torch.set_num_threads(1)
    joined = contextlib.nullcontext()
    if "LOCAL_RANK" in os.environ:
        joined = ranks.all_ranks("cpu")
    with joined, pytest.MonkeyPatch.context() as patch:
        rank, n = I.world()
        patch.setitem(I.MODELS, "without_norm", without_norm)
        found = {"world": torch.tensor([rank, n])}
        real = I.Step.attack

        def from_x(step, objective, init=""):
            """Starts are drawn by each rank for itself: none here."""
            real(step, objective, "none")

        with patch.context() as inner:
            inner.setattr(I.Step, "attack", from_x)
            steps_of_each(found)
        evaluation_of(teacher, found, patch)
        torch.save(found, f"{top}/{n}-{rank}.pt")
        if n > 1:
            two_runs(top, teacher, patch)


DYING = """
import os, signal, sys
import infoard as I

data = I.render_shapes(400, 100)
real = I.train_step


def step(run, rows, share):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and run.rank == 1 and run.at.epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    real(run, rows, share)


I.train_step = step
I.render_shapes = lambda: data
code = I.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)  # as infoard.py ends under torchrun
"""


def torchrun(code: str, *words: str) -> subprocess.CompletedProcess:
    """Two processes that run Python code with these words; they are begun once more if one dies."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--no-python", sys.executable, "-c", code, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def begin_rank(rank: int, top: str, teacher: str, told: dict) -> None:
    """What a process of two_ranks does: it is told its rank, and prints to a file."""
    os.environ.update(told, RANK=str(rank), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    sys.stdout = sys.stderr = open(f"{top}/printed{rank}", "w", buffering=1)
    try:
        work_of_a_rank(top, teacher)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # as infoard.py ends under torchrun


def two_ranks(top: Path, teacher: str) -> str:
    """work_of_a_rank in two forks of this process, which have torch at hand; what rank 0 prints."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in (0, 1):
        process = context.Process(target=begin_rank, args=(rank, str(top), teacher, told))
        process.start()
        processes.append(process)
    until = time.monotonic() + 300
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        if any(process.exitcode for process in processes):
            break  # the other one would wait for it
        time.sleep(0.05)
    for process in processes:
        process.kill()  # if it has not ended
        process.join()
    printed = [(top / f"printed{rank}").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in processes] == [0, 0], printed[0] + printed[1]
    return printed[0]


# ==== 2. What holds for them ======================================================================


@pytest.fixture(scope="session")
def work(lab, tmp_path_factory):
    """The folder of what two processes and one have found, and what rank 0 has printed."""
    top = tmp_path_factory.mktemp("ranks")
    np.savez(top / "extra.npz", **content())
    printed = two_ranks(top, lab.teacher)
    threads = torch.get_num_threads()
    work_of_a_rank(str(top), lab.teacher)
    torch.set_num_threads(threads)
    return top, printed


def test_two_ranks_do_what_one_process_does(work):
    top, _ = work
    one, first, second = (torch.load(top / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert one.pop("world").tolist() == [0, 1]
    assert first.pop("world").tolist() == [0, 2] and second.pop("world").tolist() == [1, 2]
    shares = [first.pop("attacked"), second.pop("attacked")]
    assert sum(shares).equal(one.pop("attacked")) and min(shares) > 0
    assert first.keys() == one.keys() and len(first) == 2 * len(SHARED) + 1
    for name in first:
        assert first[name].equal(second[name]), name
        near(first[name], one[name], 1e-5)  # float32: the same sums in another order
    assert first["evaluation"].equal(one["evaluation"]) and first["evaluation"][-1] == 30


def test_ranks_stop_together_and_go_on_as_if_they_had_not(work):
    top, _ = work
    assert sorted(file.name for file in top.glob("stopped*")) == ["stopped0", "stopped1"]
    logs = []
    for name in ("whole", "broken"):
        lines = (top / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert logs[0][0]["steps"] == 1.0  # of 361 images 360 are seen, and divided by
    for row, other_row in zip(*logs, strict=True):  # what ranks had summed up is now rank 0's
        names = [name for name in row if name not in ("images_per_s", "seconds")]
        assert list(row) == list(other_row)
        values = torch.tensor([row[name] for name in names])
        near(values, torch.tensor([other_row[name] for name in names]), 1e-6)

    whole, other = (I.load_tensors(top / name / "last.pt") for name in ("whole", "broken"))
    for part in ("model", "critics", "ema"):
        assert all(value.equal(other[part][name]) for name, value in whole[part].items())
    starts = whole["generators"]["attack"]
    assert starts.equal(other["generators"]["attack"])
    assert len(starts) == 2 and not starts[0].equal(starts[1])


def test_ranks_end_with_the_same_net_and_its_results(work):
    top, printed = work
    first, second = (torch.load(top / f"net{rank}.pt") for rank in (0, 1))
    assert all(value.equal(second[name]) for name, value in first.items())  # buffers, too
    results = json.loads((top / "whole/results.json").read_text())["last"]
    net = I.load_teacher(f"{top}/whole/last.pt")
    x, y = I.test_images(SMALL, 40, CPU)
    again = I.evaluate(net, x, y, attacks="clean,fgsm", batch_size=10)
    assert results["clean"] == again["clean"] and results["fgsm"] == again["fgsm"]
    assert printed.count("2 x cpu") == 3  # of whole, broken and broken again, by rank 0 alone


def test_death_of_a_rank_is_one_line_and_costs_an_epoch_at_most(lab, tmp_path):
    """The command line, whose rank 1 is killed in its second epoch, the first time."""
    options = {**BASE, **FEW, "teacher": lab.teacher, "out": str(tmp_path / "died")}
    words = ["--resume", "--framework", "rslad"]
    for name, value in options.items():
        if value is False:
            words.append(I.flag_of(f"no_{name}"))
        else:
            words += [I.flag_of(name), str(value)]
    done = torchrun(DYING, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if "infoard: error" in line]
    assert len(told) == 1 and "rank 0" in told[0] and "with --resume" in told[0]
    assert "from epoch 2" in done.stdout and (tmp_path / "died/results.json").exists()


def test_resume_with_more_ranks_keeps_the_common_draws(tmp_path):
    cfg = I.Config(**BASE, framework="natural").resolved()
    run = I.Run(cfg, SMALL, CPU, {"teacher": None})
    first_steps(run, 1)
    run.at.position = 64
    I.save(tmp_path / "last.pt", run.state())

    other = I.Run(cfg, SMALL, CPU, {"teacher": None})
    other.rank = 1  # one more than there were
    fresh = other.generators["attack"].get_state()
    other.load(tmp_path / "last.pt")
    assert other.generators["data"].get_state().equal(run.generators["data"].get_state())
    assert other.generators["attack"].get_state().equal(fresh)
    assert other.at.position == 64
    assert run.at.sums["loss"] and not other.at.sums["loss"]


# ==== 3. Mistakes =================================================================================


def test_batch_must_be_a_multiple_of_the_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(I, "world", lambda: (0, 3))
    monkeypatch.setattr(locks, "barrier", lambda: None)
    assert I.main(["--out", str(tmp_path), "--no-figures"]) == 2
    assert "multiple of 3" in capsys.readouterr().err
    monkeypatch.setattr(I, "world", lambda: (0, 1))
    assert I.main(["--out", str(tmp_path), "--sync-bn", "--device", "cpu"]) == 2
    assert "--sync-bn" in capsys.readouterr().err


@each(
    "device, local, gpus, taken",
    [
        ("auto", 0, 0, -1),  # no GPU: all share the CPU, however many they are
        ("auto", 7, 0, -1),
        ("cpu", 7, 2, -1),
        ("cuda", 1, 2, 1),
        ("auto", 0, 2, 0),
        ("auto", 2, 2, None),
        ("cuda:1", 0, 2, None),
        ("cuda:0", 0, 0, None),
    ],
)
def test_each_process_takes_the_gpu_of_its_number(device, local, gpus, taken, monkeypatch):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    if taken is None:
        with pytest.raises(I.InfoardError, match="--nproc-per-node"):
            ranks.take_device(device)
        assert calls == []
    else:
        assert ranks.take_device(device) == (taken >= 0)
        assert calls == [taken]


@each(
    "message, told",
    [
        ("[gloo/transport] Connection closed by peer", True),
        ("NCCL error in: ProcessGroup", True),
        ("Timed out after 3600000ms", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_a_lost_rank_causes_is_told_apart(message, told, monkeypatch):
    monkeypatch.setattr(ranks, "join", lambda device: 0)
    expected = I.InfoardError if told else RuntimeError
    with pytest.raises(expected) as error, ranks.all_ranks("cpu"):
        raise RuntimeError(message)
    assert type(error.value) is expected
    assert message[:99] in str(error.value)
    assert ("--resume" in str(error.value)) == told


@each("rank, printed", [(0, "inside\n"), (1, "")])
def test_rank_0_alone_prints(rank, printed, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "join", lambda device: rank)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.delenv("TQDM_DISABLE")
    with ranks.all_ranks("cpu"):
        print("inside")
    assert ("TQDM_DISABLE" in os.environ) == (rank == 1)
    assert capsys.readouterr().out == printed
    print("outside")
    assert capsys.readouterr().out == "outside\n"


@each("rank, order", [(0, ["load", "barrier"]), (1, ["barrier", "load"])])
@each("fails", [False, True])
def test_rank_0_goes_first_and_lets_the_others_go_even_if_it_fails(rank, order, fails, monkeypatch):
    done = []

    def load(name, size=1):
        done.append("load")
        I.require(not fails, "no data")
        return name * size

    monkeypatch.setattr(I, "world", lambda: (rank, 2))
    monkeypatch.setattr(ranks, "barrier", lambda: done.append("barrier"))
    in_turn = ranks.rank_0_first(load)
    if fails:
        pytest.raises(I.InfoardError, in_turn, "ab")
    else:
        assert in_turn("ab", size=2) == "abab"
    assert done == order


WHOLE = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"RANK": None, "MASTER_ADDR": None}, "LOCAL_RANK is set, but not RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "but not WORLD_SIZE: start by torchrun, or unset it"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', which is no number"),
        ({"RANK": "-1"}, "RANK is '-1', which is no number"),
        ({"RANK": "1"}, "RANK is 1 of 1 processes: it counts from 0"),
    ],
)
def test_half_an_environment_of_torchrun_is_one_line(change, told, monkeypatch, capsys):
    for name, value in {**WHOLE, **change}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert I.main("--dataset shapes --framework natural".split()) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
