"""A template at work: kill, reap, orphans, accounts."""

from __future__ import annotations

import os
import signal
import time

import pytest

from agent.template import driver
from herder_agent.template import wire


def test_kill_reaches_descendants_in_sessions_of_their_own(bare: driver.Template) -> None:
    def daemonise() -> None:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.write(1, f"{os.getpid()}\n".encode())
                time.sleep(600)
            os._exit(0)
        time.sleep(600)

    child = bare.fork()
    child.send(daemonise)
    pid = int(os.read(child.out, 100))
    fd = os.pidfd_open(pid)
    try:
        bare.kill(child)
        assert child.exited()["status"] & 127 == signal.SIGKILL
        assert driver.wait_gone(fd)
    finally:
        os.close(fd)


def test_exited_comes_when_the_last_process_left_behind_is_gone(bare: driver.Template) -> None:
    def leave_behind() -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            time.sleep(600)
        return pid

    child = bare.fork()
    pid = child.run(leave_behind)
    assert child.exited()["status"] == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_sigterm_ends_a_running_task_by_that_signal(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda: time.sleep(600))
    assert child.task_socket.receive()[0]["t"] == "started"
    bare.kill(child, signal.SIGTERM)
    assert child.exited()["status"] == signal.SIGTERM


def test_children_die_with_their_template() -> None:
    with driver.ready() as running:
        child = running.fork()
        child.send(lambda: time.sleep(600))
        assert child.task_socket.receive()[0]["t"] == "started"
        running.process.kill()
        assert driver.wait_gone(child.pidfd)


def test_no_child_is_left_unreaped(bare: driver.Template) -> None:
    for _ in range(3):
        child = bare.fork()
        child.run(int)
        child.exited()
    with open(f"/proc/{bare.process.pid}/task/{bare.process.pid}/children", encoding="ascii") as file:
        left = [int(word) for word in file.read().split()]
    known = {child.pid for child in bare.children.values()}
    assert [pid for pid in left if pid not in known] == []
    assert bare.stats()["threads"] == 1


def test_oom_score_is_raised_in_the_child_alone(bare: driver.Template) -> None:
    child = bare.fork()
    bare.stats()  # answered after the fork is over
    with open(f"/proc/{bare.process.pid}/oom_score_adj", encoding="ascii") as file:
        template = int(file.read())
    assert child.run(lambda: int(open("/proc/self/oom_score_adj").read())) == 500  # noqa: SIM115
    assert template == 0


def test_a_spawner_does_not_fork_tasks(spawner: driver.Template) -> None:
    spawner.frames.send({"t": "fork", "n": 1, "children": [{"child": 999}]})
    head, _ = spawner.frames.receive()
    assert (head["t"], head["child"]) == ("fork_failed", 999)


def test_frames_that_came_together_with_open_are_answered() -> None:
    running = driver.Template()
    try:
        frames: list[driver.Head] = [{"t": "open", "spawner": True, "workload": {}}, {"t": "stats"}]
        running.frames.socket.sendall(b"".join(wire.pack(frame) for frame in frames))
        assert [running.frames.receive()[0]["t"] for _ in frames] == ["ready", "stats"]
    finally:
        running.close()


def test_children_forked_in_a_row_each_have_their_own_ends(bare: driver.Template) -> None:
    ids = list(range(100, 109))
    bare.frames.send({"t": "fork", "n": len(ids), "children": [{"child": id} for id in ids]})  # noqa: A001
    children = [bare._expect_child(id) for id in ids]  # noqa: A001
    for child in children:
        child.send(lambda: print(os.getpid()))
    for child in reversed(children):
        assert child.answer()[0]["t"] == "result"
        assert child.exited()["pid"] == child.pid
        assert child.output()[0] == f"{child.pid}\n"
