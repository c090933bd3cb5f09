"""A private control group for a test, so that nothing that it makes is in anybody's way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from herder_agent.runtime.cgroups import own_folders

#: How long a group's last process may take to leave it.
_EMPTY_S = 5.0


def home() -> dict[str, Path]:
    """Where this process is, of what limits can be had by: version 1's memory and pids, else version 2's group."""
    own = own_folders()
    names = {"memory", "pids"} & own.keys() or {""} & own.keys()
    return {name: own[name] for name in sorted(names)}


@contextmanager
def private_group() -> Iterator[list[Path]]:
    """This process, and what it starts, is in a group of its own meanwhile, where it may have one."""
    made: list[tuple[Path, Path]] = []
    for folder in home().values():
        private = folder / f"test-of-herder-{os.getpid()}"
        try:
            private.mkdir()
            made.append((folder, private))
            (private / "cgroup.procs").write_text("0")
        except OSError:
            continue
    try:
        yield [private for _, private in made]
    finally:
        for folder, private in made:
            with suppress(OSError):
                (folder / "cgroup.procs").write_text("0")
            _remove(private)


@contextmanager
def group_for_an_agent() -> Iterator[tuple[str, ...]]:
    """Flags for an agent that is to use control groups; below a private one, where it may have one."""
    with private_group() as made:
        unified = next((private for private in made if (private / "cgroup.subtree_control").exists()), None)
        if unified is not None:
            # Of version 2 it must have one without other processes.
            (unified.parent / "cgroup.procs").write_text("0")
        yield () if unified is None else ("--cgroup", str(unified))


def _remove(private: Path) -> None:
    deadline_s = time.monotonic() + _EMPTY_S
    while True:
        try:
            for below in private.glob("herder-*"):
                # Of a test that failed half-way.
                for pid in (below / "cgroup.procs").read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                below.rmdir()
            private.rmdir()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
        else:
            return
