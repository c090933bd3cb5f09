"""Exec of a fresh interpreter or a command: what happens in the forked child until `execve`, and how its failure is
told.

A pipe that `execve` closes carries the failure: its end without a word means that the program runs.
"""

from __future__ import annotations

import os
import signal

from . import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

#: Status of a child that could not exec, as shells have it; the message is what counts.
STATUS_NOT_RUN = 127


def run(head: dict[str, Any], parent: int, sockets: tuple[int, int, int], stdin: int, failure: int) -> NoReturn:
    """In the child: become the program of this `exec` frame. `stdin` is -1 for none, `failure` the pipe's write end."""
    try:
        os.setsid()
        system.die_with(parent)
        system.become_subreaper()
        _exec(head, sockets, stdin)
    except BaseException as error:  # noqa: BLE001 - the top of a process
        os.write(failure, _explain(head, error).encode("utf-8", "replace")[:4000])
    finally:
        os._exit(STATUS_NOT_RUN)
    raise AssertionError("not reached")


def _exec(head: dict[str, Any], sockets: tuple[int, int, int], stdin: int) -> None:
    channel, out, err = sockets
    if stdin >= 0:
        os.lseek(stdin, 0, os.SEEK_SET)
        os.dup2(stdin, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    argv = [str(word) for word in head["argv"]]
    if channel >= 0:
        os.set_inheritable(channel, True)
        argv = [word.replace("{fd}", str(channel)) for word in argv]
    # All other descriptors are close-on-exec; Python made them so.
    if head.get("cwd"):
        try:
            os.chdir(head["cwd"])
        except OSError as error:
            raise NotEntered(error) from error
    if head.get("cpus"):
        os.sched_setaffinity(0, head["cpus"])
    try:
        system.enter_groups(head.get("groups") or [])
    except OSError as error:
        raise NoGroup(error.strerror) from error
    for name, (soft, hard) in (head.get("limits") or {}).items():
        system.set_limit(name, soft, hard)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execvpe(argv[0], argv, {str(name): str(value) for name, value in head.get("env", {}).items()})


class NotEntered(Exception):
    """The working folder cannot be entered."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)


class NoGroup(Exception):
    """The control groups that hold its limits cannot be entered."""


def _explain(head: dict[str, Any], error: BaseException) -> str:
    name = (head.get("argv") or ["?"])[0]
    if isinstance(error, NotEntered):
        return f"cannot enter the working folder {head.get('cwd')!r}: {error}"
    if isinstance(error, NoGroup):
        return f"cannot enter its control group: {error}"
    if isinstance(error, FileNotFoundError):
        path = head.get("env", {}).get("PATH", "")
        where = "" if "/" in name else f" on PATH ({path})"
        return f"command not found: {name!r}{where}"
    if isinstance(error, PermissionError):
        return f"cannot execute {name!r}: permission denied (is it executable?)"
    if isinstance(error, OSError):
        return f"cannot execute {name!r}: {error.strerror}"
    return f"cannot execute {name!r}: {type(error).__name__}: {error}"
