"""The last step before a template serves: everything that its children would otherwise each have to do, or pay for.

Copy-on-write stays as long as nobody writes. So garbage is collected now and never again (`gc.freeze` puts what is left
out of the collector's sight), and memory moves to where forks need not copy it (`transplant`), or is folded into huge
pages, which makes a fork cheaper several times over. Signal handlers, exit handlers and streams are put right here
instead of in each child.

The order matters to those who add to it: what changes objects (moving arrays into shared memory, making objects
immortal) comes before `gc.freeze`, what only moves pages after it.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys

from . import child, hooks, immortal, rehome, system, task, transplant, weigh

#: Heaps below this fork fast enough as they are.
COLLAPSE_BYTES_MIN = 32 << 20
#: The same for what moving it into a memory file costs: children map again what they read.
MOVE_BYTES_MIN = 12 << 20


def seal(plan: child.Plan, kept: list[int]) -> list[str]:
    """Make this process ready to be forked from. Returns what was done that the user may want to know."""
    _settle_signals()
    atexit._clear()
    _settle_streams()
    hooks.leave_out()
    _ = gc.collect()
    # Files of objects that were garbage have just been closed.
    plan.kept = [_kept(fd) for fd in kept if os.path.exists(f"/proc/self/fd/{fd}")]
    rehome.move_large_blocks()
    child.warm_up(plan)
    applied = immortal.settle(plan)
    gc.freeze()
    applied += [*rehome.tell(), *plan.runner.generators.notes]
    if system.memory_bytes()[1] > MOVE_BYTES_MIN:
        moved = transplant.transplant()
        if moved:
            applied.append(f"{moved >> 20} MiB of private memory moved into a memory file, which forks need not copy")
    if system.memory_bytes()[1] > COLLAPSE_BYTES_MIN:
        folded = system.collapse_huge_pages()
        if folded:
            applied.append(f"{folded >> 20} MiB folded into huge pages")
    plan.account["notes"] = weigh.notes(plan.seen._value)
    return applied


def _settle_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ignored = (signal.SIGPIPE, signal.SIGXFSZ)  # as Python itself sets them
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        wanted = signal.SIG_IGN if number in ignored else signal.SIG_DFL
        if signal.getsignal(number) not in (wanted, None):
            signal.signal(number, wanted)


def _settle_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A task's line is in its pipe when it is written: it survives a crash, and can be followed.
            reconfigure(line_buffering=True, errors="backslashreplace")
    task.flush_all()
    task.C_STREAMS.settle()


def _kept(fd: int) -> child.Kept:
    import fcntl
    import stat

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    target = os.readlink(f"/proc/self/fd/{fd}")
    plain = stat.S_ISREG(os.fstat(fd).st_mode) and not target.startswith(("/memfd:", "/dev/shm/"))
    offset = os.lseek(fd, 0, os.SEEK_CUR) if plain else 0
    return child.Kept(fd, flags & ~(os.O_CREAT | os.O_TRUNC) | os.O_CLOEXEC, offset, plain)
