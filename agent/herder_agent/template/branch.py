"""A ready template forks itself: the fork is a template, too, with a control socket of its own.

    agent ── branch ──▶ parent ── fork ──▶ branch: `open` ──▶ the same workload: a replica, which serves at once
      ◀── branched ────                                  └──▶ another one, whose steps begin with the parent's: a tree

One template forks no faster than one core can; replicas fork on several. A tree has what its parent has imported, and
shares its memory. Both are the parent's children: they die with it (PR_SET_PDEATHSIG), and it reaps them.

What a branch is not given. Pages that its parent pinned are not pinned here: a replica rehearses again. Of the parent's
descriptors it keeps those that its children need. The fork hooks that the parent leaves out (`hooks`) run again in a
tree as in any process that imports, and are left out again once it is sealed.
"""

from __future__ import annotations

import _socket
import gc
import os
import sys
import time

from . import build, child, failures, hooks, life, serve, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def become(stem: build.Template, parent: int, end: _socket.socket, log: int) -> NoReturn:
    """In the forked process: a template on the control socket `end`; `log` is its output, or -1 for its parent's.

    Never returns, and never unwinds into the parent's serving, which would kill the parent's children.
    """
    try:
        hooks.makes_up()()
        stem.plan.seen.withdraw()
        os.setsid()
        system.die_with(parent)
        _take_descriptors(stem, end, log)
        if "multiprocessing.util" in sys.modules:
            child.forget_processes()
        _live(stem, wire.adopt(life.CONTROL))
    except (BrokenPipeError, ConnectionResetError, wire.BrokenFrame):
        pass  # the agent is gone
    except BaseException:  # noqa: BLE001 - the top of a process
        sys.stderr.write(failures.traceback_text(sys.exc_info()[1] or RuntimeError("unknown")))
    finally:
        os._exit(0)
    raise AssertionError("not reached")


def _live(stem: build.Template, channel: wire.Channel) -> None:
    frame = channel.receive()
    if frame is None:
        return
    opening, setup = frame[0], bytes(frame[1])
    opening["began"] = time.monotonic()
    if opening["workload"].get("key") == stem.key:
        _replicate(stem, channel, opening)
        serve.Server(channel, stem.births, stem.become_branch).run()
        return
    hooks.watch()
    template = build.Template(channel, opening, setup, stem)
    births = template.build()
    if births is not None:
        serve.Server(channel, births, template.become_branch).run()


def _replicate(stem: build.Template, channel: wire.Channel, opening: dict[str, Any]) -> None:
    """Nothing has changed since the parent was sealed but that this is another process."""
    hooks.leave_out()
    gc.freeze()
    life.send_ready(channel, opening, dict(stem.how))


def _take_descriptors(stem: build.Template, end: _socket.socket, log: int) -> None:
    """Keep the standard streams, the control socket at its place, and what children need."""
    if log >= 0:
        os.dup2(log, 1)
        os.dup2(log, 2)
    os.dup2(end.fileno(), life.CONTROL, inheritable=False)
    end.detach()
    low = life.CONTROL + 1
    for kept in sorted(stem.plan.kept, key=lambda kept: kept.fd):
        os.closerange(low, kept.fd)
        low = max(low, kept.fd + 1)
    os.closerange(low, child.DESCRIPTORS_END)
