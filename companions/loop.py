"""What goes on around the training loop: signals that are noted, a stop that saves all, how long it
takes.

infoard.fit asks for these by name. Alone it is stopped at once by any signal, and goes on from the
end of the last epoch.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import infoard as I
from companions.ranks import barrier
from companions.runs import how_to_go_on


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list of the signals that arrive inside: the first is noted, a second acts at once."""
    caught = []

    def note(number: int, frame) -> None:
        caught.append(number)
        os.write(2, b"stopping after this step; the same signal once more stops at once\n")
        signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # outside the main thread
                stack.callback(signal.signal, number, signal.signal(number, note))
        yield caught


def stop_if_told(run: I.Run, out: Path, caught: list[int]) -> None:
    """Ends a training, with all saved, if any rank has caught a signal."""
    if I.all_reduce_sum(torch.tensor(sum(caught))) == 0:
        return
    last = out / "last.pt"
    I.save(last, run.state())
    barrier()  # no rank is gone before it is saved
    number = caught[0] if caught else signal.SIGTERM
    print(f"stopped by {signal.Signals(number).name} at step {run.at.step}, all saved in", end=" ")
    print(f"{last}: {how_to_go_on(out)} goes on")
    raise SystemExit(128 + number)


def with_estimate(run: I.Run, begins: Iterable[int], n: int) -> Iterator[int]:
    """Where batches begin; after 25 steps a line tells how long n images in each epoch will take.

    It counts 20 steps in which nothing starts up.
    """
    marks = []
    for begin in begins:
        yield begin
        if run.at.step in (5, 25):
            run.at.sums["loss"].item()  # the device has made them
            marks.append(time.time())
        if run.at.step == 25 and len(marks) == 2:
            epochs, seconds = run.cfg.epochs, (marks[1] - marks[0]) / 20
            minutes = seconds * n / run.cfg.batch_size * epochs / 60
            print(f"about {minutes:.1f} minutes (epochs: {epochs}), plus validation")
