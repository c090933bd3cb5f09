"""The end of a template's life."""

from __future__ import annotations

from agent.template import driver


def test_children_end_when_the_agent_is_gone() -> None:
    with driver.ready() as running:
        child = running.fork()
        running.frames.socket.shutdown(2)
        assert driver.wait_gone(child.pidfd)
        assert running.process.wait(10) == 0


def test_a_frame_that_is_none_ends_the_template() -> None:
    with driver.ready() as running:
        running.frames.socket.sendall(b"\xff" * 64)
        assert running.process.wait(10) == 0
