"""Children that are forked with their task: told of when they are over, or when they are young no more."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from agent.template import driver
from herder_agent.template.young import Nursery


def test_task_that_takes_longer_is_introduced_and_answers_itself(bare: driver.Template) -> None:
    def work(seconds: float) -> str:
        print("begun", flush=True)
        time.sleep(seconds)
        print("ended")
        return "value"

    number = bare.hand(work, 0.2)
    child = bare.introduced()
    assert child.id == number
    assert child.answer()[1] == "value"
    assert child.exited()["status"] == 0
    assert child.output() == ("begun\nended\n", "")


def test_many_at_once_are_all_told_of_once(bare: driver.Template) -> None:
    numbers = [bare.hand(lambda number: number, number) for number in range(20)]
    assert [bare.done(number).value for number in numbers] == list(range(20))


def test_young_child_can_be_killed_before_anybody_has_heard_of_it(bare: driver.Template) -> None:
    number = bare.hand(time.sleep, 60)
    bare.frames.send({"t": "kill", "child": number, "signal": int(signal.SIGKILL)})
    done = bare.done(number)
    assert (done.answer, os.waitstatus_to_exitcode(done.status)) == (None, -signal.SIGKILL)


def test_what_a_task_did_to_its_pipes_is_not_seen_by_the_next(bare: driver.Template) -> None:
    def spoil() -> None:
        os.set_blocking(1, False)
        print("spoilt")

    def look() -> tuple[bool, bool]:
        return os.get_blocking(1), os.get_blocking(2)

    assert bare.done(bare.hand(spoil)).out == "spoilt\n"
    done = bare.done(bare.hand(look))
    assert (done.value, done.out) == ((True, True), "")


def test_orphans_are_gone_when_the_end_is_told(bare: driver.Template) -> None:
    def leave_one() -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        return pid

    orphan = bare.done(bare.hand(leave_one)).value
    assert not os.path.exists(f"/proc/{orphan}")


class Births:
    """Children that end at once."""

    def way_of(self, _order: object) -> Callable[..., NoReturn]:
        return lambda *_: os._exit(0)


def test_one_that_has_ended_grows_no_older_while_its_orphans_die() -> None:
    with select.epoll() as poll:
        nursery = Nursery(Births(), poll, {}, {})  # type: ignore[arg-type]
        assert nursery.fork([({"child": number, "cpus": None}, memoryview(b"")) for number in (1, 2)]) == []
        ended, other = nursery.young.values()
        for child in (ended, other):
            os.waitpid(child.pid, 0)
            os.close(child.pidfd)
        nursery.has_ended(ended)
        ended.young_s = other.young_s = 0.0
        assert nursery.release() == [other]
        assert ended.near is not None
        ended.near.close()
        for fd in (*ended.pipes, *other.fds):
            os.close(fd)


def test_more_output_than_a_pipe_holds_waits_for_the_agent(bare: driver.Template) -> None:
    def write() -> None:
        print("x" * 200_000)

    bare.hand(write)
    child = bare.introduced()
    out = b""
    while len(out) < 200_001:
        out += os.read(child.out, 65536)
    assert child.answer()[0]["t"] == "result"


def test_idle_children_and_those_with_tasks_get_on(bare: driver.Template) -> None:
    child = bare.fork()
    assert bare.done(bare.hand(lambda: 1)).value == 1
    assert child.run(lambda: 2) == 2


def test_template_has_no_more_descriptors_after_many_tasks(bare: driver.Template) -> None:
    def count() -> int:
        return len(os.listdir(f"/proc/{bare.process.pid}/fd"))

    bare.done(bare.hand(lambda: None))
    before = count()
    for _ in range(30):
        bare.done(bare.hand(lambda: None))
    assert count() <= before + 4, "the two pipes which the next child takes, unless the last one grew old with them"


def test_spawner_refuses_tasks(spawner: driver.Template) -> None:
    spawner.hand(lambda: None)
    head, _ = spawner.frames.receive()
    assert (head["t"], "no workload" in head["message"]) == ("fork_failed", True)
