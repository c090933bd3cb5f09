"""Forks and the interpreter's end, in interpreters of their own: each connection is told what it must do, in order."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import cast

import pytest

from herder import lifetime
from herder.connection import Connection

pytestmark = pytest.mark.slow

#: A connection which says what it is told.
_SPEAKER = """
import os, signal, sys
from herder import lifetime

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

class Speaker:
    is_foreign = False
    def refuse_new(self): say("refuse_new")
    def wait_settled(self): say("wait_settled")
    def end(self, error): say("end", error)
    def disown(self):
        self.is_foreign = True
        say("disown")

speaker = Speaker()
lifetime.register(speaker)
"""


def run(script: str) -> tuple[list[str], str]:
    """What an interpreter that registers a `Speaker` and goes on with `script` says, and its errors."""
    argv = [sys.executable, "-c", _SPEAKER + script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.splitlines(), done.stderr


def test_interpreter_waits_for_what_was_submitted_before_it_ends() -> None:
    assert run("say('main is over')") == (["main is over", "refuse_new", "wait_settled", "end None"], "")


def test_nothing_is_waited_for_after_ctrl_c() -> None:
    said, errors = run("os.kill(os.getpid(), signal.SIGINT)\nsignal.pause()")
    assert said == ["refuse_new", "end None"]
    assert "KeyboardInterrupt" in errors


def test_ctrl_c_while_waiting_ends_the_wait_and_that_of_the_others() -> None:
    script = """
def wait_settled():
    say("waits")
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
speaker.wait_settled = wait_settled
other = Speaker()
other.wait_settled = wait_settled
lifetime.register(other)
"""
    said, _ = run(script)
    assert said == ["refuse_new", "waits", "end None", "refuse_new", "end None"]


def test_forked_child_disowns_its_parents_connections_and_ends_without_them() -> None:
    script = """
pid = os.fork()
if pid == 0:
    say("child")
else:
    os.waitpid(pid, 0)
    say("parent", speaker.is_foreign)
"""
    assert run(script) == (["disown", "child", "parent False", "refuse_new", "wait_settled", "end None"], "")


def test_connections_that_nobody_holds_are_not_kept() -> None:
    class Held:
        pass

    held = Held()
    lifetime.register(cast("Connection", held))
    gone = weakref.ref(held)
    del held
    gc.collect()
    assert gone() is None
