"""What an agent is told, how orders are cut, and that functions do not pile up."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events, records
from herder_coordinator.core.effects import Persist
from herder_shared import limits
from herder_shared.ids import BlobId
from herder_shared.wire.messages import Function, Payload, StartAttempts, TaskItem
from support.core_lab import CLIENT, FUNCTION, JOB, Lab, item, success, to_agent


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def orders(some: list[object]) -> list[StartAttempts]:
    return [message for message in to_agent(some) if isinstance(message, StartAttempts)]  # type: ignore[arg-type]


def test_a_session_is_told_each_thing_once(lab: Lab) -> None:
    lab.node(cores=10)
    lab.open()
    (first,) = orders(list(lab.submit(1)))
    (second,) = orders(list(lab.submit(1)))
    assert (len(first.workloads), len(first.jobs), len(first.functions)) == (1, 1, 1)
    assert (second.workloads, second.jobs, second.functions) == ((), (), ())


def test_a_new_session_is_told_again(lab: Lab) -> None:
    lab.node(cores=10)
    lab.open()
    lab.submit(1)
    lab.connect(session=2, cores=10)
    (order,) = orders(list(lab.sync(session=2)))
    assert (len(order.workloads), len(order.jobs), len(order.functions)) == (1, 1, 1)


def test_what_waits_for_the_disk_is_told_by_every_order_as_another_could_overtake_it(lab: Lab) -> None:
    lab.node(cores=10)
    lab.open(idempotent=False)
    for _ in range(2):
        (order,) = orders(list(lab.submit(1)))
        assert (len(order.workloads), len(order.jobs), len(order.functions)) == (1, 1, 1)


def test_orders_are_cut_so_that_a_frame_never_holds_up_a_heartbeat(lab: Lab) -> None:
    lab.node(cores=100)
    lab.open()
    large = tuple(TaskItem(Payload(b"x" * 60_000)) for _ in range(30))
    messages = orders(list(lab.submit(items=large)))
    assert sum(len(message.attempts) for message in messages) == 30
    for message in messages:
        assert sum(len(start.args.inline) for start in message.attempts) < limits.BATCH_BYTES_MAX + 60_000


def test_functions_that_no_task_uses_are_dropped_in_the_end(lab: Lab) -> None:
    lab.node()
    lab.open()
    for number in range(400):
        function = Function(BlobId(f"f{number}"), b"code")
        lab.do(events.TasksSubmitted(CLIENT, JOB, number, function, (item(index=number),), ""))
        lab.ended(success(lab.attempt(number), number))
    assert len(lab.state.functions) <= 257
    assert any(isinstance(record, records.FunctionsDropped) for record in lab.records)
    some = lab.do(events.TasksSubmitted(CLIENT, JOB, 400, Function(BlobId("f0"), b"code"), (item(index=400),), ""))
    assert Persist(records.FunctionKept(Function(BlobId("f0"), b"code"))) in some
    (order,) = orders(list(some))
    assert [function.id for function in order.functions] == ["f0"]


def test_a_functions_bytes_are_journalled_once(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    lab.submit(1)
    assert lab.records.count(records.FunctionKept(FUNCTION)) == 1
