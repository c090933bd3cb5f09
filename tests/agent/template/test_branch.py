"""A ready template forks itself: replicas serve at once, trees build on, and all of them end with their parent."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.slow


class Branch(driver.Template):
    """A template that another one forked."""

    def __init__(self, parent: driver.Template, log: Path | None = None) -> None:
        fds = (os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),) if log is not None else ()
        parent.frames.send({"t": "branch", "template": 7, "log": bool(fds)}, b"", fds)
        for fd in fds:
            os.close(fd)
        head = parent._expect("branched")
        assert head["template"] == 7
        end, self.pidfd = parent.frames.take(2)
        self.pid: int = head["pid"]
        self.frames = driver.Frames(socket.socket(fileno=end))
        self.children, self.steps, self.ready, self.values = {}, [], {}, []
        self._made, self._exited = 100, {}

    def close(self) -> None:
        for fd in self.values:
            os.close(fd)
        self.frames.close()
        assert driver.wait_gone(self.pidfd)
        os.close(self.pidfd)
        for child in self.children.values():
            assert driver.wait_gone(child.pidfd)
            child.close()


@contextmanager
def branch(parent: driver.Template, log: Path | None = None) -> Iterator[Branch]:
    made = Branch(parent, log)
    try:
        yield made
    finally:
        made.close()


def lineage() -> tuple[int, int]:
    return os.getpid(), os.getppid()


def modules(*names: str) -> list[bool]:
    return [name in sys.modules for name in names]


def descriptors() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
        for fd in range(3, 64)
        if Path(f"/proc/self/fd/{fd}").exists()
    }


def steps_of(template: driver.Template) -> list[str]:
    return [head["step"] for head in template.steps]


def test_replica_serves_at_once_as_its_parent_does() -> None:
    with driver.ready(key="a", preload=["decimal"]) as parent, branch(parent) as replica:
        ready = replica.open(key="a", preload=["decimal"])
        assert ready["t"] == "ready"
        assert ready["pid"] == replica.pid != parent.ready["pid"]
        told = ("start", "fork_point", "reason", "python", "setup_mode", "notes")
        assert [ready[name] for name in told] == [parent.ready[name] for name in told]
        assert ready["start_s"] < parent.ready["start_s"]
        assert replica.steps == []
        children = [replica.fork() for _ in range(5)]
        for child in children:
            assert child.run(lineage) == (child.pid, replica.pid)
            assert child.exited()["status"] == 0
        assert parent.fork().run(lineage)[1] == parent.ready["pid"]
        assert parent.stats()["children"] <= 1


def test_children_of_a_replica_hold_what_children_of_its_parent_hold() -> None:
    with driver.ready(key="a") as parent, branch(parent) as replica:
        replica.open(key="a")
        assert replica.fork().run(descriptors) == parent.fork().run(descriptors)
        assert replica.fork().run(os.getpgrp) != parent.fork().run(os.getpgrp)


def test_replica_of_a_template_with_setup_has_its_value() -> None:
    def setup() -> Any:
        return {"answer": 42, "pid": os.getpid()}

    def answer() -> Any:
        import herder

        return herder.shared()

    with driver.ready(setup, key="a") as parent, branch(parent) as replica:
        replica.open(setup, key="a")
        assert replica.fork().run(answer) == {"answer": 42, "pid": parent.ready["pid"]}


def test_tree_builds_on_and_tells_all_of_its_steps(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with driver.ready(key="a", preload=["decimal"]) as parent, branch(parent, log) as tree:

        def setup() -> Any:
            print("said in setup")
            return sys.modules["fractions"].Fraction(1, 3)

        ready = tree.open(setup, key="b", preload=["decimal", "fractions"])
        assert ready["t"] == "ready", ready
        assert ready["fork_point"] == "setup"
        assert ready["pid"] == tree.pid
        assert steps_of(tree) == ["start", "import decimal", "import fractions", "setup", "canary", "seal"]
        assert tree.steps[:2] == parent.steps[:2]
        assert tree.fork().run(modules, "decimal", "fractions") == [True, True]
        assert parent.fork().run(modules, "decimal", "fractions") == [True, False]
        assert "said in setup" in log.read_text()


def test_branches_of_a_tree_are_its_own() -> None:
    with driver.ready(key="a", preload=["decimal"]) as parent, branch(parent) as tree:
        tree.open(key="b", preload=["decimal", "fractions"])
        with branch(tree) as replica, branch(tree) as next_tree:
            replica.open(key="b", preload=["decimal", "fractions"])
            next_tree.open(key="c", preload=["decimal", "fractions", "statistics"])
            assert replica.fork().run(modules, "fractions", "statistics") == [True, False]
            assert next_tree.fork().run(modules, "fractions", "statistics") == [True, True]
            assert steps_of(next_tree)[:4] == ["start", "import decimal", "import fractions", "import statistics"]


def test_tree_that_becomes_unsafe_begins_anew_and_forks_from_the_last_safe_step() -> None:
    def setup() -> Any:
        import threading

        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        return thread  # which does not pickle: it cannot be handed over

    with driver.ready(key="a", preload=["decimal"]) as parent, branch(parent) as tree:
        ready = tree.open(setup, key="b", preload=["decimal", "fractions"])
        assert (ready["start"], ready["fork_point"]) == ("fork", "import fractions"), ready
        assert ready["pid"] == tree.pid
        assert steps_of(tree)[:4] == ["start", "import decimal", "import fractions", "setup"]
        child = tree.fork()
        assert child.run(lineage) == (child.pid, tree.pid)


def test_tree_whose_setup_raises_says_so_and_ends() -> None:
    def setup() -> None:
        raise ValueError("no")

    with driver.ready(key="a", preload=["decimal"]) as parent:
        with branch(parent) as tree:
            assert tree.open(setup, key="b", preload=["decimal"])["cause"] == "setup_failed"
            assert driver.wait_gone(tree.pidfd)
        assert parent.fork().run(lineage)[1] == parent.ready["pid"]


def test_a_parent_that_is_killed_takes_its_branches_and_their_children_along() -> None:
    with driver.template() as parent:
        assert parent.open(key="a")["t"] == "ready"
        replica = Branch(parent)
        replica.open(key="a")
        child = replica.fork()
        os.kill(parent.process.pid, signal.SIGKILL)
        assert driver.wait_gone(replica.pidfd)
        assert driver.wait_gone(child.pidfd)
        replica.close()


def test_parent_reaps_its_branches_and_spares_them_when_it_kills_orphans() -> None:
    with driver.ready(key="a") as parent:
        with branch(parent) as replica:
            replica.open(key="a")
            child = parent.fork()
            child.run(lineage)
            child.exited()  # orphans were looked for
            assert replica.fork().run(lineage)[1] == replica.pid
            pid = replica.pid
        child = parent.fork()
        child.run(lineage)
        child.exited()
        assert not Path(f"/proc/{pid}").exists()


def test_branch_that_is_told_nothing_ends_with_its_socket() -> None:
    with driver.ready(key="a") as parent, branch(parent):
        pass


def test_spawner_does_not_branch() -> None:
    with driver.ready(spawner=True) as spawner:
        spawner.frames.send({"t": "branch", "template": 3})
        head, _ = spawner.frames.receive()
        assert (head["t"], head["template"]) == ("branch_failed", 3)
