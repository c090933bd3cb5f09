"""The client inside a task, without a task: the agent is played at the other end of its private socket.
(`tests/system/test_tasks_that_submit.py` has the real thing.)"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest

from herder import workload
from herder.task_client import InheritedWorkload, OwnClient
from herder_shared.errors import HerderError, ProtocolMismatch
from herder_shared.ids import ClusterId, WorkloadKey
from herder_shared.states import Outcome
from herder_shared.wire import messages as m
from herder_shared.wire.frame import FrameDecoder, encode_frame
from herder_shared.wire.relay import (
    RELAY_FRAME_BYTES_MAX,
    Closed,
    Heard,
    Opened,
    Said,
    SlotBack,
    TaskHello,
    WaitBegan,
    WaitEnded,
    from_task,
    read_from_client,
)

WAIT_S = 10.0
SPEC = m.WorkloadSpec(
    WorkloadKey("w" * 16), name="mine", preload=("json",), paths=("where-the-script-is",), demoted="why"
)
WELCOME = m.Welcome(ClusterId("c" * 32), 3, 5)
encode = msgspec.msgpack.Encoder().encode


class Task:
    id = "job.0"
    cpus: tuple[int, ...] = ()


class Agent:
    """The agent's end."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(WAIT_S)
        self.fd = theirs.detach()
        self._frames = FrameDecoder(RELAY_FRAME_BYTES_MAX)
        self._heard: list[Any] = []

    def tell(self, *messages: msgspec.Struct) -> None:
        self.socket.sendall(b"".join(map(encode_frame, messages)))

    def hear(self) -> Any:
        while not self._heard:
            data = self.socket.recv(1 << 20)
            assert data, "the client has closed its end"
            for body in self._frames.feed(data):
                told = from_task.decode(body)
                self._heard.append(read_from_client(told.body) if isinstance(told, Said) else told)
        return self._heard.pop(0)

    def hear_until(self, kind: type) -> Any:
        while not isinstance(told := self.hear(), kind):
            pass
        return told


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.socket.close()


@pytest.fixture
def own(agent: Agent) -> Iterator[OwnClient]:
    agent.tell(Opened(WELCOME, SPEC, m.TaskOptions(priority=7)))
    own = OwnClient(agent.fd, Task())
    assert isinstance(agent.hear(), TaskHello)
    yield own
    own.leave(well=False)


def end_of(index: int, value: bytes) -> m.TaskEnd:
    return m.TaskEnd(index, Outcome.SUCCEEDED, m.Payload(value))


def test_what_it_submits_starts_as_the_task_did(agent: Agent, own: OwnClient) -> None:
    own.fresh().submit(len, "abc")
    spec = agent.hear_until(m.OpenJob).spec
    assert spec.workload == msgspec.structs.replace(SPEC, demoted="")
    assert spec.options.priority == 7
    assert workload.user_code_paths() == SPEC.paths


def test_commands_take_over_what_concerns_them() -> None:
    spec = m.WorkloadSpec(WorkloadKey("w" * 16), name="mine", preload=("json",), env={"A": "b"}, working_dir="/tmp")
    wire = InheritedWorkload(spec).for_wire("command").spec
    assert (wire.kind, wire.env, wire.working_dir, wire.preload) == ("command", {"A": "b"}, "/tmp", ())
    assert wire.key != spec.key


def test_it_says_when_it_waits_and_goes_on_when_it_may(agent: Agent, own: OwnClient) -> None:
    future = own.fresh().submit(len, "abc")
    job = cast("Any", future).job
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.append(future.result(WAIT_S)))
    thread.start()
    assert isinstance(agent.hear_until(WaitBegan), WaitBegan)
    agent.tell(Heard(encode(m.SubmitOk(job, 1))), Heard(encode(m.TasksEnded(job, 0, (end_of(0, b"\x80\x05K\x03."),)))))
    n = agent.hear_until(WaitEnded).n
    assert not values
    agent.tell(SlotBack(n, tuple(os.sched_getaffinity(0))))
    thread.join(WAIT_S)
    assert values == [3]


def test_what_was_not_acknowledged_is_said_again_when_the_coordinator_is_back(agent: Agent, own: OwnClient) -> None:
    own.fresh().submit(len, "abc")
    submitted = agent.hear_until(m.SubmitTasks)
    agent.tell(Closed(), Opened(WELCOME, SPEC, m.TaskOptions()))
    agent.hear_until(m.OpenJob)
    assert agent.hear_until(m.SubmitTasks) == submitted


def test_it_greets_again_where_that_may_help(agent: Agent, own: OwnClient) -> None:
    agent.tell(m.Refused("Unreachable", "the coordinator is ending"))
    assert isinstance(agent.hear_until(TaskHello), TaskHello)
    assert own.fresh() is not own.fresh()


def test_a_refusal_ends_what_waits(agent: Agent, own: OwnClient) -> None:
    future = own.fresh().submit(len, "abc")
    agent.hear_until(m.SubmitTasks)
    agent.tell(m.Refused("HerderError", "too many wait"))
    with pytest.raises(HerderError, match="too many wait"):
        future.result(WAIT_S)


def test_one_that_is_not_wanted_is_told_why_at_once(agent: Agent) -> None:
    agent.tell(m.Refused("ProtocolMismatch", "another version"))
    with pytest.raises(ProtocolMismatch, match="another version"):
        OwnClient(agent.fd, Task())


def test_a_task_that_fails_says_goodbye_for_what_it_submitted(agent: Agent, own: OwnClient) -> None:
    own.fresh().submit(len, "abc")
    agent.hear_until(m.SubmitTasks)
    own.leave(well=False)
    assert isinstance(agent.hear_until(m.Goodbye), m.Goodbye)
    assert workload.task_paths is None
