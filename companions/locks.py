"""A folder of one process: no other one trains into it, and nothing half written is left in it."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import infoard as I
from companions.ranks import barrier

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None


def is_locked(file, wait: bool) -> bool:
    """Locks an open file for this process; False where the system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read() or "another process"
        folder = Path(file.name).parent
        told = f"{folder} is in use by {who}"
        I.require(wait, f"{told}: wait for it to end, or choose another --out")
        print(f"{told}: waiting for it", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def take_lock(path: Path, wait: bool):
    """The open lock file of a folder, with who holds it in it; None where none can be made."""
    while fcntl is not None:
        try:
            file = open(path, "a+")
        except OSError:  # a folder to be read only: writing will say so
            return None
        try:
            if not is_locked(file, wait):
                file.close()
                return None
            here = os.fstat(file.fileno()).st_ino
            if path.exists() and path.stat().st_ino == here:  # not removed by who held it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    return None


def tidy(out: Path, evaluated: bool = False) -> None:
    """Removes what killed processes left half written and, once all is evaluated, what attacks have
    found on the way.
    """
    for part in out.glob("*.part*"):
        if re.search(r"\.(pt|json|jsonl)\.part\d+$", part.name):  # as infoard.save makes them
            part.unlink(missing_ok=True)
    for kept in out.glob("unfinished-*.pt") if evaluated else ():
        kept.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: Path, wait: bool) -> Iterator[None]:
    """Inside, no other process is in the folder: one line if one is, or it is waited for.

    It is made if it is missing, and goes again if nothing was written.
    """
    if I.world()[0] != 0:
        barrier()  # what rank 0 waits for, all wait for
        yield
        return
    before = (out / "results.json").exists()
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    with contextlib.suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
    lock = take_lock(out / ".lock", wait)
    try:
        barrier()
        with contextlib.suppress(OSError):
            tidy(out)
        yield
    finally:
        with contextlib.suppress(OSError):
            tidy(out, not before and (out / "results.json").exists())
        if lock:
            with contextlib.suppress(OSError):
                (out / ".lock").unlink()
            fcntl.flock(lock, fcntl.LOCK_UN)
            lock.close()
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
