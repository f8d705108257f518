"""Many processes that train as one: those that torchrun has started join here.

    torchrun --standalone --nproc-per-node=2 infoard.py --device cpu
    torchrun --nproc-per-node=8 --max-restarts=3 infoard.py --dataset cifar10 --device cuda --resume

Each process takes a GPU of its own (nccl), or all share the CPU (gloo), and each has an equal share
of every batch. infoard.py asks for this file when torchrun has started it; what the ranks then tell
each other (sums, rows of a batch, gradients) is in infoard.py itself.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

import infoard as I

LOST = ("gloo", "nccl", "peer", "timed out")  # words of the errors when another rank is gone


def barrier() -> None:
    """No rank goes on before all are here."""
    I.all_reduce_sum(torch.zeros(1))


def check_environment() -> None:
    """One line, unless the environment says all that a process of many must know."""
    numbers = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")
    missing = [name for name in (*numbers, "MASTER_ADDR") if not os.environ.get(name)]
    told = f"LOCAL_RANK is set, but not {', '.join(missing)}: start by torchrun, or unset it"
    I.require(not missing, told)
    for name in numbers:
        told = f"{name} is {os.environ[name]!r}, which is no number: start by torchrun"
        I.require(os.environ[name].isdigit(), told)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    I.require(rank < ranks, f"RANK is {rank} of {ranks} processes: it counts from 0")


def take_device(device: str) -> bool:
    """Gives this process the GPU of its number on this machine; False: all stay on the CPU."""
    local = int(os.environ["LOCAL_RANK"])
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    enough = gpus == 0 or local < gpus
    told = f"each process takes one of {gpus} GPUs: use --device cuda and no larger"
    I.require(":" not in device and enough, f"{told} --nproc-per-node")
    torch.cuda.set_device(local if gpus else -1)  # -1: none
    return gpus > 0


def join(device: str) -> int:
    """Waits until all processes are here; returns the rank of this one."""
    check_environment()
    backend = "cpu:gloo,cuda:nccl" if take_device(device) else "gloo"
    store, rank, ranks = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(attempt, store)  # it may still hold what an earlier attempt has said
    wait = timedelta(hours=1)  # so long may rank 0 fetch data while the others wait
    dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=ranks)
    return rank


@contextlib.contextmanager
def all_ranks(device: str = "auto") -> Iterator[None]:
    """Inside, the processes that torchrun has started are one job; all but rank 0 print nothing.

    device: what --device says. If another rank dies, the rest end with one line.
    """
    rank = join(device)
    output = sys.stdout
    if rank != 0:
        output = None
        os.environ["TQDM_DISABLE"] = "1"
    try:
        with contextlib.redirect_stdout(output):
            yield
        barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        lost = any(word in str(error).lower() for word in LOST)
        told = "another rank is gone: start all again with --resume"
        I.require(not lost, f"{told}; {str(error)[:99]}")
        raise


def rank_0_first(load: Callable) -> Callable:
    """load, for which the other ranks wait until rank 0 is done: they find what it has made."""

    def in_turn(*args, **options):
        rank = I.world()[0]
        if rank != 0:
            barrier()
        try:
            return load(*args, **options)
        finally:
            if rank == 0:
                barrier()

    return in_turn
